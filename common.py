"""What diffusion.py and bfn.py share: network, EMA, numerics, data, a run's folder, sampling and evaluation, figures,
comparison, command line. Images are uint8 0..255 in files and data sets, float32 in [-1, 1] in models; labels int64."""
import argparse
import contextlib
import importlib.util
import io
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
from torchvision.utils import make_grid

NULL_LABEL = 10  # in place of a label that the network is not given
PREVIEW_LABELS = torch.arange(1, 10)  # of the digits in all pictures, in reading order
if hasattr(torch.backends, "nnpack"):
    torch.backends.nnpack.set_flags(False)  # it slows down convolutions where torch has no oneDNN (Apple silicon)


def fail(message):
    """End the program for a foreseen reason: one line that says what is wrong and what to do; exit code 1."""
    raise SystemExit(f"error: {message}")


# ----------------------------------------------------------------------------------------------- the network, its EMA
def fourier_features(z, sigma):
    """Sines and cosines of z's pixels, [B, 16, 28, 28], at 8 frequencies, the highest with one period per grey value.
    They tell neighbouring grey values apart (after Kingma et al. 2021, arXiv 2107.00630, app. C): bits/dim 1.6, without
    2.8. Noise leaves exp(-(omega sigma)^2 / 2) of a wave, on average; scaled by that, waves of mere noise vanish."""
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
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.conv2(F.silu(h))


class ShuffleUnit(nn.Module):
    """Residual blocks from one half of the channels onto the other and back, each a quarter of the work of a full one.
    A channel shuffle then deals the channels out to new halves (ShuffleNet, arXiv 1707.01083, §3.1)."""

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
    """The shuffled U-Net. On CPUs it works in channels_last memory, the fastest way there. Without labels, every label
    counts as NULL_LABEL. If z is grey (one channel), the network sees its `fourier_features` as well, and its outputs
    are eps and, if two, ln(std of x / sigma); the last layer gives v = (eps - sigma x) / sqrt(1 + sigma^2) for eps."""

    def __init__(self, in_channels, out_channels, labels=True, width=64, units=2, condition_channels=128):
        super().__init__()
        self.labels, self.fourier = labels, in_channels == 1
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
        """z: [B, in_channels, 28, 28], of grey values (x + sigma eps) / sqrt(1 + sigma^2), an image with noise of std
        sigma, scaled to unit size; sigma: [B or 1, 1, 1, 1]. Returns [B, out_channels, 28, 28]."""
        level = 2 / math.pi * sigma.flatten(1).atan()  # in [0, 1]; in diffusion.py it is t / (T + 1)
        angles = level * self.frequencies  # sinusoidal features (arXiv 1706.03762, §3.5)
        noise = self.noise(torch.cat([angles.sin(), angles.cos()], dim=1))
        condition = F.silu(noise + self.label(label if self.labels else torch.full_like(label, NULL_LABEL)))
        x = torch.cat([z, fourier_features(z, sigma)], dim=1) if self.fourier else z
        x = self.stem(x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x)
        h = self.shrink(x)
        for unit in self.units:
            h = unit(h, condition)
        x = self.conv(F.silu(self.norm(x + self.grow(h))))  # the skip connection
        output, scale = self.head(F.silu(x)), (1 + sigma ** 2).sqrt()
        eps = (sigma * z + output[:, :1]) / scale
        return torch.cat([eps, output[:, 1:] - scale.log()], dim=1) if self.fourier else output


def guided(net, guidance):
    """net with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598; guidance is 1 + their w): its output is
    net's for the null label + guidance (net's for the label - net's for the null label)."""
    def extrapolated(z, sigma, label):
        return net(z, sigma, torch.full_like(label, NULL_LABEL)).lerp(net(z, sigma, label), guidance)
    return net if guidance == 1 else extrapolated


def ema(net, decay=0.999):
    """A copy of net whose weights are an exponential moving average of net's, by ema.update_parameters(net). After n
    updates the decay is min(decay, (1 + n) / (10 + n)), so that the first, untrained weights are soon forgotten."""
    return torch.optim.swa_utils.AveragedModel(
        net, avg_fn=lambda mean, weights, n: mean.lerp(weights, (9 / (10 + n)).clamp(min=1 - decay)))


