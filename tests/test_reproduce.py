"""wmkp reproduce: the published NumPy experiments equal float64 equations. Tests of the command's files and
its errors.
"""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from matplotlib.image import imread
from PIL import Image
from test_data import make

import wmkp
from wmkp.experiments import config
from wmkp.experiments.commands import cli, published, recipes, reproduce, train, verdicts
from wmkp.experiments.config import InputError, Reproduce
from wmkp.experiments.data import datasets as data
from wmkp.experiments.runs import figures, outputs
from wmkp.experiments.runs.provenance import provenance

pytestmark = pytest.mark.usefixtures("quick_compile")

HIDDEN, CLASSES = 7, 4
SPREAD = [f"delta_angle_hidden_{what}_deg" for what in ("mean", "sd")]


@pytest.fixture(scope="module")
def dataset():
    """Return three batches of 2x3 pixels, and a rest that must be dropped.

    One pixel is lit only in tests, and another is not lit in one batch.
    """
    random = np.random.default_rng(0)

    def examples(count, dark=False):
        labels = random.integers(0, CLASSES, count).astype(np.int32)
        images = random.integers(0, 128, (count, 2, 3, 1)) + 40 * (labels % 3)[:, None, None, None]
        images[:, 1, 1] *= not dark
        return {"image": images.astype(np.uint8), "label": labels}

    train = examples(3 * published.BATCH + 50, dark=True)
    train["image"][published.BATCH : 2 * published.BATCH, 0, 0] = 0
    return data.Dataset(train, examples(200), CLASSES)


def colour(dataset):
    """Return the dataset with its images in three equal channels."""
    splits = ({**split, "image": np.repeat(split["image"], 3, -1)} for split in (dataset.train, dataset.test))
    return data.Dataset(*splits, CLASSES)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def by_numpy(variant, state, dataset, epochs):
    """Train by the published equations in float64 from the same start.

    Return W and b of both layers, B, and the mean loss of each epoch.
    """
    w1, b1, w2, b2 = (
        np.asarray(state.params[layer][name], np.float64)
        for layer in ("hidden", "output")
        for name in ("kernel", "bias")
    )
    b = None if variant.rule == "bp" else np.asarray(state.feedback["output"]["kernel"], np.float64)
    rate, size, losses = variant.learning_rate, published.BATCH, []
    x_all = dataset.train["image"].reshape(len(dataset.train["label"]), -1) / 255
    for _ in range(epochs):
        epoch = []
        for i in range(len(x_all) // size):
            x, labels = x_all[i * size :][:size], dataset.train["label"][i * size :][:size]
            t = np.eye(CLASSES)[labels]
            y = sigmoid(x @ w1 + b1)
            out = sigmoid(y @ w2 + b2)
            epoch.append(-(t * np.log(out) + (1 - t) * np.log(1 - out)).sum(1).mean())
            e = out - t
            delta = (e @ (w2 if b is None else b).T) * y * (1 - y)
            change2, change1 = y.T @ e / size, x.T @ delta / size
            b2, b1 = b2 - rate * e.sum(0) / size / size, b1 - rate * delta.sum(0) / size / size
            w2, w1 = w2 - rate * change2, w1 - rate * change1
            if variant.rule == "kp":
                b = b - rate * change2
        losses.append(np.mean(epoch))
    return w1, b1, w2, b2, b, losses


@pytest.mark.parametrize("name", ["bp", "fa", "kp"])
def test_a_published_experiment_is_its_equations(name, dataset):
    variant = published.PUBLISHED[name]
    trial = published.start(variant, dataset, HIDDEN, seed=3)
    start = jax.tree.map(np.array, trial.state._replace(key=0))  # a copy, because the state is donated
    expected = by_numpy(variant, start, dataset, epochs=4)
    state, losses = trial.state, []
    for epoch in range(4):
        state, loss = trial.run_epoch(state, trial.train, epoch)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, expected[5], rtol=2e-6)
    found = [state.params[layer][part] for layer in ("hidden", "output") for part in ("kernel", "bias")]
    before = [start.params[layer][part] for layer in ("hidden", "output") for part in ("kernel", "bias")]
    for w, first, theirs in zip(found, before, expected[:4], strict=True):
        moved = np.abs(theirs - first).max()
        assert np.abs(np.asarray(w) - theirs).max() < 1e-3 * moved  # the biases move little, so float32 rounding counts
    if name != "bp":
        np.testing.assert_allclose(state.feedback["output"]["kernel"], expected[4], rtol=1e-5, atol=1e-6)
    w1, b1, w2, b2 = expected[:4]
    x = dataset.test["image"].reshape(200, -1) / 255
    right = (sigmoid(x @ w1 + b1) @ w2 + b2).argmax(1) == dataset.test["label"]
    some = jax.tree.map(lambda leaf: leaf[:2], dataset.train)
    accuracy, *deltas, _ = trial.measure(state, some, dataset.test)
    assert float(accuracy) == pytest.approx(100 * right.mean(), abs=0.01)
    if name == "fa":
        x, t = some["image"].reshape(2, -1) / 255, np.eye(CLASSES)[some["label"]]
        e = sigmoid(sigmoid(x @ w1 + b1) @ w2 + b2) - t
        slope = sigmoid(x @ w1 + b1) * (1 - sigmoid(x @ w1 + b1))
        ours, its = (e @ expected[4].T) * slope, (e @ w2.T) * slope
        cosine = (ours * its).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(its, axis=1)
        angles = np.degrees(np.arccos(cosine))
        assert np.array(deltas) == pytest.approx([angles[0], angles.mean(), angles.std()], abs=0.02)


