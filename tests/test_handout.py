"""The course: a blank costs the point of its own exercise and no other; so does what students get wrong."""
import functools
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import handout  # noqa: E402
import test_exercises  # noqa: E402
from handout import EXERCISES, ROOT  # noqa: E402

MISTAKES = {  # a piece of the solution, and what stands there instead
    "patchify": [(".transpose(2, 3)", ""), (".flatten(2)", ".flip(1).flatten(2)")],
    "random_masking": [
        ("noise.argsort(1)", "noise.argsort(1, descending=True)"), ("ids_shuffle.argsort(1)", "ids_shuffle"),
        (">= num_keep", "> num_keep"), ("(ids_restore >=", "(ids_shuffle >="), (">=", "<"), (".float()", "")],
    "pixel_targets": [
        ("norm_pix_loss)", "norm_pix_loss, unbiased=False)"), ("norm_pix_loss)", "True)"),
        ("(patchify(imgs, p)", "(patchify(imgs, p).unflatten(2, (-1, 3)).transpose(2, 3).flatten(2)"),
        ("patchify(imgs, p)", "imgs.unflatten(1, (1, 3))"),
        ("return", "return patchify(imgs, p) if not norm_pix_loss else")],
    "gumbel_softmax": [
        ("-torch.empty_like", "torch.empty_like"), (".exponential_().log()", ".exponential_()"),
        ("/ tau", "* tau"), ("(logits + noise) / tau", "logits / tau + noise"), ("softmax(1)", "softmax(0)"),
        ("+ y - y.detach()", ""), ("if hard", "if not hard"), ("y.argmax(1,", "logits.argmax(1,")],
    "kl_to_uniform": [
        ("log_softmax(1)", "log_softmax(-1)"), ("log_softmax(1)", "softmax(1).log()"),
        (".sum(1)", ".mean(1)"), (" + math.log", " - math.log"), (" + math.log(logits.shape[1])", "")],
    "cls_loss": [
        (" - ce.diagonal().sum()", ""), (" - len(ce)", ""), ("/ temp", ""), ("/ temp", "* temp"),
        ("-torch", "torch"), ("/ q.shape[1]", ""), ("log_softmax", "softmax")],
    "patch_loss": [
        (".sum(-1)", ".mean(-1)"), ("(ce * weight).sum()", "ce.mean()"), ("weight).sum()", "weight).mean()"),
        ("/ temp", ""), ("/ temp", "* temp"), ("-(q", "(q"), ("log_softmax", "softmax")],
    "quantizer_update": [
        ("F.normalize(sums, dim=1)", "sums"),
        ("F.normalize(sums, dim=1)", "sums / counts[:, None].clamp(min=1)"), ("> 0", ">= 0"),
        ("self.hits +=", "self.hits.copy_(counts), "),
        ("if not self.trained", "if True"), ("(self.scaled(self.codebook))", "(self.codebook)"),
        ("(1 - self.decay)", "self.decay"), ("/ counts[:, None].clamp(min=1)", ""),
        ("data.all_sum(counts)", "counts")],
    "regressor_block": [
        ("[visible, x]", "[x, visible]"), ("[pos_visible, pos]", "[pos, pos_visible]"), ("(x + pos)", "(x)"),
        ("self.norm1_v(kv)", "k"), ("self.norm1_v(kv)", "self.norm1_k(kv)"), ("self.norm2_cross(x)", "x"),
        ("x = self.norm2_cross(x)", "v = self.norm2_cross(x)"), ("x = x + self", "x = self"),
        ("self.mlp_cross(x)", "self.mlp_cross(self.norm2_cross(x))"), ("self.gamma_1_cross", "None"),
        ("self.residual(self.mlp_cross(x), self.gamma_2_cross)", "self.gamma_2_cross * self.mlp_cross(x)"),
        ("self.gamma_2_cross", "None")],
    "sincos_pos_embed": [
        ("[columns, rows]", "[rows, columns]"), ("[angle.sin(), angle.cos()]", "[angle.cos(), angle.sin()]"),
        ("(0, 0, 1, 0)", "(0, 0, 0, 1)"), ("10000.0", "1000.0"), (".float()", ""), (")[None]", ")"),
        ("/ (embed_dim // 4)", "/ (embed_dim // 2)"), ("(grid, 1)", "(1, grid).reshape(grid * grid, -1)")],
    "attention": [
        ("v, bias)", "v)"), (".transpose(1, 2).flatten(2)", ".reshape(x.shape)"), ("self.proj(", "("),
        ("attend(q,", "attend(q * k.shape[-1] ** -0.5,"), ("q, k, v = ", "k, q, v = ")],
    "knn_vote": [
        ("F.normalize(train_x, dim=1)", "train_x"), (" / temperature", ""), (".exp()", ""),
        ("classes[:, :k], votes[:, :k]", "classes, votes"), (" or [len(train_x)]", ""),
        ("[k for k in ks if k <= len(train_x)]", "[min(k, len(train_x)) for k in ks]"),
        ("votes[:, :k])", "torch.ones_like(votes[:, :k]))"), ("torch.cat(parts)", "parts[0]")],
    "blockwise_mask": [
        ("((2 * u[1] - 1) * math.log(0.3)).exp()", "0.3 + u[1] * (1 / 0.3 - 0.3)"),
        ("(2 * u[1] - 1)", "0 * u[1]"), ("(added <= room)", "(added <= room + 5)"),
        ("(grid - h + 1)", "(grid - h)"), ("u[3] * (grid - w + 1)", "0 * w"),
        ("u[0] * (room - min_block)", "(1 - min_block)"),
        ('rule != "end"', "True"), ('rule != "end"', "False"), ('rule != "end"', 'rule == "fill"'),
        (".expand(B)", ".expand(B).mean().expand(B)"), (" & (added < room)[:, 0]]", " & (added < 0)[:, 0]]"),
        ("rand(4, len(rows)", "rand(4, 1")],
}


