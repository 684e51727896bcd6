# /// script
# requires-python = ">=3.9"
# dependencies = ["torch>=2.2", "torchvision>=0.17", "matplotlib"]
# ///
"""A denoising diffusion model (DDPM) of MNIST digits: training, sampling and likelihood.

    python diffusion.py                       (`python diffusion.py --help` lists the flags)

The forward process q adds Gaussian noise to an image x_0 in T steps, until x_T is nothing but noise:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                                                (eq. 2)
    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I),  alpha_bar_t = prod_{i<=t} (1 - beta_i)   (eq. 4)

A network learns to predict x_0 from x_t. To sample, start with noise. In each reverse step, predict x_0, and draw
x_{t-1} from the Gaussian q(x_{t-1} | x_t, x_0) (eq. 6, 7) with the prediction in place of x_0.

Equations and algorithms are those of Ho et al. 2020, Denoising diffusion probabilistic models, arXiv 2006.11239.
x_0 is float [B, 1, 28, 28] in [-1, 1]; t is [B] or 0-d, from 1 to T; label is int64 [B].
"""
import math

import torch

import common

T = 1000


# -------------------------------------------------------------------------------------------- the forward process

def signal_and_noise(t):
    """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), the coefficients of x_0 and eps in x_t: each [B, 1, 1, 1].

    Not in the paper: alpha_bar_t = cos^2(pi/2 t / T), a schedule (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)
    with less noise at middle steps. It buys 0.2 bits/dim. beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} follows from it.
    """
    angle = math.pi / 2 * t.view(-1, 1, 1, 1) / T
    return angle.cos().clamp(min=0), angle.sin()  # rounding makes cos(pi/2) negative


def q_sample(x_0, t, eps):
    """A draw of x_t from q(x_t | x_0) (eq. 4), made from noise eps ~ N(0, I), all [B, 1, 28, 28]."""
    signal, noise = signal_and_noise(t)
    return signal * x_0 + noise * eps


# ------------------------------------------------------------------------------------------------------- the loss

