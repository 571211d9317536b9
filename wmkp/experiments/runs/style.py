"""The style of all figures of the commands, notebooks and benchmarks, in colour and in grey."""

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
TEXT = "#222222"
RC: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "text.parse_math": False,  # a run may have any name
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "wmkp",  # the same picture is the same file
}
styled = mpl.rc_context(RC)  # a decorator for functions that draw
# For notebooks, whose labels have formulas: plt.rcParams |= style.NOTEBOOK.
NOTEBOOK: Any = RC | {
    "text.parse_math": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
}

DOTS, SHORT, LONG, DASHDOT = (0, (1, 1.2)), (0, (3.5, 1.3)), (0, (8, 1.8)), (0, (6, 1.4, 1, 1.4))
# Okabe and Ito's colours, which colour-blind readers can tell apart. Dashes and markers are for print in grey.
STYLES: dict[str, dict[str, Any]] = {
    "bp": {"color": "#000000", "linestyle": "-", "marker": "", "linewidth": 2.4},
    "fa": {"color": "#D55E00", "linestyle": DOTS, "marker": "v"},
    "ss": {"color": "#E69F00", "linestyle": LONG, "marker": "s"},
    "kp": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "mkp": {"color": "#CC79A7", "linestyle": SHORT, "marker": "D"},
    "kpm": {"color": "#56B4E9", "linestyle": DASHDOT, "marker": "^"},
    "wm": {"color": "#009E73", "linestyle": DASHDOT, "marker": "P"},
    "dfa": {"color": "#8C6D31", "linestyle": SHORT, "marker": "X"},
    "pfa": {"color": "#393B79", "linestyle": LONG, "marker": "*"},
    "frozen": {"color": "#888888", "linestyle": DOTS, "marker": "", "linewidth": 2.4},
}
# Lines without their own style take these in turn.
_COLOURS, _MARKS = ("#7F3C8D", "#1D6996", "#73AF48", "#CC503E", "#38A6A5"), ("<", ">", "p", "h")
_DASHES = ("-", SHORT, DASHDOT, DOTS)
OTHERS = [{"color": _COLOURS[i % 5], "linestyle": _DASHES[i % 4], "marker": _MARKS[i % 4]} for i in range(20)]


def figure(width: float, height: float, title: str = "") -> "Figure":
    """A figure without a display, in inches, inside ``styled``; ``save`` draws it."""
    from matplotlib.figure import Figure  # over half of the time that matplotlib takes to import

    made = Figure(figsize=(width, height), layout="constrained")
    if title:
        made.suptitle(title, fontsize=10)
    return made


def save(figure: "Figure", suffix: str = ".png") -> bytes:
    """The figure as a file's bytes in the format of the suffix, at 200 dots per inch."""
    file = io.BytesIO()
    kind = suffix.lower().removeprefix(".") or "png"
    metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a run may have any name
        figure.savefig(file, format=kind, dpi=200, metadata=metadata)
    return file.getvalue()


def check_format(path: Path) -> None:
    """ValueError unless the path's suffix is one of ``FORMATS``."""
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise ValueError(f"{path} must end in {', '.join('.' + kind for kind in FORMATS[:-1])} or .{FORMATS[-1]}")


def plot(axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], look: Mapping[str, Any], index: int) -> None:
    """One line: one run, or the mean over several with a band of one standard error to each side.

    ``index`` numbers the lines of a figure, so that their markers are at different places.
    """
    values = np.asarray(curves, float)
    mean = values.mean(0)
    few = len(x) < 3
    every = None if few else (index * max(1, len(x) // 12) % max(1, len(x) // 4), max(1, len(x) // 4))
    marker = {"marker": look.get("marker") or ("o" if few else ""), "markersize": 4.5, "markevery": every}
    axes.plot(x, mean, **{"linewidth": 1.4, **look, **marker})
    if len(values) > 1:
        spread = values.std(0, ddof=1) / math.sqrt(len(values))
        low = mean - spread
        if axes.get_yscale() == "log":
            low = np.maximum(low, mean / 10)
        axes.fill_between(x, low, mean + spread, color=look["color"], alpha=0.2, linewidth=0)


def finish(axes: Any, *, ylabel: str, xlabel: str = "Epoch", angles: bool = False) -> None:
    """Labels, whole epochs, a grid; ``angles`` sets the axis from 0 to 90 degrees."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if angles:
        axes.set(ylim=(-3, 97), yticks=range(0, 91, 15))  # a line at zero shows
    axes.margins(x=0.03)
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        low, high = axes.dataLim.intervalx
        if 0 <= high - low < 1:  # one or two evaluations within an epoch (infinite if nothing is drawn)
            axes.set_xlim(math.floor(low) - 0.05, (math.ceil(high) if high > low else math.floor(high) + 1) + 0.05)
    low, high = axes.dataLim.intervaly
    if axes.get_yscale() == "log" and low < high < 2 * low:  # too few of a logarithmic axis' numbers
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def logarithmic(axes: Any, steps: tuple[float, ...] = (1, 1.5, 2, 3, 5, 7)) -> None:
    """A logarithmic axis of plain numbers: 1, 1.5, 2, 3, 5, 7, 10, ..."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def legend(figure: "Figure", entries: Sequence[tuple[str, Mapping[str, Any]]], note: str = "") -> None:
    """The legend below the panels, in as many columns as fit, and a note below it."""
    from matplotlib.lines import Line2D

    width = figure.get_size_inches()[0]
    labels = [textwrap.shorten(label, 110, placeholder="…") for label, _ in entries]
    columns = max(1, min(len(labels), int(width / (0.72 + 0.075 * max(map(len, labels), default=1)))))
    handles = [Line2D([], [], **{"linewidth": 1.4, "markersize": 4.5, **look}) for _, look in entries]
    rows = math.ceil(len(labels) / columns)
    columns = math.ceil(len(labels) / max(1, rows))  # rows of like length
    figure.set_size_inches(width, figure.get_size_inches()[1] + 0.19 * rows + (0.2 if note else 0))
    shown = [f" {label}" if label.startswith("_") else label for label in labels]
    names = {"title": note, "title_fontsize": 8} if note else {}
    figure.legend(handles, shown, loc="outside lower center", ncols=columns, frameon=False, handlelength=4, **names)


def code(rule: str) -> str:
    """A rule's name in legends and tables: BP, FA, ..."""
    return "Frozen" if rule == "frozen" else rule.upper()


def looks(rules: Sequence[str]) -> list[dict[str, Any]]:
    """A style for each line: the rule's own the first time, then the next of ``OTHERS``."""
    taken: set[str] = set()
    found, others = [], 0
    for rule in rules:
        if rule in STYLES and rule not in taken:
            found.append(STYLES[rule])
        else:
            found.append(OTHERS[others % len(OTHERS)])
            others += 1
        taken.add(rule)
    return found
