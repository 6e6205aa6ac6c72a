"""stage=evaluate: base, SFT, its decoding variants, best-of-n and PPO on unseen prompts, scored by proxy
and gold.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.checkpoint import library_versions
from rlhf.decoding import decoding_in
from rlhf.engine import build_engine, seed_everything
from rlhf.evaluation.compare import Scored, compare, summarise, verdict
from rlhf.evaluation.report import print_table, write_report
from rlhf.evaluation.systems import (
    Generation,
    System,
    build_systems,
    check_choosers,
    generate,
    load_generations,
    reference_logprobs,
    save_generations,
)
from rlhf.metrics import progress
from rlhf.models.loading import load_causal_lm, load_codec, load_options, num_parameters, same_tokenizer
from rlhf.parents import Parent, find_parent, lineage, model_paths
from rlhf.rewards import build_scorer, checked_scores
from rlhf.sampling.policy import Policy
from stages.common import Stage, resolved


def main(overrides: list[str]) -> None:
    """Write report.json, report.md and plots, and print the table."""
    stage = Stage("evaluate", overrides)
    config, folder = stage.config, stage.folder
    systems = build_systems(config.systems, decoding_in(config))
    systems = [System(s.name, resolved(s.path, config.model), s.decoding, s.best_of) for s in systems]
    parents = stage.find_parents()
    for system in systems:  # a name that leads nowhere is found before the first sample
        load_codec(system.path, config)
    seed_everything(config.seed)
    baseline = config.baseline or ("sft" if "sft" in config.systems else systems[0].name)
    named = config.reference or next(s.path for s in systems if s.name == baseline)
    reference = resolved(named, config.model)
    prompts = stage.read(
        config.data.prompts.evaluate, "prompts", "data.prompts.evaluate", limit=config.num_prompts
    )
    warn_of_seen_prompts(stage, prompts)
    engine = build_engine(config.engine, num_parameters(reference, config.model))
    engine = replace(engine, evens_out=False)  # the figures are the same for any number of processes
    proxy, gold = (
        optional_scorer(key, getattr(config, key), config, engine, prompts) for key in ("proxy", "gold")
    )
    if proxy is None and gold is None:
        raise ValueError(
            "neither proxy nor gold can score: set one of them, for instance "
            "gold='{kind: function, function: file.py:f}'"
        )
    for key, scorer in (("proxy", proxy), ("gold", gold)):
        for name, path in [] if scorer is None else model_paths(key, getattr(config, key)):
            parents.append(find_parent(name, path, kind="reward_model", force=True))
    check_choosers(systems, proxy)
    stage.begin()

    generations = sample_all(stage, systems, prompts, engine, proxy)
    scored = score_all(config, generations, load_policy(reference, config, engine), proxy, gold)
    options = {"num_bootstrap": config.bootstrap, "seed": config.seed}
    report: dict[str, Any] = {
        "name": config.name,
        "num_prompts": len(prompts),
        "baseline": baseline,
        "reference": reference,
        "proxy": proxy and proxy.name,
        "gold": gold and gold.name,
        "preferences_simulated": (config.gold or {}).get("kind") == "classifier" and config.proxy is not None,
        "systems": {each.system.name: summarise(each, reference=reference, **options) for each in scored},
        **compare(scored, baseline, **options),
        "commands": commands(stage, parents),
    }
    report["verdict"] = verdict(report)
    report["versions"] = library_versions()
    ppo = next((s.path for s in systems if s.name == "ppo"), systems[-1].path)
    write_report(
        folder.path, report, scored, curves=Path(ppo).parent / "metrics.jsonl", num_samples=config.num_samples
    )
    folder.finish(
        "report", parents=parents, checks=[], results=report["systems"], **stage.cost(), **stage.facts
    )
    folder.drop_states()
    print_table(report)
    print(f"{report['verdict']}\nreport: {folder.path / 'report.md'} ({stage.cost_in_words()})")


def commands(stage: Stage, parents: list[Parent]) -> list[str]:
    """The commands that made what is compared, and this one, in order and each once; a later one may replace
    a result of the first.
    """
    found = [record["command"] for record in lineage(parents) if "command" in record]
    first, *others = dict.fromkeys([*found, stage.facts["command"]])
    return [first, *(f"{command} overwrite=true" for command in others)]


def warn_of_seen_prompts(stage: Stage, prompts: Any) -> None:
    """Report evaluation prompts that a training set of this run holds too."""
    data = stage.config.data
    sources = {
        "data.demonstrations.train": (data.demonstrations.train, "demonstrations"),
        "data.prompts.ppo": (data.prompts.ppo, "prompts"),
    }
    for key, (source, kind) in sources.items():
        if source is not None and source != data.prompts.evaluate:
            stage.warn_of_overlap(key, stage.read(source, kind, key), "data.prompts.evaluate", prompts)


def optional_scorer(
    key: str, spec: dict[str, Any] | None, config: Any, engine: Any, prompts: Any
) -> Any | None:
    """The scorer of `proxy` or `gold`; None where it is null, or is this run's own and the run has not made
    it.
    """
    if spec is None or (spec["kind"] == "classifier" and spec.get("train") is None):
        return None
    if spec["kind"] == "model" and spec["path"].startswith(config.runs) and not Path(spec["path"]).exists():
        print(f"no {key} score: {spec['path']} does not exist", flush=True)
        return None
    return build_scorer(key, spec, config, engine, prompts)


def sample_all(
    stage: Stage, systems: list[System], prompts: Any, engine: Any, proxy: Any
) -> dict[System, list[Generation]]:
    """The generations of every system; those that an interrupted run finished are read back."""
    config, store = stage.config, stage.folder.path / "state"
    store.mkdir(exist_ok=True)
    bar = progress(len(systems) * len(prompts), unit="response", description="evaluate")
    generations = {}
    policy, loaded = None, ""
    for system in systems:
        path = store / f"{system.name}.jsonl"
        if not path.exists():
            if policy is None or loaded != system.path:
                policy, loaded = load_policy(system.path, config, engine), system.path
            found = generate(
                system,
                policy,
                prompts,
                proxy=proxy,
                batch_size=config.batch_size,
                seed=config.seed,
                bar=bar,
            )
            save_generations(path, found)
        generations[system] = load_generations(path)
    bar.close()
    return generations


def score_all(
    config: Any, generations: dict[System, list[Generation]], reference: Policy, proxy: Any, gold: Any
) -> list[Scored]:
    """Proxy and gold scores of all generations, and their log-ratios to the reference policy."""
    results = []
    for system, rows in generations.items():
        prompts, texts = [g.prompt for g in rows], [g.response for g in rows]
        scores = [None if s is None else checked_scores(s, prompts, texts).tolist() for s in (proxy, gold)]
        ratios = None
        if same_tokenizer(system.path, reference.codec.tokenizer.name_or_path, config.model):
            logprobs = reference_logprobs(reference, rows, temperature=config.decoding.temperature)
            ratios = [g.logprob - logprob for g, logprob in zip(rows, logprobs, strict=True)]
        results.append(Scored(system, rows, proxy=scores[0], gold=scores[1], log_ratios=ratios))
    return results


def load_policy(path: str, config: Any, engine: Any) -> Policy:
    """A frozen policy from a checkpoint folder or hub name."""
    model = load_causal_lm(path, load_options(config.model, engine, trained=False), key="systems")
    return Policy(model, load_codec(path, config), engine)
