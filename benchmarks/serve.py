"""Requests a second and latency of a served classifier, beside the bare model; and a long run in
which some requests are bad and the classes change.

    python benchmarks/serve.py [--seconds 10] [--requests 10000] [--image_size 224]

Clients and server share this machine, so that the clients take a part of the processor; "processor
ms" is what the server alone uses for an image, which holds on a busy machine, too.
Photographs are parts of scikit-learn's two, JPEG files of 512 x 384 pixels. In the long run, with
8 clients, 5 % of the requests are bad, and a class comes and goes all the time: each answer is
compared with that of the version which it names. Ends with status 1 if an answer is wrong, one is
missing, or the memory of the last third is more than 3 % above that of the middle third.
"""

import argparse
import http.client
import io
import json
import os
import queue
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from imprint_pl import ImprintedClassifier, imprint
from imprint_pl.data.decode import decode_image
from imprint_pl.training_set.kept import State

CLIENTS, BAD = (1, 8, 32), 0.05
SEPARATOR = b"a-line-that-no-photograph-has"


def photographs(count: int, seed: int) -> list[tuple[bytes, int]]:
    """JPEG files and their labels: 0 for a temple, 1 for a flower."""
    draw, found = random.Random(seed), []
    whole = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for i in range(count):
        image = whole[i % 2]
        side = draw.uniform(0.4, 0.9)
        width, height = int(image.width * side), int(image.height * side)
        left, top = draw.randrange(image.width - width), draw.randrange(image.height - height)
        part = image.crop((left, top, left + width, top + height)).resize((512, 384))
        content = io.BytesIO()
        part.save(content, "JPEG", quality=90)
        found.append((content.getvalue(), i % 2))
    return found


def fitted(folder: Path, image_size: int) -> Path:
    """A checkpoint and its state, as a fit writes them."""
    model = ImprintedClassifier(image_size=image_size, recipe="kernel", keep="embeddings").eval()
    images = photographs(120, 0)
    x = torch.cat([model.embed([decode_image(content, "it")]) for content, _ in images])
    y = torch.tensor([label for _, label in images])
    head = imprint(x, y, "kernel", class_names=["temple", "flower"])
    model.head.take(head)
    model.state = State.of(x, y, head, "embeddings")
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(content)
    path = folder / "imprinted.ckpt"
    torch.save(content, path)
    model.save_state(path)
    return path


def form(*contents: bytes, name: str | None = None) -> bytes:
    """The body of a request."""
    parts = [] if name is None else [(b'name="name"', name.encode())]
    parts += [(b'name="images"; filename="it.jpg"', content) for content in contents]
    begin = b"--" + SEPARATOR + b"\r\nContent-Disposition: form-data; "
    lines = [begin + what + b"\r\n\r\n" + content + b"\r\n" for what, content in parts]
    return b"".join(lines) + b"--" + SEPARATOR + b"--\r\n"


HEADERS = {"Content-Type": f"multipart/form-data; boundary={SEPARATOR.decode()}"}


