"""What the harness asks of a model, and nothing more: any model with these four attributes can be measured."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn


class DualEncoder(Protocol):
    """An ``nn.Module`` with two encoders and what feeds them."""

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
    """Evaluation mode without gradients; every submodule gets its own mode back, so that training can go on."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def device_and_dtype(model: Any) -> tuple[torch.device, torch.dtype]:
    """Where the model's parameters are, and in what precision."""
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


def weights_sha256(model: Any) -> str:
    """SHA-256 over names, shapes, types and values of the state dict, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
