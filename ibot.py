"""iBOT: Image BERT Pre-Training with Online Tokenizer (Zhou et al., 2021), arXiv:2111.07832.

Measured: ViT-micro/4, CIFAR-10, two CPU cores, 28 minutes: k-NN 56%, linear 54%, fine-tuned 64%.

A student learns to say what its own running average, the teacher, says: about the class token of another crop
of the image (as in DINO), and about patches that are hidden from the student but not from the teacher. The
teacher's answers, K-way distributions, are the tokens of a tokenizer that is trained on the way.

    L = lambda1 L_cls + lambda2 L_patch + koleo L_koleo
    L_cls   = mean over crops u != v of  -sum_k q_uk log p_vk      u: global crops (teacher), v: all (student)
    L_patch = mean over global crops of  1/|M| sum_{i in M} -sum_k q'_ik log p'_ik      0 for a crop without M
    L_koleo = mean over global crops and images of  -log(distance of the class token to its nearest neighbour)
    q = softmax((teacher - c) / tau), p = softmax(student / 0.1)   c <- 0.9 c + 0.1 mean(teacher), per step
    teacher <- m teacher + (1 - m) student after each step                  m: --momentum, rising to 1

|M| is the number of hidden patches of each image, as in the paper and its code, not that of the batch.

Shapes: B images, G = 2 global and L local crops of each, N patches of a global crop (no cls), M hidden
patches of the whole batch, D width, E of the bottleneck, K and K' prototypes for class token and patches.

    python ibot.py --data shapes                            # CPU, offline, 6 minutes: k-NN 15 -> 47%
    python ibot.py --model micro --img_size 24              # CIFAR-10, CPU, half an hour
    python ibot.py                                          # CIFAR-10, ViT-Tiny/4, one GPU: not run yet
    torchrun --nproc_per_node=8 ibot.py --data imagenet     # ViT-B/16, 400 epochs: not run yet

encoder.pt is the teacher's, student.pt the student's: vit.py judges both.

Less work than the official code, the same numbers: the student's head reads class tokens and hidden patches
only; the prototypes are linear, so the teacher's patch centre is their value at the mean of the unit vectors.
The hidden patches of a batch are padded to a fixed count, six standard deviations above their mean.

Deviations: the columns for small images have larger crops, fewer prototypes, smaller batches, a constant
weight decay and a cooler teacher than ImageNet's; the two shortest add KoLeo and give patches prototypes of
their own (trials: .github/results/README.md). Crops of small images are not blurred. The blocks' linear
layers start with the deviation 0.02 (768 / D)^(1/2): the official 0.02, right for ViT-B, leaves narrower ViTs
with nearly silent blocks.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import data
from vit import (SIZES, ViT, attention_pictures, cosine_lr, half_cosine, load_init, official_state,
                 param_groups, set_lr, update_ema)

RECIPE = {  # one value, or four: shapes, laptop, small, imagenet (the published commands); meaning; range
    "lambda1":            (1.0, "weight of the class token's loss", "[0, inf)"),
    "lambda2":            (1.0, "weight of the patches' loss", "[0, inf)"),
    "koleo":              ((0.5, 0.5, 0.0, 0.0), "weight of KoLeo, which spreads class tokens", "[0, inf)"),
    "momentum":           ((0.98, 0.98, 0.99, 0.996), "the teacher's at the start; rises to 1", "[0, 1]"),
    "teacher_temp_start": ((0.02, 0.02, 0.04, 0.04), "the teacher's in epoch 0, both", "(0, 10]"),
    "teacher_temp":       ((0.02, 0.02, 0.04, 0.07), "the class token's; > 0.07 is unstable", "(0, 10]"),
    "patch_temp":         ((0.02, 0.02, 0.04, 0.07), "the teacher's temperature for patches", "(0, 10]"),
    "warmup_temp_epochs": ((1, 1, 30, {"base": 50, "small": 30}), "epochs in which these rise", "[0, 1e9]"),
    "out_dim":            ((256, 256, 2048, 8192), "prototypes K for the class token", "[2, 1e9]"),
    "patch_out_dim":      ((256, 256, 2048, 8192), "prototypes K' for patches", "[2, 1e9]"),
    "shared_head":        ((False, False, True, True), "one set of prototypes for both: K = K'"),
    "head_hidden":        ((256, 256, 1024, 2048), "hidden width of the projection head", "[1, 1e9]"),
    "head_bottleneck":    ((64, 64, 256, 256), "width of the head's unit vectors", "[1, 1e9]"),
    "norm_last_layer":    ((True, True, True, {"base": True, "small": False}), "prototypes keep length 1"),
    "freeze_last_layer":  ((0, 0, 1, {"base": 3, "small": 1}), "first epochs: fixed prototypes", "[0, 1e9]"),
    "pred_ratio":         ([0.0, 0.3], "shares of patches to hide; each crop draws one of them", "[0, 1)"),
    "pred_ratio_var":     ([0.0, 0.2], "half the width of the range around each --pred_ratio", "[0, 1)"),
    "pred_shape":         ("block", "hide blocks, or single patches", ("block", "rand")),
    "pred_start_epoch":   (0, "first epoch in which patches are hidden", "[0, 1e9]"),
    "global_scale":       (([0.6, 1.0], [0.5, 1.0], [0.5, 1.0], {"base": [0.32, 1.0], "small": [0.25, 1.0]}),
                           "least and largest share of the image in a global crop", "(0, 1]"),
    "local_scale":        (([0.3, 0.6], [0.2, 0.5], [0.2, 0.5],
                            {"base": [0.05, 0.32], "small": [0.05, 0.25]}), "in a local crop", "(0, 1]"),
    "local_crops":        ((2, 4, 6, 10), "local crops of each image", "[0, 100]"),
    "local_size":         ((0, 0, 0, 96), "pixels of the local crops; 0: half of --img_size", "[0, 4096]"),
    "aug":                ("color", "of the crops; ablations: crops alone, none", ("color", "crop", "none")),
    "gray":               ((1.0, 0.2, 0.2, 0.2), "share of crops without colour", "[0, 1]"),
    "blur":               ((False, False, False, True), "blur the crops (sigma 0.1 to 2 pixels)"),
    "drop_path":          ((0.0, 0.0, 0.1, 0.1), "drop path rate of the student's last block", "[0, 1)"),
    "weight_decay_end":   ((0.04, 0.04, 0.04, 0.4), "at the end; it starts at --weight_decay", "[0, inf)"),
    "epochs":             (5, 7, 200, {"base": 400, "small": 800}),  # passes over the images
    "batch_size":         (32, 32, 128, 1024),                  # of all GPUs together
    "blr":                (6e-3, 6e-3, 5e-4, {"base": 7.5e-4, "small": 5e-4}),  # lr = blr * batch_size / 256
    "min_lr":             (1e-6, 1e-6, 1e-6, {"base": 2e-6, "small": 1e-6}),  # at the end
    "warmup_epochs":      (1.0, 0.5, 10.0, 10.0),               # in which lr rises from 0
    "weight_decay":       0.04,                                 # at the start; not on biases and norms
    "clip_grad":          (3.0, 3.0, 3.0, {"base": 0.3, "small": 3.0}),  # of each tensor by itself
}


# ---- masks ----

def draw_masks(args, n):
    """-> mask (n, N) bool, True = hidden: each crop draws one of --pred_ratio, then a share around it"""
    which = torch.randint(len(args.pred_ratio), (n,))
    ratio, var = torch.tensor([args.pred_ratio, args.pred_ratio_var])[:, which]
    budget = (ratio + var * (2 * torch.rand(n) - 1)) * args.grid ** 2   # not rounded: blocks stop below it
    if args.pred_shape == "block":
        return data.blockwise_mask(n, args.grid, budget, (args.grid // 3) ** 2, device=args.device)
    order = torch.rand(n, args.grid ** 2, device=args.device).argsort(1).argsort(1)
    return order < data.to_device(budget.floor()[:, None], args.device)


def most_hidden(args, n):
    """A number of hidden patches that n crops together do not exceed: mean + six standard deviations."""
    ranges = list(zip(args.pred_ratio, args.pred_ratio_var))
    mean = sum(r for r, _ in ranges) / len(ranges)
    var = sum(r ** 2 + v ** 2 / 3 for r, v in ranges) / len(ranges) - mean ** 2      # of U(r - v, r + v)
    most = max(r + v for r, v in ranges)
    return max(1, math.ceil(args.grid ** 2 * min(n * most, n * mean + 6 * math.sqrt(n * var))))


# ---- the networks ----

class Prototypes(nn.Module):
    """Linear layer whose rows are g v / |v| (weight norm, under its official names), without bias."""

    def __init__(self, dim, out_dim, fixed):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not fixed)
        self.weight_v = nn.Parameter(nn.Linear(dim, out_dim, bias=False).weight.detach())

    def forward(self, z):
        return F.linear(z, self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True))


class Head(nn.Module):
    """Projection head: an MLP to unit vectors, then prototypes, of the class token and of patches."""

    def __init__(self, dim, hidden, bottleneck, out_dim, patch_out_dim=0, shared=True, fixed=True):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck, out_dim, fixed)
        self.last_layer2 = self.last_layer if shared else Prototypes(bottleneck, patch_out_dim, fixed)

    def unit(self, x):
        """(..., D) -> unit vectors z (..., E)"""
        return F.normalize(self.mlp(x), dim=-1)

    def forward(self, x):
        """Tokens (B, 1 + N, D) -> logits of the class token (B, K), of the patches (B, N, K')"""
        z = self.unit(x)
        return self.last_layer(z[:, 0]), self.last_layer2(z[:, 1:])


class Network(nn.Module):
    """Encoder (a ViT) and head; student and teacher are two of them."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head
        encoder.config["pos_offset"] = 0.1                      # as DINO interpolates positions for crops

    def tokens(self, imgs, mask=None, masked_embed=None):
        """(n, 3, H, W), mask (n, N) bool or None -> tokens after the last norm, (n, 1 + N, D)"""
        x = self.encoder.patch_embed(imgs)                                                      # (n, N, D)
        if mask is not None:  # before the positions are added
            x = torch.where(mask[:, :, None], masked_embed.to(x.dtype), x)
        return self.encoder.norm(self.encoder.forward_layers(x)[-1])


# ---- the losses ----

def cls_loss(q, student, temp=0.1):
    """Cross-entropy between all pairs of different crops: q (G, B, K), student logits (G + L, B, K)."""
    ce = -torch.einsum("ubk,vbk->uv", q, (student / temp).log_softmax(-1)) / q.shape[1]     # (G, G + L)
    return (ce.sum() - ce.diagonal().sum()) / (ce.numel() - len(ce))


def patch_loss(q, student, weight, temp=0.1):
    """Cross-entropy of hidden patches: q, student logits (M, K'); weight (M,): 1 / (|M_u| G B), 0 padding."""
    ce = -(q * (student / temp).log_softmax(-1)).sum(-1)                                    # (M,)
    return (ce * weight).sum()


def koleo_loss(x):
    """KoLeo (DINOv2, arXiv:2304.07193, section 4): -mean log distance of the unit vectors x (B, D) to their
    nearest neighbours in their part of the batch, which spreads them evenly over the sphere."""
    x = F.normalize(x.float(), dim=1)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
    return -F.pairwise_distance(x, x[nearest]).log().mean()


class IBOT(nn.Module):
    """Student, teacher, centres and loss. No gradient reaches the teacher."""

    def __init__(self, student, teacher, max_masked, lambda1=1.0, lambda2=1.0, koleo=0.0):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.teacher.load_state_dict(student.state_dict())
        self.max_masked, self.lambda1, self.lambda2, self.koleo = max_masked, lambda1, lambda2, koleo
        self.masked_embed = nn.Parameter(torch.zeros(1, student.encoder.config["embed_dim"]))
        self.register_buffer("centre", torch.zeros(1, student.head.last_layer.weight_g.shape[0]))
        self.register_buffer("patch_centre", torch.zeros(1, student.head.last_layer2.weight_g.shape[0]))
        self.register_buffer("hits", torch.zeros(self.centre.shape[1]), persistent=False)   # of prototypes

    def forward(self, crops, local_crops, mask, temp, patch_temp):
        """Lists of G global and L local crops, (B, 3, s, s) each; mask (G B, N), crop after crop.

        -> loss, {name: what to log}, means over the batch for `update`: of the teacher's logits (1, K),
        (1, K'), and how often it thinks of each prototype first (K,)"""
        B, G, imgs = len(crops[0]), len(crops), torch.cat(crops)
        ids = mask.flatten().int().argsort(dim=0, descending=True, stable=True)[:self.max_masked]   # (M,)
        count = mask.sum(1, keepdim=True).clamp(min=1)
        weight = (mask / (count * len(mask))).flatten()[ids]                                # (M,)

        with torch.no_grad():
            x = self.teacher.tokens(imgs)                                                   # (G B, 1 + N, D)
            with torch.autocast(x.device.type, enabled=False):
                z = self.teacher.head.unit(x.float())                                       # (G B, 1 + N, E)
                t_cls = self.teacher.head.last_layer(z[:, 0])                               # (G B, K)
                t_patch = self.teacher.head.last_layer2(z[:, 1:].flatten(0, 1)[ids])        # (M, K')
                means = (t_cls.mean(0, keepdim=True),
                         self.teacher.head.last_layer2(z[:, 1:].mean((0, 1)))[None])
                q = ((t_cls - self.centre) / temp).softmax(-1).unflatten(0, (G, B))         # (G, B, K)
                q_patch = ((t_patch - self.patch_centre) / patch_temp).softmax(-1)          # (M, K')

        x = self.student.tokens(imgs, mask, self.masked_embed)                              # (G B, 1 + N, D)
        rows = [x[:, 0], x[:, 1:].flatten(0, 1)[ids]]
        if local_crops:
            rows.append(self.student.tokens(torch.cat(local_crops))[:, 0])                  # (L B, D)
        with torch.autocast(x.device.type, enabled=False):
            spread = sum(koleo_loss(cls) for cls in x[:, 0].split(B)) / G if self.koleo else 0.0
            z = self.student.head.unit(torch.cat(rows).float())  # all rows at once
            z_cls, z_patch, *z_local = z.split([len(row) for row in rows])
            s_cls = self.student.head.last_layer(torch.cat([z_cls, *z_local])).unflatten(0, (-1, B))
            on_cls = cls_loss(q, s_cls)                         # s_cls (G + L, B, K)
            on_patch = patch_loss(q_patch, self.student.head.last_layer2(z_patch), weight)
            with torch.no_grad():
                certain = torch.special.entr(q).sum(-1).mean()
                logs = {"cls": on_cls, "patch": on_patch, "entropy": certain, "kl": on_cls - certain,
                        "entropy_of_mean": torch.special.entr(q.mean((0, 1))).sum()}
                means += (F.one_hot(q.argmax(-1), q.shape[-1]).float().mean((0, 1)),)
        return self.lambda1 * on_cls + self.lambda2 * on_patch + self.koleo * spread, logs, means

    @torch.no_grad()
    def update(self, means, momentum):
        """After a step: the centres move to the teacher's mean over all ranks, the teacher to the student."""
        for centre, mean in zip((self.centre, self.patch_centre), means):
            centre.lerp_(data.all_sum(mean) / data.world_size(), 0.1)
        self.hits += data.all_sum(means[2])
        update_ema(self.teacher, self.student, momentum)

    def features(self, imgs):
        """(B, 3, H, W) -> (B, D): the teacher's class token"""
        return self.teacher.encoder.features(imgs)


# ---- schedules ----

def temperature(epoch, start, end, warmup, first=0):
    """The teacher's temperature in an epoch: start, from epoch `first` on linearly to end within warmup."""
    return start + (end - start) * min(1.0, max(0, epoch - first) / max(1, warmup - 1))


def clip_each(parameters, max_norm):
    """Scale each gradient of norm above max_norm down to it, every tensor by itself, as DINO does."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((max_norm / (norms + 1e-6)).clamp(max=1.0)))


def collapse(logs, args):
    """In words, what is wrong with the teacher's distributions, or None."""
    most = math.log(args.out_dim)
    if logs["entropy"] > 0.99 * most:
        return "the teacher says the same of everything (entropy ln K): try a lower --teacher_temp"
    if logs["entropy_of_mean"] < 0.05 * most:
        return "all images go to one prototype: try a higher --teacher_temp or a smaller --lr"


def official_names(content):
    """A whole checkpoint of bytedance/ibot: student, teacher, centres -> a state dict under our names."""
    ours = {"student.encoder.masked_embed": "masked_embed", "ibot_loss.center": "centre",
            "ibot_loss.center2": "patch_centre"}
    state = {f"{part}.{name}".replace(".backbone.", ".encoder."): value
             for part in ("student", "teacher", "ibot_loss")
             for name, value in official_state(content.get(part, {})).items()}
    return {ours.get(name, name): value[0] if name.endswith("center2") else value
            for name, value in state.items()}


@torch.no_grad()
def pictures(model, untrained, imgs, source, path):
    """<step>.png: where the teacher's class token looks, per head; vocabulary.png: patches that share a
    prototype, for the commonest prototypes, each with its surroundings."""
    model.eval()
    encoder = model.teacher.encoder
    attention_pictures(encoder, untrained, imgs[:8], source, path)
    logits = torch.cat([model.teacher.head(model.teacher.tokens(part))[1] for part in imgs.split(100)])
    model.train()
    pixels, p = data.to_pixels(imgs, source), encoder.config["patch_size"]
    sure, prototype = (t.flatten().cpu() for t in logits.softmax(-1).max(-1))               # (n N,) each
    rows, of_image = {}, torch.arange(len(prototype)) // logits.shape[1]
    found, counts = prototype.unique(return_counts=True)
    for k in found[counts.argsort(descending=True)][:10].tolist():
        members, best = (prototype == k).nonzero()[:, 0], {}    # image -> its surest patch
        for i in members[sure[members].argsort(descending=True)].tolist():
            best.setdefault(of_image[i].item(), i)
        rows[f"prototype {k},\n{len(members)} patches"] = data.patches_around(
            pixels, p, list(best.values())[:12])
    data.save_rows(path.with_name("vocabulary.png"), rows,
                   f"patches (the middle third) of the {len(rows)} commonest of {logits.shape[2]} prototypes")


def check_flags(args):
    """One sentence for flags that do not go together. Sets a --local_size of 0."""
    ranges = list(zip(args.pred_ratio, args.pred_ratio_var))
    if len(args.pred_ratio) != len(args.pred_ratio_var) or not all(v <= r and r + v < 1 for r, v in ranges):
        data.stop(f"--pred_ratio {args.pred_ratio} and --pred_ratio_var {args.pred_ratio_var} must be as "
                  f"many numbers, like 0 0.3 and 0 0.2, each range within 0 to 1")
    for name in ("global_scale", "local_scale"):
        if len(scale := getattr(args, name)) != 2 or scale[0] > scale[1]:
            data.stop(f"--{name} {scale} must be two shares of the image, the smaller one first")
    unused = {"crop": {"gray", "blur"}, "none": {"gray", "blur", "global_scale", "local_scale"}}
    for name in sorted(args.typed & unused.get(args.aug, set())):
        data.say(f"--{name} is not used: --aug {args.aug}")
    args.local_size = args.local_size or args.img_size // 2
    if args.local_crops and args.local_size % args.patch_size:
        data.stop(f"--local_size {args.local_size} is not divisible by --patch_size {args.patch_size}")
    if args.shared_head and args.patch_out_dim != args.out_dim:
        data.stop(f"--patch_out_dim {args.patch_out_dim} differs from --out_dim {args.out_dim}: a shared "
                  f"head has one number of prototypes; give both, or add --no-shared_head")


def main():
    args = data.parse_args(__doc__, RECIPE)
    check_flags(args)
    device = data.setup(args)
    train_set, val_set = data.load_sets(args)
    color = {"none": {}, "crop": dict(flip=0.5), "color": dict(
        flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, gray=args.gray)}[args.aug]
    wide, near = (None if args.aug == "none" else tuple(scale)
                  for scale in (args.global_scale, args.local_scale))
    on, blur = float(args.aug == "color"), float(args.aug == "color" and args.blur)     # as in DINO
    views = [data.View(args.img_size, 2, scale=wide, blur=(blur, 0.1 * blur), solarize=(0.0, 0.2 * on),
                       **color),
             data.View(args.local_size, args.local_crops, scale=near, blur=0.5 * blur, **color)]
    loader = data.Loader(args, train_set, views)
    if args.koleo and args.batch_size == data.world_size() * args.accum_steps:
        data.stop(f"--koleo {args.koleo} spreads images: --batch_size {args.batch_size} leaves one a part")

    def network(drop_path):
        encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model], drop_path=drop_path)
        width = encoder.config["embed_dim"]
        for p in encoder.blocks.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 * (768 / width) ** 0.5)
        return Network(encoder, Head(width, args.head_hidden, args.head_bottleneck, args.out_dim,
                                     args.patch_out_dim, args.shared_head, args.norm_last_layer))
    crops = 2 * args.batch_size // data.world_size() // args.accum_steps
    model = IBOT(network(args.drop_path), network(0.0), most_hidden(args, crops), args.lambda1,
                 args.lambda2, args.koleo).to(device)
    if args.init:
        load_init(model, args, official_names, pos_offset=0.1)
    net = data.wrap(model, args)                                # compiled, in DDP; `model` itself is saved
    optimizer = torch.optim.AdamW(param_groups(model, 1.0, no_decay=()), lr=args.lr,
                                  betas=(0.9, 0.999), fused="mps" not in args.device)
    decays = [group["weight_decay"] for group in optimizer.param_groups]    # 1, or 0: biases and norms
    scaler = data.make_scaler(args)
    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    start = data.load_checkpoint(args, **state)
    share = sum(ratio > 0 for ratio in args.pred_ratio) / len(args.pred_ratio)  # of crops with hidden patches
    cls, patch = math.log(args.out_dim), share * math.log(args.patch_out_dim)
    log = data.open_log(args, model, loader, start, f"cls ln {args.out_dim} = {cls:.3f}, patch {share:g} ln "
                        f"{args.patch_out_dim} = {patch:.3f} (a uniform teacher)", cls=cls, patch=patch)

    def evaluate(step):
        torch.manual_seed(args.seed)                            # the weights that it started from
        untrained = network(0.0).encoder.to(device).eval()
        pictures(model, untrained, data.some_images(args, val_set, 500), val_set, log.picture(step))
        teacher = data.knn_monitor(args, model, train_set, val_set)
        student = data.knn_monitor(args, model.student.encoder, train_set, val_set, ranked=False)
        used = (model.hits > 0).float().mean().item()           # of the prototypes, since the last evaluation
        log.write(step, **teacher, knn_student=student["knn"], used=used)
        model.hits.zero_()
        if log.means and (words := collapse(log.means, args)):
            data.say(words)

    if log.evaluates(start):
        evaluate(start)                                         # what an untrained network can do
    for step, parts in loader.steps(start, net):
        epoch, done = step // loader.epoch_steps, step / loader.all_steps
        lr = set_lr(optimizer, cosine_lr(step / loader.epoch_steps, args, early=1 / loader.epoch_steps))
        for group, decay in zip(optimizer.param_groups, decays):
            group["weight_decay"] = decay * half_cosine(done, args.weight_decay, args.weight_decay_end)
        rise, first = min(args.warmup_temp_epochs, args.epochs), args.pred_start_epoch
        temp = temperature(epoch, args.teacher_temp_start, args.teacher_temp, rise)
        patch_temp = temperature(epoch, args.teacher_temp_start, args.patch_temp, rise, first)
        temps = [torch.full((), t, device=device) for t in (temp, patch_temp)]  # numbers would be compiled in
        means = [0, 0, 0]                                       # the teacher's logits over the whole batch
        for crops, _ in parts:                                  # the labels are never used
            mask = draw_masks(args, 2 * len(crops[0])) & (epoch >= args.pred_start_epoch)
            with data.autocast(args):
                loss, logs, part = net(crops[:2], crops[2:], mask, *temps)
            scaler.scale(loss / args.accum_steps).backward()    # the gradients of the parts add up
            means = [mean + more / args.accum_steps for mean, more in zip(means, part)]
            log.note(loss=loss, **logs)
        if args.clip_grad:
            scaler.unscale_(optimizer)                          # undo fp16's loss scaling before clipping
            clip_each([*model.student.parameters(), model.masked_embed], args.clip_grad)
        if epoch < args.freeze_last_layer:
            for name, p in model.student.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update(means, half_cosine(done, args.momentum, 1.0))   # it follows the student of this step
        log.step(step, lr=lr)
        if log.saves(step + 1):
            log.save(step + 1, state, encoder=model.teacher.encoder, student=model.student.encoder)
        if log.evaluates(step + 1):
            evaluate(step + 1)
    log.finish()


if __name__ == "__main__":
    data.run(main)
