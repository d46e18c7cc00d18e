"""CAE: numbers of the official implementation, and who may see what."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import cae
import data
import dvae
import vit
from test_runs import run, shrink
from vit import ViT, param_groups, sincos_pos_embed


def tiny_cae(vocab=96, num_masked=32, **options):
    torch.manual_seed(0)
    encoder = ViT(img_size=32, patch_size=4, embed_dim=32, depth=3, num_heads=4, pos="sincos",
                  layer_scale=0.1)
    return cae.CAE(encoder, vocab, num_masked, **dict(regressor_depth=2, decoder_depth=2) | options)


def masks(B, num_masked=32, masking="block"):
    args = SimpleNamespace(masking=masking, grid=8, num_masked=num_masked, min_block=4, device="cpu")
    return data.draw_masks(args, B, "on")


def batch(B=4, vocab=96):
    torch.manual_seed(1)
    return torch.randn(B, 3, 32, 32), torch.randint(vocab, (B, 64)), masks(B)


def ours(arrays):
    """Official names to ours: no neck, one fused bias (its part for the keys is zero), q.bias for q_bias."""
    found = {}
    for name, value in arrays.items():
        name = name.replace("pretext_neck.", "")
        if "cross_attn" in name:
            name = name.replace("_bias", ".bias")
        elif name.endswith("q_bias"):
            v_bias = next(v for n, v in arrays.items()
                          if n.replace("pretext_neck.", "") == name.replace("q_bias", "v_bias"))
            name, value = name.replace("q_bias", "qkv.bias"), torch.cat([value, 0 * value, v_bias])
        if not name.endswith("v_bias"):
            found[name] = value
    return found


@pytest.fixture
def official(golden):
    """The official model, with its own teacher; positions are ours, so they are compared, too."""
    model = tiny_cae(momentum=0.9)
    weights = ours(golden("cae", "w/") | golden("cae_teacher", "w/"))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) == {"pos_embed", "encoder.pos_embed", "teacher.pos_embed"} and not unexpected
    return model


# ---- the official numbers ----


def test_official_latents_logits_and_losses(golden, close, official):
    """Positions row first; regressor, target of the hidden patches, logits, both losses to 1e-5."""
    arrays, model = golden("cae"), official
    close(model.encoder.pos_embed, arrays["pos_embed"])
    imgs, ids, mask = arrays["images"], arrays["token_ids"].long(), arrays["mask"]
    hidden, visible = cae.split_ids(mask, 32)
    latent = model.regress(model.encode(model.encoder, imgs, visible), visible, hidden)
    close(latent[:1], arrays["latent_pred"])
    close(model.encode(model.teacher, imgs, hidden)[:1], arrays["latent_target"])
    close(model.decode(latent, hidden)[0], arrays["logits"])
    loss, logs = model(imgs, ids, mask)
    close(loss, arrays["loss"], 1e-6)
    close(logs["prediction"], arrays["loss_main"], 1e-6)
    close(2 * logs["align"], arrays["loss_align"], 1e-6)


def test_official_gradients(golden, close, official):
    """Gradients of all parts, but the keys' norm bias, whose is noise."""
    arrays, model = golden("cae"), official
    model(arrays["images"], arrays["token_ids"].long(), arrays["mask"])[0].backward()
    gradients, found = ours(golden("cae_teacher", "grad/")), dict(model.named_parameters())
    assert len(gradients) > 80
    for name, gradient in gradients.items():
        if not name.endswith("norm1_k.bias"):
            close(found[name].grad, gradient)


@pytest.mark.parametrize("parts", (1, 2))
def test_official_momentum(parts, tmp_path, golden, close):
    """The script starts from the official weights: its copy of the encoder moves once in a step, before the
    encoder does, to the official values; then on by the momentum.
    """
    tokenizer = dvae.DVAE(grid=8, stride=4, n_hid=8, vocab=96)
    torch.save({"model": tokenizer.state_dict(), "config": tokenizer.config, "method": "dvae"},
               tmp_path / "tokenizer.pt")
    torch.save({"model": golden("cae", "w/") | golden("cae_teacher", "w/")}, tmp_path / "official.pth")
    seen, forward = [], cae.CAE.forward

    def watched(model, *args):
        seen.append([{name: p.detach().clone() for name, p in network.named_parameters()}
                     for network in (model.encoder, model.teacher)])
        return forward(model, *args)

    def prepare(patch):
        shrink(patch)
        patch.setitem(vit.SIZES, "micro", dict(embed_dim=32, depth=3, num_heads=4))
        patch.setattr(cae.CAE, "forward", watched)
    run(f"cae.py --data shapes --device cpu --model micro --batch_size 20 --accum_steps {parts} "
        f"--max_steps 3 --momentum 0.9 --lr 1e-2 --warmup_epochs 0 --tokenizer {tmp_path}/tokenizer.pt "
        f"--init {tmp_path}/official.pth --output_dir {tmp_path}/run", prepare)
    assert len(seen) == 3 * parts
    after = ours(golden("cae_teacher", "teacher_after/"))
    assert len(after) > 30
    for name, value in after.items():
        close(seen[parts][1][name], value)
    for (encoder, teacher), (later, moved) in zip(seen[::parts], seen[parts::parts]):
        assert not torch.equal(encoder["norm.weight"], later["norm.weight"])
        for name in teacher:
            close(moved[name], 0.9 * teacher[name] + 0.1 * encoder[name])


