"""What a discriminator is fed tells nothing by its form: neither length nor formatting do."""

import math
import random
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast as FastTokenizer

from data.toy import make_response
from rlhf.exposure.same_form import SameForm
from rlhf.text import TextCodec, prepare_tokenizer

PAIRS = 800
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
LONGEST = 24

Features = np.ndarray[Any, Any]


def responses(seed: int, count: int = PAIRS) -> list[str]:
    """Texts of the toy world, some words of which have a letter of two bytes."""
    draw = random.Random(seed)
    return [make_response(draw)[0].replace("o", draw.choice("oó")) for _ in range(count)]


@pytest.fixture(scope="module")
def codec() -> TextCodec:
    """A tokenizer of bytes with merges learned from the texts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(responses(0), trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return TextCodec(prepare_tokenizer(FastTokenizer(tokenizer_object=tokenizer, **names)), style="plain")


def sampled(text: str, codec: TextCodec, draw: random.Random, *, longer: bool) -> list[int]:
    """Tokens of a text as a policy might give them: of other length, with white space and special tokens of
    its own, in pieces that the tokenizer does not write, cut without EOS.
    """
    text = text.removesuffix(".") + text if longer else text[: text.index(" and")]
    text = draw.choice(["", " ", "\n"]) + text.strip() + draw.choice(["", "", " ", "\n"])
    tokens: list[int] = []
    for token in codec.encode_response(text):
        pieces = [
            codec.tokenizer.convert_tokens_to_ids(c) for c in codec.tokenizer.convert_ids_to_tokens(token)
        ]
        tokens += pieces if token > len(SPECIAL) and draw.random() < 0.3 else [token]
        tokens += [draw.choice([1, 3])] if draw.random() < 0.05 and token != codec.eos_token_id else []
    return tokens[:LONGEST]


def raw(codec: TextCodec, *, longer: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of references, and of samples that say the same kind of thing."""
    draw = random.Random(1)
    samples = [sampled(text, codec, draw, longer=longer) for text in responses(2)]
    return [codec.encode_response(text) for text in responses(3)], samples


def fed(codec: TextCodec, *, longer: bool) -> tuple[list[list[int]], list[list[int]]]:
    """The same in one form."""
    form = SameForm(codec, responses(3), max_response_tokens=LONGEST)
    draw, (_, samples) = random.Random(4), raw(codec, longer=longer)
    pairs = [
        form.beginnings(form.reference(text), form.sample(codec.decode_response(tokens)), draw.random())
        for text, tokens in zip(responses(3), samples, strict=True)
    ]
    return [one for one, _ in pairs], [other for _, other in pairs]


def length(tokens: list[int], codec: TextCodec) -> list[float]:
    return [len(tokens)]


def formatting(tokens: list[int], codec: TextCodec) -> list[float]:
    body, text = tokens[: len(tokens) - (tokens[-1] == codec.eos_token_id)], codec.decode_response(tokens)
    return [
        len(tokens),
        tokens[-1] == codec.eos_token_id,
        len(text) - len(text.lstrip()),
        len(text) - len(text.rstrip()),
        sum(token < len(SPECIAL) for token in body),
        "\ufffd" in text,
        len(body) - len(codec.encode_response(text, add_eos=False)),
        codec.encode_response(text, add_eos=False) != body,
    ]


def interval(references: Features, samples: Features, model: Any) -> tuple[float, float]:
    """95% interval of the accuracy of a classifier of features on the pairs that it was not fitted to."""
    half = len(references) // 2
    labels = np.repeat([1, 0], half)
    model = model.fit(np.concatenate([references[:half], samples[:half]]), labels)
    accuracy = model.score(np.concatenate([references[half:], samples[half:]]), labels)
    error = 1.96 * math.sqrt(0.25 / (2 * half))
    return accuracy - error, accuracy + error


MODELS = {
    "logistic": make_pipeline(StandardScaler(), LogisticRegression()),
    "tree": DecisionTreeClassifier(max_depth=5, random_state=0),
}


