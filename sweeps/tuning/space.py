"""What a search varies: settings of a Config with their ranges, most of them relative to the preset's own.

`SPACE` is the default one. A file of your own, given with `--space my_space.py`, holds another:

    from sweeps.tuning.space import Choice, Range, Space
    from sweeps.tables import times

    SPACE = Space(
        Range("csc.weight", times(0.25), times(4), log=True),
        Choice("threshold.mode", ("dynamic", "fixed")),
        Range("threshold.xi", 0.2, 0.6, when=("threshold.mode", "fixed")),
    )

A dimension is a setting and the parameter that Optuna suggests for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import BaseTrial

from cosa.config import Config, fields, flatten, nearest, override
from sweeps.tables import memory_times, plus, read_file, times
from sweeps.tables.table import Relative

When = tuple[str, Any]
"""A setting of the same space and the value that it must have."""


class Dimension:
    """A setting whose parameter is a number, the setting's own value where nothing else is said."""

    setting: str
    """Dotted name."""
    values: tuple[Any, ...]
    when: When | None
    """Varied only where another setting, further up in the space, has this value."""
    log = False
    """Whether ratios count rather than differences; then all values are > 0."""

    @property
    def name(self) -> str:
        """Of the parameter."""
        return self.setting

    def resolved(self, own: Any) -> Dimension:
        """With relative values worked out for the preset's `own` one."""
        raise NotImplementedError

    def ends(self) -> tuple[Any, ...]:
        """Values that the setting must allow."""
        return self.values

    def parameter(self, value: Any) -> Any:
        """The parameter that gives the setting this value."""
        return value

    def value(self, parameter: Any) -> Any:
        """The setting's value for a parameter."""
        return parameter

    def suggest(self, trial: BaseTrial) -> Any:
        """Optuna's parameter for a trial."""
        low, high = self._range()
        return trial.suggest_float(self.name, low, high, log=self.log)

    def place(self, value: Any) -> float:
        """Where the setting's value lies, in [0, 1] inside; outside there is a ValueError, too."""
        (low, high), parameter = self._range(), self.parameter(value)
        return math.log(parameter / low, high / low) if self.log else (parameter - low) / (high - low)

    def marks(self) -> dict[float, str]:
        """What stands at a few of these places."""
        low, high = self._range()
        ats = (0.0, 0.5, 1.0)
        return {at: f"{low * (high / low) ** at if self.log else low + (high - low) * at:.3g}" for at in ats}

    def _range(self) -> tuple[float, float]:
        """The parameter's, once resolved."""
        parameters = [self.parameter(value) for value in self.ends()]
        return min(parameters), max(parameters)


@dataclass(frozen=True)
class Range(Dimension):
    """A number in [low, high]."""

    setting: str
    low: float | Relative
    high: float | Relative
    log: bool = False
    when: When | None = None

    def resolved(self, own: float) -> Range:
        """With both ends worked out for the preset's `own` value."""
        low, high = _value(self.low, own), _value(self.high, own)
        law = "0 < low < high" if self.log else "low < high"
        if not (math.isfinite(low) and math.isfinite(high) and low < high and (low > 0 or not self.log)):
            raise ValueError(f"range of {self.setting} must have finite {law}, got [{low:g}, {high:g}]")
        return dataclasses.replace(self, low=low, high=high)

    def ends(self) -> tuple[Any, ...]:
        """Both."""
        return (self.low, self.high)

    def __str__(self) -> str:
        return f"[{self.low:g}, {self.high:g}]{' log' * self.log}"


@dataclass(frozen=True)
class Momentum(Dimension):
    """The EMA's momentum, as the half-life of AN's memory in steps, on a log scale, among a few values.

    AN averages from the first step, so what a trial forks from must have carried an AN of its momentum all
    along: few values, known beforehand, let one warm-up carry an AN for each and serve all trials.
    """

    values: tuple[Any, ...]
    """Momenta in (0, 1), plain or relative."""
    when: When | None = None

    setting = "ema.momentum"
    name = "ema.half_life"
    log = True

    def resolved(self, own: float) -> Momentum:
        """With each value worked out for the preset's `own` one; those outside (0, 1) are left out.

        Half of the preset's memory may be none at all on a very short run.
        """
        values = sorted({value for v in self.values if 0 < (value := _value(v, own)) < 1})
        if len(values) < 2:
            raise ValueError(
                f"momenta of the space must be two or more in (0, 1), got {len(values)} around "
                f"ema.momentum {own:g}"
            )
        return dataclasses.replace(self, values=tuple(values))

    def parameter(self, value: float) -> float:
        """The half-life of a momentum; infinite where it is 1."""
        return half_life(value)

    def value(self, parameter: float) -> float:
        """The momentum whose half-life is nearest, as a ratio, to the one suggested."""
        return float(min(self.values, key=lambda value: abs(math.log(half_life(value) / parameter))))

    def __str__(self) -> str:
        return f"half-lives of {', '.join(f'{half_life(value):.3g}' for value in self.values)} steps, log"


@dataclass(frozen=True)
class Choice(Dimension):
    """One of a few values."""

    setting: str
    values: tuple[Any, ...]
    when: When | None = None

    def resolved(self, own: Any) -> Choice:  # noqa: ARG002 (choices are absolute)
        """As it is."""
        return self

    def suggest(self, trial: BaseTrial) -> Any:
        """Optuna's choice for a trial."""
        return trial.suggest_categorical(self.name, self.values)

    def place(self, value: Any) -> float:
        """In the order of the values."""
        return self.values.index(value) / max(1, len(self.values) - 1)

    def marks(self) -> dict[float, str]:
        """All values."""
        return {self.place(value): str(value) for value in self.values}

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


