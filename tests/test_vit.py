"""The ViT and the judge: numbers of the official implementations, and slow references for every part."""
import argparse
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import vit
from vit import ViT


def tiny_vit(**options):
    torch.manual_seed(0)
    return ViT(**dict(img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3) | options)


# ---- official numbers ----


def test_official_classifier(golden, close):
    """timm's ViT as facebookresearch/mae uses it: features, logits, loss and gradients to 1e-5."""
    arrays, model = golden("vit"), tiny_vit(num_classes=10).eval()
    model.load_state_dict(golden("vit", "w/"))
    logits = model(arrays["images"])
    close(model.features(arrays["images"]), arrays["features"])
    close(logits, arrays["logits"])
    _, target = data.mixup_cutmix(arrays["images"], arrays["labels"], 10, 0.0, 0.0, 0.1)
    loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
    close(loss, arrays["loss_ls01"], 1e-6)
    loss.backward()
    gradients = golden("vit", "grad/")
    assert len(gradients) >= 5
    for name, gradient in gradients.items():
        close(dict(model.named_parameters())[name].grad, gradient)


def test_official_drop_path(golden, close, monkeypatch):
    """The official branches are dropped for the official uniform numbers, and the others scaled."""
    arrays, model = golden("vit"), tiny_vit(num_classes=10, drop_path=0.2).train()
    model.load_state_dict(golden("vit", "w/"))
    drawn = iter(arrays["drop_path_uniforms"])
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: next(drawn).view(shape))
    close(model(arrays["images"]), arrays["logits_train_droppath"])


