"""The data of one run, opened on every rank: the same on all of them, or refused by the machine's name.

Machines that each hold a copy of the images can differ without a word: an old copy, a list that was edited, a
download that stopped. Ranks compare fingerprints before anything is trained, and all stop with the same line.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cosa.config import Config, DataConfig, SegmentationConfig
from cosa.data.archive import stage
from cosa.data.coco import read_coco
from cosa.data.dataset import Needs, SegmentationDataset
from cosa.data.files import OnProblem, refuse
from cosa.data.folder import read_folder
from cosa.data.shapes import write_shapes
from cosa.data.voc import read_voc
from cosa.storage.label_files import label_paths, labels_fingerprint, read_summary
from cosa.storage.run_folder import TRAINING_TAG, VALIDATION_TAG
from cosa.structures import Ranks

_log = logging.getLogger(__name__)


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
    verify = evaluated or needs == "masks"  # to find a bad mask before hours of training
    if data.archive:
        stage(data.archive, data.archive_sha256, root)
    if data.layout == "coco":
        cache = Path(data.cache).expanduser()
        return read_coco(
            root,
            split,
            cache,
            needs=needs,
            draw=evaluated,
            keep_empty=data.keep_empty,
            on_problem=on_problem,
        )
    if data.layout == "shapes" and not (root / "ImageSets").exists():
        try:
            write_shapes(root)
        except OSError:
            if not (root / "ImageSets").exists():
                raise
            # another worker was faster: it wrote the very same bytes
    read = read_folder if data.layout == "folder" else read_voc
    return read(root, split, needs=needs, verify_masks=verify, on_problem=on_problem)


@dataclass(frozen=True, eq=False)
class RunData:
    """What one run reads."""

    training: SegmentationDataset
    """Images to learn from; the masks of a standalone network's are what it learns."""
    validation: SegmentationDataset | None
    """The split that evaluation reads; None without one."""
    judged: SegmentationDataset | None
    """Training images whose CPL are judged after the last step; None where none are to be."""
    tags: Mapping[str, str]
    """Fingerprints of the training and validation images, by the names a tracker knows them by; pseudo-labels
    have one of their own."""


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
    seen: _Seen | Exception
    try:
        data = _open(config)
        counts = {TRAINING_TAG: len(data.training), VALIDATION_TAG: len(data.validation or ())}
        seen = {tag: (data.tags[tag], counts[tag]) for tag in counts}
    except (OSError, ValueError) as error:
        if ranks.world == 1:
            raise
        seen = error
    place = socket.gethostname() + (f" (rank {ranks.rank})" if ranks.world > 1 else "")
    good: dict[str, _Seen] = {}
    for there, said in ranks.gather((place, seen)):
        if isinstance(said, Exception):
            raise _on_machine(said, there)
        good[there] = said
    _require_the_same(good, expected, config.data.root)
    return data


_Seen = Mapping[str, tuple[str, int]]
"""What a rank has: the fingerprint and the number of images, by tag."""


def _open(config: Config) -> RunData:
    data, split = config.data, "" if config.standalone else config.evaluation.train_split
    training = open_dataset(data, data.train_split, needs="masks" if config.oracle else "labels")
    validation = open_dataset(data, data.val_split) if data.val_split else None
    if validation and not validation.mask_paths:
        judged = "nothing" if config.standalone else "classification alone"
        _log.warning("data.val_split %r has no masks: %s is judged", data.val_split, judged)
    tags = fingerprints(training, validation)
    if config.standalone and not config.oracle:
        training = with_pseudo_labels(training, config.segmentation)
    return RunData(training, validation, open_dataset(data, split, needs="masks") if split else None, tags)


def with_pseudo_labels(dataset: SegmentationDataset, config: SegmentationConfig) -> SegmentationDataset:
    """`dataset` with pseudo-labels in the place of masks, checked byte for byte to be those of its images.

    Raises:
        FileNotFoundError: No folder is named, it holds no finished pseudo-labels, or some are missing.
        ValueError: They are of other images or classes, changed, not those that the run began with, or made
            by an oracle.
    """
    if not config.labels:
        raise FileNotFoundError(
            "segmentation.labels must name a folder of pseudo-labels, got ''; `cosa-predict RUN "
            "--pseudo-labels DIR` writes one, or set --segmentation.supervision masks for the upper bound"
        )
    folder = Path(config.labels).expanduser()
    known = read_summary(folder)
    wrong = ""
    if tuple(known["classes"]) != dataset.classes:
        wrong = f"are of {len(known['classes'])} other classes than the {len(dataset.classes)} of data.root"
    elif known["data_fingerprint"] != dataset.fingerprint():
        wrong = (
            f"are of {known.get('images', 'other')} images, labels and masks other than those of data.root"
        )
    elif known["oracle"]:
        wrong = "are of an oracle, whose training saw masks; set --segmentation.supervision masks for a bound"
    elif config.labels_fingerprint not in {"", known["fingerprint"]}:
        wrong = f"have the fingerprint {known['fingerprint']} instead of {config.labels_fingerprint}"
    if wrong:
        law = "segmentation.labels must be pseudo-labels of data.train_split"
        raise ValueError(f"{law}, got {str(folder)!r}, which {wrong}")
    paths = label_paths(folder, dataset.names)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"segmentation.labels must hold a label map of each of {len(paths)} images, got {str(folder)!r}, "
            f"which lacks {missing[0]} and {len(missing) - 1} more; the command that wrote it makes them anew"
        )
    if labels_fingerprint(folder, dataset.names) != known["fingerprint"]:
        raise ValueError(
            f"segmentation.labels must be as they were written, got {str(folder)!r}, where some label maps "
            "were changed since; write them again"
        )
    return replace(dataset, mask_paths=tuple(paths))


def _on_machine(failure: Exception, place: str) -> Exception:
    """A rank's failure with the name of its machine, of the same kind: some are worth another attempt."""
    if isinstance(failure, OSError) and failure.errno is not None:
        return OSError(failure.errno, f"{failure.strerror} on {place}", failure.filename)
    kind = ValueError if isinstance(failure, ValueError) else type(failure)
    return kind(f"{failure} (on {place})")


def _require_the_same(seen: Mapping[str, _Seen], expected: Mapping[str, str], root: str) -> None:
    """Refuse what ranks have, by place, where it is not what is expected, or else what the first one has."""
    first = next(iter(seen.values()))
    wanted = expected or {tag: fingerprint for tag, (fingerprint, _) in first.items()}
    good = {place: all(one[tag][0] == wanted[tag] for tag in one) for place, one in seen.items()}
    if all(good.values()):
        return
    others = [place for place in seen if not good[place]]
    same = next((seen[place] for place in seen if good[place]), {})
    told = []
    for tag, kind in ((TRAINING_TAG, "to train on"), (VALIDATION_TAG, "to judge on")):
        fingerprint, count = seen[others[0]][tag]
        if fingerprint != wanted[tag]:
            instead = f" instead of {same[tag][1]}" if same and same[tag][1] != count else ""
            told.append(f"{count} images {kind}{instead}")
    raise ValueError(
        f"images, labels and masks in data.root must be the same on every machine, got others in {root!r} on "
        f"{', '.join(others)}: {', '.join(told)}; copy them there again, or name a data.archive"
    )
