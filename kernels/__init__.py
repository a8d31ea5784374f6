"""Kernels of the optimizers: plain-torch specifications and the fastest implementation of each."""

if __name__ == "kernels":
    # transformers and bitsandbytes look up the Hugging Face package of this name. With the repository as current
    # folder they find this one: without a file it passes for a bare folder, which they take for "not installed".
    del __file__
else:
    from .dispatch import BACKENDS, EVERYWHERE, pick

    __all__ = ["BACKENDS", "EVERYWHERE", "pick"]
