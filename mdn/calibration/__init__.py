"""Calibration: can a density be trusted? `report` asks the rows, `sbc` a simulator.

Shape letters: N rows, D event size.
"""

from mdn.calibration.judging import report
from mdn.calibration.simulations import SBC, sbc
from mdn.calibration.slices import Slice
from mdn.calibration.summary import Report
from mdn.calibration.uniformity import Uniformity, check_uniformity

__all__ = ["SBC", "Report", "Slice", "Uniformity", "check_uniformity", "report", "sbc"]
