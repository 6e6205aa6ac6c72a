"""Laws of the PPO update, and two runs whose end is known: a countable reward rises, a large KL coefficient
holds.
"""

import copy
import functools
import hashlib
import itertools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.batches import Experience, Rollout, join, left_pad
from rlhf.checkpoint import StageFolder
from rlhf.config import load_config
from rlhf.decoding import Decoding
from rlhf.engine import Engine
from rlhf.experience import MissingEos, build_experience, experience_metrics, final_scores
from rlhf.models.roles import Roles, build_roles
from rlhf.numerics.kl import AdaptiveKL
from rlhf.ppo import Learner
from rlhf.ppo_run import PPORun
from rlhf.records import PromptRecord
from rlhf.rewards import RewardModelScorer, build_reward
from rlhf.sampling.sampler import draw_uniforms, sample
from rlhf.text import TextCodec
from tests.models.families import BOS, EOS, PAD, word_tokenizer, write_family

# Prompts of unequal length; with PAD=0 the shorter rows are padded on the left.
PROMPTS = [[BOS, 5, 9, 30, 12, 7, 40], [8], [BOS, 22, 6], [31, 11, 19, 4, 25], [9, 9], [BOS, 40, 13, 17]]
RECORDS = [PromptRecord(text, None) for text in ("w1 w5", "w2", "w3 w4 w9 w7", "w30 w31 w2", "w6 w6")]
KEEP_ALL = MissingEos(None, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("families")
    for family in ("llama", "gpt2"):
        write_family(path, family)
    return path


@functools.cache
def loaded(adapter: str) -> Any:
    return load_config("ppo", ["model=tiny", "data=toy", f"adapter={adapter}", "tracker=none"])


def settings(folder: Path, *, family: str = "llama", adapter: str = "none", **more: Any) -> Any:
    config = copy.deepcopy(loaded(adapter))
    config.policy, config.critic = str(folder / family), str(folder / f"{family}-rm")
    config.reward = {"kind": "model", "path": config.critic}
    config.data.max_response_tokens, config.batch_size = 8, 6
    config.updates, config.warmup_updates, config.epochs, config.minibatches = 4, 1, 2, 1
    config.missing_eos_score, config.missing_eos_penalty = None, 0.0
    config.learning_rate = config.critic_learning_rate = 1e-2
    for name, value in more.items():
        setattr(config, name, value)
    return config


def roles_of(config: Any, micro_batch_size: int | None = None, workers: int = 1, **more: Any) -> Roles:
    torch.manual_seed(0)
    engine = Engine(torch.device("cpu"), torch.float32, micro_batch_size, workers=workers, **more)
    return build_roles(config, engine)


def experience_of(roles: Roles, config: Any, *, seed: int = 0, kl_coef: float = 0.1) -> Experience:
    """Sample from the policy and score it with numbers that differ from row to row."""
    scores = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, -2.0])
    rollout = rollout_of(roles, config, seed=seed)
    return build_experience(roles, rollout, scores, config=config, kl_coef=kl_coef)


def rollout_of(roles: Roles, config: Any, *, seed: int = 0) -> Rollout:
    return sample(
        roles.actor_critic.policy,
        PROMPTS,
        Decoding(8, temperature=config.temperature),
        eos_token_id=EOS,
        pad_token_id=PAD,
        uniforms=draw_uniforms(6, 8, seed),
    )


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def weight_hash(module: torch.nn.Module, keep: Callable[[str], bool] = lambda name: True) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if keep(name):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Share:
    """A reward that can be counted: the share of one word in the response."""

    name = "share of w7"

    def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
        return [response.split().count("w7") / 8 for response in responses]


