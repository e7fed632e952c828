"""Classes that come and go while they are served: what is kept, how it is undone, and that a kill
leaves the old or the new."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from places import ROOT
from served import picture, write_checkpoint

from imprint_pl import ImprintedClassifier, ImprintError
from imprint_pl.data.decode import decode_image
from imprint_pl.training_set.kept_file import read_state, state_path

pytest.importorskip("fastapi")
from starlette.testclient import TestClient

from imprint_pl.serve import changes as changes_room
from imprint_pl.serve.app import make_app
from imprint_pl.serve.changes import Changes
from imprint_pl.serve.limits import LOOPBACK, Guard, Limits
from imprint_pl.serve.service import Service

TOKEN = "a token for the tests"
BEARER = {"authorization": f"Bearer {TOKEN}"}
BLUE = [picture("blue", 200 + i) for i in range(6)]


def files(contents):
    return [("images", (f"{i}.png", content)) for i, content in enumerate(contents)]


def loaded(checkpoint):
    return ImprintedClassifier.load_from_checkpoint(checkpoint, runtime="torch").eval()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint, and its classifier, whose backbone all tests share."""
    path = write_checkpoint(tmp_path_factory.mktemp("original"))
    return path, loaded(path)


@pytest.fixture
def checkpoint(original, tmp_path):
    """A copy to change."""
    path, _ = original
    for file in (path, state_path(path)):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / path.name


def of(checkpoint, original, allowed=True):
    model = ImprintedClassifier.load_from_checkpoint(checkpoint, backbone=original[1].backbone)
    return Changes(checkpoint, model.eval(), allowed)


@pytest.fixture
def changes(checkpoint, original):
    made = of(checkpoint, original)
    yield made
    made.close()


@pytest.fixture
def embedded(original):
    return original[1].embed([decode_image(content, "it") for content in BLUE])


@pytest.fixture
def client(changes):
    service = Service(changes, Limits())
    app = Guard(make_app(service, TOKEN), LOOPBACK, Limits())
    yield TestClient(app, base_url="http://localhost", headers=BEARER)
    service.close()


def names(found):
    return [one["name"] for one in found["classes"]]


def best(client, *contents):
    found = client.post("/predict", files=files(contents)).json()["predictions"]
    return [one["class_name"] for one in found]


def test_a_class_is_added_extended_removed_and_each_step_undone(client):
    first = client.get("/classes").json()
    assert names(first) == ["red", "green"]
    assert not first["can_undo"]
    assert best(client, BLUE[5])[0] in ("red", "green")
    added = client.post("/classes", files=files(BLUE[:4]), data={"name": "blue"})
    assert added.status_code == 201
    assert added.json()["classes"][2] == {"name": "blue", "images": 4}
    assert added.json()["change"] == "added blue (4 images)"
    assert best(client, BLUE[5], picture("red", 1), picture("green", 2)) == ["blue", "red", "green"]
    more = client.patch("/classes", files=files(BLUE[4:5]), data={"name": "blue"})
    assert more.json()["classes"][2] == {"name": "blue", "images": 5}
    fewer = client.delete("/classes?name=red").json()
    assert names(fewer) == ["green", "blue"]
    assert fewer["number"] == 3
    for expected in (["red", "green", "blue"], ["red", "green", "blue"], ["red", "green"]):
        undone = client.post("/undo")
        assert undone.status_code == 200
        assert names(undone.json()) == expected
    assert undone.json() == first
    assert client.post("/undo").status_code == 409


@pytest.mark.parametrize(
    ("method", "path", "more", "status", "says"),
    [
        ("POST", "/classes", dict(data={"name": "red"}), 409, "'red' is there already"),
        ("POST", "/classes", dict(data={"name": " "}), 422, "class name"),
        ("POST", "/classes", dict(data={"name": "x" * 201}), 422, "201 characters"),
        ("PATCH", "/classes", dict(data={"name": "rde"}), 404, "did you mean 'red'"),
        ("DELETE", "/classes?name=black", None, 404, "no class 'black'"),
        ("DELETE", "/classes", None, 422, None),
        ("POST", "/undo", None, 409, "no change to undo"),
    ],
)
def test_a_change_that_cannot_be_made_is_refused_and_changes_nothing(
    client, changes, method, path, more, status, says
):
    before = changes.current
    more = {} if more is None else more | dict(files=files(BLUE[:2]))
    answer = client.request(method, path, **more)
    assert answer.status_code == status, answer.text
    assert says is None or says in answer.json()["detail"]
    assert changes.current is before


