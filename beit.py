"""BEiT: BERT Pre-Training of Image Transformers (Bao et al., 2021), arXiv:2106.08254.

Measured: ViT-micro/4, CIFAR-10, two CPU cores, 8 + 21 minutes: k-NN 39%, linear 50%, fine-tuned 60%.

Words for images: a tokenizer (dvae.py) turns an image into a grid of codes, one for each patch of the ViT.
Hide blocks of patches behind a learned mask token, and let the ViT predict the codes of what is hidden. Codes
leave out the short-range detail that a loss on pixels would spend the model's capacity on.

    L = -1/|M| sum_{i in M} log softmax(W h_i)_{z_i}          M: the hidden patches of all images
    h = LN(ViT(x)), where x_i = mask_token for i in M         z_i = argmax of the tokenizer at place i

In the paper's ELBO (section 2.4) the tokenizer is stage one, with a uniform prior over codes; this file is
stage two and learns the prior in its place, p(z | visible patches).

Shapes: B images, N patches (no cls), M hidden ones of each image, D width, K codes.

By default the ViT of the official code: relative position bias, one table for all blocks; layer scale.
--plain is the ViT of the paper's headline numbers: learned absolute positions, neither of the two.

    python beit.py --data shapes                            # CPU, 3 minutes, after dvae.py: k-NN 13 -> 29%
    python beit.py --model micro                            # CIFAR-10, CPU, 21 minutes, after dvae.py
    python beit.py                                          # CIFAR-10, ViT-Tiny/4, one GPU: not run yet
    torchrun --nproc_per_node=8 beit.py --data imagenet     # ViT-B/16, 800 epochs: not run yet

Deviations: the tokenizer's smaller view is resized from the student's crop, not from the file; one fused bias
for query, key and value, of which the key's part has no effect. The k-NN monitor reads the mean of the
patches three quarters up the ViT (block 9 of 12): the last blocks decode tokens.
"""
import torch
import torch.nn.functional as F
from torch import nn

import data
from dvae import painter, prepare_tokenizer
from vit import (SIZES, ViT, cosine_lr, image_of, init_beit, load_init, norm_patches, param_groups,
                 patches_of, set_lr, take)

RECIPE = {  # one value, or four: shapes, laptop, small, imagenet (the paper's table 9); meaning; range
    "tokenizer":     ("", "of dvae.py or beit_v2.py (out/dvae-<data>/tokenizer.pt if not given)"),
    "masking":       ("block", "hide patches in blocks; ablation: at random", ("block", "random")),
    "num_masked":    ((26, 26, 26, 75), "patches hidden in each image, at most", "[1, 1e9]"),
    "min_block":     ((4, 4, 4, 16), "smallest number of patches of a block", "[1, 1e9]"),
    "target":        ("tokens", "predict codes; ablation: pixels", ("tokens", "pixels")),
    "norm_pix_loss": ((False, True, True, True), "these: patches less their mean, over their std"),
    "predict":       ("masked", "the loss looks at hidden patches; ablation: at all", ("masked", "all")),
    "plain":         (False, "the paper's ViT: absolute positions, no relative bias, no layer scale"),
    "layer_scale":   ({"base": 0.1, "large": 1e-5}, "first value of the layer scale; 0: without", "[0, 10]"),
    "drop_path":     ((0.0, 0.0, 0.0, 0.1), "drop path rate of the last block", "[0, 1)"),
    "crop_scale":    ((0.4, 0.4, 0.4, 0.08), "smallest share of the image in a random crop", "(0, 1]"),
    "color_jitter":  ((0.0, 0.0, 0.0, 0.4), "strength in brightness, contrast, saturation", "[0, 1]"),
    "epochs":        (12, 10, 300, 800),                        # passes over the images
    "batch_size":    (64, 128, 512, 2048),                      # of all GPUs together
    "lr":            1.5e-3,                                    # at its peak
    "min_lr":        1e-5,                                      # at the end
    "warmup_epochs": (1.0, 1.0, 10.0, 10.0),                    # in which lr rises from 0
    "weight_decay":  0.05,                                      # not on biases and norms
    "clip_grad":     {"base": 3.0, "large": 1.0},               # largest norm of the gradient
}


