"""The configuration of a run: every setting with its meaning, its default and its limits.

The defaults of the section ``model`` are CLIP's at 224 pixels; the others are those of the default run. A file in
``configs/`` says what it changes from them, or from the file that it names as its base, and why.

Every field is checked before any work starts: an unknown key, a wrong type or an impossible combination is a
:class:`~focalclip.base.errors.UserError` that names the field's full path. ``config.yaml`` in a run directory is a
dump of :class:`RunConfig`, so ``--config runs/NAME/config.yaml`` repeats the run.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from focalclip.base.errors import UserError
from focalclip.base.files import home_expanded, is_plain_name, user_path
from focalclip.base.strict import Strict, from_dict, merged, read_yaml
from focalclip.names import TOWER_SETTINGS, image_tower_entry, text_tower_entry

IMAGENET_MEAN = (0.485, 0.456, 0.406)

IMAGENET_STD = (0.229, 0.224, 0.225)

_LARGEST_LOGIT_SCALE = 10.0  # exp of it is 22,000; a scale given in the place of its logarithm is mostly above

# Not to be set in ``options``: separate settings, under our name and timm's, and arguments that focalclip fixes.
_RESERVED_OPTIONS = {"drop_path", "drop_path_rate", "init", "mixer", "activation_checkpointing"}
_RESERVED_OPTIONS |= {"pretrained", "num_classes", "in_channels", "in_chans", "detector_stages"}


def _at_home(path: Any) -> Any:
    """Paths with ``~`` replaced by the home directory, also in a list; what is no path stays."""
    if isinstance(path, list):
        return [_at_home(one) for one in path]
    return home_expanded(path) if isinstance(path, str) else path


_AT_HOME = AfterValidator(_at_home)


def _number_or_source(value: Any) -> Any:
    """``data.val``: a number, which the command line gives as text, is a fraction; all else is the name of a source."""
    not_finite = {".nan": "nan", ".inf": "inf", "-.inf": "-inf"}  # as YAML writes them
    try:
        fraction = float(not_finite.get(value, value) if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return _at_home(value) if isinstance(value, str | list) else value
    if math.isfinite(fraction) and not 0 < fraction < 1:
        raise ValueError(
            "input should be a source, or a fraction of the training pairs between 0 and 1, such as 0.01; null for none"
        )
    return fraction


# Names of settings in open_clip and timm, and of our sections where one of their settings is meant, for "did you mean".
# What has the same name there and in one section here, such as batch_size, is found without them.
_OTHER_NAMES = {
    "data": "data.train",
    "train_data": "data.train",
    "data_dir": "data.train",
    "dataset": "data.train",
    "train": "data.train",
    "b": "data.batch_size",
    "num_workers": "data.workers",
    "shared_labels": "data.label_space",
    "loss": "loss.name",
    "siglip": "loss.name",
    "opt": "optim.name",
    "optim": "optim.name",
    "optimizer": "optim.name",
    "sched": "optim.schedule",
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "lr_scheduler": "optim.schedule",
    "learning_rate": "optim.lr",
    "warmup": "optim.warmup_steps",
    "warmup_epochs": "optim.warmup_steps",
    "layer_decay": "optim.image.layer_decay",
    "lock_image": "model.image.lock",
    "lock_image_unlocked_groups": "model.image.unlocked_groups",
    "lock_text": "model.text.lock",
    "lock_text_unlocked_layers": "model.text.unlocked_groups",
    "pretrained_image": "model.image.pretrained",
    "pretrained_image_path": "model.image.pretrained",
    "pretrained_text_path": "model.text.pretrained",
    "wd": "optim.weight_decay",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "opt_betas": "optim.betas",
    "opt_eps": "optim.eps",
    "grad_clip_norm": "optim.clip_grad_norm",
    "clip_grad": "optim.clip_grad_norm",
    "model": "model.image.name",
    "img_size": "model.image.image_size",
    "input_size": "model.image.image_size",
    "force_image_size": "model.image.image_size",
    "image_mean": "model.image.mean",
    "image_std": "model.image.std",
    "image_interpolation": "model.image.interpolation",
    "image_resize_mode": "model.image.resize_mode",
    "grad_checkpointing": "model.image.activation_checkpointing",
    "force_context_length": "model.text.context_length",
    "logit_scale": "model.init_logit_scale",
    "aug_cfg": "data.augment",
    "hflip": "data.augment.flip",
    "pretrained": "train.init_from",
    "initial_checkpoint": "train.init_from",
    "accum_freq": "train.accumulation",
    "grad_accum_steps": "train.accumulation",
    "amp": "train.precision",
    "amp_dtype": "train.precision",
    "max_steps": "train.steps",
    "save_frequency": "train.save_every",
    "log_every_n_steps": "train.log_every",
    "log_interval": "train.log_every",
    "checkpoint_hist": "train.keep_checkpoints",
    "zeroshot_frequency": "eval.every",
    "val_frequency": "data.val_every",
    "val_data": "data.val",
    "eval": "eval.benchmark",
    "imagenet_val": "eval.data_root",
    "logs": "runs_dir",
    "output": "runs_dir",
    "experiment": "name",
}


class _Tower(Strict):
    """The checks of settings that both towers have."""

    @field_validator("pretrained", mode="before", check_fields=False)
    @classmethod
    def _source(cls, value: Any) -> Any:
        """True and false may come as words from the command line; false means null."""
        value = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
        if value is not None and not isinstance(value, bool | str):
            raise ValueError("name trained weights, such as timm:NAME or runs/NAME; or true, or null")
        return None if value is False else _at_home(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _locked(self) -> Self:
        settings: Any = self
        if settings.unlocked_groups and not settings.lock:
            raise ValueError(
                f"unlocked_groups={settings.unlocked_groups} would be ignored without lock, as every group is trained; "
                "set lock=true, or unlocked_groups=0"
            )
        return self


class ImageTowerConfig(_Tower):
    """The image tower and the preprocessing that its weights belong to."""

    name: str = "focalnet_pico"
    """A variant of ``focalclip.list_models("focalnet*")``, or ``timm:NAME`` for any tower of timm."""
    options: dict[str, Any] = Field(default_factory=dict)
    """What else the tower is built with: arguments of timm's model function, such as ``{img_size: 96}`` for a Swin, or
    fields of FocalNetConfig, such as ``{depths: [2, 2, 6, 2]}``. open_clip cannot load such a tower."""
    image_size: int = Field(224, ge=8)
    """Side of the square input in pixels."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth: the rate of the last block; it grows linearly from 0 at the first."""
    init: Literal["official", "timm", "fan_in"] = "official"
    """Initialisation: as in the authors' code, as in timm, or linear maps and convolutions scaled by fan-in (for narrow
    nets). For towers of timm the first two are the same."""
    mixer: str = "focal_modulation"
    """What mixes positions in each block (FocalNet only): focal modulation, an ablation of it, or a rival such as
    ``window_attention``; docs/models.md lists all."""
    feature_norm: Literal["none", "batch"] = "none"
    """Normalise pooled features over the global batch before the projection; folded into it at export."""
    activation_checkpointing: bool = False
    """Recompute each block of both towers in the backward pass: less memory, about a third more arithmetic (FocalNet
    only)."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per-channel mean of the input, in [0, 1] pixel units."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Per-channel standard deviation of the input, in [0, 1] pixel units."""
    resize_mode: Literal["shortest", "squash", "longest"] = "shortest"
    """Evaluation resize, by open_clip's names: shorter side then centre crop; squash; longer side then pad."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Interpolation of the resize."""
    pretrained: bool | str | None = None
    """Trained weights of the tower to start from: ``timm:NAME``, a file of timm's or of FocalNet weights, one half of
    ``open_clip:NAME/PRETRAINED`` or of a ``transformers:`` model, a run directory or an exported folder; true: those
    that are published under the tower's name; null: fresh ones."""
    lock: bool = False
    """Train the projection to the shared width and not the tower (LiT); see docs/starts.md."""
    unlocked_groups: int = Field(0, ge=0)
    """Last groups of a locked tower that are trained all the same: blocks, and the stem as the first group of all."""

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        entry = image_tower_entry(self.name)
        if entry is not None:
            ignored = [setting for setting in TOWER_SETTINGS if setting not in entry.settings]
            self.refuse_ignored(self.name, *ignored)
        return self

    @model_validator(mode="after")
    def _pixels_are_fractions(self) -> Self:
        """Statistics of pixels from 0 to 255 would make every picture nearly one colour, and nothing would fail."""
        if not all(0 <= mean <= 1 for mean in self.mean) or not all(0 < std <= 1 for std in self.std):
            raise ValueError(
                f"mean={list(self.mean)}, std={list(self.std)}: pixels are numbers from 0 to 1, so a mean is in [0, 1] "
                "and a std above 0 and at most 1; divide statistics of pixels from 0 to 255 by 255"
            )
        return self

    @model_validator(mode="after")
    def _reject_reserved_options(self) -> Self:
        taken = _RESERVED_OPTIONS & self.options.keys()
        if taken:
            raise ValueError(
                f"options: {', '.join(sorted(taken))} cannot be set here; drop_path, init, mixer and "
                "activation_checkpointing are settings beside it, the others are fixed"
            )
        return self

    @property
    def is_as_named(self) -> bool:
        """Whether the name gives the whole architecture, so that timm and open_clip can build it from that alone."""
        entry = image_tower_entry(self.name)
        is_default = not self.options and self.mixer == type(self).model_fields["mixer"].default
        return is_default and entry is not None and entry.in_timm


