"""Official files in, our weights out: every layout by its full names, official numbers through the loaders,
refusals, and timm's own classes as the reader of what we write (skipped where timm is not installed)."""
import argparse
import json
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import beit
import beit_v2
import cae
import data
import dvae
import ibot
import mae
import vit
from conftest import ROOT
from vit import SIZES, ViT

LAYOUTS = json.loads((ROOT / "tests" / "golden" / "layouts.json").read_text())
FLAGS = argparse.Namespace(model="vit_base", lr=np.float64(1e-4))   # as official training files hold them


def synthetic(layout):
    """A state dict with all names and shapes of a full-size layout; each tensor is one stored number."""
    state = {}
    for name, shape in LAYOUTS[layout].items():
        kind = torch.int64 if name.endswith("index") else torch.float32
        head, *tail = name.split("0-", 1)
        count, rest = (tail[0].split(".", 1) if tail else ("0", ""))
        for i in range(int(count) + 1):
            state[f"{head}{i}.{rest}" if tail else name] = torch.zeros(1, dtype=kind).expand(shape)
    return state


def written(path, content):
    torch.save(content, path)
    return path


def init(path):
    """The flags that load_init reads."""
    return argparse.Namespace(init=path, method="mae", flags={}, images=0)


def meta_load(model_of, load):
    """Build a full-size model without memory, and load into it."""
    with torch.device("meta"):
        model = model_of()
    load(model)
    return model


# ---- layouts at full size ----

ENCODERS = {  # layout: wrapper, what of the configuration must come out
    "mae encoder": ("model", dict(pool="cls", embed_dim=768, depth=12, num_heads=12, img_size=224)),
    "mae full": ("model", dict(pool="cls", pos="learned", rel_pos="none", layer_scale=0.0)),
    "mae finetuned": ("model", dict(pool="mean")),
    "timm": (None, dict(pool="cls", patch_size=16)),
    "dino b8": (None, dict(patch_size=8, img_size=224)),
    "ibot teacher": ("teacher", dict(embed_dim=768, pos_offset=0.1)),
    "beit pretrain": ("model", dict(pos="none", rel_pos="shared", layer_scale=1.0, num_heads=12)),
    "beit finetune": ("module", dict(pos="none", rel_pos="block", pool="mean")),
    "beit_v2 pretrain_base": ("model", dict(rel_pos="shared")),
    "beit_v2 pretrain_base_unshared": ("model", dict(rel_pos="shared")),
    "beit_v2 pretrain_large": ("model", dict(embed_dim=1024, depth=24, num_heads=16)),
    "beit_v2 finetune_base": (None, dict(rel_pos="block")),
    "beit_v2 vqkd_3_clip": ("model", dict(pos="learned", rel_pos="none", pool="cls")),
    "beit_v2 vqkd_1_dino": ("state_dict", dict(embed_dim=768)),
    "cae_base": ("model", dict(layer_scale=1.0, pos="learned")),
    "cae_base_atten4vis": ("model", dict(layer_scale=1.0)),
    "cae_large_dec768": ("model", dict(embed_dim=1024, num_heads=16)),
}


