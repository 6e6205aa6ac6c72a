"""From key=value words to a stage's configuration.

The YAML files under configs/ carry every value, the dataclasses of `rlhf.settings` the keys and types. A word
is `group=choice` (a file of configs/<group>/), `key=value`, or `<stage>.key=value` for that stage alone.
"""

import copy
import os
import typing
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from rlhf.deepspeed_config import check_deepspeed
from rlhf.hints import hint
from rlhf.settings import (
    STAGE_CONFIGS,
    BenchConfig,
    ChatConfig,
    ComparisonConfig,
    Decoding,
    EvaluateConfig,
    PPOConfig,
    StageConfig,
)
from rlhf.specs import check_seeds, with_policies
from rlhf.validation import check_config
from rlhf.words import read_text, read_value

PROJECT_DIR = Path(__file__).resolve().parent.parent
CONFIG_DIR = PROJECT_DIR / "configs"
STAGES = tuple(STAGE_CONFIGS)
PROGRAMS: dict[str, type[Any]] = {
    **STAGE_CONFIGS,
    "bench": BenchConfig,
    "chat": ChatConfig,
    "exposure": ComparisonConfig,
    "overoptimization": ComparisonConfig,
}
GROUPS = ("model", "data", "adapter", "engine", "decoding", "reward", "exposure", "judge")
SMALL_WEIGHTS = 40e6  # bytes of safetensors below which a local folder gets configs/model/small.yaml
EXPECTED: dict[Any, str] = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "a text"},
    **{list[int]: "a list of whole numbers", list[float]: "a list of numbers", list[str]: "a list of texts"},
}


def cache_dir() -> Path:
    """Return the folder that holds what was fetched or built: $RLHF_CACHE, else the user's cache folder."""
    if os.environ.get("RLHF_CACHE"):
        return Path(os.environ["RLHF_CACHE"]).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf-pipeline"


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


# The YAML files may call ${project:runs}, ${cache:toy}, ${first:a,b}, ${add:1,2} and ${last_part:some/path}.
OmegaConf.register_new_resolver("project", lambda path: str(PROJECT_DIR / path), replace=True)
OmegaConf.register_new_resolver("cache", lambda path: str(cache_dir() / path), replace=True)
OmegaConf.register_new_resolver("first", _first, replace=True)
OmegaConf.register_new_resolver("add", lambda *values: sum(values), replace=True)
OmegaConf.register_new_resolver(
    "last_part", lambda path: Path(path).expanduser().absolute().name, replace=True
)


def load_config(stage: str, overrides: list[str]) -> Any:
    """Return the configuration of `stage` (an `SFTConfig`, `PPOConfig`, …) with `overrides` applied.

    Raises ValueError, naming the full key and the remedy, for an unknown key, group choice, type or value.
    """
    if stage not in PROGRAMS:
        raise ValueError(f"stage={stage}: {hint(stage, PROGRAMS)}stages are {', '.join(PROGRAMS)}")
    words = [_split_word(stage, word) for word in overrides]
    groups, values = _split_groups(words)
    for key, _ in values:
        if value_type(stage, key) is None:
            raise ValueError(_unknown_key(stage, key))
    config = _compose(stage, groups)
    for key, text in values:
        _set(config, stage, key, _read(stage, key, text))
    if "runs" in config:
        if not config.runs.strip():
            raise ValueError("runs= is empty: give it a value, or leave it out")
        config.runs = str(Path(config.runs).expanduser().absolute())
    found = _to_object(config)
    if not isinstance(found, ComparisonConfig):
        check_deepspeed(found)
    if isinstance(found, EvaluateConfig):
        found.systems = {name: with_policies(system) for name, system in found.systems.items()}
    if isinstance(found, PPOConfig) and not needs_critic(found):
        found.critic = None
    return found


def needs_critic(config: PPOConfig) -> bool:
    """Whether the model in `critic` is loaded: as the critic, or as the reward on a trunk that is shared."""
    own = config.algo == "ppo" and config.critic_trunk == "own"
    return own or (config.reward["kind"] == "model" and config.reward["path"] == config.critic)


def decoding_changes(name: str) -> dict[str, Any]:
    """What configs/decoding/<name>.yaml sets beside its defaults; ValueError for a name that is no choice."""
    choices = group_choices("decoding")
    if name not in choices:
        raise ValueError(f"decodings: {name}: {hint(name, choices)}choices are {', '.join(choices)}")
    values = yaml.safe_load((CONFIG_DIR / "decoding" / f"{name}.yaml").read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key not in ("name", "defaults")}


