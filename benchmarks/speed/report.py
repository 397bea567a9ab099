"""The results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.speed.contenders import KERAS, MDN, NETWORK
from benchmarks.speed.measure import TOLERANCE, Entrant, Spread
from benchmarks.speed.picture import plot
from benchmarks.speed.results import Results

# What `mdn` is to reach: at least so many times as fast as Keras as documented and as the best
# peer, and a step at most so many times that of the network with a sum of squares.
BARS = {
    "keras": {"S": 20.0, "M": 8.0, "L": 5.0, "H": 2.0},
    "peer": {"S": 1.0, "M": 1.0, "L": 1.0, "H": 1.0},
    "overhead": {"S": 2.5, "M": 2.0, "L": 1.8, "H": 2.5},
}
_PEERS = ("PyTorch", "JAX")


def write(results: Results, folder: Path) -> None:
    """Write `speed.md` and, where there was a race, `speed.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = plot(results, folder / "speed.png")
    image = "\n![Time of a training step by workload](speed.png)\n" if picture else ""
    (folder / "speed.md").write_text(markdown(results, image), encoding="utf-8")


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
    tables = [_differences(races) for races in (results.race, results.precision) if races]
    pairs = [
        (entrant.found.epoch, entrant.expected.epoch)
        for races in (results.race, results.precision)
        for entrants in races.values()
        for entrant in entrants
        if entrant.found is not None and entrant.expected is not None
    ]
    if not pairs:
        return ""
    worst = max(abs(found - expected) / max(1.0, abs(expected)) for found, expected in pairs)
    ends = []
    for name, entrants in results.race.items():
        if finals := [e.final_loss for e in entrants if e.final_loss is not None]:
            ends.append(f"{name}: {min(finals):.3f} - {max(finals):.3f}")
    disagreements = results.disagreements
    verdict = (
        "They do NOT agree:\n\n" + "\n".join(f"- {line}" for line in disagreements)
        if disagreements
        else f"All agree, to {worst:.0e}."
    )
    return (
        "## The same model: NLL of the training rows, nats per row\n\n"
        + "\n".join(tables)
        + "\nBefore the timed rounds each contender trains for an epoch through the code that is "
        "timed, from the same weights and with the rows in the same order. The table has the loss "
        "of all rows then: that of the same training in NumPy and float64, with gradients written "
        "out by hand, and by how much each contender's is greater. The tolerance is "
        f"{TOLERANCE:g} of the loss, or of a nat if it is less; losses before training are held "
        "to it too. PyTorch's Adam adds its epsilon after the second moment is corrected, the "
        "others before; NumPy's does as each.\n\n"
        f"{verdict}\n\n"
        "At the end of the rounds, with an order of its own for each epoch of each contender, the "
        f"losses lie between: {'; '.join(ends)}.\n"
    )


def _differences(races: Mapping[str, Sequence[Entrant]]) -> str:
    """Return the table of the losses after an epoch, as differences to NumPy's."""
    names = list(races)
    expected = [next(e.expected for e in races[n] if e.expected is not None) for n in names]
    lines = [["NumPy, float64", *(f"{losses.epoch:.4f}" for losses in expected)]]
    for first in races[names[0]]:
        if first.expected is not None:
            entrants = [_find(races[name], first.key) for name in names]
            lines.append([first.label, *map(_difference, entrants)])
    return _table(["", *names], lines)


def _difference(entrant: Entrant | None) -> str:
    if entrant is None or entrant.found is None or entrant.expected is None:
        return "-"
    return f"{entrant.found.epoch - entrant.expected.epoch:+.1e}"


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
    for part in results.parts[names[0]]:
        found = [_find(results.parts[name], part.key) for name in names]
        lines.append([part.label, *(_microseconds(e) for e in found)])
    floors = {name: _floor(results.parts[name]) for name in names}
    lines.append(
        [
            "products and Adam, TensorFlow's XLA",
            *("-" if f is None else f"{f:,.0f}" for f in floors.values()),
        ]
    )
    shares = [
        f"{name} {floor / peer.spread.median:.0%}"
        for (name, floor), peer in zip(floors.items(), peers.values(), strict=True)
        if floor is not None and peer is not None and peer.spread is not None
    ]
    return (
        "## Where a step's time goes, microseconds\n\n"
        f"{_table(['', *names], lines)}\n"
        "The first lines by TensorFlow's profiler, which adds a part of a microsecond to each "
        "operation, and to those that two threads share more. The last ones are medians of "
        f"{results.repeats} rounds, interleaved: the products of a step's forward and backward "
        "pass and nothing between them, in the fastest of four layouts, and Adam's update of all "
        "weights as one vector, each compiled as one loop from the same lines by both; and the "
        "whole step of JAX's contender, as JAX lowers it, compiled by both. The program that "
        "TensorFlow's XLA makes of it takes, as a multiple of JAX's: "
        f"{_transplanted(results)}.\n\n"
        + (
            "As TensorFlow's XLA compiles them, the products and Adam alone take this share of a "
            "whole step of the best peer, which another XLA compiles; all else that a step does "
            f"would have to fit into the rest: {', '.join(shares)}.\n"
            if shares
            else ""
        )
    )


def _transplanted(results: Results) -> str:
    """Return how many times as long JAX's own step takes in TensorFlow's XLA, by workload."""
    keys = "Peer-tensorflow", "Peer-jax"
    return ", ".join(
        f"{name} {_ratio(*(_find(parts, key) for key in keys))}"
        for name, parts in results.parts.items()
    )


def _floor(parts: Sequence[Entrant]) -> float | None:
    """Return the sum of the medians of products and Adam, as TensorFlow's XLA compiles them."""
    keys = "Products-tensorflow", "Adam-tensorflow"
    spreads = [part.spread for part in parts if part.key in keys]
    if not spreads or None in spreads:
        return None
    return sum(spread.median for spread in spreads if spread is not None)


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
    groups = [*results.race.values(), *results.precision.values(), *results.parts.values()]
    groups += [*results.cost.values(), results.ensembles, results.streaming, results.inference]
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
