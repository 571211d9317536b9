"""Compares the speed of wmkp with the paper's equations in NumPy, PyTorch's backprop and BioTorch's rules.

Every number is the other library's time relative to wmkp. Above 1, wmkp is faster. These numbers have no target,
because XLA's kernels set wmkp's time on a CPU. The target limits what wmkp adds to JAX: the time of an epoch under
Kolen-Pollack relative to JAX's own backprop.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import benchmarks
import wmkp
from benchmarks import Part, Row, Settings, arrays, models, paper_numpy

# Batch size, seconds of turns, and the image side in a trial of the scripts.
SIZES = {"ViT-Ti": (8, 25, 32), "LeNet": (64, 12, 32), "ResNet-20": (128, 30, 32)}
BIOTORCH = {"fa": wmkp.feedback_alignment, "usf": wmkp.sign_symmetry}  # modes of BioTorch, and wmkp's rules


def parts(settings: Settings) -> dict[str, Part]:
    """The parts: an epoch of MNIST, then a step of each model."""
    return {
        "MNIST epoch": partial(mnist_epoch, settings),
        **{f"{name} step": partial(step, name, settings) for name in SIZES},
    }


# --- the paper's MNIST network ----------------------------------------------------------------------------------------


def sigmoid_loss(params: Any, model_state: Any, batch: Any, key: Any) -> Any:
    """Ten sigmoid cross-entropies, summed over outputs and averaged over the batch."""
    x, targets = batch
    h = jax.nn.sigmoid(x @ params["W1"] + params["b1"])
    losses = optax.sigmoid_binary_cross_entropy(h @ params["W2"] + params["b2"], targets)
    return losses.sum(-1).mean(), (model_state, {})


def jax_epochs(images: np.ndarray, targets: np.ndarray) -> dict[str, Callable[[], Any]]:
    """The same network in float32 under ``wmkp.kolen_pollack`` and JAX's backprop. One compiled call trains an epoch."""
    count = len(images) // paper_numpy.BATCH
    cut = lambda a: jnp.asarray(a[: count * paper_numpy.BATCH], jnp.float32).reshape(count, paper_numpy.BATCH, -1)
    data = cut(images), cut(targets)
    params = {k: jnp.asarray(w, jnp.float32) for k, w in paper_numpy.init().items() if k != "B2"}
    case = models.Case(sigmoid_loss, params, None, optax.sgd(paper_numpy.RATE), jax.tree.map(lambda a: a[0], data))
    steps = wmkp.make_steps(sigmoid_loss, wmkp.kolen_pollack(), case.optimizer, params, case.batch)
    engaged = steps.engaged_step, steps.init(jax.random.key(0), params)

    def epoch(step: Callable[..., Any], state: Any) -> Callable[[], Any]:
        train = jax.jit(lambda state, data: jax.lax.scan(step, state, data), donate_argnums=0)
        return models.chained(train, state, data)

    return {"wmkp": epoch(*engaged), "JAX": epoch(*models.backprop_step(case))}


def reproduced_epoch(images: np.ndarray, labels: np.ndarray) -> Callable[[], Any]:
    """The same epoch by ``wmkp reproduce akrout-mnist``, which skips the weights of pixels that are dark in a batch."""
    from wmkp.experiments.commands import published  # which needs tyro and Pillow
    from wmkp.experiments.data.datasets import Dataset

    train = {"image": np.rint(255 * images).astype(np.uint8), "label": labels.astype(np.int32)}
    trial = published.start(published.PUBLISHED["kp"], Dataset(train, train, 10), published.HIDDEN["mnist"])
    return models.chained(trial.run_epoch, trial.state, trial.train, 0)


