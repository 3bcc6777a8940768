"""Layers with correlated inputs, as real ones have, and the mAIHT paper's procedure in plain NumPy."""

import numpy as np

# Methods for the pattern group:C only.
GROUP_METHODS = ("osscar", "flap")


def make_layer(rng, outputs=48, inputs=64, tokens=256, dtype=np.float32):
    """Weight `[out, in]` and the Grams of calibration and held-out inputs with strong common directions."""
    mixing = np.eye(inputs) + 0.5 * rng.standard_normal((inputs, inputs)) / np.sqrt(8)
    scales = np.exp(rng.standard_normal(inputs))
    weight = rng.standard_normal((outputs, inputs)).astype(dtype)
    grams = []
    for _ in range(2):
        x = rng.standard_normal((tokens, inputs)) @ mixing * scales
        grams.append((x.T @ x).astype(np.float32))
    return weight, grams[0], grams[1]


def error_of(pruned, weight, gram):
    """Relative output error in float64."""
    weight, gram = np.asarray(weight, np.float64), np.asarray(gram, np.float64)
    change = np.asarray(pruned, np.float64) - weight
    return np.sum((change @ gram) * change) / np.sum((weight @ gram) * weight)


def paper_procedure(weight, gram, sparsity, iterations=20, refit=30, ridge=0.1):
    """Algorithm 1 of Wen, Zuo, Pan (2025) with its published settings, products written out, float64."""
    gram = np.asarray(gram, np.float64)
    scale = np.sqrt(np.diag(gram))
    h = gram / np.outer(scale, scale) + ridge * np.eye(len(gram))
    b = (np.asarray(weight, np.float64) * scale).T
    alpha = 0.97 / np.linalg.eigvalsh(h)[-1]
    share = 0.95 if sparsity > 0.35 else 0.99 if sparsity < 0.15 else 0.97
    delta = 0.015 if sparsity > 0.35 else 0.01
    level = np.sort(np.abs(b).ravel())[::-1][int(share * b.size)] ** 2 / (2 * alpha)

    def f(v):
        return 0.5 * np.sum((v - b) * (h @ (v - b))) + level * np.count_nonzero(v)

    def step(v):
        moved = v - alpha * (h @ (v - b))
        return moved * (np.abs(moved) >= np.sqrt(2 * level * alpha))

    x0, x1, z, t0, t1 = b, b, b, 0.0, 1.0
    for _ in range(iterations):
        level *= 1 + sparsity - delta - np.mean(x1 == 0)
        y = x1 + (t0 - 1) / t1 * (x1 - x0) + t0 / t1 * (z - x1)
        z, v = step(y), step(x1)
        x0, x1 = x1, z if f(z) <= f(v) else v
        t0, t1 = t1, (np.sqrt(4 * t1**2 + 1) + 1) / 2
    kept = round((1 - sparsity) * b.size)
    mask = np.zeros(b.size, bool)
    mask[np.argsort(-np.abs(x1).ravel(), kind="stable")[:kept]] = True
    mask = mask.reshape(b.shape)
    x = x1 * mask
    for _ in range(refit):
        x = (x - alpha * (h @ (x - b))) * mask
    return (x / scale[:, None]).T
