"""CAE: Context Autoencoder for Self-Supervised Representation Learning (Chen et al., 2022), arXiv:2202.03026.

Measured: ViT-micro/4, CIFAR-10, two CPU cores, 8 + 20 minutes: k-NN 46%, linear 55%, fine-tuned 62%.

Separate learning to see from solving the task. The encoder reads the visible patches only. A regressor
predicts, from them, what the encoder would have said of the hidden patches, and is held to it (alignment).
The decoder turns these predictions into tokens: it never sees visible patches, so the encoder has to see.

    L = CE(logits, z) + lambda mean (h_hat - sg[h])^2         both means over the hidden patches of all images
    h_hat = regressor(encoder(visible))   h = encoder(hidden)   logits = decoder(h_hat)   z: codes of dvae.py
    regressor, a block: x <- x + Attn(q = LN(x + pos), k = LN([visible, x] + pos), v = LN([visible, x]))
                        x <- LN(x), x <- x + MLP(x)           from x = mask token
    (with another --decoder_dim, h and encoder(visible) pass one linear layer and a LayerNorm first)

Shapes: B images, N patches (no cls), M hidden and V = N - M visible ones, C width of the encoder, D of
regressor and decoder, K codes.

    python cae.py --data shapes                             # CPU, 4 minutes, after dvae.py: k-NN 13 -> 20%
    python cae.py --model micro                             # CIFAR-10, CPU, 20 minutes, after dvae.py
    python cae.py                                           # CIFAR-10, ViT-Tiny/4, one GPU: not run yet
    torchrun --nproc_per_node=8 cae.py --data imagenet      # ViT-B/16, 800 epochs: not run yet

Deviations: the target comes from the encoder itself, at its present weights (the official code keeps a copy
that lags one step; --momentum m keeps a running average); patches are picked before they are embedded; one
fused bias for query, key and value, of which the key's part has no effect. The class token is never trained
directly: the k-NN monitor reads the mean of the patch tokens.
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from dvae import painter, prepare_tokenizer
from vit import (SIZES, Block, CrossAttention, Mlp, ViT, cosine_lr, image_of, init_cut, load_init,
                 official_state, norm_patches, param_groups, patches_of, renamed, set_lr, sincos_pos_embed,
                 take, update_ema)

RECIPE = {  # one value, or four: shapes, laptop, small, imagenet (CAE-B); meaning; range
    "tokenizer":       ("", "of dvae.py or beit_v2.py (out/dvae-<data>/tokenizer.pt if not given)"),
    "target":          ("tokens", "predict codes; ablation: pixels", ("tokens", "pixels")),
    "norm_pix_loss":   ((False, True, True, True), "these: patches less their mean, over their std"),
    "masking":         ("block", "hide patches in blocks; ablation: at random", ("block", "random")),
    "num_masked":      ((32, 32, 32, 98), "patches hidden in each image", "[1, 1e9]"),
    "min_block":       ((4, 4, 4, 16), "smallest number of patches of a block", "[1, 1e9]"),
    "align_weight":    (2.0, "weight lambda of the alignment", "[0, inf)"),
    "momentum":        (0.0, "of an averaged encoder that gives the target; 0: none", "[0, 1]"),
    "regressor_depth": ((2, 2, 2, 4), "blocks of the regressor", "[1, 100]"),
    "decoder_depth":   ((2, 2, 2, 4), "blocks of the decoder", "[0, 100]"),
    "decoder_dim":     (0, "width of regressor and decoder; 0: the encoder's", "[0, 8192]"),
    "decoder_heads":   (0, "heads of regressor and decoder; 0: the encoder's", "[0, 128]"),
    "layer_scale":     ({"base": 0.1, "large": 1e-5}, "first value of the layer scale; 0: none", "[0, 10]"),
    "drop_path":       ((0.0, 0.0, 0.0, 0.1), "drop path rate of the last block of each part", "[0, 1)"),
    "crop_scale":      ((0.4, 0.4, 0.4, 0.08), "smallest share of the image in a random crop", "(0, 1]"),
    "epochs":          (12, 9, 300, 800),                       # passes over the images
    "batch_size":      (64, 128, 512, 2048),                    # of all GPUs together
    "lr":              (1e-3, 1e-3, 1e-3, 1.5e-3),              # at its peak
    "min_lr":          1e-5,                                    # at the end
    "warmup_epochs":   (1.0, 1.0, 30.0, 20.0),                  # in which lr rises from 0
    "weight_decay":    0.05,                                    # not on biases and norms
    "clip_grad":       3.0,                                     # largest norm of the gradient
}


def split_ids(mask, num_masked):
    """Indices of the hidden (B, M) and of the visible patches (B, V) of a mask (B, N), in raster order."""
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    return order[:, :num_masked], order[:, num_masked:]


def row_first_pos_embed(dim, grid):
    """CAE's sine-cosine positions, (1, 1 + N, dim): MAE's with the halves for row and column exchanged."""
    return sincos_pos_embed(dim, grid).roll(dim // 2, -1)


class RegressorBlock(nn.Module):
    """Hidden patches ask visible ones and themselves; positions on queries and keys only (3.2).

    norm2_cross is on the residual stream itself, not in front of the MLP's branch."""

    def __init__(self, dim, num_heads, rate=0.0, layer_scale=0.0):
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v, self.norm2_cross = (
            nn.LayerNorm(dim, eps=1e-6) for _ in range(4))
        self.cross_attn, self.mlp_cross = CrossAttention(dim, num_heads), Mlp(dim, 4 * dim)
        self.drop_path = rate
        self.gamma_1_cross, self.gamma_2_cross = (
            nn.Parameter(torch.full((dim,), layer_scale)) if layer_scale else None for _ in range(2))

    residual = Block.residual                                   # layer scale and drop path, as in the ViT

    def forward(self, x, pos, visible, pos_visible):
        """x, pos (B, M, D) of the hidden patches; visible, pos_visible (B, V, D) -> (B, M, D)"""
        kv = torch.cat([visible, x], 1)                                                     # (B, V + M, D)
        k = self.norm1_k(kv + torch.cat([pos_visible, pos], 1))
        x = x + self.residual(self.cross_attn(self.norm1_q(x + pos), k, self.norm1_v(kv)), self.gamma_1_cross)
        x = self.norm2_cross(x)
        return x + self.residual(self.mlp_cross(x), self.gamma_2_cross)


