"""What diffusion.py and bfn.py share, in this order: network, EMA, numerics, data, a run's folder, sampling and
evaluation, figures, comparison, command line.

Images are uint8 0..255 at the edges and float32 [B, 1, 28, 28] in [-1, 1] inside the models. A label is int64 [B].
"""
import argparse
import contextlib
import importlib.util
import json
import math
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

backend = os.environ.get("MPLBACKEND", "").partition("module://")[2]
if backend and importlib.util.find_spec(backend.partition(".")[0]) is None:
    del os.environ["MPLBACKEND"]  # inherited from a notebook; matplotlib could not be imported

import matplotlib.style
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image
from torch import nn

NULL_LABEL = 10  # in place of a label that the network is not given
PREVIEW_LABELS = torch.arange(1, 10)  # of the digits in all pictures, in reading order
FORMAT = 5  # of checkpoints
if hasattr(torch.backends, "nnpack"):
    torch.backends.nnpack.set_flags(False)  # it slows down convolutions where torch has no oneDNN (Apple silicon)


def fail(message):
    """End the program for a foreseen reason: one line that says what is wrong and what to do; exit code 1."""
    raise SystemExit(f"error: {message}")


# ---------------------------------------------------------------------------------------------------------- the network

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
    the fastest way there. If z has one channel, of grey values, the network also sees its `fourier_features`."""

    def __init__(self, in_channels, out_channels, width=64, units=2, condition_channels=128):
        super().__init__()
        self.fourier = in_channels == 1
        self.register_buffer("frequencies", torch.logspace(0.5, 3, 32), persistent=False)
        self.noise = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, condition_channels))
        self.label = nn.Embedding(11, condition_channels)                              # ten classes and NULL_LABEL
        self.stem = nn.Conv2d(in_channels + 16 * self.fourier, width, 4, stride=2, padding=1)  # 28x28 -> 14x14
        self.shrink = nn.Conv2d(width, 2 * width, 2, stride=2)                         # 14x14 -> 7x7
        self.units = nn.ModuleList(ShuffleUnit(2 * width, condition_channels) for _ in range(units))
        self.grow = nn.ConvTranspose2d(2 * width, width, 2, stride=2)                  # 7x7 -> 14x14
        self.norm = nn.GroupNorm(8, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.ConvTranspose2d(width, out_channels, 4, stride=2, padding=1)    # 14x14 -> 28x28
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, z, sigma, label):
        """z: float [B, in_channels, 28, 28], of grey values (x + sigma eps) / sqrt(1 + sigma^2), an image with noise of
        std sigma, scaled to unit size; sigma: float [B or 1, 1, 1, 1] in [0, inf]. Returns [B, out_channels, 28, 28].
        """
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


# ------------------------------------------------------------------------------------------------------------------ EMA

def ema(net, decay=0.999):
    """A copy of net whose weights are an exponential moving average of net's, by ema.update_parameters(net). After n
    updates the decay is min(decay, (1 + n) / (10 + n)), so that the first, untrained weights are soon forgotten."""
    def average(mean, weights, n):
        return mean.lerp(weights, (9 / (10 + n)).clamp(min=1 - decay))
    return torch.optim.swa_utils.AveragedModel(net, avg_fn=average)


# ------------------------------------------------------------------------------------------------------------- numerics

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


# ------------------------------------------------------------------------------------------------------------- the data

DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}  # in torchvision.datasets
FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneral", "cmr10", "cmss10"]


def load_data(name, folder, seed, limit=None):
    """The data set called name, see --dataset: its full name, training and test set, each a pair of images, uint8
    [N, 1, 28, 28], and labels, int64 [N]; N is 60,000 and 10,000, or limit. "auto" fails for broken files only."""
    if name == "drawn":
        return "drawn digits", *[drawn_digits(min(N, limit or N), 2 * seed + i) for i, N in enumerate((60000, 10000))]
    dataset = getattr(torchvision.datasets, DATASETS["mnist" if name == "auto" else name])
    raw = Path(folder, dataset.__name__, "raw")
    there = all((raw / Path(url).stem).exists() for url, _ in dataset.resources)
    try:
        if not there:
            download(dataset, raw)
        parts = [dataset(folder, train=train) for train in (True, False)]
    except Exception as error:  # of the network, of the disk, or of what the files hold
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if name != "auto" or there:
            fail(f"{dataset.__name__} in {folder} could not be read or downloaded ({reason}); remove what is broken "
                 "there, or use --dataset drawn")
        print(f"{dataset.__name__} could not be downloaded ({reason}): going on with digits drawn from fonts")
        return load_data("drawn", folder, seed, limit)
    return dataset.__name__, *[(part.data[:limit, None], part.targets[:limit]) for part in parts]


def download(dataset, raw):
    """Download a data set of torchvision's, or unpack its .gz files, if they are there, into the folder raw."""
    print(f"{dataset.__name__} is not in {raw}: downloading it from {dataset.mirrors[0]}", flush=True)
    raw.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=raw) as folder:
        fetched = Path(folder, dataset.__name__, "raw")
        fetched.mkdir(parents=True)
        for file in raw.glob("*-ubyte.gz"):
            shutil.copy(file, fetched)
        socket.setdefaulttimeout(15)  # seconds without an answer, for each of two addresses
        try:
            dataset(folder, download=True)
        finally:
            socket.setdefaulttimeout(timeout)
        for file in fetched.glob("*-ubyte"):
            os.replace(file, raw / file.name)  # whole, whoever else does the same


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
    generator = torch.Generator().manual_seed(seed)
    B, images, labels = 2000, [], []
    glyph = F.avg_pool2d(glyphs(), 3, stride=1, padding=1)
    upright = F.affine_grid(torch.eye(2, 3).expand(B, 2, 3), (B, 1, 28, 28), align_corners=False)
    for _ in range(math.ceil(n / B)):
        label = torch.randperm(B, generator=generator) % 10
        index = torch.randint(len(FONTS), (B,), generator=generator) * 10 + label
        field = 0.15 * torch.randn(B, 2, 3, 3, generator=generator)
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


