"""Estimators of KL against enumeration, and the controllers of its coefficient."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.numerics.advantages import shaped_rewards
from rlhf.numerics.kl import AdaptiveKL, FixedKL, divergence, k1, k2, k3

Estimator = Callable[[Tensor, Tensor], Tensor]

# log_ratio = ref - logprob = -.2, .5, 0: k1 its negative; k2 = .04/2, .25/2, 0;
# k3 = exp(-.2) - 1 + .2 = .8187308 - .8 and exp(.5) - 1 - .5 = 1.6487213 - 1.5
ESTIMATORS = {
    "logprobs": [-1.0, -2.0, -0.5],
    "ref_logprobs": [-1.2, -1.5, -0.5],
    "k1": [0.2, -0.5, 0.0],
    "k2": [0.02, 0.125, 0.0],
    "k3": [0.0187308, 0.1487213, 0.0],
}

# Three tokens: policy p = softmax(theta) = (.461488, .229168, .309344), reference q = softmax(ref_logits)
# = (.331106, .446947, .221947), l = log p - log q = (.332016, -.667984, .332016). Expectations are sums
# over the tokens, d log p_a / d theta_i = [a = i] - p_i. kl = sum p l. The gradient of kl, of k1 in the
# reward and of k2 as a loss is p_i (l_i - kl); of k1 as a loss sum_a p_a ([a = i] - p_i) = 0; of k3 as a
# loss p_i - q_i; of k3 in the reward p_i (k3_i - sum p k3).
ENUMERATION: dict[str, Any] = {
    "theta": [0.5, -0.2, 0.1],
    "ref_logits": [0.0, 0.3, -0.4],
    "kl": 0.102848,
    "grad_kl": [0.105758, -0.17665, 0.070892],
    "k1_in_reward": [0.105758, -0.17665, 0.070892],
    "k2_as_loss": [0.105758, -0.17665, 0.070892],
    "k1_as_loss": [0.0, 0.0, 0.0],
    "k3_as_loss": [0.130381, -0.217779, 0.087397],
    "k3_in_reward": [-0.024623, 0.041129, -0.016505],
}

# error = clip(kl / 6 - 1, -.2, .2) = .2, 0, -.2, .1, -.2; each step multiplies by 1 + error * 256 / 10000:
# .2 * 1.00512 = .201024; unchanged; * .99488 = .19999476; * 1.00256 = .20050674; * .99488 = .19948015
ADAPTIVE: dict[str, Any] = {
    "init": 0.2,
    "target": 6.0,
    "horizon": 10000,
    "episodes": 256,
    "kl": [12.0, 6.0, 3.0, 6.6, 0.0],
    "coef": [0.201024, 0.201024, 0.19999476, 0.20050674, 0.19948015],
    "tolerance": 1e-8,
}


def three_token_world() -> tuple[Tensor, Tensor, Tensor]:
    """Return theta and the log-probabilities of the tokens under the policy and the reference."""
    theta = torch.tensor(ENUMERATION["theta"], requires_grad=True)
    return theta, torch.log_softmax(theta, 0), torch.log_softmax(torch.tensor(ENUMERATION["ref_logits"]), 0)


def expected_loss_gradient(estimator: Estimator) -> list[float]:
    """Return the expectation, over the policy's samples, of the gradient of `estimator` as a loss."""
    theta, logprobs, ref_logprobs = three_token_world()
    loss = (logprobs.exp().detach() * estimator(logprobs, ref_logprobs)).sum()
    return torch.autograd.grad(loss, theta)[0].tolist()


def expected_policy_gradient(penalty: Tensor) -> list[float]:
    """Return the expectation of penalty * d log p / d theta, the gradient where -penalty is the reward."""
    theta, logprobs, _ = three_token_world()
    return torch.autograd.grad((logprobs.exp().detach() * penalty.detach() * logprobs).sum(), theta)[
        0
    ].tolist()


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_equal_policies_have_no_kl(estimator: Estimator) -> None:
    logprobs = torch.tensor([[-1.0, -20.0]])
    assert estimator(logprobs, logprobs).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("estimator", [k2, k3])
def test_k2_and_k3_are_never_negative(estimator: Estimator) -> None:
    gaps = torch.linspace(-3, 3, 101)
    assert (estimator(gaps, torch.zeros(101)) >= 0).all()


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator: Estimator) -> None:
    _, logprobs, ref_logprobs = three_token_world()
    assert (logprobs.exp() * estimator(logprobs, ref_logprobs)).sum().item() == pytest.approx(
        ENUMERATION["kl"], abs=1e-5
    )


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_estimators_golden(estimator: Estimator) -> None:
    logprobs, ref_logprobs = torch.tensor(ESTIMATORS["logprobs"]), torch.tensor(ESTIMATORS["ref_logprobs"])
    expected = ESTIMATORS[estimator.__name__]
    assert estimator(logprobs, ref_logprobs).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_gradients_as_a_loss(estimator: Estimator) -> None:
    expected = ENUMERATION[f"{estimator.__name__}_as_loss"]
    assert expected_loss_gradient(estimator) == pytest.approx(expected, abs=1e-5)


