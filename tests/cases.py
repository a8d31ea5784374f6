"""The one table of trajectory cases: options, the dense reference they must follow, tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
from lowmem import optim
from lowmem.kernels.random import mix, subset
from lowmem.optim.core.seeded import DISTRIBUTIONS, SeededBasis
from torch import Tensor

from tests.reference.apollo import apollo_step
from tests.reference.fira import fira_step
from tests.reference.flora import flora_step
from tests.reference.frugal import frugal_step
from tests.reference.galore import galore_step, side_of
from tests.reference.galore_plus import galore_plus_step
from tests.reference.online_subspace import osd_step

SHAPES = {"tall": (24, 15), "wide": (13, 28), "square": (16, 16), "conv": (10, 4, 3, 3), "stack": (6, 8, 9)}
SIDES = ("std", "reverse_std", "left", "right", "full")
RULES = ("adamw", "sgd", "lion", "adafactor")
RANK, GAP, STEPS = 5, 4, 13  # refreshes at steps 0, 4, 8 and 12


@dataclass(frozen=True)
class Case:
    """An optimizer with its options, and the reference step with its own."""

    name: str
    build: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]
    reference: dict[str, Any]
    shape: tuple[int, ...] = (24, 15)
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9
    lr: float = 1e-2
    steps: int = STEPS
    follow: Callable[..., None] = galore_step
    reference_dtype: torch.dtype | None = None


@lru_cache
def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    """Random gradients with a falling spectrum, so that leading subspaces are well separated."""
    generator = torch.Generator().manual_seed(sum(shape))
    grads = []
    for _ in range(steps):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64).reshape(shape[0], -1)
        left, _, right = torch.linalg.svd(noise, full_matrices=False)
        spectrum = torch.arange(1, left.shape[1] + 1, dtype=torch.float64) ** -1.0
        grads.append((left * spectrum @ right).reshape(shape))
    return grads


def run(case: Case) -> tuple[Tensor, Tensor]:
    """Return the weights after the case's optimizer and after its reference."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(case.shape, generator=generator, dtype=torch.float64).to(case.dtype)
    ours, theirs = torch.nn.Parameter(start.clone()), start.to(case.reference_dtype or case.dtype, copy=True)
    optimizer = case.build([{"params": [ours], "rank": RANK, "update_proj_gap": GAP}], lr=case.lr, **case.options)
    state: dict[str, Any] = {}
    for grad in gradients(case.shape, case.steps):
        grad = grad.to(case.dtype)
        ours.grad = grad.clone()
        optimizer.step()
        case.follow(theirs, grad.to(theirs.dtype), state, lr=case.lr, rank=RANK, gap=GAP, **case.reference)
    return ours.detach(), theirs


def default_cases() -> Iterator[Case]:
    """GaLore against the dense reference with torch's conventions: every side, rule, shape and carry."""
    for shape_name, shape in SHAPES.items():
        for side in SIDES:
            for rule in RULES:
                if (side, rule) == ("full", "lion"):
                    continue  # R is diagonal at a refresh: off the diagonal Lion takes the sign of rounding errors
                for decay in (0.0, 0.1):
                    betas = (0.9, 0.99)
                    shared = {"proj_type": side, "rule": rule, "betas": betas, "weight_decay": decay, "scale": 0.25}
                    # Sign and order of singular vectors are free, which only "rotate" and "reset" do not see.
                    carry = "reset" if shape_name in ("wide", "conv") else "rotate"
                    yield Case(
                        f"{shape_name}-{side}-{rule}-{carry}-wd{decay}",
                        optim.GaLore,
                        {**shared, "projector": "svd", "carry": carry},
                        {**shared, "carry": carry},
                        shape,
                    )


def official_cases() -> Iterator[Case]:
    """`compat="official"` against the authors' order of operations, in fp32."""
    for shape_name, shape in SHAPES.items():
        for side in SIDES:
            for decay in (0.0, 0.1):
                shared = {"proj_type": side, "weight_decay": decay, "scale": 0.25, "eps": 1e-6}
                yield Case(
                    f"official-{shape_name}-{side}-wd{decay}",
                    optim.GaLore,
                    {**shared, "projector": "svd", "compat": "official"},
                    {**shared, "official": True},
                    shape,
                    torch.float32,
                    1e-6,
                )


