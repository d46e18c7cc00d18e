"""What a run draws cannot mislead: which images it shows, on which scale, and beside what."""
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from test_runs import elsewhere, inputs  # noqa: F401: fixtures; this import finds the repository
from test_runs import IBOT, LBFGS, LINEAR, SCRIPTS, TINY, log_of, run, shrink
from test_data import make_args
from test_pictures import BLUE, RED, folders
import beit_v2
import cae
import data
import dvae
import ibot
import mae
import vit

PLAIN = SimpleNamespace(mean=(0.0,) * 3, std=(1.0,) * 3)        # pixels as they are


def recorded(monkeypatch, *names):
    """The calls of data's functions of these names, (words, options) each, in the place of the functions."""
    calls = []
    for name in names:
        monkeypatch.setattr(data, name, lambda *words, **options: calls.append((words, options)))
    return calls


# ---- which images ----

def test_the_images_are_a_random_choice_that_never_changes(tmp_path, monkeypatch):
    """Of a folder that is sorted by class: some of every class, the same ones whatever was drawn before and
    on any rank; more images begin with the same."""
    args = make_args(data=str(folders(tmp_path, n=30)), amp="none")
    train, _ = data.load_sets(args)
    first = data.some_images(args, train)
    red = data.to_pixels(first, train).mean((2, 3))
    assert first.shape == (8, 3, 16, 16) and 2 <= (red[:, 0] > red[:, 2]).sum() <= 6
    torch.rand(3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert torch.equal(data.some_images(args, train), first)
    monkeypatch.undo()
    every = data.some_images(args, train, 1000)
    assert len(every) == 60 and torch.equal(every[:8], first)
    assert torch.equal(data.some_images(args, train, 8, data.View(16))[0], first)


def test_the_images_of_a_set_in_memory():
    """The same numbers as of files, and those that the k-NN monitor begins with."""
    imgs = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    source = data.Images(imgs, torch.zeros(200, dtype=torch.long), ["a"], **vars(PLAIN))
    shown = (data.some_images(make_args(), source)[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(shown, data.chosen(source, 8)) and len(shown.unique()) == 8
    assert torch.equal(data.sample(source, 50).imgs[:8, 0, 0, 0].long(), shown)
    assert sorted(data.chosen(source, 999).tolist()) == list(range(200))


def test_trivial_level_of_pixels(tmp_path):
    """The variance of the images of both classes, by hand; 1 where patches are normalised."""
    args = make_args(data=str(folders(tmp_path, n=30)), norm_pix_loss=False)
    train, _ = data.load_sets(args)
    colours = torch.tensor([[c + i for c in colour] for colour in (RED, BLUE) for i in range(30)]) / 255
    wanted = (colours.var(0) / torch.tensor(train.std) ** 2).mean().item()
    words, levels = data.trivial_loss(args, train)
    assert levels["loss"] == pytest.approx(wanted, rel=0.05) and f"{levels['loss']:.3f}" in words
    words, levels = data.trivial_loss(make_args(norm_pix_loss=True), None)
    assert levels["loss"] == 1 and words.startswith("1.0")


@pytest.mark.parametrize("ratio, var", (([0.0, 0.3], [0.0, 0.2]), ([0.3], [0.2]), ([0.0, 0.4], [0.0, 0.0])))
def test_trivial_level_of_ibot(ratio, var, monkeypatch):
    """What a uniform teacher and student reach: crops of which nothing is hidden count 0 in the mean."""
    levels = recorded(monkeypatch, "open_log")
    monkeypatch.setattr(data.Loader, "steps", lambda *rest: ())
    with pytest.raises(AttributeError):                         # there is no log
        run(f"{IBOT} --img_size 32 --local_size 16 --output_dir run --pred_ratio {' '.join(map(str, ratio))} "
            f"--pred_ratio_var {' '.join(map(str, var))}")
    (_, found), = levels
    args = SimpleNamespace(pred_ratio=ratio, pred_ratio_var=var, pred_shape="block", grid=8, device="cpu")
    mask = ibot.draw_masks(args, 3000)
    uniform = torch.full((mask.sum(), 16), 1 / 16)
    weight = (mask / (mask.sum(1, keepdim=True).clamp(min=1) * len(mask)))[mask]
    assert found["patch"] == pytest.approx(ibot.patch_loss(uniform, 0 * uniform, weight).item(), rel=0.05)
    assert found["cls"] == pytest.approx(math.log(16))


# ---- on which scale ----

def test_heat_maps_share_one_scale(tmp_path, monkeypatch):
    """From 0 to what 1% of a row exceed, or as asked for, with one colour bar; nan has no colour. One patch
    that is much brighter than all others does not darken them."""
    drawn = []
    monkeypatch.setattr(data, "save_atomically", lambda figure, path: drawn.append(figure))
    maps = torch.full((4, 20, 20), 0.8)
    maps[0, 0, :2], maps[2, 0, 0] = torch.tensor([90.0, 0.1]), math.nan
    rows = {"image": torch.rand(3, 3, 4, 4), "a": 0.2 * torch.rand(3, 2, 2), "b": maps}
    for scale in (None, (-1, 1)):
        data.save_rows(tmp_path / "x.png", {**rows, "b": maps.nan_to_num(0.5) if scale is None else maps},
                       scale=scale)
        shown = [axes.images[0] for axes in drawn[-1].axes if axes.images]
        assert [img.get_clim() for img in shown[3:]] == 7 * [scale or (0, pytest.approx(0.8))]
        assert len(drawn[-1].axes) == 3 + 3 + 4 + 1
    assert shown[8].to_rgba(shown[8].get_array())[0, 0, 3] == 0
    data.save_rows(tmp_path / "x.png", {"image": rows["image"]})
    assert len(drawn[-1].axes) == 3


def test_curves_say_what_is_good(tmp_path, monkeypatch):
    """Loss and k-NN come first, images/s last; each is marked by its value before training and by that of
    guessing, where they are known."""
    drawn = []
    monkeypatch.setattr(data, "save_atomically", lambda figure, path: drawn.append((figure, path.name)))
    lines = [{"knn": 16.0, "knn_student": 15.0, "rank": 30.0}, {"loss": 2.0, "accuracy": 0.2, "lr": 1e-3,
                                                                "images/s": 9.0, "branch_accuracy": 0.1}]
    (tmp_path / "log.jsonl").write_text("".join(
        json.dumps({"step": i, "epoch": i / 5, "seconds": i} | line) + "\n" for i, line in enumerate(lines)))
    source = SimpleNamespace(labels=torch.tensor([0, 1, 1, 2, 1]))
    data.curves(SimpleNamespace(path=tmp_path / "log.jsonl", loader=SimpleNamespace(source=source),
                                levels={"loss": 2.3, "accuracy": 0.3},
                                args=SimpleNamespace(flags={"seed": -1})))
    (figure, name), = drawn
    marks = {axes.get_title(): [line.get_label() for line in axes.lines[1:]] for axes in figure.axes}
    assert name == "curves.png" and list(marks.items()) == [
        ("loss", ["trivial level 2.3"]), ("knn", ["chance 60", "before training 16"]),
        ("knn_student", ["chance 60", "before training 15"]), ("accuracy", ["trivial level 0.3"]),
        ("branch_accuracy", ["trivial level 0.3"]), ("lr", []), ("rank", ["before training 30"]),
        ("images/s", [])]
    for axes in figure.axes:
        assert all(float(line.get_label().split()[-1]) == line.get_ydata()[0] for line in axes.lines[1:])
        assert (axes.get_legend() is None) == (not axes.lines[1:])


def test_a_run_of_the_readme_lies_behind_the_same_recipe(tmp_path, monkeypatch):
    """Grey: a log in .github/results of this script with the same flags, whatever folder, device or place of
    data it had; flags that it did not have yet are as they were, unless they are changed."""
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    folder, lines = tmp_path / ".github/results/mae", [{"step": 0, "epoch": 0.0, "seconds": 1, "knn": 30.0}]
    folder.mkdir(parents=True)
    flags = {"epochs": 44, "seed": 0, "mask_ratio": 0.75, "output_dir": "out/x", "data_dir": "data"}
    (folder / "args.json").write_text(json.dumps({"flags": flags, "command": "/code/mae.py --model micro"}))
    (folder / "log.jsonl").write_text(json.dumps(lines[0]) + "\n")
    here = {"output_dir": "here", "data_dir": "/data", "device": "cpu"}

    def found(changed=(), **other):
        return data.reference(SimpleNamespace(flags=flags | here | other, changed={*changed}))
    monkeypatch.setattr(sys, "argv", ["mae.py"])
    assert found() == found(new=1, newer=2) == found(["output_dir", "seed"], new=1) == lines
    assert found(seed=1) == found(mask_ratio=0.5) == found(["new"], new=1) == []
    monkeypatch.setattr(sys, "argv", ["elsewhere/cae.py"])
    assert found() == []


@pytest.mark.parametrize("command", ["mae.py --data shapes", "mae.py --model micro", "dvae.py --model micro",
                                     "beit.py --model micro", "cae.py --model micro",
                                     "ibot.py --model micro --img_size 24"])
def test_the_commands_of_the_readme_have_their_run_behind_them(command, monkeypatch):
    """The logs that are kept are of today's recipes: k-NN at the start and, higher, at the end."""
    monkeypatch.setattr(sys, "argv", command.split())
    script = importlib.import_module(command.split(".")[0])
    lines = data.reference(data.parse_args("", script.RECIPE))
    same = data.parse_args("", script.RECIPE, words=[*command.split()[1:], "--seed", "0", "--log_every", "9"])
    assert data.reference(same) == lines
    for other in ("--seed 1", "--holdout 9", "--init other.pt"):
        args = data.parse_args("", script.RECIPE, words=[*command.split()[1:], *other.split()])
        assert data.reference(args) == []
    votes = [line[name] for line in lines for name in ("knn", "knn_words") if name in line]
    assert len(votes) > 1 and votes[-1] > votes[0]


def test_every_script_gives_its_curves_levels(monkeypatch):
    """Losses that a model reaches without learning are known for all methods, under names that they log."""
    opened, open_log = [], data.open_log
    monkeypatch.setattr(data, "open_log", lambda *rest, **levels: (
        opened.append(levels), open_log(*rest, **levels))[1])
    for name, command in SCRIPTS.items():
        run(f"{command} --max_steps 2 --output_dir {name}")
        logged = {key for line in log_of(name) for key in line}
        assert opened[-1] and all(math.isfinite(level) for level in opened[-1].values())
        known = [word for word, level in opened[-1].items() if level]  # 0: codes' accuracy, if there are none
        assert all(any(word in key for key in logged) for word in known), (known, logged)


# ---- beside what ----

@pytest.mark.parametrize("norm", (True, False))
def test_mae_shows_no_prediction_where_none_is_trained(norm, monkeypatch, tmp_path):
    """Visible patches are white in the row of predictions and the image's own in the last; hidden ones are
    the same in both."""
    drawn = recorded(monkeypatch, "save_rows")
    model = mae.MAE(vit.ViT(32, 4, 48, 1, 2, pos="sincos"), 32, 1, 2, norm_pix_loss=norm)
    imgs = torch.rand(2, 3, 32, 32)
    torch.manual_seed(0)
    mae.pictures(model, imgs, PLAIN, tmp_path)
    torch.manual_seed(0)
    hidden = mae.unpatchify(model(imgs)[2][:, :, None].expand(-1, -1, 48), 4).bool()
    (((_, rows, title), _),) = drawn
    prediction = rows["prediction\n(white: visible)"]
    assert (prediction[~hidden] == 1).all() and torch.equal(rows["pasted"][~hidden], imgs[~hidden])
    assert torch.equal(prediction[hidden], rows["pasted"][hidden]) and ("true ones" in title) == norm


def test_codebook_says_how_many_codes_it_shows(monkeypatch, tmp_path):
    """The commonest 256 at most, and none that never occurs."""
    drawn = recorded(monkeypatch, "save_usage")
    recorded(monkeypatch, "save_rows", "save_plot")
    for vocab, used in ((32, 5), (300, 300)):
        model = dvae.DVAE(grid=4, stride=4, n_hid=8, vocab=vocab)
        counts = torch.arange(vocab).where(torch.arange(vocab) < used, 0) + (torch.arange(vocab) < used)
        dvae.pictures(model, torch.rand(2, 3, 16, 16), counts, tmp_path / "x.png")
        ((_, _, mosaic, title), _) = drawn[-1]
        tiles = mosaic.unflatten(0, (16, -1)).unflatten(2, (16, -1)).transpose(1, 2).flatten(0, 1)
        assert int((tiles < 1).flatten(1).any(1).sum()) == min(used, 256)
        assert f"the {min(used, 256)} commonest of {vocab} codes" in title


def test_rebuilt_features_stand_beside_one_for_all(monkeypatch, tmp_path):
    """The cosine of the mean direction to each of the teacher's features, by hand: what a tokenizer reaches
    that says the same of every patch."""
    drawn = recorded(monkeypatch, "save_rows")
    recorded(monkeypatch, "save_usage")
    model = beit_v2.VQKD(vit.ViT(32, 4, 48, 1, 2), 16, 4, 1, 20)
    target = torch.randn(8, 64, 20) + 2
    beit_v2.tokenizer_pictures(model, lambda imgs: target, torch.rand(8, 3, 32, 32) * 2 - 1,
                               torch.ones(16), tmp_path / "x.png")
    (_, rows, title, scale), _ = drawn[0]
    mean = sum(row / row.norm() for row in target.flatten(0, 1))
    for i, j in ((0, 0), (3, 20), (7, 63)):
        wanted = F.cosine_similarity(mean, target[i, j], dim=0)
        assert rows["one feature\nfor all"][i, j // 8, j % 8] == pytest.approx(wanted.item(), abs=1e-5)
    assert scale == (-1, 1) and rows["rebuilt\nfrom codes"].shape == (8, 8, 8)


def test_positions_say_if_they_are_fixed(monkeypatch, tmp_path):
    """MAE's and CAE's are, and as similar as before; learned ones stand beside untrained ones."""
    recorded(monkeypatch, "save_plot")
    drawn = recorded(monkeypatch, "save_rows")
    monkeypatch.setattr(data, "some_images", lambda *rest: torch.rand(2, 3, 32, 32))
    sizes, args = (32, 4, 48, 2, 2), SimpleNamespace(output_dir=tmp_path, device="cpu", seed=3)
    trained = vit.ViT(*sizes, pos="sincos")
    trained.pos_embed.data += 0.1 * torch.randn(1, 65, 48)
    row_first = cae.CAE(vit.ViT(*sizes, pos="sincos"), 16).encoder
    for model, kind in ((vit.ViT(*sizes, pos="sincos"), "fixed sin-cos"), (row_first, "fixed sin-cos"),
                        (vit.ViT(*sizes), "learned"), (trained, "learned")):
        vit.pictures(args, model, PLAIN)
        (path, rows, title), options = drawn[-1]
        assert path.name == "positions.png" and title.startswith(f"{kind} positions")
        maps, untrained = rows["row 0"], rows["untrained,\nrow 0"]
        assert torch.allclose(maps, untrained, atol=1e-5) == (kind != "learned")
        assert options == {"scale": (-1, 1)}
        for i, j, place in ((0, 3, (2, 5)), (7, 7, (0, 1))):
            pos = model.pos_embed[0, 1:].view(8, 8, 48)
            wanted = F.cosine_similarity(pos[i, j], pos[place], dim=0).item()
            assert rows[f"row {i}"][(j, *place)].item() == pytest.approx(wanted, abs=1e-5)


def test_attention_stands_beside_the_untrained_networks(monkeypatch):
    """Below the heads are those of the weights that this seed starts from: at step 0 iBOT's own, at every
    evaluation the same; those of vit.py where no step changes a weight."""
    drawn = []

    def prepare(patch):
        shrink(patch)
        patch.setattr(data, "save_rows", lambda path, rows, *rest, **scale: drawn.append((path.name, rows)))
    run(f"{IBOT} --lr 1e-2 --max_steps 3 --seed 5 --output_dir run", prepare)
    (_, start), (_, end) = [entry for entry in drawn if entry[0].startswith("0")]
    for head in ("head 1", "head 2"):
        assert torch.equal(start[f"untrained,\n{head}"], start[head])
        assert torch.equal(end[f"untrained,\n{head}"], start[head])
        assert not torch.equal(end[head], start[head])
    for lr, same in (("1e-30", True), ("1e-2", False)):
        run(f"vit.py {TINY} --mode train --lr {lr} --max_steps 3 --seed 5 --output_dir {lr}", prepare)
        rows = dict(drawn)["attention.png"]
        assert torch.allclose(rows["untrained,\nhead 1"], rows["head 1"], atol=1e-6) == same
    run(f"vit.py {TINY} --mode attentive --seed 5 --max_steps 1 --batch_size 20 --output_dir probe", prepare)
    rows = dict(drawn)["attention.png"]
    assert torch.equal(rows["class token,\nuntrained"], rows["class token"])    # there was no --init


@pytest.mark.parametrize("command", (LBFGS, f"{LINEAR} --max_steps 3",
                                     f"vit.py {TINY} --mode attentive --batch_size 20 --max_steps 3"))
def test_accuracy_is_drawn_against_the_block(command):
    """With --layers all: of each block and, last, of the output, as result.json says; not in curves.png."""
    drawn = []

    def prepare(patch):
        shrink(patch)
        patch.setattr(data, "save_plot", lambda path, lines, *rest, **settings: drawn.append((path, lines)))
    run(f"{command} --layers all --output_dir run", prepare)
    result = json.loads(Path("run/result.json").read_text())
    lines = dict(drawn)[Path("run/pictures/layers.png")]
    features = ("attentive",) if "attentive" in command else ("cls", "mean")
    assert tuple(lines) == features
    for feature in features:
        wanted = [result[f"{feature}-1"], result[f"{feature}-2"], result[feature]]
        assert lines[feature].tolist() == pytest.approx(wanted)
    if Path("run/log.jsonl").exists():                         # of probes that are trained step by step
        last = log_of("run")[-1].keys()
        assert {*features, "best"} <= last and f"{features[0]}-1" not in last
