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
from rlhf.specs import policy_in
from stages import COMMAND_VARIABLE
from stages.all import ENTRY_POINT, run_child, stage_folder
from stages.common import without_run_mode

SIDES = ("a", "b")
INHERITED = ("format", "max_prompt_tokens", "max_response_tokens", "on_bad_row")  # of data
INSTEAD = {"systems": "give a= and b=", "baseline": "it is b"}


def plan(overrides: list[str]) -> tuple[Any, list[str]]:
    """The configuration and the words of the evaluation of `a=` and `b=`.

    Raises ValueError where one of them is missing, or a word contradicts them.
    """
    overrides = [word.removeprefix("evaluate.") for word in overrides]
    typed = [word for word in overrides if word.partition("=")[0] not in SIDES]
    given = {word.partition("=")[0]: word.partition("=")[2] for word in overrides if word not in typed}
    for side in SIDES:
        if not given.get(side):
            raise ValueError(
                f"stage=compare needs {side}=: a checkpoint, stage or run folder, a hub name, or a file "
                "of responses, for instance a=runs/mine/ppo b=runs/mine/sft"
            )
    for word in typed:
        if (key := word.partition("=")[0].split(".")[0]) in INSTEAD:
            raise ValueError(f"{word}: stage=compare says that itself; {INSTEAD[key]}")
    given = {side: policy_in(place) for side, place in given.items()}
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
    """The run, data and model of the stages that left a and b, each where it is not typed.

    Raises ValueError where a and b were trained on different data.
    """
    keys = {word.partition("=")[0] for word in typed}
    settings = {side: own for side in SIDES if (own := _settings_of(given[side])) is not None}
    if not settings:
        return []
    first, found = next(iter(settings.values())), list[str]()
    if not keys & {"name", "runs"} and len({(each["runs"], each["name"]) for each in settings.values()}) == 1:
        found += [f"runs={first['runs']}", f"name={first['name']}"]
    if "data" not in keys:
        names = {side: each["data"]["name"] for side, each in settings.items()}
        if len(set(names.values())) > 1:
            told = ", ".join(f"{side} was trained with data={name}" for side, name in names.items())
            raise ValueError(f"stage=compare: {told}: say with data= whose prompts to use")
        found.append(f"data={first['data']['name']}")
        found += [f"data.{key}={json.dumps(value)}" for key in INHERITED if (value := first["data"].get(key))]
        prompts = (first["data"].get("prompts") or {}).get("evaluate")
        found += [f"data.prompts.evaluate={json.dumps(prompts)}"] if prompts else []
    if not keys & {"model", "model.path"}:
        found.append(f"model={first['model']['path']}")
    return found


def _settings_of(place: str) -> dict[str, Any] | None:
    """The settings of the stage that left a folder or file; None where none is known to have."""
    path = Path(place).expanduser().absolute()
    folders = [path, *path.parents][: 3 if path.is_file() else 2] if path.exists() else []
    for folder in folders:
        if (folder / "config.yaml").is_file() and (folder / "stage.json").is_file():
            try:
                found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
                run = folder.parent  # wherever it was moved to
                found |= {"runs": str(run.parent), "name": run.name}
                return found if found["data"]["name"] and found["model"]["path"] else None
            except (KeyError, TypeError, OSError, ValueError, yaml.YAMLError):
                return None
    return None


def _system(place: str) -> str | dict[str, str]:
    if place.endswith((".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")):
        return {"generations": place}
    return place


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
    number = rate["wins"] + rate["ties"] + rate["losses"]
    few = number < LEAST_ROWS
    word = "beats" if low > 0 else "loses to" if high < 0 else "cannot be told from"
    word = "cannot, by so few prompts, be told from" if few else word
    by = report["judge"]["model"] if judge == "judge" else report[judge]
    parts = [
        f"a {word} b by {judge} ({by}) on {number} prompts (data={data})",
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