@pytest.mark.filterwarnings("ignore:for .*meta parameter")
@pytest.mark.parametrize("layout", ENCODERS)
def test_encoder_of_every_layout(tmp_path, layout):
    """The encoder of each official file, flags and all, is recognised and fits a ViT without a remainder."""
    wrapper, wanted = ENCODERS[layout]
    content = synthetic(layout)
    content = {wrapper: content, "args": FLAGS, "epoch": 3} if wrapper else content
    path = written(tmp_path / "file.pth", content)
    state, config, mean, _ = vit.read_encoder(path)
    wanted = {"pos_offset": 0.0} | wanted
    assert {name: config.get(name, 0.0) for name in wanted} == wanted and mean == data.STATS["imagenet"][0]
    model = meta_load(lambda: ViT(**config), lambda model: vit.load_weights(model, state, path))
    assert set(state) - set(model.state_dict()) <= {"head.weight", "head.bias"}
    changed = config | {"pool": "mean", "num_classes": 10, "img_size": config["img_size"] // 2}
    meta_load(lambda: ViT(**changed),
              lambda model: vit.load_weights(model, state, path))


@pytest.mark.filterwarnings("ignore:for .*meta parameter")
@pytest.mark.parametrize("width, heads", ((384, 12), (192, 3), (768, 12), (1024, 16)))
def test_heads_of_cae_s_small_model(tmp_path, width, heads):
    """Files of CAE that are 384 wide have 12 heads, those of all others of this width six; --num_heads is
    obeyed."""
    depth, small = 24 if width == 1024 else 12, 6 if width == 384 else heads
    with torch.device("meta"):
        model = ViT(embed_dim=width, depth=depth, num_heads=4)
    state = {name: torch.zeros(1).expand(value.shape) for name, value in model.state_dict().items()}
    layouts = ("encoder.", {}, heads), ("", {}, small), ("backbone.", {}, small), (
        "", {"mask_token": torch.zeros(1, 1, 8)}, small)
    for prefix, more, wanted in layouts:
        content = {prefix + name: value for name, value in state.items()} | more
        path = written(tmp_path / "file.pth", {"model": content})
        assert vit.read_encoder(path)[1]["num_heads"] == wanted
        assert vit.read_encoder(path, num_heads=8)[1]["num_heads"] == 8


def base(**options):
    return ViT(**SIZES["base"], **options)


def beit_base():
    return base(pos="none", rel_pos="shared", layer_scale=0.1)


METHODS = {  # layout: model of the flags of the official run, what the script gives load_init
    "mae full": (lambda: mae.MAE(base(pos="sincos")), None, ("encoder.pos_embed", "decoder_pos_embed")),
    "beit pretrain": (lambda: beit.BEiT(beit_base(), 8192), None, ()),
    "beit_v2 pretrain_base": (lambda: beit_v2.BEiTv2(beit_base(), 8192), None, ()),
    "beit_v2 pretrain_base_unshared": (lambda: beit_v2.BEiTv2(beit_base(), 8192, shared_head=False),
                                       None, ()),
    "beit_v2 vqkd_3_clip": (lambda: beit_v2.VQKD(base(), teacher_dim=512), beit_v2.official_tokenizer, ()),
    "beit_v2 vqkd_1_dino": (lambda: beit_v2.VQKD(base(), decoder_depth=1), beit_v2.official_tokenizer, ()),
    "cae_base": (lambda: cae.CAE(base(pos="sincos", layer_scale=0.1), 8192), cae.official_names,
                 ("pos_embed", "encoder.pos_embed")),
    "cae_base_atten4vis": (lambda: cae.CAE(base(pos="sincos", layer_scale=0.1), 8192, momentum=0.9),
                           lambda content: cae.official_names(content, 0.9),
                           ("pos_embed", "encoder.pos_embed", "teacher.pos_embed")),
    "cae_large_dec768": (lambda: cae.CAE(ViT(**SIZES["large"], pos="sincos", layer_scale=0.1), 8192,
                                         decoder_dim=768, decoder_heads=12), cae.official_names,
                         ("pos_embed", "encoder.pos_embed")),
}


@pytest.mark.filterwarnings("ignore:for .*meta parameter")
@pytest.mark.parametrize("layout", METHODS)
def test_whole_model_of_every_layout(tmp_path, monkeypatch, layout):
    """Decoders, heads and branches of the official files fit our models of the same flags, name by name."""
    monkeypatch.setattr(torch, "allclose", lambda *args, **options: True)   # positions have no values
    model_of, names, fixed = METHODS[layout]
    state = synthetic(layout)
    path = written(tmp_path / "file.pth", {"model": state, "args": FLAGS})
    meta_load(model_of, lambda model: vit.load_init(model, init(path), names, fixed))
    name = next(name for name in reversed(state) if name.endswith("fc2.weight"))
    broken = written(tmp_path / "broken.pth", {"model": {n: v for n, v in state.items() if n != name}})
    with pytest.raises(SystemExit):
        meta_load(model_of, lambda model: vit.load_init(model, init(broken), names, fixed))


@pytest.mark.filterwarnings("ignore:for .*meta parameter")
@pytest.mark.parametrize("separate", (False, True))
def test_whole_ibot(tmp_path, separate):
    """Student, teacher and centres of a checkpoint.pth, with a shared and with separate heads."""
    name, D = ("ibot separate", "small") if separate else ("ibot student", "base")
    student = synthetic(name)
    teacher = {n.removeprefix("module."): v for n, v in student.items() if "masked_embed" not in n}
    if not separate:
        assert teacher.keys() == synthetic("ibot teacher").keys()
    centres = synthetic("ibot ibot_loss")
    path = written(tmp_path / "checkpoint.pth", {"student": student, "teacher": teacher, "args": FLAGS,
                                                 "ibot_loss": centres, "epoch": 3})

    def network():
        head = ibot.Head(SIZES[D]["embed_dim"], 2048, 256, 8192, 8192, shared=not separate)
        return ibot.Network(ViT(**SIZES[D]), head)
    meta_load(lambda: ibot.IBOT(network(), network(), 64),
              lambda model: vit.load_init(model, init(path), ibot.official_names))


# ---- the official numbers, through the loaders ----


def test_mae_numbers(tmp_path, golden, close):
    """The encoder by itself, and encoder and decoder, from a file of the official layout."""
    arrays = golden("mae")
    positions = {"pos_embed": vit.sincos_pos_embed(48, 8), "decoder_pos_embed": vit.sincos_pos_embed(32, 8)}
    path = written(tmp_path / "mae.pth", {"model": golden("mae", "w/") | positions, "args": FLAGS})
    model = mae.MAE(ViT(32, 4, 48, 3, 3, pos="sincos"), 32, 2, 2)
    vit.load_init(model, init(path), fixed=("encoder.pos_embed", "decoder_pos_embed"))
    latent, _, ids_restore = model.forward_encoder(arrays["images"], arrays["noise"])
    close(latent[0], arrays["latent_0"])
    close(model.forward_decoder(latent, ids_restore)[0], arrays["pred_0"])
    state, config, _, _ = vit.read_encoder(path, num_heads=3)
    alone = ViT(**config)
    vit.load_weights(alone, state, path)
    assert torch.equal(alone.forward_features(arrays["images"]),
                       model.encoder.forward_features(arrays["images"]))


def test_a_last_pt_starts_a_new_run(tmp_path, capsys):
    """--init with a last.pt of ours: the same weights; with another method's: one sentence."""
    torch.manual_seed(0)
    source, model = (mae.MAE(ViT(32, 4, 48, 2, 3, pos="sincos"), 32, 1, 2) for _ in range(2))
    path = written(tmp_path / "last.pt", {"step": 5, "model": source.state_dict(), "optimizer": {}})
    fixed = ("encoder.pos_embed", "decoder_pos_embed")
    vit.load_init(model, init(path), fixed=fixed)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), model.parameters()))
    with pytest.raises(SystemExit):
        vit.load_init(beit.BEiT(ViT(32, 4, 48, 2, 3), 64), init(path))
    assert "belongs to another model" in capsys.readouterr().err
    shifted = {name: v + 1 if name in fixed else v for name, v in source.state_dict().items()}
    with pytest.raises(SystemExit):
        vit.load_init(model, init(written(path, {"step": 5, "model": shifted})), fixed=fixed)
    assert "other positions" in capsys.readouterr().err


