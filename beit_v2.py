"""BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers (Peng et al., 2022),
arXiv:2208.06366.

Measured: ViT-micro/4, CIFAR-10, two CPU cores, 29 + 4 + 24 minutes (teacher, tokenizer, this): k-NN 46%,
linear 54%, fine-tuned 60%.

Two stages. VQ-KD: a tokenizer whose codes must suffice to rebuild the features of a teacher, so that they
stand for meaning, not for colour. Then BEiT's masked prediction of these codes, with a second head: the class
token of the last block and the patches of an early one go through two more blocks and predict the codes
again, so the class token has to hold what early patches cannot know: the whole image (an idea of Condenser,
Gao & Callan, 2021, for text).

    tokenizer     L = mean_i (1 - cos(decoder(q)_i, teacher_i)) + commit mean (sg[q] - u)^2    u = z / |z|
                  q_i = e_k, k = argmax_k u_i . e_k; the gradient at q goes to u (straight through)
                  e_k <- norm(0.99 e_k + 0.01 norm(sum of the u_i of code k)), for the codes of a batch
    pre-training  L = CE(W LN(x_L), codes) + CE(W LN(branch([cls_L; patches_l])), codes), at hidden patches

The paper's loss has a term that moves the codes, |sg[u] - e|^2; their running average replaces it: one step
of it is a gradient step on that term, which --codes gradient takes. The commitment is a mean over E, too.

Shapes: B images, N patches (no cls), M hidden ones of each, C width, E of a code, K codes, T width of the
teacher.

The teacher is an encoder.pt of ours (MAE's by default, iBOT's, a supervised one), or an official file that
vit.py reads (DINO, timm), or OpenAI's CLIP.

    python beit_v2.py --data shapes                         # CPU, both stages, after mae.py --data shapes
    python beit_v2.py --model micro                         # CIFAR-10, CPU, 28 minutes, after mae.py
    python beit_v2.py                                       # CIFAR-10, one GPU, after mae.py: not run yet
    torchrun --nproc_per_node=8 beit_v2.py --data imagenet  # 300 epochs, after mae.py: not run yet

Deviations: k-means on vectors of all ranks, on one rank, then broadcast; codes that no vector chose for a
while restart at random vectors (--restart, off on ImageNet); the branch starts like the other blocks; masks,
tokenizer view and fused biases as in beit.py.
"""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
from dvae import prepare_tokenizer
from vit import (SIZES, Block, ViT, cosine_lr, infer_config, init_beit, load_init, load_weights,
                 official_state, param_groups, read_encoder, renamed, rescale, set_lr, take)

