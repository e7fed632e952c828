import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint_pl import ImprintError, imprint
from imprint_pl.parts.norm.base import NoNorm, Norm
from imprint_pl.parts.norm.l2 import L2
from imprint_pl.parts.norm.power import Power
from imprint_pl.parts.norm.quantile import Quantile, quantiles


def test_quantiles_of_hand_made_proxies_are_exact():
    weights = torch.tensor([[1.0, 3.0], [10.0, 5.0]])
    # All values 1, 3, 5, 10; the quantiles ¼ and ¾ lie at positions 0.75 and 2.25.
    assert Quantile()(weights).tolist() == [[2.5, 6.25], [6.25, 2.5]]


def test_as_published_the_first_class_stays_and_the_next_take_its_values():
    weights = torch.tensor([[0.0, 4.0, 2.0], [9.0, 1.0, 5.0], [3.0, 2.0, 1.0]])
    done = Quantile(as_published=True).of_proxies(weights, torch.tensor([0, 1, 2]))
    assert done[0].tolist() == [0.0, 4.0, 2.0]
    # The quantiles 1/6, 1/2, 5/6 of 0, 2, 4.
    assert done[1].tolist() == pytest.approx([10 / 3, 2 / 3, 2])
    assert done[2].argsort().tolist() == [2, 1, 0]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), p=st.integers(1, 6), d=st.integers(1, 9))
def test_quantile_keeps_the_order_within_a_proxy_and_ignores_the_order_of_classes(seed, p, d):
    weights = torch.randn(p, d, generator=torch.Generator().manual_seed(seed))
    done = Quantile()(weights)
    assert torch.equal(done.argsort(stable=True), weights.argsort(stable=True))
    torch.testing.assert_close(done.sort(1).values, done[:1].sort(1).values.expand(p, d))
    torch.testing.assert_close(Quantile()(weights.flip(0)), done.flip(0))


def test_l2_and_none_of_proxies_ignore_the_classes():
    weights, classes = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([0, 1])
    assert NoNorm().of_proxies(weights, classes) is weights
    torch.testing.assert_close(
        L2().of_proxies(weights, classes), torch.tensor([[0.6, 0.8], [0.0, 0.0]])
    )


def test_quantile_takes_the_original_classifier_as_reference_where_there_is_one():
    weights, classes = torch.tensor([[1.0, 3.0], [10.0, 5.0]]), torch.tensor([0, 1])
    classifier = torch.tensor([[0.0, 4.0], [2.0, 6.0], [8.0, 10.0]])
    # The quantiles ¼ and ¾ of 0, 2, 4, 6, 8, 10 lie at positions 1.25 and 3.75.
    done = Quantile().of_proxies(weights, classes, classifier)
    assert done.tolist() == [[2.5, 7.5], [7.5, 2.5]]
    assert quantiles(classifier).tolist() == [2.5, 7.5]
    assert Quantile().of_proxies(weights, classes, quantiles(classifier)).equal(done)


def test_the_embedded_backbone_knows_its_original_classifier():
    from imprint_pl.embedding.backbone import load_backbone

    assert load_backbone("efficientnet_lite0").classifier.shape == (1000, 1280)
    assert load_backbone("efficientnet_lite0", pretrained=False).classifier is None


def test_the_slope_of_power_is_finite_where_features_are_zero():
    x = torch.tensor([[4.0, 0.0, -9.0]], requires_grad=True)
    Power()(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1 / 4, 0.0, 1 / 6]]))


class Centred(Norm):
    """A NORM of one's own that notes d in `fit`."""

    name = "centred"
    learns = True

    def fit(self, x, y, num_classes, seed=0):
        self.mean, self.input_dim = x.mean(0), x.shape[1]
        return self

    def forward(self, x):
        return x - self.mean


def test_a_norm_of_ones_own_may_set_input_dim_alone_and_in_a_chain(blobs):
    x, y = blobs
    head = imprint(x, y, "qi", norm_pre=[Centred(), "l2"])
    assert head.embedding_dim == x.shape[1]
    with pytest.raises(ImprintError, match="head made for 5"):
        head(torch.zeros(1, 4))
