"""Command lines over a typed configuration: a YAML file, then ``--section.field VALUE`` on top."""

import re
from typing import Any, TypeVar

import yaml

from focalclip.base.errors import UserError
from focalclip.base.strict import Strict, from_dict

C = TypeVar("C", bound=Strict)


def print_help(base: Strict, description: str) -> None:
    """Every setting with its type, meaning and value in ``base``."""
    import tyro

    tyro.cli(type(base), default=base, args=["--help"], description=description)


def with_overrides(base: C, argv: list[str]) -> C:
    """``base`` with ``--section.field VALUE`` (also ``=VALUE``; several values make a list) on top, validated again.

    Raises:
        UserError: naming the argument that is misspelt, has no value or has a wrong one.
    """
    values = base.model_dump(mode="json")
    for name, words in _split(argv):
        *path, field = name.removeprefix("--").replace("-", "_").split(".")
        section: Any = values
        for part in path:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"command line: {name}: {part} is a setting, not a section of settings")
        if not words and isinstance(section.get(field.removeprefix("no_")), bool):
            section[field.removeprefix("no_")] = not field.startswith("no_")
        elif not words:
            raise UserError(f"command line: {name} needs a value: {name} VALUE")
        else:
            section[field] = _value(words, section.get(field))
    return from_dict(type(base), values, "command line")


def _split(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Group ``--name value value`` by name."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if re.match(r"--[A-Za-z]", word):
            name, equals, value = word.partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise UserError(f"command line: {word!r} is not understood; settings are written --section.field VALUE")
    return groups


def _value(words: list[str], before: Any) -> Any:
    """What the words mean: text where there was text (or a list of texts), else whatever YAML makes of them."""
    is_text = isinstance(before[0] if isinstance(before, list) and before else before, str)
    words = ["null" if word == "None" else word for word in words]  # --help shows it so
    parsed = [word if is_text and word != "null" else _from_yaml(word) for word in words]
    return parsed[0] if len(parsed) == 1 else parsed


def _from_yaml(word: str) -> Any:
    """A number, a truth value, a list; the word itself where it is none, such as a pattern ``{00..03}.tar``."""
    try:
        value = yaml.safe_load(word)
    except yaml.YAMLError:
        return word
    return word if isinstance(value, dict) else value
