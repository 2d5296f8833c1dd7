"""The blocks of a FocalNet and what they are made of: patch embedding, MLP and layer scale.

:class:`Block` is the paper's; :class:`UniCLBlock` is that of K-LITE's UniCL FocalNet-B (microsoft/klite,
``image_encoder/focal.py``), whose stem is padded by :data:`WIDE_STEM_PADDING`; so is
that of the authors' detectors.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from focalclip.models.draws import Dropout, DropPath
from focalclip.models.focalnet.config import OVERLAP, FocalNetConfig
from focalclip.models.focalnet.depthwise import DepthwiseConv
from focalclip.models.focalnet.mixers import build_mixer

WIDE_STEM_PADDING = 3


class PatchEmbed(nn.Module):
    """Strided convolution and LayerNorm: the stem (stride ``patch_size``) and the downsampling between stages (2).

    Args:
        in_dim: channels before.
        dim: channels after.
        stride: pixels or positions per position of the result.
        use_overlap: kernels wider than the stride, as :data:`~focalclip.models.focalnet.config.OVERLAP` has them.
        padding: other than that of ``use_overlap``.
        fill: pad with zeros, at the right and the bottom, to whole patches.
    """

    def __init__(
        self, in_dim: int, dim: int, *, stride: int, use_overlap: bool, padding: int | None = None, fill: bool = False
    ) -> None:
        super().__init__()
        kernel_size, usual_padding = OVERLAP[stride] if use_overlap else (stride, 0)
        padding = usual_padding if padding is None else padding
        self.proj = nn.Conv2d(in_dim, dim, kernel_size, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(dim)
        self.stride, self.fill = stride, fill

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H', W', C'); rows and columns that fill no window are dropped, unless ``fill``."""
        x = x.permute(0, 3, 1, 2)
        if self.fill:
            x = F.pad(x, (0, -x.shape[3] % self.stride, 0, -x.shape[2] % self.stride))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Mlp(nn.Module):
    """Linear, GELU, Linear on every position."""

    def __init__(self, dim: int, hidden_dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Any leading dimensions; the last one is ``dim``."""
        return self.dropout2(self.fc2(self.dropout1(self.act(self.fc1(x)))))


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


class Block(nn.Module):
    """Focal modulation (or another mixer of positions) and MLP, each in a residual branch.

    Pre-norm (default)::

        x = x + drop_path1(ls1(modulation(norm1(x))))
        x = x + drop_path2(ls2(mlp(norm2(x))))

    With ``use_post_norm`` the norm comes after the modulation or MLP, still inside the branch (the residual stream
    itself is never normalised), and is named ``norm1_post`` and ``norm2_post``.
    """

    def __init__(self, config: FocalNetConfig, *, stage: int, index: int, drop_path: float) -> None:
        super().__init__()
        dim = config.dims[stage]

        def norm(present: bool) -> nn.Module:
            return nn.LayerNorm(dim) if present else nn.Identity()

        self.norm1 = norm(not config.use_post_norm)
        self.modulation = build_mixer(config.mixer, config.mixer_spec(stage, index))
        self.norm1_post = norm(config.use_post_norm)
        self.ls1 = layer_scale(dim, config.layer_scale)
        self.norm2 = norm(not config.use_post_norm)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dropout=config.dropout)
        self.norm2_post = norm(config.use_post_norm)
        self.ls2 = layer_scale(dim, config.layer_scale)
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.drop_path1(self.ls1(self.norm1_post(self.modulation(self.norm1(x)))))
        return x + self.drop_path2(self.ls2(self.norm2_post(self.mlp(self.norm2(x)))))


class UniCLBlock(nn.Module):
    """Depthwise convolution, focal modulation, depthwise convolution and MLP, each with a residual connection.

    In the order of the authors' code::

        x = x + dw1(x)
        x = norm1(x + drop_path1(ls1(modulation(x))))
        x = x + dw2(x)
        x = norm2(x + drop_path2(ls2(mlp(x))))
    """

    def __init__(self, config: FocalNetConfig, *, stage: int, index: int, drop_path: float) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.dw1 = DepthwiseConv(dim, 3)
        self.modulation = build_mixer(config.mixer, config.mixer_spec(stage, index))
        self.ls1 = layer_scale(dim, config.layer_scale)
        self.norm1 = nn.LayerNorm(dim)
        self.dw2 = DepthwiseConv(dim, 3)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dropout=config.dropout)
        self.ls2 = layer_scale(dim, config.layer_scale)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.dw1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.norm1(x + self.drop_path1(self.ls1(self.modulation(x))))
        x = x + self.dw2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))
