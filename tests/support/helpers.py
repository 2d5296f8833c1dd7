"""Real processes for tests: gloo ranks that meet through a file, so no port can clash."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers_run
import torch

_context = multiprocessing.get_context("forkserver")


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Run ``function(*args)`` on ``world_size`` gloo ranks and return what each returned, rank by rank."""
    helpers_run.preload()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(target=_rank_main, args=(function, rank, world_size, folder, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
        assert not errors, "\n".join(errors)
        assert not hung, f"ranks {hung} did not finish within {timeout} s"
        return [torch.load(Path(folder) / f"{rank}.result", weights_only=True) for rank in range(world_size)]


def _rank_main(function: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        torch.save(function(*args), Path(folder) / f"{rank}.result")
        torch.distributed.destroy_process_group()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
