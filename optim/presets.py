"""The neighbours' class names: their constructors, their group keys and, in full precision, their trajectories."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .core import codec
from .fira import Fira
from .galore import GaLore


class GaLoreAdamW(GaLore):
    """`galore_torch.GaLoreAdamW` on our core: a drop-in that changes speed, memory and checkpoints only.

    Groups with `rank, update_proj_gap, scale, proj_type` are projected, groups without `rank` are plain; eps is added
    before bias correction, decay comes after the update, bases come from an exact SVD.

    Args:
        params: Parameters or the official parameter groups.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment, before bias correction.
        weight_decay: Decoupled decay.
        correct_bias: Correct the bias of the moments.
        no_deprecation_warning: Accepted for compatibility; there is no such warning to silence.
        options: Any further option of `GaLore`, as `projector="sketch"` for cheap refreshes.

    Raises:
        ValueError: As `GaLore`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        **options: Any,
    ) -> None:
        del no_deprecation_warning
        self._declare(correct_bias=correct_bias)
        super().__init__(params, lr, betas, eps, weight_decay, **_official(options))


class GaLoreAdamW8bit(GaLore):
    """`galore_torch.GaLoreAdamW8bit` on our core: both moments in the 8-bit codes of bitsandbytes, which is not needed.

    As `GaLoreAdamW`, but eps is added after bias correction and the defaults are those of that class.

    Args:
        params: Parameters or the official parameter groups.
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment, after bias correction.
        weight_decay: Decoupled decay, after the update.
        amsgrad: Not supported, there neither.
        optim_bits: Ignored by the authors, whose class has 8 bits whatever is said.
        args: Ignored; it carried further options to bitsandbytes.
        min_8bit_size: Smallest number of elements that is coded, 4096 always.
        percentile_clipping: 100, no clipping of gradients by their history.
        block_wise: True, a scale a block.
        is_paged: False; state that moves between devices is not offered.
        options: Any further option of `GaLore`, as `state_dtype="8bit"` for codes that are closer to fp32.

    Raises:
        ValueError: As `GaLore`, or one of bitsandbytes' switches has another value than its default.

    Differences from the authors' code: blocks lie within rows, so that codes are bitsandbytes' where the rank is a
    multiple of 256; the update is not rounded to the weight's dtype before it is projected back; projected matrices
    with small states move (theirs do not with bitsandbytes 0.50); weights are not cloned.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = codec.SMALL,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        del optim_bits, args
        switches = {
            "amsgrad": (amsgrad, False),
            "min_8bit_size": (min_8bit_size, codec.SMALL),
            "is_paged": (is_paged, False),
        }
        switches |= {"percentile_clipping": (percentile_clipping, 100), "block_wise": (block_wise, True)}
        for name, (value, default) in switches.items():
            if value != default:
                raise ValueError(f"{name}={value} is not supported: drop it, or pass {name}={default}")
        super().__init__(params, lr, betas, eps, weight_decay, **_official({"state_dtype": "bnb8", **options}))


class GaLoreAdafactor(GaLore):
    """`galore_torch.GaLoreAdafactor` on our core: Adafactor on the projected gradient, and full-rank in plain groups.

    Args:
        params: Parameters or the official parameter groups.
        lr: Learning rate; None takes the relative step.
        eps: Added to the squared gradient, and the smallest parameter scale.
        clip_threshold: Largest root mean square of an update, in the low-rank space.
        decay_rate: Exponent of `beta2_t = 1 - t^decay_rate`.
        beta1: Momentum of the update; None has none.
        weight_decay: Decoupled decay by `lr * weight_decay`, before the update.
        scale_parameter: Multiply the learning rate by the weight's root mean square.
        relative_step: Learning rate `min(1e-2, 1/sqrt(t))`; None means: where no `lr` is given.
        warmup_init: With the relative step, start from `1e-6 t`.
        options: Any further option of `GaLore`.

    Raises:
        ValueError: `lr` with `relative_step=True`, `warmup_init` without the relative step, or `betas`.

    Difference from the authors' code: the default of `relative_step` follows `lr`, there it is True and contradicts
    every `lr`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        **options: Any,
    ) -> None:
        if "betas" in options:
            raise ValueError(f"betas={options['betas']}: Adafactor has one, pass beta1, and decay_rate for the second")
        relative = lr is None if relative_step is None else relative_step
        if lr is not None and relative:
            raise ValueError(f"lr={lr} contradicts relative_step=True: pass relative_step=False or lr=None")
        if lr is None and not relative:
            raise ValueError("lr=None needs relative_step=True: pass a learning rate or relative_step=True")
        if warmup_init and not relative:
            raise ValueError("warmup_init=True needs relative_step=True: pass lr=None")
        self._declare(
            scale_parameter=scale_parameter,
            relative_step=relative,
            warmup_init=warmup_init,
            clip_threshold=clip_threshold,
            beta2_decay=decay_rate,
        )
        betas = (beta1 or 0.0, 0.999)
        options = {"rule": "adafactor", "state_dtype": "float32", **options}
        super().__init__(params, 1e-2 if lr is None else lr, betas, eps, weight_decay, **_official(options))


class FiraAdamW(Fira):
    """`fira.FiraAdamW` on our core: the released code's order of operations and residual.

    Args:
        params: Parameters or the official parameter groups (`rank, update_proj_gap, alpha, proj_type`).
        lr: Learning rate.
        betas: Decay rates of the moments.
        eps: Added to the root of the second moment, before bias correction.
        weight_decay: Decoupled decay, after the update.
        correct_bias: Correct the bias of the moments.
        no_deprecation_warning: Accepted for compatibility; there is no such warning to silence.
        options: Any further option of `Fira`, as `residual="exact"`.

    Raises:
        ValueError: As `Fira`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        **options: Any,
    ) -> None:
        del no_deprecation_warning
        self._declare(correct_bias=correct_bias)
        super().__init__(params, lr, betas, eps, weight_decay, **_official(options))


def _official(options: dict[str, Any]) -> dict[str, Any]:
    """The neighbours' defaults: rank by group only, scale 1, an exact SVD."""
    return {"rank": None, "scale": 1.0, "projector": "svd", "compat": "official", **options}
