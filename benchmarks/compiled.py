"""Compiles engaged and mirror steps for TPUs and GPUs, without the devices, and compares the programs with backprop's.

The comparison counts operations, bytes, memory, products, copies and collectives. XLA compiles each program for the
description of a device, and nothing is run. ``results/tpu.json`` and ``results/gpu_compiled.json`` keep the counts. A program
that they already have (the same operations, the same compiler) is not compiled again.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import benchmarks
from benchmarks import Row, hlo, models, targets  # targets first: JAX reads its settings when it starts

import flax.linen as nn  # isort: skip
import jax
import jax.numpy as jnp
import optax

import wmkp
from benchmarks.programs import peak_bytes
from benchmarks.targets import TARGETS, Target
from wmkp.experiments.models.resnet import ResNet18, ResNet50
from wmkp.experiments.models.transformer import Block, ViT
from wmkp.experiments.runs.provenance import provenance


class GPT2(nn.Module):
    """A decoder of GPT-2 small's size (124 M): 12 blocks of 768, a vocabulary of 50,257, the embedding tied to the output."""

    vocabulary: int = 50257
    length: int = 1024
    width: int = 768
    depth: int = 12
    heads: int = 12

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embedding = nn.Embed(self.vocabulary, self.width, dtype=jnp.bfloat16, name="embedding")
        positions = self.param("positions", nn.initializers.normal(0.02), (self.length, self.width))
        x = embedding(tokens) + positions.astype(jnp.bfloat16)
        for i in range(self.depth):
            x = Block(self.heads, 4 * self.width, True, jnp.bfloat16, name=f"block{i + 1}")(x)
        return embedding.attend(nn.LayerNorm(epsilon=1e-6, dtype=jnp.bfloat16)(x)).astype(jnp.float32)


class Model(NamedTuple):
    """A model to train in bf16.

    Attributes:
      build: the module.
      optimizer: as ``wmkp.make_steps`` takes it.
      batch: examples on each device.
      shape: the shape of an image, or of the tokens.
      mode: keyword arguments of the model in training.
    """

    build: Callable[[], nn.Module]
    optimizer: optax.GradientTransformation
    batch: int
    shape: tuple[int, ...] = (224, 224, 3)
    mode: dict[str, bool] = {}  # noqa: RUF012 (never changed)


MODELS = {
    "ResNet-50": Model(lambda: ResNet50(1000, dtype=jnp.bfloat16), models.SGD, 128, mode={"train": True}),
    "ViT-B/16": Model(lambda: ViT(1000, width=768, heads=12, dtype=jnp.bfloat16), models.ADAMW, 64),
    "GPT-2 small": Model(GPT2, models.ADAMW, 4, (1024,)),
    "ResNet-18": Model(lambda: ResNet18(1000, dtype=jnp.bfloat16), models.SGD, 128, mode={"train": True}),
}
RULES: dict[str, Callable[[], wmkp.Rule]] = {
    "FA": wmkp.feedback_alignment,
    "KP": wmkp.kolen_pollack,
    "MKP": wmkp.mirrored_kolen_pollack,
    "WM": wmkp.weight_mirror,
    "WM, Gaussian": partial(wmkp.weight_mirror, "gaussian"),
}


def case(name: str, batch_size: int) -> models.Case:
    """The model, with shapes instead of arrays."""
    model = MODELS[name]
    example = jax.ShapeDtypeStruct((batch_size, *model.shape), jnp.int32 if len(model.shape) == 1 else jnp.float32)
    labels = example if len(model.shape) == 1 else jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    module = model.build()
    variables = dict(jax.eval_shape(lambda key, x: module.init(key, x, **model.mode), jax.random.key(0), example))
    batch = {"image": example, "label": labels}
    return models.Case(models.loss_of(module, model.mode), variables.pop("params"), variables, model.optimizer, batch)


def lowered(target: Target, name: str, step: str, batch_size: int | None = None) -> Any:
    """Lowers a step for a target, without compiling it. The step is "BP", a rule's name, or a rule's name and "mirror"."""
    this = case(name, (batch_size or MODELS[name].batch) * target.count)
    batch = targets.placed(this.batch, target, batch=True)
    if step == "BP":
        plain, state = backprop(this, target)
        return plain.lower(state, batch)
    steps = wmkp.make_steps(
        this.loss_fn, RULES[step.removesuffix(" mirror")](), this.optimizer, this.params, this.batch,
        model_state=this.model_state, mesh=target.mesh(), fsdp=target.fsdp,
    )  # fmt: skip
    state = targets.placed(jax.eval_shape(steps.init, jax.random.key(0), this.params, this.model_state), target)
    return steps.mirror_step.lower(state) if step.endswith("mirror") else steps.engaged_step.lower(state, batch)


