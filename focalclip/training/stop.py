"""Requests to stop: recorded when they arrive, agreed among ranks, obeyed between two steps or inside an evaluation."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch

from focalclip.base.ranks import asked_by_another, interrupt, interruptible, world_size

INTERRUPTED = 75
"""Exit status of a run that has saved and can be resumed: EX_TEMPFAIL of ``sysexits.h``, "try again"."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """Within this context, or from :meth:`heed` to its end, the first SIGINT, SIGTERM, SIGUSR1 or SIGHUP is a flag.

    A second SIGINT interrupts at once, as usual. What is ignored, as ``nohup`` ignores SIGHUP, stays ignored.

    The launcher signals ranks one after another, so a rank must not save when *it* is signalled: the others would wait
    for it inside a collective. All ranks therefore exchange the flag at every step and stop at the same one.

    The ``deepspeed`` command does not forward SIGTERM: killed alone it leaves its ranks training, so its end counts.

    Args:
        device: of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reason: str | None = None
        """The signal that was received, or the process whose end was detected."""
        self._pending: torch.Tensor | None = None
        self._usual: dict[int, Any] = {}
        self._starter = _deepspeed_command()
        self._had_sigint = False
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def __enter__(self) -> Self:
        self.heed()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def heed(self) -> None:
        """Take the signals over from here on; before, they end the process at once, as nothing is lost yet."""
        for number in _SIGNALS:
            if number not in self._usual and signal.getsignal(number) is not signal.SIG_IGN:
                self._usual[number] = signal.signal(number, self._note)

    def agreed(self, is_faulty: bool = False) -> bool:
        """Whether to stop now: true on all ranks at the same step, once any of them was signalled or is faulty.

        With several ranks the answer is that of the exchange begun one step earlier, so that no device waits for it.

        Args:
            is_faulty: whether this rank cannot go on for long; counts like a signal.
        """
        self._look_for_starter()
        wanted = self.reason is not None or is_faulty
        if world_size() == 1:
            return wanted
        pending, self._pending = self._pending, torch.tensor([float(wanted)], device=self.device)
        torch.distributed.all_reduce(self._pending, op=torch.distributed.ReduceOp.MAX)
        return pending is not None and bool(pending.item())

    @contextmanager
    def obeyed_at_once(self) -> Iterator[None]:
        """Within this context a request does not wait for a step; all ranks enter and leave it together.

        Raises:
            Interrupted: on all ranks, once any of them was signalled, also before.
        """
        timer = signal.getsignal(signal.SIGALRM)
        if self._starter is not None:
            signal.signal(signal.SIGALRM, lambda *_: self._look_for_starter())
            signal.setitimer(signal.ITIMER_REAL, 1, 1)
        try:
            with interruptible():
                if self.reason:
                    interrupt(self.reason)
                yield
        finally:
            if self._starter is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, timer)

    def _look_for_starter(self) -> None:
        if self._starter != _deepspeed_command():
            self._request("deepspeed has ended")

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if number == signal.SIGINT:
            if self._had_sigint:
                raise KeyboardInterrupt
            self._had_sigint = True
        if number == signal.SIGHUP:
            self._forget_terminals()
        self._request(asked_by_another() or f"{signal.Signals(number).name} received")

    def _request(self, reason: str) -> None:
        self.reason = self.reason or reason
        interrupt(self.reason)

    def _forget_terminals(self) -> None:
        """A terminal that has closed fails whatever is printed to it."""
        sink = os.open(os.devnull, os.O_WRONLY)
        for number in self._terminals:
            if not os.isatty(number):
                os.dup2(sink, number)
        os.close(sink)


def _deepspeed_command() -> int | None:
    """Process id of the ``deepspeed`` command, which starts a launcher, which starts the ranks; None without it."""
    if "LOCAL_SIZE" not in os.environ:  # set by that launcher alone
        return None
    import psutil

    try:
        return psutil.Process(os.getppid()).ppid()
    except psutil.Error:
        return 0  # the launcher has gone
