"""Ctrl-C and SIGTERM: recorded when received, agreed among ranks, handled between two steps."""

import os
import signal
from types import FrameType
from typing import Any, Self

import torch

from focalclip.base.ranks import world_size


class StopRequest:
    """Within this context the first SIGINT or SIGTERM becomes a flag; a second SIGINT interrupts at once, as usual.

    The launcher signals ranks one after another, so a rank must not save when *it* is signalled: the others would wait
    for it inside a collective. All ranks therefore exchange the flag at every step and stop at the same one.

    The ``deepspeed`` command does not forward SIGTERM: killed alone it leaves its ranks training, so its end counts.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reason: str | None = None
        """The signal that was received, or the process whose end was detected."""
        self._pending: torch.Tensor | None = None
        self._usual: dict[int, Any] = {}
        self._starter = _deepspeed_command()

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._usual[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether to stop now: true on all ranks at the same step, once any of them was signalled.

        With several ranks the answer is that of the exchange begun one step earlier, so that no device waits for it.
        """
        if self._starter != _deepspeed_command():
            self.reason = self.reason or "deepspeed has ended"
        if world_size() == 1:
            return self.reason is not None
        pending, self._pending = self._pending, torch.tensor([float(self.reason is not None)], device=self.device)
        torch.distributed.all_reduce(self._pending, op=torch.distributed.ReduceOp.MAX)
        return pending is not None and bool(pending.item())

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        reason = f"{signal.Signals(number).name} received"
        if reason == self.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = reason


def _deepspeed_command() -> int | None:
    """Process id of the ``deepspeed`` command, which starts a launcher, which starts the ranks; None without it."""
    if "LOCAL_SIZE" not in os.environ:  # set by that launcher alone
        return None
    import psutil

    try:
        return psutil.Process(os.getppid()).ppid()
    except psutil.Error:
        return 0  # the launcher has gone
