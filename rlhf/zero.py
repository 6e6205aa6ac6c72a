"""AdamW whose moments (ZeRO 1), and gradients as well (ZeRO 2), are shared out among the processes by
DeepSpeed.

Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054. The weights stay whole in every process, and in
float32: the numbers are those of torch's AdamW in one process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.processes import Processes

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARED_MEMORY_OP = "deepspeed_shm_comm"

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
                f"engine.deepspeed_config={path} needs DeepSpeed: set engine=zero1, zero2 or zero2_offload"
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


class ShardedAdamW(torch.optim.Optimizer):
    """Steps several models' parameter groups; each model's gradient is clipped by its own norm."""

    def __init__(
        self,
        models: Sequence[Sequence[dict[str, Any]]],
        settings: dict[str, Any],
        processes: Processes,
        *,
        clip: float,
        epsilon: float,
    ) -> None:
        """`models`: the parameter groups of each, with `lr` and `weight_decay`; weights in float32."""
        groups = [group for model in models for group in model]
        super().__init__(groups, {"eps": epsilon, "betas": (0.9, 0.999)})
        self.count, self.num_steps = processes.count, 0
        self._gathered: dict[str, Any] | None = None
        taken = 0
        self.engines = []
        for model in models:
            own = self.param_groups[taken : taken + len(model)]
            taken += len(model)
            self.engines.append(_engine(own, {**settings, "gradient_clipping": clip}, epsilon))

    def backward(self, loss: Tensor, *, model: int = 0, last: bool) -> None:
        """Add the gradient of a loss, whose sum over all processes and calls is what a model minimises.

        All processes call this as often, with graphs that reach the same parameters. `last`: a step follows.
        """
        engine = self.engines[model]
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(self.count * loss)  # DeepSpeed takes the mean over processes

    def norms(self) -> list[float]:
        """The norm of each model's whole gradient before it is clipped, after the last backward; not a number
        where the gradient is not finite.
        """
        norms = [float(engine.optimizer.scaled_global_norm()) for engine in self.engines]
        return [norm if norm >= 0 else math.nan for norm in norms]  # DeepSpeed says -1

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip, and change the weights by the learning rates in `param_groups`."""
        groups = iter(self.param_groups)
        for engine in self.engines:
            for group in engine.optimizer.param_groups:
                group["lr"] = next(groups)["lr"]
            engine.step()
        self.num_steps += 1
        if self.num_steps == 1:
            self._link()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: a step leaves no gradients."""

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """All processes enter together; inside, each may ask for the `state_dict` by itself."""
        self._gathered = self.state_dict()
        try:
            yield
        finally:
            self._gathered = None

    def state_dict(self) -> dict[str, Any]:
        """What torch's AdamW over the same groups would hold, whole; all processes call this together."""
        if self._gathered is not None:
            return self._gathered
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, dict[str, Tensor]] = {}
        for index, parameter in enumerate(self._parameters() if self.num_steps else []):
            state[index] = {"step": torch.tensor(float(self.num_steps))}
            state[index] |= {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in MOMENTS}
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, of whatever engine, and from the weights as they now are."""
        from deepspeed.utils import safe_set_full_optimizer_state

        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for engine in self.engines:
            engine.optimizer.refresh_fp32_params()
        if not state_dict["state"]:
            return
        self.num_steps = int(state_dict["state"][0]["step"])
        for engine in self.engines:
            for flat in engine.optimizer.single_partition_of_fp32_groups:
                step = torch.tensor(float(self.num_steps))
                moments = {key: torch.zeros_like(flat) for key in MOMENTS}
                engine.optimizer.optimizer.state[flat] = {"step": step, **moments}
        self._link()
        for index, parameter in enumerate(self._parameters()):
            for key in MOMENTS:
                value = state_dict["state"][index][key].to(parameter.device)
                safe_set_full_optimizer_state(parameter, value, key)

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _link(self) -> None:
        """Tell DeepSpeed where the moments of each parameter lie; it does so for the first group alone."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for engine in self.engines:
            own = engine.optimizer
            for group, flat in zip(own.bit16_groups, own.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, own.optimizer.state)


def _engine(groups: list[dict[str, Any]], settings: dict[str, Any], epsilon: float) -> Any:
    deepspeed = _deepspeed()
    _join_alone()
    base = torch.optim.AdamW(
        [{**group, "params": list(group["params"])} for group in groups], eps=epsilon, fused=True
    )
    trained = nn.ParameterList([parameter for group in groups for parameter in group["params"]])
    with _local_rank():
        engine, *_ = deepspeed.initialize(
            model=trained,
            optimizer=base,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                **settings,
            },
            dist_init_required=False,
        )
    return engine


def _deepspeed() -> Any:
    with _no_compiler_messages():
        import deepspeed

        # Compiled at its first use, for a gain among processes of one machine only: gloo will do.
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    return deepspeed


@contextlib.contextmanager
def _no_compiler_messages() -> Iterator[None]:
    """DeepSpeed tries which of its parts could be compiled; what the linker says of them is no error."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _join_alone() -> None:
    """DeepSpeed wants a group of processes, be it of one."""
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextlib.contextmanager
def _local_rank() -> Iterator[None]:
    """Tell DeepSpeed, and no other library, that this process's device is the first that it sees."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        if before is not None:
            os.environ["LOCAL_RANK"] = before
