"""The pages: their code runs, their output and quotes are right, and every public name has an entry."""

import ast
import contextlib
import doctest
import functools
import inspect
import io
import re
import shlex
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import wmkp
import wmkp.nnx
from benchmarks import pages

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks(page, language):
    """The (line, code) of each fenced block in a language."""
    text = page.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text[: m.start()].count("\n") + 2, m[1]) for m in found]


# --- code -------------------------------------------------------------------------------------------------------------


def readers_own():
    """The names of a small model, which README.md and index.md assume."""
    params = {"l1": jnp.ones((4, 6)) / 2, "l2": jax.random.normal(jax.random.key(3), (6, 5)) / 2}
    batch = (jax.random.normal(jax.random.key(2), (8, 4)), jnp.arange(8) % 5)

    def loss_fn(params, batch):
        logits = jnp.tanh(batch[0] @ params["l1"]) @ params["l2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    rule = wmkp.kolen_pollack()
    feedback = wmkp.init_feedback(jax.random.key(1), rule, loss_fn, params, batch)
    return {
        "jax": jax,
        "wmkp": wmkp,
        "params": params,
        "batch": batch,
        "batches": [batch] * 3,
        "loss_fn": loss_fn,
        "plain": loss_fn,
        "rule": rule,
        "feedback": feedback,
    }


# The README's "..." stands for the reader's model.
ELLIPSIS = "    ...\n"
LOSS = "    loss, accuracy = plain(params, batch), 0.0\n"


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_code_runs(page, quick_compile):
    """The Python blocks of a page run in order in one namespace and print the text blocks that follow them."""
    namespace = readers_own() if page.name in {"README.md", "index.md"} else {}
    printed = io.StringIO()
    for line, language, code in sorted(
        (n, kind, code) for kind in ("python", "text") for n, code in blocks(page, kind)
    ):
        if language == "text":
            said = code.splitlines()
            assert alike(printed.getvalue().splitlines()[-len(said) :], said), f"{page.name}:{line}"
            continue
        with contextlib.redirect_stdout(printed):
            # With these empty lines a traceback names the page's line.
            exec(compile("\n" * (line - 1) + code.replace(ELLIPSIS, LOSS), page.name, "exec"), namespace)


NUMBER = r"-?\d+\.?\d*(?:e[-+]?\d+)?"


def alike(ours, theirs):
    """Whether the lines have the same words and nearly the same numbers."""
    texts = ["\n".join(" ".join(line.split()) for line in lines) for lines in (ours, theirs)]
    words, numbers = ([f(NUMBER, text) for text in texts] for f in (re.split, re.findall))
    near = all(abs(float(a) - float(b)) <= 0.05 + 0.1 * abs(float(b)) for a, b in zip(*numbers, strict=False))
    return words[0] == words[1] and near


def public():
    """Every public function and class, with its qualified name."""
    for module in (wmkp, wmkp.updates, wmkp.nnx):
        for name in module.__all__:
            if callable(x := getattr(module, name)):
                yield f"{module.__name__}.{name}", x


@pytest.mark.parametrize(("name", "x"), list(public()), ids=lambda x: x if isinstance(x, str) else "")
def test_examples_in_docstrings_run(name, x, quick_compile):
    """Each example runs alone, with only the imports that the API page names."""
    globs = {"jax": jax, "jnp": jnp, "optax": optax, "wmkp": wmkp}
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(x), globs, name, None, 0)
    assert doctest.DocTestRunner().run(test).failed == 0


# --- what the pages say about the code --------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, names in pages.PLACES.items() for name in names])
def test_the_pages_figures_are_those_of_the_results(page, name):
    """The generated parts of a page equal the output of ``benchmarks.pages``."""
    assert f"<!-- {name} -->\n{getattr(pages, name)()}<!-- end of {name} -->" in (ROOT / page).read_text()


def test_every_public_name_has_its_entry():
    entries = set()
    for directive in re.finditer(
        r"^\.\. (currentmodule|auto\w+):: (\w[\w.]*)", (DOCS / "api.md").read_text(), re.MULTILINE
    ):
        if directive[1] == "currentmodule":
            module = directive[2]
        else:
            entries.add(f"{module}.{directive[2]}")
    names = {f"wmkp.{name}" for name in wmkp.__all__} - {"wmkp.updates"}
    for module in (wmkp.updates, wmkp.nnx):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    names |= {f"wmkp.training.{name}" for name in ("batch_sharding", "state_sharding")}
    assert entries == names


@pytest.mark.parametrize(("name", "x"), list(public()), ids=lambda x: x if isinstance(x, str) else "")
def test_docstrings_name_every_argument_and_error(name, x):
    doc = inspect.getdoc(x)
    assert doc
    if inspect.isclass(x):
        if not issubclass(x, Exception):
            fields = [f for f in getattr(x, "_fields", getattr(x, "__dataclass_fields__", ())) if not f.startswith("_")]
            assert not [f for f in fields if not re.search(rf"^  {f}: ", doc.split("Attributes:")[1], re.MULTILINE)]
        return
    parameters = inspect.signature(x).parameters
    if parameters:
        described = (
            re.findall(r"^  (\*?\w+(?:, \*?\w+)*): ", doc.split("Args:")[1], re.MULTILINE) if "Args:" in doc else []
        )
        described = {p.lstrip("*") for group in described for p in group.split(", ")}
        single = len(parameters) == 1 and "Args:" not in doc  # the first line names a single argument
        assert single or set(parameters) <= described
    # Check only the errors that the function itself raises.
    tree = ast.parse(inspect.getsource(x))
    raised = {r.exc.func.id for r in ast.walk(tree) if isinstance(r, ast.Raise) and isinstance(r.exc, ast.Call)}
    assert not raised or "Raises:" in doc
    for error in raised:
        assert error in doc.split("Raises:")[1]


