"""From samples and scores to the numbers of the report, each with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.evaluation.measures import best_of_n_kl, distinct_n, seq_rep
from rlhf.evaluation.statistics import bootstrap_mean, paired_difference, pearson, win_rate
from rlhf.evaluation.systems import Generation, System

DISTINCT_LENGTH = 16


@dataclass(frozen=True)
class Scored:
    """A system's generations, their scores and, under the reference's tokenizer, their log-ratios."""

    system: System
    generations: list[Generation]
    proxy: list[float] | None
    gold: list[float] | None
    log_ratios: list[float] | None


def summarise(scored: Scored, *, reference: str, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """The report's entry of one system; `reference` is the path of the policy that KL is measured to."""
    options = {"num_bootstrap": num_bootstrap, "seed": seed}
    generations = scored.generations
    tokens = [g.tokens for g in generations]
    lengths = [len(row) for row in tokens]
    entry: dict[str, Any] = {
        "path": scored.system.path,
        "best_of": scored.system.best_of,
        "proxy": _estimate(scored.proxy, **options),
        "gold": _estimate(scored.gold, **options),
        "length": sum(lengths) / len(lengths),
        "share_ended": sum(g.ended for g in generations) / len(generations),
        "rep_4": seq_rep(tokens, 4),
        "distinct_2": distinct_n(tokens, 2, length=DISTINCT_LENGTH),
        "gold_length_correlation": None if scored.gold is None else pearson(scored.gold, lengths),
    }
    return entry | _kl(scored, reference, **options)


def _kl(scored: Scored, reference: str, **options: int) -> dict[str, Any]:
    """KL to the reference in nats per response: mean log-ratio of own samples, or best-of-n's bound.

    The bound is that of choosing among samples of the reference; of another policy's best-of-n it is not
    known.
    """
    is_best_of_n = scored.system.best_of > 1
    if is_best_of_n and scored.system.path == reference and not scored.system.decoding.changes_distribution:
        return {
            "kl": best_of_n_kl(scored.system.best_of),
            "kl_low": None,
            "kl_high": None,
            "kl_is_bound": True,
        }
    if is_best_of_n or scored.log_ratios is None:
        return {"kl": None, "kl_low": None, "kl_high": None, "kl_is_bound": False}
    estimate = bootstrap_mean(scored.log_ratios, **options)
    return {"kl": estimate.mean, "kl_low": estimate.low, "kl_high": estimate.high, "kl_is_bound": False}


def _estimate(scores: Sequence[float] | None, **options: int) -> dict[str, float] | None:
    return None if scores is None else vars(bootstrap_mean(scores, **options))


def compare(all_scored: Sequence[Scored], baseline: str, *, num_bootstrap: int, seed: int) -> dict[str, Any]:
    """Win rates and paired differences of every system against the baseline, by each judge."""
    base = next(each for each in all_scored if each.system.name == baseline)
    rates, differences = [], []
    for judge in ("gold", "proxy"):
        theirs = getattr(base, judge)
        if theirs is None:
            continue
        for scored in all_scored:
            if scored is base:
                continue
            ours = getattr(scored, judge)
            names = {"a": scored.system.name, "b": baseline, "judge": judge}
            rate = win_rate(ours, theirs, num_bootstrap=num_bootstrap, seed=seed)
            rates.append(names | vars(rate))
            differences.append(
                names | vars(paired_difference(ours, theirs, num_bootstrap=num_bootstrap, seed=seed))
            )
    return {"win_rates": rates, "differences": differences}


def verdict(report: dict[str, Any]) -> str:
    """One sentence: is ppo, else the last system, better than the baseline by gold, and at what KL."""
    systems, baseline = report["systems"], report["baseline"]
    others = [name for name in systems if name != baseline]
    if not others:
        return f"{baseline} alone: there is no other system to compare it with."
    name = "ppo" if "ppo" in others else others[-1]
    found = [d for d in report["differences"] if d["a"] == name and d["judge"] == "gold"]
    if not found:
        return f"No gold scorer: whether {name} is better than {baseline} is not known."
    difference, entry = found[0], systems[name]
    interval = f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"
    kl = "" if entry["kl"] is None else f" at a KL of {entry['kl']:.2f} nats per response"
    if difference["low"] > 0:
        return f"{name} is better than {baseline} by the gold scorer: {interval}{kl}."
    if difference["high"] < 0:
        return f"{name} is WORSE than {baseline} by the gold scorer: {interval}{kl}."
    return f"{name} cannot be told from {baseline} by the gold scorer: {interval}{kl}."
