"""What a run promises: to go on after a kill, to be the same on one process or two, and to say what is wrong.

The scripts run on 208 + 41 drawn images of 8 px with a ViT of two small blocks (`shrink`), most of them in
this process (`run`). Where a process has to die, this file is the program (`serve`, `child`).
"""
import atexit
import contextlib
import importlib
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import beit_v2  # noqa: E402
import dvae  # noqa: E402
import mae  # noqa: E402, F401: its import is paid here, not in the first test
import vit  # noqa: E402

TINY = ("--data shapes --device cpu --amp none --img_size 8 --patch_size 4 --model micro --batch_size 20 "
        "--log_every 1 --epochs 6")
MAE = f"mae.py {TINY} --decoder_dim 16 --decoder_depth 1 --decoder_heads 2"
DVAE = f"dvae.py {TINY} --n_hid 8 --vocab 16 --stride 2"
BEIT = f"beit.py {TINY} --num_masked 2 --min_block 1"
CAE = f"cae.py {TINY} --num_masked 2 --min_block 1"
VQKD = f"beit_v2.py {TINY} --stage tokenizer --num_codes 16 --code_dim 4 --restart 5"
BEIT2 = f"beit_v2.py {TINY} --stage pretrain --num_masked 2 --min_block 1 --early_layer 1"
IBOT = (f"ibot.py {TINY} --local_size 4 --local_crops 1 --out_dim 16 --patch_out_dim 16 --head_hidden 16 "
        "--head_bottleneck 8 --shared_head --koleo 0")
TRAIN = f"vit.py {TINY} --mode train --mixup 0.8 --drop_path 0.1 --ema 0.9"
LINEAR = f"vit.py {TINY} --mode linear --optimizer sgd --blrs 1 10"
METHODS = {"mae": MAE, "dvae": DVAE, "beit": BEIT, "cae": CAE, "ibot": IBOT, "vqkd": VQKD, "beit_v2": BEIT2}
LBFGS = "vit.py --data shapes --device cpu --img_size 8 --patch_size 4 --mode linear --label_fraction 0.2"
SCRIPTS = METHODS | {"train": TRAIN, "linear": LINEAR}
FILES = {"args.json", "curves.png", "encoder.pt", "last.pt", "log.jsonl", "pictures"}
STEPS = 60                                                      # 6 epochs of 208 // 20 steps
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")


class PowerCut(BaseException):
    """Nothing catches it, as nothing catches a power cut."""


