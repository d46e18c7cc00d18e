"""iBOT: numbers of the official implementation, shortcuts against the plain computation, collapse."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import ibot
from test_runs import IBOT, run, shrink
from vit import ViT, half_cosine, interpolate_pos_embed, param_groups

MASKS = dict(pred_ratio=[0.0, 0.3], pred_ratio_var=[0.0, 0.2], pred_shape="block", grid=8, device="cpu")


def tiny_ibot(shared=True, fixed=True, drop_path=0.0, max_masked=128):
    torch.manual_seed(0)

    def network(rate):
        encoder = ViT(img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, drop_path=rate)
        return ibot.Network(encoder, ibot.Head(48, 32, 16, 24, 20, shared=shared, fixed=fixed))
    model = ibot.IBOT(network(drop_path), network(0.0), max_masked)
    with torch.no_grad():  # away from the start: a teacher and centres of their own
        for p in model.teacher.parameters():
            p.add_(0.02 * torch.randn_like(p))
        for p in (model.masked_embed, model.centre, model.patch_centre):
            p.normal_(std=0.1)
    return model


def batch(B=4, local_crops=2):
    g = torch.Generator().manual_seed(1)
    crops = [torch.randn(B, 3, 32, 32, generator=g) for _ in range(2)]
    mask = torch.rand(2 * B, 64, generator=g) < 0.3
    mask[1] = mask[6] = False                                   # crops without a hidden patch
    return crops, [torch.randn(B, 3, 16, 16, generator=g) for _ in range(local_crops)], mask


TEMPS = (torch.tensor(0.04), torch.tensor(0.06))

# ---- the official numbers ----


def test_official_encoder(golden, close):
    """Hidden patches are replaced before the positions are added; local crops read interpolated positions."""
    arrays, weights = golden("ibot"), golden("ibot", "w/")
    masked_embed = weights.pop("masked_embed")
    vit = ViT(img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3)
    vit.load_state_dict(weights)
    network = ibot.Network(vit, nn.Identity())
    close(network.tokens(arrays["images"], arrays["mask"].flatten(1), masked_embed), arrays["tokens_masked"])
    close(network.tokens(arrays["images"]), arrays["tokens_plain"])
    close(network.tokens(arrays["local"]), arrays["tokens_local"])
    for size in (16, 24, 48):
        close(interpolate_pos_embed(vit.pos_embed, size // 4, 0.1)[:, :, :8], arrays[f"pos_{size}x{size}"])


def test_official_head(golden, close):
    """Logits of class token and patches, gradients of MLP and prototypes (lengths and directions)."""
    arrays = golden("ibot_loss")
    head = ibot.Head(48, 96, 32, 64, fixed=False)
    weights = golden("ibot_loss", "head/")
    head.load_state_dict(weights | {name.replace("last_layer", "last_layer2"): value
                                    for name, value in weights.items() if "last_layer" in name})
    x = arrays["head_x"].requires_grad_()
    cls, patch = head(x)
    close(cls, arrays["head_cls"])
    close(patch, arrays["head_patch"])
    ((cls * arrays["head_w_cls"]).sum() + (patch * arrays["head_w_patch"]).sum()).backward()
    close(x.grad, arrays["head_grad_x"])
    for name, gradient in golden("ibot_loss", "head_grad/").items():
        close(dict(head.named_parameters())[name].grad, gradient)


def as_tokens(cls, patch=None):
    """Logits of class tokens (n, K) and of patches (n, N, K') -> tokens that `plain_ibot` turns into them."""
    x = F.pad(cls, (0, 48))[:, None]
    return x if patch is None else torch.cat([x, F.pad(patch, (64, 0))], 1)


def plain_ibot(max_masked, lambda1, lambda2):
    """IBOT without an MLP; the 64 prototypes of the class token, then the 48 of patches, are unit vectors."""
    model = ibot.IBOT(*(ibot.Network(ViT(16, 4, 48, 1, 3), ibot.Head(48, 8, 112, 64, 48, shared=False))
                        for _ in range(2)), max_masked, lambda1, lambda2)
    for network in (model.student, model.teacher):
        network.head.unit = lambda x: x
        network.head.last_layer.weight_v.data = torch.eye(112)[:64]
        network.head.last_layer2.weight_v.data = torch.eye(112)[64:]
    return model


@pytest.mark.parametrize("case, epoch", [(case, epoch) for case in ("std", "warm40", "lam", "mimstart5")
                                         for epoch in (0, 10, 29, 60)] + [("nolocal", 0), ("nomask", 0)])
def test_official_losses_centres_and_gradients(case, epoch, golden, close):
    """Chained calls, each with the centres that the one before left; temperatures of several epochs."""
    arrays = golden("ibot_loss")
    wanted, masks = arrays[f"{case}/e{epoch}"].view(-1, 3), arrays["mask"].flatten(1, 2).flatten(2)
    temps = (ibot.temperature(epoch, 0.04, 0.04 if case == "warm40" else 0.07, 30),
             ibot.temperature(epoch, 0.04, 0.07, 30, 5 if case == "mimstart5" else 0))
    lambdas = (0.5, 2.0) if case == "lam" else (1.0, 1.0)
    model = plain_ibot(int(masks.sum((1, 2)).max()) + 3, *lambdas)
    crops, local = 2 * [torch.zeros(4, 3, 16, 16)], 3 * [torch.zeros(4, 3, 8, 8)]
    for call in range(len(wanted)):
        leaves = [arrays[f"student_{name}"][call].requires_grad_() for name in ("cls", "patch", "local")]
        whole, small = as_tokens(*leaves[:2]), as_tokens(leaves[2])
        model.student.tokens = lambda imgs, *masks: whole if len(imgs) == 8 else small
        model.teacher.tokens = lambda imgs: as_tokens(arrays["teacher_cls"][call],
                                                      arrays["teacher_patch"][call])
        loss, logs, means = model(crops, [] if case == "nolocal" else local,
                                  masks[call] & (case != "nomask"), *map(torch.tensor, temps))
        loss.backward()
        found = torch.stack([lambdas[0] * logs["cls"], lambdas[1] * logs["patch"], loss]).double()
        assert torch.allclose(found, wanted[call], rtol=1e-6, atol=1e-6)
        if (case, epoch, call) == ("std", 60, 0):
            for name, leaf in zip(("cls", "patch", "local"), leaves):
                close(leaf.grad, arrays[f"grad_{name}"])
        model.update(means, 1.0)
        if case == "std" and epoch == 0:
            close(model.centre, arrays[f"centre{call}"])
            close(model.patch_centre[None], arrays[f"patch_centre{call}"])


@pytest.mark.parametrize("shape, flags", [("block", {}), ("rand", dict(
    pred_shape="rand", pred_ratio=[0.0, 0.7], pred_ratio_var=[0.0, 0.05]))])
def test_official_masks(shape, flags, golden):
    """As many hidden patches as the official loader draws, at the same places, within the draws' noise."""
    arrays, args = golden("ibot_loss"), SimpleNamespace(**MASKS | flags)
    torch.manual_seed(0)
    mask = ibot.draw_masks(args, 4000)
    count, wanted = mask.sum(1), arrays[f"{shape}8/count"]
    steps = torch.arange(65)
    found, official = ((c[:, None] <= steps).float().mean(0) for c in (count, wanted.long()))
    assert (found - official).abs().max() < (0.09 if shape == "block" else 0.05)
    if shape == "block":
        assert (mask.float().mean(0).view(8, 8) - arrays["block8/freq"]).abs().max() < 0.05
    else:  # exactly the floor of its budget, at places that are all alike
        assert count.unique().tolist() == wanted.unique().tolist()
        places = mask.float().mean(0)
        assert (places - places.mean()).abs().max() < 0.04


# ---- the shortcuts ----


@pytest.mark.parametrize("shared", (True, False))
@pytest.mark.parametrize("local_crops", (2, 0))
def test_the_whole_step_against_the_plain_computation(shared, local_crops, close):
    """Head on every token of every crop, losses by loops over images, crops and patches."""
    model = tiny_ibot(shared=shared, fixed=False, max_masked=200)
    crops, local, mask = batch(local_crops=local_crops)
    loss, logs, means = model(crops, local, mask, *TEMPS)
    imgs, B = torch.cat(crops), 4
    t_cls, t_patch = model.teacher.head(model.teacher.tokens(imgs))
    s_cls, s_patch = model.student.head(model.student.tokens(imgs, mask, model.masked_embed))
    students = list(s_cls.split(B)) + [model.student.head(model.student.tokens(x))[0] for x in local]
    q, log_p = ((t_cls - model.centre) / TEMPS[0]).softmax(-1), [(s / 0.1).log_softmax(-1) for s in students]
    on_cls = [-(q.split(B)[u] * log_p[v]).sum(-1).mean()
              for u in range(2) for v in range(len(students)) if u != v]
    on_patch = []
    for crop in range(2 * B):
        terms = [-(((t_patch[crop, i] - model.patch_centre[0]) / TEMPS[1]).softmax(-1)
                   * (s_patch[crop, i] / 0.1).log_softmax(-1)).sum() for i in range(64) if mask[crop, i]]
        on_patch.append(sum(terms) / max(1, len(terms)))
    plain = sum(on_cls) / len(on_cls) + sum(on_patch) / len(on_patch)
    close(loss, plain.detach())
    close(logs["cls"] + logs["patch"], plain.detach())
    close(means[0], t_cls.mean(0, keepdim=True))
    close(means[1], t_patch.mean((0, 1))[None])                 # over all patches, hidden or not
    wanted = torch.autograd.grad(plain, [p for p in model.parameters() if p.requires_grad])
    loss.backward()
    for p, gradient in zip((p for p in model.parameters() if p.requires_grad), wanted):
        close(p.grad, gradient, 1e-4)


def test_hidden_patches_never_exceed_their_static_count():
    """most_hidden is above the sum of 2000 batches of masks, and far below a padding of every crop."""
    args = SimpleNamespace(**MASKS)
    for n in (8, 128):
        most = ibot.most_hidden(args, n)
        torch.manual_seed(0)
        drawn = ibot.draw_masks(SimpleNamespace(**MASKS | dict(pred_shape="rand")), 2000 * n)
        assert drawn.view(2000, -1).sum(1).max() <= most <= n * 32
    assert ibot.most_hidden(args, 1024) < 0.4 * 1024 * 32
    assert ibot.most_hidden(SimpleNamespace(pred_ratio=[0.3], pred_ratio_var=[0.0], grid=8), 10) == 192


def test_padding_changes_nothing():
    """More room for hidden patches than there are: the same loss."""
    crops, local, mask = batch()
    losses = [tiny_ibot(max_masked=room)(crops, local, mask, *TEMPS)[0] for room in (int(mask.sum()), 300)]
    assert torch.allclose(*losses, rtol=1e-6)


# ---- student, teacher, centres ----


def test_no_gradient_reaches_the_teacher_and_it_follows_the_student():
    """Gradients for the student alone; update() moves centres by a tenth, the teacher by the momentum."""
    model, (crops, local, mask) = tiny_ibot(), batch()
    loss, _, means = model(crops, local, mask, *TEMPS)
    loss.backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(dict(model.named_parameters())[name].grad is not None for name in trained)
    assert not [name for name in trained if name.startswith("teacher") or name.endswith("weight_g")]
    before = copy.deepcopy(model)
    model.update(means, 0.9)
    assert torch.allclose(model.centre, 0.9 * before.centre + 0.1 * means[0])
    assert torch.allclose(model.patch_centre, 0.9 * before.patch_centre + 0.1 * means[1])
    for t, old, s in zip(model.teacher.parameters(), before.teacher.parameters(), model.student.parameters()):
        assert torch.allclose(t, 0.9 * old + 0.1 * s, atol=1e-6)


def test_teacher_starts_as_the_student_and_state_resumes():
    """A new model's teacher equals its student; the state holds student, teacher and both centres."""
    network = lambda: ibot.Network(ViT(32, 4, 48, 2, 3), ibot.Head(48, 16, 8, 12, 12))  # noqa: E731
    model = ibot.IBOT(network(), network(), 10)
    for a, b in zip(model.teacher.parameters(), model.student.parameters()):
        assert torch.equal(a, b)
    state = model.state_dict()
    assert {"centre", "patch_centre", "masked_embed", "student.head.last_layer.weight_v",
            "teacher.head.last_layer2.weight_g", "teacher.encoder.blocks.1.mlp.fc2.bias"} <= state.keys()


def test_shared_prototypes_are_one():
    """With a shared head the patch prototypes are the class token's, trained and averaged once."""
    model = tiny_ibot(shared=True)
    assert model.student.head.last_layer is model.student.head.last_layer2
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "last_layer2" in name]
    assert [name for name, _ in tiny_ibot(shared=False).named_parameters() if "last_layer2" in name]


