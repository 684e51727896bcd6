# /// script
# requires-python = ">=3.9"
# dependencies = ["torch>=2.2", "torchvision>=0.17", "matplotlib"]
# ///
"""Trains a denoising diffusion model (DDPM) on MNIST, samples from it, measures it.

    python diffusion.py                       (`python diffusion.py --help` lists the flags)

Noise is added to an image x_0 in T steps, x_1, ..., x_T, until nothing of the image is left. A network learns to
predict x_0 from x_t. Its best prediction (by least squares) is the mean of all images that x_t may come from: a blur,
where there is much noise. So a step back goes only to x_{t-1}, which is drawn from x_t and the prediction, and the
network predicts anew. T steps back from pure noise make a new image.

This file has, in this order, noise schedule, loss, sampler, likelihood bound and training loop; common.py has the
network, its Fourier features, and all that is not the algorithm. Equation numbers are those of

    DDPM  Ho et al. 2020, Denoising diffusion probabilistic models, arXiv 2006.11239
    DDIM  Song et al. 2021, Denoising diffusion implicit models, arXiv 2010.02502 (its alpha is alpha_bar)

x_0 is float [B, 1, 28, 28] in [-1, 1]. t is the step, 1 to T; 0 is the image. t (of any dtype) and label (int64), both
[B], are on the CPU. eps and z are noise, from N(0, I).

A step of the forward process q is x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) z; T such steps turn any x_0 into noise
from N(0, I); `q_sample` takes the first t steps at once. The schedule gives alpha_bar_t, the product of all 1 - beta up
to t; so beta_t is 1 - alpha_bar_t / alpha_bar_{t-1}. If x_0 is known, the step back, q(x_{t-1} | x_t, x_0), is a
normal, see `kl_step`. The model's step back, p(x_{t-1} | x_t), is that normal with the predicted x_0_hat for x_0. At
t = 1 its variance is 0: the sampler returns x_0_hat itself, and `bound`, which needs a probability for every x_0, takes
a normal of variance beta_1 around x_0_hat.

Departures from DDPM:

1. The network is told the digit, so that the sampler can use classifier-free guidance (Ho & Salimans 2022, arXiv
   2207.12598), at middle noise levels only (Kynkäänniemi et al. 2024, arXiv 2404.07724). For this, one label in ten, at
   random, becomes common.NOT_TOLD in training (with `--no-labels`, every one): `main`, `predict_x_0`, `sample`.
2. The noise schedule is a cosine, which keeps more of the image at middle steps (Nichol & Dhariwal 2021, arXiv
   2102.09672, eq. 17 with s = 0 and beta not clipped): `alpha_bar`.
3. The network predicts v, a mix of eps and x_0 (Salimans & Ho 2022, arXiv 2202.00512), not eps. At T, eps is x_t
   itself, and predicting it tells nothing of x_0; v is -x_0 there. At small t, v is nearly eps: `predict_v`, `loss`.
4. Fourier features of x_t / sqrt(alpha_bar_t) show the network small differences of grey values, on which the bound
   depends (after Kingma et al. 2021, arXiv 2107.00630): `predict_v`.
5. For a short training: the optimizer is AdamW with betas 0.9 and 0.99, not Adam; the learning rate rises over 200
   updates and falls linearly to 0; averaged weights (EMA), for sampler and bound, have decay 0.995, not 0.9999: `main`.
6. x_0_hat is clipped to the range of pixels (as in DDPM's code, not in the paper); the sampler can take fewer steps,
   or be DDIM's: `predict_x_0`, `sample`. `--steps 1000 --guidance 1` is DDPM's algorithm 2 except for the clipping.
"""
import math

import torch

import common

T = 1000


# -------------------------------------------------------------------------------------------------- the schedule

def alpha_bar(t):
    """alpha_bar_t = cos^2(pi/2 t / T), for t in [0, T]; float64, as 1 - alpha_bar loses digits at small t."""
    return torch.cos(math.pi / 2 * torch.as_tensor(t).double() / T) ** 2


def signal_and_noise(t, x):
    """The factors on x_0 and on eps in x_t, sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) for t [B], each [B, 1, 1, 1],
    with the dtype and device of x."""
    return common.column(alpha_bar(t).sqrt(), x), common.column((1 - alpha_bar(t)).sqrt(), x)


def q_sample(x_0, t, eps):
    """A draw of x_t from q(x_t | x_0), made from noise eps ~ N(0, I), all [B, 1, 28, 28]; t: [B].

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps                                                (DDPM eq. 4)
    """
    signal, noise = signal_and_noise(t, x_0)
    return signal * x_0 + noise * eps


