"""Stage folders: what a stage leaves behind, who its parents were, and the state that resuming needs.

    runs/<name>/<stage>/  model/  adapter/  stage.json (written last)  config.yaml  metrics.jsonl
    state/step_N/

Every file and folder appears by rename when it is complete, so a killed run leaves the old one or the new
one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from rlhf.checks import Check
from rlhf.config import STAGES
from rlhf.sources import is_path_like

# Settings that may differ between a run and its continuation: they change no number.
FREE_ON_RESUME = {"resume", "overwrite", "force", "show", "tracker", "keep_last", "log_steps"}
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


@dataclass(frozen=True)
class Parent:
    """An input of a stage: the key that named it, where it lay, and the hash of its weights or records."""

    key: str
    path: str
    sha256: str


class StageFolder:
    """The folder of one stage of one run."""

    def __init__(self, runs: str, name: str, stage: str) -> None:
        self.path = Path(runs) / name / stage
        self.stage = stage
        self._lock: Any = None

    @property
    def model(self) -> Path:
        """The complete model folder that others load."""
        return self.path / "model"

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
            if state is None and self.path.exists():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.yaml", resolved_config)
        except OSError as error:
            raise ValueError(
                f"cannot write to {self.path} ({error.strerror}); set runs= to another folder"
            ) from error
        return state

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
        """Raise ValueError where the stage is finished, or was interrupted, and nothing was said about it."""
        if overwrite:
            return
        if (self.path / "stage.json").exists():
            raise ValueError(
                f"stage {self.stage} is finished, its result lies in {self.path}; "
                "overwrite=true runs it again, name=... starts another run"
            )
        state = self.latest_state()
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

    @contextlib.contextmanager
    def new_state(self, step: int, *, keep_last: int) -> Iterator[Path]:
        """A folder to write the state of `step` into; it becomes state/step_N when the block ends well."""
        final = self.path / "state" / f"step_{step}"
        with new_folder(final) as folder:
            yield folder
        for left in (self.path / "state").glob(".step_*.tmp"):  # by a kill
            shutil.rmtree(left)
        states = sorted((self.path / "state").glob("step_*"), key=lambda path: _step(path) or 0)
        for old in states[: -max(keep_last, 1)]:
            shutil.rmtree(old)

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
            record["model_sha256"] = hash_weights(self.model)
        write_text(self.path / "stage.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return record


def find_parent(key: str, path: str, *, kind: str, force: bool, optional: bool = False) -> Parent:
    """Identify an input of a stage; refuse one unfinished, of another kind, or with failed checks.

    `kind` is "policy", "reward_model" or "records". A hub name or a folder that no stage wrote is taken as
    it is. `optional`: the stage can do without this input, and the message about a missing one says how.
    """
    folder = Path(path)
    record_file = folder.parent / "stage.json"
    if not folder.exists():
        if (folder.parent / "config.yaml").exists() or is_path_like(path):
            raise FileNotFoundError(_missing(key, folder) + (f", or set {key}=null" if optional else ""))
        return Parent(key, path, "")
    if folder.is_dir():
        _check_model_folder(key, folder)
    if not record_file.exists():
        if (folder.parent / "config.yaml").exists():
            stage = folder.parent.name
            remedy = (
                f"run stage={stage} resume=true" if stage in STAGES else "finish the stage that writes it"
            )
            raise FileNotFoundError(f"{key}={path} was left half written: its stage did not finish; {remedy}")
        return Parent(key, path, hash_weights(folder) if folder.is_dir() else hash_file(folder))
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{key}: {record_file} is damaged ({error}); run its stage again") from error
    if record["kind"] != kind:
        raise ValueError(
            f"{key}={path} was written by stage {record['stage']}: a {record['kind'].replace('_', ' ')}; "
            f"a {kind.replace('_', ' ')} is due here"
        )
    failed = [check for check in record["checks"] if not check["passed"]]
    if failed and not force:
        reasons = "; ".join(f"{check['name']}: {check['value']} ({check['meaning']})" for check in failed)
        raise ValueError(f"{key}={path} failed its own checks: {reasons}. Mend it, or go on with force=true")
    found = hash_weights(folder) if folder.is_dir() else hash_file(folder)
    if folder.is_dir() and found != record["model_sha256"] and not force:
        raise ValueError(
            f"{key}={path}: its weights are not those that stage {record['stage']} wrote (SHA-256 differs "
            f"from {record_file}); run that stage again, or go on with force=true"
        )
    return Parent(key, path, found)


def adapter_of(model: str, *, base: str) -> Path | None:
    """The LoRA adapter whose merge into `base` is the model folder `model`, where a stage of ours left it."""
    record_file, adapter = Path(model).parent / "stage.json", Path(model).parent / "adapter"
    if not (record_file.exists() and adapter.exists() and Path(base).is_dir()):
        return None
    parents = json.loads(record_file.read_text(encoding="utf-8"))["parents"]
    bases = {parent["sha256"] for parent in parents if parent["key"] == "base"}
    return adapter if hash_weights(Path(base)) in bases else None


def check_there(config: Any) -> None:
    """Refuse to start without the model that a stage stands on, before anything heavy is imported."""
    for key in ("policy", "base"):
        path = Path(getattr(config, key, None) or ".")
        if Path(config.runs) in path.parents and not path.exists():
            raise FileNotFoundError(_missing(key, path))


def _missing(key: str, path: Path) -> str:
    stage = path.parent.name
    if stage not in STAGES:
        return f"{key}={path} does not exist; name another folder with {key}="
    state = "was not finished" if path.parent.exists() else "has not been run"
    return (
        f"{key}={path} does not exist: the stage that writes it {state}; "
        f"run stage={stage} first, or name another folder with {key}="
    )


def _check_model_folder(key: str, folder: Path) -> None:
    """Refuse a folder without a model: a stage's folder itself, a bare adapter, or one that lost files."""
    weights = sorted(folder.glob("*.safetensors"))
    if (folder / "config.json").exists() and weights:
        for file in weights:
            try:
                with safe_open(str(file), framework="numpy"):
                    pass
            except SafetensorError as error:
                raise ValueError(
                    f"{key}={folder}: {file.name} is cut short or damaged ({error}); write or fetch it again"
                ) from error
        return
    if (folder / "model" / "config.json").exists():
        raise FileNotFoundError(f"{key}={folder} is a stage's folder; name {folder / 'model'}")
    if (folder / "adapter_config.json").exists():
        raise FileNotFoundError(
            f"{key}={folder} holds an adapter alone; name the merged model: {folder.parent / 'model'}"
        )
    if (folder / "config.json").exists() and [*folder.glob("*.bin"), *folder.glob("*.pt")]:
        raise ValueError(
            f"{key}={folder} has its weights in pickles, which are never loaded; save the model again with "
            "safe_serialization=True where you trust it"
        )
    lost = "weights (*.safetensors)" if (folder / "config.json").exists() else "config.json"
    raise FileNotFoundError(f"{key}={folder} has no {lost}: run the stage that writes it again")


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A temporary folder that replaces `final` when the block ends well and vanishes otherwise."""
    temporary = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot write {final}: {error}; free the disk or set runs= to another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def hash_weights(folder: Path) -> str:
    """SHA-256 over the weight files of a model folder, in order of their names."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("config.json"))
    return _hash(files)


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    return _hash([path])


def save_model_folder(final: Path, save: Callable[[Path], None], card: str) -> None:
    """Write a model folder by `save` with its model card, whole or not at all."""
    with new_folder(final) as folder:
        save(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _step(path: Path) -> int | None:
    number = path.name.replace("-", "_").rsplit("_", 1)[-1]
    return int(number) if number.isdigit() and path.name.startswith(("step_", "checkpoint-")) else None


def _hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _check_same_config(path: Path, resolved_config: str) -> None:
    before = _flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    now = _flat(yaml.safe_load(resolved_config))
    differing = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key) and key not in FREE_ON_RESUME
    )
    if differing:
        changes = ", ".join(f"{key} ({before.get(key)} -> {now.get(key)})" for key in differing)
        raise ValueError(
            f"cannot resume {path.parent} with other settings: {changes}; "
            "give the old ones, or start again with overwrite=true"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _is_whole_checkpoint(folder: Path) -> bool:
    """Whether transformers' Trainer came to the end of a checkpoint: it writes trainer_state.json last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def library_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that results depend on."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[library] = version(library)
    return versions
