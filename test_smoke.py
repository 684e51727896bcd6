# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "matplotlib", "pytest"]
# ///
"""Facts that the code must get right, checked against closed forms, brute force or a second derivation, and the
scripts from end to end on drawn digits. Needs no network and no files: `python -m pytest -q`."""
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bfn
import common
import diffusion

HERE = Path(__file__).parent
M = 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Net(torch.nn.Module):
    """In place of the network, where an equation needs none: it has a parameter, which tells the device."""

    def __init__(self, output=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.output = output

    def forward(self, x, t, label):
        return self.output(x, t, label)


def known_images(n):
    """n draws from a data set of M images, [n, 1, 28, 28], which differ in two rows only; and the M images."""
    images = (torch.randint(30, 220, (1, 1, 28, 28)) / 127.5 - 1).repeat(M, 1, 1, 1)
    images[:, 0, 3:5] += (torch.randint(0, 2, (M, 2, 28)) - 0.5) * (40 / 127.5)
    return images[torch.arange(n) % M], images


def best_guess(view, sigma, images):
    """The mean of the images given view = image + sigma noise; sigma: [B, 1, 1, 1]."""
    view, differ = view[:, 0, 3:5], images[:, 0, 3:5]  # elsewhere they are the same
    distance = (view[:, None] - differ[None]).square().flatten(2).sum(2)
    return torch.einsum("bm,mchw->bchw", (-distance / (2 * sigma.flatten()[:, None] ** 2)).softmax(1), images)


def assert_even(drawn, images):
    """Each of drawn is one of images, and each image comes equally often, within four standard errors."""
    distance, index = (drawn[:, None] - images[None]).abs().flatten(2).amax(2).min(1)
    assert distance.max() < 1 / 255
    counts = index.bincount(minlength=M)
    assert (counts - len(drawn) / M).abs().max() < 4 * (len(drawn) / M * (1 - 1 / M)) ** 0.5


# ------------------------------------------------------------------------------------------------------ diffusion

def betas():
    """beta_1..beta_T of the chain whose products of 1 - beta are alpha_bar, float64."""
    a = diffusion.alpha_bar(torch.arange(diffusion.T + 1))
    return 1 - a[1:] / a[:-1]


def test_thousand_single_steps_give_the_closed_form_marginal():
    """DDPM eq. 4 from eq. 2."""
    n, x_0 = 40000, 0.7
    x = torch.full((n,), x_0, dtype=torch.float64)
    for i, beta in enumerate(betas(), start=1):
        x = (1 - beta).clamp(min=0).sqrt() * x + beta.sqrt() * torch.randn(n, dtype=torch.float64)
        if i in (1, 100, 500, 900, 1000):
            drawn = diffusion.q_sample(torch.full((n, 1, 1, 1), x_0), torch.full((n,), i), torch.randn(n, 1, 1, 1))
            assert abs(x.mean() - drawn.mean()) < 6 * drawn.std() / n ** 0.5
            assert x.std() / drawn.std() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("i", [2, 30, 500, 999])
def test_reverse_step_is_the_posterior_found_on_a_grid(i, monkeypatch):
    """q(x_{t-1} | x_t, x_0) ~ q(x_{t-1} | x_0) q(x_t | x_{t-1}), multiplied out on a grid (DDPM eq. 6, 7)."""
    x_0, x_t, n = 0.3, -0.2, 100
    a, beta = diffusion.alpha_bar(i - 1), betas()[i - 1]
    grid = torch.linspace(-6, 6, 2000001, dtype=torch.float64)
    log_p = -(grid - a.sqrt() * x_0) ** 2 / (2 * (1 - a)) - (x_t - (1 - beta).sqrt() * grid) ** 2 / (2 * beta)
    p = log_p.softmax(0)
    mean = (p * grid).sum()
    deviation = (p * (grid - mean) ** 2).sum().sqrt()

    monkeypatch.setattr(diffusion, "predict_x_0", lambda net, x, *rest: torch.full_like(x, x_0))
    linspace = torch.linspace
    process = diffusion.sample(Net(), torch.zeros(n, dtype=torch.int64), diffusion.T)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "linspace", lambda *a, **k: linspace(*a, **k)[diffusion.T - i:])  # start at step i
        patch.setattr(torch, "randn", lambda *shape: torch.full(shape, x_t))
        next(process)
    x_s = next(process)[1].double()
    assert abs(x_s.mean() - mean) < 5 * deviation / x_s.numel() ** 0.5 + 1e-6
    assert x_s.std() / deviation == pytest.approx(1, abs=0.02)


