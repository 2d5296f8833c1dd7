"""Training that starts from trained weights: strictly loaded, then compared with their source on one picture."""

from typing import Any

import torch
from PIL import Image

from focalclip.base.errors import UserError
from focalclip.base.files import user_path
from focalclip.interop.folder import our_weights
from focalclip.interop.load import is_weights_file, load, load_image_encoder
from focalclip.interop.open_clip import OpenClipModel
from focalclip.models.clip import FocalCLIP
from focalclip.models.weights import load_strictly

_KINDS = "a run directory, an exported folder, open_clip:NAME/PRETRAINED, or a file of FocalNet weights"

_CAPTION = "a picture of a cat"

_TOLERANCE = 1e-3  # of unit vectors; float32 rounding is a hundred times less, a wrong activation a hundred times more


def check_source(source: str) -> None:
    """Check before the work that there is something to start from, where that is known from the name.

    Raises:
        UserError: if nothing is there.
    """
    if ":" not in source and not user_path(source).exists():
        raise UserError(f"train.init_from {source}: no such file or folder; give {_KINDS}")


def start_from(model: FocalCLIP, source: str) -> None:
    """Copy the weights of ``source`` into a freshly built model.

    Names and shapes do not determine the model (attention heads, activations, means and deviations of pixels), so both
    models embed one picture and one caption, and the embeddings must agree.

    Args:
        model: as the configuration builds it.
        source: a run directory, an exported folder, ``open_clip:NAME/PRETRAINED`` with a tower of timm, or a file of
            FocalNet weights for the image tower alone.

    Raises:
        UserError: if there is nothing at ``source``, or it is another model than the configuration's.
    """
    picture = Image.new("RGB", (64, 64), (200, 120, 40))
    images = model.preprocess(picture)[None]
    try:
        if is_weights_file(source):
            encoder = load_image_encoder(source)
            _copy(model.visual.trunk, encoder.tower.state_dict(), source)
            _compare(model.visual.trunk, encoder, images, images, "the image tower", source)
            return
        trained = load(source)
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from None
    if not isinstance(trained, FocalCLIP | OpenClipModel):
        raise UserError(f"train.init_from: {source}: models of transformers are not trained here; export to open_clip")
    is_ours = isinstance(trained, FocalCLIP)
    _copy(model, trained.state_dict() if is_ours else our_weights(trained.model.state_dict(), model), source)
    _compare(model.encode_image, trained.encode_image, images, trained.preprocess(picture)[None], "images", source)
    tokens = model.tokenizer([_CAPTION]), trained.tokenizer([_CAPTION])
    _compare(model.encode_text, trained.encode_text, *tokens, "captions", source)


def _copy(module: Any, weights: dict[str, torch.Tensor], source: str) -> None:
    remedy = "describe the same model in the section model, without a feature_norm, which an export folds in"
    load_strictly(module, weights, f"train.init_from: {source}", remedy=remedy)


@torch.no_grad()
def _compare(
    ours: Any, theirs: Any, our_input: torch.Tensor, their_input: torch.Tensor, what: str, source: str
) -> None:
    """Raise UserError unless two encoders agree in direction, by their cosine."""
    cosine = torch.cosine_similarity(ours(our_input).float(), theirs(their_input).float()).item()
    if not cosine > 1 - _TOLERANCE:
        raise UserError(
            f"train.init_from: {source}: its embeddings of {what} differ here (cosine {cosine:.4f}), so the section "
            "model describes another model; take heads, activations, image_size, mean and std from the source"
        )
