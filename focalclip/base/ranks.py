"""Ranks: how processes join one group, agree, and do work that succeeds on all of them or fails on all.

Ranks wait in two ways. A collective on tensors (gradients, features) ends with an error after :data:`TIMEOUT`, since
all ranks are at the same place of the program and none can be that late. Before they exchange objects
(:func:`gather_objects` and all that uses it, :func:`barrier`) they meet: one may have indexed shards or built a corpus
meanwhile, so that wait has no limit. In both, the end of any rank's process ends the others at once.
"""

import json
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from focalclip.base.errors import MachineError, SharedError, UserError, memory_error, system_error

Group = dist.ProcessGroup | None

TIMEOUT = timedelta(minutes=30)
_JOINING = 120.0  # seconds for all ranks to connect to the main one: they have just met in init_process_group
_POLL = timedelta(seconds=1)  # how often a rank that waits looks whether it was signalled

T = TypeVar("T")


class Interrupted(BaseException):
    """A rank was asked to stop: all ranks leave :func:`interruptible` with it. No error, so no ``except`` stops it."""


def world_size(group: Group = None) -> int:
    """Processes in ``group``; 1 where torch.distributed is not running."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """Index of this process in ``group``; 0 where torch.distributed is not running."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


@contextmanager
def joined(alone: bool = False) -> Iterator[None]:
    """Within this context the processes that ``torchrun`` or ``deepspeed`` started are ranks of one group.

    Each has its device or its share of the cores. Where one ends before the others, these end within seconds, with
    status 1 and a sentence.

    Args:
        alone: form a group of one as well where plain ``python`` started this process, as DeepSpeed needs.
    """
    global _group
    if dist.is_initialized() or (int(os.environ.get("WORLD_SIZE", "1")) == 1 and not alone):
        yield
        return
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in one.items():
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif "OMP_NUM_THREADS" not in os.environ:  # ranks that each take every core slow each other down tenfold
        torch.set_num_threads(max(1, _usable_cores() // ranks_on_this_machine()))
    store, number, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=number, world_size=size)
    _group, together_left = _Group(dist.PrefixStore("focalclip", store)), False
    try:
        yield
        barrier()
        together_left = True
    except (SharedError, Interrupted):
        together_left = True
        raise
    except Exception as error:
        _group.wait_for_a_loss()  # which this error may only follow from
        if isinstance(error, UserError) and world_size() > 1:
            error.rank = rank()
        raise
    finally:
        _group.leave("bye" if together_left else "lost")
        _group = None
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
    """Wait for all ranks, however long."""
    if world_size() > 1:
        with _meeting():
            dist.barrier()


def gather_objects(value: T) -> list[T]:
    """The picklable ``value`` of every rank, on every rank, which waits for the others however long."""
    values = [value] * world_size()
    if len(values) > 1:
        with _meeting():
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
        fault = str(error), error.status
    except OSError as error:
        fault = str(known := system_error(error)), known.status
    except (MemoryError, RuntimeError) as error:
        if (lack := memory_error(error)) is None:
            raise
        fault = str(lack), lack.status
    for number, other in enumerate(gather_objects(fault)):
        if other:
            message, status = other
            raise SharedError(message if number == 0 else f"rank {number}: {message}", status)
    return result  # pyrefly: ignore[bad-return]


def main_only(work: Callable[[], object]) -> None:
    """Do ``work`` on the main rank while the others wait; raises as :func:`together` does."""
    together(lambda: work() if is_main() else None)


def in_turns(work: Callable[[], T]) -> T:
    """Do ``work`` on all ranks, in the order of :func:`cache_turn`: what the first write to a cache, the others find.

    Raises as :func:`together` does.
    """
    result: Any = None
    for turn in range(3):
        result = together(lambda before=result, turn=turn: work() if turn == cache_turn() else before)
    return result


@contextmanager
def interruptible() -> Iterator[None]:
    """Within this context :func:`interrupt` takes effect: at once on the rank that calls it, and soon on the others.

    For work that may be left at any point. All ranks enter and leave it together.

    Raises:
        Interrupted: on all ranks or on none.
    """
    if _group is None:
        yield
        return
    barrier()
    _group.is_interruptible = True
    try:
        yield
        with _meeting():  # from here on no rank can leave without the others
            _group.is_interruptible = False
    except Interrupted:
        barrier()
        raise
    finally:
        _group.is_interruptible = _group.is_asked = False


def interrupt(reason: str) -> None:
    """Leave :func:`interruptible` on all ranks; for handlers of signals. Nothing happens outside of it.

    Raises:
        Interrupted: at once, unless ranks are just exchanging something; then after it.
    """
    if _group is not None and _group.is_interruptible:
        _group.is_asked = True
        _group.ask_others(reason)
        if not _group.is_exchanging:
            _group.check()


def asked_by_another() -> str | None:
    """The reason of the rank that called :func:`interrupt` first, where this rank has heard of it."""
    return _group.reason if _group is not None else None


_group: "_Group | None" = None


class _Group:
    """What joined ranks know of each other beside torch's collectives.

    Those do not notice that a rank has ended: NCCL waits until the timeout, and who waits at a meeting is in none. So
    each rank holds a connection to the main one, which the system closes when a process ends, however it ends.
    """

    def __init__(self, store: Any) -> None:
        self.store = store
        self.meetings = 0
        self.is_interruptible = self.is_exchanging = self.is_asked = False
        self.reason: str | None = None
        self._has_left = self._told = False
        self._lock = threading.RLock()  # a handler may send while the main thread does
        me = {"rank": rank(), "local_rank": os.environ["LOCAL_RANK"], "host": socket.gethostname(), "pid": os.getpid()}
        self._me, self._connections = me, dict[Connection, dict[str, Any]]()
        if world_size() == 1:
            return
        if is_main():
            key = secrets.token_bytes(16)
            listener = Listener(("", 0), backlog=world_size(), authkey=key)
            store.set("main", json.dumps([listener.address[1], key.hex(), me]))
            end = time.monotonic() + _JOINING
            while len(self._connections) < world_size() - 1:
                # accept() takes no time limit
                if not wait([listener._listener._socket], end - time.monotonic()):  # pyrefly: ignore[missing-attribute]
                    raise self._not_all_connected()
                with suppress(multiprocessing.AuthenticationError, EOFError, ConnectionError):  # not one of us
                    connection = listener.accept()
                    self._connections[connection] = connection.recv()
            listener.close()
        else:
            port, key, main = json.loads(store.get("main"))
            try:
                connection = Client((os.environ["MASTER_ADDR"], port), authkey=bytes.fromhex(key))
            except OSError as error:
                raise MachineError(
                    f"rank {rank()} cannot reach {os.environ['MASTER_ADDR']}, port {port} ({error.strerror}); let the "
                    "machines connect to each other on all ports"
                ) from None
            connection.send(me)
            self._connections[connection] = main
        for connection in self._connections:
            os.register_at_fork(after_in_child=connection.close)  # loader processes outlive a killed rank for a while
        threading.Thread(target=self._listen, daemon=True).start()

    def _not_all_connected(self) -> MachineError:
        missing = set(range(1, world_size())) - {other["rank"] for other in self._connections.values()}
        return MachineError(
            f"rank {', '.join(map(str, sorted(missing)))} has not connected within {_JOINING:.0f} s; its message is "
            "above, or the system has killed it; start the same command again"
        )

    def check(self) -> None:
        """Raise Interrupted if this rank was asked to stop, after it has seen to it that the next meeting fails."""
        if self.is_interruptible and self.is_asked:
            self.is_interruptible = False
            self.meetings += 1
            if world_size() > 1:
                self.store.compare_set(f"meeting {self.meetings}", "", "off")
            raise Interrupted

    def meet(self) -> None:
        """Wait until all ranks are here.

        Raises:
            Interrupted: if one was asked to stop before; then all raise.
        """
        self.check()
        self.meetings += 1
        name = f"meeting {self.meetings}"
        if self.store.add(f"{name} count", 1) == world_size():
            self.store.compare_set(name, "", "on")
        while not self._is_decided(name):
            if self.is_interruptible and self.is_asked:
                self.store.compare_set(name, "", "off")
        if self.store.get(name) == b"off":
            self.is_interruptible = False
            raise Interrupted

    def _is_decided(self, name: str) -> bool:
        try:
            self.store.wait([name], _POLL)
        except dist.DistStoreError:
            return False
        return True

    def ask_others(self, reason: str) -> None:
        """Tell the other ranks that this one was asked to stop."""
        if not self._told:
            self._told = True
            self._send(("stop", reason))

    def leave(self, how: str) -> None:
        """Say goodbye: ``bye`` where all ranks leave, ``lost`` where this one fails alone, so that the others end."""
        self._has_left = True
        self._send((how, self._me))

    def wait_for_a_loss(self) -> None:
        """Give the listener the time to hear that a rank has ended, and to end this one."""
        if world_size() > 1:
            time.sleep(2)

    def _send(self, message: tuple[str, Any], but: Connection | None = None) -> None:
        with self._lock:
            for connection in self._connections:
                if connection is not but:
                    with suppress(OSError):
                        connection.send(message)

    def _listen(self) -> None:
        """The thread that hears from the others."""
        open_ones = dict(self._connections)
        while open_ones:
            for connection in wait(list(open_ones)):
                assert isinstance(connection, Connection)
                try:
                    message: tuple[str, Any] = connection.recv()
                except (EOFError, OSError):
                    message = "lost", open_ones[connection]
                kind, content = message
                if kind in ("bye", "lost"):
                    del open_ones[connection]
                if kind == "lost":
                    self._send(message, but=connection)
                    self._end(content)
                if kind == "stop" and not self._told:
                    self._told = True
                    self._send(message, but=connection)
                    self.reason = str(content)
                    os.kill(os.getpid(), signal.SIGUSR1)  # its handler runs in the main thread

    def _end(self, lost: dict[str, Any]) -> None:
        """End this process now: its main thread may wait for the lost rank inside a library, which nothing ends."""
        if self._has_left:
            return
        is_first = lost["local_rank"] == "0" and lost["host"] == self._me["host"]
        if self._me["local_rank"] == ("1" if is_first else "0"):  # once on each machine
            who = f"rank {lost['rank']} (process {lost['pid']} on {lost['host']})"
            print(
                f"error: {who} has ended, so all do; its message is above, or the system has killed it, most often for "
                "lack of memory; continue with the same command and --resume",
                file=sys.stderr,
                flush=True,
            )
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(MachineError.status)


@contextmanager
def _meeting() -> Iterator[None]:
    """All ranks are here, and an exchange among them follows, which no signal may end on one rank alone."""
    if world_size() == 1 or _group is None:
        yield
        return
    _group.is_exchanging = True
    try:
        _group.meet()
        yield
    finally:
        _group.is_exchanging = False
    _group.check()


def _usable_cores() -> int:
    """Cores that this process may use (macOS does not say; there it is all of them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
