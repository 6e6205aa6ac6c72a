"""stage=compare: two systems on the same unseen prompts, told in one line.

It is stage=evaluate of both, whose report lies in <runs>/<name>/compare/evaluate.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf.config import load_config
from rlhf.gates import GATE_STATUS
from stages import COMMAND_VARIABLE
from stages.all import ENTRY_POINT, run_child, stage_folder
from stages.common import without_run_mode

SIDES = ("a", "b")
INSTEAD = {"systems": "give a= and b=", "baseline": "it is b"}


def plan(overrides: list[str]) -> tuple[Any, list[str]]:
    """The configuration and the words of the evaluation of `a=` and `b=`.

    Raises ValueError where one of them is missing, or a word contradicts them.
    """
    words = [word for word in overrides if word.partition("=")[0] not in SIDES]
    given = dict(word.split("=", 1) for word in overrides if word not in words)
    for side in SIDES:
        if not given.get(side):
            raise ValueError(
                f"stage=compare needs {side}=: a checkpoint or stage folder, a hub name, or a file "
                "of responses, for instance a=runs/mine/ppo b=runs/mine/sft"
            )
    for word in words:
        if (key := word.partition("=")[0].split(".")[0]) in INSTEAD:
            raise ValueError(f"{word}: stage=compare says that itself; {INSTEAD[key]}")
    systems = json.dumps({side: _system(given[side]) for side in SIDES})
    own = [f"systems={systems}", "baseline=b"]
    found = load_config("evaluate", [*words, *own])
    # the run's own scorers, which its folder for comparisons has not
    scorers = [f"{key}={json.dumps(getattr(found, key))}" for key in ("proxy", "gold")]
    words = [*without_run_mode(words), *own, *scorers, f"name={found.name}/compare", "overwrite=true"]
    return load_config("evaluate", words), words


def _system(place: str) -> str | dict[str, str]:
    if place.endswith((".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")):
        return {"generations": place}
    return str(Path(place) / "model") if (Path(place) / "model" / "config.json").exists() else place


def run(overrides: list[str]) -> int:
    """Compare, print the line, and return the exit status."""
    config, words = plan(overrides)
    command = shlex.join(["./launch.sh", "stage=compare", *overrides])
    child = [sys.executable, str(ENTRY_POINT), "stage=evaluate", *words]
    status = run_child(child, {COMMAND_VARIABLE: command}, stdout=subprocess.DEVNULL)
    if status in (0, GATE_STATUS):
        place = stage_folder("evaluate", config) / "report.json"
        print(in_one_line(json.loads(place.read_text(encoding="utf-8"))))
    return status


def in_one_line(report: dict[str, Any]) -> str:
    """Which of a and b is better, by gold where there is one, else by proxy."""
    judge = report["win_rates"][0]["judge"]
    [rate] = [each for each in report["win_rates"] if each["judge"] == judge]
    [difference] = [each for each in report["differences"] if each["judge"] == judge]
    word = (
        "beats" if difference["low"] > 0 else "loses to" if difference["high"] < 0 else "cannot be told from"
    )
    even = rate["length_controlled"]
    parts = [
        f"a {word} b by {judge} ({report[judge]})",
        f"win rate {rate['win_rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]",
        f"{rate['wins']} wins, {rate['ties']} ties, {rate['losses']} losses",
        f"at equal length {even['mean']:.3f} [{even['low']:.3f}, {even['high']:.3f}]",
        f"difference {difference['mean']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]",
    ]
    parts += [
        f"gate {each['gate']} {'passed' if each['passed'] else 'NOT PASSED'}" for each in report["gates"]
    ]
    return "; ".join(parts)
