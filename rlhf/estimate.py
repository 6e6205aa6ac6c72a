"""What a stage will need, from a model's config.json alone: parameters, memory and tokens to process.

Letters: P longest prompt, R longest response, L = P + R tokens. Sequences are counted at full length, so work
is an upper bound. Memory is no bound: the libraries' own, what processes exchange, and a model while it is
read in or written are not counted; docs/engines.md compares it with what was held.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.deepspeed_config import deepspeed_settings
from rlhf.discriminator_settings import is_adversarial, settings_in
from rlhf.pass_sizes import SMALL_MODEL, pass_sizes, processor_has_bf16
from rlhf.settings import WEIGHTS, PPOConfig, StageConfig, zero_stage
from rlhf.sources import EMBEDDED, RANDOM_1B, embedded_place
from rlhf.specs import system_names

LEAN = ("llama", "mistral", "qwen2", "qwen3")  # whose layers hold what rlhf.models.llama does
GATED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
FROZEN_BYTES = {"nf4": 0.56, "int8": 1.02}  # of a linear layer's weight, with its scales
# Frozen models in memory. With adapters ppo has one; a reward model that is no adapter on it is a second.
ADAPTER_BASES = {"sft": 1, "rm": 1, "ppo": 1}
FULL_BASES = {"sft": 0, "collect": 1, "rm": 0, "ppo": 2, "evaluate": 3}
OFFLOADS = ("offload_optimizer", "offload_param")
LIST_LENGTH = 4  # responses per ranked list, where the data is not there to be counted
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}
# Known before they are made.
KNOWN = {"smollm2": SMOLLM2, "random_1b": {"model_type": "llama", **RANDOM_1B}}


@dataclass(frozen=True)
class Shape:
    """The sizes that decide a decoder's parameter count."""

    layers: int
    hidden: int
    attention: int  # heads x head size, of the queries
    key_value: int  # heads x head size, of the keys
    inner: int
    vocab: int
    positions: int  # learned position embeddings, 0 where there are none
    gated: bool
    tied: bool
    lean: bool

    @property
    def linear(self) -> int:
        """Weights of the linear layers inside the blocks."""
        attention = 2 * self.hidden * (self.attention + self.key_value)
        return self.layers * (attention + (3 if self.gated else 2) * self.hidden * self.inner)

    @property
    def embedding(self) -> int:
        return self.hidden * (self.vocab * (1 if self.tied else 2) + self.positions)

    @property
    def parameters(self) -> int:
        """All weights, biases and norms (below 1%) left out."""
        return self.linear + self.embedding

    @property
    def activations(self) -> float:
        """Numbers that a token's forward pass holds for its backward one; narrow layers hold half as many
        more.
        """
        if self.lean:
            return self.layers * 2 * (self.hidden + self.attention + self.key_value + self.inner)
        return self.layers * (12 * self.hidden + 4 * self.inner)

    def lora_parameters(self, rank: int) -> int:
        """Weights of rank-`rank` adapters on every linear layer: r (in + out) each."""
        ends = 4 * self.hidden + 2 * (self.attention + self.key_value)
        return self.layers * rank * (ends + (3 if self.gated else 2) * (self.hidden + self.inner))


class Memory(NamedTuple):
    """Bytes by purpose."""

    held: dict[str, float]  # all the time
    sampling: dict[str, float]  # besides, while it samples
    learning: dict[str, float]
    offloaded: dict[str, float]  # of a GPU's engine, in the processor's memory

    @property
    def most(self) -> float:
        """What is held at one time."""
        return sum(self.held.values()) + max(sum(self.sampling.values()), sum(self.learning.values()))

    def in_words(self) -> str:
        """The whole and its parts, in GiB."""
        places = ("", "while it samples ", "while it learns ", "in the processor's memory ")
        parts = [", ".join(f"{k} {v / 2**30:.2f}" for k, v in each.items() if v) for each in self]
        told = "; ".join(f"{place}{part}" for place, part in zip(places, parts, strict=True) if part)
        return f"about {self.most / 2**30:.2f} GiB, and what the libraries take: {told}"


def find_config(path: str) -> dict[str, Any] | None:
    """Return a model's config.json from its folder, our cache or the hub's; None where there is none."""
    if path in EMBEDDED:
        folders = [embedded_place(path)]
    else:
        home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
        hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{path.replace('/', '--')}"
        folders = [Path(path).expanduser(), *sorted(hub.glob("snapshots/*"))]
    for folder in folders:
        if (folder / "config.json").is_file():
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return KNOWN.get(path)


