"""What all commands share: exit statuses, the parser with its examples, and checks of common arguments."""

import argparse
import difflib
import hashlib
import os
import re
import resource
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from focalclip.base.errors import UserError, first_line, memory_error, missing_module, system_error
from focalclip.base.files import home_expanded, user_path, why_not_writable
from focalclip.cli import COMMANDS

_SCRIPT = re.compile(r"(?:(python|deepspeed|torchrun(?: --\S+ \d+)*) )?\b(?:scripts|eval)/([a-z_]+)\.py")


def guarded(command: Callable[[], int]) -> int:
    """Exit status of ``command``; a mistake of the user's becomes one line on stderr and status 2."""
    # Read when torch is loaded, which no command does before this point. OpenMP's threads wait for each other thousands
    # of times a step: those that spin on slow it 5 to 10 times where a loader shares the cores, those that sleep at
    # once nearly double it. So they spin for a fraction of a millisecond, then sleep.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    _allow_many_open_files()
    try:
        return command()
    except UserError as error:
        _print_error(str(error), error.rank)
        return error.status
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("focalclip"):
            raise
        _print_error(str(missing_module(error)))
        return 2
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still holds of our output
        return 141  # as the shell calls SIGPIPE
    except OSError as error:
        if error.errno is None:
            raise
        _print_error(str(fault := system_error(error)))
        return fault.status
    except (MemoryError, RuntimeError) as error:
        if (lack := memory_error(error)) is None:
            raise
        _print_error(str(lack))
        return lack.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _allow_many_open_files() -> None:
    """Raise the soft limit, 1024 on many systems, as far as the system lets a process do by itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe whose reader has read enough, as ``head`` does."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _print_error(message: str, rank: int | None = None) -> None:
    """Print an error of one rank, or once on each machine that of all."""
    if rank is not None or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {f'rank {rank}: ' if rank else ''}{as_called(message)}", file=sys.stderr)


def command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Parser of one of :data:`~focalclip.cli.COMMANDS`.

    Args:
        name: of the command.
        description: one sentence.
        examples: shown below the options, written for a checkout (``python eval/zeroshot.py``); see :func:`as_called`.
    """
    return _Parser(
        prog=as_called(f"python {COMMANDS[name][0]}/{name.replace('-', '_')}.py"),
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


# What other programs call an argument -> what was probably meant, for those that are not just spelt alike.
_OTHER_NAMES = {
    "--dataset": "--benchmark",
    "--dataset-root": "--data-root",
    "--pretrained": "--model open_clip:NAME/PRETRAINED",
    "--checkpoint": "--model",
    "--ckpt": "--model",
    "--run": "--model",
}


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_args(list(map(_at_home, sys.argv[1:] if args is None else args)), namespace)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_intermixed_args(list(map(_at_home, sys.argv[1:] if args is None else args)), namespace)

    def format_help(self) -> str:
        return as_called(super().format_help())

    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        words = message.removeprefix("unrecognized arguments: ").split()
        if message.startswith("unrecognized arguments: ") and words[0].startswith("--"):
            name = words[0].partition("=")[0].replace("_", "-")
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            meant = _OTHER_NAMES.get(name) or (near[0] if near else "")
            message = f"{words[0]} is not an argument" + (f"; did you mean {meant}?" if meant else "")
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _at_home(word: str) -> str:
    """A word of the command line; shells replace ``~`` in ``--option ~/x`` and not in ``--option=~/x``."""
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return option + equals + home_expanded(value)


def as_called(text: str) -> str:
    """Commands in ``text`` as the user writes them: ``focalclip NAME`` where that console script was called.

    Columns behind a command stay where they are.
    """
    if Path(sys.argv[0]).stem != "focalclip":
        return text
    return "\n".join(map(_line_as_called, text.split("\n")))


def _line_as_called(line: str) -> str:
    def command(match: re.Match[str]) -> str:
        launcher, name = match.groups()
        flag = {"python": "", "deepspeed": "deepspeed --no_python "}.get(
            launcher or "python", f"{launcher} --no-python "
        )
        return f"{flag}focalclip {name.replace('_', '-')}"

    new = _SCRIPT.sub(command, line)
    gap = re.search(r"(?<=\S) {2,}(?=\S)", new)
    if new == line or gap is None:
        return new
    width = max(2, len(gap[0]) + len(line) - len(new))
    return new[: gap.start()] + " " * width + new[gap.end() :]


def without_launchers(argv: Sequence[str]) -> list[str]:
    """``argv`` without the rank that DeepSpeed's and torch's older launchers add; the environment has it as well."""
    return [word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))]


def positive_int(text: str) -> int:
    """Type of an argument that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def not_negative(text: str) -> int:
    """Type of a seed."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def usable_device(name: str | None) -> str:
    """``name``, or the default device where it is None.

    Raises:
        UserError: if it cannot be used.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used ({first_line(error)}); leave it away or give cpu") from None
    return name


def check_output(path: Path, flag: str = "--output") -> None:
    """Check before the work that the result can be written after it.

    Raises:
        UserError: if it cannot.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file such as {path / 'result.json'}")
    if reason := why_not_writable(path):
        raise UserError(f"{flag} {path}: its folder cannot be written to ({reason}); choose another")


def result_outputs(output: str | None, source: str, name: str) -> list[Path]:
    """Where a result goes: the file asked for, and ``eval/NAME.json`` of the run that is measured, if it can be.

    A file of the run that cannot be written is named on stderr, before the work.

    Raises:
        UserError: if the run cannot be written and no other file is named.
    """
    outputs = [Path(output)] if output else []
    if (user_path(source) / "config.yaml").is_file():
        outputs.append(user_path(source) / "eval" / f"{_short(name)}.json")
    from focalclip.evaluation.result import writable

    return writable(outputs)


def _short(name: str, limit: int = 120) -> str:
    """A file's name that leaves room for endings; a long one, as of many tasks, ends in its own hash."""
    return name if len(name) <= limit else f"{name[:limit]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def output_folder(name: str, flag: str = "--output") -> Path:
    """The folder to write into, which need not exist yet.

    Raises:
        UserError: if it is a file.
    """
    folder = Path(name)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag} {folder}: is a file; name a folder")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"{flag} {folder}: cannot be made in {there}, which cannot be written to; choose another")
    return folder


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """``--no-cache`` and ``--cache-dir``, which :func:`feature_folder` reads."""
    parser.add_argument("--no-cache", action="store_true", help="neither use nor keep features")
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="where features are kept (default: ~/.cache/focalclip/features)"
    )


def feature_folder(args: argparse.Namespace) -> Path | None:
    """Where features are kept; None: nowhere."""
    from focalclip.evaluation.features.cache import default_folder

    return None if args.no_cache else Path(args.cache_dir) if args.cache_dir else default_folder()
