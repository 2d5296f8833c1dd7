"""Each tower as an ONNX graph for any batch size: features, and the unit-length embeddings that CLIP compares."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from focalclip.interop.card import Trained

OPSET = 18  # LayerNorm and GELU are one node each from 17 and 20; runtimes of 2023 and later read 18


class _ImageGraph(nn.Module):
    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.visual.trunk(images)
        return F.normalize(self.visual.proj(self.visual.norm(features)), dim=-1), features


class _TextGraph(nn.Module):
    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text(tokens), dim=-1)


def write_onnx(trained: Trained, folder: Path) -> list[str]:
    """Write ``image_tower.onnx``, ``text_tower.onnx`` and ``config.json`` (preprocessing, temperature)."""
    model = trained.model
    image, text = model.config.image, model.config.text
    images = torch.zeros(2, 3, image.image_size, image.image_size)
    tokens = torch.zeros(2, text.context_length, dtype=torch.int64)
    pad = getattr(getattr(model.text, "config", None), "pad_token_id", 0)  # of CLIP's byte-pair encoding: 0
    _export(
        _ImageGraph(model.visual), images, folder / "image_tower.onnx", "images", ["image_embeds", "image_features"]
    )
    _export(_TextGraph(model.text), tokens, folder / "text_tower.onnx", "tokens", ["text_embeds"])
    config = {
        "image": image.model_dump(
            mode="json", include={"name", "image_size", "mean", "std", "resize_mode", "interpolation"}
        ),
        "text": {"context_length": text.context_length, "pad": pad},
        "inverse_temperature": model.scale().item(),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return []


def _export(graph: nn.Module, example: Tensor, path: Path, name: str, outputs: list[str]) -> None:
    """Trace ``graph`` with a batch of any size, into one file."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own, of torch's and onnxscript's insides
        torch.onnx.export(
            graph.eval(),
            (example,),
            path,
            input_names=[name],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def onnx_usage(trained: Trained, folder: str) -> str:
    """Python that runs both graphs."""
    length = trained.model.config.text.context_length
    return f"""\
import onnxruntime

image_tower = onnxruntime.InferenceSession("{folder}/image_tower.onnx")
text_tower = onnxruntime.InferenceSession("{folder}/text_tower.onnx")
# images: (B, 3, H, W) float32, prepared as config.json says; tokens: (T, {length}) int64, padded with 0
image_embeds, image_features = image_tower.run(None, {{"images": images}})
(text_embeds,) = text_tower.run(None, {{"tokens": tokens}})
similarity = image_embeds @ text_embeds.T"""
