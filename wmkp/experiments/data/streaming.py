"""Batches read from disk, for images that do not fit in memory or have many sizes.

All random choices depend on the seed and on a position in the endless sequence of training examples, in which each epoch
has its own order. Batch t holds positions t B to (t + 1) B. So a batch may take the last examples of one epoch and the
first of the next: none is left out, and all batches have one size. Threads, worker processes and the number of processes
that share a batch do not change a pixel. The iterator's whole state is the number of batches it has given.
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

MAX_RUN = 1000  # unreadable records in a row: too many for chance, and reading on would take long
AHEAD = 2  # batches that a worker process keeps ready


class Stream(NamedTuple):
    """A dataset of labelled images on disk.

    Attributes:
      train, test: sources of records, TFDS's; an index gives a dict with the encoded image and the label.
      num_classes: how many labels there are.
      size: height and width of the images in a batch; they have three channels.
      test_split: the name of the split of test examples, "test" or "validation".
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
      workers: processes that decode; 0 for threads of this one. They import the main script, so it must run its work
        under ``if __name__ == "__main__":``.
      process, processes: give only the process-th of ``processes`` equal blocks of each batch.

    Yields:
      "image": (local batch, size, size, 3) uint8; "label": int32; "bad": int64, the index of an
      unreadable record that the next readable one replaces, or -1.

    Raises:
      InputError: the batch cannot be divided, or many records in a row cannot be read.
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
      As ``train_batches``. An unreadable record has a black image, the label -1 and its index in "bad". Black images with
      label -1 also pad the last batch. All processes get the same number of batches.
    """
    import grain

    batches = -(-len(stream.test) // batch_size)
    examples = grain.MapDataset.range(batches * batch_size).map(_CentreCrop(stream.test, stream.size))
    return _run(stream, examples, batch_size, 0, workers, process, processes)


class _RandomCrop(NamedTuple):
    """Maps a record's index to a training example. It is no closure, so worker processes can receive it."""

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
            f"{tries} training records in a row, from {index}, cannot be read ({first_line(first)}); "
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
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which only programs started by absl parse
    # Each block is one batch, so that processes and workers get whole blocks.
    blocks = examples.batch(local)[start * processes + process :: processes]
    threads = 1 if workers else min(16, _cores())
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    batches = blocks.to_iter_dataset(read).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD), worker_init_fn=_start_worker
    )
    iterator = _close_after(batches, copied=workers > 0)
    # Also at exit: when Python collects the iterator then, Grain can no longer close it.
    weakref.finalize(iterator, _close, weakref.ref(iterator))
    return iterator


def _close(reference: Callable[[], Generator[Batch, None, None] | None]) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()


def _close_after(batches: Any, copied: bool) -> Generator[Batch, None, None]:
    """Iterates. Stops threads and worker processes at the end, when closed, and when no longer referenced."""
    iterator = iter(batches)
    try:
        for batch in iterator:
            # Copy the workers' shared memory, which ends with them: JAX may keep an array longer.
            yield {key: np.array(value) for key, value in batch.items()} if copied else batch
    finally:
        iterator.close()


def _start_worker(index: int, count: int) -> None:
    """Makes a worker process ignore Ctrl-C, and end when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _check_shared_memory(needed: int) -> None:
    """Raises InputError if shared memory is too small for the workers' batches, as in small containers."""
    room = Path("/dev/shm")
    if needed and room.is_dir() and shutil.disk_usage(room).free < needed:
        raise InputError(
            f"the worker processes' batches need {needed / 1e6:.0f} MB in {room}, which has "
            f"{shutil.disk_usage(room).free / 1e6:.0f} MB free; use fewer --workers, or --workers 0"
        )


def _cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
