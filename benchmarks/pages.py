"""Puts tables and a picture from ``wmkp compare`` and ``python -m benchmarks`` into the pages: no figure is typed."""

import json
import re
import shutil
from pathlib import Path

import tyro

import benchmarks
from benchmarks import address, engaged, figures, mirror_cost

ROOT = Path(__file__).parent.parent


def pages(comparison: Path | None = None, every_rule: Path | None = None) -> None:
    """Fills the pages' marked places and puts the address in: measurements always, a comparison's tables where it is given.

    Args:
      comparison: what ``wmkp compare`` wrote.
      every_rule: what ``wmkp compare --rules all --out comparison-all`` wrote.
    """
    fill("README.md", "cost", cost())
    fill("README.md", "mirror", mirror())
    fill("README.md", "resnet20", resnet20())
    fill("README.md", "training", training())
    fill("README.md", "scaling", scaling())
    fill("README.md", "peers", peers())
    fill("README.md", "notebooks", address.table())
    fill("pyproject.toml", "urls", address.urls())
    fill("CITATION.cff", "address", address.citation())
    address.write_first_cells()
    if comparison is not None:
        fill("README.md", "table", (comparison / "comparison.md").read_text())
        shutil.copy(comparison / "comparison.png", ROOT / "docs" / "comparison.png")
    if every_rule is not None:
        fill("docs/rules.md", "rules", (every_rule / "comparison.md").read_text())


def cost() -> str:
    """Each rule's engaged step over backprop's, a column for each model of ``results/engaged.json``, and its memory."""
    rows = {row.name: row for row in benchmarks.read(benchmarks.RESULTS / "engaged.json")}
    of = lambda name, row: rows.get(f"{name}: {row}", benchmarks.Row(""))
    heads = [f"{name}, {of(name, 'KP over BP, time').note.split(';')[0]}" for name in engaged.SIZES]
    lines = [["", *heads], ["---"] * (1 + len(heads))]
    for rule, under in (("KP", "BP"), ("FA, WM", "BP"), ("KP", "BP by patches"), ("FA, WM", "BP by patches")):
        values = [of(name, f"{rule} over {under}, time").value for name in engaged.SIZES]
        lines.append([f"{rule} over {under}", *("" if x is None else f"{x:.2f}" for x in values)])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |").replace("|  |", "| |")
    memory = {name: row.value for name, row in rows.items() if "peak bytes" in name and row.value}
    most, worst = max((x, name.split(", peak")[0]) for name, x in memory.items())
    return (
        f"{table}\nBelow 1 is where wmkp takes a convolution's weight gradient by patches on CPUs, which XLA's own backward pass does "
        "not; BP by patches is backprop with the same gradients (an engaged step with W in place of B). Peak memory is backprop's with "
        f"B and its optimizer's state, and up to {100 * (most - 1):.1f} % more ({worst}).\n"
    )


def mirror() -> str:
    """What mirroring costs at 224 and batch 256, by ``results/mirror_cost.json``."""
    rows = {row.name: row for row in benchmarks.read(benchmarks.RESULTS / "mirror_cost.json")}
    held = []
    for name in ("ResNet-18", "ResNet-50"):
        cost = rows[f"{name} at 224, batch 256: mirror over engaged, operations"]
        time = rows[f"{name} at 224, batch 256: mirror over engaged, time"]
        angle = next(r for key, r in rows.items() if re.match(f"{name}: .*: worst angle at an engaged step", key))
        steps = "each engaged step" if cost.detail["every"] == 1 else f"every {cost.detail['every']} engaged steps"
        before = angle.note.rsplit("before mirroring ", 1)[1]
        held.append(
            f"{name} with a mirror step after {steps}: {angle.value:.1f} degrees at most where an error meets B, {before} just before "
            f"the next mirror step, and at 224 and batch 256 {100 * (cost.value or 0):.1f} % more operations by matrix products, "
            f"{100 * (time.value or 0):.1f} % more time by transforms"
        )
    shares = {name: rows[f"{name}, orthogonal: mirror step over its products"].value or 0 for name in mirror_cost.RUNS}
    listed = ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    return (
        f"What mirroring costs, and the angles that it holds, in the first {angle.note.split(',')[0]} images of 64x64 (the learning "
        f"rate rising, orthogonal noise at rate 1): {'; '.join(held)}. With that noise a mirror step "
        "takes transforms in place of its two matrix products (fast ones from 256 inputs on), and this share of their time: "
        f"{listed} "
        "([mirror_cost](benchmarks/results/mirror_cost.json)).\n"
    )


