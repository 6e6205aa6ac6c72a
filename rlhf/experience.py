"""What an update learns from: log-probs, values, shaped rewards, advantages and returns of a rollout.

B episodes, R response positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.batches import Experience, Rollout
from rlhf.engine import Engine
from rlhf.models.roles import ActorCritic, Roles
from rlhf.numerics.advantages import gae, leave_one_out, shaped_rewards
from rlhf.numerics.kl import k1
from rlhf.numerics.masked import masked_mean, masked_sum, whiten, zero_rest


@dataclass(frozen=True)
class MissingEos:
    """What happens to the score of a response without EOS: `score` replaces it; where that is None, `penalty`
    is taken off.
    """

    score: float | None
    penalty: float


def final_scores(scores: Tensor, rollout: Rollout, eos_token_id: int, missing: MissingEos) -> Tensor:
    """Scores (B,) with the rule for responses without EOS applied, after any normalisation of the model's
    score.
    """
    lengths = rollout.response_mask.sum(1, keepdim=True)
    ended = rollout.response_tokens.gather(1, lengths - 1).squeeze(1) == eos_token_id
    scores = scores.to(ended.device)
    instead = scores - missing.penalty if missing.score is None else torch.full_like(scores, missing.score)
    return torch.where(ended, scores, instead)


@torch.no_grad()
def build_experience(  # noqa: PLR0913 (a rollout, its scores, and what they are weighed with)
    roles: Roles,
    rollout: Rollout,
    scores: Tensor,
    *,
    config: Any,
    kl_coef: float,
    baseline: Tensor | float | None = None,
    passes: Passes | None = None,
    gold: Tensor | None = None,
) -> Experience:
    """Score a rollout: old and reference log-probs, values, shaped rewards, advantages and returns.

    Old log-probs come from the learner's own forward pass. Advantages are whitened over the whole batch.
    `baseline`, of REINFORCE, is a number or one a row (B,); None stands for the batch's mean reward. `passes`
    are those of `Learner.first_step`, where gradients are wanted of them too. `gold` (B, R) are tokens that
    the policy has not drawn: they have no part in KL, reward and whitening, and an advantage of
    `mixer.xent_coef`, with which their policy gradient is that of cross-entropy.
    """
    models, mask = roles.actor_critic, rollout.response_mask
    scores = scores.to(mask.device)
    passes = passes or Passes(rollout, models, roles.engine, temperature=config.temperature)
    old, ref = policy_and_reference(roles, passes)
    drawn = mask
    if gold is not None:
        drawn, ref = mask & ~gold, torch.where(gold, old, ref)
    rewards = shaped_rewards(old, ref, scores, mask, kl_coef)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    value = torch.zeros_like(old)
    if models.critic is not None:
        with models.as_critic():
            value = passes.values(rewards)
    if config.algo == "ppo":
        advantages, returns = gae(rewards, value, mask, gamma=config.gae.gamma, lam=config.gae.lam)
    else:
        advantages = _sequence_advantages(rewards.sum(1), mask, config, baseline)
        returns = advantages + value
    if config.whiten_advantages:
        advantages = whiten(advantages, drawn)
    if gold is not None:
        advantages = advantages.masked_fill(gold, config.mixer.xent_coef)
    return Experience(rollout, old, ref, value, rewards, advantages, returns, scores)


@torch.no_grad()
def policy_and_reference(roles: Roles, passes: Passes) -> tuple[Tensor, Tensor]:
    """Log-probs (B, R) of a rollout under the policy and under the reference."""
    old = passes.table(passes.logprobs)
    with roles.reference.acting():
        return old, passes.table(
            lambda number: roles.reference.logprobs(passes.rollouts[number], temperature=passes.temperature)
        )


class Passes:
    """A rollout cut into micro-batches, and what policy and critic say of them. Given the rows of an
    optimizer step, theirs come first and are cut as that step cuts them; `num_first` counts them.
    """

    def __init__(
        self,
        rollout: Rollout,
        models: ActorCritic,
        engine: Engine,
        *,
        temperature: float,
        first: Tensor | None = None,
    ) -> None:
        self.models, self.engine, self.temperature = models, engine, temperature
        lengths, everything = rollout.lengths(), torch.arange(len(rollout.tokens))
        first = everything[:0] if first is None else first
        groups = [first, everything[~torch.isin(everything, first)]]
        cuts = [
            [group[index] for index in engine.micro_batches([lengths[row] for row in group.tolist()])]
            for group in groups
            if len(group)
        ]
        self.shape, self.device = rollout.response_mask.shape, rollout.tokens.device
        self.rows = [index for group in cuts for index in group]
        self.rollouts = [rollout.rows(index) for index in self.rows]
        self.num_first = len(cuts[0]) if len(first) else 0

    def logprobs(self, number: int) -> Tensor:
        """The policy's log-probs of a pass."""
        return self.models.logprobs(self.rollouts[number], temperature=self.temperature)

    def values(self, rewards: Tensor) -> Tensor:
        """The critic's values (B, R) of all rows; `rewards` (B, R) are theirs. Asked for while it acts."""
        return self.table(lambda number: self.models.values(self.rollouts[number]))

    def table(self, function: Callable[[int], Tensor]) -> Tensor:
        """What `function` says (B, R) of all rows, from what it says of each pass, by its number."""
        table = torch.zeros(self.shape, device=self.device)
        with self.engine.autocast():  # around all passes, so that trained weights are rounded once
            found = self.engine.shared_out(function, range(len(self.rows)))
        for index, piece in zip(self.rows, found, strict=True):
            table[index, : piece.shape[1]] = piece
        return table


def _sequence_advantages(
    rewards: Tensor, mask: Tensor, config: Any, baseline: Tensor | float | None
) -> Tensor:
    """Advantages (B, R) without a critic: a response is one action, whose gain all its tokens share."""
    if config.algo == "rloo":
        gains = leave_one_out(rewards, config.rollouts_per_prompt)
    else:
        gains = rewards - (rewards.mean() if baseline is None else baseline)
    return zero_rest(gains.unsqueeze(1).expand(mask.shape), mask)


def experience_metrics(
    experience: Experience, eos_token_id: int, *, has_critic: bool = True
) -> dict[str, float]:
    """What the rollout itself says: score, KL per sequence as trained on, length, share ended, value fit."""
    mask = experience.rollout.response_mask
    lengths = mask.sum(1)
    last = experience.rollout.response_tokens.gather(1, (lengths - 1).unsqueeze(1)).squeeze(1)
    found = {
        "score": float(experience.scores.mean()),
        "score_std": float(experience.scores.std(correction=0)),
        "kl": float(masked_sum(k1(experience.logprobs, experience.ref_logprobs), mask) / len(lengths)),
        "reward": float(masked_sum(experience.rewards, mask) / len(lengths)),
        "length": float(lengths.float().mean()),
        "share_ended": float((last == eos_token_id).float().mean()),
    }
    if not has_critic:
        return found
    errors = experience.returns - experience.values
    variance = masked_mean((experience.returns - masked_mean(experience.returns, mask)).square(), mask)
    explained = 1 - masked_mean(errors.square(), mask) / variance.clamp(min=1e-8)
    return {**found, "explained_variance": float(explained)}
