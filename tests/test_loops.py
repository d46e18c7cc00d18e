"""What the training loops ask for, step by step, against formulas written out here; what they judge and save.

Every script runs once for twelve steps, four epochs of three, each of two accumulated parts, with all
schedules bent within them. `watch` notes from outside what reaches the model and the optimizer; the tests
read its notes, log.jsonl and the files of the run. No formula is taken from the scripts.
"""
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from test_runs import BEIT, BEIT2, CAE, DVAE, IBOT, LINEAR, MAE, TRAIN, VQKD, log_of, read, run, same, shrink
import beit
import beit_v2
import cae
import data
import dvae
import ibot
import mae
import vit

EPOCHS, EPOCH_STEPS, STEPS, PARTS, BATCH = 4, 3, 12, 2, 68      # 208 images
LR, MIN_LR, WARMUP, DECAY, DECAY_END = 4e-3, 1e-3, 4, 0.1, 0.3  # the warm-up in steps: an epoch and a third
SIZE, GRID, CODES, CODE_DIM = dict(embed_dim=16, depth=3, num_heads=2), 4, 600, 8
COMMON = (f"--patch_size 2 --epochs {EPOCHS} --batch_size {BATCH} --accum_steps {PARTS} --seed 3 "
          f"--warmup_epochs {WARMUP / EPOCH_STEPS} --eval_every {EPOCHS} --save_every {EPOCHS} --log_every 1")
ADAM = f"{COMMON} --lr {LR} --min_lr {MIN_LR} --weight_decay {DECAY}"
PATCHES = "--num_masked 7 --min_block 3 --layer_scale 0.1 --drop_path 0.3 --crop_scale 0.4"
LABELS = ("--beta2 0.97 --mixup 0 --cutmix 0 --smoothing 0.2 --erase 0 --rand_augment 0 --crop_scale 0.5 "
          "--drop_path 0.3")
RATIOS = "--pred_ratio 0 0.5 --pred_ratio_var 0 0.1"            # hides nothing, or 6.4 to 9.6 of 16 patches
BLRS = "--blrs 3 30"
OTHER = "--warmup_temp_epochs 30 --pred_start_epoch 0 --pred_shape rand"    # a second run of iBOT
COMMANDS = {
    "mae": f"{MAE} {ADAM} --mask_ratio 0.7 --sampling random",
    "dvae": f"{DVAE} {ADAM} --beta 6 --beta_warmup 0.3 --tau 0.1 --tau_anneal 0.6 --ema 0.45",
    "beit": f"{BEIT} {ADAM} {PATCHES} --masking block",
    "cae": f"{CAE} {ADAM} {PATCHES} --masking block --momentum 0.9",
    "ibot": (f"{IBOT} {ADAM} {RATIOS} --weight_decay_end {DECAY_END} --momentum 0.7 --no-norm_last_layer "
             "--freeze_last_layer 2 --teacher_temp_start 0.04 --teacher_temp 0.06 --patch_temp 0.1 "
             "--warmup_temp_epochs 3 --pred_start_epoch 1 --pred_shape block --drop_path 0.3"),
    "vqkd": f"{VQKD} {ADAM} --num_codes {CODES} --code_dim {CODE_DIM} --decay 0.8 --restart 3",
    "beit_v2": f"{BEIT2} {ADAM} {PATCHES} --early_layer 2 --beta2 0.97",
    "train": f"{TRAIN} {ADAM} {LABELS} --ema 0.9 --layer_decay 1",
    "finetune": (f"{TRAIN} {ADAM} {LABELS} --mode finetune --init out/mae-shapes/encoder.pt --ema 0 "
                 "--layer_decay 0.5"),
    "linear": f"{LINEAR} {COMMON} {BLRS} --blr 0.5 --min_lr 0 --optimizer sgd",
}
KINDS = {"mae": mae.MAE, "dvae": dvae.DVAE, "beit": beit.BEiT, "cae": cae.CAE, "ibot": ibot.IBOT,
         "vqkd": beit_v2.VQKD, "beit_v2": beit_v2.BEiTv2, "train": vit.ViT, "finetune": vit.ViT}
