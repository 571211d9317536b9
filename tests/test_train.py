"""wmkp train resumes bit-for-bit after any end, loses nothing, and names bad numbers and bad input.

Also tests of wmkp eval, its export, and wmkp plot.
"""

import csv
import dataclasses
import functools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import Mesh

from wmkp.experiments import devices
from wmkp.experiments.commands import cli, evaluate, recipes, train
from wmkp.experiments.config import InputError, Train
from wmkp.experiments.data import feeds
from wmkp.experiments.data.datasets import Dataset
from wmkp.experiments.devices import make_mesh
from wmkp.experiments.models import tasks
from wmkp.experiments.models.mlp import MLP
from wmkp.experiments.runs import build, checkpoints, logs, outputs, settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),  # from TensorBoard's writer and Orbax
    pytest.mark.usefixtures("quick_compile"),
]

# The smallest network with every option of a step: 37 steps an epoch.
SMALL = Train(
    hidden=(16, 16),
    batch_size=32,
    epochs=3,
    rule="wm",
    mirror_steps=20,
    mirror_every=3,
    mirror_angle=20.0,
    accumulate=2,
    augment=True,
    label_smoothing=0.1,
    clip_norm=1.0,
    log_every=10,
    save_every=15 / 37,
    tensorboard=False,
    seed=1,
)


def run(out, **changes):
    config = dataclasses.replace(SMALL, out=Path(out), **changes)
    train.train(config)
    return config


@functools.cache
def like(rule, optimizer):
    """Return the shapes of a run's state, which depend on no other option that the tests change."""
    config = dataclasses.replace(SMALL, rule=rule, optimizer=optimizer)
    return build.like(config, build.build(config))


def end_state(config):
    """Return the last checkpoint's arrays by path."""
    return restore_from(config.out, like(config.rule, config.optimizer))[0]


def restore_from(out, like):
    manager = checkpoints.open_manager(out / "checkpoints", 2, read_only=True)
    state, progress = checkpoints.restore(manager, like)
    manager.close()
    return by_path(state), progress