def shrink(patch):
    """Few images, a small ViT and no pictures, so that a run takes less than a second."""
    draw = data.draw_shapes
    patch.setattr(data, "draw_shapes", lambda n, size, seed: draw(n // 24, size, seed))
    patch.setitem(vit.SIZES, "micro", dict(embed_dim=32, depth=2, num_heads=2))
    patch.setattr(data, "save_rows", lambda *args, **scale: None)
    patch.setattr(data, "save_usage", lambda *args: None)
    patch.setattr(data, "save_plot", lambda *args, **settings: None)
    patch.setattr(data, "curves", lambda log: None)


def main_of(command, patch):
    """Run main() of the script that `command` names, in this process, and what it leaves for its exit."""
    left = []
    patch.setattr(sys, "argv", shlex.split(command))
    patch.setattr(atexit, "register", lambda *call: left.insert(0, call))
    try:
        data.run(importlib.import_module(Path(sys.argv[0]).stem).main)
    finally:
        for function, *values in left:
            function(*values)


@contextlib.contextmanager
def guarded():
    """One thread (as `spawn` has), no ranks; afterwards signal handlers and threads are as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in RANKS:
            patch.delenv(name, raising=False)
        try:
            yield patch
        finally:
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def run(command, prepare=shrink):
    """The script's main() in this process, on a small world; `prepare` may patch more."""
    with guarded() as patch:
        prepare(patch)
        main_of(command, patch)


def spawn(start, words, stdin=None):
    """A process of this file's `serve` or `child`, with its output."""
    env = {name: value for name, value in os.environ.items() if name not in RANKS}
    env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([sys.executable, *start, __file__, *words], env=env, input=stdin,
                          capture_output=True, text=True)


def torchrun(command, ranks=2, *flags):
    """That many processes under torchrun that run `command`."""
    return spawn(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *flags],
                 shlex.split(command))


def forked(*jobs, ranks=1):
    """Run jobs (command, hit), one after another, each in `ranks` processes of its own, without torchrun;
    they are forks of one that has imported torch. hit: (signal, step, seconds) or (). -> statuses, process
    """
    done = spawn([], ["--serve", str(ranks)], json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done


def serve(ranks):
    """What the process of `forked` does; it prints the exit statuses of all its children in the end."""
    import torch._dynamo  # noqa: F401: an optimizer imports it, in every child anew
    statuses = []
    for command, hit in json.load(sys.stdin):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(ranks):
            sys.stdout.flush()
            if not (pid := os.fork()):
                if ranks > 1:
                    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_PORT=port)
                    os.environ |= {name: str(value) for name, value in names.items()}
                    os.environ["MASTER_ADDR"] = "localhost"
                return child(shlex.split(command), hit)
            children.append(pid)
        statuses += [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    print("\n" + json.dumps(statuses))


def child(words, hit=()):
    """What a spawned process does: `run`, hit by a signal after a step; every rank keeps what `encode`
    gathered and the weights it saves.
    """
    patch = pytest.MonkeyPatch()
    shrink(patch)
    if hit:
        number, at, delay = hit
        step = data.Log.step

        def step_and_fall(log, n, **values):
            step(log, n, **values)
            if n + 1 == at:
                threading.Timer(delay, os.kill, (os.getpid(), number)).start()
        patch.setattr(data.Log, "step", step_and_fall)
    encode, kept = data.encode, []

    def encode_and_keep(args, features, source):
        kept.append(encode(args, features, source))
        torch.save(kept[-1], Path(args.output_dir) / f"encoded.{data.rank()}")
        return kept[-1]
    patch.setattr(data, "encode", encode_and_keep)
    save = data.Log.save

    def save_of_every_rank(log, done, state, **exports):
        torch.save(state["model"].state_dict(), log.path.with_name(f"model.{data.rank()}"))
        save(log, done, state, **exports)
    patch.setattr(data.Log, "save", save_of_every_rank)
    main_of(shlex.join(words), patch)


def read(path):
    return torch.load(path, weights_only=True)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return {line["step"]: line["loss"] for line in log_of(folder) if "loss" in line}


def same(a, b):
    """Are two nested states equal to the last bit?"""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) and a.dtype == b.dtype if torch.is_tensor(a) else a == b


def assert_same_run(folder, whole):
    """Weights, optimiser, encoder and losses are equal to the last bit, and no step is logged twice."""
    assert same(read(folder / "last.pt"), read(whole / "last.pt"))
    for name in ("encoder.pt", "tokenizer.pt"):
        assert (folder / name).exists() == (whole / name).exists()
        assert not (whole / name).exists() or same(read(folder / name), read(whole / name))
    if (whole / "result.json").exists():
        assert (folder / "result.json").read_text() == (whole / "result.json").read_text()
    assert losses(folder) == losses(whole)
    steps = [line["step"] for line in log_of(folder) if "loss" in line]
    assert len(steps) == len(set(steps)), "a step was logged twice"


def snapshot(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def sentence(command, capsys, status=2, prepare=shrink):
    """The one sentence on stderr with which `command` must end, with that exit status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(command, prepare)
    lines = [line for line in capsys.readouterr().err.splitlines() if line and not line.startswith("epoch ")]
    assert stopped.value.code == status and len(lines) == 1, lines
    return lines[0]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with what beit, cae and beit_v2 look for below out/: untrained tokenizers and a teacher."""
    folder, size = tmp_path_factory.mktemp("inputs"), dict(embed_dim=32, depth=2, num_heads=2)
    codes, backbone = dvae.DVAE(grid=2, stride=2, n_hid=8, vocab=16), vit.ViT(8, 4, **size)
    words = beit_v2.VQKD(vit.ViT(8, 4, **size), 16, 4, 1, 32)
    for path, model, method in (("dvae-shapes/tokenizer.pt", codes, "dvae"),
                                ("mae-shapes/encoder.pt", backbone, "mae"),
                                ("beit_v2-tokenizer-shapes/tokenizer.pt", words, "beit_v2")):
        path = folder / "out" / path
        path.parent.mkdir(parents=True)
        torch.save({"model": model.state_dict(), "config": model.config, "method": method,
                    "mean": (0.5,) * 3, "std": (0.5,) * 3}, path)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, inputs):
    """{name: folder of an uninterrupted run}, for every one of SCRIPTS; writes.json: its files in order."""
    folders, replace = {name: tmp_path_factory.mktemp("whole") / name for name in SCRIPTS}, Path.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(inputs)
        for name, command in SCRIPTS.items():
            order = []
            patch.setattr(Path, "replace", lambda path, to: (order.append(to.name), replace(path, to))[1])
            run(f"{command} --output_dir {folders[name]}")
            patch.setattr(Path, "replace", replace)
            order = [name for name in order if not name.endswith(".png")]
            (folders[name].parent / "writes.json").write_text(json.dumps(order))
    return folders


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, inputs):
    """Every test works in a folder of its own, with those inputs: default output folders land there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs / "out", tmp_path / "out")


# ---- the end of a process ----

def test_kill_and_resume_twice_is_bitwise_the_uninterrupted_run(tmp_path, whole):
    """kill -9 at two random moments: weights, optimiser, log and result of the run that nobody killed."""
    moments = {name: [random.randint(2, 25), random.randint(26, 50)] for name in SCRIPTS}
    delays = {name: [random.uniform(0, 0.02) for _ in range(2)] for name in SCRIPTS}

    def chains(names):
        jobs = []
        for name in names:
            hits = [(signal.SIGKILL, *moment) for moment in zip(moments[name], delays[name])]
            again = f"{SCRIPTS[name].split()[0]} --resume --output_dir {tmp_path / name}"
            jobs += zip([f"{SCRIPTS[name]} --output_dir {tmp_path / name}", again, again], [*hits, ()])
        statuses, done = forked(*jobs)
        assert statuses == len(names) * [-signal.SIGKILL, -signal.SIGKILL, 0], done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(chains, (list(SCRIPTS)[::2], list(SCRIPTS)[1::2])))
    for name in SCRIPTS:
        print(name, "was killed after the steps", moments[name], "and seconds", delays[name])
        assert losses(tmp_path / name).keys() == set(range(1, STEPS + 1))
        assert_same_run(tmp_path / name, whole[name])


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_evaluation_is_made_up(name, whole, tmp_path):
    """A run that was killed in its last evaluation has saved its last step: resumed, it evaluates that."""
    shutil.copytree(whole[name], tmp_path / "cut")
    *lines, evaluation = (tmp_path / "cut/log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut/log.jsonl").write_text("".join(lines))
    run(f"{METHODS[name].split()[0]} --resume --output_dir cut")
    *_, found = log_of("cut")
    wanted = json.loads(evaluation)
    assert "loss" not in wanted and found.keys() == wanted.keys()
    for key in wanted.keys() - {"seconds", "used", "gap"}:      # counted since the last one; fresh noise
        assert found[key] == pytest.approx(wanted[key], rel=1e-4), key


def power_cut(is_it):
    """-> prepare: the power fails at the first moment for which `is_it(file name, moment)` is true: "torn",
    with half a file on the disk, or "rename", before it takes its place.
    """
    replace, fsync = Path.replace, os.fsync

    def torn(file):
        name = Path(f"/proc/self/fd/{file}").readlink().name
        if is_it(name.removesuffix(".tmp"), "torn"):
            os.ftruncate(file, os.fstat(file).st_size // 2)
            raise PowerCut
        fsync(file)

    def unnamed(path, target):
        if is_it(target.name, "rename"):
            raise PowerCut
        return replace(path, target)

    def prepare(patch):
        shrink(patch)
        patch.setattr(os, "fsync", torn)
        patch.setattr(Path, "replace", unnamed)
    return prepare


@pytest.mark.parametrize("name", ("mae", "vqkd", "train", "linear"))
def test_power_cut_at_every_write(name):
    """Cut before each rename and with half of each file on the disk: the resumed run ends the same. (One
    script for encoder.pt, one for tokenizer.pt, two with a result.json.)
    """
    command = f"{SCRIPTS[name]} --epochs 2 --batch_size 60"
    run(f"{command} --output_dir whole")
    for cut in range(30):
        moments = itertools.count()
        folder = f"cut{cut}"
        try:
            run(f"{command} --output_dir {folder}", power_cut(lambda *moment: next(moments) == cut))
        except PowerCut:
            kept = Path(folder, "last.pt").exists() and Path(folder, "args.json").exists()
            again = f"{command.split()[0]} --resume" if kept else f"{command} --resume"
            run(f"{again} --output_dir {folder}")
            assert_same_run(Path(folder), Path("whole"))
        else:
            break
    assert 5 <= cut < 29, f"{cut} writes were cut"


@pytest.mark.parametrize("name", SCRIPTS)
def test_order_of_the_files_that_a_run_writes(name, whole):
    """At no moment does last.pt go ahead of encoder.pt or tokenizer.pt; result.json comes last."""
    order = json.loads((whole[name].parent / "writes.json").read_text())
    model = "tokenizer.pt" if name in ("dvae", "vqkd") else "encoder.pt"
    saved = (["last.pt"] if name == "linear" else [model, "last.pt"] if name != "ibot" else
             [model, "student.pt", "last.pt"])
    assert order == ["args.json"] + 6 * saved + (["result.json"] if name in ("train", "linear") else [])


def test_power_cut_while_the_log_is_shortened(tmp_path, whole):
    """A resumed run drops what came after its checkpoint, and log.jsonl is whole at any moment."""
    run(f"{MAE} --max_steps 10 --output_dir cut")
    before = log_of("cut")
    for moment in ("torn", "rename"):
        with pytest.raises(PowerCut):
            run("mae.py --resume --max_steps 0 --output_dir cut",
                power_cut(lambda *found: found == ("log.jsonl", moment)))
        assert log_of("cut") == before
    run("mae.py --resume --max_steps 0 --output_dir cut")
    assert_same_run(tmp_path / "cut", whole["mae"])


def test_half_a_line_in_the_log_is_dropped(tmp_path, whole):
    """A line that a kill has cut short is no obstacle to --resume."""
    run(f"{MAE} --max_steps 10 --output_dir cut")
    with open("cut/log.jsonl", "a") as file:
        file.write('{"step": 11, "epo')
    run("mae.py --resume --max_steps 0 --output_dir cut")
    assert_same_run(tmp_path / "cut", whole["mae"])


def test_sigterm_and_ctrl_c_save_and_leave(tmp_path, whole):
    """SIGTERM and Ctrl-C end with a message and 128 + signal; --resume ends as the uninterrupted run."""
    cases = {"mae": signal.SIGTERM, "train": signal.SIGINT}
    statuses, done = forked(*((f"{SCRIPTS[name]} --output_dir {tmp_path / name}", (number, 17, 0))
                              for name, number in cases.items()))
    assert statuses == [128 + number for number in cases.values()], done.stderr
    assert "Traceback" not in done.stderr
    for name in cases:
        assert f"stopped and saved: --resume continues {tmp_path / name}\n" in done.stdout
        assert 17 <= read(tmp_path / name / "last.pt")["step"] < STEPS
        run(f"{SCRIPTS[name].split()[0]} --resume --output_dir {tmp_path / name}")
        assert_same_run(tmp_path / name, whole[name])


def hit_at(number, at):
    """-> prepare: this process gets the signal `number` in step `at`."""
    def prepare(patch):
        shrink(patch)
        step = data.Log.step

        def hit(log, n, **values):
            if n + 1 == at:
                os.kill(os.getpid(), number)
            step(log, n, **values)
        patch.setattr(data.Log, "step", hit)
    return prepare


def assert_resumes(command, number, at):
    """Hit by a signal in step `at` and resumed, a run is the uninterrupted one: stopped/ equals whole/."""
    run(f"{command} --output_dir whole")
    with pytest.raises(SystemExit):
        run(f"{command} --output_dir stopped", hit_at(number, at))
    run(f"{command.split()[0]} --resume --output_dir stopped")
    assert_same_run(Path("stopped"), Path("whole"))


@pytest.mark.parametrize("at", (7, 60 - 3))
def test_an_interrupted_probe_counts_its_whole_last_epoch(at, tmp_path, whole):
    """The training images of a whole epoch pick its learning rate, also after an interruption."""
    with pytest.raises(SystemExit) as left:
        run(f"{LINEAR} --output_dir stopped", hit_at(signal.SIGTERM, at))
    assert left.value.code == 128 + signal.SIGTERM and read("stopped/last.pt")["step"] == at
    assert all("images/s" in line for line in log_of("stopped")), "an interrupted probe has nothing to report"
    run("vit.py --resume --output_dir stopped")
    assert_same_run(tmp_path / "stopped", whole["linear"])


@pytest.mark.parametrize("name", ("mae", "train", "linear"))
def test_a_signal_in_the_last_step_leaves_the_evaluation_to_resume(name, tmp_path, whole):
    """An evaluation can take longer than a scheduler waits: all is saved, --resume evaluates."""
    with pytest.raises(SystemExit) as left:
        run(f"{SCRIPTS[name]} --output_dir stopped", hit_at(signal.SIGTERM, STEPS))
    assert left.value.code == 128 + signal.SIGTERM and read("stopped/last.pt")["step"] == STEPS
    run(f"{SCRIPTS[name].split()[0]} --resume --output_dir stopped")
    assert_same_run(tmp_path / "stopped", whole[name])
    last = {entry for line in log_of("stopped") if line["step"] == STEPS for entry in line}
    assert last & {"knn", "usage", "accuracy", "cls"}


def in_evaluation(number, at):
    """-> prepare: this process gets the signal `number` in its evaluation number `at`, from 0 on."""
    def prepare(patch):
        shrink(patch)
        encode, count = data.encode, itertools.count()

        def hit(*words):
            if next(count) == 2 * at:                           # training images, then validation images
                os.kill(os.getpid(), number)
            return encode(*words)
        patch.setattr(data, "encode", hit)
    return prepare


@pytest.mark.parametrize("at, step", ((0, 0), (1, 10), (2, 60)))
def test_a_signal_in_an_evaluation_ends_it_at_once(at, step, tmp_path, whole, capsys):
    """What was learned is saved before: nothing of the evaluation is logged, --resume makes it up."""
    with pytest.raises(SystemExit) as left:
        run(f"{MAE} --output_dir stopped", in_evaluation(signal.SIGTERM, at))
    assert left.value.code == 128 + signal.SIGTERM
    if not step:  # nothing to resume, so nothing stays
        assert not Path("stopped").exists() and "stopped before there was anything" in capsys.readouterr().out
        return
    assert read("stopped/last.pt")["step"] == step
    assert [line["step"] for line in log_of("stopped") if "knn" in line] == [0, 10][:at]
    run("mae.py --resume --output_dir stopped")
    assert_same_run(tmp_path / "stopped", whole["mae"])
    knn = [[(line["step"], line["knn"]) for line in log_of(folder) if "knn" in line]
           for folder in ("stopped", whole["mae"])]
    assert knn[0] == knn[1] and [step for step, _ in knn[0]] == [0, 10, 60]


@pytest.mark.parametrize("name", SCRIPTS)
def test_resume_of_a_run_that_is_complete(name, whole):
    """--resume after the last step writes the result that a kill had prevented, and leaves the rest alone."""
    shutil.copytree(whole[name], "done")
    before = snapshot("done")
    Path("done/result.json").unlink(missing_ok=True)
    run(f"{SCRIPTS[name].split()[0]} --resume --output_dir done")
    after = snapshot("done")
    assert before.keys() == after.keys() and losses("done").keys() == set(range(1, STEPS + 1))
    assert all(after[path] == before[path] for path in before if path.name not in ("args.json", "log.jsonl"))


def test_torchrun_restarts_resume_by_themselves(tmp_path, whole, monkeypatch):
    """With TORCHELASTIC_RESTART_COUNT=1 the same command line, without --resume, continues the run."""
    run(f"{MAE} --max_steps 25 --output_dir stopped")

    def prepare(patch):
        shrink(patch)
        patch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(f"{MAE} --max_steps 0 --output_dir stopped", prepare)
    assert_same_run(tmp_path / "stopped", whole["mae"])


def test_a_streamed_run_resumes_bitwise(tmp_path):
    """Image files that a worker decodes: interrupted inside an epoch and resumed, the same weights."""
    from PIL import Image
    for split, n in (("train", 12), ("val", 3)):
        imgs, labels = data.draw_shapes(10 * n, 12, seed=n)
        for i, (img, label) in enumerate(zip(imgs, labels.tolist())):
            path = tmp_path / "set" / split / str(label) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(img.permute(1, 2, 0).numpy()).save(path)
    command = f"{MAE} --data {tmp_path}/set --num_workers 1 --epochs 2 --eval_every 9 --batch_size 30"
    assert_resumes(command, signal.SIGINT, 3)


# ---- several processes, several parts ----

SURE = f"{MAE} --img_size 16 --sampling grid --aug none --epochs 3"     # no random masks, no augmentation


def assert_near(folder, single, tolerance=1e-5):
    """Losses agree to `tolerance`, Adam's mean gradients to 1e-3, weights to 1e-4, all relative."""
    a, b = losses(folder), losses(single)
    assert a.keys() == b.keys() and len(a) == 30
    assert max(abs(a[s] - b[s]) / b[s] for s in b) < tolerance
    a, b = read(Path(folder) / "last.pt"), read(Path(single) / "last.pt")
    for i, state in b["optimizer"]["state"].items():  # Adam would hide gradients four times too large
        momentum = a["optimizer"]["state"][i]["exp_avg"]
        assert (momentum - state["exp_avg"]).norm() <= 1e-3 * state["exp_avg"].norm() + 1e-6
    a, b = a["model"], b["model"]
    for name in b:
        rows = slice(None)
        if name.endswith("qkv.bias"):  # the keys' bias has no gradient but noise, which Adam scales up
            D = len(b[name]) // 3
            rows = torch.cat([torch.arange(D), torch.arange(2 * D, 3 * D)])
        assert (a[name][rows] - b[name][rows]).norm() <= 1e-4 * (b[name][rows].norm() + 1e-2), name


