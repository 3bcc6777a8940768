"""Layers with correlated inputs, as real ones have, and the procedures of papers in plain NumPy."""

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


def largest(score, count):
    """True at the `count` largest of each row."""
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, np.argsort(-score, axis=1, kind="stable")[:, :count], True, axis=1)
    return mask


def wanda(weight, gram, pattern, sparsity):
    """Eq. 1 of Sun et al. (2023): scores |W_ij| ||X_j||, compared among the inputs of an output, or four of them."""
    score = np.abs(weight) * np.sqrt(np.diag(gram))
    count = 2 if pattern == "2:4" else round((1 - sparsity) * score.shape[1])
    rows = score.reshape(-1, 4) if pattern == "2:4" else score
    return np.where(largest(rows, count).reshape(score.shape), weight, 0)


def sparsegpt(weight, gram, pattern, sparsity, ridge=0.01):
    """Algorithm 1 of Frantar and Alistarh (2023) row by row in float64; masks for 128 inputs, or for four of n:m.

    Their code damps with a share of the Hessian's mean diagonal entry; here each input has that share of its own.
    """
    scale = np.sqrt(np.diag(gram).astype(np.float64))
    w = weight.astype(np.float64) * scale
    inputs, size = len(scale), 4 if pattern == "2:4" else 128
    hessian = gram / np.outer(scale, scale) + ridge * np.eye(inputs)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    # Of each row, or of the whole layer.
    kept = 0 if sparsity is None else round((1 - sparsity) * (inputs if pattern == "per-row" else w.size))
    for first in range(0, inputs, size):
        last = min(first + size, inputs)
        saliency = (w[:, first:last] / np.diag(upper)[first:last]) ** 2
        count = 2 if pattern == "2:4" else kept * last // inputs - kept * first // inputs
        rows = saliency.reshape(1, -1) if pattern == "unstructured" else saliency
        keep = largest(rows, count).reshape(saliency.shape)
        for i in range(first, last):
            error = np.where(keep[:, i - first], 0, w[:, i]) / upper[i, i]
            w[:, i:] -= np.outer(error, upper[i, i:])
            w[:, i] = np.where(keep[:, i - first], w[:, i], 0)
    return w / scale
