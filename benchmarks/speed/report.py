"""The results as Markdown, a picture and JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.speed.contenders import KERAS, MDN, NETWORK
from benchmarks.speed.measure import FINAL_TOLERANCE, START_TOLERANCE, Entrant, Spread
from mdn.errors import RunError

# What `mdn` is to reach: at least so many times as fast as Keras as documented and as the best
# peer, and a step at most so many times that of the network with a sum of squares.
BARS = {
    "keras": {"S": 20.0, "M": 8.0, "L": 5.0, "H": 2.0},
    "peer": {"S": 1.0, "M": 1.0, "L": 1.0, "H": 1.0},
    "overhead": {"S": 2.5, "M": 2.0, "L": 1.8, "H": 2.5},
}
PACKAGES = ("tensorflow", "tf-keras", "tensorflow-probability", "jax", "torch", "numpy")
_PEERS = ("PyTorch", "JAX")
_COLORS = {"mdn": "#c1272d", "Keras": "#e6a23c", "PyTorch": "#6b7fa8", "JAX": "#5b9a6f"}


@dataclasses.dataclass
class Results:
    """All that was measured; what was not is empty.

    Attributes:
        command: what was run.
        repeats: rounds.
        race: workload -> entrants of the main table, the bare network last.
        precision: workload -> entrants whose triangles are factors of the precision.
        disagreements: what shows that two of them did not train the same model.
        profile: workload -> what `benchmarks.speed.operations.measure` found.
        cost: size -> entrants that double it, the base first.
        memory: workload -> label -> MiB, see `benchmarks.speed.memory.measure`.
        ensembles: of 1, 5 and 20 members.
        streaming: rows in memory, rows read anew.
        inference: the bare network, and answers of the model.
    """

    command: str
    repeats: int
    race: dict[str, list[Entrant]] = dataclasses.field(default_factory=dict)
    precision: dict[str, list[Entrant]] = dataclasses.field(default_factory=dict)
    disagreements: list[str] = dataclasses.field(default_factory=list)
    profile: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    cost: dict[str, list[Entrant]] = dataclasses.field(default_factory=dict)
    memory: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    ensembles: list[Entrant] = dataclasses.field(default_factory=list)
    streaming: list[Entrant] = dataclasses.field(default_factory=list)
    inference: list[Entrant] = dataclasses.field(default_factory=list)
    machine: dict[str, Any] = dataclasses.field(default_factory=lambda: describe_machine())

    def write(self, folder: Path) -> None:
        """Write `speed.md` and, where there was a race, `speed.png`."""
        folder.mkdir(parents=True, exist_ok=True)
        picture = plot(self, folder / "speed.png")
        image = "\n![Time of a training step by workload](speed.png)\n" if picture else ""
        (folder / "speed.md").write_text(markdown(self, image), encoding="utf-8")

    @classmethod
    def open(cls, path: Path, command: str, repeats: int) -> Results:
        """Return what `write_json` wrote, to go on with; what did not agree is left out.

        Raises:
            RunError: the file has no results of this command on this machine.
        """
        new = cls(command, repeats)
        try:
            found = json.loads(path.read_text("utf-8"))
            machines = [{**m, "load": None} for m in (found["machine"], new.machine)]
            if machines[0] != machines[1] or found["repeats"] != repeats:
                raise RunError(
                    f"--json {path} holds numbers of another machine, of other versions or of "
                    f"{found['repeats']} rounds: name another file, or remove it"
                )
            for name in ("race", "precision", "cost"):
                series = found[name].items()
                setattr(new, name, {key: [*map(Entrant.restore, es)] for key, es in series})
            for name in ("ensembles", "streaming", "inference"):
                setattr(new, name, [*map(Entrant.restore, found[name])])
            new.profile, new.memory = found["profile"], found["memory"]
            new.machine["load"] = found["machine"]["load"]
            for line in found["disagreements"]:
                for races in (new.race, new.precision):
                    races.pop(line.partition(",")[0], None)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"--json {path} cannot be gone on from: {error!r}") from error
        return new

    def write_json(self, path: Path) -> None:
        """Write all numbers."""

        def plain(value: Any) -> Any:
            if isinstance(value, Entrant):
                return value.record()
            if isinstance(value, Mapping):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, list) else value

        fields = {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def describe_machine() -> dict[str, Any]:
    """Return the processor, its cores, and the versions of what was compared."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version(), **versions},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# ---------------------------------------------------------------------- Markdown


