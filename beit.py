"""BEiT: BERT Pre-Training of Image Transformers (Bao et al., 2021), arXiv:2106.08254.

Words for images: a tokenizer (dvae.py) turns an image into a grid of codes, one for each patch of the ViT.
Hide blocks of patches behind a learned mask token, and let the ViT predict the codes of what is hidden. Codes
leave out the short-range detail that a loss on pixels would spend the model's capacity on.

    L = -1/|M| sum_{i in M} log softmax(W h_i)_{z_i}          M: the hidden patches of all images
    h = LN(ViT(x)), where x_i = mask_token for i in M         z_i = argmax of the tokenizer at place i

Shapes: B images, N patches (no cls), M hidden ones of each image, D width, K codes.

By default the ViT of the official code: relative position bias, one table for all blocks; layer scale.
--plain is the ViT of the paper's headline numbers: learned absolute positions, neither of the two.

Deviations: masks are always filled up to the same number of patches (as in BEiT v2); the tokenizer's smaller
view is resized from the student's crop, not from the file; one fused bias for query, key and value, of which
the key's part has no effect. The k-NN monitor reads the mean of the patches three quarters up the ViT (block
9 of 12), since the last blocks decode tokens.

    python beit.py --data shapes                            # CPU, after dvae.py --data shapes: k-NN 13 -> 30%
    python beit.py --model micro                            # CIFAR-10, CPU, after dvae.py: linear 45%, README
    python beit.py                                          # CIFAR-10, ViT-Tiny/4, one GPU: not run yet
    torchrun --nproc_per_node=8 beit.py --data imagenet     # ViT-B/16, 800 epochs: not run yet
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from dvae import prepare_tokenizer, token_marginal
from vit import SIZES, ViT, cosine_lr, load_init, official_state, param_groups, set_lr

# columns:             shapes, cifar10, cifar100, tiny-imagenet, imagenet (the paper's table 9, 800 epochs);
# {"tiny": a, "micro": b} is b for --model micro, the laptop's, and a for every other model
RECIPES = {
    "model":           ("micro", "tiny", "tiny", "tiny", "base"),
    "img_size":        (32, 32, 32, 64, 224),
    "patch_size":      (4, 4, 4, 8, 16),
    "epochs":          (12, {"tiny": 300, "micro": 9}, 300, 300, 800),
    "batch_size":      (64, {"tiny": 512, "micro": 128}, 512, 512, 2048),
    "lr":              1.5e-3,
    "min_lr":          1e-5,
    "warmup_epochs":   (1.0, {"tiny": 10.0, "micro": 1.0}, 10.0, 10.0, 10.0),
    "weight_decay":    0.05,
    "clip_grad":       {"base": 3.0, "large": 1.0},
    "eval_every":      (6, {"tiny": 50, "micro": 9}, 50, 50, 100),
    "tokenizer":       "",
    "target":          "tokens",
    "masking":         "block",
    "num_masked":      (26, 26, 26, 26, 75),
    "min_block":       (4, 4, 4, 4, 16),
    "predict":         "masked",
    "plain":           False,
    "layer_scale":     {"base": 0.1, "large": 1e-5},
    "drop_path":       (0.0, 0.0, 0.0, 0.0, 0.1),
    "crop_scale":      (0.4, 0.4, 0.4, 0.4, 0.08),
    "color_jitter":    (0.0, 0.0, 0.0, 0.0, 0.4),
}
FLAGS = {
    "tokenizer": "tokenizer.pt of dvae.py (out/dvae-<data>/tokenizer.pt if not given)",
    "target": ("predict the codes of the tokenizer; ablation: the patches' normalised pixels, without a "
               "tokenizer", ("tokens", "pixels")),
    "masking": ("which patches are hidden: blocks; ablation: at random", ("block", "random")),
    "num_masked": "patches hidden in each image",
    "min_block": "smallest number of patches of a block",
    "predict": ("where the loss looks: at hidden patches; ablation: at all", ("masked", "all")),
    "plain": "the paper's ViT: absolute positions, no relative position bias, no layer scale",
    "layer_scale": "first value of the layer scale; 0: without",
    "drop_path": "drop path rate of the last block",
    "crop_scale": "smallest area of the random crop, as a share of the image",
    "color_jitter": "strength of the jitter of brightness, contrast and saturation",
}


def draw_masks(masking, B, grid, num_masked, min_block, device):
    """-> mask (B, N) bool, True = hidden, exactly num_masked in each image"""
    if masking == "block":
        return data.blockwise_mask(B, grid, num_masked, min_block, device=device)
    return torch.rand(B, grid * grid, device=device).argsort(1).argsort(1) < num_masked


def pixel_targets(imgs, p):
    """What the ablation without tokens predicts: patches, each normalised by its mean and standard deviation.

    (B, 3, H, W) -> (B, N, P), channel first inside a patch
    """
    target = F.pixel_unshuffle(imgs.float(), p).flatten(2).transpose(1, 2)
    return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()


class BEiT(nn.Module):
    """Encoder (a ViT), mask token, head and loss."""

    def __init__(self, encoder, num_out, num_masked=75, target="tokens", predict="masked"):
        super().__init__()
        self.encoder, self.num_masked, self.target, self.predict = encoder, num_masked, target, predict
        D = encoder.config["embed_dim"]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.lm_head = nn.Linear(D, num_out)                    # K codes, or the P values of a patch
        self.apply(init_weights)
        for p in (self.mask_token, encoder.cls_token, encoder.pos_embed):
            if p is not None:
                nn.init.trunc_normal_(p, std=0.02, a=-0.02, b=0.02)
        for i, block in enumerate(encoder.blocks, start=1):     # keeps the residual stream in size
            block.attn.proj.weight.data /= math.sqrt(2 * i)
            block.mlp.fc2.weight.data /= math.sqrt(2 * i)

    def hidden_states(self, imgs, mask):
        """(B, 3, H, W), mask (B, N) bool -> patch tokens of the whole masked image, (B, N, D)"""
        encoder = self.encoder
        x = encoder.patch_embed(imgs)                                                       # (B, N, D)
        x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        x = encoder.forward_blocks(encoder.add_cls_and_pos(x))[-1]                          # (B, 1 + N, D)
        return encoder.norm(x)[:, 1:]

    def forward(self, imgs, target, mask):
        """target: codes (B, N) long, or pixels (B, N, P). -> loss, share of codes that are predicted right.

        The head reads the hidden patches alone: the num_masked first ones of each image in raster order.
        """
        h, weight = self.hidden_states(imgs, mask), mask.float()
        if self.predict == "masked":
            ids = mask.int().argsort(dim=1, descending=True, stable=True)[:, :self.num_masked]  # (B, M)
            h, target, weight = take(h, ids), take(target, ids), weight.gather(1, ids)
        else:
            weight = torch.ones_like(weight)
        pred = self.lm_head(h).float()                          # (B, M, K); (B, N, K) with predict all
        if self.target == "pixels":
            loss, hit = (pred - target).square().mean(-1), torch.zeros_like(weight)         # (B, M)
        else:
            loss = F.cross_entropy(pred.transpose(1, 2), target, reduction="none")          # (B, M)
            hit = (pred.argmax(-1) == target).float()
        return (loss * weight).sum() / weight.sum(), (hit * weight).sum() / weight.sum()

    def features(self, imgs):
        """(B, 3, H, W) -> (B, D): mean of the patch tokens, three quarters up the encoder"""
        encoder = self.encoder
        outputs = encoder.forward_blocks(encoder.add_cls_and_pos(encoder.patch_embed(imgs)))
        return outputs[round(0.75 * len(outputs)) - 1][:, 1:].mean(1)


def take(x, ids):
    """Gather tokens: x (B, n) or (B, n, D), ids (B, m) -> (B, m) or (B, m, D)"""
    return x.gather(1, ids) if x.ndim == 2 else x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def init_weights(module):
    """The official initialisation: N(0, 0.02^2) cut at one standard deviation, biases 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(module.bias)


