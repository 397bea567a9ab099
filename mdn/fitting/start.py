"""Where the search for a mixture begins: clusters of the rows.

Shape letters: N rows, D event size, K components.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.cluster.vq import kmeans2

# A Gaussian start is never narrower than this share of the targets' spread: k-means may return a
# cluster of equal values, and a scale at its floor has no unconstrained parameter.
NARROWEST_START = 0.05
WIDTHS = 0.15, 1.2  # of the narrowest and the widest component that start at the centre
_MOST_ROWS = 10_000


class Start(NamedTuple):
    """Where training begins: K Gaussians in standardised units, as NumPy arrays."""

    weights: np.ndarray  # [K]
    loc: np.ndarray  # [K, D]
    scale_tril: np.ndarray  # [K, D, D]


def cluster(y: np.ndarray, components: int, rng: np.random.Generator) -> Start:
    """Return K distinct Gaussians from a k-means clustering, with a k-means++ start.

    Args:
        y: [N, D], standardised; of many rows a sample is clustered. Rows with a missing entry
            are left out or, where few are whole, filled with the mean.
        components: K.
        rng: of the sample and the clustering.

    Source:
        Arthur and Vassilvitskii (2007), k-means++: the advantages of careful seeding.
    """
    whole = y[~np.isnan(y).any(axis=1)]
    y = whole if len(whole) >= 20 * components else np.nan_to_num(y)
    n, d = y.shape
    sample = y[rng.permutation(n)[:_MOST_ROWS]]
    # Rows repeat where targets are tied, and k-means++ would start two means on one spot; a little
    # noise keeps them apart.
    sample = sample + rng.normal(scale=1e-3, size=sample.shape)
    if len(sample) < components:
        sample = np.tile(sample, (components, 1))
        sample = sample + rng.normal(scale=NARROWEST_START, size=sample.shape)
    # k-means++ takes K^2 N steps; among many components random rows are as far apart.
    minit = "++" if components <= 64 else "points"
    loc, label = kmeans2(sample, components, iter=20, minit=minit, rng=rng, missing="warn")
    weights, scale_tril = np.zeros(components), np.zeros([components, d, d])
    for k in range(components):
        members = sample[label == k]
        weights[k] = len(members) + 1.0
        # Shrunk towards a sphere, as two rows do not determine a covariance.
        spread = np.cov(members.T, bias=True).reshape(d, d) if len(members) else np.zeros([d, d])
        share = len(members) / (len(members) + d + 1.0)
        covariance = share * spread + (1.0 - share) * np.eye(d) / components**2
        scale_tril[k] = np.linalg.cholesky(covariance + NARROWEST_START**2 * np.eye(d))
    return Start(weights / weights.sum(), loc, scale_tril)


def centre(y: np.ndarray, components: int) -> Start:
    """Return K normals near the mean whose widths are spread from narrow to wide.

    Clusters of all targets say little about those at one x, which may lie between two of them.
    From here each component is as near to any target as the others, and they differ in width.

    Args:
        y: [N, D], standardised; NaN marks a missing entry.
        components: K.
    """
    k, d = components, y.shape[1]
    loc = 0.1 * np.nanquantile(y, (np.arange(k) + 0.5) / k, axis=0)  # [K, D]
    width = np.geomspace(*WIDTHS, k) if k > 1 else np.ones(1)
    return Start(np.full(k, 1.0 / k), loc, width[:, None, None] * np.eye(d))
