"""From samples and scores to the numbers of the report, each with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlhf.evaluation.exposure import Evidence, PrefixQuality
from rlhf.evaluation.judge import Judgement
from rlhf.evaluation.measures import (
    LEAST_ROWS,
    best_of_n_kl,
    distinct_interval,
    distinct_n,
    excess_error,
    perplexity,
    repetition,
    seq_rep,
)
from rlhf.evaluation.preferences import bradley_terry, length_controlled_win_rate, sample_size
from rlhf.evaluation.statistics import Floats, as_json, bootstrap_mean, paired_difference, pearson, win_rate
from rlhf.evaluation.systems import Generation, System

DISTINCT_LENGTH = 16


@dataclass(frozen=True)
class Scored:
    """A system's generations, their scores and, under the reference's tokenizer, their log-ratios; what
    its exposure bias is measured from, where it was; their nearness to references, by measure, of the prompts
    that have one.
    """

    system: System
    generations: list[Generation]
    proxy: list[float] | None
    gold: list[float] | None
    log_ratios: list[float] | None
    evidence: Evidence | None = None
    overlap: dict[str, list[float]] = field(default_factory=dict)

    def by(self, judge: str) -> list[float] | None:
        """The scores by "gold", "proxy" or a measure against references."""
        return self.overlap.get(judge) if judge not in ("gold", "proxy") else getattr(self, judge)


def summarise(scored: Scored, *, reference: str | None, num_bootstrap: int, seed: int) -> dict[str, Any]:
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
        "overlap": {kind: _estimate(scores, **options) for kind, scores in scored.overlap.items()},
        "length": sum(lengths) / len(lengths),
        "share_ended": None if scored.system.is_saved else _mean([bool(g.ended) for g in generations]),
        "rep_4": seq_rep(tokens, 4),
        "distinct_2": distinct_n(tokens, 2, length=DISTINCT_LENGTH),
        "gold_length_correlation": None if scored.gold is None else pearson(scored.gold, lengths),
        "exposure": _exposure(tokens, scored.evidence, **options),
    }
    return entry | _kl(scored, reference, **options)


def _kl(scored: Scored, reference: str | None, **options: int) -> dict[str, Any]:
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


def _exposure(tokens: Sequence[list[int]], evidence: Evidence | None, **options: int) -> dict[str, Any]:
    """The measures of exposure bias; None, or an empty list, where there was nothing to take them from."""
    repeated, diversity = repetition(tokens, **options)
    found = evidence or Evidence(None, None, None, None, [])
    errors = excess_error(found.own_kl or [], found.gold_kl or [], **options)
    distinct = {n: distinct_interval(tokens, n, length=DISTINCT_LENGTH) for n in (1, 2, 3)}
    return {
        "seq_rep": {str(n): vars(each) for n, each in enumerate(repeated, start=1)},
        "distinct": {str(n): vars(each) for n, each in distinct.items()},
        "diversity": vars(diversity),
        "perplexity": None if found.logprobs is None else vars(perplexity(found.logprobs, **options)),
        "mauve": found.mauve and vars(found.mauve),
        "excess_error": [asdict(each) for each in errors],
        "prefix_quality": [_prefix_entry(each, **options) for each in found.prefixes],
    }


def _prefix_entry(quality: PrefixQuality, **options: int) -> dict[str, Any]:
    """Means after gold and after own tokens, and the first less the second with its interval."""
    entry: dict[str, Any] = {"length": quality.length}
    for name, pairs in (("logprob", quality.logprobs), ("score", quality.scores)):
        if pairs is not None:
            gold, own = zip(*pairs, strict=True)
            difference = paired_difference(gold, own, **options)
            means = {"rows": len(pairs), "gold": sum(gold) / len(pairs), "own": sum(own) / len(pairs)}
            entry[name] = means | vars(difference)
    return entry


def equals_oracle(scored: Scored, entry: dict[str, Any]) -> bool:
    """Whether a system has no excess error because its policy is its oracle: 0 / 0."""
    rows = [] if scored.evidence is None else scored.evidence.gold_kl or []
    return len(rows) >= LEAST_ROWS and not entry["exposure"]["excess_error"]


def common_length(entries: Sequence[dict[str, Any]]) -> int | None:
    """The largest length at which all systems that have an excess error have one; None where none has."""
    errors = [entry["exposure"]["excess_error"] for entry in entries]
    return min((each[-1]["length"] for each in errors if each), default=None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _estimate(scores: Sequence[float] | None, **options: int) -> dict[str, float] | None:
    return None if scores is None else vars(bootstrap_mean(scores, **options))


def compare(
    all_scored: Sequence[Scored],
    baseline: str,
    judgements: Mapping[str, Judgement] | None = None,
    /,
    *,
    num_bootstrap: int,
    seed: int,
) -> dict[str, Any]:
    """Win rates of every system against the baseline by gold, proxy and a judge (its judgements, by system),
    plain and length-controlled, the strengths of all systems by these, and paired differences by the scorers
    and by the measures against references, with the number of prompts that it takes to see one of that size.
    """
    base = next(each for each in all_scored if each.system.name == baseline)
    options = {"num_bootstrap": num_bootstrap, "seed": seed}
    rates, differences, strengths = [], [], {}
    for judge in ("gold", "proxy", *base.overlap):
        theirs = base.by(judge)
        for scored in all_scored:
            ours = scored.by(judge)
            if scored is base or ours is None or theirs is None:
                continue
            names = {"a": scored.system.name, "b": baseline, "judge": judge}
            needed = sample_size(np.subtract(ours, theirs))
            difference = vars(paired_difference(ours, theirs, **options))
            differences.append(names | difference | {"prompts_needed": needed})
            if judge not in base.overlap:
                rates.append(names | _rate(_outcomes(ours, theirs), scored, base, **options))
        judged = {each.system.name: each.by(judge) for each in all_scored}
        if judge not in base.overlap and len(judged) > 1 and None not in judged.values():
            scores = np.array(list(judged.values())).T
            strengths[judge] = _strengths(
                list(judged), _outcomes(scores[:, :, None], scores[:, None, :]), **options
            )
    by_name = {each.system.name: each for each in all_scored}
    told: dict[str, Floats] = {}
    for name, judgement in (judgements or {}).items():
        outcomes = np.array(judgement.outcomes, dtype=np.float64)  # None: nan
        if np.isfinite(outcomes).any():
            told[name] = outcomes
            names = {"a": name, "b": baseline, "judge": "judge"}
            rates.append(names | _rate(outcomes, by_name[name], base, **options))
    if told:
        strengths["judge"] = _strengths([baseline, *told], _against_first(list(told.values())), **options)
    return {"win_rates": rates, "differences": differences, "strengths": strengths}


def _rate(outcomes: Floats, ours: Scored, theirs: Scored, **options: int) -> dict[str, Any]:
    """Win rates of outcomes (P,), those that are nan left out, plain and length-controlled; in characters, as
    systems may have different tokens.
    """
    known = np.isfinite(outcomes).nonzero()[0]
    lengths = [[len(each.generations[i].response) for i in known] for each in (ours, theirs)]
    even = length_controlled_win_rate(outcomes[known], *lengths)
    rate = win_rate(outcomes[known], np.full(len(known), 0.5), **options)
    return vars(rate) | {"length_controlled": even and vars(even)}


def _strengths(names: Sequence[str], outcomes: Floats, **options: int) -> dict[str, Any]:
    found = bradley_terry(outcomes, **options)
    return {name: as_json(each) for name, each in zip(names, found, strict=True)}


def _against_first(told: Sequence[Floats]) -> Floats:
    """Outcomes (P, S, S) where all systems but the first were compared with the first alone."""
    found = np.full((len(told[0]), len(told) + 1, len(told) + 1), np.nan)
    for place, outcomes in enumerate(told, start=1):
        found[:, place, 0], found[:, 0, place] = outcomes, 1 - outcomes
    return found


def _outcomes(scores_a: ArrayLike, scores_b: ArrayLike) -> Floats:
    """1 where a has more than b, .5 where as much, else 0."""
    return (1 + np.sign(np.subtract(scores_a, scores_b))) / 2


def main_system(report: Mapping[str, Any]) -> str:
    """The system that a report is about: ppo, else the checkpoint that gold prefers, else the last one."""
    others = [name for name in report["systems"] if name != report["baseline"]]
    if "ppo" in others or not others:
        return "ppo" if others else report["baseline"]
    points = [point for point in _checkpoints(report) if point["gold"] and point["system"] in others]
    best = max(points, key=lambda point: point["gold"]["mean"], default={"system": others[-1]})
    return best["system"]


def _checkpoints(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The points of all runs on their curves."""
    points = [point for curve in report["overoptimization"].values() for point in curve["points"]]
    return [point for point in points if point["update"] is not None]


