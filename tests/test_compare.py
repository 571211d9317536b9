"""The command ``wmkp compare``: its output, its reproducibility, and its errors for bad input."""

import csv
import io
import math
import sys

import chex
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from matplotlib.image import imread
from PIL import Image
from rich.console import Console

from wmkp.experiments.commands import cli, compare
from wmkp.experiments.config import RULES, Compare, InputError
from wmkp.experiments.data import datasets as data

pytestmark = pytest.mark.usefixtures("quick_compile")

# One step per epoch, on 600 of the 1,198 training digits.
TINY = "--model mlp --hidden 9 8 --epochs 2 --batch-size 600 --mirror-steps 3 --mirror-angle 10 --seeds 2".split()


def wmkp(monkeypatch, *arguments):
    """Runs the command and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["wmkp", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def rows_of(directory):
    return list(csv.DictReader((directory / "comparison.csv").open()))


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A TFDS data directory with a small dataset, made without TensorFlow."""

    class WmkpDots(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"image": tfds.features.Image(shape=(6, 5, 1)), "label": tfds.features.ClassLabel(num_classes=3)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(40), "test": self._generate_examples(20)}

        def _generate_examples(self, count):
            for i in range(count):
                png = io.BytesIO()
                Image.fromarray(np.full((6, 5), 10 * (i % 3), np.uint8)).save(png, "PNG")
                png.seek(0)
                yield i, {"image": png, "label": i % 3}

    path = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    WmkpDots(data_dir=path, file_format="array_record").download_and_prepare()
    return path


def test_a_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "220")
    shown = ["bp", "fa", "kp", "kpm", "dfa", "wm"]
    assert wmkp(monkeypatch, "compare", "--rules", *shown, "--out", tmp_path / "deep" / "out", *TINY) == 0
    out, err = capsys.readouterr()
    assert "too short for Kolen-Pollack" in err
    written = tmp_path / "deep" / "out"
    assert sorted(path.name for path in written.iterdir()) == ["comparison.csv", "comparison.md", "comparison.png"]
    table = (written / "comparison.md").read_text()
    assert all(heading in out for heading in ("transports", "second mode", "extra memory"))
    for rule in shown:
        assert f"{rule.upper()}  {RULES[rule]}" in out
        assert f"| {rule.upper()}  {RULES[rule]} |" in table
    height, width, _ = imread(written / "comparison.png").shape
    assert width > 2 * height > 500

    rows = rows_of(written)
    names = compare.Row._fields[:-1]
    assert tuple(rows[0])[: len(names)] == names
    keys = [(row["rule"], int(row["seed"]), int(row["epoch"])) for row in rows]
    assert keys == [(rule, seed, epoch) for rule in shown for seed in range(2) for epoch in range(3)]
    for row in rows:
        assert 0 <= float(row["test_error_percent"]) <= 100
        assert (row["train_loss"] == "") == (row["epoch"] == "0")
        matrix, worst_matrix, delta, worst_delta, least, most, rounding = (row[name] for name in names[5:12])
        assert (row["mirror_lag_mean_deg"] != "") == (row["rule"] == "wm" and row["epoch"] != "0")
        alone = row["rule"] == "bp"
        assert (matrix == "") == (worst_matrix == "") == (alone or row["rule"] == "dfa")
        assert (delta == "") == (worst_delta == "") == (least == "") == (rounding == "") == alone
        assert (row["delta_norm_ratio/hidden_0/kernel"] == "") == (row["delta_reference/output/kernel"] == "") == alone
        assert least == "" or (0 < float(least) <= float(most) and float(rounding) == 0)
        assert matrix == "" or 0 <= float(matrix) <= float(worst_matrix) < 120
        assert delta == "" or 0 <= float(delta) <= float(worst_delta) < 120
    firsts = {(row["seed"], row["test_error_percent"]) for row in rows if row["epoch"] == "0"}
    assert len(firsts) == 2 == len({error for _, error in firsts}), "the same weights for all rules, seed by seed"
    assert wmkp(monkeypatch, "compare", "--rules", "wm", "--out", tmp_path / "again", *TINY) == 0
    filled = lambda rows: [{name: x for name, x in row.items() if x} for row in rows if row["rule"] == "wm"]
    assert filled(rows_of(tmp_path / "again")) == filled(rows), "the same numbers again, whatever trains beside"
    rows = [row for row in rows if row["seed"] == "1"]
    start, losses = ({row["rule"]: row for row in rows if row["epoch"] == str(epoch)} for epoch in (0, 2))
    losses = {rule: float(row["train_loss"]) for rule, row in losses.items()}
    assert losses["kp"] == losses["fa"], "these start from the same B"
    assert abs(losses["kpm"] - losses["bp"]) < 1e-5 < abs(losses["kp"] - losses["bp"])
    assert float(start["kpm"]["matrix_angle_worst_deg"]) < 0.01
    assert float(start["wm"]["matrix_angle_mean_deg"]) < 35 < 60 < float(start["fa"]["matrix_angle_mean_deg"])


