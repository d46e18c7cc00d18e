"""Masked Autoencoders Are Scalable Vision Learners (He et al., 2021), arXiv:2111.06377.

Measured: ViT-micro/4, CIFAR-10, two CPU cores, 29 minutes: k-NN 52%, linear 60%, fine-tuned 71%.

Hide 75% of the patches of an image at random. The encoder, a ViT, sees only the other 25%, so it is fast; a
small decoder gets the encoded patches, a mask token at every hidden place, and paints the pixels that are
missing.

    L = 1/|M| sum_{i in M} 1/P sum_j (pred_ij - target_ij)^2         M: the hidden patches of all images
    target_i = (patch_i - mean(patch_i)) / sqrt(var(patch_i) + 1e-6) with norm_pix_loss, else patch_i

Shapes: B images, N patches (no cls), V visible, D, E width of encoder, decoder, P = 3 p^2 values of a patch.

    python mae.py --data shapes                             # CPU, offline, 2 minutes: k-NN 16 -> 38%
    python mae.py --model micro                             # CIFAR-10, CPU, half an hour
    python mae.py                                           # CIFAR-10, ViT-Tiny/4, one GPU: 40 epochs run
    torchrun --nproc_per_node=8 mae.py --data imagenet      # ViT-B/16, 800 epochs: not run yet
    python mae.py --init out/mae-cifar10/last.pt --paint a.jpg folder   # repaints these: painted.png

Deviations: the kept patches are picked before they are embedded, not after (the same numbers, less work);
the k-NN monitor reads the mean of the patch tokens, for no loss is put on the class token of an MAE itself.
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import data
from vit import (SIZES, Block, ViT, cosine_lr, image_of, load_init, norm_patches, param_groups, patches_of,
                 set_lr, sincos_pos_embed, take)

RECIPE = {  # one value, or four: shapes, laptop, small, imagenet (the paper's table 8); meaning; range
    "mask_ratio":        (0.75, "share of the patches that are hidden from the encoder", "(0, 1)"),
    "norm_pix_loss":     ((False, True, True, True), "the target: patches less their mean, over their std"),
    "decoder_dim":       ((64, 64, 96, 512), "width of the decoder", "[4, 8192]"),
    "decoder_depth":     ((2, 2, 4, 8), "blocks of the decoder", "[0, 100]"),
    "decoder_heads":     ((2, 2, 3, 16), "attention heads of the decoder", "[1, 128]"),
    "sampling":          ("random", "what to hide; grid: 3 of every 2 x 2", ("random", "block", "grid")),
    "encoder_sees_mask": (False, "ablation: the encoder reads mask tokens, too (worse in the paper)"),
    "paint":             ([""], "pictures and folders of pictures to repaint with --init FILE: no training"),
    "aug":               ("crop", "crops, or the image", ("crop", "crop_fixed", "crop_jitter", "none")),
    "epochs":            (16, 44, 400, 800),                    # passes over the images
    "batch_size":        (64, 128, 512, 4096),                  # of all GPUs together
    "blr":               (8e-3, 2e-3, 7.5e-4, 1.5e-4),          # lr = blr * batch_size / 256
    "warmup_epochs":     (1.0, 1.0, 20.0, 40.0),                # in which lr rises from 0
    "weight_decay":      0.05,                                  # not on biases and norms
}


def patchify(imgs, p):
    """(B, 3, H, W) -> (B, N, P): patches in raster order, their values by row, column, channel, as the
    official decoder predicts them (vit.patches_of puts the channel first, as the embedding's weights lie)."""
    return patches_of(imgs, p).unflatten(2, (3, -1)).transpose(2, 3).flatten(2)


def unpatchify(patches, p):
    """The inverse of patchify for square images: (B, N, P) -> (B, 3, H, W)"""
    return image_of(patches.unflatten(2, (-1, 3)).transpose(2, 3).flatten(2), p)


def sampling_noise(sampling, B, grid, num_keep, device):
    """Noise (B, N) whose num_keep smallest places are kept: at random, around blocks, or on a grid."""
    noise = torch.rand(B, grid * grid, device=device)
    if sampling == "block":
        return noise + data.blockwise_mask(B, grid, grid * grid - num_keep, max(1, grid * grid // 12),
                                           "fill", device)
    if sampling == "grid":
        line = torch.arange(grid, device=device) % 2
        return noise + (line[:, None] + line).flatten()  # the patches of even rows and columns come first
    return noise


def random_masking(noise, num_keep):
    """Keep the num_keep patches of smallest noise (B, N), hide the others.

    -> ids_keep (B, V), in the order of the noise; ids_restore (B, N), the rank of every patch in that order;
    mask (B, N) float, 1 = hidden, 0 = kept."""
    ids_shuffle = noise.argsort(1)
    ids_restore = ids_shuffle.argsort(1)
    mask = (ids_restore >= num_keep).float()
    return ids_shuffle[:, :num_keep], ids_restore, mask


def pixel_targets(imgs, p, norm_pix_loss):
    """The decoder's targets, (B, N, P), in float32. Variance: unbiased, of all values of a patch together."""
    return norm_patches(patchify(imgs, p), norm_pix_loss)[0]


class MAE(nn.Module):
    """Encoder (a ViT), decoder and loss."""

    def __init__(self, encoder, decoder_dim=512, decoder_depth=8, decoder_heads=16, mask_ratio=0.75,
                 norm_pix_loss=True, sampling="random", encoder_sees_mask=False):
        super().__init__()
        p, D = encoder.config["patch_size"], encoder.config["embed_dim"]
        self.patch_size, self.grid = p, encoder.config["img_size"] // p
        self.num_keep = int(self.grid ** 2 * (1 - mask_ratio))
        self.norm_pix_loss, self.sampling, self.encoder_sees_mask = norm_pix_loss, sampling, encoder_sees_mask
        self.encoder = encoder
        self.decoder_embed = nn.Linear(D, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D if encoder_sees_mask else decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(decoder_dim, self.grid), requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth)))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * p * p)
        self.apply(init_weights)
        nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.view(D, -1))
        nn.init.normal_(self.mask_token, std=0.02)

    def noise(self, imgs):
        """What decides which patches of each image are hidden: (B, 3, H, W) -> (B, N)"""
        return sampling_noise(self.sampling, len(imgs), self.grid, self.num_keep, imgs.device)

    def forward_encoder(self, imgs, noise=None):
        """(B, 3, H, W) -> latent (B, 1 + V, D), mask and ids_restore (B, N)"""
        encoder = self.encoder
        if noise is None:
            noise = self.noise(imgs)
        ids_keep, ids_restore, mask = random_masking(noise, self.num_keep)
        patches, pos = patches_of(imgs, self.patch_size), encoder.pos_embed  # (B, N, P), (1, 1 + N, D)
        if self.encoder_sees_mask:
            x = torch.where(mask[:, :, None] > 0, self.mask_token.to(imgs.dtype),
                            encoder.patch_embed.embed(patches))
            x = x + pos[:, 1:]  # (B, N, D): V = N here
        else:
            x = encoder.patch_embed.embed(take(patches, ids_keep)) + pos[0, 1:][ids_keep]   # (B, V, D)
        cls_token = (encoder.cls_token + pos[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], 1)                                                    # (B, 1 + V, D)
        return encoder.norm(encoder.forward_blocks(x)[-1]), mask, ids_restore

    def forward_decoder(self, latent, ids_restore):
        """(B, 1 + V, D) -> predictions for all patches (B, N, P)"""
        x = self.decoder_embed(latent)                                                      # (B, 1 + V, E)
        if not self.encoder_sees_mask:
            num_hidden = ids_restore.shape[1] - (x.shape[1] - 1)
            mask_tokens = self.mask_token.to(x.dtype).expand(len(x), num_hidden, -1)
            patches = take(torch.cat([x[:, 1:], mask_tokens], 1), ids_restore)  # (B, N, E) in raster order
            x = torch.cat([x[:, :1], patches], 1)                                           # (B, 1 + N, E)
        x = self.decoder_blocks(x + self.decoder_pos_embed)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]                               # (B, N, P)

    def forward_loss(self, imgs, pred, mask):
        target = pixel_targets(imgs, self.patch_size, self.norm_pix_loss)
        loss = (pred.float() - target).square().mean(-1)                                    # (B, N)
        return (loss * mask).sum() / mask.sum()  # hidden patches only

    def forward(self, imgs, noise=None):
        """(B, 3, H, W) -> loss, pred (B, N, P), mask (B, N)"""
        latent, mask, ids_restore = self.forward_encoder(imgs, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask

    def features(self, imgs):
        """(B, 3, H, W) -> (B, D): the mean of the patch tokens of the whole image"""
        return self.encoder.forward_features(imgs)[:, 1:].mean(1)


def init_weights(module):
    """The official initialisation: xavier uniform for linear layers, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def pictures(model, imgs, source, path):
    """Rows: image, what the encoder sees, prediction of the rest, prediction pasted into the visible part."""
    model.eval()
    loss, pred, mask = model.forward(imgs)                      # .forward: not compiled for this shape
    model.train()
    p, image = model.patch_size, data.to_pixels(imgs, source)
    _, mean, std = norm_patches(patchify(imgs, p), model.norm_pix_loss)
    note = "; brightness and contrast of each predicted patch are the true ones" * model.norm_pix_loss
    pred = data.to_pixels(unpatchify(pred * std + mean, p), source)
    rows = {"image": image, "visible": data.hide(image, mask),
            "prediction\n(white: visible)": data.hide(pred, 1 - mask, 1.0),
            "pasted": data.hide(image, mask, pred)}
    data.save_rows(path, rows, f"loss on the hidden patches of these images {loss.item():.3f}{note}")


def check_flags(args):
    """One sentence for flags that do not go together."""
    if args.sampling == "grid" and (args.mask_ratio != 0.75 or args.grid % 2):
        data.stop(f"--sampling grid hides three of every 2 x 2 patches: it needs --mask_ratio 0.75 and "
                  f"an even grid, not {args.mask_ratio} and {args.grid} x {args.grid}")
    if not 1 <= int(args.grid ** 2 * (1 - args.mask_ratio)) < args.grid ** 2:
        data.stop(f"--mask_ratio {args.mask_ratio} hides all or none of the {args.grid ** 2} patches: "
                  f"use a value like 0.75")
    if args.decoder_dim % args.decoder_heads or args.decoder_dim % 4:
        data.stop(f"--decoder_dim {args.decoder_dim} must be divisible by 4 and by --decoder_heads "
                  f"{args.decoder_heads}")


def build(args):
    """The model of these flags, with new weights or those of --init FILE"""
    encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model], pos="sincos")
    model = MAE(encoder, args.decoder_dim, args.decoder_depth, args.decoder_heads, args.mask_ratio,
                args.norm_pix_loss, args.sampling, args.encoder_sees_mask).to(args.device)
    if args.init:
        load_init(model, args, fixed=("encoder.pos_embed", "decoder_pos_embed"))
    return model


def main():
    early = data.early_flags(sys.argv[1:])
    if any(word.startswith("--paint") for word in sys.argv):
        return paint(early.init or data.stop("--paint needs --init FILE, the last.pt of a run"),
                     early.output_dir)
    args = data.parse_args(__doc__, RECIPE)
    check_flags(args)
    data.setup(args)
    train_set, val_set = data.load_sets(args)
    crop = dict(scale=(0.2, 1.0), flip=0.5)
    view = {"none": {}, "crop": crop, "crop_jitter": crop | dict(jitter=(0.4, 0.4, 0.4, 0.1)),
            "crop_fixed": dict(scale=(0.77, 0.77), ratio=(1, 1), flip=0.5)}[args.aug]
    loader = data.Loader(args, train_set, [data.View(args.img_size, **view)])

    model = build(args)
    net = data.wrap(model, args)                                # compiled, in DDP; `model` itself is saved
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay, no_decay=()), lr=args.lr,
                                  betas=(0.9, 0.95), fused="mps" not in args.device)
    scaler = data.make_scaler(args)
    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    start = data.load_checkpoint(args, **state)
    trivial, levels = data.trivial_loss(args, val_set)
    log = data.open_log(args, model, loader, start, trivial, **levels)

    def evaluate(step):
        torch.manual_seed(0)                                    # the same masks every time
        pictures(model, data.some_images(args, val_set), val_set, log.picture(step))
        log.write(step, **data.knn_monitor(args, model, train_set, val_set))

    if log.evaluates(start):
        evaluate(start)                                         # what an untrained network can do
    for step, parts in loader.steps(start, net):
        lr = set_lr(optimizer, cosine_lr(step / loader.epoch_steps, args))      # set in every step
        for (imgs,), _ in parts:                                # the labels are never used
            with data.autocast(args):                           # the noise: not in what is compiled
                loss, _, _ = net(imgs, model.noise(imgs))
            scaler.scale(loss / args.accum_steps).backward()    # the gradients of the parts add up
            log.note(loss=loss)
        if args.clip_grad:
            scaler.unscale_(optimizer)                          # undo fp16's loss scaling before clipping
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        log.step(step, lr=lr)
        if log.saves(step + 1):
            log.save(step + 1, state, encoder=model.encoder)
        if log.evaluates(step + 1):
            evaluate(step + 1)
    log.finish()


def paint(path, folder):
    """painted.png: what the model in the file at `path` makes of the pictures that --paint names"""
    content = data.load_file(path) if Path(path).exists() else {}   # if not, load_init says so
    with data.reading(path, "a model of mae.py"):
        flags = data.sound(content.get("flags", {}))
    own = {*RECIPE, "data", "model", "img_size", "patch_size"} - {"paint"}
    args = data.parse_args(__doc__, RECIPE, told={name: flags[name] for name in own & {*flags}})
    check_flags(args)
    data.choose_device(args)
    model, source = build(args), data.pictures_at(args.paint)
    usual = dict(zip(("mean", "std"), data.STATS.get(args.data, data.STATS["imagenet"])))
    stats = usual | {name: content[name] for name in usual if name in content}
    data.expect(path, stats, usual)
    shown = replace(source.subset(range(min(16, len(source)))), skipped=None, **stats)
    (imgs,), _ = next(iter(data.Loader(args, shown, [data.View(args.img_size)], train=False)))
    picture = Path(folder or Path(path).parent, "painted.png")
    pictures(model, imgs, shown, picture)
    data.say(f"{len(shown)} of {len(source)} pictures: see {picture}")


if __name__ == "__main__":
    data.run(main)