def test_torchrun_starts_again_after_a_lost_rank(tmp_path, monkeypatch):
    """kill -9 on one of two ranks: torchrun starts both again, and the run ends as an undisturbed one."""
    monkeypatch.setenv("KILL_AT", "25")
    flags = "--epochs 3 --eval_every 0 --output_dir"
    with ThreadPoolExecutor(2) as pool:
        killed = pool.submit(torchrun, f"{MAE} {flags} {tmp_path}/killed", 2, "--max_restarts=1")
        statuses, done = forked((f"{MAE} {flags} {tmp_path}/whole", ()), ranks=2)
        killed = killed.result()
    assert killed.returncode == 0 and statuses == [0, 0], killed.stderr + done.stderr
    assert "resuming" in killed.stdout and "after step 20" in killed.stdout
    found, wanted = losses(tmp_path / "killed"), losses(tmp_path / "whole")
    assert list(found) == list(wanted) == list(range(1, 31))
    assert found == pytest.approx(wanted, rel=1e-4)             # ranks add up in another order at a start


def test_two_processes_follow_one(tmp_path):
    """torchrun with two processes (gloo): losses, weights, features and k-NN accuracy of one process with the
    same total batch (`assert_near`); a linear probe counts every validation image once, in one result, and
    one that is trained to convergence says what it does on one process.
    """
    with ThreadPoolExecutor(2) as pool:
        two = pool.submit(torchrun, f"{SURE} --output_dir {tmp_path}/two")
        probe = pool.submit(forked, (f"{LINEAR} --epochs 2 --output_dir {tmp_path}/probe", ()),
                            (f"{LBFGS} --output_dir {tmp_path}/lbfgs", ()), ranks=2)
        run(f"{SURE} --output_dir one")
        two, (statuses, probe) = two.result(), probe.result()
    assert two.returncode == 0 and statuses == 4 * [0], two.stderr + probe.stderr
    assert "2 ranks x 1 parts x 10" in two.stdout
    assert_near(tmp_path / "two", tmp_path / "one")
    knn = {folder: [line["knn"] for line in log_of(folder) if "knn" in line] for folder in ("one", "two")}
    assert knn["one"] == knn["two"] and len(knn["one"]) == 3

    args = SimpleNamespace(img_size=16, batch_size=20, device="cpu", amp="none", epochs=1, max_steps=0)
    with guarded() as patch:
        shrink(patch)
        imgs, labels = data.draw_shapes(1000, 16, 1)
        stats = data.pixel_stats(data.draw_shapes(5000, 16, 0)[0])
        encoder = vit.ViT(**read("one/encoder.pt")["config"])
    encoder.load_state_dict(read("one/encoder.pt")["model"])
    wanted, _ = data.encode(args, lambda x: encoder.eval().forward_features(x)[:, 1:].mean(1),
                            data.Images(imgs, labels, list("0123456789"), *stats))
    for rank in (0, 1):  # both ranks have all 41 images, in their order
        features, y = read(tmp_path / "two" / f"encoded.{rank}")
        assert torch.equal(y, labels) and (features - wanted).abs().max() < 1e-3 * wanted.abs().max()

    result = json.loads((tmp_path / "probe/result.json").read_text())
    counts = torch.tensor(list(result["all"].values()), dtype=torch.double) * 41 / 100
    assert len(counts) == 4 and (counts - counts.round()).abs().max() < 1e-4
    run(f"{LBFGS} --output_dir alone")
    assert Path("alone/result.json").read_text() == Path("lbfgs/result.json").read_text()
    assert probe.stdout.count("result (linear") == 2


def test_two_processes_keep_one_student_one_teacher_and_the_same_centres(tmp_path):
    """Different images and masks on two ranks: after two epochs all of iBOT's state is bitwise the same, and
    so are the codes of VQ-KD that a gradient trains."""
    codes = f"{VQKD} --codes gradient --no-unit --num_codes 64 --epochs 2 --output_dir {tmp_path}/codes"
    statuses, done = forked((f"{IBOT} --koleo 0.1 --epochs 2 --output_dir {tmp_path}/two", ()), (codes, ()),
                            ranks=2)
    assert statuses == 4 * [0], done.stderr
    a, b = (read(tmp_path / "two" / f"model.{rank}") for rank in (0, 1))
    assert same(a, b) and a["centre"].abs().max() > 0 and a["patch_centre"].abs().max() > 0
    a, b = (read(tmp_path / "codes" / f"model.{rank}") for rank in (0, 1))
    assert same(a, b) and a["quantizer.codebook"].isfinite().all()


def test_beit_v2_runs_both_stages_in_one_command(tmp_path):
    """Flags of either stage may be typed; the second reads the first's tokenizer; --resume goes on."""
    command = (f"beit_v2.py {TINY} --teacher out/mae-shapes/encoder.pt --num_codes 16 --code_dim 4 "
               f"--num_masked 2 --min_block 1 --early_layer 1 --max_steps")
    shutil.rmtree("out/beit_v2-tokenizer-shapes")
    statuses, done = forked((f"{command} 2", ()), (f"{command} 3 --resume", ()), ranks=2)
    assert statuses == 4 * [0], done.stderr
    for folder in ("out/beit_v2-tokenizer-shapes", "out/beit_v2-shapes"):
        assert list(losses(folder)) == [1, 2, 3]
        assert done.stdout.count(f"resuming {folder}/last.pt after step 2\n") == 1
        assert same(read(f"{folder}/model.0"), read(f"{folder}/model.1"))


def test_the_second_stage_keeps_its_flags_when_the_first_is_stopped():
    """Ctrl-C before the second stage of beit_v2.py has begun: --resume gives it what was typed for it."""
    command = (f"beit_v2.py {TINY} --teacher out/mae-shapes/encoder.pt --num_codes 16 --code_dim 4 "
               f"--num_masked 2 --min_block 1 --early_layer 1 --max_steps 3 --seed 5 --output_dir both")
    statuses, done = forked((command, (signal.SIGINT, 2, 0)), ("beit_v2.py --resume --output_dir both", ()))
    assert statuses == [128 + signal.SIGINT, 0], done.stderr
    flags = json.loads(Path("both/args.json").read_text())["flags"]
    assert {name: flags[name] for name in ("data", "img_size", "num_masked", "seed", "max_steps")} == {
        "data": "shapes", "img_size": 8, "num_masked": 2, "seed": 5, "max_steps": 3}
    assert list(losses("both")) == list(losses("both-tokenizer")) == [1, 2, 3]


