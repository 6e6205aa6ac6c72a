"""The settings of reward=discriminator, and which of them are refused; known before torch is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from rlhf.hints import hint

KIND = "discriminator"


@dataclass(frozen=True)
class DiscriminatorSettings:
    """How the discriminator learns; `replay` is a share of its samples, the others count steps and texts."""

    learning_rate: float
    pretrain_updates: int
    steps: int
    batch_size: int
    replay: float
    replay_size: int


def is_adversarial(config: Any) -> bool:
    """Whether the reward of a PPO run is a discriminator."""
    return config.reward.get("kind") == KIND


def settings_in(spec: dict[str, Any]) -> DiscriminatorSettings:
    """The settings in a reward of this kind; ValueError, naming the key, for one that cannot be meant."""
    types = {field.name: str(field.type) for field in fields(DiscriminatorSettings)}
    given = {name: value for name, value in spec.items() if name != "kind"}
    for name in given:
        if name not in types:
            keys = ", ".join(types)
            raise ValueError(f"reward.{name} is not a key; {hint(str(name), types)}keys are kind, {keys}")
    for name, kind in types.items():
        if name not in given:
            raise ValueError(f"reward.{name} is missing: kind={KIND} needs it; reward={KIND} has all")
        value, whole = given[name], kind == "int"
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise ValueError(
                f"reward.{name}={value}: {'a whole number' if whole else 'a number'} is expected"
            )
        bounds = {
            "learning_rate": (0 < value < math.inf, "a number that is above 0"),
            "replay": (0 <= value < 1, "a number from 0 to below 1"),
        }
        holds, expected = bounds.get(name, (value >= 1, "a number that is at least 1"))
        if not holds:
            raise ValueError(f"reward.{name}={value}: {expected} is expected")
    return DiscriminatorSettings(**given)


def check_discriminator(config: Any) -> None:
    """Refuse, before anything is loaded, what a PPO run against a discriminator cannot have."""
    settings_in(config.reward)
    if config.eval_every is not None:
        raise ValueError(
            f"eval_every={config.eval_every} with reward={KIND}: it is another judge after each update, so "
            "scores of different updates cannot be compared; set eval_every=null"
        )


def refuse_elsewhere(key: str, spec: dict[str, Any]) -> None:
    """Refuse a discriminator where no policy learns beside it, or as a part of a reward."""
    if spec.get("kind") == KIND:
        raise ValueError(
            f"{key}.kind={KIND}: it is trained in stage=ppo, as the whole reward (with stage=all: "
            f"ppo.reward={KIND}); here give {{kind: model, path: <run>/ppo/{KIND}}}, what such a run leaves"
        )
