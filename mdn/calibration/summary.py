"""`Report`: what rows say of a density's calibration, as numbers, as text, as a page.

Shape letters: N rows, D event size.
"""

from __future__ import annotations

import dataclasses
import io
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mdn.calibration.scores import Scores
from mdn.calibration.slices import Slice
from mdn.calibration.uniformity import (
    Uniformity,
    central,
    check_uniformity,
    share_band,
    share_below,
)
from mdn.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEVELS = np.arange(1, 100) / 100
_WORST = 3  # slices in the text


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The calibration of a density on N rows. Print it, plot it, or ask it.

    Attributes:
        targets: D names.
        scores: of each row.
        reference_crps: [N, D], of the marginal distribution of y as the forecast of every row.
        weight: [N], or None.
        step: [D], of the grid that a target stands on; zero where there is none.
        slices: the calibration of parts of the rows.
    """

    targets: tuple[str, ...]
    scores: Scores
    reference_crps: np.ndarray
    weight: np.ndarray | None
    step: np.ndarray
    slices: tuple[Slice, ...]

    @property
    def pit(self) -> np.ndarray:
        """[N, D], uniform on [0, 1] where the density is calibrated."""
        return self.scores.pit

    def __len__(self) -> int:
        return len(self.pit)

    def test(self, target: int | str = 0) -> Uniformity:
        """Return the tests of one target's PIT."""
        return check_uniformity(self.pit[:, self._index(target)], self.weight)

    def test_regions(self) -> Uniformity:
        """Return the tests of the highest-density regions, of all targets together."""
        return check_uniformity(self.scores.region, self.weight)

    def coverage(self, level: float | np.ndarray, target: int | str | None = None) -> Any:
        """Return the share of the observed entries inside of central intervals.

        Args:
            level: of the intervals, in [0, 1].
            target: one target, by name or number; None: the entries of all of them.

        Returns:
            The shape of `level`.
        """
        pit = self.pit if target is None else self.pit[:, [self._index(target)]]
        weight = None if self.weight is None else np.repeat(self.weight, pit.shape[1])
        return share_below(central(pit.ravel()), np.asarray(level), weight)

    def coverage_band(self, level: float | np.ndarray, target: int | str = 0) -> Any:
        """Return between what `coverage` of one target lies in 95 of 100 cases if calibrated."""
        return share_band(self.test(target).n, np.asarray(level))

    def region_coverage(self, level: float | np.ndarray) -> Any:
        """Return the share of the rows inside of highest-density regions of all targets."""
        return share_below(self.scores.region, np.asarray(level), self.weight)

    def below(self, probability: float | np.ndarray, target: int | str = 0) -> Any:
        """Return the share of y below the quantile of one target: the probability, if right."""
        return share_below(self.pit[:, self._index(target)], np.asarray(probability), self.weight)

    def calibration_error(self, target: int | str = 0) -> float:
        """Return the mean distance of the coverage from the level, over levels 1 % to 99 %."""
        return float(np.abs(self.coverage(_LEVELS, target) - _LEVELS).mean())

    def _index(self, target: int | str) -> int:
        if isinstance(target, str):
            if target not in self.targets:
                raise DataError(f"target={target}: choose one of {', '.join(self.targets)}")
            return self.targets.index(target)
        if not -len(self.targets) <= target < len(self.targets):
            raise DataError(f"target={target}: there are {len(self.targets)}, from 0 on")
        return target

    def _mean(self, values: np.ndarray) -> float:
        """Return the weighted mean of [N], NaN left out."""
        present = ~np.isnan(values)
        if not present.any():
            return float("nan")
        weight = None if self.weight is None else self.weight[present]
        return float(np.average(values[present], weights=weight))

    # ------------------------------------------------------------------ as numbers

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers of the report, as JSON can hold them.

        Returns:
            `n`; `targets`: for each by its name the tests and direction of its PIT, coverage,
            calibration error, CRPS with its skill, the widths of its intervals, and the grid's
            step; `regions`: p values and coverage of the highest-density regions; `slices`.
        """
        targets = {}
        for d, name in enumerate(self.targets):
            test = self.test(d)
            observed = ~np.isnan(self.scores.crps[:, d])
            crps = self._mean(self.scores.crps[:, d])
            reference = self._mean(np.where(observed, self.reference_crps[:, d], np.nan))
            varies = reference > 1e-9 * crps  # of a constant it is zero, but for rounding
            values = {
                **dataclasses.asdict(test),
                "verdict": test.describe(),
                "coverage50": float(self.coverage(0.5, d)),
                "coverage90": float(self.coverage(0.9, d)),
                "calibration_error": self.calibration_error(d),
                "crps": crps,
                "crps_skill": 1.0 - crps / reference if varies else float("nan"),
                "width50": self._mean(self.scores.width50[:, d]),
                "width90": self._mean(self.scores.width90[:, d]),
                "step": float(self.step[d]),
            }
            targets[name] = {
                key: value
                for key, value in values.items()
                if value == value  # without NaN
            }
        regions = self.test_regions()
        return {
            "n": len(self),
            "targets": targets,
            "regions": {
                "n": regions.n,
                "p_value": regions.p_value,
                "chi_square_p": regions.chi_square_p,
                "coverage50": float(self.region_coverage(0.5)),
                "coverage90": float(self.region_coverage(0.9)),
            },
            "slices": [dataclasses.asdict(each) for each in self.slices],
        }

    def metrics(self, prefix: str = "test/") -> dict[str, float]:
        """Return flat keys for metrics.json.

        Returns:
            coverage50, coverage90: share of the observed entries, of all targets, inside of the
                central intervals of their margins.
            region_coverage50, region_coverage90, region_p: of the highest-density regions of all
                targets together, and the p-value of their test; where D > 1.
            calibration_error: mean distance of the coverage from the level, over levels.
            pit_p: p-value of the test that the PIT is uniform.
            crps, crps_skill: in the target's units; one minus its ratio to that of the marginal.
            width90: mean width of the central 90 % intervals, in the target's units: sharpness.
            The last five of each target as <key>/<target>, and of a single one also as <key>.
            slices, slices_off: how many there are, and with an adjusted p-value below .05.
        """
        numbers = self.to_dict()
        found = {f"coverage{p}": float(self.coverage(p / 100)) for p in (50, 90)}
        if len(self.targets) > 1:
            found |= {
                f"region_{key}": numbers["regions"][key] for key in ("coverage50", "coverage90")
            }
            found["region_p"] = numbers["regions"]["p_value"]
        for name, values in numbers["targets"].items():
            values = {**values, "pit_p": values["p_value"]}
            for key in ("calibration_error", "pit_p", "crps", "crps_skill", "width90"):
                if key in values and values["n"]:
                    found[f"{key}/{name}"] = values[key]
                    if len(self.targets) == 1:
                        found[key] = values[key]
        if self.slices:
            found["slices"] = float(len(self.slices))
            found["slices_off"] = float(sum(s.adjusted_p < 0.05 for s in self.slices))
        return {prefix + key: value for key, value in found.items()}

    # ------------------------------------------------------------------ for people

    def plot(self) -> Figure:
        """Return a page: PIT, quantiles, coverage, and the slices that are farthest off."""
        from mdn.calibration.plots import calibration_figure

        return calibration_figure(self)

    def __repr__(self) -> str:
        console = Console(
            file=io.StringIO(),
            width=96,
            color_system=None,
            force_jupyter=False,
            markup=False,  # names are shown as they are
            emoji=False,
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("target", no_wrap=True, max_width=18, overflow="ellipsis")
        for heading in ("50 %", "90 %", "PIT p", "CRPS", "skill", "90 % width"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        numbers = self.to_dict()
        for name, of in numbers["targets"].items():
            table.add_row(
                name,
                f"{of['coverage50']:.1%}",
                f"{of['coverage90']:.1%}",
                _p(of["p_value"]),
                f"{of['crps']:.4g}" if "crps" in of else "",
                f"{of['crps_skill']:.1%}" if "crps_skill" in of else "",
                f"{of['width90']:.4g}" if "width90" in of else "",
                of["verdict"],
            )
        if len(self.targets) > 1:
            of, test = numbers["regions"], self.test_regions()
            shares = [f"{of[key]:.1%}" for key in ("coverage50", "coverage90")]
            verdict = test.describe()
            if verdict != "calibrated":  # a region is too small where ranks are high
                verdict = "too small" if test.shift > 0.0 else "too large"
            table.add_row("all together", *shares, _p(of["p_value"]), "", "", "", verdict)
        console.print(f"Calibration on {len(self):,} rows: what intervals of 50 and 90 % hold")
        console.print(table)
        off = sorted((s for s in self.slices if s.adjusted_p < 0.05), key=lambda s: s.adjusted_p)
        if self.slices:
            console.print(f"{len(off)} of {len(self.slices)} slices are off (adjusted p < .05)")
        for each in off[:_WORST]:
            what = each.by if len(self.targets) == 1 else f"{each.target} by {each.by}"
            console.print(
                f"  {what}, {each.label}: 90 % hold {each.coverage90:.1%} of {each.n:,.0f}"
            )
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in lines)


def _p(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}" if value > 1e-99 else "0"
