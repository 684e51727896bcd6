# /// script
# requires-python = ">=3.9"
# dependencies = ["torch>=2.2", "torchvision>=0.17", "matplotlib"]
# ///
"""A denoising diffusion model (DDPM) of MNIST digits: training, sampling and likelihood.

    python diffusion.py                       (`python diffusion.py --help` lists the flags)

The forward process q adds Gaussian noise to an image x_0 in T steps, until x_T is nothing but noise:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                                                (eq. 2)
    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I),  alpha_bar_t = prod_{i<=t} (1 - beta_i)   (eq. 4)

The reverse process p starts with noise. In each step, a network's output gives a prediction x_0_hat of x_0, and x_{t-1}
is drawn from q(x_{t-1} | x_t, x_0), a Gaussian (eq. 6, 7), with x_0_hat in place of x_0.

Equations and algorithms are those of Ho et al. 2020, Denoising diffusion probabilistic models, arXiv 2006.11239.
x_0 is float [B, 1, 28, 28] in [-1, 1], with 256 grey values; t is [B] or 0-d; label is int64 [B].
"""
import functools
import math

import torch

import common

T = 1000


# -------------------------------------------------------------------------------------------- the forward process
def signal_and_noise(t):
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), the coefficients of x_0 and eps in x_t, to multiply images with.

    Not in the paper: alpha_bar_t = cos^2(pi/2 t / T) (after Nichol & Dhariwal 2021, arXiv 2102.09672). At middle steps
    it has less noise than the paper's schedule, in which beta_t is linear. This buys 0.2 bits/dim.
    """
    angle = math.pi / 2 * t.view(-1, 1, 1, 1) / T
    return angle.cos().clamp(min=0), angle.sin()  # rounding makes cos(pi/2) negative


def q_sample(x_0, t, eps):
    """A draw of x_t from q(x_t | x_0) (eq. 4), made from noise eps ~ N(0, I), all [B, 1, 28, 28]."""
    signal, noise = signal_and_noise(t)
    return signal * x_0 + noise * eps


# ------------------------------------------------------------------------------------------------------- the loss
def loss(net, x_0, label):
    """Algorithm 1 without the gradient step: the mean squared error at random t, a scalar.

    Not in the paper: the network predicts v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 instead of eps
    (Salimans & Ho 2022, arXiv 2202.00512). At T, x_t is eps itself: to predict eps there teaches nothing; v is -x_0.
    The network is given the noise level noise / signal instead of t. (It takes its arctangent: at T it is infinite.)
    """
    t = torch.randint(1, T + 1, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    signal, noise = signal_and_noise(t)
    v = signal * eps - noise * x_0
    return (v - net(q_sample(x_0, t, eps), noise / signal, label)).square().mean()


# ---------------------------------------------------------------------------------------------------- the sampler
def predict_x_0(net, x_t, t, label, guidance=1):
    """The prediction of x_0, [B, 1, 28, 28]: x_0_hat = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v.

    Not in the paper: x_0_hat is clipped to the range of pixels (as in its code; this buys 0.04 bits/dim).

    Not in the paper: with guidance above 1, digits are clearer (classifier-free guidance, Ho & Salimans 2022, arXiv
    2207.12598). v is extrapolated from the prediction for the null label through the one for the label.
    """
    signal, noise = signal_and_noise(t)
    v = net(x_t, noise / signal, label)
    if guidance != 1:
        v_null = net(x_t, noise / signal, torch.full_like(label, common.NULL_LABEL))
        v = v_null + guidance * (v - v_null)
    return (signal * x_t - noise * v).clamp(-1, 1)


@torch.no_grad()
def sample(net, label, steps, sampler, guidance):
    """Draws an image for each label [N]: yields (x_t, x_0_hat), each [N, 1, 28, 28], before each step, and last
    (x_0, x_0). The sampler "ancestral" in T steps is algorithm 2 with sigma_t^2 = beta_tilde_t, in clipped x_0_hat.

    Not in the paper: a step may go from t to any s < t, whole or not, so that few steps suffice. In eq. 7, alpha_bar_s
    takes the place of alpha_bar_{t-1}, and beta is 1 - alpha_bar_t / alpha_bar_s.

    Not in the paper: the sampler "ddim" adds no new noise (Song et al. 2021, arXiv 2010.02502, eq. 12).
    """
    x_t = torch.randn(len(label), 1, 28, 28, device=label.device)
    times = torch.linspace(T, 0, steps + 1, device=label.device)
    for t, s in zip(times[:-1], times[1:]):
        x_0_hat = predict_x_0(net, x_t, t, label, guidance)
        yield x_t, x_0_hat
        (signal_t, noise_t), (signal_s, noise_s) = signal_and_noise(t), signal_and_noise(s)
        if sampler == "ancestral":
            beta = noise_t ** 2 - (signal_t / signal_s * noise_s) ** 2  # 1 - alpha_bar_t / alpha_bar_s, rounded less
            mu_tilde = (signal_s * beta * x_0_hat + signal_t / signal_s * noise_s ** 2 * x_t) / noise_t ** 2
            beta_tilde = beta * noise_s ** 2 / noise_t ** 2
            x_t = mu_tilde + beta_tilde.sqrt() * torch.randn_like(x_t)
        else:
            eps_hat = (x_t - signal_t * x_0_hat) / noise_t
            x_t = signal_s * x_0_hat + noise_s * eps_hat
    yield x_t, x_t


# ------------------------------------------------------------------------------------------------- the likelihood
def kl_step(x_0, x_0_hat, t):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats, [B], for t in 2..T (eq. 8); p is q with x_0_hat for x_0.

    Both are Gaussians of variance beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t). Their means differ
    by sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) (x_0 - x_0_hat) (eq. 7). KL is the square of this difference,
    divided by 2 beta_tilde_t. With snr = alpha_bar / (1 - alpha_bar) it is 1/2 (snr(t-1) - snr(t)) (x_0 - x_0_hat)^2.
    """
    (signal, noise), (signal_before, noise_before) = signal_and_noise(t), signal_and_noise(t - 1)
    snr, snr_before = (signal / noise) ** 2, (signal_before / noise_before) ** 2
    return ((snr_before - snr) / 2 * (x_0 - x_0_hat) ** 2).flatten(1).sum(1)


