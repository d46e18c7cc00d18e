"""An Image is Worth 16x16 Words (Dosovitskiy et al., 2020), arXiv:2010.11929: the backbone and the judge.

Measured: supervised ViT-micro/4, CIFAR-10, two CPU cores, 32 minutes: 72.2%; on a GPU not run.

Cut an image into patches, give each a linear embedding and a position, put a learned class token in front,
and let a Transformer encoder read the sequence; a linear classifier reads the class token, or the mean of the
patches. A convolution assumes that neighbours belong together and that a pattern means the same everywhere; a
ViT must learn both, and with few images it shows (--stem conv, a hybrid as in 3.1, gives some of it back).

    x_0 = [cls; patches E] + pos      x'_l = x_l + MSA(LN(x_l))      x_{l+1} = x'_l + MLP(LN(x'_l))
    logits = W LN(mean of the patches of x_L); with --pool cls W LN(x_L)[0]
    L = -sum_k target_k log softmax(logits)_k
    target: the label, smoothed by --smoothing, mixed by mixup or cutmix

Shapes: B images, g x g = N patches (no cls), D width, H heads, K classes.

`ViT` is the encoder of all methods but dvae.py. Run as a script this file trains it with labels; with --init
FILE it judges an encoder: our encoder.pt, or an official file of any method here, of DINO, DeiT or timm.
--export NAME.pt writes it as a plain state dict for timm.

    train      supervised, from scratch
    finetune   all weights, from --init FILE
    linear     frozen encoder, linear layer on the class token and on the mean of the patches; --layers all:
               on every block's output, too (the last blocks of BEiT decode tokens: its best features lie
               below, BEiT, section 3.5). --optimizer lbfgs, for small budgets: logistic regression to
               convergence, without augmentation; sgd and lars: BatchNorm in front, learning rates side by
               side (MAE, A.1)
    attentive  frozen encoder, one learned query attends to its tokens (CAE, 4.1)
    knn        frozen encoder, weighted vote
    features   features.npz, for use elsewhere, and a picture of their principal components
    eval       the classifier in FILE as it is: accuracy, in each class, and what it confuses
    predict    the same on --images a.jpg folder/: prints file, class, probability

Image and patch size, and --data, are those of FILE where they are not typed. Without --init, the probes
(linear, attentive, knn) give the random-encoder row that belongs in every table.

Deviations: positions and class token are not decayed (timm's rule); mean pooling by default (MAE's and
BEiT's fine-tuning); the linear probe picks its learning rate by accuracy on the training images, so that
the test images choose nothing.

    python vit.py --data shapes --epochs 5                                      # CPU, offline, 2 minutes
    python vit.py --recipe laptop                                               # CIFAR-10, CPU, 32 minutes
    python vit.py --mode linear --init out/mae-cifar10/encoder.pt               # judge an encoder, one GPU
    python vit.py --mode finetune --init out/mae-cifar10/encoder.pt
    torchrun --nproc_per_node=8 vit.py --mode finetune --data imagenet --init out/mae-imagenet/encoder.pt
"""
import copy
import itertools
import json
import math
import re
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data

# ============================================================================================================
#  THE NETWORK: what the methods share
# ============================================================================================================

SIZES = {
    "micro": dict(embed_dim=128, depth=6, num_heads=4),         # ours, for a CPU
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
}


class ViT(nn.Module):
    """Vision Transformer under timm's parameter names. Its parts are seams for the other methods:
    `patch_embed`, `cls_token`, `pos_embed`, `blocks`, `norm`.

    pool "cls": `norm` after the last block, classify the class token. pool "mean": no `norm`, classify
    `fc_norm` of the mean of the patches. num_classes 0: no head. pos "sincos" is fixed: it does not train
    unless requires_grad is set. pos_offset: of `interpolate_pos_embed`, for images of another size."""

    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
                 num_classes=0, pool="cls", pos="learned", rel_pos="none", layer_scale=0.0, drop_path=0.0,
                 qkv_bias=True, stem="patch", pos_offset=0.0):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        grid = img_size // patch_size
        self.patch_embed = PatchEmbed(patch_size, embed_dim, stem)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = None if pos == "none" else nn.Parameter(
            sincos_pos_embed(embed_dim, grid), requires_grad=pos == "learned")
        self.rel_pos_bias = RelPosBias(grid, num_heads) if rel_pos == "shared" else None
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, rate, layer_scale, qkv_bias,
                  grid if rel_pos == "block" else 0) for rate in np.linspace(0, drop_path, depth).tolist())
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6) if pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6) if pool == "mean" else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        if pos == "learned":
            nn.init.normal_(self.pos_embed, std=0.02)

    def add_cls_and_pos(self, x):
        """Embedded patches (B, N, D), all of them -> the blocks' input (B, 1 + N, D)"""
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        if self.pos_embed is not None:
            grid = math.isqrt(x.shape[1] - 1)
            x = x + interpolate_pos_embed(self.pos_embed, grid, self.config["pos_offset"])
        return x

    def forward_blocks(self, x):
        """(B, 1 + N, D) -> the output of every block, before `norm`: a list of (B, 1 + N, D)"""
        bias, outputs = None if self.rel_pos_bias is None else self.rel_pos_bias(), []
        for block in self.blocks:
            x = block(x, bias)
            outputs.append(x)
        return outputs

    def forward_layers(self, x):
        """Embedded patches (B, N, D), all of them -> the output of every block: a list of (B, 1 + N, D)"""
        return self.forward_blocks(self.add_cls_and_pos(x))

    def forward_features(self, imgs):
        """(B, 3, H, W) -> tokens of the last block, after `norm` if there is one: (B, 1 + N, D)."""
        return self.norm(self.forward_layers(self.patch_embed(imgs))[-1])

    def features(self, imgs):
        """What the classifier reads, (B, D): the class token, or `fc_norm` of the mean of the patches."""
        x = self.forward_features(imgs)
        return x[:, 0] if self.config["pool"] == "cls" else self.fc_norm(x[:, 1:].mean(1))

    def forward(self, imgs):
        """(B, 3, H, W) -> logits (B, K)"""
        return self.head(self.features(imgs))


class Block(nn.Module):
    """Pre-norm Transformer block, x + g1 Attn(LN(x)), then x + g2 MLP(LN(x)); g1, g2: layer scale or 1."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, drop_path=0.0, layer_scale=0.0, qkv_bias=True,
                 rel_pos_grid=0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.rel_pos_bias = RelPosBias(rel_pos_grid, num_heads) if rel_pos_grid else None
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None
                                      for _ in range(2))
        self.drop_path = drop_path

    def residual(self, branch, gamma):
        branch = branch if gamma is None else gamma * branch
        return drop_path(branch, self.drop_path) if self.training and self.drop_path else branch

    def forward(self, x, bias=None):
        """x (B, n, D), bias (1, H, n, n) shared by all blocks, or None -> (B, n, D)"""
        bias = self.rel_pos_bias() if self.rel_pos_bias is not None else bias
        x = x + self.residual(self.attn(self.norm1(x), bias), self.gamma_1)
        return x + self.residual(self.mlp(self.norm2(x)), self.gamma_2)


def drop_path(x, rate):
    """Stochastic depth (arXiv:1603.09382): drop an image's branch with probability `rate`, scale the rest."""
    keep = torch.rand(len(x), 1, 1, device=x.device) >= rate
    return x * keep.to(x.dtype) / (1 - rate)