def test_every_rule_has_a_name_and_all_means_all_of_them(monkeypatch, tmp_path):
    config = Compare()
    assert (
        len({compare.make_rule(name, config).name for name in RULES}) == len(RULES) - 1
    )  # kpm is kp with another start, frozen is bp
    asked = []

    def stop(config, *_):
        asked.extend(config.rules)
        raise InputError("enough")

    monkeypatch.setattr(compare, "train", stop)
    assert wmkp(monkeypatch, "compare", "--rules", "all", "--out", tmp_path) == 2
    assert asked == list(RULES)


def test_it_learns():
    config = Compare(rules=("kp", "frozen"), model="mlp", hidden=(64,), seeds=1)
    rows, _ = compare.train(config, data.digits(), epochs=10)
    assert all(row.test_error_percent > 60 for row in rows if row.epoch == 0)
    assert all(row.test_error_percent < 10 for row in rows if row.epoch == 10 and row.rule == "kp")
    assert all(5 < row.test_error_percent < 30 for row in rows if row.epoch == 10 and row.rule == "frozen")


def test_frozen_leaves_the_hidden_layers_as_they_were_drawn():
    dataset = data.digits()
    trial = compare.start("frozen", Compare(model="mlp", hidden=(8, 7)), 1, dataset)
    first = trial.init(jax.random.key(0))
    kept = jax.device_get(first.params)
    state, _, _ = trial.run_epoch(first, dataset.train, np.arange(64).reshape(2, 32))
    for layer, before in kept.items():
        for name, w in before.items():
            same = np.array_equal(w, state.params[layer][name])
            assert same == (layer != "output"), (layer, name)


def test_the_distance_from_backprop_is_in_standard_errors():
    errors = {"bp": (2.0, 4.0), "fa": (10.0, 10.0)}  # the standard errors are 1 and 0
    rows = [
        compare.Row(rule, seed, epoch, 0.0, errors[rule][seed])
        for rule in errors
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert compare.above_backprop(rows, "fa") == pytest.approx(7)


def test_digits():
    dataset = data.digits()
    assert dataset.train["image"].shape == (1198, 8, 8, 1) and dataset.test["image"].shape == (599, 8, 8, 1)
    assert np.bincount(dataset.test["label"]).min() >= 55
    chex.assert_trees_all_equal(dataset, data.digits())


def test_tfds_without_tensorflow(monkeypatch, tmp_path, tfds_dir):
    dataset = data.load("wmkp_dots", tfds_dir)
    assert dataset.train["image"].shape == (40, 6, 5, 1) and dataset.train["image"].dtype == np.uint8
    assert dataset.test["image"].shape == (20, 6, 5, 1) and dataset.num_classes == 3
    np.testing.assert_array_equal(dataset.train["image"][:, 0, 0, 0], 10 * dataset.train["label"])
    assert "tensorflow" not in sys.modules

    arguments = "--rules bp --model mlp --hidden 4 --epochs 3 --seeds 1 --batch-size 10 --dataset wmkp_dots".split()
    assert wmkp(monkeypatch, "compare", *arguments, "--data-dir", tfds_dir, "--out", tmp_path) == 0
    assert len(rows_of(tmp_path)) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rules", "bp", "nosuch"], "unknown rule 'nosuch'; choose from bp, fa, ss, kp, kpm,"),
        (["--seeds", "0"], "--seeds must be at least 1; got 0"),
        (["--rules"], "at least one rule"),
        (["--rules", "bp", "bp"], "none twice"),
        (["--dataset", "nosuch"], "unknown dataset 'nosuch'"),
        (["--dataset", "../up"], "cannot read dataset '../up'"),
        (["--epochs", "0"], "--epochs must be at least 1, and at most 1e6; got 0"),
        (["--epochs", "1000000000000"], "--epochs must be at least 1, and at most 1e6; got 1000000000000"),
        (["--batch-size", "0"], "--batch-size must be at least 1; got 0"),
        (["--batch-size", "1199"], "at most the 1198 training examples"),
        (["--hidden", "8", "-1"], "--hidden must be at least 1; got -1"),
        (["--hidden"], "1 to 256 layers"),
        (["--learning-rate", "nan"], "--learning-rate must be positive and finite; got nan"),
        (["--learning-rate", "-1"], "--learning-rate must be positive"),
        (["--weight-decay", "-0.1"], "--weight-decay must be at least 0"),
        (["--momentum", "1"], "--momentum must be at least 0 and below 1"),
        (["--mirror-every", "0"], "--mirror-every must be at least 1"),
        (["--mirror-every", str(2**31)], "--mirror-every must be below 2^31"),
        (["--mirror-steps", "-1"], "--mirror-steps must be at least 0"),
        (["--mirror-angle", "nan"], "--mirror-angle must be between 0 and 90"),
        (["--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_bad_input(monkeypatch, tmp_path, capsys, arguments, message):
    assert wmkp(monkeypatch, "compare", "--out", tmp_path / "out", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("wmkp: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--learning-rate", "1e300"],
            "--rules wm cannot train this network: optimizer makes infinite or NaN updates",
        ),
    ],
)
def test_what_the_library_refuses(monkeypatch, tmp_path, capsys, arguments, message):
    assert wmkp(monkeypatch, "compare", "--out", tmp_path, "--rules", "wm", *arguments) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("wmkp: ")]
    assert message in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        jax.errors.JaxRuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 9 bytes."),
    ],
)
def test_what_does_not_fit_in_memory(monkeypatch, capsys, error):
    def fail(config):
        raise error

    monkeypatch.setattr(compare, "compare", fail)
    assert wmkp(monkeypatch, "compare") == 2
    said = capsys.readouterr().err
    assert f"this does not fit in memory ({error})" in said and "--batch-size" in said and said.count("\n") == 1


