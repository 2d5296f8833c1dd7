"""Everything about timm: its towers behind our interface, ours behind its, and the export.

Two towers are added to timm: ConvNeXt and PoolFormer on patches of 2 pixels instead of 4, which timm's options cannot
express. With a first stage of stride 4, a picture of 32 pixels leaves the last stage one position, and nothing to mix.
Their widths are those of ``focalnet_pico``, and their depths give as many parameters.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import GroupNorm1
from timm.models import convnext, metaformer
from timm.models import focalnet as timm_focalnet
from timm.models._builder import build_model_with_cfg
from timm.models._manipulate import group_parameters
from timm.models._registry import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from focalclip.base.errors import UserError, first_line
from focalclip.config import ImageTowerConfig
from focalclip.data.images import to_rgb
from focalclip.interop.card import Trained
from focalclip.interop.encoder import ImageEncoder, Preprocess, TowerWeights
from focalclip.interop.folder import TOWER_WEIGHTS, write_weights
from focalclip.interop.register import ADDED, needs_focalclip
from focalclip.models.focalnet import FocalNet, FocalNetConfig
from focalclip.models.focalnet.modulation import ModulationParts
from focalclip.models.focalnet.network import init_affine
from focalclip.models.focalnet.variants import FOCALNETS, create_focalnet
from focalclip.models.weights import load_strictly, state_dict_from_timm
from focalclip.models.weights.architecture import check_published
from focalclip.models.weights.dialects import MATRIX
from focalclip.names import find, image_tower_entry, split

_WIDTHS, _DEPTHS = (24, 48, 96, 192), (1, 1, 4, 6)


default_cfgs = generate_default_cfgs(
    {"convnext_pico_patch2": convnext._cfg(), "poolformer_pico_patch2": metaformer._cfg()}
)  # timm looks for them in the module of a model's function


ADDED.update(default_cfgs)


class TimmTower(nn.Module):
    """A tower of timm: pooled features, and feature maps through timm's ``forward_intermediates``."""

    def __init__(self, trunk: Any) -> None:
        super().__init__()
        self.trunk = trunk
        self.num_features: int = trunk.head_hidden_size  # of what forward returns; num_features is the last map's
        self.strides: list[int] = [info["reduction"] for info in trunk.feature_info]
        self.feature_dims: list[int] = [info["num_chs"] for info in trunk.feature_info]

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, num_features) of normalised images (B, 3, H, W)."""
        return self.trunk(images)

    def depth_groups(self) -> list[list[str]]:
        """Names of parameters from the stem up, as timm groups them for layer-wise decay; a head has one of its own."""
        trunk: Any = self.trunk
        if hasattr(trunk, "group_matcher"):
            depth_of: Any = group_parameters(trunk, trunk.group_matcher(coarse=False), reverse=True)
        else:
            from timm.optim._param_groups import auto_group_layers  # not while timm.models is being imported

            depth_of = auto_group_layers(trunk)
        groups: list[list[str]] = [[] for _ in range(1 + max(depth_of.values()))]
        for name, depth in depth_of.items():
            groups[depth].append(f"trunk.{name}")
        return groups

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """One (B, C_i, H_i, W_i) map for each of ``strides``."""
        trunk: Any = self.trunk
        return trunk.forward_intermediates(images, intermediates_only=True)


def create_timm_tower(
    name: str, *, drop_path: float = 0.0, init: str = "official", pretrained: bool = False, **options: Any
) -> "TimmTower":
    """Build the tower that timm names; ``options`` are further arguments of timm's function of that name.

    Raises:
        UserError: if timm does not know the name or an option, cannot build it, or its weights cannot be had.
    """
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:5])
        raise UserError(f"timm:{name} is not a model of timm; near it: {near or 'none'} (timm.list_models() has all)")
    rate: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        trunk = _create_in_timm(name, pretrained=pretrained, num_classes=0, **rate, **options)
    except (TypeError, ValueError, AssertionError, ArithmeticError, LookupError, AttributeError) as error:
        if "drop_path_rate" in str(error):
            raise UserError(f"model.image.drop_path={drop_path}: timm:{name} has no stochastic depth; set 0") from None
        if not options or isinstance(error, UserError):
            raise
        raise UserError(f"model.image.options: timm:{name} refuses {options}: {first_line(error)}") from None
    if init == "fan_in" and not pretrained:
        _init_fan_in(trunk)
    return TimmTower(trunk)


def published_timm_tower(name: str, **options: Any) -> "TimmTower":
    """The same with the weights that timm publishes under this name."""
    return create_timm_tower(name, pretrained=True, **options)


def published_focalnet(name: str, **options: Any) -> nn.Module:
    """The named FocalNet with timm's copy of the authors' weights, in timm's reading of the disputed flags."""
    with torch.device("meta"):
        tower = create_focalnet(name, **options)
    published = {known: timm.get_pretrained_cfg(known) for known in FOCALNETS if timm.is_model(known)}
    published = {known: config for known, config in published.items() if config and config.has_weights}
    if name not in published:
        raise UserError(f"{name}: there are no published weights; there are for {', '.join(published)}")
    check_published(tower.config, name, published[name].num_classes)
    theirs = _create_in_timm(name, pretrained=True, num_classes=tower.config.num_classes)
    load_strictly(tower, state_dict_from_timm(theirs.state_dict()), f"timm's {name}")
    return tower


