"""Fits of a distribution to rows, without features: by gradient, in closed form, by EM.

`mdn.fit_distribution` is the entry; `em` and `start` need no TensorFlow.
"""
