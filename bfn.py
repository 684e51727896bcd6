# /// script
# requires-python = ">=3.9"
# dependencies = ["torch>=2.2", "torchvision>=0.17", "matplotlib"]
# ///
"""Trains a Bayesian Flow Network (BFN) on MNIST, samples from it, measures it, for three types of data.

    python bfn.py                             (`python bfn.py --help` lists the flags)
    python bfn.py --data-type discrete

Alice sends Bob an image in messages, each a multiple of it plus noise; a message's accuracy is how much it tells. Bob
has a belief about each pixel on its own (the input distribution, set by time t and theta, the sum of messages) and
improves it with each message by Bayes' rule. A network looks at all beliefs together and predicts each pixel (the
output distribution, of mean x_hat). Alice draws a message from the sender's distribution; Bob expects the receiver's,
the sender's averaged over his output distribution. If the two share random numbers, a message costs about
KL(sender's || receiver's). These costs, plus the bits of the image given Bob's last prediction, are the length of a
code; training makes it short. With no Alice, Bob makes up her messages from his predictions: a new image appears.

This file has, in this order, messages, types of data (grey values, continuous or discretized, and classes), loss,
sampler, likelihood bound and training loop. Sections and equations are those of Graves et al. 2023, Bayesian flow
networks, arXiv 2308.07037. Time t, [B] or 0-d, is in [0, 1]: at 0 Bob knows nothing of the image, at 1 nearly all (in
diffusion.py the image is at 0). t and labels are on the CPU.

Departures from the paper, best read last (`Discretized` has two more of its own):

1. The network is told the digit, so that the sampler can use classifier-free guidance (Ho & Salimans 2022, arXiv
   2207.12598), at middle noise levels only (Kynkäänniemi et al. 2024, arXiv 2404.07724). For this, one label in ten, at
   random, becomes common.NOT_TOLD in training (with `--no-labels`, all do): `main`, `guided_output`.
2. For grey values the network sees mu scaled to unit size and predicts v (Salimans & Ho 2022, arXiv 2202.00512),
   not eps; x_hat is not clipped in training. For classes theta is added to the network's output: `output`.
3. Fourier features (Kingma et al. 2021, arXiv 2107.00630) show the network small differences of grey values. They are
   of theta / beta, x plus noise, not of mu (the paper's code), where x is times gamma; and fade with noise: `output`.
4. Training (on grey values) and sampling use more early times, where a digit takes shape: `loss`, `times`.
5. The sampler's message is about x_hat, not about a draw from the output distribution: `sample`. `--sampler paper
   --guidance 1` samples as in the paper, but for a start at T_MIN.
6. For a short training: the learning rate rises over 200 updates and falls linearly to 0; AdamW's second beta is 0.99
   (paper's code, classes: 0.98); averaged weights (EMA), for sampler and bound, have decay 0.995, not 0.9999: `main`.
"""
import functools
import math

import torch
import torch.nn.functional as F

import common

T_MIN = 1e-5  # the earliest t: grey values' `output`, `guided_output` and the sampler "ode" divide by beta(t)


# -------------------------------------------------------------------------------------------------- the messages
# All three data types share one algorithm. A message of accuracy alpha about the data x (for classes, one-hot) is
#
#     y ~ N(alpha s(x), c alpha)          s(x) = x, c = 1 for grey values; s(x) = K x - 1, c = K for one of K classes
#
# (mean, variance). For classes this is eq. 157; for grey values eq. 86's message (x plus noise of variance 1 / alpha)
# times alpha. So Bayes' rule is an addition: theta (the paper's is the belief) sums up all messages so far, beta their
# accuracies. Bob's belief is, for grey values, a normal of mean mu = theta / (1 + beta) and precision 1 + beta (eq. 49,
# 50, prior N(0, 1)); for classes, softmax(theta) (eq. 171, uniform prior; ln p(y | k) = y_k + const).

def sender(data, x, alpha, eps):
    """Alice's message y about x, of accuracy alpha ([B] or one number), made from noise eps ~ N(0, I) of x's shape."""
    alpha = common.column(torch.as_tensor(alpha), x)
    return alpha * data.s(x) + (data.c * alpha).sqrt() * eps


def flow(data, x, t, eps):
    """A draw of theta at time t, from the Bayesian flow distribution: all messages up to t act as one, of accuracy
    beta(t). (Classes: eq. 185. Grey values: eq. 77, mu ~ N(gamma x, gamma (1 - gamma)) with gamma = beta / (1 + beta).)
    """
    return sender(data, x, data.beta(t), eps)


