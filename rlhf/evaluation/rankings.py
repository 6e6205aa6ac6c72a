"""How good a reward model is on held-out ranked lists, beside two baselines that know no language model.

Pairs are all untied pairs of a prompt; intervals resample prompts, with all pairs of a prompt together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.checks import Check
from rlhf.evaluation.statistics import Estimate, pearson
from rlhf.records import RankedList

Floats = NDArray[np.float64]
NUM_BOOTSTRAP = 2000


@dataclass(frozen=True)
class Pair:
    """Two responses of one prompt: its index, the better and the worse text, and their places in the
    record.
    """

    prompt: int
    better: str
    worse: str
    better_index: int
    worse_index: int


def untied_pairs(records: Sequence[RankedList]) -> list[Pair]:
    """All pairs of responses of one prompt that differ in rank."""
    return [
        Pair(number, record.responses[i], record.responses[j], i, j)
        for number, record in enumerate(records)
        for i in range(len(record.responses))
        for j in range(len(record.responses))
        if record.ranks[i] < record.ranks[j]
    ]


def pair_accuracy(gaps: Floats, prompts: NDArray[np.int64], *, seed: int = 0) -> Estimate:
    """Share of gaps (M,) above 0, ties half, with a 95% interval from resampling the pairs' prompts (M,)."""
    correct = (gaps > 0) + 0.5 * (gaps == 0)
    num_prompts = int(prompts.max()) + 1
    sums = np.bincount(prompts, weights=correct, minlength=num_prompts)
    counts = np.bincount(prompts, minlength=num_prompts)
    draws = np.random.default_rng(seed).integers(num_prompts, size=(NUM_BOOTSTRAP, num_prompts))
    totals = counts[draws].sum(axis=1)
    rates = sums[draws].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(rates, [0.025, 0.975])
    mean = float(correct.mean())
    # All alike, resampling shows no spread: the rule of three (Hanley and Lippman-Hand 1983) bounds it.
    three = min(1.0, 3 / len(set(prompts.tolist())))
    low, high = (1 - three, 1.0) if mean == 1 else (0.0, three) if mean == 0 else (low, high)
    return Estimate(mean, float(low), float(high))


def length_gaps(pairs: Sequence[Pair]) -> Floats:
    """Length in characters of the better less that of the worse response: the "longer wins" baseline."""
    return np.array([len(pair.better) - len(pair.worse) for pair in pairs], dtype=np.float64)


def tfidf_gaps(train: Sequence[RankedList], held_out: Sequence[Pair], *, seed: int = 0) -> Floats:
    """Score gaps of a logistic regression on TF-IDF differences and length, trained on the training lists."""
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    pairs = untied_pairs(train)
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]"
    )
    try:
        vectorizer.fit([text for record in train for text in record.responses])
    except ValueError:  # no word stands twice: nothing to learn from
        return np.zeros(len(held_out))

    def features(some: Sequence[Pair]) -> Any:
        better, worse = (
            vectorizer.transform([p.better for p in some]),
            vectorizer.transform([p.worse for p in some]),
        )
        length = csr_matrix(
            np.log1p([[len(p.better)] for p in some]) - np.log1p([[len(p.worse)] for p in some])
        )
        return hstack([better - worse, length]).tocsr()

    differences = features(pairs)
    signs = np.where(np.random.default_rng(seed).random(len(pairs)) < 0.5, 1.0, -1.0)
    if len(set(signs)) < 2:
        signs[0] = -signs[0]
    flipped = differences.multiply(signs[:, None]).tocsr()
    model = LogisticRegression(C=1.0, max_iter=1000, fit_intercept=False).fit(flipped, signs)
    return np.asarray(model.decision_function(features(held_out)), dtype=np.float64)


def score_length_correlation(scores: Sequence[float], texts: Sequence[str]) -> float | None:
    """Pearson correlation of scores with lengths in characters."""
    return pearson(
        np.asarray(scores, dtype=np.float64), np.array([len(text) for text in texts], dtype=np.float64)
    )


def accuracy_by_gap(gaps: Floats, records: Sequence[RankedList], pairs: Sequence[Pair]) -> dict[str, float]:
    """Accuracy on pairs of a small, middle and large gap of the labels' scores (or ranks, without scores)."""
    distances = np.array([_label_distance(records[pair.prompt], pair) for pair in pairs])
    edges = np.quantile(distances, [1 / 3, 2 / 3])
    thirds = np.digitize(distances, edges)
    correct = (gaps > 0) + 0.5 * (gaps == 0)
    names = ("small", "middle", "large")
    return {name: float(correct[thirds == i].mean()) for i, name in enumerate(names) if (thirds == i).any()}


def ranking_checks(
    model: Estimate, longer: Estimate, tfidf: Estimate, invariance: float, tolerance: float
) -> list[Check]:
    """Whether the reward model beats chance and length, and whether its score depends on the response
    alone.
    """

    def shown(estimate: Estimate) -> str:
        return f"{estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"

    return [
        Check(
            "held-out accuracy above chance",
            model.low > 0.5,
            shown(model),
            "an interval that reaches .5: too few pairs, or nothing learned; give more data",
        ),
        Check(
            "better than 'longer wins'",
            model.mean > longer.mean,
            f"{model.mean:.3f} against {shown(longer)}",
            "a reward model no better than length will teach the policy length",
        ),
        Check(
            "score independent of padding and batch",
            invariance < tolerance,
            f"largest difference {invariance:.1e}, allowed {tolerance:.0e}",
            "the score must not change with what shares its batch",
        ),
        Check(
            "compared with TF-IDF",
            True,
            f"{model.mean:.3f} against {shown(tfidf)}",
            "for information: a bag of words trained on the same pairs",
        ),
    ]


def _label_distance(record: RankedList, pair: Pair) -> float:
    values: Sequence[float] = record.scores or [-float(rank) for rank in record.ranks]
    return values[pair.better_index] - values[pair.worse_index]
