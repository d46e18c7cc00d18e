"""BEiT v2: numbers of the official quantizer and pre-training model, living codes, what the branch sees."""
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import beit_v2
import data
import dvae
from vit import ViT, load_init, official_state, param_groups

SMALL = dict(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=4)


def tiny_vqkd(**options):
    torch.manual_seed(0)
    return beit_v2.VQKD(ViT(**SMALL | {"depth": 2}), **dict(num_codes=24, code_dim=8, decoder_depth=1,
                                                           teacher_dim=20) | options)


def tiny_beit(**options):
    torch.manual_seed(0)
    encoder = ViT(**SMALL, pos="none", rel_pos="shared", layer_scale=0.1)
    return beit_v2.BEiTv2(encoder, 64, 26, **dict(early_layer=3, branch_depth=2) | options)


def batch(B=4):
    torch.manual_seed(1)
    return (torch.randn(B, 3, 32, 32), torch.randint(64, (B, 64)), data.blockwise_mask(B, 8, 26, 4, "fill"))


# ---- the official numbers ----


@pytest.mark.parametrize("case", ("dense", "sparse"))
def test_official_quantizer(case, golden, close):
    """Two training steps and an evaluation: codes, vectors, loss, both gradients, the moved codebook."""
    arrays = golden("beit_v2", f"q/{case}.")
    K, E, B, g, decay, commit = arrays["config"].tolist()
    quantizer = beit_v2.Quantizer(int(K), int(E), decay, commit)
    quantizer.codebook.copy_(arrays["codebook_0"])
    for call in (1, 2, 3):
        z = arrays[f"z_{call}"].requires_grad_()                # (B, E, g, g)
        q, ids, loss, moments = quantizer(z.permute(0, 2, 3, 1).flatten(0, 2))
        assert torch.equal(ids, arrays[f"indices_{call}"])
        q = q.view(int(B), int(g), int(g), int(E)).permute(0, 3, 1, 2)
        close(q, arrays[f"zq_{call}"])
        close(loss, arrays[f"loss_{call}"])
        close(torch.autograd.grad(loss, z, retain_graph=True)[0], arrays[f"grad_commit_{call}"])
        close(torch.autograd.grad((q * arrays[f"upstream_{call}"]).sum(), z)[0], arrays[f"grad_ste_{call}"])
        if call < 3:
            quantizer.update(*moments)
        close(quantizer.codebook, arrays[f"codebook_{call}"])


def test_official_pretraining(tmp_path, golden, close):
    """Logits of both heads at the hidden patches, both losses, all kinds of gradients, three AdamW steps."""
    arrays, model = golden("beit_v2"), tiny_beit()
    torch.save({"model": golden("beit_v2", "w/")}, tmp_path / "official.pth")
    load_init(model, SimpleNamespace(init=tmp_path / "official.pth", method="beit_v2",
                                     flags={}, images=0))
    imgs, codes, mask = arrays["images"], arrays["tokens"], arrays["mask"]
    h, branch = model.hidden_states(imgs, mask)
    close(model.lm_head(h)[mask], arrays["logits_mim"])
    close(model.lm_head(branch)[mask], arrays["logits_cls"])
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=1.5e-3, betas=(0.9, 0.98))
    gradients, found = official_state(golden("beit_v2", "grad/")), dict(model.named_parameters())
    assert len(gradients) > 40
    loss, logs = model(imgs, codes, mask)
    loss.backward()
    close(loss, arrays["loss"], 1e-6)
    close(logs["ce"], arrays["loss_mim"], 1e-6)
    close(logs["branch_ce"], arrays["loss_cls"], 1e-6)
    for name, gradient in gradients.items():
        close(found[name if name in found else f"encoder.{name}"].grad, gradient)
    for wanted in arrays["traj_mim_cls_gradnorm"]:
        optimizer.zero_grad()
        loss, logs = model(imgs, codes, mask)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        close(torch.stack([logs["ce"], logs["branch_ce"], norm]), wanted, 1e-6)
        optimizer.step()
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert id(model.mask_token) in decayed and id(model.encoder.cls_token) not in decayed
    assert id(model.encoder.rel_pos_bias.relative_position_bias_table) in decayed


# ---- the tokenizer ----