def run_of(folder: Path, runs: Path, reward: Any = None, **more: Any) -> PPORun:
    config = settings(folder, **more)
    config.runs = str(runs)
    stage = StageFolder(config.runs, "x", "ppo")
    stage.path.mkdir(parents=True, exist_ok=True)
    roles = roles_of(config)
    codec = TextCodec(word_tokenizer(), style="plain")
    return PPORun(config, codec, roles, reward or Share(), RECORDS, stage)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"minibatches": 2, "adapter": "lora"},
        {"minibatches": 4, "epochs": 1},
        {"critic_trunk": "policy"},
        {"whiten_rewards": True, "entropy_coef": 0.1, "family": "gpt2"},
        {"algo": "rloo", "rollouts_per_prompt": 2},
        {"gradient_checkpointing": True, "adapter": "lora"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kept_tokens", [0, 60, 1000])
def test_the_first_step_has_the_numbers_of_one_whose_passes_were_made_before(
    folder: Path, kept_tokens: int, more: dict[str, Any]
) -> None:
    config = settings(folder, **more)
    found = []
    for shared in (False, True):
        roles = roles_of(config, micro_batch_size=2, workers=2, kept_tokens=kept_tokens)
        rollout, scores = rollout_of(roles, config), torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, -2.0])
        learner = Learner(roles.actor_critic, roles.engine, config)
        first = learner.first_step(rollout, step=1) if shared else None
        experience = build_experience(roles, rollout, scores, config=config, kl_coef=0.1, passes=first)
        if first is not None:
            tokens = [each.tokens.numel() for each in first.rollouts[: first.num_first]]
            fitting = sum(sum(tokens[: i + 1]) <= kept_tokens for i in range(len(tokens)))
            balanced = fitting if fitting == len(tokens) else fitting - fitting % 2
            assert len(first.kept) == balanced
        metrics = learner.update(experience, step=1, first=first)
        assert first is None or not first.kept, "graphs are held after their use"
        found.append((metrics, experience, weights(roles.actor_critic)))
    (expected, old, weights_before), (metrics, new, weights_after) = found
    near = 1e-5 if config.minibatches == 1 else 5e-5  # Adam's steps enlarge what the rounding differs by
    assert metrics == pytest.approx(expected, rel=near, abs=1e-6)
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(new, name), getattr(old, name), rtol=1e-5, atol=1e-5)
    for name, weight in weights_before.items():
        torch.testing.assert_close(weights_after[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("minibatches", [1, 6])  # with six only one of two workers has a pass to keep
@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_bfloat16_too_kept_passes_have_all_their_gradients(
    folder: Path, monkeypatch: pytest.MonkeyPatch, family: str, adapter: str, minibatches: int
) -> None:
    def one_by_one(self: Engine, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        # as where one of two workers is through before the other starts
        results = {index: function(items[index]) for k in (1, 0) for index in range(k, len(items), 2)}
        return [results[index] for index in range(len(items))]

    monkeypatch.setattr(Engine, "side_by_side", one_by_one)
    config = settings(folder, family=family, adapter=adapter, minibatches=minibatches)
    found = []
    for kept_tokens in (0, 40):
        torch.manual_seed(0)
        engine = Engine(
            torch.device("cpu"), torch.bfloat16, micro_batch_size=1, kept_tokens=kept_tokens, workers=2
        )
        roles = build_roles(config, engine)
        rollout, scores = rollout_of(roles, config), torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, -2.0])
        learner = Learner(roles.actor_critic, engine, config)
        first = learner.first_step(rollout, step=1)
        experience = build_experience(roles, rollout, scores, config=config, kl_coef=0.1, passes=first)
        assert len(first.kept) < len(first.rows) and bool(first.kept) == bool(kept_tokens)
        rows = torch.cat(first.rows[: first.num_first])
        metrics = learner.minibatch(experience.rows(rows), first=first)
        assert metrics["policy_grad_norm"] > 0
        gradients = [each.grad for each in roles.actor_critic.policy_parameters() if each.grad is not None]
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert (found[0] - found[1]).norm() <= 0.05 * found[0].norm()


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_every_update_begins_with_ratio_one_and_approx_kl_zero(
    folder: Path, temperature: float, family: str, adapter: str
) -> None:
    config = settings(folder, family=family, adapter=adapter, temperature=temperature)
    roles = roles_of(config)
    learner = Learner(roles.actor_critic, roles.engine, config)
    for step in (1, 2, 3):
        metrics = learner.update(experience_of(roles, config, seed=step), step=step)
        assert abs(metrics["first_ratio"] - 1) < 1e-5
        assert abs(metrics["first_approx_kl"]) < 1e-5
        assert abs(metrics["ratio"] - 1) > 1e-4, "the weights did not move"


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 1), (1, 3), (3, 2), (2, 6)])
def test_an_update_makes_epochs_times_minibatches_steps(folder: Path, epochs: int, minibatches: int) -> None:
    config = settings(folder, epochs=epochs, minibatches=minibatches)
    roles = roles_of(config, micro_batch_size=1)
    learner = Learner(roles.actor_critic, roles.engine, config)
    metrics = learner.update(experience_of(roles, config), step=1)
    steps = {int(state["step"]) for state in learner.optimizer.state_dict()["state"].values()}
    assert steps == {epochs * minibatches} and metrics["optimizer_steps"] == epochs * minibatches


