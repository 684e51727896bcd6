"""What diffusion.py and bfn.py share: the shuffled U-Net, data, a run's files, evaluation, figures and the comparison.

Images are uint8 0..255 at the edges and float32 [B, 1, 28, 28] in [-1, 1] inside the models. A label is int64 [B]:
0 to 9, or NULL_LABEL. The network stands first; the rest follows in the order in which a run needs it.
"""
import argparse
import contextlib
import json
import math
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from torch import nn

NULL_LABEL = 10  # in place of a label that the network is not given
NINE = torch.arange(1, 10)  # the digits of all pictures, in reading order
STEPS, GUIDANCE = 30, 1.15  # defaults of the command line
FORMAT = 5  # of checkpoints
if hasattr(torch.backends, "nnpack"):
    torch.backends.nnpack.set_flags(False)  # it slows down convolutions where torch has no oneDNN (Apple silicon)


# --------------------------------------------------------------------------------------------------- the network

def fourier_features(z, sigma):
    """Sines and cosines of the pixels, with which a network can tell neighbouring grey values apart, which differ by
    2/255 (Kingma et al. 2021, Variational diffusion models, arXiv 2107.00630, app. C). Bits/dim 1.6, without 2.8.

    z: float [B, 1, 28, 28] = (x + sigma eps) / sqrt(1 + sigma^2); sigma: float [B, 1, 1, 1]. Returns [B, 16, 28, 28]:
    a wave of x + sigma eps for each of 8 octaves; the fastest has one period per grey value. On average over the noise
    eps, exp(-(omega sigma)^2 / 2) is left of a wave; scaled by that, waves that are nothing but noise vanish."""
    sigma = sigma.clamp(max=1000)  # it may be infinite
    omega = 2 * math.pi * 127.5 / 2 ** torch.arange(8, device=z.device).view(1, 8, 1, 1)
    damping = torch.exp(-(omega * sigma) ** 2 / 2)
    phase = omega * (z * (1 + sigma ** 2).sqrt() + 1)
    return torch.cat([damping * phase.sin(), damping * phase.cos()], dim=1)


class Block(nn.Module):
    """Two 3x3 convolutions, each after a normalisation and SiLU. Between them, sigma and label scale and shift."""

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
    """A residual block from one half of the channels onto the other, and one back, each a quarter of the work of a full
    one. A channel shuffle then deals the channels out to new halves (ShuffleNet, arXiv 1707.01083, §3.1)."""

    def __init__(self, channels, condition_channels):
        super().__init__()
        self.there = Block(channels // 2, condition_channels)
        self.back = Block(channels // 2, condition_channels)

    def forward(self, x, condition):
        a, b = x.chunk(2, dim=1)
        b = b + self.there(a, condition)
        a = a + self.back(b, condition)
        shuffled = torch.stack([a.movedim(1, -1), b.movedim(1, -1)], dim=-1).flatten(-2).movedim(-1, 1)
        return shuffled if x.device.type == "cpu" else shuffled.contiguous()  # it is in channels_last memory


class UNet(nn.Module):
    """The shuffled U-Net, net(z, sigma, label): noisy image, noise level and label to image. The units work at 7x7,
    where a pixel sees the whole image after few layers. All convolutions are dense and on CPUs in channels_last memory,
    the fastest way there. With fourier, it also sees the `fourier_features` of z, which then has one channel."""

    def __init__(self, in_channels, out_channels, fourier, width=64, units=2, condition_channels=128):
        super().__init__()
        self.fourier = fourier
        self.register_buffer("frequencies", torch.logspace(0.5, 3, 32), persistent=False)
        self.noise = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, condition_channels))
        self.label = nn.Embedding(11, condition_channels)                              # ten classes and NULL_LABEL
        self.stem = nn.Conv2d(in_channels + 16 * fourier, width, 4, stride=2, padding=1)  # 28x28 -> 14x14
        self.shrink = nn.Conv2d(width, 2 * width, 2, stride=2)                         # 14x14 -> 7x7
        self.units = nn.ModuleList(ShuffleUnit(2 * width, condition_channels) for _ in range(units))
        self.grow = nn.ConvTranspose2d(2 * width, width, 2, stride=2)                  # 7x7 -> 14x14
        self.norm = nn.GroupNorm(8, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.ConvTranspose2d(width, out_channels, 4, stride=2, padding=1)    # 14x14 -> 28x28
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, z, sigma, label):
        """z: float [B, in_channels, 28, 28], for grey values (x + sigma eps) / sqrt(1 + sigma^2), an image with noise of
        std sigma, scaled to unit size. sigma: float [B, 1, 1, 1] (or one for all, [1, 1, 1, 1]) in [0, inf]; label:
        int64 [B]. Returns float [B, out_channels, 28, 28]."""
        level = 2 / math.pi * sigma.flatten(1).atan()  # in [0, 1]; with the schedule of diffusion.py it is t / T
        angles = level * self.frequencies  # sinusoidal features (arXiv 1706.03762, §3.5)
        noise = self.noise(torch.cat([angles.sin(), angles.cos()], dim=1))
        condition = F.silu(noise + self.label(label))
        if self.fourier:
            z = torch.cat([z, fourier_features(z, sigma)], dim=1)
        x = self.stem(z.contiguous(memory_format=torch.channels_last) if z.device.type == "cpu" else z)
        h = self.shrink(x)
        for unit in self.units:
            h = unit(h, condition)
        x = x + self.grow(h)  # the skip connection
        x = self.conv(F.silu(self.norm(x)))
        return self.head(F.silu(x))


