"""Peak memory without data: a model traced on the meta device, and steps of its parameters counted there."""
