# /// script
# requires-python = ">=3.10"
# dependencies = ["torch", "torchvision", "matplotlib"]
# ///
"""A Bayesian Flow Network (BFN) of MNIST: trains it, samples from it, measures it, for three types of data.

    python bfn.py                             (`python bfn.py --help` lists the flags)
    python bfn.py --data-type discrete

Alice sends Bob an image in messages, each of them the image under noise; how much a message tells is its accuracy (for
grey values, the inverse of its noise's variance). Bob has a belief about each pixel on its own (the input distribution,
with parameters theta) and improves it with each message by Bayes' rule. A network looks at all of these beliefs
together and guesses the image (the output distribution). A message costs the fewer bits the better he guessed what it
would say, and so the network's errors add up to the length of a code for the image. With no Alice, Bob makes up her
messages from his own guesses, and a new image appears.

This file is all of it but the network, in this order: the three types of data, each a small class with the same
methods; the loss; the sampler; the likelihood bound; the training loop. Section and equation numbers are those of

    BFN     Graves et al. 2023, Bayesian flow networks, arXiv 2308.07037                  (where no other is named)
    Solver  Xue et al. 2024, Unifying Bayesian flow networks and diffusion models ..., arXiv 2404.15766
    PD      Salimans & Ho 2022, Progressive distillation for fast sampling of diffusion models, arXiv 2202.00512
    SC      Chen et al. 2022, Analog bits: ... diffusion models with self-conditioning, arXiv 2208.04202
    AG      Karras et al. 2024, Guiding a diffusion model with a bad version of itself, arXiv 2406.02507

Time t is float [B] in [0, 1]: at 0 Bob knows nothing of the image, at 1 nearly everything. (In diffusion.py,
1 is noise.)
"""
import functools
import math

import torch
import torch.nn.functional as F

import common

SAMPLERS = {"Bayesian updates": False, "ODE": True}  # name: deterministic
T_0 = 1e-5  # times start here, not at 0, where the continuous belief scaled to unit noise would be 0 / 0


# --------------------------------------------------------------------------------------------- the types of data
# Each has the same methods:
#   encode(images) -> x             picture(x) -> images         x is the data as messages carry it
#   beta(t), alpha(t)               the accuracy of all messages up to t together; its slope, accuracy per unit of time
#   flow(x, eps, t) -> theta        what Bob believes after all messages up to t, with eps ~ N(0, 1) for all their noise
#   implied_eps(theta, x, t)        the other way round: the eps with which flow makes theta
#   first_belief(eps)               theta at T_0, before any message to speak of
#   update(theta, x, eps, t, s)     theta at s, from theta at t and one message about x with noise eps
#   belief(theta) -> x              the mean of what Bob believes, for pictures
#   output(net, theta, t, previous) the output distribution, given a previous guess of x, or zeros where there is none:
#                                   x_hat, or mean and deviation, or logits
#   guess(output)                   its mean, within the range of x
#   guidance_weight(t)              how far the sampler is led away from the output of a worse network, 1 for not at all
#   guided(output, worse, w)        the guess of an output, led so far away from a worse output (common.guidance)
#   draw(guess)                     x itself, of the last guess: for classes a draw, for grey values the guess as it is
#   cost(x, output)                 -ln p(x | theta), the nats that x costs at the end
#   times(u), training_times(u)     times to sample and to train at, for u in [0, 1]
#   training_error(x, output)       what training makes small at each time

