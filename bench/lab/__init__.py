"""The ablation lab: grids of training runs from a file or flags, run side by side, resumed, and shown on one page."""
