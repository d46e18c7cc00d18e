"""iBOT: Image BERT Pre-Training with Online Tokenizer (Zhou et al., 2021), arXiv:2111.07832.

A student learns to say what its own running average, the teacher, says: about the class token of another crop
of the image (as in DINO), and about patches that are hidden from the student but not from the teacher. The
teacher's answers, K-way distributions, are the tokens of a tokenizer that is trained on the way.

    L = lambda1 L_cls + lambda2 L_patch
    L_cls   = mean over crops u != v of  -sum_k q_uk log p_vk      u: global crops (teacher), v: all (student)
    L_patch = mean over global crops of  1/|M| sum_{i in M} -sum_k q'_ik log p'_ik      0 for a crop without M
    q = softmax((teacher - c) / tau), p = softmax(student / 0.1)   c <- 0.9 c + 0.1 mean(teacher), per step

Shapes: B images, G = 2 global and L local crops of each, N patches of a global crop (no cls), M hidden
patches of the whole batch, D width, E of the bottleneck, K and K' prototypes for class token and patches.

Less work than the official code, the same numbers: the student's head reads class tokens and hidden patches
only; the prototypes are linear, so the teacher's patch centre is their value at the mean of the unit vectors.
The hidden patches of a batch are padded to a fixed count, six standard deviations above their mean.

Deviations: crops of small images are not blurred; the blocks' linear layers start with the deviation
0.02 (768 / D)^(1/2), the official 0.02 for ViT-B, for narrower ViTs would begin with nearly silent blocks.

    python ibot.py --data shapes                            # CPU, offline
    python ibot.py --model micro                            # CIFAR-10, CPU: k-NN 32 -> 37%, see README
    python ibot.py                                          # CIFAR-10, ViT-Tiny/4, one GPU: not run yet
    torchrun --nproc_per_node=8 ibot.py --data imagenet     # ViT-B/16, 400 epochs: not run yet
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from vit import (SIZES, ViT, cls_attention, cosine_lr, load_init, official_state, param_groups, set_lr,
                 update_ema)

# columns:              shapes, cifar10, cifar100, tiny-imagenet, imagenet (the published commands);
# {"tiny": a, "micro": b} is b for --model micro, the laptop's, and a for every other model
RECIPES = {
    "model":            ("micro", "tiny", "tiny", "tiny", "base"),
    "img_size":         (32, {"tiny": 32, "micro": 24}, 32, 64, 224),
    "patch_size":       (4, 4, 4, 8, 16),
    "epochs":           (12, {"tiny": 200, "micro": 5}, 200, 200, {"base": 400, "small": 800}),
    "batch_size":       (64, {"tiny": 512, "micro": 64}, 512, 512, 1024),
    "blr":              (1e-3, {"tiny": 5e-4, "micro": 1e-3}, 5e-4, 5e-4, {"base": 7.5e-4, "small": 5e-4}),
    "min_lr":           (1e-6, 1e-6, 1e-6, 1e-6, {"base": 2e-6, "small": 1e-6}),
    "warmup_epochs":    (1.0, {"tiny": 10.0, "micro": 0.5}, 10.0, 10.0, 10.0),
    "weight_decay":     0.04,
    "weight_decay_end": 0.4,
    "clip_grad":        (3.0, 3.0, 3.0, 3.0, {"base": 0.3, "small": 3.0}),
    "eval_every":       (4, {"tiny": 20, "micro": 5}, 20, 20, 20),
    "momentum":         (0.98, {"tiny": 0.996, "micro": 0.99}, 0.996, 0.996, 0.996),
    "out_dim":          (256, {"tiny": 4096, "micro": 256}, 4096, 4096, 8192),
    "patch_out_dim":    (256, {"tiny": 4096, "micro": 256}, 4096, 4096, 8192),
    "shared_head":      True,
    "head_hidden":      (256, {"tiny": 1024, "micro": 256}, 1024, 1024, 2048),
    "head_bottleneck":  (64, {"tiny": 256, "micro": 64}, 256, 256, 256),
    "norm_last_layer":  (True, True, True, True, {"base": True, "small": False}),
    "freeze_last_layer": (0, {"tiny": 1, "micro": 0}, 1, 1, {"base": 3, "small": 1}),
    "teacher_temp_start": (0.02, {"tiny": 0.04, "micro": 0.02}, 0.04, 0.04, 0.04),
    "teacher_temp":     (0.02, {"tiny": 0.07, "micro": 0.02}, 0.07, 0.07, 0.07),
    "patch_temp":       (0.02, {"tiny": 0.07, "micro": 0.02}, 0.07, 0.07, 0.07),
    "warmup_temp_epochs": (1, {"tiny": 30, "micro": 1}, 30, 30, {"base": 50, "small": 30}),
    "pred_ratio":       "0,0.3",
    "pred_ratio_var":   "0,0.2",
    "pred_shape":       "block",
    "pred_start_epoch": 0,
    "lambda1":          1.0,
    "lambda2":          1.0,
    "drop_path":        (0.0, {"tiny": 0.1, "micro": 0.0}, 0.1, 0.1, 0.1),
    "global_scale":     (0.3, 0.3, 0.3, 0.3, {"base": 0.32, "small": 0.25}),
    "local_scale":      (0.3, {"tiny": 0.3, "micro": 0.4}, 0.3, 0.3, {"base": 0.32, "small": 0.25}),
    "local_crops":      (2, {"tiny": 6, "micro": 4}, 6, 6, 10),
    "local_size":       (16, {"tiny": 16, "micro": 12}, 16, 32, 96),
    "blur":             (False, False, False, False, True),
}
FLAGS = {
    "weight_decay_end": "weight decay at the end; it starts at --weight_decay",
    "momentum": "momentum of the teacher at the start; it ends at 1",
    "out_dim": "prototypes K for the class token",
    "patch_out_dim": "prototypes K' for patches; the same as --out_dim with a shared head",
    "shared_head": "one set of prototypes for class token and patches",
    "head_hidden": "hidden width of the projection head",
    "head_bottleneck": "width of its unit vectors, which are compared with the prototypes",
    "norm_last_layer": "keep the prototypes at length 1 (else their lengths are trained)",
    "freeze_last_layer": "epochs in which the prototypes do not move",
    "teacher_temp_start": "temperatures of the teacher in the first epoch",
    "teacher_temp": "temperature of the teacher for the class token; above 0.07 is unstable",
    "patch_temp": "temperature of the teacher for patches",
    "warmup_temp_epochs": "epochs in which the temperatures rise",
    "pred_ratio": "shares of patches to hide; each crop draws one of them",
    "pred_ratio_var": "half the width of the range around each --pred_ratio",
    "pred_shape": ("hide blocks, or single patches", ("block", "rand")),
    "pred_start_epoch": "first epoch in which patches are hidden",
    "lambda1": "weight of the class token's loss",
    "lambda2": "weight of the patches' loss",
    "drop_path": "drop path rate of the student's last block",
    "global_scale": "smallest area of the global crops, as a share of the image",
    "local_scale": "largest area of the local crops, as a share of the image",
    "local_crops": "local crops of each image",
    "local_size": "side of the local crops in pixels",
    "blur": "blur the crops as on ImageNet (sigma 0.1 to 2 pixels)",
}

# ---- masks ----


def draw_masks(args, n, grid, device):
    """-> mask (n, N) bool, True = hidden: each crop draws one of --pred_ratio, then a share around it"""
    ratios, ranges = numbers(args.pred_ratio), numbers(args.pred_ratio_var)
    which = torch.randint(len(ratios), (n,))
    share = torch.tensor(ratios)[which] + torch.tensor(ranges)[which] * (2 * torch.rand(n) - 1)
    budget = (share * grid ** 2).to(device)                     # not rounded: blocks stop below it
    if args.pred_shape == "block":
        return data.blockwise_mask(n, grid, budget, (grid // 3) ** 2, exact=False, device=device)
    order = torch.rand(n, grid ** 2, device=device).argsort(1).argsort(1)
    return order < budget.floor()[:, None]


def most_hidden(args, n, grid):
    """A number of hidden patches that n crops together do not exceed: mean + six standard deviations."""
    ratios, ranges = numbers(args.pred_ratio), numbers(args.pred_ratio_var)
    mean = sum(ratios) / len(ratios)
    var = sum(r ** 2 + v ** 2 / 3 for r, v in zip(ratios, ranges)) / len(ratios) - mean ** 2
    most = max(r + v for r, v in zip(ratios, ranges))
    return max(1, math.ceil(grid ** 2 * min(n * most, n * mean + 6 * math.sqrt(n * var))))


def numbers(text):
    return [float(word) for word in text.split(",")]


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
    """Backbone (a ViT) and head; student and teacher are two of them."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head
        backbone.config["pos_offset"] = 0.1                     # as DINO interpolates positions for crops

    def tokens(self, imgs, mask=None, masked_embed=None):
        """(n, 3, H, W), mask (n, N) bool or None -> tokens after the last norm, (n, 1 + N, D)"""
        vit = self.backbone
        x = vit.patch_embed(imgs)                                                           # (n, N, D)
        if mask is not None:  # before the positions are added
            x = torch.where(mask[:, :, None], masked_embed.to(x.dtype), x)
        return vit.norm(vit.forward_blocks(vit.add_cls_and_pos(x))[-1])


