"""The commands' typed configs, and the checks that say in one line what is wrong with one."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

LAG = 3.0  # degrees that B may be behind W before a command warns of it

RULES = {
    "bp": "backprop",
    "fa": "feedback alignment",
    "ss": "sign symmetry",
    "kp": "Kolen-Pollack",
    "kpm": "Kolen-Pollack, mirrored start",
    "mkp": "mirrored Kolen-Pollack",
    "wm": "weight mirror",
    "frozen": "readout alone",
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


MOST_LAYERS = 256  # more take hours to compile


class InputError(ValueError):
    """What a person asked for cannot be done; the message says why, in one line."""


DataDir = Annotated[
    Path | None, tyro.conf.arg(constructor=Path, metavar="PATH", help_behavior_hint="(default: TFDS's own)")
]


@dataclasses.dataclass(frozen=True)
class Compare:
    """One network, one dataset, several learning rules: what each reaches, and how well its feedback aligns."""

    dataset: str = "digits"
    """digits (comes with scikit-learn), or any TFDS dataset of labelled images by its name, such as mnist or cifar10."""
    data_dir: DataDir = None
    """Where TFDS has its datasets prepared. Nothing is ever downloaded."""
    out: Path = Path("comparison")
    """The directory that comparison.png and comparison.csv are written to."""
    rules: tuple[str, ...] = ("bp", "fa", "ss", "kp", "mkp", "wm", "frozen")
    """The rules to train: bp (backprop), fa (feedback alignment), ss (sign symmetry), kp (Kolen-Pollack), mkp (mirrored
    Kolen-Pollack), wm (weight mirror), frozen (hidden layers as drawn, the readout learns), and kpm, frsf, brsf, kpt, pfa, dfa, dkp, ia, sa, aa, am, amw; or all."""
    seeds: int = 5
    """How many times each rule is trained: from --seed and the seeds after it. All rules share initial weights and data
    order seed by seed."""
    model: Literal["conv", "mlp"] = "conv"
    """The network: five 3x3 convolutions, or a tanh perceptron."""
    hidden: tuple[int, ...] = (128,) * 12
    """mlp: the width of each hidden layer."""
    epochs: Annotated[
        int | None,
        tyro.conf.arg(constructor=int, metavar="INT", help_behavior_hint="(default: by the size of the dataset)"),
    ] = None
    """Passes over the training set. By default as many as make 555 steps (mlp: 6,000), and at least 10."""
    batch_size: int = 32
    """Examples in a step."""
    learning_rate: float | None = None
    """Of SGD: by default 0.05 (mlp: 0.02). The same for all rules; falls to a tenth along half a cosine."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-3
    """lambda: added to the gradient as lambda W (and lambda B). Without it, Kolen-Pollack does not align."""
    mirror_steps: int | None = None
    """Weight mirror: mirror steps before training. By default the rule's own."""
    mirror_every: int | None = None
    """Weight mirror: engaged steps from one mirror step to the next. By default 1 for wm, 16 for mkp."""
    mirror_angle: float | None = None
    """Weight mirror: by default exact. Otherwise the angle in degrees between B and W^T that a mirror step draws enough noise for."""
    seed: int = 0
    """Of the initial weights, the order of the data, the feedback weights and the noise."""

    def check(self) -> None:
        """Raises InputError if a value makes no sense."""
        for rule in self.rules:
            if rule not in RULES:
                raise InputError(f"unknown rule {rule!r}; choose from {', '.join(RULES)}, separated by spaces, or all")
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise InputError("--rules must name at least one rule, and none twice")
        _check_hidden(self.hidden)
        _check(
            self,
            epochs=(lambda x: x is None or 1 <= x <= 1e6, "at least 1, and at most 1e6"),
            batch_size=_SIZE,
            seeds=_SIZE,
            mirror_every=_OPTIONAL_SIZE,
            learning_rate=(lambda x: x is None or 0 < x < math.inf, "positive and finite"),
            weight_decay=_FINITE,
            momentum=_SHARE,
            mirror_steps=_OPTIONAL_COUNT,
            mirror_angle=_ANGLE,
            seed=_SEED,
        )


def _optional(kind: type, default: str) -> Any:
    """How tyro shows a value that may be left to its default."""
    return tyro.conf.arg(constructor=kind, metavar=kind.__name__.upper(), help_behavior_hint=f"(default: {default})")


Coordinator = Annotated[str | None, _optional(str, "the cluster's")]
Cluster = Annotated[int | None, _optional(int, "the cluster's")]
# How Train and Reproduce use machines; none of it changes what is learned.
MACHINES = ("workers", "fsdp", "distributed", "coordinator", "processes", "process")