def read_shape(config: dict[str, Any]) -> Shape | None:
    """Return the sizes that a config.json states under its family's names, or None where it has none."""
    config = {**config, **config.get("text_config", {})}

    def first(*names: str) -> int:
        return next((int(config[name]) for name in names if config.get(name)), 0)

    hidden, layers = first("hidden_size", "n_embd"), first("num_hidden_layers", "n_layer")
    heads, vocab = first("num_attention_heads", "n_head"), first("vocab_size")
    if not (hidden and layers and heads and vocab):
        return None
    head_size = first("head_dim") or hidden // heads
    family = config.get("model_type", "")
    return Shape(
        layers=layers,
        hidden=hidden,
        attention=heads * head_size,
        key_value=(first("num_key_value_heads") or heads) * head_size,
        inner=first("intermediate_size", "n_inner", "ffn_dim") or 4 * hidden,
        vocab=vocab,
        positions=first("n_positions", "max_position_embeddings") if family in ("gpt2", "opt") else 0,
        gated=family in GATED,
        tied=bool(config.get("tie_word_embeddings", family != "gpt_neox")),
        lean=family in LEAN,
    )


def estimate(stage: str, config: Any) -> list[str]:
    """Return the lines of the estimate that `show=true` prints."""
    found = find_config(config.model.path)
    shape = read_shape(found) if found else None
    if shape is None:
        why = (
            "its config.json is not on this machine yet"
            if not found
            else "its config.json is of an unknown kind"
        )
        return [
            f"model     {config.model.path}: {why}, so memory is unknown",
            _work_line(stage, config, None),
        ]
    trained = _trained_parameters(stage, config, shape)
    lines = [f"model     {_count(shape.parameters)} parameters, {_count(trained)} trained by this stage"]
    lines.append(f"memory    {memory(stage, config, shape).in_words()}")
    return [*lines, _work_line(stage, config, shape)]


def tokens_to_process(stage: str, config: Any) -> float | None:
    """Return the work in forward-token units (a backward pass counts as 2), or None where it is open."""
    prompt, response = config.data.max_prompt_tokens, config.data.max_response_tokens
    if stage == "sft":
        passes = 3 + (config.exposure.passes or 0)
        return (
            None if config.examples is None else passes * config.epochs * config.examples * config.max_length
        )
    if stage == "rm":
        lists = config.data.budget.collect_prompts if config.data.ranked.train is None else None
        return None if lists is None else 3 * config.epochs * lists * LIST_LENGTH * config.max_length
    if stage == "ppo":
        # sampling, then policy, reference, reward and value passes, then both trained models in every epoch
        passes = 1 + 4 + 6 * config.epochs
        adversary = _discriminator_passes(config)
        return (config.updates * config.batch_size * passes + adversary) * (prompt + response)
    if config.num_prompts is None:
        return None
    samples = config.samples_per_prompt if stage == "collect" else _samples_per_prompt(config.systems)
    passes = 2 * samples  # sampled, then scored
    if stage == "evaluate":
        # by policy and oracle after own and gold tokens, then by the oracle for perplexity
        each = 5 * (config.oracle is not None) + 3 * len(config.prefix_lengths or ())
        passes += each * len(system_names(config.systems))
    return config.num_prompts * passes * (prompt + response)


def _discriminator_passes(config: PPOConfig) -> int:
    """Passes of a discriminator: samples and references are learned from, the former drawn too before the
    first update, and all of an update's are judged beside as many references.
    """
    if not is_adversarial(config):
        return 0
    own = settings_in(config.reward)
    learned = (own.pretrain_updates + config.updates * own.steps) * own.batch_size * 2 * 3
    return own.pretrain_updates * own.batch_size + learned + config.updates * config.batch_size * 2


def _samples_per_prompt(systems: dict[str, Any]) -> int:
    numbers = [system.get("best_of") or 1 if isinstance(system, dict) else 1 for system in systems.values()]
    return sum(max(each) if isinstance(each, list) else each for each in numbers)


def _trained_parameters(stage: str, config: StageConfig, shape: Shape) -> int:
    if stage in ("collect", "evaluate"):
        return 0
    one = shape.lora_parameters(config.adapter.r) if config.adapter.r else shape.parameters
    models = 1
    if isinstance(config, PPOConfig):
        models = 3 if is_adversarial(config) else 2
    return models * one