# ---- the losses ----


def sharpen(teacher, centre, temp):
    """The teacher's distribution softmax((teacher - centre) / temp), of logits (..., K)"""
    return ((teacher - centre) / temp).softmax(-1)


def cls_loss(q, student, temp=0.1):
    """Cross-entropy between all pairs of different crops: q (G, B, K), student logits (G + L, B, K)."""
    ce = -torch.einsum("ubk,vbk->uv", q, (student / temp).log_softmax(-1)) / q.shape[1]     # (G, G + L)
    return (ce.sum() - ce.diagonal().sum()) / (ce.numel() - len(ce))


def patch_loss(q, student, weight, temp=0.1):
    """Cross-entropy of hidden patches: q, student logits (M, K'); weight (M,): 1 / (|M_u| G B), 0 padding."""
    ce = -(q * (student / temp).log_softmax(-1)).sum(-1)                                    # (M,)
    return (ce * weight).sum()


def entropy(q):
    return -(q * q.clamp(min=1e-12).log()).sum(-1)


class IBOT(nn.Module):
    """Student, teacher, centres and loss. No gradient reaches the teacher."""

    def __init__(self, student, teacher, max_masked, lambda1=1.0, lambda2=1.0):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.teacher.load_state_dict(student.state_dict())
        self.max_masked, self.lambda1, self.lambda2 = max_masked, lambda1, lambda2
        self.masked_embed = nn.Parameter(torch.zeros(1, student.backbone.config["embed_dim"]))
        self.register_buffer("centre", torch.zeros(1, student.head.last_layer.weight_g.shape[0]))
        self.register_buffer("patch_centre", torch.zeros(1, student.head.last_layer2.weight_g.shape[0]))

    def forward(self, crops, local_crops, mask, temp, patch_temp):
        """Lists of G global and L local crops, (B, 3, s, s) each; mask (G B, N), crop after crop.

        -> loss, {name: what to log}, means of the teacher's logits over the batch (1, K), (1, K')
        """
        B, G, imgs = len(crops[0]), len(crops), torch.cat(crops)
        ids = mask.flatten().int().argsort(dim=0, descending=True, stable=True)[:self.max_masked]   # (M,)
        count = mask.sum(1, keepdim=True).clamp(min=1)
        weight = (mask / (count * len(mask))).flatten()[ids]                                # (M,)

        with torch.no_grad():
            x = self.teacher.tokens(imgs)
            with torch.autocast(x.device.type, enabled=False):
                z = self.teacher.head.unit(x.float())                                       # (G B, 1 + N, E)
                t_cls = self.teacher.head.last_layer(z[:, 0])                               # (G B, K)
                t_patch = self.teacher.head.last_layer2(z[:, 1:].flatten(0, 1)[ids])        # (M, K')
                means = (t_cls.mean(0, keepdim=True),
                         self.teacher.head.last_layer2(z[:, 1:].mean((0, 1)))[None])
                q = sharpen(t_cls, self.centre, temp).unflatten(0, (G, B))                  # (G, B, K)
                q_patch = sharpen(t_patch, self.patch_centre, patch_temp)                   # (M, K')

        x = self.student.tokens(imgs, mask, self.masked_embed)                              # (G B, 1 + N, D)
        rows = [x[:, 0], x[:, 1:].flatten(0, 1)[ids]]
        if local_crops:
            rows.append(self.student.tokens(torch.cat(local_crops))[:, 0])                  # (L B, D)
        with torch.autocast(x.device.type, enabled=False):
            z = self.student.head.unit(torch.cat(rows).float())  # all rows at once
            z_cls, z_patch, *z_local = z.split([len(row) for row in rows])
            s_cls = self.student.head.last_layer(torch.cat([z_cls, *z_local])).unflatten(0, (-1, B))
            on_cls = cls_loss(q, s_cls)                         # s_cls (G + L, B, K)
            on_patch = patch_loss(q_patch, self.student.head.last_layer2(z_patch), weight)
            with torch.no_grad():
                certain = entropy(q).mean()
                logs = {"cls": on_cls, "patch": on_patch, "entropy": certain, "kl": on_cls - certain,
                        "entropy_of_mean": entropy(q.mean((0, 1))),
                        "used": F.one_hot(q.argmax(-1), q.shape[-1]).amax((0, 1)).float().mean()}
        return self.lambda1 * on_cls + self.lambda2 * on_patch, logs, means

    @torch.no_grad()
    def update(self, means, momentum):
        """After a step: the centres move to the teacher's mean over all ranks, the teacher to the student."""
        for centre, mean in zip((self.centre, self.patch_centre), means):
            centre.lerp_(data.all_sum(mean) / data.world_size(), 0.1)
        update_ema(self.teacher, self.student, momentum)

    def features(self, imgs):
        """(B, 3, H, W) -> (B, D): the teacher's class token"""
        return self.teacher.backbone.features(imgs)


