"""Thirteen exercises: one function of the course, one test, one point each.

    python -m pytest tests/test_exercises.py                    # how many points
    python -m pytest tests/test_exercises.py -k patchify        # one exercise

Each test compares with a slow and obvious way to compute the same, or with numbers worked out by hand. None
needs another exercise to be solved. `python tests/handout.py OUT` writes the repository without solutions.
(PYTEST_DONT_REWRITE: what a test says when it fails is what is written here.)
"""
import math
from unittest.mock import patch

import torch
import torch.nn.functional as F

import beit_v2
import cae
import data
import dvae
import ibot
import mae
import vit


def same(found, wanted, what):
    """Two tensors are equal up to rounding; if not: `what` they are, and where they differ first."""
    __tracebackhide__ = True
    assert isinstance(found, torch.Tensor), f"{what}: {found!r} is no tensor"
    found, wanted = found.detach(), torch.as_tensor(wanted).detach()
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    wrong = ~torch.isclose(found.double(), wanted.double(), rtol=1e-4, atol=1e-5)       # nan is wrong, too
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        a, b = (x[tuple(place)].item() for x in (found, wanted))
        where = f" at {place}; {wrong.sum()} of {wrong.numel()} differ" if place else ""
        raise AssertionError(f"{what}: {a:.5g}, not {b:.5g}{where}")


# ---- mae.py ----


def patches_by_loops(imgs, p):
    """What patchify returns: patch after patch, in each row after row, pixel after pixel, three colours."""
    values = [imgs[:, colour, top + row, left + column]
              for top in range(0, imgs.shape[2], p) for left in range(0, imgs.shape[3], p)
              for row in range(p) for column in range(p) for colour in range(3)]
    return torch.stack(values, 1).view(len(imgs), -1, 3 * p * p)


def test_patchify():
    imgs = torch.arange(48.0).view(1, 3, 4, 4)                  # red 0 to 15, green 16 to 31, blue 32 to 47
    patches = mae.patchify(imgs, 2)
    assert patches.shape == (1, 4, 12), f"shape {tuple(patches.shape)}, not 4 patches of 2 x 2 x 3 values"
    same(patches[0, 1], [2.0, 18, 34, 3, 19, 35, 6, 22, 38, 7, 23, 39], "the patch at the top right")
    same(patches[0, 2], [8.0, 24, 40, 9, 25, 41, 12, 28, 44, 13, 29, 45], "the patch at the bottom left")
    imgs = torch.arange(864.0).view(2, 3, 12, 12)
    same(mae.patchify(imgs, 4), patches_by_loops(imgs, 4), "two images in patches of 4 x 4")


def test_random_masking():
    ids_keep, ids_restore, mask = mae.random_masking(torch.tensor([[0.5, 0.1, 0.9, 0.3]]), 2)
    same(ids_keep, [[1, 3]], "ids_keep for the noise 0.5, 0.1, 0.9, 0.3: the two smallest")
    same(ids_restore, [[2, 0, 3, 1]], "ids_restore: 0.5 is the third smallest, so its rank is 2, and so on")
    same(mask, [[1.0, 0, 1, 0]], "mask: patches 0 and 2 are hidden, 1, and patches 1 and 3 kept, 0")
    torch.manual_seed(0)
    noise = torch.rand(5, 64)
    ids_keep, ids_restore, mask = mae.random_masking(noise, 16)
    assert mask.dtype == torch.float32, f"mask multiplies a loss, so it is float32, not {mask.dtype}"
    for b in range(5):
        order = sorted(range(64), key=lambda i: noise[b, i].item())
        same(ids_keep[b], order[:16], f"ids_keep of image {b}: the 16 smallest, in their order")
        same(mask[b], [0.0 if i in order[:16] else 1.0 for i in range(64)], f"mask of image {b}")
        same(torch.tensor(order)[ids_restore[b]], range(64), f"image {b}: ids_restore undoes the shuffle")


