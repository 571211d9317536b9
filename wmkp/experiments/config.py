"""The typed configs of the commands, and their checks: each error is one line."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

LAG = 3.0  # degrees that B may be behind W before a command warns of it
MIRROR_EVERY = {"wm": 1, "mkp": 16}  # engaged steps between mirror steps: a weight mirror must not lag behind W

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
    """The command cannot do what was asked. The message says why, in one line."""


def _optional(kind: type, default: str) -> Any:
    """How the help shows a value that has a default elsewhere."""
    return tyro.conf.arg(constructor=kind, metavar=kind.__name__.upper(), help_behavior_hint=f"(default: {default})")


DataDir = Annotated[
    Path | None, tyro.conf.arg(constructor=Path, metavar="PATH", help_behavior_hint="(default: TFDS's own)")
]


@dataclasses.dataclass(frozen=True)
class Compare:
    """Trains one network under several learning rules, and compares test error and alignment."""

    dataset: str = "digits"
    """digits (from scikit-learn), or the name of a TFDS dataset of labelled images, such as mnist or cifar10."""
    data_dir: DataDir = None
    """Directory of the prepared TFDS datasets. Nothing is downloaded; see wmkp data."""
    out: Path = Path("comparison")
    """Directory for comparison.png, comparison.csv and comparison.md."""
    rules: tuple[str, ...] = ("bp", "fa", "ss", "kp", "mkp", "wm", "frozen")
    """Rules to train: bp (backprop), fa (feedback alignment), ss (sign symmetry), kp (Kolen-Pollack),
    mkp (mirrored Kolen-Pollack), wm (weight mirror), frozen (only the readout learns), or all.
    Also kpm, frsf, brsf, kpt, pfa, dfa, dkp, ia, sa, aa, am, amw: see docs/rules.md."""
    seeds: int = 5
    """Runs of each rule, with the seeds --seed, --seed + 1, ... All rules share weights and data order seed by seed."""
    model: Literal["conv", "mlp"] = "conv"
    """The network: five 3x3 convolutions (conv), or a tanh perceptron (mlp)."""
    hidden: tuple[int, ...] = (128,) * 12
    """mlp only: the width of each hidden layer."""
    epochs: Annotated[int | None, _optional(int, "enough for 444 steps (mlp: 6000), and at least 10")] = None
    """Passes over the training set."""
    batch_size: int = 32
    """Examples per step."""
    learning_rate: Annotated[float | None, _optional(float, "0.05; mlp: 0.02")] = None
    """Learning rate of SGD, the same for all rules. It falls to a tenth along half a cosine."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-3
    """lambda: lambda W is added to W's gradient, and lambda B to B's. Without it, Kolen-Pollack does not align."""
    mirror_steps: Annotated[int | None, _optional(int, "the rule's")] = None
    """Rules that mirror: mirror steps before training."""
    mirror_every: Annotated[int | None, _optional(int, "1 for wm, 16 for mkp")] = None
    """Rules that mirror: training steps between mirror steps."""
    mirror_angle: Annotated[float | None, _optional(float, "exact")] = None
    """Rules that mirror: angle between B and W^T, in degrees, for which a mirror step draws enough noise."""
    seed: int = 0
    """Random seed of the initial weights, the data order, the feedback weights and the noise."""

    def check(self) -> None:
        """Raises InputError if a value is not allowed."""
        for rule in self.rules:
            if rule not in RULES:
                raise InputError(f"unknown rule {rule!r}; choose from {', '.join(RULES)}, separated by spaces, or all")
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise InputError(f"--rules must name at least one rule, and none twice; got {' '.join(self.rules)}")
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


Coordinator = Annotated[str | None, _optional(str, "the cluster's")]
Cluster = Annotated[int | None, _optional(int, "the cluster's")]
# How Train and Reproduce use machines. None of these settings changes what is learned.
MACHINES = ("workers", "fsdp", "distributed", "coordinator", "processes", "process")