def ema(net, decay=0.999):
    """A copy of net whose weights are an exponential moving average of net's, by ema.update_parameters(net). After n
    updates the decay is min(decay, (1 + n) / (10 + n)), so that the first, untrained weights are soon forgotten."""
    def average(mean, weights, n):
        return mean.lerp(weights, (9 / (10 + n)).clamp(min=1 - decay))
    return torch.optim.swa_utils.AveragedModel(net, avg_fn=average)


def discretized_normal_nll(x, mean, std):
    """-ln of the mass of N(mean, std^2) in the bin of x, one of the 256 grey values in [-1, 1], in nats; all of one
    shape, or std one number. A bin reaches half-way to the next value, the first and the last one to infinity (DDPM
    eq. 13, BFN §5.1). On the CPU, in float64; a mass below 1e-300 counts as that."""
    x, mean, std = [torch.as_tensor(value).cpu().double() for value in (x, mean, std)]
    low = torch.where(x < -1 + 1 / 255, -math.inf, (x - 1 / 255 - mean) / std)
    high = torch.where(x > 1 - 1 / 255, math.inf, (x + 1 / 255 - mean) / std)
    lower = low + high < 0  # mirrored into the upper tail, where erfc loses no digits
    low, high = torch.where(lower, -high, low), torch.where(lower, -low, high)
    mass = (torch.erfc(low / 2 ** 0.5) - torch.erfc(high / 2 ** 0.5)) / 2
    return -mass.clamp(min=1e-300).log().float()


def discretized_normal_mean(mean, std):
    """The mean of X, N(mean, std^2) rounded to one of the 256 grey values in [-1, 1], all [B, 1, 28, 28].

    In units of grey values, 0..255, it is sum_{j=1..255} P(X > j - 1/2) (BFN §5.5). If std is below 1 of them, terms
    j <= near (the rounded mean) count as 1, the others as 0; the loop corrects the ten nearest. If it is larger: the
    mean of X clipped to 0..255 and not rounded, which is off by 0.02 at most."""
    Phi = torch.distributions.Normal(0.0, 1.0, validate_args=False).cdf
    m, sigma = (mean + 1) * 127.5, std * 127.5
    narrow = near = m.detach().round().clamp(0, 255)
    for i in range(-5, 5):
        edge = near + i + 0.5  # j - 1/2
        narrow = narrow + (edge > 0) * (edge < 255) * (Phi((m - edge) / sigma) - int(i < 0))
    a, b = -m / sigma, (255 - m) / sigma
    phi_a, phi_b = [torch.exp(-z ** 2 / 2) / (2 * math.pi) ** 0.5 for z in (a, b)]
    wide = 255 + m * (Phi(b) - Phi(a)) - 255 * Phi(b) + sigma * (phi_a - phi_b)
    return torch.where(sigma < 1, narrow, wide) / 127.5 - 1


# ------------------------------------------------------------------------------------------------------ the data

DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}
FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneral", "cmr10", "cmss10"]


def fail(message):
    """End the program for a foreseen reason: one line that says what is wrong and what to do; exit code 1."""
    raise SystemExit(f"error: {message}")


