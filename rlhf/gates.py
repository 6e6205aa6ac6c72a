"""Conditions on an evaluation, for scripts: gate='win_rate(ppo, sft) > 0.6'."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection
from dataclasses import dataclass

from rlhf.hints import hint

GATE_STATUS = 4  # of a stage that ran to its end, and whose gate was not passed
SCORERS = ("gold", "proxy", "rouge_l", "bleu")
JUDGES = (*SCORERS, "judge")
PAIRS = ("win_rate", "difference")
NUMBERS = ("kl", "length", "share_ended", "rep_4", "distinct_2")  # of a system's entry in the report
ENDS = ("low", "high")
COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
PATTERN = re.compile(r"(\w+)\(([^()]*)\)(?:\.(\w+))?\s*(>=|<=|>|<)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)")
FORM = "'win_rate(ppo, sft) > 0.6', 'difference(ppo, sft, gold).low > 0' or 'kl(ppo) < 10' is expected"


@dataclass(frozen=True)
class Gate:
    """A measure of one or two systems by a judge (None: gold, else proxy), or an end of its 95% interval, and
    what it is to be.
    """

    text: str
    measure: str
    systems: tuple[str, ...]
    judge: str | None
    end: str | None
    comparison: str
    bound: float


def parse_gates(text: str | None, systems: Collection[str], runs: Collection[str] = ()) -> list[Gate]:
    """Read conditions on these systems, joined by `and`; none from None. Those of `runs` may have checkpoints
    too, name_<update>.

    Raises ValueError, naming what is wrong and what would be right.
    """
    parts = [] if text is None else re.split(r"\s+and\s+", text)
    return [_parse(part.strip(), systems, runs) for part in parts]


def _parse(text: str, systems: Collection[str], runs: Collection[str]) -> Gate:
    match = PATTERN.fullmatch(text)
    if match is None:
        raise ValueError(f"gate={text}: {FORM}")
    measure, inside, end, comparison, number = match.groups()
    known = (*PAIRS, *SCORERS, *NUMBERS)
    if measure not in known:
        raise ValueError(f"gate={text}: {hint(measure, known)}{measure} is none of {', '.join(known)}")
    names = [name.strip() for name in inside.split(",")]
    count = 2 if measure in PAIRS else 1
    judge = names.pop() if measure in PAIRS and len(names) == 3 else None
    if len(names) != count:
        raise ValueError(f"gate={text}: {measure} is of {count} systems; {FORM}")
    for name in names:
        if name not in systems and name.rpartition("_")[0] not in runs:
            raise ValueError(f"gate={text}: {hint(name, list(systems))}systems are {', '.join(systems)}")
    if judge is not None and judge not in JUDGES:
        raise ValueError(f"gate={text}: {hint(judge, JUDGES)}a judge is one of {', '.join(JUDGES)}")
    if (measure, judge) == ("difference", "judge"):
        raise ValueError(f"gate={text}: the judge gives no scores; ask for win_rate({inside})")
    if end is not None and (end not in ENDS or (measure in NUMBERS and measure != "kl")):
        raise ValueError(f"gate={text}: .{end}: .low and .high are ends of a score, a pair or kl; {FORM}")
    try:
        bound = float(number)
    except ValueError:
        raise ValueError(f"gate={text}: {number} is no number; {FORM}") from None
    return Gate(text, measure, tuple(names), judge, end, comparison, bound)
