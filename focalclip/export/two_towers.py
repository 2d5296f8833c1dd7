"""Both towers, as open_clip and transformers have them."""

from pathlib import Path
from typing import Any

from focalclip.errors import UserError
from focalclip.export.image_tower import image_processor, write_transformers_tower
from focalclip.export.trained import Trained
from focalclip.models.registries.timm_registry import needs_focalclip
from focalclip.models.sources import store
from focalclip.models.text import HUGGING_FACE
from focalclip.models.towers import TIMM

TOWER = "image_tower"


def write_open_clip(trained: Trained, folder: Path) -> list[str]:
    """Write an exported folder (see :mod:`focalclip.models.sources.store`)."""
    store.write_files(trained.model, folder, trained.provenance)
    config = store.exported_config(trained.model.config)
    name = config.image.name.removeprefix(TIMM)
    notes = [f"open_clip builds {name} only after `import focalclip`."] if needs_focalclip(name) else []
    if config.text.name == f"{HUGGING_FACE}.":
        notes.append("open_clip looks for the text encoder in the working directory: start it inside the folder.")
    return notes


def open_clip_usage(trained: Trained, folder: str) -> str:
    """Python that loads both towers."""
    name = trained.model.config.image.name.removeprefix(TIMM)
    ours = "import focalclip  # registers the image tower with timm\n" if needs_focalclip(name) else ""
    return f"""{ours}import open_clip

name = "local-dir:{folder}"  # hf-hub:ORG/NAME from the hub
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)
image = model.eval().encode_image(preprocess(picture)[None], normalize=True)
text = model.encode_text(tokenizer(["a dog", "a cat"]), normalize=True)
probabilities = (model.logit_scale.exp() * image @ text.T).softmax(-1)"""


def write_transformers(trained: Trained, folder: Path) -> list[str]:
    """Write ``FocalCLIPModel`` with its processor, and the image tower as transformers' own ``FocalNetModel``.

    Raises:
        UserError: if transformers has no such preprocessing.
    """
    import transformers

    from focalclip.models.registries.transformers_clip import FocalCLIPModel
    from focalclip.models.registries.transformers_config import FocalCLIPConfig

    model = trained.model
    encoder = None
    if model.config.text.name.startswith(HUGGING_FACE):
        encoder = model.text.config.to_dict()  # pyrefly: ignore
        encoder.pop("_name_or_path", None)  # where it lay on this machine
    config = FocalCLIPConfig(
        model=store.exported_config(model.config).model_dump(mode="json"),
        text_encoder=encoder,
    )
    processor = transformers.CLIPProcessor(image_processor(model.config.image), _tokenizer(model))
    theirs = FocalCLIPModel(config)
    theirs.model.load_state_dict(model.state_dict())
    theirs.save_pretrained(folder)
    processor.save_pretrained(folder)
    notes = ["transformers knows the two-tower model only after `import focalclip`."]
    try:
        write_transformers_tower(model, folder / TOWER)
    except UserError as error:
        return [*notes, f"There is no {TOWER}/ for use without focalclip: {error}."]
    return notes


def _tokenizer(model: Any) -> Any:
    """The tokenizer as one of transformers'; CLIP's is built from the tables that open_clip ships."""
    if model.config.text.name.startswith(HUGGING_FACE):
        return model.tokenizer.tokenizer
    from transformers import CLIPTokenizer

    ours, names = model.tokenizer.tokenizer, {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    return CLIPTokenizer(
        vocab={names.get(token, token): number for token, number in ours.encoder.items()},
        merges=list(ours.bpe_ranks),
        model_max_length=model.config.text.context_length,
    )


def transformers_usage(trained: Trained, folder: str) -> str:
    """Python that loads both towers, and the image tower alone."""
    from focalclip.export.image_tower import why_not_transformers

    both = f"""\
import focalclip  # registers the model with transformers
import transformers

# backend="pil": Pillow's resize, which training had; torchvision's, the default of transformers, differs a little
images = transformers.AutoImageProcessor.from_pretrained("{folder}", backend="pil")
classify = transformers.pipeline("zero-shot-image-classification", model="{folder}", image_processor=images)
classify(picture, candidate_labels=["a dog", "a cat"], hypothesis_template="{{}}")

model = transformers.AutoModel.from_pretrained("{folder}")
processor = transformers.AutoProcessor.from_pretrained("{folder}")
processor.image_processor = images
outputs = model(**processor(text=["a dog", "a cat"], images=picture, return_tensors="pt", padding=True))"""
    if why_not_transformers(trained.model.visual.trunk):
        return both
    return f"""{both}

# the image tower alone, without focalclip
tower = transformers.FocalNetModel.from_pretrained("{folder}", subfolder="{TOWER}")
images = transformers.AutoImageProcessor.from_pretrained("{folder}", subfolder="{TOWER}", backend="pil")
features = tower(**images(picture, return_tensors="pt")).pooler_output"""
