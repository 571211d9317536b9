"""Help: the recipes on one screen, and a suggestion for a misspelled word."""

import dataclasses
import difflib
import inspect
import itertools
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from wmkp.experiments.commands.recipes import DESCRIPTIONS, RECIPES
from wmkp.experiments.config import RULES, InputError, flag


def print_recipes() -> None:
    """What ``wmkp train --help`` prints."""
    rules: dict[str, list[str]] = {}
    for recipe in RECIPES:
        base, rule = recipe.rsplit("-", 1)
        rules.setdefault(base, []).append(rule)
    common = [name for name in next(iter(rules.values())) if all(name in names for names in rules.values())]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("base", no_wrap=True)
    table.add_column("further rules", no_wrap=True)
    table.add_column("what it is")
    for base, names in rules.items():
        table.add_row(
            base, " ".join(n for n in names if n not in common), DESCRIPTIONS[f"{base}-{names[0]}"].split("; ", 1)[1]
        )
    console = Console()
    with console.capture() as drawn:
        console.print(table)
    used = ", ".join(f"{rule} {RULES[rule]}" for rule in dict.fromkeys(itertools.chain(*rules.values())))
    print(
        "usage: wmkp train RECIPE [OPTIONS]\n\nTrains a network under a learning rule. A recipe is a base and a rule, joined by\n"
        "a dash, such as mlp-digits-kp. wmkp train RECIPE --help shows its settings.\n\n"
        f"Every base takes these rules: {' '.join(common)}"
    )
    print("\n".join(line.rstrip() for line in drawn.get().splitlines()))
    print(textwrap.fill(f"{used}. Any other rule: --rule NAME.", 79))


def check(words: list[str], commands: Mapping[str, Any]) -> None:
    """Raises InputError with a suggestion if a command, recipe or option does not exist.

    Args:
      words: the arguments after ``wmkp``.
      commands: for each command a dataclass whose fields are its options, or a function whose parameters are.
    """
    if not words or words[0].startswith("-"):
        return
    command, *rest = words
    if command not in commands:
        raise _unknown("command", command, commands, f"commands: {', '.join(commands)}; see wmkp --help")
    about = f"wmkp {command}"
    if command == "train":
        if not rest or rest[0].startswith("-"):
            raise InputError(
                "wmkp train needs a recipe first: wmkp train RECIPE, such as wmkp train mlp-digits-mkp; see wmkp train --help"
            )
        if rest[0] not in RECIPES:
            raise _unknown("recipe", rest[0], RECIPES, "wmkp train --help lists them all")
        about = f"wmkp train {rest[0]}"
    known = _options(commands[command])
    for word in rest:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in (*known, *(f"--no-{x[2:]}" for x in known)):
            raise _unknown("option", name, known, f"{about} --help lists them all")


def _options(takes: Any) -> list[str]:
    names = (
        [f.name for f in dataclasses.fields(takes)]
        if dataclasses.is_dataclass(takes)
        else inspect.signature(takes).parameters
    )
    return [*map(flag, names), "--help"]


def _unknown(kind: str, word: str, known: Iterable[str], more: str) -> InputError:
    near = nearest(word, known)
    return InputError(f"there is no {kind} {word}" + (f"; did you mean {near}?" if near else "") + f"\n{more}")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The likely meaning: a word with this beginning, with these initials (``--lr``), or with a similar spelling."""
    known = list(known)
    begin = [x for x in known if x.startswith(word)]
    initials = [x for x in known if "".join(part[0] for part in x.strip("-").split("-")) == word.strip("-")]
    return next(iter([*begin, *initials, *difflib.get_close_matches(word, known, 1)]), None)
