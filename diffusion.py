# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "matplotlib"]
# ///
"""A denoising diffusion model (DDPM) of MNIST: trains it, samples from it, measures it.

    python diffusion.py                       (`python diffusion.py --help` lists the flags)

Noise is added to an image x_0 in T steps, x_1, ..., x_T, until nothing of it is left. A network learns to take such a
step back; from pure noise, T steps back make a new image. This file is all of it but the network, in this order: the
noise schedule, the loss, the sampler, the likelihood bound, the training loop. Equation numbers are those of

    DDPM   Ho et al. 2020, Denoising diffusion probabilistic models, arXiv 2006.11239
    iDDPM  Nichol & Dhariwal 2021, Improved denoising diffusion probabilistic models, arXiv 2102.09672
    DDIM   Song et al. 2021, Denoising diffusion implicit models, arXiv 2010.02502
    PD     Salimans & Ho 2022, Progressive distillation for fast sampling of diffusion models, arXiv 2202.00512
    VDM    Kingma et al. 2021, Variational diffusion models, arXiv 2107.00630
    SC     Chen et al. 2022, Analog bits: ... diffusion models with self-conditioning, arXiv 2208.04202
    AG     Karras et al. 2024, Guiding a diffusion model with a bad version of itself, arXiv 2406.02507

Images are float [B, 1, 28, 28] in [-1, 1]. In the code i = 1..T is a step and t = i / T its time, float [B] in [0, 1]:
0 is the image, 1 is noise. In the equations of DDPM, iDDPM and DDIM the index t is the step. A step forward is
x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps, and alpha_bar_t is the product of 1 - beta up to t: what x_t keeps of
the image's variance (alpha in DDIM, alpha^2 in PD and VDM). q is this process and p the way back that we learn; one
step back of q, where x_0 is known, has the mean mu_tilde and the variance beta_tilde.
"""
import functools
import math

import torch

import common

T = 1000
SAMPLERS = {"ancestral": 1.0, "DDIM": 0.0}  # name: eta, the factor on the fresh noise in each step


# -------------------------------------------------------------------------------------------------- the schedule

def signal_and_noise(t):
    """(sqrt(alpha_bar), sqrt(1 - alpha_bar)) at time t: a tensor of any shape in [0, 1], two of that shape.

    alpha_bar(t) = cos^2(pi/2 t)                                                         iDDPM eq. 17, with s = 0

    iDDPM's offset s = 0.008 leaves noise of deviation 0.006 in x_1. Grey values are 0.0078 apart: the decoder would
    have to guess among neighbours. With s = 0 the deviation is 0.0016, and the decoder costs next to nothing.
    """
    return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)


def diffuse(x_0, eps, t):
    """A draw of x_t from q(x_t | x_0), made from noise eps ~ N(0, I), of x_0's shape [B, 1, 28, 28]; t: [B].

    x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps                                                 DDPM eq. 4
    """
    signal, noise = signal_and_noise(common.column(t))
    return signal * x_0 + noise * eps


# ------------------------------------------------------------------------------------------------------ the loss

def predict_v(net, x_t, t, previous):
    """The network's guess, [B, 1, 28, 28], of v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (PD §4).

    DDPM predicts eps. Where x_t is nearly all noise eps is known and says nothing of the image; there, v is -x_0.
    """
    signal, noise = signal_and_noise(t)
    signal = signal.clamp(min=1e-3)  # it is 0 at t = 1, where the features vanish anyway
    features = common.fourier_features(x_t / common.column(signal), noise / signal)
    return net(torch.cat([x_t, previous, features], dim=1), t)


def predict_x_0(net, x_t, t, previous):
    """The network's guess of the image, [B, 1, 28, 28], given a previous one, or zeros where there is none:

    x_0 = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v, by PD §4, app. D; clipped to [-1, 1]
    """
    signal, noise = signal_and_noise(common.column(t))
    return common.clip(signal * x_t - noise * predict_v(net, x_t, t, previous))


def look_twice(net, x_t, t, count):
    """predict_x_0 with a second look for the first `count` images: the network sees x_t, and then x_t and its guess.

    This is self-conditioning (SC). In training some images get a second look (SC: half of them, we: a quarter), with no
    gradient through the first, so that the network learns to do with and without. Sampler and bound always look twice.
    SC's sampler spares the first look, and takes the guess of the step before. With that, ours got caught in its own
    guesses, which became nines too often: after 3 epochs the Frechet distance of 4000 digits was 33, looking twice 19,
    without any of it 22. (All without the guide, for which see `guided_guess`.)
    """
    previous = torch.zeros_like(x_t)
    with torch.no_grad():
        previous[:count] = predict_x_0(net, x_t[:count], t[:count], torch.zeros_like(x_t[:count]))
    return predict_x_0(net, x_t, t, previous)


