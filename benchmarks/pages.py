"""Writes the results of ``wmkp compare`` and ``python -m benchmarks`` into the pages, as tables and a picture."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import tyro

import benchmarks
from benchmarks import address, compiled, engaged, figures, mirror_cost
from benchmarks import mirrors as mirrors_table

ROOT = Path(__file__).parent.parent

# The marked places that measurements fill. The function of the same name writes each.
PLACES = {
    "docs/performance.md": ("cost", "memory", "scaling", "mirror", "transforms", "peers"),
    "docs/mirror.md": ("mirrors",),
    "docs/results.md": ("resnet20", "training"),
    "docs/compiled.md": ("engaged_compiled", "mirror_compiled", "largest_compiled"),
}


def pages(comparison: Path | None = None, every_rule: Path | None = None) -> None:
    """Fills the marked places of the pages with measurements and addresses, and with the given comparisons.

    Args:
      comparison: the directory that ``wmkp compare`` wrote, for the picture.
      every_rule: the directory that ``wmkp compare --rules all --out comparison-all`` wrote, for the table.
    """
    for page, names in PLACES.items():
        for name in names:
            fill(page, name, globals()[name]())
    fill("README.md", "notebooks", address.table())
    fill("pyproject.toml", "urls", address.urls())
    fill("CITATION.cff", "address", address.citation())
    address.write_first_cells()
    if comparison is not None:
        shutil.copy(comparison / "comparison.png", ROOT / "docs" / "comparison.png")
    if every_rule is not None:
        fill("docs/rules.md", "rules", (every_rule / "comparison.md").read_text())


def table(head: list[str], rows: list[list[str]], numbers: int) -> str:
    """A Markdown table whose last ``numbers`` columns are right-aligned."""
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    return (
        "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))
        .replace("|  |", "| |")
        .replace("|  |", "| |")
    )


def results(name: str) -> dict[str, benchmarks.Row]:
    """Reads one file of ``results`` and returns its rows by name."""
    return {row.name: row for row in benchmarks.read(benchmarks.RESULTS / f"{name}.json")}


def cost() -> str:
    """The time of each rule's engaged step relative to backprop, one row per model of ``results/engaged.json``."""
    rows, lines = results("engaged"), []
    columns = [(rule, under) for under in ("BP", "BP by patches") for rule in ("KP", "FA, WM")]
    for name in engaged.SIZES:
        found = [rows.get(f"{name}: {rule} over {under}, time") for rule, under in columns]
        values = ["" if row is None or row.value is None else f"{row.value:.2f}" for row in found]
        lines.append([name, rows[f"{name}: KP over BP, time"].note.split(";")[0], *values])
    return table(["model", "", *(f"{rule} / {under}" for rule, under in columns)], lines, len(columns))


def memory() -> str:
    """The peak memory of an engaged step relative to backprop with B, from ``results/engaged.json``."""
    rows, lines = results("engaged"), []
    for name in engaged.SIZES:
        found = [rows.get(f"{name}: {rule}, peak bytes over BP's and B's") for rule in ("KP", "FA, WM")]
        lines.append([name, *("" if row is None or row.value is None else f"{row.value:.3f}" for row in found)])
    return table(["model", "KP", "FA, WM"], lines, 2)


def mirrors() -> str:
    """Weight mirrors and mirrored Kolen-Pollack, at their defaults, compared with backprop."""
    return mirrors_table.table()


def scaling() -> str:
    """The time of a Kolen-Pollack step relative to backprop in dense layers, from ``results/scaling.json``."""
    lines = []
    for name, row in results("scaling").items():
        if found := re.fullmatch(r"KP over BP, dense layers, (\w+ \d+)", name):
            lines.append([found[1], row.note.split("; ")[1], f"{row.value:.2f}"])
    return table(["dense layers", "", "KP / BP"], lines, 1)


def mirror() -> str:
    """The cost of mirroring at 224 pixels and batch 256, and its angles, from ``results/mirror_cost.json``."""
    rows, lines = results("mirror_cost"), []
    for name in ("ResNet-18", "ResNet-50"):
        spent = [rows[f"{name} at 224, batch 256: mirror over engaged, {what}"] for what in ("operations", "time")]
        angle = next(r for key, r in rows.items() if re.match(f"{name}: .*: worst angle at an engaged step", key))
        every = spent[0].detail["every"]
        shares = [f"{100 * (row.value or 0):.1f} %" for row in spent]
        before = angle.note.rsplit("before mirroring ", 1)[1]
        lines.append(
            [name, "every step" if every == 1 else f"every {every} steps", *shares, f"{angle.value:.1f}°", f"{before}°"]
        )
    head = [
        "model",
        "mirror step",
        "extra operations",
        "extra time",
        "worst angle, engaged",
        "worst angle, before mirroring",
    ]
    return table(head, lines, 4)


