"""Estimates with their uncertainty, deterministic by seed.

Scores are (P,) with one sample per prompt or (P, S) with S samples per prompt. Bootstraps resample prompts,
with all samples of a prompt together, because samples of one prompt are not independent. Intervals are
percentile intervals (Efron and Tibshirani 1993, chapter 13). Letters: P prompts, S samples per prompt.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

# resamples x prompts held at a time, so that memory does not grow with either
BLOCK_ELEMENTS = 1 << 22

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with the ends of its interval."""

    mean: float
    low: float
    high: float


def as_json(estimate: Estimate) -> dict[str, float | None]:
    """An estimate for a report; None for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in vars(estimate).items()}


@dataclass(frozen=True)
class WinRate:
    """Counts of comparisons, win_rate = (wins + ties / 2) / n, and the ends of its interval."""

    wins: int
    ties: int
    losses: int
    win_rate: float
    low: float
    high: float


def bootstrap_mean(
    scores: ArrayLike, *, num_bootstrap: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Return the mean of scores (P,) or (P, S) with its bootstrap interval, resampling prompts."""
    array = _scores(scores)
    means = np.concatenate(list(_resampled_means(array.mean(axis=1), num_bootstrap, seed)))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(array.mean()), float(low), float(high))


def bootstrap_of_means(
    rows: ArrayLike,
    statistic: Callable[[Floats], Floats],
    *,
    num_bootstrap: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Estimate]:
    """Return statistic(mean of the rows) with bootstrap intervals, resampling the rows (P, K), one a prompt.

    `statistic` takes means (..., K) to numbers (..., M): a ratio of means, say. Resamples in which one has no
    value (0 / 0) do not count.
    """
    array: Floats = np.asarray(rows, dtype=np.float64)
    assert array.ndim == 2 and array.size > 0 and np.isfinite(array).all(), array.shape
    num_prompts, rng = len(array), np.random.default_rng(seed)
    block, shares = max(1, BLOCK_ELEMENTS // max(array.shape)), np.full(num_prompts, 1 / num_prompts)
    found = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, num_bootstrap, block):
            counts = rng.multinomial(num_prompts, shares, size=min(block, num_bootstrap - start))
            # not by a matrix product, whose rounding may follow the number of threads
            found.append(statistic(np.einsum("bp,pk->bk", counts / num_prompts, array)))
        means = statistic(array.mean(axis=0))
        ends = np.nanquantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2], axis=0)
    # where all rows are alike, the resamples' means differ from theirs by rounding alone
    ends = np.stack([np.minimum(ends[0], means), np.maximum(ends[1], means)])
    return [Estimate(*map(float, numbers)) for numbers in zip(means, *ends, strict=True)]


def paired_difference(
    scores_a: ArrayLike, scores_b: ArrayLike, *, num_bootstrap: int = 2000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """Return the mean of a - b with its bootstrap interval; row i of both belongs to the same prompt."""
    a, b = _paired(scores_a, scores_b)
    return bootstrap_mean(a - b, num_bootstrap=num_bootstrap, seed=seed, level=level)


def win_rate(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    *,
    tie_margin: float = 0.0,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> WinRate:
    """Return how often a beats b on the same prompt, with the 95% bootstrap interval clustered by prompt.

    Scores that differ by at most `tie_margin` tie. Where a wins, or loses, every comparison the interval is
    Wilson's over prompts: a bootstrap's would have no width.
    """
    a, b = _paired(scores_a, scores_b)
    wins, losses = a - b > tie_margin, b - a > tie_margin
    rate = bootstrap_mean((1.0 + wins - losses) / 2, num_bootstrap=num_bootstrap, seed=seed)
    num_wins, num_losses = int(wins.sum()), int(losses.sum())
    low, high = rate.low, rate.high
    if a.size in (num_wins, num_losses):
        low, high = wilson_interval(len(a) * rate.mean, len(a))
    return WinRate(num_wins, a.size - num_wins - num_losses, num_losses, rate.mean, low, high)


def wilson_interval(successes: float, total: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's (1927) score interval of a proportion; it stays within [0, 1] and has width at 0 and 1.

    (p + z^2/2n +- z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)
    """
    assert total > 0 and 0 <= successes <= total, (successes, total)
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / total
    centre = share + z**2 / (2 * total)
    half = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    scale = 1 + z**2 / total
    low = 0.0 if successes == 0 else max(0.0, (centre - half) / scale)
    return low, 1.0 if successes == total else min(1.0, (centre + half) / scale)


def pearson(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return Pearson's correlation of x (n,) and y (n,), or None where one of them is constant."""
    a, b = (np.asarray(values, dtype=np.float64) for values in (x, y))
    assert a.shape == b.shape and a.ndim == 1 and a.size > 0, (a.shape, b.shape)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def _scores(scores: ArrayLike) -> Floats:
    """Return finite scores as (P, S)."""
    array: Floats = np.asarray(scores, dtype=np.float64)
    assert array.ndim in (1, 2) and array.size > 0, array.shape
    assert np.isfinite(array).all(), "a score is not finite"
    return array.reshape(len(array), -1)


def _paired(scores_a: ArrayLike, scores_b: ArrayLike) -> tuple[Floats, Floats]:
    a, b = _scores(scores_a), _scores(scores_b)
    assert a.shape == b.shape, (a.shape, b.shape)
    return a, b


def _resampled_means(prompt_means: Floats, num_bootstrap: int, seed: int) -> Iterator[NDArray[Any]]:
    """Yield means of prompts drawn with replacement, `num_bootstrap` of them in blocks."""
    assert num_bootstrap > 0, num_bootstrap
    rng = np.random.default_rng(seed)
    num_prompts = len(prompt_means)
    block = max(1, BLOCK_ELEMENTS // num_prompts)
    for start in range(0, num_bootstrap, block):
        size = (min(block, num_bootstrap - start), num_prompts)
        yield prompt_means[rng.integers(num_prompts, size=size)].mean(axis=1)