@pytest.mark.parametrize("longer", [True, False], ids=["longer", "shorter"])
@pytest.mark.parametrize("features", [length, formatting])
@pytest.mark.parametrize("model", MODELS)
def test_form_tells_references_and_samples_apart_before_and_not_after(
    codec: TextCodec, model: str, features: Any, longer: bool
) -> None:
    found = {}
    for name, make in (("raw", raw), ("fed", fed)):
        both = [np.array([features(tokens, codec) for tokens in part]) for part in make(codec, longer=longer)]
        found[name] = interval(both[0], both[1], MODELS[model])
    assert found["raw"][0] > 0.7, "the samples of this test can be told by their form"
    assert found["fed"][0] < 0.5 < found["fed"][1]


@pytest.mark.parametrize("longer", [True, False])
def test_the_two_of_a_pair_are_as_long_end_alike_and_keep_most_of_what_they_say(
    codec: TextCodec, longer: bool
) -> None:
    form = SameForm(codec, responses(3), max_response_tokens=LONGEST)
    wholes = []
    for text, tokens in zip(responses(3), raw(codec, longer=longer)[1], strict=True):
        wholes.append((form.reference(text), form.sample(codec.decode_response(tokens))))
    kept = 0.0
    for pair, rows in zip(wholes, zip(*fed(codec, longer=longer), strict=True), strict=True):
        assert len(rows[0]) == len(rows[1]) and rows[0][-1] == rows[1][-1] == codec.eos_token_id
        for whole, row in zip(pair, rows, strict=True):
            assert row[:-1] == whole[: len(row) - 1] and len(row) - 1 < len(whole)
        kept += (len(rows[0]) - 1) / min(map(len, pair)) / len(wholes)
    assert kept > 0.6


def test_a_text_has_one_form_however_it_was_sampled(codec: TextCodec) -> None:
    form = SameForm(codec, [" warm.", " cold.", "dull."], max_response_tokens=LONGEST)
    expected = form.reference(" warm, dull and old.")
    assert codec.decode_response(expected) == " warm, dull and old."
    usual = codec.encode_response(" warm, dull and old.")
    letters = [codec.tokenizer.convert_tokens_to_ids(letter) for letter in "Ġwarm,ĠdullĠandĠold."]
    assert letters != usual[:-1] and None not in letters
    bos, eos = codec.tokenizer.bos_token_id, codec.eos_token_id
    space = codec.encode_response(" \n", add_eos=False)
    half = [codec.tokenizer.convert_tokens_to_ids("Ã")]  # the first of the two bytes of ó
    for tokens in (usual[:-1], letters, [bos, *usual], [*letters, *space, eos], [*letters, *half], usual * 2):
        assert form.sample(codec.decode_response(tokens)) == expected
    for text in ("warm, dull and old.", "\n warm, dull and old.\n"):
        assert form.sample(text) == expected
    assert form.sample("") == form.sample(" \n") == form.sample("\ufffd")


def test_a_reference_is_cut_where_a_sample_would_be(codec: TextCodec) -> None:
    form = SameForm(codec, responses(3), max_response_tokens=8)
    for text in responses(3, 50):
        sample = codec.encode_response(text)[:8]
        assert form.reference(text) == form.sample(codec.decode_response(sample))
        assert len(form.reference(text)) <= 8


@pytest.mark.parametrize(("one", "other", "longest"), [(0, 5, 0), (1, 5, 1), (2, 9, 1), (7, 9, 6), (9, 9, 8)])
def test_a_cut_lies_between_half_the_shorter_text_and_its_end(
    codec: TextCodec, one: int, other: int, longest: int
) -> None:
    form = SameForm(codec, ["x"], max_response_tokens=LONGEST)
    x = codec.encode_response("x", add_eos=False)
    texts = (x * one, x * other)
    found = {len(form.beginnings(*texts, draw / 100)[0]) - 1 for draw in range(100)}
    assert found == set(range((min(one, other) + 1) // 2, longest + 1))
