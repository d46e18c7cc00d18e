"""The discrete VAE of DALL-E (Ramesh et al., 2021), arXiv:2102.12092: images as a grid of words.

An encoder gives every place of a coarse grid a distribution over K codes; a decoder paints the image from one
code a place. A sample of a code has no gradient, so training relaxes it: logits with Gumbel noise go through
a softmax whose temperature tau falls, until the mixture is nearly one code. BEiT and CAE predict the codes.

    L = ( -sum_pixels log p(x | y) + beta sum_i KL(q_i || uniform) ) / (3 H W)       mean over the images
    y_i = softmax((logits_i + g) / tau)      g ~ Gumbel(0, 1)       q_i = softmax(logits_i)
    log p: a Laplace density of logit(t), t = 0.8 x + 0.1;  with --recon mse: a Gaussian of sigma 0.1
    token_i = argmax_k logits_ik             without noise: what `tokens` gives

Shapes: B images, s = stride, h x w = (H / s) x (W / s) = N places (tokens), K codes (--vocab), n = --n_hid.

The grid is that of the ViT that will read the tokens: the dVAE sees img_size / patch_size * stride pixels
(112 px for ViT-B/16 at 224).

Deviations: one run of DALL-E's network over 32 px images is short, so beta and tau are ramped over shares of
the training; on ImageNet these shares are DALL-E's numbers of updates, but learning ends after 250,000
updates, not 3 million. Crops are those that BEiT will show. All tensors of rank 2 or more are decayed.

    python dvae.py --data shapes                            # CPU, offline, 2 minutes: 62% of 512 codes in use
    python dvae.py --model micro                            # CIFAR-10, CPU: 99.8% of 512 codes, see README
    python dvae.py                                          # CIFAR-10, one GPU: not run yet
    torchrun --nproc_per_node=8 dvae.py --data imagenet     # 112 px, 8192 codes: not run yet
"""
import copy
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import data
from vit import cosine_lr, param_groups, set_lr, update_ema

# columns:           shapes, cifar10, cifar100, tiny-imagenet, imagenet (DALL-E's network and table);
# {"tiny": a, "micro": b} is b for --model micro, the laptop's, and a for every other model
RECIPES = {
    "model":         ("micro", "tiny", "tiny", "tiny", "base"),
    "img_size":      (32, 32, 32, 64, 224),
    "patch_size":    (4, 4, 4, 8, 16),
    "stride":        (4, 4, 4, 4, 8),
    "n_hid":         {"tiny": 64, "micro": 32, "base": 256},
    "blocks":        2,
    "vocab":         {"tiny": 1024, "micro": 512, "base": 8192},
    "epochs":        (12, {"tiny": 100, "micro": 5}, 100, 50, 100),
    "batch_size":    (64, {"tiny": 256, "micro": 64}, 256, 256, 512),
    "lr":            (1e-3, 1e-3, 1e-3, 1e-3, 1e-4),
    "min_lr":        (1e-5, 1e-5, 1e-5, 1e-5, 1.25e-6),
    "warmup_epochs": (0.1, {"tiny": 1.0, "micro": 0.1}, 1.0, 1.0, 0.0),
    "weight_decay":  1e-4,
    "eval_every":    (6, {"tiny": 20, "micro": 5}, 20, 10, 10),
    "init":          "",
    "beta":          6.6,
    "beta_warmup":   (0.05, 0.05, 0.05, 0.05, 0.02),
    "tau":           1 / 16,
    "tau_anneal":    (0.5, 0.5, 0.5, 0.5, 0.6),
    "recon":         "laplace",
    "straight_through": False,
    "ema":           0.999,
    "crop_scale":    0.4,
}
FLAGS = {
    "model": ("size of the dVAE: sets --n_hid and --vocab", ("micro", "tiny", "base")),
    "stride": "pixels a token, in each direction: a power of two",
    "n_hid": "width of the first group of blocks; each group below doubles it",
    "blocks": "residual blocks a group",
    "vocab": "codes in the vocabulary",
    "init": "start from the weights of this tokenizer.pt, or of DALL-E's encoder.pkl",
    "beta": "weight of the KL divergence to the uniform distribution, at its end",
    "beta_warmup": "share of the training in which beta rises from 0",
    "tau": "temperature of the Gumbel-softmax at its end; it starts at 1",
    "tau_anneal": "share of the training in which tau falls",
    "recon": ("likelihood of the pixels: logit-Laplace, or a Gaussian of sigma 0.1", ("laplace", "mse")),
    "straight_through": "decode hard one-hot samples; the gradient is that of the relaxed ones",
    "ema": "momentum of the running average of the weights, which is evaluated and exported",
    "crop_scale": "smallest area of the random crop, as a share of the image",
}

