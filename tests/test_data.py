"""data.py against slow and obvious references: what is on disk (sets), what a model is shown (views), and
what the flags of a run become (recipes).

The references handle one image, one pixel or one block at a time, or are Pillow's own operations. Statistics
are taken with fixed seeds, so that a test passes always or never.
"""
import argparse
import colorsys
import contextlib
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import random
import shutil
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

sys.path.insert(0, str(Path(__file__).parents[1]))
import beit  # noqa: E402
import beit_v2  # noqa: E402
import cae  # noqa: E402
import data  # noqa: E402
import dvae  # noqa: E402
import ibot  # noqa: E402
import mae  # noqa: E402
import vit  # noqa: E402

GOLDEN = Path(__file__).parent / "golden"


def make_args(**changes):
    """The flags that loading reads, as parse_args would return them."""
    flags = dict(data="shapes", data_dir="data", output_dir="out/test", device="cpu", seed=0, num_workers=0,
                 batch_size=8, accum_steps=1, epochs=2, max_steps=0, holdout=0, img_size=16)
    return argparse.Namespace(**flags | changes)


def noise_images(B, H, W, seed=0):
    """Images of independent random levels: every rounding and every clamp occurs."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, (B, 3, H, W), generator=g).float() / 255


def smooth_images(B, size, seed=0):
    """Images of a few soft blobs, on which different interpolation kernels agree."""
    g = torch.Generator().manual_seed(seed)
    return F.interpolate(torch.rand(B, 3, 4, 4, generator=g), size, mode="bicubic").clamp(0, 1)


def to_pillow(img):
    return Image.fromarray((img * 255).round().byte().permute(1, 2, 0).numpy())


def from_pillow(img):
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).float() / 255


def levels_apart(imgs, others):
    """The largest difference of two image tensors, in levels of 256."""
    return ((imgs - others).abs().max() * 255).item()


def largest_gap(a, b):
    """Kolmogorov-Smirnov distance of two samples."""
    a, b = np.sort(np.asarray(a, float)), np.sort(np.asarray(b, float))
    at = np.concatenate([a, b])
    return np.abs(np.searchsorted(a, at, "right") / len(a) - np.searchsorted(b, at, "right") / len(b)).max()


def said(capsys, action, *arguments):
    """Run what must end in exit status 2 -> the sentence it leaves on stderr."""
    with pytest.raises(SystemExit) as stopped:
        action(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---- crops ----

def reference_box(H, W, scale, ratio, rng):
    """torchvision's RandomResizedCrop.get_params, one image at a time."""
    for _ in range(10):
        area = H * W * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= W and 0 < h <= H:
            return rng.randint(0, H - h), rng.randint(0, W - w), h, w
    if W / H < ratio[0]:
        h, w = round(W / ratio[0]), W
    elif W / H > ratio[1]:
        h, w = H, round(H * ratio[1])
    else:
        h, w = H, W
    return (H - h) // 2, (W - w) // 2, h, w


@pytest.mark.parametrize("H, W, scale", [(60, 80, (0.2, 1.0)), (32, 32, (0.08, 1.0)), (48, 32, (0.8, 1.0))])
@pytest.mark.parametrize("single", [False, True])
def test_random_boxes_have_the_asked_shares_and_shapes(H, W, scale, single):
    """Every box, of a batch or of a single image, lies inside and keeps its area and aspect range up to
    rounding; all four numbers are distributed as those of the sequential algorithm."""
    torch.manual_seed(0)
    rng, ratio = random.Random(1), (3 / 4, 4 / 3)
    boxes = data.random_boxes(4000, H, W, scale, ratio) if not single else torch.tensor(
        [data.random_box(H, W, scale, ratio, rng) for _ in range(4000)])
    top, left, h, w = boxes.T
    assert (boxes >= 0).all() and (h > 0).all() and (w > 0).all()
    assert (top + h <= H).all() and (left + w <= W).all()
    slack = (h + w + 1) / 2 / (H * W)                           # half a pixel on each side
    assert (h * w / (H * W) >= scale[0] - slack).all() and (h * w / (H * W) <= scale[1]).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()
    rng = random.Random(0)
    wanted = np.array([reference_box(H, W, scale, (3 / 4, 4 / 3), rng) for _ in range(4000)])
    assert largest_gap(h * w, wanted[:, 2] * wanted[:, 3]) < 0.04
    for column in range(4):
        assert largest_gap(boxes[:, column], wanted[:, column]) < 0.04


@pytest.mark.parametrize("H, W, box", [(10, 100, [0, 43, 10, 13]), (100, 10, [43, 0, 13, 10]),
                                       (30, 30, [0, 0, 30, 30])])
def test_random_boxes_fall_back_to_the_largest_central_box(H, W, box):
    """Where no try can fit, every image gets the largest central box of an allowed aspect."""
    assert (data.random_boxes(50, H, W, (1.2, 1.5), (3 / 4, 4 / 3)) == torch.tensor(box)).all()
    assert data.random_box(H, W, (1.2, 1.5), (3 / 4, 4 / 3), random.Random(0)) == tuple(box)


@pytest.mark.parametrize("size", [5, 24, 40])
def test_crop_and_resize_is_interpolate_on_each_crop(size):
    """Shrinking, keeping and enlarging, to the border or inside, equal F.interpolate(antialias=True) image
    by image."""
    imgs = noise_images(6, 24, 33)
    boxes = torch.tensor([[0, 0, 24, 33], [3, 5, 10, 7], [23, 32, 1, 1],
                          [0, 9, 24, 24], [2, 0, 22, 3], [10, 10, 5, 20]])
    crops = data.crop_and_resize(imgs, boxes, size)
    for img, (top, left, h, w), crop in zip(imgs, boxes.tolist(), crops):
        cut = img[None, :, top:top + h, left:left + w]
        wanted = F.interpolate(cut, (size, size), mode="bicubic", antialias=True)
        torch.testing.assert_close(crop, wanted[0].clamp(0, 1), atol=2e-5, rtol=0)


def test_resize_is_antialiased_and_clamped():
    """resize shrinks as Pillow's bicubic does, within rounding, and leaves images of the right size alone."""
    imgs = noise_images(3, 40, 40)
    for img, small in zip(imgs, data.resize(imgs, 16)):
        wanted = to_pillow(img).resize((16, 16), Image.Resampling.BICUBIC)
        assert levels_apart(small, from_pillow(wanted)) <= 1.5
    assert data.resize(imgs, 40) is imgs
    assert 0 <= data.resize(imgs, 90).min() and data.resize(imgs, 90).max() <= 1


def test_sometimes_flips_whole_images():
    """Every image is itself or its mirror image, mirrored with the given probability."""
    torch.manual_seed(0)
    imgs = noise_images(2000, 3, 4)
    out = data.sometimes(imgs, 0.3, imgs.flip(-1))
    flipped = (out == imgs.flip(-1)).flatten(1).all(1)
    assert (flipped | (out == imgs).flatten(1).all(1)).all() and abs(flipped.float().mean() - 0.3) < 0.03
    assert torch.equal(data.sometimes(imgs, 0.0, imgs.flip(-1)), imgs)
    assert torch.equal(data.sometimes(imgs, 1.0, imgs.flip(-1)), imgs.flip(-1))


# ---- colours ----

@pytest.mark.parametrize("kind", ["brightness", "contrast", "color", "sharpness"])
def test_blends_are_those_of_pillow(kind):
    """Brightness, contrast, colour and sharpness with a factor for each image, within Pillow's
    rounding."""
    factors = [0.0, 0.3, 1.0, 1.4, 1.9]
    imgs = torch.cat([noise_images(3, 12, 15), smooth_images(2, 12)[:, :, :, [0, *range(12), 11, 11]]])
    theirs = getattr(ImageEnhance, kind.capitalize())
    for img, factor, out in zip(imgs, factors, data.blend(imgs, kind, torch.tensor(factors))):
        assert levels_apart(out, from_pillow(theirs(to_pillow(img)).enhance(factor))) <= 2


def test_hue_is_that_of_colorsys():
    """Every pixel, greys and pure colours included, moves as in HSV space, by its own image's angle."""
    imgs = noise_images(4, 4, 5)
    imgs[:, :, 0] = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0.4, 0.4, 0.4], [0, 0, 0]]).T
    turns = [-0.5, -0.1, 0.25, 0.0]
    for img, turn, out in zip(imgs, turns, data.hue(imgs, torch.tensor(turns))):
        for y in range(4):
            for x in range(5):
                h, s, v = colorsys.rgb_to_hsv(*img[:, y, x].tolist())
                wanted = colorsys.hsv_to_rgb((h + turn) % 1, s, v)
                torch.testing.assert_close(out[:, y, x], torch.tensor(wanted), atol=1e-5, rtol=0)


def jitter_one(img, strengths, factors, order):
    """Colour jitter of one image, operation after operation."""
    for k in order:
        if k >= 0 and strengths[k]:
            factor = torch.tensor([factors[k]])
            img = data.hue(img[None], factor)[0] if k == 3 else \
                data.blend(img[None], ("brightness", "contrast", "color")[k], factor)[0]
    return img


@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.2, 0.1), (0.4, 0.4, 0.4, 0.0),
                                       (0.0, 0.8, 0.0, 0.5), (1.6, 0, 0, 0)])
def test_color_jitter_is_the_per_image_reference(strengths):
    """Given the drawn numbers, an image goes through its own factors in its own order; strength 0 leaves
    that step out."""
    imgs, B = noise_images(60, 5, 5), 60
    torch.manual_seed(3)
    out = data.color_jitter(imgs, strengths, prob=0.8)
    torch.manual_seed(3)                                        # the same draws again, in the same order
    factors = [data.uniform(max(0, 1 - s), 1 + s, B) for s in strengths[:3]]
    factors.append(data.uniform(-strengths[3], strengths[3], B))
    order, skipped = torch.rand(B, 4).argsort(1), torch.rand(B) >= 0.8
    assert skipped.any() and len(set(map(tuple, order.tolist()))) > 15
    for i in range(B):
        steps = [] if skipped[i] else order[i].tolist()
        wanted = jitter_one(imgs[i], strengths, [f[i].item() for f in factors], steps)
        torch.testing.assert_close(out[i], wanted, atol=1e-6, rtol=0)


def test_color_jitter_draws_factors_over_the_whole_range():
    """Brightness factors, read off a constant image, are uniform in (1 - s, 1 + s); all strengths 0 change
    nothing."""
    torch.manual_seed(0)
    imgs = torch.full((3000, 3, 1, 1), 0.5)
    factor = data.color_jitter(imgs, (0.4, 0, 0, 0))[:, 0, 0, 0] / 0.5
    assert largest_gap(factor, np.linspace(0.6, 1.4, 3000)) < 0.04
    imgs = noise_images(10, 4, 4)
    assert torch.equal(data.color_jitter(imgs, (0, 0, 0, 0)), imgs)
    assert torch.equal(data.color_jitter(imgs, (0.4, 0.4, 0.4, 0.1), prob=0.0), imgs)


def test_sometimes_grey_is_pillows_l():
    """Grey images have three equal channels, those of Image.convert("L"), and occur with the given
    probability."""
    torch.manual_seed(0)
    imgs = noise_images(1500, 4, 4)
    out = data.sometimes(imgs, 0.2, data.luma(imgs))
    gray = (out[:, 0] == out[:, 1]).flatten(1).all(1) & (out[:, 0] == out[:, 2]).flatten(1).all(1)
    assert torch.equal(out[~gray], imgs[~gray]) and abs(gray.float().mean() - 0.2) < 0.03
    for img, wanted in zip(out[gray][:20], imgs[gray]):
        assert levels_apart(img, from_pillow(to_pillow(wanted).convert("L").convert("RGB"))) <= 0.6


@pytest.mark.parametrize("side", [16, 40])
def test_gaussian_blur_is_pillows(side):
    """Sigmas from 0.1 to 2.0, one an image, on noise, on soft blobs and on shapes, which are not square:
    within 0.13 of a grey level on average and one level at worst, at the border, too."""
    shapes = data.draw_shapes(20, side + 5, seed=0)[0][:, :, :side] / 255
    for kind in (noise_images(20, side, side + 5), smooth_images(20, side), shapes):
        kind, sigmas = (kind * 255).round() / 255, torch.linspace(0.1, 2.0, 20)
        out = data.gaussian_blur(kind, sigmas)
        assert out.shape == kind.shape and (out * 255 - (out * 255).round()).abs().max() < 1e-3, "levels"
        for img, sigma, got in zip(kind, sigmas.tolist(), out):
            apart = (got - from_pillow(to_pillow(img).filter(ImageFilter.GaussianBlur(sigma)))).abs() * 255
            border = torch.cat([apart[:, [0, 1, -2, -1]].flatten(), apart[:, :, [0, 1, -2, -1]].flatten()])
            assert apart.mean() < 0.13 and border.mean() < 0.2 and apart.max() < 1.01, sigma
        same = torch.full((20,), 0.7)                           # and a sigma depends on its own image alone
        assert torch.equal(data.gaussian_blur(kind, same)[3], data.gaussian_blur(kind[3:4], same[:1])[0])