def backprop(this: models.Case, target: Target) -> tuple[Any, Any]:
    """Returns backprop's jitted step for a target, and the shapes of its state."""
    found = []

    def start(params: Any, model_state: Any) -> Any:
        step, state = models.backprop_step(this._replace(params=params, model_state=model_state))
        found.append(step)
        return state

    state = targets.placed(jax.eval_shape(start, this.params, this.model_state), target)

    def step(state: Any, batch: Any) -> Any:
        mesh = target.mesh()
        if mesh is None:
            return found[0](state, batch)
        place = lambda tree, fsdp: jax.tree.map(
            jax.lax.with_sharding_constraint, tree, wmkp.training.state_sharding(tree, mesh, fsdp)
        )
        state, loss = found[0](state._replace(params=place(state.params, False)), batch)
        return place(state, target.fsdp), loss

    return jax.jit(step, donate_argnums=0), state


def inside(target: Target, name: str, how: str) -> Any:
    """Lowers a Kolen-Pollack step inside the user's own ``jax.pmap`` or ``jax.shard_map``, without compiling it."""
    this = case(name, MODELS[name].batch)
    mesh = target.mesh()
    assert mesh is not None
    steps = wmkp.make_steps(
        this.loss_fn,
        RULES["KP"](),
        this.optimizer,
        this.params,
        this.batch,
        model_state=this.model_state,
        axis_name="data",
    )
    state = jax.eval_shape(steps.init, jax.random.key(0), this.params, this.model_state)
    if how == "pmap":
        many = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct((target.count, *x.shape), x.dtype), tree)
        step = jax.pmap(steps.engaged_step, axis_name="data", devices=target.devices(), donate_argnums=0)
        return step.lower(many(state), many(this.batch))
    spec = jax.sharding.PartitionSpec
    step = jax.shard_map(steps.engaged_step, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=(spec(), spec()))
    whole = case(name, MODELS[name].batch * target.count).batch
    state, batch = targets.placed(state, target), targets.placed(whole, target, batch=True)
    return jax.jit(step, donate_argnums=0).lower(state, batch)


# --- compiling, and what is kept --------------------------------------------------------------------------------------

FILES = {"tpu": "tpu", "cuda": "gpu_compiled"}
ENGAGED = ("BP", "FA", "KP", "MKP", "WM")
MIRRORS = tuple(f"{rule} mirror" for rule in ("MKP", "WM", "WM, Gaussian"))
FEW = ("BP", "KP")

# What is compiled, most informative first: target, model, steps.
JOBS: list[tuple[str, str, tuple[str, ...]]] = [
    ("H100", "ResNet-50", (*ENGAGED, *MIRRORS)),
    ("v5e", "ResNet-50", (*ENGAGED, *MIRRORS)),
    ("H100", "ViT-B/16", (*ENGAGED, *MIRRORS)),
    ("H100", "GPT-2 small", (*ENGAGED, *MIRRORS)),
    ("v5e 4x4", "ResNet-50", FEW),
    ("v5e 4x4, fsdp", "ResNet-50", FEW),
    ("v5e", "GPT-2 small", (*ENGAGED, *MIRRORS)),
    ("v5e", "ViT-B/16", (*ENGAGED, *MIRRORS)),
    ("v5e 4x4", "GPT-2 small", FEW),
    ("v5e 4x4, fsdp", "GPT-2 small", FEW),
    ("8 H100", "ResNet-50", FEW),
    ("8 H100", "GPT-2 small", FEW),
    ("8 H100", "ViT-B/16", FEW),
    ("v5e 4x4", "ResNet-18", (*FEW, "shard_map", "pmap")),
    ("v5e 4x4", "ResNet-50", ("FA", "MKP", "WM", *MIRRORS)),
    ("v5e 4x4, fsdp", "ResNet-50", ("FA", "MKP", "WM", *MIRRORS)),
    ("v5e 4x4", "GPT-2 small", ("FA", "MKP", "WM", *MIRRORS)),
    ("v5e 4x4, fsdp", "GPT-2 small", ("FA", "MKP", "WM", *MIRRORS)),
    ("v5e 4x4", "ViT-B/16", (*ENGAGED, *MIRRORS)),
    ("v5e 4x4, fsdp", "ViT-B/16", (*ENGAGED, *MIRRORS)),
]
# Cases in which the largest batch is searched for: target, model, and the number that the batch is a multiple of.
LARGEST = [("v5e", "ResNet-50", 8), ("H100", "ResNet-50", 8), ("H100", "ViT-B/16", 8), ("H100", "GPT-2 small", 1)]


