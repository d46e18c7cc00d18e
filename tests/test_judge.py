"""The judge says what a plain computation says, and parts and ranks add up to one large batch.

The judged images are of one colour each, which no crop and no flip changes: what a probe, a classifier or the
k-NN vote is shown can be told from its pixels or features. The encoder comes from a file with a mean, a std
and a drop path of its own. All that two ranks do is done by this file as a program: torchrun test_judge.py.
"""
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from test_runs import elsewhere, inputs  # noqa: F401: fixtures; this import finds the repository
from test_runs import (IBOT, METHODS, RANKS, TRAIN, VQKD, assert_near, guarded, log_of, main_of, read, run,
                       same, shrink)
import data
import ibot
import vit

JUDGE = ("vit.py --data shapes --device cpu --amp none --img_size 8 --patch_size 4 --batch_size 20 "
         "--log_every 1")
PROBE = (f"{JUDGE} --init file.pt --optimizer sgd --lr 0.5 --min_lr 0 --warmup_epochs 0 "
         "--crop_scale 0.5 --blrs 1 10")
LBFGS = ("vit.py --data shapes --device cpu --amp none --img_size 8 --patch_size 4 --mode linear "
         "--init file.pt")
SCRIPTED = f"{PROBE} --mode linear --epochs 2"
ONE_STEP = f"{PROBE} --mode linear --epochs 1 --batch_size 200"
FINETUNE = (f"{JUDGE} --mode finetune --init file.pt --epochs 2 --eval_every 1 --lr 1e-2 --warmup_epochs 0 "
            "--mixup 0 --cutmix 0 --erase 0 --rand_augment 0 --crop_scale 0.5")
EQUAL = {  # 30 steps without chance
    "ibot": f"{IBOT} --epochs 3 --eval_every 3 --lr 1e-3 --clip_grad 0.3 --momentum 0.9 --drop_path 0 "
            "--teacher_temp_start 0.04 --teacher_temp 0.04 --patch_temp 0.04 --freeze_last_layer 0",
    "vqkd": f"{VQKD} --epochs 3 --eval_every 3 --lr 1e-3 --clip_grad 0 --decay 0.9 --restart 0 "
            "--init first/last.pt",
    "train": f"{TRAIN} --epochs 3 --eval_every 3 --lr 1e-3 --clip_grad 0 --mixup 0 --cutmix 0 --erase 0 "
             "--rand_augment 0 --drop_path 0 --smoothing 0.1 --ema 0.9"}
MEAN, STD = (0.2, 0.4, 0.6), (0.3, 0.5, 0.8)
ARGS = SimpleNamespace(img_size=8, patch_size=4, batch_size=20, accum_steps=1, epochs=1, max_steps=0, seed=0,
                       num_workers=0, device="cpu", amp="none", compile=False, mode="linear", layers="last")


# ---- a small world ----