def test_ancestral_sampling_over_all_steps_is_algorithm_2(monkeypatch):
    """Against the algorithm as the paper writes it: with beta, alpha_bar and eps_theta."""
    monkeypatch.setattr(diffusion, "predict_x_0", lambda net, x, *rest: (0.5 * x).clamp(-1, 1))
    torch.manual_seed(1)
    *_, (_, drawn, _) = diffusion.sample(Net(), torch.zeros(2, dtype=torch.int64), diffusion.T)
    torch.manual_seed(1)
    x = torch.randn(2, 1, 28, 28).double()
    beta, alpha_bar = betas(), diffusion.alpha_bar(torch.arange(diffusion.T + 1))
    for t in range(diffusion.T, 0, -1):
        b, a_t, a_s = beta[t - 1], alpha_bar[t], alpha_bar[t - 1]
        x_0 = (0.5 * x).clamp(-1, 1)
        if t == diffusion.T:  # alpha_T is 0, where algorithm 2 is 0 / 0: eq. 7 instead
            mean = a_s.sqrt() * b / (1 - a_t) * x_0 + (1 - b).clamp(min=0).sqrt() * (1 - a_s) / (1 - a_t) * x
        else:
            eps = (x - a_t.sqrt() * x_0) / (1 - a_t).sqrt()
            mean = (x - b / (1 - a_t).sqrt() * eps) / (1 - b).sqrt()
        x = mean + (b * (1 - a_s) / (1 - a_t)).sqrt() * torch.randn(x.shape)
    assert torch.allclose(x.float(), drawn, atol=1e-3)


def test_kl_step_is_the_divergence_of_the_two_normals():
    """DDPM eq. 8, with torch's divergence of the posteriors of eq. 7."""
    t = torch.tensor([2, 10, 300, 999])
    x_0, x_0_hat, x_t = torch.rand(3, 4, 1, 28, 28).double() * 2 - 1
    a_t, a_s, beta = [v.view(-1, 1, 1, 1) for v in (diffusion.alpha_bar(t), diffusion.alpha_bar(t - 1), betas()[t - 1])]

    def posterior(x_0):
        mean = (a_s.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - a_s) * x_t) / (1 - a_t)
        return torch.distributions.Normal(mean, ((1 - a_s) / (1 - a_t) * beta).sqrt())
    expected = torch.distributions.kl_divergence(posterior(x_0), posterior(x_0_hat)).flatten(1).sum(1)
    assert torch.allclose(diffusion.kl_step(x_0, x_0_hat, t).double(), expected, rtol=1e-4)


def test_diffusion_loss_is_the_error_of_v(monkeypatch):
    """A network that knows x_0, and says a v which is off by 0.1; v is recovered as (sqrt(alpha_bar) x_t - x_0) /
    sqrt(1 - alpha_bar)."""
    x_0 = torch.rand(64, 1, 28, 28) * 2 - 1

    def output(x, t, label):
        a = diffusion.alpha_bar(t * diffusion.T).float().view(-1, 1, 1, 1)
        assert (t > 0).all() and (t <= 1).all() and x.shape == (64, 17, 28, 28)
        return (a.sqrt() * x[:, :1] - x_0) / (1 - a).sqrt() + 0.1
    monkeypatch.setattr(torch, "randint", lambda *a: torch.randperm(900)[:64] + 100)  # there 1 - a is not tiny
    assert diffusion.loss(Net(output), x_0, None).item() == pytest.approx(0.01, rel=1e-3)


def ideal_diffusion(monkeypatch, images):
    def predict(net, x_t, t, label, guidance=1):
        signal, noise = diffusion.signal_and_noise(t, x_t)
        return best_guess(x_t / signal.clamp(min=1e-4), noise / signal.clamp(min=1e-4), images)
    monkeypatch.setattr(diffusion, "predict_x_0", predict)


