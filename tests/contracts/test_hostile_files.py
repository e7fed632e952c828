"""Files that are damaged, or that somebody forged: an ImprintError, or the same result as from the
file as it was (or a rebuild, where it is a cache). Never code from a file, never memory that the
file only claims to need. More than 1,000 files in all, by `CASES` a format; the same in every run.
"""

import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintedHead, ImprintError, imprint
from imprint_pl.__main__ import main
from imprint_pl.data import Digits
from imprint_pl.data.decode import read_image
from imprint_pl.embedding.row_cache import RowCache
from imprint_pl.experiments.report.read import read_results
from imprint_pl.experiments.results import COLUMNS, Results
from imprint_pl.files import content_hash
from imprint_pl.lightning.checkpoint import hyperparameters, read_checkpoint
from imprint_pl.training_set.kept_file import read_state, state_path

CASES = 150
SMALL = {"preprocess": {"size": 8, "mean": [0.5], "std": [0.5]}}


class Flat(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint with its state, by a module of one's own on the digits."""
    folder = tmp_path_factory.mktemp("written")
    model = ImprintedClassifier(Flat(), "kernel", projection_dim=20, keep="embeddings", **SMALL)
    trainer = quiet_trainer(limit_val_batches=0)
    trainer.fit(model, Digits(shots=5))
    trainer.save_checkpoint(folder / "a.ckpt")
    model.save_state(folder / "a.ckpt")
    model.head.save_pretrained(folder / "head")
    return folder


def damaged(content, seed):
    """Bits flipped, cut short, parts overwritten, moved, doubled, or nothing of it left."""
    draw = random.Random(seed)
    content = bytearray(content)
    kind = draw.choice(["flip", "flip", "flip", "cut", "zeros", "noise", "head", "double", "other"])
    place = draw.randrange(len(content))
    if kind == "flip":
        for _ in range(draw.choice([1, 1, 3, 20])):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[place:]
    elif kind in ("zeros", "noise"):
        length = min(draw.choice([1, 8, 64, 512]), len(content) - place)
        filler = bytes(length) if kind == "zeros" else draw.randbytes(length)
        content[place : place + length] = filler
    elif kind == "head":
        # The sizes that stand first in most formats.
        content[: 1 + draw.randrange(16)] = draw.randbytes(1 + draw.randrange(16))
    elif kind == "double":
        content[place:place] = content[:place]
    else:
        others = [b"", b"\x00" * 64, b"PK\x03\x04", b"\x89PNG\r\n", draw.randbytes(300)]
        content = bytearray(draw.choice(others))
    return bytes(content)


def tried(read):
    """What it gives, and the message of its ImprintError, one of them `None`."""
    try:
        return read(), None
    except ImprintError as error:
        return None, str(error)


def same_or_refused(read, expected, number=CASES):
    """Reads so many damaged files by `read(seed)`, which is what `expected` is, or raises."""
    refused = 0
    for seed in range(number):
        found, message = tried(lambda seed=seed: read(seed))
        if message is None:
            assert torch.equal(found, expected), seed
        else:
            assert len(message) > 30
            refused += 1
    assert refused > number / 4


def load(path):
    return ImprintedClassifier.load_from_checkpoint(path, backbone=Flat(), **SMALL)


def test_damaged_checkpoints(written, tmp_path):
    content, path = (written / "a.ckpt").read_bytes(), tmp_path / "b.ckpt"
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))

    def read(seed):
        path.write_bytes(damaged(content, seed))
        return load(path).head(x).detach()

    same_or_refused(read, load(written / "a.ckpt").head(x).detach())


def test_damaged_heads(written, tmp_path):
    content = (written / "head" / "model.safetensors").read_bytes()
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))

    def read(seed):
        (tmp_path / "model.safetensors").write_bytes(damaged(content, seed))
        return ImprintedHead.from_pretrained(tmp_path)(x).detach()

    same_or_refused(read, ImprintedHead.from_pretrained(written / "head")(x).detach())


def test_damaged_states(written, tmp_path):
    whole = read_state(state_path(written / "a.ckpt"))
    content = state_path(written / "a.ckpt").read_bytes()
    path = tmp_path / "b.state.safetensors"

    def read(seed):
        path.write_bytes(damaged(content, seed))
        found = read_state(path)
        # The plain values stand outside of the hash, but a checkpoint beside them has them, too.
        assert torch.equal(found.y, whole.y)
        return found.x

    same_or_refused(read, whole.x)


