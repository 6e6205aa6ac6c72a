"""Repetition, diversity, excess error and the KL of best-of-n, by hand, by golden numbers and by laws."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.evaluation.measures import (
    LEAST_ROWS,
    best_of_n_kl,
    distinct_interval,
    distinct_n,
    excess_error,
    perplexity,
    rep_n,
    repetition,
    seq_rep,
)

# 8 tokens, 3 different; 7 pairs, 3 different (12 23 31); 6 triples, 3 different; 5 fours, 3 different
REPETITION: dict[str, Any] = {
    "tokens": [1, 2, 3, 1, 2, 3, 1, 2],
    "rep_n": {"1": 1 - 3 / 8, "2": 1 - 3 / 7, "3": 1 - 3 / 6, "4": 1 - 3 / 5},
}

# ln n - (n - 1) / n: .693147 - .5, 1.386294 - .75, 2.772589 - .9375, 4.158883 - .984375
BEST_OF_N_KL = {"2": 0.193147, "4": 0.636294, "16": 1.835089, "64": 3.174508}


@pytest.mark.parametrize("n", ["1", "2", "3", "4"])
def test_rep_n_golden(n: str) -> None:
    assert rep_n(REPETITION["tokens"], int(n)) == pytest.approx(REPETITION["rep_n"][n], abs=1e-6)


def test_the_golden_numbers_are_those_of_the_file(shared: Path) -> None:
    golden = json.loads((shared / "golden.json").read_text())
    assert golden["repetition"]["tokens"] == REPETITION["tokens"]
    assert golden["repetition"]["rep_n"] == pytest.approx(REPETITION["rep_n"], abs=1e-6)
    assert golden["best_of_n_kl"].items() >= BEST_OF_N_KL.items()


def test_words_are_measured_as_tokens_are() -> None:
    assert rep_n(["the", "end", "the", "end"], 2) == pytest.approx(1 / 3)


def test_a_sequence_without_an_ngram_repeats_nothing() -> None:
    assert rep_n([], 1) == 0.0 and rep_n([5, 5], 4) == 0.0


def test_seq_rep_is_the_mean_over_sequences_not_over_ngrams() -> None:
    # one of two unigrams repeats; of ten, none: the mean of .5 and 0
    assert seq_rep([[1, 1], list(range(10))], 1) == 0.25


def test_distinct_n_counts_over_all_sequences_together() -> None:
    # pairs 12 23, 12 24: four, of which three differ
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 0.75
    assert distinct_n([[1], []], 2) == 0.0


def test_distinct_n_at_a_fixed_length_ignores_what_comes_after() -> None:
    assert distinct_n([[1, 2, 1, 1, 1], [3, 4]], 1, length=2) == 1.0
    assert distinct_n([[1, 2, 1, 1, 1], [3, 4]], 1) == pytest.approx(4 / 7)


def test_a_mean_of_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="no sequences"):
        seq_rep([], 4)


def likely_texts(rng: np.random.Generator, count: int) -> list[list[int]]:
    """Texts of 16 words whose frequencies fall as 1 / rank, a third of them stuck on their first word."""
    weights = 1 / np.arange(1, 301)
    words = rng.choice(300, (count, 16), p=weights / weights.sum())
    stuck = rng.random(count) < 1 / 3
    words[stuck, 8:] = words[stuck, :1]
    return words.tolist()


def test_distinct_n_is_covered_by_its_interval_and_not_by_resampled_sets() -> None:
    """The truth is the mean of distinct-2 over many sets of as many texts."""
    rng, count = np.random.default_rng(0), 60
    sets = [likely_texts(rng, count) for _ in range(400)]
    truth = float(np.mean([distinct_n(each, 2) for each in sets]))
    found = [distinct_interval(each, 2) for each in sets]
    covered = np.mean([each.low <= truth <= each.high for each in found])
    assert 0.93 <= covered <= 0.985, covered

    def resampled(texts: list[list[int]]) -> tuple[float, float]:
        draws = rng.integers(count, size=(100, count))
        values = [distinct_n([texts[i] for i in draw], 2) for draw in draws]
        return tuple(np.quantile(values, [0.025, 0.975]))

    intervals = [resampled(each) for each in sets[:20]]
    assert sum(low <= truth <= high for low, high in intervals) == 0, "a text drawn twice is not distinct"


def test_the_jackknife_by_hand() -> None:
    # bigrams 12 23, 12 24, 56: 4 of 5 differ. Without each: 3 of 3 (12 24 56), 3 of 3, 3 of 4.
    # mean 11/12, squares 2/144 + 4/144; error sqrt(2/3 * 6/144) = 1/6
    found = distinct_interval([[1, 2, 3], [1, 2, 4], [5, 6]], 2)
    assert found.mean == 0.8 and found.low == pytest.approx(0.8 - 1.959964 / 6) and found.high == 1.0
    assert vars(distinct_interval([[1, 1, 1]], 1)) == pytest.approx(
        {"mean": 1 / 3, "low": 1 / 3, "high": 1 / 3}
    )


def test_diversity_is_the_product_of_what_does_not_repeat() -> None:
    rows = [REPETITION["tokens"], list(range(8))]
    repeated, diversity = repetition(rows, num_bootstrap=100)
    expected = [seq_rep(rows, n) for n in range(1, 5)]
    assert [each.mean for each in repeated] == pytest.approx(expected)
    # halves of 1 - 3/7, 1 - 3/6, 1 - 3/5: 1 less these is 5/7, 3/4, 4/5
    assert diversity.mean == pytest.approx(5 / 7 * 3 / 4 * 4 / 5)
    assert diversity.low == pytest.approx(3 / 7 * 3 / 6 * 3 / 5) and diversity.high == 1.0


def test_perplexity_is_of_all_tokens_and_not_a_mean_over_texts() -> None:
    # three tokens of -1, one of -3: exp(6 / 4)
    assert perplexity([[-1.0, -1.0, -1.0], [-3.0]]).mean == pytest.approx(math.exp(1.5))
    uniform = perplexity([[-math.log(7)] * n for n in (1, 5, 9)])
    assert (uniform.mean, uniform.low, uniform.high) == pytest.approx((7, 7, 7))


def test_excess_error_by_hand() -> None:
    # own means 1, (2 + 4) / 2 = 3, 8; summed 1, 4, 12. Gold: 2, 4, 6. A fourth token has no own row.
    own = [[1.0, 2.0]] * 10 + [[1.0, 4.0, 8.0]] * 10
    found = excess_error(own, [[2.0] * 5] * 20, num_bootstrap=200)
    assert [each.length for each in found] == [1, 2, 3]
    assert [each.own for each in found] == [1, 4, 12] and [each.gold for each in found] == [2, 4, 6]
    assert [each.excess.mean for each in found] == pytest.approx([-50, 0, 100])
    assert [each.rows for each in found] == [20, 20, 10]
    assert found[0].excess.low == found[0].excess.high == pytest.approx(-50)
    assert found[1].excess.low < 0 < found[1].excess.high


def test_an_error_that_does_not_hang_on_the_context_has_no_excess() -> None:
    rng = np.random.default_rng(0)
    error = rng.random(30)
    lengths = rng.integers(5, 31, size=(2, 50))
    own, gold = ([error[:n].tolist() for n in each] for each in lengths)
    assert all(abs(each.excess.mean) < 1e-9 for each in excess_error(own, gold, num_bootstrap=50))


def test_an_error_that_grows_after_own_mistakes_has_the_excess_that_follows() -> None:
    """Gold contexts have no mistakes; an own token is one with probability .1, and all errors after the first
    are three times as large: at position t (from 0) the mean is 1 + 2 (1 - .9^t).
    """
    rng, rows, length = np.random.default_rng(1), 400, 20
    noise = rng.normal(0, 0.1, size=(2, rows, length))
    lost = (rng.random((rows, length)) < 0.1).cumsum(1) > 0
    own = np.where(np.pad(lost[:, :-1], ((0, 0), (1, 0))), 3.0, 1.0) + noise[0]
    found = excess_error(own.tolist(), (1 + noise[1]).tolist(), num_bootstrap=300)
    expected = np.cumsum(2 * (1 - 0.9 ** np.arange(length))) / np.arange(1, length + 1) * 100
    for each in found[1:]:
        assert each.excess.low > 0
        width = each.excess.high - each.excess.low
        assert abs(each.excess.mean - expected[each.length - 1]) < 0.75 * width
    means = [each.excess.mean for each in found]
    assert means == sorted(means), "mistakes accumulate"


def test_excess_error_needs_rows_and_an_oracle_of_another_mind() -> None:
    assert excess_error([], []) == []
    few = [[1.0]] * (LEAST_ROWS - 1)
    assert excess_error(few, few) == []
    same = [[0.0, 1e-8]] * LEAST_ROWS
    assert excess_error(same, same) == [], "0 / 0"
    late = [[0.0, 1.0]] * LEAST_ROWS
    assert [each.length for each in excess_error(late, late, num_bootstrap=10)] == [2]


@pytest.mark.parametrize("n", ["2", "4", "16", "64"])
def test_best_of_n_kl_golden(n: str) -> None:
    assert best_of_n_kl(int(n)) == pytest.approx(BEST_OF_N_KL[n], abs=1e-6)


def test_best_of_one_is_the_policy_itself() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(1000) == pytest.approx(math.log(1000) - 0.999)


def test_best_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="best_of is 0, but must be 1 or more"):
        best_of_n_kl(0)
