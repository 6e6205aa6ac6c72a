"""stage=evaluate: base, SFT, its decoding variants, best-of-n and PPO on unseen prompts, scored by proxy
and gold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.checkpoint import library_versions
from rlhf.decoding import decoding_in
from rlhf.engine import build_engine, seed_everything
from rlhf.evaluation.compare import Scored, common_length, compare, equals_oracle, summarise, verdict
from rlhf.evaluation.exposure import Instruments, load_evidence, measure, save_evidence, why_no_mauve
from rlhf.evaluation.measures import LEAST_ROWS
from rlhf.evaluation.report import COLUMNS, OVERLAPS, notes_in_words, print_table, table_rows, write_report
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
from rlhf.parents import Parent, failed_checks, find_parent, lineage, model_paths
from rlhf.processes import by_main
from rlhf.records import PromptRecord
from rlhf.reference_scorers import ReferenceScorer
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
    oracle, notes = find_oracle(config, systems)
    stage.begin()

    policies = functools.lru_cache(maxsize=1)(functools.partial(load_policy, config=config, engine=engine))
    generations = sample_all(stage, systems, prompts, policies, proxy)
    policies.cache_clear()
    scored = score_all(config, generations, prompts, load_policy(reference, config, engine), (proxy, gold))
    judge = None if oracle is None else load_policy(oracle, config, engine, key="oracle")
    instruments = Instruments(judge, gold, config.prefix_lengths or [], config.batch_size, config.seed)
    scored = measure_all(stage, scored, prompts, policies, instruments)
    options = {"num_bootstrap": config.bootstrap, "seed": config.seed}
    entries = {each.system.name: summarise(each, reference=reference, **options) for each in scored}
    report: dict[str, Any] = {
        "name": config.name,
        "num_prompts": len(prompts),
        "baseline": baseline,
        "reference": reference,
        "proxy": proxy and proxy.name,
        "gold": gold and gold.name,
        "preferences_simulated": (config.gold or {}).get("kind") == "classifier" and config.proxy is not None,
        "oracle": oracle,
        "notes": [*notes, *notes_on(scored, entries, prompts)],
        "failed_checks": checks_failed_before(parents),
        "excess_error_length": common_length(list(entries.values())),
        "systems": entries,
        **compare(scored, baseline, **options),
        "commands": commands(stage, parents),
    }
    report["verdict"] = verdict(report)
    report["versions"] = library_versions()
    ppo = next((s.path for s in systems if s.name == "ppo"), systems[-1].path)
    write_report(
        folder.path, report, scored, curves=Path(ppo).parent / "metrics.jsonl", num_samples=config.num_samples
    )
    results = {name: {k: v for k, v in e.items() if k != "exposure"} for name, e in entries.items()}
    folder.finish("report", parents=parents, checks=[], results=results, **stage.cost(), **stage.facts)
    folder.drop_states()
    print_table([list(COLUMNS), *table_rows(report)])
    for note in notes_in_words(report):
        print(note)
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


def find_oracle(config: Any, systems: Sequence[System]) -> tuple[str | None, list[str]]:
    """The oracle's folder or hub name, and why it is left out, altogether or for some systems.

    One that is the base model by default can be done without; one given by name is refused where no system
    has its tokenizer.
    """
    if config.oracle is None:
        return None, []
    by_default = config.oracle == config.model.path
    try:
        path = resolved(config.oracle, config.model)
        load_codec(path, config)
    except ValueError as error:
        if by_default:
            return None, [f"no oracle: {error}"]
        raise ValueError(f"oracle={config.oracle}: {error}") from error
    others = [s.name for s in systems if not same_tokenizer(s.path, path, config.model)]
    if len(others) < len(systems):
        left_out = [f"not measured by the oracle, which has another tokenizer: {', '.join(others)}"]
        return path, left_out if others else []
    if by_default:
        return None, [f"no oracle: no system has the tokenizer of {path}; give another with oracle="]
    raise ValueError(
        f"oracle={config.oracle}: no system has its tokenizer, and distributions over other tokens cannot be "
        "compared; give a model that has, or oracle=null"
    )


def notes_on(scored: Sequence[Scored], entries: dict[str, Any], prompts: Sequence[PromptRecord]) -> list[str]:
    """Why measures of exposure bias are missing."""
    notes = []
    missing = sum(prompt.reference is None for prompt in prompts)
    measured = any(each.evidence is not None for each in scored)
    if measured and len(prompts) - missing < LEAST_ROWS:
        notes.append(
            f"{len(prompts) - missing} prompts have a reference, fewer than {LEAST_ROWS}: no excess error "
            "and no quality after prefixes"
        )
    elif measured and missing:
        notes.append(
            f"{missing} of {len(prompts)} prompts have no reference: left out of excess error, quality after "
            "prefixes and MAUVE"
        )
    no_mauve = why_no_mauve(len(prompts) - missing)
    if no_mauve and any(each.evidence and each.evidence.logprobs for each in scored):
        notes.append(f"no MAUVE: {no_mauve}")
    equal = [each.system.name for each in scored if equals_oracle(each, entries[each.system.name])]
    if equal:
        notes.append(f"no excess error, being the oracle itself (0 / 0): {', '.join(equal)}")
    return notes


def checks_failed_before(parents: Sequence[Parent]) -> list[str]:
    """The checks that the stages failed that made what is compared, and what it is scored by."""
    records = {parent.key: lineage([parent])[-1:] for parent in parents}
    return [
        f"{key}: {line}" for key, own in records.items() for record in own for line in failed_checks(record)
    ]


def sample_all(
    stage: Stage,
    systems: list[System],
    prompts: Any,
    policies: Callable[[str], Policy],
    proxy: Any,
) -> dict[System, list[Generation]]:
    """The generations of every system; those that an interrupted run finished are read back."""
    config, store = stage.config, stage.folder.path / "state"
    store.mkdir(exist_ok=True)
    bar = progress(len(systems) * len(prompts), unit="response", description="evaluate")
    generations = {}
    for system in systems:
        path = store / f"{system.name}.jsonl"
        if not path.exists():
            found = generate(
                system,
                policies(system.path),
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
    config: Any,
    generations: dict[System, list[Generation]],
    records: Sequence[PromptRecord],
    reference: Policy,
    scorers: Sequence[Any],
) -> list[Scored]:
    """Proxy and gold scores of all generations, their log-ratios to the reference policy, and how near they
    are to the references.
    """
    results = []
    bar = progress(len(generations), unit="system", description="score")
    known = [i for i, record in enumerate(records) if (record.reference or "").strip()]
    overlaps = [ReferenceScorer(kind, [records[i] for i in known]) for kind in (OVERLAPS if known else ())]
    for system, rows in generations.items():
        prompts, texts = [g.prompt for g in rows], [g.response for g in rows]
        scores = [None if s is None else checked_scores(s, prompts, texts).tolist() for s in scorers]
        ratios = None
        if same_tokenizer(system.path, reference.codec.tokenizer.name_or_path, config.model):
            logprobs = reference_logprobs(reference, rows, temperature=config.decoding.temperature)
            ratios = [g.logprob - logprob for g, logprob in zip(rows, logprobs, strict=True)]
        answered = [prompts[i] for i in known], [texts[i] for i in known]
        overlap = {scorer.name: scorer(*answered) for scorer in overlaps}
        results.append(Scored(system, rows, scores[0], scores[1], ratios, overlap=overlap))
        bar.update()
    bar.close()
    return results


def measure_all(
    stage: Stage,
    scored: Sequence[Scored],
    prompts: Sequence[PromptRecord],
    policies: Callable[[str], Policy],
    instruments: Instruments,
) -> list[Scored]:
    """The systems with the evidence of their exposure bias; that of an interrupted run is read back."""
    oracle, found = instruments.oracle, []
    if oracle is None and not instruments.prefix_lengths:
        return list(scored)
    bar = progress(len(scored), unit="system", description="exposure bias")
    paths = [stage.folder.path / "state" / f"{each.system.name}.exposure.json" for each in scored]
    due = missing(paths)
    gold_kl: dict[str, Any] = {}  # of a policy, whatever its decoding
    for each, path in zip(scored, paths, strict=True):
        system = each.system
        if path in due:
            fits = oracle is not None and same_tokenizer(
                system.path, oracle.codec.tokenizer.name_or_path, stage.config.model
            )
            own = instruments if fits else replace(instruments, oracle=None)
            policy, known = policies(system.path), gold_kl.get(system.path)
            save_evidence(path, measure(system, policy, each.generations, prompts, own, gold_kl=known))
        evidence = load_evidence(path)
        gold_kl[system.path] = evidence.gold_kl
        found.append(replace(each, evidence=evidence))
        bar.update()
    bar.close()
    return found


@by_main  # asked together, before any process writes one
def missing(paths: Sequence[Path]) -> list[Path]:
    """Those that do not exist."""
    return [path for path in paths if not path.exists()]


def load_policy(path: str, config: Any, engine: Any, *, key: str = "systems") -> Policy:
    """A frozen policy from a checkpoint folder or hub name."""
    model = load_causal_lm(path, load_options(config.model, engine, trained=False), key=key)
    return Policy(model, load_codec(path, config), engine)
