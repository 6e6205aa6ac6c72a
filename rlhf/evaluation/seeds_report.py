"""What the evaluations of several seeds say together: means, the spread, and every seed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.evaluation.exposure_report import combined, gates_of_seeds, warnings_of
from rlhf.evaluation.page import write_page
from rlhf.evaluation.report import escaped, table
from rlhf.evaluation.tables import COLUMNS, bands_in_words, notes_in_words, table_rows
from rlhf.files import write_text


def seeds_table(report: dict[str, Any]) -> list[list[str]]:
    """The difference of each system to the baseline in every seed, as text: a header, a row a seed, the mean
    with the standard deviation between seeds.
    """
    by_system = report["by_seed"]
    rows = [["seed", *by_system]]
    for place, seed in enumerate(report["seeds"]):
        rows.append([str(seed), *(f"{values[place]:+.3f}" for values in by_system.values())])
    rows += [[str(seed), f"stage {stage} failed"] for seed, stage in report["failed_seeds"].items()]
    rows = [[*row, *["-"] * (len(rows[0]) - len(row))] for row in rows]
    if len(report["seeds"]) > 1:
        spread = [f"{np.mean(each):+.3f} (sd {np.std(each, ddof=1):.3f})" for each in by_system.values()]
        rows.append(["mean", *spread])
    return rows


def write_seeds_report(
    folder: Path,
    reports: Mapping[int, dict[str, Any]],
    failed: Mapping[int, str],
    stages: Mapping[str, dict[str, Any]],
    command: str,
) -> dict[str, Any]:
    """Write report.json, report.md and report.html from the reports of evaluations, by seed, and the seeds
    whose chain failed, each with the stage that did; `stages` are the stage.json of all, by folder. Returns
    the report.
    """
    report = combined(list(reports.values()))
    judge = next((each for each in ("gold", "proxy") if report[each] is not None), None)
    names = [each["a"] for each in report["differences"] if each["judge"] == judge]
    by_seed = {
        name: [
            each["mean"]
            for found in reports.values()
            for each in found["differences"]
            if (each["a"], each["judge"]) == (name, judge)
        ]
        for name in names
    }
    report |= {
        "name": folder.parent.name,
        "seeds": list(reports),
        "failed_seeds": dict(failed),
        "judge_of_seeds": judge,
        "by_seed": by_seed,
        "reference": f"the reference of each seed, as {report['reference']}",
        "warnings": warnings_of(reports),
        "seen_prompts": max(each["seen_prompts"] for each in reports.values()),
        "notes": list(dict.fromkeys(note for each in reports.values() for note in each["notes"])),
        "failed_checks": [
            f"seed {seed}: {line}" for seed, each in reports.items() for line in each["failed_checks"]
        ],
        "gates": gates_of_seeds(reports),
        "commands": [command],
    }
    report["verdict"] = seeds_verdict(report)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "report.md", _markdown(report))
    write_page(folder / "report.html", report, (), stages, seeds_table(report))
    return report


def seeds_verdict(report: dict[str, Any]) -> str | None:
    """One sentence on ppo, else the last system: its difference to the baseline over the seeds."""
    by_seed, judge = report["by_seed"], report["judge_of_seeds"]
    if not by_seed:
        return None
    name = "ppo" if "ppo" in by_seed else list(by_seed)[-1]
    values, failed = by_seed[name], report["failed_seeds"]
    lost = f" The chain of seed {', '.join(map(str, failed))} failed." if failed else ""
    if len(values) == 1:
        return f"{name} less {report['baseline']} by {judge}: {values[0]:+.2f}, of one seed.{lost}"
    return (
        f"{name} less {report['baseline']} by {judge}: {np.mean(values):+.2f} on average over {len(values)} "
        f"seeds (standard deviation {np.std(values, ddof=1):.2f}, from {min(values):+.2f} to "
        f"{max(values):+.2f}).{lost}"
    )


def _markdown(report: dict[str, Any]) -> str:
    failed = "".join(
        f"- seed {seed}: stage {stage} failed, and is in no mean\n"
        for seed, stage in report["failed_seeds"].items()
    )
    warned = [f"{name}: {line}" for name, lines in report["warnings"].items() for line in lines]
    told = [*warned, *notes_in_words(report)]
    checks = "".join(f"- {escaped(line)}\n" for line in told)
    seeds = ", ".join(map(str, [*report["seeds"], *report["failed_seeds"]]))
    verdict = f"**{escaped(report['verdict'])}**\n\n" if report["verdict"] else ""
    return (
        f"# {escaped(report['name'])}: seeds {seeds}\n\n"
        f"{verdict}{bands_in_words(report)} "
        f"Wins are against `{report['baseline']}`.\n\n"
        f"{table([list(COLUMNS), *table_rows(report)])}\n"
        f"## Every seed: {report['judge_of_seeds']}, less {escaped(report['baseline'])}\n\n"
        f"{table(seeds_table(report))}\n{failed}{checks}\n"
        f"## How to reproduce\n\n    {report['commands'][0]}\n\n"
        + "".join(f"- {name} {version}\n" for name, version in report["versions"].items())
    )