def test_pixels_that_a_batch_does_not_light_are_left_out_unless_weights_decay_or_batches_change(dataset):
    for name, size in (("kp", 5), ("kp-decay", 6), ("kp-shuffled", 6)):
        train = published.start(published.MENDED[name], dataset, HIDDEN).train
        assert train["image"].shape[-1] == size and ("pixels" in train) == (size == 5), name
    lit = dataset._replace(train={**dataset.train, "image": dataset.train["image"] | 1})
    assert "pixels" not in published.start(published.MENDED["kp"], lit, HIDDEN).train
    batches = np.zeros((2, 3, 4), np.uint8)
    batches[0, 1, 3] = batches[0, 2, 1] = batches[1, 0, 2] = 9
    assert published.lit(batches).tolist() == [[1, 3], [0, 2]]


def test_the_start_is_gaussian_with_the_published_variance():
    params = published.initial(jax.random.key(0), (300, 200, 50))
    for layer, fans in (("hidden", 500), ("output", 250)):
        for part in ("kernel", "bias"):
            w = np.asarray(params[layer][part])
            assert abs(w.std() * np.sqrt(fans) - 1) < 4 / np.sqrt(2 * w.size)
    rule = published.make_rule(published.PUBLISHED["fa"], 400, 600)
    feedback = wmkp.init_feedback(
        jax.random.key(1),
        {"w": rule, ".*": wmkp.backprop()},
        lambda p, x: x @ p["v"] @ p["w"],
        {"v": jnp.eye(400), "w": jnp.zeros((400, 600))},
        jnp.ones((1, 400)),
    )
    assert abs(float(feedback["w"].std()) * np.sqrt(1000) - 1) < 0.01


def test_the_published_mirror_adds_the_sum_over_a_batch(dataset, monkeypatch):
    """A mirror batch adds 0.01 x y^T to B, where y = sigmoid(W x + b).

    There are three mirror batches before training, then one after each step.
    """
    random, drawn = np.random.default_rng(1), []

    def draw(key, shape, dtype):  # of unit variance
        if not drawn:
            drawn.append(random.uniform(-published.NOISE, published.NOISE, shape))
        assert shape == (1, published.BATCH, HIDDEN)
        return jnp.asarray(drawn[0] / published.NOISE * np.sqrt(3), dtype)

    monkeypatch.setattr("wmkp.noise._uniform", draw)
    variant = published.PUBLISHED["wm"]
    trial = published.start(variant, dataset, HIDDEN, seed=3)
    w, bias = (np.asarray(trial.state.params["output"][part], np.float64) for part in ("kernel", "bias"))
    unmirrored = published.start(variant._replace(rule="fa"), dataset, HIDDEN, seed=3).state.feedback["output"][
        "kernel"
    ]
    x = drawn[0][0]
    expected = np.asarray(unmirrored) + 3 * published.MIRROR_RATE * x.T @ sigmoid(x @ w + bias)
    np.testing.assert_allclose(trial.state.feedback["output"]["kernel"], expected, atol=1e-6)
    before = np.asarray(trial.state.params["hidden"]["kernel"])
    state, _ = trial.run_epoch(trial.state, trial.train, 0)  # the steps also mirror, and see only the lit pixels
    assert np.abs(np.asarray(state.feedback["output"]["kernel"]) - expected).max() > 1e-4
    moved = np.abs(np.asarray(state.params["hidden"]["kernel"]) - before).max(1)
    assert (moved > 0).tolist() == [True, True, True, True, False, True]


def test_mended_mirrors_reach_the_transpose(dataset):
    """The mended mirrors reach W^T. The Gaussian mirrors have taken three mirror steps.

    The law of angles gives 14.8 degrees for them, and 17.9 with 128 samples a step.
    """
    found = {}
    for name, bound in (("wm-exact", 1e-2), ("kpm", 1e-2), ("wm-default", 17.0), ("wm-linear", 21.0)):
        state = published.start(published.MENDED[name], dataset, 40, seed=0).state
        (angle,) = wmkp.matrix_angles(state.params, state.feedback).values()
        found[name] = float(angle)
        assert found[name] < bound, name
    assert found["wm-linear"] > 15.5 and found["wm-default"] > 12
    assert (
        wmkp.samples_for_angle(6, published.HIDDEN["mnist"], wmkp.weight_mirror("gaussian", rate=0.1)) == 2383
    )  # as the run's title says


