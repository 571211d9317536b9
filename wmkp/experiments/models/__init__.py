"""Plain Flax Linen models. None of them knows what a learning rule is."""
