"""An adversary as the reward: a classifier that tells references from samples, and learns beside the policy.

Yu et al. 2017, https://arxiv.org/abs/1609.05473; Ho and Ermon 2016, https://arxiv.org/abs/1606.03476. N rows,
half of them references. A text is its prompt's tokens and its response's, in the form of `SameForm`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from rlhf.checkpoint import StageFolder
from rlhf.checks import Check
from rlhf.decoding import Decoding
from rlhf.descent import Descent
from rlhf.discriminator_settings import KIND, settings_in
from rlhf.exposure.same_form import SameForm
from rlhf.files import hash_path
from rlhf.metrics import progress
from rlhf.models.adapters import merged_copy, uses_lora
from rlhf.models.forward import sequence_scores
from rlhf.models.roles import DISCRIMINATOR, Roles, build_discriminator
from rlhf.models.sharded import root_of, unsharded
from rlhf.ppo import ADAM_EPSILON, check_finite
from rlhf.processes import by_main
from rlhf.records import Demonstration, Prompt, PromptRecord
from rlhf.rm import prepare_for_saving, right_pad, score_rows
from rlhf.sampling.policy import Policy
from rlhf.text import TextCodec
from rlhf.training import write_model
from rlhf.training_state import load_training_state, save_training_state
from rlhf.zero import ShardedAdamW

Text = tuple[list[int], list[int]]

USE = (
    "The score is the logit that a text is a reference's and not a sample. It was trained on beginnings of "
    "responses, each with the end token behind it; as a scorer of `kind: model` it reads whole ones."
)
MEAN_DECAY = 0.9  # of the moving accuracy, per update
ALL_TOLD, NONE_TOLD = 0.95, 0.55
# What random numbers are drawn for, beside the run's seed and a count.
SCORING, JUDGING, LEARNING, KEEPING, PRETRAINING = range(3_000_000_001, 3_000_000_006)


def verdict(scores: Tensor, is_reference: Tensor) -> Tensor:
    """Sums (2,) over rows of the loss and of the rows told right, from scores s (N,) and labels (N,).

    Loss: -log sigmoid(s) of a reference, -log sigmoid(-s) of a sample. Right: s > 0 of a reference, s < 0 of
    a sample, half a row where s = 0.
    """
    labels = is_reference.to(scores)
    loss = functional.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
    right = (1 + torch.sign(scores.detach()) * (2 * labels - 1)) / 2
    return torch.stack([loss, right.sum()])


def told_apart(accuracy: float) -> str | None:
    """What is wrong where a discriminator's mean accuracy leaves a policy little to learn from, or None."""
    if accuracy > ALL_TOLD:
        return "it tells nearly all apart, so its reward has little signal left: lower reward.learning_rate"
    if accuracy < NONE_TOLD:
        return "nothing tells samples from references, or it learns too little: raise reward.pretrain_updates"
    return None