def test_accumulation_equals_one_large_batch(tmp_path):
    """--accum_steps 4 gives the losses and the weights of the undivided batch."""
    run(f"{SURE} --output_dir one")
    run(f"{SURE} --accum_steps 4 --output_dir four")
    assert_near("four", "one")


# ---- what cannot go on ----

def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_files(tmp_path, capsys):
    """--lr 1e30 ends with one sentence and status 2; last.pt and encoder.pt are those of before."""
    run(f"{MAE} --max_steps 10 --output_dir run")
    good = {name: Path("run", name).read_bytes() for name in ("last.pt", "encoder.pt")}
    said = sentence("mae.py --resume --lr 1e30 --max_steps 0 --output_dir run", capsys)
    assert re.search(r"loss (nan|inf) at step 1\d: try a smaller --lr.*good checkpoint is run/last.pt", said)
    assert good == {name: Path("run", name).read_bytes() for name in good}
    assert not list(Path("run").glob("*.tmp")) and "NaN" not in Path("run/log.jsonl").read_text()
    assert "last.pt" not in sentence(f"{MAE} --lr 1e30 --warmup_epochs 0 --output_dir new", capsys)
    assert not Path("new/last.pt").exists()


def test_weights_that_are_not_finite_are_not_saved(capsys):
    """The last update of an epoch may break the weights behind a finite loss: no file is replaced by them."""
    run(f"{MAE} --max_steps 10 --output_dir run")
    good = {name: Path("run", name).read_bytes() for name in ("last.pt", "encoder.pt")}

    def prepare(patch):
        shrink(patch)
        patch.setattr(data.Log, "saves", lambda log, done: done == 20 and spoil(log))

    def spoil(log):
        with torch.no_grad():
            models[0].encoder.norm.weight.fill_(math.inf)
        return True
    models, wrap = [], data.wrap

    def prepare_both(patch):
        prepare(patch)
        patch.setattr(data, "wrap", lambda model, args: models.append(model) or wrap(model, args))
    said = sentence("mae.py --resume --max_steps 0 --output_dir run", capsys, prepare=prepare_both)
    assert "is not finite: try a smaller --lr" in said and "run/last.pt" in said
    assert good == {name: Path("run", name).read_bytes() for name in good}


# ---- a user's mistakes: one sentence, status 2, nothing lost ----

@pytest.mark.parametrize("flags, words", (
    ("--img_size 30", "--img_size 30 is not divisible by --patch_size 4: use --img_size"),
    ("--img_size 1", "use --img_size 4"),
    ("--img_size 0", "argument --img_size: 0 must lie in [1, 4096] (see --help)"),
    ("--patch_size 0", "argument --patch_size: 0 must lie in [1, 1024] (see --help)"),
    ("--batch_size 0", "argument --batch_size: 0 must lie in [1, 1e9] (see --help)"),
    ("--accum_steps 3", "use 18 or 21"),
    ("--max_steps -1", "argument --max_steps: -1 must lie in [0, 1e9] (see --help)"),
    ("--seed -1", "argument --seed: -1 must lie in [0, 4294967295] (see --help)"),
    ("--batch_size 300 --accum_steps 300", "208 training images are too few for 300 parts of a batch"),
    ("--batchsize 20", "unrecognized arguments: --batchsize 20"),
    ("--batch_size many", "argument --batch_size: invalid int value: 'many'"),
    ("--sampling rows", "argument --sampling: invalid choice: 'rows'"),
    ("--device tpu", "argument --device: invalid choice: 'tpu'"),
    ("--model gigantic", "gigantic"),
    ("--decoder_heads 3", "--decoder_dim 16"),
    ("--data no/such/folder", "there is no folder no/such/folder: --data takes shapes, cifar10"),
    ("--mask_ratio 75", "argument --mask_ratio: 75.0 must lie in (0, 1) (see --help)"),
    ("--mask_ratio 0.76", "--mask_ratio 0.76 hides all or none of the 4 patches: use a value like 0.75"),
    ("--sampling grid --mask_ratio 0.5", "it needs --mask_ratio 0.75"),
    ("--holdout 208", "--holdout 208 must lie between 1 and 207"),
))
def test_wrong_flags_of_mae(flags, words, capsys):
    """Each wrong value ends in one sentence that names the flag and the remedy, and no run is begun."""
    assert words in sentence(f"{MAE} {flags} --output_dir run", capsys)
    assert not Path("run/log.jsonl").exists()


@pytest.mark.parametrize("flags, words", (
    ("--mode finetune", "--mode finetune needs --init FILE"),
    ("--mode train --init encoder.pt", "use --mode finetune with --init FILE"),
    ("--mode probe", "argument --mode: invalid choice: 'probe'"),
    ("--mode linear --optimizer sgd --init no/encoder.pt", "there is no file no/encoder.pt"),
    ("--mode finetune --init encoder.pt --model cnn", "argument --model: invalid choice: 'cnn'"),
    ("--mode linear --blrs 1 two", "argument --blrs: invalid float value: 'two'"),
    ("--mode knn --blrs 1", "unrecognized arguments: --blrs 1"),
    ("--mode linear --label_fraction 10", "argument --label_fraction: 10.0 must lie in (0, 1] (see --help)"),
    ("--mode linear --label_fraction 0", "argument --label_fraction: 0.0 must lie in (0, 1] (see --help)"),
))
def test_wrong_flags_of_vit(flags, words, capsys):
    """The judge says in one sentence what it lacks."""
    assert words in sentence(f"vit.py {TINY} {flags} --output_dir run", capsys)
    assert not Path("run/log.jsonl").exists()


def test_flags_that_logistic_regression_has_no_use_for(capsys):
    """Each flag of the probes that are trained step by step, typed without --optimizer sgd: one sentence; the
    others go through, and so does each of these where probes are trained."""
    flags = {"epochs": 3, "batch_size": 20, "blr": 1, "lr": 1, "min_lr": 0, "warmup_epochs": 0,
             "crop_scale": 0.5, "blrs": 1}
    for name, value in flags.items():
        said = sentence(f"{LBFGS} --{name} {value} --output_dir run", capsys)
        assert said == f"vit.py: --{name} is for probes that are trained step by step: add --optimizer sgd"
        for probes in ("--optimizer sgd", "--optimizer lars", "--mode attentive", "--recipe small"):
            assert name in until_setup(f"{LBFGS} {probes} --{name} {value}").typed
    assert until_setup(f"{LBFGS} --layers all --seed 3 --amp none").optimizer == "lbfgs"
    assert {*vit.LINEAR} - flags.keys() == {"weight_decay", "clip_grad", "optimizer", "layers"}


def test_a_cnn_trains_resumes_and_is_no_vision_transformer(capsys):
    """vit.py --mode train --model cnn: interrupted and resumed it is the uninterrupted run; all other scripts
    and modes refuse the model, and its encoder.pt, in one sentence."""
    cnn = f"{TRAIN} --model cnn --epochs 2 --eval_every 1"
    assert_resumes(cnn, signal.SIGTERM, 7)
    assert "--drop_path is not used: --model cnn\n" in capsys.readouterr().out
    assert set(os.listdir("whole")) == FILES - {"curves.png"} | {"result.json"}
    judged = [line["accuracy"] for line in log_of("whole") if "accuracy" in line]
    result = json.loads(Path("whole/result.json").read_text())
    assert len(judged) == 3 and result["accuracy"] == pytest.approx(judged[-1], rel=1e-4)
    content = read("whole/encoder.pt")
    model = vit.CNN(**{name: content["config"][name] for name in ("num_classes", "width")})
    model.load_state_dict(content["model"])
    for command in (f"{LBFGS} --init whole/encoder.pt", f"{TRAIN} --mode finetune --init whole/encoder.pt",
                    f"{VQKD} --teacher whole/encoder.pt", "vit.py --init whole/encoder.pt --export x.pt"):
        said = sentence(f"{command} --output_dir new", capsys)
        assert "whole/encoder.pt is a CNN, which is trained with labels alone" in said
    for command in (*METHODS.values(), LBFGS, f"{LBFGS} --mode knn", f"{LBFGS} --mode attentive"):
        assert "--model: invalid choice: 'cnn'" in sentence(f"{command} --model cnn", capsys)


def test_a_batch_that_does_not_divide_over_the_ranks(capsys):
    """--batch_size 500 on 8 GPUs: the two nearest that do are named."""
    def prepare(patch):
        shrink(patch)
        patch.setenv("WORLD_SIZE", "8")
    said = sentence(f"{MAE} --batch_size 500", capsys, prepare=prepare)
    assert "--batch_size 500 does not divide over 8 GPUs" in said and "use 496 or 504" in said
    assert sentence(f"{MAE} --batch_size 4", capsys, prepare=prepare).endswith("use 8")


@pytest.mark.parametrize("device", ("cuda", "mps"))
def test_a_device_that_is_not_there(device, capsys, monkeypatch):
    """--device cuda or mps without one: one sentence with the way out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    said = sentence(f"{MAE} --device {device} --output_dir run", capsys)
    assert f"--device {device}" in said and "--device cpu" in said


def test_a_used_folder_is_refused(tmp_path, whole, capsys):
    """Without --resume nothing in a run's folder is touched."""
    before = snapshot(whole["mae"])
    said = sentence(f"{MAE} --output_dir {whole['mae']}", capsys)
    assert "already holds a run: continue it with --resume, or name another --output_dir" in said
    assert snapshot(whole["mae"]) == before


