"""The wmkp command: what is typed becomes a typed config, and bad input a message and exit code 2."""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn


def _end_interrupted() -> NoReturn:
    """Ends the process at once: in the usual way XLA would free what its threads, still compiling, are at work on."""
    print("wmkp: interrupted", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(130)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Within it Ctrl-C ends the process, wherever it strikes."""
    before = sys.unraisablehook

    def within_a_callback(error: Any) -> None:  # such as JAX's for garbage collection: Python prints it and goes on
        if issubclass(error.exc_type, KeyboardInterrupt):
            _end_interrupted()
        before(error)

    sys.unraisablehook = within_a_callback
    try:
        yield
    except KeyboardInterrupt:
        _end_interrupted()
    finally:
        sys.unraisablehook = before


with _interruptible():
    try:
        import jax
        import tyro

        from wmkp.experiments.commands import compare, evaluate, recipes, reproduce, train
        from wmkp.experiments.config import Compare, DataDir, InputError, Reproduce, Train, first_line
        from wmkp.experiments.data import datasets as data
        from wmkp.experiments.runs import figures, outputs
    except ModuleNotFoundError as error:
        sys.exit(f'wmkp: {error.name} is missing; the command needs its extra: pip install "wmkp[experiments]"')

app = tyro.extras.SubcommandApp()


@app.command(name="compare")
def run_compare(config: tyro.conf.OmitArgPrefixes[Compare]) -> None:
    """Train a network under several learning rules, from the same weights on the same data, and compare them.

    Prints a table, and writes comparison.png and comparison.csv. The default takes about a minute and a half on two cores.
    """
    compare.compare(config)


if TYPE_CHECKING:
    Recipe = Train
else:
    Recipe = tyro.extras.subcommand_type_from_defaults(recipes.RECIPES, recipes.DESCRIPTIONS, prefix_names=False)


@app.command(name="train")
def run_train(config: tyro.conf.OmitArgPrefixes[Recipe]) -> None:
    """Train a network under a learning rule, by a recipe of which every setting can be changed.

    Writes checkpoints, CSV files and TensorBoard scalars. With --resume it goes on where it was, to the bit.
    """
    train.train(config)


@app.command(name="eval")
def run_eval(
    run: tyro.conf.Positional[Path],
    step: Annotated[int | None, tyro.conf.arg(constructor=int, help_behavior_hint="(default: the latest)")] = None,
    data_dir: DataDir = None,
    export: Annotated[Path | None, tyro.conf.arg(constructor=Path, help_behavior_hint="(default: none)")] = None,
) -> None:
    """Test error and angles of a run's checkpoint.

    Args:
        run: the run's directory.
        step: of the checkpoint.
        data_dir: where TFDS has its datasets, if not where the run had them.
        export: a file to write the model's variables to, as plain Flax ones, for flax.serialization.msgpack_restore.
    """
    evaluate.evaluate(run, step, data_dir, export)


@app.command(name="plot")
def run_plot(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("runs.png")) -> None:
    """Test error and angles of runs over their epochs, in one picture.

    Args:
        runs: the runs' directories.
        out: the PNG file.
    """
    outputs.check_file(out)
    outputs.write_atomically({out: figures.runs(runs)})
    print(f"Written: {out}")


@app.command(name="reproduce")
def run_reproduce(config: tyro.conf.OmitArgPrefixes[Reproduce]) -> None:
    """Run a published figure's experiments anew, and hold them against what was published."""
    reproduce.reproduce(config)


@app.command(name="data")
def run_data(name: tyro.conf.Positional[str], data_dir: DataDir = None) -> None:
    """Download a TFDS dataset and prepare it for training.

    Args:
        name: as TFDS spells it, such as cifar10.
        data_dir: where to put it.
    """
    data.prepare(name, data_dir)


def main() -> None:
    """Runs the command line."""
    try:
        if any(re.fullmatch("(--[^=]*=)?", given) for given in sys.argv[1:]):  # an empty path would be this directory
            raise InputError(f"an argument is empty: {shlex.join(sys.argv[1:])}; give it a value, or leave it out")
        with _interruptible():
            app.cli(
                prog="wmkp", description="Neural networks trained without weight transport.", sort_subcommands=False
            )
    except InputError as error:
        print(f"wmkp: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower():
            raise
        print(
            f"wmkp: this does not fit in memory ({first_line(error)}); a smaller --batch-size, --hidden or --image-size takes "
            "less, a larger --mirror-angle too, and --fsdp divides what W and B take among devices",
            file=sys.stderr,
        )
        sys.exit(2)
