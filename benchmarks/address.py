"""The repository's public address, and the texts that contain it.

``python -m benchmarks.pages`` writes these texts: the README's table of notebooks, the notebooks' first cells, and the links in
``pyproject.toml`` and ``CITATION.cff``.
"""

import json
import re
from pathlib import Path

# "owner/name" on GitHub, or None while the repository has no public address.
ADDRESS: str | None = None

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# What each notebook shows, in the order of their numbers.
SHOWS = (
    "B in place of Wᵀ in any JAX loss; with B = W the gradients are backprop's",
    "theory against measurement: Gaussian, orthogonal and antithetic noise, averaging, biases",
    "eq. 14 under three optimizers, its time constant, and a mirrored start that has nothing to forget",
    "BP, FA, SS, KP, WM on one task: loss, matrix angles, delta angles",
    "one-bit and sparse feedback in a few lines each, and what they transport",
    "eight devices do what one does; state and mirror noise divided; `shard_map`; pod slices",
)


def table(address: str | None = ADDRESS) -> str:
    """The README's table of notebooks. Each has a link to Colab if there is an address."""
    lines = [
        "| notebook | what it shows |" + (" |" if address else ""),
        "| --- | --- |" + (" --- |" if address else ""),
    ]
    for path, shows in zip(NOTEBOOKS, SHOWS, strict=True):
        line = f"| [{title(path)}](notebooks/{path.name}) | {shows} |"
        if address:
            colab = f"https://colab.research.google.com/github/{address}/blob/main/notebooks/{path.name}"
            line += f" [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def title(path: Path) -> str:
    """A notebook's title without its number."""
    return json.loads(path.read_text())["cells"][0]["source"][0].split(". ", 1)[1].strip()


def first_cell(source: str, address: str | None = ADDRESS) -> str:
    """A notebook's first code cell. It installs wmkp from ``address``, or without one from the notebook's own clone."""
    origin = f"wmkp[experiments] @ git+https://github.com/{address}" if address else "..[experiments]"
    where = "from its repository" if address else "from the clone that holds this notebook"
    said = f"# Installs wmkp {where}, if it is missing. The NumPy that this session may have loaded stays."
    source, installed = re.subn(
        r"(?m)^    %pip install .*", lambda _: f'    %pip install -q "{origin}" {{kept}}', source
    )
    source, explained = re.subn(r"(?m)^# Installs wmkp .*", lambda _: said, source)
    if (installed, explained) != (1, 1):
        raise SystemExit(
            f"a notebook's first cell must say what it installs, and install it, each in one line:\n{source}"
        )
    return source


def urls(address: str | None = ADDRESS) -> str:
    """The table of links in ``pyproject.toml``."""
    return f'[project.urls]\nRepository = "https://github.com/{address}"\n' if address else ""


def citation(address: str | None = ADDRESS) -> str:
    """The link in ``CITATION.cff``."""
    return f"repository-code: https://github.com/{address}\n" if address else ""


def write_first_cells() -> None:
    """Writes the address into the first code cell of every notebook."""
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text())
        cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
        cell["source"] = first_cell("".join(cell["source"])).splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
