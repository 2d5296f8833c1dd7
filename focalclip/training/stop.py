"""Ctrl-C and SIGTERM: noted when they come, agreed among ranks, obeyed between two steps."""

import signal
from types import FrameType
from typing import Any, Self

import torch

from focalclip.distributed import world_size


class StopRequest:
    """Within this context the first SIGINT or SIGTERM becomes a flag; a second SIGINT interrupts at once, as usual.

    The launcher signals ranks one after another, so a rank must not save when *it* is signalled: the others would wait
    for it inside a collective. All ranks therefore exchange the flag at every step and stop at the same one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.received: str | None = None
        self._pending: torch.Tensor | None = None
        self._usual: dict[int, Any] = {}

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
        if world_size() == 1:
            return self.received is not None
        pending, self._pending = self._pending, torch.tensor([float(self.received is not None)], device=self.device)
        torch.distributed.all_reduce(self._pending, op=torch.distributed.ReduceOp.MAX)
        return pending is not None and bool(pending.item())

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.received == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
