"""Facts that the code must get right, checked against closed forms, brute force or a second derivation, and the
scripts from end to end on drawn digits. Needs no network and no files: `python -m pytest -q`."""
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bfn
import common
import diffusion


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def alpha_bar(t):
    """cos^2(pi/2 t / (T + 1)) in float64, [t] or 0-d."""
    return torch.cos(math.pi / 2 * torch.as_tensor(t).double() / (diffusion.T + 1)) ** 2


def betas():
    """beta_1..beta_T of the chain whose products of 1 - beta are alpha_bar, float64."""
    a = alpha_bar(torch.arange(diffusion.T + 1))
    return 1 - a[1:] / a[:-1]


def test_ancestral_sampling_over_all_steps_is_algorithm_2():
    """In float64, of a network that predicts 0.9 x_t, with the predicted image clipped."""
    *_, (drawn, _) = diffusion.sample(lambda z, sigma, label: 0.9 * z, torch.zeros(2), diffusion.T, "ancestral")
    torch.manual_seed(0)
    x = torch.randn(2, 1, 28, 28).double()
    beta, a = betas(), alpha_bar(torch.arange(diffusion.T + 1))
    for t in range(diffusion.T, 0, -1):
        b, a_t, a_s, z = beta[t - 1], a[t], a[t - 1], torch.randn(x.shape)
        x_0 = ((x - (1 - a_t).sqrt() * 0.9 * x) / a_t.sqrt()).clamp(-1, 1)
        eps = (x - a_t.sqrt() * x_0) / (1 - a_t).sqrt()
        x = (x - b / (1 - a_t).sqrt() * eps) / (1 - b).sqrt() + (b * (1 - a_s) / (1 - a_t)).sqrt() * z
    assert torch.allclose(x.float(), drawn, atol=1e-3) and 0.1 < drawn.std() < 2


@pytest.mark.parametrize("t", [2, 30, 500, 999, 1000])
def test_kl_step_is_the_divergence_of_two_posteriors_found_on_a_grid(t):
    """q(x_{t-1} | x_t, x_0) ~ q(x_{t-1} | x_0) q(x_t | x_{t-1}), multiplied out for an x_0 and an x_0_hat."""
    x_t, grid = -0.2, torch.linspace(-6, 6, 2000001, dtype=torch.float64)
    a, beta = alpha_bar(t - 1), betas()[t - 1]
    log_p, log_q = [-(grid - a.sqrt() * x_0) ** 2 / (2 * (1 - a)) - (x_t - (1 - beta).sqrt() * grid) ** 2 / (2 * beta)
                    for x_0 in (0.3, 0.25)]
    log_p, log_q = log_p.log_softmax(0), log_q.log_softmax(0)
    divergence = (log_p.exp() * (log_p - log_q)).sum()
    x_0, x_0_hat = torch.full((1, 1, 1, 1), 0.3), torch.full((1, 1, 1, 1), 0.25)
    assert diffusion.kl_step(x_0, x_0_hat, torch.tensor([t])).item() == pytest.approx(divergence.item(), rel=1e-3)


def test_diffusion_loss_is_the_error_of_eps(monkeypatch):
    """A network that knows x_0, and predicts eps = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar), a little off."""
    x_0 = torch.rand(64, 1, 28, 28) * 2 - 1

    def net(z, sigma, label):
        a = 1 / (1 + sigma ** 2)
        assert z.shape == (64, 1, 28, 28) and sigma.shape == (64, 1, 1, 1)
        return (z - a.sqrt() * x_0) / (1 - a).sqrt() + 0.1 * a.sqrt()
    monkeypatch.setattr(torch, "randint", lambda *a, device: torch.randperm(900)[:64] + 101)  # there 1 - a is not tiny
    assert diffusion.loss(net, x_0, None).item() == pytest.approx(0.01, rel=1e-3)


def test_guidance_goes_on_from_the_output_without_label_to_the_one_with_it():
    def net(z, sigma, label):
        return z + sigma * torch.where(label == 3, -0.4, -0.1).view(-1, 1, 1, 1)
    z, sigma, label = torch.randn(2, 1, 28, 28), torch.tensor(2.0), torch.tensor([3, common.NULL_LABEL])
    added = common.guided(net, 2.5)(z, sigma, label) - z
    assert torch.allclose(added, sigma * torch.tensor([-0.1 - 2.5 * 0.3, -0.1]).view(2, 1, 1, 1), atol=1e-5)
    assert common.guided(net, 1) is net


