"""Which values of a configuration are refused."""

import math
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from rlhf.decoding import decoding_in
from rlhf.deepspeed_config import check_has_stage
from rlhf.discriminator_settings import check_discriminator, is_adversarial, refuse_elsewhere
from rlhf.gates import parse_gates
from rlhf.settings import (
    WEIGHTS,
    Adapter,
    BenchConfig,
    CollectConfig,
    EvaluateConfig,
    Exposure,
    Judge,
    PPOConfig,
    RMConfig,
    SFTConfig,
    StageConfig,
    zero_stage,
)
from rlhf.specs import check_scorer, check_source, check_systems, runs_in, system_names

CHOICES: dict[str, tuple[str | None, ...]] = {
    "tracker": ("tensorboard", "wandb", "trackio", "none"),
    "adapter.quantization": ("none", "nf4", "int8"),
    "engine.dtype": ("auto", "float32", "bfloat16"),
    "data.format": ("auto", "chat", "plain"),
    "data.on_bad_row": ("stop", "skip"),
    "kl.controller": ("fixed", "adaptive"),
    "algo": ("ppo", "reinforce", "rloo"),
    "reinforce_baseline": ("moving", "greedy", "none"),
    "critic_trunk": ("own", "policy"),
    "decoding.penalty_scope": ("response", "all"),
    "exposure.schedule": (None, "linear", "exponential", "inverse_sigmoid"),
    "exposure.replacement": (None, "sample", "argmax"),
    "model.attention": (None, "sdpa", "eager", "flash_attention_2", "flash_attention_3"),
}
AT_LEAST_ONE = {
    "batch_size",
    "minibatches",
    "rollouts_per_prompt",
    "eval_every",
    "eval_prompts",
    "micro_batch_size",
    "tokens_per_pass",
    "threads",
    "workers",
    "zero_processes",
    "rounds",
    "max_prompt_tokens",
    "max_response_tokens",
    "max_length",
    "bootstrap",
    "num_processes",
    "num_machines",
    "main_port",
    "examples",
    "eval_examples",
    "num_prompts",
    "updates",
    "save_every",
    "keep_every",
    "sample_every",
    "log_steps",
    "save_steps",
    "passes",
    "num_beams",
    "delta",
    "concurrency",
    "max_tokens",
}
NOT_EMPTY = {"name", "runs", "model.path", "policy", "critic", "base", "oracle"}
ABOVE_ZERO = {
    "temperature",
    "repetition_penalty",
    "reward_clip",
    "top_p",
    "typical_p",
    "target",
    "horizon",
    "eval_fraction",
    "epochs",
    "exposure.k",
    "requests_per_minute",
    "timeout",
}
BELOW = {"label_smoothing": 0.5, "eval_fraction": 1.0}
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
MOST_KL_ERROR = 0.2  # by which the adaptive controller moves kl.coef, times episodes / kl.horizon
ANY_SIGN = {"missing_eos_score", "decoding.length_penalty"}
FRACTIONS = {
    "top_p",
    "min_p",
    "typical_p",
    "warmup_ratio",
    "eval_fraction",
    "dropout",
    "gae.gamma",
    "gae.lam",
    "exposure.end",
}


def check_config(config: StageConfig) -> None:
    """Raise ValueError, naming the key, for a value of the right type that cannot be meant."""
    for key, value in _leaves(config):
        _check_value(key, value)
    if isinstance(config, StageConfig) and config.overwrite and config.resume:
        raise ValueError("overwrite=true and resume=true contradict each other: give one of them")
    if isinstance(config, BenchConfig):
        _check_bench(config)
    _check_adapter(config.adapter)
    _check_shared_weights(config)
    if isinstance(config, SFTConfig):
        _check_exposure(config.exposure)
    if isinstance(config, CollectConfig):
        check_scorer("labeller", config.labeller)
        _check_samples(config)
    if isinstance(config, PPOConfig):
        _check_reward(config)
        _check_ppo(config)
        _check_mixer(config)
    if isinstance(config, EvaluateConfig):
        refuse_elsewhere("reward", config.reward)
        for key, spec in (("proxy", config.proxy), ("gold", config.gold)):
            if spec is not None:
                check_scorer(key, spec)
        check_systems(config.systems, config.baseline, decoding_in(config))
        parse_gates(config.gate, system_names(config.systems), runs_in(config.systems))
        _check_judge(config.judge)


