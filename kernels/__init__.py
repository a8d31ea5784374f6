"""Kernels of the optimizers: plain-torch specifications and the fastest implementation of each."""

if __name__ == "kernels":
    # The Hugging Face package of this name is looked up by transformers and bitsandbytes: with the repository
    # as current folder they must find it missing, not find us.
    raise ModuleNotFoundError("No module named 'kernels' (this folder is the package lowmem.kernels)", name="kernels")

from .dispatch import BACKENDS, pick

__all__ = ["BACKENDS", "pick"]
