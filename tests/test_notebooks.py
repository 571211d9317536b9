"""Each notebook in the repository is executed, small, has a parameters cell, and stands in the README.

``python notebooks/run.py --smoke`` tests that the notebooks run.
"""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

from benchmarks import address

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
README = (ROOT / "README.md").read_text()
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    """Return the cells of one kind, each with its source."""
    return [(c, "".join(c["source"])) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


@each
def test_kept_with_its_outputs_and_small(path):
    assert path.stat().st_size < 150_000
    code = [c for c, _ in cells(path, "code")]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1)), "executed out of order, or not at all"
    outputs = [output for c in code for output in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert "site-packages" not in str(outputs), "a warning, with a path of the machine that ran the notebook"
    assert path.stem == "6_many_devices" or any("image/png" in o.get("data", {}) for o in outputs)


@each
def test_installs_wmkp_first_and_only_where_it_is_missing(path):
    """The first cell installs wmkp only if it is missing, and pins NumPy to the installed version.

    A session that has loaded one NumPy would mix in the modules of another.
    """
    first = cells(path, "code")[0][1]
    assert re.search(
        r'find_spec\("wmkp"\) is None:\n    kept = .*f"numpy=={d.version}".*\n    %pip install -q ".*" \{kept\}', first
    )
    assert "import jax" not in first and "import wmkp" not in first
    assert first == address.first_cell(first)
    there = address.first_cell(first, "a/b")
    assert "git+https://github.com/a/b" in there and address.first_cell(there, None) == address.first_cell(first, None)


@each
def test_smoke_sets_parameters_that_there_are(path):
    """Each parameter that the smoke run sets exists in the notebook.

    papermill would ignore a misspelt parameter and run the notebook at full size.
    """
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


def test_readme_has_each_in_order():
    assert [cells(path, "markdown")[0][1].split(".")[0] for path in NOTEBOOKS] == [f"# {n}" for n in range(1, 7)]
    assert f"<!-- notebooks -->\n{address.table()}<!-- end of notebooks -->" in README
    assert address.table("a/b").count("](https://colab.research.google.com/github/a/b/blob/main/notebooks/") == 6


def test_no_link_leads_to_an_address_that_does_not_exist():
    """pyproject.toml and CITATION.cff take the repository's address from one constant.

    If there is no address, no page has a link to the repository.
    """
    for name, made in (("pyproject.toml", address.urls()), ("CITATION.cff", address.citation())):
        assert re.search(rf"# <!-- (\w+) -->\n{re.escape(made)}# <!-- end of \1 -->", (ROOT / name).read_text())
    if address.ADDRESS is None:
        pages = [ROOT / "README.md", *NOTEBOOKS, *(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
        assert not [
            page for page in pages if re.search(r"OWNER/REPO|colab\.research|github\.com/.*/wmkp", page.read_text())
        ]