class CAE(nn.Module):
    """Encoder (a ViT), regressor, decoder and both losses."""

    def __init__(self, encoder, num_out, num_masked=98, regressor_depth=4, decoder_depth=4, decoder_dim=0,
                 decoder_heads=0, layer_scale=0.1, drop_path=0.0, align_weight=2.0, target="tokens",
                 momentum=0.0):
        super().__init__()
        self.num_masked, self.align_weight, self.target = num_masked, align_weight, target
        C, grid = encoder.config["embed_dim"], encoder.config["img_size"] // encoder.config["patch_size"]
        D, heads = decoder_dim or C, decoder_heads or encoder.config["num_heads"]
        self.encoder = encoder
        encoder.pos_embed.data.copy_(row_first_pos_embed(C, grid))
        self.encoder_to_decoder = nn.Identity() if D == C else nn.Linear(C, D)
        self.encoder_to_decoder_norm = nn.Identity() if D == C else nn.LayerNorm(D, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(row_first_pos_embed(D, grid)[:, 1:], requires_grad=False)  # (1, N, D)
        rates, decoder_rates = (np.linspace(0, drop_path, depth).tolist()
                                for depth in (regressor_depth, decoder_depth))
        self.regressor_blocks = nn.ModuleList(
            RegressorBlock(D, heads, rate, layer_scale) for rate in rates)
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.decoder_blocks = nn.Sequential(
            *(Block(D, heads, drop_path=rate, layer_scale=layer_scale) for rate in decoder_rates))
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, num_out)                       # K codes, or the P values of a patch
        self.apply(init_weights)
        for p in (self.mask_token, encoder.cls_token):
            init_cut(p)
        self.teacher = copy.deepcopy(encoder).requires_grad_(False) if momentum else None

    def encode(self, encoder, imgs, ids):
        """Some patches of the images: (B, 3, H, W), ids (B, n) -> latents (B, n, D), no class token"""
        patches, pos = patches_of(imgs, encoder.config["patch_size"]), encoder.pos_embed    # (B, N, P), ...
        x = encoder.patch_embed.embed(take(patches, ids)) + pos[0, 1:][ids]                 # (B, n, C)
        x = torch.cat([(encoder.cls_token + pos[:, :1]).expand(len(x), -1, -1), x], 1)
        x = encoder.norm(encoder.forward_blocks(x)[-1])[:, 1:]
        return self.encoder_to_decoder_norm(self.encoder_to_decoder(x))

    def regress(self, visible, ids_visible, ids_hidden):
        """Latents of the visible patches (B, V, D) -> those of the hidden ones, predicted, (B, M, D)"""
        pos, pos_visible = self.pos_embed[0][ids_hidden], self.pos_embed[0][ids_visible]
        x = self.mask_token.to(visible.dtype).expand(*ids_hidden.shape, -1)                 # (B, M, D)
        for block in self.regressor_blocks:
            x = block(x, pos, visible, pos_visible)
        return self.norm(x)

    def decode(self, latent, ids):
        """Latents of some patches (B, n, D), whose indices are ids (B, n) -> logits (B, n, K) or pixels"""
        x = self.decoder_blocks(latent + self.pos_embed[0][ids])
        return self.head(self.norm2(x)).float()

    def prediction_loss(self, pred, target):
        """Of hidden patches: pred (B, M, K), target (B, M) codes, or (B, M, P) both. -> loss, share right"""
        if self.target == "pixels":
            return (pred - target).square().mean(), pred.new_zeros(())
        accuracy = (pred.argmax(-1) == target).float().mean()
        return F.cross_entropy(pred.flatten(0, 1), target.flatten()), accuracy

    def forward(self, imgs, target, mask):
        """target: codes (B, N) long, or pixels (B, N, P); mask (B, N) bool. -> loss, {name: what to log}"""
        ids_hidden, ids_visible = split_ids(mask, self.num_masked)                          # (B, M), (B, V)
        visible = self.encode(self.encoder, imgs, ids_visible)                              # (B, V, D)
        latent_pred = self.regress(visible, ids_visible, ids_hidden)                        # (B, M, D)
        pred = self.decode(latent_pred, ids_hidden)                                         # (B, M, K)
        with torch.no_grad():
            latent = self.encode(self.teacher or self.encoder, imgs, ids_hidden).float()    # (B, M, D)
        on_pred, accuracy = self.prediction_loss(pred, take(target, ids_hidden))
        latent_pred = latent_pred.float()
        align = (latent_pred - latent).square().mean()
        spread, spread_pred = (x.detach().flatten(0, 1).var(0).mean() for x in (latent, latent_pred))
        logs = {"prediction": on_pred, "accuracy": accuracy, "align": align, "r2": 1 - align / spread,
                "target_std": spread.sqrt(), "pred_std": spread_pred.sqrt()}
        return on_pred + self.align_weight * align, logs

    def features(self, imgs):
        """(B, 3, H, W) -> (B, C): the mean of the patch tokens of the whole image"""
        return self.encoder.forward_features(imgs)[:, 1:].mean(1)


