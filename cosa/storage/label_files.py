"""The pseudo-labels of a whole split as files: where they lie, what they are made of, whether they are whole.

NAME.png              class of each pixel, as a palette PNG in the image's own size
settings.json         what they are made of, there before the first of them
pseudo_labels.json    the same with their fingerprint and, against masks, IoU; last, when all are there
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SUMMARY = "pseudo_labels.json"
"""Written last: a folder without it holds no pseudo-labels to train on."""
FORMAT = 1


def label_paths(folder: Path, names: Sequence[str]) -> list[Path]:
    """Where the pseudo-labels of the images `names` lie."""
    return [folder / f"{name}.png" for name in names]


def labels_fingerprint(folder: Path, names: Sequence[str]) -> str:
    """Sixteen hex digits of all pseudo-labels, byte for byte."""
    whole = hashlib.sha256()
    for name, path in zip(names, label_paths(folder, names), strict=True):
        whole.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


def read_summary(folder: Path) -> Mapping[str, Any]:
    """What the summary of whole pseudo-labels holds.

    Raises:
        FileNotFoundError: There is no such folder, or no summary in it: they were never finished.
        ValueError: The summary is none that cosa wrote.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise FileNotFoundError(
            f"segmentation.labels must be a folder of finished pseudo-labels, got {str(folder)!r}, which has "
            f"no {SUMMARY}; `cosa-predict RUN --pseudo-labels {folder}` writes them, or goes on"
        )
    try:
        known: Mapping[str, Any] = json.loads(path.read_text())
        if known["format"] != FORMAT:
            raise ValueError(f"format {known['format']}")
        str(known["fingerprint"]), known["classes"], known["data_fingerprint"], bool(known["oracle"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{SUMMARY} must be one that cosa wrote in format {FORMAT}, got {str(path)!r} ({error}); "
            "write the pseudo-labels again"
        ) from None
    return known
