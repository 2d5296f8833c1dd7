"""Strict records: frozen, typed, unknown keys refused; YAML in and out, each mistake one sentence with its path."""

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from focalclip.base.errors import UserError
from focalclip.base.files import user_path


class Strict(BaseModel):
    """Base of all sections: frozen; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    alternatives: ClassVar[tuple[str, ...]] = ()
    """Settings of which one is in force: to give one of them switches the others off (None)."""
    other_names: ClassVar[Mapping[str, str]] = {}
    """What other projects call a setting: their name -> its path from here, for "did you mean"."""

    @model_validator(mode="before")
    @classmethod
    def _one_alternative(cls, values: Any) -> Any:
        return values | cls.switched_off(values) if isinstance(values, dict) else values

    @classmethod
    def switched_off(cls, given: dict[str, Any]) -> dict[str, None]:
        """The alternatives to what is given, which are themselves not given."""
        if all(given.get(name) is None for name in cls.alternatives):
            return {}
        return {name: None for name in cls.alternatives if name not in given}

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take true for 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError("input should be a number")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _reject_what_is_no_value(cls, value: Any, info: ValidationInfo) -> Any:
        """NaN and infinity are numbers of free options too, and no setting is blank text."""
        if not _is_finite(value):
            raise ValueError("input should be a finite number")
        if isinstance(value, str) and not value.strip() and cls.model_fields[info.field_name or ""].default != "":
            raise ValueError("input should not be empty")
        return value

    def refuse_ignored(self, by: str, *names: str) -> None:
        """Check that no setting was changed from its default which has no effect.

        Args:
            by: what does not use them, such as the name of a tower.
            *names: the settings that it does not use.

        Raises:
            ValueError: naming those that were changed, and their defaults.
        """
        defaults = {name: type(self).model_fields[name].default for name in names}
        changed = {name: default for name, default in defaults.items() if getattr(self, name) != default}
        if changed:
            values = ", ".join(f"{name}={default}" for name, default in changed.items())
            raise ValueError(f"{', '.join(changed)} would be ignored by {by}; leave out, or set {values}")


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


C = TypeVar("C", bound=Strict)


def from_dict(cls: type[C], values: dict[str, Any], source: str, *, shown: Callable[[str], str] = str) -> C:
    """Validate ``values`` as a ``cls``.

    Args:
        cls: the record.
        values: its fields by name.
        source: where they come from, for messages.
        shown: how a message writes the path of another setting that may have been meant.

    Raises:
        UserError: naming ``source``, the full path of each field at fault and what is wrong with it.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        faults = dict.fromkeys(_describe(cls, e, shown) for e in error.errors())
        raise UserError(f"{source}: " + "; ".join(faults)) from None


