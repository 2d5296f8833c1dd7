"""The interface that evaluation requires of a model, and what is recorded about one: weights hash, size, precision.

Any object with these four attributes can be evaluated:

    class MyModel:
        preprocess = staticmethod(...)             # PIL picture -> (3, S, S) tensor
        tokenizer = staticmethod(...)              # list of strings -> int64 (B, L)
        def encode_image(self, images): ...        # (B, 3, S, S) -> (B, D)
        def encode_text(self, tokens): ...         # (B, L) -> (B, D)

It need not be an ``nn.Module``. An object that is not one may also have a ``device`` (else the CPU), a ``dtype`` (else
float32) and a ``weights_sha256``, without which nothing of it can be cached: neither features nor finished tasks.
A function that returns such an object is named on the command line as ``--model package.module:function``.

Optional: ``text_lengths(tokens) -> (B,)``, how many tokens of each row decide its embedding. A model that has it takes
rows that are cut behind them, and its prompts are then encoded in short batches (see ``features.texts``).
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from focalclip.base.errors import UserError, unforeseen
from focalclip.base.machine import processor
from focalclip.base.ranks import world_size
from focalclip.models.cost import count_multiply_adds

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DualEncoder(Protocol):
    """Two encoders and what feeds them."""

    @property
    def preprocess(self) -> Callable[[Image.Image], Tensor]:
        """RGB picture to a (3, S, S) tensor."""

    @property
    def tokenizer(self) -> Callable[[list[str]], Tensor]:
        """Strings to int64 tokens (B, L)."""

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, D)."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) to (B, D)."""


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients.

    Afterwards the mode of every submodule and the state of torch's generators are restored, so that training continues
    unchanged.
    """
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def device_and_dtype(model: Any) -> tuple[torch.device, torch.dtype]:
    """Where the model computes, and in what precision: of its first parameter, else the object's attributes."""
    parameter = next(iter(model.parameters()), None) if hasattr(model, "parameters") else None
    if parameter is not None:
        return parameter.device, parameter.dtype
    return torch.device(getattr(model, "device", "cpu")), getattr(model, "dtype", torch.float32)


def check_model(model: Any) -> None:
    """Check once, before any task, that preprocessing and tokenizer give what the encoders take.

    Whether features are finite is left to the tasks: those of a model that has diverged are not.

    Args:
        model: any :class:`DualEncoder`.

    Raises:
        UserError: naming what is wrong: of another type, of a shape that differs between pictures or that the encoder
            does not take, or not finite.
    """
    name, device, dtype = type(model).__name__, *device_and_dtype(model)
    images = check_preprocess(model)
    with evaluating(model):
        width = _embedded(model, "encode_image", images.to(device, dtype))
        if not hasattr(model, "encode_text"):
            return
        tokens = model.tokenizer(["a photo of a cat.", "two dogs"])
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or len(tokens) != 2 or tokens.is_floating_point():
            raise UserError(f"{name}.tokenizer gives {_described(tokens)} of 2 texts, not int64 tokens (2, L); wrap it")
        if (text_width := _embedded(model, "encode_text", tokens.to(device))) != width:
            raise UserError(
                f"{name}: encode_image gives {width} numbers, encode_text {text_width}; they must be as many"
            )


def check_preprocess(model: Any) -> Tensor:
    """Check that pictures of any proportions become finite tensors of one shape.

    Args:
        model: anything with a ``preprocess``.

    Returns:
        (2, C, H, W): of a tall picture and of a wide one.

    Raises:
        UserError: naming what they become instead.
    """
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    images = [_preprocessed(model, Image.fromarray(pixels)) for pixels in (noise, noise.transpose(1, 0, 2).copy())]
    if images[0].shape != images[1].shape:
        shapes = " and ".join(str(tuple(image.shape)) for image in images)
        raise UserError(
            f"{type(model).__name__}.preprocess gives pictures of different proportions different shapes, {shapes}; it"
            " has to resize or crop all to one (in transformers: do_center_crop)"
        )
    return torch.stack(images)


def _preprocessed(model: Any, picture: Image.Image) -> Tensor:
    name = f"{type(model).__name__}.preprocess"
    try:
        image = model.preprocess(picture)
    except Exception as error:
        raise UserError(
            f"{name} fails on an RGB picture of {picture.width} x {picture.height}: {unforeseen(error)}"
        ) from error
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
        raise UserError(f"{name} gives {_described(image)}, not one float tensor (channels, H, W); wrap it")
    if not bool(torch.isfinite(image).all()):
        raise UserError(f"{name} gives values that are not finite; is its std 0?")
    return image


def _embedded(model: Any, encode: str, inputs: Tensor) -> int:
    """Width of the embeddings of two inputs."""
    name, shape = f"{type(model).__name__}.{encode}", tuple(inputs.shape)
    try:
        embeds = getattr(model, encode)(inputs)
    except Exception as error:
        raise UserError(f"{name} does not take what comes before it, of shape {shape}: {unforeseen(error)}") from error
    if not isinstance(embeds, Tensor) or embeds.ndim != 2 or len(embeds) != 2:
        raise UserError(
            f"{name} gives {_described(embeds)} for inputs of shape {shape}, not embeddings (2, D); wrap it"
        )
    return embeds.shape[1]


def _described(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"a {type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def to_precision(model: Any, name: str) -> Any:
    """The model with its towers in ``fp32``, ``bf16`` or ``fp16``; unit vectors and similarities stay float32.

    Raises:
        UserError: if the model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"--precision {name}: {type(model).__name__} is not a torch module")
    return model.to(PRECISIONS[name])


def weights_sha256(model: Any) -> str:
    """SHA-256 over names, shapes, types and values of the state dict, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def known_weights(model: Any) -> str | None:
    """:func:`weights_sha256` of a module, else the ``weights_sha256`` of the object, else None."""
    if isinstance(model, nn.Module):
        return weights_sha256(model)
    return getattr(model, "weights_sha256", None)


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


class _EncoderModule(nn.Module):
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
        return count_multiply_adds(_EncoderModule(model, name), x)
    except Exception:  # noqa: BLE001 - a user's code may not support meta tensors
        return None


def _image_tower(model: Any) -> nn.Module | None:
    inner = getattr(model, "model", model)
    return next(
        (tower for name in ("visual", "vision_model") if (tower := getattr(inner, name, None)) is not None), None
    )


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