def test_official_beit_finetuning_model(golden, close):
    """unilm/beit with a bias table per block, layer scale, mean pooling, no absolute positions."""
    arrays = golden("vit_beit")
    model = tiny_vit(depth=2, num_classes=10, pool="mean", pos="none", rel_pos="block", layer_scale=0.1)
    weights = golden("vit_beit", "w/")
    for i in range(2):
        q, v = weights.pop(f"blocks.{i}.attn.q_bias"), weights.pop(f"blocks.{i}.attn.v_bias")
        weights[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        name = "relative_position_bias_table"
        weights[f"blocks.{i}.rel_pos_bias.{name}"] = weights.pop(f"blocks.{i}.attn.{name}")
    model.load_state_dict(weights)
    images = golden("vit")["images"]
    close(model.features(images), arrays["features"])
    logits = model(images)
    close(logits, arrays["logits"])
    loss = F.cross_entropy(logits, torch.tensor([3, 0, 7]))
    close(loss, arrays["loss"], 1e-6)
    loss.backward()
    found = {name.replace("rel_pos_bias", "attn"): p.grad for name, p in model.named_parameters()}
    for i in range(2):
        found[f"blocks.{i}.attn.q_bias"], _, found[f"blocks.{i}.attn.v_bias"] = found[
            f"blocks.{i}.attn.qkv.bias"].chunk(3)
    for name, gradient in golden("vit_beit", "grad/").items():
        close(found[name], gradient)


def test_official_mae_weights_in_the_classifier(golden, close):
    """MAE's encoder, loaded through the loader, gives the official class-token features."""
    arrays, model = golden("mae"), tiny_vit(pos="sincos", num_classes=10)
    state = golden("mae", "w/") | {"pos_embed": model.pos_embed.detach()}
    state = {name: value for name, value in state.items() if not name.startswith(("decoder", "mask"))}
    vit.load_weights(model, state, "golden")
    close(model.features(arrays["images"]), arrays["features"])


def test_official_positions(golden, close):
    arrays = golden("vit")
    close(vit.sincos_pos_embed(192, 8)[0, 1::7], arrays["sincos_192_g8_nocls"])
    assert (vit.sincos_pos_embed(192, 8)[0, 0] == 0).all()
    close(vit.interpolate_pos_embed(arrays["interp_in"], 12), arrays["interp_out"])
    tables = golden("vit_beit")
    for grid in (6, 12):
        close(vit.interpolate_rel_pos(tables[f"interp_8to{grid}_in"], grid), tables[f"interp_8to{grid}_out"])
    assert torch.equal(vit.RelPosBias(2, 1).relative_position_index, tables["index_2x2"].long())


def test_official_attentive_block(golden, close):
    """CAE's attentive probe: pooled features of the published module."""
    state, inputs = {}, golden("vit", "attentive/")
    for name, value in golden("vit", "attentive/sd/").items():
        name = name.replace("q_bias", "q.bias").replace("v_bias", "v.bias")
        state[name.replace("norm1_", "norm_")] = value
    pool = vit.Probe("attentive", 32, 10, num_heads=4).pool
    pool.load_state_dict(state | {"query": inputs["in/query"]})
    close(pool(inputs["in/features"]), inputs["out/pooled"][:, 0])


@pytest.mark.parametrize("name, recipe", [
    ("pretrain_b4096", dict(lr=2.4e-3, min_lr=0.0, warmup_epochs=40, epochs=800)),
    ("finetune_b1024", dict(lr=2e-3, min_lr=1e-6, warmup_epochs=5, epochs=100)),
    ("linprobe_b16384", dict(lr=6.4, min_lr=0.0, warmup_epochs=10, epochs=90)),
    ("scratch_b4096", dict(lr=1.6e-3, min_lr=0.0, warmup_epochs=20, epochs=300))])
def test_official_learning_rates(golden, close, name, recipe):
    arrays = golden("vit")
    found = [vit.cosine_lr(e, argparse.Namespace(**recipe)) for e in arrays[f"{name}_epochs"].tolist()]
    close(found, arrays[f"{name}_lr"])


@pytest.mark.parametrize("steps", (0, 1, 2, 5, 15))
def test_early_warmup_is_linspace(steps):
    """With early = 1 / epoch_steps the warm-up of BEiT's, CAE's and iBOT's code, which reaches the peak at
    its last step, then the cosine from the step after it on; without it the peak is where the cosine begins.
    """
    epoch_steps, epochs, lr, least = 5, 6, 3e-3, 1e-4
    total, args = epochs * epoch_steps, argparse.Namespace(lr=lr, min_lr=least, warmup_epochs=steps / 5,
                                                           epochs=epochs)
    fall = [least + (lr - least) * (1 + math.cos(math.pi * i / (total - steps))) / 2
            for i in range(total - steps)]
    for early, ramp in ((1 / epoch_steps, np.linspace(0, lr, steps)),
                        (0.0, np.linspace(0, lr, steps, endpoint=False))):
        found = [vit.cosine_lr(step / epoch_steps, args, early=early) for step in range(total)]
        assert found == pytest.approx([*ramp, *fall], rel=1e-9, abs=1e-12)
    assert vit.cosine_lr(steps / 10, args) == vit.cosine_lr(steps / 10, args, early=0.0)


# ---- parts ----


def test_cross_attention_against_loops():
    """Of three sources: softmax(q k^T / sqrt(d)) v, one query and one head after the other."""
    torch.manual_seed(0)
    attn, (a, b, c) = vit.CrossAttention(12, 3), (torch.randn(2, n, 12) for n in (4, 5, 5))
    assert attn.k.bias is None
    q, k, v = a @ attn.q.weight.T + attn.q.bias, b @ attn.k.weight.T, c @ attn.v.weight.T + attn.v.bias
    wanted = torch.empty(2, 4, 12)
    for i in range(2):
        for m in range(4):
            for h in (slice(0, 4), slice(4, 8), slice(8, 12)):
                weights = torch.stack([q[i, m, h] @ k[i, n, h] / 2 for n in range(5)]).softmax(0)
                wanted[i, m, h] = sum(weights[n] * v[i, n, h] for n in range(5))
    assert torch.allclose(attn(a, b, c), wanted @ attn.proj.weight.T + attn.proj.bias, atol=1e-6)


def test_patches_and_images_are_inverse():
    """Patches in raster order, the values of each channel first; and back to the same image."""
    imgs = torch.randn(2, 3, 12, 12)
    patches = vit.patches_of(imgs, 4)
    assert patches.shape == (2, 9, 48)
    for i in range(9):
        r, c = i // 3 * 4, i % 3 * 4
        assert torch.equal(patches[:, i], imgs[:, :, r:r + 4, c:c + 4].flatten(1))
    assert torch.equal(vit.image_of(patches, 4), imgs)


@pytest.mark.parametrize("unbiased", (True, False))
def test_normalised_patches_by_hand(unbiased):
    """Mean, and root of variance + 1e-6: over n - 1 (MAE, BEiT) or n values (CAE); half precision, too."""
    torch.manual_seed(0)
    for kind in (torch.float32, torch.bfloat16):
        patches = (torch.randn(2, 3, 12) * 0.01 + 5).to(kind)
        target, mean, std = vit.norm_patches(patches, unbiased=unbiased)
        assert {x.dtype for x in (target, mean, std)} == {torch.float32}
        assert (target.shape, mean.shape, std.shape) == ((2, 3, 12), (2, 3, 1), (2, 3, 1))
        for b in range(2):
            for i in range(3):
                values = patches[b, i].tolist()
                m = sum(values) / 12
                s = math.sqrt(sum((x - m) ** 2 for x in values) / (11 if unbiased else 12) + 1e-6)
                assert mean[b, i].item() == pytest.approx(m)
                assert std[b, i].item() == pytest.approx(s, rel=1e-4)
                assert target[b, i].tolist() == pytest.approx([(x - m) / s for x in values], abs=1e-3)


@pytest.mark.parametrize("shape", ((16, 64), (48, 24), (64, 16), (30, 30)))
def test_images_that_patches_do_not_tile_are_refused(shape):
    """Not square, if only in number of patches, or a side that the patch does not divide: one sentence with
    the shape, from patches_of and both stems, so from every model."""
    imgs = torch.randn(2, 3, *shape)
    readers = (lambda x: vit.patches_of(x, 8), vit.PatchEmbed(8, 16), vit.PatchEmbed(8, 16, "conv"),
               tiny_vit(patch_size=8).features, tiny_vit(patch_size=8, stem="conv").features)
    for reader in readers:
        with pytest.raises(AssertionError, match=f"2, 3, {shape[0]}, {shape[1]}"):
            reader(imgs)
        assert reader(torch.randn(2, 3, 32, 32)).shape[0] == 2


def slow_spline(knots, values, places):
    """A not-a-knot cubic spline by its second derivatives, one place after the other."""
    n, h = len(knots), np.diff(knots)
    system, right = np.zeros((n, n)), np.zeros(n)
    for i in range(1, n - 1):                                   # equal slopes left and right of a knot
        system[i, i - 1:i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        right[i] = 6 * ((values[i + 1] - values[i]) / h[i] - (values[i] - values[i - 1]) / h[i - 1])
    system[0, :3] = h[1], -h[0] - h[1], h[0]                    # equal third derivatives at the second knot
    system[-1, -3:] = h[-1], -h[-2] - h[-1], h[-2]              # and at the last but one
    curve, read = np.linalg.solve(system, right), []
    for x in places:
        i = max(j for j in range(n - 1) if knots[j] <= x)
        a, b = (knots[i + 1] - x) / h[i], (x - knots[i]) / h[i]
        read.append(a * values[i] + b * values[i + 1]
                    + h[i] ** 2 / 6 * ((a ** 3 - a) * curve[i] + (b ** 3 - b) * curve[i + 1]))
    return np.array(read)


@pytest.mark.parametrize("n, ratio", ((5, 1.5), (15, 1.2), (27, 1.1), (27, 1.01), (55, 1.01)))
def test_spline_against_second_derivatives(n, ratio):
    """Knots as interpolate_rel_pos spreads them, up to those of 28 x 28 patches; a cubic is read exactly."""
    reach = np.cumsum(ratio ** np.arange(n // 2))
    knots, values = np.concatenate([-reach[::-1], [0], reach]), np.random.default_rng(0).standard_normal(n)
    places = np.linspace(knots[0], knots[-1], 40)
    matrix = vit.spline_matrix(knots, places)
    assert np.allclose(matrix @ values, slow_spline(knots, values, places), rtol=0, atol=1e-8)
    cubic = np.poly1d([1.0, -2.0, 0.5, 3.0])
    assert np.allclose(matrix @ cubic(knots / reach[-1]), cubic(places / reach[-1]), rtol=0, atol=1e-8)
    assert np.allclose(vit.spline_matrix(knots, knots), np.eye(n), rtol=0, atol=1e-8)


def test_spline_through_three_knots_is_a_parabola():
    """The bias table of 2 x 2 patches: too few knots for a cubic."""
    knots, places = np.array([-1.5, 0.0, 1.5]), np.linspace(-1.5, 1.5, 7)
    parabola = np.poly1d([2.0, -1.0, 0.5])
    assert np.allclose(vit.spline_matrix(knots, places) @ parabola(knots), parabola(places))


def test_patch_embedding_is_the_convolution():
    embed, imgs = vit.PatchEmbed(4, 48), torch.randn(2, 3, 32, 32)
    wanted = F.conv2d(imgs, embed.proj.weight, embed.proj.bias, stride=4).flatten(2).transpose(1, 2)
    assert torch.allclose(embed(imgs), wanted, atol=1e-5)


def test_relative_index_against_loops():
    """Equal offsets share a row, different ones do not, and the class token has three rows of its own."""
    g, index = 4, vit.RelPosBias(4, 1).relative_position_index
    seen = {}
    for i in range(g * g):
        for j in range(g * g):
            offset = (i // g - j // g, i % g - j % g)
            assert seen.setdefault(offset, index[1 + i, 1 + j].item()) == index[1 + i, 1 + j].item()
    assert sorted(seen.values()) == list(range(49))
    assert (index[0, 1:] == 49).all() and (index[1:, 0] == 50).all() and index[0, 0] == 51


def test_drop_path_statistics():
    torch.manual_seed(0)
    x = vit.drop_path(torch.ones(20000, 1, 1), 0.3)
    assert set(x.unique().tolist()) == {0.0, 1 / (1 - torch.tensor(0.3)).item()} or len(x.unique()) == 2
    assert abs((x == 0).float().mean().item() - 0.3) < 0.01 and abs(x.mean().item() - 1) < 0.02


@pytest.mark.parametrize("options", [dict(pool="mean"), dict(pos="none", rel_pos="shared"),
                                     dict(layer_scale=1e-5), dict(stem="conv"), dict(pos="sincos"),
                                     dict(qkv_bias=False)])
def test_every_variant_takes_a_real_step(options):
    """All options run, another image size included, and every weight gets a gradient."""
    model = tiny_vit(num_classes=10, **options)
    optimizer = torch.optim.AdamW(vit.param_groups(model, 0.05), lr=1e-3)
    loss = F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    if options.get("rel_pos") != "shared":
        assert model(torch.randn(2, 3, 48, 48)).shape == (2, 10)


def test_parameter_counts():
    """The published sizes: encoder plus a 1000-way head (MAE's README and timm)."""
    with torch.device("meta"):
        models = {name: ViT(**vit.SIZES[name], patch_size=14 if name == "huge" else 16, num_classes=1000)
                  for name in ("base", "large", "huge")}
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert count == {"base": 86_567_656, "large": 304_326_632, "huge": 632_045_800}


def test_one_batch_is_overfitted():
    model = tiny_vit(num_classes=10, pool="mean")
    imgs, labels = data.draw_shapes(32, 32, seed=0)
    imgs = imgs.float() / 127.5 - 1
    optimizer = torch.optim.AdamW(vit.param_groups(model, 0.05), lr=2e-3)
    for _ in range(40):
        loss = F.cross_entropy(model(imgs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 1.0


# ---- optimisation ----


def test_layer_decay_and_weight_decay_groups():
    """Scale decay^(depth + 1 - id); no decay for 1-D tensors, class token, positions; frozen left out."""
    model = tiny_vit(num_classes=10, pos="sincos")
    scales = {}
    for group in vit.param_groups(model, 0.05, layer_decay=0.5):
        for p in group["params"]:
            scales[id(p)] = (group["lr_scale"], group["weight_decay"])
    parameters = dict(model.named_parameters())
    wanted = {"cls_token": (0.5 ** 4, 0), "patch_embed.proj.weight": (0.5 ** 4, 0.05),
              "patch_embed.proj.bias": (0.5 ** 4, 0), "blocks.0.attn.qkv.weight": (0.5 ** 3, 0.05),
              "blocks.2.norm1.weight": (0.5, 0), "norm.weight": (1, 0),
              "head.weight": (1, 0.05), "head.bias": (1, 0)}
    assert {name: scales[id(parameters[name])] for name in wanted} == wanted
    assert id(model.pos_embed) not in scales


def test_lars_against_its_formula():
    """Two steps on a matrix and a vector, by hand."""
    torch.manual_seed(0)
    weight, bias = torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(4))
    mine = [weight.detach().clone(), bias.detach().clone()]
    optimizer, momenta = vit.LARS([weight, bias], lr=0.5), [0, 0]
    for _ in range(2):
        gradients = [torch.randn(4, 3), torch.randn(4)]
        weight.grad, bias.grad = gradients[0].clone(), gradients[1].clone()
        optimizer.step()
        gradients[0] = gradients[0] * 0.001 * mine[0].norm() / gradients[0].norm()
        for i in range(2):
            momenta[i] = 0.9 * momenta[i] + gradients[i]
            mine[i] = mine[i] - 0.5 * momenta[i]
    assert torch.allclose(weight, mine[0], atol=1e-6) and torch.allclose(bias, mine[1], atol=1e-6)


def test_ema_formula():
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    wanted = [0.9 * p.detach() + 0.1 * q.detach() for p, q in zip(a.parameters(), b.parameters())]
    vit.update_ema(a, b, 0.9)
    assert all(torch.allclose(p, w) for p, w in zip(a.parameters(), wanted))


# ---- loading ----


def dino_checkpoint(state):
    return {"student": {}, "teacher": {f"module.backbone.{name}": value for name, value in state.items()},
            "args": argparse.Namespace(arch="vit_tiny"), "epoch": 3}


def headless(state):
    return {name: value for name, value in state.items() if not name.startswith("head")}


def masked(state):
    return headless(state) | {"masked_embed": torch.zeros(1, 192)}


@pytest.mark.parametrize("wrap, offset", ((dict, 0.0), (lambda s: {"model": s}, 0.0),
                                          (lambda s: {"state_dict": s}, 0.0), (headless, 0.0),
                                          (masked, 0.1), (lambda s: {"state_dict": masked(s)}, 0.1),
                                          (dino_checkpoint, 0.1)))
def test_foreign_files(tmp_path, wrap, offset):
    """timm, MAE and DINO layouts: wrappers and prefixes go, the size is read off, positions interpolated: as
    DINO's are where a backbone or iBOT's token for hidden patches proves that it is such a file."""
    torch.manual_seed(0)
    source = ViT(**vit.SIZES["tiny"], img_size=32, patch_size=4, num_classes=10)
    torch.save(wrap(source.state_dict()), tmp_path / "file.pth")
    state, config, mean, _ = vit.read_encoder(tmp_path / "file.pth")
    assert [config[name] for name in ("embed_dim", "depth", "num_heads", "patch_size")] == [192, 12, 3, 4]
    assert config["img_size"] == 32 and mean == data.STATS["imagenet"][0]
    model = ViT(**config)
    vit.load_weights(model, state, "file.pth")
    imgs = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.features(imgs), source.features(imgs))
    larger = ViT(**config | {"img_size": 48})
    vit.load_weights(larger, state, "file.pth")
    assert torch.equal(larger.pos_embed, vit.interpolate_pos_embed(source.pos_embed, 12, offset))


def test_mae_files_leave_their_decoder(tmp_path):
    """A full MAE file loads without its decoder; for mean pooling `norm` is dropped and `fc_norm` is new."""
    source = ViT(**vit.SIZES["tiny"], img_size=32, patch_size=4)
    extra = {"mask_token": torch.zeros(1, 1, 96), "decoder_pos_embed": torch.zeros(1, 65, 96),
             "decoder_blocks.0.norm1.weight": torch.zeros(96)}
    torch.save({"model": source.state_dict() | extra}, tmp_path / "file.pth")
    state, config, _, _ = vit.read_encoder(tmp_path / "file.pth")
    assert not set(extra) & set(state)
    model = ViT(**config | {"pool": "mean", "num_classes": 10})
    vit.load_weights(model, state, "file.pth")
    assert (model.fc_norm.weight == 1).all()


@pytest.mark.parametrize("change, named", [
    (lambda s: s.pop("blocks.3.attn.qkv.weight"), "blocks.3.attn.qkv.weight"),
    (lambda s: s.update({"blocks.0.attn.extra": torch.zeros(1)}), "blocks.0.attn.extra"),
    (lambda s: s.update({"dist_token": torch.zeros(1, 1, 192)}), "dist_token"),
    (lambda s: s.update({"blocks.1.mlp.fc1.weight": torch.zeros(7, 192)}), "blocks.1.mlp.fc1.weight")])
def test_a_file_that_does_not_fit_is_refused(tmp_path, capsys, change, named):
    """Missing, unknown and misshapen tensors end in one sentence that names them, with exit status 2."""
    state = ViT(**vit.SIZES["tiny"], img_size=32, patch_size=4).state_dict()
    change(state)
    torch.save(state, tmp_path / "file.pth")
    state, config, _, _ = vit.read_encoder(tmp_path / "file.pth")
    with pytest.raises(SystemExit) as stopped:
        vit.load_weights(ViT(**config), state, tmp_path / "file.pth")
    assert stopped.value.code == 2 and named in capsys.readouterr().err


def test_no_code_is_run_by_a_file(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)
    torch.save({"model": Evil()}, tmp_path / "file.pth")
    with pytest.raises(SystemExit):
        vit.read_encoder(tmp_path / "file.pth")
    assert "executed" not in capsys.readouterr().out


# ---- the judge ----


def test_label_subset_is_balanced():
    imgs, labels = torch.zeros(100, 3, 4, 4, dtype=torch.uint8), torch.arange(100) % 10
    source = data.Images(imgs, labels, list("abcdefghij"), 0, 1)
    part = vit.label_subset(source, 0.2)
    assert part.labels.bincount().tolist() == [2] * 10
    assert vit.label_subset(source, 0.01).labels.bincount().tolist() == [1] * 10


def test_cls_attention_is_the_softmax():
    """The picture's weights, times the values, give what the block's attention gives for the class token."""
    model, imgs = tiny_vit().eval(), torch.randn(2, 3, 32, 32)
    weights, taken = vit.cls_attention(model, imgs), []
    assert weights.shape == (2, 3, 8, 8)
    hook = model.blocks[-1].register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    model.forward_features(imgs)
    hook.remove()
    attn, x = model.blocks[-1].attn, model.blocks[-1].norm1(taken[0])
    q, k, v = attn.qkv(x).view(2, 65, 3, 3, 16).permute(2, 0, 3, 1, 4)
    wanted = (q @ k.transpose(2, 3) / 4).softmax(-1)[:, :, 0, 1:]
    assert torch.allclose(weights.flatten(2), wanted, atol=1e-6)


@pytest.mark.parametrize("options", ({}, dict(pos="none", rel_pos="shared"), dict(rel_pos="block")))
def test_attentions_are_those_of_the_blocks(options):
    """Rows sum to 1; times the values they give what each block's attention gives, with its bias."""
    model, imgs, taken = tiny_vit(**options).eval(), torch.randn(2, 3, 32, 32), []
    for name, p in model.named_parameters():
        if "bias_table" in name:
            torch.nn.init.normal_(p)
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, inputs, output: taken.append((inputs[0], output)))
    model.forward_features(imgs)
    attentions = list(vit.attentions(model, imgs))
    assert len(attentions) == 3
    for block, attention, (x, wanted) in zip(model.blocks, attentions, taken):
        assert torch.allclose(attention.sum(-1), torch.ones(2, 3, 65), atol=1e-5)
        found = block.attn.proj((attention @ block.attn.heads(x)[2]).transpose(1, 2).flatten(2))
        assert torch.allclose(found, wanted, atol=1e-5)


def test_attention_distance():
    """In pixels between the middles of the patches: of attention to all alike, of a block that looks at a
    patch's own place alone, and of some other by loops, without the class token."""
    imgs, places = torch.randn(2, 3, 16, 16), [(4 * (i // 4), 4 * (i % 4)) for i in range(16)]
    far = torch.tensor([[math.dist(a, b) for b in places] for a in places])
    model = tiny_vit(img_size=16, rel_pos="block").eval()
    torch.nn.init.zeros_(model.blocks[0].attn.qkv.weight)       # all alike
    table = model.blocks[1].rel_pos_bias.relative_position_bias_table
    torch.nn.init.constant_(table[24:25], 1e4)                  # row 24 of 7 x 7: no offset
    torch.nn.init.normal_(model.blocks[2].attn.qkv.weight)
    found, alike = vit.attention_distance(model, imgs)
    assert found.shape == (3, 3) and alike.tolist() == pytest.approx(3 * [far.mean().item()])
    assert found[0].tolist() == pytest.approx(3 * [far.mean().item()])
    assert found[1].abs().max() < 1e-5
    attention = list(vit.attentions(model, imgs))[2]
    for h in range(3):
        each = [(attention[b, h, 1 + i, 1:] @ far[i] / attention[b, h, 1:, 1:].sum() * 16).item()
                for b in range(2) for i in range(16)]
        assert found[2, h].item() == pytest.approx(sum(each) / len(each), rel=1e-4)


# ---- the CNN ----


def test_the_cnn_is_as_large_as_the_micro():
    """1.2 million parameters, as many as the ViT-micro/4 has; three widths, each at half the resolution."""
    model, sizes = vit.CNN(10), []
    micro = ViT(**vit.SIZES["micro"], img_size=32, patch_size=4, num_classes=10)
    counts = [sum(p.numel() for p in network.parameters()) for network in (model, micro)]
    assert counts[0] == pytest.approx(counts[1], rel=0.03)
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == 2 * [(42, 16, 16)] + 2 * [(84, 8, 8)] + 2 * [(168, 4, 4)]


@pytest.mark.parametrize("a, b", ((4, 4), (4, 8)))
def test_conv_block_by_hand(a, b):
    """x, or its projection, + conv(relu(norm(conv(relu(norm(x)))))), where a norm is over a whole image."""
    torch.manual_seed(0)
    block, x = vit.ConvBlock(a, b), torch.randn(2, a, 8, 8) * 3 + 1

    def normed(x):
        mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, unbiased=False)
        return ((x - mean) / (var + 1e-5).sqrt()).clamp(min=0)
    y = F.conv2d(normed(x), block.conv1.weight, block.conv1.bias, padding=1)[:, :, ::b // a, ::b // a]
    y = F.conv2d(normed(y), block.conv2.weight, block.conv2.bias, padding=1)
    skip = x if a == b else F.conv2d(x[:, :, ::2, ::2], block.skip.weight, block.skip.bias)
    assert torch.allclose(block(x), skip + y, atol=1e-4)


# ---- probes ----


@pytest.mark.parametrize("penalty", (1e-4, 1e-1))
def test_logistic_regression_is_at_its_minimum(penalty):
    """The gradient of mean cross-entropy + penalty / 2 |W|^2 is zero; the biases are not penalised."""
    torch.manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(120, 6) + F.one_hot(y, 6)
    layer = vit.fit_logistic(x, y, 3, penalty)
    W, b = (p.detach().double().requires_grad_() for p in (layer.weight, layer.bias))
    logits = x.double() @ W.T + b
    loss = -logits.log_softmax(1)[range(120), y].mean() + penalty / 2 * (W ** 2).sum()
    assert max(g.abs().max().item() for g in torch.autograd.grad(loss, (W, b))) < 1e-4
    assert loss < math.log(3) - 0.1


def test_logistic_regression_of_two_points():
    """x = 1 and -1 of two classes: W = (w, -w) where sigmoid(-2 w) = penalty w, found by bisection."""
    for penalty in (1e-3, 0.1):
        low, high = 0.0, 10.0
        for _ in range(60):
            w = (low + high) / 2
            low, high = (w, high) if 1 / (1 + math.exp(2 * w)) > penalty * w else (low, w)
        layer = vit.fit_logistic(torch.tensor([[1.0], [-1]]), torch.tensor([0, 1]), 2, penalty)
        assert layer.weight[:, 0].tolist() == pytest.approx([w, -w], rel=1e-2)
        assert layer.bias.tolist() == pytest.approx([0, 0], abs=1e-4)


def test_logistic_regression_finds_what_is_there():
    """Separable classes are separated, also where a feature says nothing; of permuted labels nothing that
    holds for other points is learned."""
    torch.manual_seed(0)
    y = torch.randint(4, (2000,))
    x = F.pad(3 * F.one_hot(y, 4) + 0.3 * torch.randn(2000, 4), (0, 1))
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    for labels, low, high in ((y, 1, 1), (y[torch.randperm(2000)], 0.2, 0.3)):
        layer = vit.fit_logistic(x[:1000], labels[:1000], 4, 1e-3)
        right = (layer(x[1000:]).argmax(1) == labels[1000:]).float().mean().item()
        assert low <= right <= high


def test_probe_norm_and_features():
    """The linear probe is BatchNorm (batch statistics in training, running ones after), then one matrix."""
    torch.manual_seed(0)
    tokens = torch.randn(64, 5, 12) * 3 + 1
    for feature, x in (("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1))):
        probe = vit.Probe(feature, 12, 10).train()
        z = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
        assert torch.allclose(probe(tokens), z @ probe.head.weight.T, atol=1e-5)


@pytest.mark.parametrize("bias", (False, True))
def test_attention_written_out_for_bfloat16_on_a_cpu(bias):
    """`attend`: values and gradients as near to float64 as torch's kernel, with a bias and without."""
    torch.manual_seed(0)
    wide = [torch.randn(2, 3, n, 16, dtype=torch.float64) for n in (5, 9, 9)]
    table = torch.randn(1, 3, 5, 9, dtype=torch.float64) if bias else None

    def with_gradients(function, dtype):
        q, k, v = (x.to(dtype).requires_grad_() for x in wide)
        out = function(q, k, v, None if table is None else table.to(dtype))
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    def plain(q, k, v, b):
        return (q @ k.mT / 4 + (0 if b is None else b)).softmax(-1) @ v
    exact = with_gradients(plain, torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for found, wanted in zip(with_gradients(vit.attend, dtype), exact):
            assert found.dtype == dtype and (found - wanted).norm() < tolerance * wanted.norm()


def test_probes_and_stems_that_cannot_be(capsys, monkeypatch):
    """--stem conv with 6 px patches, probes on one image a part: a sentence; twins among --blrs are one."""
    alone = argparse.Namespace(batch_size=4, accum_steps=4, mode="linear", layers="last", optimizer="sgd",
                               blrs=[0.1, 0.10000001, 1.0], img_size=8, crop_scale=1.0)
    monkeypatch.setattr(vit.data, "Loader", lambda *args: None)
    for call, words in ((lambda: vit.PatchEmbed(6, 16, "conv"), "power of two as --patch_size, not 6"),
                        (lambda: vit.probe(alone, None, None, None), "leaves one image a part")):
        with pytest.raises(SystemExit):
            call()
        assert words in capsys.readouterr().err
    probes, optimizer = vit.make_probes(alone, tiny_vit(), 10)
    assert [f"{one.feature} {one.blr:g}" for one in probes] == ["cls 0.1", "mean 0.1", "cls 1", "mean 1"]
    assert len(optimizer.param_groups) == 4
