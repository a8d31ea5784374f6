"""Values of options that no other test names: the dtype of products, and what is refused by constructors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowmem.optim import LISA, Adafactor, AdamW8bit, BAdam, GaLore, OnlineSubspaceDescent, head_groups
from torch import Tensor, nn


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.ones(24, 16))


def stepped(gemm_dtype: str, steps: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(24, 16, generator=generator))
    start = param.detach().clone()
    optimizer = GaLore([param], lr=1e-2, rank=4, update_proj_gap=100, weight_decay=0.0, gemm_dtype=gemm_dtype)
    for _ in range(steps):
        param.grad = torch.randn(24, 16, generator=generator)
        optimizer.step()
    return param.detach() - start


def test_products_are_made_in_the_dtype_that_is_asked_for() -> None:
    own, wide, narrow = (stepped(dtype) for dtype in ("auto", "float64", "bfloat16"))
    torch.testing.assert_close(wide, own, rtol=1e-4, atol=1e-6)
    far = (narrow - own).norm() / own.norm()
    assert 1e-4 < far < 2e-2  # products of bf16 factors, rounded by 2^-9 of them
    torch.testing.assert_close(stepped("float32"), own, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: AdamW8bit([{"params": [matrix()], "rank": 4}]), "AdamW8bit projects nothing"),
        (lambda: LISA([("layers.0.weight", matrix())], rank=1), "LISA calls it layers"),
        (lambda: BAdam([("weight", matrix())]), "has none: put it in a plain group"),
        (lambda: Adafactor.torch([matrix()], foreach=True), "foreach=True is not supported"),
        (lambda: GaLore([matrix()], betas=(0.9,)), "Invalid betas"),
        (lambda: GaLore([matrix()], rank=4, lazy=1.5), "Invalid lazy"),
        (lambda: GaLore([matrix()], rank=4, backend="compile"), "computes moments of state_dtype='8bit'"),
        (lambda: GaLore([matrix()], rule="lion", state_dtype="8bit", backend="compile"), "computes rule='adamw'"),
        (lambda: OnlineSubspaceDescent([{"params": [matrix()], "rank": 4, "carry": "reset"}]), "never refreshed"),
        (lambda: head_groups(nn.Linear(4, 4), named=True), "named=True"),
    ],
)
def test_constructors_refuse_by_name(build: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()
