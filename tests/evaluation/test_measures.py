"""Repetition, diversity, endings and the KL of best-of-n, by hand and by golden numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.evaluation.measures import best_of_n_kl, distinct_n, rep_n, seq_rep

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


@pytest.mark.parametrize("n", ["2", "4", "16", "64"])
def test_best_of_n_kl_golden(n: str) -> None:
    assert best_of_n_kl(int(n)) == pytest.approx(BEST_OF_N_KL[n], abs=1e-6)


def test_best_of_one_is_the_policy_itself() -> None:
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(1000) == pytest.approx(math.log(1000) - 0.999)


def test_best_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="best_of is 0, but must be 1 or more"):
        best_of_n_kl(0)