def verdict(report: dict[str, Any]) -> str:
    """One sentence: is the main system better than the baseline by gold, else by the judge, and at what KL;
    where there are both, what the judge says; and whether there are signs of a hacked reward.
    """
    systems, baseline, name = report["systems"], report["baseline"], main_system(report)
    if name == baseline:
        return f"{baseline} alone: there is no other system to compare it with."
    if report["num_prompts"] < LEAST_ROWS:
        number = f"{report['num_prompts']} prompt" + "s" * (report["num_prompts"] > 1)
        return f"{number}: too few to tell {name} from {baseline}."
    by_gold = [d for d in report["differences"] if d["a"] == name and d["judge"] == "gold"]
    by_judge = [r for r in report["win_rates"] if r["a"] == name and r["judge"] == "judge"]
    if not by_gold and not by_judge:
        return f"No gold scorer: whether {name} is better than {baseline} is not known."
    if not by_gold and sum(by_judge[0][key] for key in ("wins", "ties", "losses")) < LEAST_ROWS:
        return f"The judge gave too few verdicts to tell {name} from {baseline}."
    kl = systems[name]["kl"]
    at = "" if kl is None else f" at a KL of {kl:.2f} nats per response"
    told = f"win rate {_words(by_judge[0], 'win_rate', '.2f')}" if by_judge else ""
    found, by, even, seen = (by_judge or by_gold)[0], "by the judge", 0.5, told
    if by_gold:
        found, by, even, seen = by_gold[0], "by the gold scorer", 0.0, _words(by_gold[0], "mean", "+.2f")
    word = "cannot be told from"
    if found["low"] > even or found["high"] < even:
        word = "is better than" if found["low"] > even else "is WORSE than"
    judged = f" By the judge: {told}." if by_gold and by_judge else ""
    signs = len(report["warnings"].get(name, []))
    of_what = "a hacked reward" if report.get("proxy") else "degenerate text"
    hacked = f" Signs of {of_what}, which the report names: {signs}." if signs else ""
    chosen = name != "ppo" and any(point["system"] == name for point in _checkpoints(report))
    which = ", which gold prefers on these prompts," if by_gold and chosen else ""
    return f"{name}{which} {word} {baseline} {by}: {seen}{at}.{judged}{hacked}"


def _words(found: Mapping[str, float], mean: str, form: str) -> str:
    return f"{found[mean]:{form}} [{found['low']:{form}}, {found['high']:{form}}]"
