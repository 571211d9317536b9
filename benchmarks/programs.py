"""Counts the products, the copies of weights and the peak memory of a compiled program."""

import math
import re
from typing import Any

import jax

PRODUCTS = ("convolution", "dot", "custom-call")  # custom calls are products by a library


def products(compiled: Any) -> dict[str, int]:
    """The number of products of each kind, including those inside fusions and loops."""
    text = compiled.as_text()
    return {op: text.count(f" {op}(") for op in PRODUCTS}


def weight_copies(compiled: Any, params: Any) -> int:
    """The number of arguments in the shape of a weight (two axes or more) that the program copies whole.

    Such an argument is W, B or a part of an optimizer's state. A gradient that changes its layout in a fusion does not
    count.
    """
    shapes = {",".join(map(str, x.shape)) for x in jax.tree.leaves(params) if x.ndim > 1}
    entry = compiled.as_text().split("\nENTRY ", 1)[1]
    arguments = {
        name for name, shape in re.findall(r"(%\S+) = \w+\[([\d,]*)\]\S* parameter\(", entry) if shape in shapes
    }
    return sum(operand in arguments for operand in re.findall(r" copy\((%[^),]+)\)", entry))


def peak_bytes(compiled: Any) -> int:
    """The bytes of arguments, of results that reuse no argument's memory, and of temporaries."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def tree_bytes(tree: Any) -> int:
    """The bytes of all arrays or shapes in a tree. A random key counts as two words."""
    sizes = [8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize * math.prod(x.shape)
             for x in jax.tree.leaves(tree)]  # fmt: skip
    return sum(sizes)


def operations(lowered: Any) -> float:
    """XLA's count of a program's floating-point operations. The program need not be compiled."""
    analysis = lowered.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])