# ------------------------------------------------------------------------------------------------------- a run's folder

SETTINGS = ["batch_size", "lr", "seed", "limit", "no_labels"]  # with model and data set, what makes a run this run


def write(path, save):
    """Call save(temporary path beside it), then rename: there is never half a file at path."""
    temporary = path.with_name(f"part-{os.getpid()}-{path.name}")  # its suffix tells matplotlib the format
    try:
        save(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) if path.suffix == ".pt" else OSError as error:  # torch.save's, of a full disk
        fail(f"{path} could not be written ({str(error).splitlines()[0]}); an older file there is kept")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_checkpoint(path, settings, modules):
    """Load a checkpoint into modules, {name: one with load_state_dict}, and return all that is in it, or None if there
    is none. It must have the given settings, {name: value}."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # plain values, never code
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror})")
    except Exception as error:  # whatever torch raises of a file that is no checkpoint
        state = error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        fail(f"{path} is unreadable or of another version: move it away, or start over with --fresh")
    other = [f"{key} {state['settings'][key]} there, {value} here" for key, value in settings.items()
             if state["settings"][key] != value]
    if other:
        fail(f"the run in {path.parent} has other settings ({'; '.join(other)}): give those (for drawn digits "
             "--dataset drawn), or another --out-dir, or --fresh to throw that run away")
    try:
        for name, module in modules.items():
            module.load_state_dict(state[name])
    except (RuntimeError, ValueError):  # missing or unknown weights, or other shapes
        fail(f"{path} is of another network: use another --out-dir, or --fresh")
    return state


class Run:
    """A run's folder: settings, history and checkpoint. What stands there is loaded, or thrown away with --fresh.

    args: the command line's. name: the folder's, and the model's. title, unit, state_name: what people call the model,
    the unit of its bound and the state of its process. dataset: the name of the data set actually used. net, ema,
    optimizer: what a checkpoint keeps."""

    def __init__(self, args, name, title, unit, state_name, dataset, net, ema, optimizer):
        self.args, self.folder = args, args.out_dir / name
        self.modules = {"net": net, "ema": ema, "optimizer": optimizer}
        self.settings = {"model": name, "dataset": dataset, **{key: getattr(args, key) for key in SETTINGS}}
        self.metrics = {"settings": self.settings, "title": title, "unit": unit, "state_name": state_name,
                        "parameters": sum(p.numel() for p in net.parameters()), "device": args.device,
                        "threads": torch.get_num_threads(), "torch": torch.__version__, "history": [], "final": {}}
        self.history, self.previews = self.metrics["history"], {}
        if not args.fresh and (state := load_checkpoint(self.folder / "checkpoint.pt", self.settings, self.modules)):
            self.history.extend(state["history"])
            self.previews = state["previews"]
        try:
            (self.folder / "epochs").mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()  # can it be written to?
            for pattern in [] if self.history else ["checkpoint.pt", "metrics.json", "trace.pt", "epochs/*.png"]:
                for old in self.folder.glob(pattern):
                    old.unlink()
        except OSError as error:
            fail(f"{self.folder} cannot be written to ({error.strerror})")
        print(f"{title} on {dataset}: {self.metrics['parameters']:,} parameters, {args.device}, "
              f"{len(self.history)} epochs done -> {self.folder}", flush=True)

    def batches(self, images, labels):
        """One epoch of shuffled batches: images, float [B, 1, 28, 28] in [-1, 1], and labels, int64 [B], as the network
        is given them. A last batch that is smaller is left out. Each epoch has random numbers of its own, so that an
        interrupted run goes on as if it had not been."""
        torch.manual_seed(self.args.seed + 1_000_003 * (len(self.history) + 1))  # torch uses its last 32 bits
        start, size = time.perf_counter(), self.args.batch_size
        count = len(images) // size
        for i, chosen in enumerate(torch.randperm(len(images))[:count * size].view(count, size)):
            if sys.stdout and sys.stdout.isatty() and i % 10 == 0:
                print(f"epoch {len(self.history) + 1}: {i / count:.0%}", end="\r", flush=True)
            yield to_float(images[chosen]).to(self.args.device), given(labels[chosen], self.args)
        self.seconds = time.perf_counter() - start

    def end_epoch(self, losses, terms, preview):
        """Write the checkpoint: after this, the epoch cannot be lost. losses: of its batches; terms: of the bound, see
        `estimate`; preview: nine digits, uint8 [9, 1, 28, 28]."""
        epoch, seconds, test = len(self.history) + 1, self.seconds, sum(terms.values())
        row = {"epoch": epoch, "seconds": seconds, "train_loss": sum(losses) / len(losses),
               "images_per_second": len(losses) * self.args.batch_size / seconds,
               "test": test.mean().item(), "test_se": (test.std() / len(test) ** 0.5).item()}
        if not math.isfinite(row["train_loss"] + row["test"]):
            fail(f"the loss is no longer a number in epoch {epoch}: try a smaller --lr in another --out-dir")
        self.history.append(row)
        self.previews[epoch] = preview
        state = {"format": FORMAT, "settings": self.settings, "history": self.history, "previews": self.previews,
                 **{name: module.state_dict() for name, module in self.modules.items()}}
        write(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))
        self.write_metrics()
        print(f"epoch {epoch}/{self.args.epochs}: {seconds:.0f} s, {row['images_per_second']:.0f} images/s, training "
              f"loss {row['train_loss']:.4f}, test {row['test']:.3f} +- {row['test_se']:.3f} {self.metrics['unit']}",
              flush=True)

    def finish(self, final, trace):
        """Write what the run has come to: final figures of merit, and the process that drew nine digits."""
        self.metrics["final"] = final
        write(self.folder / "trace.pt", lambda path: torch.save(trace, path))
        self.write_metrics()

    def write_metrics(self):
        write(self.folder / "metrics.json", lambda path: path.write_text(json.dumps(self.metrics, indent=1), "utf-8"))


def load_run(folder):
    """(metrics, trace) of a finished run, or None."""
    with contextlib.suppress(OSError, ValueError):
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        return (metrics, torch.load(folder / "trace.pt", weights_only=True)) if metrics["final"] else None


# ---------------------------------------------------------------------------------------------- sampling and evaluation

STEPS, GUIDANCE = 30, 1.15  # defaults of the command line


def given(labels, args):
    """The labels as the network is given them."""
    return (torch.full_like(labels, NULL_LABEL) if args.no_labels else labels).to(args.device)


def draw(sample, labels, args):
    """One image for each label: uint8 [N, 1, 28, 28]. sample(label=..., steps=...) yields (state, prediction) before
    each step, and last the image in place of the prediction."""
    torch.manual_seed(args.seed)
    images = []
    for part in labels.split(500):
        for _, image in sample(label=given(part, args), steps=args.steps or STEPS):
            pass
        images.append(to_uint8(image))
    return torch.cat(images)


def draw_process(sample, args):
    """Nine digits from the prior to the image, at up to 50 of the steps, as uint8."""
    torch.manual_seed(args.seed)
    steps = args.steps or 1000
    label = given(PREVIEW_LABELS, args)
    frames = [(to_uint8(state), to_uint8(image)) for state, image in sample(label=label, steps=steps)]
    states, predictions = zip(*[frames[i] for i in spread(50, steps + 1)])
    return {"steps": steps, "states": torch.stack(states), "predictions": torch.stack(predictions)}


def spread(count, total):
    """count indices, evenly spread over 0..total-1, first and last among them (all, where there are not as many)."""
    return torch.linspace(0, total - 1, min(count, total)).round().long().tolist()


def estimate(bound, test, run, count=2000):
    """The terms of the bound for the first `count` test images, {name: [count]} in the run's unit. bound(images, label)
    estimates them in nats, given the label. With ln 10, they bound the code length of the image without its label:

    -ln p(x) = -ln sum_label p(label) p(x | label) <= -ln p(x | label) + ln 10
    """
    args = run.args
    torch.manual_seed(args.seed)
    images, labels = test[0][:count], test[1][:count]
    terms = {} if args.no_labels else {"label": [torch.full((len(images),), math.log(10))]}
    for x, label in zip(images.split(500), labels.split(500)):
        for name, nats in bound(to_float(x).to(args.device), given(label, args)).items():
            terms.setdefault(name, []).append(nats.cpu())
    scale = 784 * math.log(2) if run.metrics["unit"] == "bits/dim" else 1
    return {name: torch.cat(nats) / scale for name, nats in terms.items()}


def evaluate(run, bound, sample, train, test, real=lambda images: images):
    """The final figures of merit: the bound on the whole test set; of digits drawn, Fréchet distance, right and clear,
    beside those of real digits. real(images) are images as the model has them."""
    print("evaluating", flush=True)
    args, epochs = run.args, len(run.history)
    terms = estimate(bound, test, run, count=len(test[0]))
    total = sum(terms.values())
    final = {"bound": total.mean().item(), "bound_se": (total.std() / len(total) ** 0.5).item(),
             "parts": {name: term.mean().item() for name, term in terms.items()},
             "images_per_second": torch.tensor([row["images_per_second"] for row in run.history]).median().item(),
             "steps": args.steps or STEPS, "sampler": args.sampler, "guidance": args.guidance}
    # 10,000 digits after 20 epochs; fewer after fewer, or with --steps: this should not outlast training
    count = min(len(test[0]), 2000 if args.steps else max(2000, 500 * epochs))
    if count >= 2000:
        classifier = trained_classifier(run.settings["dataset"], *train, args.out_dir)
        labels = torch.arange(count) % 10
        features, right, clear = classify(classifier, draw(sample, labels, args), labels)
        torch.manual_seed(args.seed)
        chosen = torch.randperm(len(train[0]))[:count]
        real_train, real_test = [to_uint8(real(to_float(images))) for images in (train[0][chosen], test[0])]
        features_train, _, _ = classify(classifier, real_train, train[1][chosen])
        features_test, right_real, clear_real = classify(classifier, real_test, test[1])
        final.update(count=count, frechet=frechet_distance(features, features_test), right=right, clear=clear,
                     frechet_real=frechet_distance(features_train, features_test), right_real=right_real,
                     clear_real=clear_real)
        if args.no_labels:
            del final["right"], final["right_real"]
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in final.items() if isinstance(value, float))
    print(f"{epochs} epochs (bound in {run.metrics['unit']}): {numbers}", flush=True)
    return final


def classifier_net():
    """A small network that reads digits; its last hidden layer has 64 features, in which images are compared."""
    return nn.Sequential(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.SiLU(),
                         nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),
                         nn.Conv2d(64, 128, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(128 * 9, 64), nn.SiLU(), nn.Linear(64, 10)).to(memory_format=torch.channels_last)


def trained_classifier(name, images, labels, out_dir):
    """A `classifier_net` trained on the training set (some minutes), once: it is kept in out_dir."""
    path = out_dir / f"classifier-{name.lower().replace(' ', '-')}-{len(images)}.pt"
    with contextlib.suppress(Exception):  # there is none yet, or a broken one, or one of another network
        net = classifier_net()
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    print(f"training the classifier of the Fréchet distance on {name}", flush=True)
    torch.manual_seed(0)
    net = classifier_net()
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
    """Of uint8 images [N, 1, 28, 28]: their features, float64 [N, 64]; *right*, the fraction that the classifier reads
    as their label; *clear*, the fraction of which it is at least 90% sure."""
    features = torch.cat([classifier[:-2](to_float(part)) for part in images.split(500)])
    p = classifier[-2:](features).softmax(1)
    return features.double(), (p.argmax(1) == labels).float().mean().item(), (p.amax(1) >= 0.9).float().mean().item()


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the squared Fréchet distance of Gaussians
    fitted to features a and b, float64 [N, D] (Dowson & Landau 1982)."""
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