def test_a_shuffled_epoch_takes_each_example_once_in_another_order(dataset):
    whole = dataset._replace(train={k: x[: 3 * published.BATCH] for k, x in dataset.train.items()})
    slow = published.PUBLISHED["bp"]._replace(
        learning_rate=1e-9
    )  # W hardly moves, so an epoch's mean loss is that of its examples
    losses = {}
    for shuffled in (False, True):
        for rate in (1e-9, 0.2):
            trial = published.start(slow._replace(shuffled=shuffled, learning_rate=rate), whole, HIDDEN)
            losses[shuffled, rate] = float(trial.run_epoch(trial.state, trial.train, 0)[1])
    assert abs(losses[True, 1e-9] - losses[False, 1e-9]) < 1e-6
    assert abs(losses[True, 0.2] - losses[False, 0.2]) > 1e-6


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["wmkp", "reproduce", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def read(path):
    return list(csv.DictReader(path.open()))


@pytest.mark.slow
def test_curves_are_held_against_the_published(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "load", lambda name, data_dir: dataset)
    monkeypatch.setattr(published, "HIDDEN", {"mnist": HIDDEN})
    for rule in ("bp", "kp"):
        lines = [
            f"{e},1.0,{50 + e},{'' if rule == 'bp' else 30 - e},80,{'' if rule == 'bp' else 20 - e}" for e in range(5)
        ]
        header = "epoch,train_loss,test_accuracy_percent,delta_angle_hidden_deg,matrix_angle_W1_deg,matrix_angle_W2_deg"
        (tmp_path / f"akrout2019_mnist_{rule}.csv").write_text("\n".join([header, *lines]) + "\n")
    out = tmp_path / "out"
    arguments = ["akrout-mnist", "--epochs", 3, "--only", "bp", "kp", "--reference", tmp_path, "--out", out]
    assert run_command(monkeypatch, *arguments) == 0
    bp, kp = read(out / "summary.csv")
    curve = read(out / "kp.csv")
    assert [row["epoch"] for row in curve] == ["0", "1", "2"]
    assert kp["epoch"] == "3" and kp["accuracy"] == curve[-1]["test_accuracy_percent"]
    assert float(kp["accuracy_published"]) == 52 and float(kp["matrix_angle_published"]) == 18
    differences = [float(row["delta_angle_hidden_deg"]) - (30 - e) for e, row in enumerate(curve)]
    assert float(kp["delta_angle_largest_difference"]) == pytest.approx(max(map(abs, differences)), rel=1e-4)
    for i, row in enumerate(curve):
        assert float(kp[f"accuracy_quarter_{i + 1}"]) == pytest.approx(
            float(row["test_accuracy_percent"]) - 50 - i, abs=1e-3
        )
    assert kp["accuracy_quarter_1_error"] == "" and "accuracy_quarter_4" not in kp
    assert bp["matrix_angle"] == "" and float(bp["accuracy_published"]) == 52
    written = json.loads((out / "run.json").read_text())
    assert written["command"].startswith("wmkp reproduce akrout-mnist") and {"date", "machine", "versions"} <= set(
        written
    )
    assert imread(io.BytesIO((out / "curves.png").read_bytes())).shape[2] == 4
    printed = capsys.readouterr().out
    assert "from the mean" not in printed, "MNIST's is of the same example"
    assert "52.00" in printed and f"{float(kp['matrix_angle']):.2f}, 18.00" in printed
    assert f"All trained in {written['seconds']} s." in printed
    # A resumed run records its commit and that of the part before, and not the time of the whole run.
    monkeypatch.setattr(reproduce, "provenance", lambda: {"commit": "later", "date": "today"})
    assert run_command(monkeypatch, *("4" if x == 3 else x for x in arguments)) == 0
    assert len(read(out / "kp.csv")) == 4
    record = json.loads((out / "run.json").read_text())
    assert "seconds" not in record
    assert record["commit"] == "later" and [x["commit"] for x in record["before"]] == [written["commit"]]


def test_orders_keep_the_order_from_epoch_to_epoch_and_span_the_published(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "load", lambda name, data_dir: dataset)
    monkeypatch.setattr(published, "HIDDEN", {"mnist": HIDDEN, "cifar10": HIDDEN})
    monkeypatch.setattr(reproduce, "ORDERS", 2)
    header = "epoch,train_loss,test_accuracy_percent,delta_angle_hidden_deg,matrix_angle_W1_deg,matrix_angle_W2_deg"
    lines = [header, *(f"{e},1.5,{50 + e},,," for e in range(2))]
    (tmp_path / "akrout2019_mnist_bp.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    arguments = ["akrout-orders", "--epochs", 2, "--only", "mnist", "--reference", tmp_path, "--out", out]
    assert run_command(monkeypatch, *arguments) == 0
    rows, (first, second) = read(out / "mnist.csv"), read(out / "summary.csv")
    own, *of_first = [float(row["test_accuracy_percent"]) for row in rows if row["epoch"] == "0"]
    assert len(of_first) == 2 and [row["order"] for row in rows] == ["0", "0", "1", "1", "2", "2"]
    assert len({row["train_loss"] for row in rows}) == 6
    assert float(first["accuracy_least"]) == min(of_first) and float(first["accuracy_most"]) == max(of_first)
    assert float(first["accuracy_own"]) == own
    assert (first["accuracy_published"], second["accuracy_published"]) == ("50", "51")
    printed = capsys.readouterr().out
    assert "51.00" in printed and "mnist: the published accuracies" in printed
    order = np.random.default_rng((0, 1)).permutation(len(dataset.train["label"]))
    ordered = dataset._replace(train={key: x[order] for key, x in dataset.train.items()})
    for begin, data_of_run in ((0, dataset), (2, ordered)):
        again = published.run(published.PUBLISHED["bp"], data_of_run, HIDDEN, 2, 0)
        losses = [float(row["train_loss"]) for row in rows[begin : begin + 2]]
        assert losses == pytest.approx([row.train_loss for row in again], rel=1e-5)


def test_the_verdict_is_that_of_the_farthest_run_at_the_last_epoch(tmp_path):
    nan = float("nan")
    kpm = {"run": "kpm", "what": "", "epoch": 9, "accuracy": 90.0, "matrix_angle": 0.0, "delta_angle": 0.0}
    kpm |= {"delta_angle_mean": 0.0, "delta_angle_sd": 0.0}  # B = W^T: every example's angle is 0
    fa = kpm | {"run": "fa", "accuracy_published": 90.2, "matrix_angle": 38.0, "matrix_angle_published": 41.5}
    fa |= {"delta_angle": 38.0, "delta_angle_published": 34.0, "delta_angle_mean": 37.0, "delta_angle_sd": 2.0}
    bp = fa | {"run": "bp", "accuracy_published": 89.9}
    bp |= {f"{name}{end}": nan for name in ("matrix_angle", "delta_angle") for end in ("", "_published")}
    bp |= {"delta_angle_mean": nan, "delta_angle_sd": nan}
    assert reproduce.verdict("akrout-mnist", [bp, kpm, fa], tmp_path) == (
        "Farthest from the published at epoch 9: accuracy 0.20 points (fa; bound 0.3, met); matrix angle 3.50 degrees "
        "(fa; bound 3, missed); delta angle 4.00 degrees (fa; bound 3, missed), and at most 1.5 standard deviations from the "
        "mean over examples."
    )
    assert reproduce.verdict("akrout-mended", [kpm], tmp_path) == ""
    assert reproduce.verdict("biotorch-lenet", [{"run": "x", "test_error": 1.0}], tmp_path) == ""
    headings, *lines = reproduce.table([bp, kpm, fa])
    column = headings.index("delta angle of 128: mean, sd")
    assert [line[column] for line in lines] == ["-, -", "0.00, 0.00", "37.00, 2.00"]
    assert [line[headings.index("published, in sd from the mean")] for line in lines] == ["-", "-", "-1.50"]
    wm = fa | {"run": "wm", "matrix_angle": 45.0}
    assert "3.50 degrees (wm; bound 3, missed, by fa too with 3.50)" in reproduce.verdict(
        "akrout-mnist", [bp, fa, wm], tmp_path
    )


def test_differences_are_taken_by_quarters_where_both_were_evaluated():
    """Differences are averaged by quarters, at epochs where both curves were evaluated.

    A long run evaluates its first epochs one by one. Of these, only every tenth counts, as of the later epochs.
    """
    column = "test_accuracy_percent"
    curve = lambda values: [{"epoch": float(e), column: y} for e, y in values.items()]
    ours, theirs = curve({0: 1.0, 1: 3.0, 3: 5.0, 5: 7.0}), curve(dict.fromkeys(range(6), 1.0))
    assert verdicts.quartered(verdicts.quarters(ours, theirs, column), 1) == "+1.0 ± 1.0, +4.0, +6.0"
    epochs = [*range(20), *range(29, 160, 10)]
    ours = curve({e: e + (500.0 if e < 9 or 9 < e < 19 else 0.0) for e in epochs})
    found = verdicts.quarters(ours, curve(dict.fromkeys(range(160), 0.0)), column)
    assert [mean for mean, _ in found] == [24, 64, 104, 144]
    assert [error for _, error in found] == pytest.approx([np.std([9, 19, 29, 39], ddof=1) / 2] * 4)
    assert verdicts.quartered([], 2) == "-"


def test_steps_are_for_throughput(tmp_path):
    """With ``steps`` every step is logged, and ``mirror_steps`` stays unset."""
    short, whole = (Reproduce("akrout-imagenet", steps=steps, out=tmp_path) for steps in (8, None))
    short, whole = (reproduce.settings(config, "resnet18-imagenet-wm") for config in (short, whole))
    assert (short.log_every, short.mirror_steps) == (1, None) and (whole.log_every, whole.mirror_steps) == (100, None)


def test_a_figure_uses_machines_as_its_config_says(tmp_path):
    machines = {"workers": 3, "fsdp": True, "distributed": True, "coordinator": "a:1", "processes": 2, "process": 1}
    run = reproduce.settings(Reproduce("akrout-imagenet", out=tmp_path, **machines), "resnet18-imagenet-wm")
    assert {name: getattr(run, name) for name in config.MACHINES} == machines


def test_layers_come_in_a_nets_order():
    names = ["output", "Dense_1", "Conv_10", "Conv_2", "Dense_0", "Conv_0"]
    found = figures._paths([{f"matrix_angle_deg/{name}/kernel": 1.0 for name in names}], "matrix")
    assert [path.split("/")[1] for path in found] == ["Conv_0", "Conv_2", "Conv_10", "Dense_0", "Dense_1", "output"]


def test_images_through_jpeg():
    flat = np.full((3, 16, 16, 3), 128, np.uint8)
    noise = np.random.default_rng(0).integers(256, size=(3, 16, 16, 3), dtype=np.uint8)
    off = {}
    for quality in (95, 50):
        images = published.through_jpeg(np.concatenate([flat, noise]), quality)
        assert images.dtype == np.uint8 and images.shape == (6, 16, 16, 3)
        np.testing.assert_allclose(images[:3], flat, atol=1)
        off[quality] = np.abs(images[3:].astype(int) - noise).mean()
    assert 0 < off[95] < off[50] < 80


def test_a_second_jpeg_moves_pixels_as_the_first_does():
    """A second JPEG by ``through_jpeg`` moves pixels at least half as much as the first, because its blocks are
    shifted.

    On the same blocks it would hardly move them, so the effect of JPEG could not be measured.
    """
    rows, columns = np.mgrid[:32, :32]
    smooth = [127 + 100 * np.sin((rows * f + columns * g) / 5) for f, g in ((1, 0.3), (0.4, 1.2), (0.7, 0.9))]
    noise = np.random.default_rng(0).normal(scale=8, size=(4, 32, 32, 3))
    images = np.clip(np.stack(smooth, -1) + noise, 0, 255).astype(np.uint8)

    def plain(image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=75)
        return np.asarray(Image.open(file))

    def moved(a, b):
        return np.sqrt(np.mean(np.square(a.astype(float) - b)))

    once = np.stack([plain(image) for image in images])
    again = published.through_jpeg(once, 75)
    assert moved(np.stack([plain(image) for image in once]), once) < moved(once, images) / 3
    assert moved(again, once) > moved(once, images) / 2
    # Only the blocks are shifted, not the pixels.
    assert moved(again, once) < moved(np.roll(again, 1, axis=1), once) / 2


def test_what_jpeg_does_is_said_by_quarters(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "load", lambda name, data_dir: colour(dataset))
    monkeypatch.setattr(published, "HIDDEN", {"cifar10": HIDDEN})
    arguments = ["akrout-jpeg", "--epochs", 12, "--only", "bp", "bp-jpeg50", "--out", tmp_path]
    assert run_command(monkeypatch, *arguments) == 0
    plain, again = (read(tmp_path / f"{name}.csv") for name in ("bp", "bp-jpeg50"))
    assert plain[0]["train_loss"] != again[0]["train_loss"], "other pixels"
    summary = read(tmp_path / "summary.csv")
    images = colour(dataset).test["image"]
    moved = published.through_jpeg(images, 50).astype(float) - images
    assert float(summary[1]["pixels_moved"]) == pytest.approx(np.sqrt(np.mean(moved**2)), rel=1e-4)
    assert "pixels moved" in capsys.readouterr().out and not summary[0]["pixels_moved"]
    for row, x in zip(again, range(12), strict=True):
        row["test_accuracy_percent"] = float(row["test_accuracy_percent"]) + x
    reproduce.write(tmp_path / "bp-jpeg50.csv", again)
    said = reproduce.verdict("akrout-jpeg", summary, tmp_path)
    for column, digits in (("test_accuracy_percent", 2), ("train_loss", 3)):
        off = [float(b[column]) - float(a[column]) for a, b in zip(plain, again, strict=True)]
        quarters = [
            f"{np.mean(off[i : i + 3]):+.{digits}f} ± {np.std(off[i : i + 3], ddof=1) / 3**0.5:.{digits}f}"
            for i in (0, 3, 6, 9)
        ]
        assert f"bp-jpeg50 {', '.join(quarters)}" in said
    assert reproduce.verdict("akrout-jpeg", summary[:1], tmp_path) == ""


def test_errors_over_backprops_have_standard_errors():
    lines = [{"run": f"residual-cifar10-{rule}", "test_error": x} for rule, x in (("bp", 48.0), ("fa", 54.5))]
    assert reproduce.verdict("residual", lines, None) == "Test error over BP's, in points: FA +6.50."
    seeds = [line | {"test_error_se": se} for line, se in zip(lines, (0.3, 0.4), strict=True)]
    assert "FA +6.50 ± 0.50." in reproduce.verdict("residual", seeds, None)
    assert reproduce.verdict("residual", lines[:1], None) == ""


def test_the_papers_claims_are_held_against_the_runs(tmp_path):
    def left(rule, errors, angles):
        rows = [f"{20 * i},{x},{angle}" for i, (x, angle) in enumerate(zip(errors, angles, strict=True), 1)]
        header = "epoch,test_error_percent,matrix_angle_worst_deg"
        (tmp_path / f"resnet20-cifar10-{rule}.csv").write_text("\n".join([header, *rows, ""]))
        return {"run": f"resnet20-cifar10-{rule}", "epoch": 60.0}

    def said(*lines):
        return reproduce.verdict("akrout-resnet20", lines, tmp_path)

    bp, wm = left("bp", (40, 20, 10), ("", "", "")), left("wm", (30, 20, 10.75), (5, 7, 5.5))
    kp, kpm, fa = (
        left("kp", (9, 9, 9), (3, 2, 0.5)),
        left("kpm", (9, 9, 11.25), (0.5, 0.5, 1)),
        left("fa", (60, 50, 40), (90, 80, 70)),
    )
    assert said(bp, wm, kp, fa) == (
        "Test error over BP's, in points: WM +0.75, KP -1.00 (bound 1, met); FA +30.00 (published as behind). Matrix angle of the "
        "worst layer, in degrees: WM 5.50 (bound 6, under it from epoch 60 on), KP 0.50 (bound 1, under it from epoch 60 on)."
    )
    assert said(bp, kpm) == (
        "Test error over BP's, in points: KPM +1.25 (bound 1, missed). Matrix angle of the worst layer, in degrees: KPM 1.00 "
        "(bound 1, missed)."
    )
    assert said(left("wm", (9, 9, 9), (5, 5, 5))) == (
        "Matrix angle of the worst layer, in degrees: WM 5.00 (bound 6, under it from epoch 20 on)."
    )
    assert said(bp) == said({**bp, "epoch": 4.0}) == ""
    assert said(bp, {**kpm, "epoch": 4.0}) == f"After 4 of 60 epochs, too early to judge. {said(bp, kpm)}"


def test_orders_say_how_far_the_published_lies_from_the_own_order_and_outside_the_others(tmp_path):
    line = {"run": "mnist", "epoch": 1, "accuracy_least": 87.0, "accuracy_most": 89.0, "accuracy_own": 88.25}
    lines = [line | {"accuracy_published": x} for x in (88.0, 86.0, 89.5)]
    cifar = line | {"run": "cifar10", "accuracy_published": 88.0}
    assert reproduce.verdict("akrout-orders", [*lines, cifar], tmp_path) == (
        "mnist: the published accuracies are up to 2.25 points from those in the dataset's own order, and 2 of 3 outside "
        "the other orders' (by up to 1.00). cifar10: the published accuracies are up to 0.25 points from those in the "
        "dataset's own order, and 0 of 1 outside the other orders' (by up to 0.00)."
    )


def test_data_are_put_back_into_the_order_they_were_published_in():
    """``unhashed`` restores the order. TFDS orders examples by the MD5 of the split and the example's number."""
    kept = sorted(range(300), key=lambda i: hashlib.md5(f"train{i}".encode()).digest())
    found = published.unhashed({"label": np.array(kept), "image": np.array(kept)[:, None]}, "train")
    assert found["label"].tolist() == found["image"][:, 0].tolist() == list(range(300)) != kept


@pytest.mark.parametrize(
    "ids",
    [lambda split, i: f"{split}_{i:05d}", lambda split, i: f"{split}_cat_{i:04d}", None],
    ids=["its own", "a copy's", "none"],
)
def test_cifar10_is_put_back_where_its_ids_are_tfds_own(ids, tmp_path):
    """CIFAR-10 gets its published order only if its ids are TFDS's own.

    Each image's shade encodes its number, and TFDS itself writes the dataset.
    """
    shades = {split: [i % 256 for i in range(n)] for split, n in (("train", 300), ("test", 40))}

    def encoded(shade):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (shade,) * 3).save(file, "PNG")
        return file.getvalue()

    images = {split: [encoded(shade) for shade in whole] for split, whole in shades.items()}
    make(tmp_path, tfds.features.Image(shape=(32, 32, 3)), images, name="Cifar10", version="3.0.2", ids=ids)
    found = published.load("cifar10", tmp_path)
    for split, examples in (("train", found.train), ("test", found.test)):
        there, labels = examples["image"][:, 0, 0, 0].tolist(), [i % 10 for i in range(len(shades[split]))]
        assert sorted(there) == sorted(shades[split])
        own = ids is not None and ids("train", 0) == "train_00000"
        assert (there == shades[split]) == (examples["label"].tolist() == labels) == own


def test_a_refused_command_leaves_no_directory(tmp_path, monkeypatch, capsys):
    arguments = "akrout-mnist", "--data-dir", tmp_path / "nowhere", "--out"
    assert run_command(monkeypatch, *arguments, tmp_path / "new") == 2
    assert "has no dataset 'mnist'" in capsys.readouterr().err and not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    assert run_command(monkeypatch, *arguments, tmp_path / "there") == 2 and (tmp_path / "there").exists()
    (tmp_path / "there" / "notes.txt").touch()
    assert run_command(monkeypatch, *arguments, tmp_path / "there") == 2 and (tmp_path / "there" / "notes.txt").exists()


def test_a_second_run_in_a_directory_is_refused(tmp_path, monkeypatch, capsys):
    with outputs.claim(tmp_path):
        assert run_command(monkeypatch, "akrout-mnist", "--out", tmp_path) != 0
    assert "another run is at work" in capsys.readouterr().err


@pytest.mark.slow
def test_a_refused_command_leaves_what_says_how_the_figure_was_made(dataset, tmp_path, monkeypatch, capsys):
    """A refused command changes no file, and does not shorten an existing curve."""
    monkeypatch.setattr(published, "load", lambda name, directory: dataset)
    monkeypatch.setattr(published, "HIDDEN", {"mnist": 16, "cifar10": 16})
    curve = ["akrout-mnist", "--only", "bp", "--out", tmp_path / "curve"]
    assert run_command(monkeypatch, *curve, "--epochs", 3) == 0
    runs = [*small_battery(monkeypatch), "--only", "mlp-digits-bp", "--out", tmp_path / "battery"]
    assert run_command(monkeypatch, *runs) == 0
    # Backprop has no angles, so a figure of it alone has no layers.png.
    assert [path.parent.name for path in sorted(tmp_path.glob("*/*.png"))] == ["battery", "curve"]
    files = {path: path.read_bytes() for path in tmp_path.glob("*/*.*") if path.is_file()}
    for more, said in (
        ([*curve, "--epochs", 3, "--seed", 3], "--seed was 0 and is 3"),
        ([*curve, "--epochs", 2], "--epochs was 3 and is 2"),
        ([*runs, "--batch-size", 7], "--batch-size was "),
    ):
        capsys.readouterr()
        assert run_command(monkeypatch, *more) == 2
        assert f"was started with other settings: {said}" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in files} == files
    assert run_command(monkeypatch, *curve, "--epochs", 4) == 0


