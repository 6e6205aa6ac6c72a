"""AdamW whose moments (ZeRO 1), gradients (ZeRO 2) and weights (ZeRO 3) are shared out among the processes by
DeepSpeed.

Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054. Weights are in float32, and whole in every process
below ZeRO 3: the numbers are those of torch's AdamW in one process.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf.hints import hint
from rlhf.processes import Processes
from rlhf.settings import WEIGHTS, zero_stage

T = TypeVar("T")

MOMENTS = ("exp_avg", "exp_avg_sq")
SHARED_MEMORY_OP = "deepspeed_shm_comm"


class Root(nn.Module):
    """What DeepSpeed's hooks hang on under ZeRO 3: the modules of one model, which passes are made through.

    `template` is that model without its weights.
    """

    def __init__(self, modules: Sequence[nn.Module], *, template: Any | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.work: Callable[[], Any] | None = None
        self.engine: Any = None
        object.__setattr__(self, "template", template)  # no part of it

    template: Any | None

    def run(self, work: Callable[[], T]) -> T:
        """The result of passes through the modules; all processes make as many."""
        self.work = work
        try:
            with local_rank():
                return self()
        finally:
            self.work = None

    def release(self) -> None:
        """Let go of weights that a backward pass has left gathered: DeepSpeed keeps those of modules whose
        input has no gradient.
        """
        assert self.engine is not None, "it has no hooks yet"
        own = self.engine.optimizer
        getattr(own, "parameter_offload", own).release_backward_leftovers()

    def forward(self) -> Any:
        """What `run` was given to do: DeepSpeed begins a pass where this is called."""
        assert self.work is not None, "passes are made by run"
        return self.work()


class ShardedAdamW(torch.optim.Optimizer):
    """Steps several models' parameter groups; each model's gradient is clipped by its own norm."""

    def __init__(  # noqa: PLR0913 (what is stepped, and how)
        self,
        models: Sequence[Sequence[dict[str, Any]]],
        settings: dict[str, Any],
        processes: Processes,
        *,
        clip: float,
        epsilon: float,
        roots: Sequence[Root | None] = (),
    ) -> None:
        """`models`: the parameter groups of each, with `lr` and `weight_decay`; weights in float32.

        `roots`: of those models whose trained weights are shared out too.
        """
        groups = [group for model in models for group in model]
        super().__init__(groups, {"eps": epsilon, "betas": (0.9, 0.999)})
        self.count, self.num_steps = processes.count, 0
        self._gathered: dict[str, Any] | None = None
        taken = 0
        self.engines: list[Any] = []
        self.roots = [*roots, *[None] * (len(models) - len(roots))]
        for model, root in zip(models, self.roots, strict=True):
            own = self.param_groups[taken : taken + len(model)]
            taken += len(model)
            self.engines.append(_engine(own, {**settings, "gradient_clipping": clip}, epsilon, root))

    def backward(self, loss: Tensor, *, model: int = 0, last: bool) -> None:
        """Add the gradient of a loss, whose sum over all processes and calls is what a model minimises.

        All processes call this as often, with graphs that reach the same parameters. `last`: a step follows.
        """
        engine = self.engines[model]
        engine.set_gradient_accumulation_boundary(last)
        with local_rank():
            engine.optimizer.clear_backward_seen_flag()  # as its engine's own forward does
            engine.backward(self.count * loss)  # DeepSpeed takes the mean over processes
            root = self.roots[model]
            if root is not None:
                root.release()

    def norms(self) -> list[float]:
        """The norm of each model's whole gradient before it is clipped, after the last backward; not a number
        where the gradient is not finite.
        """
        norms = [float(_norm(engine.optimizer)) for engine in self.engines]
        return [norm if norm >= 0 else math.nan for norm in norms]  # DeepSpeed says -1

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip, and change the weights by the learning rates in `param_groups`."""
        groups = iter(self.param_groups)
        for engine in self.engines:
            for group in engine.optimizer.param_groups:
                group["lr"] = next(groups)["lr"]
            with local_rank():
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
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        for engine in self.engines:
            engine.optimizer.refresh_fp32_params()
        if not state_dict["state"]:
            return
        self.num_steps = int(state_dict["state"][0]["step"])
        for engine in self.engines:
            for flat in _partitions(engine.optimizer):
                step = torch.tensor(float(self.num_steps))
                moments = {key: torch.zeros_like(flat) for key in MOMENTS}
                engine.optimizer.optimizer.state[flat] = {"step": step, **moments}
        self._link()
        for index, parameter in enumerate(self._parameters()):
            for key in MOMENTS:
                _set_moment(parameter, key, state_dict["state"][index][key].to(parameter.device))

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _link(self) -> None:
        """Tell DeepSpeed where the moments of each parameter lie; it does so for the first group alone."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for own in (engine.optimizer for engine in self.engines):
            if _shards_weights(own):
                continue  # it knows
            for group, flat in zip(own.bit16_groups, own.single_partition_of_fp32_groups, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, own.optimizer.state)


def _engine(groups: list[dict[str, Any]], settings: dict[str, Any], epsilon: float, root: Root | None) -> Any:
    base = torch.optim.AdamW(
        [{**group, "params": list(group["params"])} for group in groups], eps=epsilon, fused=True
    )
    trained = nn.ParameterList([parameter for group in groups for parameter in group["params"]])
    if root is not None and hasattr(trained[0], "ds_id"):
        return initialize(root, settings, base)
    if zero_stage(settings) == WEIGHTS:  # of adapters, which every process has whole
        offload = settings["zero_optimization"].get("offload_optimizer")
        settings = {**settings, "zero_optimization": {"stage": 2, "offload_optimizer": offload}}
    return initialize(trained, settings, base)


def initialize(model: nn.Module, settings: dict[str, Any], optimizer: Any | None = None) -> Any:
    """DeepSpeed's engine for a model; without an optimizer it is frozen, and its weights are shared out."""
    deepspeed = load_deepspeed()
    frozen_type = next(model.parameters()).dtype if optimizer is None else torch.float32
    with local_rank():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=_whole_configuration(settings, frozen_type),
            dist_init_required=False,
        )
    if isinstance(model, Root):
        object.__setattr__(model, "engine", engine)  # which holds this module
    return engine


