"""Laws of text and tokens, with byte-level, byte-fallback and word-level tokenizers, chat and plain."""

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer

from rlhf.models.loading import load_tokenizer
from rlhf.records import Prompt
from rlhf.sources import tiny_folder
from rlhf.text import Encoded, TextCodec, prepare_tokenizer

TEXTS = [
    "hello world",
    " leading space",
    "  two spaces",
    "\nleading newline",
    "\n\n\nthree",
    "trailing space ",
    "ends with a newline\n",
    "tab\tand  double  space",
    "你好，世界。今天天气很好！",  # noqa: RUF001
    "emoji 😀🎉👩‍👩‍👧 and é",
    "def f(x):\n    return x\n",
    " ",
    "\n",
    "",
]
PROMPTS = ["Tell me: ", "Tell me:", "\n", "x", "问题:", "a b ", ""]
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 2 writes BOS into the template, strips the texts and ends a turn with a space and EOS.
BRACKETS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'].strip() + eos_token }}{% else %}"
    "{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% endif %}{% endfor %}"
)
# Qwen 3 drops the thoughts of earlier turns: an earlier turn reads otherwise once another follows.
FORGETFUL = (
    "{% for message in messages %}{% if message['role'] == 'assistant' and not loop.last %}"
    "A: forgotten<|im_end|>\n{% elif message['role'] == 'assistant' %}A: {{ message['content'] }}<|im_end|>\n"
    "{% else %}Q: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
# Qwen 3 writes empty thoughts into the last answer alone, and not into the prompt of one.
THOUGHTFUL = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}A: "
    "{% if loop.last %}<think></think>{% endif %}{{ message['content'] }}<|endoftext|>\n"
    "{% else %}Q: {{ message['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}"
)
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi! 你好"},
    {"role": "assistant", "content": "Hello 😀"},
    {"role": "user", "content": "And now?\n"},
    {"role": "assistant", "content": "Later."},
    {"role": "user", "content": "Why?"},
]
LAST_TURN = "Because\n\nI said so."