def test_diffusion_bound_is_tight_for_known_images(monkeypatch):
    x, images = known_images(8000)
    ideal_diffusion(monkeypatch, images)
    terms = diffusion.bound(None, x, None)
    total = sum(terms.values())
    in_bin = math.erf(1 / 255 / (1 - diffusion.alpha_bar(1)).sqrt() / 2 ** 0.5)  # of the decoder's normal
    assert terms["decoder"].mean() == pytest.approx(-784 * math.log(in_bin), rel=1e-3)
    error = (total.std() / len(total) ** 0.5).item()
    assert error < 0.08
    assert total.mean() == pytest.approx(math.log(M) - 784 * math.log(in_bin), abs=4 * error)


@pytest.mark.parametrize("sampler, steps", [("ancestral", 1000), ("ancestral", 100), ("ddim", 50)])
def test_diffusion_draws_known_images_equally_often(sampler, steps, monkeypatch):
    _, images = known_images(M)
    ideal_diffusion(monkeypatch, images)
    *_, (_, drawn, _) = diffusion.sample(Net(), torch.zeros(100, dtype=torch.int64), steps, sampler)
    assert_even(drawn, images)


def test_guidance_goes_on_from_the_prediction_without_label_to_the_one_with_it():
    """x_0_hat + (w - 1) (x_0_hat - x_0_hat without label), clipped; for classes the same with logits."""
    x, label = torch.zeros(2, 1, 28, 28), torch.tensor([3, common.NOT_TOLD])
    net = Net(lambda x, t, label: torch.where(label == 3, -0.4, -0.1).view(-1, 1, 1, 1).expand(-1, 1, 28, 28))
    t, noise = torch.full((2,), 600), torch.sin(torch.tensor(math.pi / 2 * 0.6))
    guided = diffusion.predict_x_0(net, x, t, label, 2.5)  # from x_t = 0: x_0_hat = -noise v
    assert torch.allclose(guided, noise * torch.tensor([0.4 + 1.5 * 0.3, 0.1]).view(2, 1, 1, 1))
    assert diffusion.predict_x_0(net, x, t, label, 9)[0].unique() == 1
    data = bfn.Discrete()
    net = Net(lambda x, t, label: torch.where(label == 3, 1.0, 0.5).view(-1, 1, 1, 1) * torch.tensor(
        [1.0, 0.0]).view(1, 2, 1, 1).expand(-1, 2, 28, 28))
    output = bfn.guided_output(data, net, torch.zeros(2, 2, 28, 28), torch.tensor(0.5), label, 2.5)
    assert torch.allclose(output[:, 0], torch.tensor([1.0 + 1.5 * 0.5, 0.5]).view(2, 1, 1))


# ------------------------------------------------------------------------------------------------------------ BFN

class IdealContinuous(bfn.Continuous):
    def output(self, images, theta, t, label):
        beta = common.column(self.beta(t), theta)
        return best_guess(theta / beta, beta ** -0.5, images.values)


class IdealDiscretized(bfn.Discretized):
    def output(self, images, theta, t, label):
        mean = IdealContinuous.output(self, images, theta, t, label)
        return torch.cat([mean, torch.full_like(mean, math.log(1e-4))], dim=1)


class IdealDiscrete(bfn.Discrete):
    def output(self, images, theta, t, label):
        weights = torch.einsum("bchw,mchw->bm", theta, images.values).softmax(1)
        return torch.einsum("bm,mchw->bchw", weights, images.values).clamp(min=1e-12).log()


