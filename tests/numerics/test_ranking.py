"""Laws and golden numbers of the ranking loss and of calibration."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.numerics.ranking import calibration, ranking_loss

# bt(gap) = log(1 + exp(-gap)): bt(0) = log 2. A list of four with scores 2, 1, 0, -1 has gaps 1 three times,
# 2 twice and 3 once: (3 * .313262 + 2 * .126928 + .048587) / 6 = .207038
RANKING: dict[str, Any] = {
    "scores_best_first": [2.0, 1.0, 0.0, -1.0],
    "loss": 0.207038,
    "bt_at_gap": {"0": 0.693147, "1": 0.313262, "-1": 1.313262, "2": 0.126928},
}

# P = sigmoid(2, 1, -1, .5) = .880797, .731059, .268941, .622459: three of four are right;
# nll = (.126928 + .313262 + 1.313262 + .474077) / 4; brier = (.014209 + .072329 + .534447 + .142537) / 4
CALIBRATION: dict[str, Any] = {
    "gaps": [2.0, 1.0, -1.0, 0.5],
    "accuracy": 0.75,
    "nll": 0.556882,
    "brier": 0.190881,
}


def bt(gap: float) -> float:
    return math.log1p(math.exp(-gap))


def three_lists() -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, prompt_index and ranks of lists of 4, 2 and 3 (with a tie), their rows interleaved."""
    scores = torch.tensor([0.3, -1.2, 2.0, 0.7, 0.1, -0.4, 1.5, 0.9, -0.6])
    prompt_index = torch.tensor([7, 2, 7, 5, 5, 7, 2, 5, 7])
    return scores, prompt_index, torch.tensor([2, 1, 1, 1, 2, 4, 2, 1, 3])


def test_one_pair_is_bradley_terry() -> None:
    for gap, expected in RANKING["bt_at_gap"].items():
        scores = torch.tensor([0.25 + float(gap), 0.25])
        loss, num_prompts = ranking_loss(scores, torch.tensor([0, 0]), torch.tensor([1, 2]))
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        assert num_prompts == 1


def test_ranking_loss_golden() -> None:
    scores = torch.tensor(RANKING["scores_best_first"])
    loss, num_prompts = ranking_loss(scores, torch.zeros(4).long(), torch.tensor([1, 2, 3, 4]))
    assert loss.item() == pytest.approx(RANKING["loss"], abs=1e-5)
    assert num_prompts == 1


def test_the_golden_numbers_are_those_of_the_file(shared: Path) -> None:
    golden = json.loads((shared / "golden.json").read_text())
    assert golden["ranking_loss"].items() >= RANKING.items()
    assert golden["calibration"].items() >= CALIBRATION.items()


def test_each_prompt_counts_once_however_long_its_list() -> None:
    scores, prompt_index, ranks = three_lists()
    loss, num_prompts = ranking_loss(scores, prompt_index, ranks)
    alone = [
        ranking_loss(
            scores[prompt_index == prompt],
            prompt_index[prompt_index == prompt],
            ranks[prompt_index == prompt],
        )
        for prompt in (2, 5, 7)
    ]
    assert num_prompts == 3 and [count for _, count in alone] == [1, 1, 1]
    assert loss.item() == pytest.approx(sum(part.item() for part, _ in alone), abs=1e-6)


def test_a_list_and_its_permutation_give_the_same_loss_and_gradient() -> None:
    scores, prompt_index, ranks = three_lists()
    order = torch.tensor([8, 3, 1, 6, 0, 2, 7, 5, 4])
    scores.requires_grad_()
    loss, _ = ranking_loss(scores, prompt_index, ranks)
    (grad,) = torch.autograd.grad(loss, scores)
    permuted, _ = ranking_loss(scores[order], prompt_index[order], ranks[order])
    (permuted_grad,) = torch.autograd.grad(permuted, scores)
    torch.testing.assert_close(permuted, loss)
    torch.testing.assert_close(permuted_grad, grad)


def test_a_constant_added_to_the_scores_of_a_prompt_changes_nothing() -> None:
    scores, prompt_index, ranks = three_lists()
    loss, _ = ranking_loss(scores, prompt_index, ranks)
    moved, _ = ranking_loss(scores + 3.0 * prompt_index, prompt_index, ranks)
    torch.testing.assert_close(moved, loss)


def test_ties_are_skipped() -> None:
    # the first two tie: the pairs left have gaps 4 and 1
    scores, ranks = torch.tensor([4.0, 1.0, 0.0]), torch.tensor([1, 1, 2])
    loss, _ = ranking_loss(scores, torch.zeros(3).long(), ranks)
    assert loss.item() == pytest.approx((bt(4) + bt(1)) / 2, abs=1e-6)