class TextTowerConfig(_Tower):
    """The text tower: open_clip's transformer with CLIP's BPE, or a Hugging Face encoder with its tokenizer."""

    name: str = "open_clip"
    """``open_clip``, or ``transformers:NAME_OR_FOLDER``."""
    context_length: int = Field(77, ge=4)
    """Tokens per caption, start and end included; longer captions are cut."""
    width: int = Field(512, ge=8)
    """Channels (open_clip only)."""
    heads: int = Field(8, ge=1)
    """Attention heads (open_clip only)."""
    layers: int = Field(12, ge=1)
    """Blocks (open_clip only)."""
    causal: bool = True
    """Causal attention as in CLIP; false: every token sees the whole caption (open_clip only)."""
    pretrained: bool | str | None = None
    """Trained weights of the tower to start from: one half of ``open_clip:NAME/PRETRAINED``, a ``transformers:``
    encoder, a run directory or an exported folder; true: those that are published under the encoder's name; null: fresh
    ones."""
    lock: bool = False
    """Train the projection to the shared width and not the tower (LiT); see docs/starts.md."""
    unlocked_groups: int = Field(0, ge=0)
    """Last groups of a locked tower that are trained all the same: blocks, and the embeddings as the first group."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        entry = text_tower_entry(self.name)
        if entry is not None and "heads" not in entry.ignores and self.width % self.heads:
            raise ValueError(
                f"width={self.width} is not divisible by heads={self.heads}; use a multiple of {self.heads}"
            )
        return self

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        entry = text_tower_entry(self.name)
        if entry is not None:
            self.refuse_ignored(self.name, *entry.ignores)
        return self


class ModelConfig(Strict):
    """Two towers and the scale of the cosines between their embeddings."""

    embed_dim: int = Field(512, ge=8)
    """Width of the shared embedding."""
    image: ImageTowerConfig = ImageTowerConfig()
    text: TextTowerConfig = TextTowerConfig()
    init_logit_scale: float = 2.6592600369327783
    """Start of the logarithm of the scale of the cosines (CLIP, section 2.5: ln(1 / 0.07))."""
    max_logit_scale: float = math.log(100)
    """Upper bound of that logarithm, applied in the forward pass (CLIP, section 2.5: ln(100))."""

    @model_validator(mode="after")
    def _logarithms_of_the_scale(self) -> Self:
        for name in ("init_logit_scale", "max_logit_scale"):
            value = getattr(self, name)
            if value > _LARGEST_LOGIT_SCALE:
                raise ValueError(
                    f"{name}={value:g} is a logarithm, so cosines would be multiplied by exp({value:g}); "
                    f"ln({value:g}) is {math.log(value):.4g}"
                )
        if self.init_logit_scale < 0:
            raise ValueError(
                f"init_logit_scale={self.init_logit_scale:g} is the logarithm of the scale, not of the temperature: "
                f"cosines would be made smaller; {-self.init_logit_scale:g} is its inverse"
            )
        if self.max_logit_scale < self.init_logit_scale:
            raise ValueError(
                f"max_logit_scale={self.max_logit_scale:g} is below init_logit_scale={self.init_logit_scale:g}, so the "
                f"scale could not learn; both are logarithms (CLIP: ln(1 / 0.07) = 2.66 and ln(100) = 4.61)"
            )
        return self


class AugmentConfig(Strict):
    """Training-time augmentation; every draw is a pure function of (seed, sample position)."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop, as a fraction of the picture (open_clip's default)."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Aspect ratio of the random crop."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Largest rotation either way, in degrees; the corners are filled from the nearest edge."""
    flip: float = Field(0.0, ge=0, le=1)
    """Probability of a horizontal flip."""
    grey: float = Field(0.0, ge=0, le=1)
    """Probability of dropping the colours."""
    invert: float = Field(0.0, ge=0, le=1)
    """Probability of inverting the pixels."""
    recolour: float = Field(0.0, ge=0, le=1)
    """Probability of permuting and scaling the colour channels."""

    @property
    def is_fixed(self) -> bool:
        """Whether a picture is made into the same pixels each time: whole, and without any chance."""
        chances = (self.flip, self.grey, self.invert)
        return self.scale[0] == 1 and self.rotate == self.recolour == 0 and all(chance in (0, 1) for chance in chances)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={list(self.scale)} is no range of areas; use 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio={list(self.ratio)} is no range of aspect ratios; use 0 < low <= high")
        return self