def half_life(momentum: float) -> float:
    """Steps after which the EMA still holds half of what it held, for a momentum in (0, 1]."""
    return math.inf if momentum == 1 else math.log(0.5) / math.log(momentum)


def _value(value: float | Relative, own: float) -> float:
    return value.of(own) if isinstance(value, Relative) else value


class Space:
    """Dimensions, each with a setting of its own."""

    def __init__(self, *dimensions: Dimension) -> None:
        """Check what can be checked without a preset.

        Raises:
            ValueError: No dimension, an unknown setting, one named twice, or a condition on none before it.
        """
        if not dimensions:
            raise ValueError("space must have one or more dimensions, got none")
        seen: list[str] = []
        for dimension in dimensions:
            name = dimension.setting
            if name not in fields():
                raise ValueError(f"setting of the space must exist, got {name!r}{nearest(name, fields())}")
            if name in seen:
                raise ValueError(f"space must hold each setting once, got {name!r} twice")
            if dimension.when and dimension.when[0] not in seen:
                raise ValueError(
                    f"condition of {name} must be on a setting further up in the space, "
                    f"got {dimension.when[0]!r}{nearest(dimension.when[0], seen)}"
                )
            seen.append(name)
        if "train.seed" in seen:
            raise ValueError("space must not hold train.seed, got it; a seed is not a setting to search")
        self.dimensions = dimensions

    def resolved(self, base: Config) -> Space:
        """The space around `base`, its relative ends worked out.

        Raises:
            ValueError, TypeError: An end that is against its setting's law.
        """
        own = flatten(base)
        space = Space(*(dimension.resolved(own[dimension.setting]) for dimension in self.dimensions))
        for dimension in space.dimensions:
            for end in dimension.ends():
                try:
                    override(base, {dimension.setting: end})
                except (ValueError, TypeError) as error:
                    raise type(error)(f"space: {error}") from None
        return space

    def suggest(self, trial: BaseTrial) -> dict[str, Any]:
        """Values of all settings that are varied; a conditional one only where its parent says so."""
        return self._changes(lambda dimension: dimension.suggest(trial))

    def changes(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the settings that `parameters` give; a KeyError where one is missing."""
        return self._changes(lambda dimension: parameters[dimension.name])

    def _changes(self, parameter_of: Callable[[Dimension], Any]) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for dimension in self.dimensions:
            if dimension.when is None or changes.get(dimension.when[0]) == dimension.when[1]:
                changes[dimension.setting] = dimension.value(parameter_of(dimension))
        return changes

    def parameters(self, config: Config, base: Config) -> dict[str, Any] | None:
        """The parameters that make `config` out of `base`, or None where it lies outside the space."""
        own, parameters = flatten(config), {}

        def parameter_of(dimension: Dimension) -> Any:
            value = own[dimension.setting]
            if not 0 <= dimension.place(value) <= 1:
                raise ValueError(dimension.name)
            parameters[dimension.name] = dimension.parameter(value)
            return parameters[dimension.name]

        try:
            changes = self._changes(parameter_of)
        except ValueError:
            return None
        return parameters if flatten(override(base, changes)) == own else None

    @property
    def momenta(self) -> tuple[float, ...]:
        """Momenta that a shared warm-up must carry an AN of; none where the EMA is not varied."""
        return tuple(value for d in self.dimensions if isinstance(d, Momentum) for value in d.values)

    def texts(self) -> dict[str, str]:
        """Every dimension in words, by its parameter's name."""
        where = {d.name: f", where {d.when[0]} is {d.when[1]}" if d.when else "" for d in self.dimensions}
        return {d.name: f"{d}{where[d.name]}" for d in self.dimensions}


SPACE = Space(
    # Table 5 varies the weights by 1/4 to 4 and finds a peak in the middle: twice as far on both sides.
    Range("c2s.weight", times(1 / 8), times(8), log=True),
    Range("s2c.weight", times(1 / 8), times(8), log=True),
    Range("csc.weight", times(1 / 8), times(8), log=True),
    # Table 5d's values and two more: how far back AN's average reaches, as multiples of the preset's.
    Momentum(tuple(memory_times(factor) for factor in (0.3, 0.6, 0.75, 1, 1.5, 3, 6))),
    # Below -log(raw.alpha), 0.22 in the paper, no pixel would be contrasted.
    Range("csc.epsilon", times(0.3), times(4), log=True),
    Range("csc.tau", times(0.2), times(4), log=True),
    Choice("threshold.mode", ("dynamic", "fixed")),
    Range("threshold.xi", plus(-0.25), plus(0.25), when=("threshold.mode", "fixed")),
)
"""Around the paper's setting, or any preset's."""


def rows_inside(
    rows: Mapping[str, Config], space: Space, base: Config, most: int
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """The paper's rows as parameters, at most so many and each once, and the names of those outside.

    Args:
        rows: Configs by origin, the most telling first.
        space: What is varied, resolved for `base`.
        base: What every trial starts from.
        most: Rows at most.
    """
    inside: dict[str, Mapping[str, Any]] = {}
    outside: list[str] = []
    for origin, config in rows.items():
        if (parameters := space.parameters(config, base)) is None:
            outside.append(origin)
        elif parameters not in inside.values() and len(inside) < most:
            inside[origin] = parameters
    return inside, outside


def read_space(path: Path) -> Space:
    """The SPACE of a Python file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not run, or holds no valid space.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--space must name a file that exists, got {str(path)!r}")
    return read_file(path, Space)