def transforms() -> str:
    """The time of a mirror step relative to its two matrix products, from ``results/mirror_cost.json``."""
    rows, lines = results("mirror_cost"), []
    for name in mirror_cost.RUNS:
        found = [
            rows[f"{name}, {noise}: mirror step over its products"]
            for noise in ("orthogonal", "rademacher", "gaussian")
        ]
        lines.append([name, *(f"{row.value:.2f}" for row in found)])
    return table(["model", "orthogonal noise", "random signs", "Gaussian"], lines, 3)


def peers() -> str:
    """The times of other libraries relative to wmkp, from ``results/peers.json``."""
    rows = [row for row in results("peers").values() if row.value is not None]
    return table(
        ["time", "ratio"], [[row.name, f"{row.value:.2f}"] for row in rows if "alone, by PyTorch" not in row.name], 1
    )


def resnet20() -> str:
    """The paper's comparison of the algorithms, with ResNet-20, from ``results/figures``."""
    lines, where = figures.section("akrout-resnet20").split("\n"), "benchmarks/results/figures/akrout-resnet20"
    table = [line for line in lines if line.startswith("|")]
    return "\n".join(
        [*table, "", f"![Test error, matrix angles and delta angles against the epoch](../{where}/curves.png)", ""]
    )


# Rows of ``training``: the recipe, its description, the number shown.
TRAINED = (
    ("decoder-characters", "Transformer, characters, 400 steps: nats", "test_loss", ".3f"),
    ("vit-mnist", "ViT-Ti, MNIST, 400 steps: test error %", "test_error_percent", ".2f"),
    ("resnet20-cifar10", "ResNet-20, CIFAR-10 (a JPEG copy), 2 epochs: test error %", "test_error_percent", ".2f"),
)


def training() -> str:
    """Short runs of ``wmkp train``, from ``results/training.json``: a number and the mean matrix angle."""
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


def programs_compiled() -> list[tuple[str, str, str, dict[str, Any]]]:
    """Each program of ``results/tpu.json`` and ``gpu_compiled.json``: target, model, step, figures."""
    files = [benchmarks.RESULTS / f"{name}.json" for name in ("tpu", "gpu_compiled")]
    programs = [json.loads(path.read_text())["programs"] for path in files if path.exists()]
    found: list[Any] = [(*key.split(": "), figures) for some in programs for key, figures in some.items()]
    return sorted(found, key=lambda row: (list(compiled.TARGETS).index(row[0]), list(compiled.MODELS).index(row[1])))


def engaged_compiled() -> str:
    """Engaged steps relative to backprop, compiled for described devices."""
    found, lines = programs_compiled(), []
    plain, kernels = {(target, model): p for target, model, step, p in found if step == "BP"}, "kernels' bytes"
    for target, model, step, p in found:
        bp = plain.get((target, model))
        if bp is None or "flops" not in p or step == "BP" or step.endswith("mirror"):
            continue
        moved = compiled.moved(f"{target}: {model}: {step}", p, bp)
        sent, its = (sum(c["bytes"] for c in x["collectives"].values()) for x in (p, bp))
        lines.append(
            [
                target, model, f"KP, {step}" if step in ("pmap", "shard_map") else step, f"{p['flops'] / bp['flops']:.3f}",
                f"{sum(p['products'].values())} / {sum(bp['products'].values())}",
                f"{p['temporaries'] / bp['temporaries']:.3f}", f"{p[kernels] / bp[kernels]:.3f}",
                f"{p[kernels] / (bp[kernels] + moved):.3f}",
                f"{p['copies']['of weights']} / {bp['copies']['of weights']}", f"{sent / its:.3f}" if its else "",
            ]
        )  # fmt: skip
    head = [
        "target",
        "model",
        "rule",
        "operations",
        "products",
        "temporaries",
        "bytes",
        "allowed bytes",
        "copies",
        "collectives' bytes",
    ]
    return table(head, lines, 7)


def mirror_compiled() -> str:
    """Mirror steps relative to the engaged steps between them, compiled for described devices."""
    found, lines = programs_compiled(), []
    plain = {(target, model): p for target, model, step, p in found if step == "BP"}
    for target, model, step, p in found:
        if (bp := plain.get((target, model))) is None or not step.endswith("mirror"):
            continue
        percent = [f"{100 * share:.2f} %" for share in compiled.shares(step, p, bp)]
        rule, every = step.removesuffix(" mirror"), str(compiled.every(step))
        lines.append([target, model, rule, every, *percent, f"{p['temporaries'] / 2**20:.0f} MiB"])
    return table(["target", "model", "rule", "engaged steps between", "operations", "bytes", "temporaries"], lines, 4)


def largest_compiled() -> str:
    """The largest batch that fits a device."""
    found = {f"{a}: {b}: {c}": p["batch"] for a, b, c, p in programs_compiled() if "batch" in p}
    lines = [
        [*key.split(": ")[:2], str(batch), str(found.get(key.replace(": BP,", ": KP,"), ""))]
        for key, batch in found.items()
        if ": BP," in key
    ]
    return table(["target", "model", "BP", "KP"], lines, 2)


def fill(page: str, name: str, content: str) -> None:
    """Writes ``content`` between ``<!-- name -->`` and ``<!-- end of name -->``."""
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
