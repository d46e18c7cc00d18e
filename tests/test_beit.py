"""BEiT: numbers of the official implementation, the paper's invariants, its tokenizer and its judge."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import beit
import beit_v2
import data
import dvae
import vit
from vit import ViT, param_groups


def tiny_beit(plain=False, vocab=64, num_masked=26, **options):
    torch.manual_seed(0)
    places = dict(pos="learned") if plain else dict(pos="none", rel_pos="shared", layer_scale=0.1)
    encoder = ViT(img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=4, **places)
    return beit.BEiT(encoder, vocab, num_masked, **options)


MASKS = SimpleNamespace(masking="block", grid=8, num_masked=26, min_block=4, device="cpu")


def batch(B=4, vocab=64):
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    return (torch.randn(B, 3, 32, 32, generator=g), torch.randint(vocab, (B, 64), generator=g),
            data.draw_masks(MASKS, B, "end"))


def ours(arrays):
    """Official names to ours: all but mask token and head belong to the encoder."""
    return {name if name.startswith(("mask_token", "lm_head")) else f"encoder.{name}": value
            for name, value in vit.official_state(arrays).items()}


# ---- the official numbers ----


def test_official_logits_loss_and_gradients(golden, close):
    """Same weights, images, codes and masks: features, logits, loss, accuracy and gradients to 1e-5."""
    arrays, model = golden("beit"), tiny_beit()
    model.load_state_dict(ours(golden("beit", "w/")))
    mask = arrays["mask"]
    h = model.hidden_states(arrays["x"], mask)
    close(h[0], arrays["features"][0, 1:])
    close(model.lm_head(h)[mask], arrays["logits"])
    loss, accuracy = model(arrays["x"], arrays["codes"].long(), mask)
    close(loss, arrays["loss"], 1e-6)
    close(accuracy, arrays["acc"], 1e-6)
    loss.backward()
    gradients, found = ours(golden("beit", "grad/")), dict(model.named_parameters())
    assert len(gradients) > 30 and "encoder.rel_pos_bias.relative_position_bias_table" in gradients
    for name, gradient in gradients.items():
        close(found[name].grad, gradient)


def test_official_training_steps(golden, close):
    """Five AdamW steps with the official decay groups: losses, gradient norms, weights afterwards."""
    arrays, model = golden("beit"), tiny_beit()
    model.load_state_dict(ours(golden("beit", "w/")))
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), betas=(0.9, 0.999))
    for step in range(5):
        vit.set_lr(optimizer, arrays["step_lr"][step].item())
        loss, _ = model(arrays["x"], arrays["codes"].long(), arrays["mask"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        close(loss, arrays["step_loss"][step])
        close(norm, arrays["step_gradnorm"][step])
        optimizer.step()
        optimizer.zero_grad()
    found = dict(model.named_parameters())
    for name, value in golden("beit", "after5/").items():       # Adam scales up the noise in k's bias
        name = name if name == "mask_token" else f"encoder.{name.replace('q_bias', 'qkv.bias')}"
        close(found[name][:48] if name.endswith("qkv.bias") else found[name], value)


def test_official_initialisation():
    """All within one standard deviation of 0.02; proj and fc2 of block l divided by sqrt(2 l); biases 0."""
    for plain in (False, True):
        model = tiny_beit(plain)
        for name, p in model.named_parameters():
            block = int(name.split(".")[2]) + 1 if "blocks" in name else 0
            scale = math.sqrt(2 * block) if name.endswith(("attn.proj.weight", "mlp.fc2.weight")) else 1
            if name.endswith("table") or name.endswith("bias"):
                assert (p == 0).all(), name
            elif p.ndim > 1:
                assert p.abs().max() <= 0.02 / scale + 1e-7, name
                rel = 0.05 if p.numel() > 1000 else 0.3         # tokens: 48 numbers
                assert p.std().item() * scale == pytest.approx(0.0108, rel=rel), name
    assert model.encoder.pos_embed.requires_grad and model.encoder.rel_pos_bias is None
    assert model.encoder.blocks[0].gamma_1 is None
    default = tiny_beit().encoder
    assert default.pos_embed is None and default.rel_pos_bias is not None
    assert (default.blocks[2].gamma_2 == 0.1).all()


def test_official_weight_decay_groups():
    """Mask token, bias table, patches and head are decayed; class token, positions and all 1-D are not."""
    model = tiny_beit(plain=True)
    model.encoder.rel_pos_bias = vit.RelPosBias(8, 4)
    decayed = {id(p) for group in param_groups(model, 0.05) if group["weight_decay"] for p in group["params"]}
    found = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert {"mask_token", "lm_head.weight", "encoder.patch_embed.proj.weight",
            "encoder.rel_pos_bias.relative_position_bias_table"} <= found
    assert not [name for name in found if "cls_token" in name or "pos_embed" in name or "bias" in
                name.rsplit(".", 1)[-1].replace("bias_table", "") or "gamma" in name or "norm" in name]


# ---- masks and loss ----


def test_masks(golden):
    """26 patches in every image, of blocks fewer in some; random ones anywhere, blocks as often as the
    official ones, and as many patches on average."""
    torch.manual_seed(0)
    for masking in ("block", "random"):
        mask = data.draw_masks(SimpleNamespace(**vars(MASKS) | {"masking": masking}), 4000, "end")
        counts = mask.sum(1)
        assert mask.dtype == torch.bool and counts.max() == 26 and (counts < 26).any() == (masking == "block")
        share = mask.float().mean(0).view(8, 8)
        wanted = golden("beit")["mask_freq"] if masking == "block" else torch.full((8, 8), 26 / 64)
        assert (share - wanted).square().mean().sqrt() < 0.015, masking     # 0.011: 2000 official masks
        assert counts.float().mean().item() == pytest.approx(wanted.sum().item(), abs=0.02)     # 25.96; or 26


def test_loss_is_cross_entropy_at_hidden_places_by_loops():
    """The mean over the hidden patches of all images, also if some images have fewer than num_masked."""
    model, (imgs, codes, mask) = tiny_beit(), batch()
    mask[1, mask[1].nonzero()[:10, 0]] = False
    loss, accuracy = model(imgs, codes, mask)
    logits = model.lm_head(model.hidden_states(imgs, mask))
    terms, hits = [], []
    for b in range(4):
        for i in range(64):
            if mask[b, i]:
                terms.append(-(logits[b, i] - logits[b, i].logsumexp(0))[codes[b, i]])
                hits.append(float(logits[b, i].argmax() == codes[b, i]))
    n = int(mask.sum())
    assert len(terms) == n <= 94 and torch.allclose(loss, sum(terms) / n, rtol=1e-5)
    assert accuracy.item() == pytest.approx(sum(hits) / n)


def test_loss_is_blind_to_visible_codes_and_hidden_pixels():
    """Other codes at visible places, other pixels in hidden patches: the same loss; else not."""
    model, (imgs, codes, mask) = tiny_beit(), batch()
    loss, _ = model(imgs, codes, mask)
    assert torch.equal(model(imgs, torch.where(mask, codes, 63 - codes), mask)[0], loss)
    pixels = F.interpolate(mask.float().view(-1, 1, 8, 8), scale_factor=4).bool()
    assert torch.equal(model(torch.where(pixels, 7.0, imgs), codes, mask)[0], loss)
    assert not torch.equal(model(torch.where(pixels, imgs, 7.0), codes, mask)[0], loss)
    assert not torch.equal(model(imgs, torch.where(mask, 63 - codes, codes), mask)[0], loss)


def test_ablations():
    """--predict all: the mean over all places. --target pixels: squared error of normalised pixels."""
    imgs, codes, mask = batch()
    model = tiny_beit(predict="all")
    logits = model.lm_head(model.hidden_states(imgs, mask))
    assert torch.allclose(model(imgs, codes, mask)[0], F.cross_entropy(logits.flatten(0, 1), codes.flatten()))
    target = vit.norm_patches(vit.patches_of(imgs, 4))[0]
    patch = imgs[2, :, 4:8, 12:16].flatten()                    # row 1, column 3
    assert torch.allclose(target[2, 11], (patch - patch.mean()) / (patch.var() + 1e-6).sqrt(), atol=1e-6)
    model = tiny_beit(vocab=48, target="pixels")
    pred = model.lm_head(model.hidden_states(imgs, mask))
    assert torch.allclose(model(imgs, target, mask)[0], (pred - target)[mask].square().mean(), rtol=1e-5)


def test_mask_tokens_keep_their_positions():
    """The plain ViT by hand: patches are replaced before positions are added, class token in front."""
    model, (imgs, _, mask) = tiny_beit(plain=True), batch()
    encoder, rows = model.encoder, []
    for b in range(4):
        patches = encoder.patch_embed(imgs)[b]
        tokens = [model.mask_token[0, 0] if mask[b, i] else patches[i] for i in range(64)]
        rows.append(torch.stack([encoder.cls_token[0, 0], *tokens]) + encoder.pos_embed[0])
    x = torch.stack(rows)
    for block in encoder.blocks:
        x = block(x)
    assert torch.allclose(model.hidden_states(imgs, mask), encoder.norm(x)[:, 1:], atol=1e-5)


def test_codes_and_patches_share_their_order():
    """An image with one bright patch: the codes' logits and the hidden states that move lie around it."""
    tokenizer, model = dvae.DVAE(grid=8, stride=4, n_hid=8, vocab=64), tiny_beit()
    dark = 0.2 * torch.rand(1, 3, 32, 32)
    light = dark.clone()
    light[:, :, 8:12, 20:24] = 1                                # row 2, column 5
    none = torch.zeros(1, 64, dtype=torch.bool)
    for states in (lambda x: tokenizer.logits(x).flatten(2).transpose(1, 2),
                   lambda x: model.hidden_states(x, none)):
        moved = (states(light) - states(dark)).square().sum(-1).view(8, 8)
        place = torch.arange(8.0)
        row, col = ((moved.sum(i) * place).sum() / moved.sum() for i in (1, 0))
        assert abs(row - 2) < 0.7 and abs(col - 5) < 0.7, (row, col)


