"""KL of two distributions, its estimators from sampled tokens, and the controllers of its coefficient.

Schulman, "Approximating KL divergence" (2020), http://joschu.net/blog/kl-approx.html. With log_ratio =
ref_logprobs - logprobs of tokens sampled from the policy, every estimator has mean KL or close to it, but
their gradients differ: in the reward only k1 is unbiased, as a loss k2 has the gradient of KL and k1 has
none.
"""

import math

import torch
from torch import Tensor

MAX_RELATIVE_ERROR = 0.2


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return -log_ratio: unbiased, high variance, either sign. Shapes (...), (...) -> (...)."""
    return -_log_ratio(logprobs, ref_logprobs)


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return log_ratio^2 / 2: biased, low variance, never negative. Shapes as for `k1`."""
    return _log_ratio(logprobs, ref_logprobs).square() / 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return exp(log_ratio) - 1 - log_ratio: unbiased, low variance, never negative. Shapes as for `k1`."""
    log_ratio = _log_ratio(logprobs, ref_logprobs)
    return log_ratio.expm1() - log_ratio


def _log_ratio(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    assert logprobs.shape == ref_logprobs.shape, (logprobs.shape, ref_logprobs.shape)
    return ref_logprobs.float() - logprobs.float()


def divergence(logits: Tensor, other_logits: Tensor) -> Tensor:
    """Return KL(p || q) in nats for p = softmax(logits), q = softmax(other_logits), in float32.

    sum_v p_v (log p_v - log q_v), exactly; a token that p rules out adds 0. Shapes (N, V), (N, V) -> (N,).
    """
    assert logits.shape == other_logits.shape, (logits.shape, other_logits.shape)
    logprobs, others = (torch.log_softmax(each.float(), dim=-1) for each in (logits, other_logits))
    gaps = torch.where(logprobs == -torch.inf, 0.0, logprobs - others)  # not -inf + inf, nor 0 * inf
    return torch.linalg.vecdot(logprobs.exp(), gaps)


class FixedKL:
    """A KL coefficient that stays as it is, with the verbs of `AdaptiveKL`."""

    def __init__(self, coef: float) -> None:
        """Raise ValueError when `coef` is negative or not finite; 0 means no penalty."""
        if not (math.isfinite(coef) and coef >= 0):
            raise ValueError(f"kl.coef is {coef}: give a finite number, 0 (no KL penalty) or more")
        self.coef = coef

    def update(self, kl: float, episodes: int) -> None:
        """Leave the coefficient alone."""

    def state_dict(self) -> dict[str, float]:
        """Return what resuming needs."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()`."""
        self.coef = state["coef"]


class AdaptiveKL(FixedKL):
    """A coefficient steered so that the KL of a sequence approaches `target`.

    coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon. Ziegler et al. (2019), section 2.2,
    https://arxiv.org/abs/1909.08593.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        """Raise ValueError for a coefficient below 0 or a target or horizon that is not above 0.

        target: nats per sequence; horizon: episodes over which the coefficient adapts.
        """
        super().__init__(coef)
        for key, value in (("kl.target", target), ("kl.horizon", horizon)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"{key} is {value}: give a finite number above 0, or set kl.controller=fixed"
                )
        self.target, self.horizon = target, horizon

    def update(self, kl: float, episodes: int) -> None:
        """Take in the `kl` of `episodes` sequences: k1 summed over a sequence, averaged over sequences."""
        assert math.isfinite(kl), f"kl is {kl}"
        error = min(max(kl / self.target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
        self.coef *= 1 + error * episodes / self.horizon
