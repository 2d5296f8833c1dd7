"""Strict records: frozen, typed, unknown keys refused; YAML in and out, each mistake one sentence with its path."""

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from focalclip.base.errors import UserError


class Strict(BaseModel):
    """Base of all sections: frozen, and any key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _number_is_no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take true for 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and {int, float} & {kind, *get_args(kind)}:
            raise ValueError("input should be a number")
        return value

    def _refuse_ignored(self, by: str, *names: str) -> None:
        """Raise ValueError if one of these settings, which the tower ``by`` does not use, was changed."""
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


def load_yaml(cls: type[C], path: str | Path) -> C:
    """Read and validate a YAML file.

    Raises:
        UserError: if the file is missing, not YAML, or does not fit ``cls``.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file; the ones that come with focalclip are in configs/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of sections such as model, data and train")
    return from_dict(cls, values, str(path))


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
    import difflib

    fields: dict[str, Any] = cls.model_fields
    for part in loc[:-1]:
        section = fields[part].annotation if part in fields else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return ""
        fields = section.model_fields
    near = difflib.get_close_matches(str(loc[-1]), fields, n=1)
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(fields)}"
