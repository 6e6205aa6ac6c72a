"""Which free-form values of a configuration are refused: sources, scorers, systems."""

import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlhf.decoding import Decoding, system_decoding
from rlhf.discriminator_settings import refuse_elsewhere
from rlhf.hints import hint

SCORER_KEYS = {
    "model": {"path"},
    "classifier": {"train", "classifier"},
    "function": {"function"},
    "rouge_l": {"scale"},
    "rouge_avg": {"scale"},
    "bleu": {"scale"},
    "sum": {"parts"},
}
OPTIONAL = {"train", "classifier", "scale"}  # of a scorer's keys
SOURCE_KEYS = {"path", "split", "subset", "part", "limit", "revision", "columns"}
SYSTEM_NAME = re.compile(r"\w[\w.+-]*")
SYSTEM_KEYS = {"path", "decoding", "best_of"}
MODEL_FILES = ("config.json", "adapter_config.json")  # one of which lies in a model's folder
ALONE = ("generations", "checkpoints")  # keys of a system that is nothing else


def check_source(key: str, source: Any) -> None:
    """Raise ValueError unless `source` is null, a path, a mapping with a path, or a list of these."""
    if source is None or isinstance(source, str):
        return
    if isinstance(source, list | tuple):
        for i, part in enumerate(source):
            check_source(f"{key}[{i}]", part)
        return
    if not isinstance(source, dict):
        raise ValueError(f"{key}={source!r}: give a path, a hub name, or {{path: ..., split: ...}}")
    _check_keys(key, source, SOURCE_KEYS)
    if not isinstance(source.get("path"), str):
        raise ValueError(f"{key}={source!r}: path is missing")


def check_scorer(key: str, spec: dict[str, Any]) -> None:
    """Raise ValueError unless `spec` is {kind: model|classifier|function|..., ...} with its kind's keys."""
    refuse_elsewhere(key, spec)
    kind = spec.get("kind")
    if kind not in SCORER_KEYS:
        raise ValueError(f"{key}.kind={kind!r}: one of {', '.join(SCORER_KEYS)}")
    every_key = set().union(*SCORER_KEYS.values())
    _check_keys(key, spec, every_key | {"kind", "weight"})
    for needed in SCORER_KEYS[kind] - OPTIONAL:
        if not spec.get(needed):
            raise ValueError(f"{key}.{needed} is missing: kind={kind} needs it")
    check_source(f"{key}.train", spec.get("train"))
    scale = spec.get("scale", 1.0)
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < math.inf:
        raise ValueError(f"{key}.scale={scale!r}: a number above 0 is expected")
    if kind == "sum":
        _check_parts(key, spec["parts"])


def check_systems(systems: dict[str, Any], baseline: str | None, decoding: Decoding) -> None:
    """Raise ValueError unless every system is a path, {path, best_of, decoding}, {generations: file} or
    {checkpoints: folder}.
    """
    if not systems:
        raise ValueError("systems={}: give at least one, for instance systems='{mine: path/to/model}'")
    for name, system in systems.items():
        key = f"systems.{name}"
        if not SYSTEM_NAME.fullmatch(str(name)):
            raise ValueError(f"{key}: a name of letters, digits and . + - _ is expected: files have it too")
        if isinstance(system, str):
            continue
        alone = isinstance(system, dict) and len(system) == 1
        if alone and any(isinstance(system.get(each), str) for each in ALONE):
            continue
        if (
            not isinstance(system, dict)
            or not isinstance(system.get("path"), str)
            or system.keys() & set(ALONE)
        ):
            raise ValueError(
                f"{key}={system!r}: give a path, {{path: ..., best_of: 4, decoding: {{...}}}}, or alone "
                "{generations: file} or {checkpoints: folder of a PPO run}"
            )
        _check_keys(key, system, SYSTEM_KEYS)
        _check_best_of(key, system.get("best_of"))
        own = system.get("decoding") or {}
        if not isinstance(own, dict):
            raise ValueError(f"{key}.decoding={own!r}: give its keys, for instance {{num_beams: 4}}")
        _check_keys(f"{key}.decoding", own, {field.name for field in fields(Decoding)} - {"max_new_tokens"})
        system_decoding(name, own, decoding)
    names = system_names(systems)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"systems: two would be called {twice[0]}; give one of them another name")
    if baseline is not None and baseline not in names and baseline.rpartition("_")[0] not in runs_in(systems):
        raise ValueError(f"baseline={baseline}: not one of the systems {', '.join(names)}")


def policy_in(place: str) -> str:
    """The model in the folder of a stage, or of a run whose ppo has finished; any other place is itself."""
    folder = Path(place).expanduser()
    inner = (folder / "model", folder / "ppo" / "model")
    if folder.is_dir() and not any((folder / name).exists() for name in MODEL_FILES):
        return str(next((each for each in inner if (each / "config.json").is_file()), place))
    return place


def with_policies(system: Any) -> Any:
    """A system whose path is that of a model where it was that of a stage or run."""
    if isinstance(system, str):
        return policy_in(system)
    return system | {"path": policy_in(system["path"])} if "path" in system else system


def system_names(systems: dict[str, Any]) -> list[str]:
    """The names of the systems that a `systems` key stands for: best_of: [2, 4] is name_2 and name_4. Of
    {checkpoints: folder} it is that of the last one; which others there are is seen once the run is finished.
    """
    found = []
    for name, system in systems.items():
        several = system.get("best_of") if isinstance(system, dict) else None
        found += [f"{name}_{n}" for n in several] if isinstance(several, list) else [name]
    return found


def runs_in(systems: dict[str, Any]) -> list[str]:
    """The names of those that are {checkpoints: folder}."""
    return [name for name, system in systems.items() if isinstance(system, dict) and "checkpoints" in system]


def _check_best_of(key: str, best_of: Any) -> None:
    numbers = best_of if isinstance(best_of, list) else [1 if best_of is None else best_of]
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)
    if not whole or not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{key}.best_of={best_of}: a number of samples is expected, or a list of different ones"
        )


def check_seeds(seeds: list[int]) -> None:
    """Raise ValueError unless there are seeds, all of them different."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds}: give at least one, and each once")


def _check_parts(key: str, parts: Any) -> None:
    if not isinstance(parts, list):
        raise ValueError(f"{key}.parts={parts!r}: give a list of scorers, each with a weight")
    for i, part in enumerate(parts):
        where = f"{key}.parts[{i}]"
        if not isinstance(part, dict) or not isinstance(part.get("weight"), int | float):
            raise ValueError(f"{where}={part!r}: give {{weight: number, kind: ..., ...}}")
        check_scorer(where, part)


def _check_keys(key: str, mapping: dict[str, Any], allowed: set[str]) -> None:
    for name in mapping:
        if name not in allowed:
            choices = ", ".join(sorted(allowed))
            raise ValueError(
                f"{key}.{name} is not a key; {hint(str(name), sorted(allowed))}keys are {choices}"
            )
