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

import bfn
import common
import diffusion

HERE = Path(__file__).parent
M = 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def known_images(n):
    """n draws from a data set of M images, [n, 1, 8, 8], all the same but for two rows; and the M images."""
    images = (torch.randint(30, 220, (1, 1, 8, 8)) / 127.5 - 1).repeat(M, 1, 1, 1)
    images[:, 0, 3:5] += (torch.randint(0, 2, (M, 2, 8)) - 0.5) * (60 / 127.5)
    return images[torch.arange(n) % M], images


def best_guess(view, sigma, images):
    """The mean of the images given view = image + sigma noise; sigma: [B]."""
    distance = (view[:, None] - images[None]).square().flatten(2).sum(2)
    weights = (-distance / (2 * sigma[:, None] ** 2)).softmax(1)
    return torch.einsum("bm,mchw->bchw", weights, images)


def assert_even(drawn, images):
    """Each of drawn is one of images, and each image comes equally often, within four standard errors."""
    distance, index = (drawn[:, None] - images[None]).abs().flatten(2).amax(2).min(1)
    assert distance.max() < 1 / 255
    counts = index.bincount(minlength=M)
    assert (counts - len(drawn) / M).abs().max() < 4 * (len(drawn) / M * (1 - 1 / M)) ** 0.5


# ------------------------------------------------------------------------------------------------------ diffusion

def betas():
    """beta_1..beta_T of the chain whose products of 1 - beta are alpha_bar, float64."""
    signal, _ = diffusion.signal_and_noise(torch.arange(diffusion.T + 1, dtype=torch.float64) / diffusion.T)
    return 1 - (signal[1:] / signal[:-1]) ** 2


def test_thousand_single_steps_give_the_closed_form_marginal():
    n, x_0 = 40000, 0.7
    x = torch.full((n,), x_0, dtype=torch.float64)
    for i, beta in enumerate(betas(), start=1):
        x = (1 - beta).clamp(min=0).sqrt() * x + beta.sqrt() * torch.randn(n, dtype=torch.float64)
        if i in (1, 100, 500, 900, 1000):
            t = torch.full((n,), i / diffusion.T)
            drawn = diffusion.diffuse(torch.full((n, 1, 1, 1), x_0), torch.randn(n, 1, 1, 1), t).flatten()
            deviation = drawn.std()
            assert abs(x.mean() - drawn.mean()) < 6 * deviation / n ** 0.5
            assert x.std() / deviation == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("i", [2, 30, 500, 999])
def test_reverse_step_is_the_posterior_found_on_a_grid(i, monkeypatch):
    """q(x_{t-1} | x_t, x_0) ~ q(x_{t-1} | x_0) q(x_t | x_{t-1}), multiplied out on a grid."""
    x_0, x_t, n = 0.3, -0.2, 100000
    signal, noise = diffusion.signal_and_noise(torch.tensor((i - 1) / diffusion.T, dtype=torch.float64))
    beta = betas()[i - 1]
    grid = torch.linspace(-6, 6, 2000001, dtype=torch.float64)
    log_p = -((grid - signal * x_0) / noise) ** 2 / 2 - (x_t - (1 - beta).sqrt() * grid) ** 2 / (2 * beta)
    p = log_p.softmax(0)
    mean = (p * grid).sum()
    deviation = (p * (grid - mean) ** 2).sum().sqrt()

    monkeypatch.setattr(diffusion, "predict_x_0", lambda net, x, t, previous: torch.full_like(x, x_0))
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *a, **k: linspace(*a, **k)[diffusion.T - i:])  # start at step i
    process = diffusion.reverse_process(None, None, torch.full((n, 1, 1, 1), x_t), diffusion.T, eta=1.0)
    next(process)
    x_s = next(process)[1].double()
    assert abs(x_s.mean() - mean) < 5 * deviation / n ** 0.5 + 1e-6
    assert x_s.std() / deviation == pytest.approx(1, abs=0.02)


def test_eta_1_over_all_steps_is_ancestral_sampling(monkeypatch):
    """Against DDPM's own algorithm 2, written with its beta, alpha_bar and beta-tilde, and with guesses as they are."""
    monkeypatch.setattr(diffusion, "predict_x_0", lambda net, x, t, previous: (0.5 * x).clamp(-1, 1))
    monkeypatch.setattr(common, "half_a_step_on", lambda guess, last: guess)
    x = start = torch.randn(2, 1, 3, 3)
    torch.manual_seed(1)
    *_, (_, drawn, _) = diffusion.reverse_process(None, None, start, diffusion.T, eta=1.0)
    torch.manual_seed(1)
    beta = betas()
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])
    for i in range(diffusion.T, 0, -1):
        b, a_t, a_s = beta[i - 1], alpha_bar[i], alpha_bar[i - 1]
        x_0 = (0.5 * x).clamp(-1, 1)
        mean = a_s.sqrt() * b / (1 - a_t) * x_0 + (1 - b).clamp(min=0).sqrt() * (1 - a_s) / (1 - a_t) * x
        x = (mean + (b * (1 - a_s) / (1 - a_t)).sqrt() * torch.randn(x.shape)).float()
    assert torch.allclose(x, drawn, atol=1e-4)


