"""``scripts/pretrain.py``: corpus, training, evaluation."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from focalclip.base.errors import SharedError, UserError
from focalclip.base.strict import load_yaml
from focalclip.cli import command as args
from focalclip.cli import settings
from focalclip.config import RunConfig, config_dir

if TYPE_CHECKING:
    from focalclip.models.clip import FocalCLIP
    from focalclip.training.run import Measure

DEFAULT_CONFIG = "focalclip_pico"

DESCRIPTION = f"""Pretrain a FocalNet image tower and a text tower with a contrastive loss, then evaluate zero-shot.

  deepspeed scripts/pretrain.py                                          the default model on the default corpus
  deepspeed scripts/pretrain.py --config configs/focalclip_tiny_lrf.yaml --data.train 'cc12m/{{000..999}}.tar'
  python scripts/pretrain.py --resume                                    continue where the run stopped

Besides the settings below:
  --config FILE    start from this file (default: configs/{DEFAULT_CONFIG}.yaml); runs/NAME/config.yaml repeats a run
  --resume         continue the newest checkpoint of the run directory; starts anew where there is none
  --model.image.options.KEY VALUE
                   what else the image tower is built with: an argument of timm's model function, such as img_size 96
                   for a Swin, or a field of FocalNetConfig, such as depths 2 2 6 2
"""


def main(argv: list[str]) -> int:
    """Train; return the exit status."""
    config, resume = parse(argv)
    from focalclip.training import engine

    shards = training_shards(config)
    check_benchmark(config)
    engine.boot()
    from focalclip.base.ranks import is_main, rank
    from focalclip.training.run import run_training

    try:
        finished = run_training(config, shards, resume, _measure(config) if config.eval.every else None)
    except UserError as error:
        if is_main() or isinstance(error, SharedError):
            raise
        print(f"error: rank {rank()}: {error}", file=sys.stderr)  # no other rank knows of it
        return 2
    status = _evaluate(config) if finished and config.eval.benchmark else 0
    engine.shut_down()
    return status


def parse(argv: list[str]) -> tuple[RunConfig, bool]:
    """The configuration and whether to resume.

    Raises:
        UserError: naming the argument or the field at fault.
    """
    words, path, resume, wants_help = iter(argv), None, False, False
    rest: list[str] = []
    for word in words:
        if word == "--resume":
            resume = True
        elif word in ("--help", "-h"):
            wants_help = True
        elif word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(words, None)
            if path is None:
                raise UserError("command line: --config needs a file: --config configs/NAME.yaml")
        elif not word.startswith("--local_rank="):  # DeepSpeed's launcher adds it; the environment tells the same
            rest.append(word)
    base = load_yaml(RunConfig, path or config_dir() / f"{DEFAULT_CONFIG}.yaml")
    if wants_help:
        settings.print_help(base, DESCRIPTION)
    return settings.with_overrides(base, rest), resume


def training_shards(config: RunConfig) -> list[Path]:
    """The training shards; the default corpus, or shards of another source, are built if this is their first use."""
    from focalclip.data import sources

    return sources.training_shards(config.data.train)


def check_benchmark(config: RunConfig) -> None:
    """A benchmark that is misspelt or cannot be had is known before training, not after it."""
    if config.eval.benchmark and os.environ.get("RANK", "0") == "0":
        from focalclip.evaluation.task import load_benchmark

        load_benchmark(config.eval.benchmark)


def _measure(config: RunConfig) -> "Measure":
    """What is measured during training: each task's value, and their mean."""
    from focalclip.base.ranks import is_main
    from focalclip.evaluation.zeroshot import Evaluator

    evaluator = Evaluator(str(config.eval.benchmark), max_images=config.eval.max_images)
    told: set[str] = set()

    def measure(model: "FocalCLIP") -> dict[str, float]:
        result = evaluator(model)
        for name, reason in (result.missing | result.failed).items():
            if is_main() and name not in told:
                print(f"zero-shot without {name}: {reason}", file=sys.stderr)
            told.add(name)
        score = {} if result.score is None else {"score": result.score}
        return score | {name: task.value for name, task in result.tasks.items()}

    return measure


def _evaluate(config: RunConfig) -> int:
    """The whole benchmark, by all ranks; the main one prints and writes."""
    from focalclip.cli.zeroshot import main as zeroshot

    return zeroshot(["--benchmark", str(config.eval.benchmark), "--model", str(config.run_dir)])


def entry() -> None:
    """Console script."""
    sys.exit(args.guarded(lambda: main(sys.argv[1:])))