@pytest.mark.parametrize("name", ("last.pt", "encoder.pt", "tokenizer.pt", "result.json"))
def test_what_a_run_leaves_makes_a_folder_a_used_one(name, capsys):
    """Each of its files alone is not written over; nor is a file by --export."""
    Path("run").mkdir()
    Path("run", name).write_text("mine")
    assert "run already holds a run" in sentence(f"{MAE} --output_dir run", capsys)
    assert "is there already" in sentence(f"vit.py --init encoder.pt --export run/{name}", capsys)
    assert Path("run", name).read_text() == "mine" and os.listdir("run") == [name]


def test_a_place_that_cannot_be_written(capsys):
    """A file where the folder's parent should be (root may write anywhere else): one sentence."""
    Path("file").write_text("mine")
    said = sentence(f"{MAE} --output_dir file/run", capsys)
    assert "cannot write to file/run" in said and "--output_dir" in said
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("keep", (0, 10, 1000, -100))
def test_a_truncated_last_pt(keep, tmp_path, whole, capsys):
    """--resume on a damaged last.pt names it and touches nothing."""
    Path("run").mkdir()
    for name in ("args.json", "log.jsonl", "last.pt"):
        content = (whole["mae"] / name).read_bytes()
        Path("run", name).write_bytes(content[:keep] if name == "last.pt" else content)
    before = snapshot("run")
    said = sentence("mae.py --resume --output_dir run", capsys)
    assert "run/last.pt cannot be read as a checkpoint" in said and "truncated" in said
    assert snapshot("run") == before


def test_files_that_are_no_encoder(whole, capsys):
    """--init with a truncated file, a text, a bare tensor or a picture: one sentence that names the file."""
    Path("half.pt").write_bytes((whole["mae"] / "encoder.pt").read_bytes()[:5000])
    Path("text.pt").write_text("import os")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({"model": {"weight": torch.zeros(3)}}, "other.pt")
    for name in ("half.pt", "text.pt", "tensor.pt", "other.pt"):
        assert sentence(f"{LINEAR} --init {name} --output_dir run", capsys).startswith(f"vit.py: {name} ")


def test_a_checkpoint_of_another_model(tmp_path, whole, capsys):
    """--resume with another model or script names the tensor, or what is missing; nothing is touched."""
    before = snapshot(whole["mae"])
    wider = "mae.py --resume --decoder_dim 32"
    said = sentence(f"{wider} --output_dir {whole['mae']}", capsys)
    assert "another model: decoder_blocks.0.attn.proj.bias is (16,) there and (32,) in the model" in said
    deeper = f"mae.py --resume --decoder_depth 2 --output_dir {whole['mae']}"
    assert "decoder_blocks.1.attn.proj.bias is missing there" in sentence(deeper, capsys)
    assert snapshot(whole["mae"]) == before
    assert "scaler is missing" in sentence(f"{MAE} --resume --output_dir {whole['linear']}", capsys)


def test_an_optimizer_of_another_shape(whole, capsys):
    """Flags that regroup the parameters end in a sentence, not in a traceback of the optimiser."""
    said = sentence(f"vit.py --resume --layer_decay 0.5 --output_dir {whole['train']}", capsys)
    assert "last.pt" in said and "optimizer" in said


def test_the_unpatched_script_in_a_process_of_its_own(tmp_path):
    """python mae.py ends a mistake with one line on stderr and status 2, and a short run with status 0."""
    def process(flags):
        command = [sys.executable, ROOT / "mae.py", *shlex.split(flags)]
        return subprocess.run(command, capture_output=True, text=True)
    with ThreadPoolExecutor(2) as pool:
        wrong, right = pool.map(process, ("--data shapes --mask_ratio 0.99",
                                          f"{MAE.partition(' ')[2]} --max_steps 1 --output_dir run"))
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.strip() == \
        "mae.py: --mask_ratio 0.99 hides all or none of the 64 patches: use a value like 0.75"
    assert right.returncode == 0, right.stderr
    assert set(os.listdir("run")) == FILES


# ---- flags ----

TABLE = {"model": ("micro", "micro", "tiny", "base"), "mask_ratio": (0.75, "share"),
         "kind": ("a", "kind", ("a", "b")), "epochs": (1, 2, 3, {"base": 50, "large": 20}),
         "batch_size": (64, 96, 128, 4096), "blr": (1e-3, 3e-3, 2e-3, 1e-4)}


def parsed(flags, table=TABLE):
    with guarded() as patch:
        patch.setattr(sys, "argv", ["x.py", *shlex.split(flags)])
        return data.parse_args("about", table)


def test_recipe_columns():
    """--data selects the column, --model a cell of it, and a typed flag wins over both."""
    assert [parsed(f"--data {name}").batch_size for name in data.SIDES] == [64, 128, 128, 128, 4096]
    assert parsed("").data == "cifar10" and parsed("").batch_size == 128
    assert parsed("--model micro").batch_size == 96 and parsed("--recipe laptop").batch_size == 96
    assert parsed("--data shapes --model base").batch_size == 64
    assert parsed("--data some/photos").model == "base", "a folder is trained like ImageNet"
    assert parsed("--data=imagenet").epochs == 50 and parsed("--data imagenet --model large").epochs == 20
    assert parsed("--data imagenet --model small").epochs == 50, "without a cell of its own: the first one"
    assert parsed("--data imagenet --model large --epochs 7").epochs == 7
    args = parsed("--data shapes --mask_ratio 0.5 --kind b")
    assert (args.mask_ratio, args.kind, args.model) == (0.5, "b", "micro")
    assert args.output_dir == "out/x-shapes" and parsed("--data a/photos").output_dir == "out/x-photos"


def test_learning_rate():
    """lr = blr * batch_size / 256, unless --lr is typed; of the two the typed one wins over the recipe's."""
    assert parsed("--data imagenet").lr == pytest.approx(1e-4 * 16)
    assert parsed("--data imagenet --batch_size 512").lr == pytest.approx(2e-4)
    assert parsed("--lr 0.5").lr == 0.5 and parsed("--blr 0.5").lr == pytest.approx(0.25)
    fixed = TABLE | {"lr": 0.3, "blr": 0.0}
    assert parsed("", fixed).lr == 0.3 and parsed("--blr 0.5", fixed).lr == pytest.approx(0.25)


def test_a_row_must_say_what_its_flag_means():
    """A row of values alone for a flag that is not known is a programming error, as is a meaning alone."""
    for name, row in (("mask_rate", 0.5), ("teacher", "help")):
        with pytest.raises(KeyError, match=name):
            parsed("", TABLE | {name: row})


def scripts():
    """Every script of the repository."""
    return [path.stem for path in sorted(ROOT.glob("*.py")) if "parse_args(__doc__" in path.read_text()]


def recipes(script):
    """What a script gives parse_args: a list of tuples of tables, one for each of its modes or stages."""
    module = importlib.import_module(script)
    return {"data": [()], "vit": list(vit.RECIPES.values()), "beit_v2": [
        (beit_v2.SHARED, beit_v2.TOKENIZER), (beit_v2.SHARED, beit_v2.PRETRAIN)]}.get(script) or [
        (module.RECIPE,)]


def test_recipes_have_four_columns_of_the_flags_types():
    """Each row of each script's tables is one value or four, all of one type: that of the flag."""
    assert {"data", "mae", "vit", "beit_v2"} <= set(scripts()) and len(scripts()) == 8

    def kinds(row):
        cells = row[0] if isinstance(row[0], tuple) else (row[0],)
        assert len(cells) in (1, len(data.COLUMNS)), row
        return {type(v) for cell in cells for v in (cell.values() if isinstance(cell, dict) else [cell])}
    common = data.merge(*data.COMMON.values())
    for script in scripts():
        for tables in recipes(script):
            for name, row in data.merge(common, *tables).items():
                assert len(kinds(row)) == 1 and kinds(row) == kinds(common.get(name, row)), (script, name)
                assert isinstance(row[1], str) and len(row) <= 3, (script, name)


def test_help_shows_the_recipe(capsys):
    """mae.py --data imagenet --help shows the paper's batch of 4096 and 800 epochs."""
    with pytest.raises(SystemExit) as left:
        run("mae.py --data imagenet --help")
    text = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0
    for words in ("Masked Autoencoders", "passes over the training images; in [1, 1e9] (default: 800)",
                  "(default: 4096)", "size of the Vision Transformer (default: base)"):
        assert words in text, words


def until_setup(command, ranks="1"):
    """The flags with which a script's main() comes to data.setup, where it is stopped."""
    def setup(args):
        raise PowerCut(args)
    with guarded() as patch, pytest.raises(PowerCut) as reached:
        patch.setenv("WORLD_SIZE", ranks)
        patch.setattr(data, "setup", setup)
        patch.setattr(data, "choose_device", setup)             # of what makes no folder
        patch.setattr(vit, "export", lambda *names: setup(None))
        main_of(command, patch)
    return reached.value.args[0]