@patch.object(mae, "patchify", patches_by_loops)                # as that exercise may not be solved yet
def test_pixel_targets():
    torch.manual_seed(0)
    imgs = torch.randn(2, 3, 8, 8)
    imgs[0, :, :4, :4] = 0.7                                    # a patch of one value
    target, patches = mae.pixel_targets(imgs, 4, norm_pix_loss=True), patches_by_loops(imgs, 4)
    assert target.shape == (2, 4, 48), f"shape {tuple(target.shape)}, not 4 patches of 48 values"
    assert target[0, 0].abs().max() < 1e-3, "a patch of one value is all 0: 1e-6 is added to its variance, 0"
    values = patches[1, 2].tolist()
    mean = sum(values) / 48
    var = sum((x - mean) ** 2 for x in values) / 47             # unbiased: of 48 values, over 47
    wanted = [(x - mean) / math.sqrt(var + 1e-6) for x in values]
    same(target[1, 2], wanted, "(x - mean) / sqrt(var + 1e-6), of the 48 values of a patch together")
    same(mae.pixel_targets(imgs, 4, norm_pix_loss=False), patches, "without norm_pix_loss: the patches")
    found = mae.pixel_targets(imgs.bfloat16(), 4, norm_pix_loss=False)
    assert found.dtype == torch.float32, f"bfloat16 is too coarse for a target: float32, not {found.dtype}"


# ---- dvae.py ----


def test_gumbel_softmax():
    torch.manual_seed(0)
    logits, noise = torch.randn(2, 5, 2, 3), torch.randn(2, 5, 2, 3)
    y = dvae.gumbel_softmax(logits, torch.tensor(0.3), noise=noise)
    for b, i, j in ((b, i, j) for b in range(2) for i in range(2) for j in range(3)):
        e = [math.exp((logits[b, k, i, j] + noise[b, k, i, j]) / 0.3) for k in range(5)]
        same(y[b, :, i, j], [x / sum(e) for x in e], f"softmax((logits + noise) / 0.3), image {b}, {i, j}")

    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])                # and with noise of its own:
    for tau in (1.0, 1 / 16):
        y = dvae.gumbel_softmax(logits.view(1, 4, 1, 1).expand(20_000, -1, -1, -1), tau)
        share, q = y.argmax(1).flatten().bincount(minlength=4) / 20_000, logits.softmax(0)
        assert (share - q).abs().max() < 0.015, (
            f"the largest code of a sample is each with the probability softmax(logits), "
            f"{q.numpy().round(3)}, whatever tau, not {share.numpy().round(3)}")
        assert torch.allclose(y.sum(1), torch.ones(1)), "every sample adds up to 1"
    assert y.amax(1).mean() > 0.9, "at tau 1 / 16 samples are nearly one-hot"

    logits, noise, weight = (torch.randn(2, 5, 2, 2) for _ in range(3))
    soft, hard = (logits.clone().requires_grad_() for _ in range(2))
    relaxed = dvae.gumbel_softmax(soft, 0.5, False, noise)
    sample = dvae.gumbel_softmax(hard, 0.5, True, noise)
    one_hot = F.one_hot(relaxed.argmax(1), 5).permute(0, 3, 1, 2).float()
    same(sample, one_hot, "hard=True: 1 for the largest code, 0 for the others")
    assert sample.requires_grad, "hard=True: no gradient comes through"
    (relaxed * weight).sum().backward()
    (sample * weight).sum().backward()
    same(hard.grad, soft.grad, "hard=True: the gradient is that of the relaxed sample")


def test_kl_to_uniform():
    kl = dvae.kl_to_uniform(torch.full((2, 7, 3, 4), 3.0))
    same(kl, torch.zeros(2, 3, 4), "seven equal logits are the uniform distribution, at every place")
    certain = torch.tensor([1e4, 0, 0, 0]).view(1, 4, 1, 1)
    same(dvae.kl_to_uniform(certain).flatten(), [math.log(4)], "one certain code of 4: ln 4, for 0 ln 0 is 0")
    logits = torch.tensor([[1.0, 0, -1], [0, 3, 0]])            # two images of one place
    wanted = [sum(q * math.log(q / (1 / 3)) for q in row.softmax(0).tolist()) for row in logits]
    same(dvae.kl_to_uniform(logits.view(2, 3, 1, 1)).flatten(), wanted, "sum_k q_k ln(q_k / (1 / K))")


# ---- ibot.py ----