def test_head_and_losses_are_float32_under_autocast():
    """bfloat16 in the blocks only: the prototypes' logits and what is logged are float32."""
    model, (crops, local, mask) = tiny_ibot(), batch()
    kinds = []
    model.student.head.mlp.register_forward_hook(lambda m, x, y: kinds.append((x[0].dtype, y.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, logs, means = model(crops, local, mask, *TEMPS)
    assert kinds == [(torch.float32, torch.float32)]
    assert {t.dtype for t in (loss, *logs.values(), *means)} == {torch.float32}


def test_official_weight_decay_groups():
    """Everything but biases and 1-D tensors is decayed: tokens, positions and prototypes, too."""
    model = tiny_ibot(fixed=False)
    decayed = {id(p) for group in param_groups(model, 0.04, no_decay=()) if group["weight_decay"]
               for p in group["params"]}
    for name, p in model.student.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1 and not name.endswith(".bias")), name
    assert id(model.masked_embed) in decayed


# ---- schedules and clipping ----


def test_temperature_is_linear_over_whole_epochs():
    """The final temperature is first used in epoch W - 1; a later first epoch shifts the rise."""
    values = [ibot.temperature(epoch, 0.04, 0.07, 4) for epoch in range(6)]
    assert values == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07, 0.07])
    assert [ibot.temperature(e, 0.04, 0.07, 2, first=3) for e in range(6)] == \
        pytest.approx([0.04, 0.04, 0.04, 0.04, 0.07, 0.07])
    assert ibot.temperature(0, 0.04, 0.07, 1) == 0.04 and ibot.temperature(1, 0.04, 0.07, 1) == 0.07