def test_codes_move_by_direction_whatever_their_count():
    """A code hit once moves as far as one hit often; one that nothing chose stays."""
    quantizer = beit_v2.Quantizer(3, 4, decay=0.9)
    quantizer.codebook.copy_(torch.eye(4)[:3])
    u = F.normalize(torch.tensor([[2.0, 0, 0, 1], [0, 2, 0, 1], [0, 2, 0, 1], [0, 4, 0, 2]]), dim=1)
    q, ids, loss, (sums, counts) = quantizer(u)
    assert ids.tolist() == [0, 1, 1, 1] and counts.tolist() == [1, 3, 0]
    quantizer.update(sums, counts)
    for k in (0, 1):
        wanted = F.normalize(0.9 * torch.eye(4)[k] + 0.1 * u[k], dim=0)
        assert torch.allclose(quantizer.codebook[k], wanted, atol=1e-6)
    assert torch.equal(quantizer.codebook[2], torch.eye(4)[2]) and quantizer.hits.tolist() == [1, 3, 0]
    quantizer.update(sums, counts)
    assert quantizer.hits.tolist() == [2, 6, 0]


def test_unused_codes_restart_at_vectors_of_the_batch():
    """Codes with hits stay; the others become unit vectors of the batch, and the count begins anew."""
    torch.manual_seed(0)
    quantizer, z = beit_v2.Quantizer(10, 4), torch.randn(50, 4) * 3
    quantizer.hits[:4] = 1
    before = quantizer.codebook.clone()
    quantizer.restart(z)
    assert torch.equal(quantizer.codebook[:4], before[:4]) and quantizer.hits.sum() == 0
    nearest = (quantizer.codebook[4:] @ F.normalize(z, dim=1).T).amax(1)
    assert torch.allclose(nearest, torch.ones(6), atol=1e-6) and len(quantizer.codebook[4:].unique(dim=0)) > 3


def loose_clusters(seed):
    """Four directions (4, 8), and 400 unit vectors about each, 40 degrees off on average: (1600, 8)."""
    torch.manual_seed(seed)
    centres = torch.eye(8)[:4]
    return centres, F.normalize(centres.repeat_interleave(400, 0) + 0.3 * torch.randn(1600, 8), dim=1)


def slow_kmeans(u, means, iterations):
    """Every vector goes to the nearest mean, every mean to the middle of its vectors; double precision."""
    u, means = u.double(), means.double()
    for _ in range(iterations):
        nearest = torch.cdist(u, means).argmin(1)
        means = torch.stack([u[nearest == k].sum(0) if (nearest == k).any() else means[k]
                             for k in range(len(means))])
        means = means / means.norm(dim=1, keepdim=True)
    return means.float()


def test_spherical_kmeans_against_a_slow_reference():
    """From the same random rows the same means, after any number of iterations; also with fewer vectors than
    codes, where a code without vectors stays.
    """
    _, u = loose_clusters(0)
    for vectors, num_codes in ((u, 12), (u[:5], 9)):
        torch.manual_seed(1)
        rows = beit_v2.spherical_kmeans(vectors, num_codes, 0)
        assert ((rows[:, None] == vectors).all(2).any(1)).all(), "it starts at vectors"
        for iterations in (1, 2, 10):
            torch.manual_seed(1)
            means = beit_v2.spherical_kmeans(vectors, num_codes, iterations)
            assert torch.allclose(means, slow_kmeans(vectors, rows, iterations), atol=1e-5)
    torch.manual_seed(1)
    assert len(beit_v2.spherical_kmeans(u, 1600, 0).unique(dim=0)) == 1600, "no vector is taken twice"


def test_the_first_codes_are_the_means_of_loose_clusters():
    """From ten random starts, each of which is far off, and whatever the lengths of the vectors."""
    for seed in range(10):
        centres, u = loose_clusters(seed)
        quantizer = beit_v2.Quantizer(4, 8)
        quantizer.start(u * torch.where(u[:, 7:] > 0.2, 50.0, 0.5))
        assert (centres @ quantizer.codebook.T).amax(1).min() > 0.99
        for iterations in (0, 1):
            torch.manual_seed(seed)
            rough = beit_v2.spherical_kmeans(u, 4, iterations)
            assert (centres @ rough.T).amax(1).min() < 0.99, "these clusters are found too easily"