def torch_epoch(images: np.ndarray, targets: np.ndarray) -> Callable[[], Any]:
    """The same network by PyTorch's backprop, in float32, batch by batch."""
    import torch
    from torch.nn import functional as F

    count = len(images) // paper_numpy.BATCH * paper_numpy.BATCH
    data = [torch.tensor(a[:count], dtype=torch.float32).split(paper_numpy.BATCH) for a in (images, targets)]
    w = {
        k: torch.tensor(v, dtype=torch.float32, requires_grad=True) for k, v in paper_numpy.init().items() if k != "B2"
    }
    optimizer = torch.optim.SGD(w.values(), paper_numpy.RATE)

    def epoch() -> None:
        for x, t in zip(*data, strict=True):
            optimizer.zero_grad(set_to_none=True)
            h = torch.sigmoid(torch.addmm(w["b1"], x, w["W1"]))
            logits = torch.addmm(w["b2"], h, w["W2"])
            (F.binary_cross_entropy_with_logits(logits, t, reduction="sum") / len(x)).backward()
            optimizer.step()

    return epoch


def products_epoch(images: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Only the two products of W1, which every step needs, in float32: by XLA, and by PyTorch."""
    count = len(images) // paper_numpy.BATCH
    x = images[: count * paper_numpy.BATCH].astype(np.float32).reshape(count, paper_numpy.BATCH, -1)
    w1 = paper_numpy.init()["W1"].astype(np.float32)

    def one(w: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return w - 1e-9 * (x.T @ (x @ w)), None

    epoch = jax.jit(lambda w, x: jax.lax.scan(one, w, x), donate_argnums=0)
    calls: dict[str, Callable[[], Any]] = {"XLA's products": models.chained(epoch, jnp.asarray(w1), jnp.asarray(x))}
    if benchmarks.installed("torch"):
        import torch

        w, batches = torch.tensor(w1), torch.tensor(x)

        def multiply() -> None:
            for x in batches:
                w.addmm_(x.T, x @ w, alpha=-1e-9)

        calls["PyTorch's products"] = multiply
    return calls


def numpy_kernel() -> list[dict[str, Any]]:
    """The matrix library of NumPy, from threadpoolctl if that is installed."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    wanted = ("internal_api", "num_threads", "version", "threading_layer", "architecture")
    return [{k: info.get(k) for k in wanted} for info in threadpool_info() if info.get("user_api") == "blas"]


def mnist_epoch(settings: Settings) -> Iterator[Row]:
    """468 steps of batch 128: NumPy (Kolen-Pollack) and PyTorch (backprop) relative to wmkp (Kolen-Pollack)."""
    random = np.random.default_rng(0)
    examples = 1280 if settings.quick else 60_000
    images, labels = random.uniform(size=(examples, 784)), random.integers(10, size=examples)
    if settings.data_dir and not settings.quick:
        (x, labels), _ = arrays.load("mnist", settings.data_dir)
        images = (x.reshape(len(x), -1) - x.min()) / (x.max() - x.min())  # back to [0, 1]
    images, targets = images.astype(np.float64), np.eye(10)[labels]
    kernel = numpy_kernel()
    weights = paper_numpy.init()
    calls = {**jax_epochs(images, targets), "NumPy": lambda: paper_numpy.epoch(weights, images, targets)}
    with contextlib.suppress(ImportError):
        calls["wmkp reproduce"] = reproduced_epoch(images, labels)
    if benchmarks.installed("torch"):
        calls["PyTorch"] = torch_epoch(images, targets)
    calls |= products_epoch(images)
    taken = benchmarks.in_turns(calls, 0 if settings.quick else 30, least=3)
    name = "MNIST epoch, 784-500-10, KP:"
    epoch = 1e3 * float(np.median(taken["wmkp"]))
    yield benchmarks.ratio(
        f"{name} the paper's NumPy over wmkp", taken, "NumPy", "wmkp", f"wmkp {epoch:.0f} ms",
        detail={"numpy": kernel},
    )  # fmt: skip
    if "wmkp reproduce" in taken:
        about = f"dark pixels rest; {1e3 * float(np.median(taken['wmkp reproduce'])):.0f} ms"
        for peer, whose in (("NumPy", "the paper's NumPy"), ("PyTorch", "PyTorch's backprop")):
            if peer in taken:
                row = f"{name} {whose} over wmkp reproduce"
                yield benchmarks.ratio(row, taken, peer, "wmkp reproduce", about)
    if "PyTorch" in taken:
        yield benchmarks.ratio(f"{name} PyTorch's backprop over wmkp", taken, "PyTorch", "wmkp")
        about = "two float32 products a step and nothing else"
        for peer, whose in (("NumPy", "the paper's NumPy"), ("PyTorch", "PyTorch's backprop")):
            row = f"{name} {whose} over its products alone, by PyTorch"
            yield benchmarks.ratio(row, taken, peer, "PyTorch's products", about)
    else:
        yield Row(f"{name} PyTorch's backprop over wmkp", note="PyTorch is not installed")
    yield benchmarks.ratio(f"{name} wmkp over JAX's backprop", taken, "wmkp", "JAX", at_most=1.1)
    for call, whose in (("wmkp", "wmkp"), ("JAX", "JAX's backprop")):
        yield benchmarks.ratio(f"{name} {whose} over its products alone, by XLA", taken, call, "XLA's products")


# --- steps of larger models -------------------------------------------------------------------------------------------


def step(name: str, settings: Settings) -> Iterator[Row]:
    """PyTorch's backprop relative to wmkp's Kolen-Pollack, and BioTorch's rules relative to the same rules of wmkp."""
    if not benchmarks.installed("torch"):
        yield Row(f"{name}: PyTorch's backprop over wmkp's KP, a step", note="PyTorch is not installed")
        return
    import torch

    from benchmarks import torch_models

    batch_size, seconds, side = SIZES[name]
    case = models.make(name, 4 if settings.quick else batch_size, size=side if settings.quick else None)
    x, labels = np.array(case.batch["image"]), np.array(case.batch["label"])

    def model() -> torch.nn.Module:
        return torch_models.MODELS[name](x.shape[1])

    adamw = name == "ViT-Ti"
    calls: dict[str, Callable[[], Any]] = {"PyTorch": torch_models.training_step(model(), x, labels, adamw)}
    if not adamw:
        calls["PyTorch, channels last"] = torch_models.training_step(model(), x, labels, channels_last=True)
    rules: dict[str, Callable[[], wmkp.Rule]] = {"KP": wmkp.kolen_pollack}
    if benchmarks.installed("biotorch") and not adamw:
        from biotorch.module.biomodule import BioModule

        for mode, rule in BIOTORCH.items():
            calls[f"BioTorch {mode}"] = torch_models.training_step(BioModule(model(), mode), x, labels)
            rules[mode] = rule
    for label, rule in rules.items():
        steps = wmkp.make_steps(
            case.loss_fn, rule(), case.optimizer, case.params, case.batch, model_state=case.model_state
        )
        state = steps.init(jax.random.key(0), case.params, case.model_state)
        calls[label] = models.chained(steps.engaged_step, state, case.batch)
    taken = benchmarks.in_turns(calls, 0 if settings.quick else seconds)
    fastest = min((c for c in calls if c.startswith("PyTorch")), key=lambda c: float(np.median(taken[c])))
    threads = f"batch {len(x)}; PyTorch has {torch.get_num_threads()} threads"
    yield benchmarks.ratio(
        f"{name}: PyTorch's backprop over wmkp's KP, a step", taken, fastest, "KP", f"{fastest}; {threads}"
    )
    if adamw:
        return
    for mode in BIOTORCH:
        row = f"{name}: BioTorch's {mode} over wmkp's, a step"
        if mode in taken:
            yield benchmarks.ratio(row, taken, f"BioTorch {mode}", mode, f"batch {len(x)}")
        else:
            yield Row(row, note="BioTorch is not installed")
