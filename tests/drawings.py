"""A schematic drawing of each method, where its paper has figure 1. A script; pytest does not collect it.

    python tests/drawings.py OUT        # writes OUT/how-<method>.png, seven files (README: .github/pictures)

One language for all: the same picture in 8 x 8 patches, and its tokens where their patches are; white: none
here; pale colours: no loss looks. In `backticks`: names of the method's script. Shapes are of 32 px images in
4 px patches: B images, D width, K codes or prototypes, P = 48 values of a patch.
"""
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Line
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402

WIDTH, INK, RED, PALE = 8.0, "#222222", "#c8252c", "#bbbbbb"    # inches: README shows 900 px
COLOURS = "#2f4b7c #5b8e7d #bc4b51 #f4a259 #8cb369 #f4d35e #9ad1d4 #7d5ba6 #e78ac3 #3fa7d6"
STYLES = {  # what the legend says, fill, edge
    "trained": ("trained", "#cfe2f7", "#2a66a8"), "frozen": ("frozen", "#f6e3b4", "#a9822b"),
    "ema": ("running average", "#f6e3b4", "#d3b262"), "plain": ("without weights", "#ffffff", "#777777"),
    "loss": ("loss", RED, RED), "stop": ("no gradient", INK, INK), "mask": ("mask token", "#8f8f8f", "none"),
    "gone": ("hidden, no token", "#e2e2e2", "none"), "cls": ("class token", "#1d3557", "none"),
    "cells": ("", "none", PALE), "frame": ("", "none", PALE)}


# ---- what is shown, as cells: (n, n) patches of (4, 4, 3) pixels, or of one colour, (1, 1, 3) ----

def patches(img, side=32):
    """(1, 3, s, s) in [0, 1] -> cells of the picture at `side` pixels"""
    img = data.resize(img, side)[0].unflatten(2, (-1, 4)).unflatten(1, (-1, 4))
    return img.permute(1, 3, 2, 4, 0).numpy()


IMG = data.draw_shapes(60, 96, 5)[0][31:32] / 255
WHOLE, PAINTED = patches(IMG), patches(data.resize(IMG, 11))    # and as a decoder would paint it
CROPS = {"u": patches(IMG[..., 12:88, 6:82]), "v": patches(IMG[:, [2, 0, 1], 20:86, 26:92].flip(3)),
         "l": patches(IMG[..., 30:78, 24:72], 16)}
LEVELS = (12 * WHOLE.mean((2, 3, 4), keepdims=True)[..., 0]).astype(int)    # a code for each brightness
CODES = np.array([to_rgb(colour) for colour in COLOURS.split()])[LEVELS]
LATENT, TARGET = (np.tile(to_rgb(colour), (8, 8, 1, 1, 1)) for colour in ("#5b9bd9", "#d6ab3f"))
HIDDEN = {"mae": np.random.default_rng(6).permutation(64).reshape(8, 8) < 48}
for name, count, seed in (("beit", 26, 4), ("cae", 32, 6), ("u", 20, 4), ("v", 14, 9)):
    torch.manual_seed(seed)
    HIDDEN[name] = data.blockwise_mask(1, 8, count, 4, "on").view(8, 8).numpy()


# ---- how it is drawn ----

class Area(namedtuple("Area", "x y w h", defaults=(0.0, 0.0))):
    """What an arrow can meet: centre, width and height, in inches"""

    def towards(self, other):
        """The point of the edge where a level, else an upright line to the other area leaves"""
        if abs(self.y - other.y) <= max(self.h, other.h) / 2 + 1e-6:
            y = min(self, other, key=lambda area: area.h).y     # of the smaller one; its own if none is
            return self.x + np.sign(other.x - self.x) * self.w / 2, y
        return min(self, other, key=lambda area: area.w).x, self.y + np.sign(other.y - self.y) * self.h / 2


