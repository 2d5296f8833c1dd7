"""What a run tells: a progress bar (lines where there is no terminal), ``metrics.jsonl`` and TensorBoard."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from focalclip.distributed import is_main
from focalclip.training.checkpoint import TrainState

SECONDS_BETWEEN_LINES = 15.0


class TrainLog:
    """Collects values on the device and reads them only when a line is due; only the main rank prints and writes.

    Raises:
        FloatingPointError: from :meth:`step`, if the loss is not finite when it is read.
    """

    def __init__(self, run_dir: Path, total_steps: int, state: TrainState, log_every: int) -> None:
        self.total_steps, self.log_every = total_steps, log_every
        self.faults = 0
        self._pending: list[tuple[Tensor, Tensor]] = []
        self._started = self._since = self._last_line = time.perf_counter()
        self._first_step, self._images = state.step, 0
        self._is_main = is_main()
        if self._is_main:
            from torch.utils.tensorboard import SummaryWriter

            _cut_after(run_dir / "metrics.jsonl", state.step)
            self._file = (run_dir / "metrics.jsonl").open("a")
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=state.step + 1)
            self._bar = tqdm(
                total=total_steps, initial=state.step, unit="step", desc="train", disable=None, dynamic_ncols=True
            )

    def step(
        self, state: TrainState, images: int, loss: Tensor, temperature: Tensor, lr: float, grad_norm: Any
    ) -> None:
        """Note one optimiser step over ``images`` pairs of the global batch; write a line if one is due."""
        self._pending.append((loss.detach(), temperature.detach()))
        self._images += images
        if self._is_main:
            self._bar.update()
        if state.step % self.log_every == 0 or state.step == self.total_steps:
            self._flush(state, lr, grad_norm)

    def fault(self, message: str) -> None:
        """Count a sample that was replaced, and name it."""
        self.faults += 1
        self.say(f"replaced a broken sample: {message}")

    def say(self, message: str) -> None:
        """Print a line without tearing the bar; main rank only."""
        if self._is_main:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Finish the bar and the files."""
        if self._is_main:
            self._bar.close()
            self._file.close()
            self._board.close()

    def _flush(self, state: TrainState, lr: float, grad_norm: Any) -> None:
        losses = torch.stack([loss for loss, _ in self._pending]).float()
        temperature = self._pending[-1][1].item()
        self._pending.clear()
        loss = losses.mean().item()  # equal on all ranks, so all of them stop together if it is not finite
        if not torch.isfinite(losses).all():
            raise FloatingPointError(f"the loss became {loss} at or before step {state.step}")
        now = time.perf_counter()
        values = {
            "step": state.step,
            "samples": state.samples,
            "loss": loss,
            "logit_scale": temperature,
            "lr": lr,
            "images_per_second": self._images / (now - self._since),
            "faults": self.faults,
        }
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        self._since, self._images = now, 0
        if self._is_main:
            self._write(values, now)

    def _write(self, values: dict[str, Any], now: float) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        for name in values.keys() - {"step", "samples"}:
            self._board.add_scalar(f"train/{name}", values[name], values["step"])
        shown = f"loss {values['loss']:.3f}, 1/temperature {values['logit_scale']:.1f}"
        shown += f", {values['images_per_second']:.0f} images/s"
        self._bar.set_postfix_str(shown, refresh=False)
        if self._bar.disable and (now - self._last_line > SECONDS_BETWEEN_LINES or values["step"] == self.total_steps):
            self._last_line = now
            left = (now - self._started) / (values["step"] - self._first_step) * (self.total_steps - values["step"])
            line = f"step {values['step']}/{self.total_steps}: {shown}, {tqdm.format_interval(left)} left"
            print(line, file=sys.stderr, flush=True)


def _cut_after(path: Path, step: int) -> None:
    """Drop the lines of steps that will be done again after a resume."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step))