def test_names_of_a_file_without_translation(tmp_path, capsys):
    """What the model has keeps its name, all else is the encoder's, a bias table is fitted; a name that is
    unknown there, or missing, ends with one sentence."""
    options = dict(pos="none", rel_pos="shared", layer_scale=0.1)
    source, model, larger = (beit.BEiT(ViT(size, 4, 48, 2, 3, **options), 64) for size in (32, 32, 48))
    table = "rel_pos_bias.relative_position_bias_table"
    torch.nn.init.normal_(source.encoder.get_parameter(table))
    state = {name.removeprefix("encoder."): value for name, value in source.state_dict().items()}
    path = written(tmp_path / "beit.pth", {"model": {f"module.{n}": v for n, v in state.items()}})
    vit.load_init(model, init(path))
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), model.parameters()))
    vit.load_init(larger, init(path))
    wanted = vit.interpolate_rel_pos(state[table], 12)
    assert torch.equal(larger.encoder.get_parameter(table), wanted)
    without = {name: value for name, value in state.items() if name != "lm_head.bias"}
    for change, named in ((state | {"extra.weight": torch.zeros(3)}, "encoder.extra.weight"),
                          (without, "lm_head.bias")):
        with pytest.raises(SystemExit):
            vit.load_init(model, init(written(path, {"model": change})))
        assert named in capsys.readouterr().err


