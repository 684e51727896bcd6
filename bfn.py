# /// script
# requires-python = ">=3.9"
# dependencies = ["torch>=2.2", "torchvision>=0.17", "matplotlib"]
# ///
"""A Bayesian Flow Network (BFN) of MNIST digits: training, sampling and likelihood, for three types of data.

    python bfn.py --data-type continuous      (the default; or discretized, or discrete; --help lists the flags)

Alice sends Bob an image x in noisy messages y, drawn from the sender distribution. By Bayes' rule, the sum theta of all
messages about a pixel gives Bob's belief about this pixel, the input distribution. A network sees the beliefs about all
pixels and predicts each pixel: the output distribution, of mean x_hat. Bob expects messages from the receiver
distribution: the sender distribution, averaged over the output distribution. A message costs KL(sender || receiver)
nats, and training makes messages cheap. To sample, there is no Alice: Bob makes up her messages from his predictions.

Sections, equations and algorithms are those of Graves et al. 2023, Bayesian Flow Networks, arXiv 2308.07037.
Time t, [B] or 0-d, goes from 0 (Bob knows nothing) to 1 (he knows the image almost exactly); label is int64 [B].
"""
import functools
import math

import torch

import common

T_MIN = 1e-5  # before it, beta(t) is constant: at 0, there is no theta / beta (in the paper, x_hat = 0 before a t_min)


# -------------------------------------------------------------------------------------------------- the messages
# All three types of data share one algorithm. A message of accuracy alpha about x is
#
#     y ~ N(alpha s(x), c alpha I)        s(x) = x, c = 1 for grey values; s(x) = K x - 1, c = K for one of K classes
#
# For classes (one-hot) this is eq. 157. For grey values, the paper's message is y / alpha, which is x with noise of
# variance 1 / alpha (eq. 86). Bayes' rule becomes an addition, theta' = theta + y: theta is the sum of all messages so
# far, and beta their total accuracy. Bob's belief is, for grey values, a Gaussian of mean mu = theta / (1 + beta) and
# precision 1 + beta (eq. 49, 50; prior N(0, 1)), for classes softmax(theta) (eq. 171; uniform prior). (The paper
# calls the belief theta.) theta / beta is s(x) with noise of std sigma = sqrt(c / beta), the noise level.

def sender(data, x, alpha, eps):
    """A message y about x of accuracy alpha, [B, 1, 1, 1], made from noise eps ~ N(0, I) of x's shape."""
    return alpha * data.s(x) + (data.c * alpha).sqrt() * eps


def flow(data, x, t, eps):
    """A draw of theta at t from the Bayesian flow distribution: all messages up to t act as one, of accuracy beta(t).
    (Classes: eq. 185. Grey values: eq. 77, mu ~ N(gamma x, gamma (1 - gamma) I) with gamma = beta / (1 + beta).)"""
    return sender(data, x, data.beta(t), eps)


# --------------------------------------------------------------------------------------------- the types of data
#   encode(images) -> x, decode(x) -> images      images are float [B, 1, 28, 28] in [-1, 1]; for s(x) and c see above
#   beta(t), alpha(t)                             total accuracy at t (see T_MIN), and d beta / dt: [B, 1, 1, 1]
#   belief(theta, t)                              the mean of the input distribution
#   output(net, theta, t, label)                  the parameters of the output distribution
#   mean(output), draw(output), nll(output, x)    its mean x_hat; a draw from it; -ln p(x) of each pixel, in nats

class Continuous:
    """Grey values as real numbers (§4): x is the image; the output is x_hat, not yet clipped, [B, 1, 28, 28]."""

    unit = "bits/dim"
    c = channels = out_channels = 1  # channels are those of x, out_channels those of the network
    sigma_1 = 0.001  # std of Bob's belief at t = 1
    warp = 4  # of time, see `loss`

    encode = decode = s = staticmethod(lambda x: x)

    def beta(self, t):
        """beta = sigma_1^(-2t) - 1: the std of Bob's belief, (1 + beta)^(-1/2), is sigma_1^t (eq. 72)."""
        return torch.expm1(-2 * math.log(self.sigma_1) * t.clamp(min=T_MIN).view(-1, 1, 1, 1))

    def alpha(self, t):
        return -2 * math.log(self.sigma_1) * (1 + self.beta(t))  # eq. 74

    def belief(self, theta, t):
        return theta / (1 + self.beta(t))

    def output(self, net, theta, t, label):
        """The network predicts eps in theta / beta = x + sigma eps; x_hat = theta / beta - sigma eps (eq. 84).

        Not in the paper: in place of mu and t, it sees theta / beta, scaled to unit size, and sigma."""
        sigma = self.beta(t) ** -0.5
        view = theta / self.beta(t)
        prediction = net(view / (1 + sigma ** 2).sqrt(), sigma, label)
        eps, ln_std = prediction[:, :1], prediction[:, 1:]  # ln_std is empty unless Discretized
        return torch.cat([view - sigma * eps, sigma.log() + ln_std], dim=1)

    def mean(self, output):
        return output.clamp(-1, 1)  # as in the paper

    draw = mean

    def nll(self, output, x):
        return common.discretized_normal_nll(x, self.mean(output), self.sigma_1)  # at t = 1 (§7.2)


