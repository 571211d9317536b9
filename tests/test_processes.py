"""Two processes over loopback train as one, stop together, save one checkpoint, and notice a lost process."""

import csv
import dataclasses
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from wmkp.experiments import devices
from wmkp.experiments.commands import train
from wmkp.experiments.runs import build, logs, settings

pytestmark = pytest.mark.slow

OPTIONS = "mlp-digits-wm --hidden 16 16 --epochs 400 --log-every 10 --no-tensorboard --mirror-angle 20".split()
SECONDS = 240  # a process that takes longer hangs


def start_two(environment, out, command=("train", *OPTIONS), before=""):
    """Start the command in two processes. ``before`` is code that each runs first."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    code = f"from wmkp.experiments.commands import cli, reproduce\n{before}\ncli.main()"
    command = [sys.executable, "-c", code, *command, "--out", str(out), "--distributed"]
    command += ["--coordinator", address, "--processes", "2", "--process"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*command, str(i)], env=environment, **pipes) for i in range(2)]


def until_rows(path, count, processes):
    while not path.exists() or len(path.read_text().splitlines()) <= count:
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        time.sleep(0.05)


def rows_before(path, step):
    """Return each step's loss. One process and two have the same losses up to rounding."""
    return {int(row["step"]): row["train_loss"] for row in logs.read(path) if row["step"] <= step}


@pytest.fixture(scope="module")
def together(tmp_path_factory, child_environment):
    """Train with two processes, stop one with SIGTERM, and wait until both have ended."""
    out = tmp_path_factory.mktemp("together") / "run"
    processes = start_two(child_environment, out)
    try:
        until_rows(out / "train.csv", 4, processes)
        processes[1].send_signal(signal.SIGTERM)
        said = [p.communicate(timeout=SECONDS) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], said
    return out, said[0][0]


def test_two_processes_train_as_one_and_one_resumes_alone(together, tmp_path, quick_compile, monkeypatch, capsys):
    out, said = together
    step = int(re.search(r"Stopped at step (\d+) of 14800 and saved", said).group(1))
    assert (out / "checkpoints" / str(step)).is_dir()
    monkeypatch.setattr(devices, "make_mesh", lambda batch_size: Mesh(np.array(jax.devices()[:1]), ("data",)))
    log = train._log

    def log_and_be_stopped(session):
        if session.step >= step + 20:
            signal.raise_signal(signal.SIGTERM)
        return log(session)

    monkeypatch.setattr(train, "_log", log_and_be_stopped)
    one_process = {"distributed": False, "coordinator": None, "processes": None, "process": None}
    resumed = dataclasses.replace(settings.read(out), resume=True, **one_process)
    built = build.build(resumed)  # both runs share what is compiled
    monkeypatch.setattr(train, "build", lambda config: built)
    assert not train.train(resumed)
    assert f"Resumed at step {step} of 14800" in capsys.readouterr().out
    assert not train.train(dataclasses.replace(resumed, out=tmp_path / "alone"))
    ours, theirs = (rows_before(d / "train.csv", step + 20) for d in (out, tmp_path / "alone"))
    assert len(ours) >= 6
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-3)


def test_losing_a_process_ends_the_other(tmp_path, child_environment):
    """Process 0 ends with a message. It is the coordinator; JAX itself ends a process that loses it."""
    command = "train mlp-digits-bp --hidden 16 --epochs 400 --log-every 10 --no-tensorboard".split()
    processes = start_two(child_environment, tmp_path / "run", command=command)
    try:
        until_rows(tmp_path / "run" / "train.csv", 2, processes)
        processes[1].kill()
        _, said = processes[0].communicate(timeout=SECONDS)
        assert processes[0].returncode not in (0, None)
        assert "wmkp: another process of the run was lost" in said
    finally:
        for p in processes:
            p.kill()


def test_two_processes_reproduce_a_figure(tmp_path, child_environment):
    small = 'reproduce.BATTERIES["language"] = reproduce.Battery(("mlp-digits-bp",), {"hidden": (16,)})'
    command = "reproduce language --steps 2".split()
    processes = start_two(child_environment, tmp_path / "figure", command, small)
    try:
        said = [p.communicate(timeout=SECONDS) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], said
    (line,) = csv.DictReader((tmp_path / "figure" / "summary.csv").read_text().splitlines())
    assert line["run"] == "mlp-digits-bp" and 0 < float(line["epoch"]) < 1
    assert "test error" in said[0][0] and "test error" not in said[1][0]
