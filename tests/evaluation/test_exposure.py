"""Exposure bias from models: exact divergences, continuations after prefixes, and what is left out."""

import copy
import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.decoding import Decoding
from rlhf.engine import Engine
from rlhf.evaluation import exposure
from rlhf.evaluation.compare import Scored, equals_oracle, summarise
from rlhf.evaluation.exposure import (
    Evidence,
    Instruments,
    Row,
    divergences,
    evidence_from,
    mauve,
    mauve_interval,
    measure,
    prefix_quality,
)
from rlhf.evaluation.statistics import Estimate
from rlhf.evaluation.systems import Generation, System, token_logprobs
from rlhf.models import forward
from rlhf.models.loading import LoadOptions, load_causal_lm, load_tokenizer
from rlhf.records import PromptRecord
from rlhf.sampling.policy import Policy
from rlhf.sources import tiny_folder
from rlhf.text import TextCodec

LIMIT = 12
SYSTEM = System("s", "path", Decoding(LIMIT))
CONTEXTS = [[10, 11, 12], [20], [30, 31], [40, 41, 42, 43]] * 3
RESPONSES = [[5, 6, 7, 8, 9], [50, 51], [60], [70, 71, 72]] * 3
TEXTS = (
    "the soup was",
    "my dog is",
    "a",
    "our old bed felt",
    "this",
    "his tea",
    "one",
    "her cat",
    "the",
    "my",
)
RECORDS = [PromptRecord(text, f" warm and {text}.") for text in TEXTS]


def random_policy(seed: int, dtype: torch.dtype = torch.float32) -> Policy:
    """A tiny model with preferences of its own."""
    folder = str(tiny_folder())
    model = load_causal_lm(folder, LoadOptions())
    torch.manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter) * 0.05
        parameter.data.mul_(4 if parameter.dim() > 1 else 1).add_(noise if parameter.dim() > 1 else 0.0)
    codec = TextCodec(load_tokenizer(folder), style="plain")
    return Policy(model.to(dtype), codec, Engine(torch.device("cpu"), dtype, micro_batch_size=5))


@pytest.fixture(scope="module")
def policy() -> Policy:
    return random_policy(0)


@pytest.fixture(scope="module")
def oracle() -> Policy:
    return random_policy(1)


def instruments(oracle: Policy | None, **more: Any) -> Instruments:
    options: dict[str, Any] = {"scorer": None, "prefix_lengths": [2, 4], "batch_size": 4, "seed": 1}
    return Instruments(oracle, **options | more)


def generations(policy: Policy, decoding: Decoding = SYSTEM.decoding) -> list[Generation]:
    rollout = policy.respond(TEXTS, decoding, seed=3)
    rows = zip(TEXTS, policy.texts(rollout), rollout.responses(), policy.ended(rollout), strict=True)
    return [Generation(*row, logprob=-1.0) for row in rows]


def by_definition(oracle: Policy, policy: Policy, context: list[int], response: list[int]) -> list[float]:
    """sum_v p_v (log p_v - log q_v) at every token of a response, from whole passes of one row."""
    tokens = torch.tensor([context + response])
    with torch.no_grad():
        scores = [each.model(tokens).logits[0].double().log_softmax(-1) for each in (oracle, policy)]
    p, q = (each[len(context) - 1 : -1] for each in scores)
    return (p.exp() * (p - q)).sum(-1).tolist()