def test_the_last_class_stays(client):
    assert client.delete("/classes?name=red").status_code == 200
    answer = client.delete("/classes?name=green")
    assert answer.status_code == 409
    assert "last one" in answer.json()["detail"]


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": ""},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": "Bearer \xfc".encode("latin-1")},
        {"authorization": f"Basic {TOKEN}"},
    ],
)
def test_a_change_needs_the_token(client, changes, headers):
    before = changes.current
    for method, path in (("POST", "/classes"), ("PATCH", "/classes"), ("POST", "/undo")):
        answer = client.request(method, path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert client.delete("/classes?name=red", headers=headers).status_code == 401
    assert changes.current is before


def test_a_change_is_of_the_version_that_the_client_has_seen(client):
    seen = client.get("/classes").json()["version"]
    add = dict(files=files(BLUE[:2]), data={"name": "blue"})
    assert client.post("/classes", **add, headers={"if-match": f'"{seen}"'}).status_code == 201
    late = client.delete("/classes?name=red", headers={"if-match": f'"{seen}"'})
    assert late.status_code == 412
    assert client.post("/undo", headers={"if-match": f'"{seen}"'}).status_code == 412
    assert client.post("/undo", headers={"if-match": "*"}).status_code == 200


def test_the_head_is_that_of_all_images_at_once(changes, embedded):
    version = changes.add_class("blue", embedded)
    at_once = changes.model.state.add_class("blue", embedded).head()
    for name, value in at_once.state_dict().items():
        assert torch.equal(version.head.state_dict()[name], value), name


def test_changes_lie_beside_the_checkpoint_and_outlive_the_server(checkpoint, original, embedded):
    untouched = {path: path.read_bytes() for path in (checkpoint, state_path(checkpoint))}
    changes = of(checkpoint, original)
    changes.add_class("blue", embedded)
    version = changes.add_examples("red", embedded[:1])
    changes.close()
    for path, content in untouched.items():
        assert path.read_bytes() == content
    again = of(checkpoint, original)
    assert (again.current.id, again.current.change) == (version.id, "added 1 image to red")
    assert torch.equal(again.current.head.proxies, version.head.proxies)
    again.undo()
    again.undo()
    assert again.current.head is again.model.head
    assert not list(checkpoint.parent.glob("*.served-*"))
    again.close()


def test_a_change_is_a_checkpoint_like_any_other(checkpoint, original, embedded):
    changes = of(checkpoint, original)
    version = changes.add_class("blue", embedded)
    changes.close()
    path = checkpoint.with_name("imprinted.served-1.ckpt")
    model = loaded(path)
    model.load_state(path)
    assert model.class_names == ["red", "green", "blue"]
    assert torch.equal(model.head.proxies, version.head.proxies)
    model.remove_class("red")
    assert model.class_names == ["green", "blue"]


def test_two_servers_do_not_change_one_checkpoint(checkpoint, original):
    first = of(checkpoint, original)
    with pytest.raises(ImprintError, match="by another process"):
        of(checkpoint, original)
    of(checkpoint, original, allowed=False)
    first.close()
    of(checkpoint, original).close()


def test_changes_of_another_checkpoint_are_not_served(checkpoint, original, embedded):
    changes = of(checkpoint, original)
    changes.add_class("blue", embedded)
    changes.close()
    content = torch.load(checkpoint, weights_only=True) | {"cut_short": True}
    torch.save(content, checkpoint)
    with pytest.raises(ImprintError, match=r"served-1\.ckpt was made of another imprinted\.ckpt"):
        of(checkpoint, original)


def test_a_served_checkpoint_that_is_damaged_is_one_error(checkpoint, original, embedded):
    changes = of(checkpoint, original)
    changes.add_class("blue", embedded)
    changes.close()
    path = checkpoint.with_name("imprinted.served-1.ckpt")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ImprintError, match=r"served-1\.ckpt: damaged"):
        of(checkpoint, original)
    content = torch.load(checkpoint, weights_only=True) | {"served": {"of": 3}}
    torch.save(content, path)
    with pytest.raises(ImprintError, match=r"served-1\.ckpt: damaged"):
        of(checkpoint, original)


def test_only_the_last_changes_can_be_undone(changes, embedded, monkeypatch):
    monkeypatch.setattr(changes_room, "UNDO", 2)
    for i in range(4):
        changes.add_examples("red", embedded[i : i + 1])
    assert changes._numbers() == [2, 3, 4]
    changes.undo()
    assert changes.undo().number == 2
    assert not changes.can_undo
    with pytest.raises(ImprintError, match="no change to undo"):
        changes.undo()


def test_nothing_can_change_where_nothing_was_kept(tmp_path, original):
    path = write_checkpoint(tmp_path, keep=None)
    with pytest.raises(ImprintError, match='keep="embeddings"'):
        of(path, original)
    changes = of(path, original, allowed=False)
    assert [c.images for c in changes.current.classes] == [None, None]


def test_sums_take_classes_and_say_that_probabilities_are_not_calibrated(tmp_path, original):
    path = write_checkpoint(tmp_path, recipe="ridge", keep="moments")
    changes = of(path, original)
    service = Service(changes, Limits())
    client = TestClient(
        Guard(make_app(service, TOKEN), LOOPBACK, Limits()),
        base_url="http://localhost",
        headers=BEARER,
    )
    assert client.get("/classes").json()["calibrated"]
    added = client.post("/classes", files=files(BLUE), data={"name": "blue"})
    assert added.status_code == 201
    assert not added.json()["calibrated"]
    # The Gram matrix is one for all classes.
    answer = client.delete("/classes?name=red")
    assert answer.status_code == 409
    assert 'keep="embeddings"' in answer.json()["detail"]
    found = client.post("/predict", files=files(BLUE[:1])).json()["predictions"][0]
    assert (found["class_name"], found["neighbours"]) == ("blue", [])
    service.close()