@dataclasses.dataclass(frozen=True)
class Train:
    """One run: a model, its data, a learning rule, and all that it takes to repeat it. Saved as config.json."""

    out: Path = Path("run")
    """The run's directory: config.json, train.csv, test.csv, checkpoints, tensorboard."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, to the bit; one that has none begins anew."""

    dataset: str = "digits"
    """digits (scikit-learn's), characters (Python's own help texts), or a TFDS dataset of labelled images, by its name or
    by its directory."""
    data_dir: DataDir = None
    """Where TFDS has its datasets prepared. Nothing is downloaded; see wmkp data."""
    image_size: Annotated[int | None, _optional(int, "as they are; 224 if they are read while training")] = None
    """Height and width that images are resized to."""
    augment: bool = False
    """Pad by an eighth, crop and flip the training images. Images read while training always get ImageNet's random crops."""
    workers: int = 0
    """Processes that decode images; 0 for threads of this one. Only for datasets that do not fit in memory."""
    max_bad: float = 0.001
    """The share of examples that may be unreadable; they are counted and left out. Beyond it the run ends."""

    model: Literal[
        "mlp", "residual-mlp", "lenet", "resnet20", "resnet56", "resnet18", "resnet50", "vit-ti", "decoder"
    ] = "mlp"
    """The network."""
    hidden: tuple[int, ...] = (500,)
    """mlp: the width of each hidden layer."""
    width: Annotated[int | None, _optional(int, "the model's own")] = None
    """residual-mlp, decoder: the width of the residual stream. ResNets: the features of the first stage."""
    depth: Annotated[int | None, _optional(int, "the model's own")] = None
    """residual-mlp, decoder: how many blocks."""
    patch: int = 16
    """vit-ti: height and width of a patch."""
    norm_last: bool = False
    """ResNets: BatchNorm after the ReLU, as in most runs of Akrout et al. (2019)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation. Parameters, B and the optimizer's state are float32."""

    rule: str = "kp"
    """The learning rule, one of those that wmkp compare --rules takes."""
    mirror_noise: Annotated[str | None, _optional(str, "the rule's: orthogonal")] = None
    """Weight mirror: the noise, such as gaussian or orthogonal."""
    mirror_steps: Annotated[int | None, _optional(int, "the rule's")] = None
    """Weight mirror: mirror steps before training."""
    mirror_every: int = 1
    """Weight mirror: updates of the weights from one mirror period to the next."""
    mirror_repeat: int = 1
    """Weight mirror: mirror steps in a period."""
    mirror_angle: Annotated[float | None, _optional(float, "the rule's: exact")] = None
    """Weight mirror: the angle in degrees between B and W^T that a mirror step draws enough noise for."""
    mirror_samples: Annotated[int | None, _optional(int, "as many as --mirror-angle takes")] = None
    """Weight mirror: samples in a mirror step."""
    mirror_rate: Annotated[float | None, _optional(float, "the rule's: all of it")] = None
    """Weight mirror: the share of the way to its estimate that B goes in a mirror step."""

    epochs: float = 10.0
    """Passes over the training set."""
    steps: Annotated[int | None, _optional(int, "as --epochs says")] = None
    """Engaged steps of the whole run, in place of --epochs."""
    batch_size: int = 128
    """Examples in a step, over all devices."""
    accumulate: int = 1
    """Steps whose gradients are averaged for one update of the weights."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Of W, and of B where it learns as W does."""
    learning_rate: float = 0.1
    """At its highest."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """lambda, the same for W and B: added to the gradient (SGD) or decoupled (AdamW)."""
    decay_all: bool = False
    """Weight decay on biases and normalizations too, not on matrices and kernels alone."""
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    """Of the learning rate, after its warm-up."""
    drop_epochs: tuple[float, ...] = ()
    """Step schedule: the epochs at which the learning rate falls to a tenth."""
    final_rate: float = 0.0
    """Cosine schedule: the share of the learning rate that is left at the end."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises from zero."""
    clip_norm: Annotated[float | None, _optional(float, "no clipping")] = None
    """The largest global norm of the gradients; B's signals are scaled as they are."""
    label_smoothing: float = 0.0
    """The share of the target that is spread over all labels."""
    seed: int = 0
    """Of the weights, the order of the data, its augmentation, the feedback weights and the noise."""
    seeds: int = 1
    """Runs to make, one after another: of --seed and the seeds after it, each in a directory of its own, OUT/seed0, OUT/seed1, ..."""

    on_nan: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not finite does: end the run, or have the step left out and counted."""
    log_every: int = 50
    """Steps from one line of train.csv to the next."""
    eval_every: float = 1.0
    """Epochs from one evaluation on the test set to the next."""
    save_every: float = 1.0
    """Epochs from one checkpoint to the next."""
    keep: int = 2
    """How many checkpoints are kept, the newest."""
    tensorboard: bool = True
    """Write TensorBoard scalars too."""

    fsdp: bool = False
    """Divide W, B and the optimizer's state among the devices."""
    distributed: bool = False
    """Train together with other processes, started alike; a cluster that JAX knows needs nothing more."""
    coordinator: Coordinator = None
    """HOST:PORT of process 0."""
    processes: Cluster = None
    """How many there are."""
    process: Cluster = None
    """Which of them this is, from 0."""

    def check(self) -> None:
        """Raises InputError if a value makes no sense."""
        if self.rule not in RULES:
            raise InputError(f"unknown rule {self.rule!r}; choose from {', '.join(RULES)}")
        _check_hidden(self.hidden)
        if not all(0 < epoch < 1e6 for epoch in self.drop_epochs) or list(self.drop_epochs) != sorted(
            set(self.drop_epochs)
        ):
            raise InputError(f"--drop-epochs must be positive and rise; got {self.drop_epochs}")
        if self.schedule == "step" and not self.drop_epochs:
            raise InputError("--schedule step needs --drop-epochs: when the learning rate falls")
        _check_machines(self)
        _check(
            self,
            **dict.fromkeys(("image_size", "steps", "mirror_samples", "width", "depth"), _OPTIONAL_SIZE),
            **dict.fromkeys(
                ("batch_size", "accumulate", "patch", "mirror_every", "mirror_repeat", "log_every", "keep", "seeds"),
                _SIZE,
            ),
            **dict.fromkeys(("learning_rate", "eval_every", "save_every"), _POSITIVE),
            epochs=(lambda x: 0 < x <= 1e6, "positive, and at most 1e6"),
            warmup_epochs=(lambda x: 0 <= x <= 1e6, "at least 0, and at most 1e6"),
            weight_decay=_FINITE,
            **dict.fromkeys(("momentum", "label_smoothing", "max_bad"), _SHARE),
            mirror_steps=_OPTIONAL_COUNT,
            final_rate=(lambda x: 0 <= x <= 1, "between 0 and 1"),
            mirror_rate=(lambda x: x is None or 0 < x <= 1, "above 0 and at most 1"),
            clip_norm=(lambda x: x is None or 1e-15 <= x <= 1e15, "positive, from 1e-15 to 1e15"),
            mirror_angle=_ANGLE,
            seed=_SEED,
        )


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """A published figure, run anew. Shortened with --epochs or --steps it says how far it got, not what was published."""

    figure: tyro.conf.Positional[
        Annotated[
            Literal[
                "akrout-mnist",
                "akrout-cifar10",
                "akrout-orders",
                "akrout-mended",
                "akrout-jpeg",
                "akrout-resnet20",
                "akrout-tiny",
                "akrout-imagenet",
                "biotorch-lenet",
                "language",
                "residual",
                "hundred-classes",
            ],
            tyro.conf.arg(metavar="FIGURE"),
        ]
    ]
    """akrout-mnist and akrout-cifar10: the curves published with the paper's NumPy code. akrout-orders: how far their first
    epochs hang on the order of the data. akrout-mended: what each of that code's quirks changes. akrout-jpeg: what JPEG does
    to CIFAR-10's. akrout-resnet20, akrout-tiny, akrout-imagenet: the paper's figures, test error and every layer's angles, with ResNet-20 on CIFAR-10,
    ResNet-18 on Tiny ImageNet-100, ResNet-18 and -50 on ImageNet. biotorch-lenet: BioTorch's table for LeNet on MNIST. language, residual, hundred-classes: a character
    Transformer, a pre-norm residual perceptron on CIFAR-10, and a narrow ResNet on a hundred classes of photographs."""
    data_dir: DataDir = None
    """Where TFDS has its datasets prepared. Nothing is downloaded."""
    reference: Annotated[
        Path | None, tyro.conf.arg(constructor=Path, metavar="PATH", help_behavior_hint="(default: none)")
    ] = None
    """Where the published curves are, akrout2019_mnist_bp.csv and so on, to be held against ours."""
    out: Annotated[
        Path | None, tyro.conf.arg(constructor=Path, metavar="PATH", help_behavior_hint="(default: runs/FIGURE)")
    ] = None
    """The directory for run.json, summary.csv, each run's CSV file and the pictures."""
    only: tuple[str, ...] = ()
    """Some of the figure's runs, by the names in its table."""
    epochs: Annotated[float | None, _optional(float, "the published number")] = None
    """Passes over the training set; the learning rate's schedule is shortened with them."""
    steps: Annotated[int | None, _optional(int, "as --epochs says")] = None
    """Engaged steps, in place of --epochs: to measure throughput. Not for the NumPy code's curves."""
    batch_size: Annotated[int | None, _optional(int, "the recipe's")] = None
    """Examples in a step. Not for the NumPy code's curves."""
    image_size: Annotated[int | None, _optional(int, "the recipe's")] = None
    """Height and width that images are resized to. Not for the NumPy code's curves."""
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, tyro.conf.arg(help_behavior_hint="(default: the recipe's)")
    ] = None
    """Of the computation. Not for the NumPy code's curves."""
    seed: int = 0
    """Of weights, order, feedback weights and noise."""
    seeds: Annotated[int | None, _optional(int, "the figure's")] = None
    """Runs of each rule, of --seed and the seeds after it. Not for the NumPy code's curves."""

    workers: int = 0
    """Processes that decode images; 0 for threads of this one. This and what follows: not for the NumPy code's curves."""
    fsdp: bool = False
    """Divide W, B and the optimizer's state among the devices."""
    distributed: bool = False
    """Train together with other processes, started alike; a cluster that JAX knows needs nothing more."""
    coordinator: Coordinator = None
    """HOST:PORT of process 0."""
    processes: Cluster = None
    """How many there are."""
    process: Cluster = None
    """Which of them this is, from 0."""

    def check(self) -> None:
        """Raises InputError if a value makes no sense."""
        _check_machines(self)
        _check(
            self,
            **dict.fromkeys(("steps", "batch_size", "image_size", "seeds"), _OPTIONAL_SIZE),
            epochs=(lambda x: x is None or 0 < x <= 1e6, "positive, and at most 1e6"),
            seed=_SEED,
        )
        if len(set(self.only)) < len(self.only):
            raise InputError(f"--only must name no run twice; got {' '.join(self.only)}")
        if self.figure in ("akrout-mnist", "akrout-cifar10", "akrout-orders", "akrout-mended", "akrout-jpeg"):
            for name in ("steps", "batch_size", "image_size", "dtype", "seeds", *MACHINES):
                if getattr(self, name):
                    raise InputError(f"{flag(name)} is not for {self.figure}, whose settings are the published ones")
            if self.epochs is not None and self.epochs % 1:
                raise InputError(f"--epochs must be a whole number for {self.figure}; got {self.epochs:g}")
        elif self.reference is not None:
            raise InputError(f"--reference is for the NumPy code's curves; {self.figure} has none")


