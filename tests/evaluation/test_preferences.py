"""Bradley-Terry strengths, length-controlled win rates and sample sizes: golden numbers, laws, coverage."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf.evaluation.preferences import (
    bradley_terry,
    fit_strengths,
    length_controlled_win_rate,
    sample_size,
)
from rlhf.evaluation.statistics import win_rate

# a beats b 60 of 100, b beats c 60 of 100, a beats c 70 of 100. With strengths t, 0, -t all gradients vanish
# at 60 - 100 s(t) + 70 - 100 s(2t) = 0, s the sigmoid: t = .417053 gives s(t) = .602777, s(2t) = .697223
WINS = np.array([[0, 60, 70], [40, 0, 60], [30, 40, 0]], dtype=float)
STRENGTHS = [0.417053, 0.0, -0.417053]


def outcomes_of(scores: np.ndarray) -> np.ndarray:
    """(P, S, S) from scores (S, P)."""
    return (1 + np.sign(scores.T[:, :, None] - scores.T[:, None, :])) / 2


def test_strengths_golden(shared: Path) -> None:
    games = 100.0 * (1 - np.eye(3))
    assert fit_strengths(WINS, games) == pytest.approx(STRENGTHS, abs=1e-6)
    golden = json.loads((shared / "golden.json").read_text(encoding="utf-8"))["bradley_terry"]
    assert golden["theta"] == STRENGTHS and golden["a_beats_c"] == [70, 100]


def test_two_systems_have_the_logit_of_their_win_rate() -> None:
    rng = np.random.default_rng(0)
    scores = np.stack([rng.normal(0.3, 1, 200), rng.normal(0, 1, 200)])
    first, second = bradley_terry(outcomes_of(scores), num_bootstrap=200)
    rate = win_rate(scores[0], scores[1]).win_rate
    assert first.mean - second.mean == pytest.approx(np.log(rate / (1 - rate)), abs=1e-4)
    assert first.low < first.mean < first.high and first.mean == pytest.approx(-second.mean)


def test_the_order_of_systems_does_not_matter_and_pairs_may_be_missing() -> None:
    rng = np.random.default_rng(1)
    outcomes = outcomes_of(rng.normal(np.arange(4)[:, None] / 3, 1, (4, 100)))
    whole = [each.mean for each in bradley_terry(outcomes, num_bootstrap=10)]
    assert sorted(whole) == whole and sum(whole) == pytest.approx(0, abs=1e-9)
    turned = [each.mean for each in bradley_terry(outcomes[:, ::-1, ::-1], num_bootstrap=10)]
    assert turned[::-1] == pytest.approx(whole)
    chain = outcomes.copy()
    for i, j in ((0, 2), (0, 3), (1, 3)):
        chain[:, i, j] = chain[:, j, i] = np.nan
    found = [each.mean for each in bradley_terry(chain, num_bootstrap=10)]
    shares = [outcomes[:, i + 1, i].mean() for i in range(3)]
    # in a chain every pair is fitted exactly
    assert np.diff(found) == pytest.approx([np.log(share / (1 - share)) for share in shares], abs=1e-4)


def test_where_some_win_everything_there_is_an_order_and_no_interval() -> None:
    rng = np.random.default_rng(0)
    undefeated = np.stack([np.full(50, 9.0), *rng.normal(size=(2, 50))])
    best, *others = bradley_terry(outcomes_of(undefeated), num_bootstrap=50)
    assert best.mean > max(each.mean for each in others) and np.isfinite(best.mean)
    # two that beat one another, and both always a third: no one won everything, and there are no strengths
    pair = np.stack([*rng.normal(size=(2, 50)), np.full(50, -9.0)])
    chain = np.stack([np.full(50, each) for each in (3.0, 2.0, 1.0)])
    for scores in (undefeated, pair, chain):
        found = bradley_terry(outcomes_of(scores), num_bootstrap=50)
        assert all((each.low, each.high) == (-np.inf, np.inf) for each in found)
    assert [each.mean > 0 for each in bradley_terry(outcomes_of(pair))] == [True, True, False]
    first, second, third = bradley_terry(outcomes_of(chain))
    assert first.mean > second.mean > third.mean and second.mean == pytest.approx(0)


def test_strengths_cover_the_truth() -> None:
    rng, truth = np.random.default_rng(2), np.array([0.5, 0.1, -0.6])
    chance = 1 / (1 + np.exp(truth[None, :] - truth[:, None]))
    covered = []
    for _ in range(200):
        wins = rng.random((150, 3, 3)) < chance
        upper = np.triu(wins, 1)
        outcomes = upper + np.tril(1 - np.swapaxes(upper, 1, 2), -1)
        found = bradley_terry(outcomes, num_bootstrap=300)
        covered += [each.low <= true <= each.high for each, true in zip(found, truth, strict=True)]
    assert 0.93 <= np.mean(covered) <= 0.97


def test_with_equal_lengths_it_is_the_win_rate() -> None:
    outcomes = np.repeat([1.0, 0.5, 0.0], [52, 16, 32])
    lengths = np.random.default_rng(0).integers(5, 50, 100)
    found = length_controlled_win_rate(outcomes, lengths, lengths)
    assert found is not None and found.mean == pytest.approx(0.6, abs=1e-9)
    # .6 +- 1.96 * .04495 on the logit: logit .6 = .405465, d logit = .04495 / .24 = .1873
    assert (found.low, found.high) == pytest.approx((0.5096, 0.6841), abs=2e-3)


def test_swapped_systems_have_the_complement() -> None:
    rng = np.random.default_rng(0)
    outcomes, a, b = rng.integers(0, 3, 90) / 2, rng.integers(5, 50, 90), rng.integers(5, 40, 90)
    found, other = length_controlled_win_rate(outcomes, a, b), length_controlled_win_rate(1 - outcomes, b, a)
    assert found is not None and other is not None
    assert (found.mean, found.low) == pytest.approx((1 - other.mean, 1 - other.high))


def test_a_judge_that_goes_by_length_alone_tells_no_system_from_another() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(20, 60, 400), rng.integers(10, 50, 400)
    outcomes = (1 + np.sign(a - b)) / 2
    assert outcomes.mean() > 0.7
    found = length_controlled_win_rate(outcomes, a, b)
    assert found is not None and found.low < 0.5 < found.high


def test_nothing_is_told_where_one_response_is_always_the_longer() -> None:
    rng = np.random.default_rng(0)
    for outcomes in (np.ones(40), rng.integers(0, 2, 40)):
        assert length_controlled_win_rate(outcomes, np.arange(40) + 60, np.arange(40)) is None
        assert length_controlled_win_rate(outcomes, np.arange(40), np.arange(40) + 60) is None


def test_wins_alone_have_the_interval_of_a_proportion() -> None:
    found = length_controlled_win_rate(np.ones(40), np.arange(40), np.full(40, 15))
    assert found is not None and found.mean == found.high == 1 and 0.85 < found.low < 0.95


def test_ten_prompts_on_either_side_are_enough_and_nine_are_not() -> None:
    rng, covered = np.random.default_rng(6), []
    for _ in range(400):
        difference = rng.normal(60, 8, 100)
        difference[:10] = 0
        outcomes = (rng.random(100) < 0.7).astype(float)  # whatever the length
        found = length_controlled_win_rate(outcomes, difference, np.zeros(100))
        assert found is not None
        covered.append(found.low <= 0.7 <= found.high)
    assert np.mean(covered) > 0.85  # the sandwich's interval is of many rows
    assert length_controlled_win_rate(outcomes, np.where(np.arange(100) < 9, 0, 60), np.zeros(100)) is None


def test_the_length_controlled_interval_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(3), []
    for _ in range(1000):
        difference = rng.normal(10, 20, 200)
        logit = 0.4 + 0.8 * np.tanh(difference / np.std(difference))
        outcomes = (rng.random(200) < 1 / (1 + np.exp(-logit))).astype(float)
        found = length_controlled_win_rate(outcomes, difference, np.zeros(200))
        assert found is not None
        covered.append(found.low <= 1 / (1 + np.exp(-0.4)) <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_the_sample_size_is_one_at_which_the_difference_is_seen_in_four_of_five_cases() -> None:
    rng = np.random.default_rng(4)
    # std 1, mean .25: ((1.959964 + .841621) / .25)^2 = 125.58
    whole = rng.normal(size=100_000)
    whole = (whole - whole.mean()) / whole.std(ddof=1) + 0.25
    needed = sample_size(whole)
    assert needed == 126
    samples = rng.normal(0.25, 1, (4000, needed))
    z = samples.mean(axis=1) / (samples.std(axis=1, ddof=1) / np.sqrt(needed))
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.025)


def test_no_difference_needs_no_number_of_prompts() -> None:
    assert sample_size([1.0, -1.0]) is None and sample_size([1.0]) is None
    assert sample_size([0.5, 0.5, 0.5]) == 2
