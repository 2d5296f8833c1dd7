"""The small pieces of a FocalNet: patch embedding, MLP, layer scale and stochastic depth."""

import torch
from torch import Tensor, nn

from focalclip.models.focalnet.config import OVERLAP


class PatchEmbed(nn.Module):
    """Strided convolution and LayerNorm: the stem (stride ``patch_size``) and the downsampling between stages (2).

    Args:
        in_dim: channels before.
        dim: channels after.
        stride: pixels or positions per position of the result.
        use_overlap: kernels wider than the stride, as :data:`~focalclip.models.focalnet.config.OVERLAP` has them.
        padding: other than that of ``use_overlap``.
    """

    def __init__(self, in_dim: int, dim: int, *, stride: int, use_overlap: bool, padding: int | None = None) -> None:
        super().__init__()
        kernel_size, usual_padding = OVERLAP[stride] if use_overlap else (stride, 0)
        padding = usual_padding if padding is None else padding
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', C'); rows and columns that fill no window are dropped."""
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Mlp(nn.Module):
    """Linear, GELU, Linear on every position."""

    def __init__(self, dim: int, hidden_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Any leading dimensions; the last one is ``dim``."""
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class LayerScale(nn.Module):
    """Learned per-channel scale of a residual branch (https://arxiv.org/abs/2103.17239, section 2)."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.full((dim,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Scale the last dimension of ``x``."""
        return x * self.gamma


def layer_scale(dim: int, start: float | None) -> nn.Module:
    """:class:`LayerScale`, or nothing where ``start`` is None."""
    return nn.Identity() if start is None else LayerScale(dim, start)


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for whole samples (https://arxiv.org/abs/1603.09382, section 3)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """While training, zero each sample with probability ``rate`` and scale the others by 1 / (1 - rate)."""
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (keep / (1 - self.rate))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"rate={self.rate:g}"