def by_path(state):
    state = state._replace(key=jax.random.key_data(state.key))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Run on one device, which compiles fastest. test_mesh.py and test_processes.py use several devices."""
    with pytest.MonkeyPatch.context() as patch:
        first = np.array(jax.devices()[:1])
        patch.setattr(devices, "make_mesh", lambda batch_size: Mesh(first, ("data",)))
        yield


@pytest.fixture(scope="module", autouse=True)
def built_once(quick_compile, one_device):
    """Build once what trains the same, so that a resumed run and an evaluation compile nothing again."""
    make = functools.cache(build.build)

    def shared(config):
        return make(dataclasses.replace(config, out=SMALL.out, resume=False, tensorboard=False))

    with pytest.MonkeyPatch.context() as patch:
        for module in (build, train, evaluate):
            patch.setattr(module, "build", shared)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, built_once):
    """Train a run from beginning to end."""
    return run(tmp_path_factory.mktemp("whole") / "run", tensorboard=True)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_what_a_run_leaves(finished):
    rows = logs.read(finished.out / "test.csv")
    assert [row["step"] for row in rows] == [37, 74, 111]
    assert rows[-1]["test_error_percent"] < 60 and rows[-1]["test_error_percent"] < rows[0]["test_error_percent"]
    angles = ("hidden_1/kernel", "output/kernel")
    assert all(0 < rows[-1][f"matrix_angle_deg/{path}"] < 40 for path in angles), "about 90 where B does not learn"
    assert rows[-1]["matrix_angle_worst_deg"] == max(rows[-1][f"matrix_angle_deg/{path}"] for path in angles)
    assert rows[-1]["delta_angle_deg/output/kernel"] == 0
    deltas = [rows[-1][f"delta_angle_deg/hidden_{i}/kernel"] for i in (0, 1)]
    assert rows[-1]["delta_angle_mean_deg"] == pytest.approx(np.mean(deltas))
    steps = logs.read(finished.out / "train.csv")
    assert [row["step"] for row in steps] == [*range(10, 111, 10), 111]
    assert steps[-1]["train_loss"] < steps[0]["train_loss"] and steps[-1]["skipped"] == 0
    assert settings.read(finished.out) == finished
    kept = sorted(int(path.name) for path in (finished.out / "checkpoints").iterdir())
    assert kept == [105, 111], "two are kept, the newest"
    (events,) = (finished.out / "tensorboard").iterdir()
    for name in (
        b"loss/train",
        b"loss/test",
        b"matrix_angle/output/kernel",
        b"delta_angle/mean",
        b"norm_ratio/output/kernel",
    ):
        assert name in events.read_bytes()


@pytest.mark.slow
def test_killed_at_any_point_and_resumed_it_ends_with_the_same_bits(
    finished, tmp_path, child_environment, monkeypatch, capsys
):
    """A run ended by SIGKILL, then by SIGTERM, and resumed each time, equals an uninterrupted run bit-for-bit.

    The first part runs in its own process.
    """
    config = dataclasses.replace(SMALL, out=tmp_path / "run", resume=True)
    code = f"from wmkp.experiments.commands import train\nfrom pathlib import *\nfrom wmkp.experiments.config import Train\ntrain.train({config!r})"
    path = config.out / "train.csv"
    command = [sys.executable, "-c", code.replace("PosixPath", "Path")]
    with subprocess.Popen(command, env=child_environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and (not path.exists() or len(path.read_text().splitlines()) < 4):
            time.sleep(0.002)
        process.kill()
    assert 10 <= logs.read(path)[-1]["step"] < 111, "it had ended before it was killed"
    log = train._log

    def log_and_be_stopped(session):
        signal.raise_signal(signal.SIGTERM)
        return log(session)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_log", log_and_be_stopped)
        assert not train.train(config)
    said = capsys.readouterr().out
    assert "Resumed at step" in said and "and saved; continue with --resume" in said
    train.train(config)
    assert_same_bits(end_state(config), end_state(finished))
    same = [name for name in logs.read(path)[0] if name != "examples_per_second"]
    for mine, theirs in zip(logs.read(path), logs.read(finished.out / "train.csv"), strict=True):
        assert [mine[name] for name in same] == [theirs[name] for name in same]
    assert (config.out / "test.csv").read_text() == (finished.out / "test.csv").read_text()


def test_resuming_what_is_finished_or_never_began(finished, tmp_path, capsys):
    before = end_state(finished)
    train.train(dataclasses.replace(finished, resume=True))
    assert "Resumed at step 111 of 111" in capsys.readouterr().out
    assert_same_bits(end_state(finished), before)
    run(tmp_path / "new", rule="bp", resume=True, steps=2)
    assert "has no checkpoint: training starts from the beginning" in capsys.readouterr().out
    assert (tmp_path / "new" / "checkpoints" / "2").exists()


@pytest.mark.slow
def test_a_run_that_grows_longer_ends_with_the_bits_of_a_long_one(tmp_path):
    settings_of = {"schedule": "step", "drop_epochs": (0.1,)}
    whole = run(tmp_path / "whole", steps=8, **settings_of)
    run(tmp_path / "longer", steps=4, **settings_of)
    longer = run(tmp_path / "longer", steps=8, resume=True, **settings_of)
    assert_same_bits(end_state(longer), end_state(whole))


def test_examples_per_second_are_those_of_compiled_steps(tmp_path, monkeypatch):
    clock, whole = [0.0], build.build

    def timed(config):
        built = whole(config)

        def advance(*args):
            clock[0] += 1.0 if clock[0] else 100.0  # the first call compiles
            return built.advance(*args)

        return built._replace(advance=advance)

    monkeypatch.setattr(train, "build", timed)
    monkeypatch.setattr(train.time, "perf_counter", lambda: clock[0])
    run(tmp_path, rule="bp", steps=3, log_every=5)
    (row,) = logs.read(tmp_path / "train.csv")
    assert row["examples_per_second"] == SMALL.batch_size


def test_eval_export_and_plot(finished, tmp_path, capsys, monkeypatch):
    last = logs.read(finished.out / "test.csv")[-1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wmkp", "eval", str(finished.out), "--export", "model.msgpack"])
    cli.main()
    out = capsys.readouterr().out
    assert f"test error {last['test_error_percent']:.2f} %" in out and "output/kernel" in out
    variables = serialization.msgpack_restore((tmp_path / "model.msgpack").read_bytes())
    dataset = feeds.data.digits()
    mean, std = dataset.train["image"].mean(), dataset.train["image"].std()
    logits = MLP((16, 16), 10).apply(variables, (dataset.test["image"] - mean) / std)
    wrong = 100 * np.mean(np.argmax(logits, -1) != dataset.test["label"])
    assert wrong == pytest.approx(last["test_error_percent"], abs=0.2)
    monkeypatch.setattr(sys, "argv", ["wmkp", "plot", str(finished.out), str(finished.out), "--out", "two.png"])
    cli.main()
    assert (tmp_path / "two.png").read_bytes()[:4] == b"\x89PNG"


def test_files_that_cannot_be_written_are_named_before_the_work(finished, tmp_path, monkeypatch, capsys):
    for module, work in ((evaluate, "build"), (cli.figures, "runs")):
        monkeypatch.setattr(module, work, lambda *args: pytest.fail("it was worked before the file was tried"))
    (tmp_path / "file").touch()
    (tmp_path / "dir.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # no regular file, like the device /dev/full
    for command in (["eval", finished.out, "--export"], ["plot", finished.out, "--out"]):
        for name in ("file/model.png", "dir.png", "pipe.png", "x" * 250 + ".png"):
            bad = tmp_path / name
            monkeypatch.setattr(sys, "argv", ["wmkp", *map(str, [*command, bad])])
            with pytest.raises(SystemExit):
                cli.main()
            said = capsys.readouterr().err
            assert f"wmkp: cannot write to {bad.parent if bad.name == 'model.png' else bad}: " in said
            assert said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.png", "file", "pipe.png"]


def test_a_run_that_is_not_there_leaves_no_directory_behind(finished, tmp_path):
    for run, step in ((tmp_path / "none", None), (finished.out, 3)):
        with pytest.raises(InputError, match="is not a run|has no checkpoint of step 3"):
            evaluate.evaluate(run, step, export=tmp_path / "exports" / "model.msgpack")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_not_there_is_named_before_the_work(finished, monkeypatch):
    monkeypatch.setattr(evaluate, "build", lambda config: pytest.fail("it was built before the step was looked for"))
    with pytest.raises(InputError, match="has no checkpoint of step 3"):
        evaluate.evaluate(finished.out, 3)


def test_files_are_written_where_a_link_leads(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("link", "circle"):
        outputs.check_file(tmp_path / name)
        outputs.write_atomically({tmp_path / name: b"written"})
        assert (tmp_path / name).read_bytes() == b"written"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "file").read_bytes() == b"written"


@pytest.mark.parametrize("arguments", [["--out", ""], ["--out="], [""]])
def test_an_empty_argument_is_refused(arguments, tmp_path, monkeypatch, capsys):
    """An empty path would mean the current directory, for example if $OUT is not set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["wmkp", "train", "mlp-digits-kp", *arguments])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 2 and "wmkp: an argument is empty: train mlp-digits-kp " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- bad numbers ------------------------------------------------------------------------------------------------------


