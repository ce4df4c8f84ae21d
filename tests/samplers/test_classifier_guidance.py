"""Guidance by a classifier, exact for a mixture of Gaussians."""

import re

import pytest
import torch

from samplers import classifier_guidance, sample
from tests.oracles import MIXTURE, Gaussian
from tests.samplers.common import DISCRETE, FLOW, SMOOTH, normal

X = normal(5, 2)
FIRST = Gaussian.of(MIXTURE.means[0].tolist(), MIXTURE.stds[0].item())


def log_first(schedule):
    """log p(the first component | x_t) of the mixture, exact."""

    def log_prob(x, t):
        c = schedule(t)
        variance = (c.alpha[:, None] * MIXTURE.stds) ** 2 + c.sigma[:, None] ** 2
        away = x[:, None] - c.alpha[:, None, None] * MIXTURE.means
        return (MIXTURE.weights.log() - away.square().sum(-1) / 2 / variance - variance.log()).log_softmax(-1)[:, 0]

    return log_prob


@pytest.mark.parametrize("prediction", ["velocity", "noise", "data", "score"])
@pytest.mark.parametrize("schedule", [*SMOOTH, DISCRETE], ids=str)
def test_a_classifier_makes_of_all_data_its_class(schedule, prediction):
    guided = classifier_guidance(MIXTURE.field(schedule, prediction), log_first(schedule))
    expected = FIRST.field(schedule)
    for t in (0.2, 0.7, torch.linspace(0.1, 0.9, 5, dtype=torch.float64)):
        found = guided.predict(X, t)
        torch.testing.assert_close(found.x_0, expected.x_0(X, t))
        torch.testing.assert_close(found.v, expected.v(X, t))
        assert found.num_evals == 1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_classifier_guides_from_pure_noise_to_data(context):
    guided = classifier_guidance(MIXTURE.field(FLOW), log_first(FLOW))
    with context():
        got = sample(guided, X, "midpoint", 200).x
    torch.testing.assert_close(got, FIRST.solve(X, 1.0, 0.0, FLOW), rtol=0, atol=5e-3)
    torch.testing.assert_close(guided.v(X, 1.0), MIXTURE.field(FLOW).v(X, 1.0))
    torch.testing.assert_close(guided.v(X, torch.ones(5)), MIXTURE.field(FLOW).v(X, torch.ones(5)))


def test_a_classifier_has_a_scale_and_an_interval():
    field, log_prob = MIXTURE.field(FLOW), log_first(FLOW)
    once, twice = (classifier_guidance(field, log_prob, s).score(X, 0.5) for s in (1.0, 2.0))
    torch.testing.assert_close(twice - once, once - field.score(X, 0.5))
    t = torch.tensor([0.2, 0.4, 0.5, 0.6, 0.8], dtype=torch.float64)
    guided = classifier_guidance(field, log_prob, interval=(0.4, 0.6))
    inside = torch.tensor([False, True, True, True, False])[:, None]
    expected = torch.where(inside, FIRST.field(FLOW).v(X, t), field.v(X, t))
    torch.testing.assert_close(guided.v(X, t), expected)
    torch.testing.assert_close(torch.cat([guided.v(X[i : i + 1], t[i].item()) for i in range(5)]), expected)
    with pytest.raises(ValueError, match="interval"):
        classifier_guidance(field, log_prob, interval=(0.6, 0.4))


@pytest.mark.parametrize(
    ("log_prob", "message"),
    [
        (lambda x, t: x, "log_prob gave (5, 2) for x_t (5, 2): it must give a number per sample"),
        (lambda x, t: 0.0, "log_prob gave a float"),
        (lambda x, t: x.detach().sum(1), "log_prob gives no gradient"),
    ],
)
def test_what_is_no_classifier_is_refused(log_prob, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        classifier_guidance(MIXTURE.field(FLOW), log_prob).v(X, 0.5)
