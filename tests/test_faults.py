"""What the machine does to a run: each fault ends in one sentence, and what was saved stays."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from test_runs import (  # noqa: F401: inputs and elsewhere are fixtures
    BEIT, BEIT2, IBOT, LBFGS, LINEAR, MAE, ROOT, VQKD, data, elsewhere, forked, inputs, read, run, sentence,
    shrink, snapshot)

FAULTS = (  # as torch and the system say it -> what to do
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"), "--accum_steps"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
     "--accum_steps"),
    (MemoryError("Unable to allocate 5.00 GiB for an array"), "--accum_steps"),
    (RuntimeError("Storage size calculation overflowed with sizes=[99999999999, 99999]"), "--accum_steps"),
    (OSError(24, "Too many open files"), "ulimit -n"),
    (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "--num_workers"),
    (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "--num_workers"),
    (RuntimeError("unable to write to file </torch_1>: shared memory is full"), "--ipc=host"),
    (RuntimeError("Failed\nInvalidCxxCompiler: No working C++ compiler found in torch._inductor"), "gcc"),
    (RuntimeError("Cannot find a working triton installation"), "--no-compile"),
    (RuntimeError("[../third_party/gloo] Connection closed by peer [127.0.0.1]:4242"), "another rank"),
    (RuntimeError("NCCL communicator was aborted on rank 1"), "another rank"),
    (FileNotFoundError(2, "No such file or directory", "data"), "check the path"),
    (PermissionError(13, "Permission denied", "out"), "permissions"),
)


@pytest.mark.parametrize("fault, remedy", FAULTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_fault_ends_in_one_sentence_with_its_remedy(fault, remedy, capsys):
    """Status 2; the line of the message that tells, and what to do."""
    def main():
        raise fault
    with pytest.raises(SystemExit) as left:
        data.run(main)
    said = capsys.readouterr().err.strip()
    assert left.value.code == 2 and remedy in said and "\n" not in said
    assert str(fault).splitlines()[-1][:40] in said


def test_a_mistake_of_the_program_keeps_its_traceback(capsys):
    """Only what the user or the machine can mend is told in a sentence."""
    for mistake in (AssertionError("(2, 3) in 4 px patches"), KeyError("encoder"), ValueError("of 3")):
        def main():
            raise mistake
        with pytest.raises(type(mistake)):
            data.run(main)
    assert not capsys.readouterr().err


def test_ctrl_c_before_the_first_step(capsys):
    """While data are read, a model is built, or a duration estimated: a sentence, status 130, no folder."""
    def prepare(patch):
        shrink(patch)

        def interrupted(args):
            raise KeyboardInterrupt
        patch.setattr(data, "load_sets", interrupted)
    assert "before the first step" in sentence(f"{MAE} --output_dir new", capsys, 130, prepare)
    assert not Path("new").exists()


# ---- folders ----

def test_a_failed_command_leaves_no_folder(capsys):
    """Not even those above it that it made; a folder that holds anything else stays."""
    sentence(f"{MAE} --batch_size 220 --accum_steps 220 --output_dir a/b/c", capsys)
    assert not Path("a").exists()
    Path("kept/notes").mkdir(parents=True)
    sentence(f"{MAE} --batch_size 220 --accum_steps 220 --output_dir kept", capsys)
    assert Path("kept/notes").exists()


def test_of_two_runs_started_together_one_is_refused(capsys):
    """Both have looked and found the folder free; only one can make it."""
    def prepare(patch):
        shrink(patch)
        exists = Path.exists
        patch.setattr(Path, "exists", lambda path: path.name != "pictures" and exists(path))
    Path("run/pictures").mkdir(parents=True)
    assert "run (File exists)" in sentence(f"{MAE} --output_dir run", capsys, prepare=prepare)
    assert list(Path("run").rglob("*")) == [Path("run/pictures")]


def test_a_killed_start_is_refused_and_resumed(capsys):
    """Killed before its first line, a run has claimed its folder: --resume begins anew there."""
    Path("run/pictures").mkdir(parents=True)
    assert "run (File exists)" in sentence(f"{MAE} --output_dir run", capsys)
    run(f"{MAE} --max_steps 2 --resume --output_dir run")
    assert read("run/last.pt")["step"] == 2


def test_a_start_that_fails_leaves_the_folders_that_were_there(capsys):
    """Empty ones of the user, too; what was made for the run is gone."""
    Path("mine/empty").mkdir(parents=True)
    sentence(f"{MAE} --data nowhere --output_dir mine/empty/new/run", capsys)
    assert list(Path("mine").rglob("*")) == [Path("mine/empty")]
    sentence(f"{MAE} --data nowhere --output_dir mine/empty", capsys)
    assert list(Path("mine").rglob("*")) == [Path("mine/empty")]


def test_more_steps_are_done_than_asked_for(capsys):
    run(f"{MAE} --max_steps 4 --output_dir run")
    before = snapshot("run")
    said = sentence("mae.py --resume --max_steps 3 --output_dir run", capsys)
    assert "4 steps are done already: name a larger --max_steps" in said and snapshot("run") == before


def test_a_lost_checkpoint_of_a_run_without_evaluations(capsys):
    """Its encoder is not written over by a run that begins anew."""
    run(f"{MAE} --max_steps 4 --eval_every 0 --output_dir run")
    Path("run/last.pt").rename("run/curves.png")                # not drawn in tests
    before = snapshot("run")
    assert "run/last.pt is gone" in sentence("mae.py --resume --output_dir run", capsys)
    assert snapshot("run") == before


def test_the_last_of_another_method(capsys):
    """last.pt knows whose it is: --init and --resume say so before they compare flags and tensors."""
    run(f"{MAE} --max_steps 2 --output_dir run")
    for command in (f"{BEIT2} --init run/last.pt --output_dir new", f"{BEIT2} --resume --output_dir run"):
        assert "run/last.pt is of a run of mae, not of beit_v2" in sentence(command, capsys)


def test_resume_takes_no_other_judgement_for_this_one(capsys):
    """A folder with a result of another mode, file or share of labels is not written over."""
    run(f"{MAE} --max_steps 2 --output_dir run")
    run("vit.py --mode knn --init run/encoder.pt --output_dir judged")
    before = snapshot("judged")
    for flags in ("--mode linear --init run/encoder.pt", "--mode knn --init run/last.pt",
                  "--mode knn --init run/encoder.pt --label_fraction 0.5"):
        said = sentence(f"vit.py {flags} --resume --output_dir judged", capsys)
        assert "judged/args.json is of another run: --" in said or "last.pt is no encoder" in said
    assert snapshot("judged") == before


def test_output_dir_of_both_stages(capsys):
    """beit_v2.py --output_dir X: the tokenizer goes to X-tokenizer, where pre-training finds it; once more
    only with --resume, for a trial's flags would stay in force."""
    flags = " ".join(f"{VQKD} {BEIT2} --max_steps 3".split()).replace("beit_v2.py", "")
    both = "beit_v2.py " + re.sub(r"--stage \w+|--epochs 6", "", flags) + " --output_dir x"
    run(both)
    assert read("x-tokenizer/tokenizer.pt")["method"] == "beit_v2" and read("x/last.pt")["step"] == 3
    before = snapshot("x-tokenizer")
    assert "x-tokenizer already holds a run: continue it with --resume" in sentence(both, capsys)
    run("beit_v2.py --resume --output_dir x")
    assert snapshot("x-tokenizer")[Path("x-tokenizer/last.pt")] == before[Path("x-tokenizer/last.pt")]


