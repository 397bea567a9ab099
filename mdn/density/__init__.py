"""The distribution types and their exact queries; knows nothing of networks."""

from mdn.density.mixture import DiagGaussianMixture, GaussianMixture, mixture_of
from mdn.density.normal import MultivariateNormalDiag, MultivariateNormalTriL
from mdn.density.queries import MixtureParameters

__all__ = [
    "DiagGaussianMixture",
    "GaussianMixture",
    "MixtureParameters",
    "MultivariateNormalDiag",
    "MultivariateNormalTriL",
    "mixture_of",
]
