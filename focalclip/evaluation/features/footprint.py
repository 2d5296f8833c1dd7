"""What a model costs, and what a measurement took: parameters, multiply-adds, memory, versions."""

import platform
import re
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import focalclip
from focalclip.distributed import world_size
from focalclip.evaluation.features.model import device_and_dtype, evaluating
from focalclip.models.cost import count_multiply_adds


def describe(model: Any) -> dict[str, Any]:
    """Facts about a model and the machine, JSON-ready; what cannot be counted is None.

    Returns:
        ``parameters`` and ``image_parameters`` (of ``model.visual``, or open_clip's and transformers' image tower),
        ``image_multiply_adds`` and ``text_multiply_adds`` of one picture and one short prompt, ``precision``,
        ``device``, ``threads``, ``ranks``.
    """
    device, dtype = device_and_dtype(model)
    is_module = isinstance(model, nn.Module)
    images = torch.empty(1, *model.preprocess(Image.new("RGB", (32, 32))).shape, dtype=dtype, device="meta")
    with evaluating(model):
        image_multiply_adds = _multiply_adds(model, "encode_image", images)
        text_multiply_adds = _multiply_adds(model, "encode_text", model.tokenizer(["a photo"]).to("meta"))
    return {
        "parameters": _num_parameters(model) if is_module else None,
        "image_parameters": _num_parameters(tower) if is_module and (tower := _image_tower(model)) else None,
        "image_multiply_adds": image_multiply_adds,
        "text_multiply_adds": text_multiply_adds,
        "precision": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "ranks": world_size(),
    }


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
        "focalclip": focalclip.__version__,
        "torch": torch.__version__,
        "open_clip": version("open_clip_torch"),
        "python": platform.python_version(),
    }


class _Encoder(nn.Module):
    """One encoder of a model as a module, as the counter wants it."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model, self.name)(x)


def _multiply_adds(model: Any, name: str, x: Tensor) -> int | None:
    if not isinstance(model, nn.Module):
        return None
    try:
        return count_multiply_adds(_Encoder(model, name), x)
    except Exception:  # noqa: BLE001 - anyone's code, which need not run on tensors without values
        return None


def _image_tower(model: Any) -> nn.Module | None:
    inner = getattr(model, "model", model)
    return next(
        (tower for name in ("visual", "vision_model") if (tower := getattr(inner, name, None)) is not None), None
    )


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
