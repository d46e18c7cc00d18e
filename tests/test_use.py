"""A trained encoder in use: what its file decides, its classifier, its features, pictures named by hand."""
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from test_runs import (IBOT, MAE, TRAIN, data, forked, log_of, read, run, same, sentence,  # noqa: E402
                       shrink, vit)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of runs on drawn shapes of 8 px: a classifier in train/, mae/ and ibot/ after a few steps."""
    folder = tmp_path_factory.mktemp("use")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(f"{TRAIN} --output_dir out/train")
        run(f"{MAE} --max_steps 1 --output_dir out/mae")
        run(f"{IBOT} --max_steps 3 --blr 1 --output_dir out/ibot")
    return folder / "out"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def pictures(folder, n=3, side=8):
    """PNG files of drawn shapes. -> their paths, labels"""
    imgs, labels = data.draw_shapes(n, side, seed=5)
    Path(folder).mkdir()
    paths = [f"{folder}/{i:02}.png" for i in range(n)]
    for img, path in zip(imgs, paths):
        Image.fromarray(img.permute(1, 2, 0).numpy()).save(path)
    return paths, labels


def rename_classes(monkeypatch):
    """The same images, their classes under names that no file has"""
    load = data.load_sets

    def others(args, judged):
        sets = load(args, judged)
        for source in sets:
            source.classes = [f"new {name}" for name in source.classes]
        return sets
    monkeypatch.setattr(data, "load_sets", others)


def flags_of(folder):
    return json.loads(Path(folder, "args.json").read_text())["flags"]


def result_of(folder):
    return json.loads(Path(folder, "result.json").read_text())


# ---- what the file decides ----

@pytest.mark.parametrize("mode", ["knn", "finetune --epochs 1", "linear", "features", "eval"])
def test_size_and_data_come_from_the_file(mode, trained):
    """An encoder of 8 px in 4 px patches, trained on shapes, is judged so, and args.json says so."""
    run(f"vit.py --device cpu --mode {mode} --init {trained}/train/encoder.pt --output_dir run")
    flags = flags_of("run")
    assert [flags[name] for name in ("img_size", "patch_size", "data", "model")] == [8, 4, "shapes", "micro"]


def test_what_is_typed_wins_over_the_file(trained):
    run(f"vit.py --device cpu --mode knn --img_size 16 --init {trained}/train/encoder.pt --output_dir run")
    assert flags_of("run")["img_size"] == 16 and flags_of("run")["patch_size"] == 4


@pytest.mark.parametrize("size, model, recipe", [("micro", "micro", "laptop"), ("tiny", "tiny", "small"),
                                                 ("base", "base", "imagenet")])
def test_the_column_follows_the_model_of_the_file(size, model, recipe):
    """An official file, of 64 px in 16 px patches: its size chooses among the columns and in their cells."""
    encoder = vit.ViT(64, 16, **vit.SIZES[size])
    torch.save({"model": encoder.state_dict()}, "official.pth")
    told = vit.of_file("official.pth", data.load_file("official.pth"))
    assert told == {"img_size": 64, "patch_size": 16, "model": model}
    name = "imagenet" if recipe == "imagenet" else "cifar10"
    args = data.parse_args("", *vit.RECIPES["finetune"], told=told, folder="out/x",
                           words=shlex.split(f"--mode finetune --data {name}"))
    assert (args.recipe, args.model, args.img_size, args.patch_size) == (recipe, model, 64, 16)
    assert args.epochs == {"laptop": 3, "small": 100, "imagenet": 100}[recipe]


# ---- a classifier ----

def test_eval_is_what_training_measured(trained):
    """The file's own head: accuracy and loss of the run's end, and of each class, counted here by hand."""
    run(f"vit.py --device cpu --amp none --mode eval --init {trained}/train/encoder.pt --output_dir run")
    found, trained_to = result_of("run"), result_of(trained / "train")
    assert found["accuracy"] == pytest.approx(trained_to["accuracy"], abs=1e-4)
    assert found["val_loss"] == pytest.approx(trained_to["val_loss"], abs=1e-4)
    content = read(trained / "train" / "encoder.pt")
    model = vit.ViT(**content["config"]).eval()
    model.load_state_dict(content["model"])
    imgs, labels = data.draw_shapes(1000 // 24, 8, seed=1)
    mean, std = (torch.tensor(content[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        right = model((imgs / 255 - mean) / std).argmax(1) == labels
    names = list(data.SHAPES)
    by_hand = {names[k]: right[labels == k].double().mean().item() * 100 for k in labels.unique().tolist()}
    assert found["classes"] == pytest.approx(by_hand) and content["classes"] == names
    assert Path("run/pictures/confusion.png").exists()


def test_names_of_classes_are_drawn_as_they_are(trained, monkeypatch):
    """No formula begins at a $, and a name that begins with _ stands in the legend, too."""
    Path("own").mkdir()
    for name in ("$5_$10", "_b"):
        pictures(f"own/{name}", 6)
    run("data.py --data own --holdout 4 --img_size 8 --patch_size 4")
    save, legends = data.save_atomically, []

    def heard(content, path):
        save(content, path)
        if path.name == "features.png":
            legends.extend(text.get_text().strip() for text in content.legends[0].get_texts())
    monkeypatch.setattr(data, "save_atomically", heard)
    run(f"vit.py --mode features --init {trained}/train/encoder.pt --data own --holdout 4 --output_dir run")
    assert legends == ["$5_$10", "_b"]


def test_confusion_counts_true_rows_and_said_columns(monkeypatch, trained):
    """Names in another order in the data set: rows and columns are those of the file."""
    drawn, load = {}, data.load_sets
    monkeypatch.setattr(vit, "confusion_picture",
                        lambda share, names, path: drawn.update(share=share.nan_to_num(-1), names=names))

    def turned(args, judged):
        sets = load(args, judged)
        for source in sets:
            source.classes, source.labels = source.classes[::-1], 9 - source.labels
        return sets
    command = f"vit.py --device cpu --amp none --mode eval --init {trained}/train/encoder.pt --output_dir"
    run(f"{command} straight")
    straight = drawn["share"]
    monkeypatch.setattr(data, "load_sets", turned)
    run(f"{command} turned")
    assert drawn["names"] == list(data.SHAPES) and torch.equal(drawn["share"], straight)
    assert result_of("turned")["accuracy"] == result_of("straight")["accuracy"]
    seen = data.draw_shapes(1000 // 24, 8, seed=1)[1].unique()
    assert torch.allclose(straight[seen].sum(1), torch.ones(len(seen)))


@pytest.mark.parametrize("kind", ["MAE", "DeiT"])
def test_eval_of_an_official_classifier(kind, trained):
    """Without names in the file its order is that of the data set; another number of classes is refused."""
    content = read(trained / "train" / "encoder.pt")
    options = dict(content["config"], num_classes=10, pool="mean" if kind == "MAE" else "cls")
    model = vit.ViT(**options)
    torch.save({"model": model.state_dict()}, "official.pth")
    flags = "--device cpu --num_heads 2 --data shapes --mode eval --init official.pth --output_dir run"
    run(f"vit.py {flags}")
    assert 0 <= result_of("run")["accuracy"] <= 100


def test_a_file_without_a_classifier(trained, capsys):
    pictures("seen")
    for mode in ("eval", "predict --images seen"):
        said = sentence(f"vit.py --mode {mode} --init {trained}/mae/encoder.pt --output_dir run", capsys)
        assert "has no classifier" in said and "--mode finetune gives it one" in said
        assert "give --init FILE" in sentence(f"vit.py --device cpu --mode {mode} --output_dir run", capsys)


def test_eval_needs_no_training_images(trained, capsys):
    """Class folders alone, of as many kinds as there are, or val/ without train/; --holdout is that of a
    run, which set these aside. What may be a judgement of training images is said."""
    imgs, labels = data.draw_shapes(30, 8, seed=5)
    for img, (i, label) in zip(imgs, enumerate(labels.tolist())):
        for root in ("plain", "split/val"):
            folder = Path(root, list(data.SHAPES)[label])
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(img.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    command = f"vit.py --device cpu --amp none --mode eval --num_workers 0 --init {trained}/train/encoder.pt"
    for root, told in (("plain", True), ("split", False)):
        run(f"{command} --data {root} --output_dir {root}-run")
        assert ("all images of plain are judged" in capsys.readouterr().out) == told
    right = [round(result_of(f"{root}-run")["accuracy"] * 30 / 100, 6) for root in ("plain", "split")]
    assert right[0] == right[1] == int(right[0])
    run(f"{command} --data plain --holdout 7 --output_dir few")
    assert "if its --holdout was the same" in capsys.readouterr().out
    assert round(result_of("few")["accuracy"] * 7 / 100, 6).is_integer()
    shutil.rmtree("split/val/ring")
    run(f"{command} --data split --output_dir fewer")
    assert "ring" not in result_of("fewer")["classes"]
    for folder in Path("split/val").iterdir():
        folder.rename(f"one-{folder.name}") if folder.name != "star" else None
    run(f"{command} --data split --output_dir one")
    assert list(result_of("one")["classes"]) == ["star"]
    assert "sort the images of one-moon" in sentence(f"{command} --data one-moon --output_dir flat", capsys)


def test_eval_on_other_classes(trained, capsys, monkeypatch):
    rename_classes(monkeypatch)
    said = sentence(f"vit.py --mode eval --init {trained}/train/encoder.pt --output_dir run", capsys)
    assert "was not trained to tell new bars" in said


def test_finetuning_goes_on_with_a_classifier_of_the_same_classes(trained, capsys, monkeypatch):
    """At step 0 of a second fine-tuning the head is that of the file; of other classes it is a new one."""
    flags = f"vit.py --device cpu --amp none --mode finetune --init {trained}/train/encoder.pt --epochs 1"
    run(f"{flags} --batch_size 20 --output_dir same")
    first = log_of("same")[0]
    assert first["step"] == 0
    assert first["accuracy"] == pytest.approx(result_of(trained / "train")["accuracy"], abs=1e-3)
    assert "going on with the classifier of" in capsys.readouterr().out
    rename_classes(monkeypatch)
    run(f"{flags} --batch_size 20 --output_dir other")
    assert log_of("other")[0]["val_loss"] == pytest.approx(np.log(10), abs=1e-3)    # a new head says nothing


def test_a_kept_head_reads_what_it_was_trained_on(trained):
    """A classifier on the class token goes on with it, though fine-tuning's own default is the mean."""
    run(f"{TRAIN} --pool cls --max_steps 30 --epochs 3 --output_dir first")
    run("vit.py --device cpu --amp none --mode finetune --init first/encoder.pt --epochs 1 "
        "--output_dir second")
    assert log_of("second")[0]["accuracy"] == pytest.approx(result_of("first")["accuracy"], abs=1e-3)
    assert log_of("second")[0]["val_loss"] == pytest.approx(result_of("first")["val_loss"], abs=1e-3)
    run("vit.py --device cpu --amp none --mode finetune --init first/encoder.pt --epochs 1 --pool mean "
        "--output_dir third")
    assert log_of("third")[0]["val_loss"] == pytest.approx(np.log(10), abs=1e-3)    # a new head