def test_gradient_passes_the_codes_unchanged():
    """Straight through: the decoder's gradient arrives at u as if there were no codes."""
    quantizer, u = beit_v2.Quantizer(6, 4), F.normalize(torch.randn(9, 4), dim=1).requires_grad_()
    q, ids, _, _ = quantizer(u)
    assert torch.allclose(q, quantizer.codebook[ids], atol=1e-6) and not list(quantizer.parameters())
    upstream = torch.randn(9, 4)
    q.backward(upstream)
    tangent = upstream - (upstream * u).sum(1, keepdim=True) * u.detach()  # what normalising u lets through
    assert torch.allclose(u.grad, tangent, atol=1e-5)


def test_codes_that_a_gradient_trains(close):
    """--codes gradient: of |sg[u] - e|^2, 2 (e - u) / (n E) of each vector u that chose the code e; u has the
    gradient of the commitment alone, and no average moves the codes: after a step they have length 1."""
    torch.manual_seed(0)
    quantizer = beit_v2.Quantizer(6, 4, decay=0.5, commit=0.3, trained=True)
    z = torch.randn(9, 4).requires_grad_()
    _, ids, loss, moments = quantizer(z)
    e, u = quantizer.codebook.detach().clone(), F.normalize(z, dim=1)
    close(loss, 1.3 * (e[ids] - u).square().mean().detach())
    code_gradient, z_gradient = torch.autograd.grad(loss, (quantizer.codebook, z), retain_graph=True)
    wanted = torch.zeros(6, 4)
    for i, k in enumerate(ids.tolist()):
        wanted[k] += 2 * (e[k] - u[i].detach()) / (9 * 4)
    close(code_gradient, wanted)
    close(z_gradient, torch.autograd.grad(0.3 * (e[ids] - u).square().mean(), z)[0])
    quantizer.update(*moments)
    close(quantizer.codebook, e)
    assert quantizer.hits.tolist() == ids.bincount(minlength=6).tolist()
    with torch.no_grad():
        quantizer.codebook.mul_(3)
    quantizer.update(*moments)
    close(quantizer.codebook, e)


def test_codes_of_any_length():
    """--no-unit: the nearest in Euclid's distance, where the direction may say another; a code moves to the
    mean of its vectors, whatever their lengths, and unused ones begin anew at vectors as they are."""
    quantizer = beit_v2.Quantizer(3, 2, decay=0.9, unit=False)
    quantizer.codebook.copy_(torch.tensor([[1.0, 0], [0, 1], [5, 5]]))
    z = torch.tensor([[3.0, 3.5], [1, 0.9], [0.5, 0], [3, 1]])
    q, ids, loss, moments = quantizer(z)
    assert ids.tolist() == [2, 0, 0, 0]
    distances = torch.tensor([4 + 2.25, 0.81, 0.25, 4 + 1])
    assert torch.equal(q, quantizer.codebook[ids]) and torch.allclose(loss, distances.sum() / 8)
    quantizer.update(*moments)
    moved = 0.9 * torch.tensor([1.0, 0]) + 0.1 * z[1:].mean(0)
    assert torch.allclose(quantizer.codebook, torch.stack([moved, torch.tensor([0.0, 1]), torch.tensor(
        [0.9 * 5 + 0.1 * 3, 0.9 * 5 + 0.1 * 3.5])]), atol=1e-6)
    kept = quantizer.codebook[[0, 2]].clone()
    quantizer.restart(z)
    assert torch.equal(quantizer.codebook[[0, 2]], kept)
    assert (quantizer.codebook[1] == z).all(1).any() and not quantizer.hits.any()
    quantizer.start(z)
    assert all((code == z).all(1).any() for code in quantizer.codebook)


def test_tokenizer_loss_by_hand():
    """1 - cosine of the rebuilt features, mean over all patches, plus the commitment."""
    model, imgs, target = tiny_vqkd(), torch.randn(3, 3, 32, 32).clamp(-1, 1), torch.randn(3, 64, 20)
    loss, rec, commit, (sums, counts), z = model(imgs, target)
    u, ids = model.quantizer.nearest(model.vectors(imgs))
    rebuilt = model.rebuild(model.quantizer.codebook[ids])
    each = [1 - rebuilt[b, i] @ target[b, i] / rebuilt[b, i].norm() / target[b, i].norm()
            for b in range(3) for i in range(64)]
    assert torch.allclose(rec, sum(each) / len(each), rtol=1e-5)
    assert torch.allclose(commit, (model.quantizer.codebook[ids] - u).square().mean(), rtol=1e-5)
    assert torch.allclose(loss, rec + commit) and counts.sum() == 192 and z.shape == (192, 8)
    pixels = (imgs + 1) / 2
    assert torch.equal(model.tokens(pixels), ids) and ids.dtype == torch.long
    assert torch.equal(model.features(imgs)[2], ids[2].bincount(minlength=24))


