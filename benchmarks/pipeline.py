"""Compares the speed of the input pipeline with a plain loop that decodes the same images.

``python -m benchmarks.pipeline --data-dir DIR`` streams the dataset on one core and on all, in threads and in worker
processes. Streams and loops take turns. The results go to ``benchmarks/results/pipeline.json``.
"""

import dataclasses
import importlib.metadata
import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image

import benchmarks
from wmkp.experiments.data import images, streaming


@dataclasses.dataclass(frozen=True)
class Args:
    """Times the input pipeline."""

    data_dir: Path
    """Where TFDS has the dataset prepared."""
    dataset: str = "imagenet2012"
    """Its name."""
    size: int = 224
    """Of the images made."""
    batch_size: int = 16
    """Images in a batch."""
    batches: int = 20
    """Batches in a timing."""
    rounds: int = 5
    """Timings of each, all ways taking turns."""
    save: bool = True
    """Whether to write the results."""


def decode_and_resize(encoded: list[bytes], size: int) -> None:
    """Decodes and resizes every whole image with PIL only."""
    for content in encoded:
        np.asarray(Image.open(io.BytesIO(content)).convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def crop(encoded: list[bytes], size: int) -> None:
    """Decodes and crops each image as the pipeline does, in a plain loop."""
    for i, content in enumerate(encoded):
        images.random_crop(content, size, np.random.default_rng(i))


def crop_all_decoded(encoded: list[bytes], size: int) -> None:
    """Makes the same crops, but decodes every JPEG at its full size."""
    for i, content in enumerate(encoded):
        rng = np.random.default_rng(i)
        image = Image.open(io.BytesIO(content)).convert("RGB")
        left, top, width, height = images.random_box(*image.size, rng)
        box = (left, top, left + width, top + height)
        np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


LOOPS: dict[str, Callable[[list[bytes], int], None]] = {
    "loop: decode, resize": decode_and_resize,
    "loop: decode, crop": crop,
    "loop: decode all, crop": crop_all_decoded,
}


def loop_rate(loop: Callable[[list[bytes], int], None], encoded: list[bytes], size: int) -> float:
    """Images per second of a plain loop."""
    start = time.perf_counter()
    loop(encoded, size)
    return len(encoded) / (time.perf_counter() - start)


def stream_rate(args: Args, stream: streaming.Stream, cores: list[int], workers: int) -> float:
    """Images per second of the pipeline on ``cores``. Timing starts when the images read ahead are used up."""
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)  # threads and worker processes inherit it
    try:
        batches: Iterator[Any] = streaming.train_batches(stream, args.batch_size, seed=0, workers=workers)
        for _ in range(1 + (2 * streaming.AHEAD * workers or len(cores))):
            next(batches)
        start = time.perf_counter()
        for _ in range(args.batches):
            next(batches)
        seconds = time.perf_counter() - start
        del batches
    finally:
        os.sched_setaffinity(0, every)
    return args.batches * args.batch_size / seconds


def main(args: Args) -> None:
    """Measures all methods in turns. Prints and saves images per second, also relative to the first loop."""
    stream = streaming.open_stream(args.dataset, args.data_dir, args.size)
    encoded = [stream.train[i]["image"] for i in range(min(len(stream.train), args.batches * args.batch_size))]
    every = sorted(os.sched_getaffinity(0))
    ways: dict[str, tuple[int, Callable[[], float]]] = {
        name: (1, lambda loop=loop: loop_rate(loop, encoded, args.size)) for name, loop in LOOPS.items()
    }
    for cores in sorted({1, len(every)}):
        for workers in range(cores + 1):
            ways[f"pipeline: {cores} cores, {workers} workers"] = (
                cores,
                lambda cores=cores, workers=workers: stream_rate(args, stream, every[:cores], workers),
            )
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, (_, rate) in ways.items():
            rates[name].append(rate())
    first = rates[next(iter(LOOPS))]
    rows = []
    print(f"{'images per second':32} {'median':>7} {'least':>7} {'most':>7} {'a core':>7} {'over the first':>15}")
    for name, (cores, _) in ways.items():
        ratios = [rate / base for rate, base in zip(rates[name], first, strict=True)]
        row = {
            "way": name,
            "cores": cores,
            "images_per_second": {
                "median": statistics.median(rates[name]),
                "least": min(rates[name]),
                "most": max(rates[name]),
            },
            "over_first": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        }
        rows.append(row)
        median, least, most = row["images_per_second"].values()
        print(
            f"{name:32} {median:7.1f} {least:7.1f} {most:7.1f} {median / cores:7.1f} {statistics.median(ratios):8.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f})"
        )
    sizes = [Image.open(io.BytesIO(content)).size for content in encoded]
    if args.save:
        versions = {name: importlib.metadata.version(name) for name in ("pillow", "grain", "array-record")}
        about = {
            "images": len(encoded),
            "bytes": float(np.mean([*map(len, encoded)])),
            "size": np.mean(sizes, 0).tolist(),
        }
        settings = {**dataclasses.asdict(args), "data_dir": None}
        benchmarks.save("pipeline", {"settings": settings, "used": versions, "encoded": about, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