def fira_cases() -> Iterator[Case]:
    """Fira's paper and released code, every side, both scalings, with and without the limiter."""
    modes = {"row": "column", "matrix": "matrix"}
    variants = [("exact", "adamw", False), ("official", "adamw", False), ("exact", "rmsprop", False)]
    for shape_name, shape in SHAPES.items():
        for side, scale_mode, gamma in product(SIDES, modes, (1.01, None)):
            for residual, rule, official in (*variants, ("official", "adamw", True)):
                if (side, scale_mode) == ("full", "row"):
                    continue
                carry = "keep" if official else "rotate"
                shared = {"betas": (0.9, 0.99), "weight_decay": 0.1, "scale": 0.25, "proj_type": side, "rule": rule}
                shared |= {"gamma": gamma, "residual": residual, "carry": carry}
                source = "code" if official else "paper"
                yield Case(
                    f"fira-{shape_name}-{side}-{scale_mode}-{gamma}-{residual}-{rule}-{source}",
                    optim.Fira,
                    {
                        **shared,
                        "scale_mode": scale_mode,
                        "projector": "svd",
                        "compat": "official" if official else None,
                    },
                    {**shared, "scale_mode": modes[scale_mode], "official": official},
                    shape,
                    follow=fira_step,
                )


def gaussian_basis(refresh: int, side: int, size: int, rank: int) -> Tensor:
    """The random basis of the first parameter at a refresh: an input of the reference, not its result."""
    return SeededBasis("gaussian", mix(mix(0, 0, refresh), side), size, rank).matrix(torch.float64)


def apollo_cases() -> Iterator[Case]:
    """APOLLO in Gaussian and singular bases: every side, both scalings, with and without the limiter, both orders."""
    modes = {"row": "column", "matrix": "matrix"}
    variants: list[tuple[str, dict[str, Any]]] = [
        ("paper", {"carry": "keep", "gamma": 1.01, "scale": 1.0}),
        ("reset", {"carry": "reset", "gamma": None, "scale": 128.0}),
        ("svd", {"carry": "rotate", "gamma": 1.01, "scale": 0.5}),
        ("code", {"carry": "keep", "gamma": 1.01, "scale": 4.0, "eps": 1e-6}),
    ]
    for (name, shape), side, mode, (label, own) in product(SHAPES.items(), SIDES, modes, variants):
        if (side, mode) == ("full", "row"):
            continue
        shared = {"betas": (0.9, 0.99), "weight_decay": 0.1, "proj_type": side, **own}
        ours = {"projector": "svd" if label == "svd" else "gaussian", "compat": "official" if label == "code" else None}
        basis = None if label == "svd" else gaussian_basis
        yield Case(
            f"apollo-{name}-{side}-{mode}-{label}",
            optim.Apollo,
            {**shared, **ours, "scale_mode": mode},
            {**shared, "scale_mode": modes[mode], "official": label == "code", "basis_fn": basis},
            shape,
            follow=apollo_step,
        )


def online_cases() -> Iterator[Case]:
    """Online Subspace Descent: every side, rule and rule of the basis."""
    for shape_name, shape in SHAPES.items():
        for side, rule, proj_rule in product(SIDES[:-1], RULES, ("adam", "sgd", "lion", "adafactor")):
            shared = {"betas": (0.9, 0.99), "weight_decay": 0.1, "scale": 0.5, "proj_type": side, "rule": rule}
            shared |= {"proj_rule": proj_rule, "proj_weight_decay": 0.01, "ortho": 0.2}
            yield Case(
                f"online-{shape_name}-{side}-{rule}-{proj_rule}",
                optim.OnlineSubspaceDescent,
                {**shared, "proj_init": "svd"},
                shared,
                shape,
                follow=osd_step,
            )


