"""The reward model: Bradley-Terry over ranked lists, on any decoder checkpoint with a score head.

N responses of a batch (a prompt's responses together), L tokens, H width. Responses end with EOS as the
policy's do; the score is read at the last real token by mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from rlhf.checkpoint import StageFolder
from rlhf.decoding import Decoding
from rlhf.engine import Engine
from rlhf.metrics import MetricLog, progress
from rlhf.models.adapters import add_lora, uses_lora
from rlhf.models.forward import last_states, sequence_scores
from rlhf.models.loading import head, load_causal_lm, load_options, new_reward_model, same_tokenizer
from rlhf.models.sharded import shard
from rlhf.numerics.ranking import ranking_loss
from rlhf.records import RankedList
from rlhf.sampling.policy import Policy
from rlhf.text import TextCodec
from rlhf.training import SharedSteps, attach_log, trainer_arguments


@dataclass(frozen=True)
class RankedRow:
    """A tokenized ranked list: prompt + response tokens of each response, ranks (1 = best), grades for
    margins.
    """

    tokens: list[list[int]]
    ranks: list[int]
    grades: list[float] | None


@dataclass(frozen=True)
class TokenizedLists:
    """Rows to train on, the records they came from, and how many prompts were cut and responses left out."""

    rows: list[RankedRow]
    records: list[RankedList]
    num_cut_prompts: int
    num_long_responses: int


def tokenize(records: Sequence[RankedList], codec: TextCodec, max_length: int) -> TokenizedLists:
    """Encode ranked lists. A prompt loses its start where it does not fit; a response that is too long is
    left out whole.

    Records written by `collect` with this tokenizer bring their sampled tokens along, and these are taken.
    """
    fingerprint = codec.fingerprint()
    rows, kept, num_cut, num_long = [], [], 0, 0
    for record in records:
        cut_before = codec.num_cut_prompts
        prompt = codec.encode_prompt(record.prompt)
        own_tokens = record.response_tokens if record.tokenizer == fingerprint else None
        tokens, fitting, cut = [], [], codec.num_cut_prompts > cut_before
        for index, text in enumerate(record.responses):
            response = list(own_tokens[index]) if own_tokens else codec.encode_response(text)
            if len(response) >= max_length:
                num_long += 1
                continue
            room = max_length - len(response)
            cut |= len(prompt) > room
            tokens.append(codec.cut_start(prompt, room) + response)
            fitting.append(index)
        num_cut += cut
        ranks = [record.ranks[i] for i in fitting]
        if len(set(ranks)) > 1:
            grades = [record.scores[i] for i in fitting] if record.scores else None
            rows.append(RankedRow(tokens, ranks, grades))
            kept.append(
                RankedList(
                    record.prompt,
                    tuple(record.responses[i] for i in fitting),
                    tuple(ranks),
                    tuple(grades) if grades else None,
                )
            )
    return TokenizedLists(rows, kept, num_cut, num_long)


def collate(rows: Sequence[RankedRow], pad_token_id: int) -> dict[str, Tensor]:
    """Flatten ranked lists to a batch of N responses padded on the right to L tokens, with prompt_index and
    ranks (N,).
    """
    flat = [tokens for row in rows for tokens in row.tokens]
    tokens, mask = right_pad(flat, pad_token_id)
    grades = [grade for row in rows for grade in (row.grades or [0.0] * len(row.ranks))]
    return {
        "tokens": tokens,
        "attention_mask": mask,
        "prompt_index": torch.tensor([i for i, row in enumerate(rows) for _ in row.tokens]),
        "ranks": torch.tensor([rank for row in rows for rank in row.ranks]),
        "grades": torch.tensor(grades, dtype=torch.float32),
    }


def right_pad(rows: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Pad token lists on the right: tokens (N, L) and their boolean mask."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(width) < lengths.unsqueeze(1)


class RankingTrainer(SharedSteps):
    """transformers' Trainer with the loss over ranked lists, averaged over the prompts of the whole
    optimizer step.
    """

    def __init__(
        self, *, engine: Engine, label_smoothing: float, centering: float, margin: bool, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.engine = engine
        self.model_accepts_loss_kwargs = True
        self.loss_options = {"label_smoothing": label_smoothing, "centering": centering}
        self.margin = margin

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any
    ) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step and the number of prompts in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, sum(int(batch["prompt_index"].max()) + 1 for batch in batches)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum of the prompts' losses over the number of prompts in the step."""
        assert not return_outputs, "only the loss is asked for"
        processes = self.engine.processes
        num_items = num_items_in_batch or len(inputs["prompt_index"].unique())
        mine = inputs["prompt_index"] % processes.count == processes.rank
        weight = float(mine.any())
        if not weight:  # each process goes through the model, for DeepSpeed's sake
            mine = inputs["prompt_index"] == 0
        inputs = {name: tensor[mine] for name, tensor in inputs.items()}
        scores = self.scores(model, inputs["tokens"], inputs["attention_mask"])
        loss, _ = ranking_loss(
            scores,
            inputs["prompt_index"],
            inputs["ranks"],
            margin=inputs["grades"] if self.margin else None,
            **self.loss_options,
        )
        return self.of_all(weight * loss / num_items)

    def scores(self, model: Any, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (N,) of a batch, rows of like length computed together."""
        pieces = self.engine.micro_batches(attention_mask.sum(1).tolist())
        order, missing = torch.cat(pieces).argsort(), 0
        if self.engine.shards_weights:  # every process makes as many passes
            missing = max(self.engine.processes.all_of(len(pieces))) - len(pieces)
        with self.engine.autocast():
            scores = [
                sequence_scores(model, tokens[index], attention_mask[index])
                for index in pieces + pieces[:1] * missing
            ]
        for unused in scores[len(pieces) :]:
            scores[0] = scores[0] + 0 * unused
        return torch.cat(scores[: len(pieces)])[order]


class RewardTraining:
    """One reward-model run: a score head on a trunk, the ranked lists, and the trainer."""

    def __init__(
        self, config: Any, codec: TextCodec, engine: Engine, rows: Sequence[RankedRow], folder: StageFolder
    ) -> None:
        self.config, self.codec, self.engine = config, codec, engine
        lora = uses_lora(config.adapter)
        options = load_options(
            config.model, engine, trained=not lora, quantization=config.adapter.quantization, sharded=True
        )
        self.model = new_reward_model(config.base, options)
        parts = [self.model.base_model] if lora else []  # peft copies the score head
        shard(self.model, engine, trained=not lora, parts=parts, copied=not lora)
        if lora:
            self.model = add_lora(self.model, config.adapter, task="SEQ_CLS")
        self.log = MetricLog(folder.path, config.tracker, run_name=f"{config.name}-rm")
        self.trainer = RankingTrainer(
            model=self.model,
            args=TrainingArguments(**trainer_arguments(config, folder, engine, len(rows))),
            train_dataset=list(rows),
            data_collator=lambda batch: collate(batch, codec.pad_token_id),
            engine=engine,
            label_smoothing=config.label_smoothing,
            centering=config.centering,
            margin=config.margin,
        )
        attach_log(self.trainer, self.log, "rm")
        if engine.shards_weights:
            self.trainer.create_optimizer()

    def train(self, state: Path | None) -> None:
        """Train, from `state` on where given."""
        self.trainer.train(resume_from_checkpoint=str(state) if state else None)
        self.model.eval()


def check_margins(config: Any, rows: Sequence[RankedRow]) -> None:
    """Refuse margin=true where a ranked list has no scores."""
    if config.margin and any(row.grades is None for row in rows):
        raise ValueError("margin=true needs scores in every ranked record; set margin=false")


def check_calibration_policy(config: Any) -> None:
    """Refuse a `calibration_policy` whose tokens are not those of `base`."""
    if not same_tokenizer(config.calibration_policy, config.base, config.model):
        raise ValueError(
            f"calibration_policy={config.calibration_policy} has another tokenizer than base={config.base}; "
            "name the SFT model of that base, or set calibration_policy=null"
        )


def calibration_rows(config: Any, codec: TextCodec, engine: Engine, lists: TokenizedLists) -> list[list[int]]:
    """Prompt + response tokens whose scores get mean 0 and variance 1: samples of `calibration_policy`,
    else the responses of as many lists.
    """
    if config.calibration_policy is None:
        return [tokens for row in lists.rows[: config.calibration_prompts] for tokens in row.tokens]
    model = load_causal_lm(config.calibration_policy, load_options(config.model, engine, trained=False))
    times = -(-config.calibration_prompts // len(lists.records))
    records = (lists.records * times)[: config.calibration_prompts]
    prompts = [record.prompt for record in records]
    policy = Policy(model, codec, engine)
    rollout = policy.respond(prompts, Decoding(config.data.max_response_tokens), seed=config.seed)
    return rollout.sequences()


def prepare_for_saving(model: Any, codec: TextCodec) -> Any:
    """Make plain AutoModelForSequenceClassification read the score where we do: pad must not be EOS. Returns
    the tokenizer.

    Where the vocabulary has no free special token a pad token is added behind it.
    """
    tokenizer = codec.tokenizer
    if tokenizer.pad_token_id == codec.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


@torch.no_grad()
def score_rows(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    engine: Engine,
    description: str | None = None,
) -> Tensor:
    """Scores (N,) of token lists, in batches of like length; with a `description` under a progress bar."""
    bar = progress(len(rows), initial=0, unit="response", description=description) if description else None
    with contextlib.closing(bar) if bar is not None else contextlib.nullcontext():
        return _in_batches(sequence_scores, model, rows, pad_token_id=pad_token_id, engine=engine, bar=bar)


SAME_SCORES = "the reward model gives every sample the same score; train longer or raise learning_rate"


@torch.no_grad()
def calibrate(
    model: Any, rows: Sequence[Sequence[int]], *, pad_token_id: int, engine: Engine
) -> dict[str, float]:
    """Fold gain and bias into the score head so that the scores of `rows` have mean 0 and variance 1.

    The head has no bias, so the shift goes along the direction in which hidden states vary least relative to
    their mean, delta = -mean * S^-1 m / (m' S^-1 m) with m and S mean and (shrunken) covariance of the
    states. Returns the mean and standard deviation before, and the correlation of the scores before and
    after.
    """
    states = _in_batches(last_states, model, rows, pad_token_id=pad_token_id, engine=engine).double()
    layer = head(model)
    layer = layer.modules_to_save["default"] if hasattr(layer, "modules_to_save") else layer
    weight = layer.weight.data
    before = states @ weight[0].double()
    if not before.std(correction=0) > 0:
        raise ValueError(SAME_SCORES)
    centre = states.mean(0)
    centred = states - centre
    covariance = centred.T @ centred / len(states)
    shrinkage = (
        0.1 * covariance.diagonal().mean() * torch.eye(len(centre), dtype=torch.float64, device=centre.device)
    )
    direction = torch.linalg.solve(covariance + shrinkage, centre)
    shifted = weight[0].double() - before.mean() * direction / (centre @ direction)
    after = states @ shifted
    spread = after.std(correction=0)
    if not spread > 1e-6:
        raise ValueError(SAME_SCORES)
    weight[0] = (shifted / spread).to(weight.dtype)
    correlation = torch.corrcoef(torch.stack([before, after]))[0, 1]
    return {
        "mean_before": float(before.mean()),
        "std_before": float(before.std(correction=0)),
        "correlation": float(correlation),
    }


def _in_batches(  # noqa: PLR0913 (what is computed of what, and where)
    function: Any,
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    engine: Engine,
    bar: Any = None,
) -> Tensor:
    pieces = engine.forward_only().micro_batches([len(row) for row in rows])

    def compute(index: Tensor) -> Tensor:
        tokens, mask = right_pad([rows[i] for i in index], pad_token_id)
        values = function(model, tokens.to(engine.device), mask.to(engine.device))
        if bar is not None:
            bar.update(len(index) * engine.processes.count)
        return values

    with engine.autocast():
        values = engine.shared_out(compute, pieces)
    return torch.cat(values)[torch.cat(pieces).argsort()]
