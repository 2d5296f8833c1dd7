"""Mixers without projections: PoolFormer's pooling and ConvNeXt's depthwise convolution."""

from torch import Tensor, nn
from torch.nn import functional as F

from focalclip.models.focalnet.depthwise import DepthwiseConv


class PoolFormerPooling(nn.Module):
    """Average of the 3x3 neighbours minus the position itself (https://arxiv.org/abs/2111.11418, algorithm 1)."""

    KERNEL = 3

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape; padding is not counted into the averages."""
        pooled = F.avg_pool2d(
            x.permute(0, 3, 1, 2), self.KERNEL, stride=1, padding=self.KERNEL // 2, count_include_pad=False
        )
        return pooled.permute(0, 2, 3, 1) - x

    def expected_parameters(self) -> int:
        """None."""
        return 0

    def expected_multiply_adds(self, height: int, width: int) -> int:  # noqa: ARG002
        """None in linear maps and convolutions; the sums are 9 additions per position and channel."""
        return 0


class DepthwiseConvolution(nn.Module):
    """ConvNeXt's 7x7 depthwise convolution with bias (https://arxiv.org/abs/2201.03545, section 2.5).

    In ConvNeXt convolution and MLP share one norm and one residual connection; here, as every mixer, the convolution
    has its own.
    """

    KERNEL = 7

    def __init__(self, dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = DepthwiseConv(dim, self.KERNEL)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return self.dropout(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))

    def expected_parameters(self) -> int:
        """``49 C`` weights and ``C`` biases."""
        return (self.KERNEL**2 + 1) * self.conv.out_channels

    def expected_multiply_adds(self, height: int, width: int) -> int:
        """``49 C`` per position."""
        return height * width * self.KERNEL**2 * self.conv.out_channels
