"""What the served classifier answers, what it refuses, and with which status code."""

import asyncio
import io
import json
import re
import signal
import socket
import threading
import time
import urllib.request
from concurrent.futures import Future
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from served import picture, started, write_checkpoint

from imprint_pl import ImprintedClassifier, ImprintError, imprint
from imprint_pl.cli import main
from imprint_pl.data.decode import decode_image

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from imprint_pl.serve.app import make_app
from imprint_pl.serve.batching import Batcher
from imprint_pl.serve.changes import Changes
from imprint_pl.serve.limits import LOOPBACK, Guard, Limits
from imprint_pl.serve.run import Options, serve
from imprint_pl.serve.service import Service
from imprint_pl.serve.version import Version

TOKEN = "a token for the tests"
SMALL = Limits(megabytes=0.2, megapixels=0.01, images=4, seconds=5, requests=3)


def files(*contents):
    return [("images", (f"{i}.png", content)) for i, content in enumerate(contents)]


def png(width, height):
    content = io.BytesIO()
    Image.new("RGB", (width, height)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("served"), accept=0.95, coverage=0.9)


@pytest.fixture(scope="module")
def model(checkpoint):
    return ImprintedClassifier.load_from_checkpoint(checkpoint, runtime="torch").eval()


@pytest.fixture(scope="module")
def service(checkpoint, model):
    service = Service(Changes(checkpoint, model, allowed=False), SMALL)
    yield service
    service.close()


def client_of(service, token=None, limits=SMALL):
    app = Guard(make_app(service, token), LOOPBACK, limits)
    return TestClient(app, base_url="http://localhost")


@pytest.fixture(scope="module")
def client(service):
    return client_of(service)


def test_the_answer_is_that_of_the_classifier_for_images_of_any_size_and_kind(client, model):
    contents = [picture("green", 7), picture("red", 8, "JPEG"), picture("blue", 9, "WEBP")]
    answer = client.post("/predict?top=2&neighbours=3", files=files(*contents))
    assert answer.status_code == 200
    found = answer.json()["predictions"]
    images = [decode_image(content, "it") for content in contents]
    x = model.embed(images)
    expected = model.head(x).softmax(1)
    labels, sets = model.head.label(x), model.head.prediction_sets(x)
    known = model.head.familiarity(x)
    for i, one in enumerate(found):
        assert one["file"] == f"{i}.png"
        assert one["label"] == labels[i]
        assert one["class_name"] == model.head.name_of(int(labels[i]))
        assert one["classes"][0]["probability"] == pytest.approx(expected[i].max().item(), abs=1e-4)
        assert (one["probability"] is None) == (labels[i] == -1)
        assert one["familiarity"] == pytest.approx(known[i].item(), abs=1e-2)
        assert one["prediction_set"] == [
            model.class_names[c] for c in sets[i].nonzero().flatten().tolist()
        ]
        assert [c["class_name"] for c in one["classes"]] in (["red", "green"], ["green", "red"])
    assert [one["classes"][0]["class_name"] for one in found[:2]] == ["green", "red"]