# ------------------------------------------------------------------------------------------------------------- numerics
def discretized_normal_nll(x, mean, std):
    """-ln of the mass of N(mean, std^2) in the bin of x, one of the 256 grey values in [-1, 1], in nats; all of shapes
    that broadcast. A bin reaches half-way to the next value, the first and the last one to infinity (DDPM eq. 13,
    BFN §5.1). Computed in float64, on the CPU."""
    device, (x, mean, std) = x.device, [torch.as_tensor(value).cpu().double() for value in (x, mean, std)]
    low = torch.where(x < -1 + 1 / 255, -math.inf, (x - 1 / 255 - mean) / std)
    high = torch.where(x > 1 - 1 / 255, math.inf, (x + 1 / 255 - mean) / std)
    low, high = torch.where(low + high > 0, torch.stack([-high, -low]), torch.stack([low, high]))  # to the lower tail,
    low, high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)  # where logarithms lose no digits
    return -(high + torch.log1p(-(low - high).exp())).float().to(device)


def discretized_normal_mean(mean, std):
    """The mean of X, N(mean, std^2) rounded to one of the 256 grey values in [-1, 1], all [B, 1, 28, 28] (BFN §5.5).
    In units of 0..255 it is sum_{j=1..255} P(X > j - 1/2). If std is below 1 unit, only the ten terms nearest to the
    mean are computed, earlier ones are 1, later ones 0. If not, X is clipped but not rounded: 0.02 off at most."""
    normal = torch.distributions.Normal(0.0, 1.0, validate_args=False)
    m, sigma = (mean + 1) * 127.5, std * 127.5
    narrow = near = m.detach().round().clamp(0, 255)
    for i in range(-5, 5):
        edge = near + i + 0.5  # j - 1/2
        narrow = narrow + (edge > 0) * (edge < 255) * (normal.cdf((m - edge) / sigma) - int(i < 0))
    wide = sum(sign * (z * normal.cdf(z / sigma) + sigma * normal.log_prob(z / sigma).exp())
               for sign, z in ((1, m), (-1, m - 255)))
    return torch.where(sigma < 1, narrow, wide) / 127.5 - 1


# ------------------------------------------------------------------------------------------------------------- the data
DATASETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}  # in torchvision.datasets
FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneral", "cmr10", "cmss10"]


def load_data(name, folder, seed, limit=None):
    """The data set called name, see --dataset: its full name, training and test set, each a pair of images, uint8
    [N, 1, 28, 28], and labels, int64 [N]; N is 60,000 and 10,000, or limit. "auto" is "drawn" if downloading fails."""
    if name == "drawn":
        return "drawn digits", *[drawn_digits(min(N, limit or N), 2 * seed + i) for i, N in enumerate((60000, 10000))]
    dataset = getattr(torchvision.datasets, DATASETS["mnist" if name == "auto" else name])
    raw, timeout = folder / dataset.__name__ / "raw", socket.getdefaulttimeout()
    there = all((raw / Path(url).stem).exists() for url, _ in dataset.resources)
    try:
        if not there:
            print(f"{dataset.__name__} is not in {raw}: downloading it from {dataset.mirrors[0]}", flush=True)
            raw.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(15)  # seconds without an answer, for each of two addresses
            with tempfile.TemporaryDirectory(dir=raw) as part:  # of a .gz that is there, torchvision makes use
                fetched = shutil.copytree(raw, Path(part, dataset.__name__, "raw"), ignore=lambda *_: [Path(part).name])
                dataset(part, download=True)
                for file in fetched.glob("*-ubyte"):
                    os.replace(file, raw / file.name)  # whole, even if two programs do this
        train, test = [dataset(folder, train=train) for train in (True, False)]
    except Exception as error:  # of the network, of the disk, or of what the files hold
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if name != "auto" or there:
            fail(f"{dataset.__name__} in {folder} could not be read or downloaded ({reason}); remove what is broken "
                 "there, or use --dataset drawn")
        print(f"{dataset.__name__} could not be downloaded ({reason}): going on with digits drawn from fonts")
        return load_data("drawn", folder, seed, limit)
    finally:
        socket.setdefaulttimeout(timeout)
    return dataset.__name__, *[(part.data[:limit, None], part.targets[:limit]) for part in (train, test)]