# ---- schedules ----


def temperature(epoch, start, end, warmup, first=0):
    """The teacher's temperature in an epoch: start, from epoch `first` on linearly to end within warmup."""
    return start + (end - start) * min(1.0, max(0, epoch - first) / max(1, warmup - 1))


def cosine(done, start, end):
    """From start to end by half a cosine while `done` goes from 0 to 1: teacher momentum, weight decay."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def clip_each(parameters, max_norm):
    """Scale each gradient of norm above max_norm down to it, every tensor by itself."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    scales = [(max_norm / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(gradients)]
    torch._foreach_mul_(gradients, scales)


def collapse(logs, args):
    """In words, what is wrong with the teacher's distributions, or None."""
    most = math.log(args.out_dim)
    if logs["entropy"] > 0.99 * most:
        return "the teacher says the same of everything (entropy ln K): try a lower --teacher_temp"
    if logs["entropy_of_mean"] < 0.05 * most:
        return "all images go to one prototype: try a higher --teacher_temp or a smaller --lr"


def official_names(content):
    """A whole checkpoint of bytedance/ibot: student, teacher, centres -> a state dict under our names."""
    ours = {"student.backbone.masked_embed": "masked_embed", "ibot_loss.center": "centre",
            "ibot_loss.center2": "patch_centre"}
    state = {f"{part}.{name}": value for part in ("student", "teacher", "ibot_loss")
             for name, value in official_state(content.get(part, {})).items()}
    return {ours.get(name, name): value[0] if name.endswith("center2") else value
            for name, value in state.items()}


