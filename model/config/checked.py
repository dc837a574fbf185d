"""Values out of untrusted configuration, each checked before it is used.

All raise UnsupportedModel with a line that names the key, what was expected and what was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from model.config.types import UnsupportedModel

MAX_TOKENS = 1 << 24
MAX_WIDTH = 1 << 20


def integer(source: Mapping[str, Any], key: str, default: int | None, high: int) -> int:
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise UnsupportedModel(f"the model's configuration lacks {key!r}")
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) <= high:
        raise UnsupportedModel(f"{key} must be a whole number from 1 to {high}, got {value!r}")
    return int(value)


def number(source: Mapping[str, Any], key: str, default: float | None) -> float:
    value = source.get(key)
    if value is None:
        value = default
    if value is None:
        raise UnsupportedModel(f"the model's configuration lacks {key!r}")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UnsupportedModel(f"{key} must be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number) or number <= 0:
        raise UnsupportedModel(f"{key} must be positive and finite, got {value!r}")
    return number


def optional_number(source: Mapping[str, Any], key: str) -> float | None:
    return None if source.get(key) is None else number(source, key, None)


def optional_integer(source: Mapping[str, Any], key: str) -> int | None:
    return None if source.get(key) is None else integer(source, key, None, MAX_TOKENS)


def flag(source: Mapping[str, Any], key: str, default: bool) -> bool:
    value = source.get(key, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise UnsupportedModel(f"{key} must be true or false, got {value!r}")
    return value


def numbers(source: Mapping[str, Any], key: str) -> tuple[float, ...]:
    value = source.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UnsupportedModel(f"longrope needs a list of numbers in {key}")
    return tuple(number({key: item}, key, None) for item in value)


def token_ids(value: Any) -> tuple[int, ...]:
    items = [] if value is None else value if isinstance(value, list | tuple) else [value]
    for item in items:
        if isinstance(item, bool) or not isinstance(item, Integral):
            raise UnsupportedModel(f"a token id must be a whole number, got {item!r}")
    return tuple(dict.fromkeys(int(item) for item in items))


def head_dim(
    source: Mapping[str, Any], key: str, hidden_size: int, num_heads: int, wide: bool = False
) -> int:
    if source.get(key) is None and not wide and hidden_size % num_heads:
        raise UnsupportedModel(f"hidden size {hidden_size} is not a multiple of {num_heads} heads")
    return integer(source, key, 128 if wide else hidden_size // num_heads, 1024)