class Continuous:
    """Grey pixels as real numbers in [-1, 1] (§4). theta is mu, [B, 1, 28, 28]: Bob believes in N(mu, 1 / rho), where
    rho = 1 + beta(t) is known from t. At t = 1 its deviation is sigma_1 = 0.001, and grey values are 0.0078 apart."""

    sigma_1 = 0.001
    scale = 1  # of the error in the loss: for classes it is K
    channels = 1               # of x
    in_channels = 1 + 1 + 16   # of the network: mu, a previous guess, Fourier features of mu
    out_channels = 1           # v
    unit, nats_per_unit = "bits/dim", 784 * math.log(2)

    def encode(self, images):
        """float [B, 1, 28, 28] in [-1, 1] -> x, the same."""
        return images

    def picture(self, x):
        """x or a guess of it -> images in [-1, 1], [B, 1, 28, 28]."""
        return x

    def belief(self, mu):
        """theta -> the mean of the input distribution, a guess of x."""
        return mu

    def beta(self, t):
        """beta(t) = sigma_1^(-2t) - 1                                                                  eq. 72, §4.5"""
        return torch.expm1(-2 * t * math.log(self.sigma_1))

    def alpha(self, t):
        """alpha(t) = d beta / dt = -2 ln(sigma_1) sigma_1^(-2t)                                        eq. 74, §4.5"""
        return -2 * math.log(self.sigma_1) * self.sigma_1 ** (-2 * t)

    def shares(self, t):
        """gamma(t) = beta / (1 + beta) = 1 - sigma_1^(2t), and 1 - gamma: in mu, the weights of all messages, and of
        the first belief, whose mean is 0; [B, 1, 1, 1] for t of [B]                                    eq. 80, §4.6"""
        log = 2 * common.column(t) * math.log(self.sigma_1)
        return -torch.expm1(log), torch.exp(log)

    def flow(self, x, eps, t):
        """All messages up to t at once: mu ~ N(gamma x, gamma (1 - gamma)), made from eps ~ N(0, 1)   eq. 77, §4.6"""
        gamma, rest = self.shares(t)
        return gamma * x + (gamma * rest).sqrt() * eps

    def implied_eps(self, mu, x, t):
        gamma, rest = self.shares(t)
        return (mu - gamma * x) / (gamma * rest).sqrt()

    def first_belief(self, eps):
        """mu at T_0: noise of next to no accuracy, without the image's part in it, which is a hundredth of it."""
        return self.flow(0, eps, torch.full((len(eps),), T_0, device=eps.device))

    def update(self, mu, x, eps, t, s):
        """Bayes' rule for a message y about x, of the accuracy alpha that is missing between t and s:

        y ~ N(x, 1 / alpha), alpha = beta(s) - beta(t)                                                  eq. 86, §4.8
        rho_s = rho_t + alpha;  mu_s = (rho_t mu + alpha y) / rho_s                                 eq. 49, 50, §4.2
        """
        alpha = common.column(self.beta(s) - self.beta(t))
        rho_t = 1 + common.column(self.beta(t))
        return (rho_t * mu + alpha * x + alpha.sqrt() * eps) / (rho_t + alpha)

    def times(self, u, spacing="cosine"):
        """Sampling times, from T_0 to 1, for u spread evenly over [0, 1].

        "paper": t = u. But the shape of a digit is settled before t = 0.2: four fifths of the paper's times are spent
        on what is finer. "cosine": the noise levels of a diffusion model's cosine schedule at 1 - u. Either is
        Bayes' rule: accuracies add up (§4.4), so that one message does what several about the same x would.
        """
        if spacing == "cosine":  # 1 - gamma = sigma_1^(2t) = sin^2(pi/2 (1 - u)), solved for t
            u = torch.sin(math.pi / 2 * (1 - u)).log() / math.log(self.sigma_1)
        return u.clamp(T_0, 1)

    def training_times(self, u):
        """Times to train at, for u uniform in [0, 1]: one in four as in the paper, the others at the noise levels at
        which diffusion.py trains.

        They are not reweighted: the mean is no longer the paper's loss, but favours shapes. An earlier network, with
        times(u) for the others, came in 1.5 epochs to 1.160 bits/dim and a Frechet distance of 60 (1000 images) with
        half of the times as in the paper, and to 1.194 and 35 with a quarter.
        """
        return torch.where(torch.arange(len(u)) % 4 == 0, u, self.times(1 - u ** (2 / 3)))

    def training_error(self, x, output):
        """What training makes small at each time, [B]: the squared error, the paper's."""
        return squared_error(self, x, output)

    def predict(self, net, mu, t, previous):
        """What the network says of mu, [B, out_channels, 28, 28].

        It sees mu / sqrt(gamma) = sqrt(gamma) x + sqrt(1 - gamma) eps, which is a diffusion model's x_t with gamma for
        alpha_bar, and of unit size at all times. It says v = sqrt(gamma) eps - sqrt(1 - gamma) x (PD §4), of unit size
        as well. The paper's network sees mu and predicts eps (§4.7). But late, eps is noise of 0.001 on pixels of 1,
        too small to see; and early, mu is nothing but eps, and finding it teaches nothing of the image.
        """
        gamma, rest = self.shares(t)
        features = common.fourier_features(mu / gamma, (rest / gamma).sqrt())
        return net(torch.cat([mu / gamma.sqrt(), previous, features], dim=1), t)

    def output(self, net, mu, t, previous):
        """x_hat = mu / gamma - sqrt((1 - gamma) / gamma) eps (eq. 84, §4.7), which in terms of v is

        x_hat = mu - sqrt(1 - gamma) v
        """
        return mu - self.shares(t)[1].sqrt() * self.predict(net, mu, t, previous)

    def guess(self, output):
        return common.clip(output)

    def guidance_weight(self, t):
        """The number w at time t, [B], all entries equal. The guide leads between t = 0.004 and 0.05, at the noise
        levels that diffusion.py has between t = 0.50 and 0.84."""
        gamma, rest = self.shares(t[:1])
        return common.guidance_weight((rest / gamma).sqrt())  # noise over image in mu

    def guided(self, output, worse, w):
        guess = self.guess(output)
        return common.clip(guess + common.guidance(guess, self.guess(worse), w))

    def draw(self, guess):
        return guess

    def cost(self, x, output):
        """-ln p(x | theta) in nats, [B], at t = 1: a normal of deviation sigma_1, cut into 256 bins (§7.2)."""
        return common.discretised_normal_nats(x, self.guess(output), self.sigma_1).flatten(1).sum(1)


