"""Collecting ranked lists: distinct responses with their own tokens, ranks from scores, exact resume."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rlhf.batches import join, left_pad
from rlhf.collect import collect_ranked
from rlhf.decoding import Decoding
from rlhf.engine import Engine
from rlhf.models.forward import response_logprobs
from rlhf.models.loading import LoadOptions, load_causal_lm, load_tokenizer
from rlhf.records import PromptRecord, RankedList, Source, read_records, write_records
from rlhf.sampling.policy import Policy
from rlhf.sources import tiny_folder
from rlhf.text import TextCodec

PROMPTS = [
    PromptRecord(f"the {noun} was") for noun in ("soup", "cake", "bread", "tea", "room", "door", "cat")
]


class Labeller:
    """Scores a response by a rule and notes every call."""

    name = "rule"

    def __init__(self, rule: str = "length") -> None:
        self.rule, self.calls = rule, 0

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        self.calls += 1
        assert len(set(prompts)) == 1
        return [{"length": float(len(r)), "tie": 0.0, "nan": float("nan")}[self.rule] for r in responses]


@pytest.fixture(scope="module")
def policy() -> Policy:
    folder = str(tiny_folder())
    codec = TextCodec(load_tokenizer(folder), style="plain")
    model = load_causal_lm(folder, LoadOptions())
    torch.manual_seed(0)
    for parameter in model.parameters():  # a distribution with preferences
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return Policy(model, codec, Engine(torch.device("cpu"), torch.float32))


def collected(
    policy: Policy, partial: Path, labeller: Labeller | None = None, **more: int
) -> list[RankedList]:
    options = {"samples_per_prompt": 4, "batch_size": 8, "seed": 1} | more
    decoding = Decoding(8)
    return collect_ranked(policy, PROMPTS, labeller or Labeller(), partial, decoding=decoding, **options)


def test_ranks_follow_scores_and_equal_scores_tie(policy: Policy, tmp_path: Path) -> None:
    lists = collected(policy, tmp_path / "partial.jsonl")
    assert [record.prompt for record in lists] == [record.prompt for record in PROMPTS]
    for record in lists:
        assert record.scores == tuple(float(len(text)) for text in record.responses)
        distances = sorted(set(record.scores), reverse=True)
        assert record.ranks == tuple(distances.index(score) + 1 for score in record.scores)
    tied = collected(policy, tmp_path / "tied.jsonl", Labeller("tie"))
    assert all(set(record.ranks) == {1} and not record.has_pair for record in tied)


def test_responses_are_distinct_and_bring_the_tokens_they_were_sampled_as(
    policy: Policy, tmp_path: Path
) -> None:
    for record in collected(policy, tmp_path / "partial.jsonl"):
        assert len(set(record.responses)) == len(record.responses) >= 2
        assert record.tokenizer == policy.codec.fingerprint()
        assert record.response_tokens is not None
        for text, tokens in zip(record.responses, record.response_tokens, strict=True):
            assert policy.codec.decode_response(tokens) == text and text.strip()
            assert len(tokens) <= 8


def test_a_prompt_with_one_distinct_response_gives_no_list(policy: Policy, tmp_path: Path) -> None:
    greedy = Decoding(8, greedy=True)
    partial = tmp_path / "partial.jsonl"
    sizes = {"samples_per_prompt": 4, "batch_size": 8, "seed": 1}
    lists = collect_ranked(policy, PROMPTS, Labeller(), partial, decoding=greedy, **sizes)
    assert lists == []


def test_of_beams_the_best_responses_of_a_search_are_ranked(policy: Policy, tmp_path: Path) -> None:
    decoding, sizes = Decoding(8, num_beams=6), {"samples_per_prompt": 3, "batch_size": 12, "seed": 1}
    partial = tmp_path / "partial.jsonl"
    lists = collect_ranked(policy, PROMPTS, Labeller(), partial, decoding=decoding, **sizes)
    assert len(partial.read_text().splitlines()) == 4, "two searches of six beams a batch"
    assert [record.prompt for record in lists] == [record.prompt for record in PROMPTS]
    best = policy.respond([record.prompt for record in PROMPTS], decoding, seed=0).responses()
    for record, tokens in zip(lists, best, strict=True):
        assert record.response_tokens is not None
        assert 2 <= len(set(record.response_tokens)) <= 3, "some bytes that are no text look alike"
        assert record.response_tokens[0] == tuple(tokens)
        prompts = left_pad([policy.codec.encode_prompt(record.prompt)] * len(record.responses), 0)
        rollout = join(prompts, [list(found) for found in record.response_tokens], 0)
        logprobs = response_logprobs(policy.model, rollout, temperature=1.0).sum(1)
        means = (logprobs / rollout.response_mask.sum(1)).tolist()
        assert means == sorted(means, reverse=True)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_resumed_run_collects_the_same(policy: Policy, tmp_path: Path, kept: int) -> None:
    partial, labeller = tmp_path / "partial.jsonl", Labeller()
    whole = collected(policy, partial, labeller)
    lines = partial.read_text().splitlines(keepends=True)
    assert len(lines) == 4  # two prompts a batch, seven prompts
    partial.write_text("".join(lines[:kept]) + lines[kept][:20])
    again = Labeller()
    assert collected(policy, partial, again) == whole
    assert again.calls == len(PROMPTS) - 2 * kept == labeller.calls - 2 * kept
    assert partial.read_text().splitlines(keepends=True) == lines


def test_another_seed_collects_something_else(policy: Policy, tmp_path: Path) -> None:
    one, two = (collected(policy, tmp_path / f"{seed}.jsonl", seed=seed) for seed in (1, 2))
    assert [record.responses for record in one] != [record.responses for record in two]


def test_records_survive_the_disk(policy: Policy, tmp_path: Path) -> None:
    lists = collected(policy, tmp_path / "partial.jsonl")
    write_records(tmp_path / "ranked.jsonl", lists)
    assert read_records(Source(str(tmp_path / "ranked.jsonl")), "ranked").records == lists


def test_a_score_that_is_not_finite_stops_with_the_response(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rule gave nan for the response '"):
        collected(policy, tmp_path / "partial.jsonl", Labeller("nan"))