def load_data(name, folder, seed, limit=None):
    """The data set called name, see --dataset: its full name, training and test set, each a pair of images, uint8
    [N, 1, 28, 28], and labels, int64 [N]; N is 60,000 and 10,000, or limit. "auto" fails for broken files only."""
    if name == "drawn":
        return "drawn digits", *[drawn_digits(min(N, limit or N), 2 * seed + i) for i, N in enumerate((60000, 10000))]
    kind = getattr(torchvision.datasets, DATASETS["mnist" if name == "auto" else name])
    raw = Path(folder, kind.__name__, "raw")
    there = len(list(raw.glob("*-ubyte"))) == 4
    try:
        if not there:
            print(f"{kind.__name__} is not in {folder}: downloading it from {kind.mirrors[0]}", flush=True)
            socket.setdefaulttimeout(15)  # seconds without an answer, for each of two addresses
            raw.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as fetched:
                kind(fetched, download=True)
                for file in Path(fetched).glob("*/raw/*-ubyte"):
                    os.replace(file, raw / file.name)  # whole, whoever else does the same
        parts = [kind(folder, train=train) for train in (True, False)]
    except Exception as error:  # of the network, of the disk, or of what the files hold
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if name != "auto" or there:
            fail(f"{kind.__name__} in {folder} could not be read or downloaded ({reason}); remove what is broken "
                 "there, or use --dataset drawn")
        print(f"{kind.__name__} could not be downloaded ({reason}): going on with digits drawn from fonts")
        return load_data("drawn", folder, seed, limit)
    return kind.__name__, *[(part.data[:limit, None], part.targets[:limit]) for part in parts]


