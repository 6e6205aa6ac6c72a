"""A tiny random model of every supported family, written as a checkpoint folder with a word-level tokenizer.

The configurations name a dropout of .1, which every stage must ignore, and a sliding window shorter than the
texts where the family has one.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import PreTrainedTokenizerFast as FastTokenizer

from rlhf.models.loading import LoadOptions, load_causal_lm

PAD, BOS, EOS, UNK = 0, 1, 2, 3
WORDS = [f"w{index}" for index in range(44)]
VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_dropout": 0.1,
}
_SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    },
    "gpt_neox": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
    },
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
    "gemma": {**_LLAMA, "head_dim": 8},
    "gemma2": {
        **_LLAMA,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "final_logit_softcapping": 3.0,
    },
    "mistral": {**_LLAMA, "sliding_window": 6},
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "layerdrop": 0.5,
    },
}
FAMILIES = tuple(_SETTINGS)


def attention_of(family: str) -> str:
    """Return the attention kernel that the family runs with; transformers offers no sdpa for Gemma 2."""
    return "eager" if family == "gemma2" else "sdpa"


def load(folder: Path, family: str) -> Any:
    """Load a family's language model from below `folder` as the stages do."""
    return load_causal_lm(str(folder / family), LoadOptions(attention=attention_of(family)))


def write_family(folder: Path, family: str, **more: Any) -> None:
    """Write `folder`/<family>, a language model, and `folder`/<family>-rm, a reward model; seeded.

    `more` are settings of the configuration.
    """
    settings = {
        "max_position_embeddings": 64,
        **_SETTINGS[family],
        **more,
        "vocab_size": len(VOCABULARY),
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    config = AutoConfig.for_model(family, **settings)
    _write(folder / family, AutoModelForCausalLM.from_config(config), seed=1)
    config.num_labels = 1
    _write(folder / f"{family}-rm", AutoModelForSequenceClassification.from_config(config), seed=2)


def word_tokenizer() -> Any:
    """Build a tokenizer of 44 words parted by spaces, after pad, bos, eos and unk."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return FastTokenizer(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def _write(folder: Path, model: Any, *, seed: int) -> None:
    """Write a model with weights large enough that its distributions are far from uniform, biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