@pytest.mark.parametrize("kind", ["diffusion", *bfn.TYPES])
def test_the_network_is_called_alike(kind):
    """With sigma, the noise in what q_sample and flow give, and z (DDPM eq. 4; BFN eq. 77 and 185)."""
    calls, data = [], bfn.TYPES.get(kind, bfn.Continuous)()
    x, t = data.encode(torch.full((3, 1, 28, 28), 0.5)), torch.tensor([bfn.T_MIN, 0.1, 1.0])
    eps = torch.randn(x.shape)

    def net(z, sigma, label):
        calls.append((z, sigma))
        return torch.zeros(len(z), data.out_channels, 28, 28)
    if kind == "diffusion":
        t = torch.tensor([1, 500, 1000])
        diffusion.predict(net, diffusion.q_sample(x, t, eps), t, None)
        sigma = (1 / alpha_bar(t) - 1).sqrt()
    else:
        theta = bfn.flow(data, x, t, eps)
        data.output(net, theta, t, None)
        sigma = (data.c / (9 * t ** 2 if kind == "discrete" else 0.001 ** (-2 * t.double()) - 1)).sqrt()
    [(z, seen)] = calls
    sigma = sigma.float().view(-1, 1, 1, 1)
    assert torch.allclose(seen, sigma, rtol=1e-3)
    if kind == "discrete":
        assert torch.allclose(theta / (2 / sigma ** 2), 2 * x - 1 + sigma * eps, rtol=1e-3)
    else:
        assert torch.allclose(z, (x + sigma * eps) / (1 + sigma ** 2).sqrt(), atol=1e-4)


@pytest.mark.parametrize("alpha", [0.3, 40.0])
def test_adding_a_message_is_bayes_rule(alpha):
    """BFN eq. 49 and 50, y / alpha ~ N(x, 1 / alpha); p(k) ~ theta_k N(y; alpha (K e_k - 1), alpha K I) (eq. 157)."""
    t, theta, x, alpha = torch.tensor([0.2]), torch.randn(1, 1, 3, 3), torch.rand(1, 1, 3, 3), torch.tensor(alpha)
    data = bfn.Continuous()
    y = bfn.sender(data, x, alpha, torch.randn(x.shape))
    rho = 1 + data.beta(t)
    mu = (rho * data.belief(theta, t) + alpha * (y / alpha)) / (rho + alpha)
    s = (rho + alpha).log() / (-2 * math.log(data.sigma_1))  # where 1 + beta(s) = rho + alpha
    assert torch.allclose(data.belief(theta + y, s), mu, rtol=1e-4)
    for K in (2, 5):
        data, theta = bfn.Discrete(), torch.randn(1, K, 1, 1)
        data.K = data.c = K
        y = bfn.sender(data, F.one_hot(torch.tensor([[[1]]]), K).movedim(-1, 1).float(), alpha, torch.randn(1, K, 1, 1))
        means = alpha * (K * torch.eye(K) - 1)
        log_p = -(y.flatten() - means).square().sum(1) / (2 * alpha * K) + theta.flatten().log_softmax(0)
        assert torch.allclose((theta + y).softmax(1).flatten(), log_p.softmax(0), atol=1e-5)


@pytest.mark.parametrize("kind", bfn.TYPES)
def test_paper_sampler_is_the_papers_algorithm(kind, monkeypatch):
    """Algorithms 3, 6 and 9 in mu and rho, or in probabilities, with the same noise and draws."""
    data, n, draws = bfn.TYPES[kind](), 7, []
    monkeypatch.setattr(data, "draw", lambda output: draws.append(torch.rand(output.shape) * 2 - 1) or draws[-1])
    monkeypatch.setattr(data, "output", lambda net, theta, t, label: theta)
    monkeypatch.setattr(data, "mean", lambda output: output)
    noise = torch.randn(n + 1, 5, data.channels, 28, 28)
    monkeypatch.setattr(torch, "randn_like", lambda x, remaining=iter(noise[1:]): next(remaining))
    monkeypatch.setattr(torch, "randn", lambda *shape, device: noise[0])
    *_, (belief, image) = bfn.sample(data, None, torch.zeros(5, dtype=torch.int64), n, "paper")
    if kind == "discrete":
        K, theta = 2, torch.full((5, 2, 28, 28), 0.5)
        for i in range(1, n + 1):
            alpha = data.beta_1 * (2 * i - 1) / n ** 2  # eq. 193
            y = alpha * (K * draws[i - 1] - 1) + (alpha * K) ** 0.5 * noise[i]
            theta = torch.exp(y) * theta / (torch.exp(y) * theta).sum(1, keepdim=True)
        expected = data.decode(theta)
    else:
        expected, rho = torch.zeros(5, 1, 28, 28), 1.0
        for i in range(1, n + 1):
            alpha = data.sigma_1 ** (-2 * i / n) * (1 - data.sigma_1 ** (2 / n))  # eq. 95
            y = draws[i - 1] + noise[i] / alpha ** 0.5
            expected, rho = (rho * expected + alpha * y) / (rho + alpha), rho + alpha
    assert len(draws) == n + 1 and torch.equal(image, data.decode(draws[-1]))
    assert torch.allclose(belief, expected, atol=2e-3)


