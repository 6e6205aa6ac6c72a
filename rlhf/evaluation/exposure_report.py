"""The comparison of all cures for exposure bias, of one seed or of several together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.evaluation.compare import common_length
from rlhf.evaluation.page import write_page
from rlhf.evaluation.plots import (
    common_scorer,
    plot_diversity,
    plot_excess_error,
    plot_overoptimization,
    saved,
)
from rlhf.evaluation.report import escaped, overoptimization_section, table
from rlhf.evaluation.tables import (
    COLUMNS,
    OVERLAPS,
    SIMULATED,
    bands_in_words,
    exposure_in_words,
    exposure_table,
    notes_in_words,
    prompts_in_words,
    table_rows,
)
from rlhf.files import write_text
from rlhf.parents import failed_checks

TITLES = {"exposure": "Cures for exposure bias", "overoptimization": "Over-optimisation"}
FIRST_COLUMNS = ("system", "gold", "wins (gold)", "proxy", "KL", "length", "ended")
IDENTITIES = (("a", "b", "judge"), ("system", "update", "best_of"), ("length",))
OF_ONE_SEED = {"highest", "lineage"}  # of a report, what has no mean
INTERVALS = (("mean", "low", "high"), ("win_rate", "low", "high"), ("kl", "kl_low", "kl_high"))


def read_json(path: Path) -> dict[str, Any]:
    """A report.json or stage.json."""
    return json.loads(path.read_text(encoding="utf-8"))


def combined(values: Sequence[Any]) -> Any:
    """The mean of reports of the same form over seeds; intervals become the lowest and the highest seed.

    Entries of a list that say what they are of (IDENTITIES) are those that all have, others are joined by
    their places in the shortest; what is missing in one is missing.
    """
    first = values[0]
    if len(values) == 1 or any(value is None for value in values):
        return first if len(values) == 1 else None
    if isinstance(first, dict):
        shared = [key for key in first if key not in OF_ONE_SEED and all(key in value for value in values)]
        found = {key: combined([value[key] for value in values]) for key in shared}
        for mean, low, high in INTERVALS:
            if found.keys() >= {mean, low, high}:
                means = [value[mean] for value in values if value[mean] is not None]
                whole = len(means) == len(values)
                # a mean that is None has no end, but a KL that is None is not known
                lowest = min(means, default=None) if whole or mean == "mean" else None
                found |= {low: lowest, high: max(means) if whole else None}
        return found
    if isinstance(first, list):
        by_identity = [{_identity(each): each for each in value} for value in values]
        if not any(None in found for found in by_identity):
            shared = [name for name in by_identity[0] if all(name in found for found in by_identity)]
            values = [[found[name] for name in shared] for found in by_identity]
        return [combined(each) for each in zip(*values, strict=False)]
    if isinstance(first, int | float) and any(value != first for value in values):
        return sum(values) / len(values)
    return first


def _identity(entry: Any) -> tuple[Any, ...] | None:
    """What an entry of a list is of; None where it does not say."""
    known = (names for names in IDENTITIES if isinstance(entry, dict) and entry.keys() >= set(names))
    return next((tuple(entry[name] for name in names) for names in known), None)


def comparison_table(report: dict[str, Any]) -> list[list[str]]:
    """One table of everything: its header, and a row a system, as text."""
    scores = [list(COLUMNS), *table_rows(report)]
    places = [COLUMNS.index(name) for name in FIRST_COLUMNS]
    rows = zip(scores, exposure_table(report), strict=True)
    return [[*(row[place] for place in places), *more[1:]] for row, more in rows]


def differences_table(report: dict[str, Any]) -> list[list[str]]:
    """What every system has more than the baseline, by each judge."""
    found = {(each["a"], each["judge"]): each for each in report["differences"]}
    judges = list(dict.fromkeys(judge for _, judge in found))
    rows = [["system", *(OVERLAPS.get(judge, judge) for judge in judges)]]
    for name in dict.fromkeys(name for name, _ in found):
        cells = [found.get((name, judge)) for judge in judges]
        shown = [
            "-" if each is None else f"{each['mean']:+.3f} [{each['low']:+.3f}, {each['high']:+.3f}]"
            for each in cells
        ]
        rows.append([name, *shown])
    return rows


def warnings_of(reports: Mapping[int, dict[str, Any]]) -> dict[str, list[str]]:
    """The warnings of several seeds' reports, by system, each with its seed."""
    found: dict[str, list[str]] = {}
    for seed, report in reports.items():
        for name, lines in report["warnings"].items():
            own = [f"seed {seed}: {line}" for line in lines] if len(reports) > 1 else lines
            found.setdefault(name, []).extend(own)
    return found