def glyphs():
    """The digits 0..9 in each of FONTS: float [fonts * 10, 1, 56, 56] in [0, 1], in a box of 40x40 as in MNIST."""
    images = []
    for name in FONTS:
        font = FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name + ".ttf")))
        font.set_size(60, 72)
        for digit in "0123456789":
            font.set_text(digit)
            font.draw_glyphs_to_bitmap()
            image = torch.tensor(font.get_image().tolist()) / 255
            rows, columns = image.amax(1).nonzero(), image.amax(0).nonzero()
            image = image[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
            scale = 40 / max(image.shape)
            image = F.interpolate(image[None, None], scale_factor=scale, mode="bilinear", antialias=True)
            images.append(torchvision.transforms.functional.center_crop(image, [56, 56]))
    return torch.cat(images)


def drawn_digits(n, seed):
    """n digits drawn from matplotlib's fonts, each warped by a smooth random field: uint8 [n, 1, 28, 28], and labels,
    int64 [n]. The ten classes are equally often among each 2000. The same seed gives the same digits, for any n."""
    random = torch.Generator().manual_seed(seed)
    B, images, labels = 2000, [], []
    glyph = F.avg_pool2d(glyphs(), 3, stride=1, padding=1)
    upright = F.affine_grid(torch.eye(2, 3).expand(B, 2, 3), (B, 1, 28, 28), align_corners=False)
    for _ in range(math.ceil(n / B)):
        label = torch.randperm(B, generator=random) % 10
        index = torch.randint(len(FONTS), (B,), generator=random) * 10 + label
        field = 0.15 * torch.randn(B, 2, 3, 3, generator=random)
        warp = F.interpolate(field, size=(28, 28), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        image = F.grid_sample(glyph[index], 1.15 * upright + warp, align_corners=False)
        images.append((image * 1.3).clamp(0, 1).mul(255).round().byte())
        labels.append(label)
    return torch.cat(images)[:n], torch.cat(labels)[:n]


def to_float(images):
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float [-1, 1] -> uint8 0..255, on the CPU; what lies outside is clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().cpu()


# ------------------------------------------------------------------------------------ the command line and a run

def parse_args(description, argv, samplers, data_types=()):
    """The command line's flags. The first of samplers and of data_types, lists of names, is the default."""
    def within(kind, low, high=math.inf):
        def number(text):
            if not low <= kind(text) < high:  # false for nan too
                raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g})")
            return kind(text)
        return number

    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    add("--epochs", type=within(int, 1), default=20,
        help="train until this many epochs are done (default %(default)s)")
    add("--batch-size", type=within(int, 1), default=64, metavar="B", help="images a step (default %(default)s)")
    add("--lr", type=within(float, 1e-9, 1e9), default=2e-3, help="learning rate (default %(default)s)")
    add("--seed", type=within(int, 0, 2**31), default=0, help="of everything random (default %(default)s)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="default: cuda if usable, else cpu")
    add("--out-dir", type=Path, default="out", metavar="DIR", help="where runs are kept (default %(default)s)")
    add("--data-dir", type=Path, default="data", metavar="DIR", help="where data sets lie (default %(default)s)")
    add("--dataset", choices=["auto", *DATASETS, "drawn"], default="auto", help="default: MNIST, or else drawn digits")
    add("--limit", type=within(int, 1), metavar="N", help="use the first N training and test images (quick tries)")
    add("--sample", type=within(int, 1), metavar="N", help="train nothing: draw N images with this run")
    add("--steps", type=within(int, 1), metavar="S", help=f"sampling steps (default {STEPS}, in final pictures 1000)")
    add("--sampler", choices=samplers, default=samplers[0], help="default: %(default)s")
    add("--label", type=int, choices=range(10), metavar="L", help="with --sample: draw this class only, 0 to 9")
    add("--guidance", type=within(float, 0), metavar="W", help=f"of the sampler, 1 for none (default {GUIDANCE})")
    add("--no-labels", action="store_true", help="the network is not given the label, as in the papers")
    add("--fresh", action="store_true", help="throw away the run that stands there and start over")
    if data_types:
        add("--data-type", choices=data_types, default=data_types[0], help="what a pixel is (default %(default)s)")
    args = parser.parse_args(argv)
    for wrong, message in [
            (args.sample and args.fresh, "--sample draws with the network that --fresh throws away"),
            (args.label is not None and not args.sample, "--label goes with --sample"),
            (args.no_labels and (args.guidance, args.label) != (None, None), "--guidance and --label need labels"),
            (args.batch_size > min(args.limit or 60000, 60000), "--batch-size is more than there are training images")]:
        if wrong:
            parser.error(message)
    if args.guidance is None:
        args.guidance = 1 if args.no_labels else GUIDANCE
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        F.conv2d(torch.ones(1, 1, 3, 3, device=device), torch.ones(1, 1, 3, 3, device=device)).item()
    except (RuntimeError, AssertionError) as error:  # no such GPU, or too old for this torch, or full
        reason = f"the GPU cannot be used ({str(error).splitlines()[0][:200]})"
        if args.device != "auto":
            fail(f"{reason}; try --device cpu")
        print(f"{reason}: going on with the CPU", flush=True)
        device = "cpu"
    args.device = device
    return args


def run_script(main):
    """main() as the whole program. Ctrl-C ends it with one line; unforeseen errors show their traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; finished epochs are kept: the same command (without --fresh) goes on", file=sys.stderr)
        sys.exit(130)


def write(path, save):
    """Call save(temporary path beside it), then rename: there is never half a file at path."""
    temporary = path.with_name(f"part-{os.getpid()}-{path.name}")  # its suffix tells matplotlib the format
    try:
        save(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) if path.suffix == ".pt" else OSError as error:  # torch.save's, of a full disk
        fail(f"{path} could not be written ({str(error).splitlines()[0]}); an older file there is kept")
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """A run's folder and what is in it; what stands there is loaded when the run is made.

    sample(net, label, steps, sampler, guidance) yields (state, prediction) before each step, as images, and last
    the finished image in place of the prediction. bound(net, images, label) is an upper bound on code lengths
    given the label, in nats, as {name of a term: [B]}. real(images) are images as the model has them."""

    def __init__(self, args, name, title, unit, state_name, net, ema, optimizer, sample, bound, real=lambda x: x):
        self.args, self.title, self.unit, self.state_name = args, title, unit, state_name
        self.net, self.ema, self.optimizer = net, ema, optimizer
        self.sample, self.bound, self.real = sample, bound, real
        self.folder = args.out_dir / name
        self.history, self.previews, self.final, self.few_steps = [], {}, {}, {}
        self.settings = {"model": name, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed,
                         "limit": args.limit, "no_labels": args.no_labels}  # what makes a run this run and no other
        checkpoint = self.folder / "checkpoint.pt"
        there = {} if args.fresh or not checkpoint.exists() else self.load(checkpoint)
        if args.sample:
            if not there:
                fail(f"{self.folder} holds no trained network to sample from; train one first, without --sample")
            self.settings = {**there, "model": name, "no_labels": args.no_labels}
        else:
            data = load_data(args.dataset, args.data_dir, args.seed, args.limit)
            self.settings["dataset"], self.train, self.test = data
        other = [f"{key} {old} there, {self.settings[key]} here" for key, old in there.items()
                 if self.settings[key] != old]
        if other:
            fail(f"the run in {self.folder} has other settings ({'; '.join(other)}): give those (for drawn digits "
                 "--dataset drawn), or another --out-dir, or --fresh to throw that run away")
        self.subject = f"{title} on {self.settings['dataset']}"
        self.parameters = sum(p.numel() for p in net.parameters())
        if args.sample:
            return
        try:
            (self.folder / "epochs").mkdir(parents=True, exist_ok=True)
            for old in [] if there else [checkpoint, self.folder / "metrics.json", *self.folder.glob("epochs/*.png")]:
                old.unlink(missing_ok=True)
        except OSError as error:
            fail(f"{self.folder} cannot be written to ({error.strerror})")
        print(f"{self.subject}: {len(self.train[0])} training images, {self.parameters:,} parameters, {args.device}, "
              f"{len(self.history)} epochs done -> {self.folder}", flush=True)

    def load(self, checkpoint):
        try:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)  # plain values, never code
        except Exception as error:  # whatever torch raises of a file that is no checkpoint
            state = error
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            fail(f"{checkpoint} is unreadable or of another version: move it away, or start over with --fresh")
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.previews = state["history"], state["previews"]
        with contextlib.suppress(OSError, ValueError, KeyError):  # without it, all is measured again
            metrics = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
            if len(metrics["history"]) == len(self.history):
                self.final, self.few_steps = metrics["final"], metrics.get("few_steps", {})
        return state["settings"]

    def given(self, labels):
        """The labels as the network is given them."""
        return (torch.full_like(labels, NULL_LABEL) if self.args.no_labels else labels).to(self.args.device)

    def batches(self):
        """One epoch of shuffled batches: images, float [B, 1, 28, 28] in [-1, 1], and labels, int64 [B], all of them
        NULL_LABEL with --no-labels. A last batch that is smaller is left out. Each epoch has random numbers of its own,
        so that an interrupted run goes on as if it had not been."""
        torch.manual_seed(self.args.seed + 2 ** 31 * (len(self.history) + 1))
        self.start = time.perf_counter()
        (images, labels), size = self.train, self.args.batch_size
        count = len(images) // size
        for i, chosen in enumerate(torch.randperm(len(images))[:count * size].view(count, size)):
            if sys.stdout.isatty() and i % 10 == 0:
                print(f"epoch {len(self.history) + 1}: {i / count:.0%}", end="\r", flush=True)
            yield to_float(images[chosen]).to(self.args.device), self.given(labels[chosen])

    def end_epoch(self, losses):
        """Measure, draw nine digits, write the checkpoint: after this, the epoch cannot be lost."""
        seconds = time.perf_counter() - self.start
        test = sum(self.measure(2000, repeats=1).values())
        epoch = len(self.history) + 1
        row = {"epoch": epoch, "seconds": seconds, "train_loss": sum(losses) / len(losses),
               "images_per_second": len(losses) * self.args.batch_size / seconds,
               "test": test.mean().item(), "test_se": (test.std() / len(test) ** 0.5).item()}
        if not math.isfinite(row["train_loss"] + row["test"]):
            fail(f"the loss is no longer a number in epoch {epoch}: try a smaller --lr in another --out-dir")
        print(f"epoch {epoch}/{self.args.epochs}: {seconds:.0f} s, {row['images_per_second']:.0f} images/s, training "
              f"loss {row['train_loss']:.4f}, test {row['test']:.3f} +- {row['test_se']:.3f} {self.unit}", flush=True)
        self.history.append(row)
        self.previews[epoch] = self.draw(NINE)
        self.final, self.few_steps = {}, {}  # they were those of fewer epochs
        state = {"format": FORMAT, "settings": self.settings, "net": self.net.state_dict(),
                 "ema": self.ema.state_dict(), "optimizer": self.optimizer.state_dict(), "history": self.history,
                 "previews": self.previews}
        write(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))
        self.write_metrics()
        save_grids(self.folder / "epochs" / f"epoch_{epoch:03}.png", {"": self.previews[epoch]},
                   f"{self.subject}, epoch {epoch}")

    def write_metrics(self):
        metrics = {"settings": self.settings, "title": self.title, "unit": self.unit, "parameters": self.parameters,
                   "device": self.args.device, "threads": torch.get_num_threads(), "torch": torch.__version__,
                   "history": self.history, "final": self.final, "few_steps": self.few_steps}
        write(self.folder / "metrics.json", lambda path: path.write_text(json.dumps(metrics, indent=1), "utf-8"))
        return metrics

    def process(self, labels, steps):
        """Sampling, one image for each label, with the command line's sampler, guidance, and steps if it has any."""
        return self.sample(self.ema, self.given(labels), self.args.steps or steps, self.args.sampler, self.args.guidance)

    def draw(self, labels):
        """One image for each label: uint8 [N, 1, 28, 28]."""
        images = []
        torch.manual_seed(self.args.seed)
        for part in labels.split(500):
            for _, image in self.process(part, STEPS):
                pass
            images.append(to_uint8(image))
        return torch.cat(images)

    @torch.no_grad()
    def measure(self, count, repeats):
        """The bound's terms for the first `count` test images, {name: [count]} in self.unit, means of `repeats`
        estimates. With ln 10 they bound the code length of the image alone, without its label: labels are even, and

        -ln p(x) = -ln sum_label p(label) p(x | label) <= -ln p(x | label) + ln 10
        """
        images, labels = [part[:count].repeat(repeats, *[1] * (part.dim() - 1)) for part in self.test]
        terms = {} if self.args.no_labels else {"label": [torch.full((len(images),), math.log(10))]}
        torch.manual_seed(self.args.seed)
        for x, label in zip(images.split(500), labels.split(500)):
            for name, nats in self.bound(self.ema, to_float(x).to(self.args.device), self.given(label)).items():
                terms.setdefault(name, []).append(nats.cpu())
        scale = 784 * math.log(2) if self.unit == "bits/dim" else 1
        return {name: torch.cat(nats).view(repeats, -1).mean(0) / scale for name, nats in terms.items()}

    def save_samples(self):
        """--sample N: draw N images into samples.pt, and the first nine of them into samples.png."""
        N, label = self.args.sample, self.args.label
        images = self.draw(torch.arange(1, N + 1) % 10 if label is None else torch.full((N,), label))
        write(self.folder / "samples.pt", lambda path: torch.save(images, path))
        save_grids(self.folder / "samples.png", {"": images[:9]}, self.subject)
        print(f"{N} images -> {self.folder / 'samples.pt'}")

    def finish(self):
        """What a run leaves at its end: final figures of merit, pictures, and the comparison."""
        sampling = {"steps": self.args.steps or STEPS, "sampler": self.args.sampler, "guidance": self.args.guidance}
        count = min(len(self.test[0]), 2000 if self.args.steps else max(2000, 500 * len(self.history)))
        if (self.final.get("sampling"), self.final.get("count", count)) != (sampling, count):
            (self.folder / "trace.pt").unlink(missing_ok=True)  # until it is drawn anew, nothing is compared with it
            print("measuring", flush=True)
            self.final = {**(self.final or self.measure_bound()), "sampling": sampling, **self.measure_digits(count)}
            if self.args.steps and "frechet" in self.final:
                how = f"{self.args.sampler}, guidance {self.args.guidance:g}"
                self.few_steps.setdefault(how, {})[str(self.args.steps)] = self.final
        self.save_figures(self.write_metrics())
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.final.items() if isinstance(value, float))
        print(f"{self.subject}, {len(self.history)} epochs (bound in {self.unit}): {numbers}")
        compare(self.args.out_dir, self.settings["model"])

    def measure_bound(self):
        """The bound on the whole test set, and the training's speed."""
        terms = self.measure(len(self.test[0]), repeats=min(2, len(self.history)))
        total = sum(terms.values())
        return {"bound": total.mean().item(), "bound_se": (total.std() / len(total) ** 0.5).item(),
                "parts": {name: term.mean().item() for name, term in terms.items()},
                "images_per_second": torch.tensor([row["images_per_second"] for row in self.history]).median().item()}

    def measure_digits(self, count):
        """Frechet distance and shares of right and of clear digits, of count drawn ones (10,000, fewer after less than
        20 epochs, 2,000 with --steps: measuring should not outlast training)."""
        images, labels = self.test
        if count < 2000:
            return {}
        classifier = trained_classifier(self.settings["dataset"], *self.train, self.args)
        asked = torch.arange(count) % 10
        torch.manual_seed(self.args.seed)
        chosen = torch.randperm(len(self.train[0]))[:count]
        train, test = [to_uint8(self.real(to_float(part))) for part in (self.train[0][chosen], images)]
        train, _, _ = classify(classifier, train, self.train[1][chosen])
        test, right_real, clear_real = classify(classifier, test, labels)
        drawn, right, clear = classify(classifier, self.draw(asked), asked)
        figures = {"clear": clear, "clear_real": clear_real, "count": count,
                   "frechet": frechet_distance(drawn, test), "frechet_real": frechet_distance(train, test)}
        return figures if self.args.no_labels else {"right": right, "right_real": right_real, **figures}

    def save_figures(self, metrics):
        """Figures 1 to 4 of the README, the curves, the film, and trace.pt, of which the comparison is made."""
        steps = self.args.steps or 1000
        torch.manual_seed(self.args.seed)
        frames = [(to_uint8(state), to_uint8(prediction)) for state, prediction in self.process(NINE, steps)]
        states, predictions = zip(*[frames[i] for i in spread(50, steps + 1)])
        trace = {"title": self.title, "state_name": self.state_name, "steps": steps, "states": torch.stack(states),
                 "predictions": torch.stack(predictions)}
        write(self.folder / "trace.pt", lambda path: torch.save(trace, path))
        name = f"{self.subject}, {len(self.history)} epochs"
        shown = {f"epoch {1 + i}": self.previews[1 + i] for i in spread(6, len(self.previews))}
        save_grids(self.folder / "training.png", shown, f"{name}: nine draws from the same noise")
        save_grids(self.folder / "samples.png", {"": predictions[-1]}, f"{name}: {steps} steps")
        save_steps(self.folder / "steps.png", [trace], f"{name}: {steps} steps")
        save_gif(self.folder / "process.gif", [trace], f"{name}: {steps} steps")
        save_curves(self.folder / "curves.png", [metrics], name, ["train_loss", "test"])