def test_beit_fine_tuned_numbers(tmp_path, golden, close):
    """Tables in the blocks, mean pooling, layer scale: logits of the official fine-tuned model."""
    arrays = golden("vit_beit")
    path = written(tmp_path / "beit.pth", {"model": golden("vit_beit", "w/"), "args": FLAGS})
    state, config, _, _ = vit.read_encoder(path)
    model = ViT(**config | {"num_classes": 10})
    vit.load_weights(model, state, path)
    close(model(golden("vit")["images"]), arrays["logits"])


def test_beit_numbers(tmp_path, golden, close):
    """Pre-training files of both BEiTs: all logits at hidden patches, of both heads."""
    arrays, options = golden("beit"), dict(pos="none", rel_pos="shared", layer_scale=0.1)
    path = written(tmp_path / "beit.pth", {"model": golden("beit", "w/"), "args": FLAGS})
    model = beit.BEiT(ViT(32, 4, 48, 3, 4, **options), 64, 26)
    vit.load_init(model, init(path))
    close(model.lm_head(model.hidden_states(arrays["x"], arrays["mask"])[arrays["mask"]]), arrays["logits"])
    arrays = golden("beit_v2")
    path = written(tmp_path / "beit.pth", {"module": golden("beit_v2", "w/")})
    model = beit_v2.BEiTv2(ViT(32, 4, 32, 4, 4, **options), 64, 26, 3)
    vit.load_init(model, init(path))
    h, branch = model.hidden_states(arrays["images"], arrays["mask"])
    close(model.lm_head(h)[arrays["mask"]], arrays["logits_mim"])
    close(model.lm_head(branch)[arrays["mask"]], arrays["logits_cls"])
    state, config, _, _ = vit.read_encoder(path)
    assert config["num_heads"] == 4 and config["img_size"] == 32            # read off the table
    alone = ViT(**config)
    vit.load_weights(alone, state, path)
    assert torch.equal(alone.features(arrays["images"]), model.encoder.features(arrays["images"]))


def test_cae_numbers(tmp_path, golden, close):
    """Loss of the official model with its own teacher; without one in the file the teacher is the encoder."""
    arrays = golden("cae")
    imgs, ids, mask = arrays["images"], arrays["token_ids"].long(), arrays["mask"]
    for extra in ("cae_teacher", "cae"):
        path = written(tmp_path / "cae.pth", {"model": golden("cae", "w/") | golden(extra, "w/")})
        model = cae.CAE(ViT(32, 4, 32, 3, 4, pos="sincos", layer_scale=0.1), 96, 32, 2, 2, layer_scale=0.1,
                        momentum=0.9)
        positions = [name for name in model.state_dict() if name.endswith("pos_embed")]
        vit.load_init(model, init(path), lambda content: cae.official_names(content, 0.9), positions)
        if extra == "cae_teacher":
            close(model(imgs, ids, mask)[0], arrays["loss"], 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), model.teacher.parameters()))