def test_predict_names_pictures(trained, capsys):
    """One line a picture, in the order of the command line, folders sorted; the class is the model's own."""
    paths, _ = pictures("seen", 3)
    command = (f"vit.py --device cpu --amp none --mode predict --init {trained}/train/encoder.pt "
               f"--images seen/02.png seen")
    capsys.readouterr()
    run(command)
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [paths[2], *paths]
    run(f"{command} --json")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [[one["file"], one["class"], str(one["probability"])] for one in found] == lines
    content = read(trained / "train" / "encoder.pt")
    model = vit.ViT(**content["config"]).eval()
    model.load_state_dict(content["model"])
    for one in found:
        img = data.crop_file(one["file"], [data.View(8)])[0] / 255
        mean, std = (torch.tensor(content[name])[:, None, None] for name in ("mean", "std"))
        with torch.no_grad():
            p = model(((img - mean) / std)[None])[0].softmax(0)
        assert one["class"] == list(data.SHAPES)[p.argmax()]
        assert one["probability"] == pytest.approx(p.max().item(), abs=2e-4)
    assert not Path("out").exists()                             # nothing is written


def test_predict_leaves_out_what_is_no_picture(trained, capsys):
    paths, _ = pictures("seen", 3)
    Path("seen/notes.txt").write_text("no picture")
    Path(paths[1]).write_bytes(b"damaged")
    command = f"vit.py --device cpu --mode predict --init {trained}/train/encoder.pt --images"
    capsys.readouterr()
    run(f"{command} seen")
    out, err = capsys.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()] == [paths[0], paths[2]] and paths[1] in err
    Path("empty").mkdir()
    assert "no pictures in 'empty'" in sentence(f"{command} empty", capsys)
    assert "there is no picture or folder 'no/such.png'" in sentence(f"{command} seen no/such.png", capsys)
    said = sentence(f"vit.py --mode predict --init {trained}/train/encoder.pt", capsys)
    assert "add --images" in said


