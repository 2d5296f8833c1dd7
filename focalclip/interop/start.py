"""Training that starts from trained weights: strictly loaded, then compared with their source.

``train.init_from`` names a whole model, ``model.image.pretrained`` and ``model.text.pretrained`` one tower each. Names
and shapes do not determine a model (attention heads, activations, pixel statistics), so what was loaded and its source
both embed two pictures or two captions, and the results must agree. Whatever stays at fresh weights is said.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from focalclip import names
from focalclip.base.errors import UserError
from focalclip.base.files import user_path
from focalclip.config import ModelConfig, RunConfig
from focalclip.interop import folder as store
from focalclip.interop.encoder import TowerWeights
from focalclip.interop.folder import our_weights
from focalclip.interop.load import exported_folder, is_weights_file, load, load_image_encoder
from focalclip.interop.open_clip import OpenClipModel
from focalclip.models.clip import FocalCLIP
from focalclip.models.focalnet import FocalNet
from focalclip.models.lock import without_projection
from focalclip.models.norm import GlobalBatchNorm
from focalclip.models.text import text_entry
from focalclip.models.weights import load_strictly
from focalclip.models.weights.convert import read_weights

_KINDS = "a run directory, an exported folder, open_clip:NAME/PRETRAINED, or a file of FocalNet weights"

_CAPTIONS = ["a picture of a cat", "two dogs"]

_TOLERANCE = 3e-3  # over the size of embeddings; float32 rounding is a hundred times less, a wrong activation more

_LEAST_APART = 1e-2  # two inputs closer than this, over the size of embeddings, differ by rounding too

_SAME_PIXELS = 1e-3  # between means and deviations: libraries round them to three digits or more

_DISPUTED = ("focalnet_large_fl4", "focalnet_xlarge_fl4")  # see load_focalnet: the tower's own flag is taken


def check_sources(config: RunConfig) -> None:
    """Check before the work that there is something to start from, where that is known from the names.

    Raises:
        UserError: if nothing is there, or it has not the tower that is wanted.
    """
    source = config.train.init_from
    if source is not None:
        prefix = names.split(source)[0]
        if prefix and names.SOURCES[prefix].model is None:
            raise UserError(
                f"train.init_from: {source}: an image tower without a text tower; set it as model.image.pretrained"
            )
        if ":" not in source and not user_path(source).exists():
            raise UserError(f"train.init_from {source}: no such file or folder; give {_KINDS}")
    for tower in ("image", "text"):
        _source_of(config.model, tower)


def start(model: FocalCLIP, init_from: str | None = None) -> list[str]:
    """Load what ``train.init_from``, ``model.image.pretrained`` and ``model.text.pretrained`` name.

    Args:
        model: freshly built from its configuration, in evaluation mode.
        init_from: source of both towers, or of the image tower alone.

    Returns:
        One line for each part: where its weights come from.

    Raises:
        UserError: if there is nothing at a source, or it is another model than the configuration's.
    """
    config = model.config
    loaded = {"image": "fresh weights", "text": "fresh weights"}
    covered: tuple[str, ...] = ()
    if init_from is not None:
        start_from(model, init_from)
        covered = ("image",) if is_weights_file(init_from) else ("image", "text")
        fresh = "; its projection is fresh" if is_weights_file(init_from) else ""
        loaded |= dict.fromkeys(covered, f"{init_from} (train.init_from){fresh}")
    for tower, load_tower in (("image", _load_image), ("text", _load_text)):
        source = _source_of(config, tower)
        if source is None:
            continue
        if tower in covered:
            loaded[tower] += f", which has this tower too: model.{tower}.pretrained is not used"
        else:
            loaded[tower] = load_tower(model, source)
    return [f"{tower} tower: {what}" for tower, what in loaded.items()] if init_from or _has_sources(config) else []


def load_pretrained(model: FocalCLIP) -> None:
    """Load what ``model.image.pretrained`` and ``model.text.pretrained`` of its configuration name.

    Raises:
        UserError: as :func:`start` does.
    """
    start(model.eval())
    model.train()


def start_from(model: FocalCLIP, source: str) -> None:
    """Copy the weights of ``source`` into a freshly built model.

    Args:
        model: as the configuration builds it. With ``feature_norm`` the statistics are those that the source was
            trained with, which exported folders tell.
        source: a run directory, an exported folder, ``open_clip:NAME/PRETRAINED`` with a tower of timm, or a file of
            FocalNet weights for the image tower alone.

    Raises:
        UserError: if there is nothing at ``source``, or it is another model than the configuration's.
    """
    try:
        if is_weights_file(source):
            _load_image(model, source, "train.init_from")
            return
        trained = _folder_model(model, source) or load(source)
    except UserError as error:
        raise UserError(f"train.init_from: {str(error).removeprefix('train.init_from: ')}") from None
    if not isinstance(trained, FocalCLIP | OpenClipModel):
        raise UserError(f"train.init_from: {source}: models of transformers are not trained here; export to open_clip")
    is_ours = isinstance(trained, FocalCLIP)
    weights = trained.state_dict() if is_ours else our_weights(trained.model.state_dict(), model)
    remedy = "describe the same model in the section model"
    if isinstance(model.visual.norm, GlobalBatchNorm) and "visual.norm.running_mean" not in weights:
        remedy += " and set model.image.feature_norm=none, as the source tells no statistics of a feature_norm"
    load_strictly(model, weights, f"train.init_from: {source}", remedy=remedy)
    where, remedy = f"train.init_from: {source}", "take heads, activations, image_size, mean and std from the source"
    _compare(model.encode_image, trained.encode_image, _images(model), _images(trained), where, remedy)
    tokens = model.tokenizer(_CAPTIONS), trained.tokenizer(_CAPTIONS)
    _compare(model.encode_text, trained.encode_text, *tokens, where, remedy)


def _has_sources(config: ModelConfig) -> bool:
    return config.image.pretrained is not None or config.text.pretrained is not None


def _source_of(config: ModelConfig, tower: str) -> str | None:
    """The source that ``pretrained`` of a tower names; None if its weights are fresh.

    Raises:
        UserError: if there is no such source, or it has no such tower.
    """
    settings = getattr(config, tower)
    source, kind = settings.pretrained, f"{tower}_weights"
    if source is None:
        return None
    setting = f"model.{tower}.pretrained"
    if source is True:
        source = settings.name
        if not names.split(source)[0]:
            entry = names.image_tower_entry(source) if tower == "image" else None
            if entry is None or entry.published is None:
                raise UserError(
                    f"{setting}=true: no weights are published under the name {source}; name a source: "
                    f"{names.sources(kind)}"
                )
            source = f"{names.TIMM}{source}"
    prefix, rest = names.split(source)
    if prefix and getattr(names.SOURCES[prefix], kind) is None:
        raise UserError(f"{setting}: {source}: no {tower} towers have this prefix; give one of: {names.sources(kind)}")
    if not prefix and tower == "text" and is_weights_file(source):
        raise UserError(
            f"{setting}: {source}: a file of weights is for the image tower; give a checkpoint of open_clip as "
            "open_clip:ARCHITECTURE/PATH"
        )
    if not prefix and not user_path(source).exists():
        raise UserError(f"{setting}: {source}: no such file or folder; give one of: {names.sources(kind)}")
    return prefix + rest


def _folder_model(model: FocalCLIP, source: str) -> FocalCLIP | None:
    """The model of a run directory or exported folder, its feature_norm as ``model`` has it where that can be."""
    if not user_path(source).is_dir():
        return None
    return store.read(exported_folder(source, "model"), unfold=isinstance(model.visual.norm, GlobalBatchNorm))


def _load_image(model: FocalCLIP, source: str, setting: str = "model.image.pretrained") -> str:
    """Load the image tower of ``source`` and, where it has a projection of our width, that; says what was loaded."""
    where = f"{setting}: {source}"
    config, trunk = model.config.image, model.visual.trunk
    found = _named(setting, lambda: _image_weights(model, source))
    norm = None
    if isinstance(found, FocalCLIP):
        norm = found.visual.norm if isinstance(found.visual.norm, GlobalBatchNorm) else None
        found = _image_of(found, trunk)
    _check_pixels(model, found, where)
    entry = names.image_tower_entry(config.name)
    fitted = []
    if entry is not None and entry.load is not None:
        fitted = names.find(entry.load)(trunk, config, found.weights, where)
    else:
        load_strictly(trunk, found.weights, where, remedy="name the tower of these weights as model.image.name")
    if found.encode is not None and not fitted:
        images = _images(model)
        remedy = "name the tower of these weights as model.image.name, with its options"
        _compare(trunk, found.encode, images, images, where, remedy, is_size_free=True)
    kept = _load_projection(model, found, norm)
    return _said(source, len(trunk.state_dict()), fitted, kept)


def _image_weights(model: FocalCLIP, source: str) -> TowerWeights | FocalCLIP:
    prefix, rest = names.split(source)
    if prefix:
        return names.find(names.SOURCES[prefix].image_weights or "")(rest)
    if not is_weights_file(source):
        found = _folder_model(model, source)
        assert found is not None
        return found
    weights, _ = read_weights(source)
    trunk = model.visual.trunk
    if not isinstance(trunk, FocalNet):
        return TowerWeights(weights)
    name = model.config.image.name
    flags: dict[str, Any] = {"normalize_modulator": trunk.config.normalize_modulator} if name in _DISPUTED else {}
    encoder = load_image_encoder(source, **flags)
    statistics = names.find("focalclip.interop.timm:focalnet_statistics")(name)
    return TowerWeights(weights, encode=encoder.tower, mean=statistics[0], std=statistics[1])


def _image_of(theirs: FocalCLIP, trunk: nn.Module) -> TowerWeights:
    """The image tower of a model of ours: by its own names where they are those of ``trunk``, else by timm's."""
    image, visual = theirs.config.image, theirs.visual
    weights, entry = visual.trunk.state_dict(), names.image_tower_entry(image.name)
    if weights.keys() != trunk.state_dict().keys() and entry is not None and entry.to_timm is not None:
        weights = names.find(entry.to_timm)(weights)
    projection = visual.proj.weight, visual.proj.bias
    return TowerWeights(weights, projection, visual.trunk, mean=image.mean, std=image.std)


