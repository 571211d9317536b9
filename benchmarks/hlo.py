"""What the text of a compiled program (HLO) says: its products, copies, collectives, and the bytes that its kernels move."""

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import programs

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
LIBRARY = re.compile(r'custom_call_target="[^"]*(conv|gemm|matmul)', re.IGNORECASE)

# These name a value, or wait for one: nothing is moved.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id replica-id iota".split()
)
CALLED = re.compile(r"(?:to_apply|body|calls)=(%[\w.\-]+)")
WIDTH = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16, "token": 0, "opaque": 0}


class Op(NamedTuple):
    """An instruction.

    Attributes:
      name, kind: ``%fusion.3`` and ``fusion``.
      type: as it stands there, with layouts; of several results, a tuple.
      operands: the names of its operands.
      rest: what follows them.
    """

    name: str
    kind: str
    type: str
    operands: list[str]
    rest: str


Program = dict[str, list[Op]]


def arrays(kind: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtype and shape of each array in a type."""
    found = re.findall(r"\b(pred|token|opaque|[a-z]+\d+\w*)\[([\d,]*)\]", kind)
    return [(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in found]


def size(kind: str) -> int:
    """The bytes of a type."""
    return sum(math.prod(shape) * width(dtype) for dtype, shape in arrays(kind))


def width(dtype: str) -> int:
    """Bytes of a number."""
    bits = re.match(r"[a-z]+(\d+)", dtype)
    return WIDTH.get(dtype) if dtype in WIDTH else max(1, int(bits[1]) // 8)  # type: ignore[return-value, index]


def closing(text: str, start: int) -> int:
    """Where the parenthesis closes that opens at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)


def instruction(line: str) -> Op | None:
    """The instruction of a line, if it is one."""
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
    """The computations of a program; that under ``""`` is the one that runs."""
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
    """What is run, one after another: each instruction, the types of its computation, how often. Fusions are one each."""
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
    """Bytes of operands and results of all kernels: what they would move if each read and wrote all of them once."""
    return sum(
        times * (size(op.type) + sum(size(types.get(o, "")) for o in op.operands))
        for op, types, times in kernels(program)
    )


def products(program: Program) -> dict[str, int]:
    """How many convolutions, dots and calls of a library's products there are, those inside fusions included."""
    ops = [op for name, ops in program.items() if name for op in ops]
    return {
        "convolution": sum(op.kind == "convolution" for op in ops),
        "dot": sum(op.kind == "dot" for op in ops),
        "library": sum(op.kind == "custom-call" and bool(LIBRARY.search(op.rest)) for op in ops),
    }


def flops(program: Program, name: str = "") -> int:
    """Operations of a program's products; those of a loop's body as often as it runs."""
    types, total = {op.name: op.type for op in program[name]}, 0
    for op in program[name]:
        inner = sum(flops(program, called) for called in CALLED.findall(op.rest))
        total += one_product(op, types) + trips(op) * inner
    return total


def trips(op: Op) -> int:
    """How often what an instruction calls is run: of a loop, if that is known."""
    known = re.search(r'known_trip_count":\{"n":"(\d+)"', op.rest)
    return int(known[1]) if known and op.kind == "while" else 1


def one_product(op: Op, types: dict[str, str]) -> int:
    """2 x (numbers of the output) x (products summed for each)."""
    if op.kind == "dot":
        left = arrays(types[op.operands[0]])[0][1]
        axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
        summed = math.prod(left[int(a)] for a in axes[1].split(",") if a) if axes else 1
        return 2 * math.prod(arrays(op.type)[0][1]) * summed
    labels = re.search(r"dim_labels=\w+_(\w+)->", op.rest)
    if labels is None or not (op.kind == "convolution" or LIBRARY.search(op.rest)):
        return 0
    # Of the three arrays (result, left, right) the output of the forward pass and the filter.
    result, left, right = (arrays(t)[0][1] for t in (op.type, types[op.operands[0]], types[op.operands[1]]))
    output, kernel = result, right
    if "BackwardInput" in op.rest:
        output, kernel = left, right
    elif "BackwardFilter" in op.rest:
        output, kernel = right, result
    return 2 * math.prod(output) * math.prod(kernel) // kernel[labels[1].index("o")]


def copies(program: Program, shapes: set[tuple[int, ...]]) -> dict[str, int]:
    """Copies that run by themselves, within the device's main memory: how many, of how many bytes; and those of float32
    arrays with the shape of a weight (one of ``shapes``)."""
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
    """Of each kind how many there are, and the bytes of the arrays that enter or leave one device, whichever are more.

    An asynchronous one (``-start`` and ``-done``, or wrapped in an ``async-start``) counts once.
    """
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for op, types, times in kernels(program):
        kind = op.kind.removesuffix("-start")
        if kind in COLLECTIVES:
            before, after = sum(size(types.get(o, "")) for o in op.operands), size(op.type)
            if op.kind != kind and kind != "all-reduce":  # the type holds the operands too
                after -= before
            found[kind]["count"] += times
            found[kind]["bytes"] += times * max(before, after)
    return dict(found)


def figures(compiled: Any, shapes: set[tuple[int, ...]]) -> dict[str, Any]:
    """All of it, of a compiled program.

    ``flops`` and ``bytes`` are XLA's own count where it has one (on TPUs); it counts a loop's body once. ``products' flops``
    and ``kernels' bytes`` are counted here.
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