def test_ibot_numbers_and_dino_positions(tmp_path, golden, close):
    """Tokens of the official backbone, also of smaller crops, with DINO's interpolation of positions."""
    arrays, weights = golden("ibot"), golden("ibot", "w/")
    assert "masked_embed" in weights
    backbone = {f"module.backbone.{name}": v for name, v in weights.items()}
    head = {"module.head.last_layer.weight_g": torch.ones(4, 1)}
    for content in ({"state_dict": weights},
                    {"student": backbone, "teacher": backbone | head, "args": FLAGS}):
        content = {key: {n: v for n, v in part.items() if key == "state_dict" or "masked" not in n}
                   if isinstance(part, dict) else part for key, part in content.items()}
        path = written(tmp_path / "ibot.pth", content)
        state, config, _, _ = vit.read_encoder(path, num_heads=3)
        model = ViT(**config)
        vit.load_weights(model, state, path)
        close(model.forward_features(arrays["images"]), arrays["tokens_plain"])
        close(model.forward_features(arrays["local"]), arrays["tokens_local"])
        small = ViT(**config | {"img_size": 16})
        vit.load_weights(small, state, path)
        close(small.forward_features(arrays["local"]), arrays["tokens_local"])


# ---- DALL-E's pickles and CLIP's archive ----


def pickled(path, part, monkeypatch):
    """Save the tensors of an encoder or decoder as OpenAI does: as a module of a package that is not here."""
    package = types.ModuleType("dall_e")

    class Conv2d(nn.Module):
        pass

    class Encoder(nn.Module):
        pass
    for kind in (Conv2d, Encoder):
        kind.__module__, kind.__qualname__ = "dall_e", kind.__name__
        setattr(package, kind.__name__, kind)

    def copy(module, kind):
        twin = kind()
        for name, p in module.named_parameters(recurse=False):
            twin.register_parameter({"weight": "w", "bias": "b"}[name], nn.Parameter(p.detach().clone()))
        for name, child in module.named_children():
            twin.add_module(name, copy(child, Conv2d))
        return twin
    module = copy(part, Encoder)
    module.settings = (torch.device("cpu"), OrderedDict(n_hid=8))
    monkeypatch.setitem(sys.modules, "dall_e", package)
    torch.save(module, path)
    monkeypatch.delitem(sys.modules, "dall_e")


@pytest.mark.parametrize("n_hid, n_init", ((64, 0), (16, 40), (80, 24)))
def test_dalle_pickles(tmp_path, monkeypatch, capsys, n_hid, n_init):
    """encoder.pkl and decoder.pkl become a dVAE of any grid, without the package that they name; the width of
    the decoder's first layer is read off the file."""
    torch.manual_seed(0)
    source = dvae.DVAE(grid=4, stride=8, n_hid=n_hid, vocab=32, n_init=n_init).eval()
    width = len(source.decoder.get_parameter("blocks.input.bias"))
    assert width == (n_init or 32) and (width == max(32, n_hid // 2)) == (n_init == 0)
    for name, part in (("encoder", source.encoder), ("decoder", source.decoder)):
        pickled(tmp_path / f"{name}.pkl", part, monkeypatch)
    model = dvae.load_tokenizer(tmp_path / "encoder.pkl", 4)
    imgs = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.tokens(imgs), source.tokens(imgs))
    assert torch.equal(model.paint(model.tokens(imgs)), source.paint(source.tokens(imgs)))
    assert dvae.DVAE(**model.config).load_state_dict(source.state_dict())
    assert dvae.load_tokenizer(tmp_path / "encoder.pkl", 6).tokens(torch.rand(1, 3, 48, 48)).shape == (1, 36)
    names = data.load_file(tmp_path / "encoder.pkl", "blocks.input.w").keys()
    assert names == synthetic("dalle encoder").keys()
    (tmp_path / "decoder.pkl").unlink()
    with pytest.raises(SystemExit):
        dvae.load_tokenizer(tmp_path / "encoder.pkl", 4)
    assert "decoder.pkl" in capsys.readouterr().err


def test_a_pickle_runs_nothing(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)
    torch.save(Evil(), tmp_path / "encoder.pkl")
    with pytest.raises(SystemExit):
        dvae.load_tokenizer(tmp_path / "encoder.pkl", 4)
    said = capsys.readouterr()
    assert "executed" not in said.out and "blocks.input.w" in said.err


class SlowBlock(nn.Module):
    """A block of CLIP by PyTorch's own attention, under CLIP's names."""

    def __init__(self, dim, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, 4 * dim), "c_proj": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


class SlowCLIP(nn.Module):
    def __init__(self, dim=128, heads=2, patch=8, grid=4, out=48):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(dim))
        self.positional_embedding = nn.Parameter(torch.randn(1 + grid * grid, dim))
        self.proj = nn.Parameter(torch.randn(dim, out))
        self.conv1 = nn.Conv2d(3, dim, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*(SlowBlock(dim, heads) for _ in "ab"))})
        for p in self.parameters():
            p.data.add_(0.1 * torch.randn_like(p))

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.transformer["resblocks"](self.ln_pre(x))
        return self.ln_post(x) @ self.proj