def split_overrides(overrides: list[str]) -> dict[str, list[str]]:
    """Return the words each stage takes: a key goes to every stage that has it, `<stage>.key` to that stage.

    Raises ValueError for a key that no stage has.
    """
    taken: dict[str, list[str]] = {stage: [] for stage in STAGES}
    for word in overrides:
        key, _ = _split_key(word)
        stage, dot, _ = key.partition(".")
        takers = [stage] if dot and stage in STAGES else [s for s in STAGES if value_type(s, key) is not None]
        if not takers:
            keys = sorted(set().union(*(all_keys(s) for s in STAGES)))
            raise ValueError(f"{key} is not a key of any stage; {hint(key, keys)}".rstrip("; "))
        for taker in takers:
            taken[taker].append(word)
    return taken


def resolved_yaml(config: StageConfig) -> str:
    """Return `config` as YAML, every interpolation resolved; `read_config` reads it back equal."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def read_config(stage: str, path: Path) -> Any:
    """Read a configuration written with `resolved_yaml`. Raises ValueError where its keys do not fit."""
    try:
        return _to_object(OmegaConf.merge(OmegaConf.structured(PROGRAMS[stage]), OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        raise ValueError(f"{path} is not a configuration of stage {stage}: {_first_line(error)}") from error


def all_keys(stage: str) -> list[str]:
    """Return every full key of a stage, those of parts (`kl`) and of values (`kl.coef`)."""
    return _keys_of(PROGRAMS[stage])


def value_type(stage: str, key: str) -> Any:
    """Return the type of a key (a dataclass for a part, Any inside free-form parts), or None: no such key."""
    current: Any = PROGRAMS[stage]
    for part in key.split("."):
        if not is_dataclass(current):
            return Any if _is_free(current) else None
        current = typing.get_type_hints(current).get(part)
        if current is None:
            return None
    return current


@cache
def group_choices(group: str) -> tuple[str, ...]:
    """Return the names that `group=` takes: the files of configs/<group>/."""
    return tuple(sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml")))


def _split_key(word: str) -> tuple[str, str]:
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"{word!r} is not key=value, for instance seed=2 or adapter.r=8")
    return key.strip(), text


def _split_word(stage: str, word: str) -> tuple[str, str]:
    key, text = _split_key(word)
    owner, dot, rest = key.partition(".")
    if not dot or owner not in STAGES:
        return key, text
    if owner != stage:
        raise ValueError(f"{word}: {owner}.<key> is for stage={owner} or stage=all; this is stage={stage}")
    return rest, text


def _split_groups(words: list[tuple[str, str]]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Part `group=choice` from the rest; a model that is no choice becomes model.path."""
    groups = {key: text for key, text in words if key in GROUPS and not text.startswith("{")}
    values = [(key, text) for key, text in words if key not in groups]
    model = groups.get("model")
    if model is not None and model not in group_choices("model"):
        values.insert(0, ("model.path", _any_model(model)))
        model = None
    paths = [text for key, text in values if key == "model.path"]
    if model is None and paths:
        groups["model"] = "small" if _is_small(read_text(paths[-1]) or "") else "path"
    for group, choice in groups.items():
        if choice not in group_choices(group):
            choices = ", ".join(group_choices(group))
            raise ValueError(f"{group}={choice}: {hint(choice, group_choices(group))}choices are {choices}")
    return groups, values


def _is_small(path: str) -> bool:
    sizes = [file.stat().st_size for file in Path(path).expanduser().glob("*.safetensors")]
    return 0 < sum(sizes) < SMALL_WEIGHTS


def _any_model(path: str) -> str:
    guess = hint(path, group_choices("model"))
    if not path or (guess and "/" not in path and not Path(path).exists()):
        raise ValueError(
            f"model={path}: {guess}choices are {', '.join(group_choices('model'))}, a hub name or a "
            "local folder (model.path=... takes any name as it is)"
        )
    return path


def _compose(stage: str, groups: dict[str, str]) -> DictConfig:
    for group in groups:
        if value_type(stage, group) is None:
            raise ValueError(_unknown_key(stage, group))
    return copy.deepcopy(_composed(stage, tuple(f"{group}={choice}" for group, choice in groups.items())))


