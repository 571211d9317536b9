"""Data on disk: order and pixels of streamed batches, resuming, sharding and unreadable records."""

import io
import itertools
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from wmkp.experiments.config import InputError
from wmkp.experiments.data import datasets as data
from wmkp.experiments.data import images, records, streaming

SIZE = 24
REAL = Path(os.environ.get("WMKP_TFDS", "nowhere"))  # a TFDS directory with ImageNet or a sample of it

FIXED = tfds.features.Image(shape=(6, 5, 3))
ANY = tfds.features.Image(shape=(None, None, 3))


def photograph(i):
    """The i-th smooth random image, of a random size. Three of the images are grey, CMYK or PNG."""
    rng = np.random.default_rng(i)
    width, height = int(rng.integers(40, 90)), int(rng.integers(40, 90))
    pixels = rng.integers(0, 256, (3, 4, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    mode, kind = {3: ("L", "JPEG"), 4: ("CMYK", "JPEG"), 5: ("P", "PNG")}.get(i, ("RGB", "JPEG"))
    file = io.BytesIO()
    image.convert(mode).save(file, kind)
    return file.getvalue()


def flat(i):
    file = io.BytesIO()
    Image.new("RGB", (5, 6), (i, 2 * i, 255 - i)).save(file, "PNG")
    return file.getvalue()


def make(path, feature, splits, withheld=(), name="WmkpImages", version="1.0.0", ids=None):
    """Prepares a TFDS dataset of encoded images under ``path`` and returns its directory.

    ``ids(split, i)`` returns the id of the i-th example of a split.
    """
    features = {"image": feature, "label": tfds.features.ClassLabel(num_classes=10)}
    if ids is not None:
        features["id"] = tfds.features.Text()

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def generate(self, split):
        for i, content in enumerate(splits[split]):
            example = {"image": io.BytesIO(content), "label": -1 if split in withheld else i % 10}
            yield i, example if ids is None else {**example, "id": ids(split, i)}

    methods = {
        "VERSION": tfds.core.Version(version),
        "_info": info,
        "_split_generators": lambda self, _: {split: generate(self, split) for split in splits},
        "_generate_examples": generate,
    }
    kind = type(name, (tfds.core.GeneratorBasedBuilder,), methods, skip_registration=True)
    tfds.disable_progress_bar()
    builder = kind(data_dir=path, file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A dataset of 23 training and 10 validation images of many sizes. A record's label is not its index."""
    splits = {"train": [photograph(i) for i in range(23)], "validation": [photograph(i) for i in range(50, 60)]}
    return make(tmp_path_factory.mktemp("tfds"), ANY, splits)


@pytest.fixture(scope="module")
def stream(directory):
    return streaming.open_stream(directory, None, SIZE)


class Damaged:
    """A source in which some records cannot be read, and some hold a truncated image."""

    def __init__(self, source, missing=(), garbled=()):
        self.source, self.missing, self.garbled = source, missing, garbled

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if index in self.missing:
            raise RuntimeError("hash mismatch")
        record = self.source[index]
        cut = len(record["image"]) // 2 if index in self.garbled else None
        return {**record, "image": record["image"][:cut]}


class Numbers:
    """A source of records with an image of one colour and their own index as the label."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"image": flat(index % 100), "label": index}


def take(count, *args, **kwargs):
    batches = streaming.train_batches(*args, **kwargs)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def equal(a, b):
    assert a.keys() == b.keys() == {"image", "label", "bad"}
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


def joined(batches):
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def test_every_epoch_is_a_permutation_of_its_own():
    numbers = streaming.Stream(Numbers(37), Numbers(3), 37, 8, "test")
    labels = joined(take(28, numbers, 4, seed=0))["label"]  # just over three epochs, so a batch spans two epochs
    epochs = [tuple(labels[i : i + 37]) for i in (0, 37, 74)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    for seed in (1, 2):  # another seed gives other orders in all its epochs
        labels = joined(take(28, numbers, 4, seed=seed))["label"]
        epochs += [tuple(labels[i : i + 37]) for i in (0, 37, 74)]
    assert len(set(epochs)) == 9 and tuple(range(37)) not in epochs


def test_batches_are_a_function_of_seed_and_position(stream):
    batches = take(7, stream, 6, seed=5)
    assert batches[0]["image"].shape == (6, SIZE, SIZE, 3) and batches[0]["image"].dtype == np.uint8
    assert batches[0]["label"].dtype == np.int32 and batches[0]["bad"].dtype == np.int64
    assert all((batch["bad"] == -1).all() for batch in batches)
    for a, b in zip(batches, take(7, stream, 6, seed=5), strict=True):
        equal(a, b)
    for a, b in zip(batches[4:], take(3, stream, 6, seed=5, start=4), strict=True):
        equal(a, b)
    other = take(1, stream, 6, seed=6)[0]
    assert (other["label"] != batches[0]["label"]).any()
    far = take(1, stream, 6, seed=5, start=10**12)[0]  # fast: nothing before it is read
    assert (far["label"] >= 0).all()
    # A record gets another crop in the next epoch.
    everything = joined(batches)
    pixels = [image.tobytes() for image in everything["image"]]
    assert len(set(pixels)) == len(pixels) > len(stream.train)


def test_processes_take_blocks_of_the_batch(stream):
    whole = take(3, stream, 6, seed=5, start=2)
    parts = [take(3, stream, 6, seed=5, start=2, process=p, processes=3) for p in range(3)]
    for batch, blocks in zip(whole, zip(*parts, strict=True), strict=True):
        equal(batch, joined(blocks))
    whole = list(streaming.test_batches(stream, 6))
    parts = [list(streaming.test_batches(stream, 6, process=p, processes=2)) for p in range(2)]
    for batch, blocks in zip(whole, zip(*parts, strict=True), strict=True):
        equal(batch, joined(blocks))
    with pytest.raises(InputError, match="multiple of the 4 processes; got 6"):
        streaming.train_batches(stream, 6, 0, processes=4)


@pytest.mark.slow
def test_worker_processes_change_nothing_and_go_away(stream):
    damaged = stream._replace(train=Damaged(stream.train, missing={3, 4}, garbled={7}))
    batches = streaming.train_batches(damaged, 4, seed=1, start=1, workers=2)
    for a, b in zip(take(9, damaged, 4, seed=1)[1:], batches, strict=False):
        equal(a, b)
        assert type(b["image"]) is np.ndarray
    assert multiprocessing.active_children()
    del batches
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_worker_processes_do_not_outlive_one_that_is_killed(directory, child_environment):
    code = f"""
import multiprocessing, time
from wmkp.experiments.data import streaming
batches = streaming.train_batches(streaming.open_stream({str(directory)!r}, None, {SIZE}), 4, seed=1, workers=1)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], env=child_environment, stdout=subprocess.PIPE, text=True
    ) as parent:
        (worker,) = map(int, parent.stdout.readline().split())
        os.kill(worker, 0)  # the worker is alive
        parent.kill()
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(worker, 0)
            time.sleep(0.05)


def test_next_readable_record_stands_in_for_a_bad_one(stream):
    sound = take(6, stream, 4, seed=3)
    damaged = stream._replace(train=Damaged(stream.train, missing={3, 4}, garbled={22}))
    labels = [record["label"] for record in stream.train]
    stand_in = {3: 5, 4: 5, 22: 0}
    found = joined(take(6, damaged, 4, seed=3))
    bad = found["bad"] >= 0
    assert set(found["bad"][:23]) == {-1, *stand_in}
    for index, label in zip(found["bad"][bad], found["label"][bad], strict=True):
        assert label == labels[stand_in[index]]
    for key in ("label", "image"):
        np.testing.assert_array_equal(found[key][~bad], joined(sound)[key][~bad])
    with pytest.raises(InputError, match="23 training records in a row, from .*, cannot be read .*hash mismatch"):
        take(1, stream._replace(train=Damaged(stream.train, missing=range(23))), 4, seed=0)


def test_test_examples_once_padded_and_without_bad_ones(stream):
    damaged = stream._replace(test=Damaged(stream.test, missing={2}, garbled={9}))
    batches = list(streaming.test_batches(damaged, 4))
    assert [len(batch["label"]) for batch in batches] == [4, 4, 4]
    found = joined(batches)
    expected = [record["label"] for record in stream.test]
    expected[2] = expected[9] = -1
    np.testing.assert_array_equal(found["label"], [*expected, -1, -1])
    np.testing.assert_array_equal(found["bad"], [-1, -1, 2, -1, -1, -1, -1, -1, -1, 9, -1, -1])
    assert not found["image"][[2, 9, 10, 11]].any()
    for i in (0, 1, 8):
        np.testing.assert_array_equal(found["image"][i], images.centre_crop(stream.test[i]["image"], SIZE))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P"])
@pytest.mark.parametrize(("width", "height"), [(40, 30), (17, 60), (21, 21)])
def test_centre_crop(mode, width, height):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, "JPEG" if mode == "CMYK" else "PNG")
    image = Image.open(file).convert("RGB")
    short = 16  # 14 * 256 / 224
    image = image.resize((round(width * short / min(width, height)), round(height * short / min(width, height))), 2)
    left, top = (image.width - 14) // 2, (image.height - 14) // 2
    expected = np.asarray(image)[top : top + 14, left : left + 14]
    np.testing.assert_array_equal(images.centre_crop(file.getvalue(), 14), expected)


