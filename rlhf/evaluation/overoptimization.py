"""Over-optimisation: gold and proxy against the distance from where a policy began, for the checkpoints of a
run and for best-of-n, with the forms that Gao et al. 2022 (https://arxiv.org/abs/2210.10760) fit to them.

With d the root of KL in nats per response, gold gains d (alpha - beta d) by best-of-n and
d (alpha - beta log d) by reinforcement learning. P prompts, K points of a curve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlhf.evaluation.compare import Scored
from rlhf.evaluation.statistics import Floats, as_json, bootstrap_of_means, paired_difference
from rlhf.evaluation.systems import System

LEAST_POINTS = 3  # of a fit with two numbers
FORMS = {"best_of_n": "d (alpha - beta d)", "rl": "d (alpha - beta log d)"}


def curves(
    report: Mapping[str, Any], all_scored: Sequence[Scored], *, num_bootstrap: int, seed: int
) -> dict[str, Any]:
    """The curve of every family of systems, by its name: what each point gains over the baseline, and a fit
    to gold where the baseline samples the policy that KL is measured to, and there are points enough. Two
    numbers of samples make no curve of best-of-n.
    """
    options = {"num_bootstrap": num_bootstrap, "seed": seed}
    [base] = [each for each in all_scored if each.system.name == report["baseline"]]
    entries = report["systems"]
    names = dict.fromkeys(each.system.curve for each in all_scored if each.system.curve is not None)
    found = {}
    for name in names:
        members = [each for each in all_scored if each.system.curve == name]
        form = "best_of_n" if members[0].system.update is None else "rl"
        if form == "best_of_n" and len(members) < LEAST_POINTS:
            continue
        points = [_point(each, members[-1], base, entries[each.system.name], **options) for each in members]
        known = base.gold is not None and all(point["kl"] is not None for point in points)
        begins = _begins_at(members[0].system, base.system, report["reference"])
        fitted = fit(*_gains_and_kls(members, base, points), form, **options) if begins and known else None
        found[name] = {"form": form, "points": points, "fit": fitted}
    return found


def _begins_at(system: System, base: System, reference: str | None) -> bool:
    """Whether a curve begins at the baseline, with a KL of 0: it comes from the reference, whose plain
    samples are the baseline's.
    """
    if reference is None or system.origin is None:
        return False
    start, own, other = (Path(path).absolute() for path in (reference, base.path, system.origin))
    plain = base.best_of == 1 and not base.decoding.changes_distribution
    return start == own == other and plain and base.decoding == system.decoding


def _gains_and_kls(
    members: Sequence[Scored], base: Scored, points: Sequence[Mapping[str, Any]]
) -> tuple[Floats, Floats]:
    """Gold over the baseline, and KL, of all prompts and points: (P, K) each."""
    gains = np.array([np.subtract(each.by("gold") or [], base.gold or []) for each in members]).T
    if members[0].system.update is None:
        return gains, np.broadcast_to([point["kl"] for point in points], gains.shape)
    return gains, np.array([each.log_ratios for each in members]).T


def _point(
    scored: Scored, last: Scored, base: Scored, entry: Mapping[str, Any], **options: int
) -> dict[str, Any]:
    def less(judge: str, other: Scored) -> dict[str, float] | None:
        ours, theirs = scored.by(judge), other.by(judge)
        return None if ours is None or theirs is None else vars(paired_difference(ours, theirs, **options))

    system = scored.system
    return {
        "system": system.name,
        "update": system.update,
        "best_of": system.best_of,
        "kl": entry["kl"],
        "gold": less("gold", base),
        "proxy": less("proxy", base),
        "gold_less_last": less("gold", last),
        "proxy_less_last": less("proxy", last),
    }


def fit(
    gains: ArrayLike, kls: ArrayLike, form: str, *, num_bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any] | None:
    """Fit a form to the means of gains (P, K) at the means of KL (P, K) by least squares; None where fewer
    than three points are apart.

    Returns alpha and beta, the KL at which the form is highest, and what it gains there, each with its 95%
    interval (bootstrap over prompts; None for an end that is not finite, as where the form only rises), and
    the root mean square of what it leaves.
    """
    gains, kls = np.asarray(gains, dtype=np.float64), np.asarray(kls, dtype=np.float64)
    assert gains.shape == kls.shape and gains.ndim == 2, (gains.shape, kls.shape)
    if len({round(float(kl), 6) for kl in kls.mean(axis=0) if kl > 0}) < LEAST_POINTS:
        return None

    def statistic(means: Floats) -> Floats:
        gain, kl = np.split(means, 2, axis=-1)
        distance = np.sqrt(np.maximum(kl, 0.0))
        numbers = _least_squares(distance, gain, form)
        return np.stack([*numbers, *_highest(*numbers, form)], axis=-1)

    rows = np.concatenate([gains, kls], axis=1)
    estimates = bootstrap_of_means(rows, statistic, num_bootstrap=num_bootstrap, seed=seed)
    alpha, beta = estimates[0].mean, estimates[1].mean
    left = gains.mean(axis=0) - predicted(np.sqrt(np.maximum(kls.mean(axis=0), 0.0)), alpha, beta, form)
    names = ("alpha", "beta", "highest_kl", "highest_gain")
    found = {name: as_json(each) for name, each in zip(names, estimates, strict=True)}
    return {**found, "left": float(np.sqrt(np.mean(left**2)))}


def predicted(distance: ArrayLike, alpha: float, beta: float, form: str) -> Floats:
    """What a form gains at distances (K,)."""
    first, second = _features(np.asarray(distance, dtype=np.float64), form)
    return alpha * first + beta * second


def _features(distance: Floats, form: str) -> tuple[Floats, Floats]:
    if form == "best_of_n":
        return distance, -(distance**2)
    return distance, -distance * np.log(np.where(distance > 0, distance, 1.0))


def _least_squares(distance: Floats, gain: Floats, form: str) -> tuple[Floats, Floats]:
    """alpha and beta (...) for points (..., K); nan or infinite where the points do not tell them."""
    first, second = _features(distance, form)
    aa, ab, bb = ((x * y).sum(axis=-1) for x, y in ((first, first), (first, second), (second, second)))
    ay, by = (first * gain).sum(axis=-1), (second * gain).sum(axis=-1)
    scale = aa * bb - ab**2
    return (bb * ay - ab * by) / scale, (aa * by - ab * ay) / scale


def _highest(alpha: Floats, beta: Floats, form: str) -> tuple[Floats, Floats]:
    """The KL at which the form is highest, and its gain there; infinite where it rises in the end."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if form == "best_of_n":
            place = np.maximum(alpha, 0.0) / (2 * beta)
            gain = place * (alpha - beta * place)
        else:
            place = np.exp(alpha / beta - 1)
            gain = beta * place
        return np.where(beta > 0, place**2, np.inf), np.where(beta > 0, gain, np.inf)


def preferred(curve: Mapping[str, Any]) -> dict[str, Any] | None:
    """The point of a curve that gold likes best; None where it did not score."""
    points = [point for point in curve["points"] if point["gold"] is not None]
    return max(points, key=lambda point: point["gold"]["mean"], default=None)


def warnings(found: Mapping[str, Any]) -> dict[str, str]:
    """By its last system, what is to be said of a run that went on after gold had turned."""
    told = {}
    for curve in found.values():
        best, last = preferred(curve), curve["points"][-1]
        if best is None or best["gold_less_last"]["low"] <= 0 or best["proxy_less_last"] is None:
            continue
        if best["proxy_less_last"]["mean"] < 0:
            lost, won = best["gold_less_last"], best["proxy_less_last"]
            told[last["system"]] = (
                f"over-optimised: since {best['system']}, which is the better one, gold fell by "
                f"{lost['mean']:.2f} [{lost['low']:.2f}, {lost['high']:.2f}] while the proxy rose by "
                f"{-won['mean']:.2f}"
            )
    return told