# ------------------------------------------------------------------------------------------------------ the loss

def predict_v(net, x_t, t, label):
    """The network's prediction, [B, 1, 28, 28], of v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0.

    v is -x_0 at T, and eps at t = 0: (x_t, v) is (x_0, eps) rotated by -pi/2 t / T. `predict_x_0` rotates it back.
    """
    signal, noise = signal_and_noise(t, x_t)
    signal = signal.clamp(min=1e-3)  # it is 0 at T, and so are the features: they fade as noise / signal grows
    features = common.fourier_features(x_t / signal, noise / signal)
    return net(torch.cat([x_t, features], dim=1), t / T, label)


def predict_x_0(net, x_t, t, label, guidance=1):
    """The prediction of x_0 for sampler and bound, [B, 1, 28, 28], clipped to the range of pixels:

    x_0_hat = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v

    Classifier-free guidance exaggerates what the label does: v = v_none + guidance (v_label - v_none), where v_none is
    without label. guidance = 1 turns it off (it is 1 + w in the paper).
    """
    v = predict_v(net, x_t, t, label)
    if guidance != 1:
        v_none = predict_v(net, x_t, t, torch.full_like(label, common.NOT_TOLD))
        v = v_none + guidance * (v - v_none)
    signal, noise = signal_and_noise(t, x_t)
    return (signal * x_t - noise * v).clamp(-1, 1)


def loss(net, x_0, label):
    """DDPM's algorithm 1 without the gradient step: a scalar, the mean squared error of v at random t. It is eq. 14
    with v for eps. The squared error of v is that of x_0_hat, unclipped, over 1 - alpha_bar_t; so these are terms of
    `bound` with less weight at small t: there the bound counts differences of grey values that the eye hardly sees."""
    t = torch.randint(1, T + 1, (len(x_0),))
    eps = common.randn_like(x_0)
    x_t = q_sample(x_0, t, eps)
    signal, noise = signal_and_noise(t, x_0)
    v = signal * eps - noise * x_0
    return (v - predict_v(net, x_t, t, label)).square().mean()


# --------------------------------------------------------------------------------------------------- the sampler

SAMPLERS = {"ancestral": 1.0, "ddim": 0.0}  # eta of DDIM eq. 16, which scales the fresh noise: 1 is DDPM's, 0 is none


@torch.no_grad()
def sample(net, label, steps=T, sampler="ancestral", guidance=1):
    """From noise to one image for each label [N]: yields (x_t, x_0_hat), both [N, 1, 28, 28], before each step,
    and finally (x_0, x_0). A step from t to s < t is

    eps_hat = (x_t - sqrt(alpha_bar_t) x_0_hat) / sqrt(1 - alpha_bar_t)                             (from DDPM eq. 4)
    x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s - sigma^2) eps_hat + sigma z,  z ~ N(0, I)   (DDIM eq. 12)
    sigma^2 = eta^2 (1 - alpha_bar_s) (1 - alpha_bar_t / alpha_bar_s) / (1 - alpha_bar_t)               (DDIM eq. 16)

    With eta = 1 and s = t - 1, x_s has the mean mu_tilde and the variance beta_tilde of `kl_step`, with x_0_hat for
    x_0: DDPM's algorithm 2. For any eta in [0, 1] and s, were x_0_hat exact, the noise in x_s would have variance
    1 - alpha_bar_s, as in training: so steps may be skipped. If steps does not divide T, t is fractional. Guidance acts
    while digits take shape: where the factor on the noise is 0.8 to 2.5 times that on x_0 (t / T is 0.43 to 0.76).
    """
    eta = SAMPLERS[sampler]
    x_t = torch.randn(len(label), 1, 28, 28).to(next(net.parameters()).device)  # x_T
    times = torch.linspace(T, 0, steps + 1, dtype=torch.float64)
    for t, s in zip(times[:-1], times[1:]):
        a_t, a_s = alpha_bar(t).item(), alpha_bar(s).item()
        guided = 0.8 * a_t ** 0.5 < (1 - a_t) ** 0.5 < 2.5 * a_t ** 0.5
        x_0_hat = predict_x_0(net, x_t, t.expand(len(label)), label, guidance if guided else 1)
        yield x_t, x_0_hat
        eps_hat = (x_t - a_t ** 0.5 * x_0_hat) / (1 - a_t) ** 0.5
        sigma = eta * ((1 - a_s) / (1 - a_t) * (1 - a_t / a_s)) ** 0.5
        x_t = a_s ** 0.5 * x_0_hat + max(1 - a_s - sigma ** 2, 0) ** 0.5 * eps_hat + sigma * common.randn_like(x_t)
    yield x_t, x_t