# What a value must be: a test, so written that NaN never passes, and its words.
_POSITIVE = (lambda x: 0 < x < math.inf, "positive and finite")
_FINITE = (lambda x: 0 <= x < math.inf, "at least 0 and finite")
_SHARE = (lambda x: 0 <= x < 1, "at least 0 and below 1")
_COUNT = (lambda x: x >= 0, "at least 0")
_OPTIONAL_COUNT = (lambda x: x is None or x >= 0, "at least 0")
_SIZE = (lambda x: x >= 1, "at least 1")
_OPTIONAL_SIZE = (lambda x: x is None or x >= 1, "at least 1")
_ANGLE = (lambda x: x is None or 1e-6 <= x < 90, "between 0 and 90 degrees (from 1e-6 on)")
_SEED = (lambda x: 0 <= x < 2**32, "at least 0 and below 2^32")


def _check_hidden(hidden: tuple[int, ...]) -> None:
    if not 1 <= len(hidden) <= MOST_LAYERS:
        raise InputError(
            f"--hidden must name the widths of at least 1 layer and at most {MOST_LAYERS}; got {len(hidden)}"
        )
    if min(hidden) < 1:
        raise InputError(f"--hidden must be at least 1; got {min(hidden)}")


def _check_machines(config: Train | Reproduce) -> None:
    """Raises InputError if a value of MACHINES makes no sense."""
    if not config.distributed and {config.coordinator, config.processes, config.process} != {None}:
        raise InputError("--coordinator, --processes and --process are for --distributed runs; give --distributed")
    if config.coordinator is not None:
        port = re.fullmatch(r"\S+:(\d{1,5})", config.coordinator)
        if not port or not 1 <= int(port[1]) <= 65535:
            raise InputError(f"--coordinator must be HOST:PORT, PORT from 1 to 65535; got {config.coordinator!r}")
    _check(config, workers=_COUNT, processes=_OPTIONAL_SIZE)


def _check(config: Any, **limits: tuple[Any, str]) -> None:
    for name, (fits, limit) in limits.items():
        if not fits(getattr(config, name)):
            raise InputError(f"{flag(name)} must be {limit}; got {getattr(config, name)}")
        if isinstance(value := getattr(config, name), int) and value >= 2**31 and name != "seed":  # JAX counts in int32
            raise InputError(f"{flag(name)} must be below 2^31; got {value}")


@contextlib.contextmanager
def refusals(what: str) -> Iterator[None]:
    """What the library refuses, as an InputError that begins with ``what``."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error


def flag(field: str) -> str:
    """A field as it is typed on the command line."""
    return "--" + field.replace("_", "-")


def first_line(error: BaseException | None) -> str:
    """The first line of an error's message, or else its kind."""
    return next(iter(str(error).splitlines()), type(error).__name__)
