"""What diffusion.py and bfn.py share: the shuffled U-Net, data, a run's files, measures, figures and the comparison.

Images are uint8 0..255 at the edges and float32 [B, 1, 28, 28] in [-1, 1] inside the models. A label is int64 [B]:
0 to 9, or NOT_TOLD. The network stands first; the rest follows in the order in which a run needs it.
"""
import argparse
import contextlib
import io
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.ticker import MaxNLocator
from torch import nn

NOT_TOLD = 10  # the label of an image whose class the network is not told
STEPS, GUIDANCE, LR = 50, 1.25, 8e-3  # defaults of the command line


# --------------------------------------------------------------------------------------------------- the network

def fourier_features(x, sigma):
    """Sines and cosines of the pixels, with which a network can tell neighbouring grey values apart, which differ by
    2/255. (Kingma et al. 2021, Variational diffusion models, arXiv 2107.00630, app. C.)

    There is one wave for each of 8 octaves; the fastest has one period per grey value. Noise of deviation sigma
    multiplies a wave of frequency f by exp(-(2 pi f sigma)^2 / 2) on average. The features are scaled by the same
    factor, so that waves which are nothing but noise vanish.

    x: float [B, 1, 28, 28], the image plus noise; sigma: float [B, 1, 1, 1]. Returns [B, 16, 28, 28].
    """
    omega = (2 * math.pi * 127.5 / 2 ** torch.arange(8)).view(1, 8, 1, 1).to(x.device)
    damping = torch.exp(-(omega * sigma) ** 2 / 2)
    phase = omega * (x + 1)
    return torch.cat([damping * phase.sin(), damping * phase.cos()], dim=1)


class Block(nn.Module):
    """Two 3x3 convolutions, each after a normalisation and SiLU. Between them, time and label scale and shift."""

    def __init__(self, channels, condition_channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.condition = nn.Linear(condition_channels, 2 * channels)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # a residual block starts as the identity
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x, condition):
        """x: [B, channels, H, W]; condition: [B, condition_channels]."""
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.conv2(F.silu(h))


class ShuffleUnit(nn.Module):
    """A residual block from one half of the channels onto the other, and one back. A convolution of half of the
    channels is a quarter of the work. A channel shuffle then deals the channels out to new halves (Zhang et al. 2018,
    ShuffleNet, arXiv 1707.01083, §3.1)."""

    def __init__(self, channels, condition_channels):
        super().__init__()
        self.there = Block(channels // 2, condition_channels)
        self.back = Block(channels // 2, condition_channels)

    def forward(self, x, condition):
        """x: [B, channels, H, W]; condition: [B, condition_channels]."""
        a, b = x.chunk(2, dim=1)
        b = b + self.there(a, condition)
        a = a + self.back(b, condition)
        halves = torch.stack([a.movedim(1, -1), b.movedim(1, -1)], dim=-1)  # channels last, in memory too
        return halves.flatten(-2).movedim(-1, 1)


class UNet(nn.Module):
    """The shuffled U-Net: it maps an image, a time and a label to an image.

    The first layer goes to 14x14 and the units work at 7x7, where a pixel sees the whole image after few layers. The
    skip connection carries the finer scale. All convolutions are dense and in channels_last memory, which is what CPUs
    are fastest at.
    """

    def __init__(self, in_channels, out_channels, wide=64, deep=128, units=2, condition_channels=128):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0.5, 3, 32), persistent=False)
        self.time = nn.Sequential(nn.Linear(64, condition_channels), nn.SiLU(),
                                  nn.Linear(condition_channels, condition_channels))
        self.label = nn.Embedding(11, condition_channels)                              # ten classes and NOT_TOLD
        self.stem = nn.Conv2d(in_channels, wide, 4, stride=2, padding=1)               # 28x28 -> 14x14
        self.shrink = nn.Conv2d(wide, deep, 2, stride=2)                               # 14x14 -> 7x7
        self.units = nn.ModuleList(ShuffleUnit(deep, condition_channels) for _ in range(units))
        self.grow = nn.ConvTranspose2d(deep, wide, 2, stride=2)                        # 7x7 -> 14x14
        self.norm = nn.GroupNorm(8, wide)
        self.conv = nn.Conv2d(wide, wide, 3, padding=1)
        self.head = nn.ConvTranspose2d(wide, out_channels, 4, stride=2, padding=1)     # 14x14 -> 28x28
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, t, label):
        """x: float [B, in_channels, 28, 28]; t: [B] in [0, 1]; label: int64 [B]. t and label may lie on the CPU.
        Returns float [B, out_channels, 28, 28]."""
        angles = t.float().to(x.device)[:, None] * self.frequencies  # sinusoidal features (arXiv 1706.03762, §3.5)
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        condition = F.silu(time + self.label(label.to(x.device)))
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        h = self.shrink(x)
        for unit in self.units:
            h = unit(h, condition)
        x = x + self.grow(h)  # the skip connection
        x = self.conv(F.silu(self.norm(x)))
        return self.head(F.silu(x))


