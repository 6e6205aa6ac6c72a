"""The plots of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CURVES = {
    "score": "reward's score",
    "kl": "KL to the start, nats per response",
    "length": "response length, tokens",
}


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
    return _saved(figure, path)


def plot_training(rows: Sequence[dict[str, float]], path: Path) -> str:
    """Score, KL and length over the updates of a PPO run."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(10, 2.8))
    for axis, (key, title) in zip(axes, CURVES.items(), strict=True):
        axis.plot([row["step"] for row in rows], [row[key] for row in rows], color="tab:blue")
        axis.set_title(title)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    return _saved(figure, path)


def plot_excess_error(report: dict[str, Any], path: Path) -> str:
    """Excess accumulated error of every system over the length, with its bands."""
    figure, axis = _pyplot().subplots(figsize=(6, 3.6))
    for name, entry in report["systems"].items():
        errors = entry["exposure"]["excess_error"]
        if errors:
            lengths, excess = [each["length"] for each in errors], [each["excess"] for each in errors]
            (line,) = axis.plot(lengths, [each["mean"] for each in excess], label=name)
            ends = ([each[end] for each in excess] for end in ("low", "high"))
            axis.fill_between(lengths, *ends, color=line.get_color(), alpha=0.15)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlabel("length, tokens")
    axis.set_title(f"excess accumulated error, %, {_bands(report)}")
    axis.legend()
    axis.grid(alpha=0.3)
    return _saved(figure, path)


def plot_diversity(report: dict[str, Any], path: Path) -> str:
    """The gold score of every system, else the proxy's, against its diversity, with 95% intervals."""
    figure, axis = _pyplot().subplots(figsize=(6, 3.6))
    judge = "gold" if all(entry["gold"] for entry in report["systems"].values()) else "proxy"
    for name, entry in report["systems"].items():
        x, y = entry["exposure"]["diversity"], entry[judge]
        sides = [[[e["mean"] - e["low"]], [e["high"] - e["mean"]]] for e in (x, y)]
        axis.errorbar(x["mean"], y["mean"], xerr=sides[0], yerr=sides[1], fmt="o", capsize=3, label=name)
    axis.set_xlabel("diversity")
    axis.set_title(f"{judge} score against diversity, {_bands(report)}")
    axis.legend()
    axis.grid(alpha=0.3)
    return _saved(figure, path)


def _bands(report: dict[str, Any]) -> str:
    """What the intervals of a report are."""
    return "lowest and highest seed" if len(report.get("seeds", ())) > 1 else "95% interval"


def _saved(figure: Any, path: Path) -> str:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
    return path.name


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