class BEiT(nn.Module):
    """Encoder (a ViT), mask token, head and loss."""

    def __init__(self, encoder, num_out, num_masked=75, target="tokens", predict="masked"):
        super().__init__()
        self.encoder, self.num_masked, self.target, self.predict = encoder, num_masked, target, predict
        D = encoder.config["embed_dim"]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.lm_head = nn.Linear(D, num_out)                    # K codes, or the P values of a patch
        init_beit(self)

    def hidden_states(self, imgs, mask):
        """(B, 3, H, W), mask (B, N) bool -> patch tokens of the whole masked image, (B, N, D)"""
        x = self.encoder.patch_embed(imgs)                                                  # (B, N, D)
        x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        return self.encoder.norm(self.encoder.forward_layers(x)[-1])[:, 1:]

    def forward(self, imgs, target, mask):
        """target: codes (B, N) long, or pixels (B, N, P). -> loss, share of codes that are predicted right.

        The head reads num_masked patches of each image, the hidden ones first: where a mask hides fewer, the
        others have weight 0. With predict "all" it reads every patch."""
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
        outputs = self.encoder.forward_layers(self.encoder.patch_embed(imgs))
        return outputs[round(0.75 * len(outputs)) - 1][:, 1:].mean(1)


@torch.no_grad()
def pictures(model, tokenizer, views, mask, source, path, norm_pix_loss=True):
    """Rows: image, what is visible, prediction pasted into it, and what perfect tokens would have painted."""
    imgs, p = views[0], model.encoder.config["patch_size"]
    model.eval()
    pred = model.lm_head(model.hidden_states(imgs, mask)).float()                           # (B, N, K or P)
    model.train()
    image = data.to_pixels(imgs, source)
    if model.target == "pixels":
        best, title = {}, "brightness and contrast are the true ones" * norm_pix_loss
        _, mean, std = norm_patches(patches_of(imgs, p), norm_pix_loss)
        painted = data.to_pixels(image_of(pred * std + mean, p), source)                    # (B, 3, H, W)
    else:
        codes, pred = tokenizer.tokens(views[1]), pred.argmax(-1)                           # (B, N) each
        paint, best, note = painter(tokenizer, codes, imgs.shape[-1])
        painted = paint(torch.where(mask, pred, codes))
        title = f"{(pred == codes)[mask].float().mean():.1%} of the hidden codes are predicted right{note}"
    rows = {"image": image, "visible": data.hide(image, mask),
            "predicted, painted": data.hide(image, mask, painted)}
    data.save_rows(path, rows | best, title)


def main():
    args = data.parse_args(__doc__, RECIPE)
    data.check_masked(args)
    device = data.setup(args)
    train_set, val_set = data.load_sets(args)
    tokenizer = prepare_tokenizer(args) if args.target == "tokens" else None
    size = tokenizer.img_size if tokenizer else 0               # of the second view, for the tokenizer
    jitter = (args.color_jitter,) * 3 + (0.0,)
    loader = data.Loader(args, train_set, [data.View(args.img_size, scale=(args.crop_scale, 1.0), flip=0.5,
                                                     jitter=jitter, tokenizer_size=size)])

    options = dict(pos="learned") if args.plain else dict(pos="none", rel_pos="shared",
                                                          layer_scale=args.layer_scale)
    encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model], **options, drop_path=args.drop_path)
    num_out = tokenizer.vocab if tokenizer else 3 * args.patch_size ** 2
    model = BEiT(encoder, num_out, args.num_masked, args.target, args.predict).to(device)
    if args.init:
        load_init(model, args)
    net = data.wrap(model, args)                                # compiled, in DDP; `model` itself is saved
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.999),
                                  fused="mps" not in args.device)
    scaler = data.make_scaler(args)
    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    start = data.load_checkpoint(args, **state)
    whole = data.View(args.img_size, tokenizer_size=size)
    trivial, levels = data.trivial_loss(args, val_set, tokenizer, whole)
    tokenize = data.compiled(tokenizer.tokens, args) if tokenizer else None
    log = data.open_log(args, model, loader, start, trivial, **levels)

    def evaluate(step):
        torch.manual_seed(0)                                    # the same masks every time
        views = data.some_images(args, val_set, 8, whole)
        mask = data.draw_masks(args, len(views[0]), "end")
        pictures(model, tokenizer, views, mask, val_set, log.picture(step), args.norm_pix_loss)
        log.write(step, **data.knn_monitor(args, model, train_set, val_set))

    if log.evaluates(start):
        evaluate(start)                                         # what an untrained network can do
    for step, parts in loader.steps(start, net):
        lr = set_lr(optimizer, cosine_lr(step / loader.epoch_steps, args, early=1 / loader.epoch_steps))
        for views, _ in parts:                                  # the labels are never used
            imgs = views[0]
            mask = data.draw_masks(args, len(imgs), "end")
            with data.autocast(args):
                with torch.no_grad():                           # the tokenizer is frozen
                    target = tokenize(views[1]) if tokenizer else norm_patches(
                        patches_of(imgs, args.patch_size), args.norm_pix_loss)[0]
                loss, accuracy = net(imgs, target, mask)
            scaler.scale(loss / args.accum_steps).backward()    # the gradients of the parts add up
            log.note(loss=loss, **({"accuracy": accuracy} if tokenizer else {}))
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


if __name__ == "__main__":
    data.run(main)
