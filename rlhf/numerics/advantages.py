"""From scores and log-probabilities to per-token rewards, advantages and returns.

Position t is the t-th generated token: `logprobs[t]` scores it, `values[t]` is the state before it,
`rewards[t]` comes after it. Responses are padded right. Letters: B sequences, R response positions.
"""

import torch
from torch import Tensor

from rlhf.numerics.kl import k1
from rlhf.numerics.masked import last_true_index, zero_rest


@torch.no_grad()
def shaped_rewards(
    logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """Return rewards[t] = -kl_coef * (logprobs[t] - ref_logprobs[t]), plus the score on the last real token.

    Shapes: (B, R), (B, R), (B,), (B, R) -> (B, R); 0 where the mask is False. The last real token is EOS, or
    the final token of a response that was cut. The penalty is k1 and cannot be chosen: in the reward only k1
    has the gradient of KL, and k3 can point the wrong way. Stiennon et al. (2020),
    https://arxiv.org/abs/2009.01325.
    """
    assert logprobs.shape == ref_logprobs.shape == response_mask.shape, (logprobs.shape, response_mask.shape)
    assert scores.shape == logprobs.shape[:1], (scores.shape, logprobs.shape)
    rewards = zero_rest(-kl_coef * k1(logprobs, ref_logprobs), response_mask)
    return rewards.scatter_add(1, last_true_index(response_mask)[:, None], scores.float()[:, None])


@torch.no_grad()
def leave_one_out(rewards: Tensor, num_samples: int) -> Tensor:
    """Return each reward (B,) minus the mean of the other samples of its prompt, which stand beside it.

    B is a multiple of `num_samples` >= 2. RLOO: Ahmadian et al. (2024), https://arxiv.org/abs/2402.14740.
    """
    assert num_samples >= 2 and rewards.dim() == 1 and len(rewards) % num_samples == 0, rewards.shape
    groups = rewards.double().view(-1, num_samples)  # equal rewards leave nothing, however large they are
    others = (groups.sum(1, keepdim=True) - groups) / (num_samples - 1)
    return (groups - others).flatten().to(rewards.dtype)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return generalised advantages and the returns that the critic learns.

    delta[t] = rewards[t] + gamma * values[t+1] - values[t], where the value after the last real token is 0;
    advantages[t] = delta[t] + gamma * lam * advantages[t+1]; returns = advantages + values. Shapes (B, R) ->
    (B, R); 0 where the mask is False. Schulman et al. (2016), https://arxiv.org/abs/1506.02438.
    """
    assert rewards.shape == values.shape == mask.shape and mask.dim() == 2, (
        rewards.shape,
        values.shape,
        mask.shape,
    )
    assert not (mask[:, 1:] & ~mask[:, :-1]).any(), "responses must be padded right"
    rewards, values = zero_rest(rewards, mask), zero_rest(values, mask)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    advantages = rewards + gamma * next_values - values
    for t in reversed(range(mask.shape[1] - 1)):
        advantages[:, t] += gamma * lam * advantages[:, t + 1]
    return advantages, advantages + values