def init_weights(module):
    """The official initialisation: linear layers Xavier uniform, convolutions N(0, 0.02^2) cut at one std."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    if isinstance(module, nn.Conv2d):
        init_cut(module.weight)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def official_names(content, momentum=0.0):
    """A pre-training file of lxtGH/CAE, in either of its layouts -> a state dict under our names.

    With momentum the copy of the encoder is the file's, or, where the file has none, its encoder."""
    state = renamed(official_state(content), {
        r"^(pretext_neck|regresser)\.": "", r"^decoder\.norm\.": "norm2.", r"^decoder\.": "",
        "^encoder_to_regresser": "encoder_to_decoder", r"^alignment_encoder\.": "teacher.",
        r"cross_attn\.([qv])_bias$": r"cross_attn.\1.bias", "^rd_pos_embed$": None})     # it is fixed
    if "encoder.blocks.0.gamma_1" not in state:                 # no layer scale: the rest are frozen ones
        state = renamed(state, {"gamma_": None})
    if not momentum:
        return renamed(state, {r"^teacher\.": None})
    return renamed(state, {r"^(?!encoder\.)": None, r"^encoder\.": "teacher."}) | state


@torch.no_grad()
def direct(model, imgs, target, mask):
    """Loss and share of right codes at the hidden patches, decoded from the regressor's predictions and
    straight from the encoder's latents of the same patches: near each other if both speak one language."""
    model.eval()
    ids_hidden, ids_visible = split_ids(mask, model.num_masked)
    latent_pred = model.regress(model.encode(model.encoder, imgs, ids_visible), ids_visible, ids_hidden)
    latent, target, result = model.encode(model.encoder, imgs, ids_hidden), take(target, ids_hidden), {}
    for name, x in (("regressor", latent_pred), ("direct", latent)):
        loss, accuracy = model.prediction_loss(model.decode(x, ids_hidden), target)
        result |= {f"{name}_loss": loss.item(), f"{name}_accuracy": accuracy.item()}
    model.train()
    return result


