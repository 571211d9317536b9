"""The documentation's build: pages in Markdown, the API from its docstrings, mathematics as MathML (no script, no network)."""

import dataclasses
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import wmkp
from wmkp.experiments import config
from wmkp.experiments.commands import recipes

project = "wmkp"
copyright = "the authors of wmkp; Apache-2.0"
version = release = wmkp.__version__

# The notebooks are pages too: with the outputs that they are kept with, not executed here.
DOCS = Path(__file__).parent
shutil.rmtree(DOCS / "notebooks", ignore_errors=True)
(DOCS / "notebooks").mkdir()
for notebook in (DOCS.parent / "notebooks").glob("*.ipynb"):
    shutil.copy(notebook, DOCS / "notebooks")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
autodoc_typehints_format = "short"
autosummary_generate = False
maximum_signature_line_length = 100
python_use_unqualified_type_names = True
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
toc_object_entries_show_parents = "hide"
smartquotes_action = "D"  # dashes alone

exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"wmkp {release}"
html_math_renderer = "mathml"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme_options = {"navigation_with_keys": True}


def _mathml(translator: Any, node: Any, display: bool) -> None:
    try:
        html = tex2mathml(node.astext(), as_block=display).replace("<mo>'</mo>", "<mo>′</mo>")
    except MathError as error:
        logging.getLogger(__name__).warning("%s in the formula %s", error, node.astext(), location=node)
        html = ""
    translator.body.append(f'<div class="math">{html}</div>' if display else html)
    raise nodes.SkipNode


def _definitions(items: Iterable[tuple[str, str, str]]) -> list[nodes.Node]:
    """A definition list of (what is typed, what stands beside it, what it means)."""
    result = nodes.definition_list(classes=["settings"])
    for typed, beside, text in items:
        term = nodes.term("", "", nodes.literal(text=typed), nodes.Text("  "), *_flags(beside))
        meaning = nodes.definition("", nodes.paragraph("", "", *_flags(text)))
        result += nodes.definition_list_item("", term, meaning)
    return [result]


def _flags(text: str) -> list[nodes.Node]:
    """Text whose flags are set as code."""
    parts = re.split(r"(--[a-z-]+)", text)
    return [nodes.literal(text=part) if i % 2 else nodes.Text(part) for i, part in enumerate(parts)]


class Settings(SphinxDirective):
    """The fields of one of the command line's configs: flag, default and the field's own docstring."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """A definition list."""
        cls = getattr(config, self.arguments[0])
        docs = ModuleAnalyzer.for_module(config.__name__).find_attr_docs()
        hints = get_type_hints(cls, include_extras=True)

        def default(field: dataclasses.Field[Any]) -> str:
            if field.default is dataclasses.MISSING:
                return "one of " + ", ".join(get_args(get_args(hints[field.name])[0]))
            if isinstance(field.default, bool):
                return "(on by default)" if field.default else ""
            if field.default is None:  # the command's own help says what stands for it, or the field's docstring does
                metadata = getattr(hints[field.name], "__metadata__", ())
                return str(metadata[0].help_behavior_hint) if metadata else ""
            return " ".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)

        return _definitions(
            (
                field.name.upper() if field.default is dataclasses.MISSING else config.flag(field.name),
                default(field),
                " ".join(docs[cls.__name__, field.name]).strip(),
            )
            for field in dataclasses.fields(cls)
        )


class Recipes(SphinxDirective):
    """The bases of recipes and the rules that each may be joined with."""

    def run(self) -> list[nodes.Node]:
        """A definition list."""
        rules: dict[str, list[str]] = {}
        for recipe in recipes.RECIPES:
            base, rule = recipe.rsplit("-", 1)
            rules.setdefault(base, []).append(rule)
        about = {base: recipes.DESCRIPTIONS[f"{base}-{names[0]}"].split("; ", 1)[1] for base, names in rules.items()}
        return _definitions((base, "", f"{about[base]}; with {', '.join(names)}") for base, names in rules.items())


class RuleNames(SphinxDirective):
    """What the command line calls the rules."""

    def run(self) -> list[nodes.Node]:
        """A paragraph."""
        paragraph = nodes.paragraph()
        for short, name in config.RULES.items():
            paragraph += [nodes.literal(text=short), nodes.Text(f" {name}; ")]
        paragraph[-1] = nodes.Text(f" {name}.")
        return [paragraph]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    inline, block = ((lambda t, n, d=d: _mathml(t, n, d), None) for d in (False, True))
    app.add_html_math_renderer("mathml", inline, block)
    for name, directive in (("settings", Settings), ("recipes", Recipes), ("rule-names", RuleNames)):
        app.add_directive(name, directive)
