"""The data of one run, opened on every rank: the same on all of them, or refused by the machine's name.

Machines that each hold a copy of the images can differ without a word: an old copy, a list that was edited, a
download that stopped. Ranks compare fingerprints before anything is trained, and all stop with the same line.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cosa.config import Config, DataConfig
from cosa.data.dataset import SegmentationDataset, open_dataset
from cosa.structures import Ranks

_log = logging.getLogger(__name__)

TRAINING_TAG = "cosa.data_fingerprint"
VALIDATION_TAG = "cosa.val_fingerprint"


@dataclass(frozen=True, eq=False)
class RunData:
    """What one run reads."""

    training: SegmentationDataset
    """Images to learn from."""
    validation: SegmentationDataset | None
    """The split that evaluation reads; None without one."""
    judged: SegmentationDataset | None
    """Training images whose CPL are judged after the last step; None where none are to be."""

    @functools.cached_property
    def tags(self) -> Mapping[str, str]:
        """Fingerprints of the training and validation images, by the names a tracker knows them by."""
        return fingerprints(self.training, self.validation)


def fingerprints(training: SegmentationDataset, validation: SegmentationDataset | None) -> dict[str, str]:
    """Fingerprints by tag; without a validation split its tag is empty."""
    return {
        TRAINING_TAG: training.fingerprint(),  # looks at every file
        VALIDATION_TAG: validation.fingerprint() if validation else "",
    }


def read_fingerprints(data: DataConfig) -> dict[str, str]:
    """The same from the settings alone; no mask is read or drawn.

    Raises:
        OSError, ValueError: As `open_dataset` raises them.
    """
    unread = replace(data, val_split="")
    training = open_dataset(unread, data.train_split)
    return fingerprints(training, open_dataset(unread, data.val_split) if data.val_split else None)


def open_run_data(config: Config, ranks: Ranks, expected: Mapping[str, str]) -> RunData:
    """Open what a run reads; called by all ranks together.

    Args:
        config: The run's settings.
        ranks: This process among those of the run.
        expected: Fingerprints by tag that the data must have, such as those a sweep began with; where it is
            empty, those of the first rank.

    Raises:
        ValueError: Data are unfit, or other ones on some machine; on every rank, naming the machine.
        OSError: Data are missing; on every rank, naming the machine.
        UnreachableArchiveError: Their storage failed on this machine.
    """
    data, failure = None, None
    try:
        data = _open(config)
    except (OSError, ValueError) as error:
        if ranks.world == 1:
            raise
        failure = error
    seen = ranks.gather(_Seen.by(ranks, data, failure))
    for one in seen:
        if one.failure:
            raise _told(one.failure, one.place) from failure
    _require_the_same(seen, expected or seen[0].tags, config.data.root)
    assert data is not None
    return data


def _open(config: Config) -> RunData:
    data, split = config.data, config.evaluation.train_split
    training = open_dataset(data, data.train_split, needs="masks" if config.oracle else "labels")
    validation = open_dataset(data, data.val_split) if data.val_split else None
    if validation and not validation.mask_paths:
        _log.warning("data.val_split %r has no masks: classification alone is judged", data.val_split)
    return RunData(training, validation, open_dataset(data, split, needs="masks") if split else None)


@dataclass(frozen=True)
class _Seen:
    """What one rank tells the others of its data."""

    place: str
    """Machine and rank."""
    tags: Mapping[str, str]
    images: Mapping[str, int]
    """Number of images, by tag."""
    failure: Exception | None
    """Why it could not be opened."""

    @classmethod
    def by(cls, ranks: Ranks, data: RunData | None, failure: Exception | None) -> _Seen:
        place = socket.gethostname() + (f" (rank {ranks.rank})" if ranks.world > 1 else "")
        if data is None:
            return cls(place, {}, {}, failure)
        images = {TRAINING_TAG: len(data.training), VALIDATION_TAG: len(data.validation or ())}
        return cls(place, data.tags, images, None)


def _told(failure: Exception, place: str) -> Exception:
    """A rank's failure with the name of its machine, of the same kind: some are worth another attempt."""
    if isinstance(failure, OSError) and failure.errno is not None:
        return OSError(failure.errno, f"{failure.strerror} on {place}", failure.filename)
    kind = ValueError if isinstance(failure, ValueError) else type(failure)
    return kind(f"{failure} (on {place})")


def _require_the_same(seen: Sequence[_Seen], expected: Mapping[str, str], root: str) -> None:
    others = [one for one in seen if one.tags != expected]
    if not others:
        return
    same = next((one for one in seen if one.tags == expected), None)
    what = ", ".join(
        f"{others[0].images[tag]} images {kind}"
        + (f" instead of {same.images[tag]}" if same and same.images[tag] != others[0].images[tag] else "")
        for tag, kind in ((TRAINING_TAG, "to train on"), (VALIDATION_TAG, "to judge on"))
        if others[0].tags[tag] != expected[tag]
    )
    raise ValueError(
        f"images, labels and masks in data.root must be the same on every machine, got others in {root!r} on "
        f"{', '.join(one.place for one in others)}: {what}; copy them there again, or name a data.archive"
    )
