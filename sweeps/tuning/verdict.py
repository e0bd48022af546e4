"""What a search's confirmation says, in sentences with numbers, and which settings to go on with.

A maximum over noisy values is flattering, twice: the search picks one among all trials, the confirmation one
among those it trained again. Every sentence says over how many seeds it speaks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cosa.config import Config, override
from sweeps.reporting.cells import LEAST_PAIRS, Cell
from sweeps.tuning.confirm import Confirmed
from sweeps.tuning.record import Record

_CHANCE = 0.05


def verdict(found: Sequence[Confirmed]) -> list[str]:
    """What the confirmation says; nothing where nothing was confirmed."""
    whole = [one for one in found if one.free.values]
    tried = [one for one in whole if not one.is_preset]
    preset = next((one for one in whole if one.is_preset), None)
    if not tried:
        return []
    first = max(tried, key=lambda one: one.searched)
    best = max(tried, key=lambda one: one.free.mean)
    lines = [_maximum(first, preset)]
    if preset is None or not all(one.free.minus(preset.free).values for one in (first, best)):
        return lines
    if math.isfinite(preset.excess):
        lines.append(_price(first, preset))
    lines.append(_gain(first, preset))
    if best is not first:
        lines.append(_again(best, preset, whole))
    return [*lines, _trust(best.free.minus(preset.free))]


def _maximum(first: Confirmed, preset: Confirmed | None) -> str:
    top = preset is None or not preset.searched > first.searched
    moved = (
        f"{points(first.excess)} points of it were lost" if first.excess >= 0 else "nothing of it was lost"
    )
    return (
        f"The search's maximum{'' if top else ' besides the preset'}, {first.label}, had "
        f"{points(first.searched)} with the search's one seed and has {_mean(first.free)}: {moved}."
    )


def _price(first: Confirmed, preset: Confirmed) -> str:
    """What of the loss is due to the choice: fresh seeds alone move the preset, too."""
    moved = (
        f"{'lost' if preset.excess >= 0 else 'gained'} {points(abs(preset.excess))} by the change of seeds"
    )
    price = first.excess - preset.excess
    if price <= 0:
        return f"The preset, which was not chosen for its value, {moved}: no price of choosing is seen here."
    return (
        f"The preset, which was not chosen for its value, {moved}, so that about {points(price)} points are "
        f"the price of choosing a maximum."
    )


def _gain(first: Confirmed, preset: Confirmed) -> str:
    gain = first.free.minus(preset.free)
    promised = first.searched - preset.searched
    tail = f", where the search promised {points(promised, signed=True)}" if math.isfinite(promised) else ""
    return f"Over the preset, {_mean(preset.free)}, {first.label} gains {_difference(gain)}{tail}."


def _again(best: Confirmed, preset: Confirmed, whole: Sequence[Confirmed]) -> str:
    """The second choice, among what was confirmed, and what it is worth on seeds that had no say in it."""
    gain, honest, count = best.free.minus(preset.free), held_out_gain(whole, preset), len(whole) - 1
    among = (
        f"Of the {count} confirmed {best.label} has the highest mean, {points(gain.mean, signed=True)} over "
        f"the preset; the highest of {count} is flattering again"
    )
    if not honest.values:
        return f"{among}, by how much one seed cannot say."
    return f"{among}: on a seed that had no say in the choice it gains {_difference(honest)}."


def _trust(gain: Cell) -> str:
    count = len(gain.values)
    if gain.mean <= 0:
        return "No confirmed settings are better than the preset: keep it."
    if count < LEAST_PAIRS:
        return (
            f"With n = {count} a gain cannot be told from chance: give --confirm-seeds {LEAST_PAIRS} or more "
            f"before relying on it."
        )
    if gain.p_value < _CHANCE:
        return f"That is more than chance would explain ({_p(gain)}, paired t-test, n = {count})."
    return (
        f"That may be chance ({_p(gain)}, paired t-test, n = {count}): take more seeds before relying on it."
    )


def held_out_gain(whole: Sequence[Confirmed], preset: Confirmed) -> Cell:
    """By fresh seed, the gain over the preset of the settings that all other seeds would choose.

    Over seeds that all of `whole`, the preset among them, have; empty with fewer than two of these.
    """
    seeds = set.intersection(*(set(one.free.values) for one in whole))
    if len(seeds) < 2:
        return Cell({})
    gains = {}
    for seed in sorted(seeds):
        others = seeds - {seed}
        chosen = max(whole, key=lambda one: sum(one.free.values[other] for other in others))
        gains[seed] = chosen.free.values[seed] - preset.free.values[seed]
    return Cell(gains)


def best_config(found: Sequence[Confirmed], records: Sequence[Record], base: Config) -> tuple[Config, str]:
    """The settings to go on with, and why these.

    Of what was confirmed the highest mean, the preset included; without confirmation the search's maximum.
    """
    whole = [one for one in found if one.free.values]
    if whole:
        one = max(whole, key=lambda one: one.free.mean)
        return override(
            base, one.changes
        ), f"{one.label}, the highest of {len(whole)} with {_seeds(one.free)}"
    finished = [record for record in records if record.state == "complete"]
    if not finished:
        raise ValueError("search must have a finished trial to name the best one, got none; see its failures")
    top = max(finished, key=lambda record: record.value)
    return override(base, dict(top.changes)), f"trial {top.label}, the search's maximum, not confirmed"


def points(value: float, *, signed: bool = False) -> str:
    """A fraction as percent with two decimals, a dash where there is none."""
    if math.isnan(value):
        return "–"
    return f"{100 * value:{'+' if signed else ''}.2f}".replace("-", "−")


def over_seeds(cell: Cell, *, signed: bool = False) -> str:
    """`43.00 ± 1.20`; the mean alone of one seed, since one has no deviation."""
    mean = points(cell.mean, signed=signed)
    return f"{mean} ± {points(cell.deviation)}" if len(cell.values) > 1 else mean


def _seeds(cell: Cell) -> str:
    count = len(cell.values)
    return f"{count} fresh {'seed' if count == 1 else 'seeds'}"


def _mean(cell: Cell) -> str:
    return f"{over_seeds(cell)} with {_seeds(cell)}"


def _p(gain: Cell) -> str:
    return f"p {gain.p_value:.2f}" if gain.p_value >= 0.01 else "p < 0.01"


def _difference(cell: Cell) -> str:
    """`+4.00 ± 0.30 points (n = 3)`."""
    return f"{over_seeds(cell, signed=True)} points (n = {len(cell.values)})"
