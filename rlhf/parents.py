"""A stage's inputs from other stages: where they lie, whether they are good, and whom they stand on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlhf.config import STAGES
from rlhf.files import hash_path
from rlhf.sources import is_path_like

TRAINED_ON_FILE = "trained_prompts.json"  # in a stage's folder: the keys of the prompts it was trained on
KEPT = "update_"  # begins the names of the policies that a PPO run keeps
OPTIONAL = ("critic", "calibration_policy")  # keys whose null a stage can do without


@dataclass(frozen=True)
class Parent:
    """An input of a stage: the key that named it, where it lay, and the hash of its weights or records."""

    key: str
    path: str
    sha256: str


def inputs_of(config: Any) -> list[tuple[str, str, str]]:
    """(key, path, kind) of every model and record file that a stage may have from another one.

    The kind is "policy", "reward_model" or "records". What it goes on from comes first. The scorers of
    evaluate, which can do without, are not among them.
    """
    found = [(key, getattr(config, key, None), "policy") for key in ("policy", "base", "calibration_policy")]
    for name, system in getattr(config, "systems", {}).items():
        spec = {"path": system} if isinstance(system, str) else system  # no path: saved responses
        key, run = f"systems.{name}", spec.get("checkpoints")
        paths = kept_policies(f"{key}.checkpoints", run)[1].values() if run else [spec.get("path")]
        found += [(key, path and str(path), "policy") for path in paths]
    if getattr(config, "oracle", None) != config.model.path:  # the base can be done without
        found.append(("oracle", getattr(config, "oracle", None), "policy"))
    found.append(("critic", getattr(config, "critic", None), "reward_model"))
    for key in () if hasattr(config, "systems") else ("reward", "labeller"):
        found += [(name, path, "reward_model") for name, path in model_paths(key, getattr(config, key, None))]
    records = config.ranked.train if hasattr(config, "ranked") else None
    if isinstance(records, str) and records.startswith(config.runs):
        found.append(("ranked.train", records, "records"))
    return [(key, path, kind) for key, path, kind in found if path is not None]


def model_paths(key: str, spec: dict[str, Any] | None) -> list[tuple[str, str]]:
    """(key, path) of every reward model that a scorer's settings name."""
    if spec is None or spec["kind"] not in ("sum", "model"):
        return []
    if spec["kind"] == "sum":
        parts = enumerate(spec["parts"])
        return [found for i, part in parts for found in model_paths(f"{key}.parts[{i}]", part)]
    return [(f"{key}.path", spec["path"])]


def check_there(config: Any, own: Path) -> None:
    """Refuse to start from other stages' results that are missing or bad, or lie in the stage's `own` folder,
    before anything heavy is imported.
    """
    for key, text, kind in inputs_of(config):
        path = Path(text).expanduser().absolute()
        if own in path.parents:
            raise ValueError(
                f"{key}={text} lies in {own}, which this stage replaces: give the new run a name= of its own"
            )
        if Path(config.runs) in path.parents:
            find_parent(key, str(path), kind=kind, force=config.force)


def find_parent(key: str, path: str, *, kind: str, force: bool) -> Parent:
    """Identify an input of a stage; refuse one unfinished, of another kind, with failed checks, or whose own
    inputs have been replaced since.

    `kind` is "policy", "reward_model" or "records". A hub name or a folder that no stage wrote is taken as
    it is.
    """
    folder = Path(path)
    if not folder.exists():
        if (folder.parent / "config.yaml").exists() or is_path_like(path):
            raise FileNotFoundError(_missing(key, folder))
        return Parent(key, path, "")
    if folder.is_dir():
        _check_model_folder(key, folder)
    record = _record(key, path)
    if record is None:
        if (folder.parent / "config.yaml").exists():
            stage = folder.parent.name
            remedy = (
                f"run stage={stage} resume=true" if stage in STAGES else "finish the stage that writes it"
            )
            raise FileNotFoundError(f"{key}={path} was left half written: its stage did not finish; {remedy}")
        return Parent(key, path, hash_path(folder))
    written = _product(record, folder.name)
    if written["kind"] != kind:
        raise ValueError(
            f"{key}={path} was written by stage {record['stage']}: a {written['kind'].replace('_', ' ')}; "
            f"a {kind.replace('_', ' ')} is due here"
        )
    failed = failed_checks(record)
    if failed and not force and not key.startswith("systems."):  # a comparison shows what is wrong with it
        raise ValueError(
            f"{key}={path} failed its own checks: {'; '.join(failed)}. Mend it, or go on with force=true"
        )
    found = hash_path(folder)
    if folder.is_dir() and found != written["sha256"] and not force:
        raise ValueError(
            f"{key}={path}: its weights are not those that stage {record['stage']} wrote (SHA-256 differs "
            f"from {folder.parent / 'stage.json'}); run that stage again, or go on with force=true"
        )
    replaced = replaced_parent(record)
    if replaced and not force:
        raise ValueError(
            f"{key}={path} was made from {replaced}, which has been replaced since; run stage "
            f"{record['stage']} again, or go on with force=true"
        )
    return Parent(key, path, found)


