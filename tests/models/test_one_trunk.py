"""One base, four roles: policy, critic and reward as adapters on the reference's weights."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.batches import Experience, join, left_pad
from rlhf.config import load_config
from rlhf.engine import Engine
from rlhf.experience import build_experience
from rlhf.files import hash_path
from rlhf.models.adapters import acting, add_lora, merged_copy, read_adapter, trainable_parameters
from rlhf.models.forward import sequence_scores
from rlhf.models.loading import LoadOptions, load_causal_lm, load_reward_model, new_reward_model
from rlhf.models.roles import ActorCritic, Roles, build_roles
from rlhf.parents import adapter_of
from rlhf.ppo import Learner
from rlhf.rewards import RewardModelScorer, build_reward
from rlhf.text import TextCodec
from tests.models.families import BOS, EOS, FAMILIES, PAD, attention_of, word_tokenizer, write_family

PROMPTS = [[BOS, 5, 9, 30, 12, 7, 40], [8], [BOS, 22, 6], [31, 11, 19, 4, 25]]
RESPONSES = [[13, 44, EOS], [17, 9, 9, 21, 35, 6, 28, 41], [20], [33, 15, 27, 18, EOS]]
ROLLOUT = join(left_pad(PROMPTS, PAD), RESPONSES, PAD)
SCORES = torch.tensor([1.0, -1.0, 0.5, 2.0])
ENGINE = Engine(torch.device("cpu"), torch.float32, micro_batch_size=2)


@functools.cache
def loaded(adapter: str) -> Any:
    return load_config("ppo", ["model=tiny", "data=toy", f"adapter={adapter}", "adapter.r=4"])


def stir(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def write_reward_model(folder: Path, family: str, adapter: str = "lora") -> Path:
    """A reward model as stage=rm leaves one: an adapter on the policy's weights, and the two merged."""
    write_family(folder, family)
    base, stage = str(folder / family), folder / f"{family}-stage"
    options = LoadOptions(attention=attention_of(family))
    model = add_lora(new_reward_model(base, options), loaded("lora").adapter, task="SEQ_CLS")
    stir(trainable_parameters(model), seed=7)
    model.save_pretrained(stage / "adapter")
    merged_copy(base, stage / "adapter", task="SEQ_CLS").save_pretrained(stage / "model")
    word_tokenizer().save_pretrained(stage / "model")
    record = {"parents": [{"key": "base", "path": base, "sha256": hash_path(folder / family)}]}
    (stage / "stage.json").write_text(json.dumps(record))
    return stage / "model"


def settings(folder: Path, family: str, critic: Path, *, adapter: str = "lora", **more: Any) -> Any:
    config = copy.deepcopy(loaded(adapter))
    config.policy, config.critic = str(folder / family), str(critic)
    config.reward = {"kind": "model", "path": str(critic)}
    config.model.attention = attention_of(family)
    config.epochs, config.minibatches, config.updates, config.warmup_updates = 1, 1, 4, 1
    config.clip.grad_norm = 1e9
    for name, value in more.items():
        setattr(config, name, value)
    return config


def experience_of(roles: Roles, config: Any) -> Experience:
    return build_experience(roles, ROLLOUT, SCORES, config=config, kl_coef=0.1)


