"""What a step cannot do without, measured beside the optimizers: matrix products, and passes over the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..kernels import choice

LR = 1e-6


class Pass:
    """`W <- W - lr G`: weights and gradients read once, weights written once.

    Args:
        params: Weights with gradients.
        rank: Of no use to it.
    """

    def __init__(self, params: Iterable[Tensor], rank: int = 0) -> None:
        self.params = list(params)

    @torch.no_grad()
    def step(self) -> None:
        """Make the pass."""
        for param in self.params:
            assert param.grad is not None
            param.add_(param.grad, alpha=-LR)


class Products:
    """`R = A P`, `W <- (1 - lr wd) W - lr R P^T` and nothing else.

    Args:
        params: Weights with gradients.
        rank: Columns of the (random orthonormal) bases.
    """

    def __init__(self, params: Iterable[Tensor], rank: int) -> None:
        self.work = []
        for param in params:
            m, n = param.shape
            basis = torch.linalg.qr(torch.randn(min(m, n), rank, device=param.device))[0].to(param)
            self.work.append((param, basis, param.new_empty(max(m, n), rank)))

    @torch.no_grad()
    def step(self) -> None:
        """Project, and project back."""
        for param, basis, low in self.work:
            assert param.grad is not None
            if param.shape[0] >= param.shape[1]:
                torch.mm(param.grad, basis, out=low)
                param.addmm_(low, basis.T, beta=1 - LR, alpha=-LR)
            else:
                torch.mm(param.grad.T, basis, out=low)
                param.addmm_(basis, low.T, beta=1 - LR, alpha=-LR)


class Product(Products):
    """`R = A P` alone."""

    @torch.no_grad()
    def step(self) -> None:
        """Project."""
        for param, basis, low in self.work:
            assert param.grad is not None
            torch.mm(param.grad if param.shape[0] >= param.shape[1] else param.grad.T, basis, out=low)


class Columns(Pass):
    """Some columns of gradients and weights copied, and those of weights written back.

    Args:
        params: Weights with gradients.
        rank: So many of the smallest side, and as large a share of the others.
    """

    def __init__(self, params: Iterable[Tensor], rank: int) -> None:
        super().__init__(params)
        share = rank / min(min(param.shape) for param in self.params)
        self.chosen = [_evenly(param, share) for param in self.params]

    @torch.no_grad()
    def step(self) -> None:
        """Copy, and write back."""
        for param, index in zip(self.params, self.chosen, strict=True):
            assert param.grad is not None
            dim = 1 if param.shape[0] >= param.shape[1] else 0
            choice.select(param.grad, index, dim)
            choice.put_(param, index, dim, choice.select(param, index, dim))


def _evenly(param: Tensor, share: float) -> Tensor:
    side = min(param.shape)
    return torch.linspace(0, side - 1, max(1, round(share * side)), device=param.device).long()


class Descent(Products):
    """The products of online PCA beside them: `Z = A^T R`, two Gram matrices, and two of r x r in the basis' fp32."""

    def __init__(self, params: Iterable[Tensor], rank: int) -> None:
        super().__init__(params, rank)
        self.wide = [basis.float() for _, basis, _ in self.work]

    @torch.no_grad()
    def step(self) -> None:
        """Project, project back, and make the products of a descent."""
        super().step()
        for (param, _, low), basis in zip(self.work, self.wide, strict=True):
            assert param.grad is not None
            matrix = param.grad if param.shape[0] >= param.shape[1] else param.grad.T
            adjoint, image = (matrix.T @ low).float(), low.float()
            adjoint @ (basis.T @ basis) + basis @ (image.T @ image)


FLOORS: dict[str, type[Pass] | type[Products]] = {
    "pass": Pass,
    "columns": Columns,
    "product": Product,
    "products": Products,
    "descent": Descent,
}