BETA2 = {"mae": 0.95, "vqkd": 0.99, "beit_v2": 0.97, "train": 0.97, "finetune": 0.97}
CLIP = {"mae": 2, "dvae": 0.4, "beit": 2.3, "cae": 5, "ibot": 0.02, "vqkd": 4, "beit_v2": 2.5, "train": 0.43,
        "finetune": 0.37}                                       # some gradients are longer, some are not
FIXED = {"mae": "pos_embed", "cae": "pos_embed|^teacher", "ibot": "^teacher"}               # do not train
TEACHER = "teacher.encoder."                                    # names inside the models, all of them here
EVERY_DECAY = ("mae", "cae", "ibot")                            # positions and class token decay, too
EARLY = ("beit", "cae", "ibot", "vqkd", "beit_v2")              # a warm-up ends with the peak: BEiT's, iBOT's


def is_prototype(name):
    return "last_layer" in name


# ---- the runs ----

def watch(command, kind=None):
    """Run a command. -> the notes of every step (parts, groups, gradients, weights before and after), the
    k-NN monitor's features, the validation images and, of probes, logits and labels.
    """
    notes = SimpleNamespace(steps=[], knn=[], parts=[], answers=[])
    cross_entropy = F.cross_entropy
    forward, monitor, init = kind and kind.forward, data.knn_monitor, data.Loader.__init__

    def watched(model, *inputs):
        if not torch.is_grad_enabled():                         # an evaluation
            return forward(model, *inputs)
        assert model.training
        part = SimpleNamespace(model=model, inputs=inputs)
        part.buffers = {name: value.clone() for name, value in model.named_buffers()}
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if kind is vit.ViT:                                     # the loss is made outside, so its gradient is
            with torch.random.fork_rng(devices=[]):             # kept, and a twin of the logits
                twin = forward(model, *inputs)
            part.output = forward(model, *inputs)
            part.output.register_hook(lambda g: part.__dict__.update(gradient=g, raw=dict(zip(
                weights, torch.autograd.grad(twin, list(weights.values()), g)))))
        else:
            part.output = forward(model, *inputs)
            part.raw = dict(zip(weights, torch.autograd.grad(
                part.output[0], list(weights.values()), retain_graph=True, allow_unused=True)))
        notes.parts.append(part)
        return part.output

    def weights_of(optimizer):
        if notes.parts:
            return dict(notes.parts[0].model.named_parameters())
        return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))

    def copies(tensors):
        return {name: value.detach().clone() for name, value in tensors.items() if value is not None}

    def before(optimizer, args, kwargs):
        weights = weights_of(optimizer)
        names = {id(p): name for name, p in weights.items()}
        groups = [(names[id(p)], {key: value for key, value in group.items() if key != "params"})
                  for group in optimizer.param_groups for p in group["params"]]
        notes.steps.append(SimpleNamespace(
            kind=type(optimizer), parts=notes.parts, groups=groups, before=copies(weights),
            grads=copies({name: p.grad for name, p in weights.items()})))

    def after(optimizer, args, kwargs):
        notes.steps[-1].after, notes.parts = copies(weights_of(optimizer)), []

    def knn(args, model, train_set, val_set, **options):
        result = monitor(args, model, train_set, val_set, **options)
        if "rank" in result:                                    # neither of codes nor of iBOT's student
            training = model.training
            model.eval()
            with torch.no_grad():
                notes.knn.append((result, model.features(pixels(train_set)), model.features(pixels(val_set))))
            model.train(training)
            notes.sets = train_set, val_set
        return result

    def loader(self, args, source, views, train=True):
        if not train:
            notes.val_set = source
        init(self, args, source, views, train)

    def answered(logits, labels, **options):
        if torch.is_grad_enabled():
            notes.answers.append((logits.detach(), labels))
        return cross_entropy(logits, labels, **options)

    def prepare(patch):
        shrink(patch)
        patch.setitem(vit.SIZES, "micro", SIZE)
        patch.setattr(Figure, "savefig", lambda *args, **options: None)
        patch.setattr(data, "knn_monitor", knn)
        patch.setattr(data.Loader, "__init__", loader)
        if kind:
            patch.setattr(kind, "forward", watched)
        else:
            patch.setattr(F, "cross_entropy", answered)

    hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        run(command, prepare)
    finally:
        for hook in hooks:
            hook.remove()
    return notes


