"""Collects the results of ``wmkp reproduce``, and writes RESULTS.md from them. No number is typed by hand.

``python -m benchmarks.figures runs/akrout-mnist ...`` copies the CSV files, pictures and provenance of these directories
to ``benchmarks/results/figures``. Then it writes RESULTS.md from that directory. Without arguments it only writes RESULTS.md.
New runs are added to earlier runs with the same settings, whatever their commit and day.
"""

import csv
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import tyro

import benchmarks
from wmkp.experiments.commands import published, reproduce, verdicts
from wmkp.experiments.commands.recipes import RECIPES
from wmkp.experiments.runs import logs

ROOT = Path(__file__).parent.parent
KEPT = benchmarks.RESULTS / "figures"

# What each figure shows, in the order of the page.
TEXTS = {
    "language": (
        "Language: a Transformer on characters",
        "A decoder-only Transformer reads Python's own help texts, character by character. It has 2 blocks of width 64 and is "
        "trained by AdamW (learning rate 2e-3, decay 0.05, cosine) on windows of 128 characters. This is a small run of 405 "
        "steps, sized for two CPU cores; its loss levels off because the learning rate ends at zero. `wmkp reproduce language --epochs 8` is longer; the recipes `decoder-characters-*` are larger "
        "(3 blocks of width 128). KP from a random start has no time to align: AdamW's decay times the learning rate would need "
        "some 10,000 steps.",
    ),
    "residual": (
        "A pre-norm residual perceptron on CIFAR-10",
        "Pixels enter a residual stream of width 256. Each of 4 blocks adds W2 relu(W1 LayerNorm(x)), both layers 256 wide. "
        "AdamW, learning rate 1e-3, decay 0.01, cosine. The published errors (arXiv 2606.21126) are after 100 epochs; the "
        "details of the published block are not known, so ours may differ. `--epochs 100` runs the published length.",
    ),
    "hundred-classes": (
        "A hundred classes of ImageNet photographs",
        "A ResNet-18 of a quarter of the width on Tiny ImageNet-100, at 16x16. SGD, learning rate 0.1, cosine, decay 5e-4. One "
        "short run of each rule, sized for two CPU cores: even backprop learns little of a hundred classes in it. In the paper "
        "sign symmetry falls far behind backprop on many classes. Here it falls behind more than it does on CIFAR-10's ten, and "
        "less than feedback alignment. KP starts from a random B, and the run is too short for it to align.",
    ),
    "akrout-mnist": (
        "The curves published with the paper's code: MNIST",
        "784-500-10, with every setting of the NumPy code that was published with Akrout et al. (2019). The data are in the "
        "order in which MNIST was published, and are never shuffled. The outputs are ten independent sigmoids. A bias learns 128 "
        "times more slowly. WM's noise is uniform in [-0.05, 0.05], its response is a sigmoid with the bias kept, and its B grows "
        "without decay. Ours is float32, the published float64. A published delta angle is that of the first training example, "
        "and so is ours. Beside it stand the mean and the standard deviation over the first 128 examples.",
    ),
    "akrout-cifar10": (
        "The curves published with the paper's code: CIFAR-10",
        "3072-1000-10, as above. Our copy of CIFAR-10 has been through JPEG (quality 75, colour at half size) and has an order of "
        "its own. So its first example is not the published one, and the mean over 128 examples says more. Late in the run, loss "
        "and accuracy jump under BP, WM and KP, in ours and in the published, at different epochs. There a single epoch says "
        "little. FA's accuracy jumps from epoch to epoch in both. The next section shows what the order of the data does, and "
        "the one after it what JPEG does.",
    ),
    "akrout-orders": (
        "What the order of the data does to the first epochs",
        "BP again, in the dataset's own order and in others drawn at random. Each order is kept from epoch to epoch, as the "
        "published code kept its own. So every epoch of a curve ends on the same batches, which moves its test accuracies in one "
        "direction. The training loss is a mean over the epoch and hardly shows it. MNIST's own order is the published one. "
        "CIFAR-10's is that of our copy.",
    ),
    "akrout-jpeg": (
        "What JPEG does to the accuracy",
        "CIFAR-10's experiment under BP on our copy's images, and on the same images put through JPEG once more. Order, weights "
        "and all else are equal, so the pixels alone make the difference. The second JPEG's blocks begin 4 pixels off; on the "
        "first one's blocks it would change next to nothing. It changes colour less than the first did, because colour is at "
        "half size already. So the first one did rather more than this.",
    ),
    "akrout-mended": (
        "What each quirk changes",
        "The MNIST experiment with one thing changed. `shuffled`: each epoch in another order. `decay`: weight decay of W and B, "
        "on which Kolen-Pollack's convergence rests (eq. 14), or a B that settles at W^T. `linear`, `default`: the library's own "
        "mirror (Gaussian noise, a linear response, no bias, a leaky average), from the published 128 samples and from the 2,383 "
        "that leave 6 degrees. `exact`: orthogonal noise after each step. `kpm`: an exact mirror once, before training. With "
        "B = W^T, WM is BP at WM's learning rate, a quarter of BP's here. The published WM learns faster because its B grows.",
    ),
    "akrout-resnet20": (
        "Algorithm comparison and learning the transpose: ResNet-20, CIFAR-10",
        "The paper's two ImageNet figures at a small size: test error and every layer's angles against the epoch. SGD, learning "
        "rate 0.1 with a cosine schedule, momentum 0.9, weight decay 5e-4. Images are 16x16, padded, cropped and flipped. "
        "BatchNorm comes before the ReLU. WM mirrors after every step and is set to leave 5 degrees. One run of each rule: KPM "
        "is backprop to rounding, so its distance from BP shows how far rounding alone takes two runs apart.",
    ),
    "akrout-tiny": (
        "Algorithm comparison and learning the transpose: ResNet-18, Tiny ImageNet-100",
        "The same with 100 classes of ImageNet at 64x64.",
    ),
    "akrout-imagenet": (
        "The ImageNet recipe",
        "First steps of the full recipe, and the hours that 90 epochs would take on this machine. Memory is the compiler's own "
        "account of a step of the recipe's batch in float32: what it is given, and what it needs besides. The data are a sample "
        "of 160 images, 40 to test on, and warm-up and mirror period are shortened with the run. So errors and angles show only "
        "that steps are taken. WM mirrors after every 4 steps. ResNet-50 under B is faster than BP, because wmkp takes "
        "convolutions' weight gradients by patches on CPUs. Rates are of four steps, one run after another, and differ by up to a "
        "fourth between rules that do the same work; the benchmarks compare them properly.",
    ),
    "biotorch-lenet": (
        "BioTorch's table: LeNet on MNIST",
        "LeNet under the rules that BioTorch publishes, and under KP and WM. SS is its uSF. Batch, epochs, momentum, decay and "
        "schedule are BioTorch's. The learning rate, 0.01, is ours. Gradients are clipped at a norm of 1; without that FA and DFA "
        "run away. Our errors, of the last epoch, are below its errors, of the best epoch, under every rule, BP included. So the "
        "recipes differ, and a rule is to be compared with the BP of its own recipe. One run of each rule.",
    ),
}
MAIN = ("language", "residual", "hundred-classes", "akrout-resnet20", "akrout-mnist", "biotorch-lenet")
APPENDIX = "RESULTS-APPENDIX.md"
LEGEND = (
    "BP: backprop. FA: feedback alignment. DFA: direct feedback alignment. SS: sign symmetry. KP: Kolen-Pollack from a random "
    "start. KPM: the same from a mirrored start. MKP: mirrored Kolen-Pollack. WM: weight mirror. PFA: product feedback "
    "alignment. Frozen: the hidden layers stay as they were drawn, and the readout alone learns. A matrix angle is the angle "
    "between B and W^T. A delta angle is the angle between the error that a rule carries and backprop's. 0 degrees is "
    "backprop; 90 degrees is nothing in common."
)
HEAD = (
    "# Results\n\nWeight mirrors and mirrored Kolen-Pollack end where backprop ends: on a small conv net over five seeds, and on a "
    "small Transformer and a residual perceptron over three. Feedback alignment and sign symmetry end behind it. The other runs have one seed each; there, a gap of a point or less means nothing. Two "
    "CPU cores made all of them. The paper's ImageNet results have not been reproduced.\n\n"
    f"{LEGEND}\n\nEvery table was written by `python -m benchmarks.figures` from the runs' own files. Special runs are in the "
    f"[appendix]({APPENDIX}): CIFAR-10 by the paper's code, orders of data, JPEG, quirks, the ImageNet recipe."
)
APPENDIX_HEAD = (
    f"# Appendix to the results\n\nOlder and special runs; [RESULTS.md](RESULTS.md) has the main ones. {LEGEND}"
)


