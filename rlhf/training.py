"""What sft and rm share around transformers' Trainer: its arguments, the metrics log, and saving of what
was trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback

from rlhf.checkpoint import StageFolder
from rlhf.engine import Engine
from rlhf.files import save_model_folder
from rlhf.metrics import MetricLog, progress
from rlhf.models.adapters import POLICY, merged_copy, trainable_parameters, uses_lora
from rlhf.models.sharded import root_of, unsharded, whole_weights
from rlhf.parents import Parent, origin
from rlhf.processes import by_main
from rlhf.settings import MAX_GRAD_NORM
from rlhf.sources import is_path_like
from rlhf.zero import ShardedAdamW


def trainer_arguments(config: Any, folder: StageFolder, engine: Engine, num_rows: int) -> dict[str, Any]:
    """Arguments of transformers' TrainingArguments for the keys that sft and rm have in common.

    `batch_size` rows make one optimizer step, in micro-batches of `engine.micro_batch_size`.
    """
    micro_batch_size = min(config.engine.micro_batch_size or config.batch_size, config.batch_size)
    if config.batch_size % micro_batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} is no multiple of engine.micro_batch_size={micro_batch_size}"
        )
    if config.save_steps % config.log_steps:
        raise ValueError(
            f"save_steps={config.save_steps} is no multiple of log_steps={config.log_steps}: "
            "a resumed run would average its first log line over fewer steps"
        )
    steps = max(1, int(num_rows / config.batch_size * config.epochs))
    return {
        "output_dir": str(folder.path / "state"),
        "per_device_train_batch_size": micro_batch_size,
        "per_device_eval_batch_size": micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // micro_batch_size,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "warmup_steps": int(steps * config.warmup_ratio),
        "weight_decay": config.weight_decay,
        "lr_scheduler_type": "linear",
        "max_grad_norm": MAX_GRAD_NORM,
        "gradient_checkpointing": config.gradient_checkpointing,
        "logging_steps": config.log_steps,
        "logging_nan_inf_filter": False,
        # what DeepSpeed shares out all processes bring together for the first one, which writes it
        "save_strategy": "steps" if engine.processes.is_main or engine.deepspeed else "no",
        "save_steps": config.save_steps,
        "save_total_limit": config.keep_last,
        "seed": config.seed,
        "bf16": engine.dtype.itemsize == 2,
        "use_cpu": engine.device.type == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": engine.device.type == "cuda",
    }


class SharedSteps(Trainer):
    """A Trainer whose `compute_loss` computes one process's share of each batch; the shares' gradients are
    summed before every optimizer step. To transformers each process is alone and holds the whole batch.
    """

    engine: Engine
    sharded: ShardedAdamW | None = None

    @property
    def own_model(self) -> nn.Module:
        """What is trained."""
        assert self.model is not None
        return self.model

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; shared out among the processes where the engine does so."""
        optimizer = super().create_optimizer(model)
        if self.engine.deepspeed is not None and self.sharded is None:
            groups = [group for group in optimizer.param_groups if group["params"]]
            sharded = self.engine.adamw(
                [groups], clip=MAX_GRAD_NORM, epsilon=self.args.adam_epsilon, roots=[root_of(self.own_model)]
            )
            assert isinstance(sharded, ShardedAdamW)
            self.sharded = self.optimizer = optimizer = sharded
            self.accelerator.backward = self._backward
        return optimizer

    def _backward(self, loss: Tensor, **_: Any) -> None:
        assert self.sharded is not None
        self.sharded.backward(loss, last=self.accelerator.sync_gradients)

    def _clip_grad_norm(self, model: Any) -> Any:
        return super()._clip_grad_norm(model) if self.sharded is None else self.sharded.norms()[0]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        gathered = contextlib.nullcontext() if self.sharded is None else self.sharded.gathered()
        with gathered, whole_weights(self.own_model):
            if self.engine.processes.is_main:
                super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with whole_weights(self.own_model, change=True):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def training_step(self, *arguments: Any, **more: Any) -> Tensor:
        """The gradient of a micro-batch; behind the last one of a step those of all processes are summed."""
        loss = super().training_step(*arguments, **more)
        if self.sharded is None and self.engine.processes.count > 1 and self.accelerator.sync_gradients:
            trained = trainable_parameters(self.model)
            sums = self.engine.processes.sum_gradients(trained, [parameter.grad for parameter in trained])
            for parameter, gradient in zip(trained, sums, strict=True):
                parameter.grad = gradient
        return loss

    def of_all(self, loss: Tensor) -> Tensor:
        """The value of all shares' losses together, with the gradient of this share's."""
        if self.engine.processes.count == 1:
            return loss
        parts = torch.stack(self.engine.processes.all_of(loss.detach().cpu()))
        return loss + (parts.sum().to(loss.device) - loss.detach())