def all_failed_checks(folders: Sequence[Path], run: Path) -> list[str]:
    """A line for every check that a stage in a folder below `run` failed."""
    records = {each: read_json(each / "stage.json") for each in folders}
    return [
        f"{each.relative_to(run)}: {line}"
        for each, record in records.items()
        for line in failed_checks(record)
    ]


def gates_of_seeds(reports: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """The gates of all reports, each with its seed where there are several."""
    several = len(reports) > 1
    return [
        gate | ({"gate": f"{gate['gate']} (seed {seed})"} if several else {})
        for seed, report in reports.items()
        for gate in report["gates"]
    ]


def write_comparison(
    folder: Path, seeds: dict[int, Path], trained: Sequence[Path], command: str
) -> dict[str, Any]:
    """Write report.json, report.md and two plots from the evaluations of all seeds; `trained` are the stage
    folders whose checks are reported. Returns the report.
    """
    by_seed = {seed: read_json(path / "report.json") for seed, path in seeds.items()}
    reports, name = list(by_seed.values()), folder.parent.name
    report = combined(reports)
    report["excess_error_length"] = common_length(list(report["systems"].values()))
    if len(seeds) > 1:
        report |= {"verdict": None, "reference": report["baseline"]}  # each seed's own
    report |= {
        "notes": list(dict.fromkeys(note for each in reports for note in each["notes"])),
        "gates": gates_of_seeds(by_seed),
        "warnings": warnings_of(by_seed),
        "seen_prompts": max(each["seen_prompts"] for each in reports),
        "name": f"{TITLES[folder.name]}: {name}",
        "seeds": list(seeds),
        "failed_checks": all_failed_checks(trained, folder.parent),
        "commands": [command],
    }
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    names = []
    if common_scorer(report) is not None:
        names.append(saved(plot_diversity(report), plots / "diversity.png"))
    if report["excess_error_length"] is not None:
        names.append(saved(plot_excess_error(report), plots / "excess_error.png"))
    if report["overoptimization"]:
        names.append(saved(plot_overoptimization(report), plots / "overoptimization.png"))
    write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "report.md", _markdown(report, seeds, names))
    write_page(
        folder / "report.html", report, (), {str(each): read_json(each / "stage.json") for each in trained}
    )
    return report


def _markdown(report: dict[str, Any], seeds: dict[int, Path], plots: Sequence[str]) -> str:
    numbers = ", ".join(map(str, seeds))
    simulated = f"\n{SIMULATED}\n" if report["preferences_simulated"] else ""
    oracle = f" The oracle is `{report['oracle']}`." if report["oracle"] else ""
    return (
        f"# {escaped(report['name'])}\n{simulated}\n"
        f"Seeds {numbers}; {prompts_in_words(report)}, one response each, the same for all. "
        f"{bands_in_words(report)} KL is to `{report['reference']}` in nats per response; of a system that "
        f"draws nothing its log-prob counts as 0.{oracle}\n\n"
        f"{table(comparison_table(report))}\n"
        f"{exposure_in_words(report)}\n\n"
        + "".join(f"- {escaped(note)}\n" for note in notes_in_words(report))
        + "\n"
        + "\n".join(f"![{name}](plots/{name})" for name in plots)
        + f"\n\n## Less {escaped(report['baseline'])}, paired by prompt\n\n{table(differences_table(report))}"
        f"\n{overoptimization_section(report)}## How to reproduce\n\n"
        f"    {report['commands'][0]}\n\n"
        + "".join(f"- seed {seed}: {path / 'report.md'}\n" for seed, path in seeds.items())
        + "".join(f"- {name} {version}\n" for name, version in report["versions"].items())
    )
