"""LoRA adapters: adding them, saving them, and merging them into a copy of the base for the next stage."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from rlhf.models.loading import LoadOptions, load_causal_lm, new_reward_model
from rlhf.models.lora import make_lean
from rlhf.rows import first_line

# The adapter of a model's own task: the name that peft gives an adapter without one.
POLICY = "default"


def add_lora(model: Any, adapter: Any, *, task: str | None) -> Any:
    """Freeze a model and add a LoRA adapter in float32.

    `task` is "CAUSAL_LM", "SEQ_CLS" (its score head trains too), or None for a critic, whose value head lies
    outside. LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685; QLoRA: Dettmers et al. 2023,
    https://arxiv.org/abs/2305.14314
    """
    if adapter.quantization != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = adapter.target_modules
    settings = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=["score"] if task is None else None,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    try:
        model = get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(
            f"adapter.target_modules={targets}: {first_line(error)}; adapter.target_modules=all-linear fits "
            "every model"
        ) from error
    make_lean(model)
    return model


def add_adapter(model: PeftModel, *, name: str) -> None:
    """Put a new trained adapter beside a model's own, of the same form; at first it changes nothing."""
    settings = copy.deepcopy(model.peft_config[POLICY])
    settings.task_type = None
    with _same_flags(model):
        model.add_adapter(name, settings)
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(True)


def uses_lora(adapter: Any) -> bool:
    """Whether the `adapter` group trains LoRA weights, not the model's own."""
    return adapter.name != "none"


def merged_copy(base: str, adapter_folder: Path, *, task: str, trust_remote_code: bool = False) -> Any:
    """Merge a saved adapter into a float32 copy of its base, read anew: the base itself is never rounded
    twice.
    """
    options = LoadOptions(dtype=torch.float32, attention=None, trust_remote_code=trust_remote_code)
    model = new_reward_model(base, options) if task == "SEQ_CLS" else load_causal_lm(base, options)
    return PeftModel.from_pretrained(model, str(adapter_folder)).merge_and_unload()


def trainable_parameters(model: Any, *, adapter: str | None = None) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer shall step: of a LoRA model, those of `adapter` where it is named."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if adapter is None or not hasattr(model, "peft_config"):
        return [parameter for _, parameter in trained]
    return [parameter for name, parameter in trained if f".{adapter}." in name]


def read_adapter(model: PeftModel, folder: Path, *, name: str, trained: bool) -> None:
    """Put the LoRA weights that lie in `folder` beside a model's own adapter; a score head there is left out.

    Raises ValueError where they do not fit the model.
    """
    settings = LoraConfig.from_pretrained(str(folder))
    settings.task_type, settings.modules_to_save, settings.inference_mode = None, None, False
    weights = load_file(folder / "adapter_model.safetensors")
    weights = {key: tensor for key, tensor in weights.items() if ".lora_" in key}
    try:
        with _same_flags(model):
            model.add_adapter(name, settings)
    except ValueError as error:
        raise ValueError(f"the adapter in {folder} does not fit the policy: {error}") from error
    with _same_flags(model):
        report: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
    missing = [key for key in report.missing_keys if f".{name}." in key]
    if missing or report.unexpected_keys:
        raise ValueError(
            f"the adapter in {folder} does not fit the policy: {(missing or report.unexpected_keys)[0]}"
        )
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.requires_grad_(trained)
    make_lean(model)


@contextlib.contextmanager
def acting(model: Any, adapter: str | None) -> Iterator[None]:
    """Let one LoRA adapter of a model act, or none; a model without adapters stays as it is.

    What is trained stays as it is: peft's own switches make only the adapter that acts trainable, and a
    backward pass after the next switch would leave the others without gradients.
    """
    layers = vars(model).get("lora_layers")
    if not layers:  # a walk through all modules, which is not made again
        layers = vars(model)["lora_layers"] = [
            each for each in model.modules() if isinstance(each, LoraLayer)
        ]
    wanted = [] if adapter is None else [adapter]
    if not layers or layers[0].active_adapters == wanted:
        yield
        return
    before = layers[0].active_adapters
    _activate(layers, wanted)
    try:
        yield
    finally:
        _activate(layers, before)


def _activate(layers: list[Any], names: list[str]) -> None:
    for layer in layers:
        layer._active_adapter = names


@contextlib.contextmanager
def _same_flags(model: torch.nn.Module) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
