"""The command line: help, one-line errors with exit code 2, paths, full disks and closed pipes."""

import ast
import contextlib
import dataclasses
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import requests

import wmkp
from wmkp.experiments.commands import cli, help, train
from wmkp.experiments.config import InputError, Train
from wmkp.experiments.data import datasets as data
from wmkp.experiments.runs import build, checkpoints, logs, settings

LONG = "x" * 300


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process and returns its exit code, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["wmkp", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


# --- help -------------------------------------------------------------------------------------------------------------


def test_version(command):
    assert command("--version") == (0, f"wmkp {wmkp.__version__}\n", "")


def test_recipes_are_on_one_screen(command):
    code, out, _ = command("train", "--help")
    assert code == 0 and len(out.splitlines()) <= 30 and max(map(len, out.splitlines())) <= 80
    for word in ("mlp-digits ", "bp fa ss kp mkp kpm wm frozen", "kp Kolen-Pollack", "wmkp train RECIPE --help"):
        assert word in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train mlp-digits-xx", "no recipe mlp-digits-xx; did you mean mlp-digits-"),
        ("train mlp-digits-kp --lr 3", "no option --lr; did you mean --learning-rate?"),
        ("train mlp-digits-kp --epoch=3", "no option --epoch; did you mean --epochs?"),
        ("compare --zzz", "no option --zzz\n"),
        ("eval run --setp 3", "no option --setp; did you mean --step?"),
        ("trian mlp-digits-kp", "no command trian; did you mean train?"),
    ],
)
def test_what_does_not_exist_is_answered_by_the_nearest_in_two_lines(words, said, command):
    code, _, error = command(*words.split())
    assert code == 2 and said in error and error.count("\n") == 2


def test_the_recipe_comes_first(command):
    for words in (["train"], ["train", "--epochs", "3", "mlp-digits-kp"]):
        code, _, error = command(*words)
        assert code == 2 and "wmkp train RECIPE" in error and error.count("\n") == 1


def test_every_option_is_known_to_the_check():
    for words in (
        ["train", "mlp-digits-kp", "--batch_size", "3", "--no-tensorboard", "--keep=1"],
        ["data", "x", "--help"],
    ):
        help.check(words, cli.COMMANDS)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("eval", "RUN"), ("plot", "RUN [RUN ...]"), ("data", "NAME"), ("reproduce", "[REPRODUCE OPTIONS] FIGURE")],
)
def test_positional_arguments_have_names(name, shown, command):
    _, out, _ = command(name, "--help")
    assert f"wmkp {name} [-h] {shown}" in " ".join(out.split())


