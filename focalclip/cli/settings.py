"""The settings of a configuration on the command line: ``--section.field VALUE``, and their help."""

import re
import textwrap
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml

from focalclip.base.errors import UserError
from focalclip.base.strict import Strict, entry_record, from_dict, merged, section_of
from focalclip.base.terminal import WIDTH

C = TypeVar("C", bound=Strict)


def help_text(base: Strict, path: str = "") -> str:
    """Every setting of ``base`` with its form on the command line, its meaning and its value."""
    settings, sections = [], []
    for name, field in type(base).model_fields.items():
        value, full = getattr(base, name), f"{path}{name}"
        meaning = (field.description or "").replace("``", "").replace("\n", " ")
        if isinstance(value, Strict):
            title = " ".join((type(value).__doc__ or "").split())
            sections.append(f"\n{full}: {title}\n\n{help_text(value, f'{full}.')}")
        else:
            shown = yaml.safe_dump(_plain(value), default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
            settings.append(f"  {_form(full, field.annotation)}\n{_indented(f'{meaning} (default: {shown})')}")
            if (record := entry_record(type(base), name)) is not None:
                settings.append(_indented(f"A mapping holds: {', '.join(record.model_fields)}."))
    return "\n".join([*settings, *sections])


def with_overrides(base: C, argv: list[str]) -> C:
    """``base`` with ``--section.field VALUE`` (also ``=VALUE``; several values make a list) on top, validated again.

    Raises:
        UserError: naming the argument that is misspelt, has no value or has a wrong one.
    """
    before, changes = base.model_dump(mode="json"), {}
    for name, words in _split(argv):
        *path, field = name.lstrip("-").replace("-", "_").split(".")
        old, new = before, changes
        kind: type[Strict] | None = type(base)
        for part in path:
            old, kind = old.get(part, {}), section_of(kind, part)
            if not isinstance(old, dict):
                raise UserError(f"command line: {name}: {part} is a setting, not a section of settings")
            new = new.setdefault(part, {} if kind else dict(old))  # free options that are not named stay
        if not words and isinstance(old.get(field.removeprefix("no_")), bool):
            new[field.removeprefix("no_")] = not field.startswith("no_")
        elif not words and (kind is None or field in kind.model_fields):
            raise UserError(f"command line: {name} needs a value: {name} VALUE")
        else:
            known = kind.model_fields.get(field) if kind else None
            form = known.annotation if known else None
            of_records = section_of(kind, field) is None and entry_record(kind, field) is not None
            new[field] = _value(words, form, of_records=of_records) if words else None
    return from_dict(type(base), merged(type(base), before, changes), "command line", shown=_with_flag)


def _with_flag(path: str) -> str:
    return f"{path} (--{path.replace('_', '-')})"


def _form(path: str, kind: Any) -> str:
    """How a setting is written, such as ``--optim.lr NUMBER``."""
    *sections, name = path.replace("_", "-").split(".")
    flag = "--" + ".".join([*sections, name])
    if kind is bool:
        return f"{flag}, --{'.'.join([*sections, f'no-{name}'])}"
    return f"{flag}.KEY VALUE" if get_origin(kind) is dict else f"{flag} {_placeholder(kind)}"


def _placeholder(kind: Any) -> str:
    """Placeholder for a value of this type."""
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) is Annotated:
        return _placeholder(get_args(kind)[0])
    if isinstance(kind, type) and issubclass(kind, Strict):
        return "MAPPING"
    if get_origin(kind) is tuple:
        return " ".join(map(_placeholder, get_args(kind)))
    if get_origin(kind) is list:
        return f"{_placeholder(get_args(kind)[0])} ..."
    if get_args(kind):  # a union
        return " | ".join(map(_placeholder, get_args(kind)))
    return {int: "INTEGER", float: "NUMBER", str: "TEXT", NoneType: "null"}.get(kind, "VALUE")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _indented(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)


def _split(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Group ``--name value value`` by name."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if re.match(r"--[A-Za-z]", word) or re.fullmatch(r"-[A-Za-z]", word):
            name, equals, value = word.partition("=")
            groups.append((name, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            raise UserError(f"command line: {word!r} is not understood; settings are written --section.field VALUE")
    return groups


def _value(words: list[str], kind: Any, *, of_records: bool = False) -> Any:
    """The value of the words: as they stand where the setting is text (or a list of texts), else parsed as YAML.

    Where a setting takes records beside texts, a word may be a record, or be a list of both, in YAML or JSON.
    """
    if of_records:
        values = [_texts_and_records(word) for word in words]
        return values[0] if len(values) == 1 and not isinstance(values[0], dict) else values
    members = (kind, *get_args(kind))
    is_text = str in members or list[str] in members
    words = ["null" if word == "None" else word for word in words]  # as Python writes it
    parsed = [word if is_text and word != "null" else _from_yaml(word) for word in words]
    is_list = list[str] in members and str not in members and parsed != [None]
    return parsed if is_list or len(parsed) > 1 else parsed[0]


def _texts_and_records(word: str) -> Any:
    """A mapping, a list or nothing where a word is that in YAML; else the word, such as a pattern ``{00..03}.tar``."""
    if word in ("null", "None"):
        return None
    if word.lstrip().startswith(("[", "{")):
        try:
            value = yaml.safe_load(word)
        except (yaml.YAMLError, ValueError, RecursionError):
            return word
        if isinstance(value, list) or (isinstance(value, dict) and "source" in value):
            return value
    return word


def _from_yaml(word: str) -> Any:
    """A number, a truth value, a list; the word itself where it is none, such as a pattern ``{00..03}.tar``."""
    try:
        value = yaml.safe_load(word)
    except (yaml.YAMLError, ValueError, RecursionError):
        return word
    return word if isinstance(value, dict) or not word.strip() else value
