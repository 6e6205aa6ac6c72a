"""The adversary: what it learns from, what it says, and a policy that it draws towards its references."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.batches import Rollout
from rlhf.checkpoint import StageFolder
from rlhf.exposure import discriminator as module
from rlhf.exposure.discriminator import Discriminator, told_apart, verdict
from rlhf.models.roles import Roles
from rlhf.ppo import Learner
from rlhf.ppo_run import PPORun
from rlhf.records import Demonstration, PromptRecord
from rlhf.text import TextCodec
from tests.models.families import EOS, word_tokenizer
from tests.stage_runs import read_lines, scorer_of
from tests.test_ppo import experience_of, roles_of, settings, weights

# References say w7 at every second place; the policy of this file hardly ever does.
PROMPTS = [f"w{i} w{i + 1}" for i in range(20)]
REFERENCES = [Demonstration(text, f"w{i} w7 w{i + 2} w7 w{i + 9} w7 w3") for i, text in enumerate(PROMPTS)]
SAMPLES = [f"w{i + 20} w{i + 24} w{i + 21} w{i + 22} w8 w11" for i in range(20)]
SPEC: dict[str, Any] = {
    "kind": "discriminator",
    "learning_rate": 1e-2,
    "pretrain_updates": 4,
    "steps": 1,
    "batch_size": 8,
    "replay": 0.25,
    "replay_size": 30,
}
WITHOUT_REPLAY = {"replay": 0.0, "pretrain_updates": 1}


@pytest.fixture
def folder(families: Path) -> Path:
    return families


def adversarial(folder: Path, *, reward: dict[str, Any] | None = None, **more: Any) -> Any:
    return settings(folder, critic=None, reward={**SPEC, **(reward or {})}, **more)


def judge_of(config: Any, roles: Roles) -> Discriminator:
    return Discriminator(config, TextCodec(word_tokenizer(), style="plain"), roles, REFERENCES)


def run_of(folder: Path, runs: Path, *, reward: dict[str, Any] | None = None, **more: Any) -> PPORun:
    config = adversarial(folder, reward=reward, **more)
    config.runs = str(runs)
    stage = StageFolder(config.runs, "x", "ppo")
    stage.path.mkdir(parents=True, exist_ok=True)
    roles = roles_of(config)
    judge = judge_of(config, roles)
    return PPORun(config, judge.codec, roles, judge, [PromptRecord(text) for text in PROMPTS], stage)


def own_weights(judge: Discriminator) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in judge.trained]


def test_the_loss_and_what_is_told_right_by_hand() -> None:
    labels = torch.tensor([True, False])
    # ln 2 for each of two; ln(1 + e^-2) each; ln(1 + e^3) for the reference, ln(1 + e^-1) for the sample
    cases = [
        ([0.0, 0.0], 1.386294, 1.0),
        ([2.0, -2.0], 0.253856, 2.0),
        ([-3.0, -1.0], 3.361849, 1.0),
    ]
    for scores, loss, right in cases:
        assert verdict(torch.tensor(scores), labels).tolist() == pytest.approx([loss, right], abs=1e-5)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_it_starts_with_no_opinion_and_learns_to_tell(folder: Path, adapter: str) -> None:
    config = adversarial(folder, adapter=adapter, reward=WITHOUT_REPLAY)
    judge = judge_of(config, roles_of(config))
    assert set(judge(PROMPTS, SAMPLES)) == {0.0}
    found = [judge.update(PROMPTS, SAMPLES, step=step) for step in range(1, 25)]
    assert found[0] == pytest.approx({"discriminator_loss": math.log(2), "discriminator_accuracy": 0.5})
    assert found[-1]["discriminator_accuracy"] > 0.95 and found[-1]["discriminator_loss"] < 0.3
    likely = judge(PROMPTS, [each.response for each in REFERENCES])
    assert min(likely) > max(judge(PROMPTS, SAMPLES)), "a reference's score is higher than a sample's"


def test_a_sample_is_scored_as_it_is_learned_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = adversarial(folder)
    judge, read = judge_of(config, roles_of(config)), list[list[int]]()

    def scores(rows: Any) -> torch.Tensor:
        read.extend(rows)
        return torch.zeros(len(rows))

    monkeypatch.setattr(judge, "scores", scores)
    long = " ".join(["w5"] * 30)
    judge(["w1"] * 3 + PROMPTS, [long, "w1 w2", long, *SAMPLES])
    longest = max(len(response) for _, response in judge.references)
    for row, (prompt, response) in zip(read[3:], judge.texts(PROMPTS, SAMPLES), strict=True):
        said = row[len(prompt) : -1]
        assert row[-1] == EOS and said == response[: len(said)] and 0 < len(said) < len(response)
    assert max(map(len, read)) <= 2 + longest, "no sample is read beyond a reference"
    assert read[0] == read[2], "samples of one prompt are cut alike"
    lengths = [len(row) for row in read[3:]]
    judge.num_updates = 1
    read.clear()
    judge(["w1"] * 3 + PROMPTS, [long, "w1 w2", long, *SAMPLES])
    assert [len(row) for row in read[3:]] != lengths, "each update draws other cuts"


def test_a_sample_is_read_beside_a_reference_of_its_own_prompt(folder: Path) -> None:
    config = adversarial(folder)
    roles, codec = roles_of(config), TextCodec(word_tokenizer(), style="plain")
    others = [PromptRecord(f"w{i} w{i}", f"w{i} w9 w8") for i in range(10)] + [PromptRecord("w40 w40")]
    judge = Discriminator(config, codec, roles, REFERENCES, others)
    texts = [each.prompt for each in others] + [each.prompt for each in REFERENCES]
    prompts = [codec.encode_prompt(text) for text in texts]
    for draw in range(3):
        found = judge.beside(prompts, judge.draw(draw))
        known = [prompt for prompt, _ in found]
        assert known[:10] == prompts[:10] and known[11:] == prompts[11:]
        assert known[10] in prompts[:10] + prompts[11:], "without a reference, any"


def test_a_score_says_nothing_of_eos_white_space_or_the_tokens_that_were_drawn(folder: Path) -> None:
    config = adversarial(folder, reward=WITHOUT_REPLAY)
    judge = judge_of(config, roles_of(config))
    judge.update(PROMPTS, SAMPLES, step=1)
    assert judge(PROMPTS, [f"  {text}\n" for text in SAMPLES]) == judge(PROMPTS, SAMPLES)


def test_what_a_sample_lacks_of_its_references_length_costs_it_the_lowest_logit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adversarial(folder)
    judge = judge_of(config, roles_of(config))
    assert {len(response) for _, response in judge.references} == {7}
    texts = ["", "w1", " ".join(["w1"] * 7), " ".join(["w1"] * 12)]
    for logits, expected in (
        ([0.0, -1.0, -1.5, 0.5], [-1.5, -1.0 - 1.5 * 6 / 7, -1.5, 0.5]),
        ([0.0, 1.0, 2.0, 0.5], [0.0, 1.0, 2.0, 0.5]),
    ):
        monkeypatch.setattr(judge, "scores", lambda rows, logits=logits: torch.tensor(logits))
        assert judge(PROMPTS[:4], texts) == pytest.approx(expected)


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("more", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointing"])
def test_micro_batches_and_workers_change_no_weight(folder: Path, adapter: str, more: dict[str, Any]) -> None:
    found = []
    for micro_batch_size, workers, options in ((None, 1, {}), (3, 2, more)):
        config = adversarial(folder, adapter=adapter, **options)
        judge = judge_of(config, roles_of(config, micro_batch_size, workers))
        metrics = [judge.update(PROMPTS, SAMPLES, step=step) for step in (1, 2, 3)]
        found.append((metrics, own_weights(judge)))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    for weight, same in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(weight, same, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("algo", ["ppo", "rloo"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_policy_and_discriminator_leave_each_other_alone(folder: Path, adapter: str, algo: str) -> None:
    config = adversarial(folder, adapter=adapter, algo=algo, rollouts_per_prompt=2)
    roles = roles_of(config)
    judge, models = judge_of(config, roles), roles.actor_critic
    parts = [*models.policy_parameters(), *models.critic_parameters()]
    assert not {id(each) for each in parts} & {id(each) for each in judge.trained}
    learned = [each.detach().clone() for each in parts]
    judge.update(PROMPTS, SAMPLES, step=1)
    assert all(one.equal(other) for one, other in zip(parts, learned, strict=True))
    scores, before = judge(PROMPTS, SAMPLES), own_weights(judge)
    assert len(set(scores)) > 1
    Learner(models, roles.engine, config).update(experience_of(roles, config), step=1)
    assert not all(one.equal(other) for one, other in zip(parts, learned, strict=True))
    assert all(one.equal(other) for one, other in zip(before, judge.trained, strict=True))
    assert judge(PROMPTS, SAMPLES) == scores


def test_an_adapter_is_all_that_it_adds_to_the_policys_trunk(folder: Path) -> None:
    config = adversarial(folder, adapter="lora", algo="reinforce")
    roles = roles_of(config)
    before = sum(p.numel() for p in roles.actor_critic.parameters())
    judge = judge_of(config, roles)
    added = sum(p.numel() for p in roles.actor_critic.parameters()) - before
    adapter = sum(p.numel() for p in roles.actor_critic.policy_parameters())
    assert added == adapter and sum(p.numel() for p in judge.trained) == adapter + 32


def test_old_samples_are_bounded_and_a_share_of_what_it_learns_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = adversarial(folder)
    judge, seen = judge_of(config, roles_of(config)), list[list[str]]()
    learn_from = judge.learn_from

    def spy(pairs: Any, draw: Any, *, step: int) -> tuple[float, float]:
        seen.append([judge.codec.decode_response(sample) for _, (_, sample) in pairs])
        return learn_from(pairs, draw, step=step)

    monkeypatch.setattr(judge, "learn_from", spy)
    for step in range(1, 6):
        judge.update(PROMPTS, [f"w{step} {text}" for text in SAMPLES], step=step)
        assert len(judge.replay) == min(20 * step, 30)
    for step, texts in enumerate(seen, start=1):
        own = [text for text in texts if text.startswith(f"w{step} ")]
        assert len(texts) == 8 and len(own) == (8 if step == 1 else 6) and len(set(own)) == len(own)
    kept = {judge.codec.decode_response(response).split()[0] for _, response in judge.replay}
    assert len(kept) > 2, "samples of several updates are kept"


def share_of_w7(run: PPORun, step: int) -> float:
    rollout = run.policy.respond(PROMPTS * 4, run.decoding, seed=step)
    words = [word for text in run.policy.texts(rollout) for word in text.split()]
    return words.count("w7") / len(words)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["ppo", "reinforce", "rloo"])
def test_what_references_have_and_samples_lack_comes(folder: Path, tmp_path: Path, algo: str) -> None:
    run = run_of(
        folder,
        tmp_path,
        reward={"pretrain_updates": 20, "batch_size": 24},
        algo=algo,
        updates=24,
        batch_size=48,
        rollouts_per_prompt=2,
    )
    run.kl.coef = 0.0
    before = share_of_w7(run, 0)
    run.train(None)
    assert run.last["length"] > 6, "it does not learn to say nothing"
    assert before < 0.05, "3 of 7 words of a reference are w7"
    assert 0.15 < share_of_w7(run, 0) < 0.8


def test_metrics_have_its_accuracy_before_it_learned(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, tmp_path, updates=3)
    run.train(None)
    lines = read_lines(run.folder.path / "metrics.jsonl")
    for line in lines:
        assert 0 <= line["discriminator_accuracy"] <= 1 and line["discriminator_loss"] > 0
    checks = [check.name for check in run.checks()]
    assert checks[-1] == "discriminator tells some apart" and "score rose" not in checks


@pytest.mark.parametrize(("accuracy", "words"), [(0.96, "little signal"), (0.54, "nothing tells"), (0.8, "")])
def test_a_mean_accuracy_that_leaves_nothing_to_learn_is_said_once(
    folder: Path, capsys: pytest.CaptureFixture[str], accuracy: float, words: str
) -> None:
    config = adversarial(folder)
    judge = judge_of(config, roles_of(config))
    for _ in range(5):
        judge.watch(accuracy)
    assert judge.accuracy == pytest.approx(accuracy)
    output = capsys.readouterr().out
    assert output.count("warning: ") == bool(words) and words in output
    [check] = judge.checks()
    assert check.passed == (not words) and words in check.meaning
    assert bool(told_apart(accuracy)) == bool(words)
    judge.watch(0.0)
    assert judge.accuracy == pytest.approx(0.9 * accuracy)


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("algo", ["ppo", "reinforce"])
def test_a_run_that_goes_on_equals_one_that_never_stopped(
    folder: Path, tmp_path: Path, adapter: str, algo: str
) -> None:
    more: dict[str, Any] = {"adapter": adapter, "algo": algo, "updates": 4, "save_every": 2, "keep_last": 9}
    whole = run_of(folder, tmp_path / "whole", **more)
    whole.train(None)
    torch.manual_seed(99)
    again = run_of(folder, tmp_path / "again", **more)
    with torch.no_grad():
        for weight in again.adversary.trained if again.adversary else ():
            weight.add_(1.0)
    again.train(whole.folder.path / "state" / "step_2")
    assert again.last == whole.last and again.checks() == whole.checks()
    judge, other = again.adversary, whole.adversary
    assert judge is not None and other is not None
    assert judge.replay == other.replay and judge.warned == other.warned and judge.num_updates == 4
    for one, two in zip(own_weights(judge), own_weights(other), strict=True):
        assert one.equal(two)
    for one, two in zip(weights(again.models).values(), weights(whole.models).values(), strict=True):
        assert one.equal(two)
    files = {path.name for path in (whole.folder.path / "state" / "step_2" / "discriminator").iterdir()}
    assert files == {"weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_what_is_saved_scores_as_it_did(folder: Path, tmp_path: Path, adapter: str, family: str) -> None:
    run = run_of(folder, tmp_path, adapter=adapter, family=family, updates=2, algo="reinforce")
    run.train(None)
    judge = run.adversary
    assert judge is not None
    rows = judge.rows([(judge.references[i], judge.replay[i]) for i in range(6)], [0.5] * 6)
    expected = judge.scores(rows)
    assert len(set(expected.tolist())) > 6
    assert judge.save(run.folder, "card")["kind"] == "reward_model"
    found = scorer_of(run.folder.path / "discriminator").score_tokens(rows)
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_loss_that_is_not_finite_stops_with_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = adversarial(folder)
    judge = judge_of(config, roles_of(config))
    before, scores = own_weights(judge), module.sequence_scores
    monkeypatch.setattr(module, "sequence_scores", lambda *a: scores(*a) + float("nan"))
    with pytest.raises(
        ValueError, match=r"^discriminator_loss is nan at update 3: the run stops before this"
    ):
        judge.update(PROMPTS, SAMPLES, step=3)
    assert all(one.equal(other) for one, other in zip(before, judge.trained, strict=True))


@pytest.mark.slow
def test_in_bfloat16_it_learns_too(folder: Path) -> None:
    for adapter in ("none", "lora"):
        config = adversarial(folder, adapter=adapter, reward=WITHOUT_REPLAY)
        roles = roles_of(config)
        engine = type(roles.engine)(torch.device("cpu"), torch.bfloat16, micro_batch_size=4)
        judge = judge_of(config, Roles(roles.actor_critic, roles.reference, engine, False))
        found = [judge.update(PROMPTS, SAMPLES, step=step) for step in range(1, 16)]
        assert found[-1]["discriminator_accuracy"] > 0.9
        assert {weight.dtype for weight in judge.trained} == {torch.float32}


def test_pretraining_answers_the_prompts_of_references_and_is_the_same_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, found = [], []
    for name in ("a", "b"):
        run = run_of(folder, tmp_path / name)
        judge, respond = run.adversary, type(run.policy).respond

        def spy(self: Any, prompts: Any, *a: Any, respond: Any = respond, **more: Any) -> Rollout:
            asked.append(list(prompts))
            return respond(self, prompts, *a, **more)

        assert judge is not None
        with monkeypatch.context() as patched:
            patched.setattr(type(run.policy), "respond", spy)
            judge.pretrain(run.policy, run.decoding)
        found.append((own_weights(judge), judge.replay))
    assert len(asked) == 2 * SPEC["pretrain_updates"] and asked[:4] == asked[4:]
    assert all(len(set(prompts)) == 8 and set(prompts) <= set(PROMPTS) for prompts in asked)
    assert found[0][1] == found[1][1] and len(found[0][1]) == 30
    assert all(one.equal(other) for one, other in zip(found[0][0], found[1][0], strict=True))
