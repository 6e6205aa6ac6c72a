"""Measures of generated sequences that need no model: repetition, diversity, KL of best-of-n.

A sequence is the continuation alone, as token ids or words.
"""

import math
from collections.abc import Hashable, Sequence

Tokens = Sequence[Hashable]


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
