"""The layers of Llama and its like compute what transformers' own do."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config import load_config
from rlhf.models import llama
from rlhf.models.adapters import acting, add_lora, trainable_parameters
from rlhf.models.loading import trunk
from tests.models.families import FAMILIES, load, write_family

TOKENS = torch.tensor([[1, 5, 9, 30, 13, 44], [8, 17, 9, 9, 21, 2]])  # as long as Mistral's window
SERVED = ("llama", "qwen2", "qwen3", "mistral")


def stir(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def model_of(folder: Path, family: str, adapter: str = "none", rank: int = 2, seed: int = 0) -> Any:
    write_family(folder, family)
    torch.manual_seed(seed)  # an adapter's first matrices are random
    model = load(folder, family)
    if adapter == "lora":
        config = load_config("ppo", ["model=tiny", "data=toy", "adapter=lora", f"adapter.r={rank}"])
        model = add_lora(model, config.adapter, task="CAUSAL_LM")
    stir(model)
    return model


def rounded(model: Any, *, keep_trained: bool = False) -> Any:
    """A copy with weights in bfloat16."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if not (keep_trained and parameter.requires_grad):
            parameter.data = parameter.data.bfloat16()
    return model


ROWS, COLUMNS = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 4, 5, 3])


def theirs(model: Any, tokens: Tensor) -> Tensor:
    return trunk(model)(input_ids=tokens, use_cache=False).last_hidden_state[ROWS, COLUMNS]


def states_of(model: Any, tokens: Tensor = TOKENS) -> Tensor | None:
    return llama.hidden_states(model, tokens, ROWS, COLUMNS)


def ours(model: Any, tokens: Tensor) -> Tensor:
    found = states_of(trunk(model), tokens)
    assert found is not None
    return found


def outputs_and_gradients(model: Any, states: Tensor) -> list[Tensor]:
    weight = torch.linspace(-1, 1, states.numel()).view(states.shape)
    gradients = torch.autograd.grad((states * weight).sum(), trainable_parameters(model), allow_unused=True)
    return [states.detach(), *(each for each in gradients if each is not None)]


@pytest.mark.usefixtures("what_comes_before")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("adapter", "rank"), [("none", 0), ("lora", 2), ("lora", 16)])
@pytest.mark.parametrize("family", SERVED)
def test_states_and_gradients_are_those_of_transformers(
    tmp_path: Path, family: str, adapter: str, rank: int, checkpointing: bool
) -> None:
    model = model_of(tmp_path, family, adapter, rank)
    expected = outputs_and_gradients(model, theirs(model, TOKENS))
    if checkpointing:
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = outputs_and_gradients(model, ours(model, TOKENS))
    assert len(found) == len(expected) > 10
    for one, two in zip(found, expected, strict=True):
        assert (one - two).norm() <= 3e-5 * two.norm()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rows_too_long_for_plain_attention_have_the_same_states_and_gradients(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tmp_path, family)
    expected = outputs_and_gradients(model, theirs(model, TOKENS))
    monkeypatch.setattr(llama.attention, "MAX_KEYS", TOKENS.shape[1] - 1)
    monkeypatch.setattr(llama, "turned_attention", None)
    for one, two in zip(outputs_and_gradients(model, ours(model, TOKENS)), expected, strict=True):
        assert (one - two).norm() <= 3e-5 * two.norm()


@pytest.mark.parametrize("family", SERVED)
def test_heads_are_turned_in_pairs_where_a_model_is_narrow_and_exact(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trunk(model_of(tmp_path, family))
    width = 0 if family == "qwen3" else model.layers[0].self_attn.head_dim
    assert llama.pairs_of(model) == width
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert llama.pairs_of(model) == 0
    assert llama.pairs_of(rounded(model)) == 0
    monkeypatch.setattr(llama, "NARROW", 8)
    assert llama.pairs_of(model) == 0


@pytest.mark.usefixtures("what_comes_before")
@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_bfloat16_they_are_as_near_to_the_truth(tmp_path: Path, family: str, adapter: str) -> None:
    # A few models are near a step of the rounding, and dominate any sum: the geometric mean of twelve.
    errors = torch.zeros(2, 2)
    for seed in range(12):
        whole = model_of(tmp_path, family, adapter, seed=seed)
        model = rounded(whole, keep_trained=adapter != "none")
        exact_model = copy.deepcopy(model).float()
        exact = outputs_and_gradients(exact_model, theirs(exact_model, TOKENS))
        ways = ((whole if adapter == "none" else model, ours), (model, theirs))
        for column, (one, states) in enumerate(ways):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = states(one, TOKENS).float()
            pairs = list(zip(outputs_and_gradients(one, found), exact, strict=True))
            for row, part in enumerate((pairs[:1], pairs[1:])):
                wrong, right = (
                    torch.cat([each.flatten() for each in some]) for some in zip(*part, strict=True)
                )
                errors[row, column] += ((wrong - right).norm() / right.norm()).log() / 12
    assert errors.exp().min() > 0.005 and (errors[:, 0] - errors[:, 1] < 0.2).all(), errors.exp()


@pytest.mark.parametrize("family", SERVED)
def test_whole_weights_under_rounded_products_have_the_states_of_rounded_weights(
    tmp_path: Path, family: str
) -> None:
    model = model_of(tmp_path, family)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(model, TOKENS)
        assert found.dtype == torch.bfloat16 and found.equal(ours(rounded(model), TOKENS))


def test_an_adapter_that_does_not_act_changes_nothing(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama", "lora")
    base = load(tmp_path, "llama")
    with torch.no_grad():
        adapted = ours(model, TOKENS)
        with acting(model, None):
            assert ours(model, TOKENS).equal(ours(base, TOKENS))
    assert not adapted.allclose(ours(base, TOKENS))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SERVED])
def test_other_families_are_left_to_transformers(tmp_path: Path, family: str) -> None:
    assert states_of(trunk(model_of(tmp_path, family))) is None


def test_whatever_is_not_computed_here_is_left_to_transformers(tmp_path: Path) -> None:
    longer = torch.cat([TOKENS, TOKENS], dim=1)
    window = trunk(model_of(tmp_path, "mistral"))
    assert states_of(window) is not None
    assert states_of(window, longer) is None, "a sliding window"
    model = trunk(model_of(tmp_path, "llama"))
    layer: Any = model.layers[0].mlp.up_proj
    layer.forward = layer.forward
    assert states_of(model) is None, "a layer whose forward somebody else has set"
    del layer.forward
    assert states_of(model.train()) is not None
    model.config.attention_dropout = 0.1
    assert states_of(model) is None, "dropout of attention weights"