class Discretized(Continuous):
    """Grey pixels as 256 values in [-1, 1] (§5): as continuous data, but the network gives a normal for each pixel,
    whose mass goes to the nearest grey values, that beyond the lowest or the highest to these two. The bins are those
    of DDPM (arXiv 2006.11239, eq. 13), so that all bounds in bits/dim speak of the same 256 values. The mean is made of
    v as in Continuous, and the deviation is scaled to match (§5.1 has both for a network that gives eps)."""

    out_channels = 2

    def output(self, net, mu, t, previous):
        """Mean and deviation of the normal: the x_hat of Continuous, and sqrt(1 - gamma) exp(network), the network's
        part within -5..5."""
        v, log_sigma = self.predict(net, mu, t, previous).chunk(2, dim=1)
        noise = self.shares(t)[1].sqrt()
        return mu - noise * v, noise * log_sigma.clamp(-5, 5).exp()

    def guess(self, output):
        return common.expected_grey(*output)

    def guidance_weight(self, t):
        """As in Continuous, but 2: with 5/2, a classifier was less than 90% sure of 4.8% of 1000 digits, not of 5.3%,
        but their Frechet distance was 18.6 instead of 12.2 (with a sampler of first order)."""
        return min(super().guidance_weight(t), 2.0)

    def cost(self, x, output):
        """-ln p(x | theta) in nats, [B], at t = 1."""
        return common.discretised_normal_nats(x, *output).flatten(1).sum(1)


