"""What the command line of a search asks for, checked before anything is read or written; and its budget."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosa.cli.common import Parser
from cosa.cli.console import duration, print_line
from cosa.config import Config, TrainConfig, override
from cosa.storage.files import write_atomically
from sweeps.running.arguments import SweepArgs, read_args
from sweeps.tables import Table
from sweeps.tuning.space import SPACE, Space, read_space, rows_inside

ROWS = ("3b", "5a", "5b", "5c", "5d")
"""Tables whose rows are tried first, as far as they lie in the space."""
DEFAULT_TRIALS = 30
_SLACK = 1 / 5
"""Of co-training: how much later than half a pruning step may be, so that evaluations stay where they are."""


@dataclass(frozen=True)
class Limits:
    """A search's budget: the first limit reached ends it; trials that run then come to their end."""

    trials: int | None = None
    hours: float | None = None
    gpu_hours: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} must be > 0, got {value:g}; a search needs a budget")

    def __str__(self) -> str:
        """`30 trials or 12 hours`."""
        units = zip(vars(self).values(), ("trials", "hours", "GPU-hours"), strict=True)
        return " or ".join(f"{value:g} {unit}" for value, unit in units if value is not None)


class Budget:
    """Limits, and the time spent of them over all starts of a search, those that were killed among them.

    The study's own timestamps would count the time between two starts, and know no warm-ups.
    """

    def __init__(
        self, limits: Limits, path: Path, gpus: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Go on with what the file says.

        Args:
            limits: Of trials, hours and GPU-hours.
            path: The account, a JSON file, made at the first note.
            gpus: GPUs that a running trial holds.
            clock: Seconds that only rise.
        """
        self._limits, self._path, self._gpus, self._clock = limits, path, gpus, clock
        self._last = clock()
        self.seconds = self.gpu_seconds = 0.0
        """Of wall time, while the search's driver ran; of all GPUs that trials held, warm-ups among them."""
        if path.is_file():
            spent = json.loads(path.read_text())
            self.seconds, self.gpu_seconds = spent["seconds"], spent["gpu_seconds"]

    def note(self, running: int) -> None:
        """Count the time since the last note, in which `running` trials ran, and write it down."""
        now = self._clock()
        passed, self._last = now - self._last, now
        self.seconds += passed
        self.gpu_seconds += passed * running * self._gpus
        spent = {"seconds": self.seconds, "gpu_seconds": self.gpu_seconds}
        write_atomically(self._path, json.dumps(spent) + "\n")

    def left(self, trials: int) -> bool:
        """Whether one more trial may begin after so many."""
        spent = (trials, self.seconds / 3600, self.gpu_seconds / 3600)
        return all(n is None or s < n for n, s in zip(vars(self._limits).values(), spent, strict=True))

    def __str__(self) -> str:
        """What is spent: `2 h 10 min`, with the GPUs' hours where there are GPUs."""
        gpus = f", {self.gpu_seconds / 3600:.1f} GPU-hours" if self._gpus or self.gpu_seconds else ""
        return duration(self.seconds) + gpus


@dataclass(frozen=True)
class SearchArgs:
    """What the command line asks for."""

    sweep: SweepArgs
    """What a search shares with other sweeps."""
    base: Config
    """What every trial starts from: the preset, evaluated at every pruning step."""
    space: Space
    """Resolved for the base."""
    steps: tuple[int, ...]
    """Pruning steps, at which a trial is judged on its way; none where co-training is too short."""
    limits: Limits
    rows: Mapping[str, Mapping[str, Any]]
    """The preset, which any row of all components is, and the paper's rows to try after it, as parameters by
    origin: half of the trials at most, so that there is a search beyond them."""
    outside: Sequence[str]
    """Rows outside of the space."""
    confirm: int
    """Best trials that are trained again."""
    seeds: int
    """Fresh seeds of each."""

    @property
    def out(self) -> Path:
        """The search's folder."""
        return self.sweep.out

    def budget(self, gpus: float = 0.0) -> Budget:
        """The budget as it stands, for trials that hold so many GPUs."""
        return Budget(self.limits, self.out / "spent.json", gpus)


def read_arguments(arguments: Sequence[str]) -> SearchArgs:
    """What `arguments` ask for.

    Raises:
        ValueError, TypeError: A flag or setting against its law, or a space that does not fit the preset.
    """
    parser = _parser()
    if {"-h", "--help"} & set(arguments):
        print_line(parser.format_help() + "\nand what all sweeps take:\n")
    found, rest = parser.parse_known_args(arguments)
    sweep = read_args("search", "Shared by all sweeps; --tables names rows that are tried first.", ROWS, rest)
    if len(sweep.seeds) != 1:
        raise ValueError(
            f"--seeds must be 1 in a search, got {len(sweep.seeds)}; "
            f"--confirm-seeds are those of the best trials"
        )
    for flag, value in (("--confirm", found.confirm), ("--confirm-seeds", found.confirm_seeds)):
        if value < 0:
            raise ValueError(f"{flag} must be >= 0, got {value}")
    given = (found.trials, found.hours, found.gpu_hours)
    limits = Limits(*given) if any(v is not None for v in given) else Limits(trials=DEFAULT_TRIALS)
    if not sweep.base.data.val_split:
        raise ValueError("data.val_split must name a split with masks to search by, got none")
    steps, every = pruning_steps(sweep.base.train, sweep.base.evaluation.every)
    base = override(sweep.base, {"evaluation.every": every})
    space = (read_space(Path(found.space)) if found.space else SPACE).resolved(base)
    rows = paper_rows(sweep.tables, base)
    inside, outside = rows_inside(rows, space, base, max(1, (limits.trials or 2 * len(rows)) // 2))
    return SearchArgs(
        sweep=sweep,
        base=base,
        space=space,
        steps=steps,
        limits=limits,
        rows=inside,
        outside=outside,
        confirm=found.confirm if found.confirm_seeds else 0,
        seeds=found.confirm_seeds,
    )


def _parser() -> Parser:
    parser = Parser(
        prog="sweeps/search.py",
        description="Search the settings of co-training with Optuna's TPE on Ray Tune.",
        add_help=False,
    )
    add = parser.add_argument
    add("--trials", type=int, help=f"begin so many trials (default: {DEFAULT_TRIALS}, without other limits)")
    add("--hours", type=float, help="begin trials for so many hours, those of earlier starts counted")
    add("--gpu-hours", type=float, help="begin trials until so many GPU-hours are used, warm-ups counted")
    add("--space", default="", metavar="FILE", help="Python file whose SPACE is searched instead of ours")
    add("--confirm", type=int, default=3, help="best trials to train again with fresh seeds (default: 3)")
    add("--confirm-seeds", type=int, default=3, help="fresh seeds of each, and of the preset (default: 3)")
    return parser


def paper_rows(tables: Sequence[Table], base: Config) -> dict[str, Config]:
    """The preset and the paper's rows by origin: first the preset, then of each table those nearest to it."""
    rows: dict[tuple[int, int, str], Config] = {}
    for place, table in enumerate(table.resolved(base) for table in tables):
        middle = table.arms.index(table.arm(table.reference))
        for row, arm in enumerate(table.arms):
            if row != middle:
                rows[abs(row - middle), place, f"{table.name}/{arm.name}"] = override(base, arm.changes)
    return {"full": base} | {
        origin: config for (*_, origin), config in sorted(rows.items(), key=lambda r: r[0])
    }


def pruning_steps(train: TrainConfig, every: int) -> tuple[tuple[int, ...], int]:
    """Steps at which trials are judged on their way, and the `evaluation.every` that evaluates there.

    One step, at half of co-training or a little later. Why so late and so few: it tells who is far off, not
    who is best. Over runs of whole length Spearman's rank correlation between label-free mIoU on the way and
    at the end was, on `shapes`, 0.61 at two thirds of co-training over 28 rows of all tables, but 0.07 over
    the better 15 of them; 0.38 at half over eight arms of Table 3; on `voc_tiny` -0.64 at half over seven
    arms, which ended within 0.6 points. Every search measures it anew (`report.agreement`).

    Args:
        train: The schedule; its warm-up must end before it does.
        every: The preset's `evaluation.every`. It is kept where its evaluations serve, else the next smaller
            divisor of the iterations is taken that does.

    Returns:
        No step where co-training is too short to be judged on its way.
    """
    cotraining = train.iterations - train.warmup
    if cotraining < 1:
        raise ValueError(
            f"train.warmup must end before train.iterations = {train.iterations}, got {train.warmup}; "
            f"a search is over what co-training does"
        )
    half = train.warmup + math.ceil(cotraining / 2)
    divisors = [d for d in range(min(every, train.iterations), 0, -1) if train.iterations % d == 0]
    for spacing in [every, *divisors]:
        step = math.ceil(half / spacing) * spacing
        if step < train.iterations and step - half <= cotraining * _SLACK:
            return (step,), spacing
    return (), every
