"""The state that an exact resume needs, as safetensors and JSON: trained weights, optimizer moments, random
generators.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf.engine import random_state, restore_random_state
from rlhf.models.sharded import whole_weights


def save_training_state(
    folder: Path, module: nn.Module, optimizer_state: dict[str, Any], values: dict[str, Any]
) -> None:
    """Write the trained parameters, an optimizer's `state_dict`, all random generators and plain `values`."""
    save_trained_weights(folder, module)
    moments = {
        f"{index}.{name}": torch.as_tensor(value).detach().contiguous()
        for index, state in optimizer_state["state"].items()
        for name, value in state.items()
    }
    save_file(moments, folder / "optimizer.safetensors")
    generators = random_state()
    tensors = {"torch": generators["torch"], "numpy": generators["numpy"][1]}
    tensors |= {f"cuda.{i}": state for i, state in enumerate(generators.get("cuda", []))}
    save_file(tensors, folder / "random.safetensors")
    name, _, position, has_gauss, cached = generators["numpy"]
    plain = {"python": generators["python"], "numpy": [name, position, has_gauss, cached]}
    (folder / "state.json").write_text(json.dumps({"values": values, "random": plain}), encoding="utf-8")


def load_training_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put back what `save_training_state` wrote and return its `values`; raises ValueError where it is
    damaged.
    """
    load_trained_weights(folder, module)
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in _read(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    saved = _read_json(folder)
    tensors = _read(folder / "random.safetensors")
    name, position, has_gauss, cached = saved["random"]["numpy"]
    generators: dict[str, Any] = {
        "python": saved["random"]["python"],
        "numpy": [name, tensors["numpy"], position, has_gauss, cached],
        "torch": tensors["torch"],
    }
    cuda = [tensors[f"cuda.{i}"] for i in range(sum(key.startswith("cuda.") for key in tensors))]
    restore_random_state(generators | ({"cuda": cuda} if cuda else {}))
    return saved["values"]


def save_trained_weights(folder: Path, module: nn.Module) -> None:
    """Write the trained parameters alone; called inside `whole_weights`."""
    weights = {name: p.detach().contiguous() for name, p in module.named_parameters() if p.requires_grad}
    save_file(weights, folder / "weights.safetensors")


def load_trained_weights(folder: Path, module: nn.Module) -> None:
    """Put back what `save_trained_weights` wrote; raises ValueError where the model is another."""
    with whole_weights(module, change=True):
        _load_trained_weights(folder, module)


def _load_trained_weights(folder: Path, module: nn.Module) -> None:
    weights = _read(folder / "weights.safetensors")
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    shapes = {(name, tensor.shape) for name, tensor in weights.items()}
    differing = sorted({name for name, _ in shapes ^ {(name, p.shape) for name, p in trained.items()}})
    if differing:
        raise ValueError(
            f"{folder} holds the state of another model: {', '.join(differing[:3])} ... differ; "
            "resume with the settings it was written with, or start again with overwrite=true"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def read_values(folder: Path) -> dict[str, Any]:
    """The plain values of a state."""
    return _read_json(folder)["values"]


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "state.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.keys() != {"values", "random"}:
            raise ValueError("it does not hold what a state holds")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return found


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged ({error}): delete {path.parent}, and resume=true goes on from the state before "
        "it where one was kept (keep_last), else from the start"
    )


def permutation(size: int, *seed: int) -> np.ndarray[Any, Any]:
    """A permutation of `size` that depends on the seeds alone, not on any generator's state."""
    return np.random.default_rng(seed).permutation(size)
