"""The machine and the libraries that a result was computed with, and the precision of its matrix products."""

import os
import platform
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from focalclip.base import __version__


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """Processor, cores available to this process, and operating system; JSON-ready."""
    return {"processor": processor(), "cores": num_cores(), "system": platform.system()}


def processor() -> str:
    """The processor's model where the system reports it, else its architecture, such as ``x86_64``."""
    facts = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(\S.*)$", facts.read_text() if facts.is_file() else "", re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak memory of this process so far in bytes: resident main memory, and what torch allocated on ``device``."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes, on macOS bytes
    peak = {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["peak_gpu_memory"] = torch.cuda.max_memory_allocated(device)
    return peak


def versions() -> dict[str, str]:
    """Versions of the libraries that compute the numbers."""
    return {
        "focalclip": __version__,
        "torch": torch.__version__,
        "open_clip": version("open_clip_torch"),
        "python": platform.python_version(),
    }


@contextmanager
def full_float32_matmul(device: torch.device | None = None) -> Iterator[None]:
    """Context, or decorator, in which float32 matrix products are IEEE float32: no autocast, no TF32 or bf16 products.

    The settings are per backend because torch's older getter raises once they have been touched.

    Args:
        device: where autocast is turned off; None: on the CPU.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyrefly: ignore[missing-attribute]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast("cpu" if device is None else device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
