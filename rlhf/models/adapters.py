"""LoRA adapters: adding them, saving them, and merging them into a copy of the base for the next stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers.pytorch_utils import Conv1D

from rlhf.models.loading import LoadOptions, load_causal_lm, new_reward_model


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
    return get_peft_model(model, settings)


def uses_lora(adapter: Any) -> bool:
    """Whether the `adapter` group trains LoRA weights, not the model's own."""
    return adapter.name != "none"


def merged_copy(base: str, adapter_folder: Path, *, task: str) -> Any:
    """Merge a saved adapter into a float32 copy of its base, read anew: the base itself is never rounded
    twice.
    """
    options = LoadOptions(dtype=torch.float32)
    model = new_reward_model(base, options) if task == "SEQ_CLS" else load_causal_lm(base, options)
    return PeftModel.from_pretrained(model, str(adapter_folder)).merge_and_unload()


def trainable_parameters(model: Any) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer shall step."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
