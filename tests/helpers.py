"""What several test files build on."""

import torch
from torch import Tensor
from torch.nn import Parameter


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals that depend on the seed alone, the same in every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def feed(optimizer: torch.optim.Optimizer, param: Parameter, grads: list[Tensor]) -> None:
    """Step one parameter with each gradient in turn."""
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
