"""Unit 2: a flow for one token."""
import torch

from backbone import Flow
from engine import networks


class Straight(torch.nn.Module):
    """The exact velocity if all data are one point: (point - x_t) / (1 - t)."""
    point = torch.tensor([3., -2])

    def forward(self, x, t, z):
        return (self.point - x) / (1 - t.reshape(-1, 1))


class Curved(torch.nn.Module):
    def forward(self, x, t, z):                               # x(1) = x(0) e
        return x


def test_the_path_is_a_straight_line():
    """x_t = (1 - t) noise + t x, with one noise; the velocity is its derivative by t."""
    torch.manual_seed(0)
    x, t = torch.randn(1000, 2) + 5, torch.rand(1000, 1)
    noisy, velocity = networks.flow_pair(x, t)
    assert torch.allclose(noisy + (1 - t) * velocity, x, atol=1e-4)
    noise = noisy - t * velocity
    assert noise.mean().abs() < .1 and (noise.std() - 1).abs() < .1


def test_the_loss_is_the_error_of_the_velocity():
    """A time for each token; the network gets x_t, t and z; the mean squared error."""
    torch.manual_seed(0)
    seen = []

    def net(x, t, z):
        seen.append((x, t, z))
        return torch.zeros_like(x)

    x, z = torch.full((20_000, 1), 2.), torch.randn(20_000, 3)
    loss = Flow.loss(net, x, z)
    (noisy, t, condition), = seen
    assert abs(loss - 5) < .2                                 # E (2 - noise)^2
    exact = lambda x, t, z: (2 - x) / (1 - t[:, None])        # only of the noisy token, at this t
    assert Flow.loss(exact, x, z) < 1e-6
    assert t.shape == (20_000,) and condition is z


def test_tokens_of_more_channels_are_noisier():
    """t is the sigmoid of a normal number with mean 1/2 log (16 / c) and variance 1."""
    torch.manual_seed(0)
    seen = []
    for c, mean in ((4, .693), (16, 0.), (64, -.693)):
        Flow.loss(lambda x, t, z: seen.append(t.logit()) or x, torch.zeros(20_000, c), None)
        assert abs(seen[-1].mean() - mean) < .03 and abs(seen[-1].std() - 1) < .03


def test_sampling_arrives():
    """N steps of 1 / N from t = 0, a tensor of one number; the velocity of a straight path is exact at once. It is that
    of `denoise`, guided."""
    found = Flow.sample(Straight(), torch.zeros(5, 1), lambda count: torch.randn(5, count, 2), 4)
    assert torch.allclose(found, Straight.point.expand(5, 2), atol=1e-4)
    echo, branches = lambda x, t, z: z, torch.tensor([[3.], [1.]])
    assert Flow.sample(echo, branches, lambda count: torch.zeros(1, count, 1), 2, [2.]) == 5


def test_sampling_is_of_second_order():
    """Adams-Bashforth: x += (1.5 v - .5 v_before) / N. Twice the steps, a quarter of the error; first, Euler's."""
    errors = [(Flow.sample(Curved(), torch.zeros(1, 1), lambda count: torch.ones(1, count, 1), steps) - torch.e).abs()
              for steps in (16, 32)]
    assert errors[1] < errors[0] / 3


def test_the_temperature_scales_the_noise():
    """temperature multiplies x at t = 0."""
    net = lambda x, t, z: torch.zeros_like(x)
    assert Flow.sample(net, torch.zeros(1, 1), lambda count: torch.ones(1, count, 1), 2, temperature=.5) == .5
