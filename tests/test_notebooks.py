"""The notebooks as they are kept: executed, small, with parameters, and each with its badge in the README.

That they run is tested by ``python notebooks/run.py --smoke``.
"""

import ast
import importlib.util
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text()
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    """The cells of a kind, and of each its source."""
    return [(c, "".join(c["source"])) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


@each
def test_kept_with_its_outputs_and_small(path):
    assert path.stat().st_size < 150_000
    code = [c for c, _ in cells(path, "code")]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1)), "executed out of order, or not at all"
    outputs = [output for c in code for output in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert path.stem == "6_many_devices" or any("image/png" in o.get("data", {}) for o in outputs)


@each
def test_installs_wmkp_first_and_only_where_it_is_missing(path):
    """Beside the NumPy that is there: a session that has loaded it cannot use another, whose modules it would mix in."""
    first = cells(path, "code")[0][1]
    assert re.search(
        r'find_spec\("wmkp"\) is None:\n    kept = .*f"numpy=={d.version}".*\n'
        r'    %pip install -q "wmkp\[experiments\] @ git\+https://github.com/OWNER/REPO" \{kept\}',
        first,
    )
    assert "import jax" not in first and "import wmkp" not in first


@each
def test_smoke_sets_parameters_that_there_are(path):
    """papermill would pass by one that is misspelt, and run the notebook at its full size."""
    spec = importlib.util.spec_from_file_location("run", ROOT / "notebooks" / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    (source,) = [source for c, source in cells(path, "code") if "parameters" in c["metadata"].get("tags", [])]
    names = {node.targets[0].id for node in ast.parse(source).body}
    assert run.SMOKE[path.stem] and set(run.SMOKE[path.stem]) <= names
    assert "full size" in source


@each
def test_links_lead_somewhere(path):
    for _, source in cells(path, "markdown"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", source):
            assert (path.parent / target).exists(), target


def test_readme_has_each_with_its_badge():
    """In order, under its own title; and all badges lead to one repository."""
    titles = [cells(path, "markdown")[0][1].splitlines()[0] for path in NOTEBOOKS]
    expected = [
        (title.split(". ", 1)[1], path.name, str(n))
        for n, (title, path) in enumerate(zip(titles, NOTEBOOKS, strict=True), 1)
    ]
    assert [title.split(".")[0] for title in titles] == [f"# {n}" for _, _, n in expected]
    row = r"^\| \[(.+?)\]\(notebooks/(\S+)\) \| .+ \| \[!\[Open in Colab\]\[colab\]\]\[notebook (\d)\] \|$"
    assert re.findall(row, README, re.MULTILINE) == expected
    link = (
        r"^\[notebook (\d)\]: https://colab\.research\.google\.com/github/([\w.-]+/[\w.-]+)/blob/main/notebooks/(\S+)$"
    )
    links = re.findall(link, README, re.MULTILINE)
    assert [(name, n) for n, _, name in links] == [(name, n) for _, name, n in expected]
    repositories = {repository for _, repository, _ in links}
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
    assert len(repositories) == 1
    assert urls.get("Repository") in {None, f"https://github.com/{repositories.pop()}"}