def test_the_penalty_of_the_shaped_rewards_has_the_gradient_of_kl() -> None:
    theta, logprobs, ref_logprobs = three_token_world()
    kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    assert torch.autograd.grad(kl, theta)[0].tolist() == pytest.approx(ENUMERATION["grad_kl"], abs=1e-5)

    one_token = torch.ones(3, 1, dtype=torch.bool)
    rewards = shaped_rewards(logprobs[:, None], ref_logprobs[:, None], torch.zeros(3), one_token, kl_coef=1.0)
    gradient = expected_policy_gradient(-rewards[:, 0])
    assert gradient == pytest.approx(ENUMERATION["k1_in_reward"], abs=1e-5)
    assert gradient == pytest.approx(ENUMERATION["grad_kl"], abs=1e-5)


def test_k3_in_the_reward_would_point_the_wrong_way() -> None:
    _, logprobs, ref_logprobs = three_token_world()
    gradient = expected_policy_gradient(k3(logprobs, ref_logprobs))
    assert gradient == pytest.approx(ENUMERATION["k3_in_reward"], abs=1e-5)
    assert sum(a * b for a, b in zip(gradient, ENUMERATION["grad_kl"], strict=True)) < 0


def test_the_golden_numbers_are_those_of_the_file(shared: Path) -> None:
    golden = json.loads((shared / "golden.json").read_text())
    assert golden["kl_and_rewards"].items() >= ESTIMATORS.items()
    assert golden["kl_gradients_by_enumeration"].items() >= ENUMERATION.items()
    assert golden["adaptive_kl"].items() >= ADAPTIVE.items()


def adaptive() -> AdaptiveKL:
    return AdaptiveKL(coef=ADAPTIVE["init"], target=ADAPTIVE["target"], horizon=ADAPTIVE["horizon"])


def test_adaptive_controller_golden() -> None:
    controller, coefs = adaptive(), []
    for kl in ADAPTIVE["kl"]:
        controller.update(kl, episodes=ADAPTIVE["episodes"])
        coefs.append(controller.coef)
    assert coefs == pytest.approx(ADAPTIVE["coef"], abs=ADAPTIVE["tolerance"], rel=0)


def test_a_controller_continues_from_its_saved_state() -> None:
    uninterrupted, first = adaptive(), adaptive()
    for controller in (uninterrupted, first):
        controller.update(12.0, episodes=256)
    resumed = adaptive()
    resumed.load_state_dict(first.state_dict())
    for controller in (uninterrupted, resumed):
        controller.update(3.0, episodes=256)
    assert resumed.coef == uninterrupted.coef


def test_the_fixed_controller_stays() -> None:
    controller = FixedKL(0.05)
    controller.update(100.0, episodes=256)
    assert controller.coef == 0.05
    resumed = FixedKL(0.1)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.coef == 0.05


@pytest.mark.parametrize("coef", [-0.1, float("nan")])
def test_a_coefficient_that_is_no_penalty_is_refused(coef: float) -> None:
    with pytest.raises(ValueError, match=rf"kl\.coef is {coef}: give a finite number"):
        FixedKL(coef)


def test_a_target_or_horizon_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl\.target is 0: .*kl\.controller=fixed"):
        AdaptiveKL(0.1, target=0, horizon=100)
    with pytest.raises(ValueError, match=r"kl\.horizon is -1: .*kl\.controller=fixed"):
        AdaptiveKL(0.1, target=6.0, horizon=-1)


def test_a_kl_that_is_not_finite_moves_no_controller() -> None:
    with pytest.raises(AssertionError, match="kl is nan"):
        adaptive().update(float("nan"), episodes=1)


def test_divergence_is_that_of_enumeration() -> None:
    logits = torch.tensor([ENUMERATION["theta"], ENUMERATION["ref_logits"]])
    others = torch.tensor([ENUMERATION["ref_logits"]]).expand(2, -1)
    found = divergence(logits, others)
    assert found.tolist() == pytest.approx([ENUMERATION["kl"], 0.0], abs=1e-6)
    # adding a number to all scores changes no distribution
    assert divergence(logits + 30, others - 5).tolist() == pytest.approx(found.tolist(), abs=1e-5)


def test_a_token_that_is_ruled_out_adds_nothing_or_everything() -> None:
    ruled_out = torch.tensor([[0.0, 0.0, -torch.inf]])
    # (1/2, 1/2, 0) from (1/3, 1/3, 1/3): log 3/2; the other way a token of probability 1/3 cannot be said
    assert divergence(ruled_out, torch.zeros(1, 3)).item() == pytest.approx(math.log(1.5))
    assert divergence(torch.zeros(1, 3), ruled_out).item() == math.inf
    assert divergence(ruled_out, ruled_out).item() == 0.0
