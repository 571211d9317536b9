"""Batches on the devices, of datasets in device memory or of datasets read during training."""

import contextlib
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wmkp.experiments.config import InputError, Train
from wmkp.experiments.data import datasets as data
from wmkp.experiments.data import records, streaming
from wmkp.experiments.data.datasets import IGNORED
from wmkp.experiments.devices import put_batch, put_everywhere
from wmkp.training import batch_sharding

PROBE = 64  # training examples for delta angles (rounded up to the number of devices)
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Feed(NamedTuple):
    """A dataset as a run sees it.

    Attributes:
      shape: of an example, (height, width, channels) or (length,).
      num_classes: of labels, or the size of the vocabulary.
      mean, std: of the pixels, by channel.
      epoch_steps: whole steps in an epoch.
      batches: ``step -> iterator`` of the batches from that step on, without end. The order and all random choices
        depend only on the config's seed and the step.
      tests: ``() -> iterator`` of the test set's batches, the last one padded with examples labelled IGNORED.
      probe: training examples, always the same.
    """

    shape: tuple[int, ...]
    num_classes: int
    mean: Any
    std: Any
    epoch_steps: int
    batches: Callable[[int], Iterator[Any]]
    tests: Callable[[], Iterator[Any]]
    probe: Any


def open_feed(config: Train, mesh: Mesh) -> Feed:
    """The feed of a config's dataset.

    Raises:
      InputError: as ``data.load`` and ``streaming.open_stream``; or a batch is more than the training set.
    """
    built_in = config.dataset in ("digits", "characters")
    if built_in or data.fits(data.builder(config.dataset, config.data_dir)):
        feed = _resident(config, data.load(config.dataset, config.data_dir, config.max_bad), mesh)
    else:
        feed = _streamed(config, mesh)
    if not feed.epoch_steps:
        raise InputError(
            f"--batch-size {config.batch_size} is larger than the training set of {config.dataset}; use a smaller one"
        )
    return feed


