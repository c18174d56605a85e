"""Python values as JSON and back, without pickle, so that what a hostile program returns can be read safely.

    decode(json.loads(json.dumps(encode([(1, 2.5), {3}]))))      # [(1, 2.5), {3}]

A list is itself; any other value that JSON lacks is an object with one key, the name of its kind. What has no such form
becomes an `Opaque`, which equals nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LARGEST_PLAIN_INTEGER = 1 << 63


class Opaque:
    """A value of another kind than those of `encode`, known by the name of its type."""

    def __init__(self, type_name: str) -> None:
        self.type_name = type_name


class Series:
    """The items of something that can be gone through but is no list, such as `map(...)`. It equals nothing."""

    def __init__(self, items: list) -> None:
        self.items = items

    def __iter__(self):
        return iter(self.items)


def encode(value: Any) -> Any:
    """What `json.dumps` can write. Subclasses count as the plain type; NumPy's scalars as Python's numbers.

    RecursionError for a value that holds itself.
    """
    if value is None or isinstance(value, bool | str):
        return value if value is None or isinstance(value, bool) else str(value)
    if isinstance(value, int):
        return int(value) if abs(value) < LARGEST_PLAIN_INTEGER else {"int": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [encode(item) for item in value]
    return _encode_tagged(value)


def _encode_tagged(value: Any) -> dict[str, Any]:
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {"set": [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return {"number": encode(value.item())}
    if isinstance(value, Iterable) and type(value).__module__ in ("builtins", "collections", "itertools"):
        return {"series": [encode(item) for item in value]}
    return {"opaque": type(value).__name__}


def decode(form: Any) -> Any:
    """The value of a form that `encode` has written. ValueError or TypeError for any other form."""
    if isinstance(form, list):
        return [decode(item) for item in form]
    if not isinstance(form, dict):
        return form
    if len(form) != 1:
        raise ValueError(f"a form must have one key, not {len(form)}")
    ((kind, content),) = form.items()
    if kind not in _DECODERS:
        raise ValueError(f"kind ({kind}) of a form must be one of {', '.join(_DECODERS)}")
    return _DECODERS[kind](content)


_DECODERS = {
    "int": lambda content: int(content, 16),
    "tuple": lambda content: tuple(decode(item) for item in content),
    "set": lambda content: {decode(item) for item in content},
    "dict": lambda content: {decode(key): decode(item) for key, item in content},
    "complex": lambda content: complex(*content),
    "bytes": bytes.fromhex,
    "number": decode,
    "series": lambda content: Series([decode(item) for item in content]),
    "opaque": Opaque,
}