def drawn_digits(n, seed):
    """n digits of matplotlib's fonts, turned and stretched at random: uint8 [n, 1, 28, 28]; labels 0 to 9 in turn."""
    def glyph(name, digit):
        font = FT2Font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name + ".ttf")))
        font.set_size(28, 72)
        font.set_text(digit)
        font.draw_glyphs_to_bitmap()
        return torchvision.transforms.functional.center_crop(torch.tensor([font.get_image().tolist()]) / 255, [28, 28])
    glyphs = torch.stack([glyph(name, digit) for name in FONTS for digit in "0123456789"])
    generator, labels, images = torch.Generator().manual_seed(seed), torch.arange(n) % 10, []
    for label in labels.split(2000):
        chosen = glyphs[torch.randint(len(FONTS), label.shape, generator=generator) * 10 + label]
        affine = 1.1 * torch.eye(2, 3) + 0.12 * torch.randn(len(label), 2, 3, generator=generator)
        image = F.grid_sample(chosen, F.affine_grid(affine, chosen.shape, align_corners=False), align_corners=False)
        images.append(image.mul(255).round().byte())
    return torch.cat(images), labels


def to_float(images):
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float [-1, 1] -> uint8 0..255, on the CPU; what lies outside is clipped."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().cpu()


# ------------------------------------------------------------------------------------------------------- a run's folder
VERSION = 3  # of the algorithms: a run is continued and compared only with its own
SETTINGS = ["batch_size", "lr", "seed", "limit", "no_labels"]  # with model and data set, what makes a run this run