def spread(count, total):
    """count indices, evenly spread over 0..total-1, first and last among them (all, where there are not as many)."""
    return torch.linspace(0, total - 1, min(count, total)).round().long().tolist()


def trained_classifier(name, images, labels, args):
    """A small network that names digits, in whose last hidden layer, of 64 features, images are compared. It is trained
    on the training set (some minutes) and kept beside the data, or where runs are, if the data are read-only."""
    keep = args.data_dir if os.access(args.data_dir, os.W_OK) and args.data_dir.stat().st_mode & 0o200 else args.out_dir
    path = keep / f"classifier-{name.lower().replace(' ', '-')}-{len(images)}.pt"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.SiLU(),
                        nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),
                        nn.Conv2d(64, 128, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(),
                        nn.Linear(128 * 9, 64), nn.SiLU(), nn.Linear(64, 10)).to(memory_format=torch.channels_last)
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    print(f"training the classifier of the Frechet distance on {name}", flush=True)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    count = len(images) // 128
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=4 * count)
    for _ in range(4):
        for chosen in torch.randperm(len(images))[:count * 128].view(count, 128):
            loss = F.cross_entropy(net(to_float(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    write(path, lambda temporary: torch.save(net.state_dict(), temporary))
    return net


@torch.no_grad()
def classify(classifier, images, labels):
    """Of uint8 images [N, 1, 28, 28]: their features, float64 [N, 64]; *right*, the share that the classifier reads as
    their label; *clear*, the share of which it is at least 90% sure."""
    features = torch.cat([classifier[:-2](to_float(part)) for part in images.split(500)])
    p = classifier[-2:](features).softmax(1)
    return features.double(), (p.argmax(1) == labels).float().mean().item(), (p.amax(1) >= 0.9).float().mean().item()


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the squared Frechet distance of normals fitted
    to features a and b, float64 [N, D] (Dowson & Landau 1982)."""
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


# --------------------------------------------------------------------------------------------------- the figures

DPI = 200
matplotlib.rcParams.update({"font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11, "savefig.bbox": "tight"})


def tile(images, columns):
    """Digits, uint8 [N, 1, 28, 28], as one picture with white lines between them: a list of rows of grey values."""
    return torchvision.utils.make_grid(images, columns, padding=1, pad_value=255)[0].tolist()


def draw_grids(panels, title, columns=3):
    """Grids of digits side by side, panels = {label: uint8 [N, 1, 28, 28]} -> (figure, the drawn pictures)."""
    pictures = [tile(images, columns) for images in panels.values()]
    height, width = len(pictures[0]), len(pictures[0][0])
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
    chosen = spread(10, len(traces[0]["states"]))
    rows = torch.cat([trace[key][chosen, 2] for trace in traces for key in ("states", "predictions")])
    names = [name for trace in traces for name in (f"{trace['title']}\n{trace['state_name']}", "prediction")]
    figure, [drawn] = draw_grids({"": rows}, title, columns=len(chosen))
    figure.set_figwidth(1.25 * figure.get_figwidth())  # for the names
    times = [f"{i / chosen[-1]:.0%}" for i in chosen]  # of all steps
    drawn.axes.set_xticks([29 * i + 14.5 for i in range(len(times))], times)
    drawn.axes.set_yticks([29 * i + 14.5 for i in range(len(names))], names)
    drawn.axes.tick_params(length=0, labeltop=True, labelbottom=False)
    write(path, figure.savefig)


def save_gif(path, traces, title):
    """Nine digits of each trace from noise to image, as a film."""
    figure, drawn = draw_grids({trace["title"]: trace["states"][0] for trace in traces}, title)
    last = len(traces[0]["states"]) - 1

    def show(i):
        for picture, trace in zip(drawn, traces):  # in six shades of grey: noise hardly compresses
            picture.set_data(tile((trace["states"][min(i, last)].int() + 25) // 51 * 51, 3))

    film = FuncAnimation(figure, show, frames=last + 18)  # hold the finished digits for 1.5 seconds
    write(path, lambda temporary: film.save(temporary, writer="pillow", fps=12, dpi=DPI // 2))


def save_curves(path, runs, title, columns):
    """Columns of the history in runs' metrics over epochs, one beside the other. Test results have bars of one
    standard error either way."""
    figure = Figure((4.2 * len(columns), 3.2), dpi=DPI, layout="constrained")
    figure.suptitle(title, wrap=True)
    for axis, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        for run in runs:
            rows = run["history"][len(run["history"]) // 10:]  # the first epochs, far above, would hide the rest
            x, y, error = zip(*[(row["epoch"], row[column], row["test_se"]) for row in rows])
            axis.errorbar(x, y, error if column == "test" else None, fmt=".-", label=run["title"])
        axis.set(xlabel="epoch", ylabel={"train_loss": "training loss", "test": f"test {runs[0]['unit']}"}[column])
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
        axis.legend(loc="center right")
    write(path, figure.savefig)


def save_few_steps(path, runs, title):
    """Frechet distance over sampling steps, a line for each sampler: all that was measured with --steps."""
    axis = Figure((6, 4), dpi=DPI, layout="constrained").subplots()
    for run in runs:
        for how, finals in run["few_steps"].items():
            steps, distances = zip(*sorted((int(steps), final["frechet"]) for steps, final in finals.items()))
            axis.loglog(steps, distances, ".-", label=f"{run['title']}, {how}")
    axis.axhline(next(iter(finals.values()))["frechet_real"], color="gray", linestyle=":", label="real digits")
    axis.set(title=title, xlabel="sampling steps", ylabel="Fréchet distance")
    axis.set_xticks([10, 20, 50, 100, 250, 1000], [10, 20, 50, 100, 250, 1000])
    axis.set_yticks([5, 10, 20, 50, 100], [5, 10, 20, 50, 100])
    axis.legend()
    write(path, axis.figure.savefig)


# ------------------------------------------------------------------------------------------------- the comparison

def compare(out_dir, name):
    """Where finished runs of diffusion and of a BFN stand side by side: figures 5 and 6, film, curves and table, from
    their metrics.json and trace.pt alone. name: the run that has just ended; the others must have its settings."""
    runs, traces, settings = {}, {}, {}
    for other in ("diffusion", "bfn-continuous", "bfn-discretized", "bfn-discrete"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # no run, or not finished
            run = json.loads((out_dir / other / "metrics.json").read_text(encoding="utf-8"))
            traces[other] = torch.load(out_dir / other / "trace.pt", weights_only=True)
            settings[other] = {**run["settings"], **run["final"]["sampling"], "epochs": len(run["history"]),
                               "pictures' steps": traces[other]["steps"], "model": "", "sampler": ""}
            runs[other] = run
    same = [other for other in runs if settings[other] == settings[name]]
    if len(same) < len(runs):
        print(f"not compared with {name}, as their settings differ: {', '.join(sorted(set(runs) - set(same)))}")
    if len(same) < 2 or same[0] != "diffusion":
        return
    runs, traces, ours = [runs[other] for other in same], [traces[other] for other in same], settings[name]
    folder = out_dir / "comparison"
    folder.mkdir(exist_ok=True)
    subject = f"DDPM and BFN on {ours['dataset']}, {ours['epochs']} epochs each"
    save_grids(folder / "samples.png", {trace["title"]: trace["predictions"][-1] for trace in traces}, subject)
    save_steps(folder / "steps.png", traces, f"{subject}: one digit")
    save_gif(folder / "process.gif", traces, subject)
    grey = [run for run in runs if run["unit"] == "bits/dim"]
    save_curves(folder / "curves.png", grey, subject, ["test"])
    if all(run.get("few_steps") for run in grey):
        save_few_steps(folder / "few_steps.png", grey, subject)
    write(folder / "table.md", lambda path: path.write_text(table(runs, ours), "utf-8"))
    print(f"comparison of {', '.join(run['title'] for run in runs)} -> {folder}")


ROWS = {"parameters": "{parameters:,}", "training, images/s (median epoch)": "{images_per_second:.0f}",
        "test bound on code length (± standard error)": "{bound:.3f} ± {bound_se:.3f} {unit}",
        "sampler": "{sampling[sampler]}", "Fréchet distance (real digits)": "{frechet:.2f} ({frechet_real:.2f})",
        "right (real digits)": "{right:.1%} ({right_real:.1%})",
        "clear (real digits)": "{clear:.1%} ({clear_real:.1%})"}


def table(runs, settings):
    """The comparison as a table in Markdown, of what stands in the runs' metrics.json."""
    lines = ["| | " + " | ".join(run["title"] for run in runs) + " |", "| --- |" + " --- |" * len(runs)]
    for name, cell in ROWS.items():
        with contextlib.suppress(KeyError):  # a quick try measures less
            lines.append(f"| {name} | " + " | ".join(cell.format(**run, **run["final"]) for run in runs) + " |")
    equal = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items() if value or key == "seed")
    return "\n".join(lines) + f"\n\nHeld equal: network, optimizer, {equal}.\n"
