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


def _end_missing(error: ImportError) -> NoReturn:
    """Ends the process for want of a package, whenever it was looked for."""
    print(
        f'wmkp: {error.name or error} is missing; the command needs its extra: pip install "wmkp[experiments]"',
        file=sys.stderr,
    )
    sys.exit(2)


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
    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]],
    step: Annotated[int | None, tyro.conf.arg(constructor=int, help_behavior_hint="(default: the latest)")] = None,
    data_dir: DataDir = None,
    export: Annotated[Path | None, tyro.conf.arg(constructor=Path, help_behavior_hint="(default: none)")] = None,
) -> None:
    """Test error and angles of a run's checkpoint.

    Args:
        run: The run's directory.
        step: Step of the checkpoint.
        data_dir: Where TFDS has its datasets, if not where the run had them.
        export: A file to write the model's variables to, as plain Flax ones, for flax.serialization.msgpack_restore.
    """
    evaluate.evaluate(run, step, data_dir, export)


@app.command(name="plot")
def run_plot(
    runs: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")]
    ],
    out: Path = Path("runs.png"),
) -> None:
    """Test error and angles of runs over their epochs, in one picture; runs that differ in their seed alone are one line.

    Args:
        runs: The runs' directories, or those that hold a run of each seed.
        out: The file: .png, .pdf or .svg.
    """
    with refusals("--out"):
        style.check_format(out)
    outputs.check_file(out)
    outputs.write_atomically({out: figures.runs(runs, out.suffix)})
    print(f"Written: {out}")


@app.command(name="reproduce")
def run_reproduce(config: tyro.conf.OmitArgPrefixes[Reproduce]) -> None:
    """Run a published figure's experiments anew, and hold them against what was published."""
    reproduce.reproduce(config)


@app.command(name="data")
def run_data(
    name: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="NAME")]], data_dir: DataDir = None
) -> None:
    """Download a TFDS dataset and prepare it for training.

    Args:
        name: As TFDS spells it, such as cifar10.
        data_dir: Where to put it.
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
    """Does what is typed after ``wmkp``."""
    if any(re.fullmatch("(--[^=]*=)?", word) for word in words):  # an empty path would be this directory
        raise InputError(f"an argument is empty: {shlex.join(words)}; give it a value, or leave it out")
    if words == ["--version"]:
        print(f"wmkp {wmkp.__version__}")
        return
    if words in (["train", "-h"], ["train", "--help"]):
        help.print_recipes()
        return
    help.check(words, COMMANDS)
    app.cli(
        prog="wmkp",
        description="Neural networks trained without weight transport. wmkp --version says which version this is.",
        sort_subcommands=False,
    )


def main() -> None:
    """Runs the command line. What the world outside does not have or allow is one line, and exit code 2."""
    try:
        with _interruptible():
            try:
                _run(sys.argv[1:])
            finally:
                sys.stdout.flush()  # here, where it can be seen that nobody reads on
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
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
            f"wmkp: this does not fit in memory ({first_line(error)}); a smaller --batch-size, --hidden or --image-size takes "
            "less, a larger --mirror-angle too, and --fsdp divides what W and B take among devices",
            file=sys.stderr,
        )
        sys.exit(2)