class Discrete:
    """Pixels as one of K classes (§6). x and theta are [B, K, 28, 28]: x has a 1 at the class and 0 elsewhere; theta
    is kept as logits z, and the belief is softmax(z)."""

    # As in the paper's released configuration; its text has 3. There was no difference to be seen: after 1.5 epochs, an
    # earlier network had 86.1 +- 0.3 nats with 3, and 86.5 +- 0.3 with 9.
    beta_1 = 9.0
    unit, nats_per_unit = "nats/image", 1.0

    def __init__(self, K=2):
        self.K = self.scale = K
        self.channels, self.in_channels, self.out_channels = K, K + K, K  # the network's: belief, a guess; logits

    def encode(self, images):
        """float [B, 1, 28, 28] in [-1, 1] -> x. A grey value between two classes becomes one of them at random, the
        nearer the likelier: for K = 2 this is dynamic binarisation, white with the grey value as its probability."""
        value = (images + 1) / 2 * (self.K - 1)
        classes = (value + torch.rand(value.shape).to(value.device)).floor().clamp(0, self.K - 1).long()
        return F.one_hot(classes[:, 0], self.K).movedim(-1, 1).float()

    def picture(self, x):
        """x or a guess of it, the classes' probabilities -> images in [-1, 1], [B, 1, 28, 28]."""
        values = torch.linspace(-1, 1, self.K, device=x.device).view(1, -1, 1, 1)
        return (x * values).sum(1, keepdim=True)

    def belief(self, z):
        """theta -> the mean of the input distribution, a guess of x."""
        return z.softmax(1)

    def beta(self, t):
        """beta(t) = beta(1) t^2                                                                   eq. 182, §6.8"""
        return self.beta_1 * t ** 2

    def alpha(self, t):
        """alpha(t) = d beta / dt = 2 beta(1) t                                                     eq. 183, §6.8"""
        return 2 * self.beta_1 * t

    def flow(self, x, eps, t):
        """All messages up to t at once: z ~ N(beta (K x - 1), beta K), made from eps ~ N(0, 1)       eq. 185, §6.9"""
        beta = common.column(self.beta(t))
        return beta * (self.K * x - 1) + (beta * self.K).sqrt() * eps

    def first_belief(self, eps):
        """z at T_0: next to nothing. K x - 1 is 0 for x = 1 / K, which favours no class."""
        return self.flow(1 / self.K, eps, torch.full((len(eps),), T_0, device=eps.device))

    def implied_eps(self, z, x, t):
        beta = common.column(self.beta(t))
        return (z - beta * (self.K * x - 1)) / (beta * self.K).sqrt()

    def update(self, z, x, eps, t, s):
        """Bayes' rule for a message y about x, of the accuracy alpha that is missing between t and s:

        y ~ N(alpha (K x - 1), alpha K), alpha = beta(s) - beta(t)                                     eq. 157, §6.3
        theta_s proportional to exp(y) theta_t, that is z_s = z_t + y                                           §6.5
        """
        alpha = common.column(self.beta(s) - self.beta(t))
        return z + alpha * (self.K * x - 1) + (alpha * self.K).sqrt() * eps

    def times(self, u, spacing="early"):
        """Sampling times, from T_0 to 1, for u spread evenly over [0, 1].

        "paper": t = u. "early": t = u^(3/2), which spends more of the steps where shapes are settled. A network of 20
        epochs, with messages about draws and without the guide, drew 2000 digits in 50 steps with a Frechet distance of
        24 at the paper's times, and of 17 at these.
        """
        return (u ** 1.5 if spacing == "early" else u).clamp(T_0, 1)

    def training_times(self, u):
        """Times to train at, for u uniform in [0, 1]: the paper's."""
        return u

    def training_error(self, x, output):
        """What training makes small at each time, [B]: the cross-entropy in place of the paper's squared error. Both
        are smallest for the same guess, the true probabilities; but the squared error of a softmax has next to no
        gradient where a guess is sure and wrong. After 1.5 epochs the bound was 86.1 instead of 87.1 nats, after 20
        81.6 instead of 81.8."""
        return self.cost(x, output)

    def output(self, net, z, t, previous):
        """Logits of the output distribution. z is what a pixel's own messages say of it; the network adds what all the
        others say. (The paper's network gives the whole of it, §6.2.)"""
        return z + net(torch.cat([2 * z.softmax(1) - 1, previous], dim=1), t)

    def guess(self, output):
        return output.softmax(1)

    def guidance_weight(self, t):
        """As in Continuous, but 2, and between t = 0.1 and 0.8. With 3/2 at all times, a classifier was less than 90%
        sure of 9.2% of 1000 digits, with this of 7.1%; their Frechet distance was 9.4 and 9.7 (first-order sampler)."""
        return 2.0 if 0.1 < t[0] < 0.8 else 1.0

    def guided(self, output, worse, w):
        """Led in logits: the probabilities become p^w / worse^(w - 1), normalised."""
        return self.guess(output + common.guidance(output, worse, w))

    def draw(self, guess):
        """A class for each pixel, with the probabilities of the guess: the first of K events at those rates."""
        arrival = torch.empty(guess.shape).exponential_().to(guess.device) / guess
        return F.one_hot(arrival.argmin(1), self.K).movedim(-1, 1).float()

    def cost(self, x, output):
        """-ln p(x | theta) in nats, [B], at t = 1."""
        return -(x * output.log_softmax(1)).flatten(1).sum(1)


TYPES = {"continuous": Continuous, "discretized": Discretized, "discrete": Discrete}