def cross_entropy(q, logits, temp):
    """-sum_k q_k log p_k of two lists of K numbers, p = softmax(logits / temp)"""
    total = sum(math.exp(x / temp) for x in logits)
    return -sum(a * math.log(math.exp(x / temp) / total) for a, x in zip(q, logits))


def test_cls_loss():
    torch.manual_seed(0)
    q = torch.randn(2, 3, 4).softmax(-1)                        # 2 global crops of 3 images, 4 prototypes
    loss = ibot.cls_loss(q, torch.zeros(5, 3, 4))
    same(loss, math.log(4), "equal logits of 4 prototypes: ln 4, whatever the teacher says")
    student = torch.randn(5, 3, 4)                              # the same 2 crops, then 3 local ones
    pairs = [(u, v) for u in range(2) for v in range(5) if u != v]
    for temp in (0.1, 0.5):
        losses = [cross_entropy(q[u, b].tolist(), student[v, b].tolist(), temp)
                  for u, v in pairs for b in range(3)]
        same(ibot.cls_loss(q, student, temp), sum(losses) / len(losses),
             f"the mean over 8 pairs of different crops and 3 images, student at temperature {temp}")


def test_patch_loss():
    torch.manual_seed(0)
    q, student = torch.randn(6, 4).softmax(-1), torch.randn(6, 4)
    weight = torch.tensor([1, 1, 1, 1, 0, 0.0])                 # two rows are padding
    loss = ibot.patch_loss(q, torch.zeros(6, 4), weight / 4)
    same(loss, math.log(4), "equal logits of 4 prototypes: ln 4, whatever the teacher says")
    weight = torch.tensor([0.5, 0.5 / 3, 0.5 / 3, 0.5 / 3, 0, 0])   # 2 crops, of 1 and of 3 hidden patches
    for temp in (0.1, 0.5):
        losses = [cross_entropy(*row, temp) for row in zip(q.tolist(), student.tolist())]
        wanted = (losses[0] + (losses[1] + losses[2] + losses[3]) / 3) / 2
        same(ibot.patch_loss(q, student, weight, temp), wanted,
             f"the mean over each crop's hidden patches, then over the crops, student at temperature {temp}")


# ---- beit_v2.py ----


def test_quantizer_update():
    def moved(sums, counts, codes, **options):
        quantizer = beit_v2.Quantizer(3, 2, decay=0.9, **options)
        with torch.no_grad():
            quantizer.codebook.copy_(torch.tensor(codes))
        quantizer.update(torch.tensor(sums), torch.tensor(counts))
        return quantizer

    # code 0 was the nearest to one vector, (0, 1); code 1 to ten, whose sum is (3, 4); code 2 to none
    codes, sums, counts = [[1.0, 0], [0, 1], [-1, 0]], [[0.0, 1], [3, 4], [0, 0]], [1.0, 10, 0]
    quantizer = moved(sums, counts, codes)
    a, b = math.hypot(0.9, 0.1), math.hypot(0.06, 0.98)
    same(quantizer.codebook[0], [0.9 / a, 0.1 / a], "code 0: 0.9 (1, 0) + 0.1 (0, 1), made as long as 1")
    same(quantizer.codebook[1], [0.06 / b, 0.98 / b],
         "code 1: 0.9 (0, 1) + 0.1 (0.6, 0.8), made as long as 1; ten vectors move it no further than one")
    same(quantizer.codebook[2], [-1.0, 0], "code 2: no vector chose it, so it stays")
    quantizer.update(torch.tensor(sums), torch.tensor(counts))
    same(quantizer.hits, [2.0, 20, 0], "hits after the same batch twice: they add up")

    quantizer = moved(sums, counts, [[2.0, 0], [0, 2], [-2, 0]], unit=False)
    same(quantizer.codebook, [[1.8, 0.1], [0.03, 1.84], [-2.0, 0]],
         "unit=False: 0.9 code + 0.1 (the mean of its vectors), of any length; a code without one stays")
    quantizer = moved(sums, counts, [[2.0, 0], [0, 2], [-2, 0]], trained=True)
    same(quantizer.codebook, codes,
         "trained=True: the optimiser moves the codes, `update` only makes them as long as 1")
    with patch.object(data, "all_sum", lambda x: 2 * x):        # as if a second GPU had seen the same
        same(moved(sums, counts, codes).hits, [2.0, 20, 0], "hits of two GPUs: data.all_sum adds them up")


