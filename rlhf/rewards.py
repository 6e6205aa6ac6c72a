"""Rewards: what scores a response, from the `reward`, `labeller`, `proxy` or `gold` settings.

A scorer is called with the texts of prompts and responses and returns one number each; the reward model reads
tokens where its tokenizer is the policy's, and text otherwise.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.batches import Rollout
from rlhf.engine import Engine
from rlhf.models.llama import join_weights
from rlhf.models.loading import load_codec, load_options, load_reward_model, trunk
from rlhf.models.roles import Roles
from rlhf.models.sharded import shard
from rlhf.records import Prompt, PromptRecord, make_sources, read_records
from rlhf.reference_scorers import KINDS, ReferenceScorer
from rlhf.rm import score_rows
from rlhf.rows import shorten
from rlhf.scorers import ClassifierScorer, FunctionScorer, WeightedSum
from rlhf.text import TextCodec


class RewardModelScorer:
    """A trained reward model as a scorer of texts or, with the policy's tokenizer, of tokens.

    `acting` is entered around each pass; on a trunk that several roles share it switches the adapters.
    """

    def __init__(
        self,
        model: Any,
        codec: TextCodec,
        engine: Engine,
        *,
        name: str,
        acting: Any = contextlib.nullcontext,
    ) -> None:
        self.model, self.codec, self.engine, self.name, self.acting = model, codec, engine, name, acting

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Scores of texts; the response is encoded as in the reward model's training, EOS appended.

        Another tokenizer may need more tokens for a text: a prompt loses its start where the context is full.
        """
        context = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        rows = []
        for prompt, text in zip(prompts, responses, strict=True):
            response = self.codec.encode_response(text)
            if len(response) >= context:
                raise ValueError(
                    f"{self.name}: the response {shorten(text)} has {len(response)} of this reward model's "
                    f"tokens, its context {context}: shorten it where it stands in a file, or lower "
                    "data.max_response_tokens where it was sampled"
                )
            tokens = self.codec.encode_prompt(prompt)
            rows.append(self.codec.cut_start(tokens, context - len(response)) + response)
        return self.score_tokens(rows)

    def score_tokens(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Scores of prompt + response tokens, read at the last one."""
        with self.acting():
            scores = score_rows(self.model, rows, pad_token_id=self.codec.pad_token_id, engine=self.engine)
        return scores.float().cpu().tolist()


def build_scorer(
    key: str, spec: dict[str, Any], config: Any, engine: Engine, prompts: Sequence[PromptRecord] = ()
) -> Any:
    """Build the scorer of the setting `key`: {kind: model|classifier|function|rouge_l|..., ...}.

    Those that compare with references know those of `prompts`.
    """
    try:
        return _build(key, spec, config, engine, prompts)
    except ValueError as error:
        raise ValueError(error if key in str(error) else f"{key}: {error}") from error


def build_optional_scorer(
    key: str,
    spec: dict[str, Any] | None,
    config: Any,
    engine: Engine,
    prompts: Sequence[PromptRecord] = (),
) -> Any | None:
    """The scorer of a setting that can be done without: None where it is null, has no texts to learn from, or
    is this run's own and the run has not made it, which is printed.
    """
    if spec is None or (spec["kind"] == "classifier" and spec.get("train") is None):
        return None
    if spec["kind"] == "model" and spec["path"].startswith(config.runs) and not Path(spec["path"]).exists():
        print(f"no {key} score: {spec['path']} does not exist", flush=True)
        return None
    return build_scorer(key, spec, config, engine, prompts)


def _build(
    key: str, spec: dict[str, Any], config: Any, engine: Engine, prompts: Sequence[PromptRecord]
) -> Any:
    kind = spec["kind"]
    if kind == "model":
        options = load_options(config.model, engine, trained=False, sharded=True)
        model = load_reward_model(spec["path"], options)
        shard(model, engine, trained=False, parts=[model.base_model])
        join_weights(trunk(model))
        return RewardModelScorer(model, load_codec(spec["path"], config), engine, name=spec["path"])
    if kind == "classifier":
        if spec.get("train") is None:
            raise ValueError(
                f"data={config.data.name} has no labelled texts to train a classifier on; "
                "set data.labelled, or rank with a function or a reward model"
            )
        result = read_records(make_sources(spec["train"]), "labelled", on_bad_row=config.data.on_bad_row)
        if result.skipped:
            print(f"labelled texts: {len(result.skipped)} bad rows skipped, the first: {result.skipped[0]}")
        return ClassifierScorer(result.records, kind=spec.get("classifier") or "tfidf_logistic")
    if kind == "function":
        return FunctionScorer(spec["function"])
    if kind in KINDS:
        return ReferenceScorer(kind, prompts, scale=spec.get("scale", 1.0))
    parts = enumerate(spec["parts"])
    return WeightedSum(
        [
            (part["weight"], build_scorer(f"{key}.parts[{i}]", part, config, engine, prompts))
            for i, part in parts
        ]
    )


def build_reward(config: Any, engine: Engine, roles: Roles, prompts: Sequence[PromptRecord] = ()) -> Any:
    """The reward's scorer; a reward model whose trunk another role has too is not loaded again."""
    spec = config.reward
    if roles.reward is None or spec["kind"] != "model" or spec["path"] != config.critic:
        return build_scorer("reward", spec, config, engine, prompts)
    codec = load_codec(config.critic, config)
    return RewardModelScorer(roles.reward, codec, engine, name=spec["path"], acting=roles.as_reward)


def checked_scores(scorer: Any, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
    """Scores (B,) in float32; a score that is not finite stops with the scorer's name and the response."""
    return _finite(scorer.name, scorer(prompts, responses), responses)


def score_samples(scorer: Any, codec: TextCodec, prompts: Sequence[Prompt], rollout: Rollout) -> torch.Tensor:
    """Scores (B,) of a rollout; a reward model with the policy's vocabulary reads its very tokens."""
    if isinstance(scorer, WeightedSum):
        parts = [weight * score_samples(part, codec, prompts, rollout) for weight, part in scorer.parts]
        return torch.stack(parts).sum(0)
    texts = [codec.decode_response(tokens) for tokens in rollout.responses()]
    if isinstance(scorer, RewardModelScorer) and _same_vocabulary(scorer.codec, codec):
        return _finite(scorer.name, scorer.score_tokens(rollout.sequences()), texts)
    return checked_scores(scorer, prompts, texts)


def _same_vocabulary(one: TextCodec, other: TextCodec) -> bool:
    """Whether token ids stand for the same text; a pad token added behind the others does not matter."""
    smaller, larger = sorted((each.tokenizer.get_vocab() for each in (one, other)), key=len)
    return smaller.items() <= larger.items()


def _finite(name: str, given: Sequence[float], responses: Sequence[str]) -> torch.Tensor:
    scores = torch.tensor(given, dtype=torch.float32)
    bad = (~scores.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{name} gave {scores[bad[0]].item()} for the response {responses[bad[0]][:80]!r}")
    return scores
