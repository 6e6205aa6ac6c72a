"""sft, collect, rm, ppo and evaluate one after the other, each a process of its own."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rlhf.checkpoint import changed_settings
from rlhf.config import PROJECT_DIR, load_config, resolved_yaml, split_overrides
from rlhf.gates import GATE_STATUS, parse_gates
from rlhf.parents import replaced_parent
from rlhf.specs import runs_in, system_names
from stages import COMMAND_VARIABLE
from stages.common import check_data, without_run_mode
from stages.launch import place_of

Configs = dict[str, Any]
ENTRY_POINT = PROJECT_DIR / "stages" / "__main__.py"


def load_configs(overrides: list[str]) -> Configs:
    """Return the configuration of every stage, so that a mistake is found before the first one runs."""
    configs = {}
    for stage, words in split_overrides(overrides).items():
        try:
            configs[stage] = load_config(stage, words)
            place_of(configs[stage])
        except ValueError as error:
            raise ValueError(f"stage {stage}: {error}") from error
    return configs


def run(configs: Configs, overrides: list[str]) -> tuple[int, str | None]:
    """Run the stages that are due; return the exit status, and the stage that failed, where one did."""
    words = split_overrides(overrides)
    command = ["./launch.sh", "stage=all", *without_run_mode(overrides)]
    skipped, again = reasons_to_skip(configs)
    check_data((stage, config) for stage, config in configs.items() if stage not in skipped)
    minutes: dict[str, float] = {}
    status = 0
    for number, (stage, config) in enumerate(configs.items(), start=1):
        headline = f"[{number}/{len(configs)}] {stage}"
        if stage in skipped:
            print(f"{headline}: skipped, {skipped[stage]}", flush=True)
            if stage == "evaluate" and config.gate is not None:
                status = gates_of(config, stage_folder(stage, config)) or 0
            continue
        print(f"{headline}: {stage_folder(stage, config)}", flush=True)
        start = time.monotonic()
        if stage in again:
            print("  again, as what it stood on is being replaced or its gate is another", flush=True)
            words[stage] = [*without_run_mode(words[stage]), "overwrite=true"]
        child = [sys.executable, str(ENTRY_POINT), f"stage={stage}", *words[stage]]
        status = run_child(child, {COMMAND_VARIABLE: shlex.join(command)})
        minutes[stage] = (time.monotonic() - start) / 60
        if status not in (0, GATE_STATUS):
            interrupted = status in (128 + signal.SIGHUP, 128 + signal.SIGINT, 128 + signal.SIGTERM)
            how = "interrupted" if interrupted else f"failed with status {status}; with its cause mended"
            resumed = shlex.join([*command, "resume=true"])
            print(f"stage {stage} {how}, go on with: {resumed}", file=sys.stderr)
            return status, stage
    _print_end(configs, minutes)
    return status, None


def stage_folder(stage: str, config: Any) -> Path:
    """Return where a stage's results lie."""
    return Path(config.runs) / config.name / stage


def reasons_to_skip(configs: Configs) -> tuple[dict[str, str], set[str]]:
    """Return stages that need not run and why, and finished ones that must run again: those behind a stage
    whose result is being, or has been, replaced.

    Raises ValueError for a finished stage where neither resume nor overwrite is set, for one whose settings
    have changed, and for one that stands on a stage that is not finished.
    """
    again: set[str] = set()
    skipped = {}
    if configs["collect"].data.ranked.train is not None:
        skipped["collect"] = f"data={configs['collect'].data.name} has ranked lists of its own"
    due = {stage: config for stage, config in configs.items() if stage not in skipped}
    missing: list[str] = []
    for stage, config in due.items():
        folder = stage_folder(stage, config)
        if config.overwrite or not (folder / "stage.json").exists():
            missing.append(stage)
            if again:
                again.add(stage)
            continue
        if not config.resume:
            raise ValueError(
                f"{folder} is finished: resume=true keeps it, overwrite=true replaces it, "
                "name=... starts another run"
            )
        replaced = any(folder.with_name(f"{name}.before").exists() for name in missing)
        record = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        if again or replaced or replaced_parent(record):
            again.add(stage)
            continue
        if missing:
            raise ValueError(
                f"{folder} is finished, but {missing[0]} before it is not: overwrite=true runs both again"
            )
        check_unchanged(config, folder)
        if stage == "evaluate" and config.gate is not None and gates_of(config, folder) is None:
            again.add(stage)
            continue
        skipped[stage] = f"finished in {folder}"
    return skipped, again


def run_child(command: list[str], environment: dict[str, str], *, stdout: int | None = None) -> int:
    """Run a command in its own process group, hand signals on to it, and return the status a shell would.

    `environment` is added to this process's; `stdout` as subprocess takes it.
    """
    path = os.pathsep.join(filter(None, [str(PROJECT_DIR), os.environ.get("PYTHONPATH", "")]))
    child = subprocess.Popen(
        command,
        env={**os.environ, **environment, "PYTHONPATH": path},
        start_new_session=True,
        stdout=stdout,
    )
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda given, _: child.send_signal(given)) for number in numbers}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def changed_keys(config: Any, folder: Path) -> list[str]:
    """The keys that a finished stage was run with other values of."""
    saved = folder / "config.yaml"
    changed = changed_settings(saved, resolved_yaml(config)) if saved.exists() else {}
    return [key for key in changed if key != "engine.threads"]


def gates_of(config: Any, folder: Path) -> int | None:
    """The exit status by the gates of a finished evaluation; None where it was asked for others."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    asked = [
        gate.text for gate in parse_gates(config.gate, system_names(config.systems), runs_in(config.systems))
    ]
    told = report.get("gates", [])
    if [gate["gate"] for gate in told] != asked:
        return None
    return 0 if all(gate["passed"] for gate in told) else GATE_STATUS


def check_unchanged(config: Any, folder: Path) -> None:
    """Raise ValueError where a finished stage was run with other settings than these."""
    if changed := changed_keys(config, folder):
        raise ValueError(
            f"{folder} is finished with other settings ({', '.join(changed)}): "
            "overwrite=true runs it again, name=... starts another run"
        )


def _print_end(configs: Configs, minutes: dict[str, float]) -> None:
    for stage, taken in minutes.items():
        print(f"  {stage:<9}{taken:6.1f} min")
    print(f"  {'together':<9}{sum(minutes.values()):6.1f} min")
    print(f"report: {stage_folder('evaluate', configs['evaluate']) / 'report.html'}")
