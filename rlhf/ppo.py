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
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.batches import Experience, Rollout
from rlhf.descent import Descent
from rlhf.engine import Engine
from rlhf.experience import Passes
from rlhf.models.roles import ActorCritic
from rlhf.models.sharded import own_part, root_of
from rlhf.numerics.advantages import gae
from rlhf.numerics.losses import policy_loss, value_loss
from rlhf.numerics.masked import masked_mean
from rlhf.pretraining_mix import PretrainingMix
from rlhf.training_state import permutation
from rlhf.zero import ShardedAdamW

ADAM_EPSILON = 1e-5

# The places of the two models in the optimizer.
POLICY, CRITIC = 0, 1

# What an optimizer step says of the policy, summed over micro-batches.
POLICY_TERMS = ("policy_loss", "entropy", "ratio", "approx_kl", "clip_fraction")


class FirstStep(Passes):
    """The passes of an update's first optimizer step. No weight has changed until then, so its log-probs and
    values are the old ones of its rows as well, and need no passes of their own.

    The critic learns while the experience is built: its returns take nothing but its own row's values. The
    policy's advantages wait for those of all rows, so the graphs of its passes are kept, as far as
    `engine.kept_tokens` go; the others are computed twice.
    """

    def __init__(self, learner: Learner, rollout: Rollout, rows: Tensor) -> None:
        super().__init__(
            rollout, learner.models, learner.engine, temperature=learner.config.temperature, first=rows
        )
        self.learner = learner
        self.num_tokens = rollout.response_mask[rows].sum()
        sizes = [each.tokens.numel() for each in self.rollouts[: self.num_first]]
        room = self.engine.kept_tokens * self.engine.processes.count
        self.num_kept = sum(total <= room for total in itertools.accumulate(sizes))
        if self.num_kept < len(sizes):
            self.num_kept -= self.num_kept % self.engine.shares  # as many for each worker
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.value_loss = 0.0

    def kept_share(self) -> float:
        """The share of the first step's tokens whose passes are kept."""
        sizes = [each.tokens.numel() for each in self.rollouts[: self.num_first]]
        return sum(sizes[: self.num_kept]) / sum(sizes)

    def logprobs(self, number: int) -> Tensor:
        """The policy's log-probs of a pass.

        Where any is kept, each worker's first one has a graph, kept or not: autocast shares the weights that
        it rounds among all passes, and under earlier versions of torch a pass without a graph leaves those
        after it without gradients.
        """
        keep = number < self.num_kept
        with torch.set_grad_enabled(keep or (self.num_kept > 0 and number < self.engine.shares)):
            outputs = self.learner.policy_outputs(self.rollouts[number])
        if keep:
            self.kept[number] = outputs
        return outputs[0].detach()

    def values(self, rewards: Tensor) -> Tensor:
        """The critic's values (B, R); the gradients of the step's own rows are summed up meanwhile."""
        learner, config, found = self.learner, self.learner.config, dict[int, Tensor]()

        def terms(number: int) -> Tensor:
            rollout = self.rollouts[number]
            values, mask = self.models.values(rollout), rollout.response_mask
            found[number] = values.detach()
            own = rewards[self.rows[number], : mask.shape[1]]
            _, returns = gae(own, found[number], mask, gamma=config.gae.gamma, lam=config.gae.lam)
            return learner.value_terms(values, found[number], returns, mask, denominator=self.num_tokens)

        learner.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            [self.value_loss] = learner.descend(terms, range(self.num_first), model=CRITIC)
        if self.engine.shards_weights and self.num_first < len(self.rows):
            found.clear()  # so that every process makes as many passes

        def values_of(number: int) -> Tensor:
            own = found.get(number)
            return self.models.values(self.rollouts[number]) if own is None else own

        return self.table(values_of)