def _check_pixels(model: FocalCLIP, found: TowerWeights, where: str) -> None:
    """Raise UserError unless the pixels are scaled as they were for these weights."""
    for name, theirs in (("mean", found.mean), ("std", found.std)):
        ours = getattr(model.config.image, name)
        if theirs is not None and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) > _SAME_PIXELS:
            values = " ".join(f"{value:.7g}" for value in theirs)
            raise UserError(
                f"{where}: was trained on pixels of another {name} than model.image.{name}={list(ours)}; set "
                f"--model.image.{name} {values}"
            )


@torch.no_grad()
def _load_projection(model: FocalCLIP, found: TowerWeights, norm: GlobalBatchNorm | None) -> bool:
    """Take over the projection where it is linear, of our width, and behind the same normalisation."""
    visual = model.visual
    is_alike = isinstance(visual.norm, GlobalBatchNorm) == (norm is not None)
    if found.projection is None or found.projection[0].shape != visual.proj.weight.shape or not is_alike:
        return False
    weight, bias = found.projection
    visual.proj.weight.copy_(weight)
    visual.proj.bias.copy_(torch.zeros_like(visual.proj.bias) if bias is None else bias)
    if norm is not None:
        visual.norm.load_state_dict(norm.state_dict())
    return True


def _load_text(model: FocalCLIP, source: str) -> str:
    """Load the text tower of ``source`` and, where its projection is as ours, that; says what was loaded."""
    setting = "model.text.pretrained"
    where = f"{setting}: {source}"
    found = _named(setting, lambda: _text_weights(model, source))
    entry, tower = text_entry(model.config.text), model.text
    projection = entry.projection
    if projection is None:
        raise UserError(f"{setting}: towers named {model.config.text.name} take no weights of others; leave it out")
    if isinstance(found, FocalCLIP):
        found = _text_of(found)
    own = tower.state_dict()
    weights = dict(found.weights)
    fitted = names.find(entry.fit)(tower, weights) if entry.fit else []
    ours = {name: x for name, x in own.items() if name.split(".")[0] == projection}
    theirs = {name: weights.pop(name) for name in list(weights) if name.split(".")[0] == projection}
    kept = {n: x.shape for n, x in ours.items()} == {n: x.shape for n, x in theirs.items()}
    weights |= theirs if kept else ours
    load_strictly(tower, weights, where, remedy="describe the same tower in the section model.text")
    if found.encode is not None and not fitted:
        tokens = model.tokenizer(_CAPTIONS), found.tokenizer(_CAPTIONS)
        remedy = "take name, heads, causal and the rest of model.text from the source"
        with without_projection(tower, projection):
            _compare(tower, found.encode, *tokens, where, remedy)
    return _said(source, len(own) - len(ours), fitted, kept)