@torch.no_grad()
def pictures(model, tokenizer, views, mask, source, path, norm_pix_loss=True):
    """Rows: image, visible part, prediction pasted into it, all patches decoded straight from the encoder."""
    imgs, p, (B, N) = views[0], model.encoder.config["patch_size"], mask.shape
    model.eval()
    ids_hidden, ids_visible = split_ids(mask, model.num_masked)
    everywhere = torch.arange(N, device=imgs.device).expand(B, -1)
    latent = model.regress(model.encode(model.encoder, imgs, ids_visible), ids_visible, ids_hidden)
    pred = model.decode(latent, ids_hidden)                                                 # (B, M, K or P)
    straight = model.decode(model.encode(model.encoder, imgs, everywhere), everywhere)      # (B, N, K or P)
    model.train()
    if model.target == "pixels":
        _, mean, std = norm_patches(patches_of(imgs, p), norm_pix_loss, unbiased=False)     # (B, N, 1) each

        def paint(x):
            return data.to_pixels(image_of(x * std + mean, p), source)
        everything = straight.scatter(1, ids_hidden[:, :, None].expand(-1, -1, pred.shape[2]), pred)
        best, title = {}, "brightness and contrast of the patches are the true ones" * norm_pix_loss
    else:
        codes = tokenizer.tokens(views[1])
        paint, best, note = painter(tokenizer, codes, imgs.shape[-1])
        everything, straight = codes.scatter(1, ids_hidden, pred.argmax(-1)), straight.argmax(-1)
        hits = pred.argmax(-1) == take(codes, ids_hidden)
        title = (f"right codes{note}: {hits.float().mean():.1%} of the hidden ones, "
                 f"{(straight == codes).float().mean():.1%} straight from the encoder")
    image = data.to_pixels(imgs, source)
    rows = {"image": image, "visible": data.hide(image, mask),
            "predicted, painted": data.hide(image, mask, paint(everything)),
            "straight from\nthe encoder": paint(straight)}
    data.save_rows(path, rows | best, title)


