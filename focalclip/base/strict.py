"""Strict records: frozen, typed, unknown keys refused; YAML in and out, each mistake one sentence with its path."""

import difflib
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, create_model, field_validator

from focalclip.base.errors import UserError
from focalclip.base.files import user_path


class Strict(BaseModel):
    """Base of all sections: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _reject_bool_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take true for 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError("input should be a number")
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


C = TypeVar("C", bound=Strict)


def from_dict(cls: type[C], values: dict[str, Any], source: str) -> C:
    """Validate ``values`` as a ``cls``.

    Raises:
        UserError: naming ``source``, the full path of each field at fault and what is wrong with it.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        faults = dict.fromkeys(_describe(cls, e) for e in error.errors())
        raise UserError(f"{source}: " + "; ".join(faults)) from None


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
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of sections such as model, data and train")
    return values


def dump_yaml(config: Strict) -> str:
    """The configuration as YAML that :func:`load_yaml` reads back equal."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


_UNION_MEMBERS = ("str", "list[str]")  # pydantic adds which member of a union it tried


def _describe(cls: type[BaseModel], error: Any) -> str:
    """One clause for one pydantic error: where, what, and the nearest known name for a misspelt key."""
    path = ".".join(str(part) for part in error["loc"] if part not in _UNION_MEMBERS)
    if error["type"] == "extra_forbidden":
        return f"{path} is not a setting{_did_you_mean(cls, error['loc'])}"
    message = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict | BaseModel) else f" (got {error['input']!r})"
    return f"{path or cls.__name__}: {message[0].lower() + message[1:]}{shown}"


def _did_you_mean(cls: type[BaseModel], loc: tuple[Any, ...]) -> str:
    fields: dict[str, Any] = cls.model_fields
    for part in loc[:-1]:
        section = fields[part].annotation if part in fields else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return ""
        fields = section.model_fields
    return nearest(str(loc[-1]), fields)


def nearest(name: str, known: Collection[str]) -> str:
    """The end of a sentence about an unknown name: the most similar known one, else all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known here: {', '.join(known)}" if known else "; there are none here"