def _text_weights(model: FocalCLIP, source: str) -> TowerWeights | FocalCLIP:
    prefix, rest = names.split(source)
    if prefix:
        return names.find(names.SOURCES[prefix].text_weights or "")(rest, model.config.text)
    found = _folder_model(model, source)
    assert found is not None
    return found


def _text_of(theirs: FocalCLIP) -> TowerWeights:
    """The text tower of a model of ours."""
    weights = theirs.text.state_dict()
    projection = text_entry(theirs.config.text).projection
    if projection is None:
        return TowerWeights(weights, tokenizer=theirs.tokenizer)

    def encode(tokens: Tensor) -> Tensor:
        with without_projection(theirs.text, projection):
            return theirs.text(tokens)

    return TowerWeights(weights, encode=encode, tokenizer=theirs.tokenizer)


def _images(model: Any) -> Tensor:
    """Two pictures as the input of a model: one colour, and lines."""
    lines = Image.linear_gradient("L").resize((64, 64)).rotate(30)
    pictures = (Image.new("RGB", (64, 64), (200, 120, 40)), lines.convert("RGB"))
    return torch.stack([model.preprocess(picture) for picture in pictures])


def _said(source: str, tensors: int, fitted: list[str], has_projection: bool) -> str:
    parts = [f"{source}, {tensors} tensors"]
    parts += [f"fitted: {', '.join(fitted)}"] if fitted else []
    return "; ".join([*parts, "its projection too" if has_projection else "the projection is fresh"])


