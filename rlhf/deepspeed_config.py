"""The DeepSpeed configuration of a run: this project's, and a user's own laid over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What this project says of a DeepSpeed configuration, by its own keys.
OURS = {
    "gradient_clipping": "clip.grad_norm, 1.0 in sft and rm",
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_size",
    "gradient_accumulation_steps": "engine.tokens_per_pass",
    "optimizer": "learning_rate",
    "scheduler": "warmup_ratio, warmup_updates",
    "fp16": "engine.dtype",
    "bf16": "engine.dtype",
    "torch_autocast": "engine.dtype",
    "zero_optimization.stage": "engine",
}


def deepspeed_settings(engine: Any) -> dict[str, Any] | None:
    """The DeepSpeed configuration of the `engine` group, the user's own file at `engine.deepspeed_config`
    laid over it; None where the engine needs none.

    Raises ValueError where the file cannot be read, or says what a key of this project says.
    """
    path = engine.deepspeed_config
    if engine.deepspeed is None:
        if path is not None:
            raise ValueError(
                f"engine.deepspeed_config={path} needs DeepSpeed: set engine=zero1, zero2 or zero3"
            )
        return None
    if path is None:
        return engine.deepspeed
    try:
        given = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"engine.deepspeed_config={path} cannot be read as JSON: {error}") from error
    if not isinstance(given, dict):
        raise ValueError(f"engine.deepspeed_config={path} is no JSON object")
    for key, own in OURS.items():
        part, _, inner = key.partition(".")
        value = (
            given.get(part, {}).get(inner) if inner and isinstance(given.get(part), dict) else given.get(key)
        )
        if value is not None:
            raise ValueError(
                f"{path}: {key}={json.dumps(value)} contradicts this project's {own}: leave it out"
            )
    return _merged(engine.deepspeed, given, path)


def _merged(ours: dict[str, Any], given: dict[str, Any], path: str, prefix: str = "") -> dict[str, Any]:
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
