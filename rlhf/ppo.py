"""Proximal policy optimization against a reward with a KL penalty to the SFT policy.

B episodes, R response positions. Schulman et al. 2017, https://arxiv.org/abs/1707.06347; Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593. One update: sample, score, build the experience, learn from it for some
epochs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.batches import Experience, Rollout, join, left_pad
from rlhf.engine import Engine
from rlhf.models.roles import ActorCritic, Roles
from rlhf.numerics.advantages import gae, leave_one_out, shaped_rewards
from rlhf.numerics.kl import k1
from rlhf.numerics.losses import policy_loss, value_loss
from rlhf.numerics.masked import masked_mean, masked_sum, whiten, zero_rest
from rlhf.schemas import Demonstration
from rlhf.text import TextCodec
from rlhf.training_state import permutation

ADAM_EPSILON = 1e-5

# What an optimizer step says of the policy, summed over micro-batches.
POLICY_TERMS = ("policy_loss", "entropy", "ratio", "approx_kl", "clip_fraction")


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
) -> Experience:
    """Score a rollout: old and reference log-probs, values, shaped rewards, advantages and returns.

    Old log-probs come from the learner's own forward pass. Advantages are whitened over the whole batch.
    `baseline`, of REINFORCE, is a number or one a row (B,); None stands for the batch's mean reward.
    """
    models, engine = roles.actor_critic, roles.engine
    old, ref = policy_and_reference(roles, rollout, temperature=config.temperature)
    value = torch.zeros_like(old)
    if models.critic is not None:
        with models.as_critic():
            value = _of_all_rows(models.values, rollout, engine)
    mask = rollout.response_mask
    rewards = shaped_rewards(old, ref, scores, mask, kl_coef)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    if config.algo == "ppo":
        advantages, returns = gae(rewards, value, mask, gamma=config.gae.gamma, lam=config.gae.lam)
    else:
        advantages = _sequence_advantages(rewards.sum(1), mask, config, baseline)
        returns = advantages + value
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(rollout, old, ref, value, rewards, advantages, returns, scores)


@torch.no_grad()
def policy_and_reference(roles: Roles, rollout: Rollout, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs (B, R) of a rollout under the policy and under the reference."""
    policy = functools.partial(roles.actor_critic.logprobs, temperature=temperature)
    reference = functools.partial(roles.reference.logprobs, temperature=temperature)
    old = _of_all_rows(policy, rollout, roles.engine)
    with roles.reference.acting():
        return old, _of_all_rows(reference, rollout, roles.engine)


def _of_all_rows(role: Callable[[Rollout], Tensor], rollout: Rollout, engine: Engine) -> Tensor:
    """What a role says (B, R) of a rollout, computed in micro-batches."""
    rows = engine.micro_batches(rollout.lengths())
    pieces = [rollout.rows(index) for index in rows]
    table = torch.zeros(rollout.response_mask.shape, device=rollout.tokens.device)
    with engine.autocast():  # around all pieces, so that trained weights are rounded once
        for index, found in zip(rows, engine.shared_out(role, pieces), strict=True):
            table[index, : found.shape[1]] = found
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


class PretrainingMix:
    """Texts whose loss is mixed in (PTX). Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, eq. 2."""

    def __init__(
        self,
        demonstrations: Sequence[Demonstration],
        codec: TextCodec,
        device: torch.device,
        *,
        max_response_tokens: int,
    ) -> None:
        pairs = [
            (codec.encode_prompt(each.prompt), codec.encode_response(each.response))
            for each in demonstrations
        ]
        fitting = [pair for pair in pairs if len(pair[1]) <= max_response_tokens]
        if not fitting:
            raise ValueError(
                f"ptx_coef: all {len(pairs)} responses of data.demonstrations.train are longer than "
                f"data.max_response_tokens={max_response_tokens}: raise it, or set ptx_coef=0"
            )
        if len(fitting) < len(pairs):
            print(
                f"ptx: {len(pairs) - len(fitting)} of {len(pairs)} texts left out, their responses are "
                f"longer than data.max_response_tokens={max_response_tokens}"
            )
        self.prompts, self.responses = zip(*fitting, strict=True)
        self.pad_token_id, self.device = codec.pad_token_id, device

    def batch(self, size: int, *seed: int) -> Rollout:
        """`size` texts, chosen by the seeds alone."""
        order = permutation(len(self.prompts), *seed).tolist()
        chosen = [order[i % len(order)] for i in range(size)]
        prompts = left_pad([self.prompts[i] for i in chosen], self.pad_token_id, self.device)
        return join(prompts, [self.responses[i] for i in chosen], self.pad_token_id)


