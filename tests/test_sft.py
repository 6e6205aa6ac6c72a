"""Supervised fine-tuning: what is cut, and that the loss is the mean over response tokens, packed or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlhf.checkpoint import StageFolder
from rlhf.config import load_config
from rlhf.engine import Engine
from rlhf.exposure.scheduled_sampling import ScheduledSampling
from rlhf.models.loading import load_tokenizer
from rlhf.records import Demonstration
from rlhf.sft import SFT, fit, sft_checks, tokenize
from rlhf.sources import tiny_folder
from rlhf.text import Encoded, TextCodec

ENGINE = Engine(torch.device("cpu"), torch.float32)
VOCABULARY = 320
DEMONSTRATIONS = [
    Demonstration("the soup was", " warm, dull and old."),
    Demonstration("my dog is", " good."),
    Demonstration("our bed felt", " round, long and very, very cold."),
    Demonstration("this", " was it"),
]


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    return TextCodec(load_tokenizer(str(tiny_folder())), style="plain", max_prompt_tokens=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of a small random model of two families, with the tiny model's tokenizer."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": None}
    gpt2 = GPT2Config(n_positions=128, n_embd=32, n_layer=2, n_head=2, **size)
    llama = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **size
    )
    folders = {}
    for name, model in {"gpt2": GPT2LMHeadModel(gpt2), "llama": LlamaForCausalLM(llama)}.items():
        for parameter in model.parameters():  # large weights: a token seen or not makes a difference
            parameter.data.mul_(3 if parameter.dim() > 1 else 1)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


def training(
    folder: Path,
    codec: TextCodec,
    runs: Path,
    *words: str,
    eval_rows: Any = None,
    engine: Engine = ENGINE,
) -> SFT:
    config = load_config(
        "sft", ["model=tiny", "data=toy", "tracker=none", f"policy={folder}", "batch_size=4", *words]
    )
    rows = tokenize(DEMONSTRATIONS, codec, 64).rows
    stage = StageFolder(str(runs), "run", "sft")
    stage.path.mkdir(parents=True, exist_ok=True)
    return SFT(config, codec, engine, {"train": rows, "eval": eval_rows or rows}, stage)


def masked_cross_entropy(model: Any, codec: TextCodec) -> torch.Tensor:
    """-sum over response tokens of log p(token | all before) / number of response tokens, row by row."""
    total, count = torch.zeros(()), 0
    for record in DEMONSTRATIONS:
        prompt, response = codec.encode_prompt(record.prompt), codec.encode_response(record.response)
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total = total + cross_entropy(logits, torch.tensor(response), reduction="sum")
        count += len(response)
    return total / count


def trained_loss(run: SFT) -> torch.Tensor:
    """The trainer's own loss of one whole optimizer step."""
    trainer = run.trainer
    batches = list(trainer.get_train_dataloader())
    rows, num_items = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    return torch.stack(
        [trainer.compute_loss(run.model, row, num_items_in_batch=num_items) for row in rows]
    ).sum()


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_is_that_of_response_tokens_packed_or_not(
    models: dict[str, Path], codec: TextCodec, tmp_path: Path, family: str, packing: bool
) -> None:
    run = training(models[family], codec, tmp_path, f"packing={packing}", "max_length=64")
    if packing:
        packed: Any = run.trainer.train_dataset
        assert len(packed) < len(DEMONSTRATIONS)
    with torch.no_grad():
        expected = masked_cross_entropy(run.model, codec)
        assert trained_loss(run).item() == pytest.approx(expected.item(), abs=2e-5)


def test_micro_batches_change_no_loss(models: dict[str, Path], codec: TextCodec, tmp_path: Path) -> None:
    def loss(size: int) -> float:
        words = ("packing=false", "max_length=64", f"engine.micro_batch_size={size}")
        run = training(models["gpt2"], codec, tmp_path / str(size), *words)
        assert run.trainer.args.gradient_accumulation_steps == 4 // size
        with torch.no_grad():
            return trained_loss(run).item()

    assert loss(1) == pytest.approx(loss(4), abs=1e-5)


SCHEDULED = ("packing=false", "max_length=64", "exposure=scheduled_sampling", "exposure.end=0.4")


