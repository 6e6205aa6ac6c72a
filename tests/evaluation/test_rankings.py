"""How rankings are judged: pairs, accuracy with its interval, and the two baselines."""

from pathlib import Path

import numpy as np
import pytest

from rlhf.evaluation.rankings import (
    Pair,
    accuracy_by_gap,
    length_gaps,
    pair_accuracy,
    ranking_checks,
    score_length_correlation,
    tfidf_gaps,
    untied_pairs,
)
from rlhf.evaluation.statistics import Estimate
from rlhf.records import RankedList, Source, find_overlap, read_records

LISTS = [
    RankedList("p", ("a", "bb", "ccc"), (2, 1, 2)),  # bb > a, bb > ccc; a and ccc tie
    RankedList("q", ("dddd", "e"), (1, 1)),  # no pair
    RankedList("r", ("f", "gg"), (2, 1)),  # gg > f
]


def test_pairs_are_all_responses_of_a_prompt_that_differ_in_rank() -> None:
    found = [(pair.prompt, pair.better, pair.worse) for pair in untied_pairs(LISTS)]
    assert found == [(0, "bb", "a"), (0, "bb", "ccc"), (2, "gg", "f")]
    for pair in untied_pairs(LISTS):
        assert LISTS[pair.prompt].responses[pair.better_index] == pair.better
        assert LISTS[pair.prompt].responses[pair.worse_index] == pair.worse


def test_accuracy_counts_ties_half() -> None:
    gaps, prompts = np.array([1.0, -1.0, 0.0, 2.0]), np.array([0, 0, 1, 2])
    found = pair_accuracy(gaps, prompts)
    assert found.mean == pytest.approx(2.5 / 4)  # (1 + 0 + 1/2 + 1) / 4
    assert found.low <= found.mean <= found.high


def test_reversed_gaps_give_the_complement() -> None:
    rng = np.random.default_rng(0)
    gaps, prompts = rng.normal(0.3, 1, 90), np.repeat(np.arange(30), 3)
    ours, theirs = pair_accuracy(gaps, prompts), pair_accuracy(-gaps, prompts)
    assert ours.mean == pytest.approx(1 - theirs.mean)
    assert ours.low == pytest.approx(1 - theirs.high, abs=1e-9)


def test_lists_of_different_lengths_are_weighed_by_their_pairs() -> None:
    """10 pairs of one prompt are right, and one each of three others wrong."""
    found = pair_accuracy(np.array([1.0] * 10 + [-1.0] * 3), np.array([0] * 10 + [1, 2, 3]))
    # one resample in 256 holds the long list never, another has 4 of it: the wide interval of four prompts
    assert found.mean == pytest.approx(10 / 13) and found.low == 0.0 and found.high > 0.95


@pytest.mark.parametrize("num_prompts", [1, 3, 6, 30])
def test_a_few_prompts_that_are_all_right_prove_little(num_prompts: int) -> None:
    """Rule of three: after n successes the 95% bound of the failure rate is 3 / n."""
    prompts = np.repeat(np.arange(num_prompts), 2)
    right, wrong = (pair_accuracy(sign * np.ones(len(prompts)), prompts) for sign in (1, -1))
    bound = min(1.0, 3 / num_prompts)
    assert (right.mean, right.low, right.high) == (1.0, pytest.approx(1 - bound), 1.0)
    assert (wrong.mean, wrong.low, wrong.high) == (0.0, 0.0, pytest.approx(bound))


def test_pairs_of_one_prompt_are_not_independent() -> None:
    """20 prompts, each with 10 pairs of one outcome: the interval is that of 20 draws, not of 200."""
    correct = np.repeat(np.array([1.0] * 12 + [-1.0] * 8), 10)
    clustered = pair_accuracy(correct, np.repeat(np.arange(20), 10))
    independent = pair_accuracy(correct, np.arange(200))
    # standard errors sqrt(.6 * .4 / 20) = .110 and sqrt(.6 * .4 / 200) = .035
    assert clustered.high - clustered.low == pytest.approx(2 * 1.96 * 0.110, rel=0.12)
    assert independent.high - independent.low == pytest.approx(2 * 1.96 * 0.0346, rel=0.12)


def test_longer_wins_reads_lengths_alone() -> None:
    assert length_gaps(untied_pairs(LISTS)).tolist() == [1, -1, 1]