def official_names(content):
    """A pre-training file of unilm/beit -> a state dict under our names."""
    return {name if name.startswith(("mask_token", "lm_head")) else f"encoder.{name}": value
            for name, value in official_state(content).items()}


@torch.no_grad()
def pictures(model, tokenizer, views, mask, source, path):
    """Rows: image, what is visible, prediction pasted into it, and what perfect tokens would have painted."""
    imgs, p = views[0], model.encoder.config["patch_size"]
    model.eval()
    pred = model.lm_head(model.hidden_states(imgs, mask)).float()                           # (B, N, K or P)
    model.train()
    image, g = data.to_pixels(imgs, source), math.isqrt(mask.shape[1])
    hidden = F.interpolate(mask.float().view(-1, 1, g, g), scale_factor=p).cpu()
    if model.target == "pixels":
        patches = F.pixel_unshuffle(imgs, p).flatten(2).transpose(1, 2)
        pred = pred * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
        pred = F.pixel_shuffle(pred.transpose(1, 2).unflatten(2, (g, g)), p)                # (B, 3, H, W)
        painted, best, title = data.to_pixels(pred, source), {}, "brightness and contrast are the true ones"
    else:
        ids = tokenizer.tokens(views[1])
        right = (pred.argmax(-1) == ids)[mask].float().mean().item()
        painted, whole = (data.resize(tokenizer.paint(codes), imgs.shape[-1]).cpu()
                          for codes in (torch.where(mask, pred.argmax(-1), ids), ids))
        best, title = {"true codes, painted": whole}, f"{right:.1%} of the hidden codes are predicted right"
    rows = {"image": image, "visible": image * (1 - hidden) + 0.5 * hidden,
            "predicted, painted": image * (1 - hidden) + painted * hidden}
    data.save_rows(path, rows | best, title)


