"""Puts tables and a picture from ``wmkp compare`` and ``python -m benchmarks`` into the pages: no figure is typed."""

import re
import shutil
from pathlib import Path

import tyro

import benchmarks
from benchmarks import engaged, figures

ROOT = Path(__file__).parent.parent


def pages(comparison: Path | None = None, every_rule: Path | None = None) -> None:
    """Fills the pages' marked places: the engaged steps' cost always, a comparison's tables where it is given.

    Args:
      comparison: what ``wmkp compare`` wrote.
      every_rule: what ``wmkp compare --rules all --out comparison-all`` wrote.
    """
    fill("README.md", "cost", cost())
    fill("README.md", "mirror", mirror())
    fill("README.md", "resnet20", resnet20())
    if comparison is not None:
        fill("README.md", "table", (comparison / "comparison.md").read_text())
        shutil.copy(comparison / "comparison.png", ROOT / "docs" / "comparison.png")
    if every_rule is not None:
        for page in ("README.md", "docs/rules.md"):
            fill(page, "rules", (every_rule / "comparison.md").read_text())


def cost() -> str:
    """Each rule's engaged step over backprop's, a column for each model of ``results/engaged.json``."""
    rows = {row.name: row for row in benchmarks.read(benchmarks.RESULTS / "engaged.json")}
    of = lambda name, rule: rows[f"{name}: {rule} over BP, time"]
    heads = [f"{name}, {of(name, 'KP').note.split(';')[0]}" for name in engaged.SIZES]
    ratios = [[rule, *(f"{of(name, rule).value:.2f}" for name in engaged.SIZES)] for rule in ("KP", "FA, WM")]
    lines = [["", *heads], ["---"] * (1 + len(heads)), *ratios]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |")


def mirror() -> str:
    """What mirroring costs at 224 and batch 256, by ``results/mirror_cost.json``."""
    rows = {row.name: row for row in benchmarks.read(benchmarks.RESULTS / "mirror_cost.json")}
    share, every = {}, 0
    for name in ("ResNet-18", "ResNet-50"):
        row = rows[f"{name} at 224, batch 256: mirror over engaged, operations"]
        share[name], every = f"{100 * (row.value or 0):.1f}", row.detail["every"]
    worst = next(
        row.value for name, row in rows.items() if re.match(r"ResNet-18: .*: worst angle at an engaged step", name)
    )
    return (
        f"A mirror step after every {every} engaged steps, under which ResNet-18's angles were at most {worst:.1f} degrees, adds "
        f"{share['ResNet-18']} % to its operations at 224 and batch 256, and {share['ResNet-50']} % to ResNet-50's "
        "([mirror_cost](benchmarks/results/mirror_cost.json)).\n"
    )


def resnet20() -> str:
    """The paper's comparison of the algorithms at the size of ResNet-20, by ``results/figures``."""
    lines, where = figures.section("akrout-resnet20").split("\n"), "benchmarks/results/figures/akrout-resnet20"
    table = [line for line in lines if line.startswith("|")]
    return "\n".join(
        [*table, "", f"![Test error, matrix angles and delta angles against the epoch]({where}/curves.png)", ""]
    )


def fill(page: str, name: str, content: str) -> None:
    """Writes between ``<!-- name -->`` and ``<!-- end of name -->``."""
    text, found = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)",
        lambda m: f"{m[1]}{content}{m[2]}",
        (ROOT / page).read_text(),
        flags=re.DOTALL,
    )
    if found != 1:
        raise SystemExit(f"{page} must have one place marked <!-- {name} --> ... <!-- end of {name} -->")
    (ROOT / page).write_text(text)


if __name__ == "__main__":
    tyro.cli(pages)
