"""Laws of the tensors that flow: nothing but padding is lost on the way, and every shape is checked."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from rlhf.batches import Experience, PromptBatch, Rollout, join, left_pad, position_ids

PAD, EOS = 0, 2
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
RESPONSES = [[20, EOS], [21, 22, 23, 24], [25]]


def rollout_with_logprobs() -> Rollout:
    logprobs = [[-float(token) for token in response] for response in RESPONSES]
    return join(left_pad(PROMPTS, PAD), RESPONSES, PAD, logprobs)


def experience() -> Experience:
    """Return an experience whose (B, R) fields differ from each other and from row to row."""
    rollout = rollout_with_logprobs()
    generator = torch.Generator().manual_seed(0)
    names = [field.name for field in fields(Experience) if field.name not in ("rollout", "scores")]
    tensors = {name: torch.randn(3, 4, generator=generator) * rollout.response_mask for name in names}
    return Experience(rollout=rollout, scores=torch.tensor([1.0, 2.0, 3.0]), **tensors)


def test_prompts_are_padded_on_the_left_and_responses_on_the_right() -> None:
    rollout = rollout_with_logprobs()
    assert rollout.tokens.tolist() == [
        [0, 5, 6, 7, 20, 2, 0, 0],
        [0, 0, 0, 8, 21, 22, 23, 24],
        [9, 10, 11, 12, 25, 0, 0, 0],
    ]
    assert rollout.attention_mask.int().tolist() == [
        [0, 1, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 0, 0, 0],
    ]
    assert rollout.prompt_length == 4
    assert rollout.behaviour_logprobs is not None
    assert rollout.behaviour_logprobs.tolist() == [[-20, -2, 0, 0], [-21, -22, -23, -24], [-25, 0, 0, 0]]


def test_joining_and_taking_apart_loses_nothing() -> None:
    rollout = rollout_with_logprobs()
    assert rollout.responses() == RESPONSES
    assert rollout.sequences() == [prompt + tail for prompt, tail in zip(PROMPTS, RESPONSES, strict=True)]


def test_eos_is_in_the_masks_where_pad_equals_eos() -> None:
    # "token != pad" would hide the EOS that ends row 0.
    rollout = join(left_pad(PROMPTS, EOS), RESPONSES, EOS)
    assert rollout.responses() == RESPONSES
    assert rollout.response_mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert rollout.attention_mask[0].int().tolist() == [0, 1, 1, 1, 1, 1, 0, 0]


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


@pytest.mark.parametrize("index", [[0], [1], [2], [0, 2], [2, 0], [1, 0, 2]])
def test_selected_rows_keep_their_tokens_and_drop_padding_that_none_needs(index: list[int]) -> None:
    part = rollout_with_logprobs().rows(torch.tensor(index))
    assert part.responses() == [RESPONSES[i] for i in index]
    assert part.sequences() == [PROMPTS[i] + RESPONSES[i] for i in index]
    assert part.prompt_length == max(len(PROMPTS[i]) for i in index)
    assert part.response_mask.shape == (len(index), max(len(RESPONSES[i]) for i in index))
    assert part.behaviour_logprobs is not None
    assert part.behaviour_logprobs[part.response_mask].tolist() == [-t for i in index for t in RESPONSES[i]]


def test_selected_rows_of_an_experience_are_cut_alike() -> None:
    whole = experience()
    part = whole.rows(torch.tensor([2, 0]))
    assert part.scores.tolist() == [3.0, 1.0]
    for field in fields(whole):
        value = getattr(whole, field.name)
        if isinstance(value, Tensor) and field.name != "scores":
            assert getattr(part, field.name).equal(value[[2, 0], :2]), field.name


def test_rollouts_without_behaviour_logprobs_have_none_after_selection() -> None:
    rollout = join(left_pad(PROMPTS, PAD), RESPONSES, PAD)
    assert rollout.behaviour_logprobs is None
    assert rollout.rows(torch.tensor([1])).behaviour_logprobs is None


def test_padding_on_the_right_of_a_prompt_is_refused() -> None:
    tokens = torch.tensor([[5, 6, 0]])
    with pytest.raises(AssertionError, match="not padded on the left"):
        PromptBatch(tokens, tokens != 0)
    with pytest.raises(AssertionError, match="not boolean"):
        PromptBatch(tokens, (tokens != 0).long())


def test_masks_that_contradict_each_other_are_refused() -> None:
    rollout = rollout_with_logprobs()
    response_mask = rollout.response_mask.clone()
    response_mask[0, 2] = True
    with pytest.raises(AssertionError, match="response_mask differs from the attention mask"):
        Rollout(rollout.tokens, rollout.attention_mask, response_mask)
    with pytest.raises(AssertionError, match="a response has no token"):
        join(left_pad(PROMPTS, PAD), [[5], [], [6]], PAD)


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"])
def test_an_experience_of_another_shape_is_refused(name: str) -> None:
    parts = {field.name: getattr(experience(), field.name) for field in fields(Experience)}
    with pytest.raises(AssertionError, match=rf"^{name} is not \(B, R\) = \(3, 4\)"):
        Experience(**(parts | {name: torch.zeros(3, 5)}))
