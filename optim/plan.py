"""What training with an optimizer takes in memory, known before anything is allocated.

State follows from its description. For GaLore with `state_dtype="8bit"` a projected weight (m, n) keeps

    basis      min(m, n) r                        elements of the weight's dtype, unless `basis_dtype` is another
    moments    2 max(m, n) r                      bytes of codes
    scales     8 max(m, n) ceil(r / 128)          bytes: fp32, one for 128 codes of a row, twice

with the default `proj_type="std"`, and a plain parameter of (rows, cols), a vector being one row of itself,

    moments    2 rows cols                        bytes of codes
    scales     8 rows ceil(cols / 128)            bytes
    or, of fewer than 4096 elements or with rows of fewer than 16,
    moments    8 rows cols                        bytes: fp32

What a step takes besides is measured: the optimizer's own code runs on tensors without data, every one of which is
counted while it lives.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from .core.lifecycle import Lifecycle
from .planning_state import KINDS, by_kind, described, kept, kind
from .planning_steps import Step, alone, largest, together, without_data
from .planning_watch import Watch, pieces_of

__all__ = ["KINDS", "Plan", "Step", "Watch", "by_kind", "kind", "plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes of training by what they hold.

    Args:
        weights: All parameters.
        gradients: One for every parameter.
        largest_gradient: The largest of them: about all that there is at a time with gradient release.
        moments: First and second moments, those of a basis included.
        bases: Projections and what they are coded with, or the indices that stand for them.
        scales: Scales of coded moments.
        corrections: What compensated bf16 weights keep.
        other: All other state, counters left out, which are a few numbers of the host.
        step: What a step of all parameters at once allocates.
        released: What the largest step of a single parameter allocates.
    """

    weights: int
    gradients: int
    largest_gradient: int
    moments: int
    bases: int
    scales: int
    corrections: int
    other: int
    step: Step
    released: Step

    @property
    def state(self) -> int:
        """All state that the optimizer keeps between steps."""
        return self.moments + self.bases + self.scales + self.corrections + self.other

    @property
    def total(self) -> int:
        """All but activations, in a loop that calls `step()`."""
        return self.weights + self.gradients + self.state + self.step.largest

    @property
    def total_released(self) -> int:
        """All but activations, with `enable_gradient_release`."""
        return self.weights + self.largest_gradient + self.state + self.released.largest


def plan(optimizer: Optimizer, device: str = "cuda") -> Plan:
    """Tell what training with an optimizer takes, without allocating any of it.

        with torch.device("meta"):
            model = build()
        print(plan(GaLore(param_groups(model, rank=1024), state_dtype="8bit")).state)

    Args:
        optimizer: An optimizer of this package or of torch; its parameters may have data or none, and are not touched.
        device: "cuda" or "cpu": a step works in pieces of the size that the device gets. Default: a GPU.

    Returns:
        Bytes, for training on one device. What a step allocates is that of torch's operations: kernels of Triton
        allocate less.

    Raises:
        RuntimeError: Ranks are left to the gradients (`rank="auto"`) and not chosen yet.
        ValueError: The device is another.
    """
    if device not in ("cuda", "cpu"):
        raise ValueError(f"got device={device!r}: plans are for 'cuda' or 'cpu'")
    with pieces_of(device):
        if isinstance(optimizer, Lifecycle):
            state = described(optimizer)  # first, as it refuses what is not decided yet
            shadow = without_data(optimizer, device)
        else:
            shadow = without_data(optimizer, device)
            state = kept(shadow)
        every, released = together(shadow), largest(alone(shadow).values())
    sizes = [param.nbytes for group in shadow.param_groups for param in group["params"]]
    return Plan(
        weights=sum(sizes),
        gradients=sum(sizes),
        largest_gradient=max(sizes, default=0),
        **state,
        step=every,
        released=released,
    )