# ---- the pieces of the objective ----


def map_pixels(imgs, eps=0.1):
    """[0, 1] -> [0.1, 0.9], where the logit is tame"""
    return (1 - 2 * eps) * imgs + eps


def unmap_pixels(imgs, eps=0.1):
    """The inverse of map_pixels, clamped to [0, 1]"""
    return ((imgs - eps) / (1 - 2 * eps)).clamp(0, 1)


def gumbel_softmax(logits, tau, hard=False, noise=None):
    """A relaxed sample over dimension 1: softmax((logits + noise) / tau). hard: one-hot, with its gradient.

    logits, noise (B, K, h, w) float32 -> (B, K, h, w). noise: Gumbel(0, 1), drawn if not given.
    """
    if noise is None:
        noise = -torch.empty_like(logits).exponential_().log()
    y = ((logits + noise) / tau).softmax(1)
    if hard:
        y = torch.zeros_like(y).scatter_(1, y.argmax(1, keepdim=True), 1.0) + y - y.detach()
    return y


def kl_to_uniform(logits):
    """KL(softmax(logits) || uniform) at every place, in nats: (B, K, h, w) -> (B, h, w), 0 to ln K"""
    log_q = logits.log_softmax(1)
    return (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum(1)


def log_laplace(imgs, out):
    """Log-density of pixels (B, 3, H, W) in [0, 1]; out (B, 6, H, W): mu and ln b of the logit (A.3)."""
    t, (mu, ln_b) = map_pixels(imgs), out.chunk(2, 1)
    return -math.log(2) - ln_b - (t * (1 - t)).log() - (t.logit() - mu).abs() * (-ln_b).exp()


def log_gauss(imgs, out, sigma=0.1):
    """The same for a Gaussian of fixed sigma around out (B, 3, H, W), without its constants."""
    return -(imgs - out).square() / (2 * sigma ** 2)


def cosine_ramp(done, start, end):
    """From start to end by half a cosine while `done` goes from 0 to 1, then end (DALL-E, A.2)."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


# ---- the network, under DALL-E's names ----


def conv(n_in, n_out, kernel):
    """A convolution that keeps the size; weights N(0, 1 / fan-in), biases 0."""
    layer = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=(n_in * kernel ** 2) ** -0.5)
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """id(x) + gain * res(x): four convolutions with a quarter of the width inside, a ReLU before each."""

    def __init__(self, n_in, n_out, kernels, gain):
        super().__init__()
        widths = [n_in] + 3 * [n_out // 4] + [n_out]
        self.gain = gain
        self.id_path = nn.Identity() if n_in == n_out else conv(n_in, n_out, 1)
        self.res_path = nn.Sequential(OrderedDict(
            layer for i, (a, b, kernel) in enumerate(zip(widths, widths[1:], kernels), start=1)
            for layer in ((f"relu_{i}", nn.ReLU()), (f"conv_{i}", conv(a, b, kernel)))))

    def forward(self, x):
        return self.id_path(x) + self.gain * self.res_path(x)


def groups(widths, blocks, kernels, between):
    """Groups of `blocks` residual blocks, `between` after each but the last. -> (name, module) pairs"""
    gain = 1 / ((len(widths) - 1) * blocks) ** 2
    for g, (n_in, n_out) in enumerate(zip(widths, widths[1:]), start=1):
        layers = [(f"block_{b + 1}", ResBlock(n_in if b == 0 else n_out, n_out, kernels, gain))
                  for b in range(blocks)]
        if g < len(widths) - 1:
            layers.append(between)
        yield f"group_{g}", nn.Sequential(OrderedDict(layers))


class Encoder(nn.Module):
    """Mapped pixels (B, 3, H, W) -> logits (B, K, h, w), float32 under any autocast."""

    def __init__(self, n_groups, n_hid, blocks, vocab):
        super().__init__()
        widths = [n_hid] + [n_hid * 2 ** g for g in range(n_groups)]
        self.blocks = nn.Sequential(OrderedDict([
            ("input", conv(3, n_hid, 7)),
            *groups(widths, blocks, (3, 3, 3, 1), ("pool", nn.MaxPool2d(2))),
            ("output", nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv(widths[-1], vocab, 1))))]))

    def forward(self, x):
        *body, output = self.blocks
        for layer in body:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):
            return output(x.float())


class Decoder(nn.Module):
    """One-hot or relaxed codes (B, K, h, w) -> parameters of the pixels (B, channels, H, W), float32.

    The first layer is 1 x 1, so its weight is the codebook, a vector for each code.
    """

    def __init__(self, n_groups, n_hid, blocks, vocab, channels):
        super().__init__()
        widths = [max(32, n_hid // 2)] + [n_hid * 2 ** g for g in reversed(range(n_groups))]
        self.blocks = nn.Sequential(OrderedDict([
            ("input", conv(vocab, widths[0], 1)),
            *groups(widths, blocks, (1, 3, 3, 3), ("upsample", nn.Upsample(scale_factor=2))),
            ("output", nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv(n_hid, channels, 1))))]))

    def look_up(self, ids):
        """Codes (B, h, w) -> what the first layer makes of their one-hot vectors, (B, n, h, w)"""
        layer = self.blocks.input
        return (F.embedding(ids, layer.weight[:, :, 0, 0].T) + layer.bias).permute(0, 3, 1, 2)

    def forward(self, y):
        with torch.autocast(y.device.type, enabled=False):
            x = self.blocks.input(y)
        return self.paint(x)

    def paint(self, x):
        for layer in self.blocks[1:]:
            x = layer(x)
        return x.float()


class DVAE(nn.Module):
    """Encoder, decoder and loss; `tokens` and `paint` are what other methods use."""

    def __init__(self, grid=8, stride=4, n_hid=64, blocks=2, vocab=1024, recon="laplace",
                 straight_through=False):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.grid, self.img_size, self.vocab = grid, grid * stride, vocab
        self.recon, self.straight_through = recon, straight_through
        n_groups = stride.bit_length()                          # stride = 2^(groups - 1)
        self.encoder = Encoder(n_groups, n_hid, blocks, vocab)
        self.decoder = Decoder(n_groups, n_hid, blocks, vocab, 6 if recon == "laplace" else 3)

    def logits(self, imgs):
        """Pixels (B, 3, s, s) in [0, 1], s = img_size -> (B, K, h, w) float32"""
        assert imgs.shape[1:] == (3, self.img_size, self.img_size), (
            f"{tuple(imgs.shape)}, but this dVAE reads (B, 3, {self.img_size}, {self.img_size})")
        return self.encoder(map_pixels(imgs))

    def pixels(self, out):
        """What the decoder's output (B, channels, H, W) looks like: (B, 3, H, W) in [0, 1]"""
        return unmap_pixels(out[:, :3].sigmoid()) if self.recon == "laplace" else out.clamp(0, 1)

    def tokens(self, imgs):
        """Pixels (B, 3, s, s) in [0, 1], not normalised -> codes (B, N) long, in raster order"""
        return self.logits(imgs).argmax(1).flatten(1)

    def paint(self, ids):
        """Codes (B, N) -> pixels (B, 3, s, s) in [0, 1]"""
        x = self.decoder.look_up(ids.view(len(ids), self.grid, self.grid))
        return self.pixels(self.decoder.paint(x))

    def forward(self, imgs, tau, beta):
        """(B, 3, s, s) in [0, 1] -> loss, -log p a pixel and channel, KL a place; all means over the batch"""
        logits = self.logits(imgs)
        out = self.decoder(gumbel_softmax(logits, tau, self.straight_through))
        nll = -(log_laplace if self.recon == "laplace" else log_gauss)(imgs, out).mean()
        kl = kl_to_uniform(logits).mean()
        return nll + beta * kl * self.grid ** 2 / imgs[0].numel(), nll, kl


def save_tokenizer(args, model):
    """tokenizer.pt: weights and the arguments that rebuild the dVAE"""
    data.check_weights(args, model.state_dict())
    if data.rank() == 0:
        content = {"model": model.state_dict(), "config": model.config, "method": args.method,
                   "data": args.data}
        data.save_atomically(content, Path(args.output_dir) / "tokenizer.pt")


class Shell:
    """Stands for a class of a pickle: takes its attributes, and runs nothing."""

    def __init__(self, *args, **options):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state if isinstance(state, dict) else {})