def test_resume_takes_the_flags_of_the_run():
    """--resume reads args.json, also the data set and the model; flags that are typed again win."""
    Path("run").mkdir()
    kept = parsed("--data imagenet --model large --mask_ratio 0.6 --lr 0.1 --output_dir run").flags
    Path("run/args.json").write_text(json.dumps({"flags": kept | {"gone": 1}}))
    args = parsed("--resume --output_dir run")
    assert (args.data, args.model, args.epochs) == ("imagenet", "large", 20)
    assert (args.mask_ratio, args.lr) == (0.6, 0.1)
    assert args.resume and not hasattr(args, "gone")
    args = parsed("--resume --output_dir run --mask_ratio 0.9 --blr 1e-3 --epochs 3")
    assert (args.mask_ratio, args.epochs) == (0.9, 3) and args.lr == pytest.approx(1e-3 * 16)
    assert parsed("--output_dir run").data == "cifar10", "only --resume reads it"


def test_a_learning_rate_of_0_is_computed():
    """--lr 0, as --help says, is that of --blr, as if it were not typed."""
    assert until_setup("mae.py --lr 0").lr == until_setup("mae.py").lr > 0


def test_a_resumed_judge_knows_its_mode(tmp_path, whole):
    """vit.py --resume needs neither --mode nor the mode's flags again."""
    args = until_setup(f"vit.py --resume --output_dir {whole['linear']}")
    assert (args.mode, args.blrs, args.batch_size) == ("linear", [1.0, 10.0], 20)
    assert not hasattr(args, "mixup")


def test_typed_flags_reach_a_resumed_optimizer():
    """--resume --weight_decay 0.3 trains with 0.3, though the optimiser in last.pt was made with another."""
    def decays():
        return sorted({group["weight_decay"] for group in read("run/last.pt")["optimizer"]["param_groups"]})
    run(f"{MAE} --max_steps 5 --output_dir run")
    assert decays() == [0, 0.05]
    run("mae.py --resume --weight_decay 0.3 --max_steps 10 --output_dir run")
    assert decays() == [0, 0.3]


# ---- files ----

def test_a_file_is_whole_at_any_moment(monkeypatch):
    """Killed before the rename, save_atomically leaves the old file; a full disk ends in a sentence."""
    path = Path("last.pt")
    data.save_atomically({"step": 1}, path)

    def raises(error):
        def fail(*args):
            raise error
        return fail
    for culprit, name in ((torch, "save"), (os, "fsync"), (Path, "replace")):
        with monkeypatch.context() as patch, pytest.raises(PowerCut):
            patch.setattr(culprit, name, raises(PowerCut()))
            data.save_atomically({"step": 2}, path)
        assert read(path) == {"step": 1}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(os, "fsync", raises(OSError(28, "No space left on device")))
        data.save_atomically({"step": 2}, path)
    assert read(path) == {"step": 1}
    data.save_atomically({"step": 2}, path)
    assert read(path) == {"step": 2} and set(os.listdir()) == {"last.pt", "out"}


def test_checkpoints_hold_plain_names(whole):
    """last.pt and encoder.pt load with weights_only=True; the encoder has timm's names, no wrapper's."""
    for name in SCRIPTS:
        states = read(whole[name] / "last.pt")
        assert states["step"] == STEPS
        assert not [key for key in states["model"] if "module." in key or "_orig_mod." in key]
    content = read(whole["mae"] / "encoder.pt")
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "norm.bias"} <= \
        content["model"].keys()
    assert not [key for key in content["model"] if "decoder" in key or "mask_token" in key]
    encoder = vit.ViT(**content["config"])
    encoder.load_state_dict(content["model"])
    assert (content["method"], content["data"]) == ("mae", "shapes") and len(content["mean"]) == 3


@pytest.mark.parametrize("name", METHODS)
def test_compiled_checkpoints_hold_plain_names(name, whole):
    """--compile captures the training step as one graph, once, and a frozen tokenizer or teacher as another,
    gives the losses of the plain run, and its files carry no _orig_mod. (aot_eager runs the graph:
    Inductor's C++ would take 20 s here.)
    """
    captured, compile_ = [], torch.compile

    def prepare(patch):
        shrink(patch)
        patch.setattr(torch, "compile", lambda f, **kwargs: compile_(f, backend=backend, **kwargs))

    def backend(graph, inputs):
        captured.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)
    run(f"{METHODS[name]} --max_steps 3 --compile --output_dir compiled", prepare)
    torch.compiler.reset()
    assert len(captured) == (2 if name in ("beit", "cae", "vqkd", "beit_v2") else 1)
    a, b = losses(whole[name]), losses("compiled")
    assert list(b) == [1, 2, 3] and all(abs(a[step] - b[step]) < 1e-4 for step in b)
    for file in ("last.pt", "tokenizer.pt" if name in ("dvae", "vqkd") else "encoder.pt"):
        assert read(f"compiled/{file}")["model"].keys() == read(whole[name] / file)["model"].keys()


def test_args_json_says_how_to_repeat_the_run(whole):
    """args.json holds all flags, the command, the commit, the versions and the hardware."""
    about = json.loads((whole["mae"] / "args.json").read_text())
    assert about["flags"]["decoder_dim"] == 16 and about["flags"]["weight_decay"] == 0.05
    assert about["command"].startswith("mae.py --data shapes") and about["torch"] == str(torch.__version__)
    assert {"commit", "python", "numpy", "hardware"} <= about.keys()


# ---- files of the scripts as they were before lists were typed with spaces ----

def make_old(folder, **flags):
    """Give the flags in args.json the values that they had then; --recipe was not one of them."""
    path = Path(folder, "args.json")
    about = json.loads(path.read_text())
    del about["flags"]["recipe"]
    path.write_text(json.dumps(about | {"flags": about["flags"] | flags}))


def test_an_old_run_resumes(tmp_path, whole):
    """Lists in its args.json are texts like "1,10": the resumed run ends as the uninterrupted one."""
    run(f"{LINEAR} --max_steps 15 --output_dir old")
    make_old("old", blrs="1,10")
    run("vit.py --resume --max_steps 0 --output_dir old")
    assert_same_run(tmp_path / "old", whole["linear"])
    assert json.loads(Path("old/args.json").read_text())["flags"]["blrs"] == [1.0, 10.0]


def test_an_old_run_of_ibot_is_refused(whole, capsys):
    """Its networks were called backbone: one sentence names the first tensor, and nothing is touched. Before,
    its scales were one number: a sentence says what they are now."""
    shutil.copytree(whole["ibot"], "old")
    make_old("old", pred_ratio="0,0.3", pred_ratio_var="0,0.2")
    states = read("old/last.pt")
    states["model"] = {name.replace(".encoder.", ".backbone."): v for name, v in states["model"].items()}
    torch.save(states, "old/last.pt")
    args, before = until_setup("ibot.py --resume --output_dir old"), snapshot("old")
    assert (args.pred_ratio, args.pred_ratio_var) == ([0.0, 0.3], [0.0, 0.2])
    said = sentence("ibot.py --resume --output_dir old", capsys)
    assert "old/last.pt belongs to another model: " in said and ".backbone." in said
    assert snapshot("old") == before
    about = json.loads(Path("old/args.json").read_text())
    about["flags"]["local_scale"] = 0.3
    Path("old/args.json").write_text(json.dumps(about))
    assert "--local_scale [0.3] must be two shares" in sentence("ibot.py --resume --output_dir old", capsys)


def test_old_encoders_and_tokenizers_load():
    """A tokenizer.pt had no mean and std, an encoder.pt has not changed: the scripts read them."""
    for path, method in (("out/dvae-shapes/tokenizer.pt", "dvae"),
                         ("out/beit_v2-tokenizer-shapes/tokenizer.pt", "beit_v2")):
        content = read(path)
        torch.save({"model": content["model"], "config": content["config"], "method": method,
                    "data": "shapes"}, path)
    for name, command in (("beit", BEIT), ("beit_v2", BEIT2),
                          ("linear", f"{LINEAR} --init out/mae-shapes/encoder.pt")):
        run(f"{command} --max_steps 1 --output_dir {name}")
        assert list(losses(name)) == [1]


# ---- log ----

def test_log_averages_and_draws(capsys):
    """A line holds the mean of what was noted since the last one and the newest of the plain numbers; without
    a terminal few are shown; curves.png is there in the end.
    """
    Path("run").mkdir()
    args = SimpleNamespace(output_dir="run", device="cpu", resume=False, log_every=2, epochs=2, batch_size=8,
                           eval_every=1, save_every=1, flags={"seed": -1})
    source = SimpleNamespace(labels=torch.arange(4))
    loader = SimpleNamespace(epoch_steps=5, total_steps=10, skipped=set(), source=source)
    with guarded():
        log = data.Log(args, loader)
        for step in range(10):
            log.note(loss=torch.tensor(float(step)))
            log.step(step, lr=step / 10)
            if log.evaluates(step + 1):
                log.write(step + 1, knn=50.0)
        log.finish()
    lines = [line for line in log_of("run") if "loss" in line]
    assert [(line["step"], line["loss"], line["lr"]) for line in lines] == \
        [(2, 0.5, 0.1), (4, 2.5, 0.3), (5, 4, 0.4), (6, 5, 0.5), (8, 6.5, 0.7), (10, 8.5, 0.9)]
    assert [line["epoch"] for line in lines] == [0.4, 0.8, 1, 1.2, 1.6, 2]
    assert [line["step"] for line in log_of("run") if "knn" in line] == [5, 10]
    assert Path("run/curves.png").stat().st_size > 5000
    out, err = capsys.readouterr()
    assert "\r" not in out + err and len(err.splitlines()) == 2, "one line in 30 seconds, and the last"
    assert "finished in 0:0" in out and "curves.png" in out


