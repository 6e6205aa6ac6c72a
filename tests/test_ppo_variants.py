"""What `algo` and the options of an update do: REINFORCE, RLOO, entropy bonus, PTX, clipped and whitened
rewards, a value head on the policy's trunk.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config import load_config
from rlhf.engine import Engine
from rlhf.experience import build_experience
from rlhf.models.roles import Roles
from rlhf.numerics.advantages import leave_one_out
from rlhf.ppo import Learner
from rlhf.pretraining_mix import PretrainingMix
from rlhf.records import Demonstration
from rlhf.text import TextCodec
from tests.models.families import word_tokenizer, write_family
from tests.test_ppo import RECORDS, experience_of, roles_of, run_of, settings, weights

TEXTS = [Demonstration("w1 w5", "w7 w8"), Demonstration("w2", "w9"), Demonstration("w3 w4", "w7 w7 w1")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families")
    write_family(path, "llama")
    return path


def gradient_of(roles: Roles, config: Any, *, mix: PretrainingMix | None = None) -> torch.Tensor:
    """The policy's gradient in one step that moves nothing."""
    config.clip.grad_norm = 1e9
    learner = Learner(roles.actor_critic, roles.engine, config, mix=mix)
    learner.optimizer = torch.optim.SGD(roles.actor_critic.parameters(), lr=0.0)
    batch = experience_of(roles, config)
    learner.minibatch(batch, mix.batch(6, 0) if mix else None)
    gradients = [parameter.grad for parameter in roles.actor_critic.policy_parameters()]
    return torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def test_leave_one_out_of_three_samples() -> None:
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2
    found = leave_one_out(torch.tensor([1.0, 2.0, 6.0]), 3)
    assert found.tolist() == [-3.0, -1.5, 4.5]
    assert leave_one_out(torch.full((6,), 1234.567), 3).tolist() == [0.0] * 6


def test_the_golden_file_has_the_same_leave_one_out(shared: Path) -> None:
    golden = json.loads((shared / "golden.json").read_text())["rloo"]
    found = leave_one_out(torch.tensor(golden["rewards"]), len(golden["rewards"]))
    assert found.tolist() == pytest.approx(golden["advantages"])


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("algo", ["reinforce", "rloo"])
def test_no_critic_is_loaded_where_none_is_used(folder: Path, algo: str, adapter: str) -> None:
    with_critic = roles_of(settings(folder, adapter=adapter)).actor_critic
    models = roles_of(settings(folder, adapter=adapter, algo=algo, rollouts_per_prompt=2)).actor_critic
    assert models.critic is None and models.value_head is None and models.critic_parameters() == []
    size = sum(parameter.numel() for parameter in models.parameters())
    assert size < 0.6 * sum(parameter.numel() for parameter in with_critic.parameters())


def test_rloo_compares_the_samples_of_one_prompt(folder: Path) -> None:
    config = settings(folder, algo="rloo", rollouts_per_prompt=3, whiten_advantages=False)
    experience = experience_of(roles_of(config), config)
    mask = experience.rollout.response_mask
    totals = experience.rewards.sum(1)
    gains = experience.advantages[:, 0]
    for start in (0, 3):
        group = slice(start, start + 3)
        assert float(gains[group].sum()) == pytest.approx(0, abs=1e-5)
        others = (totals[group].sum() - totals[group]) / 2
        torch.testing.assert_close(gains[group], totals[group] - others)
    assert experience.advantages.equal(gains.unsqueeze(1) * mask), "all tokens of a response share its gain"


def test_reinforce_takes_its_baseline_off(folder: Path) -> None:
    config = settings(folder, algo="reinforce", whiten_advantages=False)
    roles = roles_of(config)
    first = experience_of(roles, config)
    gains = first.rewards.sum(1)
    torch.testing.assert_close(first.advantages[:, 0], gains - gains.mean())
    each = torch.arange(6.0)
    for baseline in (0.5, each):
        again = build_experience(
            roles, first.rollout, first.scores, config=config, kl_coef=0.1, baseline=baseline
        )
        torch.testing.assert_close(again.advantages[:, 0], gains - baseline)


def test_the_samples_of_a_prompt_stand_side_by_side(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, tmp_path, algo="rloo", rollouts_per_prompt=2)
    for step in (1, 2, 3):
        records = run.prompts_of(step)
        assert len(records) == 6 and records[::2] == records[1::2] and len(set(map(id, records))) == 3
    seen = [record for step in range(1, 6) for record in run.prompts_of(step)[::2]]
    assert all(seen.count(record) == 3 for record in RECORDS), "each pass meets every prompt once"


