"""`cosa-evaluate SOURCE`: judge a trained network, or fill the archive that the VOC server judges."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import cosa
from cosa.cli.common import Parser, changed_settings, find_model
from cosa.cli.console import NETWORKS, Counter, aligned_table, metrics_table, print_error
from cosa.config import Config, flatten, override
from cosa.storage.files import require_folder

if TYPE_CHECKING:
    from cosa.data.dataset import SegmentationDataset
    from cosa.evaluation.evaluate import Evaluation
    from cosa.storage.model_files import StoredModel


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-evaluate` does; returns the exit code."""
    given = _parser(prog).parse_known(arguments)
    stored = find_model(given, given.network)
    changes = changed_settings(given)
    if given.split or given.submission:
        changes["data.val_split"] = given.split or "test"
    if given.crf:
        changes["evaluation.crf"] = "true"
    stored = replace(stored, config=override(stored.config, changes))
    if stored.config.evaluation.crf:
        from cosa.evaluation.crf import require_crf

        require_crf()
    if given.submission:
        _submit(stored, given.submission.expanduser().absolute())
    else:
        _evaluate(stored, given)
    return 0


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} SOURCE [options] [--evaluation.SETTING VALUE ...] [--data.SETTING VALUE ...]",
        description="Evaluate a trained network by both protocols, with its CAM pseudo-labels and the IoU of "
        "each class, or fill the archive that the VOC server takes. Settings default to those of the run.",
    )
    parser.source()
    parser.flag("--split", "NAME", "split to judge (default data.val_split)")
    parser.add_argument(
        "--network",
        choices=list(NETWORKS),
        help="which of a run's networks; the online one is in checkpoints alone (default assignment, or the "
        "standalone one)",
    )
    parser.switch("--crf", "also after a dense CRF (Tab. 6); needs the extra `crf`")
    out = "folder of evaluation.json and evaluation.md (default evaluation/SPLIT in the run's folder)"
    parser.flag("--out", "DIR", out, type=Path)
    parser.flag(
        "--submission",
        "FILE.tar.gz",
        "judge nothing, but write the class maps of the split (default test) as the VOC server takes them; "
        "the split needs no masks",
        type=Path,
    )
    parser.traceback()
    parser.settings(Config(), ("data", "evaluation"))
    return parser


def _evaluate(stored: StoredModel, given: argparse.Namespace) -> None:
    """Judge the network, print and write what was found."""
    from cosa.data.loader import evaluation_batches
    from cosa.data.open import open_dataset
    from cosa.evaluation import evaluate as evaluation
    from cosa.model import build_model
    from cosa.storage.files import write_atomically

    config, facts = stored.config, stored.facts
    out = _folder(given, stored)
    require_folder("--out", out)
    _make(out)
    dataset = open_dataset(config.data, config.data.val_split)
    _require_same_classes(stored, dataset)
    if config.standalone and not dataset.has_masks:
        raise ValueError(
            f"split must have masks to judge a standalone network, got {config.data.val_split!r}"
        )
    if not dataset.has_masks:
        print_error(f"split {config.data.val_split!r} has no masks: classification alone can be judged")
    model = build_model(stored)
    images = min(len(dataset), config.evaluation.max_images or len(dataset))
    batches = evaluation_batches(dataset, config)
    with model.autocast():
        found = evaluation.evaluate(
            model.network,
            Counter(images).each(batches, lambda batch: len(batch.names)),
            config=config,
            classes=dataset.classes,
            xi=facts.xi,
            aux_xi=facts.aux_xi,
            device=model.device,
        )
    heading = _heading(stored, images, len(dataset))
    metrics = metrics_table({NETWORKS[facts.network]: found.metrics})
    tables = [text for text in (_crf_table(found.metrics), _class_table(found, dataset.classes)) if text]
    print("\n\n".join([heading, metrics, *tables]))
    name = stored.folder.name if stored.folder else facts.run_id
    parts = [f"# {name}", f"{heading}.", f"```text\n{metrics}\n```", *tables]
    write_atomically(out / "evaluation.json", _json(stored, dataset, found, images))
    write_atomically(out / "evaluation.md", "\n\n".join(parts) + "\n")
    print(f"\nwritten to {out}: evaluation.json, evaluation.md")


def _folder(given: argparse.Namespace, stored: StoredModel) -> Path:
    """Where the results go: beside what was judged, those of each split and network apart."""
    if given.out:
        return Path(given.out).expanduser().absolute()
    home = (
        stored.folder / "evaluation" if stored.folder else Path("evaluation").absolute() / str(given.source)
    )
    split, network = stored.config.data.val_split, stored.facts.network
    return home / (f"{split}-{network}" if network == "online" else split)