class LogCallback(TrainerCallback):
    """One progress bar, and the Trainer's numbers in the metrics log; stops where the loss is not finite."""

    def __init__(self, log: MetricLog, description: str) -> None:
        self.log, self.description = log, description
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the bar, and forget lines that a resumed run writes again."""
        self.log.cut_after(state.global_step)
        self.bar = progress(
            state.max_steps, initial=state.global_step, unit="step", description=self.description
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the bar; the last step is logged too, whatever `log_steps`."""
        self.bar.update(1)
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self.bar.close()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Write one line per logging step; evaluations and the run's summary are not logged here."""
        numbers = {
            name: float(value) for name, value in (logs or {}).items() if isinstance(value, int | float)
        }
        if "loss" not in numbers:
            return
        loss = numbers["loss"]
        if not loss < float("inf"):
            raise ValueError(
                f"the loss is {loss} at step {state.global_step}; "
                "lower learning_rate, or use engine.dtype=float32"
            )
        numbers.pop("num_tokens", None)  # trl counts from the start of the process, not of the run
        self.log.write(state.global_step, numbers)
        self.bar.set_postfix(loss=f"{loss:.3f}")


def attach_log(trainer: Trainer, log: MetricLog, description: str) -> None:
    """Report a trainer's progress through our log alone."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(LogCallback(log, description))


def full_precision(config: Any, folder: StageFolder, model: Any, *, base: str, task: str) -> Any:
    """The trained model with its own weights in full: with LoRA, the adapter is saved and merged into a
    copy of `base`.
    """
    if not uses_lora(config.adapter):
        return unsharded(model)
    adapter_folder = folder.path / "adapter"
    by_main(model.save_pretrained)(str(adapter_folder), selected_adapters=[POLICY])
    return merged_copy(base, adapter_folder, task=task, trust_remote_code=config.model.trust_remote_code)


def write_model(folder: StageFolder, model: Any, tokenizer: Any, card: str, *, name: str = "model") -> None:
    """Write `model/`, or a folder of another name, with weights, tokenizer and card, whole or not at all."""

    def save(path: Path) -> None:
        before, model.config.use_cache = model.config.use_cache, True
        model.save_pretrained(str(path))
        model.config.use_cache = before  # it may train on
        tokenizer.save_pretrained(str(path))

    save_model_folder(folder.path / name, save, card)


def model_card(
    title: str, config: Any, parents: Sequence[Parent], facts: dict[str, Any], *, use: str = ""
) -> str:
    """A model card in the hub's format: what it is and was made of, what was measured, how it is used."""
    keys = ("epochs", "batch_size", "learning_rate", "seed")
    began = origin(parents)
    rows = {
        "began with": began,
        "data": config.data.name,
        "adapter": config.adapter.name,
        **{key.replace("_", " "): getattr(config, key) for key in keys},
        **facts,
        **{f"made from: {p.key}": f"`{p.path}`, SHA-256 {p.sha256 or 'unknown'}" for p in parents},
    }
    hub_name = {} if is_path_like(began) else {"base_model": began}
    front = yaml.safe_dump({**hub_name, "tags": ["rlhf"]}, allow_unicode=True)
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    table = f"| what | value |\n|---|---|\n{lines}"
    return f"---\n{front}---\n\n# {title}\n\n{table}" + (f"\n{use}\n" if use else "")
