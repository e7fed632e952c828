"""One thread that runs the backbone, on the images of all requests that wait for it."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import NamedTuple

import torch
from torch import Tensor

# Images in one forward pass. A CPU embeds four of them a sixth faster than one, and more of them
# slower again, since they no longer fit its caches (EfficientNet-Lite0 in ONNX Runtime).
MOST_ON_CPU, MOST = 4, 32


class _Job(NamedTuple):
    images: Tensor
    future: Future[Tensor]


class Batcher:
    """Embeds images in the order in which they come; those that came meanwhile go together.

    A batch never waits to become larger: alone, a request is as fast as the bare model.

    Args:
        embed: prepared images `(B, …)` → embeddings `(B, d)`.
        most: images in a forward pass; a request that has more goes in pieces.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor], most: int) -> None:
        self._embed, self._most = embed, most
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = Thread(target=self._run, name="backbone", daemon=True)
        self._thread.start()

    def submit(self, images: Tensor) -> Future[Tensor]:
        """Takes images `(n, …)`, and returns the future of their embeddings `(n, d)`. A future that
        is cancelled in time is not computed."""
        job = _Job(images, Future())
        self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Embeds what waits, and ends the thread."""
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
            # A copy, so that nobody holds the embeddings of all.
            job.future.set_result(own.clone())
