"""What the flags of a script reach: models, views, optimisers, schedules and masks of a run.

Every method runs its main() for six steps with unusual values of all its flags, different from each other
(CASES); a second, short run takes the other value of each switch. `Seen` keeps what arrived.
"""
import inspect
import math
import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook
from test_runs import guarded, log_of, main_of, read, run, shrink

import beit_v2
import data
import dvae
import vit

SMALL = dict(embed_dim=32, depth=3, num_heads=2)                # what --model small means here
LONG = dict(model="small", img_size=12, patch_size=6, epochs=3, batch_size=100, accum_steps=2, blr=0.0256,
            min_lr=0.002, warmup_epochs=1.0, weight_decay=0.07, clip_grad=0.003, holdout=8, amp="bf16",
            eval_every=2, save_every=3, log_every=3)
SHORT = dict(model="small", img_size=12, patch_size=6, epochs=9, batch_size=20, lr=0.013, warmup_epochs=0.0,
             weight_decay=0.09, max_steps=1, amp="none")
PEAK = 0.0256 * 100 / 256
EARLY = ("beit", "cae", "ibot", "vqkd", "beit_v2")              # reach the peak in the last step of a warm-up
FALL = [0.002 + (PEAK - 0.002) * (1 + math.cos(math.pi * done)) / 2 for done in (0, 0.25, 0.5, 0.75)]
LRS = {name: [0, PEAK if name in EARLY else PEAK / 2, *FALL]    # of LONG: two steps an epoch
       for name in (*EARLY, "mae", "dvae", "train", "finetune", "linear", "attentive")}
ELSEWHERE = {  # flags that no case here types, and why
    "help": "is no flag of a run", "data": "every test types it", "output_dir": "every test types it",
    "device": "every test types it", "seed": "has a test of its own, below",
    "data_dir": "test_data.py: it matters to sets on disk alone", "num_workers": "test_data.py: the same",
    "recipe": "test_runs.py and test_data.py: which column it names",
    "init": "test_runs.py: every method starts from a file", "resume": "test_runs.py: kills and resumes",
    "compile": "test_runs.py: captures the graph of every method",
    "stage": "every test of beit_v2.py types it", "mode": "every test of vit.py types it",
    "paint": "test_use.py", "images": "test_use.py", "json": "test_use.py",
    "export": "test_layouts.py: what is written", "num_heads": "test_layouts.py: for official files alone"}
PROBED = {"weight_decay", "clip_grad", "eval_every"}            # a probe has no use for these

# ---- the views that a method shows ----

FLIP, IBOT = dict(flip=0.5), dict(flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, gray=0.15)
AUGS = {"none": data.View(12), "crop": data.View(12, scale=(0.2, 1.0), **FLIP),
        "crop_fixed": data.View(12, scale=(0.77, 0.77), ratio=(1, 1), **FLIP),
        "crop_jitter": data.View(12, scale=(0.2, 1.0), **FLIP, jitter=(0.4, 0.4, 0.4, 0.1))}
CROP, JITTER = dict(scale=(0.37, 1.0), **FLIP), dict(jitter=(0.29, 0.29, 0.29, 0.0))
VIEWS = {
    "mae": [AUGS["crop_jitter"]], "mae 2": [AUGS["crop_fixed"]],
    "dvae": [data.View(4, **CROP)], "dvae 2": [data.View(8, **CROP)],
    "beit": [data.View(12, **CROP, **JITTER, tokenizer_size=16)], "beit 2": [data.View(12, **CROP)],
    "cae": [data.View(12, **CROP, tokenizer_size=16)], "cae 2": [data.View(12, **CROP)],
    "vqkd": [data.View(12, **CROP)], "vqkd 2": [data.View(12, **CROP)],
    "beit_v2": [data.View(12, **CROP, **JITTER, tokenizer_size=18)],
    "beit_v2 2": [data.View(12, **CROP, tokenizer_size=18)],
    "ibot": [data.View(12, 2, scale=(0.35, 0.95), **IBOT, blur=(1.0, 0.1), solarize=(0.0, 0.2)),
             data.View(6, 3, scale=(0.15, 0.45), **IBOT, blur=0.5)],
    "ibot 2": [data.View(12, 2, scale=(0.3, 0.9), **FLIP, blur=(0.0, 0.0), solarize=(0.0, 0.0)),
               data.View(12, 1, scale=(0.1, 0.4), **FLIP)],
    "train": [data.View(12, **CROP, rand_augment=5.0, erase=0.15)], "train 2": [data.View(12, **CROP)],
    "finetune": [data.View(12, **CROP, rand_augment=5.0, erase=0.15)],
    "linear": [data.View(12, **CROP)], "linear 2": [data.View(12, **CROP)],
    "attentive": [data.View(12, **CROP)],
}

# ---- the cases: script, flags typed over LONG or SHORT ----


def method_of(name):
    return name.removesuffix(" 2")


def without(flags, names):
    return {name: value for name, value in flags.items() if name not in names}



MASKS = dict(num_masked=3, min_block=2)
MIX = dict(beta2=0.97, crop_scale=0.37, rand_augment=5.0, erase=0.15, smoothing=0.11, mixup=0.33, cutmix=0.77,
           layer_decay=0.6, drop_path=0.2, ema=0.4)