def test_cosine():
    """Half a cosine: start, middle and end."""
    assert [half_cosine(done, 0.996, 1.0) for done in (0, 0.5, 1)] == pytest.approx([0.996, 0.998, 1.0])


def test_every_tensor_is_clipped_by_itself():
    """A long gradient is scaled to the norm, a short one and a missing one stay."""
    long, short, none = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    long.grad, short.grad = torch.tensor([3.0, 4, 0]), torch.tensor([0.1, 0, 0])
    ibot.clip_each([long, short, none], 0.5)
    assert torch.allclose(long.grad, torch.tensor([0.3, 0.4, 0])) and none.grad is None
    assert torch.equal(short.grad, torch.tensor([0.1, 0, 0]))


def test_collapse_is_said_in_words():
    """Uniform answers, one prototype for all, and a healthy teacher."""
    args = SimpleNamespace(out_dim=1024)
    uniform, healthy = math.log(1024), 3.0
    for entropy, of_mean, words in ((uniform - 0.01, uniform, "lower --teacher_temp"),
                                    (0.01, 0.1, "one prototype"), (healthy, 6.0, None)):
        said = ibot.collapse({"entropy": entropy, "entropy_of_mean": of_mean}, args)
        assert said is None if words is None else words in said


def test_logged_diagnostics_by_hand(close):
    """Entropy of the teacher, KL to the student, entropy of the mean; how often each prototype is the first
    that the teacher thinks of, summed over the steps in `hits`."""
    model, (crops, local, mask) = tiny_ibot(), batch()
    _, logs, means = model(crops, local, mask, *TEMPS)
    q = ((model.teacher.head(model.teacher.tokens(torch.cat(crops)))[0] - model.centre) / 0.04).softmax(-1)
    H = -(q * q.log()).sum(-1).mean()
    close(logs["entropy"], H)
    close(logs["kl"], logs["cls"].detach() - H, 1e-4)
    close(logs["entropy_of_mean"], -(q.mean(0) * q.mean(0).log()).sum())
    wins = q.argmax(-1).bincount(minlength=24) / 8
    close(means[2], wins)
    model.update(means, 1.0)
    model.update(means, 1.0)
    close(model.hits, 2 * wins)
    assert "used" not in logs and "hits" not in model.state_dict()