class Server:
    """The command `serve`, in a process of its own."""

    def __init__(self, checkpoint: Path) -> None:
        command = [sys.executable, "-m", "imprint_pl", "serve", str(checkpoint), "--port", "0"]
        command += ["--allow_changes", "--max_megapixels", "1"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        page = next(line for line in lines if line.startswith("page: "))
        found = re.search(r"//(.*):(\d+)/#token=(\S+)", page)
        assert found is not None
        self.host, self.port, self.token = found[1], int(found[2]), found[3]

    def client(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=120)

    def change(self, method: str, path: str, body: bytes = b"") -> None:
        client = self.client()
        client.request(method, path, body, HEADERS | {"Authorization": f"Bearer {self.token}"})
        answer = client.getresponse()
        content = answer.read()
        client.close()
        if answer.status not in (200, 201):
            raise RuntimeError(f"{method} {path}: {answer.status} {content!r:.300}")


def asked(client: http.client.HTTPConnection, body: bytes, headers: dict[str, str]) -> Any:
    """Status and JSON of a prediction. A connection that the server has closed is opened again."""
    client.request("POST", "/predict?top=9&neighbours=0", body, headers)
    answer = client.getresponse()
    return answer.status, json.loads(answer.read())


def bare(model: ImprintedClassifier, contents: list[bytes], seconds: float) -> list[float]:
    """Seconds for each image in a loop that decodes it and calls the model."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        with torch.inference_mode():
            model([decode_image(contents[len(times) % len(contents)], "it")]).softmax(1).tolist()
        times.append(time.perf_counter() - start)
    return times


def load(server: Server, bodies: list[bytes], clients: int, seconds: float) -> list[float]:
    """Latencies of requests of one image each."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        client, own, i = server.client(), [], number
        while time.perf_counter() < end:
            start = time.perf_counter()
            status, _ = asked(client, bodies[i % len(bodies)], HEADERS)
            own.append(time.perf_counter() - start)
            assert status == 200, status
            i += 1
        times.extend(own)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def bad_requests(good: bytes) -> list[tuple[bytes, dict[str, str], int]]:
    """Bodies and headers that are to be refused, and how."""
    large = io.BytesIO()
    Image.new("L", (1001, 1000)).save(large, "PNG")
    return [
        (form(b"no image at all"), HEADERS, 415),
        (form(good[: len(good) // 2]), HEADERS, 422),
        (form(large.getvalue()), HEADERS, 413),
        (form(*[good[:100]] * 33), HEADERS, 413),
        (good, {"Content-Type": "image/jpeg"}, 415),
        (form(good), HEADERS | {"Host": "elsewhere.example"}, 421),
        (form(good), HEADERS | {"Origin": "http://elsewhere.example"}, 403),
        (b"broken", HEADERS, 400),
    ]


def long_run(
    server: Server, model: ImprintedClassifier, contents: list[bytes], new: list[bytes], count: int
) -> tuple[Counter[str], list[float]]:
    """Faults by kind, and the resident memory of the server in MiB."""
    images = [decode_image(content, "it") for content in contents]
    with torch.inference_mode():
        x = torch.cat([model.embed([image]) for image in images])
        added = model.embed([decode_image(content, "it") for content in new])
    assert model.state is not None
    heads = [model.head, model.state.add_class("new", added).head()]
    with torch.inference_mode():
        expected = {len(head.class_names): head(x).softmax(1) for head in heads}
    names = {len(head.class_names): head.class_names for head in heads}
    bodies, bad = [form(content) for content in contents], bad_requests(contents[0])
    work: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    faults: Counter[str] = Counter()
    memory, process = [], psutil.Process(server.process.pid)
    bar = tqdm(total=count, unit=" requests", delay=2)
    ended = threading.Event()

    def answer(client: http.client.HTTPConnection, number: int) -> str:
        draw = random.Random(number)
        if draw.random() < BAD:
            body, headers, status = draw.choice(bad)
            try:
                found, _ = asked(client, body, headers)
            except (http.client.HTTPException, OSError):
                client.close()
                return "bad request without an answer"
            return "" if found == status else f"{found} instead of {status}"
        place = draw.randrange(len(bodies))
        status, found = asked(client, bodies[place], HEADERS)
        if status != 200:
            return f"status {status}"
        classes = found["predictions"][0]["classes"]
        head = len(classes)
        values = {one["class_name"]: one["probability"] for one in classes}
        own = torch.tensor([values.get(name, -1.0) for name in names[head]])
        versions.setdefault(found["version"], head)
        if versions[found["version"]] != head:
            return "a version with two heads"
        return "" if torch.allclose(own, expected[head][place], atol=2e-3) else "wrong answer"

    versions: dict[str, int] = {}

    def client_work() -> None:
        client = server.client()
        while (number := work.get()) is not None:
            try:
                fault = answer(client, number)
            except (http.client.HTTPException, OSError) as error:
                client.close()
                fault = f"no answer: {type(error).__name__}"
            if fault:
                faults[fault] += 1
            bar.update()
            if number % (count // 60 or 1) == 0:
                memory.append(process.memory_info().rss / 2**20)

    def change_work() -> None:
        body = form(*new, name="new")
        while not ended.wait(0.5):
            server.change("POST", "/classes", body)
            ended.wait(0.5)
            server.change("POST", "/undo")

    threads = [threading.Thread(target=client_work) for _ in range(8)]
    changing = threading.Thread(target=change_work)
    for number in range(count):
        work.put(number)
    for thread in [*threads, changing]:
        thread.start()
        if thread is not changing:
            work.put(None)
    for thread in threads:
        thread.join()
    ended.set()
    changing.join()
    bar.close()
    print(f"{len(versions)} versions were served")
    return faults, memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--image_size", type=int, default=224)
    options = parser.parse_args()
    table = Table(title=f"{options.image_size} pixels, {os.cpu_count()} cores")
    for column in ("", "images/s", "median ms", "99 % ms", "processor ms"):
        table.add_column(column, justify="right" if column else "left")

    def row(what: str, process: psutil.Process, measured: Callable[[], list[float]]) -> None:
        before = sum(process.cpu_times()[:2])
        times = measured()
        used = sum(process.cpu_times()[:2]) - before
        places = statistics.quantiles(times, n=100) if len(times) > 1 else times * 99
        numbers = [f"{1000 * t:.1f}" for t in (places[49], places[98], used / len(times))]
        table.add_row(what, f"{len(times) / options.seconds:.1f}", *numbers)

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = fitted(Path(folder), options.image_size)
        contents = [content for content, _ in photographs(16, 1)]
        new = [content for content, _ in photographs(6, 2)]
        server = Server(checkpoint)
        model = ImprintedClassifier.load_from_checkpoint(checkpoint).eval()
        model.load_state(checkpoint)
        model.backbone.expect(10**9)
        try:
            if options.seconds:
                bare(model, contents, 1)
                own, served = psutil.Process(), psutil.Process(server.process.pid)
                row("bare model", own, partial(bare, model, contents, options.seconds))
                bodies = [form(content) for content in contents]
                load(server, bodies, 4, 1)
                for clients in CLIENTS:
                    name = f"{clients} client{'s' * (clients > 1)}"
                    row(name, served, partial(load, server, bodies, clients, options.seconds))
                Console().print(table)
            faults, memory = long_run(server, model, contents, new, options.requests)
        finally:
            server.process.terminate()
            status = server.process.wait(60)
    size = len(memory) // 3
    first, middle, last = (
        statistics.mean(memory[i * size : (i + 1) * size] or [1.0]) for i in range(3)
    )
    growth = last / middle - 1
    print(
        f"{options.requests:,} requests, faults: {dict(faults) or 'none'}; resident MiB, by "
        f"thirds: {first:.0f}, {middle:.0f}, {last:.0f} ({100 * growth:+.1f} %); the server ended "
        f"with status {status}"
    )
    return int(bool(faults) or growth > 0.03 or status != 0)


if __name__ == "__main__":
    sys.exit(main())
