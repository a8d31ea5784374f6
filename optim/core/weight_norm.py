"""Weight normalisation around any method, without a second copy of the weights (arXiv 1602.07868).

A weight W (m x n) is seen as `W = g V / |V|`, row by row; V differs from W by a factor a row, so that only g and |V|
need be kept:

    U     = W / g                                rows of unit length
    c     = <G, U>                               gradient of g                             (m,)
    G_V   = (g / |V|) (G - c U)                  gradient of V, orthogonal to V in every row
    V     = the method's step on V with G_V      W is scaled to V in place
    g     = the rule's step on g with c
    W     = g V / |V|                            and back

Where rows are cut, norms and c are sums over their pieces, one number a row. The radial part of the gradient no longer
enters the subspace (the idea of GradNormLoRP).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import sides
from .apply import rates, run_rule
from .basis import State
from .bucket import Bucket
from .hyper import Hyper
from .layout import Layout
from .rules import RULES, Work
from .spec import Spec, counter
from .view import matrix_shape

PREFIX = "norm_"
"""State of the norms carries this prefix: `norm_weight` is g, `norm_direction` |V|, then the moments of g."""
STEP = PREFIX + "step"
"""Steps that g has made: a reset of the moments at a refresh does not concern it."""


def specs(param: Tensor, hyper: Hyper) -> dict[str, Spec]:
    """Describe the state: two numbers a row, and the moments of the rule; raises as `check`."""
    check(param)
    rows = (param.shape[0],)
    names = {"weight": rows, "direction": rows, **RULES[hyper.rule].buffers(rows, hyper)}
    described = {PREFIX + name: Spec(shape, param.dtype, param.device, axis="m") for name, shape in names.items()}
    return {STEP: counter(), **described}


def check(param: Tensor) -> None:
    """Refuse weights that scaling in place would round.

    Raises:
        TypeError: The parameter is of low precision, or cannot be viewed as a matrix (a channels-last kernel).
    """
    viewed = param.ndim <= 2 or param.is_contiguous()
    if param.ndim >= 2 and (param.dtype not in (torch.float32, torch.float64) or not viewed):
        raise TypeError(
            f"weight_norm=True scales weights in place, got {param.dtype} with strides {param.stride()}: keep "
            "contiguous weights in fp32 (model.float()), or drop the option"
        )


def normalised(b: Bucket, update: Callable[[Bucket], None]) -> None:
    """Step every matrix of a bucket by `update` in normalised coordinates; one weight-sized temporary at a time."""
    layout = b.layout.natural
    for index in range(len(b.params)):
        one = b.only(index)
        weight = one.params[0].detach()
        matrix = weight.view(matrix_shape(weight.shape))
        held = one.states[0]
        if held[STEP] == 0:
            for name in ("weight", "direction"):
                held[PREFIX + name].copy_(_norms(matrix, layout))
        size, length = held[f"{PREFIX}weight"], held[f"{PREFIX}direction"]
        radial = _tangential_(one, matrix, size, length)
        matrix.mul_(_ratio(length, size)[:, None])  # V
        update(one)
        _step_size_(one, held, radial)
        length.copy_(_norms(matrix, layout))
        matrix.mul_(torch.where(size > 0, _ratio(size, length), 1.0)[:, None])
        size.copy_(torch.where(size > 0, size, length))  # a row of zeros starts where its first step leads


def _tangential_(one: Bucket, matrix: Tensor, size: Tensor, length: Tensor) -> Tensor:
    """Put G_V in the place of the bucket's gradient and return c."""
    grad = one.grads[0]
    unit = matrix / torch.where(size > 0, size, 1.0)[:, None]
    flat = grad.reshape(matrix.shape)
    radial = one.layout.natural.sum_cols(torch.linalg.vecdot(flat, unit))
    tangential = unit.mul_(-radial[:, None]).add_(flat).mul_(_ratio(size, length)[:, None])
    one.grads[0] = tangential.view(grad.shape)
    return radial


def _step_size_(one: Bucket, held: State, radial: Tensor) -> None:
    """`g <- (1 - lr wd) g - lr N`, N the direction of the rule on c; a c without a finite norm counts as zero."""
    radial = torch.where(torch.linalg.vector_norm(radial).isfinite(), radial, 0.0)
    held[STEP] += 1
    size, t = held[f"{PREFIX}weight"], int(held[STEP])
    moments = {name.removeprefix(PREFIX): value for name, value in held.items() if name.startswith(PREFIX)}
    direction = torch.empty_like(radial)
    signed = -radial if one.hyper.maximize else radial
    lies = sides.per_row(one.layout)
    work = Work([signed], [moments], [t], [size], [direction], layout=lies, weighs=lies)
    run_rule(one, work, [(one.positions[0], t)])
    lr, decay = rates(one, 0)
    size.mul_(decay).sub_(direction.mul_(lr))


def _norms(matrix: Tensor, layout: Layout) -> Tensor:
    """Norms of whole rows, of which this rank has some, or a piece of each."""
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    return layout.sum_cols(norms.square()).sqrt() if layout.cols else norms


def _ratio(one: Tensor, other: Tensor) -> Tensor:
    """`one / other`, 1 where either is zero."""
    return torch.where((one > 0) & (other > 0), one / other, 1.0)
