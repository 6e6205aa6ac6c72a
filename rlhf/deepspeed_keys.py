"""Which settings DeepSpeed 0.19 has, of what kind each is, and which of them a run takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """The values that a setting may have, and their description in an error."""

    expected: str
    fits: Callable[[Any], bool]


@dataclass(frozen=True)
class Refused:
    """A setting that must be as it is without being given, or off; `why` it is not supported."""

    why: str
    default: Any = None

    def holds(self, value: Any) -> bool:
        """Whether a value is refused."""
        if isinstance(value, dict):
            value = value.get("enabled", True) not in (False, "auto")
        return value != self.default and bool(value or self.default)


def _is_whole(value: Any) -> bool:
    whole = value.is_integer() if isinstance(value, float) else isinstance(value, int)
    return whole and not isinstance(value, bool)


ANY = Kind("", lambda value: True)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a whole number that is not negative", lambda value: _is_whole(value) and value >= 0)
EVEN = Kind("an even whole number", lambda value: COUNT.fits(value) and value % 2 == 0)
ABOVE_ZERO = Kind("a whole number above 0", lambda value: _is_whole(value) and value > 0)
DEVICE = Kind("none or cpu (nvme is not supported)", lambda value: value in ("none", "cpu"))
NAMES = Kind("a list", lambda value: isinstance(value, list))

OTHER_NUMBERS = "it changes the results"
UNREAD = "nothing here reads it"
FOR_NVME = "it is for nvme, which is not supported"

OFFLOAD = {
    "device": DEVICE,
    "pin_memory": SWITCH,
    "nvme_path": Refused(FOR_NVME),
}
ZERO: dict[str, Any] = {
    "stage": ANY,  # which the engine says
    "contiguous_gradients": SWITCH,
    "reduce_scatter": SWITCH,
    "reduce_bucket_size": ABOVE_ZERO,
    "use_multi_rank_bucket_allreduce": SWITCH,
    "allgather_partitions": SWITCH,
    "allgather_bucket_size": EVEN,
    "overlap_comm": SWITCH,
    "compute_grad_norm": Refused("gradients are clipped by their norm", True),
    "load_from_fp32_weights": Refused(UNREAD, True),
    "elastic_checkpoint": Refused(UNREAD, False),
    "offload_param": {
        **OFFLOAD,
        "buffer_count": Refused(FOR_NVME, 5),
        "buffer_size": Refused(FOR_NVME, 10**8),
        "max_in_cpu": Refused(FOR_NVME, 10**9),
    },
    "offload_optimizer": {
        **OFFLOAD,
        "buffer_count": Refused(FOR_NVME, 4),
        "pipeline_read": Refused(FOR_NVME, False),
        "pipeline_write": Refused(FOR_NVME, False),
        "fast_init": Refused(FOR_NVME, False),
        "ratio": Refused("the optimizer steps in one place", 1.0),
        "super_offload": Refused("it brings an optimizer of its own", False),
        "cpuadam_cores_perc": Refused("it is for super_offload, which is not supported", 0.8),
    },
    "zenflow": Refused(OTHER_NUMBERS),
    "sub_group_size": COUNT,
    "cpu_offload_param": Refused("give offload_param"),
    "cpu_offload_use_pin_memory": Refused("give pin_memory in offload_optimizer"),
    "cpu_offload": Refused("give offload_optimizer"),
    "stage3_prefetch_bucket_size": COUNT,
    "stage3_param_persistence_threshold": COUNT,
    "stage3_model_persistence_threshold": COUNT,
    "stage3_max_live_parameters": COUNT,
    "stage3_max_reuse_distance": COUNT,
    "stage3_gather_16bit_weights_on_model_save": SWITCH,  # which is done in any case
    "stage3_gather_fp16_weights_on_model_save": Refused(
        "give stage3_gather_16bit_weights_on_model_save", False
    ),
    "stage3_module_granularity_threshold": Refused("DeepSpeed fails with it", 0),
    "stage3_use_all_reduce_for_fetch_params": SWITCH,
    "stage3_allgather_sequential": SWITCH,
    "ignore_unused_parameters": SWITCH,
    "legacy_stage1": Refused("DeepSpeed has it no more", False),
    "round_robin_gradients": SWITCH,
    "parameter_alignment": SWITCH,
    "zero_hpz_partition_size": Refused(OTHER_NUMBERS, 1),
    "zero_quantized_weights": Refused(OTHER_NUMBERS, False),
    "zero_quantized_nontrainable_weights": Refused(OTHER_NUMBERS, False),
    "zero_quantized_gradients": Refused(OTHER_NUMBERS, False),
    "memory_efficient_linear": SWITCH,
    "pipeline_loading_checkpoint": Refused(UNREAD, False),
    "override_module_apply": Refused(UNREAD, True),
    "log_trace_cache_warnings": SWITCH,
    "enable_sanity_checks": SWITCH,
    "save_muon_momentum_buffer_in_memory": Refused("the optimizer is AdamW", False),
    "leaf_module": Refused("which modules are gathered as one is DeepSpeed's to say"),
}
# Settings that DeepSpeed takes as they are.
TAKEN: dict[str, Any] = {
    "zero_optimization": ZERO,
    "comms_logger": {
        "enabled": SWITCH,
        "prof_all": SWITCH,
        "prof_ops": NAMES,
        "verbose": SWITCH,
        "debug": SWITCH,
    },
    "disable_python_gc": SWITCH,
    "dump_state": SWITCH,
    "memory_breakdown": SWITCH,
    "steps_per_print": ABOVE_ZERO,
}
# Settings that keys of this project say. They may stand in a file where they say the same.
OURS: dict[str, Any] = {
    "train_batch_size": ANY,
    "train_micro_batch_size_per_gpu": ANY,
    "gradient_accumulation_steps": ANY,
    "gradient_clipping": ANY,
    "communication_data_type": ANY,
    "optimizer": {
        "type": ANY,
        "params": {
            "lr": ANY,
            "betas": ANY,
            "eps": ANY,
            "weight_decay": ANY,
            "torch_adam": SWITCH,
            "adam_w_mode": Refused(OTHER_NUMBERS, True),
            "bias_correction": Refused(OTHER_NUMBERS, True),
            "amsgrad": Refused(OTHER_NUMBERS, False),
        },
    },
    "scheduler": {"type": ANY, "params": ANY},
    "fp16": {
        "enabled": ANY,
        "auto_cast": ANY,
        "loss_scale": ANY,
        "initial_scale_power": ANY,
        "loss_scale_window": ANY,
        "hysteresis": ANY,
        "consecutive_hysteresis": ANY,
        "min_loss_scale": ANY,
        "fp16_master_weights_and_grads": Refused(OTHER_NUMBERS, False),
    },
    "bf16": {
        "enabled": ANY,
        "immediate_grad_update": ANY,
        "check_grad_overflow": ANY,
        "bf16_master_weights_and_grads": Refused(OTHER_NUMBERS, False),
        "bf16_optimizer_states": Refused(OTHER_NUMBERS, False),
    },
    "torch_autocast": {"enabled": ANY, "dtype": ANY, "lower_precision_safe_modules": ANY},
    "zero_allow_untested_optimizer": ANY,
    "zero_force_ds_cpu_optimizer": ANY,
}
# Settings of DeepSpeed's that change what is computed, or would go unread here. They may be switched off.
NOT_SUPPORTED = (
    "activation_checkpointing",
    "aio",
    "amp",
    "autotuning",
    "bfloat16",
    "checkpoint",
    "compile",
    "compression_training",
    "csv_monitor",
    "curriculum_learning",
    "data_efficiency",
    "data_types",
    "dataloader_drop_last",
    "disable_allgather",
    "eigenvalue",
    "elasticity",
    "flops_profiler",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "hybrid_engine",
    "load_universal_checkpoint",
    "pipeline",
    "prescale_gradients",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "weight_quantization",
    "zero_force_ds_cpu_initialization",
)
KEYS = {**TAKEN, **OURS, **dict.fromkeys(NOT_SUPPORTED, Refused(""))}
