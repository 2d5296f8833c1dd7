"""One micro-batch: forward, loss, backward, and the optimiser where it is due."""

import inspect
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from focalclip.base.errors import UserError
from focalclip.base.strict import nearest, options_of
from focalclip.config import LossConfig, RunConfig
from focalclip.data.loader import Batch
from focalclip.losses import LOSSES
from focalclip.models.preprocess import normalize
from focalclip.names import find
from focalclip.training.engine import device, input_dtype

Loss = Callable[..., Tensor]
"""From the model's outputs by name, the labels (b,) and the identities of the pairs (b,), which may be left out, to the
0-dim loss of the global batch."""

_PASSED = ("labels", "ids", "group")  # keyword-only parameters of a loss that are not options


def create_loss(config: LossConfig, outputs: Collection[str]) -> Loss:
    """The loss that ``config`` names, bound to its options and to the outputs that its signature asks for.

    Args:
        config: name and options.
        outputs: names of the model's outputs.

    Raises:
        UserError: if there is no such loss, an option does not suit it, or it needs an output that the model lacks.
    """
    if config.name not in LOSSES:
        raise UserError(f"loss.name: {config.name} is not a loss{nearest(config.name, LOSSES)}")
    function = find(LOSSES[config.name])
    options = options_of(function, config.options, "loss.options", reserved=_PASSED)
    parameters = inspect.signature(function).parameters
    inputs = [name for name, parameter in parameters.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    missing = [name for name in inputs if name not in outputs]
    if missing:
        raise UserError(
            f"loss.name: {config.name} needs {', '.join(missing)}, which the model does not return (it returns "
            f"{', '.join(outputs)}); choose another loss or another model"
        )

    def loss(named: dict[str, Tensor], labels: Tensor, ids: Tensor | None = None) -> Tensor:
        known = {"labels": labels, "ids": ids}
        passed = {name: value for name, value in known.items() if name in parameters}
        return function(**{name: named[name] for name in inputs}, **passed, **options)

    return loss


def micro_step(engine: Any, batch: Batch, loss: Loss, config: RunConfig) -> tuple[Tensor, Tensor]:
    """Forward, loss over the global micro-batch, backward, the optimiser where due.

    Returns:
        Loss (0-dim) and scale of the cosines ([1]), both detached.
    """
    image_config = config.model.image
    images = normalize(batch.images.to(device()), image_config.mean, image_config.std, input_dtype(config))
    outputs = engine(images, batch.tokens.to(device()))
    value = loss(outputs, batch.labels.to(device()), batch.ids.to(device()))
    engine.backward(value)
    engine.step()
    return value.detach(), outputs["scale"].detach()