def ideal(kind, n):
    """An ideal output distribution for M known images: (data, a net that holds the M images as x, n draws of x)."""
    net = Net()
    if kind == "discrete":
        images = F.one_hot(torch.randint(0, 2, (M, 28, 28)), 2).movedim(-1, 1).float()
        images[:, :, 2:] = images[:1, :, 2:]
        data = IdealDiscrete()
    else:
        images = known_images(M)[1]
        data = {"continuous": IdealContinuous, "discretized": IdealDiscretized}[kind]()
        if kind == "discretized":
            images = ((images + 1) * 127.5).round() / 127.5 - 1
    net.values = images
    data.encode = data.decode = lambda x: x
    return data, net, images[torch.arange(n) % M]


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_small_messages_add_up_to_the_flow(kind):
    """And the flow's moments are those of BFN eq. 77 and 185."""
    data, n = bfn.TYPES[kind](), 40000
    x = torch.tensor([0.0, 1.0] if kind == "discrete" else [0.6]).view(1, -1, 1, 1).expand(n, -1, 1, 1)
    times = torch.linspace(0.1, 0.4, 30)
    theta = bfn.flow(data, x, torch.full((n,), 0.1), torch.randn(x.shape))
    for t, s in zip(times[:-1], times[1:]):
        theta = theta + bfn.sender(data, x, data.beta(s) - data.beta(t), torch.randn(x.shape))
    t = torch.full((n,), 0.4)
    flow = bfn.flow(data, x, t, torch.randn(x.shape))
    assert ((theta.mean(0) - flow.mean(0)).abs() < 6 * flow.std(0) / n ** 0.5).all()
    assert torch.allclose(theta.std(0) / flow.std(0), torch.ones(()), atol=0.02)
    if kind == "discrete":
        mean, variance = 9 * 0.4 ** 2 * torch.tensor([-1.0, 1.0]), torch.tensor(9 * 0.4 ** 2 * 2)
    else:
        gamma, flow = 1 - 0.001 ** 0.8, data.belief(flow, t)
        mean, variance = torch.tensor(gamma * 0.6), torch.tensor(gamma * (1 - gamma))
    assert torch.allclose(flow.mean(0).flatten(), mean, atol=0.05)
    assert torch.allclose(flow.var(0).flatten(), variance, rtol=0.03)


@pytest.mark.parametrize("alpha", [0.3, 40.0])
def test_adding_a_message_is_bayes_rule(alpha):
    """For grey values BFN eq. 49 and 50, with a message y / alpha ~ N(x, 1 / alpha); for classes the posterior
    p(k) ~ theta_k N(y; alpha (K e_k - 1), alpha K I) (eq. 157)."""
    t, theta, x = torch.tensor([0.2]), torch.randn(1, 1, 3, 3), torch.rand(1, 1, 3, 3)
    data = bfn.Continuous()
    y = bfn.sender(data, x, alpha, torch.randn(x.shape))
    rho = 1 + data.beta(t).item()
    mu = (rho * data.belief(theta, t) + alpha * (y / alpha)) / (rho + alpha)
    s = torch.tensor([math.log(rho + alpha) / (-2 * math.log(data.sigma_1))])  # where 1 + beta(s) = rho + alpha
    assert torch.allclose(data.belief(theta + y, s), mu, rtol=1e-4)
    for K in (2, 5):
        data, theta = bfn.Discrete(K), torch.randn(1, K, 1, 1)
        y = bfn.sender(data, F.one_hot(torch.tensor([[[1]]]), K).movedim(-1, 1).float(), alpha, torch.randn(1, K, 1, 1))
        means = alpha * (K * torch.eye(K) - 1)
        log_p = -(y.flatten() - means).square().sum(1) / (2 * alpha * K) + theta.flatten().log_softmax(0)
        assert torch.allclose((theta + y).softmax(1).flatten(), log_p.softmax(0), atol=1e-5)


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_alpha_is_the_slope_of_beta(kind):
    data, t = bfn.TYPES[kind](), torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    assert torch.allclose((data.beta(t + 1e-6) - data.beta(t - 1e-6)) / 2e-6, data.alpha(t), rtol=1e-6)


def single_pixel(kind, count):
    """A pixel with one of two values, and an output distribution that can be written down, for discrete data one that
    trusts theta too little (the right one would make L^n the same for all n): (data, count draws of x)."""
    if kind == "continuous":
        class Pixel(bfn.Continuous):
            sigma_1 = 0.1

            def output(self, net, theta, t, label):
                return torch.sigmoid(theta) - 0.5
        values = torch.tensor([[-0.5], [0.5]])
    else:
        class Pixel(bfn.Discrete):
            beta_1 = 4.0

            def output(self, net, theta, t, label):
                return 0.3 * theta
        values = torch.eye(2)
    return Pixel(), values[torch.arange(count) % 2].view(count, -1, 1, 1)


