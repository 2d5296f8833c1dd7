"""Everything about open_clip: its text tower and tokenizer, its trained models behind our interface, the export."""

import heapq
import re
import textwrap
import warnings
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focalclip.base.errors import UserError
from focalclip.base.files import home_expanded
from focalclip.config import TextTowerConfig
from focalclip.data.images import to_rgb
from focalclip.interop import folder as store
from focalclip.interop.card import Trained
from focalclip.interop.encoder import ForeignTower, ImageEncoder, TowerWeights
from focalclip.interop.register import needs_focalclip
from focalclip.models.text import first_tokens, lengths_to_the_end
from focalclip.names import OPEN_CLIP, split

_SCHEMES = ("hf-hub:", "local-dir:")

_SHORT_WORD = 64  # bytes; open_clip's own loop is the faster one up to about here

_CACHED_WORDS = 1 << 16

# Such as "&amp;amp;amp;": ftfy unescapes one level in each pass over the text, until nothing is left to unescape.
_NESTED_AMPERSANDS = re.compile(r"&(?:(?:amp|AMP|#0{0,9}38|#[xX]0{0,9}26);){8,}")


def create_text_transformer(config: TextTowerConfig, embed_dim: int) -> nn.Module:
    """open_clip's ``TextTransformer``, ending in a linear projection to ``embed_dim``."""
    from open_clip.transformer import TextTransformer

    tower = TextTransformer(
        context_length=config.context_length,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        output_dim=embed_dim,
        no_causal_mask=not config.causal,
    )
    tower.transformer.register_forward_pre_hook(_cut_mask, with_kwargs=True)
    return tower