def test_every_episode_is_learned_from_once_an_epoch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(folder, epochs=3, minibatches=4)
    roles = roles_of(config)
    learner = Learner(roles.actor_critic, roles.engine, config)
    seen: list[list[float]] = []

    def record(batch: Experience, *_: Any) -> dict[str, float]:
        seen.append(batch.scores.tolist())
        return {"ratio": 1.0, "approx_kl": 0.0}

    monkeypatch.setattr(learner, "minibatch", record)
    learner.update(experience_of(roles, config), step=1)
    assert len(seen) == 12
    epochs = [[*itertools.chain(*seen[i : i + 4])] for i in (0, 4, 8)]
    assert all(sorted(epoch) == [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0] for epoch in epochs)
    assert epochs[0] != epochs[1] or epochs[1] != epochs[2]


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("workers", [1, 2])
def test_micro_batches_and_workers_change_no_metric_and_no_weight(
    folder: Path, adapter: str, micro_batch_size: int, workers: int
) -> None:
    # The responses differ in length, so a mean over micro-batches' means would differ.
    config = settings(folder, adapter=adapter, epochs=1)
    results = []
    for size in (None, micro_batch_size):
        roles = roles_of(config, micro_batch_size=size, workers=workers if size else 1)
        experience = experience_of(roles, config)
        assert len({len(row) for row in experience.rollout.responses()}) > 1
        learner = Learner(roles.actor_critic, roles.engine, config)
        # Plain gradient descent: Adam's first step is the gradient's sign, which rounding can flip near 0.
        learner.optimizer = torch.optim.SGD(
            [{"params": group["params"], "lr": 0.1} for group in learner.optimizer.param_groups]
        )
        metrics = learner.update(experience, step=1)
        results.append((experience, metrics, weights(roles.actor_critic)))
    (whole, whole_metrics, whole_weights), (split, split_metrics, split_weights) = results
    torch.testing.assert_close(split.advantages, whole.advantages, rtol=0, atol=1e-5)
    assert split_metrics == pytest.approx(whole_metrics, rel=1e-5, abs=1e-6)
    for name, expected in whole_weights.items():
        torch.testing.assert_close(split_weights[name], expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_an_update_leaves_reference_and_reward_as_they_were(folder: Path, adapter: str) -> None:
    config = settings(folder, adapter=adapter)
    roles = roles_of(config)
    reward = build_reward(config, roles.engine, roles)
    assert isinstance(reward, RewardModelScorer)
    if adapter == "lora":
        assert reward.model is roles.actor_critic.critic, "the critic's trunk lends the reward model"
    reference = roles.reference.model or roles.actor_critic.policy

    def frozen() -> tuple[str, str]:
        is_base: Callable[[str], bool] = lambda name: "lora_" not in name  # noqa: E731
        return weight_hash(reference, is_base), weight_hash(reward.model, is_base)

    experience = experience_of(roles, config)
    rows = experience.rollout.sequences()
    before = frozen()
    scores, logprobs = (
        reward.score_tokens(rows),
        roles.reference.logprobs(experience.rollout, temperature=1.0),
    )
    trained = weight_hash(roles.actor_critic)
    Learner(roles.actor_critic, roles.engine, config).update(experience, step=1)
    assert frozen() == before
    assert reward.score_tokens(rows) == scores
    assert roles.reference.logprobs(experience.rollout, temperature=1.0).equal(logprobs)
    assert weight_hash(roles.actor_critic) != trained


def test_policy_and_critic_are_both_clipped_and_both_move(folder: Path) -> None:
    config = settings(folder, epochs=1)
    config.clip.grad_norm = 1e-3
    roles = roles_of(config)
    learner = Learner(roles.actor_critic, roles.engine, config)
    learner.optimizer = torch.optim.SGD(
        [{"params": g["params"], "lr": 1.0} for g in learner.optimizer.param_groups]
    )
    config.learning_rate = config.critic_learning_rate = 1.0
    before = [p.detach().clone() for p in roles.actor_critic.parameters() if p.requires_grad]
    learner.update(experience_of(roles, config), step=1)
    after = [p for p in roles.actor_critic.parameters() if p.requires_grad]
    # Each of the two gradients has norm 1e-3 after clipping, and lr = 1 makes it the step.
    moved = torch.cat([(new.detach() - old).flatten() for new, old in zip(after, before, strict=True)])
    assert float(moved.norm()) == pytest.approx(2**0.5 * 1e-3, rel=1e-3)


def test_kl_and_rewards_before_the_first_step_are_the_scores_alone(folder: Path) -> None:
    config = settings(folder)
    roles = roles_of(config)
    experience = experience_of(roles, config, kl_coef=100.0)
    metrics = experience_metrics(experience, EOS)
    assert metrics["kl"] == 0.0 and metrics["score"] == pytest.approx(0.5 / 6)
    lengths = experience.rollout.response_mask.sum(1)
    last = experience.rewards[torch.arange(6), lengths - 1]
    assert last.equal(experience.scores) and float(experience.rewards.abs().sum()) == pytest.approx(6.5)
    assert metrics["length"] == pytest.approx(float(lengths.float().mean()))
    ended = sum(response[-1] == EOS for response in experience.rollout.responses())
    assert metrics["share_ended"] == pytest.approx(ended / 6) and 0 < ended < 6


def test_advantages_are_whitened_over_the_whole_batch(folder: Path) -> None:
    config = settings(folder)
    roles = roles_of(config, micro_batch_size=2)
    experience = experience_of(roles, config)
    real = experience.advantages[experience.rollout.response_mask]
    assert float(real.mean()) == pytest.approx(0, abs=1e-6)
    assert float(real.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert not experience.advantages[~experience.rollout.response_mask].any()
    config.whiten_advantages = False
    plain = experience_of(roles, config).advantages[experience.rollout.response_mask]
    assert float(plain.std(correction=0)) != pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (KEEP_ALL, [1.0, 2.0, 3.0]),
        (MissingEos(-1.0, 0.0), [1.0, -1.0, -1.0]),
        (MissingEos(None, 0.5), [1.0, 1.5, 2.5]),
        (MissingEos(-1.0, 0.5), [1.0, -1.0, -1.0]),
        (MissingEos(0.0, 0.0), [1.0, 0.0, 0.0]),
    ],
)
@pytest.mark.parametrize("pad", [PAD, EOS])
def test_a_response_without_eos_gets_the_score_that_was_set(
    missing: MissingEos, expected: list[float], pad: int
) -> None:
    # Row 0 ends with EOS. Rows 1 and 2 were cut; where pad equals eos, row 2 is padded with it all the same.
    rollout = join(left_pad([[5], [6, 7], [8]], pad), [[9, EOS], [10, 11, 12], [13]], pad)
    assert final_scores(torch.tensor([1.0, 2.0, 3.0]), rollout, EOS, missing).tolist() == expected