def markdown(results: Results, image: str = "") -> str:
    """Return the report."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts = [
        "# Speed\n\n"
        f"Measured by `{results.command}` on {machine['processor']}, {machine['cores']} cores, "
        f"{machine['system']}; {versions}. Load before the start: {machine['load']}.\n\n"
        f"Medians of {results.repeats} rounds, with the least and the greatest. In a round all "
        "contenders train in turn, in another order each time, each in a process of its own that "
        "is idle otherwise; ratios are taken within a round.\n"
    ]
    if results.race:
        parts += [_times(results, image), _bars(results), _losses(results)]
    if results.profile:
        parts.append(_profile(results))
    if results.cost:
        parts.append(_cost(results.cost))
    if results.memory:
        parts.append(_memory(results.memory))
    if results.ensembles:
        title = "Ensembles: all members in one program"
        parts.append(_lineup(title, results.ensembles))
    if results.streaming:
        title = "Rows read anew in every epoch, from Parquet and TFRecord files"
        parts.append(_lineup(title, results.streaming))
    if results.inference:
        title = "Answers for many rows"
        parts.append(_lineup(title, results.inference, "a batch of rows"))
    if failures := _failures(results):
        parts.append("## Not measured\n\n" + "\n".join(f"- {line}" for line in failures) + "\n")
    return "\n".join(parts)


def _times(results: Results, image: str) -> str:
    names = list(results.race)
    sizes = "\n".join(f"- {name}: {results.race[name][0].workload}" for name in names)
    rows = results.race[names[0]][0].workload.rows
    order = [(e.key, e.label) for e in results.race[names[0]]]
    times, ratios = [], []
    for key, label in order:
        found = [_find(results.race[name], key) for name in names]
        ours = [_find(results.race[name], MDN.key) for name in names]
        times.append([label, *(_microseconds(e) for e in found)])
        if key not in (MDN.key, NETWORK.key):
            pairs = zip(found, ours, strict=True)
            ratios.append([label, *(_ratio(e, o) for e, o in pairs)])
    text = (
        f"## A training step, microseconds\n{image}\n{_table(['', *names], times)}\n"
        f"{rows:,} rows, float32, Adam, full covariances by their Cholesky factors (`scale_tril`, "
        "softplus diagonal):\n\n"
        f"{sizes}\n\n"
        "The last line is the same network and loop with the sum of squares of its P outputs for "
        "a loss. Keras tuned: tf.data, an epoch in each call (`steps_per_execution`), "
        "`jit_compile`. PyTorch: fused Adam, rows indexed a batch at a time. JAX: an epoch is one "
        "jitted scan. The end of Keras's `fit` on arrays waits for a thread of tf.data, which "
        "wakes 10 ms, 30, 70, .. 5.11 s, 10.23 s, 20.47 s after the start: its users wait too.\n"
    )
    if MDN.key in dict(order) and ratios:
        text += f"\nAs multiples of `mdn`'s time:\n\n{_table(['', *names], ratios)}"
    return text


def _bars(results: Results) -> str:
    names = list(results.race)
    lines = []
    for question, title in (
        ("keras", "times as fast as Keras as documented"),
        ("peer", "times as fast as the best of PyTorch and JAX"),
        ("overhead", "density overhead: the step over that with a sum of squares"),
    ):
        cells = []
        for name in names:
            entrants = results.race[name]
            ours = _find(entrants, MDN.key)
            other = {
                "keras": _find(entrants, KERAS.key),
                "peer": best_peer(entrants),
                "overhead": _find(entrants, NETWORK.key),
            }[question]
            more_is_better = question != "overhead"
            pair = (other, ours) if more_is_better else (ours, other)
            cells.append(_judged(*pair, BARS[question].get(name), more_is_better))
        lines.append([title, *cells])
    if results.precision:
        cells = []
        for name in names:
            entrants = results.precision.get(name, [])
            peer, ours = best_peer(entrants), _find(entrants, MDN.key)
            cells.append(_judged(peer, ours, BARS["peer"].get(name), True))
        lines.append(["`tril_precision`: times as fast as the best precision factor", *cells])
    peers = [f"{n}: {peer.label}" for n in names if (peer := best_peer(results.race[n]))]
    best = f"\nThe best peer: {'; '.join(peers)}.\n" if peers else ""
    return f"## `mdn` against its bars\n\n{_table(['', *names], lines)}{best}"


def best_peer(entrants: Sequence[Entrant]) -> Entrant | None:
    """Return the fastest entrant of PyTorch or JAX."""
    peers = [e for e in entrants if e.label.startswith(_PEERS) and e.spread is not None]
    return min(peers, key=lambda e: float(np.median(e.microseconds)), default=None)


def _losses(results: Results) -> str:
    names = list(results.race)
    lines = []
    for entrant in results.race[names[0]]:
        if entrant.key != NETWORK.key:
            found = [_find(results.race[name], entrant.key) for name in names]
            finals = [None if e is None else e.final_loss for e in found]
            lines.append(
                [entrant.label, *("-" if loss is None else f"{loss:.3f}" for loss in finals)]
            )
    fixed, per_target = FINAL_TOLERANCE
    counts = {name: max(len(e.losses) for e in results.race[name]) for name in names}
    rounds = ", ".join(f"{name}: {count}" for name, count in counts.items())
    verdict = (
        "All agree."
        if not results.disagreements
        else "They do NOT agree:\n\n" + "\n".join(f"- {line}" for line in results.disagreements)
    )
    return (
        "## The same model: NLL of the training rows, nats per row\n\n"
        f"{_table(['', *names], lines)}\n"
        f"Means over the ends of rounds ({rounds}). All start from the same weights, where their "
        "losses are compared with one computed in NumPy (relative tolerance "
        f"{START_TOLERANCE:g}), and train as many epochs, each in an order of its own "
        f"(tolerance {fixed:g} + {per_target:g} D nats about the median). "
        f"{verdict}\n"
    )


def _profile(results: Results) -> str:
    names = list(results.profile)
    rows = {
        "a step of `mdn`": "step",
        "its matrix products": "products",
        "its other operations": "others",
    }
    lines = [
        [label, *(f"{results.profile[name][key]:,.0f}" for name in names)]
        for label, key in rows.items()
    ]
    lines.insert(
        3, ["how many operations", *(f"{results.profile[n]['operations']:.0f}" for n in names)]
    )
    peers = {name: best_peer(results.race.get(name, [])) for name in names}
    if any(peers.values()):
        lines.append(
            ["a whole step of the best peer", *(_microseconds(p) for p in peers.values())]
        )
    return (
        "## Where a step's time goes, microseconds\n\n"
        f"{_table(['', *names], lines)}\n"
        "By TensorFlow's profiler, which adds a part of a microsecond to each operation, and to "
        "those that two threads share more.\n"
    )


def _cost(cost: Mapping[str, Sequence[Entrant]]) -> str:
    base = next(iter(cost.values()))[0]
    lines = []
    for letter, entrants in cost.items():
        # Of N the epoch, which is what grows.
        steps = [e.workload.steps / 1000.0 if letter == "N" else 1.0 for e in entrants]
        unit = "ms an epoch" if letter == "N" else "us a step"
        medians = [
            None if e.spread is None else e.spread.median * factor
            for e, factor in zip(entrants, steps, strict=True)
        ]
        cells = ["-" if m is None else f"{m:,.1f}" for m in medians]
        growth = "-"
        if medians[0] is not None and medians[-1] is not None:
            growth = f"{(medians[-1] / medians[0]) ** (1.0 / (len(medians) - 1)):.2f}x"
        lines.append([f"{letter}, {unit}", *cells, growth])
    header = ["doubled", *(f"{2**i}x" for i in range(len(next(iter(cost.values())))))]
    return (
        f"## Cost against N, K and D\n\nFrom {base.workload.name}: {base.workload}, "
        f"N {base.workload.rows:,}.\n\n{_table([*header, 'mean growth'], lines)}"
    )


def _memory(memory: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    names = list(memory)
    labels = list(dict.fromkeys(label for found in memory.values() for label in found))
    lines = []
    for label in labels:
        cells = []
        for name in names:
            found = memory[name].get(label, {})
            cells.append(
                f"{found['peak']:,.0f} ({found['peak'] - found['before']:+,.0f})"
                if "peak" in found
                else "-"
            )
        lines.append([label, *cells])
    return (
        "## Memory at its peak, MiB\n\n"
        "Of a process that trains this alone, compilation included; in brackets what came on top "
        f"of the imported packages and the rows.\n\n{_table(['', *names], lines)}"
    )


def _lineup(title: str, entrants: Sequence[Entrant], step: str = "a training step") -> str:
    first = entrants[0]
    lines = [
        [e.label, _microseconds(e), "1" if e is first else _ratio(e, first)] for e in entrants
    ]
    header = ["", f"{step}, us", f"multiple of {first.label}"]
    return (
        f"## {title}\n\n{first.workload.name}: {first.workload}, N {first.workload.rows:,}.\n\n"
        f"{_table(header, lines)}"
    )


def _failures(results: Results) -> list[str]:
    groups = [*results.race.values(), *results.precision.values(), *results.cost.values()]
    groups += [results.ensembles, results.streaming, results.inference]
    lines = [
        f"{entrant.workload.name}, {entrant.label}: {entrant.failure}"
        for group in groups
        for entrant in group
        if entrant.failure is not None
    ]
    for name, labels in results.memory.items():
        for label, found in labels.items():
            if "failure" in found:
                lines.append(f"{name}, memory of {label}: {found['failure']}")
    return list(dict.fromkeys(lines))


def _find(entrants: Sequence[Entrant], key: str) -> Entrant | None:
    return next((entrant for entrant in entrants if entrant.key == key), None)


def _microseconds(entrant: Entrant | None) -> str:
    if entrant is None or entrant.spread is None:
        return "-"
    digits = 1 if entrant.spread.median < 100.0 else 0
    return "{:,.{d}f} ({:,.{d}f} - {:,.{d}f})".format(*entrant.spread, d=digits)


def _ratio(slow: Entrant | None, fast: Entrant | None) -> str:
    spread = None if slow is None or fast is None else slow.over(fast)
    return "-" if spread is None else _times_text(spread)


def _times_text(spread: Spread) -> str:
    digits = 1 if spread.median >= 9.95 else 2
    return "{:.{d}f}x ({:.{d}f} - {:.{d}f})".format(*spread, d=digits)


def _judged(
    above: Entrant | None, below: Entrant | None, bar: float | None, more_is_better: bool
) -> str:
    spread = None if above is None or below is None else above.over(below)
    if spread is None:
        return "-"
    if bar is None:
        return _times_text(spread)
    met = spread.median >= bar if more_is_better else spread.median <= bar
    sign = ">=" if more_is_better else "<="
    return f"{_times_text(spread)}; {sign} {bar:g} {'met' if met else '**missed**'}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(row).replace("|  |", "| |") + " |\n" for row in rows)


# ---------------------------------------------------------------------- picture


def plot(results: Results, path: Path) -> bool:
    """Draw the time of a step by workload and contender; return whether there is any."""
    if not results.race:
        return False
    names = list(results.race)
    labels = list(dict.fromkeys(e.label for name in names for e in results.race[name]))
    size = (2.4 + 2.6 * len(names), 1.3 + 0.34 * len(labels))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for entrant in results.race[name]:
            spread = entrant.spread
            if spread is None:
                continue
            place = labels.index(entrant.label)
            bare = entrant.key == NETWORK.key
            color = next(c for family, c in _COLORS.items() if entrant.label.startswith(family))
            error = [[spread.median - spread.least], [spread.most - spread.median]]
            axis.barh(
                place,
                spread.median,
                xerr=error,
                color="white" if bare else color,
                edgecolor=color,
                hatch="////" if bare else None,
                error_kw={"lw": 0.8, "ecolor": "0.25"},
            )
            axis.annotate(
                f"{spread.median:,.0f}",
                (spread.most, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axis.set_xscale("log")
        low, high = _limits(results.race[name])
        axis.set_xlim(10.0 ** np.floor(np.log10(low)), high * 4.0)  # room for the numbers
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{name}: D = {_targets(results, name)}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", which="major", color="0.9", lw=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(axis="x", labelsize=8)
    axes[0][0].set_yticks(range(len(labels)), labels, fontsize=9)
    axes[0][0].invert_yaxis()
    figure.supxlabel("a training step, microseconds (median; least to most)", fontsize=9)
    figure.savefig(path, dpi=150)
    return True


def _limits(entrants: Sequence[Entrant]) -> tuple[float, float]:
    times = [t for e in entrants if e.failure is None for t in e.microseconds] or [1.0]
    return min(times), max(times)


def _targets(results: Results, name: str) -> int:
    return results.race[name][0].workload.targets
