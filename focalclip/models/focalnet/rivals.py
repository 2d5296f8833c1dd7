"""Rivals of focal modulation as mixers: three kinds of attention, pooling and depthwise convolution.

Attention is over the whole map (ViT's), within windows (Swin's), or focal; pooling is PoolFormer's, the convolution
ConvNeXt's.

For N positions that attend to M each, attention itself is ``2 N M C`` multiply-adds, whatever the number of heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from focalclip.models.focalnet.depthwise import DepthwiseConv


class RelativePositionBias(nn.Module):
    """One learned number per head and offset between query and key, added to the logits (Swin, section 3.2).

    Args:
        num_heads: heads.
        reach: largest offset along an axis.
    """

    def __init__(self, num_heads: int, reach: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * reach + 1, 2 * reach + 1))

    def forward(self, queries: tuple[int, int], keys: tuple[int, int], margin: int = 0) -> Tensor:
        """(heads, queries, keys) for a window of queries and one of keys that begins ``margin`` before it."""
        reach, device = self.table.shape[1] // 2, self.table.device
        rows, columns = (
            torch.arange(k, device=device) - margin - torch.arange(q, device=device)[:, None] + reach
            for q, k in zip(queries, keys, strict=True)
        )
        bias = self.table[:, rows[:, None, :, None], columns[None, :, None, :]]  # heads, q rows, q columns, k rows, ...
        return bias.flatten(1, 2).flatten(2)


def sines_and_cosines(height: int, width: int, dim: int, like: Tensor) -> Tensor:
    """Fixed position codes (H, W, C): a quarter of the channels each for sine and cosine of row and column."""
    count = -(-dim // 4)
    frequencies = 10_000.0 ** -(torch.arange(count, device=like.device) / max(count - 1, 1))
    row, column = (torch.arange(n, device=like.device)[:, None] * frequencies for n in (height, width))
    row, column = row[:, None].expand(-1, width, -1), column[None].expand(height, -1, -1)
    codes = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=-1)
    return codes[..., :dim].to(like.dtype)


class Attention(nn.Module):
    """Projections that all kinds of attention share: queries, keys and values in one, and the output.

    They have ``4 C^2`` weights and ``4 C`` biases.
    """

    def __init__(self, dim: int, *, head_dim: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        # as many heads as divide C, each of at least head_dim channels (Swin's 32) where there are so many
        self.num_heads = max(n for n in range(1, max(dim // head_dim, 1) + 1) if dim % n == 0)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)


class GlobalAttention(Attention):
    """Every position attends to every other, as in ViT (https://arxiv.org/abs/2010.11929).

    FocalNet has no position embedding and takes any image size; attention over a set would not know where anything is.
    So fixed 2-D sines and cosines (https://arxiv.org/abs/2205.01580) are added to the input here, which cost nothing.

    Multiply-adds per position: ``4 C^2 + 2 H W C``, quadratic in the number of positions over the map.
    """

    def __init__(self, dim: int, *, dropout: float = 0.0) -> None:
        super().__init__(dim, head_dim=64, dropout=dropout)  # ViT's heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        batch, height, width, dim = x.shape
        x = x + sines_and_cosines(height, width, dim, x)
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # 3 B heads N d
        mixed = F.scaled_dot_product_attention(*qkv)
        return self.dropout(self.proj(mixed.transpose(1, 2).reshape(x.shape)))


class WindowAttention(Attention):
    """Attention within windows of 7x7 positions, shifted by 3 if asked (https://arxiv.org/abs/2103.14030, section 3.2).

    Along an axis shorter than a window, the window shrinks to it and is not shifted (as in Swin). Maps that are no
    multiple of the window are padded; padding is never attended to.

    Parameters: 13 x 13 relative positions per head beside those of the projections. Multiply-adds: ``4 C^2`` per
    position and ``2 * 49 C`` per position of the padded map, linear in the number of positions.
    """

    WINDOW = 7

    def __init__(self, dim: int, *, is_shifted: bool, dropout: float = 0.0) -> None:
        super().__init__(dim, dropout=dropout)
        self.is_shifted = is_shifted
        self.bias = RelativePositionBias(self.num_heads, self.WINDOW - 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        size = x.shape[1:3]
        window = tuple(min(self.WINDOW, n) for n in size)
        shift = tuple(self.WINDOW // 2 if self.is_shifted and n > self.WINDOW else 0 for n in size)
        padded = tuple(-(-n // w) * w for n, w in zip(size, window, strict=True))
        qkv = F.pad(self.qkv(x), (0, 0, 0, padded[1] - size[1], 0, padded[0] - size[0]))
        qkv = qkv.roll((-shift[0], -shift[1]), (1, 2))
        batch, (rows, columns) = x.shape[0], (p // w for p, w in zip(padded, window, strict=True))
        # the windows of a picture and their heads stand side by side: 3, B, windows * heads, positions, d
        qkv = qkv.view(batch, rows, window[0], columns, window[1], 3, self.num_heads, -1)
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch, -1, window[0] * window[1], qkv.shape[-1])
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self._logit_bias(size, padded, window, shift, x))
        mixed = mixed.view(batch, rows, columns, self.num_heads, *window, -1).permute(0, 1, 4, 2, 5, 3, 6)
        mixed = mixed.reshape(batch, *padded, self.dim).roll(shift, (1, 2))[:, : size[0], : size[1]]
        return self.dropout(self.proj(mixed))

    def _logit_bias(
        self, size: torch.Size, padded: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], like: Tensor
    ) -> Tensor:
        """(windows * heads, positions, positions): relative position bias, -inf between what is no neighbour."""
        bias = self.bias(window, window).to(like.dtype)
        # of each row and column after the roll: 0 inside, 1 wrapped around from the other end, 2 padding
        regions = []
        for n, p, s in zip(size, padded, shift, strict=True):
            original = torch.arange(p, device=like.device).roll(-s)
            regions.append((original < s).long() + 2 * (original >= n).long())
        region = 3 * regions[0][:, None] + regions[1]
        windows = region.view(padded[0] // window[0], window[0], -1, window[1]).transpose(1, 2).flatten(0, 1).flatten(1)
        is_apart = windows[:, :, None] != windows[:, None, :]
        return bias.masked_fill(is_apart[:, None], float("-inf")).flatten(0, 1)


class FocalAttention(Attention):
    """Each window attends to its surroundings, finely nearby and coarsely far away.

    Parameters: ``4 C^2 + 4 C``, 50 for pooling, and 19 x 19 fine and 7 x 7 coarse relative positions per head.
    Multiply-adds are linear in the number of positions: ``4 C^2`` per position; per window ``49 C`` for pooling,
    ``2 C^2`` for keys and values of what is pooled, and ``2 * 49 (169 + 49) C`` for attention.
    """

    WINDOW = 7
    MARGIN = 3  # fine positions around the window
    COARSE = 7  # pooled windows along each axis, the own one in the middle

    def __init__(self, dim: int, *, dropout: float = 0.0) -> None:
        super().__init__(dim, dropout=dropout)
        self.pool = nn.Linear(self.WINDOW**2, 1)
        self.fine_bias = RelativePositionBias(self.num_heads, self.WINDOW - 1 + self.MARGIN)
        # All queries of a window see a pooled window at the same offset.
        self.coarse_bias = RelativePositionBias(self.num_heads, self.COARSE // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        batch, height, width, dim = x.shape
        window, padding = self.WINDOW, (0, 0, 0, -width % self.WINDOW, 0, -height % self.WINDOW)
        padded, inside = F.pad(x, padding), F.pad(x.new_ones(1, height, width, 1), padding)
        rows, columns = padded.shape[1] // window, padded.shape[2] // window

        q, kv = F.pad(self.qkv(x), padding).split([dim, 2 * dim], dim=-1)
        windows = padded.view(batch, rows, window, columns, window, dim).permute(0, 1, 3, 5, 2, 4)
        pooled = self.pool(windows.flatten(4)).squeeze(-1)  # B rows columns C
        pooled_kv = F.linear(pooled, self.qkv.weight[dim:], self.qkv.bias[dim:])

        fine = self._keys_and_values(kv, window + 2 * self.MARGIN, stride=window, padding=self.MARGIN)
        coarse = self._keys_and_values(pooled_kv, self.COARSE, stride=1, padding=self.COARSE // 2)
        k, v = torch.cat([fine, coarse], dim=3)
        q = q.view(batch, rows, window, columns, window, self.num_heads, -1).permute(0, 1, 3, 5, 2, 4, 6)
        q = q.reshape(batch, rows * columns * self.num_heads, window**2, -1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self._logit_bias(inside, rows, columns))
        mixed = mixed.view(batch, rows, columns, self.num_heads, window, window, -1).permute(0, 1, 4, 2, 5, 3, 6)
        return self.dropout(self.proj(mixed.reshape(padded.shape)[:, :height, :width]))

    def _keys_and_values(self, kv: Tensor, kernel: int, *, stride: int, padding: int) -> Tensor:
        """What each window sees of ``kv`` (B, h, w, 2 C), as (2, B, windows * heads, kernel^2, d)."""
        seen = F.unfold(kv.permute(0, 3, 1, 2), kernel, stride=stride, padding=padding)
        seen = seen.view(kv.shape[0], 2, self.num_heads, -1, kernel**2, seen.shape[-1])  # B 2 heads d keys windows
        return seen.permute(1, 0, 5, 2, 4, 3).flatten(2, 3)

    def _logit_bias(self, inside: Tensor, rows: int, columns: int) -> Tensor:
        """(windows * heads, queries, keys): relative position biases, -inf at keys outside the map."""
        wide = self.WINDOW + 2 * self.MARGIN
        fine = self.fine_bias((self.WINDOW,) * 2, (wide,) * 2, self.MARGIN)
        coarse = self.coarse_bias((1, 1), (self.COARSE,) * 2, self.COARSE // 2).expand(-1, fine.shape[1], -1)
        bias = torch.cat([fine, coarse], dim=-1).to(inside.dtype)
        fine_map, coarse_map = inside.permute(0, 3, 1, 2), inside.new_ones(1, 1, rows, columns)
        seen = [
            F.unfold(fine_map, wide, stride=self.WINDOW, padding=self.MARGIN),
            F.unfold(coarse_map, self.COARSE, padding=self.COARSE // 2),
        ]
        is_outside = torch.cat(seen, dim=1)[0].T == 0  # windows, keys
        return bias.masked_fill(is_outside[:, None, None], float("-inf")).flatten(0, 1)


class PoolFormerPooling(nn.Module):
    """Average of the 3x3 neighbours minus the position itself (https://arxiv.org/abs/2111.11418, algorithm 1).

    No parameters and no multiply-adds; the sums are 9 additions per position and channel.
    """

    KERNEL = 3

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape; padding is not counted into the averages."""
        pooled = F.avg_pool2d(
            x.permute(0, 3, 1, 2), self.KERNEL, stride=1, padding=self.KERNEL // 2, count_include_pad=False
        )
        return pooled.permute(0, 2, 3, 1) - x


class DepthwiseConvolution(nn.Module):
    """ConvNeXt's 7x7 depthwise convolution with bias (https://arxiv.org/abs/2201.03545, section 2.5).

    In ConvNeXt convolution and MLP share one norm and one residual connection; here, as every mixer, the convolution
    has its own. ``49 C`` weights and ``C`` biases; ``49 C`` multiply-adds per position.
    """

    KERNEL = 7

    def __init__(self, dim: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = DepthwiseConv(dim, self.KERNEL)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        return self.dropout(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