class Drawing:
    """An empty sheet with a title. It remembers what is put on it, for the legend and the tests."""

    def __init__(self, height, title, idea):
        self.figure = Figure(figsize=(WIDTH, height), dpi=200, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, height), autoscale_on=False)
        self.axes.axis("off")
        self.areas, self.arrows, self.used = [], [], set()
        self.text(0.15, height - 0.24, title, 13, ha="left", weight="bold")
        self.text(WIDTH - 0.15, height - 0.24, idea, 10, ha="right")

    def text(self, x, y, words, size=9.0, **style):
        """Lines around the height y; those in backticks are code."""
        for i, line in enumerate(lines := words.split("\n")):
            family, up = "monospace" if line[:1] == "`" else "sans-serif", (len(lines) - 1) / 2 - i
            self.axes.text(x, y + up * size / 55, line.strip("`"), family=family, size=size, zorder=6, **dict(
                ha="center", va="center_baseline", color=INK) | style)

    def area(self, x, y, w=0.0, h=0.0, kind="", radius=0.0):
        """Something to meet; of a kind, it is seen, too. Running averages are hatched."""
        if kind:
            self.used.add(kind)
            words, fill, edge = STYLES[kind]
            self.axes.add_patch(FancyBboxPatch(
                (x - w / 2, y - h / 2), w, h, f"round,pad=0,rounding_size={radius}", facecolor=fill,
                edgecolor=edge, linestyle="--" if kind == "frame" else "-", linewidth=1.4 if words else 0.8,
                hatch="////" if kind == "ema" else "", zorder=3))
        self.areas.append(Area(x, y, w, h))
        return self.areas[-1]

    def box(self, x, y, name, inside="", kind="trained", h=0.0):
        """Part of a network, function or loss: its name, and below it smaller lines, as large as they need"""
        lines, style = inside.split("\n") if inside else [], {"color": "white" if kind == "loss" else INK}
        w = 0.2 + max(0.088 * len(name.strip("`")), *(0.067 * len(line) for line in ["", *lines]))
        self.text(x, y + 0.0775 * len(lines), name, 10, weight="bold", **style)
        self.text(x, y - 0.09, inside, 8.5, **style)
        return self.area(x, y, w, h or 0.36 + 0.155 * len(lines), kind, 0.15 if kind == "loss" else 0.07)

    def grid(self, x, y, side, cells, keep=True, hidden=False, looked_at=True, cls=False, above="", below="",
             beside=""):
        """Cells where `keep`, grey where hidden; a class token if `cls`; words around them"""
        n, (left, right, low, high) = len(cells), (x - side / 2, x + side / 2, y - side / 2, y + side / 2)
        keep, hidden, looked_at = (np.broadcast_to(mask, (n, n)) for mask in (keep, hidden, looked_at))
        cells = cells.copy()
        cells[~looked_at], cells[~keep] = 0.25 * cells[~looked_at] + 0.75, 1
        for kind, where in (("mask", hidden & keep), ("gone", hidden & ~keep)):
            cells[where] = to_rgb(STYLES[kind][1])
            self.used |= {kind} if where.any() else set()
        self.axes.imshow(cells.swapaxes(1, 2).reshape(n * cells.shape[2], -1, 3), interpolation="nearest",
                         extent=(left, right, low, high), aspect="auto", zorder=2)
        gaps = dict(color="white", lw=8 * side / n, zorder=2)
        self.axes.vlines(np.linspace(left, right, n + 1), low, high, **gaps)
        self.axes.hlines(np.linspace(low, high, n + 1), left, right, **gaps)
        if cls:
            self.area(left - 0.1, high - side / n / 2, 0.88 * side / n, 0.88 * side / n, "cls")
        self.text(x, high + 0.11 + 0.08 * above.count("\n"), above)
        self.text(x, low - 0.13 - 0.08 * below.count("\n"), below)
        self.text(right + 0.1, y, beside, ha="left")
        return self.area(x, y, side, side, "cells")

    def arrow(self, *stops, stop=False, **style):
        """From area to area, by the corners (x, y) between. stop: the last is struck: no gradient passes"""
        ends = [i for i, at in enumerate(stops) if isinstance(at, Area)]
        for i, j in zip(ends, ends[1:]):
            path = [Area(*at) for at in stops[i:j + 1]]
            points = [path[0].towards(path[1]), *(at[:2] for at in path[1:-1]), path[-1].towards(path[-2])]
            self.arrows.append(points)
            self.axes.add_patch(FancyArrowPatch(path=Line(points), **dict(
                arrowstyle="-|>", mutation_scale=10, lw=1.3, capstyle="butt", color=INK, zorder=4) | style))
            if stop and j == ends[-1]:
                self.used.add("stop")
                bars = [[-0.055, -0.005], [0.005, 0.055]], [[-0.09] * 2, [0.09] * 2]
                self.axes.plot(*np.mean(points[:2], 0)[:, None, None] + bars, color=INK, lw=1.5, zorder=5)

    def looks(self, loss, *sources):
        """Red lines from what a loss compares, each an area or a list with the corners after it"""
        for source in sources:
            self.arrow(*(source if isinstance(source, list) else [source]), loss, color=RED, arrowstyle="-")

    def tokenize(self, img, by, x, y, hidden):
        """From a picture to its codes, of which a loss looks at the hidden places. -> codes"""
        codes = self.grid(x, y, 0.8, CODES, looked_at=hidden, above="`tokens`", below="(B, 64)")
        self.arrow(img, (img.x, y), self.box(2.2, y, "`tokenizer`", by, "frozen"), codes, stop=True)
        return codes

    def legend(self, x=0.2, y=0.2):
        """One line at the bottom: what of the language this drawing uses"""
        for kind, (words, _, edge) in STYLES.items():
            if kind in self.used and words:
                if kind == "stop":
                    self.arrow(self.area(x, y), self.area(x + 0.24, y), stop=True, arrowstyle="-")
                else:
                    self.area(x + 0.12, y, 0.14 if edge == "none" else 0.24, 0.14, kind, 0.02)
                self.text(x + 0.3, y, words, 8.5, ha="left")
                x += 0.47 + 0.066 * len(words)


