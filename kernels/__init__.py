"""Kernels of the optimizers: plain-torch specifications and the fastest implementation of each.

Optimizers call `pick(op, tensor, backend)`, which returns the fastest form of an operation that runs on the tensor.

- `reference`: every operation in a few lines of torch, the specification. `dispatch`: the table of implementations.
- Torch, in pieces that stay in the cache: `moments` (Adam and Lion, in 8 bits too), `project_back` (moving weights),
  `statistics` (sums of squares), with `tiles` (cutting matrices) and `choice` (rows and columns by number).
- Formats: `blockwise` (8-bit codes), `rounding` (writing bf16 weights), `random` (numbers by seed, row and column).
- Other backends: `compiled` (torch.compile on a CPU), `bnb` (bitsandbytes), `capture` (what CUDA graphs forbid).
- Triton: `triton_moments`, `triton_project_back`, `triton_statistics`, `triton_random`, `triton_sketch`;
  `triton_blockwise` and `triton_common` are what they share.
"""

if __name__ == "kernels":
    # transformers and bitsandbytes look up the Hugging Face package of this name. With the repository as current
    # folder they find this one: without a file it passes for a bare folder, which they take for "not installed".
    del __file__
else:
    from .dispatch import BACKENDS, EVERYWHERE, pick

    __all__ = ["BACKENDS", "EVERYWHERE", "pick"]