def test_random_boxes_are_as_defined():
    rng = np.random.default_rng(0)
    width, height = 400, 400
    boxes = np.array([images.random_box(width, height, rng) for _ in range(4000)])
    left, top, w, h = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (left + w <= width).all() and (top + h <= height).all()
    area, aspect = w * h / width / height, np.log(w / h)
    assert 0.075 < area.min() < 0.09 and 0.95 < area.max() <= 1
    assert abs(aspect).max() < np.log(4 / 3) + 0.02
    # Below an area of 3/4 every aspect fits and no draw is rejected. So area is uniform and aspect log-uniform there.
    inside = area < 0.75
    deciles = np.quantile(area[inside], np.linspace(0, 1, 11))
    np.testing.assert_allclose(deciles, np.linspace(0.08, 0.75, 11), atol=0.02)
    deciles = np.quantile(aspect[inside], np.linspace(0, 1, 11))
    np.testing.assert_allclose(deciles, np.linspace(np.log(3 / 4), np.log(4 / 3), 11), atol=0.03)
    room = w < width
    assert abs((left[room] / (width - w[room])).mean() - 0.5) < 0.02
    # No crop fits in these long images. The box is the centre, with an aspect of 4/3 or 3/4.
    assert images.random_box(1000, 30, rng) == (480, 0, 40, 30)
    assert images.random_box(30, 1000, rng) == (0, 480, 30, 40)


