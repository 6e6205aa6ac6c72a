"""Laws of the sampler: tokens as Hugging Face decodes them, the right frequencies, rows apart from each
other.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rlhf.batches import left_pad
from rlhf.decoding import Decoding
from rlhf.engine import Engine
from rlhf.models.forward import response_logprobs
from rlhf.sampling.decoding import penalise_repetition
from rlhf.sampling.policy import Policy, ready_to_sample
from rlhf.sampling.sampler import choose_tokens, draw_uniforms
from rlhf.text import TextCodec
from tests.models.families import EOS, FAMILIES, PAD, WORDS, attention_of, load, word_tokenizer
from tests.sampling.drawing import NEVER, PROMPTS, sampled

# Tokens 0 and 1 are in the response: 2.4 / 1.2 = 2.0, -1.0 * 1.2 = -1.2; token 2 keeps .5.
PENALTY: dict[str, Any] = {
    "penalty": 1.2,
    "seen_ids": [0, 1],
    "logits": [2.4, -1.0, 0.5],
    "out": [2.0, -1.2, 0.5],
}


@pytest.fixture(scope="module")
def llama(families: Path) -> Any:
    return load(families, "llama")


def common_token(model: Any) -> int:
    """Return a token that many rows generate greedily, not at once: an EOS that happens."""
    responses = sampled(model, PROMPTS, Decoding(12, greedy=True), eos=NEVER).responses()
    counts = torch.zeros(64, dtype=torch.long)
    for response in responses:
        counts[sorted(set(response[1:]) - {response[0]})] += 1
    return int(counts.argmax())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_hugging_face(families: Path, family: str) -> None:
    model = load(families, family)
    eos = common_token(model)
    ours = sampled(model, PROMPTS, Decoding(12, greedy=True), eos=eos).responses()
    theirs_model = AutoModelForCausalLM.from_pretrained(
        families / family, attn_implementation=attention_of(family)
    ).eval()
    batch = left_pad(PROMPTS, PAD)
    output = theirs_model.generate(
        input_ids=batch.tokens,
        attention_mask=batch.attention_mask.long(),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=eos,
        pad_token_id=PAD,
    )
    theirs = [row[: row.index(eos) + 1] if eos in row else row for row in output[:, 7:].tolist()]
    assert ours == [row[: len(mine)] for row, mine in zip(theirs, ours, strict=True)]
    assert [len(row) for row in ours] == [len(row) for row in theirs]
    lengths = {len(row) for row in ours}
    assert len(lengths) > 1, "no row ended before another: the test shows nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_depend_on_the_rows_beside_them(families: Path, family: str) -> None:
    # With an EOS that several rows meet at different steps, rows leave the batch while others go on.
    model = load(families, family)
    eos = common_token(model)
    uniforms = draw_uniforms(len(PROMPTS), 12, seed=3)
    together = sampled(model, PROMPTS, Decoding(12), uniforms=uniforms, eos=eos)
    alone = [
        sampled(model, [prompt], Decoding(12), uniforms=uniforms[i : i + 1], eos=eos)
        for i, prompt in enumerate(PROMPTS)
    ]
    assert together.responses() == [row.responses()[0] for row in alone]
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    shuffled = sampled(model, [PROMPTS[i] for i in order], Decoding(12), uniforms=uniforms[order], eos=eos)
    assert [together.responses()[i] for i in order] == shuffled.responses()


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_prompts_are_computed_once_and_sampled_apart(families: Path, family: str) -> None:
    model = load(families, family)
    eos = common_token(model)
    prompts = [prompt for prompt in PROMPTS[:3] for _ in range(4)]
    uniforms = draw_uniforms(12, 12, seed=3)
    rows: list[int] = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, given, output: rows.append(len(given[0])))
    together = sampled(model, prompts, Decoding(12), uniforms=uniforms, eos=eos)
    handle.remove()
    assert rows[0] == 3 and rows[1] > 3
    alone = [
        sampled(model, [prompt], Decoding(12), uniforms=uniforms[i : i + 1], eos=eos)
        for i, prompt in enumerate(prompts)
    ]
    assert together.responses() == [row.responses()[0] for row in alone]
    assert len({tuple(row) for row in together.responses()[:4]}) > 1


def test_the_cache_may_grow_in_strides_of_any_size(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eos = common_token(llama)
    found = []
    for stride in (16, 5, 1):
        monkeypatch.setattr("rlhf.sampling.cache.STRIDE", stride)
        found.append(sampled(llama, PROMPTS, Decoding(16), seed=2, eos=eos).responses())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_behaviour_logprobs_are_the_learners_own(families: Path, family: str, temperature: float) -> None:
    model = load(families, family)
    rollout = sampled(model, PROMPTS, Decoding(16, temperature=temperature))
    with torch.no_grad():
        learner = response_logprobs(model, rollout, temperature=temperature)
    assert rollout.behaviour_logprobs is not None
    torch.testing.assert_close(rollout.behaviour_logprobs, learner, rtol=0, atol=1e-5)
    assert not rollout.behaviour_logprobs[~rollout.response_mask].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_weights_under_bfloat16_products_sample_what_they_learn(families: Path, family: str) -> None:
    model, engine = load(families, family), Engine(torch.device("cpu"), torch.bfloat16)
    with ready_to_sample(model, engine):
        rollout = sampled(model, PROMPTS, Decoding(12))
    assert rollout.behaviour_logprobs is not None
    learned = response_logprobs(model, rollout, temperature=1.0)
    torch.testing.assert_close(rollout.behaviour_logprobs.float(), learned, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_laid_out_for_sampling_draw_the_same_tokens(families: Path, family: str) -> None:
    model = load(families, family)
    eos = common_token(model)
    expected = sampled(model, PROMPTS, Decoding(12), seed=3, eos=eos)
    with ready_to_sample(model, Engine(torch.device("cpu"), torch.float32)):
        found = sampled(model, PROMPTS, Decoding(12), seed=3, eos=eos)
    assert found.responses() == expected.responses()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_frequencies_are_the_models(llama: Any, temperature: float) -> None:
    # 4000 draws of the token after one prompt; cells below 5 expected draws are pooled (Cochran's rule). A
    # right sampler falls below p = .001 for one seed in a thousand; the seed is fixed.
    num_draws, prompt = 4000, PROMPTS[3]
    rollout = sampled(llama, [prompt] * num_draws, Decoding(1, temperature=temperature), seed=5)
    counts = torch.bincount(rollout.response_tokens[:, 0], minlength=48).double()
    with torch.no_grad():
        logits = llama(torch.tensor([prompt])).logits[0, -1].double()
    expected = num_draws * torch.softmax(logits / temperature, -1)
    large = expected >= 5
    assert large.sum() > 8
    observed = torch.cat([counts[large], counts[~large].sum()[None]])
    due = torch.cat([expected[large], expected[~large].sum()[None]])
    assert chisquare(observed.numpy(), due.numpy()).pvalue > 0.001
    # The test has the power to tell: the frequencies of another temperature are refused.
    other = torch.softmax(logits / 0.85, -1)
    wrong = num_draws * torch.cat([other[large], other[~large].sum()[None]])
    assert chisquare(observed.numpy(), wrong.numpy()).pvalue < 0.001


def test_a_seed_names_its_tokens(llama: Any) -> None:
    first, again = (sampled(llama, PROMPTS, Decoding(12), seed=1) for _ in range(2))
    other = sampled(llama, PROMPTS, Decoding(12), seed=2)
    assert first.responses() == again.responses() != other.responses()


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [(5, 1.0, 1.0), (0, 0.6, 1.0), (7, 0.8, 0.7), (1, 1.0, 1.0), (90, 0.05, 2.0)],
)
def test_top_k_and_top_p_leave_what_transformers_leaves(top_k: int, top_p: float, temperature: float) -> None:
    logits = 2 * torch.randn(6, 48, generator=torch.Generator().manual_seed(0))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    warpers.append(TopPLogitsWarper(top_p))
    no_tokens: Any = torch.zeros(6, 1, dtype=torch.long)
    theirs = torch.softmax(warpers(no_tokens, logits.clone()), -1)
    decoding = Decoding(1, temperature=temperature, top_k=top_k, top_p=top_p)
    ours = torch.zeros_like(theirs)
    # A grid of uniform numbers finds every token whose probability is above the grid's step.
    for uniform in torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]:
        tokens, logprobs = choose_tokens(logits, uniform.expand(6), decoding, [[]] * 6)
        ours[torch.arange(6), tokens] = logprobs.exp()
    torch.testing.assert_close(ours, theirs.where(ours > 0, torch.zeros(())), atol=1e-6, rtol=0)
    assert float(theirs.where(ours == 0, torch.zeros(())).max()) <= 1 / 4000


def test_the_ends_of_the_uniform_numbers_choose_possible_tokens() -> None:
    # Tokens 0 and 3 have probability 0; the smallest and the largest uniform number must not reach them.
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    for uniform, token in ((0.0, 1), (0.5, 2), (1 - 2**-53, 2)):
        tokens, logprobs = choose_tokens(
            logits, torch.tensor([uniform], dtype=torch.float64), Decoding(1), [[]]
        )
        assert tokens.item() == token
        assert logprobs.item() == pytest.approx(-0.693147, abs=1e-6)  # log(1/2)


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_choose_no_token(greedy: bool, number: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = number
    with pytest.raises(ValueError, match=r"^the model's logits are not finite"):
        choose_tokens(logits, torch.zeros(2), Decoding(1, greedy=greedy), [[], []])


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    case = PENALTY
    found = penalise_repetition(torch.tensor([case["logits"]]), [case["seen_ids"]], case["penalty"])
    torch.testing.assert_close(found, torch.tensor([case["out"]]))
    unseen = penalise_repetition(torch.tensor([case["logits"]]), [[]], case["penalty"])
    assert unseen.tolist() == torch.tensor([case["logits"]]).tolist()


def test_the_golden_file_has_the_same_penalty(shared: Path) -> None:
    assert json.loads((shared / "golden.json").read_text(encoding="utf-8"))["repetition_penalty"] == PENALTY


def test_repetition_penalty_sees_the_response_and_not_the_prompt(llama: Any) -> None:
    # A penalty that rules repetition out: no token twice in a response, the prompt's own tokens allowed.
    penalised = Decoding(12, greedy=True, repetition_penalty=1e6)
    responses = sampled(llama, PROMPTS, penalised, eos=NEVER).responses()
    assert all(len(set(response)) == 12 for response in responses)
    free = sampled(llama, PROMPTS, Decoding(1, greedy=True), eos=NEVER).responses()
    assert [response[:1] for response in responses] == free
    assert any(set(response) & set(prompt) for response, prompt in zip(responses, PROMPTS, strict=True))


def test_penalties_are_part_of_the_behaviour_logprobs(llama: Any) -> None:
    # The tokens were drawn from the penalised distribution, so the model's own log-probs must differ from
    # its.
    rollout = sampled(llama, PROMPTS, Decoding(12, repetition_penalty=3.0))
    assert rollout.behaviour_logprobs is not None
    with torch.no_grad():
        plain = response_logprobs(llama, rollout, temperature=1.0)
    torch.testing.assert_close(rollout.behaviour_logprobs[:, 0], plain[:, 0], rtol=0, atol=1e-5)
    assert (rollout.behaviour_logprobs - plain).abs().max() > 0.1


def test_a_response_ends_with_its_first_eos_or_at_the_limit(llama: Any) -> None:
    rollout = sampled(llama, PROMPTS * 8, Decoding(12))
    ended = [response for response in rollout.responses() if EOS in response]
    assert 0 < len(ended) < 48
    for response in rollout.responses():
        assert EOS not in response[:-1]
        assert response[-1] == EOS or len(response) == 12


def test_sampling_in_training_mode_uses_the_cache(families: Path) -> None:
    # Gradient checkpointing needs training mode, in which transformers drops the cache without a word.
    model = load(families, "llama")
    expected = sampled(model, PROMPTS, Decoding(12)).responses()
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert sampled(model, PROMPTS, Decoding(12)).responses() == expected
    assert model.training


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_new_tokens": 0}, "max_response_tokens=0: it must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0: it must be above 0; greedy decoding is decoding=greedy"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: it must be above 0"),
        ({"top_k": -1}, r"top_k=-1: it must be 0 \(off\) or more"),
        ({"top_p": 0.0}, r"top_p=0.0: it must be above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p=1.1: it must be above 0 and at most 1"),
    ],
)
def test_impossible_decoding_is_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**({"max_new_tokens": 4} | setting))


def test_policy_responds_to_texts(llama: Any) -> None:
    codec = TextCodec(word_tokenizer(), style="plain")
    policy = Policy(llama, codec, Engine(torch.device("cpu"), torch.float32))
    rollout = policy.respond(["w1 w2 w3", "w9"] * 8, Decoding(8), seed=4)
    texts, ended = policy.texts(rollout), policy.ended(rollout)
    assert all(set(text.split()) <= {*WORDS} for text in texts)
    assert ended == [response[-1] == EOS for response in rollout.responses()]
    assert 0 < sum(ended) < 16
