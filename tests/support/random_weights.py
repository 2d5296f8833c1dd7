"""Weights and small nets for parity tests."""

from itertools import product

import torch

_FLAGS = {
    "use_overlap": True,
    "use_post_norm": True,
    "use_post_norm_in_modulation": True,
    "normalize_modulator": True,
    "layer_scale": 0.3,
}
# Each subset of the flags of a block, by name.
FLAG_COMBINATIONS = {
    "+".join(names) or "none": {name: _FLAGS[name] for name in names}
    for chosen in product((False, True), repeat=len(_FLAGS))
    for names in [[name for name, is_set in zip(_FLAGS, chosen, strict=True) if is_set]]
}


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter, norms, biases and scales included, a value that matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 0.5))
    return model.eval()
