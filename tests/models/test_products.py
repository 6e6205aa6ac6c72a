"""Products with what comes before them have the values and gradients of their equations."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlhf.models.products import (
    GATE,
    PLAIN,
    Before,
    Parts,
    RmsNorm,
    Whole,
    join,
    joined,
    products,
)

NORM = RmsNorm(1e-5)


def numbers(*shape: int, seed: int, trained: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(trained)


def inputs_of(before: Before, width: int) -> list[Tensor]:
    x = numbers(2, 3, width, seed=1)
    if before is PLAIN:
        return [x]
    return [x, numbers(2, 3, width, seed=2) if before is GATE else numbers(width, seed=3)]


def by_equation(before: Before, inputs: list[Tensor], layers: list[Parts]) -> Tensor:
    x = inputs[0]
    if before is NORM:
        x = inputs[1] * x / (x.square().mean(-1, keepdim=True) + NORM.epsilon).sqrt()
    elif before is GATE:
        x = x * torch.sigmoid(x) * inputs[1]
    found = []
    for layer in layers:
        y = functional.linear(x, layer.weight, layer.bias)
        if layer.a is not None and layer.b is not None:
            y = y + layer.scaling * (x @ layer.a.t()) @ layer.b.t()
        found.append(y)
    return torch.cat(found, dim=-1)


def layers_of(width: int, rank: int) -> list[Parts]:
    """One trained in full, two with adapters of which one is frozen, and one frozen without an adapter."""
    sizes, seeds = (5, 4, 6, 3), itertools.count(10)
    layers = [Parts(numbers(sizes[0], width, seed=next(seeds)), numbers(sizes[0], seed=next(seeds)))]
    for size, trained in zip(sizes[1:3], (True, False), strict=True):
        weight = numbers(size, width, seed=next(seeds), trained=False)
        a = numbers(rank, width, seed=next(seeds), trained=trained)
        b = numbers(size, rank, seed=next(seeds), trained=trained)
        layers.append(Parts(weight, None, a, b, scaling=1.5))
    return [*layers, Parts(numbers(sizes[3], width, seed=next(seeds), trained=False))]


@pytest.mark.usefixtures("what_comes_before")
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("rank", [1, 3])  # with the second it is cheaper to add the adapters to the weights
@pytest.mark.parametrize("before", [PLAIN, NORM, GATE], ids=["plain", "norm", "gate"])
def test_values_and_gradients_are_those_of_the_equations(before: Before, rank: int, together: bool) -> None:
    inputs, layers = inputs_of(before, 11), layers_of(11, rank)
    if together:
        join([layer.weight for layer in layers])
    assert Whole(layers, torch.float64).folded == (rank == 3)
    tensors = [*inputs, *itertools.chain(*(layer[:4] for layer in layers))]
    trained = [each for each in tensors if each is not None and each.requires_grad]
    assert len(trained) >= 5
    ours, theirs = products(before, inputs, layers), by_equation(before, inputs, layers)
    gradients = []
    for outputs in (ours, theirs):
        total = (outputs * numbers(*outputs.shape, seed=9, trained=False)).sum()
        gradients.append(torch.autograd.grad(total, trained))
    for one, two in zip([ours, *gradients[0]], [theirs, *gradients[1]], strict=True):
        assert two.norm() > 0.1
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 3])
def test_outputs_in_pairs_are_the_same_ones_with_the_same_gradients(rank: int) -> None:
    inputs, layers = inputs_of(PLAIN, 16), layers_of(16, rank)[:3]
    layers[0] = Parts(numbers(8, 16, seed=1), numbers(8, seed=2), pairs=4)
    layers[1] = layers[1]._replace(pairs=2)
    layers[2] = layers[2]._replace(pairs=6)
    trained = [each for layer in layers for each in layer[:4] if each is not None and each.requires_grad]
    assert len(trained) == 4 and Whole(layers, torch.float64).folded == (rank == 3)
    grad = numbers(2, 3, 18, seed=9, trained=False)
    expected = torch.autograd.grad((by_equation(PLAIN, inputs, layers) * grad).sum(), [*inputs, *trained])
    paired = [0, 2, 1, 3, 4, 6, 5, 7, 8, 9, 10, 11, 12, 15, 13, 16, 14, 17]
    found = products(PLAIN, inputs, layers)
    torch.testing.assert_close(found, by_equation(PLAIN, inputs, layers)[..., paired])
    gradients = torch.autograd.grad((found * grad[..., paired]).sum(), [*inputs, *trained])
    for one, two in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, two)


def test_joined_matrices_are_one_in_memory_and_others_are_copied() -> None:
    weights = [numbers(size, 7, seed=size) for size in (5, 4, 6)]
    copies = [weight.detach().clone() for weight in weights]
    assert joined(weights).untyped_storage().data_ptr() != weights[0].untyped_storage().data_ptr()
    join(weights)
    for some in (weights, weights[1:], weights[:1]):
        whole = joined(some)
        assert whole.data_ptr() == some[0].data_ptr() and not whole.requires_grad
    for found in (weights, joined(weights).split([5, 4, 6])):
        assert all(one.equal(two) for one, two in zip(found, copies, strict=True))
    for apart in (
        weights[::-1],
        weights[::2],
        [weights[0], copies[1]],
        [weights[0][:, :3], weights[1][:, :3]],
    ):
        whole = joined(apart)
        assert whole.equal(torch.cat([each.detach() for each in apart]))
        assert whole.untyped_storage().data_ptr() != weights[0].untyped_storage().data_ptr()