# ---- features ----

def test_features_of_every_image(trained):
    """features.npz holds both features of all images of both sets, in order, with what they belong to."""
    run(f"vit.py --device cpu --amp none --mode features --init {trained}/mae/encoder.pt --output_dir run")
    found = np.load("run/features.npz")
    (train, train_y), (val, val_y) = data.draw_shapes(5000 // 24, 8, 0), data.draw_shapes(1000 // 24, 8, 1)
    assert found["labels"].tolist() == [*train_y.tolist(), *val_y.tolist()]
    assert found["classes"].tolist() == list(data.SHAPES)
    assert found["split"].tolist() == ["train"] * len(train) + ["val"] * len(val)
    assert found["paths"].tolist() == [*map(str, range(len(train))), *map(str, range(len(val)))]
    content = read(trained / "mae" / "encoder.pt")
    model = vit.ViT(**content["config"]).eval()
    model.load_state_dict(content["model"])
    mean, std = (torch.tensor(content[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        tokens = model.forward_features((torch.cat([train, val]) / 255 - mean) / std)
    assert np.allclose(found["cls"], tokens[:, 0], atol=1e-4)
    assert np.allclose(found["mean"], tokens[:, 1:].mean(1), atol=1e-4)
    assert Path("run/features.png").exists()


def test_features_of_a_flat_folder(trained):
    """Pictures without labels, one of them damaged: each row has its path."""
    paths, _ = pictures("seen", 12)
    aside, damaged, *_ = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    Path(paths[damaged]).write_bytes(b"damaged")
    run(f"vit.py --device cpu --mode features --data seen --init {trained}/mae/encoder.pt --output_dir run")
    found = np.load("run/features.npz")
    assert sorted(found["paths"].tolist()) == sorted(set(paths) - {paths[damaged]})
    assert dict(zip(found["paths"].tolist(), found["split"].tolist()))[paths[aside]] == "val"
    assert len(found["cls"]) == len(found["mean"]) == len(found["split"]) == len(found["labels"]) == 11


def test_features_know_the_numbers_of_their_images(trained):
    """Of a set in memory `paths` are places in the whole set, whatever is set aside of it."""
    run(f"vit.py --device cpu --mode features --init {trained}/mae/encoder.pt --holdout 50 --output_dir run")
    found = np.load("run/features.npz")
    _, labels = data.draw_shapes(5000 // 24, 8, 0)
    numbers = found["paths"].astype(int)
    assert sorted(numbers.tolist()) == list(range(len(labels)))
    assert np.array_equal(labels.numpy()[numbers], found["labels"])


def test_features_of_two_ranks_have_their_paths(trained):
    """What one rank could not read is left out of the names of all."""
    paths, _ = pictures("seen", 40)
    *_, damaged = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    Path(paths[damaged]).write_bytes(b"damaged")
    command = f"vit.py --device cpu --amp none --mode features --data seen --init {trained}/mae/encoder.pt"
    run(f"{command} --output_dir one")
    statuses, done = forked((f"{command} --output_dir two", ()), ranks=2)
    assert statuses == [0, 0], done.stderr
    one, two = np.load("one/features.npz"), np.load("two/features.npz")
    assert one["paths"].tolist() == two["paths"].tolist() and paths[damaged] not in one["paths"].tolist()
    assert np.allclose(one["mean"], two["mean"], atol=1e-5)


# ---- pictures, painted ----

def test_mae_repaints_pictures(trained, monkeypatch):
    """--paint takes the model's flags and the pixels' statistics from last.pt, draws, and trains nothing."""
    paths, drawn = pictures("seen", 3)[0], {}

    def prepare(patch):
        shrink(patch)
        patch.setattr(data, "save_rows", lambda path, rows, *title: drawn.update({path: rows}))
    before = (trained / "mae" / "last.pt").read_bytes()
    run(f"mae.py --device cpu --init {trained}/mae/last.pt --paint seen/01.png seen", prepare)
    (path, rows), = drawn.items()
    assert path == trained / "mae" / "painted.png" and len(rows["image"]) == 4
    assert torch.allclose(rows["image"][0], data.crop_file(paths[1], [data.View(8)])[0] / 255, atol=1e-5)
    assert (trained / "mae" / "last.pt").read_bytes() == before and not Path("out").exists()


@pytest.mark.parametrize("words, told", [
    ("--paint seen", "--paint needs --init FILE, the last.pt of a run"),
    ("--paint no.png --init {}/mae/last.pt", "there is no picture or folder 'no.png'"),
    ("--paint seen --init {}/mae/encoder.pt", "is no whole model of mae: give the last.pt of that run"),
])
def test_what_cannot_be_painted(words, told, trained, capsys):
    pictures("seen")
    said = sentence(f"mae.py --device cpu {words.format(trained)}", capsys)
    assert told in said


@pytest.mark.parametrize("change", [
    {"flags": 5}, {"flags": None}, {"flags": {"model": "x"}}, {"flags": {"model": 3}}, {"mean": "abc"},
    {"flags": {"img_size": "a"}}, {"flags": {"patch_size": 0}}, {"flags": {"sampling": "z"}},
    {"std": (1.0, float("nan"), 1.0)}])
def test_damaged_flags_of_what_is_to_paint(change, trained, capsys):
    pictures("seen")
    content = read(trained / "mae" / "last.pt")
    if isinstance(change.get("flags"), dict):
        change = {"flags": content["flags"] | change["flags"]}
    torch.save(content | change, "last.pt")
    assert "last.pt" in sentence("mae.py --device cpu --init last.pt --paint seen", capsys)
    assert not Path("painted.png").exists()


# ---- the student, other runtimes, few images ----

def test_the_student_of_ibot_is_judged_like_its_teacher(trained):
    """student.pt beside encoder.pt: the same layout, the student's weights."""
    weights, student, teacher = (read(trained / "ibot" / name)
                                 for name in ("last.pt", "student.pt", "encoder.pt"))
    for file, name in ((student, "student"), (teacher, "teacher")):
        own = {key.removeprefix(f"{name}.encoder."): value for key, value in weights["model"].items()
               if key.startswith(f"{name}.encoder.")}
        assert same(dict(sorted(file["model"].items())), dict(sorted(own.items())))
    assert not same(student["model"], teacher["model"])
    run(f"vit.py --device cpu --mode knn --init {trained}/ibot/student.pt --output_dir run")
    assert "cls_k20" in result_of("run")


@pytest.mark.parametrize("how", ["export", "trace"])
@pytest.mark.parametrize("options", [{}, {"pos": "sincos", "num_classes": 10}, {"stem": "conv"}, {
    "rel_pos": "shared", "pos": "none", "layer_scale": 0.1, "pool": "mean"}, {"rel_pos": "block"}])
@pytest.mark.filterwarnings("ignore")
def test_a_traced_encoder_takes_any_batch(options, how):
    model = vit.ViT(8, 4, 32, 2, 2, **options).eval()
    x = torch.randn(5, 3, 8, 8)
    if how == "trace":
        fixed = torch.jit.trace(model, x[:2])
    else:
        batch = torch.export.Dim("batch")
        fixed = torch.export.export(model, (x[:2],), dynamic_shapes=({0: batch},)).module()
    for n in (1, 2, 5):
        assert torch.allclose(fixed(x[:n]), model(x[:n]), atol=1e-6)


@pytest.mark.parametrize("command, rate", [
    (f"{MAE} --batch_size 512 --epochs 2", "blr"), (f"{MAE} --batch_size 512 --lr 0.01 --epochs 2", "lr"),
    ("vit.py --device cpu --data shapes --mode linear --optimizer lars --img_size 8 --patch_size 4 "
     "--batch_size 16384 --epochs 2 --warmup_epochs 1", "blr")])
def test_a_batch_is_cut_to_the_images_there_are(command, rate, capsys, monkeypatch):
    """208 images: batches of 208, said, with the learning rate that belongs to them; --resume goes on."""
    rates, step = [], data.Log.step
    monkeypatch.setattr(data.Log, "step",
                        lambda log, n, **values: rates.append(values["lr"]) or step(log, n, **values))
    run(f"{command} --accum_steps 2 --output_dir run")
    said = capsys.readouterr().out
    assert re.search(r"a batch is 208 images, not (512|16384): there are no more", said)
    assert "batch 208 = 1 ranks x 2 parts x 104" in said and len(rates) == 2
    flags = flags_of("run")
    assert max(rates) == pytest.approx(0.01 if rate == "lr" else flags["blr"] * 208 / 256)
    assert flags["batch_size"] in (512, 16384)


def test_a_cut_batch_leaves_no_image_alone(capsys):
    """Checks for one image a part see the batch that was cut."""
    said = sentence("vit.py --device cpu --data shapes --mode attentive --img_size 8 --patch_size 4 "
                    "--batch_size 416 --accum_steps 208 --output_dir run", capsys)
    assert "--batch_size 208 leaves one image a part" in said
    said = sentence(f"{IBOT} --koleo 0.5 --batch_size 416 --accum_steps 208 --output_dir run2", capsys)
    assert "--batch_size 208 leaves one a part" in said
