"""The one place where text becomes tokens and back.

A prompt (a string, or messages with roles) becomes tokens through the tokenizer's chat template or as plain
text; a response is always encoded apart from its prompt, after a fixed anchor, so that the same response has
the same tokens in SFT, in the reward model and in a rollout whatever precedes it. Lengths count tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from rlhf.records import Prompt

# Sentence-piece tokenizers put a space before the first word of a text; behind this anchor nothing is added
# or merged.
ANCHOR = "\n"
PLAIN_ROLES = {"system": "", "user": "\n\nHuman: ", "assistant": "\n\nAssistant:\n"}


@dataclass(frozen=True)
class Encoded:
    """Tokens of a whole conversation; `loss_mask` is true on the assistant's tokens, EOS included."""

    tokens: list[int]
    loss_mask: list[bool]


class TextCodec:
    """Text to tokens and back for one tokenizer.

    `style` is "chat" (the tokenizer's template), "plain", or "auto": chat where the tokenizer has a template.
    Prompts longer than `max_prompt_tokens` lose their start and are counted in `num_cut_prompts`; responses
    are never cut here.
    """

    def __init__(self, tokenizer: Any, *, style: str = "auto", max_prompt_tokens: int | None = None) -> None:
        if style == "chat" and not tokenizer.chat_template:
            raise ValueError(
                f"data.format=chat, but the tokenizer of {tokenizer.name_or_path} has no chat template; "
                "use data.format=plain"
            )
        self.tokenizer = tokenizer
        self.uses_chat = style == "chat" or (style == "auto" and bool(tokenizer.chat_template))
        self.max_prompt_tokens = max_prompt_tokens
        self.num_prompts = 0
        self.num_cut_prompts = 0
        self._anchor = self._ids(ANCHOR) if _is_sentence_piece(tokenizer) else []
        self._bos = [tokenizer.bos_token_id] if _wants_bos(tokenizer) else []
        self.pad_token_id: int = tokenizer.pad_token_id
        lead, end_of_turn = _turn_frame(tokenizer) if self.uses_chat else ("", tokenizer.eos_token_id)
        # White space that the template puts before an assistant's text is sampled, so it is learned too.
        self._lead = lead
        self.eos_token_id: int = end_of_turn

    def prompt_text(self, prompt: Prompt) -> str:
        """Render a prompt as the text that the model continues."""
        if isinstance(prompt, str) and not self.uses_chat:
            return prompt
        messages = _messages(prompt)
        if self.uses_chat:
            return self._render(messages, add_generation_prompt=True)
        return _plain_text(messages) + PLAIN_ROLES["assistant"]

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Tokens of a prompt, its start cut off where it is longer than `max_prompt_tokens`."""
        return self._encode_context(prompt).tokens

    def cut_start(self, tokens: list[int], limit: int) -> list[int]:
        """The last tokens of a prompt, at most `limit`, with BOS before them where the prompt had it."""
        return [tokens[i] for i in self._kept(tokens, limit)]

    @property
    def num_bos(self) -> int:
        """1 where texts begin with BOS, else 0."""
        return len(self._bos)

    def share_of_cut_prompts(self) -> float:
        """Share of the prompts encoded so far whose start was cut."""
        return self.num_cut_prompts / max(self.num_prompts, 1)

    def encode_response(self, text: str, *, add_eos: bool = True) -> list[int]:
        """Tokens of a response, the same after any prompt, with EOS as a finished sample has it."""
        return self._continuation(self._lead + text) + ([self.eos_token_id] if add_eos else [])

    def decode_response(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens: up to the first EOS, special tokens dropped, leading space kept."""
        ids = list(tokens)
        if self.eos_token_id in ids:
            ids = ids[: ids.index(self.eos_token_id)]
        decode = self.tokenizer.decode
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text = decode(self._anchor + ids, **options)[len(decode(self._anchor, **options)) :]
        return text.removeprefix(self._lead)

    def fingerprint(self) -> str:
        """A hash of the vocabulary: equal fingerprints mean that token ids stand for the same text."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]

    def encode_conversation(self, prompt: Prompt, response: str) -> Encoded:
        """Tokens of a demonstration with every assistant turn, the earlier ones included, in the loss."""
        context = self._encode_context(prompt)
        if self.uses_chat:
            messages = [*_messages(prompt), {"role": "assistant", "content": response}]
            response = self._as_rendered(messages, self.prompt_text(prompt))
        tokens = self.encode_response(response)
        return Encoded(context.tokens + tokens, context.loss_mask + [True] * len(tokens))

    def _encode_context(self, prompt: Prompt) -> Encoded:
        whole = _joined(self._context(prompt))
        self.num_prompts += 1
        if not self.max_prompt_tokens or len(whole.tokens) <= self.max_prompt_tokens:
            return whole
        self.num_cut_prompts += 1
        kept = self._kept(whole.tokens, self.max_prompt_tokens)
        return Encoded([whole.tokens[i] for i in kept], [whole.loss_mask[i] for i in kept])

    def _kept(self, tokens: list[int], limit: int) -> list[int]:
        """Places of the tokens that stay when a prompt is cut to `limit` tokens."""
        num_bos = len(self._bos) if tokens[: len(self._bos)] == self._bos else 0
        first = max(num_bos, len(tokens) - limit + num_bos)
        return [*range(num_bos), *range(first, len(tokens))]

    def _context(self, prompt: Prompt) -> list[tuple[list[int], bool]]:
        """Pieces of tokens up to where the response begins; true on earlier assistant turns, which are
        encoded as responses too.
        """
        if isinstance(prompt, str) and not self.uses_chat:
            return [(self._with_bos(prompt), False)]
        messages = _messages(prompt)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        pieces: list[tuple[list[int], bool]] = []
        done = ""
        for turn in [*turns, len(messages)]:
            before = self.prompt_text(messages[:turn])
            if not before.startswith(done):
                # A template that rewrites earlier turns cannot be learned turn by turn: only the last one
                # counts.
                pieces, done = [], ""
            context = self._without_end_of_turn(before[len(done) :]) if done else before
            pieces.append((self._continuation(context) if done else self._with_bos(context), False))
            if turn < len(messages):
                text = self._as_rendered(messages[: turn + 1], before)
                pieces.append((self.encode_response(text), True))
                done = before + self._lead + text
        return pieces

    def _as_rendered(self, messages: list[dict[str, str]], before: str) -> str:
        """The last turn's text as the template writes it after `before`: some strip it."""
        text = messages[-1]["content"]
        if not self.uses_chat:
            return text
        rest = self._render(messages, add_generation_prompt=False).removeprefix(before + self._lead)
        return text if rest.startswith(text) or not rest.startswith(text.strip()) else text.strip()

    def _without_end_of_turn(self, context: str) -> str:
        """What follows an assistant's turn, without the end-of-turn token that its response has already."""
        end_of_turn = self.tokenizer.convert_ids_to_tokens(self.eos_token_id)
        stripped = context.lstrip()
        return stripped.removeprefix(end_of_turn) if stripped.startswith(end_of_turn) else context

    def _continuation(self, text: str) -> list[int]:
        """Tokens of a text in the middle of another."""
        tokens = self._ids((ANCHOR if self._anchor else "") + text)
        if tokens[: len(self._anchor)] != self._anchor:
            raise ValueError(
                f"the tokenizer of {self.tokenizer.name_or_path} merges a line break with {text[:20]!r}, "
                "so the tokens of a response would depend on its prompt; use another tokenizer"
            )
        return tokens[len(self._anchor) :]

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return _render(self.tokenizer, messages, add_generation_prompt=add_generation_prompt)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _with_bos(self, text: str) -> list[int]:
        tokens = self._ids(text)
        return tokens if tokens[: len(self._bos)] == self._bos else self._bos + tokens


