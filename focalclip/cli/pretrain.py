"""``scripts/pretrain.py``: corpus, training, evaluation."""

import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from focalclip.base.errors import UserError, faults_named, require, system_error
from focalclip.cli import settings
from focalclip.cli.command import as_called, guarded, without_launchers
from focalclip.config import RunConfig, config_names, load_config

if TYPE_CHECKING:
    from focalclip.models.clip import FocalCLIP
    from focalclip.training.run import Measure

DEFAULT_CONFIG = "focalclip_pico"

HELP = f"""\
usage: python scripts/pretrain.py [--config FILE_OR_NAME] [--resume] [--section.field VALUE ...]

Pretrain an image tower and a text tower with a contrastive loss, then evaluate zero-shot.

examples:
  python scripts/pretrain.py                                    the default model on the default corpus
  deepspeed scripts/pretrain.py                                 the same on all GPUs of this machine
  deepspeed scripts/pretrain.py --config focalclip_tiny_lrf --data.train 'cc12m/{{000..999}}.tar'
  python scripts/pretrain.py --resume                           continue where the run stopped

exit status: 0 finished; 1 a fault of the machine (a full disk, a process that was killed), or no task could be
evaluated; 2 a mistake on the command line or in the data; 75 interrupted (Ctrl-C, SIGTERM, SIGUSR1, SIGHUP) and saved:
the same command with --resume goes on. The launchers deepspeed and torchrun end with 75 or, where they are signalled
themselves, with a status of their own.

options:
  -h, --help
      Show this text, with the values of the file that --config names.
  --config FILE_OR_NAME
      Start from this file; runs/NAME/config.yaml repeats a run. These names are known:
      {", ".join(config_names())}
      (default: {DEFAULT_CONFIG})
  --resume
      Continue from the newest checkpoint of the run directory; start from step 0 where there is none.

Several values make a list: --optim.betas 0.9 0.95. Nothing is written null.

settings:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(words))


def _run(argv: list[str]) -> int:
    config, resume = parse(argv)
    if not resume:
        _warn_of_demo_settings(argv, config)
        from focalclip.interop.start import check_sources

        check_sources(config)
    if config.eval.benchmark:
        require(f"eval.benchmark={config.eval.benchmark}", "eval", "scipy", "jinja2")
    from focalclip.base.ranks import joined
    from focalclip.training.run import check

    check(config)
    check_benchmark(config)
    with joined(alone=True):
        return _train_and_evaluate(config, resume)


def _train_and_evaluate(config: RunConfig, resume: bool) -> int:
    from focalclip.base.ranks import Interrupted, in_turns, is_main, main_only
    from focalclip.training import engine
    from focalclip.training.run import owned_run, run_training
    from focalclip.training.stop import INTERRUPTED, StopRequest

    shards = in_turns(lambda: training_shards(config))
    engine.set_up()
    with owned_run(config), ExitStack() as at_the_end:
        stop = at_the_end.push(StopRequest(engine.device()))
        finished = run_training(config, shards, resume, stop, _measure(config) if config.eval.every else None)
        if config.data.val is not None:
            main_only(lambda: _draw_curves(config))
        if not finished:
            return INTERRUPTED
        if not config.eval.benchmark:
            return 0
        try:
            with stop.obeyed_at_once():
                return _evaluate(config)
        except Interrupted:
            if is_main():
                print(f"{stop.reason}: trained, not evaluated; continue with the same command and --resume")
            return INTERRUPTED


def _draw_curves(config: RunConfig) -> None:
    """Draw what was measured during training, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib"):
        from focalclip.reports.charts import write_curves

        with suppress(UserError):  # stopped before the first line
            write_curves(config.run_dir)


def parse(argv: list[str]) -> tuple[RunConfig, bool]:
    """The configuration and whether to resume.

    Raises:
        UserError: naming the argument or the field at fault.
    """
    words, source, resume, wants_help, follows = iter(without_launchers(argv)), None, False, False, False
    rest: list[str] = []
    for word in words:
        if (follows and not word.startswith("-")) or word.startswith("--resume="):
            value = word.removeprefix("--resume=")
            raise UserError(f"command line: --resume takes no value ({value!r}); it continues the run of --name NAME")
        follows = word == "--resume"
        if follows:
            resume = True
            continue
        if word in ("--help", "-h"):
            wants_help = True
        elif word == "--config" or word.startswith("--config="):
            source = word.partition("=")[2] or next(words, None)
            if source is None:
                raise UserError("command line: --config needs a file or a name, such as --config focalclip_tiny_lrf")
        else:
            rest.append(word)
    base = load_config(source or DEFAULT_CONFIG)
    if wants_help:
        print(as_called(HELP + settings.help_text(base)))
        raise SystemExit(0)
    return settings.with_overrides(base, rest), resume