def pixels(source):
    """All images of a set as a model sees them in evaluation."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (source.mean, source.std))
    return (source.imgs.float() / 255 - mean) / std


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with what scripts look for below out/: an untrained tokenizer of each kind, and a teacher."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    models = {"dvae-shapes/tokenizer.pt": ("dvae", dvae.DVAE(grid=GRID, stride=2, n_hid=8, vocab=16)),
              "mae-shapes/encoder.pt": ("mae", vit.ViT(8, 2, **SIZE)),
              "beit_v2-tokenizer-shapes/tokenizer.pt": ("beit_v2", beit_v2.VQKD(
                  vit.ViT(8, 2, **SIZE), 16, 4, 1, 16))}
    for path, (method, model) in models.items():
        path = folder / "out" / path
        path.parent.mkdir(parents=True)
        torch.save({"model": model.state_dict(), "config": model.config, "method": method,
                    "mean": (0.4, 0.5, 0.6), "std": (0.3, 0.2, 0.25)}, path)
    return folder


@pytest.fixture(scope="module")
def runs(world):
    """runs(name): the notes of the run of COMMANDS[name], made once; runs(name, flags): of another one."""
    kept = {}

    def notes_of(name, flags=""):
        if (name, flags) not in kept:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(world)
                folder = world / f"run{len(kept)}"
                clip = f"--clip_grad {CLIP[name]}" if name in CLIP else ""
                command = f"{COMMANDS[name]} {clip} {flags} --output_dir {folder}"
                kept[name, flags] = watch(command, KINDS.get(name))
                kept[name, flags].folder = folder
        return kept[name, flags]
    return notes_of


# ---- the formulas ----

def half_cosine(done, start, end):
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def lr_at(step, name, peak=LR, least=MIN_LR):
    """Linear from 0 in the warm-up, then half a cosine from the peak to the least."""
    ramp = np.linspace(0, peak, WARMUP, endpoint=name in EARLY)
    return ramp[step] if step < WARMUP else half_cosine((step - WARMUP) / (STEPS - WARMUP), peak, least)


def decay_of(name, p, method, step):
    """No bias, norm or other vector decays; positions and class token do in some methods only."""
    if p.ndim < 2 or (method not in EVERY_DECAY and re.search(r"(^|\.)(cls_token|pos_embed)$", name)):
        return 0.0
    return half_cosine(step / STEPS, DECAY, DECAY_END) if method == "ibot" else DECAY


def scale_of(name, method):
    """--layer_decay 0.5 of fine-tuning: the head has 1, each layer below half of the one above."""
    if method != "finetune":
        return 1.0
    if name.startswith("blocks."):
        return 0.5 ** (SIZE["depth"] - int(name.split(".")[1]))
    return 1.0 if name.startswith(("head", "norm", "fc_norm")) else 0.5 ** (SIZE["depth"] + 1)


# ---- every step ----

@pytest.mark.parametrize("name", KINDS)
def test_learning_rate_decay_and_betas_of_every_weight(name, runs):
    """In all twelve steps, for every weight that trains; no other weight is in a group, and none twice."""
    notes = runs(name)
    assert len(notes.steps) == STEPS
    for step, note in enumerate(notes.steps):
        assert note.kind is torch.optim.AdamW and len(note.parts) == PARTS
        wanted = {weight for weight in note.before if not re.search(FIXED.get(name, "^$"), weight)}
        assert len(note.groups) == len(wanted) and dict(note.groups).keys() == wanted
        for weight, group in note.groups:
            assert group["lr"] == pytest.approx(lr_at(step, name) * scale_of(weight, name)), (step, weight)
            assert group["weight_decay"] == pytest.approx(
                decay_of(weight, note.before[weight], name, step)), (step, weight)
            assert group["betas"] == (0.9, BETA2.get(name, 0.999)) and group["eps"] == 1e-8


@pytest.mark.parametrize("name", KINDS)
def test_gradients_when_the_optimizer_steps(name, runs):
    """They are the mean over the parts of this step alone, clipped: all together, iBOT's each by itself."""
    clipped = []
    for step, note in enumerate(runs(name).steps):
        raw = {weight: sum(part.raw[weight] for part in note.parts) / (1 if KINDS[name] is vit.ViT else PARTS)
               for weight, _ in note.groups if note.parts[0].raw[weight] is not None}
        norm = torch.stack([g.norm() for g in raw.values()]).norm()
        for weight, g in raw.items():
            if name == "ibot" and is_prototype(weight) and step < 2 * EPOCH_STEPS:
                continue                                        # see below
            size = g.norm() if name == "ibot" else norm
            wanted = g * min(1.0, CLIP[name] / (size + 1e-6))
            clipped.append((weight, bool(size > CLIP[name])))
            assert (note.grads[weight] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-8, (step, weight)
        assert note.grads.keys() <= raw.keys()
    assert {longer for _, longer in clipped} == {True, False}, "the limit says nothing here"
    assert name != "ibot" or ("masked_embed", True) in clipped


@pytest.mark.parametrize("name", [*KINDS, "linear"])
def test_log_holds_the_loss_and_the_rate_of_each_step(name, runs):
    """log.jsonl: the mean of the losses of the parts, and the learning rate that the optimizer had."""
    notes = runs(name)
    lines = {line["step"]: line for line in log_of(notes.folder) if "loss" in line}
    assert list(lines) == list(range(1, STEPS + 1))
    for step, note in enumerate(notes.steps):
        peak, least = (0.5 * BATCH / 256, 0) if name == "linear" else (LR, MIN_LR)
        assert lines[step + 1]["lr"] == pytest.approx(lr_at(step, name, peak, least), rel=1e-5)
        if name not in ("train", "finetune", "linear"):
            loss = sum(part.output[0].item() for part in note.parts) / PARTS
            assert lines[step + 1]["loss"] == pytest.approx(loss, rel=1e-4)


def test_linear_probes_have_a_rate_each(runs):
    """SGD with Nesterov momentum: a probe's rate is its number of --blrs times blr * batch / 256."""
    notes = runs("linear")
    assert len(notes.steps) == STEPS
    saved = read(notes.folder / "last.pt")["model"]
    names = list(json.loads((notes.folder / "result.json").read_text())["all"])
    assert names == ["cls 3", "mean 3", "cls 30", "mean 30"]
    assert {key.split(".")[0] for key in saved if key.endswith("weight")} == set("0123")
    for step, note in enumerate(notes.steps):
        assert note.kind is torch.optim.SGD and len(note.groups) == 2 * len(names)
        for weight, group in note.groups:
            final = notes.steps[-1].after[weight]
            (key,) = [key for key in saved if saved[key].shape == final.shape and (saved[key] == final).all()]
            peak = float(names[int(key.split(".")[0])].split()[1]) * 0.5 * BATCH / 256
            assert group["lr"] == pytest.approx(lr_at(step, "linear", peak, 0)), (step, key)
            assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 0)
            assert step == 0 or (note.before[weight] != note.after[weight]).any()


