"""Clouds of points: in the plane, and how far they are apart. Axes: N points, K width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples

from easyeditor.drawing import figures
from easyeditor.drawing.figures import Group

Array = np.ndarray[Any, np.dtype[Any]]


def pca_plane(points_NK: Array) -> tuple[Array, Array]:
    """The points (N, 2) along their two principal directions, and the shares of variance these explain (2,)."""
    wide = np.asarray(points_NK, dtype=np.float64)
    if len(wide) < 2:
        return np.zeros((len(wide), 2)), np.zeros(2)
    pca = PCA(n_components=min(2, *wide.shape), svd_solver="full")
    plane = pca.fit_transform(wide)
    missing = 2 - plane.shape[1]
    return np.pad(plane, ((0, 0), (0, missing))), np.pad(np.nan_to_num(pca.explained_variance_ratio_), (0, missing))


def tsne_plane(points_NK: Array, seed: int) -> Array | None:
    """The points by t-SNE (N, 2), perplexity 30 or a third of the points; None for fewer than 4 points."""
    count = len(points_NK)
    if count < 4:
        return None
    made = TSNE(n_components=2, perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=seed)
    plane: Array = made.fit_transform(np.asarray(points_NK, dtype=np.float64))
    return plane


def draw_planes(axes: Sequence[Axes], groups: Sequence[Group], seed: int) -> None:
    """Points (N, K) scaled to unit length, in two panels: along their principal directions, and by t-SNE."""
    pca_ax, tsne_ax = axes
    points = np.concatenate([group.values for group in groups]).astype(np.float64)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    cuts = np.cumsum([len(group.values) for group in groups])[:-1]
    plane, shares = pca_plane(points)
    shown = [(pca_ax, plane, f"PC 1 ({shares[0]:.0%} of variance)", f"PC 2 ({shares[1]:.0%})")]
    flat = tsne_plane(points, seed)
    if flat is None:
        tsne_ax.text(0.5, 0.5, "t-SNE needs at least 4 points", ha="center", transform=tsne_ax.transAxes)
    else:
        shown.append((tsne_ax, flat, "t-SNE 1", "t-SNE 2"))
    for ax, where, *labels in shown:
        parts = [replace(group, values=part) for group, part in zip(groups, np.split(where, cuts), strict=True)]
        figures.cloud(ax, parts, *labels)


def separation(low_N: Array, high_M: Array) -> float:
    """Chance that a value of `high` is above one of `low` (area under the ROC curve); 0.5 = they mix, 1 = apart."""
    difference = np.asarray(high_M, dtype=np.float64)[:, None] - np.asarray(low_N, dtype=np.float64)[None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def silhouette(cloud_NK: Array, others_MK: Array) -> float | None:
    """Mean silhouette of the points of one cloud against another, cosine distance: 0 = mixed, 1 = apart.

    None with fewer than 2 points in either.
    """
    if min(len(cloud_NK), len(others_MK)) < 2:
        return None
    labels = [0] * len(cloud_NK) + [1] * len(others_MK)
    values = silhouette_samples(np.concatenate([cloud_NK, others_MK]), labels, metric="cosine")
    return float(values[: len(cloud_NK)].mean())


def cosine_distances(points_NK: Array, centre_K: Array) -> Array:
    """1 - cos(point, centre) for each point (N,); 0 same direction, 1 at right angles."""
    points, centre = np.asarray(points_NK, dtype=np.float64), np.asarray(centre_K, dtype=np.float64)
    distances: Array = 1 - points @ centre / (np.linalg.norm(points, axis=1) * np.linalg.norm(centre))
    return distances
