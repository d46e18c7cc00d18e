"""What is loaded comes through one door: all formats, nothing executed, one sentence for what is wrong."""
import io
import json
import os
import pickle
import random
import shutil
import struct
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

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
from vit import ViT

SMALL = dict(img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2)
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def started(path):
    """The flags that load_init reads."""
    return types.SimpleNamespace(init=path, method="mae", flags={}, images=0)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["script.py"])
    torch.manual_seed(0)


def refused(load, capsys, *words, path=None):
    """`load` ends with exit status 2 and one printable line that names the file and has these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        load()
    said = capsys.readouterr().err.strip("\n")
    assert stopped.value.code == 2 and said.isprintable() and len(said) < 700, said
    assert "delete" not in said and "Traceback" not in said
    for word in (*words, *([str(path)] if path else [])):
        assert word in said, said
    return said


def encoder(**options):
    model = ViT(**SMALL | options)
    return {"model": model.state_dict(), "config": dict(model.config), "mean": MEAN, "std": STD,
            "method": "mae", "data": "shapes"}


def tokenizer():
    model = dvae.DVAE(grid=2, stride=4, n_hid=8, vocab=16)
    return {"model": model.state_dict(), "config": dict(model.config), "mean": (0.0,) * 3, "std": (1.0,) * 3,
            "method": "dvae", "data": "shapes"}


def small_mae():
    return mae.MAE(ViT(**SMALL, pos="sincos"), 16, 1, 2)


FIXED = ("encoder.pos_embed", "decoder_pos_embed")


# ---- formats ----

KINDS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
         torch.int8, torch.uint8, torch.bool)
NAMES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")


def write_safetensors(path, state):
    """By the format's description, with numpy."""
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, value in state.items():
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": NAMES[KINDS.index(value.dtype)], "shape": list(value.shape),
                        "data_offsets": [len(blob), len(blob) + len(raw)]}
        blob += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + blob)
    return path


def many():
    """Tensors of all types; views, expanded, transposed, empty and 0-dim ones, a shared storage."""
    base = torch.randn(6, 4)
    state = {f"{kind}": (10 * torch.randn(3, 5)).to(kind) for kind in KINDS}
    return state | {"view": base[2:5, 1:], "turned": base.T, "tied": base, "wide": torch.ones(1).expand(3, 4),
                    "none": torch.empty(0, 3), "one": torch.tensor(3.5), "parameter": nn.Parameter(base)}


@pytest.mark.parametrize("form", ("zip", "legacy", "safetensors", "reference"))
def test_formats(form):
    """Each format gives the very tensors that were written, and numbers, texts and containers beside them."""
    state, path = many(), Path("file.weights")
    if form == "reference":                                     # as the package itself writes it
        pytest.importorskip("safetensors.torch").save_file(
            {name: value.detach().contiguous().clone() for name, value in state.items()}, path)
    elif form == "safetensors":
        write_safetensors(path, state)
    else:
        torch.save(OrderedDict(state), path, _use_new_zipfile_serialization=form == "zip")
    found = data.load_file(path)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    if form in ("zip", "legacy"):
        rest = {"a": [1, 2.5, None, True, "text", (3, {"b": torch.ones(2)})], 3: b"raw"}
        torch.save(rest, path, _use_new_zipfile_serialization=form == "zip")
        found = data.load_file(path)
        assert found["a"][:5] == rest["a"][:5] and torch.equal(found["a"][5][1]["b"], torch.ones(2))
        assert found["a"][5][0] == 3
        assert data.load_file(path).keys() == rest.keys()


