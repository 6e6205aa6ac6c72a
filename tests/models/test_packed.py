"""Packed layers compute what plain ones do, and leave no trace."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.batches import PromptBatch, left_pad, position_ids
from rlhf.engine import Engine
from rlhf.models.packed import packed
from rlhf.sampling.cache import new_cache
from tests.models.families import load, write_family

ENGINE = Engine(torch.device("cpu"), torch.bfloat16)
FLOAT32 = Engine(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_those_of_the_plain_layers(tmp_path: Path, family: str, held: torch.dtype) -> None:
    write_family(tmp_path, family)
    exact = load(tmp_path, family)
    model = load(tmp_path, family).to(held)
    tokens = torch.randint(40, (5, 9), generator=torch.Generator().manual_seed(0))
    expected = exact(tokens).logits
    with ENGINE.autocast():
        plain = model(tokens).logits
        with packed(model, ENGINE):
            found = model(tokens).logits
            changed = [module for module in model.modules() if "forward" in vars(module)]
        after = model(tokens).logits
    assert len(changed) >= 1
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(after, plain)
    with ENGINE.autocast():  # states between layers are rounded as well, as where weights are held so
        error = (load(tmp_path, family).bfloat16()(tokens).logits.float() - expected).norm()
    assert error > 0 and (found.float() - expected).norm() < 1.2 * error


def test_the_layers_are_plain_again_after_an_error_and_a_forward_of_others_stays(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    model = load(tmp_path, "llama").to(torch.bfloat16)
    layers: list[Any] = [module for module in model.modules() if type(module) is torch.nn.Linear]
    hooked = layers[0].forward = lambda x: x  # as accelerate's hooks do
    with pytest.raises(ZeroDivisionError), packed(model, ENGINE):
        assert "forward" in vars(layers[1]) and layers[0].forward is hooked
        raise ZeroDivisionError
    assert "forward" not in vars(layers[1]) and layers[0].forward is hooked


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_small_models_in_float32_have_joined_layers_that_compute_the_same(
    tmp_path: Path, family: str
) -> None:
    write_family(tmp_path, family)
    model = load(tmp_path, family)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape) if "bias" in name or "norm" in name else 0.0)
    prompts = left_pad([[1, 5, 9, 30, 12], [8, 3]], 0)
    expected = states_of(model, prompts)
    with packed(model, FLOAT32):
        assert "forward" in vars(model.model)
        found = states_of(model, prompts)
    assert not any("forward" in vars(module) for module in model.modules())
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-5)


def states_of(model: Any, prompts: PromptBatch) -> list[torch.Tensor]:
    """Return the last hidden states after padded prompts, and after two more tokens, by way of a cache."""
    cache, mask = new_cache(model), prompts.attention_mask.long()
    run = functools.partial(model.model, past_key_values=cache, use_cache=True)
    found = [run(prompts.tokens, attention_mask=mask, position_ids=position_ids(mask)).last_hidden_state]
    for token in (7, 11):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        positions = position_ids(mask)[:, -1:]
        tokens = torch.full((2, 1), token)
        found.append(run(tokens, attention_mask=mask, position_ids=positions).last_hidden_state)
    return [found[0][prompts.attention_mask], *found[1:]]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_large_models_in_float32_and_other_devices_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    write_family(tmp_path, "llama")
    model = load(tmp_path, "llama")
    monkeypatch.setattr("rlhf.models.packed.SMALL_MODEL", 0 if device == "cpu" else 20_000_000)
    with packed(model, Engine(torch.device(device), torch.float32)):
        assert not any("forward" in vars(module) for module in model.modules())
