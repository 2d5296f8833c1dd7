"""FocalNet, the image tower: its operator and what may stand in its place, its blocks, and its named variants."""

from focalclip.models.focalnet.config import FocalNetConfig
from focalclip.models.focalnet.network import FocalNet

__all__ = ["FocalNet", "FocalNetConfig"]
