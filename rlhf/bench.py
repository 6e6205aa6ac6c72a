"""What this machine does in a second: matrix products, sampling, PPO updates.

Each part runs in a process of its own, `python -m rlhf.bench '{"part": ..., ...}'`, so that peak memory is
its own, and prints its result as JSON.

P prompt tokens, R response tokens, B episodes of an update, N weights of the layers, V x H of the head.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf.batches import Rollout, join, left_pad
from rlhf.config import load_config
from rlhf.decoding import Decoding
from rlhf.engine import (
    Engine,
    build_engine,
    held_memory,
    memory_limit,
    peak_memory,
    seed_everything,
)
from rlhf.experience import build_experience
from rlhf.files import hash_path
from rlhf.models.adapters import add_lora, merged_copy
from rlhf.models.llama import join_weights
from rlhf.models.loading import (
    LoadOptions,
    load_causal_lm,
    load_options,
    load_tokenizer,
    new_reward_model,
    num_parameters,
    trunk,
)
from rlhf.models.roles import Roles, build_roles
from rlhf.models.sharded import shard
from rlhf.ppo import Learner
from rlhf.processes import leave
from rlhf.rewards import build_reward
from rlhf.sampling.policy import Policy, ready_to_sample
from rlhf.sampling.sampler import draw_uniforms, sample
from rlhf.timing import PHASES, Clock, operations_of, seconds_of

NEVER_ENDS = -1  # an EOS that no token is, so that every response has all its tokens
PRODUCT = (1536, 576, 1536)
NUM_PRODUCTS = 100


def products(spec: dict[str, Any]) -> dict[str, float]:
    """Floating-point operations a second of matrix products in float32 and in the engine's number type."""
    engine = _engine(spec)
    rows, inner, columns = PRODUCT if engine.device.type == "cpu" else (8192, 4096, 8192)
    rates = {}
    for dtype in (torch.float32, engine.dtype):
        x = torch.randn(rows, inner, device=engine.device, dtype=dtype)
        weight = torch.randn(columns, inner, device=engine.device, dtype=dtype)
        seconds = seconds_of(engine, functools.partial(_multiply, x, weight))
        rates[str(dtype).removeprefix("torch.")] = 2 * rows * inner * columns * NUM_PRODUCTS / seconds
    return {**rates, "limit": rates[str(engine.dtype).removeprefix("torch.")]}


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> None:
    for _ in range(NUM_PRODUCTS):
        torch.nn.functional.linear(x, weight)


def sampler(spec: dict[str, Any]) -> dict[str, float]:
    """Response tokens a second of our sampler and of Hugging Face generate: the best of three."""
    engine = _engine(spec)
    model = load_causal_lm(spec["model"]["path"], _options(spec, engine))
    prompts, decoding = _prompts(spec), Decoding(spec["response_tokens"])
    tokens = torch.tensor(prompts, device=engine.device)

    def ours() -> None:
        uniforms = draw_uniforms(len(prompts), decoding.max_new_tokens, 0)
        with ready_to_sample(model, engine) as ready:
            sample(ready, prompts, decoding, eos_token_id=NEVER_ENDS, pad_token_id=0, uniforms=uniforms)

    def generate() -> None:
        length = {"max_new_tokens": decoding.max_new_tokens, "min_new_tokens": decoding.max_new_tokens}
        settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "use_cache": True, "pad_token_id": 0}
        model.generate(tokens, attention_mask=torch.ones_like(tokens), **length, **settings)

    functions = {"ours": ours, "generate": generate}
    num_tokens = len(prompts) * decoding.max_new_tokens
    return {name: num_tokens / seconds_of(engine, function) for name, function in functions.items()}


def shared_rollout(spec: dict[str, Any]) -> dict[str, float]:
    """Seconds of a rollout, and of making its weights whole, by one of several processes under DeepSpeed: the
    least of three.
    """
    engine = _engine({**spec, "adapter": "none"})
    options = load_options(_Settings(spec["model"]), engine, trained=True, sharded=True)
    model = load_causal_lm(spec["model"]["path"], options)
    shard(model, engine, trained=True, copied=True)
    join_weights(trunk(model))
    prompts, decoding = _prompts(spec), Decoding(spec["response_tokens"])
    uniforms = draw_uniforms(len(prompts), decoding.max_new_tokens, 0)
    found = []
    for _ in range(4):
        clock = Clock(engine)
        engine.processes.all_of(None)
        with contextlib.ExitStack() as stack:
            ready = clock.run("score", stack.enter_context, ready_to_sample(model, engine))
            mine = slice(engine.processes.rank, None, engine.processes.count)
            more = {"eos_token_id": NEVER_ENDS, "pad_token_id": 0, "uniforms": uniforms[mine]}
            clock.run("sample", sample, ready, prompts[mine], decoding, **more)
        found.append((sum(clock.seconds.values()), clock.seconds["score"]))
    whole, ready_in = min(found[1:])
    leave()
    return {"seconds": whole, "ready_in": ready_in}