def test_divergences_are_those_of_the_definition(
    oracle: Policy, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = divergences(oracle, policy, CONTEXTS, RESPONSES)
    assert [len(row) for row in found] == [len(response) for response in RESPONSES]
    for row, context, response in zip(found, CONTEXTS, RESPONSES, strict=True):
        assert row == pytest.approx(by_definition(oracle, policy, context, response), rel=1e-4)
        assert min(row) > 0.01
    monkeypatch.setattr(forward, "CHUNK_FLOATS", 1000)  # three positions at a time
    pieces = divergences(oracle, policy, CONTEXTS, RESPONSES)
    assert all(row == pytest.approx(whole) for row, whole in zip(pieces, found, strict=True))


def test_a_policy_is_no_nats_from_itself_in_bfloat16_too(policy: Policy, oracle: Policy) -> None:
    assert {kl for row in divergences(policy, policy, CONTEXTS, RESPONSES) for kl in row} == {0.0}
    coarse, other = random_policy(0, torch.bfloat16), random_policy(1, torch.bfloat16)
    assert {kl for row in divergences(coarse, coarse, CONTEXTS, RESPONSES) for kl in row} == {0.0}
    found = torch.tensor([row[0] for row in divergences(other, coarse, CONTEXTS, RESPONSES)])
    exact = torch.tensor([row[0] for row in divergences(oracle, policy, CONTEXTS, RESPONSES)])
    assert torch.allclose(found, exact, rtol=0.1)


def test_tokens_that_one_model_alone_has_room_for_do_not_count(policy: Policy, oracle: Policy) -> None:
    wider = replace(oracle, model=copy.deepcopy(oracle.model))
    wider.model.resize_token_embeddings(oracle.model.config.vocab_size + 8)
    expected = divergences(oracle, policy, CONTEXTS[:2], RESPONSES[:2])
    for row, other in zip(divergences(wider, policy, CONTEXTS[:2], RESPONSES[:2]), expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def test_a_tokens_log_prob_does_not_hang_on_what_shares_its_pass(oracle: Policy) -> None:
    together = token_logprobs(oracle, CONTEXTS, RESPONSES)
    for row, context, response in zip(together, CONTEXTS, RESPONSES, strict=True):
        (alone,) = token_logprobs(oracle, [context], [response])
        assert row == pytest.approx(alone, abs=1e-4)


def test_measured_against_itself_a_policy_has_no_excess_error(policy: Policy) -> None:
    evidence = measure(SYSTEM, policy, generations(policy), RECORDS, instruments(policy))
    scored = Scored(SYSTEM, generations(policy), None, None, None, evidence)
    entry = summarise(scored, reference="x", num_bootstrap=50, seed=0)
    assert entry["exposure"]["excess_error"] == [] and equals_oracle(scored, entry)
    assert entry["exposure"]["perplexity"]["mean"] > 1


def test_own_and_gold_contexts_of_one_prompt_begin_alike(policy: Policy, oracle: Policy) -> None:
    found = generations(policy)
    evidence = measure(SYSTEM, policy, found, RECORDS, instruments(oracle))
    assert evidence.own_kl is not None and evidence.gold_kl is not None and evidence.logprobs is not None
    assert [len(row) for row in evidence.own_kl] == [len(g.tokens) for g in found]
    assert {len(row) for row in evidence.gold_kl} == {LIMIT}, "cut where responses are"
    assert [row[0] for row in evidence.own_kl] == pytest.approx([row[0] for row in evidence.gold_kl])
    assert [len(row) for row in evidence.logprobs] == [len(g.tokens) for g in found]
    scored = Scored(SYSTEM, found, None, None, None, evidence)
    entry = summarise(scored, reference="x", num_bootstrap=50, seed=0)
    assert entry["exposure"]["excess_error"][0]["excess"]["mean"] == pytest.approx(0, abs=1e-4)
    assert not equals_oracle(scored, entry)


def test_after_a_prefix_of_its_own_a_greedy_system_says_what_it_said(policy: Policy, oracle: Policy) -> None:
    system = replace(SYSTEM, decoding=Decoding(LIMIT, greedy=True))
    said = policy.respond(TEXTS, system.decoding, seed=0).responses()
    prompts = [policy.codec.encode_prompt(text) for text in TEXTS]
    rows = [Row(*each) for each in zip(TEXTS, prompts, said, said, strict=True)]
    count: Any = lambda prompts, texts: [float(len(text)) for text in texts]  # noqa: E731
    count.name = "length"
    found = prefix_quality(4, system, policy, rows, instruments(oracle, scorer=count))
    assert found is not None and found.logprobs is not None and found.scores is not None
    assert all(gold == pytest.approx(own, abs=1e-5) for gold, own in found.logprobs)
    assert all(gold == own for gold, own in found.scores)
    rest = policy.codec.decode_response(said[0][4:])
    assert found.scores[0][0] == len(rest), "the prefix is not scored"
    expected = token_logprobs(oracle, [prompts[0] + said[0][:4]], [said[0][4:]])[0]
    assert found.logprobs[0][1] == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_penalties_know_the_prefix_as_the_responses(policy: Policy) -> None:
    begun = [list(range(50, 200))] * 2
    contexts = [[10, 11, *prefix] for prefix in begun]
    decoding = Decoding(6, no_repeat_ngram_size=1)
    for tokens in policy.go_on(contexts, decoding, seed=1, begun=begun).responses():
        assert not {*tokens} & {*begun[0]}
    free = policy.go_on(contexts, decoding, seed=1).responses()
    assert {token for tokens in free for token in tokens} & {*begun[0]}, "otherwise they would be said"


def test_a_best_of_n_and_beams_are_not_continued(policy: Policy) -> None:
    for system in (replace(SYSTEM, best_of=4), replace(SYSTEM, decoding=Decoding(LIMIT, num_beams=2))):
        assert measure(system, policy, generations(policy), RECORDS, instruments(None)).prefixes == []


def test_prompts_without_reference_and_prefixes_as_long_as_responses_are_left_out(
    policy: Policy, oracle: Policy
) -> None:
    found = generations(policy)
    without = [PromptRecord(record.prompt) for record in RECORDS]
    evidence = measure(SYSTEM, policy, found, without, instruments(oracle))
    assert (evidence.own_kl, evidence.gold_kl, evidence.prefixes) == ([], [], [])
    assert evidence.logprobs is not None and len(evidence.logprobs) == len(found)
    one = [*RECORDS[:-1], without[-1]]
    evidence = measure(SYSTEM, policy, found, one, instruments(oracle))
    assert evidence.own_kl is not None and len(evidence.own_kl) == len(found) - 1
    assert evidence.prefixes == [], "fewer rows than are taken for a mean"
    long = instruments(None, prefix_lengths=[LIMIT, LIMIT + 5])
    assert measure(SYSTEM, policy, found, RECORDS, long).prefixes == []


def test_evidence_survives_the_disk(policy: Policy, oracle: Policy) -> None:
    evidence = measure(SYSTEM, policy, generations(policy), RECORDS, instruments(oracle))
    evidence = replace(evidence, mauve=Estimate(0.5, 0.4, 0.6))
    nothing = Evidence(None, None, None, None, [])
    options: dict[str, Any] = {"reference": "x", "num_bootstrap": 50, "seed": 0}
    for each in (evidence, nothing):
        again = evidence_from(json.loads(json.dumps(asdict(each))))
        entries = [
            summarise(Scored(SYSTEM, generations(policy), None, None, None, one), **options)
            for one in (each, again)
        ]
        assert entries[0] == entries[1]


def test_equal_texts_have_a_mauve_of_one(oracle: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mauve(oracle, CONTEXTS, RESPONSES, RESPONSES) is None, "too few"
    monkeypatch.setattr(exposure, "LEAST_MAUVE_ROWS", 80)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, 250, (100, 6), generator=generator).tolist()
    contexts = [row[:3] for row in rows]
    eos = oracle.codec.eos_token_id
    responses = [row[3:] for row in rows]
    equal = mauve(oracle, contexts, responses, [[*row, eos] for row in responses])
    assert equal is not None and (equal.mean, equal.high) == (pytest.approx(1.0), 1.0)
    found = mauve(oracle, contexts, responses, [[7, 7, 7]] * len(rows))
    assert found is not None and found.low <= found.mean <= found.high < 0.5


@pytest.mark.parametrize(("alike", "share"), [(3.0, 0.86), (30.0, 0.95), (1e6, 0.98)])
def test_the_interval_of_mauve_covers_that_of_all_texts(alike: float, share: float) -> None:
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(300):
        p, q = rng.dirichlet([alike] * 10), rng.dirichlet([alike] * 10)
        whole = mauve_interval(p, q, 1_000_000, seed=0).mean
        found = mauve_interval(rng.multinomial(200, p) / 200, rng.multinomial(200, q) / 200, 200, seed=0)
        covered.append(found.low <= whole <= found.high)
    assert np.mean(covered) == pytest.approx(share, abs=0.03)


def test_mauve_of_histograms_is_that_of_the_library() -> None:
    from mauve import compute_mauve

    rng = np.random.default_rng(0)
    texts = np.repeat(np.eye(10), 20, axis=0) * 100 + rng.normal(size=(200, 10))
    once = compute_mauve(p_features=texts, q_features=texts[40:], num_buckets=10)
    own = mauve_interval(once.p_hist, once.q_hist, 200, seed=0)
    assert own.mean == pytest.approx(once.mauve, abs=1e-12)


def test_an_oracle_is_refused_or_left_out_by_its_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import evaluate

    systems = [replace(SYSTEM, name="a", path="a"), replace(SYSTEM, name="b", path="b")]
    model = SimpleNamespace(path="z/base", revision=None)
    monkeypatch.setattr(evaluate, "load_codec", lambda path, config: None)
    monkeypatch.setattr(evaluate, "same_tokenizer", lambda ours, theirs, model: theirs[0] == ours)

    def found(oracle: str | None) -> Any:
        return evaluate.find_oracle(SimpleNamespace(oracle=oracle, model=model), systems)

    assert found(None) == (None, [])
    assert found("a/large") == (
        "a/large",
        ["not measured by the oracle, which has another tokenizer: b"],
    )
    path, (why,) = found("z/base")
    assert (
        path is None and why == "no oracle: no system has the tokenizer of z/base; give another with oracle="
    )
    with pytest.raises(ValueError, match=r"oracle=c/large: no system has its tokenizer, .* or oracle=null"):
        found("c/large")
    with pytest.raises(ValueError, match=r"oracle=\./nowhere: "):
        monkeypatch.setattr(evaluate, "load_codec", lambda path, config: load_tokenizer(path))
        found("./nowhere")
