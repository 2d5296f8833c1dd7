"""The one published definition of a UniCL FocalNet, which is not the paper's: the block and the names of its weights.

K-LITE's repository (microsoft/klite, ``image_encoder/focal.py`` and ``unicl_focal_base.yaml``) defines the FocalNet-B
of UniCL. It differs from the paper's FocalNet in four ways:

- two residual 3x3 depthwise convolutions (with bias) per block, before the modulation and before the MLP;
- post-norm normalises the residual stream after the sum, LN(x + branch), not the branch;
- the gated sum of contexts is always divided by L + 1 (``normalize_modulator``);
- the overlapping stem is padded by 3 pixels, not 2.

No weights of it were ever released.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from focalclip.models.focalnet.depthwise import DepthwiseConv
from focalclip.models.focalnet.layers import DropPath, Mlp, layer_scale
from focalclip.models.focalnet.mixers import build_mixer

if TYPE_CHECKING:
    from focalclip.models.focalnet.config import FocalNetConfig

UNICL_STEM_PADDING = 3


class UniCLBlock(nn.Module):
    """Depthwise convolution, focal modulation, depthwise convolution and MLP, each with a residual connection.

    In the order of the authors' code::

    x = x + dw1(x)
    x = norm1(x + drop_path(ls1(modulation(x))))
    x = x + dw2(x)
    x = norm2(x + drop_path(ls2(mlp(x))))
    """

    def __init__(self, config: "FocalNetConfig", *, stage: int, index: int, drop_path: float) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.dw1 = DepthwiseConv(dim, 3)
        self.modulation = build_mixer(config.mixer, config.place(stage, index))
        self.ls1 = layer_scale(dim, config.layer_scale)
        self.norm1 = nn.LayerNorm(dim)
        self.dw2 = DepthwiseConv(dim, 3)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dropout=config.dropout)
        self.ls2 = layer_scale(dim, config.layer_scale)
        self.norm2 = nn.LayerNorm(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        x = x + self.dw1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.norm1(x + self.drop_path(self.ls1(self.modulation(x))))
        x = x + self.dw2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm2(x + self.drop_path(self.ls2(self.mlp(x))))