def test_koleo_by_hand(close):
    """-mean log distance of each unit vector to its nearest other one, and the gradient of this."""
    torch.manual_seed(0)
    x = torch.randn(5, 3).requires_grad_()
    u = [row / row.norm() for row in x]
    wanted = -sum(min((a - b).norm() for j, b in enumerate(u) if j != i).log() for i, a in enumerate(u)) / 5
    found = ibot.koleo_loss(x)
    close(found, wanted.detach())
    close(torch.autograd.grad(found, x)[0], torch.autograd.grad(wanted, x)[0], 1e-3)
    assert ibot.koleo_loss(torch.ones(4, 3)).isfinite(), "equal vectors"
    cross = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    assert ibot.koleo_loss(7 * cross).item() == pytest.approx(-math.log(2) / 2, abs=1e-5)


def test_koleo_spreads_the_student_s_class_tokens(close):
    """--koleo 0.5 adds half its mean over the global crops, each by itself; in float32 under autocast."""
    model, (crops, local, mask), read = tiny_ibot(), batch(), []
    plain, logs, _ = model(crops, local, mask, *TEMPS)
    tokens = model.student.tokens(torch.cat(crops), mask, model.masked_embed)[:, 0]
    model.koleo = 0.5
    loss, again, _ = model(crops, local, mask, *TEMPS)
    close(loss - plain, 0.25 * sum(ibot.koleo_loss(cls) for cls in tokens.split(4)).detach(), 1e-4)
    assert logs.keys() == again.keys()
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        koleo = ibot.koleo_loss
        patch.setattr(ibot, "koleo_loss", lambda x: read.append(torch.is_autocast_enabled("cpu")) or koleo(x))
        model(crops, local, mask, *TEMPS)[0].backward()
    assert read == [False, False]


