"""How many tokens are computed at a time where the settings do not say it, known before torch is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from rlhf.settings import WEIGHTS, zero_stage

# Tokens of one pass through a model: enough to keep the device busy, few enough to sort rows by length and to
# hold a pass's activations. On a processor small models need more of them, and so do full weights, whose
# gradients are as large for a short pass as for a long one.
TOKENS_PER_PASS = 640
TOKENS_PER_PASS_FULL_WEIGHTS = 1280
TOKENS_PER_PASS_SMALL_MODEL = 4096
TOKENS_PER_PASS_GPU = 16384

# Tokens of passes whose activations a processor holds so as not to compute them twice. Twice as many for full
# weights, whose passes are longer and hold much memory anyway.
KEPT_TOKENS = 1536
KEPT_TOKENS_FULL_WEIGHTS = 3072
KEPT_TOKENS_SMALL_MODEL = 16384

# Passes that a processor computes side by side where nothing else is said: with full weights each of them
# holds gradients of its own.
MOST_WORKERS = 2

# Parameters below which a model is small: bfloat16 on a processor gains it nothing and only loses digits.
SMALL_MODEL = 20_000_000


class PassSizes(NamedTuple):
    """Tokens of a pass, tokens of passes whose graphs are held, and passes computed side by side at most."""

    tokens_per_pass: int
    kept_tokens: int
    workers: int


def pass_sizes(
    settings: Any, num_parameters: int, *, on_processor: bool, full_weights: bool = False
) -> PassSizes:
    """What the `engine` group says, and else what suits the device and the model."""
    tokens, kept, workers = TOKENS_PER_PASS_GPU, 0, 1
    if on_processor:
        tokens = TOKENS_PER_PASS_FULL_WEIGHTS if full_weights else TOKENS_PER_PASS
        kept = KEPT_TOKENS_FULL_WEIGHTS if full_weights else KEPT_TOKENS
        workers = MOST_WORKERS
        if num_parameters < SMALL_MODEL:
            tokens, kept = TOKENS_PER_PASS_SMALL_MODEL, KEPT_TOKENS_SMALL_MODEL
    if zero_stage(settings.deepspeed) == WEIGHTS:
        kept = 0  # a kept graph would hold the gathered weights
    kept = kept if settings.kept_tokens is None else settings.kept_tokens
    workers = 1 if settings.deepspeed else settings.workers or workers
    return PassSizes(settings.tokens_per_pass or tokens, kept, workers)


def processor_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices faster than float32 ones."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
