"""What a value that was typed stands for: a text, a number, a list or a mapping."""

import contextlib
import re
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

CLOSE_COLON = re.compile(r"([{,]\s*[\w.+-]+):(?=\S)")  # {a:1}, which YAML takes for a text


def read_text(text: str) -> str | None:
    """Read a value that is a string: null, 'quoted', or the characters as they stand."""
    if text == "null":
        return None
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"" and text[0] not in text[1:-1]:
        return text[1:-1]
    return text


def read_value(text: str) -> Any:
    """Read a value in Hydra's grammar, else as YAML where it is a list or mapping, else as a plain string."""
    if text.startswith(("{", "[")):
        with contextlib.suppress(yaml.YAMLError):
            _check_keys_differ(yaml.compose(CLOSE_COLON.sub(r"\1: ", text)), text)
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
        if not override.is_sweep_override():
            return override.value()
    except HydraException:
        pass
    if text.startswith(("{", "[")):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"{text}: not a list or mapping; put quotes around its unusual values"
            ) from error
    return read_text(text)


def _check_keys_differ(node: Any, text: str) -> None:
    """Raise ValueError where a mapping, or one inside it, has a key twice: the first would be lost."""
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"{text}: {twice} stands there twice; give one of them another name")
        parts = [part for _, part in node.value]
    for part in parts:
        _check_keys_differ(part, text)
