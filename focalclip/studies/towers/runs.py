"""The runs of a comparison: real pretraining processes, several at a time, each resumed where it was killed."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from focalclip.base.strict import dump_yaml
from focalclip.studies.towers.plan import Plan, run_name

# scripts/pretrain.py, also where only wheels are
_PRETRAIN = "from focalclip.cli.pretrain import main; raise SystemExit(main())"


@dataclass(frozen=True)
class Run:
    """One tower and one seed."""

    tower: str
    seed: int
    folder: Path
    """Of the whole comparison."""

    @property
    def name(self) -> str:
        """Name of its directory."""
        return run_name(self.tower, self.seed)

    @property
    def result(self) -> Path | None:
        """The file of its evaluation, which is written last; not one of a part of the images."""
        paths = sorted((self.folder / self.name / "eval").glob("*.json"))
        return next((path for path in paths if '"partial": true' not in path.read_text(errors="replace")), None)

    @property
    def failure(self) -> str | None:
        """Why its last attempt failed."""
        path = self._beside("failed")
        return path.read_text().strip() if path.is_file() and not self.result else None

    def _beside(self, suffix: str) -> Path:
        return self.folder / "logs" / f"{self.name}.{suffix}"

    def start(self, plan: Plan, cores: Sequence[int]) -> subprocess.Popen:
        """Begin or continue it on these cores."""
        self._beside("log").parent.mkdir(parents=True, exist_ok=True)
        self._beside("failed").unlink(missing_ok=True)
        self._beside("yaml").write_text(dump_yaml(plan.run_config(self.tower, self.seed, self.folder)))
        command = [sys.executable, "-c", _PRETRAIN, "--config", str(self._beside("yaml")), "--resume"]
        one_thread = {"OMP_NUM_THREADS": "1"} if plan.device == "cpu" else {}
        with self._beside("log").open("w") as log:
            # its own process session: Ctrl-C reaches it once, through us
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | one_thread, start_new_session=True
            )
        if cores:
            os.sched_setaffinity(process.pid, cores)
        return process

    def finish(self, status: int) -> None:
        """Note a failure; a finished run needs its checkpoints (ten times the size of its model) no more."""
        if self.result:
            shutil.rmtree(self.folder / self.name / "checkpoints", ignore_errors=True)
            return
        lines = [line.strip() for line in self._beside("log").read_text(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        reason = (errors or lines or ["it said nothing"])[-1]
        self._beside("failed").write_text(f"exit status {status}: {reason}\n")


def run_all(runs: Sequence[Run], plan: Plan, jobs: int) -> None:
    """Finish every run, ``jobs`` at a time, with a line for each; a failure is recorded and does not stop the others.

    Interrupted, it passes SIGTERM on, and the runs save where they are.
    """
    waiting = [run for run in runs if not run.result]
    running: dict[int, tuple[Run, subprocess.Popen, float]] = {}
    cores = _shares(jobs) if plan.device == "cpu" else [[]] * jobs
    done = len(runs) - len(waiting)
    bar = tqdm(total=len(runs), initial=done, unit="run", desc="compare", disable=not sys.stderr.isatty())
    with bar:
        try:
            while waiting or running:
                for slot in [slot for slot in range(jobs) if slot not in running][: len(waiting)]:
                    run = waiting.pop(0)
                    running[slot] = run, run.start(plan, cores[slot]), time.monotonic()
                bar.set_postfix_str(", ".join(run.name for run, *_ in running.values()))
                time.sleep(0.2)
                for slot, (run, process, since) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        run.finish(process.returncode)
                        bar.update()
                        done += 1
                        _tell(run, plan, time.monotonic() - since, f"{done}/{len(runs)}")
        finally:
            for _, process, _ in running.values():
                process.terminate()
            for _, process, _ in running.values():
                process.wait()


def _tell(run: Run, plan: Plan, seconds: float, count: str) -> None:
    outcome = run.failure and f"failed: {run.failure}"
    line = f"{count} {run.name}: {outcome or f'{plan.steps(run.tower):,} steps, evaluated'}"
    tqdm.write(f"{line}, {tqdm.format_interval(seconds)} on the clock", file=sys.stderr)


def _shares(jobs: int) -> list[list[int]]:
    """The cores of each of ``jobs`` processes; empty where the system does not say (macOS)."""
    if not hasattr(os, "sched_getaffinity"):
        return [[]] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [cores[job::jobs] or [cores[job % len(cores)]] for job in range(jobs)]


@contextmanager
def terminable() -> Iterator[None]:
    """Context in which SIGTERM raises KeyboardInterrupt too, on which all processes started here are terminated."""
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)