CASES = {
    "mae": ("mae.py", LONG | dict(
        mask_ratio=0.5, norm_pix_loss=True, decoder_dim=24, decoder_depth=4, decoder_heads=6,
        sampling="block", encoder_sees_mask=False, aug="crop_jitter")),
    "mae 2": ("mae.py", SHORT | dict(
        mask_ratio=0.75, norm_pix_loss=False, decoder_dim=40, decoder_depth=1, decoder_heads=5,
        sampling="grid", encoder_sees_mask=True, aug="crop_fixed")),
    "dvae": ("dvae.py", LONG | dict(
        model="tiny", stride=2, n_hid=12, blocks=3, vocab=24, beta=3.0, beta_warmup=1.0, tau=0.2,
        tau_anneal=0.25, recon="mse", straight_through=True, ema=0.3, crop_scale=0.37)),
    "dvae 2": ("dvae.py", SHORT | dict(
        model="tiny", stride=4, n_hid=8, blocks=1, vocab=20, recon="laplace", straight_through=False,
        crop_scale=0.37)),
    "beit": ("beit.py", LONG | MASKS | dict(
        tokenizer="codes.pt", target="tokens", masking="block", predict="all", plain=False, layer_scale=0.13,
        drop_path=0.2, crop_scale=0.37, color_jitter=0.29)),
    "beit 2": ("beit.py", SHORT | dict(
        target="pixels", norm_pix_loss=False, masking="random", num_masked=1, predict="masked", plain=True,
        drop_path=0.3, crop_scale=0.37, color_jitter=0.0)),
    "cae": ("cae.py", LONG | MASKS | dict(
        tokenizer="codes.pt", target="tokens", masking="block", align_weight=1.7, momentum=0.6,
        regressor_depth=3, decoder_depth=4, decoder_dim=40, decoder_heads=5, layer_scale=0.13, drop_path=0.2,
        crop_scale=0.37)),
    "cae 2": ("cae.py", SHORT | dict(
        target="pixels", norm_pix_loss=True, masking="random", num_masked=1, align_weight=0.3, momentum=0.0,
        regressor_depth=1, decoder_depth=5, decoder_dim=0, decoder_heads=0, layer_scale=0.0, drop_path=0.3,
        crop_scale=0.37)),
    "vqkd": ("beit_v2.py --stage tokenizer", LONG | dict(
        teacher="teacher.pt", num_codes=20, code_dim=5, decoder_depth=4, commit=0.7, codes="ema", unit=True,
        decay=0.9, restart=2, crop_scale=0.37)),
    "vqkd 2": ("beit_v2.py --stage tokenizer", SHORT | dict(
        tokenizer="",                                           # is for the other stage
        teacher="teacher.pt", num_codes=18, code_dim=6, decoder_depth=1, commit=1.2, codes="gradient",
        unit=False, decay=0.8, restart=0, crop_scale=0.37)),
    "beit_v2": ("beit_v2.py --stage pretrain", LONG | MASKS | dict(
        tokenizer="words.pt", masking="block", beta2=0.97, early_layer=2, branch_depth=4, shared_head=False,
        layer_scale=0.13, drop_path=0.2, crop_scale=0.37, color_jitter=0.29)),
    "beit_v2 2": ("beit_v2.py --stage pretrain", SHORT | dict(
        tokenizer="words.pt", masking="random", beta2=0.96, num_masked=1, early_layer=3, branch_depth=1,
        shared_head=True, layer_scale=0.0, drop_path=0.3, crop_scale=0.37, color_jitter=0.0)),
    "ibot": ("ibot.py", LONG | dict(
        weight_decay_end=0.31, momentum=0.7, out_dim=20, patch_out_dim=28, shared_head=False, head_hidden=36,
        head_bottleneck=14, norm_last_layer=False, freeze_last_layer=1, teacher_temp_start=0.03,
        teacher_temp=0.05, patch_temp=0.09, warmup_temp_epochs=2, pred_ratio=(0.3, 0.6),
        pred_ratio_var=(0.05, 0.2), pred_shape="block", pred_start_epoch=1, lambda1=0.8, lambda2=1.3,
        drop_path=0.2, global_scale=(0.35, 0.95), local_scale=(0.15, 0.45), local_crops=3, local_size=6,
        blur=True, koleo=0.3, aug="color", gray=0.15)),
    "ibot 2": ("ibot.py", SHORT | dict(
        weight_decay_end=0.31, momentum=0.5, out_dim=22, patch_out_dim=22,
        shared_head=True, head_hidden=18, head_bottleneck=10, norm_last_layer=True, freeze_last_layer=0,
        pred_shape="rand", pred_ratio=(0.5,), pred_ratio_var=(0.0,), pred_start_epoch=0, lambda1=1.4,
        lambda2=0.6, drop_path=0.3, global_scale=(0.3, 0.9), local_scale=(0.1, 0.4), local_crops=1,
        local_size=12, blur=False, koleo=0.0, aug="crop")),
    "train": ("vit.py --mode train", LONG | MIX | dict(
        pool="cls", pos="sincos", rel_pos="block", layer_scale=0.13, stem="patch")),
    "train 2": ("vit.py --mode train", SHORT | MIX | dict(
        patch_size=4, pool="mean", pos="learned", rel_pos="shared", layer_scale=0.0, stem="conv", erase=0.0,
        rand_augment=0.0, mixup=0.0, cutmix=0.0, ema=0.0, label_fraction=0.5)),
    "finetune": ("vit.py --mode finetune", LONG | MIX | dict(
        init="encoder.pt", half_stats=True, pool="mean")),
    "linear": ("vit.py --mode linear", without(LONG, PROBED) | dict(
        blrs=(0.1, 7.0), optimizer="sgd", layers="all", crop_scale=0.37)),
    "linear 2": ("vit.py --mode linear", without(SHORT, PROBED) | dict(
        init="classifier.pt", half_stats=False, blrs=(3.0,), optimizer="lars", layers="last", crop_scale=0.37,
        label_fraction=0.5)),
    "attentive": ("vit.py --mode attentive", without(LONG, PROBED) | dict(
        pos="sincos", rel_pos="shared", layer_scale=0.13, blrs=(0.1, 7.0), optimizer="sgd",
        crop_scale=0.37)),
}
LONGS = [name for name in CASES if not name.endswith(" 2")]
PROBES = ("linear", "linear 2", "attentive")
SUPERVISED = ("train", "train 2", "finetune")