def test_row_first_positions():
    """sin and cos of the row come first, of the column second: MAE's table with its halves exchanged."""
    pos = cae.row_first_pos_embed(16, 4)[0]
    w = [10000 ** (-k / 4) for k in range(4)]
    for row in range(4):
        for col in range(4):
            wanted = [f(place * x) for place in (row, col) for f in (math.sin, math.cos) for x in w]
            assert pos[1 + 4 * row + col].tolist() == pytest.approx(wanted, abs=1e-6)
    assert (pos[0] == 0).all()
    mae = sincos_pos_embed(16, 4)[0]
    assert torch.equal(pos, torch.cat([mae[:, 8:], mae[:, :8]], 1))


def test_official_initialisation_and_groups():
    """Xavier bounds by hand, patches and tokens cut at 0.02, biases 0; tokens are decayed, too."""
    model = tiny_cae()
    for name, bound in {"encoder.blocks.0.attn.qkv.weight": (6 / 128) ** 0.5,
                        "regressor_blocks.1.cross_attn.q.weight": (6 / 64) ** 0.5,
                        "head.weight": (6 / 128) ** 0.5, "encoder.patch_embed.proj.weight": 0.02,
                        "mask_token": 0.02, "encoder.cls_token": 0.02}.items():
        largest = dict(model.named_parameters())[name].abs().max().item()
        assert 0.85 * bound < largest <= bound + 1e-7, name
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))
    assert model.regressor_blocks[0].cross_attn.k.bias is None
    decayed = {id(p) for group in param_groups(model, 0.05, no_decay=()) if group["weight_decay"]
               for p in group["params"]}
    assert id(model.mask_token) in decayed and id(model.encoder.cls_token) in decayed
    assert id(model.encoder.pos_embed) not in decayed and not model.pos_embed.requires_grad


# ---- who sees what ----


def test_split_of_a_mask():
    """Hidden and visible numbers, each in raster order, none twice."""
    mask = masks(5, 20, "random")
    hidden, visible = cae.split_ids(mask, 20)
    for b in range(5):
        assert hidden[b].tolist() == [i for i in range(64) if mask[b, i]]
        assert visible[b].tolist() == [i for i in range(64) if not mask[b, i]]


def test_the_encoder_never_sees_hidden_pixels_and_the_decoder_no_visible_latents():
    """Other hidden pixels move the target only; the decoder's input is the prediction alone."""
    model, (imgs, ids, mask) = tiny_cae(), batch()
    hidden, visible = cae.split_ids(mask, 32)
    hole = F.interpolate(mask.float().view(-1, 1, 8, 8), scale_factor=4).bool()
    seen = model.encode(model.encoder, imgs, visible)
    assert torch.equal(model.encode(model.encoder, torch.where(hole, 5.0, imgs), visible), seen)
    latent = model.regress(seen, visible, hidden)
    read = []
    model.decoder_blocks[0].register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    model.decode(latent, hidden)
    assert read[0].shape == (4, 32, 32) and torch.equal(read[0], latent + model.pos_embed[0][hidden])


def test_no_gradient_reaches_the_target():
    """Alignment alone: the encoder learns through the visible patches, not through the hidden ones."""
    model, (imgs, ids, mask) = tiny_cae(), batch()
    made = []
    encode = model.encode
    model.encode = lambda *args: made.append(encode(*args)) or made[-1]
    model(imgs, ids, mask)
    assert [latent.requires_grad for latent in made] == [True, False]
    assert tiny_cae().teacher is None
    assert not any(p.requires_grad for p in tiny_cae(momentum=0.9).teacher.parameters())


def test_loss_by_hand():
    """Cross-entropy and squared error over the hidden patches of all images; R2 and deviations as logged."""
    model, (imgs, ids, mask) = tiny_cae(align_weight=3.0), batch()
    hidden, visible = cae.split_ids(mask, 32)
    pred = model.regress(model.encode(model.encoder, imgs, visible), visible, hidden)
    target = model.encode(model.encoder, imgs, hidden)
    logits = model.decode(pred, hidden)
    terms = [-logits[b, n].log_softmax(0)[ids[b, i]] for b in range(4) for n, i in enumerate(hidden[b])]
    align = sum((pred[b, n] - target[b, n]).square().mean() for b in range(4) for n in range(32)) / 128
    loss, logs = model(imgs, ids, mask)
    assert torch.allclose(loss, sum(terms) / 128 + 3 * align, rtol=1e-5)
    spread = target.reshape(128, 32).var(0).mean()
    assert logs["r2"].item() == pytest.approx((1 - align / spread).item(), rel=1e-4)
    assert logs["target_std"].item() == pytest.approx(spread.sqrt().item(), rel=1e-5)


