"""The wmkp command: what is typed becomes a typed config, and bad input becomes one line and exit code 2."""

import sys

try:
    import tyro

    from wmkp.experiments import compare
    from wmkp.experiments.config import Compare, InputError
except ModuleNotFoundError as error:
    sys.exit(f'wmkp: {error.name} is missing; the command needs its extra: pip install "wmkp[experiments]"')

app = tyro.extras.SubcommandApp()


@app.command(name="compare")
def run_compare(config: tyro.conf.OmitArgPrefixes[Compare]) -> None:
    """Train a network under several learning rules, from the same weights on the same data, and compare them.

    Prints a table, and writes comparison.png and comparison.csv. The default takes about a minute on two cores.
    """
    compare.compare(config)


def main() -> None:
    """Runs the command line."""
    try:
        app.cli(prog="wmkp", description="Neural networks trained without weight transport.", sort_subcommands=False)
    except InputError as error:
        print(f"wmkp: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("wmkp: interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