def command_of(name, **changed):
    """The command line of a case; `changed` flags take other values."""
    script, flags = CASES[name]
    words = [script, "--data", "shapes", "--device", "cpu", "--output_dir", "run"]
    for flag, value in (flags | changed).items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        else:
            words += [f"--{flag}", *map(str, value)] if isinstance(value, tuple) else \
                [f"--{flag}", shlex.quote(str(value))]
    return " ".join(words)


class Seen:
    """What a run of main() handed on: filled by the spies that `prepare` puts in its way."""

    def __init__(self):
        self.model, self.encoder, self.views, self.source, self.shown = None, None, None, None, []
        self.calls, self.masks, self.mixes, self.judged, self.saved = [], [], [], [], []
        self.steps, self.weights, self.hits, self.read_in_half = [], [], [], set()

    def prepare(self, patch):
        shrink(patch)
        patch.setitem(vit.SIZES, "small", SMALL)
        wrap, init, forward_blocks = data.wrap, data.Loader.__init__, vit.ViT.forward_blocks

        def wrapped(model, args):
            self.model = model
            self.initial = {key: value.clone() for key, value in model.state_dict().items()}
            model.register_forward_pre_hook(self.before, with_kwargs=True)
            model.register_forward_hook(self.after)
            return wrap(model, args)

        def loader(this, args, source, views, train=True):
            init(this, args, source, views, train)
            if train:
                self.views, self.source = views, source
            else:
                self.shown += [(view, source) for view in views]

        def blocks(encoder, x):
            self.encoder = self.encoder or encoder  # not the untrained one of a picture
            self.read_in_half.add(torch.is_autocast_enabled("cpu"))
            return forward_blocks(encoder, x)
        patch.setattr(data, "wrap", wrapped)
        patch.setattr(data.Loader, "__init__", loader)
        patch.setattr(vit.ViT, "forward_blocks", blocks)
        for name, calls in (("blockwise_mask", self.masks), ("mixup_cutmix", self.mixes),
                            ("knn_monitor", self.judged)):
            patch.setattr(data, name, spy(getattr(data, name), calls))
        patch.setattr(torch, "save", spy(torch.save, self.saved))

    def before(self, model, inputs, options):
        if torch.is_grad_enabled():
            self.calls.append({
                "inputs": [*inputs, *options.values()],
                "half": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
                "fresh": all(p.grad is None or not p.grad.any() for p in model.parameters())})

    def after(self, model, inputs, output):
        if torch.is_grad_enabled():
            output, *terms = output if isinstance(output, tuple) else [output]
            call = self.calls[-1]
            call["terms"] = terms
            call["output"] = output.detach().float()
            output.register_hook(lambda gradient: call.update(gradient=gradient.detach().float()))

    def on_step(self, optimizer, inputs, options):
        names = {id(p): name for name, p in self.model.named_parameters()}
        self.optimizer, self.scaled = optimizer, getattr(optimizer, "grad_scale", None) is not None
        self.steps.append({names[id(p)]: {**group, "params": None, "norm": None if p.grad is None
                                          else p.grad.norm().item()}
                           for group in optimizer.param_groups for p in group["params"]})
        self.keep()

    def keep(self):
        self.weights.append({name: p.detach().clone() for name, p in self.model.named_parameters()})
        self.hits.append({name: b.sum().item() for name, b in self.model.named_buffers() if "hits" in name})

    def average(self, name, momenta, late=True):
        """What a running average of a weight must be; late: it is updated after each step, not before."""
        path = [weights[name] for weights in self.weights]
        average = path[0]
        for weight, momentum in zip(path[late:], momenta):
            average = momentum * average + (1 - momentum) * weight
        return average


