"""The clipped losses of PPO.

Both are masked sums over `denominator`, the token count of the whole optimizer step over all processes and
micro-batches, so the losses of micro-batches add up to the loss of the batch. Letters: B sequences, R
response positions. Schulman et al. (2017), https://arxiv.org/abs/1707.06347.
"""

import torch
from torch import Tensor

from rlhf.numerics.kl import k3
from rlhf.numerics.masked import masked_sum, zero_rest


def policy_loss(  # noqa: PLR0913 (four tensors of one step and two numbers)
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: float,
    denominator: Tensor | float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the clipped policy loss and its metrics.

    ratio = exp(logprobs - old_logprobs); loss = sum max(-advantages * ratio, -advantages * clamp(ratio, 1 -
    clip, 1 + clip)) / denominator. Shapes (B, R) -> scalar. Metrics are detached sums over the same
    denominator, so micro-batches' metrics add up: clip_fraction (tokens held by the clip, whose gradient is
    0), approx_kl (k3 of old against new), ratio_mean.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape, (logprobs.shape, advantages.shape)
    logprobs, old_logprobs = zero_rest(logprobs, mask), zero_rest(old_logprobs.detach(), mask)
    advantages = zero_rest(advantages.detach(), mask)
    ratio = torch.exp(logprobs - old_logprobs)
    free = -advantages * ratio
    held = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_sum(torch.maximum(free, held), mask) / denominator
    measures = {"clip_fraction": held > free, "approx_kl": k3(old_logprobs, logprobs), "ratio_mean": ratio}
    return loss, {name: masked_sum(value.detach(), mask) / denominator for name, value in measures.items()}


def value_loss(  # noqa: PLR0913 (four tensors of one step and two numbers)
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float,
    denominator: Tensor | float,
) -> Tensor:
    """Return the clipped value loss.

    sum 0.5 * max((values - returns)^2, (clamp(values, old_values - clip, old_values + clip) - returns)^2)
    / denominator. Shapes (B, R) -> scalar.
    """
    assert values.shape == old_values.shape == returns.shape, (values.shape, returns.shape)
    values = zero_rest(values, mask)
    old_values, returns = zero_rest(old_values.detach(), mask), zero_rest(returns.detach(), mask)
    held = values.clamp(old_values - clip, old_values + clip)
    losses = 0.5 * torch.maximum((values - returns).square(), (held - returns).square())
    return masked_sum(losses, mask) / denominator
