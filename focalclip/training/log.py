"""The log of a run: a progress bar (lines where there is no terminal), ``metrics.jsonl`` and TensorBoard."""

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from focalclip.base.errors import SharedError
from focalclip.base.files import write_text, writing
from focalclip.base.ranks import gather_objects, is_main
from focalclip.config import RunConfig
from focalclip.data.samples import Ignored
from focalclip.training.checkpoint import TrainState
from focalclip.training.step import StepResult

SECONDS_BETWEEN_LINES = 15.0


class TrainLog:
    """Collects values on the device and reads them only when a line is due; only the main rank prints and writes.

    Raises:
        SharedError: from :meth:`step` and :meth:`settle`, once more samples were broken than ``data.max_faults``.
    """

    def __init__(self, config: RunConfig, total_steps: int, state: TrainState) -> None:
        self.config, self.total_steps = config, total_steps
        self._unread: list[tuple[Tensor, Tensor]] = []
        self._faults: list[str] = []
        self._ignored: list[Ignored] = []
        self._num_ignored: Counter[str] = Counter()
        self._started = self._since = self._last_line = time.perf_counter()
        self._images = 0
        self.first_step = state.step
        """The step at which this process began, or to which it returned last."""
        self._is_main = is_main()
        if self._is_main:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter
            self._open(state.step)
            self._bar = tqdm(
                total=total_steps, initial=state.step, unit="step", desc="train", disable=None, dynamic_ncols=True
            )

    def step(self, state: TrainState, result: StepResult) -> None:
        """Record one optimiser step; write a line if one is due."""
        self._unread.append((result.loss.float(), result.grad_norm))
        self._faults += result.faults
        self._ignored += result.ignored
        self._images += self.config.data.batch_size
        if self._is_main:
            self._bar.update()
        if state.step % self.config.train.log_every == 0 or state.step == self.total_steps:
            self.settle(state)
            self._flush(state, result)

    def settle(self, state: TrainState) -> None:
        """Move what is pending into ``state``: losses, skipped steps and faults; all ranks call this together.

        Raises:
            SharedError: if more samples were broken than ``data.max_faults``.
        """
        if self._unread:
            self._settle_losses(state)
        ranks = gather_objects((self._faults, self._ignored))
        faults = [message for messages, _ in ranks for message in messages]
        for reason, where in (part for _, parts in ranks for part in parts):
            if reason not in self._num_ignored:
                self.say(f"ignored in a sample: {reason} ({where}); the next ones are counted")
            self._num_ignored[reason] += 1
        self._faults, self._ignored = [], []
        for message in faults:
            self.say(f"replaced a broken sample: {message}")
        state.faults += len(faults)
        if state.faults > (limit := self.config.data.max_faults):
            raise SharedError(
                f"data.max_faults: {state.faults} broken samples, more than {limit}; "
                "repair the shards named above or raise data.max_faults"
            )

    def _settle_losses(self, state: TrainState) -> None:
        first = state.step - len(self._unread) + 1
        values = torch.stack([torch.stack(pair) for pair in self._unread]).tolist()  # one wait for the device
        self._unread.clear()
        for step, (loss, grad_norm) in enumerate(values, first):
            if math.isfinite(grad_norm):
                state.losses.append(loss)
                state.skipped_in_a_row = 0
            else:
                state.skipped += 1
                state.skipped_in_a_row += 1
                self.say(f"step {step}: skipped, as its loss is {loss:g} and the norm of its gradient {grad_norm:g}")

    def rewind(self, state: TrainState) -> None:
        """Forget the steps after ``state``, which a run has returned to."""
        self._unread.clear()
        self._started = self._since = time.perf_counter()
        self.first_step, self._images = state.step, 0
        if self._is_main:
            with writing(self.config.run_dir):
                self._file.close()
                self._board.close()
            self._open(state.step)
            self._bar.n = state.step
            self._bar.refresh()

    def evaluation(self, state: TrainState, values: dict[str, float], seconds: float) -> None:
        """Record a zero-shot evaluation: fractions by name, and its seconds."""
        known = {name: _finite(value) for name, value in values.items()}
        shown = ", ".join(f"{name} {100 * value:.1f}%" for name, value in values.items())
        self._measured(state, "zeroshot", known, f"zero-shot {shown or 'nothing'}", seconds)

    def held_out(self, state: TrainState, values: dict[str, Any], seconds: float) -> None:
        """Record what :class:`focalclip.training.heldout.HeldOutMeasure` returned, and its seconds."""
        if not values:
            return self._measured(state, "heldout", values, "held-out pairs: nothing", seconds)
        loss = "not finite" if values["loss"] is None else f"{values['loss']:.3f}"
        shown = f"held-out loss {loss}, recall@1/5/10 of {values['n']:,}"
        for way in ("image_to_text", "text_to_image"):
            recalls = "/".join(f"{100 * value:.1f}" for name, value in values[way].items() if name.startswith("recall"))
            shown += f", {way.replace('_', ' ')} {recalls}%"
        return self._measured(state, "heldout", values, shown, seconds)

    def has(self, name: str, step: int) -> bool:
        """Whether ``metrics.jsonl`` has a measurement of this name at a step; main rank only."""
        with writing(self.config.run_dir):
            lines = (self.config.run_dir / "metrics.jsonl").read_text().splitlines()
        return any(f'"{name}": ' in line and json.loads(line)["step"] == step for line in lines)

    def _measured(self, state: TrainState, name: str, values: dict[str, Any], shown: str, seconds: float) -> None:
        """Write a measurement; its seconds do not count in the speed of training."""
        self._since += seconds
        self._started += seconds
        if self._is_main:
            facts = {"step": state.step, "samples": state.samples, name: values, "seconds": round(seconds, 3)}
            with writing(self.config.run_dir):
                self._file.write(json.dumps(facts, allow_nan=False) + "\n")
                self._file.flush()
                for path, value in _numbers(values, name):
                    self._board.add_scalar(path, value, state.step)
            self.say(f"step {state.step}: {shown} ({seconds:.1f} s)")

    def say(self, message: str) -> None:
        """Print a line above the progress bar; main rank only."""
        if self._is_main:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Finish the bar and the files; say how often parts of samples were ignored since the start or resume."""
        if self._is_main:
            self._bar.close()
            for reason, count in self._num_ignored.items():
                self.say(f"ignored in {count:,} samples: {reason}")
            with writing(self.config.run_dir):
                self._file.close()
                self._board.close()

    def _open(self, step: int) -> None:
        """Open the files behind ``step``."""
        _cut_after(self.config.run_dir / "metrics.jsonl", step)
        with writing(self.config.run_dir):
            self._file = (self.config.run_dir / "metrics.jsonl").open("a")
            self._board = self._writer(str(self.config.run_dir / "tensorboard"), purge_step=step + 1)

    def _flush(self, state: TrainState, result: StepResult) -> None:
        now = time.perf_counter()
        values = {
            "step": state.step,
            "samples": state.samples,
            "loss": fmean(state.losses) if state.losses else None,  # of no step: all were skipped
            "scale": _finite(result.scale.item()),
            "lr": result.lr,
            "grad_norm": _finite(result.grad_norm.item()),
            "images_per_second": self._images / (now - self._since),
            "faults": state.faults,
            "skipped": state.skipped,
        }
        self._since, self._images, state.losses = now, 0, []
        if self._is_main:
            self._write(values, now)

    def _write(self, values: dict[str, Any], now: float) -> None:
        with writing(self.config.run_dir):
            self._file.write(json.dumps(values, allow_nan=False) + "\n")
            self._file.flush()
            for name, value in values.items():
                if name not in ("step", "samples") and value is not None:
                    self._board.add_scalar(f"train/{name}", value, values["step"])
        loss = "not finite" if values["loss"] is None else f"{values['loss']:.3f}"
        shown = f"loss {loss}, scale {values['scale'] or math.nan:.1f}"
        shown += f", {values['images_per_second']:.0f} images/s"
        self._bar.set_postfix_str(shown, refresh=False)
        if self._bar.disable and (now - self._last_line > SECONDS_BETWEEN_LINES or values["step"] == self.total_steps):
            self._last_line = now
            left = (now - self._started) / (values["step"] - self.first_step) * (self.total_steps - values["step"])
            line = f"step {values['step']}/{self.total_steps}: {shown}, {tqdm.format_interval(left)} left"
            print(line, file=sys.stderr, flush=True)


def _numbers(values: dict[str, Any], path: str) -> Iterator[tuple[str, float]]:
    """Every number with its path, such as ``heldout/image_to_text/recall@1``."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{path}/{name}")
        elif value is not None:
            yield f"{path}/{name}", value


def _finite(value: float) -> float | None:
    """``value``, or None, as JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None


def _cut_after(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again after a resume, and damaged ones, with a warning."""
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")[:-1]  # behind the last one is what a killed process wrote in part
    steps = [_step_of(line) for line in lines]
    kept = [line.decode() + "\n" for line, done in zip(lines, steps, strict=True) if done is not None and done <= step]
    write_text(path, "".join(kept))
    damaged = [number for number, done in enumerate(steps, 1) if done is None]
    if damaged:
        numbers = ", ".join(map(str, damaged[:3])) + (" ..." if damaged[3:] else "")
        print(f"warning: {path}: {len(damaged)} damaged lines are left out (line {numbers})", file=sys.stderr)


def _step_of(line: bytes) -> int | None:
    """The step of a line of ``metrics.jsonl``; None where it is damaged."""
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    found = values.get("step") if isinstance(values, dict) else None
    return found if type(found) is int else None