@pytest.mark.parametrize("name", ("log.jsonl", "encoder.pt", "last.pt", "000000.png", "args.json"))
def test_a_full_disk(name, capsys):
    """While any file is written: a sentence, no .tmp, and the files of before are as they were."""
    def prepare(patch):
        shrink(patch)
        fsync = os.fsync

        def full(file):
            if name in os.readlink(f"/proc/self/fd/{file}"):
                raise OSError(28, "No space left on device")
            fsync(file)
        patch.setattr(os, "fsync", full)
        patch.setattr(data, "save_rows", lambda path, *rest, **scale: data.save_atomically(
            "picture", path))
    run(f"{MAE} --max_steps 10 --output_dir run")
    before = snapshot("run")
    with open("run/log.jsonl", "a") as file:
        file.write('{"half a li')                               # so that the log has to be shortened
    said = sentence("mae.py --resume --max_steps 20 --eval_every 1 --output_dir run"
                    if name != "000000.png" else f"{MAE} --output_dir new", capsys, prepare=prepare)
    assert name in said and "No space left on device" in said and "--output_dir" in said
    assert not list(Path().rglob("*.tmp"))
    assert {Path("run/last.pt"), Path("run/encoder.pt")} <= before.keys()
    if name in ("last.pt", "encoder.pt", "log.jsonl"):
        half = b'{"half a li' * (name == "log.jsonl")
        assert Path("run", name).read_bytes() == before[Path("run", name)] + half


