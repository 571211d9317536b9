"""Datasets by name: read into memory, opened for streaming, or prepared by TFDS."""

import json
import logging
import math
import os
import shlex
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from wmkp.experiments.config import InputError, first_line
from wmkp.experiments.data import images, records

Examples = dict[str, Any]  # "image": (examples, height, width, channels) and "label": (examples,) int32, or "tokens"

IGNORED = -1  # the label of padding and of unreadable examples
ANSWER_SECONDS = 6.0  # for a host to answer before a download begins
RESIDENT_BYTES = 2 * 10**9  # a larger dataset is streamed


class Dataset(NamedTuple):
    """A dataset that fits in memory.

    Attributes:
      train, test: examples: images, uint8 or float32, and their labels in [0, num_classes); or windows of text, int32
        (examples, length + 1) in [0, num_classes), of which the first ``length`` are for input and the last for target.
      num_classes: how many labels, or characters, there are.
    """

    train: Examples
    test: Examples
    num_classes: int


def load(name: str, data_dir: Path | None, max_bad: float = 0.001) -> Dataset:
    """Reads a dataset into memory.

    Args:
      name: "digits", which comes with scikit-learn; "characters", which comes with Python; a dataset that TFDS has
        prepared under ``data_dir``, such as "mnist"; or the directory of one, such as "../tfds/mnist/3.0.1".
      data_dir: where TFDS keeps its datasets; None for its own default.
      max_bad: the share of records that may be unreadable; they are left out. See ``records.BadRecords``.

    Raises:
      InputError: there is no such dataset, it is not there, it is not made of labelled images of one size, or too much
        of it cannot be read.
    """
    if name == "digits":
        return digits()
    return characters() if name == "characters" else from_tfds(name, data_dir, max_bad)


def digits() -> Dataset:
    """1,797 handwritten digits of 8x8 pixels. A fixed third, stratified by digit, is the test set."""
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


def characters(length: int = 128) -> Dataset:
    """Python's language reference, topic by topic, in windows of characters that do not overlap.

    It has about 700,000 characters, fixed for each version of Python. The last tenth of the windows is the test set.
    """
    from pydoc_data.topics import topics

    text = np.array([ord(c) for c in "\n".join(topics[name] for name in sorted(topics))])
    vocabulary, tokens = np.unique(text, return_inverse=True)
    count = len(tokens) // (length + 1)
    windows = tokens[: count * (length + 1)].reshape(count, length + 1).astype(np.int32)
    train = count - count // 10
    return Dataset({"tokens": windows[:train]}, {"tokens": windows[train:]}, num_classes=len(vocabulary))


def from_tfds(name: str, data_dir: Path | None, max_bad: float = 0.001) -> Dataset:
    """The train and test (or validation) splits of a dataset that TFDS has prepared in a format with random access.

    Nothing is downloaded, and TensorFlow is not needed.

    Args, Raises:
      As ``load``.
    """
    opened = builder(name, data_dir)
    features = opened.info.features
    if None in features["image"].shape:
        raise InputError(
            f"dataset {name!r} has images of many sizes; all must be of one size. wmkp train resizes them: --image-size 64"
        )
    train, test = (_read(opened, split, max_bad) for split in ("train", test_split(opened)))
    return Dataset(train, test, num_classes=features["label"].num_classes)


def builder(name: str, data_dir: Path | None) -> Any:
    """TFDS's builder of a dataset of labelled images that is prepared for random access.

    Args:
      name: as TFDS spells it, such as "mnist" or "cifar10"; or the directory of a version of a dataset, or of a dataset
        of which there is one version, if the path has a separator in it.
      data_dir: as ``load``.

    Raises:
      InputError: as ``load``.
    """
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS recommends OpenCV at each call
    where = data_dir or Path(tfds.core.constants.DATA_DIR)
    directory = _directory(name)
    try:
        opened = tfds.builder_from_directory(directory) if directory else tfds.builder(name, data_dir=where)
    except tfds.core.DatasetNotFoundError:
        raise InputError(
            f"unknown dataset {name!r}: it is not digits or characters, not in TFDS, and not in {where}"
        ) from None
    except Exception as error:  # of many kinds, with messages of many lines
        raise InputError(f"cannot read dataset {name!r} in {directory or where}: {first_line(error)}") from None
    splits = opened.info.splits
    if not splits:
        raise InputError(f"{where} has no dataset {name!r}; {_how_to_get(name, where)}")
    if "train" not in splits or not {"test", "validation"} & set(splits):
        raise InputError(
            f"dataset {name!r} must have a train and a test (or validation) split; it has {', '.join(splits)}"
        )
    features = opened.info.features
    if not {"image", "label"} <= set(features) or not getattr(features["label"], "num_classes", None):
        raise InputError(f"dataset {name!r} must have the features image and label; it has {', '.join(features)}")
    if opened.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise InputError(
            f"dataset {name!r} in {opened.data_dir} is not prepared for random access (ArrayRecord); {_how_to_get(name, where)}"
        )
    return opened


def fits(opened: Any) -> bool:
    """Whether a builder's images have one size and take less than 2 GB together. Otherwise they must be streamed."""
    image, splits = opened.info.features["image"], opened.info.splits
    if None in image.shape:
        return False
    examples = splits["train"].num_examples + splits[test_split(opened)].num_examples
    return examples * math.prod(image.shape) * np.dtype(image.np_dtype).itemsize < RESIDENT_BYTES


