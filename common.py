"""What diffusion.py and bfn.py share: data, network, EMA, a run's files, the Frechet distance and the figures.

Images are uint8 0..255 at the edges and float32 [B, 1, 28, 28] in [-1, 1] inside the models.
Read "the network": `UNet`, its units, its optimiser and the average of its weights. The rest is plumbing, in the order
in which a run needs it.
"""
import argparse
import contextlib
import copy
import ctypes
import importlib
import io
import json
import math
import os
import shutil
import sys
import textwrap
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Callable, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.animation import PillowWriter
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import LogLocator, MaxNLocator
from torch import nn

try:
    import fcntl
except ImportError:  # Windows has none: there, nothing stops two processes from sharing a run's folder
    fcntl = None


# ---------------------------------------------------------------------------------------------- the command line

class Fail(Exception):
    """Something foreseen went wrong: its message is one line that says what, and what to do."""


def arguments(description, argv, **extra):
    """Parse the flags that both scripts share, and `extra` ones given as name={argparse keywords}."""
    def number(kind, low, high=math.inf):
        def parse(text):
            value = kind(text)
            if not low <= value < high:  # false for nan too
                raise argparse.ArgumentTypeError(f"{text} is not {low:g} or more" if high == math.inf
                                                 else f"{text} is not between {low:g} and {high:g}")
            return value
        parse.__name__ = kind.__name__
        return parse

    count = number(int, 1)
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    add("--epochs", type=count, default=20, help="train until this many epochs are done (default %(default)s)")
    add("--batch-size", type=count, default=128, metavar="B", help="images a step (default %(default)s)")
    add("--lr", type=number(float, 1e-9, 1e9), default=6e-3, help="highest learning rate (default %(default)s)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of everything random (default %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="default: cuda where there is one, else cpu")
    add("--out-dir", type=Path, default="out", metavar="DIR", help="where runs are kept (default %(default)s)")
    add("--data-dir", type=Path, default="data", metavar="DIR", help="where data sets lie (default %(default)s)")
    add("--dataset", choices=["auto", *DATASETS, "drawn"], default="auto",
        help="default: MNIST, or digits drawn from fonts where it cannot be downloaded")
    add("--limit", type=count, metavar="N", help="use the first N training and test images (quick tries)")
    add("--sample", type=count, metavar="N", help="draw N images with a trained network, train nothing")
    add("--steps", type=count, metavar="S", help="sampling steps")
    add("--fresh", action="store_true", help="throw away the run that stands there and start over")
    for name, keywords in extra.items():
        add("--" + name.replace("_", "-"), **keywords)
    args = parser.parse_args(argv)
    if args.sample and args.fresh:
        parser.error("--sample draws with the network that --fresh throws away: give one of them")
    if args.limit and args.batch_size > args.limit:
        parser.error(f"--batch-size {args.batch_size} is more than the {args.limit} images of --limit")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def command(main):
    """Run main() as the whole program: exit code 0, or 1 and one line for what can go wrong, or 130 for Ctrl-C."""
    keep_freed_memory()
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped; finished epochs are kept: the same command (without --fresh) goes on", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output is gone, as in `| head -1`
        code = 1
    except Fail as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        code = 1
    except Exception as error:  # too little memory, for one
        print(f"error: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        code = 1
    else:
        return
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(code)  # at once, and with no second try to write to a closed pipe


def keep_freed_memory():
    """Tell glibc to keep freed memory for the next step instead of handing it back to the kernel.

    Each training step frees and allocates some hundred MB; getting them anew means thousands of page faults.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc: nothing to do
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the largest that glibc takes
        libc.mallopt(-1, 1 << 30)   # M_TRIM_THRESHOLD


def write(path, save):
    """Call save(temporary name in the same folder), then rename: there is never half a file at path."""
    temporary = path.with_name("part-" + path.name)  # the suffix stays: it tells matplotlib the format
    try:
        save(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise Fail(f"{path} could not be written ({error.strerror}); what stood there is still whole") from None
        raise


def save_tensors(path, value):
    """torch.save, atomically. By way of memory: a full disk then raises OSError rather than an error of torch's own."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


class Progress:
    """One line that tells how far some long work is: in place on a terminal, now and then elsewhere."""

    def __init__(self, label, total):
        self.label, self.total = label, total
        self.start = self.shown = time.perf_counter()

    def update(self, done, note=""):
        now = time.perf_counter()
        if now - self.shown < (0.2 if sys.stdout.isatty() else 30):
            return
        self.shown = now
        rate = done / (now - self.start)
        left = (self.total - done) / rate
        text = f"{self.label} {done / self.total:4.0%} {rate:.0f} images/s {left:.0f} s left {note}"
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print("\r" + text[:width].ljust(width), end="", flush=True)
        else:
            print(text, flush=True)

    def close(self, text):
        if sys.stdout.isatty():
            print("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", end="")
        print(text, flush=True)


# ------------------------------------------------------------------------------------------------------ the data

DATASETS = {"mnist": torchvision.datasets.MNIST, "fashion-mnist": torchvision.datasets.FashionMNIST,
            "kmnist": torchvision.datasets.KMNIST}


class Data(NamedTuple):
    """A whole data set in memory. Labels serve nothing but the classifier of the Frechet distance."""
    name: str
    train: torch.Tensor         # uint8 [60000, 1, 28, 28]
    test: torch.Tensor          # uint8 [10000, 1, 28, 28]
    train_labels: torch.Tensor  # int64 [60000]
    test_labels: torch.Tensor   # int64 [10000]


def load_data(name, folder, seed, limit=None):
    """The data set called name, see --dataset; of digits drawn from fonts, no more than limit are made. Raises Fail
    where it cannot be read, or is not what it should be."""
    if name == "drawn":
        return drawn_data(seed, limit)
    kind = DATASETS["mnist" if name == "auto" else name]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision tells of each address it tries
            parts = [kind(folder, train=train, download=True) for train in (True, False)]
    except Exception as error:  # of the network, of the disk, or of what the files hold
        if name != "auto" or len(list(Path(folder).glob(f"{kind.__name__}/raw/*-ubyte"))) == 4:
            raise Fail(f"{kind.__name__} in {folder} could not be read or downloaded ({one_line(error)}); "
                       "remove what is broken there, or use --dataset drawn") from None
        print(f"{kind.__name__} is not in {folder} and could not be downloaded ({one_line(error)}): "
              "going on with digits drawn from fonts")
        return drawn_data(seed, limit)
    for part, count in zip(parts, (60000, 10000)):
        if part.data.shape != (count, 28, 28) or part.targets.shape != (count,):
            raise Fail(f"{kind.__name__} in {folder} holds {tuple(part.data.shape)} values where {(count, 28, 28)} "
                       "are expected; remove it, so that it is downloaded again")
    train, test = parts
    return Data(kind.__name__, train.data[:, None], test.data[:, None], train.targets, test.targets)


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def drawn_data(seed, limit):
    train = drawn_digits(min(60000, limit or 60000), 2 * seed)
    test = drawn_digits(min(10000, limit or 10000), 2 * seed + 1)
    return Data("drawn digits", train[0], test[0], train[1], test[1])


FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
         "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10"]


def glyphs():
    """The digits 0..9 in each of FONTS: float [fonts * 10, 1, 56, 56] in [0, 1], in a box of 40x40 like MNIST's."""
    images = []
    for name in FONTS:
        font = FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name + ".ttf")))
        font.set_size(60, 72)
        for digit in "0123456789":
            font.set_text(digit)
            font.draw_glyphs_to_bitmap()
            image = torch.tensor(font.get_image()).float()[None, None] / 255
            rows, columns = image[0, 0].amax(1).nonzero(), image[0, 0].amax(0).nonzero()
            image = image[:, :, rows.min():rows.max() + 1, columns.min():columns.max() + 1]
            scale = 40 / max(image.shape)
            image = F.interpolate(image, scale_factor=scale, mode="bilinear", antialias=True)
            height, width = image.shape[2:]
            top, left = (56 - height) // 2, (56 - width) // 2
            images.append(F.pad(image, (left, 56 - width - left, top, 56 - height - top)))
    return torch.cat(images)