def test_images_per_second_do_not_count_evaluations():
    """The rate in the log is that of training: the time of an evaluation between two lines is left out."""
    Path("run").mkdir()
    args = SimpleNamespace(output_dir="run", device="cpu", resume=False, log_every=1, epochs=1,
                           batch_size=1000)
    loader = SimpleNamespace(epoch_steps=2, total_steps=2, skipped=set())
    with guarded():
        log = data.Log(args, loader)
        time.sleep(0.5)
        log.write(0, knn=10.0)
        log.note(loss=torch.tensor(1.0))
        log.step(0)
    assert [line["images/s"] for line in log_of("run") if "loss" in line][0] > 1000 / 0.4


# ---- all command lines ----

@pytest.mark.parametrize("flags, places", (
    ("--plain", ("learned", "none", 0.0)), ("--target pixels", ("none", "shared", 0.1)),
    ("--predict all --masking random --layer_scale 0", ("none", "shared", 0.0))))
def test_ablations_of_beit(flags, places):
    """Each runs with the positions it promises; --target pixels needs no tokenizer and has no accuracy."""
    if "pixels" in flags:
        Path("out/dvae-shapes/tokenizer.pt").unlink()
    run(f"{BEIT} --layer_scale 0.1 {flags} --max_steps 2 --output_dir run")
    config = read("run/encoder.pt")["config"]
    assert (config["pos"], config["rel_pos"], config["layer_scale"]) == places
    assert any("accuracy" in line for line in log_of("run")) == ("pixels" not in flags)


def test_every_script_end_to_end(tmp_path):
    """Every method, then vit.py in all five modes on MAE's encoder: results, accuracies and pictures (each
    kind of picture is drawn once, and the curves of one run: the rest are empty files).
    """
    drawn, save_rows, save_usage, curves = set(), data.save_rows, data.save_usage, data.curves
    save_plot = data.save_plot

    def once(path, draw, *kind):
        if kind in drawn:
            return path.touch()
        drawn.add(kind)
        draw()

    def prepare(patch):
        shrink(patch)
        patch.setattr(data, "save_rows", lambda path, *rest, **scale: once(
            path, lambda: save_rows(path, *rest, **scale), path.parents[1], path.stem.lstrip("012345")))
        patch.setattr(data, "save_usage", lambda path, *rest: once(
            path, lambda: save_usage(path, *rest), path.parents[1], path.stem))
        patch.setattr(data, "save_plot", lambda path, *rest, **settings: once(
            path, lambda: save_plot(path, *rest, **settings), path.stem))
        patch.setattr(data, "curves", lambda log: once(
            log.path.with_name("curves.png"), lambda: curves(log), "curves"))
    short = "--max_steps 2 --label_fraction 0.1"
    more = {"dvae": {"codebook.png", "spectrum.png"}, "ibot": {"vocabulary.png"},
            "vqkd": {"words.png", "usage.png"}}
    for name, command in METHODS.items():
        run(f"{command} --max_steps 2 --output_dir {name}", prepare)
        model = "tokenizer.pt" if name in ("dvae", "vqkd") else "encoder.pt"
        student = {"student.pt"} if name == "ibot" else set()
        assert set(os.listdir(name)) == FILES - {"encoder.pt"} | {model} | student
        assert set(os.listdir(f"{name}/pictures")) == {"000000.png", "000002.png"} | more.get(name, set())
    expected = {"train": {"accuracy", "val_loss"}, "finetune": {"accuracy", "val_loss"},
                "linear": {"cls", "cls_blr", "mean", "mean_blr", "all"},
                "attentive": {"attentive", "attentive_blr", "all"}, "knn": {"cls_k10", "mean_k10"}}
    for mode, entries in expected.items():
        init = "" if mode == "train" else "--init mae/encoder.pt"
        sgd = "--optimizer sgd" * (mode == "linear")            # the default is test_judge.py's
        run(f"vit.py {TINY} --mode {mode} {init} {short} {sgd} --batch_size 10 --output_dir {mode}",
            prepare if mode == "train" else shrink)
        result = json.loads(Path(mode, "result.json").read_text())
        assert entries <= result.keys(), result
        assert all(0 <= result[name] <= 100 for name in entries - {"all", "val_loss"})
        assert (result["mode"], result["label_fraction"], result["data"]) == (mode, 0.1, "shapes")
        assert result["init"] == ("random" if mode == "train" else "mae/encoder.pt")
    assert sorted(os.listdir("train/pictures")) == ["attention.png", "distance.png", "positions.png"]
    assert {command.split(".py")[0] for command in METHODS.values()} == set(scripts()) - {"data", "vit"}
    for name in ("beit", "beit_v2", "cae", "ibot"):
        for mode in ("finetune", "linear --optimizer sgd --layers all"):
            run(f"vit.py {TINY} --mode {mode} --init {name}/encoder.pt {short} --batch_size 10", shrink)
        assert json.loads(Path(name, "encoder-linear-shapes/result.json").read_text())["best"] >= 0
    run("data.py --data shapes --output_dir shown", prepare)
    assert os.listdir("shown/pictures") == ["views.png"]


@pytest.mark.parametrize("name", METHODS)
def test_init_starts_from_the_weights_of_a_file(name, whole):
    """--init with the last.pt (dVAE: tokenizer.pt) of a run: step 0 of the new run has that run's weights."""
    file = "tokenizer.pt" if name == "dvae" else "last.pt"
    still = "--momentum 1" if name == "ibot" else ""            # else the teacher follows in step 0
    run(f"{METHODS[name]} {still} --lr 1e-9 --epochs 60 --init {whole[name]}/{file} --max_steps 1 "
        "--output_dir new")
    old, new = (read(folder / file)["model"] for folder in (whole[name], Path("new")))
    assert all(torch.allclose(old[k], new[k], atol=1e-4) for k in old if not re.search("quantizer|centre", k))


def test_init_and_export_in_words(whole, capsys):
    """--export writes what it says; --init without its stage, with a wrong file, --export without a file."""
    run(f"vit.py --init {whole['mae']}/encoder.pt --export plain.pt")
    assert read("plain.pt").keys() == read(whole["mae"] / "encoder.pt")["model"].keys()
    assert "timm.models.VisionTransformer(img_size=8, patch_size=4" in capsys.readouterr().out
    assert "give --init FILE" in sentence("vit.py --export plain.pt", capsys)
    assert "--stage" in sentence(f"beit_v2.py {TINY} --init last.pt", capsys)
    wrong = f"{BEIT} --init {whole['mae']}/encoder.pt --output_dir new"
    assert "is no whole model of beit: give the last.pt of that run" in sentence(wrong, capsys)


def test_flags_in_last_pt_tell_another_model(whole, capsys):
    """--init and --resume compare them where no tensor tells the models apart, --resume those of the data and
    the batches, too; a tensor that does not fit is explained by them."""
    shutil.copytree(whole["mae"], "run")
    assert "--decoder_heads 2 there and 4 here" in sentence(
        f"{MAE} --decoder_heads 4 --init run/last.pt --output_dir new", capsys)
    for flag, old, new in (("decoder_heads", 2, 4), ("batch_size", 20, 40), ("holdout", 0, 8)):
        assert f"--{flag} {old} there and {new} here" in sentence(
            f"mae.py --resume --{flag} {new} --output_dir run", capsys)
    assert "--decoder_dim 16 there and 24 here" in sentence(
        f"{MAE} --decoder_dim 24 --init run/last.pt --output_dir new", capsys)
    codes = whole["vqkd"]
    for start in (f"--init {codes}/last.pt --output_dir new", f"--resume --output_dir {codes}"):
        assert "--unit True there and False here" in sentence(f"{VQKD} --no-unit {start}", capsys)


@pytest.mark.parametrize("name, offset", (("mae", 0.0), ("ibot", 0.1), ("beit", 0.0)))
def test_an_export_is_judged_as_its_encoder(name, offset, whole):
    """--export keeps what judging needs: how positions grow, the pixels' mean and std, all arguments; so its
    k-NN says the same, at another size of images, too."""
    source, results = whole[name] / "encoder.pt", []
    run(f"vit.py --init {source} --export plain.pt")
    content, (_, config, mean, std) = read(source), vit.read_encoder("plain.pt")
    assert config == content["config"] and config.get("pos_offset", 0.0) == offset
    assert (mean, std) == (content["mean"], content["std"]) and mean != data.STATS["imagenet"][0]
    for path in (source, "plain.pt"):
        folder = f"knn-{len(results)}"
        run(f"vit.py {TINY} --mode knn --img_size 16 --init {path} --output_dir {folder}")
        results.append(json.loads(Path(folder, "result.json").read_text()) | {"init": ""})
    assert results[0] == results[1]


