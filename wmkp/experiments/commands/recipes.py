"""Named configs: published hyperparameters where they exist, and small runs for a laptop."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from wmkp.experiments.config import MIRROR_EVERY, RULES, Train

# Steps of 0.1 at epochs 30, 60 and 80 of 90, and a warm-up: Goyal et al. (2017), with Akrout et al.'s (2019) order of
# normalization.
_IMAGENET = Train(
    dataset="imagenet2012",
    image_size=224,
    workers=16,
    epochs=90,
    batch_size=256,
    weight_decay=1e-4,
    schedule="step",
    drop_epochs=(30, 60, 80),
    warmup_epochs=5,
    norm_last=True,
    dtype="bfloat16",
    log_every=100,
)

# BioTorch's published benchmark (its README): ResNets on CIFAR-10, and LeNet on MNIST.
_CIFAR = Train(
    dataset="cifar10",
    augment=True,
    epochs=250,
    batch_size=128,
    weight_decay=1e-4,
    schedule="step",
    drop_epochs=(100, 150, 200),
)
_LENET = Train(
    dataset="mnist",
    image_size=32,
    model="lenet",
    epochs=100,
    batch_size=64,
    learning_rate=0.01,
    weight_decay=1e-3,
    schedule="step",
    drop_epochs=(50, 75),
    clip_norm=1.0,  # without it FA and DFA diverge at this learning rate
)

_BASES: dict[str, tuple[str, Train]] = {
    "mlp-digits": ("seconds on a CPU", Train(hidden=(128, 128), epochs=20, batch_size=32, learning_rate=0.05)),
    "mlp-mnist": ("784-500-10", Train(dataset="mnist", weight_decay=1e-4)),
    "lenet-mnist": ("BioTorch's recipe", _LENET),
    "lenet-fashion": ("BioTorch's recipe, Fashion-MNIST", replace(_LENET, dataset="fashion_mnist")),
    "resnet20-cifar10": ("BioTorch's recipe", replace(_CIFAR, model="resnet20")),
    "resnet56-cifar10": ("BioTorch's recipe", replace(_CIFAR, model="resnet56")),
    "resnet18-tiny": (
        "Tiny ImageNet-100, by --data-dir or --dataset",
        replace(_CIFAR, dataset="tiny_imagenet100", model="resnet18", epochs=60, weight_decay=5e-4, schedule="cosine"),
    ),
    "resnet18-imagenet": ("90 epochs", replace(_IMAGENET, model="resnet18")),
    "resnet50-imagenet": ("90 epochs", replace(_IMAGENET, model="resnet50")),
    "vit-mnist": (
        "ViT-Ti, patches of 7x7",
        Train(
            dataset="mnist",
            model="vit-ti",
            patch=7,
            epochs=5,
            optimizer="adamw",
            learning_rate=5e-4,
            weight_decay=0.05,
            warmup_epochs=0.2,
        ),
    ),
    "decoder-characters": (
        "a Transformer on Python's help texts",
        Train(
            dataset="characters",
            model="decoder",
            epochs=8,
            batch_size=32,
            optimizer="adamw",
            learning_rate=1e-3,
            weight_decay=0.05,
            warmup_epochs=0.2,
        ),
    ),
    "residual-cifar10": (
        "a pre-norm residual perceptron, 4 blocks of 256",
        Train(
            dataset="cifar10",
            model="residual-mlp",
            epochs=100,
            batch_size=128,
            optimizer="adamw",
            learning_rate=1e-3,
            weight_decay=0.01,
        ),
    ),
}
_RULES = ("bp", "fa", "ss", "kp", "mkp", "kpm", "wm", "frozen")
_MORE = {"lenet": ("dfa", "frsf", "brsf"), "decoder": ("dfa",), "residual": ("dfa", "pfa")}

# LeNet has all rules that BioTorch publishes: DFA, and three kinds of sign symmetry.
_PAIRS = [(base, rule) for base in _BASES for rule in _RULES + _MORE.get(base.split("-")[0], ())]


def _recipe(base: str, rule: str) -> Train:
    recipe = replace(_BASES[base][1], rule=rule, out=Path("runs") / f"{base}-{rule}")
    return replace(recipe, mirror_every=MIRROR_EVERY.get(rule, 1))


RECIPES: dict[str, Train] = {f"{base}-{rule}": _recipe(base, rule) for base, rule in _PAIRS}
DESCRIPTIONS: dict[str, Any] = {f"{base}-{rule}": f"{RULES[rule]}; {_BASES[base][0]}" for base, rule in _PAIRS}
