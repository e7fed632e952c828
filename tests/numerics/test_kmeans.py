"""k-means: what each engine must find, and what it must leave alone."""

from __future__ import annotations

import csv
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SHARED

from imprint_pl.errors import ImprintError
from imprint_pl.method.imprinting import imprint
from imprint_pl.numerics import kmeans_torch
from imprint_pl.numerics.kmeans import ENGINES, kmeans, kmeans_classes
from imprint_pl.parts.gen.kmeans import KMeans

ACCEPTANCE = SHARED / "acceptance"
OWN = ("torch", "exact")
every_engine = pytest.mark.parametrize("engine", ENGINES)
own_engine = pytest.mark.parametrize("engine", OWN)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n: int, k: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`n` samples around `k` far centres, shuffled, and the means of the blobs."""
    member = torch.arange(n) % k
    x = 50 * random(k, dim, seed=seed)[member] + random(n, dim, seed=seed + 1)
    means = torch.stack([x[member == i].double().mean(0) for i in range(k)]).float()
    return x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))], means


def embedding_like(n: int, dim: int = 256, seed: int = 0) -> torch.Tensor:
    """Unit vectors that lie near a curved few-dimensional sheet, as embeddings do."""
    hidden = torch.tanh(random(n, 8, seed=seed) @ random(8, 40, seed=seed + 1))
    x = hidden @ random(40, dim, seed=seed + 2) + 0.7 * random(n, dim, seed=seed + 3)
    return F.normalize(x + 3 * random(dim, seed=seed + 4))


def objective(x: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(x.double(), centroids.double()).amin(1).square().sum())


def same_rows(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    distances = torch.cdist(a.double(), b.double())
    return len(a) == len(b) and bool((distances.amin(0) < tolerance * (1 + b.norm(dim=1))).all())


@every_engine
@pytest.mark.parametrize(
    ("n", "k", "dim"), [(60, 3, 2), (400, 5, 16), (500, 4, 200), (4000, 7, 96)]
)
def test_separated_blobs_are_found_exactly(engine, n, k, dim):
    x, means = blobs(n, k, dim)
    assert same_rows(kmeans(x, k, engine=engine), means)


@every_engine
def test_a_class_with_at_most_k_samples_keeps_them_in_order(engine):
    x = random(5, 7)
    for k in (5, 6, 100):
        found = kmeans(x, k, engine=engine)
        assert torch.equal(found, x)
    found += 1
    assert torch.equal(x, random(5, 7)), "the result is not a view of the input"


@every_engine
def test_one_cluster_is_the_mean_in_float64(engine):
    x = 1e4 + random(5000, 3)
    assert torch.equal(kmeans(x, 1, engine=engine), x.double().mean(0, keepdim=True).float())


@own_engine
@pytest.mark.parametrize("dim", [3, 200])
def test_the_result_is_the_mean_of_the_samples_nearest_to_it(dim, engine):
    x, _ = blobs(2000, 6, dim)
    centroids = kmeans(x, 6, engine=engine)
    nearest = torch.cdist(x, centroids).argmin(1)
    means = torch.stack([x[nearest == i].mean(0) for i in range(6)])
    torch.testing.assert_close(centroids, means, rtol=1e-4, atol=1e-4)


def test_exact_is_a_fixed_point_of_lloyd_in_all_dimensions():
    x = embedding_like(3000)
    centroids = kmeans(x, 10, engine="exact")
    nearest = torch.cdist(x.double(), centroids.double()).argmin(1)
    means = torch.stack([x[nearest == i].double().mean(0) for i in range(10)]).float()
    torch.testing.assert_close(centroids, means, rtol=0, atol=1e-5)


@every_engine
@pytest.mark.parametrize("shape", [(50, 4), (300, 200), (2000, 130)])
def test_constant_data_gives_that_constant(engine, shape):
    x = torch.full(shape, 0.1)
    found = kmeans(x, 4, engine=engine)
    torch.testing.assert_close(
        found, x[:4], rtol=1e-2 if engine in ("auto", "faiss") else 2e-5, atol=0
    )


@own_engine
@pytest.mark.parametrize(("copies", "dim"), [(30, 3), (100, 150), (900, 150)])
def test_duplicates_fewer_than_k_distinct_samples_are_all_found(engine, copies, dim):
    distinct = random(3, dim)
    found = kmeans(distinct.repeat(copies, 1), 5, engine=engine)
    assert found.shape == (5, dim)
    assert torch.cdist(distinct, found).amin(1).max() < 1e-3
    assert torch.cdist(found, distinct).amin(1).max() < 1e-3


@own_engine
def test_constant_features_and_zeros_stay_finite(engine):
    x = embedding_like(600)
    x[:, ::2] = 1
    x[:200] = 0
    assert kmeans(x, 8, engine=engine).isfinite().all()


@own_engine
def test_embeddings_far_from_the_origin_keep_their_clusters(engine):
    x, means = blobs(900, 5, 150)
    assert same_rows(kmeans(x + 3000, 5, engine=engine) - 3000, means, tolerance=1e-2)


def test_an_empty_cluster_is_moved_to_the_farthest_sample():
    z = torch.tensor([[[0.0], [1.0], [0.0], [9.0], [0.0]]])
    real, labels = torch.tensor([[1.0, 1, 1, 1, 0]]), torch.zeros(1, 5, dtype=torch.long)
    means = kmeans_torch._means(z, real, labels, 2)
    assert means.flatten().tolist() == [2.5, 9.0]


def test_lloyd_refills_an_empty_cluster():
    x, means = blobs(300, 3, 16)
    start = torch.stack([x[0], x[0] + 0.01, torch.full_like(x[0], 1e4)])[None]
    found = kmeans_torch._lloyd(x[None], torch.ones(1, 300), start, 50)[0]
    sizes = torch.cdist(x, found).argmin(1).bincount(minlength=3)
    assert sizes.min() > 0
    assert objective(x, found) < objective(x, start[0]) / 2
    assert means.shape == found.shape


def test_a_gpus_sums_are_the_cpus_sums(monkeypatch):
    z, labels = random(3, 1500, 8), torch.arange(4500).view(3, 1500) % 7 % 5
    real = (torch.arange(1500) < torch.tensor([[1500], [900], [20]])).float()
    z = z * real[..., None]
    expected = kmeans_torch._sums(z, real, labels, 6)
    monkeypatch.setattr(kmeans_torch, "_add_on_cpu", kmeans_torch._add_by_product)
    for found, wanted in zip(kmeans_torch._sums(z, real, labels, 6), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@every_engine
def test_the_seed_fixes_the_result_and_another_seed_changes_it(engine):
    x = embedding_like(700)
    first = kmeans(x, 9, seed=3, engine=engine)
    assert torch.equal(first, kmeans(x, 9, seed=3, engine=engine))
    assert not torch.equal(first, kmeans(x, 9, seed=4, engine=engine))


@every_engine
def test_the_global_generators_are_left_alone(engine):
    import numpy as np

    torch.manual_seed(5)
    np.random.seed(5)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    kmeans(random(2000, 100), 4, engine=engine)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_numpy).all()


RAGGED = ((900, 96), (1000, 96), (2, 96), (1000, 96), (40, 96), (5, 96), (130, 96), (2500, 96))


@every_engine
@pytest.mark.parametrize("k", [2, 5, 10, 20])
def test_a_class_alone_and_beside_others_in_any_order_is_bitwise_the_same(engine, k):
    xs = [embedding_like(n, dim, seed=10 * i) for i, (n, dim) in enumerate(RAGGED)]
    alone = [kmeans(x, k, seed=1, engine=engine) for x in xs]
    together = kmeans_classes(xs, k, seed=1, engine=engine)
    backwards = kmeans_classes(xs[::-1], k, seed=1, engine=engine)[::-1]
    for x, one, other, another in zip(xs, alone, together, backwards, strict=True):
        assert one.shape == (min(len(x), k), x.shape[1])
        assert torch.equal(one, other)
        assert torch.equal(one, another)


@pytest.mark.parametrize("dim", [1, 3, 13, 70])
def test_a_slice_gives_bitwise_what_its_copy_gives(dim):
    x = random(501, dim)
    assert torch.equal(kmeans(x[1:], 5, engine="torch"), kmeans(x[1:].clone(), 5, engine="torch"))


def test_batches_and_blocks_of_little_memory_change_nothing(monkeypatch):
    xs = [embedding_like(n, 96, seed=n) for n in (300, 310, 305, 2000)]
    expected = kmeans_classes(xs, 6, engine="torch")
    monkeypatch.setattr(kmeans_torch, "BATCH_BYTES", 100_000)
    for found, of_class, x in zip(kmeans_classes(xs, 6, engine="torch"), expected, xs, strict=True):
        assert math.isclose(objective(x, found), objective(x, of_class), rel_tol=1e-3)


@every_engine
def test_ragged_classes_come_back_in_order_with_their_own_sizes(engine):
    xs = [random(n, 6, seed=n) + 100 * n for n in (30, 1, 12, 3, 31)]
    found = kmeans_classes(xs, 4, engine=engine)
    assert [len(c) for c in found] == [4, 1, 4, 3, 4]
    for x, c in zip(xs, found, strict=True):
        assert torch.cdist(c, x).amin(1).max() < 10


def test_no_classes_and_empty_classes_are_no_error():
    assert kmeans_classes([], 3) == []
    assert kmeans(torch.zeros(0, 4), 3).shape == (0, 4)


@every_engine
def test_float16_float64_and_strided_embeddings_become_float32(engine):
    x, means = blobs(300, 3, 8)
    for given_x in (x.half(), x.double(), x.T.contiguous().T, x.repeat(1, 2)[:, :8]):
        found = kmeans(given_x, 3, engine=engine)
        assert found.dtype == torch.float32
        assert same_rows(found, means, tolerance=1e-2)


@own_engine
def test_autocast_and_low_matmul_precision_change_nothing(engine):
    x = embedding_like(700)
    expected = kmeans(x, 5, engine=engine)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = kmeans(x, 5, engine=engine)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, expected)


@own_engine
def test_no_gradient_is_tracked_and_the_input_is_not_changed(engine):
    x = random(200, 70).requires_grad_()
    before = x.detach().clone()
    assert not kmeans(x, 4, engine=engine).requires_grad
    assert not kmeans(x, 300, engine=engine).requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize(("n", "k"), [(200, 20), (1000, 5), (1000, 20), (1000, 100), (4000, 20)])
def test_the_objective_is_no_worse_than_scikit_learns(n, k):
    cluster = pytest.importorskip("sklearn.cluster")
    x = embedding_like(n)
    theirs = [
        cluster.KMeans(k, n_init=1, max_iter=300, random_state=seed).fit(x.numpy()).inertia_
        for seed in range(3)
    ]
    for engine in OWN:
        ours = [objective(x, kmeans(x, k, seed=seed, engine=engine)) for seed in range(3)]
        print(f"{engine} n={n} k={k}: objective {sum(ours) / sum(theirs):.4f} of scikit-learn's")
        assert sum(ours) <= 1.02 * sum(theirs)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 300),
    dim=st.sampled_from([1, 2, 17, 64, 65, 140]),
    k=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    levels=st.sampled_from([2, 5, 1000]),
)
def test_any_data_gives_min_n_k_finite_centroids_inside_its_range(n, dim, k, seed, levels):
    x = torch.randint(levels, (n, dim), generator=torch.Generator().manual_seed(seed)).float()
    for engine in OWN:
        found = kmeans(x, k, seed=seed, engine=engine)
        assert found.shape == (min(n, k), dim)
        assert found.isfinite().all()
        slack = 1e-3 * levels
        assert (found >= x.amin(0) - slack).all()
        assert (found <= x.amax(0) + slack).all()


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=6),
    dim=st.sampled_from([2, 33, 90]),
    k=st.integers(2, 24),
    which=st.integers(0, 5),
)
def test_any_class_of_any_batch_is_bitwise_what_it_is_alone(sizes, dim, k, which):
    xs = [random(n, dim, seed=i) for i, n in enumerate(sizes)]
    which %= len(xs)
    together = kmeans_classes(xs, k, engine="torch")[which]
    assert torch.equal(together, kmeans(xs[which], k, engine="torch"))


def test_no_engine_prints_anything():
    code = (
        "import torch; from imprint_pl.numerics.kmeans import kmeans_classes\n"
        "xs = [torch.rand(30, 5), torch.rand(2000, 80), torch.ones(50, 5)]\n"
        f"for engine in {ENGINES!r}: kmeans_classes(xs, 20, engine=engine)"
    )
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_threads_and_matmul_precision_are_as_before():
    precision, threads = torch.backends.mkldnn.matmul.fp32_precision, torch.get_num_threads()
    kmeans_classes([random(n, 80) for n in (20, 300)], 3, engine="torch")
    assert torch.get_num_threads() == threads
    assert torch.backends.mkldnn.matmul.fp32_precision == precision


def test_a_bar_shows_only_where_it_takes_long(capfd):
    kmeans_classes([random(30, 3)] * 3, 2, progress=True, engine="torch")
    assert capfd.readouterr() == ("", "")


def test_without_faiss_auto_works_and_faiss_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    x, means = blobs(300, 3, 8)
    assert same_rows(kmeans(x, 3), means)
    with pytest.raises(ImprintError, match="faiss-cpu"):
        kmeans(x, 3, engine="faiss")


@pytest.mark.parametrize(
    "make", [lambda **kw: kmeans(random(9, 2), **kw), lambda **kw: KMeans(**kw)]
)
def test_bad_k_and_unknown_engine_are_errors_that_name_value_and_choices(make):
    with pytest.raises(ImprintError, match="k=0: .* k ≥ 1"):
        make(k=0)
    with pytest.raises(ImprintError, match="unknown engine='fais' .*auto, faiss, torch, exact"):
        make(k=3, engine="fais")


@every_engine
def test_the_generator_gives_each_class_what_kmeans_gives_it(engine):
    x, y = embedding_like(900, 80), torch.arange(900) % 7 % 3
    y[:4] = 3
    proxies = KMeans(5, engine)(x, y, 4, seed=2)
    assert proxies.classes.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 4
    for c in range(4):
        expected = kmeans(x[y == c], 5, seed=2, engine=engine)
        assert torch.equal(proxies.weights[proxies.classes == c], expected)
    assert not proxies.bias.any()


@pytest.fixture(scope="module")
def acceptance():
    file = ACCEPTANCE / "fashion_mnist_efficientnet_lite0.safetensors"
    if not file.exists():
        pytest.skip("the acceptance embeddings (../shared/acceptance) are not here")
    from safetensors.torch import load_file

    return {name: t.float() if "emb" in name else t for name, t in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "seeds"), [("torch", 10), ("faiss", 4), ("exact", 4)])
def test_accuracy_on_real_embeddings_is_the_references(acceptance, engine, seeds):
    wanted = ["all", "l2", "kmeans", "20", "l2", "l2", "max", "inner_product", "uniform", "-1"]
    with (ACCEPTANCE / "reference_accuracy.csv").open() as file:
        rows = [row for row in csv.reader(file) if row[:10] == wanted and row[12] == "-1"]
    theirs = sum(float(row[13]) for row in rows) / len(rows)
    x, y, test_x, test_y = (
        acceptance[f"{split}_{part}"]
        for split in ("train", "test")
        for part in ("embeddings", "labels")
    )
    accuracies = []
    for seed in range(seeds):
        head = imprint(x, y, "robust", gen=KMeans(20, engine), seed=seed)
        accuracies.append(100 * float((head(test_x).argmax(1) == test_y).float().mean()))
    ours = sum(accuracies) / seeds
    print(f"{engine}: {ours:.2f}, the reference {theirs:.2f}")
    assert abs(ours - theirs) < 0.7
