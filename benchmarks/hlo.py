"""Reads the text of a compiled program (HLO): products, copies, collectives, and the bytes that its kernels move."""

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import programs

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
LIBRARY = re.compile(r'custom_call_target="[^"]*(conv|gemm|matmul)', re.IGNORECASE)

# These only name a value or wait for one. They move no data.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id replica-id iota".split()
)
CALLED = re.compile(r"(?:to_apply|body|calls)=(%[\w.\-]+)")
WIDTH = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}


class Op(NamedTuple):
    """An instruction of a program.

    Attributes:
      name, kind: for example ``%fusion.3`` and ``fusion``.
      type: the text of its type, with layouts. It is a tuple if there are several results.
      operands: the names of its operands.
      rest: the text after the operands.
    """

    name: str
    kind: str
    type: str
    operands: list[str]
    rest: str


Program = dict[str, list[Op]]


def arrays(kind: str) -> list[tuple[str, tuple[int, ...], bool]]:
    """The dtype and shape of each array in a type, and whether it is in main memory (a TPU has others: S(1) and so on)."""
    found = re.findall(r"\b(pred|token|opaque|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?", kind)
    return [(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" not in layout) for dtype, shape, layout in found]


def size(kind: str, everywhere: bool = True) -> int:
    """The bytes of a type, or of its arrays in main memory."""
    return sum(math.prod(shape) * width(dtype) for dtype, shape, main in arrays(kind) if main or everywhere)


def width(dtype: str) -> int:
    """The bytes of a number of this dtype."""
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return WIDTH.get(dtype) if dtype in WIDTH else max(1, int(bits[1]) // 8)  # type: ignore[return-value, index]


def closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)


def instruction(line: str) -> Op | None:
    """The instruction on a line, or None if there is none."""
    head = re.match(r"\s+(?:ROOT )?(%?[\w.\-]+) = ", line)
    if head is None:
        return None
    start = head.end()
    end = closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    kind = re.match(r" *([\w\-]+)\(", line[end:])
    if kind is None:
        return None
    opened = end + kind.end() - 1
    closed = closing(line, opened)
    operands = re.findall(r"%[\w.\-]+", line[opened:closed])
    return Op(head[1], kind[1], line[start:end], operands, line[closed + 1 :])


def parse(text: str) -> Program:
    """Returns the computations of a program by name. The entry computation has the name ``""``."""
    program: Program = {}
    name = None
    for line in text.split("\n"):
        if opens := re.match(r"(ENTRY )?(%[\w.\-]+) .*\{$", line):
            name = opens[2]
            program[name] = []
            if opens[1]:
                program[""] = program[name]
        elif line.startswith("}"):
            name = None
        elif name is not None and (op := instruction(line)) is not None:
            program[name].append(op)
    return program


def kernels(program: Program, name: str = "", times: int = 1) -> Iterator[tuple[Op, dict[str, str], int]]:
    """Yields what runs: each instruction, the types in its computation, and how often it runs. A fusion counts as one."""
    types = {op.name: op.type for op in program[name]}
    for op in program[name]:
        called = CALLED.findall(op.rest)
        if op.kind in ("call", "while", "async-start") and called:
            yield from kernels(program, called[0], times * trips(op))
        elif op.kind == "conditional":
            for branch in re.findall(r"%[\w.\-]+", "".join(re.findall(r"branch_computations=\{([^}]*)\}", op.rest))):
                yield from kernels(program, branch, times)
        elif op.kind not in FREE and not op.kind.endswith("-done"):
            yield op, types, times


def traffic(program: Program) -> int:
    """The bytes that kernels move to and from main memory, if each reads and writes every array once."""
    total = 0
    for op, types, times in kernels(program):
        if op.kind in ("copy-start", "slice-start"):  # to or from another memory: (to, from, ...) or ((from), to, ...)
            ends = arrays(op.type)[:2]
            part = min(math.prod(shape) * width(dtype) for dtype, shape, _ in ends)
            total += times * part * sum(main for *_, main in ends)
        else:
            named = [op.type, *(types.get(operand, "") for operand in op.operands)]
            total += times * sum(size(kind, everywhere=False) for kind in named)
    return total


def products(program: Program) -> dict[str, int]:
    """Counts the convolutions, dots and calls of library products, including those inside fusions."""
    ops = [op for name, ops in program.items() if name for op in ops]
    return {
        "convolution": sum(op.kind == "convolution" for op in ops),
        "dot": sum(op.kind == "dot" for op in ops),
        "library": sum(op.kind == "custom-call" and bool(LIBRARY.search(op.rest)) for op in ops),
    }


def flops(program: Program, name: str = "") -> int:
    """The operations of a program's products. A loop's body counts as often as it runs."""
    types, total = {op.name: op.type for op in program[name]}, 0
    for op in program[name]:
        inner = sum(flops(program, called) for called in CALLED.findall(op.rest))
        total += one_product(op, types) + trips(op) * inner
    return total


def trips(op: Op) -> int:
    """How often the computation that an instruction calls is run. For a loop, its trip count if known."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', op.rest)
    return int(known[1]) if known and op.kind == "while" else 1


def one_product(op: Op, types: dict[str, str]) -> int:
    """The operations of one product: 2 x (numbers in the output) x (products summed for each)."""
    axes = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d",]*)', op.rest)
    if op.kind == "dot" or (op.kind == "custom-call" and axes):  # XLA's, or cuBLAS's
        left = arrays(types[op.operands[0]])[0][1]
        summed = math.prod(left[int(a)] for a in re.findall(r"\d+", axes[1])) if axes else 1
        return 2 * math.prod(arrays(op.type)[0][1]) * summed
    labels = re.search(r"dim_labels=\w+_(\w+)->", op.rest)
    if labels is None or not (op.kind == "convolution" or LIBRARY.search(op.rest)):
        return 0
    # Picks two of the three arrays (result, left, right): the output of the forward pass, and the filter.
    result, left, right = (arrays(t)[0][1] for t in (op.type, types[op.operands[0]], types[op.operands[1]]))
    output, kernel = result, right
    if "BackwardInput" in op.rest:
        output, kernel = left, right
    elif "BackwardFilter" in op.rest:
        output, kernel = right, result
    return 2 * math.prod(output) * math.prod(kernel) // kernel[labels[1].index("o")]


def copies(program: Program, shapes: set[tuple[int, ...]]) -> dict[str, int]:
    """Counts the copies that run as kernels of their own within the device's main memory, and their bytes.

    Also counts those of float32 arrays with the shape of a weight (one of ``shapes``).
    """
    every = [(op, n) for op, _, n in kernels(program) if op.kind in ("copy", "copy-start") and "S(" not in op.type]
    of_weights = [(op, n) for op, n in every if arrays(op.type)[0][0] == "f32" and arrays(op.type)[0][1] in shapes]
    total = lambda found: sum(n * math.prod(arrays(op.type)[0][1]) * width(arrays(op.type)[0][0]) for op, n in found)
    return {
        "all": sum(n for _, n in every),
        "bytes": total(every),
        "of weights": sum(n for _, n in of_weights),
        "weights' bytes": total(of_weights),
    }


def collectives(program: Program) -> dict[str, dict[str, int]]:
    """Counts the collectives of each kind, and their bytes on one device.

    The bytes are those of the operands or of the results, whichever are more. An asynchronous collective (``-start`` and
    ``-done``, or wrapped in an ``async-start``) counts once.
    """
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for op, types, times in kernels(program):
        kind = op.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            before, after = sum(size(types.get(o, "")) for o in op.operands), size(op.type)
            if op.kind != kind and kind != "all-reduce":  # this type also contains the operands
                after -= before
            found[kind]["count"] += times
            found[kind]["bytes"] += times * max(before, after)
    return dict(found)


def figures(compiled: Any, shapes: set[tuple[int, ...]]) -> dict[str, Any]:
    """Returns all figures of a compiled program.

    ``flops`` and ``bytes`` are XLA's own counts where it has them (on TPUs). XLA counts a loop's body once, and arrays in a
    TPU's fast memory as well. This module counts ``products' flops`` and ``kernels' bytes``.
    """
    program, memory = parse(compiled.as_text()), compiled.memory_analysis()
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return {
        "flops": cost["flops"] if cost else float(flops(program)),
        "bytes": cost["bytes accessed"] if cost else float(traffic(program)),
        "products' flops": float(flops(program)),
        "kernels' bytes": float(traffic(program)),
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "peak": programs.peak_bytes(compiled),
        "products": products(program),
        "copies": copies(program, shapes),
        "collectives": collectives(program),
        "conditionals": sum(op.kind == "conditional" for ops in program.values() for op in ops),
    }