def spy(function, calls):
    """A function that keeps the arguments by name, and the result, of every call."""
    def called(*inputs, **options):
        bound = inspect.signature(function).bind(*inputs, **options)
        bound.apply_defaults()
        calls.append(dict(bound.arguments))
        calls[-1]["result"] = result = function(*inputs, **options)
        return result
    return called


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with tokenizers of 24 and 28 codes, a teacher 24 wide, an encoder and a classifier."""
    folder = tmp_path_factory.mktemp("files")
    codes = dvae.DVAE(grid=2, stride=8, n_hid=8, vocab=24)
    words = beit_v2.VQKD(vit.ViT(18, 9, 32, 1, 2), 28, 4, 1, 32)
    for name, model, method in (("codes", codes, "dvae"), ("words", words, "beit_v2"),
                                ("teacher", vit.ViT(8, 4, 24, 1, 2), "ibot"),
                                ("encoder", vit.ViT(12, 6, **SMALL, layer_scale=0.13), "mae"),
                                ("classifier", vit.ViT(12, 6, **SMALL, pool="mean"), "train")):
        torch.save({"model": model.state_dict(), "config": model.config, "method": method,
                    "mean": (0.4,) * 3, "std": (0.3,) * 3}, folder / f"{name}.pt")
    return folder


def enter(folder, files, patch):
    patch.chdir(folder)
    for path in files.iterdir():
        (folder / path.name).symlink_to(path)


@pytest.fixture(autouse=True)
def elsewhere(files, tmp_path, monkeypatch):
    """Every test works in a folder of its own, with those files."""
    enter(tmp_path, files, monkeypatch)


@pytest.fixture(scope="module")
def seen_of(files, tmp_path_factory):
    """seen_of("mae"): what the run of that case handed on; every case is run once."""
    kept = {}

    def watched(name):
        if name not in kept:
            seen = kept[name] = Seen()
            folder = tmp_path_factory.mktemp("seen")
            hook = register_optimizer_step_pre_hook(seen.on_step)
            with pytest.MonkeyPatch.context() as patch:
                enter(folder, files, patch)
                try:
                    run(command_of(name), seen.prepare)
                finally:
                    hook.remove()
            seen.keep()
            seen.folder = folder / "run"
        return kept[name]
    return watched


# ---- the model ----

def encoder_of(model):
    """The ViT in a model of any method, None if it has none of its own."""
    model = getattr(model, "student", model)
    parts = (model, getattr(model, "encoder", None))
    return next((part for part in parts if isinstance(part, vit.ViT)), None)


def drop_path_of(blocks, first=0, places=0):
    """The drop path rate of the last of `places` blocks, given that the rates of `blocks`, the first of which
    has the number `first`, lie on the line from 0 to it.
    """
    rates, last = [block.drop_path for block in blocks], (places or len(blocks)) - 1
    rate = rates[-1] * last / (first + len(rates) - 1)
    assert rates == pytest.approx([rate * (first + i) / last for i in range(len(rates))])
    return rate


def layer_scale_of(seen):
    """The first value of all layer scales; two of them in every block."""
    scales = [value for name, value in seen.initial.items() if "gamma_" in name]
    if not scales:
        return 0.0
    assert len(scales) == 2 * len([name for name in seen.initial if name.endswith("attn.proj.weight")])
    (value,) = torch.cat(scales).unique().tolist()
    return value


def only(values):
    (value,) = set(values)
    return value


def masks_of(seen, rule):
    """What the masks are like, in evaluations and in every step; those that end may hide fewer patches."""
    hidden = [value for call in seen.calls for value in call["inputs"][2].sum(1).tolist()]
    most = max if seen.masks and rule == "end" else only
    found = {"num_masked": most(hidden), "masking": "block" if seen.masks else "random"}
    assert seen.model.num_masked == found["num_masked"]
    if seen.masks:
        assert only(call["num_masked"] for call in seen.masks) == found["num_masked"]
        assert only((call["grid"], call["rule"]) for call in seen.masks) == (2, rule)
        found["min_block"] = only(call["min_block"] for call in seen.masks)
    return found


def targets_of(seen):
    """Codes are those of codes.pt; pixels may be less their patch's mean, over its std."""
    if seen.model.target == "tokens":
        return {"target": "tokens", "tokenizer": "codes.pt"}
    means = torch.cat([call["inputs"][1] for call in seen.calls]).mean(-1)
    return {"target": "pixels", "norm_pix_loss": means.abs().max().item() < 1e-4}


def view_of(seen):
    view = seen.views[0]
    return {"crop_scale": view.scale[0], "color_jitter": view.jitter[0]}


def mae_of(seen):
    model = seen.model
    return {"mask_ratio": 1 - model.num_keep / model.grid ** 2, "norm_pix_loss": model.norm_pix_loss,
            "sampling": model.sampling, "encoder_sees_mask": model.encoder_sees_mask,
            "decoder_dim": model.decoder_embed.out_features, "decoder_depth": len(model.decoder_blocks),
            "decoder_heads": only(block.attn.num_heads for block in model.decoder_blocks),
            "aug": next(name for name, view in AUGS.items() if [view] == seen.views)}


def dvae_of(seen):
    model, view = seen.model, view_of(seen)
    assert (model.grid, model.img_size) == (2, 2 * model.config["stride"])
    return {"crop_scale": view["crop_scale"], "recon": model.recon, "vocab": model.vocab,
            "straight_through": model.straight_through,
            **{name: model.config[name] for name in ("stride", "n_hid", "blocks")}}


def beit_of(seen):
    model, tokens = seen.model, seen.model.target == "tokens"
    plain = model.encoder.pos_embed is not None
    assert plain == (model.encoder.rel_pos_bias is None)
    assert model.lm_head.out_features == (24 if tokens else 3 * 6 * 6)
    return masks_of(seen, "end") | view_of(seen) | targets_of(seen) | {
        "predict": model.predict, "plain": plain, "drop_path": drop_path_of(model.encoder.blocks),
        **({} if plain else {"layer_scale": layer_scale_of(seen)})}


def cae_of(seen):
    model, tokens, found = seen.model, seen.model.target == "tokens", masks_of(seen, "on")
    wider = isinstance(model.encoder_to_decoder, torch.nn.Linear)
    heads = only([block.cross_attn.num_heads for block in model.regressor_blocks]
                 + [block.attn.num_heads for block in model.decoder_blocks])
    assert model.head.out_features == (24 if tokens else 3 * 6 * 6)
    assert len(model.mask_token.flatten()) == model.head.in_features
    return found | targets_of(seen) | {
        "align_weight": model.align_weight, "layer_scale": layer_scale_of(seen),
        "regressor_depth": len(model.regressor_blocks), "decoder_depth": len(model.decoder_blocks),
        "decoder_dim": model.head.in_features if wider else 0, "decoder_heads": heads if heads != 2 else 0,
        "drop_path": only(round(drop_path_of(blocks), 9) for blocks in (
            model.encoder.blocks, model.decoder_blocks, model.regressor_blocks) if len(blocks) > 1),
        "crop_scale": view_of(seen)["crop_scale"]}


def vqkd_of(seen):
    model = seen.model
    assert model.decode_task_layer[2].out_features == 24, "the width of teacher.pt"
    return {"teacher": "teacher.pt", "num_codes": len(model.quantizer.codebook),
            "code_dim": model.quantizer.codebook.shape[1], "decoder_depth": len(model.decoder.blocks),
            "commit": model.quantizer.commit, "decay": model.quantizer.decay, "unit": model.quantizer.unit,
            "codes": "gradient" if isinstance(model.quantizer.codebook, torch.nn.Parameter) else "ema",
            "crop_scale": view_of(seen)["crop_scale"]}