# ------------------------------------------------------------------------------------------------------ the loss

def look_twice(net, data, theta, t, count):
    """data.output with a second look for the first `count` images: the network sees theta, then theta and its guess.

    This is self-conditioning (SC), as in diffusion.py: in training a quarter of the images get a second look, with no
    gradient through the first; sampler and bound always look twice. Returns an output, as data.output does.
    """
    previous = torch.zeros_like(theta)
    with torch.no_grad():
        first = data.output(net, theta[:count], t[:count], torch.zeros_like(theta[:count]))
        previous[:count] = data.guess(first)
    return data.output(net, theta, t, previous)


def squared_error(data, x, output):
    """||x - guess||^2 of each image, [B]."""
    return (x - data.guess(output)).square().flatten(1).sum(1)


def loss_per_image(net, data, x, t, count, training=False):
    """What Alice's messages cost at time t, in nats per unit of time, [B]: the mean over t uniform in [0, 1] is the
    cost of all of them. x: as data.encode gives it; t: [B]; count: as in look_twice.

    Bob expects a message about his guess, and Alice sends one about x. To code hers as if it were his costs the KL
    divergence of the two, for weak messages accuracy / 2 ||x - guess||^2 nats (times K for classes). With infinitely
    many messages, those from t to t + dt have the accuracy alpha(t) dt:

    L_inf = E_t  scale / 2  alpha(t) ||x - guess(theta, t)||^2

    For continuous data this is  -ln(sigma_1) E_t sigma_1^(-2t) ||x - x_hat||^2   (eq. 101; discretized: §5.5),
    for discrete data            K beta(1) E_t t ||x - e_hat||^2                  (eq. 205).

    As alpha (1 - gamma) = -2 ln(sigma_1) at all t, the loss of continuous data is -ln(sigma_1) ||v - v_net||^2, as long
    as no guess is clipped: a diffusion model's but for a constant factor, and for the times at which they look.

    In training, data.training_error stands in for the squared error, and the result is no longer in nats.
    """
    t = t.clamp(min=T_0)
    theta = data.flow(x, common.randn_like(x), t)
    output = look_twice(net, data, theta, t, count)
    error = data.training_error(x, output) if training else squared_error(data, x, output)
    return data.scale / 2 * data.alpha(t) * error