@pytest.mark.parametrize("kind", ["diffusion", *bfn.TYPES])
def test_nothing_breaks_at_the_ends_of_time(kind):
    data = bfn.TYPES.get(kind, bfn.Continuous)()
    net = common.UNet(data.channels, data.out_channels)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    images, label = torch.rand(4, 1, 28, 28) * 2 - 1, torch.tensor([0, 5, 9, common.NULL_LABEL])
    if kind == "diffusion":
        result = sum(diffusion.predict(net, images, torch.tensor([1, 2, 999, 1000]), label))
    else:
        result = bfn.loss_at(data, net, data.encode(images), torch.tensor([0.0, 1e-4, 0.999, 1.0]), label)
        assert bfn.bound(data, net, images, label).isfinite().all()
    result.sum().backward()
    assert result.isfinite().all() and all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("std", [1e-3, 2e-3, 0.0079, 0.05, 0.7])
def test_mean_and_draws_of_grey_values(std):
    """Against the integrals of the normal density over the bins, at the ends with the tails."""
    means, greys = torch.tensor([-1.3, -1.0, -0.99, 0.0, 0.00391, 0.5, 1.0, 1.2]), torch.arange(256) / 127.5 - 1
    edges = torch.linspace(-1 + 1 / 255, 1 - 1 / 255, 255, dtype=torch.float64)
    cdf = torch.special.ndtr((edges - means[:, None].double()) / std)
    p = torch.diff(cdf, dim=1, prepend=torch.zeros(8, 1), append=torch.ones(8, 1))
    nats = common.discretized_normal_nll(greys.expand(8, 256), means[:, None].expand(8, 256), std)
    assert torch.allclose(torch.exp(-nats).double(), p, atol=2e-4)
    mean, output = (p * greys).sum(1), torch.stack([means, torch.full((8,), math.log(std))], dim=1).view(8, 2, 1, 1)
    assert torch.allclose(bfn.Discretized().mean(output).flatten().double(), mean, atol=0.02 / 127.5)
    drawn = bfn.Discretized().draw(output.expand(8, 2, 100, 100)).flatten(1).double()
    assert ((drawn.mean(1) - mean).abs() < 5 * drawn.std(1) / 100 + 1e-3).all()


@pytest.mark.parametrize("std", [0.001, 0.00157, 0.01])
@pytest.mark.parametrize("mean", [-0.2, 0.2])
def test_improbable_grey_values_cost_what_they_should(std, mean):
    """Up to six from the mean, on either side; the bin's mass is integrated, its largest density factored out."""
    mean = round((mean + 1) * 127.5) / 127.5 - 1
    for off in range(-6, 7):
        far, near = (abs(off) + 0.5) / 127.5 / std, (abs(off) - 0.5) / 127.5 / std
        y = torch.linspace(near, far, 200001, dtype=torch.float64)
        peak = max(near, 0) ** 2 / 2
        mass = torch.trapezoid(torch.exp(peak - y ** 2 / 2), y) / (2 * math.pi) ** 0.5
        nats = common.discretized_normal_nll(torch.tensor(mean + off / 127.5), torch.tensor(mean), std)
        assert nats.item() == pytest.approx(peak - mass.log().item(), rel=2e-3, abs=1e-5)