def test_links_lead_somewhere():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            # The build copies the notebooks into docs/.
            path = (ROOT if target.startswith("notebooks/") else page.parent) / target
            assert path.exists(), f"{page.name}: {target}"


def test_one_version():
    assert re.search(r'^dynamic = \["version"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    released = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] in {wmkp.__version__, "Unreleased"} and wmkp.__version__ in released
    assert f"\nversion: {wmkp.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_ci_runs_on_the_oldest_and_the_newest_python():
    said = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert f'requires-python = ">={said[0]}"' in (ROOT / "pyproject.toml").read_text()
    assert f'python: ["{said[0]}", "{said[-1]}"]' in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


# --- the command line -------------------------------------------------------------------------------------------------


def commands():
    for page in PAGES:
        for line, code in blocks(page, "bash"):
            for i, command in enumerate(code.splitlines()):
                for part in command.partition("#")[0].split("&&"):
                    if part.strip().startswith("wmkp "):
                        yield pytest.param(shlex.split(part)[1:], id=f"{page.name}:{line + i}")


@pytest.mark.parametrize("arguments", list(commands()))
def test_commands_are_understood(monkeypatch, arguments):
    from wmkp.experiments.commands import cli

    called = []
    ends = ((cli.compare, "compare"), (cli.train, "train"), (cli.evaluate, "evaluate"), (cli.data, "prepare"))
    for module, name in (*ends, (cli.reproduce, "reproduce")):
        monkeypatch.setattr(module, name, lambda *args: called.append(args))
    monkeypatch.setattr(cli.figures, "runs", lambda runs, suffix: called.append(runs))
    monkeypatch.setattr(cli.outputs, "write_atomically", lambda files: None)
    monkeypatch.setattr(sys, "argv", ["wmkp", *arguments])
    cli.main()
    assert called
    for config in called[0]:
        if hasattr(config, "check"):
            config.check()


def test_every_command_is_on_the_page(monkeypatch, capsys):
    from wmkp.experiments.commands import cli

    monkeypatch.setattr(sys, "argv", ["wmkp", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    names = set(re.search(r"\{([a-z,]+)\}", capsys.readouterr().out)[1].split(","))
    page = (DOCS / "command-line.md").read_text()
    assert {"compare", "train"} <= names == set(re.findall(r"^\| `wmkp ([a-z]+)", page, re.MULTILINE))


def test_flags_in_prose_exist():
    import dataclasses

    from wmkp.experiments import config

    known = {
        config.flag(f.name) for c in (config.Train, config.Compare, config.Reproduce) for f in dataclasses.fields(c)
    }
    known |= {"--help", "--version", "--export", "--step", "--no-", "--no-tensorboard"}
    for page in PAGES:
        said = set(re.findall(r"`[^`\n]*?(--[a-z-]+)", page.read_text()))
        assert said <= known, page.name


# --- messages ---------------------------------------------------------------------------------------------------------


def text_of(node):
    """The text of a string in the code, with … for each inserted value; None for other code."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (text_of(node.left) or "…") + (text_of(node.right) or "…")
    return None


@functools.cache
def strings():
    """Each string as (file, whether it is an error message of the library, string)."""
    found = []
    for file in sorted((ROOT / "wmkp").rglob("*.py")):
        tree = ast.parse(file.read_text())
        errors = {
            n.args[0]
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and n.args and isinstance(n.func, ast.Name) and n.func.id.endswith("Error")
        }
        library = file.parent.name in {"wmkp", "program"}
        found += [(file, node in errors and library, text) for node in ast.walk(tree) if (text := text_of(node))]
    return found


def quotes():
    return re.findall(r"^\| `([^`\n]+)` \| ", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)


def pattern(quote):
    return re.compile(".*".join(map(re.escape, quote.split("…"))), re.DOTALL)


def test_quoted_messages_stand_in_the_code():
    found = [text for _, _, text in strings()]
    assert len(quotes()) > 40
    missing = [p.pattern for p in map(pattern, quotes()) if not any(map(p.search, found))]
    assert not missing


def test_every_message_of_the_library_says_what_to_do_or_is_explained():
    """A message says which value an argument must have, or what to do. The page explains all others."""
    plain = re.compile(r"must (be|have|lie|not be)\b[^.]*; got …$|; got …$|must hold only [^.]*$")
    verbs = "use|pass|give|call|make|return|write|keep|rename|set|leave|compute|continue|differentiate|cast|check|take|bind|put|end|remove|add"
    instruction = re.compile(rf"(?:^|[;.:] |, or |To [^.]*, )(?:{verbs})\b", re.IGNORECASE)
    explained = [pattern(quote) for quote in quotes()]
    missing = [
        f"{file.name}: {text}"
        for file, error, text in strings()
        if error
        and not plain.search(text)
        and not instruction.search(text)
        and not any(p.search(text) for p in explained)
    ]
    assert not missing