def test_images_of_added_classes_are_kept_where_asked_for_and_shown(changes, tmp_path):
    service = Service(changes, Limits(), keep_images=tmp_path / "kept")
    app = Guard(make_app(service, TOKEN), LOOPBACK, Limits())
    client = TestClient(app, base_url="http://localhost", headers=BEARER)
    sent = [("images", ("../../evil.png", content)) for content in BLUE[:2]]
    assert client.post("/classes", files=sent, data={"name": "blue"}).status_code == 201
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert kept == {hashlib.sha256(content).hexdigest(): content for content in BLUE[:2]}
    near = client.post("/predict", files=files(BLUE[:1])).json()["predictions"][0]["neighbours"][0]
    assert near["class_name"] == "blue"
    assert client.get(near["picture"]).status_code == 200
    service.close()


def test_a_full_disk_leaves_the_old_version(client, changes, monkeypatch):
    before = changes.current

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("imprint_pl.files.os.replace", full)
    answer = client.post("/classes", files=files(BLUE[:2]), data={"name": "blue"})
    assert answer.status_code == 507
    assert "No space left" in answer.json()["detail"]
    assert changes.current is before
    assert best(client, picture("red", 1)) == ["red"]


class Killed(BaseException):
    """Ends a change as a kill would: nothing after it runs."""


@pytest.mark.slow
@pytest.mark.parametrize("step", range(8))
@pytest.mark.parametrize("undo", [False, True])
def test_a_stop_at_any_step_leaves_the_old_or_the_new(
    checkpoint, original, embedded, monkeypatch, step, undo
):
    changes = of(checkpoint, original)
    changes.add_class("blue", embedded)
    count = 0

    def counted(real):
        def run(*args, **keywords):
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return real(*args, **keywords)

        return run

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        try:
            changes.undo() if undo else changes.add_examples("red", embedded)
            ended = True
        except Killed:
            ended = False
    changes.close()
    again = of(checkpoint, original)
    old, new = (3, 2) if undo else (12, 18)
    counts = [c.images for c in again.current.classes]
    found = len(counts) if undo else counts[0]
    assert found in (old, new)
    assert found == new or not ended
    assert read_state(state_path(again._path(again.current.number))).counts.tolist() == counts
    # It goes on from there.
    again.add_examples("green", embedded[:1])
    again.close()


@pytest.mark.slow
def test_predictions_during_changes_are_of_one_version_each(client, changes, original, embedded):
    probe = [picture("blue", 300), picture("red", 301), picture("green", 302)]
    x = original[1].embed([decode_image(content, "it") for content in probe])
    heads, faults, answers = {changes.current.id: changes.current.head}, [], []
    ended = threading.Event()

    def ask():
        while not ended.is_set():
            answer = client.post("/predict?top=9", files=files(probe))
            answers.append(answer.json()) if answer.status_code == 200 else faults.append(answer)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(12):
        version = changes.undo() if i % 3 == 2 else changes.add_class(f"new {i}", embedded)
        heads[version.id] = version.head
        time.sleep(0.05)
    ended.set()
    for thread in threads:
        thread.join()
    assert not faults
    assert len({answer["version"] for answer in answers}) > 3
    for answer in answers:
        head = heads[answer["version"]]
        expected = head(x).softmax(1)
        for i, one in enumerate(answer["predictions"]):
            found = {c["class_name"]: c["probability"] for c in one["classes"]}
            assert sorted(found) == sorted(head.class_names)
            values = torch.tensor([found[name] for name in head.class_names])
            assert torch.allclose(values, expected[i], atol=1e-3)


WORK = """
import sys, torch
from imprint_pl import ImprintedClassifier
from imprint_pl.serve.changes import Changes
torch.set_num_threads(1)
path, x = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
model = ImprintedClassifier.load_from_checkpoint(path, runtime="torch").eval()
changes = Changes(path, model, True)
print("ready", flush=True)
while True:
    changes.add_class("blue", x)
    changes.undo()
"""


@pytest.mark.slow
def test_kills_at_random_moments_leave_the_old_or_the_new(checkpoint, original, embedded, tmp_path):
    torch.save(embedded, tmp_path / "x.pt")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORK, str(checkpoint), str(tmp_path / "x.pt")]
    found = set()
    for i in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2 + 0.037 * i)
        process.send_signal(signal.SIGKILL)
        process.wait()
        again = of(checkpoint, original)
        found.add(tuple(c.images for c in again.current.classes))
        again.close()
    assert found <= {(12, 12), (12, 12, 6)}
