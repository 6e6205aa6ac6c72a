"""Laws of the state that a resume needs: N + M steps equal N, save, load into fresh objects, M."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rlhf.engine import random_state, restore_random_state, seed_everything
from rlhf.training_state import load_training_state, permutation, save_training_state


def new_model(width: int = 5) -> nn.Sequential:
    """Return a model with a frozen part, a dropout and unseeded weights."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, width), nn.Dropout(0.5), nn.Linear(width, 1))
    model[0].requires_grad_(False)
    model[0].load_state_dict({"weight": torch.ones(8, 4), "bias": torch.zeros(8)})
    return model


def new_optimizer(model: nn.Sequential) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": model[1].parameters(), "lr": 0.1},
        {"params": model[3].parameters(), "lr": 0.03},
    ]
    return torch.optim.AdamW(groups, eps=1e-5)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Take steps that draw from every generator, and return their losses."""
    losses = []
    for _ in range(steps):
        inputs = torch.randn(6, 4) + float(np.random.normal()) + random.gauss(0, 1)
        loss = model(inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_interrupted_steps_equal_uninterrupted_ones(tmp_path: Path) -> None:
    seed_everything(3)
    model = new_model()
    optimizer = new_optimizer(model)
    advance(model, optimizer, 3)
    # Python and numpy draw Gaussians in pairs and keep one for the next call: it is part of the state.
    values = {"step": 3, "kl": {"coef": 0.1 + 0.2}, "first": {"score": 1 / 3}}
    save_training_state(tmp_path, model, optimizer.state_dict(), values)
    expected = advance(model, optimizer, 4)

    seed_everything(77)
    again = new_model()
    optimizer_again = new_optimizer(again)
    assert load_training_state(tmp_path, again, optimizer_again) == values
    assert advance(again, optimizer_again, 4) == expected
    for name, weight in model.state_dict().items():
        assert again.state_dict()[name].equal(weight), name
    states = [o.state_dict()["state"] for o in (optimizer, optimizer_again)]
    for index, moments in states[0].items():
        for name, value in moments.items():
            assert torch.equal(states[1][index][name], value), (index, name)


def test_the_state_holds_no_pickle_and_no_frozen_weight(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = new_model()
    optimizer = new_optimizer(model)
    advance(model, optimizer, 1)
    save_training_state(tmp_path, model, optimizer.state_dict(), {"step": 1})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["optimizer.safetensors", "random.safetensors", "state.json", "weights.safetensors"]
    # A pickle begins with the byte 0x80 or is a zip archive ("PK").
    assert not any(
        path.read_bytes()[:1] == b"\x80" or path.read_bytes()[:2] == b"PK" for path in tmp_path.iterdir()
    )
    assert sorted(load_file(tmp_path / "weights.safetensors")) == ["1.bias", "1.weight", "3.bias", "3.weight"]


@pytest.mark.parametrize("other", [lambda: new_model(7), lambda: new_model()[:2]])
def test_the_state_of_another_model_is_refused(tmp_path: Path, other: Any) -> None:
    model = new_model()
    optimizer = new_optimizer(model)
    advance(model, optimizer, 1)
    save_training_state(tmp_path, model, optimizer.state_dict(), {})
    wrong = other()
    before = {name: weight.clone() for name, weight in wrong.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"holds the state of another model: .* differ; resume with the settings"
    ):
        load_training_state(tmp_path, wrong, torch.optim.AdamW(wrong[1].parameters()))
    assert all(wrong.state_dict()[name].equal(weight) for name, weight in before.items())


def test_learning_rates_stay_those_of_the_run(tmp_path: Path) -> None:
    model = new_model()
    optimizer = new_optimizer(model)
    advance(model, optimizer, 1)
    save_training_state(tmp_path, model, optimizer.state_dict(), {})
    again = new_model()
    optimizer_again = new_optimizer(again)
    load_training_state(tmp_path, again, optimizer_again)
    assert [group["lr"] for group in optimizer_again.param_groups] == [0.1, 0.03]


def test_random_generators_go_on_where_they_were() -> None:
    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))]

    seed_everything(5)
    draws()
    state = random_state()
    expected = draws()
    seed_everything(6)
    restore_random_state(state)
    assert draws() == expected


def test_a_seed_names_all_generators() -> None:
    seed_everything(2**33 + 5)
    first = (random.random(), float(np.random.rand()), float(torch.rand(())))
    seed_everything(2**33 + 5)
    assert first == (random.random(), float(np.random.rand()), float(torch.rand(())))


def test_a_permutation_depends_on_its_seeds_alone() -> None:
    first = permutation(20, 1, 2).tolist()
    np.random.rand(3)
    assert permutation(20, 1, 2).tolist() == first != permutation(20, 1, 3).tolist()
    assert sorted(first) == list(range(20))


@pytest.mark.parametrize("harm", [0, 40, None, "{}", "[]"])
@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
)
def test_a_damaged_file_is_named_with_the_way_out(tmp_path: Path, name: str, harm: int | str | None) -> None:
    model = new_model()
    optimizer = new_optimizer(model)
    advance(model, optimizer, 1)
    save_training_state(tmp_path, model, optimizer.state_dict(), {"step": 1})
    if harm is None:
        (tmp_path / name).unlink()
    elif isinstance(harm, int):
        os.truncate(tmp_path / name, harm)
    else:
        (tmp_path / name).write_text(harm)
    with pytest.raises(ValueError, match=f"{name} is damaged .* delete {tmp_path}"):
        load_training_state(tmp_path, model, optimizer)