def loss(net, data, images):
    """The training loss of a batch of images, float [B, 1, 28, 28] in [-1, 1]: a scalar, per pixel. It is not the
    bound, because of data.training_times and data.training_error."""
    t = data.training_times(common.stratified(len(images))).to(images.device)
    return loss_per_image(net, data, data.encode(images), t, len(images) // 4, training=True).mean() / 784


# --------------------------------------------------------------------------------------------------- the sampler

def guided_guess(net, guide, data, theta, t):
    """The guess of x with which the sampler goes on: that of two looks, and, where data.guidance_weight says so, led
    away from the first look of a worse network. The worse one, the guide, is the same network as it was after the first
    epoch. It makes the same mistakes, but larger ones, so that the way from its guess to the better one leads on to one
    better still.

    guess + (w - 1) (guess - worse), for classes in logits         AG: `common.guidance`; for w, see the types of data
    """
    output = look_twice(net, data, theta, t, len(theta))
    w = data.guidance_weight(t)
    if w == 1:
        return data.guess(output)
    return data.guided(output, data.output(guide, theta, t, torch.zeros_like(theta)), w)


def bayesian_flow(net, guide, data, eps, times, deterministic=False):
    """From a belief that knows nothing to an image: yields (t, theta, guess) at each of `times`, from T_0 up to 1,
    float64 [steps + 1]. There is one guess more than there are steps: the last, at t = 1.

    eps, [N, C, 28, 28] ~ N(0, 1), is the noise in the first belief, of accuracy next to nothing. On each step from t
    to s, x is the guess expected in the middle of the step, from the guesses at t and at the step before:

    x = guess + (guess - last guess) / 2                                                      `common.half_a_step_on`

    It may leave its range a little. Then, either

    - Bob makes up a message about x: theta_s = update(theta_t, x, noise) (algorithm 3). Accuracies add up (§4.4,
      §6.7), so that a step may have any length;
    - or theta moves to where it would be at s if the image were x and the noise in theta_t the same: this solves the
      ODE of Solver §4 and §5, which leads through the same distributions without fresh noise.

    With the guess at t for x, this would be of first order: of 1000 digits of discrete data in 50 steps, without the
    guide, the Frechet distance was 19.8 with that, and 12.5 with x.

    For discretized and discrete data, the paper's message is about a draw from the output distribution (algorithms 6,
    9). With ever more steps that comes to the same; with few, it is speckle, as each pixel is drawn on its own (for
    classes, Solver §5 leaves the draws out as well). Without the guide, and with first order, 1000 digits in 50 steps
    had a Frechet distance of 22.7 with draws and 9.0 without (discretized), 20.6 and 19.8 (discrete).
    """
    times = times.float().to(eps.device)[:, None].expand(-1, len(eps))
    theta, last = data.first_belief(eps), None
    for t, s in zip(times[:-1], times[1:]):
        guess = guided_guess(net, guide, data, theta, t)
        yield t[0].item(), theta, guess
        x, last = common.half_a_step_on(guess, last), guess
        if deterministic:
            theta = data.flow(x, data.implied_eps(theta, x, t), s)
        else:
            theta = data.update(theta, x, common.randn_like(eps), t, s)
    yield 1.0, theta, guided_guess(net, guide, data, theta, times[-1])


def generate(net, guide, data, n, steps, sampler, **spacing):
    """n new images, over `steps` steps of one of SAMPLERS: yields (t, belief, guess) as images [n, 1, 28, 28] in
    [-1, 1] before each step, and last the image in place of a guess. spacing="paper" is for data.times."""
    device = next(net.parameters()).device
    eps = torch.randn(n, data.channels, 28, 28).to(device)
    times = data.times(torch.linspace(0, 1, steps + 1, dtype=torch.float64), **spacing)
    for t, theta, guess in bayesian_flow(net, guide, data, eps, times, SAMPLERS[sampler]):
        x = data.draw(guess) if t == 1 else guess
        yield t, data.picture(data.belief(theta)), data.picture(x)


# ------------------------------------------------------------------------------------------------ the likelihood

def bound(net, data, images):
    """An upper bound on the code length of each image in data.unit, as its two terms, [B, 2]: what the messages cost,
    and then the image, given what Bob believes at the end. Without the guide; an unbiased estimate, from one t for each
    image, uniform in [0, 1]. Images are as in `loss`."""
    x = data.encode(images)
    messages = loss_per_image(net, data, x, common.stratified(len(x)).to(x.device), len(x))
    t = torch.ones(len(x), device=x.device)
    theta = data.flow(x, common.randn_like(x), t)
    reconstruction = data.cost(x, look_twice(net, data, theta, t, len(x)))
    return torch.stack([messages, reconstruction], dim=1) / data.nats_per_unit


# ---------------------------------------------------------------------------------------------- the training loop

def train(run, method, data):
    """Train until --epochs are done, from the last finished one on."""
    while run.unfinished:
        for images in run.batches():
            batch_loss = loss(run.net, data, images)
            run.record(batch_loss)
            run.net.zero_grad()
            batch_loss.backward()
            run.step()  # of the optimisers, and of the average of the weights
        run.end_epoch(method)


def open_run(args):
    """The run in --out-dir, and its network as a method to sample with and to measure."""
    data = TYPES[args.data_type]()
    run = common.Run(args, "bfn-" + args.data_type, f"BFN ({args.data_type})", data.unit, "belief", data.in_channels,
                     data.out_channels)

    def real(images):  # as the model has them: binarised, for discrete data
        return common.to_uint8(data.picture(data.encode(common.to_float(images))))

    return run, common.Method(functools.partial(generate, run.net, run.guide, data),
                             functools.partial(bound, run.net, data), ["messages", "reconstruction"], list(SAMPLERS),
                             real)


def main(argv=None):
    args = common.arguments(__doc__, argv, data_type=dict(
        choices=list(TYPES), default="continuous", help="what a pixel is (default %(default)s)"))
    run, method = open_run(args)
    with run:
        if args.sample:
            common.save_drawn(run, method)
        else:
            train(run, method, TYPES[args.data_type]())
            common.finish(run, method)


if __name__ == "__main__":
    common.command(main)
