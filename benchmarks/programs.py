"""What a compiled program holds, counted: matrix products and convolutions, copies of weights, bytes at its peak."""

import math
import re
from typing import Any

import jax

PRODUCTS = ("convolution", "dot", "custom-call")  # a library's products are custom calls


def products(compiled: Any) -> dict[str, int]:
    """How many of each kind the program has, those inside fusions and loops included."""
    text = compiled.as_text()
    return {op: text.count(f" {op}(") for op in PRODUCTS}


def weight_copies(compiled: Any, params: Any) -> int:
    """How many of its own arguments that have the shape of a weight (two axes or more) the program copies whole.

    Those are W or B, or what an optimizer keeps of them. Gradients that are laid out anew inside a fusion are not copies.
    """
    shapes = {",".join(map(str, x.shape)) for x in jax.tree.leaves(params) if x.ndim > 1}
    entry = compiled.as_text().split("\nENTRY ", 1)[1]
    arguments = {
        name for name, shape in re.findall(r"(%\S+) = \w+\[([\d,]*)\]\S* parameter\(", entry) if shape in shapes
    }
    return sum(operand in arguments for operand in re.findall(r" copy\((%[^),]+)\)", entry))


def peak_bytes(compiled: Any) -> int:
    """Arguments, results that have no argument's place, and what is needed in between."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def tree_bytes(tree: Any) -> int:
    """The bytes of all arrays of a tree, or of their shapes; a random key counts as two words."""
    sizes = [8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize * math.prod(x.shape)
             for x in jax.tree.leaves(tree)]  # fmt: skip
    return sum(sizes)


def operations(lowered: Any) -> float:
    """Floating-point operations of a program that need not be compiled, by XLA's count."""
    analysis = lowered.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])
