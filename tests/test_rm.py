"""The reward model: what it reads, that its loss is a mean over prompts, and its normalised scores."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from rlhf.engine import Engine
from rlhf.models.forward import sequence_scores
from rlhf.models.loading import LoadOptions, head, load_tokenizer, new_reward_model
from rlhf.numerics.ranking import ranking_loss
from rlhf.records import RankedList
from rlhf.rewards import RewardModelScorer
from rlhf.rm import (
    RankedRow,
    RankingTrainer,
    calibrate,
    collate,
    prepare_for_saving,
    right_pad,
    score_rows,
    tokenize,
)
from rlhf.sources import tiny_folder
from rlhf.text import TextCodec

ENGINE = Engine(torch.device("cpu"), torch.float32)
PAD = 0


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(load_tokenizer(str(tiny_folder())), style="plain", max_prompt_tokens=16)


@pytest.fixture
def model() -> Any:
    """Return a reward model whose scores differ."""
    model = new_reward_model(str(tiny_folder()), LoadOptions())
    torch.manual_seed(0)
    model.score.weight.data.normal_(std=0.3)
    return model


def rows_of_different_lengths(num_rows: int = 8) -> list[RankedRow]:
    """Lists of 2 to 5 responses of 3 to 12 tokens, with ties and grades."""
    draw = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    rows = []
    for i in range(num_rows):
        count = 2 + i % 4
        tokens = [[number(4, 200) for _ in range(number(3, 12))] for _ in range(count)]
        rows.append(RankedRow(tokens, [1, 2, *(number(1, 3) for _ in range(count - 2))], [0.1 * i] * count))
    return rows


def trainer_of(
    model: Any, rows: list[RankedRow], folder: Path, *, micro_batch_size: int, **more: Any
) -> RankingTrainer:
    options = {"label_smoothing": 0.0, "centering": 0.01, "margin": False} | more
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=len(rows) // micro_batch_size,
        max_steps=1,
        learning_rate=0.0,  # the weights stay, their gradients are looked at
        max_grad_norm=0.0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        save_strategy="no",
    )
    return RankingTrainer(
        engine=ENGINE,
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batch: collate(batch, PAD),
        **options,
    )


def gradients(
    model: Any, rows: list[RankedRow], folder: Path, micro_batch_size: int
) -> dict[str, torch.Tensor]:
    """The gradients that one optimizer step of the trainer sees."""
    seen: dict[str, torch.Tensor] = {}
    trainer = trainer_of(model, rows, folder, micro_batch_size=micro_batch_size)
    optimizer = trainer.create_optimizer()

    def note(*_: Any) -> None:
        seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(note)
    trainer.train()
    return seen


def expected_loss(model: Any, rows: list[RankedRow], **options: Any) -> torch.Tensor:
    """The mean over prompts, each response forwarded by itself without padding."""
    total = torch.zeros(())
    for row in rows:
        scores = torch.cat(
            [
                sequence_scores(model, torch.tensor([t]), torch.ones(1, len(t), dtype=torch.bool))
                for t in row.tokens
            ]
        )
        loss, _ = ranking_loss(scores, torch.zeros(len(row.ranks)).long(), torch.tensor(row.ranks), **options)
        total = total + loss
    return total / len(rows)


def test_one_batch_of_eight_and_eight_of_one_give_the_same_gradient(model: Any, tmp_path: Path) -> None:
    rows = rows_of_different_lengths()
    whole = gradients(model, rows, tmp_path, 8)
    assert "score.weight" in whole and len(whole) > 10
    model.zero_grad()
    expected_loss(model, rows, centering=0.01).backward()
    by_hand = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for size in (1, 2):
        model.zero_grad()
        parts = gradients(model, rows, tmp_path, size)
        for name, gradient in by_hand.items():
            scale = gradient.norm() + 1e-8
            assert (whole[name] - gradient).norm() / scale < 1e-4, name
            assert (parts[name] - gradient).norm() / scale < 1e-4, name


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.2}, {"centering": 0.5}, {"margin": True}],
    ids=["plain", "smooth", "centre", "margin"],
)
def test_the_loss_is_the_mean_over_prompts(model: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    rows = rows_of_different_lengths()
    trainer = trainer_of(model, rows, tmp_path, micro_batch_size=8, **options)
    with torch.no_grad():
        found = trainer.compute_loss(model, collate(rows, PAD))
        numbers = {"centering": 0.01} | options
        if numbers.pop("margin", False):
            rows = [RankedRow(row.tokens, row.ranks, row.grades) for row in rows]
            parts = [expected_loss(model, [row], margin=torch.tensor(row.grades), **numbers) for row in rows]
            expected = torch.stack(parts).mean()
        else:
            expected = expected_loss(model, rows, **numbers)
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_order_of_lists_changes_no_loss(model: Any, tmp_path: Path) -> None:
    rows = rows_of_different_lengths()
    trainer = trainer_of(model, rows, tmp_path, micro_batch_size=8)
    with torch.no_grad():
        one, other = (trainer.compute_loss(model, collate(some, PAD)) for some in (rows, rows[::-1]))
    assert one.item() == pytest.approx(other.item(), abs=1e-5)


def test_collate_keeps_a_prompts_responses_together() -> None:
    rows = [
        RankedRow([[5, 6], [7]], [1, 2], None),
        RankedRow([[8], [9, 9, 9], [4]], [2, 1, 2], [0.1, 0.9, 0.1]),
    ]
    batch = collate(rows, PAD)
    assert batch["tokens"].tolist() == [[5, 6, 0], [7, 0, 0], [8, 0, 0], [9, 9, 9], [4, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [2, 1, 1, 3, 1]
    assert batch["prompt_index"].tolist() == [0, 0, 1, 1, 1]
    assert batch["ranks"].tolist() == [1, 2, 2, 1, 2]
    assert batch["grades"].tolist() == pytest.approx([0, 0, 0.1, 0.9, 0.1])


def test_a_prompt_loses_its_start_and_a_response_is_never_cut(codec: TextCodec) -> None:
    prompt, short, long = "the soup was", " ok.", " a much longer one."
    record = RankedList(prompt, (short, long), (1, 2))
    whole, short_tokens, long_tokens = codec.encode_prompt(prompt), *map(codec.encode_response, (short, long))
    found = tokenize([record], codec, 24)
    # 24 - 20 tokens of the long response leave 4 of the prompt's 12
    assert found.rows[0].tokens == [whole + short_tokens, whole[-4:] + long_tokens]
    assert (found.num_cut_prompts, found.num_long_responses) == (1, 0)


def test_a_response_that_does_not_fit_is_left_out_and_counted(codec: TextCodec) -> None:
    record = RankedList(
        "the soup was", (" ok.", " bad.", " far too long to fit."), (2, 3, 1), scores=(0.5, 0.1, 0.9)
    )
    found = tokenize([record, RankedList("x", (" ok.", " far too long to fit."), (1, 2))], codec, 18)
    assert found.num_long_responses == 2
    (row,) = found.rows  # the second list has no pair left
    assert (row.ranks, row.grades, len(row.tokens)) == ([2, 3], [0.5, 0.1], 2)
    assert [record.responses for record in found.records] == [(" ok.", " bad.")]


def test_prompts_cut_to_max_prompt_tokens_are_counted(codec: TextCodec) -> None:
    record = RankedList("a prompt of more than sixteen tokens", (" ok.", " bad."), (1, 2))
    found = tokenize([record], codec, 40)
    assert found.num_cut_prompts == 1
    assert len(found.rows[0].tokens[0]) == 16 + len(codec.encode_response(" ok."))


def test_ties_are_no_pairs(codec: TextCodec) -> None:
    assert tokenize([RankedList("x", (" a", " b"), (1, 1))], codec, 40).rows == []


def test_sampled_tokens_are_taken_where_the_tokenizer_is_the_same(codec: TextCodec) -> None:
    tokens = ((70, 71), (72, 73, codec.eos_token_id))  # not what encode_response would give
    for fingerprint, taken in ((codec.fingerprint(), True), ("another", False)):
        record = RankedList("x", (" a", " b"), (1, 2), None, tokens, fingerprint)
        rows = tokenize([record], codec, 40).rows[0].tokens
        prompt = codec.encode_prompt("x")
        expected = list(tokens) if taken else [codec.encode_response(" a"), codec.encode_response(" b")]
        assert rows == [prompt + list(response) for response in expected]


def test_scores_do_not_change_with_padding_order_or_batch(model: Any) -> None:
    rows = [tokens for row in rows_of_different_lengths() for tokens in row.tokens]
    together = score_rows(model, rows, pad_token_id=PAD, engine=ENGINE)
    alone = torch.cat([score_rows(model, [row], pad_token_id=PAD, engine=ENGINE) for row in rows])
    turned = score_rows(model, rows[::-1], pad_token_id=PAD, engine=ENGINE).flip(0)
    other_pad = score_rows(model, rows, pad_token_id=7, engine=ENGINE)
    for other in (alone, turned, other_pad):
        assert (together - other).abs().max() < 1e-5
    tokens, mask = right_pad(rows, PAD)
    left = torch.zeros_like(tokens), torch.zeros_like(mask)
    for i, row in enumerate(rows):
        left[0][i, tokens.shape[1] - len(row) :] = torch.tensor(row)
        left[1][i, tokens.shape[1] - len(row) :] = True
    with torch.no_grad():
        assert (sequence_scores(model, *left) - together).abs().max() < 1e-5
    assert together.std() > 0.1


def test_a_response_beyond_the_context_is_shown_with_what_to_do(model: Any, codec: TextCodec) -> None:
    scorer = RewardModelScorer(model, codec, ENGINE, name="rm")
    assert len(scorer(["my dog is"], ["warm."])) == 1
    context = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=rf"rm: the response '?\W*warm.* its context {context}: shorten it"):
        scorer(["my dog is"], ["warm " * context])


def test_calibrated_scores_have_mean_0_and_variance_1(model: Any) -> None:
    rows = [tokens for row in rows_of_different_lengths(16) for tokens in row.tokens]
    before = score_rows(model, rows, pad_token_id=PAD, engine=ENGINE)
    found = calibrate(model, rows, pad_token_id=PAD, engine=ENGINE)
    after = score_rows(model, rows, pad_token_id=PAD, engine=ENGINE)
    assert after.mean().item() == pytest.approx(0, abs=1e-3)
    assert after.var(correction=0).item() == pytest.approx(1, abs=1e-3)
    assert found["mean_before"] == pytest.approx(before.mean().item(), abs=1e-4)
    assert found["std_before"] == pytest.approx(before.std(correction=0).item(), abs=1e-4)
    correlation = torch.corrcoef(torch.stack([before, after]))[0, 1].item()
    assert found["correlation"] == pytest.approx(correlation, abs=1e-3)
    assert correlation > 0.9  # the order is what was learned
    # a second time changes nothing
    weight = head(model).weight.detach().clone()
    calibrate(model, rows, pad_token_id=PAD, engine=ENGINE)
    assert torch.allclose(head(model).weight, weight, atol=1e-3)


def test_scores_that_are_all_equal_cannot_be_normalised(model: Any) -> None:
    model.score.weight.data.zero_()
    with pytest.raises(ValueError, match="gives every sample the same score"):
        calibrate(model, [[5, 6], [7, 8]], pad_token_id=PAD, engine=ENGINE)


def test_a_model_without_a_free_pad_token_gets_one(model: Any, codec: TextCodec) -> None:
    tokenizer = load_tokenizer(str(tiny_folder()))
    tokenizer.pad_token = tokenizer.eos_token
    own = TextCodec(tokenizer, style="plain")
    assert own.pad_token_id == own.eos_token_id
    saved = prepare_for_saving(model, own)
    assert saved.pad_token_id != saved.eos_token_id
    assert model.config.pad_token_id == saved.pad_token_id < model.get_input_embeddings().num_embeddings
    kept = prepare_for_saving(model, codec)
    assert kept.pad_token_id == codec.pad_token_id