def drawn_digits(n, seed):
    """n digits drawn from matplotlib's own fonts, and bent: uint8 [n, 1, 28, 28], and labels, int64 [n].

    The ten classes are equally often among each 2000. Each digit has a stroke of its own thickness, is turned, sheared,
    stretched and moved, and then bent by a smooth random field. The same seed gives the same digits, more of them for
    a larger n, and torch's own random numbers are left alone.
    """
    random = torch.Generator().manual_seed(seed)
    thin = glyphs()
    thick = F.max_pool2d(thin, 5, stride=1, padding=2)
    B = 2000
    images, labels = [], []

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(B, *shape, generator=random)

    for _ in range(math.ceil(n / B)):
        label = torch.randperm(B, generator=random) % 10
        index = torch.randint(len(FONTS), (B,), generator=random) * 10 + label
        glyph = torch.lerp(thin[index], thick[index], uniform(0, 1, 1, 1, 1))
        turn, shear, stretch = uniform(-0.25, 0.25), uniform(-0.3, 0.3), uniform(0.95, 1.25, 2)
        affine = torch.stack([turn.cos() * stretch[:, 0], shear - turn.sin(), uniform(-0.1, 0.1),
                              turn.sin(), turn.cos() * stretch[:, 1], uniform(-0.1, 0.1)], dim=1).view(B, 2, 3)
        field = torch.randn(B, 2, 4, 4, generator=random) * uniform(0, 0.12, 1, 1, 1)
        bend = F.interpolate(field, size=(28, 28), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        grid = F.affine_grid(affine, (B, 1, 28, 28), align_corners=False) + bend
        image = F.grid_sample(F.avg_pool2d(glyph, 3, stride=1, padding=1), grid, align_corners=False)
        images.append((image * 1.3).clamp(0, 1).mul(255).round().byte())
        labels.append(label)
    return torch.cat(images)[:n], torch.cat(labels)[:n]


def to_float(images):
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float [-1, 1] -> uint8 0..255, on the CPU; what lies outside is clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().cpu()


# --------------------------------------------------------------------------------------------------- the network

def fourier_features(x, sigma):
    """Sines and cosines of the pixels, so that the network can tell neighbouring grey values apart, 2/255 from
    each other.

    A wave for each of 8 octaves: the fastest has one period per grey value, and tells where between two of them a noisy
    pixel lies; the slower ones tell which two. Fourier features are from Kingma et al. 2021, arXiv 2107.00630, app. C;
    the damping is ours: under noise of deviation sigma a wave of frequency f keeps exp(-(2 pi f sigma)^2 / 2) of itself
    on average, and scaled by that, waves that are nothing but noise vanish.

    x: float [B, 1, 28, 28], an unbiased noisy view of the image; sigma: [B] or [B, 1, 1, 1], its noise's
    deviation. Returns [B, 16, 28, 28].
    """
    omega = 2 * math.pi * 127.5 / 2 ** torch.arange(8, device=x.device).view(1, -1, 1, 1)
    damping = torch.exp(-0.5 * (omega * sigma.view(-1, 1, 1, 1)) ** 2)
    phase = omega * (x + 1)
    return torch.cat([damping * phase.sin(), damping * phase.cos()], dim=1)


def time_features(t):
    """Sinusoidal features of t, float [B] in [0, 1] -> [B, 64], from coarse to fine (as Vaswani et al. 2017, §3.5)."""
    angles = t[:, None] * torch.logspace(0.5, 3, 32, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """Two 3x3 convolutions, each after a normalisation and SiLU. In between, time scales and shifts each channel."""

    def __init__(self, channels, time_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.time = nn.Linear(time_channels, 2 * channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # a block starts as nothing
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, time):
        """x: [B, channels, H, W]; time: [B, time_channels]."""
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.conv2(F.silu(h))


class ShuffleUnit(nn.Module):
    """A residual block from one half of the channels onto the other, and one back: a convolution of half of them is a
    quarter of the work, so that a unit costs what one convolution of all of them would. A channel shuffle then deals
    the channels out to new halves (ShuffleNet, arXiv 1707.01083, §3.1)."""

    def __init__(self, channels, time_channels):
        super().__init__()
        self.there = Block(channels // 2, time_channels)
        self.back = Block(channels // 2, time_channels)

    def forward(self, x, time):
        """x: [B, channels, H, W]; time: [B, time_channels]."""
        a, b = x.chunk(2, dim=1)
        b = b + self.there(a, time)
        a = a + self.back(b, time)
        return F.channel_shuffle(torch.cat([a, b], dim=1), 2)


class UNet(nn.Module):
    """The shuffled U-Net: [B, in_channels, 28, 28] and t [B] in [0, 1] -> [B, out_channels, 28, 28].

    The first layer goes to 14x14, and the units work at 7x7, where a place sees all of the image after few of them. Of
    the finer scale there is the skip connection, and one convolution on the way up. That convolution is a quarter of
    all the work, as much as a unit, but worth it: three units without it do worse than two with it. All convolutions
    are dense (none is grouped or depthwise), in channels_last memory: what a CPU is fastest at, by far.
    """

    def __init__(self, in_channels, out_channels, wide=64, deep=128, units=2, time_channels=128):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(64, time_channels), nn.SiLU(),
                                  nn.Linear(time_channels, time_channels), nn.SiLU())
        self.stem = nn.Conv2d(in_channels, wide, 4, stride=2, padding=1)               # 28x28 -> 14x14
        self.shrink = nn.Conv2d(wide, deep, 2, stride=2)                               # 14x14 -> 7x7
        self.units = nn.ModuleList(ShuffleUnit(deep, time_channels) for _ in range(units))
        self.grow = nn.ConvTranspose2d(deep, wide, 2, stride=2)                        # 7x7 -> 14x14
        self.norm = nn.GroupNorm(8, wide)
        self.conv = nn.Conv2d(wide, wide, 3, padding=1)
        self.head = nn.ConvTranspose2d(wide, out_channels, 4, stride=2, padding=1)     # 14x14 -> 28x28
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t):
        time = self.time(time_features(t))
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        h = self.shrink(x)
        for unit in self.units:
            h = unit(h, time)
        x = x + self.grow(h)  # the skip connection
        x = self.conv(F.silu(self.norm(x)))
        return self.head(F.silu(x))


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: a step moves all directions of a weight matrix equally far, where the gradient moves
    a few of them far and most hardly at all (Jordan et al. 2024, Muon, kellerjordan.github.io/posts/muon).

    A convolution's weights [out, in, 3, 3] are taken as a matrix [out, 9 in]. A step has a root mean square of 0.2 lr,
    which is typical of Adam's, so that one lr serves both (Liu et al. 2025, arXiv 2502.16982). This is torch.optim.Muon
    without weight decay and with adjust_lr_fn="match_rms_adamw"; but torch's takes matrices only, and computes in
    bfloat16: a CPU without that would take twice as long to train.
    """

    def __init__(self, weights, lr, momentum=0.95):
        shapes = dict.fromkeys(w.shape for w in weights)
        super().__init__([{"params": [w for w in weights if w.shape == shape]} for shape in shapes],
                         {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights, momentum = group["params"], group["momentum"]
            gradient = torch.stack([w.grad.flatten(1) for w in weights])  # [N, out, 9 in]: all of one shape at once
            state = self.state[weights[0]]  # of the whole group
            if not state:
                state["average"] = torch.zeros_like(gradient)
            state["average"].lerp_(gradient, 1 - momentum)
            steps = orthogonal(gradient.lerp(state["average"], momentum))  # Nesterov's momentum
            for w, step in zip(weights, steps):
                w.sub_(step.view_as(w), alpha=0.2 * group["lr"] * max(step.shape) ** 0.5)  # U V^T has max^(-1/2)


def orthogonal(G):
    """About U V^T for the singular value decomposition U S V^T of each matrix in G, [N, rows, columns]: singular values
    come out between 0.68 and 1.2, save tiny ones. Five steps X <- (3.4445 I - 4.7750 A + 2.0315 A^2) X, A = X X^T, of a
    Newton-Schulz iteration (Jordan et al. 2024). All of them are polynomials in the first A, and so can be multiplied
    with each other first, as small square matrices, and with X at the end: the same in a third of the time (Zhang et
    al. 2026, Gram Newton-Schulz, tridao.me/blog/2026/gram-newton-schulz; in half precision it would need more care).
    """
    X = G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)
    A = X @ X.mT
    eye = torch.eye(A.shape[1], device=A.device).expand_as(A)
    product = eye
    for _ in range(5):
        step = 3.4445 * eye + 2.0315 * A @ A - 4.7750 * A
        product = step @ product
        A = step @ A @ step
    return product @ X


class EMA:
    """Moving average of the weights, the later the heavier: this is the network that samples and is measured.

    After n steps the weights of step i count in proportion to (i / n)^power (Karras et al. 2024, arXiv 2312.02696,
    eq. 1 to 3). The average so reaches back a fixed share of the run, however long that is: it needs no warm-up of
    its own, nor to know when the run ends.
    """

    def __init__(self, net, power):
        self.net = net
        self.power = power
        self.steps = 0
        self.weights = [p.detach().clone() for p in net.parameters()]

    @torch.no_grad()
    def update(self):
        self.steps += 1
        beta = (1 - 1 / self.steps) ** (self.power + 1)
        torch._foreach_lerp_(self.weights, list(self.net.parameters()), 1 - beta)

    @contextlib.contextmanager
    def averaged(self):
        """Within this block the network has the averaged weights, and no gradients are kept."""
        kept = [p.data for p in self.net.parameters()]
        for p, average in zip(self.net.parameters(), self.weights):
            p.data = average
        try:
            with torch.no_grad():
                yield self.net
        finally:
            for p, data in zip(self.net.parameters(), kept):
                p.data = data


# --------------------------------------------------------------------------------------------------------- a run

WARM_UP = 200     # steps over which the learning rate rises, before it falls
GUIDE_STEPS = 500  # how much the guide may have trained, where an epoch is shorter than that
EMA_POWER = 6.94  # sigma_rel = 0.1 in the EMA's paper: over half of the weight lies on the last tenth of the run


class Run:
    """A run's folder and what is in it: network, average of the weights, optimisers, history. And the guide, which is
    the averaged network as it was after the first epoch, or the last one that ends within GUIDE_STEPS: see `guidance`.

    A context manager: entering it takes the folder's lock, and loads the run that stands there, if there is one with
    the same settings. Raises Fail, and leaves everything as it is, where that can't be.
    """

    def __init__(self, args, name, title, unit, state_name, in_channels, out_channels):
        self.args, self.name, self.title, self.unit, self.state_name = args, name, title, unit, state_name
        self.folder = args.out_dir / name
        self.checkpoint = self.folder / "checkpoint.pt"
        if args.device == "cuda" and not torch.cuda.is_available():
            raise Fail("--device cuda: there is no CUDA GPU that this torch can use; try --device cpu")
        if args.device == "mps" and not torch.backends.mps.is_available():
            raise Fail("--device mps: there is no Apple GPU that this torch can use; try --device cpu")
        if args.sample and not self.checkpoint.exists():
            raise Fail(f"{self.folder} holds no trained network to sample from; train one first, without --sample")
        if not args.sample:
            self.data = load_data(args.dataset, args.data_dir, args.seed, args.limit)
            if args.batch_size > len(self.train_images):
                raise Fail(f"--batch-size {args.batch_size} is more than the {len(self.train_images)} training images")
            self.settings = {"model": name, "dataset": self.data.name, "batch_size": args.batch_size, "lr": args.lr,
                             "seed": args.seed, "limit": args.limit}  # what makes a run this run and no other
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        self.net = UNet(in_channels, out_channels).to(self.device)
        self.guide = copy.deepcopy(self.net)
        self.ema = EMA(self.net, EMA_POWER)
        convolutions = [p for p in self.net.parameters() if p.shape[2:] == (3, 3)]
        others = [p for p in self.net.parameters() if p.shape[2:] != (3, 3)]
        self.optimisers = [Muon(convolutions, args.lr),
                           torch.optim.AdamW(others, args.lr, betas=(0.9, 0.99), fused=True)]
        self.history, self.previews, self.final, self.frechet_curve = [], {}, {}, {}

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "w")
        if fcntl:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when we die
            except BlockingIOError:
                raise Fail(f"another process is at work in {self.folder}; wait for it, or use another --out-dir") \
                    from None
        if self.args.fresh:
            self.checkpoint.unlink(missing_ok=True)
        if self.checkpoint.exists():
            self.load()
        else:
            (self.folder / "metrics.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder / "epochs", ignore_errors=True)
        if not self.args.sample:
            (self.folder / "epochs").mkdir(exist_ok=True)
            done = f", {len(self.history)} epochs done" if self.history else ""
            print(f"{self.title} on {self.dataset}: {len(self.train_images)} training images, {self.parameters:,} "
                  f"parameters, {self.device.type}{done} -> {self.folder}", flush=True)
        return self

    def load(self):
        """Load the checkpoint, and the measurements beside it."""
        keep = "it is left as it is: move it away, or start over with --fresh"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the error below says it all
                state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)  # plain values, never code
            settings = state["settings"]
            if settings["model"] == self.name:
                self.net.load_state_dict(state["net"])
                self.guide.load_state_dict(state["guide"])
                for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
                    optimiser.load_state_dict(saved)
                for average, saved in zip(self.ema.weights, state["ema"], strict=True):
                    average.copy_(saved)
                self.ema.steps = state["steps"]
                self.history, self.previews = state["history"], state["previews"]
                torch.set_rng_state(state["random_state"])
        except OSError:
            raise
        except Exception as error:  # whatever a file that is no checkpoint of ours makes torch raise
            raise Fail(f"{self.checkpoint} is not a checkpoint that can be used ({type(error).__name__}: "
                       f"{one_line(error)}); {keep}") from None
        if settings["model"] != self.name:
            raise Fail(f"{self.checkpoint} is a checkpoint of {settings['model']}, not of {self.name}; {keep}")
        if self.args.sample:
            self.settings = settings
        other = [f"{key} {old} there, {self.settings.get(key)} here" for key, old in settings.items()
                 if self.settings.get(key) != old]
        if other:
            raise Fail(f"the run in {self.folder} has other settings ({'; '.join(other)}): "
                       "give those, or another --out-dir, or --fresh to throw that run away")
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # without them, it is measured again
            metrics = json.loads((self.folder / "metrics.json").read_text())
            if len(metrics["history"]) == len(self.history):
                self.final, self.frechet_curve = metrics["final"], metrics["frechet_curve"]

    def __exit__(self, *exception):
        self.lock.close()

    @property
    def train_images(self):
        return self.data.train[:self.args.limit]

    @property
    def test_images(self):
        return self.data.test[:self.args.limit]

    @property
    def dataset(self):
        return self.settings["dataset"]

    @property
    def parameters(self):
        return sum(p.numel() for p in self.net.parameters())

    @property
    def unfinished(self):
        return len(self.history) < self.args.epochs

    def batches(self):
        """One epoch of shuffled batches, float [B, 1, 28, 28]; a last one that is smaller is left out."""
        self.epoch = len(self.history) + 1
        self.losses = []
        size = self.args.batch_size
        count = len(self.train_images) // size
        order = torch.randperm(len(self.train_images))
        self.progress = Progress(f"epoch {self.epoch}/{self.args.epochs}", count * size)
        for i in range(count):
            yield to_float(self.train_images[order[i * size:(i + 1) * size]]).to(self.device)
            self.progress.update((i + 1) * size, f"loss {self.losses[-1]:.4f}")

    def step(self):
        """Take a step along the gradients. The learning rate rises to --lr in WARM_UP steps, and then falls as one over
        the square root of the steps (Vaswani et al. 2017, eq. 3): a course that need not know when the run ends, so
        that any run can be prolonged."""
        n = (self.ema.steps + 1) / WARM_UP
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.args.lr * min(n, n ** -0.5)
            optimiser.step()
        self.ema.update()

    def record(self, loss):
        """Keep the loss of a batch, which is due before the next one. Raises Fail where it is no longer a number."""
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            raise Fail(f"the loss is {self.losses[-1]} at step {len(self.losses)} of epoch {self.epoch} with --lr "
                       f"{self.args.lr:g}: try a smaller one; what earlier epochs trained is kept")

    def end_epoch(self, method):
        """Measure, draw nine digits, write the checkpoint: after this, the epoch cannot be lost."""
        seconds = time.perf_counter() - self.progress.start
        with self.ema.averaged():
            if not self.history or self.ema.steps <= GUIDE_STEPS:
                self.guide.load_state_dict(self.net.state_dict())
            test = self.measure(method.bound, self.args.seed).sum(1)
            preview = draw(method, 9, PREVIEW_STEPS, method.samplers[0], self.args.seed)
        if not math.isfinite(test.mean()):
            raise Fail(f"the network gives no numbers any more after epoch {self.epoch} with --lr {self.args.lr:g}: "
                       "try a smaller one; what earlier epochs trained is kept")
        rate = len(self.losses) * self.args.batch_size / seconds
        row = {"epoch": self.epoch, "seconds": seconds, "images_per_second": rate,
               "train_loss": sum(self.losses) / len(self.losses), "test": test.mean().item(),
               "test_se": standard_error(test)}
        self.progress.close(f"epoch {self.epoch}/{self.args.epochs}: {seconds:.0f} s, {rate:.0f} images/s, training "
                            f"loss {row['train_loss']:.4f}, test {row['test']:.3f} +- {row['test_se']:.3f} {self.unit}")
        self.history.append(row)
        self.previews[self.epoch] = preview
        self.save()
        self.save_preview(self.epoch, preview)

    def save_preview(self, epoch, images):
        path = self.folder / "epochs" / f"epoch_{epoch:03}.png"
        if not path.exists():
            save_samples(path, images, f"{self.title} on {self.dataset}, epoch {epoch}")

    def measure(self, bound, seed):
        """bound's terms for each test image, [len(test), parts]."""
        with seeded(seed):
            return torch.cat([bound(to_float(images).to(self.device)) for images in self.test_images.split(500)]).cpu()

    def save(self):
        """Write checkpoint and metrics."""
        self.final, self.frechet_curve = {}, {}  # they were those of fewer epochs
        state = {"settings": self.settings, "net": self.net.state_dict(), "ema": self.ema.weights,
                 "guide": self.guide.state_dict(),
                 "optimisers": [optimiser.state_dict() for optimiser in self.optimisers], "steps": self.ema.steps,
                 "history": self.history, "previews": self.previews, "random_state": torch.get_rng_state()}
        save_tensors(self.checkpoint, state)
        self.write_metrics()

    def write_metrics(self):
        metrics = {"settings": self.settings, "dataset": self.dataset, "title": self.title, "unit": self.unit,
                   "parameters": self.parameters, "device": self.device.type, "threads": torch.get_num_threads(),
                   "history": self.history, "final": self.final, "frechet_curve": self.frechet_curve}
        write(self.folder / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=1)))


# -------------------------------------------------------------------------------------- drawing and measuring it

PREVIEW_STEPS = 50   # for the nine digits after each epoch, and for the Frechet distance
CURVE_STEPS = (10, 20, 50, 100, 250)  # 1000 would take twice as long as all of these
CURVE_COUNT = 300


def draw(method, n, steps, sampler, seed, label=None):
    """n images, uint8 [n, 1, 28, 28]: the last guesses of method.generate, of at most 500 at a time."""
    progress = Progress(label, n) if label else None
    images = []
    with seeded(seed):
        for start in range(0, n, 500):
            for _, _, guess in method.generate(min(500, n - start), steps, sampler):
                pass
            images.append(to_uint8(guess))
            if progress:
                progress.update(start + len(guess))
    return torch.cat(images)


@contextlib.contextmanager
def seeded(seed):
    """Within this block random numbers start from seed; after it they go on as if it had not been."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        yield


# -------------------------------------------------------------------------------- what the equations of both need

def randn_like(x):
    """Normal noise of x's shape on x's device, drawn on the CPU: the same numbers on every device."""
    return torch.randn(x.shape).to(x.device)


def stratified(B):
    """B numbers, uniform in [0, 1], one in each of B equal parts of it: means over them have less noise (much as Kingma
    et al. 2021, app. I.1). They are in random order, so that each is uniform, whichever image it goes to."""
    return (torch.randperm(B) + torch.rand(B)) / B


def column(t):
    """[B] -> [B, 1, 1, 1], to go with images."""
    return t.view(-1, 1, 1, 1)


def clip(guess):
    """guess, of any shape, clipped to [-1, 1], but with the gradient of the guess itself: where it lies beyond the
    wrong end, the loss can still pull it back."""
    return guess + (guess.clamp(-1, 1) - guess).detach()


def guidance(guess, worse, w):
    """(w - 1) (guess - worse): what to add to a guess, to lead it away from that of a worse network; all of one shape.

    This is autoguidance (Karras et al. 2024, arXiv 2406.02507), whose guess is w guess + (1 - w) worse. A trained
    network still expects some of what is no digit, and draws it. A worse one, trained for less long (see `Run`) and
    looking only once, makes the same mistakes, but larger ones; so the way from its guess to the better one leads on
    to one better still. Bounds are measured without it (w = 1): guidance is for drawing only, and what is drawn is no
    longer what the bound is of.
    """
    return (w - 1) * (guess - worse)


def guidance_weight(noise):
    """The w of `guidance` for grey images: 5/2 where the noise in the mixture of image and noise is one to four times
    as strong as the image, which is where shapes are settled; 1, which is none, elsewhere. noise: the factor on the
    noise over that on the image.

    That guidance is best kept to an interval is from Kynkäänniemi et al. 2024, arXiv 2404.07724 (on another kind of
    it). Under more noise, ours led to too many ones; under less, to the same digits.
    """
    return 2.5 if 1 < noise < 4 else 1.0


def half_a_step_on(guess, last):
    """guess + (guess - last) / 2: the guess in the middle of a sampler's step, extrapolated from the guesses at the
    beginning of this step and of the one before (last; None in the first step), both of one shape.

    A sampler takes a step as if one guess held all the way. With that of the beginning, its error falls like one over
    the number of steps; with that of the middle, like one over its square (of the images' distribution, where fresh
    noise comes in; and but for the places where `guidance` sets in or ends). It costs no call of the network. The half
    is right because in all of our times a step is nearly as long as the one before it.

    This is the method of Adams and Bashforth. Much the same, with the lengths of steps measured in the logarithm of the
    signal-to-noise ratio, are DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095) and the multi-step solvers for BFNs
    of Xue et al. 2024, arXiv 2404.15766.
    """
    return guess if last is None else guess + (guess - last) / 2


def standard_error(values):
    return (values.std() / len(values) ** 0.5).item()


def discretised_normal_nats(x, mean, sigma):
    """-ln of the share of N(mean, sigma^2) in the bin of each x, one of the 256 grey values in [-1, 1] (DDPM eq. 13).

    A bin reaches half-way to the next value, the first and the last one to infinity. All tensors of one shape, or
    sigma one number. Differences of the distribution function are taken in its logarithm and its smaller tail, and
    1000 deviations count as infinitely far (which caps the cost at some 500,000 nats): nothing under- or overflows,
    gradients included. Computed on the CPU, since not every GPU has log_ndtr.
    """
    device, far = x.device, 1e3
    x, mean = x.cpu(), mean.cpu()
    sigma = sigma.cpu() if isinstance(sigma, torch.Tensor) else sigma
    low = torch.where(x < -1 + 1 / 255, -far, ((x - 1 / 255 - mean) / sigma).clamp(-far, far))
    high = torch.where(x > 1 - 1 / 255, far, ((x + 1 / 255 - mean) / sigma).clamp(-far, far))
    upper = low + high > 0
    low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(log_high + torch.log(-torch.expm1((log_low - log_high).clamp(max=-1e-6)))).to(device)


def expected_grey(mean, sigma):
    """The mean of N(mean, sigma^2) dealt out to the 256 grey values of [-1, 1], as above; all of one shape.

    The sum over the 256 probabilities, but not term by term. In units of grey values, X ~ N(m, s^2) is rounded and
    clipped to 0..255, whose mean is 0 + sum_{j=1..255} P(X > j - 1/2). For s < 1 only the terms near m differ from 0
    and 1. For s >= 1 the sum is that of a smooth function at midpoints: the integral, which is the mean of the clipped
    normal, and the Euler-Maclaurin corrections at its ends. Either is right to 1e-6.
    """
    m, s = (mean + 1) * 127.5, sigma * 127.5

    def Phi(z):
        return 0.5 * (1 + torch.erf(z / math.sqrt(2)))

    def phi(z):
        return torch.exp(-0.5 * z.clamp(-12, 12) ** 2) / math.sqrt(2 * math.pi)

    narrow = s.clamp(1e-3, 1)
    middle = m.detach().round().clamp(0, 255)
    near = middle
    for i in range(6):
        up, down = middle + i + 0.5, middle - i - 0.5
        near = near + (up < 255) * Phi((m - up) / narrow) - (down > 0) * Phi((down - m) / narrow)

    wide = s.clamp(min=1)
    a, b = -m / wide, (255 - m) / wide
    far = m + wide * (a * Phi(a) + phi(a) + b * Phi(-b) - phi(b))
    far = far + (phi(b) - phi(a)) / (24 * wide)
    far = far - ((b ** 2 - 1) * phi(b) - (a ** 2 - 1) * phi(a)) * 7 / (5760 * wide ** 3)
    return torch.where(s < 1, near, far) / 127.5 - 1


# ------------------------------------------------------------------------------------------ the Frechet distance

def classifier():
    """A small network that names digits: its last hidden layer, 64 features, is where images are compared."""
    return nn.Sequential(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.SiLU(),
                         nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),
                         nn.Conv2d(64, 128, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(128 * 9, 64), nn.SiLU(), nn.Linear(64, 10)).to(memory_format=torch.channels_last)


def trained_classifier(data, folders):
    """The classifier for a data set, from the first of folders that holds it, else trained (half a minute) and kept in
    the first that can be written."""
    name = f"classifier-{data.name.lower().replace(' ', '-')}-{len(data.train)}.pt"
    net = classifier()
    for folder in folders:
        with contextlib.suppress(Exception):  # not there, or not readable: then it is trained again
            net.load_state_dict(torch.load(folder / name, weights_only=True))
            return net
    epochs, size = 4, 128
    steps = len(data.train) // size
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        net = classifier()
        optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=epochs * steps)
        progress = Progress("classifier of the Frechet distance:", epochs * steps * size)
        for epoch in range(epochs):
            order = torch.randperm(len(data.train))
            for i in range(steps):
                chosen = order[i * size:(i + 1) * size]
                loss = F.cross_entropy(net(to_float(data.train[chosen])), data.train_labels[chosen])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                progress.update((epoch * steps + i + 1) * size)
    with torch.no_grad():
        right = sum((net(to_float(images)).argmax(1) == labels).sum().item() for images, labels in
                    zip(data.test.split(500), data.test_labels.split(500)))
    progress.close(f"classifier of the Frechet distance: {right / len(data.test):.2%} of test images named rightly")
    for folder in folders:
        with contextlib.suppress(OSError, Fail):
            if folder.stat().st_mode & 0o200:  # a folder marked as read-only is left alone, though root could write
                save_tensors(folder / name, net.state_dict())
                break
    return net


@torch.no_grad()
def features(net, images):
    """uint8 [N, 1, 28, 28] -> the classifier's features, float64 [N, 64]."""
    return torch.cat([net[:-2](to_float(part)) for part in images.split(500)]).double()


