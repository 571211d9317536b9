"""Plain Flax Linen models, without any learning rule."""