def test_split(opened: Any) -> str:
    """The split to test on: "test", or "validation" if there is no test split or (as in ImageNet) it has no labels."""
    if "test" not in opened.info.splits:
        return "validation"
    if "validation" not in opened.info.splits:
        return "test"
    import tensorflow_datasets as tfds

    source = records.open_split(opened, "test", image=tfds.decode.SkipDecoding())
    return "validation" if source[0]["label"] < 0 else "test"


def prepare(name: str, data_dir: Path | None) -> Path:
    """Downloads a dataset and prepares it for random access with TFDS. Prints its directory.

    Args:
      name: as TFDS spells it.
      data_dir: as ``load``.

    Returns:
      The directory of the dataset's version.

    Raises:
      InputError: TFDS does not know it; there is no network; TFDS needs another package, such as TensorFlow, to make
        it; or it can only be downloaded by hand.
    """
    import tensorflow_datasets as tfds

    if name in ("digits", "characters"):
        raise InputError(f"{name} needs no preparation: it comes with wmkp[experiments]")
    for talks in ("absl", "urllib3"):
        logging.getLogger(talks).setLevel(logging.ERROR)
    where = data_dir or Path(tfds.core.constants.DATA_DIR)
    try:
        made = tfds.builder(name, data_dir=where, file_format="array_record")
        if not made.data_path.exists():
            there = [json.loads(path.read_text()).get("urls", []) for path in (where / "downloads").glob("*.INFO")]
            _check_reachable(name, set(made.url_infos or ()).difference(*there))
        made.download_and_prepare()
    except tfds.core.DatasetNotFoundError:
        raise InputError(f"unknown dataset {name!r}: TFDS has no such dataset; check the name") from None
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise InputError(f"TFDS needs {package} to prepare {name!r} (not to read it): pip install {package}") from None
    except InputError:
        raise
    except OSError as error:  # all errors of requests are OSErrors
        raise InputError(f"cannot download {name!r} to {where}: {first_line(error)}") from None
    except Exception as error:  # of many kinds; a manual download is an AssertionError
        raise InputError(f"cannot prepare {name!r} in {where}: {' '.join(str(error).split())}") from None
    print(f"{name} is in {made.data_dir}")
    return Path(made.data_dir)


def _check_reachable(name: str, urls: Iterable[str]) -> None:
    """Raises InputError if the download host does not answer. TFDS itself would try for minutes."""
    import requests

    url = next((url for url in urls if url.startswith("http")), None)
    if url is None:
        return
    failed: list[Exception | None] = []

    def ask() -> None:
        try:
            requests.head(url, timeout=ANSWER_SECONDS).close()
            failed.append(None)
        except requests.RequestException as error:
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)  # resolving a name can take longer than the timeout of requests
    asking.start()
    asking.join(ANSWER_SECONDS + 1)
    if failed != [None]:
        host = urlsplit(url).hostname
        raise InputError(f"cannot download {name!r}: {host} does not answer; check the network connection")


def _directory(name: str) -> Path | None:
    """The directory of a dataset's version if the name is a path, else None."""
    path = Path(name).expanduser()
    if name.startswith((".", "~", os.sep)) and not path.is_dir():  # names in TFDS may contain a separator
        raise InputError(f"cannot read dataset {name!r}: there is no such directory")
    if not (os.sep in name and path.is_dir()):
        return None
    found = [d for d in (path, *sorted(path.iterdir())) if (d / "dataset_info.json").is_file()]
    if len(found) != 1:
        versions = ", ".join(d.name for d in found) or "none"
        raise InputError(f"cannot read dataset {name!r}: name the directory of one version; this one holds: {versions}")
    return found[0]


def _read(opened: Any, split: str, max_bad: float) -> Examples:
    """All readable images and labels of a split, in their order."""
    import tensorflow_datasets as tfds

    source = records.open_split(opened, split, image=tfds.decode.SkipDecoding())
    feature = opened.info.features["image"]
    plain = feature.np_dtype == np.uint8 and feature.shape[-1] in (1, 3)
    decode = partial(images.whole, channels=feature.shape[-1]) if plain else feature.decode_example_np
    pixels = np.empty((len(source), *feature.shape), feature.np_dtype)
    labels = np.empty(len(source), np.int32)

    def read(indices: range) -> list[int]:
        """The indices that cannot be read."""
        try:
            encoded = dict(zip(indices, source.__getitems__(list(indices)), strict=True))  # faster than one by one
        except Exception:  # of many kinds; one bad record fails the whole read
            encoded = {}
        bad = []
        for i in indices:
            try:
                example = encoded.get(i) or source[i]
                image = decode(example["image"])
                if image.shape != feature.shape:
                    raise ValueError
                pixels[i], labels[i] = image, example["label"]
            except Exception:
                bad.append(i)
        return bad

    chunks = [range(i, min(i + 1024, len(source))) for i in range(0, len(source), 1024)]
    found = records.BadRecords(split, len(source), max_bad)
    with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
        for chunk, bad in zip(chunks, pool.map(read, chunks), strict=True):
            found = found.add(bad + [-1] * (len(chunk) - len(bad)))
    if found.indices:
        bad = sorted(found.indices)
        pixels, labels = np.delete(pixels, bad, axis=0), np.delete(labels, bad)
    return {"image": pixels, "label": labels}


def _how_to_get(name: str, where: Path) -> str:
    return f"prepare it there once: wmkp data {shlex.quote(name)} --data-dir {shlex.quote(str(where))}"