class TensorUnpickler(pickle.Unpickler):
    """Builds tensors and empty shells, and nothing else. torch.load knows the tensors' storages itself."""

    def find_class(self, module, name):
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
                              ("collections", "OrderedDict")):
            return super().find_class(module, name)
        return type(name, (Shell,), {})


def read_dalle(path):
    """The state dict of a pickled module, OpenAI's encoder.pkl or decoder.pkl, under our names.

    Raises: exits with one sentence if the file is missing, damaged, or no such module.
    """
    tools = SimpleNamespace(Unpickler=TensorUnpickler, load=lambda file, **options: TensorUnpickler(
        file, **options).load(), __name__="tensors")

    def tensors(shell, prefix=""):
        for name, value in getattr(shell, "_parameters", {}).items():
            yield prefix + {"w": "weight", "b": "bias"}.get(name, name), value.data.float()
        for name, child in getattr(shell, "_modules", {}).items():
            yield from tensors(child, f"{prefix}{name}.")

    try:
        state = dict(tensors(torch.load(path, map_location="cpu", pickle_module=tools, weights_only=False)))
    except FileNotFoundError:
        data.stop(f"there is no file {path}: DALL-E's dVAE is encoder.pkl and decoder.pkl in one folder, "
                  f"from https://cdn.openai.com/dall-e/")
    except Exception as error:                                  # whatever a damaged pickle may raise
        data.stop(f"{path} cannot be read as a pickled module ({type(error).__name__}): fetch it again")
    if "blocks.input.weight" not in state:
        data.stop(f"{path} is no encoder.pkl or decoder.pkl of DALL-E: it has no blocks.input.w")
    return state