def prepare(spec: dict[str, Any]) -> dict[str, float]:
    """Write a random reward model as stage=rm leaves one: an adapter on the policy's weights, and merged."""
    seed_everything(1)
    base, folder = spec["model"]["path"], Path(spec["folder"])
    settings = load_config("rm", ["adapter=lora", "data=toy"]).adapter
    model = add_lora(new_reward_model(base, LoadOptions(attention=None)), settings, task="SEQ_CLS")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(str(folder / "adapter"))
    merged_copy(base, folder / "adapter", task="SEQ_CLS").save_pretrained(folder / "model")
    load_tokenizer(base).save_pretrained(folder / "model")
    record = {"parents": [{"key": "base", "path": base, "sha256": hash_path(Path(base))}]}
    (folder / "stage.json").write_text(json.dumps(record), encoding="utf-8")
    return {}


def ppo(spec: dict[str, Any]) -> dict[str, Any]:
    """Episodes a second, seconds of each phase, operations a second and peak memory of all processes
    together; and what the first of them holds after each update.
    """
    config = _ppo_config(spec)
    seed_everything(config.seed)
    engine = _engine(spec)
    roles = build_roles(config, engine)
    reward = build_reward(config, engine, roles)
    learner = Learner(roles.actor_critic, engine, config)
    prompts = _prompts(spec, updates=spec["updates"])
    memory: list[float] = []
    clock, tokens, started = Clock(engine), 0, time.perf_counter()
    for step in range(1, spec["updates"] + 1):
        batch = prompts[(step - 1) * config.batch_size : step * config.batch_size]
        rollout = clock.run("sample", _rollout, roles, batch, spec, seed=step)
        scores = torch.tensor(clock.run("score", reward.score_tokens, rollout.sequences()))
        coef = config.kl.coef
        first = learner.first_step(rollout, step=step)
        learned = clock.seconds["learn"]
        vars(first)["values"] = functools.partial(clock.run, "learn", first.values)
        experience = clock.run(
            "experience", build_experience, roles, rollout, scores, config=config, kl_coef=coef, passes=first
        )
        clock.seconds["experience"] -= clock.seconds["learn"] - learned  # the critic learned meanwhile
        clock.run("learn", learner.update, experience, step=step, first=first)
        tokens += int(rollout.attention_mask.sum())
        memory.append(held_memory(spec["engine"]["device"]) / 2**30)
    whole = time.perf_counter() - started
    seconds = clock.seconds
    peak = sum(engine.processes.all_of(peak_memory(spec["engine"]["device"]))) / 2**30
    operations = operations_of(engine, functools.partial(learner.update, experience, step=step))
    leave()
    return {
        "episodes_per_s": spec["updates"] * config.batch_size / whole,
        "seconds": {**seconds, "other": whole - sum(seconds.values())},
        "flops": _rates(roles, spec, tokens, seconds, first.kept_share()),
        "tokens_per_s": {
            "score": tokens * 3 / (seconds["score"] + seconds["experience"]),
            "learn": tokens * 2 * config.epochs / seconds["learn"],
        },
        "one_trunk": roles.actor_critic.policy is roles.actor_critic.critic,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "memory_gib": memory,
        "peak_memory_gib": peak,
        "devices": 1 if engine.device.type == "cpu" else engine.processes.count,
        "operations": operations,
    }


