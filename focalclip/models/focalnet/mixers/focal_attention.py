"""Focal self-attention (https://arxiv.org/abs/2107.00641), the predecessor that focal modulation is compared with.

The version built here, in the terms of that paper's section 3.2: windows of queries s_p = 7; two levels, the finest
(s_w = 1) over the window and 3 positions around it (s_r = 13), and one coarse level of 7x7 positions pooled to one
(s_w = 7) over 7x7 such windows (s_r = 7 in every stage, where the paper narrows it from 7 to 1). Pooling is one linear
map from the 49 positions of a window to one, shared by all channels, as in the paper. Padding is never attended to.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from focalclip.models.focalnet.mixers.attention import Attention, RelativePositionBias


class FocalAttention(Attention):
    """Each window attends to its surroundings, finely nearby and coarsely far away."""

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

    def expected_parameters(self) -> int:
        """``4 C^2 + 4 C``, 50 for pooling, and 19 x 19 fine and 7 x 7 coarse relative positions per head."""
        fine = 2 * (self.WINDOW - 1 + self.MARGIN) + 1
        return super().expected_parameters() + self.WINDOW**2 + 1 + self.num_heads * (fine**2 + self.COARSE**2)

    def expected_multiply_adds(self, height: int, width: int) -> int:
        """Linear in the number of positions.

        ``4 C^2`` per position; per window ``49 C`` for pooling, ``2 C^2`` for keys and values of what is pooled, and
        ``2 * 49 (169 + 49) C`` for attention.
        """
        num_windows = -(-height // self.WINDOW) * -(-width // self.WINDOW)
        queries, keys = self.WINDOW**2, (self.WINDOW + 2 * self.MARGIN) ** 2 + self.COARSE**2
        per_window = queries * self.dim + 2 * self.dim**2 + 2 * queries * keys * self.dim
        return height * width * 4 * self.dim**2 + num_windows * per_window
