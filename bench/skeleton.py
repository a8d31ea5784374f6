"""A LLaMA by torch alone, to plan for: transformers takes longer to import than a plan to make.

The same names, shapes and operations as `transformers.LlamaForCausalLM` with "sdpa" attention; a test compares both.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .models import Shape


class Linear(nn.Linear):
    """A linear layer without bias or first values."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Leave them, which would take most of the time of a plan."""


class Embedding(nn.Embedding):
    """An embedding without first values."""

    def reset_parameters(self) -> None:
        """Leave them."""


class Norm(nn.Module):
    """RMS norm in fp32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """Scale rows to unit mean square."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Causal attention with rotated queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.size = shape.hidden // shape.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(shape.hidden, shape.heads * self.size) for _ in range(4)
        )

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Mix tokens."""
        heads = (*x.shape[:-1], -1, self.size)
        q, k, v = (layer(x).view(heads).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *turns), rotate(k, *turns)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1, scale=self.size**-0.5)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).contiguous().reshape(*x.shape[:-1], -1))
        return mixed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of entries by their place in the sequence."""
    left, right = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat((-right, left), dim=-1) * sin)


class Mlp(nn.Module):
    """The gated unit."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.ffn)
        self.up_proj = Linear(shape.hidden, shape.ffn)
        self.down_proj = Linear(shape.ffn, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every token."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and gated unit, each after a norm and beside the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), Mlp(shape)
        self.input_layernorm, self.post_attention_layernorm = Norm(shape.hidden), Norm(shape.hidden)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """Add both to the stream."""
        x = x + self.self_attn(self.input_layernorm(x), turns)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Embedding, layers and last norm."""

    inv_freq: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden)
        size = shape.hidden // shape.heads
        self.register_buffer("inv_freq", torch.empty(size // 2, dtype=torch.float32), persistent=False)
        self.register_buffer("original_inv_freq", torch.empty(size // 2, dtype=torch.float32), persistent=False)
        self.gradient_checkpointing = False

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the head reads."""
        x = self.embed_tokens(tokens)
        angles = torch.arange(tokens.shape[1], device=tokens.device)[None, :, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        turns = (angles.cos().to(x.dtype).unsqueeze(1), angles.sin().to(x.dtype).unsqueeze(1))
        for layer in self.layers:
            run: Any = partial(checkpoint, layer, use_reentrant=False) if self.gradient_checkpointing else layer
            x = run(x, turns)
        out: Tensor = self.norm(x)
        return out


class Skeleton(nn.Module):
    """A LLaMA whose forward pass returns the loss of the next token, as `.loss`.

    Args:
        shape: Its sizes.
        dtype: Dtype of the weights; the frequencies stay in fp32.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = Body(shape)
        self.lm_head = Linear(shape.hidden, shape.vocabulary)
        self.config = SimpleNamespace(model_type="llama", num_attention_heads=shape.heads)
        for param in self.parameters():
            param.data = param.data.to(dtype)

    def get_output_embeddings(self) -> nn.Linear:
        """The head, which the papers do not project."""
        return self.lm_head

    def gradient_checkpointing_enable(self, _: Any = None) -> None:
        """Recompute layers in the backward pass."""
        self.model.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep what layers computed."""
        self.model.gradient_checkpointing = False

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        """Return the loss."""
        logits = self.lm_head(self.model(input_ids)).float()
        targets = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        loss = functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        return SimpleNamespace(loss=loss, logits=logits)