def memory(stage: str, config: Any, shape: Shape) -> Memory:
    """What one process of a stage will hold."""
    trains = stage in ("sft", "rm", "ppo")
    adapted = trains and bool(config.adapter.r)
    number_bytes, on_processor = _number_bytes(config.engine, shape), not _has_gpu(config.engine)
    quantized = FROZEN_BYTES.get(config.adapter.quantization) if adapted else None
    frozen: float = shape.parameters * number_bytes
    if quantized is not None:
        frozen = shape.linear * quantized + shape.embedding * 4.0
    bases = ADAPTER_BASES[stage] if adapted else FULL_BASES[stage]
    if isinstance(config, PPOConfig):
        bases += adapted and _has_own_trunk(config.critic)
        bases -= not adapted and is_adversarial(config)  # that reward is trained
    stage_of_zero = zero_stage(config.engine.deepspeed) if trains else 0
    count = config.num_processes or 1
    holders = count if stage_of_zero == WEIGHTS else 1
    stage_of_trained = 2 if adapted and stage_of_zero == WEIGHTS else stage_of_zero
    trained_bytes = _trained_bytes(stage_of_trained, count)
    held = {
        "frozen weights": bases * frozen / holders,
        "trained weights": _trained_parameters(stage, config, shape) * trained_bytes,
    }
    offloaded = _offloaded(config.engine, held, stage_of_trained, trained_bytes)
    held = {name: size - offloaded.get(name, 0.0) for name, size in held.items()}
    sampling: dict[str, float] = {}
    learning: dict[str, float] = {}
    if stage_of_zero == WEIGHTS and stage != "rm":
        copied = shape.linear * number_bytes + shape.embedding * (number_bytes if adapted else 4)
        sampling["whole copy"] = copied
    elif stage == "ppo" and adapted and quantized is None:
        sampling["merged weights"] = shape.linear * number_bytes
    rows = config.batch_size * (LIST_LENGTH if stage == "rm" else 1)
    length = config.data.max_prompt_tokens + config.data.max_response_tokens
    if isinstance(config, PPOConfig):
        sizes = pass_sizes(
            config.engine, shape.parameters, on_processor=on_processor, full_weights=not adapted
        )
        own = rows // config.minibatches * length / count
        a_pass = max(length, min(sizes.tokens_per_pass, (config.engine.micro_batch_size or rows) * length))
        tokens = min(own, sizes.workers * a_pass + min(own, sizes.kept_tokens))
        if not adapted and not stage_of_zero:  # one model's: each worker adds up those of its passes
            several = own > sizes.workers * a_pass
            sets = sizes.workers * (2 if several else 1) - 1  # one is counted with the trained weights
            learning["gradients of passes"] = 4.0 * shape.parameters * sets
    else:
        tokens = min(config.engine.micro_batch_size or rows, rows) / count * length
    if trains:
        held["rounded weights"] = shape.parameters * number_bytes * (not adapted and number_bytes < 4)
        kept = shape.layers * shape.hidden if config.gradient_checkpointing else shape.activations
        learning["activations"] = tokens * kept * number_bytes
        if stage != "rm":
            share = config.data.max_response_tokens / length if stage == "ppo" else 1
            learning["logits"] = tokens * share * shape.vocab * 2 * number_bytes
    if isinstance(config, PPOConfig) or not trains:
        sampling["cache"] = rows / count * length * shape.layers * 2 * shape.key_value * number_bytes
    return Memory(held, sampling, learning, offloaded)


def _offloaded(engine: Any, held: dict[str, float], stage: int, trained_bytes: float) -> dict[str, float]:
    """What of the weights DeepSpeed keeps in the processor's memory: with the optimizer all but the trained
    weights themselves, with the weights those as well, where they are shared out, and the frozen ones.
    """
    if not stage or not _has_gpu(engine):
        return {}
    settings = (deepspeed_settings(engine) or {})["zero_optimization"]
    away = {key for key in OFFLOADS if (settings.get(key) or {}).get("device") == "cpu"}
    shared_out = stage == WEIGHTS
    own = trained_bytes / 5 if shared_out else 4.0  # of 20 bytes for each of a process's own weights
    own = 0.0 if shared_out and "offload_param" in away else own
    found = {"trained weights": held["trained weights"] * (1 - own / trained_bytes)} if away else {}
    return found | ({"frozen weights": held["frozen weights"]} if "offload_param" in away else {})


def _has_gpu(engine: Any) -> bool:
    """Whether `engine.device` leads to a GPU, as far as that can be known without torch."""
    return engine.device.startswith("cuda") or (engine.device == "auto" and Path("/dev/nvidiactl").exists())


def _number_bytes(engine: Any, shape: Shape) -> int:
    rounds = shape.parameters >= SMALL_MODEL and (_has_gpu(engine) or processor_has_bf16())
    return 2 if engine.dtype == "bfloat16" or (engine.dtype == "auto" and rounds) else 4


def _trained_bytes(stage: int, count: int) -> float:
    """Bytes in each of `count` processes per trained weight, float32: itself, its gradient, and two moments
    of Adam.

    DeepSpeed shares out among the processes the moments and a copy of the weights, from ZeRO 2 on the
    gradients too, in ZeRO 3 all.
    """
    if not stage:
        return 16.0
    if stage == WEIGHTS:
        return 20 / count
    return 4 + 12 / count + (4 / count if stage > 1 else 4)


def _has_own_trunk(critic: str | None) -> bool:
    """Whether a reward model that is there was not left by stage=rm with an adapter."""
    folder = Path(critic or "")
    return critic is not None and folder.exists() and not (folder.parent / "adapter").exists()


def _work_line(stage: str, config: Any, shape: Shape | None) -> str:
    tokens = tokens_to_process(stage, config)
    if tokens is None:
        return "work      open: as many examples as the data has"
    line = f"work      at most {_count(tokens)} forward-token passes"
    return f"{line}, {2 * shape.parameters * tokens / 1e12:,.1f} TFLOP" if shape else line


def _size(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def _count(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"
