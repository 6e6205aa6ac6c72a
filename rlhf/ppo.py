"""Proximal policy optimization against a reward with a KL penalty to the SFT policy.

B episodes, R response positions. Schulman et al. 2017, https://arxiv.org/abs/1707.06347; Ziegler et al. 2019,
https://arxiv.org/abs/1909.08593. One update: sample, score, build the experience, learn from it for some
epochs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.batches import Experience, Rollout, join, left_pad
from rlhf.engine import Engine
from rlhf.models.roles import ActorCritic, Reference, Roles
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
    first: FirstStep | None = None,
) -> Experience:
    """Score a rollout: old and reference log-probs, values, shaped rewards, advantages and returns.

    Old log-probs come from the learner's own forward pass. Advantages are whitened over the whole batch.
    `baseline`, of REINFORCE, is a number or one a row (B,); None stands for the batch's mean reward. With
    `first`, of `Learner.first_step`, the critic's gradients of that step are left behind too.
    """
    models, mask = roles.actor_critic, rollout.response_mask
    old, ref = policy_and_reference(roles, rollout, temperature=config.temperature, first=first)
    rewards = shaped_rewards(old, ref, scores, mask, kl_coef)
    if config.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    value = torch.zeros_like(old)
    if models.critic is not None:
        with models.as_critic():
            if first is not None:
                value = first.values(rewards)
            else:
                passes = Passes(rollout, roles.engine)
                value = passes.table(lambda number: models.values(passes.rollouts[number]))
    if config.algo == "ppo":
        advantages, returns = gae(rewards, value, mask, gamma=config.gae.gamma, lam=config.gae.lam)
    else:
        advantages = _sequence_advantages(rewards.sum(1), mask, config, baseline)
        returns = advantages + value
    if config.whiten_advantages:
        advantages = whiten(advantages, mask)
    return Experience(rollout, old, ref, value, rewards, advantages, returns, scores)


@torch.no_grad()
def policy_and_reference(
    roles: Roles, rollout: Rollout, *, temperature: float, first: FirstStep | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs (B, R) of a rollout under the policy and under the reference."""
    passes = Passes(rollout, roles.engine) if first is None else first.passes

    def logprobs(model: ActorCritic | Reference, number: int) -> Tensor:
        return model.logprobs(passes.rollouts[number], temperature=temperature)

    policy = functools.partial(logprobs, roles.actor_critic) if first is None else first.logprobs
    old = passes.table(policy)
    with roles.reference.acting():
        return old, passes.table(functools.partial(logprobs, roles.reference))


class Passes:
    """A rollout cut into micro-batches. Given the rows of an optimizer step, theirs come first and are cut as
    that step cuts them; `num_first` counts them.
    """

    def __init__(self, rollout: Rollout, engine: Engine, first: Tensor | None = None) -> None:
        lengths, everything = rollout.lengths(), torch.arange(len(rollout.tokens))
        first = everything[:0] if first is None else first
        groups = [first, everything[~torch.isin(everything, first)]]
        cuts = [
            [group[index] for index in engine.micro_batches([lengths[row] for row in group.tolist()])]
            for group in groups
            if len(group)
        ]
        self.engine, self.shape, self.device = engine, rollout.response_mask.shape, rollout.tokens.device
        self.rows = [index for group in cuts for index in group]
        self.rollouts = [rollout.rows(index) for index in self.rows]
        self.num_first = len(cuts[0]) if len(first) else 0

    def table(self, function: Callable[[int], Tensor]) -> Tensor:
        """What `function` says (B, R) of all rows, from what it says of each pass, by its number."""
        table = torch.zeros(self.shape, device=self.device)
        with self.engine.autocast():  # around all passes, so that trained weights are rounded once
            found = self.engine.shared_out(function, range(len(self.rows)))
        for index, piece in zip(self.rows, found, strict=True):
            table[index, : piece.shape[1]] = piece
        return table


