"""Matrix products in the precision that was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