@torch.no_grad()
def bound(net, x_0, label):
    """Unbiased estimates, [B], of an upper bound on -ln p(x_0 | label) in nats (eq. 5):

    L = L_T + sum_{t=2..T} E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) + E[-ln p(x_0 | x_1)]

    L_T is 0, because alpha_bar_T is. One t of the sum is drawn for each image, and its term is divided by the
    probability of t. The terms fall roughly as 1 / t; with probabilities that do so too, the estimate varies little.
    In the last term, p is N(x_0_hat, beta_1 I), discretized into the 256 grey values (eq. 13); beta_tilde_1 = 0 could
    make it infinite.
    """
    probability = 1 / torch.arange(2, T + 1, device=x_0.device)
    probability = probability / probability.sum()
    t = 2 + torch.multinomial(probability, len(x_0), replacement=True)
    x_0_hat = predict_x_0(net, q_sample(x_0, t, torch.randn_like(x_0)), t, label)
    diffusion = kl_step(x_0, x_0_hat, t) / probability[t - 2]

    t = torch.ones_like(t)
    x_0_hat = predict_x_0(net, q_sample(x_0, t, torch.randn_like(x_0)), t, label)
    _, noise = signal_and_noise(t)  # sqrt(beta_1)
    decoder = common.discretized_normal_nll(x_0, x_0_hat, noise).flatten(1).sum(1)
    return diffusion + decoder


# ---------------------------------------------------------------------------------------------- the training loop
def main(argv=None):
    args = common.parse_args(__doc__, argv, samplers=["ancestral", "ddim"])
    torch.manual_seed(args.seed)
    net = common.UNet(in_channels=1, out_channels=1, labels=not args.no_labels).to(args.device)
    ema = common.ema(net)  # averaged weights, for sampling and evaluation
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    draw = functools.partial(sample, ema, sampler=args.sampler, guidance=args.guidance)
    if args.sample:
        return common.save_samples("diffusion", ema, draw, args)

    dataset, train, test = common.load_data(args.dataset, args.data_dir, args.seed, args.limit)
    run = common.Run(args, name="diffusion", title="DDPM", unit="bits/dim", dataset=dataset,
                     net=net, ema=ema, optimizer=optimizer)
    for epoch in range(len(run.history) + 1, args.epochs + 1):  # an interrupted run goes on where it was
        losses = []
        for x_0, label in run.batches(*train):
            # Not in the paper: labels; without them digits are far worse. A tenth is the null label, for guidance
            label = label.masked_fill(torch.rand(label.shape, device=label.device) < 0.1, common.NULL_LABEL)
            batch_loss = loss(net, x_0, label)
            optimizer.zero_grad()
            batch_loss.backward()
            optimizer.step()
            ema.update_parameters(net)
            losses.append(batch_loss.item())
        preview = common.draw(draw, common.PREVIEW_LABELS, args)
        run.end_epoch(losses, test=common.estimate(functools.partial(bound, ema), test, run), preview=preview)
        common.save_grids(run.folder / f"epochs/epoch_{epoch:03}.png", {"": preview}, f"{run.title}, epoch {epoch}")

    final = common.evaluate(run, functools.partial(bound, ema), draw, train, test)
    common.save_results(run, final, trace=common.draw_process(draw, args))
    common.compare(args.out_dir, "diffusion")


if __name__ == "__main__":
    common.run_script(main)
