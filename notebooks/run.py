"""Runs the notebooks, each in its own kernel, and saves their outputs. With --smoke it only tests them.

python notebooks/run.py [--smoke] [NOTEBOOK ...]
"""

import argparse
import base64
import io
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import nbformat
import papermill
from PIL import Image

# The parameters of a smoke run (in CI). All assertions hold at this size too. papermill takes lists, not tuples.
SMOKE: dict[str, dict[str, object]] = {
    "1_the_idea": {"num_steps": 20},
    "2_mirrors": {
        "fan_in": 64,
        "fan_out": 64,
        "repeats": 1,
        "multiples": [0.25, 1, 2],
        "multiples_biased": [1, 16],
        "points": 1,
        "mirror_steps": 20,
    },
    "3_kolen_pollack": {"num_steps": 40, "hidden": [16, 16]},
    "4_five_algorithms": {"epochs": 2, "model": "mlp", "hidden": [16, 16, 16], "seeds": 2},
    "5_your_own_rule": {"epochs": 2, "hidden": [16, 16]},
    "6_many_devices": {"num_steps": 3, "hidden": [32, 32]},
}


def run(path: Path, smoke: bool) -> None:
    """Executes a notebook from its first cell to its last.

    If a cell raises, this raises papermill.PapermillExecutionError with the traceback.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / path.name
        parameters = SMOKE[path.stem] if smoke else None
        papermill.execute_notebook(
            path, out, parameters, kernel_name="python3", cwd=directory, progress_bar=False, execution_timeout=900,
            coalesce_streams=True,
        )  # fmt: skip
        if not smoke:
            nbformat.write(tidy(nbformat.read(out, as_version=4)), path)


def timed(path: Path, smoke: bool) -> str:
    """Runs a notebook and returns its name and the seconds that it took."""
    begin = time.perf_counter()
    run(path, smoke)
    return f"{path.name}: {time.perf_counter() - begin:.0f} s"


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Makes the notebook small, and removes what changes at every execution: times, versions, papermill's notes."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells, 1):
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        cell.id = f"cell-{number}"
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    return notebook


def smaller(png: str) -> str:
    """A figure in 64 colours."""
    out = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to run (default: all)")
    parser.add_argument("--smoke", action="store_true", help="run at a small size and write nothing")
    arguments = parser.parse_args()
    if arguments.smoke:  # compiling dominates small programs; XLA's flags as in tests/conftest.py
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        older = " --xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + older + " --xla_cpu_parallel_codegen_split_count=1"
    # One at a time at full size, so that the times are comparable. Each in a process, as papermill changes directory.
    paths = arguments.notebooks or sorted(Path(__file__).parent.glob("*.ipynb"))
    with ProcessPoolExecutor(None if arguments.smoke else 1, multiprocessing.get_context("spawn")) as pool:
        for said in pool.map(partial(timed, smoke=arguments.smoke), paths):
            print(said, flush=True)


if __name__ == "__main__":
    main()
