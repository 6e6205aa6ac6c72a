"""Penalties and truncations as transformers has them, what they see, and beam search."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from rlhf.batches import Rollout
from rlhf.decoding import Decoding
from rlhf.engine import Engine
from rlhf.models.forward import response_logprobs
from rlhf.sampling.decoding import forbid_repeated_ngrams, penalised, truncated
from rlhf.sampling.policy import Policy
from rlhf.text import TextCodec
from tests.models.families import EOS, FAMILIES, PAD, attention_of, load, word_tokenizer
from tests.sampling import drawing
from tests.sampling.drawing import NEVER, PROMPTS

SAME_LENGTH = [[1, 5, 9, 30, 12], [8, 8, 3, 41, 8], [31, 11, 19, 4, 25]]
LENGTH = 12


@pytest.fixture(scope="module")
def llama(families: Path) -> Any:
    return load(families, "llama")


def sampled(
    model: Any, prompts: list[list[int]], *, seed: int = 0, eos: int = NEVER, **decoding: Any
) -> Rollout:
    return drawing.sampled(model, prompts, Decoding(LENGTH, **decoding), seed=seed, eos=eos)


def ngrams(tokens: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]


def most_said(responses: list[list[int]]) -> int:
    said = [token for tokens in responses for token in tokens]
    return max(set(said), key=said.count)


def test_a_length_penalty_below_zero_finds_shorter_responses(llama: Any) -> None:
    eos = most_said(sampled(llama, PROMPTS, num_beams=4).responses())
    short, long = (
        sum(map(len, sampled(llama, PROMPTS, num_beams=4, eos=eos, length_penalty=penalty).responses()))
        for penalty in (-2.0, 4.0)
    )
    assert short < long


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        ({"typical_p": 0.9}, [TypicalLogitsWarper(0.9)]),
        ({"typical_p": 0.05}, [TypicalLogitsWarper(0.05)]),
        ({"top_p": 0.8, "min_p": 0.05}, [TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)]),
        ({"top_p": 0.8, "typical_p": 0.7}, [TopPLogitsWarper(0.8), TypicalLogitsWarper(0.7)]),
    ],
)
def test_truncations_leave_what_transformers_leaves(settings: dict[str, Any], warpers: list[Any]) -> None:
    logits = 2 * torch.randn(40, 48, generator=torch.Generator().manual_seed(0))
    no_tokens: Any = torch.zeros(40, 1, dtype=torch.long)
    theirs = LogitsProcessorList(warpers)(no_tokens, logits.clone())
    ours = truncated(logits, Decoding(1, **settings))
    assert torch.equal(ours, theirs)
    assert 0 < int(ours.isinf().sum()) < ours.numel() - len(ours) + 1


def test_typical_sampling_may_drop_the_likeliest_token() -> None:
    """Entropy of (.5, .2, .15, .15) is 1.238 nats; surprises .693, 1.609, 1.897: .2 is nearest, then .5."""
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.15]]).log()
    assert truncated(logits, Decoding(1, typical_p=0.19)).isfinite().tolist() == [[False, True, False, False]]
    assert truncated(logits, Decoding(1, typical_p=0.6)).isfinite().tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_penalties_are_those_of_transformers(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    tokens: Any = torch.randint(6, (30, 20), generator=generator)
    logits: Any = torch.randn(30, 8, generator=generator)
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(size)])
    decoding = Decoding(1, repetition_penalty=1.3, no_repeat_ngram_size=size)
    ours = penalised(logits, tokens.tolist(), decoding)
    assert torch.equal(ours, chain(tokens, logits.clone()))
    assert bool(ours.isinf().any())


def test_the_token_that_would_repeat_an_ngram_is_forbidden() -> None:
    logits = torch.zeros(3, 5)
    # after 1 2 3 1 2 comes no 3 again; after two tokens there is no three of them yet
    found = forbid_repeated_ngrams(logits, [[1, 2, 3, 1, 2], [1, 2], []], 3)
    assert found.isinf().nonzero().tolist() == [[0, 3]]
    assert forbid_repeated_ngrams(logits[:1], [[0, 1, 2, 3, 4]], 1).isfinite().all(), "one must be left"


def test_no_ngram_comes_twice(llama: Any) -> None:
    plain = sampled(llama, PROMPTS, greedy=True).responses()
    assert any(len(set(ngrams(tokens, 2))) < LENGTH - 1 for tokens in plain), "else nothing is tested"
    for settings in ({"greedy": True}, {"temperature": 0.3}):
        for tokens in sampled(llama, PROMPTS, no_repeat_ngram_size=2, **settings).responses():
            assert len(set(ngrams(tokens, 2))) == LENGTH - 1


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_scope_of_penalties_is_the_response_or_all(llama: Any, num_beams: int) -> None:
    settings: dict[str, Any] = {"repetition_penalty": 1e6, "num_beams": num_beams, "greedy": num_beams == 1}
    prompts = [list(range(4, 30)), [5, 9]]  # many tokens: some of them are said again unless that costs
    alone = sampled(llama, prompts, **settings).responses()
    both = sampled(llama, prompts, **settings, penalty_scope="all").responses()
    for prompt, own, wide in zip(prompts, alone, both, strict=True):
        assert len(set(own)) == LENGTH and len(set(wide)) == LENGTH
        assert not set(wide) & set(prompt)
    assert set(alone[0]) & set(prompts[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_find_what_those_of_transformers_find(families: Path, family: str) -> None:
    model = load(families, family)
    theirs_model = AutoModelForCausalLM.from_pretrained(
        families / family, attn_implementation=attention_of(family)
    ).eval()
    eos = most_said(sampled(model, SAME_LENGTH, num_beams=4).responses())
    found_by: dict[str, list[list[int]]] = {}
    for name, ours, theirs in (
        ("plain", {}, {}),
        (
            "penalised",
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "penalty_scope": "all"},
            {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
        ),
        ("short", {"length_penalty": -2.0}, {"length_penalty": -2.0}),
    ):
        found_by[name] = sampled(model, SAME_LENGTH, num_beams=4, eos=eos, **ours).responses()
        settings = {"num_beams": 4, "max_new_tokens": LENGTH, "eos_token_id": eos, "pad_token_id": PAD}
        expected = theirs_model.generate(
            torch.tensor(SAME_LENGTH), generation_config=GenerationConfig(**settings, **theirs)
        )[:, 5:]
        for mine, row in zip(found_by[name], expected.tolist(), strict=True):
            assert mine == (row[: row.index(eos) + 1] if eos in row else row), name
    lengths = {name: sum(map(len, found)) for name, found in found_by.items()}
    assert found_by["plain"] != found_by["penalised"]
    assert lengths["short"] <= lengths["plain"]


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_padded_prompts_are_those_of_each_alone(families: Path, family: str) -> None:
    model = load(families, family)
    settings: dict[str, Any] = {"num_beams": 3, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2}
    for scope in ("response", "all"):
        together = sampled(model, PROMPTS, eos=EOS, penalty_scope=scope, **settings).responses()
        alone = [
            sampled(model, [prompt], eos=EOS, penalty_scope=scope, **settings).responses()[0]
            for prompt in PROMPTS
        ]
        assert together == alone


def test_beams_see_the_laid_out_weights_of_a_policy(families: Path) -> None:
    engine = Engine(torch.device("cpu"), torch.float32)
    policy = Policy(load(families, "llama"), TextCodec(word_tokenizer(), style="plain"), engine)
    texts = ["w1 w2 w3", "w30", "w8 w8 w8 w9 w10"]
    decoding = Decoding(LENGTH, num_beams=3, no_repeat_ngram_size=2)
    found = policy.respond(texts, decoding, seed=0)
    prompts = [policy.codec.encode_prompt(text) for text in texts]
    expected = sampled(
        policy.model, prompts, eos=policy.codec.eos_token_id, num_beams=3, no_repeat_ngram_size=2
    )
    assert found.responses() == expected.responses()
    assert found.behaviour_logprobs is not None and not found.behaviour_logprobs.any()


def test_beams_find_likelier_responses_than_greedy_choices(llama: Any) -> None:
    greedy, beams = (
        response_logprobs(llama, sampled(llama, PROMPTS, **settings), temperature=1.0).sum(1)
        for settings in ({"greedy": True}, {"num_beams": 8})
    )
    assert (beams >= greedy - 1e-4).all() and (beams > greedy + 1e-2).any()


def test_beams_end_at_their_first_eos(llama: Any) -> None:
    eos = most_said(sampled(llama, PROMPTS, num_beams=3).responses())
    found = sampled(llama, PROMPTS, num_beams=3, eos=eos).responses()
    assert any(tokens[-1] == eos for tokens in found)
    assert all(eos not in tokens[:-1] for tokens in found)


def test_beams_do_not_search_among_numbers_that_are_none(families: Path) -> None:
    model = load(families, "llama")
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"^the model's logits are not finite"):
        sampled(model, PROMPTS, num_beams=2)


def test_a_checkpoints_own_generation_settings_do_not_count(families: Path) -> None:
    model = load(families, "llama")
    expected = sampled(model, PROMPTS, num_beams=3).responses()
    model.generation_config = own = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert sampled(model, PROMPTS, num_beams=3).responses() == expected
    assert model.generation_config is own


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty_scope": "prompt"}, "penalty_scope=prompt: it must be response or all"),
        ({"min_p": 1.5}, "min_p=1.5: it must be from 0 (off) to 1"),
        ({"typical_p": 0}, "typical_p=0: it must be above 0"),
        ({"num_beams": 0}, "num_beams=0: it must be at least 1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1: it must be 0 (off) or more"),
        ({"num_beams": 4, "temperature": 0.7}, "temperature=0.7 with num_beams=4, which draws nothing"),
        ({"num_beams": 4, "greedy": True}, "num_beams=4 with greedy=true: give one of them"),
        ({"greedy": True, "top_p": 0.9}, "top_p=0.9 with greedy=true, which draws nothing"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 is for beams"),
        ({"num_beams": 4, "min_p": 0.1}, "set min_p=0.0"),
    ],
)
def test_a_mistake_is_answered_with_key_value_and_remedy(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Decoding(8, **settings)