def _resident(config: Train, dataset: data.Dataset, mesh: Mesh) -> Feed:
    train, test = dataset.train, dataset.test
    if config.image_size is not None and "image" in train:
        train, test = ({**part, "image": _resized(part["image"], config.image_size)} for part in (train, test))
    kind = "image" if "image" in train else "tokens"
    examples, size = len(train[kind]), config.batch_size
    epoch_steps = examples // size
    order_key, augment_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
    everywhere = NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, out_shardings=everywhere)
    def order(epoch: Any) -> jax.Array:
        shuffled = jax.random.permutation(jax.random.fold_in(order_key, epoch), examples)
        return shuffled[: epoch_steps * size].reshape(epoch_steps, size)

    @partial(jax.jit, out_shardings=batch_sharding(mesh))
    def take(examples: Any, order: jax.Array, step: Any) -> Any:
        batch = jax.tree.map(lambda x: x[order[step % epoch_steps]], examples)
        if config.augment and "image" in batch:
            batch["image"] = crop_and_flip(jax.random.fold_in(augment_key, step), batch["image"])
        return batch

    on_device = put_everywhere(train, mesh)

    def batches(start: int) -> Iterator[Any]:
        epoch = -1
        for step in itertools.count(start):
            if step // epoch_steps != epoch:
                epoch = step // epoch_steps
                chosen = order(np.int32(epoch))
            yield take(on_device, chosen, np.int32(step))

    filled = _filled(test, -(-len(test[kind]) // size) * size)
    on_device_test = put_everywhere(filled, mesh)

    @partial(jax.jit, out_shardings=batch_sharding(mesh))
    def take_test(examples: Any, i: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size), examples)

    def tests() -> Iterator[Any]:
        for i in range(len(filled[kind]) // size):
            yield take_test(on_device_test, np.int32(i))

    if kind == "image":
        shape = train["image"].shape[1:]
        pixels = train["image"].reshape(-1, shape[-1])
        mean, std = pixels.mean(0, dtype=np.float64), pixels.std(0, dtype=np.float64)
        mean, std = mean.astype(np.float32), np.maximum(std, 1e-3).astype(np.float32)
    else:
        shape, mean, std = (train["tokens"].shape[1] - 1,), 0.0, 1.0
    count = min(-(-PROBE // mesh.size) * mesh.size, examples // mesh.size * mesh.size)
    probe = jax.device_put(jax.tree.map(lambda x: x[:count], train), batch_sharding(mesh))
    return Feed(shape, dataset.num_classes, mean, std, epoch_steps, batches, tests, probe)


def _streamed(config: Train, mesh: Mesh) -> Feed:
    stream = streaming.open_stream(config.dataset, config.data_dir, config.image_size or 224)
    place = {"process": jax.process_index(), "processes": jax.process_count()}

    def put(source: Any, bad: records.BadRecords) -> Generator[Any, None, None]:
        with contextlib.closing(source):
            for batch in source:
                bad = bad.add(batch["bad"])
                yield put_batch({name: batch[name] for name in ("image", "label")}, mesh)

    def batches(start: int) -> Iterator[Any]:
        source = streaming.train_batches(stream, config.batch_size, config.seed, start, config.workers, **place)
        yield from _ahead(put(source, records.BadRecords("train", len(stream.train), config.max_bad)))

    def tests() -> Iterator[Any]:
        source = streaming.test_batches(stream, config.batch_size, config.workers, **place)
        yield from _ahead(put(source, records.BadRecords(stream.test_split, len(stream.test), config.max_bad)))

    count = -(-PROBE // mesh.size) * mesh.size
    source = streaming.train_batches(stream, count, config.seed, **place)
    with contextlib.closing(put(source, records.BadRecords("train", len(stream.train), config.max_bad))) as first:
        probe = next(first)
    return Feed(
        (stream.size, stream.size, 3),
        stream.num_classes,
        np.array(IMAGENET_MEAN, np.float32),
        np.array(IMAGENET_STD, np.float32),
        len(stream.train) // config.batch_size,
        batches,
        tests,
        probe,
    )


def _ahead(batches: Iterator[Any], count: int = 2) -> Iterator[Any]:
    """The same batches, with ``count`` on their way to the devices while one is in use."""
    waiting: deque[Any] = deque()
    for batch in batches:
        waiting.append(batch)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def crop_and_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Pads each image (batch, height, width, channels) by an eighth with zeros, crops it at random, and flips half of them."""
    batch, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    pad = jnp.array([height // 8, width // 8])
    corners = jax.random.randint(crop_key, (batch, 2), 0, 2 * pad + 1)
    flipped = jax.random.bernoulli(flip_key, shape=(batch,))
    padded = jnp.pad(images, ((0, 0), (height // 8,) * 2, (width // 8,) * 2, (0, 0)))

    def one(image: jax.Array, corner: jax.Array, flip: jax.Array) -> jax.Array:
        image = jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))
        return jnp.where(flip, image[:, ::-1], image)

    return jax.vmap(one)(padded, corners, flipped)


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    """Images at another size, resized in parts to save memory."""
    shape = (size, size, images.shape[-1])
    needed = len(images) * math.prod(shape) * images.dtype.itemsize
    if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise InputError(
            f"--image-size {size} needs {needed / 1e9:,.0f} GB for {len(images):,} images, more than main memory; use a smaller one"
        )
    resize = jax.jit(lambda x: jax.image.resize(x.astype(jnp.float32), (len(x), *shape), "bilinear"))
    parts = [np.asarray(resize(images[i : i + 4096])) for i in range(0, len(images), 4096)]
    whole = np.concatenate(parts)
    return np.clip(np.round(whole), 0, 255).astype(np.uint8) if images.dtype == np.uint8 else whole


def _filled(examples: data.Examples, count: int) -> data.Examples:
    """Examples padded to ``count`` with zeros that are labelled IGNORED."""
    filled = {}
    for name, x in examples.items():
        fill = 0 if name == "image" else IGNORED
        filled[name] = np.concatenate([x, np.full((count - len(x), *x.shape[1:]), fill, x.dtype)])
    return filled