# --------------------------------------------------------------------------------------------- the types of data
#   encode(images) -> x, decode(x) -> images      images are in [-1, 1]; messages tell s(x), see above
#   beta(t), alpha(t)                             the accuracy of all messages up to t; accuracy per time, d beta / dt
#   belief(theta, t)                              the mean of the input distribution, for pictures
#   output(net, theta, t, label)                  the output distribution: the tensor of its parameters
#   mean(output), draw(output), nll(output, x)    its mean; a draw from it; -ln p(x) at t = 1, in nats, of each pixel
#   times(u), uniform_share                       times, mostly early, for u in [0, 1]; share of uniform t in training

class Continuous:
    """Grey values as real numbers (§4): x is the image, [B, 1, 28, 28] in [-1, 1]."""

    c = 1
    sigma_1 = 0.001  # the deviation of Bob's belief at t = 1; grey values are 0.0078 apart
    uniform_share = 0.25
    unit = "bits/dim"
    channels, in_channels, out_channels = 1, 1 + 16, 1  # of x; into the network (scaled mu, features); out of it (v)

    encode = decode = s = mean = draw = staticmethod(lambda x: x)  # x is the image; the output is x_hat itself

    def beta(self, t):
        """beta = sigma_1^(-2t) - 1: Bob's deviation is sigma_1^t. alpha = -2 ln(sigma_1) sigma_1^(-2t) (eq. 72, 74)"""
        return torch.expm1(-2 * math.log(self.sigma_1) * torch.as_tensor(t).double())

    def alpha(self, t):
        return -2 * math.log(self.sigma_1) * (1 + self.beta(t))

    def belief(self, theta, t):
        return theta / (1 + common.column(self.beta(t), theta))

    def output(self, net, theta, t, label):
        """x_hat (discretized data: a normal's mean and ln deviation). With gamma = beta / (1 + beta) the network sees
        z = mu / sqrt(gamma) = sqrt(gamma) x + sqrt(1 - gamma) eps, a diffusion model's x_t with gamma for alpha_bar. It
        says v = sqrt(gamma) eps - sqrt(1 - gamma) x. So x = sqrt(gamma) z - sqrt(1 - gamma) v = mu - sqrt(1 - gamma) v.
        (The paper predicts eps from mu, eq. 84. Early, mu is just eps scaled: predicting eps is copying; v is -x.)"""
        beta = common.column(self.beta(t), theta)
        mu, sigma = theta / (1 + beta), (1 + beta) ** -0.5  # mean and deviation, sqrt(1 - gamma), of Bob's belief
        features = common.fourier_features(theta / beta, beta ** -0.5)  # of x + eps / sqrt(beta)
        z = theta / (beta * (1 + beta)).sqrt()
        said = net(torch.cat([z, features], dim=1), t, label)  # v and, if discretized, ln(deviation / sigma)
        return torch.cat([mu - sigma * said[:, :1], (sigma.log() + said[:, 1:]).clamp(-12, 2)], dim=1)

    def nll(self, output, x):
        """For L_r, see `bound`: a normal of deviation sigma_1 around x_hat, cut into 256 grey values (§7.2)."""
        return common.discretized_normal_nll(x, output.clamp(-1, 1), self.sigma_1)

    def times(self, u):
        """1 - gamma = sigma_1^(2t) = sin^2(pi/2 (1 - u)), solved for t: diffusion.py's noise levels, backwards.
        (In the paper, t = u; but a digit takes shape before t = 0.1.)"""
        return (torch.sin(math.pi / 2 * (1 - u)).log() / math.log(self.sigma_1)).clamp(max=1)


class Discretized(Continuous):
    """Grey values as 256 numbers in [-1, 1] (§5): the output distribution is a normal, given by mean and ln deviation,
    [B, 2, 28, 28], and cut into bins, one for each value; the first and the last reach to infinity. (Value k lies at
    2 k / 255 - 1, as in DDPM; the paper cuts [-1, 1] into 256 equal bins. Its deviations are ours / sqrt(gamma).)"""

    out_channels = 2

    def mean(self, output):
        """The mean of X, the normal in grey values, rounded to 0..255; that is sum_{j=1..255} P(X > j - 1/2) (§5.5).
        If X's deviation is < 1 grey value, terms j <= near (the rounded mean) count as 1, the others as 0; the loop
        corrects the ten nearest. If it is larger: the mean of clip(X, 0, 255), off by 0.02 grey values at most."""
        Phi = torch.distributions.Normal(0.0, 1.0, validate_args=False).cdf
        m, sigma = (output[:, :1] + 1) * 127.5, output[:, 1:].exp() * 127.5
        narrow = near = m.detach().round().clamp(0, 255)
        for i in range(-5, 5):
            edge = near + i + 0.5  # j - 1/2
            narrow = narrow + (edge > 0) * (edge < 255) * (Phi((m - edge) / sigma) - int(i < 0))
        a, b = -m / sigma, (255 - m) / sigma
        phi_a, phi_b = [torch.exp(-z ** 2 / 2) / (2 * math.pi) ** 0.5 for z in (a, b)]
        wide = 255 + m * (Phi(b) - Phi(a)) - 255 * Phi(b) + sigma * (phi_a - phi_b)
        return torch.where(sigma < 1, narrow, wide) / 127.5 - 1

    def draw(self, output):
        grey = (output[:, :1] + output[:, 1:].exp() * common.randn_like(output[:, :1]) + 1) * 127.5
        return grey.round().clamp(0, 255) / 127.5 - 1

    def nll(self, output, x):
        return common.discretized_normal_nll(x, output[:, :1], output[:, 1:].exp())


