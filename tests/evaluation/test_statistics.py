"""Laws, golden numbers and coverage of the estimates and their intervals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.evaluation import statistics
from rlhf.evaluation.statistics import (
    Estimate,
    WinRate,
    bootstrap_mean,
    bootstrap_of_means,
    paired_difference,
    pearson,
    wilson_interval,
    win_rate,
)

# 52 wins, 16 ties, 32 losses: (52 + 8) / 100 = .6; squared deviations 52 * .16 + 16 * .01 + 32 * .36 = 20,
# standard error sqrt(20 / 99 / 100) = .04495. Wilson for 60 of 100, z = 1.959964, z^2 = 3.841459:
# (.6 + .019207 +- 1.959964 * sqrt(.0024 + .000096)) / 1.038415 = .5020, .6906
WIN_RATE: dict[str, Any] = {
    "wins": 52,
    "ties": 16,
    "losses": 32,
    "win_rate": 0.6,
    "se": 0.04495,
    "wilson_60_of_100": [0.502, 0.6906],
}


def golden_scores() -> tuple[np.ndarray, np.ndarray]:
    """Return scores of 100 prompts where a wins 52 times, ties 16 times and loses 32 times."""
    difference = np.repeat([1.0, 0.0, -1.0], [WIN_RATE["wins"], WIN_RATE["ties"], WIN_RATE["losses"]])
    baseline = np.random.default_rng(0).integers(-3, 3, size=100).astype(float)
    return baseline + difference, baseline


def test_who_wins_everything_has_the_interval_of_a_proportion() -> None:
    found, other = win_rate([2.0] * 16, [1.0] * 16), win_rate([1.0] * 16, [2.0] * 16)
    # Wilson's bound of n of n: n / (n + 1.96^2)
    assert (found.win_rate, found.high) == (1.0, 1.0) and found.low == pytest.approx(16 / 19.8415, abs=1e-4)
    assert (other.low, other.high) == pytest.approx((1 - found.high, 1 - found.low))
    for total in range(1, 600):  # plots take no negative width
        assert wilson_interval(total, total)[1] == 1.0 and wilson_interval(0, total)[0] == 0.0
    copies = win_rate(np.full((16, 10), 2.0), np.full((16, 10), 1.0))
    assert copies.low == found.low, "clustered by prompt"


def test_win_rate_golden() -> None:
    found = win_rate(*golden_scores(), num_bootstrap=20_000, seed=0)
    assert (found.wins, found.ties, found.losses) == (52, 16, 32)
    assert found.win_rate == pytest.approx(0.6, abs=1e-12)
    # the normal interval, to within the noise of the quantiles and the grid of 1/200 on which means lie
    assert found.low == pytest.approx(0.6 - 1.96 * WIN_RATE["se"], abs=0.0051)
    assert found.high == pytest.approx(0.6 + 1.96 * WIN_RATE["se"], abs=0.0051)


def test_wilson_golden() -> None:
    assert wilson_interval(60, 100) == pytest.approx(WIN_RATE["wilson_60_of_100"], abs=5e-5)


def test_the_golden_numbers_are_those_of_the_file(shared: Path) -> None:
    assert json.loads((shared / "golden.json").read_text())["win_rate"].items() >= WIN_RATE.items()


def test_a_system_against_itself_wins_half_the_time() -> None:
    scores, _ = golden_scores()
    assert win_rate(scores, scores) == WinRate(wins=0, ties=100, losses=0, win_rate=0.5, low=0.5, high=0.5)


def test_two_samples_of_one_system_contain_a_half() -> None:
    a, b = np.random.default_rng(5).normal(size=(2, 400))
    found = win_rate(a, b)
    assert found.low < 0.5 < found.high


def test_swapped_order_gives_the_complement() -> None:
    a, b = golden_scores()
    forward, backward = win_rate(a, b, seed=3), win_rate(b, a, seed=3)
    assert (backward.wins, backward.ties, backward.losses) == (forward.losses, forward.ties, forward.wins)
    found = (backward.win_rate, backward.low, backward.high)
    assert found == pytest.approx((1 - forward.win_rate, 1 - forward.high, 1 - forward.low))


def test_a_difference_within_the_margin_ties() -> None:
    found = win_rate([1.0, 1.0, 1.0, 1.0], [0.5, 0.75, 1.25, 1.75], tie_margin=0.25)
    assert (found.wins, found.ties, found.losses) == (1, 2, 1)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    scores = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(scores, seed=1) == bootstrap_mean(scores, seed=1)
    assert bootstrap_mean(scores, seed=1) != bootstrap_mean(scores, seed=2)


def test_working_in_blocks_leaves_the_interval_right(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).normal(size=50)
    whole = bootstrap_mean(scores, num_bootstrap=5000)
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", 7 * 50)
    pieces = bootstrap_mean(scores, num_bootstrap=5000)
    assert pieces.mean == whole.mean
    assert (pieces.low, pieces.high) == pytest.approx((whole.low, whole.high), abs=0.03)


def test_one_prompt_has_an_interval_without_width() -> None:
    assert bootstrap_mean([2.5]) == Estimate(2.5, 2.5, 2.5)


def test_samples_of_a_prompt_are_resampled_together() -> None:
    # ten copies of every score are no more evidence than one
    scores = np.random.default_rng(0).normal(size=40)
    once, copies = bootstrap_mean(scores), bootstrap_mean(np.repeat(scores[:, None], 10, axis=1))
    assert (copies.mean, copies.low, copies.high) == pytest.approx((once.mean, once.low, once.high))
    a, b = golden_scores()
    clustered = win_rate(np.repeat(a[:, None], 10, axis=1), np.repeat(b[:, None], 10, axis=1))
    assert clustered.wins == 520
    assert clustered.low == pytest.approx(win_rate(a, b).low)


def test_pairing_takes_out_what_the_prompts_share() -> None:
    rng = np.random.default_rng(0)
    prompts = 10 * rng.normal(size=200)
    a, b = prompts + 1 + 0.1 * rng.normal(size=200), prompts + 0.1 * rng.normal(size=200)
    found = paired_difference(a, b)
    # standard error .1 * sqrt(2 / 200) = .01, against sqrt(2) * 10 / sqrt(200) = 1 without pairing
    assert found.mean == pytest.approx(1.0, abs=0.04)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.01, rel=0.25)


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    scores = np.random.default_rng(2).normal(size=400)
    found = bootstrap_mean(scores, num_bootstrap=10_000)
    half = 1.96 * scores.std() / 20
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.006)
    narrow = bootstrap_mean(scores, num_bootstrap=10_000, level=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * 0.6745 * scores.std() / 20, rel=0.06)


def test_the_95_percent_interval_covers_the_truth_that_often() -> None:
    rng = np.random.default_rng(0)
    covered, num_data_sets = 0, 1500
    for seed in range(num_data_sets):
        # two samples per prompt that share the prompt's noise; true mean 0
        scores = rng.normal(size=(120, 1)) + rng.normal(size=(120, 2))
        found = bootstrap_mean(scores, num_bootstrap=1000, seed=seed)
        covered += found.low <= 0 <= found.high
    assert 0.93 <= covered / num_data_sets <= 0.97


def test_a_function_of_means_is_resampled_as_a_mean_is() -> None:
    scores = np.random.default_rng(0).normal(size=(80, 2))
    found = bootstrap_of_means(scores, lambda means: means, num_bootstrap=4000)
    for each, column in zip(found, scores.T, strict=True):
        expected = bootstrap_mean(column, num_bootstrap=4000)
        assert each.mean == pytest.approx(expected.mean)
        assert (each.low, each.high) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_the_interval_of_a_ratio_covers_the_truth_that_often() -> None:
    rng, covered, num_data_sets = np.random.default_rng(0), 0, 400
    for seed in range(num_data_sets):
        lengths = rng.integers(1, 20, size=80)
        sums = [rng.exponential(2.0, size=n).sum() for n in lengths]
        rows = np.stack([sums, lengths], axis=1)
        (found,) = bootstrap_of_means(rows, lambda m: m[..., :1] / m[..., 1:], num_bootstrap=400, seed=seed)
        covered += found.low <= 2.0 <= found.high
    assert 0.92 <= covered / num_data_sets <= 0.98


def test_resamples_without_a_value_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[1.0, 1.0], [0.0, 0.0]]  # a quarter of the resamples is 0 / 0
    ratio: Any = lambda means: means[..., :1] / means[..., 1:]  # noqa: E731
    assert bootstrap_of_means(rows, ratio, num_bootstrap=100) == [Estimate(1.0, 1.0, 1.0)]
    whole = bootstrap_of_means(np.arange(30.0).reshape(15, 2), ratio, num_bootstrap=500)
    monkeypatch.setattr(statistics, "BLOCK_ELEMENTS", 7 * 15)
    assert bootstrap_of_means(np.arange(30.0).reshape(15, 2), ratio, num_bootstrap=500) == whole


def test_scores_that_do_not_pair_or_are_not_finite_are_refused() -> None:
    with pytest.raises(AssertionError):
        win_rate([1.0, 2.0], [1.0])
    with pytest.raises(AssertionError, match="not finite"):
        bootstrap_mean([1.0, float("nan")])
    with pytest.raises(AssertionError):
        bootstrap_mean([])


def test_wilson_stays_within_0_and_1_and_keeps_its_width_at_the_ends() -> None:
    # 0 of n: high = z^2 / (n + z^2) = 3.841459 / 13.841459
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.277533, 1.0), abs=1e-6)
    low, high = wilson_interval(5, 10, level=0.5)
    assert (low + high) / 2 == pytest.approx(0.5) and high - low < 0.25
    with pytest.raises(AssertionError):
        wilson_interval(3, 2)


def test_pearson_by_hand() -> None:
    # centred (-1, 0, 1) and (-1, 1, 0): 1 / sqrt(2 * 2)
    assert pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert pearson([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)


def test_a_constant_correlates_with_nothing() -> None:
    assert pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert pearson([1.0, 2.0, 3.0], [0.1, 0.1, 0.1]) is None


def test_an_interval_holds_its_mean_where_all_rows_are_alike() -> None:
    for level in (1 / 3, 0.1, 7.2e-5, 5 / 6):
        for count in (3, 7, 24):
            rows = [[level, level**2]] * count
            for each in bootstrap_of_means(rows, lambda means: means.prod(-1, keepdims=True)):
                assert each.low <= each.mean <= each.high
