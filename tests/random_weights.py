"""Weights for parity tests."""

import torch


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
