"""What several threads share: settings of the process, and parts."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from threadpoolctl import threadpool_info

from imprint_pl import imprint
from imprint_pl.numerics import factorisations as factor
from imprint_pl.numerics import kmeans_torch
from imprint_pl.parts.gen.kridge import KRidge
from imprint_pl.parts.gen.ridge import Ridge


def precision():
    return torch.backends.cuda.matmul.fp32_precision


def threads():
    return [library["num_threads"] for library in threadpool_info()]


@pytest.mark.parametrize(
    ("changed", "setting"),
    [
        (lambda: kmeans_torch._full_precision(torch.device("cpu")), precision),
        (lambda: factor._one_thread(), threads),
    ],
)
def test_settings_of_the_process_are_as_before_after_two_threads_changed_them(changed, setting):
    before, entered, leave = setting(), threading.Event(), threading.Event()

    def second():
        with changed():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=second)
    with changed():
        thread.start()
        entered.wait(0.2)
    leave.set()
    thread.join()
    assert setting() == before


@pytest.mark.parametrize("gen", [Ridge(), Ridge("holdout"), KRidge(2)])
def test_a_gen_keeps_nothing_of_a_fit(gen, blobs):
    before = dict(vars(gen))
    assert imprint(*blobs, "ridge", gen=gen).settings["chosen_lam"] > 0
    assert vars(gen) == before


def test_threads_that_share_a_gen_note_the_lambda_of_their_own_data(blobs):
    x, y = blobs
    gen, scales = Ridge(), [3.0**i for i in range(12)]
    expected = [imprint(x * scale, y, "ridge").settings["chosen_lam"] for scale in scales]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            heads = list(pool.map(lambda s: imprint(x * s, y, "ridge", gen=gen), 5 * scales))
    finally:
        sys.setswitchinterval(interval)
    assert [head.settings["chosen_lam"] for head in heads] == 5 * expected
