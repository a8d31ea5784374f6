"""Peak memory without data: models and steps run on tensors of the meta device, and what they allocate is counted.

- `watch`: `Watch`, which counts the bytes alive and the most of them at a time.
- `model`: the forward and backward pass. `steps`: the optimizer's step. `state`: the optimizer's state, by kind.

`lowmem.optim.plan` is the public face.
"""
