"""Figures, drawn without a display: each function returns a PNG's bytes."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from wmkp.experiments.config import RULES

if TYPE_CHECKING:
    from wmkp.experiments.compare import Row

# Okabe and Ito's colours, which the colour-blind can tell apart; dashes besides, for print in grey.
STYLES: dict[str, dict[str, Any]] = {
    "bp": {"color": "#000000", "linestyle": "-"},
    "fa": {"color": "#D55E00", "linestyle": (0, (1, 1))},
    "ss": {"color": "#E69F00", "linestyle": (0, (5, 1.5))},
    "kp": {"color": "#0072B2", "linestyle": "-"},
    "kpm": {"color": "#56B4E9", "linestyle": (0, (3, 1))},
    "wm": {"color": "#009E73", "linestyle": (0, (6, 1.5, 1.5, 1.5))},
}
# The other rules take these in turn.
OTHERS = [
    {"color": color, "linestyle": dashes}
    for dashes in ("-", (0, (4, 1.2)), (0, (1, 1)))
    for color in ("#CC79A7", "#7F7F7F", "#8C6D31", "#393B79")
]
TEXT = "#333333"


def comparison(rows: Sequence["Row"], title: str) -> bytes:
    """Test error, matrix angles and delta angles against the epoch, a line a rule."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=11, color=TEXT)
    error, matrix, delta = figure.subplots(1, 3)
    shown = list(dict.fromkeys(row.rule for row in rows))
    others = iter(OTHERS)
    for rule in shown:
        mine = [row for row in rows if row.rule == rule]
        style = {"linewidth": 1.8, **(STYLES[rule] if rule in STYLES else next(others))}
        label = f"{rule.upper()}  {RULES[rule]}"
        trained = mine[1:]
        error.plot(
            [r.epoch for r in trained],
            [r.test_error_percent for r in trained],
            label=label,
            **style | {"linewidth": 1.2},
        )
        epochs = [r.epoch for r in mine]
        for axes, mean, worst in (
            (matrix, [r.matrix_angle_mean_deg for r in mine], [r.matrix_angle_worst_deg for r in mine]),
            (delta, [r.delta_angle_mean_deg for r in mine], [r.delta_angle_worst_deg for r in mine]),
        ):
            axes.plot(epochs, mean, **style)
            axes.fill_between(epochs, mean, worst, color=style["color"], alpha=0.15, linewidth=0)

    error.set(title="Test error", ylabel="%", yscale="log")
    error.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    error.yaxis.set_major_formatter("{x:g}")
    error.yaxis.set_minor_locator(NullLocator())
    matrix.set(title="Matrix angles: W to B", ylabel="degrees: mean, shaded to the worst layer")
    delta.set(title="Delta angles: δ to backprop's δ", ylabel="degrees: mean, shaded to the worst layer")
    for axes in (matrix, delta):
        axes.set(ylim=(-2, 95), yticks=range(0, 91, 15))  # a line at zero shows
    for axes in (error, matrix, delta):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.01)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=TEXT)
    figure.legend(loc="outside lower center", ncols=min(len(shown), 4), frameon=False, handlelength=3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