@pytest.mark.filterwarnings("ignore")                           # TorchScript is deprecated
@pytest.mark.parametrize("archive", (True, False))
def test_clip_as_teacher(tmp_path, close, archive):
    """From a TorchScript archive or a state dict; patch features after norm and projection, CLIP's pixels."""
    torch.manual_seed(0)
    whole = nn.Module()
    whole.visual, whole.text = SlowCLIP().eval(), nn.Linear(2, 2)
    whole.forward = lambda x: whole.visual(x)
    path = tmp_path / "ViT-B-16.pt"
    if archive:
        torch.jit.trace(whole, torch.randn(1, 3, 32, 32), check_trace=False).save(str(path))
    else:
        written(path, whole.state_dict())
    teacher = beit_v2.Teacher(path, 4)
    assert (teacher.dim, teacher.size) == (48, 32)
    imgs = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in beit_v2.CLIP_STATS)
    close(teacher(2 * imgs - 1), whole.visual((imgs - mean) / std)[:, 1:])
    assert beit_v2.Teacher(path, 8)(2 * imgs - 1).shape == (2, 64, 48)      # 64 px, so that the grids agree


def test_clip_names(tmp_path):
    """All names and shapes of CLIP ViT-B/16's visual tower are used."""
    path = written(tmp_path / "clip.pt", synthetic("beit_v2 clip_vitb16_visual"))
    model = beit_v2.read_clip(path, data.load_file(path))
    assert model.head.weight.shape == (512, 768) and len(model.blocks) == 12
    assert model.blocks[0].norm1.eps == model.norm.eps == 1e-5 and model.blocks[0].attn.num_heads == 12


# ---- refusals ----


@pytest.mark.parametrize("layout, change, named", (
    ("cae_base", {"surprise.weight": (1,)}, "surprise.weight"),
    ("mae full", {"encoder_extra": (1,)}, "encoder_extra"),
    ("timm", {"pos_embed": (1, 198, 768), "dist_token": (1, 1, 768)}, "distilled"),
    ("timm", {"pos_embed": None}, "neither pos_embed"),
    ("timm", {n.replace("0-11", "11"): None for n in LAYOUTS["timm"] if "0-11" in n}, "--num_heads"),
    ("timm", {"norm.weight": None, "norm.bias": None}, "norm.bias"),
    ("beit pretrain", {"blocks.3.attn.v_bias": None}, "blocks.3.attn.q_bias"),
    ("beit pretrain", {"blocks.3.attn.q_bias": None}, "blocks.3.attn.qkv.bias"),
    ("beit pretrain", {"patch_embed.proj.weight": None}, "patch_embed.proj.weight")))
def test_files_that_are_not_what_they_seem(tmp_path, capsys, layout, change, named):
    state = {n: v for n, v in synthetic(layout).items() if change.get(n, 0) is not None}
    state |= {n: torch.zeros(1).expand(shape) for n, shape in change.items() if shape}
    path = written(tmp_path / "file.pth", {"model": state})
    with pytest.raises(SystemExit):
        weights, config, _, _ = vit.read_encoder(path)
        meta_load(lambda: ViT(**config), lambda model: vit.load_weights(model, weights, path))
    assert named in capsys.readouterr().err