def test_eos_is_in_the_loss_where_pad_equals_eos(folder: Path) -> None:
    # The gradient that reaches EOS: with an advantage on the last token alone, its log-prob must move up.
    config = settings(folder, epochs=1, whiten_advantages=False)
    roles = roles_of(config)
    models = roles.actor_critic
    rollout = join(left_pad(PROMPTS, EOS), [[9, EOS], [10, 11, 12, EOS]] * 3, EOS)
    experience = build_experience(roles, rollout, torch.ones(6), config=config, kl_coef=0.0)
    is_eos = (rollout.response_tokens == EOS) & rollout.response_mask
    assert is_eos.sum(1).tolist() == [1] * 6
    only_eos = is_eos.float()
    parts = {name: getattr(experience, name) for name in ("rollout", "logprobs", "ref_logprobs", "values")}
    parts |= {"rewards": only_eos, "advantages": only_eos, "returns": only_eos, "scores": torch.ones(6)}
    Learner(models, roles.engine, config).update(Experience(**parts), step=1)
    with torch.no_grad():
        logprobs, _ = models.logprobs_and_entropy(rollout, temperature=1.0)
    assert (logprobs - experience.logprobs)[is_eos].min() > 0


@pytest.mark.parametrize(
    ("field", "tensor"),
    [("advantages", "policy_loss"), ("returns", "value_loss"), ("logprobs", "policy_loss")],
)
def test_a_loss_that_is_not_finite_stops_before_a_weight_changes(
    folder: Path, field: str, tensor: str
) -> None:
    config = settings(folder)
    roles = roles_of(config)
    experience = experience_of(roles, config)
    parts = {name: getattr(experience, name) for name in Experience.__dataclass_fields__}
    broken = parts[field].clone()
    broken[0, 0] = float("nan")
    learner = Learner(roles.actor_critic, roles.engine, config)
    before = weight_hash(roles.actor_critic)
    with pytest.raises(
        ValueError, match=rf"^{tensor} is nan at update 3: the run stops before this changes a weight"
    ):
        learner.update(Experience(**(parts | {field: broken})), step=3)
    assert weight_hash(roles.actor_critic) == before
    assert not learner.optimizer.state_dict()["state"]


