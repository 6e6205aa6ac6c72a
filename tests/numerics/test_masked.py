"""Laws and golden numbers of the masked reductions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.numerics.masked import last_true_index, masked_mean, masked_sum, whiten, zero_rest

NAN = float("nan")

# mean of 1, 2, 3 is 2, the biased variance (1 + 0 + 1) / 3; 1 / sqrt(2/3) = 1.224745 (unbiased would give 1)
WHITEN: dict[str, Any] = {
    "values": [1.0, 2.0, 3.0, 100.0],
    "mask": [1, 1, 1, 0],
    "biased": [-1.224745, 0.0, 1.224745],
    "biased_keep_mean": [0.775255, 2.0, 3.224745],
}


def test_only_positions_that_count_are_summed() -> None:
    values = torch.tensor([[1.0, 2.0], [4.0, NAN]])
    mask = torch.tensor([[True, False], [True, False]])
    assert masked_sum(values, mask) == 5.0
    assert masked_mean(values, mask) == 2.5
    assert masked_mean(values, mask, denominator=10) == 0.5
    assert zero_rest(values, mask).tolist() == [[1.0, 0.0], [4.0, 0.0]]


def test_gradient_is_zero_where_nothing_counts() -> None:
    values = torch.tensor([1.0, NAN, float("inf")], requires_grad=True)
    masked_mean(values, torch.tensor([True, False, False])).backward()
    assert values.grad is not None and values.grad.tolist() == [1.0, 0.0, 0.0]


def test_an_empty_mask_gives_zero_and_still_backpropagates() -> None:
    values = torch.tensor([NAN, 2.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([False, False]))
    mean.backward()
    assert mean == 0.0
    assert values.grad is not None and values.grad.tolist() == [0.0, 0.0]


def test_micro_batches_with_a_shared_denominator_add_up() -> None:
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5)[None] < torch.tensor([5, 1, 3, 2, 4, 1])[:, None]
    parts = [masked_mean(values[i : i + 2], mask[i : i + 2], denominator=mask.sum()) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), masked_mean(values, mask))


def test_reductions_are_float32_whatever_comes_in() -> None:
    # 1024 + 1 + 1 + 1: bfloat16 keeps 8 bits and would answer 1024
    values = torch.cat([torch.tensor([1024.0]), torch.ones(3)]).bfloat16()
    total = masked_sum(values, torch.ones(4, dtype=torch.bool))
    assert total.dtype == torch.float32 and total == 1027.0


def test_masks_that_are_not_boolean_or_of_another_shape_are_refused() -> None:
    with pytest.raises(AssertionError, match="boolean"):
        masked_sum(torch.ones(2), torch.ones(2))
    with pytest.raises(AssertionError):
        masked_sum(torch.ones(2, 2), torch.ones(2, dtype=torch.bool))


def test_whitened_values_have_mean_0_and_biased_variance_1_over_the_mask() -> None:
    values = 7 + 3 * torch.randn(16, 9, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(9)[None] < torch.arange(16)[:, None].clamp(1, 9)
    whitened = whiten(values.masked_fill(~mask, NAN), mask)
    assert abs(whitened[mask].mean().item()) < 1e-6
    assert abs(whitened[mask].var(correction=0).item() - 1) < 1e-5
    assert (whitened[~mask] == 0).all()
    torch.testing.assert_close(whiten(values * 5 - 2, mask), whitened, atol=1e-5, rtol=1e-5)


def test_equal_values_whiten_to_zero() -> None:
    assert whiten(torch.full((3,), 2.0), torch.ones(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]
    large = torch.full((64, 26), 1000.1)  # whose float32 mean is another number
    assert whiten(large, torch.ones(64, 26, dtype=torch.bool)).abs().max() < 1e-5


def test_whiten_golden() -> None:
    values, mask = torch.tensor([WHITEN["values"]]), torch.tensor([WHITEN["mask"]]).bool()
    assert whiten(values, mask)[0].tolist() == pytest.approx([*WHITEN["biased"], 0.0], abs=1e-5)
    kept = whiten(values, mask, keep_mean=True)[0].tolist()
    assert kept == pytest.approx([*WHITEN["biased_keep_mean"], 0.0], abs=1e-5)


def test_whiten_golden_is_that_of_the_file(shared: Path) -> None:
    assert json.loads((shared / "golden.json").read_text())["whiten"].items() >= WHITEN.items()


def test_last_true_index_looks_at_the_mask_alone() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]]).bool()
    assert last_true_index(mask).tolist() == [1, 0, 3, 2]


def test_a_row_without_a_true_has_no_last_one() -> None:
    with pytest.raises(AssertionError, match="no last one"):
        last_true_index(torch.tensor([[True], [False]]))
