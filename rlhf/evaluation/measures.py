"""Measures of generated sequences that need no model: repetition, diversity, KL of best-of-n, and what
numbers of a model at each token come to.

A sequence is the continuation alone, as token ids or words. P prompts with one sequence each, R positions.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rlhf.evaluation.statistics import Estimate, Floats, bootstrap_of_means

Tokens = Sequence[Hashable]
LEAST_ROWS = 10  # below which a mean over contexts of one length is not taken
LEAST_ERROR = 1e-6  # nats a token, below which a difference of two models is rounding


def rep_n(tokens: Tokens, n: int) -> float:
    """Return 1 - unique n-grams / n-grams of one sequence; 0 where it has no n-gram."""
    ngrams = _ngrams(tokens, n)
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def seq_rep(sequences: Sequence[Tokens], n: int) -> float:
    """Return seq-rep-n: the mean of `rep_n` over sequences. Welleck et al. (2020), https://arxiv.org/abs/1908.04319."""
    assert sequences, "no sequences to measure"
    return sum(rep_n(tokens, n) for tokens in sequences) / len(sequences)


def distinct_n(sequences: Sequence[Tokens], n: int, *, length: int | None = None) -> float:
    """Return unique n-grams / n-grams over all sequences together; 0 where they have none.

    It falls as text gets longer: compare systems with the same number of sequences, cut to the same `length`.
    Li et al. (2016), https://arxiv.org/abs/1510.03055.
    """
    ngrams = [ngram for tokens in sequences for ngram in _ngrams(tokens[:length], n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct_interval(
    sequences: Sequence[Tokens], n: int, *, length: int | None = None, level: float = 0.95
) -> Estimate:
    """Return `distinct_n` with the jackknife's normal interval, leaving out one sequence at a time.

    Resampling with replacement would draw sequences twice, whose n-grams are then not distinct: an interval
    of numbers that are all too low. For sets as large as this one; by its nature (Efron and Stein 1981) the
    jackknife is rather too wide than too narrow. Efron and Tibshirani 1993, chapter 11.
    """
    rows = [_ngrams(tokens[:length], n) for tokens in sequences]
    num_rows = Counter(ngram for row in rows for ngram in set(row))
    own = np.array([sum(num_rows[ngram] == 1 for ngram in set(row)) for row in rows])
    counts = np.array([len(row) for row in rows])
    without = (len(num_rows) - own) / np.maximum(counts.sum() - counts, 1)
    error = math.sqrt((len(rows) - 1) / len(rows) * float(((without - without.mean()) ** 2).sum()))
    found, half = distinct_n(sequences, n, length=length), NormalDist().inv_cdf((1 + level) / 2) * error
    return Estimate(found, max(0.0, found - half), min(1.0, found + half))


def repetition(
    sequences: Sequence[Tokens], *, num_bootstrap: int = 2000, seed: int = 0
) -> tuple[list[Estimate], Estimate]:
    """Return seq-rep-1 to seq-rep-4, and the diversity: the product of 1 - seq-rep-n over n = 2, 3, 4.

    Su et al. (2022), https://arxiv.org/abs/2202.06417, section 5.
    """

    def statistic(means: Floats) -> Floats:
        return np.concatenate([means, (1 - means[..., 1:]).prod(-1, keepdims=True)], axis=-1)

    rows = [[rep_n(tokens, n) for n in range(1, 5)] for tokens in sequences]
    *repeated, diversity = bootstrap_of_means(rows, statistic, num_bootstrap=num_bootstrap, seed=seed)
    return repeated, diversity


def perplexity(logprobs: Sequence[Sequence[float]], *, num_bootstrap: int = 2000, seed: int = 0) -> Estimate:
    """Return exp(-sum of all log-probs / number of tokens) of sequences' log-probs in nats, one a token."""
    rows = [(sum(row), len(row)) for row in logprobs]
    (found,) = bootstrap_of_means(
        rows, lambda means: np.exp(-means[..., :1] / means[..., 1:]), num_bootstrap=num_bootstrap, seed=seed
    )
    return found


@dataclass(frozen=True)
class ExcessError:
    """The excess accumulated error up to `length` tokens, in percent, and what it was made of.

    own, gold: the errors summed over the positions up to `length`, in nats: R_<=l, and l eps_<=l; rows: the
    fewer of the contexts of either kind at the last of these positions.
    """

    length: int
    excess: Estimate
    own: float
    gold: float
    rows: int


def excess_error(
    own: Sequence[Sequence[float]],
    gold: Sequence[Sequence[float]],
    *,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> list[ExcessError]:
    """Return the excess accumulated error at every length l: 100% (R_<=l - l eps_<=l) / (l eps_<=l).

    own[i][t], gold[i][t]: KL(oracle || policy) in nats after the prompt i and t tokens that the policy, or
    that people wrote. R_<=l sums its means over the own contexts at each t < l, l eps_<=l those over the gold
    ones; a row that is shorter than t does not count there. It ends where fewer than LEAST_ROWS rows of
    either kind are left, and begins where l eps_<=l is above l LEAST_ERROR: an oracle equal to the policy has
    none. Intervals resample prompts. Arora et al. (2022), https://arxiv.org/abs/2204.01171.
    """
    assert len(own) == len(gold), (len(own), len(gold))
    ends = [sorted(map(len, rows), reverse=True)[LEAST_ROWS - 1 : LEAST_ROWS] for rows in (own, gold)]
    horizon = min(end[0] if end else 0 for end in ends)
    if horizon == 0:
        return []
    columns = np.concatenate([part for rows in (own, gold) for part in _aligned(rows, horizon)], axis=1)

    def errors(means: Floats) -> tuple[Floats, Floats]:
        own_sum, own_count, gold_sum, gold_count = np.split(means, 4, axis=-1)
        return (own_sum / own_count).cumsum(-1), (gold_sum / gold_count).cumsum(-1)

    def excess(means: Floats) -> Floats:
        own_errors, gold_errors = (each[..., kept] for each in errors(means))
        return 100 * (own_errors / gold_errors - 1)

    sums = errors(columns.mean(axis=0))
    kept = (sums[1] > LEAST_ERROR * np.arange(1, horizon + 1)).nonzero()[0]
    if not len(kept):
        return []
    estimates = bootstrap_of_means(columns, excess, num_bootstrap=num_bootstrap, seed=seed)
    counts = columns.sum(axis=0).reshape(4, horizon)[1::2].min(axis=0)
    return [
        ExcessError(int(t) + 1, estimate, float(sums[0][t]), float(sums[1][t]), int(counts[t]))
        for t, estimate in zip(kept, estimates, strict=True)
    ]


def _aligned(rows: Sequence[Sequence[float]], horizon: int) -> tuple[Floats, Floats]:
    """Rows cut to (P, horizon), 0 behind their end, and 1 where they have a number, else 0."""
    values, there = np.zeros((len(rows), horizon)), np.zeros((len(rows), horizon))
    for index, row in enumerate(rows):
        values[index, : len(row)], there[index, : len(row)] = row[:horizon], 1.0
    return values, there


def best_of_n_kl(n: int) -> float:
    """Return ln n - (n - 1) / n, an upper bound in nats of the KL of best-of-n to the policy it samples from.

    Raise ValueError for n below 1. Stiennon et al. (2020), https://arxiv.org/abs/2009.01325, appendix G.3;
    a bound in general: Beirami et al. (2024), https://arxiv.org/abs/2401.01879.
    """
    if n < 1:
        raise ValueError(f"best_of is {n}, but must be 1 or more; 1 means one sample and no choice")
    return math.log(n) - (n - 1) / n


def _ngrams(tokens: Tokens, n: int) -> list[tuple[Hashable, ...]]:
    assert n >= 1, f"n is {n}"
    return [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