def test_direct_decoding():
    """From the regressor's predictions as in training; from the encoder's latents of the same patches."""
    model, (imgs, ids, mask) = tiny_cae(), batch()
    result, (_, logs) = cae.direct(model, imgs, ids, mask), model(imgs, ids, mask)
    assert result["regressor_loss"] == pytest.approx(logs["prediction"].item(), rel=1e-5)
    hidden, _ = cae.split_ids(mask, 32)
    logits = model.decode(model.encode(model.encoder, imgs, hidden), hidden)
    target = ids.gather(1, hidden)
    wanted = F.cross_entropy(logits.flatten(0, 1), target.flatten()).item()
    assert result["direct_loss"] == pytest.approx(wanted, rel=1e-5)
    assert result["direct_accuracy"] == (logits.argmax(-1) == target).float().mean().item()


def pixel_targets(imgs, norm=True):
    return vit.norm_patches(vit.patches_of(imgs, 4), norm, unbiased=False)[0]


def test_pixel_targets():
    """Each patch by its own mean and biased variance, channel first, or as it is; float32."""
    imgs = torch.randn(2, 3, 32, 32)
    patch = imgs[1, :, 8:12, 4:8].flatten()                     # row 2, column 1
    wanted = (patch - patch.mean()) / (patch.var(unbiased=False) + 1e-6).sqrt()
    assert torch.allclose(pixel_targets(imgs)[1, 17], wanted, atol=1e-5)
    assert torch.equal(pixel_targets(imgs, norm=False)[1, 17], patch)
    assert pixel_targets(imgs.bfloat16(), norm=False).dtype == torch.float32


# ---- training ----


@pytest.mark.parametrize("options", ({}, dict(target="pixels", vocab=48), dict(momentum=0.9),
                                     dict(decoder_dim=48, decoder_heads=3)))
def test_one_batch_is_overfitted(options):
    """Real steps bring both losses down, and every weight gets a gradient, in every form of the model."""
    model, (_, ids, mask) = tiny_cae(**options), batch(2)
    imgs = data.draw_shapes(2, 32, seed=0)[0].float() / 127.5 - 1
    target = pixel_targets(imgs) if "target" in options else ids
    optimizer = torch.optim.AdamW(param_groups(model, 0.05, no_decay=()), lr=3e-3)
    losses = []
    for _ in range(60):
        loss, logs = model(imgs, target, mask)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses


def test_pictures_of_all_targets(tmp_path):
    """A file with the rows of each kind of target; pixels that are right are the image itself."""
    source = SimpleNamespace(mean=(0.5,) * 3, std=(0.5,) * 3)
    tokenizer, pixels = dvae.DVAE(grid=8, stride=4, n_hid=8, vocab=96), torch.rand(2, 3, 32, 32)
    (imgs, _, mask), rows = batch(2), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "save_rows", lambda path, found, title: rows.append(found))
        cae.pictures(tiny_cae(), tokenizer, [imgs, pixels], mask, source, tmp_path)
        cae.pictures(tiny_cae(48, target="pixels"), None, [imgs], mask, source, tmp_path)
        for norm in (True, False):
            model, target = tiny_cae(48, target="pixels"), pixel_targets(2 * pixels - 1, norm)
            patch.setattr(model, "decode", lambda latents, ids: vit.take(target, ids))
            cae.pictures(model, None, [2 * pixels - 1], mask, source, tmp_path, norm)
    assert [len(found) for found in rows] == [5, 4, 4, 4]
    for found in rows[2:]:
        assert all(torch.allclose(row, pixels, atol=1e-4) for name, row in found.items() if name != "visible")
    hole = F.interpolate(mask.float().view(-1, 1, 8, 8), scale_factor=4).expand(-1, 3, -1, -1).bool()
    for found in rows:
        assert all(row.shape == (2, 3, 32, 32) for row in found.values())
        assert torch.equal(found["predicted, painted"][~hole], found["image"][~hole])


@pytest.mark.parametrize("flags, words", (("--num_masked 64", "--num_masked 64 must lie between 1 and 63"),
                                          ("--decoder_dim 30", "--decoder_dim 30 must be divisible by 4")))
def test_wrong_flags(flags, words, monkeypatch, capsys):
    """One sentence before anything is begun."""
    monkeypatch.setattr("sys.argv", ["cae.py", "--data", "shapes", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        cae.main()
    assert stopped.value.code == 2 and words in capsys.readouterr().err