# one value, or four: shapes, laptop, small, imagenet (the paper's appendix); meaning; range
SHARED = {
    "stage":         ("both", "which stage to train", ("both", "tokenizer", "pretrain")),
    "tokenizer":     ("", "of stage 1, or dvae.py's (out/beit_v2-tokenizer-<data>/tokenizer.pt by default)"),
}
TOKENIZER = {
    "teacher":       ("", "encoder whose features are rebuilt (out/mae-<data>/encoder.pt if not given)"),
    "num_codes":     ({"micro": 512, "tiny": 1024, "base": 8192}, "codes in the vocabulary", "[2, 1e9]"),
    "code_dim":      ((16, 16, 16, 32), "width of a code", "[1, 4096]"),
    "decoder_depth": ((1, 1, 1, 3), "blocks of the tokenizer's decoder", "[1, 100]"),
    "commit":        (1.0, "weight of the commitment loss", "[0, inf)"),
    "codes":         ("ema", "they follow a running average; ablation: a loss", ("ema", "gradient")),
    "unit":          (True, "vectors and codes have length 1; ablation: any"),
    "decay":         (0.99, "momentum of the running average", "[0, 1]"),
    "restart":       ((50, 100, 100, 0), "steps between restarts of unused codes; 0: never", "[0, 1e9]"),
    "crop_scale":    ((0.4, 0.4, 0.4, 0.08), "smallest share of the image in a random crop", "(0, 1]"),
    "epochs":        (8, 2, 100, 100),                          # passes over the images
    "batch_size":    (64, 128, 512, 512),                       # of all GPUs together
    "blr":           (2e-3, 3e-3, 1e-4, 1e-4),                  # lr = blr * batch_size / 256
    "min_lr":        1e-5,                                      # at the end
    "warmup_epochs": (0.5, 0.3, 10.0, 10.0),                    # in which lr rises from 0
    "weight_decay":  1e-4,                                      # not on biases and norms
}
PRETRAIN = {  # 1600 epochs: --beta2 0.999 --drop_path 0.1
    "masking":       ("block", "hide patches in blocks; ablation: at random", ("block", "random")),
    "num_masked":    ((26, 26, 26, 75), "patches hidden in each image", "[1, 1e9]"),
    "min_block":     ((4, 4, 4, 16), "smallest number of patches of a block", "[1, 1e9]"),
    "early_layer":   ({"tiny": 9, "micro": 4, "large": 21}, "block that the branch reads", "[1, 100]"),
    "branch_depth":  (2, "blocks of the class token's branch; 0: without", "[0, 100]"),
    "shared_head":   (True, "branch and last block share one head"),
    "layer_scale":   ({"base": 0.1, "large": 1e-5}, "first value of the layer scale; 0: without", "[0, 10]"),
    "drop_path":     (0.0, "drop path rate of the last block", "[0, 1)"),
    "crop_scale":    ((0.4, 0.4, 0.4, 0.2), "smallest share of the image in a random crop", "(0, 1]"),
    "color_jitter":  ((0.0, 0.0, 0.0, 0.4), "strength in brightness, contrast, saturation", "[0, 1]"),
    "beta2":         (0.98, "AdamW's second beta", "[0, 1)"),
    "epochs":        (12, 9, 300, 300),                         # passes over the images
    "batch_size":    (64, 128, 512, 2048),                      # of all GPUs together
    "lr":            1.5e-3,                                    # at its peak
    "min_lr":        1e-5,                                      # at the end
    "warmup_epochs": (1.0, 1.0, 10.0, 10.0),                    # in which lr rises from 0
    "weight_decay":  0.05,                                      # not on biases and norms
    "clip_grad":     3.0,                                       # largest norm of the gradient
}


# ---- stage 1: the tokenizer ----

class Quantizer(nn.Module):
    """Vectors -> nearest of K codes, of length 1 if `unit`. The codes have no gradient: `update` moves them
    after a step; with `trained` the optimiser does, by the gradient of |sg[u] - e|^2 (VQ-VAE's loss)."""

    def __init__(self, num_codes, dim, decay=0.99, commit=1.0, unit=True, trained=False):
        super().__init__()
        self.decay, self.commit, self.unit, self.trained = decay, commit, unit, trained
        codebook = self.scaled(torch.randn(num_codes, dim))
        self.codebook = nn.Parameter(codebook) if trained else nn.Buffer(codebook)
        self.register_buffer("hits", torch.zeros(num_codes))    # since the last restart

    def scaled(self, x):
        return F.normalize(x, dim=-1) if self.unit else x

    def nearest(self, z):
        """(..., E) -> (unit) vectors u (..., E), indices of their codes (...); float32 under any autocast"""
        with torch.autocast(z.device.type, enabled=False):
            u = self.scaled(z.float())
            near = u @ self.codebook.T if self.unit else -torch.cdist(u, self.codebook)
            return u, near.argmax(-1)

    def forward(self, z):
        """(n, E) -> q (n, E) with the gradient of u, indices (n,), commitment loss, what `update` needs"""
        u, ids = self.nearest(z)
        q = self.codebook[ids]
        loss = self.commit * (q.detach() - u).square().mean()
        if self.trained:
            loss = loss + (q - u.detach()).square().mean()
        with torch.no_grad():
            sums = torch.zeros_like(self.codebook).index_add_(0, ids, u)                    # (K, E)
            counts = torch.zeros_like(self.hits).index_add_(0, ids, torch.ones_like(u[:, 0]))
        return u + (q - u).detach(), ids, loss, (sums, counts)

    @torch.no_grad()
    def update(self, sums, counts):
        """Codes of this batch, of all ranks, move towards the direction of the sum of their vectors."""
        sums, counts = data.all_sum(sums), data.all_sum(counts)
        if not self.trained:
            mean = F.normalize(sums, dim=1) if self.unit else sums / counts[:, None].clamp(min=1)
            moved = self.decay * self.codebook + (1 - self.decay) * mean
            self.codebook.copy_(torch.where(counts[:, None] > 0, moved, self.codebook))
        self.codebook.copy_(self.scaled(self.codebook))
        self.hits += counts

    @torch.no_grad()
    def restart(self, z):
        """Codes without a hit since the last call begin anew at random vectors of z (n, E), of all ranks."""
        u = data.all_rows(self.scaled(z.float()))
        fresh = u[torch.randint(len(u), (len(self.codebook),), device=u.device)]
        self.codebook.copy_(from_first_rank(torch.where(self.hits[:, None] > 0, self.codebook, fresh)))
        self.hits.zero_()

    @torch.no_grad()
    def start(self, z):
        """First codes: by k-means on vectors z (n, E) of all ranks; without `unit`, random ones of them"""
        with torch.autocast(z.device.type, enabled=False):
            rows = data.all_rows(self.scaled(z.float()))
            self.codebook.copy_(from_first_rank(spherical_kmeans(rows, len(self.codebook), 10 * self.unit)))


