"""MAE: numbers of the official implementation, and the paper's invariants."""
import pytest
import torch

import data
import mae
from vit import ViT, param_groups


def tiny_mae(**options):
    torch.manual_seed(0)
    encoder = ViT(img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, pos="sincos")
    return mae.MAE(encoder, decoder_dim=32, decoder_depth=2, decoder_heads=2, **options)


def official(golden, **options):
    """A tiny MAE with the weights behind the golden arrays; positions are ours, so they are compared, too."""
    model = tiny_mae(**options)
    weights = {name if name.startswith(("decoder", "mask")) else f"encoder.{name}": value
               for name, value in golden("mae", "w/").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) == {"encoder.pos_embed", "decoder_pos_embed"} and not unexpected
    return model


@pytest.mark.parametrize("kind", ["raw", "norm"])
def test_official_loss_predictions_and_gradients(golden, close, kind):
    """Same weights, images and noise: loss, predictions and gradients of facebookresearch/mae to 1e-5."""
    arrays, model = golden("mae"), official(golden, norm_pix_loss=kind == "norm")
    loss, pred, mask = model(arrays["images"], arrays["noise"])
    assert torch.equal(mask, arrays["mask"].float())
    close(loss, arrays[f"loss_{kind}"], 1e-6)
    close(pred[0], arrays["pred_0"])
    loss.backward()
    found = {name.removeprefix("encoder."): p.grad for name, p in model.named_parameters()}
    gradients = golden("mae", f"grad/{kind}/")
    assert len(gradients) > 8
    for name, gradient in gradients.items():
        close(found[name], gradient)


def test_official_masking_latent_and_target(golden, close):
    arrays, model = golden("mae"), official(golden)
    ids_keep, ids_restore, mask = mae.random_masking(arrays["noise"], 16)
    assert torch.equal(ids_keep, arrays["ids_keep"].long())
    assert torch.equal(ids_restore, arrays["ids_restore"].long())
    latent, _, _ = model.forward_encoder(arrays["images"], arrays["noise"])
    close(latent[0], arrays["latent_0"])
    close(mae.pixel_targets(arrays["images"], 4, True).flatten(0, 1)[:2], arrays["target_norm_first2"])


def test_unpatchify_is_the_inverse_of_patchify():
    imgs = torch.randn(2, 3, 12, 12)
    assert torch.equal(mae.unpatchify(mae.patchify(imgs, 4), 4), imgs)


def test_sampling_block_and_grid():
    """Grid keeps one patch of every 2 x 2; blocks hide exactly as many patches, but neighbouring ones."""
    keep, _, mask = mae.random_masking(mae.sampling_noise("grid", 3, 8, 16, "cpu"), 16)
    for ids in keep:
        assert {(i // 16, i % 8 // 2) for i in ids.tolist()} == {(r, c) for r in range(4) for c in range(4)}
        assert all(i // 8 % 2 == 0 and i % 2 == 0 for i in ids.tolist())

    def neighbours(sampling):
        torch.manual_seed(0)
        _, _, mask = mae.random_masking(mae.sampling_noise(sampling, 200, 8, 32, "cpu"), 32)
        assert (mask.sum(1) == 32).all()
        mask = mask.view(-1, 8, 8)
        return (mask[:, 1:] * mask[:, :-1]).sum().item() / 200
    assert neighbours("block") > 1.3 * neighbours("random")


def test_loss_is_blind_to_visible_patches():
    """Changing predictions of visible patches changes nothing; the loss is the mean over the hidden ones."""
    model, imgs = tiny_mae(norm_pix_loss=False), torch.randn(4, 3, 32, 32)
    loss, pred, mask = model(imgs)
    noisy = pred + 10 * torch.randn_like(pred) * (1 - mask)[:, :, None]
    assert torch.equal(model.forward_loss(imgs, noisy, mask), loss)
    errors = ((pred - mae.patchify(imgs, 4)) ** 2).mean(-1)
    hidden = [errors[b, i] for b in range(4) for i in range(64) if mask[b, i]]
    assert torch.allclose(torch.stack(hidden).mean(), loss, rtol=1e-5)


def test_encoder_never_sees_hidden_pixels():
    """Other pixels in the hidden patches leave the latent as it is; with encoder_sees_mask, too."""
    for sees_mask in (False, True):
        model = tiny_mae(encoder_sees_mask=sees_mask)
        imgs, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 64)
        latent, mask, _ = model.forward_encoder(imgs, noise)
        assert latent.shape == (2, 65 if sees_mask else 17, 48)
        hidden = mae.unpatchify(mask[:, :, None].expand(-1, -1, 48), 4)
        other, _, _ = model.forward_encoder(imgs + hidden * torch.randn_like(imgs), noise)
        assert torch.equal(latent, other)
        assert model(imgs)[1].shape == (2, 64, 48)


def test_official_initialisation():
    """Xavier bounds by hand (qkv is one matrix); biases 0; positions fixed and in no group."""
    model = tiny_mae()
    bounds = {"encoder.blocks.0.attn.qkv.weight": (6 / (48 + 144)) ** 0.5,
              "decoder_embed.weight": (6 / (48 + 32)) ** 0.5,
              "encoder.patch_embed.proj.weight": (6 / (48 + 48)) ** 0.5}
    for name, bound in bounds.items():
        largest = dict(model.named_parameters())[name].abs().max().item()
        assert 0.95 * bound < largest <= bound, name
    assert all((p == 0).all() for name, p in model.named_parameters()
               if name.endswith("bias") and "patch_embed" not in name)
    ids = {id(p) for group in param_groups(model, 0.05, no_decay=()) for p in group["params"]}
    assert id(model.encoder.pos_embed) not in ids and id(model.decoder_pos_embed) not in ids
    assert all((id(p) in ids) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("options", [{}, dict(encoder_sees_mask=True), dict(sampling="block"),
                                     dict(norm_pix_loss=False)])
def test_one_batch_is_overfitted(options):
    """Real steps on one batch of drawn shapes bring the loss down, and every weight gets a gradient."""
    model = tiny_mae(**options)
    imgs, _ = data.draw_shapes(16, 32, seed=0)
    imgs = imgs.float() / 127.5 - 1
    optimizer = torch.optim.AdamW(param_groups(model, 0.05, no_decay=()), lr=3e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(40):
        loss, _, _ = model(imgs)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