def _make(folder: Path) -> None:
    """Make the folder now: an evaluation takes long, and is not to fail when it is over."""
    from cosa.storage.files import write_atomically

    probe = folder / ".writable"
    write_atomically(probe, "")
    probe.unlink()


def _require_same_classes(stored: StoredModel, dataset: SegmentationDataset) -> None:
    if stored.classes != dataset.classes:
        raise ValueError(
            f"model must be of the data set's {len(dataset.classes)} classes ({_some(dataset.classes)}), got "
            f"{len(stored.classes)} ({_some(stored.classes)}); set --data.layout and --data.root to the data "
            "set it was trained on"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _heading(stored: StoredModel, images: int, of: int) -> str:
    """What was judged, in one line."""
    config, facts = stored.config, stored.facts
    scales = ", ".join(f"{scale:g}" for scale in config.evaluation.scales)
    oracle = "; an oracle: its training saw ground-truth masks" if config.oracle else ""
    return (
        f"{NETWORKS[facts.network]} after {facts.step} steps on {images} of {of} images of "
        f"{config.data.val_split}; input {config.evaluation.size} px, scales {scales}"
        f"{', flipped too' if config.evaluation.flip else ''}{oracle}"
    )


_CLASS_COLUMNS = {
    "seg_iou": "label-free",
    "seg_iou_labelled": "labelled",
    "seg_iou_crf": "label-free, CRF",
    "seg_iou_labelled_crf": "labelled, CRF",
    "cpl_iou": "CPL",
    "aux_cpl_iou": "CPL of M-dagger",
}


def _class_table(found: Evaluation, classes: Sequence[str]) -> str:
    """IoU of the background, then of each class, then their mean, as Tab. 11-13; empty without masks."""
    columns = {
        text: found.per_class[name] for name, text in _CLASS_COLUMNS.items() if name in found.per_class
    }
    if not columns:
        return ""
    names = ["background", *classes]
    table = {"IoU, percent": [*names, "mIoU"]}
    for text, column in columns.items():
        mean = fmean(column.values()) if column else math.nan
        table[text] = [_percent(value) for value in (*(column.get(name, math.nan) for name in names), mean)]
    return aligned_table(table)


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.2f}"


def _crf_table(metrics: Mapping[str, float]) -> str:
    """mIoU and speed without and with the CRF, as Tab. 6; empty where none was asked for."""
    if "seg_miou_crf" not in metrics:
        return ""
    speeds = (metrics.get(name, math.nan) for name in ("images_per_second", "crf_images_per_second"))
    return aligned_table(
        {
            "dense CRF": ["without", "with"],
            "mIoU, label-free": [_percent(metrics[f"seg_miou{crf}"]) for crf in ("", "_crf")],
            "mIoU, labelled": [_percent(metrics[f"seg_miou_labelled{crf}"]) for crf in ("", "_crf")],
            "images/s": [f"{speed:.2f}" for speed in speeds],
        }
    )


def _json(stored: StoredModel, dataset: SegmentationDataset, found: Evaluation, images: int) -> str:
    """The results for programs, as fractions."""
    config, facts = stored.config, stored.facts
    result = {
        "network": facts.network,
        "step": facts.step,
        "oracle": config.oracle,
        "split": config.data.val_split,
        "images": images,
        "classes": dataset.classes,
        "metrics": {k: v if math.isfinite(v) else None for k, v in found.metrics.items()},
        "per_class": found.per_class,
        "curves": found.curves,
        "settings": {k: v for k, v in flatten(config).items() if k.startswith("evaluation.")},
        "run_id": facts.run_id,
        "trained_on": facts.data_fingerprint,
        "judged_on": dataset.fingerprint(),
        "cosa": cosa.__version__,
    }
    return json.dumps(result, indent=2) + "\n"


def _submit(stored: StoredModel, path: Path) -> None:
    """Write the class maps of a split, label-free, as the VOC server takes them."""
    from cosa.data.open import open_dataset
    from cosa.evaluation.predict import predict_files, write_submission
    from cosa.model import build_model

    config = stored.config
    if config.data.layout != "voc":
        raise ValueError(f"data.layout must be voc for a submission, got {config.data.layout!r}")
    if not path.name.endswith(".tar.gz"):
        raise ValueError(f"submission must be called *.tar.gz, got {path.name!r}")
    _make(path.parent)
    dataset = open_dataset(config.data, config.data.val_split, needs="images")
    _require_same_classes(stored, dataset)
    model = build_model(stored)
    predictions = predict_files(model, dataset.image_paths, crf=config.evaluation.crf)
    count = write_submission(path, Counter(len(dataset)).each(predictions))
    print(f"{count} class maps of {config.data.val_split}, read back, in {path}")
