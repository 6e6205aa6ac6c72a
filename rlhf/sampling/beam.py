"""Beam search, by transformers, with the sampler's own penalties."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf.batches import PromptBatch
from rlhf.decoding import Decoding
from rlhf.sampling.decoding import check_finite, penalised


class _Penalties(LogitsProcessor):
    """The penalties on log-probs (rows, V) of what follows tokens (rows, L), each prompt's beams together."""

    def __init__(self, decoding: Decoding, prompts: PromptBatch) -> None:
        self.decoding = decoding
        width = prompts.tokens.shape[1]
        padding = (~prompts.attention_mask).sum(1).repeat_interleave(decoding.num_beams)
        self.starts = [width] * len(padding) if decoding.penalty_scope == "response" else padding.tolist()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        check_finite(scores)
        rows = zip(input_ids.tolist(), self.starts, strict=True)
        return penalised(scores, [tokens[start:] for tokens, start in rows], self.decoding)


def beam_search(  # noqa: PLR0913 (a model, its prompts, and how to search)
    model: Any,
    prompts: PromptBatch,
    decoding: Decoding,
    *,
    eos_token_id: int,
    pad_token_id: int,
    num_return_sequences: int = 1,
) -> list[list[int]]:
    """The likeliest responses that `num_beams` beams find for each prompt, the best first, all those of a
    prompt in a row; EOS is included where one has ended.

    The checkpoint's own generation settings do not count: some have penalties of their own.
    """
    width, own = prompts.tokens.shape[1], model.generation_config
    settings = GenerationConfig(
        num_beams=decoding.num_beams,
        num_return_sequences=num_return_sequences,
        length_penalty=decoding.length_penalty,
        max_new_tokens=decoding.max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    try:
        model.generation_config = GenerationConfig()
        found: Tensor = model.generate(
            prompts.tokens,
            attention_mask=prompts.attention_mask.long(),
            generation_config=settings,
            logits_processor=LogitsProcessorList([_Penalties(decoding, prompts)]),
        )
    finally:
        model.generation_config = own
    return [_ended(tokens, eos_token_id) for tokens in found[:, width:].tolist()]


def _ended(tokens: list[int], eos_token_id: int) -> list[int]:
    """Tokens up to the first EOS."""
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens
