"""Laws and golden numbers of the clipped losses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.numerics.losses import policy_loss, value_loss

NAN = float("nan")

# Per token max(-A * r, -A * clamp(r, .8, 1.2)): max(-1.5, -1.2), max(1.5, 1.2), max(-.5, -.8), max(.5, .8).
# d loss / d logprob = -A * r where the free term holds, 0 where the clip does (first and last).
# log r = .405465 twice, -.693147 twice: mean k2 = (.164402 + .480453) / 4; mean k3 of r - 1 - log r =
# (.094535 + .193147) / 2 = .143841.
POLICY: dict[str, Any] = {
    "ratio": [1.5, 1.5, 0.5, 0.5],
    "advantages": [1.0, -1.0, 1.0, -1.0],
    "clip": 0.2,
    "loss": [-1.2, 1.5, -0.5, 0.8],
    "grad_logprob": [0.0, 1.5, -0.5, 0.0],
    "clip_fraction": [1, 0, 0, 1],
    "mean_k3": 0.143841,
}

# clamp(v, .3, .7) = .7, .6, .3; 0.5 * max((v - 1)^2, (clamped - 1)^2) = .5 * max(.01, .09), .5 * .16,
# .5 * max(.81, .49); the gradient is v - 1 where the free term holds and 0 where the clip does
VALUE: dict[str, Any] = {
    "old_value": 0.5,
    "values": [0.9, 0.6, 0.1],
    "return": 1.0,
    "clip": 0.2,
    "loss": [0.045, 0.08, 0.405],
    "grad": [0.0, -0.4, -0.9],
}


def random_step(padding: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Return tensors (6, 5 + padding) of a step that clips some tokens, NaN where padded, and the mask."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5 + padding)[None] < torch.tensor([5, 1, 3, 4, 2, 5])[:, None]
    tensors = {}
    for name in ("new", "old", "target"):
        values = torch.randn(6, 5, generator=generator) / 2
        values = torch.nn.functional.pad(values, (0, padding))
        tensors[name] = values.masked_fill(~mask, NAN)
    return tensors, mask


def both_losses(new: Tensor, old: Tensor, target: Tensor, mask: Tensor, denominator: Tensor) -> Tensor:
    """Return policy loss, value loss and the policy's metrics as one vector."""
    loss, metrics = policy_loss(new, old, target, mask, clip=0.2, denominator=denominator)
    values = value_loss(new, old, target, mask, clip=0.2, denominator=denominator)
    return torch.stack([loss, values, *metrics.values()])


def losses_and_gradient(tensors: dict[str, Tensor], mask: Tensor, parts: int = 1) -> tuple[Tensor, Tensor]:
    """Return `both_losses` summed over micro-batches that share the step's token count, and the gradient."""
    new = tensors["new"].clone().requires_grad_()
    total = torch.zeros(5)
    for rows in torch.arange(len(mask)).chunk(parts):
        total = total + both_losses(
            new[rows], tensors["old"][rows], tensors["target"][rows], mask[rows], mask.sum()
        )
    total[:2].sum().backward()
    assert new.grad is not None
    return total.detach(), new.grad


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_nan_in_padding_reaches_no_loss_metric_or_gradient() -> None:
    tensors, mask = random_step()
    losses, gradient = losses_and_gradient(tensors, mask)
    assert torch.isfinite(losses).all()
    assert (gradient[~mask] == 0).all() and torch.isfinite(gradient).all()
    assert (gradient[mask] != 0).any()


def test_padding_amount_changes_nothing() -> None:
    losses, gradient = losses_and_gradient(*random_step(padding=3))
    assert_same((losses, gradient[:, :5]), losses_and_gradient(*random_step()))


def test_row_order_changes_nothing() -> None:
    order = torch.tensor([3, 5, 0, 2, 1, 4])
    tensors, mask = random_step()
    permuted = {name: values[order] for name, values in tensors.items()}
    losses, gradient = losses_and_gradient(tensors, mask)
    assert_same(losses_and_gradient(permuted, mask[order]), (losses, gradient[order]))


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_micro_batch_split_with_a_shared_denominator_changes_nothing(parts: int) -> None:
    tensors, mask = random_step()
    assert_same(losses_and_gradient(tensors, mask, parts), losses_and_gradient(tensors, mask))