# ---- the methods ----

def vit():
    d = Drawing(4.5, "ViT", "read patches as a Transformer reads words, then name the picture")
    blocks, head = d.box(5.5, 3.3, "`blocks`", "12 of them"), d.box(7.1, 1.4, "`head`")
    x = d.grid(4.1, 3.3, 0.9, WHOLE, cls=True, above="`cls_token, pos_embed`", below="(B, 65, D)")
    d.arrow(d.grid(0.8, 3.3, 1.0, WHOLE, above="imgs", below="(B, 3, 32, 32)"),
            d.box(2.2, 3.3, "`patch_embed`"), x, blocks,
            d.grid(7.1, 3.3, 0.9, LATENT, cls=True, above="(B, 65, D)"), d.box(7.1, 2.0, "`fc_norm`"), head)
    d.text(3.12, 3.43, "(B, 64, D)", 8.5)
    d.text(7.0, 2.5, "mean of the patches\n(or the class token)", ha="right")
    d.looks(d.box(7.1, 0.68, "cross-entropy", "label: moon", "loss"), head)
    d.text(7.18, 1.07, "(B, 10)", ha="left")
    d.arrow(blocks, d.area(3.05, 1.25, 5.5, 1.35, "frame", 0.07), arrowstyle="-", linestyle="--", color=PALE)
    d.text(0.45, 1.78, "`Block`", 10, ha="left", weight="bold")
    parts = [d.box(x, 1.0, name, kind="plain" if name == "+" else "trained") for x, name in (
        (1.25, "`norm1`"), (2.1, "`attn`"), (2.8, "+"), (3.85, "`norm2`"), (4.6, "`mlp`"), (5.2, "+"))]
    d.arrow(d.area(0.45, 1.0), *parts, d.area(5.7, 1.0))
    for start, end in ((0.7, parts[2]), (3.2, parts[5])):
        d.arrow(d.area(start, 1.0), (start, 1.5), (end.x, 1.5), end)
    return d