def colours(n, size, seed):
    """In the place of data.draw_shapes: 200 training images, 20 of each class, which is their brightness, or
    41 validation images, every second of which has a label that contradicts its brightness.
    """
    order = torch.randperm(343, generator=torch.Generator().manual_seed(1))[:241]
    levels = torch.stack([order // 49, order // 7 % 7, order % 7], 1) * 42                  # (241, 3)
    bright = levels @ torch.tensor([3, 5, 4])
    labels = torch.empty(200, dtype=torch.long)
    labels[bright[:200].argsort(stable=True)] = torch.arange(200) // 20
    chosen = slice(200) if n == 5000 else slice(200, 241)
    if n != 5000:
        nearest = (bright[chosen, None] - bright[:200]).abs().argmin(1)
        labels = (labels[nearest] + 3 * (torch.arange(41) % 2)) % 10
    return levels[chosen].to(torch.uint8)[:, :, None, None].repeat(1, 1, size, size), labels


def colourful(patch):
    shrink(patch)
    patch.setattr(data, "draw_shapes", colours)


def frozen(patch):
    """The same, for an encoder that may not be in training mode at any moment."""
    colourful(patch)
    forward = vit.Block.forward

    def watched(block, *inputs):
        assert not block.training, "the frozen encoder is in training mode"
        return forward(block, *inputs)
    patch.setattr(vit.Block, "forward", watched)


def pictures(train, stats=(MEAN, STD)):
    """Normalised images (n, 3, 8, 8) and labels (n,) of `colours`."""
    imgs, labels = colours(5000 if train else 1000, 8, 0)
    return normalised(imgs, *stats), labels


def normalised(imgs, mean, std):
    return (imgs / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def write_encoder(path):
    """An encoder.pt whose blocks matter, and whose drop path would be seen."""
    torch.manual_seed(3)
    encoder = vit.ViT(8, 4, embed_dim=32, depth=2, num_heads=2, drop_path=0.9)
    with torch.no_grad():
        for p in encoder.parameters():
            p.mul_(5 if p.ndim > 1 else 1)
    torch.save({"model": encoder.state_dict(), "config": encoder.config, "mean": MEAN, "std": STD,
                "method": "mae", "data": "shapes"}, path)


def plain_encoder(path):
    """The network of an encoder.pt as it is to be judged."""
    content = read(path)
    model = vit.ViT(**content["config"] | {"drop_path": 0.0})
    model.load_state_dict(content["model"])
    return model.eval()


@torch.no_grad()
def plain_tokens(train):
    """(n, 1 + N, D): what file.pt makes of the images of `colours`."""
    return plain_encoder("file.pt").forward_features(pictures(train)[0])


def which(found, known):
    """The row of `known` that each row of `found` is; none may be anything else."""
    distance = torch.cdist(found.flatten(1), known.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distance.min(1)
    assert nearest.values.max() < 1e-3, "features or pixels that no image has"
    return nearest.indices


class StillLoader(data.Loader):
    """Shows every image as it is."""

    def __init__(self, args, source, views, train=True):
        super().__init__(args, source, [data.View(view.size, view.count) for view in views], train)


def still(patch):
    """Views without chance; in iBOT the brightest patch of a crop is hidden, if it is bright at all."""
    shrink(patch)
    patch.setattr(data, "Loader", StillLoader)
    forward = ibot.IBOT.forward

    def hiding(model, crops, local_crops, mask, temp, patch_temp):
        bright = F.avg_pool2d(torch.cat(crops).mean(1, keepdim=True), 4).flatten(1)         # (G B, N)
        mask = (bright == bright.amax(1, keepdim=True)) & (bright > 0)
        return forward(model, crops, local_crops, mask, temp, patch_temp)
    patch.setattr(ibot.IBOT, "forward", hiding)


def listening(heard, script=None):
    """-> prepare: all calls of the probes are kept in `heard`: tokens, logits, the state in training or
    evaluation; script(number of the call, P, B, training) -> (P, B) says which answers are right.
    """
    def prepare(patch):
        frozen(patch)
        forward = vit.Probes.forward
        known = [(plain_tokens(train), pictures(train)[1]) for train in (False, True)]

        def listened(probes, layers):
            tokens, labels = known[probes.training]
            image = which(layers[-1], tokens)
            call = {"training": probes.training, "image": image, "tokens": layers[-1].clone(),
                    "y": labels[image], "state": state(probes)}
            logits = forward(probes, layers)
            if script:
                call["right"] = script(len(heard), *logits.shape[:2], probes.training)
                answer = (call["y"] + ~call["right"]) % 10
                logits = 0 * logits + F.one_hot(answer, 10)
            heard.append(call | {"logits": logits.detach()})
            return logits
        patch.setattr(vit.Probes, "forward", listened)
    return prepare


def state(probes):
    """Weights and statistics of every probe, in their order; [] for probes of another kind than linear."""
    return [{"weight": probe.head.weight.detach().clone(), "bias": probe.head.bias.detach().clone(),
             "mean": probe.norm.running_mean.clone(), "var": probe.norm.running_var.clone()}
            for probe in probes if not isinstance(probe.pool, vit.AttentivePool)]


def contrary(number, P, B, training):
    """Probes that are the better in the last epoch on the training images, the worse they were in the first
    one, are in the very last step, on rank 0 of two, and on the validation images.
    """
    order = torch.linspace(-1, 1, P)[torch.randperm(P, generator=torch.Generator().manual_seed(2))]
    last = training and 200 // (B * data.world_size()) <= number < 400 // (B * data.world_size()) - 1
    strength = -0.4 if not last else 0.45 if data.rank() == data.world_size() - 1 else -0.2
    g = torch.Generator().manual_seed(10 * number + data.rank())
    return torch.rand(P, B, generator=g) < 0.5 + strength * order[:, None]


# ---- two ranks ----

JOBS = {name: (command, still) for name, command in EQUAL.items()}
LISTENED = {"one step": (ONE_STEP, None), "scripted": (SCRIPTED, contrary)}


def child():
    """What each of two ranks does: all of JOBS and of LISTENED, in one process group."""
    for name in (*JOBS, *LISTENED):
        with pytest.MonkeyPatch.context() as patch:
            heard, (command, job) = [], (JOBS | LISTENED)[name]
            (job if name in JOBS else listening(heard, job))(patch)
            patch.setattr(torch.distributed, "destroy_process_group", lambda: None)
            main_of(f"{command} --output_dir 'two/{name}'", patch)
            torch.save(heard, f"two/{name}/heard.{data.rank()}")


@pytest.fixture(scope="module")
def world(tmp_path_factory, inputs):
    """A folder with file.pt, and with the runs of JOBS on one rank (one/) and of all jobs on two (two/)."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(inputs / "out", folder / "out")
    env = {name: value for name, value in os.environ.items() if name not in RANKS}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_encoder("file.pt")
        run(f"{VQKD} --max_steps 1 --output_dir first")         # the codes of k-means
        ranks = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for name, (command, prepare) in JOBS.items():
            run(f"{command} --output_dir one/{name}", prepare)
        said, _ = ranks.communicate()
    assert ranks.returncode == 0, said
    return folder


@pytest.fixture(autouse=True)
def file(elsewhere):  # noqa: F811
    """Every test finds file.pt where it works."""
    write_encoder("file.pt")


# ---- the judge ----

def test_evaluate_is_a_plain_computation():
    """Accuracy and cross-entropy over 1041 images, the last batch a small one, without drop path; a model in
    training stays in training.
    """
    torch.manual_seed(0)
    model = vit.ViT(8, 4, embed_dim=32, depth=2, num_heads=2, num_classes=10, drop_path=0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    imgs, labels = torch.randint(256, (1041, 3, 8, 8), dtype=torch.uint8), torch.randint(10, (1041,))
    found = vit.evaluate(ARGS, model.train(), data.Images(imgs, labels, list("0123456789"), MEAN, STD))
    assert model.training and model.blocks[1].training
    with torch.no_grad():
        logits = model.eval()(normalised(imgs, MEAN, STD))
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item() * 100)
    assert found["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


@torch.no_grad()
def test_probes_are_judged_with_their_statistics():
    """BatchNorm's mean and variance, set by hand, are what the validation images are normalised with, and
    nothing of the judged probes or of the encoder changes; the probe that was right most often reports.
    """
    torch.manual_seed(0)
    encoder = plain_encoder("file.pt")
    imgs, labels = torch.randint(256, (541, 3, 8, 8), dtype=torch.uint8), torch.randint(10, (541,))
    val_set = data.Images(imgs, labels, list("0123456789"), MEAN, STD)
    tokens, wanted = encoder.forward_features(normalised(imgs, MEAN, STD)), {}
    probes = vit.Probes(vit.Probe(feature, 32, 10, blr=blr)
                        for blr in (1.0, 10.0) for feature in ("cls", "mean"))
    for probe in probes:
        name = f"{probe.feature} {probe.blr:g}"
        x = tokens[:, 0] if "cls" in name else tokens[:, 1:].mean(1)
        probe.norm.running_mean.copy_(x.mean(0) + torch.randn(32))
        probe.norm.running_var.copy_(4 * torch.rand(32) + 0.1)
        probe.head.weight.normal_()
        z = (x - probe.norm.running_mean) / (probe.norm.running_var + 1e-6).sqrt()
        wanted[name] = ((z @ probe.head.weight.T + probe.head.bias).argmax(1) == labels).double().mean() * 100
    probes.register_buffer("right", torch.tensor([3.0, 9.0, 8.0, 4.0]))
    before = copy.deepcopy(probes.state_dict())
    result = vit.judge_probes(ARGS, encoder, probes.train(), val_set)
    assert result["all"] == pytest.approx({name: value.item() for name, value in wanted.items()})
    assert same(dict(probes.state_dict()), dict(before)) and len(set(wanted.values())) == 4
    assert (result["cls_blr"], result["mean_blr"]) == (10, 1)
    assert (result["cls"], result["mean"]) == (result["all"]["cls 10"], result["all"]["mean 1"])


def judged(folder, heard):
    """Check the result of scripted probes, heard on each rank, against plain counts."""
    result = json.loads(Path(folder, "result.json").read_text())
    val = [call for calls in heard for call in calls if not call["training"]]
    train = [[call for call in calls if call["training"]] for calls in heard]
    last = [call for calls in train for call in calls[len(calls) // 2:]]
    assert torch.cat([call["image"] for call in val]).sort().values.tolist() == list(range(41))
    hits = torch.cat([call["right"] for call in val], 1).double().mean(1) * 100
    names = list(result["all"])
    assert list(result["all"].values()) == pytest.approx(hits.tolist())
    seen = torch.cat([call["image"] for call in last])
    assert sorted(seen.tolist()) == list(range(200)), "the last epoch shows every training image once"
    right = dict(zip(names, torch.cat([call["right"] for call in last], 1).sum(1).tolist()))
    for feature in {name.split()[0] for name in names}:
        best = max((name for name in names if name.split()[0] == feature), key=right.get)
        assert result[f"{feature}_blr"] == float(best.split()[1])
        assert result[feature] == result["all"][best]
        assert result[feature] == min(v for name, v in result["all"].items() if name.split()[0] == feature)
    if "best" in result:
        best = max(names, key=right.get)
        assert (result["best"], result["best_feature"]) == (result["all"][best], best.split()[0])
    return len(names)


@pytest.mark.parametrize("flags, probes", (("", 4), ("--accum_steps 4", 4), ("--layers all", 12),
                                           ("--mode attentive", 2)))
def test_training_images_choose_the_learning_rate(flags, probes):
    """Probes whose answers are prescribed: of each feature that is reported which was right most often on the
    training images of the last epoch, though the validation images say the opposite.
    """
    heard = []
    run(f"{SCRIPTED} {flags} --output_dir run", listening(heard, contrary))
    assert judged("run", [heard]) == probes


def test_training_images_of_all_ranks_choose_the_learning_rate(world):
    """The same on two ranks, of which the first alone would choose otherwise."""
    folder = world / "two/scripted"
    assert judged(folder, [read(folder / f"heard.{rank}") for rank in (0, 1)]) == 4


def bn_logits(tokens, name, part, mean, var):
    """A linear probe in plain: (B, 1 + N, D) -> (B, K)"""
    x = tokens[:, 0] if name.startswith("cls") else tokens[:, 1:].mean(1)
    mean, var = (x.mean(0), x.var(0, unbiased=False)) if mean is None else (mean, var)
    return (x - mean) / (var + 1e-6).sqrt() @ part["weight"].T + part["bias"]


@pytest.mark.parametrize("way", ("--accum_steps 4", "two ranks"))
def test_one_step_of_the_probes(way, request):
    """One step of SGD on the mean of the parts and ranks, BatchNorm's statistics from one part after the
    other, averaged over the ranks, and an accuracy with these on 41 validation images: all in plain.
    """
    if way == "two ranks":
        folder = request.getfixturevalue("world") / "two/one step"
        heard = [read(folder / f"heard.{rank}") for rank in (0, 1)]
    else:
        folder, heard = Path("run"), [[]]
        run(f"{ONE_STEP} {way} --output_dir run", listening(heard[0]))
    result = json.loads((folder / "result.json").read_text())["all"]
    parts = [[call for call in calls if call["training"]] for calls in heard]
    asked = [call for calls in heard for call in calls if not call["training"]]
    for calls, images in ((sum(parts, []), 200), (asked, 41)):
        assert sorted(torch.cat([call["image"] for call in calls]).tolist()) == list(range(images))
    n = len(parts) * len(parts[0])
    assert n == (2 if way == "two ranks" else 4) and len(result) == 4
    for i, (name, accuracy) in enumerate(result.items()):
        first, after = parts[0][0]["state"][i], asked[0]["state"][i]
        assert all(same(call["state"][i], after) for call in asked), "the ranks judge one probe"
        weights = {key: first[key].clone().requires_grad_() for key in ("weight", "bias")}
        sum(F.cross_entropy(bn_logits(call["tokens"], name, weights, None, None), call["y"]) / n
            for calls in parts for call in calls).backward()
        for key, p in weights.items():  # Nesterov's first step is 1 + momentum gradients long
            wanted = p.detach() - 0.5 * float(name.split()[1]) * 1.9 * p.grad
            assert (after[key] - wanted).norm() < 1e-4 * wanted.norm(), (name, key)
        mean, var = 0, 0
        for calls in parts:
            m, v = torch.zeros(32), torch.ones(32)
            for call in calls:
                x = call["tokens"][:, 0] if name.startswith("cls") else call["tokens"][:, 1:].mean(1)
                m, v = 0.9 * m + 0.1 * x.mean(0), 0.9 * v + 0.1 * x.var(0)
            mean, var = mean + m / len(parts), var + v / len(parts)
        assert torch.allclose(after["mean"], mean, atol=1e-5) and torch.allclose(after["var"], var, atol=1e-5)
        logits = [bn_logits(call["tokens"], name, after, mean, var) for call in asked]
        assert all((found - call["logits"][i]).abs().max() < 1e-3 for found, call in zip(logits, asked))
        hits = sum(int((found.argmax(1) == call["y"]).sum()) for found, call in zip(logits, asked))
        assert accuracy == pytest.approx(hits / 41 * 100)


def test_a_share_of_the_labels():
    """--label_fraction 0.2: four images of every class, the same ones in both epochs."""
    heard = []
    run(f"{SCRIPTED} --label_fraction 0.2 --output_dir run", listening(heard))
    images = [call["image"] for call in heard if call["training"]]
    assert len(images) == 4
    first, second = (sorted(torch.cat(images[i:i + 2]).tolist()) for i in (0, 2))
    assert first == second and len(set(first)) == 40
    assert pictures(True)[1][first].bincount().tolist() == [4] * 10


@pytest.mark.parametrize("drop_path", (0.9, 0.0))
def test_finetuning_drops_paths_in_training_only(drop_path):
    """The same images twice give other logits in training with --drop_path 0.9, whatever the file has, and
    the same ones in evaluation; both sets are normalised as the file says, and the result is a plain
    computation on the weights that are kept.
    """
    seen = []

    def prepare(patch):
        colourful(patch)
        forward = vit.ViT.forward

        def twice(model, imgs):
            before = torch.random.get_rng_state()
            logits, again = forward(model, imgs), forward(model, imgs)
            torch.random.set_rng_state(before)
            seen.append((torch.is_grad_enabled(), imgs, torch.equal(logits, again)))
            return logits
        patch.setattr(vit.ViT, "forward", twice)
    run(f"{FINETUNE} --drop_path {drop_path} --label_fraction 0.2 --output_dir run", prepare)
    trained, judged = ([(imgs, certain) for training, imgs, certain in seen if training == kind]
                       for kind in (True, False))
    assert [certain for _, certain in trained] == [drop_path == 0] * 4
    assert [certain for _, certain in judged] == [True] * 3       # at the start, after both epochs
    images = which(torch.cat([imgs for imgs, _ in trained]), pictures(True)[0])
    assert images.unique().numel() == 40 and images.bincount().unique().tolist() == [0, 2]
    assert which(judged[-1][0], pictures(False)[0]).tolist() == list(range(41))
    content, result = read("run/encoder.pt"), json.loads(Path("run/result.json").read_text())
    assert (content["mean"], content["std"]) == (MEAN, STD)
    with torch.no_grad():
        logits, labels = plain_encoder("run/encoder.pt")(pictures(False)[0]), pictures(False)[1]
    assert result["accuracy"] == pytest.approx((logits.argmax(1) == labels).double().mean().item() * 100)
    assert result["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def official(prefix, **more):
    """Turns the content of an encoder.pt into a file of others, whose names begin so."""
    return lambda content: {"model": more | {prefix + name: v for name, v in content["model"].items()}}


FILES = {  # what becomes of the content of an encoder.pt, and whether fc_norm starts as its norm
    "our CAE": (lambda content: content | {"method": "cae"}, True),
    "our MAE": (lambda content: content, False),
    "our iBOT": (lambda content: content | {"method": "ibot"}, False),
    "CAE": (official("encoder."), True),
    "timm": (official(""), False),
    "DINO": (official("backbone."), False),
    "MAE": (official("", mask_token=torch.zeros(1, 1, 4)), False)}


@pytest.mark.parametrize("kind", FILES)
def test_the_norm_of_cae_goes_on_in_finetuning(kind):
    """At the start of --mode finetune `fc_norm` of the mean is the file's `norm` if CAE made the file, else
    new; with --pool cls, and in the other modes, `norm` is the file's for all."""
    class Enough(Exception):
        pass
    change, kept = FILES[kind]
    content, heard = read("file.pt"), []
    torch.manual_seed(1)
    norm = {name: torch.randn(32) for name in ("weight", "bias")}
    content["model"] |= {f"norm.{name}": value for name, value in norm.items()}
    torch.save(change(content), "file.pt")

    def begun(args, train_set, val_set, model):
        heard.append(model)
        raise Enough

    def prepare(patch):
        colourful(patch)
        patch.setattr(vit, "supervised", begun)
        patch.setattr(vit, "probe", begun)
    for command in (f"{FINETUNE} --pool mean", f"{FINETUNE} --pool cls", f"{PROBE} --mode linear"):
        with pytest.raises(Enough):
            run(f"{command} --output_dir run{len(heard)}", prepare)
    mean, cls, probed = heard
    for name, value in norm.items():
        new = torch.full((32,), float(name == "weight"))
        assert torch.equal(getattr(mean.fc_norm, name), value if kept else new), name
        assert torch.equal(getattr(cls.norm, name), value) and torch.equal(getattr(probed.norm, name), value)
    assert all(isinstance(layer, torch.nn.Identity) for layer in (mean.norm, cls.fc_norm, probed.fc_norm))


def ridge(x, y, num_classes, penalty):
    """In the place of logistic regression what has a formula: one-hot labels, fitted by least squares."""
    layer = torch.nn.Linear(x.shape[1], num_classes)
    x, target = F.pad(x.double(), (0, 1), value=1.0), F.one_hot(y, num_classes).double()
    W = torch.linalg.solve(x.T @ x + 9 * penalty * len(x) * torch.eye(x.shape[1]), x.T @ target)
    with torch.no_grad():
        layer.weight.copy_(W[:-1].T)
        layer.bias.copy_(W[-1])
    return layer


@pytest.mark.parametrize("layers", ("last", "all"))
def test_training_images_choose_the_penalty(layers):
    """Of each feature, standardised as the training images are: the accuracy on all validation images of what
    all training images teach, with the penalty that was right most often on every tenth of them when the
    others taught; of all features these choose the best, too. The images come in the set's order, as they
    are, normalised as the file says."""
    asked, kept = [], []

    def prepare(patch):
        frozen(patch)
        patch.setattr(vit, "fit_logistic", lambda x, *rest: asked.append(len(x)) or ridge(x, *rest))
    run(f"{LBFGS} --layers {layers} --output_dir run", prepare)
    result = json.loads(Path("run/result.json").read_text())
    encoder, sets = plain_encoder("file.pt"), [pictures(train) for train in (True, False)]
    with torch.no_grad():
        outputs = [encoder.forward_layers(encoder.patch_embed(imgs)) for imgs, _ in sets]
        final = [encoder.norm(blocks[-1]) for blocks in outputs]
    tokens = {"": final} | ({f"-{i + 1}": [blocks[i] for blocks in outputs] for i in (0, 1)}
                            if layers == "all" else {})
    (y, val_y), tenth = [labels for _, labels in sets], torch.arange(200) % 10 == 0
    for number, (a, b) in tokens.items():
        for feature, pool in (("cls", lambda t: t[:, 0]), ("mean", lambda t: t[:, 1:].mean(1))):
            x, val_x = ((pool(t) - pool(a).mean(0)) / pool(a).std(0) for t in (a, b))
            right = [(ridge(x[~tenth], y[~tenth], 10, penalty)(x[tenth]).argmax(1) == y[tenth]).sum().item()
                     for penalty in vit.PENALTIES]
            penalty = vit.PENALTIES[right.index(max(right))]
            hits = (ridge(x, y, 10, penalty)(val_x).argmax(1) == val_y).sum().item()
            name = feature + number
            assert result["penalties"][name] == penalty, (name, right)
            assert result[name] == pytest.approx(hits / 41 * 100), name
            kept.append((name, max(right), right))
    assert asked == len(kept) * (5 * [180] + [200])
    assert any(len(set(right)) > 1 for *_, right in kept), "the penalties are all alike"
    if layers == "all":
        most = max(right for _, right, _ in kept)
        assert result["best_feature"] in [name for name, right, _ in kept if right == most]
        assert result["best"] == result[result["best_feature"]]
    assert ("best" in result) == (layers == "all")


# ---- k-NN ----

def voted(bank, labels, x, y, k):
    """Accuracy in % of the weighted vote, one image after the other."""
    cosine = F.normalize(x.double(), dim=1) @ F.normalize(bank.double(), dim=1).T
    right = 0
    for row, label in zip(cosine, y.tolist()):
        near = row.argsort(descending=True)[:k]
        votes = torch.zeros(10, dtype=torch.double).index_add(0, labels[near], (row[near] / 0.07).exp())
        right += int(votes.argmax()) == label
    return right / len(y) * 100


@pytest.mark.parametrize("fraction", (1.0, 0.2))
def test_knn_is_a_plain_vote_of_the_training_images(fraction):
    """Labels of the bank vote, those of the validation images, half of them wrong, count; both sets are
    normalised as the file says; --label_fraction leaves the same share of every class.
    """
    gathered = []

    def prepare(patch):
        frozen(patch)
        encode = data.encode
        patch.setattr(data, "encode", lambda *args: gathered.append(encode(*args)) or gathered[-1])
    run(f"{JUDGE} --mode knn --init file.pt --label_fraction {fraction} --output_dir run", prepare)
    (bank, bank_labels), (x, y) = gathered
    tokens, labels = plain_tokens(True), pictures(True)[1]
    images = which(bank, torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1))
    assert torch.equal(labels[images], bank_labels) and len(images.unique()) == 200 * fraction
    assert bank_labels.bincount().tolist() == [20 * fraction] * 10
    queries, y = plain_tokens(False), pictures(False)[1]
    result = json.loads(Path("run/result.json").read_text())
    ks = (10, 20, 100, 200) if fraction == 1 else (10, 20)
    assert {name for name in result if "_k" in name} == {f"{f}_k{k}" for f in ("cls", "mean") for k in ks}
    for k in ks:
        for feature, pool in (("cls", lambda t: t[:, 0]), ("mean", lambda t: t[:, 1:].mean(1))):
            wanted = voted(pool(tokens[images]), bank_labels, pool(queries), y, k)
            assert result[f"{feature}_k{k}"] == pytest.approx(wanted), (feature, k)


def test_knn_monitor_is_a_plain_vote_of_the_training_images():
    """Of features without drop path, each set normalised by its own mean and std; a model in training stays
    in training.
    """
    model, stats = vit.ViT(**read("file.pt")["config"]), ((MEAN, STD), ((0.5,) * 3, (0.4,) * 3))
    model.load_state_dict(read("file.pt")["model"])
    sets = [data.Images(*colours(n, 8, 0), list("0123456789"), *own) for n, own in zip((5000, 1000), stats)]
    found = data.knn_monitor(ARGS, model.train(), *sets)
    assert model.training and model.blocks[1].training
    with torch.no_grad():
        bank, x = (plain_encoder("file.pt").features(pictures(n, own)[0])
                   for n, own in zip((True, False), stats))
    wanted = voted(bank, pictures(True)[1], x, pictures(False)[1], 20)
    assert found["knn"] == pytest.approx(wanted) and 10 < wanted < 90
    share = torch.linalg.svdvals(bank.double()) / torch.linalg.svdvals(bank.double()).sum()
    assert found["rank"] == pytest.approx((-(share * share.log()).sum()).exp().item(), rel=1e-4)


@pytest.mark.parametrize("name", ("mae", "beit", "cae", "ibot", "beit_v2"))
def test_training_images_are_the_bank_of_every_monitor(name):
    """Each method logs the vote of the 208 training images on the 41 validation images, the rank of what they
    vote by, and of iBOT the student's vote, too.
    """
    asked = []

    def prepare(patch):
        shrink(patch)
        monitor = data.knn_monitor

        def watched(args, model, train_set, val_set, **options):
            asked.append((len(train_set), len(val_set), monitor(args, model, train_set, val_set, **options)))
            return asked[-1][-1]
        patch.setattr(data, "knn_monitor", watched)
    run(f"{METHODS[name]} --max_steps 1 --output_dir run", prepare)
    assert {sizes[:2] for sizes in asked} == {(208, 41)}
    found = [result for *_, result in asked]
    if name == "ibot":
        found = [a | {"knn_student": b["knn"]} for a, b in zip(found[::2], found[1::2])]
    logged = [line for line in log_of("run") if "knn" in line]
    assert len(logged) == len(found) == 2
    for line, result in zip(logged, found):
        assert {key: line[key] for key in result} == pytest.approx(result, rel=1e-4)
        assert 1 <= line["rank"] <= 32


# ---- parts and ranks ----

@pytest.mark.parametrize("way", ("four", "two"))
@pytest.mark.parametrize("name", EQUAL)
def test_parts_and_ranks_are_one_large_batch(name, way, world, tmp_path):
    """--accum_steps 4, and two ranks: losses, gradients, weights, iBOT's centres, VQ-KD's codes and how often
    they were hit, running averages and the result of the undivided batch on one rank.
    """
    single, folder = world / "one" / name, world / way / name
    if way == "four":
        folder = tmp_path / "four"
        with guarded() as patch:
            patch.chdir(world)
            run(f"{EQUAL[name]} --accum_steps 4 --output_dir {folder}", still)
    assert_near(folder, single, 5e-5)
    a, b = read(folder / "last.pt"), read(single / "last.pt")
    moved = {"ibot": ("centre", "patch_centre"), "vqkd": ("quantizer.codebook", "quantizer.hits")}
    first = read(world / "first/last.pt")["model"] if name == "vqkd" else {}
    for key in moved.get(name, ()):
        assert (b["model"][key] - first.get(key, 0)).abs().max() > 1e-3, f"{key} has not moved"
    if name == "train":
        assert all((a["ema"][key] - b["ema"][key]).norm() <= 1e-4 * (b["ema"][key].norm() + 1e-2)
                   for key in b["ema"])
        results = [json.loads((run / "result.json").read_text()) for run in (folder, single)]
        assert all(results[0][key] == pytest.approx(results[1][key], rel=1e-4)
                   for key in ("accuracy", "val_loss"))
        content = read(single / "encoder.pt")
        imgs, labels = data.draw_shapes(41, 8, 1)
        with torch.no_grad():
            logits = plain_encoder(single / "encoder.pt")(normalised(imgs, content["mean"], content["std"]))
        assert results[1]["accuracy"] == pytest.approx(
            (logits.argmax(1) == labels).double().mean().item() * 100)
        assert results[1]["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


if __name__ == "__main__":
    child()


def test_the_monitor_reads_a_share_of_the_images(monkeypatch):
    """10,000 training images, or 50 a class, and a quarter as many validation images: the same ones at every
    call, however long the run is: k-NN of a bank of 5,000 reads ten points less than of one of 50,000."""
    asked = []

    def encode(args, features, source):
        asked.append(source.imgs.flatten().tolist())
        return torch.eye(10)[source.labels], source.labels
    monkeypatch.setattr(data, "encode", encode)

    def images(n):
        return data.Images(torch.arange(n).view(n, 1), torch.arange(n) % 10, [*map(str, range(classes))],
                           0, 1)
    model = torch.nn.Identity()
    model.features = None
    for epochs, n, classes, bank, judged in ((1, 60_000, 10, 10_000, 2_500), (900, 50_000, 10, 10_000, 2_500),
                                             (900, 60_000, 1_000, 50_000, 3_000), (1, 500, 10, 500, 400)):
        val = images(min(3_000, 400 if n == 500 else 3_000))
        for _ in range(2):
            assert data.knn_monitor(SimpleNamespace(epochs=epochs), model, images(n), val)["knn"] == 100
        assert [len(part) for part in asked] == 2 * [bank, judged] and asked[:2] == asked[2:]
        assert all(len(set(part)) == len(part) for part in asked)
        asked.clear()
