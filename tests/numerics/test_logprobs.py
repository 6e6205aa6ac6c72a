"""Log-probabilities equal the plain formula in value and gradient, without its memory."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.numerics.logprobs import entropy, token_logprobs, token_logprobs_and_entropy

VOCABULARY = 11


def random_case(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 7, VOCABULARY, generator=generator)).to(dtype)
    return logits.requires_grad_(), torch.randint(VOCABULARY, (3, 7), generator=generator)


def plain_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logprobs.gather(-1, tokens[..., None])[..., 0]


class LargestFloat32(TorchDispatchMode):
    """Watches what operations return, for the largest float32 tensor among them."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_a_fair_choice_among_v_tokens_has_log_probability_minus_log_v() -> None:
    logprobs = token_logprobs(torch.zeros(1, 2, 8), torch.tensor([[0, 5]]))
    assert logprobs[0].tolist() == pytest.approx([-math.log(8)] * 2)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 4, 21, None])
def test_values_and_gradients_equal_the_plain_formula(
    temperature: float, dtype: torch.dtype, chunk: int | None
) -> None:
    logits, tokens = random_case(dtype)
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    expected = plain_logprobs(logits, tokens, temperature)
    (expected_grad,) = torch.autograd.grad((weights * expected).sum(), logits)

    logprobs = token_logprobs(logits, tokens, temperature, chunk=chunk)
    (grad,) = torch.autograd.grad((weights * logprobs).sum(), logits)

    assert logprobs.dtype == torch.float32 and torch.equal(logprobs, expected)
    assert grad.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(grad, expected_grad, atol=tolerance, rtol=tolerance)


def test_large_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    logprobs = token_logprobs(logits, torch.tensor([2]))
    logprobs.sum().backward()
    assert logprobs.tolist() == [-2e4]
    assert logits.grad is not None and logits.grad.tolist() == [[-1.0, 0.0, 1.0]]


def test_nan_in_a_row_that_the_loss_leaves_out_reaches_no_gradient() -> None:
    logits = torch.zeros(2, 4)
    logits[1] = float("nan")
    logits.requires_grad_()
    token_logprobs(logits, torch.tensor([0, 0]))[0].backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.75, -0.25, -0.25, -0.25], [0.0] * 4]


def test_no_float32_copy_of_the_logits_is_made_forward_or_backward() -> None:
    rows, vocabulary, chunk = 64, 100, 4
    logits = torch.randn(rows, vocabulary).bfloat16().requires_grad_()
    tokens = torch.zeros(rows, dtype=torch.long)
    with LargestFloat32() as watched:
        (token_logprobs(logits, tokens, chunk=chunk).sum() + entropy(logits, chunk=chunk).sum()).backward()
    assert 0 < watched.numel <= chunk * vocabulary
    with LargestFloat32() as watched:
        plain_logprobs(logits, tokens, 1.0)
    assert watched.numel == rows * vocabulary, "the watcher must see the copy that the plain formula makes"


def test_autograd_keeps_no_float32_softmax_for_backward() -> None:
    logits, tokens = random_case(torch.bfloat16)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, entropies = token_logprobs(logits, tokens), entropy(logits)
    assert logprobs.requires_grad and entropies.requires_grad and kept
    assert not any(tensor.is_floating_point() and tensor.dtype != torch.bfloat16 for tensor in kept)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError):
        token_logprobs(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(AssertionError):
        token_logprobs(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), temperature=0.0)


def test_entropy_of_a_fair_choice_is_log_v_and_of_a_sure_one_0() -> None:
    sure = torch.tensor([1e4, 0.0, 0.0, 0.0])
    assert entropy(torch.stack([torch.zeros(4), sure])).tolist() == pytest.approx([math.log(4), 0.0])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropy_by_one_pass_are_those_of_two(temperature: float) -> None:
    logits, tokens = random_case()
    expected = token_logprobs(logits, tokens, temperature)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), logits)
    found, entropies = token_logprobs_and_entropy(logits, tokens, temperature, chunk=4)
    (grad,) = torch.autograd.grad(found.square().sum(), logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(entropies, entropy(logits, temperature).detach())
    assert not entropies.requires_grad


def test_a_token_that_was_ruled_out_adds_nothing_to_the_entropy() -> None:
    logits = torch.tensor([0.0, 0.0, -math.inf], requires_grad=True)
    value = entropy(logits)
    value.backward()
    assert value.item() == pytest.approx(math.log(2))
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_equals_that_of_torch_distributions_in_value_and_gradient(temperature: float) -> None:
    logits, _ = random_case()
    expected = torch.distributions.Categorical(logits=logits / temperature).entropy()
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), logits)
    value = entropy(logits, temperature, chunk=4)
    (grad,) = torch.autograd.grad(value.square().sum(), logits)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)
