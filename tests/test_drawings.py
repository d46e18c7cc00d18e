"""The methods' drawings: names and shapes are those of the scripts, arrows meet boxes, nothing overlaps."""
import ast
import re

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch.overrides import TorchFunctionMode

import drawings
from beit import BEiT
from beit_v2 import VQKD, BEiTv2
from cae import CAE
from conftest import ROOT
from dvae import DVAE
from ibot import IBOT, Head, Network
from mae import MAE
from vit import ViT

SIZES = {"B": 7, "D": 36, "E": 28, "K": 50, "K'": 44, "M": 90, "P": 48, "T": 40}


@pytest.fixture(scope="module", params=drawings.METHODS, ids=lambda draw: draw.__name__)
def method(request):
    """The script's name, and its drawing"""
    drawing = request.param()
    drawing.legend()
    return request.param.__name__, drawing


def test_writes_seven_small_files(tmp_path):
    drawings.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"how-{name}.png" for name in ("vit", "dvae", "beit", "beit_v2", "ibot", "mae", "cae")}
    for path in tmp_path.iterdir():
        assert path.stat().st_size < 80_000 and Image.open(path).width == 1600, path


def test_names_are_in_the_script(method):
    name, drawing = method
    tree = ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
    known = {getattr(node, kind) for node in tree for kind in ("id", "attr", "name") if hasattr(node, kind)}
    printed = {name for text in drawing.axes.texts if text.get_fontfamily() == ["monospace"]
               for name in re.findall(r"\w+", text.get_text())}
    assert len(printed) > 3 and printed <= known, printed - known


class Shapes(TorchFunctionMode):
    """Remembers the shape of every tensor that is computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.seen |= {tuple(x.shape) for x in (out if isinstance(out, (list, tuple)) else [out])
                      if isinstance(x, torch.Tensor)}
        return out


def networks(method):
    """Networks of the sizes above, for 32 px images in 4 px patches; inputs; parts whose output is printed"""
    B, D, E, K, K2, M, _, T = SIZES.values()
    imgs, codes = torch.rand(B, 3, 32, 32), torch.randint(K, (B, 64))
    few, half = ((torch.arange(64) < count).expand(B, -1) for count in (26, 32))

    def encoder(**options):
        return ViT(32, 4, D, 2, 2, **options)
    if method == "vit":
        yield encoder(num_classes=10, pool="mean"), [imgs], ["patch_embed", "blocks.1", "head"]
    elif method == "dvae":
        yield DVAE(8, 4, 16, 1, K), [imgs, 1.0, 1.0], ["encoder", "decoder"]
    elif method == "beit":
        yield BEiT(encoder(), K, 26), [imgs, codes, few], ["encoder.norm", "lm_head"]
    elif method == "beit_v2":
        model = VQKD(encoder(), K, E, 1, T)
        yield model, [imgs, torch.rand(B, 64, T)], ["encode_task_layer", "decode_task_layer"]
        yield BEiTv2(encoder(rel_pos="shared"), K, 26, 1), [imgs, codes, few], ["encoder.norm"]
    elif method == "ibot":
        student, teacher = (Network(encoder(), Head(D, 16, 8, K, K2, shared=False)) for _ in range(2))
        yield student.head, [torch.rand(B, 65, D)], []          # (B, K): the class tokens of one crop
        model = IBOT(student, teacher, M)
        inputs = [[imgs, imgs], [imgs[..., :16, :16]], torch.cat([few, half]), torch.ones(()), torch.ones(())]
        yield model, inputs, ["student.head.last_layer2"]
    elif method == "mae":
        yield MAE(encoder(pos="sincos"), E, 1, 2), [imgs], ["encoder.norm", "decoder_norm"]
    elif method == "cae":
        yield CAE(encoder(pos="sincos"), K, 32, 1, 1), [imgs, codes, half], ["norm", "head"]


def test_shapes_are_the_models(method):
    (name, drawing), shapes, outputs = method, Shapes(), set()
    with shapes:
        for model, inputs, parts in networks(name):
            for part in parts:
                model.get_submodule(part).register_forward_hook(
                    lambda module, inputs, output: outputs.add(tuple(output.shape)))
            model(*inputs)
        if name == "dvae":
            model.tokens(*inputs[:1])
    words = "\n".join(text.get_text() for text in drawing.axes.texts)
    printed = {tuple(SIZES[size] if size in SIZES else int(size) for size in shape.split(", "))
               for shape in re.findall(r"\(([BM], .*?)\)", words)}
    assert outputs <= printed <= shapes.seen, (outputs - printed, printed - shapes.seen)


def inside(x, y, area, margin=0.0):
    return (abs(x - area.x) < area.w / 2 + margin) & (abs(y - area.y) < area.h / 2 + margin)


def within(a, b):
    return abs(a.x - b.x) + a.w / 2 < b.w / 2 and abs(a.y - b.y) + a.h / 2 < b.h / 2


def ways(drawing):
    """The arrows, as many points (x, y) each, without their ends"""
    for points in drawing.arrows:
        steps = np.linspace(0, len(points) - 1, 50 * len(points))[1:-1]
        yield [np.interp(steps, range(len(points)), line) for line in zip(*points)]


def test_arrows_go_from_edge_to_edge(method):
    """An arrow begins and ends on the edge of something, and on its way passes through nothing."""
    _, drawing = method
    boxes = [a for a in drawing.areas if not any(within(b, a) for b in drawing.areas)]      # no frames
    for points, way in zip(drawing.arrows, ways(drawing)):
        for end in (points[0], points[-1]):
            assert any(inside(*end, area, 0.03) and not (area.w and inside(*end, area, -0.03))
                       for area in drawing.areas), points
        assert not any(inside(*way, area, -0.01).any() for area in boxes), points


def test_words_stand_free(method):
    """No text leaves the sheet, meets another one or an arrow, or crosses the edge of a box."""
    _, drawing = method
    renderer, words = FigureCanvasAgg(drawing.figure).get_renderer(), {}
    width, height = drawing.figure.get_size_inches()
    for text in drawing.axes.texts:
        if text.get_text():
            box = text.get_window_extent(renderer).transformed(drawing.axes.transData.inverted())
            words[text] = drawings.Area((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2, box.width, box.height)
    for text, area in words.items():
        assert within(area, drawings.Area(width / 2, height / 2, width - 0.2, height - 0.1)), text
        for other in [*drawing.areas, *(other for other in words.values() if other is not area)]:
            apart = (abs(area.x - other.x) > (area.w + other.w) / 2 - 0.01
                     or abs(area.y - other.y) > (area.h + other.h) / 2 - 0.01)
            assert apart or within(area, other), (text, other)
        assert not any(inside(*way, area).any() for way in ways(drawing)), text


def test_ibot_compares_other_crops():
    drawing = drawings.ibot()
    crops = {text.get_position()[0]: text.get_text() for text in drawing.axes.texts
             if text.get_text() in tuple("uvl")}
    (above, below), pairs = (3.75 - 0.08, 1.35 + 0.08), set()
    for (x, y), (to_x, to_y) in (points for points in drawing.arrows if len(points) == 2):
        if (y, to_y) == pytest.approx((above, below)):
            pairs.add((crops[x], crops[to_x]))
    assert pairs == {("u", "v"), ("v", "u"), ("l", "u"), ("l", "v")}
