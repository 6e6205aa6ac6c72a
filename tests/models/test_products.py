"""Products with what comes before them have the values and gradients of their equations."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlhf.models.products import GATE, PLAIN, Before, Parts, RmsNorm, products

NORM = RmsNorm(1e-5)


def numbers(*shape: int, seed: int, trained: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(trained)


def inputs_of(before: Before, width: int) -> list[Tensor]:
    x = numbers(2, 3, width, seed=1)
    if before is PLAIN:
        return [x]
    return [x, numbers(2, 3, width, seed=2)] if before is GATE else [x, numbers(width, seed=3)]


def by_equation(before: Before, inputs: list[Tensor], layers: list[Parts]) -> list[Tensor]:
    x = inputs[0]
    if before is NORM:
        x = inputs[1] * x / (x.square().mean(-1, keepdim=True) + NORM.epsilon).sqrt()
    elif before is GATE:
        x = inputs[0] * torch.sigmoid(inputs[0]) * inputs[1]
    found = []
    for layer in layers:
        y = functional.linear(x, layer.weight, layer.bias)
        if layer.a is not None and layer.b is not None:
            y = y + layer.scaling * (x @ layer.a.t()) @ layer.b.t()
        found.append(y)
    return found


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


@pytest.mark.parametrize("rank", [1, 3])  # with the second it is cheaper to add the adapters to the weights
@pytest.mark.parametrize("before", [PLAIN, NORM, GATE], ids=["plain", "norm", "gate"])
def test_values_and_gradients_are_those_of_the_equations(before: Before, rank: int) -> None:
    inputs, layers = inputs_of(before, 7), layers_of(7, rank)
    assert (layers[1].folded() is layers[1]) == (rank == 1)
    tensors = [*inputs, *itertools.chain(*(layer[:4] for layer in layers))]
    trained = [each for each in tensors if each is not None and each.requires_grad]
    assert len(trained) >= 5
    ours, theirs = products(before, inputs, layers), by_equation(before, inputs, layers)
    gradients = []
    for outputs in (ours, theirs):
        total = sum((y * numbers(*y.shape, seed=9, trained=False)).sum() for y in outputs)
        assert isinstance(total, Tensor)
        gradients.append(torch.autograd.grad(total, trained))
    for one, two in zip([*ours, *gradients[0]], [*theirs, *gradients[1]], strict=True):
        assert two.norm() > 0.1
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
