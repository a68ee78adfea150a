"""How well a simple classifier reads the class from frozen features. Pure functions, on the CPU."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from jaxtyping import Float, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import normalize

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of C, the inverse of the penalty
HELD_OUT = 0.2  # of the training rows, to choose C by
BLOCK = 1024  # queries at once


def linear(
    train_x: Float[Tensor, "n d"],
    train_y: Int64[Tensor, " n"],
    test_x: Float[Tensor, "m d"],
    test_y: Int64[Tensor, " m"],
    seed: int = 0,
) -> float:
    """Accuracy (0 to 1) of `linear_guesses`. ValueError: as there, and test rows without a label."""
    _check("test", test_x, test_y)
    return accuracy(linear_guesses(train_x, train_y, test_x, seed), test_y)


def linear_guesses(
    train_x: Float[Tensor, "n d"], train_y: Int64[Tensor, " n"], test_x: Float[Tensor, "m d"], seed: int = 0
) -> Int64[Tensor, " m"]:
    """The class of each test row by logistic regression on standardised features.

    C is chosen on a fifth of the training rows, then all of them are fitted; the test rows choose nothing.
    ValueError: rows without a label, not finite, or all of one class.
    """
    _check_all(train_x, train_y, test_x)
    used = (train_x != train_x[0]).any(dim=0)
    used[0] = True  # constant columns say nothing, but one must be left
    scaler = StandardScaler().fit(train_x[:, used].double().numpy())
    x, test = (np.asarray(scaler.transform(t[:, used].double().numpy()), np.float32) for t in (train_x, test_x))
    y = train_y.numpy()
    rare = len(y) < 10 or np.unique(y, return_counts=True)[1].min() < 2
    fit, held = train_test_split(np.arange(len(y)), test_size=HELD_OUT, random_state=seed, stratify=None if rare else y)
    best = 1.0
    if len(np.unique(y[fit])) > 1:
        scores = {c: _fitted(x[fit], y[fit], c).score(x[held], y[held]) for c in STRENGTHS}
        best = max(scores, key=lambda c: scores[c])  # the strongest penalty among equals
    return torch.from_numpy(_fitted(x, y, best).predict(test))


def _fitted(x: np.ndarray, y: np.ndarray, strength: float) -> LogisticRegression:
    with warnings.catch_warnings():
        # Under a weak penalty the weights may still move after 300 iterations; the accuracy no longer does.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=strength, max_iter=300, tol=1e-3).fit(x, y)


def knn(
    train_x: Float[Tensor, "n d"],
    train_y: Int64[Tensor, " n"],
    test_x: Float[Tensor, "m d"],
    test_y: Int64[Tensor, " m"],
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy (0 to 1) of `knn_guesses`. ValueError: as there, and test rows without a label."""
    _check("test", test_x, test_y)
    return accuracy(knn_guesses(train_x, train_y, test_x, k, temperature), test_y)


def knn_guesses(
    train_x: Float[Tensor, "n d"],
    train_y: Int64[Tensor, " n"],
    test_x: Float[Tensor, "m d"],
    k: int = 20,
    temperature: float = 0.07,
) -> Int64[Tensor, " m"]:
    """The class of each test row by the k nearest rows by cosine, their votes weighted by exp(cosine / temperature).

    Wu et al., CVPR 2018, section 3.4. ValueError: as in `linear_guesses`.
    """
    _check_all(train_x, train_y, test_x)
    classes, votes_for = train_y.unique(return_inverse=True)
    rows = normalize(train_x.float(), dim=1)
    found = []
    for at in range(0, len(test_x), BLOCK):
        near = (normalize(test_x[at : at + BLOCK].float(), dim=1) @ rows.T).topk(min(k, len(rows)), dim=1)
        votes = torch.zeros(len(near.values), len(classes))
        votes.scatter_add_(1, votes_for[near.indices], ((near.values - 1) / temperature).exp())
        found.append(classes[votes.argmax(dim=1)])
    return torch.cat(found)


def accuracy(guesses: Int64[Tensor, " m"], labels: Int64[Tensor, " m"]) -> float:
    return int((guesses == labels).sum()) / len(labels)


def _check_all(train_x: Tensor, train_y: Tensor, test_x: Tensor) -> None:
    _check("training", train_x, train_y)
    _check("test", test_x)
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"training rows have {train_x.shape[1]} numbers, test rows {test_x.shape[1]}")
    if len(train_y.unique()) < 2:
        raise ValueError(f"all training rows are of class {int(train_y[0])}; a probe needs two classes or more")


def _check(part: str, x: Tensor, y: Tensor | None = None) -> None:
    labels = len(x) if y is None else len(y)
    if not len(x) or len(x) != labels:
        raise ValueError(f"{part} has {len(x)} rows and {labels} labels; give one label a row, and a row at least")
    if y is not None and int(y.min()) < 0:
        raise ValueError(f"{part} has {int((y < 0).sum())} rows without a label (-1); leave them out")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{part} rows of shape {tuple(x.shape)} are not all finite; the encoder has diverged")
