"""How fast is it, against what this machine could give? A script; pytest does not collect it.

A training step (forward, backward, AdamW, as in the method's own loop) is timed on random inputs that already
lie on the device, in turns with plain matrix products of the same precision: both meet the same machine.

    images/s      from the median step
    memory        the peak: of the GPU, or of this process
    GFLOP/step    multiply and add counted apart, attention included, biases, norms and the optimiser not
    GFLOP/s       the two above
    of matmul     GFLOP/s as a share of this machine's own best matmul: 2048^3, or the model's MLP shapes
    others        what other processes took of the CPU meanwhile: over 5%, nothing here can be trusted

    python tests/bench.py                        # a table: ViT-B/16 at batch 8; the CIFAR recipes
    python tests/bench.py --method vit --model tiny --batch_size 256 --dtype bfloat16
    python tests/bench.py --model base --img_size 224 --patch_size 16 --batch_size 256 \\
        --device cuda --dtype bfloat16 --compile
    python tests/bench.py --input                # augmentation, block masks, JPEG decoding
    python tests/bench.py --run                  # the loop of every script against its bare step
"""
import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
from beit import BEiT  # noqa: E402
from beit_v2 import VQKD, BEiTv2  # noqa: E402
from cae import CAE  # noqa: E402
from dvae import DVAE  # noqa: E402
from ibot import IBOT, Head, Network, draw_masks, most_hidden  # noqa: E402
from mae import MAE  # noqa: E402
from vit import SIZES, Mlp, ViT, param_groups  # noqa: E402

TABLE = (  # what runs without flags
    "--method mae --model base --img_size 224 --patch_size 16 --batch_size 8",
    "--method mae --model tiny --img_size 32 --patch_size 4 --batch_size 256",
    "--method beit --model base --img_size 224 --patch_size 16 --batch_size 8",
    "--method beit --model tiny --img_size 32 --patch_size 4 --batch_size 256",
    "--method beit_v2 --model base --img_size 224 --patch_size 16 --batch_size 8",
    "--method vqkd --model base --img_size 224 --patch_size 16 --batch_size 4",
    "--method cae --model base --img_size 224 --patch_size 16 --batch_size 8",
    "--method ibot --model small --img_size 224 --patch_size 16 --batch_size 2",
    "--method dvae --model tiny --img_size 32 --patch_size 4 --batch_size 64",
)
AMP = {"float32": "none", "bfloat16": "bf16", "float16": "fp16"}        # autocast, as --amp of the scripts


# ---- training steps: one function a method -> model, its parameter groups, loss(net, imgs) ----

def mae(args):
    encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model], pos="sincos")
    decoder = (512, 8, 16) if args.img_size > 64 else (64, 2, 2) if args.model == "micro" else (96, 4, 3)
    model = MAE(encoder, *decoder)
    return model, param_groups(model, 0.05, no_decay=()), lambda net, imgs: net(imgs)[0]


def vit(args):
    classes = 1000 if args.img_size > 64 else 10
    model = ViT(args.img_size, args.patch_size, **SIZES[args.model], num_classes=classes, pool="mean")
    target = torch.full((args.batch_size, classes), 1 / classes, device=args.device)  # soft: mixup

    def loss_of(net, imgs):
        return -(target * net(imgs).float().log_softmax(-1)).sum(-1).mean()
    return model, param_groups(model, 0.05), loss_of


def beit(args):
    """The student's step alone: random codes, no tokenizer."""
    large = args.img_size > 64
    vocab, num_masked, min_block = (8192, 75, 16) if large else (1024, 26, 4)
    encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model], pos="none", rel_pos="shared",
                  layer_scale=0.1, drop_path=0.1 if large else 0.0)
    model = BEiT(encoder, vocab, num_masked)
    codes = torch.randint(vocab, (args.batch_size, args.grid ** 2), device=args.device)
    mask = data.blockwise_mask(args.batch_size, args.grid, num_masked, min_block, "fill", args.device)
    return model, param_groups(model, 0.05), lambda net, imgs: net(imgs, codes, mask)[0]


