"""Attention by plain products is torch's fused attention: values and gradients."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf.models.attention import Heads, Wanted, plain_attention, turn, turned_attention
from rlhf.models.attention_blocks import BLOCK, NARROW

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


@pytest.mark.parametrize(("width", "large"), [(8, 2.0), (8, 1e6), (NARROW, 1e6)])
def test_future_keys_leave_no_trace(width: int, large: float) -> None:
    size = (1, 2, 1, BLOCK + 5, BLOCK + 5, width)
    query, key, value = inputs(size)
    result, _ = plain_attention(torch.nn.Module(), query, key, value, None)
    key.data[:, :, -3:], value.data[:, :, -3:] = large, 1e6
    changed, _ = plain_attention(torch.nn.Module(), query, key, value, None)
    if width < NARROW and large > 1e3:  # narrow heads are computed otherwise beside such products
        torch.testing.assert_close(changed[:, :-3], result[:, :-3], atol=2e-6, rtol=1e-5)
    else:
        assert torch.equal(changed[:, :-3], result[:, :-3])


@pytest.mark.parametrize("product", [-400.0, -75.0, -60.0, 60.0, 75.0, 400.0])
def test_products_of_any_size_are_exact_in_narrow_heads(product: float) -> None:
    """Beyond 69 the sums of powers are not sound, beyond 88 they have no place in float32; the first row of
    the batch is as usual.
    """
    size = (2, 2, 1, BLOCK + 5, BLOCK + 5, 8)
    ours = inputs(size)
    for tensor in ours[:2]:
        tensor.data[1, ..., 0] = abs(product * 8**0.5) ** 0.5
    if product < 0:
        ours[1].data[1, ..., 0] *= -1
    query, key, value = (each.detach().double().requires_grad_() for each in ours)
    result, _ = plain_attention(torch.nn.Module(), *ours, None)
    expected = fused(query, key, value, visible(size), None)
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=1e-4)
    gradients = torch.autograd.grad(result.sum(), ours)
    for one, other in zip(gradients, torch.autograd.grad(expected.sum(), (query, key, value)), strict=True):
        assert (one - other).norm() < 1e-4 * other.norm()


@pytest.mark.parametrize("size", [(3, 4, 2, 9, 9, 16), (3, 4, 2, 1, 9, 16)])
def test_padding_stays_finite_where_autocast_rounds(size: tuple[int, ...]) -> None:
    mask = visible(size).repeat(size[0], 1, 1, 1)
    mask[1, ..., :4] = False  # left padding, whose rows see no key at all
    exact, _ = plain_attention(torch.nn.Module(), *inputs(size), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = plain_attention(torch.nn.Module(), *inputs(size), mask)
    assert rounded.dtype == torch.bfloat16 and rounded.isfinite().all()
    torch.testing.assert_close(rounded.float()[:, -4:], exact[:, -4:], atol=0.03, rtol=0.03)


def tables_of(length: int, heads: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (L, heads * D) of positions."""
    frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    cosines, sines = angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=1)
    return cosines.repeat(1, heads), sines.repeat(1, heads)


def test_turned_is_as_complex_numbers_are_turned_and_back() -> None:
    x = torch.randn(5, 3 * 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tables = tables_of(5, 3, 8)
    found = turn(x, *tables, 8)
    halves = x.view(5, 3, 2, 4)
    angles = torch.complex(tables[0].view(5, 3, 2, 4)[:, :, 1], tables[1].view(5, 3, 2, 4)[:, :, 1])
    expected = torch.complex(halves[:, :, 0], halves[:, :, 1]) * angles
    torch.testing.assert_close(found.view(5, 3, 2, 4)[:, :, 0], expected.real)
    torch.testing.assert_close(found.view(5, 3, 2, 4)[:, :, 1], expected.imag)
    torch.testing.assert_close(turn(found, *tables, 8, back=True), x)


def test_numbers_in_pairs_are_turned_as_those_in_halves_are() -> None:
    x = torch.randn(2, 5, 3 * 8, generator=torch.Generator().manual_seed(0))
    cosines, sines = (each.float() for each in tables_of(5, 3, 8))
    turns = torch.complex(cosines, sines).view(5, 3, 2, 4)[:, :, 1].flatten(1)
    tables, paired = (turns, turns.conj().resolve_conj()), x.view(2, 5, 3, 2, 4).mT.flatten(2)
    for back in (False, True):
        expected = turn(x, cosines, sines, 8, back=back).view(2, 5, 3, 2, 4).mT.flatten(2)
        place = torch.zeros(2, 5, 40)[..., 8:32]
        torch.testing.assert_close(turn(paired, *tables, 8, back=back), expected)
        torch.testing.assert_close(turn(paired, *tables, 8, back=back, out=place), expected)
        torch.testing.assert_close(place, expected)


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize(("width", "length"), [(8, 2 * BLOCK + 7), (NARROW, BLOCK + 1), (4, 5)])
def test_turned_attention_is_that_of_turned_heads(width: int, length: int, some: bool) -> None:
    heads, rows = Heads(6, 2, width, 0.4), 3
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, length, 10 * width, generator=generator, dtype=torch.float64).requires_grad_()
    places = (torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 2, length - 1, length - 2, 1, 3]))
    tables, query_tables = tables_of(length, 8, width), tables_of(length, 6, width)

    turned = turn(x[..., : 8 * width], *tables, width).unflatten(-1, (8, width)).transpose(1, 2)
    value = x[..., 8 * width :].unflatten(-1, (2, width)).transpose(1, 2)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    expected = fused(turned[:, :6], turned[:, 6:], value, mask, heads.scale).flatten(2)
    if some:
        key_tables = tables_of(length, 2, width)
        its = (query_tables[0][places[1]], query_tables[1][places[1]])
        queries = (x[..., : 6 * width][places], its, Wanted(*places, x.shape[:2]))
        found, expected = turned_attention(x[..., 6 * width :], key_tables, heads, queries), expected[places]
    else:
        found = turned_attention(x, tables, heads)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    one, other = (torch.autograd.grad(each, x, weight)[0] for each in (found, expected))
    assert other.norm() > 1
    torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