def beit_v2_of(seen):
    model, found, depth = seen.model, masks_of(seen, "fill"), len(seen.model.cls_pt_layers)
    places = max(3, model.early_layer + depth)
    assert drop_path_of(model.encoder.blocks) == pytest.approx(
        drop_path_of(model.cls_pt_layers, model.early_layer, places))
    assert model.lm_head.out_features == 28, "codes of words.pt"
    assert (model.cls_pt_lm_head is None) == (model.cls_pt_norm is None)
    return found | view_of(seen) | {
        "tokenizer": "words.pt", "early_layer": model.early_layer, "branch_depth": depth,
        "shared_head": model.cls_pt_lm_head is None, "layer_scale": layer_scale_of(seen),
        "drop_path": drop_path_of(model.encoder.blocks)}


def ibot_of(seen):
    model, (wide, near), head = seen.model, seen.views, seen.model.student.head
    networks = [encoder_of(part) for part in (model.student, model.teacher)]
    assert not any(block.drop_path for block in networks[1].blocks), "the teacher drops nothing"
    assert [len(model.centre[0]), len(model.patch_centre[0])] == [
        len(layer.weight_g) for layer in (head.last_layer, head.last_layer2)]
    return {"out_dim": len(head.last_layer.weight_g), "patch_out_dim": len(head.last_layer2.weight_g),
            "shared_head": head.last_layer is head.last_layer2, "head_hidden": head.mlp[0].out_features,
            "head_bottleneck": head.mlp[-1].out_features, "lambda1": model.lambda1, "lambda2": model.lambda2,
            "norm_last_layer": not head.last_layer.weight_g.requires_grad,
            "drop_path": drop_path_of(networks[0].blocks), "blur": near.blur > 0, "koleo": model.koleo,
            "global_scale": wide.scale, "local_scale": near.scale, "local_crops": near.count,
            "aug": "color" if any(wide.jitter) else "crop", "gray": wide.gray,
            "local_size": near.size, "pred_shape": "block" if seen.masks else "rand"}


def supervised_of(seen):
    model, view = seen.model, seen.views[0]
    assert isinstance(model.norm, torch.nn.Identity) == (model.config["pool"] == "mean")
    assert model.head.out_features == 10
    return {"crop_scale": view.scale[0], "rand_augment": view.rand_augment, "erase": view.erase,
            "drop_path": drop_path_of(model.blocks), "layer_scale": layer_scale_of(seen),
            "stem": "conv" if model.patch_embed.stem else "patch",
            **{name: only(call[name] for call in seen.mixes) for name in ("smoothing", "mixup", "cutmix")},
            **{name: model.config[name] for name in ("pool", "pos", "rel_pos")}}


def probe_of(seen):
    depths, optimizer = {head.layer for head in seen.model}, seen.optimizer
    settings = {name: optimizer.defaults.get(name) for name in ("momentum", "nesterov", "trust")}
    kinds = {"sgd": dict(momentum=0.9, nesterov=True, trust=None),
             "lars": dict(momentum=0.9, nesterov=None, trust=0.001)}
    return {"crop_scale": seen.views[0].scale[0], "layers": "all" if len(depths) > 1 else "last",
            "optimizer": next(name for name, kind in kinds.items() if kind == settings),
            **{name: seen.encoder.config[name] for name in ("pos", "rel_pos", "layer_scale")}}


ARRIVED = {"mae": mae_of, "dvae": dvae_of, "beit": beit_of, "cae": cae_of, "vqkd": vqkd_of,
           "beit_v2": beit_v2_of, "ibot": ibot_of, "train": supervised_of, "finetune": supervised_of,
           "linear": probe_of, "attentive": probe_of}
LATER = {  # method flags with a test of their own, below
    "beta", "beta_warmup", "tau", "tau_anneal", "ema", "momentum", "restart", "beta2", "weight_decay_end",
    "freeze_last_layer", "teacher_temp_start", "teacher_temp", "patch_temp", "warmup_temp_epochs",
    "pred_ratio", "pred_ratio_var", "pred_start_epoch", "layer_decay", "blrs", "label_fraction", "init",
    "half_stats"}


@pytest.mark.parametrize("name", CASES)
def test_model_and_views_are_what_the_flags_say(name, seen_of):
    """Every flag of the method is found where it belongs, and none of them is forgotten here."""
    seen, typed = seen_of(name), CASES[name][1]
    arrived = ARRIVED[method_of(name)](seen)
    typed = {flag: value for flag, value in typed.items() if flag not in LONG | SHORT and value != ""}
    assert typed.keys() - LATER <= arrived.keys()
    for flag in typed.keys() - LATER:
        wanted = pytest.approx(typed[flag]) if isinstance(typed[flag], float) else typed[flag]
        assert arrived[flag] == wanted and type(arrived[flag]) is type(typed[flag]), flag
    assert seen.views == VIEWS[name]


@pytest.mark.parametrize("name", CASES)
def test_size_of_the_encoder(name, seen_of):
    """--model, --img_size and --patch_size make the ViT; what is shown in evaluations has that size, too."""
    seen, typed = seen_of(name), CASES[name][1]
    encoder, size = encoder_of(seen.model), typed["img_size"]
    if name in PROBES:
        encoder = seen.encoder
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
        assert encoder.config["pool"] == ("mean" if name == "linear 2" else "cls"), "its own final norm"
        assert only(head.head.in_features for head in seen.model) == 32
        depth = {head.layer for head in seen.model}
        assert depth == ({-1, 0, 1, 2} if name == "linear" else {-1})
    if not name.startswith("dvae"):
        found = {key: encoder.config[key] for key in ("img_size", "patch_size", *SMALL)}
        assert found == SMALL | dict(img_size=12, patch_size=typed["patch_size"])
        assert len(encoder.blocks) == 3 and only(block.attn.num_heads for block in encoder.blocks) == 2
    plain = [data.View(size), data.View(size, tokenizer_size=seen.views[0].tokenizer_size)]
    if name.startswith("dvae"):                                 # which resizes what the k-NN shows it
        plain.append(data.View(seen.views[0].size))
    assert seen.shown and all(view in plain for view, _ in seen.shown)