class FirstStep:
    """The passes of an update's first optimizer step. No weight has changed until then, so its log-probs and
    values are the old ones of its rows as well, and need no passes of their own.

    The critic learns while the experience is built: its returns take nothing but its own row's values. The
    policy's advantages wait for those of all rows, so the graphs of its passes are kept, as far as
    `engine.kept_tokens` go; the others are computed twice.
    """

    def __init__(self, learner: Learner, rollout: Rollout, rows: Tensor) -> None:
        self.learner = learner
        self.passes = Passes(rollout, learner.engine, rows)
        self.num_tokens = rollout.response_mask[rows].sum()
        sizes = [each.tokens.numel() for each in self.passes.rollouts[: self.passes.num_first]]
        engine, shares = learner.engine, learner.engine.workers * learner.engine.processes.count
        room = engine.kept_tokens * engine.processes.count
        self.num_kept = sum(total <= room for total in itertools.accumulate(sizes))
        if self.num_kept < len(sizes):
            self.num_kept -= self.num_kept % shares  # as many for each worker
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.value_loss = 0.0

    def kept_share(self) -> float:
        """The share of the first step's tokens whose passes are kept."""
        sizes = [each.tokens.numel() for each in self.passes.rollouts[: self.passes.num_first]]
        return sum(sizes[: self.num_kept]) / sum(sizes)

    @torch.enable_grad()
    def logprobs(self, number: int) -> Tensor:
        """The policy's log-probs of a pass.

        All passes have graphs, kept or not: autocast shares the weights that it rounds among them, and under
        earlier versions of torch one without a graph left the others without gradients.
        """
        outputs = self.learner.policy_outputs(self.passes.rollouts[number])
        if number < self.num_kept:
            self.kept[number] = outputs
        return outputs[0].detach()

    def values(self, rewards: Tensor) -> Tensor:
        """The critic's values (B, R), asked for while it acts; its gradients are summed up meanwhile."""
        learner, config, found = self.learner, self.learner.config, dict[int, Tensor]()

        def terms(number: int) -> Tensor:
            rollout = self.passes.rollouts[number]
            values, mask = learner.models.values(rollout), rollout.response_mask
            found[number] = values.detach()
            own = rewards[self.passes.rows[number], : mask.shape[1]]
            _, returns = gae(own, found[number], mask, gamma=config.gae.gamma, lam=config.gae.lam)
            return learner.value_terms(values, found[number], returns, mask, denominator=self.num_tokens)

        learner.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            [self.value_loss] = learner.descend(terms, range(self.passes.num_first))

        def values_of(number: int) -> Tensor:
            own = found.get(number)
            return learner.models.values(self.passes.rollouts[number]) if own is None else own

        return self.passes.table(values_of)


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

    def first_step(self, rollout: Rollout, *, step: int) -> FirstStep:
        """The first optimizer step of update `step` on a rollout, for `build_experience` and `update`."""
        return FirstStep(self, rollout, self._minibatches(len(rollout.tokens), step, epoch=0)[0])

    def _minibatches(self, num_episodes: int, step: int, epoch: int) -> Sequence[Tensor]:
        order = torch.from_numpy(permutation(num_episodes, self.config.seed, step, epoch))
        return order.tensor_split(self.config.minibatches)

    def update(
        self, experience: Experience, *, step: int, first: FirstStep | None = None
    ) -> dict[str, float]:
        """Run epochs x minibatches optimizer steps on an experience and return the means of their metrics.

        `first`: what the experience was built with.
        """
        config, history = self.config, []
        self.step = step
        self.set_learning_rates(step)
        for epoch in range(config.epochs):
            for index, rows in enumerate(self._minibatches(len(experience.scores), step, epoch)):
                batch = experience.rows(rows)
                texts = self.mix.batch(len(rows), config.seed, step, epoch, index) if self.mix else None
                history.append(self.minibatch(batch, texts, first))
                first = None
            if config.approx_kl_stop is not None and history[-1]["approx_kl"] > config.approx_kl_stop:
                break
        metrics = {name: sum(each[name] for each in history) / len(history) for name in history[0]}
        return metrics | {
            "first_ratio": history[0]["ratio"],
            "first_approx_kl": history[0]["approx_kl"],
            "optimizer_steps": len(history),
        }

    def minibatch(
        self, batch: Experience, texts: Rollout | None = None, first: FirstStep | None = None
    ) -> dict[str, float]:
        """One optimizer step; its gradient does not depend on how the rows are cut into micro-batches.

        The loss of `texts` (PTX) is summed into it. With `first` the critic has learned already.
        """
        mask = batch.rollout.response_mask
        denominator, kept = mask.sum(), {} if first is None else first.kept
        if first is None or self.models.critic is None:
            self.optimizer.zero_grad(set_to_none=True)
        pieces = [batch.rows(index) for index in self.engine.micro_batches(batch.rollout.lengths())]

        def policy_terms(numbered: tuple[int, Experience]) -> Tensor:
            number, piece = numbered
            outputs = kept.pop(number, None) or self.policy_outputs(piece.rollout)
            return self.policy_terms(*outputs, piece, denominator=denominator)

        def value_terms(piece: Experience) -> Tensor:
            values, own = self.models.values(piece.rollout), piece.rollout.response_mask
            return self.value_terms(values, piece.values, piece.returns, own, denominator=denominator)

        terms = self.descend(policy_terms, list(enumerate(pieces)))
        totals = dict(zip(POLICY_TERMS, terms, strict=True))
        if self.models.critic is not None and first is not None:
            totals["value_loss"] = first.value_loss
        elif self.models.critic is not None:
            with self.models.as_critic():
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

    def policy_outputs(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The policy's log-probs and entropies (B, R), with what its gradient needs."""
        config = self.config
        return self.models.logprobs_and_entropy(
            rollout, temperature=config.temperature, learn_entropy=config.entropy_coef > 0
        )

    def policy_terms(
        self, logprobs: Tensor, entropies: Tensor, piece: Experience, *, denominator: Tensor
    ) -> Tensor:
        """What the policy minimises on one micro-batch, and its POLICY_TERMS."""
        config, mask = self.config, piece.rollout.response_mask
        loss, metrics = policy_loss(
            logprobs, piece.logprobs, piece.advantages, mask, clip=config.clip.policy, denominator=denominator
        )
        entropy = masked_mean(entropies, mask, denominator=denominator)
        shown = (loss, entropy, metrics["ratio_mean"], metrics["approx_kl"], metrics["clip_fraction"])
        return torch.stack([loss - config.entropy_coef * entropy, *(term.detach() for term in shown)])

    def value_terms(
        self, values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, *, denominator: Tensor
    ) -> Tensor:
        """What the critic minimises on one micro-batch, and its loss."""
        loss = value_loss(values, old, returns, mask, clip=self.config.clip.value, denominator=denominator)
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