@pytest.mark.parametrize("rate", [1e25, 1e38])  # too large to compute with, and infinite
def test_weights_that_the_last_step_blew_up_are_named_and_stop_the_run(folder: Path, rate: float) -> None:
    config = settings(folder, learning_rate=rate, epochs=1, warmup_updates=0, updates=1)
    roles = roles_of(config)
    learner = Learner(roles.actor_critic, roles.engine, config)
    packed = torch.zeros(2, dtype=torch.uint8)  # as frozen weights in 4 bits are
    roles.actor_critic.register_parameter("packed", torch.nn.Parameter(packed, requires_grad=False))
    with pytest.raises(ValueError, match=r"^policy\..* is not finite, or too large, after update 1: "):
        learner.update(experience_of(roles, config), step=1)


@pytest.mark.parametrize(("model", "numbers"), [("policy", "log-probs"), ("critic", "values")])
def test_weights_too_large_to_compute_with_are_not_left(folder: Path, model: str, numbers: str) -> None:
    config = settings(folder, learning_rate=0.0, critic_learning_rate=0.0, epochs=1)
    roles = roles_of(config)
    learner = Learner(roles.actor_critic, roles.engine, config)
    experience = experience_of(roles, config)
    learner.update(experience, step=1)
    with torch.no_grad():
        for name, weight in getattr(roles.actor_critic, model).named_parameters():
            if "mlp" in name:
                weight.mul_(1e15)  # three follow one another, and each alone is finite
    expected = f"^the {numbers} of update 1's weights are not finite: they are not saved"
    with pytest.raises(ValueError, match=expected):
        learner.check_weights(experience.rollout)


def test_an_infinite_gradient_stops_and_is_named(folder: Path) -> None:
    config = settings(folder)
    roles = roles_of(config)
    learner = Learner(roles.actor_critic, roles.engine, config)
    assert roles.actor_critic.value_head is not None
    roles.actor_critic.value_head.bias.register_hook(lambda grad: grad * float("inf"))
    before = weight_hash(roles.actor_critic)
    with pytest.raises(ValueError, match=r"^critic_grad_norm is (inf|nan)"):
        learner.update(experience_of(roles, config), step=1)
    assert weight_hash(roles.actor_critic) == before