# ---- cae.py ----


def test_regressor_block():
    torch.manual_seed(0)
    block = cae.RegressorBlock(8, 2, layer_scale=0.5)
    for p in block.parameters():
        torch.nn.init.normal_(p)                                # or all norms would be alike
    x, pos = torch.randn(2, 1, 3, 8)                            # one image: 3 hidden patches,
    visible, pos_visible = torch.randn(2, 1, 4, 8)              # 4 visible ones
    asked = []
    block.cross_attn.register_forward_pre_hook(lambda module, args: asked.extend(args))
    out = block(x, pos, visible, pos_visible)
    kv, k_pos = torch.cat([visible, x], 1), torch.cat([pos_visible, pos], 1)
    q, k, v = block.norm1_q(x + pos), block.norm1_k(kv + k_pos), block.norm1_v(kv)
    for found, wanted, what in zip(asked, (q, k, v), (
            "queries of cross_attn: norm1_q of the hidden patches, positions added",
            "keys of cross_attn: norm1_k of visible patches, then hidden ones, positions added",
            "values of cross_attn: norm1_v of visible patches, then hidden ones, without positions")):
        same(found, wanted, what)
    wanted = block.norm2_cross(x + block.gamma_1_cross * block.cross_attn(q, k, v))
    wanted = wanted + block.gamma_2_cross * block.mlp_cross(wanted)
    same(out, wanted, "x + gamma_1 Attn; norm2_cross of that is the new x; x + gamma_2 MLP(x)")
    block.drop_path = 0.5
    many = block(*(t.expand(40, -1, -1) for t in (x, pos, visible, pos_visible)))
    assert len(many.unique(dim=0)) == 4, "in training `residual` drops both branches by chance"


# ---- vit.py ----


def test_sincos_pos_embed():
    table = vit.sincos_pos_embed(16, 3)
    assert table.shape == (1, 10, 16), f"shape {tuple(table.shape)}, not class token and 9 patches, 16 wide"
    assert table.dtype == torch.float32, f"float32, not {table.dtype}"
    same(table[0, 0], [0.0] * 16, "the class token's row")
    w = [10000 ** (-k / 4) for k in range(4)]                   # 1, 0.1, 0.01, 0.001
    for row in range(3):
        for column in range(3):
            wanted = [f(place * x) for place in (column, row) for f in (math.sin, math.cos) for x in w]
            same(table[0, 1 + 3 * row + column], wanted,
                 f"row {row}, column {column}: four sines, four cosines of the column, then of the row")


def test_attention():
    torch.manual_seed(0)
    attn, x, bias = vit.Attention(12, 3), torch.randn(2, 5, 12), torch.randn(1, 3, 5, 5)
    qkv = x @ attn.qkv.weight.T + attn.qkv.bias                 # (2, 5, 36): q, k, v of three heads of 4
    for bias, name in ((None, "without bias"), (bias, "with bias")):
        heads = torch.empty(2, 5, 12)
        for b, h, i in ((b, h, i) for b in range(2) for h in range(3) for i in range(5)):
            q, k, v = (qkv[b, :, start + 4 * h:start + 4 * h + 4] for start in (0, 12, 24))     # (5, 4) each
            scores = torch.stack([q[i] @ k[j] / 2 for j in range(5)])       # 2 = sqrt(4)
            weights = (scores if bias is None else scores + bias[0, h, i]).softmax(0)
            heads[b, i, 4 * h:4 * h + 4] = sum(weights[j] * v[j] for j in range(5))
        wanted = heads @ attn.proj.weight.T + attn.proj.bias
        same(attn(x, bias), wanted, f"proj(softmax(q k^T / sqrt(d) + bias) v), {name}")


# ---- data.py ----


