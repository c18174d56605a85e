"""The schema as a flat list of settings: dotted name, type, default and documentation of each.

    SETTINGS["rollout.block_size"].default          # 4
    nearest_name("rollout.blok_size")               # "rollout.block_size"

Parser, help text and error messages are made from this list, so a field added to the schema is everywhere at once.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, Union

from megatron_opdlm.config import schema


def _sections(holder: type, prefix: str = "") -> dict[str, type]:
    """The fields of a dataclass that are sections, and theirs, each by its dotted name."""
    found = {}
    for name, hint in typing.get_type_hints(holder).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{prefix}{name}": hint} | _sections(hint, f"{prefix}{name}.")
    return found


SECTIONS: dict[str, type] = _sections(schema.Config)
"""Section name -> its dataclass, in the order of the schema; a section of a section has a dotted name."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of one section."""

    name: str
    """Dotted name, as in a flag: `rollout.block_size`, `evaluation.sweep.thresholds`."""
    type: Any
    """Type hint of the field."""
    default: Any
    """Default of the field."""
    documentation: str
    """The text below the field in the schema, on one line."""

    @property
    def section(self) -> str:
        """Name of the section it stands in."""
        return self.name.rpartition(".")[0]

    @property
    def field(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    @property
    def rule(self) -> str:
        """The type in words, to follow "must be": "an integer", "one of dense, aten", "text or null"."""
        return _rule(self.type)


def _documentation(section: type) -> dict[str, str]:
    """Field name -> the string literal below the field, which Python itself does not keep."""
    body = ast.parse(inspect.getsource(section)).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _section_settings(section_name: str, section: type) -> list[Setting]:
    hints, documentation = typing.get_type_hints(section), _documentation(section)
    return [
        Setting(
            name=f"{section_name}.{field.name}",
            type=hints[field.name],
            default=_default(field),
            documentation=documentation[field.name],
        )
        for field in dataclasses.fields(section)
        if not dataclasses.is_dataclass(hints[field.name])
    ]


def _rule(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(_rule(part) for part in parts)
    if origin is list:
        return f"a list, each item {_rule(parts[0])}"
    if hint is dict or origin is dict:
        return f"a mapping, each value {_rule(parts[1])}" if parts else "a mapping"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}[hint]


SETTINGS: dict[str, Setting] = {
    setting.name: setting for name, section in SECTIONS.items() for setting in _section_settings(name, section)
}
"""Every setting by its dotted name."""


def is_known(name: str) -> bool:
    """True for a setting, and for an entry of a mapping whose values have one type: `max_new_tokens_by_domain.math`."""
    holder = setting_that_holds(name)
    return holder is not None and (name == holder.name or typing.get_origin(holder.type) is dict)


def setting_that_holds(name: str) -> Setting | None:
    """The setting of this name or, of an entry of a mapping, the mapping; None if there is none."""
    while name and name not in SETTINGS:
        name = name.rpartition(".")[0]
    return SETTINGS.get(name)


def nearest_name(name: str) -> str:
    """The setting whose dotted name is most like `name`; the last part counts if the section is right or missing."""
    candidates = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.0)
    same_field = [known for known, setting in SETTINGS.items() if setting.field == name.split(".")[-1]]
    return (difflib.get_close_matches(name, same_field, n=1, cutoff=0.0) or candidates)[0]