def test_damaged_config_files_beside_a_head(written, tmp_path):
    folder = tmp_path / "head"
    shutil.copytree(written / "head", folder)
    config = {"norm_inf": {"class_path": "os.system"}, "agg": "rm", "map_location": "cuda:7"}
    content = json.dumps(config | {"class_names": ["a"]}).encode()
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    expected = ImprintedHead.from_pretrained(written / "head")(x).detach()
    for seed in range(CASES):
        (folder / "config.json").write_bytes(damaged(content, seed) if seed else content)
        try:
            found = ImprintedHead.from_pretrained(folder)(x).detach()
        except ImprintError:
            continue
        assert torch.equal(found, expected)


def test_damaged_caches_are_named_and_filled_again(tmp_path):
    positions = torch.arange(0, 40, 2)
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    cache = RowCache(tmp_path, {"backbone": "x"})
    with cache.lock(lambda: None):
        cache.write(positions, rows)
    part = next(tmp_path.glob("part-*"))
    content = part.read_bytes()
    faulty = 0
    for seed in range(CASES):
        part.write_bytes(damaged(content, seed))
        found, held, faults = cache.read(positions)
        assert held.all() or not held.any()
        if held.all():
            assert torch.equal(found, rows)
        else:
            assert list(faults) == [part]
            faulty += 1
            with cache.lock(lambda: None):
                cache.remove(part)
                cache.write(positions, rows)
            assert torch.equal(cache.read(positions)[0], rows)
    assert faulty > CASES / 4


def forged_parts():
    positions, rows = np.arange(4), np.zeros((4, 3), np.float32)
    yield {"positions": positions[::-1].copy(), "embeddings": rows}
    yield {"positions": positions.astype(np.int32), "embeddings": rows}
    yield {"positions": positions, "embeddings": rows.astype(np.float64)}
    yield {"positions": positions, "embeddings": rows[:3]}
    yield {"positions": positions, "embeddings": rows[:, 0].copy()}
    yield {"positions": positions[:0], "embeddings": rows[:0]}
    yield {"positions": positions.reshape(2, 2), "embeddings": rows}
    yield {"embeddings": rows}
    yield {"positions": positions}


@pytest.mark.parametrize("forged", forged_parts())
def test_a_forged_part_of_a_cache_with_a_right_hash_is_a_fault_or_has_no_rows(forged, tmp_path):
    from safetensors.numpy import save

    from imprint_pl.embedding.row_cache import FORMAT, _content_hash
    from imprint_pl.files import digest

    key = {"backbone": "x"}
    content_sum = "" if len(forged) < 2 else _content_hash(**forged)
    metadata = {"format": FORMAT, "key": digest(key), "sha256": content_sum}
    (tmp_path / "part-00000.safetensors").write_bytes(save(forged, metadata))
    (tmp_path / "part-abcde.safetensors").write_bytes(b"")
    found, held, faults = RowCache(tmp_path, key).read(torch.arange(4))
    assert found is None
    assert not held.any()
    assert len(faults) <= 1


