"""The data of one run, opened on every rank: the same on all of them, or refused by the machine's name.

Machines that each hold a copy of the images can differ without a word: an old copy, a list that was edited, a
download that stopped. Ranks compare fingerprints before anything is trained, and all stop with the same line.
"""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cosa.config import Config, DataConfig
from cosa.data.archive import stage
from cosa.data.coco import read_coco
from cosa.data.dataset import Needs, SegmentationDataset
from cosa.data.files import OnProblem, refuse
from cosa.data.folder import read_folder
from cosa.data.shapes import write_shapes
from cosa.data.voc import read_voc
from cosa.structures import Ranks

_log = logging.getLogger(__name__)

TRAINING_TAG = "cosa.data_fingerprint"
VALIDATION_TAG = "cosa.val_fingerprint"


def open_dataset(
    data: DataConfig, split: str, *, needs: Needs = "labels", on_problem: OnProblem = refuse
) -> SegmentationDataset:
    """The images of a split, unpacked from `data.archive` first where they are not on this machine yet.

    The `shapes` layout writes itself.

    Args:
        data: Where the data set lies, and in which layout.
        split: Name of the split, as the layout calls it.
        needs: `labels`: image-level labels are there for every image, and masks where every image of the
            split has one. `masks`: every image has both. `images`: names and images alone, as in a test
            split whose annotations nobody publishes; labels are 0 and there are no masks.
        on_problem: What to do about files that are missing or bad: by default the first is raised.

    Raises:
        FileNotFoundError: The root, the list, or a file that the list names is missing; some images of the
            split have masks and others have none; or none has one and `needs` is `masks`.
        ValueError: A file breaks its format, or `data.archive` cannot be unpacked.
        UnreachableArchiveError: The storage of `data.archive` failed on the way.
    """
    root, evaluated = Path(data.root).expanduser(), split == data.val_split
    if data.archive:
        stage(data.archive, data.archive_sha256, root)
    if data.layout == "coco":
        draw = needs == "masks" or evaluated
        return read_coco(
            root, split, Path(data.cache).expanduser(), needs=needs, draw=draw, on_problem=on_problem
        )
    if data.layout == "folder":
        return read_folder(root, split, needs=needs, verify_masks=evaluated, on_problem=on_problem)
    if data.layout == "shapes" and not (root / "ImageSets").exists():
        try:
            write_shapes(root)
        except OSError:
            if not (root / "ImageSets").exists():
                raise
            # another worker was faster: it wrote the very same bytes
    return read_voc(root, split, needs=needs, verify_masks=evaluated, on_problem=on_problem)


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

    @property
    def images(self) -> Mapping[str, int]:
        """Numbers of the training and validation images, by the same names."""
        return {TRAINING_TAG: len(self.training), VALIDATION_TAG: len(self.validation or ())}


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
    unread = data.replace(val_split="")
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
    place = socket.gethostname() + (f" (rank {ranks.rank})" if ranks.world > 1 else "")
    seen = ranks.gather(_Seen(place, data.tags, data.images) if data else _Seen(place, failure=failure))
    for one in seen:
        if one.failure:
            raise _on_machine(one.failure, one.place) from failure
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
    tags: Mapping[str, str] = field(default_factory=dict)
    images: Mapping[str, int] = field(default_factory=dict)
    """Number of images, by tag."""
    failure: Exception | None = None
    """Why it could not be opened."""


def _on_machine(failure: Exception, place: str) -> Exception:
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
