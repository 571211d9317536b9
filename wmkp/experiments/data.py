"""Labelled images as arrays: scikit-learn's digits, and whatever TFDS has prepared."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wmkp.experiments.config import InputError

Examples = dict[str, Any]  # "image": (examples, height, width, channels), "label": (examples,) int32


class Dataset(NamedTuple):
    """A dataset that fits in memory.

    Attributes:
      train, test: examples; images are uint8 or float32, labels in [0, num_classes).
      num_classes: how many labels there are.
    """

    train: Examples
    test: Examples
    num_classes: int


def load(name: str, data_dir: Path | None) -> Dataset:
    """Reads a dataset: "digits", which comes with scikit-learn, or one that TFDS has prepared under ``data_dir``.

    Raises:
      InputError: there is no such dataset, it is not there, or it is not made of labelled images of one size.
    """
    return digits() if name == "digits" else from_tfds(name, data_dir)


def digits() -> Dataset:
    """1,797 handwritten digits of 8x8 pixels; a third, always the same and of each digit alike, is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images.reshape(-1, 8, 8, 1).astype(np.float32),
        labels.astype(np.int32),
        test_size=1 / 3,
        random_state=0,
        stratify=labels,
    )
    return Dataset({"image": train_x, "label": train_y}, {"image": test_x, "label": test_y}, num_classes=10)


def from_tfds(name: str, data_dir: Path | None) -> Dataset:
    """The train and test (or validation) splits of a dataset that TFDS has prepared in a format with random access.

    Nothing is downloaded, and TensorFlow is not needed.

    Args:
      name: as TFDS spells it, such as "mnist" or "cifar10".
      data_dir: where TFDS keeps its datasets; None for its own default.

    Raises:
      InputError: as ``load``.
    """
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS recommends OpenCV every time
    where = data_dir or Path(tfds.core.constants.DATA_DIR)
    try:
        builder = tfds.builder(name, data_dir=where)
    except tfds.core.DatasetNotFoundError:
        raise InputError(
            f"unknown dataset {name!r}: it is not digits, TFDS does not know it and {where} has none"
        ) from None
    except Exception as error:  # of a dozen kinds, with messages of many lines
        raise InputError(f"cannot read dataset {name!r} in {where}: {_first_line(error)}") from None
    if not builder.info.splits:
        raise InputError(f"{where} has no dataset {name!r}; {_how_to_get(name, where)}")
    splits = builder.info.splits
    test = next((split for split in ("test", "validation") if split in splits), None)
    if "train" not in splits or test is None:
        raise InputError(
            f"dataset {name!r} must have a train and a test (or validation) split; it has {', '.join(splits)}"
        )
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not features["label"].num_classes:
        raise InputError(f"dataset {name!r} must have the features image and label; it has {', '.join(features)}")
    if None in features["image"].shape:
        raise InputError(f"dataset {name!r} has images of many sizes; all must be of one size")
    try:
        train_source, test_source = builder.as_data_source(split=["train", test])
    except NotImplementedError:
        raise InputError(
            f"dataset {name!r} in {where} is not prepared for random access; {_how_to_get(name, where)}"
        ) from None
    return Dataset(_read(train_source), _read(test_source), num_classes=features["label"].num_classes)


def _read(source: Any) -> Examples:
    """All images and labels of a TFDS data source."""
    features = source.dataset_info.features
    images = np.empty((len(source), *features["image"].shape), features["image"].np_dtype)
    labels = np.empty(len(source), np.int32)
    for i, example in enumerate(source):
        images[i], labels[i] = example["image"], example["label"]
    return {"image": images, "label": labels}


def _how_to_get(name: str, where: Path) -> str:
    return (
        'prepare it there once, with TensorFlow installed: python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}, data_dir={str(where)!r}, file_format='array_record').download_and_prepare()\""
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
