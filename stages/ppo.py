"""stage=ppo: PPO of the SFT policy against a reward, with a KL penalty to where it started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf.checkpoint import StageFolder
from rlhf.checks import print_checks
from rlhf.discriminator_settings import is_adversarial
from rlhf.engine import build_engine, seed_everything
from rlhf.exposure.discriminator import USE, Discriminator
from rlhf.files import hash_path
from rlhf.models.adapters import uses_lora
from rlhf.models.loading import load_codec, num_parameters
from rlhf.models.roles import build_roles
from rlhf.models.sharded import give_back
from rlhf.parents import KEPT, Parent
from rlhf.ppo_run import PPORun
from rlhf.rewards import build_reward
from rlhf.settings import PPOConfig
from rlhf.training import full_precision, model_card, write_model
from stages.common import Stage, resolved


def main(overrides: list[str]) -> None:
    """Train `policy` for `updates` rollouts and leave a model folder."""
    stage = Stage("ppo", overrides)
    config, folder = stage.config, stage.folder
    config.policy = resolved(config.policy, config.model)
    parents = stage.find_parents()
    seed_everything(config.seed)
    full_weights = not uses_lora(config.adapter)
    size = num_parameters(config.policy, config.model)
    engine = build_engine(config.engine, size, full_weights=full_weights)
    codec = load_codec(config.policy, config)
    prompts = stage.read(config.data.prompts.ppo, "prompts", "data.prompts.ppo")
    demonstrations: Sequence[Any] = []
    if config.ptx_coef or is_adversarial(config):
        key = "data.demonstrations.train"
        demonstrations = stage.read(config.data.demonstrations.train, "demonstrations", key)
    roles = build_roles(config, engine)
    if not roles.critic_from_reward_model:
        parents = [parent for parent in parents if parent.key != "critic"]
        if config.critic is not None and config.algo == "ppo" and config.critic_trunk == "own":
            print(f"critic: from the policy, as {config.critic} has another tokenizer", flush=True)
    if is_adversarial(config):
        reward = Discriminator(config, codec, roles, demonstrations, prompts)
    else:
        reward = build_reward(config, engine, roles, prompts)
    mixed_in = demonstrations if config.ptx_coef else ()
    run = PPORun(config, codec, roles, reward, prompts, folder, mixed_in)
    stage.begin()

    def write(update: int, name: str) -> None:
        model = policy_of(config, run)
        write_model(folder, model, codec.tokenizer, card("PPO policy", run, parents, update), name=name)
        give_back(model, run.models.policy)

    checks = run.train(stage.state, keep=lambda update: write(update, f"{KEPT}{update}"))
    stage.report_cut_prompts(codec)
    results, update = dict(run.last), int(run.best.get("step", config.updates))
    if run.best:
        results["kept_update"] = update
    write(update, "model")
    stage.facts |= {"update": update, "products": kept_products(folder)}
    if run.adversary is not None:
        text = card("Discriminator", run, parents, update, use=USE)
        stage.facts["products"]["discriminator"] = run.adversary.save(folder, text)
    folder.finish("policy", parents=parents, checks=checks, results=results, **stage.cost(), **stage.facts)
    folder.drop_states()
    print_checks(checks[len(run.start_checks) :])
    first = run.first or run.last
    print(
        f"score {first['score']:.2f} -> {run.last['score']:.2f} at KL {run.last['kl']:.2f}; "
        f"model in {folder.model} ({stage.cost_in_words()})"
    )


def policy_of(config: PPOConfig, run: PPORun) -> Any:
    """What a run has trained so far, in full, to be saved."""
    with torch.random.fork_rng(devices=[]):  # peft draws weights before it reads an adapter's
        model = full_precision(config, run.folder, run.models.policy, base=config.policy, task="CAUSAL_LM")
    model.generation_config.eos_token_id = sorted({run.codec.eos_token_id, run.codec.tokenizer.eos_token_id})
    return model


def card(title: str, run: PPORun, parents: Sequence[Parent], update: int, **more: Any) -> str:
    """The model card of what a run had trained by an update."""
    config, last = run.config, run.last
    facts = {
        "algorithm": config.algo,
        "updates": f"{update} of {config.updates}",
        "kl.coef": config.kl.coef,
        "reward": run.reward.name,
        **{name: f"{last[name]:.3f}" for name in ("score", "kl", "length")},
    }
    return model_card(title, config, parents, facts, **more)


def kept_products(folder: StageFolder) -> dict[str, dict[str, str]]:
    """What stage.json says of the policies that were kept on the way."""
    places = sorted(folder.path.glob(f"{KEPT}*"))
    return {place.name: {"kind": "policy", "sha256": hash_path(place)} for place in places}