def prepare_tokenizer(tokenizer: Any) -> Any:
    """Give a tokenizer a pad token that is neither EOS nor BOS where its vocabulary has one.

    Sequence-classification models find the last real token by the pad id, so pad = eos would hide EOS from
    them.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no EOS token, so responses could never end; "
            "set eos_token in its tokenizer_config.json"
        )
    tokenizer.padding_side = "right"
    taken = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    if tokenizer.chat_template:
        taken.add(_turn_frame(tokenizer)[1])
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        # Added tokens that are not special are text, runs of spaces for example.
        special = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
        free = [
            index for index in (tokenizer.unk_token_id, *special) if index is not None and index not in taken
        ]
        if free:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(free[0])
        elif tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _turn_frame(tokenizer: Any) -> tuple[str, int]:
    """What the chat template writes around an assistant's text: white space before it, and the added token
    that ends the turn, else the tokenizer's EOS.
    """
    question = [{"role": "user", "content": "x"}]
    before = _render(tokenizer, question, add_generation_prompt=True)
    answered = [*question, {"role": "assistant", "content": "y"}]
    whole = _render(tokenizer, answered, add_generation_prompt=False)
    lead, answer, text = whole[len(before) :].partition("y") if whole.startswith(before) else ("", "", "")
    if not answer or lead.strip():
        return "", tokenizer.eos_token_id
    after = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends_with_added = bool(after) and after[0] in tokenizer.added_tokens_decoder
    return lead, after[0] if ends_with_added else tokenizer.eos_token_id


def _render(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} refuses a conversation of the turns {roles}: "
            f"{error}; change the rows, or use data.format=plain"
        ) from error


def _is_sentence_piece(tokenizer: Any) -> bool:
    """Whether the tokenizer writes a space before the first word of a text, as Llama 2 and Mistral do."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("x", add_special_tokens=False)["input_ids"])[0]
    return first.startswith("\u2581")


def _wants_bos(tokenizer: Any) -> bool:
    """Whether texts begin with BOS: what the tokenizer does by itself, its explicit setting, else sentence-
    piece.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    explicit = tokenizer.init_kwargs.get("add_bos_token")
    if explicit is not None:
        return bool(explicit)
    return tokenizer("x")["input_ids"][:1] == [bos] or _is_sentence_piece(tokenizer)


def _messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]


def _plain_text(messages: list[dict[str, str]]) -> str:
    return "".join(PLAIN_ROLES[message["role"]] + message["content"] for message in messages)


def _joined(pieces: list[tuple[list[int], bool]]) -> Encoded:
    tokens = [token for piece, _ in pieces for token in piece]
    return Encoded(tokens, [in_loss for piece, in_loss in pieces for _ in piece])