def byte_tokenizer(**special: Any) -> Any:
    """Build a GPT-2-like tokenizer of bytes that merges newlines and a few letters, as real ones do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "h"), ("h", "e"), ("l", "l"), ("Ġ", "Ġ"), ("Ċ", "l")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return FastTokenizer(tokenizer_object=tokenizer, **special)


def chatml_tokenizer() -> Any:
    """Build a tokenizer like SmolLM2's base with a ChatML template: the turn's end is not the EOS."""
    tokenizer = byte_tokenizer(eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>", "<|free|>"]})
    tokenizer.chat_template = CHATML
    return prepare_tokenizer(tokenizer)


def bracket_tokenizer() -> Any:
    """Build a tokenizer with BOS that it adds by itself, and a template that writes it too."""
    tokenizer = byte_tokenizer(eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.chat_template = BRACKETS
    return prepare_tokenizer(tokenizer)


def loss_runs(encoded: Encoded) -> list[list[int]]:
    """Return the stretches of tokens that are in the loss."""
    pairs = zip(encoded.loss_mask, encoded.tokens, strict=True)
    return [[token for _, token in run] for in_loss, run in groupby(pairs, key=lambda p: p[0]) if in_loss]


@pytest.fixture(scope="module")
def tiny_tokenizer() -> Any:
    return load_tokenizer(str(tiny_folder()))


@pytest.fixture(params=["stories", "tiny-plain", "tiny-chat", "bytes", "chatml", "brackets"])
def codec(request: Any) -> TextCodec:
    name = request.param
    if name == "stories":
        folder = request.getfixturevalue("shared") / "data" / "models" / "stories260K"
        return TextCodec(load_tokenizer(str(folder)))
    if name.startswith("tiny"):
        return TextCodec(request.getfixturevalue("tiny_tokenizer"), style=name.removeprefix("tiny-"))
    if name == "bytes":
        return TextCodec(prepare_tokenizer(byte_tokenizer(eos_token="<eos>")))
    return TextCodec(chatml_tokenizer() if name == "chatml" else bracket_tokenizer())


@pytest.mark.parametrize("text", TEXTS)
def test_a_response_survives_its_tokens(codec: TextCodec, text: str) -> None:
    tokens = codec.encode_response(text)
    assert codec.decode_response(tokens) == text
    assert tokens[-1] == codec.eos_token_id and codec.eos_token_id not in tokens[:-1]
    assert codec.encode_response(text, add_eos=False) == tokens[:-1]


@pytest.mark.parametrize("text", TEXTS)
def test_a_response_has_the_same_tokens_after_any_prompt(codec: TextCodec, text: str) -> None:
    template_strips = codec.uses_chat and "strip" in codec.tokenizer.chat_template
    expected = codec.encode_response(text.strip() if template_strips else text)
    for prompt in PROMPTS:
        encoded = codec.encode_conversation(prompt, text)
        assert encoded.tokens == codec.encode_prompt(prompt) + expected
        assert loss_runs(encoded) == [expected]


def test_what_follows_eos_is_not_part_of_the_response(codec: TextCodec) -> None:
    tokens = codec.encode_response("done")
    assert codec.decode_response(tokens + codec.encode_response("more")) == "done"


def test_bos_stands_once_at_the_start(codec: TextCodec) -> None:
    bos = codec.tokenizer.bos_token_id
    expected = 1 if codec._bos else 0
    prompts: list[Prompt] = ["Tell me:", DIALOGUE]
    for prompt in prompts:
        tokens = codec.encode_prompt(prompt)
        assert tokens.count(bos) == expected and tokens[:expected] == [bos] * expected
        tokens = codec.encode_conversation(prompt, "yes").tokens
        assert tokens.count(bos) == expected and tokens[:expected] == [bos] * expected


def test_bos_is_there_where_the_tokenizer_adds_it(shared: Path) -> None:
    assert TextCodec(bracket_tokenizer())._bos and TextCodec(bracket_tokenizer(), style="plain")._bos
    # stories260K is a Llama 2 tokenizer: trained with BOS, though its file does not add it
    assert TextCodec(load_tokenizer(str(shared / "data" / "models" / "stories260K")))._bos == [1]


def test_an_explicit_setting_decides_on_bos() -> None:
    tokenizer = bracket_tokenizer()
    tokenizer.init_kwargs["add_bos_token"] = False
    assert TextCodec(tokenizer, style="plain").encode_prompt("x") == [tokenizer.convert_tokens_to_ids("x")]


@pytest.mark.parametrize("limit", [1, 2, 5, 9])
def test_a_long_prompt_loses_its_start_and_is_counted(codec: TextCodec, limit: int) -> None:
    whole = codec.encode_prompt("one two three four five six seven")
    assert (codec.num_prompts, codec.num_cut_prompts) == (1, 0)
    short = TextCodec(codec.tokenizer, style="chat" if codec.uses_chat else "plain", max_prompt_tokens=limit)
    tokens = short.encode_prompt("one two three four five six seven")
    num_bos = len(codec._bos)
    assert tokens == whole[:num_bos] + whole[len(whole) - limit + num_bos :] and len(tokens) == limit
    fitting = TextCodec(codec.tokenizer, max_prompt_tokens=len(whole) + 20)
    fitting.encode_prompt("one two three four five six seven")
    assert (short.share_of_cut_prompts(), fitting.share_of_cut_prompts()) == (1.0, 0.0)


def test_every_assistant_turn_is_learned_and_nothing_else(codec: TextCodec) -> None:
    encoded = codec.encode_conversation(DIALOGUE, LAST_TURN)
    turns = [m["content"] for m in DIALOGUE if m["role"] == "assistant"] + [LAST_TURN]
    assert loss_runs(encoded) == [codec.encode_response(turn) for turn in turns]


def test_the_last_turn_follows_the_tokens_of_its_prompt(codec: TextCodec) -> None:
    # What a policy sees when it is asked is what it saw when it learned, token for token.
    encoded = codec.encode_conversation(DIALOGUE, LAST_TURN)
    response = codec.encode_response(LAST_TURN)
    before = encoded.tokens[: -len(response)]
    assert before == codec.encode_prompt(DIALOGUE)


def test_chat_tokens_decode_to_the_templates_text() -> None:
    codec = TextCodec(chatml_tokenizer())
    tokens = codec.encode_conversation(DIALOGUE, LAST_TURN).tokens
    assert codec.tokenizer.decode(tokens) + "\n" == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi! 你好<|im_end|>\n"
        "<|im_start|>assistant\nHello 😀<|im_end|>\n<|im_start|>user\nAnd now?\n<|im_end|>\n"
        "<|im_start|>assistant\nLater.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nBecause\n\nI said so.<|im_end|>\n"
    )


def test_a_prompt_without_user_turn_or_with_system_turn_is_rendered_as_the_template_says() -> None:
    codec = TextCodec(chatml_tokenizer())
    default = "<|im_start|>system\nYou are helpful.<|im_end|>\n"
    assert codec.prompt_text("Hi") == f"{default}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert codec.prompt_text([{"role": "system", "content": "Rhyme."}]) == (
        "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>assistant\n"
    )
    encoded = codec.encode_conversation([{"role": "system", "content": "Rhyme."}], "Time, lime.")
    assert loss_runs(encoded) == [codec.encode_response("Time, lime.")]


def test_a_string_is_the_users_turn() -> None:
    codec = TextCodec(chatml_tokenizer())
    assert codec.encode_prompt("Hi") == codec.encode_prompt([{"role": "user", "content": "Hi"}])


def test_plain_dialogues_name_the_speakers(tiny_tokenizer: Any) -> None:
    codec = TextCodec(tiny_tokenizer, style="plain")
    dialogue = DIALOGUE[:4]
    assert codec.prompt_text(dialogue) == (
        "Be brief.\n\nHuman: Hi! 你好\n\nAssistant:\nHello 😀\n\nHuman: And now?\n\n\nAssistant:\n"
    )
    assert codec.prompt_text("as it is ") == "as it is "


def test_a_turn_that_the_template_refuses_is_named() -> None:
    codec = TextCodec(bracket_tokenizer())
    codec.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}" + BRACKETS
    )
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    with pytest.raises(
        ValueError, match=r"refuses .* turns system, user: no system turns; .* data\.format=plain"
    ):
        codec.encode_prompt(messages)


def test_the_end_of_turn_of_the_template_is_learned_where_it_is_not_eos() -> None:
    tokenizer = chatml_tokenizer()
    chat, plain = TextCodec(tokenizer), TextCodec(tokenizer, style="plain")
    assert chat.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert plain.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    encoded = chat.encode_conversation("Hi", "Yes")
    assert encoded.tokens[-1] == chat.eos_token_id and encoded.loss_mask[-1]
    # The end of the user's turn is the same token and is not learned.
    ends = [
        mask
        for token, mask in zip(encoded.tokens, encoded.loss_mask, strict=True)
        if token == chat.eos_token_id
    ]
    assert ends == [False, False, True]


def test_a_template_that_strips_texts_is_followed() -> None:
    codec = TextCodec(bracket_tokenizer())
    encoded = codec.encode_conversation(" Hi ", "Yes.  ")
    assert codec.tokenizer.decode(encoded.tokens) == "<s>[INST] Hi [/INST] Yes.</s>"


def test_white_space_that_the_template_puts_before_an_answer_is_part_of_the_response() -> None:
    # The prompt ends before the space, so a sample begins with it.
    codec = TextCodec(bracket_tokenizer())
    assert codec.tokenizer.decode(codec.encode_response("Yes")) == " Yes</s>"
    assert codec.decode_response(codec.encode_response("Yes")) == "Yes"
    assert codec.decode_response(codec.tokenizer("Yes", add_special_tokens=False)["input_ids"]) == "Yes"
    tokens = codec.encode_conversation(DIALOGUE[1:4], "Yes").tokens
    assert (
        codec.tokenizer.decode(tokens)
        == "<s>[INST] Hi! 你好 [/INST] Hello 😀</s>[INST] And now? [/INST] Yes</s>"
    )


def test_thoughts_that_the_template_adds_to_the_last_turn_leave_one_end_of_turn() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = THOUGHTFUL
    codec = TextCodec(tokenizer)
    encoded = codec.encode_conversation(DIALOGUE[1:4], "Yes")
    assert codec.tokenizer.decode(encoded.tokens) == (
        "Q: Hi! 你好\nA: Hello 😀<|endoftext|>\nQ: And now?\n\nA: Yes<|endoftext|>"
    )
    assert loss_runs(encoded) == [codec.encode_response("Hello 😀"), codec.encode_response("Yes")]


def test_of_a_template_that_rewrites_earlier_turns_the_last_turn_is_learned() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = FORGETFUL
    codec = TextCodec(tokenizer)
    encoded = codec.encode_conversation(DIALOGUE[1:4], "Yes")
    assert loss_runs(encoded) == [codec.encode_response("Yes")]
    assert codec.tokenizer.decode(encoded.tokens) == (
        "Q: Hi! 你好\nA: forgotten<|im_end|>\nQ: And now?\n\nA: Yes<|im_end|>"
    )


def test_chat_is_taken_where_there_is_a_template_and_refused_where_there_is_none(tiny_tokenizer: Any) -> None:
    assert TextCodec(tiny_tokenizer).uses_chat and not TextCodec(tiny_tokenizer, style="plain").uses_chat
    tokenizer = prepare_tokenizer(byte_tokenizer(eos_token="<eos>"))
    assert not TextCodec(tokenizer).uses_chat
    with pytest.raises(
        ValueError, match=r"data\.format=chat, but .* no chat template; use data\.format=plain"
    ):
        TextCodec(tokenizer, style="chat")


def test_a_tokenizer_without_eos_is_refused() -> None:
    with pytest.raises(ValueError, match="no EOS token, so responses could never end; set eos_token"):
        prepare_tokenizer(byte_tokenizer())


def test_a_tokenizer_without_pad_gets_a_free_special_token() -> None:
    for special in ({"unk_token": "<unk>"}, {"additional_special_tokens": ["<free>"]}):
        tokenizer = byte_tokenizer(eos_token="<eos>", bos_token="<bos>", **special)
        assert tokenizer.pad_token_id is None
        assert prepare_tokenizer(tokenizer).pad_token in ("<unk>", "<free>")


def test_pad_is_eos_only_where_no_special_token_is_free() -> None:
    tokenizer = prepare_tokenizer(byte_tokenizer(eos_token="<eos>", bos_token="<eos>", unk_token="<eos>"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer = byte_tokenizer(eos_token="<eos>", pad_token="<eos>", additional_special_tokens=["<free>"])
    assert prepare_tokenizer(tokenizer).pad_token == "<free>"
    tokenizer = byte_tokenizer(eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    assert prepare_tokenizer(tokenizer).pad_token == "<pad>"


def test_pad_is_not_the_end_of_turn() -> None:
    # <|im_end|> comes first among the added tokens and ends the turns.
    codec = TextCodec(chatml_tokenizer())
    assert codec.pad_token_id not in (codec.eos_token_id, codec.tokenizer.eos_token_id)


def test_added_text_does_not_become_the_pad_token() -> None:
    # GPT-NeoX and CodeGen add runs of spaces as ordinary tokens; a pad token would vanish from decoded text.
    tokenizer = byte_tokenizer(eos_token="<eos>")
    tokenizer.add_tokens([AddedToken("      ", normalized=False, special=False)])
    codec = TextCodec(prepare_tokenizer(tokenizer))
    assert codec.pad_token_id == codec.eos_token_id
    assert codec.decode_response(codec.encode_response("a      b")) == "a      b"


def test_equal_vocabularies_have_equal_fingerprints(tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    again = TextCodec(AutoTokenizer.from_pretrained(tmp_path))
    assert again.fingerprint() == TextCodec(tiny_tokenizer, style="plain").fingerprint()
    assert again.fingerprint() != TextCodec(chatml_tokenizer()).fingerprint()


@pytest.mark.parametrize("limit", [4, 9, 20])
def test_sft_sees_the_prompt_that_the_policy_is_asked_with_later(codec: TextCodec, limit: int) -> None:
    """Cut at its start, chat or plain, BOS kept: rollouts and demonstrations have the same context."""
    codec.max_prompt_tokens = limit
    tokens = codec.encode_prompt(DIALOGUE)
    encoded = codec.encode_conversation(DIALOGUE, "yes")
    assert encoded.tokens == tokens + codec.encode_response("yes") and len(tokens) == limit
    assert codec.num_cut_prompts == 2 and tokens[: codec.num_bos] == codec._bos
    assert codec.cut_start(codec.cut_start(tokens, 3), 2)[: codec.num_bos] == codec._bos