def write(path, save):
    """Call save(file), and put what it wrote at path in one go: there is never half a file."""
    content, temporary = io.BytesIO(), path.with_name(f"part-{os.getpid()}-{path.name}")
    save(content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        fail(f"{path} could not be written ({error.strerror}); an older file there is kept")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_checkpoint(path, settings, modules):
    """Load a checkpoint of these settings into modules, both {name: value}; return it all, or {} if there is none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # plain values, never code
        other = [f"{key} {state['settings'][key]} there, {value} here" for key, value in settings.items()
                 if state["settings"][key] != value]
        if other:
            fail(f"the run in {path.parent} has other settings ({'; '.join(other)}): give those, or another --out-dir, "
                 "or --fresh to throw that run away")
        for name, module in modules.items():
            module.load_state_dict(state[name])
        return state
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # whatever torch raises of a file that is no checkpoint, or not one of these modules
        fail(f"{path} is unreadable, or of another network or version ({type(error).__name__}): move it "
             "away, or use another --out-dir, or --fresh to start over")


class Run:
    """A run's folder: settings, history and checkpoint. What stands there is loaded, or thrown away with --fresh.
    name: of model and folder; title: in figures; unit: of the bound; dataset: the one used, see `load_data`."""

    def __init__(self, args, name, title, unit, dataset, net, ema, optimizer):
        self.args, self.folder, self.title = args, args.out_dir / name, f"{title} on {dataset}"
        self.modules = {"net": net, "ema": ema, "optimizer": optimizer}
        self.settings = {"version": VERSION, "model": name, "dataset": dataset,
                         **{key: getattr(args, key) for key in SETTINGS}}
        state = {} if args.fresh else load_checkpoint(self.folder / "checkpoint.pt", self.settings, self.modules)
        self.history, self.previews = state.get("history", []), state.get("previews", {})
        self.metrics = {"settings": self.settings, "title": title, "unit": unit,
                        "parameters": sum(p.numel() for p in net.parameters()), "device": args.device,
                        "threads": torch.get_num_threads(), "torch": torch.__version__, "history": self.history}
        self.write_metrics(final={})  # if it cannot be written, better now than after an epoch
        for old in [] if self.history else self.folder.glob("epochs/*.png"):
            old.unlink()
        print(f"{self.title}: {self.metrics['parameters']:,} parameters, {args.device}, "
              f"{len(self.history)} epochs done -> {self.folder}", flush=True)

    def batches(self, images, labels):
        """One epoch of shuffled batches: images, float [B, 1, 28, 28] in [-1, 1], and labels, int64 [B]. An epoch has
        random numbers of its own, so that an interrupted run goes on as if it had not been."""
        torch.manual_seed(self.args.seed + 1_000_003 * (len(self.history) + 1))  # torch uses its last 32 bits
        start, size = time.perf_counter(), self.args.batch_size
        count = len(images) // size
        for i, chosen in enumerate(torch.randperm(len(images))[:count * size].view(count, size)):
            if sys.stdout and sys.stdout.isatty() and i % 10 == 0:
                print(f"epoch {len(self.history) + 1}: {i / count:.0%}", end="\r", flush=True)
            yield to_float(images[chosen]).to(self.args.device), labels[chosen].to(self.args.device)
        self.seconds = time.perf_counter() - start

    def end_epoch(self, losses, test, preview):
        """Write the checkpoint: after this, the epoch cannot be lost. test: `estimate`'s; preview: `draw`'s."""
        epoch, seconds, unit = len(self.history) + 1, self.seconds, self.metrics["unit"]
        row = {"epoch": epoch, "seconds": seconds, "train_loss": sum(losses) / len(losses),
               "images_per_second": len(losses) * self.args.batch_size / seconds,
               "test": test.mean().item(), "test_se": (test.std() / len(test) ** 0.5).item()}
        if not math.isfinite(row["train_loss"] + row["test"]):
            fail(f"the loss is no longer a number in epoch {epoch}: try a smaller --lr in another --out-dir")
        self.history.append(row)
        self.previews[epoch] = preview
        state = {"settings": self.settings, "history": self.history, "previews": self.previews,
                 **{name: module.state_dict() for name, module in self.modules.items()}}
        write(self.folder / "checkpoint.pt", lambda file: torch.save(state, file))
        self.write_metrics(final={})
        print(f"epoch {epoch}/{self.args.epochs}: {seconds:.0f} s, {row['images_per_second']:.0f} images/s, training "
              f"loss {row['train_loss']:.4f}, test {row['test']:.3f} +- {row['test_se']:.3f} {unit}", flush=True)

    def write_metrics(self, final):
        """metrics.json; final: see `evaluate`."""
        results = {**self.metrics, "final": final}
        write(self.folder / "metrics.json", lambda file: file.write(json.dumps(results, indent=1).encode()))


# ---------------------------------------------------------------------------------------------- sampling and evaluation
STEPS, PROCESS_STEPS, GUIDANCE = 30, 1000, 1.05  # defaults of the command line


def draw(sample, labels, args):
    """Images, uint8 [N, 1, 28, 28], for labels [N]: of the pairs that sample(label=..., steps=...) yields, the last."""
    torch.manual_seed(args.seed)
    images = []
    for part in labels.split(500):
        for _, image in sample(label=part.to(args.device), steps=args.steps or STEPS):
            pass
        images.append(to_uint8(image))
    return torch.cat(images)


def draw_process(sample, args):
    """A digit for each of PREVIEW_LABELS, from the prior to the image, at up to 50 of the steps, as uint8."""
    torch.manual_seed(args.seed)
    frames = sample(label=PREVIEW_LABELS.to(args.device), steps=args.steps or PROCESS_STEPS)
    states, predictions = zip(*[(to_uint8(state), to_uint8(image)) for state, image in frames])
    chosen = spread(50, len(states))
    return {"states": torch.stack(states)[chosen], "predictions": torch.stack(predictions)[chosen]}


def spread(count, total):
    """count indices, evenly spread over 0..total-1, first and last among them (all, where there are not as many)."""
    return torch.linspace(0, total - 1, min(count, total)).round().long().tolist()


def estimate(bound, test, run, count=2000):
    """The bound for the first `count` test images, [count], in the run's unit. bound(images, label) estimates it in
    nats, given the label. With ln 10, it bounds the code length of the image without its label,
    -ln p(x) = -ln sum_label p(label) p(x | label) <= -ln p(x | label) + ln 10."""
    torch.manual_seed(run.args.seed)
    nats = torch.cat([bound(to_float(x).to(run.args.device), label.to(run.args.device)).cpu()
                      for x, label in zip(test[0][:count].split(500), test[1][:count].split(500))])
    nats = nats if run.args.no_labels else nats + math.log(10)
    return nats / (784 * math.log(2)) if run.metrics["unit"] == "bits/dim" else nats


def evaluate(run, bound, sample, train, test, real=lambda images: images):
    """The final figures of merit: the bound on the whole test set; of drawn digits, Fréchet distance, right and clear,
    beside those of real digits. real(images) are images as the model has them."""
    print("evaluating", flush=True)
    args, epochs, bounds = run.args, len(run.history), estimate(bound, test, run, count=len(test[0]))
    final = {"bound": bounds.mean().item(), "bound_se": (bounds.std() / len(bounds) ** 0.5).item(),
             "epochs": epochs, "steps": args.steps or STEPS, "process_steps": args.steps or PROCESS_STEPS,
             "sampler": args.sampler, "guidance": args.guidance}
    count = min(len(test[0]), 2000 if args.steps else max(2000, 500 * epochs))  # it should not outlast training
    if count >= 2000:
        classifier = trained_classifier(run.settings["dataset"], *train, args.out_dir)
        torch.manual_seed(args.seed)
        chosen, labels = torch.randperm(len(train[0]))[:count], torch.arange(count) % 10
        real_train, real_test = [to_uint8(real(to_float(images))) for images in (train[0][chosen], test[0])]
        features, final["right"], final["clear"] = classify(classifier, draw(sample, labels, args), labels)
        features_train, _, _ = classify(classifier, real_train, labels)
        features_test, final["right_real"], final["clear_real"] = classify(classifier, real_test, test[1])
        final.update(count=count, frechet=frechet_distance(features, features_test),
                     frechet_real=frechet_distance(features_train, features_test))
        if args.no_labels:
            del final["right"], final["right_real"]
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in final.items() if isinstance(value, float))
    print(f"{epochs} epochs (bound in {run.metrics['unit']}): {numbers}", flush=True)
    return final


def trained_classifier(name, images, labels, out_dir):
    """A small network that reads digits; its last hidden layer has 64 features, in which images are compared. It is
    trained on the training set (some minutes) once, and kept in out_dir."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.SiLU(),
                        nn.Conv2d(32, 64, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2),
                        nn.Conv2d(64, 128, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2), nn.Flatten(),
                        nn.Linear(128 * 9, 64), nn.SiLU(), nn.Linear(64, 10)).to(memory_format=torch.channels_last)
    path = out_dir / f"classifier-{name.lower().replace(' ', '-')}-{len(images)}.pt"
    with contextlib.suppress(Exception):  # there is none yet, or a broken one, or one of another network
        net.load_state_dict(torch.load(path, weights_only=True))
        return net
    print(f"training the classifier of the Fréchet distance on {name}", flush=True)
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
    write(path, lambda file: torch.save(net.state_dict(), file))
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
STYLE = ["default", {"font.size": 9, "axes.titlesize": 9, "figure.titlesize": 10, "figure.dpi": 200}]