# ---- out ----

EXPORTED = {
    "mae": dict(pos="sincos"), "classifier": dict(num_classes=10, pool="mean"),
    "ibot": dict(pos_offset=0.1),
    "cae": dict(pos="sincos", layer_scale=0.1), "beit": dict(pos="none", rel_pos="shared", layer_scale=0.1),
    "beit_finetuned": dict(pos="none", rel_pos="block", layer_scale=0.1, num_classes=10, pool="mean"),
}


def exported(tmp_path, options, capsys):
    """An encoder.pt with random weights, through --export. -> model, path, what was printed"""
    torch.manual_seed(0)
    model = ViT(32, 4, **SIZES["micro"], **options).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    source = written(tmp_path / "encoder.pt", {"model": model.state_dict(), "config": model.config,
                                               "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3),
                                               "method": "mae"})
    vit.export(source, tmp_path / "timm.pt")
    return model, tmp_path / "timm.pt", capsys.readouterr().out


@pytest.mark.parametrize("kind", EXPORTED)
def test_export_comes_back(tmp_path, capsys, kind):
    """What --export writes is a plain state dict, and read_encoder makes the same encoder of it."""
    model, path, said = exported(tmp_path, EXPORTED[kind], capsys)
    state, config, mean, std = vit.read_encoder(path)
    assert (config, mean, std) == (model.config, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    twin = ViT(**config).eval()
    vit.load_weights(twin, state, path)
    imgs = torch.randn(2, 3, 32, 32)
    assert torch.allclose(twin(imgs), model(imgs), atol=1e-5)
    content = torch.load(path)
    assert isinstance(content, dict) and all(torch.is_tensor(value) for value in content.values())
    assert "timm.models." in said and f"{len(content)} tensors" in said
    larger = ViT(**config | {"img_size": 48})                   # positions and tables grow as the model's
    vit.load_weights(larger, state, path)
    again = ViT(**config | {"img_size": 48})
    vit.load_weights(again, model.state_dict(), path)
    assert all(torch.allclose(a, b) for a, b in zip(larger.buffers(), again.buffers()))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in larger.state_dict().items()
               if not name.endswith("qkv.bias"))                # timm has none for keys


@pytest.mark.parametrize("kind", EXPORTED)
def test_timm_reads_what_we_write(tmp_path, capsys, close, kind):
    """The printed line builds timm's model, which takes the file strictly and gives the same features."""
    timm = pytest.importorskip("timm")
    model, path, said = exported(tmp_path, EXPORTED[kind], capsys)
    theirs = eval(said.split("model = ")[1].splitlines()[0], {"timm": timm}).eval()
    theirs.load_state_dict(torch.load(path))
    imgs = torch.randn(2, 3, 32, 32)
    close(theirs(imgs), model(imgs))
    if model.config["pool"] == "cls":
        close(theirs.forward_features(imgs), model.forward_features(imgs))
    if kind == "mae":                                           # encoder.pt itself has timm's names
        theirs.load_state_dict(torch.load(tmp_path / "encoder.pt")["model"])


def test_timm_files_are_read(tmp_path, close):
    """A state dict of timm's VisionTransformer, as it is and with layer scale, gives timm's features here."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    for options in ({}, {"init_values": 0.1}):
        theirs = timm.models.VisionTransformer(img_size=32, patch_size=4, **SIZES["tiny"], num_classes=10,
                                               **options).eval()
        path = written(tmp_path / "timm.pth", theirs.state_dict())
        state, config, _, _ = vit.read_encoder(path)
        model = ViT(**config | {"num_classes": 10})
        vit.load_weights(model, state, path)
        imgs = torch.randn(2, 3, 32, 32)
        close(model(imgs), theirs(imgs))
