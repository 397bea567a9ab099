"""Mixture density networks for Keras: fast training, exact densities, one SavedModel."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdn import (
        backbones,
        calibration,
        density,
        embeddings,
        features,
        heads,
        losses,
        optimizers,
    )
    from mdn.density import (
        GaussianMixture,
        MultivariateNormalDiag,
        MultivariateNormalTriL,
        mixture_of,
    )
    from mdn.ensembles import Ensemble
    from mdn.errors import MDNError
    from mdn.fitting.distribution import Fit, fit_distribution
    from mdn.model import MDN, load
    from mdn.regressor import MDNRegressor
    from mdn.selection import Selection, select_components
    from mdn.vae import VAE

__version__ = importlib.metadata.version("mdn")

# Imported when first asked for: `import mdn` must not wait for TensorFlow.
_HOME = {
    "MDN": "mdn.model",
    "VAE": "mdn.vae",
    "Ensemble": "mdn.ensembles",
    "load": "mdn.model",
    "GaussianMixture": "mdn.density",
    "MultivariateNormalDiag": "mdn.density",
    "MultivariateNormalTriL": "mdn.density",
    "mixture_of": "mdn.density",
    "MDNError": "mdn.errors",
    "Fit": "mdn.fitting.distribution",
    "fit_distribution": "mdn.fitting.distribution",
    "MDNRegressor": "mdn.regressor",
    "Selection": "mdn.selection",
    "select_components": "mdn.selection",
}
_MODULES = (
    "backbones",
    "calibration",
    "density",
    "embeddings",
    "features",
    "heads",
    "losses",
    "optimizers",
)

__all__ = [
    "MDN",
    "VAE",
    "Ensemble",
    "Fit",
    "GaussianMixture",
    "MDNError",
    "MDNRegressor",
    "MultivariateNormalDiag",
    "MultivariateNormalTriL",
    "Selection",
    "backbones",
    "calibration",
    "density",
    "embeddings",
    "features",
    "fit_distribution",
    "heads",
    "load",
    "losses",
    "mixture_of",
    "optimizers",
    "select_components",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"mdn.{name}")
    raise AttributeError(f"module 'mdn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