def EMA(net):
    """The exponential moving average of the network's weights, which samples and is measured. Its decay is
    min(0.9999, (1 + n) / (10 + n)) after n steps: the papers' 0.9999, less while the run is short."""
    return torch.optim.swa_utils.AveragedModel(
        net, avg_fn=lambda average, weight, n: average.lerp(weight, torch.clamp(9 / (10 + n), min=1e-4)))


def column(values, x):
    """values, [B] on the CPU, as [B, 1, 1, 1] of x's type on x's device, to go with images."""
    return values.view(-1, 1, 1, 1).to(x.dtype).to(x.device)


def randn_like(x):
    """Normal noise of x's shape on x's device, drawn on the CPU: the same numbers on every device."""
    return torch.randn(x.shape).to(x.device)


def discretized_normal_nll(x, mean, sigma):
    """-ln of the mass of N(mean, sigma^2) in the bin of x, one of the 256 grey values in [-1, 1], in nats. A bin
    reaches half-way to the next value, the first and the last one to infinity (DDPM eq. 13, BFN §5.1).

    x, mean, sigma: tensors of one shape, or sigma one number. Computed on the CPU, in float64 and in the normal's
    smaller tail. A mass below 1e-300, which is 37 deviations away, counts as that.
    """
    x_, mean, sigma = x.cpu().double(), mean.cpu().double(), torch.as_tensor(sigma).cpu().double()
    low = torch.where(x_ < -1 + 1 / 255, -math.inf, (x_ - 1 / 255 - mean) / sigma)
    high = torch.where(x_ > 1 - 1 / 255, math.inf, (x_ + 1 / 255 - mean) / sigma)
    upper = low + high > 0
    low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
    mass = torch.special.ndtr(high) - torch.special.ndtr(low)
    return -mass.clamp(min=1e-300).log().float().to(x.device)


# ------------------------------------------------------------------------------------------------------ the data

DATASETS = {"mnist": torchvision.datasets.MNIST, "fashion-mnist": torchvision.datasets.FashionMNIST,
            "kmnist": torchvision.datasets.KMNIST}


class Data(NamedTuple):
    """A data set in memory: images, uint8 [N, 1, 28, 28], and labels, int64 [N], to train on and to test on."""
    name: str
    train: tuple  # of 60,000, or --limit
    test: tuple   # of 10,000, or --limit


def fail(message):
    """End the program for a foreseen reason: one line that says what is wrong and what to do; exit code 1."""
    raise SystemExit(f"error: {message}")


def load_data(name, folder, seed, limit=None):
    """The data set called name, see --dataset; the first `limit` images of either part. Where it cannot be read this
    ends the program, or, for "auto", goes on with drawn digits."""
    if name == "drawn":
        return Data("drawn digits", drawn_digits(min(60000, limit or 60000), 2 * seed),
                    drawn_digits(min(10000, limit or 10000), 2 * seed + 1))
    kind = DATASETS["mnist" if name == "auto" else name]
    there = len(list(Path(folder, kind.__name__, "raw").glob("*-ubyte"))) == 4
    if not there:
        print(f"{kind.__name__} is not in {folder}: downloading it", flush=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision tells of each address it tries
            parts = [kind(folder, train=train, download=not there) for train in (True, False)]
    except Exception as error:  # of the network, of the disk, or of what the files hold
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if name != "auto" or there:
            fail(f"{kind.__name__} in {folder} could not be read or downloaded ({reason}); remove what is broken "
                 "there, or use --dataset drawn")
        print(f"{kind.__name__} could not be downloaded ({reason}): going on with digits drawn from fonts")
        return load_data("drawn", folder, seed, limit)
    for part, count in zip(parts, (60000, 10000)):
        if part.data.shape != (count, 28, 28) or part.targets.shape != (count,):
            fail(f"{kind.__name__} in {folder} does not hold {count} images of 28x28 with labels; remove it, so that "
                 "it is downloaded again")
    return Data(kind.__name__, *[(part.data[:limit, None], part.targets[:limit]) for part in parts])


FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSerif-Bold",
         "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10"]