def take(directory: Path) -> None:
    """Copies a figure's CSV files, pictures and provenance. Removes the paths of the machine that it ran on."""
    if (directory / "comparison.md").exists():
        (KEPT / "compare").mkdir(parents=True, exist_ok=True)
        for name in ("comparison.md", "comparison.csv", "comparison.png"):
            shutil.copy(directory / name, KEPT / "compare")
        return
    if not (directory / "run.json").exists():
        sys.exit(f"{directory} is not of wmkp reproduce: it has no run.json")
    run = json.loads((directory / "run.json").read_text())
    kept = KEPT / run["figure"]
    words, hidden = [], False
    for word in run["command"].split():
        words.append("DIR" if hidden else word)
        hidden = word in ("--data-dir", "--reference", "--out")
    run["command"] = " ".join(words)
    earlier = kept / "run.json"
    if run["figure"] in reproduce.CURVES and earlier.exists():
        there = json.loads(earlier.read_text())
        if run["epochs"] < there["epochs"] or not there["variants"].keys() <= run["variants"].keys():
            sys.exit(f"{directory} has fewer epochs or curves than {kept}; delete that first, or run the rest")
    if (
        run["figure"] in reproduce.BATTERIES
        and earlier.exists()
        and _alike(there := json.loads(earlier.read_text()), run)
    ):
        also = [*there.pop("also", []), there]
        for record in also:
            record["runs"] = {name: x for name, x in record["runs"].items() if name not in run["runs"]}
        run["also"] = [record for record in also if record["runs"]]
    files = list(directory.glob("*.csv"))
    curves = not any(settings.get("steps") for settings in run.get("runs", {}).values())  # one point is no curve
    if curves:
        files += directory.glob("*.png")
    others = [name for record in run.get("also", []) for name in record["runs"]]
    summary = [line for line in _lines(kept / "summary.csv") if line["run"] in others] if others else []
    if kept.exists():
        for path in kept.iterdir():
            if path.stem not in others:
                path.unlink()
    kept.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copy(path, kept)
    earlier.write_text(json.dumps(run, indent=1) + "\n")
    if others:
        order = reproduce.BATTERIES[run["figure"]].runs
        summary = sorted([*summary, *_lines(directory / "summary.csv")], key=lambda line: order.index(line["run"]))
        reproduce.write(kept / "summary.csv", summary)
        if curves:
            names = [line["run"] for line in summary]
            tests = {name: [logs.read(kept / f"{name}.csv")] for name in names}
            reproduce.draw(kept, tests, {name: RECIPES[name].rule for name in names}, "test_error_percent")


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two figures' runs have the same settings, except the rule."""
    first, second = (next(iter(run["runs"].values())) | {"rule": ""} for run in (one, other))
    return first == second


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a figure's summary."""
    with path.open() as file:
        return [
            {name: x if name in ("run", "what", "dataset") else float(x or "nan") for name, x in row.items()}
            for row in csv.DictReader(file)
        ]


