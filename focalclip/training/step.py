"""One micro-batch: forward, loss, backward, and the optimiser where it is due."""

from typing import Any

from torch import Tensor

from focalclip.config import RunConfig
from focalclip.data.loader import Batch
from focalclip.losses import contrastive_loss
from focalclip.models.preprocess import normalize
from focalclip.training.engine import device, input_dtype


def micro_step(engine: Any, batch: Batch, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Forward, loss over the global micro-batch, backward, the optimiser where due; returns loss and scale."""
    image_config = config.model.image
    images = normalize(batch.images.to(device()), image_config.mean, image_config.std, input_dtype(config))
    outputs = engine(images, batch.tokens.to(device()))
    loss = contrastive_loss(**outputs, labels=batch.labels.to(device()))
    engine.backward(loss)
    engine.step()
    return loss.detach(), outputs["scale"].detach()
