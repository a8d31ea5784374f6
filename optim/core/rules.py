"""Inner rules: the optimizer that runs on the low-rank matrix R, or on the gradient itself in a plain group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import pick, reference
from ...kernels.blockwise import FORMATS, Blocks
from ...kernels.random import Seed
from . import codec, factored, sides
from .layout import ALONE, Layout
from .rule import Rule, Shape, Work

if TYPE_CHECKING:
    from .hyper import Hyper

__all__ = ["RULES", "Rule", "Work", "blockwise", "learning_rates", "single_eps"]


class AdamW(Rule):
    """Adam's direction, `N = Mhat / (sqrt(Vhat) + eps)`."""

    drifting = ("exp_avg_sq",)

    def buffers(self, shape: Shape, hyper: Hyper) -> dict[str, Shape]:
        """First and second moment, of the gradient's shape."""
        return {"exp_avg": shape, "exp_avg_sq": shape}

    def direction(self, work: Work, hyper: Hyper) -> None:
        """One fused launch for all tensors."""
        if not work.grads:
            return
        moments = ([s["exp_avg"] for s in work.states], [s["exp_avg_sq"] for s in work.states])
        if work.ages is not None:
            options = hyper.betas, single_eps(hyper.eps)
            reference.adam_by_column(work.grads, moments, work.ages, work.out, *options)
            return
        counts = list(work.counts) if hyper.correct_bias else [reference.NO_CORRECTION] * len(work.counts)
        adam = pick("adam", work.grads[0], hyper.backend)
        eps = single_eps(hyper.eps)
        adam(list(work.grads), moments, counts, list(work.out), hyper.betas, eps, raw_eps=hyper.raw_eps)

    def coded_direction(self, work: Work, hyper: Hyper, seeds: Sequence[Seed]) -> bool:
        """Decode, step and encode tensor by tensor."""
        first = _coded(work, "exp_avg")
        second = _coded(work, "exp_avg_sq")
        if not (first and second) or work.ages is not None:
            return False
        counts = list(work.counts) if hyper.correct_bias else [reference.NO_CORRECTION] * len(work.counts)
        adam = pick(f"adam_{FORMATS[hyper.state_dtype].name}", codec.matrix(work.grads[0]), hyper.backend)
        adam(_matrices(work.grads), (first, second), counts, _matrices(work.out), blockwise(hyper, seeds))
        return True


class Lion(Rule):
    """Lion's direction, `N = sign(b1 M + (1 - b1) R)`, then `M <- b2 M + (1 - b2) R` (arXiv 2302.06675)."""

    def buffers(self, shape: Shape, hyper: Hyper) -> dict[str, Shape]:
        """One moment, of the gradient's shape."""
        return {"exp_avg": shape}

    def direction(self, work: Work, hyper: Hyper) -> None:
        """Tensor by tensor."""
        for grad, state, out in zip(work.grads, work.states, work.out, strict=True):
            reference.lion(grad, state["exp_avg"], out, hyper.betas)

    def coded_direction(self, work: Work, hyper: Hyper, seeds: Sequence[Seed]) -> bool:
        """Decode, step and encode tensor by tensor."""
        moments = _coded(work, "exp_avg")
        if moments:
            lion = pick(f"lion_{FORMATS[hyper.state_dtype].name}", codec.matrix(work.grads[0]), hyper.backend)
            lion(_matrices(work.grads), moments, _matrices(work.out), blockwise(hyper, seeds))
        return bool(moments)


class SGD(Rule):
    """Heavy-ball momentum with coefficient b1 = betas[0]: `M <- b1 M + R`, `N = M`; b1 = 0 is plain SGD."""

    def buffers(self, shape: Shape, hyper: Hyper) -> dict[str, Shape]:
        """One moment of the gradient's shape, none without momentum."""
        return {"exp_avg": shape} if hyper.betas[0] > 0 else {}

    def direction(self, work: Work, hyper: Hyper) -> None:
        """Tensor by tensor."""
        for grad, state, out in zip(work.grads, work.states, work.out, strict=True):
            if "exp_avg" in state:
                reference.momentum(grad, state["exp_avg"], out, hyper.betas[0])
            else:
                out.copy_(grad)


