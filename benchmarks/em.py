"""EM for a Gaussian mixture beside scikit-learn's: seconds and final log-likelihood.

    pip install -e '.[benchmarks]' && python -m benchmarks.em

Both fit the same rows to the same tolerance, in turn, so that a busy machine slows both. Ours
compares ten starts on a sample before it goes on with one; scikit-learn has one start.
"""

from __future__ import annotations

import argparse
import os
import platform
import time

import numpy as np
from sklearn.mixture import GaussianMixture

from mdn.fitting.em import fit_mixture

TOLERANCE = 1e-4


def draw(rows: int, targets: int, components: int) -> np.ndarray:
    """Return rows [N, D] of a mixture whose components overlap."""
    rng = np.random.default_rng(0)
    loc = 1.5 * rng.standard_normal((components, targets))
    factor = 0.4 * rng.standard_normal((components, targets, targets)) + 0.5 * np.eye(targets)
    share = rng.dirichlet(np.full(components, 5.0))
    component = rng.choice(components, size=rows, p=share)
    noise = rng.standard_normal((rows, targets))
    return loc[component] + np.einsum("nij,nj->ni", factor[component], noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--targets", type=int, default=4)
    parser.add_argument("--components", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    y = draw(options.rows, options.targets, options.components)
    seconds: dict[str, list[float]] = {"scikit-learn": [], "mdn": []}
    nll: dict[str, list[float]] = {"scikit-learn": [], "mdn": []}
    for seed in range(options.repeats):
        begun = time.perf_counter()
        peer = GaussianMixture(
            options.components, tol=TOLERANCE, max_iter=1000, random_state=seed
        ).fit(y)
        seconds["scikit-learn"].append(time.perf_counter() - begun)
        nll["scikit-learn"].append(-peer.score(y))
        begun = time.perf_counter()
        ours = fit_mixture(y, options.components, tolerance=TOLERANCE, floor=1e-3, seed=seed)
        seconds["mdn"].append(time.perf_counter() - begun)
        nll["mdn"].append(ours.nll[-1])
    print(
        f"EM, N = {options.rows:,}, D = {options.targets}, K = {options.components}, tolerance "
        f"{TOLERANCE:g}, {options.repeats} seeds, {os.cpu_count()} cores ({platform.machine()})\n"
    )
    print("| | seconds, median (least - most) | NLL, nats per row, median (least - most) |")
    print("| --- | --- | --- |")
    for name in seconds:
        s, n = np.array(seconds[name]), np.array(nll[name])
        print(
            f"| {name} | {np.median(s):.2f} ({s.min():.2f} - {s.max():.2f}) "
            f"| {np.median(n):.4f} ({n.min():.4f} - {n.max():.4f}) |"
        )
    ratio = np.array(seconds["scikit-learn"]) / np.array(seconds["mdn"])
    print(f"\nspeed ratio: {np.median(ratio):.1f}x ({ratio.min():.1f} - {ratio.max():.1f})")


if __name__ == "__main__":
    main()