def swap(monkeypatch, exercise, source):
    """Give the function of an exercise, whoever imports it, the code that another text of its file has."""
    file, name = EXERCISES[exercise]
    code, place = compile(source, file, "exec"), importlib.import_module(file.removesuffix(".py"))
    for part in name.split("."):
        (code,) = (c for c in code.co_consts if isinstance(c, types.CodeType) and c.co_name == part)
    monkeypatch.setattr(inspect.unwrap(functools.reduce(getattr, name.split("."), place)), "__code__", code)


def failures():
    """{exercise: the exception that its test raises}, of the tests that fail"""
    found = {}
    for exercise in EXERCISES:
        try:
            getattr(test_exercises, f"test_{exercise}")()
        except Exception as error:
            found[exercise] = error
    return found


def solution(exercise):
    return (ROOT / EXERCISES[exercise][0]).read_text(encoding="utf-8")


def test_the_solutions_have_all_points():
    """One test for each exercise and no other; all pass; README's table has a row for each."""
    tests = [name for name in vars(test_exercises) if name.startswith("test_")]
    assert tests == [f"test_{exercise}" for exercise in EXERCISES] and not failures()
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("## A course")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)`, (\w+\.py)", readme, re.M)
    assert sorted(rows) == sorted((name.removesuffix(".forward"), file) for file, name in EXERCISES.values())


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_blank_costs_its_own_point_only(exercise, monkeypatch):
    """The text of the handout with this one blank: its test says what to do, and the twelve others pass."""
    swap(monkeypatch, exercise, handout.blank(solution(exercise), exercise))
    ((failed, error),) = failures().items()
    assert failed == exercise and isinstance(error, NotImplementedError) and f"-k {exercise}" in str(error)


@pytest.mark.parametrize("exercise", EXERCISES)
def test_mistakes_are_found(exercise, monkeypatch):
    """A solution with one thing wrong in it does not pass."""
    source, (_, name) = solution(exercise), EXERCISES[exercise]
    lines, (body, _), passed = source.split("\n"), handout.find_body(source, name), []
    right = "\n".join(lines[body])
    for piece, instead in MISTAKES[exercise]:
        assert piece in right, f"{piece} is no part of the solution"
        wrong = right.replace(piece, instead, 1)
        swap(monkeypatch, exercise, "\n".join([*lines[:body.start], wrong, *lines[body.stop:]]))
        try:
            getattr(test_exercises, f"test_{exercise}")()
            passed.append((piece, instead))
        except Exception as error:
            print(f"{piece} -> {instead}: {error}")
    assert not passed


def test_only_the_body_is_blank():
    """All around it stays, line for line; comments in it go, and a string at the margin does not end it."""
    source = textwrap.dedent('''
        class A:
            @staticmethod
            def f(x):
                """One
                two"""
                # how
                def g():
                    return """
        """
                return g

            def g(self):  # stays
                """Stays."""

        def f(): return 1  # another f
    ''')
    lines = source.split("\n")
    body, indent = handout.find_body(source, "A.f")
    assert lines[body] == lines[6:11] and indent == 8 * " "
    for exercise, (_, name) in EXERCISES.items():
        source = solution(exercise)
        before, after = source.split("\n"), handout.blank(source, exercise).split("\n")
        body, _ = handout.find_body(source, name)
        assert after == before[:body.start] + after[body.start:body.start + 2] + before[body.stop:]
        assert all(len(line) <= 110 for line in after)


# ---- the folder that is handed out ----


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def grade(folder):
    """Run the exercises of a handout. -> the names of those that pass, and what is said of the points"""
    words = [sys.executable, "-m", "pytest", "-q", "-rp", "--tb=no", "tests/test_exercises.py"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return re.findall(r"^PASSED .*::test_(\w+)", done.stdout, re.M), re.search(".* points", done.stdout)[0]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course") / "new"
    words = [sys.executable, ROOT / "tests" / "handout.py", folder]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "13 functions to write" in done.stdout, done.stderr
    return folder


def test_a_student_solves_one_file(course, tmp_path):
    """No point at first; with the solutions of mae.py in their places its three."""
    folder = tmp_path / "student"
    shutil.copytree(course, folder)
    assert grade(folder) == ([], "0 of 13 points")
    shutil.copy(ROOT / "mae.py", folder)
    assert grade(folder) == (["patchify", "random_masking", "pixel_targets"], "3 of 13 points")


def test_the_copy_is_whole(course):
    """Every file that git knows is in it, byte for byte but the seven with blanks."""
    blank = {file for file, _ in EXERCISES.values()}
    for name in files(course):
        same = (course / name).read_bytes() == (ROOT / name).read_bytes()
        assert same == (name not in blank), name
    if (ROOT / ".git").exists() and shutil.which("git"):
        known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
        assert set(known.stdout.split()) <= files(course)


@pytest.mark.parametrize("place", ["inside", "tests/inside", ".github/inside", "out/inside"])
def test_a_handout_inside_the_repository(course, tmp_path, place, monkeypatch):
    """It does not copy itself, nor history, runs, data sets, caches, an environment, another handout."""
    repository = tmp_path / "repository"
    shutil.copytree(course, repository)
    for name in (".git/HEAD", "out/mae/last.pt", "data/cifar.bin", "tests/__pycache__/mae.pyc",
                 ".pytest_cache/README.md", ".venv/bin/python.py", "course/mae.py"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).touch()
    monkeypatch.setattr(handout, "ROOT", repository)
    handout.write(repository / place)
    assert files(repository / place) == files(course)


def test_a_used_folder_is_refused(tmp_path, monkeypatch, capsys):
    """One sentence, and nothing is written; an empty folder is taken."""
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        monkeypatch.setattr(sys, "argv", ["handout.py", str(path)])
        with pytest.raises(SystemExit) as stopped:
            handout.main()
        assert stopped.value.code == 2 and "is not an empty folder" in capsys.readouterr().err
    assert files(tmp_path) == {"notes.txt"}
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["handout.py", str(tmp_path / "empty")])
    handout.main()
    assert "mae.py" in files(tmp_path / "empty")
