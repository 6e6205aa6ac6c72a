"""The report people read: report.json, report.md with samples side by side, and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.evaluation.compare import Scored, main_system
from rlhf.evaluation.plots import (
    CURVES,
    common_scorer,
    plot_diversity,
    plot_excess_error,
    plot_overoptimization,
    plot_scores,
    plot_training,
    saved,
)
from rlhf.evaluation.tables import (
    COLUMNS,
    OVEROPTIMIZATION,
    PREFERENCES,
    SIMULATED,
    bands_in_words,
    curves_table,
    exposure_in_words,
    exposure_table,
    kl_in_words,
    notes_in_words,
    preference_table,
    printable,
    prompts_in_words,
    signals_table,
    table_rows,
)
from rlhf.files import write_text

LONGEST = 2000  # characters of a prompt or response in report.md


def write_report(
    folder: Path, report: dict[str, Any], scored: Sequence[Scored], *, curves: Path | None, num_samples: int
) -> None:
    """Write report.json, the plots, report.md and every response with its scores into a stage folder."""
    write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    responses = folder / "generations"
    responses.mkdir(exist_ok=True)
    for each in scored:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _rows(each)]
        write_text(responses / f"{each.system.name}.jsonl", "".join(lines))
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    names = []
    if common_scorer(report) is not None:
        names.append(saved(plot_scores(report), plots / "scores.png"))
        names.append(saved(plot_diversity(report), plots / "diversity.png"))
    if report["excess_error_length"] is not None:
        names.append(saved(plot_excess_error(report), plots / "excess_error.png"))
    if report["overoptimization"]:
        names.append(saved(plot_overoptimization(report), plots / "overoptimization.png"))
    rows = [] if curves is None or not curves.exists() else training_rows(curves)
    if rows:
        names.append(saved(plot_training(rows), plots / "training.png"))
    write_text(
        folder / "report.md", _markdown(report, scored, [f"plots/{name}" for name in names], num_samples)
    )


def _rows(scored: Scored) -> Iterator[dict[str, Any]]:
    scores = {"gold": scored.gold, "proxy": scored.proxy}
    for i, generation in enumerate(scored.generations):
        yield vars(generation) | {judge: found[i] for judge, found in scores.items() if found is not None}


def training_rows(metrics: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl that PPO wrote; other stages' lines have no score and no KL."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if CURVES.keys() <= row.keys()]


def _markdown(
    report: dict[str, Any], scored: Sequence[Scored], plots: Sequence[str], num_samples: int
) -> str:
    scores = table([list(COLUMNS), *table_rows(report)])
    notes = "".join(f"- {escaped(note)}\n" for note in notes_in_words(report))
    warned = "\n".join(
        f"- **{escaped(name)}**: {escaped(line)}"
        for name, lines in report["warnings"].items()
        for line in lines
    )
    images = "\n".join(f"![{name}]({name})" for name in plots)
    lineage = [[name, *map(escaped, cells)] for name, *cells in report["lineage"]]
    note = f"\n{SIMULATED}\n" if report["preferences_simulated"] else ""
    return (
        f"# {escaped(report['name'])}\n\n**{escaped(report['verdict'])}**\n{note}\n"
        f"{prompts_in_words(report)}, one response each; the same decoding, length limit and "
        f"random numbers for all that were sampled here. {bands_in_words(report)} "
        f"{escaped(kl_in_words(report))} "
        f"Wins are against `{report['baseline']}`.\n\n"
        f"{scores}\n{images}\n\n{_preferences(report)}"
        f"## Is the reward hacked?\n\n{warned or 'No sign of it.'}\n\n{table(signals_table(report))}\n"
        f"{_liked(report)}"
        f"{overoptimization_section(report)}"
        f"## Exposure bias\n\n{exposure_in_words(report)}\n\n{table(exposure_table(report))}\n{notes}\n"
        f"## Samples\n\n{_samples(scored, num_samples)}"
        f"\n## Where it comes from\n\n{table(lineage)}"
        "\n## How to reproduce\n\nIn an empty `runs=` folder:\n\n"
        + "".join(f"    {command}\n" for command in report["commands"])
        + "\n"
        + "".join(f"- {name} {version}\n" for name, version in report["versions"].items())
    )


def overoptimization_section(report: dict[str, Any]) -> str:
    """The curves as a section of Markdown; nothing where there are none."""
    if not report["overoptimization"]:
        return ""
    return f"## Over-optimisation\n\n{OVEROPTIMIZATION}\n\n{table(curves_table(report))}\n"


def _liked(report: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['proxy']:.2f}",
            "-" if row["gold"] is None else f"{row['gold']:.2f}",
            _shown(_asked(row["prompt"])),
            _shown(row["response"]),
        ]
        for row in report["highest"]
    ]
    if not rows:
        return ""
    liked = table([["proxy", "gold", "prompt", "response"], *rows])
    return f"The {len(rows)} responses of `{main_system(report)}` that the proxy likes best:\n\n{liked}\n"


def _shown(text: str) -> str:
    """Text as a cell, cut where it is very long: all of it is in generations/."""
    return escaped(text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text)} characters)")


def _asked(prompt: Any) -> str:
    """What a prompt asks last."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def _preferences(report: dict[str, Any]) -> str:
    judged = {rate["judge"] for rate in report["win_rates"]}
    names = {"gold": "gold", "judge": "the judge", "proxy": "proxy"}
    tables = [
        f"By {name}:\n\n{table(preference_table(report, judge))}\n"
        for judge, name in names.items()
        if judge in judged
    ]
    heading = f"## Who beats whom\n\nAgainst `{report['baseline']}`. {PREFERENCES}\n\n"
    return heading + "".join(tables) if tables else ""


def table(rows: Sequence[Sequence[str]]) -> str:
    """A header and rows, whose first cells are names, as a table of Markdown."""
    header, *others = rows
    named = [[escaped(name), *cells] for name, *cells in others]
    lines = [list(map(escaped, header)), ["---"] * len(header), *named]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _samples(scored: Sequence[Scored], num_samples: int) -> str:
    blocks = []
    for i in range(min(num_samples, len(scored[0].generations))):
        text = _shown(_asked(scored[0].generations[i].prompt))
        lines = [f"**{text}** ...\n\n| system | response | gold | proxy |\n|---|---|---|---|\n"]
        for each in scored:
            numbers = " | ".join(f"{scores[i]:.2f}" if scores else "-" for scores in (each.gold, each.proxy))
            lines.append(
                f"| {escaped(each.system.name)} | {_shown(each.generations[i].response)} | {numbers} |\n"
            )
        blocks.append("".join(lines))
    return "\n".join(blocks)


def escaped(text: str) -> str:
    """Model text that cannot become markup: no HTML, table cells, links, line breaks or turns of its own."""
    text = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_[]|!#~$":
        text = text.replace(mark, "\\" + mark)
    for mark, entity in (("://", "&#58;//"), ("www.", "www&#46;"), ("@", "&#64;")):  # bare links
        text = text.replace(mark, entity)
    return " ".join(text.split())