def share_out(root: Root, settings: dict[str, Any]) -> None:
    """Leave each process its part of a root's weights: those of the first one count."""
    kind = next(root.parameters()).dtype
    zero = load_deepspeed().zero
    with local_rank():
        zero.Init(module=root, config_dict_or_path=_whole_configuration(settings, kind), dtype=kind)


def check_accepted(settings: dict[str, Any]) -> None:
    """Raise ValueError, in one line, for a setting of zero_optimization that DeepSpeed does not take."""
    load_deepspeed()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**settings["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        guess = hint(key, DeepSpeedZeroConfig.model_fields) if first["type"] == "extra_forbidden" else ""
        raise ValueError(
            f"zero_optimization.{key}={first['input']} in engine.deepspeed or engine.deepspeed_config: "
            f"DeepSpeed says {first['msg']}; {guess}".rstrip("; ")
        ) from None


def _whole_configuration(settings: dict[str, Any], kind: torch.dtype) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": kind == torch.bfloat16},
        **settings,
    }


def _shards_weights(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _partitions(optimizer: Any) -> list[Tensor]:
    """This process's parts of the trained weights, for which the moments are held."""
    if _shards_weights(optimizer):
        return optimizer.fp32_partitioned_groups_flat
    return optimizer.single_partition_of_fp32_groups


def _norm(optimizer: Any) -> Any:
    """The norm of the whole gradient, in every process; -1 where it is not finite."""
    if not _shards_weights(optimizer):
        return optimizer.scaled_global_norm()
    from deepspeed.runtime.utils import combine_grad_norm_groups

    return combine_grad_norm_groups(optimizer._get_norm_groups())


def _set_moment(parameter: nn.Parameter, key: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    own = getattr(parameter, "_z3_optimizer", None)
    if own is None:
        safe_set_full_optimizer_state(parameter, value, key)
        return
    # DeepSpeed's own function fails where the numbers cannot be shared out evenly
    place, _ = own._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    start = place.numel() * own._get_param_partition_rank(parameter)
    part = value.flatten()[start : start + place.numel()]
    place[: part.numel()].copy_(part)


def load_deepspeed() -> Any:
    """The library, ready for use: it wants a group of processes, be it of one."""
    with _no_compiler_messages():
        import deepspeed

        # Compiled at its first use, for a gain among processes of one machine only: gloo will do.
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
    _join_alone()
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
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextlib.contextmanager
def local_rank() -> Iterator[None]:
    """Tell DeepSpeed, and no other library, that this process's device is the first that it sees: around all
    that it does.
    """
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        if before is not None:
            os.environ["LOCAL_RANK"] = before