def spherical_kmeans(u, num_codes, iterations=10):
    """Unit vectors (n, E) -> unit means (K, E), started at random rows; an empty cluster keeps its mean."""
    rows = torch.randperm(max(len(u), num_codes), device=u.device) % len(u)     # some twice if u are too few
    means = u[rows[:num_codes]]
    for _ in range(iterations):
        sums = torch.zeros_like(means).index_add_(0, (u @ means.T).argmax(1), u)
        means = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), means)
    return means


def from_first_rank(x):
    if data.world_size() > 1:
        dist.broadcast(x, 0)
    return x


class VQKD(nn.Module):
    """Encoder, quantizer and decoder; `tokens` is what pre-training uses."""

    def __init__(self, encoder, num_codes=8192, code_dim=32, decoder_depth=3, teacher_dim=768, commit=1.0,
                 decay=0.99, unit=True, trained=False):
        super().__init__()
        config, C = encoder.config, encoder.config["embed_dim"]
        self.config = {"encoder": config, "num_codes": num_codes, "code_dim": code_dim,
                       "decoder_depth": decoder_depth, "teacher_dim": teacher_dim, "unit": unit}
        self.img_size, self.vocab = config["img_size"], num_codes
        self.grid = self.img_size // config["patch_size"]
        self.encoder = encoder
        self.encode_task_layer = nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, code_dim))
        self.quantizer = Quantizer(num_codes, code_dim, decay, commit, unit, trained)
        self.decoder = ViT(self.grid, 1, C, decoder_depth, config["num_heads"])
        self.decoder.patch_embed.proj = nn.Conv2d(code_dim, C, 1)  # codes in the place of pixels
        self.decode_task_layer = nn.Sequential(nn.Linear(C, C), nn.Tanh(), nn.Linear(C, teacher_dim))
        for layer in (*self.encode_task_layer[::2], *self.decode_task_layer[::2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        for part in (encoder, self.decoder):
            rescale(part.blocks)

    def vectors(self, imgs):
        """(B, 3, H, W) in [-1, 1] -> vectors to be quantized (B, N, E), float32"""
        x = self.encoder.forward_features(imgs)[:, 1:]                                      # (B, N, C)
        with torch.autocast(x.device.type, enabled=False):
            return self.encode_task_layer(x.float())

    def tokens(self, imgs):
        """Pixels (B, 3, s, s) in [0, 1], not normalised -> codes (B, N) long, in raster order"""
        assert imgs.shape[1:] == (3, self.img_size, self.img_size), (
            f"{tuple(imgs.shape)}, but this tokenizer reads (B, 3, {self.img_size}, {self.img_size})")
        return self.quantizer.nearest(self.vectors(2 * imgs - 1))[1]

    def features(self, imgs):
        """(B, 3, H, W) in [-1, 1] -> how often each code occurs in each image (B, K)"""
        return data.histogram(self.quantizer.nearest(self.vectors(imgs))[1], self.vocab)

    def rebuild(self, q):
        """Codes' vectors (B, N, E) -> features of the teacher, rebuilt, (B, N, T)"""
        x = q.transpose(1, 2).unflatten(2, (self.grid, self.grid))                          # (B, E, h, w)
        return self.decode_task_layer(self.decoder.forward_features(x)[:, 1:]).float()

    def forward(self, imgs, target):
        """(B, 3, H, W) in [-1, 1], teacher's features (B, N, T) -> loss, rec, commit, (sums, counts), z"""
        z = self.vectors(imgs)
        q, _, commit, moments = self.quantizer(z.flatten(0, 1))
        rec = (1 - F.cosine_similarity(self.rebuild(q.view_as(z)), target, dim=-1)).mean()
        return rec + commit, rec, commit, moments, z.detach().flatten(0, 1)


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * (1.702 * x).sigmoid()


class CLIP(ViT):
    """OpenAI's visual tower: a norm in front of the blocks, too, QuickGELU, and a projection as its head."""

    def __init__(self, num_classes, **config):
        super().__init__(**config)
        self.ln_pre = nn.LayerNorm(config["embed_dim"])
        self.head = nn.Linear(config["embed_dim"], num_classes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-5
        for block in self.blocks:
            block.mlp.act = QuickGELU()

    def add_cls_and_pos(self, x):
        return self.ln_pre(super().add_cls_and_pos(x))


CLIP_STATS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_NAMES = {r"^(?!visual\.)": None, r"^visual\.": "", "class_embedding": "cls_token",
              "positional_embedding": "pos_embed", "conv1": "patch_embed.proj", "ln_post": "norm",
              r"transformer\.resblocks": "blocks", "ln_1": "norm1", "ln_2": "norm2", r"in_proj_": "qkv.",
              "out_proj": "proj", "c_fc": "fc1", "c_proj": "fc2"}


def read_clip(path, content):
    """CLIP's visual tower, from the content of OpenAI's file: the network under our names.

    The number of heads is the width over 64, as in all of OpenAI's."""
    state = {name: value.float() for name, value in renamed(content, CLIP_NAMES).items()}
    D, *_ = state["patch_embed.proj.weight"].shape
    state["cls_token"], state["pos_embed"] = state["cls_token"].view(1, 1, D), state["pos_embed"][None]
    state["patch_embed.proj.bias"] = torch.zeros(D)
    state["head.weight"] = state.pop("proj").T
    return data.load_state(CLIP(len(state["head.weight"]), **infer_config(state, D // 64)), state, path)


class Teacher(nn.Module):
    """A frozen encoder's patch features of images in [-1, 1], one for each patch of the student."""

    def __init__(self, path, grid):
        super().__init__()
        content = data.load_file(path, "visual.conv1.weight")
        if "visual.conv1.weight" in content:
            with data.reading(path, "OpenAI's CLIP"):
                self.encoder, (mean, std) = read_clip(path, content), CLIP_STATS
        else:
            state, config, mean, std = read_encoder(path, content=content)
            self.encoder = ViT(**config | {"num_classes": 0, "drop_path": 0.0})
            load_weights(self.encoder, {k: v for k, v in state.items() if not k.startswith("head.")}, path)
        config, head = self.encoder.config, self.encoder.head
        self.size = grid * config["patch_size"]
        self.dim = head.out_features if isinstance(head, nn.Linear) else config["embed_dim"]
        own = config["img_size"] // config["patch_size"]
        if own != grid and self.encoder.pos_embed is None:
            data.stop(f"the teacher {path} has {own} x {own} patches and relative positions, but the student "
                      f"has {grid} x {grid}: use a teacher of that grid, or one with absolute positions")
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, imgs):
        """(B, 3, H, W) in [-1, 1] -> (B, N, T) float32; images are resized so that the grids agree."""
        pixels = data.resize((imgs + 1).clamp(0, 2) / 2, self.size)
        tokens = self.encoder.fc_norm(self.encoder.forward_features((pixels - self.mean) / self.std))
        return self.encoder.head(tokens[:, 1:]).float()


@torch.no_grad()
def monitor(args, model, teacher, source, view):
    """The vocabulary over all images of a set. -> usage, perplexity, cosine to the teacher; counts (K,)"""
    model.eval()
    counts = torch.zeros_like(model.quantizer.hits, dtype=torch.long)
    total = torch.zeros(1, device=args.device)
    for (imgs,), _ in data.Loader(args, source, [view], train=False):
        with data.autocast(args):
            z = model.vectors(imgs)
            _, ids = model.quantizer.nearest(z)
            rebuilt = model.rebuild(model.quantizer.codebook[ids])
            near = F.cosine_similarity(rebuilt, teacher(imgs), dim=-1).mean(1)              # (B,)
        counts += ids.flatten().bincount(minlength=model.vocab)
        total += near.sum()
    model.train()
    counts = data.all_sum(counts)
    return data.usage(counts) | {"cosine": data.all_sum(total).item() / len(source)}, counts.cpu()


@torch.no_grad()
def tokenizer_pictures(model, teacher, imgs, counts, path):
    """<step>.png: images, how near the rebuilt features are; words.png: patches of the commonest codes;
    usage.png: how often each code occurs."""
    model.eval()
    ids = torch.cat([model.quantizer.nearest(model.vectors(part))[1] for part in imgs.split(100)])  # (n, N)
    target, pixels = teacher(imgs[:8]), (imgs + 1) / 2                                      # (8, N, T), ...
    near, alike = (F.cosine_similarity(x, target, dim=-1).unflatten(1, (model.grid, model.grid)) for x in (
        model.rebuild(model.quantizer.codebook[ids[:8]]), F.normalize(target, dim=-1).mean((0, 1))))
    model.train()
    data.save_rows(path, {"image": pixels[:8], "rebuilt\nfrom codes": near, "one feature\nfor all": alike},
                   f"cosine to the teacher: rebuilt {near.mean():.3f}, for all {alike.mean():.3f}", (-1, 1))
    p, rows = model.encoder.config["patch_size"], {}
    for k in counts.argsort(descending=True)[:10].tolist():
        members = (ids.flatten() == k).nonzero()[:, 0]
        if len(members):
            picked = members[torch.linspace(0, len(members) - 1, min(12, len(members))).long()]
            rows[f"code {k},\n{counts[k] / counts.sum():.1%} of all"] = data.patches_around(
                pixels, p, picked.tolist())
    data.save_rows(path.with_name("words.png"), rows,
                   f"patches (the middle third) of the {len(rows)} commonest of {model.vocab} codes")
    data.save_usage(path.with_name("usage.png"), counts)


def train_tokenizer(args):
    """Stage 1: VQ-KD."""
    device = data.setup(args)
    train_set, val_set = data.load_sets(args)
    path = args.teacher or f"out/mae-{Path(args.data).name}/encoder.pt"
    if not Path(path).exists():
        data.stop(f"there is no teacher {path}: train one with python mae.py --data {args.data}, or name an "
                  f"encoder with --teacher FILE")
    teacher = data.rests_on(args, Teacher(path, args.grid).to(device))
    for source in (train_set, val_set):
        source.mean, source.std = (0.5,) * 3, (0.5,) * 3        # the tokenizer reads pixels in [-1, 1]
    whole = data.View(args.img_size)
    loader = data.Loader(args, train_set,
                         [data.View(args.img_size, scale=(args.crop_scale, 1.0), flip=0.5)])

    encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model])
    model = VQKD(encoder, args.num_codes, args.code_dim, args.decoder_depth, teacher.dim, args.commit,
                 args.decay, args.unit, args.codes == "gradient").to(device)
    if args.init:
        load_init(model, args, official_tokenizer)
    net = data.wrap(model, args)                                # compiled, in DDP; `model` itself is saved
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.99),
                                  fused="mps" not in args.device)
    scaler = data.make_scaler(args)
    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    start = data.load_checkpoint(args, **state)
    samples = data.some_images(args, val_set, 500)
    directions = F.normalize(torch.cat([teacher(part) for part in samples.split(100)]).flatten(0, 1), dim=1)
    one_for_all = 1 - directions.mean(0).norm().item()          # 1 - cosine to the mean direction
    features = data.compiled(teacher, args)
    log = data.open_log(args, model, loader, start, f"{one_for_all:.3f} for rec (one feature everywhere)",
                        rec=one_for_all, cosine=1 - one_for_all)

    def evaluate(step):
        result, counts = monitor(args, model, teacher, data.monitored(train_set, val_set)[1], whole)
        tokenizer_pictures(model, teacher, samples, counts, log.picture(step))
        words_knn = data.knn_monitor(args, model, train_set, val_set, ranked=False)["knn"]
        log.write(step, **result, knn_words=words_knn)
        if step and result["usage"] < 0.2:
            data.say(f"only {result['usage']:.0%} of the codes occur: try --restart 50, fewer --num_codes or "
                     f"a smaller --code_dim")

    if log.evaluates(start):
        evaluate(start)                                         # what an untrained network can do
    for step, parts in loader.steps(start, net):
        lr = set_lr(optimizer, cosine_lr(step / loader.epoch_steps, args, early=1 / loader.epoch_steps))
        code_sums = None                                        # and counts, over the whole batch
        for (imgs,), _ in parts:                                # the labels are never used
            if step == 0 and code_sums is None and not args.init:
                with torch.no_grad(), data.autocast(args):
                    model.quantizer.start(model.vectors(imgs).flatten(0, 1))
            with data.autocast(args):
                loss, rec, commit, part, z = net(imgs, features(imgs))
            scaler.scale(loss / args.accum_steps).backward()    # the gradients of the parts add up
            code_sums = [a + b for a, b in zip(code_sums, part)] if code_sums else part
            log.note(loss=loss, rec=rec, commit=commit, batch_perplexity=data.perplexity(part[1]))
        if args.clip_grad:
            scaler.unscale_(optimizer)                          # undo fp16's loss scaling before clipping
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.quantizer.update(*code_sums)                      # after the step: the codes follow
        if args.restart and not (step + 1) % args.restart and step < 0.8 * loader.all_steps:
            model.quantizer.restart(z)
        log.step(step, lr=lr)
        if log.saves(step + 1):
            log.save(step + 1, state, tokenizer=model)
        if log.evaluates(step + 1):
            evaluate(step + 1)
    log.finish()


def official_tokenizer(content):
    """A VQ-KD file of unilm/beit2 -> a state dict under our names; its teacher is left out."""
    state = renamed(official_state(content), {
        r"^quantize\.embedding\.weight$": "quantizer.codebook", r"^(quantize\.|teacher|scaling|loss)": None,
        r"fc_norm\.": "norm."})
    if "quantizer.codebook" in state:
        state["quantizer.hits"] = torch.zeros(len(state["quantizer.codebook"]))
    return state


def load_vqkd(path, content):
    """The frozen tokenizer of a tokenizer.pt of this file, or of an official one, with this content.

    Raises: exits with one sentence if the file is neither."""
    with data.reading(path, "a tokenizer of beit_v2.py"):
        if content.get("method") == "beit_v2" and "num_codes" in content["config"]:
            state, config = content["model"], dict(content["config"])
        else:
            state = official_tokenizer(content)
            if "quantizer.codebook" not in state:
                data.stop(f"{path} is no tokenizer: train one with python dvae.py, or with python beit_v2.py "
                          f"--stage tokenizer, and give its tokenizer.pt")
            num_codes, code_dim = state["quantizer.codebook"].shape
            depth = len({name.split(".")[2] for name in state if "decoder.blocks." in name})
            config = {"encoder": read_encoder(path, content=content)[1], "num_codes": num_codes,
                      "code_dim": code_dim, "decoder_depth": depth,
                      "teacher_dim": len(state["decode_task_layer.2.bias"])}
        model = VQKD(data.build(path, ViT, config.pop("encoder")), **config)
    return data.load_state(model, state, path).requires_grad_(False).eval()


# ---- stage 2: pre-training ----

class BEiTv2(nn.Module):
    """Encoder (a ViT), mask token, the class token's branch, head and both losses."""

    def __init__(self, encoder, vocab, num_masked=75, early_layer=9, branch_depth=2, shared_head=True):
        super().__init__()
        config, D = encoder.config, encoder.config["embed_dim"]
        self.encoder, self.num_masked, self.early_layer = encoder, num_masked, early_layer
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.lm_head = nn.Linear(D, vocab)
        num_rates = max(config["depth"], early_layer + branch_depth)    # as if it stood on early_layer
        self.cls_pt_layers = nn.ModuleList(
            Block(D, config["num_heads"], drop_path=config["drop_path"] * (early_layer + i) / (num_rates - 1),
                  layer_scale=config["layer_scale"]) for i in range(branch_depth))
        self.cls_pt_norm = None if shared_head or not branch_depth else nn.LayerNorm(D, eps=1e-6)
        self.cls_pt_lm_head = None if shared_head or not branch_depth else nn.Linear(D, vocab)
        init_beit(self)
        rescale(self.cls_pt_layers, early_layer + 1)

    def hidden_states(self, imgs, mask):
        """(B, 3, H, W), mask (B, N) bool -> patch tokens of encoder and branch (or None), (B, N, D) each"""
        encoder = self.encoder
        x = encoder.patch_embed(imgs)                                                       # (B, N, D)
        x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        outputs = encoder.forward_layers(x)
        final = encoder.norm(outputs[-1])[:, 1:]
        if not len(self.cls_pt_layers):
            return final, None
        x = torch.cat([outputs[-1][:, :1], outputs[self.early_layer - 1][:, 1:]], 1)        # (B, 1 + N, D)
        bias = encoder.rel_pos_bias()
        for block in self.cls_pt_layers:
            x = block(x, bias)
        return final, (self.cls_pt_norm or encoder.norm)(x)[:, 1:]

    def forward(self, imgs, codes, mask):
        """codes (B, N) long, mask (B, N) bool with num_masked hidden -> loss, {name: what to log}"""
        ids = mask.int().argsort(dim=1, descending=True, stable=True)[:, :self.num_masked]  # (B, M)
        target, loss, logs = take(codes, ids), 0, {}
        for name, h, head in zip(("", "branch_"), self.hidden_states(imgs, mask),
                                 (self.lm_head, self.cls_pt_lm_head or self.lm_head)):
            if h is None:
                continue
            logits = head(take(h, ids)).float()                                             # (B, M, K)
            logs[f"{name}ce"] = F.cross_entropy(logits.flatten(0, 1), target.flatten())
            logs[f"{name}accuracy"] = (logits.argmax(-1) == target).float().mean()
            loss = loss + logs[f"{name}ce"]
        return loss, logs

    def features(self, imgs):
        """(B, 3, H, W) -> (B, D): the class token; without a branch to train it, the mean of the patches"""
        x = self.encoder.forward_features(imgs)
        return x[:, 0] if len(self.cls_pt_layers) else x[:, 1:].mean(1)


@torch.no_grad()
def pictures(model, tokenizer, views, mask, source, path):
    """Rows: image, what is visible, how near the predicted code's vector is to the true one's."""
    imgs, g = views[0], tokenizer.grid
    model.eval()
    pred = model.lm_head(model.hidden_states(imgs, mask)[0]).argmax(-1)                     # (B, N)
    model.train()
    ids, image = tokenizer.tokens(views[1]), data.to_pixels(imgs, source)
    codes = getattr(tokenizer, "quantizer", None)               # a dVAE's codes are right or wrong
    near = (F.cosine_similarity(codes.codebook[pred], codes.codebook[ids], dim=-1) if codes
            else (pred == ids).float())
    near = torch.where(mask, near, torch.nan).unflatten(1, (g, g))      # white where it is visible
    data.save_rows(path, {"image": image, "visible": data.hide(image, mask),
                          "predicted and\ntrue code": near},
                   f"{(pred == ids)[mask].float().mean():.1%} of the hidden codes are predicted right; "
                   f"last row: {'cosine of the vectors of both codes' if codes else 'where it is right'}",
                   scale=(-1 if codes else 0, 1))


def pretrain(args):
    """Stage 2: masked prediction of the codes."""
    device = data.setup(args)
    train_set, val_set = data.load_sets(args)
    tokenizer = prepare_tokenizer(args, "beit_v2-tokenizer")
    jitter = (args.color_jitter,) * 3 + (0.0,)
    loader = data.Loader(args, train_set, [data.View(args.img_size, scale=(args.crop_scale, 1.0), flip=0.5,
                                                     jitter=jitter, tokenizer_size=tokenizer.img_size)])

    encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model], pos="none", rel_pos="shared",
                  layer_scale=args.layer_scale, drop_path=args.drop_path)
    model = BEiTv2(encoder, tokenizer.vocab, args.num_masked, args.early_layer, args.branch_depth,
                   args.shared_head).to(device)
    if args.init:
        load_init(model, args)
    net = data.wrap(model, args)                                # compiled, in DDP; `model` itself is saved
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.lr,
                                  betas=(0.9, args.beta2), fused="mps" not in args.device)
    scaler = data.make_scaler(args)
    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    start = data.load_checkpoint(args, **state)
    whole = data.View(args.img_size, tokenizer_size=tokenizer.img_size)
    trivial, levels = data.trivial_loss(args, val_set, tokenizer, whole)
    tokenize = data.compiled(tokenizer.tokens, args)
    levels |= {"ce": levels["loss"], "loss": levels["loss"] * (1 + (args.branch_depth > 0))}
    log = data.open_log(args, model, loader, start, f"for each head {trivial}", **levels)

    def evaluate(step):
        torch.manual_seed(0)                                    # the same masks every time
        views = data.some_images(args, val_set, 8, whole)
        mask = data.draw_masks(args, len(views[0]), "fill")
        pictures(model, tokenizer, views, mask, val_set, log.picture(step))
        log.write(step, **data.knn_monitor(args, model, train_set, val_set))

    if log.evaluates(start):
        evaluate(start)                                         # what an untrained network can do
    for step, parts in loader.steps(start, net):
        lr = set_lr(optimizer, cosine_lr(step / loader.epoch_steps, args, early=1 / loader.epoch_steps))
        for (imgs, pixels), _ in parts:                         # the labels are never used
            mask = data.draw_masks(args, len(imgs), "fill")
            with data.autocast(args):
                with torch.no_grad():                           # the tokenizer is frozen
                    codes = tokenize(pixels)
                loss, logs = net(imgs, codes, mask)
            scaler.scale(loss / args.accum_steps).backward()    # the gradients of the parts add up
            log.note(loss=loss, **logs)
        if args.clip_grad:
            scaler.unscale_(optimizer)                          # undo fp16's loss scaling before clipping
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        log.step(step, lr=lr)
        if log.saves(step + 1):
            log.save(step + 1, state, encoder=encoder)
        if log.evaluates(step + 1):
            evaluate(step + 1)
    log.finish()


