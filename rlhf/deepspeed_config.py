"""The DeepSpeed configuration of a run: this project's, and a user's own laid over it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.deepspeed_keys import KEYS, OURS, Kind, Refused
from rlhf.hints import hint
from rlhf.settings import MAX_GRAD_NORM, WEIGHTS, zero_stage

AUTO = "auto"  # what a file of Hugging Face's leaves to the program that reads it


def deepspeed_settings(engine: Any) -> dict[str, Any] | None:
    """The DeepSpeed configuration of the `engine` group, the user's own file at `engine.deepspeed_config`
    laid over it; None where the engine needs none.

    Raises ValueError where the file cannot be read, or contradicts `engine.deepspeed`.
    """
    if engine.deepspeed is None:
        return None
    ours, given = (_to_hand_on(each) for each in (engine.deepspeed, _read(engine.deepspeed_config)))
    return _merged(ours, given, engine.deepspeed_config)


def check_deepspeed(config: Any) -> None:
    """Raise ValueError for DeepSpeed settings that are unknown, that this project does not support, or that
    contradict its own keys.
    """
    engine = config.engine
    if engine.deepspeed is None:
        if engine.deepspeed_config is not None:
            raise ValueError(
                f"engine.deepspeed_config={engine.deepspeed_config} needs DeepSpeed: set engine=zero1, zero2 "
                "or zero3"
            )
        return
    for where, given in (
        ("engine.deepspeed.", engine.deepspeed),
        (f"{engine.deepspeed_config}: ", _read(engine.deepspeed_config)),
    ):
        _check_keys(where, given, KEYS)
        _check_stage(where, given, engine)
        _check_values(where, given, _own_values(config), engine.dtype)
    deepspeed_settings(engine)


def check_has_stage(deepspeed: Any) -> None:
    """Raise ValueError where `engine.deepspeed`, whose stage is read in many places, is given without one."""
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, dict) else None
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if deepspeed is not None and stage not in (1, 2, 3):
        raise ValueError(
            f"engine.deepspeed={json.dumps(deepspeed)}: zero_optimization.stage=1, 2 or 3 is expected; leave "
            "it to engine=zero1, zero2 or zero3"
        )


def _read(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        given = json.loads(text, object_pairs_hook=_without_repeats)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"engine.deepspeed_config={path} cannot be read as JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"engine.deepspeed_config={path}: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"engine.deepspeed_config={path} is no JSON object")
    return given


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(key for key, _ in pairs)
    for key in (key for key, count in counts.items() if count > 1):
        raise ValueError(f"{key} is given {counts[key]} times: leave it there once")
    return dict(pairs)


def _check_keys(where: str, given: dict[str, Any], known: dict[str, Any]) -> None:
    """Raise ValueError for names that are not known, and for values of another kind than theirs."""
    for key, value in given.items():
        said = f"{where}{key}={json.dumps(value)}"
        if key not in known:
            raise ValueError(
                f"{where}{key} is no key of DeepSpeed's; {hint(key, sorted(known))}".rstrip("; ")
            )
        kind = known[key]
        if value == AUTO and not isinstance(kind, dict):
            continue
        if isinstance(kind, dict) and isinstance(value, dict):
            _check_keys(f"{where}{key}.", value, kind)
        elif isinstance(kind, dict) and value is not None:
            raise ValueError(
                f"{where}{key} is no mapping: give it keys of its own, for instance {next(iter(kind))}"
            )
        elif isinstance(kind, Refused) and kind.holds(value):
            because = f" ({kind.why})" if kind.why else ""
            raise ValueError(f"{said} is not supported{because}: leave it out")
        elif isinstance(kind, Kind) and not kind.fits(value):
            raise ValueError(f"{said}: {kind.expected} is expected")


def _check_stage(where: str, given: dict[str, Any], engine: Any) -> None:
    zero = given.get("zero_optimization") or {}
    stage, own = zero.get("stage", AUTO), re.match(r"zero(\d)", engine.name)
    if own is not None and stage not in (AUTO, int(own[1])):
        remedy = f"set engine=zero{stage}" if stage in (1, 2, 3) else "leave it out"
        raise ValueError(
            f"{where}zero_optimization.stage={json.dumps(stage)} contradicts engine={engine.name}: {remedy}"
        )
    offloaded = (zero.get("offload_param") or {}).get("device")
    if offloaded == "cpu" and zero_stage(engine.deepspeed) < WEIGHTS:
        raise ValueError(
            f'{where}zero_optimization.offload_param.device="cpu" has no effect under engine={engine.name}, '
            "where weights are whole in every process: set engine=zero3_offload, or engine=zero2_offload for "
            "the optimizer"
        )


def _own_values(config: Any) -> dict[str, tuple[str, Any]]:
    """This project's key and value for each of the settings in OURS, by DeepSpeed's dotted key; without the
    keys that a stage does not have.
    """
    engine, clip = config.engine, getattr(config, "clip", None)
    found: dict[str, tuple[str, Any]] = {
        "train_micro_batch_size_per_gpu": ("engine.micro_batch_size", engine.micro_batch_size),
        "gradient_accumulation_steps": ("engine.tokens_per_pass", engine.tokens_per_pass),
        "communication_data_type": ("the type in which gradients travel", "fp32"),
        "gradient_clipping": ("the gradient norm's limit in sft and rm", MAX_GRAD_NORM),
        "optimizer.type": ("the optimizer's type", "AdamW"),
        "fp16.enabled": ("engine.dtype", False),
        "bf16.enabled": ("engine.dtype", {"bfloat16": True, "float32": False}.get(engine.dtype)),
        "torch_autocast.enabled": ("engine.dtype", False),
        "zero_allow_untested_optimizer": ("what the optimizer needs", True),
        "zero_force_ds_cpu_optimizer": ("what the optimizer needs", False),
    }
    if clip is not None:
        found["gradient_clipping"] = ("clip.grad_norm", clip.grad_norm)
    if hasattr(config, "learning_rate"):
        found["train_batch_size"] = ("batch_size", config.batch_size)
        warmup = "warmup_updates" if clip else "warmup_ratio"
        found["scheduler.type"] = (warmup, getattr(config, warmup))
        found["optimizer.params.lr"] = ("learning_rate", config.learning_rate)
        found["optimizer.params.betas"] = ("the optimizer's betas", [0.9, 0.999])
        found["optimizer.params.eps"] = ("the optimizer's epsilon", 1e-5 if clip else 1e-8)
        found["optimizer.params.weight_decay"] = ("weight_decay", getattr(config, "weight_decay", 0.0))
    return found


def _check_values(where: str, given: dict[str, Any], own: dict[str, tuple[str, Any]], dtype: str) -> None:
    for key, value in _leaves({key: value for key, value in given.items() if key in OURS}):
        if value == AUTO or key not in own or value == own[key][1]:
            continue
        name, ours = own[key]
        ours = dtype if name == "engine.dtype" else json.dumps(ours)
        raise ValueError(
            f"{where}{key}={json.dumps(value)} contradicts {name}={ours}: leave it out, or change one of them"
        )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _to_hand_on(given: dict[str, Any], known: dict[str, Any] = KEYS) -> dict[str, Any]:
    """Settings without those that keys of this project say, that are left to them, or that are off."""
    taken = {key: value for key, value in given.items() if value != AUTO}
    return {
        key: _to_hand_on(value, known[key]) if isinstance(value, dict) else value
        for key, value in taken.items()
        if key not in OURS and not isinstance(known[key], Refused)
    }


def _merged(
    ours: dict[str, Any], given: dict[str, Any], path: str | None, prefix: str = ""
) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merged(merged[key], value, path, f"{prefix}{key}.")
        elif key in merged and merged[key] != value:
            raise ValueError(
                f"{path}: {prefix}{key}={json.dumps(value)} contradicts engine.deepspeed.{prefix}{key}="
                f"{json.dumps(merged[key])}: change one of them"
            )
        else:
            merged[key] = value
    return merged
