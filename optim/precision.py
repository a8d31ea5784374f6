"""Weights in fp32 out of a model in bf16 whose optimizer compensates rounding."""

from __future__ import annotations

from torch import Tensor, nn

from .core.lifecycle import Lifecycle


def full_precision_state_dict(model: nn.Module, optimizer: Lifecycle) -> dict[str, Tensor]:
    """Return the state dict of a model with its floating weights in fp32, corrections included.

        safetensors.torch.save_file(full_precision_state_dict(model, optimizer), "model.safetensors")

    Args:
        model: The model.
        optimizer: Its optimizer; with `rounding="compensated"` the weights come out as an fp32 run would have them.
    """
    values = {id(param): optimizer.full_precision(param) for param in model.parameters()}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        detached = tensor.detach()
        found[name] = values.get(id(tensor), detached.float() if detached.is_floating_point() else detached)
    return found
