"""Requests that wait at the same time are answered as one batch.

The model answers one batch at a time, in a thread of its own. While it does, requests queue; then
those that can be one batch with the oldest are. So a lone request never waits for others, and the
batches grow with the load.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mdn.serving.calls import Call, RequestError
from mdn.serving.limits import Limits

Outputs = Mapping[str, np.ndarray]
Waiting = tuple[Call, "asyncio.Future[Outputs]"]


class Batcher:
    """Gathers calls, and hands them to a model.

    Args:
        answer: of calls with one `Call.key` to the outputs of each; it runs in a thread.
        limits: how many may wait, and how large a batch may be.
        observe: told of each batch: its calls.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Call]], Sequence[Outputs]],
        limits: Limits,
        observe: Callable[[Sequence[Call]], None] = lambda calls: None,
    ) -> None:
        self._answer = answer
        self._limits = limits
        self._observe = observe
        self._queue: collections.deque[Waiting] = collections.deque()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "mdn-model")
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How many calls wait for their batch."""
        return len(self._queue)

    async def __call__(self, call: Call) -> Outputs:
        """Return the outputs of a call.

        Raises:
            RequestError: too many others wait, or the model cannot take the call.
        """
        if len(self._queue) >= self._limits.max_waiting:
            raise RequestError(f"{len(self._queue)} requests wait already: try again", 503)
        future: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        self._queue.append((call, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    def close(self) -> None:
        """End the thread, once it has answered."""
        self._thread.shutdown()

    async def _work(self) -> None:
        while self._queue:
            batch = self._next()
            calls = [call for call, _ in batch]
            self._observe(calls)
            for (_, future), outcome in zip(batch, await self._run(calls), strict=True):
                if future.done():  # who asked has gone
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)

    def _next(self) -> list[Waiting]:
        """Take the oldest call, and those that fit into a batch with it, out of the queue."""
        batch = [self._queue.popleft()]
        first = batch[0][0]
        if first.key is None:
            return batch
        rows, values, terms, others = first.size, first.values, first.terms, []
        for waiting in self._queue:
            call = waiting[0]
            if (
                call.key == first.key
                and rows + call.size <= self._limits.max_rows
                and values + call.values <= self._limits.max_values
                and terms + call.terms <= self._limits.max_terms
            ):
                batch.append(waiting)
                rows, values = rows + call.size, values + call.values
                terms += call.terms
            else:
                others.append(waiting)
        self._queue = collections.deque(others)
        return batch

    async def _run(self, calls: Sequence[Call]) -> Sequence[Outputs | Exception]:
        """Return the outputs of each call, or why it has none."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._answer, calls)
        except Exception as error:
            if len(calls) == 1:
                return [error]
        # One of them is to blame; the others have their answers all the same.
        return [(await self._run([call]))[0] for call in calls]