def test_random_crop_shows_its_box(monkeypatch):
    """Pixel values that encode coordinates show that the crop is its box, at several JPEG decoding scales."""
    y, x = np.mgrid[0:240, 0:240].astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1)).save(file, "JPEG", quality=95, subsampling=0)
    flips = 0
    for i, (size, box) in enumerate(itertools.product((12, 24, 60), [(8, 16, 208, 200), (100, 30, 60, 72)] * 4)):
        monkeypatch.setattr(images, "random_box", lambda width, height, rng, box=box: box)
        crop = images.random_crop(file.getvalue(), size, np.random.default_rng(i)).astype(float)
        across, down = crop[..., 0].mean(0), crop[..., 1].mean(1)
        flips += across[0] > across[-1]
        centres = (np.arange(size) + 0.5) / size
        # Whether antialiasing of the outermost pixels reaches beyond the box depends on the scale.
        np.testing.assert_allclose(np.sort(across), box[0] + box[2] * centres - 0.5, atol=2.5)
        np.testing.assert_allclose(down, box[1] + box[3] * centres - 0.5, atol=2.5)
    assert 4 < flips < 20


def test_a_crop_of_a_jpeg_decoded_smaller_is_nearly_the_same(monkeypatch):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC).save(file, "JPEG")
    with Image.open(file) as image:
        assert images._decode_smaller(image, 5) == (4, 4) and image.size == (100, 75)
    smaller = images.random_crop(file.getvalue(), 24, np.random.default_rng(1))
    monkeypatch.setattr(images, "_decode_smaller", lambda image, factor: (1, 1))
    full = images.random_crop(file.getvalue(), 24, np.random.default_rng(1))
    difference = np.abs(smaller.astype(int) - full)
    assert 0 < difference.max() < 48 and difference.mean() < 5


def test_bad_records_are_counted_once_warned_of_once_and_fatal_when_too_many(caplog):
    bad = records.BadRecords("train", 100)
    with caplog.at_level(logging.WARNING):
        for _ in range(300):  # 300 epochs with the same bad record of a hundred
            bad = bad.add([17, *[-1] * 99])
    assert bad.indices == {17} and bad.seen == 30_000
    assert [record.getMessage() for record in caplog.records] == ["train split: cannot read record 17; passed over"]
    with pytest.raises(InputError, match="4 of the first 32 test records read are bad .record 1 is one"):
        records.BadRecords("test", 10_000).add([1, 2, 3, 4, *[-1] * 28])
    with pytest.raises(InputError, match="--max-bad 0 allows"):
        records.BadRecords("test", 10_000, max_bad=0).add([5, -1])
    assert len(records.BadRecords("test", 50, max_bad=0.2).add([*range(10), *[-1] * 40]).indices) == 10
    # A share of one in a hundred raises an error. A share of one in ten thousand does not.
    rng = np.random.default_rng(0)
    for share, fatal in ((0.01, True), (0.0001, False)):
        bad, found = records.BadRecords("train", 100_000), False
        try:
            for start in range(0, 100_000, 500):
                index = np.arange(start, start + 500)
                bad = bad.add(np.where(rng.random(500) < share, index, -1))
        except InputError:
            found = True
        assert found is fatal


