"""Models of who beats whom: strengths of several systems, and a win rate without the pull of length.

An outcome of a against b at a prompt is 1 (a win), .5 (a tie) or 0. P prompts, S systems.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from rlhf.evaluation.measures import LEAST_ROWS
from rlhf.evaluation.statistics import Estimate, Floats, bootstrap_of_means, wilson_interval

RIDGE = 1e-6  # on strengths: a system that never loses has a large one, not an endless one
LENGTH_RIDGE = 1e-3  # on the weight of length, for a judge that goes by length alone
STEPS = 60


def bradley_terry(outcomes: ArrayLike, *, num_bootstrap: int = 2000, seed: int = 0) -> list[Estimate]:
    """Return the strengths of S systems from outcomes (P, S, S), [p, i, j] being that of i against j, and the
    other way round 1 less it; the diagonal does not count, and nan is a pair that was not compared.

    P(i beats j) = sigmoid(strength_i - strength_j); they sum to 0. Ties are half a win for each; 95%
    intervals resample prompts. Where some systems won everything against the others there are no likeliest
    strengths: with one tie more for every pair they are finite, and give the order; their intervals are open.
    Bradley and Terry (1952), Biometrika 39:324.
    """
    array = np.asarray(outcomes, dtype=np.float64)
    assert array.ndim == 3 and array.shape[1] == array.shape[2] > 1, array.shape
    known = np.isfinite(array) & ~np.eye(array.shape[1], dtype=bool)
    rows = np.stack([np.where(known, array, 0.0), known], axis=1)

    def strengths(means: Floats) -> Floats:
        wins, games = np.moveaxis(means.reshape(*means.shape[:-1], *rows.shape[1:]), -3, 0)
        return fit_strengths(wins, games)

    wins, games = rows.mean(axis=0)
    if not _connected(wins):
        tied = fit_strengths(wins + 0.5 * (games > 0) / len(rows), games + (games > 0) / len(rows))
        return [Estimate(float(each), -math.inf, math.inf) for each in tied]
    return bootstrap_of_means(rows.reshape(len(rows), -1), strengths, num_bootstrap=num_bootstrap, seed=seed)


def _connected(wins: Floats) -> bool:
    """Whether every system (wins: (S, S)) has beaten, or tied with, one that has another, up to all of them:
    else no strengths are likeliest. Ford (1957), American Mathematical Monthly 64(8):28.
    """
    reached = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(len(wins)):
        reached = reached @ reached
    return bool(reached.all())


def fit_strengths(wins: Floats, games: Floats) -> Floats:
    """Strengths (..., S) of highest likelihood for wins (..., S, S) of row over column in so many games."""
    size = wins.shape[-1]
    found = np.zeros(wins.shape[:-1])
    identity = np.eye(size)
    for _ in range(STEPS):
        expected = _sigmoid(found[..., :, None] - found[..., None, :])
        gradient = (wins - games * expected).sum(axis=-1) - RIDGE * found
        weight = games * expected * (1 - expected)
        curvature = identity * weight.sum(axis=-1)[..., None] - weight + (RIDGE + 1e-12) * identity
        # strengths are free up to a common shift: the ones fix it at a sum of 0
        step = np.linalg.solve(curvature + 1 / size, gradient[..., None])[..., 0]
        largest = np.abs(step).max(axis=-1, keepdims=True)
        found = found + step / np.maximum(1.0, largest)
        if np.max(largest) < 1e-10:
            break
    return found - found.mean(axis=-1, keepdims=True)


def length_controlled_win_rate(
    outcomes: ArrayLike, lengths_a: ArrayLike, lengths_b: ArrayLike
) -> Estimate | None:
    """Return a's win rate over b if all their responses were of the same length, with its 95% interval; None
    where either has the longer response to fewer than ten prompts, those of one length counted: too few tell.

    outcomes, lengths_a, lengths_b: (P,). The logistic regression of outcomes on tanh(d / std(d)), d the
    difference of lengths, read at d = 0; the interval is the sandwich estimator's (White 1982), on the
    logit. Dubois et al. (2024), https://arxiv.org/abs/2404.04475, without their term for the prompt.
    """
    outcome, difference = np.asarray(outcomes, dtype=np.float64), np.subtract(lengths_a, lengths_b)
    assert outcome.ndim == 1 and outcome.shape == difference.shape and outcome.size > 0, outcome.shape
    if min((difference <= 0).sum(), (difference >= 0).sum()) < LEAST_ROWS:
        return None
    if np.ptp(outcome) == 0 and outcome[0] != 0.5:
        return Estimate(float(outcome[0]), *wilson_interval(float(outcome.sum()), len(outcome)))
    spread = float(np.std(difference))
    length = np.tanh(difference / spread) if spread else np.zeros_like(outcome)
    features = np.stack([np.ones_like(outcome), length], axis=1)
    ridge = np.diag([0.0, LENGTH_RIDGE])
    weights = np.zeros(2)
    for _ in range(STEPS):
        expected = _sigmoid(features @ weights)
        slopes = features * (outcome - expected)[:, None]
        curvature = (features * (expected * (1 - expected))[:, None]).T @ features / len(outcome) + ridge
        step = np.linalg.solve(curvature, slopes.mean(axis=0) - ridge @ weights)
        weights = weights + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    inverse = np.linalg.inv(curvature)
    variance = (inverse @ (slopes.T @ slopes / len(outcome)) @ inverse)[0, 0] / max(1, len(outcome) - 2)
    half = NormalDist().inv_cdf(0.975) * math.sqrt(variance)
    return Estimate(*(float(_sigmoid(weights[0] + each)) for each in (0.0, -half, half)))


def sample_size(differences: ArrayLike, *, power: float = 0.8, level: float = 0.95) -> int | None:
    """Return how many prompts it takes for a difference as seen, (P,), to be told from 0 in `power` of cases:
    ((z_level + z_power) std / mean)^2; None where the mean is 0 or one prompt is all there is.
    """
    array = np.asarray(differences, dtype=np.float64)
    if len(array) < 2 or array.mean() == 0:
        return None
    z = NormalDist().inv_cdf((1 + level) / 2) + NormalDist().inv_cdf(power)
    return max(2, math.ceil((z * array.std(ddof=1) / array.mean()) ** 2))


def _sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))
