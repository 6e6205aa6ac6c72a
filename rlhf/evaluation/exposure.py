"""What a system's exposure bias is measured from: passes of its policy and of an oracle, row by row.

An oracle is a model with the policy's tokenizer whose distributions stand for those of people. Both models
read the same tokens, which the policy's codec makes. P prompts, R response positions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import rel_entr

from rlhf.batches import Rollout
from rlhf.evaluation.measures import LEAST_ROWS
from rlhf.evaluation.statistics import Estimate, Floats
from rlhf.evaluation.systems import Generation, System, Tokens, by_batches, by_rows, token_logprobs
from rlhf.models.forward import last_states, response_divergence
from rlhf.processes import by_main
from rlhf.records import PromptRecord
from rlhf.rewards import checked_scores
from rlhf.sampling.policy import Policy

LEAST_MAUVE_ROWS = 200
MAUVE_BOOTSTRAP = 1000
ROWS_PER_BUCKET = 20  # of either side: with fewer the quantization counts noise, and faiss says so

Pairs = list[tuple[float, float]]


@dataclass(frozen=True)
class Instruments:
    """What systems are measured with: an oracle, and a scorer of texts, None where there is none; how long
    the prefixes are that responses are continued from, so many at a time.
    """

    oracle: Policy | None
    scorer: Any | None
    prefix_lengths: Sequence[int]
    batch_size: int
    seed: int


class Row(NamedTuple):
    """A prompt and its tokens, with those that a system and that people wrote to it."""

    prompt: Any
    context: list[int]
    own: list[int]
    gold: list[int]


@dataclass(frozen=True)
class PrefixQuality:
    """How good continuations are after `length` tokens: (after gold ones, after own ones), a pair a prompt.

    logprobs: the oracle's mean log-prob of a continuation's tokens after its prefix, in nats; scores: of its
    text alone, by the scorer.
    """

    length: int
    logprobs: Pairs | None
    scores: Pairs | None


@dataclass(frozen=True)
class Evidence:
    """What was found of one system; None where there was nothing to find it with.

    own_kl, gold_kl: `divergences` after own and after gold tokens, of the prompts with a reference; logprobs:
    the oracle's, in nats, of every token of all responses; mauve: see `mauve`.
    """

    own_kl: list[list[float]] | None
    gold_kl: list[list[float]] | None
    logprobs: list[list[float]] | None
    mauve: Estimate | None
    prefixes: list[PrefixQuality]


def measure(  # noqa: PLR0913 (a system with its policy, what it said to which prompts, what to measure by)
    system: System,
    policy: Policy,
    generations: Sequence[Generation],
    records: Sequence[PromptRecord],
    instruments: Instruments,
    *,
    gold_kl: list[list[float]] | None = None,
) -> Evidence:
    """Measure a system's responses, generation i being that to record i; `gold_kl`, where it is known from
    another decoding of the same policy.

    Contexts of the own kind are the responses as the system decoded them; the distributions after them are
    the model's own at temperature 1, whatever the decoding. A best of n and beams do not go on from a prefix
    as they went on from their own, so they have no `prefixes`.
    """
    codec, oracle, limit = policy.codec, instruments.oracle, system.decoding.max_new_tokens
    contexts = [codec.encode_prompt(g.prompt) for g in generations]
    rows = [
        Row(g.prompt, context, g.tokens, codec.encode_response(record.reference)[:limit])
        for g, context, record in zip(generations, contexts, records, strict=True)
        if record.reference is not None
    ]
    goes_on = system.best_of == 1 and system.decoding.num_beams == 1
    judges = oracle is not None or instruments.scorer is not None
    lengths = instruments.prefix_lengths if goes_on and judges else ()
    found = [prefix_quality(length, system, policy, rows, instruments) for length in lengths]
    prefixes = [each for each in found if each is not None]
    if oracle is None:
        return Evidence(None, None, None, None, prefixes)
    logprobs = token_logprobs(oracle, contexts, [g.tokens for g in generations])
    before, own, gold = ([row[i] for row in rows] for i in (1, 2, 3))
    own_kl = divergences(oracle, policy, before, own)
    if gold_kl is None:
        gold_kl = divergences(oracle, policy, before, gold)
    return Evidence(
        own_kl, gold_kl, logprobs, mauve(oracle, before, gold, own, seed=instruments.seed), prefixes
    )


def divergences(oracle: Policy, policy: Policy, contexts: Tokens, responses: Tokens) -> list[list[float]]:
    """KL(oracle || policy) in nats of the next token's distributions: [i][t] after context i and the first t
    tokens of response i, t < its length. Exact, from all vocabulary scores, at temperature 1.
    """

    def of_piece(piece: Rollout) -> torch.Tensor:
        return response_divergence(oracle.model, policy.model, piece)

    rows = by_rows(policy, contexts, responses, of_piece)
    return [row[: len(response)] for row, response in zip(rows, responses, strict=True)]


def prefix_quality(
    length: int, system: System, policy: Policy, rows: Sequence[Row], instruments: Instruments
) -> PrefixQuality | None:
    """The quality of what follows `length` own tokens, as sampled, and of what the system says after as many
    gold ones; None for fewer than LEAST_ROWS rows with both.

    Neither prefix is scored. Continuations end where responses would, and penalties know the prefix as the
    response's. He et al. (2021), https://arxiv.org/abs/1905.10617.
    """
    rows = [row for row in rows if min(len(row.own), len(row.gold)) > length]
    if len(rows) < LEAST_ROWS:
        return None
    codec, seed = policy.codec, (instruments.seed + length) * 1_000_003
    decoding = replace(system.decoding, max_new_tokens=system.decoding.max_new_tokens - length)

    def sampled(one: Policy, start: int, batch: Sequence[Row]) -> list[list[int]]:
        tokens, begun = (
            [row.context + row.gold[:length] for row in batch],
            [row.gold[:length] for row in batch],
        )
        return one.go_on(tokens, decoding, seed=seed + start, begun=begun).responses()

    found = by_batches(policy, rows, instruments.batch_size, sampled)
    after_gold = [tokens for batch in found for tokens in batch]
    after_own = [row.own[length:] for row in rows]
    before_gold, before_own = ([row.context + row[i][:length] for row in rows] for i in (3, 2))
    logprobs = scores = None
    if instruments.oracle is not None:
        pairs = ((before_gold, after_gold), (before_own, after_own))
        both = [token_logprobs(instruments.oracle, *pair) for pair in pairs]
        logprobs = [(_mean(a), _mean(b)) for a, b in zip(*both, strict=True)]
    if instruments.scorer is not None:
        texts = ([codec.decode_response(tokens) for tokens in each] for each in (after_gold, after_own))
        prompts = [row.prompt for row in rows]
        sides = [checked_scores(instruments.scorer, prompts, each).tolist() for each in texts]
        scores = list(zip(*sides, strict=True))
    return PrefixQuality(length, logprobs, scores)


def mauve(oracle: Policy, contexts: Tokens, gold: Tokens, own: Tokens, *, seed: int = 0) -> Estimate | None:
    """MAUVE, 0 to 1, of prompts with own against gold responses; None where `why_no_mauve` says why.

    The features are the oracle's last hidden states at each text's last token before EOS, so it is not to be
    compared with the published ones, by GPT-2 large. Pillutla et al. (2021),
    https://arxiv.org/abs/2102.01454. The interval is that of the clusters found.
    """
    if why_no_mauve(len(gold)):
        return None

    def features(responses: Tokens) -> np.ndarray:
        texts = [row[:-1] if len(row) > 1 and row[-1] == eos else row for row in responses]
        return np.array(by_rows(oracle, contexts, texts, of_piece), dtype=np.float32)

    def of_piece(piece: Rollout) -> torch.Tensor:
        return last_states(oracle.model, piece.tokens, piece.attention_mask)

    eos = oracle.codec.eos_token_id
    return _mauve_of_features(features(gold), features(own), seed)


def why_no_mauve(num_rows: int) -> str | None:
    """Why MAUVE of so many texts is not measured; None where it is."""
    if num_rows < LEAST_MAUVE_ROWS:
        return f"{num_rows} prompts have a reference, fewer than {LEAST_MAUVE_ROWS}"
    if importlib.util.find_spec("mauve") is None:
        return "mauve-text is not installed: pip install -c constraints.txt '.[mauve]'"
    return None


@by_main
def _mauve_of_features(gold: np.ndarray, own: np.ndarray, seed: int) -> Estimate:
    from mauve import compute_mauve

    found = compute_mauve(p_features=gold, q_features=own, num_buckets=len(gold) // ROWS_PER_BUCKET)
    return mauve_interval(found.p_hist, found.q_hist, len(gold), seed=seed)


def mauve_interval(gold: Floats, own: Floats, num_rows: int, *, seed: int = 0) -> Estimate:
    """MAUVE of two histograms (clusters,) of so many texts each, with its 95% basic bootstrap interval: fewer
    texts look less alike, and a resample is to its sample as that is to the truth.
    """
    rng = np.random.default_rng(seed)
    draws = [rng.multinomial(num_rows, each, MAUVE_BOOTSTRAP) / num_rows for each in (gold, own)]
    low, high = np.quantile(_mauve_of_histograms(*draws), [0.025, 0.975])
    mean = float(_mauve_of_histograms(gold, own))
    return Estimate(mean, *(float(np.clip(2 * mean - end, 0, 1)) for end in (high, low)))


def _mauve_of_histograms(p: Floats, q: Floats) -> Floats:
    """(..., clusters) to (...): the area under the curve of exp(-5 KL) of both to mixtures of both."""
    weights = np.linspace(1e-6, 1 - 1e-6, 25).reshape(-1, *[1] * p.ndim)
    mixtures = weights * p + (1 - weights) * q
    x, y = (np.exp(-5 * np.sum(rel_entr(each, mixtures), axis=-1)) for each in (q, p))
    ends = np.zeros_like(x[:1]), np.ones_like(x[:1])
    x, y = np.concatenate([ends[1], x, ends[0]]), np.concatenate([ends[0], y, ends[1]])
    return np.sum((x[:-1] - x[1:]) * (y[:-1] + y[1:]) / 2, axis=0)


def evidence_from(found: dict[str, Any]) -> Evidence:
    """Evidence from what `dataclasses.asdict` made of it."""
    prefixes = [PrefixQuality(**each) for each in found["prefixes"]]
    return Evidence(**found | {"prefixes": prefixes, "mauve": found["mauve"] and Estimate(**found["mauve"])})


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
