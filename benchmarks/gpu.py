"""GPU benchmarks: ResNet-50 on 224x224 images in bf16, ResNet-20's epochs, and the GPU's peak throughput.

ResNet-50 is compared with backprop in JAX and in PyTorch.
"""

import os

# By default JAX takes three quarters of the memory. PyTorch needs room for its activations and workspaces.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import benchmarks
import wmkp
from benchmarks import Part, Row, Settings, models, programs

BATCH = 256
EVERY = 4  # engaged steps for each mirror step of ResNet-50; ResNet-20 has 1
RULES: dict[str, Callable[[], wmkp.Rule]] = {
    "KP": wmkp.kolen_pollack,
    "WM": wmkp.weight_mirror,
}


def parts(settings: Settings) -> dict[str, Part]:
    """ResNet-50 and ResNet-20. On a CPU they only try the script out."""
    return {"ResNet-50": partial(resnet50, settings), "ResNet-20": partial(resnet20, settings)}


def here(settings: Settings) -> bool:
    return settings.quick or jax.default_backend() == "gpu"


def calls_of(case: models.Case, count: int, every: int) -> tuple[dict[str, Callable[[], Any]], float]:
    """Returns a call for each rule, and the operations of a BP step.

    Each call takes ``count`` engaged steps. Under WM a mirror step follows every ``every`` engaged steps.
    """
    step, plain = models.backprop_step(case)
    lowered = jax.jit(step, donate_argnums=0).lower(plain, case.batch)

    def several(step: Callable[..., Any], state: Any, mirror: Callable[..., Any] | None = None) -> Callable[[], Any]:
        box = [state]

        def call() -> Any:
            for i in range(1, count + 1):
                box[0], out = step(box[0], case.batch)
                if mirror is not None and i % every == 0:
                    box[0], _ = mirror(box[0])
            return jax.block_until_ready((box[0], out))

        return call

    calls = {"BP": several(lowered.compile(), plain)}
    for name, rule in RULES.items():
        steps = wmkp.make_steps(
            case.loss_fn, rule(), case.optimizer, case.params, case.batch, model_state=case.model_state
        )
        state = steps.init(jax.random.key(0), case.params, case.model_state)
        engaged = steps.engaged_step.lower(state, case.batch).compile()
        calls[name] = several(engaged, state, steps.mirror_step.lower(state).compile() if name == "WM" else None)
    return calls, programs.operations(lowered)


def torch_call(name: str, case: models.Case, count: int) -> Callable[[], Any]:
    """PyTorch's backprop: compiled, channels last, bf16 on a GPU. It has already run once."""
    import torch

    from benchmarks import torch_models

    cuda = torch.cuda.is_available()
    x, labels = np.array(case.batch["image"], np.float32), np.array(case.batch["label"])
    model = torch_models.MODELS[name](x.shape[1]).to("cuda" if cuda else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # like XLA, cuDNN times its algorithms and picks the fastest
    model = model.to(memory_format=torch.channels_last)
    step = torch_models.training_step(
        torch.compile(model) if cuda else model, x, labels, channels_last=True, dtype=torch.bfloat16
    )

    def call() -> None:
        for _ in range(count):
            step()
        if cuda:
            torch.cuda.synchronize()

    call()
    return call


def matmul_peak(size: int) -> float:
    """Operations per second of a product of two square bf16 matrices."""
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(jnp.bfloat16)
    many = jax.jit(lambda a: jax.lax.fori_loop(0, 20, lambda i, x: (x @ a) * jnp.bfloat16(0.01), a))
    taken = benchmarks.in_turns({"products": lambda: many(a).block_until_ready()}, 1)
    return 20 * 2 * size**3 / statistics.median(taken["products"])


def resnet50(settings: Settings) -> Iterator[Row]:
    """Images per second of BP, KP, WM (a mirror step after every fourth step) and PyTorch's BP."""
    name = f"ResNet-50 at 224, bf16, batch {BATCH}"
    targets: dict[str, Any] = {"KP": {"at_least": 0.98}, "WM": {"at_least": 0.98}}
    if not here(settings):
        for rule in RULES:
            yield Row(f"{name}: {rule} over JAX's BP, images a second", note="no GPU here", **targets[rule])
            yield Row(f"{name}: {rule} over PyTorch's BP, images a second", note="no GPU here", at_least=1)
        yield Row(f"{name}: fraction of the card's matmul peak", note="no GPU here")
        return
    batch_size = 2 if settings.quick else BATCH
    case = models.make("ResNet-50", batch_size, jnp.bfloat16, size=32 if settings.quick else None)
    calls, operations = calls_of(case, EVERY, EVERY)
    missing = "PyTorch is not installed"
    if benchmarks.installed("torch"):
        try:
            calls["PyTorch"] = torch_call("ResNet-50", case, EVERY)
        except Exception as error:  # PyTorch may lack memory or fail to compile; JAX's figures are still valid
            missing = f"PyTorch: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
    taken = benchmarks.in_turns(calls, 0 if settings.quick else 120, least=3 if settings.quick else 10)
    images = {c: EVERY * batch_size / statistics.median(s) for c, s in taken.items()}
    for rule in RULES:
        note = f"{images[rule]:.0f} against {images['BP']:.0f}"
        yield benchmarks.ratio(
            f"{name}: {rule} over JAX's BP, images a second", taken, "BP", rule, note, **targets[rule],
            detail={"images_a_second": images},
        )  # fmt: skip
        if "PyTorch" in taken:
            note = f"{images[rule]:.0f} against {images['PyTorch']:.0f}"
            yield benchmarks.ratio(
                f"{name}: {rule} over PyTorch's BP, images a second", taken, "PyTorch", rule, note, at_least=1
            )
        else:
            yield Row(f"{name}: {rule} over PyTorch's BP, images a second", note=missing, at_least=1)
    peak = matmul_peak(128 if settings.quick else 8192)
    rate = operations * images["KP"] / batch_size
    note = f"KP, of BP's operations as XLA counts all of them; peak {peak / 1e12:.0f} TFLOP/s"
    yield Row(f"{name}: fraction of the card's matmul peak", rate / peak, note=note)


def resnet20(settings: Settings) -> Iterator[Row]:
    """Seconds of an epoch: 50,000 CIFAR-sized images in batches of 128."""
    name = "ResNet-20, bf16, batch 128"
    if not here(settings):
        for rule in RULES:
            yield Row(f"{name}: {rule} over BP, time", note="no GPU here", at_most=1.02)
        return
    case = models.make("ResNet-20", 2 if settings.quick else 128, jnp.bfloat16)
    count = 2 if settings.quick else 50
    calls, _ = calls_of(case, count, 1)
    taken = benchmarks.in_turns(calls, 0 if settings.quick else 30, least=3)
    for rule in RULES:
        note = f"an epoch: {statistics.median(taken[rule]) * 391 / count:.2f} s"
        if rule == "WM":
            note += ", a mirror step after each engaged step"
        yield benchmarks.ratio(f"{name}: {rule} over BP, time", taken, rule, "BP", note, at_most=1.02)
