"""What a report says, as rows of text and sentences: the same for the terminal, Markdown and the page."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.evaluation.overoptimization import preferred
from rlhf.processes import by_main

SIMULATED = (
    "The preferences behind this run are simulated: a classifier trained on labelled texts ranked the "
    "responses, and a second one, of another kind and trained on other texts, gives the gold score. "
    "No person judged them."
)
EXPOSURE = (
    "Excess error: how much farther the system is from the oracle after its own tokens than after gold ones. "
    "Log-prob (by the oracle, per token) and gold score of continuations: after gold prefixes, less those "
    "after own ones. docs/exposure.md has each measure and its source."
)
ENDS = {"mean": "inf", "low": "-inf", "high": "inf"}  # what is said of one that is not finite
# Marks that turn the direction of whatever text follows them.
TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
OVERLAPS = {"rouge_l": "ROUGE-L", "bleu": "BLEU"}
PREFERENCE_COLUMNS = (
    *("system", "strength", "wins / ties / losses", "win rate", "the same at equal length"),
    "prompts needed",
)
PREFERENCES = (
    "A system beats another with probability sigmoid(difference of strengths) (Bradley-Terry). With as many "
    "prompts as needed, a mean difference of the size seen is told from none in four of five evaluations."
)
OVEROPTIMIZATION = (
    "Gains are those over the baseline, d is the root of KL in nats per response. A run's gold "
    "is fitted by d (alpha - beta log d), best-of-n's by d (alpha - beta d) (Gao et al. 2022, "
    "https://arxiv.org/abs/2210.10760); > or <: the fit turns outside of the KL "
    "seen, if at all. What gold prefers was chosen on these prompts, which flatters it."
)
CURVE_COLUMNS = (
    *("curve", "KL seen", "alpha", "beta", "gold highest at KL", "gains there"),
    *("gold prefers", "its gain", "more than the last"),
)
COLUMNS = ("system", "gold", "proxy", "KL", "length", "ended", "rep-4", "distinct-2", "wins (gold)")


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
                "-" if entry["share_ended"] is None else f"{entry['share_ended']:.0%}",
                f"{entry['rep_4']:.3f}",
                f"{entry['distinct_2']:.2f}",
                "-" if rate is None else f"{rate['win_rate']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]",
            ]
        )
    return rows


def exposure_table(report: dict[str, Any]) -> list[list[str]]:
    """The table of exposure bias: its header, and a row a system, as text. A measure that no system has
    is left out.
    """
    exposures = {name: entry["exposure"] for name, entry in report["systems"].items()}
    prefix = max((each["length"] for e in exposures.values() for each in e["prefix_quality"]), default=None)
    length = report["excess_error_length"]
    after = "" if prefix is None else f" after {prefix} gold less own tokens"
    overlaps = list(dict.fromkeys(kind for entry in report["systems"].values() for kind in entry["overlap"]))
    columns = ["system", *(OVERLAPS[kind] for kind in overlaps)]
    columns += ["excess error, %" + ("" if length is None else f", to {length} tokens")]
    columns += [f"log-prob{after}", f"gold score{after}", "seq-rep-4", "distinct-2", "diversity"]
    rows = [[*columns, "perplexity", "MAUVE"]]
    for name, each in exposures.items():
        errors = {error["length"]: error["excess"] for error in each["excess_error"]}
        pairs: dict[str, Any] = {pair["length"]: pair for pair in each["prefix_quality"]}.get(prefix, {})
        own = report["systems"][name]["overlap"]
        cells = [
            *(own.get(kind) for kind in overlaps),
            errors.get(length),
            pairs.get("logprob"),
            pairs.get("score"),
            each["seq_rep"]["4"],
        ]
        cells += [each["distinct"]["2"], each["diversity"], each["perplexity"], each["mauve"]]
        rows.append([name, *map(_interval, cells)])
    shown = [any(cell != "-" for cell in column) for column in zip(*rows[1:], strict=True)]
    return [[cell for cell, keep in zip(row, shown, strict=True) if keep] for row in rows]


def exposure_in_words(report: dict[str, Any]) -> str:
    """What the measures of that table are; nothing where those that need words were not taken."""
    exposures = [entry["exposure"] for entry in report["systems"].values()]
    return EXPOSURE if any(each["excess_error"] or each["prefix_quality"] for each in exposures) else ""


def preference_table(report: dict[str, Any], judge: str) -> list[list[str]]:
    """Who beats whom by a judge: a header, and a row a system, the strongest first, as text."""
    rates = {each["a"]: each for each in report["win_rates"] if each["judge"] == judge}
    needed = {each["a"]: each["prompts_needed"] for each in report["differences"] if each["judge"] == judge}
    strengths = report["strengths"].get(judge, {})
    order = sorted(report["systems"], key=lambda name: -strengths.get(name, {"mean": 0.0})["mean"])
    rows = [list(PREFERENCE_COLUMNS)]
    for name in order:
        rate = rates.get(name)
        counts = "-" if rate is None else " / ".join(f"{rate[key]:g}" for key in ("wins", "ties", "losses"))
        cells = [] if rate is None else [rate | {"mean": rate["win_rate"]}, rate["length_controlled"]]
        plain, even = map(_interval, cells or [None, None])
        prompts = needed.get(name)
        rows.append(
            [
                name,
                _interval(strengths.get(name)),
                counts,
                plain,
                even,
                "-" if prompts is None else f"{prompts:.0f}",
            ]
        )
    return rows


def curves_table(report: dict[str, Any]) -> list[list[str]]:
    """The curves of over-optimisation: a header, and a row a curve, as text."""
    rows = [list(CURVE_COLUMNS)]
    for name, curve in report["overoptimization"].items():
        fit = curve["fit"] or dict.fromkeys(("alpha", "beta", "highest_kl", "highest_gain"))
        kls = [point["kl"] for point in curve["points"] if point["kl"] is not None]
        best = preferred(curve) or dict.fromkeys(("system", "gold", "gold_less_last"))
        highest = [_interval(fit["highest_kl"]), _interval(fit["highest_gain"])]
        place = fit["highest_kl"] and fit["highest_kl"]["mean"]
        if curve["fit"] and not min(kls) <= (math.inf if place is None else place) <= max(kls):
            highest = [
                f"< {min(kls):.2f}" if place is not None and place < min(kls) else f"> {max(kls):.2f}",
                "-",
            ]
        cells = [_interval(fit["alpha"]), _interval(fit["beta"]), *highest, best["system"] or "-"]
        seen = f"{min(kls):.2f} to {max(kls):.2f}" if kls else "-"
        rows.append([name, seen, *cells, _interval(best["gold"]), _interval(best["gold_less_last"])])
    return rows


def signals_table(report: dict[str, Any]) -> list[list[str]]:
    """The signs of a hacked reward: a header, and a row a system, as text."""
    keys = next(iter(report["signals"].values()))
    rows = [["system", *(key.replace("_", " ") for key in keys)]]
    for name, own in report["signals"].items():
        rows.append([name, *("-" if value is None else f"{value:.2f}" for value in own.values())])
    return rows


def notes_in_words(report: dict[str, Any]) -> list[str]:
    """What a reader of the tables must know besides."""
    gates = [
        f"gate {gate['gate']}: {'passed' if gate['passed'] else 'NOT PASSED'}: {gate['found']}"
        for gate in report["gates"]
    ]
    judge = [judge_in_words(report["judge"])] if report["judge"] else []
    return [*gates, *judge, *report["notes"], *(f"failed check: {line}" for line in report["failed_checks"])]


def prompts_in_words(report: dict[str, Any]) -> str:
    """How many prompts there are, and whether they were trained on."""
    number, seen = f"{report['num_prompts']:.0f}", report["seen_prompts"]
    known = report["overlap"] and all(each["shared"] is not None for each in report["overlap"])
    none = "unseen prompts" if known else "prompts"
    return f"{number} prompts, {seen} of them trained on" if seen else f"{number} {none}"


def bands_in_words(report: dict[str, Any]) -> str:
    """What the brackets of the tables are."""
    if len(report.get("seeds", ())) > 1:
        return "Means over the seeds; in brackets the lowest and the highest seed."
    return "Intervals are 95% (bootstrap over prompts)."


def kl_in_words(report: dict[str, Any]) -> str:
    """What KL is measured to; nothing where it is not."""
    return f"KL is to {report['reference']}, a bound for best-of-n." if report["reference"] else ""


def judge_in_words(judge: dict[str, Any]) -> str:
    """How far the judge can be trusted."""
    if judge["consistency"] is None:
        return (
            f"judge {judge['model']}: no pair with two answers that could be read; "
            f"{judge['unreadable_answers']} answers without a verdict"
        )
    return (
        f"judge {judge['model']}: {judge['consistency']:.0%} of {judge['pairs']} pairs told alike in both "
        f"orders, others are ties; {judge['unreadable_answers']} answers without a verdict, their pairs left "
        f"out; {judge['first_preferred'] or 0:.0%} of the verdicts for the response that stood first; "
        f"cost {judge['cost']:.2f}"
    )


def printable(text: str, keep: str = "") -> str:
    """Text without control characters, but for those to keep, and without marks that turn it."""
    text = "".join(" " if unicodedata.category(mark) == "Cc" and mark not in keep else mark for mark in text)
    return "".join(mark for mark in text if unicodedata.bidirectional(mark) not in TURNS)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print a header and rows to the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


@by_main
def _interval(entry: Mapping[str, float | None] | None) -> str:
    if entry is None:
        return "-"
    mean, low, high = (
        open_end if entry[key] is None else f"{entry[key]:.2f}" for key, open_end in ENDS.items()
    )
    return f"{mean} [{low}, {high}]"
