"""The subspace-projection core: one lifecycle, a handful of verbs, interchangeable strategies."""