# ---- optimisers ----

SOME = r"(^|\.)(cls_token|pos_embed)$"                          # are not decayed, besides vectors and biases
FIXED = {  # parameters that do not train
    "mae": r"(encoder\.|decoder_)pos_embed", "cae": r"(encoder\.)?pos_embed|teacher\..*",
    "ibot": r"teacher\..*", "ibot 2": r"teacher\..*|student\.head\.last_layer2?\.weight_g"}
BETAS = {"mae": (0.9, 0.95), "vqkd": (0.9, 0.99), "beit_v2": (0.9, 0.97), "beit_v2 2": (0.9, 0.96),
         "train": (0.9, 0.97), "finetune": (0.9, 0.97)}


def of(table, name, default):
    """The entry of a case in a table; a second case has that of the first, if none of its own."""
    return table.get(name, table.get(method_of(name), default))


@pytest.mark.parametrize("name", [name for name in CASES if name not in PROBES])
def test_optimizer_is_what_the_flags_say(name, seen_of):
    """AdamW with the betas of the method, exactly the parameters that train, and which of them decay."""
    seen, flags = seen_of(name), CASES[name][1]
    params = dict(seen.model.named_parameters())
    fixed = {key for key in params if re.fullmatch(of(FIXED, name, "-"), key)}
    assert type(seen.optimizer) is torch.optim.AdamW and seen.steps[0].keys() == params.keys() - fixed
    keep = method_of(name) in ("mae", "cae", "ibot")            # decay class token and positions
    still = {key for key in seen.steps[0] if params[key].ndim < 2 or key.endswith(".bias")
             or not keep and re.search(SOME, key)}
    for key, group in seen.steps[0].items():
        assert group["betas"] == of(BETAS, name, (0.9, 0.999)) and group["eps"] == 1e-8, key
        assert group["weight_decay"] == (0 if key in still else flags["weight_decay"]), key


def scale_of(seen, name, key):
    """The factor of the learning rate of a parameter."""
    if name in PROBES:
        return seen.model[int(key.split(".")[0])].blr
    if name not in SUPERVISED:
        return 1.0
    block = re.match(r"blocks\.(\d)", key)
    layer = int(block[1]) + 1 if block else 0 if re.match("cls_token|pos_embed|patch_embed", key) else 4
    return 0.6 ** (4 - layer)


@pytest.mark.parametrize("name", CASES)
def test_learning_rate_of_every_step(name, seen_of):
    """lr, blr, batch_size, warmup_epochs, epochs and min_lr; layer_decay and blrs, parameter by parameter;
    max_steps and holdout end an epoch and a run.
    """
    seen, lrs = seen_of(name), LRS.get(name, [0.013])
    assert len(seen.steps) == len(lrs)
    for lr, groups in zip(lrs, seen.steps):
        for key, group in groups.items():
            assert group["lr"] == pytest.approx(lr * scale_of(seen, name, key), abs=1e-12), key
    if name in PROBES:
        assert {scale_of(seen, name, key) for key in seen.steps[0]} == set(CASES[name][1]["blrs"])


@pytest.mark.parametrize("name", LONGS)
def test_parts_precision_and_clipping_of_every_step(name, seen_of):
    """accum_steps 2: two halves, each with half its gradient; bf16 in the forward pass alone; clip_grad."""
    seen = seen_of(name)
    first = [call["inputs"][0] for call in seen.calls]
    assert len(first) == 12 and {len(imgs if torch.is_tensor(imgs) else imgs[0]) for imgs in first} == {50}
    if name in PROBES:
        assert True in seen.read_in_half and not any(call["half"][0] for call in seen.calls)
    else:
        assert {call["half"] for call in seen.calls} == {(True, torch.bfloat16)}
    for i, call in enumerate(seen.calls):
        output, gradient = call["output"], call["gradient"]
        if name in (*PROBES, *SUPERVISED):                      # of logits: (softmax - target) / 100
            target = (seen.mixes[i]["result"][1] if name in SUPERVISED
                      else F.one_hot(gradient.argmin(-1), 10))
            assert torch.allclose(100 * gradient, output.softmax(-1) - target, atol=0.01)
        else:
            assert gradient.item() == 0.5
    assert all(call["fresh"] for call in seen.calls[::2]), "a step begins without gradients"
    for groups in seen.steps if name not in PROBES else ():
        norms = [group["norm"] for group in groups.values() if group["norm"] is not None]
        norm = max(norms) if name == "ibot" else math.sqrt(sum(norm ** 2 for norm in norms))
        assert norm == pytest.approx(0.003, rel=0.01), "ibot clips each tensor, the others all together"


@pytest.mark.parametrize("name", [name for name in LONGS if name not in PROBES])
def test_loss_scaling_is_undone_before_clipping(name):
    """With fp16 gradients have their own size when they are clipped."""
    seen = Seen()
    hook = register_optimizer_step_pre_hook(seen.on_step)
    try:
        run(command_of(name, amp="fp16", max_steps=1), seen.prepare)
    finally:
        hook.remove()
    assert seen.calls[0]["half"] == (True, torch.float16) and seen.scaled is False


