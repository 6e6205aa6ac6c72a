"""Laws and golden numbers of per-token rewards and generalised advantages."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.numerics.advantages import gae, shaped_rewards

NAN = float("nan")

# rewards = -.1 * (logprob - ref) = -.1 * (.2, -.5, 0), plus the score 1 on the last token
REWARDS: dict[str, Any] = {
    "logprobs": [-1.0, -2.0, -0.5],
    "ref_logprobs": [-1.2, -1.5, -0.5],
    "kl_coef": 0.1,
    "score_at_last_token": 1.0,
    "rewards": [-0.02, 0.05, 1.0],
}

# gamma 1: delta = -.02 + .4 - .5, .05 + .3 - .4, 1 + 0 - .3 = -.12, -.05, .7 (= lambda 0);
# lambda .95: -.05 + .95 * .7 = .615, -.12 + .95 * .615 = .46425; lambda 1: .7 - .05 = .65, .65 - .12 = .53.
# gamma .99: delta = -.02 + .396 - .5, .05 + .297 - .4, .7 = -.124, -.053, .7 with factor .9405:
# -.053 + .65835 = .60535, -.124 + .9405 * .60535 = .445332. returns = advantages + values.
GAE: dict[str, Any] = {
    "rewards": [-0.02, 0.05, 1.0],
    "values": [0.5, 0.4, 0.3],
    "cases": [
        {"gamma": 1.0, "lam": 0.95, "advantages": [0.46425, 0.615, 0.7], "returns": [0.96425, 1.015, 1.0]},
        {"gamma": 1.0, "lam": 1.0, "advantages": [0.53, 0.65, 0.7], "returns": [1.03, 1.05, 1.0]},
        {"gamma": 1.0, "lam": 0.0, "advantages": [-0.12, -0.05, 0.7], "returns": [0.38, 0.35, 1.0]},
        {
            "gamma": 0.99,
            "lam": 0.95,
            "advantages": [0.445332, 0.60535, 0.7],
            "returns": [0.945332, 1.00535, 1.0],
        },
    ],
    # delta = -.1, -.1, .7; -.1 + .665 = .565; -.1 + .95 * .565 = .43675
    "sparse": {
        "rewards": [0.0, 0.0, 1.0],
        "values": [0.5, 0.4, 0.3],
        "gamma": 1.0,
        "lam": 0.95,
        "advantages": [0.43675, 0.565, 0.7],
    },
}


def random_batch(padding: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return rewards, values and a mask of responses of 1 to 6 tokens, NaN in what is padded."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 6, 6, generator=generator)
    mask = torch.arange(6)[None] < torch.tensor([6, 1, 3, 5, 2, 4])[:, None]
    pad = torch.full((6, padding), NAN)
    rewards = torch.cat([rewards.masked_fill(~mask, NAN), pad], dim=1)
    values = torch.cat([values.masked_fill(~mask, NAN), pad], dim=1)
    return rewards, values, torch.cat([mask, torch.zeros(6, padding, dtype=torch.bool)], dim=1)


def test_lambda_0_is_the_td_error() -> None:
    rewards, values, mask = random_batch()
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        for t in range(length):
            after = values[row, t + 1].item() if t + 1 < length else 0.0
            expected = rewards[row, t].item() + 0.9 * after - values[row, t].item()
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-5)


def test_lambda_1_is_the_monte_carlo_return_minus_the_value() -> None:
    rewards, values, mask = random_batch()
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=1.0)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        for t in range(length):
            monte_carlo = sum(0.9 ** (s - t) * rewards[row, s].item() for s in range(t, length))
            assert returns[row, t].item() == pytest.approx(monte_carlo, abs=1e-5)
            assert advantages[row, t].item() == pytest.approx(monte_carlo - values[row, t].item(), abs=1e-5)


def test_junk_in_right_padding_changes_nothing() -> None:
    for narrow, wide in zip(
        gae(*random_batch(), gamma=0.99, lam=0.95),
        gae(*random_batch(padding=4), gamma=0.99, lam=0.95),
        strict=True,
    ):
        assert torch.equal(wide[:, :6], narrow)
        assert (wide[~random_batch(padding=4)[2]] == 0).all()


def test_row_order_changes_nothing() -> None:
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    rewards, values, mask = random_batch()
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    permuted = gae(rewards[order], values[order], mask[order], gamma=1.0, lam=0.95)
    assert torch.equal(permuted[0], advantages[order]) and torch.equal(permuted[1], returns[order])


@pytest.mark.parametrize("case", GAE["cases"], ids=lambda case: f"gamma={case['gamma']},lam={case['lam']}")
def test_gae_golden(case: dict) -> None:
    rewards = torch.tensor([[*GAE["rewards"], 7.0]])
    values = torch.tensor([[*GAE["values"], -9.0]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=case["gamma"], lam=case["lam"])
    assert advantages[0].tolist() == pytest.approx([*case["advantages"], 0.0], abs=1e-5)
    assert returns[0].tolist() == pytest.approx([*case["returns"], 0.0], abs=1e-5)


def test_gae_golden_with_a_reward_at_the_end_alone() -> None:
    sparse = GAE["sparse"]
    rewards, values = torch.tensor([sparse["rewards"]]), torch.tensor([sparse["values"]])
    advantages, _ = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.95)
    assert advantages[0].tolist() == pytest.approx(sparse["advantages"], abs=1e-5)


def test_the_golden_numbers_are_those_of_the_file(shared: Path) -> None:
    golden = json.loads((shared / "golden.json").read_text())
    assert golden["gae"].items() >= GAE.items()
    assert golden["kl_and_rewards"].items() >= REWARDS.items()


def test_inputs_are_left_as_they_were_and_nothing_is_differentiated() -> None:
    rewards, values = torch.ones(1, 2), torch.ones(1, 2, requires_grad=True)
    advantages, returns = gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert rewards.tolist() == [[1.0, 1.0]]
    assert not advantages.requires_grad and not returns.requires_grad


def test_left_padding_is_refused() -> None:
    with pytest.raises(AssertionError, match="padded right"):
        gae(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[False, True]]), gamma=1.0, lam=1.0)


def test_the_score_stands_on_the_last_real_token_and_nan_padding_stays_out() -> None:
    logprobs = torch.tensor([[-1.0, -1.0, NAN, NAN], [-1.0, -1.0, -1.0, -1.0], [-1.0, NAN, NAN, NAN]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    rewards = shaped_rewards(logprobs, logprobs, torch.tensor([5.0, 6.0, 7.0]), mask, kl_coef=0.1)
    assert rewards.tolist() == [[0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 6.0], [7.0, 0.0, 0.0, 0.0]]


def test_shaped_rewards_golden() -> None:
    rewards = shaped_rewards(
        torch.tensor([[*REWARDS["logprobs"], 3.0]]),
        torch.tensor([[*REWARDS["ref_logprobs"], NAN]]),
        torch.tensor([REWARDS["score_at_last_token"]]),
        torch.tensor([[True, True, True, False]]),
        REWARDS["kl_coef"],
    )
    assert rewards[0].tolist() == pytest.approx([*REWARDS["rewards"], 0.0], abs=1e-6)


def test_the_total_reward_is_the_score_minus_the_kl_of_the_sequence() -> None:
    generator = torch.Generator().manual_seed(3)
    logprobs, ref_logprobs = torch.randn(2, 4, 6, generator=generator)
    mask = torch.arange(6)[None] < torch.tensor([6, 2, 1, 4])[:, None]
    scores = torch.randn(4, generator=generator)
    rewards = shaped_rewards(logprobs, ref_logprobs, scores, mask, kl_coef=0.3)
    kl = ((logprobs - ref_logprobs) * mask).sum(dim=1)
    torch.testing.assert_close(rewards.sum(dim=1), scores - 0.3 * kl)


def test_no_other_estimator_can_be_put_into_the_reward() -> None:
    tensors = (torch.ones(1, 1), torch.ones(1, 1), torch.ones(1), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(TypeError):
        shaped_rewards(*tensors, 0.1, estimator="k3")  # type: ignore[call-arg]
