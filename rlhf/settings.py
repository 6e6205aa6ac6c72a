"""The settings of every stage: which keys there are and of which type.

The values stand in configs/*.yaml; no field here has a default. Free-form parts (a data source, a scorer, the
systems to compare) are typed Any or dict: strings or mappings that `rlhf.validation` checks.
"""

from dataclasses import dataclass
from typing import Any


@dataclass
class LearningRates:
    sft: float
    rm: float
    ppo: float


@dataclass
class Model:
    name: str
    path: str
    revision: str | None
    trust_remote_code: bool
    attention: str | None
    learning_rate: LearningRates


@dataclass
class Adapter:
    name: str
    quantization: str
    r: int
    alpha: float
    dropout: float
    target_modules: Any
    learning_rate: LearningRates


@dataclass
class Engine:
    name: str
    device: str
    dtype: str
    micro_batch_size: int | None
    tokens_per_pass: int | None
    kept_tokens: int | None
    threads: int | None
    workers: int | None
    deepspeed: Any
    deepspeed_config: str | None


MAX_GRAD_NORM = 1.0  # of sft and rm
WEIGHTS = 3  # the stage of ZeRO that shares out weights


def zero_stage(deepspeed: dict[str, Any] | None) -> int:
    """The stage of ZeRO that a DeepSpeed configuration asks for; 0 where there is none."""
    return (deepspeed or {}).get("zero_optimization", {}).get("stage", 0)


@dataclass
class Split:
    """Two sources: a path, or a mapping with the fields of a Source, or a list of these, or null."""

    train: Any
    eval: Any


@dataclass
class PromptSources:
    collect: Any
    ppo: Any
    evaluate: Any


@dataclass
class LabelledSources:
    labeller: Any
    gold: Any


@dataclass
class Budget:
    sft_epochs: float
    sft_examples: int | None
    collect_prompts: int | None
    rm_epochs: float
    ppo_updates: int
    ppo_batch_size: int
    evaluate_prompts: int | None


@dataclass
class Data:
    name: str
    build: str | None
    folder: str | None
    format: str
    max_prompt_tokens: int
    max_response_tokens: int
    on_bad_row: str
    demonstrations: Split
    ranked: Split
    prompts: PromptSources
    labelled: LabelledSources
    budget: Budget


@dataclass
class Decoding:
    name: str
    greedy: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    penalty_scope: str
    num_beams: int
    length_penalty: float


@dataclass
class KL:
    controller: str
    coef: float
    target: float
    horizon: int


@dataclass
class GAE:
    gamma: float
    lam: float


@dataclass
class Clip:
    policy: float
    value: float
    grad_norm: float


@dataclass
class Mixer:
    updates: int | None
    delta: int
    xent_coef: float


@dataclass
class StageConfig:
    """What every stage has."""

    name: str
    runs: str
    seed: int
    overwrite: bool
    resume: bool
    force: bool
    show: bool
    num_processes: int | None
    num_machines: int
    machine_rank: int
    main_address: str | None
    hostfile: str | None
    main_port: int | None
    tracker: str
    model: Model
    data: Data
    adapter: Adapter
    engine: Engine


@dataclass
class Exposure:
    name: str
    schedule: str | None
    k: float | None
    end: float | None
    replacement: str | None
    passes: int | None


@dataclass
class SFTConfig(StageConfig):
    policy: str
    exposure: Exposure
    epochs: float
    examples: int | None
    batch_size: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    max_length: int
    packing: bool
    eval_examples: int
    num_samples: int
    gradient_checkpointing: bool
    keep_last: int
    log_steps: int
    save_steps: int


@dataclass
class CollectConfig(StageConfig):
    policy: str
    labeller: dict[str, Any]
    num_prompts: int | None
    samples_per_prompt: int
    batch_size: int
    decoding: Decoding


@dataclass
class RMConfig(StageConfig):
    base: str
    ranked: Split
    eval_fraction: float
    epochs: float
    batch_size: int
    learning_rate: float
    warmup_ratio: float
    weight_decay: float
    max_length: int
    label_smoothing: float
    centering: float
    margin: bool
    calibration_policy: str | None
    calibration_prompts: int
    gradient_checkpointing: bool
    keep_last: int
    log_steps: int
    save_steps: int


@dataclass
class PPOConfig(StageConfig):
    algo: str
    policy: str
    critic: str | None
    reward: dict[str, Any]
    updates: int
    batch_size: int
    rollouts_per_prompt: int
    epochs: int
    minibatches: int
    learning_rate: float
    critic_learning_rate: float
    warmup_updates: int
    kl: KL
    gae: GAE
    clip: Clip
    critic_trunk: str
    value_coef: float
    entropy_coef: float
    ptx_coef: float
    reinforce_baseline: str
    mixer: Mixer
    reward_clip: float | None
    whiten_rewards: bool
    missing_eos_score: float | None
    missing_eos_penalty: float
    temperature: float
    top_k: int
    top_p: float
    whiten_advantages: bool
    approx_kl_stop: float | None
    gradient_checkpointing: bool
    save_every: int
    keep_last: int
    keep_every: int | None
    sample_every: int
    eval_every: int | None
    eval_prompts: int


@dataclass
class Judge:
    name: str
    base_url: str | None
    model: str | None
    template: str | None
    key_variable: str | None
    max_tokens: int | None
    temperature: float | None
    num_prompts: int | None
    concurrency: int | None
    requests_per_minute: float | None
    retries: int | None
    timeout: float | None
    price_in: float | None
    price_out: float | None
    max_cost: float | None


@dataclass
class EvaluateConfig(StageConfig):
    systems: dict[str, Any]
    baseline: str | None
    reference: str | None
    num_prompts: int | None
    batch_size: int
    decoding: Decoding
    reward: dict[str, Any]
    proxy: dict[str, Any] | None
    gold: dict[str, Any] | None
    judge: Judge
    store: str
    gate: str | None
    oracle: str | None
    prefix_lengths: list[int] | None
    bootstrap: int
    num_samples: int


@dataclass
class ChatConfig(StageConfig):
    policy: str
    beside: str | None
    decoding: Decoding
    reward: dict[str, Any]
    proxy: dict[str, Any] | None


@dataclass
class BenchConfig:
    name: str
    runs: str
    show: bool
    model: Model
    adapter: Adapter
    engine: Engine
    adapters: list[str]
    batch_size: int
    prompt_tokens: int
    response_tokens: int
    epochs: int
    updates: int
    num_processes: int | None
    find_tokens_per_pass: bool
    zero_processes: int | None
    rounds: int
    peer: str | None


@dataclass
class ComparisonConfig:
    """What stage=exposure and stage=overoptimization have beside the words that they hand on."""

    seeds: list[int]
    methods: dict[str, Any]
    decodings: list[str]
    kl_coefs: list[float]
    best_of: list[int]


# The stages of a run, in order.
STAGE_CONFIGS: dict[str, type[Any]] = {
    "sft": SFTConfig,
    "collect": CollectConfig,
    "rm": RMConfig,
    "ppo": PPOConfig,
    "evaluate": EvaluateConfig,
}
