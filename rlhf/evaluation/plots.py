"""The plots of the report."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.evaluation.overoptimization import predicted

FOREGROUND = "#101112"  # of text and lines; a colour of the page in its place on a page
MOST_INSIDE = 10  # names of a legend that leave room for what is drawn
CURVES = {
    "score": "reward's score",
    "kl": "KL to the start, nats per response",
    "length": "response length, tokens",
}


def common_scorer(report: dict[str, Any]) -> str | None:
    """gold, else proxy, where it scored all systems."""
    entries = report["systems"].values()
    return next((judge for judge in ("gold", "proxy") if all(entry[judge] for entry in entries)), None)


def plot_scores(report: dict[str, Any]) -> Any:
    """Gold and proxy of every system with 95% intervals."""
    pyplot = _pyplot()
    judges = [j for j in ("gold", "proxy") if all(e[j] is not None for e in report["systems"].values())]
    figure, axes = pyplot.subplots(
        1,
        max(len(judges), 1),
        figsize=(4.5 * max(len(judges), 1), max(3.2, 0.25 * len(report["systems"]))),
        squeeze=False,
    )
    names = list(report["systems"])
    for axis, judge in zip(axes[0], judges, strict=False):
        entries = [report["systems"][name][judge] for name in names]
        means = [entry["mean"] for entry in entries]
        errors = [[e["mean"] - e["low"] for e in entries], [e["high"] - e["mean"] for e in entries]]
        axis.errorbar(means, range(len(names)), xerr=errors, fmt="o", color="tab:blue", capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_title(f"{judge} score, {_bands(report)}")
        axis.grid(axis="x", alpha=0.3)
    return figure


def plot_training(rows: Sequence[dict[str, float]]) -> Any:
    """Score, KL and length over the updates of a PPO run."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(10, 2.8))
    for axis, (key, title) in zip(axes, CURVES.items(), strict=True):
        axis.plot([row["step"] for row in rows], [row[key] for row in rows], color="tab:blue")
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    return figure


def plot_excess_error(report: dict[str, Any]) -> Any:
    """Excess accumulated error of every system over the length, with its bands."""
    figure, axis = _pyplot().subplots(figsize=(5.6, 3.6))
    for name, entry in report["systems"].items():
        errors = entry["exposure"]["excess_error"]
        if errors:
            lengths, excess = [each["length"] for each in errors], [each["excess"] for each in errors]
            (line,) = axis.plot(lengths, [each["mean"] for each in excess], label=name)
            ends = ([each[end] for each in excess] for end in ("low", "high"))
            axis.fill_between(lengths, *ends, color=line.get_color(), alpha=0.15)
    axis.axhline(0, color=FOREGROUND, linewidth=0.8)
    axis.set_xlabel("length, tokens")
    axis.set_title(f"excess accumulated error, %, {_bands(report)}")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def plot_diversity(report: dict[str, Any]) -> Any:
    """The score of every system by the scorer of all, against its diversity, with 95% intervals."""
    figure, axis = _pyplot().subplots(figsize=(5.6, 3.6))
    judge = common_scorer(report)
    assert judge is not None
    for name, entry in report["systems"].items():
        x, y = entry["exposure"]["diversity"], entry[judge]
        sides = [[[e["mean"] - e["low"]], [e["high"] - e["mean"]]] for e in (x, y)]
        axis.errorbar(x["mean"], y["mean"], xerr=sides[0], yerr=sides[1], fmt="o", capsize=3, label=name)
    axis.set_xlabel("diversity")
    axis.set_title(f"{judge} score against diversity, {_bands(report)}", fontsize=10)
    if len(report["systems"]) > MOST_INSIDE:
        columns = 1 + len(report["systems"]) // 14
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=6, ncols=columns)
    else:
        axis.legend()
    axis.grid(alpha=0.3)
    return figure


def plot_win_rates(report: dict[str, Any], judge: str) -> Any:
    """The win rate of every system against the baseline by a judge, with 95% intervals."""
    rates = [each for each in report["win_rates"] if each["judge"] == judge]
    figure, axis = _pyplot().subplots(figsize=(5.6, 0.6 + 0.35 * len(rates)))
    means = [each["win_rate"] for each in rates]
    errors = [[r["win_rate"] - r["low"] for r in rates], [r["high"] - r["win_rate"] for r in rates]]
    axis.barh([each["a"] for each in rates], means, xerr=errors, color="tab:blue", alpha=0.7, capsize=3)
    axis.axvline(0.5, color=FOREGROUND, linewidth=0.8)
    axis.set_xlim(0, 1)
    axis.invert_yaxis()
    axis.set_title(f"win rate against {report['baseline']} by {judge}, {_bands(report)}")
    return figure