@torch.no_grad()
def pictures(model, imgs, source, folder, step):
    """<step>.png: where the teacher's class token looks, per head; vocabulary.png: patches that share a
    prototype, for the commonest prototypes, each with its surroundings."""
    model.eval()
    few, backbone = imgs[:8], model.teacher.backbone
    attention = cls_attention(backbone, few)                                                # (8, H, g, g)
    rows = {"image": data.to_pixels(few, source)}
    rows |= {f"head {h + 1}": attention[:, h] for h in range(attention.shape[1])}
    data.save_rows(folder / f"{step:06d}.png", rows, "attention of the teacher's class token, last block")
    logits = torch.cat([model.teacher.head(model.teacher.tokens(part))[1] for part in imgs.split(100)])
    model.train()
    p, g = backbone.config["patch_size"], math.isqrt(logits.shape[1])
    sure, prototype = logits.softmax(-1).max(-1)                                            # (n, N)
    around = F.unfold(F.pad(imgs, (p,) * 4, mode="reflect"), 3 * p, stride=p)               # (n, 27 p p, N)
    around = around.transpose(1, 2).reshape(-1, 3, 3 * p, 3 * p)                            # (n N, 3, 3p, 3p)
    sure, prototype, rows = sure.flatten(), prototype.flatten(), {}
    for k in prototype.bincount().argsort(descending=True)[:10].tolist():
        members, best = (prototype == k).nonzero()[:, 0], {}    # the surest patch of each image
        for i in members[sure[members].argsort(descending=True)].tolist():
            best.setdefault(i // g ** 2, i)
        label = f"prototype {k},\n{len(members)} patches"
        rows[label] = data.to_pixels(around[list(best.values())[:12]], source)
    data.save_rows(folder / "vocabulary.png", rows, "patches (the middle third) of the commonest prototypes")


def check_flags(args):
    ratios, ranges = args.pred_ratio.split(","), args.pred_ratio_var.split(",")
    try:
        good = len(ratios) == len(ranges) and all(
            0 <= float(v) <= float(r) and float(r) + float(v) < 1 for r, v in zip(ratios, ranges))
    except ValueError:
        good = False
    if not good:
        data.stop(f"--pred_ratio {args.pred_ratio} and --pred_ratio_var {args.pred_ratio_var} must be lists "
                  f"of as many numbers, like 0,0.3 and 0,0.2, each range within 0 to 1")
    if args.local_crops and args.local_size % args.patch_size:
        data.stop(f"--local_size {args.local_size} is not divisible by --patch_size {args.patch_size}")
    if args.shared_head and args.patch_out_dim != args.out_dim:
        data.stop(f"--patch_out_dim {args.patch_out_dim} differs from --out_dim {args.out_dim}: a shared "
                  f"head has one number of prototypes; give both, or add --no-shared_head")


def main():
    args = data.parse_args(__doc__, RECIPES, FLAGS)
    check_flags(args)
    device = data.setup(args)
    train_set, val_set = data.load_sets(args)
    color = dict(flip=0.5, jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, gray=0.2)
    wide, near, blur = (args.global_scale, 1.0), (0.05, args.local_scale), float(args.blur)
    views = [data.View(args.img_size, scale=wide, blur=1.0 * blur, **color),
             data.View(args.img_size, scale=wide, blur=0.1 * blur, solarize=0.2, **color),
             data.View(args.local_size, args.local_crops, scale=near, blur=0.5 * blur, **color)]
    loader = data.Loader(args, train_set, views)

    def network(drop_path):
        backbone = ViT(args.img_size, args.patch_size, **SIZES[args.model], drop_path=drop_path)
        for p in backbone.blocks.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 * (768 / backbone.config["embed_dim"]) ** 0.5)
        return Network(backbone, Head(backbone.config["embed_dim"], args.head_hidden, args.head_bottleneck,
                                      args.out_dim, args.patch_out_dim, args.shared_head,
                                      args.norm_last_layer))
    grid = args.img_size // args.patch_size
    crops = 2 * args.batch_size // data.world_size() // args.accum_steps
    model = IBOT(network(args.drop_path), network(0.0), most_hidden(args, crops, grid), args.lambda1,
                 args.lambda2).to(device)
    if args.init:
        load_init(model, args.init, official_names, pos_offset=0.1)
    net = data.wrap(model, args)
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay, no_decay=()), lr=args.lr,
                                  betas=(0.9, 0.999), fused="mps" not in args.device)
    scaler = data.make_scaler(args)
    start = data.load_checkpoint(args, model=model, optimizer=optimizer, scaler=scaler)
    data.describe(args, model, loader, f"ln {args.out_dim} = {math.log(args.out_dim):.3f} for the class "
                                       f"token, ln {args.patch_out_dim} for patches (a uniform teacher)")
    log = data.Log(args, loader, start)

    def evaluate(step, logs=None):
        pictures(model, data.some_images(args, val_set, 500), val_set,
                 Path(args.output_dir, "pictures"), step)
        log.write(step, knn=data.knn_monitor(args, model, train_set, val_set))
        if logs and data.rank() == 0 and (words := collapse(logs, args)):
            print(words, flush=True)

    if start == 0:
        evaluate(0)
    warmup = min(args.warmup_temp_epochs, args.epochs)
    for step, batch in loader.steps(start):
        epoch, done = step // loader.epoch_steps, step / (args.epochs * loader.epoch_steps)
        lr = cosine_lr(step / loader.epoch_steps, args)
        set_lr(optimizer, lr)
        for group in optimizer.param_groups:
            if group["weight_decay"]:
                group["weight_decay"] = cosine(done, args.weight_decay, args.weight_decay_end)
        temps = [temperature(epoch, args.teacher_temp_start, end, warmup, first)
                 for end, first in ((args.teacher_temp, 0), (args.patch_temp, args.pred_start_epoch))]
        temps = [torch.full((), temp, device=device) for temp in temps]  # numbers would be compiled in
        total, logs, means = 0, {}, [0, 0]
        for crops, _ in batch:                                  # the labels are never used
            mask = draw_masks(args, 2 * len(crops[0]), grid, device)
            mask = mask & (epoch >= args.pred_start_epoch)
            with data.autocast(args):
                loss, values, parts = net(crops[:2], crops[2:], mask, *temps)
            scaler.scale(loss / args.accum_steps).backward()
            total = total + loss.detach() / args.accum_steps
            logs = {name: logs.get(name, 0) + v.detach() / args.accum_steps for name, v in values.items()}
            means = [mean + part / args.accum_steps for mean, part in zip(means, parts)]
        scaler.unscale_(optimizer)
        if args.clip_grad:
            clip_each(model.student.parameters(), args.clip_grad)
        if epoch < args.freeze_last_layer:
            for name, p in model.student.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update(means, cosine(done, args.momentum, 1.0))
        log.step(step, loss=total, **logs, lr=lr)
        if log.evaluates(step):
            evaluate(step + 1, logs)
        if log.saves(step):
            data.save_encoder(args, model.teacher.backbone, train_set)
            data.save_checkpoint(args, step + 1, model=model, optimizer=optimizer, scaler=scaler)
        if log.interrupted:
            break
    log.finish()


if __name__ == "__main__":
    main()