BLOWN_UP = {"rule": "fa", "learning_rate": 1e25, "clip_norm": None, "accumulate": 1}


def test_nan_stops_at_its_step_and_names_what_is_not_finite(tmp_path):
    message = r"step 3 is not finite: loss, the gradient of hidden_0/bias, .*"
    with pytest.raises(InputError, match=message + "The checkpoint of step 2 is kept"):
        run(tmp_path / "run", **BLOWN_UP, save_every=1 / 37, log_every=1, keep=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert len(logs.read(tmp_path / "run" / "train.csv")) == 2
    with pytest.raises(InputError, match=message):  # the same step is named even if the host checks rarely
        run(tmp_path / "seldom", **BLOWN_UP, save_every=9, log_every=50)


def test_nan_can_be_skipped(tmp_path, capsys):
    config = run(tmp_path / "run", **BLOWN_UP, steps=9, on_nan="skip")
    assert "7 steps were left out because" in capsys.readouterr().out
    assert logs.read(config.out / "train.csv")[-1]["skipped"] == 7


def test_a_skipped_step_changes_nothing(tmp_path):
    """After a bad batch that is skipped, W, B and the optimizer states are those before it."""
    run = build.build(dataclasses.replace(SMALL, rule="kp", on_nan="skip", accumulate=1, clip_norm=None, augment=False))
    state, tally = run.init(), feeds.put_everywhere(run.tally, run.mesh)
    good = next(run.feed.batches(0))
    bad = {**good, "image": good["image"].at[0, 0, 0, 0].set(jnp.nan)}
    state, tally = run.advance(state, tally, good)
    before = jax.device_get((state.params, state.feedback, state.opt_state, state.feedback_opt_state))
    state, tally = run.advance(state, tally, bad)
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.params, state.feedback, state.opt_state, state.feedback_opt_state),
        before,
    )
    assert int(tally.skipped) == 1 and int(state.step) == 2 and not tally.finite["loss"]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_threads_with_a_manager_each_save_in_turn(tmp_path):
    """Two saves at the same time would corrupt each other in Orbax, so saves are done in turn."""

    class State(NamedTuple):
        step: jax.Array
        w: jax.Array

    def train_alone(directory):
        manager = checkpoints.open_manager(directory, keep=1)
        for step in range(1, 9):
            checkpoints.save_in_turn(manager, State(jnp.asarray(step), jnp.full((200, 100), step)), {})
        restored, _ = checkpoints.restore(manager, State(jnp.asarray(0), jnp.zeros((200, 100), int)))
        manager.close()
        return int(restored.w[0, 0])

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(train_alone, [tmp_path / "a", tmp_path / "b"])) == [8, 8]


def _remove(path):
    subprocess.run(["rm", "-r", str(path)], check=True)


