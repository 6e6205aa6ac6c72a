"""Collecting ranked lists: K samples of the policy per prompt, ranked by a labeller's scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf.decoding import Decoding
from rlhf.files import append_text, write_text
from rlhf.metrics import progress
from rlhf.records import PromptRecord, RankedList
from rlhf.rewards import checked_scores
from rlhf.sampling.policy import Policy
from rlhf.text import TextCodec


def collect_ranked(  # noqa: PLR0913 (a policy, its prompts, a labeller, a file, and how to sample)
    policy: Policy,
    records: Sequence[PromptRecord],
    labeller: Any,
    partial: Path,
    *,
    decoding: Decoding,
    samples_per_prompt: int,
    batch_size: int,
    seed: int,
) -> list[RankedList]:
    """Sample and rank responses, batch by batch; a resumed run keeps the finished batches in `partial`.

    The samples of a prompt depend on the seed and its place in `records` alone, so a resumed run collects the
    same lists. Of a beam search they are its best responses.
    """
    prompts_per_batch = max(1, batch_size // max(samples_per_prompt, decoding.num_beams))
    num_return_sequences = 1 if decoding.num_beams == 1 else samples_per_prompt
    done = _read_partial(partial)
    starts = range(0, len(records), prompts_per_batch)
    bar = progress(
        len(records),
        initial=min(len(done) * prompts_per_batch, len(records)),
        unit="prompt",
        description="collect",
    )
    for start in list(starts)[len(done) :]:
        batch = records[start : start + prompts_per_batch]
        prompts = [record.prompt for record in batch for _ in range(samples_per_prompt)]
        seed_of_batch = seed * 1_000_003 + start
        responses = policy.respond(
            prompts, decoding, seed=seed_of_batch, num_return_sequences=num_return_sequences
        ).responses()
        groups = [responses[i : i + samples_per_prompt] for i in range(0, len(responses), samples_per_prompt)]
        lists = [
            _ranked(record, policy.codec, rows, labeller) for record, rows in zip(batch, groups, strict=True)
        ]
        append_text(partial, json.dumps([row for row in lists if row is not None]) + "\n")
        bar.update(len(batch))
    bar.close()
    return [_record(row, policy.codec.fingerprint()) for rows in _read_partial(partial) for row in rows]


def _ranked(
    record: PromptRecord, codec: TextCodec, rows: Sequence[list[int]], labeller: Any
) -> dict[str, Any] | None:
    """A prompt's distinct non-empty responses with scores and ranks; None where fewer than two are left."""
    responses: dict[str, list[int]] = {}
    for tokens in rows:
        responses.setdefault(codec.decode_response(tokens), tokens)
    texts = [text for text in responses if text.strip()]
    if len(texts) < 2:
        return None
    scores = checked_scores(labeller, [record.prompt] * len(texts), texts).tolist()
    order = sorted(set(scores), reverse=True)
    return {
        "prompt": record.prompt,
        "responses": texts,
        "scores": scores,
        "ranks": [order.index(score) + 1 for score in scores],
        "response_tokens": [responses[text] for text in texts],
    }


def _record(row: dict[str, Any], fingerprint: str) -> RankedList:
    return RankedList(
        prompt=row["prompt"],
        responses=tuple(row["responses"]),
        ranks=tuple(row["ranks"]),
        scores=tuple(row["scores"]),
        response_tokens=tuple(tuple(tokens) for tokens in row["response_tokens"]),
        tokenizer=fingerprint,
    )


def _read_partial(partial: Path) -> list[list[dict[str, Any]]]:
    """The complete lines of a partial file; a line that a kill cut short is removed from it."""
    return list(_complete_lines(partial)) if partial.exists() else []


def _complete_lines(partial: Path) -> Iterator[list[dict[str, Any]]]:
    text = partial.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(partial, whole)
    for line in whole.splitlines():
        yield json.loads(line)
