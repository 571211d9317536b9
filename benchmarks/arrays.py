"""MNIST, CIFAR-10 and Tiny ImageNet-100 as arrays, or random arrays of their shapes."""

from pathlib import Path

import numpy as np

SHAPES = {"mnist": (28, 1, 10), "cifar10": (32, 3, 10), "tiny_imagenet100": (64, 3, 100)}

Split = tuple[np.ndarray, np.ndarray]


def load(name: str, data_dir: Path | None, random_examples: int = 4096) -> tuple[Split, Split | None]:
    """Loads (train, test): each has float32 images of zero mean and unit variance, and int32 labels.

    Reads ``<data_dir>/<name>.npz`` (train_image, train_label, test_image, test_label) if it exists, and TFDS's dataset
    otherwise. Without ``data_dir`` the images are random, and the test set is None.
    """
    side, channels, classes = SHAPES[name]
    if data_dir is None:
        random = np.random.default_rng(0)
        x = random.normal(size=(random_examples, side, side, channels)).astype(np.float32)
        return (x, random.integers(classes, size=random_examples).astype(np.int32)), None
    stored = data_dir / f"{name}.npz"
    if stored.exists():
        with np.load(stored) as arrays:
            train, test = ((arrays[f"{s}_image"], arrays[f"{s}_label"]) for s in ("train", "test"))
    else:
        from wmkp.experiments.data import datasets  # imported here: it needs the packages of the command line

        versions = sorted((data_dir / name).glob("*")) if name == "tiny_imagenet100" else []
        dataset = datasets.load(str(versions[-1]) if versions else name, data_dir)
        train, test = ((split["image"], split["label"]) for split in (dataset.train, dataset.test))
    mean = train[0][::10].mean((0, 1, 2), dtype=np.float64).astype(np.float32)
    std = train[0][::10].std((0, 1, 2), dtype=np.float64).astype(np.float32)
    first, second = (((x - mean) / std, y.astype(np.int32)) for x, y in (train, test))
    return first, second


def batches(split: Split, batch_size: int, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Draws ``count`` batches of examples at random."""
    x, y = split
    random = np.random.default_rng(seed)
    rows = [random.choice(len(x), batch_size, replace=False) for _ in range(count)]
    return [{"image": x[i], "label": y[i]} for i in rows]