def test_safetensors_are_an_encoder_and_all_parts_of_a_method(capsys):
    """timm's names without a wrapper for the judge; names of an official file for --init; bf16, too."""
    source = ViT(**SMALL | vit.SIZES["micro"])
    for kind in (torch.float32, torch.bfloat16):
        state = {name: value.to(kind) for name, value in source.state_dict().items()}
        found, config, mean, _ = vit.read_encoder(write_safetensors("model.safetensors", state))
        assert config["num_heads"] == 4 and config["depth"] == 6 and mean == data.STATS["imagenet"][0]
        twin = ViT(**config)
        vit.load_weights(twin, found, "model.safetensors")
        assert torch.equal(twin.norm.weight, source.norm.weight.to(kind).float())
    teacher = beit_v2.Teacher("model.safetensors", 2)
    assert teacher.dim == 128
    pos = dict(pos="none", rel_pos="shared", layer_scale=0.1)
    for model, twin, names, fixed in (
            (small_mae(), small_mae(), None, FIXED),
            (beit.BEiT(ViT(**SMALL, **pos), 16), beit.BEiT(ViT(**SMALL, **pos), 16), None, ())):
        state = {name.removeprefix("encoder."): value for name, value in model.state_dict().items()}
        vit.load_init(twin, started(write_safetensors("all.safetensors", state)), names, fixed)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    refused(lambda: vit.load_init(small_mae(), started("model.safetensors"), None, FIXED), capsys,
            "is missing there", path="model.safetensors")
    refused(lambda: dvae.load_tokenizer("model.safetensors"), capsys, "is no tokenizer: train one with")
    head = ibot.Head(24, 16, 8, 8, 8)
    networks = (ibot.Network(ViT(**SMALL), head) for _ in range(2))
    whole = ibot.IBOT(*networks, 2)
    refused(lambda: vit.load_init(whole, started("model.safetensors"), ibot.official_names), capsys,
            "belongs to another model", "is missing there")


def test_a_shard_of_garbage_in_safetensors(capsys):
    """Header, offsets, shapes and types that cannot be: one sentence each."""
    whole = write_safetensors(Path("a.safetensors"), {"w": torch.ones(4)}).read_bytes()
    for broken in (whole[:-1], whole[:40], whole.replace(b"F32", b"F33"), whole.replace(b"[4]", b"[5]"),
                   whole.replace(b"[0, 16]", b"[8, 24]"), whole.replace(b"[0, 16]", b"[9, 16]"),
                   whole.replace(b"[0, 16]", b"[16, 0]"), whole.replace(b'"shape"', b'"shope"'),
                   b"\xff" * 8 + whole[8:], whole.replace(b"F32", b"SAV")):
        Path("a.safetensors").write_bytes(broken)
        refused(lambda: data.load_file("a.safetensors"), capsys, path="a.safetensors")


# ---- nothing is executed ----

class Reduced:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Trap(nn.Module):
    """TorchScript that writes a file as soon as torch.jit.load makes the module."""

    @torch.jit.export
    def __getstate__(self):
        return torch.ones(2), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]):
        self.training = state[1]
        torch.save(state[0], "written by a file")

    def forward(self, x):
        return x


class Trapped(nn.Module):
    """Has a tensor that tells OpenAI's CLIP, and one of DALL-E's."""

    def __init__(self):
        super().__init__()
        self.visual, self.blocks, self.trap = nn.Module(), nn.Module(), Trap()
        self.visual.conv1, self.blocks.input = nn.Conv2d(3, 4, 2), nn.Module()
        self.blocks.input.w = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.trap(x)


EVIL = {
    "os.system": lambda: Reduced(os.system, "touch written"), "open": lambda: Reduced(open, "written", "w"),
    "eval": lambda: Reduced(eval, "open('written', 'w')"),
    "torch.save": lambda: Reduced(torch.save, 1, "written"),
    "torch.load": lambda: Reduced(torch.load, "inner.pt"), "mkdir": lambda: Reduced(os.mkdir, "written"),
    "getattr": lambda: Reduced(getattr, "written", "upper"),
}
LOADERS = {
    "vit.py --init": lambda path: vit.read_encoder(path), "dvae": lambda path: dvae.load_tokenizer(path),
    "teacher": lambda path: beit_v2.Teacher(path, 2),
    "mae": lambda path: vit.load_init(small_mae(), started(path), None, FIXED),
    "cae": lambda path: vit.load_init(small_mae(), started(path), cae.official_names),
    "ibot": lambda path: vit.load_init(small_mae(), started(path), ibot.official_names),
}