def test_a_checkpoint_of_another_model_or_rule_is_refused_by_path(finished):
    manager = checkpoints.open_manager(finished.out / "checkpoints", 2, read_only=True)

    def restore(**changes):
        config = dataclasses.replace(finished, **changes)
        checkpoints.restore(manager, build.like(config, build.build(config)))

    with pytest.raises(InputError, match=r"params/hidden_0/kernel is float32 \(64, 16\), where float32 \(64, 12\)"):
        restore(hidden=(12, 16))
    with pytest.raises(InputError, match=r"params/hidden_1/bias is in it and not expected"):
        restore(hidden=(16,))
    with pytest.raises(InputError, match=r"feedback_opt_state/.* is not in it"):
        restore(rule="kp")


@pytest.mark.slow
def test_damaged_checkpoint_is_named_and_the_older_one_still_good(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished.out, tmp_path / "run")
    config = dataclasses.replace(finished, out=tmp_path / "run", resume=True)
    newest = config.out / "checkpoints" / "111" / "state"
    for path in newest.rglob("*"):
        if path.is_file() and "/d/" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"cannot read the checkpoint .*111.*delete it, and step 105 is the latest"):
        train.train(config)
    monkeypatch.setattr(sys, "argv", ["wmkp", "eval", str(config.out), "--step", "105"])
    cli.main()
    assert "step 105: test loss" in capsys.readouterr().out
    with pytest.raises(InputError, match="has no checkpoint of step 3, only of 105, 111"):
        evaluate.evaluate(config.out, 3)
    _remove(newest.parent)
    train.train(config)
    assert_same_bits(end_state(config), end_state(finished))