def failed_checks(record: dict[str, Any]) -> list[str]:
    """A line for every check that a stage.json says its stage failed."""
    failed = [check for check in record["checks"] if not check["passed"]]
    return [f"{check['name']}: {check['value']} ({check['meaning']})" for check in failed]


def _product(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The kind and hash of a folder that a stage wrote: its model, or one of its further `products`."""
    own = {"kind": record["kind"], "sha256": record.get("model_sha256")}
    return record.get("products", {}).get(name, own)


def kept_policies(key: str, run: str) -> tuple[str, dict[int, Path]]:
    """The policy that a finished PPO run, by its folder, began with, and those that lie there, by update:
    those of `keep_every`, and its model.

    Raises ValueError, naming the key, where there are none.
    """
    folder = Path(run).expanduser().absolute()
    record = _record(key, str(folder / "model"))
    if record is None or record["stage"] != "ppo":
        raise ValueError(f"{key}={run}: no finished run of stage=ppo lies there; name one's folder")
    names = [name for name in record.get("products", {}) if name.startswith(KEPT)]
    names = [name for name in names if (folder / name).exists()]
    if not names:
        raise ValueError(f"{key}={run}: that run has no checkpoints; run it again with keep_every=<updates>")
    kept = {int(name.removeprefix(KEPT)): folder / name for name in names}
    return record["parents"][0]["path"], dict(sorted({**kept, record["update"]: folder / "model"}.items()))


def replaced_parent(record: dict[str, Any]) -> str | None:
    """The place of a parent in a stage.json where something else lies by now; None where there is none."""
    for parent in record.get("parents", []):
        place = Path(parent["path"])
        if parent["sha256"] and place.exists() and hash_path(place) != parent["sha256"]:
            return parent["path"]
    return None


def adapter_of(model: str, *, base: str) -> Path | None:
    """The LoRA adapter whose merge into `base` is the model folder `model`, where a stage of ours left it."""
    adapter, record = Path(model).parent / "adapter", _record("critic", model)
    if record is None or not adapter.exists() or not Path(base).is_dir():
        return None
    bases = {parent["sha256"] for parent in record["parents"] if parent["key"] == "base"}
    return adapter if hash_path(Path(base)) in bases else None


def lineage(parents: Sequence[Parent]) -> list[dict[str, Any]]:
    """The stage.json of every stage that the parents stand on, the oldest first and each once."""
    return list(lineage_by_folder(parents).values())


def lineage_by_folder(parents: Sequence[Parent]) -> dict[str, dict[str, Any]]:
    """The same by the stages' folders."""
    found: dict[str, dict[str, Any]] = {}

    def add(key: str, path: str) -> None:
        record = _record(key, path)
        if record is not None:
            for parent in record["parents"]:
                add(parent["key"], parent["path"])
            found.setdefault(str(Path(path).absolute().parent), record)

    for parent in parents:
        add(parent.key, parent.path)
    return found


def seen_in_training(parents: Sequence[Parent], keys: AbstractSet[str]) -> list[dict[str, Any]]:
    """Which of some prompts (`prompt_keys`) the stages that the parents stand on have trained on, a row for
    each of their data keys: `stage`, `key` and `shared`, which is None of a stage that did not write it down
    or is gone.
    """
    stages = lineage_by_folder(parents)
    places = {each["path"] for record in stages.values() for each in record["parents"]}
    lost = sorted({Path(each).parent for each in places if not Path(each).exists()})
    found: list[dict[str, Any]] = [
        {"stage": str(folder), "key": "", "shared": None}
        for folder in lost
        if folder.name in STAGES and str(folder.absolute()) not in stages
    ]
    for folder in stages:
        file = Path(folder) / TRAINED_ON_FILE
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"": None}
        found += [
            {"stage": folder, "key": key, "shared": None if trained is None else keys & set(trained)}
            for key, trained in known.items()
        ]
    return found


def origin(parents: Sequence[Parent]) -> str:
    """The model that the first parent and its own first parents began with."""
    ancestors = lineage(parents[:1])
    return str(ancestors[0]["parents"][0]["path"]) if ancestors else parents[0].path


def _record(key: str, path: str) -> dict[str, Any] | None:
    """The stage.json beside a stage's product; None where there is none."""
    file = Path(path).parent / "stage.json"
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{key}: {file} is damaged ({error}); run its stage again") from error


def _missing(key: str, path: Path) -> str:
    stage = path.parent.name
    without = f", or set {key}=null" if key in OPTIONAL else ""
    if stage not in STAGES:
        return f"{key}={path} does not exist; name another folder with {key}={without}"
    state, how = ("was not finished", " resume=true") if path.parent.exists() else ("has not been run", "")
    before = path.parent.with_name(f"{stage}.before") / path.name
    other = f"the result before it, {key}={before}" if before.exists() else f"another folder with {key}="
    return (
        f"{key}={path} does not exist: the stage that writes it {state}; "
        f"run stage={stage}{how} first, or name {other}{without}"
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
