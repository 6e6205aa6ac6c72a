"""Systems: how they are named, sampled, chosen from, and measured against a reference."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.decoding import Decoding
from rlhf.engine import Engine
from rlhf.evaluation.store import Store
from rlhf.evaluation.systems import (
    Generation,
    System,
    build_systems,
    check_choosers,
    choose,
    generate,
    reference_logprobs,
    saved_responses,
)
from rlhf.metrics import progress
from rlhf.models.loading import LoadOptions, load_causal_lm, load_tokenizer
from rlhf.processes import Processes
from rlhf.records import PromptRecord
from rlhf.sampling.policy import Policy
from rlhf.sources import tiny_folder
from rlhf.text import TextCodec

PROMPTS = [PromptRecord(text) for text in ("the soup was", "my dog is", "a", "our old bed felt", "this")]
DECODING = Decoding(12)


@pytest.fixture(scope="module")
def policy() -> Policy:
    folder = str(tiny_folder())
    codec = TextCodec(load_tokenizer(folder), style="plain")
    model = load_causal_lm(folder, LoadOptions())
    torch.manual_seed(0)
    for parameter in model.parameters():  # a distribution with preferences
        parameter.data.mul_(4 if parameter.dim() > 1 else 1)
    return Policy(model, codec, Engine(torch.device("cpu"), torch.float32))


def sampled(
    policy: Policy, *, best_of: int = 1, decoding: Decoding = DECODING, **more: Any
) -> list[Generation]:
    options = {"batch_size": 8, "seed": 1} | more
    bar = progress(len(PROMPTS))
    return generate(System("s", "path", decoding, best_of), policy, PROMPTS, bar=bar, **options)


def test_processes_share_out_whole_batches(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sampled(policy, batch_size=2)
    asked: list[int] = []
    monkeypatch.setattr(Policy, "respond", counting(asked, Policy.respond))
    parts: list[Any] = []

    def gathered(_: Processes, mine: Any, total: int) -> Any:
        parts.append((mine, total))
        return mine

    monkeypatch.setattr(Processes, "gathered", gathered)
    for rank in range(2):
        sampled(replace(policy, engine=replace(policy.engine, processes=Processes(rank, 2))), batch_size=2)
    assert asked == [2, 1, 2]
    (first, total), (second, _) = parts
    assert total == 3 and [*first[0], *second[0], *first[1]] == whole


def counting(asked: list[int], respond: Any) -> Any:
    """`respond`, which notes the number of its prompts."""

    def wrapped(self: Policy, prompts: Any, *arguments: Any, **more: Any) -> Any:
        asked.append(len(prompts))
        return respond(self, prompts, *arguments, **more)

    return wrapped


def test_systems_are_paths_or_mappings_on_top_of_the_common_decoding() -> None:
    specs = {"a": "x", "b": {"path": "y", "decoding": {"temperature": 0.5}}, "c": {"path": "z", "best_of": 4}}
    common = Decoding(8, top_k=3)
    assert build_systems(specs, common) == [
        System("a", "x", Decoding(8, top_k=3), 1),
        System("b", "y", Decoding(8, top_k=3, temperature=0.5), 1),
        System("c", "z", Decoding(8, top_k=3), 4),
    ]


def test_a_policy_has_no_kl_to_itself(policy: Policy) -> None:
    found = sampled(policy)
    logprobs = reference_logprobs(policy, found, temperature=1.0)
    assert len(found) == len(PROMPTS) and min(logprobs) < -5
    assert logprobs == pytest.approx([g.logprob for g in found], abs=1e-4)


def test_kl_at_another_temperature_is_measured_at_that_temperature(policy: Policy) -> None:
    found = sampled(policy, decoding=Decoding(12, temperature=0.7))
    expected = [g.logprob for g in found]
    assert reference_logprobs(policy, found, temperature=0.7) == pytest.approx(expected, abs=1e-4)
    assert reference_logprobs(policy, found, temperature=1.0) != pytest.approx(expected, abs=1e-2)


def test_the_reference_does_not_care_what_shares_its_batch(policy: Policy) -> None:
    found = sampled(policy)
    together = reference_logprobs(policy, found, temperature=1.0)
    alone = [reference_logprobs(policy, [each], temperature=1.0)[0] for each in found]
    assert alone == pytest.approx(together, abs=1e-4)


def test_best_of_n_takes_what_the_proxy_likes_best(policy: Policy) -> None:
    drawn = sampled(policy, best_of=4)
    scores = [float(len(row.response)) for row in drawn]
    assert [row.prompt for row in drawn] == [record.prompt for record in PROMPTS for _ in range(4)]
    most = [0.0] * len(PROMPTS)
    for n in (1, 2, 4):  # of one pool, so that more are never worse
        chosen = choose(System("s", "path", DECODING, n, pool=4), drawn, scores)
        assert [row.prompt for row in chosen] == [record.prompt for record in PROMPTS]
        for i, row in enumerate(chosen):
            assert len(row.response) == max(scores[4 * i : 4 * i + n]) >= most[i]
            most[i] = len(row.response)
    assert most != scores[::4]


def test_a_list_of_best_of_is_a_system_for_each_from_one_pool() -> None:
    found = build_systems({"a": "x", "best": {"path": "y", "best_of": [8, 2]}}, DECODING)
    assert [(each.name, each.best_of, each.draws, each.curve) for each in found] == [
        ("a", 1, 1, None),
        ("best_2", 2, 8, "best"),
        ("best_8", 8, 8, "best"),
    ]
    with pytest.raises(ValueError, match="systems: two would be called a_2; give one of them another name"):
        build_systems({"a_2": "x", "a": {"path": "y", "best_of": [2, 8]}}, DECODING)


def test_best_of_n_without_a_proxy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"systems\.s: best_of=4 needs a proxy to choose by; set proxy="):
        check_choosers([System("s", "path", DECODING, best_of=4)], None)
    check_choosers([System("s", "path", DECODING)], None)


def test_another_seed_gives_other_samples_and_the_same_seed_the_same(policy: Policy) -> None:
    assert sampled(policy) == sampled(policy)
    assert [g.tokens for g in sampled(policy)] != [g.tokens for g in sampled(policy, seed=2)]


def test_generations_survive_the_disk(policy: Policy, tmp_path: Path) -> None:
    found = [
        *sampled(policy),
        Generation([{"role": "user", "content": "é 😀\u2028"}], "\n", [1], False, -0.1),
    ]
    store = Store(tmp_path / "store")
    for _ in range(2):
        again = store.kept(
            "generations",
            {"seed": 1},
            lambda: found,
            dump=lambda rows: [asdict(row) for row in rows],
            load=lambda rows: [Generation(**row) for row in rows],
        )
        assert again == found


def test_responses_from_elsewhere_are_told_by_their_prompts(
    policy: Policy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "others.jsonl"
    rows = [{"prompt": prompt.prompt, "response": f" answer {i}"} for i, prompt in enumerate(PROMPTS)]
    more = [{"prompt": "of another set", "response": "x"}, {"prompt": PROMPTS[0].prompt, "response": "later"}]
    place.write_text("".join(json.dumps(row) + "\n" for row in [*rows[::-1], *more]), encoding="utf-8")
    [system] = build_systems({"other": {"generations": str(place)}}, DECODING)
    found = saved_responses(system, PROMPTS, policy.codec, on_bad_row="stop")
    assert f"={place}: 1 rows are not used, whose prompt stands there before" in capsys.readouterr().out
    assert [g.response for g in found] == [row["response"] for row in rows]
    assert {(g.ended, g.logprob) for g in found} == {(None, None)}
    assert [policy.codec.decode_response(g.tokens) for g in found] == [g.response for g in found]
    silent = tmp_path / "silent.jsonl"
    silent.write_text('{"prompt": "a", "response": " "}\n', encoding="utf-8")
    [quiet] = build_systems({"other": {"generations": str(silent)}}, DECODING)
    [nothing] = saved_responses(quiet, [PromptRecord("a")], policy.codec, on_bad_row="stop")
    assert nothing.response == "" and policy.codec.decode_response(nothing.tokens) == ""
    unknown = [*PROMPTS, PromptRecord("not in it")]
    with pytest.raises(
        ValueError, match=r"systems.other.generations=.* no response to 1 of 6 prompts.*'not in"
    ):
        saved_responses(system, unknown, policy.codec, on_bad_row="stop")
