"""The discrete VAE of DALL-E (Ramesh et al., 2021), arXiv:2102.12092: images as a grid of words.

Measured: CIFAR-10, --model micro, two CPU cores, 8 minutes: 97% of 512 codes in use, perplexity 300.

An encoder gives every place of a coarse grid a distribution over K codes; a decoder paints the image from one
code a place. A sample of a code has no gradient, so training relaxes it: logits with Gumbel noise go through
a softmax whose temperature tau falls, until the mixture is nearly one code. BEiT and CAE predict the codes.

    L = ( -sum_pixels log p(x | y) + beta sum_i KL(q_i || uniform) ) / (3 H W)       mean over the images
    y_i = softmax((logits_i + g) / tau)      g ~ Gumbel(0, 1)       q_i = softmax(logits_i)
    log p: the density of t = 0.8 x + 0.1 if logit(t) is Laplace (A.3); --recon mse: a Gaussian, sigma 0.1
    token_i = argmax_k logits_ik             without noise: what `tokens` gives

`knn_words` in the log says what the codes alone tell of an image: a k-NN vote on how often each occurs in it.

A VAE's latent is a vector, and its prior N(0, I); here it is one of K codes, and before the image is seen
none is likelier than another: the prior is uniform. (BEiT learns a better one, given the visible part.)

Shapes: B images, h x w = (H / stride) x (W / stride) = N places (tokens), K codes (--vocab), n = --n_hid.

The grid is that of the ViT that will read the tokens: the dVAE sees s = img_size / patch_size * stride pixels
(112 px for ViT-B/16 at 224).

    python dvae.py --data shapes                            # CPU, offline, 4 minutes: 63% of 512 codes in use
    python dvae.py --model micro                            # CIFAR-10, CPU, 8 minutes
    python dvae.py                                          # CIFAR-10, one GPU: not run yet
    torchrun --nproc_per_node=8 dvae.py --data imagenet     # 112 px, 8192 codes: not run yet

Deviations: a run on 32 px images is far shorter than DALL-E's, so beta and tau are ramped over shares of the
training; on ImageNet these shares are DALL-E's numbers of updates, but learning ends after 250,000 updates,
not 3 million. Crops hold 40 to 100% of an image, on ImageNet too. All tensors of rank 2 or more are decayed.
"""
import copy
import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from vit import (cosine_lr, half_cosine, image_of, norm_patches, param_groups, patches_of, renamed, set_lr,
                 update_ema)

