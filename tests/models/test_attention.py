"""Attention by plain products is torch's fused attention: values and gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf.models.attention import BLOCK, NARROW, plain_attention

SIZES = [  # B, H, K, Q, T, D
    (3, 4, 4, 5, 5, 16),
    (2, 6, 2, BLOCK, BLOCK, NARROW),
    (2, 4, 1, 2 * BLOCK + 7, 2 * BLOCK + 7, 8),
    (2, 9, 3, BLOCK + 1, BLOCK + 1, 64),
    (2, 4, 2, BLOCK + 3, BLOCK + 20, 24),  # queries that continue a cache
    (2, 4, 2, 1, 9, 16),
]


def inputs(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as projections leave them: heads beside each other, then seen as a dimension."""
    rows, heads, key_heads, queries, keys, width = size
    generator = torch.Generator().manual_seed(1)

    def states(length: int, count: int) -> Tensor:
        drawn = torch.randn(rows, length, count, width, generator=generator)
        return drawn.to(dtype).transpose(1, 2).requires_grad_()

    return states(queries, heads), states(keys, key_heads), states(keys, key_heads)


def visible(size: tuple[int, ...]) -> Tensor:
    """(Q, T): the last query sees all keys, the one before all but the last."""
    queries, keys = size[3:5]
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_are_those_of_torch(size: tuple[int, ...], scale: float | None) -> None:
    ours, theirs = inputs(size, torch.float64), inputs(size, torch.float64)
    result, _ = plain_attention(torch.nn.Module(), *ours, None, scaling=scale)
    expected = fused(*theirs, visible(size), scale)
    torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)
    weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = torch.autograd.grad(result, ours, weight)
    for one, other in zip(gradients, torch.autograd.grad(expected, theirs, weight), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_a_mask_and_its_absence_mean_the_same(size: tuple[int, ...]) -> None:
    without, _ = plain_attention(torch.nn.Module(), *inputs(size), None)
    mask = visible(size).expand(size[0], 1, -1, -1)
    for each in (mask, torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)):
        within, _ = plain_attention(torch.nn.Module(), *inputs(size), each)
        torch.testing.assert_close(within, without, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_keeps_its_digits_in_both_directions(size: tuple[int, ...]) -> None:
    low = inputs(size, torch.bfloat16)
    query, key, value = (x.detach().float().requires_grad_() for x in low)
    result, _ = plain_attention(torch.nn.Module(), *low, None)
    expected = fused(query, key, value, visible(size), None)
    assert result.dtype == torch.bfloat16
    gradients = torch.autograd.grad(result.float().sum(), low)
    wanted = torch.autograd.grad(expected.sum(), (query, key, value))
    for one, other in ((result.detach(), expected.detach()), *zip(gradients, wanted, strict=True)):
        assert (one.float() - other).norm() <= 0.01 * other.norm() + 1e-3


def test_future_keys_leave_no_trace() -> None:
    size = (1, 2, 1, BLOCK + 5, BLOCK + 5, 8)
    query, key, value = inputs(size)
    result, _ = plain_attention(torch.nn.Module(), query, key, value, None)
    key.data[:, :, -3:] = value.data[:, :, -3:] = 1e6
    changed, _ = plain_attention(torch.nn.Module(), query, key, value, None)
    assert torch.equal(changed[:, :-3], result[:, :-3])


@pytest.mark.parametrize("size", [(3, 4, 2, 9, 9, 16), (3, 4, 2, 1, 9, 16)])
def test_padding_stays_finite_where_autocast_rounds(size: tuple[int, ...]) -> None:
    mask = visible(size).repeat(size[0], 1, 1, 1)
    mask[1, ..., :4] = False  # left padding, whose rows see no key at all
    exact, _ = plain_attention(torch.nn.Module(), *inputs(size), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = plain_attention(torch.nn.Module(), *inputs(size), mask)
    assert rounded.dtype == torch.bfloat16 and rounded.isfinite().all()
    torch.testing.assert_close(rounded.float()[:, -4:], exact[:, -4:], atol=0.03, rtol=0.03)