@pytest.mark.parametrize("zipped", (True, False))
@pytest.mark.parametrize("evil", EVIL)
def test_no_pickle_is_executed(evil, zipped, capsys):
    """By itself, among the weights, in their place, in a module's attributes: no effect, one sentence."""
    bad = EVIL[evil]
    module = nn.Linear(2, 2)
    module.note = bad()
    for content in (bad(), {"model": bad(), "method": "dvae", "config": {}}, {"model": {"a.weight": bad()}},
                    {"step": 1, "model": bad()}, module, {"model": {}, "config": bad()}):
        for name in ("file.pt", "encoder.pkl"):
            torch.save(content, name, _use_new_zipfile_serialization=zipped)
        for load in LOADERS.values():
            refused(lambda: load("file.pt"), capsys, path="file.pt")
        refused(lambda: dvae.load_tokenizer("encoder.pkl"), capsys, path="encoder.pkl")
        assert sorted(os.listdir()) == ["encoder.pkl", "file.pt"]


def test_storages_and_dotted_names_are_no_way_out(capsys):
    """What a pickle may name: torch.SaveStorage, dotted attributes, setstate of classes, extensions."""
    def archive(code):
        with zipfile.ZipFile("file.pt", "w") as file:
            file.writestr("archive/data.pkl", b"\x80\x04" + code + b".")
    mark = b"(X\x01\x00\x00\x00aX\x07\x00\x00\x00writtent"     # the arguments ("a", "written")
    for name in (b"SaveStorage", b"LoadStorage", b"save", b"load", b"serialization.save", b"hub.load",
                 b"FloatStorage.__init__"):
        archive(b"ctorch\n" + name + b"\n" + mark + b"R")
        refused(lambda: data.load_file("file.pt"), capsys, path="file.pt")
        archive(b"\x8c\x05torch\x8c" + bytes([len(name)]) + name + b"\x93" + mark + b"R")
        refused(lambda: data.load_file("file.pt"), capsys, path="file.pt")
    for code in (b"cposix\nsystem\n(d(dX\x01\x00\x00\x00aK\x01sX\x01\x00\x00\x00bK\x02s\x86b",   # BUILD
                 b"\x82\x01", b"\x83\x01\x02", b"iposix\nsystem\n", b"X\x01\x00\x00\x00aQ", b"NQ",
                 b"(cposix\nsystem\nX\x01\x00\x00\x00ao", b"}q\xffj\x01",
                 b"ctorch._utils\n_rebuild_tensor_v2\n" + mark + b"R"):
        archive(code)
        refused(lambda: data.load_file("file.pt"), capsys, path="file.pt")
    assert os.listdir() == ["file.pt"]


@pytest.mark.filterwarnings("ignore")                           # TorchScript is deprecated
def test_no_torchscript_is_executed(capsys):
    """Its __setstate__ would write a file; torch.jit.load is not called by any script."""
    torch.jit.script(Trapped()).save("file.pt")
    assert {"visual.conv1.weight", "visual.conv1.bias", "blocks.input.w"} == data.load_file(
        "file.pt", "blocks.input.w").keys()
    shutil.copy("file.pt", "encoder.pkl")
    for load in LOADERS.values():
        refused(lambda: load("file.pt"), capsys, path="file.pt")
    refused(lambda: dvae.load_tokenizer("encoder.pkl"), capsys, "there is no file decoder.pkl")
    assert sorted(os.listdir()) == ["encoder.pkl", "file.pt"]
    torch.jit.load("file.pt")
    assert Path("written by a file").exists(), "the file of this test is harmless"
    for script in Path(data.__file__).parent.glob("*.py"):
        assert not {"jit.load", "torch.load", "pickle.load", "weights_only=False"} & {
            word for word in ("jit.load", "torch.load", "pickle.load", "weights_only=False")
            if word in script.read_text().replace("torch.load({str(name)", "")}, script


# ---- integrity ----


def last():
    """A last.pt as a script writes it, and what would resume from it."""
    model = small_mae()
    optimizer = torch.optim.AdamW(vit.param_groups(model, 0.05), lr=1e-3, fused=True)
    model(torch.randn(4, 3, 8, 8))[0].backward()
    optimizer.step()
    parts = dict(model=model, optimizer=optimizer, scaler=torch.amp.GradScaler("cpu", enabled=False))
    return {"step": 7, **{name: part.state_dict() for name, part in parts.items()}}


