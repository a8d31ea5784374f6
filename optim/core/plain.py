"""Parameters that are not projected: torch's own AdamW, or the rule on the whole gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from ...kernels import pick, random
from ...kernels.reference import NO_CORRECTION, Count
from ...kernels.rounding import Target
from ...kernels.tiles import tiles
from . import codec, state
from .apply import count_step, move_, rates, run_rule
from .basis import State
from .bucket import Bucket
from .rules import Work, blockwise, single_eps
from .target import writing


def plain_(b: Bucket) -> None:
    """Step parameters that are not projected: by torch's AdamW where the rule is AdamW in full precision."""
    mine = []
    theirs: dict[bool, list[int]] = {}
    for index, param in enumerate(b.params):
        if codec.coded(b.states[index], "exp_avg") is None and state.delegates(param, b.hyper):
            theirs.setdefault(state.runs_fused(param, b.hyper), []).append(index)
        else:
            mine.append(index)
    for fused, indices in theirs.items():
        _delegate(b, indices, fused=fused)
    for index in mine:
        _by_rule(b.only(index))


def _delegate(b: Bucket, indices: list[int], *, fused: bool) -> None:
    hyper = b.hyper
    torch_adamw(
        [b.params[i] for i in indices],
        [b.grads[i].contiguous() if fused else b.grads[i] for i in indices],
        [b.states[i]["exp_avg"] for i in indices],
        [b.states[i]["exp_avg_sq"] for i in indices],
        [],
        [b.states[i]["step"] for i in indices],
        fused=fused,
        foreach=hyper.foreach,
        amsgrad=False,
        beta1=hyper.betas[0],
        beta2=hyper.betas[1],
        lr=hyper.lr,
        weight_decay=hyper.weight_decay,
        eps=single_eps(hyper.eps),
        maximize=hyper.maximize,
        capturable=hyper.capturable,
    )


def _by_rule(b: Bucket) -> None:
    """Run the rule on one parameter: `W <- (1 - lr wd) W - lr N`, rounded once."""
    (t,) = count_step(b)
    if _coded_adamw_(b, t) or _widened_adamw_(b, t):
        return
    param, position = b.params[0], b.positions[0]
    lr, decay = rates(b, 0)
    for target in writing(param, b.states[0], b.hyper, position, box=b.layout.box):
        for piece, (part, grad, held) in enumerate(_pieces(b, target)):
            wide = grad.to(b.dtype)
            step = torch.empty_like(wide)
            signed = -wide if b.hyper.maximize else wide
            weight = part.weight if b.rule.elementwise else param
            work = Work([signed], [held], [t], [weight], [step], layout=b.layout, weighs=b.layout)
            run_rule(b, work, [(position, t, piece)])
            move_(part, codec.matrix(step).mul_(lr), decay)


def _coded_adamw_(b: Bucket, t: Count) -> bool:
    """If the moments are AdamW's in 8 bits, step in one pass over weight, gradient and codes; tell whether it did."""
    held, hyper, position = b.states[0], b.hyper, b.positions[0]
    first, second = codec.coded(held, "exp_avg"), codec.coded(held, "exp_avg_sq")
    if hyper.rule != "adamw" or hyper.maximize or first is None or second is None:
        return False
    count = t if hyper.correct_bias else NO_CORRECTION
    how = blockwise(hyper, [random.mix(hyper.seed, position, t)])
    for target in writing(b.params[0], held, hyper, position, box=b.layout.box):
        adamw_ = pick(f"adamw_{how.form.name}", target.weight, hyper.backend)
        adamw_(target, codec.matrix(b.grads[0]), (first, second), count, *rates(b, 0), how)
    return True


def _widened_adamw_(b: Bucket, t: Count) -> bool:
    """If AdamW's moments are wider than the weight, as fp32 for bf16, step on a CPU; tell whether it did.

    Torch's fused form takes one dtype: it gets tiles of weight and gradient in that of the moments.
    """
    param, held, hyper = b.params[0], b.states[0], b.hyper
    if hyper.rule != "adamw" or hyper.official or param.device.type != "cpu":
        return False
    if param.dtype == b.dtype or held["exp_avg"].dtype != b.dtype:
        return False
    count = torch.tensor(float(t), dtype=torch.float32, device="cpu")
    for target in writing(param, held, hyper, b.positions[0], box=b.layout.box):
        for part, grad, moments in _pieces(b, target):
            value, wide = part.read().contiguous(), grad.to(b.dtype).contiguous()
            torch._fused_adamw_(
                [value],
                [wide],
                [moments["exp_avg"]],
                [moments["exp_avg_sq"]],
                [],
                [count],
                lr=float(hyper.lr),
                beta1=hyper.betas[0],
                beta2=hyper.betas[1],
                weight_decay=hyper.weight_decay,
                eps=single_eps(hyper.eps),
                amsgrad=False,
                maximize=hyper.maximize,
            )
            part.write(value)
    return True


def _pieces(b: Bucket, target: Target) -> Iterator[tuple[Target, Tensor, State]]:
    """Cut a weight, its gradient and its moments into views of bounded size where the rule allows it."""
    grad, held = b.grads[0], b.states[0]
    if not b.rule.elementwise:
        yield target, grad, held
        return
    grad = codec.matrix(grad)
    for rows, cols in tiles(grad):
        names = b.rule.buffers(tuple(grad.shape), b.hyper)
        yield target.part(rows, cols), grad[rows, cols], codec.part(held, names, b.hyper.state_dtype, rows, cols)
