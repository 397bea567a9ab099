"""Digits: 1,797 handwritten digits of 8 by 8 pixels, as zeros and ones.

Shape letters: N rows.
"""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np

from mdn.data.rows import Data, Rows
from mdn.data.splits import split_indices
from mdn.errors import DataError

SHAPE = (8, 8)
TARGETS = tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8))
# Of the intensities, 0 to 16.
HALF = 8.0


@dataclasses.dataclass
class Digits:
    """The pixels of scikit-learn's digits, one where they have half of the intensity or more.

    There are no features. The digit itself is the rows' label, which is for pictures alone.

    Args:
        validation: fraction of the images.
        test: fraction of the images.
        seed: of the split.

    Source:
        Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository: its test set, which scikit-learn carries.
    """

    validation: float = 0.1
    test: float = 0.2
    seed: int = 0

    def load(self) -> Data:
        """Read and split the images.

        Raises:
            DataError: scikit-learn is not installed, or a fraction cannot be used.
        """
        if importlib.util.find_spec("sklearn") is None:
            raise DataError("data=digits needs the scikit-learn package: pip install 'mdn[vae]'")
        from sklearn.datasets import load_digits

        intensity, digit = load_digits(return_X_y=True)  # [N, 64], [N]
        y = (intensity >= HALF).astype(np.float64)
        rows = Rows(np.zeros([len(y), 0]), y, label=digit.astype(np.int64))
        indices = split_indices(len(y), validation=self.validation, test=self.test, seed=self.seed)
        train, validation, test = (rows.take(index) for index in indices)
        return Data(
            train,
            validation,
            test,
            features=(),
            targets=TARGETS,
            notes={"data/rows": float(len(y))},
            image_shape=SHAPE,
        )
