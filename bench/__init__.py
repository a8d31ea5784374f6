"""Runnable benchmarks: pre-train a LLaMA with any optimizer of the package and compare optimizers.

The commands are those of the console script `lowmem` (`python -m lowmem.bench` is the same program).
"""
