"""Trained models, wherever they come from: our own folders, files of weights, open_clip, timm and transformers."""