def merged(section: type[Strict], below: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``below`` with ``changes`` on top: sections setting by setting, everything else replaced."""
    result = below | section.switched_off(changes)
    for name, value in changes.items():
        kind = section_of(section, name)
        both = kind is not None and isinstance(value, dict) and isinstance(below.get(name), dict)
        result[name] = merged(kind, below[name], value) if kind is not None and both else value
    return result


def section_of(cls: type[BaseModel] | None, name: str) -> type[Strict] | None:
    """The record that a field holds; None if it holds something else or is not there."""
    kind = cls.model_fields[name].annotation if cls is not None and name in cls.model_fields else None
    return kind if isinstance(kind, type) and issubclass(kind, Strict) else None


def options_of(
    function: Callable[..., Any], values: dict[str, Any], source: str, reserved: Collection[str] = ()
) -> dict[str, Any]:
    """Validate ``values`` as options of ``function``: its keyword-only parameters, with their annotated types.

    Limits may be written as annotations: ``Annotated[float, Field(ge=0, lt=1)]``.

    Args:
        function: what the options are passed to.
        values: the options by name.
        source: section of the configuration that they come from, for messages.
        reserved: keyword-only parameters that are not options, because the caller passes them.

    Returns:
        The options that were given, converted to their annotated types.

    Raises:
        UserError: if one is unknown, has a wrong value, or a required one is missing.
    """
    fields: dict[str, Any] = {
        parameter.name: (
            Any if parameter.annotation is parameter.empty else parameter.annotation,
            ... if parameter.default is parameter.empty else parameter.default,
        )
        for parameter in inspect.signature(function, eval_str=True).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in reserved
    }
    given = from_dict(create_model("options", __base__=Strict, **fields), values, source)
    return {name: getattr(given, name) for name in values}


def load_yaml(cls: type[C], path: str | Path) -> C:
    """Read and validate a YAML file.

    Raises:
        UserError: if the file is missing, not YAML, or does not fit ``cls``.
    """
    return from_dict(cls, read_yaml(path), str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
        UserError: if the file is missing, not YAML, or holds something else.
    """
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file; the ones that come with focalclip are in configs/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of sections such as model, data and train")
    return values


def dump_yaml(config: Strict) -> str:
    """The configuration as YAML that :func:`load_yaml` reads back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


_UNION_MEMBERS = ("str", "list[str]", "float")  # pydantic adds which member of a union it tried; ours are in <>


def _describe(cls: type[Strict], error: Any, shown: Callable[[str], str]) -> str:
    """One clause for one pydantic error: where, what, and the nearest known name for a misspelt key."""
    path = ".".join(str(part) for part in error["loc"] if part not in _UNION_MEMBERS and "<" not in str(part))
    if error["type"] == "extra_forbidden":
        return f"{path} is not a setting{_did_you_mean(cls, error['loc'], shown)}"
    if error["type"] == "model_type" and path:
        settings = _settings_below(_section_at(cls, error["loc"]))
        meant = cls.other_names.get(path)
        hint = f"did you mean {shown(meant)}?" if meant else f"it holds {', '.join(settings)}"
        return f"{path} is a section of settings, not a setting (got {error['input']!r}); {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "tuple_type":
        section = _section_at(cls, error["loc"][:-1])
        default = section.model_fields[str(error["loc"][-1])].default if section else None
        if isinstance(default, tuple) and default:
            message = f"Input should be {len(default)} values, such as {list(default)}"
    value = "" if isinstance(error["input"], dict | BaseModel) else f" (got {error['input']!r})"
    return f"{path}: {message[0].lower() + message[1:]}{value}" if path else message


def _did_you_mean(cls: type[Strict], loc: tuple[Any, ...], shown: Callable[[str], str]) -> str:
    """The end of a sentence about an unknown key: the same name elsewhere or in other projects, or a similar one."""
    name = str(loc[-1])
    section = _section_at(cls, loc[:-1])
    everywhere = _settings_below(cls)
    places = [path for path in everywhere if path.rpartition(".")[2] == name]
    if meant := cls.other_names.get(name):
        places = [meant]
    if not places and section is not None and not difflib.get_close_matches(name, section.model_fields, n=1):
        leaves = {path.rpartition(".")[2]: path for path in reversed(everywhere)}
        places = [leaves[leaf] for leaf in difflib.get_close_matches(name, leaves, n=1, cutoff=0.75)]
    if places:
        return f"; did you mean {' or '.join(map(shown, places))}?"
    return "" if section is None else nearest(name, section.model_fields)


def _section_at(cls: type[Strict], loc: tuple[Any, ...]) -> type[Strict] | None:
    section: type[Strict] | None = cls
    for part in loc:
        if not isinstance(part, int) and "<" not in part:
            section = section_of(section, part) or entry_record(section, part)
    return section


def entry_record(cls: type[BaseModel] | None, name: str) -> type[Strict] | None:
    """The record that a field holds in a list or beside other kinds of value; None if there is none."""
    kinds = [cls.model_fields[name].annotation] if cls is not None and name in cls.model_fields else []
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, Strict):
            return kind
        kinds += get_args(kind)
    return None


def _settings_below(cls: type[Strict] | None) -> list[str]:
    """Paths of all settings of a record and of its sections."""
    paths = []
    for name in cls.model_fields if cls is not None else ():
        inner = section_of(cls, name)
        paths += [name] if inner is None else [f"{name}.{path}" for path in _settings_below(inner)]
    return paths


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the most similar known one, else all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(known)}" if known else "; there are none here"
