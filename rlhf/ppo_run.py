"""A PPO run from its first update to its last: prompts, reward, checks, metrics, samples and checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.batches import Experience, Rollout
from rlhf.checkpoint import StageFolder
from rlhf.checks import Check, all_passed, print_checks
from rlhf.decoding import Decoding
from rlhf.experience import (
    MissingEos,
    Passes,
    build_experience,
    experience_metrics,
    final_scores,
    policy_and_reference,
)
from rlhf.exposure.discriminator import Discriminator
from rlhf.exposure.mixer import Mixer
from rlhf.files import append_text, new_folder
from rlhf.interrupts import interrupts_held
from rlhf.metrics import MetricLog, cut_lines_after, progress
from rlhf.models.roles import Roles
from rlhf.models.sharded import whole_weights
from rlhf.numerics.kl import AdaptiveKL, FixedKL, k1
from rlhf.numerics.masked import zero_rest
from rlhf.ppo import Learner, check_finite
from rlhf.ppo_checks import end_checks, start_checks
from rlhf.pretraining_mix import PretrainingMix
from rlhf.processes import by_main
from rlhf.records import Demonstration, PromptRecord
from rlhf.rewards import score_samples
from rlhf.sampling.policy import Policy
from rlhf.text import TextCodec
from rlhf.training_state import (
    load_trained_weights,
    load_training_state,
    permutation,
    read_values,
    save_trained_weights,
    save_training_state,
)

NUM_SHOWN_SAMPLES = 4
MEAN_DECAY = 0.9  # of REINFORCE's moving baseline, per update
EVAL_SEED = 1_000_000_007  # beside the run's own seed, for the choice of held-out prompts


def _split(
    prompts: Sequence[PromptRecord], config: Any
) -> tuple[Sequence[PromptRecord], Sequence[PromptRecord]]:
    """The prompts to train on, and those that only evaluations see."""
    if not config.eval_every:
        return prompts, []
    if len(prompts) <= config.eval_prompts:
        raise ValueError(
            f"eval_prompts={config.eval_prompts} of {len(prompts)} prompts leave none to train on: "
            "give fewer, or more in data.prompts.ppo"
        )
    order = permutation(len(prompts), config.seed, EVAL_SEED).tolist()
    held_out = set(order[: config.eval_prompts])
    parts = [[p for i, p in enumerate(prompts) if (i in held_out) == held] for held in (False, True)]
    return parts[0], parts[1]


def _moved(mean: float | None, reward: float) -> float:
    """The moving mean of rewards, which the first one starts."""
    return reward if mean is None else mean + (1 - MEAN_DECAY) * (reward - mean)


class PPORun:
    """The loop over updates. `first` and `last` hold the metrics of the first and the latest update."""

    def __init__(  # noqa: PLR0913 (the parts of a run)
        self,
        config: Any,
        codec: TextCodec,
        roles: Roles,
        reward: Any,
        prompts: Sequence[PromptRecord],
        folder: StageFolder,
        demonstrations: Sequence[Demonstration] = (),
    ) -> None:
        self.config, self.codec, self.engine, self.folder = config, codec, roles.engine, folder
        self.roles, self.models, self.reward = roles, roles.actor_critic, reward
        self.adversary = reward if isinstance(reward, Discriminator) else None
        self.prompts, self.eval_prompts = _split(prompts, config)
        self.policy = Policy(self.models.policy, codec, roles.engine)
        mix = None
        if demonstrations:
            longest = config.data.max_response_tokens
            mix = PretrainingMix(demonstrations, codec, roles.engine.device, max_response_tokens=longest)
        self.learner = Learner(self.models, roles.engine, config, mix=mix)
        self.mixer = Mixer(config.mixer, self.prompts) if config.mixer.updates else None
        self.mean_reward: float | None = None
        kl = config.kl
        adaptive = kl.controller == "adaptive"
        self.kl = AdaptiveKL(kl.coef, kl.target, kl.horizon) if adaptive else FixedKL(kl.coef)
        self.decoding = Decoding(config.data.max_response_tokens, temperature=config.temperature)
        self.missing_eos = MissingEos(config.missing_eos_score, config.missing_eos_penalty)
        self.best: dict[str, float] = {}
        self.start_checks: list[Check] = []
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}

    def train(self, state: Path | None, keep: Callable[[int], None] | None = None) -> list[Check]:
        """Run all updates, or those after `state`; return the checks on the run.

        `keep` writes the policy of an update as a model of its own.
        """
        config = self.config
        log = MetricLog(self.folder.path, config.tracker, run_name=f"{config.name}-ppo")
        done = self.restore(state) if state else 0
        if self.adversary is not None and not done:
            self.adversary.pretrain(self.policy, self.decoding)
        log.cut_after(done)
        cut_lines_after(self.folder.path / "samples.jsonl", done)
        bar = progress(
            config.updates * config.batch_size,
            initial=done * config.batch_size,
            unit="episode",
            description="ppo",
        )
        with contextlib.closing(bar), contextlib.closing(log), interrupts_held() as interrupted:
            for step in range(done + 1, config.updates + 1):
                metrics, seconds = self.step(step)
                if self.eval_prompts and (step % config.eval_every == 0 or step == config.updates):
                    metrics |= self.evaluate(step)
                log.write(step, metrics, seconds)
                bar.update(config.batch_size)
                bar.set_postfix({name: f"{metrics[name]:.2f}" for name in ("score", "kl", "length")})
                due = config.keep_every and step % config.keep_every == 0
                if step == config.updates:  # where another policy becomes the model
                    due = config.keep_every and self.best.get("step", step) != step
                if keep and due:
                    keep(step)
                stop = any(self.engine.processes.all_of(bool(interrupted)))
                if stop or (step % config.save_every == 0 and step < config.updates):
                    self.save(step)
                if stop:
                    raise KeyboardInterrupt
        if self.best.get("step", config.updates) != config.updates:
            load_trained_weights(self.best_folder(self.best), self.models)
            print(
                "the model is the policy of update {step:.0f}, of held-out reward {reward:.2f}".format(
                    **self.best
                )
            )
        return self.checks()

    def step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """One update: sample, score, build the experience, learn. Returns metrics and the seconds of its
        parts.
        """
        config, started = self.config, time.perf_counter()
        records = self.prompts_of(step)
        seed = config.seed * 1_000_003 + step
        rollout, gold = self.respond(records, self.decoding, step=step, seed=seed)
        sampled = time.perf_counter()
        try:
            scores = self.scores(records, rollout)
        except ValueError as error:
            raise ValueError(f"update {step}: {error}") from error
        baseline = self.baseline(records, step) if config.algo == "reinforce" else None
        first = self.learner.first_step(rollout, step=step)
        experience = build_experience(
            self.roles,
            rollout,
            scores,
            config=config,
            kl_coef=self.kl.coef,
            baseline=baseline,
            passes=first,
            gold=gold,
        )
        has_critic = self.models.critic is not None
        found = experience_metrics(experience, self.codec.eos_token_id, has_critic=has_critic)
        metrics = {"kl_coef": self.kl.coef, **found}
        if gold is not None:
            metrics["gold_share"] = float(gold.sum() / rollout.response_mask.sum())
        check_finite(metrics, step)
        self.mean_reward = _moved(self.mean_reward, metrics["reward"])
        scored = time.perf_counter()
        if step == 1:
            self.check_start(experience)
        metrics |= self.learner.update(experience, step=step, first=first)
        self.kl.update(metrics["kl"], episodes=len(records))
        if self.adversary is not None:
            prompts = [record.prompt for record in records]
            metrics |= self.adversary.update(prompts, self.policy.texts(rollout), step=step)
        learned = time.perf_counter()
        if step % config.sample_every == 0 or step in (1, config.updates):
            self.write_samples(step, records, rollout, scores)
        if not self.first and not metrics.get("gold_share"):  # a score of gold tokens is nobody's
            self.first = metrics
        self.last = metrics
        return metrics, {"sample": sampled - started, "score": scored - sampled, "learn": learned - scored}

    def respond(
        self, records: Sequence[PromptRecord], decoding: Decoding, *, step: int, seed: int
    ) -> tuple[Rollout, Tensor | None]:
        """The policy's responses in update `step` and, with MIXER, which of their tokens (B, R) are gold."""
        if self.mixer is not None:
            return self.mixer.respond(self.policy, records, decoding, update=step, seed=seed)
        return self.policy.respond([record.prompt for record in records], decoding, seed=seed), None

    def prompts_of(self, step: int) -> list[PromptRecord]:
        """The prompts of an update, each as often as it is sampled: the data in an order drawn anew for each
        pass through it.
        """
        repeats, total = self.config.rollouts_per_prompt, len(self.prompts)
        size = self.config.batch_size // repeats
        positions = range((step - 1) * size, step * size)
        orders = {p // total: permutation(total, self.config.seed, p // total) for p in positions}
        chosen = [self.prompts[int(orders[p // total][p % total])] for p in positions]
        return [record for record in chosen for _ in range(repeats)]

    def evaluate(self, step: int) -> dict[str, float]:
        """Score, KL per sequence and reward (score less `kl.coef` times KL) on the held-out prompts, always
        with the same random numbers; the weights of the best reward are kept.
        """
        found: list[Tensor] = []
        for start in range(0, len(self.eval_prompts), self.config.batch_size):
            records = self.eval_prompts[start : start + self.config.batch_size]
            seed = self.config.seed * 1_000_003 + start
            rollout = self.policy.respond([record.prompt for record in records], self.decoding, seed=seed)
            models, temperature = self.roles.actor_critic, self.config.temperature
            passes = Passes(rollout, models, self.engine, temperature=temperature)
            old, ref = policy_and_reference(self.roles, passes)
            kl = zero_rest(k1(old, ref), rollout.response_mask).sum(1)
            found.append(torch.stack([self.scores(records, rollout), kl]).cpu())
        score, kl = torch.cat(found, dim=1).mean(1).tolist()
        reward = score - self.config.kl.coef * kl
        if reward > self.best.get("reward", -math.inf):
            self.best = {"step": step, "reward": reward}
            with whole_weights(self.models):
                new_folder(
                    self.best_folder(self.best), lambda folder: save_trained_weights(folder, self.models)
                )
        return {"eval_score": score, "eval_kl": kl, "eval_reward": reward}

    def best_folder(self, best: dict[str, float]) -> Path:
        """Where the weights of the best evaluation lie; `best` is empty before the first."""
        return self.folder.path / "state" / f"best_{best.get('step', 0):.0f}"

    def baseline(self, records: Sequence[PromptRecord], step: int) -> Tensor | float | None:
        """What REINFORCE takes off the rewards; None before there are past ones: this batch's mean.

        Greedy: the score of the policy's likeliest response, Rennie et al. 2017,
        https://arxiv.org/abs/1612.00563.
        """
        if self.config.reinforce_baseline == "moving":
            return self.mean_reward
        if self.config.reinforce_baseline == "none":
            return 0.0
        greedy = Decoding(self.config.data.max_response_tokens, greedy=True)
        rollout, _ = self.respond(records, greedy, step=step, seed=0)
        return self.scores(records, rollout)

    def scores(self, records: Sequence[PromptRecord], rollout: Rollout) -> Tensor:
        """Scores (B,) of a rollout by the reward, with the rule for missing EOS applied."""
        prompts = [record.prompt for record in records]
        scores = score_samples(self.reward, self.codec, prompts, rollout)
        if self.config.reward_clip is not None:
            scores = scores.clamp(-self.config.reward_clip, self.config.reward_clip)
        return final_scores(scores.to(self.engine.device), rollout, self.codec.eos_token_id, self.missing_eos)

    def check_start(self, experience: Experience) -> None:
        """Print the checks before the first weight changes; a failed one stops the run, unless forced."""
        self.start_checks = start_checks(experience, self.engine.dtype, self.codec.eos_token_id)
        print_checks(self.start_checks)
        if not all_passed(self.start_checks) and not self.config.force:
            raise ValueError(
                "a check before the first update failed; mend its cause, or go on with force=true"
            )

    def checks(self) -> list[Check]:
        """What the run says about itself; the comparison on unseen prompts is stage=evaluate's."""
        # a score that rose says nothing where its judge has changed
        first = self.first if self.adversary is None else {}
        if self.mixer is not None and first == self.last:  # nothing was all sampled before
            first = {}
        found = [*self.start_checks, *end_checks(first, self.last, self.engine.dtype)]
        if self.adversary is not None:
            found += self.adversary.checks()
        return found

    def write_samples(
        self, step: int, records: Sequence[PromptRecord], rollout: Rollout, scores: Tensor
    ) -> None:
        """Append a few samples of this update to samples.jsonl."""
        rows = list(zip(records, rollout.responses(), scores.tolist(), strict=True))[:NUM_SHOWN_SAMPLES]
        shown = [
            {
                "step": step,
                "prompt": record.prompt,
                "response": self.codec.decode_response(tokens),
                "score": round(score, 4),
            }
            for record, tokens, score in rows
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown)
        append_text(self.folder.path / "samples.jsonl", lines)

    def save(self, step: int) -> None:
        """Write the state after `step`."""
        values = {
            "step": step,
            "kl": self.kl.state_dict(),
            "mean_reward": self.mean_reward,
            "best": self.best,
            "start_checks": [asdict(check) for check in self.start_checks],
            "first": self.first,
            "last": self.last,
        }
        moments = self.learner.optimizer.state_dict()
        adversaries = [] if self.adversary is None else [self.adversary]
        writers = [each.state_writer() for each in adversaries]

        def write(folder: Path) -> None:
            save_training_state(folder, self.models, moments, values)
            for writer in writers:
                writer(folder)

        with whole_weights(nn.ModuleList([self.models, *(each.weights for each in adversaries)])):
            self.folder.new_state(step, write, keep_last=self.config.keep_last)
        self.drop_old_bests()

    @by_main
    def drop_old_bests(self) -> None:
        """Keep those weights of best evaluations alone that a state names."""
        states = (self.folder.path / "state").glob("step_*")
        needed = {self.best_folder(read_values(state)["best"]) for state in states}
        for old in (self.folder.path / "state").glob("best_*"):
            if old not in needed:
                shutil.rmtree(old)

    def restore(self, state: Path) -> int:
        """Continue from a state; returns the number of updates it holds."""
        values = load_training_state(state, self.models, self.learner.optimizer)
        if self.adversary is not None:
            self.adversary.restore(state)
        self.kl.load_state_dict(values["kl"])
        self.mean_reward, self.best = values["mean_reward"], values["best"]
        self.start_checks = [Check(**check) for check in values["start_checks"]]
        self.first, self.last = values["first"], values["last"]
        print(f"resuming after update {values['step']}", flush=True)
        return int(values["step"])