def beit_v2(args):
    """The student's step alone, with the class token's branch: random codes, no tokenizer."""
    large = args.img_size > 64
    vocab, num_masked, min_block = (8192, 75, 16) if large else (1024, 26, 4)
    encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model], pos="none", rel_pos="shared",
                  layer_scale=0.1)
    model = BEiTv2(encoder, vocab, num_masked, encoder.config["depth"] * 3 // 4)
    codes = torch.randint(vocab, (args.batch_size, args.grid ** 2), device=args.device)
    mask = data.blockwise_mask(args.batch_size, args.grid, num_masked, min_block, "fill", args.device)
    return model, param_groups(model, 0.05), lambda net, imgs: net(imgs, codes, mask)[0]


def vqkd(args):
    """The tokenizer's step: quantizer and its update included, random features in the teacher's place."""
    large = args.img_size > 64
    encoder, width = ViT(args.img_size, args.patch_size, **SIZES[args.model]), SIZES[args.model]["embed_dim"]
    model = VQKD(encoder, *((8192, 32, 3) if large else (1024, 16, 1)), teacher_dim=width)
    target = torch.randn(args.batch_size, args.grid ** 2, width, device=args.device)

    def loss_of(net, imgs):
        loss, _, _, moments, _ = net(imgs, target)
        model.quantizer.update(*moments)
        return loss
    return model, param_groups(model, 1e-4), loss_of


def dvae(args):
    """The recipes' networks; --patch_size is the stride (112 px and 8 for DALL-E's)."""
    n_hid, vocab = (256, 8192) if args.img_size > 64 else (32, 512) if args.model == "micro" else (64, 1024)
    model = DVAE(args.grid, args.patch_size, n_hid, 2, vocab)
    model.to(memory_format=torch.channels_last)
    tau, beta = (torch.full((), value, device=args.device) for value in (0.5, 6.6))
    return model, param_groups(model, 1e-4), lambda net, imgs: net(imgs.sigmoid(), tau, beta)[0]


def cae(args):
    """The student's step alone: random codes, no tokenizer."""
    large = args.img_size > 64
    vocab, num_masked, min_block, depth = (8192, 98, 16, 4) if large else (1024, 32, 4, 2)
    encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model], pos="sincos", layer_scale=0.1)
    model = CAE(encoder, vocab, num_masked, depth, depth)
    codes = torch.randint(vocab, (args.batch_size, args.grid ** 2), device=args.device)
    mask = data.blockwise_mask(args.batch_size, args.grid, num_masked, min_block, "fill", args.device)
    return model, param_groups(model, 0.05, no_decay=()), lambda net, imgs: net(imgs, codes, mask)[0]


def ibot(args):
    """Two global and ten local crops of 96 px; at 32 px six of 16. Teacher, centres and masks included."""
    large = args.img_size > 64
    hidden, out_dim, count, size = (2048, 8192, 10, 96) if large else (1024, 4096, 6, 16)
    flags = argparse.Namespace(pred_ratio=[0.0, 0.3], pred_ratio_var=[0.0, 0.2], pred_shape="block",
                               grid=args.grid, device=args.device)

    def network():
        encoder = ViT(args.img_size, args.patch_size, **SIZES[args.model])
        return Network(encoder, Head(encoder.config["embed_dim"], hidden, 256, out_dim))
    model = IBOT(network(), network(), most_hidden(flags, 2 * args.batch_size))
    local = [torch.randn(args.batch_size, 3, size, size, device=args.device) for _ in range(count)]
    temp, of_last_step = torch.full((), 0.04, device=args.device), []

    def loss_of(net, imgs):
        if of_last_step:                                        # a step's own change what backward reads
            model.update(of_last_step.pop(), 0.996)
        mask = draw_masks(flags, 2 * args.batch_size)
        loss, _, means = net([imgs, imgs.flip(3)], local, mask, temp, temp)
        of_last_step.append(means)
        return loss
    return model, param_groups(model, 0.04, no_decay=()), loss_of


METHODS = {"beit": beit, "beit_v2": beit_v2, "cae": cae, "dvae": dvae, "ibot": ibot, "mae": mae, "vit": vit,
           "vqkd": vqkd}


# ---- measuring ----

def seconds(work, args, times=1):
    """Time of one call of `work`, the device's queue included."""
    def wait():
        if "cuda" in args.device:
            torch.cuda.synchronize()
    wait()
    start = time.perf_counter()
    for _ in range(times):
        work()
    wait()
    return (time.perf_counter() - start) / times


