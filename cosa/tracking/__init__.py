"""Where a run's settings, metrics and pictures are kept, with a store that may fail.

Rules that hold throughout: one run has one id for life, so a resumed run reopens its own; what is told goes
to the run's own journal first and from there to the store, in order and once; a store that does not answer
costs a warning, never the training; passwords in a tracking URI are shown to nobody and kept nowhere. MLflow
is imported only where a run is really tracked.

    tracker     what the trainer tells: Tracker, MlflowTracker, TrackingSpec
    journal     what was told, on the disk, and how much of it the store has
    sync        from the journal to the store: `sync_run`, and the thread that does so while training goes on
    store       the store itself: where it is, made, met, asked for models
    provenance  what a result was made with
    costs       what a run will take, by finished runs or a formula
"""

from __future__ import annotations

from cosa.tracking.journal import RUN_FILE, find_tracked, read_run_id, sync_status
from cosa.tracking.store import (
    KIND,
    RunGoneError,
    TrackingError,
    download_model,
    explained,
    find_run,
    initialise_store,
    read_json,
    register_model,
    require_name,
    resolve_uri,
    save_pyfunc,
    sqlite_uri,
    ui_hint,
    ui_steps,
)
from cosa.tracking.sync import StillRunningError, sync_run
from cosa.tracking.tracker import MlflowTracker, Tracker, TrackingSpec

__all__ = [
    "KIND",
    "RUN_FILE",
    "MlflowTracker",
    "RunGoneError",
    "StillRunningError",
    "Tracker",
    "TrackingError",
    "TrackingSpec",
    "download_model",
    "explained",
    "find_run",
    "find_tracked",
    "initialise_store",
    "read_json",
    "read_run_id",
    "register_model",
    "require_name",
    "resolve_uri",
    "save_pyfunc",
    "sqlite_uri",
    "sync_run",
    "sync_status",
    "ui_hint",
    "ui_steps",
]
