"""The report people read: report.json, report.md with samples side by side, and plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.evaluation.compare import Scored
from rlhf.files import write_text
from rlhf.processes import by_main

SIMULATED = (
    "The preferences behind this run are simulated: a classifier trained on labelled texts ranked the "
    "responses, and a second one, of another kind and trained on other texts, gives the gold score. "
    "No person judged them."
)
COLUMNS = ("system", "gold", "proxy", "KL", "length", "ended", "rep-4", "distinct-2", "wins (gold)")

CURVES = {
    "score": "reward's score",
    "kl": "KL to the start, nats per response",
    "length": "response length, tokens",
}


def table_rows(report: dict[str, Any]) -> list[list[str]]:
    """The final table, a row a system, as text."""
    wins = {(r["a"], r["judge"]): r for r in report["win_rates"]}
    rows = []
    for name, entry in report["systems"].items():
        rate = wins.get((name, "gold"))
        bound = "<= " if entry["kl_is_bound"] else ""
        kl = "-" if entry["kl"] is None else f"{bound}{round(entry['kl'], 2) + 0.0:.2f}"
        rows.append(
            [
                name,
                _interval(entry["gold"]),
                _interval(entry["proxy"]),
                kl,
                f"{entry['length']:.1f}",
                f"{entry['share_ended']:.0%}",
                f"{entry['rep_4']:.3f}",
                f"{entry['distinct_2']:.2f}",
                "-" if rate is None else f"{rate['win_rate']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]",
            ]
        )
    return rows


def print_table(report: dict[str, Any]) -> None:
    """Print the final table to the terminal."""
    rows = [list(COLUMNS), *table_rows(report)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


@by_main
def write_report(
    folder: Path, report: dict[str, Any], scored: Sequence[Scored], *, curves: Path | None, num_samples: int
) -> None:
    """Write report.json, the plots and report.md into a stage folder."""
    write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    names = [plot_scores(report, plots / "scores.png")]
    rows = [] if curves is None or not curves.exists() else training_rows(curves)
    if rows:
        names.append(plot_training(rows, plots / "training.png"))
    write_text(
        folder / "report.md", _markdown(report, scored, [f"plots/{name}" for name in names], num_samples)
    )


def plot_scores(report: dict[str, Any], path: Path) -> str:
    """Gold and proxy of every system with 95% intervals."""
    pyplot = _pyplot()
    judges = [j for j in ("gold", "proxy") if all(e[j] is not None for e in report["systems"].values())]
    figure, axes = pyplot.subplots(
        1, max(len(judges), 1), figsize=(4.5 * max(len(judges), 1), 3.2), squeeze=False
    )
    names = list(report["systems"])
    for axis, judge in zip(axes[0], judges, strict=False):
        entries = [report["systems"][name][judge] for name in names]
        means = [entry["mean"] for entry in entries]
        errors = [[e["mean"] - e["low"] for e in entries], [e["high"] - e["mean"] for e in entries]]
        axis.errorbar(means, range(len(names)), xerr=errors, fmt="o", color="tab:blue", capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_title(f"{judge} score, 95% interval")
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path.name


def training_rows(metrics: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl that PPO wrote; other stages' lines have no score and no KL."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if CURVES.keys() <= row.keys()]


def plot_training(rows: Sequence[dict[str, float]], path: Path) -> str:
    """Score, KL and length over the updates of a PPO run."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(10, 2.8))
    for axis, (key, title) in zip(axes, CURVES.items(), strict=True):
        axis.plot([row["step"] for row in rows], [row[key] for row in rows], color="tab:blue")
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path.name


def _markdown(
    report: dict[str, Any], scored: Sequence[Scored], plots: Sequence[str], num_samples: int
) -> str:
    header = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS) + "\n"
    table = header + "".join(
        "| " + " | ".join([_escaped(name), *cells]) + " |\n" for name, *cells in table_rows(report)
    )
    images = "\n".join(f"![{name}]({name})" for name in plots)
    note = f"\n{SIMULATED}\n" if report["preferences_simulated"] else ""
    return (
        f"# {_escaped(report['name'])}\n\n**{_escaped(report['verdict'])}**\n{note}\n"
        f"{report['num_prompts']} unseen prompts, one response each; the same decoding, length limit and "
        "random numbers for all. Intervals are 95% (bootstrap over prompts). KL is to "
        f"`{report['reference']}`, a bound for best-of-n. Wins are against `{report['baseline']}`.\n\n"
        f"{table}\n{images}\n\n"
        f"## Samples\n\n{_samples(scored, num_samples)}"
        "\n## How to reproduce\n\nIn an empty `runs=` folder:\n\n"
        + "".join(f"    {command}\n" for command in report["commands"])
        + "\n"
        + "".join(f"- {name} {version}\n" for name, version in report["versions"].items())
    )


def _samples(scored: Sequence[Scored], num_samples: int) -> str:
    blocks = []
    for i in range(min(num_samples, len(scored[0].generations))):
        prompt = scored[0].generations[i].prompt
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        lines = [f"**{_escaped(text)}** ...\n\n| system | response | gold | proxy |\n|---|---|---|---|\n"]
        for each in scored:
            numbers = " | ".join(f"{scores[i]:.2f}" if scores else "-" for scores in (each.gold, each.proxy))
            lines.append(
                f"| {_escaped(each.system.name)} | {_escaped(each.generations[i].response)} | {numbers} |\n"
            )
        blocks.append("".join(lines))
    return "\n".join(blocks)


def _escaped(text: str) -> str:
    """Model text that cannot become markup: no HTML, table cells, links or line breaks of its own."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\`*_[]|!#~$":
        text = text.replace(mark, "\\" + mark)
    for mark, entity in (("://", "&#58;//"), ("www.", "www&#46;"), ("@", "&#64;")):  # bare links
        text = text.replace(mark, entity)
    return " ".join(text.split())


def _interval(entry: dict[str, float] | None) -> str:
    return "-" if entry is None else f"{entry['mean']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
