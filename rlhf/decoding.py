"""The settings of decoding, and which of them are refused; known before torch is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Decoding:
    """Sampling from the model's own distribution, unless something else is said.

    `repetition_penalty` and `no_repeat_ngram_size` see the response alone, or with penalty_scope="all" the
    prompt before it too. With `num_beams` above 1 the response of the highest log-prob / length ^
    `length_penalty` is searched for.
    """

    max_new_tokens: int
    temperature: float = 1.0
    greedy: bool = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    penalty_scope: str = "response"
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0; greedy decoding is decoding=greedy"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "0 (off) or more"),
            "penalty_scope": (self.penalty_scope in ("response", "all"), "response or all"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "from 0 (off) to 1"),
            "typical_p": (0 < self.typical_p <= 1, "above 0 and at most 1 (off)"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
        }
        for name, (right, remedy) in limits.items():
            if not right:
                shown = "max_response_tokens" if name == "max_new_tokens" else name
                raise ValueError(f"{shown}={getattr(self, name)}: it must be {remedy}")
        if self.greedy and self.num_beams > 1:
            raise ValueError(f"num_beams={self.num_beams} with greedy=true: give one of them")
        if self.num_beams == 1 and self.length_penalty != 1:
            raise ValueError(f"length_penalty={self.length_penalty} is for beams: give num_beams above 1 too")
        drawn = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
        other = "greedy=true" if self.greedy else f"num_beams={self.num_beams}"
        for name, off in drawn.items():
            if not self.draws and getattr(self, name) != off:
                raise ValueError(
                    f"{name}={getattr(self, name)} with {other}, which draws nothing: set {name}={off}"
                )

    @property
    def draws(self) -> bool:
        """Whether anything is drawn: without it a prompt has one response."""
        return not self.greedy and self.num_beams == 1

    @property
    def changes_distribution(self) -> bool:
        """Whether a response is not drawn from the model's whole distribution, at some temperature."""
        truncates = bool(self.top_k) or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1
        penalises = self.repetition_penalty != 1 or bool(self.no_repeat_ngram_size)
        return not self.draws or truncates or penalises


KINDS: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float), "str": (str,)}


def decoding_in(config: Any) -> Decoding:
    """The `Decoding` of a stage's `decoding` group; a ValueError names the key."""
    values = {name: value for name, value in vars(config.decoding).items() if name != "name"}
    return _build("decoding", {**values, "max_new_tokens": config.data.max_response_tokens})


def system_decoding(name: str, given: dict[str, Any] | None, common: Decoding) -> Decoding:
    """What systems.<name>.decoding says, and `common` where it says nothing; a ValueError names the key."""
    return _build(f"systems.{name}.decoding", {**asdict(common), **(given or {})})


def _build(key: str, values: dict[str, Any]) -> Decoding:
    for field in fields(Decoding):
        value, kinds = values[field.name], KINDS[str(field.type)]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{key}.{field.name}={value!r}: a value of type {field.type} is expected")
    try:
        return Decoding(**values)
    except ValueError as error:
        raise ValueError(f"{key}.{error}") from None
