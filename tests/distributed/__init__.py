"""What ranks of real processes run for `test_distributed.py`."""