def dvae():
    d = Drawing(4.4, "dVAE", "give each place one of K codes, and paint the picture from the codes")
    img = d.grid(0.85, 3.2, 1.0, WHOLE, above="imgs (B, 3, 32, 32)")
    logits = d.grid(4.9, 3.2, 0.9, LATENT, above="logits (B, K, 8, 8)")
    out = d.grid(0.85, 1.15, 1.0, PAINTED, below="(B, 6, 32, 32)")
    d.arrow(img, d.box(2.8, 3.2, "`encoder`", "convolutions"), logits,
            d.box(4.9, 1.15, "`gumbel_softmax`", "(logits + noise) / tau", "plain"),
            d.box(2.55, 1.15, "`decoder`", "convolutions"), out)
    for x, y, words in ((1.86, 3.33, "`map_pixels`"), (3.58, 1.29, "(B, K, 8, 8)"), (6.0, 3.33, "argmax")):
        d.text(x, y, words, 8.5)
    codes = d.grid(7.1, 3.2, 0.9, CODES, above="`tokens`", below="(B, 64)\nfor BEiT and CAE")
    d.arrow(logits, codes, linestyle="--")
    d.looks(d.box(0.85, 2.15, "`log_laplace`", kind="loss"), img, out)
    d.looks(d.box(7.1, 1.8, "`kl_to_uniform`", kind="loss"), [logits, (5.2, 1.8)])
    return d


def beit():
    d = Drawing(4.3, "BEiT", "hide 26 of 64 patches behind a mask token, say the codes of what is hidden")
    hidden, img = HIDDEN["beit"], d.grid(0.8, 2.15, 1.0, WHOLE, beside="imgs\n(B, 3, 32, 32)")
    codes, head = d.tokenize(img, "dVAE", 4.2, 3.2, hidden), d.box(7.15, 1.15, "`lm_head`")
    d.arrow(img, (img.x, 1.15), d.box(1.75, 1.15, "`patch_embed`"),
            d.grid(3.2, 1.15, 0.9, WHOLE, True, hidden, cls=True, above="`mask_token`", below="(B, 65, D)"),
            d.box(4.55, 1.15, "`encoder`", "`forward_layers`\n`norm`"),
            d.grid(5.85, 1.15, 0.9, LATENT, hidden, above="`take`", below="(B, 26, D)"), head)
    d.text(7.05, 1.68, "(B, 26, K)", ha="right")
    d.looks(d.box(7.15, 2.3, "`cross_entropy`", "hidden patches", "loss"), head, [codes, (7.15, 3.2)])
    return d