def gradients_of(models: ActorCritic, config: Any, experience: Experience) -> list[torch.Tensor]:
    """The gradients of one PPO step, before it is taken."""
    learner = Learner(models, ENGINE, config)
    learner.optimizer = torch.optim.SGD([*models.policy_parameters(), *models.critic_parameters()], lr=0.0)
    learner.minibatch(experience)
    parameters = [*models.policy_parameters(), *models.critic_parameters()]
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_first_values_are_the_merged_reward_models(tmp_path: Path, family: str) -> None:
    critic = write_reward_model(tmp_path, family)
    config = settings(tmp_path, family, critic)
    roles = build_roles(config, ENGINE)
    models = roles.actor_critic
    assert models.critic is models.policy and roles.reward is not None
    merged = load_reward_model(str(critic), LoadOptions(attention=attention_of(family)))
    with torch.no_grad():
        expected = sequence_scores(merged, ROLLOUT.tokens, ROLLOUT.attention_mask)
        values = models.values(ROLLOUT)
    codec = TextCodec(word_tokenizer(), style="plain")
    scorer = RewardModelScorer(roles.reward, codec, ENGINE, name="rm", acting=roles.as_reward)
    found = scorer.score_tokens(ROLLOUT.sequences())
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)
    # the value before the second token is the merged model's score of the sequence that ends with the first
    ended = join(left_pad(PROMPTS, PAD), [response[:1] for response in RESPONSES], PAD)
    with torch.no_grad():
        starts = sequence_scores(merged, ended.tokens, ended.attention_mask)
    long = [0, 1, 3]
    torch.testing.assert_close(values[long, 1], starts[long], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_joint_step_has_the_gradients_of_models_held_apart(
    tmp_path: Path, family: str, checkpointing: bool
) -> None:
    critic = write_reward_model(tmp_path, family)
    config = settings(tmp_path, family, critic, gradient_checkpointing=checkpointing)
    torch.manual_seed(0)  # the policy adapter's first matrices are random
    roles = build_roles(config, ENGINE)
    joint = roles.actor_critic
    stir(joint.policy_parameters(), seed=1)
    experience = experience_of(roles, config)

    options = LoadOptions(attention=attention_of(family))
    torch.manual_seed(0)
    policy = add_lora(load_causal_lm(config.policy, options), config.adapter, task="CAUSAL_LM")
    stir(trainable_parameters(policy), seed=1)
    other = add_lora(load_causal_lm(config.policy, options), config.adapter, task="CAUSAL_LM")
    read_adapter(other, critic.parent / "adapter", name="critic", trained=True)
    apart = ActorCritic(policy, other, copy.deepcopy(joint.value_head), critic_adapter="critic")

    found = gradients_of(joint, config, experience)
    expected = gradients_of(apart, config, experience)
    assert len(found) == len(expected) > 20
    assert sum(float(gradient.norm()) for gradient in expected) > 1e-3
    for one, two in zip(found, expected, strict=True):
        assert (one - two).norm() <= 1e-6 * two.norm()


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_an_update_moves_policy_and_critic_and_leaves_reference_and_reward(
    tmp_path: Path, adapter: str
) -> None:
    critic = write_reward_model(tmp_path, "llama")
    config = settings(tmp_path, "llama", critic, adapter=adapter)
    config.learning_rate = config.critic_learning_rate = 1e-2
    roles = build_roles(config, ENGINE)
    reward = build_reward(config, ENGINE, roles)

    def outputs() -> list[torch.Tensor]:
        with torch.no_grad():
            fixed = [roles.reference.logprobs(ROLLOUT, temperature=1.0)]
            fixed.append(torch.tensor(reward.score_tokens(ROLLOUT.sequences())))
            moving = [roles.actor_critic.logprobs(ROLLOUT, temperature=1.0)]
            return [*fixed, *moving, roles.actor_critic.values(ROLLOUT)]

    before = outputs()
    learner = Learner(roles.actor_critic, ENGINE, config)
    for step in (1, 2):
        metrics = learner.update(experience_of(roles, config), step=step)
        assert abs(metrics["first_ratio"] - 1) < 1e-5
    after = outputs()
    assert before[0].equal(after[0]) and before[1].equal(after[1])
    assert all((one - two).abs().max() > 1e-3 for one, two in zip(before[2:], after[2:], strict=True))


def test_switching_leaves_alone_what_is_trained(tmp_path: Path) -> None:
    critic = write_reward_model(tmp_path, "llama")
    models = build_roles(settings(tmp_path, "llama", critic), ENGINE).actor_critic
    before = {name for name, parameter in models.named_parameters() if parameter.requires_grad}
    assert any(".critic." in name for name in before) and any(".default." in name for name in before)
    assert not any(".reward." in name for name in before)
    for adapter in ("critic", "reward", None, "default"):
        with acting(models.policy, adapter):
            assert {name for name, p in models.named_parameters() if p.requires_grad} == before
    assert {name for name, parameter in models.named_parameters() if parameter.requires_grad} == before


def test_a_reward_model_on_other_weights_keeps_its_own_trunk(tmp_path: Path) -> None:
    critic = write_reward_model(tmp_path, "llama")
    assert adapter_of(str(critic), base=str(tmp_path / "llama")) == critic.parent / "adapter"
    assert adapter_of(str(critic), base=str(tmp_path / "llama-rm")) is None
    assert adapter_of(str(tmp_path / "llama-rm"), base=str(tmp_path / "llama")) is None
    record = json.loads((critic.parent / "stage.json").read_text())
    record["parents"][0]["sha256"] = "another"
    (critic.parent / "stage.json").write_text(json.dumps(record))
    models = build_roles(settings(tmp_path, "llama", critic), ENGINE).actor_critic
    assert models.critic is not models.policy


def test_an_adapter_that_does_not_fit_is_named(tmp_path: Path) -> None:
    critic = write_reward_model(tmp_path, "llama")
    write_family(tmp_path, "gpt2")
    policy = add_lora(
        load_causal_lm(str(tmp_path / "gpt2"), LoadOptions()), loaded("lora").adapter, task="CAUSAL_LM"
    )
    with pytest.raises(ValueError, match=r"adapter in .* does not fit the policy"):
        read_adapter(policy, critic.parent / "adapter", name="critic", trained=True)
