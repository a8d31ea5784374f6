"""GaLore: Gradient Low-Rank Projection (arXiv 2403.03507)."""

from __future__ import annotations

from .core.bucket import Bucket
from .core.optimizer import SubspaceOptimizer
from .core.verbs import follow, inner, project, project_back_, refresh


class GaLore(SubspaceOptimizer):
    """GaLore: the moments live in a low-rank subspace of the gradient that is renewed every T steps.

    For a weight W (m x n), oriented so that its gradient A (a x b) is projected from the right:

        P_t    = r leading right singular vectors of A_t, every T steps     (b, r)
        R_t    = A_t P_t                                                    (a, r)
        N_t    = rule(R_t), for AdamW  Mhat_t / (sqrt(Vhat_t) + eps)        (a, r)
        W_t    = (1 - lr wd) W_{t-1} - lr scale N_t P_t^T

    State of a projected matrix: `min(m,n) r + 2 max(m,n) r` elements with `proj_type="std"`, against `2 m n`.

    Args:
        params: Parameters, groups or (name, parameter) pairs. Options below may be given by group; `alpha`,
            `update_gap`, `projection_type` and `density` (rank as a share of the smaller side) are accepted there, and
            `stacked=True` for stacks of experts (experts, m, n), every matrix of which is projected by itself.
        lr: Learning rate, a number or a 1-element tensor. Projected matrices move by `lr * scale`.
        betas: Decay rates of the moments. Lion uses both, momentum SGD, RMSprop and Adafactor the first as
            momentum.
        eps: Added to the root of the second moment; for Adafactor also the pair (eps1, eps2) of its paper.
        weight_decay: Decoupled, before the update, by `lr * weight_decay`.
        rank: Rank r of the subspace. If any group names a rank, groups that do not are plain; otherwise it applies to
            every weight of at least two dimensions (viewed as first x rest) whose smaller side exceeds it.
            Everything else gets the rule itself, for AdamW exactly torch.optim.AdamW. "auto" chooses a rank for every
            matrix from the spectra of the first gradients; until then, while all gradients of a group are zero or not
            finite, the group is not stepped. A group with `"ranks"`, those of another run, begins with them.
        energy: With "auto", the share of a gradient's energy that a rank must hold, as 0.9; None asks for no share.
        budget: With "auto", the bytes that all state of a group's projected matrices may take; None sets no limit.
        update_proj_gap: Steps T between two refreshes of the basis.
        scale: The paper's alpha, a factor of the learning rate of projected matrices.
        proj_type: Side that is projected: "std" (the smaller), "reverse_std", "left", "right", "full" (both).
        projector: "sketch" (randomized subspace iteration, warm-started, seeded), "svd" (exact), "track" (one power
            step after the last step of an interval, for short ones), "descend" (online PCA in every step; a group may
            set `proj_rule` and the others of `OnlineSubspaceDescent`), "random" (orthonormal columns from the seed
            alone), "dct" (columns of the cosine matrix with the largest `|A D|`), "columns", "rows", "randk"
            (`r max(m,n)` entries) or "randperm" (columns or rows as `proj_type` says) from the seed alone, or
            "cross_head" in a group with `num_heads` and perhaps `head_select`, which `GaLorePlus` documents.
        carry: What becomes of the moments at a refresh: "rotate" (the default) expresses them in the new basis,
            "keep" (the paper, and the default of `compat="official"`) leaves their numbers, "reset" starts afresh.
            With `projector="descend"`, which has no refreshes, it has no effect.
        lazy: A threshold between 0 and 1 for the overlap `|P_new^T P_old|^2 / r` of successive bases. At or above it
            the interval of that matrix doubles, up to 16 times `update_proj_gap`; below it the interval is
            `update_proj_gap` again. None (the default) never changes it.
        weight_norm: Step length and direction of every row apart, `W = g V / |V|`. V is not stored: the state grows by
            two numbers a row and the rule's moments of g. Needs fp32 or fp64 weights.
        rule: Inner optimizer: "adamw", "adafactor", "lion", "rmsprop" or "sgd".
        state_dtype: How moments are stored: "float32" (the default; fp64 for fp64 parameters), "8bit" (codes of 8 bits
            with a scale every 128 entries of a row, second moments rounded stochastically), "bnb8" (the codes of
            bitsandbytes), "bfloat16" (second moments rounded stochastically), "parameter" (the default of
            `compat="official"`), or a torch.dtype.
        gemm_dtype: Dtype of the projections' operands; "auto" is the gradient's.
        basis_dtype: None keeps a basis in the weight's dtype, "int8" and "int4" in that many bits, columns of unit
            length but only nearly orthogonal.
        shard_basis: Where parameters are sharded along the kept side, keep only a share of the rows of every basis on
            each rank, and gather them for a step; None does so on more than 8 ranks, where whole bases would outweigh
            the moments.
        rounding: How bf16 weights are written: "nearest", "stochastic" (unbiased, without state), "compensated" (the
            fp32 weight, of which 16 bits are kept in state) or "compensated8" (24 bits of it, one byte of state).
        num_heads: Heads of `projector="cross_head"`, a number or ranges of rows, see `GaLorePlus`; None has none.
        head_select: Which head the shared basis is found from, a "random" one by default, see `GaLorePlus`.
        stagger: Spread the refreshes of the matrices over the interval, so that no step stalls.
        seed: Seed of sketches, random bases and rounding; results follow from it, the order of parameters and the step.
        maximize: Ascend instead of descend.
        backend: "auto", or the only kernel backend to use.
        foreach: Form of torch's AdamW in plain groups; as in torch.optim.AdamW.
        fused: Form of torch's AdamW in plain groups; by default fused where the device has it.
        capturable: Keep step counts on the device, for steps that a CUDA graph captures; see `GraphedStep`. Not with
            `rule="adafactor"`, `projector="dct"`, `weight_norm`, `compat` or sharded parameters.
        replicas: Process group of DistributedDataParallel, over which the search for bases is shared: every basis is
            found on one replica and sent to the others. None: each replica finds all of them. Not saved.
        compat: None (the default) is torch's AdamW inside; "official" follows the authors' code: eps before bias
            correction, decay after the update, moments in the gradient's dtype and kept at a refresh, rank clipped to
            the matrix, LAPACK's SVD in fp32.

    Raises:
        ValueError: An option is out of range or unknown but close to a known one.

    Differences from the authors' code: state is tensors only, weights of any dimension are accepted, `reverse_std`
    works at any rank, a zero or non-finite gradient keeps the old basis instead of failing, and see `compat`.
    """

    shards = True
    linear_between_refreshes = True

    def update(self, b: Bucket) -> None:
        """One step of GaLore on a bucket of same-shape matrices."""
        refresh(b)  # P_t, every T steps              (b, r)
        low = project(b)  # R_t = A_t P_t             (k, a, r)
        step = inner(b, low)  # N_t = rule(R_t)       (k, a, r)
        project_back_(b, step)  # W <- (1 - lr wd) W - lr scale N P^T
        follow(b, low)  # P_{t+1}, by projectors that move after the step