def _create_in_timm(name: str, **options: Any) -> Any:
    """Call ``timm.create_model`` and turn its failures into a UserError."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return timm.create_model(name, **options)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        raise UserError(
            f"timm:{name}: its weights are not in the Hugging Face cache and the hub cannot be reached; connect once, "
            "or copy the cache of a machine that has them (HF_HUB_CACHE says where it is)"
        ) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"timm:{name}: timm cannot build it: {first_line(error)}") from None


@torch.no_grad()
def _init_fan_in(tower: nn.Module) -> None:
    """FocalNet's ``init="fan_in"`` for another tower: its linear maps and convolutions; all else stays as it is."""
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):  # convolutions of 1x1 are linear maps too
            is_convolution = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
            init_affine(module, "fan_in", use_uniform=is_convolution)


def timm_trunk(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a :class:`TimmTower` as that of timm's own tower."""
    return {name.removeprefix("trunk."): x for name, x in weights.items()}


def timm_tower(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of timm's tower as that of a :class:`TimmTower`."""
    return {f"trunk.{name}": x for name, x in weights.items()}


def timm_encoder(name: str) -> ImageEncoder:
    """The tower that timm names with its published weights, frozen, with the preprocessing that timm states for them.

    Raises:
        UserError: if timm does not know the name, or its weights cannot be had.
    """
    return ImageEncoder(published_timm_tower(name), partial(timm_preprocess, name))


def timm_preprocess(name: str) -> Preprocess:
    """The preprocessing that timm states for the published weights of ``name``: size, crop, interpolation, colours."""
    from torchvision.transforms import Compose

    published: Any = timm.get_pretrained_cfg(name)
    options: Any = timm.data.resolve_data_config(pretrained_cfg=published.to_dict())
    return Compose([to_rgb, timm.data.create_transform(**options)])


def image_weights(name: str) -> TowerWeights:
    """The weights that timm publishes under a name, at the resolution that they were trained at, with their head.

    Raises:
        UserError: if timm does not know the name, or its weights cannot be had.
    """
    trunk = _create_in_timm(name, pretrained=True).eval()
    weights = dict(trunk.state_dict())
    trunk.reset_classifier(0)
    return TowerWeights(weights, encode=trunk, mean=trunk.pretrained_cfg["mean"], std=trunk.pretrained_cfg["std"])


def focalnet_statistics(variant: str | None) -> tuple[tuple[float, ...], tuple[float, ...]] | tuple[None, None]:
    """Mean and deviation of the pixels that a variant's published weights were trained on; None where none are."""
    published = timm.get_pretrained_cfg(variant) if variant and timm.is_model(variant) else None
    return (published.mean, published.std) if published and published.has_weights else (None, None)


def load_tower(tower: "TimmTower", config: ImageTowerConfig, weights: Mapping[str, Tensor], where: str) -> list[str]:
    """Load weights of timm, or of another code base whose names timm converts, into a tower that is built.

    timm's own function for the weights of this architecture renames them and fits positions to the resolution.

    Args:
        tower: as the configuration builds it.
        config: its name and options.
        weights: at any resolution, with a classification head or without.
        where: source of the weights, for messages.

    Returns:
        What was fitted, such as ``pos_embed (1, 197, 192) to (1, 65, 192)``.

    Raises:
        UserError: listing what is missing, unexpected or of another shape.
    """
    weights = timm_trunk(weights)
    own = tower.trunk.state_dict()
    heads = tower.trunk.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    headless = {name: x for name, x in weights.items() if not name.startswith(tuple(f"{head}." for head in heads))}
    remedy = "name the tower of these weights as model.image.name"
    if {n: x.shape for n, x in headless.items()} != {n: x.shape for n, x in own.items()}:
        try:
            headless = _converted(config, weights, heads)
        except Exception as error:  # noqa: BLE001 - timm's functions fail in any way on what they do not know
            load_strictly(tower.trunk, headless, where, remedy=remedy)
            raise UserError(f"{where}: timm cannot fit it to {config.name}: {first_line(error)}") from None
    load_strictly(tower.trunk, headless, where, remedy=remedy)
    before = {name: weights.get(name, weights.get(_CLIP_NAMES.get(name, ""))) for name in own}
    return [
        f"{name} {tuple(x.shape)} to {tuple(own[name].shape)}"
        for name, x in before.items()
        if x is not None and x.numel() != own[name].numel()
    ]


_CLIP_NAMES = {"pos_embed": "visual.positional_embedding"}


def _converted(config: ImageTowerConfig, weights: Mapping[str, Tensor], heads: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights as ``timm.create_model`` loads them for a tower of this name and options, without a head."""
    name = split(config.name)[1]
    options: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in config.options.items()}
    given = dict(copy.deepcopy(dict(weights)))
    if heads and f"{heads[0]}.weight" in given:
        classes = len(given[f"{heads[0]}.weight"])
    elif "visual.proj" in given:  # CLIP's projection becomes timm's head
        classes = given["visual.proj"].shape[1]
    else:  # some of timm's functions tell old names from new ones by the head
        classes = 1 if heads else 0
        bare = timm.create_model(name, num_classes=classes, **options).state_dict()
        given |= {key: x for key, x in bare.items() if key.startswith(tuple(f"{head}." for head in heads))}
    source = {"state_dict": given, "num_classes": classes, "label_offset": 0, "custom_load": False, "source": None}
    trunk: Any = timm.create_model(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=source, **options)
    trunk.reset_classifier(0)
    return trunk.state_dict()


def modulation_parts(modulation: Any, x: Tensor) -> ModulationParts:
    """The parts of timm's focal modulation for ``x`` (B, C, H, W), channels last as ours; contexts are left out.

    Written after ``timm.models.focalnet.FocalModulation.forward`` (timm 1.0.31), which does not return them.
    """
    q, context, gates = modulation.f(x).split(modulation.input_split, 1)
    total: Any = 0
    for level, focal_layer in enumerate(modulation.focal_layers):
        context = focal_layer(context)
        total = total + context * gates[:, level : level + 1]
    total = total + modulation.act(context.mean((2, 3), keepdim=True)) * gates[:, modulation.focal_level :]
    if modulation.normalize_modulator:
        total = total / (modulation.focal_level + 1)
    q, gates, modulator = (part.permute(0, 2, 3, 1) for part in (q, gates, modulation.h(total)))
    return ModulationParts(q, (), gates, modulator)


class _ConvShapedLinear(nn.Linear):
    """Linear map whose weight has the shape of a 1x1 convolution."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, torch.flatten(self.weight, 1), self.bias)


def _channels_last(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].permute(0, 2, 3, 1),)


def _channels_first(_: nn.Module, __: tuple[Tensor], out: Tensor) -> Tensor:
    return out.permute(0, 3, 1, 2)


def _as_timms(block: Any) -> nn.Module:
    """A block of ours between timm's channels-first layers, its matrices stored as 1x1 convolutions."""
    block.register_forward_pre_hook(_channels_last)
    block.register_forward_hook(_channels_first)
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and MATRIX.search(f"{name}.weight"):
            module.weight = nn.Parameter(module.weight.detach()[..., None, None])
            module.__class__ = _ConvShapedLinear
    return block


def tower_class(config: FocalNetConfig) -> Any:
    """What is called as the class of timm's FocalNet is; names and shapes of its weights follow timm's."""
    if config.patch_size == 4 and config.block == "focal":
        return timm_focalnet.FocalNet
    return partial(TimmFocalNet, config)


class TimmFocalNet(timm_focalnet.FocalNet):
    """timm's FocalNet with the stem, and where they differ the blocks, of a configuration of ours."""

    def __init__(self, config: FocalNetConfig, in_chans: int = 3, drop_path_rate: float = 0.0, **options: Any) -> None:
        super().__init__(in_chans=in_chans, drop_path_rate=drop_path_rate, **options)
        ours: Any = FocalNet(replace(config, in_channels=in_chans, drop_path=drop_path_rate, init="timm"))
        self.stem.proj = ours.stem.proj  # same names and shapes; only stride, kernel and padding differ
        for info in self.feature_info:
            info["reduction"] = info["reduction"] // 4 * config.patch_size
        if config.block != "focal":
            for theirs, stage in zip(self.layers, ours.layers, strict=True):
                theirs.blocks = nn.ModuleList(_as_timms(block) for block in stage.blocks)


class ConvNeXt(convnext.ConvNeXt):
    """Patches of 2 pixels that do not overlap, as ConvNeXt's of 4 do not."""

    def __init__(self, in_chans: int = 3, **options: Any) -> None:
        super().__init__(in_chans=in_chans, **options)
        theirs: Any = self.stem[0]
        self.stem[0] = _stem(self, nn.Conv2d(in_chans, theirs.out_channels, kernel_size=2, stride=2))


class PoolFormer(metaformer.MetaFormer):
    """Kernels of 3 pixels at stride 2, where PoolFormer has 7 at 4; FocalNet pico's stem is the same."""

    def __init__(self, in_chans: int = 3, **options: Any) -> None:
        super().__init__(in_chans=in_chans, **options)
        width = self.stem.conv.out_channels
        self.stem.conv = _stem(self, nn.Conv2d(in_chans, width, kernel_size=3, stride=2, padding=1))


def _stem(tower: Any, conv: nn.Conv2d) -> nn.Conv2d:
    """``conv`` initialised as both families initialise theirs; the strides of the tower's maps are noted as halved."""
    nn.init.trunc_normal_(conv.weight, std=0.02)
    nn.init.zeros_(conv.bias)  # pyrefly: ignore[bad-argument-type]
    for info in tower.feature_info:
        info["reduction"] //= 2
    return conv


def _build(kind: type[nn.Module], name: str, pretrained: bool, options: dict[str, Any]) -> Any:
    stages = options.pop("out_indices", tuple(range(len(options["depths"]))))
    features = {"flatten_sequential": True, "out_indices": stages}
    return build_model_with_cfg(kind, name, pretrained, feature_cfg=features, **options)


@register_model
def convnext_pico_patch2(pretrained: bool = False, **options: Any) -> Any:
    """ConvNeXt for small pictures, its blocks as in timm's ``convnext_tiny``."""
    plan = {"dims": _WIDTHS, "depths": _DEPTHS}
    return _build(ConvNeXt, "convnext_pico_patch2", pretrained, plan | options)


@register_model
def poolformer_pico_patch2(pretrained: bool = False, **options: Any) -> Any:
    """PoolFormer for small pictures, its blocks as in timm's ``poolformer_s12``."""
    plan = {
        "dims": _WIDTHS, "depths": _DEPTHS, "downsample_norm": None, "mlp_act": nn.GELU, "mlp_bias": True,
        "norm_layers": GroupNorm1, "layer_scale_init_values": 1e-5, "res_scale_init_values": None,
        "use_mlp_head": False,
    }  # fmt: skip
    return _build(PoolFormer, "poolformer_pico_patch2", pretrained, plan | options)


def write_timm(trained: Trained, folder: Path) -> list[str]:
    """Write ``config.json`` and ``model.safetensors``, which ``timm.create_model("local-dir:FOLDER")`` loads strictly.

    Raises:
        UserError: if timm has no such tower.
    """
    image, tower = trained.model.config.image, trained.model.visual.trunk
    entry, name = image_tower_entry(image.name), split(image.name)[1]
    if not image.is_as_named or entry is None or entry.to_timm is None or not timm.is_model(name):
        raise UserError(f"--format timm: timm cannot build {image.name} as this model has it; use --format onnx")
    write_weights(find(entry.to_timm)(tower.state_dict()), folder / TOWER_WEIGHTS)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": tower.num_features,
        "global_pool": "avg",
        "pretrained_cfg": _timm_pretrained_cfg(image),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return [f"timm builds {name} only after `import focalclip`."] if needs_focalclip(name) else []


def _timm_pretrained_cfg(image: ImageTowerConfig) -> dict[str, Any]:
    modes = {"shortest": "center", "squash": "squash", "longest": "border"}
    return {
        "input_size": [3, image.image_size, image.image_size],
        "fixed_input_size": False,
        "interpolation": image.interpolation,
        "crop_pct": 1.0,
        "crop_mode": modes[image.resize_mode],
        "mean": list(image.mean),
        "std": list(image.std),
        "num_classes": 0,
        "first_conv": "stem.proj",
        "classifier": "head.fc",
    }


def timm_usage(trained: Trained, folder: str) -> str:
    """Python that loads the tower."""
    name = split(trained.model.config.image.name)[1]
    ours = "import focalclip  # registers the tower with timm\n" if needs_focalclip(name) else ""
    return f"""{ours}import timm

tower = timm.create_model("local-dir:{folder}", pretrained=True)  # hf-hub:ORG/NAME from the hub
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(tower))
features = tower.eval()(transform(picture)[None])  # (1, {trained.model.visual.trunk.num_features})"""


def imagenet_wordnet_ids() -> tuple[str, ...]:
    """The 1,000 folder names of ImageNet-1K in label order."""
    return tuple(timm.data.ImageNetInfo("imagenet-1k").label_names())