class Discrete:
    """Pixels as one of K classes (§6): x is one-hot, [B, K, 28, 28]; the output distribution is given by logits."""

    beta_1 = 9.0  # beta(1); 3 ** 2 as in the paper's released configuration
    uniform_share = 1.0
    unit = "nats/image"

    def __init__(self, K=2):
        self.K = self.c = self.channels = self.in_channels = self.out_channels = K

    def encode(self, images):
        """A grey value between two classes becomes one of them at random, mostly the nearer: for K = 2, white
        with probability (grey value + 1) / 2 (dynamic binarisation)."""
        value = (images + 1) / 2 * (self.K - 1) + torch.rand(images.shape).to(images.device)
        classes = value.floor().clamp(0, self.K - 1).long()
        return F.one_hot(classes[:, 0], self.K).movedim(-1, 1).float()

    def decode(self, x):
        values = torch.linspace(-1, 1, self.K).view(1, -1, 1, 1).to(x.device)
        return (x * values).sum(1, keepdim=True)

    def s(self, x):
        return self.K * x - 1

    def beta(self, t):
        """beta(t) = beta(1) t^2, so that alpha(t) = d beta / dt = 2 beta(1) t (eq. 182, 183)"""
        return self.beta_1 * torch.as_tensor(t).double() ** 2

    def alpha(self, t):
        return 2 * self.beta_1 * torch.as_tensor(t).double()

    def belief(self, theta, t):
        return theta.softmax(1)

    def output(self, net, theta, t, label):
        """theta is what each pixel's own messages say of it; the network adds what all the others say."""
        return theta + net(2 * theta.softmax(1) - 1, t, label)

    def mean(self, output):
        return output.softmax(1)

    def draw(self, output):
        classes = torch.distributions.Categorical(logits=output.movedim(1, -1).cpu()).sample().to(output.device)
        return F.one_hot(classes, self.K).movedim(-1, 1).float()

    def nll(self, output, x):
        return -(x * output.log_softmax(1)).sum(1)

    def times(self, u):
        return u ** 1.5  # smaller steps early than the paper's t = u


TYPES = {"continuous": Continuous, "discretized": Discretized, "discrete": Discrete}


# -------------------------------------------------------------------------- the loss, the sampler, the likelihood

def loss_at(data, net, x, t, label, clip=math.inf):
    """L_inf's integrand at t, for a draw of theta, in nats, [B]. L_inf is the cost of infinitely many, infinitely small
    messages. If a message's accuracy a is small, its noise hides the spread of Bob's prediction: he expects about
    N(a s(x_hat), c a), and the KL divergence is a / (2 c) ||s(x) - s(x_hat)||^2. From t to t + dt, a = alpha(t) dt. So

    L_inf = E_{t, theta} alpha(t) / (2 c) ||s(x) - s(x_hat)||^2,  t uniform in [0, 1]

    which is -ln(sigma_1) E sigma_1^(-2t) ||x - x_hat||^2 (eq. 101) or K beta(1) E t ||x - x_hat||^2 (eq. 205)."""
    theta = flow(data, x, t, common.randn_like(x))
    x_hat = data.mean(data.output(net, theta, t, label)).clamp(-clip, clip)  # inf in training: a clamp stops gradients
    weight = common.column(data.alpha(t) / (2 * data.c), x)
    return (weight * (data.s(x) - data.s(x_hat)) ** 2).flatten(1).sum(1)


def loss(data, net, x, label):
    """The training loss of a batch, a scalar, per pixel (algorithms 2, 5, 8): L_inf; L_r (see `bound`) is small. But
    for grey values early times are drawn more often, with no weight to undo this, and so count more."""
    u = torch.rand(len(x))
    t = torch.where(torch.rand(len(x)) < data.uniform_share, u, data.times(u)).clamp(min=T_MIN)
    return loss_at(data, net, x, t, label).mean() / 784


