"""The distribution types and their exact queries; knows nothing of networks."""

from mdn.density.low_rank import LowRankGaussianMixture, MultivariateNormalLowRank
from mdn.density.mixing import mixture_of
from mdn.density.mixture import DiagGaussianMixture, GaussianMixture
from mdn.density.normal import MultivariateNormalDiag, MultivariateNormalTriL
from mdn.density.parameters import MixtureParameters
from mdn.density.precision import MultivariateNormalPrecision, PrecisionGaussianMixture
from mdn.density.transformed import Transformed

__all__ = [
    "DiagGaussianMixture",
    "GaussianMixture",
    "LowRankGaussianMixture",
    "MixtureParameters",
    "MultivariateNormalDiag",
    "MultivariateNormalLowRank",
    "MultivariateNormalPrecision",
    "MultivariateNormalTriL",
    "PrecisionGaussianMixture",
    "Transformed",
    "mixture_of",
]