# -------------------------------------------------------------------------------------------------------------- figures

DPI = 200
STYLE = ["default", {"font.size": 9, "axes.titlesize": 10, "figure.titlesize": 11, "savefig.bbox": "tight"}]


def tile(images, columns=None):
    """Digits, uint8 [N, 1, 28, 28], as one picture, uint8 [height, width], square if no number of columns is given."""
    return torchvision.utils.make_grid(images, columns or math.ceil(len(images) ** 0.5), padding=1, pad_value=255)[0]


def draw_grids(panels, title, columns=None):
    """A figure of grids of digits side by side, panels = {label: uint8 [N, 1, 28, 28]}."""
    pictures = [tile(images, columns) for images in panels.values()]
    height, width = pictures[0].shape
    scale = max(2, min(6, 1600 // (width * len(pictures))))  # screen pixels for each of a digit
    figure = Figure((scale * (width + 4) * len(pictures) / DPI, (scale * height + 120) / DPI), dpi=DPI,
                    layout="constrained")
    figure.suptitle(title, wrap=True)
    for axis, picture, label in zip(figure.subplots(1, len(pictures), squeeze=False)[0], pictures, panels):
        axis.imshow(picture.tolist(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(title=label, xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


@matplotlib.style.context(STYLE)
def save_grids(path, panels, title):
    write(path, draw_grids(panels, title).savefig)


@matplotlib.style.context(STYLE)
def save_steps(path, runs, traces, title):
    """One digit at ten steps, from left to right: a row for each trace's state, one for its prediction of the image."""
    chosen = spread(10, len(traces[0]["states"]))
    rows = torch.cat([trace[key][chosen, 2] for trace in traces for key in ("states", "predictions")])
    names = [name for run in runs for name in (f"{run['title']}\n{run['state_name']}", "prediction")]
    figure = draw_grids({"": rows}, title, columns=len(chosen))
    figure.set_figwidth(1.25 * figure.get_figwidth())  # for the names
    [axis] = figure.axes
    axis.set_xticks([29 * i + 14.5 for i in range(len(chosen))], [f"{i / chosen[-1]:.0%}" for i in chosen])  # of steps
    axis.set_yticks([29 * i + 14.5 for i in range(len(names))], names)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    write(path, figure.savefig)


def save_gif(path, traces, title):
    """Nine digits of each trace, side by side, from noise to image, as a film."""
    films = torch.stack([torch.cat([tile(digits) for digits in frame], dim=1)
                         for frame in zip(*[trace["states"] for trace in traces])])
    films = ((films.int() + 25) // 51 * 51).byte()  # six shades of grey: noise hardly compresses
    films = films.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    first, *rest = [Image.frombytes("L", film.shape[::-1], bytes(film.flatten().tolist())) for film in films]
    write(path, lambda temporary: first.save(temporary, save_all=True, append_images=rest, loop=0, comment=title,
                                             duration=[80] * len(rest) + [1500]))  # milliseconds


@matplotlib.style.context(STYLE)
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


def save_preview(run):
    """epochs/epoch_001.png and so on: the nine digits of the last epoch."""
    epoch = len(run.history)
    save_grids(run.folder / "epochs" / f"epoch_{epoch:03}.png", {"": run.previews[epoch]},
               f"{run.metrics['title']} on {run.settings['dataset']}, epoch {epoch}")


def save_figures(folder):
    """Figures 1 to 4 of the README, the curves and the film of a finished run."""
    metrics, trace = load_run(folder)
    previews = torch.load(folder / "checkpoint.pt", weights_only=True)["previews"]
    name = f"{metrics['title']} on {metrics['settings']['dataset']}, {len(previews)} epochs"
    steps = f"{name}: {trace['steps']} steps"
    shown = {f"epoch {1 + i}": previews[1 + i] for i in spread(6, len(previews))}
    save_grids(folder / "training.png", shown, f"{name}: nine digits from the same noise")
    save_grids(folder / "samples.png", {"": trace["predictions"][-1]}, steps)
    save_steps(folder / "steps.png", [metrics], [trace], steps)
    save_gif(folder / "process.gif", [trace], steps)
    save_curves(folder / "curves.png", [metrics], name, ["train_loss", "test"])


# ----------------------------------------------------------------------------------------------------------- comparison

MODELS = ["diffusion", "bfn-continuous", "bfn-discretized", "bfn-discrete"]
COMPARED = ["dataset", *SETTINGS, "epochs", "steps", "guidance", "steps of the pictures"]  # equal in all
ROWS = {"parameters": "{parameters:,}", "training, images/s (median epoch)": "{images_per_second:.0f}",
        "test bound on code length (± standard error)": "{bound:.3f} ± {bound_se:.3f} {unit}",
        "sampler": "{sampler}", "Fréchet distance (real digits)": "{frechet:.2f} ({frechet_real:.2f})",
        "right (real digits)": "{right:.1%} ({right_real:.1%})",
        "clear (real digits)": "{clear:.1%} ({clear_real:.1%})"}


def compare(out_dir, name):
    """Where finished runs of diffusion and of a BFN stand side by side: figures 5 and 6, film, curves and table, from
    their metrics.json and trace.pt alone. name: the run that has just ended; the others must have its settings."""
    runs = {other: run for other in MODELS if (run := load_run(out_dir / other))}
    settings = {other: {**metrics["settings"], **metrics["final"], "epochs": len(metrics["history"]),
                        "steps of the pictures": trace["steps"]} for other, (metrics, trace) in runs.items()}
    same = [other for other in runs if all(settings[other].get(key) == settings[name][key] for key in COMPARED)]
    if len(same) < len(runs):
        print(f"not compared with {name}, as their settings differ: {', '.join(sorted(set(runs) - set(same)))}")
    if len(same) < 2 or same[0] != "diffusion":
        return
    runs, traces = zip(*[runs[other] for other in same])
    folder = out_dir / "comparison"
    folder.mkdir(exist_ok=True)
    subject = f"DDPM and BFN on {settings[name]['dataset']}, {settings[name]['epochs']} epochs each"
    last = {run["title"]: trace["predictions"][-1] for run, trace in zip(runs, traces)}
    save_grids(folder / "samples.png", last, subject)
    save_steps(folder / "steps.png", runs, traces, f"{subject}: one digit")
    save_gif(folder / "process.gif", traces, subject)
    save_curves(folder / "curves.png", [run for run in runs if run["unit"] == "bits/dim"], subject, ["test"])
    equal = ", ".join(f"{key.replace('_', ' ')} {settings[name][key]}" for key in COMPARED)
    lines = ["| | " + " | ".join(run["title"] for run in runs) + " |", "| --- |" + " --- |" * len(runs)]
    for row, cell in ROWS.items():
        with contextlib.suppress(KeyError):  # a quick try measures less
            lines.append(f"| {row} | " + " | ".join(cell.format(**run, **run["final"]) for run in runs) + " |")
    text = "\n".join([*lines, "", f"Held equal: network, optimizer, {equal}.", ""])
    write(folder / "table.md", lambda path: path.write_text(text, "utf-8"))
    print(f"comparison of {', '.join(run['title'] for run in runs)} -> {folder}")


# --------------------------------------------------------------------------------------------------------- command line

def parse_args(description, argv, samplers, data_types=()):
    """The command line's flags. The first of samplers and of data_types, lists of names, is the default."""
    devices = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    add = parser.add_argument
    add("--epochs", type=int, default=20, help="train until this many epochs are done (default %(default)s)")
    add("--batch-size", type=int, default=64, metavar="B", help="images a step (default %(default)s)")
    add("--lr", type=float, default=2e-3, help="learning rate (default %(default)s)")
    add("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    add("--device", choices=["auto", *devices], default="auto", help="default: cuda if usable, else cpu")
    add("--out-dir", type=Path, default="out", metavar="DIR", help="where runs are kept (default %(default)s)")
    add("--data-dir", type=Path, default="data", metavar="DIR", help="where data sets lie (default %(default)s)")
    add("--dataset", choices=["auto", *DATASETS, "drawn"], default="auto", help="default: MNIST, or else drawn digits")
    add("--limit", type=int, metavar="N", help="use the first N training and test images (quick tries)")
    add("--sample", type=int, metavar="N", help="train nothing: draw N images with this run")
    add("--steps", type=int, metavar="S", help=f"sampling steps (default {STEPS}, in final pictures 1000)")
    add("--sampler", choices=samplers, default=samplers[0], help="default: %(default)s")
    add("--label", type=int, choices=range(10), metavar="L", help="with --sample: draw this class only, 0 to 9")
    add("--guidance", type=float, metavar="W", help=f"of the sampler, 1 for none (default {GUIDANCE})")
    add("--no-labels", action="store_true", help="the network is not given the label, as in the papers")
    add("--fresh", action="store_true", help="throw away the run that stands there and start over")
    if data_types:
        add("--data-type", choices=data_types, default=data_types[0], help="what a pixel is (default %(default)s)")
    args = parser.parse_args(argv)
    for wrong, message in [
            (min(n for n in (args.epochs, args.batch_size, args.limit, args.sample, args.steps) if n is not None) < 1,
             "--epochs, --batch-size, --limit, --sample and --steps are at least 1"),
            (not 0 < args.lr < math.inf, "--lr is above 0"),
            (not 0 <= args.seed < 2 ** 31, "--seed is in [0, 2^31)"),
            (not 0 <= (args.guidance or 0) < math.inf, "--guidance is at least 0"),
            (args.sample and args.fresh, "--sample draws with the network that --fresh throws away"),
            (args.label is not None and not args.sample, "--label goes with --sample"),
            (args.no_labels and (args.guidance, args.label) != (None, None), "--guidance and --label need labels"),
            (args.batch_size > min(args.limit or 60000, 60000), "--batch-size is more than there are training images")]:
        if wrong:
            parser.error(message)
    args.out_dir, args.data_dir = args.out_dir.expanduser(), args.data_dir.expanduser()
    if args.guidance is None:
        args.guidance = 1 if args.no_labels else GUIDANCE
    if args.device == "auto":
        args.device = "cuda" if devices["cuda"] else "cpu"
    if not devices[args.device]:
        fail(f"torch finds no {args.device} here: try --device cpu")
    return args


def save_samples(name, ema, sample, args):
    """--sample N: draw N images with the network of a run, into samples.pt, and the first nine as drawn.png."""
    folder, N = args.out_dir / name, args.sample
    state = load_checkpoint(folder / "checkpoint.pt", {"model": name, "no_labels": args.no_labels}, {"ema": ema})
    if not state:
        fail(f"{folder} holds no trained network to sample from; train one first, without --sample")
    images = draw(sample, torch.arange(1, N + 1) % 10 if args.label is None else torch.full((N,), args.label), args)
    write(folder / "samples.pt", lambda temporary: torch.save(images, temporary))
    save_grids(folder / "drawn.png", {"": images[:9]}, f"{name} on {state['settings']['dataset']}")
    print(f"{N} images -> {folder / 'samples.pt'}")


def run_script(main):
    """main() as the whole program. Ctrl-C ends it with one line; unforeseen errors show their traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has no such method
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show does not end a run
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; finished epochs are kept: the same command (without --fresh) goes on", file=sys.stderr)
        sys.exit(130)