def test_fourier_features_of_the_image_fade_with_its_noise():
    """The second fastest wave parts neighbours. Under noise, a feature's mean is the clean one times its damping."""
    waves = common.fourier_features((torch.arange(256) / 127.5 - 1).view(-1, 1, 1, 1), torch.zeros(1)).view(256, 16)
    assert torch.allclose(waves[:, 9], (-1.0) ** torch.arange(256), atol=1e-3)
    sigma = torch.tensor(0.05).view(1, 1, 1, 1)
    noisy = (0.3 + sigma * torch.randn(100000, 1, 1, 1)) / (1 + sigma ** 2).sqrt()
    clean = common.fourier_features(torch.full((1, 1, 1, 1), 0.3), 0 * sigma).flatten()
    damping = torch.exp(-(2 * math.pi * 127.5 / 2 ** torch.arange(8) * 0.05) ** 2 / 2).repeat(2)
    assert torch.allclose(common.fourier_features(noisy, sigma).mean(0).flatten(), clean * damping ** 2, atol=0.02)
    assert not common.fourier_features(noisy, torch.full((1, 1, 1, 1), 600.0)).any()


def known(kind, n, M=4):
    """A model whose predictions are the best possible for a data set of M images, which differ in two rows: its bound,
    its sampler, n draws of x, the M images as x, and the nats that the last term of the bound must cost."""
    images = (torch.randint(30, 220, (1, 1, 28, 28)) / 127.5 - 1).repeat(M, 1, 1, 1)
    images[:, 0, 3:5] += (torch.randint(0, 2, (M, 2, 28)) - 0.5) * (8 / 127.5)
    if kind == "discrete":
        images = F.one_hot((images[:, 0] > images[:, 0].mean(0)).long(), 2).movedim(-1, 1).float()
    elif kind == "discretized":
        images = ((images + 1) * 127.5).round() / 127.5 - 1

    def best(view, sigma):
        """The mean of the images given view = image + sigma noise; sigma: [B, 1, 1, 1]."""
        distance = (view[:, None, :, 3:5] - images[None, :, :, 3:5]).square().flatten(2).sum(2)
        return torch.einsum("bm,mchw->bchw", (-distance / (2 * sigma.flatten()[:, None] ** 2)).softmax(1), images)

    def eps_hat(z, sigma, label):
        scale = (1 + sigma ** 2).sqrt()
        return (z * scale - best(z * scale, sigma)) / sigma

    def output(net, theta, t, label):
        if kind == "discrete":
            weights = torch.einsum("bchw,mchw->bm", theta[:, :, 3:5], images[:, :, 3:5]).softmax(1)
            return torch.einsum("bm,mchw->bchw", weights, images).clamp(min=1e-12).log()
        beta = data.beta(t)
        x_hat = best(theta / beta, beta ** -0.5)
        return torch.cat([x_hat, torch.full_like(x_hat, math.log(1e-4))], dim=1) if kind == "discretized" else x_hat

    def nats(sigma):
        return -784 * math.log(math.erf(1 / 255 / sigma / 2 ** 0.5))

    x = images[torch.arange(n) % M]
    if kind == "diffusion":
        return (*[functools.partial(f, eps_hat) for f in (diffusion.bound, diffusion.sample)], x, images,
                nats((1 - alpha_bar(1).item()) ** 0.5))
    data = bfn.TYPES[kind]()
    data.output, data.encode, data.decode = output, lambda x: x, lambda x: x
    last = nats(data.sigma_1) if kind == "continuous" else 0
    return *[functools.partial(f, data, None) for f in (bfn.bound, bfn.sample)], x, images, last


@pytest.mark.parametrize("kind", ["diffusion", *bfn.TYPES])
def test_bound_is_tight_for_known_images(kind):
    """It comes to ln M, the fewest nats that tell which of M images it is, and the cost of the last step."""
    bound, _, x, images, last = known(kind, 8000)
    nats = bound(x, None)
    error = (nats.std() / len(nats) ** 0.5).item()
    assert error < 0.09 and nats.mean() == pytest.approx(math.log(len(images)) + last, abs=4 * error)


@pytest.mark.parametrize("kind, sampler, steps", [
    ("diffusion", "ancestral", 1000), ("diffusion", "ancestral", 100), ("diffusion", "ddim", 50),
    *[(kind, *how) for kind in bfn.TYPES for how in (("mean", 100), ("paper", 300), ("ode", 30))]])