def in_turns(works, args, at_least=0.2):
    """Run `works` {name: function} in turns, each for `at_least` seconds or one call.

    -> {name: median seconds of a call}, {name: seconds of every turn}
    """
    times = {name: max(1, round(at_least / seconds(work, args))) for name, work in works.items()}
    runs = {name: [] for name in works}
    for _ in range(args.repeats):
        for name, work in works.items():
            runs[name].append(seconds(work, args, times[name]))
    return {name: statistics.median(run) for name, run in runs.items()}, runs


def cpu_clock():
    """-> now, CPU seconds of all processes (nan where there is no /proc/stat), of this process."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    except OSError:
        everybody = float("nan")
    return time.perf_counter(), everybody, time.process_time()


def others_since(start):
    """In words, what other processes took of the CPU since `start = cpu_clock()`."""
    wall, everybody, own = (now - then for now, then in zip(cpu_clock(), start))
    share = (everybody - own) / (wall * os.cpu_count())
    return f"others {abs(share):.1%}" + " WARNING: measure again on a quiet machine" * (share > 0.05)


def peak_memory(args):
    """Bytes: what tensors took of the GPU, or the most this process ever held."""
    if "cuda" in args.device:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def count_flops(model, loss_of, imgs):
    """FLOP of one forward and backward pass, and the MLP shapes (rows, width, hidden) of the model.

    The counter does not see the CPU kernel of scaled_dot_product_attention, so attention is written out for
    this one pass, which runs without torch.compile and in float32.
    """
    shapes = set()

    def note(fc1, inputs, output):
        shapes.add((inputs[0].shape[:-1].numel(), *fc1.weight.T.shape))

    hooks = [m.fc1.register_forward_hook(note) for m in model.modules() if isinstance(m, Mlp)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_of(model.forward, imgs).backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return counter.get_total_flops(), shapes


def bench_steps(args):
    """Measure and print one row: whole training steps of args.method."""
    if "cuda" in args.device:
        torch.set_float32_matmul_precision("high")              # as data.setup
    torch.manual_seed(0)
    args.amp, dtype = AMP[args.dtype], getattr(torch, args.dtype)
    model, groups, loss_of = METHODS[args.method](args)
    model.to(args.device).train()
    net, scaler = data.wrap(model, args), data.make_scaler(args)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    imgs = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)

    def step():
        with data.autocast(args):
            loss = loss_of(net, imgs)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step(), step()                                              # AdamW's state, compilation
    memory = peak_memory(args)
    flops, shapes = count_flops(model, loss_of, imgs)
    works, sizes = {"step": step}, {(2048, 2048, 2048)} | shapes
    for m, k, n in sizes:
        a, b = (torch.randn(s, device=args.device).to(dtype) for s in ((m, k), (k, n)))
        works[m, k, n] = lambda a=a, b=b: a @ b
    start = cpu_clock()
    median, runs = in_turns(works, args)
    took, rate = median["step"], flops / median["step"]
    matmul, (m, k, n) = max((2 * m * k * n / median[m, k, n], (m, k, n)) for m, k, n in sizes)
    print(f"{args.method} {args.model}/{args.patch_size} {args.img_size} px, batch {args.batch_size}, "
          f"{args.dtype}{', compiled' * args.compile}, {device_name(args)}\n"
          f"  {args.batch_size / took:.1f} images/s, {took:.4g} s/step ({min(runs['step']):.4g} to "
          f"{max(runs['step']):.4g}), {memory / 2**30:.2f} GiB, {flops / 1e9:.1f} GFLOP/step\n"
          f"  {rate / 1e9:.1f} GFLOP/s = {rate / matmul:.0%} of matmul "
          f"({matmul / 1e9:.1f} at {m} x {k} x {n}), {others_since(start)}", flush=True)


def device_name(args):
    if "cuda" in args.device:
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"


# ---- the input side ----

JITTER = dict(jitter=(0.4, 0.4, 0.2, 0.1), jitter_prob=0.8, gray=0.2)
INPUT = {  # what the methods ask for at 32 px
    "MAE: crop 0.2-1, flip": [data.View(32, scale=(0.2, 1.0), flip=0.5)],
    "fine-tuning: crop, flip, RandAugment, erasing": [
        data.View(32, scale=(0.3, 1.0), flip=0.5, rand_augment=9.0, erase=0.25)],
    "iBOT: 2 global and 4 local crops, jitter, blur": [
        data.View(32, 2, (0.25, 1.0), flip=0.5, blur=(1.0, 0.1), solarize=(0.0, 0.2), **JITTER),
        data.View(16, 4, (0.05, 0.25), flip=0.5, blur=0.5, **JITTER)],
}


def bench_augmentation(args):
    """Images/s of the batched augmentation on args.device, and block masks/s."""
    imgs = torch.randint(256, (args.batch_size, 3, 32, 32), dtype=torch.uint8, device=args.device)
    mean, std = data.STATS["cifar10"]
    works = {name: lambda views=views: data.make_views(data.crop_in_memory(imgs, views), views, mean, std)
             for name, views in INPUT.items()}
    works["block masks, 75 of 14 x 14"] = lambda: data.blockwise_mask(
        args.batch_size, 14, 75, 16, device=args.device)
    start = cpu_clock()
    median, _ = in_turns(works, args)
    print(f"batches of {args.batch_size} images of 32 px, {device_name(args)}, {others_since(start)}")
    for name, took in median.items():
        print(f"  {name:48} {args.batch_size / took:10,.0f} a second", flush=True)


def photo(g, height=375, width=500):
    """(3, H, W) uint8, like a photograph: noise of all scales from 128 pixels to one, mostly grey."""
    layers = 0
    for scale in (2 ** k for k in range(8)):
        noise = torch.randn(1, 4, height // scale + 2, width // scale + 2, generator=g)
        noise = F.interpolate(noise, size=(height, width), mode="bicubic")[0]                # (4, H, W)
        layers = layers + scale ** 0.4 * (noise[:1] + 0.3 * noise[1:])  # 3 bits a pixel at quality 90
    return (120 + 55 * layers / layers.std()).clamp(0, 255).to(torch.uint8)


def crop_plain(path, views):
    """What data.crop_file does, the plain way: decode all of the image, crop, resize."""
    img, crops = Image.open(path).convert("RGB"), []
    for view in views:
        top, left, h, w = data.random_box(img.height, img.width, view.scale, view.ratio, random)
        crop = img.crop((left, top, left + w, top + h)).resize((view.size,) * 2, Image.Resampling.BICUBIC)
        crops.append(torch.from_numpy(np.array(crop)).permute(2, 0, 1))
    return crops


def bench_jpeg(args, number=32):
    """data.crop_file beside the plain way, on one thread: images/s, and how far their pixels differ."""
    g = torch.Generator().manual_seed(0)
    torch.set_num_threads(1)                                    # as in a DataLoader worker
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i}.jpg") for i in range(number)]
        for path in paths:
            Image.fromarray(photo(g).permute(1, 2, 0).numpy()).save(path, quality=90)
        size = sum(path.stat().st_size for path in paths) / number
        print(f"random crops (0.2-1) of {number} JPEG files, 500 x 375, {size / 1e3:.0f} kB each, one thread")

        def crops(crop, views):
            random.seed(0)                                      # the same boxes for both
            return [crop(path, views)[0] for path in paths]

        for px in (224, 112, 96):
            views, start = [data.View(px, scale=(0.2, 1.0))], cpu_clock()
            median, runs = in_turns({"plain": lambda: crops(crop_plain, views),
                                     "ours": lambda: crops(data.crop_file, views)}, args)
            others = others_since(start)
            ratio = statistics.median(a / b for a, b in zip(runs["plain"], runs["ours"]))
            pairs = zip(crops(crop_plain, views), crops(data.crop_file, views))
            far = torch.stack([(a.float() - b.float()).abs().mean() for a, b in pairs])
            ours, plain = number / median["ours"], number / median["plain"]
            print(f"  {px:3} px: {ours:,.0f} images/s, plain {plain:,.0f}: x {ratio:.2f}; mean difference "
                  f"{far.mean():.2f} / 255 (worst image {far.max():.2f}), {others}", flush=True)


# ---- whole runs ----

RUNS = {  # in this order: the later ones read what the earlier ones wrote
    "dvae": "dvae.py", "mae": "mae.py", "ibot": "ibot.py --img_size 24", "vit": "vit.py",
    "beit": "beit.py --tokenizer dvae/tokenizer.pt", "cae": "cae.py --tokenizer dvae/tokenizer.pt",
    "vqkd": "beit_v2.py --stage tokenizer --teacher mae/encoder.pt",
    "beit_v2": "beit_v2.py --stage pretrain --tokenizer vqkd/tokenizer.pt"}


def run_script(words, bare, first=8):
    """main() of a script in this process. bare: its first batch again and again, nothing judged or saved.

    -> median seconds of a step, after the first ones; the share that evaluations have of a whole run
    """
    begun, times, about = [], [], []
    steps, batches, init = data.Loader.steps, data.Loader.batches, data.Log.__init__

    def timed(loader, start, net):
        for item in steps(loader, start, net):
            times.append(time.perf_counter())
            yield item

    def prepared(loader, order):
        if bare and loader.train:
            yield from itertools.repeat(next(batches(loader, order)))
        yield from batches(loader, order)

    def logged(log, args, loader, start=0):
        init(log, args, loader, start)
        about[:] = loader.all_steps, 3 + (not bare and args.epochs // args.eval_every)
        begun.append(time.perf_counter())
    data.Loader.steps, data.Loader.batches, data.Log.__init__ = timed, prepared, logged
    sys.argv = words.split() + "--eval_every 0 --save_every 1000000".split() * bare
    try:
        runpy.run_path(str(Path(data.__file__).with_name(sys.argv[0])), run_name="__main__")
    finally:
        data.Loader.steps, data.Loader.batches, data.Log.__init__ = steps, batches, init
    step = statistics.median(b - a for a, b in itertools.pairwise(times[first:]))
    judged = times[0] - begun[0]
    return step, about[1] * judged / (about[1] * judged + about[0] * step)


def bench_run(args):
    """Every script, recipe laptop: its loop in turns with its step on one prepared batch.

    The images are noise in CIFAR-10's files: as many, so that evaluations have their share."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        batches = Path("data/cifar-10-batches-bin")
        batches.mkdir(parents=True)
        for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
            rows = np.random.default_rng(0).integers(256, size=(10_000, 3073), dtype=np.uint8)
            rows[:, 0] %= 10
            (batches / f"{name}.bin").write_bytes(rows.tobytes())
        (batches / "batches.meta.txt").write_text("a b c d e f g h i j")
        for method, command in RUNS.items():
            words = (f"{command} --recipe laptop --model micro --amp {AMP[args.dtype]} "
                     f"--{'' if args.compile else 'no-'}compile --device {args.device} --max_steps 50")
            start, whole, bare = cpu_clock(), [], []
            with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
                for turn in range(args.repeats):
                    whole.append(run_script(f"{words} --output_dir {method}{turn or ''}", False))
                    bare.append(run_script(f"{words} --output_dir {method}-bare{turn}", True))
            loop, share = (statistics.median(values) for values in zip(*whole))
            step = statistics.median(seconds for seconds, _ in bare)
            batch = json.loads(Path(method, "args.json").read_text())["flags"]["batch_size"]
            print(f"  {method:8} {batch / step:8.1f} images/s in bare steps, {batch / loop:8.1f} in the "
                  f"loop: {step / loop:.0%}; evaluations {share:.1%} of a laptop run, {others_since(start)}",
                  flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="mae")
    parser.add_argument("--model", choices=SIZES, default="tiny")
    parser.add_argument("--img_size", type=int, default=32)
    parser.add_argument("--patch_size", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--dtype", choices=AMP, default="float32", help="of autocast and of the matmul")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--repeats", type=int, default=7, help="turns; the median is printed")
    parser.add_argument("--run", action="store_true", help="measure the loops of all scripts")
    parser.add_argument("--input", action="store_true", help="measure augmentation and JPEG decoding")
    args = parser.parse_args()
    if len(sys.argv) == 1:
        for flags in TABLE:  # each in its own process, for its own peak memory
            subprocess.run([sys.executable, __file__, *flags.split()], check=True)
    elif args.run:
        bench_run(args)
    elif args.input:
        bench_augmentation(args)
        bench_jpeg(args)
    else:
        if args.img_size % args.patch_size:
            data.stop(f"--img_size {args.img_size} is not divisible by --patch_size {args.patch_size}")
        if args.device == "cpu" and args.dtype == "float16":
            data.stop("--dtype float16 is for GPUs: use --dtype bfloat16 on a CPU")
        if args.device == "cuda" and not torch.cuda.is_available():
            data.stop("--device cuda was asked for but torch sees no CUDA GPU")
        args.grid = args.img_size // args.patch_size
        bench_steps(args)


if __name__ == "__main__":
    main()
