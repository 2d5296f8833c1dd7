"""What a tower costs: parameters, and multiply-adds of one picture, counted while it runs on the meta device.

Convolutions, matrix products and attention count; norms, activations, gates and sums do not. Published "FLOPs" of
FocalNets are such multiply-adds, except that the authors' counter adds gates and modulation and overlooks that
overlapping patch embeddings have larger kernels (fact: their table of overlapped nets shows unchanged numbers).

``python -m focalclip.models.cost`` prints the table of docs/models.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from focalclip.models.focalnet.variants import VARIANTS, create_focalnet


class Cost(NamedTuple):
    """Of one tower and one picture."""

    parameters: int
    multiply_adds: int


def count(tower: nn.Module, image_size: int | tuple[int, int], *, in_channels: int = 3) -> Cost:
    """Count parameters and multiply-adds of ``tower(images)`` for one picture; nothing is computed.

    Args:
        tower: any module from images (1, 3, H, W); it may be on the meta device.
        image_size: side of a square picture, or (height, width), in pixels.
        in_channels: channels of the picture.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    parameters = sum(parameter.numel() for parameter in tower.parameters())
    return Cost(parameters, count_multiply_adds(tower, torch.empty(1, in_channels, height, width, device="meta")))


def count_multiply_adds(module: nn.Module, x: Tensor) -> int:
    """Multiply-adds of ``module(x)`` in evaluation mode, for ``x`` on the meta device."""
    with FlopCounterMode(display=False) as counter:
        run_on_meta(module, x)
    return counter.get_total_flops() // 2  # torch counts a multiplication and an addition as two


def run_on_meta(module: nn.Module, x: Tensor) -> None:
    """Go through ``module(x)`` in evaluation mode without computing anything, for ``x`` on the meta device."""
    state = {name: p.to("meta") for name, p in [*module.named_parameters(), *module.named_buffers()]}
    was_training = module.training
    try:
        with torch.no_grad():
            functional_call(module.eval(), state, x)
    finally:
        module.train(was_training)


HEADER = """\
| name | parameters | G multiply-adds at 224 | strides | widths | published weights | source |
|---|---:|---:|---|---|---|---|"""


def row(name: str, tower: Any, cost: Cost) -> str:
    """One variant, built without a head, as a row of the table."""
    variant = VARIANTS[name]
    strides, widths = (", ".join(map(str, numbers)) for numbers in (tower.strides, tower.feature_dims))
    numbers = f"{cost.parameters:,} | {cost.multiply_adds / 1e9:.2f} | {strides} | {widths}"
    return f"| `{name}` | {numbers} | {variant.weights} | {variant.source} |"


def main() -> None:
    """Print the table of docs/models.md."""
    print(HEADER)
    for name in VARIANTS:
        with torch.device("meta"):
            tower = create_focalnet(name)
        print(row(name, tower, count(tower, 224)))


if __name__ == "__main__":
    main()
