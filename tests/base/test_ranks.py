"""Ranks notice at once when one of them ends or is asked to stop, wherever they wait; without any launcher."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import helpers_run
import pytest
from wds_folder import write_folder

from focalclip.base import ranks
from focalclip.base.errors import SharedError, UserError
from focalclip.cli.command import guarded

pytestmark = pytest.mark.faults

_context = multiprocessing.get_context("forkserver")


def rank_main(work, number: int, size: int, port: int, folder: Path, timeout: float) -> None:
    """One rank as a command has it: the group, the work, and an exit status."""
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    ranks.TIMEOUT = timedelta(seconds=timeout)  # of collectives
    os.dup2(os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)

    def command() -> int:
        with ranks.joined():
            (folder / f"{number}.ready").touch()
            return work() or 0

    status = guarded(command)
    sys.stderr.flush()
    os._exit(status)


def start(work, size: int, folder: Path, timeout: float = 60, main=rank_main) -> list:
    helpers_run.preload()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_context.Process(target=main, args=(work, i, size, port, folder, timeout)) for i in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*.ready"))) < size:
        assert time.monotonic() < deadline, said(folder)
        time.sleep(0.05)
    return processes


def finish(processes: list, timeout: float = 10) -> list[int]:
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0, end - time.monotonic()))
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return statuses


def said(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("*.log")))


def at_a_meeting():
    """Rank 0 has long work; the others wait for it."""
    ranks.main_only(lambda: time.sleep(60))


def in_a_collective():
    import torch

    if ranks.rank() == 0:
        time.sleep(60)
    torch.distributed.all_reduce(torch.zeros(1))


@pytest.mark.parametrize(
    ("work", "killed"),
    [
        (at_a_meeting, 0),
        (in_a_collective, 1),
        *(pytest.param(work, n, marks=pytest.mark.long) for work in (at_a_meeting, in_a_collective) for n in (0, 1, 2)),
    ],
)
def test_the_others_end_when_one_is_killed(work, killed, tmp_path):
    processes = start(work, 3, tmp_path)
    time.sleep(0.3)
    processes[killed].kill()
    statuses = finish(processes)
    assert statuses.pop(killed) == -signal.SIGKILL
    assert statuses == [1, 1]
    assert (
        said(tmp_path).count(f"error: rank {killed} (process {processes[killed].pid} on {socket.gethostname()})") == 1
    )
    assert "Traceback" not in said(tmp_path)


def main_whose_last_rank_dies(work, number: int, size: int, port: int, folder: Path, timeout: float) -> None:
    """Between its place in torch's group and its connection to the main rank."""
    (folder / f"{number}.ready").touch()
    ranks._JOINING = 2
    if number == size - 1:
        ranks.Client = lambda *_, **__: os._exit(9)
    rank_main(work, number, size, port, folder, timeout)


def test_a_rank_that_never_connects_is_not_waited_for(tmp_path):
    processes = start(int, 3, tmp_path, main=main_whose_last_rank_dies)
    assert finish(processes, 30) == [1, 1, 9], said(tmp_path)
    assert said(tmp_path).count("error: rank 2 has not connected within 2 s") == 1
    assert "Traceback" not in said(tmp_path)


def fails_alone():
    if ranks.rank() == 1:
        raise UserError("data.train: no")
    ranks.barrier()


def fails_with_the_others():
    ranks.together(fails_alone_before_a_meeting)


def fails_alone_before_a_meeting():
    if ranks.rank() == 1:
        raise UserError("data.train: no")


@pytest.mark.parametrize(("work", "others"), [(fails_alone, 1), (fails_with_the_others, 2)])
def test_a_fault_of_one_rank_is_told_once_and_ends_all(work, others, tmp_path):
    processes = start(work, 2, tmp_path)
    assert finish(processes) == [others, 2]
    assert said(tmp_path).count("error: rank 1: data.train: no") == 1
    assert said(tmp_path).count("has ended") == (1 if others == 1 else 0)
    assert "Traceback" not in said(tmp_path)


def waits_for_long_work():
    assert ranks.gather_objects(ranks.main_only(lambda: time.sleep(6))) == [None, None]


def test_work_of_the_main_rank_may_take_longer_than_a_collective(tmp_path):
    processes = start(waits_for_long_work, 2, tmp_path, timeout=3)
    assert finish(processes, 20) == [0, 0], said(tmp_path)


def measures(folder):
    """Unequal work with an exchange in between, left where a signal arrives."""
    signal.signal(signal.SIGTERM, lambda *_: ranks.interrupt("SIGTERM"))
    signal.signal(signal.SIGUSR1, lambda *_: ranks.interrupt("told"))
    try:
        with ranks.interruptible():
            (folder / f"{ranks.rank()}.measures").touch()
            for i in range(10_000):
                if i % 40 == 20:
                    time.sleep(0.2 * ranks.rank())
                ranks.gather_objects(i)
    except ranks.Interrupted:
        assert ranks.gather_objects("left") == ["left"] * ranks.world_size()
        return 75
    return 0


@pytest.mark.parametrize("delay", [0.0, 0.031, 0.11])
def test_all_ranks_leave_what_can_be_left_when_one_is_signalled(delay, tmp_path):
    processes = start(partial(measures, tmp_path), 3, tmp_path)
    while len(list(tmp_path.glob("*.measures"))) < 3:
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(processes[round(delay * 1000) % 3].pid, signal.SIGTERM)
    assert finish(processes) == [75, 75, 75], said(tmp_path)
    assert said(tmp_path) == ""


def test_a_loader_process_does_not_hide_that_its_rank_was_killed(tmp_path):
    processes = start(with_a_child, 2, tmp_path)
    time.sleep(0.5)
    processes[1].kill()
    assert finish(processes, 3) == [1, -signal.SIGKILL]


def with_a_child():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(8,))
    child.start()
    ranks.main_only(lambda: time.sleep(60))


def test_turns(tmp_path):
    processes = start(partial(in_turns, tmp_path), 2, tmp_path)
    assert finish(processes) == [0, 0], said(tmp_path)
    with pytest.raises(SharedError, match="no"):
        ranks.in_turns(lambda: fails())


def fails():
    raise UserError("no")


def in_turns(folder):
    if ranks.rank() == 0:
        time.sleep(0.3)
    place = folder / "built"
    was_there = ranks.in_turns(lambda: (place.exists(), place.touch())[0])
    assert was_there is (ranks.rank() != 0)


def evaluates_after_training(folder):
    """Of rank 1 the folder of runs, which each looks for where it works, is another."""
    from focalclip.cli.pretrain import _evaluate
    from focalclip.config import load_config

    os.chdir(folder / str(ranks.rank()))
    base = load_config("focalclip_pico")
    return _evaluate(base.model_copy(update={"eval": base.eval.model_copy(update={"benchmark": str(folder / "t")})}))


def test_the_evaluation_after_training_ends_on_all_ranks(tmp_path):
    from focalclip.config import load_config
    from focalclip.interop import folder as store
    from focalclip.models.clip import FocalCLIP

    config = load_config("focalclip_pico")
    for place in "01":
        (tmp_path / place / "runs").mkdir(parents=True)
    store.save(FocalCLIP(config.model), tmp_path / "0" / config.run_dir / "model", {})
    write_folder(tmp_path / "t/one", [0, 1, 2])
    assert finish(start(partial(evaluates_after_training, tmp_path), 2, tmp_path), 30)[0] == 1, said(tmp_path)
    assert said(tmp_path).count("error: rank 1: ") == 1
    assert "Traceback" not in said(tmp_path)