def n_step_loss(kind, n, count):
    """L^n = n E_i KL(sender || receiver) in nats, the divergence in closed form (two normals) or integrated over y."""
    data, x = single_pixel(kind, count)
    i = torch.arange(count) // 2 % n  # each value of the pixel at each step
    t, s = (i / n).clamp(min=bfn.T_MIN), (i + 1) / n
    x_hat = data.mean(data.output(None, bfn.flow(data, x, t, torch.randn(x.shape)), t, None))
    alpha = (data.beta(s) - data.beta(t)).float()[:, None]
    if kind == "continuous":
        return n * (alpha / 2 * (x - x_hat).flatten(1) ** 2).mean().item()
    # y_1 - y_0 ~ N(+-2 alpha, 4 alpha) says all that y says; z are its quantiles in units of its deviation
    z = torch.linspace(-8, 8, 201)
    density = torch.exp(-z ** 2 / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    p_true = (x * x_hat).sum(1).flatten(1)
    ratio = p_true + (1 - p_true) * torch.exp(-2 * alpha - 2 * alpha.sqrt() * z)  # receiver / sender density at y
    return n * -(density * ratio.log()).sum(1).mean().item()


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_n_step_loss_converges_to_the_continuous_time_loss(kind):
    count = 200000
    data, x = single_pixel(kind, count)
    t = ((torch.arange(count) // 2 + 0.5) / (count / 2)).clamp(min=bfn.T_MIN)
    limit = bfn.loss_at(data, None, x, t, None).mean().item()
    gaps = [n_step_loss(kind, n, count) - limit for n in (1, 4, 512)]
    assert abs(gaps[0]) > 3 * abs(gaps[1]) > 9 * abs(gaps[2])
    assert abs(gaps[2]) < 0.02 * limit


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_bfn_bound_is_tight_for_known_images(kind):
    data, net, x = ideal(kind, 16000)
    terms = bfn.bound(data, net, x, None)
    total = sum(terms.values())
    error = (total.std() / len(total) ** 0.5).item()
    grain = -784 * math.log(math.erf(1 / 255 / data.sigma_1 / 2 ** 0.5)) if kind == "continuous" else 0
    assert error < 0.06
    assert total.mean() == pytest.approx(math.log(M) + grain, abs=4 * error)


@pytest.mark.parametrize("kind", bfn.TYPES)
@pytest.mark.parametrize("sampler, steps", [("mean", 100), ("paper", 300), ("ode", 30)])
def test_bfn_draws_known_images_equally_often(kind, sampler, steps):
    data, net, images = ideal(kind, M)
    *_, (_, _, drawn) = bfn.sample(data, net, torch.zeros(100, dtype=torch.int64), steps, sampler)
    assert_even(drawn, images)


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_paper_sampler_is_the_papers_algorithm(kind, monkeypatch):
    """Algorithms 3, 6 and 9 as the paper writes them, in mu and rho, or in probabilities, with the same noise."""
    data, n = bfn.TYPES[kind](), 7
    draws = []  # of the output distribution, as the sampler makes them

    def draw(output):
        draws.append(type(data).draw(data, output))
        return draws[-1]
    monkeypatch.setattr(data, "draw", draw)
    monkeypatch.setattr(data, "output", lambda net, theta, t, label: torch.cat(
        [0.3 * data.belief(theta, t) + 0.1] + [torch.full_like(theta, -3)] * (kind == "discretized"), dim=1))
    noise = torch.randn(n + 1, 5, data.channels, 28, 28)
    monkeypatch.setattr(common, "randn_like", lambda x, remaining=iter(noise[1:]): next(remaining))
    monkeypatch.setattr(torch, "randn", lambda *shape: noise[0])
    if kind == "discretized":
        monkeypatch.setattr(data, "draw", lambda output: draws.append(data.mean(output).round(decimals=1)) or draws[-1])
    *_, (_, belief, _) = bfn.sample(data, Net(), torch.zeros(5, dtype=torch.int64), n, "paper")
    if kind == "discrete":
        K, theta = 2, torch.full((5, 2, 28, 28), 0.5)
        for i in range(1, n + 1):
            alpha = data.beta_1 * (2 * i - 1) / n ** 2  # eq. 192
            y = alpha * (K * draws[i - 1] - 1) + (alpha * K) ** 0.5 * noise[i]
            theta = torch.exp(y) * theta / (torch.exp(y) * theta).sum(1, keepdim=True)
        expected = data.decode(theta)
    else:
        expected, rho = torch.zeros(5, 1, 28, 28), 1.0
        for i in range(1, n + 1):
            alpha = data.sigma_1 ** (-2 * i / n) * (1 - data.sigma_1 ** (2 / n))  # eq. 95
            y = draws[i - 1] + noise[i] / alpha ** 0.5
            expected, rho = (rho * expected + alpha * y) / (rho + alpha), rho + alpha
    assert len(draws) == n + 1
    assert torch.allclose(belief, expected, atol=2e-3)


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_sampling_times(kind):
    """From 0 to 1, more of them early than in the paper; for grey values at diffusion's noise levels."""
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = bfn.TYPES[kind]().times(u)
    assert t[0] == pytest.approx(0, abs=1e-12) and t[-1] == 1
    assert (t[1:] >= t[:-1]).all() and (t[1:-1] < u[1:-1]).all()
    if kind != "discrete":
        gamma = 1 - 0.001 ** (2 * t[1:-1])
        assert torch.allclose(gamma, diffusion.alpha_bar((1 - u[1:-1]) * diffusion.T))


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_nothing_breaks_at_the_ends_of_time(kind):
    data = bfn.TYPES[kind]()
    net = common.UNet(data.in_channels, data.out_channels)
    torch.nn.init.normal_(net.head.weight)
    x, label = data.encode(torch.rand(4, 1, 28, 28) * 2 - 1), torch.tensor([0, 5, 9, common.NOT_TOLD])
    losses = bfn.loss_at(data, net, x, torch.tensor([bfn.T_MIN, 1e-4, 0.999, 1.0]), label)
    losses.sum().backward()
    assert losses.isfinite().all() and all(p.grad.isfinite().all() for p in net.parameters())
    assert bfn.bound(data, net, torch.rand(4, 1, 28, 28) * 2 - 1, label)["reconstruction"].isfinite().all()


def greys():
    return torch.arange(256) / 127.5 - 1


@pytest.mark.parametrize("sigma", [1e-3, 2e-3, 0.0079, 0.05, 0.7])
def test_grey_value_probabilities(sigma):
    """They sum to one, and are the integrals of the normal density, at the ends with the tails; and their mean."""
    means = torch.tensor([-1.3, -1.0, -0.99, 0.0, 0.00391, 0.5, 1.0, 1.2])
    p = torch.exp(-common.discretized_normal_nll(greys().expand(8, 256), means[:, None].expand(8, 256), sigma)).double()
    edges = torch.linspace(-1 + 1 / 255, 1 - 1 / 255, 255, dtype=torch.float64)
    cdf = torch.special.ndtr((edges - means[:, None].double()) / sigma)
    exact = torch.diff(cdf, dim=1, prepend=torch.zeros(8, 1), append=torch.ones(8, 1))
    assert torch.allclose(p.sum(1), torch.ones(8, dtype=torch.float64), atol=1e-4)
    assert torch.allclose(p, exact, atol=2e-4)
    output = torch.stack([means, torch.full((8,), math.log(sigma))], dim=1).view(8, 2, 1, 1)
    mean = bfn.Discretized().mean(output).flatten().double()
    assert torch.allclose(mean, (exact * greys()).sum(1), atol=0.03 / 127.5)
    drawn = bfn.Discretized().draw(output.expand(8, 2, 100, 100)).flatten(1).double()
    assert ((drawn.mean(1) - (exact * greys()).sum(1)).abs() < 5 * drawn.std(1) / 100 + 1e-3).all()


def test_grey_values_have_finite_costs_and_gradients_everywhere():
    mean = torch.tensor([-30.0, -1.0, 0.0, 0.3, 1.0, 30.0]).repeat(4)
    log_sigma = torch.tensor([-12.0, -7.0, -2.0, 2.0]).repeat_interleave(6)
    output = torch.stack([mean, log_sigma], dim=1).view(24, 2, 1, 1).requires_grad_()
    nll = bfn.Discretized().nll(output, torch.full((24, 1, 1, 1), 51 / 127.5 - 1))
    guess = bfn.Discretized().mean(output)
    guess.sum().backward()
    assert nll.isfinite().all() and guess.isfinite().all() and guess.abs().max() <= 1 + 1e-5
    assert output.grad.isfinite().all()
