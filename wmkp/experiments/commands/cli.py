"""The wmkp command: it turns arguments into a typed config, and bad input into a message and exit code 2."""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn


def _end_interrupted() -> NoReturn:
    """Ends the process at once: a normal exit would free memory that XLA's compiling threads still use."""
    print("wmkp: interrupted", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(130)


def _end_missing(error: ImportError) -> NoReturn:
    """Ends the process because a package is missing, at import or later."""
    print(
        f'wmkp: {error.name or error} is missing; install the command\'s extra: pip install -e ".[experiments]"',
        file=sys.stderr,
    )
    sys.exit(2)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Inside it Ctrl-C ends the process at any point."""
    before = sys.unraisablehook

    def within_a_callback(
        error: Any,
    ) -> None:  # such as JAX's for garbage collection: Python would print it and continue
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

        import wmkp
        from wmkp.experiments.commands import compare, evaluate, help, recipes, reproduce, train
        from wmkp.experiments.config import Compare, DataDir, InputError, Reproduce, Train, first_line, refusals
        from wmkp.experiments.data import datasets as data
        from wmkp.experiments.runs import figures, outputs, style
    except ImportError as error:
        _end_missing(error)

app = tyro.extras.SubcommandApp()


@app.command(name="compare")
def run_compare(config: tyro.conf.OmitArgPrefixes[Compare]) -> None:
    """Compare learning rules on one network, with the same initial weights and data.

    Prints a table, and writes comparison.png, comparison.csv and comparison.md.
    """
    compare.compare(config)


if TYPE_CHECKING:
    Recipe = Train
else:
    Recipe = tyro.extras.subcommand_type_from_defaults(recipes.RECIPES, recipes.DESCRIPTIONS, prefix_names=False)


@app.command(name="train")
def run_train(config: tyro.conf.OmitArgPrefixes[Recipe]) -> None:
    """Train a network under a learning rule. A recipe gives the settings; options change them.

    Writes checkpoints, CSV files and TensorBoard scalars. --resume continues a run bit-for-bit.
    """
    train.train(config)


@app.command(name="eval")
def run_eval(
    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]],
    step: Annotated[int | None, tyro.conf.arg(constructor=int, help_behavior_hint="(default: the latest)")] = None,
    data_dir: DataDir = None,
    export: Annotated[Path | None, tyro.conf.arg(constructor=Path, help_behavior_hint="(default: none)")] = None,
) -> None:
    """Evaluate a checkpoint: test error and angles.

    Args:
        run: Directory of the run.
        step: Step of the checkpoint.
        data_dir: Directory of the prepared TFDS datasets, if it has changed since the run.
        export: File for the model's Flax variables. Read it with flax.serialization.msgpack_restore.
    """
    evaluate.evaluate(run, step, data_dir, export)


@app.command(name="plot")
def run_plot(
    runs: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")]
    ],
    out: Path = Path("runs.png"),
) -> None:
    """Plot test error and angles of runs over epochs. Runs that differ only in their seed share one line.

    Args:
        runs: Directories of runs, or directories that hold one run for each seed.
        out: File to write: .png, .pdf or .svg.
    """
    with refusals("--out"):
        style.check_format(out)
    outputs.check_file(out)
    outputs.write_atomically({out: figures.runs(runs, out.suffix)})
    print(f"Written: {out}")


@app.command(name="reproduce")
def run_reproduce(config: tyro.conf.OmitArgPrefixes[Reproduce]) -> None:
    """Reproduce a published figure, and compare with the published numbers."""
    reproduce.reproduce(config)


@app.command(name="data")
def run_data(
    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]], data_dir: DataDir = None
) -> None:
    """Download a TFDS dataset and prepare it for training.

    Args:
        name: Name of the dataset in TFDS, such as cifar10.
        data_dir: Directory to put it in.
    """
    data.prepare(name, data_dir)


COMMANDS: dict[str, Any] = {
    "compare": Compare,
    "train": Train,
    "eval": run_eval,
    "plot": run_plot,
    "reproduce": Reproduce,
    "data": run_data,
}


def _run(words: list[str]) -> None:
    """Runs the arguments after ``wmkp``."""
    if any(re.fullmatch("(--[^=]*=)?", word) for word in words):  # an empty path would mean this directory
        raise InputError(f"an argument is empty: {shlex.join(words)}; give it a value, or leave the argument out")
    if words == ["--version"]:
        print(f"wmkp {wmkp.__version__}")
        return
    if words in (["train", "-h"], ["train", "--help"]):
        help.print_recipes()
        return
    help.check(words, COMMANDS)
    app.cli(
        prog="wmkp",
        description="Trains neural networks without weight transport. Options: wmkp COMMAND --help. Version: wmkp --version.",
        sort_subcommands=False,
    )


def main() -> None:
    """Runs the command line. Bad input and missing files are a one-line message and exit code 2."""
    try:
        with _interruptible():
            try:
                _run(sys.argv[1:])
            finally:
                sys.stdout.flush()  # here, where a broken pipe can be caught
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
        sys.exit(141)  # as a shell shows SIGPIPE
    except InputError as error:
        print(f"wmkp: {error}", file=sys.stderr)
        sys.exit(2)
    except ImportError as error:
        _end_missing(error)
    except OSError as error:
        where = error.filename2 or error.filename
        said = f"cannot use {where}: {error.strerror}" if where else error.strerror or first_line(error)
        print(f"wmkp: {said}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower():
            raise
        print(
            f"wmkp: this does not fit in memory ({first_line(error)}); use a smaller --batch-size, --hidden "
            "or --image-size, a larger --mirror-angle, or --fsdp, which divides W and B among devices",
            file=sys.stderr,
        )
        sys.exit(2)