def test_a_pipe_that_nobody_reads_ends_quietly(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", closed)
        monkeypatch.setattr(sys, "argv", ["wmkp", "train", "--help"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        monkeypatch.undo()
    assert end.value.code == 141 and not capsys.readouterr().err


# --- one line and exit code 2 -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_nobody():
    """Runs as another user if the user is root, because root may enter every directory."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    "words",
    [
        "train mlp-digits-kp --out {}",
        "train mlp-digits-kp --dataset {} --out new",
        "reproduce akrout-mnist --out {}",
        "plot {}",
        "plot run --out {}/x.png",
        "eval {}",
    ],
)
@pytest.mark.parametrize("why", ["File name too long", "Permission denied"])
def test_a_path_that_cannot_be_used_is_one_line(why, words, command, tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700 if os.geteuid() == 0 else 0)
    tmp_path.chmod(0o777)
    monkeypatch.chdir(tmp_path)
    bad = f"./{LONG}" if why == "File name too long" else closed / "run"
    with as_nobody() if why == "Permission denied" else contextlib.nullcontext():
        code, _, error = command(*words.format(bad).split())
    assert code == 2 and error.startswith("wmkp: ") and why in error and error.count("\n") == 1, error
    assert not (tmp_path / "new").exists()


def test_a_missing_package_is_one_line(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, _, error = command("train", "mlp-digits-bp", "--out", tmp_path / "run")
    assert code == 2 and error.count("\n") == 1
    assert "sklearn.datasets is missing" in error and 'pip install -e ".[experiments]"' in error


def test_a_download_without_network_is_one_line_and_soon(command, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ANSWER_SECONDS", 0.1)
    answers = [
        lambda *_, **__: (_ for _ in ()).throw(requests.ConnectionError("no route")),
        lambda *_, **__: time.sleep(60),
    ]
    for answer in answers:
        monkeypatch.setattr(requests, "head", answer)
        code, _, error = command("data", "mnist", "--data-dir", tmp_path)
        assert code == 2 and "does not answer; check the network" in error and error.count("\n") == 1


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", True, "seed must be an integer; got true"),
        ("seed", 1.5, "seed must be an integer; got 1.5"),
        ("resume", 1, "resume must be true or false; got 1"),
        ("epochs", "3", 'epochs must be a number; got "3"'),
        ("steps", False, "steps must be an integer or null; got false"),
        ("hidden", 3, "hidden must be a list, each item an integer; got 3"),
        ("hidden", [3, True], "hidden must be a list, each item an integer"),
        ("hidden", [3] * 3000, "--hidden must give the widths of 1 to 256 layers; got 3000"),
        ("model", "nonsense", "model must be one of mlp, residual-mlp, lenet"),
        ("out", None, "out must be text; got null"),
    ],
)
def test_a_setting_of_another_type_is_named(name, value, said, tmp_path):
    config = Train(out=tmp_path)
    settings.write(config)
    assert settings.read(tmp_path) == config
    values = {**settings.to_json(config), name: value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="config.json is damaged: ") as error:
        settings.read(tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "changes", "said"),
    [
        ("constant", {"epochs": 5.0}, None),
        ("step", {"epochs": 5.0}, None),
        ("cosine", {"epochs": 5.0}, "but only with a constant or step --schedule: cosine ends with the run"),
        (
            "constant",
            {"epochs": 2.0},
            "--epochs was 3.0 and is 2.0; use another --out to train from the start. .* not with fewer",
        ),
        ("constant", {"steps": 5}, "--steps was None and is 5; use another --out to train from the start"),
        ("constant", {"epochs": 5.0, "seed": 1}, "--seed was 0 and is 1; use another --out$"),
    ],
)
def test_a_run_may_grow_longer_unless_its_schedule_spans_it(schedule, changes, said, tmp_path):
    before = Train(out=tmp_path, epochs=3.0, schedule=schedule, drop_epochs=(1.0,), resume=True)
    settings.write(before)
    refused = contextlib.nullcontext() if said is None else pytest.raises(InputError, match=said)
    with refused, settings.claim(dataclasses.replace(before, **changes)):
        pass


# --- checkpoints and logs ---------------------------------------------------------------------------------------------


class State(NamedTuple):
    step: jax.Array
    key: jax.Array
    w: jax.Array


STATE = State(jnp.asarray(3), jax.random.key(5), jnp.arange(5.0))


@pytest.mark.parametrize("name", ["r[1]", "[!a]", "a*b?", "{x} %20 #h | ~$", "späß\n"])
def test_a_path_is_no_pattern(name, tmp_path):
    directory = tmp_path / name / "checkpoints"
    with checkpoints.opened(directory, keep=1) as manager:
        checkpoints.save_in_turn(manager, STATE, {"x": 1})
    manager = checkpoints.open_manager(directory, 1, read_only=True)
    like = jax.eval_shape(lambda: STATE)
    like = jax.tree.map(lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y.sharding), like, STATE)
    found, progress = checkpoints.restore(manager, like)
    np.testing.assert_array_equal(found.w, STATE.w)
    assert progress == {"x": 1} and [path.name for path in tmp_path.iterdir()] == [name]


def test_a_save_that_cannot_be_read_is_not_believed(tmp_path, monkeypatch):
    """``verify`` raises an error for a save that cannot be read, as when Orbax takes a path for a pattern."""
    monkeypatch.delattr(checkpoints._Literal, "glob")
    manager = checkpoints.open_manager(tmp_path / "r[1]", keep=1)
    checkpoints.save(manager, STATE, {})
    with pytest.raises(InputError, match="cannot read the checkpoint"):
        checkpoints.verify(manager, STATE)


def test_a_backslash_is_refused_before_anything_is_made(command, tmp_path):
    code, _, error = command("train", "mlp-digits-bp", "--out", tmp_path / "r\\x")
    assert code == 2 and "its path has a backslash" in error and not list(tmp_path.iterdir())


@contextlib.contextmanager
def full_disk(size):
    """Imitates a full disk by a limit on file sizes. The system reports it by an error, not by a signal."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_said_once_and_closing_says_no_more(tmp_path):
    log, board = logs.Log(tmp_path / "train.csv", 0), logs.Board(tmp_path / "tensorboard", 0)
    with full_disk(10):
        for write, name in ((log.write, "train.csv"), (board.write, "tensorboard")):
            with pytest.raises(InputError, match=f"cannot write to {tmp_path / name}: File too large"):
                write({"step": 1, "train_loss": 1 / 3})
        log.close()
        board.close()


def test_tensorboard_has_no_empty_files_and_train_beside_test(tmp_path):
    board = logs.Board(tmp_path, 0)
    assert not list(tmp_path.iterdir())
    board.write({"step": 1, "train_loss": 2.5, "learning_rate": float("nan")})
    board.close()
    (events,) = tmp_path.iterdir()
    content = events.read_bytes()
    assert b"loss/train" in content and b"loss/test" in content and b"learning_rate" not in content
    tags = {
        "train_loss": "loss/train",
        "test_error_percent": "error_percent/test",
        "matrix_angle_deg/output/kernel": "matrix_angle/output/kernel",
        "delta_angle_worst_deg": "delta_angle/worst",
        "norm_ratio/output/kernel": "norm_ratio/output/kernel",
        "learning_rate": "learning_rate",
    }
    assert {name: logs.tag(name) for name in tags} == tags


# --- runs that fail to learn ------------------------------------------------------------------------------------------


def test_a_run_that_runs_away_is_warned_of_once(capsys):
    tally = lambda loss: build.Tally(np.float32(loss), np.float32(0), np.float32(1), np.int32(0), np.False_, {})
    run = SimpleNamespace(
        feed=SimpleNamespace(epoch_steps=10), schedule=lambda update: 0.1, mesh=train.devices.make_mesh(8)
    )
    session = train._Session(Train(), run, None, None, None, tally(2.0), 0, 2.0, {})
    for step, loss in enumerate((199.0, 201.0, 1e6), 1):
        session.step, session.tally = step, tally(loss)
        train._log(session)
        assert ("the loss diverges" in capsys.readouterr().err) == (loss == 201.0)


def test_an_error_that_one_answer_would_have_is_marked():
    labels = np.array([3, 3, 3, 1])
    feed = SimpleNamespace(num_classes=5, tests=lambda: iter([labels]))
    task = SimpleNamespace(score=lambda p, s, x: (1.0, p, jnp.zeros(5, jnp.int32).at[x].add(1)))
    evaluate = build._evaluate(task, feed, train.devices.make_mesh(8))
    dead, better = (evaluate(SimpleNamespace(params=jnp.asarray(n), model_state={})) for n in (1, 0))
    assert dead == (0.25, 25.0, 25.0) and dead.shown() == "25.00 % (no better than one answer to everything, 25.00 %)"
    assert better.shown() == "0.00 %"


# --- the house --------------------------------------------------------------------------------------------------------


def test_wings_import_one_way():
    """Each part of wmkp.experiments imports only itself and the parts before it in ``wings``."""
    wings = ["config", "devices", "data", "models", "runs", "commands"]
    root = Path(cli.__file__).parents[1]
    for path in root.rglob("*.py"):
        mine = path.relative_to(root).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text())
        typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
        skipped = {id(inner) for node in typed for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.ImportFrom)
                and id(node) not in skipped
                and (node.module or "").startswith("wmkp.experiments")
            ):
                parts = node.module.split(".")
                for other in [parts[2]] if len(parts) > 2 else [alias.name for alias in node.names]:
                    assert wings.index(other) <= wings.index(mine), f"{path} imports {other}"
