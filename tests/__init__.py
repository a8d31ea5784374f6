"""Test suite of lowmem."""
