"""Packed layers compute what plain ones do, and leave no trace."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.engine import Engine
from rlhf.models.packed import packed
from tests.models.families import load, write_family

ENGINE = Engine(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
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
    error = (plain.float() - expected).norm()
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


def test_float32_stays_as_it_is(tmp_path: Path) -> None:
    write_family(tmp_path, "llama")
    model = load(tmp_path, "llama")
    with packed(model, Engine(torch.device("cpu"), torch.float32)):
        assert not any("forward" in vars(module) for module in model.modules())
