"""Laws of loading and of the forward passes, for every family, on left-padded batches of unequal length."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.batches import Rollout, join, left_pad
from rlhf.config import load_config
from rlhf.models.forward import (
    response_logprobs,
    response_logprobs_and_entropy,
    response_values,
    sequence_scores,
    states_at,
)
from rlhf.models.loading import (
    LoadOptions,
    load_causal_lm,
    load_codec,
    load_reward_model,
    load_tokenizer,
    new_reward_model,
    num_parameters,
    same_tokenizer,
)
from tests.models.families import BOS, EOS, FAMILIES, PAD, attention_of, load

PROMPTS = [[BOS, 5, 9, 30, 12, 7, 40], [8], [BOS, 22, 6], [31, 11, 19, 4, 25]]
RESPONSES = [[13, 44, EOS], [17, 9, 9, 21, 35, 6, 28, 41], [20], [33, 15, 27, 18, EOS]]
TEMPERATURE = 0.7


def options(family: str, **more: Any) -> LoadOptions:
    return LoadOptions(attention=attention_of(family), **more)


def rollout(pad: int = PAD) -> Rollout:
    return join(left_pad(PROMPTS, pad), RESPONSES, pad)


def padded_further(batch: Rollout, left: int, right: int) -> Rollout:
    """Return the same rows with more padding on both sides."""

    def wide(values: Tensor, fill: int) -> Tensor:
        return nn.functional.pad(values, (left, right), value=fill)

    response_mask = nn.functional.pad(batch.response_mask, (0, right))
    return Rollout(wide(batch.tokens, PAD), wide(batch.attention_mask, 0), response_mask)


def naive_logprobs(families: Path, family: str) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probs and entropies of the responses by transformers' own head, row by row, without padding."""
    model = AutoModelForCausalLM.from_pretrained(
        families / family, attn_implementation=attention_of(family)
    ).eval()
    logprobs, entropies = [], []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        tokens = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = model(tokens, position_ids=torch.arange(tokens.shape[1])[None]).logits[0].double()
        table = torch.log_softmax(logits / TEMPERATURE, -1)[len(prompt) - 1 : -1]
        logprobs.append(table[torch.arange(len(response)), torch.tensor(response)].float())
        entropies.append(-(table.exp() * table).sum(-1).float())
    return logprobs, entropies