class Learner:
    """The optimizer of policy and critic, and the epochs of minibatches that make one update."""

    def __init__(
        self, models: ActorCritic, engine: Engine, config: Any, *, mix: PretrainingMix | None = None
    ) -> None:
        self.models, self.engine, self.config, self.mix = models, engine, config, mix
        self.step = 0
        self.trained = [models.policy_parameters(), models.critic_parameters()]
        rates = (config.learning_rate, config.critic_learning_rate)
        groups: list[Any] = [
            {"params": each, "lr": rate} for each, rate in zip(self.trained, rates, strict=True)
        ]
        groups = [{**group, "weight_decay": 0.0} for group in groups if group["params"]]
        trained = [model for model in (models.policy, models.critic) if model is not None]
        self.optimizer = engine.adamw(
            [[group] for group in groups],
            clip=config.clip.grad_norm,
            epsilon=ADAM_EPSILON,
            roots=[root_of(model) for model in trained if engine.shards_weights],
        )

    def set_learning_rates(self, step: int) -> None:
        """Linear warm-up over `warmup_updates`, then linear decay to 0 after the last update; `step` counts
        from 1.
        """
        config = self.config
        warm = min(1.0, step / max(config.warmup_updates, 1))
        left = (config.updates - step + 1) / max(config.updates - config.warmup_updates, 1)
        rates = (config.learning_rate, config.critic_learning_rate)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):  # there may be no critic
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
        self.check_weights(experience.rollout)
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

        terms = self.descend(policy_terms, list(enumerate(pieces)), last=texts is None)
        totals = dict(zip(POLICY_TERMS, terms, strict=True))
        if self.models.critic is not None and first is not None:
            totals["value_loss"] = first.value_loss
        elif self.models.critic is not None:
            with self.models.as_critic():
                [totals["value_loss"]] = self.descend(value_terms, pieces, model=CRITIC)
        if texts is not None:
            num_tokens = texts.response_mask.sum()
            rollouts = [texts.rows(index) for index in self.engine.micro_batches(texts.lengths())]
            text_terms = functools.partial(self.text_terms, denominator=num_tokens)
            [totals["ptx_loss"]] = self.descend(text_terms, rollouts)
        totals |= dict(zip(("policy_grad_norm", "critic_grad_norm"), self.clipped_norms(), strict=False))
        check_finite(totals, self.step)
        self.optimizer.step()
        return totals

    def check_weights(self, rollout: Rollout) -> None:
        """Stop where the update has left weights that nothing can be computed with, be it the first row of a
        rollout, before they take the place of a good checkpoint.
        """
        trained = [own_part(parameter) for part in self.trained for parameter in part]
        if not bool(nn.utils.get_total_norm(trained).isfinite()):
            weights = ((name, each) for name, each in self.models.named_parameters() if each.requires_grad)
            name = next((n for n, each in weights if not own_part(each).norm().isfinite()), "a weight")
            raise ValueError(
                f"{name} is not finite, or too large, after update {self.step}: it is not saved. Lower "
                "learning_rate or clip.grad_norm"
            )
        row = rollout.rows(torch.tensor([0]))
        with torch.no_grad(), self.engine.autocast():
            found = {"log-probs": self.models.logprobs(row, temperature=1.0)}
            if self.models.critic is not None:
                found["values"] = self.models.values(row)
        for name, numbers in found.items():
            if not bool(numbers.isfinite().all()):
                raise ValueError(
                    f"the {name} of update {self.step}'s weights are not finite: they are not saved. Lower "
                    "learning_rate or clip.grad_norm"
                )

    def clipped_norms(self) -> list[float]:
        """The norms of the gradients of policy and critic, which are clipped by them."""
        if isinstance(self.optimizer, ShardedAdamW):
            return self.optimizer.norms()
        trained = self.trained[: 1 if self.models.critic is None else 2]
        return [float(nn.utils.clip_grad_norm_(each, self.config.clip.grad_norm)) for each in trained]

    def descend(
        self, terms: Callable[[Any], Tensor], pieces: Sequence[Any], *, model: int = POLICY, last: bool = True
    ) -> list[float]:
        """Accumulate the gradient of the sum over pieces of the first term; return the sums of the others."""
        descent = Descent(self.engine, self.optimizer, [*self.trained[POLICY], *self.trained[CRITIC]])
        return descent.descend(terms, pieces, model=model, last=last)

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


def check_finite(numbers: dict[str, float], step: int) -> None:
    """Stop where a number of update `step` is not finite, naming it."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(
                f"{name} is {number} at update {step}: the run stops before this changes a weight. Lower "
                "learning_rate, raise kl.coef, or use engine.dtype=float32; what was saved before is good"
            )
