"""wmkp eval: evaluates a run's checkpoint on the test set."""

import contextlib
import dataclasses
from pathlib import Path

import jax
from flax import serialization
from rich import box
from rich.console import Console
from rich.table import Table

from wmkp.experiments.runs import checkpoints, outputs, settings
from wmkp.experiments.runs.build import build, like


def evaluate(
    directory: Path, step: int | None = None, data_dir: Path | None = None, export: Path | None = None
) -> None:
    """Prints a checkpoint's test loss, test error and angles, and can write its variables to a file.

    Args:
      directory: the run's directory.
      step: the checkpoint's step; None for the latest.
      data_dir: the directory of TFDS's datasets, if it has changed since the run.
      export: a file for the model's variables, in Flax's msgpack format.

    Raises:
      InputError: there is no such run or checkpoint, or ``export`` cannot be written.
    """
    config = settings.read(directory)
    config = dataclasses.replace(
        config, distributed=False, coordinator=None, processes=None, process=None, data_dir=data_dir or config.data_dir
    )
    manager = checkpoints.open_manager(directory / "checkpoints", config.keep, read_only=True)
    with contextlib.closing(manager):
        step = checkpoints.choose(manager, step)
        if export is not None:
            outputs.check_file(export)
        run = build(config)
        state, progress = checkpoints.restore(manager, like(config, run), step)
    score = run.evaluate(state)
    numbers = {name: float(x) for name, x in jax.device_get(run.measure(state, run.feed.probe)).items()}
    console = Console(soft_wrap=True)
    console.print(f"step {progress['step']}: test loss {score.loss:.4f}, test error {score.shown()}")
    if numbers:
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("projection", "matrix angle", "delta angle", "|B| / |W|", "|δ| / BP's |δ|"):
            table.add_column(heading, justify="left" if heading == "projection" else "right")
        kinds = ("matrix_angle_deg", "delta_angle_deg", "norm_ratio", "delta_norm_ratio")
        for path in [name.split("/", 1)[1] for name in numbers if name.startswith("delta_reference/")]:
            cells = [numbers.get(f"{kind}/{path}") for kind in kinds]
            table.add_row(path, *("-" if x is None else f"{x:.2f}" for x in cells))
        console.print(table)
    if export is not None:
        variables = jax.device_get({"params": state.params, **state.model_state})
        outputs.write_atomically({export: serialization.msgpack_serialize(variables)})
        console.print(f"Written: {export}")