def test_step_cost_is_the_divergence_of_the_two_normals():
    """DDPM eq. 8, with the means and the variance of eq. 7, in float64."""
    steps = torch.tensor([2, 10, 300, 999])
    x_0, guess = torch.rand(4, 1, 28, 28) * 2 - 1, torch.rand(4, 1, 28, 28) * 2 - 1
    beta = betas()
    alpha_bar = (1 - beta).cumprod(0)
    b, a_t, a_s = beta[steps - 1], alpha_bar[steps - 1], alpha_bar[steps - 2]
    weight = a_s.sqrt() * b / (1 - a_t)
    expected = (weight ** 2 * (x_0 - guess).double().square().flatten(1).sum(1)) / (2 * b * (1 - a_s) / (1 - a_t))
    assert torch.allclose(diffusion.step_cost(x_0, guess, steps).double(), expected, rtol=1e-4)


def test_loss_is_that_of_v_but_for_clipped_guesses(monkeypatch):
    """With a guess of v that is off by 0.1: 0.01 where the guess of x_0 stays within [-1, 1], less where it can't."""
    eps = torch.randn(64, 1, 28, 28)

    def predict_v(x_0, x_t, t, previous):  # in place of the network, it is given the answer
        signal, noise = [a.view(-1, 1, 1, 1) for a in diffusion.signal_and_noise(t)]
        return signal * eps[:len(t)] - noise * x_0[:len(t)] + 0.1
    monkeypatch.setattr(common, "randn_like", lambda x: eps)
    monkeypatch.setattr(diffusion, "predict_v", predict_v)
    grey = torch.rand(64, 1, 28, 28) - 0.5
    assert diffusion.loss(grey, grey).item() == pytest.approx(0.01, rel=1e-3)
    black = torch.full_like(grey, -1)
    assert diffusion.loss(black, black).item() < 1e-6


def test_clip_keeps_the_gradient():
    x = torch.tensor([-3.0, -0.5, 1.7], requires_grad=True)
    clipped = common.clip(x)
    (clipped * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.allclose(clipped, torch.tensor([-1.0, -0.5, 1.0])) and x.grad.tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["diffusion", "bfn"])
def test_second_look_sees_the_first_for_some_images(name, monkeypatch):
    """With a network that passes on what it is given: a half of x_t, plus the previous guess and a weight."""
    weight = torch.ones((), requires_grad=True)
    data = bfn.Continuous()
    data.output = lambda net, x, t, previous: 0.5 * x + previous + weight
    monkeypatch.setattr(diffusion, "predict_x_0", data.output)
    x, t = torch.rand(4, 1, 2, 2) * 0.2 - 1, torch.full((4,), 0.5)  # a half of it plus 1 is in [-1, 1], twice it is not
    first = 0.5 * x + 1
    guess = diffusion.look_twice(None, x, t, 3) if name == "diffusion" else bfn.look_twice(None, data, x, t, 3)
    assert torch.allclose(guess[:3], 2 * first[:3]) and torch.allclose(guess[3:], first[3:])
    guess.sum().backward()
    assert weight.grad == x.numel()  # each pixel once: none by way of the first guess


def test_sampler_is_led_away_from_the_guide(monkeypatch):
    """With networks that guess a constant: w times the one less w - 1 times the other, clipped."""
    x = torch.zeros(2, 1, 3, 3)
    monkeypatch.setattr(diffusion, "predict_x_0", lambda net, x, t, previous: torch.full_like(x, net))
    assert torch.allclose(diffusion.guided_guess(0.4, 0.2, x, 0.7), torch.tensor(0.7))  # w = 2.5
    assert torch.allclose(diffusion.guided_guess(0.4, -0.9, x, 0.7), torch.tensor(1.0))
    for t in (1.0, 0.85, 0.49, 0.001):
        assert torch.allclose(diffusion.guided_guess(0.4, 0.2, x, t), torch.tensor(0.4))
    wide = torch.full_like(x, 0.01)  # more than a grey value, so that the mean of the grey values is that of the normal
    for kind, led in (("continuous", 0.7), ("discretized", 0.6)):  # w = 2.5, 2
        data = bfn.TYPES[kind]()
        data.output = lambda net, x, t, previous: torch.full_like(x, net)
        if kind == "discretized":
            data.output = lambda net, x, t, previous: (torch.full_like(x, net), wide)
        t = torch.full((2,), math.log(1 - 0.2) / (2 * math.log(0.001)))  # gamma = 0.2: noise twice the image
        assert torch.allclose(bfn.guided_guess(0.4, 0.2, data, x, t), torch.tensor(led))
        assert torch.allclose(bfn.guided_guess(-1.1, -4.0, data, x, t), torch.tensor(-1.0))  # both say black
        for gamma in (0.001, 0.05, 0.51, 0.999):
            t = torch.full((2,), math.log(1 - gamma) / (2 * math.log(0.001)))
            assert torch.allclose(bfn.guided_guess(0.4, 0.2, data, x, t), torch.tensor(0.4))
    data = bfn.Discrete()
    data.output = lambda net, z, t, previous: torch.tensor([net, 0.0]).view(1, 2, 1, 1).expand_as(z)
    for t, logit in ((0.05, 3.0), (0.5, 4.0), (0.9, 3.0)):  # w = 1, 2, 1
        guess = bfn.guided_guess(3.0, 2.0, data, torch.zeros(2, 2, 3, 3), torch.full((2,), t))
        assert torch.allclose(guess[:, 0], torch.tensor(logit).sigmoid())