@pytest.mark.slow
def test_a_battery_is_its_runs_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    battery = reproduce.Battery(
        ("mlp-digits-bp", "mlp-digits-wm"), {"hidden": (16, 16), "log_every": 5, "tensorboard": False}
    )
    monkeypatch.setitem(reproduce.BATTERIES, "biotorch-lenet", battery._replace(published={"bp": 0.91}))
    arguments = ["biotorch-lenet", "--epochs", 1, "--out", tmp_path]
    assert run_command(monkeypatch, *arguments) == 0
    bp, wm = read(tmp_path / "summary.csv")
    last = read(tmp_path / "mlp-digits-wm" / "test.csv")[-1]
    assert wm["test_error"] == f"{float(last['test_error_percent']):.6g}" and float(bp["test_error_published"]) == 0.91
    assert float(wm["matrix_worst"]) >= float(wm["matrix_mean"]) > 0 and bp["matrix_mean"] == ""
    assert imread(io.BytesIO((tmp_path / "layers.png").read_bytes())).size
    before = (tmp_path / "summary.csv").read_text().replace(wm["seconds"], "").replace(bp["seconds"], "")
    capsys.readouterr()
    assert run_command(monkeypatch, *arguments) == 0
    assert "Resumed" in capsys.readouterr().out
    again = read(tmp_path / "summary.csv")
    assert (tmp_path / "summary.csv").read_text().replace(again[1]["seconds"], "").replace(
        again[0]["seconds"], ""
    ) == before


