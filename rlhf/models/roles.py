"""The four roles of PPO on as few weights as they need.

Full weights: policy, reference, critic and reward are four models. With LoRA the reference is the policy's
trunk with its adapter off, and the reward model is the critic's trunk with its adapter off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from rlhf.batches import Rollout
from rlhf.engine import Engine
from rlhf.models.adapters import add_lora, trainable_parameters, uses_lora
from rlhf.models.forward import response_logprobs, response_logprobs_and_entropy, response_values
from rlhf.models.loading import (
    load_causal_lm,
    load_options,
    load_reward_model,
    new_reward_model,
    same_tokenizer,
)


class ActorCritic(nn.Module):
    """What PPO trains: a policy and a critic with its value head, on separate trunks."""

    def __init__(self, policy: Any, critic: Any, value_head: nn.Linear) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        self.value_head = value_head

    def logprobs(self, rollout: Rollout, *, temperature: float) -> Tensor:
        """The policy's log-probs (B, R)."""
        return response_logprobs(self.policy, rollout, temperature=temperature)

    def logprobs_and_entropy(self, rollout: Rollout, *, temperature: float) -> tuple[Tensor, Tensor]:
        """The policy's log-probs and entropies (B, R)."""
        return response_logprobs_and_entropy(self.policy, rollout, temperature=temperature)

    def values(self, rollout: Rollout) -> Tensor:
        """The critic's values (B, R)."""
        return response_values(self.critic, self.value_head, rollout)

    def policy_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the policy."""
        return trainable_parameters(self.policy)

    def critic_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of the critic and its value head."""
        return [*trainable_parameters(self.critic), *self.value_head.parameters()]


class Reference:
    """The frozen policy that KL is measured to: a model of its own, or a LoRA policy's base."""

    def __init__(self, model: Any | None, policy: Any) -> None:
        self.model = model
        self.policy = policy

    @torch.no_grad()
    def logprobs(self, rollout: Rollout, *, temperature: float) -> Tensor:
        """Log-probs (B, R) of the response tokens under the reference."""
        if self.model is not None:
            return response_logprobs(self.model, rollout, temperature=temperature)
        with self.policy.disable_adapter():
            return response_logprobs(self.policy, rollout, temperature=temperature)


@dataclass(frozen=True)
class Roles:
    """The models of a PPO run, and whether the critic's trunk is the reward model's."""

    actor_critic: ActorCritic
    reference: Reference
    engine: Engine
    critic_from_reward_model: bool


def build_roles(config: Any, engine: Engine) -> Roles:
    """Load policy, reference and critic for the keys `policy`, `critic` and `adapter`.

    The critic starts from the reward model at `critic` with its score head as value head; where that has
    another tokenizer, or no reward model is named, it starts from the policy's trunk and values of 0.
    """
    lora = uses_lora(config.adapter)
    trained = load_options(config.model, engine, trained=not lora, quantization=config.adapter.quantization)
    frozen = load_options(config.model, engine, trained=False)
    policy = load_causal_lm(config.policy, trained)
    reference = None if lora else load_causal_lm(config.policy, frozen)
    from_reward_model = config.critic is not None and same_tokenizer(config.policy, config.critic)
    if from_reward_model:
        critic = load_reward_model(config.critic, trained, key="critic")
    else:
        critic = new_reward_model(config.policy, trained)
    value_head = _value_head(critic, starts_at_zero=not from_reward_model)
    if lora:
        policy = add_lora(policy, config.adapter, task="CAUSAL_LM")
        critic = add_lora(critic, config.adapter, task=None)
    else:
        critic.score.requires_grad_(False)
    for model in (policy, critic):
        _switch_off_dropout(model)
        # Recomputing in the backward pass is a matter of training mode, which changes nothing else here.
        model.train(config.gradient_checkpointing)
        if config.gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Roles(
        ActorCritic(policy, critic, value_head.to(engine.device)),
        Reference(reference, policy),
        engine,
        from_reward_model,
    )


def _switch_off_dropout(model: nn.Module) -> None:
    """Old, new and reference log-probs must come from one function of the weights."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _value_head(critic: Any, *, starts_at_zero: bool) -> nn.Linear:
    """A linear layer (H -> 1) with bias, in float32, that starts as the critic's score head or at 0."""
    layer = nn.Linear(critic.score.in_features, 1)
    with torch.no_grad():
        layer.bias.zero_()
        layer.weight.copy_(torch.zeros(()) if starts_at_zero else critic.score.weight.float())
    return layer


@contextlib.contextmanager
def adapters_merged(policy: Any) -> Iterator[None]:
    """Run a LoRA policy with its adapter folded into the weights; the base gets its own bits back.

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
                delta = layer.get_delta_weight(layer.active_adapters[0])
                weight.data = (original.float() + delta.float()).to(original.dtype)
        with policy.disable_adapter():
            yield
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.data = original