def loss(net, x_0, label):
    """Algorithm 1 without the gradient step: the mean squared error at random t, a scalar (eq. 14).

    Not in the paper: the network predicts v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0, not eps (Salimans & Ho
    2022, arXiv 2202.00512). At T, x_T is eps, and predicting eps teaches nothing; v is -x_0 there. It makes digits
    clearer (97% of them, with eps 96%). The network is given the noise level as sigma, noise / signal.
    """
    t = torch.randint(1, T + 1, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    signal, noise = signal_and_noise(t)
    v = signal * eps - noise * x_0
    return (v - net(q_sample(x_0, t, eps), noise / signal, label)).square().mean()


# ---------------------------------------------------------------------------------------------------- the sampler

def predict_x_0(net, x_t, t, label, guidance=1):
    """x_0_hat = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v, the prediction of x_0, [B, 1, 28, 28].

    Not in the paper: x_0_hat is clipped to the range of pixels (as in its code; it buys 0.04 bits/dim), and
    classifier-free guidance exaggerates the effect of the label by `guidance`, 1 for none (Ho & Salimans 2022, arXiv
    2207.12598, where it is 1 + w). 97% of digits are clear, without it 96%.
    """
    signal, noise = signal_and_noise(t)
    v = net(x_t, noise / signal, label)
    if guidance != 1:
        v_null = net(x_t, noise / signal, torch.full_like(label, common.NULL_LABEL))
        v = v_null + guidance * (v - v_null)
    return (signal * x_t - noise * v).clamp(-1, 1)


SAMPLERS = {"ancestral": 1, "ddim": 0}  # eta


@torch.no_grad()
def sample(net, label, steps, sampler, guidance):
    """Algorithm 2 (steps = T, "ancestral", guidance = 1): draws an image for each label [N]. Yields (x_t, x_0_hat),
    each [N, 1, 28, 28], before each step, and last (x_0, x_0).

    x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s - eta^2 beta_tilde) eps_hat + eta sqrt(beta_tilde) z

    Not in the paper: this is eq. 12 of DDIM (Song et al. 2021, arXiv 2010.02502). eta = 1 and s = t - 1 make it
    algorithm 2; eta = 0 adds no new noise z ("ddim"). x_s has the noise level of training for any s < t, so steps may
    be skipped: 30 draw digits as good as 1000.
    """
    eta = SAMPLERS[sampler]
    x_t = torch.randn(len(label), 1, 28, 28, device=label.device)
    times = torch.linspace(T, 0, steps + 1, device=label.device)
    for t, s in zip(times[:-1], times[1:]):
        x_0_hat = predict_x_0(net, x_t, t, label, guidance)
        yield x_t, x_0_hat
        (signal_t, noise_t), (signal_s, noise_s) = signal_and_noise(t), signal_and_noise(s)
        eps_hat = (x_t - signal_t * x_0_hat) / noise_t                     # eq. 4, solved for eps
        beta = 1 - (signal_t / signal_s) ** 2
        beta_tilde = (noise_s / noise_t) ** 2 * beta                       # eq. 7
        z = torch.randn_like(x_t)
        x_t = signal_s * x_0_hat + (noise_s ** 2 - eta ** 2 * beta_tilde).sqrt() * eps_hat + eta * beta_tilde.sqrt() * z
    yield x_t, x_t


# ------------------------------------------------------------------------------------------------- the likelihood

def kl_step(x_0, x_0_hat, t):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in nats, [B], for t in 2..T (eq. 8); p is q with x_0_hat for x_0.

    Both are Gaussians of variance beta_tilde_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t). Their means differ
    by sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) (x_0 - x_0_hat) (eq. 7). The square of this over
    2 beta_tilde_t is, with the signal-to-noise ratio SNR(t) = alpha_bar_t / (1 - alpha_bar_t),

    KL = 1/2 (SNR(t-1) - SNR(t)) (x_0 - x_0_hat)^2, summed over pixels
    """
    snr_s, snr_t = [(signal / noise) ** 2 for signal, noise in (signal_and_noise(t - 1), signal_and_noise(t))]
    return ((snr_s - snr_t) / 2 * (x_0 - x_0_hat) ** 2).flatten(1).sum(1)


@torch.no_grad()
def bound(net, x_0, label):
    """An upper bound on -ln p(x_0 | label) in nats, as unbiased estimates of its terms, each [B] (eq. 5):

    L = L_T + sum_{t=2..T} E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) + E[-ln p(x_0 | x_1)]

    L_T is 0, because alpha_bar_T is. Of the sum ("diffusion") one term is drawn for each image and divided by its
    probability. This is proportional to 1 / t, because the terms fall roughly so: the estimate varies less. In the last
    term ("decoder") p is N(x_0_hat, beta_1), discretized into the 256 grey values (eq. 13).
    """
    probability = 1 / torch.arange(2, T + 1, device=x_0.device)
    probability = probability / probability.sum()
    t = 2 + torch.multinomial(probability, len(x_0), replacement=True)
    x_0_hat = predict_x_0(net, q_sample(x_0, t, torch.randn_like(x_0)), t, label)
    diffusion = kl_step(x_0, x_0_hat, t) / probability[t - 2]

    t = torch.ones_like(t)
    x_0_hat = predict_x_0(net, q_sample(x_0, t, torch.randn_like(x_0)), t, label)
    _, sigma = signal_and_noise(t)                                         # sqrt(beta_1)
    decoder = common.discretized_normal_nll(x_0, x_0_hat, sigma).flatten(1).sum(1)
    return {"diffusion": diffusion, "decoder": decoder}


# ---------------------------------------------------------------------------------------------- the training loop

def main(argv=None):
    args = common.parse_args(__doc__, argv, samplers=list(SAMPLERS))
    torch.manual_seed(args.seed)
    net = common.UNet(in_channels=1, out_channels=1, fourier=True).to(args.device)
    ema = common.ema(net)  # averaged weights, for sampling and evaluation
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    run = common.Run(args, name="diffusion", title="DDPM", unit="bits/dim", state_name="x_t",
                     net=net, ema=ema, optimizer=optimizer, sample=sample, bound=bound)
    if args.sample:
        return run.save_samples()

    while len(run.history) < args.epochs:  # an interrupted run goes on from its last finished epoch
        losses = []
        for x_0, label in run.batches():
            # Not in the paper: labels (Fréchet distance 4, without 25); a tenth becomes the null label, for guidance
            label = label.masked_fill(torch.rand(label.shape, device=label.device) < 0.1, common.NULL_LABEL)
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