class SourceConfig(Strict):
    """One source of several, in ``data.train``; what is null is as in ``data``."""

    source: Annotated[str, _AT_HOME]
    """Anything that ``data.train`` takes alone."""
    weight: float | None = Field(None, ge=0)
    """Its part of all samples, in any unit: 2 and 1 are two thirds and one third. All sources have one, or none: then
    each sample comes once per epoch. It may change at a resume; 0 leaves the source out."""
    first_caption: float | None = Field(None, ge=0, le=1)
    """As ``data.first_caption``."""
    joined_captions: float | None = Field(None, ge=0, le=1)
    """As ``data.joined_captions``."""
    caption_keys: list[str] | None = Field(None, min_length=1)
    """As ``data.caption_keys``."""
    use_keywords: bool | None = None
    """As ``data.use_keywords``."""
    use_labels: bool | None = None
    """As ``data.use_labels``."""
    templates: list[str] | None = Field(None, min_length=1)
    """As ``data.templates``."""
    augment: AugmentConfig | None = None
    """As ``data.augment``, which it replaces as a whole: a setting left out has its default."""

    @property
    def rules(self) -> dict[str, Any]:
        """What it sets beside its weight, as JSON."""
        return self.model_dump(mode="json", exclude={"source", "weight"}, exclude_none=True)