def frechet_distance(a, b):
    """Squared Frechet distance of the normals fitted to features a and b, float64 [N, D] (Dowson & Landau 1982):

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))
    """
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


# --------------------------------------------------------------------------------------------------- the figures

DPI = 200
MARGIN = 40  # pixels of white around a figure and between grids
COLOURS = ["#2b6cb0", "#dd6b20", "#2f855a", "#805ad5"]
matplotlib.rcParams.update({
    "font.size": 9, "axes.titlesize": 10, "axes.titlepad": 8, "legend.fontsize": 8, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6",
})


def draw_axes(count, width, height, title, left=MARGIN, bottom=MARGIN, top=20):
    """Title above count axes side by side, each of width x height pixels, with left pixels before each."""
    full_width = count * (left + width) + MARGIN
    letters = (full_width - 2 * MARGIN) // 19  # a bold letter takes about 19 pixels
    lines = len(textwrap.wrap(title, letters))
    while len(textwrap.wrap(title, letters - 1)) == lines:
        letters -= 1  # lines of about equal length rather than a lone last word
    full_height = bottom + height + top + 44 * lines + MARGIN
    figure = Figure(figsize=(full_width / DPI, full_height / DPI), dpi=DPI)
    figure.text(MARGIN / full_width, 1 - MARGIN / full_height, textwrap.fill(title, letters),
                size=11, weight="bold", va="top")
    y, h, w = bottom / full_height, height / full_height, width / full_width
    xs = [(left + i * (left + width)) / full_width for i in range(count)]
    return figure, [figure.add_axes([x, y, w, h]) for x in xs]


