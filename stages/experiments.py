"""stage=exposure and stage=overoptimization: many runs from the same data, and their comparison.

The cures for exposure bias, trained and decoded; PPO with several KL coefficients, its checkpoints, and
best-of-n. Every part is a stage like any other, a process of its own; that of a method lies in
<runs>/<name>/<method>/<stage>.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.config import decoding_changes, load_config, split_overrides
from rlhf.discriminator_settings import KIND
from rlhf.gates import GATE_STATUS
from rlhf.hints import hint
from rlhf.parents import failed_checks, inputs_of, replaced_parent
from rlhf.settings import ComparisonConfig
from stages import COMMAND_VARIABLE
from stages.all import ENTRY_POINT, changed_keys, check_unchanged, gates_of, run_child, stage_folder
from stages.common import check_data, without_run_mode
from stages.launch import place_of

OWN_KEYS = tuple(ComparisonConfig.__dataclass_fields__)
# Keys of the stages that it sets, and what to give instead.
INSTEAD = {
    "seed": "give seeds='[1, 2]'",
    "systems": "give methods.<name>=, decodings=, kl_coefs= and best_of=",
    "baseline": "it is sft",
}
METHOD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
GIVEN = ("name", "runs", "seed", "policy", "overwrite", "resume")  # what the comparison sets, or all have
NUM_KEPT = 5  # policies at most of a run with one of kl_coefs, the last one among them
Words = dict[str, list[str]]


@dataclass(frozen=True)
class Step:
    """A stage to run: its words, the configuration that they mean, and whether it is finished already."""

    label: str
    stage: str
    words: list[str]
    config: Any
    finished: bool = False

    @property
    def folder(self) -> Path:
        """Where its results lie."""
        return stage_folder(self.stage, self.config)


def plan(program: str, overrides: list[str]) -> tuple[Path, list[list[Step]]]:
    """Return where the comparison of a `program` ("exposure" or "overoptimization") goes, and the steps of
    each seed in order, all of their settings checked.

    Raises ValueError, naming the step, for what one of them refuses.
    """
    for word in overrides:
        key = word.partition("=")[0].split(".")[-1]
        if key in INSTEAD:
            raise ValueError(f"{word}: the comparison says that itself; {INSTEAD[key]}")
    own = [word for word in overrides if word.partition("=")[0].partition(".")[0] in OWN_KEYS]
    comparison = load_config(program, own)
    words = split_overrides([word for word in overrides if word not in own])
    seeds = comparison.seeds
    _check_methods(program, comparison)
    common = load_config("sft", words["sft"])
    names = {seed: common.name if len(seeds) == 1 else f"{common.name}/seed_{seed}" for seed in seeds}
    steps = [list(_steps(program, comparison, words, seed, name)) for seed, name in names.items()]
    return Path(common.runs) / common.name / program, [_marked(each) for each in steps]


def _check_methods(program: str, comparison: ComparisonConfig) -> None:
    known = load_config(program, []).methods
    if len(set(comparison.kl_coefs)) < len(comparison.kl_coefs):
        raise ValueError(f"kl_coefs={comparison.kl_coefs}: give each once")
    for method, text in comparison.methods.items():
        taken = {"base", "sft", "best_of", *(f"sft_{decoding}" for decoding in comparison.decodings)}
        taken |= {f"kl_{coef}" for coef in comparison.kl_coefs}
        if not METHOD_NAME.fullmatch(str(method)) or method in taken:
            raise ValueError(
                f"methods.{method}: a name of its own is expected, of letters, digits, - and _; taken are "
                f"{', '.join(sorted(taken))}"
            )
        if text is None and method not in known:
            raise ValueError(f"methods.{method}=null: {hint(method, known)}methods are {', '.join(known)}")


def _steps(program: str, comparison: ComparisonConfig, words: Words, seed: int, name: str) -> Iterator[Step]:
    """The SFT model, the reward model where the data has something to train it on, the methods, evaluate."""
    place = [f"name={name}", f"seed={seed}"]
    sft, collect, rm = (_step(stage, stage, [*words[stage], *place]) for stage in ("sft", "collect", "rm"))
    data = sft.config.data
    needed = [rm] if data.ranked.train is not None else [collect, rm]
    has_reward_model = data.ranked.train is not None or data.labelled.labeller is not None
    yield from [sft, *(needed if has_reward_model else [])]
    systems: dict[str, Any] = {"sft": str(sft.folder / "model")}
    if program == "exposure":
        systems = {"base": sft.config.policy, **systems}
    if comparison.best_of:
        systems["best_of"] = {"path": systems["sft"], "best_of": comparison.best_of}
    for decoding in comparison.decodings:
        systems[f"sft_{decoding}"] = {"path": systems["sft"], "decoding": decoding_changes(decoding)}
    swept = {f"kl_{coef}": f"stage=ppo kl.coef={coef}" for coef in comparison.kl_coefs}
    for method, text in {**comparison.methods, **swept}.items():
        if text is None:
            continue
        place = [f"name={name}/{method}", f"seed={seed}"]
        step = _method(method, text, words, place, sft, rm if has_reward_model else None)
        if method in swept and step.config.keep_every is None:
            every = -(-step.config.updates // NUM_KEPT)
            step = _step(step.label, "ppo", [*step.words, f"keep_every={every}"])
        yield step
        checkpoints = {"checkpoints": str(step.folder)}
        systems[method] = checkpoints if method in swept else str(step.folder / "model")
    own = [f"name={name}", f"seed={seed}", f"systems={json.dumps(systems)}", "baseline=sft", "force=true"]
    yield _evaluation(program, [*words["evaluate"], *own], None if has_reward_model else rm)


def _evaluation(program: str, words: list[str], lacking: Step | None) -> Step:
    """The comparison of all systems; `lacking` is the reward model that nothing trains."""
    step = _step("evaluate", "evaluate", words)
    config, proxy, gold = step.config, step.config.proxy or {}, step.config.gold
    no_proxy = lacking is not None and proxy.get("path") == str(lacking.folder / "model")
    no_gold = gold is None or (gold["kind"] == "classifier" and gold.get("train") is None)
    if no_proxy and no_gold:
        raise ValueError(
            f"evaluate: data={config.data.name} has nothing to train a reward model or gold scorer on: give "
            "one to judge by, for instance gold='{kind: rouge_l}'"
        )
    if program == "exposure":
        measures = [f"oracle={config.model.path}", "prefix_lengths=[4, 16]"]
        return _step("evaluate", "evaluate", [*measures, *words])
    # beside the chain's own evaluation, with the scorers of the run
    scorers = [f"{key}={json.dumps(getattr(config, key))}" for key in ("proxy", "gold")]
    return _step("evaluate", "evaluate", [*words, *scorers, f"name={config.name}/{program}"])


def _method(  # noqa: PLR0913 (a method, the words of all stages, and what it stands on)
    method: str, text: Any, words: Words, place: list[str], sft: Step, rm: Step | None
) -> Step:
    """The stage of a method: sft anew, or ppo from the SFT model, where need be with the reward model."""
    own = shlex.split(text) if isinstance(text, str) else []
    stages = [word.partition("=")[2] for word in own if word.startswith("stage=")]
    if stages not in (["sft"], ["ppo"]):
        raise ValueError(f"methods.{method}={text}: 'stage=sft ...' or 'stage=ppo ...' is expected")
    own = [word for word in own if not word.startswith("stage=")]
    for word in own:
        if word.partition("=")[0] in GIVEN:
            raise ValueError(f"methods.{method}: {word}: the comparison says that itself; leave it out")
    if stages == ["sft"]:
        return _step(f"methods.{method}", "sft", [*words["sft"], *place, *own])
    reward_model = "null" if rm is None else str(rm.folder / "model")
    paths = [f"policy={sft.folder / 'model'}", f"critic={reward_model}"]
    step = _step(f"methods.{method}", "ppo", [*words["ppo"], *place, *paths, *own])
    if step.config.reward["kind"] == KIND and not any(word.startswith("critic=") for word in own):
        return _step(step.label, "ppo", [*step.words, "critic=null"])
    if step.config.reward["kind"] != "model":
        return step
    if rm is None:
        raise ValueError(
            f"methods.{method} needs a reward model, and data={sft.config.data.name} has neither ranked "
            f"lists nor labelled texts to train one: give data.ranked.train, or methods.{method}=null"
        )
    return _step(step.label, "ppo", [*words["ppo"], *place, *paths, f"reward.path={reward_model}", *own])


def _step(label: str, stage: str, words: list[str]) -> Step:
    last: dict[str, str] = {}  # of each key the last word, which counts, in its place
    for word in reversed(words):
        last.setdefault(word.partition("=")[0], word)
    words = [*last.values()][::-1]
    try:
        config = load_config(stage, words)
        place_of(config)
        return Step(label, stage, words, config)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error


def _marked(steps: Sequence[Step]) -> list[Step]:
    """The steps, each marked finished or not; one that stands on what is, or has been, replaced is run again,
    and so is the evaluation of other systems than are compared now.

    Raises ValueError for a finished one where neither resume nor overwrite is set, and for one whose settings
    have changed.
    """
    marked: list[Step] = []
    for step in steps:
        due = [each for each in marked if not each.finished]
        below = due if step.stage == "evaluate" else [each for each in due if each.label == each.stage]
        again = replace(step, words=[*without_run_mode(step.words), "overwrite=true"])
        place = step.folder / "stage.json"
        record = json.loads(place.read_text(encoding="utf-8")) if place.exists() else None
        if step.config.overwrite or not step.folder.exists():
            marked.append(step)
        elif record is not None and not step.config.resume:
            raise ValueError(
                f"{step.folder} is finished: resume=true keeps it, overwrite=true replaces it, "
                "name=... starts another run"
            )
        elif (below and step.stage != "sft") or (record is not None and replaced_parent(record)):
            marked.append(again)
        elif record is None:
            marked.append(step)
        elif step.stage == "evaluate" and (_other_systems(step) or _other_gate(step)):
            marked.append(again)
        else:
            check_unchanged(step.config, step.folder)
            marked.append(replace(step, finished=True))
    return marked


def _other_gate(step: Step) -> bool:
    return step.config.gate is not None and gates_of(step.config, step.folder) is None


def _other_systems(step: Step) -> bool:
    changed = changed_keys(step.config, step.folder)
    return bool(changed) and all(key.startswith("systems") for key in changed)


def run(program: str, overrides: list[str]) -> int:
    """Run what is due of every seed and write the comparison; return the first exit status that is not 0."""
    folder, seeds = plan(program, overrides)
    command = ["./launch.sh", f"stage={program}", *without_run_mode(overrides)]
    steps = [step for steps in seeds for step in steps]
    check_data((step.stage, step.config) for step in steps if not step.finished)
    not_passed = 0
    for number, step in enumerate(steps, start=1):
        done = "finished in " if step.finished else ""
        print(f"[{number}/{len(steps)}] {step.label}: {done}{step.folder}", flush=True)
        if step.finished:
            if step.stage == "evaluate" and step.config.gate is not None:
                not_passed = max(not_passed, gates_of(step.config, step.folder) or 0)
            continue
        started = time.monotonic()
        words = [f"stage={step.stage}", *step.words]
        own = shlex.join(["./launch.sh", *without_run_mode(words)])
        status = run_child([sys.executable, str(ENTRY_POINT), *words], {COMMAND_VARIABLE: own})
        if status not in (0, GATE_STATUS):
            resumed = shlex.join([*command, "resume=true"])
            print(f"{step.label} ended with status {status}; go on with: {resumed}", file=sys.stderr)
            return status
        if unfit := why_unfit(step, steps[number:]):
            resumed = shlex.join([*command, "resume=true", "force=true"])
            print(f"{unfit}. Mend it, or go on as it is: {resumed}", file=sys.stderr)
            return 1
        not_passed = max(not_passed, status)
        print(f"  {(time.monotonic() - started) / 60:.1f} min", flush=True)
    from rlhf.evaluation.exposure_report import FIRST_COLUMNS, comparison_table, write_comparison
    from rlhf.evaluation.tables import curves_table, print_table

    evaluated = {each[-1].config.seed: each[-1].folder for each in seeds}
    report = write_comparison(folder, evaluated, [step.folder for step in steps], shlex.join(command))
    print_table([row[: len(FIRST_COLUMNS)] for row in comparison_table(report)])
    if report["overoptimization"]:
        print_table(curves_table(report))
    print(f"report: {folder / 'report.html'}")
    return not_passed


def why_unfit(step: Step, later: Sequence[Step]) -> str | None:
    """Why a method would refuse to stand on a step just finished; None where none would."""
    failed = failed_checks(json.loads((step.folder / "stage.json").read_text(encoding="utf-8")))
    for each in later if failed and not step.config.force else ():
        inputs = [] if each.stage == "evaluate" else inputs_of(each.config)
        if any(Path(path).parent == step.folder for _, path, _ in inputs):
            return f"{each.label} stands on {step.label}, which failed its checks: {'; '.join(failed)}"
    return None


def show(program: str, overrides: list[str]) -> None:
    """Print the command of every step, and of what is finished where it lies; run nothing."""
    folder, seeds = plan(program, overrides)
    for step in (step for steps in seeds for step in steps):
        done = f"  # finished in {step.folder}" if step.finished else ""
        print(shlex.join(["./launch.sh", f"stage={step.stage}", *step.words]) + done)
    print(f"# the comparison: {folder}")
