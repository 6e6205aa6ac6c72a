"""Stage folders: what a stage leaves behind, and the state that resuming needs.

    runs/<name>/<stage>/  model/  adapter/  stage.json (written last)  config.yaml  metrics.jsonl
    state/step_N/

Every file and folder appears by rename when it is complete, so a killed run leaves the old one or the new
one. A finished stage that is run again lies in <stage>.before until the new one is finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from rlhf.checks import Check
from rlhf.files import hash_path, new_folder, write_text
from rlhf.parents import Parent
from rlhf.processes import by_main

# Settings that may differ between a run and its continuation: they change no number.
FREE_ON_RESUME = {
    "runs",
    "name",
    "store",
    "gate",
    "resume",
    "overwrite",
    "force",
    "show",
    "tracker",
    "keep_last",
    "log_steps",
    "save_every",
    "num_processes",
    "num_machines",
    "machine_rank",
    "main_address",
    "hostfile",
    "main_port",
}
# What the Trainer's checkpoints are made of, beside trainer_state.json.
TRAINER_FILES = ("*.safetensors", "optimizer.pt", "scheduler.pt", "rng_state*.pth")
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "deepspeed")


class StageFolder:
    """The folder of one stage of one run."""

    def __init__(self, runs: str, name: str, stage: str) -> None:
        self.path = Path(runs) / name / stage
        self.before = self.path.with_name(f"{stage}.before")
        self.stage = stage
        self._lock: Any = None

    @property
    def model(self) -> Path:
        """The complete model folder that others load."""
        return self.path / "model"

    @by_main
    def prepare(self, resolved_config: str, *, overwrite: bool, resume: bool) -> Path | None:
        """Make the folder ready for a run and return the state to resume from, if any.

        Raises ValueError where the stage is finished, was interrupted and nothing was said, or is resumed
        with settings that differ from those it began with.
        """
        self.check_free(overwrite=overwrite, resume=resume)
        state = None if overwrite else self.latest_state()
        if state is not None:
            _check_same_config(self.path / "config.yaml", resolved_config)
        try:
            self._take()
            if (self.path / "stage.json").exists():
                shutil.rmtree(self.before, ignore_errors=True)
                os.replace(self.path, self.before)
                print(f"the result so far is kept in {self.before} until the new one is finished")
            elif state is None and self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.yaml", resolved_config)
        except OSError as error:
            raise ValueError(
                f"cannot write to {self.path} ({error.strerror}); set runs= to another folder"
            ) from error
        return state

    @by_main
    def is_finished_with(self, resolved_config: str) -> bool:
        """Whether the stage is finished; ValueError where it is, with other settings."""
        if not (self.path / "stage.json").exists():
            return False
        _check_same_config(self.path / "config.yaml", resolved_config)
        return True

    def _take(self) -> None:
        """Hold this folder for as long as the process lives; the system lets go of it at a kill."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path.parent / f".{self.stage}.lock").open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(
                f"another process is running stage {self.stage} in {self.path}: "
                "wait for its end, or set name=..."
            ) from error

    def check_free(self, *, overwrite: bool, resume: bool) -> None:
        """Raise ValueError where the stage is finished, or was interrupted, and nothing was said about it, or
        where its folder cannot be written.
        """
        place = next(path for path in (self.path, *self.path.parents) if path.exists())
        if not (place.is_dir() and os.access(place, os.W_OK)):
            raise ValueError(f"cannot write to {place}; set runs= to another folder")
        if overwrite:
            return
        if (self.path / "stage.json").exists():
            raise ValueError(
                f"stage {self.stage} is finished, its result lies in {self.path}; "
                "overwrite=true runs it again, name=... starts another run"
            )
        state = self.latest_state()
        if state is None and (lost := self._lost_state()):
            raise ValueError(
                f"{lost} has lost some of its files ({', '.join(TRAINER_FILES)}), and no other state is "
                "whole: bring them back, or start again with overwrite=true"
            )
        if state is not None and not resume:
            raise ValueError(
                f"stage {self.stage} was interrupted at {state.relative_to(self.path)} ({self.path}); "
                "resume=true goes on from there, overwrite=true starts again"
            )

    def latest_state(self) -> Path | None:
        """The newest complete state: step_N, checkpoint-N of the Trainer, or finished responses."""
        files = sorted((self.path / "state").glob("[!.]*.jsonl"))
        if files:
            return files[-1]
        folders = [
            path
            for path in (self.path / "state").glob("*[-_]*")
            if _step(path) is not None and (path.name.startswith("step_") or _is_whole_checkpoint(path))
        ]
        return max(folders, key=lambda path: _step(path) or 0, default=None)

    def _lost_state(self) -> Path | None:
        """A checkpoint of the Trainer that once was whole."""
        return next((path for path in (self.path / "state").glob("checkpoint-*") if _ended(path)), None)

    def new_state(self, step: int, write: Callable[[Path], object], *, keep_last: int) -> None:
        """Write the state of `step` by `write(folder)`; it becomes state/step_N once that has ended well."""
        new_folder(self.path / "state" / f"step_{step}", write)
        self._drop_old_states(keep_last)

    @by_main
    def _drop_old_states(self, keep_last: int) -> None:
        for left in (self.path / "state").glob(".step_*.tmp"):  # by a kill
            shutil.rmtree(left)
        states = sorted((self.path / "state").glob("step_*"), key=lambda path: _step(path) or 0)
        for old in states[: -max(keep_last, 1)]:
            shutil.rmtree(old)

    @by_main
    def drop_states(self) -> None:
        """Delete what only an interrupted run needs."""
        shutil.rmtree(self.path / "state", ignore_errors=True)

    def finish(
        self, kind: str, *, parents: Sequence[Parent], checks: Sequence[Check], **facts: Any
    ) -> dict[str, Any]:
        """Write stage.json, which marks the stage as finished; `facts` are the stage's own results."""
        record = {
            "stage": self.stage,
            "kind": kind,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "parents": [asdict(parent) for parent in parents],
            "checks": [asdict(check) for check in checks],
            "versions": library_versions(),
            **facts,
        }
        if self.model.exists():
            record["model_sha256"] = hash_path(self.model)
        self._write_record(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return record

    @by_main
    def _write_record(self, text: str) -> None:
        write_text(self.path / "stage.json", text)
        shutil.rmtree(self.before, ignore_errors=True)


def _step(path: Path) -> int | None:
    number = path.name.replace("-", "_").rsplit("_", 1)[-1]
    return int(number) if number.isdigit() and path.name.startswith(("step_", "checkpoint-")) else None


def _check_same_config(path: Path, resolved_config: str) -> None:
    changes = changed_settings(path, resolved_config)
    if changes:
        raise ValueError(
            f"cannot resume {path.parent} with other settings: {', '.join(changes.values())}; "
            "give the old ones, or start again with overwrite=true"
        )


def changed_settings(path: Path, resolved_config: str) -> dict[str, str]:
    """The settings that differ from those in a config.yaml, by key, with their old and new value in words.

    What lies in the run's own folder is the same wherever that folder has been moved to.
    """
    try:
        before = settings_that_count(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} does not hold the settings that the run began with: overwrite=true starts it again"
        ) from error
    now = settings_that_count(resolved_config)
    return {
        key: f"{key} ({before.get(key)} -> {now.get(key)})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }


def settings_that_count(text: str) -> dict[str, Any]:
    """The settings of a resolved configuration that change a result, by full key."""
    tree = yaml.safe_load(text) or {}
    run = Path(tree.get("runs", "")) / tree.get("name", "")
    here = json.dumps(tree, ensure_ascii=False).replace(f"{run}/", "<this run>/")
    return {key: value for key, value in _flat(json.loads(here)).items() if key not in FREE_ON_RESUME}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _is_whole_checkpoint(folder: Path) -> bool:
    """Whether transformers' Trainer came to the end of a checkpoint (it writes trainer_state.json last), and
    all of it is there: without some files it would go on, with an optimizer or random numbers begun anew.
    """
    return _ended(folder) and all(any(folder.glob(name)) for name in TRAINER_FILES)


def _ended(folder: Path) -> bool:
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def library_versions(more: Sequence[str] = ()) -> dict[str, str]:
    """The versions of Python and of the libraries that results depend on, and of `more`."""
    versions = {"python": platform.python_version()}
    for library in (*LIBRARIES, *more):
        with contextlib.suppress(PackageNotFoundError):
            versions[library] = version(library)
    return versions