TERMS = {"beit": ["accuracy"], "vqkd": ["rec", "commit"], "dvae": ["nll", "kl"]}    # beside the loss


@pytest.mark.parametrize("name", LONGS)
def test_log_of_the_run(name, seen_of):
    """log_every, eval_every and save_every; a loss is the mean of its parts; epochs end after two steps."""
    seen = seen_of(name)
    lines = log_of(seen.folder)
    logged = {line["step"]: line for line in lines if "loss" in line}
    # a line after 3 steps, and at the end of each epoch; its loss is the mean since the last one
    assert list(logged) == [2, 3, 4, 6] and logged[6]["epoch"] == 3
    assert [logged[step]["lr"] for step in logged] == pytest.approx([LRS[name][step - 1] for step in logged])
    if name not in (*PROBES, *SUPERVISED):
        terms = [{"loss": call["output"]} | (dict(zip(TERMS[name], call["terms"])) if name in TERMS else next(
            (part for part in call["terms"] if isinstance(part, dict)), {})) for call in seen.calls]
        for key in terms[0]:
            values = [found[key].item() for found in terms]
            means = [sum(values[2 * a:2 * b]) / (2 * (b - a)) for a, b in ((0, 2), (2, 3), (3, 4), (4, 6))]
            assert [line[key] for line in logged.values()] == pytest.approx(means, rel=1e-3, abs=1e-6), key
    judged = [line["step"] for line in lines if "loss" not in line]
    assert judged == ([6] if name in PROBES else [0, 2, 4, 6])
    saved = [call["obj"]["step"] for call in seen.saved if "step" in call["obj"]]   # also before evaluations
    assert saved == ([2, 6] if name in PROBES else [2, 4, 6])
    if name in ("mae", "beit", "cae", "beit_v2", "ibot"):
        student = [seen.model.student.encoder] if name == "ibot" else []
        assert [call["model"] for call in seen.judged] == 4 * [seen.model, *student]
        assert {(len(call["train_set"]), len(call["val_set"])) for call in seen.judged} == {(200, 8)}


# ---- sets and pixels ----

@pytest.mark.parametrize("name", CASES)
def test_images_of_the_run(name, seen_of):
    """holdout and label_fraction choose the images; pixels are normalised as the method or the file says."""
    seen, flags = seen_of(name), CASES[name][1]
    train, val = (200, 8) if "holdout" in flags else (208, 41)
    if "label_fraction" in flags:
        train = sum(round(0.5 * n) for n in data.draw_shapes(208, 8, 0)[1].bincount().tolist())
    assert len(seen.source) == train and seen.source.imgs.shape[-1] == 12
    assert {len(source) for _, source in seen.shown} <= {train, val}
    assert any(len(source) == val for _, source in seen.shown)
    half, none = ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)
    stats = {"dvae": none, "vqkd": half, "finetune": half, "linear 2": ((0.4,) * 3, (0.3,) * 3)}
    found = tuple(map(tuple, (seen.source.mean, seen.source.std)))
    wanted = of(stats, name, None)
    assert found == wanted if wanted else found not in (half, none, stats["linear 2"])
    assert all((source.mean, source.std) == (seen.source.mean, seen.source.std) for _, source in seen.shown)


@pytest.mark.parametrize("name", [name for name in CASES if name not in LONGS])
def test_seed_draws_weights_and_images(name):
    """Another --seed begins with other weights and other images; the same one with the same."""
    class Enough(Exception):
        pass
    begun, seen = [], Seen()

    def stop(model, inputs, options):
        first = inputs[0] if torch.is_tensor(inputs[0]) else inputs[0][0]
        begun.append((torch.cat([p.detach().flatten() for p in model.parameters()]), first))
        raise Enough
    seen.before = stop
    for seed in (3, 3, 4):
        with pytest.raises(Enough):
            run(command_of(name, seed=seed, output_dir=len(begun)), seen.prepare)
    (a, x), (b, y), (c, z) = begun
    assert torch.equal(a, b) and torch.equal(x, y) and not torch.equal(a, c) and not torch.equal(x, z)


# ---- what changes from step to step ----

def cosine(done, start, end):
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def test_temperature_and_beta_of_the_dvae(seen_of):
    """tau falls from 1 to 0.2 in the first quarter of the training, beta rises to 3 in the whole of it."""
    calls = seen_of("dvae").calls[::2]
    assert [call["inputs"][1].item() for call in calls] == pytest.approx([1, 0.4, 0.2, 0.2, 0.2, 0.2])
    assert [call["inputs"][2].item() for call in calls] == \
        pytest.approx([cosine(step / 6, 0, 3) for step in range(6)])


def test_averages_of_the_weights(seen_of):
    """momentum of CAE's copy and of iBOT's teacher, ema of the dVAE and of a classifier."""
    def close(a, b):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    cae = seen_of("cae")
    key = "blocks.1.attn.qkv.weight"
    close(cae.model.teacher.state_dict()[key], cae.average(f"encoder.{key}", [0.6] * 6, late=False))
    assert seen_of("cae 2").model.teacher is None
    for name, momentum in (("ibot", 0.7), ("ibot 2", 0.5)):
        seen = seen_of(name)
        schedule = [cosine(step / 6, momentum, 1) for step in range(6)] if name == "ibot" else [momentum]
        close(seen.model.teacher.head.mlp[0].weight, seen.average("student.head.mlp.0.weight", schedule))
    seen = seen_of("dvae")
    key, momenta = "encoder.blocks.input.weight", [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3]
    close(read(seen.folder / "tokenizer.pt")["model"][key], seen.average(key, momenta))
    for name in SUPERVISED:
        seen = seen_of(name)
        key, momentum = "blocks.0.mlp.fc1.weight", CASES[name][1]["ema"]
        close(read(seen.folder / "encoder.pt")["model"][key], seen.average(key, [momentum] * 6))