def ideal_diffusion(monkeypatch, images):
    def predict(net, x_t, t, previous):
        signal, noise = diffusion.signal_and_noise(t)
        signal = signal.clamp(min=1e-4)
        return best_guess(x_t / signal.view(-1, 1, 1, 1), noise / signal, images)
    monkeypatch.setattr(diffusion, "predict_x_0", predict)


def test_diffusion_bound_is_tight_for_known_images(monkeypatch):
    x, images = known_images(16000)
    ideal_diffusion(monkeypatch, images)
    terms = diffusion.bound(None, x) * 784 * math.log(2)
    total, error = terms.sum(1).mean(), common.standard_error(terms.sum(1))
    _, noise_1 = diffusion.signal_and_noise(torch.tensor(1 / diffusion.T))
    in_bin = math.erf(1 / 255 / noise_1 / 2 ** 0.5)  # of the decoder's normal, all pixels being within (-1, 1)
    assert terms[:, 2].mean() == pytest.approx(-64 * math.log(in_bin), rel=1e-3)
    assert error < 0.06
    assert total == pytest.approx(math.log(M) - 64 * math.log(in_bin), abs=4 * error)


@pytest.mark.parametrize("steps, eta", [(1000, 1.0), (50, 0.0), (20, 0.5)])
def test_diffusion_draws_known_images_equally_often(steps, eta, monkeypatch):
    _, images = known_images(M)
    ideal_diffusion(monkeypatch, images)
    *_, (_, drawn, _) = diffusion.reverse_process(None, None, torch.randn(100, 1, 8, 8), steps, eta)
    assert_even(drawn, images)


def draw_normal_pixel(method, noise, deterministic, monkeypatch):
    """What a sampler makes of noise in 20 steps, where the data is one pixel x ~ N(0, 1/4) and each guess its mean."""
    def predict_x_0(net, x_t, t, previous):
        signal, noise = diffusion.signal_and_noise(common.column(t))
        return x_t * signal * 0.25 / (0.25 * signal ** 2 + noise ** 2)

    class Pixel(bfn.Continuous):
        def output(self, net, mu, t, previous):
            gamma, rest = self.shares(t)
            return mu * 0.25 / (0.25 * gamma + rest)

        def guess(self, output):  # not clipped
            return output

    monkeypatch.setattr(common, "guidance_weight", lambda noise: 1.0)
    if method == "diffusion":
        monkeypatch.setattr(diffusion, "predict_x_0", predict_x_0)
        *_, (_, _, x) = diffusion.reverse_process(None, None, noise, 20, 0.0 if deterministic else 1.0)
    else:
        times = Pixel().times(torch.linspace(0, 1, 21, dtype=torch.float64))
        *_, (_, _, x) = bfn.bayesian_flow(None, None, Pixel(), noise, times, deterministic)
    return x


@pytest.mark.parametrize("method", ["diffusion", "bfn"])
def test_half_a_step_on_makes_few_steps_enough(method, monkeypatch):
    """The ODE takes 0.9 to 0.45; with fresh noise on the way, noise of deviation 1 becomes data of deviation 0.5."""
    def errors():
        x = draw_normal_pixel(method, torch.full((1, 1, 1, 1), 0.9), True, monkeypatch)
        data = draw_normal_pixel(method, torch.randn(40000, 1, 1, 1), False, monkeypatch)
        return abs(x.item() - 0.45), abs(data.std().item() - 0.5)

    of_path, of_deviation = errors()
    assert of_path < 0.005 and of_deviation < 0.02
    monkeypatch.setattr(common, "half_a_step_on", lambda guess, last: guess)
    of_path, of_deviation = errors()
    assert of_path > 0.02 and of_deviation > 0.05


# ------------------------------------------------------------------------------------------------------------ BFN

class IdealContinuous(bfn.Continuous):
    def output(self, images, mu, t, previous):
        gamma, rest = self.shares(t)
        return best_guess(mu / gamma, (rest / gamma).sqrt().flatten(), images)


