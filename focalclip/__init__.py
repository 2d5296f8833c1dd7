"""focalclip: pretrain, judge and reuse attention-free language-image models."""

__version__ = "0.1.0"
