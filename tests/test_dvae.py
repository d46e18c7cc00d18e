"""dVAE: numbers of DALL-E's encoder, the objective against slow references, the tokenizer file."""
import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import dvae
from vit import half_cosine, param_groups


def tiny_dvae(**options):
    torch.manual_seed(0)
    return dvae.DVAE(**dict(grid=4, stride=4, n_hid=8, vocab=32) | options)


def drawn(n=8, size=16):
    return data.draw_shapes(n, size, seed=0)[0].float() / 255


def save(folder, model):
    torch.save({"model": model.state_dict(), "config": model.config, "method": "dvae", "data": "shapes",
                "mean": (0.0,) * 3, "std": (1.0,) * 3}, Path(folder) / "tokenizer.pt")


@pytest.fixture(autouse=True)
def one_thread():
    """Of these small convolutions each waits for a second thread longer than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


ONE = torch.tensor(1.0)

# ---- the official network ----


def test_official_encoder(golden, close):
    """Same weights and pixels: logits, codes and KL of DALL-E's encoder."""
    arrays = golden("dvae")
    encoder = dvae.Encoder(4, 16, 2, 64)
    close(dvae.map_pixels(arrays["img"]), arrays["x"], 1e-6)
    encoder.load_state_dict(golden("dvae", "w/") | golden("dvae_group_4", "w/"))
    logits = encoder(dvae.map_pixels(arrays["img"]))
    close(logits, arrays["logits"])
    close(dvae.kl_to_uniform(logits), arrays["kl_uniform"])
    assert torch.equal(logits.argmax(1), arrays["codes"].long())
    block = encoder.blocks.group_1.block_1
    assert block.gain == 1 / 64
    close(block(arrays["block_in"]), arrays["block_out"])


def test_official_names_and_sizes():
    """With DALL-E's flags: number of tensors, of parameters, and shapes of the released files."""
    with torch.device("meta"):
        model = dvae.DVAE(grid=14, stride=8, n_hid=256, blocks=2, vocab=8192)
    shapes = [{name: tuple(p.shape) for name, p in part.named_parameters()}
              for part in (model.encoder, model.decoder)]
    assert [len(s) for s in shapes] == [74, 76]
    assert [sum(map(math.prod, s.values())) for s in shapes] == [53_786_240, 43_829_766]
    wanted = {"input.weight": ((256, 3, 7, 7), (128, 8192, 1, 1)),
              "group_1.block_1.res_path.conv_1.weight": ((64, 256, 3, 3), (512, 128, 1, 1)),
              "group_1.block_1.res_path.conv_4.weight": ((256, 64, 1, 1), (2048, 512, 3, 3)),
              "group_2.block_1.id_path.weight": ((512, 256, 1, 1), (1024, 2048, 1, 1)),
              "group_4.block_2.res_path.conv_1.weight": ((512, 2048, 3, 3), (64, 256, 1, 1)),
              "group_4.block_2.res_path.conv_4.bias": ((2048,), (256,)),
              "output.conv.weight": ((8192, 2048, 1, 1), (6, 256, 1, 1))}
    for name, pair in wanted.items():
        assert tuple(s[f"blocks.{name}"] for s in shapes) == pair, name


def test_stride_and_initialisation():
    """The grid is the image divided by the stride; weights deviate by 1 / sqrt(fan-in), biases are 0."""
    for stride, size in ((1, 4), (2, 8), (8, 32)):
        model = dvae.DVAE(grid=4, stride=stride, n_hid=8, vocab=32)
        assert model.logits(torch.rand(2, 3, size, size)).shape == (2, 32, 4, 4)
        assert model.paint(torch.zeros(2, 16, dtype=torch.long)).shape == (2, 3, size, size)
    layer = dvae.conv(64, 64, 3)
    assert layer.weight.std().item() == pytest.approx(1 / 24, rel=0.02) and (layer.bias == 0).all()
    with pytest.raises(AssertionError, match="reads"):
        model.tokens(torch.rand(2, 3, 16, 16))


# ---- the objective ----