def main():
    args = data.parse_args(__doc__, RECIPES, FLAGS)
    grid = args.img_size // args.patch_size
    if not 0 < args.num_masked < grid ** 2:
        data.stop(f"--num_masked {args.num_masked} must lie between 1 and {grid ** 2 - 1}: about "
                  f"{int(0.4 * grid ** 2)} of the {grid ** 2} patches")
    device = data.setup(args)
    tokenizer = prepare_tokenizer(args, grid) if args.target == "tokens" else None
    train_set, val_set = data.load_sets(args)
    size = tokenizer.img_size if tokenizer else 0
    jitter = (args.color_jitter,) * 3 + (0.0,) if args.color_jitter else None
    loader = data.Loader(args, train_set, [data.View(args.img_size, scale=(args.crop_scale, 1.0), flip=0.5,
                                                     jitter=jitter, tokenizer_size=size)])

    places = dict(pos="learned") if args.plain else dict(pos="none", rel_pos="shared",
                                                         layer_scale=args.layer_scale)
    encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model], **places, drop_path=args.drop_path)
    num_out = tokenizer.vocab if tokenizer else 3 * args.patch_size ** 2
    model = BEiT(encoder, num_out, args.num_masked, args.target, args.predict).to(device)
    if args.init:
        load_init(model, args.init, official_names)
    net = data.wrap(model, args)
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.999),
                                  fused="mps" not in args.device)
    scaler = data.make_scaler(args)
    start = data.load_checkpoint(args, model=model, optimizer=optimizer, scaler=scaler)
    trivial, few = "1.0 (the mean of every patch)", data.View(args.img_size, tokenizer_size=size)
    if tokenizer:
        entropy, commonest = token_marginal(tokenizer, data.some_images(args, val_set, 1000, few)[1])
        trivial = (f"ln {num_out} = {math.log(num_out):.3f}; knowing how often each code occurs "
                   f"{entropy:.3f}, accuracy of the commonest {commonest:.3f}")
    tokens = data.compiled(tokenizer.tokens, args) if tokenizer else None
    data.describe(args, model, loader, trivial)
    log = data.Log(args, loader, start)

    def evaluate(step):
        torch.manual_seed(0)                                    # the same masks every time
        views = data.some_images(args, val_set, 8, few)
        views = views if tokenizer else [views]
        mask = draw_masks(args.masking, len(views[0]), grid, args.num_masked, args.min_block, device)
        pictures(model, tokenizer, views, mask, val_set,
                 Path(args.output_dir, "pictures", f"{step:06d}.png"))
        log.write(step, knn=data.knn_monitor(args, model, train_set, val_set))

    if start == 0:
        evaluate(0)
    for step, batch in loader.steps(start):
        lr = cosine_lr(step / loader.epoch_steps, args)
        set_lr(optimizer, lr)
        total, acc = 0, 0
        for (imgs, *pixels), _ in batch:                        # the labels are never used
            mask = draw_masks(args.masking, len(imgs), grid, args.num_masked, args.min_block, device)
            with torch.no_grad():                               # in float32
                target = tokens(*pixels) if tokens else pixel_targets(imgs, args.patch_size)
            with data.autocast(args):
                loss, hits = net(imgs, target, mask)
            scaler.scale(loss / args.accum_steps).backward()
            total, acc = total + loss.detach() / args.accum_steps, acc + hits / args.accum_steps
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        log.step(step, loss=total, lr=lr, **({"accuracy": acc} if tokenizer else {}))
        if log.evaluates(step):
            evaluate(step + 1)
        if log.saves(step):
            data.save_encoder(args, encoder, train_set)
            data.save_checkpoint(args, step + 1, model=model, optimizer=optimizer, scaler=scaler)
        if log.interrupted:
            break
    log.finish()


if __name__ == "__main__":
    main()