@pytest.mark.slow
def test_memory_is_the_state_and_what_a_step_needs_besides(tmp_path):
    config = dataclasses.replace(recipes.RECIPES["mlp-digits-kp"], hidden=(16, 16), out=tmp_path)
    run = train.build(config)
    state, batch = run.init(), next(run.feed.batches(0))
    bytes_of = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    found = reproduce.memory(config, config.batch_size)
    # Each array is rounded up, and the key and the counters take a few bytes.
    assert (
        0
        <= found["state"] - bytes_of((state.params, state.feedback, state.opt_state, state.feedback_opt_state))
        < 20_000
    )
    assert bytes_of(batch) < found["state"] and found["step"] > 0
    # For a batch larger than the one that ran, each device holds its part of the batch and all weights.
    larger = reproduce.memory(config, 8 * config.batch_size)
    assert larger["state"] - found["state"] == 7 * bytes_of(batch) / jax.device_count()
    assert found["step"] < larger["step"] < 8 * found["step"]


def test_a_shortened_run_shortens_its_schedule():
    config = Reproduce("akrout-imagenet", epochs=9.0, out=reproduce.Path("x"), steps=3, batch_size=8, image_size=32)
    run = reproduce.settings(config, "resnet50-imagenet-kp")
    full = recipes.RECIPES["resnet50-imagenet-kp"]
    assert (
        run.drop_epochs == pytest.approx([e / 10 for e in full.drop_epochs])
        and run.warmup_epochs == full.warmup_epochs / 10
    )
    assert (run.steps, run.batch_size, run.image_size, run.model, run.rule) == (3, 8, 32, "resnet50", "kp")
    assert dataclasses.replace(run, **{f.name: getattr(full, f.name) for f in dataclasses.fields(full)}) == full


