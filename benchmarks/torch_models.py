"""The benchmark models in PyTorch, and a training step of each by PyTorch's backprop or BioTorch's rules."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def conv_norm(into: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution and its BatchNorm."""
    return [nn.Conv2d(into, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out)]


class Block(nn.Module):
    """A residual block of two 3x3 convolutions, or a bottleneck. The shortcut is padded or a 1x1 convolution."""

    def __init__(self, into: int, features: int, stride: int, bottleneck: bool, padded: bool):
        super().__init__()
        out = 4 * features if bottleneck else features
        if bottleneck:
            layers = [*conv_norm(into, features, 1), nn.ReLU(True), *conv_norm(features, features, 3, stride)]
            layers += [nn.ReLU(True), *conv_norm(features, out, 1)]
        else:
            layers = [*conv_norm(into, features, 3, stride), nn.ReLU(True), *conv_norm(features, out, 3)]
        self.body = nn.Sequential(*layers)
        self.stride, self.missing = stride, out - into
        changes = stride > 1 or into != out
        self.padded = padded and changes
        self.shortcut = nn.Sequential(*conv_norm(into, out, 1, stride)) if changes and not padded else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        if self.padded:
            before = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.missing - before))
        return F.relu(self.shortcut(x) + y)


def resnet(stages: Sequence[int], features: int, classes: int, imagenet: bool, bottleneck: bool) -> nn.Module:
    """The same network as ``wmkp.experiments.models.resnet.ResNet``."""
    stem = [*conv_norm(3, features, 7, 2), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)] if imagenet else None
    layers = stem or [*conv_norm(3, features, 3), nn.ReLU(True)]
    into = features
    for stage, blocks in enumerate(stages):
        for i in range(blocks):
            width = features * 2**stage
            layers.append(Block(into, width, 2 if stage and not i else 1, bottleneck, not imagenet))
            into = 4 * width if bottleneck else width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, classes))


def lenet() -> nn.Module:
    """The same network as ``wmkp.experiments.models.lenet.LeNet``, for grey images and ten classes."""
    convolutions = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    dense = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*convolutions, nn.Flatten(), *dense)


class Attention(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class ViT(nn.Module):
    """ViT-Ti/16, the same network as ``wmkp.experiments.models.transformer.ViT``."""

    def __init__(self, size: int = 224, classes: int = 1000, width: int = 192, depth: int = 12, heads: int = 3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (size // 16) ** 2 + 1, width) / 50)
        self.blocks = nn.Sequential(*(Attention(width, heads) for _ in range(depth)))
        self.norm, self.output = nn.LayerNorm(width, 1e-6), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.output(self.norm(self.blocks(x))[:, 0])


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "LeNet": lambda size: lenet(),
    "ResNet-20": lambda size: resnet((3, 3, 3), 16, 10, False, False),
    "ResNet-18": lambda size: resnet((2, 2, 2, 2), 64, 1000, True, False),
    "ResNet-50": lambda size: resnet((3, 4, 6, 3), 64, 1000, True, True),
    "ViT-Ti": ViT,
}


def training_step(
    model: nn.Module,
    x: Any,
    labels: Any,
    adamw: bool = False,
    channels_last: bool = False,
    dtype: torch.dtype | None = None,
) -> Callable[[], torch.Tensor]:
    """Returns a function that takes one training step on a batch (NHWC images, labels) of ``models.Case``.

    The batch stays on the model's device. ``dtype`` is the type of the forward pass's products (``torch.autocast``).
    Without it they are in float32.
    """
    device = next(model.parameters()).device
    images = torch.tensor(x).permute(0, 3, 1, 2).contiguous().to(device)
    if channels_last:
        model, images = (
            model.to(memory_format=torch.channels_last),
            images.contiguous(memory_format=torch.channels_last),
        )
    targets = torch.tensor(labels, dtype=torch.int64, device=device)
    fused = True if device.type == "cuda" else None  # None: PyTorch chooses
    optimizer: Any = (
        torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, fused=fused)
        if adamw
        else torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, fused=fused)
    )
    model.train()

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        return loss

    return step