# ---- RandAugment ----

def pillow_op(img, name, level):
    """An operation of timm's "inc1" space, by Pillow. level in [-1, 1]"""
    a, size, fill, kernel = abs(level), img.size[0], (124, 116, 104), Image.Resampling.BICUBIC
    if name in ("shear_x", "shear_y", "translate_x", "translate_y"):
        matrix = {"shear_x": (1, 0.3 * level, 0, 0, 1, 0), "shear_y": (1, 0, 0, 0.3 * level, 1, 0),
                  "translate_x": (1, 0, 0.45 * level * size, 0, 1, 0),
                  "translate_y": (1, 0, 0, 0, 1, 0.45 * level * size)}[name]
        return img.transform(img.size, Image.Transform.AFFINE, matrix, resample=kernel, fillcolor=fill)
    if name == "rotate":
        return img.rotate(30 * level, resample=kernel, fillcolor=fill)
    if name == "solarize_add":
        return img.point([min(255, v + int(110 * a)) if v < 128 else v for v in range(256)] * 3)
    if name == "posterize":
        return ImageOps.posterize(img, 4 - int(4 * a)) if a < 1 else Image.new("RGB", img.size)
    if name == "solarize":
        return ImageOps.solarize(img, 256 - int(256 * a))
    if name in ("autocontrast", "equalize", "invert"):
        return getattr(ImageOps, name)(img)
    return getattr(ImageEnhance, name.capitalize())(img).enhance(1 + 0.9 * level)


@pytest.mark.parametrize("name", data.RAND_AUGMENT)
def test_each_rand_augment_op_is_pillows(name):
    """Each operation, at several levels in one batch, equals Pillow's: colours within rounding, movements
    within what their two bicubic kernels differ by."""
    moves = name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
    imgs = smooth_images(6, 32)
    if not moves:
        shapes = data.draw_shapes(2, 32, seed=1)[0] / 255
        imgs = torch.cat([imgs[:2], 0.3 + 0.4 * noise_images(2, 32, 32), shapes])
        imgs[4, 1] = 0.5                                        # a channel of one level only
    imgs = (imgs * 255).round() / 255
    levels = [-0.9, 0.9, 0.35, -0.05, 1.0, -0.62]
    out = data.RAND_AUGMENT[name](imgs, torch.tensor(levels))
    assert out.min() >= 0 and out.max() <= 1
    exact = ("equalize", "invert", "posterize", "solarize", "solarize_add")
    for img, level, got in zip(imgs, levels, out):
        wanted = from_pillow(pillow_op(to_pillow(img), name, level))
        if moves:
            apart = (got - wanted).abs() * 255
            assert apart.mean() < 2.5 and (apart > 10).float().mean() < 0.06, f"level {level}"
        else:
            assert levels_apart(got, wanted) <= (0.01 if name in exact else 2), f"level {level}"


def test_movements_fill_with_the_mean_colour():
    """What a shift uncovers has ImageNet's mean colour."""
    out = data.RAND_AUGMENT["translate_x"](torch.ones(1, 3, 20, 20), torch.tensor([-1.0]))
    assert (out[0, :, 5, 2] * 255).round().tolist() == [124, 116, 104] and out[0, 0, 5, 15] == 1


def test_rand_augment_draws_ops_and_levels_as_timm_does(monkeypatch):
    """Two draws an image, each applied with probability 1/2, all 15 operations equally often, levels
    clip(N(9, .5))/10 with either sign. (Counted around the true operation.)"""
    seen = []

    def counting(name, true_op):
        def operation(imgs, level):
            seen.extend((name, v) for v in level.tolist())
            return true_op(imgs, level)
        return operation

    assert len(data.RAND_AUGMENT) == 15
    monkeypatch.setattr(data, "RAND_AUGMENT", {k: counting(k, op) for k, op in data.RAND_AUGMENT.items()})
    torch.manual_seed(0)
    imgs = noise_images(6000, 4, 4)
    out = data.rand_augment(imgs)
    assert abs(len(seen) / 12000 - 0.5) < 0.02
    counts = [sum(name == op for name, _ in seen) for op in data.RAND_AUGMENT]
    assert min(counts) > 320 and max(counts) < 480              # 400 expected, standard deviation 19
    levels = np.array([v for _, v in seen])
    wanted = np.clip(np.random.default_rng(0).normal(0.9, 0.05, 6000), 0, 1)
    assert largest_gap(np.abs(levels), wanted) < 0.03 and abs((levels > 0).mean() - 0.5) < 0.03
    untouched = (out == imgs).flatten(1).all(1).float().mean()
    assert 0.24 < untouched < 0.36                              # 1/4, and operations that change nothing


# ---- erasing, mixup, cutmix ----

def reference_erasing(H, W, rng):
    """timm's RandomErasing, one image: the size of its box."""
    for _ in range(10):
        area = H * W * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < H and w < W:
            return h, w
    return 0, 0


def test_random_erasing_fills_one_box_with_noise():
    """With the given probability one full box, of the published distribution, holds N(0, 1) noise; the rest
    is as it was."""
    torch.manual_seed(0)
    imgs = torch.full((4000, 3, 24, 32), -7.0)
    out = data.random_erasing(imgs, 0.25)
    erased = out != -7
    assert (erased == erased[:, :1]).all()                      # the same place in all channels
    chosen = erased.flatten(1).any(1)
    assert abs(chosen.float().mean() - 0.25) < 0.02
    h, w = erased[chosen, 0].any(2).sum(1), erased[chosen, 0].any(1).sum(1)
    assert torch.equal(erased[chosen, 0].sum((1, 2)), h * w)    # boxes without holes
    noise = out[erased]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    rng = random.Random(0)
    wanted = np.array([reference_erasing(24, 32, rng) for _ in range(4000)])
    assert max(largest_gap(h, wanted[:, 0]), largest_gap(w, wanted[:, 1])) < 0.06
    first_row, first_col = erased[chosen, 0].any(2).int().argmax(1), erased[chosen, 0].any(1).int().argmax(1)
    assert abs((first_row / (24 - h)).mean() - 0.5) < 0.03 and abs((first_col / (32 - w)).mean() - 0.5) < 0.03
    assert (first_row + h).max() == 24 and (first_col + w).max() == 32
    assert first_row.min() == 0 and first_col.min() == 0


def test_mixup_targets_are_the_official_ones(monkeypatch):
    """For the golden lambda: images lam x + (1 - lam) x_partner, targets and both cross-entropies of the
    official code."""
    golden = {name: torch.tensor(array) for name, array in np.load(GOLDEN / "mix.npz").items()}
    lam, labels, logits = golden["mixup_lam"], golden["labels"], golden["logits"]
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self: lam)
    imgs = noise_images(6, 4, 4)
    mixed, targets = data.mixup_cutmix(imgs, labels, 10, mixup=0.8, cutmix=0.0, smoothing=0.1)
    torch.testing.assert_close(targets, golden["mixup_targets"], atol=1e-6, rtol=0)
    for i in range(6):
        torch.testing.assert_close(mixed[i], lam * imgs[i] + (1 - lam) * imgs[5 - i], atol=1e-6, rtol=0,
                                   check_dtype=False)
    assert abs(F.cross_entropy(logits, targets) - golden["soft_ce"]) < 1e-5
    imgs, targets = data.mixup_cutmix(imgs, labels, 10, 0.0, 0.0, 0.1)
    assert abs(F.cross_entropy(logits, targets) - golden["ls_ce"]) < 1e-5


def cutmix_box(H, W, lam, centre, monkeypatch):
    """What CutMix makes of a drawn lambda and centre, read off two plain images, one black and one white.
    -> (top, bottom, left, right), the label's share, in double precision"""
    draws = iter(centre)
    imgs = torch.stack([torch.zeros(3, H, W), torch.ones(3, H, W)])
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributions.Beta, "sample", lambda self: torch.tensor(lam, dtype=torch.double))
        patch.setattr(torch, "randint", lambda high, size: torch.tensor(next(draws)))
        torch.set_default_dtype(torch.double)
        try:
            mixed, targets = data.mixup_cutmix(imgs, torch.arange(2), 2, mixup=0.0, cutmix=1.0, smoothing=0.0)
        finally:
            torch.set_default_dtype(torch.float)
    rows, cols = mixed[0, 0].any(1).nonzero(), mixed[0, 0].any(0).nonzero()
    box = rows.min().item(), rows.max().item() + 1, cols.min().item(), cols.max().item() + 1
    assert mixed[0].sum() == 3 * (box[1] - box[0]) * (box[3] - box[2]) and torch.equal(mixed[1], 1 - mixed[0])
    return box, targets[0, 0].item()


def test_cutmix_boxes_are_the_official_ones(monkeypatch):
    """Four golden boxes, two of them clipped, and the lambda that is corrected for the clipped part."""
    golden, centres = np.load(GOLDEN / "mix.npz"), [(10, 24), (25, 3), (24, 8), (0, 21)]
    boxes, true_lams = golden["cutmix_boxes_yl_yh_xl_xh"], golden["cutmix_lam_out"]
    for lam, centre, box, true_lam in zip(golden["cutmix_lam_in"], centres, boxes, true_lams):
        found, got = cutmix_box(32, 32, float(lam), centre, monkeypatch)
        assert list(found) == box.tolist() and abs(got - true_lam) < 1e-9
        sides = [data.cutmix_side(32, place, float(lam)) for place in centre]
        assert [edge for side in sides for edge in (side.start, side.stop)] == box.tolist()
    box, share = cutmix_box(30, 40, 0.5, (15, 20), monkeypatch)
    assert (box, share) == ((5, 25, 6, 34), 1 - 20 * 28 / 1200)                     # 21 cut to 20


def test_cutmix_targets_count_the_pixels():
    """One box of every image comes from its mirror partner, and the target weighs both labels by their
    pixels."""
    torch.manual_seed(0)
    imgs = torch.arange(6.0)[:, None, None, None].expand(6, 3, 16, 20)
    partial = 0
    for _ in range(50):
        mixed, targets = data.mixup_cutmix(imgs, torch.arange(6), 6, mixup=0.0, cutmix=1.0, smoothing=0.0)
        for i in range(6):
            foreign = mixed[i] == 5 - i
            assert (foreign | (mixed[i] == i)).all()
            rows, cols = foreign[0].any(1).sum(), foreign[0].any(0).sum()
            assert foreign[0].sum() == rows * cols and (foreign == foreign[:1]).all()
            share = foreign[0].float().mean().item()
            assert abs(targets[i, 5 - i] - share) < 1e-6 and abs(targets[i, i] - (1 - share)) < 1e-6
            partial += 0 < share < 1
    assert partial > 200


def test_mixup_and_cutmix_take_turns():
    """With both on, a batch is cut or blended, half of the time each, with lambda of the right Beta
    distribution."""
    torch.manual_seed(0)
    imgs = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 64, 64)
    blended, cut = [], []
    for _ in range(1500):
        mixed, targets = data.mixup_cutmix(imgs, torch.arange(2), 2, mixup=0.4, cutmix=3.0, smoothing=0.0)
        constant = (mixed[0] == mixed[0, 0, 0, 0]).all() and 0 < mixed[0, 0, 0, 0] < 1
        (blended if constant else cut).append(targets[0, 0].item())
    assert abs(len(cut) / 1500 - 0.5) < 0.04
    assert largest_gap(blended, np.random.default_rng(0).beta(0.4, 0.4, 5000)) < 0.06
    rng = random.Random(0)
    wanted = []
    for _ in range(5000):
        lam, y, x = rng.betavariate(3, 3), rng.randrange(64), rng.randrange(64)
        rows, cols = (data.cutmix_side(64, place, lam) for place in (y, x))
        wanted.append(1 - (rows.stop - rows.start) * (cols.stop - cols.start) / 64 ** 2)
    assert largest_gap(cut, wanted) < 0.06


# ---- views ----