class Trap:
    """An object that makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damages(content, trap, flips, seed):
    """Yield damaged versions of a file: with one bit flipped, cut in half, and replaced by a pickle."""
    rng = random.Random(seed)
    for _ in range(flips):
        turned = bytearray(content)
        turned[rng.randrange(len(turned))] ^= 1 << rng.randrange(8)
        yield bytes(turned)
    yield content[: len(content) // 2]
    yield pickle.dumps(Trap(trap))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pytest's hook sees hidden exceptions
def test_any_file_of_a_checkpoint_may_be_damaged(finished, tmp_path, capsys):
    """A damaged checkpoint raises one line that names its step and the latest other step, or restores the saved bits.

    It never runs code from a pickle.
    """
    shutil.copytree(finished.out / "checkpoints", tmp_path / "checkpoints")
    shapes = like(finished.rule, finished.optimizer)
    expected, good_progress = restore_from(tmp_path, shapes)
    refused = 0
    files = sorted(path for path in (tmp_path / "checkpoints" / "111").rglob("*") if path.is_file())
    assert len(files) > 10
    for seed, path in enumerate(files):
        content = path.read_bytes()
        for damaged in damages(content, tmp_path / "trap", 1, seed):
            path.write_bytes(damaged)
            try:
                found, progress = restore_from(tmp_path, shapes)
            except InputError as error:
                refused += 1
                assert "checkpoints/111" in str(error) and "\n" not in str(error)
                assert "delete it, and step 105 is the latest" in str(error)
            else:
                assert_same_bits(found, expected)
                assert progress == good_progress
        path.write_bytes(content)
    assert refused > len(files) / 2
    assert not (tmp_path / "trap").exists() and not capsys.readouterr().err
    assert_same_bits(restore_from(tmp_path, shapes)[0], expected)


@pytest.fixture(scope="module")
def first_state():
    """Make the state at the beginning of a run."""
    return build.build(SMALL).init()


@pytest.mark.parametrize("where", ["feedback", "key", "progress"])
def test_one_wrong_bit_is_noticed(where, first_state, tmp_path, monkeypatch):
    """The SHA-256 covers each part of a checkpoint, so it detects a wrong bit that the storage layer misses."""
    state, progress = first_state, {"step": 0, "loss": 0.1}
    if where == "progress":
        other = state, {**progress, "loss": 0.10000000000000002}
    elif where == "key":
        other = state._replace(key=jax.random.key(1)), progress
    else:
        leaves, tree = jax.tree.flatten(getattr(state, where))
        turned = np.array(leaves[-1])
        turned.reshape(-1).view(np.uint8)[0] ^= 1
        other = state._replace(**{where: tree.unflatten([*leaves[:-1], jax.device_put(turned)])}), progress
    digest = checkpoints._digest
    manager = checkpoints.open_manager(tmp_path / "checkpoints", 2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_digest", lambda *_: digest(*other))
        checkpoints.save(manager, state, progress)
        checkpoints.finish(manager)
    with pytest.raises(InputError, match="checkpoints/0 .*its SHA-256 is not that of what was saved"):
        checkpoints.restore(manager, like(SMALL.rule, SMALL.optimizer))


def test_damaged_configs_and_logs(finished, tmp_path):
    """A damaged config or log raises one line that names the file or the run's directory.

    If it raises no error, no setting that affects training has changed.
    """
    config = dataclasses.replace(finished, out=tmp_path, resume=True)

    def claim():
        with settings.claim(config):
            found = settings.read(tmp_path)
            return {k: v for k, v in vars(found).items() if k not in settings.FREE}

    def opened(name):
        logs.Log(tmp_path / name, 111).close()

    for name, load in (
        ("config.json", claim),
        ("train.csv", lambda: opened("train.csv")),
        ("test.csv", lambda: opened("test.csv")),
    ):
        content = (finished.out / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        expected, refused = load(), 0
        for damaged in damages(content, tmp_path / "trap", 100, 0):
            (tmp_path / name).write_bytes(damaged)
            try:
                assert load() == expected
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)
                assert str(tmp_path / name) in str(error) or f"{tmp_path} was started with other settings" in str(error)
        assert refused > 20
        (tmp_path / name).write_bytes(content)
    assert not (tmp_path / "trap").exists()
    with pytest.raises(InputError, match=r"train.csv is damaged \(its columns are not this run's\)"):
        logs.Log(tmp_path / "train.csv", 111).write({"step": 112, "x": 1.0})


def test_loading_a_run_unpickles_nothing(finished):
    seen, watching = [], True
    sys.addaudithook(lambda event, args: seen.append(args) if watching and event == "pickle.find_class" else None)
    end_state(settings.read(finished.out))
    logs.read(finished.out / "test.csv")
    assert not seen
    pickle.loads(pickle.dumps(Path))
    assert seen, "the hook must see it"
    watching = False


def test_what_a_killed_write_left_is_cleared_away(tmp_path):
    left = tmp_path / ".config.json.1.partial"
    left.write_text("{")
    with settings.claim(dataclasses.replace(SMALL, out=tmp_path)):
        assert not left.exists()


def test_disk_full_while_saving_keeps_the_older_checkpoint(tmp_path):
    config = dataclasses.replace(SMALL, out=tmp_path, hidden=(256, 256), rule="bp")
    built = build.build(config)
    state = built.init()
    manager = checkpoints.open_manager(tmp_path / "checkpoints", 2)
    checkpoints.save(manager, state, {"step": 0})
    checkpoints.finish(manager)
    expected = jax.device_get(state.params)
    later = state._replace(step=state.step + 1, params=jax.tree.map(lambda x: x + 1, state.params))
    # A limit on file size stands in for a full disk. The signal is ignored, so the system returns an error.
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"could not be saved in .*; the checkpoint of step 0 is kept"):
            checkpoints.save(manager, later, {"step": 1})
            checkpoints.finish(manager)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    again = checkpoints.open_manager(tmp_path / "checkpoints", 2)
    restored, progress = checkpoints.restore(again, build.like(config, built))
    assert progress == {"step": 0}
    jax.tree.map(np.testing.assert_array_equal, restored.params, expected)


# --- settings and bad input -------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(finished, tmp_path):
    with pytest.raises(InputError, match="has a run in it; continue it with --resume"):
        train.train(finished)
    with pytest.raises(
        InputError, match=r"other settings: --rule was wm and is kp; --learning-rate was 0.1 and is 0.2"
    ):
        train.train(dataclasses.replace(finished, resume=True, rule="kp", learning_rate=0.2))
    with (
        settings.claim(dataclasses.replace(SMALL, out=tmp_path)),
        pytest.raises(InputError, match="another run is at work"),
    ):
        run(tmp_path)


@pytest.mark.parametrize(
    ("name", "make"),
    [(".lock", Path.mkdir), ("tensorboard", Path.touch), ("checkpoints", Path.touch)],
    ids=["a directory", "a file", "a file for checkpoints"],
)
def test_what_is_in_the_way_is_named(name, make, tmp_path):
    make(tmp_path / name)
    with pytest.raises(InputError, match=f"cannot write to {tmp_path / name}"):
        run(tmp_path, tensorboard=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"nonsense": 1}', "unknown settings: nonsense"),
        ('{"out": "x"}', "damaged"),
        ("[" * 100_000, "is damaged"),
    ],
)
def test_damaged_config(content, message, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=message):
        settings.read(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mlp-digits-kp --rule nonsense", "unknown rule 'nonsense'"),
        ("mlp-digits-kp --batch-size 0", "--batch-size must be at least 1; got 0"),
        ("mlp-digits-kp --batch-size 8000", "--batch-size 8000 is larger than the training set"),
        ("mlp-digits-kp --learning-rate nan", "--learning-rate must be positive and finite"),
        ("mlp-digits-kp --schedule step", "--schedule step needs --drop-epochs"),
        ("mlp-digits-kp --drop-epochs 3 2", "--drop-epochs must be positive and increasing"),
        ("mlp-digits-kp --process 1", "need --distributed"),
        ("mlp-digits-kp --distributed --coordinator nonsense", "--coordinator must be HOST:PORT, PORT from 1 to"),
        ("mlp-digits-kp --distributed --coordinator localhost:0", "PORT from 1 to 65535; got 'localhost:0'"),
        ("mlp-digits-kp --distributed --coordinator localhost:99999", "PORT from 1 to 65535; got 'localhost:99999'"),
        ("mlp-digits-kp --dataset ./nowhere", "cannot read dataset './nowhere': there is no such directory"),
        ("mlp-digits-kp --model decoder", "decoder is for text"),
        ("mlp-digits-kp --model lenet", "these are 8x8; add --image-size 32"),
        ("mlp-digits-kp --model vit-ti --patch 3", "--patch must divide the image size, 8x8; got 3"),
        ("mlp-mnist-kp --data-dir nowhere", "has no dataset 'mnist'"),
        ("mlp-digits-kp --clip-norm 0", "--clip-norm must be positive"),
        ("mlp-digits-kp --mirror-rate 0", "--mirror-rate must be above 0"),
        ("mlp-digits-kp --clip-norm 1e300", "--clip-norm must be positive, from 1e-15 to 1e15"),
        ("mlp-digits-wm --mirror-angle 1e-9", "--mirror-angle must be between 0 and 90 degrees (from 1e-6 on)"),
        ("mlp-digits-wm --mirror-samples 99999999999", "--mirror-samples must be below 2^31"),
        ("mlp-digits-kp --steps 99999999999", "--steps must be below 2^31"),
        (
            "mlp-digits-wm --mirror-noise gaussian --mirror-angle 1e-5",
            "--rule wm cannot train --model mlp: target_angle=1e-05 takes",
        ),
        (
            "mlp-digits-kp --accumulate 9 --steps 8",
            "--accumulate 9 is more than the run's 8 steps, so W would never change",
        ),
        ("mlp-digits-kp --image-size 1000000", "--image-size 1000000 needs 4,792,000 GB for 1,198 images"),
        ("mlp-digits-kp --epochs 1e300", "--epochs must be positive, and at most 1e6"),
        ("mlp-digits-kp --warmup-epochs 1e300", "--warmup-epochs must be at least 0, and at most 1e6"),
        ("mlp-digits-kp --schedule step --drop-epochs nan", "--drop-epochs must be positive and increasing"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wmkp", "train", *arguments.split(), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as error:
        cli.main()
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_batch_divides_among_the_devices():
    assert make_mesh(32).size == 8
    with pytest.raises(InputError, match="--batch-size must be a multiple of the 8 devices; got 30"):
        make_mesh(30)


@pytest.mark.parametrize(
    ("test_csv", "message"),
    [("a,b\n1,2\n", "test.csv is damaged (it has no column epoch)"), (None, "test.csv is damaged")],
    ids=["other columns", "a directory"],
)
def test_plot_of_what_is_no_run(test_csv, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"rule": "kp"}')
    path = tmp_path / "test.csv"
    path.mkdir() if test_csv is None else path.write_text(test_csv)
    monkeypatch.setattr(sys, "argv", ["wmkp", "plot", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_file_where_a_directory_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write to .*Not a directory"):
        outputs.write_atomically({tmp_path / "file" / "x.png": b""})
    with pytest.raises(InputError, match=r"cannot write to \S*/none/x.png: No such file"):
        outputs.write_atomically({tmp_path / "none" / "x.png": b""})


def test_eval_of_what_is_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["wmkp", "eval", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "is not a run" in capsys.readouterr().err


# Ctrl-C while XLA compiles. XLA continues in a thread of its own.
COMPILES = """
lowered = jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda i, x: step(x), x)).lower(jax.numpy.ones((8, 8)))
threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
lowered.compile()
"""
# Ctrl-C in a callback, where Python would only print the exception.
COLLECTS = """
gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT))
gc.collect()
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [COMPILES, COLLECTS], ids=["compiles", "collects"])
def test_an_interrupt_ends_the_command_whatever_it_is_at(code):
    script = f"""
import gc, signal, sys, threading, jax
from wmkp.experiments.commands import cli
def step(x):
    for i in range(1000):
        x = jax.numpy.sin(x @ x + i)
    return x
def runs(directories, suffix):
    exec({code!r}, globals())
cli.figures.runs = runs
signal.signal(signal.SIGINT, signal.default_int_handler)  # which what was started in the background is to ignore
sys.argv = ["wmkp", "plot", "run"]
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stderr == "wmkp: interrupted\n", ended.stderr
    assert ended.returncode == 130


def test_short_kolen_pollack_runs_are_warned_of(capsys):
    steps = lambda **changes: dataclasses.replace(
        SMALL, rule="kp", steps=2, accumulate=1, schedule="constant", **changes
    )
    train._warn_of_kp(steps(), build.build(steps()))
    assert "cannot align in this run: 100 %" in capsys.readouterr().err
    train._warn_of_kp(steps(weight_decay=9.0), build.build(steps(weight_decay=9.0)))
    assert not capsys.readouterr().err


# --- the parts of a run -----------------------------------------------------------------------------------------------


def make_feed(**changes):
    config = dataclasses.replace(SMALL, batch_size=8, augment=False, **changes)
    images = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1) * np.ones((1, 8, 8, 1), np.uint8)
    part = {"image": images, "label": np.arange(50, dtype=np.int32) % 10}
    return feeds._resident(config, Dataset(part, {k: v[:11] for k, v in part.items()}, 10), make_mesh(8))


def take(batches, count):
    return [jax.device_get(next(batches)) for _ in range(count)]


def test_each_epoch_shows_each_example_at_most_once_in_an_order_of_its_own():
    feed = make_feed()
    assert feed.epoch_steps == 6
    seen = take(feed.batches(0), 12)
    epochs = [np.concatenate([b["image"][:, 0, 0, 0] for b in seen[i : i + 6]]) for i in (0, 6)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 48
    assert (epochs[0] != epochs[1]).any() and (np.sort(epochs[0]) != epochs[0]).any()
    other = take(make_feed(seed=2).batches(0), 1)[0]["image"][:, 0, 0, 0]
    assert (other != epochs[0][:8]).any()
    for batch in seen:
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] % 10, batch["label"])
    later = take(feed.batches(5), 3)
    jax.tree.map(np.testing.assert_array_equal, later, seen[5:8])


def test_test_batches_show_each_example_once():
    batches = [jax.device_get(b) for b in make_feed().tests()]
    assert [b["label"].shape for b in batches] == [(8,), (8,)]
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]), [*range(10), 0, *[-1] * 5])


def test_crop_and_flip_by_definition():
    images = np.arange(1, 16 * 16 + 1).reshape(1, 16, 16, 1).astype(np.uint8)
    images = np.repeat(images, 400, 0)
    found = np.asarray(feeds.crop_and_flip(jax.random.key(0), images))
    padded = np.pad(images[0], ((2, 2), (2, 2), (0, 0)))
    crops = {}
    for top in range(5):
        for left in range(5):
            crop = padded[top : top + 16, left : left + 16]
            crops[crop.tobytes()] = (top, left, False)
            crops[crop[:, ::-1].tobytes()] = (top, left, True)
    kinds = [crops[image.tobytes()] for image in found]
    assert {kind[:2] for kind in kinds} == {(t, l) for t in range(5) for l in range(5)}
    assert 150 < sum(kind[2] for kind in kinds) < 250


def test_resizing_keeps_bytes_and_means():
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), np.uint8)
    resized = feeds._resized(images, 32)
    assert resized.shape == (5, 32, 32, 1) and resized.dtype == np.uint8
    assert abs(resized.mean() - images.mean()) < 2


def test_schedules_by_definition():
    make = lambda **changes: tasks.make_schedule(dataclasses.replace(SMALL, learning_rate=0.4, **changes), 10, 100)
    at = lambda schedule, *steps: [float(schedule(s)) for s in steps]
    assert at(make(schedule="constant"), 0, 99) == pytest.approx([0.4, 0.4])
    assert at(make(schedule="cosine"), 0, 50, 100) == pytest.approx([0.4, 0.2, 0])
    assert at(make(schedule="cosine", final_rate=0.1), 100) == pytest.approx([0.04])
    stepped = make(schedule="step", drop_epochs=(3, 6), warmup_epochs=1)
    assert at(stepped, 0, 5, 10, 29, 31, 59, 61) == pytest.approx([0, 0.2, 0.4, 0.4, 0.04, 0.04, 0.004])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_forgetting_is_what_the_optimizer_does(optimizer):
    """``forgotten`` predicts the share of W - B^T that remains after a run with equal decay of W and B."""
    config = dataclasses.replace(
        SMALL,
        optimizer=optimizer,
        learning_rate=0.02,
        momentum=0.5,
        weight_decay=0.05,
        accumulate=1,
        schedule="constant",
    )
    schedule = tasks.make_schedule(config, 10, 400)
    tx = tasks.make_optimizer(config, schedule)
    w = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)}
    b = {"kernel": jnp.zeros((3, 2)), "bias": None}
    state_w, state_b = tx.init(w), tx.init(b)
    gradient = {"kernel": jax.random.normal(jax.random.key(0), (3, 2)), "bias": jnp.zeros(3)}

    @jax.jit
    def step(w, b, state_w, state_b):
        u, state_w = tx.update(gradient, state_w, w)
        v, state_b = tx.update({**gradient, "bias": None}, state_b, b)
        return optax.apply_updates(w, u), optax.apply_updates(b, v), state_w, state_b

    for _ in range(400):
        w, b, state_w, state_b = step(w, b, state_w, state_b)
    left = np.asarray(w["kernel"] - b["kernel"])
    assert left == pytest.approx(tasks.forgotten(config, schedule, 400), rel=0.05)
    np.testing.assert_array_equal(w["bias"], 1)  # biases do not decay
    assert (
        tasks.make_optimizer(dataclasses.replace(config, decay_all=True), schedule).update(
            jax.tree.map(jnp.zeros_like, w), tx.init(w), w
        )[0]["bias"][0]
        < 0
    )


def test_loss_by_definition():
    config = dataclasses.replace(SMALL, label_smoothing=0.2)
    task = tasks.make_task(config, (8, 8, 1), 10, np.float32(3), np.float32(2))
    batch = {"image": np.random.default_rng(0).uniform(0, 16, (4, 8, 8, 1)), "label": np.array([3, 1, 4, -1])}
    params, model_state = task.init(jax.random.key(0), batch)
    logits = np.asarray(MLP((16, 16), 10).apply({"params": params}, (batch["image"] - 3) / 2), np.float64)
    logs_ = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = {name: x[:3] for name, x in batch.items()}
    targets = 0.8 * np.eye(10)[counted["label"]] + 0.02
    loss, (_, metrics) = task.loss_fn(params, model_state, counted, jax.random.key(0))
    assert float(loss) == pytest.approx(-(targets * logs_[:3]).sum(-1).mean(), rel=1e-4)
    wrong = logits[:3].argmax(-1) != counted["label"]
    assert float(metrics["error"]) == pytest.approx(100 * wrong.mean())
    total, errors, labels = task.score(params, model_state, batch)
    assert float(total) == pytest.approx(-logs_[range(3), counted["label"]].sum(), rel=1e-4)
    assert int(errors) == wrong.sum()
    np.testing.assert_array_equal(labels, np.bincount([3, 1, 4], minlength=10))


@pytest.mark.slow
def test_seeds_are_runs_of_their_own_and_one_curve(finished, tmp_path, capsys, monkeypatch):
    run(tmp_path / "many", seeds=2, seed=finished.seed - 1, tensorboard=True)
    second = dataclasses.replace(finished, out=tmp_path / "many" / f"seed{finished.seed}")
    assert_same_bits(end_state(second), end_state(finished))
    drawn = []
    monkeypatch.setattr(cli.figures, "_curves", lambda lines, *rest: drawn.append(lines) or b"png")
    cli.figures.runs([tmp_path / "many"])
    cli.figures.runs([tmp_path / "many", finished.out])
    cli.figures.runs([second.out])
    assert [[(label, len(curves)) for label, _, curves in lines] for lines in drawn] == [
        [("WM", 2)], [("WM", 3)], [("WM", 1)]
    ]  # fmt: skip


@pytest.mark.slow
def test_frozen_trains_the_readout_alone(tmp_path):
    config = run(tmp_path / "frozen", rule="frozen", steps=4, optimizer="adamw", mirror_steps=None)
    built = train.build(config)
    before, after = by_path(built.init()), end_state(config)
    layers = {path for path in before if path.startswith(".params")}
    changed = {path for path in layers if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in layers if "output" in path}


def test_every_recipe_is_sound():
    for name, config in recipes.RECIPES.items():
        config.check()
        assert name.endswith(f"-{config.rule}") and config.out == Path("runs") / name
        json.dumps(settings.to_json(config))
        assert "mirror_steps" in settings.to_json(config)


@pytest.mark.slow
def test_text_and_bf16():
    """The decoder's first loss is that of chance, and parameters stay float32 under bfloat16."""
    config = dataclasses.replace(recipes.RECIPES["decoder-characters-kpm"], dtype="bfloat16")
    feed = feeds.open_feed(dataclasses.replace(config, batch_size=8), make_mesh(8))
    assert feed.shape == (128,)
    task = tasks.make_task(config, feed.shape, feed.num_classes, feed.mean, feed.std)
    params, model_state = task.init(jax.random.key(0), feed.probe)
    loss, _ = jax.jit(task.loss_fn)(params, model_state, next(feed.batches(0)), jax.random.key(0))
    assert float(loss) == pytest.approx(np.log(feed.num_classes), rel=0.2)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_csv_of_a_resumed_run(tmp_path):
    path = tmp_path / "a.csv"
    log = logs.Log(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "x": step / 3, "y": float("nan")})
    log.close()
    with path.open("a") as file:
        file.write("4,0.")  # cut off by a kill
    again = logs.Log(path, 2)
    again.write({"step": 3, "x": 7.0, "y": float("nan")})
    again.close()
    assert [list(row) for row in csv.reader(path.open())] == [
        ["step", "x", "y"], ["1", "0.333333333", ""], ["2", "0.666666667", ""], ["3", "7", ""]
    ]  # fmt: skip
