"""Where a run's settings, metrics and pictures are kept, with a store that may fail.

Rules that hold throughout: one run has one id for life, so a resumed run reopens its own; what is told goes
to the run's own journal first and from there to the store, in order and once; a store that does not answer
costs a warning, never the training; passwords in a tracking URI are shown to nobody and kept nowhere. MLflow
is imported only where a run is really tracked.

    tracker     what the trainer tells: Tracker, NullTracker, MlflowTracker, TrackingSpec
    journal     what was told, on the disk, and how much of it was delivered
    courier     the thread that delivers while training goes on
    delivery    from the journal to the store; `flush` for runs that are no more
    store       the store itself: made, met, asked for models
    place       tracking URIs
"""

from __future__ import annotations

from cosa.storage.files import mask
from cosa.tracking.journal import RUN_FILE, InUseError, Standing, find_journals, read_run_id, standing
from cosa.tracking.place import RunGoneError, TrackingError, require_name, resolve_uri, ui_hint
from cosa.tracking.store import download_model, find_run, initialise_store, save_pyfunc
from cosa.tracking.sync import Flushed, flush, kept_uri
from cosa.tracking.tracker import DATA_TAG, MlflowTracker, NullTracker, Status, Tracker, TrackingSpec

__all__ = [
    "DATA_TAG",
    "RUN_FILE",
    "Flushed",
    "InUseError",
    "MlflowTracker",
    "NullTracker",
    "RunGoneError",
    "Standing",
    "Status",
    "Tracker",
    "TrackingError",
    "TrackingSpec",
    "download_model",
    "find_journals",
    "find_run",
    "flush",
    "initialise_store",
    "kept_uri",
    "mask",
    "read_run_id",
    "require_name",
    "resolve_uri",
    "save_pyfunc",
    "standing",
    "ui_hint",
]