def test_other_errors_of_jax_are_not_hidden(monkeypatch):
    def fail(config):
        raise jax.errors.JaxRuntimeError("INTERNAL: a device is gone")

    monkeypatch.setattr(compare, "compare", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a device is gone"):
        wmkp(monkeypatch, "compare")


def test_missing_dataset_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    arguments = ["compare", "--dataset", "mnist", "--data-dir", tmp_path / "data", "--out", tmp_path / "out"]
    assert wmkp(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert (
        err.count("\n") == 1
        and "has no dataset 'mnist'" in err
        and f"wmkp data mnist --data-dir {tmp_path / 'data'}" in err
    )
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "data"], "nothing was downloaded or written"


@pytest.mark.parametrize("below", ["", "deeper"])
def test_unwritable_out(monkeypatch, tmp_path, capsys, below):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(compare, "train", lambda *_: pytest.fail("this must be known before training"))
    assert wmkp(monkeypatch, "compare", "--out", tmp_path / "file" / below) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"cannot write to {tmp_path}" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_failure_leaves_no_half_written_file(monkeypatch, tmp_path):
    (tmp_path / "comparison.png").mkdir()  # the file cannot be put in place
    with pytest.raises(InputError, match="cannot write"):
        compare.outputs.write_atomically({tmp_path / "comparison.png": b"png"})
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.png"]


def test_table_fits_80_columns():
    both = ["90.0 / 90.0"] * 2
    line = compare.Line(
        "FRSF  sign symmetry, fixed magnitudes", "signs", "once", "10.00 ± 10.00", "+1.0", *both, "1 / 1", "1.00"
    )
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(compare.to_table([line], "title", compare.NARROW))
    text = narrow.file.getvalue()
    assert "…" not in text and "10.00 ± 10.00" in text and text.count("90.0 / 90.0") == 2


def test_diverged_run_is_shown_as_such():
    rows = [compare.Row("fa", 0, epoch, math.nan, 90.0) for epoch in range(3)]
    assert compare.to_csv(rows).decode().splitlines()[-1] == "fa,0,2,,90,,,,,,,,"
    assert compare.figures.comparison(rows, "nothing but NaN")[1:4] == b"PNG"


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"]])
def test_help(monkeypatch, capsys, arguments):
    assert wmkp(monkeypatch, *arguments) == 0
    assert "compare" in capsys.readouterr().out