FORMATS = ("png", "jpeg", "gif", "bmp", "tiff", "webp", "ppm", "tga", "jp2")


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_images(kind, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jp2": "JPEG2000"}.get(kind, kind.upper()))
    path = tmp_path / f"image.{kind}"
    read = 0
    for seed in range(CASES // 3):
        path.write_bytes(damaged(file.getvalue(), seed))
        image, message = tried(lambda: read_image(path, max_side=64))
        if message is not None:
            assert str(path) in message
            continue
        # Pixels carry no checksum in most formats: another picture, but one.
        assert image.dtype == torch.uint8
        assert image.ndim == 3
        assert max(image.shape[1:]) <= 64
        read += 1
    assert read < CASES // 3


def test_an_image_that_would_be_handed_to_another_program_is_not_opened(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(ImprintError, match="cannot read the image .*photo.png"):
        read_image(path)


def test_damaged_results(tmp_path):
    results = Results(tmp_path / "s")
    row = dict.fromkeys(COLUMNS) | dict(
        backbone="b", data="d", task="all", recipe="qi", accuracy=0.5, id="x"
    )
    results.append([row, row | {"id": "y", "recipe": "lda", "accuracy": 0.75}])
    journal = results.journal.read_bytes()
    results.save()
    folder = tmp_path / "s"
    csv, parquet = ((folder / f"results.{end}").read_bytes() for end in ("csv", "parquet"))
    for seed in range(CASES // 3):
        for name, content in (("results.csv", csv), ("results.parquet", parquet)):
            path = tmp_path / name
            path.write_bytes(damaged(content, seed))
            rows, message = tried(lambda path=path: read_results(path))
            assert str(path) in message if rows is None else rows["accuracy"].between(0, 1).all()
        for name, content in (("journal.jsonl", journal), ("results.parquet", parquet)):
            folder = tmp_path / f"{name} {seed}"
            folder.mkdir()
            (folder / name).write_bytes(damaged(content, seed))
            ids, message = tried(lambda folder=folder: Results(folder).ids)
            assert name in message if ids is None else len(ids) <= 4


# Forged by hand: what no damage would make.


def forged_checkpoints(written, marker):
    """Names and checkpoints, to be written by `torch.save`."""
    whole = torch.load(written / "a.ckpt", weights_only=True)
    settings, state = whole["hyper_parameters"], whole["state_dict"]

    def with_settings(**more):
        return whole | {"hyper_parameters": settings | more}

    def with_state(**more):
        return whole | {"state_dict": state | {f"head.{name}": t for name, t in more.items()}}

    def with_extra(**more):
        extra = json.loads(bytes(state["head._extra_state"].tolist())) | more
        text = json.dumps(extra).encode()
        return with_state(_extra_state=torch.tensor(list(text), dtype=torch.uint8))

    call = {"class_path": "os.mkdir", "init_args": {"path": str(marker)}}
    yield "payload", whole | {"more": Payload(marker)}
    yield "payload in state", with_state(proxies=Payload(marker))
    yield "payload as settings", whole | {"hyper_parameters": Payload(marker)}
    for name in ("backbone", "preprocess", "norm_pre", "gen", "weights", "recipe", "k"):
        yield f"class of {name}", with_settings(**{name: call})
        yield f"class in text of {name}", with_settings(**{name: json.dumps(call)})
        yield f"class in a list of {name}", with_settings(**{name: [call]})
    yield "class path of a key", with_settings(preprocess={"size": 8, "mean": call})
    yield "no settings", {n: v for n, v in whole.items() if n != "hyper_parameters"}
    yield "settings of another type", whole | {"hyper_parameters": [1, 2]}
    yield "no state", whole | {"state_dict": {}}
    yield "state of another type", whole | {"state_dict": torch.zeros(3)}
    yield "no dict", torch.zeros(3)
    yield "absurd image size", with_settings(backbone="efficientnet_lite0", image_size=10**9)
    huge = torch.zeros(1).expand(10**6, 10**7)
    yield "a view of absurd size", with_state(proxies=huge)
    yield "a view of absurd size in NORM", with_state(**{"norm_inf.steps.2.landmarks": huge})
    yield "settings of absurd size", with_state(_extra_state=torch.zeros(1).byte().expand(10**12))
    yield "no memory", with_state(proxies=torch.empty(10**6, 10**6, device="meta"))
    yield "sparse", with_state(proxies=torch.eye(3).to_sparse())
    yield "complex", with_state(proxies=state["head.proxies"] * 1j)
    yield "not finite", with_state(proxies=state["head.proxies"] * torch.inf)
    yield "one proxy less", with_state(proxies=state["head.proxies"][1:])
    yield "one number less", with_state(proxies=state["head.proxies"][:, 1:])
    yield "one bias less", with_state(bias=state["head.bias"][1:])
    yield "class out of range", with_state(proxy_classes=state["head.proxy_classes"] + 1)
    yield "negative class", with_state(proxy_classes=state["head.proxy_classes"] - 1)
    yield "classes as floats", with_state(proxy_classes=state["head.proxy_classes"].float())
    yield "absurd number of classes", with_extra(num_classes=10**15)
    yield "negative number of classes", with_extra(num_classes=-1)
    yield "names of no class", with_extra(class_names=["a"])
    yield "names that are numbers", with_extra(class_names=list(range(10)))
    yield "names as text", with_extra(class_names="0123456789")
    yield "threshold as text", with_extra(threshold="0.5")
    yield "no JSON", with_state(_extra_state=torch.tensor([123], dtype=torch.uint8))
    yield "settings as floats", with_state(_extra_state=torch.zeros(5))
    yield "deep JSON", with_state(_extra_state=torch.tensor(list(b"[" * 10**5), dtype=torch.uint8))


def packed(path, target):
    """The same archive with its entries compressed, as a bomb would be."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))


def test_forged_checkpoints_run_no_code_and_ask_for_no_memory(written, tmp_path):
    marker, path = tmp_path / "made by a payload", tmp_path / "b.ckpt"
    # Above what is in use now; a child process would have to import everything again.
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    names = []
    torch.save(torch.load(written / "a.ckpt", weights_only=True), path)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    try:
        ImprintedClassifier.load_from_checkpoint(path, backbone=Flat())
        for name, checkpoint in forged_checkpoints(written, marker):
            if isinstance(checkpoint, dict):
                checkpoint = {n: v for n, v in checkpoint.items() if n != "loops"}
            torch.save(checkpoint, path)
            try:
                # Not its own backbone and preprocessing, where the file is to bring them.
                mine = {} if "image size" in name else dict(backbone=Flat())
                ImprintedClassifier.load_from_checkpoint(path, **mine)
            except ImprintError:
                names.append(name)
            assert not marker.exists(), name
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    every = [name for name, _ in forged_checkpoints(written, marker)]
    # What does not reach the head: keywords that the caller gives, files that are left out.
    harmless = {"class of weights", "class in text of weights", "class in a list of weights"}
    assert set(every) - set(names) <= harmless


def test_pickles_old_archives_and_packed_archives_are_not_read(written, tmp_path):
    marker, path = tmp_path / "made by a payload", tmp_path / "b.ckpt"
    whole = torch.load(written / "a.ckpt", weights_only=True)
    forged = [pickle.dumps(Payload(marker)), pickle.dumps({"state_dict": Payload(marker)})]
    old = io.BytesIO()
    torch.save(whole, old, _use_new_zipfile_serialization=False)
    packed(written / "a.ckpt", packed_file := io.BytesIO())
    for content in (*forged, old.getvalue(), packed_file.getvalue()):
        path.write_bytes(content)
        with pytest.raises(ImprintError, match="damaged, or not a checkpoint"):
            load(path)
    assert not marker.exists()


def test_what_lightning_s_own_entries_name_is_not_imported(written, tmp_path):
    whole = torch.load(written / "a.ckpt", weights_only=True)
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        for maker in ("lightning.pytorch.cli.instantiate_module", "evil_module.make"):
            entries = {"_instantiator": maker, "_class_path": "evil_module.Model"}
            settings = whole["hyper_parameters"] | entries
            torch.save(whole | {"hyper_parameters": settings}, tmp_path / "b.ckpt")
            model = load(tmp_path / "b.ckpt")
            assert type(model) is ImprintedClassifier
    finally:
        sys.path.remove(str(tmp_path))
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("slot", ["norm_pre", "gen", "norm_post", "norm_inf", "agg"])
def test_parts_that_files_name_by_import_paths_are_not_imported(slot, written, tmp_path, capsys):
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    path, own = tmp_path / "b.ckpt", {slot: "evil_module.Part"}
    whole = torch.load(written / "a.ckpt", weights_only=True)
    forged = dict(whole["state_dict"])
    extra = json.loads(bytes(forged["head._extra_state"].tolist()))
    for name in {"norm_inf", "agg"} & set(own):
        extra[name] = [{"name": "evil_module.Part"}]
    text = json.dumps(extra | {"settings": extra["settings"] | own}).encode()
    forged["head._extra_state"] = torch.tensor(list(text), dtype=torch.uint8)
    state = state_path(written / "a.ckpt")
    values, tensors = header(state)[0]["__metadata__"], load_file(state)
    plain = json.loads(values["state"])
    plain["settings"] |= own
    save_file(tensors, tmp_path / "b.safetensors", values | {"state": json.dumps(plain)})
    sys.path.insert(0, str(tmp_path))
    try:
        settings = whole["hyper_parameters"] | {"recipe": "qi"} | own
        torch.save(whole | {"hyper_parameters": settings}, path)
        with pytest.raises(ImprintError, match="import evil_module first, if you trust it"):
            load(path)
        assert main(["test", "--data", "Digits", "--ckpt_path", str(path)]) != 0
        assert "import evil_module first" in capsys.readouterr().err
        with pytest.raises(ImprintError):
            read_state(tmp_path / "b.safetensors")
        head = {n.removeprefix("head."): v for n, v in forged.items() if n.startswith("head.")}
        with suppress(ImprintError):
            ImprintedHead().load_state_dict(head)
        torch.save(whole | {"state_dict": forged}, path)
        with suppress(ImprintError):
            load(path)
    finally:
        sys.path.remove(str(tmp_path))
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("command", ["test", "predict"])
def test_the_commands_refuse_forged_checkpoints_in_one_line(command, written, tmp_path, capsys):
    marker = tmp_path / "made by a payload"
    call = {"class_path": "os.mkdir", "init_args": {"path": str(marker)}}
    whole = torch.load(written / "a.ckpt", weights_only=True)
    for forged in (
        whole | {"more": Payload(marker)},
        whole | {"hyper_parameters": whole["hyper_parameters"] | {"backbone": call}},
        whole | {"hyper_parameters": whole["hyper_parameters"] | {"norm_pre": json.dumps(call)}},
    ):
        torch.save(forged, tmp_path / "b.ckpt")
        arguments = [command, "--data", "Digits", "--ckpt_path", str(tmp_path / "b.ckpt")]
        assert main(arguments) != 0
        assert capsys.readouterr().err.startswith("error: --ckpt_path")
        assert not marker.exists()


def header(path):
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path, values, data):
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_absurd_sizes_in_the_header_of_a_head_or_a_state_ask_for_no_memory(written, tmp_path):
    for source, read in (
        (written / "head" / "model.safetensors", ImprintedHead.from_pretrained),
        (state_path(written / "a.ckpt"), read_state),
    ):
        values, data = header(source)
        target = tmp_path / source.name
        place = tmp_path if source.name == "model.safetensors" else target
        for name in values:
            if name == "__metadata__":
                continue
            for shape, end in (([10**9, 10**6], 10**15), ([2**62], 2**62), ([-1], 4)):
                forged = values | {name: values[name] | {"shape": shape, "data_offsets": [0, end]}}
                with_header(target, forged, data)
                with pytest.raises(ImprintError):
                    read(place)
        target.write_bytes(struct.pack("<Q", 2**62) + b"{}")
        with pytest.raises(ImprintError):
            read(place)


def test_states_whose_parts_do_not_fit_each_other(written, tmp_path):
    path = tmp_path / "b.state.safetensors"
    source = state_path(written / "a.ckpt")
    tensors = load_file(source)
    values, _ = header(source)
    plain = json.loads(values["__metadata__"]["state"])
    x, y = tensors["x"], tensors["y"]
    changes = [
        (dict(x=x[1:].clone()), {}),
        (dict(x=x[:, 1:].clone()), {}),
        (dict(x=x.long()), {}),
        (dict(x=x / 0), {}),
        (dict(y=y + 1), {}),
        (dict(y=y - 1), {}),
        (dict(y=y.float()), {}),
        ({}, dict(class_names=["a", "a"])),
        ({}, dict(class_names=3)),
        ({}, dict(class_names=[{}] * 10)),
        ({}, dict(embedding_dim=10**12)),
        ({}, dict(seed="x")),
        ({}, dict(sources=["../../etc/passwd"])),
        ({}, dict(weibull=[1, 2, 3])),
        ({}, dict(settings={"recipe": "os.system"})),
        ({}, dict(settings={"recipe": "qi", "gen": {"class_path": "os.system"}})),
        ({}, dict(settings=None)),
        ({}, dict(more="unknown")),
    ]
    for other_tensors, other_values in changes:
        forged = tensors | other_tensors
        metadata = {"format": "imprint_pl state 1", "state": json.dumps(plain | other_values)}
        save_file(forged, path, metadata | {"sha256": content_hash(forged)})
        with pytest.raises(ImprintError):
            read_state(path)


def test_names_that_climb_out_of_a_folder_stay_names(written, tmp_path):
    head = imprint(torch.eye(2), torch.arange(2), "qi", class_names=["../../a", "/etc/passwd"])
    head.save_pretrained(tmp_path / "inner" / "head")
    assert ImprintedHead.from_pretrained(tmp_path / "inner" / "head").class_names[0] == "../../a"
    whole = torch.load(written / "a.ckpt", weights_only=True)
    settings = whole["hyper_parameters"] | {"weights": "../../etc/passwd"}
    torch.save(whole | {"hyper_parameters": settings}, tmp_path / "inner" / "b.ckpt")
    assert "weights" not in hyperparameters(read_checkpoint(tmp_path / "inner" / "b.ckpt"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inner"]
