"""Trained models for other libraries: open_clip, timm, transformers and ONNX, each with a model card."""

from focalclip.export.write import FORMATS, export

__all__ = ["FORMATS", "export"]