@matplotlib.style.context(STYLE)
def save_grids(path, panels, title, rows=False):
    """A picture of panels = {label: digits, uint8 [N, 1, 28, 28]}: squares side by side, or rows of ten."""
    n = len(panels)
    figure = Figure((7, 0.95 * n + 0.4) if rows else (max(3, 2 * n), 3.3 if n == 1 else 2.4), layout="constrained")
    figure.suptitle(title, wrap=True)
    for axis, label in zip(figure.subplots(*((n, 1) if rows else (1, n)), squeeze=False).flat, panels):
        picture = make_grid(panels[label], 10 if rows else math.isqrt(len(panels[label])), padding=1, pad_value=255)[0]
        axis.imshow(picture.tolist(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_title(label)
        axis.set_axis_off()
    write(path, figure.savefig)


@matplotlib.style.context(STYLE)
def save_curves(path, runs, title):
    """Test bounds over epochs, with bars of one standard error; of one run alone, also the training loss."""
    columns = {"test": f"test {runs[0]['unit']}", **({"train_loss": "training loss"} if len(runs) == 1 else {})}
    figure = Figure((4.2 * len(columns), 3.2), layout="constrained")
    figure.suptitle(title, wrap=True)
    for axis, (column, label) in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns.items()):
        for run in runs:
            x, y, error = zip(*[(row["epoch"], row[column], row["test_se"]) for row in run["history"]])
            axis.errorbar(x, y, error if column == "test" else None, fmt=".-", label=run["title"])
        axis.set(xlabel="epoch", ylabel=label)
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
        axis.legend()
    write(path, figure.savefig)


def save_figures(folder, runs, title):
    """Pictures, curves and film of runs, side by side: of each, what metrics.json holds, and its "trace"."""
    save_curves(folder / "curves.png", [run for run in runs if run["unit"] == runs[0]["unit"]], title)
    title = f"{title}, {runs[0]['final']['process_steps']} steps"
    save_grids(folder / "samples.png", {run["title"]: run["trace"]["predictions"][-1] for run in runs}, title)
    chosen = spread(10, len(runs[0]["trace"]["states"]))
    rows = {f"{run['title']}: {key}": images[chosen, 2] for run in runs for key, images in run["trace"].items()}
    percent = ", ".join(f"{i / chosen[-1]:.0%}" for i in chosen)
    save_grids(folder / "steps.png", rows, f"{title}: one digit after {percent} of them", rows=True)
    frames = zip(*[run["trace"]["states"] for run in runs])
    film = torch.stack([torch.cat([make_grid(digits, math.isqrt(len(digits)), padding=1, pad_value=255)[0]
                                   for digits in frame], dim=1) for frame in frames])
    film = ((film / 42.5).round() * 42.5).byte()  # seven shades, one of them in the middle: noise hardly compresses
    film = film.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    first, *rest = [Image.frombytes("L", image.shape[::-1], bytes(image.flatten().tolist())) for image in film]
    write(folder / "process.gif", lambda file: first.save(
        file, "GIF", save_all=True, append_images=rest, loop=0, duration=[80] * len(rest) + [1500], comment=title))


def save_results(run, final, trace):
    """What a finished run leaves; final: see `evaluate`, trace: see `draw_process`."""
    run.write_metrics(final)
    write(run.folder / "trace.pt", lambda file: torch.save(trace, file))
    title = f"{run.title}, {final['epochs']} epochs"
    previews = {f"epoch {1 + i}": run.previews[1 + i] for i in spread(6, final["epochs"])}
    save_grids(run.folder / "training.png", previews, f"{title}: digits from the same noise")
    save_figures(run.folder, [{**run.metrics, "final": final, "trace": trace}], title)


# ----------------------------------------------------------------------------------------------------------- comparison
MODELS = ["diffusion", "bfn-continuous", "bfn-discretized", "bfn-discrete"]
COMPARED = ["version", "dataset", *SETTINGS, "epochs", "steps", "process_steps", "guidance"]  # equal in all


def compare(out_dir, name):
    """Where finished runs of diffusion and of a BFN stand side by side: pictures, curves, film and table, from their
    metrics.json and trace.pt alone. name: the run that has just ended; the others must have its settings."""
    runs = {}
    for model in MODELS:
        with contextlib.suppress(Exception):  # there is none, or a broken one
            metrics = json.loads((out_dir / model / "metrics.json").read_text(encoding="utf-8"))
            trace = torch.load(out_dir / model / "trace.pt", weights_only=True)
            runs[model] = {**metrics, **metrics["settings"], **metrics["final"], "trace": trace}
    other = [model for model, run in runs.items() if any(run.get(key) != runs[name][key] for key in COMPARED)]
    if other:
        print(f"not compared with {name}, as not finished or with other settings: {', '.join(other)}")
    runs = [run for model, run in runs.items() if model not in other]
    if len(runs) < 2 or runs[0]["model"] != "diffusion":
        return
    folder, titles = out_dir / "comparison", [run["title"] for run in runs]
    save_figures(folder, runs, f"DDPM and BFN on {runs[0]['dataset']}, {runs[0]['epochs']} epochs each")
    table = [["", *titles], ["---"] * (1 + len(runs))]
    for key in ["unit", "parameters", *runs[0]["settings"], *runs[0]["final"]]:
        table.append([key, *[f"{run[key]:.4g}" if isinstance(run[key], float) else str(run[key]) for run in runs]])
    write(folder / "table.md", lambda file: file.writelines(f"| {' | '.join(row)} |\n".encode() for row in table))
    print(f"comparison of {', '.join(titles)} -> {folder}")


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
    """--sample N: draw N images with the network of a run, into samples.pt, and the first few as drawn.png."""
    folder, N = args.out_dir / name, args.sample
    settings = {"version": VERSION, "model": name, "no_labels": args.no_labels}
    state = load_checkpoint(folder / "checkpoint.pt", settings, {"ema": ema})
    if not state:
        fail(f"{folder} holds no trained network to sample from; train one first, without --sample")
    images = draw(sample, torch.arange(1, N + 1) % 10 if args.label is None else torch.full((N,), args.label), args)
    write(folder / "samples.pt", lambda file: torch.save(images, file))
    save_grids(folder / "drawn.png", {"": images[:len(PREVIEW_LABELS)]}, f"{name} on {state['settings']['dataset']}")
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
