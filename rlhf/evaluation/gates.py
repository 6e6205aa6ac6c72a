"""Whether an evaluation meets the conditions that it was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.evaluation.compare import Scored
from rlhf.evaluation.statistics import Estimate, paired_difference, win_rate
from rlhf.gates import COMPARISONS, NUMBERS, SCORERS, Gate


@dataclass(frozen=True)
class Outcome:
    """Whether a gate is passed, and what was found, in words."""

    gate: str
    passed: bool
    found: str


def outcome(gate: Gate, report: dict[str, Any], scored: Sequence[Scored], **options: int) -> Outcome:
    """Whether a gate is passed by a report; one whose measure is missing is not."""
    found = _measured(gate, report, {each.system.name: each for each in scored}, **options)
    if found is None:
        return Outcome(gate.text, False, "not measured")
    estimate = found if isinstance(found, Estimate) else Estimate(found, found, found)
    value = getattr(estimate, gate.end or "mean")
    interval = f" [{estimate.low:.3f}, {estimate.high:.3f}]" if isinstance(found, Estimate) else ""
    passed = bool(COMPARISONS[gate.comparison](value, gate.bound))
    return Outcome(gate.text, passed, f"{estimate.mean:.3f}{interval}")


def _measured(
    gate: Gate, report: dict[str, Any], scored: dict[str, Scored], **options: int
) -> Estimate | float | None:
    entry = report["systems"][gate.systems[0]]
    if gate.measure == "kl":
        ends = entry["kl"], entry["kl_low"], entry["kl_high"]
        return Estimate(*ends) if None not in ends else None if gate.end else entry["kl"]
    if gate.measure in NUMBERS:
        return entry[gate.measure]
    if gate.measure in SCORERS:
        found = entry["overlap"].get(gate.measure) or entry.get(gate.measure)
        return found and Estimate(**found)
    judged = _by_judge(gate, report) if gate.measure == "win_rate" else None
    if gate.judge == "judge":
        return judged
    first, second = (scored[name] for name in gate.systems)
    judges = (gate.judge,) if gate.judge else ("gold", "proxy")
    pairs = [(first.by(judge), second.by(judge)) for judge in judges]
    ours, theirs = next(((a, b) for a, b in pairs if a is not None and b is not None), (None, None))
    if ours is None or theirs is None:
        return None if gate.judge else judged
    if gate.measure == "difference":
        return paired_difference(ours, theirs, **options)
    rate = win_rate(ours, theirs, **options)
    return Estimate(rate.win_rate, rate.low, rate.high)


def _by_judge(gate: Gate, report: dict[str, Any]) -> Estimate | None:
    """The judge's win rate of the first system over the second, one of which is the baseline."""
    for rate in (each for each in report["win_rates"] if each["judge"] == "judge"):
        if (rate["a"], rate["b"]) == gate.systems:
            return Estimate(rate["win_rate"], rate["low"], rate["high"])
        if (rate["b"], rate["a"]) == gate.systems:
            return Estimate(1 - rate["win_rate"], 1 - rate["high"], 1 - rate["low"])
    return None
