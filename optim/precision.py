"""`full_precision_state_dict`: fp32 weights of a bf16 model whose optimizer compensates rounding."""

from __future__ import annotations

from torch import Tensor, nn

from .core.lifecycle import Lifecycle


def full_precision_state_dict(model: nn.Module, optimizer: Lifecycle) -> dict[str, Tensor]:
    """Return the state dict of a model with its floating weights in fp32, corrections included.

        safetensors.torch.save_file(full_precision_state_dict(model, optimizer), "model.safetensors")

    Args:
        model: The model.
        optimizer: Its optimizer; with `rounding="compensated"` weights come out with all 32 bits that it has kept.

    Returns:
        Tensors by name; those that are fp32 already share the memory of the model, as in its own state dict.

    Raises:
        TypeError: The optimizer is not of this package.
    """
    if not isinstance(optimizer, Lifecycle):
        raise TypeError(
            f"got a {type(optimizer).__name__}, need an optimizer of lowmem.optim; of a wrapper pass wrapper.optimizer"
            ", of others take model.state_dict()"
        )
    values = {id(param): optimizer.full_precision(param) for param in model.parameters()}
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        detached = tensor.detach()
        found[name] = values.get(id(tensor), detached.float() if detached.is_floating_point() else detached)
    return found