def test_before_the_first_step_ratio_is_1_kl_0_and_the_loss_minus_the_mean_advantage() -> None:
    tensors, mask = random_step()
    loss, metrics = policy_loss(
        tensors["new"], tensors["new"], tensors["target"], mask, clip=0.2, denominator=mask.sum()
    )
    assert loss.item() == pytest.approx(-tensors["target"][mask].mean().item(), abs=1e-6)
    found = {name: value.item() for name, value in metrics.items()}
    assert found == {"clip_fraction": 0.0, "approx_kl": 0.0, "ratio_mean": pytest.approx(1.0)}


def test_policy_loss_golden() -> None:
    logprobs = torch.tensor([[math.log(ratio) - 1.0 for ratio in POLICY["ratio"]]], requires_grad=True)
    old, advantages = torch.full((1, 4), -1.0), torch.tensor([POLICY["advantages"]])
    for t in range(4):
        only = torch.arange(4)[None] == t
        loss, metrics = policy_loss(logprobs, old, advantages, only, clip=POLICY["clip"], denominator=1)
        assert loss.item() == pytest.approx(POLICY["loss"][t], abs=1e-5)
        assert metrics["clip_fraction"].item() == POLICY["clip_fraction"][t]
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, metrics = policy_loss(logprobs, old, advantages, mask, clip=POLICY["clip"], denominator=4)
    loss.backward()
    assert logprobs.grad is not None
    assert (4 * logprobs.grad)[0].tolist() == pytest.approx(POLICY["grad_logprob"], abs=1e-5)
    assert logprobs.grad[0, 0] == 0 and logprobs.grad[0, 3] == 0, "a clipped gradient is exactly 0"
    assert metrics["approx_kl"].item() == pytest.approx(POLICY["mean_k3"], abs=1e-5)
    assert metrics["ratio_mean"].item() == pytest.approx(1.0, abs=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


def test_value_loss_golden() -> None:
    values = torch.tensor([[*VALUE["values"], NAN]], requires_grad=True)
    old, returns = torch.full((1, 4), VALUE["old_value"]), torch.full((1, 4), VALUE["return"])
    for t in range(3):
        loss = value_loss(values, old, returns, torch.arange(4)[None] == t, clip=VALUE["clip"], denominator=1)
        assert loss.item() == pytest.approx(VALUE["loss"][t], abs=1e-5)
    mask = torch.tensor([[True, True, True, False]])
    value_loss(values, old, returns, mask, clip=VALUE["clip"], denominator=1).backward()
    assert values.grad is not None
    assert values.grad[0].tolist() == pytest.approx([*VALUE["grad"], 0.0], abs=1e-5)
    assert values.grad[0, 0] == 0, "a clipped gradient is exactly 0"


def test_the_golden_numbers_are_those_of_the_file(shared: Path) -> None:
    golden = json.loads((shared / "golden.json").read_text())
    assert golden["policy_loss"].items() >= POLICY.items()
    assert golden["value_loss"].items() >= VALUE.items()


def test_only_the_new_predictions_are_differentiated() -> None:
    ones = torch.ones(1, 2)
    old, target = ones.clone().requires_grad_(), ones.clone().requires_grad_()
    new, mask = (0.9 * ones).requires_grad_(), torch.ones(1, 2, dtype=torch.bool)
    loss, _ = policy_loss(new, old, target, mask, clip=0.2, denominator=2)
    (loss + value_loss(new, old, target, mask, clip=0.2, denominator=2)).backward()
    assert new.grad is not None and old.grad is None and target.grad is None


def test_shapes_that_do_not_fit_are_refused() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(AssertionError):
        policy_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1), mask, clip=0.2, denominator=6)
    with pytest.raises(AssertionError):
        value_loss(torch.ones(2, 3), torch.ones(1, 3), torch.ones(2, 3), mask, clip=0.2, denominator=6)