def _check_adapter(adapter: Adapter) -> None:
    if adapter.name == "none" and (adapter.r or adapter.quantization != "none"):
        key, value, remedy = "adapter.r", f"{adapter.r}", "lora"
        if adapter.quantization != "none":
            key, value = "adapter.quantization", adapter.quantization
            remedy = "qlora" if value == "nf4" else "int8"
        raise ValueError(f"{key}={value} without an adapter: give adapter={remedy} as well")
    if adapter.name != "none" and not adapter.r:
        raise ValueError(f"adapter.r=0 with adapter={adapter.name}: at least 1 is expected")


def _check_samples(config: CollectConfig) -> None:
    decoding, samples = decoding_in(config), config.samples_per_prompt
    if samples < 2:
        raise ValueError(f"samples_per_prompt={samples}: ranking needs at least 2")
    if decoding.greedy:
        raise ValueError(
            f"decoding={config.decoding.name} draws nothing: all samples of a prompt would be equal, and "
            "nothing could be ranked; give one that draws, for instance decoding=sample"
        )
    if 1 < decoding.num_beams < samples:
        raise ValueError(
            f"samples_per_prompt={samples} of decoding.num_beams={decoding.num_beams}: a search has no more "
            f"responses than beams; give decoding.num_beams={samples}"
        )


def _check_exposure(exposure: Exposure) -> None:
    given = {name: value for name, value in vars(exposure).items() if name != "name" and value is not None}
    if exposure.name == "none":
        if given:
            name, value = next(iter(given.items()))
            raise ValueError(
                f"exposure.{name}={value} with exposure=none: give exposure=scheduled_sampling as well"
            )
        return
    for name in vars(exposure):
        if name not in given and name not in ("name", "k"):
            raise ValueError(f"exposure.{name}=null: leave it out, and it has its default")
    curved, k, end = exposure.schedule != "linear", exposure.k, exposure.end
    if curved and k is None and end == 0:
        raise ValueError(
            f"exposure.end={end}: the {exposure.schedule} schedule never gets there; give a number above 0, "
            "or exposure.k"
        )
    if exposure.schedule == "exponential" and k is not None and k > 1:
        raise ValueError(f"exposure.k={k}: the exponential schedule k^i needs at most 1")


def _check_judge(judge: Judge) -> None:
    if judge.name == "none":
        for name, value in vars(judge).items():
            if name != "name" and value is not None:
                raise ValueError(f"judge.{name}={value} with judge=none: give judge=openai as well")
    elif not judge.model:
        raise ValueError("judge.model is missing: give the name that the endpoint has for the model")
    elif judge.max_cost is not None and not (judge.price_in or judge.price_out):
        raise ValueError(
            f"judge.max_cost={judge.max_cost} bounds nothing: give judge.price_in= and judge.price_out="
        )


def _check_shared_weights(config: StageConfig) -> None:
    check_has_stage(config.engine.deepspeed)
    if zero_stage(config.engine.deepspeed) < WEIGHTS:
        return
    engine = config.engine.name
    if config.adapter.quantization != "none" and isinstance(config, SFTConfig | RMConfig | PPOConfig):
        raise ValueError(
            f"adapter={config.adapter.name}: engine={engine} cannot share out quantized weights; use "
            f"adapter=lora, or engine={engine.replace('3', '2')}"
        )


def _check_reward(config: PPOConfig) -> None:
    if is_adversarial(config):
        check_discriminator(config)
    else:
        check_scorer("reward", config.reward)


def _check_mixer(config: PPOConfig) -> None:
    updates = config.mixer.updates
    if updates is None:
        return
    if config.algo == "ppo":
        raise ValueError(
            f"mixer.updates={updates} with algo=ppo: MIXER mixes cross-entropy with a policy "
            "gradient of whole responses; give algo=reinforce or algo=rloo"
        )
    if updates > config.updates:
        raise ValueError(
            f"mixer.updates={updates} of updates={config.updates}: responses would never be all "
            "the policy's own; give fewer, or more updates"
        )
    if config.temperature != 1:
        raise ValueError(
            f"temperature={config.temperature} with mixer.updates={updates}: cross-entropy is "
            "that of the model's own distribution; set temperature=1.0"
        )