def beit_v2():
    d = Drawing(7.4, "BEiT v2", "rebuild a teacher's features from codes; predict these codes, twice")
    d.text(0.15, 6.8, "1. VQ-KD, the tokenizer", 10, ha="left", weight="bold")
    img, z = d.grid(0.7, 5.85, 0.85, WHOLE, above="(B, 3, 32, 32)"), d.grid(5.0, 5.85, 0.7, LATENT)
    q, rebuilt = d.grid(7.4, 5.85, 0.7, CODES), d.grid(4.25, 4.45, 0.7, LATENT, below="(B, 64, T)")
    target = d.grid(2.0, 4.45, 0.7, TARGET, below="(B, 64, T)")
    d.arrow(img, d.box(1.95, 5.85, "`encoder`", "a ViT"), d.box(3.5, 5.85, "`encode_task_layer`"), z,
            d.box(6.2, 5.85, "`quantizer`", "`codebook`", "ema"), q, d.box(7.4, 4.45, "`decoder`", "a ViT"),
            d.box(5.75, 4.45, "`decode_task_layer`"), rebuilt)
    d.arrow(img, d.box(0.7, 4.45, "`Teacher`", "e.g. MAE's", "frozen"), target, stop=True)
    d.looks(d.box(3.125, 4.45, "1 - cosine", kind="loss"), target, rebuilt)
    d.arrow(z, (5.25, 6.6), d.box(6.2, 6.6, "commitment", kind="loss"), (7.4, 6.6), q, stop=True, color=RED,
            arrowstyle="-")
    d.text(5.15, 6.33, "(B, 64, E)", ha="right")
    d.arrow(q, (7.2, 5.2), (5.0, 5.2), z, linestyle="--")
    d.text(6.1, 5.08, "gradient, straight through")
    d.axes.plot([0.15, WIDTH - 0.15], [3.72, 3.72], color=PALE, lw=0.8)
    d.text(0.15, 3.52, "2. pre-training", 10, ha="left", weight="bold")
    hidden, img = HIDDEN["beit"], d.grid(0.7, 2.1, 0.85, WHOLE)
    codes = d.tokenize(img, "VQ-KD", 4.0, 3.05, hidden)
    early, late = d.box(4.25, 2.1, "`blocks`", "1 to 9"), d.box(5.45, 2.1, "`blocks`", "10 to 12")
    mixed = d.grid(4.25, 0.9, 0.7, LATENT, cls=True)
    head = d.box(6.6, 1.5, "`norm`", "`lm_head`\nat hidden\nplaces", h=1.9)
    d.arrow(img, d.box(1.9, 2.1, "`patch_embed`"),
            d.grid(3.15, 2.1, 0.7, WHOLE, True, hidden, cls=True, below="(B, 65, D)"), early, late, head)
    d.arrow(early, mixed, d.box(5.4, 0.9, "`cls_pt_layers`", "2 blocks"), head)
    d.arrow(late, (late.x, 1.55), (3.8, 1.55), mixed)
    d.text(4.9, 1.66, "class token", 8.5)
    d.text(4.33, 1.41, "patches", 8.5, ha="left")
    d.looks(d.box(7.5, 2.1, "CE", kind="loss"), head, [codes, (7.5, 3.05)])
    d.looks(d.box(7.5, 0.9, "CE", kind="loss"), head, [codes, (7.88, 3.05), (7.88, 0.9)])
    return d


def ibot():
    d = Drawing(5.2, "iBOT", "say what your own running average says: of other crops, of hidden patches")
    nets, out = {}, {}
    for who, y, side, kind, says in (("student", 3.75, 1, "trained", "softmax(logits / 0.1)"),
                                     ("teacher", 1.35, -1, "ema", "softmax((logits - centre) / temp)")):
        student = who == "student"
        for x, place, crop in ((0.72, 6.72, "u"), (1.68, 7.48, "v")):
            d.grid(x, y, 0.85, CROPS[crop], True, HIDDEN[crop] & student, above=f"crop {crop}")
            out[who, crop, "patches"] = d.grid(place, y, 0.6, LATENT if student else TARGET, HIDDEN[crop])
        for x, crop in ((5.1, "u"), (5.6, "v"), (6.1, "l"))[:2 + student]:
            out[who, crop] = d.area(x, y, 0.16, 0.16, "cls")
            d.text(x, y + 0.22 * side, crop)
        nets[who] = d.box(3.7, y, f"`{who}`", "`encoder`\n`head`", kind)
        d.arrow(d.area(1.2 + 0.3 * student, y + 0.1, 2.0 + 0.6 * student, 1.3, "frame", 0.07), nets[who],
                d.area(6.3, y + 0.12 * side, 3.1, 1.15, "frame", 0.07), stop=not student)
        for x, up, words in ((5.6, 0.5, "(B, K) each"), (7.1, 0.5, "(M, K')"), (6.3, 0.84, says)):
            d.text(x, y + up * side, words)
    d.grid(2.5, 3.75, 0.43, CROPS["l"], above="local l")
    d.arrow(nets["student"], nets["teacher"])
    d.text(3.6, 2.55, "`update_ema`", ha="right")
    d.looks(d.box(7.1, 2.55, "`patch_loss`", "same crop", "loss"), *(out[at] for at in out if len(at) == 3))
    d.looks(d.area(5.35, 2.55), d.box(4.6, 2.55, "`cls_loss`", "other crops", "loss"))
    for a, b in ("uv", "vu", "lu", "lv"):
        d.looks(out["teacher", b], out["student", a])
    return d