def source_of(entry: str | SourceConfig) -> str:
    """What an entry of ``data.train`` names."""
    return entry.source if isinstance(entry, SourceConfig) else entry


def _form_of(value: Any) -> str:
    """Which form of ``data.train``, or of an entry of it, a value has; messages then speak of that one alone."""
    if isinstance(value, list | tuple):
        return "<list>"
    return "<mapping>" if isinstance(value, dict | SourceConfig) else "<text>"


_Entry = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[SourceConfig, Tag("<mapping>")],
    Discriminator(_form_of, "source_form", "input should be a source, as text or as a mapping {source: ...}"),
]

_TrainSources = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[_Entry], Tag("<list>")],
    Discriminator(_form_of, "source_form", "input should be a source, or a list of sources"),
]


class DataConfig(Strict):
    """What is trained on."""

    train: Annotated[_TrainSources, _AT_HOME] = "emoji"
    """``emoji`` for the default corpus, or shards: paths, folders, patterns such as ``cc3m/{00000..00331}.tar``; or any
    other source that ``make_shards`` takes, such as a table or class folders: written as shards into the cache once.
    Or a list of sources, each as text or as a mapping with settings of its own, such as ``{source: cc3m, weight: 2}``
    (docs/data.md, "Several sources")."""
    val: Annotated[str | list[str] | float | None, BeforeValidator(_number_or_source)] = None
    """Pairs on which loss and retrieval are measured during training: any source that ``train`` takes; or a fraction
    of the training pairs, such as 0.01, chosen by a hash of shard name and sample number, which are then never trained
    on; null: none."""
    val_every: int = Field(500, ge=1)
    """Steps between these measurements, by all ranks; there is one after the last step, too."""
    val_max: int | None = Field(5000, ge=2)
    """Held-out pairs that are measured, chosen by hash and the same each time; null for all. Recall falls with their
    number."""
    label_space: Literal["source", "number", "name"] = "source"
    """When two pairs are of one class: ``source``, with one class number (``cls``) in one source, which is an entry of
    ``train`` or a part of one between ``::``; ``number``, with one class number anywhere; ``name``, with one name in
    ``class_names`` of their JSON, whatever its case, anywhere."""
    batch_size: int = Field(192, ge=1)
    """Pairs per optimiser step, over all ranks and accumulation steps together."""
    first_caption: float = Field(0.0, ge=0, le=1)
    """Probability of taking a sample's first caption outright."""
    joined_captions: float = Field(0.0, ge=0, le=1)
    """Probability of the first caption with one or two others, or keywords, behind or before it, joined by commas. In
    all other cases one caption is drawn evenly from all that the sample has; keywords never stand alone."""
    caption_keys: list[str] = Field(["txt", "captions", "caption"], min_length=1)
    """Where a sample's captions are read from, the first ones first: ``txt`` is its text, all others are keys of its
    JSON with one text or a list of texts."""
    use_keywords: bool = True
    """Read ``keywords`` of the JSON; false: leave them out."""
    use_labels: bool = True
    """Read class numbers (``cls``) and names: pairs of one class are positives for each other; false: every pair stands
    alone."""
    templates: list[str] | None = Field(None, min_length=1)
    """Prompts such as ``a photo of a {c}`` that take the place of captions: ``{c}`` stands for each of ``class_names``
    in the sample's JSON. Null: captions."""
    workers: int = Field(1, ge=0, le=1024)
    """Loader processes per rank; 0 reads in the training process. The samples and their order do not depend on it."""
    window_shards: int = Field(16, ge=1)
    """Samples are shuffled within windows of so many shards (shards are shuffled first)."""
    key_rule: Literal["first_dot", "last_dot"] = "first_dot"
    """Where the name of a member ends and its extension begins, within the file's own name: at the first dot, as in
    webdataset, or at the last one, for names such as ``IMG_2.0.jpg``."""
    max_faults: int = Field(1000, ge=0)
    """Stop with an error after so many broken samples on all ranks; each is replaced, counted and named in the log."""
    max_bad_shards: int = Field(0, ge=0)
    """Leave out up to so many shards that are missing, damaged or without pairs; all are named. With more, or with one
    by default, training does not start."""
    augment: AugmentConfig = AugmentConfig()

    @property
    def val_fraction(self) -> float:
        """The fraction of the training pairs that is held out; 0 where ``val`` is a source, or null."""
        return self.val if isinstance(self.val, float) else 0.0

    @property
    def entries(self) -> list[str | SourceConfig]:
        """The sources of ``train``."""
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def weights(self) -> list[float] | None:
        """The weight of each source; None where they are not weighted."""
        weights = [entry.weight for entry in self.entries if isinstance(entry, SourceConfig)]
        return [weight for weight in weights if weight is not None] or None

    def of_entries(self) -> list["DataConfig"]:
        """The settings that hold for each source: its own, and else these."""
        return [
            self.model_copy(update={name: getattr(entry, name) for name in entry.rules})
            if isinstance(entry, SourceConfig)
            else self
            for entry in self.entries
        ]

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        wheres = ["", *[f"train: {source_of(entry)}: " for entry in self.entries]]
        for where, data in zip(wheres, [self, *self.of_entries()], strict=True):
            if data.first_caption + data.joined_captions > 1:
                raise ValueError(
                    f"{where}first_caption={data.first_caption} and joined_captions={data.joined_captions} exceed 1; "
                    "lower one"
                )
            if without := [template for template in data.templates or () if "{c}" not in template]:
                raise ValueError(f"{where}templates: {without[0]!r} holds no {{c}}, where the name of the class goes")
        return self

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> Self:
        weights = self.weights
        without = [source_of(entry) for entry in self.entries if getattr(entry, "weight", None) is None]
        if weights and without:
            raise ValueError(f"train: {without[0]} has no weight and others have one; give a weight to all or to none")
        if weights and not any(weights):
            raise ValueError("train: all weights are 0; give one source a weight above 0")
        return self