def test_sampler_draws_known_images_equally_often(kind, sampler, steps):
    _, sample, _, images, _ = known(kind, 4)
    *_, (_, drawn) = sample(torch.zeros(100, dtype=torch.int64), steps, sampler)
    distance, index = (drawn[:, None] - images[None]).abs().flatten(2).amax(2).min(1)
    assert distance.max() < 1 / 255
    assert (index.bincount(minlength=4) - 25).abs().max() < 4 * (25 * 3 / 4) ** 0.5


def test_shuffle_unit_starts_as_the_channel_shuffle():
    """Of two groups: channel 2 i + j comes from channel j C / 2 + i (ShuffleNet §3.1); in channels_last memory."""
    C, x = 32, torch.randn(2, 32, 3, 3).to(memory_format=torch.channels_last)
    shuffled = common.ShuffleUnit(C, 4)(x, torch.randn(2, 4))
    assert shuffled.is_contiguous(memory_format=torch.channels_last)
    assert all(shuffled[:, i].equal(x[:, i % 2 * C // 2 + i // 2]) for i in range(C))


def test_the_network_of_grey_values_predicts_eps_and_the_std_of_x():
    x, eps, sigma, std = torch.tensor([0.3, -0.5, 1.7, 0.2]).view(4, 1, 1, 1, 1)
    net, scale = common.UNet(1, 2), (1 + sigma ** 2).sqrt()
    net.head.bias.data = torch.stack([(eps - sigma * x) / scale, torch.log(std / (sigma / scale))]).flatten()
    output = net((x + sigma * eps).expand(2, 1, 28, 28) / scale, sigma, torch.tensor([3, 4]))
    assert torch.allclose(output, torch.cat([eps, torch.log(std / sigma)], dim=1), atol=1e-5)


def test_averaged_weights():
    """In the recursion, with the decay min(0.999, (1 + n) / (10 + n)) after n updates, the first of which copies."""
    net = torch.nn.Linear(1, 1, bias=False)
    ema, expected = common.ema(net), None
    for n in range(12000):
        torch.nn.init.constant_(net.weight, math.sin(n))
        ema.update_parameters(net)
        decay = min(0.999, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * math.sin(n) if n else math.sin(n)
        assert n % 997 or ema(torch.ones(1, 1)).item() == pytest.approx(expected, abs=1e-5)


def test_frechet_distance_of_known_normals():
    """Independent coordinates with deviations s and 1: |m|^2 + sum (s - 1)^2."""
    m, s = torch.tensor([0.5, -1.0, 0.0]), torch.tensor([1.0, 2.0, 0.5])
    a, b = torch.randn(2, 200000, 3, dtype=torch.float64)
    assert common.frechet_distance(a, b * s + m) == pytest.approx((m ** 2 + (s - 1) ** 2).sum().item(), rel=0.02)


def test_measures_tell_good_digits_from_bad_ones(tmp_path):
    """With more noise the Fréchet distance grows, fewer digits are right and fewer are clear."""
    name, train, (images, labels) = common.load_data("drawn", None, 0, 6000)
    (tmp_path / "classifier-drawn-digits-6000.pt").write_bytes(b"broken")
    net = common.trained_classifier(name, *train, tmp_path)
    assert common.trained_classifier(name, *train, tmp_path)[0].weight.equal(net[0].weight)
    real, found = common.classify(net, images[3000:], labels[3000:])[0], []
    for noise in (0, 0.3, 0.6, 1.2):
        noisy = common.to_uint8(common.to_float(images[:3000]) + noise * torch.randn(3000, 1, 28, 28))
        features, right, clear = common.classify(net, noisy, labels[:3000])
        found.append((common.frechet_distance(features, real), -right, -clear))
    assert all(list(values) == sorted(values) for values in zip(*found)) and max(found[0][1:]) < -0.9


class AppleGPU(TorchDispatchMode):
    """Refuses float64, and each op that has no kernel for Apple's GPUs (MPS) in torch's table, on device "meta"."""
    table = (Path(torch.__file__).parents[1] / "torchgen/packaged/ATen/native/native_functions.yaml").read_text("utf-8")
    ops = {entry.split("(")[0]: entry for entry in table.split("\n- func: ")}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        there = [x for x in tree_leaves([args, kwargs, result]) if isinstance(x, torch.Tensor) and x.is_meta]
        if there:
            name = func.name().removeprefix("aten::")
            delegate = re.search(r"structured_delegate: (\S+)", self.ops[name])
            for op in (delegate[1] if delegate else name, name.split(".")[0] + ".out"):  # which some call
                assert "dispatch:" not in self.ops.get(op, "") or re.search(r"\bMPS|Composite", self.ops[op]), func
            assert all(x.dtype != torch.float64 for x in there), func
        return result


@pytest.mark.parametrize("kind", ["diffusion", *bfn.TYPES])
def test_apple_gpus_can_do_all_that_is_used(kind, monkeypatch):
    if "MPS" not in AppleGPU.ops["native_group_norm_backward"]:
        pytest.skip("this torch cannot train group norms on Apple's GPUs")
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros(x.shape))  # meta has no values
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # it looks at values: meta has none
    data = bfn.TYPES.get(kind, bfn.Continuous)()
    module, first = (diffusion, []) if kind == "diffusion" else (bfn, [data])
    images, label = torch.zeros(4, 1, 28, 28, device="meta"), torch.zeros(4, dtype=torch.int64, device="meta")
    net = common.UNet(data.channels, data.out_channels).to("meta")
    ema, optimizer = common.ema(net), torch.optim.Adam(net.parameters(), lr=0.01)
    with AppleGPU():
        for _ in range(2):
            module.loss(*first, net, data.encode(images), label).backward()
            optimizer.step()
            ema.update_parameters(net)
        module.bound(*first, ema, images, label)
        for sampler in ("mean", "paper", "ode") if first else ("ancestral", "ddim"):
            list(module.sample(*first, common.guided(ema, 2), label, 3, sampler))


SCRIPTS = {"diffusion": ["diffusion.py"], **{f"bfn-{kind}": ["bfn.py", "--data-type", kind] for kind in bfn.TYPES}}
QUICK = "--dataset drawn --limit 64 --batch-size 16 --steps 4 --device cpu --data-dir none".split()


def start(name, folder, *flags, cwd=None):
    script, *rest = SCRIPTS[name]
    command = [sys.executable, str(Path(__file__).parent / script), *rest, *QUICK, "--out-dir", str(folder), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
                            env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                                 "PYTHONIOENCODING": "cp1252"})


def main(name, folder, *flags):
    """The same to its end, within this process, which saves the time to start one."""
    script, *rest = SCRIPTS[name]
    sys.modules[Path(script).stem].main([*rest, *QUICK, "--out-dir", str(folder), *map(str, flags)])


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def checkpoint(folder):
    """What is in a checkpoint, but for what was measured by the clock."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    for row in state["history"]:
        del row["seconds"], row["images_per_second"]
    return state


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Two epochs of diffusion and of continuous BFN in one go, from another folder, with all that they leave."""
    folder = tmp_path_factory.mktemp("runs") / "実験"
    folder.mkdir()
    for name in ("diffusion", "bfn-continuous"):
        process = start(name, folder, "--epochs", "2", cwd=folder)
        text, error = process.communicate(timeout=600)
        assert process.returncode == 0, text + error
    return folder


def test_what_a_run_leaves(out):
    for name in ("diffusion", "bfn-continuous"):
        left = {path.relative_to(out / name).as_posix() for path in (out / name).rglob("*.*")}
        assert left == {"checkpoint.pt", "metrics.json", "trace.pt", "epochs/epoch_001.png", "epochs/epoch_002.png",
                        "training.png", "samples.png", "steps.png", "curves.png", "process.gif"}
        told = metrics(out / name)
        assert told["settings"]["dataset"] == "drawn digits" and len({row["test"] for row in told["history"]}) == 2
    assert sorted(os.listdir(out / "comparison")) == "curves.png process.gif samples.png steps.png table.md".split()
    assert len(common.Image.open(out / "bfn-continuous/process.gif").convert("L").getcolors()) == 2  # one grey at first


@pytest.mark.parametrize("name", ["diffusion", "bfn-continuous"])
def test_killed_and_continued_equals_undisturbed(name, out, tmp_path, capsys):
    process = start(name, tmp_path, "--epochs", "2")
    while not (tmp_path / name / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    epochs = len(checkpoint(tmp_path / name)["history"])
    main(name, tmp_path, "--epochs", "2")
    assert f"{epochs} epochs done" in capsys.readouterr().out
    continued, undisturbed = checkpoint(tmp_path / name), checkpoint(out / name)
    assert continued.pop("settings") == undisturbed.pop("settings")
    torch.testing.assert_close(continued, undisturbed, rtol=0, atol=0)


def test_each_epoch_has_other_batches_and_other_noise(tmp_path, monkeypatch):
    seen, loss = [], diffusion.loss
    monkeypatch.setattr(diffusion, "loss", lambda net, x_0, label: seen.append((x_0.sum(), torch.rand(1))) or
                        loss(net, x_0, label))
    main("diffusion", tmp_path, "--epochs", 5, "--batch-size", 32)
    for values in zip(*seen):
        assert len(set(torch.stack(values).flatten().tolist())) == 10


@pytest.mark.parametrize("name", ["bfn-discrete", "bfn-discretized"])
def test_other_data_types_train_and_sample(name, tmp_path):
    main(name, tmp_path, "--epochs", "1")
    main(name, tmp_path, "--sample", 12, "--sampler", "paper", "--label", 7)
    images = torch.load(tmp_path / name / "samples.pt", weights_only=True)
    assert images.shape == (12, 1, 28, 28) and images.dtype == torch.uint8 and (tmp_path / name / "drawn.png").exists()
    assert name == "bfn-discretized" or set(images.unique().tolist()) <= {0, 255}


def test_without_labels_the_network_is_never_told_any(tmp_path, monkeypatch):
    seen, forward = [], torch.nn.Embedding.forward
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda net, label: seen.append(label) or forward(net, label))
    monkeypatch.setattr(diffusion, "bound", lambda net, x, label: torch.zeros(len(x)))
    main("diffusion", tmp_path, "--epochs", 1, "--no-labels")
    assert (torch.cat(seen) == common.NULL_LABEL).all()
    final = metrics(tmp_path / "diffusion")["final"]
    assert final["bound"] == 0 and final["guidance"] == 1
    with pytest.raises(SystemExit, match="no_labels True there, False here"):
        main("diffusion", tmp_path, "--sample", 3)
    seen.clear()
    main("diffusion", tmp_path / "told", "--epochs", 1, "--guidance", 1)
    assert 0 < (torch.cat(seen) == common.NULL_LABEL).float().mean() < 0.6
    assert metrics(tmp_path / "told/diffusion")["final"]["bound"] == pytest.approx(math.log2(10) / 784)
    seen.clear()
    main("diffusion", tmp_path / "told", "--sample", 9, "--guidance", 2)
    assert (torch.cat(seen) == common.NULL_LABEL).float().mean() == 0.5


def test_finished_run_only_redraws_and_fresh_starts_over(out, tmp_path):
    folder = tmp_path / "bfn-discrete"
    main("bfn-discrete", tmp_path, "--epochs", 2)
    before = (folder / "checkpoint.pt").read_bytes()
    (folder / "curves.png").unlink()
    main("bfn-discrete", tmp_path, "--epochs", 2)
    assert (folder / "curves.png").exists() and (folder / "checkpoint.pt").read_bytes() == before
    main("bfn-discrete", tmp_path, "--epochs", 1, "--fresh", "--lr", 0.001)
    assert len(checkpoint(folder)["history"]) == len(list((folder / "epochs").iterdir())) == 1


def test_an_epoch_is_saved_before_it_is_printed(tmp_path, monkeypatch):
    def closed(text, **kwargs):
        if text.startswith("epoch 1/"):
            raise BrokenPipeError
    monkeypatch.setattr(common, "print", closed, raising=False)
    with pytest.raises(BrokenPipeError):
        main("diffusion", tmp_path, "--epochs", 1)
    assert len(checkpoint(tmp_path / "diffusion")["history"]) == 1


def test_surroundings_do_not_matter_and_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with matplotlib.rc_context({"text.usetex": True, "font.size": 7}):
        main("diffusion", "~/runs", "--epochs", 1)
        assert matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["font.size"] == 7
    assert (tmp_path / "runs" / "diffusion" / "curves.png").exists()
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as in a notebook, it cannot be reconfigured
    common.run_script(lambda: print("runs"))
    assert sys.stdout.getvalue() == "runs\n"


@pytest.mark.parametrize("flags", ["--epochs -1", "--epochs x", "--steps 0", "--batch-size 0", "--limit 0", "--lr 0",
                                   "--lr inf", "--batch-size 65", "--sample 1 --fresh", "--label 3",
                                   "--sample 1 --label 10", "--no-labels --guidance 1.5"])
def test_bad_arguments(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main("bfn-continuous", tmp_path / "new", *flags.split())
    assert stop.value.code == 2 and not (tmp_path / "new").exists()


def test_impossible_settings_are_refused_before_training(out, tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "loss", None)
    monkeypatch.setattr(common, "VERSION", 4)
    (tmp_path / "file").write_text("")
    shutil.copytree(out / "bfn-continuous", tmp_path / "renamed" / "diffusion")
    for folder, flags, message in [
            (tmp_path / "new", ["--dataset", "mnist", "--data-dir", tmp_path / "file"], "could not be read or down"),
            (tmp_path / "new", ["--sample", 3], "^error: .* no trained network to sample from; train one first[^\n]*$"),
            (tmp_path / "new", ["--device", "mps" if torch.cuda.is_available() else "cuda"], "torch finds no"),
            (tmp_path / "file", [], "could not be written"), (out, ["--seed", 5], "seed 0 there, 5 here"),
            (tmp_path / ("a" * 300), [], "is unreadable"), (tmp_path / "renamed", [], "model bfn-continuous there"),
            (out, ["--lr", 0.1], "lr 0.002 there, 0.1 here"), (out, ["--batch-size", 32], "batch_size"),
            (out, ["--limit", 63], "limit"), (out, ["--no-labels"], "no_labels"), (out, [], "version 3 there, 4 here")]:
        with pytest.raises(SystemExit, match=message):
            main("diffusion", folder, "--epochs", 3, *flags)
        assert not (tmp_path / "new").exists()


def test_data_of_all_kinds(tmp_path, monkeypatch):
    """Whole, beside a Mac's ._ files, compressed, and broken."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = bytes([0, 0, 8, 3, 0, 0, 0, 90] + [0, 0, 0, 28] * 2 + [5] * 784 * 90), [0, 0, 8, 1, 0, 0, 0, 90]
    resources = []
    for name in ("train", "t10k"):
        for kind, content in ("labels-idx1", bytes(labels + [7] * 90)), ("images-idx3", images):
            file = f"{name}-{kind}-ubyte"
            (raw / f"._{file}").write_bytes(b"mac")
            (raw / f"{file}.gz").write_bytes(gzip.compress(content))
            resources.append((f"{file}.gz", hashlib.md5((raw / f"{file}.gz").read_bytes()).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    for _ in range(2):
        name, *parts = common.load_data("auto", tmp_path, 0, 80)
        assert name == "MNIST" and [len(part[0]) for part in parts] == [80, 80]
        monkeypatch.setattr(torchvision.datasets.MNIST, "download", None)  # now they are there
    for broken in (images[:5000], images[:-1], b""):
        (raw / "t10k-images-idx3-ubyte").write_bytes(broken)
        with pytest.raises(SystemExit, match="MNIST"):
            common.load_data("auto", tmp_path, 0)


def test_unusable_checkpoints_are_named_and_kept(out, tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)
    good = (out / "diffusion" / "checkpoint.pt").read_bytes()
    path = tmp_path / "diffusion" / "checkpoint.pt"
    path.parent.mkdir()
    bad = [good, good[:len(good) // 2], bytes(len(good)), os.urandom(1000), b""]
    monkeypatch.setattr(common, "UNet", functools.partial(common.UNet, width=32))  # for which the good one is bad
    for state in ({"settings": Evil()}, {"format": 2, "settings": {}}, [1, 2]):  # the second is of an earlier version
        torch.save(state, path)
        bad.append(path.read_bytes())
    for content in bad:
        path.write_bytes(content)
        for flags in (["--epochs", 2], ["--sample", 1]):
            with pytest.raises(SystemExit, match="^error: .*checkpoint.pt is unreadable[^\n]*$"):
                main("diffusion", tmp_path, *flags)
        assert path.read_bytes() == content and not (tmp_path / "evil").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    def full(self, content=b"", **kwargs):
        self.write_text("ne")
        raise OSError(28, "No space left on device")
    path = tmp_path / "checkpoint.pt"
    path.write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit, match="No space left"):
        common.write(path, lambda file: file.write(b"new"))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(Path, "unlink", full)  # on a disk that is read-only
    with pytest.raises(SystemExit, match="No space left"):
        common.write(path, lambda file: file.write(b"new"))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion, "loss", lambda net, x, label: diffusion.predict_eps(net, x, label, label).sum() / 0)
    with pytest.raises(SystemExit, match="no longer a number in epoch 1: try a smaller --lr"):
        main("diffusion", tmp_path, "--epochs", 1)
    assert not (tmp_path / "diffusion" / "checkpoint.pt").exists()