class Discriminator:
    """A scorer whose score is the logit that a text is a reference's; it learns after each update."""

    name = KIND

    def __init__(
        self,
        config: Any,
        codec: TextCodec,
        roles: Roles,
        demonstrations: Sequence[Demonstration],
        prompts: Sequence[PromptRecord] = (),
    ) -> None:
        """Real texts are the demonstrations and the references of `prompts`, where they have one."""
        self.config, self.codec, self.engine = config, codec, roles.engine
        self.settings = settings_in(config.reward)
        self.policy = roles.actor_critic.policy
        self.model, self.trained, self.acting = build_discriminator(self.policy, config, self.engine)
        longest = config.data.max_response_tokens
        known = [Demonstration(each.prompt, each.reference) for each in prompts if each.reference]
        demonstrations = [*demonstrations, *known]
        responses = [each.response for each in demonstrations]
        self.form = SameForm(codec, responses, max_response_tokens=longest)
        self.prompts = [each.prompt for each in demonstrations]
        self.references = [
            (codec.encode_prompt(each.prompt), self.form.reference(each.response)) for each in demonstrations
        ]
        self.places: dict[tuple[int, ...], list[int]] = {}
        for place, (prompt, _) in enumerate(self.references):
            self.places.setdefault(tuple(prompt), []).append(place)
        self.weights = nn.ParameterList(self.trained)
        self.optimizer = self.engine.adamw(
            [[{"params": self.trained, "lr": self.settings.learning_rate, "weight_decay": 0.0}]],
            clip=config.clip.grad_norm,
            epsilon=ADAM_EPSILON,
            roots=[root_of(self.model)] if self.engine.shards_weights else [],
        )
        self.replay: list[Text] = []
        self.num_updates = 0
        self.accuracy: float | None = None
        self.warned: list[str] = []

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Logits of samples, each read as in training: cut as beside a reference. Samples of one prompt are
        cut beside the same one, so that they differ in what they say.

        The shorter a text, the nearer to 0 is what can be said of it, and a policy whose samples are told
        would learn to say nothing. So the share of the reference's length that a sample lacks costs it that
        share of the lowest logit of all.
        """
        samples = self.texts(prompts, responses)
        places: dict[tuple[int, ...], int] = {}
        numbers = [places.setdefault(tuple(prompt), len(places)) for prompt, _ in samples]
        draw = self.draw(SCORING, self.num_updates)
        beside, cuts = self.beside([list(each) for each in places], draw), draw.random(len(places)).tolist()
        pairs = [(beside[n], text) for n, text in zip(numbers, samples, strict=True)]
        logits = self.scores(self.rows(pairs, [cuts[n] for n in numbers])[1::2])
        lacking = [max(0.0, 1 - len(sample) / max(1, len(one))) for (_, one), (_, sample) in pairs]
        return (logits + torch.tensor(lacking) * logits.min().clamp(max=0)).tolist()

    def pretrain(self, policy: Policy, decoding: Decoding) -> None:
        """Learn to tell references from the policy's samples to the same prompts."""
        count, size, accuracy = self.settings.pretrain_updates, self.settings.batch_size, 0.5
        bar = progress(count * size, initial=0, unit="sample", description=KIND)
        for number in range(count):
            draw = self.draw(PRETRAINING, number)
            chosen = self.choose(size, draw)
            prompts = [self.prompts[i] for i in chosen]
            rollout = policy.respond(prompts, decoding, seed=int(draw.integers(2**62)))
            samples = self.texts(prompts, policy.texts(rollout))
            pairs = list(zip([self.references[i] for i in chosen], samples, strict=True))
            _, accuracy = self.learn_from(pairs, draw, step=0)
            self.remember(samples, number)
            bar.update(size)
            bar.set_postfix(accuracy=f"{accuracy:.2f}")
        bar.close()

    def update(self, prompts: Sequence[Prompt], responses: Sequence[str], *, step: int) -> dict[str, float]:
        """Learn from the samples of update `step`, earlier ones and references; return how many it told apart
        before.
        """
        fresh = self.texts(prompts, responses)
        metrics = self.judge(fresh, self.draw(JUDGING, step))
        check_finite(metrics, step)
        size = self.settings.batch_size
        for number in range(self.settings.steps):
            draw = self.draw(LEARNING, step, number)
            num_old = min(int(self.settings.replay * size), len(self.replay))
            old = [self.replay[i] for i in draw.permutation(len(self.replay))[:num_old]]
            new = [fresh[i] for i in self.choose(size - num_old, draw, among=len(fresh))]
            texts = old + new
            references = self.beside([prompt for prompt, _ in texts], draw)
            self.learn_from(list(zip(references, texts, strict=True)), draw, step=step)
        self.remember(fresh, self.settings.pretrain_updates + step)
        self.num_updates = step
        self.watch(metrics["discriminator_accuracy"])
        return metrics

    def judge(self, samples: Sequence[Text], draw: np.random.Generator) -> dict[str, float]:
        """Loss and accuracy on samples and as many references."""
        references = self.beside([prompt for prompt, _ in samples], draw)
        pairs = list(zip(references, samples, strict=True))
        scores = self.scores(self.rows(pairs, draw.random(len(pairs)).tolist()))
        loss, accuracy = (verdict(scores, _alternating(len(scores))) / len(scores)).tolist()
        return {"discriminator_loss": loss, "discriminator_accuracy": accuracy}

    def learn_from(
        self, pairs: Sequence[tuple[Text, Text]], draw: np.random.Generator, *, step: int
    ) -> tuple[float, float]:
        """One optimizer step on pairs of a reference and a sample; loss and accuracy before it."""
        rows = self.rows(pairs, draw.random(len(pairs)).tolist())
        labels, device = _alternating(len(rows)), self.engine.device

        def terms(index: Tensor) -> Tensor:
            tokens, mask = right_pad([rows[i] for i in index], self.codec.pad_token_id)
            scores = sequence_scores(self.model, tokens.to(device), mask.to(device))
            found = verdict(scores, labels[index].to(device)) / len(rows)
            return torch.stack([found[0], *found.detach()])

        self.optimizer.zero_grad(set_to_none=True)
        with self.acting():
            pieces = self.engine.micro_batches([len(row) for row in rows])
            loss, accuracy = Descent(self.engine, self.optimizer, self.trained).descend(terms, pieces)
            norm = self.clipped_norm()
            check_finite({"discriminator_loss": loss, "discriminator_grad_norm": norm}, step)
            self.optimizer.step()
        return loss, accuracy

    def clipped_norm(self) -> float:
        """The norm of the gradient, which is clipped by it."""
        if isinstance(self.optimizer, ShardedAdamW):
            return self.optimizer.norms()[0]
        return float(nn.utils.clip_grad_norm_(self.trained, self.config.clip.grad_norm))

    def texts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Text]:
        """Samples as tokens, in the form that references have too."""
        pairs = zip(prompts, responses, strict=True)
        return [(self.codec.encode_prompt(prompt), self.form.sample(text)) for prompt, text in pairs]

    def rows(self, pairs: Sequence[tuple[Text, Text]], cuts: Sequence[float]) -> list[list[int]]:
        """What is read of pairs: a reference, its sample, the next reference and so on, cut to one length."""
        found = []
        for (reference, sample), cut in zip(pairs, cuts, strict=True):
            one, other = self.form.beginnings(reference[1], sample[1], cut)
            found += [reference[0] + one, sample[0] + other]
        return found

    def scores(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits (N,) of rows of tokens."""
        with self.acting():
            found = score_rows(self.model, rows, pad_token_id=self.codec.pad_token_id, engine=self.engine)
        return found.float().cpu()

    def draw(self, *purpose: int) -> np.random.Generator:
        """Random numbers that follow from the run's seed and what they are for."""
        return np.random.default_rng((self.config.seed, *purpose))

    def beside(self, prompts: Sequence[list[int]], draw: np.random.Generator) -> list[Text]:
        """A reference for each prompt: one of its own, where there is one, so that no prompt tells whose text
        it is; else any.
        """
        found = []
        for prompt, place in zip(prompts, self.choose(len(prompts), draw), strict=True):
            own = self.places.get(tuple(prompt), [place])
            found.append(self.references[own[place % len(own)]])
        return found

    def choose(self, count: int, draw: np.random.Generator, *, among: int | None = None) -> list[int]:
        """Places of so many references, or of `among` others, none twice before all were there."""
        total = len(self.references) if among is None else among
        order = draw.permutation(total).tolist()
        return [order[i % total] for i in range(count)]

    def remember(self, samples: Sequence[Text], number: int) -> None:
        """Keep the `number`-th samples for later; where they are too many, any of all so far are dropped."""
        known = [*self.replay, *samples]
        kept = self.draw(KEEPING, number).permutation(len(known))
        self.replay = [known[i] for i in sorted(kept[: self.settings.replay_size].tolist())]

    def watch(self, accuracy: float) -> None:
        """Follow the moving mean of the accuracy, and say once where it leaves nothing to learn from."""
        before = self.accuracy
        self.accuracy = accuracy if before is None else before + (1 - MEAN_DECAY) * (accuracy - before)
        problem = told_apart(self.accuracy)
        if problem is not None and problem not in self.warned:
            self.warned.append(problem)
            words = f"warning: the discriminator's accuracy is {self.accuracy:.2f}: {problem}"
            tqdm.write(words, file=sys.stdout)

    def checks(self) -> list[Check]:
        """Whether its accuracy left the policy something to learn from."""
        accuracy = 0.5 if self.accuracy is None else self.accuracy
        meaning = told_apart(accuracy) or "near 1 there is no signal left, near .5 nothing to tell apart"
        value = f"moving accuracy {accuracy:.2f}"
        return [Check("discriminator tells some apart", told_apart(accuracy) is None, value, meaning)]

    def state_writer(self) -> Callable[[Path], None]:
        """What writes the state into a folder; all processes ask for it together, one calls it."""
        moments = self.optimizer.state_dict()
        values = {name: getattr(self, name) for name in ("num_updates", "accuracy", "warned", "replay")}

        def write(folder: Path) -> None:
            (folder / KIND).mkdir()
            save_training_state(folder / KIND, self.weights, moments, values)

        return write

    def restore(self, state: Path) -> None:
        """Continue from a state."""
        values = load_training_state(state / KIND, self.weights, self.optimizer)
        for name, value in values.items():
            setattr(self, name, value)
        self.replay = [(prompt, response) for prompt, response in self.replay]

    def save(self, folder: StageFolder, card: str) -> dict[str, str]:
        """Leave a model folder that scores as `kind: model`; return what stage.json says of it."""
        model = self.model
        if uses_lora(self.config.adapter):
            adapters = folder.path / "adapter"
            by_main(self.policy.save_pretrained)(str(adapters), selected_adapters=[DISCRIMINATOR])
            model = merged_copy(
                self.config.policy,
                adapters / DISCRIMINATOR,
                task="SEQ_CLS",
                trust_remote_code=self.config.model.trust_remote_code,
            )
            model.score.weight.data = self.model.score.weight.detach().cpu()
        else:
            model = unsharded(model)
        write_model(folder, model, prepare_for_saving(model, self.codec), card, name=KIND)
        return {"kind": "reward_model", "sha256": hash_path(folder.path / KIND)}


def _alternating(count: int) -> Tensor:
    """Labels (N,) of rows in pairs: a reference, then a sample."""
    return torch.arange(count) % 2 == 0
