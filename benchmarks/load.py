"""`mdn serve` under load: requests a second, latencies, and every answer compared.

    pip install -e '.[serve]' && python -m benchmarks.load runs/first --clients 200 --seconds 30

Each client has a row of its own and asks for it again and again, on one connection. Before the
load it asks alone; each answer under load must agree with that one. Clients and service share the
machine. At the end the service is stopped by SIGTERM while requests are in flight, which it must
answer.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

_COMMAND = "from mdn.cli.main import main; main()"


@dataclasses.dataclass
class Load:
    """What the clients saw.

    Attributes:
        seconds: from the first request to the last answer.
        latencies: of each answer, in seconds.
        errors: what went wrong, a line each.
    """

    seconds: float = 0.0
    latencies: list[float] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)

    def percentile(self, p: float) -> float:
        """Return a percentile of the latencies, in seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(int(p / 100 * len(ordered)), len(ordered) - 1)]


class Server:
    """`mdn serve` as a process of its own.

    Args:
        run: the run or the export.
        options: of the command.

    Attributes:
        process: of the service.
        port: that it listens on.
    """

    def __init__(self, run: str, options: Sequence[str] = ()) -> None:
        command = [sys.executable, "-c", _COMMAND, "serve", run, "--port", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        if found is None:
            raise SystemExit(f"the service did not start: {line.strip()}")
        self.port = int(found[1])

    def stop(self) -> int:
        """End the service with SIGTERM, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        """End the service if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Client:
    """One connection, which is kept."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __aenter__(self) -> Client:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        """Return the status and the JSON of an answer, or its bytes where that is none."""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.writer.write(head.encode() + body)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: (\d+)", head)
        content = await self.reader.readexactly(int(length[1]) if length else 0)
        status = int(head.split(" ", 2)[1])
        try:
            return status, json.loads(content)
        except ValueError:
            return status, content


def requests(about: dict[str, Any], n: int, draws: int = 0) -> Iterator[bytes]:
    """Yield n requests of one row each, near the train rows.

    Args:
        about: the model's inputs, from `/model.json`.
        n: how many.
        draws: 0 asks for the moments and parameters; else for so many draws, which takes longer.
    """
    rng = random.Random(0)

    def draw(feature: dict[str, Any]) -> Any:
        if feature["dtype"] == "string":
            return rng.choice(feature["vocabulary"])
        mean, scale = feature["mean"], feature["scale"]
        if isinstance(mean, list):
            return [rng.gauss(m, s) for m, s in zip(mean, scale, strict=True)]
        return rng.gauss(mean, scale)

    for _ in range(n):
        row = {feature["input"]: draw(feature) for feature in about["features"]}
        if draws:
            inputs: dict[str, Any] = {name: [value] for name, value in row.items()}
            inputs |= {"n": draws, "seed": [rng.randrange(2**31), 0]}
            yield json.dumps({"signature_name": "sample", "inputs": inputs}).encode()
        else:
            yield json.dumps({"instances": [row]}).encode()


async def load(port: int, clients: int, seconds: float) -> Load:
    """Return what clients saw that ask for so long."""
    async with Client(port) as first:
        _, about = await first.ask("GET", "/model.json")
        path = f"/v1/models/{about['name']}:predict"
        bodies = list(requests(about, clients))
        expected = [await first.ask("POST", path, body) for body in bodies]
    found = Load()
    begun = time.perf_counter()

    async def client(body: bytes, alone: tuple[int, Any]) -> None:
        try:
            async with Client(port) as connection:
                while (sent := time.perf_counter()) < begun + seconds:
                    status, answer = await connection.ask("POST", path, body)
                    found.latencies.append(time.perf_counter() - sent)
                    if status != 200 or not _agree(answer, alone[1]):
                        found.errors.append(f"{status}: {str(answer)[:200]}")
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            found.errors.append(repr(error))

    await asyncio.gather(*map(client, bodies, expected))
    found.seconds = time.perf_counter() - begun
    return found


def _agree(one: Any, other: Any) -> bool:
    """Return whether two answers have the same names and numbers, up to rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_agree(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_agree, one, other))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return abs(one - other) <= 1e-4 * max(1.0, abs(other))
    return bool(one == other)


async def drain(server: Server, clients: int) -> tuple[int, list[int]]:
    """Stop the service while clients wait for it.

    Returns:
        Its exit code, and the status of each answer that was still to come when it was told.
    """
    connections = [Client(server.port) for _ in range(clients)]
    for connection in connections:
        await connection.__aenter__()
    _, about = await connections[0].ask("GET", "/model.json")
    path = f"/v1/models/{about['name']}:predict"
    bodies = requests(about, clients, draws=2000)
    tasks = [
        asyncio.create_task(connection.ask("POST", path, body))
        for connection, body in zip(connections, bodies, strict=True)
    ]
    # Draws are answered one request after the other: the first answer says that all are there.
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    code = asyncio.create_task(asyncio.to_thread(server.stop))
    ahead = [task for task in tasks if not task.done()]
    await asyncio.gather(*tasks)
    for connection in connections:
        await connection.__aexit__()
    return await code, [task.result()[0] for task in ahead]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run, or an export")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    server = Server(options.run)
    try:
        found = asyncio.run(load(server.port, options.clients, options.seconds))
        code, statuses = asyncio.run(drain(server, options.clients))
    finally:
        server.kill()
    print(
        f"{options.clients} clients for {found.seconds:.1f} s, {os.cpu_count()} cores "
        f"({platform.machine()}), clients and service together\n"
    )
    print("| requests | errors | a second | p50 | p99 | most |")
    print("| --- | --- | --- | --- | --- | --- |")
    times = " | ".join(f"{1e3 * found.percentile(p):.0f} ms" for p in (50, 99, 100))
    rate = len(found.latencies) / found.seconds
    print(f"| {len(found.latencies):,} | {len(found.errors)} | {rate:,.0f} | {times} |")
    answered = sum(status == 200 for status in statuses)
    print(
        f"\nSIGTERM: {answered} of {len(statuses)} requests in flight answered, exit code {code}"
    )
    if found.errors or not answered or answered < len(statuses) or code != 0:
        sys.exit("\n".join(found.errors[:5]) or "requests were lost")


if __name__ == "__main__":
    main()
