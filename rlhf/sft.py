"""Supervised fine-tuning on demonstrations, with trl's SFTTrainer and the loss on the assistant's tokens
only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import SFTConfig, SFTTrainer

from rlhf.checkpoint import StageFolder
from rlhf.checks import Check
from rlhf.decoding import Decoding
from rlhf.engine import Engine
from rlhf.exposure.scheduled_sampling import ScheduledSampling
from rlhf.metrics import MetricLog
from rlhf.models.adapters import add_lora, trainable_parameters, uses_lora
from rlhf.models.forward import logits_at
from rlhf.models.loading import load_causal_lm, load_options
from rlhf.models.sharded import shard
from rlhf.numerics.logprobs import token_logprobs
from rlhf.records import Demonstration
from rlhf.sampling.policy import Policy
from rlhf.sampling.sampler import evaluating
from rlhf.text import Encoded, TextCodec
from rlhf.training import SharedSteps, attach_log, trainer_arguments

# Below this share of finished samples a model has not learned to stop.
LOWEST_EOS_SHARE = 0.05

# The label of a token that is not learned, in all of transformers.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class TokenizedDemonstrations:
    """Rows for the trainer and how many of them were shortened."""

    rows: Dataset
    num_cut_prompts: int
    num_cut_responses: int


def tokenize(records: Sequence[Demonstration], codec: TextCodec, max_length: int) -> TokenizedDemonstrations:
    """Encode demonstrations and fit them into `max_length` tokens: prompts lose their start, responses
    their end.
    """
    rows, num_cut_prompts, num_cut_responses = [], 0, 0
    for record in records:
        cut_before = codec.num_cut_prompts
        whole = codec.encode_conversation(record.prompt, record.response)
        fitted, cut_prompt, cut_response = fit(whole, max_length, num_kept=codec.num_bos)
        num_cut_prompts += cut_prompt or codec.num_cut_prompts > cut_before
        num_cut_responses += cut_response
        rows.append({"input_ids": fitted.tokens, "completion_mask": [int(m) for m in fitted.loss_mask]})
    return TokenizedDemonstrations(Dataset.from_list(rows), num_cut_prompts, num_cut_responses)


def fit(encoded: Encoded, max_length: int, *, num_kept: int = 0) -> tuple[Encoded, bool, bool]:
    """Shorten a conversation to `max_length` tokens: first its start, and only then the end of its last
    response. The first `num_kept` tokens (BOS) stay.
    """
    overflow = max(0, len(encoded.tokens) - max_length)
    last_response = len(encoded.loss_mask)
    while last_response and encoded.loss_mask[last_response - 1]:
        last_response -= 1
    start = min(overflow, max(0, last_response - 1))
    tokens = encoded.tokens[:num_kept] + encoded.tokens[num_kept + start :]
    mask = encoded.loss_mask[:num_kept] + encoded.loss_mask[num_kept + start :]
    return Encoded(tokens[:max_length], mask[:max_length]), start > 0, len(tokens) > max_length


class ResponseTrainer(SharedSteps, SFTTrainer):
    """trl's trainer with the vocabulary's scores at response positions only, and conversations of like length
    computed together, those of packed rows too.

    With `scheduled` the model learns after inputs of which some response tokens are its own predictions.
    """

    def __init__(
        self, *, engine: Engine, scheduled: ScheduledSampling | None = None, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.engine, self.scheduled = engine, scheduled
        self.last_share = 1.0

    def gold_share(self) -> float:
        """The share of gold tokens among the inputs of the optimizer step that is due."""
        if self.scheduled is None or not torch.is_grad_enabled():
            return 1.0
        return self.scheduled.gold_share(self.state.global_step, self.state.max_steps)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the share of gold tokens in the last step too, where it falls."""
        more = {"gold_share": self.last_share} if self.scheduled is not None and "loss" in logs else {}
        super().log({**logs, **more}, start_time)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean negative log-likelihood of the labelled tokens, over those of the whole optimizer step."""
        assert not return_outputs, "only the loss is asked for"
        inputs = _unpacked(inputs)
        labels, tokens, mask = inputs["labels"][:, 1:], inputs["input_ids"], inputs["attention_mask"].bool()
        total = torch.zeros((), device=tokens.device, requires_grad=torch.is_grad_enabled())
        rounds = self.engine.processes.rounds(self.engine.micro_batches(mask.sum(1).tolist()))
        scheduled, draws = self.scheduled, None
        share = self.last_share = self.gold_share()
        if scheduled is not None and share < 1:
            draws = scheduled.draws(self.state.global_step, *tokens.shape)
        for index, weight in rounds:
            rows, columns = (labels[index] != IGNORED_LABEL).nonzero(as_tuple=True)
            predict = functools.partial(self._logits, model, mask[index], rows, columns)
            given = tokens[index]
            if scheduled is not None and draws is not None:
                with evaluating(model):
                    given = scheduled.mixed(predict, given, (rows, columns + 1), draws[index], share)
            total = total - weight * token_logprobs(predict(given), labels[index][rows, columns]).sum()
        return self.of_all(total / (num_items_in_batch or (labels != IGNORED_LABEL).sum()))

    def _logits(self, model: Any, mask: Tensor, rows: Tensor, columns: Tensor, tokens: Tensor) -> Tensor:
        with self.engine.autocast():
            return logits_at(model, tokens, mask, rows, columns)


def _scheduled(config: Any) -> ScheduledSampling | None:
    return None if config.exposure.name == "none" else ScheduledSampling(config.exposure, config.seed)


def _unpacked(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The conversations of a packed batch, whose rows (1, L) are one after the other, each in a row of its
    own (B, L) with padding on the right.
    """
    if "position_ids" not in inputs:
        return inputs
    starts = (inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    tokens, labels = (
        pad_sequence(
            list(inputs[name][0].tensor_split(starts[1:])), batch_first=True, padding_value=IGNORED_LABEL
        )
        for name in ("input_ids", "labels")
    )
    mask = tokens != IGNORED_LABEL
    return {"input_ids": tokens.where(mask, 0), "labels": labels, "attention_mask": mask}


class SFT:
    """One supervised run: model, data and trainer, ready to train and to be judged."""

    def __init__(
        self, config: Any, codec: TextCodec, engine: Engine, rows: dict[str, Dataset], folder: StageFolder
    ) -> None:
        self.config, self.codec, self.engine = config, codec, engine
        options = load_options(
            config.model,
            engine,
            trained=not uses_lora(config.adapter),
            quantization=config.adapter.quantization,
            sharded=True,
        )
        model = load_causal_lm(config.policy, options)
        shard(model, engine, trained=not uses_lora(config.adapter), copied=True)
        if uses_lora(config.adapter):
            model = add_lora(model, config.adapter, task="CAUSAL_LM")
        self.model = model
        self.log = MetricLog(folder.path, config.tracker, run_name=f"{config.name}-sft")
        self.trainer = ResponseTrainer(
            engine=engine,
            scheduled=_scheduled(config),
            model=model,
            args=SFTConfig(
                **trainer_arguments(config, folder, engine, len(rows["train"])),
                max_length=config.max_length,
                packing=config.packing,
                eval_packing=False,
                completion_only_loss=True,
            ),
            train_dataset=rows["train"],
            eval_dataset=rows["eval"],
            processing_class=codec.tokenizer,
        )
        for parameter in trainable_parameters(model):  # trl rounds the adapter of a 4-bit base to bfloat16
            parameter.data = parameter.data.float()
        attach_log(self.trainer, self.log, "sft")
        if engine.shards_weights:  # the first evaluation comes before the first step
            self.trainer.create_optimizer()

    def train(self, state: Path | None) -> tuple[float, float]:
        """Train, from `state` on where given; return the held-out loss of the base and of the trained
        model.
        """
        base_loss = self.trainer.evaluate()["eval_loss"]
        if state is None:
            self.log.write(0, {"eval_loss": base_loss})
        self.trainer.train(resume_from_checkpoint=str(state) if state else None)
        loss = self.trainer.evaluate()["eval_loss"]
        self.log.write(self.trainer.state.global_step, {"eval_loss": loss})
        return base_loss, loss

    def samples(self, records: Sequence[Demonstration], max_new_tokens: int) -> list[dict[str, Any]]:
        """One response to each record's prompt, for people to read and for the share that ends with EOS."""
        policy = Policy(self.model.eval(), self.codec, self.engine)
        prompts = [record.prompt for record in records]
        rollout = policy.respond(prompts, Decoding(max_new_tokens), seed=self.config.seed)
        return [
            {"prompt": self.codec.prompt_text(prompt), "response": text, "ended": ended}
            for prompt, text, ended in zip(prompts, policy.texts(rollout), policy.ended(rollout), strict=True)
        ]


def sft_checks(base_loss: float, loss: float, samples: Sequence[dict[str, Any]]) -> list[Check]:
    """Whether the model predicts held-out responses better than its base, and ends its own."""
    share_ended = sum(row["ended"] for row in samples) / max(len(samples), 1)
    return [
        Check(
            "held-out loss below the base's",
            loss < base_loss,
            f"{loss:.3f} against {base_loss:.3f}",
            "above it, the run learned nothing: look at learning_rate and at the data",
        ),
        Check(
            "samples end with EOS",
            share_ended >= LOWEST_EOS_SHARE,
            f"{share_ended:.0%} of {len(samples)}",
            "a policy that never ends is cut at data.max_response_tokens: raise it, learning_rate or epochs; "
            "a small base may need adapter=none, as LoRA leaves the vocabulary's weights alone",
        ),
    ]