def test_quantizer_is_float32_under_autocast():
    """bfloat16 in encoder and decoder; vectors, distances and codes are float32."""
    model = tiny_vqkd()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, rec, commit, (sums, counts), z = model(torch.randn(2, 3, 32, 32), torch.randn(2, 64, 20))
    assert {t.dtype for t in (loss, rec, commit, sums, counts, z)} == {torch.float32}
    quantizer, few, z = beit_v2.Quantizer(4096, 16), beit_v2.Quantizer(64, 16), torch.randn(2000, 16)
    wanted = quantizer.nearest(z)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer.nearest(z)[1], wanted)     # distances, too: bfloat16 moves 3% of them
        torch.manual_seed(0)
        few.start(z)
    torch.manual_seed(0)
    u = F.normalize(z, dim=1)
    wanted = slow_kmeans(u, beit_v2.spherical_kmeans(u, 64, 0), 10)
    assert ((few.codebook - wanted).norm(dim=1) < 1e-3).float().mean() > 0.9  # a tie may go the other way


def save(folder, model):
    torch.save({"model": model.state_dict(), "config": model.config, "method": "beit_v2", "data": "shapes",
                "mean": (0.5,) * 3, "std": (0.5,) * 3}, Path(folder) / "tokenizer.pt")


def teacher_file(path, **options):
    torch.manual_seed(2)
    encoder = ViT(**SMALL | {"depth": 2} | options)
    torch.save({"model": encoder.state_dict(), "config": encoder.config, "mean": (0.4,) * 3,
                "std": (0.2,) * 3}, path)
    return encoder


def test_teacher_sees_its_own_pixels_and_grid(tmp_path):
    """[-1, 1] to its mean and std; resized so that its patches are the student's; patch tokens only."""
    encoder = teacher_file(tmp_path / "encoder.pt")
    imgs = torch.rand(2, 3, 32, 32) * 2 - 1
    wanted = encoder.forward_features(((imgs + 1) / 2 - 0.4) / 0.2)[:, 1:]
    teacher = beit_v2.Teacher(tmp_path / "encoder.pt", 8)
    assert torch.allclose(teacher(imgs), wanted, atol=1e-5) and teacher.dim == 32
    assert not any(p.requires_grad for p in teacher.parameters())
    assert beit_v2.Teacher(tmp_path / "encoder.pt", 4)(imgs).shape == (2, 16, 32)


def test_monitor_counts_a_whole_set(tmp_path):
    """Usage, perplexity and cosine over all images, against one plain computation."""
    teacher_file(tmp_path / "encoder.pt")
    model, teacher = tiny_vqkd(teacher_dim=32), beit_v2.Teacher(tmp_path / "encoder.pt", 8)
    imgs, labels = data.draw_shapes(60, 32, seed=0)
    source = data.Images(imgs, labels, list("0123456789"), (0.5,) * 3, (0.5,) * 3)
    args = SimpleNamespace(device="cpu", amp="none", batch_size=8, epochs=1, max_steps=0)
    result, counts = beit_v2.monitor(args, model, teacher, source, data.View(32))
    x = imgs.float() / 127.5 - 1
    ids = model.quantizer.nearest(model.vectors(x))[1]
    assert torch.equal(counts, ids.flatten().bincount(minlength=24))
    share = counts[counts > 0] / counts.sum()
    near = F.cosine_similarity(model.rebuild(model.quantizer.codebook[ids]), teacher(x), dim=-1).mean()
    assert result["usage"] == pytest.approx((counts > 0).float().mean().item())
    assert result["perplexity"] == pytest.approx((-(share * share.log()).sum()).exp().item(), rel=1e-5)
    assert result["cosine"] == pytest.approx(near.item(), abs=1e-5)


# ---- pre-training ----


def test_the_branch_sees_deep_information_through_the_class_token_only():
    """It reads [class token of the last block, patches of the early one]."""
    model, (imgs, codes, mask) = tiny_beit(), batch()
    read = []
    model.cls_pt_layers[0].register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    outputs = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model.hidden_states(imgs, mask)
    assert torch.equal(read[0][:, 0], outputs[3][:, 0]) and torch.equal(read[0][:, 1:], outputs[2][:, 1:])