def _cut_mask(transformer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:  # noqa: ARG001
    """Fit the causal mask to captions shorter than the context (open_clip 3.3 always passes the whole one)."""
    length = args[0].shape[1]
    mask = kwargs["attn_mask"]
    return args, kwargs | {"attn_mask": mask if mask is None else mask[:length, :length]}


class ByteLevelTokenizer:
    """CLIP's byte-pair encoding, from open_clip; cut to the longest caption of the list where that changes nothing.

    Under causal attention no token sees the padding behind it, so shorter rows give the same embeddings; captions of a
    few words then cost a fraction of the full context.

    Tokens are those of open_clip, which encodes whole captions however long, takes quadratic time in the length of a
    word and keeps every word it has met; here the cost of a caption and the memory are bounded.
    """

    def __init__(self, config: TextTowerConfig) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.tokenizer = SimpleTokenizer(context_length=config.context_length)
        self.context_length = config.context_length
        self.causal = config.causal
        self._special_words = dict(self.tokenizer.cache)
        self._known: dict[str, list[int]] = {}

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokens (B, L), int64, L at most the context length."""
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        room = self.context_length - 2
        rows = [[start, *first_tokens(text, room, self._encode)[:room], end] for text in texts]
        tokens = torch.zeros(len(rows), self.context_length, dtype=torch.int64)
        for row, own in zip(tokens, rows, strict=True):
            row[: len(own)] = torch.tensor(own)
        if not self.causal or len(tokens) == 0:
            return tokens
        return tokens[:, : int(lengths_to_the_end(tokens).max())].contiguous()

    def _encode(self, text: str, count: int) -> list[int]:
        """``SimpleTokenizer.encode``, ended after ``count`` tokens."""
        bpe = self.tokenizer
        tokens: list[int] = []
        if text.isascii() and text.isprintable() and "&" not in text:  # ftfy and html.unescape change nothing
            text = " ".join(text.split()).lower()
        else:
            if "<" not in text:  # else ftfy leaves entities alone
                text = _NESTED_AMPERSANDS.sub("&amp;", text)
            text = bpe.clean_fn(text)
        for match in bpe.pat.finditer(text):
            tokens += self._known.get(match[0]) or self._tokens_of(match[0])
            if len(tokens) >= count:
                break
        return tokens

    def _tokens_of(self, letters: str) -> list[int]:
        """Tokens of one word, which are kept if it is short."""
        bpe = self.tokenizer
        word = "".join(bpe.byte_encoder[byte] for byte in letters.encode())
        is_short = len(word) <= _SHORT_WORD
        tokens = [bpe.encoder[part] for part in (bpe.bpe(word).split(" ") if is_short else _merge(word, bpe.bpe_ranks))]
        if len(self._known) > _CACHED_WORDS:
            self._known, bpe.cache = {}, dict(self._special_words)
        if is_short:
            self._known[letters] = tokens
        return tokens


def _merge(word: str, ranks: dict[tuple[str, ...], int]) -> list[str]:
    """``SimpleTokenizer.bpe`` in O(n log n): pairs are merged by rank, equal ones from left to right.

    open_clip merges all equal pairs in one pass. That is the same order, as the parts of each pair in CLIP's table are
    single letters or come from pairs of lower rank.
    """
    parts: list[str | None] = [*word[:-1], word[-1] + "</w>"]
    left, right = [i - 1 for i in range(len(parts))], [i + 1 for i in range(len(parts))]
    heap: list[tuple[int, int, int]] = []

    def rank(i: int, j: int) -> int | None:
        return ranks.get((parts[i], parts[j])) if i >= 0 and j < len(parts) else None  # pyrefly: ignore[bad-argument-type]

    def push(i: int, j: int) -> None:
        if (found := rank(i, j)) is not None:
            heapq.heappush(heap, (found, i, j))

    for i in range(len(parts) - 1):
        push(i, i + 1)
    while heap:
        found, i, j = heapq.heappop(heap)
        if right[i] != j or rank(i, j) != found:
            continue  # one of the two has been merged since
        parts[i], parts[j] = f"{parts[i]}{parts[j]}", None
        right[i] = right[j]
        if right[i] < len(parts):
            left[right[i]] = i
        push(left[i], i)
        push(i, right[i])
    return [part for part in parts if part is not None]


def text_config(config: TextTowerConfig) -> dict[str, Any]:
    """The text tower in open_clip's ``text_cfg``."""
    return {
        "width": config.width, "heads": config.heads, "layers": config.layers, "no_causal_mask": not config.causal,
    }  # fmt: skip


class OpenClipModel(nn.Module):
    """A model of open_clip with its preprocessing and tokenizer.

    Args:
        name: ``ARCHITECTURE/PRETRAINED`` with a tag of open_clip's or the path of a checkpoint, ``hf-hub:ORG/NAME`` or
            ``local-dir:FOLDER``.

    Raises:
        UserError: if open_clip has no such weights, or cannot load them.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        import open_clip

        name = _at_home(name)
        self.model, preprocess = _create(name)
        self.preprocess = _from_any_picture(preprocess)
        architecture = name if name.startswith(_SCHEMES) else name.partition("/")[0]
        self.tokenizer = _call(name, partial(open_clip.get_tokenizer, architecture))
        if hasattr(inner := getattr(self.tokenizer, "tokenizer", None), "get_vocab"):
            from focalclip.interop.transformers import check_vocabulary

            check_vocabulary(inner, f"{OPEN_CLIP}{name}")

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Embed normalised images (B, 3, H, W) as (B, D)."""
        return self.model.encode_image(images, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Embed tokens (B, L) as (B, D); L may be less than the context where :meth:`text_lengths` gives lengths."""
        length, context = tokens.shape[1], self.model.context_length
        if length == context or self.text_lengths(tokens) is None:
            return self.model.encode_text(tokens, normalize=normalize)
        # open_clip adds the positions of the whole context; the blocks then see the first ones alone
        hook = self._text.transformer.register_forward_pre_hook(partial(_cut, length), with_kwargs=True)
        try:
            return self.model.encode_text(F.pad(tokens, (0, context - length)), normalize=normalize)
        finally:
            hook.remove()

    def text_lengths(self, tokens: Tensor) -> Tensor | None:
        """Number of leading tokens of each row (B, L) that its embedding depends on: (B,); None where all count.

        Those up to the end of the text, if attention is causal and the embedding is taken there.
        """
        text = self._text
        pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
        masks_more = getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False)
        is_causal = getattr(text, "attn_mask", None) is not None and not masks_more
        return lengths_to_the_end(tokens) if pool == "argmax" and is_causal else None

    @property
    def _text(self) -> Any:
        return getattr(self.model, "text", self.model)  # open_clip's CLIP holds the parts of its text tower itself


def _cut(length: int, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Of the input of a text tower's blocks the first ``length`` positions."""
    return (args[0][:, :length], *args[1:]), kwargs | {"attn_mask": kwargs["attn_mask"][:length, :length]}


class OpenClipTower(ForeignTower):
    """Image tower of open_clip without its projection.

    Pooled features are what the projection takes; those of a ModifiedResNet, which projects inside its attention
    pooling, are its embeddings. Towers of timm give timm's feature maps, a ViT one per block, a ModifiedResNet one per
    stage.
    """

    def __init__(self, visual: Any, name: str) -> None:
        super().__init__()
        self.name = name
        self.visual = visual
        if hasattr(visual, "trunk"):  # timm's; a head that pools by attention ends in the projection
            visual.trunk.reset_classifier(0)
            visual.head = getattr(visual.head, "pool", nn.Identity())
        elif isinstance(getattr(visual, "proj", None), nn.Parameter):
            visual.proj = None
        if hasattr(visual, "output_tokens"):
            visual.output_tokens = False  # CoCa's returns its tokens too

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, num_features) of normalised images (B, 3, H, W)."""
        return self.visual(images)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """One (B, C_i, H_i, W_i) map for each of ``strides``.

        Raises:
            UserError: if the tower has none.
        """
        if not hasattr(getattr(self.visual, "trunk", self.visual), "forward_intermediates"):
            raise UserError(
                f"{OPEN_CLIP}{self.name}: its image tower gives pooled features alone; choose one of timm or a ViT"
            )
        maps = self.visual.forward_intermediates(images, intermediates_only=True)["image_intermediates"]
        return maps[1:] if hasattr(self.visual, "attnpool") else maps  # a ModifiedResNet's first one is its stem's


def open_clip_encoder(name: str) -> ImageEncoder:
    """The image tower of a trained model of open_clip, frozen; ``name`` is that of :class:`OpenClipModel`.

    Raises:
        UserError: if open_clip has no such weights, or cannot load them.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    visual = _create(_at_home(name))[0].float().visual
    config = PreprocessCfg(**visual.preprocess_cfg)
    tower = OpenClipTower(visual, name)
    tower.measure(torch.zeros(1, *config.input_size))
    return ImageEncoder(tower, partial(_from_any_picture, image_transform_v2(config, is_train=False)))


def image_weights(name: str) -> TowerWeights:
    """The image half of a trained model: timm's names where its tower is of timm, else OpenAI's under ``visual.``.

    Raises:
        UserError: if open_clip has no such weights, or cannot load them.
    """
    from open_clip.transform import PreprocessCfg

    visual: Any = _create(_at_home(name))[0].float().eval().visual
    config = PreprocessCfg(**visual.preprocess_cfg)
    weights = visual.state_dict()
    projection = None
    if hasattr(visual, "trunk"):
        if isinstance(linear := getattr(visual.head, "proj", None), nn.Linear):
            projection = linear.weight, linear.bias
        weights = {key.removeprefix("trunk."): x for key, x in weights.items() if key.startswith("trunk.")}
    else:
        if isinstance(getattr(visual, "proj", None), nn.Parameter):
            projection = visual.proj.T.contiguous(), None
        weights = {f"visual.{key}": x for key, x in weights.items()}
    return TowerWeights(weights, projection, OpenClipTower(visual, name), mean=config.mean, std=config.std)


def text_weights(name: str, _: TextTowerConfig) -> TowerWeights:
    """The text half of a trained model, by the names of open_clip's text tower.

    Raises:
        UserError: if open_clip has no such weights, or cannot load them.
    """
    model = OpenClipModel(name).float().eval()
    text, other = model._text, ("visual.", "logit_", "text_decoder.", "transformer.pooler.")
    weights = {key: x for key, x in text.state_dict().items() if not key.startswith(other)}
    if hasattr(text, "text_projection"):
        text.text_projection = None
    elif hasattr(text, "proj"):  # of an encoder of transformers
        text.proj = nn.Identity()
    return TowerWeights(weights, encode=model.encode_text, tokenizer=model.tokenizer)


def fit_text_positions(tower: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Fit positions to the context length of ``tower``, in place, by open_clip's own function.

    Returns:
        What was fitted.
    """
    from open_clip.model import resize_text_pos_embed

    key = "positional_embedding"
    before = weights.get(key)
    if before is None or before.shape[-1] != tower.state_dict()[key].shape[-1]:
        return []  # another architecture, of which the names are told when it is loaded
    resize_text_pos_embed(weights, tower)
    after = weights[key]
    return [] if after.shape == before.shape else [f"{key} {tuple(before.shape)} to {tuple(after.shape)}"]


def _from_any_picture(preprocess: Any) -> Any:
    """open_clip's preprocessing behind our rule for pictures (docs/decoding.md)."""
    from torchvision.transforms import Compose

    return Compose([to_rgb, preprocess])


def _at_home(name: str) -> str:
    """The name with ``~`` as the home directory, where it holds a path."""
    scheme = next((scheme for scheme in _SCHEMES if name.startswith(scheme)), "")
    first, slash, rest = name.removeprefix(scheme).partition("/")
    return scheme + (home_expanded(first + slash + rest) if scheme else first + slash + home_expanded(rest))


def _create(name: str) -> tuple[Any, Any]:
    """The trained model and its preprocessing."""
    import open_clip

    architecture, pretrained = name, None
    if not name.startswith(_SCHEMES):
        architecture, _, pretrained = name.partition("/")
        tags = open_clip.list_pretrained_tags_by_model(architecture)
        if not pretrained and tags:
            raise UserError(
                f"open_clip:{name}: say which weights, as open_clip:{architecture}/PRETRAINED with one of "
                f"{', '.join(tags)}, or the path of a checkpoint"
            )
        if not pretrained:
            raise UserError(
                f"open_clip:{name}: open_clip has no weights of that name; see open_clip.list_pretrained(), or give a "
                f"checkpoint as open_clip:{architecture}/PATH"
            )
        if _is_torchscript(Path(pretrained)):
            return _call(name, partial(_from_openai, architecture, pretrained))
        if Path(pretrained).is_file():
            _warn_of_activation(architecture, pretrained)
    made: Any = _call(name, partial(open_clip.create_model_from_pretrained, architecture, pretrained=pretrained))
    return made


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, which is how OpenAI published CLIP."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in member for member in archive.namelist())


def _from_openai(architecture: str, path: str) -> tuple[Any, Any]:
    """The model of an OpenAI archive, with the activation that OpenAI trained with whatever the architecture says."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise ValueError(f"it has no architecture {architecture}")
    parts = {name: config[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
    model: Any = open_clip.CLIP(**parts, quick_gelu=True)
    with warnings.catch_warnings():  # torch would have such files written otherwise, which OpenAI's never will be
        warnings.simplefilter("ignore", FutureWarning)
        weights = torch.jit.load(path, map_location="cpu").state_dict()
    for fact in ("input_resolution", "context_length", "vocab_size"):
        weights.pop(fact, None)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return model, open_clip.image_transform(model.visual.image_size, is_train=False)  # the defaults are OpenAI's


def _warn_of_activation(architecture: str, path: str) -> None:
    """Warn that a file does not record its activation; a wrong one costs points (B/32, LAION-400M: 60.2, not 62.9)."""
    import open_clip

    twin = f"{architecture}-quickgelu"
    if twin in open_clip.list_models():
        warnings.warn(
            f"open_clip:{architecture}/{path}: read as a model with GELU; if it was trained with QuickGELU, as OpenAI "
            f"did, name open_clip:{twin}/{path}",
            stacklevel=2,
        )


def _call(name: str, create: partial[Any]) -> Any:
    """Call ``create`` and turn any exception into a UserError."""
    try:
        return create()
    except ModuleNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001 - broken checkpoints raise exceptions of any type
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        what = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
        raise UserError(f"open_clip:{name}: open_clip cannot load it: {textwrap.shorten(what, 300)}") from None


def imagenet_names() -> tuple[str, ...]:
    """OpenAI's 1,000 class names of ImageNet, of which 998 are distinct."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 prompt templates for ImageNet, with ``{c}`` for the class name."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{c}") for template in OPENAI_IMAGENET_TEMPLATES)


def write_open_clip(trained: Trained, folder: Path) -> list[str]:
    """Write an exported folder (see :mod:`focalclip.interop.folder`).

    Raises:
        UserError: if open_clip cannot build the model.
    """
    config = store.exported_config(trained.model.config)
    if not store.open_clip_builds(config):
        raise UserError(
            "--format open_clip: open_clip cannot build a tower with options, another mixer, or one that timm does not "
            "have; use onnx"
        )
    store.write_files(trained.model, folder, trained.provenance)
    name = split(config.image.name)[1]
    notes = [f"open_clip builds {name} only after `import focalclip`."] if needs_focalclip(name) else []
    if split(config.text.name)[1] == ".":
        notes.append("open_clip looks for the text encoder in the working directory: start it inside the folder.")
    return notes


def open_clip_usage(trained: Trained, folder: str) -> str:
    """Python that loads both towers."""
    name = split(trained.model.config.image.name)[1]
    ours = "import focalclip  # registers the image tower with timm\n" if needs_focalclip(name) else ""
    return f"""{ours}import open_clip

name = "local-dir:{folder}"  # hf-hub:ORG/NAME from the hub
model, _, preprocess = open_clip.create_model_and_transforms(name)
tokenizer = open_clip.get_tokenizer(name)
image = model.eval().encode_image(preprocess(picture)[None], normalize=True)
text = model.encode_text(tokenizer(["a dog", "a cat"]), normalize=True)
probabilities = (model.logit_scale.exp() * image @ text.T).softmax(-1)"""