def test_features_are_of_the_block_three_quarters_up():
    """Block 9 of 12, as in ViT-B: its patches' mean, before any norm."""
    encoder = ViT(32, 4, 48, depth=12, num_heads=4, pos="none", rel_pos="shared", layer_scale=0.1)
    model, (imgs, _, _) = beit.BEiT(encoder, 64), batch()
    x = torch.cat([encoder.cls_token.expand(4, -1, -1), encoder.patch_embed(imgs)], 1)
    for block in encoder.blocks[:9]:
        x = block(x, encoder.rel_pos_bias())
    assert torch.allclose(model.features(imgs), x[:, 1:].mean(1), atol=1e-6)


def test_trivial_level_of_tokens():
    """Entropy and largest share of the codes of some images, by counting; normalised pixels are refused."""
    torch.manual_seed(0)
    tokenizer, imgs = dvae.DVAE(grid=8, stride=4, n_hid=8, vocab=16), data.draw_shapes(120, 32, seed=0)[0]
    ids = tokenizer.tokens(imgs / 255).flatten()
    counts, ids = ids.bincount(minlength=16), ids.tolist()
    shares = [ids.count(k) / len(ids) for k in set(ids)]
    entropy = -sum(p * math.log(p) for p in shares)
    assert data.perplexity(counts).item() == pytest.approx(math.exp(entropy)) and len(shares) > 1
    args = SimpleNamespace(**LINEAR, img_size=32, batch_size=50, epochs=1, max_steps=0)
    source = data.Images(imgs, torch.zeros(120, dtype=torch.long), ["a"], (0.5,) * 3, (0.5,) * 3)
    said, levels = data.trivial_loss(args, source, tokenizer, data.View(32, tokenizer_size=32))
    assert f"ln 16 = {math.log(16):.3f};" in said
    assert f"occurs {entropy:.3f}, accuracy of the commonest {max(shares):.3f}" in said
    assert levels == pytest.approx({"loss": entropy, "accuracy": max(shares)})
    with pytest.raises(AssertionError, match="not normalised"):
        data.trivial_loss(args, source, tokenizer, data.View(32, count=2))