# ------------------------------------------------------------------------------------------------ the likelihood

def kl_step(x_0, x_0_hat, t):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats, [B], for t in 2..T (DDPM eq. 8). Both are normals of the
    same variance, beta_tilde (DDPM eq. 7), and p's mean has x_0_hat in place of x_0:

    mu_tilde_t = (sqrt(alpha_bar_{t-1}) beta_t x_0 + sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) x_t) / (1 - alpha_bar_t)
    beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
    KL = (the difference of the means, in which x_t cancels)^2 / (2 beta_tilde_t), summed over pixels
    """
    a_t, a_s = alpha_bar(t), alpha_bar(t - 1)
    beta = 1 - a_t / a_s
    beta_tilde = (1 - a_s) / (1 - a_t) * beta
    weight = a_s * (beta / (1 - a_t)) ** 2 / (2 * beta_tilde)
    return (common.column(weight, x_0) * (x_0 - x_0_hat) ** 2).flatten(1).sum(1)


@torch.no_grad()
def bound(net, x_0, label):
    """An unbiased estimate of an upper bound on -ln p(x_0 | label) in nats, as its three terms, each [B] (DDPM eq. 5):

    L = L_T + sum_{t=2..T} L_{t-1} + L_0      (by Jensen's inequality; x_1, ..., x_T are the latent variables)

    L_T ("prior") is KL(q(x_T | x_0) || N(0, I)), 0 because alpha_bar_T is. L_{t-1} is the mean of `kl_step` at t over
    x_t; of the sum ("diffusion") one term is drawn for each image and divided by its probability (importance sampling).
    This is proportional to 1 / t, roughly as the terms are, so that the estimate varies less. L_0 ("decoder") is the
    mean of -ln p(x_0 | x_1) over x_1, where p is N(x_0_hat, beta_1) cut into the 256 grey values (DDPM eq. 13). One
    draw of x_t estimates each mean. Always T steps, no guidance.
    """
    probability = 1 / torch.arange(2, T + 1).double()  # of t = 2..T
    probability = probability / probability.sum()
    t = 2 + torch.multinomial(probability, len(x_0), replacement=True)
    x_0_hat = predict_x_0(net, q_sample(x_0, t, common.randn_like(x_0)), t, label)
    diffusion = kl_step(x_0, x_0_hat, t) / probability[t - 2].float().to(x_0.device)

    t = torch.ones(len(x_0))
    x_0_hat = predict_x_0(net, q_sample(x_0, t, common.randn_like(x_0)), t, label)
    sigma_1 = (1 - alpha_bar(1).item()) ** 0.5  # sqrt(beta_1)
    decoder = common.discretized_normal_nll(x_0, x_0_hat, sigma_1).flatten(1).sum(1)

    signal, noise = signal_and_noise(torch.full((len(x_0),), T), x_0)  # KL(N(signal x_0, noise^2) || N(0, 1))
    prior = (noise ** 2 + (signal * x_0) ** 2 - 1 - 2 * noise.log()).flatten(1).sum(1) / 2
    return {"prior": prior, "diffusion": diffusion, "decoder": decoder}


# ---------------------------------------------------------------------------------------------- the training loop

def main(argv=None):
    args = common.parse_args(__doc__, argv, list(SAMPLERS))
    torch.manual_seed(args.seed)
    net = common.UNet(in_channels=1 + 16, out_channels=1).to(args.device)  # in: x_t and its Fourier features; out: v
    # the averaged weights, for sampler and bound; n_averaged counts the updates
    ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99))
    run = common.Run(args, "diffusion", "DDPM", "bits/dim", "x_t", net, ema, optimizer, sample, bound)
    if args.sample:
        return run.save_samples()

    while len(run.history) < args.epochs:  # an interrupted run goes on from its last finished epoch
        losses = []
        for x_0, label in run.batches():  # with --no-labels, all labels are NOT_TOLD
            update = int(ema.n_averaged) + 1
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(update / 200, 1 - (update - 1) / run.updates)
            label = torch.where(torch.rand(len(label)) < 0.1, common.NOT_TOLD, label)  # for guidance
            batch_loss = loss(net, x_0, label)
            optimizer.zero_grad()
            batch_loss.backward()
            optimizer.step()
            ema.update_parameters(net)
            losses.append(batch_loss.item())
        run.end_epoch(losses)
    run.finish()


if __name__ == "__main__":
    common.run_script(main)