def _named(setting: str, work: Any) -> Any:
    """Do ``work``; a UserError gets the name of the setting."""
    try:
        return work()
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None


@torch.no_grad()
def _compare(
    ours: Any, theirs: Any, our_input: Tensor, their_input: Tensor, where: str, remedy: str, is_size_free: bool = False
) -> None:
    """Raise UserError unless two encoders of two inputs agree in one result and in the difference of both.

    Features of all inputs may have one large part in common, which would hide what differs.

    With ``is_size_free`` theirs may be for another resolution, at which they cannot be compared.
    """
    what = "images" if our_input.is_floating_point() else "captions"
    try:
        expected = theirs(their_input).double()
    except (AssertionError, RuntimeError, UserError):
        if is_size_free:
            return
        raise
    found = ours(our_input).double()
    apart, least = expected[0] - expected[1], _LEAST_APART * expected[0].norm()
    errors = (
        (found[0] - expected[0]).norm() / expected[0].norm(),
        (found[0] - found[1] - apart).norm() / apart.norm().clamp(min=least),
    )
    error = max(x.item() for x in errors)
    if not error < _TOLERANCE:
        raise UserError(
            f"{where}: its embeddings of {what} differ here (by {error:.2%}), so the section model describes another "
            f"model; {remedy}"
        )