# ---- training ----


def test_first_loss_is_ln_of_the_vocabulary():
    model, (imgs, codes, mask) = tiny_beit(), batch()
    assert model(imgs, codes, mask)[0].item() == pytest.approx(math.log(64), abs=0.05)


@pytest.mark.parametrize("options", ({}, dict(plain=True), dict(predict="all"),
                                     dict(target="pixels", vocab=48)))
def test_one_batch_is_overfitted(options):
    """Real steps on one batch bring the loss down, and every weight gets a gradient."""
    model, (_, codes, mask) = tiny_beit(**options), batch(2)
    imgs = data.draw_shapes(2, 32, seed=0)[0].float() / 127.5 - 1
    target = vit.norm_patches(vit.patches_of(imgs, 4))[0] if "target" in options else codes
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=4e-3)
    losses = []
    for _ in range(60):
        loss, _ = model(imgs, target, mask)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sorted(losses[-5:])[2] < 0.8 * sorted(losses[:5])[2], losses     # medians: a step may go wrong


# ---- the tokenizer of a run ----


def write_tokenizer(path, grid=8):
    model = dvae.DVAE(grid=grid, stride=4, n_hid=8, vocab=16)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), "config": model.config, "method": "dvae"}, path)


def test_the_tokenizer_is_found(tmp_path, monkeypatch):
    """The one that is named, else that of the same data set."""
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(tokenizer="", data="some/photos", device="cpu", compile=False, grid=8)
    write_tokenizer(tmp_path / "out/dvae-photos/tokenizer.pt")
    assert beit.prepare_tokenizer(args).vocab == 16
    write_tokenizer(tmp_path / "other.pt", grid=4)
    args.tokenizer, args.grid = "other.pt", 4
    assert beit.prepare_tokenizer(args).img_size == 16