def test_torch_save_on_a_full_disk(monkeypatch, capsys):
    """torch.save hides the system's error behind one of its own."""
    class Full:
        def __init__(self, path, mode):
            self.file = open(path, mode)

        def write(self, content):
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()
    monkeypatch.setattr(data, "open", Full, raising=False)
    with pytest.raises(SystemExit):
        data.save_atomically({"weight": torch.zeros(1000)}, Path("last.pt"))
    assert "(No space left on device)" in capsys.readouterr().err and os.listdir() == ["out"]


def test_the_run_folder_is_deleted_meanwhile(capsys):
    """One sentence, not a traceback."""
    def prepare(patch):
        shrink(patch)
        step = data.Log.step

        def remove(log, n, **values):
            if n == 5:
                shutil.rmtree("run")
            step(log, n, **values)
        patch.setattr(data.Log, "step", remove)
    assert "cannot write to run/log.jsonl" in sentence(f"{MAE} --output_dir run", capsys, prepare=prepare)


# ---- the ends of pipes, and signals ----

def script(words, **options):
    """A script as a user starts it, in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    name, *words = words.split()
    return subprocess.Popen([sys.executable, str(ROOT / name), *words], env=env, text=True, **options,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def test_nobody_reads_the_output_any_more():
    """`python mae.py | head -1`: the run goes on to its end without a word of complaint."""
    process = script(f"{MAE} --max_steps 60 --eval_every 0 --output_dir run")
    assert process.stdout.readline().startswith("mae: recipe")
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 0 and "BrokenPipe" not in said and "Traceback" not in said
    assert read("run/last.pt")["step"] == 60 and Path("run/curves.png").exists()


def test_sigterm_to_a_run_and_its_workers():
    """A scheduler's signal reaches the whole group: workers ignore it, the run saves, and none is left."""
    for i, (img, label) in enumerate(zip(*data.draw_shapes(60, 8, 0))):
        path = Path("set", "val" if i >= 40 else "train", str(label.item()), f"{i}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(img.permute(1, 2, 0).numpy()).save(path)
    flags = MAE.replace("--data shapes", "--data set --num_workers 2 --eval_every 0")
    process = script(f"{flags} --epochs 1000 --output_dir run")
    while not Path("run/last.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped and saved: --resume continues run" in out and "Traceback" not in said
    left = [path for path in Path("/proc").glob("[0-9]*/stat")
            if path.read_text().rpartition(")")[2].split()[3] == str(process.pid)]      # its session
    assert not left, "a worker outlives its run"


def test_ranks_agree_on_a_signal(tmp_path):
    """Between two lines of the log: all save after the same step."""
    statuses, done = forked((f"{MAE} --log_every 1000 --output_dir {tmp_path}/two",
                             (signal.SIGTERM, 17, 0)), ranks=2)
    assert statuses == 2 * [128 + signal.SIGTERM], done.stderr
    assert 17 <= read("two/last.pt")["step"] < 60 and "stopped and saved" in done.stdout


# ---- what somebody found who had not read the code ----

def folder_of(images, root="set"):
    """A folder of class folders with `images` drawn pictures in train/, a third as many in val/."""
    for i, (img, label) in enumerate(zip(*data.draw_shapes(4 * images // 3, 8, 0))):
        path = Path(root, "train" if i < images else "val", str(label.item() % 2), f"{i:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(img.permute(1, 2, 0).numpy()).save(path)


SET = MAE.replace("--data shapes", "--data set --num_workers 0") + " --holdout 0 --eval_every 0"


def test_links_to_a_folder_above():
    """They are not followed: each picture is counted once, under its own class. Other links are."""
    folder_of(60)
    before = data.scan_folder(Path("set/train"))
    Path("set/train/0/loop").symlink_to("..")
    Path("set/train/0/self").symlink_to(".")
    assert data.scan_folder(Path("set/train"))[0] == before[0]
    Path("elsewhere").mkdir()
    shutil.copy(before[0][0], "elsewhere/more.png")
    Path("set/train/1/linked").symlink_to("../../../elsewhere")
    assert len(data.scan_folder(Path("set/train"))[0]) == 61 and data.side_of("set") == 8


@pytest.mark.parametrize("change", ("swap", "rename", "move", "validation"))
def test_a_resumed_run_has_the_same_images(change, capsys):
    """As many images, but other names, classes or labels: refused. The same elsewhere on the disk: not."""
    folder_of(60)
    run(f"{SET} --max_steps 2 --output_dir run")
    file = sorted(Path("set/train/0").iterdir())[0]
    if change == "swap":
        for part in ("train", "val"):
            Path("set", part, "0").rename(f"set/{part}/2")
    elif change == "rename":
        file.rename(file.with_name("zzz.png"))
    elif change == "move":
        file.rename(Path("set/train/1", file.name))
    else:
        sorted(Path("set/val/0").iterdir())[0].unlink()
    assert "training images 60 (names and labels " in sentence(
        "mae.py --resume --max_steps 4 --output_dir run", capsys)


@pytest.mark.parametrize("command, file", (
    (BEIT, "dvae-shapes/tokenizer.pt"), (BEIT2, "beit_v2-tokenizer-shapes/tokenizer.pt"),
    (VQKD, "mae-shapes/encoder.pt"), (f"{LINEAR} --init out/mae-shapes/encoder.pt", "mae-shapes/encoder.pt")))
def test_a_frozen_network_that_was_trained_anew(command, file, capsys):
    """Under the name of the one that the run began with: said. The same one: not."""
    run(f"{command} --max_steps 2 --output_dir run")
    script = command.split()[0]
    run(f"{script} --resume --max_steps 3 --output_dir run")
    network = read(Path("out", file))
    next(iter(network["model"].values())).add_(0.01)
    torch.save(network, Path("out", file))
    assert "trained anew" not in capsys.readouterr().out
    run(f"{script} --resume --max_steps 4 --output_dir run")
    assert "was trained anew since" in capsys.readouterr().out


def test_an_older_checkpoint_knows_the_number_of_images_alone(capsys):
    """It resumes if that is right."""
    run(f"{MAE} --max_steps 2 --output_dir run")
    last = read("run/last.pt")
    for images in (208, 300):
        torch.save(last | {"flags": last["flags"] | {"images": images}}, "run/last.pt")
        if images == 208:
            run("mae.py --resume --max_steps 3 --output_dir run")
        else:
            assert "training images 300 there" in sentence("mae.py --resume --output_dir run", capsys)


@pytest.mark.parametrize("flags", ("--seed 1", "--mask_ratio 0.5", "--lr 0.1"))
def test_the_checkpoint_of_another_run(flags, capsys):
    """Of the same shapes, but other flags: refused. The same flags typed at --resume: said."""
    run(f"{MAE} --max_steps 2 --output_dir run")
    run(f"{MAE} --max_steps 2 {flags} --output_dir other")
    shutil.copytree("run", "swapped")
    shutil.copy("other/last.pt", "swapped/last.pt")
    name, value = flags.split()
    assert f"{name} {value} there and" in sentence("mae.py --resume --output_dir swapped", capsys)
    run(f"mae.py --resume --max_steps 4 {flags} --output_dir run")
    out = capsys.readouterr().out
    assert "goes on with other flags" in out and f" there and {value} here" in out


def test_a_kill_before_the_first_checkpoint_of_other_flags():
    """args.json says what last.pt holds: a run that was to go on longer, and was lost, resumes as it was."""
    run(f"{MAE} --max_steps 2 --output_dir run")
    with pytest.raises(KeyboardInterrupt):
        def die(patch):
            shrink(patch)
            patch.setattr(data.Log, "step", lambda *rest, **values: (_ for _ in ()).throw(KeyboardInterrupt))
            patch.setattr(data, "run", lambda main: main())
        run("mae.py --resume --max_steps 9 --seed 4 --output_dir run", die)
    assert json.loads(Path("run/args.json").read_text())["flags"]["max_steps"] == 2
    run("mae.py --resume --output_dir run")
    run("mae.py --resume --max_steps 4 --output_dir run")
    assert json.loads(Path("run/args.json").read_text())["flags"]["max_steps"] == 4


def test_weight_decay_that_begins_at_0_rises():
    """iBOT's --weight_decay_end counts then, too; biases and norms stay without."""
    run(f"{IBOT} --weight_decay 0 --weight_decay_end 0.4 --max_steps 20 --output_dir run")
    rising, never = (group["weight_decay"] for group in read("run/last.pt")["optimizer"]["param_groups"])
    assert 0.05 < rising < 0.2 and never == 0


def test_a_slash_behind_the_folder(capsys):
    """--data set and --data set/ are one set."""
    folder_of(60)
    run(f"{SET} --max_steps 2 --output_dir run")
    run("mae.py --resume --data set/ --max_steps 3 --output_dir run")
    assert "resuming" in capsys.readouterr().out


@pytest.mark.parametrize("words, told", (
    ("beit.py --data shapes --img_size 8 --patch_size 4 --num_masked 3 --min_block 3", "no block of"),
    (f"{BEIT} --tokenizer run/last.pt", "no tokenizer: give the tokenizer.pt"),
    (f"{LBFGS} --output_dir o/lr", "")))
def test_what_was_said_wrong(words, told, capsys):
    """Blocks that fit nowhere, a last.pt in place of a tokenizer.pt; a folder that is called like a flag."""
    run(f"{MAE} --max_steps 1 --output_dir run")
    if told:
        assert told in sentence(words, capsys)
    else:
        run(words)


def test_a_checkpoint_that_is_gone(capsys):
    """After an evaluation there was one: the encoder and the log of a whole run are not overwritten."""
    run(f"{MAE} --max_steps 10 --output_dir run")
    Path("run/last.pt").unlink()
    before = snapshot("run")
    assert "run/last.pt is gone" in sentence("mae.py --resume --output_dir run", capsys)
    Path("run/args.json").unlink()
    Path("run/last.pt").write_bytes(b"")
    said = sentence("mae.py --resume --output_dir run", capsys)
    assert "run/args.json, the flags of this run, is gone" in said
    assert {path: content for path, content in before.items() if path.name != "args.json"} == {
        path: content for path, content in snapshot("run").items() if path.name != "last.pt"}
    Path("run/last.pt").unlink()
    Path("run/last.pt").symlink_to("nowhere")
    assert "is gone" in sentence(f"{MAE} --resume --output_dir run", capsys)


def test_a_run_that_is_at_work(capsys):
    """--resume in the folder of a living run: refused."""
    process = script(f"{MAE} --epochs 1000 --eval_every 0 --output_dir run")
    try:
        while not Path("run/last.pt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        assert "a run is at work in run" in sentence("mae.py --resume --output_dir run", capsys)
    finally:
        process.kill()
        process.communicate()
    data.lock(Path("run"))                                      # its lock died with it


@pytest.mark.parametrize("flags", (
    {"batch_size": 0}, {"accum_steps": 0}, {"log_every": 0}, {"save_every": "x"}, {"device": "foo"},
    {"model": "foo"}, {"model": 3}, {"aug": "foo"}, {"recipe": "foo"}, {"sampling": "foo"}, {"amp": "foo"},
    {"compile": 3},
    {"mask_ratio": float("nan")}, {"lr": [1]}, {"data": None}), ids=str)
def test_damaged_flags_in_args_json(flags, capsys):
    """They are read as those of the command line are: a choice or a range that is not kept is refused."""
    run(f"{MAE} --max_steps 2 --output_dir run")
    path = Path("run/args.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {
        "flags": json.loads(path.read_text())["flags"] | flags}))
    assert "run/args.json" in sentence("mae.py --resume --output_dir run", capsys)


def test_a_lost_log_is_said(capsys):
    """The curves of a resumed run would lack its first steps without a word."""
    run(f"{MAE} --max_steps 10 --output_dir run")
    Path("run/log.jsonl").unlink()
    run("mae.py --resume --max_steps 12 --output_dir run")
    assert "run/log.jsonl lacks steps before 10" in capsys.readouterr().out


def test_tensors_of_another_kind(capsys):
    """Booleans and integers are no weights; an optimizer has a state; bytes belong to one tensor."""
    run(f"{MAE} --max_steps 10 --output_dir run")
    whole = read("run/encoder.pt")
    for kind in (torch.bool, torch.int64, torch.uint8):
        weights = {name: value.to(kind) for name, value in whole["model"].items()}
        torch.save(whole | {"model": weights}, "other.pt")
        assert f"{kind} there" in sentence(f"{LINEAR} --init other.pt --output_dir new", capsys)
    last = read("run/last.pt")
    torch.save(last | {"optimizer": last["optimizer"] | {"state": {}}}, "run/last.pt")
    assert "optimizer is empty after 10 steps" in sentence("mae.py --resume --output_dir run", capsys)
    about = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps(dict.fromkeys("ab", about)).encode()
    Path("twins.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    said = sentence(f"{LINEAR} --init twins.safetensors --output_dir new", capsys)
    assert "b begins at byte 0, not 8" in said


def test_pipes_and_devices_are_no_files(capsys):
    """They have no end, or never begin."""
    os.mkfifo("pipe.pt")
    for name in ("pipe.pt", "/dev/zero", "."):
        assert name in sentence(f"{LINEAR} --init {name} --output_dir new", capsys)
    folder_of(60)
    os.mkfifo("set/train/0/pipe.png")
    run(f"{SET} --max_steps 5 --output_dir run")
    assert "set/train/0/pipe.png (it is a pipe or a device)" in capsys.readouterr().err


@pytest.mark.parametrize("closed", ("2>&- >&-", "2>/dev/full >/dev/full"))
def test_closed_and_full_outputs(closed):
    """Whoever does not want to read the words wants the weights."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    command = f"{sys.executable} {ROOT}/{MAE} --max_steps 2 --eval_every 0 --output_dir ü {closed}"
    done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read("ü/last.pt")["step"] == 2


def test_flags_of_the_second_stage_are_looked_at_first(capsys):
    """Not after the tokenizer has been trained."""
    assert "--early_layer 7" in sentence("beit_v2.py --data shapes --device cpu --model micro --num_masked 2 "
                                         "--min_block 1 --early_layer 7 --output_dir x", capsys)
    assert not Path("x-tokenizer").exists()


def test_flags_that_the_file_decides(capsys):
    """--patch_size and others beside --init: said, not silently left out."""
    run(f"{MAE} --max_steps 2 --output_dir run")
    run(f"{LINEAR} --patch_size 2 --max_steps 2 --init run/encoder.pt --output_dir new")
    assert "--patch_size 2 is not used: run/encoder.pt has 4" in capsys.readouterr().out