def tile(images, columns):
    """Digits [N,1,28,28] -> one picture [N/columns*29-1, columns*29-1], with white lines between them."""
    tiles = F.pad(images[:, 0], (0, 1, 0, 1), value=255)
    tiles = tiles.unflatten(0, (-1, columns)).transpose(1, 2)  # [rows, 29, columns, 29]
    return tiles.flatten(2).flatten(0, 1)[:-1, :-1].numpy()


def draw_grids(panels, title, columns=3, left=MARGIN, scale=8):
    """Digit grids side by side, panels = list of (label, uint8 [N,1,28,28]) -> (figure, shown pictures)."""
    pictures = [tile(images, columns) for _, images in panels]
    height, width = pictures[0].shape
    scale = min(scale, 1640 // (width * len(panels)))  # whole screen pixels per digit pixel: crisp digits
    top = 60 if panels[0][0] else 20
    figure, axes = draw_axes(len(panels), width * scale, height * scale, title, left, top=top)
    shown = []
    for axis, picture, (label, _) in zip(axes, pictures, panels):
        axis.set(title=label, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        axis.grid(False)
        shown.append(axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest"))
    return figure, shown


def save_side_by_side(path, panels, title):
    """One 3x3 grid per panel, panels = list of (label, uint8 [9,1,28,28])."""
    write(path, draw_grids(panels, title)[0].savefig)


def save_samples(path, images, title):
    """One 3x3 grid of images, uint8 [9,1,28,28]."""
    save_side_by_side(path, [("", images)], title)


def save_training(path, epoch_images, title):
    """Samples as training goes on: epoch_images = {epoch: uint8 [9,1,28,28]}, up to six epochs."""
    save_side_by_side(path, [(f"epoch {epoch}", images) for epoch, images in epoch_images.items()], title)


def save_steps(path, rows, times, title):
    """Sampling from left to right: rows = list of (label, uint8 [10,1,28,28]), times = list of 10 strings."""
    labels = [label for label, _ in rows]
    images = torch.cat([images for _, images in rows])
    left = 2 * MARGIN + 13 * max(len(label) for label in labels)
    figure, [shown] = draw_grids([(" ", images)], title, columns=len(times), left=left)
    shown.axes.set_xticks([29 * i + 13.5 for i in range(len(times))], times)
    shown.axes.set_yticks([29 * i + 13.5 for i in range(len(rows))], labels)
    shown.axes.tick_params(length=0, labeltop=True, labelbottom=False)
    write(path, figure.savefig)


def save_gif(path, panels, title, fps=12):
    """Sampling as a film: panels = list of (label, uint8 [F,9,1,28,28])."""
    # noise hardly compresses: six shades of grey instead of 256 make a file of less than half the size
    panels = [(label, (frames.int() + 25) // 51 * 51) for label, frames in panels]
    scale = 8 if len(panels) == 1 else 6
    figure, shown = draw_grids([(label, frames[0]) for label, frames in panels], title, scale=scale)
    last = len(panels[0][1]) - 1
    order = list(range(last)) + [last] * (3 * fps // 2)  # hold the finished digits for 1.5 seconds

    def save(temporary):
        writer = PillowWriter(fps=fps)
        with writer.saving(figure, temporary, dpi=DPI // 2):
            for i in order:
                for image, (_, frames) in zip(shown, panels):
                    image.set_data(tile(frames[i], 3))
                writer.grab_frame()

    write(path, save)


def draw_curve(axis, history, x, y, colour, label=None):
    """Plot column y of history over column x; a test result gets a band of +- one standard error."""
    xs = [row[x] for row in history]
    ys = [row[y] for row in history]
    axis.plot(xs, ys, ".-", color=colour, label=label)
    if y == "test":
        low = [row["test"] - row["test_se"] for row in history]
        high = [row["test"] + row["test_se"] for row in history]
        axis.fill_between(xs, low, high, color=colour, alpha=0.25, linewidth=0)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def zoom(axis):
    """Let first epochs that are far off scale leave through the top, to keep later progress visible."""
    if not axis.lines:
        return
    low = axis.dataLim.ymin
    curves = [line.get_ydata() for line in axis.lines]
    late = max(max(curve[1 + len(curve) // 10:], default=low) for curve in curves)
    high = min(axis.dataLim.ymax, low + 2.5 * (late - low))
    if high > low:
        margin = 0.06 * (high - low)
        axis.set_ylim(low - margin, high + margin)


def save_curves(path, history, unit, title):
    """Training loss and test result: history = list of {epoch, seconds, train_loss, test, test_se}."""
    figure, axes = draw_axes(2, 720, 460, title, left=170, bottom=120)
    names = {"train_loss": "training loss", "test": f"test {unit} (± standard error)"}
    for axis, (column, name) in zip(axes, names.items()):
        draw_curve(axis, history, "epoch", column, COLOURS[0])
        zoom(axis)
        axis.set(xlabel="epoch", ylabel=name)
    write(path, figure.savefig)


def save_comparison_curves(path, runs, title):
    """Test bits/dim over epochs and seconds, Frechet distance over steps: runs = {name: metrics}."""
    colours = dict(zip(runs, COLOURS))
    histories = {name: run["history"] for name, run in runs.items() if run["unit"] == "bits/dim"}
    frechet = {name: run["frechet_curve"] for name, run in runs.items() if run.get("frechet_curve")}
    count = 3 if frechet else 2
    figure, axes = draw_axes(count, 1860 // count - 160, 460, title, left=160, bottom=120)
    for axis, x, xlabel in zip(axes, ["epoch", "pace"], ["epoch", "seconds, at the pace of the median epoch"]):
        for name, history in histories.items():
            pace = median(row["seconds"] for row in history)  # whatever else the machine did in some epoch
            history = [row | {"pace": row["epoch"] * pace} for row in history]
            draw_curve(axis, history, x, "test", colours[name], name)
        zoom(axis)
        axis.set(xlabel=xlabel, ylabel="test bits/dim (± standard error)")
    for name, result in frechet.items():
        for (sampler, curve), style in zip(result["curves"].items(), ["o-", "s--", "^:"]):
            steps = [int(step) for step in curve]
            axes[2].loglog(steps, list(curve.values()), style, color=colours[name], markersize=4,
                           label=f"{name}, {sampler}")
    if frechet:
        floor = next(iter(frechet.values()))["floor"]
        axes[2].axhline(floor, color="#888888", linestyle="--", linewidth=1, label="real digits")
        axes[2].set(xlabel="sampling steps", ylabel=f"Fréchet distance of {result['count']} samples")
        axes[2].set_ylim(top=5 * axes[2].get_ylim()[1])  # room for the legend
        axes[2].minorticks_off()
        for ticks in (axes[2].xaxis, axes[2].yaxis):
            ticks.set_major_locator(LogLocator(subs=[1, 2, 5]))
            ticks.set_major_formatter("{x:g}")
    for axis in axes:
        axis.legend(loc="upper right", fontsize=6.5 if axis is axes[-1] else 8, handlelength=1.5)
    write(path, figure.savefig)


# -------------------------------------------------------------------------------------------------- a run's results

class Method(NamedTuple):
    """What a script lends to the functions below: its network as a generator of images and as a measure of them."""
    generate: Callable  # (n, steps, sampler) -> (t, state, guess) for each step, [n, 1, 28, 28] in [-1, 1]; see `draw`
    bound: Callable     # images [B, 1, 28, 28] in [-1, 1] -> [B, parts], their sum is the bound on each code length
    parts: list         # names of the parts
    samplers: list      # names of the stochastic sampler, which draws, and of the deterministic one, for comparison
    real: Callable = lambda images: images  # uint8 images -> uint8, as the model has them


def save_drawn(run, method):
    """--sample N: draw N images with the averaged network, into samples.pt, and nine of them into samples.png."""
    steps = run.args.steps or PREVIEW_STEPS
    sampler = method.samplers[0]
    start = time.perf_counter()
    with run.ema.averaged():
        images = draw(method, run.args.sample, steps, sampler, run.args.seed, "drawing")
    save_tensors(run.folder / "samples.pt", images)
    nine = torch.cat([images, torch.zeros(9, 1, 28, 28, dtype=torch.uint8)])[:9]
    save_samples(run.folder / "samples.png", nine, f"{run.title} on {run.dataset}: {steps} steps, {sampler}")
    print(f"{len(images)} images in {time.perf_counter() - start:.1f} s ({steps} steps, {sampler}) -> "
          f"{run.folder / 'samples.pt'}")


def finish(run, method):
    """What a run leaves at its end: final figures of merit (measured once), pictures, and the comparison."""
    with run.ema.averaged():
        if not run.final:
            run.final = measure_final(run, method)
            run.write_metrics()
        save_figures(run, method)
    print(describe(run))
    compare(run, method)


def describe(run):
    final = run.final
    parts = ", ".join(f"{name} {value:.3f}" for name, value in final["parts"].items())
    text = (f"{run.title} on {run.dataset}, {len(run.history)} epochs: {final['bound']:.3f} +- {final['bound_se']:.3f} "
            f"{run.unit} ({parts})")
    if "frechet" in final:
        text += (f"; Frechet distance of {final['frechet_count']} images {final['frechet']:.2f}, "
                 f"of as many real ones {final['frechet_floor']:.2f}")
    return text


def measure_final(run, method):
    """The bound on the whole test set, from five estimates for each image; the Frechet distance of 10,000 images; time
    for nine digits. After less than 20 epochs fewer images are drawn: measuring must not outlast the training."""
    epochs = len(run.history)
    terms = torch.stack([run.measure(method.bound, run.args.seed + i) for i in range(min(epochs, 5))]).mean(0)
    final = {"bound": terms.sum(1).mean().item(), "bound_se": standard_error(terms.sum(1)),
             "parts": dict(zip(method.parts, terms.mean(0).tolist()))}
    final["seconds_nine"] = seconds_for_nine(run, method)
    count = min(500 * epochs, 10000, len(run.train_images), len(run.test_images))
    if count >= 1000:  # fewer say little
        judge = Judge(run, method, count)
        final |= {"frechet_count": count, "frechet_floor": judge.floor, "frechet_steps": PREVIEW_STEPS,
                  "frechet": judge.distance(draw(method, count, PREVIEW_STEPS, method.samplers[0], run.args.seed,
                                                 "drawing for the Frechet distance:"))}
    return final


def seconds_for_nine(run, method):
    """Time to draw nine digits, the median of five."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        draw(method, 9, PREVIEW_STEPS, method.samplers[0], run.args.seed)
        seconds.append(time.perf_counter() - start)
    return median(seconds)


class Judge:
    """Frechet distances of images from the test set; `floor` is that of as many training images, drawn at random."""

    def __init__(self, run, method, count):
        self.net = trained_classifier(run.data, [run.args.data_dir, run.args.out_dir])
        with seeded(run.args.seed):
            self.test = features(self.net, method.real(run.test_images))
            chosen = torch.randperm(len(run.train_images))[:count]
            self.floor = self.distance(method.real(run.train_images[chosen]))

    def distance(self, images):
        return frechet_distance(features(self.net, images), self.test)


def trace(method, n, steps, sampler, seed):
    """The whole process: times, and states and guesses, uint8 [steps + 1, n, 1, 28, 28]."""
    with seeded(seed):
        times, states, guesses = zip(*[(t, to_uint8(state), to_uint8(guess))
                                       for t, state, guess in method.generate(n, steps, sampler)])
    return times, torch.stack(states), torch.stack(guesses)


def spread(count, total):
    """count indices, evenly spread over 0..total-1, first and last among them (all, where there are not as many)."""
    return torch.linspace(0, total - 1, min(count, total)).round().long().tolist()


def save_figures(run, method):
    """Draw a run's pictures: figures 1 to 4 of the README, the curves and the film."""
    name = f"{run.title} on {run.dataset}, {len(run.history)} epochs"
    for epoch, images in run.previews.items():
        run.save_preview(epoch, images)
    epochs = list(run.previews)
    save_training(run.folder / "training.png", {epochs[i]: run.previews[epochs[i]] for i in spread(6, len(epochs))},
                  f"{run.title} on {run.dataset}: the same nine draws as training goes on")
    steps = run.args.steps or 1000
    sampler = method.samplers[0]
    how = f"{steps} steps, {sampler}"
    times, states, guesses = trace(method, 9, steps, sampler, run.args.seed)
    save_samples(run.folder / "samples.png", guesses[-1], f"{name}: {how}")
    chosen = spread(10, len(times))
    save_steps(run.folder / "steps.png", [(run.state_name, states[chosen, 0]), ("guess", guesses[chosen, 0])],
               [f"t = {times[i]:.3f}" for i in chosen], f"{name}: one digit, {how}")
    save_gif(run.folder / "process.gif", [(f"{run.title}, {how}", states[spread(50, len(times))])], run.dataset)
    save_curves(run.folder / "curves.png", run.history, run.unit, name)


# ------------------------------------------------------------------------------------------------- the comparison

RUNS = {"diffusion": ("diffusion", {}), "bfn-continuous": ("bfn", {"data_type": "continuous"}),
        "bfn-discretized": ("bfn", {"data_type": "discretized"}), "bfn-discrete": ("bfn", {"data_type": "discrete"})}
HELD_EQUAL = ("dataset", "batch_size", "lr", "seed", "limit")  # beside network, optimiser and epochs


def compare(run, method):
    """Where finished runs of diffusion and of a BFN stand beside each other: measure both alike, draw and tabulate."""
    standing = {}
    for name in RUNS:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            metrics = json.loads((run.args.out_dir / name / "metrics.json").read_text())
            if metrics["final"] and (run.args.out_dir / name / "checkpoint.pt").exists():
                standing[name] = metrics
    if "diffusion" not in standing or len(standing) < 2:
        return
    for name, metrics in list(standing.items()):
        theirs, ours = [m["settings"] | {"epochs": len(m["history"])} for m in (metrics, standing["diffusion"])]
        other = [f"{key} {theirs[key]} and {ours[key]}" for key in (*HELD_EQUAL, "epochs") if theirs[key] != ours[key]]
        if other:
            print(f"{name} is not compared with diffusion: {', '.join(other)}")
            del standing[name]
    if len(standing) < 2 or run.name not in standing:
        return
    runs, methods = {}, {}
    with contextlib.ExitStack() as stack:
        for name in standing:
            if name == run.name:
                runs[name], methods[name] = run, method
            else:
                script, flags = RUNS[name]
                # as with --sample: with the settings that it has, whatever ours are, and without training data
                args = argparse.Namespace(**vars(run.args) | flags | {"sample": 1, "fresh": False})
                runs[name], methods[name] = importlib.import_module(script).open_run(args)
                runs[name].data = run.data
                try:
                    stack.enter_context(runs[name])
                except Fail as error:
                    print(f"nothing is compared: {error}")
                    return
            stack.enter_context(runs[name].ema.averaged())
            if runs[name].unit == standing["diffusion"]["unit"]:  # binary digits are on another scale
                measure_curve(runs[name], methods[name])
        draw_comparison(run.args, runs, methods)


def measure_curve(run, method):
    """Frechet distance over sampling steps, for both samplers; kept in metrics.json point by point."""
    if min(len(run.train_images), len(run.test_images)) < CURVE_COUNT:
        return
    curve = run.frechet_curve or {"count": CURVE_COUNT, "curves": {name: {} for name in method.samplers}}
    missing = [(name, steps) for name in method.samplers for steps in CURVE_STEPS
               if str(steps) not in curve["curves"][name]]
    if not missing:
        return
    judge = Judge(run, method, CURVE_COUNT)
    curve["floor"] = judge.floor
    for name, steps in missing:
        label = f"{run.title}: Frechet distance, {steps} steps, {name}:"
        curve["curves"][name][str(steps)] = judge.distance(draw(method, CURVE_COUNT, steps, name, run.args.seed, label))
        run.frechet_curve = curve
        run.write_metrics()


def draw_comparison(args, runs, methods):
    """Figures 5 and 6 of the README, the film, the curves and the table."""
    folder = args.out_dir / "comparison"
    folder.mkdir(exist_ok=True)
    metrics = {run.title: {"unit": run.unit, "history": run.history, "frechet_curve": run.frechet_curve}
               for run in runs.values()}
    epochs = len(runs["diffusion"].history)
    subject = f"on {runs['diffusion'].dataset}, {epochs} epochs each"
    steps = args.steps or PREVIEW_STEPS
    traces = {name: trace(method, 9, steps, method.samplers[0], args.seed) for name, method in methods.items()}
    panels = [(f"{runs[name].title}, {methods[name].samplers[0]}", guesses[-1]) for name, (_, _, guesses)
              in traces.items()]
    save_side_by_side(folder / "samples.png", panels, f"DDPM and BFN {subject}: {steps} steps from one seed")
    two = ["diffusion", next(name for name in runs if name != "diffusion")]
    chosen = spread(10, steps + 1)
    rows = []
    for name in two:
        _, states, guesses = traces[name]
        rows += [(f"{runs[name].title}: {runs[name].state_name}", states[chosen, 0]), ("guess", guesses[chosen, 0])]
    save_steps(folder / "steps.png", rows, [f"step {i}" for i in chosen],
               f"DDPM and BFN {subject}: one digit, from one seed")
    save_gif(folder / "process.gif", [(runs[name].title, traces[name][1][spread(50, steps + 1)]) for name in two],
             f"From one seed, {subject}")
    save_comparison_curves(folder / "curves.png", metrics, f"DDPM and BFN {subject}, same network")
    write(folder / "table.md", lambda path: path.write_text(table(runs), encoding="utf-8"))
    print(f"comparison of {', '.join(runs)} -> {folder}")


def table(runs):
    """The comparison as a table in Markdown, of the numbers in metrics.json."""
    lines = ["| | " + " | ".join(run.title for run in runs.values()) + " |", "| --- |" + " --- |" * len(runs)]

    def row(name, cell):
        lines.append(f"| {name} | " + " | ".join(cell(run) for run in runs.values()) + " |")

    row("parameters", lambda run: f"{run.parameters:,}")
    row("training images/s (median epoch)",
        lambda run: f"{median(row['images_per_second'] for row in run.history):.0f}")
    row("seconds per epoch (median)", lambda run: f"{median(row['seconds'] for row in run.history):.1f}")
    row("test code length (upper bound ± standard error)",
        lambda run: f"{run.final['bound']:.3f} ± {run.final['bound_se']:.3f} {run.unit}")
    if all("frechet" in run.final for run in runs.values()):
        row(f"Fréchet distance, {PREVIEW_STEPS} steps (of as many real digits)",
            lambda run: f"{run.final['frechet']:.2f} ({run.final['frechet_floor']:.2f})")
    row(f"seconds for nine digits, {PREVIEW_STEPS} steps", lambda run: f"{run.final['seconds_nine']:.2f}")
    settings = next(iter(runs.values())).settings
    equal = ", ".join(f"{key.replace('_', ' ')} {settings[key]}" for key in HELD_EQUAL if settings[key] is not None)
    lines += ["", f"Held equal: network (but for its input and output channels), optimiser, {equal}, "
              f"{len(next(iter(runs.values())).history)} epochs. Measured on {os.cpu_count()} cores."]
    return "\n".join(lines) + "\n"
