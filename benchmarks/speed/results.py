"""All that was measured, as JSON that a stopped run goes on from, and on which machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.speed.measure import Entrant, disagreements
from mdn.errors import RunError

PACKAGES = ("tensorflow", "tf-keras", "tensorflow-probability", "jax", "torch", "numpy")


@dataclasses.dataclass
class Results:
    """All that was measured; what was not is empty.

    Attributes:
        command: what was run.
        repeats: rounds.
        race: workload -> entrants of the main table, the bare network last.
        precision: workload -> entrants whose triangles are factors of the precision.
        profile: workload -> what `benchmarks.speed.operations.measure` found.
        parts: workload -> entrants that each do a part of a step alone.
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
    profile: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    parts: dict[str, list[Entrant]] = dataclasses.field(default_factory=dict)
    cost: dict[str, list[Entrant]] = dataclasses.field(default_factory=dict)
    memory: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    ensembles: list[Entrant] = dataclasses.field(default_factory=list)
    streaming: list[Entrant] = dataclasses.field(default_factory=list)
    inference: list[Entrant] = dataclasses.field(default_factory=list)
    machine: dict[str, Any] = dataclasses.field(default_factory=lambda: describe_machine())

    @property
    def disagreements(self) -> list[str]:
        """What shows that entrants did not train the model that they should."""
        races = [*self.race.values(), *self.precision.values()]
        return [line for entrants in races for line in disagreements(entrants)]

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
            for name in ("race", "precision", "parts", "cost"):
                series = found[name].items()
                setattr(new, name, {key: [*map(Entrant.restore, es)] for key, es in series})
            for name in ("ensembles", "streaming", "inference"):
                setattr(new, name, [*map(Entrant.restore, found[name])])
            new.profile, new.memory = found["profile"], found["memory"]
            new.machine["load"] = found["machine"]["load"]
            for name in ("race", "precision"):
                races = getattr(new, name).items()
                setattr(new, name, {key: es for key, es in races if not disagreements(es)})
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