def gradients(run: SFT, step: int = 0, steps: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The loss of the optimizer step `step` of `steps`, and what it asks of each weight."""
    run.trainer.state.global_step, run.trainer.state.max_steps = step, steps
    loss = trained_loss(run)
    return loss.detach(), list(
        torch.autograd.grad(loss, [p for p in run.model.parameters() if p.requires_grad])
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_with_gold_alone_scheduled_sampling_is_plain_training(
    models: dict[str, Path], codec: TextCodec, tmp_path: Path, family: str
) -> None:
    plain = gradients(training(models[family], codec, tmp_path, *SCHEDULED[:2]))
    all_gold = gradients(training(models[family], codec, tmp_path, *SCHEDULED[:3], "exposure.end=1"), 1, 1)
    assert torch.equal(plain[0], all_gold[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], all_gold[1], strict=True))
    mixed = gradients(training(models[family], codec, tmp_path, *SCHEDULED), 1, 1)
    assert not torch.allclose(plain[0], mixed[0], atol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scheduled_sampling_learns_gold_after_mixed_inputs(
    models: dict[str, Path], codec: TextCodec, tmp_path: Path, family: str
) -> None:
    """By transformers alone: arg-max predictions after gold stand where a token is not kept."""
    run = training(models[family], codec, tmp_path, *SCHEDULED, "exposure.replacement=argmax")
    found, _ = gradients(run, 1, 1)
    total, count, num_replaced = torch.zeros(()), 0, 0
    (batch,) = list(run.trainer.get_train_dataloader())
    draws = ScheduledSampling(run.config.exposure, run.config.seed).draws(1, *batch["input_ids"].shape)
    with torch.no_grad():
        for row, (tokens, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            places = (labels != -100).nonzero()[:, 0]
            tokens, labels = tokens[: places[-1] + 1], labels[: places[-1] + 1]
            predicted = run.model(tokens[None]).logits[0].argmax(-1)
            mixed = tokens.clone()
            for place in places.tolist():
                if draws[row, place, 0] >= 0.4:
                    mixed[place] = predicted[place - 1]
                    num_replaced += 1
            logits = run.model(mixed[None]).logits[0, places - 1]
            total = total + cross_entropy(logits, labels[places], reduction="sum")
            count += len(places)
    assert 0 < num_replaced < count
    assert found.item() == pytest.approx((total / count).item(), abs=2e-5)


@pytest.mark.parametrize(
    ("words", "dtype"),
    [
        (["packing=true"], torch.float32),
        (["gradient_checkpointing=true"], torch.float32),
        (["adapter=lora", "adapter.r=4", "adapter.dropout=0.5"], torch.float32),
        (["adapter=qlora", "adapter.r=4"], torch.bfloat16),
        ([], torch.bfloat16),
    ],
)
def test_every_weight_learns_from_mixed_inputs(
    models: dict[str, Path], codec: TextCodec, tmp_path: Path, words: list[str], dtype: torch.dtype
) -> None:
    engine = Engine(torch.device("cpu"), dtype)
    plain, mixed = (
        gradients(training(models["llama"], codec, tmp_path / name, *own, *words, engine=engine), 1, 1)
        for name, own in (("plain", ["max_length=64"]), ("mixed", ["max_length=64", *SCHEDULED[2:]]))
    )
    assert not torch.allclose(plain[0], mixed[0], atol=1e-3)
    learns = [bool(each.norm() > 0) for each in plain[1]]
    assert [bool(each.norm() > 0) for each in mixed[1]] == learns and any(learns)


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_change_no_mixture(
    models: dict[str, Path], codec: TextCodec, tmp_path: Path, size: int
) -> None:
    whole = gradients(training(models["gpt2"], codec, tmp_path / "whole", *SCHEDULED), 1, 1)
    words = (*SCHEDULED, f"engine.micro_batch_size={size}")
    parts = gradients(training(models["gpt2"], codec, tmp_path / "parts", *words), 1, 1)
    assert torch.allclose(whole[0], parts[0], rtol=1e-6)
    assert all(
        torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(a.norm()))
        for a, b in zip(whole[1], parts[1], strict=True)
    )


def test_evaluation_sees_gold_alone(models: dict[str, Path], codec: TextCodec, tmp_path: Path) -> None:
    plain = training(models["gpt2"], codec, tmp_path / "plain", *SCHEDULED[:2])
    mixed = training(models["gpt2"], codec, tmp_path / "mixed", *SCHEDULED)
    mixed.trainer.state.global_step = mixed.trainer.state.max_steps = 1
    assert plain.trainer.evaluate()["eval_loss"] == mixed.trainer.evaluate()["eval_loss"]


def test_prompt_tokens_are_no_labels(models: dict[str, Path], codec: TextCodec, tmp_path: Path) -> None:
    run = training(models["gpt2"], codec, tmp_path, "packing=false", "max_length=64")
    (batch,) = list(run.trainer.get_train_dataloader())
    for labels, tokens in zip(batch["labels"].tolist(), batch["input_ids"].tolist(), strict=True):
        learned = [label for label in labels if label != -100]
        assert codec.decode_response(learned) in [record.response for record in DEMONSTRATIONS]
        assert learned[-1] == codec.eos_token_id  # the end is learned too
        assert learned == [token for token, label in zip(tokens, labels, strict=True) if label != -100]


def test_fit_cuts_the_start_first_and_only_then_the_end() -> None:
    mask = [False] * 4 + [True] * 3
    whole = Encoded(list(range(7)), mask)
    assert fit(whole, 7) == (whole, False, False)
    assert fit(whole, 5) == (Encoded([2, 3, 4, 5, 6], [False, False, True, True, True]), True, False)
    # one prompt token stays, because the first response token is predicted from it
    assert fit(whole, 3) == (Encoded([3, 4, 5], [False, True, True]), True, True)


@pytest.mark.parametrize("max_length", range(2, 9))
def test_fit_keeps_a_piece_of_the_conversation(max_length: int) -> None:
    tokens = list(range(8))
    mask = [False, True, True, False, False, True, True, True]  # two turns
    fitted, _, _ = fit(Encoded(tokens, mask), max_length)
    start = fitted.tokens[0]
    assert fitted.tokens == tokens[start : start + len(fitted.tokens)] and len(fitted.tokens) <= max_length
    assert fitted.loss_mask == mask[start : start + len(fitted.tokens)]
    assert any(fitted.loss_mask) and not all(fitted.loss_mask)


def test_cut_prompts_and_responses_are_counted(codec: TextCodec) -> None:
    records = [
        Demonstration("short", " a."),
        Demonstration("a prompt of more than sixteen bytes", " a."),
        Demonstration("short", " a response that does not fit in twenty-four"),
    ]
    found = tokenize(records, codec, 24)
    assert (found.num_cut_prompts, found.num_cut_responses) == (2, 1)  # the third lost its prompt's start too
    assert [len(row) for row in found.rows["input_ids"]] == [9, 20, 24]


def test_checks_tell_a_good_run_from_a_bad_one() -> None:
    ended, cut = {"ended": True}, {"ended": False}
    assert [check.passed for check in sft_checks(3.0, 2.0, [ended, cut])] == [True, True]
    assert [check.passed for check in sft_checks(3.0, 3.0, [cut] * 40)] == [False, False]