class Discretized(Continuous):
    """Grey values as 256 numbers (§5), 2 k / 255 - 1 for k = 0..255 (in the paper: the middles of 256 equal bins). The
    output is mean and ln std, [B, 2, 28, 28], of a Gaussian that is discretized."""

    out_channels = 2

    def mean(self, output):
        return common.discretized_normal_mean(output[:, :1], output[:, 1:].exp())

    def draw(self, output):
        x = output[:, :1] + output[:, 1:].exp() * torch.randn_like(output[:, :1])
        return ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1

    def nll(self, output, x):
        return common.discretized_normal_nll(x, output[:, :1], output[:, 1:].exp())


class Discrete:
    """Pixels as one of K classes (§6), black and white: x is one-hot, the output is logits, both [B, K, 28, 28]."""

    unit = "nats/image"
    K = c = channels = out_channels = 2
    beta_1 = 9  # beta(1), as in the paper's code
    warp = 1.5

    def encode(self, images):
        white = torch.rand_like(images) < (images + 1) / 2  # dynamic binarisation
        return torch.cat([~white, white], dim=1).float()

    def decode(self, x):
        return 2 * x[:, 1:] - 1

    def s(self, x):
        return self.K * x - 1

    def beta(self, t):
        return self.beta_1 * t.clamp(min=T_MIN).view(-1, 1, 1, 1) ** 2  # eq. 182

    def alpha(self, t):
        return 2 * self.beta_1 * t.view(-1, 1, 1, 1)  # eq. 183

    def belief(self, theta, t):
        return theta.softmax(1)

    def output(self, net, theta, t, label):
        """Not in the paper: in place of t, the network is given sigma. theta is added to its output: theta holds a
        pixel's own messages, so the network need only add what the other pixels tell."""
        return theta + net(2 * self.belief(theta, t) - 1, (self.K / self.beta(t)).sqrt(), label)

    def mean(self, output):
        return output.softmax(1)

    def draw(self, output):
        return torch.distributions.OneHotCategorical(logits=output.movedim(1, -1)).sample().movedim(-1, 1)

    def nll(self, output, x):
        return -(x * output.log_softmax(1)).sum(1)


TYPES = {"continuous": Continuous, "discretized": Discretized, "discrete": Discrete}


# ------------------------------------------------------------------------------------------------------- the loss
def loss_at(data, net, x, t, label):
    """The integrand of L_inf for a draw of theta at t, in nats, [B]. L_inf is the cost of infinitely many, infinitely
    small messages. As alpha -> 0, the receiver distribution tends to N(alpha s(x_hat), c alpha I), and the KL to
    alpha / (2 c) ||s(x) - s(x_hat)||^2. From t to t + dt, the accuracy is alpha(t) dt. So

    L_inf = E_{t, theta} alpha(t) / (2 c) ||s(x) - s(x_hat)||^2,  t uniform in [0, 1]

    which is -ln(sigma_1) E sigma_1^(-2t) ||x - x_hat||^2 (eq. 101) or K beta(1) E t ||x - x_hat||^2 (eq. 205)."""
    theta = flow(data, x, t, torch.randn_like(x))
    x_hat = data.mean(data.output(net, theta, t, label))
    return (data.alpha(t) / (2 * data.c) * (data.s(x) - data.s(x_hat)) ** 2).flatten(1).sum(1)


def loss(data, net, x, label):
    """Algorithms 2, 5, 8: L_inf per pixel, a scalar. (L_r, see `bound`, is small, and left out.)

    Not in the paper: t is u^warp with uniform u, and the loss is not reweighted to make up for it. So early times, when
    a digit takes shape (for grey values, t < 0.1), count more than in L_inf, and digits are better."""
    t = torch.rand(len(x), device=x.device) ** data.warp
    return loss_at(data, net, x, t, label).mean() / 784


