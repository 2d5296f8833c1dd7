"""Matrix products in the precision that was asked for."""

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


def machine() -> dict[str, Any]:
    """What it ran on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"processor": models[0] if models else platform.processor(), "cores": cores, "system": platform.system()}


def processor() -> str:
    """The processor's model where the system tells it, else its kind, such as ``x86_64``."""
    facts = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(\S.*)$", facts.read_text() if facts.is_file() else "", re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes that this process has held so far: in main memory, and on its GPU."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes, on macOS bytes
    peak = {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["peak_gpu_memory"] = torch.cuda.max_memory_allocated(device)
    return peak


def versions() -> dict[str, str]:
    """Of what computes the numbers."""
    return {
        "focalclip": __version__,
        "torch": torch.__version__,
        "open_clip": version("open_clip_torch"),
        "python": platform.python_version(),
    }


@contextmanager
def whole_float32(device: torch.device | None = None) -> Iterator[None]:
    """Products in true float32: neither autocast nor TF32 or bfloat16 behind float32's back; None: on the CPU.

    The settings are per backend because torch's older getter raises once they have been touched.
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