def load_dalle(path, grid):
    """DALL-E's dVAE, the decoder from the same folder as the encoder; sizes are read off the shapes."""
    encoder = read_dalle(path)
    decoder = read_dalle(Path(path).with_name(Path(path).name.replace("encoder", "decoder")))
    n_hid, vocab = len(encoder["blocks.input.bias"]), len(encoder["blocks.output.conv.bias"])
    n_groups = len({name.split(".")[1] for name in encoder if "group_" in name})
    blocks = len({name.split(".")[2] for name in encoder if "group_1." in name})
    model = DVAE(grid, 2 ** (n_groups - 1), n_hid, blocks, vocab)
    state = {f"encoder.{name}": value for name, value in encoder.items()}
    state |= {f"decoder.{name}": value for name, value in decoder.items()}
    data.compare_tensors(path, state, model.state_dict())
    model.load_state_dict(state)
    return model


def load_tokenizer(path, grid=14):
    """The frozen dVAE of a tokenizer.pt: `tokens` reads pixels in [0, 1], `paint` gives them back.

    path may be DALL-E's encoder.pkl, too, beside its decoder.pkl: a network for any grid, it gets `grid`.
    Raises: exits with one sentence if the file is missing, damaged, or no tokenizer of dvae.py.
    """
    if Path(path).suffix == ".pkl":
        return load_dalle(path, grid).requires_grad_(False).eval()
    content = data.load_file(path)
    if content.get("method") != "dvae":
        data.stop(f"{path} is no tokenizer of dvae.py: train one with python dvae.py, "
                  f"and give its tokenizer.pt")
    model = DVAE(**content["config"])
    data.compare_tensors(path, content["model"], model.state_dict())
    model.load_state_dict(content["model"])
    return model.requires_grad_(False).eval()


def prepare_tokenizer(args, grid):
    """The tokenizer of --tokenizer; one sentence if its grid is not that of the patches."""
    path = args.tokenizer or f"out/dvae-{Path(args.data).name}/tokenizer.pt"
    if not args.tokenizer and not Path(path).exists():
        data.stop(f"there is no {path}: train it with python dvae.py --data {args.data}, name one with "
                  f"--tokenizer FILE, or predict pixels with --target pixels")
    tokenizer = load_tokenizer(path, grid).to(args.device, memory_format=torch.channels_last)
    if tokenizer.grid != grid:
        data.stop(f"{path} makes {tokenizer.grid} x {tokenizer.grid} tokens, but the ViT has {grid} x {grid} "
                  f"patches: use its --img_size and --patch_size here, or train another one with dvae.py")
    return tokenizer