class Learner:
    """The optimizer of policy and critic, and the epochs of minibatches that make one update."""

    def __init__(
        self, models: ActorCritic, engine: Engine, config: Any, *, mix: PretrainingMix | None = None
    ) -> None:
        self.models, self.engine, self.config, self.mix = models, engine, config, mix
        self.step = 0
        groups = [
            {"params": models.policy_parameters(), "lr": config.learning_rate},
            {"params": models.critic_parameters(), "lr": config.critic_learning_rate},
        ]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            groups, eps=ADAM_EPSILON, weight_decay=0.0, fused=True
        )

    def set_learning_rates(self, step: int) -> None:
        """Linear warm-up over `warmup_updates`, then linear decay to 0 after the last update; `step` counts
        from 1.
        """
        config = self.config
        warm = min(1.0, step / max(config.warmup_updates, 1))
        left = (config.updates - step + 1) / max(config.updates - config.warmup_updates, 1)
        for group, rate in zip(
            self.optimizer.param_groups, (config.learning_rate, config.critic_learning_rate), strict=True
        ):
            group["lr"] = rate * min(warm, left, 1.0)

    def update(self, experience: Experience, *, step: int) -> dict[str, float]:
        """Run epochs x minibatches optimizer steps on an experience and return the means of their metrics."""
        config, history = self.config, []
        self.step = step
        self.set_learning_rates(step)
        num_episodes = len(experience.scores)
        for epoch in range(config.epochs):
            order = torch.from_numpy(permutation(num_episodes, config.seed, step, epoch))
            for index, rows in enumerate(order.tensor_split(config.minibatches)):
                batch = experience.rows(rows)
                texts = self.mix.batch(len(rows), config.seed, step, epoch, index) if self.mix else None
                history.append(self.minibatch(batch, texts))
            if config.approx_kl_stop is not None and history[-1]["approx_kl"] > config.approx_kl_stop:
                break
        metrics = {name: sum(each[name] for each in history) / len(history) for name in history[0]}
        return metrics | {
            "first_ratio": history[0]["ratio"],
            "first_approx_kl": history[0]["approx_kl"],
            "optimizer_steps": len(history),
        }

    def minibatch(self, batch: Experience, texts: Rollout | None = None) -> dict[str, float]:
        """One optimizer step; its gradient does not depend on how the rows are cut into micro-batches.

        The loss of `texts` (PTX) is summed into it.
        """
        denominator = batch.rollout.response_mask.sum()
        self.optimizer.zero_grad(set_to_none=True)
        pieces = [batch.rows(index) for index in self.engine.micro_batches(batch.rollout.lengths())]
        terms = self.descend(functools.partial(self.policy_terms, denominator=denominator), pieces)
        totals = dict(zip(POLICY_TERMS, terms, strict=True))
        if self.models.critic is not None:
            with self.models.as_critic():
                value_terms = functools.partial(self.value_terms, denominator=denominator)
                [totals["value_loss"]] = self.descend(value_terms, pieces)
        if texts is not None:
            num_tokens = texts.response_mask.sum()
            rollouts = [texts.rows(index) for index in self.engine.micro_batches(texts.lengths())]
            text_terms = functools.partial(self.text_terms, denominator=num_tokens)
            [totals["ptx_loss"]] = self.descend(text_terms, rollouts)
        norms = {
            "policy_grad_norm": torch.nn.utils.clip_grad_norm_(
                self.models.policy_parameters(), self.config.clip.grad_norm
            ),
        }
        if self.models.critic is not None:
            norms["critic_grad_norm"] = torch.nn.utils.clip_grad_norm_(
                self.models.critic_parameters(), self.config.clip.grad_norm
            )
        totals |= {name: float(norm) for name, norm in norms.items()}
        check_finite(totals, self.step)
        self.optimizer.step()
        return totals

    def descend(self, terms: Callable[[Any], Tensor], pieces: Sequence[Any]) -> list[float]:
        """Accumulate the gradient of the sum over pieces of the first term; return the sums of the others.

        Each worker goes through its pieces, one forward and backward after the other, and sums its own
        gradients: the result does not depend on which is first.
        """
        parameters = [*self.models.policy_parameters(), *self.models.critic_parameters()]
        no_gradients: list[Tensor | None] = [None] * len(parameters)

        processes = self.engine.processes
        pieces = processes.share(pieces)

        def work(mine: Sequence[Any]) -> tuple[Tensor, list[Tensor | None]]:
            totals, gradients = torch.zeros(()), no_gradients
            for piece in mine:
                found = terms(piece)
                with self.engine.no_autocast():
                    gradients = _add(gradients, torch.autograd.grad(found[0], parameters, allow_unused=True))
                totals = totals + found.detach().cpu()
            return totals, gradients

        shares = [pieces[k :: self.engine.workers] for k in range(min(self.engine.workers, len(pieces)))]
        with self.engine.autocast():  # around all pieces, so that trained weights are rounded once
            results = self.engine.side_by_side(work, shares)
        totals, gradients = torch.zeros(()), no_gradients  # where there is less than a piece for each process
        for terms_of_one, gradients_of_one in results:
            totals, gradients = totals + terms_of_one, _add(gradients, gradients_of_one)
        gradients = processes.sum_gradients(parameters, gradients)
        sums = _add([parameter.grad for parameter in parameters], gradients)
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient
        return functools.reduce(torch.add, processes.all_of(totals))[1:].tolist()

    def policy_terms(self, piece: Experience, *, denominator: Tensor) -> Tensor:
        """What the policy minimises on one micro-batch, and its POLICY_TERMS."""
        config, mask = self.config, piece.rollout.response_mask
        logprobs, entropies = self.models.logprobs_and_entropy(
            piece.rollout, temperature=config.temperature, learn_entropy=config.entropy_coef > 0
        )
        loss, metrics = policy_loss(
            logprobs, piece.logprobs, piece.advantages, mask, clip=config.clip.policy, denominator=denominator
        )
        entropy = masked_mean(entropies, mask, denominator=denominator)
        shown = (loss, entropy, metrics["ratio_mean"], metrics["approx_kl"], metrics["clip_fraction"])
        return torch.stack([loss - config.entropy_coef * entropy, *(term.detach() for term in shown)])

    def value_terms(self, piece: Experience, *, denominator: Tensor) -> Tensor:
        """What the critic minimises on one micro-batch, and its loss."""
        loss = value_loss(
            self.models.values(piece.rollout),
            piece.values,
            piece.returns,
            piece.rollout.response_mask,
            clip=self.config.clip.value,
            denominator=denominator,
        )
        return torch.stack([self.config.value_coef * loss, loss.detach()])

    def text_terms(self, texts: Rollout, *, denominator: Tensor) -> Tensor:
        """`ptx_coef` times the loss of texts per token, and that loss."""
        logprobs = self.models.logprobs(texts, temperature=1.0)
        loss = -masked_mean(logprobs, texts.response_mask, denominator=denominator)
        return torch.stack([self.config.ptx_coef * loss, loss.detach()])


def _add(sums: Sequence[Tensor | None], new: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Add gradients into those so far; no second set of them is held."""
    return [b if a is None else a if b is None else a.add_(b) for a, b in zip(sums, new, strict=True)]


def check_finite(numbers: dict[str, float], step: int) -> None:
    """Stop where a number of update `step` is not finite, naming it."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(
                f"{name} is {number} at update {step}: the run stops before this changes a weight. Lower "
                "learning_rate, raise kl.coef, or use engine.dtype=float32; the last checkpoint is good"
            )


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
