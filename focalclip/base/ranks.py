"""Ranks: how processes join one group, agree, and do work that succeeds on all of them or fails on all."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from focalclip.base.errors import SharedError, UserError, first_line

Group = dist.ProcessGroup | None

# Ranks wait for the one that downloads, builds the corpus or indexes shards; where one dies, the launcher ends all.
TIMEOUT = timedelta(days=1)

T = TypeVar("T")


def world_size(group: Group = None) -> int:
    """Processes in ``group``; 1 where torch.distributed is not running."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """Index of this process in ``group``; 0 where torch.distributed is not running."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def join(alone: bool = False) -> bool:
    """Make the processes that ``torchrun`` or ``deepspeed`` started ranks of one group, each with its device or cores.

    Args:
        alone: form a group of one as well where plain ``python`` started this process, as DeepSpeed needs.

    Returns:
        Whether a group was formed: false where there is one process and ``alone`` is not set, or a group already.
    """
    if dist.is_initialized() or (int(os.environ.get("WORLD_SIZE", "1")) == 1 and not alone):
        return False
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in one.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif "OMP_NUM_THREADS" not in os.environ:  # ranks that each take every core slow each other down tenfold
        torch.set_num_threads(max(1, _usable_cores() // ranks_on_this_machine()))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    return True


@contextmanager
def joined() -> Iterator[None]:
    """Within this context the processes of a launcher are ranks of one group, see :func:`join`."""
    has_joined = join()
    try:
        yield
    finally:
        if has_joined:
            dist.destroy_process_group()


def leave() -> None:
    """Wait for the other ranks, then leave the group; for work that ended well on all of them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def ranks_on_this_machine() -> int:
    """As torchrun's or DeepSpeed's launcher sets it; 1 where neither started this process."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))


def cache_turn() -> int:
    """When this process may fill a cache that it may share: 0 the main rank, 1 each other machine's first, 2 the rest.

    Machines may have one cache together (a home directory on the network) or one each; either way no two processes
    fill one at once, and in the last turn everything is there.
    """
    if is_main():
        return 0
    return 1 if int(os.environ.get("LOCAL_RANK", rank())) == 0 else 2


def own_share(count: int) -> range:
    """This rank's contiguous part of ``range(count)``; the sizes of any two ranks differ by one at most."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(value: T) -> list[T]:
    """The picklable ``value`` of every rank, on every rank."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> T:
    """Do ``work``, which must not wait for other ranks, on all ranks; all succeed or all raise.

    Raises:
        SharedError: on every rank, with the first message, if ``work`` failed for the user or the disk on any.
    """
    result, fault = None, None
    try:
        result = work()
    except UserError as error:
        fault = str(error)
    except OSError as error:
        fault = f"{first_line(error)}; check that this path can be read and written and that the disk has room"
    for number, message in enumerate(gather_objects(fault)):
        if message:
            raise SharedError(message if number == 0 else f"rank {number}: {message}")
    return result  # pyrefly: ignore[bad-return]


def main_only(work: Callable[[], object]) -> None:
    """Do ``work`` on the main rank while the others wait; raises as :func:`together` does."""
    together(lambda: work() if is_main() else None)


def main_first(work: Callable[[], T]) -> T:
    """Do ``work`` on the main rank, then on all others, which find its files; raises as :func:`together` does."""
    first = together(lambda: work() if is_main() else None)
    return together(lambda: first if is_main() else work())  # pyrefly: ignore[bad-return]


def _usable_cores() -> int:
    """Cores that this process may use (macOS does not say; there it is all of them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