def test_an_exported_classifier_keeps_its_classes(whole, capsys):
    """Not in the order of the alphabet: eval says the same; and the data set. Not under torchrun."""
    classifier = read(whole["train"] / "encoder.pt")
    run(f"vit.py --init {whole['train']}/encoder.pt --export plain.pt")
    for i, (img, label) in enumerate(zip(*data.draw_shapes(60, 8, 3))):
        path = Path("set", list(data.SHAPES)[label], f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(img.permute(1, 2, 0).numpy()).save(path)
    results = []
    for file in (whole["train"] / "encoder.pt", "plain.pt"):
        run(f"vit.py --device cpu --num_workers 0 --mode eval --init {file} --data set "
            f"--output_dir {len(results)}")
        results.append(json.loads(Path(str(len(results)), "result.json").read_text()) | {"init": ""})
    assert results[0] == results[1] and list(classifier["classes"]) == list(data.SHAPES)
    assert vit.of_file("plain.pt", vit.unwrapped(data.load_file("plain.pt")))["data"] == "shapes"
    for words in ("--export again.pt", "--mode predict --images set"):
        assert "for one process" in sentence(f"vit.py --init plain.pt {words}", capsys,
                                             prepare=lambda patch: patch.setenv("WORLD_SIZE", "2"))


@pytest.mark.parametrize("name, kind", (("beit", "BEiT"), ("cae", "CAE"), ("beit_v2", "BEiTv2")))
def test_masks_and_weight_decay_of_the_flags_reach_the_model(name, kind, monkeypatch):
    """In every step num_masked patches of each image are hidden, and the matrices decay."""
    module, hidden, groups = importlib.import_module(name), [], []
    forward, param_groups = getattr(module, kind).forward, module.param_groups

    def watched(model, imgs, target, mask):
        hidden.append(mask.sum(1))
        return forward(model, imgs, target, mask)

    def kept(*args, **options):
        groups.extend(param_groups(*args, **options))
        return groups
    monkeypatch.setattr(getattr(module, kind), "forward", watched)
    monkeypatch.setattr(module, "param_groups", kept)
    run(f"{METHODS[name]} --num_masked 1 --weight_decay 0.3 --max_steps 2 --output_dir new")
    assert len(hidden) == 2 and (torch.cat(hidden) == 1).all()
    assert {group["weight_decay"] for group in groups if group["params"][0].ndim > 1} >= {0.3}


@pytest.mark.parametrize("command, file, rows", (
    (f"{BEIT} --tokenizer", "beit_v2-tokenizer", {"predicted, painted"}),
    (f"{CAE} --tokenizer", "beit_v2-tokenizer", {"predicted, painted"}),
    (f"{BEIT2} --tokenizer", "dvae", {"predicted and\ntrue code"})))
def test_codes_of_either_tokenizer(command, file, rows):
    """The student of one paper learns the codes of the other, and its pictures are drawn: of codes that are
    none of pixels in black and white."""
    drawn = []

    def prepare(patch):
        shrink(patch)
        patch.setattr(data, "save_rows", lambda path, found, title, **scale: drawn.append(found))
    run(f"{command} out/{file}-shapes/tokenizer.pt --max_steps 2 --output_dir run", prepare)
    assert list(losses("run")) == [1, 2] and len(drawn) == 2
    for found in drawn:
        assert rows <= found.keys()
        assert len({len(row) for row in found.values()}) == 1
        for name in rows:                                       # nan: visible, so not judged
            assert 0 <= found[name].nan_to_num(1).min() and found[name].nan_to_num(1).max() <= 1
        assert "true codes, painted" not in found


# ---- the codes of beit_v2.py ----

def code_events(command):
    """What happens to the codes in a run, in order: method, its vectors, codes before and after, numbers."""
    events = []

    def watch(name, method):
        def watched(quantizer, *inputs):
            before = quantizer.codebook.clone()
            result = method(quantizer, *inputs)
            events.append(SimpleNamespace(name=name, z=inputs[0].detach(), before=before,
                                          after=quantizer.codebook.clone(),
                                          ids=result[1] if name == "forward" else None))
            return result
        return watched

    def prepare(patch):
        shrink(patch)
        for name in ("start", "forward", "update", "restart"):
            patch.setattr(beit_v2.Quantizer, name, watch(name, getattr(beit_v2.Quantizer, name)))
    run(command, prepare)
    return events


@pytest.mark.parametrize("parts", (1, 2))
def test_kmeans_starts_the_codes_once(parts):
    """In the first step of a new run, on the vectors of its first batch: not on --resume, not with --init."""
    steps = parts * ["forward"] + ["update"]
    flags = f"--restart 0 --accum_steps {parts} --max_steps"
    new = code_events(f"{VQKD} {flags} 3 --output_dir new")
    assert [event.name for event in new] == ["start"] + 3 * steps
    assert not torch.equal(new[0].before, new[0].after) and torch.equal(new[1].before, new[0].after)
    assert parts > 1 or torch.allclose(new[0].z, new[1].z, atol=1e-6)
    more = code_events("beit_v2.py --resume --max_steps 5 --output_dir new")
    assert [event.name for event in more] == 2 * steps and torch.equal(more[0].before, new[-1].after)
    other = code_events(f"{VQKD} {flags} 2 --init new/last.pt --output_dir other")
    assert [event.name for event in other] == 2 * steps and torch.equal(other[0].before, more[-1].after)


@pytest.mark.parametrize("flags", ("--codes gradient", "--no-unit", "--codes gradient --no-unit"))
def test_ablations_of_the_codes_resume(flags):
    """Interrupted and resumed they are the uninterrupted run; codes have length 1 or any; with a gradient the
    optimiser has them, else they are in no group of it."""
    command = f"{VQKD} {flags} --epochs 2 --num_codes 64"
    assert_resumes(command, signal.SIGTERM, 7)
    content = read("whole/tokenizer.pt")
    lengths = content["model"]["quantizer.codebook"].norm(dim=1)
    unit = torch.allclose(lengths, torch.ones(64), atol=1e-5)
    assert unit == content["config"]["unit"] == ("--no-unit" not in flags)
    shapes = [state["exp_avg"].shape for state in read("whole/last.pt")["optimizer"]["state"].values()]
    assert (torch.Size([64, 4]) in shapes) == ("gradient" in flags)
    line = [line for line in log_of("whole") if "usage" in line][-1]
    assert 0 < line["usage"] <= 1 and 0 <= line["knn_words"] <= 100 and "rank" not in line


@pytest.mark.parametrize("every, restarts", ((4, [4, 8, 12, 16]), (17, []), (0, [])))
def test_unused_codes_restart_in_the_first_80_percent(every, restarts):
    """After every --restart steps the codes that no vector chose since the last time move to vectors of the
    batch, and no other code moves; 16 of 20 steps are 80%.
    """
    done, used, z, found = 0, set(), None, []
    for event in code_events(f"{VQKD} --num_codes 256 --restart {every} --epochs 2 --output_dir new"):
        if event.name == "forward":
            used, z = used | set(event.ids.tolist()), event.z
        elif event.name == "update":
            done += 1
        elif event.name == "restart":
            found.append(done)
            kept = torch.tensor([k in used for k in range(256)])
            assert 0 < kept.sum() < 256 and torch.equal(event.after[kept], event.before[kept])
            fresh = event.after[~kept]
            assert not (fresh == event.before[~kept]).all(1).any()
            assert (fresh @ torch.nn.functional.normalize(z, dim=1).T).amax(1).min() > 1 - 1e-5
            used = set()
    assert done == 20 and found == restarts


def test_a_norm_and_head_for_the_branch_alone():
    """--no-shared_head makes and trains them; with a shared head there are none."""
    for flag in ("--shared_head", "--no-shared_head"):
        run(f"{BEIT2} {flag} --max_steps 2 --output_dir run{flag}")
        model = read(f"run{flag}/last.pt")["model"]
        own = {name for name in model if name.startswith(("cls_pt_norm", "cls_pt_lm_head"))}
        assert len(own) == (0 if flag == "--shared_head" else 4)
        for name in own:
            start = 1 if name == "cls_pt_norm.weight" else 0
            assert (model[name] != start).any(), f"{name} is not trained"


# ---- all command lines in the documents ----

def commands(text, fenced):
    """Command lines of fenced blocks or of a docstring: no comments, continued lines joined."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) if fenced else [text]
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if ".py" not in line or not (fenced or re.match(r" {4}(python|torchrun) ", line)):
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"\w+=\S*", words[0]):
            words = words[1:]                                   # environment variables
        if any(word.endswith(".py") for word in words):
            yield words


def check_command(words):
    """The script of a command line takes its flags: its main() comes as far as data.setup."""
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = ROOT / words[place]
    assert script.exists(), f"there is no {words[place]}: {' '.join(words)}"
    assert words[0] in ("python", "python3", "torchrun", "pytest") or words[0].endswith("/python"), words
    if script.parent != ROOT or "pytest" in words:
        return
    ranks = [word.split("=")[1] for word in words[:place] if word.startswith("--nproc_per_node=")] or ["1"]
    until_setup(shlex.join(words[place:]), ranks[0])


@pytest.mark.parametrize("command", (BEIT, CAE, VQKD, BEIT2))
def test_data_are_looked_for_before_tokenizer_and_teacher(command, capsys):
    """--data that is not there is blamed, not what it would have been tokenized with."""
    assert "there is no folder nowhere" in sentence(f"{command} --data nowhere --output_dir new", capsys)


def test_commands_in_docstrings_parse():
    """Every command line in a script's docstring is one that the script takes."""
    docs = [importlib.import_module(name).__doc__ for name in scripts()]
    found = [words for doc in docs for words in commands(doc, fenced=False)]
    assert len(found) >= 8
    for words in found:
        check_command(words)


def test_commands_in_the_readme_parse():
    """Every command line in README.md is one that its script takes."""
    if not (ROOT / "README.md").exists():
        pytest.skip("README.md is not written yet")
    found = list(commands((ROOT / "README.md").read_text(), fenced=True))
    assert len(found) >= 3
    for words in found:
        check_command(words)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(int(sys.argv[2]))
    else:  # of torchrun: in its first start, rank 1 may fall
        start = [os.environ.get(name) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT")]
        falls = "KILL_AT" in os.environ and start == ["1", "0"]
        child(sys.argv[1:], (signal.SIGKILL, int(os.environ["KILL_AT"]), 0) if falls else ())