def resume(content=None, flags="", model=None):
    Path("run").mkdir(exist_ok=True)
    if content is not None:
        torch.save(content, "run/last.pt")
    model = model or small_mae()
    optimizer = torch.optim.AdamW(vit.param_groups(model, 0.05), lr=1e-3, fused=True)
    args = types.SimpleNamespace(output_dir="run", resume=True, method="mae", flags={}, images=0)
    start = data.load_checkpoint(args, model=model, optimizer=optimizer,
                                 scaler=torch.amp.GradScaler("cpu", enabled=False))
    model(torch.randn(4, 3, 8, 8))[0].backward()
    optimizer.step()                                            # what came in must not end in a crash
    return start


def test_a_whole_file_resumes():
    assert resume(last()) == 7


@pytest.mark.parametrize("kind", ("last.pt", "encoder.pt", "tokenizer.pt"))
def test_flipped_bits_and_zeroed_sectors(kind, capsys):
    """One flipped bit of a stored number, or a sector of zeros at any place: refused by name."""
    torch.save({"last.pt": last, "encoder.pt": encoder, "tokenizer.pt": tokenizer}[kind](), kind)
    load = {"last.pt": lambda: data.load_file(kind), "encoder.pt": lambda: vit.read_encoder(kind),
            "tokenizer.pt": lambda: dvae.load_tokenizer(kind)}[kind]
    load()
    whole, rng = Path(kind).read_bytes(), random.Random(0)
    with zipfile.ZipFile(kind) as archive:
        places = [i.header_offset + len(i.filename) + 200 + rng.randrange(max(1, i.file_size - 200))
                  for i in archive.infolist() if i.file_size > 400]
    for place in rng.sample(places, min(12, len(places))):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << rng.randrange(8)
        Path(kind).write_bytes(spoilt)
        refused(load, capsys, path=kind)
    for sector in rng.sample(range(len(whole) // 512), 12) + [0, (len(whole) - 1) // 512]:
        spoilt = whole[:sector * 512] + bytes(512) + whole[sector * 512 + 512:]
        if spoilt[:len(whole)] != whole:
            Path(kind).write_bytes(spoilt[:len(whole)])
            refused(load, capsys, path=kind)
    for keep in (0, 1, 3, 100, len(whole) // 2, len(whole) - 1):
        Path(kind).write_bytes(whole[:keep])
        refused(load, capsys, "truncated", path=kind)


# ---- content ----

def spoil(name, *keys, to):
    """-> what puts `to` at content[name][...], or takes it away"""
    def change(content):
        place = content
        for key in keys[:-1]:
            place = place[key]
        if to is ...:
            del place[keys[-1]]
        else:
            place[keys[-1]] = to(place[keys[-1]]) if callable(to) else to
    return change


def put(*keys, to=...):
    return spoil(None, *keys, to=to)


def infinite(value):
    value = value.clone()
    value.flatten()[0] = float("inf")
    return value


WEIGHT = "blocks.1.mlp.fc1.weight"
ENCODERS = (                                                    # what is changed, what the sentence names
    (put("model", to=[]), "model"), (put("model", to=None), "model"), (put("model", to="weights"), "model"),
    (put("model"), "model"), (put("model", to={}), ""), (put("model", to=torch.ones(3)), "model"),
    (put("model", to={3: torch.ones(3)}), ""),
    (put("config", to=None), "config"),
    (put("config", to=[]), "config"),
    (put("config", to="micro"), "config"),
    (put("config", to={}), ""),
    (put("config", "depth", to="2"), "config.depth"),
    (put("config", "depth", to=2.0), "config.depth"), (put("config", "depth", to=-2), "config.depth"),
    (put("config", "num_heads", to=5), "5 heads"), (put("config", "num_heads", to=0), ""),
    (put("config", "num_heads"), "config.num_heads"), (put("config", "img_size"), "config.img_size"),
    (put("config", "pool"), "config.pool"), (put("config", "qkv_bias", to="no"), "config.qkv_bias"),
    (put("config", "drop_path", to=float("nan")), "config.drop_path"),
    (put("config", "unheard", to=1), "unheard"),
    (put("config", "embed_dim", to=48), ""), (put("config", "depth", to=3), "blocks.2"),
    (put("config", "depth", to=1), "blocks.1"), (put("mean"), "mean"), (put("std"), "std"),
    (put("mean", to=(0.5, 0.5)), "mean"),
    (put("mean", to=0.5), "mean"),
    (put("mean", to=("a", "b", "c")), "mean.0"),
    (put("std", to=(1.0, 0.0, 1.0)), "std"), (put("std", to=(1.0, float("nan"), 1.0)), "std.1"),
    (put("std", to=(float("inf"),) * 3), "std.0"), (put("std", to=(-1.0,) * 3), "std.0"),
    (put("model", WEIGHT, to=infinite), WEIGHT),
    (put("model", WEIGHT, to=lambda v: v * float("nan")), WEIGHT),
    (put("model", WEIGHT), WEIGHT), (put("model", WEIGHT, to=lambda v: v.T), WEIGHT),
    (put("model", WEIGHT, to=lambda v: v.to_sparse()), WEIGHT), (put("model", WEIGHT, to="text"), WEIGHT),
    (put("model", "patch_embed.proj.weight", to=lambda v: v.flatten(1)), "patch_embed.proj.weight"),
    (put("model", "blocks.7.extra", to=torch.ones(1)), "blocks.7.extra"),
)


def judge(path="encoder.pt"):
    state, config, mean, std = vit.read_encoder(path)
    vit.load_weights(ViT(**config), state, path)


@pytest.mark.parametrize("i", range(len(ENCODERS)))
def test_content_of_an_encoder(i, capsys):
    change, named = ENCODERS[i]
    content = encoder()
    torch.save(content, "encoder.pt")
    judge()
    change(content)
    torch.save(content, "encoder.pt")
    refused(judge, capsys, named, path="encoder.pt")
    refused(lambda: beit_v2.Teacher("encoder.pt", 2), capsys, named, path="encoder.pt")


TOKENIZERS = (
    (put("model", to=None), "model"),
    (put("model"), "model"),
    (put("config", to=None), "config"),
    (put("config"), "config"),
    (put("config", "grid"), "config.grid"), (put("config", "grid", to="2"), "config.grid"),
    (put("config", "stride", to=8), "group_"), (put("config", "recon", to=0), "config.recon"),
    (put("config", "n_hid", to=True), "config.n_hid"),
    (put("model", "encoder.blocks.input.weight"), "input.weight"),
    (put("model", "encoder.blocks.input.weight", to=infinite), "input.weight"),
    (put("model", "encoder.blocks.input.weight", to=3), "input.weight"),
    (put("model", "encoder.blocks.input.weight", to=lambda v: v.to_sparse()), "sparse"),
    (put("model", "more", to=torch.ones(2)), "more"))


@pytest.mark.parametrize("i", range(len(TOKENIZERS)))
def test_content_of_a_tokenizer(i, capsys):
    change, named = TOKENIZERS[i]
    content = tokenizer()
    change(content)
    torch.save(content, "tokenizer.pt")
    refused(lambda: dvae.load_tokenizer("tokenizer.pt"), capsys, named, path="tokenizer.pt")


LASTS = (
    (put("step"), "step"),
    (put("step", to="7"), "step"),
    (put("step", to=-7), "step"),
    (put("step", to=7.5), "step"),
    (put("model"), "model"),
    (put("model", to=None), "model"),
    (put("model", to=[1]), ""),
    (put("model", to={}), ""),
    (put("model", "mask_token", to=infinite), "mask_token"), (put("model", "mask_token"), "mask_token"),
    (put("model", "mask_token", to=lambda v: v.to_sparse()), "sparse"),
    (put("model", "mask_token", to=[0.0]), "mask_token"),
    (put("optimizer"), "optimizer"),
    (put("optimizer", to={}), "optimizer"),
    (put("optimizer", to=[]), "optimizer"),
    (put("optimizer", "state"), "optimizer.state"), (put("optimizer", "state", to=[]), "optimizer.state"),
    (put("optimizer", "param_groups", to=None), "optimizer.param_groups"),
    (put("optimizer", "param_groups", to=lambda v: v[:1]), "optimizer.param_groups"),
    (put("optimizer", "param_groups", 0, "params"), "optimizer.param_groups.0.params"),
    (put("optimizer", "param_groups", 0, "params", to=lambda v: v[1:]), "optimizer.param_groups.0.params"),
    (put("optimizer", "param_groups", 0, to=3), "optimizer.param_groups.0"),
    (put("optimizer", "state", 1, "exp_avg", to=lambda v: torch.zeros(1)), "optimizer.state.1.exp_avg"),
    (put("optimizer", "state", 1, "exp_avg", to=lambda v: torch.zeros(10 ** 6)), "optimizer.state.1.exp_avg"),
    (put("optimizer", "state", 1, "exp_avg_sq"), "optimizer.state.1.exp_avg_sq"),
    (put("optimizer", "state", 1, "exp_avg_sq", to=infinite), "optimizer.state.1.exp_avg_sq"),
    (put("optimizer", "state", 1, "step", to="x"), "optimizer.state.1.step"),
    (put("optimizer", "state", 1, "step", to=lambda v: torch.ones(3)), "optimizer.state.1.step"),
    (put("optimizer", "state", 1, to=None), "optimizer.state.1"),
    (put("optimizer", "state", to=lambda v: {i: {"step": s["step"]} for i, s in v.items()}),
     "optimizer.state.0.exp_avg"),
)


@pytest.mark.parametrize("i", range(len(LASTS)))
def test_content_of_a_checkpoint(i, capsys):
    """One sentence with the key, before a step: other shapes were a segmentation fault once."""
    change, named = LASTS[i]
    content = last()
    change(content)
    torch.save(content, "last.pt")
    before = Path("last.pt").read_bytes()
    refused(lambda: resume(content), capsys, named, path="run/last.pt")
    assert os.listdir("run") == ["last.pt"] and len(Path("run/last.pt").read_bytes()) == len(before)


def test_optimizers_and_scalers_resume():
    """SGD, LARS and a parameter that has had no gradient yet; a scaler of fp16 on either side."""
    def parts(kind):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = {"sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), "lars": vit.LARS,
                     "adam": lambda p: torch.optim.AdamW(p, 0.1)}[kind](model.parameters())
        return dict(model=model, optimizer=optimizer)
    Path("run").mkdir()
    args = types.SimpleNamespace(output_dir="run", resume=True, method="x", flags={}, images=0)
    for kind in ("sgd", "lars", "adam"):
        source, twin = parts(kind), parts(kind)
        layers = source["model"] if kind == "lars" else source["model"][0]      # the second has no gradient
        layers(torch.ones(1, 2)).sum().backward()
        source["optimizer"].step()
        torch.save({"step": 1} | {name: part.state_dict() for name, part in source.items()}, "run/last.pt")
        assert data.load_checkpoint(args, **twin) == 1
        a, b = (part["optimizer"].state_dict() for part in (source, twin))
        assert str(a) == str(b)
        assert all(map(torch.equal, source["model"].parameters(), twin["model"].parameters()))
    for there in (True, False):
        scalers = [torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (there, not there)]
        model = nn.Linear(2, 2)
        torch.save({"step": 1, "model": model.state_dict(), "scaler": scalers[0].state_dict()}, "run/last.pt")
        assert data.load_checkpoint(args, model=model, scaler=scalers[1]) == 1


@pytest.mark.parametrize("text", ("", "{", "null", "[]", "{}", '{"flags": null}', '{"flags": [1]}', "\x00"))
def test_damaged_args_json(text, capsys):
    Path("args.json").write_text(text)
    early = types.SimpleNamespace(resume=True, flags={}, images=0)
    refused(lambda: data.resumed_flags(early, "."), capsys, path="args.json")


@pytest.mark.parametrize("text", ("nonsense\n", "{}\n", "[]\n", '{"step": "x", "seconds": 1}\n', "\x00\x00\n",
                                  '{"step": 1, "seconds": 1}\n{"st\n{"step": 2, "seconds": 3}\n',
                                  '{"step": 1, "seconds": "x"}\n', '{"step": 1}\n', b"\xff\xfe\n"))
def test_damaged_log(text, capsys):
    Path("log.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    args = types.SimpleNamespace(output_dir=".", resume=True, flags={}, images=0)
    before = Path("log.jsonl").read_bytes()
    refused(lambda: data.Log(args, None, start=5), capsys, path="log.jsonl")
    assert os.listdir() == ["log.jsonl"] and Path("log.jsonl").read_bytes() == before


# ---- kinds ----

def zipped(names):
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return blob.getvalue()


def arrays():
    blob = io.BytesIO()
    np.savez(blob, weight=np.ones(3))
    return blob.getvalue()


FILES = {  # content, what the sentence says
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git-lfs pointer"),
    "page": (b"<!DOCTYPE html>\n<html><head>", "web page"), "indented": (b"\n\n  <html>\x1b[31m", "web page"),
    "npz": (arrays(), "zip archive of weight.npy"), "npy": (b"\x93NUMPY\x01\x00v\x00{'descr'", "NUMPY"),
    "text": (b"import os\n", "import os"), "escapes": (b"\x1b[31mred\x1b[2J\x07\n", "\\x1b[31mred"),
    "noise": (bytes(random.Random(1).randrange(256) for _ in range(5000)), "begins with"),
    "zeros": (bytes(5000), "begins with"), "picture": (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
    "words": (zipped(["[Content_Types].xml", "word/document.xml"]), "zip archive of [Content_Types].xml"),
    "names": (zipped(["\x1b[31mred", "b"]), "zip archive of \\x1b[31mred"),
    "no names": (zipped([]), "zip archive"),
    "empty": (b"", "it is empty"), "json": (b'{"flags": {"epochs": 3}}', "begins with"),
    "one": (b"P", "begins with"),
    "pickle": (pickle.dumps({"model": 1}), "begins with"), "hdf5": (b"\x89HDF\r\n\x1a\n", "HDF"),
    "gguf": (b"GGUF\x03\x00\x00\x00{", ""), "gzip": (b"\x1f\x8b\x08", "begins with"),
}


@pytest.mark.parametrize("kind", FILES)
def test_kinds(kind, capsys):
    """What no file of weights is: named as what it is, in every place where a file of weights may stand."""
    content, words = FILES[kind]
    Path("file.pt").write_bytes(content)
    for load in LOADERS.values():
        refused(lambda: load("file.pt"), capsys, words, path="file.pt")
    assert Path("file.pt").read_bytes() == content


def test_whole_objects_folders_and_strange_names(capsys):
    """A pickled module, a tensor, a list; a folder, no file; control characters in names and tensors."""
    torch.save(ViT(**SMALL), "module.pt")
    refused(lambda: judge("module.pt"), capsys, "whole pickled vit.ViT", path="module.pt")
    torch.save(torch.ones(3), "tensor.pt")
    refused(lambda: judge("tensor.pt"), capsys, "whole pickled torch.Tensor", path="tensor.pt")
    torch.save([1, 2], "list.pt")
    refused(lambda: judge("list.pt"), capsys, "list", path="list.pt")
    torch.save({"model": ViT(**SMALL)}, "inner.pt")
    refused(lambda: judge("inner.pt"), capsys, path="inner.pt")
    Path("folder").mkdir()
    refused(lambda: judge("folder"), capsys, "directory", path="folder")
    refused(lambda: judge("missing.pt"), capsys, "there is no file missing.pt")
    refused(lambda: judge("a\x1b[31m\nb.pt"), capsys, "there is no file a\\x1b[31m\\nb.pt")
    torch.save(encoder() | {"model": encoder()["model"] | {"blocks.9.\x1b[2J": torch.ones(1)}}, "encoder.pt")
    refused(judge, capsys, "blocks.9.\\x1b[2J")
    refused(lambda: judge("nul\0byte"), capsys, "nul\\x00byte")


# ---- the file of another part ----


def test_an_encoder_where_all_parts_are_needed(capsys):
    """encoder.pt for --init of a pre-training script: told to give that run's last.pt; and the other way."""
    torch.save(encoder(), "encoder.pt")
    for names in (None, cae.official_names, ibot.official_names):
        refused(lambda: vit.load_init(small_mae(), started("encoder.pt"), names, FIXED), capsys,
                "give the last.pt of that run", path="encoder.pt")
    torch.save(last(), "last.pt")
    refused(lambda: judge("last.pt"), capsys, "is no encoder: give an encoder.pt")
    vit.load_init(small_mae(), started("last.pt"), None, FIXED)
    for key, to in (("model", None), ("model", [3]), ("model", {"mask_token": 3}), ("model", ...)):
        content = last()
        put(key, to=to)(content)
        torch.save(content, "last.pt")
        refused(lambda: vit.load_init(small_mae(), started("last.pt"), None, FIXED), capsys, path="last.pt")