def plot_frontier(report: dict[str, Any]) -> Any:
    """Gold and proxy of every system against the root of its KL."""
    figure, axis = _pyplot().subplots(figsize=(5.6, 3.6))
    for judge, marker in (("gold", "o"), ("proxy", "x")):
        points = [
            (name, entry["kl"], entry[judge])
            for name, entry in report["systems"].items()
            if entry["kl"] is not None and entry[judge] is not None
        ]
        for number, (name, kl, score) in enumerate(points):
            x, ends = max(kl, 0.0) ** 0.5, (score["mean"] - score["low"], score["high"] - score["mean"])
            color = "tab:orange" if judge == "proxy" else "tab:blue"
            label = judge if number == 0 else None
            axis.errorbar(x, score["mean"], yerr=[[e] for e in ends], fmt=marker, color=color, label=label)
            if judge == "gold" or report["systems"][name]["gold"] is None:
                axis.annotate(name, (x, score["mean"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel("root of KL to the reference, nats per response")
    axis.set_title(f"score against KL, {_bands(report)}")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def plot_overoptimization(report: dict[str, Any]) -> Any:
    """What gold and proxy gain over the baseline along every curve, over the root of KL, with the fits."""
    figure, axis = _pyplot().subplots(figsize=(6.4, 4.2))
    for number, (name, curve) in enumerate(report["overoptimization"].items()):
        for judge, style in (("gold", "o"), ("proxy", "x")):
            points = [p for p in curve["points"] if p["kl"] is not None and p[judge] is not None]
            if not points:
                continue
            places = [max(point["kl"], 0.0) ** 0.5 for point in points]
            gains = [point[judge] for point in points]
            means = [gain["mean"] for gain in gains]
            sides = [[abs(gain["mean"] - gain[end]) for gain in gains] for end in ("low", "high")]
            look = {"color": f"C{number % 10}", "label": f"{name}: {judge}"}
            axis.errorbar(places, means, yerr=sides, fmt=style, capsize=2, markersize=5, **look)
            fit = curve["fit"] if judge == "gold" else None
            if fit is None or fit["alpha"]["mean"] is None:
                axis.plot(places, means, ":" if judge == "proxy" else "-", color=look["color"], linewidth=1)
            else:
                steps = [i / 50 * max(places) for i in range(51)]
                form = predicted(steps, fit["alpha"]["mean"], fit["beta"]["mean"], curve["form"])
                axis.plot(steps, form, color=look["color"], linewidth=1)
    axis.axhline(0, color=FOREGROUND, linewidth=0.8)
    axis.set_xlabel("root of KL to the reference, nats per response")
    axis.set_title(f"gain over {report['baseline']}, {_bands(report)}")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    return figure


def plot_lengths(lengths: Mapping[str, Sequence[int]]) -> Any:
    """How long the responses of every system are."""
    figure, axis = _pyplot().subplots(figsize=(5.6, 3.2))
    longest = max(max(each) for each in lengths.values())
    bins = [round(i * longest / 20, 3) for i in range(21)]
    for name, each in lengths.items():
        axis.hist(each, bins=bins, histtype="step", label=name)
    axis.set_xlabel("tokens of a response")
    axis.set_title("lengths")
    axis.legend(fontsize=8)
    return figure


def plot_curves(stage: str, rows: Sequence[Mapping[str, float]], keys: Sequence[str]) -> Any:
    """Some metrics of a stage over its steps, each where a row has it."""
    figure, axes = _pyplot().subplots(1, len(keys), figsize=(3.2 * len(keys), 2.6), squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axis.plot(*zip(*points, strict=True), color="tab:blue")
        axis.set_title(f"{stage}: {key}", fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return figure


def saved(figure: Any, path: Path) -> str:
    """Write a figure as PNG and close it; returns the file's name."""
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
    return path.name


def as_svg(figure: Any, name: str) -> str:
    """A figure as an <svg> element whose text and lines have the page's own colour, and close it.

    `name` keeps its ids apart from those of other figures on the page.
    """
    import matplotlib

    figure.tight_layout()
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)
    text = file.getvalue()
    return text[text.index("<svg") :].replace(FOREGROUND, "currentColor")


def _bands(report: dict[str, Any]) -> str:
    """What the intervals of a report are."""
    return "lowest and highest seed" if len(report.get("seeds", ())) > 1 else "95% interval"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
        matplotlib.rcParams[key] = FOREGROUND
    matplotlib.rcParams["legend.framealpha"] = 0.0
    return pyplot