def test_every_battery_names_recipes_and_every_run_is_checked():
    for figure, battery in reproduce.BATTERIES.items():
        for name in battery.runs:
            reproduce.settings(Reproduce(figure, out=reproduce.Path("x")), name).check()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["akrout-mnist", "--only", "nothing"], "--only: akrout-mnist has no 'nothing'; choose from bp, fa, wm, kp"),
        (["akrout-mnist", "--steps", "3"], "--steps is not for akrout-mnist"),
        (["akrout-mnist", "--workers", "3"], "--workers is not for akrout-mnist"),
        (["akrout-imagenet", "--process", "1"], "--process need --distributed"),
        (["akrout-imagenet", "--distributed", "--coordinator", "x"], "--coordinator must be HOST:PORT"),
        (["akrout-imagenet", "--workers", "-1"], "--workers must be at least 0; got -1"),
        (["akrout-tiny", "--reference", "x"], "--reference is only for the NumPy code's curves"),
        (["akrout-mnist", "--epochs", "1.5"], "--epochs must be a whole number for akrout-mnist; got 1.5"),
        (["akrout-mnist", "--epochs", "0"], "--epochs must be positive"),
        (["biotorch-lenet", "--epochs", "1e300"], "--epochs must be positive, and at most 1e6"),
        (["akrout-mnist", "--only", "kp", "kp"], "--only must name no run twice; got kp kp"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, said, monkeypatch, capsys, tmp_path):
    assert run_command(monkeypatch, *arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "bp.csv has no epoch 0; leave --reference out, or train fewer --epochs"),
        ("epoch,train_loss\n0,1\n", "bp.csv is damaged (it has no column test_accuracy_percent)"),
        ("{header}\n0,1.5,50,,,\n", "bp.csv has no epoch 1"),
        ("{header}\n,1.5,50,,,\ninf,1.5,50,,,\n", "bp.csv has no epoch 0"),
        ("{header}\n0,1.5,half,,,\n", "bp.csv is damaged (line 2: could not convert string to float: 'half')"),
    ],
    ids=["empty", "columns", "epochs", "no numbers for epochs", "text"],
)
def test_a_broken_reference_is_named_before_anything_is_trained(text, said, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "load", lambda name, data_dir: dataset)
    monkeypatch.setattr(published, "run", lambda *_: pytest.fail("trained"))
    header = "epoch,train_loss,test_accuracy_percent,delta_angle_hidden_deg,matrix_angle_W1_deg,matrix_angle_W2_deg"
    (tmp_path / "akrout2019_mnist_bp.csv").write_text(text.format(header=header))
    arguments = ["--epochs", 2, "--only", "bp", "--reference", tmp_path, "--out", tmp_path / "out"]
    assert run_command(monkeypatch, "akrout-mnist", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("wmkp: --reference: ") and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"figure": "akrout-cifar10"}', "has akrout-cifar10 in it; use another --out"),
        ("{", "run.json is damaged (JSONDecodeError"),
        ("[]", "run.json is damaged (TypeError"),
    ],
)
def test_another_figures_directory_is_left_as_it_is(content, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "run.json").write_text(content)
    assert run_command(monkeypatch, "akrout-mnist", "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (tmp_path / "run.json").read_text() == content


def test_a_curve_that_is_stopped_is_saved_and_goes_on_to_the_bit(dataset, tmp_path):
    variant, asked, lines = published.PUBLISHED["kp"], [], []
    whole = published.run(variant, dataset, HIDDEN, 24, 3)
    stopped = lambda: asked.append(None) or len(asked) == 22
    rows = published.run(variant, dataset, HIDDEN, 24, 3, directory=tmp_path, stopped=stopped)
    assert rows == whole[:20]
    assert [path.name for path in tmp_path.iterdir()] == [str(3 * 22)]
    assert published.run(variant, dataset, HIDDEN, 24, 3, lambda rows: lines.append(len(rows)), tmp_path) == whole
    assert lines == [21]  # nothing was trained twice
    assert published.run(variant, dataset, HIDDEN, 5, 3, directory=tmp_path) == whole[:5]
    with pytest.raises(InputError, match=r"started with other settings: seed was 3 and is 4; use another --out"):
        published.run(variant, dataset, HIDDEN, 12, 4, directory=tmp_path)


def test_a_curve_that_cannot_go_on_ends_the_other(dataset, tmp_path, monkeypatch, capsys):
    ended = []

    def run(variant, *more):
        if variant.rule == "bp":
            raise InputError("enough")
        deadline = time.monotonic() + 30
        while not more[-1]() and time.monotonic() < deadline:
            time.sleep(0.01)
        ended.append(more[-1]())
        return [published.Epoch(0, *[1.0] * 6)]

    monkeypatch.setattr(published, "load", lambda name, data_dir: dataset)
    monkeypatch.setattr(published, "run", run)
    monkeypatch.setattr(reproduce.os, "cpu_count", lambda: 2)
    assert run_command(monkeypatch, "akrout-mnist", "--only", "fa", "bp", "--out", tmp_path) == 2
    assert capsys.readouterr().err == "wmkp: enough\n" and ended == [True]


def small_battery(monkeypatch):
    battery = reproduce.Battery(("mlp-digits-bp", "mlp-digits-wm"), {"hidden": (16, 16), "tensorboard": False})
    monkeypatch.setitem(reproduce.BATTERIES, "biotorch-lenet", battery)
    return ["biotorch-lenet", "--steps", 2]


def test_a_battery_that_is_stopped_begins_no_other_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "_stop_signals", lambda: contextlib.nullcontext(lambda step: step == 1))
    monkeypatch.setattr("os._exit", sys.exit)
    assert run_command(monkeypatch, *small_battery(monkeypatch), "--out", tmp_path) == 130
    out, error = capsys.readouterr()
    assert "Stopped at step 1 of 2 and saved" in out and error.endswith("wmkp: interrupted\n")
    assert not (tmp_path / "mlp-digits-wm").exists()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("test.csv", "", "test.csv is empty; move"),
        ("train.csv", "", "train.csv is empty; move"),
        ("test.csv", "step\n1\n", "test.csv is damaged (it has no column epoch)"),
        ("train.csv", "step\n1\n", "train.csv is damaged (it has no column examples_per_second)"),
    ],
)
def test_a_finished_runs_damaged_file_is_named(name, text, said, tmp_path, monkeypatch, capsys):
    def finish(config):
        config.out.mkdir()
        angles = {f"{kind}_angle_{which}_deg": 1.0 for kind in ("matrix", "delta") for which in ("mean", "worst")}
        row = {"step": 1, "epoch": 1, "test_error_percent": 9, "examples_per_second": 5, **angles}
        for file in ("test.csv", "train.csv"):
            (config.out / file).write_text(f"{','.join(row)}\n{','.join(map(str, row.values()))}\n")
        (config.out / name).write_text(text)
        return True

    monkeypatch.setattr(train, "train", finish)
    assert run_command(monkeypatch, *small_battery(monkeypatch), "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_missing_reference_is_named(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(published, "load", lambda name, data_dir: dataset)
    assert run_command(monkeypatch, "akrout-mnist", "--reference", tmp_path, "--out", tmp_path / "out") == 2
    assert "akrout2019_mnist_bp.csv does not exist" in capsys.readouterr().err


def test_results_name_the_commit_that_made_them():
    head = subprocess.run("git rev-parse --short HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True)
    assert (provenance()["commit"] or "").removesuffix("-dirty") == head.stdout.decode().strip()