def test_tfidf_learns_a_word_that_people_like_and_does_not_see_its_place() -> None:
    train = [
        RankedList(
            f"p{i}",
            (f"good {w}", f"bad {w}") if i % 2 else (f"bad {w}", f"good {w}"),
            (1, 2) if i % 2 else (2, 1),
        )
        for i, w in enumerate(["soup", "dog", "bed", "cat"] * 10)
    ]
    held_out = untied_pairs([RankedList("x", ("bad soup", "good soup"), (2, 1))])
    assert tfidf_gaps(train, held_out)[0] > 0
    (pair,) = held_out
    swapped = [Pair(0, pair.worse, pair.better, 0, 1)]
    assert tfidf_gaps(train, swapped)[0] == pytest.approx(-tfidf_gaps(train, held_out)[0])


def test_tfidf_without_a_common_word_says_nothing() -> None:
    train = [RankedList("p", ("one", "two"), (1, 2))]
    assert tfidf_gaps(train, untied_pairs(LISTS)).tolist() == [0, 0, 0]


def test_accuracy_by_gap_sorts_pairs_by_their_labels_distance() -> None:
    records = [
        RankedList("p", ("a", "b"), (1, 2), scores=(gap, 0.0)) for gap in (0.1, 0.2, 1.0, 1.1, 5.0, 6.0)
    ]
    gaps = np.array([-1.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    assert accuracy_by_gap(gaps, records, untied_pairs(records)) == {
        "small": 0.5,
        "middle": 0.75,
        "large": 1.0,
    }


def test_accuracy_by_gap_takes_ranks_where_there_are_no_scores() -> None:
    records = [RankedList("p", ("a", "b", "c"), (1, 2, 3))]
    gaps = np.array([1.0, 1.0, -1.0])  # a > b, a > c (distance 2), b > c wrong
    assert accuracy_by_gap(gaps, records, untied_pairs(records))["large"] == 1.0


def test_scores_that_are_lengths_correlate_with_length() -> None:
    assert score_length_correlation([1.0, 2.0, 3.0], ["a", "bb", "ccc"]) == pytest.approx(1.0)
    assert score_length_correlation([1.0, 1.0], ["a", "bb"]) is None


@pytest.mark.parametrize(
    ("model", "longer", "invariance", "failed"),
    [
        (Estimate(0.7, 0.6, 0.8), 0.5, 1e-6, []),
        (Estimate(0.6, 0.5, 0.7), 0.5, 1e-6, ["held-out accuracy above chance"]),
        (Estimate(0.7, 0.6, 0.8), 0.7, 1e-6, ["better than 'longer wins'"]),
        (Estimate(0.7, 0.6, 0.8), 0.5, 1e-3, ["score independent of padding and batch"]),
    ],
)
def test_checks_fail_for_their_own_reason(
    model: Estimate, longer: float, invariance: float, failed: list[str]
) -> None:
    tfidf = Estimate(0.9, 0.8, 1.0)  # for information, it fails nothing
    checks = ranking_checks(model, Estimate(longer, longer, longer), tfidf, invariance, 1e-4)
    assert [check.name for check in checks if not check.passed] == failed


@pytest.mark.slow
def test_baselines_on_human_preferences(shared: Path) -> None:
    """On HH harmless the floor is .589 for TF-IDF with length, and .445 for "longer wins"."""
    path = str(shared / "data" / "hh_harmless.jsonl.gz")
    # 6 rows have an empty response; their pairs could only be told by it
    parts = [
        read_records(Source(path, part=part), "ranked", on_bad_row="skip")
        for part in ((0.0, 0.8), (0.8, 1.0))
    ]
    train, held_out = (part.records for part in parts)
    assert len(train) + len(held_out) == 1806
    assert find_overlap(train, held_out) == []
    pairs = untied_pairs(held_out)
    prompts = np.array([pair.prompt for pair in pairs])
    tfidf = pair_accuracy(tfidf_gaps(train, pairs), prompts)
    assert tfidf.low < 0.589 < tfidf.high
    assert 0.05 < tfidf.high - tfidf.low < 0.15
    everything = untied_pairs([*train, *held_out])
    longer = pair_accuracy(length_gaps(everything), np.arange(len(everything)))
    assert longer.mean == pytest.approx(0.445, abs=0.02)