@cache
def _composed(stage: str, choices: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
        values = compose(config_name=stage, overrides=list(choices))
    try:
        return typing.cast(DictConfig, OmegaConf.merge(OmegaConf.structured(PROGRAMS[stage]), values))
    except OmegaConfBaseException as error:
        raise ValueError(
            f"the files under {CONFIG_DIR} do not fit stage {stage}: {_first_line(error)}"
        ) from error


def _set(config: DictConfig, stage: str, key: str, value: Any) -> None:
    kind = value_type(stage, key)
    if kind is None:
        raise ValueError(_unknown_key(stage, key))
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(
                f"{key}={value}: it has keys of its own, for instance {_keys_of(kind, f'{key}.')[0]}=..."
            )
        for name, part in value.items():
            _set(config, stage, f"{key}.{name}", part)
        return
    _open_path(config, key)
    try:
        if _bare(kind) is bool and isinstance(value, int | str) and not isinstance(value, bool):
            raise ValidationError  # OmegaConf takes 2 for true, and "on"
        OmegaConf.update(config, key, value, merge=False, force_add=_is_free(kind))
    except ValidationError as error:
        expected = EXPECTED.get(_bare(kind), "a mapping")
        raise ValueError(f"{key}={'null' if value is None else value}: {expected} is expected") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{key}={value}: {_first_line(error)}") from error


def _open_path(config: DictConfig, key: str) -> None:
    """Make every part above `key` a mapping of its own: a reference becomes a copy, a path {path: …}."""
    parts = key.split(".")
    parent = config
    for i, part in enumerate(parts[:-1], start=1):
        above = ".".join(parts[:i])
        value = OmegaConf.select(config, above)
        if isinstance(value, ListConfig):
            raise ValueError(f"{key}: {above} is a list; give it as a whole, for instance {above}='[...]'")
        if isinstance(value, str):
            as_written: Any = OmegaConf.to_container(parent, resolve=False)  # may refer to keys set later
            OmegaConf.update(config, above, {"path": as_written[part]}, merge=False)
        elif isinstance(value, DictConfig) and OmegaConf.is_interpolation(parent, part):
            OmegaConf.update(config, above, copy.deepcopy(value), merge=False)
        parent = OmegaConf.select(config, above)


def _read(stage: str, key: str, text: str) -> Any:
    try:
        return read_text(text) if _bare(value_type(stage, key)) is str else read_value(text)
    except ValueError as error:
        raise ValueError(f"{key}={error}") from error


def _to_object(config: Any) -> Any:
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        found = None if missing else OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        if "Missing mandatory value: " not in str(error):
            raise ValueError(_first_line(error)) from error
        missing = [_first_line(error).rsplit(" ", 1)[-1]]
    if missing:
        raise ValueError(f"{missing[0]} has no value: give {missing[0]}=...")
    if isinstance(found, ComparisonConfig):
        check_seeds(found.seeds)
    else:
        check_config(typing.cast(StageConfig, found))
    return found


OWN_DISTRIBUTION = (
    "Rollouts are drawn from the model's own distribution, whose log-probs PPO, REINFORCE and RLOO learn "
    "from: penalties, truncation and beams would change it"
)


def _unknown_key(stage: str, key: str) -> str:
    others = [other for other in PROGRAMS if value_type(other, key) is not None]
    decodes = {"decoding", *typing.get_type_hints(Decoding)} - {"name"}
    reason = f". {OWN_DISTRIBUTION}" if stage == "ppo" and key.split(".")[0] in decodes else ""
    if others:
        return f"{key} is not a key of stage {stage}, but of {', '.join(others)}{reason}"
    return f"{key} is not a key of stage {stage}; {hint(key, all_keys(stage))}".rstrip("; ") + reason


def _keys_of(kind: Any, prefix: str = "") -> list[str]:
    keys = []
    for name, part in typing.get_type_hints(kind).items():
        keys.append(prefix + name)
        if is_dataclass(part):
            keys += _keys_of(part, f"{prefix}{name}.")
    return keys


def _bare(kind: Any) -> Any:
    """Return the type without `| None`."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    return parts[0] if type(None) in typing.get_args(kind) else kind


def _is_free(kind: Any) -> bool:
    return kind is Any or typing.get_origin(_bare(kind)) is dict


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    key = next((line.split(":", 1)[1].strip() for line in lines if line.strip().startswith("full_key:")), "")
    return f"{key}: {lines[0]}" if key else lines[0]