def _check_ppo(config: PPOConfig) -> None:
    if config.critic_trunk == "policy" and config.engine.deepspeed is not None:
        raise ValueError(
            "critic_trunk=policy learns from two losses at once, which is not to be had with engine="
            f"{config.engine.name}: use critic_trunk=own, or engine=ddp"
        )
    if config.minibatches > config.batch_size:
        raise ValueError(
            f"minibatches={config.minibatches} of batch_size={config.batch_size} episodes: "
            "give every minibatch at least one episode"
        )
    if config.keep_every is not None and config.keep_every >= config.updates:
        raise ValueError(
            f"keep_every={config.keep_every} of updates={config.updates} keeps nothing on the way: give "
            "fewer, or more updates"
        )
    if config.algo == "rloo" and config.rollouts_per_prompt < 2:
        raise ValueError(
            f"rollouts_per_prompt={config.rollouts_per_prompt}: algo=rloo compares a prompt's samples "
            "with one another and needs at least 2"
        )
    if config.batch_size % config.rollouts_per_prompt:
        raise ValueError(
            f"batch_size={config.batch_size} is no multiple of "
            f"rollouts_per_prompt={config.rollouts_per_prompt}"
        )
    if config.whiten_rewards and config.algo != "ppo":
        raise ValueError(
            f"whiten_rewards=true with algo={config.algo}, which has one reward a response: set it to false"
        )
    if config.kl.controller == "adaptive" and config.kl.horizon <= MOST_KL_ERROR * config.batch_size:
        raise ValueError(
            f"kl.horizon={config.kl.horizon} with batch_size={config.batch_size}: one update would turn the "
            f"sign of kl.coef; give more than {MOST_KL_ERROR * config.batch_size:g}"
        )
    if config.top_k != 0 or config.top_p != 1:
        raise ValueError(
            f"top_k={config.top_k}, top_p={config.top_p}: PPO learns from log-probs of the whole "
            "distribution that it samples from; set top_k=0 and top_p=1.0 (decoding.top_k and "
            "decoding.top_p are for evaluation)"
        )


def _check_bench(config: BenchConfig) -> None:
    count = config.num_processes
    if (config.engine.name == "single") != (count is None):
        raise ValueError(
            f"engine={config.engine.name} num_processes={'null' if count is None else count}: several "
            "processes need both, for instance engine=ddp num_processes=2"
        )
    alone = {"find_tokens_per_pass": config.find_tokens_per_pass, "peer": config.peer}
    if key := next((key for key, value in alone.items() if value and count is not None), None):
        raise ValueError(f"{key}={alone[key]} is of one process: leave engine= and num_processes= out")


def _check_value(key: str, value: Any) -> None:
    if key in NOT_EMPTY and value is not None and not value.strip():
        raise ValueError(f"{key}= is empty: give it a value, or leave it out")
    if key == "name" and (Path(value).is_absolute() or ".." in Path(value).parts or not Path(value).parts):
        raise ValueError(f"name={value}: a name below runs= is expected; runs= sets another folder")
    if key in CHOICES and value not in CHOICES[key]:
        choices = ", ".join(choice or "null" for choice in CHOICES[key])
        raise ValueError(f"{key}={value}: one of {choices}")
    if key == "engine.device" and not DEVICE.fullmatch(value):
        raise ValueError(f"engine.device={value}: one of auto, cpu, cuda, cuda:<number>, mps")
    if key.startswith(("data.demonstrations", "data.ranked", "data.prompts", "data.labelled", "ranked.")):
        check_source(key, value)
    if key == "prefix_lengths" and value is not None and min(value, default=0) < 1:
        raise ValueError(f"{key}={value}: give lengths of at least 1 token, or null for none")
    if isinstance(value, int | float) and not isinstance(value, bool):
        _check_number(key, value)


def _check_number(key: str, value: float) -> None:
    last = key.split(".")[-1]
    bounds = (
        (math.isfinite(value), "a finite number"),
        (last not in AT_LEAST_ONE or value >= 1, "a number that is at least 1"),
        (not {key, last} & ABOVE_ZERO or value > 0 or key == "judge.temperature", "a number that is above 0"),
        (not {key, last} & FRACTIONS or 0 <= value <= 1, "a number from 0 to 1"),
        (value >= 0 or key in ANY_SIGN, "a number that is not negative"),
        (value < BELOW.get(last, math.inf), f"a number below {BELOW.get(last)}"),
        (key != "main_port" or value < 2**16, f"a port from 1 to {2**16 - 1}"),
        (key != "seed" or value < 2**32, f"at most {2**32 - 1}"),
        (key != "calibration_prompts" or value >= 2, "at least 2"),
    )
    for holds, expected in bounds:
        if not holds:
            raise ValueError(f"{key}={value}: {expected} is expected")


def _leaves(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    leaves = []
    for field in fields(config):
        value, key = getattr(config, field.name), prefix + field.name
        leaves += _leaves(value, f"{key}.") if is_dataclass(value) else [(key, value)]
    return leaves