def guided_output(data, net, theta, t, label, guidance):
    """The parameters of the output distribution at a 0-d t. Classifier-free guidance exaggerates what the label does:
    output_none + guidance (output - output_none), where guidance is 1 + w in its source; 1 turns it off. It acts if
    noise is 0.8 to 2.5 times the signal in theta: t = 0.01 to 0.07 for grey values, 0.2 to 0.6 for K = 2."""
    noise = (data.c / data.beta(t)) ** 0.5  # relative to the signal in theta: s(x) is about 1 in size
    t = t.expand(len(theta))
    output = data.output(net, theta, t, label)
    if guidance == 1 or not 0.8 < noise < 2.5:
        return output
    output_none = data.output(net, theta, t, torch.full_like(label, common.NOT_TOLD))
    return output_none + guidance * (output - output_none)


@torch.no_grad()
def sample(data, net, label, steps=1000, sampler="mean", guidance=1):
    """Turns noise into one image for each label [N]: yields belief, x_hat (as images [N, 1, 28, 28]) before each step,
    and last a draw from the output distribution in place of x_hat.

    "paper" is algorithms 3, 6 and 9, in even steps: Bob's message is about a draw from the output distribution (for
    continuous data, x_hat). In "mean" it is about x_hat, to which draws average over many small messages; few large
    ones leave grain. "ode" draws no new noise: it solves theta = flow(x_hat, t, eps) for eps and goes to flow(x_hat,
    t_next, eps). ("mean", "ode": Xue et al. 2024, arXiv 2404.15766, §4, §5.) All start with pure noise, at T_MIN."""
    eps = torch.randn(len(label), data.channels, 28, 28).to(next(net.parameters()).device)
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    times = T_MIN + (1 - T_MIN) * (u if sampler == "paper" else data.times(u))
    theta = (data.c * data.beta(T_MIN)).sqrt().item() * eps
    for t, t_next in zip(times[:-1], times[1:]):
        output = guided_output(data, net, theta, t, label, guidance)
        x_hat = data.mean(output).clamp(-1, 1)
        yield data.decode(data.belief(theta, t)), data.decode(x_hat)
        if sampler == "ode":
            beta = data.beta(t).item()
            eps = (theta - beta * data.s(x_hat)) / (data.c * beta) ** 0.5
            theta = flow(data, x_hat, t_next, eps)
        else:
            x = data.draw(output).clamp(-1, 1) if sampler == "paper" else x_hat
            y = sender(data, x, data.beta(t_next) - data.beta(t), common.randn_like(theta))
            theta = theta + y  # Bayes' rule
    x = data.draw(guided_output(data, net, theta, t_next, label, guidance)).clamp(-1, 1)
    yield data.decode(data.belief(theta, t_next)), data.decode(x)


@torch.no_grad()
def bound(data, net, images, label):
    """-ln p(x | label) <= L_inf + L_r, in nats. Each is estimated, [B], without bias and without guidance, with one
    draw of theta: L_inf, the messages' cost, at one t for each image; L_r, the reconstruction's, is `nll` at t = 1."""
    x = data.encode(images)
    t = (torch.rand(1) + torch.arange(len(x)) / len(x)) % 1  # each t is uniform; all together are evenly spread
    messages = loss_at(data, net, x, t.clamp(min=T_MIN), label, clip=1)
    t = torch.ones(len(x))
    output = data.output(net, flow(data, x, t, common.randn_like(x)), t, label)
    return {"messages": messages, "reconstruction": data.nll(output, x).flatten(1).sum(1)}


# ---------------------------------------------------------------------------------------------- the training loop

def main(argv=None):
    args = common.parse_args(__doc__, argv, ["mean", "paper", "ode"], list(TYPES))
    torch.manual_seed(args.seed)
    data = TYPES[args.data_type]()
    net = common.UNet(data.in_channels, data.out_channels).to(args.device)
    # the averaged weights, for sampler and bound; n_averaged counts the updates
    ema = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, betas=(0.9, 0.99))
    run = common.Run(args, "bfn-" + args.data_type, f"BFN ({args.data_type})", data.unit, "belief", net, ema, optimizer,
                     functools.partial(sample, data), functools.partial(bound, data),
                     real=lambda images: data.decode(data.encode(images)))
    if args.sample:
        return run.save_samples()

    while len(run.history) < args.epochs:  # an interrupted run goes on from its last finished epoch
        losses = []
        for images, label in run.batches():  # with --no-labels, all labels are NOT_TOLD
            update = int(ema.n_averaged) + 1
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(update / 200, 1 - (update - 1) / run.updates)
            label = torch.where(torch.rand(len(label)) < 0.1, common.NOT_TOLD, label)  # for guidance
            batch_loss = loss(data, net, data.encode(images), label)
            optimizer.zero_grad()
            batch_loss.backward()
            optimizer.step()
            ema.update_parameters(net)
            losses.append(batch_loss.item())
        run.end_epoch(losses)
    run.finish()


if __name__ == "__main__":
    common.run_script(main)