@torch.no_grad()
def token_marginal(tokenizer, pixels):
    """Entropy in nats of the frequencies of the codes of some images, share of the commonest code.

    pixels (n, 3, s, s); asserts that they are what a tokenizer reads.
    """
    assert 0 <= pixels.min() and pixels.max() <= 1, (
        f"pixels from {pixels.min():.2f} to {pixels.max():.2f}: a tokenizer reads [0, 1], not normalised")
    ids = torch.cat([tokenizer.tokens(part) for part in pixels.split(100)])
    counts = ids.flatten().bincount(minlength=tokenizer.vocab)
    return code_entropy(counts), counts.max().item() / counts.sum().item()


def code_entropy(counts):
    """Entropy in nats of the frequencies of codes that occur `counts` (K,) times"""
    share = counts.double() / counts.sum()
    return -(share * share.clamp(min=1e-12).log()).sum().item()


# ---- what shows how the vocabulary is doing ----


def trivial_level(imgs, recon):
    """The loss of painting one colour and saying nothing: the best constant mu and b. imgs (B, 3, H, W)"""
    if recon == "mse":
        return (imgs.var((0, 2, 3)) / 0.02).mean().item()
    t = map_pixels(imgs).transpose(0, 1).flatten(1)                                         # (3, B H W)
    b = (t.logit() - t.logit().median(1, keepdim=True)[0]).abs().mean(1)
    return (1 + math.log(2) + b.log() + (t * (1 - t)).log().mean(1)).mean().item()


@torch.no_grad()
def monitor(args, model, source, view, tau):
    """The vocabulary over all images of a set. -> numbers for the log, count of each code (K,)

    usage: share of the codes that occur; perplexity: exp of the entropy of their frequencies;
    posterior_perplexity: exp of the mean entropy of q; kl: its mean divergence from uniform; mae: mean
    |error| of pixels in [-1, 1] painted from hard codes; gap: the same less that from relaxed codes.
    """
    model.eval()
    counts = torch.zeros(model.vocab, dtype=torch.long, device=args.device)
    sums = torch.zeros(4, device=args.device)
    for (imgs,), _ in data.Loader(args, source, [view], train=False):
        for part in imgs.split(128):
            with data.autocast(args):
                logits = model.logits(part)
                hard = model.paint(logits.argmax(1))
                relaxed = model.pixels(model.decoder(gumbel_softmax(logits, tau)))
            counts += logits.argmax(1).flatten().bincount(minlength=model.vocab)
            errors = [2 * (painted - part).abs().mean((1, 2, 3)).sum() for painted in (hard, relaxed)]
            sums += torch.stack([kl_to_uniform(logits).mean((1, 2)).sum(), *errors,
                                 sums.new_tensor(len(part))])
    model.train()
    kl, mae, mae_relaxed, seen = data.all_sum(sums).tolist()
    counts = data.all_sum(counts)
    return {"usage": (counts > 0).double().mean().item(), "perplexity": math.exp(code_entropy(counts)),
            "posterior_perplexity": model.vocab * math.exp(-kl / seen), "kl": kl / seen,
            "mae": mae / seen, "gap": (mae - mae_relaxed) / seen}, counts.cpu()


def collapse(result, vocab):
    """In words, what is wrong with a vocabulary, or None. To be asked after the first fifth of a training."""
    if result["kl"] < 0.02 * math.log(vocab):
        return ("the posterior has collapsed: the codes say nothing about the image and the decoder paints "
                "means; try a smaller --beta or a larger --tau_anneal")
    if result["usage"] < 0.1 or result["perplexity"] < 0.05 * vocab:
        return (f"the codes are collapsing: {result['usage']:.0%} of them occur, perplexity "
                f"{result['perplexity']:.0f} of {vocab}; try a larger --beta, more epochs or a smaller --lr")


@torch.no_grad()
def pictures(model, imgs, counts, folder, step):
    """<step>.png: images, and as painted from hard codes; codebook.png: what each code paints, its share."""
    model.eval()
    ids = model.tokens(imgs)
    data.save_rows(folder / f"{step:06d}.png", {"image": imgs, "hard codes": model.paint(ids)},
                   f"{model.grid} x {model.grid} codes an image, {len(ids.unique())} different ones here")
    order = counts.argsort(descending=True)
    used = order[:256].to(imgs.device)                          # a grid full of one code, its middle
    s = model.img_size // model.grid
    middle = model.grid // 2 * s
    painted = torch.cat([model.paint(part[:, None].expand(-1, model.grid ** 2)) for part in used.split(64)])
    tiles = painted[:, :, middle - s:middle + s, middle - s:middle + s].cpu()               # (k, 3, 2s, 2s)
    model.train()
    if data.rank():
        return
    columns = 16
    tiles = F.pad(tiles, (1, 1, 1, 1), value=1.0)
    tiles = torch.cat([tiles, tiles.new_ones(-len(tiles) % columns, *tiles.shape[1:])])
    mosaic = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(mosaic.numpy(), interpolation="nearest")
    left.set(xticks=[], yticks=[], title=f"what the {len(used)} commonest codes paint")
    share = counts[order] / counts.sum()
    right.fill_between(range(1, len(share) + 1), share.numpy(), step="mid")
    right.axhline(1 / len(share), color="black", linewidth=0.8)
    right.set(yscale="log", xlabel="code, commonest first", ylabel="share of all places (line: uniform)",
              title=f"{(counts > 0).sum()} of {len(counts)} codes are used")
    figure.savefig(folder / "codebook.png", dpi=110)


