"""stage=evaluate: base, SFT, its decoding variants, best-of-n and PPO on unseen prompts, scored by proxy
and gold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.checkpoint import library_versions
from rlhf.decoding import decoding_in
from rlhf.engine import build_engine, seed_everything
from rlhf.evaluation.compare import (
    Scored,
    common_length,
    compare,
    equals_oracle,
    main_system,
    summarise,
    verdict,
)
from rlhf.evaluation.exposure import why_no_mauve
from rlhf.evaluation.gates import outcome
from rlhf.evaluation.hacking import highest, signals, warnings
from rlhf.evaluation.judge import LanguageModelJudge
from rlhf.evaluation.measures import LEAST_ROWS
from rlhf.evaluation.origins import lineage_table
from rlhf.evaluation.overoptimization import curves
from rlhf.evaluation.overoptimization import warnings as overoptimized
from rlhf.evaluation.page import write_page
from rlhf.evaluation.passes import Evaluation, judge_all, measure_all, sample_all, score_all
from rlhf.evaluation.report import write_report
from rlhf.evaluation.store import store_in
from rlhf.evaluation.systems import System, build_systems, check_choosers, saved_responses
from rlhf.evaluation.tables import COLUMNS, notes_in_words, print_table, table_rows
from rlhf.gates import GATE_STATUS, parse_gates
from rlhf.models.loading import load_codec, num_parameters, same_tokenizer
from rlhf.parents import (
    Parent,
    failed_checks,
    find_parent,
    lineage,
    lineage_by_folder,
    model_paths,
    seen_in_training,
)
from rlhf.records import PromptRecord, different_prompts, prompt_key, prompt_keys
from rlhf.rewards import build_optional_scorer
from stages.common import Stage, resolved


def main(overrides: list[str]) -> int:
    """Write report.json, report.md and plots, and print the table. Returns the exit status."""
    stage = Stage("evaluate", overrides)
    config, folder = stage.config, stage.folder
    systems = build_systems(config.systems, decoding_in(config))
    systems = [s if s.is_saved else with_places(s, config.model) for s in systems]
    parents = stage.find_parents()
    for system in systems:  # a name that leads nowhere is found before the first sample
        if not system.is_saved:
            load_codec(system.path, config)
    seed_everything(config.seed)
    baseline = baseline_of(config, [system.name for system in systems])
    paths = {system.name: system.path for system in systems if not system.is_saved}
    named = config.reference or paths.get(baseline)
    reference = None if named is None else resolved(named, config.model)
    codec_of = reference or next(iter(paths.values()), None) or resolved(config.model.path, config.model)
    prompts, rows = read_prompts(stage)
    engine = build_engine(config.engine, num_parameters(codec_of, config.model))
    engine = replace(engine, evens_out=False)  # the figures are the same for any number of processes
    proxy, gold = (
        build_optional_scorer(key, getattr(config, key), config, engine, rows) for key in ("proxy", "gold")
    )
    if proxy is None and gold is None and config.judge.name == "none":
        raise ValueError(
            "neither proxy nor gold can score, and there is no judge: set one of them, for instance "
            "gold='{kind: function, function: file.py:f}'"
        )
    for key, scorer in (("proxy", proxy), ("gold", gold)):
        for name, path in [] if scorer is None else model_paths(key, getattr(config, key)):
            parents.append(find_parent(name, path, kind="reward_model", force=True))
    overlap = seen_in_training(parents, prompt_keys(prompts))
    check_choosers(systems, proxy)
    store = store_in(config.store)
    judge = None if config.judge.name == "none" else LanguageModelJudge(config.judge, store.folder)
    oracle, notes = find_oracle(config, systems)
    codec, on_bad_row = load_codec(codec_of, config), config.data.on_bad_row
    saved = [system for system in systems if system.is_saved]
    given = {each: saved_responses(each, prompts, codec, on_bad_row=on_bad_row) for each in saved}
    stage.begin(again=True)

    scorers = {"proxy": proxy, "gold": gold}
    evaluation = Evaluation(config, engine, prompts, rows, reference, scorers, store)
    scored = score_all(evaluation, sample_all(evaluation, systems, given))
    judgements, judged = ({}, None) if judge is None else judge_all(judge, scored, baseline)
    scored = measure_all(evaluation, scored, oracle)
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
        "notes": [*notes_on_overlap(overlap), *notes, *notes_on(scored, entries, prompts)],
        "seen_prompts": count_seen(prompts, overlap),
        "overlap": [
            each | {"shared": each["shared"] if each["shared"] is None else len(each["shared"])}
            for each in overlap
        ],
        "failed_checks": checks_failed_before(parents),
        "excess_error_length": common_length(list(entries.values())),
        "systems": entries,
        "judge": judged,
        **compare(scored, baseline, judgements, **options),
        "lineage": lineage_table(lineage_by_folder(parents)),
        "commands": commands(stage, parents),
    }
    report |= signs_of_hacking(report, scored, **options)
    gates = parse_gates(config.gate, list(entries))
    report["gates"] = [vars(outcome(gate, report, scored, **options)) for gate in gates]
    report |= {"verdict": verdict(report), "versions": library_versions()}
    [ppo] = [s.path for s in systems if s.name == main_system(report)]
    write_report(
        folder.path,
        report,
        scored,
        curves=Path(ppo).parent / "metrics.jsonl",
        num_samples=config.num_samples,
    )
    write_page(folder.path / "report.html", report, scored, lineage_by_folder(parents))
    results = {name: {k: v for k, v in e.items() if k != "exposure"} for name, e in entries.items()}
    folder.finish("report", parents=parents, checks=[], results=results, **stage.cost(), **stage.facts)
    print_table([list(COLUMNS), *table_rows(report)])
    for note in notes_in_words(report):
        print(note)
    print(f"{report['verdict']}\nreport: {folder.path / 'report.html'} ({stage.cost_in_words()})")
    return 0 if all(gate["passed"] for gate in report["gates"]) else GATE_STATUS


def with_places(system: System, model: Any) -> System:
    """A system whose paths are folders or hub names."""
    origin = system.origin and resolved(system.origin, model)
    return replace(system, path=resolved(system.path, model), origin=origin)


def baseline_of(config: Any, names: Sequence[str]) -> str:
    """The system that others are compared with; ValueError where it, or one that `gate` names, is none."""
    parse_gates(config.gate, names)
    if config.baseline not in (None, *names):
        raise ValueError(f"baseline={config.baseline}: not one of the systems {', '.join(names)}")
    return config.baseline or ("sft" if "sft" in names else names[0])


def commands(stage: Stage, parents: list[Parent]) -> list[str]:
    """The commands that made what is compared, and this one, in order and each once; a later one may replace
    a result of the first.
    """
    found = [record["command"] for record in lineage(parents) if "command" in record]
    first, *others = dict.fromkeys([*found, stage.facts["command"]])
    return [first, *(f"{command} overwrite=true" for command in others)]


def read_prompts(stage: Stage) -> tuple[list[PromptRecord], list[PromptRecord]]:
    """The evaluation prompts, each once, and all of their rows: several have several references."""
    config = stage.config
    rows = stage.read(config.data.prompts.evaluate, "prompts", "data.prompts.evaluate")
    prompts = different_prompts(rows)[: config.num_prompts]
    asked = {prompt_key(prompt.prompt) for prompt in prompts}
    return prompts, [row for row in rows if prompt_key(row.prompt) in asked]


def signs_of_hacking(report: dict[str, Any], scored: Sequence[Scored], **options: int) -> dict[str, Any]:
    """The curves of `overoptimization`, the `signals` of every system, the `warnings` that follow from both,
    and the responses that the proxy likes `highest`.
    """
    found_curves = curves(report, scored, **options)
    baseline = report["baseline"]
    [base] = [each for each in scored if each.system.name == baseline]
    found = {each.system.name: signals(each, report["systems"][each.system.name], base) for each in scored}
    others = [name for name in found if name != baseline]
    told = {name: warnings(name, found[name], found[baseline], report["differences"]) for name in others}
    for name, line in overoptimized(found_curves).items():
        told.setdefault(name, []).append(line)
    name = main_system(report | {"overoptimization": found_curves})
    [liked] = [highest(each) for each in scored if each.system.name == name]
    return {"overoptimization": found_curves, "signals": found, "warnings": told, "highest": liked}


def count_seen(prompts: Sequence[PromptRecord], overlap: Sequence[dict[str, Any]]) -> int:
    """How many of the prompts were trained on, by any stage."""
    seen = set().union(*(each["shared"] or () for each in overlap))
    return sum(prompt_keys([prompt]) <= seen for prompt in prompts)


def notes_on_overlap(overlap: Sequence[dict[str, Any]]) -> list[str]:
    """What is to be said of evaluation prompts that were trained on."""
    notes = [
        f"trained on: {len(each['shared'])} of these prompts stand in {each['key']} of {each['stage']}"
        for each in overlap
        if each["shared"]
    ]
    unknown = [each["stage"] for each in overlap if each["shared"] is None]
    return notes + [f"not known which prompts were trained on by: {', '.join(unknown)}"] * bool(unknown)


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
    systems = [system for system in systems if not system.is_saved]
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
    if all(entry["kl"] is None for entry in entries.values()):
        notes.append("no KL: reference= names no policy with the systems' tokenizer, nor is the baseline one")
    saved = [each.system.name for each in scored if each.system.is_saved]
    if saved:
        notes.append(
            "responses from elsewhere, of whatever length and decoding, without KL and what the oracle says: "
            f"{', '.join(saved)}"
        )
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
