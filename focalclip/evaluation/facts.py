"""What a result says of the model and of the machine that it was measured on."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from focalclip.evaluation.calibration import learned_scale
from focalclip.evaluation.model import device_and_dtype, evaluating, weights_sha256
from focalclip.models.cost import count_multiply_adds


class _Encoder(nn.Module):
    """One of a model's two encoders as a module, for the counter."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self.model, self.method)(x)


def model_facts(model: Any) -> dict[str, Any]:
    """Weights hash, precision, device, size and cost of a model.

    Returns:
        ``sha256``, ``precision``, ``device``, ``parameters``, ``image_parameters``, ``text_parameters`` (their rest),
        ``image_multiply_adds`` and ``text_multiply_adds`` of one picture and one prompt, ``image_size``,
        ``embed_dim``, ``logit_scale``. What a model does not let itself be asked is left out.
    """
    device, dtype = device_and_dtype(model)
    facts: dict[str, Any] = {
        "sha256": weights_sha256(model), "precision": _name(dtype), "device": _name(device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }  # fmt: skip
    picture = model.preprocess(Image.new("RGB", (32, 32)))[None]
    facts["image_size"] = int(picture.shape[-1])
    image = _image_parameters(model)
    if image:
        facts |= {"image_parameters": image, "text_parameters": facts["parameters"] - image}
    with evaluating(model):  # which gives every submodule its own mode back
        sides = {"image": picture.to(dtype), "text": model.tokenizer(["a photo"])}  # pyrefly: ignore[not-callable]
        for side, x in sides.items():
            count = _multiply_adds(model, f"encode_{side}", x)
            facts |= {} if count is None else {f"{side}_multiply_adds": count}
    scale = learned_scale(model)
    return facts | ({} if scale is None else {"logit_scale": round(scale, 4)})


def _image_parameters(model: Any) -> int:
    """Parameters below the first submodule that is called visual (open_clip, ours) or vision (transformers)."""
    if not isinstance(model, nn.Module):
        return 0
    owners: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        if any(part.startswith(("visual", "vision")) for part in name.split(".")):
            owners[id(parameter)] = parameter.numel()
    return sum(owners.values())


def _multiply_adds(model: nn.Module, method: str, x: Tensor) -> int | None:
    """Of one input; None where the encoder looks at values, which the meta device does not have."""
    try:
        return count_multiply_adds(_Encoder(model, method), x.to("meta"))
    except (RuntimeError, NotImplementedError, TypeError):
        return None


def hardware_facts(device: torch.device) -> dict[str, Any]:
    """``processor``, ``cores``, ``threads``, ``gpu`` where one is used, and ``peak_memory_bytes`` so far.

    The peak is the GPU allocator's where a GPU is used, else the process's resident memory, so it holds Python and the
    libraries too.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts: dict[str, Any] = {"processor": _processor(), "cores": cores, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    elif sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        facts["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return facts


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _name(value: Any) -> str:
    return str(value).removeprefix("torch.")
