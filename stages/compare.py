"""stage=compare: two systems on the same unseen prompts, told in one line.

It is stage=evaluate of both, whose report lies in <runs>/<name>/compare/<pair>/evaluate.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

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
    typed = [word for word in overrides if word.partition("=")[0] not in SIDES]
    given = {word.partition("=")[0]: word.partition("=")[2] for word in overrides if word not in typed}
    for side in SIDES:
        if not given.get(side):
            raise ValueError(
                f"stage=compare needs {side}=: a checkpoint or stage folder, a hub name, or a file "
                "of responses, for instance a=runs/mine/ppo b=runs/mine/sft"
            )
    for word in typed:
        if (key := word.partition("=")[0].split(".")[0]) in INSTEAD:
            raise ValueError(f"{word}: stage=compare says that itself; {INSTEAD[key]}")
    # a folder for each pair, so that one comparison does not replace another
    digest = hashlib.sha256(f"{given['a']}\n{given['b']}".encode()).hexdigest()[:8]
    systems = json.dumps({side: _system(given[side]) for side in SIDES})
    own = [f"systems={systems}", "baseline=b"]
    words = [*_of_the_runs(typed, given), *typed]
    found = load_config("evaluate", [*words, *own])
    # the run's own scorers, which its folder for comparisons has not
    scorers = [f"{key}={json.dumps(getattr(found, key))}" for key in ("proxy", "gold")]
    place = f"name={found.name}/compare/{digest}"
    words = [*without_run_mode(words), *own, *scorers, place, "overwrite=true"]
    return load_config("evaluate", words), words


def _of_the_runs(typed: list[str], given: dict[str, str]) -> list[str]:
    """The data and model that the stages were run with which left a and b, where none are typed.

    Raises ValueError where a and b were trained on different data.
    """
    found: list[str] = []
    for key, part in (("data", "name"), ("model", "path")):
        values = {side: value for side in SIDES if (value := _setting(given[side], key, part)) is not None}
        if not values or any(word.startswith((f"{key}=", f"{key}.")) for word in typed):
            continue
        if key == "data" and len(set(values.values())) > 1:
            told = ", ".join(f"{side} with data={value}" for side, value in values.items())
            raise ValueError(f"stage=compare: {told} was trained: say with data= on whose prompts they meet")
        found.append(f"{key}={next(iter(values.values()))}")
    return found


def _setting(place: str, key: str, part: str) -> str | None:
    """A setting of the stage that left a folder; None where none did."""
    for folder in (Path(place), Path(place).parent):
        if (folder / "config.yaml").is_file() and (folder / "stage.json").is_file():
            settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            return (settings.get(key) or {}).get(part)
    return None


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
        print(in_one_line(json.loads(place.read_text(encoding="utf-8")), config.data.name))
    return status


def in_one_line(report: dict[str, Any], data: str) -> str:
    """Which of a and b is better, by the judge that was asked, else by gold, else by proxy, and on how many
    prompts of which data.
    """
    from rlhf.evaluation.measures import LEAST_ROWS

    rates = {each["judge"]: each for each in report["win_rates"]}
    if not rates:
        return "a and b could not be compared: the judge gave no verdict that could be read"
    judge = next(each for each in ("judge", "gold", "proxy") if each in rates)
    rate, even = rates[judge], rates[judge]["length_controlled"]
    differences = [each for each in report["differences"] if each["judge"] == judge]
    low, high = _ends(rate, differences)
    few = rate["wins"] + rate["ties"] + rate["losses"] < LEAST_ROWS
    word = "beats" if low > 0 else "loses to" if high < 0 else "cannot be told from"
    word = "cannot, by so few prompts, be told from" if few else word
    by = report["judge"]["model"] if judge == "judge" else report[judge]
    parts = [
        f"a {word} b by {judge} ({by}) on {report['num_prompts']} prompts (data={data})",
        f"win rate {rate['win_rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]",
        f"{rate['wins']} wins, {rate['ties']} ties, {rate['losses']} losses",
    ]
    if even:
        parts.append(f"at equal length {even['mean']:.3f} [{even['low']:.3f}, {even['high']:.3f}]")
    parts += [f"difference {d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for d in differences]
    parts += [
        f"gate {each['gate']} {'passed' if each['passed'] else 'NOT PASSED'}" for each in report["gates"]
    ]
    return "; ".join(parts)


def _ends(rate: dict[str, Any], differences: list[dict[str, Any]]) -> tuple[float, float]:
    """The ends of the interval that tells a from b at 0: of the mean difference where there are scores."""
    if differences:
        return differences[0]["low"], differences[0]["high"]
    return rate["low"] - 0.5, rate["high"] - 0.5