def glyphs():
    """The digits 0..9 in each of FONTS: float [fonts * 10, 1, 56, 56] in [0, 1], in a box of 40x40 as in MNIST."""
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
            image = F.interpolate(image, scale_factor=40 / max(image.shape), mode="bilinear", antialias=True)
            height, width = image.shape[2:]
            top, left = (56 - height) // 2, (56 - width) // 2
            images.append(F.pad(image, (left, 56 - width - left, top, 56 - height - top)))
    return torch.cat(images)


def drawn_digits(n, seed):
    """n digits drawn from matplotlib's own fonts, and warped: uint8 [n, 1, 28, 28], and labels, int64 [n].

    The ten classes are equally often among each 2000. Each digit has a stroke of its own thickness, is turned, sheared,
    stretched and moved, and then warped by a smooth random field. The same seed gives the same digits, more of them for
    a larger n, and torch's global random state is left alone.
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


# ---------------------------------------------------------------------------------------------- the command line

def parse_args(description, samplers, argv=None, **extra):
    """The flags that both scripts share, and `extra` ones given as name={argparse keywords}."""
    def number(kind, low, high=math.inf):
        def parse(text):
            value = kind(text)
            if not low <= value < high:  # false for nan too
                raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g})")
            return value
        parse.__name__ = kind.__name__
        return parse

    count = number(int, 1)
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    add("--epochs", type=count, default=20, help="train until this many epochs are done (default %(default)s)")
    add("--batch-size", type=count, default=128, metavar="B", help="images a step (default %(default)s)")
    add("--lr", type=number(float, 1e-9, 1e9), default=LR, help="highest learning rate (default %(default)s)")
    add("--seed", type=number(int, 0, 2**31), default=0, help="of everything random (default %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="default: cuda where there is one, else cpu")
    add("--out-dir", type=Path, default="out", metavar="DIR", help="where runs are kept (default %(default)s)")
    add("--data-dir", type=Path, default="data", metavar="DIR", help="where data sets lie (default %(default)s)")
    add("--dataset", choices=["auto", *DATASETS, "drawn"], default="auto",
        help="default: MNIST, or digits drawn from fonts where it cannot be downloaded")
    add("--limit", type=count, metavar="N", help="use the first N training and test images (quick tries)")
    add("--sample", type=count, metavar="N", help="train nothing: draw N images with the run's network")
    add("--steps", type=count, metavar="S", help=f"sampling steps (default {STEPS}, for the run's pictures 1000)")
    add("--sampler", choices=samplers, default=samplers[0], help="default: %(default)s")
    add("--label", type=number(int, 0, 10), metavar="L", help="with --sample: draw this class only, 0 to 9")
    add("--guidance", type=number(float, 0), metavar="W", help=f"of the sampler, 1 for none (default {GUIDANCE})")
    add("--no-labels", action="store_true", help="the network is never told the digit, as in the papers")
    add("--fresh", action="store_true", help="throw away the run that stands there and start over")
    for name, keywords in extra.items():
        add("--" + name.replace("_", "-"), **keywords)
    args = parser.parse_args(argv)
    if args.sample and args.fresh:
        parser.error("--sample draws with the network that --fresh throws away: give one of them")
    if args.label is not None and not args.sample:
        parser.error("--label goes with --sample")
    if args.no_labels and (args.guidance is not None or args.label is not None):
        parser.error("--no-labels: without labels there is neither --guidance nor --label")
    if args.limit and args.batch_size > args.limit:
        parser.error(f"--batch-size {args.batch_size} is more than the {args.limit} images of --limit")
    if args.guidance is None:
        args.guidance = 1 if args.no_labels else GUIDANCE
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: there is no CUDA GPU that this torch can use; try --device cpu")
    if args.device == "mps" and not torch.backends.mps.is_available():
        fail("--device mps: there is no Apple GPU that this torch can use; try --device cpu")
    return args


def run_script(main):
    """main() as the whole program. Ctrl-C ends it with one line; unforeseen errors show their traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; finished epochs are kept: the same command (without --fresh) goes on", file=sys.stderr)
        sys.exit(130)


def write(path, save):
    """Call save(temporary path in the same folder), then rename: there is never half a file at path."""
    temporary = path.with_name("part-" + path.name)  # the suffix stays: it tells matplotlib the format
    try:
        save(temporary)
        os.replace(temporary, path)
    except OSError as error:
        fail(f"{path} could not be written ({error.strerror or error}); what stood there is still whole")
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path, value):
    """torch.save, atomically. By way of memory: a full disk then raises OSError rather than an error of torch's own."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


@contextlib.contextmanager
def seeded(seed):
    """Within this block random numbers start from seed; after it they go on as if it had not been."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# ---------------------------------------------------------------------------------------------------------- a run