class Adafactor(Rule):
    """Adafactor's update of R: `U = R / sqrt(V)` with factored V, clipped, times lr, averaged with b1 = betas[0].

    A single `eps` bounds the root of V from below as in Adam (eps^2 is added to R^2); a pair is Adafactor's own
    (eps1 added to R^2, eps2 the smallest parameter scale).
    """

    drifting = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
    absolute = True
    elementwise = False

    def buffers(self, shape: Shape, hyper: Hyper) -> dict[str, Shape]:
        """Row and column means of R^2, the full second moment for vectors, and the momentum if b1 > 0."""
        if len(shape) >= 2:
            shapes = {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": shape[:-2] + shape[-1:]}
        else:
            shapes = {"exp_avg_sq": shape}
        if hyper.betas[0] > 0:
            shapes["exp_avg"] = shape
        return shapes

    def direction(self, work: Work, hyper: Hyper) -> None:
        """Without a host synchronisation; statistics and sizes of sharded tensors are those of the whole."""
        if not work.grads:
            return
        counts = list(map(int, work.counts))
        _whiten(work, counts, hyper)
        rates = learning_rates(hyper, counts, work.weights, work.grads[0].dtype, work.weighs)
        clips = factored.clip_factors(work.out, hyper.clip_threshold, work.layout)
        for update, clip, lr, state in zip(work.out, clips, rates, work.states, strict=True):
            if clip is not None:
                update.div_(clip)
            update.mul_(lr)
            if "exp_avg" in state:
                update.copy_(state["exp_avg"].lerp_(update, 1 - hyper.betas[0]))


def _whiten(work: Work, counts: Sequence[int], hyper: Hyper) -> None:
    """Update the second moments with R, and write `U = R / sqrt(V)`."""
    floor = hyper.eps[0] if isinstance(hyper.eps, tuple) else hyper.eps**2
    fresh = [1.0 - factored.beta2(t, hyper.beta2_decay) for t in counts]
    if "exp_avg_sq" in work.states[0]:
        for grad, state, weight, out in zip(work.grads, work.states, fresh, work.out, strict=True):
            second = state["exp_avg_sq"].lerp_(grad.square().add_(floor), weight)
            torch.mul(grad, second.rsqrt(), out=out)
        return
    stats = [(state["exp_avg_sq_row"], state["exp_avg_sq_col"]) for state in work.states]
    pair = sides.pair(work.layout, work.grads[0].ndim)
    factored.accumulate(work.grads, stats, fresh, floor, hyper.backend, pair)
    for white, out in zip(factored.whitened(work.grads, stats, pair), work.out, strict=True):
        white.into(out)


def learning_rates(
    hyper: Hyper, counts: Sequence[int], weights: Sequence[Tensor], dtype: torch.dtype, layout: Layout = ALONE
) -> list[float | Tensor]:
    """Learning rates of a rule that is `absolute`, for weights of one shape."""
    return factored.learning_rates(hyper, counts, weights, _pair(hyper.eps)[1], dtype, layout)


def blockwise(hyper: Hyper, seeds: Sequence[Seed]) -> reference.Blockwise:
    """The format, seeds and numbers that a kernel for coded moments takes."""
    form, eps = FORMATS[hyper.state_dtype], single_eps(hyper.eps)
    return reference.Blockwise(form, seeds, hyper.betas, eps, raw_eps=hyper.raw_eps)


def _coded(work: Work, name: str) -> list[Blocks]:
    """The moments of all tensors as they are stored, or nothing where they are not coded."""
    found = (codec.coded(state, name) for state in work.states)
    return [blocks for blocks in found if blocks is not None]


def _matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [codec.matrix(tensor) for tensor in tensors]


def single_eps(eps: float | tuple[float, float]) -> float:
    """The number that Adam adds to the root; a pair is Adafactor's, whose first entry it is."""
    return eps[0] if isinstance(eps, tuple) else eps


def _pair(eps: float | tuple[float, float]) -> tuple[float, float]:
    return eps if isinstance(eps, tuple) else (eps**2, 1e-3)


class RMSprop(Rule):
    """RMSprop's direction, `N = R / (sqrt(V) + eps)`; with b1 > 0 its momentum, `M <- b1 M + N`."""

    drifting = ("exp_avg_sq",)

    def buffers(self, shape: Shape, hyper: Hyper) -> dict[str, Shape]:
        """The second moment, and the momentum if b1 > 0."""
        return {"exp_avg_sq": shape} | ({"exp_avg": shape} if hyper.betas[0] > 0 else {})

    def direction(self, work: Work, hyper: Hyper) -> None:
        """Tensor by tensor, without bias correction."""
        beta1, beta2 = hyper.betas
        for grad, state, out in zip(work.grads, work.states, work.out, strict=True):
            second = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            torch.div(grad, second.sqrt().add_(single_eps(hyper.eps)), out=out)
            if "exp_avg" in state:
                out.copy_(state["exp_avg"].mul_(beta1).add_(out))


RULES: dict[str, Rule] = {
    "adamw": AdamW(),
    "lion": Lion(),
    "sgd": SGD(),
    "rmsprop": RMSprop(),
    "adafactor": Adafactor(),
}
