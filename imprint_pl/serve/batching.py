"""Runs the backbone in one thread, on batches of images of all waiting requests."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

# Most images in one forward pass. A CPU embeds batches of four a sixth faster than single images,
# and larger batches more slowly again, since they do not fit its caches (EfficientNet-Lite0 in ONNX
# Runtime).
MOST_ON_CPU, MOST = 4, 32


class _Job(NamedTuple):
    images: Tensor
    future: Future[Tensor]


class Batcher:
    """Embeds images in the order in which they arrive; those that wait are embedded together.

    A batch never waits to become larger, so a single request is as fast as the model alone.

    Args:
        embed: prepared images `(B, …)` → embeddings `(B, d)`.
        most: most images in a forward pass; a request with more is divided.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor], most: int) -> None:
        self._embed, self._most = embed, most
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = Thread(target=self._run, name="backbone", daemon=True)
        self._thread.start()

    def submit(self, images: Tensor) -> Future[Tensor]:
        """Takes images `(n, …)` and returns the future of their embeddings `(n, d)`.

        A future that is cancelled in time is not computed.
        """
        job = _Job(images, Future())
        self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Embeds the waiting images, and ends the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        ends = False
        while not ends:
            jobs: list[_Job] = []
            count = 0
            try:
                while count < self._most:
                    job = self._jobs.get(block=not jobs)
                    if job is None:
                        ends = True
                        break
                    if job.future.set_running_or_notify_cancel():
                        jobs.append(job)
                        count += len(job.images)
            except queue.Empty:
                pass
            if jobs:
                self._answer(jobs)

    def _answer(self, jobs: list[_Job]) -> None:
        try:
            images = torch.cat([job.images for job in jobs])
            x = torch.cat([self._embed(part) for part in images.split(self._most)])
        except BaseException as error:
            for job in jobs:
                job.future.set_exception(error)
            return
        for job, own in zip(jobs, x.split([len(job.images) for job in jobs]), strict=True):
            # Copy, so that no request keeps the embeddings of all requests in memory.
            job.future.set_result(own.clone())
