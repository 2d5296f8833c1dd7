"""What decides a FocalNet, checked when it is made."""

from dataclasses import dataclass
from typing import Literal, get_args

from focalclip.base.errors import UserError
from focalclip.models.focalnet.mixers import FOCAL, MIXERS, NEED_LEVELS, MixerSpec

Init = Literal["official", "timm", "fan_in"]

BlockKind = Literal["focal", "unicl"]

INITS, BLOCKS = get_args(Init), get_args(BlockKind)

# (kernel size, padding) of overlapping patch embeddings by stride: the authors' for 4 and 2.
OVERLAP = {4: (7, 2), 2: (3, 1)}


@dataclass(frozen=True)
class FocalNetConfig:
    """What decides a FocalNet.

    Raises:
        UserError: if a value is out of range or the per-stage tuples differ in length.
    """

    embed_dim: int = 96
    """Channels of the first stage; each later stage doubles them."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Blocks per stage."""
    focal_levels: int | tuple[int, ...] = 2
    """Focal levels L without the global one; one number for all stages or one per stage."""
    focal_windows: int | tuple[int, ...] = 3
    """Kernel size of the first focal level (odd); one number for all stages or one per stage."""
    mlp_ratio: float = 4.0
    patch_size: int = 4
    """Stride of the stem in pixels: 4 in the hierarchical nets, 16 in the isotropic ones."""
    use_overlap: bool = False
    """Overlapping patch embeddings: kernel 7 at stride 4, 3 at stride 2, instead of kernels as wide as the stride."""
    use_post_norm: bool = False
    """LayerNorm after modulation and MLP, before the residual sum, instead of before them."""
    use_post_norm_in_modulation: bool = False
    """LayerNorm inside the modulation, before its output projection."""
    normalize_modulator: bool = False
    """Divide the gated sum of contexts by the number of levels, the global one included."""
    layer_scale: float | None = None
    """Start of the learned per-channel scale of both residual branches; None: no such scale."""
    dropout: float = 0.0
    """Dropout after the stem and after every output projection."""
    drop_path: float = 0.0
    """Stochastic depth: rate of the last block; it grows linearly from 0 at the first."""
    detector_stages: tuple[int, ...] = ()
    """Stages whose maps a detector takes, where the net is the backbone of one: each such map passes a LayerNorm, there
    is none at the end, pictures are padded to whole patches, and an overlapping stem by 3 pixels, as in the authors'
    code for detection and segmentation. Empty: a net for pooled features."""
    in_channels: int = 3
    num_classes: int = 0
    """Outputs of a linear head on the pooled features; 0: no head."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    init: Init = "official"
    """See :meth:`~focalclip.models.focalnet.FocalNet.init_weights`."""
    mixer: str = "focal_modulation"
    """What mixes positions in each block: a key of :data:`~focalclip.models.focalnet.mixers.MIXERS`. Attention,
    convolution and pooling have sizes of their own and take neither focal levels nor windows."""
    block: BlockKind = "focal"
    """``focal``: the paper's; ``unicl``: that of K-LITE's UniCL FocalNet-B, see
    :mod:`focalclip.models.focalnet.blocks`."""

    def __post_init__(self) -> None:
        if not self.depths or min(self.embed_dim, *self.depths) < 1:
            raise UserError(f"embed_dim={self.embed_dim}, depths={self.depths}: each must be at least 1")
        if self.patch_size < 1 or (self.use_overlap and self.patch_size not in OVERLAP):
            raise UserError(
                f"patch_size={self.patch_size} must be at least 1, and 2 or 4 where use_overlap=True; choose another"
            )
        for field in ("focal_levels", "focal_windows"):
            value = getattr(self, field)
            if not isinstance(value, int) and len(value) != self.num_stages:
                raise UserError(f"{field}={value} has not one entry for each of the {self.num_stages} stages")
        if min(self.stage_levels) < 0 or any(window % 2 == 0 for window in self.stage_windows):
            raise UserError(
                f"focal_levels={self.focal_levels}, focal_windows={self.focal_windows}: "
                "levels must not be negative and windows must be odd"
            )
        if not set(self.detector_stages) <= set(range(self.num_stages)):
            raise UserError(f"detector_stages={self.detector_stages} are not among the {self.num_stages} stages from 0")
        for field in ("dropout", "drop_path"):
            if not 0 <= getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)} must be at least 0 and below 1")
        for field, known in (("init", INITS), ("block", BLOCKS)):
            if getattr(self, field) not in known:
                raise UserError(f"{field}={getattr(self, field)!r} is none of {', '.join(known)}")
        self._check_mixer()

    def _check_mixer(self) -> None:
        if self.mixer not in MIXERS:
            raise UserError(f"mixer={self.mixer!r} is none of {', '.join(MIXERS)}")
        if self.mixer in NEED_LEVELS and min(self.stage_levels) < 1:
            raise UserError(f"focal_levels={self.focal_levels}: mixer={self.mixer} needs at least one level per stage")
        in_modulation = self.use_post_norm_in_modulation or self.normalize_modulator
        if self.mixer not in FOCAL and in_modulation:
            raise UserError(
                f"use_post_norm_in_modulation and normalize_modulator would be ignored by mixer={self.mixer}; "
                f"set both False, or use one of {', '.join(FOCAL)}"
            )
        if self.block == "unicl" and not (self.use_post_norm and self.use_overlap and self.patch_size == 4):
            raise UserError("block=unicl exists with use_post_norm=True, use_overlap=True and patch_size=4 alone")

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.depths)

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.embed_dim * 2**i for i in range(self.num_stages))

    @property
    def stage_levels(self) -> tuple[int, ...]:
        """``focal_levels`` with one entry per stage."""
        return (self.focal_levels,) * self.num_stages if isinstance(self.focal_levels, int) else self.focal_levels

    @property
    def stage_windows(self) -> tuple[int, ...]:
        """``focal_windows`` with one entry per stage."""
        return (self.focal_windows,) * self.num_stages if isinstance(self.focal_windows, int) else self.focal_windows

    @property
    def stage_drop_paths(self) -> tuple[tuple[float, ...], ...]:
        """Stochastic depth rate of each block of each stage."""
        last = sum(self.depths) - 1
        rates = iter(self.drop_path * block / max(last, 1) for block in range(last + 1))
        return tuple(tuple(next(rates) for _ in range(depth)) for depth in self.depths)

    def mixer_spec(self, stage: int, block: int) -> MixerSpec:
        """What the mixer of this block is built from."""
        return MixerSpec(
            dim=self.dims[stage],
            block=block,
            num_levels=self.stage_levels[stage],
            window=self.stage_windows[stage],
            use_norm=self.use_post_norm_in_modulation,
            normalize=self.normalize_modulator,
            dropout=self.dropout,
        )