def attend(q, k, v, bias=None):
    """softmax(q k^T / sqrt(d) + bias) v: q (B, H, m, d), k, v (B, H, n, d), bias (1, H, m, n) -> as q

    Written out for bfloat16 on a CPU: there the backward pass of torch's kernel is half of a step."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)                           # (B, H, m, n)
        scores = scores if bias is None else scores + bias
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(d) + bias) v; qkv holds q, k, v, each head by head."""

    def __init__(self, dim, num_heads, qkv_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x):
        """(B, n, D) -> q, k, v, (B, H, n, d) each"""
        return self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x, bias=None):
        """(B, n, D) -> (B, n, D)"""
        q, k, v = self.heads(x)
        return self.proj(attend(q, k, v, bias).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v with q, k, v from three sources; no bias on k (CAE, and its probe)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(3))
        self.k = nn.Linear(dim, dim, bias=False)

    def heads(self, q, k, v):
        """(B, m, D), (B, n, D), (B, n, D) -> (B, H, m, d), (B, H, n, d), (B, H, n, d)"""
        return (layer(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
                for layer, x in ((self.q, q), (self.k, k), (self.v, v)))

    def forward(self, q, k, v):
        """(B, m, D), (B, n, D), (B, n, D) -> (B, m, D)"""
        return self.proj(attend(*self.heads(q, k, v)).transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    def __init__(self, dim, hidden):
        super().__init__(OrderedDict(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim)))


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) -> patch embeddings (B, N, D) in raster order.

    `proj` is a convolution whose stride is its kernel, computed as what it is: a linear layer on flattened
    patches: `embed` works on any of them."""

    def __init__(self, patch_size, embed_dim, stem="patch"):
        super().__init__()
        self.patch_size, self.stem = patch_size, None
        if stem == "conv":  # stride-2 convolutions down to one pixel a patch
            if patch_size & (patch_size - 1):
                data.stop(f"--stem conv needs a power of two as --patch_size, not {patch_size}")
            widths = [3] + [max(32, embed_dim * 2 ** i // patch_size)
                            for i in range(1, patch_size.bit_length())]
            self.stem = nn.Sequential(*[layer for a, b in zip(widths, widths[1:]) for layer in (
                nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.GroupNorm(1, b), nn.GELU())])
            self.proj = nn.Conv2d(widths[-1], embed_dim, 1)
        else:
            self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def embed(self, patches):
        """(B, n, 3 * p * p), as `patches_of` gives them -> (B, n, D)"""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def forward(self, imgs):
        patches = patches_of(imgs, self.patch_size)             # refuses images that they do not tile
        return self.proj(self.stem(imgs)).flatten(2).transpose(1, 2) if self.stem else self.embed(patches)


def patches_of(imgs, p):
    """(B, 3, H, W) -> (B, N, 3 p p): patches in raster order, each flattened channel first"""
    assert imgs.shape[2] == imgs.shape[3] and imgs.shape[2] % p == 0, f"{tuple(imgs.shape)} in {p} px patches"
    return F.pixel_unshuffle(imgs, p).flatten(2).transpose(1, 2)


def image_of(patches, p):
    """The inverse of patches_of for square images: (B, N, 3 p p) -> (B, 3, H, W)"""
    g = math.isqrt(patches.shape[1])
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (g, g)), p)


def norm_patches(patches, norm_pix_loss=True, unbiased=True):
    """Patches (B, N, P) as a target: (x - mean) / std, each by its own; and these two (B, N, 1). float32

    The variance, 1e-6 added to it, is unbiased in MAE and BEiT, biased (unbiased=False) in CAE. Without
    norm_pix_loss the patches stay as they are: mean 0, std 1."""
    patches = patches.float()
    if not norm_pix_loss:
        return patches, 0.0, 1.0
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True, unbiased=unbiased)
    std = (var + 1e-6).sqrt()
    return (patches - mean) / std, mean, std


def take(x, ids):
    """Gather tokens: x (B, n) or (B, n, D), ids (B, m) -> (B, m) or (B, m, D)"""
    return x.gather(1, ids) if x.ndim == 2 else x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


class RelPosBias(nn.Module):
    """A table of attention biases by relative position, gathered for token pairs. () -> (1, H, 1+N, 1+N)

    Tokens are [cls, patches in raster order] (BEiT). Query i and key j read the row
    (row_i - row_j + g - 1) * (2g - 1) + (col_i - col_j + g - 1) of the table; its last three rows, of
    (2g - 1)^2 + 3, stand for cls -> patch, patch -> cls and cls -> cls."""

    def __init__(self, grid, num_heads):
        super().__init__()
        first, place = (2 * grid - 1) ** 2, torch.arange(grid)
        rows, cols = place.repeat_interleave(grid), place.repeat(grid)                      # (N,)
        between = (rows[:, None] - rows + grid - 1) * (2 * grid - 1) + (cols[:, None] - cols + grid - 1)
        index = F.pad(between, (1, 0, 1, 0))                                                # (1+N, 1+N)
        index[0, :], index[:, 0] = first, first + 1
        index[0, 0] = first + 2                                 # cls -> cls, so last
        self.relative_position_bias_table = nn.Parameter(torch.zeros(first + 3, num_heads))
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self):
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]


class CNN(nn.Module):
    """A residual network of the micro's size (1.2 M parameters), for the paper's question: how many labels
    make up for what a convolution assumes? Pre-norm blocks, three widths, each at half the resolution of the
    one before. Supervised only."""
    pos_embed = None

    def __init__(self, num_classes=10, width=42):
        super().__init__()
        self.config = {"num_classes": num_classes, "width": width, "pool": "cnn"}
        widths = [width, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(ConvBlock(a, b) for a, b in itertools.pairwise(widths)))
        self.norm, self.head = nn.GroupNorm(1, widths[-1]), nn.Linear(widths[-1], num_classes)

    def forward(self, imgs):
        """(B, 3, H, W) -> logits (B, K)"""
        return self.head(self.norm(self.blocks(self.stem(imgs))).relu().mean((2, 3)))


class ConvBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))); more channels come with half the resolution."""

    def __init__(self, a, b):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(1, a), nn.Conv2d(a, b, 3, stride=b // a, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(1, b), nn.Conv2d(b, b, 3, padding=1)
        self.skip = nn.Identity() if a == b else nn.Conv2d(a, b, 1, stride=b // a)

    def forward(self, x):
        y = self.conv1(self.norm1(x).relu())
        return self.skip(x) + self.conv2(self.norm2(y).relu())


def sincos_pos_embed(embed_dim, grid):
    """Fixed 2-D sine-cosine positions (MAE): first half of the width for the column, second for the row.

    w_k = 10000^(-k / (D/4)); each half is [sin(x w_0), ..., cos(x w_0), ...]; the class token's row is zero.
    -> (1, 1 + grid * grid, embed_dim) float32. embed_dim % 4 must be 0."""
    assert embed_dim % 4 == 0, f"embed_dim {embed_dim} is not divisible by 4"
    frequency = 10000.0 ** (-torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency                    # (g, D/4)
    line = torch.cat([angle.sin(), angle.cos()], 1)                                         # (g, D/2)
    columns, rows = line.repeat(grid, 1), line.repeat_interleave(grid, 0)                   # (g*g, D/2)
    return F.pad(torch.cat([columns, rows], 1).float(), (0, 0, 1, 0))[None]


def init_weights(module):
    """timm's initialisation: linear weights N(0, 0.02^2), biases 0; convolutions keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-2, b=2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_beit(model):
    """BEiT's start of a model with `encoder` and `mask_token`: N(0, 0.02^2) cut at one standard deviation,
    biases 0; what block l adds is divided by sqrt(2 l), which keeps the residual stream in size."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init_cut(module.weight)
            nn.init.zeros_(module.bias)
    for p in (model.mask_token, model.encoder.cls_token, model.encoder.pos_embed):
        if p is not None:
            init_cut(p)
    rescale(model.encoder.blocks)


def init_cut(p):
    nn.init.trunc_normal_(p, std=0.02, a=-0.02, b=0.02)


def rescale(blocks, first=1):
    """Divide what each block adds by sqrt(2 l), l its number from `first` on (BEiT)."""
    for i, block in enumerate(blocks, start=first):
        block.attn.proj.weight.data /= math.sqrt(2 * i)
        block.mlp.fc2.weight.data /= math.sqrt(2 * i)


# ============================================================================================================
#  TRAINING AND JUDGING
# ============================================================================================================

# one value, or four: shapes, laptop, small, imagenet (MAE's tables 9 to 11, CAE's 6.3); meaning; range
SHARED = {
    "mode":           ("train", "what to do", ("train", "finetune", "linear", "attentive", "knn", "eval",
                                               "predict", "features")),
    "init":           ("", "encoder to start from or to judge: our encoder.pt, or an official file"),
    "export":         ("", "write the encoder of --init FILE here, under timm's names, and do nothing else"),
    "half_stats":     (False, "--init FILE was trained on pixels of mean and std 0.5 (timm's, Google's)"),
    "num_heads":      (0, "heads of --init FILE, if no tensor or size tells; 0: told", "[0, 1024]"),
    "label_fraction": (1.0, "share of the training labels to use, the same of every class", "(0, 1]"),
    "pool":           ("mean", "the classifier reads the class token or the mean", ("cls", "mean")),
    "pos":            ("learned", "absolute positions", ("learned", "sincos", "none")),
    "rel_pos":        ("none", "relative position bias of blocks", ("none", "shared", "block")),
    "layer_scale":    (0.0, "first value of the layer scale; 0: without", "[0, 10]"),
    "stem":           ("patch", "patches by a linear layer, or convolutions: the hybrid", ("patch", "conv")),
}
SUPERVISED = {  # training from scratch, and what fine-tuning has in common with it
    "model":          (("micro", "micro", "tiny", "base"), "size of the Vision Transformer, or a small CNN",
                       (*data.MODELS, "cnn")),
    "epochs":         (20, 24, 200, {"base": 300, "large": 200, "huge": 200}),  # passes over the images
    "batch_size":     (128, 128, 512, 4096),                    # of all GPUs together
    "blr":            (1e-3, 2e-3, 5e-4, 1e-4),                 # lr = blr * batch_size / 256
    "min_lr":         1e-6,                                     # at the end
    "warmup_epochs":  (2.0, 1.0, 10.0, 20.0),                   # in which lr rises from 0
    "weight_decay":   (0.05, 0.05, 0.05, 0.3),                  # not on biases and norms
    "beta2":          ((0.999, 0.999, 0.999, 0.95), "AdamW's second beta", "[0, 1)"),
    "layer_decay":    (1.0, "factor of the learning rate from each block to the one below", "(0, 1]"),
    "drop_path":      ((0.0, 0.0, 0.1, {"base": 0.1, "large": 0.2, "huge": 0.2}), "last block's", "[0, 1)"),
    "crop_scale":     ((0.3, 0.3, 0.3, 0.08), "smallest share of the image in a random crop", "(0, 1]"),
    "rand_augment":   ((0.0, 0.0, 9.0, 9.0), "magnitude of RandAugment; 0: off", "[0, 10]"),
    "erase":          ((0.0, 0.0, 0.25, 0.0), "probability of random erasing", "[0, 1]"),
    "smoothing":      (0.1, "label smoothing", "[0, 1)"),
    "mixup":          ((0.0, 0.0, 0.8, 0.8), "alpha of mixup; 0: off", "[0, 100]"),
    "cutmix":         ((0.0, 0.0, 1.0, 1.0), "alpha of cutmix; 0: off", "[0, 100]"),
    "ema":            ((0.0, 0.0, 0.0, 0.9999), "momentum of the average that is judged; 0: off", "[0, 1)"),
}
FINETUNE = {
    "model":          data.COMMON["training"]["model"],         # no CNN
    "epochs":         (10, 3, 100, {"base": 100, "large": 50, "huge": 50}),  # passes over the images
    "batch_size":     (128, 128, 256, 1024),                    # of all GPUs together
    "blr":            (1e-3, 2e-3, 1e-3, {"base": 5e-4, "large": 1e-3, "huge": 1e-3}),
    "warmup_epochs":  (1.0, 0.3, 5.0, 5.0),                     # in which lr rises from 0
    "weight_decay":   0.05,                                     # not on biases and norms
    "beta2":          0.999,
    "layer_decay":    (0.75, 0.75, 0.75, {"base": 0.65, "large": 0.75, "huge": 0.75}),
    "drop_path":      (0.0, 0.0, 0.1, {"base": 0.1, "large": 0.2, "huge": 0.3}),
    "erase":          (0.0, 0.0, 0.25, 0.25),
    "ema":            0.0,
}
LINEAR = {  # lr = blr * batch_size / 256, times each of --blrs; small images: gentler crops than MAE's
    "epochs":         (10, 2, 90, {"base": 90, "large": 50, "huge": 50}),  # passes over the images
    "batch_size":     (128, 256, 256, 16384),                   # of all GPUs together
    "blr":            1.0,                                      # lr = blr * batch_size / 256
    "warmup_epochs":  (1.0, 0.2, 10.0, 10.0),                   # in which lr rises from 0
    "weight_decay":   None,                                     # the probes have no such flag
    "clip_grad":      None,
    "crop_scale":     ((1.0, 1.0, 0.8, 0.08), "smallest share of the image in a random crop", "(0, 1]"),
    "optimizer":      (("lbfgs", "lbfgs", "sgd", "lars"), "lbfgs: to convergence, on features without crops; "
                       "lars: for large batches", ("lbfgs", "sgd", "lars")),
    "layers":         ("last", "probe the encoder's output, or every block's, too", ("last", "all")),
    "blrs":           (([0.01, 0.1, 1.0], [0.1, 0.3, 1.0], [0.01, 0.03, 0.1, 0.3], [0.03, 0.1, 0.3]),
                       "base learning rates of probes, trained side by side", "(0, inf)"),
}
ATTENTIVE = {
    "epochs":         (10, 2, 90, 90),                          # passes over the images
    "batch_size":     (128, 256, 256, 8192),                    # of all GPUs together
    "optimizer":      ("sgd", "lars: for large batches", ("sgd", "lars")),
    "blrs":           ([0.03, 0.1, 0.3], [0.1, 0.3, 1.0], [0.03, 0.1, 0.3], [0.00625, 0.0125, 0.025]),
}
PREDICT = {
    "images": ([""], "pictures to name, and folders of pictures"),
    "json": (False, "print an object of JSON for each"),
}
RECIPES = {"train": (SHARED, SUPERVISED), "finetune": (SHARED, SUPERVISED, FINETUNE),
           "linear": (SHARED, LINEAR), "attentive": (SHARED, LINEAR, ATTENTIVE), "knn": (SHARED,),
           "eval": (SHARED,), "predict": (SHARED, PREDICT), "features": (SHARED,)}


# ---- optimisation ----

def half_cosine(done, start, end):
    """From start to end by half a cosine while `done` goes from 0 to 1, then end."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def cosine_lr(epoch, args, early=0.0):
    """Learning rate at a fractional `epoch`: linear from 0 over warmup_epochs, half a cosine to min_lr.

    early: by how much the ramp ends before the cosine begins. MAE's official code has 0; BEiT's, CAE's and
    iBOT's reach the peak a step, 1 / epoch_steps, before it and stay there for two."""
    if epoch < args.warmup_epochs:
        return args.lr * min(1.0, epoch / max(1e-8, args.warmup_epochs - early))
    done = (epoch - args.warmup_epochs) / max(1e-8, args.epochs - args.warmup_epochs)
    return half_cosine(done, args.lr, args.min_lr)


def set_lr(optimizer, lr):
    """Give every group lr, times its lr_scale where it has one. -> lr"""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def param_groups(model, weight_decay, layer_decay=1.0, no_decay=("cls_token", "pos_embed")):
    """Groups for AdamW. No decay for biases, norms and all else that is 1-D, nor for the names in `no_decay`.

    With layer_decay d, lr_scale is d^(depth + 1 - id), id 0: embeddings, i + 1: block i, depth + 1: the rest.
    Parameters that do not train are in no group."""
    depth, groups = len(model.blocks) if layer_decay != 1.0 else 0, {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name.startswith(("cls_token", "pos_embed", "patch_embed", "mask_token")):
            layer = 0
        else:
            layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1
        decay = (0.0 if p.ndim <= 1 or name.endswith(".bias") or name.split(".")[-1] in no_decay
                 else weight_decay)
        scale = layer_decay ** (depth + 1 - layer)
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(p)
    return list(groups.values())


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps on matrices have the matrix's size (You et al., 2017, arXiv:1708.03888).

    Matrices: g <- trust * |p| / |g| * g. Then m <- momentum * m + g and p <- p - lr * m."""

    def __init__(self, params, lr=0.0, momentum=0.9, trust=0.001):
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad
                if p.ndim > 1:
                    ratio = group["trust"] * p.norm() / g.norm()
                    g = g * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                p.sub_(momentum.mul_(group["momentum"]).add_(g) * group["lr"])


@torch.no_grad()
def update_ema(ema, model, momentum):
    """ema <- momentum * ema + (1 - momentum) * model, for all parameters."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - momentum)


# ---- train and finetune ----

def supervised(args, train_set, val_set, model):
    """Train all weights on the labels. -> the entries of result.json"""
    loader = data.Loader(args, train_set, [data.View(
        args.img_size, scale=(args.crop_scale, 1.0), flip=0.5, rand_augment=args.rand_augment,
        erase=args.erase)])
    if model.pos_embed is not None:
        model.pos_embed.requires_grad_(True)  # sin-cos positions are a start, not a rule, here
    net = data.wrap(model, args)
    ema = copy.deepcopy(model) if args.ema else model
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay, args.layer_decay), lr=args.lr,
                                  betas=(0.9, args.beta2), fused="mps" not in args.device)
    scaler = data.make_scaler(args)
    state = dict(model=model, optimizer=optimizer, scaler=scaler, ema=ema)
    start, result = data.load_checkpoint(args, **state), {}
    classes, trivial = len(train_set.classes), math.log(len(train_set.classes))
    log = data.open_log(args, model, loader, start, f"ln {classes} = {trivial:.3f}", loss=trivial)

    def judge(step):
        result.update(evaluate(args, ema, val_set))
        log.write(step, **result)

    if log.evaluates(start):
        judge(start)
    for step, parts in loader.steps(start, net):
        lr = set_lr(optimizer, cosine_lr(step / loader.epoch_steps, args))      # set in every step
        for (imgs,), labels in parts:
            imgs, target = data.mixup_cutmix(imgs, labels, classes, args.mixup, args.cutmix, args.smoothing)
            with data.autocast(args):
                logits = net(imgs)
            loss = -(target * logits.float().log_softmax(-1)).sum(-1).mean()
            scaler.scale(loss / args.accum_steps).backward()    # the gradients of the parts add up
            log.note(loss=loss)
        if args.clip_grad:
            scaler.unscale_(optimizer)                          # undo fp16's loss scaling before clipping
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if args.ema:
            update_ema(ema, model, args.ema)
        log.step(step, lr=lr)
        if log.saves(step + 1):
            log.save(step + 1, state, encoder=ema)
        if log.evaluates(step + 1):
            judge(step + 1)
    result = result or evaluate(args, ema, val_set)             # if the last step did not
    if isinstance(model, ViT):
        pictures(args, ema, val_set)
    log.finish()
    return result


def evaluate(args, model, val_set):
    """Top-1 accuracy in % and cross-entropy on the validation images, each counted once."""
    model.eval()
    logits, labels = data.encode(args, model.forward, val_set)  # .forward: not compiled for this shape
    model.train()
    return {"accuracy": data.percent(logits.argmax(1) == labels),
            "val_loss": F.cross_entropy(logits, labels).item()}


# ---- linear and attentive ----

class AttentivePool(nn.Module):
    """A learned query reads all tokens by cross-attention (CAE, arXiv:2202.03026).

    out = Attn(q = LN(query), k = LN(x), v = LN(x)), three LayerNorms; no residual, MLP or k bias."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(embed_dim, eps=1e-6) for _ in range(3))
        self.cross_attn = CrossAttention(embed_dim, num_heads)
        self.apply(init_weights)
        nn.init.normal_(self.query, std=0.02)

    def sources(self, tokens):
        """What queries, keys and values are made of: (B, n, D) -> (B, 1, D), (B, n, D), (B, n, D)"""
        return self.norm_q(self.query.expand(len(tokens), -1, -1)), self.norm_k(tokens), self.norm_v(tokens)

    def forward(self, tokens):
        """(B, n, D) -> (B, D)"""
        return self.cross_attn(*self.sources(tokens))[:, 0]

    def attention(self, tokens):
        """Where the query looks: (B, n, D) -> (B, H, n), sums to 1"""
        q, k, _ = self.cross_attn.heads(*self.sources(tokens))
        return (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)[:, :, 0]


PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
POOLS = {"cls": lambda tokens: tokens[:, 0], "mean": lambda tokens: tokens[:, 1:].mean(1)}


def pooled(layers):
    """Class token and mean of the patches of each layer: (B, 1 + N, D) each -> (B, 2 D for each)"""
    return torch.cat([pool(tokens) for tokens in layers for pool in POOLS.values()], 1)


class Probe(nn.Module):
    """BatchNorm without affine parameters, then a linear layer, on class token, mean, or attentive pool.

    feature: one of `probed_features`; blr: its base learning rate."""

    def __init__(self, feature, embed_dim, num_classes, num_heads=1, blr=1.0):
        super().__init__()
        self.feature, self.blr = feature, blr
        kind, _, block = feature.partition("-")
        self.layer = int(block or 0) - 1                        # of `probed_layers`
        self.pool = AttentivePool(embed_dim, num_heads) if kind == "attentive" else POOLS[kind]
        self.norm = nn.BatchNorm1d(embed_dim, affine=False, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens):
        """(B, 1 + N, D) -> (B, K)"""
        return self.head(self.norm(self.pool(tokens)))


class Probes(nn.ModuleList):
    """All probes side by side, each on its layer of `probed_layers`: (B, 1 + N, D) each -> (probes, B, K)"""

    def forward(self, layers):
        return torch.stack([one(layers[one.layer]) for one in self])


def probed_features(args, encoder):
    """cls and mean, or attentive, of the encoder's output; with --layers all before them cls-3, say, of the
    third block's. -> list of names"""
    numbers = [f"-{i + 1}" for i in range(encoder.config["depth"]) if args.layers == "all"] + [""]
    return [f"{kind}{number}" for number in numbers
            for kind in (["attentive"] if args.mode == "attentive" else POOLS)]


def probed_layers(args, encoder, imgs):
    """What the probes read, float32: the encoder's output; with --layers all the blocks' before it."""
    with torch.no_grad(), data.autocast(args):
        outputs = encoder.forward_layers(encoder.patch_embed(imgs))
        final = encoder.norm(outputs[-1])
    return [tokens.float() for tokens in [*outputs * (args.layers == "all"), final]]


def make_probes(args, encoder, num_classes):
    """-> Probes, one for each feature and each of --blrs, and their optimiser"""
    D, heads = encoder.config["embed_dim"], encoder.config["num_heads"]
    probes = Probes(Probe(feature, D, num_classes, heads, blr)
                    for blr, feature in itertools.product(
                        {f"{blr:g}": blr for blr in args.blrs}.values(),    # twins are one
                        probed_features(args, encoder)))
    groups = [{"params": list(one.parameters()), "lr_scale": one.blr} for one in probes]
    if args.optimizer == "lars":
        return probes, LARS(groups)
    return probes, torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True)


def probe(args, train_set, val_set, encoder):
    """Train probes on the frozen encoder. -> the entries of result.json"""
    loader = data.Loader(args, train_set, [data.View(args.img_size, scale=(args.crop_scale, 1.0), flip=0.5)])
    if args.batch_size == data.world_size() * args.accum_steps:
        data.stop(f"--batch_size {args.batch_size} leaves one image a part: too few for BatchNorm")
    classes = len(train_set.classes)
    data.rests_on(args, encoder.requires_grad_(False).eval())   # nothing frozen may be random
    model, optimizer = make_probes(args, encoder, classes)
    model.register_buffer("right", torch.zeros(len(model)))     # correct training images of this epoch
    model.to(args.device)
    net = data.wrap(model, args)
    state = dict(model=model, optimizer=optimizer)
    start, trivial = data.load_checkpoint(args, **state), math.log(classes)
    log = data.open_log(args, model, loader, start, f"ln {classes} = {trivial:.3f}", loss=trivial)

    for step, parts in loader.steps(start, net):
        lr = set_lr(optimizer, cosine_lr(step / loader.epoch_steps, args))      # set in every step
        if not step % loader.epoch_steps:
            model.right.zero_()
        for (imgs,), labels in parts:
            logits = net(probed_layers(args, encoder, imgs))                                # (probes, B, K)
            loss = sum(F.cross_entropy(one, labels) for one in logits)
            (loss / args.accum_steps).backward()
            model.right += data.all_sum((logits.argmax(-1) == labels).sum(1))
            log.note(loss=loss / len(model))
        optimizer.step()
        optimizer.zero_grad()
        log.step(step, lr=lr)
        if log.saves(step + 1):
            log.save(step + 1, state)
    result = judge_probes(args, encoder, model, val_set)
    if args.mode == "attentive":
        probe_pictures(args, encoder, model, val_set)
    log.write(loader.total_steps, **{k: v for k, v in result.items() if k.isalpha() and k != "all"})
    log.finish()
    return result


@torch.no_grad()
def judge_probes(args, encoder, model, val_set):
    """Accuracy in % of all probes on the validation images. For each feature the learning rate that was
    right most often on the training images of the last epoch is the one reported: the validation images
    choose nothing."""
    model.eval()
    for buffer in model.buffers():                              # BatchNorm's statistics, of all ranks
        if buffer.is_floating_point():
            data.all_sum(buffer).div_(data.world_size())
    sums = torch.zeros(len(model), device=args.device)
    for (imgs,), labels in data.Loader(args, val_set, [data.View(args.img_size)], train=False):
        sums += (model.forward(probed_layers(args, encoder, imgs)).argmax(-1) == labels).sum(1)
    accuracy, right = (data.all_sum(sums) / len(val_set) * 100).tolist(), model.right.tolist()
    result = {"all": {f"{one.feature} {one.blr:g}": value for one, value in zip(model, accuracy)}}
    for feature in probed_features(args, encoder):
        best = max((i for i, one in enumerate(model) if one.feature == feature), key=right.__getitem__)
        result |= {feature: accuracy[best], f"{feature}_blr": model[best].blr}
    if args.layers == "all":                                    # the training images choose
        best = right.index(max(right))
        result |= {"best": accuracy[best], "best_feature": model[best].feature}
    return result


# ---- linear, to convergence ----

def fit_logistic(x, y, num_classes, penalty):
    """Logistic regression: the minimum of cross-entropy + penalty / 2 |W|^2, by L-BFGS, from W = 0.

    x (n, D), of mean 0 and variance 1; y (n,) -> nn.Linear"""
    layer = nn.Linear(x.shape[1], num_classes, device=x.device)
    for p in layer.parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + penalty / 2 * layer.weight.square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return layer


def logistic(args, train_set, val_set, encoder):
    """Logistic regression on frozen features of images as they are. -> the entries of result.json

    Each feature's penalty is the one that is right most often on every tenth training image, left out for
    this; with --layers all the same images choose the best feature."""
    names = probed_features(args, encoder)
    encoder.eval()
    (train_x, train_y), (x, y) = (
        data.encode(args, lambda imgs: pooled(probed_layers(args, encoder, imgs)), source)
        for source in (train_set, val_set))
    if len(train_y) < 2:
        data.stop("--mode linear needs two training images at least: one chooses the penalty")
    kept, result, right, penalties = torch.arange(len(train_y)) % 10 > 0, {}, {}, {}
    for name, a, b in zip(names, train_x.chunk(len(names), 1), x.chunk(len(names), 1)):
        std, mean = torch.std_mean(a, 0)
        a, b = ((part - mean) / (std + 1e-6) for part in (a, b))

        def accuracy(rows, x, y, penalty):                      # % of (x, y), learned from `rows`
            layer = fit_logistic(a[rows], train_y[rows], len(train_set.classes), penalty)
            return data.percent(layer(x).argmax(1) == y)
        aside = {penalty: accuracy(kept, a[~kept], train_y[~kept], penalty) for penalty in PENALTIES}
        penalties[name] = max(aside, key=aside.get)
        right[name] = aside[penalties[name]]
        result[name] = accuracy(slice(None), b, y, penalties[name])
    if args.layers == "all":
        best = max(right, key=right.get)
        result |= {"best": result[best], "best_feature": best}
    pictures(args, encoder, val_set)
    return result | {"penalties": penalties}


# ---- knn and features ----

def encode_both(args, encoder, source):
    """Class token and mean of the patches of all images of a set -> (n, 2 D), labels (n,)"""
    encoder.eval()
    return data.encode(args, lambda imgs: pooled([encoder.forward_features(imgs)]), source)


def knn(args, train_set, val_set, encoder):
    """Weighted k-NN on class token and mean of patches, no training. -> the entries of result.json"""
    (train_x, train_y), (x, y) = (encode_both(args, encoder, source) for source in (train_set, val_set))
    result = {}
    for feature, a, b in zip(POOLS, train_x.chunk(2, 1), x.chunk(2, 1)):
        guesses = data.knn_vote(a, train_y, b, (10, 20, 100, 200), len(train_set.classes))
        result |= {f"{feature}_k{k}": data.percent(guess == y) for k, guess in guesses.items()}
    pictures(args, encoder, val_set)
    return result


def features(args, train_set, val_set, encoder):
    """features.npz, for whatever comes next: `cls` and `mean` (n, D) of all images, `labels` (n,), `classes`,
    `paths` (where the images are no files, their numbers in the set), `split`; features.png draws them."""
    parts, paths, splits = [], [], []
    for split, source in (("train", train_set), ("val", val_set)):
        parts.append(encode_both(args, encoder, source))
        names = source.imgs if source.streamed else map(str, source.numbers.tolist())
        paths += [name for name in names if name not in (source.skipped or ())]
        splits += [split] * len(parts[-1][1])
    tokens, labels = (torch.cat(part).cpu() for part in zip(*parts))
    both, path = dict(zip(POOLS, tokens.chunk(2, 1))), Path(args.output_dir) / "features.npz"
    if data.rank() == 0:
        with data.writing(path):
            np.savez(path, **both, labels=labels, classes=train_set.classes, paths=paths, split=splits)
        features_picture(both, labels, train_set.classes, path.with_suffix(".png"))
        data.say(f"see {path} and features.png")
    return {"images": len(labels)}


# ---- a classifier in use ----

def judge_head(args, train_set, val_set, model):
    """The file's own classifier. -> the entries of result.json; confusion.png"""
    names = model.classes or val_set.classes                    # official files name none: theirs are sorted
    if other := sorted(set(val_set.classes) - set(names)):
        data.stop(f"{args.init} was not trained to tell {other[0]}: give --data with its classes")
    model.eval()
    logits, labels = data.encode(args, model, val_set)
    labels = torch.tensor([names.index(name) for name in val_set.classes], device=labels.device)[labels]
    K = logits.shape[1]
    if len(names) != K:
        data.stop(f"{args.init} tells {K} classes apart, {args.data} has {len(names)}")
    counts = (labels * K + logits.argmax(1)).bincount(minlength=K * K).view(K, K).cpu()     # (true, said)
    share = counts / counts.sum(1, keepdim=True)                # nan: a class without images
    of_class = {name: right * 100 for name, right in zip(names, share.diag().tolist()) if right == right}
    hardest = sorted(of_class, key=of_class.get)[:10]
    data.say(f"hardest classes: {', '.join(f'{name} {of_class[name]:.1f}' for name in hardest)}")
    confusion_picture(share, names, Path(args.output_dir) / "pictures" / "confusion.png")
    return {"accuracy": counts.diag().sum().item() / counts.sum().item() * 100,
            "val_loss": F.cross_entropy(logits, labels).item(), "classes": of_class}


def predict(args, model, source):
    """Print the class of each picture and its probability."""
    model.eval()
    logits, _ = data.encode(args, model, source)
    for path, p in zip((path for path in source.imgs if path not in source.skipped), logits.softmax(1)):
        k = int(p.argmax())
        found = {"file": path, "class": model.classes[k] if model.classes else k,
                 "probability": round(p[k].item(), 4)}
        data.say(json.dumps(found) if args.json else "  ".join(map(str, found.values())))


# ---- pictures ----

@torch.no_grad()
def attentions(model, imgs):
    """Who attends to whom, block by block: (B, 3, H, W) -> (B, heads, 1 + N, 1 + N) each, rows sum to 1"""
    x = model.add_cls_and_pos(model.patch_embed(imgs))
    for block, x in zip(model.blocks, [x, *model.forward_blocks(x)]):
        q, k, _ = block.attn.heads(block.norm1(x))                                          # (B, H, n, d)
        logits = q.float() @ k.float().transpose(2, 3) / math.sqrt(q.shape[-1])             # (B, H, n, n)
        for table in (model.rel_pos_bias, block.rel_pos_bias):
            logits = logits if table is None else logits + table()
        yield logits.softmax(-1)


def cls_attention(model, imgs):
    """How much the class token attends to each patch, in the last block. (B, 3, H, W) -> (B, heads, g, g)"""
    *_, last = attentions(model, imgs)
    return last[:, :, 0, 1:].unflatten(2, (math.isqrt(last.shape[-1] - 1), -1))


def attention_distance(model, imgs):
    """How far patches look, in pixels: the mean distance, weighted by attention (ViT, figure 7)

    -> (depth, heads), and what it would be if they attended to all patches alike, (depth,)"""
    maps = [attention[:, :, 1:, 1:] for attention in attentions(model, imgs)]               # (B, H, N, N)
    line = torch.arange(math.isqrt(maps[0].shape[-1]), device=imgs.device)
    places = model.config["patch_size"] * torch.cartesian_prod(line, line).float()          # (N, 2)
    far = torch.cdist(places, places)
    return torch.stack([((attention * far).sum((2, 3)) / attention.sum((2, 3))).mean(0)
                        for attention in maps]), far.mean().expand(len(maps))


def attention_pictures(model, untrained, imgs, source, path):
    """Where the class token looks, head by head, and where that of an untrained network does."""
    heads = {f"{kind}head {h + 1}": row for kind, network in (("", model), ("untrained,\n", untrained))
             for h, row in enumerate(cls_attention(network, imgs).unbind(1))}
    data.save_rows(path, {"image": data.to_pixels(imgs, source)} | heads,
                   "attention of the class token to the patches, last block")


def pictures(args, model, val_set):
    """attention.png: where the class token looks, per head; distance.png: how far patches look;
    positions.png: similarity of the positions."""
    folder, imgs = Path(args.output_dir) / "pictures", data.some_images(args, val_set)
    model.eval()
    torch.manual_seed(args.seed)                                # the weights that a training starts from
    untrained = ViT(**model.config).to(args.device).eval()
    attention_pictures(model, untrained, imgs, val_set, folder / "attention.png")
    distances, alike = attention_distance(model, imgs)
    data.save_plot(folder / "distance.png", {f"head {h + 1}": head for h, head in enumerate(distances.T)}
                   | {"all patches alike": alike}, "o", xlabel="block", ylabel="attention distance in pixels")
    if model.pos_embed is not None:
        pos = torch.cat([model.pos_embed, untrained.pos_embed]).detach()[:, 1:].float()     # (2, N, D)
        pos, g = F.normalize(pos, dim=2), math.isqrt(pos.shape[1])
        maps, others = (pos @ pos.mT).view(2, g, g, g, g)[:, ::max(1, g // 7), ::max(1, g // 7)]  # <= 14^2
        rows = {f"row {i * max(1, g // 7)}": row for i, row in enumerate(maps)}
        kind = "learned" if model.pos_embed[:, 0].any() else "fixed sin-cos"    # whose class token is at 0
        data.save_rows(folder / "positions.png", rows | {"untrained,\nrow 0": others[0]},
                       f"{kind} positions: cosine similarity of each with all others", scale=(-1, 1))


def features_picture(both, labels, classes, path):
    """Features {name: (n, D)} on the plane in which they vary most, coloured by class"""
    figure = data.Figure(figsize=(12, 5), layout="constrained")
    for axes, (name, x) in zip(figure.subplots(1, 2), both.items()):
        x = x.double() - x.double().mean(0)
        energy, directions = torch.linalg.eigh(x.T @ x)         # the largest last
        x, share = x @ directions[:, -2:], (energy[-2:].sum() / energy.sum()).item()
        for k, label in enumerate(classes):
            axes.scatter(*x[labels == k].T, s=4, label=f" {label}")     # what begins with _ is left out
        axes.set(title=f"{name}: two principal components, {share:.0%} of the variance", xticks=[], yticks=[])
    if 1 < len(classes) <= 20:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right", markerscale=3)
    data.save_atomically(figure, path)


def confusion_picture(share, classes, path):
    """How often each class is taken for each other (K, K), rows: the true ones"""
    if data.rank():
        return
    figure = data.Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(share.numpy(), vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(shown, label="share of the true class")
    if len(classes) <= 40:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
    axes.set(xlabel="said", ylabel="true")
    data.save_atomically(figure, path)


@torch.no_grad()
def probe_pictures(args, encoder, probes, val_set):
    """attention.png: where the attentive probe that learned best looks, and where the class token does."""
    best = probes[int(probes.right.argmax())]
    torch.manual_seed(args.seed)
    untrained = ViT(**encoder.config).to(args.device).eval()
    imgs = data.some_images(args, val_set)
    attention = best.pool.attention(probed_layers(args, encoder, imgs)[best.layer]).mean(1)[:, 1:]   # (B, N)
    rows = {"image": data.to_pixels(imgs, val_set),
            "attentive probe": attention.reshape(-1, args.grid, args.grid),
            "class token": cls_attention(encoder, imgs).mean(1),
            "class token,\nuntrained": cls_attention(untrained, imgs).mean(1)}
    data.save_rows(Path(args.output_dir) / "pictures" / "attention.png", rows,
                   "attention of the attentive probe and of the last block's class token, mean over heads")


# ---- the script ----

def build(args, num_classes, pool, classes=(), content=None):
    """The ViT to train or judge: from --init FILE, or new. -> model, (mean, std) of its pixels or None

    classes: names of the data set's. A file's head is taken by eval and predict, and by finetune if it is for
    these classes. `model.classes` are the names in the file, if it has some. content: of the file, where it
    is read already."""
    if args.model == "cnn":
        for name in sorted(args.typed & {"pool", "pos", "rel_pos", "layer_scale", "stem", "drop_path"}):
            data.say(f"--{name} is not used: --model cnn")
        return CNN(num_classes), None
    options = dict(num_classes=num_classes, pool=pool, img_size=args.img_size)
    if not args.init:
        options |= SIZES[args.model] | dict(pos=args.pos, rel_pos=args.rel_pos,
                                            layer_scale=args.layer_scale, stem=args.stem)
        return ViT(**options, patch_size=args.patch_size, drop_path=getattr(args, "drop_path", 0.0)), None
    content, ready = content or data.load_file(args.init), args.mode in ("eval", "predict")
    state, config, mean, std = read_encoder(args.init, args.num_heads, content, args.mode == "finetune")
    head, names = state.get("head.weight"), content.get("classes", [])
    if ready and head is None:
        data.stop(f"{args.init} has no classifier to {args.mode}: --mode finetune gives it one")
    if head is not None and names:
        data.expect(args.init, {"classes": names}, {"classes": [""] * len(head)})
    options["num_classes"] = len(head) if ready else num_classes
    if args.half_stats:
        mean, std = (0.5,) * 3, (0.5,) * 3
    size = next((name for name, size in SIZES.items() if size.items() <= config.items()), "file")
    told = {"pos": "learned", "rel_pos": "none", "stem": "patch"} | config | {"model": size}
    for name in ("model", "patch_size", "num_heads", "pos", "rel_pos", "layer_scale", "stem"):
        if name in getattr(args, "typed", ()) and (typed := getattr(args, name)) != told.get(name):
            data.say(f"--{name} {typed} is not used: {args.init} has {told.get(name)}")
    args.patch_size, args.model = config["patch_size"], size
    data.check_together(args)
    if args.mode == "finetune" and config.get("rel_pos") == "shared":  # every block gets its own copy
        config["rel_pos"], table = "block", state.pop("rel_pos_bias.relative_position_bias_table")
        state |= {f"blocks.{i}.rel_pos_bias.relative_position_bias_table": table
                  for i in range(config["depth"])}
    same = args.mode == "finetune" and head is not None and names == classes
    if args.mode != "finetune" or same and "pool" not in getattr(args, "typed", ()):
        options["pool"] = config.get("pool", "cls")             # what the file's own final norm and head read
    model = ViT(**config | options | dict(drop_path=getattr(args, "drop_path", 0.0)))
    load_weights(model, state, args.init)
    model.classes = names if head is not None else []
    if same and options["pool"] == config.get("pool", "cls"):
        data.say(f"going on with the classifier of {args.init}: it is for the same classes")
    elif args.mode == "finetune":
        nn.init.trunc_normal_(model.head.weight, std=2e-5)
        nn.init.zeros_(model.head.bias)
    return model, (mean, std)


def of_file(path, content, num_heads=0):
    """What the encoder at `path`, of this content, decides where it is not typed -> {flag: value}"""
    _, config, _, _ = read_encoder(path, num_heads, content)
    told = {name: config[name] for name in ("img_size", "patch_size")}
    told |= {"model": name for name, size in SIZES.items() if size.items() <= config.items()}
    return told | ({"data": content["data"]} if isinstance(content.get("data"), str) else {})


def label_subset(source, fraction):
    """The same share of every class, at least one image of each; the same images for every seed."""
    order = data.chosen(source, len(source))
    labels = source.labels.cpu()[order]
    chosen = [order[labels == k][:max(1, round(fraction * int((labels == k).sum())))]
              for k in labels.unique()]
    return source.subset(torch.cat(chosen))


def main():
    words = sys.argv[1:]
    early = data.early_flags(words, mode=RECIPES)
    kept = data.resumed_flags(early, early.output_dir)
    mode, init = early.mode or kept.get("mode", "train"), early.init or kept.get("init", "")
    folder = f"{Path(init).parent / Path(init).stem}-{mode}" if init else f"out/vit-{mode}"
    there = init and Path(init).exists()                        # if not, `build` says so
    content = unwrapped(data.load_file(init)) if there else None
    told = of_file(init, content, early.num_heads or kept.get("num_heads", 0)) if content else {}
    args = data.parse_args(__doc__, *RECIPES[mode], words=words, folder=folder, told=told)
    if (args.export or mode == "predict") and data.world_size() > 1:
        data.stop("--export and --mode predict are for one process: start them without torchrun")
    if args.export:
        export(init or data.stop("--export needs the encoder to write: give --init FILE"), args.export,
               args.num_heads)
        return
    if mode == "finetune" and not init:
        data.stop("--mode finetune needs --init FILE; from scratch is --mode train")
    if mode == "train" and init:
        data.stop("--mode train starts from scratch: use --mode finetune with --init FILE")
    if getattr(args, "optimizer", "") == "lbfgs":
        for flag in (word.split("=")[0] for word in words if word.startswith("--")):
            if flag[2:] in {*LINEAR, "lr", "min_lr"} - {"optimizer", "layers"}:
                data.stop(f"{flag} is for probes that are trained step by step: add --optimizer sgd")
    if mode == "predict" and args.images == [""]:
        data.stop("--mode predict needs pictures: add --images with files, or folders of them")
    if mode in ("eval", "predict") and not init:
        data.stop(f"--mode {mode} needs a classifier: give --init FILE, of --mode train or finetune")
    if mode == "predict":
        data.choose_device(args)
        source = data.pictures_at(args.images)
        model, (source.mean, source.std) = build(args, 0, "cls", content=content)
        predict(args, model.to(args.device), source)
        return
    data.setup(args)
    train_set, val_set = data.load_sets(args, judged=mode == "eval")
    if mode != "features" and len(train_set.classes) < 2 and (mode != "eval" or train_set.classes == [""]):
        data.stop(f"--mode {mode} needs labels: sort the images of {args.data} into two or more folders")
    if args.label_fraction < 1:
        train_set = label_subset(train_set, args.label_fraction)
    model, stats = build(args, len(train_set.classes) if mode in ("train", "finetune") else 0,
                         args.pool if mode in ("train", "finetune") else "cls", train_set.classes, content)
    if stats:                                                   # the pixels as the encoder knows them
        for source in (train_set, val_set):
            source.mean, source.std = stats
    model.to(args.device)
    kinds = {"train": supervised, "finetune": supervised, "linear": probe, "attentive": probe, "knn": knn,
             "eval": judge_head, "features": features}
    judge = logistic if getattr(args, "optimizer", "") == "lbfgs" else kinds[mode]
    result = {"mode": mode, "data": args.data, "init": init or "random", "seed": args.seed,
              "label_fraction": args.label_fraction} | judge(args, train_set, val_set, model)
    if getattr(args, "layers", "") == "all":
        names = probed_features(args, model)
        lines = {kind: torch.tensor([result[name] for name in names if name.startswith(kind)])
                 for kind in [*POOLS, "attentive"] if kind in names}
        data.save_plot(Path(args.output_dir) / "pictures" / "layers.png", lines, ylabel="accuracy in %",
                       xlabel=f"probed block; {model.config['depth'] + 1}: the output, after the last norm")
    if data.rank() == 0:
        data.save_atomically(json.dumps(result, indent=1), Path(args.output_dir) / "result.json")
        numbers = ", ".join(f"{k} {v:.2f}" for k, v in result.items()
                            if isinstance(v, float) and k != "label_fraction")
        start = init or ("from scratch" if mode == "train" else "random encoder")
        data.say(f"result ({mode}, {args.data}, {start}): {numbers or 'none'}")


# ============================================================================================================
#  OTHER PEOPLE'S FILES: may be skipped
# ============================================================================================================

LAYOUTS = {  # official files: a tensor that tells which, the encoder's prefix, what else such a file holds
    "VQ-KD": ("quantize.embedding.weight", "encoder.",
              r"(decoder|encode_task_layer|decode_task_layer|quantize|teacher|scaling|loss)"),
    "CAE": ("encoder.patch_embed.proj.weight", "encoder.",
            r"(mask_token|rd_pos_embed|pretext_neck|regresser|decoder|encoder_to_|teacher|alignment_enc)"),
    "DINO": ("backbone.patch_embed.proj.weight", "backbone.", r"head\.(mlp|last_layer)"),  # and iBOT
    "BEiT": ("lm_head.weight", "", r"(mask_token|lm_head|cls_pt_)"),                        # and BEiT v2
    "MAE": ("mask_token", "", r"(mask_token|decoder_)"),
    "ViT": ("patch_embed.proj.weight", "", r"(pre_logits|masked_embed)"),
}


def renamed(state, rules):
    """A state dict under other names: {pattern: replacement}, in turn; None drops what the pattern finds."""
    for pattern, new in rules.items():
        state = {re.sub(pattern, new or "", name): value for name, value in state.items()
                 if new is not None or not re.search(pattern, name)}
    return state


def official_state(content):
    """The state dict in the content of an official file, in float32 and under plain names.

    Wrappers and DDP's prefix go (of student and teacher the teacher stays), and so do index buffers. q_bias
    and v_bias become one bias with zeros for the keys; bias tables and layer scales get our names."""
    for key in ("teacher", "model", "module", "state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    state = renamed({name: value.float() if value.is_floating_point() else value
                     for name, value in content.items() if torch.is_tensor(value)},
                    {r"relative_position_index$": None, r"^module\.": "",
                     r"attn\.(relative_position_bias_table)$": r"rel_pos_bias.\1",
                     r"\bls([12])\.gamma$": r"gamma_\1"})                                  # timm's
    for name in [name for name in state if re.search(r"\battn\.q_bias$", name)]:
        if name.replace("q_bias", "v_bias") in state:
            q, v = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
            state[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    return state


def unwrapped(content):
    """The content of a file of --export as that of an encoder.pt; that of any other file as it is"""
    about = getattr(content, "_metadata", {}).get("vit.py")
    return {"model": content} | about if about else content


def read_encoder(path, num_heads=0, content=None, finetune=False):
    """Read an encoder: our encoder.pt, or a file of MAE, DINO, iBOT, BEiT (v2), VQ-KD, CAE, DeiT or timm.

    -> state dict under our names, ViT arguments, mean and std of its pixels (ImageNet's in official files)
    num_heads: no tensor tells it; it need be given for a width and depth that are not in SIZES. content: of
    the file, where it is read already. finetune: CAE's `norm` is the start of `fc_norm`.

    Raises: exits with one sentence if the file is damaged, of no known layout, or holds tensors that files of
    its layout do not have; `load_weights` looks at the encoder's own."""
    content = unwrapped(data.load_file(path) if content is None else content)
    with data.reading(path, "a Vision Transformer that is known here"):
        mean, std = data.STATS["imagenet"]
        about = {"config": {}} | content
        data.expect(path, about, {"config": {}})
        if "embed_dim" in about["config"]:
            data.expect(path, about, {"model": {}, "mean": mean, "std": std})
            state, config, mean, std = (about[name] for name in ("model", "config", "mean", "std"))
            state, is_cae = official_state(state), about.get("method") == "cae"
        elif about["config"].get("pool") == "cnn":
            data.stop(f"{path} is a CNN, which is trained with labels alone: give a Vision Transformer's")
        elif content.keys() & {"step", "method"}:               # ours, too, but with more than an encoder
            data.stop(f"{path} is no encoder: give an encoder.pt")
        else:
            everything = official_state(content)
            layout = next((name for name, (tell, _, _) in LAYOUTS.items() if tell in everything), "ViT")
            _, prefix, rest = LAYOUTS[layout]
            state = renamed(everything, {f"^{rest}": None})
            if strange := [name for name in state if not name.startswith(prefix)]:
                data.stop(f"{path} looks like a file of {layout}, but such files have no {strange[0]}")
            state = renamed(state, {f"^{prefix}": ""})
            if layout == "VQ-KD":                               # applied to the tokens, not to their mean
                state = renamed(state, {r"fc_norm\.": "norm."})
            is_cae = layout == "CAE"                            # others of width 384 have six heads
            config = infer_config(state, num_heads or 12 * (is_cae and state["cls_token"].shape[-1] == 384))
            if layout == "DINO" or "masked_embed" in everything:        # no other file proves it is DINO's
                config["pos_offset"] = 0.1
        with torch.device("meta"):
            data.build(path, ViT, config)
        if config["embed_dim"] % config["num_heads"] or not all(std) or config["pool"] not in POOLS:
            raise ValueError(f"width {config['embed_dim']}, {config['num_heads']} heads, std {std}, pool "
                             f"{config['pool']}")
        if finetune and is_cae:
            state |= {f"fc_{name}": state[name] for name in ("norm.weight", "norm.bias") if name in state}
    return state, config, mean, std


def infer_config(state, num_heads=0):
    """The arguments of the ViT to which a state dict of official origin belongs"""
    embed_dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = [num_heads] if num_heads else [size["num_heads"] for size in SIZES.values()
                                           if (size["embed_dim"], size["depth"]) == (embed_dim, depth)]
    tables = {name: table for name, table in state.items() if name.endswith("relative_position_bias_table")}
    for table in tables.values():
        heads, grid = [table.shape[1]], (math.isqrt(len(table) - 3) + 1) // 2
    if "pos_embed" in state:
        grid = math.isqrt(state["pos_embed"].shape[1] - 1)
        if grid ** 2 + 1 != state["pos_embed"].shape[1]:
            raise ValueError("pos_embed is no class token and square grid: distilled DeiT has a token more")
    elif not tables:
        raise ValueError("it has neither pos_embed nor a relative_position_bias_table")
    if not heads:
        raise ValueError(f"{embed_dim} wide and {depth} deep is no size of --model: give vit.py --num_heads")
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": heads[0], "patch_size": patch_size,
            "img_size": grid * patch_size, "qkv_bias": "blocks.0.attn.qkv.bias" in state,
            "mlp_ratio": len(state["blocks.0.mlp.fc1.bias"]) / embed_dim,
            "stem": "patch", "pos": "learned" if "pos_embed" in state else "none",
            "rel_pos": ("none" if not tables else
                        "shared" if "rel_pos_bias.relative_position_bias_table" in tables else "block"),
            "layer_scale": float("blocks.0.gamma_1" in state),
            "pool": "mean" if "fc_norm.weight" in state else "cls"}


def fit(state, wanted, pos_offset=0.0):
    """Interpolate the positions and bias tables of a state dict to the sizes that a model wants."""
    for name in state.keys() & wanted.keys():
        if name.endswith("pos_embed"):
            grid = math.isqrt(wanted[name].shape[1] - 1)
            state[name] = interpolate_pos_embed(state[name], grid, pos_offset)
        elif name.endswith("relative_position_bias_table"):
            state[name] = interpolate_rel_pos(state[name], (math.isqrt(len(wanted[name]) - 3) + 1) // 2)
    return state


def load_weights(model, state, path):
    """Load an encoder's weights: positions are interpolated, and what is missing or left over must be what
    changes between pre-training and judging (head, final norms); anything else ends with a sentence that
    names it."""
    wanted = model.state_dict()
    state = fit(dict(state), wanted, model.config["pos_offset"])
    has_norm = {"norm.weight", "fc_norm.weight"} & set(state)
    may_differ = ("head.", "norm.", "fc_norm.") if has_norm else ("head.",)
    own = {name: value for name, value in wanted.items() if name.startswith(may_differ)}
    theirs = {name: value for name, value in state.items() if not name.startswith(may_differ)
              or name in own and value.shape == own[name].shape}
    data.load_state(model, own | theirs, path)


def load_init(model, args, names=None, fixed=(), pos_offset=0.0):
    """--init of the pre-training scripts: all of a method's model, from an official file or from a last.pt.

    names: turns the content of an official file into a state dict under our names; if not given, a name that
    the model has stays, and every other is one of its encoder. Learned positions and bias tables are
    interpolated; those in `fixed` are no weights: the model keeps its own. Raises: exits with one sentence
    that names the first tensor, or the flag of a last.pt that no tensor shows, that differs."""
    content, wanted, path = data.load_file(args.init), model.state_dict(), args.init
    flags = content.get("flags", {})
    with data.reading(path, "all parts of this method"):
        if "step" in content:
            data.same_method(args, content, path)
            state = dict(content["model"])
            if told := data.differences(args, flags, data.INVISIBLE):
                data.stop(f"{path} is of another model: {told}; give the same")
        elif "config" in content:
            data.stop(f"{path} is no whole model of {args.method}: give the last.pt of that run")
        elif names:
            state = names(content)
        else:
            state = {name if name in wanted else f"encoder.{name}": value
                     for name, value in official_state(content).items()}
        for name in fixed:
            same = name in state and state[name].shape == wanted[name].shape
            if same and not torch.allclose(state[name].to(wanted[name].device), wanted[name], atol=1e-4):
                data.stop(f"{path} has other positions {name} than the fixed ones of this method")
            state[name] = wanted[name]
        state = fit(state, wanted, pos_offset)
    data.load_state(model, state, path, data.differences(args, flags))
    data.say(f"starting from {path}")


def interpolate_pos_embed(pos_embed, grid, offset=0.0):
    """Bicubic interpolation of (1, 1 + s*s, D) positions to (1, 1 + grid*grid, D); the class token stays.

    offset 0.1 is what DINO and iBOT add to the new grid before they divide by the old one."""
    old = math.isqrt(pos_embed.shape[1] - 1)
    if old == grid:
        return pos_embed
    cls_pos, pos = pos_embed[:, :1], pos_embed[:, 1:]
    pos = pos.reshape(1, old, old, -1).permute(0, 3, 1, 2)                                  # (1, D, s, s)
    target = {"scale_factor": (grid + offset) / old} if offset else {"size": (grid, grid)}
    pos = F.interpolate(pos.float(), mode="bicubic", align_corners=False, **target)
    return torch.cat([cls_pos, pos.flatten(2).transpose(1, 2).to(cls_pos.dtype)], 1)


def interpolate_rel_pos(table, grid):
    """A relative position bias table ((2s-1)^2 + 3, H) for another grid, ((2*grid-1)^2 + 3, H), as in BEiT.

    The old distances are spread geometrically, dense in the middle, so that they cover the new range; a
    not-a-knot cubic spline through them is read off at the new distances, in both directions. The last
    three rows stay."""
    old, new = math.isqrt(len(table) - 3), 2 * grid - 1
    if old == new:
        return table
    low, high = 1.01, 1.5  # bisect for the ratio q of the geometric series
    while high - low > 1e-6:
        q = (low + high) / 2
        too_far = sum(q ** i for i in range(old // 2)) > new // 2
        low, high = (low, q) if too_far else (q, high)
    reach = np.cumsum(q ** np.arange(old // 2))
    knots = np.concatenate([-reach[::-1], [0], reach])
    distances = np.clip(np.arange(new) - new // 2, knots[0], knots[-1])
    spread = torch.from_numpy(spline_matrix(knots, distances))                                 # (new, old)
    grid_part = torch.einsum("ai,bj,ijh->abh", spread, spread, table[:-3].double().view(old, old, -1))
    return torch.cat([grid_part.flatten(0, 1).to(table.dtype), table[-3:]])


def spline_matrix(knots, places):
    """The matrix (len(places), len(knots)) that reads a not-a-knot cubic spline over `knots` at `places`."""
    def basis(x):  # 1, x, x^2, x^3, and a cubic that starts at each knot but the first and last two
        x, inner = x[:, None] / knots[-1], knots[2:-2] / knots[-1]
        return np.concatenate([x ** np.arange(min(4, len(knots))), np.maximum(0, x - inner) ** 3], 1)
    return np.linalg.solve(basis(knots).T, basis(places).T).T


def export(path, name, num_heads=0):
    """Write the encoder of a file as a plain state dict under timm's names, and print what loads it.

    With relative positions they are those of timm.models.Beit, else of timm.models.VisionTransformer. Raises:
    exits with one sentence if timm has no such model (--stem conv)."""
    if Path(name).exists():
        data.stop(f"{name} is there already: --export makes a new file, name another")
    name = str(Path(name))
    content = unwrapped(data.load_file(path))
    state, config, mean, std = read_encoder(path, num_heads, content)
    if config.get("stem", "patch") != "patch":
        data.stop(f"{path} has a convolutional stem: timm's Vision Transformer has none")
    rel_pos = config.get("rel_pos", "none")
    result = OrderedDict(renamed(state, {r"gamma_([12])$": r"ls\1.gamma"} if rel_pos == "none" else
                                 {r"(blocks\.\d+)\.rel_pos_bias": r"\1.attn"}))
    for key in [key for key in result if rel_pos != "none" and key.endswith("attn.qkv.bias")]:
        q, _, v = result.pop(key).chunk(3)                      # the keys' part does not change the softmax
        result[key.replace("qkv.bias", "q_bias")] = q.clone()
        result[key.replace("qkv.bias", "v_bias")] = v.clone()
    result._metadata = {"vit.py": {"config": config, "mean": mean, "std": std} | {          # for `unwrapped`
        name: content[name] for name in ("method", "data", "classes") if name in content}}
    data.save_atomically(result, Path(name))
    options = {key: config[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads",
                                            "mlp_ratio", "qkv_bias")}
    options |= {"num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
                "global_pool": "avg" if config["pool"] == "mean" else "token"}
    if config.get("layer_scale"):
        options["init_values"] = config["layer_scale"]
    if rel_pos != "none":
        options |= {"use_abs_pos_emb": "pos_embed" in state,
                    "use_rel_pos_bias" if rel_pos == "block" else "use_shared_rel_pos_bias": True}
    kind = "VisionTransformer" if rel_pos == "none" else "Beit"
    mean, std = (tuple(round(float(value), 4) for value in values) for values in (mean, std))
    print(f"{name} holds {len(result)} tensors, for pixels of mean {mean} and std {std}; in timm:\n"
          f"    model = timm.models.{kind}({', '.join(f'{k}={v!r}' for k, v in options.items())})\n"
          f"    model.load_state_dict(torch.load({str(name)!r}))", flush=True)


if __name__ == "__main__":
    data.run(main)
