"""Laws of the roles: reference equals policy at the start, adapters share a trunk without touching it."""

import copy
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from rlhf.batches import join, left_pad
from rlhf.config import load_config
from rlhf.engine import Engine
from rlhf.models.adapters import add_lora, merged_copy, trainable_parameters
from rlhf.models.forward import response_logprobs, response_values, sequence_scores
from rlhf.models.roles import Roles, adapters_merged, build_roles
from rlhf.rewards import RewardModelScorer
from rlhf.text import TextCodec
from tests.models.families import BOS, EOS, FAMILIES, PAD, attention_of, load, word_tokenizer

PROMPTS = [[BOS, 5, 9, 30, 12, 7, 40], [8], [BOS, 22, 6], [31, 11, 19, 4, 25]]
RESPONSES = [[13, 44, EOS], [17, 9, 9, 21, 35, 6, 28, 41], [20], [33, 15, 27, 18, EOS]]
ROLLOUT = join(left_pad(PROMPTS, PAD), RESPONSES, PAD)
ENGINE = Engine(torch.device("cpu"), torch.float32)


@functools.cache
def loaded(adapter: str) -> Any:
    return load_config("ppo", ["model=tiny", "data=toy", f"adapter={adapter}"])


def settings(families: Path, family: str, *, adapter: str = "lora", checkpointing: bool = False) -> Any:
    config = copy.deepcopy(loaded(adapter))
    config.policy, config.critic = str(families / family), str(families / f"{family}-rm")
    config.model.attention = attention_of(family)
    config.gradient_checkpointing = checkpointing
    return config