def flora_options() -> Iterator[tuple[str, dict[str, Any]]]:
    """Decay rates, windows and kinds of bases that the smallest matrix of the table allows, and the other switches."""
    for kappa, beta1, distribution in product((1, 4, 8), (0.3, 0.5, 0.9), DISTRIBUTIONS):
        if (kappa, beta1) in ((1, 0.3), (4, 0.5), (8, 0.9)):
            yield f"{distribution}-T{kappa}-b{beta1}", {"kappa": kappa, "beta1": beta1, "distribution": distribution}
    yield "no-momentum", {"beta1": None}
    yield "relative", {"relative_step": True, "scale_parameter": False}
    yield "no-clip", {"clip": None, "eps": (1e-20, 1e-2), "beta2_decay": -0.5}
    yield "decay", {"weight_decay": 0.1, "scale_parameter": False}


def flora_cases() -> Iterator[Case]:
    """Flora: every shape, distributions, windows and switches, in our bases."""
    for (name, shape), (label, options) in product(SHAPES.items(), flora_options()):
        if label == "no-momentum" and len(shape) > 2:
            continue  # Adafactor sees these as a batch of matrices
        options = {"kappa": 14, "distribution": "gaussian", **options}
        distribution, kappa = options.pop("distribution"), options.pop("kappa")
        clip = {"clip_threshold": options["clip"]} if "clip" in options else {}

        def build(groups: Any, *, kappa: int = kappa, **given: Any) -> torch.optim.Optimizer:
            return optim.Flora([{**group, "update_proj_gap": kappa} for group in groups], **given)

        def basis(window: int, rank: int, size: int, *, distribution: str = distribution) -> Tensor:
            return SeededBasis(distribution, mix(0, 0, window), size, rank).matrix(torch.float64).T

        ours = {key: value for key, value in options.items() if key != "clip"} | clip
        yield Case(
            f"flora-{name}-{label}",
            build,
            {**ours, "distribution": distribution},
            {**options, "kappa": kappa, "basis_fn": basis},
            shape,
            follow=follow_flora,
        )


def follow_flora(weight: Tensor, grad: Tensor, state: dict[str, Any], *, gap: int, **options: Any) -> None:
    """The reference on the matrix view, where the case says how long a window is."""
    clip = options.pop("clip", 1.0)
    clip = float("inf") if clip is None else clip
    flora_step(weight.view(len(weight), -1), grad.view(len(grad), -1), state, clip=clip, **options)


