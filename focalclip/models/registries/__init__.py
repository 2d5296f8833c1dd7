"""What other libraries build by name once focalclip is imported: towers in timm, two-tower models in transformers."""
