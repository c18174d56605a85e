"""From recipes and flags to a Config, and back to a file.

    config = load_config(["--config", "recipe.yaml", "--config", "more.yaml", "--rollout.block_size", "8"])
    save_config(config, run_directory / "config.yaml")         # `--config` reads it back to an equal Config

Recipes are layered left to right, flags come last wherever they stand. A list or a mapping replaces the one before it.
Keys are strict. Everything wrong is a ValueError of one line, which `user_errors` (config/errors.py) shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from megatron_opdlm.config.check import check_config
from megatron_opdlm.config.required import check_required
from megatron_opdlm.config.schema import Config
from megatron_opdlm.config.settings import SECTIONS, SETTINGS, Setting, is_known, nearest_name, setting_that_holds


class _Dumper(yaml.SafeDumper):
    """Quotes the text "1e5": PyYAML would read it bare as text, jsonargparse as a number."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(
    arguments: Sequence[str] | None = None,
    *,
    required: Sequence[str] = (),
    world_size: int | None = None,
    description: str | None = None,
) -> Config:
    """Reads `arguments` (default: the command line), checks every rule and returns the Config.

    `required` is as in `check_required`; `world_size` as in `check_config`; `description` heads the help text.
    `--help` and `--print_config` print and exit with 0. ValueError names the setting, its value and the rule.
    """
    config = parse_config(sys.argv[1:] if arguments is None else arguments, description=description)
    check_config(config, world_size)
    check_required(config, required)
    return config


def parse_config(
    arguments: Sequence[str], *, description: str | None = None, defaults: Mapping[str, Any] | None = None
) -> Config:
    """`load_config` without the rules that tie settings together.

    `defaults` take the place of the schema's, by dotted name.
    """
    recipes, flags = _split_recipes(list(arguments))
    for recipe in recipes:
        _check_recipe(recipe)
    flags = list(_check_flags(flags))
    parser = build_parser(description)
    parser.set_defaults(dict(defaults or {}))
    try:
        namespace = parser.parse_args([*(f"--config={recipe}" for recipe in recipes), *flags])
    except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        raise ValueError(_one_line(str(error))) from error
    except RecursionError as error:
        raise ValueError(f"{', '.join(recipes) or 'a flag'}: a value is nested too deeply, or holds itself") from error
    config = _build(Config, namespace)
    for setting in SETTINGS.values():  # the parser takes null for anything
        if namespace[setting.name] is None and type(None) not in typing.get_args(setting.type):
            raise ValueError(f"{setting.name} (null) must be {setting.rule}")
    return config


def _build(section: type, values: jsonargparse.Namespace) -> Any:
    """The section with those inside it; the parser knows single settings only."""
    inner = {name: hint for name, hint in typing.get_type_hints(section).items() if dataclasses.is_dataclass(hint)}
    names = [field.name for field in dataclasses.fields(section)]
    return section(**{name: _build(inner[name], values[name]) if name in inner else values[name] for name in names})


def save_config(config: Config, path: str | os.PathLike) -> None:
    """Writes every setting as YAML. The file appears whole or not at all."""
    partial = Path(f"{path}.partial")
    settings = yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False)
    partial.write_text(settings, encoding="utf-8")
    partial.replace(path)


def build_parser(description: str | None = None) -> jsonargparse.ArgumentParser:
    """A parser with one flag per setting, in a group per section, that raises argparse.ArgumentError."""
    parser = jsonargparse.ArgumentParser(description=description, exit_on_error=False, usage="%(prog)s [options]")
    parser.add_argument("--config", action="config", metavar="RECIPE", help="YAML recipe; may be given several times.")
    for section_name, section in SECTIONS.items():
        group = parser.add_argument_group(section_name, section.__doc__)
        for setting in SETTINGS.values():
            if setting.section == section_name:
                _add_setting(group, setting)
    return parser


