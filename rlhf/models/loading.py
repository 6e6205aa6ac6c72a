"""Loading models and tokenizers: number types, 4-bit and 8-bit weights, and refusal of the wrong kind by
name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import logging as transformers_logging

from rlhf.engine import Engine
from rlhf.models import attention
from rlhf.rows import first_line
from rlhf.text import TextCodec, prepare_tokenizer

# The stages show one progress bar of their own.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


@dataclass(frozen=True)
class LoadOptions:
    """How weights are read: number type, quantization (none, nf4, int8), attention kernel, remote code."""

    dtype: torch.dtype = torch.float32
    quantization: str = "none"
    attention: str | None = "sdpa"
    trust_remote_code: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sharded: bool = False  # left on the processor, for `shard` to take from there

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`; only safetensors are read."""
        arguments: dict[str, Any] = {
            "dtype": self.dtype,
            "attn_implementation": self.attention,
            "trust_remote_code": self.trust_remote_code,
            "use_safetensors": True,
        }
        if self.quantization == "nf4":
            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=self.dtype,
                llm_int8_skip_modules=["lm_head", "score"],
            )
        elif self.quantization == "int8":
            arguments["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=True, llm_int8_skip_modules=["lm_head", "score"]
            )
        if self.quantization != "none":
            arguments["device_map"] = {"": self.device}
        return arguments


def load_options(
    model: Any, engine: Engine, *, trained: bool, quantization: str = "none", sharded: bool = False
) -> LoadOptions:
    """Options from the `model` group: frozen weights in the engine's number type, trained ones in float32.

    `sharded`: `shard` follows, where the engine does so.
    """
    return LoadOptions(
        dtype=torch.float32 if trained else engine.dtype,
        quantization=quantization,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
        device=engine.device,
        sharded=sharded and engine.shards_weights,
    )


def _remote_code(model: Any | None) -> dict[str, bool]:
    """Whether the `model` group asks for code out of the checkpoint; without the group it does not."""
    return {"trust_remote_code": model is not None and model.trust_remote_code}


def load_tokenizer(path: str, model: Any | None = None) -> Any:
    """Load a checkpoint's tokenizer with a pad token apart from EOS where the vocabulary has one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **_remote_code(model))
    except OSError as error:
        raise ValueError(
            f"{path}: no model folder of that name is here, and from the hub it could not be loaded "
            f"({first_line(error)}); check the name and the network"
        ) from error
    if not tokenizer("x", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"{path} has no tokenizer; copy the tokenizer files of its base into it")
    return prepare_tokenizer(tokenizer)


def load_codec(path: str, config: Any) -> TextCodec:
    """A checkpoint's tokenizer behind the text rules of a stage's `data` group."""
    data = config.data
    tokenizer = load_tokenizer(path, config.model)
    num_embeddings = _text_config(path, config.model).vocab_size
    highest = max(tokenizer.get_vocab().values())
    if highest >= num_embeddings:
        raise ValueError(
            f"{path}: its tokenizer has token ids up to {highest}, its model only {num_embeddings} tokens: "
            "they do not belong together"
        )
    check_context(
        "data.max_prompt_tokens + data.max_response_tokens",
        data.max_prompt_tokens + data.max_response_tokens,
        path,
        config.model,
    )
    return TextCodec(tokenizer, style=data.format, max_prompt_tokens=data.max_prompt_tokens)


def check_context(key: str, num_tokens: int, path: str, model: Any | None = None) -> None:
    """Refuse sequences of more tokens than a model has positions."""
    context = getattr(_text_config(path, model), "max_position_embeddings", None)
    if context and num_tokens > context:
        raise ValueError(f"{key}={num_tokens}, but {path} has a context of {context} tokens: lower it")


def _text_config(path: str, model: Any | None) -> Any:
    return AutoConfig.from_pretrained(path, **_remote_code(model)).get_text_config()


def load_causal_lm(path: str, options: LoadOptions, *, key: str = "policy") -> Any:
    """Load a decoder language model with dropout off; a reward model is refused, naming the key."""
    architecture = _architecture(path, options)
    if "SequenceClassification" in architecture:
        raise ValueError(f"{key}={path} is a reward model ({architecture}); a language model is due here")
    model = _from_pretrained(AutoModelForCausalLM, path, options)
    _check_logits(model)
    return _placed(model, options)


def load_reward_model(path: str, options: LoadOptions, *, key: str = "reward.path") -> Any:
    """Load a trained reward model (a sequence classifier with one score); anything else is refused."""
    check_classifier(path, options, key=key)
    model, report = _load_classifier(path, options)
    if report["missing_keys"]:
        raise ValueError(
            f"{key}={path} has no weights for {sorted(report['missing_keys'])}; retrain it with stage=rm"
        )
    if model.config.num_labels != 1:
        raise ValueError(f"{key}={path} gives {model.config.num_labels} labels; a reward model gives 1")
    return _placed(model, options)


def check_classifier(path: str, options: LoadOptions, *, key: str) -> None:
    """Refuse a checkpoint without a score head, naming the key."""
    architecture = _architecture(path, options)
    if "SequenceClassification" not in architecture:
        raise ValueError(
            f"{key}={path} is {architecture or 'not a transformers model'}, without a score head; "
            "train a reward model from it with stage=rm and name that folder"
        )


def load_score_head(path: str) -> nn.Linear:
    """The score head (H -> 1) of the reward model in a folder, in float32, frozen."""
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as weights:
            if "score.weight" in weights.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                layer = nn.Linear(weights.get_slice("score.weight").get_shape()[1], 1, bias=False)
                layer.weight = nn.Parameter(weights.get_tensor("score.weight").float(), requires_grad=False)
                return layer
    raise ValueError(f"{path} has no score head; train a reward model with stage=rm and name its folder")


def new_reward_model(path: str, options: LoadOptions) -> Any:
    """Put a score head of zeros, in float32, on the trunk of any decoder: all scores start equal."""
    model, _ = _load_classifier(path, options)
    nn.init.zeros_(model.score.weight)
    return _placed(model, options)


def trunk(model: Any) -> Any:
    """The transformer below the head, LoRA layers included; its output is the last hidden state (B, L, H)."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return inner.base_model