# ---- training ----


@pytest.mark.parametrize("shared", (True, False))
def test_one_batch_is_overfitted(shared):
    """With a teacher that stands still, real steps bring the student's loss down towards its entropy."""
    model, (_, _, mask) = tiny_ibot(shared=shared), batch(B=8)
    imgs = data.draw_shapes(16, 32, seed=0)[0].float() / 127.5 - 1
    crops, local = list(imgs.split(8)), [F.interpolate(imgs[:8], size=16)]
    optimizer = torch.optim.AdamW(param_groups(model, 0.04, no_decay=()), lr=2e-3)
    divergences = []
    for _ in range(40):
        loss, logs, _ = model(crops, local, mask, *TEMPS)
        loss.backward()
        ibot.clip_each(model.student.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
        divergences.append(logs["kl"].item())
    assert sum(divergences[-5:]) < 0.6 * sum(divergences[:5]), divergences


def test_the_script_keeps_its_schedules(tmp_path):
    """In every step: temperatures and masks of the epoch, prototypes frozen in the first; then the centres go
    to the mean of both parts of the batch, the teacher to the student by a momentum that rises to 1.
    """
    forwards, updates = [], []
    forward, update = ibot.IBOT.forward, ibot.IBOT.update

    def watched_forward(model, crops, local_crops, mask, temp, patch_temp):
        if not forwards:                                        # the same weights, but other drop path rates
            for a, b in zip(model.student.parameters(), model.teacher.parameters(), strict=True):
                assert torch.equal(a, b)
            rates = [{m.drop_path for m in network.modules() if hasattr(m, "drop_path")}
                     for network in (model.student, model.teacher)]
            assert rates == [{0.0, 0.2}, {0.0}]
        result = forward(model, crops, local_crops, mask, temp, patch_temp)
        forwards.append((float(temp), float(patch_temp), mask.any().item(), result[2],
                         model.student.head.last_layer.weight_v.detach().clone()))
        return result

    def watched_update(model, *args):
        before = copy.deepcopy(model)
        update(model, *args)
        updates.append((before, copy.deepcopy(model)))

    def prepare(patch):
        shrink(patch)
        patch.setattr(ibot.IBOT, "forward", watched_forward)
        patch.setattr(ibot.IBOT, "update", watched_update)
    run(f"{IBOT} --epochs 3 --batch_size 100 --accum_steps 2 --teacher_temp_start 0.02 --teacher_temp 0.04 "
        f"--patch_temp 0.08 --warmup_temp_epochs 3 --pred_start_epoch 1 --freeze_last_layer 1 --momentum 0.9 "
        f"--weight_decay_end 0.4 --pred_ratio 0.5 --pred_ratio_var 0 --pred_shape rand --drop_path 0.2 "
        f"--output_dir {tmp_path}/run", prepare)
    assert (len(forwards), len(updates)) == (12, 6)
    temps, patch_temps, hidden, means, prototypes = zip(*forwards)
    assert temps[::4] == pytest.approx((0.02, 0.03, 0.04))
    assert patch_temps[::4] == pytest.approx((0.02, 0.02, 0.05)) and hidden == 4 * (False,) + 8 * (True,)
    moved = [not torch.equal(a, b) for a, b in zip(prototypes, prototypes[2:])]
    assert moved[::2] == [False, False, True, True, True]
    for step, (before, after) in enumerate(updates):
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * step / 6)) / 2
        for t, s, a in zip(before.teacher.parameters(), before.student.parameters(),
                           after.teacher.parameters(), strict=True):
            assert torch.allclose(a, momentum * t + (1 - momentum) * s, atol=1e-6)
        for i, name in enumerate(("centre", "patch_centre")):
            mean = (means[2 * step][i] + means[2 * step + 1][i]) / 2
            assert torch.allclose(getattr(after, name), 0.9 * getattr(before, name) + 0.1 * mean, atol=1e-6)
    groups = torch.load(tmp_path / "run/last.pt", weights_only=True)["optimizer"]["param_groups"]
    last = 0.4 - 0.36 * (1 + math.cos(math.pi * 5 / 6)) / 2
    assert {round(group["weight_decay"], 6) for group in groups} == {0, round(last, 6)}