def test_likelihoods():
    """The logit-Laplace density integrates to one over t; both likelihoods are their formulas."""
    t = torch.linspace(1e-4, 1 - 1e-4, 200_001, dtype=torch.double)
    x = ((t - 0.1) / 0.8).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    out = torch.tensor([0.5, -1, 0.0, -0.7, -0.2, 0.3], dtype=torch.double).view(1, 6, 1, 1)
    density = dvae.log_laplace(x, out).exp()
    assert torch.allclose(torch.trapezoid(density[0, :, 0], t), torch.ones(3, dtype=torch.double), atol=2e-3)
    x, mu, ln_b = 0.3, 0.8, -0.5
    t, b = 0.8 * x + 0.1, math.exp(ln_b)
    wanted = math.log(1 / (2 * b * t * (1 - t))) - abs(math.log(t / (1 - t)) - mu) / b
    out = torch.tensor([mu] * 3 + [ln_b] * 3).view(1, 6, 1, 1)
    assert torch.allclose(dvae.log_laplace(torch.full((1, 3, 1, 1), x), out), torch.tensor(wanted))
    assert dvae.log_gauss(torch.tensor(0.3), torch.tensor(0.5)).item() == pytest.approx(-0.04 / 0.02)


def test_pixel_map_and_ramp():
    """[0, 1] -> [0.1, 0.9] and back; half a cosine, then constant."""
    x = torch.rand(100)
    assert torch.allclose(dvae.unmap_pixels(dvae.map_pixels(x)), x, atol=1e-6)
    assert dvae.map_pixels(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.1, 0.9])
    assert dvae.unmap_pixels(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
    assert [half_cosine(d, 1.0, 1 / 16) for d in (0, 0.5, 1, 7)] == \
        pytest.approx([1, (1 + 1 / 16) / 2, 1 / 16, 1 / 16])
    assert half_cosine(0.25, 0.0, 6.6) == pytest.approx(6.6 * (1 - math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("recon", ("laplace", "mse"))
def test_loss_is_the_equation(recon):
    """(-sum over pixels of log p + beta * sum over places of KL) / (3 H W), mean over the images."""
    model, imgs, beta = tiny_dvae(recon=recon), drawn(), torch.tensor(6.6)
    torch.manual_seed(3)
    loss, nll, kl = model(imgs, torch.tensor(0.7), beta)
    torch.manual_seed(3)
    logits = model.logits(imgs)
    out = model.decoder(dvae.gumbel_softmax(logits, torch.tensor(0.7)))
    log_p = dvae.log_laplace(imgs, out) if recon == "laplace" else dvae.log_gauss(imgs, out)
    each = [-log_p[b].sum() + beta * dvae.kl_to_uniform(logits)[b].sum() for b in range(8)]
    assert torch.allclose(loss, sum(each) / 8 / (3 * 16 * 16), rtol=1e-5)
    assert torch.allclose(nll, -log_p.mean()) and torch.allclose(kl, dvae.kl_to_uniform(logits).mean())


def test_trivial_level_is_the_best_constant():
    """No other mu or b (or colour) for the whole image does better, and the decoder's likelihood agrees."""
    imgs = drawn(50)
    logit = dvae.map_pixels(imgs).logit().transpose(0, 1).flatten(1)
    mu = logit.median(1)[0]
    ln_b = (logit - mu[:, None]).abs().mean(1).log()
    best = dvae.trivial_level(imgs, "laplace")

    def level(mu, ln_b):
        out = torch.cat([mu, ln_b]).view(1, 6, 1, 1).expand(50, -1, 16, 16)
        return -dvae.log_laplace(imgs, out).mean().item()
    assert level(mu, ln_b) == pytest.approx(best, abs=1e-4)
    for step in (0.1, -0.1):
        assert level(mu + step, ln_b) > best and level(mu, ln_b + step) > best
    mean = imgs.mean((0, 2, 3)).view(1, 3, 1, 1)
    found = -dvae.log_gauss(imgs, mean).mean().item()
    assert found == pytest.approx(dvae.trivial_level(imgs, "mse"), rel=1e-3)


# ---- tokens and paint ----


def test_tokens_are_the_argmax_in_raster_order():
    """(B, N) long; one bright corner changes the codes near that corner only; no noise."""
    model = tiny_dvae(grid=8)
    dark = torch.zeros(1, 3, 32, 32)
    light = dark.clone()
    light[:, :, :4, 28:] = 1                                    # patch 7
    a, b = model.logits(dark).flatten(2), model.logits(light).flatten(2)
    moved = (a - b).abs().sum(1)[0]
    assert moved.argmax() == 7 and moved[56] < 0.1 * moved[7]
    assert torch.equal(model.tokens(light), b.argmax(1)) and model.tokens(light).dtype == torch.long
    assert torch.equal(model.tokens(light), model.tokens(light))


@pytest.mark.parametrize("recon", ("laplace", "mse"))
def test_paint_of_codes_is_the_decoder_on_one_hot_vectors(recon):
    """The look-up of the first layer's columns is its product with one-hot vectors."""
    model = tiny_dvae(recon=recon)
    ids = torch.randint(32, (3, 16))
    one_hot = F.one_hot(ids.view(3, 4, 4), 32).permute(0, 3, 1, 2).float()
    painted = model.pixels(model.decoder(one_hot))
    assert torch.allclose(model.paint(ids), painted, atol=1e-6)
    assert painted.shape == (3, 3, 16, 16) and 0 <= painted.min() and painted.max() <= 1


def test_logits_are_float32_under_autocast():
    """bfloat16 inside; logits, relaxed codes and losses are float32. Codes are computed in float32."""
    model, imgs = tiny_dvae(), drawn(50)
    wanted = model.tokens(imgs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.logits(drawn()).dtype == torch.float32
        assert {t.dtype for t in model(drawn(), ONE, ONE)} == {torch.float32}
        assert torch.equal(model.tokens(imgs), wanted)          # bfloat16 moves a few of the 800


# ---- monitors ----


def test_monitor_counts_a_whole_set():
    """usage, perplexities, KL and errors over all images, against one plain computation."""
    model, view = tiny_dvae(), data.View(16)
    args = SimpleNamespace(device="cpu", amp="none", batch_size=8, epochs=1, max_steps=0)
    imgs, labels = data.draw_shapes(300, 16, seed=0)
    source = data.Images(imgs, labels, list("0123456789"), (0.0,) * 3, (1.0,) * 3)
    result, counts = dvae.monitor(args, model, source, view, 1e-4)
    pixels = imgs.float() / 255
    logits = model.logits(pixels)
    ids = logits.argmax(1)
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=32)) and counts.sum() == 300 * 16
    share = counts[counts > 0] / counts.sum()
    q = logits.softmax(1)
    wanted = {"usage": (counts > 0).float().mean(), "perplexity": (-(share * share.log()).sum()).exp(),
              "posterior_perplexity": (-(q * q.log()).sum(1).mean()).exp(),
              "kl": math.log(32) + (q * q.log()).sum(1).mean(),
              "mae": (2 * model.paint(ids.flatten(1)) - 2 * pixels).abs().mean()}
    for name, value in wanted.items():
        assert result[name] == pytest.approx(value.item(), rel=1e-4), name
    assert result.keys() == wanted.keys() | {"gap"} and model.training


def test_collapse_is_said_in_words():
    """A posterior that says nothing, few codes in use, and a healthy vocabulary."""
    healthy = {"kl": 1.5, "usage": 0.8, "perplexity": 200.0}
    assert dvae.collapse(healthy, 512) is None
    assert "posterior has collapsed" in dvae.collapse(healthy | {"kl": 0.01}, 512)
    assert "larger --beta" in dvae.collapse(healthy | {"usage": 0.05}, 512)
    assert "perplexity 7 of 512" in dvae.collapse(healthy | {"perplexity": 7.0}, 512)


def test_features_are_counts_of_codes():
    """Of images of any size, made as large as the tokenizer reads them."""
    model, imgs = tiny_dvae(), drawn(size=32)
    ids = model.tokens(data.resize(imgs, 16))
    for b in range(8):
        assert model.features(imgs)[b].tolist() == [ids[b].tolist().count(k) for k in range(32)]


def test_pictures_of_the_vocabulary(tmp_path, monkeypatch):
    """Rows: images, their codes painted, codes drawn at random painted; spectra of images, of what is painted
    and of normalised patches, whose sum over all cycles is 1."""
    model, imgs, rows, plots = tiny_dvae(), drawn(10), [], []
    monkeypatch.setattr(data, "save_rows", lambda path, found, title: rows.append(found))
    monkeypatch.setattr(data, "save_usage", lambda *args: None)
    monkeypatch.setattr(data, "save_plot", lambda path, lines, **settings: plots.append((path, lines)))
    dvae.pictures(model, imgs, torch.arange(32), tmp_path / "000000.png")
    (found,), ((path, lines),) = rows, plots
    assert [row.shape for row in found.values()] == 3 * [(8, 3, 16, 16)] and model.training
    painted = model.paint(model.tokens(imgs))
    assert torch.equal(found["hard codes"], painted[:8])
    assert not torch.equal(found["random codes"], painted[:8])
    assert path == tmp_path / "spectrum.png" and len(lines) == 3
    for (name, energy), x in zip(lines.items(), (imgs, painted)):
        assert torch.equal(energy, data.spectrum(x)) and energy.sum().item() == pytest.approx(1, abs=1e-5)
        assert f" {sum(energy[2:].tolist()):.0%} in the upper two thirds" in name


# ---- training and files ----


@pytest.mark.parametrize("options", ({}, dict(recon="mse"), dict(straight_through=True)))
def test_one_batch_is_overfitted(options):
    """Real steps bring the loss down, and every weight of encoder and decoder gets a gradient."""
    model, imgs = tiny_dvae(**options), drawn()
    optimizer = torch.optim.AdamW(param_groups(model, 1e-4), lr=3e-3)
    losses = []
    for _ in range(60):
        loss, _, _ = model(imgs, torch.tensor(0.5), torch.tensor(0.1))
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3, losses


def test_tokenizer_file(tmp_path):
    """A saved file, load_tokenizer: the same codes and pixels, frozen, in evaluation mode."""
    model = tiny_dvae()
    save(tmp_path, model)
    loaded = dvae.load_tokenizer(tmp_path / "tokenizer.pt")
    imgs = drawn()
    assert torch.equal(loaded.tokens(imgs), model.tokens(imgs))
    assert torch.equal(loaded.paint(loaded.tokens(imgs)), model.paint(model.tokens(imgs)))
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert (loaded.vocab, loaded.grid, loaded.img_size) == (32, 4, 16)


@pytest.mark.parametrize("spoil, words", (
    (lambda path, content: path.unlink(), "there is no file"),
    (lambda path, content: torch.save({"model": {}, "method": "mae"}, path), "is no tokenizer: train one"),
    (lambda path, content: path.write_bytes(path.read_bytes()[:2000]), "cannot be read as a checkpoint"),
    (lambda path, content: torch.save(content | {"config": content["config"] | {"vocab": 33}}, path),
     "belongs to another model"),
))
def test_a_file_that_is_no_tokenizer(spoil, words, tmp_path, capsys):
    """Missing, of another method, truncated, of other sizes: one sentence each."""
    path = tmp_path / "tokenizer.pt"
    save(tmp_path, tiny_dvae())
    spoil(path, torch.load(path))
    with pytest.raises(SystemExit) as stopped:
        dvae.load_tokenizer(path)
    assert stopped.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", (("--stride 3", "--stride 3 must be a power of two"),
                                          ("--n_hid 10", "--n_hid 10 divisible by 4"),
                                          ("--vocab 1", "argument --vocab: 1 must lie in [2, 1e9]")))
def test_wrong_flags(flags, words, monkeypatch, capsys):
    """One sentence before anything is begun."""
    monkeypatch.setattr("sys.argv", ["dvae.py", "--data", "shapes", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        dvae.main()
    assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_the_average_follows_the_weights():
    """What is exported is the running average: it moves by 1 - momentum of the way to the weights."""
    model = tiny_dvae()
    ema = copy.deepcopy(model)
    before = copy.deepcopy(model)
    nn.init.normal_(model.decoder.blocks.input.weight)
    dvae.update_ema(ema, model, 0.75)
    a, b, c = (m.decoder.blocks.input.weight for m in (before, model, ema))
    assert torch.allclose(c, 0.75 * a + 0.25 * b, atol=1e-6)