def section(figure: str) -> str:
    """A figure's part of RESULTS.md."""
    kept = KEPT / figure
    run = json.loads((kept / "run.json").read_text())
    summary = _lines(kept / "summary.csv")
    if figure in reproduce.BATTERIES:
        summary.sort(key=lambda line: reproduce.BATTERIES[figure].runs.index(line["run"]))
    title, text = TEXTS[figure]
    if figure != "akrout-imagenet":  # only benchmarks measure throughput: these runs may have shared their machine
        summary = [{name: x for name, x in line.items() if name != "examples_per_second"} for line in summary]
    headings, *lines = reproduce.table(summary)
    whats = [line["what"] for line in summary]
    table = [[headings[0], "what", *headings[1:]]] + [
        [line[0], what, *line[1:]] for line, what in zip(lines, whats, strict=True)
    ]
    text = f"{text} {reproduce.verdict(figure, summary, kept)}".strip()
    caption = reproduce.caption(summary)
    if all("accuracy_quarter_4" in line for line in summary):
        for name, digits in (("accuracy", 2), ("train_loss", 3)):
            table[0].append(f"{name.replace('_', ' ')}, difference by quarters")
            for row, line in zip(table[1:], summary, strict=True):
                found = [(line[key := f"{name}_quarter_{i}"], line[f"{key}_error"]) for i in (1, 2, 3, 4)]
                row.append(verdicts.quartered([x for x in found if not math.isnan(x[0])], digits))
        caption += " By quarters of the epochs: ours less the published, the mean over every tenth epoch and its standard error."
    pictures = sorted(kept.glob("*.png"))  # the curves first
    table.insert(1, ["---", "---", *["---:"] * (len(table[0]) - 2)])
    parts = [
        f"## {title}",
        text,
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table),
        f"{caption} {_length(figure, run, summary)}",
        *(f"![{figure}]({path.relative_to(ROOT)})" for path in pictures[:1]),
        f"{' '.join(map(_made, [*run.get('also', []), run]))} Files: [{figure}](benchmarks/results/figures/{figure})"
        + "".join(f", [picture of the {path.stem}]({path.relative_to(ROOT)})" for path in pictures[1:])
        + ".",
    ]
    return "\n\n".join(parts)