def test_the_nearest_training_images_are_named_and_shown(client):
    one = client.post("/predict", files=files(picture("green", 105))).json()["predictions"][0]
    near = one["neighbours"]
    assert [n["class_name"] for n in near] == ["green"] * 5
    # This very image was a training image.
    assert near[0]["cosine"] == pytest.approx(1, abs=1e-3)
    assert sorted((n["cosine"] for n in near), reverse=True) == [n["cosine"] for n in near]
    shown = client.get(near[0]["picture"])
    assert shown.headers["content-type"] == "image/jpeg"
    pixels = Image.open(io.BytesIO(shown.content))
    assert pixels.size == Image.open(io.BytesIO(picture("green", 105))).size
    middle = pixels.getpixel((pixels.width // 2, pixels.height // 2))
    assert middle[1] > 150 > 90 > middle[0]


@pytest.mark.parametrize("key", ["0" * 32, "..%2f..%2fetc%2fpasswd", "imprinted.ckpt"])
def test_a_picture_that_no_training_image_has_is_not_found(client, key):
    assert client.get(f"/pictures/{key}").status_code == 404


def test_no_neighbours_are_named_where_none_are_asked_for(client):
    found = client.post("/predict?neighbours=0", files=files(picture("red"))).json()
    assert found["predictions"][0]["neighbours"] == []


def cut(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("request_", "status", "says"),
    [
        (dict(), 415, "multipart/form-data"),
        (dict(json={"url": "http://example.org/a.png"}), 415, "multipart/form-data"),
        (dict(content=picture("red"), headers={"content-type": "image/png"}), 415, "form"),
        (dict(files=files(b"no image at all")), 415, "0.png: no image"),
        (dict(files=files(picture("red"), b"%!PS-Adobe-3.0 EPSF-3.0\n")), 415, "1.png: no image"),
        (dict(files=files(cut(picture("red")))), 422, "cannot read the image 0.png"),
        (dict(files=files(b"")), 415, "no image"),
        (dict(files=files(png(101, 100))), 413, "101 x 100 pixels"),
        (dict(files=files(*[picture("red")] * 5)), 413, "more than 4 images"),
        (dict(files=files(*[picture("red")] * 9)), 413, "more than 4 images"),
        (dict(files=files(bytes(300_000))), 413, "larger than 0.2 MB"),
        (dict(files=[("other", ("a.png", picture("red")))]), 422, "field 'other'"),
        (dict(data={"images": "/etc/passwd"}, files=files(picture("red"))), 422, "field 'images'"),
        (dict(data={"images": "/etc/passwd"}, files=[("x", b"")]), 422, "field"),
        (
            dict(content=b"--x\r\nbad", headers={"content-type": "multipart/form-data"}),
            400,
            "boundary",
        ),
        (dict(files=files(picture("red")), params={"top": 0}), 422, None),
    ],
)
def test_what_cannot_be_predicted_is_refused_with_its_status_code(client, request_, status, says):
    answer = client.post("/predict", **request_)
    assert answer.status_code == status, answer.text
    assert says is None or says in answer.json()["detail"]
    # The server is as well as before.
    assert client.post("/predict", files=files(picture("red"))).status_code == 200


def test_a_body_without_a_length_is_counted_as_it_comes(client):
    def body():
        for _ in range(30):
            yield bytes(10_000)

    answer = client.post(
        "/predict", content=body(), headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code in (400, 413)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "localhost.evil.example:8000"}, 421),
        ({"host": ""}, 421),
        ({"host": "[::1"}, 421),
        ({"host": "127.0.0.1:9999"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:81"}, 403),
        ({"origin": "http://localhost"}, 200),
        ({"content-length": "x"}, 400),
    ],
)
def test_only_this_site_under_its_own_names_may_ask(client, headers, status):
    answer = client.get("/classes", headers=headers)
    assert answer.status_code == status
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in answer.headers


def test_a_wrong_path_or_method_has_its_status_code(client):
    assert client.get("/nothing").status_code == 404
    assert client.get("/predict").status_code == 405
    # Pages of documentation would load scripts from elsewhere.
    assert client.get("/docs").status_code == 404
    assert client.get("/redoc").status_code == 404


def test_changes_are_refused_where_they_are_not_allowed(client):
    for answer in (
        client.post("/classes", files=files(picture("blue")), data={"name": "blue"}),
        client.patch("/classes", files=files(picture("blue")), data={"name": "red"}),
        client.delete("/classes?name=red"),
        client.post("/undo"),
    ):
        assert answer.status_code == 403
        assert "--allow_changes" in answer.json()["detail"]
    assert [c["name"] for c in client.get("/classes").json()["classes"]] == ["red", "green"]


def test_health_says_which_version_is_served(client):
    found = client.get("/health").json()
    assert found["status"] == "ok"
    assert found["classes"] == 2
    assert found["version"] == client.get("/classes").json()["version"]


def test_the_description_has_every_route_with_its_forms_and_refusals(client):
    found = client.get("/openapi.json").json()
    assert set(found["paths"]) == {"/predict", "/classes", "/undo", "/health", "/pictures/{key}"}
    assert set(found["paths"]["/classes"]) == {"get", "post", "patch", "delete"}
    form = found["paths"]["/classes"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert form["schema"]["required"] == ["images", "name"]
    assert {"413", "415", "422", "503", "504"} < set(
        found["paths"]["/predict"]["post"]["responses"]
    )


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    page = answer.text
    assert "imprinted.ckpt" in page
    assert not re.findall(r"https?://|src=[\"']?//|@import|url\(", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; connect-src 'self'")
    assert answer.headers["content-security-policy"] == "frame-ancestors 'none'"


def test_a_request_that_takes_too_long_is_told_so(checkpoint, model, monkeypatch):
    limits = Limits(seconds=0.2)
    service = Service(Changes(checkpoint, model, allowed=False), limits)
    go_on = threading.Event()
    monkeypatch.setattr(service._batcher, "_embed", lambda images: go_on.wait(20) and images)
    client = client_of(service, limits=limits)
    answer = client.post("/predict", files=files(picture("red")))
    assert answer.status_code == 504
    go_on.set()
    service.close()


async def ask(app, receive, headers=(), path="/predict"):
    """The status code of a request at an application, without a client."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "http_version": "1.1",
        "headers": [(b"host", b"localhost"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "root_path": "",
    }
    await app(scope, receive, send)
    return sent[0]["status"]


# How a form with an image begins.
PART = b'--x\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'
FORM = [(b"content-type", b"multipart/form-data; boundary=x")]


def test_a_body_that_does_not_arrive_is_given_up(service):
    limits = Limits(seconds=0.1)
    app = Guard(make_app(service, None), LOOPBACK, limits)

    async def never():
        await asyncio.sleep(60)

    assert asyncio.run(ask(app, never, FORM)) == 408
    assert app.under_way == 0


def test_more_requests_than_the_server_holds_are_sent_away_and_health_is_not(service):
    app = Guard(make_app(service, None), LOOPBACK, Limits(requests=2, seconds=30))

    async def run():
        end = asyncio.Event()

        async def waits():
            await end.wait()
            return {"type": "http.request", "body": b"", "more_body": False}

        async def empty():
            return {"type": "http.request", "body": b"", "more_body": False}

        slow = [asyncio.create_task(ask(app, waits, FORM)) for _ in range(2)]
        async with asyncio.timeout(20):
            while app.under_way < 2:
                await asyncio.sleep(0.001)
        busy = await ask(app, empty, FORM)
        health = await ask(app, empty, path="/health")
        end.set()
        return busy, health, await asyncio.gather(*slow), await ask(app, empty, FORM)

    busy, health, slow, later = asyncio.run(run())
    assert busy == 503
    # The method is wrong, but it was let in.
    assert health == 405
    assert later == slow[0] == slow[1] == 422


def test_the_bodies_of_all_requests_together_are_limited(service):
    app = Guard(make_app(service, None), LOOPBACK, Limits(megabytes=0.001, seconds=30))

    async def run():
        end = asyncio.Event()

        def slow():
            pieces = [PART + bytes(900 - len(PART))]

            async def receive():
                if pieces:
                    return {"type": "http.request", "body": pieces.pop(), "more_body": True}
                await end.wait()
                return {"type": "http.disconnect"}

            return receive

        waiting = [asyncio.create_task(ask(app, slow(), FORM)) for _ in range(4)]
        async with asyncio.timeout(20):
            while app.held < 3600:
                await asyncio.sleep(0.001)
        busy = await ask(app, slow(), FORM)
        end.set()
        await asyncio.gather(*waiting)
        return busy

    assert asyncio.run(run()) == 503
    assert app.held == app.under_way == 0


def test_a_class_name_that_is_no_text_is_shown_with_escapes():
    x = torch.eye(2).repeat(3, 1)
    head = imprint(x, torch.arange(6) % 2, "qi", class_names=["caf\udce9", "b"])
    version = Version(head.eval(), None, 0, "id")
    (found,) = version.predict(x[:1], ["a.png"], 2, 5)
    assert found.class_name == found.classes[0].class_name == r"caf\xe9"
    assert [one.name for one in version.classes] == [r"caf\xe9", "b"]
    json.dumps(asdict(found), ensure_ascii=False).encode()


# The thread that runs the backbone.


def test_images_that_came_meanwhile_go_in_one_pass_and_each_gets_its_own():
    sizes, first = [], threading.Event()

    def embed(images):
        sizes.append(len(images))
        first.wait(5)
        return 2 * images

    batcher = Batcher(embed, most=4)
    one = batcher.submit(torch.tensor([[1.0]]))
    while not sizes:
        time.sleep(0.001)
    others = [batcher.submit(torch.full((n, 1), float(n))) for n in (1, 2, 3)]
    first.set()
    assert one.result(5).tolist() == [[2.0]]
    assert [other.result(5).tolist() for other in others] == [
        [[2.0]],
        [[4.0]] * 2,
        [[6.0]] * 3,
    ]
    batcher.close()
    # The third reaches the limit: its images go in pieces.
    assert sizes == [1, 4, 2]


def test_a_fault_of_the_backbone_reaches_whoever_waits_and_the_thread_lives_on():
    def embed(images):
        if images.sum() == 0:
            raise RuntimeError("of the backbone")
        return images

    batcher = Batcher(embed, most=4)
    with pytest.raises(RuntimeError, match="of the backbone"):
        batcher.submit(torch.zeros(1, 1)).result(5)
    assert batcher.submit(torch.ones(1, 1)).result(5).tolist() == [[1.0]]
    batcher.close()


def test_a_request_that_was_given_up_is_not_computed():
    seen, go_on = [], threading.Event()

    def embed(images):
        seen.append(images.sum().item())
        go_on.wait(5)
        return images

    batcher = Batcher(embed, most=4)
    first = batcher.submit(torch.ones(1, 1))
    while not seen:
        time.sleep(0.001)
    given_up: Future = batcher.submit(torch.full((1, 1), 2.0))
    assert given_up.cancel()
    last = batcher.submit(torch.full((1, 1), 3.0))
    go_on.set()
    assert last.result(5).item() == 3
    assert first.result(5).item() == 1
    batcher.close()
    assert seen == [1, 3]


# The command.


def test_a_classifier_of_embeddings_is_not_served(service):
    changes = SimpleNamespace(model=ImprintedClassifier("identity", "qi"))
    with pytest.raises(ImprintError, match="takes embeddings, not images"):
        Service(changes, SMALL)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(host="0.0.0.0"), "--allow_host NAME"),
        (dict(device="gpu9"), "device='gpu9'"),
        (dict(host="256.1.1.1"), "cannot listen at 256.1.1.1"),
        (dict(port=70_000), "cannot listen at 127.0.0.1, port 70000"),
    ],
)
def test_options_that_cannot_be_served_are_one_error(checkpoint, options, says):
    with pytest.raises(ImprintError, match=re.escape(says)):
        serve(Options(str(checkpoint), **({"port": 0} | options)))


def test_a_token_that_can_be_guessed_is_refused(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("IMPRINT_PL_TOKEN", "secret")
    with pytest.raises(ImprintError, match="at least 16"):
        serve(Options(str(checkpoint), port=0, allow_changes=True))
    with pytest.raises(ImprintError, match="cannot be read"):
        serve(Options(str(checkpoint), port=0, allow_changes=True, token_file=str(tmp_path / "x")))


def test_a_port_that_is_taken_is_one_error(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(checkpoint), "--port", port]) == 2
    assert "give another --port" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_one_error(capsys):
    assert main(["serve", "nothing.ckpt"]) == 2
    assert capsys.readouterr().err == "error: nothing.ckpt: there is no such file\n"


@pytest.mark.parametrize("name", ["megabytes", "megapixels", "images", "seconds", "requests"])
def test_a_limit_of_nothing_is_refused(name):
    for value in (0, -1, float("nan")):
        with pytest.raises(ImprintError, match=f"max_{name}"):
            Limits(**{name: value})


@pytest.mark.slow
def test_sigterm_finishes_what_is_under_way(checkpoint):
    process, page = started(checkpoint)
    host, port = re.match(r"http://([^:]+):(\d+)/$", page).groups()
    content = picture("green", 3)
    body = PART + content + b"\r\n--x--\r\n"
    request = (
        f"POST /predict HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request.encode() + body[:100])
        # Until the server has begun to read it.
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(page, timeout=5)
        connection.sendall(body[100:])
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["predictions"][0]["class_name"] == "green"
    assert process.wait(30) == 0
    assert process.stdout.read() == "stopped\n"