def peers() -> str:
    """How fast peers are beside wmkp, by ``results/peers.json``."""
    rows = [row for row in benchmarks.read(benchmarks.RESULTS / "peers.json") if row.value is not None]
    rows = [row for row in rows if "alone" not in row.name]  # those say how near each is to its limit
    lines = [["time", "ratio"], ["---", "---:"], *([row.name, f"{row.value:.2f}"] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def resnet20() -> str:
    """The paper's comparison of the algorithms at the size of ResNet-20, by ``results/figures``."""
    lines, where = figures.section("akrout-resnet20").split("\n"), "benchmarks/results/figures/akrout-resnet20"
    table = [line for line in lines if line.startswith("|")]
    return "\n".join(
        [*table, "", f"![Test error, matrix angles and delta angles against the epoch]({where}/curves.png)", ""]
    )


# Rows of ``training``: the recipe, what is said of it, the number shown.
TRAINED = (
    ("decoder-characters", "Transformer, characters, 400 steps: nats", "test_loss", ".3f"),
    ("vit-mnist", "ViT-Ti, MNIST, 400 steps: test error %", "test_error_percent", ".2f"),
    ("resnet20-cifar10", "ResNet-20, CIFAR-10 (a JPEG copy), 2 epochs: test error %", "test_error_percent", ".2f"),
)


def training() -> str:
    """Short runs of ``wmkp train``, by ``results/training.json``: a number and the mean matrix angle."""
    runs = {row["run"]: row for row in json.loads((benchmarks.RESULTS / "training.json").read_text())["rows"]}
    lines = [["run", "BP", "KP, mirrored start", "KP, random start", "WM"], ["---"] * 5]
    for base, what, name, form in TRAINED:
        cells = [what]
        for rule in ("bp", "kpm", "kp", "wm"):
            row = runs.get(f"{base}-{rule}")
            angle = (
                "" if row is None or row["matrix_angle_mean_deg"] is None else f" ({row['matrix_angle_mean_deg']:.1f}°)"
            )
            cells.append("" if row is None else f"{row[name]:{form}}{angle}")
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("|  |", "| |")


def scaling() -> str:
    """What B's optimizer takes in dense layers, by ``results/scaling.json``."""
    rows = {row.name: row.value for row in benchmarks.read(benchmarks.RESULTS / "scaling.json")}
    small, large, wide = (rows[f"KP over BP, dense layers, {at}"] for at in ("batch 16", "batch 256", "width 1024"))
    return (
        "Under KP the optimizer has B to move beside W, and copies no B where backprop's step copies W (on CPUs): dense "
        f"layers of 512 units take {small:.2f} at batch 16 and {large:.2f} at 256, of 1,024 units {wide:.2f} at 128 "
        "([scaling](benchmarks/results/scaling.json)).\n"
    )


def fill(page: str, name: str, content: str) -> None:
    """Writes between ``<!-- name -->`` and ``<!-- end of name -->``."""
    text, found = re.subn(
        rf"(<!-- {name} -->\n).*?((?:# )?<!-- end of {name} -->)",
        lambda m: f"{m[1]}{content}{m[2]}",
        (ROOT / page).read_text(),
        flags=re.DOTALL,
    )
    if found != 1:
        raise SystemExit(f"{page} must have one place marked <!-- {name} --> ... <!-- end of {name} -->")
    (ROOT / page).write_text(text)


if __name__ == "__main__":
    tyro.cli(pages)