@pytest.mark.parametrize(
    ("updates", "warmup", "shares"),
    [
        # 2 steps of warm-up (1/2, 1), then down by 1/4 a step: the step after the last would have 0
        (6, 2, [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        (4, 0, [1.0, 0.75, 0.5, 0.25]),
        (1, 2, [0.5]),
    ],
)
def test_the_learning_rate_warms_up_and_falls_to_zero(
    folder: Path, updates: int, warmup: int, shares: list[float]
) -> None:
    config = settings(
        folder, updates=updates, warmup_updates=warmup, learning_rate=2.0, critic_learning_rate=8.0
    )
    learner = Learner(torch_models(), Engine(torch.device("cpu"), torch.float32), config)
    for step, share in enumerate(shares, start=1):
        learner.set_learning_rates(step)
        assert [g["lr"] for g in learner.optimizer.param_groups] == pytest.approx([2 * share, 8 * share])


def torch_models() -> Any:
    """Return the smallest thing with a policy's and a critic's parameters."""
    from rlhf.models.roles import ActorCritic

    return ActorCritic(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))


def test_epochs_end_above_the_approx_kl_limit(folder: Path) -> None:
    config = settings(folder, epochs=4, approx_kl_stop=1e-12)
    config.learning_rate = 0.05
    roles = roles_of(config)
    metrics = Learner(roles.actor_critic, roles.engine, config).update(experience_of(roles, config), step=1)
    # The first epoch still has the old weights (approx-KL about 0), the second has not.
    assert 1 <= metrics["optimizer_steps"] <= 2
    config.approx_kl_stop = 1e6
    metrics = Learner(roles.actor_critic, roles.engine, config).update(experience_of(roles, config), step=1)
    assert metrics["optimizer_steps"] == 4


def test_each_pass_meets_every_prompt_once(folder: Path, tmp_path: Path) -> None:
    # 5 prompts in batches of 6: passes do not end with batches.
    run = run_of(folder, tmp_path)
    texts = [record.prompt for step in range(1, 11) for record in run.prompts_of(step)]
    passes = [texts[i : i + 5] for i in range(0, 60, 5)]
    assert all(sorted(map(str, one)) == sorted(str(r.prompt) for r in RECORDS) for one in passes)
    assert len({tuple(map(str, one)) for one in passes}) > 6
    assert run.prompts_of(3) == run.prompts_of(3)


def test_a_countable_reward_rises(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, tmp_path, updates=16, batch_size=48, critic=None)
    run.kl.coef = 0.0
    checks = run.train(None)
    # w7 is one of 48 words: about 1/48 at the start, and 1 is the most there is.
    assert run.first["score"] < 0.05 and run.last["score"] > 0.5
    assert {check.name: check.passed for check in checks} == {
        "policy equals reference at the start": True,
        "responses end at their first EOS": True,
        "rewards differ": True,
        "first minibatch has ratio 1": True,
        "score rose": True,
    }
    lines = (tmp_path / "x" / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 16


def test_a_large_kl_coefficient_keeps_the_policy_in_place(folder: Path, tmp_path: Path) -> None:
    divergences = {}
    for coef in (0.0, 20.0):
        run = run_of(folder, tmp_path, updates=16, batch_size=64, learning_rate=1e-3, critic=None)
        run.kl.coef = coef
        run.train(None)
        divergences[coef] = run.last["kl"]
    assert abs(divergences[20.0]) < 0.4 and divergences[0.0] > 5 * abs(divergences[20.0])


def test_an_adaptive_coefficient_follows_the_kl_that_was_trained_on(folder: Path, tmp_path: Path) -> None:
    config = settings(folder)
    kl = copy.deepcopy(config.kl)
    kl.controller, kl.coef, kl.target, kl.horizon = "adaptive", 0.1, 1e-6, 60
    run = run_of(folder, tmp_path, kl=kl)
    assert isinstance(run.kl, AdaptiveKL)
    run.step(1)
    # KL is exactly 0 at the first update: error clipped to -.2, 6 episodes of a horizon of 60: .1 * (1 - .02)
    assert run.kl.coef == pytest.approx(0.098)
    metrics, _ = run.step(2)
    assert metrics["kl_coef"] == pytest.approx(0.098) and metrics["kl"] != 0.0
    assert run.kl.coef == pytest.approx(0.098 * (1.02 if metrics["kl"] > 1e-6 else 0.98))


def test_one_reward_for_all_stops_before_the_first_update(folder: Path, tmp_path: Path) -> None:
    class Same(Share):
        def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
            return [1.0] * len(responses)

    run = run_of(folder, tmp_path, reward=Same())
    before = weight_hash(run.models)
    with pytest.raises(
        ValueError, match=r"a check before the first update failed; mend its cause, or .*force=true"
    ):
        run.train(None)
    assert weight_hash(run.models) == before


def test_a_reward_that_is_not_a_number_is_named_with_its_response(folder: Path, tmp_path: Path) -> None:
    class Broken(Share):
        def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
            return [float("nan")] * len(responses)

    with pytest.raises(ValueError, match=r"share of w7 gave nan for the response '.*w"):
        run_of(folder, tmp_path, reward=Broken()).train(None)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_run_that_goes_on_equals_one_that_never_stopped(folder: Path, tmp_path: Path, adapter: str) -> None:
    whole = run_of(folder, tmp_path / "whole", adapter=adapter, updates=4)
    whole.train(None)

    class Interrupting(Share):
        calls = 0

        def __call__(self, prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
            self.calls += 1
            if self.calls == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(prompts, responses)

    # Ctrl-C comes while update 2 is being scored: the update is finished, saved and not begun again.
    cut = run_of(folder, tmp_path / "cut", reward=Interrupting(), adapter=adapter, updates=4)
    with pytest.raises(KeyboardInterrupt):
        cut.train(None)
    state = cut.folder.latest_state()
    assert state is not None and state.name == "step_2"
    torch.manual_seed(99)
    resumed = run_of(folder, tmp_path / "cut", adapter=adapter, updates=4)
    resumed.train(state)
    assert weight_hash(resumed.models) == weight_hash(whole.models)
    assert resumed.last == whole.last and resumed.first == whole.first
    assert resumed.start_checks == whole.start_checks and len(whole.checks()) == 5
    logs = [
        (tmp_path / name / "x" / "ppo" / "metrics.jsonl").read_text(encoding="utf-8")
        for name in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