def main():
    args = data.parse_args(__doc__, RECIPES, FLAGS)
    if args.stride < 1 or args.stride & (args.stride - 1):
        data.stop(f"--stride {args.stride} must be a power of two, like 4 or 8")
    if args.n_hid < 4 or args.n_hid % 4 or args.vocab < 2 or args.blocks < 1:
        data.stop(f"--n_hid {args.n_hid} must be divisible by 4, --vocab {args.vocab} above 1 and --blocks "
                  f"{args.blocks} above 0")
    device = data.setup(args)
    train_set, val_set = data.load_sets(args)
    for source in (train_set, val_set):
        source.mean, source.std = (0.0,) * 3, (1.0,) * 3        # a dVAE reads pixels in [0, 1]
    grid = args.img_size // args.patch_size                     # one token for each patch of the ViT
    whole = data.View(grid * args.stride)
    loader = data.Loader(args, train_set,
                         [data.View(grid * args.stride, scale=(args.crop_scale, 1.0), flip=0.5)])

    model = DVAE(grid, args.stride, args.n_hid, args.blocks, args.vocab, args.recon,
                 args.straight_through).to(device, memory_format=torch.channels_last)
    if args.init:
        state = load_tokenizer(args.init, grid).state_dict()
        data.compare_tensors(args.init, state, model.state_dict())
        model.load_state_dict(state)
    net = data.wrap(model, args)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.999),
                                  fused="mps" not in args.device)
    scaler = data.make_scaler(args)
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    start = data.load_checkpoint(args, **parts)
    few = data.some_images(args, val_set, 1000, whole)
    data.describe(args, model, loader, f"{trivial_level(few, args.recon):.3f} (one colour everywhere, no KL)")
    log = data.Log(args, loader, start)

    def evaluate(step):
        tau = cosine_ramp(step / (args.epochs * loader.epoch_steps) / args.tau_anneal, 1.0, args.tau)
        result, counts = monitor(args, ema, val_set, whole, tau)
        pictures(ema, few[:8], counts, Path(args.output_dir, "pictures"), step)
        log.write(step, **result)
        words = collapse(result, args.vocab) if step >= 0.2 * args.epochs * loader.epoch_steps else None
        if words and data.rank() == 0:
            print(words, flush=True)

    if start == 0:
        evaluate(0)
    for step, batch in loader.steps(start):
        lr, done = cosine_lr(step / loader.epoch_steps, args), step / (args.epochs * loader.epoch_steps)
        set_lr(optimizer, lr)
        tau = cosine_ramp(done / args.tau_anneal, 1.0, args.tau)
        beta = cosine_ramp(done / args.beta_warmup, 0.0, args.beta)
        total, nll, kl = 0, 0, 0
        for (imgs,), _ in batch:                                # the labels are never used
            with data.autocast(args):                           # tensors: a number would be compiled in
                losses = net(imgs, torch.full((), tau, device=device), torch.full((), beta, device=device))
            scaler.scale(losses[0] / args.accum_steps).backward()
            total, nll, kl = (a + b.detach() / args.accum_steps for a, b in zip((total, nll, kl), losses))
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        update_ema(ema, model, min(args.ema, (1 + step) / (10 + step)))
        log.step(step, loss=total, nll=nll, kl=kl, lr=lr, tau=tau, beta=beta)
        if log.evaluates(step):
            evaluate(step + 1)
        if log.saves(step):
            save_tokenizer(args, ema)
            data.save_checkpoint(args, step + 1, **parts)
        if log.interrupted:
            break
    log.finish()


if __name__ == "__main__":
    main()