def stirred(model: Any, scale: float = 0.1) -> None:
    """Give every trained parameter a random push, the adapters' zeros included."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def fingerprint(model: Any, keep: Callable[[str], bool] = lambda name: True) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if keep(name):
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def base_fingerprint(model: Any) -> str:
    return fingerprint(model, lambda name: "lora_" not in name)


def all_gradients(roles: Roles) -> Tensor:
    """Return the gradients of a loss of policy and critic, as the learner computes them."""
    models = roles.actor_critic
    logprobs, _ = models.logprobs_and_entropy(ROLLOUT, temperature=0.7)
    logprobs.square().sum().backward()
    models.values(ROLLOUT).square().sum().backward()
    parameters = [*models.policy_parameters(), *models.critic_parameters()]
    assert all(parameter.grad is not None for parameter in parameters)
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_policy_and_reference_start_with_kl_exactly_zero(families: Path, family: str, adapter: str) -> None:
    roles = build_roles(settings(families, family, adapter=adapter), ENGINE)
    with torch.no_grad():
        policy, _ = roles.actor_critic.logprobs_and_entropy(ROLLOUT, temperature=0.7)
    reference = roles.reference.logprobs(ROLLOUT, temperature=0.7)
    assert policy.equal(reference) and policy.abs().max() > 1


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_reference_stays_where_the_policy_started(families: Path, adapter: str) -> None:
    roles = build_roles(settings(families, "llama", adapter=adapter), ENGINE)
    before = roles.reference.logprobs(ROLLOUT, temperature=1.0)
    stirred(roles.actor_critic.policy)
    assert roles.reference.logprobs(ROLLOUT, temperature=1.0).equal(before)
    with torch.no_grad():
        moved = response_logprobs(roles.actor_critic.policy, ROLLOUT, temperature=1.0)
    assert (moved - before).abs().max() > 0.01
    # Asking the reference must leave the adapter switched on and trainable.
    assert all(parameter.requires_grad for parameter in roles.actor_critic.policy_parameters())
    assert roles.actor_critic.policy_parameters()


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_values_start_as_the_reward_models_scores(families: Path, adapter: str) -> None:
    # The value of the state after a whole response would be its score: the same trunk, the same head.
    roles = build_roles(settings(families, "llama", adapter=adapter), ENGINE)
    models = roles.actor_critic
    assert roles.critic_from_reward_model and models.value_head is not None
    continued = join(left_pad(PROMPTS, PAD), [[*row, EOS] for row in RESPONSES], PAD)
    with torch.no_grad():
        values = response_values(models.critic, models.value_head, continued)
        scores = sequence_scores(models.critic, ROLLOUT.tokens, ROLLOUT.attention_mask)
    at_the_end = values[torch.arange(4), ROLLOUT.response_mask.sum(1)]
    torch.testing.assert_close(at_the_end, scores, rtol=0, atol=1e-5)


def test_without_a_reward_model_of_the_same_tokenizer_values_start_at_zero(
    families: Path, tmp_path: Path
) -> None:
    config = settings(families, "llama")
    config.critic = None
    roles = build_roles(config, ENGINE)
    with torch.no_grad():
        assert not roles.actor_critic.values(ROLLOUT).any()
    assert not roles.critic_from_reward_model
    assert all_gradients(roles).isfinite().all()
    models = roles.actor_critic
    assert models.critic is models.policy, "the critic is an adapter on the policy's base"
    trained = {id(parameter) for parameter in models.policy_parameters()}
    assert len(models.critic_parameters()) == len(trained) + 2
    assert not trained & {id(parameter) for parameter in models.critic_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_for_sampling_leaves_the_base_as_it_was(families: Path, family: str) -> None:
    policy = build_roles(settings(families, family), ENGINE).actor_critic.policy
    stirred(policy)
    before = fingerprint(policy)
    with torch.no_grad():
        beside = response_logprobs(policy, ROLLOUT, temperature=1.0)
        with adapters_merged(policy):
            merged = response_logprobs(policy, ROLLOUT, temperature=1.0)
            assert fingerprint(policy) != before
        after = response_logprobs(policy, ROLLOUT, temperature=1.0)
        with policy.disable_adapter():
            base = response_logprobs(policy, ROLLOUT, temperature=1.0)
    torch.testing.assert_close(merged, beside, rtol=0, atol=2e-5)
    assert (base - beside).abs().max() > 0.01
    assert fingerprint(policy) == before and after.equal(beside)
    assert all(p.requires_grad for n, p in policy.named_parameters() if "lora_" in n)


def test_merging_is_undone_when_sampling_fails(families: Path) -> None:
    policy = build_roles(settings(families, "gpt2"), ENGINE).actor_critic.policy
    stirred(policy)
    before = fingerprint(policy)
    with pytest.raises(KeyboardInterrupt), adapters_merged(policy):
        raise KeyboardInterrupt
    assert fingerprint(policy) == before


def test_a_model_without_adapter_needs_no_merge(families: Path) -> None:
    model = load(families, "llama")
    before = fingerprint(model)
    with adapters_merged(model):
        assert fingerprint(model) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_reward_scores_do_not_move_when_the_critics_adapter_trains(families: Path, family: str) -> None:
    roles = build_roles(settings(families, family), ENGINE)
    critic = roles.actor_critic.critic
    codec = TextCodec(word_tokenizer(), style="plain")
    scorer = RewardModelScorer(critic, codec, ENGINE, name="rm", acting=roles.as_reward)
    rows = ROLLOUT.sequences()
    before, base = scorer.score_tokens(rows), base_fingerprint(critic)
    with torch.no_grad():
        values = roles.actor_critic.values(ROLLOUT)
    optimizer = torch.optim.AdamW(roles.actor_critic.critic_parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        roles.actor_critic.values(ROLLOUT).square().sum().backward()
        optimizer.step()
    assert scorer.score_tokens(rows) == before
    assert base_fingerprint(critic) == base
    with torch.no_grad():
        assert (roles.actor_critic.values(ROLLOUT) - values).abs().max() > 0.01
    assert all(parameter.requires_grad for parameter in roles.actor_critic.critic_parameters())


@pytest.mark.parametrize(
    ("family", "adapter"), [*((family, "lora") for family in FAMILIES), ("gpt2", "none"), ("llama", "none")]
)
def test_gradient_checkpointing_changes_no_gradient(families: Path, family: str, adapter: str) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # the adapters' first matrices are random
        config = settings(families, family, adapter=adapter, checkpointing=checkpointing)
        roles = build_roles(config, ENGINE)
        if adapter == "lora":
            stirred(roles.actor_critic.policy)
            stirred(roles.actor_critic.critic)
        found.append(all_gradients(roles))
        layers = [m for m in roles.actor_critic.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(layers) == checkpointing and all(layer.training for layer in layers)
    assert found[0].norm() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6 * float(found[0].norm()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "opt"])
def test_no_role_has_dropout_although_model_and_adapter_name_it(
    families: Path, family: str, checkpointing: bool
) -> None:
    config = settings(families, family, checkpointing=checkpointing)
    config.adapter.dropout = 0.5
    roles = build_roles(config, ENGINE)
    models = roles.actor_critic
    stirred(models)
    with torch.no_grad():
        first = (models.logprobs_and_entropy(ROLLOUT, temperature=1.0)[0], models.values(ROLLOUT))
        again = (models.logprobs_and_entropy(ROLLOUT, temperature=1.0)[0], models.values(ROLLOUT))
    assert first[0].equal(again[0]) and first[1].equal(again[1])


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_the_score_head_that_gives_rewards_does_not_train(families: Path, adapter: str) -> None:
    models = build_roles(settings(families, "llama", adapter=adapter), ENGINE).actor_critic
    trained = {id(parameter) for parameter in [*models.policy_parameters(), *models.critic_parameters()]}
    assert models.critic is not None and models.value_head is not None
    score = models.critic.get_base_model().score if adapter == "lora" else models.critic.score
    assert id(score.weight) not in trained and id(models.value_head.weight) in trained
    assert len(trained) == len([*models.policy_parameters(), *models.critic_parameters()])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_merged_copy_answers_as_the_adapter_did(families: Path, family: str, tmp_path: Path) -> None:
    policy = build_roles(settings(families, family), ENGINE).actor_critic.policy
    stirred(policy)
    policy.save_pretrained(tmp_path / "adapter")
    merged = merged_copy(str(families / family), tmp_path / "adapter", task="CAUSAL_LM")
    assert not isinstance(merged, PeftModel)
    with torch.no_grad():
        expected = response_logprobs(policy, ROLLOUT, temperature=1.0)
        found = response_logprobs(merged, ROLLOUT, temperature=1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_lora_trains_its_matrices_and_the_score_head_of_a_reward_model(families: Path) -> None:
    from rlhf.models.loading import LoadOptions, new_reward_model

    adapter = settings(families, "llama").adapter
    model = add_lora(new_reward_model(str(families / "llama"), LoadOptions()), adapter, task="SEQ_CLS")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    assert sum("modules_to_save" in name for name in names) == 1
    # seven projections in each of two layers, two matrices each
    assert sum("lora_" in name for name in names) == 28
