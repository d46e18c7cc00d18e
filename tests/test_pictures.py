"""Data sets as people have them: every kind of picture and of folder, and what is damaged in them.

Tables: a row makes files and says what becomes of them, in the set, in words, and in what the model sees.
"""
import io
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from test_data import all_batches, make_args, numbers, said
import data
import vit

RED, GREEN, BLUE, WHITE = (200, 30, 20), (30, 180, 40), (20, 30, 220), (255, 255, 255)


def corners(W=48, H=32):
    """A picture whose quarters are red, green, blue and grey: every turn of it looks different."""
    img = Image.new("RGB", (W, H), RED)
    for box, colour in (((W // 2, 0), GREEN), ((0, H // 2), BLUE), ((W // 2, H // 2), (128,) * 3)):
        img.paste(colour, (*box, box[0] + W // 2, box[1] + H // 2))
    return img


def pixels(img):
    return torch.from_numpy(np.array(img.convert("RGB"))).permute(2, 0, 1)


def seen(path):
    """The picture as Tiny-ImageNet's reader gives it, after a look that the loader's crop agrees with it."""
    whole = data.open_rgb(path)
    crop = data.crop_file(path, [data.View(64)])[0].float()
    (wanted,) = data.crop_in_memory(whole[None], [data.View(64, scale=(1, 1), ratio=(1, 1))])
    assert (crop.mean((1, 2)) - wanted[0].mean((1, 2)) * 255).abs().max() < 4
    return whole


# ---- modes ----

RAMP = np.arange(48 * 32).reshape(32, 48) / (48 * 32 - 1)
WIDE = (RAMP * 65535).astype(np.uint16)
GREY = torch.from_numpy(RAMP * 255).expand(3, 32, 48)


def covered(mode):
    """RED where alpha is 255, colours of noise where it is 0 -> the picture, and what is seen of it"""
    rng = np.random.default_rng(0)
    img = Image.fromarray(np.dstack([rng.integers(0, 255, (32, 48, 3)), np.zeros((32, 48))]).astype(np.uint8))
    img.paste((*RED, 255), (0, 0, 24, 32))
    wanted = Image.new("RGB", (48, 32), WHITE)
    wanted.paste(img.convert("LA").getpixel((0, 0))[:1] * 3 if mode == "LA" else RED, (0, 0, 24, 32))
    return img.convert(mode), pixels(wanted)


def palette(**options):
    """Index 1 on the left, 0 on the right: `transparency` says which of them is seen"""
    img = Image.new("P", (48, 32))
    img.putpalette([*BLUE, *RED])
    img.paste(1, (0, 0, 24, 32))
    return img, options


def key(mode, colour):
    """A grey or RGB picture whose right half has the one colour that is transparent"""
    img = Image.new(mode, (48, 32), colour)
    img.paste(RED if mode == "RGB" else 80, (0, 0, 24, 32))
    return img, {"transparency": colour}


LEFT_RED, LEFT_GREY = Image.new("RGB", (48, 32), WHITE), Image.new("RGB", (48, 32), WHITE)
LEFT_RED.paste(RED, (0, 0, 24, 32))
LEFT_GREY.paste((80,) * 3, (0, 0, 24, 32))
MODES = {  # (picture, options of save), ending, wanted, how far apart
    "16 bits, PNG": ((Image.fromarray(WIDE), {}), "png", GREY, 1),
    "16 bits, TIFF": ((Image.fromarray(WIDE), {}), "tif", GREY, 1),
    "16 bits, big-endian": ((Image.frombytes("I;16B", (48, 32), WIDE.astype(">u2").tobytes()), {}), "tif",
                            GREY, 1),
    "16 bits, PGM": ((Image.fromarray(WIDE), {}), "pgm", GREY, 1),
    "32 bits": ((Image.fromarray(WIDE.astype(np.int32)), {}), "tif", GREY, 1),
    "floats": ((Image.fromarray(RAMP.astype(np.float32)), {}), "tiff", GREY, 1),
    "RGBA": ((covered("RGBA")[0], {}), "png", covered("RGBA")[1], 0),
    "RGBA, WebP": ((covered("RGBA")[0], {"lossless": True}), "webp", covered("RGBA")[1], 0),
    "LA": ((covered("LA")[0], {}), "png", covered("LA")[1], 0),
    "palette": (palette(), "png", pixels(palette()[0]), 0),
    "palette with transparency": (palette(transparency=0), "png", pixels(LEFT_RED), 0),
    "palette with alphas": (palette(transparency=b"\0\xff"), "png", pixels(LEFT_RED), 0),
    "GIF with transparency": (palette(transparency=0), "gif", pixels(LEFT_RED), 0),
    "a transparent grey": (key("L", 7), "png", pixels(LEFT_GREY), 0),
    "a transparent colour": (key("RGB", BLUE), "png", pixels(LEFT_RED), 0),
    "1": ((corners().convert("1"), {}), "png", pixels(corners().convert("1")), 0),
    "L": ((corners().convert("L"), {}), "jp2", pixels(corners().convert("L")), 0),
    "CMYK": ((corners().convert("CMYK"), {}), "tif", pixels(corners()), 0),
    "CMYK, JPEG": ((corners().convert("CMYK"), {"quality": 95}), "jpg", pixels(corners()), 25),
    "YCbCr": ((corners().convert("YCbCr"), {}), "tif", pixels(corners()), 2),
    "LAB": ((Image.new("LAB", (48, 32), (128, 128, 128)), {}), "tif", torch.full((3, 32, 48), 119), 3),
    "the first frame": ((corners(), {"save_all": True, "append_images": [Image.new("RGB", (48, 32))]}), "gif",
                        pixels(corners()), 0),
    "bmp": ((corners(), {}), "bmp", pixels(corners()), 0),
    "tga": ((corners(), {}), "tga", pixels(corners()), 0),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_is_seen_as_people_see_it(name, tmp_path):
    """Deep, transparent, printed and indexed pictures reach a model in the colours that a viewer shows."""
    (img, options), ending, wanted, apart = MODES[name]
    img.save(tmp_path / f"a.{ending}", **options)
    assert f".{ending}" in data.ENDINGS
    assert (seen(tmp_path / f"a.{ending}").float() - wanted.float()).abs().max() <= apart


@pytest.mark.parametrize("deep", [RAMP * 2, RAMP - 0.5, RAMP * np.nan, RAMP / 0.0, WIDE.astype(np.int32) * 2,
                                  WIDE.astype(np.int32) - 9])
def test_levels_of_unknown_range_are_refused(deep, tmp_path):
    """Floats outside [0, 1] and integers of more than 16 bits are no guess: the file is named."""
    Image.fromarray(deep.astype(np.float32 if deep.dtype == float else np.int32)).save(tmp_path / "a.tif")
    text = data.tried(data.open_rgb, tmp_path / "a.tif")
    assert text.startswith(f"{tmp_path / 'a.tif'} (its levels")


# ---- EXIF ----

@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned(ending, orientation, tmp_path):
    """All eight EXIF orientations, whole and cropped, and where the decoder of a JPEG shrinks them."""
    exif = Image.Exif()
    exif[274] = orientation
    for size in ((48, 32), (960, 640)):
        corners(*size).save(tmp_path / f"a.{ending}", exif=exif, quality=95)
        upright = corners(*size)
        upright.getexif()[274] = orientation
        wanted = pixels(ImageOps.exif_transpose(upright))
        whole = data.open_rgb(tmp_path / f"a.{ending}")
        assert whole.shape == wanted.shape and (whole.float() - wanted.float()).abs().mean() < 5
        (crop,) = data.crop_file(tmp_path / f"a.{ending}", [data.View(28)])
        for rows, cols in ((4, 4), (4, 24), (24, 4), (24, 24)):
            far = wanted[:, (0 if rows < 14 else -1), (0 if cols < 14 else -1)]
            assert (crop[:, rows, cols].float() - far).abs().max() < 30


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("exif", [b"nonsense here", b"", b"II*\0\x08\0\0\0\xff\xff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_data_turn_nothing(ending, exif, tmp_path):
    corners().save(tmp_path / f"a.{ending}", exif=b"Exif\0\0" + exif, dpi=(72, 72))
    assert seen(tmp_path / f"a.{ending}").shape == (3, 32, 48)


# ---- unreadable files ----

def saved(img, **options):
    img.save(stream := io.BytesIO(), **options)
    return stream.getvalue()


UNREADABLE = {
    "empty": b"", "text": b"not a picture", "half": saved(corners(200, 200), format="JPEG")[:700],
    "bomb": saved(Image.new("1", (9, 9)), format="PNG").replace(b"IHDR\0\0\0\t\0\0\0\t", b"IHDR\0\0N \0\0N "),
    "no pixels": b"GIF89a" + bytes(7) + b",\0\0\0\0\0\0\0\0\0\x02\0;",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "PNG of nothing": saved(corners(), format="PNG")[:40],
    "TIFF header": b"II*\0" + struct.pack("<I", 1 << 31),
    "chunk": saved(corners(), format="PNG").replace(b"IDAT", b"IDAX"),
}


def folders(root, n=12, classes=("cat", "dog")):
    """root/train/<class>/<n> and root/val/<class>/<n>; cats are red, dogs blue."""
    for split, count in (("train", n), ("val", 4)):
        for name, colour in zip(classes, (RED, BLUE)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                img = Image.new("RGB", (40, 40), tuple(c + i for c in colour))
                img.save(root / split / name / f"{i:03}.jpg")
    return root


class Colours(torch.nn.Module):
    def features(self, imgs):
        return imgs.mean((2, 3))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_training_files(workers, tmp_path, capfd):
    """All are named once, the run goes on with others in their place, and the k-NN leaves them out."""
    root = folders(tmp_path)
    bad = [root / "train/cat" / f"a {name}.jpg" for name in UNREADABLE]
    for path, content in zip(bad, UNREADABLE.values()):
        path.write_bytes(content)
    args = make_args(data=str(root), num_workers=workers, epochs=4, batch_size=11, amp="none")
    train, val = data.load_sets(args)
    assert len(train) == 24 + len(bad)
    assert data.knn_monitor(args, Colours(), train, val, k=5)["knn"] == 100
    loader = data.Loader(args, train, [data.View(8)])
    steps = all_batches(loader)
    assert data.knn_monitor(args, Colours(), train, val, k=5)["knn"] == 100 and len(steps) == 12
    said = capfd.readouterr().err
    assert all(said.count(f"{path} (") == 1 for path in bad) and f"({len(bad)} so far)" in said
    assert len(data.encode(args, Colours().features, train)[1]) == 24
    for ((imgs,), labels, _), in steps.values():
        red = data.to_pixels(imgs, train).mean((2, 3))
        assert torch.equal((red[:, 0] < red[:, 2]).long(), labels)
    others = {i: [] for i in range(12, 12 + len(bad))}          # what is shown in the place of each
    for step, (((imgs,), _, _),) in steps.items():
        for i, img in zip(numbers(loader, step).tolist(), imgs):
            if i in others:
                others[i].append(img[:, 0, 0].tolist())
    assert all(len(set(map(tuple, colours))) > 1 for colours in others.values())
    assert len({tuple(colours[0]) for colours in others.values()}) > 3


def test_unreadable_validation_files(tmp_path, capsys):
    """All are named in one sentence when the sets are loaded, also those that --holdout chooses."""
    root = folders(tmp_path)
    bad = [root / "val/dog" / f"{name}.jpg" for name in UNREADABLE]
    for path, content in zip(bad, UNREADABLE.values()):
        path.write_bytes(content)
    text = said(capsys, data.load_sets, make_args(data=str(root)))
    assert all(f"{path} (" in text for path in bad) and "delete or replace" in text
    bad[0].rename(root / "train/cat/bad.jpg")
    assert "cat/bad.jpg" in said(capsys, data.load_sets, make_args(data=str(root), holdout=24))


def test_nothing_readable(tmp_path, capsys):
    """A folder that vanishes meanwhile ends the run with a sentence."""
    args = make_args(data=str(folders(tmp_path)))
    train, _ = data.load_sets(args)
    for path in train.imgs:
        os.remove(path)
    assert "No such file" in said(capsys, all_batches, data.Loader(args, train, [data.View(8)]))


# ---- folders ----

def dots(root):
    for path in list(folders(root).rglob("*.jpg")):
        path.with_name("._" + path.name).write_bytes(bytes(120))
    for name in (".ipynb_checkpoints", ".git"):
        (root / "train" / name).mkdir()
        corners().save(root / "train" / name / "a.jpg")
        (root / "train/cat" / name).mkdir()
        corners().save(root / "train/cat" / name / "a.jpg")


def endings(root):
    folders(root)
    for ending in ("tif", "GIF", "TiFF", "jfif", "jp2", "ppm", "tga"):
        corners().save(root / "train/cat" / f"x.{ending}")
    for name in ("a.heic", "b.heic", "Thumbs.db", "notes", "scan.eps"):
        (root / "train/cat" / name).write_bytes(b"?")
    (root / "train/loose.png").write_bytes(b"?")


def nested(root):
    folders(root)
    for folder in ("cat/more", "cat/more/deep er", "dog/x.y"):
        (root / "train" / folder).mkdir()
        corners().save(root / "train" / folder / "a.png")
    os.symlink(root / "val/dog", root / "train/dog/linked")


def flat(root):
    root.mkdir()
    for i in range(40):
        corners().save(root / f"{i:03}.jpg")


def flat_train(root):
    root.mkdir()
    flat(root / "train")


def flat_both(root):
    flat_train(root)
    (root / "val").mkdir()
    corners().save(root / "val/a.png")


def old_name(root):
    folders(root)
    for split in ("train", "val"):
        os.rename(root / split / "cat", os.fsencode(root / split) + b"/ch\xe8vre")


def slivers(root):
    folders(root)
    for name, size in (("tall", (1, 500)), ("wide", (500, 1)), ("dot", (1, 1)), ("two", (2, 300))):
        corners().resize(size).save(root / f"train/cat/{name}.png")
        corners().resize(size).save(root / f"val/cat/{name}.png")


PEOPLE = {  # training and validation images, classes, words on the terminal
    dots: (24, 8, ["cat", "dog"], []),
    endings: (31, 8, ["cat", "dog"], ["2 .heic", "1 .db", "1 .eps", "1 others", "1 .png"]),
    nested: (31, 8, ["cat", "dog"], []),
    flat: (36, 4, [""], ["without the k-NN monitor", "4 of the 40 training images stand in"]),
    flat_train: (36, 4, [""], ["without the k-NN monitor"]),
    flat_both: (40, 1, [""], ["without the k-NN monitor"]),
    old_name: (24, 8, ["ch\\udce8vre", "dog"], []),
    slivers: (28, 12, ["cat", "dog"], []),
    lambda root: folders(root, n=3): (6, 8, ["cat", "dog"], []),
}


@pytest.mark.parametrize("make", PEOPLE)
def test_folders_as_people_have_them(make, tmp_path, capsys):
    """How many images are found, of which classes, what is said; and every one of them can be read."""
    make(tmp_path / "set")
    args = make_args(data=str(tmp_path / "set"), batch_size=4, epochs=1, amp="none")
    train, val = data.load_sets(args)
    wanted = PEOPLE[make]
    assert (len(train), len(val), train.classes) == wanted[:3]
    text = capsys.readouterr().out
    assert all(word in text for word in wanted[3]) and ("left out" in text) == (make is endings)
    assert text.count("left out") <= 1
    views = [data.View(16, scale=(0.2, 1.0)), data.View(16)]
    assert all(len(parts) == 1 for parts in all_batches(data.Loader(args, train, views)).values())
    accuracy = data.knn_monitor(args, Colours(), train, val, k=3)["knn"]
    assert accuracy is None if len(train.classes) == 1 else accuracy > 50
    assert not train.skipped and "".join(train.classes).isprintable()


def test_supervised_modes_need_classes(tmp_path, capsys, monkeypatch):
    """vit.py refuses a flat folder, and one of a single class, in all modes with one sentence."""
    flat(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    for mode in ("train", "linear", "knn"):
        monkeypatch.setattr(sys, "argv", ["vit.py", "--mode", mode, "--data", "set", "--model", "micro",
                                          "--output_dir", f"out/{mode}", "--device", "cpu"])
        assert f"--mode {mode} needs labels" in said(capsys, vit.main)


def test_recipes_do_not_stumble_over_pictures(tmp_path):
    """The size of the pictures is looked up without what begins with a dot or cannot be read."""
    (tmp_path / ".hidden").mkdir()
    corners(400, 400).save(tmp_path / ".hidden/a.png")
    corners(400, 400).save(tmp_path / "._a.png")
    (tmp_path / "bomb.png").write_bytes(UNREADABLE["bomb"])
    corners(40, 30).save(tmp_path / "a.tif")
    assert data.side_of(tmp_path) == 30


# ---- CIFAR ----

PIXELS, LABELS = np.zeros((10_000, 3072), np.uint8), np.arange(10_000) % 10


def rows(n=10_000, label=0):
    """A binary batch of n records, the last of which has the label"""
    content = np.zeros((n, 3073), np.uint8)
    content[-1, 0] = label
    return content.tobytes()


def batch(**changes):
    """A pickled batch of 10,000 records, but for the changes"""
    content = {"data": PIXELS, "labels": LABELS.tolist()} | changes
    return pickle.dumps({name.encode(): value for name, value in content.items()}, protocol=4)


CIFAR = {  # layout, and what makes its test_batch
    "label 10": ("bin", lambda: rows(label=10)), "short": ("bin", lambda: rows(9_999)),
    "long": ("bin", lambda: rows() + b"\0"), "twice": ("bin", lambda: rows(20_000)),
    "pickled label 10": ("py", lambda: batch(labels=[10] * 10_000)),
    "negative": ("py", lambda: batch(labels=[-1] * 10_000)),
    "words": ("py", lambda: batch(labels=["cat"] * 10_000)),
    "parts": ("py", lambda: batch(labels=[0.5] * 10_000)),
    "few labels": ("py", lambda: batch(labels=[1] * 9_999)),
    "few rows": ("py", lambda: batch(data=PIXELS[1:])), "a list": ("py", lambda: batch(data=[1])),
    "upright": ("py", lambda: batch(data=PIXELS.reshape(-1, 32, 32, 3))),
    "floats": ("py", lambda: batch(data=PIXELS.astype(np.float32))),
    "goes on": ("py", lambda: batch() + b"more"),
    "cut": ("py", lambda: batch()[:-5000]), "nine names": ("py", batch),
}


@pytest.mark.parametrize("name", CIFAR)
def test_senseless_cifar_files_are_named(name, tmp_path, capsys):
    """Labels that no class has, and files or pickles of another length or form; short lists of classes."""
    layout, make = CIFAR[name]
    folder = tmp_path / f"cifar-10-batches-{layout}"
    folder.mkdir()
    path = folder / ("test_batch.bin" if layout == "bin" else "test_batch")
    path.write_bytes(make())
    names = [str(k).encode() for k in range(9 if name == "nine names" else 10)]
    (folder / "batches.meta.txt").write_text("0 1 2 3 4 5 6 7 8 9\n\n")
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}))
    text = said(capsys, data.read_cifar, "cifar10", tmp_path, False)
    wrong = folder / "batches.meta" if name == "nine names" else path
    assert f"{wrong} (" in text and f"delete {folder}" in text


@pytest.mark.parametrize("layout", ["bin", "py"])
def test_data_dir_may_be_the_folder_of_the_batches(layout, tmp_path, monkeypatch):
    folder = tmp_path / f"cifar-10-batches-{layout}"
    folder.mkdir()
    assert data.find_set("cifar10", folder)[0] == data.find_set("cifar10", tmp_path)[0] == folder
    monkeypatch.chdir(folder)
    assert data.find_set("cifar10", Path("."))[0] == folder


# ---- Tiny-ImageNet ----

def tiny(folder):
    for wnid in ("n01", "n02"):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("a.JPEG\t0\t0\t9\t9\n")
        for i in range(3):
            corners(64, 64).save(folder / f"train/{wnid}/images/{wnid}_{i}.JPEG")
    (folder / "val/images").mkdir(parents=True)
    for i in range(4):
        corners(64, 64).save(folder / f"val/images/val_{i}.JPEG")
    notes = [f"val_{i}.JPEG\tn0{1 + i % 2}\t0\t0\n" for i in range(4)]
    (folder / "val/val_annotations.txt").write_text("".join(notes))
    (folder / "wnids.txt").write_text("n02\nn01\n\n")


NOTES = "val/val_annotations.txt"
TINY = {  # file -> its content, None: it is missing; words of the sentence
    "whole": ({}, None),
    "hidden": ({"train/n01/images/._n01_0.JPEG": "x", "val/images/._a.JPEG": "x"}, None),
    "short wnids": ({"wnids.txt": "n01\n"}, ["wnids.txt (n02: listed 0 times, found 1 times)"]),
    "long wnids": ({"wnids.txt": "n01\nn02\nn03\n"}, ["wnids.txt (n03: listed 1 times, found 0 times)"]),
    "doubled wnid": ({"wnids.txt": "n01\nn02\nn02\n"}, ["wnids.txt (n02: listed 2 times"]),
    "no wnids": ({"wnids.txt": None}, ["wnids.txt (", "No such file"]),
    "short notes": ({NOTES: "".join(f"val_{i}.JPEG\tn01\n" for i in (0, 1, 3))},
                    [NOTES, "val_2.JPEG: listed 0 times, found 1"]),
    "doubled note": ({NOTES: "".join(f"val_{i}.JPEG\tn01\n" for i in (0, 1, 2, 3, 3))},
                     [NOTES, "val_3.JPEG: listed 2 times, found 1"]),
    "unknown class": ({NOTES: "".join(f"val_{i}.JPEG\tn09\n" for i in range(4))}, [NOTES, "'n09'"]),
    "no class": ({NOTES: "".join(f"val_{i}.JPEG\n" for i in range(4))}, [NOTES]),
    "noise": ({NOTES: b"\xff\xfe\xfd"}, [NOTES]), "no notes": ({NOTES: None}, [NOTES]),
    "no image": ({"val/images/val_1.JPEG": None}, [NOTES, "val_1.JPEG: listed 1 times, found 0 times"]),
    "no training image": ({"train/n01/images/n01_1.JPEG": None}, ["not of as many images"]),
    "damaged images": ({"train/n01/images/n01_1.JPEG": "?", "train/n02/images/n02_0.JPEG": "?"},
                       ["n01_1.JPEG (cannot", "n02_0.JPEG (cannot"]),
    "another size": ({"val/images/val_1.JPEG": saved(corners(32, 32), format="JPEG")},
                     ["val_1.JPEG (", "64"]),
}


@pytest.mark.parametrize("name", TINY)
def test_tiny_imagenet_is_whole_or_named(name, tmp_path, capsys):
    """Lists and images that do not belong together end in one sentence, before anything is cached."""
    folder = tmp_path / "tiny-imagenet-200"
    tiny(folder)
    changes, words = TINY[name]
    for file, content in changes.items():
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    if words:
        text = said(capsys, data.read_tiny_imagenet, tmp_path)
        assert all(word in text for word in [*words, f"delete {folder}"]), text
        assert os.listdir(tmp_path) == [folder.name]
    else:
        ((imgs, labels, _), (val_imgs, val_labels, _)), _ = data.read_tiny_imagenet(tmp_path)
        assert labels.tolist() == [0, 0, 0, 1, 1, 1] and val_labels.tolist() == [0, 1, 0, 1]
        assert imgs.shape == (6, 3, 64, 64) and val_imgs.shape == (4, 3, 64, 64)