@dataclasses.dataclass(frozen=True)
class Train:
    """One training run: model, data, learning rule and everything needed to repeat it. Saved as config.json."""

    out: Path = Path("run")
    """Directory of the run: config.json, train.csv, test.csv, checkpoints, tensorboard."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, bit-for-bit. Without one it starts from the beginning."""

    dataset: str = "digits"
    """digits (scikit-learn), characters (Python's help texts), or a TFDS dataset of images by name or directory."""
    data_dir: DataDir = None
    """Directory of the prepared TFDS datasets. Nothing is downloaded; see wmkp data."""
    image_size: Annotated[int | None, _optional(int, "unchanged; 224 if images are read during training")] = None
    """Height and width to which images are resized."""
    augment: bool = False
    """Pad the training images by an eighth, then crop and flip them at random.
    Images that are read during training always get ImageNet's random crops."""
    workers: int = 0
    """Processes that decode images, for datasets that do not fit in memory. 0: threads of this process."""
    max_bad: float = 0.001
    """Largest share of unreadable examples. They are counted and left out. With more, the run ends."""

    model: Literal[
        "mlp", "residual-mlp", "lenet", "resnet20", "resnet56", "resnet18", "resnet50", "vit-ti", "decoder"
    ] = "mlp"
    """The network."""
    hidden: tuple[int, ...] = (500,)
    """mlp only: the width of each hidden layer."""
    width: Annotated[int | None, _optional(int, "the model's own")] = None
    """residual-mlp, decoder: width of the residual stream. ResNets: features of the first stage."""
    depth: Annotated[int | None, _optional(int, "the model's own")] = None
    """residual-mlp, decoder: number of blocks."""
    patch: int = 16
    """vit-ti: height and width of a patch, in pixels."""
    norm_last: bool = False
    """ResNets: apply BatchNorm after the ReLU, as in most runs of Akrout et al. (2019)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the computation. Parameters, B and the optimizer's state stay float32."""

    rule: str = "kp"
    """The learning rule. wmkp compare --help lists the names."""
    mirror_noise: Annotated[str | None, _optional(str, "the rule's: orthogonal")] = None
    """Rules that mirror: kind of noise, such as gaussian or orthogonal."""
    mirror_steps: Annotated[int | None, _optional(int, "the rule's")] = None
    """Rules that mirror: mirror steps before training."""
    mirror_every: int = 1
    """Rules that mirror: weight updates between mirror periods."""
    mirror_repeat: int = 1
    """Rules that mirror: mirror steps per period."""
    mirror_angle: Annotated[float | None, _optional(float, "the rule's: exact")] = None
    """Rules that mirror: angle between B and W^T, in degrees, for which a mirror step draws enough noise."""
    mirror_samples: Annotated[int | None, _optional(int, "as many as --mirror-angle needs")] = None
    """Rules that mirror: samples per mirror step."""
    mirror_rate: Annotated[float | None, _optional(float, "the rule's: 1")] = None
    """Rules that mirror: share of B that a mirror step replaces by its estimate of W^T."""

    epochs: float = 10.0
    """Passes over the training set."""
    steps: Annotated[int | None, _optional(int, "as --epochs says")] = None
    """Training steps of the whole run, instead of --epochs."""
    batch_size: int = 128
    """Examples per step, over all devices together."""
    accumulate: int = 1
    """Steps whose gradients are averaged into one weight update."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimizer of W, and of B under Kolen-Pollack."""
    learning_rate: float = 0.1
    """The highest learning rate of the schedule."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """lambda, for W and B alike: added to the gradient (SGD) or decoupled (AdamW)."""
    decay_all: bool = False
    """Decay biases and normalizations too, not only matrices and kernels."""
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    """Learning rate schedule after the warm-up."""
    drop_epochs: Annotated[tuple[float, ...], tyro.conf.arg(help_behavior_hint="(default: none)")] = ()
    """Step schedule: epochs at which the learning rate falls to a tenth."""
    final_rate: float = 0.0
    """Cosine schedule: share of the learning rate that is left at the end."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises from zero."""
    clip_norm: Annotated[float | None, _optional(float, "no clipping")] = None
    """Largest global norm of the gradients. Larger gradients and B's signals are scaled down alike."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all labels."""
    seed: int = 0
    """Random seed of the weights, the data order, its augmentation, the feedback weights and the noise."""
    seeds: int = 1
    """Number of runs, one after another, with the seeds --seed, --seed + 1, ..., in OUT/seed0, OUT/seed1, ..."""

    on_nan: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is NaN or infinite: end the run (stop), or leave out the step and count it (skip)."""
    log_every: int = 50
    """Steps between lines of train.csv."""
    eval_every: float = 1.0
    """Epochs between evaluations on the test set."""
    save_every: float = 1.0
    """Epochs between checkpoints."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    tensorboard: bool = True
    """Also write TensorBoard scalars."""

    fsdp: bool = False
    """Divide W, B and the optimizer's state among the devices."""
    distributed: bool = False
    """Train together with other processes of the same command. A cluster that JAX detects needs no more settings."""
    coordinator: Coordinator = None
    """HOST:PORT of process 0, without a cluster that JAX detects."""
    processes: Cluster = None
    """Number of processes, without such a cluster."""
    process: Cluster = None
    """Number of this process, from 0, without such a cluster."""

    def check(self) -> None:
        """Raises InputError if a value is not allowed."""
        if self.rule not in RULES:
            raise InputError(f"unknown rule {self.rule!r}; choose from {', '.join(RULES)}")
        _check_hidden(self.hidden)
        if not all(0 < epoch < 1e6 for epoch in self.drop_epochs) or list(self.drop_epochs) != sorted(
            set(self.drop_epochs)
        ):
            raise InputError(
                f"--drop-epochs must be positive and increasing; got {' '.join(map(str, self.drop_epochs))}"
            )
        if self.schedule == "step" and not self.drop_epochs:
            raise InputError(
                "--schedule step needs --drop-epochs, the epochs at which the learning rate falls: --drop-epochs 30 60"
            )
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
    """Reproduces a published figure. With fewer --epochs or --steps, its numbers are not the published ones."""

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
    """akrout-mnist, akrout-cifar10: the curves published with the paper's NumPy code.
    akrout-orders: how much their first epochs depend on the data order.
    akrout-mended: what each quirk of that code changes.
    akrout-jpeg: what JPEG compression changes on CIFAR-10.
    akrout-resnet20, akrout-tiny, akrout-imagenet: the paper's figures of test error and every layer's angles,
    with ResNet-20 on CIFAR-10, ResNet-18 on Tiny ImageNet-100, ResNet-18 and ResNet-50 on ImageNet.
    biotorch-lenet: BioTorch's table for LeNet on MNIST.
    language: a character Transformer.
    residual: a pre-norm residual perceptron on CIFAR-10.
    hundred-classes: a narrow ResNet on a hundred classes of photographs."""
    data_dir: DataDir = None
    """Directory of the prepared TFDS datasets. Nothing is downloaded; see wmkp data."""
    reference: Annotated[
        Path | None, tyro.conf.arg(constructor=Path, metavar="PATH", help_behavior_hint="(default: none)")
    ] = None
    """Directory of the published curves (akrout2019_mnist_bp.csv and so on) to compare with."""
    out: Annotated[
        Path | None, tyro.conf.arg(constructor=Path, metavar="PATH", help_behavior_hint="(default: runs/FIGURE)")
    ] = None
    """Directory for run.json, summary.csv, the CSV file of each run and the pictures."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: all)")] = ()
    """Only these runs of the figure, by the names in its table."""
    epochs: Annotated[float | None, _optional(float, "the published number")] = None
    """Passes over the training set. The learning rate's schedule is shortened in proportion."""
    steps: Annotated[int | None, _optional(int, "as --epochs says")] = None
    """Training steps, instead of --epochs, to measure throughput. Not for the NumPy code's curves."""
    batch_size: Annotated[int | None, _optional(int, "the recipe's")] = None
    """Examples per step. Not for the NumPy code's curves."""
    image_size: Annotated[int | None, _optional(int, "the recipe's")] = None
    """Height and width to which images are resized. Not for the NumPy code's curves."""
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, tyro.conf.arg(help_behavior_hint="(default: the recipe's)")
    ] = None
    """Dtype of the computation. Not for the NumPy code's curves."""
    seed: int = 0
    """Random seed of the weights, the data order, the feedback weights and the noise."""
    seeds: Annotated[int | None, _optional(int, "the figure's")] = None
    """Runs of each rule, with the seeds --seed, --seed + 1, ... Not for the NumPy code's curves."""

    workers: int = 0
    """Processes that decode images. 0: threads of this process. Not for the NumPy code's curves, like those below."""
    fsdp: bool = False
    """Divide W, B and the optimizer's state among the devices."""
    distributed: bool = False
    """Train together with other processes of the same command. A cluster that JAX detects needs no more settings."""
    coordinator: Coordinator = None
    """HOST:PORT of process 0, without a cluster that JAX detects."""
    processes: Cluster = None
    """Number of processes, without such a cluster."""
    process: Cluster = None
    """Number of this process, from 0, without such a cluster."""

    def check(self) -> None:
        """Raises InputError if a value is not allowed."""
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
                    raise InputError(
                        f"{flag(name)} is not for {self.figure}, which uses the published settings; leave it out"
                    )
            if self.epochs is not None and self.epochs % 1:
                raise InputError(f"--epochs must be a whole number for {self.figure}; got {self.epochs:g}")
        elif self.reference is not None:
            raise InputError(
                f"--reference is only for the NumPy code's curves, which {self.figure} does not draw; leave it out"
            )


# What a value must be: a test that NaN fails, and its words.
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
        raise InputError(f"--hidden must give the widths of 1 to {MOST_LAYERS} layers; got {len(hidden)}")
    if min(hidden) < 1:
        raise InputError(f"--hidden must be at least 1; got {min(hidden)}")


def _check_machines(config: Train | Reproduce) -> None:
    """Raises InputError if a value of MACHINES is not allowed."""
    if not config.distributed and {config.coordinator, config.processes, config.process} != {None}:
        raise InputError("--coordinator, --processes and --process need --distributed; add it, or leave them out")
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
    """Turns the library's errors into an InputError that begins with ``what``."""
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