@pytest.mark.parametrize("options, names", (({}, set()), (dict(shared_head=False), {"cls_pt_lm_head.weight"}),
                                            (dict(branch_depth=0), set())))
def test_heads_and_branch_by_flag(options, names):
    """One head for both, one each, or no branch: losses, logs and which parameters there are."""
    model, (imgs, codes, mask) = tiny_beit(**options), batch()
    loss, logs = model(imgs, codes, mask)
    heads = {name for name, _ in model.named_parameters() if "lm_head.weight" in name}
    assert heads == names | {"lm_head.weight"}
    assert ("branch_ce" in logs) == (options.get("branch_depth") != 0)
    h, branch = model.hidden_states(imgs, mask)
    logits = model.lm_head(h)[mask].log_softmax(-1)
    wanted = -logits.gather(1, codes[mask][:, None]).mean()
    assert torch.allclose(logs["ce"], wanted, rtol=1e-5)
    if branch is not None:
        head = model.cls_pt_lm_head if names else model.lm_head
        wanted = wanted + F.cross_entropy(head(branch)[mask], codes[mask])
    assert torch.allclose(loss, wanted, rtol=1e-5)
    assert model.features(imgs).shape == (4, 32)


@pytest.mark.parametrize("shared", (True, False))
def test_norm_and_head_of_the_branch(shared):
    """The encoder's where the head is shared, else its own; no norm is the identity here."""
    model, (imgs, codes, mask) = tiny_beit(shared_head=shared), batch()
    norms = [model.encoder.norm] if shared else [model.encoder.norm, model.cls_pt_norm]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    read = []
    model.cls_pt_layers[-1].register_forward_hook(lambda module, inputs, output: read.append(output))
    _, logs = model(imgs, codes, mask)
    x = F.layer_norm(read[0][:, 1:], (32,), norms[-1].weight, norms[-1].bias, 1e-6)
    head = model.lm_head if shared else model.cls_pt_lm_head
    assert torch.allclose(logs["branch_ce"], F.cross_entropy(head(x)[mask], codes[mask]), rtol=1e-5)
    assert (model.cls_pt_norm is None) == (model.cls_pt_lm_head is None) == shared


def test_official_initialisation():
    """Within one standard deviation; block l's last weights divided by sqrt(2 l), the branch's, too."""
    model = tiny_beit()
    for number, block in [(1, model.encoder.blocks[0]), (4, model.encoder.blocks[3]),
                          (4, model.cls_pt_layers[0]), (5, model.cls_pt_layers[1])]:
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert 0.015 < weight.abs().max() * (2 * number) ** 0.5 <= 0.02 + 1e-6
        assert (block.gamma_1 == 0.1).all() and (block.attn.qkv.bias == 0).all()


@pytest.mark.parametrize("make, target", ((tiny_beit, None), (tiny_vqkd, 20)))
def test_one_batch_is_overfitted(make, target):
    """Real steps bring the loss of either stage down, and every weight gets a gradient."""
    model, (_, codes, mask) = make(), batch(2)
    imgs = data.draw_shapes(2, 32, seed=0)[0].float() / 127.5 - 1
    features = None if target is None else torch.randn(2, 64, target)
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), lr=3e-3)
    losses = []
    for _ in range(60):
        loss, *rest = model(imgs, codes, mask) if target is None else model(imgs, features)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if target is not None:
            model.quantizer.update(*rest[2])
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), losses


# ---- files and mistakes ----


@pytest.mark.parametrize("options", ({}, dict(unit=False), dict(trained=True)))
def test_tokenizer_file(options, tmp_path):
    """A saved file, load_tokenizer: the same codes, frozen, of vectors of length 1 or of any."""
    model = tiny_vqkd(**options)
    with torch.no_grad():
        model.encode_task_layer[2].weight.mul_(100)             # as long as the codes
    save(tmp_path, model)
    loaded, imgs = dvae.load_tokenizer(tmp_path / "tokenizer.pt"), torch.rand(3, 3, 32, 32)
    assert torch.equal(loaded.tokens(imgs), model.tokens(imgs)) and len(model.tokens(imgs).unique()) > 1
    if "unit" in options:
        model.quantizer.unit = True
        assert not torch.equal(loaded.tokens(imgs), model.tokens(imgs)), "lengths do not matter"
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert (loaded.vocab, loaded.grid, loaded.img_size) == (24, 8, 32)