def cycled(refresh: int, heads: int, *, dk: int) -> list[int]:
    """The heads that `head_select="cycle"` takes: as many at a refresh as have RANK rows."""
    taken = -(-RANK // dk)
    return sorted((refresh * taken + position) % heads for position in range(taken))


def galore_plus_cases() -> Iterator[Case]:
    """GaLore+: both residuals through the warm-up and three refreshes, ordinary, shared, stacked and fused heads."""
    heads: dict[str, tuple[tuple[int, int], int | None, list[tuple[int, int | None]] | None]] = {
        "tall": ((24, 15), None, None),
        "wide": ((13, 28), None, None),
        "square": ((16, 16), None, None),
        "heads": ((20, 15), 4, [(20, 4)]),
        "heads-wide": ((18, 28), 3, [(18, 3)]),
        "heads-stacked": ((24, 24), 8, [(24, 8)]),
        "heads-one": ((12, 20), 1, [(12, 1)]),
        "fused": ((30, 16), None, [(12, 2), (6, 1), (12, None)]),
    }
    for (name, (shape, count, ranges)), residual in product(heads.items(), ("exact", "additive", None)):
        for carry, density, warmup in (("rotate", 0.1, 3), ("rotate", 0.05, 20), ("reset", 0.1, 2), ("rotate", 1.0, 5)):
            if (residual is None and warmup != 3) or (density == 1.0 and name not in ("wide", "fused")):
                continue
            shared = {"betas": (0.9, 0.99), "weight_decay": 0.1, "scale": 0.25, "carry": carry, "residual": residual}
            own = {"residual_density": density, "residual_warmup": warmup}
            own |= {"num_heads": count or ranges, "head_select": "cycle"} if ranges else {"projector": "svd"}
            dk = shape[0] // count if count else 6
            yield Case(
                f"galore-plus-{name}-{residual}-{carry}-{density}-{warmup}",
                optim.GaLorePlus,
                {**shared, **own},
                {**shared, "density": density, "warmup": warmup, "ranges": ranges, "pick": partial(cycled, dk=dk)},
                shape,
                tolerance=1e-8 if ranges and residual == "additive" else 1e-9,  # Adam blows up what the sketch rounds
                follow=galore_plus_step,
            )


def build_frugal(groups: Any, *, density: float, **options: Any) -> torch.optim.Optimizer:
    """FRUGAL of a density, where the table says a rank."""
    sizes = [{key: value for key, value in group.items() if key != "rank"} for group in groups]
    return optim.Frugal(sizes, density=density, **options)


def follow_frugal(weight: Tensor, grad: Tensor, state: dict[str, Any], *, rank: int, gap: int, **options: Any) -> None:
    """The reference on the entries that our projectors choose: a function of seed, position and refresh."""
    m, n = grad.shape
    whole = {"columns": n, "rows": m, "randk": m * n}.get(options["select"])

    def chosen(_: Tensor, size: int) -> Tensor:
        return subset(mix(0, 0, state.get("c", 0) // gap), whole or 0, size)

    if whole is None:  # the reference takes a share of the projected side, we of the smaller one
        side = {"left": m, "right": n, "full": min(m, n)}[side_of(options["proj_type"], m, n)]
        options["density"] = round(options["density"] * min(m, n)) / side
    frugal_step(weight, grad, state, gap=gap, select_fn=chosen, **options)


def frugal_cases() -> Iterator[Case]:
    """FRUGAL: every selection, pair of rules and carry, spread over the shapes; bases of directions on every side."""
    shapes, rules = ("tall", "wide", "square"), ("adamw", "lion", "sgd")
    frees, carries, transfers = ("signsgd", "sgd", "none"), ("reset", "rotate", "keep"), ("reset", "reproject", "keep")
    shared: dict[str, Any] = {"betas": (0.9, 0.99), "weight_decay": 0.1, "density": 0.3, "free_scale": 0.3}
    for picks in product(range(3), repeat=4):
        slots = shapes, ("columns", "rows", "randk"), rules, frees
        shape, select, rule, free = (names[pick] for names, pick in zip(slots, picks, strict=True))
        turn = sum(picks) % 3
        yield Case(
            f"frugal-{shape}-{select}-{rule}-{free}-{carries[turn]}",
            build_frugal,
            {**shared, "rule": rule, "scale": 0.5, "projector": select, "free_rule": free, "carry": carries[turn]},
            {**shared, "rule": rule, "full_scale": 0.5, "select": select, "free": free}
            | {"state_transfer": transfers[turn]},
            SHAPES[shape],
            follow=follow_frugal,
        )
    for (i, shape), side, (j, rule), turn in product(enumerate(shapes), SIDES, enumerate(rules), range(2)):
        if (side, rule) == ("full", "lion"):
            continue  # as in GaLore's cases
        free, space = frees[(i + j) % 3], ("ambient", "complement")[turn]
        both = {**shared, "rule": rule, "proj_type": side, "free_space": space}
        yield Case(
            f"frugal-{shape}-{side}-{rule}-{free}-{space}-{carries[turn]}",
            build_frugal,
            {**both, "scale": 0.5, "projector": "svd", "free_rule": free, "carry": carries[turn]},
            {**both, "full_scale": 0.5, "select": "dense", "free": free, "state_transfer": transfers[turn]},
            SHAPES[shape],
            follow=follow_frugal,
        )


def low_precision_cases(cases: list[Case]) -> Iterator[Case]:
    """The tall cases again with fp32 and bf16 weights, beside the reference in fp64 on the same gradients."""
    for case in cases:
        if "tall" in case.name and case.dtype == torch.float64:
            # Projected from both sides, R is diagonal at a refresh: Adam makes full steps of rounding errors beside it.
            both = case.options.get("proj_type") == "full"
            for dtype, tolerance in ((torch.float32, 5e-3 if both else 1e-6), (torch.bfloat16, 4e-2 if both else 2e-2)):
                name = f"{case.name}-{str(dtype).removeprefix('torch.')}"
                yield replace(case, name=name, dtype=dtype, tolerance=tolerance, reference_dtype=torch.float64)


EXACT = [
    *default_cases(),
    *official_cases(),
    *fira_cases(),
    *apollo_cases(),
    *online_cases(),
    *flora_cases(),
    *galore_plus_cases(),
    *frugal_cases(),
]
CASES = [*EXACT, *low_precision_cases(EXACT)]