def _made(run: dict[str, Any]) -> str:
    """Says which command made the runs, from which code, where and when."""
    machine = run["machine"]
    begun = "".join(f", begun at {record['commit']}" for record in run.get("before", [])[:1])
    return (
        f"`{run['command']}`, commit {run['commit']}{begun}, {machine['cpu']} with {machine['cores']} cores "
        f"({', '.join(run['devices'])}), jax {run['versions']['jax']}, {run['date'][:10]}."
    )


def _length(figure: str, run: dict[str, Any], summary: list[dict[str, Any]]) -> str:
    """Says how much of the full experiment was run."""
    if figure not in reproduce.BATTERIES:
        took = f" All trained in {run['seconds']} s." if "seconds" in run else ""
        return f"{run['epochs']} epochs; the published curves have {published.EPOCHS}.{took}"
    settings = next(iter(run["runs"].values()))
    size = f" Images of {settings['image_size']}x{settings['image_size']}." if settings["image_size"] else ""
    steps = f"{settings['steps']} steps" if settings["steps"] else f"{settings['epochs']:g} epochs"
    whole = reproduce.BATTERIES[figure].changes.get("epochs", RECIPES[next(iter(run["runs"]))].epochs)
    return f"{steps} of batches of {settings['batch_size']}; the whole figure has {whole:g} epochs.{size}"


def main(directories: tyro.conf.Positional[tuple[Path, ...]] = ()) -> None:
    """Collects directories of ``wmkp reproduce``, and writes RESULTS.md.

    Args:
      directories: each has a run.json, or comes from ``wmkp compare``. With none, the pages are only written.
    """
    for directory in directories:
        take(directory)
    there = [figure for figure in TEXTS if (KEPT / figure / "summary.csv").exists()]
    missing = [figure for figure in TEXTS if figure not in there]
    head = HEAD
    if (KEPT / "compare" / "comparison.md").exists():
        head += "\n\n" + compared()
    if missing:
        head += f"\n\nNot run yet, and so not here: {', '.join(missing)}."
    main_part = [figure for figure in MAIN if figure in there]
    (ROOT / "RESULTS.md").write_text("\n\n".join([head, *map(section, main_part)]) + "\n")
    rest = [figure for figure in there if figure not in MAIN]
    (ROOT / APPENDIX).write_text("\n\n".join([APPENDIX_HEAD, *map(section, rest)]) + "\n")


def compared() -> str:
    """The section about ``wmkp compare``, from the files that it wrote."""
    kept = KEPT / "compare"
    picture = f"![wmkp compare]({(kept / 'comparison.png').relative_to(ROOT)})"
    text = (
        "`wmkp compare` trains five 3x3 convolutions on scikit-learn's digits from five seeds. All rules share initial weights "
        "and data order, seed by seed."
    )
    return f"## The rules side by side\n\n{text}\n\n{(kept / 'comparison.md').read_text().strip()}\n\n{picture}"


if __name__ == "__main__":
    tyro.cli(main)