class Kept:
    """The programs in a file of results. The file is rewritten after each program."""

    def __init__(self, path: Path):
        self.path = path
        self.programs: dict[str, Any] = json.loads(path.read_text())["programs"] if path.exists() else {}

    def put(self, key: str, program: dict[str, Any]) -> None:
        self.programs[key] = program
        rows = [{**r._asdict(), "target": r.target, "verdict": r.verdict} for r in rows_of(self.programs)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        result = {**provenance(), "compiler": compiler(), "rows": rows, "programs": self.programs}
        self.path.write_text(json.dumps(result, indent=1) + "\n")


@cache
def compiler() -> dict[str, str]:
    """The versions of the compilers."""
    names = (
        "jax",
        "jaxlib",
        "libtpu",
        "jax-cuda12-plugin",
        "jax-cuda12-pjrt",
        "nvidia-cudnn-cu12",
        "nvidia-cuda-nvcc-cu12",
    )
    return {name: version for name in names if (version := benchmarks.installed(name))}


def digest(target: Target, low: Any) -> str:
    """A hash that identifies a program and its compiler."""
    text = "\n".join((low.as_text(), repr(target), repr(compiler()), os.environ.get("XLA_FLAGS", ""), targets.H100))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(kept: Kept, where: str, name: str, step: str) -> None:
    """Counts one program's figures, unless they are kept already."""
    key, target = f"{where}: {name}: {step}", TARGETS[where]
    low = inside(target, name, step) if step in ("pmap", "shard_map") else lowered(target, name, step)
    known = digest(target, low)
    if kept.programs.get(key, {}).get("digest") == known:
        return
    same = next((k for k, p in kept.programs.items() if p.get("digest") == known), None)
    if same is not None:  # for example a weight mirror's engaged step, which equals feedback alignment's
        kept.put(key, {**kept.programs[same], "same as": kept.programs[same].get("same as", same)})
        return
    start = time.perf_counter()
    compiled = low.compile()
    seconds = time.perf_counter() - start
    if folder := os.environ.get("WMKP_HLO"):  # keeps the program texts for inspection
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{key.replace('/', '')}.txt").write_text(compiled.as_text())
    shapes = {x.shape for x in jax.tree.leaves(case(name, 1).params) if x.ndim > 1}
    kept.put(key, {**hlo.figures(compiled, shapes), "digest": known, "seconds": round(seconds, 1)})
    print(f"# {key}: {seconds:.0f} s", flush=True)


def run(settings: benchmarks.Settings, where: Path, seconds: float) -> int:
    """Compiles what is not kept yet, for at most about ``seconds``. Returns 1 if something failed."""
    deadline, failed = time.monotonic() + seconds, 0
    kept = {platform: Kept(where / f"{file}.json") for platform, file in FILES.items()}
    jobs = [("v5e", "ResNet-18", FEW), ("H100", "ResNet-18", FEW)] if settings.quick else JOBS
    for place, name, steps in jobs:
        target = TARGETS[place]
        if why := target.missing():
            print(f"# {place}: {name}: {why}", flush=True)
            continue
        for step in steps:
            if time.monotonic() > deadline:
                print(f"# {place}: {name}: {step}: the group's {seconds:.0f} s were over", flush=True)
                continue
            try:
                measure(kept[target.platform], place, name, step)
            except Exception as error:
                failed = 1
                print(f"# {place}: {name}: {step}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
    for place, name, multiple in () if settings.quick else LARGEST:
        for step in FEW:
            found = kept[TARGETS[place].platform]
            if (
                not TARGETS[place].missing()
                and f"{place}: {name}: {step}" in found.programs
                and time.monotonic() < deadline
            ):
                largest(found, place, name, step, multiple)
    return failed


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(programs: dict[str, Any]) -> list[Row]:
    """Compares every program with backprop's for the same target and model."""
    rows: list[Row] = []
    for key, program in programs.items():
        place, name, step = key.split(": ")
        if "batch" in program:
            rows.append(Row(f"{key} of a device", program["batch"], detail=program["peaks"]))
            continue
        plain = programs.get(f"{place}: {name}: BP")
        if plain is not None and step != "BP":
            rows += (
                mirror_rows(key, step, program, plain) if step.endswith("mirror") else engaged_rows(key, program, plain)
            )
    return rows


def engaged_rows(key: str, program: dict[str, Any], plain: dict[str, Any]) -> list[Row]:
    """Compares an engaged step with backprop's: operations, memory, copies, bytes and collectives."""
    more = moved(key, program, plain)
    ours, theirs = (sum(p["products"].values()) for p in (program, plain))
    over = lambda what: program[what] / plain[what]
    sent = [sum(c["bytes"] for c in p["collectives"].values()) for p in (program, plain)]
    rows = [
        Row(f"{key} over BP, operations", over("flops"), at_most=1.001),
        Row(f"{key} over BP, products", ours / theirs, at_most=1.0),
        Row(f"{key} over BP, temporaries", over("temporaries"), at_most=1.01),
        Row(
            f"{key} over BP and what B must move, bytes",
            program["kernels' bytes"] / (plain["kernels' bytes"] + more),
            at_most=1.0,
            note="over BP's alone {:.4f}".format(over("kernels' bytes")),
            detail={
                "bytes": program["kernels' bytes"],
                "backprop": plain["kernels' bytes"],
                "B and its optimizer": more,
            },
        ),
        Row(f"{key}, copies of W or B beyond BP's", copied(program) - copied(plain), at_most=0),
    ]
    if sent[1]:
        rows.append(Row(f"{key} over BP, bytes of collectives", sent[0] / sent[1], at_most=1.0))
    return rows


def moved(key: str, program: dict[str, Any], plain: dict[str, Any]) -> int:
    """The bytes that B and its optimizer have to move on one device.

    The error path reads B (in bf16 models a cast does). If B learns, its optimizer also reads and writes B and its moments.
    """
    _, name, step = key.split(": ")
    own = program["arguments"] - plain["arguments"]  # B and its moments
    if step in ("FA", "WM"):
        return int(own)
    weight = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    state = jax.tree.leaves(jax.eval_shape(MODELS[name].optimizer.init, weight))
    moments = sum(x.shape == weight.shape for x in state)
    return int(own / (1 + moments) + 2 * own)


def copied(program: dict[str, Any]) -> int:
    """Counts the copies that a program makes of float32 arrays with the shape of a weight."""
    return int(program["copies"]["of weights"])


def every(step: str) -> int:
    """The engaged steps between two mirror steps, as in the recipes of the command line."""
    from wmkp.experiments.config import MIRROR_EVERY  # which needs tyro

    return MIRROR_EVERY["mkp" if step.startswith("MKP") else "wm"]


def mirror_rows(key: str, step: str, program: dict[str, Any], plain: dict[str, Any]) -> list[Row]:
    """Compares a mirror step with the engaged steps between two mirror steps."""
    return [
        Row(f"{key} step, {unit} over those of engaged steps ({every(step)})", share, at_most=0.03)
        for unit, share in zip(("operations", "bytes"), shares(step, program, plain), strict=True)
    ]


def shares(step: str, program: dict[str, Any], plain: dict[str, Any]) -> list[float]:
    """A mirror step's operations and bytes over those of the engaged steps between two mirror steps.

    A mirror step may have loops, which XLA counts once, so its operations are counted here. An engaged step has none, and
    only XLA knows the operations of a TPU's convolutions.
    """
    pairs = ("products' flops", "flops"), ("kernels' bytes", "kernels' bytes")
    return [program[ours] / (every(step) * plain[theirs]) for ours, theirs in pairs]


# --- the largest batch ------------------------------------------------------------------------------------------------


def held(target: Target, name: str, step: str, batch_size: int) -> int:
    """The peak memory of a step with this batch on one device, in bytes."""
    try:
        return peak_bytes(lowered(target, name, step, batch_size).compile())
    except jax.errors.JaxRuntimeError as error:  # a TPU's compiler fails, and says how much memory it needs
        used = re.search(r"Used ([\d.]+)([GM]) of", str(error))
        if used is None:
            raise
        return int(float(used[1]) * {"G": 2**30, "M": 2**20}[used[2]])


def largest(kept: Kept, place: str, name: str, step: str, multiple: int, tries: int = 4) -> None:
    """Searches for the largest batch per device that fits in memory.

    Each compilation tries the batch that a line through two earlier ones predicts.
    """
    target, key = TARGETS[place], f"{place}: {name}: {step}, largest batch"
    if key in kept.programs:
        return
    first = MODELS[name].batch
    known = {first: kept.programs[f"{place}: {name}: {step}"]["peak"]}
    batch = first * target.memory // known[first]
    for _ in range(tries):
        batch = max(multiple, batch // multiple * multiple)
        if batch in known:
            break
        known[batch] = held(target, name, step, batch)
        (a, x), (b, y) = sorted(known.items())[-2:]
        batch = min(int(a + (target.memory - x) * (b - a) / max(1, y - x)), 2 * b)
    fits = [n for n, peak in known.items() if peak <= target.memory]
    kept.put(key, {"batch": max(fits), "peaks": {str(n): peak for n, peak in sorted(known.items())}})
