"""Parameters that are not projected: torch's own AdamW, or the rule on the whole gradient."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from . import state
from .apply import count_step, move_, rates, run_rule
from .basis import State
from .bucket import Bucket
from .rules import Work, single_eps
from .tiles import CHUNK


def plain_(b: Bucket) -> None:
    """Step parameters that are not projected: by torch's AdamW where the rule is AdamW in full precision."""
    mine = []
    theirs: dict[bool, list[int]] = {}
    for index, param in enumerate(b.params):
        if state.delegates(param, b.hyper):
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
    )


def _by_rule(b: Bucket) -> None:
    """Run the rule on one parameter: `W <- (1 - lr wd) W - lr N`, rounded once."""
    (t,) = count_step(b)
    lr, decay = rates(b, 0)
    for piece, (param, grad, held) in enumerate(_pieces(b)):
        work = grad.to(b.dtype)
        step = torch.empty_like(work)
        signed = -work if b.hyper.maximize else work
        run_rule(b, Work([signed], [held], [t], [param], [step]), [(b.positions[0], t, piece)])
        move_(param, step.mul_(lr), decay)


def _pieces(b: Bucket) -> Iterator[tuple[Tensor, Tensor, State]]:
    """Cut a parameter, its gradient and its moments into views of `CHUNK` elements where the rule allows it."""
    param, grad, held = b.params[0], b.grads[0], b.states[0]
    if not (b.rule.elementwise and param.is_contiguous()):
        yield param, grad, held
        return
    names = list(b.rule.buffers(tuple(param.shape), b.hyper))
    flat = [param.view(-1), grad.reshape(-1), *(held[name].view(-1) for name in names)]
    for parts in zip(*(torch.split(tensor, CHUNK) for tensor in flat), strict=True):
        yield parts[0], parts[1], dict(zip(names, parts[2:], strict=True))