class LossConfig(Strict):
    """What is minimised."""

    name: str = "contrastive"
    """A loss of ``focalclip.losses.LOSSES``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its function, such as ``{smoothing: 0.1}``."""


class TowerOptimConfig(Strict):
    """What differs for one tower, its projection included, from the settings of ``optim``."""

    lr: float | None = Field(None, gt=0)
    """Peak learning rate; it follows the same schedule. null: ``optim.lr``."""
    weight_decay: float | None = Field(None, ge=0)
    """Decoupled weight decay; null: ``optim.weight_decay``."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Each group of the tower, from the projection down to the stem, has this fraction of the learning rate of the one
    above it; null: all have the same."""


class OptimConfig(Strict):
    """Optimiser and learning-rate schedule; no weight decay on biases, norms and other 1-D tensors."""

    name: str = "adamw"
    """An optimiser of ``focalclip.training.optim.OPTIMIZERS``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its function, beside the settings below."""
    schedule: str = "cosine"
    """A schedule of ``focalclip.training.optim.SCHEDULES``: how the learning rate falls after the warm-up."""
    schedule_options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its function."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate at the batch size of this file; there is no hidden scaling."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the last step, at most ``lr``."""
    warmup_steps: int | None = Field(None, ge=0)
    """Steps of linear warm-up from 0, fewer than the run has; null: 100, or a tenth of the run where that is less."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of the running means of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to the denominator of Adam's update."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay."""
    clip_grad_norm: float = Field(1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 switches it off."""
    image: TowerOptimConfig = TowerOptimConfig()
    text: TowerOptimConfig = TowerOptimConfig()

    @model_validator(mode="after")
    def _decay_rates(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)} are no decay rates; use two numbers from 0 to below 1")
        return self

    @model_validator(mode="after")
    def _rates_in_order(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr={self.min_lr:g} is above lr={self.lr:g}, so the learning rate would rise; lower min_lr"
            )
        return self

    def warmup(self, total_steps: int) -> int:
        """Steps of warm-up in a run of ``total_steps``.

        Raises:
            UserError: if the run would end in its warm-up. (One step of warm-up has the full rate already.)
        """
        if self.warmup_steps is None:
            return min(100, total_steps // 10)
        if self.warmup_steps >= max(2, total_steps):
            raise UserError(
                f"optim.warmup_steps={self.warmup_steps:,} is not shorter than the run of {total_steps:,} steps, so "
                "the learning rate would only rise; lower it, or set null for a tenth of the run"
            )
        return self.warmup_steps


class TrainConfig(Strict):
    """How long, in what precision, on which engine settings."""

    alternatives: ClassVar[tuple[str, ...]] = ("steps", "epochs")

    steps: int | None = Field(1800, ge=1)
    """Optimiser steps; ``epochs`` given alone switches it off."""
    epochs: float | None = Field(None, gt=0, le=1_000_000)
    """Passes over the data, in the place of ``steps``."""
    init_from: Annotated[str | None, _AT_HOME] = None
    """Trained weights of both towers to start from: a run directory, an exported folder, ``open_clip:NAME/PRETRAINED``,
    or a file of FocalNet weights for the image tower alone; null: fresh ones. The section ``model`` describes the same
    model. (``model.image.pretrained`` and ``model.text.pretrained`` take one tower each.)"""
    feature_cache_gb: float = Field(1.0, ge=0)
    """Disk in the run directory, for each rank, for features of locked towers: what a tower has met is not computed
    again. Used where inputs come again: captions, and pictures that ``data.augment`` leaves as they are. 0: none."""
    accumulation: int = Field(1, ge=1)
    """Micro-batches per step. Each has its own negatives: this saves memory, it does not enlarge the contrast."""
    precision: Literal["fp32", "amp_bf16", "bf16", "fp16"] = "fp32"
    """``amp_bf16``: fp32 weights under autocast; ``bf16``/``fp16``: DeepSpeed's own with fp32 master weights."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of ``metrics.jsonl``."""
    save_every: int = Field(500, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that stay on disk."""
    max_skipped_steps: int = Field(20, ge=0)
    """Steps in a row that are skipped because their loss or gradient is not finite, before the run returns to its last
    checkpoint and goes on with the data that follow. (fp16 may need 18 to find its loss scale.)"""
    max_rollbacks: int = Field(1, ge=0)
    """Times that a run returns to a checkpoint; then it stops."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class EvalConfig(Strict):
    """What is measured zero-shot: whole after the last step, and a part of it in between."""

    benchmark: Annotated[str | None, _AT_HOME] = "demo"
    """Benchmark to run (see ``eval/zeroshot.py --help``); null for none."""
    data_root: Annotated[str | None, _AT_HOME] = None
    """Folder that holds one folder for each task of a benchmark that is named; null: its data is fetched at need."""
    tasks: list[str] | None = Field(None, min_length=1)
    """Ids of the tasks to run; null for all."""
    every: int | None = Field(None, ge=1)
    """Steps between evaluations during training, by all ranks, logged in ``metrics.jsonl`` and TensorBoard; null:
    only at the end."""
    max_images: int | None = Field(1000, ge=1)
    """Images per task of those in between, evenly spaced and the same each time; null for all."""

    @model_validator(mode="after")
    def _every_what(self) -> Self:
        without = [name for name in ("every", "data_root", "tasks") if getattr(self, name) is not None]
        if without and self.benchmark is None:
            values = ", ".join(f"{name}={getattr(self, name)}" for name in without)
            raise ValueError(f"{values} would be ignored without a benchmark; name one, or set null")
        return self


class RunConfig(Strict):
    """Everything that decides a run."""

    other_names: ClassVar[Mapping[str, str]] = _OTHER_NAMES

    name: str = "demo"
    """The run directory is ``runs/NAME``."""
    runs_dir: Annotated[str, _AT_HOME] = "runs"
    """Folder of the run directories."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seeds initialisation, sample order and augmentation."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _one_folder(self) -> Self:
        if not is_plain_name(self.name):
            raise ValueError(f"name={self.name!r} is not the name of one folder; where it lies is set by runs_dir")
        return self

    @model_validator(mode="after")
    def _two_pairs(self) -> Self:
        batch_size, accumulation = self.data.batch_size, self.train.accumulation
        if batch_size < 2 * accumulation:
            raise ValueError(
                f"data.batch_size={batch_size} with train.accumulation={accumulation} leaves micro-batches of fewer "
                f"than two pairs, so there is nothing to contrast with; use a batch_size of {2 * accumulation} or more"
            )
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.train.steps is not None:  # a length in epochs is known when the data is
            self.optim.warmup(self.train.steps)
        return self

    @property
    def run_dir(self) -> Path:
        """``runs_dir/name``."""
        return Path(self.runs_dir) / self.name


def config_dir() -> Path:
    """Folder of the shipped configurations: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(path.stem for path in config_dir().glob("*.yaml"))


def load_config(source: str | Path) -> RunConfig:
    """Read and validate a configuration.

    A file may name another one with ``base: NAME``. It then says what it changes from that one instead of from the
    defaults: sections are merged setting by setting, everything else (free ``options`` included) is replaced. A base
    has no base itself.

    Args:
        source: path of a file, or the bare name of a shipped configuration. A path is tried first.

    Raises:
        UserError: if there is no such file, it is not valid, or its base has a base.
    """
    path = find_config(source)
    values = read_yaml(path)
    if (base := values.pop("base", None)) is not None:
        below = read_yaml(find_config(base, path))
        if "base" in below:
            raise UserError(f"{path}: base: {base} has a base itself; name {below['base']}, or write the settings out")
        values = merged(RunConfig, below, values)
    return from_dict(RunConfig, values, str(path))


def find_config(source: str | Path, named_in: Path | None = None) -> Path:
    """The file of a configuration that is given by path or by bare name.

    Args:
        source: path or name.
        named_in: the file that names it as its base, whose folder is looked into as well.

    Raises:
        UserError: if neither is there.
    """
    where = f"{named_in}: base: " if named_in else ""
    if not isinstance(source, str | Path):
        raise UserError(f"{where}{source!r} is not the name of a configuration; known are {', '.join(config_names())}")
    path = user_path(source)
    tried = [path, *([named_in.parent / path, named_in.parent / f"{path}.yaml"] if named_in else [])]
    if path.name == str(source):
        tried.append(config_dir() / f"{path}.yaml")
    found = next((candidate for candidate in tried if candidate.is_file()), None)
    if found is None:
        raise UserError(
            f"{where}{source}: no such configuration file; give a path, or one of the names {', '.join(config_names())}"
        )
    return found