FORMAT = 2  # of checkpoints


class Run:
    """A run's folder and what is in it; what stands there is loaded when the run is made.

    sample(net, label, steps, sampler, guidance) yields (t, state, prediction), images in [-1, 1], before each step of
    sampling, and last the finished image in place of the prediction. bound(net, images, label) returns upper bounds on
    code lengths given the label, in nats, as {name of a term: [B]}. real(images) are images as the model has them.
    """

    def __init__(self, args, name, title, unit, state_name, net, ema, optimizer, sample, bound, real=lambda x: x):
        self.args, self.title, self.unit, self.state_name = args, title, unit, state_name
        self.net, self.ema, self.optimizer = net, ema, optimizer
        self.sample, self.bound, self.real = sample, bound, real
        self.folder = args.out_dir / name
        self.history, self.previews, self.final = [], {}, {}
        self.settings = {"model": name, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed,
                         "limit": args.limit, "no_labels": args.no_labels}  # what makes a run this run and no other
        checkpoint = self.folder / "checkpoint.pt"
        there = {} if args.fresh or not checkpoint.exists() else self.load(checkpoint)
        if args.sample:
            if not there:
                fail(f"{self.folder} holds no trained network to sample from; train one first, without --sample")
            self.refuse_others(there, ["no_labels"])
            self.settings = there
            return
        self.data = load_data(args.dataset, args.data_dir, args.seed, args.limit)
        self.settings["dataset"] = self.data.name
        if args.batch_size > len(self.data.train[0]):
            fail(f"--batch-size {args.batch_size} is more than the {len(self.data.train[0])} training images")
        self.refuse_others(there, there)
        try:
            (self.folder / "epochs").mkdir(parents=True, exist_ok=True)
            if not there:  # a new run, or --fresh
                for old in [checkpoint, *self.folder.glob("*.json"), *self.folder.glob("epochs/*.png")]:
                    old.unlink(missing_ok=True)
        except OSError as error:
            fail(f"{self.folder} cannot be written to ({error.strerror})")
        done = f", {len(self.history)} epochs done" if self.history else ""
        print(f"{title} on {self.data.name}: {len(self.data.train[0])} training images, {self.parameters:,} "
              f"parameters, {args.device}{done} -> {self.folder}", flush=True)

    def load(self, checkpoint):
        """Load the checkpoint and the final figures beside it; returns its settings. Ends the program where the file
        is not one of ours."""
        keep = "it is left as it is: move it away, or start over with --fresh"
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)  # plain values, never code
        except Exception as error:  # whatever torch raises of a file that is no checkpoint
            fail(f"{checkpoint} is not a checkpoint that can be read ({type(error).__name__}); {keep}")
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            fail(f"{checkpoint} is not a checkpoint of this version; {keep}")
        if state["settings"]["model"] != self.settings["model"]:
            fail(f"{checkpoint} is one of {state['settings']['model']}, not of {self.settings['model']}; {keep}")
        try:
            self.net.load_state_dict(state["net"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            fail(f"{checkpoint} is one of another network ({str(error).splitlines()[-1].strip()}); {keep}")
        self.history, self.previews = state["history"], state["previews"]
        torch.set_rng_state(state["random_state"])
        with contextlib.suppress(OSError, ValueError, KeyError):  # without it, all is measured again
            metrics = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
            if len(metrics["history"]) == len(self.history):
                self.final = metrics["final"]
        return state["settings"]

    def refuse_others(self, there, keys):
        """End the program where a setting of the run that stands there is not ours."""
        other = [f"{key} {there[key]} there, {self.settings[key]} here" for key in keys
                 if there[key] != self.settings[key]]
        if other:
            drawn = " (--dataset drawn)" if there["dataset"] == "drawn digits" else ""
            fail(f"the run in {self.folder} has other settings ({'; '.join(other)}): give those{drawn}, "
                 "or another --out-dir, or --fresh to throw that run away")

    @property
    def parameters(self):
        return sum(p.numel() for p in self.net.parameters())

    def told(self, labels):
        """The labels as the network is given them."""
        return torch.full_like(labels, NOT_TOLD) if self.args.no_labels else labels

    def epochs(self):
        """The numbers of the epochs that are still to be trained."""
        for self.epoch in range(len(self.history) + 1, self.args.epochs + 1):
            self.start = time.perf_counter()
            yield self.epoch

    def batches(self):
        """One epoch of shuffled batches: images, float [B, 1, 28, 28] in [-1, 1] on the device, and labels, int64 [B]
        on the CPU. A last batch that is smaller is left out."""
        images, labels = self.data.train
        size = self.args.batch_size
        count = len(images) // size
        for i, chosen in enumerate(torch.randperm(len(images))[:count * size].view(count, size)):
            if sys.stdout.isatty() and i % 10 == 0:
                print(f"\repoch {self.epoch}/{self.args.epochs}: {i / count:4.0%} ", end="", flush=True)
            yield to_float(images[chosen]).to(self.args.device), self.told(labels[chosen])

    def end_epoch(self, losses):
        """Measure, draw nine digits, write the checkpoint: after this, the epoch cannot be lost."""
        seconds = time.perf_counter() - self.start
        test = sum(self.measure(2000, repeats=1).values())
        row = {"epoch": self.epoch, "seconds": seconds, "train_loss": sum(losses) / len(losses),
               "images_per_second": len(losses) * self.args.batch_size / seconds,
               "test": test.mean().item(), "test_se": standard_error(test)}
        if not math.isfinite(row["train_loss"] + row["test"]):
            fail(f"the loss is no longer a number in epoch {self.epoch} with --lr {self.args.lr:g}: try a smaller one; "
                 "what earlier epochs trained is kept")
        print("\r" * sys.stdout.isatty() + f"epoch {self.epoch}/{self.args.epochs}: {seconds:.0f} s, "
              f"{row['images_per_second']:.0f} images/s, training loss {row['train_loss']:.4f}, "
              f"test {row['test']:.3f} +- {row['test_se']:.3f} {self.unit}", flush=True)
        self.history.append(row)
        self.previews[self.epoch] = self.draw(NINE)
        self.final = {}  # it was that of fewer epochs
        save_tensors(self.folder / "checkpoint.pt", {
            "format": FORMAT, "settings": self.settings, "net": self.net.state_dict(), "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(), "history": self.history, "previews": self.previews,
            "random_state": torch.get_rng_state()})
        self.write_metrics()
        save_grids(self.folder / "epochs" / f"epoch_{self.epoch:03}.png", {"": self.previews[self.epoch]},
                   f"{self.title} on {self.data.name}, epoch {self.epoch}")

    def metrics(self):
        return {"settings": self.settings, "title": self.title, "unit": self.unit, "parameters": self.parameters,
                "device": self.args.device, "threads": torch.get_num_threads(), "torch": torch.__version__,
                "history": self.history, "final": self.final}

    def write_metrics(self):
        text = json.dumps(self.metrics(), indent=1)
        write(self.folder / "metrics.json", lambda path: path.write_text(text, encoding="utf-8"))

    def draw(self, labels):
        """One image for each label: uint8 [N, 1, 28, 28]."""
        images = []
        with seeded(self.args.seed):
            for part in labels.split(500):
                *_, (_, _, image) = self.process(part, STEPS)
                images.append(to_uint8(image))
        return torch.cat(images)

    def process(self, labels, steps):
        """Sampling, one image for each label, with the command line's sampler, guidance, and steps if it has any."""
        return self.sample(self.ema, self.told(labels), self.args.steps or steps, self.args.sampler,
                           self.args.guidance)

    @torch.no_grad()
    def measure(self, count, repeats):
        """The bound's terms for the first `count` test images, {name: [count]} in self.unit, means of `repeats`
        estimates.

        The network is told the label, but this is a bound on the code length of the image alone: labels are even, so
        that  -ln p(x) = -ln sum_label p(label) p(x | label) <= -ln p(x | label) + ln 10.
        """
        images, labels = [part[:count] for part in self.data.test]
        terms = {}
        with seeded(self.args.seed):
            for x, label in zip(images.repeat(repeats, 1, 1, 1).split(500), labels.repeat(repeats).split(500)):
                for name, nats in self.bound(self.ema, to_float(x).to(self.args.device), self.told(label)).items():
                    terms.setdefault(name, []).append(nats.cpu())
        if not self.args.no_labels:
            terms["label"] = [torch.full((len(images) * repeats,), math.log(10))]
        scale = 784 * math.log(2) if self.unit == "bits/dim" else 1
        return {name: torch.cat(nats).view(repeats, -1).mean(0) / scale for name, nats in terms.items()}

    def save_samples(self):
        """--sample N: draw N images into samples.pt, and the first nine of them into samples.png."""
        N, label = self.args.sample, self.args.label
        start = time.perf_counter()
        images = self.draw(torch.arange(N) % 10 if label is None else torch.full((N,), label))
        save_tensors(self.folder / "samples.pt", images)
        save_grids(self.folder / "samples.png", {"": images[:9]}, f"{self.title} on {self.settings['dataset']}")
        print(f"{N} images in {time.perf_counter() - start:.1f} s -> {self.folder / 'samples.pt'}")

    def finish(self):
        """What a run leaves at its end: final figures of merit, measured once, pictures, and the comparison."""
        sampling = {"steps": self.args.steps or STEPS, "sampler": self.args.sampler, "guidance": self.args.guidance}
        if self.final.get("sampling") != sampling:
            self.final = {"sampling": sampling} | self.measure_final()
            self.write_metrics()
        self.save_figures()
        print(f"{self.title} on {self.data.name}, {len(self.history)} epochs: {self.final['bound']:.3f} +- "
              f"{self.final['bound_se']:.3f} {self.unit}" + "".join(
                  f", {name} {self.final[name]:.3g} (real digits {self.final[name + '_real']:.3g})"
                  for name in ("frechet", "right", "clear") if name in self.final))
        compare(self.args.out_dir, self.settings["model"])

    def measure_final(self):
        """The bound on the whole test set; Frechet distance and shares of right and of clear digits, of 10,000 drawn
        ones (of fewer after less than 20 epochs: measuring should not outlast training); time for nine digits."""
        images, labels = self.data.test
        terms = self.measure(len(images), repeats=min(4, len(self.history)))
        total = sum(terms.values())
        final = {"bound": total.mean().item(), "bound_se": standard_error(total),
                 "parts": {name: term.mean().item() for name, term in terms.items()}}
        start = time.perf_counter()
        self.draw(NINE)
        final["seconds_nine"] = time.perf_counter() - start
        count = min(len(images), max(2000, 500 * len(self.history)))
        if count < 2000:  # fewer say little
            return final
        classifier = trained_classifier(self.data, [self.args.data_dir, self.args.out_dir])
        with seeded(self.args.seed):
            train, test = [to_uint8(self.real(to_float(part))) for part in (self.data.train[0][-count:], images)]
        test, right_real, clear_real = judge(classifier, test, labels)
        asked = torch.arange(count) % 10
        drawn, right, clear = judge(classifier, self.draw(asked), asked)
        final |= {"count": count, "frechet": frechet_distance(drawn, test),
                  "frechet_real": frechet_distance(judge(classifier, train, self.data.train[1][-count:])[0], test),
                  "clear": clear, "clear_real": clear_real}
        return final if self.args.no_labels else final | {"right": right, "right_real": right_real}

    def save_figures(self):
        """Figures 1 to 4 of the README, the curves, the film, and trace.pt, of which the comparison is made."""
        steps = self.args.steps or 1000
        frames = set(spread(50, steps + 1) + spread(10, steps + 1))
        with seeded(self.args.seed):
            kept = [(t, to_uint8(state), to_uint8(prediction)) for i, (t, state, prediction)
                    in enumerate(self.process(NINE, steps)) if i in frames]
        times, states, predictions = zip(*kept)
        trace = {"title": self.title, "state_name": self.state_name, "times": list(times),
                 "states": torch.stack(states), "predictions": torch.stack(predictions)}
        save_tensors(self.folder / "trace.pt", trace)
        name = f"{self.title} on {self.data.name}, {len(self.history)} epochs"
        save_grids(self.folder / "training.png", {f"epoch {1 + i}": self.previews[1 + i] for i in
                                                  spread(6, len(self.previews))}, f"{name}: the same nine draws")
        save_grids(self.folder / "samples.png", {"": predictions[-1]}, f"{name}: {steps} steps")
        save_steps(self.folder / "steps.png", [trace], f"{name}: {steps} steps")
        save_gif(self.folder / "process.gif", [trace], f"{name}: {steps} steps")
        save_curves(self.folder / "curves.png", [self.metrics()], name, ["train_loss", "test"])


NINE = torch.arange(1, 10)  # the digits of all pictures, in reading order


def spread(count, total):
    """count indices, evenly spread over 0..total-1, first and last among them (all, where there are not as many)."""
    return torch.linspace(0, total - 1, min(count, total)).round().long().tolist()


def standard_error(values):
    return (values.std() / len(values) ** 0.5).item()


# ---------------------------------------------------------------------------- the Frechet distance, and clear digits

def classifier_network():
    """A small network that names digits: images are compared in its last hidden layer, of 64 features."""
    return nn.Sequential(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.SiLU(),
                         nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),
                         nn.Conv2d(64, 128, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(128 * 9, 64), nn.SiLU(), nn.Linear(64, 10)).to(memory_format=torch.channels_last)


def trained_classifier(data, folders):
    """The classifier for a data set, from the first of folders that holds it, else trained (about a minute) and kept
    in the first of them that can be written."""
    name = f"classifier-{data.name.lower().replace(' ', '-')}-{len(data.train[0])}.pt"
    net = classifier_network()
    for folder in folders:
        if (folder / name).exists():
            net.load_state_dict(torch.load(folder / name, weights_only=True))
            return net
    print(f"training the classifier of the Frechet distance on {data.name}", flush=True)
    epochs, size = 4, 128
    steps = len(data.train[0]) // size
    with seeded(0):
        net = classifier_network()
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(data.train[0]))[:steps * size].view(steps, size):
                loss = F.cross_entropy(net(to_float(data.train[0][chosen])), data.train[1][chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    for folder in folders:
        with contextlib.suppress(OSError, SystemExit):
            if folder.stat().st_mode & 0o200:  # a folder marked as read-only is left alone, though root could write
                save_tensors(folder / name, net.state_dict())
                break
    return net


@torch.no_grad()
def judge(classifier, images, labels):
    """Of uint8 images [N, 1, 28, 28]: their features, float64 [N, 64]; *right*, the share that the classifier reads as
    their label; *clear*, the share of which it is at least 90% sure."""
    features = torch.cat([classifier[:-2](to_float(part)) for part in images.split(500)])
    p = classifier[-2:](features).softmax(1)
    right, clear = p.argmax(1) == labels, p.amax(1) >= 0.9
    return features.double(), right.float().mean().item(), clear.float().mean().item()


def frechet_distance(a, b):
    """Squared Frechet distance of the normals fitted to features a and b, float64 [N, D] (Dowson & Landau 1982):

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))
    """
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


# --------------------------------------------------------------------------------------------------- the figures

COLOURS = ["#2b6cb0", "#dd6b20", "#2f855a", "#805ad5"]
DPI = 200
STYLE = {"font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11, "figure.titleweight": "bold",
         "savefig.bbox": "tight", "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
         "axes.edgecolor": "#888888", "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6"}
matplotlib.rcParams.update(STYLE)


def tile(images, columns):
    """Digits, uint8 [N, 1, 28, 28], as one picture with white lines between them."""
    return torchvision.utils.make_grid(images, columns, padding=1, pad_value=255)[0].numpy()


def draw_grids(panels, title, columns=3):
    """Grids of digits side by side, panels = {label: uint8 [N, 1, 28, 28]} -> (figure, the drawn pictures)."""
    pictures = [tile(images, columns) for images in panels.values()]
    height, width = pictures[0].shape
    scale = max(2, min(6, 1600 // (width * len(pictures))))  # screen pixels for each of a digit
    figure = Figure((scale * (width + 4) * len(pictures) / DPI, (scale * height + 120) / DPI), dpi=DPI,
                    layout="constrained")
    figure.suptitle(title, wrap=True)
    drawn = []
    for axis, picture, label in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, panels):
        axis.set(title=label, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        drawn.append(axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest"))
    return figure, drawn


def save_grids(path, panels, title):
    write(path, draw_grids(panels, title)[0].savefig)


def save_steps(path, traces, title):
    """One digit at ten steps, from left to right: a row for each trace's state, one for its prediction of the image."""
    chosen = spread(10, len(traces[0]["times"]))
    rows = torch.cat([trace[key][chosen, 2] for trace in traces for key in ("states", "predictions")])
    names = [name for trace in traces for name in (f"{trace['title']}\n{trace['state_name']}", "prediction")]
    figure, [drawn] = draw_grids({"": rows}, title, columns=len(chosen))
    times = [f"t = {traces[0]['times'][i]:.3f}" if len(traces) == 1 else f"step {i}/{chosen[-1]}" for i in chosen]
    drawn.axes.set_xticks([29 * i + 14.5 for i in range(len(times))], times)
    drawn.axes.set_yticks([29 * i + 14.5 for i in range(len(names))], names)
    drawn.axes.grid(False)
    drawn.axes.tick_params(length=0, labeltop=True, labelbottom=False)
    write(path, figure.savefig)


def save_gif(path, traces, title):
    """Nine digits of each trace from noise to image, as a film."""
    figure, drawn = draw_grids({trace["title"]: trace["states"][0] for trace in traces}, title)
    last = len(traces[0]["times"]) - 1

    def show(i):
        for picture, trace in zip(drawn, traces):  # in six shades of grey: noise hardly compresses
            picture.set_data(tile((trace["states"][min(i, last)].int() + 25) // 51 * 51, 3))

    film = FuncAnimation(figure, show, frames=last + 18)  # hold the finished digits for 1.5 seconds
    write(path, lambda temporary: film.save(temporary, writer="pillow", fps=12, dpi=DPI // 2))


def save_curves(path, runs, title, columns):
    """Columns of the history in runs' metrics over epochs, one beside the other. Test results have a band of one
    standard error either way."""
    figure = Figure((4.2 * len(columns), 3.2), dpi=DPI, layout="constrained")
    figure.suptitle(title, wrap=True)
    for axis, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        low, high = math.inf, -math.inf
        for run, colour in zip(runs, COLOURS):
            x, y, error = torch.tensor([(row["epoch"], row[column], row["test_se"]) for row in run["history"]]).T
            axis.plot(x, y, ".-", color=colour, label=run["title"])
            if column == "test":
                axis.fill_between(x, y - error, y + error, color=colour, alpha=0.25, linewidth=0)
            low, high = min(low, y.min().item()), max(high, y[len(y) // 10:].max().item())
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))  # the first epochs may lie above it
        axis.set(xlabel="epoch", ylabel={"train_loss": "training loss", "test": f"test {runs[0]['unit']}"}[column])
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.legend()
    write(path, figure.savefig)


# ------------------------------------------------------------------------------------------------- the comparison

def compare(out_dir, name):
    """Where finished runs of diffusion and of a BFN stand side by side: figures 5 and 6, film, curves and table, from
    their metrics.json and trace.pt alone. name: the run that has just ended; the others must have its settings."""
    runs, traces = [], []
    for other in (name, "diffusion", "bfn-continuous", "bfn-discretized", "bfn-discrete"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            run = json.loads((out_dir / other / "metrics.json").read_text(encoding="utf-8"))
            trace = torch.load(out_dir / other / "trace.pt", weights_only=True)
            settings = {**run["settings"], "model": "", "epochs": len(run["history"]), "steps": len(trace["times"]),
                        "guidance": run["final"]["sampling"]["guidance"]}
            if not runs:
                ours = settings
            differs = [f"{key} {settings[key]} and {ours[key]}" for key in ours if settings[key] != ours[key]]
            if differs:
                print(f"{other} is not compared with {name}: {', '.join(differs)}")
            else:
                runs, traces = runs + [run], traces + [trace]
    runs, traces = runs[1:], traces[1:]  # ours came twice
    if len(runs) < 2 or runs[0]["title"] != "DDPM":
        return
    folder = out_dir / "comparison"
    folder.mkdir(exist_ok=True)
    subject = f"DDPM and BFN on {ours['dataset']}, {ours['epochs']} epochs each"
    save_grids(folder / "samples.png", {trace["title"]: trace["predictions"][-1] for trace in traces}, subject)
    save_steps(folder / "steps.png", traces, f"{subject}: one digit")
    save_gif(folder / "process.gif", traces, subject)
    save_curves(folder / "curves.png", [run for run in runs if run["unit"] == "bits/dim"], subject, ["test"])
    write(folder / "table.md", lambda path: path.write_text(table(runs, ours), encoding="utf-8"))
    print(f"comparison of {', '.join(run['title'] for run in runs)} -> {folder}")


def table(runs, settings):
    """The comparison as a table in Markdown, of what stands in the runs' metrics.json."""
    lines = ["| | " + " | ".join(run["title"] for run in runs) + " |", "| --- |" + " --- |" * len(runs)]

    def row(name, cell):
        with contextlib.suppress(KeyError):  # a quick try measures less
            lines.append(f"| {name} | " + " | ".join(cell(run, run["final"]) for run in runs) + " |")

    row("parameters", lambda run, final: f"{run['parameters']:,}")
    row("training, images/s (median epoch)",
        lambda run, final: f"{median(epoch['images_per_second'] for epoch in run['history']):.0f}")
    row("seconds for nine digits", lambda run, final: f"{final['seconds_nine']:.2f}")
    row("test bound on code length (± standard error)",
        lambda run, final: f"{final['bound']:.3f} ± {final['bound_se']:.3f} {run['unit']}")
    row("Fréchet distance (real digits)", lambda run, final: f"{final['frechet']:.2f} ({final['frechet_real']:.2f})")
    row("right (real digits)", lambda run, final: f"{final['right']:.1%} ({final['right_real']:.1%})")
    row("clear (real digits)", lambda run, final: f"{final['clear']:.1%} ({final['clear_real']:.1%})")
    equal = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if value)
    return "\n".join(lines) + f"\n\nHeld equal: network, optimizer, {equal}.\n"