def test_gradients_of_linear_probes(runs):
    """Those of the biases, when the optimizer steps: the mean of softmax - target over the step's images."""
    notes = runs("linear")
    for step, note in enumerate(notes.steps):
        biases = [note.grads[weight] for weight, _ in note.groups if note.before[weight].ndim == 1]
        answers = notes.answers[step * PARTS * len(biases):]
        for i, found in enumerate(biases):
            wanted = sum((logits.softmax(1) - F.one_hot(labels, 10)).mean(0)
                         for logits, labels in answers[i:PARTS * len(biases):len(biases)]) / PARTS
            assert torch.allclose(found, wanted, atol=1e-6), (step, i)


def test_the_best_linear_probe_is_chosen_on_the_last_epoch(runs):
    """By its right answers to the training images as they came; the log has the mean loss of the probes."""
    notes, probes = runs("linear"), 4
    saved, result = read(notes.folder / "last.pt")["model"], json.loads(
        (notes.folder / "result.json").read_text())
    losses = torch.stack([F.cross_entropy(*answer) for answer in notes.answers]).view(STEPS, PARTS * probes)
    assert [line["loss"] for line in log_of(notes.folder) if "loss" in line] == pytest.approx(
        losses.mean(1).tolist(), rel=1e-4)
    right = torch.stack([(logits.argmax(1) == labels).sum() for logits, labels in notes.answers])
    right = right.view(STEPS, PARTS, probes)[-EPOCH_STEPS:].sum((0, 1)).tolist()
    assert saved["right"].tolist() == right
    names = list(result["all"])
    for feature in ("cls", "mean"):
        best = max((name for name in names if name.startswith(feature)), key=dict(zip(names, right)).get)
        assert result[f"{feature}_blr"] == float(best.split()[1])
        assert result[feature] == result["all"][best]