def mae():
    d = Drawing(4.4, "MAE", "hide 48 of 64 patches, encode the other 16, paint the hidden ones")
    hidden, img = HIDDEN["mae"], d.grid(0.85, 3.25, 1.0, WHOLE, above="imgs (B, 3, 32, 32)")
    pred = d.grid(0.85, 1.15, 1.0, PAINTED, looked_at=hidden, below="(B, 64, P)")
    kept = d.grid(2.55, 3.25, 0.9, WHOLE, ~hidden, hidden, above="`random_masking`", below="(B, 16, P)")
    d.arrow(img, kept, d.box(4.2, 3.25, "`encoder`", "`patch_embed`\n`forward_blocks`\n`norm`"),
            d.grid(5.95, 3.25, 0.9, LATENT, ~hidden, hidden, cls=True, above="latent (B, 17, D)"),
            d.box(5.95, 2.25, "`decoder_embed`"),
            d.grid(5.95, 1.15, 0.9, LATENT, True, hidden, cls=True, below="(B, 65, E)",
                   beside="`mask_token`\nat hidden places,\n`decoder_pos_embed`\nat all"),
            d.box(3.5, 1.15, "`decoder_blocks`", "`decoder_norm`\n`decoder_pred`"), pred)
    d.looks(d.box(0.85, 2.2, "`forward_loss`", "hidden patches", "loss"), img, pred)
    d.text(0.93, 2.6, "`pixel_targets`", ha="left")
    return d


def cae():
    d = Drawing(5.5, "CAE", "predict what the encoder would say of hidden patches; decode only that")
    hidden, img = HIDDEN["cae"], d.grid(0.7, 3.75, 0.85, WHOLE, beside="imgs\n(B, 3, 32, 32)")
    codes = d.tokenize(img, "dVAE", 4.4, 4.45, hidden)
    encoder = d.box(2.7, 1.9, "`encoder`", "the same\nfor both", h=2.5)
    pred, latent = d.grid(6.85, 2.7, 0.65, LATENT, hidden), d.grid(3.8, 1.05, 0.65, LATENT, hidden)
    decoder = d.box(6.85, 3.6, "`decoder_blocks`", "`norm2`\n`head`")
    regressor = d.box(5.3, 2.7, "`RegressorBlock`", "queries read visible\nones and themselves")
    d.arrow(img, (img.x, 2.7), d.grid(1.4, 2.7, 0.75, WHOLE, ~hidden, hidden, below="(B, 32, P)"), encoder,
            d.grid(3.8, 2.7, 0.65, LATENT, ~hidden, hidden, above="`visible`", below="(B, 32, D)"), regressor,
            pred, decoder)
    d.arrow(img, (img.x, 1.05), d.grid(1.4, 1.05, 0.75, WHOLE, hidden, below="(B, 32, P)"), encoder, latent,
            stop=True)
    d.arrow(d.grid(5.3, 1.75, 0.65, LATENT, hidden, hidden, below="`mask_token, pos_embed`"), regressor)
    for x, y, words in ((5.38, 2.23, "queries"), (4.2, 0.9, "(B, 32, D)"), (6.93, 4.1, "(B, 32, K)"),
                        (6.93, 2.15, "`latent_pred`\n(B, 32, D)")):
        d.text(x, y, words, ha="left")
    d.looks(d.box(6.85, 1.05, "alignment", "MSE", "loss"), latent, pred)
    d.looks(d.box(6.85, 4.45, "CE", kind="loss"), codes, decoder)
    return d


METHODS = vit, dvae, beit, beit_v2, ibot, mae, cae


def main(out):
    Path(out).mkdir(parents=True, exist_ok=True)
    for draw in METHODS:
        drawing, path = draw(), Path(out) / f"how-{draw.__name__}.png"
        drawing.legend()
        drawing.figure.savefig(path)
        Image.open(path).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("python tests/drawings.py OUT: the folder to draw into")
    main(sys.argv[1])