RECIPE = {  # one value, or four: shapes, laptop, small, imagenet (DALL-E's); meaning; range
    "model":            (("micro", "micro", "tiny", "base"), "sets n_hid, vocab", ("micro", "tiny", "base")),
    "init":             ("", "start from the weights of this tokenizer.pt, or of DALL-E's encoder.pkl"),
    "stride":           ((4, 4, 4, 8), "pixels per token, in each direction: a power of two", "[1, 64]"),
    "n_hid":            ({"micro": 32, "tiny": 64, "base": 256}, "width of the first blocks", "[4, 4096]"),
    "blocks":           (2, "residual blocks per group", "[1, 100]"),
    "vocab":            ({"micro": 512, "tiny": 1024, "base": 8192}, "codes in the vocabulary", "[2, 1e9]"),
    "beta":             (6.6, "final weight of the KL divergence to uniform; rises from 0", "[0, inf)"),
    "beta_warmup":      ((0.05, 0.05, 0.05, 0.02), "share of the training in which beta rises", "(0, 1]"),
    "tau":              (1 / 16, "final temperature of the Gumbel-softmax; falls from 1", "(0, 10]"),
    "tau_anneal":       ((0.5, 0.5, 0.5, 0.6), "share of the training in which tau falls", "(0, 1]"),
    "recon":            ("laplace", "Laplace density of pixels' logits, or Gaussian", ("laplace", "mse")),
    "straight_through": (False, "decode hard one-hot samples; the gradient is that of the relaxed ones"),
    "ema":              (0.999, "momentum of the average that is judged and exported", "[0, 1]"),
    "crop_scale":       (0.4, "smallest share of the image in a random crop", "(0, 1]"),
    "epochs":           (12, 4, 100, 100),                      # passes over the images
    "batch_size":       (64, 64, 256, 512),                     # of all GPUs together
    "lr":               (1e-3, 1e-3, 1e-3, 1e-4),               # at its peak
    "min_lr":           (1e-5, 1e-5, 1e-5, 1.25e-6),            # at the end
    "warmup_epochs":    (0.1, 0.1, 1.0, 0.0),                   # in which lr rises from 0
    "weight_decay":     1e-4,                                   # on all tensors of rank 2 or more
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

    logits, noise (B, K, h, w) float32 -> (B, K, h, w). noise: Gumbel(0, 1), drawn if not given."""
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
    """Log-density of t = 0.8 x + 0.1, x (B, 3, H, W); out (B, 6, H, W): mu and ln b of logit(t) (A.3)."""
    t, (mu, ln_b) = map_pixels(imgs), out.chunk(2, 1)
    return -math.log(2) - ln_b - (t * (1 - t)).log() - (t.logit() - mu).abs() * (-ln_b).exp()


def log_gauss(imgs, out, sigma=0.1):
    """The same for a Gaussian of fixed sigma around out (B, 3, H, W), without its constants."""
    return -(imgs - out).square() / (2 * sigma ** 2)


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


def tower(first, widths, blocks, kernels, between, n_out):
    """`first`, groups of residual blocks with `between` after each but the last, and a 1 x 1 convolution."""
    gain, parts = 1 / ((len(widths) - 1) * blocks) ** 2, [("input", first)]
    for g, (n_in, width) in enumerate(zip(widths, widths[1:]), start=1):
        layers = [(f"block_{b + 1}", ResBlock(width if b else n_in, width, kernels, gain))
                  for b in range(blocks)]
        if g < len(widths) - 1:
            layers.append(between)
        parts.append((f"group_{g}", nn.Sequential(OrderedDict(layers))))
    last = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=conv(widths[-1], n_out, 1)))
    return nn.Sequential(OrderedDict([*parts, ("output", last)]))


class Encoder(nn.Module):
    """Mapped pixels (B, 3, H, W) -> logits (B, K, h, w), float32 under any autocast."""

    def __init__(self, n_groups, n_hid, blocks, vocab):
        super().__init__()
        widths = [n_hid] + [n_hid * 2 ** g for g in range(n_groups)]
        self.blocks = tower(conv(3, n_hid, 7), widths, blocks, (3, 3, 3, 1), ("pool", nn.MaxPool2d(2)), vocab)

    def forward(self, x):
        x = self.blocks[:-1](x)
        with torch.autocast(x.device.type, enabled=False):
            return self.blocks.output(x.float())


class Decoder(nn.Module):
    """One-hot or relaxed codes (B, K, h, w) -> parameters of the pixels (B, channels, H, W), float32.

    The first layer is 1 x 1, so its weight is the codebook, a vector for each code."""

    def __init__(self, n_groups, n_hid, blocks, vocab, channels, n_init):
        super().__init__()
        widths = [n_init] + [n_hid * 2 ** g for g in reversed(range(n_groups))]
        self.blocks = tower(conv(vocab, n_init, 1), widths, blocks, (1, 3, 3, 3),
                            ("upsample", nn.Upsample(scale_factor=2)), channels)

    def forward(self, y):
        with torch.autocast(y.device.type, enabled=False):
            x = self.blocks.input(y)
        return self.blocks[1:](x).float()

    def paint(self, ids):
        """The same for codes (B, h, w), looked up: what the first layer makes of their one-hot vectors"""
        layer = self.blocks.input
        x = F.embedding(ids, layer.weight[:, :, 0, 0].T) + layer.bias                       # (B, h, w, .)
        return self.blocks[1:](x.permute(0, 3, 1, 2)).float()


class DVAE(nn.Module):
    """Encoder, decoder and loss; `tokens` and `paint` are what other methods use."""

    def __init__(self, grid=8, stride=4, n_hid=64, blocks=2, vocab=1024, recon="laplace",
                 straight_through=False, n_init=0):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.grid, self.img_size, self.vocab = grid, grid * stride, vocab
        self.recon, self.straight_through = recon, straight_through
        n_groups = stride.bit_length()                          # stride = 2^(groups - 1)
        self.encoder = Encoder(n_groups, n_hid, blocks, vocab)
        self.decoder = Decoder(n_groups, n_hid, blocks, vocab, 6 if recon == "laplace" else 3,
                               n_init or max(32, n_hid // 2))

    def logits(self, imgs):
        """Pixels (B, 3, s, s) in [0, 1], s = img_size -> (B, K, h, w) float32"""
        assert imgs.shape[1:] == (3, self.img_size, self.img_size), (
            f"{tuple(imgs.shape)}, but this dVAE reads (B, 3, {self.img_size}, {self.img_size})")
        return self.encoder(map_pixels(imgs))

    def pixels(self, out):
        """What the decoder's output (B, channels, H, W) looks like: (B, 3, H, W) in [0, 1]"""
        return unmap_pixels(out[:, :3].sigmoid()) if self.recon == "laplace" else out.clamp(0, 1)

    def tokens(self, imgs):
        """Pixels (B, 3, s, s) in [0, 1], not normalised -> codes (B, N) long, in raster order; in float32"""
        with torch.autocast(imgs.device.type, enabled=False):
            return self.logits(imgs).argmax(1).flatten(1)

    def features(self, imgs):
        """Images of any size -> how often each code occurs in them (B, K)"""
        return data.histogram(self.tokens(data.resize(imgs, self.img_size)), self.vocab)

    def paint(self, ids):
        """Codes (B, N) -> pixels (B, 3, s, s) in [0, 1]"""
        return self.pixels(self.decoder.paint(ids.view(len(ids), self.grid, self.grid)))

    def forward(self, imgs, tau, beta):
        """(B, 3, s, s) in [0, 1] -> loss, -log p a pixel and channel, KL a place; all means over the batch"""
        logits = self.logits(imgs)
        out = self.decoder(gumbel_softmax(logits, tau, self.straight_through))
        nll = -(log_laplace if self.recon == "laplace" else log_gauss)(imgs, out).mean()
        kl = kl_to_uniform(logits).mean()
        return nll + beta * kl * self.grid ** 2 / imgs[0].numel(), nll, kl


def load_dalle(path, grid):
    """DALL-E's dVAE, two modules that OpenAI pickled: encoder.pkl and, in the same folder, decoder.pkl, from
    https://cdn.openai.com/dall-e/. Sizes are read off the shapes."""
    state = {}
    with data.reading(path, "DALL-E's encoder, beside its decoder"):
        for part in ("encoder", "decoder"):
            file = Path(path).with_name(Path(path).name.replace("encoder", part))
            names = {r"\.w$": ".weight", r"\.b$": ".bias", "^": f"{part}."}
            found = renamed(data.load_file(file, "blocks.input.w"), names)
            state |= {name: value.float() for name, value in found.items()}
        n_hid, vocab, n_init = (len(state[f"{name}.bias"]) for name in (
            "encoder.blocks.input", "encoder.blocks.output.conv", "decoder.blocks.input"))
        n_groups = len({name.split(".")[2] for name in state if "encoder.blocks.group_" in name})
        blocks = len({name.split(".")[3] for name in state if "encoder.blocks.group_1." in name})
        model = DVAE(grid, 2 ** (n_groups - 1), n_hid, blocks, vocab, n_init=n_init)
    return data.load_state(model, state, path)


def load_tokenizer(path, grid=14):
    """The frozen tokenizer in a file: `tokens` reads pixels in [0, 1], a dVAE's `paint` gives them back.

    path: a tokenizer.pt of dvae.py or beit_v2.py, an official VQ-KD file, or DALL-E's encoder.pkl, beside its
    decoder.pkl: a network for any grid, it gets `grid`. Raises: exits with one sentence if it is none."""
    if Path(path).suffix == ".pkl":
        return load_dalle(path, grid).requires_grad_(False).eval()
    content = data.load_file(path)
    if "step" in content:
        data.stop(f"{path} is no tokenizer: give the tokenizer.pt of that run")
    if content.get("method") != "dvae":
        from beit_v2 import load_vqkd                           # other codes for the same student
        return load_vqkd(path, content)
    model = data.build(path, DVAE, content.get("config"))
    return data.load_state(model, content.get("model"), path).requires_grad_(False).eval()


def prepare_tokenizer(args, run="dvae"):
    """The tokenizer of --tokenizer, or the one that `run` left in its usual place, on its device.

    Raises: exits with one sentence if there is none, or its grid is not that of the patches."""
    path = args.tokenizer or f"out/{run}-{Path(args.data).name}/tokenizer.pt"
    if not args.tokenizer and not Path(path).exists():
        script = run.removesuffix("-tokenizer")
        data.stop(f"there is no {path}: train it with python {script}.py --data {args.data}, or name one "
                  f"with --tokenizer FILE")
    tokenizer = load_tokenizer(path, args.grid)
    if tokenizer.grid != args.grid:
        data.stop(f"{path} makes {tokenizer.grid} x {tokenizer.grid} tokens, but the ViT has {args.grid} x "
                  f"{args.grid} patches: use its --img_size and --patch_size, or train another tokenizer")
    return data.rests_on(args, tokenizer.to(args.device, memory_format=torch.channels_last))


def painter(tokenizer, codes, size):
    """-> what makes pictures (B, 3, size, size) of codes (B, N), rows that show the true ones, a note

    A dVAE paints codes. VQ-KD's stand for no pixels: they are white where they equal the true `codes`."""
    def mark(ids):
        return F.interpolate((ids == codes).float().view(-1, 1, tokenizer.grid, tokenizer.grid), size=size)

    def paint(ids):
        return data.resize(getattr(tokenizer, "paint", mark)(ids), size).cpu().expand(-1, 3, -1, -1)
    if hasattr(tokenizer, "paint"):
        return paint, {"true codes, painted": paint(codes)}, ""
    return paint, {}, " (white)"


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
    |error| of pixels in [-1, 1] painted from hard codes; gap: the same less that from relaxed codes."""
    model.eval()
    counts = torch.zeros(model.vocab, dtype=torch.long, device=args.device)
    sums = torch.zeros(3, device=args.device)
    for (imgs,), _ in data.Loader(args, source, [view], train=False):
        for part in imgs.split(128):
            with data.autocast(args):
                logits = model.logits(part)
                hard = model.paint(logits.argmax(1))
                relaxed = model.pixels(model.decoder(gumbel_softmax(logits, tau)))
            counts += logits.argmax(1).flatten().bincount(minlength=model.vocab)
            errors = [2 * (painted - part).abs().mean((1, 2, 3)).sum() for painted in (hard, relaxed)]
            sums += torch.stack([kl_to_uniform(logits).mean((1, 2)).sum(), *errors])
    model.train()
    kl, mae, mae_relaxed = (data.all_sum(sums) / len(source)).tolist()
    counts = data.all_sum(counts)
    return data.usage(counts) | {
        "posterior_perplexity": model.vocab * math.exp(-kl), "kl": kl, "mae": mae,
        "gap": mae - mae_relaxed}, counts.cpu()


def collapse(result, vocab):
    """In words, what is wrong with a vocabulary, or None. To be asked after the first fifth of a training."""
    if result["kl"] < 0.02 * math.log(vocab):
        return ("the posterior has collapsed: the codes say nothing about the image and the decoder paints "
                "means; try a smaller --beta or a larger --tau_anneal")
    if result["usage"] < 0.1 or result["perplexity"] < 0.05 * vocab:
        return (f"the codes are collapsing: {result['usage']:.0%} of them occur, perplexity "
                f"{result['perplexity']:.0f} of {vocab}; try a larger --beta, more epochs or a smaller --lr")


@torch.no_grad()
def pictures(model, imgs, counts, path):
    """<step>.png: images, painted from hard codes, and from codes drawn at random, the prior;
    spectrum.png: what codes leave out; codebook.png: what each code paints, its share."""
    model.eval()
    codes, p = model.tokens(imgs), model.img_size // model.grid
    painted, random = model.paint(codes), model.paint(torch.randint_like(codes[:8], model.vocab))
    data.save_rows(path, {"image": imgs[:8], "hard codes": painted[:8], "random codes": random},
                   f"{model.grid} x {model.grid} codes an image, {len(codes[:8].unique())} different here")
    spectra, normalised = {}, image_of(norm_patches(patches_of(imgs, p))[0], p)
    for name, x in (("images", imgs), ("painted from codes", painted), ("normalised patches", normalised)):
        energy = data.spectrum(x)
        spectra[f"{name}: {energy[len(energy) // 3:].sum():.0%} in the upper two thirds"] = energy
    data.save_plot(path.with_name("spectrum.png"), spectra, yscale="log", xlabel="cycles a side",
                   ylabel="share of the energy")
    commonest = counts.argsort(descending=True)[:(counts > 0).sum()][:256].to(imgs.device)
    middle = slice(max(0, model.grid // 2 - 1) * p, (model.grid // 2 + 1) * p)  # of a grid full of one code
    tiles = torch.cat([model.paint(part[:, None].expand(-1, model.grid ** 2))[:, :, middle, middle]
                       for part in commonest.split(64)]).cpu()                              # (k, 3, ., .)
    model.train()
    tiles = F.pad(tiles, (1, 1, 1, 1, 0, 0, 0, 256 - len(tiles)), value=1.0)                # (256, 3, ., .)
    mosaic = image_of(tiles.flatten(1)[None], tiles.shape[-1])[0].permute(1, 2, 0)
    data.save_usage(path.with_name("codebook.png"), counts, mosaic,
                    f"left: what the {len(commonest)} commonest of {model.vocab} codes paint")


def main():
    args = data.parse_args(__doc__, RECIPE)
    if args.stride & (args.stride - 1) or args.n_hid % 4:
        data.stop(f"--stride {args.stride} must be a power of two, like 4 or 8, and --n_hid {args.n_hid} "
                  f"divisible by 4")
    device = data.setup(args)
    train_set, val_set = data.load_sets(args)
    for source in (train_set, val_set):
        source.mean, source.std = (0.0,) * 3, (1.0,) * 3        # a dVAE reads pixels in [0, 1]
    size = args.grid * args.stride                              # one token for each patch of the ViT
    whole = data.View(size)
    loader = data.Loader(args, train_set, [data.View(size, scale=(args.crop_scale, 1.0), flip=0.5)])

    model = DVAE(args.grid, args.stride, args.n_hid, args.blocks, args.vocab, args.recon,
                 args.straight_through).to(device, memory_format=torch.channels_last)
    if args.init:
        data.load_state(model, load_tokenizer(args.init, args.grid).state_dict(), args.init)
    net = data.wrap(model, args)                                # compiled, in DDP; `model` itself is saved
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.999),
                                  fused="mps" not in args.device)
    scaler = data.make_scaler(args)
    state = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    start = data.load_checkpoint(args, **state)
    (samples,) = data.some_images(args, val_set, 1000, whole)
    level = trivial_level(samples, args.recon)
    log = data.open_log(args, model, loader, start, f"{level:.3f} (one colour, no KL)", loss=level, nll=level)

    def evaluate(step):
        torch.manual_seed(0)                                    # the same noise every time
        tau = half_cosine(step / loader.all_steps / args.tau_anneal, 1.0, args.tau)
        result, counts = monitor(args, ema, data.monitored(train_set, val_set)[1], whole, tau)
        pictures(ema, samples[:200], counts, log.picture(step))
        words_knn = data.knn_monitor(args, ema, train_set, val_set, ranked=False)["knn"]
        log.write(step, **result, knn_words=words_knn)
        if step >= 0.2 * loader.all_steps and (words := collapse(result, args.vocab)):
            data.say(words)

    if log.evaluates(start):
        evaluate(start)                                         # what an untrained network can do
    for step, parts in loader.steps(start, net):
        lr = set_lr(optimizer, cosine_lr(step / loader.epoch_steps, args))      # set in every step
        done = step / loader.all_steps
        tau = half_cosine(done / args.tau_anneal, 1.0, args.tau)
        beta = half_cosine(done / args.beta_warmup, 0.0, args.beta)
        knobs = [torch.full((), knob, device=device) for knob in (tau, beta)]   # numbers would be compiled in
        for (imgs,), _ in parts:                                # the labels are never used
            with data.autocast(args):
                loss, nll, kl = net(imgs, *knobs)
            scaler.scale(loss / args.accum_steps).backward()    # the gradients of the parts add up
            log.note(loss=loss, nll=nll, kl=kl)
        if args.clip_grad:
            scaler.unscale_(optimizer)                          # undo fp16's loss scaling before clipping
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        update_ema(ema, model, min(args.ema, (1 + step) / (10 + step)))     # soon forgets the random start
        log.step(step, lr=lr, tau=tau, beta=beta)
        if log.saves(step + 1):
            log.save(step + 1, state, tokenizer=ema)
        if log.evaluates(step + 1):
            evaluate(step + 1)
    log.finish()


if __name__ == "__main__":
    data.run(main)