def _warn_of_demo_settings(argv: list[str], config: RunConfig) -> None:
    """Say once where only the data were changed: the default configuration is made for the default corpus."""
    names = [word.partition("=")[0].replace("_", "-") for word in argv]
    is_chosen = any(name == "--config" or name.startswith(("--model.", "--data.augment.")) for name in names)
    if is_chosen or config.data.train == "emoji" or os.environ.get("RANK", "0") != "0":
        return
    print(
        f"warning: data.train is no longer the default corpus, but the configuration is: {DEFAULT_CONFIG} trains a "
        f"small model at {config.model.image.image_size} px with the demo's augmentation (rotated, inverted and "
        "recoloured pictures); for photographs use --config focalclip_tiny_lrf, which trains at 224 px",
        file=sys.stderr,
    )


def training_shards(config: RunConfig) -> list[Path]:
    """The training shards; the default corpus, or shards of another source, are built if this is their first use."""
    from focalclip.data import prepared

    data = config.data
    return prepared.training_shards(data.train, max_missing=data.max_bad_shards, max_faults=data.max_faults)


def check_benchmark(config: RunConfig) -> None:
    """Check before training that something can be measured after it: one task is enough, as for ``zeroshot``.

    Raises:
        UserError: if there is no such benchmark or task, or the data of no task is there.
    """
    if config.eval.benchmark is None or os.environ.get("RANK", "0") != "0":
        return
    from focalclip.evaluation.opened import open_checked
    from focalclip.evaluation.task import load_benchmark

    try:
        benchmark = load_benchmark(config.eval.benchmark, config.eval.data_root).select(config.eval.tasks)
    except UserError as error:
        raise UserError(_with_settings(str(error))) from None
    reasons: list[str] = []
    for task in benchmark.tasks:
        try:
            faults_named(partial(open_checked, task, benchmark))
        except (UserError, OSError) as error:
            reason = system_error(error) if isinstance(error, OSError) else error
            reasons.append(_with_settings(f"{task.id}: {reason}"))
        else:
            return
    others = f"; {len(reasons) - 1} more likewise" if reasons[1:] else ""
    raise UserError(
        f"eval.benchmark={config.eval.benchmark}: nothing of it could be measured ({reasons[0]}{others});"
        " get the data first, or set null"
    )


def _with_settings(message: str) -> str:
    """A message of the evaluation with the settings of a run in the place of its commands' arguments."""
    for argument in ("benchmark", "data-root", "tasks"):
        message = message.replace(f"--{argument}", f"eval.{argument.replace('-', '_')}")
    return message


def _measure(config: RunConfig) -> "Measure":
    """The evaluation during training: each task's value, and their mean."""
    from focalclip.base.ranks import is_main
    from focalclip.evaluation.zeroshot import Evaluator

    settings = config.eval
    evaluator = Evaluator(
        str(settings.benchmark), max_images=settings.max_images, data_root=settings.data_root, tasks=settings.tasks
    )
    reported: set[str] = set()

    def measure(model: "FocalCLIP") -> dict[str, float]:
        result = evaluator(model)
        for name, reason in (result.missing | result.failed).items():
            if is_main() and name not in reported:
                print(f"zero-shot without {name}: {reason}", file=sys.stderr)
            reported.add(name)
        score = {} if result.score is None else {"score": result.score}
        return score | {name: task.value for name, task in result.tasks.items()}

    return measure


def _evaluate(config: RunConfig) -> int:
    """The whole benchmark, by all ranks; the main one prints and writes."""
    from focalclip.cli import zeroshot

    arguments = ["--benchmark", str(config.eval.benchmark), "--model", str(config.run_dir)]
    arguments += [f"--data-root={config.eval.data_root}"] if config.eval.data_root else []
    arguments += ["--tasks", *config.eval.tasks] if config.eval.tasks else []
    return zeroshot.run(arguments)