def test_centres_of_ibot(seen_of):
    """They move by a tenth towards the mean over both parts of a step."""
    seen, centre = seen_of("ibot"), 0
    for a, b in zip(seen.calls[::2], seen.calls[1::2]):
        centre = 0.9 * centre + 0.1 * (a["terms"][-1][0] + b["terms"][-1][0]) / 2
    assert torch.allclose(seen.model.centre, centre, atol=1e-6)


def test_restarts_of_the_codes(seen_of):
    """restart 2: hits are counted anew after every second step, but for the last fifth of the training."""
    hits = [only(values.values()) for values in seen_of("vqkd").hits]
    assert hits == [0, 400, 0, 400, 0, 400, 800]


def test_schedules_of_ibot(seen_of):
    """Weight decay, temperatures, frozen prototypes and the first epoch with hidden patches."""
    seen = seen_of("ibot")
    for step, groups in enumerate(seen.steps):
        decays = {group["weight_decay"] for group in groups.values()} - {0}
        assert only(decays) == pytest.approx(cosine(step / 6, 0.07, 0.31))
        frozen = {key for key, group in groups.items() if group["norm"] is None}
        assert frozen == ({key for key in groups if "last_layer" in key} if step < 2 else set())
    temps = [[value.item() for value in call["inputs"][3:5]] for call in seen.calls]
    assert temps == [pytest.approx(pair) for pair in
                     4 * [[0.03, 0.03]] + 4 * [[0.05, 0.03]] + 4 * [[0.05, 0.09]]]
    assert [bool(call["inputs"][2].any()) for call in seen.calls] == 4 * [False] + 8 * [True]
    assert not any(group["norm"] is None for group in seen_of("ibot 2").steps[0].values())


def test_hidden_patches_of_ibot(seen_of):
    """Every global crop draws one of pred_ratio and a share in the range of its own pred_ratio_var."""
    seen = seen_of("ibot")
    shares = torch.cat([call["num_masked"] for call in seen.masks]) / 4
    low, high = shares[shares < 0.375], shares[shares >= 0.375]
    assert len(shares) == 12 * 100 and 500 < len(low) < 700
    assert 0.25 <= low.min() < 0.255 and 0.345 < low.max() <= 0.35
    assert 0.4 <= high.min() < 0.42 and 0.78 < high.max() <= 0.8
    assert all((call["rule"], call["grid"]) == ("end", 2) for call in seen.masks)
    n, mean, var = 100, 0.45, (0.09 + 0.36) / 2 + (0.05 ** 2 + 0.2 ** 2) / 6 - 0.45 ** 2
    assert seen.model.max_masked == math.ceil(4 * min(0.8 * n, n * mean + 6 * math.sqrt(n * var)))
    short = seen_of("ibot 2").calls[0]["inputs"]
    assert short[2].sum(1).tolist() == 40 * [2]
    assert [len(inputs[1]) for inputs in (seen.calls[0]["inputs"], short)] == [3, 1], "local crops"


def test_patches_that_mae_hides(seen_of):
    """sampling block: the encoder keeps what is left of half the patches, in blocks of at least one."""
    seen = seen_of("mae")
    asked = only((call["num_masked"], call["min_block"], call["rule"]) for call in seen.masks)
    assert asked == (2, 1, "fill")
    assert not seen_of("mae 2").masks


@pytest.mark.parametrize("aug", AUGS)
def test_augmentations_of_mae(aug):
    """--aug names one of four views."""
    seen = Seen()
    run(command_of("mae 2", aug=aug), seen.prepare)
    assert seen.views == [AUGS[aug]]


# ---- completeness ----

def help_of(script, capsys):
    """The --flags that have an entry in the help of a script."""
    capsys.readouterr()
    with guarded() as patch, pytest.raises(SystemExit):
        main_of(f"{script} --help", patch)
    flags = set(re.findall(r"^ {1,8}(?:-h, )?--([a-z][\w-]*)", capsys.readouterr().out, re.M))
    assert flags >= {"help", "epochs", "img_size"}, "read wrongly"
    return flags


def test_every_flag_is_typed_here(capsys):
    """A flag of a script that no case types, and that has no reason in ELSEWHERE, is one that nobody tests;
    the modes of vit.py build the same model and read the same images, and count as one.
    """
    typed = defaultdict(set)
    for script, flags in CASES.values():
        typed[script.partition(" --mode")[0]] |= flags.keys()
    for script in {script for script, _ in CASES.values()} | {"vit.py --mode knn"}:
        forgotten = help_of(script, capsys) - typed[script.partition(" --mode")[0]] - ELSEWHERE.keys()
        assert not forgotten, (script, forgotten)
    assert {script.split()[0] for script in typed} == {
        path.name for path in Path(data.__file__).parent.glob("*.py")} - {"data.py"}


def test_both_stages_of_beit_v2_in_one_command():
    """Without --stage the flags of both are typed together, and the second reads the codes of the first."""
    seen = Seen()
    flags = CASES["beit_v2 2"][1] | CASES["vqkd 2"][1] | dict(num_codes=18, drop_path=0.3)
    run(command_of("beit_v2 2", **flags).replace("--stage pretrain", "").replace("--output_dir run", ""),
        seen.prepare)
    assert (type(seen.model), seen.model.lm_head.out_features) == (beit_v2.BEiTv2, 18)
    assert seen.views == [data.View(12, **CROP, tokenizer_size=12)]
    words = read("out/beit_v2-tokenizer-shapes/tokenizer.pt")
    assert (words["config"]["num_codes"], words["config"]["code_dim"]) == (18, 6)
