"""stage=ppo: PPO of the SFT policy against a reward, with a KL penalty to where it started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.checks import print_checks
from rlhf.discriminator_settings import is_adversarial
from rlhf.engine import build_engine, seed_everything
from rlhf.exposure.discriminator import USE, Discriminator
from rlhf.models.adapters import uses_lora
from rlhf.models.loading import load_codec, num_parameters
from rlhf.models.roles import build_roles
from rlhf.ppo_run import PPORun
from rlhf.rewards import build_reward
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
    checks = run.train(stage.state)

    stage.report_cut_prompts(codec)
    model = full_precision(config, folder, roles.actor_critic.policy, base=config.policy, task="CAUSAL_LM")
    model.generation_config.eos_token_id = sorted({codec.eos_token_id, codec.tokenizer.eos_token_id})
    facts = {
        "algorithm": config.algo,
        "updates": config.updates,
        "kl.coef": config.kl.coef,
        "reward": reward.name,
        **{name: f"{value:.3f}" for name, value in run.last.items() if name in ("score", "kl", "length")},
    }
    results = dict(run.last)
    if run.best:
        facts["kept update"] = results["kept_update"] = run.best["step"]
    write_model(folder, model, codec.tokenizer, model_card("PPO policy", config, parents, facts))
    if run.adversary is not None:
        card = model_card("Discriminator", config, parents, facts, use=USE)
        stage.facts["products"] = {"discriminator": run.adversary.save(folder, card)}
    folder.finish("policy", parents=parents, checks=checks, results=results, **stage.cost(), **stage.facts)
    folder.drop_states()
    print_checks(checks[len(run.start_checks) :])
    first = run.first or run.last
    print(
        f"score {first['score']:.2f} -> {run.last['score']:.2f} at KL {run.last['kl']:.2f}; "
        f"model in {folder.model} ({stage.cost_in_words()})"
    )
