"""The loss of reward models over ranked lists, and how well their score gaps predict preferences.

A batch is flat: response i has a score, the index of its prompt, and a rank among that prompt's responses (1
= best, equal ranks tie). Lists may differ in length and stand in any order; a pair is a list of two. Letters:
N responses, M untied pairs.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def ranking_loss(  # noqa: PLR0913 (a flat batch and three options of the loss)
    scores: Tensor,
    prompt_index: Tensor,
    ranks: Tensor,
    *,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    centering: float = 0.0,
) -> tuple[Tensor, int]:
    """Return the sum over prompts of the mean loss of their untied pairs, and how many prompts have one.

    Bradley-Terry: a pair of gap = score(better) - score(worse) costs -log sigmoid(gap). Divide by the number
    of prompts with a pair in the whole optimizer step. Without a pair the loss is 0 and still backpropagates.
    Shapes (N,) -> scalar. Ouyang et al. (2022), https://arxiv.org/abs/2203.02155, equation 1.

    margin (N,): grades of the responses; the gap must exceed the pair's difference of grades (Touvron et al.
    2023, https://arxiv.org/abs/2307.09288, section 3.2.2). label_smoothing: share of labels taken as flipped.
    centering: weight of (score(better) + score(worse))^2, which keeps scores near 0 (Eisenstein et al. 2023,
    https://arxiv.org/abs/2312.09244).
    """
    better, worse = _untied_pairs(prompt_index, ranks)
    assert scores.shape == ranks.shape, (scores.shape, ranks.shape)
    scores = scores.float()
    gaps = scores[better] - scores[worse]
    if margin is not None:
        gaps = gaps - (margin[better] - margin[worse])
    losses = (1 - label_smoothing) * softplus(-gaps) + label_smoothing * softplus(gaps)
    losses = losses + centering * (scores[better] + scores[worse]).square()
    _, prompt_of_pair, num_pairs = prompt_index[better].unique(return_inverse=True, return_counts=True)
    return (losses / num_pairs[prompt_of_pair]).sum(), len(num_pairs)


def calibration(gaps: Tensor, *, num_bins: int = 10) -> dict[str, float]:
    """Return accuracy, nll, brier and ece of gaps (M,), M >= 1, read as P(better wins) = sigmoid(gap).

    accuracy: share of gaps above 0, a gap of 0 counts half. nll: mean -log P. brier: mean (1 - P)^2. ece:
    expected |accuracy - confidence| over equal bins of the confidence sigmoid(|gap|) in [.5, 1] (Guo et al.
    2017, https://arxiv.org/abs/1706.04599).
    """
    assert gaps.dim() == 1 and len(gaps) > 0, gaps.shape
    gaps = gaps.detach().double()
    correct = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    confidence = torch.sigmoid(gaps.abs())
    bins = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    excess = torch.zeros(num_bins, dtype=torch.float64, device=gaps.device)
    excess = excess.index_add(0, bins, correct - confidence)
    return {
        "accuracy": correct.mean().item(),
        "nll": softplus(-gaps).mean().item(),
        "brier": torch.sigmoid(-gaps).square().mean().item(),
        "ece": (excess.abs().sum() / len(gaps)).item(),
    }


def _untied_pairs(prompt_index: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions (M,) of the better and of the worse response of all untied pairs within a prompt."""
    assert prompt_index.shape == ranks.shape and ranks.dim() == 1 and len(ranks) > 0, (
        prompt_index.shape,
        ranks.shape,
    )
    order = prompt_index.argsort(stable=True)
    longest_list = int(prompt_index.unique(return_counts=True)[1].max())
    # neighbours at distance 1, 2, ... in the order by prompt: memory N x K, not N x N
    left = torch.cat([order[: len(order) - distance] for distance in range(1, longest_list)] or [order[:0]])
    right = torch.cat([order[distance:] for distance in range(1, longest_list)] or [order[:0]])
    untied = (prompt_index[left] == prompt_index[right]) & (ranks[left] != ranks[right])
    left, right = left[untied], right[untied]
    left_wins = ranks[left] < ranks[right]
    return torch.where(left_wins, left, right), torch.where(left_wins, right, left)