@pytest.mark.parametrize(
    "more",
    [
        {"algo": "reinforce", "reinforce_baseline": "moving"},
        {"algo": "reinforce", "reinforce_baseline": "greedy"},
        {"algo": "rloo", "rollouts_per_prompt": 3},
        {"critic_trunk": "policy"},
    ],
    ids=["moving", "greedy", "rloo", "critic_trunk"],
)
def test_a_countable_reward_rises(folder: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    run = run_of(folder, tmp_path, updates=20, batch_size=48, **more)
    run.kl.coef = 0.0
    run.train(None)
    assert run.first["score"] < 0.05 and run.last["score"] > 0.3


def test_a_moving_baseline_is_part_of_the_state(folder: Path, tmp_path: Path) -> None:
    whole = run_of(folder, tmp_path / "a", algo="reinforce", updates=4, save_every=2)
    whole.train(None)
    assert whole.mean_reward not in (None, whole.last["reward"])
    again = run_of(folder, tmp_path / "b", algo="reinforce", updates=4, save_every=2)
    again.restore(whole.folder.path / "state" / "step_2")
    assert again.mean_reward is not None
    for step in (3, 4):
        again.step(step)
    assert again.mean_reward == whole.mean_reward and again.last == whole.last


def test_an_entropy_bonus_adds_the_entropys_gradient(folder: Path) -> None:
    plain = gradient_of(roles_of(settings(folder)), settings(folder))
    config = settings(folder, entropy_coef=0.3)
    roles = roles_of(config)
    found = gradient_of(roles, config)
    batch, models = experience_of(roles, config), roles.actor_critic
    models.zero_grad()
    _, entropies = models.logprobs_and_entropy(batch.rollout, temperature=1.0, learn_entropy=True)
    (-0.3 * entropies.sum() / batch.rollout.response_mask.sum()).backward()
    extra = torch.cat([p.grad.flatten() for p in models.policy_parameters() if p.grad is not None])
    assert extra.norm() > 1e-3
    torch.testing.assert_close(found, plain + extra, rtol=0, atol=1e-5 * float(plain.norm()))


def test_ptx_leaves_out_texts_that_are_too_long(capsys: pytest.CaptureFixture[str]) -> None:
    codec, cpu = TextCodec(word_tokenizer(), style="plain"), torch.device("cpu")
    lengths = sorted(len(codec.encode_response(text.response)) for text in TEXTS)
    mix = PretrainingMix(TEXTS, codec, cpu, max_response_tokens=lengths[0])
    assert {len(response) for response in mix.responses} == {lengths[0]}
    left_out = len(TEXTS) - len(mix.responses)
    assert (f"{left_out} of {len(TEXTS)} texts left out" in capsys.readouterr().out) == (left_out > 0)
    with pytest.raises(ValueError, match=r"longer than data\.max_response_tokens=0"):
        PretrainingMix(TEXTS, codec, cpu, max_response_tokens=0)


def test_ptx_sums_the_texts_gradient_into_the_step(folder: Path) -> None:
    codec = TextCodec(word_tokenizer(), style="plain")
    config = settings(folder, ptx_coef=0.5)
    roles = roles_of(config)
    plain = gradient_of(roles_of(settings(folder)), config)
    mix = PretrainingMix(TEXTS, codec, torch.device("cpu"), max_response_tokens=50)
    found = gradient_of(roles, config, mix=mix)
    texts, models = mix.batch(6, 0), roles.actor_critic
    models.zero_grad()
    logprobs = models.logprobs(texts, temperature=1.0)
    (-0.5 * logprobs.sum() / texts.response_mask.sum()).backward()
    extra = torch.cat([p.grad.flatten() for p in models.policy_parameters() if p.grad is not None])
    assert extra.norm() > 1e-3
    torch.testing.assert_close(found, plain + extra, rtol=0, atol=1e-5 * float(plain.norm()))
    assert mix.batch(6, 0).tokens.equal(texts.tokens) and not mix.batch(3, 1).tokens.equal(
        mix.batch(3, 2).tokens
    )


def test_clipped_scores_stay_within_the_bound(folder: Path, tmp_path: Path) -> None:
    class Large:
        name = "large"

        def __call__(self, prompts: Any, responses: Any) -> list[float]:
            return [100.0 * (-1) ** row for row in range(len(responses))]

    run = run_of(folder, tmp_path, reward=Large(), reward_clip=2.5)
    records = run.prompts_of(1)
    rollout = run.policy.respond([record.prompt for record in records], run.decoding, seed=0)
    assert set(run.scores(records, rollout).tolist()) == {2.5, -2.5}


def test_whitened_rewards_have_variance_one_and_their_mean(folder: Path) -> None:
    plain = experience_of(roles_of(settings(folder)), settings(folder))
    config = settings(folder, whiten_rewards=True)
    found = experience_of(roles_of(config), config)
    mask = plain.rollout.response_mask
    before, after = plain.rewards[mask], found.rewards[mask]
    assert float(after.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert float(after.mean()) == pytest.approx(float(before.mean()), abs=1e-5)
    assert (found.rewards[~mask] == 0).all()


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_value_head_on_the_policys_trunk_teaches_the_trunk(folder: Path, adapter: str) -> None:
    config = settings(folder, adapter=adapter, critic_trunk="policy")
    models = roles_of(config).actor_critic
    assert models.critic is models.policy and len(models.critic_parameters()) == 2
    batch = experience_of(roles_of(config), config)
    with torch.no_grad():
        assert models.values(batch.rollout).abs().max() == 0, "values start at 0"
        models.value_head.weight.fill_(0.1) if models.value_head else None
    models.values(batch.rollout).sum().backward()
    moved = [p for p in models.policy_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert len(moved) >= len(models.policy_parameters()) / 3


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_in_bfloat16_too_the_gradients_of_micro_batches_add_up(folder: Path, adapter: str) -> None:
    config = settings(folder, adapter=adapter)
    config.clip.grad_norm = 1e9
    found = []
    for micro_batch_size in (1, 6):
        roles = roles_of(config)
        models = roles.actor_critic
        engine = Engine(torch.device("cpu"), torch.bfloat16, micro_batch_size)
        learner = Learner(models, engine, config)
        learner.optimizer = torch.optim.SGD(models.parameters(), lr=0.0)
        learner.minibatch(experience_of(roles, config))
        parameters = [*models.policy_parameters(), *models.critic_parameters()]
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert len(found[0]) == sum(parameter.numel() for parameter in parameters)
    assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()


def test_a_kl_that_is_not_finite_is_named_with_its_update(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(folder, tmp_path)
    run.step(1)
    reference = run.roles.reference.logprobs
    monkeypatch.setattr(run.roles.reference, "logprobs", lambda *a, **k: reference(*a, **k) + float("nan"))
    before = [parameter.clone() for parameter in run.models.parameters()]
    with pytest.raises(ValueError, match=r"^kl is nan at update 2: the run stops"):
        run.step(2)
    assert all(one.equal(two) for one, two in zip(before, run.models.parameters(), strict=True))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["algo=rloo"], "rollouts_per_prompt=1: algo=rloo compares"),
        (["rollouts_per_prompt=5"], "batch_size=32 is no multiple of rollouts_per_prompt=5"),
        (["algo=reinforce", "whiten_rewards=true"], "whiten_rewards=true with algo=reinforce"),
        (["algo=grpo"], "algo=grpo: one of ppo, reinforce, rloo"),
        (["reinforce_baseline=mean"], "reinforce_baseline=mean: one of moving, greedy, none"),
        (["reward_clip=0"], "reward_clip=0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words: list[str], named: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config("ppo", [*words, "batch_size=32"])
    assert named in str(error.value)


def test_the_policy_of_the_best_evaluation_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(folder, tmp_path, updates=5, eval_every=1, eval_prompts=3, save_every=2)
    held_out = {record.prompt for record in run.eval_prompts}
    trained = {record.prompt for step in range(1, 9) for record in run.prompts_of(step)}
    assert len(held_out) == 3 and held_out | trained == {record.prompt for record in RECORDS}
    assert not held_out & trained
    scores, marks, states = run.scores, [0.3, 0.9, 0.5, 0.9, 0.1], []

    def rigged(records: Any, rollout: Any) -> torch.Tensor:
        if records[0] not in run.eval_prompts:
            return scores(records, rollout)
        states.append(weights(run.models))
        return torch.full((len(records),), 100 * marks[len(states) - 1])

    monkeypatch.setattr(run, "scores", rigged)
    run.train(None)
    lines = [json.loads(line) for line in (run.folder.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_score"] for line in lines] == pytest.approx([100 * mark for mark in marks])
    for line in lines:
        expected = line["eval_score"] - run.config.kl.coef * line["eval_kl"]
        assert line["eval_reward"] == pytest.approx(expected)
    best = max(lines, key=lambda line: line["eval_reward"])
    assert best["step"] in (2, 4) and run.best == {"step": best["step"], "reward": best["eval_reward"]}
    kept = weights(run.models)
    assert all(torch.equal(kept[name], tensor) for name, tensor in states[best["step"] - 1].items())
    assert not all(torch.equal(kept[name], tensor) for name, tensor in states[-1].items())


def test_the_best_weights_that_a_kept_state_names_are_kept(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, tmp_path, updates=9, eval_every=1, eval_prompts=2, keep_last=2)
    states = run.folder.path / "state"
    (states / "best_7").mkdir(parents=True)  # left by a run that was killed after its last state
    run.save(1)
    for step in (2, 3, 4):
        run.best = {"step": step, "reward": float(step)}
        run.best_folder(run.best).mkdir()
        run.save(step)
    assert sorted(path.name for path in states.iterdir()) == ["best_3", "best_4", "step_3", "step_4"]


def test_an_evaluation_changes_no_update(folder: Path, tmp_path: Path) -> None:
    plain, watched = (
        run_of(folder, tmp_path / "a"),
        run_of(folder, tmp_path / "b", eval_every=1, eval_prompts=2),
    )
    watched.prompts = plain.prompts
    for step in (1, 2):
        assert plain.step(step)[0] == watched.step(step)[0]
        watched.evaluate(step)


def test_held_out_prompts_that_leave_none_to_train_on_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval_prompts=\d+ of \d+ prompts leave none to train on"):
        run_of(folder, tmp_path, eval_every=1, eval_prompts=len(RECORDS))