class IdealDiscretized(bfn.Discretized):
    def output(self, images, mu, t, previous):
        mean = IdealContinuous.output(self, images, mu, t, previous)
        return mean, torch.where(common.column(t) == 1, 1e-4, 1 / 127.5) * torch.ones_like(mean)


class IdealDiscrete(bfn.Discrete):
    def output(self, images, z, t, previous):
        weights = torch.einsum("bchw,mchw->bm", z, images).softmax(1)
        return torch.einsum("bm,mchw->bchw", weights, images).clamp(min=1e-12).log()


def ideal(kind, n):
    """An ideal output distribution for a data set of M known images: (data, n draws of x, the M images as x)."""
    if kind == "discrete":
        images = bfn.F.one_hot(torch.randint(0, 2, (M, 8, 8)), 2).movedim(-1, 1).float()
        images[:, :, 2:] = images[:1, :, 2:]
        return IdealDiscrete(), images[torch.arange(n) % M], images
    return {"continuous": IdealContinuous, "discretized": IdealDiscretized}[kind](), *known_images(n)


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_small_updates_compose_to_the_flow(kind):
    data = bfn.TYPES[kind]()
    n = 40000
    x = torch.tensor([0.0, 1.0] if kind == "discrete" else [0.6]).view(1, -1, 1, 1).expand(n, -1, 1, 1)
    times = torch.linspace(0.1, 0.4, 30).tolist()
    theta = data.flow(x, torch.randn(x.shape), torch.full((n,), 0.1))
    for t, s in zip(times[:-1], times[1:]):
        theta = data.update(theta, x, torch.randn(x.shape), torch.full((n,), t), torch.full((n,), s))
    flow = data.flow(x, torch.randn(x.shape), torch.full((n,), 0.4))
    assert ((theta.mean(0) - flow.mean(0)).abs() < 6 * flow.std(0) / n ** 0.5).all()
    assert torch.allclose(theta.std(0) / flow.std(0), torch.ones(()), atol=0.02)
    t = torch.full((1,), 0.4)
    if kind == "discrete":
        mean, variance = data.beta(t) * torch.tensor([-1.0, 1.0]), 2 * data.beta(t)
    else:
        gamma = 1 - data.sigma_1 ** (2 * t)
        mean, variance = gamma * 0.6, gamma * (1 - gamma)
    assert torch.allclose(flow.mean(0).flatten(), mean, atol=0.05)
    assert torch.allclose(flow.var(0).flatten(), variance, rtol=0.03)


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_implied_eps_undoes_flow(kind):
    data = bfn.TYPES[kind]()
    x, eps, t = torch.rand(5, data.channels, 4, 4), torch.randn(5, data.channels, 4, 4), torch.rand(5) * 0.3 + 0.1
    assert torch.allclose(data.implied_eps(data.flow(x, eps, t), x, t), eps, atol=1e-3)


def single_pixel(kind, count):
    """A pixel with one of two values, and an output distribution that can be written down, for discrete data one that
    trusts theta too little (the right one would make L^n the same for all n): (data, count draws of x)."""
    if kind == "continuous":
        class Pixel(bfn.Continuous):
            sigma_1 = 0.1

            def output(self, net, mu, t, previous):
                return torch.sigmoid(mu / self.shares(t)[1]) - 0.5
        values = torch.tensor([[-0.5], [0.5]])
    else:
        class Pixel(bfn.Discrete):
            beta_1 = 4.0

            def output(self, net, z, t, previous):
                return 0.3 * z
        values = torch.eye(2)
    return Pixel(), values[torch.arange(count) % 2].view(count, -1, 1, 1)


