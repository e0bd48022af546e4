"""Warm-ups that several runs share: an arm forks from the checkpoint at the end of one.

A forked run is bit for bit the run trained from its beginning, as the warm-up reads nothing of co-training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cosa.config import Config, from_json, warmup_identity
from cosa.storage import checkpoint


def load_warmup(path: Path, config: Config) -> tuple[checkpoint.State, float | None]:
    """The state of a shared warm-up, checked to be the one that `config` would train itself.

    With it the momentum of the follower that is to be AN; None where it is the warm-up's own.

    Raises:
        ValueError: It is another warm-up, not at its end, or carries no AN of that momentum.
        FileNotFoundError: There is no such checkpoint.
    """
    saved = checkpoint.load(path)
    trained = from_json(saved["config"])
    if warmup_identity(trained) != warmup_identity(config) or saved["step"] != config.train.warmup:
        raise ValueError(
            f"fork_from must be this run's own warm-up after {config.train.warmup} steps, got {str(path)!r} "
            f"after {saved['step']} steps of warm-up {warmup_identity(trained)} instead of "
            f"{warmup_identity(config)}"
        )
    momentum = config.ema.momentum
    if momentum == trained.ema.momentum:
        return saved, None
    require_momenta(path, saved, [momentum])
    return saved, momentum


def require_momenta(where: Path, saved: checkpoint.State, wanted: Sequence[float]) -> None:
    """Refuse a checkpoint that lacks an AN of one of the momenta `wanted`."""
    missing = [momentum for momentum in wanted if repr(momentum) not in saved["followers"]]
    if missing:
        raise ValueError(
            f"warm-up must carry an AN of momentum {missing[0]!r}, got only "
            f"{', '.join(saved['followers']) or 'its own'} in {str(where)!r}; train it in a new folder"
        )
