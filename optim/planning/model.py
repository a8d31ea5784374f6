"""What the forward and backward pass of a model allocate: its own code, run on meta tensors, which have no data."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..targets import HEAD_NAMES
from .watch import META, Watch, replaced

LAYERS = ("attention", "mlp", "norms", "embedding", "head", "other")
"""Types of layers: `head` are the logits and the loss, `other` is between layers, as the residual stream."""

Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Pass:
    """Bytes of a forward and backward pass beside weights and state.

    Args:
        batch: Sequences.
        length: Tokens of a sequence.
        checkpointing: Whether layers are recomputed in the backward pass.
        activations: What the forward pass keeps for the backward pass, by the type of the layer that made it.
        peak: The most at a time, gradients that are there by then included.
        peak_released: The same where every gradient is freed as soon as it is complete; steps are not in it.
        at_steps: For every parameter that has a gradient, by position: what is alive when its gradient is complete,
            that gradient included, where earlier ones have been freed.
    """

    batch: int
    length: int
    checkpointing: bool
    activations: dict[str, int]
    peak: int
    peak_released: int
    at_steps: dict[int, int] = field(repr=False)

    def released(self, steps: Mapping[int, int]) -> int:
        """The most at a time where parameters are stepped in the backward pass.

        Args:
            steps: What the step of a parameter allocates, by position.
        """
        return max([self.peak_released, *(alive + steps.get(index, 0) for index, alive in self.at_steps.items())])


def trace(
    model: nn.Module,
    shape: tuple[int, int],
    *,
    checkpointing: bool | None = None,
    loss: Loss | None = None,
    device: str = "cuda",
) -> Pass:
    """Run a model's forward and backward pass without data.

    Args:
        model: The model; it is not touched.
        shape: Sequences, and tokens of each.
        checkpointing: Turn recomputation on or off, for models of Hugging Face. Default: as the model has it.
        loss: What is differentiated, from the model and int64 tokens (batch, length). Default: `.loss` of
            `model(input_ids=tokens, labels=tokens)`.
        device: "cuda" or "cpu", which has no attention with dropout in tiles. Default: a GPU.

    Raises:
        ValueError: The model has no switch for checkpointing, or asks for data.
    """
    shadow = _without_data(model)
    if checkpointing is not None:
        _switch(shadow, on=checkpointing)
    tokens = torch.empty(shape, dtype=torch.int64, device=META)
    with _Layers(shadow) as watch, _attention(device):
        try:
            value = (loss or _causal)(shadow, tokens)
            kept = Counter(watch.alive)
            watch.listen()
            value.backward()  # type: ignore[no-untyped-call]
        except NotImplementedError as error:
            raise ValueError(
                f"{type(model).__name__} asks for numbers in its forward or backward pass, which a plan does not have: "
                "pass loss=lambda model, tokens: ... that avoids it"
            ) from error
    found = is_checkpointed(shadow)
    activations = {name: kept.get(name, 0) for name in LAYERS}
    return Pass(*shape, found, activations, watch.peak_kept, watch.peak, watch.at_steps)


def is_checkpointed(model: nn.Module) -> bool:
    """Tell whether a model of Hugging Face recomputes its layers."""
    return any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules())


def _causal(model: nn.Module, tokens: Tensor) -> Tensor:
    value: Tensor = model(input_ids=tokens, labels=tokens).loss
    return value


def _without_data(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(torch.empty_like(param, device=META), requires_grad=param.requires_grad)
    memo |= {id(buffer): torch.empty_like(buffer, device=META) for buffer in model.buffers()}
    return copy.deepcopy(model, memo).train(model.training)


def _switch(model: nn.Module, *, on: bool) -> None:
    """Turn checkpointing on or off by the methods of Hugging Face's models, which were renamed in transformers 5."""
    verb = "enable" if on else "disable"
    names = (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}")
    found = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if found is not None:
        found(*({"use_reentrant": False},) if on else ())
    elif on != is_checkpointed(model):
        raise ValueError(
            f"{type(model).__name__} has no {names[1]}(): call torch.utils.checkpoint in its layers yourself, and "
            "leave checkpointing=None"
        )


class _Layers(Watch):  # type: ignore[no-untyped-call]
    """A `Watch` that counts by the type of layer that allocates, and counts gradients apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.alive: Counter[str] = Counter()
        self.peak_kept = 0
        self.at_steps: dict[int, int] = {}
        self._model, self._gradients = model, 0
        self._stack = ["other"]
        self._made_by: dict[int, str] = {}
        find_head = getattr(model, "get_output_embeddings", lambda: None)
        for name, module in model.named_modules():
            layer = "head" if module is find_head() else layer_type(name, module)
            if layer is not None:
                module.register_forward_pre_hook(self._entering(layer))
                module.register_forward_hook(self._leave, always_call=True)

    def listen(self) -> None:
        """Expect gradients: each is freed as soon as it is complete; `peak_kept` counts as if all of them were kept."""
        for index, param in enumerate(self._model.parameters()):
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self._completing(index))  # type: ignore[no-untyped-call]

    def allocated(self, key: int, size: int) -> None:
        layer = self._made_by[key] = self._stack[-1]
        self.alive[layer] += size
        super().allocated(key, size)
        self.peak_kept = max(self.peak_kept, self.now + self._gradients)

    def freed(self, key: int, size: int) -> None:
        self.alive[self._made_by.pop(key)] -= size
        super().freed(key, size)

    def _entering(self, layer: str) -> Callable[..., None]:
        return lambda *_: self._stack.append(layer)

    def _leave(self, *_: Any) -> None:
        if self._stack.pop() == "head" and len(self._stack) == 1:
            self._stack[0] = "head"  # what follows the logits is the loss

    def _completing(self, index: int) -> Callable[[Tensor], None]:
        def complete(param: Tensor) -> None:
            self.at_steps[index] = self.now
            self._gradients += param.nbytes
            param.grad = None

        return complete


def layer_type(name: str, module: nn.Module) -> str | None:
    """The type of layer that a module is, by its class and name; None for those that are part of another."""
    kind, last = type(module).__name__.lower(), name.split(".")[-1].lower()
    if last in HEAD_NAMES:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if "norm" in kind:
        return "norms"
    if "attention" in kind or "attn" in last:
        return "attention"
    if any(part in kind or part in last for part in ("mlp", "feedforward", "feed_forward", "ffn", "moe", "experts")):
        return "mlp"
    return None


def _attention(device: str) -> AbstractContextManager[None]:
    """Let attention on meta tensors run as the tiled kernels of devices; torch would form all scores.

    Kernels for CPUs and GPUs keep alike: the output, and one fp32 number for every row of the scores.
    """
    products = functional.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **how: Any,
    ) -> Tensor:
        if dropout_p and device == "cpu":  # CPUs have no tiled kernel with dropout
            return products(query, key, value, attn_mask, dropout_p, is_causal, **how)
        mask = attn_mask if attn_mask is None or attn_mask.is_floating_point() else attn_mask.to(query.dtype)
        tiled = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = tiled(query, key, value, 0.0, is_causal, attn_mask=mask, scale=how.get("scale"))[0]
        return out

    return replaced([(functional, products.__name__, attend)])
