"""One form for texts of people and of a model, so that what tells them apart is what they say.

A sample may lack EOS, hold tokens that no tokenizer would write, begin or end with white space of its own,
or have lengths of its own; a reference is cut nowhere. Both go through text, lose the white space around
them, and are compared as beginnings of one length that end inside both texts, followed by EOS.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlhf.text import TextCodec


class SameForm:
    """Texts as tokens in that form. `lead` is the white space that most of the `references` begin with, which
    all texts then do; `max_response_tokens` is what a sample can have, EOS included.
    """

    def __init__(self, codec: TextCodec, references: Sequence[str], *, max_response_tokens: int) -> None:
        self.codec, self.max_response_tokens = codec, max_response_tokens
        leads = Counter(text[: len(text) - len(text.lstrip())] for text in references)
        self.lead = leads.most_common(1)[0][0]

    def reference(self, text: str) -> list[int]:
        """Tokens of a person's text, cut where a sample would have been, and read as text like one."""
        return self.sample(self.codec.decode_response(self._cut(self.codec.encode_response(text))))

    def sample(self, text: str) -> list[int]:
        """Tokens of a model's text, without EOS, as the tokenizer writes them."""
        # a character that was cut in the middle is read as U+FFFD
        whole = self.lead + text.rstrip("\ufffd").strip()
        return self._cut(self.codec.encode_response(whole, add_eos=False))

    def beginnings(self, one: list[int], other: list[int], draw: float) -> tuple[list[int], list[int]]:
        """The first tokens of two texts, as many of each, with EOS behind them.

        The number lies between half the shorter text and its end, by `draw` in [0, 1), and before the end,
        which would tell whose texts are shorter (a text of one token is read whole). It is less where the cut
        would leave white space, a part of a character, or tokens that the tokenizer writes in another way.
        """
        shorter = min(len(one), len(other))
        least = (shorter + 1) // 2
        length = least + int(draw * (shorter - least))
        while length and not (self._is_whole(one[:length]) and self._is_whole(other[:length])):
            length -= 1
        end = [self.codec.eos_token_id]
        return one[:length] + end, other[:length] + end

    def _cut(self, tokens: list[int]) -> list[int]:
        return tokens[: self.max_response_tokens]

    def _is_whole(self, tokens: list[int]) -> bool:
        text = self.codec.decode_response(tokens)
        return text == text.rstrip() and self.codec.encode_response(text, add_eos=False) == tokens