def test_a_prompt_without_a_pair_is_not_counted_and_still_backpropagates() -> None:
    scores = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    loss, num_prompts = ranking_loss(scores, torch.tensor([0, 0, 1]), torch.tensor([1, 1, 1]))
    loss.backward()
    assert loss == 0.0 and num_prompts == 0
    assert scores.grad is not None and scores.grad.tolist() == [0.0, 0.0, 0.0]


def test_pairs_never_cross_prompts() -> None:
    # prompt 3 has the gap 4 - 1, prompt 9 the gap 10 - 15
    scores, prompt_index = torch.tensor([1.0, 10.0, 4.0, 15.0]), torch.tensor([3, 9, 3, 9])
    loss, num_prompts = ranking_loss(scores, prompt_index, torch.tensor([2, 1, 1, 2]))
    assert num_prompts == 2
    assert loss.item() == pytest.approx(bt(3) + bt(-5), abs=1e-5)


def test_a_margin_is_the_gap_that_costs_log_2() -> None:
    pair = (torch.tensor([2.5, 1.0]), torch.tensor([0, 0]), torch.tensor([1, 2]))
    loss, _ = ranking_loss(*pair, margin=torch.tensor([4.0, 2.5]))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_label_smoothing_mixes_in_the_flipped_pair_and_has_a_finite_optimum() -> None:
    pair = (torch.tensor([0, 0]), torch.tensor([1, 2]))
    loss, _ = ranking_loss(torch.tensor([1.0, 0.0]), *pair, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * bt(1) + 0.1 * bt(-1), abs=1e-6)
    # sigmoid(gap) = .9 at the optimum, gap = log 9
    best = torch.tensor([math.log(9), 0.0], requires_grad=True)
    (grad,) = torch.autograd.grad(ranking_loss(best, *pair, label_smoothing=0.1)[0], best)
    assert grad.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_centering_punishes_the_squared_sum_of_a_pair() -> None:
    pair = (torch.tensor([3.0, 2.0]), torch.tensor([0, 0]), torch.tensor([1, 2]))
    loss, _ = ranking_loss(*pair, centering=0.01)
    assert loss.item() == pytest.approx(bt(1) + 0.01 * 25.0, abs=1e-6)


def test_micro_batches_add_up() -> None:
    scores, prompt_index, ranks = three_lists()
    loss, num_prompts = ranking_loss(scores, prompt_index, ranks, centering=0.01)
    first = prompt_index == 7
    parts = [ranking_loss(scores[m], prompt_index[m], ranks[m], centering=0.01) for m in (first, ~first)]
    assert sum(count for _, count in parts) == num_prompts
    torch.testing.assert_close(sum(part for part, _ in parts), loss)


def test_calibration_golden() -> None:
    found = calibration(torch.tensor(CALIBRATION["gaps"]))
    for name in ("accuracy", "nll", "brier"):
        assert found[name] == pytest.approx(CALIBRATION[name], abs=1e-5)
    # confidences .880797 | .731059 twice, one right | .622459, each group in a bin of its own:
    # (1 - .880797 + 2 * (.731059 - .5) + 1 - .622459) / 4 = .239716
    assert found["ece"] == pytest.approx(0.239716, abs=1e-5)


def test_calibration_tells_a_confidence_of_62_from_one_of_67_percent() -> None:
    # bins of .05 from .5 up: .62 right and .67 wrong stand alone, (.38 + .67) / 2; together they give .145
    gaps = torch.logit(torch.tensor([0.62, 1 - 0.67]))
    assert calibration(gaps)["ece"] == pytest.approx(0.525, abs=1e-5)


def test_gaps_that_mean_what_they_say_are_calibrated() -> None:
    # nine of ten pairs right at P = .9, gap log 9; six of ten at P = .6, gap log 1.5
    gaps = [math.log(9)] * 9 + [-math.log(9)] + [math.log(1.5)] * 6 + [-math.log(1.5)] * 4
    assert calibration(torch.tensor(gaps))["ece"] == pytest.approx(0.0, abs=1e-6)


def test_a_scorer_that_knows_nothing_is_at_chance() -> None:
    found = calibration(torch.zeros(5))
    expected = {"accuracy": 0.5, "nll": math.log(2), "brier": 0.25, "ece": 0.0}
    assert found == pytest.approx(expected)


def test_a_very_large_gap_falls_into_the_last_bin() -> None:
    assert calibration(torch.tensor([100.0])) == pytest.approx(
        {"accuracy": 1, "nll": 0, "brier": 0, "ece": 0}
    )


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError):
        ranking_loss(torch.zeros(3), torch.zeros(2).long(), torch.tensor([1, 2]))
    with pytest.raises(AssertionError):
        calibration(torch.zeros(0))
