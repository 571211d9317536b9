"""The paper's MNIST network in NumPy (float64): 784-500-10, sigmoids, sigmoid cross-entropy, Kolen-Pollack."""

import itertools

import numpy as np

RATE = 0.3
BATCH = 128
SIZES = (784, 500, 10)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def init(seed: int = 0) -> dict[str, np.ndarray]:
    """Draws W (fan_in, fan_out), b and B (fan_out, fan_in): Gaussian, of variance 1 / (fan_in + fan_out)."""
    random = np.random.default_rng(seed)
    weights = {}
    for i, (n, m) in enumerate(itertools.pairwise(SIZES), 1):
        std = (n + m) ** -0.5
        weights[f"W{i}"], weights[f"b{i}"] = random.normal(0, std, (n, m)), random.normal(0, std, m)
        if i == 2:
            weights["B2"] = random.normal(0, std, (m, n))
    return weights


def epoch(w: dict[str, np.ndarray], images: np.ndarray, targets: np.ndarray) -> None:
    """Trains one epoch in the order of the dataset, and changes ``w`` in place.

    Args:
      images: (examples, 784) in [0, 1]; targets: one-hot, (examples, 10).
    """
    for start in range(0, len(images) - BATCH + 1, BATCH):
        x, t = images[start : start + BATCH], targets[start : start + BATCH]
        h = sigmoid(x @ w["W1"] + w["b1"])
        y = sigmoid(h @ w["W2"] + w["b2"])
        delta2 = (y - t) * (RATE / len(x))
        delta1 = (delta2 @ w["B2"]) * h * (1 - h)
        change = h.T @ delta2
        w["W2"] -= change
        w["B2"] -= change.T
        w["b2"] -= delta2.sum(0)
        w["W1"] -= x.T @ delta1
        w["b1"] -= delta1.sum(0)