# ---------------------------------------------------------------------------------------------------- the sampler
@torch.no_grad()
def sample(data, net, label, steps, sampler):
    """Draws an image for each label [N]. Yields (belief, x_hat), each [N, 1, 28, 28], before each step, and last
    (belief, a draw from the output distribution). The sampler "paper" is algorithms 3, 6, 9: evenly spaced times, and
    messages about draws from the output distribution (for continuous data, x_hat).

    Not in the paper: the samplers "mean" and "ode" (after Xue et al. 2024, arXiv 2404.15766) need fewer steps. Their
    times are u^warp, as in training. "mean" sends messages about x_hat (for continuous data, "paper" does so too).
    "ode" adds no noise: it solves theta = flow(x_hat, t, eps) for eps, and goes to flow(x_hat, t_next, eps)."""
    u = torch.linspace(0, 1, steps + 1, device=label.device)
    times = u if sampler == "paper" else u ** data.warp
    eps = torch.randn(len(label), data.channels, 28, 28, device=label.device)
    theta = (data.c * data.beta(times[0])).sqrt() * eps  # `flow` at T_MIN, where s(x) is negligible
    for t, t_next in zip(times[:-1], times[1:]):
        output = data.output(net, theta, t, label)
        x_hat = data.mean(output)
        yield data.decode(data.belief(theta, t)), data.decode(x_hat)
        if sampler == "ode":
            eps = (theta - data.beta(t) * data.s(x_hat)) / (data.c * data.beta(t)).sqrt()
            theta = flow(data, x_hat, t_next, eps)
        else:
            x = data.draw(output) if sampler == "paper" else x_hat
            y = sender(data, x, data.beta(t_next) - data.beta(t), torch.randn_like(theta))
            theta = theta + y  # Bayes' rule
    x = data.draw(data.output(net, theta, times[-1], label))
    yield data.decode(data.belief(theta, times[-1])), data.decode(x)


# ------------------------------------------------------------------------------------------------- the likelihood
@torch.no_grad()
def bound(data, net, images, label):
    """Estimates, [B], of an upper bound on -ln p(x | label) in nats: L_inf, the cost of the messages, plus L_r, that
    of the image itself, given Bob's last prediction."""
    x = data.encode(images)
    t = torch.rand(len(x), device=x.device)
    messages = loss_at(data, net, x, t, label)
    t = torch.ones_like(t)
    output = data.output(net, flow(data, x, t, torch.randn_like(x)), t, label)
    return messages + data.nll(output, x).flatten(1).sum(1)


# ---------------------------------------------------------------------------------------------- the training loop
def main(argv=None):
    args = common.parse_args(__doc__, argv, samplers=["mean", "paper", "ode"], data_types=list(TYPES))
    torch.manual_seed(args.seed)
    data = TYPES[args.data_type]()
    net = common.UNet(data.channels, data.out_channels, labels=not args.no_labels).to(args.device)
    ema = common.ema(net)  # averaged weights, for sampling and evaluation
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    # Not in the paper: classifier-free guidance, which makes digits clearer (Ho & Salimans 2022, arXiv 2207.12598)
    sample_digits = functools.partial(sample, data, common.guided(ema, args.guidance), sampler=args.sampler)
    name = "bfn-" + args.data_type
    if args.sample:
        return common.save_samples(name, ema, sample_digits, args)

    dataset, train, test = common.load_data(args.dataset, args.data_dir, args.seed, args.limit)
    run = common.Run(args, name=name, title=f"BFN ({args.data_type})", unit=data.unit,
                     dataset=dataset, net=net, ema=ema, optimizer=optimizer)
    for epoch in range(len(run.history) + 1, args.epochs + 1):  # an interrupted run goes on where it was
        losses = []
        for images, label in run.batches(*train):
            # Not in the paper: labels, which make digits far better. A tenth become the null label, for guidance
            label = label.masked_fill(torch.rand(label.shape, device=label.device) < 0.1, common.NULL_LABEL)
            batch_loss = loss(data, net, data.encode(images), label)
            optimizer.zero_grad()
            batch_loss.backward()
            optimizer.step()
            ema.update_parameters(net)
            losses.append(batch_loss.item())
        preview = common.draw(sample_digits, common.PREVIEW_LABELS, args)
        run.end_epoch(losses, test=common.estimate(functools.partial(bound, data, ema), test, run), preview=preview)
        common.save_grids(run.folder / f"epochs/epoch_{epoch:03}.png", {"": preview}, f"{run.title}, epoch {epoch}")

    final = common.evaluate(run, functools.partial(bound, data, ema), sample_digits, train, test,
                            real=lambda images: data.decode(data.encode(images)))
    common.save_results(run, final, trace=common.draw_process(sample_digits, args))
    common.compare(args.out_dir, name)


if __name__ == "__main__":
    common.run_script(main)