def n_step_loss(kind, n, count):
    """L^n = n E_i KL(sender || receiver) in nats, the divergence in closed form (two normals) or integrated over y."""
    data, x = single_pixel(kind, count)
    i = (common.stratified(count) * n).long()
    t, s = (i / n).clamp(min=bfn.T_0), (i + 1) / n
    theta = data.flow(x, torch.randn(x.shape), t)
    guess = data.guess(data.output(None, theta, t, None))
    alpha = (data.beta(s) - data.beta(t))[:, None]
    if kind == "continuous":
        return n * (alpha / 2 * (x - guess).flatten(1) ** 2).mean().item()
    # y_1 - y_0 ~ N(+-2 alpha, 4 alpha) says all that y says; z are its quantiles in units of its deviation
    z = torch.linspace(-8, 8, 201)
    density = torch.exp(-z ** 2 / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    p_true = (x * guess).sum(1).flatten(1)
    ratio = p_true + (1 - p_true) * torch.exp(-2 * alpha - 2 * alpha.sqrt() * z)  # receiver / sender density at y
    return n * -(density * ratio.log()).sum(1).mean().item()


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_n_step_loss_converges_to_the_continuous_time_loss(kind):
    count = 100000
    data, x = single_pixel(kind, count)
    limit = bfn.loss_per_image(None, data, x, common.stratified(count), 0).mean().item()
    gaps = [n_step_loss(kind, n, count) - limit for n in (1, 4, 128)]
    assert abs(gaps[0]) > 3 * abs(gaps[1]) > 9 * abs(gaps[2])
    assert abs(gaps[2]) < 0.02 * limit


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_bfn_bound_is_tight_for_known_images(kind):
    data, x, images = ideal(kind, 16000)
    data.encode = lambda images: images
    terms = bfn.bound(images, data, x) * data.nats_per_unit
    total, error = terms.sum(1).mean(), common.standard_error(terms.sum(1))
    grain = -64 * math.log(math.erf(1 / 255 / data.sigma_1 / 2 ** 0.5)) if kind == "continuous" else 0
    assert error < 0.06
    assert total == pytest.approx(math.log(M) + grain, abs=4 * error)


@pytest.mark.parametrize("kind", bfn.TYPES)
@pytest.mark.parametrize("deterministic, steps", [(False, 100), (True, 30)])
def test_bfn_draws_known_images_equally_often(kind, deterministic, steps):
    data, _, images = ideal(kind, M)
    times = data.times(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    eps = torch.randn(100, data.channels, 8, 8)
    *_, (_, _, guess) = bfn.bayesian_flow(images, images, data, eps, times, deterministic)
    assert_even(data.draw(guess), images)


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_sampling_times(kind):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    even, ours = bfn.TYPES[kind]().times(u, "paper"), bfn.TYPES[kind]().times(u)
    assert torch.equal(even[1:], u[1:]) and even[0] == ours[0] == bfn.T_0 and ours[-1] == 1
    assert (ours[1:] > ours[:-1]).all() and (ours[1:-1] < u[1:-1]).all()  # more of the steps early


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_nothing_breaks_at_the_ends_of_time(kind):
    data = bfn.TYPES[kind]()
    net = common.UNet(data.in_channels, data.out_channels)
    torch.nn.init.normal_(net.head.weight)
    x = data.encode(torch.rand(4, 1, 28, 28) * 2 - 1)
    t = torch.tensor([0.0, 1e-4, 0.999, 1.0])
    losses = bfn.loss_per_image(net, data, x, t, 2)
    theta = data.flow(x, torch.randn(x.shape), torch.ones(4))
    cost = data.cost(x, data.output(net, theta, torch.ones(4), torch.zeros_like(x)))
    (losses.sum() + cost.sum()).backward()
    assert losses.isfinite().all() and cost.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_discrete_data_trains_by_cross_entropy():
    """Guesses of probability q for pixels that are white with p = 0.3: both errors are smallest on average at q = p,
    and the loss at one time is alpha K / 2 times the cross-entropy."""
    data, q = bfn.Discrete(), torch.arange(1, 100) / 100
    output = torch.stack([1 - q, q]).log().T[:, :, None, None]
    black, white = data.encode(torch.full((99, 1, 1, 1), -1.0)), data.encode(torch.ones(99, 1, 1, 1))
    for error in (data.training_error, lambda x, output: bfn.squared_error(data, x, output)):
        assert q[(0.7 * error(black, output) + 0.3 * error(white, output)).argmin()] == pytest.approx(0.3)

    data.training_times = lambda u: torch.full_like(u, 0.5)
    data.output = lambda net, z, t, previous: output[29].expand(z.shape)
    expected = data.alpha(0.5) * -math.log(0.3)  # K is 2
    assert bfn.loss(None, data, torch.ones(8, 1, 28, 28)).item() == pytest.approx(expected, rel=1e-5)


def greys():
    return torch.arange(256) / 127.5 - 1


def normal_cdf(z):
    return torch.special.ndtr(z.double())


@pytest.mark.parametrize("sigma", [1e-4, 2e-3, 0.0079, 0.05, 0.7])
def test_grey_value_probabilities(sigma):
    """They sum to one, and are the integrals of the normal density, at the ends with the tails."""
    means = torch.tensor([-1.3, -1.0, -0.99, 0.0, 0.00391, 0.5, 1.0, 1.2])
    x = greys().expand(8, 256)
    p = torch.exp(-common.discretised_normal_nats(x, means[:, None].expand(8, 256), sigma)).double()
    assert torch.allclose(p.sum(1), torch.ones(8, dtype=torch.float64), atol=2e-3 if sigma < 1e-3 else 1e-4)
    edges = torch.linspace(-1 + 1 / 255, 1 - 1 / 255, 255, dtype=torch.float64)
    cdf = normal_cdf((edges - means[:, None].double()) / sigma)
    exact = torch.diff(cdf, dim=1, prepend=torch.zeros(8, 1), append=torch.ones(8, 1))
    assert torch.allclose(p, exact, atol=2e-3 if sigma < 1e-3 else 1e-4)
    expected = common.expected_grey(means, torch.full((8,), sigma)).double()
    assert torch.allclose(expected, (exact * greys()).sum(1), atol=1e-5)


def test_grey_values_have_finite_costs_and_gradients_everywhere():
    mean = torch.tensor([-30.0, -1.0, 0.0, 0.3, 1.0, 30.0]).repeat(4).requires_grad_()
    sigma = torch.tensor([1e-6, 1e-3, 0.1, 20.0]).repeat_interleave(6).requires_grad_()
    x = torch.full((24,), 51 / 127.5 - 1)
    nats = common.discretised_normal_nats(x, mean, sigma)
    guess = common.expected_grey(mean, sigma)
    (nats.clamp(max=1e6).sum() + guess.sum()).backward()
    assert nats.isfinite().all() and guess.isfinite().all() and guess.abs().max() <= 1 + 1e-5
    assert mean.grad.isfinite().all() and sigma.grad.isfinite().all()


# --------------------------------------------------------------------------------------------- network and plumbing

def test_shuffle_unit_starts_as_the_channel_shuffle():
    """Of two groups: channel 2 i + j comes from channel j C / 2 + i (ShuffleNet §3.1)."""
    x, C = torch.randn(2, 32, 3, 3), 32
    shuffled = common.ShuffleUnit(C, 4)(x, torch.randn(2, 4))
    for i in range(C // 2):
        for j in range(2):
            assert torch.equal(shuffled[:, 2 * i + j], x[:, j * C // 2 + i])


def test_each_sample_is_alone_in_its_batch():
    net = common.UNet(3, 2)
    torch.nn.init.normal_(net.head.weight)
    x, t = torch.randn(4, 3, 28, 28), torch.rand(4)
    together = net(x, t)
    assert together.abs().mean() > 0.1
    for i in range(4):
        assert torch.allclose(net(x[i:i + 1], t[i:i + 1])[0], together[i], atol=1e-4)


def test_orthogonal_keeps_the_singular_vectors_and_evens_out_the_values():
    U, V = [torch.linalg.qr(torch.randn(2, n, 8))[0] for n in (8, 40)]
    S = torch.linspace(0.1, 1, 8)
    found = U.mT @ common.orthogonal(U * S @ V.mT) @ V
    values = found.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.65 and values.max() < 1.25
    assert (found - torch.diag_embed(values)).abs().max() < 1e-5


def test_muon_takes_the_steps_of_torchs_own():
    ours = [torch.randn(8, 2, 3, 3).requires_grad_() for _ in range(2)] + [torch.randn(8, 4, 3, 3).requires_grad_()]
    theirs = [w.detach().flatten(1).clone().requires_grad_() for w in ours]
    optimisers = [common.Muon(ours, lr=0.1),
                  torch.optim.Muon(theirs, lr=0.1, weight_decay=0, adjust_lr_fn="match_rms_adamw")]
    start = [w.detach().clone() for w in theirs]
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.flatten(1)
        for optimiser in optimisers:
            optimiser.step()
    for a, b, before in zip(ours, theirs, start):
        ours_moved, theirs_moved = a.detach().flatten(1) - before, b.detach() - before
        assert (ours_moved - theirs_moved).norm() < 0.02 * theirs_moved.norm()  # they compute in bfloat16


def test_stratified_has_one_in_each_part():
    parts = torch.stack([(common.stratified(8) * 8).long() for _ in range(500)])
    assert (parts.sort(1).values == torch.arange(8)).all()
    assert (parts.float().mean(0) - 3.5).abs().max() < 5 * 2.3 / 500 ** 0.5  # in random order


def test_ema_is_the_weighted_mean():
    net = torch.nn.Linear(1, 1, bias=False)
    ema = common.EMA(net, power=3.0)
    values = torch.randn(20)
    for value in values:
        net.weight.data.fill_(value)
        ema.update()
    ends = (torch.arange(21, dtype=torch.float64) / 20) ** 4  # the integral of the power function over each step
    product = torch.ones(20, dtype=torch.float64)
    for n in range(2, 21):
        product[:n - 1] *= (1 - 1 / n) ** 4
        product[n - 1] = 1 - (1 - 1 / n) ** 4
    assert torch.allclose(product, torch.diff(ends))
    with ema.averaged():
        assert net.weight.item() == pytest.approx((product * values).sum().item(), abs=1e-5)
    assert net.weight.item() == values[-1]


def test_frechet_distance_of_known_normals():
    """Independent coordinates with deviations s and 1: |m|^2 + sum (s - 1)^2."""
    a = torch.randn(200000, 3, dtype=torch.float64)
    m, s = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([1.0, 2.0, 0.5])
    b = torch.randn(200000, 3, dtype=torch.float64) * s + m
    assert common.frechet_distance(a, b) == pytest.approx((m ** 2 + (s - 1) ** 2).sum().item(), rel=0.02)
    assert common.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_grows_with_corruption(tmp_path):
    data = common.load_data("drawn", None, 0, 6000)
    net = common.trained_classifier(data, [tmp_path / "not" / "there", tmp_path])
    real = common.features(net, data.test[:2000])
    noise = torch.randn(2000, 1, 28, 28)
    distances = [common.frechet_distance(common.features(net, common.to_uint8(common.to_float(data.train[:2000])
                                                                              + s * noise)), real)
                 for s in (0, 0.1, 0.2, 0.4, 0.8)]
    assert all(low < high for low, high in zip(distances[:-1], distances[1:]))
    again = common.trained_classifier(data, [tmp_path / "not" / "there", tmp_path])
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters()))


def test_drawn_digits():
    images, labels = common.drawn_digits(4000, 3)
    assert images.shape == (4000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [400] * 10
    assert images.flatten(1).amax(1).min() > 150  # none is empty
    fewer, _ = common.drawn_digits(100, 3)
    assert torch.equal(fewer, images[:100])
    assert not torch.equal(fewer, common.drawn_digits(100, 4)[0])


# ------------------------------------------------------------------------------------------------ from end to end

SCRIPTS = {"diffusion": ["diffusion.py"], "bfn-continuous": ["bfn.py"],
           "bfn-discretized": ["bfn.py", "--data-type", "discretized"],
           "bfn-discrete": ["bfn.py", "--data-type", "discrete"]}
QUICK = ["--dataset", "drawn", "--limit", "64", "--batch-size", "16", "--steps", "4"]


def start(name, folder, *flags, cwd=None):
    script, *rest = SCRIPTS[name]
    return subprocess.Popen([sys.executable, str(HERE / script), *rest, *QUICK, "--out-dir", str(folder), *flags],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def run(name, folder, *flags, cwd=None):
    """Run a script to its end -> (stdout, stderr)."""
    process = start(name, folder, *flags, cwd=cwd)
    out, err = process.communicate(timeout=80)
    assert process.returncode == 0, out + err
    return out, err


def main(name, folder, *flags):
    """The same, within this process, which saves the time to start one."""
    script, *rest = SCRIPTS[name]
    sys.modules[Path(script).stem].main([*rest, *QUICK, "--out-dir", str(folder), *map(str, flags)])


def checkpoint(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for row in state["history"]:
        del row["seconds"], row["images_per_second"]
    return state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two epochs of diffusion and of continuous BFN in one go, from another folder, with all that they leave."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("diffusion", "bfn-continuous"):
        run(name, folder, "--epochs", "2", cwd=folder)
    return folder


def test_what_a_run_leaves(out):
    for name in ("diffusion", "bfn-continuous"):
        left = {path.relative_to(out / name).as_posix() for path in (out / name).rglob("*.*")}
        assert left == {".lock", "checkpoint.pt", "metrics.json", "epochs/epoch_001.png", "epochs/epoch_002.png",
                        "training.png", "samples.png", "steps.png", "curves.png", "process.gif"}
        metrics = json.loads((out / name / "metrics.json").read_text())
        assert metrics["dataset"] == "drawn digits" and len(metrics["history"]) == 2
        assert sum(metrics["final"]["parts"].values()) == pytest.approx(metrics["final"]["bound"], rel=1e-5)
    assert {path.name for path in (out / "comparison").iterdir()} == {"samples.png", "steps.png", "curves.png",
                                                                      "process.gif", "table.md"}


@pytest.mark.parametrize("name", ["diffusion", "bfn-continuous"])
def test_killed_and_continued_equals_undisturbed(name, out, tmp_path):
    process = start(name, tmp_path, "--epochs", "2")
    while not (tmp_path / name / "checkpoint.pt").exists():
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = checkpoint(tmp_path / name)["history"]
    text, _ = run(name, tmp_path, "--epochs", "2")
    assert f"{len(before)} epochs done" in text
    assert same(checkpoint(tmp_path / name), checkpoint(out / name))


def test_guide_is_the_average_after_the_first_epoch(out, tmp_path, monkeypatch):
    state = checkpoint(out / "diffusion")  # whose two epochs are less than GUIDE_STEPS long
    assert same(list(state["guide"].values()), state["ema"])
    monkeypatch.setattr(common, "GUIDE_STEPS", 0)
    main("diffusion", tmp_path, "--epochs", 1)
    first = checkpoint(tmp_path / "diffusion")["ema"]
    main("diffusion", tmp_path, "--epochs", 2)
    state = checkpoint(tmp_path / "diffusion")
    assert same(list(state["guide"].values()), first) and not same(state["ema"], first)


@pytest.mark.parametrize("name", ["bfn-discrete", "bfn-discretized"])
def test_other_data_types_train_and_sample(name, tmp_path, capsys):
    run(name, tmp_path, "--epochs", "1")
    main(name, tmp_path, "--sample", 12)
    images = torch.load(tmp_path / name / "samples.pt", weights_only=True)
    assert images.shape == (12, 1, 28, 28) and images.dtype == torch.uint8
    assert "12 images" in capsys.readouterr().out
    if name == "bfn-discrete":
        assert set(images.unique().tolist()) <= {0, 255}


def test_finished_run_only_redraws(out):
    before = (out / "diffusion" / "checkpoint.pt").read_bytes()
    (out / "diffusion" / "curves.png").unlink()
    main("diffusion", out, "--epochs", 2)
    assert (out / "diffusion" / "curves.png").exists()
    assert (out / "diffusion" / "checkpoint.pt").read_bytes() == before


def test_failures_from_outside(tmp_path):
    """One line on stderr, no traceback, the right exit code, and nothing on the disk."""
    cases = [(["--epochs", "0"], 2), (["--lr", "nan"], 2), (["--sample", "3"], 1)]
    for process, code in [(start("diffusion", tmp_path / "new", *flags), code) for flags, code in cases]:
        text, error = process.communicate(timeout=80)
        assert process.returncode == code and not text and "Traceback" not in error
        assert error.splitlines()[-1].count("error: ") == 1
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags", [["--epochs", "-1"], ["--epochs", "x"], ["--steps", "0"], ["--batch-size", "0"],
                                   ["--limit", "0"], ["--lr", "0"], ["--lr", "inf"], ["--seed", "-1"],
                                   ["--batch-size", "65"], ["--sample", "1", "--fresh"]])
def test_bad_arguments(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main("bfn-continuous", tmp_path / "new", *flags)
    assert stop.value.code == 2 and not (tmp_path / "new").exists()


def test_impossible_settings(tmp_path):
    (tmp_path / "file").write_text("")
    cases = [(["--device", "cuda"], "no CUDA"),
             (["--dataset", "mnist", "--data-dir", tmp_path / "file"], "could not be read or downloaded")]
    for flags, message in cases:
        if not (torch.cuda.is_available() and "cuda" in flags):
            with pytest.raises(common.Fail, match=message):
                main("diffusion", tmp_path / "new", *flags)
            assert not (tmp_path / "new").exists()
    with pytest.raises(OSError):
        main("diffusion", tmp_path / "file")


def test_broken_data_is_refused(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 60000), ("t10k", 10000)):
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(count))
        images = bytes([0, 0, 8, 3]) + count.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2 + bytes(count * 784)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(images)
    assert common.load_data("auto", tmp_path, 0).name == "MNIST"
    for broken in (images[:5000000], images[:-1], b"", images[:4] + (9).to_bytes(4, "big") + images[8:16 + 9 * 784]):
        (raw / "t10k-images-idx3-ubyte").write_bytes(broken)
        with pytest.raises(common.Fail, match="MNIST"):
            common.load_data("auto", tmp_path, 0)


def test_settings_of_a_run_are_kept(out):
    for flags, message in [(["--lr", 0.1], "lr 0.006 there, 0.1 here"), (["--seed", 5], "seed 0 there, 5 here"),
                           (["--batch-size", 32], "batch_size"), (["--limit", 63], "limit")]:
        with pytest.raises(common.Fail, match=message):
            main("diffusion", out, "--epochs", 2, *flags)


def test_unusable_checkpoints_are_named_and_kept(out, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)
    good = (out / "diffusion" / "checkpoint.pt").read_bytes()
    path = tmp_path / "diffusion" / "checkpoint.pt"
    path.parent.mkdir()
    torch.save({"settings": Evil()}, path)
    state = torch.load(out / "diffusion" / "checkpoint.pt", weights_only=True)
    state["net"]["head.bias"] = torch.zeros(7)
    other = tmp_path / "other.pt"
    torch.save(state, other)
    for content in (path.read_bytes(), good[:len(good) // 2], bytes(len(good)), os.urandom(1000), b"",
                    other.read_bytes(), (out / "bfn-continuous" / "checkpoint.pt").read_bytes()):
        path.write_bytes(content)
        for flags in (["--epochs", 2], ["--sample", 1]):
            with pytest.raises(common.Fail, match="checkpoint.pt is "):
                main("diffusion", tmp_path, *flags)
        assert path.read_bytes() == content and not (tmp_path / "evil").exists()


def test_a_run_has_one_process_at_a_time(out):
    with open(out / "diffusion" / ".lock", "w") as lock:
        common.fcntl.flock(lock, common.fcntl.LOCK_EX | common.fcntl.LOCK_NB)
        with pytest.raises(common.Fail, match="another process"):
            main("diffusion", out, "--epochs", 2)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    common.write(path, lambda temporary: temporary.write_text("old"))

    def full(temporary):
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")
    with pytest.raises(common.Fail, match="No space left"):
        common.write(path, full)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_no_number_stops_the_run(out, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "loss", lambda net, x: next(net.parameters()).sum() * math.nan)
    with pytest.raises(common.Fail, match="the loss is nan at step 1 of epoch 1 with --lr 0.006"):
        main("diffusion", tmp_path, "--epochs", 1)
    assert not (tmp_path / "diffusion" / "checkpoint.pt").exists()


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import diffusion, bfn"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout + done.stderr and not list(tmp_path.iterdir())
