"""The commands' typed configs, and the checks that say in one line what is wrong with one."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import tyro

RULES = {
    "bp": "backprop",
    "fa": "feedback alignment",
    "ss": "sign symmetry",
    "kp": "Kolen-Pollack",
    "kpm": "Kolen-Pollack, mirrored start",
    "wm": "weight mirror",
    "wmo": "weight mirror, orthogonal noise",
    "frsf": "sign symmetry, fixed magnitudes",
    "brsf": "sign symmetry, batch magnitudes",
    "kpt": "Kolen-Pollack, changes transported",
    "pfa": "product feedback alignment",
    "dfa": "direct feedback alignment",
    "dkp": "direct Kolen-Pollack",
    "ia": "information alignment",
    "sa": "symmetric alignment",
    "aa": "activation alignment",
    "am": "mirror on activity",
    "amw": "mirror on whitened activity",
}


class InputError(ValueError):
    """What a person asked for cannot be done; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """One network, one dataset, several learning rules: what each reaches, and how well its feedback aligns."""

    dataset: str = "digits"
    """digits (comes with scikit-learn), or any TFDS dataset of labelled images by its name, such as mnist or cifar10."""
    data_dir: Annotated[
        Path | None, tyro.conf.arg(constructor=Path, metavar="PATH", help_behavior_hint="(default: TFDS's own)")
    ] = None
    """Where TFDS has its datasets prepared. Nothing is ever downloaded."""
    out: Path = Path("comparison")
    """The directory that comparison.png and comparison.csv are written to."""
    rules: tuple[str, ...] = ("bp", "fa", "ss", "kp", "kpm", "wm")
    """The rules to train: bp (backprop), fa (feedback alignment), ss (sign symmetry), kp (Kolen-Pollack), kpm (the same
    from a mirrored start), wm (weight mirror), and wmo, frsf, brsf, kpt, pfa, dfa, dkp, ia, sa, aa, am, amw; or all."""
    hidden: tuple[int, ...] = (128,) * 12
    """The width of each hidden layer of the network, a tanh perceptron."""
    epochs: Annotated[
        int | None,
        tyro.conf.arg(constructor=int, metavar="INT", help_behavior_hint="(default: by the size of the dataset)"),
    ] = None
    """Passes over the training set. By default as many as make 6,000 steps, and at least 10."""
    batch_size: int = 32
    """Examples in a step."""
    learning_rate: float = 0.02
    """Of SGD, the same for all rules; falls to a tenth along half a cosine."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-3
    """lambda: added to the gradient as lambda W (and lambda B). Without it, Kolen-Pollack does not align."""
    mirror_steps: int = 100
    """Weight mirror: mirror steps before training."""
    mirror_every: int = 8
    """Weight mirror: engaged steps from one mirror step to the next."""
    mirror_angle: float = 8.0
    """Weight mirror: the angle in degrees between B and W^T that a mirror step draws enough noise for."""
    seed: int = 0
    """Of the initial weights, the order of the data, the feedback weights and the noise."""

    def check(self) -> None:
        """Raises InputError if a value makes no sense."""
        for rule in self.rules:
            if rule not in RULES:
                raise InputError(f"unknown rule {rule!r}; choose from {', '.join(RULES)}, separated by spaces, or all")
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise InputError("--rules must name at least one rule, and none twice")
        if not self.hidden:
            raise InputError("--hidden must name the width of at least one layer")
        sizes = {"hidden": self.hidden, "batch_size": (self.batch_size,), "mirror_every": (self.mirror_every,)}
        if self.epochs is not None:
            sizes["epochs"] = (self.epochs,)
        for name, values in sizes.items():
            if min(values) < 1:
                raise InputError(f"{_flag(name)} must be at least 1; got {min(values)}")
        for name, fits, limit in (  # so written that NaN never fits
            ("learning_rate", 0 < self.learning_rate < math.inf, "positive and finite"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0 and finite"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("mirror_steps", self.mirror_steps >= 0, "at least 0"),
            ("mirror_angle", 0 < self.mirror_angle < 90, "between 0 and 90 degrees"),
            ("seed", 0 <= self.seed < 2**32, "at least 0 and below 2^32"),
        ):
            if not fits:
                raise InputError(f"{_flag(name)} must be {limit}; got {getattr(self, name)}")


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")