def test_labels_of_supervised_training_are_smoothed(runs):
    """The gradient of the logits is (softmax - target) / batch: targets of 0.2 / 10, and 0.8 more for one."""
    for name in ("train", "finetune"):
        for note in runs(name).steps:
            for part in note.parts:
                target = part.output.softmax(1) - part.gradient * BATCH
                top = target.max(1, keepdim=True).values
                assert torch.allclose(top, torch.tensor(0.82), atol=1e-5)
                assert torch.allclose(target[target < top].view(-1, 9), torch.tensor(0.02), atol=1e-5)


# ---- what the models are told ----

def test_temperatures_of_ibot(runs):
    """From 0.04 linearly to 0.06 in the first three epochs, epoch by epoch; to 0.1 for patches, which begin
    one epoch later; a warm-up that is longer than the training ends with it.
    """
    for flags, cls, patch in (("", (0.04, 0.05, 0.06, 0.06), (0.04, 0.04, 0.07, 0.1)),
                              (OTHER,
                               (0.04, 0.04 + 0.02 / 3, 0.04 + 0.04 / 3, 0.06), (0.04, 0.06, 0.08, 0.1))):
        for step, note in enumerate(runs("ibot", flags).steps):
            for part in note.parts:
                assert float(part.inputs[3]) == pytest.approx(cls[step // EPOCH_STEPS])
                assert float(part.inputs[4]) == pytest.approx(patch[step // EPOCH_STEPS])


def test_tau_and_beta_of_the_dvae(runs):
    """Half a cosine each: tau from 1 to 0.1 in the first 60% of the steps, beta from 0 to 6 in 30%."""
    for step, note in enumerate(runs("dvae").steps):
        for part in note.parts:
            imgs, tau, beta = part.inputs
            assert imgs.min() >= 0 and imgs.max() <= 1 and len(imgs) == BATCH // PARTS
            assert float(tau) == pytest.approx(half_cosine(min(1, step / STEPS / 0.6), 1, 0.1))
            assert float(beta) == pytest.approx(half_cosine(min(1, step / STEPS / 0.3), 0, 6), abs=1e-6)


def masks_of(name, notes):
    """Of every part of every step: (steps, parts, B, N) bool"""
    return torch.stack([torch.stack([(part.output if name == "mae" else part.inputs)[2].bool()
                                     for part in note.parts]) for note in notes.steps])


def neighbours(mask):
    """Mean number of pairs of adjacent hidden patches, over that of masks of as many patches at random"""
    n, mask = mask.flatten(0, -2).sum(1), mask.flatten(0, -2).unflatten(1, (GRID, GRID))
    pairs = (mask[:, 1:] & mask[:, :-1]).sum((1, 2)) + (mask[:, :, 1:] & mask[:, :, :-1]).sum((1, 2))
    random = 2 * GRID * (GRID - 1) * n * (n - 1) / (GRID ** 2 * (GRID ** 2 - 1))
    return (pairs.sum() / random.sum()).item()


@pytest.mark.parametrize("name, flags, blocks", (
    ("mae", "", False), ("mae", "--sampling block --max_steps 6", True),
    ("beit", "", True), ("beit", "--masking random --max_steps 6", False),
    ("cae", "", True), ("cae", "--masking random --max_steps 6", False), ("beit_v2", "", True)))
def test_hidden_patches(name, flags, blocks, runs):
    """The same number in every image, in blocks or at random, new ones in every part of every step. Blocks of
    BEiT hide fewer patches in some images."""
    masks = masks_of(name, runs(name, flags))
    assert masks.shape[2:] == (34, GRID ** 2)
    counts, wanted = masks.sum(-1), 12 if name == "mae" else 7
    if name == "beit" and blocks:
        assert counts.max() == wanted and 0.8 < (counts == wanted).float().mean() < 1
    else:
        assert (counts == wanted).all()
    assert (neighbours(masks) > 1.15) == blocks and (blocks or neighbours(masks) < 1.05)
    assert len(masks.flatten(0, 1).unique(dim=0)) == masks.shape[0] * PARTS


@pytest.mark.parametrize("flags, begin, counts, blocks", (
    ("", 1, set(range(10)), True),
    (OTHER, 0, {0, 6, 7, 8, 9}, False)))
def test_hidden_patches_of_ibot(flags, begin, counts, blocks, runs):
    """Nothing before --pred_start_epoch; then nothing in half of the crops, else what the ratio says."""
    notes = runs("ibot", flags)
    masks = masks_of("ibot", notes)
    assert masks.shape[2:] == (2 * 34, GRID ** 2)
    assert not masks[:begin * EPOCH_STEPS].any()
    masks = masks[begin * EPOCH_STEPS:]
    found = masks.sum(-1)
    assert set(found.flatten().tolist()) <= counts and found.max() == 9
    assert 0.4 < (found == 0).float().mean() < 0.6 and 6 <= found[found > 0].float().mean() < 8
    assert (neighbours(masks) > 1.15) == blocks and (blocks or neighbours(masks) < 1.05)
    for note in notes.steps:
        for crops, local_crops, *_ in (part.inputs for part in note.parts):
            assert [crop.shape[2] for crop in crops + local_crops] == [8, 8, 4] and len(local_crops) == 1
            assert not same(*crops)
    first, second = masks.chunk(2, 2)
    assert (first != second).any(-1).any(-1).all(), "the masks of an image's two crops"


@pytest.mark.parametrize("name", ("beit", "cae", "beit_v2"))
def test_targets_are_the_codes_of_the_same_crop(name, runs):
    """The tokenizer of out/ has read the pixels, not normalised, of what the model reads."""
    notes, world = runs(name), runs(name).folder.parent
    folder = "beit_v2-tokenizer-shapes" if name == "beit_v2" else "dvae-shapes"
    tokenizer = dvae.load_tokenizer(world / "out" / folder / "tokenizer.pt")
    mean, std = (torch.tensor(value)[:, None, None] for value in (notes.sets[0].mean, notes.sets[0].std))
    for note in notes.steps:
        for imgs, codes, _ in (part.inputs for part in note.parts):
            wanted = tokenizer.tokens((imgs * std + mean).clamp(0, 1))
            assert (codes == wanted).float().mean() > 0.99 and len(codes.unique()) > 1


def test_targets_of_vq_kd_are_the_teacher_s_patches(runs):
    """The teacher reads the same pixels, normalised as its file says; the tokenizer reads -1 to 1."""
    file = read(runs("vqkd").folder.parent / "out/mae-shapes/encoder.pt")
    teacher = vit.ViT(**file["config"]).eval()
    teacher.load_state_dict(file["model"])
    mean, std = (torch.tensor(file[name])[:, None, None] for name in ("mean", "std"))
    for note in runs("vqkd").steps:
        for imgs, target in (part.inputs for part in note.parts):
            assert -1.001 <= imgs.min() < -0.5 and imgs.max() <= 1.001
            with torch.no_grad():
                wanted = teacher.forward_features(((imgs + 1) / 2 - mean) / std)[:, 1:]
            assert torch.allclose(target, wanted, atol=1e-4)


# ---- what moves without a gradient ----

@pytest.mark.parametrize("name", ("ibot", "dvae", "cae", "train"))
def test_running_averages(name, runs):
    """From the first weights on, once a step, with the step's momentum; CAE's before the optimizer's step.

    iBOT's momentum rises from 0.7 to 1 by half a cosine; the dVAE's is (1 + step) / (10 + step) up to --ema.
    """
    notes = runs(name)
    source, copy = {"ibot": ("student.", "teacher."), "cae": ("encoder.", "teacher.")}.get(name, ("", ""))
    saved = read(notes.folder / "last.pt")["model" if copy else "ema"]
    momentum = {"ibot": lambda step: half_cosine(step / STEPS, 0.7, 1), "cae": lambda step: 0.9,
                "dvae": lambda step: min(0.45, (1 + step) / (10 + step)), "train": lambda step: 0.9}[name]
    wanted = {key: value for key, value in notes.steps[0].before.items() if key.startswith(source)}
    for step, note in enumerate(notes.steps):
        weights = note.before if name == "cae" else note.after
        wanted = {key: momentum(step) * value + (1 - momentum(step)) * weights[key]
                  for key, value in wanted.items()}
    moved = 0.0
    for key, value in wanted.items():
        found = saved[copy + key.removeprefix(source)]
        assert torch.allclose(found, value, atol=1e-6), key
        moved = max(moved, (found - notes.steps[-1].after[key]).abs().max().item())
    assert moved > 1e-3, "the average is the weights themselves"


def test_prototypes_of_ibot_are_frozen_for_two_epochs(runs):
    """--freeze_last_layer 2: no gradient and no decay in the first six steps, both from the seventh on."""
    for step, note in enumerate(runs("ibot").steps):
        prototypes = [weight for weight, _ in note.groups if is_prototype(weight)]
        assert len(prototypes) == 2, "directions and lengths, of a shared head"
        for weight in prototypes:
            frozen = step < 2 * EPOCH_STEPS
            assert (weight in note.grads) == (not frozen), (step, weight)
            assert torch.equal(note.before[weight], note.after[weight]) == frozen, (step, weight)
        others = [weight for weight, _ in note.groups if weight.startswith("student.encoder.blocks")]
        assert step == 0 or not any(torch.equal(note.before[weight], note.after[weight]) for weight in others)


def test_centres_of_ibot(runs):
    """c <- 0.9 c + 0.1 mean of the teacher's logits over the parts, once a step."""
    steps = runs("ibot").steps
    for centre, place in (("centre", 0), ("patch_centre", 1)):
        assert not steps[0].parts[0].buffers[centre].any()
        for note, following in zip(steps, steps[1:]):
            assert torch.equal(note.parts[0].buffers[centre], note.parts[1].buffers[centre])
            mean = sum(part.output[2][place] for part in note.parts) / PARTS
            wanted = 0.9 * note.parts[0].buffers[centre] + 0.1 * mean
            assert torch.allclose(following.parts[0].buffers[centre], wanted, atol=1e-6) and mean.any()


def test_codebook_of_vq_kd(runs):
    """k-means first; once a step a code moves to its vectors of all parts with --decay 0.8; after every third
    step, in the first 80% of them, those without a vector since the last time begin anew at vectors.
    """
    notes = runs("vqkd")
    (key,) = [name for name, value in notes.steps[0].parts[0].buffers.items() if value.ndim == 2]
    final, hits = read(notes.folder / "last.pt")["model"][key], torch.zeros(CODES)
    assert final.shape == (CODES, CODE_DIM)
    for step, note in enumerate(notes.steps):
        old = note.parts[0].buffers[key]
        assert torch.equal(old, note.parts[1].buffers[key])
        vectors = [F.normalize(part.output[-1], dim=1) for part in note.parts]
        if step == 0:
            assert (vectors[0] @ old.T).max(1).values.mean() > 0.98, "no code is near"
        u = torch.cat(vectors)
        ids = F.one_hot((u @ old.T).argmax(1), CODES).float()
        hits += ids.sum(0)
        wanted = torch.where(ids.sum(0)[:, None] > 0, F.normalize(
            0.8 * old + 0.2 * F.normalize(ids.T @ u, dim=1), dim=1), old)
        new = notes.steps[step + 1].parts[0].buffers[key] if step + 1 < STEPS else final
        unused = hits == 0
        if step in (2, 5, 8):
            assert unused.any(), "nothing begins anew"
            assert torch.allclose(new[~unused], wanted[~unused], atol=1e-5), step
            assert ((new[unused] @ u.T).max(1).values > 1 - 1e-5).all(), step
            assert (new[unused] - old[unused]).norm(dim=1).max() > 0.01
            hits.zero_()
        else:
            assert torch.allclose(new, wanted, atol=1e-5), step
    assert unused.any(), "nothing would begin anew after the last step"


# ---- what is judged and exported ----

@pytest.mark.parametrize("name, file, part, prefix, other", (
    ("mae", "encoder.pt", "model", "encoder.", None), ("beit", "encoder.pt", "model", "encoder.", None),
    ("cae", "encoder.pt", "model", "encoder.", ("model", "teacher.")),
    ("beit_v2", "encoder.pt", "model", "encoder.", None),
    ("ibot", "encoder.pt", "model", TEACHER, ("model", TEACHER.replace("teacher", "student"))),
    ("dvae", "tokenizer.pt", "ema", "", ("model", "")), ("vqkd", "tokenizer.pt", "model", "", None),
    ("train", "encoder.pt", "ema", "", ("model", "")), ("finetune", "encoder.pt", "model", "", None)))
def test_exported_weights(name, file, part, prefix, other, runs):
    """The file is that part of last.pt and not the other one, and last.pt holds the last step's weights."""
    notes = runs(name)
    last, exported = read(notes.folder / "last.pt"), read(notes.folder / file)["model"]
    assert last["step"] == STEPS
    for key, value in exported.items():
        assert torch.equal(value, last[part][prefix + key]), key
    assert {prefix + key for key in exported} == {key for key in last[part] if key.startswith(prefix)}
    if other:
        assert not all(torch.allclose(value, last[other[0]][other[1] + key], atol=1e-4)
                       for key, value in exported.items() if value.is_floating_point())
    for key, value in notes.steps[-1].after.items():
        assert key.startswith("teacher.") or torch.equal(value, last["model"][key]), key


def features(encoder, imgs, name):
    """What is judged: the patches' mean (BEiT: three quarters up, without norm), or else the class token"""
    if name == "beit":
        kept = []
        encoder.blocks[1].register_forward_hook(lambda module, inputs, output: kept.append(output))
        encoder.forward_features(imgs)
        return kept[0][:, 1:].mean(1)
    tokens = encoder.forward_features(imgs)
    return tokens[:, 1:].mean(1) if name in ("mae", "cae") else tokens[:, 0]


@pytest.mark.parametrize("name", ("mae", "beit", "cae", "ibot", "beit_v2"))
def test_knn_monitor_reads_the_exported_encoder(name, runs):
    """After the last step: the features of encoder.pt, in evaluation mode; the log has the vote of 20 and the
    rank."""
    notes = runs(name)
    file = read(notes.folder / "encoder.pt")
    encoder = vit.ViT(**file["config"]).eval()
    encoder.load_state_dict(file["model"])
    with torch.no_grad():
        train_x, x = (features(encoder, pixels(source), name) for source in notes.sets)
    result, *found = notes.knn[-1]
    assert torch.allclose(found[0], train_x, atol=1e-5) and torch.allclose(found[1], x, atol=1e-5)
    near = (F.normalize(x, dim=1) @ F.normalize(train_x, dim=1).T).topk(20)
    labels = F.one_hot(notes.sets[0].labels[near.indices]).float()
    guess = ((near.values / 0.07).exp()[:, :, None] * labels).sum(1).argmax(1)
    assert result["knn"] == pytest.approx((guess == notes.sets[1].labels).float().mean().item() * 100)
    logged = {line["step"]: line for line in log_of(notes.folder) if "knn" in line}
    assert list(logged) == [0, EPOCH_STEPS, STEPS]
    for key in ("knn", "rank"):
        assert [line[key] for line in logged.values()] == pytest.approx(
            [result[key] for result, *_ in notes.knn], rel=1e-5)


def test_tokenizers_are_judged_as_exported(runs):
    """The log's last numbers are those of tokenizer.pt: the dVAE's divergence, and VQ-KD's codes in use."""
    for name, kind in (("dvae", "kl"), ("vqkd", "usage")):
        notes = runs(name)
        model, imgs = dvae.load_tokenizer(notes.folder / "tokenizer.pt"), notes.val_set.imgs.float() / 255
        with torch.no_grad():
            wanted = model(imgs, 1.0, 0.0)[2].item() if name == "dvae" else len(
                model.tokens(imgs).unique()) / CODES
        line = [line for line in log_of(notes.folder) if "usage" in line][-1]
        assert line["step"] == STEPS and line[kind] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ("train", "finetune"))
def test_classifiers_are_judged_as_exported(name, runs):
    """result.json and the log have the accuracy and the loss of encoder.pt: with --ema of the average."""
    notes = runs(name)
    file, result = read(notes.folder / "encoder.pt"), json.loads((notes.folder / "result.json").read_text())
    model = vit.ViT(**file["config"]).eval()
    model.load_state_dict(file["model"])
    with torch.no_grad():
        logits = model(pixels(notes.val_set))
    labels = notes.val_set.labels
    line = [line for line in log_of(notes.folder) if "val_loss" in line][-1]
    assert line["step"] == STEPS
    for found in (result, line):
        assert found["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
        right = (logits.argmax(1) == labels).float().mean().item()
        assert found["accuracy"] == pytest.approx(right * 100, rel=1e-5)