def main():
    args = data.parse_args(__doc__, RECIPE)
    data.check_masked(args)
    width, heads = (args.decoder_dim or SIZES[args.model]["embed_dim"],
                    args.decoder_heads or SIZES[args.model]["num_heads"])
    if width % heads or width % 4:
        data.stop(f"--decoder_dim {width} must be divisible by 4 and by --decoder_heads {heads}")
    device = data.setup(args)
    train_set, val_set = data.load_sets(args)
    tokenizer = prepare_tokenizer(args) if args.target == "tokens" else None
    size = tokenizer.img_size if tokenizer else 0               # of the second view, for the tokenizer
    loader = data.Loader(args, train_set, [data.View(args.img_size, scale=(args.crop_scale, 1.0), flip=0.5,
                                                     tokenizer_size=size)])

    encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model], pos="sincos",
                  layer_scale=args.layer_scale, drop_path=args.drop_path)
    num_out = tokenizer.vocab if tokenizer else 3 * args.patch_size ** 2
    model = CAE(encoder, num_out, args.num_masked, args.regressor_depth, args.decoder_depth, args.decoder_dim,
                args.decoder_heads, args.layer_scale, args.drop_path, args.align_weight, args.target,
                args.momentum).to(device)
    if args.init:
        fixed = [name for name in model.state_dict() if name.endswith("pos_embed")]
        load_init(model, args, lambda content: official_names(content, args.momentum), fixed)
    net = data.wrap(model, args)                                # compiled, in DDP; `model` itself is saved
    optimizer = torch.optim.AdamW(param_groups(model, args.weight_decay, no_decay=()), lr=args.lr,
                                  betas=(0.9, 0.999), fused="mps" not in args.device)
    scaler = data.make_scaler(args)
    state = dict(model=model, optimizer=optimizer, scaler=scaler)
    start = data.load_checkpoint(args, **state)
    whole = data.View(args.img_size, tokenizer_size=size)
    trivial, levels = data.trivial_loss(args, val_set, tokenizer, whole)
    tokenize = data.compiled(tokenizer.tokens, args) if tokenizer else None
    level = levels.pop("loss")                                  # of the prediction alone
    log = data.open_log(args, model, loader, start, f"prediction {trivial}; alignment: R2 0",
                        prediction=level, _loss=level, r2=0.0, **levels)

    def evaluate(step):
        torch.manual_seed(0)                                    # the same masks every time
        views = data.some_images(args, val_set, 200, whole)
        mask = data.draw_masks(args, len(views[0]), "on")
        target = tokenizer.tokens(views[1]) if tokenizer else norm_patches(
            patches_of(views[0], args.patch_size), args.norm_pix_loss, unbiased=False)[0]
        result = direct(model, views[0], target, mask)
        pictures(model, tokenizer, [view[:8] for view in views], mask[:8], val_set, log.picture(step),
                 args.norm_pix_loss)
        log.write(step, **result, **data.knn_monitor(args, model, train_set, val_set))

    if log.evaluates(start):
        evaluate(start)                                         # what an untrained network can do
    for step, parts in loader.steps(start, net):
        lr = set_lr(optimizer, cosine_lr(step / loader.epoch_steps, args, early=1 / loader.epoch_steps))
        for views, _ in parts:                                  # the labels are never used
            imgs = views[0]
            mask = data.draw_masks(args, len(imgs), "on")
            with data.autocast(args):
                with torch.no_grad():                           # the tokenizer is frozen
                    target = tokenize(views[1]) if tokenizer else norm_patches(
                        patches_of(imgs, args.patch_size), args.norm_pix_loss, unbiased=False)[0]
                loss, logs = net(imgs, target, mask)
            scaler.scale(loss / args.accum_steps).backward()    # the gradients of the parts add up
            log.note(loss=loss, **logs)
        if args.clip_grad:
            scaler.unscale_(optimizer)                          # undo fp16's loss scaling before clipping
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        if args.momentum:
            update_ema(model.teacher, encoder, args.momentum)   # before the step, as in the official code
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
