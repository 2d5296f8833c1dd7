"""The calibration of one task as lines and dots of a diagram 100 units wide."""

import math
from typing import Any

from focalclip.evaluation.answers.predictions import Predictions
from focalclip.evaluation.statistics.calibration import Reliability, reliability
from focalclip.printed import percent

_LINES = ("at100", "atown")  # the first two of the predictions' scales


def panel(predictions: Predictions) -> dict[str, Any]:
    """Lines at scale 100 and at the model's own, and the errors in words; empty for multi-label data."""
    if predictions.multilabel:
        return {}
    correct = predictions.top_correct()
    lines, texts = [], []
    for i, scale in enumerate(predictions.scales):
        if math.isnan(scale):
            continue
        bins = reliability(predictions.probabilities(i)[:, 0], correct)
        if i < len(_LINES):
            lines.append(_line(_LINES[i], bins))
        name = "scale" if i < len(_LINES) else "fitted scale"
        texts.append(f"{name} {scale:.3g}: ECE {percent(bins.ece)}%")
    return {"lines": lines, "texts": texts}


def _line(kind: str, bins: Reliability) -> dict[str, Any]:
    x, y = 100 * bins.confidence, 100 - 100 * bins.accuracy
    share = bins.count / bins.count.sum()
    dots = [
        {
            "x": f"{x[i]:.1f}",
            "y": f"{y[i]:.1f}",
            "r": f"{1.3 + 4.2 * math.sqrt(share[i]):.1f}",
            "text": f"{bins.count[i]:,} images: confidence {x[i]:.0f}%, right {100 - y[i]:.0f}%",
        }
        for i in range(len(x))
    ]
    return {"kind": kind, "points": " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True)), "dots": dots}