def test_names_and_directories(directory, tmp_path):
    by_directory = data.builder(str(Path(directory).parent), None)  # the only version there
    assert str(by_directory.data_dir) == str(directory) and not data.fits(by_directory)
    with pytest.raises(InputError, match="images of many sizes"):
        data.load(directory, None)
    with pytest.raises(InputError, match="name the directory of one version; this one holds: none"):
        data.builder(str(tmp_path), None)
    for version in "12":
        (tmp_path / version).mkdir()
        (tmp_path / version / "dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match="this one holds: 1, 2"):
        data.builder(str(tmp_path), None)
    with pytest.raises(InputError, match="cannot read dataset"):
        data.builder(str(tmp_path / "1"), None)


def test_validation_split_where_the_test_labels_are_withheld(tmp_path):
    few = {split: [flat(i) for i in range(3)] for split in ("train", "test", "validation")}
    assert data.test_split(data.builder(make(tmp_path / "a", FIXED, few), None)) == "test"
    assert data.test_split(data.builder(make(tmp_path / "b", FIXED, few, withheld="test"), None)) == "validation"


def test_resident_images_without_the_bad_ones(tmp_path, caplog):
    encoded = [flat(i) for i in range(30)]
    encoded[11] = encoded[11][:40]
    where = make(tmp_path, FIXED, {"train": encoded, "test": [flat(3)], "validation": [flat(i) for i in (5, 6)]})
    dataset = data.load(where, None)
    assert data.fits(data.builder(where, None)) and data.test_split(data.builder(where, None)) == "test"
    assert dataset.train["image"].shape == (29, 6, 5, 3) and dataset.train["image"].dtype == np.uint8
    reds, labels = dataset.train["image"][:, 0, 0, 0], dataset.train["label"]
    np.testing.assert_array_equal(reds % 10, labels)
    assert set(reds) == set(range(30)) - {11} and "cannot read record" in caplog.text
    with pytest.raises(InputError, match="1 of the first 30 train records read are bad"):
        data.load(where, None, max_bad=0)


def test_damaged_files_are_named_and_damaged_records_are_not_fatal(tmp_path, caplog):
    rng = np.random.default_rng(0)
    noise = []
    for _ in range(12):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
        noise.append(file.getvalue())
    where = Path(make(tmp_path, tfds.features.Image(shape=(64, 64, 3)), {"train": noise, "test": noise[:2]}))
    (file,) = where.glob("*train*record*")
    content = file.read_bytes()
    middle = content.index(noise[5][1000:1050])
    file.write_bytes(content[:middle] + bytes(50) + content[middle + 50 :])
    dataset = data.load(str(where), None)
    assert len(dataset.train["label"]) == 11 and "cannot read record" in caplog.text
    stream = streaming.open_stream(str(where), None, 8)
    assert sorted(set(joined(take(3, stream, 4, seed=0))["bad"]))[0] == -1
    assert (joined(take(3, stream, 4, seed=0))["bad"] >= 0).sum() == 1
    for damage, message in (
        (content[: len(content) // 2], "truncated or garbled"),
        (b"", "truncated"),
        (None, "not there"),
    ):
        file.unlink(missing_ok=True)
        if damage is not None:
            file.write_bytes(damage)
        for read in (data.load, streaming.open_stream):
            with pytest.raises(InputError, match=f"cannot read .*{file.name}: .*{message}"):
                read(str(where), None)


@pytest.mark.parametrize("way", ["resident", "streamed"])
def test_a_file_damaged_at_random_is_refused_or_its_records_are_left_out(way, tmp_path):
    """Every record that is read equals the original, and only InputError is raised (records have checksums)."""
    feature, image = (FIXED, flat) if way == "resident" else (ANY, photograph)
    where = make(tmp_path, feature, {"train": [image(i) for i in range(24)], "test": [image(3)]})
    (file,) = Path(where).glob("*train*record*")
    content, rng = bytearray(file.read_bytes()), np.random.default_rng(0)

    def read():
        """The images and labels by the image's red value (resident) or position (streamed), without bad ones."""
        if way == "resident":
            train = data.load(where, None, max_bad=1.0).train
            return {x[0, 0, 0]: (x, label) for x, label in zip(train["image"], train["label"], strict=True)}
        batch = joined(take(6, streaming.open_stream(where, None, 8), 4, seed=0))
        return {i: (batch["image"][i], batch["label"][i]) for i in np.flatnonzero(batch["bad"] < 0)}

    whole = read()
    assert len(whole) == 24
    left_out = refused = 0
    for i in range(16):
        damaged = content.copy()
        if i % 4 == 3:
            del damaged[rng.integers(len(damaged)) :]
        else:
            for place in rng.integers(0, len(damaged) if i % 2 else 200, 8):
                damaged[place] ^= 1 << rng.integers(8)
        file.write_bytes(damaged)
        try:
            found = read()
            left_out += 24 - len(found)
            for key, (pixels, label) in found.items():
                np.testing.assert_array_equal(pixels, whole[key][0])
                assert label == whole[key][1]
        except InputError as error:
            refused += 1
            assert file.name in str(error)
    assert left_out and refused >= 4


def test_characters():
    dataset = data.load("characters", None)
    train, test = dataset.train["tokens"], dataset.test["tokens"]
    assert train.dtype == test.dtype == np.int32 and train.shape[1] == test.shape[1] == 129
    assert len(test) == (len(train) + len(test)) // 10 and len(train) > 1000
    assert np.unique(np.concatenate([train, test])).tolist() == list(range(dataset.num_classes))
    from pydoc_data.topics import topics

    vocabulary = sorted(set("\n".join(topics[name] for name in sorted(topics))))
    text = "".join(vocabulary[i] for i in train.ravel())
    assert text.startswith(topics[min(topics)][:1000])


def test_prepare(monkeypatch, tmp_path, capsys):
    class WmkpPrepared(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        fails = None

        def _info(self):
            features = {"image": FIXED, "label": tfds.features.ClassLabel(num_classes=10)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            if self.fails:
                raise self.fails
            return {"train": self._generate_examples(9), "test": self._generate_examples(4)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": io.BytesIO(flat(i)), "label": i}

    for failure, message in (
        (ConnectionError("no route"), "cannot download 'wmkp_prepared' to .*no route"),
        (
            ImportError("No module named 'tensorflow.io'", name="tensorflow.io"),
            "needs tensorflow .*pip install tensorflow",
        ),
        (AssertionError("Manual directory\nis empty"), "cannot prepare 'wmkp_prepared' .*: Manual directory is empty"),
    ):
        monkeypatch.setattr(WmkpPrepared, "fails", failure)
        with pytest.raises(InputError, match=message):
            data.prepare("wmkp_prepared", tmp_path)
    monkeypatch.setattr(WmkpPrepared, "fails", None)
    capsys.readouterr()
    where = data.prepare("wmkp_prepared", tmp_path)
    assert capsys.readouterr().out.endswith(f"\nwmkp_prepared is in {where}\n")
    assert json.loads((where / "dataset_info.json").read_text())["fileFormat"] == "array_record"
    assert data.prepare("wmkp_prepared", tmp_path) == where  # a second call does nothing
    assert len(data.load("wmkp_prepared", tmp_path).train["label"]) == 9
    assert "tensorflow" not in sys.modules
    with pytest.raises(InputError, match="unknown dataset 'nosuch': TFDS has no such dataset"):
        data.prepare("nosuch", tmp_path)
    with pytest.raises(InputError, match="digits needs no preparation"):
        data.prepare("digits", tmp_path)


@pytest.mark.skipif(not (REAL / "imagenet2012").is_dir(), reason="there is no sample of ImageNet in WMKP_TFDS")
def test_imagenet():
    assert not data.fits(data.builder("imagenet2012", REAL))
    stream = streaming.open_stream("imagenet2012", REAL, 64)
    assert (stream.num_classes, stream.test_split) == (1000, "validation")
    whole = joined(take(5, stream, 32, seed=0))
    assert len(set(whole["label"])) == len(stream.train) == 160 and (whole["bad"] == -1).all()
    test = joined(list(streaming.test_batches(stream, 16)))
    assert (test["label"] >= 0).sum() == len(stream.test) == 40 and (test["bad"] == -1).all()
    assert 100 < whole["image"].mean() < 130 and 90 < test["image"].mean() < 140
