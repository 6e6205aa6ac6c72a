"""The four roles of PPO on as few weights as they need.

Full weights: policy, reference, critic and reward are four models. With LoRA the reference is the policy's
trunk with no adapter on. A reward model that is an adapter on that very trunk makes it the only one: policy,
critic and reward are three adapters on it. Any other reward model is a second trunk, which the critic's
adapter shares.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from rlhf.batches import Rollout
from rlhf.engine import Engine
from rlhf.models import llama
from rlhf.models.adapters import (
    POLICY,
    acting,
    add_adapter,
    add_lora,
    read_adapter,
    trainable_parameters,
    uses_lora,
)
from rlhf.models.forward import response_logprobs, response_logprobs_and_entropy, response_values
from rlhf.models.loading import (
    LoadOptions,
    check_classifier,
    head,
    load_causal_lm,
    load_options,
    load_reward_model,
    load_score_head,
    new_reward_model,
    same_tokenizer,
    trunk,
)
from rlhf.models.lora import merged_weight
from rlhf.models.sharded import shard
from rlhf.parents import adapter_of

DISCRIMINATOR = "discriminator"  # its adapter's name


class ActorCritic(nn.Module):
    """What PPO trains: a policy and a critic with its value head, on two trunks or as two adapters on one.

    `critic_adapter` is the LoRA adapter that acts in the critic's passes, where there is one. The critic may
    be the policy itself with a value head, or None: REINFORCE and RLOO need none.
    """

    def __init__(
        self,
        policy: Any,
        critic: Any | None,
        value_head: nn.Linear | None,
        *,
        critic_adapter: str = POLICY,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.value_head = value_head
        self.critic_adapter = critic_adapter

    def as_critic(self) -> contextlib.AbstractContextManager[None]:
        """Let the critic's adapter act; a backward pass belongs inside, as it may compute forward again."""
        return acting(self.critic, self.critic_adapter)

    def logprobs(self, rollout: Rollout, *, temperature: float) -> Tensor:
        """The policy's log-probs (B, R)."""
        return response_logprobs(self.policy, rollout, temperature=temperature)

    def logprobs_and_entropy(
        self, rollout: Rollout, *, temperature: float, learn_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The policy's log-probs and entropies (B, R)."""
        return response_logprobs_and_entropy(
            self.policy, rollout, temperature=temperature, learn_entropy=learn_entropy
        )

    def values(self, rollout: Rollout) -> Tensor:
        """The critic's values (B, R)."""
        assert self.value_head is not None, "this algorithm has no critic"
        with self.as_critic():
            return response_values(self.critic, self.value_head, rollout)

    def policy_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the policy."""
        return trainable_parameters(self.policy, adapter=POLICY)

    def critic_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the critic and its value head; those of the policy are not among them."""
        if self.value_head is None:
            return []
        shared = self.critic is self.policy and self.critic_adapter == POLICY
        own = [] if shared else trainable_parameters(self.critic, adapter=self.critic_adapter)
        return [*own, *self.value_head.parameters()]


class Reference:
    """The frozen policy that KL is measured to: a model of its own, or a LoRA policy's base."""

    def __init__(self, model: Any | None, policy: Any) -> None:
        self.model = model
        self.policy = policy

    def acting(self) -> contextlib.AbstractContextManager[None]:
        """Around passes that run side by side: adapters are switched for all threads at once."""
        return acting(self.policy, None) if self.model is None else contextlib.nullcontext()

    @torch.no_grad()
    def logprobs(self, rollout: Rollout, *, temperature: float) -> Tensor:
        """Log-probs (B, R) of the response tokens under the reference."""
        with self.acting():
            model = self.policy if self.model is None else self.model
            return response_logprobs(model, rollout, temperature=temperature)


class RewardAdapter(nn.Module):
    """A reward model that is an adapter and a score head on the policy's trunk; read it inside `acting`."""

    def __init__(self, policy: Any, score: nn.Linear) -> None:
        super().__init__()
        self.base_model = trunk(policy)
        self.score = score
        self.config, self.device = policy.config, policy.device


@dataclass(frozen=True)
class Roles:
    """The models of a PPO run. `reward` is the reward model at `critic` where its trunk is another role's,
    to be read inside `as_reward()`; `critic_from_reward_model` tells whether values start as its scores.
    """

    actor_critic: ActorCritic
    reference: Reference
    engine: Engine
    critic_from_reward_model: bool
    reward: Any | None = None
    as_reward: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


def build_roles(config: Any, engine: Engine) -> Roles:
    """Load policy, reference and critic for the keys `policy`, `critic` and `adapter`.

    The critic starts from the reward model at `critic` with its score head as value head; where that has
    another tokenizer, or no reward model is named, it starts from the policy's trunk and values of 0.
    With critic_trunk=policy it is a value head on the policy; algo=reinforce and algo=rloo have none.
    """
    lora = uses_lora(config.adapter)
    trained = load_options(
        config.model, engine, trained=not lora, quantization=config.adapter.quantization, sharded=True
    )
    policy = load_causal_lm(config.policy, trained)
    shard(policy, engine, trained=not lora, copied=True)
    if lora:
        policy = add_lora(policy, config.adapter, task="CAUSAL_LM")
    from_reward_model = False
    if config.critic is not None:
        check_classifier(config.critic, trained, key="critic")
        from_reward_model = same_tokenizer(config.policy, config.critic, config.model)
    adapter = adapter_of(config.critic, base=config.policy) if lora and from_reward_model else None
    if lora and (adapter is not None or not from_reward_model):
        roles = _on_one_trunk(policy, adapter, config, engine)
    else:
        roles = _on_own_trunks(policy, trained, config, engine, from_reward_model=from_reward_model)
    models = roles.actor_critic
    if roles.reference.model is not None:
        llama.join_weights(trunk(roles.reference.model))
    for model in {id(model): model for model in (models.policy, models.critic) if model is not None}.values():
        _make_ready(model, config)
    return roles


def build_discriminator(
    policy: Any, config: Any, engine: Engine
) -> tuple[Any, list[nn.Parameter], Callable[[], contextlib.AbstractContextManager[None]]]:
    """A classifier that starts as the policy that a run goes on from, with a score head of zeros.

    With LoRA it is one more adapter on that policy's trunk, else a model of its own. Returns it, what is
    trained of it, and what its passes, a backward one included, happen inside.
    """
    if uses_lora(config.adapter):
        add_adapter(policy, name=DISCRIMINATOR)
        _switch_off_dropout(policy)
        score = nn.Linear(head(policy).in_features, 1, bias=False)
        nn.init.zeros_(score.weight)
        adapted = RewardAdapter(policy, score.to(engine.device))
        trained = [*trainable_parameters(policy, adapter=DISCRIMINATOR), *score.parameters()]
        return adapted, trained, functools.partial(acting, policy, DISCRIMINATOR)
    options = load_options(config.model, engine, trained=True, sharded=True)
    model = new_reward_model(config.policy, options)
    shard(model, engine, trained=True, copied=True)
    _make_ready(model, config)
    return model, trainable_parameters(model), contextlib.nullcontext


def _make_ready(model: Any, config: Any) -> None:
    """Lay a model's weights out for its passes, which it makes again in the backward ones where asked."""
    llama.join_weights(trunk(model))
    _switch_off_dropout(model)
    # Recomputing in the backward pass is a matter of training mode, which changes nothing else here.
    model.train(config.gradient_checkpointing)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _on_one_trunk(policy: Any, adapter: Path | None, config: Any, engine: Engine) -> Roles:
    """Policy, critic and reward as adapters on the policy's base.

    The critic's starts as the reward's; without one the critic starts as the base, with values of 0.
    """
    score = None if adapter is None else load_score_head(config.critic).to(engine.device)
    models = _without_own_critic(policy, config, engine)
    if models is None:
        if adapter is None:
            add_adapter(policy, name="critic")
        else:
            read_adapter(policy, adapter, name="critic", trained=True)
        models = ActorCritic(policy, policy, _value_head(policy, score, engine), critic_adapter="critic")
    if adapter is None or score is None:
        return Roles(models, Reference(None, policy), engine, critic_from_reward_model=False)
    read_adapter(policy, adapter, name="reward", trained=False)
    return Roles(
        models,
        Reference(None, policy),
        engine,
        critic_from_reward_model=models.critic_adapter == "critic",
        reward=RewardAdapter(policy, score),
        as_reward=functools.partial(acting, policy, "reward"),
    )


def _without_own_critic(policy: Any, config: Any, engine: Engine) -> ActorCritic | None:
    """A policy without a critic, or with a value head of zeros on its own trunk; None where one is due."""
    if config.algo != "ppo":
        return ActorCritic(policy, None, None)
    if config.critic_trunk == "policy":
        return ActorCritic(policy, policy, _value_head(policy, None, engine))
    return None


def _on_own_trunks(
    policy: Any, trained: LoadOptions, config: Any, engine: Engine, *, from_reward_model: bool
) -> Roles:
    """The critic on a trunk of its own, and without LoRA the reference too; with LoRA the critic's trunk is a
    reward model that is no adapter on the policy.
    """
    lora = uses_lora(config.adapter)
    frozen = load_options(config.model, engine, trained=False, sharded=True)
    reference = None if lora else load_causal_lm(config.policy, frozen)
    if reference is not None:
        shard(reference, engine, trained=False)
    models = _without_own_critic(policy, config, engine)
    if models is not None:
        return Roles(models, Reference(reference, policy), engine, critic_from_reward_model=False)
    if from_reward_model:
        critic = load_reward_model(config.critic, trained, key="critic")
    else:
        critic = new_reward_model(config.policy, trained)
    value_head = _value_head(critic, critic.score if from_reward_model else None, engine)
    own = [critic.base_model] if lora else [critic.base_model, value_head]
    shard(critic, engine, trained=not lora, parts=own)
    if lora:
        critic = add_lora(critic, config.adapter, task=None)
    else:
        critic.score.requires_grad_(False)
    return Roles(
        ActorCritic(policy, critic, value_head),
        Reference(reference, policy),
        engine,
        from_reward_model,
        reward=critic if lora else None,
        as_reward=functools.partial(acting, critic, None) if lora else contextlib.nullcontext,
    )


def _switch_off_dropout(model: nn.Module) -> None:
    """Old, new and reference log-probs must come from one function of the weights."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _value_head(model: Any, score: nn.Linear | None, engine: Engine) -> nn.Linear:
    """A linear layer (H -> 1) with bias, in float32, that starts as a score head or at 0."""
    layer = nn.Linear(model.config.get_text_config().hidden_size if score is None else score.in_features, 1)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.copy_(torch.zeros(()) if score is None else score.weight.float())
    return layer.to(engine.device)


@contextlib.contextmanager
def adapters_merged(policy: Any) -> Iterator[None]:
    """Run a LoRA policy with its acting adapter folded into the weights; the base gets its own bits back.

    Quantized layers keep their adapter beside them: there is no exact way back from a merge.
    """
    layers = [module for module in policy.modules() if isinstance(module, LoraLinear)]
    weights: list[Any] = [layer.get_base_layer().weight for layer in layers]
    if not layers:
        yield
        return
    originals: list[Tensor] = [weight.data for weight in weights]
    try:
        with torch.no_grad():
            for layer, weight, original in zip(layers, weights, originals, strict=True):
                weight.data = merged_weight(layer, original)
        with acting(policy, None):
            yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original