def test_knn_vote():
    torch.manual_seed(0)
    train_x, train_y = torch.tensor([[1.0, 0], [8, 6], [6, 8]]), torch.tensor([0, 1, 1])
    x = torch.tensor([[5.0, 0]])                                # cosines 1, 0.8 and 0.6
    guess = data.knn_vote(train_x, train_y, x, [3], 2)
    same(guess[3], [0], "cosines 1 | 0.8, 0.6, over 0.07: e^14.3 is more than e^11.4 + e^8.6")
    guess = data.knn_vote(train_x, train_y, x, [3], 2, temperature=10.0)
    same(guess[3], [1], "cosines 1 | 0.8, 0.6, over 10: e^0.1 is less than e^0.08 + e^0.06")
    train_x, train_y, x = torch.randn(60, 5), torch.randint(4, (60,)), torch.randn(1040, 5) * 3
    guesses = data.knn_vote(train_x, train_y, x, [1, 7, 20, 100], 4)
    assert list(guesses) == [1, 7, 20], f"60 images have no 100 to ask: k is 1, 7 and 20, not {list(guesses)}"
    for i in range(0, 1040, 26):
        cosines = (train_x @ x[i] / train_x.norm(dim=1) / x[i].norm()).tolist()
        nearest = sorted(zip(cosines, train_y.tolist()), reverse=True)
        for k in guesses:
            votes = [sum(math.exp(s / 0.07) for s, y in nearest[:k] if y == label) for label in range(4)]
            same(guesses[k][i], votes.index(max(votes)), f"the class of image {i} by {k} neighbours")
    found = list(data.knn_vote(train_x[:3], train_y[:3], x, [20], 4))
    assert found == [3], f"if every k is too large, all images are asked: k is 3, not {found}"


def test_blockwise_mask():
    torch.manual_seed(0)
    for rule in ("fill", "on", "end"):
        mask = data.blockwise_mask(1000, 8, 26, 4, rule)        # of 64 patches 26, in blocks of 4 and more
        assert mask.shape == (1000, 64) and mask.dtype == torch.bool, f"{tuple(mask.shape)}, {mask.dtype}"
        assert len(mask.unique(dim=0)) > 950, "masks are alike: every image draws blocks of its own"
        count = mask.sum(1).float()
        assert count.max() <= 26, f"{count.max()} hidden patches: a block that hides too many does not fit"
        assert rule == "end" or count.min() == 26, f'{count.min()} hidden patches: rule "{rule}" hides all 26'
    assert 20 < count.min() and 25.5 < count.mean() < 26, (
        f"{count.mean():.2f} hidden patches on average: blocks are added until ten in a row do not fit")
    mask = mask.view(1000, 8, 8).float()
    below, beside = ((a * b).sum().item() / 1000 for a, b in (
        (mask[:, 1:], mask[:, :-1]), (mask[:, :, 1:], mask[:, :, :-1])))
    assert 35 < below + beside < 39, (
        f"{below + beside:.1f} pairs of neighbours are hidden: 37 are expected in blocks, 18 by chance")
    assert abs(below - beside) < 0.6, (
        f"{below:.1f} pairs above each other, {beside:.1f} side by side: r and 1 / r are equally likely")
    share = mask.mean(0)
    for name, turned in (("left and right", share.flip(1)), ("top and bottom", share.flip(0))):
        assert (share - turned).abs().max() < 0.1, f"{name} are not hidden equally often"

    mask = data.blockwise_mask(1000, 8, 9, 9).view(-1, 8, 8).float()
    square = (mask.unfold(1, 3, 1).unfold(2, 3, 1).sum((3, 4)) == 9).any(2).any(1).float().mean().item()
    assert 0.3 < square < 0.5, f"blocks of 9 patches are 3 x 3 in {square:.0%} of the masks, not in 41%"
    budget = torch.tensor([0.0, 10.7, 30.2, 64.0]).repeat(50)   # num_masked may be a number for each image
    count = data.blockwise_mask(200, 8, budget, 4).sum(1)
    assert (count <= budget).all(), "an image has more hidden patches than its own num_masked"
    mean = count.view(50, 4).float().mean(0)
    assert (mean > torch.tensor([-1, 9, 29, 57])).all(), f"hidden of 0, 10.7, 30.2 and 64: {mean.tolist()}"
    assert not data.blockwise_mask(50, 2, 3, 16, "end").any(), 'no block fits: rule "end" hides nothing'
    assert (data.blockwise_mask(50, 2, 3, 16, "on").sum(1) == 3).all(), 'no block fits: rule "on" fills up'