def head(model: Any) -> Any:
    """The output layer: the vocabulary matrix of a language model, the score head of a reward model."""
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return inner.score if hasattr(inner, "score") else inner.get_output_embeddings()


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Vocabulary scores (N, V) of hidden states (N, H), soft-capped where the family does so (Gemma 2)."""
    assert hidden.dim() == 2, "a slice of a 3-D tensor makes torch copy the vocabulary matrix once per row"
    logits = head(model)(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def num_parameters(path: str, model: Any | None = None) -> int:
    """Parameters of a checkpoint, counted without reading its weights."""
    config = AutoConfig.from_pretrained(path, **_remote_code(model))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **_remote_code(model)).num_parameters()


def same_tokenizer(path_a: str, path_b: str, model: Any | None = None) -> bool:
    """Whether two checkpoints turn text into the same tokens; tokens added behind the others (a pad) do not
    matter.
    """
    tokenizers = [AutoTokenizer.from_pretrained(path, **_remote_code(model)) for path in (path_a, path_b)]
    vocabularies = [tokenizer.get_vocab() for tokenizer in tokenizers]
    smaller, larger = sorted(vocabularies, key=len)
    return smaller.items() <= larger.items()


def _from_pretrained(auto_class: Any, path: str, options: LoadOptions, **more: Any) -> Any:
    try:
        found = auto_class.from_pretrained(path, **options.arguments(), **_no_dropout(path, options), **more)
    except ValueError as error:
        if "attn_implementation" not in str(error):
            raise
        raise ValueError(
            f"{path} cannot run with model.attention={options.attention}; use model.attention=eager"
        ) from error
    model = found[0] if isinstance(found, tuple) else found
    if options.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(attention.NAME)
    # On AVX512-BF16 processors bitsandbytes repacks 4-bit weights for a product that has no backward pass.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return found


def _load_classifier(path: str, options: LoadOptions) -> tuple[Any, dict[str, Any]]:
    """Load trunk and score head; the head keeps its float32 weights whatever the trunk's number type."""
    whole = options if options.quantization != "none" else replace(options, dtype=torch.float32)
    model, report = _from_pretrained(
        AutoModelForSequenceClassification, path, whole, num_labels=1, output_loading_info=True
    )
    if options.quantization == "none":
        model.base_model.to(options.dtype)
    model.score.to(torch.float32)
    model.config.problem_type = "regression"
    return model, report


def _architecture(path: str, options: LoadOptions) -> str:
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise FileNotFoundError(
                f"{folder} is no model folder: it has no config.json (is the stage that writes it finished?)"
            )
        if (folder.parent / "config.yaml").exists() and not (folder.parent / "stage.json").exists():
            raise FileNotFoundError(f"{folder} was left half written: its stage did not finish; run it again")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return (config.get("architectures") or [""])[0]
    if path.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"no model folder at {path}")
    config = AutoConfig.from_pretrained(path, trust_remote_code=options.trust_remote_code)
    return (config.architectures or [""])[0]


def _no_dropout(path: str, options: LoadOptions) -> dict[str, float]:
    """Every dropout rate that the configuration names, set to 0."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=options.trust_remote_code)
    names = [name for name in config.to_dict() if "dropout" in name or name.endswith(("pdrop", "layerdrop"))]
    return {name: 0.0 for name in names if isinstance(getattr(config, name, None), float)}


def _check_logits(model: Any) -> None:
    """Refuse a family whose logits are not head(hidden): the log-probs of rollouts would be those of
    another model.
    """
    tokens = torch.tensor([[1, 2, 3]], device=model.device)
    with torch.no_grad():
        expected = model(tokens).logits[0].float()
        found = logits_of(model, trunk(model)(tokens).last_hidden_state[0]).float()
    if not torch.allclose(expected, found, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output layer in a way not supported here; "
            "use a family such as GPT-2, GPT-NeoX, Llama, Qwen, Gemma, Mistral or OPT"
        )


def _placed(model: Any, options: LoadOptions) -> Any:
    model.config.use_cache = False
    model.eval()
    return model if options.quantization != "none" or options.sharded else model.to(options.device)