def test_an_old_tokenizer_has_unit_vectors(tmp_path):
    """Its config says nothing of them."""
    model, imgs = tiny_vqkd(), torch.rand(3, 3, 32, 32)
    assert model.config.pop("unit") is True
    save(tmp_path, model)
    loaded = dvae.load_tokenizer(tmp_path / "tokenizer.pt")
    assert loaded.quantizer.unit and torch.equal(loaded.tokens(imgs), model.tokens(imgs))


@pytest.mark.parametrize("kind", ("unit", "any length", "dVAE"))
def test_picture_of_the_predicted_codes(kind, monkeypatch):
    """Cosine of the predicted code's vector to the true one's, whatever their lengths; a dVAE's codes have no
    vectors: 1 or 0. What is visible is left out."""
    model, (imgs, _, mask), rows = tiny_beit(), batch(), []
    tokenizer = (dvae.DVAE(grid=8, stride=4, n_hid=8, vocab=64) if kind == "dVAE"
                 else tiny_vqkd(num_codes=64, unit=kind == "unit"))
    ids = tokenizer.tokens(pixels := torch.rand(4, 3, 32, 32))
    guess = torch.where(torch.arange(64) < 32, ids, (ids + 1) % 64)         # right in the upper half
    monkeypatch.setattr(model.lm_head, "forward", lambda h: F.one_hot(guess, 64))
    monkeypatch.setattr(data, "save_rows", lambda path, *drawn, scale: rows.append((*drawn, scale)))
    beit_v2.pictures(model, tokenizer, [imgs, pixels], mask, SimpleNamespace(mean=(0.0,) * 3, std=(1.0,) * 3),
                     "x.png")
    (found, title, scale), = rows
    assert scale == ((0, 1) if kind == "dVAE" else (-1, 1))
    near = found["predicted and\ntrue code"].flatten(1)
    for b in range(4):
        for i in range(64):
            a, c = guess[b, i], ids[b, i]
            wanted = (math.nan if not mask[b, i] else 1.0 if a == c else 0.0 if kind == "dVAE" else
                      F.cosine_similarity(tokenizer.quantizer.codebook[a], tokenizer.quantizer.codebook[c],
                                          dim=0).item())
            assert near[b, i].item() == pytest.approx(wanted, abs=1e-5, nan_ok=True)
    assert title.startswith(f"{mask[:, :32].sum() / mask.sum():.1%} of the hidden codes")


@pytest.mark.parametrize("flags, words", (
    ("--stage tokenizer", "there is no teacher out/mae-shapes/encoder.pt: train one with python mae.py"),
    ("--stage tokenizer --teacher other.pt", "other.pt is no encoder"),
    ("--stage tokenizer --teacher relative.pt", "has 4 x 4 patches and relative positions"),
    ("--stage pretrain", "there is no out/beit_v2-tokenizer-shapes/tokenizer.pt: train it with python"),
    ("--stage pretrain --tokenizer other.pt", "other.pt is no tokenizer: train one with"),
    ("--stage pretrain --tokenizer coarse.pt", "coarse.pt makes 4 x 4 tokens, but the ViT has 8 x 8 patches"),
    ("--stage pretrain --num_masked 64", "--num_masked 64 must lie between 1 and 63"),
    ("--stage pretrain --early_layer 7", "--early_layer 7 must lie between 1 and 6"),
    ("--init here.pt", "give --stage tokenizer or --stage pretrain, too"),
))
def test_wrong_flags_and_files(flags, words, tmp_path, monkeypatch, capsys):
    """Missing teacher, a teacher of another grid, wrong stage's file: one sentence each."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "method": "mae"}, "other.pt")
    teacher_file("relative.pt", img_size=16, pos="none", rel_pos="shared")
    save(tmp_path, beit_v2.VQKD(ViT(**SMALL | {"img_size": 16}), 24, 8, 1, 20))
    (tmp_path / "tokenizer.pt").rename("coarse.pt")
    monkeypatch.setattr("sys.argv", ["beit_v2.py", "--data", "shapes", "--device", "cpu", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        beit_v2.main()
    assert stopped.value.code == 2 and words in capsys.readouterr().err
