"""The lean LoRA layer gives peft's outputs and gradients."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear

from rlhf.batches import join, left_pad
from rlhf.config import load_config
from rlhf.models.adapters import add_lora, trainable_parameters
from rlhf.models.forward import response_logprobs
from rlhf.models.lora import LeanLoraLinear
from tests.models.families import BOS, EOS, PAD, load, write_family

ROLLOUT = join(left_pad([[BOS, 5, 9, 30], [8]], PAD), [[13, 44, EOS], [17, 9, 9, 21]], PAD)


@functools.cache
def adapter_settings() -> Any:
    return load_config("ppo", ["model=tiny", "data=toy", "adapter=lora", "adapter.r=4"]).adapter


def gradients(model: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logprobs = response_logprobs(model, ROLLOUT, temperature=1.0)
    logprobs.square().sum().backward()
    return logprobs.detach(), torch.cat(
        [p.grad.flatten() for p in trainable_parameters(model) if p.grad is not None]
    )


def adapted(folder: Path, family: str, dtype: torch.dtype, *, seed: int = 0) -> tuple[Any, Any]:
    """A model with a LoRA adapter that is not zero, with the lean layers and with peft's."""
    write_family(folder, family)
    torch.manual_seed(seed)
    lean = add_lora(load(folder, family).to(dtype), adapter_settings(), task="CAUSAL_LM")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(lean):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    peft = copy.deepcopy(lean)
    replaced: list[Any] = [module for module in peft.modules() if isinstance(module, LeanLoraLinear)]
    assert len(replaced) > 6
    for module in replaced:
        module.__class__ = LoraLinear
    return lean, peft


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_outputs_and_gradients_are_those_of_peft(tmp_path: Path, family: str) -> None:
    lean, peft = adapted(tmp_path, family, torch.float32)
    ours, theirs = gradients(lean, torch.float32), gradients(peft, torch.float32)
    for found, expected in zip(ours, theirs, strict=True):
        assert expected.abs().max() > 0.1
        assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_in_bfloat16_they_are_as_near_to_the_truth_as_pefts(tmp_path: Path, family: str) -> None:
    errors = torch.zeros(2, 2)
    for seed in range(4):
        lean, peft = adapted(tmp_path, family, torch.bfloat16, seed=seed)
        exact = gradients(copy.deepcopy(peft).float(), torch.float32)
        for column, model in enumerate((lean, peft)):
            found = gradients(model, torch.bfloat16)
            pairs = zip(found, exact, strict=True)
            errors[:, column] += torch.stack([(x - y).norm() / y.norm() for x, y in pairs])
    assert errors.min() > 0 and (errors[:, 0] < 1.5 * errors[:, 1]).all(), errors


def test_dropout_and_switched_off_adapters_go_pefts_way(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    settings = copy.deepcopy(adapter_settings())
    settings.dropout = 0.5
    model = add_lora(load(tmp_path, "llama"), settings, task="CAUSAL_LM")
    base = load(tmp_path, "llama")
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.1)
        expected = response_logprobs(base, ROLLOUT, temperature=1.0)
        with model.disable_adapter():
            assert response_logprobs(model, ROLLOUT, temperature=1.0).equal(expected)
        model.train()
        twice = [response_logprobs(model, ROLLOUT, temperature=1.0) for _ in range(2)]
        assert not twice[0].equal(twice[1])
        model.eval()
        twice = [response_logprobs(model, ROLLOUT, temperature=1.0) for _ in range(2)]
        assert twice[0].equal(twice[1]) and not twice[0].allclose(expected)