def gradient(model: Any, pieces: list[Rollout], weights: list[Tensor]) -> Tensor:
    """Return the gradient of sum(weights * logprobs) over the pieces, all parameters in one vector."""
    model.zero_grad()
    for piece, weight in zip(pieces, weights, strict=True):
        (response_logprobs(model, piece, temperature=TEMPERATURE) * weight).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_entropies_are_those_of_a_naive_forward(families: Path, family: str) -> None:
    expected_logprobs, expected_entropies = naive_logprobs(families, family)
    batch = rollout()
    with torch.no_grad():
        logprobs, entropies = response_logprobs_and_entropy(
            load(families, family), batch, temperature=TEMPERATURE
        )
    mask = batch.response_mask
    torch.testing.assert_close(logprobs[mask], torch.cat(expected_logprobs), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropies[mask], torch.cat(expected_entropies), rtol=0, atol=1e-5)
    assert not logprobs[~mask].any() and not entropies[~mask].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_order_and_micro_batches_change_no_value(families: Path, family: str) -> None:
    model, critic = load(families, family), load_reward_model(str(families / f"{family}-rm"), options(family))
    head = nn.Linear(critic.score.in_features, 1)
    batch = rollout()

    def both(piece: Rollout) -> Tensor:
        logprobs = response_logprobs(model, piece, temperature=TEMPERATURE)
        return torch.stack([logprobs, response_values(critic, head, piece)])

    with torch.no_grad():
        expected = both(batch)
        padded = both(padded_further(batch, left=3, right=2))
        order = torch.tensor([2, 0, 3, 1])
        shuffled = both(batch.rows(order))
        rows = [both(batch.rows(torch.tensor([i]))) for i in range(4)]
    torch.testing.assert_close(padded[..., :8], expected, rtol=0, atol=1e-5)
    assert not padded[..., 8:].any()
    torch.testing.assert_close(shuffled, expected[:, order], rtol=0, atol=1e-5)
    for i, row in enumerate(rows):
        torch.testing.assert_close(row[:, 0], expected[:, i, : row.shape[-1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_order_and_micro_batches_change_no_gradient(families: Path, family: str) -> None:
    # In float64, where rounding (1e-16) cannot hide a difference; 1e-6 is asked relative to the norm. Gemma 2
    # computes its softmax in float32 in any case, and rounds to about 1e-7 of each of many terms.
    single = family == "gemma2"
    model, bound = (load(families, family), 2e-6) if single else (load(families, family).double(), 1e-6)
    batch = rollout()
    weights = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)) * batch.response_mask
    expected = gradient(model, [batch], [weights])
    assert expected.norm() > 1
    padded = gradient(model, [padded_further(batch, left=3, right=2)], [nn.functional.pad(weights, (0, 2))])
    indices = [torch.tensor([3, 0]), torch.tensor([1]), torch.tensor([2])]
    pieces = [batch.rows(index) for index in indices]
    cut = [
        weights[index, : piece.response_mask.shape[1]] for index, piece in zip(indices, pieces, strict=True)
    ]
    split = gradient(model, pieces, cut)
    assert float((padded - expected).norm() / expected.norm()) < bound
    assert float((split - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("family", FAMILIES)
def test_values_belong_to_the_states_before_the_tokens(families: Path, family: str) -> None:
    # values[t] reads the hidden state of the token before response token t, whatever t itself is.
    critic = load_reward_model(str(families / f"{family}-rm"), options(family))
    head = nn.Linear(critic.score.in_features, 1)
    with torch.no_grad():
        values = response_values(critic, head, rollout())
        tokens = torch.tensor([PROMPTS[3] + RESPONSES[3]])
        everywhere, columns = torch.ones_like(tokens, dtype=torch.bool), torch.arange(4, 9)
        states = states_at(critic, tokens, everywhere, torch.zeros_like(columns), columns)
        expected = head(states)[:, 0]
    torch.testing.assert_close(values[3, :5], expected, rtol=0, atol=1e-5)
    assert not values[~rollout().response_mask].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_read_at_the_last_real_token(families: Path, family: str) -> None:
    # With EOS (rows 0 and 3) and without (1 and 2), under either side's padding, and with a pad that is EOS.
    model = load_reward_model(str(families / f"{family}-rm"), options(family))
    naive = AutoModelForSequenceClassification.from_pretrained(
        families / f"{family}-rm", num_labels=1, attn_implementation=attention_of(family)
    ).eval()
    rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.no_grad():
        # A row without padding: transformers reads the score at its last token.
        expected = torch.cat([naive(torch.tensor([row])).logits[:, 0] for row in rows])
        for pad in (PAD, EOS):
            left = left_pad(rows, pad)
            found = sequence_scores(model, left.tokens, left.attention_mask)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            # The rows reversed, padded on the left and reversed again are padded on the right.
            mirrored = left_pad([row[::-1] for row in rows], pad)
            tokens, mask = mirrored.tokens.flip(1), mirrored.attention_mask.flip(1)
            assert tokens[1, :9].tolist() == rows[1]
            torch.testing.assert_close(sequence_scores(model, tokens, mask), expected, rtol=0, atol=1e-5)
            both = batch_with_both_sides(tokens, mask, pad)
            torch.testing.assert_close(sequence_scores(model, *both), expected, rtol=0, atol=1e-5)
    assert found.dtype == torch.float32 and expected.std() > 0.01


def batch_with_both_sides(tokens: Tensor, mask: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    return nn.functional.pad(tokens, (2, 3), value=pad), nn.functional.pad(mask, (2, 3))


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_off_although_the_configuration_names_it(families: Path, family: str) -> None:
    # Training mode is what gradient checkpointing needs; nothing may be random in it.
    for model in (load(families, family), load_reward_model(str(families / f"{family}-rm"), options(family))):
        batch = rollout()
        with torch.no_grad():
            everywhere = batch.attention_mask.nonzero(as_tuple=True)
            expected = states_at(model, batch.tokens, batch.attention_mask, *everywhere)
            model.train()
            for _ in range(3):
                found = states_at(model, batch.tokens, batch.attention_mask, *everywhere)
                assert found.equal(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_reward_model_scores_by_a_float32_head(families: Path, family: str) -> None:
    model = new_reward_model(str(families / family), options(family, dtype=torch.bfloat16))
    assert model.score.weight.dtype == torch.float32 and model.score.weight.shape[0] == 1
    batch = left_pad(PROMPTS, PAD)
    with torch.no_grad():
        model.score.weight.fill_(1.0)
        scores = sequence_scores(model, batch.tokens, batch.attention_mask)
    assert scores.dtype == torch.float32 and scores.std() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_without_weights(families: Path, family: str) -> None:
    assert num_parameters(str(families / family)) == load(families, family).num_parameters()


def test_logits_changed_behind_the_head_are_refused(families: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A stand-in for families that scale their logits (Cohere, Granite).
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def scaled(self: Any, *arguments: Any, **settings: Any) -> Any:
        output = forward(self, *arguments, **settings)
        output.logits = 0.5 * output.logits
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", scaled)
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its logits after the output layer"):
        load(families, "llama")


def test_the_wrong_kind_of_checkpoint_is_refused_by_name(families: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"policy=.*llama-rm is a reward model .*; a language model is due here"
    ):
        load_causal_lm(str(families / "llama-rm"), LoadOptions())
    with pytest.raises(ValueError, match=r"critic=.*llama is LlamaForCausalLM, without a score head; train"):
        load_reward_model(str(families / "llama"), LoadOptions(), key="critic")
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        load_causal_lm(str(tmp_path / "absent"), LoadOptions())
    with pytest.raises(FileNotFoundError, match=r"is no model folder: it has no config\.json"):
        load_causal_lm(str(tmp_path), LoadOptions())


def test_a_reward_model_without_head_or_with_more_labels_is_refused(families: Path, tmp_path: Path) -> None:
    headless = tmp_path / "headless"
    shutil.copytree(families / "llama", headless)
    config = json.loads((headless / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["LlamaForSequenceClassification"]
    (headless / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has no weights for \['score.weight'\]; retrain it with stage=rm"):
        load_reward_model(str(headless), LoadOptions())


def test_a_folder_left_half_written_is_refused(families: Path, tmp_path: Path) -> None:
    shutil.copytree(families / "llama", tmp_path / "sft" / "model")
    (tmp_path / "sft" / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="left half written: its stage did not finish; run it again"):
        load_causal_lm(str(tmp_path / "sft" / "model"), LoadOptions())
    (tmp_path / "sft" / "stage.json").write_text("{}", encoding="utf-8")
    load_causal_lm(str(tmp_path / "sft" / "model"), LoadOptions())


REMOTE_CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path(MARKER).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_out_of_a_checkpoint_runs_only_where_it_is_asked_for(
    families: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    path, marker = tmp_path / "own", tmp_path / "it ran"
    shutil.copytree(families / "llama", path)
    (path / "own.py").write_text(REMOTE_CODE.replace("MARKER", repr(str(marker))), encoding="utf-8")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (path / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto_map}))
    words = ["model=tiny", "data=toy", "data.max_response_tokens=8"]
    loaders: list[Any] = [
        lambda config: load_codec(str(path), config),
        lambda config: num_parameters(str(path), config.model),
        lambda config: load_causal_lm(
            str(path), LoadOptions(trust_remote_code=config.model.trust_remote_code)
        ),
    ]
    for load_it in loaders:
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load_it(load_config("ppo", words))
    assert not marker.exists()
    found = [load_it(load_config("ppo", [*words, "model.trust_remote_code=true"])) for load_it in loaders]
    assert marker.exists() and type(found[-1]).__name__ == "OwnModel"
    assert found[1] == num_parameters(str(families / "llama"))


def test_an_attention_kernel_that_the_family_lacks_is_refused(families: Path) -> None:
    with pytest.raises(
        ValueError, match=r"cannot run with model\.attention=sdpa; use model\.attention=eager"
    ):
        load_causal_lm(str(families / "gemma2"), LoadOptions(attention="sdpa"))


def test_tokens_added_behind_the_others_do_not_make_another_tokenizer(families: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(families / "llama"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    tokenizer.save_pretrained(tmp_path / "larger")
    assert same_tokenizer(str(families / "llama"), str(tmp_path / "larger"))
    text = (tmp_path / "larger" / "tokenizer.json").read_text(encoding="utf-8")
    text = text.replace('"w0"', '"other"')
    (tmp_path / "larger" / "tokenizer.json").write_text(text, encoding="utf-8")
    assert not same_tokenizer(str(families / "llama"), str(tmp_path / "larger"))