def loss(net, x_0):
    """The training loss of a batch, a scalar, with steps i drawn from 1..T, the later the likelier:

    L = E ||x_0 - guess||^2 / (1 - alpha_bar) / 784                                        PD §4, "SNR + 1 weighting"

    For a guess within [-1, 1] this is ||v - v_net||^2 / 784, which is DDPM's eq. 14 with v in place of eps, and with
    other steps drawn. But the guess is clipped, as it is in sampling: where a pixel is black, which most are, all
    guesses from black on down are right, and the network need not get the exact value. That made the bound after 1.5
    epochs 1.70 instead of 1.80 bits/dim. A guess that is clipped at the wrong end needs its gradient, which
    `common.clip` lets through: 1.64 instead of 1.71, with another network. (All with steps drawn evenly.)

    Which digit it becomes is settled around t = 0.8; below t = 0.1 only fine shades are. Drawn evenly, as in DDPM, one
    step in ten would go to these; with t = u^(2/3) for uniform u, one in thirty. That favours shape at the expense of
    the bound: after 1.5 epochs, the error of v at t = 0.8 was 0.161 instead of 0.163, the bound 1.78 instead of 1.64.
    """
    i = 1 + (common.stratified(len(x_0)) ** (2 / 3) * T).long().clamp(max=T - 1)
    t = (i / T).to(x_0.device)
    _, noise = signal_and_noise(common.column(t))
    guess = look_twice(net, diffuse(x_0, common.randn_like(x_0), t), t, len(x_0) // 4)
    return ((x_0 - guess) / noise).square().mean()


# --------------------------------------------------------------------------------------------------- the sampler

def guided_guess(net, guide, x_t, t):
    """The guess of x_0, [B, 1, 28, 28], with which the sampler goes on at time t, a number: that of two looks, and
    between t = 0.50 and 0.84 led away from the first look of a worse network, and clipped. The worse one, the guide, is
    the same network as it was after the first epoch. It makes the same mistakes, but larger ones, so that the way from
    its guess to the better one leads on to one better still.

    guess + (w - 1) (guess - worse), w = 5/2                          AG: `common.guidance`, `common.guidance_weight`

    After 20 epochs, a classifier was less than 90% sure of 3.6% of 2000 digits, without the guide of 9.0%.
    """
    times = torch.full((len(x_t),), t, device=x_t.device)
    guess = look_twice(net, x_t, times, len(x_t))
    w = common.guidance_weight(math.tan(math.pi / 2 * t))  # noise over signal
    if w == 1:
        return guess
    worse = predict_x_0(guide, x_t, times, torch.zeros_like(x_t))
    return common.clip(guess + common.guidance(guess, worse, w))


def reverse_process(net, guide, x_T, steps, eta=0.0):
    """From noise x_T ~ N(0, I) to images, both [N, 1, 28, 28]: yields (t, x_t, guess of x_0) before each step, and
    last (0.0, x_0, x_0). A step from t to s < t takes for x_0 the guess expected in its middle, from the guesses at t
    and at the step before (`common.half_a_step_on`), and the eps with which eq. 4 makes x_t of it:

    x_0 = guess + (guess - last guess) / 2
    x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z, z ~ N(0, I)           DDIM eq. 12
    sigma^2 = eta^2 (1 - alpha_bar_s) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_s)              DDIM eq. 16

    eta = 1 over all T steps is DDPM's algorithm 2, with this x_0, and the variance beta_tilde of its eq. 7;
    eta = 0 adds no noise on the way (DDIM). `steps` may be any number: t need not be a multiple of 1 / T. 1000 digits
    in 20 steps, with eta = 1, had a Frechet distance of 10.8, and of 13.6 with the guess at t for x_0.
    """
    x_t, last = x_T, None
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    levels = list(zip(times.tolist(), *[a.tolist() for a in signal_and_noise(times)]))
    for (t, signal_t, noise_t), (_, signal_s, noise_s) in zip(levels[:-1], levels[1:]):
        guess = guided_guess(net, guide, x_t, t)
        yield t, x_t, guess
        x_0, last = common.half_a_step_on(guess, last), guess
        eps = (x_t - signal_t * x_0) / noise_t
        # 1 - alpha_bar_t / alpha_bar_s = (noise_t^2 - noise_s^2) / signal_s^2
        sigma = eta * noise_s / noise_t * (noise_t ** 2 - noise_s ** 2) ** 0.5 / signal_s
        x_t = signal_s * x_0 + max(noise_s ** 2 - sigma ** 2, 0) ** 0.5 * eps
        if eta:
            x_t = x_t + sigma * common.randn_like(x_t)
    yield 0.0, x_t, x_t


def generate(net, guide, n, steps, sampler):
    """The reverse process of n images from fresh noise, with one of SAMPLERS: see `reverse_process`."""
    x_T = torch.randn(n, 1, 28, 28).to(next(net.parameters()).device)
    return reverse_process(net, guide, x_T, steps, SAMPLERS[sampler])


# ------------------------------------------------------------------------------------------------ the likelihood

def step_cost(x_0, guess, i):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats, [B]: one term of the bound.

    L_{t-1} = ||mu_tilde(x_t, x_0) - mu_tilde(x_t, guess)||^2 / (2 beta_tilde_t)                     DDPM eq. 7, 8
            = 1/2 (SNR_{t-1} - SNR_t) ||x_0 - guess||^2,  SNR = alpha_bar / (1 - alpha_bar)               VDM eq. 13

    x_0, guess: [B, 1, 28, 28]; i: the step that the equations call t, int [B] in 2..T.
    """
    (signal_s, noise_s), (signal_t, noise_t) = signal_and_noise((i.double() - 1) / T), signal_and_noise(i.double() / T)
    drop = (signal_s / noise_s) ** 2 - (signal_t / noise_t) ** 2
    return 0.5 * drop.float().to(x_0.device) * (x_0 - guess).square().flatten(1).sum(1)


def decoder_cost(x_0, guess):
    """-ln p(x_0 | x_1) in nats, [B]: a normal of variance beta_1 around the guess of x_0, cut into the 256 grey values
    (DDPM eq. 13)."""
    _, noise_1 = signal_and_noise(torch.tensor(1 / T))
    return common.discretised_normal_nats(x_0, guess, noise_1.to(x_0.device)).flatten(1).sum(1)


def bound(net, x_0):
    """An upper bound on the code length of each image in bits/dim, as its three terms, [B, 3]:

    L = L_T + sum_{t=2..T} L_{t-1} + L_0                                                                 DDPM eq. 5

    prior: what x_T still tells of x_0; diffusion: the steps back; decoder: the last step, from x_1 to grey values.
    It is that of the ancestral sampler over all T steps, with the guess at t for x_0, and no guide. Both looks are at
    x_t alone, since p(x_{t-1} | x_t) must not depend on anything else. The sum over t is estimated, without bias, from
    one step i for each image, drawn with probability p(i) proportional to 1 / i: the terms fall roughly like that, and
    to draw the large ones more often makes the estimate less noisy.
    """
    p = 1 / torch.arange(2, T + 1, dtype=torch.float64)
    p = p / p.sum()
    i = 2 + torch.searchsorted(p.cumsum(0), common.stratified(len(x_0)).double()).clamp(max=T - 2)
    t = (i / T).to(x_0.device)
    guess = look_twice(net, diffuse(x_0, common.randn_like(x_0), t), t, len(x_0))
    diffusion = step_cost(x_0, guess, i) / p[i - 2].float().to(x_0.device)

    first = torch.full_like(t, 1 / T)
    guess = look_twice(net, diffuse(x_0, common.randn_like(x_0), first), first, len(x_0))
    decoder = decoder_cost(x_0, guess)

    signal, noise = signal_and_noise(torch.ones((), device=x_0.device))  # KL(N(signal x_0, noise^2) || N(0, 1))
    prior = 0.5 * (noise ** 2 - 1 - 2 * noise.log() + (signal * x_0).square()).flatten(1).sum(1)
    return torch.stack([prior, diffusion, decoder], dim=1) / (784 * math.log(2))


# ---------------------------------------------------------------------------------------------- the training loop

def train(run, method):
    """Train until --epochs are done, from the last finished one on."""
    while run.unfinished:
        for x_0 in run.batches():
            batch_loss = loss(run.net, x_0)
            run.record(batch_loss)
            run.net.zero_grad()
            batch_loss.backward()
            run.step()  # of the optimisers, and of the average of the weights
        run.end_epoch(method)


def open_run(args):
    """The run in --out-dir, and its network as a method to sample with and to measure."""
    run = common.Run(args, "diffusion", "DDPM", "bits/dim", "x_t", in_channels=1 + 1 + 16, out_channels=1)
    return run, common.Method(functools.partial(generate, run.net, run.guide), functools.partial(bound, run.net),
                             ["prior", "diffusion", "decoder"], list(SAMPLERS))


def main(argv=None):
    args = common.arguments(__doc__, argv)
    run, method = open_run(args)
    with run:
        if args.sample:
            common.save_drawn(run, method)
        else:
            train(run, method)
            common.finish(run, method)


if __name__ == "__main__":
    common.command(main)