STATS = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def denormalise(imgs):
    mean, std = (torch.tensor(v)[:, None, None] for v in STATS)
    return imgs * std + mean


def test_tokenizer_size_gives_the_same_crop_twice():
    """A view with tokenizer_size yields one crop, flip and jitter, normalised at one size and in [0, 1] at
    the other."""
    torch.manual_seed(0)
    imgs = data.draw_shapes(8, 40, seed=0)[0]
    view = data.View(32, scale=(0.2, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.0), tokenizer_size=16)
    model_input, tokens_input = data.make_views(data.crop_in_memory(imgs, [view]), [view], *STATS)
    assert model_input.shape == (8, 3, 32, 32) and tokens_input.shape == (8, 3, 16, 16)
    assert tokens_input.min() >= 0 and tokens_input.max() <= 1
    wanted = F.interpolate(denormalise(model_input), (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    torch.testing.assert_close(tokens_input, wanted, atol=1e-5, rtol=0)


def test_erasing_is_kept_from_the_tokenizer():
    """Random erasing changes the model's input and leaves the tokenizer's whole."""
    torch.manual_seed(0)
    imgs = torch.full((16, 3, 16, 16), 0.5)
    view = data.View(16, erase=1.0, tokenizer_size=16)
    model_input, tokens_input = data.make_views([imgs], [view], *STATS)
    assert torch.equal(tokens_input, imgs)
    assert (model_input != model_input[0, :, :1, :1]).flatten(1).any(1).all()


def test_several_crops_show_the_same_image():
    """Two large and three small crops of each image come in order, all of that image and all different."""
    torch.manual_seed(0)
    views = [data.View(16, 2, scale=(0.3, 1.0)), data.View(8, 3, scale=(0.05, 0.3))]

    def crops_of(imgs):
        made = data.make_views(data.crop_in_memory(imgs, views), views, (0.0,) * 3, (1.0,) * 3)
        assert [tuple(c.shape) for c in made] == [(20, 3, 16, 16)] * 2 + [(20, 3, 8, 8)] * 3
        return made
    for crop in crops_of(torch.arange(20)[:, None, None, None].expand(20, 3, 32, 32).byte()):
        wanted = torch.arange(20.0)[:, None, None, None].expand_as(crop)
        torch.testing.assert_close(crop * 255, wanted, atol=1e-3, rtol=0)
    crops = crops_of((noise_images(20, 32, 32) * 255).byte())
    for a, b in ((0, 1), (2, 3), (3, 4)):                       # no image has the same box twice
        assert (crops[a] != crops[b]).flatten(1).any(1).all()


def test_crops_of_one_view_have_probabilities_of_their_own():
    """A tuple of probabilities: each crop changes with its own, the crops of an image independently."""
    torch.manual_seed(0)
    whole = noise_images(2000, 8, 8).repeat(2, 1, 1, 1)
    for change, shares in ((dict(solarize=(0.0, 0.2)), (0.0, 0.2)), (dict(blur=(1.0, 0.1)), (1.0, 0.1))):
        crops = data.make_views([whole], [data.View(8, 2, **change)], (0.0,) * 3, (1.0,) * 3)
        for crop, share in zip(crops, shares):
            assert abs((crop != whole[:2000]).flatten(1).any(1).float().mean() - share) < 0.03


def test_a_plain_view_shows_the_whole_image():
    """Without scale the image comes as it is, or resized, and normalised."""
    imgs = (noise_images(5, 12, 12) * 255).round().byte()
    (plain,) = data.make_views(data.crop_in_memory(imgs, [data.View(12)]), [data.View(12)], *STATS)
    torch.testing.assert_close(denormalise(plain), imgs / 255, atol=1e-6, rtol=0)
    (resized,) = data.crop_in_memory(imgs, [data.View(8)])
    torch.testing.assert_close(resized, data.resize(imgs / 255, 8))


@pytest.mark.parametrize("change, share", [
    (dict(flip=0.5), 0.5), (dict(gray=0.2), 0.2), (dict(blur=0.1), 0.1), (dict(solarize=0.2), 0.2),
    (dict(erase=0.25), 0.25), (dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8), 0.8)])
def test_each_part_of_a_view_comes_with_its_probability(change, share):
    """Every field of View reaches its operation: the share of images that differ from the plain view is as
    asked."""
    torch.manual_seed(0)
    crops = [noise_images(2000, 8, 8)]
    (plain,), (changed,) = (data.make_views(crops, [data.View(8, **c)], *STATS) for c in ({}, change))
    different = (plain != changed).flatten(1).any(1).float().mean()
    assert abs(different - share) < 0.03


def test_blur_and_solarise_of_a_view():
    """A view's blur has sigma uniform in (0.1, 2); its solarising inverts the pixels from level 128 on."""
    torch.manual_seed(0)
    point = torch.zeros(1500, 3, 15, 15)
    point[:, :, 7, 7] = 1
    (out,) = data.make_views([point], [data.View(15, blur=1.0)], (0.0,) * 3, (1.0,) * 3)
    reference = data.gaussian_blur(point, torch.linspace(0.1, 2.0, 1500))
    assert largest_gap(out[:, 0, 7, 7], reference[:, 0, 7, 7]) < 0.05
    ramp = (torch.arange(256) / 255).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    (out,) = data.make_views([ramp], [data.View(16, solarize=1.0)], (0.0,) * 3, (1.0,) * 3)
    assert levels_apart(out[0], from_pillow(ImageOps.solarize(to_pillow(ramp[0]), 128))) < 0.01


# ---- masks ----

def reference_mask(grid, budget, low, rng, patient=False):
    """The block masks of BEiT's and iBOT's code, one block at a time; budget may be a fraction. patient: of
    CAE's, which goes on after ten failures until the budget is hidden. -> mask, blocks"""
    mask, count, blocks = np.zeros((grid, grid), bool), 0, 0
    while count < budget:
        room, new = budget - count, 0
        for _ in range(10):
            area = rng.uniform(low, room)                       # the bounds may come in either order
            ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < grid and w < grid:
                top, left = rng.randint(0, grid - h), rng.randint(0, grid - w)
                box = mask[top:top + h, left:left + w]
                if 0 < h * w - box.sum() <= room:
                    new, box[:] = h * w - box.sum(), True
                    break
        if not new and not patient:
            break
        count, blocks = count + new, blocks + bool(new)
    return mask, blocks


def reference_masks(n, grid, budgets, low, rule):
    """n masks of the sequential algorithm, by the rules of `blockwise_mask`, without a limit of failures for
    "on". -> (n, grid, grid) bool"""
    rng, masks = random.Random(1), []
    for budget in np.broadcast_to(budgets, n).tolist():
        mask, _ = reference_mask(grid, budget, low, rng, patient=rule == "on")
        if rule == "fill":
            for place in rng.sample(np.flatnonzero(~mask).tolist(), budget - mask.sum()):
                mask.flat[place] = True
        masks.append(mask)
    return torch.from_numpy(np.stack(masks))


def fold(frequency):
    """Average a map over its eight symmetries: the algorithm knows neither left nor right, so the noise is
    halved."""
    turned = [torch.rot90(frequency, k) for k in range(4)]
    return torch.stack(turned + [t.T for t in turned]).mean(0)


def neighbours(masks):
    """Mean number of adjacent pairs of hidden patches."""
    m = masks.float()
    return ((m[:, 1:] * m[:, :-1]).sum((1, 2)) + (m[:, :, 1:] * m[:, :, :-1]).sum((1, 2))).mean().item()


def isolated(masks):
    """The share of hidden patches without a hidden patch above, below, left or right."""
    m = F.pad(masks, (1, 1, 1, 1))
    near = m[:, :-2, 1:-1] | m[:, 2:, 1:-1] | m[:, 1:-1, :-2] | m[:, 1:-1, 2:]
    return ((masks & ~near).sum() / masks.sum()).item()


SETTINGS = [(14, 75, 16), (8, 26, 4), (8, 32, 4), (14, 118, 16)]


@pytest.mark.parametrize("grid, num, low", SETTINGS)
@pytest.mark.parametrize("rule", ["end", "fill", "on"])
def test_blockwise_mask_is_distributed_as_the_published_algorithm(grid, num, low, rule):
    """2000 masks against 2000 of the sequential algorithm: frequency of every position, adjacency, hidden
    patches (the last would tell if its 64 tries cut masks short), and single patches: only "fill" has many.
    """
    torch.manual_seed(0)
    ours = data.blockwise_mask(2000, grid, num, low, rule).view(-1, grid, grid)
    theirs = reference_masks(2000, grid, num, low, rule)
    mine, wanted = ours.float().mean(0), theirs.float().mean(0)
    assert (fold(mine) - fold(wanted)).abs().max() < 0.025
    assert (mine - wanted).abs().max() < 0.05 and (mine - wanted).square().mean().sqrt() < 0.018
    assert abs(neighbours(ours) / neighbours(theirs) - 1) < 0.01
    if rule == "end":
        assert ours.sum((1, 2)).max() <= num and largest_gap(ours.sum((1, 2)), theirs.sum((1, 2))) < 0.05
    else:
        assert (ours.sum((1, 2)) == num).all()
    assert isolated(ours) == pytest.approx(isolated(theirs), abs=0.001)     # of 14 x 14: 0.001, "fill" 0.005


@pytest.mark.parametrize("grid, num, low", [(2, 3, 16), (2, 4, 9), (1, 1, 1)])
def test_blockwise_mask_ends_where_no_block_fits(grid, num, low):
    """Requests that no sequence of blocks meets: "on" gives up and fills the mask, "end" hides nothing."""
    torch.manual_seed(0)
    assert (data.blockwise_mask(50, grid, num, low, "on").sum(1) == num).all()
    assert not data.blockwise_mask(50, grid, num, low, "end").any()


def test_blockwise_mask_goes_on_in_more_than_one_round():
    """The rule "on" does not depend on the tries of a round: with two at a time masks are as with ten."""
    torch.manual_seed(0)
    few, many = (data.blockwise_mask(2000, 14, 75, rule="on", tries=n).view(-1, 14, 14) for n in (2, 10))
    assert (few.sum((1, 2)) == 75).all() and isolated(few) == pytest.approx(isolated(many), abs=0.001)
    assert abs(neighbours(few) / neighbours(many) - 1) < 0.01


@pytest.mark.parametrize("grid", [14, 8])
def test_blockwise_mask_takes_a_ratio_for_each_image(grid):
    """iBOT: half of the images hide nothing, the others at most floor(ratio * N), distributed as the
    official masks."""
    torch.manual_seed(0)
    ratio = torch.where(torch.rand(2000) < 0.5, 0, data.uniform(0.1, 0.5, 2000))
    budget, low = ratio * grid ** 2, (grid // 3) ** 2
    ours = data.blockwise_mask(2000, grid, budget, low).view(-1, grid, grid)
    count = ours.sum((1, 2))
    assert (count <= budget.floor()).all() and (count[budget == 0] == 0).all()
    theirs = reference_masks(2000, grid, budget.double().numpy(), low, "end")
    assert largest_gap(budget - count, budget - theirs.sum((1, 2))) < 0.05
    assert (fold(ours.float().mean(0)) - fold(theirs.float().mean(0))).abs().max() < 0.02
    assert abs(neighbours(ours) / neighbours(theirs) - 1) < 0.03


def test_blockwise_mask_makes_thousands_of_masks_in_one_call():
    """4096 masks of 14 x 14, hardly two alike, come from one call, by at most three times the calls of torch
    that two masks take (the longest sequence of blocks counts): nothing is done image by image."""
    torch.manual_seed(0)
    calls = {}
    for B in (2, 4096):
        events = []
        sys.setprofile(lambda frame, event, function: events.append(event))
        mask = data.blockwise_mask(B, 14, 75, rule="fill")
        sys.setprofile(None)
        calls[B] = events.count("c_call")
    assert mask.shape == (4096, 196) and mask.dtype == torch.bool and len(mask.unique(dim=0)) > 4080
    assert 64 < calls[2] < calls[4096] < 3 * calls[2]


@pytest.mark.parametrize("rule", ["end", "fill", "on"])
@pytest.mark.parametrize("masking", ["block", "random"])
def test_draw_masks_hides_the_asked_patches(masking, rule):
    """Exactly --num_masked patches of every image: the block masks above, of which those that end may hide
    fewer, or single patches, every place equally often and without more neighbours than chance has."""
    args = make_args(masking=masking, grid=8, num_masked=26, min_block=4)
    torch.manual_seed(0)
    masks = data.draw_masks(args, 3000, rule)
    assert masks.shape == (3000, 64) and masks.dtype == torch.bool
    exact = masks.sum(1) == 26
    assert (exact.any() and not exact.all() if (masking, rule) == ("block", "end") else exact.all())
    torch.manual_seed(0)
    if masking == "block":
        assert torch.equal(masks, data.blockwise_mask(3000, 8, 26, 4, rule))
    else:
        assert (masks.float().mean(0) - 26 / 64).abs().max() < 0.04     # its standard deviation is 0.009
        assert abs(neighbours(masks.view(-1, 8, 8)) / (112 * 26 / 64 * 25 / 63) - 1) < 0.02


# ---- pictures ----

def test_hidden_patches_are_grey():
    """`hide` shows the patches of a mask in grey, or other images there, and all other pixels as they are."""
    imgs, mask = noise_images(2, 12, 12), noise_images(2, 1, 3).flatten(1) < 0.5
    shown_imgs, pasted = data.hide(imgs, mask), data.hide(imgs, mask, 1 - imgs)
    for b, y, x in np.ndindex(2, 12, 12):
        hidden = mask[b, y // 4 * 3 + x // 4]
        assert torch.equal(pasted[b, :, y, x], 1 - imgs[b, :, y, x] if hidden else imgs[b, :, y, x])
        assert torch.equal(shown_imgs[b, :, y, x], torch.full((3,), 0.5) if hidden else imgs[b, :, y, x])


def test_patches_come_with_their_surroundings():
    """`patches_around` cuts every patch with a patch's width around it, in raster order, image after image,
    the pixels at the border repeated; a picture may be a single patch."""
    for side, p in ((12, 4), (12, 12)):
        imgs, g = noise_images(2, side, side), side // p
        found = data.patches_around(imgs, p, range(2 * g * g))
        assert found.shape == (2 * g * g, 3, 3 * p, 3 * p)
        repeated = [min(max(i, 0), side - 1) for i in range(-p, side + p)]
        for n, (b, row, col) in enumerate(np.ndindex(2, g, g)):
            rows, cols = repeated[p * row:p * (row + 3)], repeated[p * col:p * (col + 3)]
            assert torch.equal(found[n], imgs[b][:, rows][:, :, cols])


@pytest.mark.parametrize("s", (16, 15))
def test_spectrum_of_cosines(s):
    """A cosine of k cycles a side, in any direction, is energy at k alone; two share it by the squares of
    their amplitudes; the mean of an image counts nowhere, nor does what lies above s / 2 cycles."""
    place = 2 * math.pi * torch.arange(s) / s

    def wave(rows, columns):
        return (rows * place[:, None] + columns * place).cos().expand(2, 3, s, s)
    for rows, columns, k in ((1, 0, 1), (0, 2, 2), (3, 4, 5), (7, 0, 7)):
        energy = data.spectrum(wave(rows, columns) + 5)
        assert energy.tolist() == pytest.approx([float(n == k) for n in range(1, s // 2 + 1)], abs=1e-5)
    found = data.spectrum(2 * wave(2, 0) + wave(0, 6) + 9 * wave(7, 7))
    assert found.tolist() == pytest.approx([0, 0.8, 0, 0, 0, 0.2] + [0] * (s // 2 - 6), abs=1e-5)


def test_plots_begin_at_one(tmp_path, monkeypatch):
    """Every line has its values at 1, 2, 3, ... and its label; the settings are those of the axes."""
    drawn = []
    monkeypatch.setattr(data, "save_atomically", lambda figure, path: drawn.append((figure, path)))
    data.save_plot(tmp_path / "x.png", {"a": torch.tensor([3.0, 4, 5]), "b": torch.ones(2)}, "o", ylabel="y")
    (figure, path), = drawn
    axes, = figure.axes
    assert [(line.get_label(), line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axes.lines] \
        == [("a", [1, 2, 3], [3, 4, 5]), ("b", [1, 2], [1, 1])]
    assert path.name == "x.png" and axes.get_ylabel() == "y" and len(axes.get_legend().get_texts()) == 2


# ---- monitors ----

def test_effective_rank_of_known_singular_values():
    """exp of the entropy of the singular values' shares: of 4, 2, 1, 1, of equal ones, of equal features;
    features that are no numbers count as zeros."""
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(50, 4))
    right, _ = torch.linalg.qr(torch.randn(6, 4))
    x = left * torch.tensor([4.0, 2, 1, 1]) @ right.T * 7
    entropy = -sum(p * math.log(p) for p in (0.5, 0.25, 0.125, 0.125))
    assert data.effective_rank(x) == pytest.approx(math.exp(entropy), rel=1e-4)
    assert data.effective_rank(torch.eye(5).repeat(3, 1)) == pytest.approx(5)
    assert data.effective_rank(torch.randn(128).expand(500, 128)) == pytest.approx(1, abs=1e-3)
    assert data.effective_rank(torch.full((9, 4), math.nan)) == 1
    assert data.effective_rank(torch.cat([x, torch.full((1, 6), math.inf)])) == data.effective_rank(x)


def test_histogram_by_hand():
    """How often each code occurs in each image, one code after the other."""
    ids = torch.tensor([[0, 3, 3, 1], [2, 2, 2, 2]])
    assert data.histogram(ids, 5).tolist() == [[1, 1, 0, 2, 0], [0, 0, 4, 0, 0]]


# ---- sets: shapes and CIFAR ----

@pytest.mark.parametrize("size", [8, 17, 32])
def test_shapes_are_reproducible_and_balanced(size):
    """The same seed draws the same pictures, another seed others; ten classes equally often, at any size."""
    imgs, labels = data.draw_shapes(620, size, seed=3)
    again, other = data.draw_shapes(620, size, seed=3), data.draw_shapes(620, size, seed=4)
    assert imgs.shape == (620, 3, size, size) and imgs.dtype == torch.uint8
    assert torch.equal(imgs, again[0]) and torch.equal(labels, again[1]) and not torch.equal(imgs, other[0])
    assert labels.bincount().tolist() == [62] * 10 and imgs.float().flatten(1).std(1).min() > 5


def test_load_sets_of_shapes():
    """--data shapes gives training and validation images that differ, with the training images' mean and
    std."""
    train, val = data.load_sets(make_args(img_size=8))
    assert (len(train), len(val)) == (5000, 1000) and train.classes == val.classes == list(data.SHAPES)
    assert not torch.equal(train.imgs[:1000], val.imgs) and (val.mean, val.std) == (train.mean, train.std)
    pixels = (train.imgs.double() / 255).transpose(0, 1).flatten(1)
    assert np.allclose(train.mean, pixels.mean(1)) and np.allclose(train.std, pixels.std(1), rtol=1e-4)


def test_holdout_stands_in_for_the_validation_set():
    """--holdout n parts the training images in two, the same way for every seed, and never shows the
    validation set."""
    whole = data.load_sets(make_args(img_size=8))[0]
    train, val = data.load_sets(make_args(img_size=8, holdout=700))
    again = data.load_sets(make_args(img_size=8, holdout=700, seed=5))[1]
    assert (len(train), len(val)) == (4300, 700) and torch.equal(val.imgs, again.imgs)
    parts = torch.cat([train.imgs, val.imgs]).flatten(1).long()
    key = torch.randint(1 << 40, (parts.shape[1],))             # a random number for each picture
    assert torch.equal((parts @ key).sort()[0], (whole.imgs.flatten(1).long() @ key).sort()[0])
    assert val.labels.bincount().min() > 40


@pytest.mark.parametrize("holdout", [5000, 9999, -1])
def test_holdout_must_leave_training_images(holdout, capsys):
    """A holdout as large as the training set, or negative, ends in one sentence."""
    assert "--holdout" in said(capsys, data.load_sets, make_args(img_size=8, holdout=holdout))


CIFAR_FOLDER = {("cifar10", True): "cifar-10-batches-bin", ("cifar10", False): "cifar-10-batches-py",
                ("cifar100", True): "cifar-100-binary", ("cifar100", False): "cifar-100-python"}


def write_cifar(root, name, binary):
    """A folder in one of CIFAR's four layouts. Pixel 0 is 10 in red, the file's number in green, the label in
    blue; pixel 1, to the right of it, is 99 in red."""
    folder, ten = root / CIFAR_FOLDER[name, binary], name == "cifar10"
    folder.mkdir(parents=True)
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
    for number, file in enumerate(files):
        n = 50_000 if file == "train" else 10_000
        label = (np.arange(n) * 3 % (10 if ten else 100)).astype(np.uint8)
        pixels = np.zeros((n, 3072), np.uint8)
        pixels[:, 0], pixels[:, 1], pixels[:, 1024], pixels[:, 2048] = 10, 99, number, label
        labels = [label] if ten else [label // 5, label]        # coarse before fine
        if binary:
            np.hstack([*(v[:, None] for v in labels), pixels]).tofile(folder / f"{file}.bin")
        else:
            names = [b"labels"] if ten else [b"coarse_labels", b"fine_labels"]
            batch = {b"data": pixels} | {k: v.tolist() for k, v in zip(names, labels)}
            (folder / file).write_bytes(pickle.dumps(batch, protocol=2))
    classes = [f"kind{k}" for k in range(10 if ten else 100)]
    if binary:
        path = folder / ("batches.meta.txt" if ten else "fine_label_names.txt")
        path.write_text("\n".join(classes) + "\n\n")
    else:
        content = {b"label_names" if ten else b"fine_label_names": [c.encode() for c in classes]}
        (folder / ("batches.meta" if ten else "meta")).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def described(path, folder, *hosts):
    """The Archive entry of a file that lies at `path`."""
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    return data.Archive(path.name, path.stat().st_size, md5, folder, hosts)


@pytest.fixture
def large_path(tmp_path):
    """A temporary folder that is emptied at once: the fake CIFAR files are as large as the true ones."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name, binary, packed", [("cifar10", True, True), ("cifar10", False, False),
                                                  ("cifar100", True, False), ("cifar100", False, True)])
def test_cifar_in_both_layouts(name, binary, packed, large_path, monkeypatch):
    """Binary and pickled CIFAR-10 and -100, as folder or archive: planes, rows, fine labels, class names,
    files in order."""
    folder = write_cifar(large_path, name, binary)
    if packed:
        path = large_path / f"{folder.name}.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            archive.add(folder, folder.name)
        shutil.rmtree(folder)
        entries = list(data.ARCHIVES[name])
        entries[0 if binary else 1] = described(path, folder.name)
        entries[1 if binary else 0] = entries[1 if binary else 0]._replace(hosts=())
        monkeypatch.setitem(data.ARCHIVES, name, tuple(entries))
    train, val = data.load_sets(make_args(data=name, data_dir=str(large_path)))
    kinds = 10 if name == "cifar10" else 100
    assert train.classes == [f"kind{k}" for k in range(kinds)] and train.mean == data.STATS[name][0]
    for source, n in ((train, 50_000), (val, 10_000)):
        assert source.imgs.shape == (n, 3, 32, 32) and source.imgs.dtype == torch.uint8
        assert torch.equal(source.labels, torch.arange(n) * 3 % kinds)
        assert (source.imgs[:, 0, 0, 0] == 10).all() and (source.imgs[:, 0, 0, 1] == 99).all()
        assert torch.equal(source.imgs[:, 2, 0, 0].long(), source.labels)
    files = torch.arange(5).repeat_interleave(10_000) if name == "cifar10" else torch.zeros(50_000)
    assert torch.equal(train.imgs[:, 1, 0, 0].long(), files.long())
    assert (val.imgs[:, 1, 0, 0] == len(files.unique())).all()  # the file after the last training file


def reduced_to(call):
    """An object whose pickle makes the reader call `call`."""
    return type("Trap", (), {"__reduce__": lambda self: call})()


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    """A CIFAR batch that would call os.system when it is read ends in one sentence, and nothing is called."""
    folder, trace = tmp_path / "cifar-10-batches-py", tmp_path / "trace"
    folder.mkdir()
    content = {b"data": reduced_to((os.system, (f"touch {trace}",))), b"labels": []}
    (folder / "data_batch_1").write_bytes(pickle.dumps(content, protocol=2))
    text = said(capsys, data.read_cifar, "cifar10", tmp_path, True)
    assert "'system' object" in text and "data_batch_1" in text and not trace.exists()


@pytest.mark.parametrize("layout, file", [("cifar-10-batches-bin", "data_batch_1.bin"),
                                          ("cifar-10-batches-py", "data_batch_1")])
@pytest.mark.parametrize("content", [None, b"", bytes(5000), b"\xff" * 9, pickle.dumps({}), pickle.dumps([]),
                                     pickle.dumps({b"data": 3}), pickle.dumps({b"data": b"?"})[:-3]])
def test_damaged_cifar_files_are_named(layout, file, content, tmp_path, capsys):
    """A missing, empty, truncated or senseless batch file ends in one sentence with its name."""
    (tmp_path / layout).mkdir()
    if content is not None:
        (tmp_path / layout / file).write_bytes(content)
    text = said(capsys, data.read_cifar, "cifar10", tmp_path, True)
    assert str(tmp_path / layout / file) in text and "delete" in text


def test_a_missing_class_list_is_named(tmp_path, capsys):
    """CIFAR-10's pickled layout without its file of class names ends in one sentence."""
    (tmp_path / "cifar-10-batches-py").mkdir()
    batch = pickle.dumps({b"data": np.zeros((10_000, 3072), np.uint8), b"labels": [0] * 10_000}, protocol=4)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(batch)
    assert "batches.meta" in said(capsys, data.read_cifar, "cifar10", tmp_path, False)


# ---- sets: image files ----

def write_image(path, seed, size=(60, 44), mode="RGB", **options):
    """A smooth random picture as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    img = to_pillow(smooth_images(1, 64, seed)[0]).resize(size)
    img.convert(mode).save(path, **options)


def write_folders(root, classes=("cat", "dog"), each=6):
    """root/train/<class>/<n>.jpg and root/val/<class>/<n>.jpg"""
    for c, name in enumerate(classes):
        for i in range(each):
            write_image(root / "train" / name / f"{i}.jpg", 100 * c + i)
        for i in range(2):
            write_image(root / "val" / name / f"{i}.JPEG", 50 + 100 * c + i)
    return root


def test_tiny_imagenet_zip(tmp_path, monkeypatch):
    """A zip in Tiny-ImageNet's layout, one image greyscale, becomes tensors with labels in the order of the
    sorted wnids, and is decoded once only."""
    folder = tmp_path / "made" / "tiny-imagenet-200"
    for c, wnid in enumerate(("n02", "n01")):
        for i in range(3):
            mode = "L" if (c, i) == (1, 2) else "RGB"
            write_image(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 10 * c + i, (64, 64), mode)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("no image\n")
    for i in range(2):
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", 70 + i, (64, 64))
    lines = "val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n"
    (folder / "val" / "val_annotations.txt").write_text(lines)
    (folder / "wnids.txt").write_text("n02\nn01\n")
    path = Path(shutil.make_archive(str(tmp_path / "tiny-imagenet-200"), "zip", tmp_path / "made"))
    monkeypatch.setitem(data.ARCHIVES, "tiny-imagenet", (described(path, "tiny-imagenet-200"),))
    args = make_args(data="tiny-imagenet", data_dir=str(tmp_path))
    train, val = data.load_sets(args)
    assert train.classes == ["n01", "n02"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and val.labels.tolist() == [1, 0]
    assert train.imgs.shape == (6, 3, 64, 64) and val.imgs.shape == (2, 3, 64, 64)
    with Image.open(folder / "train/n01/images/n01_2.JPEG") as grey:
        wanted = torch.from_numpy(np.array(grey)).expand(3, 64, 64)
        assert grey.mode == "L" and torch.equal(train.imgs[2], wanted)
    with Image.open(folder / "val/images/val_0.JPEG") as img:
        assert torch.equal(val.imgs[0], torch.from_numpy(np.array(img)).permute(2, 0, 1))
    pixels = (train.imgs.double() / 255).transpose(0, 1).flatten(1)
    assert np.allclose(train.mean, pixels.mean(1)) and np.allclose(train.std, pixels.std(1), rtol=1e-3)
    shutil.rmtree(tmp_path / "tiny-imagenet-200")
    path.unlink()
    assert torch.equal(data.load_sets(args)[1].imgs, val.imgs)


def test_class_folders(tmp_path):
    """root/train/<class> and root/val/<class> become two sets with the same class numbers; other files are
    ignored."""
    root = write_folders(tmp_path / "pets")
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "README").write_text("no folder")
    shutil.rmtree(root / "val" / "cat")                         # a validation set may lack a class
    train, val = data.load_sets(make_args(data=str(root)))
    assert train.classes == ["cat", "dog"] and train.mean == data.STATS["imagenet"][0]
    assert train.labels.tolist() == [0] * 6 + [1] * 6 and val.labels.tolist() == [1, 1]
    assert [Path(p).name for p in train.imgs[:6]] == [f"{i}.jpg" for i in range(6)]
    held = data.load_sets(make_args(data=str(root), holdout=4))
    assert sorted(held[0].imgs + held[1].imgs) == sorted(train.imgs) and len(held[1]) == 4
    assert all(Path(p).parent.name == held[1].classes[y] for p, y in zip(held[1].imgs, held[1].labels))
    os.rename(root, tmp_path / "imagenet")
    assert len(data.load_sets(make_args(data="imagenet", data_dir=str(tmp_path)))[0]) == 12


@pytest.mark.parametrize("names", (("Train", "Val"), ("training", "validation"), ("test",)))
def test_splits_are_no_classes(tmp_path, capsys, names):
    """Folders that are called nearly train/ and val/ are not learned as two classes."""
    for name in names:
        write_image(tmp_path / "set" / name / "cat" / "0.png", 10, (8, 8))
    assert "which are no classes" in said(
        capsys, data.load_sets, make_args(data=str(tmp_path / "set"), holdout=1))


def test_a_class_that_the_holdout_leaves_empty(tmp_path, capsys):
    for name, count in (("cat", 1), ("dog", 9)):
        for i in range(count):
            write_image(tmp_path / "set" / name / f"{i}.png", i, (8, 8))
    data.load_sets(make_args(data=str(tmp_path / "set"), holdout=9))
    assert "no training image is left of " in capsys.readouterr().out


def test_plain_class_folders_need_a_holdout(tmp_path, capsys):
    """root/<class>/* alone works with --holdout, and without it the sentence proposes one."""
    root = write_folders(tmp_path) / "train"
    assert "--holdout 1 " in said(capsys, data.load_sets, make_args(data=str(root)))
    train, val = data.load_sets(make_args(data=str(root), holdout=3))
    assert (len(train), len(val)) == (9, 3) and not set(train.imgs) & set(val.imgs)


@pytest.mark.parametrize("damage, words", [
    (lambda root: [p.rename(root / "val" / f"{p.parent.name}{p.name}") for p in root.glob("val/*/*")] and
     [shutil.rmtree(root / "val" / c) for c in ("cat", "dog")], ["val is flat", "move each image into"]),
    (lambda root: [p.unlink() for p in root.glob("train/dog/*")], ["train/dog", "holds no images"]),
    (lambda root: [p.unlink() for p in root.glob("val/dog/*")], ["val/dog", "holds no images"]),
    (lambda root: (root / "val" / "cow").mkdir(), ["val/cow", "class that the training images do not have"]),
    (lambda root: shutil.rmtree(root / "val"), ["no folder", "val"]),
    (lambda root: shutil.rmtree(root / "train"), ["train"]),
    (lambda root: shutil.rmtree(root), ["no folder", "--data takes shapes"])])
def test_wrong_class_folders_are_named(damage, words, tmp_path, capsys):
    """A flat val, an empty or unknown class folder, no val, no folder: one sentence each that names the
    place."""
    root = write_folders(tmp_path / "pets", each=1)
    damage(root)
    text = said(capsys, data.load_sets, make_args(data=str(root)))
    assert all(word in text for word in words), text


# ---- download and unpack ----

class Server(http.server.BaseHTTPRequestHandler):
    """Files at /<manner>/<name>: ranges (knows Range), plain (does not), cut (breaks off half way), wrong
    (other content of the same length), page (an error page with status 200); any other manner is an error
    503."""
    files, asked = {}, []  # name -> bytes; (path, Range) of every request

    def do_GET(self):
        _, manner, name = self.path.split("/")
        Server.asked.append((self.path, self.headers["Range"]))
        content = Server.files[name]
        content = {"wrong": bytes(len(content)), "page": b"<html>sorry</html>"}.get(manner, content)
        if manner not in ("ranges", "plain", "cut", "wrong", "page"):
            return self.send_error(503)
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] and manner != "plain" else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:len(content) // 2 if manner == "cut" else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine -> its address; it runs in a thread until the test ends."""
    monkeypatch.setenv("no_proxy", "*")
    Server.files, Server.asked = {}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


CONTENT = random.Random(0).randbytes(100_000)


def offer(server, *manners):
    """An archive with CONTENT that the server offers in these manners, one address each."""
    Server.files["a.bin"] = CONTENT
    return data.Archive("a.bin", len(CONTENT), hashlib.md5(CONTENT).hexdigest(), "a",
                        tuple(f"{server}/{manner}/" for manner in manners))


def test_a_whole_download(server, tmp_path):
    """A file arrives whole, under its name only when it is complete, with one request for all of it."""
    path = data.fetch(offer(server, "ranges"), tmp_path)
    assert path == tmp_path / "a.bin" and path.read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["a.bin"] and Server.asked == [("/ranges/a.bin", None)]


def test_a_partial_download_is_resumed(server, tmp_path):
    """Of a file that is partly there, only the rest is asked for."""
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:70_000])
    assert data.fetch(offer(server, "ranges"), tmp_path).read_bytes() == CONTENT
    assert Server.asked == [("/ranges/a.bin", "bytes=70000-")]


def test_a_server_without_ranges_starts_again(server, tmp_path):
    """Where the server ignores the range, the partial file is replaced, not continued."""
    (tmp_path / "a.bin.part").write_bytes(CONTENT[:70_000])
    assert data.fetch(offer(server, "plain"), tmp_path).read_bytes() == CONTENT
    assert Server.asked == [("/plain/a.bin", "bytes=70000-")]


def test_a_complete_part_is_only_checked(server, tmp_path):
    """A run that was killed between the last byte and the check asks for nothing."""
    (tmp_path / "a.bin.part").write_bytes(CONTENT)
    assert data.fetch(offer(server, "ranges"), tmp_path).read_bytes() == CONTENT and Server.asked == []


@pytest.mark.parametrize("first", ["error", "wrong", "page"])
def test_the_next_address_is_tried(first, server, tmp_path, capsys):
    """After an error, other content or an error page, the next address gives the file, from its first
    byte."""
    assert data.fetch(offer(server, first, "ranges"), tmp_path).read_bytes() == CONTENT
    assert Server.asked == [(f"/{first}/a.bin", None), ("/ranges/a.bin", None)]
    assert f"/{first}/a.bin" in capsys.readouterr().err


def test_a_lost_connection_keeps_what_came(server, tmp_path, capsys):
    """When a connection breaks off, the next address, or the next run, goes on where it ended."""
    assert data.fetch(offer(server, "cut"), tmp_path) is None
    assert (tmp_path / "a.bin.part").read_bytes() == CONTENT[:50_000]
    (tmp_path / "a.bin.part").unlink()
    assert data.fetch(offer(server, "cut", "ranges"), tmp_path).read_bytes() == CONTENT
    assert Server.asked[1:] == [("/cut/a.bin", None), ("/ranges/a.bin", "bytes=50000-")]


def test_a_wrong_beginning_is_thrown_away(server, tmp_path, capsys):
    """A partial file of other content is found out by its md5, deleted, and the file fetched anew."""
    (tmp_path / "a.bin.part").write_bytes(bytes(1000))
    assert data.fetch(offer(server, "ranges", "ranges"), tmp_path).read_bytes() == CONTENT
    assert Server.asked == [("/ranges/a.bin", "bytes=1000-"), ("/ranges/a.bin", None)]
    assert "md5" in capsys.readouterr().err


def pack(path, entries):
    """A .tar.gz or .zip at `path` with the entries (name, bytes); bytes None makes a symbolic link to
    /etc/passwd."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries:
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz") as archive:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            member.size = len(content or b"")
            archive.addfile(member, io.BytesIO(content or b""))
    return path


def test_no_address_gives_one_sentence(server, tmp_path, monkeypatch, capsys):
    """When all addresses fail, the sentence names an address, the place for the file, and --data shapes."""
    archive = offer(server, "error", "wrong")
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (archive,))
    text = said(capsys, data.load_sets, make_args(data="cifar10", data_dir=str(tmp_path / "sets")))
    assert all(part in text for part in (f"{server}/error/a.bin", f"{tmp_path}/sets/a.bin", "--data shapes"))
    assert os.listdir(tmp_path / "sets") == []


def test_find_set_downloads_unpacks_and_keeps(server, tmp_path, monkeypatch):
    """A set is downloaded and unpacked once; the second time its folder is enough."""
    path = pack(tmp_path / "a.tar.gz", [("set/one.bin", b"1"), ("set/deep/two.bin", b"2")])
    Server.files["a.tar.gz"] = path.read_bytes()
    archive = described(path, "set", f"{server}/ranges/")
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (archive,))
    folder, found = data.find_set("cifar10", tmp_path / "sets")
    assert found is archive and (folder / "one.bin").read_bytes() == b"1"
    assert (folder / "deep" / "two.bin").read_bytes() == b"2"
    assert sorted(os.listdir(tmp_path / "sets")) == ["a.tar.gz", "set"]
    assert data.find_set("cifar10", tmp_path / "sets")[0] == folder and len(Server.asked) == 1


def test_an_archive_that_lies_there_comes_before_any_download(server, tmp_path, monkeypatch):
    """Someone who has only the second layout's archive does not wait for the download of the first."""
    path = pack(tmp_path / "second.tar.gz", [("second/one.bin", b"1")])
    first = offer(server, "ranges")
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (first, described(path, "second")))
    assert data.find_set("cifar10", tmp_path)[0] == tmp_path / "second" and Server.asked == []


def test_other_ranks_wait_for_the_first(tmp_path, monkeypatch):
    """Rank 1 of a machine neither downloads nor unpacks: it waits until the folder is there."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (data.Archive("a.tar.gz", 1, "", "set", ()),))
    threading.Timer(0.3, (tmp_path / "set").mkdir).start()
    start = time.monotonic()
    assert data.find_set("cifar10", tmp_path)[0] == tmp_path / "set" and time.monotonic() - start > 0.25


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_a_damaged_archive_is_refused(damage, tmp_path, monkeypatch, capsys):
    """A truncated archive, or one of a wrong md5, is refused in one sentence before anything is unpacked."""
    path = pack(tmp_path / "a.tar.gz", [("set/one.bin", CONTENT)])
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (described(path, "set"),))
    path.write_bytes(damage(path.read_bytes()))
    text = said(capsys, data.find_set, "cifar10", tmp_path)
    assert str(path) in text and ("bytes" in text or "md5" in text) and "delete" in text
    assert os.listdir(tmp_path) == ["a.tar.gz"]


@pytest.mark.parametrize("name, content", [("../evil.txt", b"!"), ("set/../../evil.txt", b"!"),
                                           ("set/link", None)])
def test_a_tar_that_leaves_its_folder_is_refused(name, content, tmp_path, capsys):
    """Entries with ../ and links end in one sentence, with nothing unpacked anywhere."""
    file = "a.tar.gz"
    (tmp_path / "sets").mkdir()
    path = pack(tmp_path / "sets" / file, [("set/one.bin", b"1"), (name, content)])
    text = said(capsys, data.unpack, path, tmp_path / "sets" / "set")
    assert repr(name) in text and str(path) in text
    assert os.listdir(tmp_path / "sets") == [file] and os.listdir(tmp_path) == ["sets"]


@pytest.mark.parametrize("file, name", [
    *(("a.zip", name) for name in ("../evil.txt", "set/../../evil.txt", "/tmp/evil.txt")),
    ("a.tar.gz", "/tmp/evil.txt")])
def test_what_leaves_its_folder_is_not_unpacked(file, name, tmp_path):
    """Of a zip the entries with ../, and of both kinds those with absolute names, are left out: the set is
    whole, and nothing lies beside it."""
    (tmp_path / "sets").mkdir()
    path = pack(tmp_path / "sets" / file, [("set/one.bin", b"1"), (name, b"!")])
    data.unpack(path, tmp_path / "sets" / "set")
    assert sorted(os.listdir(tmp_path / "sets")) == [file, "set"] and os.listdir(tmp_path) == ["sets"]
    assert os.listdir(tmp_path / "sets" / "set") == ["one.bin"] and not Path("/tmp/evil.txt").exists()


@pytest.mark.parametrize("file", ["a.tar.gz", "a.zip"])
@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b[:300] + bytes(500) + b[800:],
                                    lambda b: b"no"])
def test_an_archive_that_cannot_be_read_is_named(file, damage, tmp_path, capsys):
    """Whatever is broken inside an archive, unpacking ends in one sentence and leaves no folder."""
    text = repr(CONTENT[:10_000]).encode()                      # so that there is something to compress
    path = pack(tmp_path / file, [("set/one.bin", text), ("set/two.bin", text[::-1])])
    path.write_bytes(damage(path.read_bytes()))
    assert "delete it" in said(capsys, data.unpack, path, tmp_path / "set")
    assert os.listdir(tmp_path) == [file]


def test_an_archive_of_another_folder_is_named(tmp_path, capsys):
    """An archive whose folder has another name than expected ends in one sentence."""
    path = pack(tmp_path / "a.tar.gz", [("other/one.bin", b"1")])
    assert str(path) in said(capsys, data.unpack, path, tmp_path / "set")


def test_a_killed_unpack_is_done_again(tmp_path, monkeypatch):
    """What a killed unpacking left behind neither counts as the set nor gets into it."""
    path = pack(tmp_path / "a.tar.gz", [("set/one.bin", b"whole")])
    monkeypatch.setitem(data.ARCHIVES, "cifar10", (described(path, "set"),))
    (tmp_path / "set.unpacking" / "set").mkdir(parents=True)
    (tmp_path / "set.unpacking" / "set" / "one.bin").write_bytes(b"wh")
    (tmp_path / "set.unpacking" / "set" / "old.bin").write_bytes(b"")
    folder, _ = data.find_set("cifar10", tmp_path)
    assert os.listdir(folder) == ["one.bin"] and (folder / "one.bin").read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == ["a.tar.gz", "set"]


# ---- streamed files ----

def test_crop_file_is_pillows_crop_and_resize(tmp_path):
    """Without anything to shrink in the decoder, a streamed crop is Pillow's bicubic resize of its box, to
    two levels of 255."""
    write_image(tmp_path / "a.png", 1, (50, 40))
    view = data.View(24, scale=(0.3, 1.0))
    crops = data.crop_file(tmp_path / "a.png", [view, view], random.Random(0))
    assert len(crops) == 2
    rng = random.Random(0)
    for crop in crops:
        top, left, h, w = data.random_box(40, 50, view.scale, view.ratio, rng)
        with Image.open(tmp_path / "a.png") as img:
            wanted = img.resize((24, 24), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        difference = (crop.int() - torch.from_numpy(np.array(wanted)).permute(2, 0, 1).int()).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.3


def test_crop_file_shows_the_centre_in_evaluation(tmp_path):
    """Without scale the crop is the central square of 7/8 of the shorter side: 224 of 256."""
    write_image(tmp_path / "a.png", 1, (80, 64))
    (crop,) = data.crop_file(tmp_path / "a.png", [data.View(56)])
    with Image.open(tmp_path / "a.png") as img:
        assert torch.equal(crop, torch.from_numpy(np.array(img.crop((12, 4, 68, 60)))).permute(2, 0, 1))


@pytest.mark.parametrize("W, H", [(500, 375), (401, 533), (1023, 767)])
def test_draft_is_close_to_the_full_decode(W, H, tmp_path, monkeypatch):
    """Letting the JPEG decoder shrink changes a crop by little, shrinks indeed, and never below the size of
    the crop."""
    write_image(tmp_path / "a.jpg", 2, (W, H), quality=95)
    views, decoded = [data.View(48, scale=(0.5, 1.0))] * 3 + [data.View(80)], []
    draft = JpegImageFile.draft

    def noting(self, mode, size):
        result = draft(self, mode, size)
        decoded.append(self.size)
        return result

    monkeypatch.setattr(JpegImageFile, "draft", noting)
    small = data.crop_file(tmp_path / "a.jpg", views, random.Random(0))
    assert len(decoded) == 1 and decoded[0][0] <= W / 2 + 1 and min(decoded[0]) * 0.875 >= 80
    monkeypatch.setattr(JpegImageFile, "draft", lambda self, mode, size: None)
    for crop, full in zip(small, data.crop_file(tmp_path / "a.jpg", views, random.Random(0))):
        apart = (crop.float() - full.float()).abs()
        assert apart.mean() < 0.8 and apart.max() < 6


@pytest.mark.parametrize("mode, file", [("L", "a.jpg"), ("CMYK", "a.jpg"), ("P", "a.png"), ("RGBA", "a.png"),
                                        ("1", "a.png")])
def test_every_kind_of_image_becomes_rgb(mode, file, tmp_path):
    """Grey, CMYK, palette, transparent and black-and-white files come as three channels, whole or cropped."""
    write_image(tmp_path / file, 3, mode=mode)
    (crop,) = data.crop_file(tmp_path / file, [data.View(32, scale=(0.5, 1.0))])
    assert crop.shape == (3, 32, 32) and crop.dtype == torch.uint8
    with Image.open(tmp_path / file) as img:
        wanted = np.array(img.convert("RGB"))
    assert torch.equal(data.open_rgb(tmp_path / file), torch.from_numpy(wanted).permute(2, 0, 1))


AUGMENTED = [data.View(16, count=2, scale=(0.3, 1.0), flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1)),
             data.View(8, scale=(0.1, 0.3))]


class Net:
    """In the place of a network under DDP: notes when the ranks do not add up their gradients."""
    alone = False

    @contextlib.contextmanager
    def no_sync(self):
        self.alone = True
        yield
        self.alone = False


def all_batches(loader, start=0):
    """{step: [(views, labels) of each part]}, with the number that the step's own code would draw next."""
    return {step: [(*part, torch.rand(1)) for part in parts] for step, parts in loader.steps(start, Net())}


def numbers(loader, step):
    """Numbers of the images of a step, taken in one part on one rank."""
    return list(loader.order(0))[step][0]


def assert_same(some, others):
    """The batches of the steps in `some` are bitwise those of `others`."""
    assert some
    for step, parts in some.items():
        for part, other in zip(parts, others[step], strict=True):
            assert torch.equal(part[1], other[1]) and torch.equal(part[2], other[2])
            assert all(torch.equal(a, b) for a, b in zip(part[0], other[0], strict=True))


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    """Twelve JPEG files of two classes, one of them greyscale, with validation images."""
    root = write_folders(tmp_path_factory.mktemp("pets"))
    write_image(root / "train" / "dog" / "5.jpg", 7, mode="L")
    return root


def test_streamed_batches_do_not_depend_on_the_workers(pets):
    """The same seed, epoch and image give the same crops, flips and colours with no worker and with two."""
    args = make_args(data=str(pets), batch_size=4)
    source = data.load_sets(args)[0]
    alone = all_batches(data.Loader(args, source, AUGMENTED))
    shapes = [tuple(v.shape) for v in alone[0][0][0]]
    assert shapes == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] and len(alone) == 6
    args.num_workers = 2
    assert_same(all_batches(data.Loader(args, source, AUGMENTED)), alone)
    args.seed = 1
    assert not torch.equal(all_batches(data.Loader(args, source, AUGMENTED))[0][0][0][0], alone[0][0][0][0])


def test_streamed_labels_belong_to_their_images(pets):
    """Each streamed image, centred and undistorted, comes with the label of its own folder; evaluation
    keeps the order."""
    args = make_args(data=str(pets))
    source = data.load_sets(args)[0]
    batches = list(data.Loader(args, source, [data.View(16)], train=False))
    imgs, labels = torch.cat([views[0] for views, _ in batches]), torch.cat([y for _, y in batches])
    wanted = torch.stack([data.crop_file(p, [data.View(16)])[0] for p in source.imgs]) / 255
    assert torch.equal(labels, source.labels)
    torch.testing.assert_close(data.to_pixels(imgs, source), wanted, atol=1e-5, rtol=0)
    for ((imgs,), labels, _), in all_batches(data.Loader(args, source, [data.View(16)])).values():
        for img, label in zip(data.to_pixels(imgs, source), labels):
            nearest = (img - wanted).abs().flatten(1).amax(1).argmin()
            assert label == source.labels[nearest]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_gives_an_image_new_crops(workers, pets):
    """The crop of an image depends on the epoch, and on nothing else but the seed: not on its place in the
    batch."""
    args = make_args(data=str(pets), batch_size=12, epochs=3, num_workers=workers)
    source = data.load_sets(args)[0]
    view = [data.View(16, scale=(0.2, 0.6))]
    loader = data.Loader(args, source, view)
    epochs = [views[0][numbers(loader, step).argsort()]      # in the order of the files
              for step, ((views, _, _),) in all_batches(loader).items()]
    assert len(epochs) == 3 and (epochs[0] != epochs[1]).flatten(1).any(1).all()
    half = make_args(data=str(pets), batch_size=6, epochs=1, num_workers=workers)
    loader = data.Loader(half, source, view)
    halves = torch.cat([parts[0][0][0] for parts in all_batches(loader).values()])
    order = torch.cat([numbers(loader, 0), numbers(loader, 1)])
    assert torch.equal(halves[order.argsort()], epochs[0])


@pytest.mark.parametrize("content", [b"", b"no image at all", "truncated"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_jpeg_is_replaced_in_training(content, workers, tmp_path, capfd):
    """In training a file that cannot be read is named once, counted, and replaced by another, a new one in
    every epoch and the same after a resume; the rest is as ever."""
    root = write_folders(tmp_path)
    args = make_args(data=str(root), batch_size=6, num_workers=workers, epochs=8)
    source = data.load_sets(args)[0]
    view = [data.View(16)]
    whole = all_batches(data.Loader(args, source, view))
    broken = Path(source.imgs[2])
    broken.write_bytes(broken.read_bytes()[:400] if content == "truncated" else content)
    loader = data.Loader(args, source, view)
    damaged = all_batches(loader)
    text = capfd.readouterr().err
    assert loader.skipped == {str(broken)} and text.count(str(broken)) == 1 and "(1 so far)" in text
    for step, ((views, labels, _),) in damaged.items():
        order = numbers(loader, step)
        for img, wanted, i in zip(views[0], whole[step][0][0][0], order.tolist()):
            assert torch.equal(img, wanted) == (i != 2)
    own = {i: img for step in (0, 1) for i, img in zip(numbers(loader, step).tolist(), whole[step][0][0][0])}
    others = [next(i for i in own if torch.equal(img, own[i])) for step, ((views, _, _),) in damaged.items()
              for img, n in zip(views[0], numbers(loader, step).tolist()) if n == 2]
    assert len(others) == 8 and 2 not in others and len(set(others)) > 3
    assert_same(all_batches(data.Loader(args, source, view), 7), damaged)


def test_a_replacement_brings_its_own_label(tmp_path, capfd):
    """The label of a replaced image is that of the image which is shown in its place."""
    root = write_folders(tmp_path)
    args = make_args(data=str(root), batch_size=12, epochs=20)
    source = data.load_sets(args)[0]
    wanted = [data.crop_file(path, [data.View(16)])[0] / 255 for path in source.imgs]
    Path(source.imgs[5]).write_bytes(b"")
    seen = set()
    loader = data.Loader(args, source, [data.View(16)])
    for step, ((views, labels, _),) in all_batches(loader).items():
        place = numbers(loader, step).tolist().index(5)
        img = data.to_pixels(views[0][place:place + 1], source)[0]
        assert labels[place] == source.labels[min(range(12), key=lambda i: (img - wanted[i]).abs().max())]
        seen.add(int(labels[place]))
    assert seen == {0, 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_jpeg_ends_an_evaluation(workers, tmp_path, capsys):
    """Accuracy is never measured on other images than asked: an unreadable one ends in one sentence."""
    root = write_folders(tmp_path, each=1)
    args = make_args(data=str(root), num_workers=workers)
    val = data.load_sets(args)[1]
    Path(val.imgs[3]).write_bytes(b"")
    assert val.imgs[3] in said(capsys, lambda: list(data.Loader(args, val, [data.View(16)], train=False)))


def test_an_unreadable_small_image_is_named(tmp_path, capsys):
    """Reading pictures ends in one sentence with the names of all that cannot be read."""
    paths = [tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / "c.jpg"]
    paths[0].write_bytes(b"no image")
    write_image(paths[1], 1)
    text = said(capsys, data.read_all, data.open_rgb, paths)
    assert [str(path) in text for path in paths] == [True, False, True]


# ---- loader ----

def numbered(n):
    """A set whose image i is a picture of the number i."""
    imgs = torch.arange(n)[:, None, None, None].expand(n, 3, 8, 8).byte()
    return data.Images(imgs, torch.arange(n), list(range(n)), (0.0,) * 3, (1.0,) * 3)


def shown(loader, start=0):
    """{step: [numbers of the images of each part]}, read from the pixels and compared with the labels."""
    result = {}
    for step, parts in loader.steps(start, Net()):
        result[step] = []
        for (imgs,), labels in parts:
            assert torch.equal((imgs[:, 0, 0, 0] * 255).round().long(), labels)
            result[step].append(labels.tolist())
    return result


def test_an_epoch_is_a_random_order_of_the_images():
    """Within an epoch no image comes twice, what is left over changes with the epoch, and the order with
    the seed."""
    args, source = make_args(batch_size=8, epochs=3), numbered(50)
    loader = data.Loader(args, source, [data.View(8)])
    steps = shown(loader)
    assert (loader.epoch_steps, loader.total_steps, list(steps)) == (6, 18, list(range(18)))
    epochs = [sum((steps[s][0] for s in range(6 * e, 6 * e + 6)), []) for e in range(3)]
    assert all(len(set(e)) == 48 and e != sorted(e) for e in epochs) and epochs[0] != epochs[1]
    assert len(set(map(frozenset, epochs))) == 3
    other = shown(data.Loader(make_args(batch_size=8, epochs=3, seed=1), source, [data.View(8)]))
    assert other != steps and shown(data.Loader(args, source, [data.View(8)])) == steps


@pytest.mark.parametrize("accum, ranks", [(4, 1), (1, 2), (2, 2), (1, 4)])
def test_parts_and_ranks_share_out_the_same_batch(accum, ranks, monkeypatch):
    """Accumulation parts and ranks, of equal size, together hold the batch of a single process, nothing
    twice."""
    source = numbered(50)
    alone = shown(data.Loader(make_args(), source, [data.View(8)]))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    shares = []
    for r in range(ranks):
        monkeypatch.setenv("RANK", str(r))
        shares.append(shown(data.Loader(make_args(accum_steps=accum), source, [data.View(8)])))
    for step, ((batch),) in alone.items():
        parts = [part for share in shares for part in share[step]]
        assert [len(part) for part in parts] == [8 // accum // ranks] * (accum * ranks)
        assert sorted(sum(parts, [])) == sorted(batch)


@pytest.mark.parametrize("kind", ["in memory", "streamed", "streamed by 2"])
@pytest.mark.parametrize("start", [1, 3, 4])
def test_steps_start_anywhere(kind, start, pets):
    """From any step on, in the middle of an epoch or at its start, the views, labels and further random
    numbers are bitwise those of an uninterrupted run."""
    args = make_args(data="shapes" if kind == "in memory" else str(pets), batch_size=4, accum_steps=2,
                     num_workers=2 if "2" in kind else 0)
    source = numbered(13) if kind == "in memory" else data.load_sets(args)[0]
    whole = all_batches(data.Loader(args, source, AUGMENTED))
    torch.manual_seed(123)
    torch.rand(7)                                               # whatever was drawn before does not matter
    rest = all_batches(data.Loader(args, source, AUGMENTED), start)
    assert list(rest) == list(range(start, 6))
    assert_same(rest, whole)


def test_steps_draw_anew_in_every_step_and_rank(monkeypatch):
    """Random numbers differ between steps and between ranks."""
    loader = data.Loader(make_args(), numbered(40), [data.View(8)])
    monkeypatch.setenv("WORLD_SIZE", "2")
    draws = [parts[0][2].item() for parts in all_batches(loader).values()]
    monkeypatch.setenv("RANK", "1")
    draws += [parts[0][2].item() for parts in all_batches(loader).values()]
    assert len(set(draws)) == 20


def test_max_steps_and_large_batches(capsys):
    """--max_steps ends early, never late; a batch larger than the set is cut to it, with its learning rate,
    to what the parts divide; fewer images than parts end in one sentence."""
    assert data.Loader(make_args(max_steps=3), numbered(40), [data.View(8)]).total_steps == 3
    assert data.Loader(make_args(max_steps=99), numbered(40), [data.View(8)]).total_steps == 10
    args = make_args(batch_size=63, accum_steps=3, blr=0.256, lr=0.063)
    assert data.Loader(args, numbered(40), [data.View(8)]).epoch_steps == 1
    assert args.batch_size == 39 and args.lr == pytest.approx(0.039)
    assert "a batch is 39 images, not 63" in capsys.readouterr().out
    text = said(capsys, data.Loader, make_args(batch_size=64, accum_steps=64), numbered(40), [data.View(8)])
    assert "40 training images are too few for 64 parts of a batch" in text


@pytest.mark.parametrize("n, ranks", [(1203, 1), (1203, 2), (7, 4)])
def test_evaluation_shows_every_image_once(n, ranks, monkeypatch):
    """Over all ranks every image comes exactly once, whatever the ranks do not divide, each rank's in
    order."""
    source, seen = numbered(n), []
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for r in range(ranks):
        monkeypatch.setenv("RANK", str(r))
        loader = data.Loader(make_args(batch_size=64), source, [data.View(8)], train=False)
        mine = torch.cat([y for _, y in loader]).tolist()
        assert mine == sorted(mine)
        seen += mine
    assert sorted(seen) == list(range(n))


def test_evaluation_of_files_over_ranks(pets, monkeypatch):
    """The same for streamed files: two ranks see every image once."""
    args = make_args(data=str(pets), num_workers=1)
    source, seen = data.load_sets(args)[0], []
    source.labels = torch.arange(12)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for r in range(2):
        monkeypatch.setenv("RANK", str(r))
        seen += torch.cat([y for _, y in data.Loader(args, source, [data.View(16)], train=False)]).tolist()
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize("ranks, wanted", [(1, [False] * 4), (2, [True, True, True, False])])
def test_the_ranks_meet_in_the_last_part(ranks, wanted, monkeypatch):
    """Under torchrun the forward and backward passes of all parts but the last lie in net.no_sync(), those of
    the last do not; a single process never calls it."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    net, loader = Net(), data.Loader(make_args(accum_steps=4), numbered(16), [data.View(8)])
    found = [[net.alone for _ in parts] + [net.alone] for _, parts in loader.steps(0, net)]
    assert found == [[*wanted, False]] * 4


# ---- flags and recipes ----

COMMON = data.merge(*data.COMMON.values())
SCRIPTS = {"data": (), "mae": (mae.RECIPE,), "beit": (beit.RECIPE,), "cae": (cae.RECIPE,),
           "dvae": (dvae.RECIPE,), "ibot": (ibot.RECIPE,),
           "beit_v2 tokenizer": (beit_v2.SHARED, beit_v2.PRETRAIN, beit_v2.TOKENIZER),
           "beit_v2 pretrain": (beit_v2.SHARED, beit_v2.TOKENIZER, beit_v2.PRETRAIN),
           **{f"vit {mode}": tables for mode, tables in vit.RECIPES.items()}}


def parse(words, *tables):
    """The flags of a script for a command line in one string."""
    return data.parse_args("A script.", *tables, words=words.split(), folder="out/test")


def cells_of(values):
    """All single values of a row, of every column and model."""
    columns = values if isinstance(values, tuple) else (values,)
    return [v for cell in columns for v in (cell.values() if isinstance(cell, dict) else [cell])]


def in_range(value, allowed=None):
    """Is a default one of the choices, or in the interval, as a typed value must be?"""
    if isinstance(allowed, tuple):
        return value in allowed
    if isinstance(value, list):
        return len(value) > 0 and all(in_range(v, allowed) for v in value)
    if type(value) in (int, float):                             # every number has an interval
        return data.within(type(value), allowed)(repr(value)) == value
    return allowed is None


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_of_every_recipe_are_sound(script):
    """All values of a row, over columns, models and the tables that it stands in, have one type; models are
    those of --model; every default that a run can get lies in its own range; its patches fill the image."""
    tables, types = (*data.COMMON.values(), *SCRIPTS[script]), {}
    for i in range(len(tables)):
        for name, (values, meaning, *allowed) in data.merge(*tables[:i + 1]).items():
            assert isinstance(meaning, str) and len(allowed) <= 1, name
            assert not isinstance(values, tuple) or len(values) == len(data.COLUMNS), name
            for cell in values if isinstance(values, tuple) else [values]:
                assert not isinstance(cell, dict) or cell and set(cell) <= set(data.MODELS), name
            cells = cells_of(values)
            types.setdefault(name, set()).update(map(type, cells))
            kind = str if name in ("images", "paint") else float
            assert all(type(v) is kind for cell in cells if isinstance(cell, list) for v in cell), name
            if name not in ("recipe", "img_size", "patch_size"):    # parse_args sets these itself, see below
                assert all(in_range(cell, *allowed) for cell in cells), name
    assert {name: kinds for name, kinds in types.items() if len(kinds) > 1} == {}
    rows = data.merge(*tables)
    for column, source in zip(data.COLUMNS, ("shapes", "cifar100", "tiny-imagenet", "imagenet")):
        args = parse(f"--recipe {column} --data {source}", *SCRIPTS[script])
        assert all(in_range(args.flags[name], *row[2:]) for name, row in rows.items())
        assert args.grid * args.patch_size == args.img_size and args.img_size == data.SIDES[source]


def ends_of(kind, interval):
    """Texts at both ends of an interval: those that lie just inside, and those just outside."""
    low, high = map(float, interval[1:-1].split(","))

    def beside(end, sign):
        return int(end) + sign if kind is int else math.nextafter(end, sign * math.inf)

    inside, outside = [], []
    for end, closed, sign in ((low, interval[0] == "[", -1), (high, interval[-1] == "]", 1)):
        if math.isinf(end):
            inside.append(repr(kind(10 ** 15)))
        else:
            inside.append(repr(kind(end) if closed else beside(end, -sign)))
            outside.append(repr(beside(end, sign) if closed else kind(end)))
    return inside, outside


@pytest.mark.parametrize("script", SCRIPTS)
def test_values_out_of_range_are_refused(script, capsys):
    """Every number of a script is taken at the ends of its interval, and refused just outside of it and as
    nan or inf, in one sentence with the flag's name; words are taken from the choices only."""
    for name, (values, *row) in data.merge(*data.COMMON.values(), *SCRIPTS[script]).items():
        if script != "data" and row == list(COMMON.get(name, ())[1:]) or len(row) == 1:
            continue                                            # these flags are those of "data"; free words
        default, allowed = cells_of(values)[0], row[1]
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.error = lambda message: data.stop(f"{message} (see --help)")
        data.add_flag(parser, name, default, *row)
        several, kind = isinstance(default, list), type(default[0] if isinstance(default, list) else default)
        inside, outside = (allowed, ["", "x"]) if isinstance(allowed, tuple) else ends_of(kind, allowed)
        for text in inside:
            value = getattr(parser.parse_args([f"--{name}={text}"]), name)
            assert value == ([kind(text)] if several else kind(text)) and type(value) is type(default)
        for text in [*outside, "nan", "inf", "-inf", *["0.5"] * (kind is int)]:
            wrong = [f"--{name}", inside[0], text] if several and text[0] != "-" else [f"--{name}={text}"]
            told = said(capsys, parser.parse_args, wrong)
            assert f"argument --{name}: " in told and text in told
            assert f" must lie in {allowed} (see --help)" in told or "invalid " in told


@pytest.mark.parametrize("words, recipe, why, pixels, model", [
    ("", "small", "images of about 32 px", (32, 4), "tiny"),
    ("--data cifar100", "small", "images of about 32 px", (32, 4), "tiny"),
    ("--data tiny-imagenet", "small", "images of about 64 px", (64, 8), "tiny"),
    ("--data imagenet", "imagenet", "images of about 224 px", (224, 16), "base"),
    ("--data imagenet --model small", "imagenet", "images of about 224 px", (224, 16), "small"),
    ("--data shapes", "shapes", "--data shapes", (32, 4), "micro"),
    ("--data shapes --model micro", "shapes", "--data shapes", (32, 4), "micro"),
    ("--model micro", "laptop", "the model's size, micro", (32, 4), "micro"),
    ("--data imagenet --model micro", "laptop", "the model's size, micro", (224, 16), "micro"),
    ("--data imagenet --recipe laptop", "laptop", "--recipe", (224, 16), "micro"),
    ("--data shapes --recipe small", "small", "--recipe", (32, 4), "tiny"),
    ("--recipe imagenet --model micro", "imagenet", "--recipe", (32, 4), "micro"),
    ("--data none/here", "imagenet", "images of about 224 px", (224, 16), "base")])
def test_choice_of_the_recipe(words, recipe, why, pixels, model):
    """The column is the typed one, else it follows from the model and the images, and the reason is said; the
    data set gives the image and patch size whatever the recipe is, and the column all other values."""
    args = parse(words, mae.RECIPE)
    assert (args.recipe, args.why, args.model) == (recipe, why, model)
    assert (args.img_size, args.patch_size) == pixels
    column = data.COLUMNS.index(recipe)
    assert (args.epochs, args.batch_size) == ((16, 44, 400, 800)[column], (64, 128, 512, 4096)[column])
    assert args.weight_decay == 0.05 and args.norm_pix_loss is (recipe != "shapes")
    assert parse(f"{words} --img_size 48 --patch_size 6 --epochs 3", mae.RECIPE).flags == args.flags | {
        "img_size": 48, "patch_size": 6, "epochs": 3}


@pytest.mark.parametrize("side, recipe, pixels", [
    (44, "small", (32, 4)), (48, "small", (64, 8)), (96, "small", (64, 8)), (97, "imagenet", (224, 16)),
    (400, "imagenet", (224, 16))])
@pytest.mark.parametrize("inner", ["train/cat", "cat"])
def test_choice_of_the_recipe_for_a_folder(side, recipe, pixels, inner, tmp_path):
    """The median of the pictures' shorter sides decides; what is no picture does not count."""
    for i, size in enumerate([(side, 500), (side + 30, side), (20, 30), (600, 700), (side, side)]):
        write_image(tmp_path / inner / f"{i}.png", i, size)
    (tmp_path / inner / "broken.jpg").write_bytes(b"no image")
    (tmp_path / inner / "notes.txt").write_text("no image")
    args = parse(f"--data {tmp_path}", mae.RECIPE)
    assert (args.recipe, args.why) == (recipe, f"images of about {side} px")
    assert (args.img_size, args.patch_size) == pixels


def test_cells_by_model():
    """A cell that knows models gives the value of --model, and to a model that it does not name its first."""
    tables = SCRIPTS["vit finetune"]
    found = [(args.epochs, args.layer_decay, args.drop_path) for args in (
        parse(f"--recipe imagenet --model {model}", *tables) for model in ("base", "large", "huge", "tiny"))]
    assert found == [(100, 0.65, 0.1), (50, 0.75, 0.2), (50, 0.75, 0.3), (100, 0.65, 0.1)]
    assert parse("--recipe small --model huge", *tables).epochs == 100
    assert [parse(f"--model {m}", dvae.RECIPE).vocab for m in ("micro", "tiny", "base")] == [512, 1024, 8192]


def test_a_resumed_run_keeps_its_recipe(tmp_path):
    """--resume reads the flags of the run, its recipe among them; flags that are typed again win, and lists
    that an older version wrote as text are read."""
    words = f"--data cifar10 --recipe laptop --lambda1 2 --output_dir {tmp_path}"
    flags = parse(words, ibot.RECIPE).flags
    for kept in (flags, flags | {"pred_ratio": "0,0.3", "pred_ratio_var": "0,0.2"}):
        (tmp_path / "args.json").write_text(json.dumps({"flags": kept}))
        again = parse(f"--resume --output_dir {tmp_path}", ibot.RECIPE)
        assert again.flags == flags | {"resume": True} and again.pred_ratio == [0.0, 0.3]
        again = parse(f"--resume --epochs 9 --output_dir {tmp_path}", ibot.RECIPE)
        assert again.flags == flags | {"resume": True, "epochs": 9}


def test_merge():
    """Later tables win; values alone, one or four of them, keep the meaning and range that are known, a whole
    row replaces them; new rows come last, and None takes a row away."""
    merged = data.merge({"a": (1, "of a", "[0, 9]"), "b": ("x", "of b", ("x", "y")), "c": (0.5, "of c"),
                         "gone": (1, "of one", "[0, 9]")},
                        {"a": 2, "b": ("y", "x", "x", "y"), "d": ((1, 2, 3, 4), "of d", "[1, 4]")},
                        {"c": (0.7, "c anew", "[0, 1]"), "gone": None, "d": {"base": 1, "tiny": 2}})
    assert merged == {"a": (2, "of a", "[0, 9]"), "b": (("y", "x", "x", "y"), "of b", ("x", "y")),
                      "c": (0.7, "c anew", "[0, 1]"), "d": ({"base": 1, "tiny": 2}, "of d", "[1, 4]")}
    assert list(merged) == list("abcd")


@pytest.mark.parametrize("kept, words", (("1,10", "1 10"), ([0.5, 2], "0.5 2.0"), (0.3, "0.3")))
def test_lists_of_old_runs(kept, words):
    """In args.json a list is one, a text as it was once typed, or a number, where the flag took only one."""
    assert data.as_words({"blrs": kept}, {"blrs": [1.0]}) == ["--blrs", *words.split()]


def test_lists_are_typed_as_lists(capsys):
    """List flags take one or more numbers, separated by spaces, each of them within the range."""
    args = parse("--pred_ratio 0 0.5 0.25 --pred_ratio_var 0.1 --data shapes", ibot.RECIPE)
    assert (args.pred_ratio, args.pred_ratio_var, args.data) == ([0.0, 0.5, 0.25], [0.1], "shapes")
    assert parse("--blrs 0.1 0.3 1", *SCRIPTS["vit linear"]).blrs == [0.1, 0.3, 1.0]
    assert "argument --blrs: 0.0 must lie in (0, inf)" in said(capsys, parse, "--blrs 1 0",
                                                               *SCRIPTS["vit linear"])
    assert "--blrs" in said(capsys, parse, "--blrs", *SCRIPTS["vit linear"])


@pytest.mark.parametrize("words, recipe, epochs", [("", "small (images of about 32 px)", 200),
                                                   ("--data shapes", "shapes (--data shapes)", 5)])
def test_help_shows_the_method_first(words, recipe, epochs, monkeypatch, capsys):
    """--help begins with the script's text and the recipe, then come the method's flags, then those of all
    scripts, each with its meaning, its range or choices, and the default of that recipe."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stopped:
        parse(f"{words} --help", ibot.RECIPE)
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"A script.\nThe defaults below are those of the recipe {recipe}.\n" in text
    places = [text.index(f"\n{group}:\n") for group in ("method", "data", "training", "run")]
    assert places == sorted(places)
    for name in ibot.RECIPE:
        assert name in COMMON or places[0] < text.index(f"\n  --{name}") < places[1]
    flat = " ".join(text.split())
    for told in (f"--epochs int passes over the training images; in [1, 1e9] (default: {epochs})",
                 "--pred_ratio float [float ...] shares of patches to hide; each crop draws one of them; "
                 "in [0, 1) (default: 0.0 0.3)",
                 "--pred_shape {block,rand} hide blocks, or single patches (default: block)",
                 "--log_every int steps between two lines of the log; in [1, 1e9] (default: 50)"):
        assert f" {told} " in flat


@pytest.mark.parametrize("words, images, told", [
    ("--recipe small --epochs 40", 5120, ["without a GPU"]), ("--recipe laptop --epochs 4", 5120, []),
    ("--recipe laptop --epochs 1", 5120, ["only 40 steps", "the learning rate rises to the end"]),
    ("--recipe small --max_steps 9", 51200, []),
    ("--recipe small --epochs 1", 5120,
     ["without a GPU", "only 10 steps", "the learning rate rises to the end"]),
    ("--recipe laptop --epochs 2 --warmup_epochs 1.9", 51200, [])])
def test_a_run_says_at_its_start_what_it_will_not_reach(words, images, told, monkeypatch, capsys):
    """A run made for GPUs on a CPU, one of few steps and one of warm-up alone are warned of, each in a line
    of its own; a trial of a few steps is not."""
    args = parse(f"{words} --device cpu --amp none", mae.RECIPE)
    source = data.Images(torch.zeros(images, 3, 1, 1, dtype=torch.uint8), torch.zeros(images), [""], (), ())
    monkeypatch.setattr(data, "Log", lambda *rest, **levels: "a log")
    loader = data.Loader(args, source, [])
    assert data.open_log(args, torch.nn.Linear(1, 1), loader, 0, "1.0") == "a log"
    lines = capsys.readouterr().out.splitlines()[4:]
    assert [next(sign for sign in told if line.startswith(sign)) for line in lines] == told