def test_without_augmentation_the_crops_are_the_image(tmp_path, capsys):
    """--aug none: both global crops are the whole image as it is, local crops are the same, smaller; what is
    typed in vain is said."""
    class Enough(Exception):
        pass
    seen = []

    def watched(model, crops, local_crops, *rest):
        seen.append((crops, local_crops))
        raise Enough

    def prepare(patch):
        shrink(patch)
        patch.setattr(ibot.IBOT, "forward", watched)
    with pytest.raises(Enough):
        run(f"{IBOT} --aug none --blur --eval_every 0 --output_dir {tmp_path}/run", prepare)
    assert "--blur is not used: --aug none\n" in capsys.readouterr().out
    ((a, b), (local,)), = seen
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        imgs = data.draw_shapes(5000, 8, 0)[0]
    mean, std = (torch.tensor(value)[:, None, None] for value in data.pixel_stats(imgs))
    shown = ((imgs / 255 - mean) / std).flatten(1)
    assert torch.equal(a, b) and torch.cdist(a.flatten(1), shown).amin(1).max() < 0.1   # of others: 10
    assert torch.allclose(local, data.resize(a * std + mean, 4).sub(mean).div(std), atol=1e-4)


@pytest.mark.parametrize("flags, words", (
    ("--pred_ratio 0 0.3 --pred_ratio_var 0.2", "as many numbers"),
    ("--pred_ratio 0.1 --pred_ratio_var 0.2", "each range within 0 to 1"),
    ("--pred_ratio some", "argument --pred_ratio: invalid float value: 'some'"),
    ("--local_size 10", "--local_size 10 is not divisible by --patch_size 4"),
    ("--img_size 24 --patch_size 8", "--local_size 12 is not divisible by --patch_size 8"),  # half of 24
    ("--shared_head --out_dim 100", "differs from --out_dim 100"),
    ("--global_scale 0.5", "--global_scale [0.5] must be two shares of the image, the smaller one first"),
    ("--global_scale 0.9 0.3", "--global_scale [0.9, 0.3] must be two shares"),
    ("--local_scale 0.1 0.2 0.3", "--local_scale [0.1, 0.2, 0.3] must be two shares"),
    ("--local_scale 0 0.3", "argument --local_scale: 0.0 must lie in (0, 1]"),
    ("--koleo 0.1 --batch_size 4 --accum_steps 4", "--koleo 0.1 spreads images: --batch_size 4 leaves one"),
    ("--aug blur", "argument --aug: invalid choice: 'blur'"),
))
def test_wrong_flags(flags, words, monkeypatch, capsys):
    """One sentence before anything is begun."""
    monkeypatch.setattr("sys.argv", ["ibot.py", "--data", "shapes", *flags.split()])
    with pytest.raises(SystemExit) as stopped:
        ibot.main()
    assert stopped.value.code == 2 and words in capsys.readouterr().err
