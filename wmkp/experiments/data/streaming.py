"""Images too many, or of too many sizes, for memory: batches read from disk as they are needed.

Everything random is a function of the seed and of a position in the endless sequence of training examples: epoch after
epoch, each in an order of its own. Batch t holds positions t B to (t + 1) B, so a batch may take the last examples of
one epoch and the first of the next: none is left out and all are of one size. Neither threads, nor worker processes,
nor the number of processes that share a batch change a pixel of it, and the iterator's whole state is the number of
batches it has given.
"""

import multiprocessing
import os
import shutil
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wmkp.experiments.config import InputError, first_line
from wmkp.experiments.data import datasets as data
from wmkp.experiments.data import images, records

Batch = dict[str, np.ndarray]

MAX_RUN = 1000  # unreadable records in a row: this is not chance, and reading on would take long
AHEAD = 2  # batches that a worker process keeps ready


class Stream(NamedTuple):
    """A dataset of labelled images on disk.

    Attributes:
      train, test: sources of records, TFDS's; an index gives a dict with the encoded image and the label.
      num_classes: how many labels there are.
      size: height and width of the images in a batch; they have three channels.
      test_split: the name of the split that test examples come from, "test" or "validation"; the other's is "train".
    """

    train: Any
    test: Any
    num_classes: int
    size: int
    test_split: str


def open_stream(name: str, data_dir: Path | None, size: int = 224) -> Stream:
    """Opens a dataset's files.

    Args:
      name, data_dir: as ``data.load``.
      size: of the images in a batch, in pixels.

    Raises:
      InputError: as ``data.load``; or a file cannot be opened.
    """
    import tensorflow_datasets as tfds

    builder = data.builder(name, data_dir)
    test_split = data.test_split(builder)
    raw = {"image": tfds.decode.SkipDecoding()}
    return Stream(
        train=records.open_split(builder, "train", **raw),
        test=records.open_split(builder, test_split, **raw),
        num_classes=builder.info.features["label"].num_classes,
        size=size,
        test_split=test_split,
    )


def train_batches(
    stream: Stream, batch_size: int, seed: int, start: int = 0, workers: int = 0, process: int = 0, processes: int = 1
) -> Iterator[Batch]:
    """Batches without end: random resized crops in random order.

    Args:
      stream: the images.
      batch_size: of the global batch, over all processes.
      seed: of the order and of the crops, at least 0 and below 2^32.
      start: the first batch to give; those before it are not read.
      workers: processes that decode, 0 for threads of this one. They start afresh, so a script that asks for them
        must guard what it runs by ``if __name__ == "__main__":``.
      process, processes: give only the process-th of ``processes`` equal blocks of each batch.

    Yields:
      "image": (local batch, size, size, 3) uint8; "label": int32; "bad": int64, the index of a record that should have
      stood here but cannot be read, so that the next readable one stands in for it, or -1.

    Raises:
      InputError: the batch cannot be divided, or many records on end cannot be read.
    """
    import grain

    order = grain.MapDataset.range(len(stream.train)).seed(seed).shuffle().repeat()
    examples = order.random_map(_RandomCrop(stream.train, stream.size))
    return _run(stream, examples, batch_size, start, workers, process, processes)


def test_batches(
    stream: Stream, batch_size: int, workers: int = 0, process: int = 0, processes: int = 1
) -> Iterator[Batch]:
    """The test examples in their order, once: centre crops.

    Args:
      stream, batch_size, workers, process, processes: as ``train_batches``.

    Yields:
      As ``train_batches``. Label -1 and a black image stand for a record that cannot be read, whose index is in "bad",
      and fill up the last batch. All processes get equally many batches.
    """
    import grain

    batches = -(-len(stream.test) // batch_size)
    examples = grain.MapDataset.range(batches * batch_size).map(_CentreCrop(stream.test, stream.size))
    return _run(stream, examples, batch_size, 0, workers, process, processes)


class _RandomCrop(NamedTuple):
    """Index of a record to training example. Not a closure, for worker processes to receive it."""

    source: Any
    size: int

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        first: Exception | None = None
        tries = min(MAX_RUN, len(self.source))
        for i in range(tries):
            try:
                record = self.source[(index + i) % len(self.source)]
                image = images.random_crop(record["image"], self.size, rng)
            except Exception as error:  # of a dozen kinds, by file format
                first = first or error
            else:
                return _example(image, record["label"], index if i else -1)
        raise InputError(
            f"none of {tries} training records from {index} on can be read ({first_line(first)}); "
            "prepare the dataset again"
        )


class _CentreCrop(NamedTuple):
    """Index of a record to test example; the indices after the last are padding."""

    source: Any
    size: int

    def __call__(self, index: int) -> dict[str, Any]:
        black = np.zeros((self.size, self.size, 3), np.uint8)
        if index >= len(self.source):
            return _example(black, -1, -1)
        try:
            record = self.source[index]
            return _example(images.centre_crop(record["image"], self.size), record["label"], -1)
        except Exception:
            return _example(black, -1, index)


def _example(image: np.ndarray, label: int, bad: int) -> dict[str, Any]:
    return {"image": image, "label": np.int32(label), "bad": np.int64(bad)}


def _run(
    stream: Stream, examples: Any, batch_size: int, start: int, workers: int, process: int, processes: int
) -> Iterator[Batch]:
    """The batches of examples from ``start`` on, or one process's blocks of them."""
    import grain
    from absl import flags

    if batch_size < 1 or batch_size % processes:
        raise InputError(f"--batch-size must be a multiple of the {processes} processes; got {batch_size}")
    local = batch_size // processes
    _check_shared_memory(workers * (2 * AHEAD + 1) * local * stream.size**2 * 3)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain looks at flags of its own, which are for programs that start by absl
    # A block is a batch of its own, so that blocks, not examples, are dealt to processes and from there to workers.
    blocks = examples.batch(local)[start * processes + process :: processes]
    threads = 1 if workers else min(16, _cores())
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    batches = blocks.to_iter_dataset(read).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD), worker_init_fn=_start_worker
    )
    iterator = _close_after(batches, copied=workers > 0)
    # Also at exit: by the time that Python collects what is left then, Grain cannot close it any more.
    weakref.finalize(iterator, _close, weakref.ref(iterator))
    return iterator


def _close(reference: Callable[[], Generator[Batch, None, None] | None]) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()


def _close_after(batches: Any, copied: bool) -> Generator[Batch, None, None]:
    """Iterates; stops threads and worker processes at the end, when closed, and when nobody refers to it any more."""
    iterator = iter(batches)
    try:
        for batch in iterator:
            # Workers hand over shared memory, which must not outlive them: JAX may keep an array for as long as it likes.
            yield {key: np.array(value) for key, value in batch.items()} if copied else batch
    finally:
        iterator.close()


def _start_worker(index: int, count: int) -> None:
    """In a worker process, leaves Ctrl-C to the one that started it, and sees to it that it does not outlive that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _check_shared_memory(needed: int) -> None:
    """Raises InputError where workers would be killed for want of room to put their batches, as in small containers."""
    room = Path("/dev/shm")
    if needed and room.is_dir() and shutil.disk_usage(room).free < needed:
        raise InputError(
            f"the worker processes' batches need {needed / 1e6:.0f} MB in {room}, which has "
            f"{shutil.disk_usage(room).free / 1e6:.0f} MB free; use fewer --workers, or 0"
        )


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