def passes(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens learned from a second, and peak memory, with passes of `engine.tokens_per_pass` tokens."""
    config = _ppo_config(spec)
    seed_everything(config.seed)
    engine = _engine(spec)
    room = memory_limit(spec["engine"]["device"])
    try:
        roles = build_roles(config, engine)
        learner = Learner(roles.actor_critic, engine, config)
        prompts = left_pad(_prompts(spec), 0, engine.device)
        responses = _prompts({**spec, "prompt_tokens": spec["response_tokens"]})
        rollout = join(prompts, responses, 0)
        scores = torch.randn(len(responses), device=engine.device)
        experience = build_experience(roles, rollout, scores, config=config, kl_coef=config.kl.coef)
        learner.minibatch(experience)
        clock = Clock(engine)
        clock.run("learn", learner.minibatch, experience)
    except torch.OutOfMemoryError:
        return {"fits": False}
    tokens = rollout.attention_mask.numel()
    peak = peak_memory(spec["engine"]["device"]) / 2**30
    rate = 2 * tokens / clock.seconds["learn"]
    return {"fits": True, "tokens_per_s": rate, "peak_memory_gib": peak, "memory_gib": room}


def _rates(
    roles: Roles, spec: dict[str, Any], tokens: int, seconds: dict[str, float], kept: float
) -> dict[str, float]:
    """Floating-point operations a second of each phase.

    Each weight and token takes 2 forward, 2 more for the gradient of the input, 2 more for that of a trained
    weight. Attention, adapters and the optimizer are not counted. `kept`: the share of an update's tokens
    whose first forward pass of the policy, in `experience`, serves `learn` too.
    """
    policy = roles.actor_critic.policy
    layers = sum(_weights(module) for name, module in trunk(policy).named_modules() if "lora_" not in name)
    head = policy.config.vocab_size * policy.config.hidden_size
    answered = spec["updates"] * spec["batch_size"] * spec["response_tokens"]
    backward = 3 if spec["adapter"] == "none" else 2
    work = {
        "sample": 2 * layers * tokens + 2 * head * answered,
        "score": 2 * layers * tokens,
        "experience": 4 * layers * tokens + 4 * head * answered,
        "learn": backward * spec["epochs"] * (4 * layers * tokens + 2 * head * answered)
        - kept * (2 * layers * tokens + 2 * head * answered),
    }
    rates = {name: work[name] / seconds[name] for name in PHASES}
    return {**rates, "whole": sum(work.values()) / sum(seconds.values())}


def _weights(module: Any) -> int:
    """Weights of a linear layer, whatever it packs them into; 0 for any other module."""
    if isinstance(module, Conv1D):
        return module.nx * module.nf
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else 0


def _rollout(roles: Roles, prompts: list[list[int]], spec: dict[str, Any], *, seed: int) -> Rollout:
    codec: Any = SimpleNamespace(eos_token_id=NEVER_ENDS, pad_token_id=0)
    policy = Policy(roles.actor_critic.policy, codec, roles.engine)
    return policy.go_on(prompts, Decoding(spec["response_tokens"]), seed=seed)


def _ppo_config(spec: dict[str, Any]) -> Any:
    words = [f"adapter={spec['adapter']}", "data=toy", "tracker=none", "model=tiny", "minibatches=1"]
    config = load_config("ppo", words)
    model = str(Path(spec["folder"]) / "model")
    config.policy, config.critic, config.reward = (
        spec["model"]["path"],
        model,
        {"kind": "model", "path": model},
    )
    config.batch_size, config.epochs, config.updates = spec["batch_size"], spec["epochs"], spec["updates"]
    config.learning_rate = config.critic_learning_rate = 1e-6
    if spec["adapter"] != "none" and spec["lora"]["r"]:
        for key in ("r", "alpha", "target_modules"):
            setattr(config.adapter, key, spec["lora"][key])
    config.model.attention = spec["model"]["attention"]
    return config


def _engine(spec: dict[str, Any]) -> Engine:
    full_weights = spec.get("adapter") == "none"
    return build_engine(
        _Settings(spec["engine"]), num_parameters(spec["model"]["path"]), full_weights=full_weights
    )


def _options(spec: dict[str, Any], engine: Engine) -> LoadOptions:
    return load_options(_Settings(spec["model"]), engine, trained=False)


class _Settings:
    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def _prompts(spec: dict[str, Any], *, updates: int = 1) -> list[list[int]]:
    """Prompts of random tokens, none of them special."""
    tokenizer = load_tokenizer(spec["model"]["path"])
    special = set(tokenizer.all_special_ids)
    usual = torch.tensor([token for token in range(min(len(tokenizer), 40000)) if token not in special])
    chosen = torch.randint(
        len(usual),
        (updates * spec["batch_size"], spec["prompt_tokens"]),
        generator=torch.Generator().manual_seed(0),
    )
    return usual[chosen].tolist()


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "products": products,
    "sampler": sampler,
    "rollout": shared_rollout,
    "prepare": prepare,
    "ppo": ppo,
    "passes": passes,
}

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(PARTS[given["part"]](given)), flush=True)
    if "deepspeed" in sys.modules:
        os._exit(0)  # with its groups of processes a process may abort at its end
