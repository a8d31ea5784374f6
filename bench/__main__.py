"""`python -m lowmem.bench` is the console script `lowmem`."""

from .cli import main

main()
