"""MIXER: how much is given in an update, that samples go on from it, and what its tokens teach."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.batches import Rollout
from rlhf.decoding import Decoding
from rlhf.experience import build_experience
from rlhf.exposure.mixer import Mixer, num_sampled
from rlhf.models.roles import Roles
from rlhf.ppo import Learner
from rlhf.ppo_run import PPORun
from rlhf.records import PromptRecord
from rlhf.sampling.policy import Policy
from rlhf.text import TextCodec
from tests.models.families import EOS, word_tokenizer
from tests.test_ppo import roles_of, run_of, settings

LONGEST = 8
RECORDS = [
    PromptRecord("w1 w5", "w7 w8 w9 w7 w7 w1"),  # and EOS: seven tokens
    PromptRecord("w2", "w9 w9"),
    PromptRecord("w3 w4 w9 w7", " ".join(["w5"] * 12)),  # cut to eight
    PromptRecord("w30 w31 w2", "w7 w1 w8"),
]


@pytest.fixture
def folder(families: Path) -> Path:
    return families


def config_of(folder: Path, **mixer: Any) -> Any:
    config = settings(folder, algo="reinforce")
    for name, value in mixer.items():
        setattr(config.mixer, name, value)
    return config


def responded(roles: Roles, config: Any, update: int) -> tuple[Rollout, torch.Tensor, Policy]:
    policy = Policy(roles.actor_critic.policy, TextCodec(word_tokenizer(), style="plain"), roles.engine)
    mixer = Mixer(config.mixer, RECORDS)
    return *mixer.respond(policy, RECORDS, Decoding(LONGEST), update=update, seed=5), policy


def test_the_sampled_part_grows_by_delta_to_everything() -> None:
    found = [num_sampled(update, updates=4, delta=2, max_tokens=8) for update in range(1, 7)]
    assert found == [2, 4, 6, 8, 8, 8]
    assert [num_sampled(u, updates=6, delta=3, max_tokens=8) for u in range(1, 8)] == [3, 3, 6, 6, 9, 9, 9]
    assert [num_sampled(u, updates=2, delta=1, max_tokens=8) for u in (1, 2, 3)] == [4, 8, 8]
    assert [num_sampled(u, updates=1, delta=8, max_tokens=8) for u in (1, 2)] == [8, 8]


@pytest.mark.parametrize(("update", "given"), [(1, [5, 1, 6, 2]), (2, [3, 0, 4, 0]), (3, [1, 0, 2, 0])])
def test_responses_begin_with_the_references_and_go_on_as_sampled(
    folder: Path, update: int, given: list[int]
) -> None:
    config = config_of(folder, updates=4, delta=2)
    rollout, gold, policy = responded(roles_of(config), config, update)
    assert gold.sum(1).tolist() == given
    assert (gold & rollout.response_mask).equal(gold)
    codec = policy.codec
    starts = []
    for record, response, count in zip(RECORDS, rollout.responses(), given, strict=True):
        reference = codec.encode_response(record.reference or "")
        assert response[:count] == reference[:count] and len(response) <= LONGEST
        assert EOS not in response[:-1]
        starts.append(codec.encode_prompt(record.prompt) + reference[:count])
    longest = Decoding(LONGEST - min(given))
    sampled = policy.go_on(starts, longest, seed=5).responses()
    for response, rest, count in zip(rollout.responses(), sampled, given, strict=True):
        assert response[count:] == rest[: LONGEST - count]


def test_after_its_updates_it_is_plain_sampling(folder: Path) -> None:
    config = config_of(folder, updates=4, delta=2)
    for update in (4, 5):
        rollout, gold, policy = responded(roles_of(config), config, update)
        plain = policy.respond([record.prompt for record in RECORDS], Decoding(LONGEST), seed=5)
        assert rollout.tokens.equal(plain.tokens) and not gold.any()


def test_gold_tokens_have_no_part_in_kl_reward_and_whitening(folder: Path) -> None:
    config = config_of(folder, updates=4, delta=2, xent_coef=0.5)
    roles = roles_of(config)
    rollout, gold, _ = responded(roles, config, 1)
    with torch.no_grad():  # away from the reference
        for parameter in roles.actor_critic.policy.parameters():
            parameter.mul_(1.1)
    scores = torch.tensor([1.0, -1.0, 0.5, 2.0])
    found = build_experience(roles, rollout, scores, config=config, kl_coef=0.1, gold=gold)
    ratios = found.logprobs - found.ref_logprobs
    mask = rollout.response_mask
    assert (ratios[gold] == 0).all() and (ratios[mask & ~gold] != 0).all()
    assert (found.rewards[gold] == 0).all()
    torch.testing.assert_close(found.rewards.sum(1), scores - 0.1 * ratios.sum(1))
    assert (found.advantages[gold] == 0.5).all()
    own = found.advantages[mask & ~gold]
    assert float(own.mean()) == pytest.approx(0, abs=1e-5)
    assert float(own.std(correction=0)) == pytest.approx(1, abs=1e-3)


def gradient(roles: Roles) -> torch.Tensor:
    parts = [parameter.grad for parameter in roles.actor_critic.policy_parameters()]
    return torch.cat([part.flatten() for part in parts if part is not None])


def test_what_gold_tokens_teach_is_cross_entropy(folder: Path) -> None:
    config = config_of(folder, updates=4, delta=2, xent_coef=0.7)
    config.whiten_advantages, config.clip.grad_norm = False, 1e9
    roles = roles_of(config)
    rollout, gold, _ = responded(roles, config, 1)
    no_gain = torch.zeros(len(RECORDS))
    batch = build_experience(roles, rollout, no_gain, config=config, kl_coef=0.0, baseline=0.0, gold=gold)
    learner = Learner(roles.actor_critic, roles.engine, config)
    learner.optimizer = torch.optim.SGD(roles.actor_critic.parameters(), lr=0.0)
    learner.minibatch(batch)
    found = gradient(roles)
    roles.actor_critic.zero_grad()
    logprobs = roles.actor_critic.logprobs(rollout, temperature=1.0)
    loss = -0.7 * logprobs[gold].sum() / rollout.response_mask.sum()
    loss.backward()
    torch.testing.assert_close(found, gradient(roles), rtol=1e-5, atol=1e-7)
    assert found.norm() > 1e-3


@pytest.mark.parametrize("more", [{}, {"reinforce_baseline": "greedy"}, {"algo": "rloo"}], ids=str)
def test_a_run_logs_a_share_that_goes_to_nothing(folder: Path, tmp_path: Path, more: dict[str, str]) -> None:
    run = mixed_run(folder, tmp_path, **more)
    metrics = [run.step(step)[0] for step in range(1, 5)]
    shares = [each["gold_share"] for each in metrics]
    assert shares[0] > shares[1] > 0 and shares[2:] == [0, 0]
    for each in metrics:
        assert each["first_ratio"] == pytest.approx(1, abs=1e-5)
    assert run.first == metrics[2], "what gold tokens scored is no start to rise from"
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(("updates", "names"), [(5, ["score rose"]), (3, [])])
def test_a_score_rises_only_from_one_that_was_all_sampled(
    folder: Path, tmp_path: Path, updates: int, names: list[str]
) -> None:
    run = mixed_run(folder, tmp_path, updates=updates)  # the third is the first that is all sampled
    checks = run.train(None)
    assert [check.name for check in checks if check.name == "score rose"] == names


def test_a_resumed_run_is_given_the_same(folder: Path, tmp_path: Path) -> None:
    whole = mixed_run(folder, tmp_path / "a", save_every=1, keep_last=9, updates=4)
    whole.train(None)
    again = mixed_run(folder, tmp_path / "b", updates=4)
    again.restore(whole.folder.path / "state" / "step_1")
    for step in (2, 3, 4):
        again.step(step)
    assert again.last == whole.last


def mixed_run(folder: Path, runs: Path, **more: Any) -> PPORun:
    options: dict[str, Any] = {"algo": "reinforce", "rollouts_per_prompt": 2, "batch_size": 6, **more}
    run = run_of(folder, runs, **options)
    run.prompts, run.config.mixer.updates, run.config.mixer.delta = RECORDS, 3, 3
    run.mixer = Mixer(run.config.mixer, RECORDS)
    return run


def test_prompts_without_references_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, updates=4)
    with pytest.raises(ValueError, match=r"mixer.updates needs references, and 1 of 2 prompts have none"):
        Mixer(config.mixer, [RECORDS[0], PromptRecord("w1")])