def test_an_official_vqkd_file_is_a_tokenizer(tmp_path):
    """As unilm writes it, whose encoder ends in `fc_norm`: the codes of the same network."""
    model = beit_v2.VQKD(vit.ViT(32, 8, 48, 12, 4, pool="cls"), 24, 8, 1, 20)
    names = {r"^quantizer\.codebook$": "quantize.embedding.weight", r"^quantizer": None,
             r"^(encoder|decoder)\.norm\.": r"\1.fc_norm."}
    torch.save({"model": vit.renamed(model.state_dict(), names)}, tmp_path / "vqkd.pth")
    args = SimpleNamespace(tokenizer=str(tmp_path / "vqkd.pth"), data="cifar10", device="cpu", grid=4)
    with pytest.MonkeyPatch.context() as patch:                 # no tensor tells the heads of this width
        patch.setitem(vit.SIZES, "odd", dict(embed_dim=48, depth=12, num_heads=4))
        tokenizer = beit.prepare_tokenizer(args)
    imgs = torch.rand(3, 3, 32, 32)
    assert torch.equal(tokenizer.tokens(imgs), model.eval().tokens(imgs))


@pytest.mark.parametrize("name, words", (
    ("", "there is no out/dvae-cifar10/tokenizer.pt: train it with python dvae.py --data cifar10"),
    ("missing.pt", "there is no file missing.pt"),
    ("encoder.pt", "encoder.pt is no tokenizer: train one with"),
    ("coarse.pt", "coarse.pt makes 4 x 4 tokens, but the ViT has 8 x 8 patches"),
))
def test_a_tokenizer_that_does_not_fit(name, words, tmp_path, monkeypatch, capsys):
    """Missing, of another method, of another grid: one sentence each."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "config": {}, "method": "mae"}, "encoder.pt")
    write_tokenizer(tmp_path / "coarse.pt", grid=4)
    args = SimpleNamespace(tokenizer=name, data="cifar10", device="cpu", compile=False, grid=8)
    with pytest.raises(SystemExit) as stopped:
        beit.prepare_tokenizer(args)
    said = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(said) == 1 and words in said[0]


# ---- pictures ----


def shown(model, views, mask, answer, monkeypatch, tokenizer=None, **options):
    """Rows and title of the picture if the head gives `answer`, for images of mean 0 and std 1."""
    taken = []
    monkeypatch.setattr(model.lm_head, "forward", lambda h: answer)
    monkeypatch.setattr(data, "save_rows", lambda path, rows, title: taken.append((rows, title)))
    beit.pictures(model, tokenizer, views, mask, SimpleNamespace(mean=(0.0,) * 3, std=(1.0,) * 3), "x.png",
                  **options)
    return taken[0]


def test_pictures_of_codes(monkeypatch):
    """Hidden patches: grey, then painted from the predicted codes among true ones; visible: the image."""
    tokenizer = dvae.DVAE(grid=8, stride=4, n_hid=8, vocab=16)
    imgs, (_, _, mask) = torch.rand(4, 3, 32, 32), batch()
    ids = tokenizer.tokens(imgs)
    guess = torch.where(torch.arange(64) < 32, ids, (ids + 1) % 16)         # right in the upper half
    rows, title = shown(tiny_beit(vocab=16), [imgs, imgs], mask, F.one_hot(guess, 16), monkeypatch, tokenizer)
    painted = tokenizer.paint(torch.where(mask, guess, ids))
    for i in range(64):
        r, c = i // 8 * 4, i % 8 * 4
        for b in range(4):
            here = b, slice(None), slice(r, r + 4), slice(c, c + 4)
            assert torch.allclose(rows["predicted, painted"][here], (painted if mask[b, i] else imgs)[here])
            assert torch.allclose(rows["visible"][here], torch.tensor(0.5) if mask[b, i] else imgs[here])
    assert torch.allclose(rows["true codes, painted"], tokenizer.paint(ids))
    assert title.startswith(f"{mask[:, :32].sum() / mask.sum():.1%} of the hidden codes")


@pytest.mark.parametrize("norm", (True, False))
def test_pictures_of_pixels(norm, monkeypatch):
    """With the right pixels, normalised or plain, the painted image is the image itself; the title says what
    is given away."""
    imgs, (_, _, mask) = torch.rand(4, 3, 32, 32), batch()
    model, target = tiny_beit(vocab=48, target="pixels"), vit.norm_patches(vit.patches_of(imgs, 4), norm)[0]
    assert norm or torch.equal(target[1, 17], imgs[1, :, 8:12, 4:8].flatten())
    rows, title = shown(model, [imgs], mask, target, monkeypatch, norm_pix_loss=norm)
    assert torch.allclose(rows["predicted, painted"], imgs, atol=1e-5) and ("true ones" in title) == norm


def test_pictures_of_codes_without_pixels(monkeypatch):
    """Codes of VQ-KD paint nothing: where they are predicted right it is white, elsewhere black."""
    tokenizer = beit_v2.VQKD(ViT(32, 4, 16, 1, 2), 16, 4, 1, 8)
    imgs, (_, _, mask) = torch.rand(4, 3, 32, 32), batch()
    ids = tokenizer.tokens(imgs)
    guess = torch.where(torch.arange(64) < 32, ids, (ids + 1) % 16)         # right in the upper half
    rows, _ = shown(tiny_beit(vocab=16), [imgs, imgs], mask, F.one_hot(guess, 16), monkeypatch, tokenizer)
    assert "true codes, painted" not in rows                                # they would be white everywhere
    right = F.interpolate((guess == ids).float().view(-1, 1, 8, 8), size=32)
    hole = F.interpolate(mask.float().view(-1, 1, 8, 8), size=32)
    assert torch.equal(rows["predicted, painted"], torch.where(hole > 0, right, imgs))


# ---- the judge ----


def encoder_file(path):
    model = tiny_beit()
    torch.nn.init.normal_(model.encoder.rel_pos_bias.relative_position_bias_table)
    torch.save({"model": model.encoder.state_dict(), "config": model.encoder.config, "mean": (0.5,) * 3,
                "std": (0.5,) * 3}, path)
    return model.encoder


def test_fine_tuning_copies_the_shared_table_into_every_block(tmp_path):
    """Each block trains its own copy; mean pooling, a fresh fc_norm and head in the place of `norm`."""
    encoder = encoder_file(tmp_path / "encoder.pt")
    args = SimpleNamespace(init=str(tmp_path / "encoder.pt"), img_size=32, mode="finetune", drop_path=0.0,
                           model="micro", half_stats=False, num_heads=0, batch_size=512, accum_steps=1)
    model, _ = vit.build(args, 10, "mean")
    tables = [block.rel_pos_bias.relative_position_bias_table for block in model.blocks]
    assert len({id(table) for table in tables}) == 3 and model.rel_pos_bias is None
    assert all(torch.equal(t, encoder.rel_pos_bias.relative_position_bias_table) for t in tables)
    assert isinstance(model.norm, torch.nn.Identity) and (model.fc_norm.weight == 1).all()
    assert 0 < model.head.weight.abs().max() < 2e-4 and (model.head.bias == 0).all()
    imgs = torch.randn(2, 3, 32, 32)
    for args.mode in ("linear", "knn"):
        frozen, _ = vit.build(args, 0, "cls")
        assert frozen.rel_pos_bias is not None and frozen.blocks[0].rel_pos_bias is None
        assert torch.equal(frozen.forward_features(imgs), encoder.forward_features(imgs))


LINEAR = dict(mode="linear", layers="all", blrs=[0.1, 1.0], optimizer="sgd", device="cpu", amp="none")


def test_probes_of_all_layers(close):
    """--layers all: class token and mean of every block's output, and of the encoder's."""
    encoder, imgs = tiny_beit().encoder, torch.randn(4, 3, 32, 32)
    args, outputs = SimpleNamespace(**LINEAR), []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    layers = vit.probed_layers(args, encoder, imgs)
    assert len(layers) == 4 and all(torch.equal(a, b) for a, b in zip(layers, outputs))
    assert torch.equal(layers[-1], encoder.norm(outputs[2])) and not layers[0].requires_grad
    probes, optimizer = vit.make_probes(args, encoder, 10)
    features = ["cls-1", "mean-1", "cls-2", "mean-2", "cls-3", "mean-3", "cls", "mean"]
    assert [(one.feature, one.blr) for one in probes] == [(f, blr) for blr in (0.1, 1.0) for f in features]
    assert len(optimizer.param_groups) == 16
    head = probes[8 + 3].eval()                                 # mean-2 at 1
    close(head(layers[head.layer]), head.head(head.norm(outputs[1][:, 1:].mean(1))).detach())
    assert probes(layers).shape == (16, 4, 10)


def test_the_best_layer_is_the_training_images_choice():
    """Of all features and learning rates the one that was right most often in training is `best`."""
    encoder = tiny_beit().encoder
    args = SimpleNamespace(**LINEAR, img_size=32, batch_size=8, epochs=1, max_steps=0)
    probes, _ = vit.make_probes(args, encoder, 10)
    probes.register_buffer("right", torch.arange(16.0).flip(0))
    probes.right[8 + 3] = 99                                    # mean-2 at 1
    imgs, labels = data.draw_shapes(20, 32, seed=0)
    source = data.Images(imgs, labels, list("0123456789"), (0.5,) * 3, (0.5,) * 3)
    result = vit.judge_probes(args, encoder, probes, source)
    assert (result["best_feature"], result["best"]) == ("mean-2", result["all"]["mean-2 1"])
    assert (result["cls_blr"], result["mean-2_blr"]) == (0.1, 1.0)


@pytest.mark.parametrize("flags, words", (("--num_masked 64", "--num_masked 64 must lie between 1 and 63"),
                                          ("--target words", "argument --target: invalid choice")))
def test_wrong_flags(flags, words, monkeypatch, capsys):
    """One sentence before anything is begun."""
    monkeypatch.setattr("sys.argv", ["beit.py", "--data", "shapes", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        beit.main()
    assert stopped.value.code == 2 and words in capsys.readouterr().err