# ---- the script ----

def main():
    words, runs = sys.argv[1:], []
    early = data.early_flags(words, stage=("both", "tokenizer", "pretrain"))
    stage = early.stage or data.resumed_flags(early, early.output_dir).get("stage", "both")
    if stage == "both" and early.init:
        data.stop("--init is that of one stage: give --stage tokenizer or --stage pretrain, too")
    if stage == "both" and early.tokenizer:
        stage = "pretrain"                                      # it is trained already
    for this, tables, folder, work in (
            ("tokenizer", (PRETRAIN, TOKENIZER), "out/beit_v2-tokenizer", train_tokenizer),
            ("pretrain", (TOKENIZER, PRETRAIN), "out/beit_v2", pretrain)):
        if stage not in ("both", this):
            continue
        typed = [*words, "--stage", this]
        if stage == "both" and early.output_dir:
            first = f"{early.output_dir}-tokenizer"
            typed += ["--output_dir", first if this == "tokenizer" else early.output_dir,
                      "--tokenizer", f"{first}/tokenizer.pt"]
        if stage != "both":                                     # else the flags of both are typed together
            tables = tables[1:]
        told = data.resumed_flags(early, runs[0][1].output_dir, "then") if runs else {}
        args = data.parse_args(__doc__, SHARED, *tables, words=typed, folder=folder, told=told)
        if this == "pretrain":
            data.check_masked(args)
            if args.early_layer > (depth := SIZES[args.model]["depth"]):
                data.stop(f"--early_layer {args.early_layer} must lie between 1 and {depth}")
        if runs:
            runs[0][1].then = args.flags                        # it may be stopped before the second begins
        runs.append((work, args))
    for work, args in runs:                                     # not before the flags of both are right
        work(args)


if __name__ == "__main__":
    data.run(main)
