"""A user's own model: what a Python function returns, named as ``package.module:function``."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from focalclip.errors import UserError

_NAME = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
_NEEDED = ("encode_image", "encode_text", "tokenizer", "preprocess")


def is_function(source: str) -> bool:
    """Whether ``source`` is written as a function's name."""
    return _NAME.fullmatch(source) is not None


def load_function(source: str) -> Any:
    """Call the function; its module is looked for in the working directory too, as ``python -m`` does.

    Raises:
        UserError: if there is no such module or function, or what it returns lacks one of the four attributes.
    """
    match = _NAME.fullmatch(source)
    assert match is not None
    module_name, function_name = match.groups()
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{source}: no module {module_name} here or among the installed ones") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{source}: {module_name} has no function {function_name}")
    model = function()
    missing = [name for name in _NEEDED if not hasattr(model, name)]
    if missing:
        raise UserError(
            f"{source}: what it returns has no {', '.join(missing)}; see focalclip.evaluation.features.model"
        )
    return model
