"""The benchmark scripts make the calls and rows that they should, and need no data packages."""

import ast
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
import wmkp
from benchmarks import Settings, gpu, models, scaling
from benchmarks.__main__ import GROUPS


class Compiled:
    """A step that adds its name to a log at each call."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def lower(self, *args):
        return self

    compile = lower

    def __call__(self, state, *batch):
        self.log.append(self.name)
        return state, {}


@pytest.mark.parametrize(("every", "taken"), [(1, "emememem"), (2, "eemeem"), (4, "eeeem")])
def test_a_weight_mirror_mirrors_after_as_many_steps_as_its_row_says(every, taken, monkeypatch):
    logs = []

    def make_steps(loss_fn, rule, *args, **named):
        logs.append([])
        steps = Compiled(logs[-1], "e"), Compiled(logs[-1], "m")
        return wmkp.Steps(lambda *args: 0, *steps)

    monkeypatch.setattr(wmkp, "make_steps", make_steps)
    calls, operations = gpu.calls_of(scaling.chain(2, 2, 8), 4, every)
    assert operations > 2 * 6 * 2 * 8 * 8 * 0.5
    for call in calls.values():
        call()
    assert list(calls)[1:] == ["KP", "WM"] and ["".join(log) for log in logs] == ["eeee", taken]


@pytest.mark.parametrize("part", [gpu.resnet50, gpu.resnet20])
def test_the_gpus_rows_are_all_there_at_a_small_size(part, monkeypatch, quick_compile):
    """A quick run gives the same rows as a full run without a GPU, where all rows say "not run".

    PyTorch's rows say why PyTorch did not run.
    """
    monkeypatch.setattr(models, "make", lambda name, batch_size, *args, **named: scaling.chain(batch_size, 2, 8))
    monkeypatch.setattr(benchmarks, "installed", lambda name: True)
    monkeypatch.setattr(gpu, "torch_call", lambda *args: 1 / 0)
    here, without = (list(part(Settings(quick=quick))) for quick in (True, False))
    assert sorted(row.name for row in here) == sorted(row.name for row in without)
    for row in here:
        if "PyTorch" in row.name:
            assert row.verdict == "not run" and row.note == "PyTorch: ZeroDivisionError: division by zero"
        else:
            assert row.value > 0
    assert {(row.verdict, row.note) for row in without} == {("not run", "no GPU here")}


@pytest.mark.slow
def test_speed_is_measured_without_what_data_and_commands_need(child_environment):
    """Every benchmark group can be imported without Grain, TFDS, tyro and Pillow."""
    code = "import sys; sys.modules.update(dict.fromkeys(('grain', 'tensorflow_datasets', 'tyro', 'PIL')))"
    code += "".join(f"; import benchmarks.{group}" for group in GROUPS)
    done = subprocess.run([sys.executable, "-c", code], env=child_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_of_wmkp_in_the_benchmarks_exists():
    """Most benchmarks need hours or other devices, so a name that was moved would be noticed late."""
    for script in sorted(Path(benchmarks.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(script.read_text())):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if re.fullmatch(r"wmkp(\.\w+)+", name):
                assert operator.attrgetter(name.removeprefix("wmkp."))(wmkp), f"{script.name}: {name}"