def _add_setting(group: argparse._ArgumentGroup, setting: Setting) -> None:
    group.add_argument(
        f"--{setting.name}",
        type=_type_with_off(setting) if "off" in typing.get_args(setting.type) else setting.type,
        default=setting.default,
        metavar=_placeholder(setting),
        help=setting.documentation.replace("%", "%%"),
    )


def _type_with_off(setting: Setting) -> Callable[[Any], str]:
    """Of a setting with the choice `off`, which YAML 1.1 reads as the boolean false unless it is quoted."""

    def parse(value: Any) -> str:
        value = "off" if value is False else value
        if value not in typing.get_args(setting.type):
            raise argparse.ArgumentTypeError(f'Parser key "{setting.name}": Given value: {value}')
        return value

    return parse


def _placeholder(setting: Setting) -> str:
    choices = typing.get_args(setting.type) if typing.get_origin(setting.type) is typing.Literal else ()
    return "{" + ",".join(choices) + "}" if choices else setting.field.upper()


def _split_recipes(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Recipe files in order, and all other arguments."""
    recipes, others = [], []
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        if name != "--config":
            others.append(argument)
            continue
        value = value if equals else next(remaining, None)
        if not value:
            raise ValueError("--config needs a file")
        recipes.append(value)
    return recipes, others


def _check_flags(arguments: list[str]) -> Iterator[str]:
    """The arguments, with `a b` and `a,b` for a list setting spelt `[a, b]`. ValueError names an unknown flag."""
    remaining = list(arguments)
    while remaining:
        flag, equals, value = remaining.pop(0).partition("=")
        name = flag.removeprefix("--")
        if flag.startswith("--") and name not in ("help", "print_config") and not is_known(name):
            raise ValueError(_unknown(flag, name))
        if typing.get_origin(SETTINGS[name].type if name in SETTINGS else None) is list:
            values = [value] if equals else []
            while remaining and not remaining[0].startswith("--"):
                values.append(remaining.pop(0))
            yield f"{flag}={_spell_list(SETTINGS[name], values)}"
        else:
            yield flag + equals + value


def _spell_list(setting: Setting, values: list[str]) -> str:
    if not values:
        raise ValueError(f"--{setting.name} needs a value: {setting.rule}")
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    items = [item for value in values for item in value.split(",") if item]
    return json.dumps(items if typing.get_args(setting.type) == (str,) else [_item(item) for item in items])


def _item(text: str) -> int | float | str:
    """A number, or the text itself, which the parser then refuses as such."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date that is none
        return text
    return value if isinstance(value, int | float) else text


def _check_recipe(path: str) -> None:
    """Checks a recipe's form and keys. ValueError names file, line and key."""
    if not os.path.isfile(path):
        raise ValueError(f"--config: there is no file {path}")
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must hold sections with settings, such as `rollout: {{block_size: 4}}`")
    _check_keys(path, root, prefix="")


def _check_keys(path: str, node: yaml.MappingNode, prefix: str) -> None:
    seen = set()
    for key, value in node.value:
        name, place = f"{prefix}{key.value}", f"{path}, line {key.start_mark.line + 1}"
        if name in seen:
            raise ValueError(f"{place}: {name} is given twice")
        seen.add(name)
        if name in SECTIONS and not isinstance(value, yaml.MappingNode):
            raise ValueError(f"{place}: section {name} must hold settings, indented below it")
        if name in SECTIONS:
            _check_keys(path, value, prefix=f"{name}.")
        elif name not in SETTINGS:
            raise ValueError(_unknown(f"{place}: {name}", name))


def _unknown(place: str, name: str) -> str:
    return f"{place} is not a setting; the nearest is {nearest_name(name)}"


def _one_line(message: str) -> str:
    """The parser's message in the words of all others: setting, value, rule."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    setting = setting_that_holds(key[1]) if key else None
    value = re.search(r"(?:Got|Given) value: (.*)", message, re.DOTALL)
    if setting is None or value is None:
        return " ".join(message.split())
    return f"{setting.name} ({' '.join(value[1].split())}) must be {setting.rule}"
