"""Write a copy of this repository for a course: thirteen functions have lost their bodies.

    python tests/handout.py ../course
    cd ../course && python -m pytest tests/test_exercises.py        # 0 of 13 points

Signature and docstring stay, a NotImplementedError names the test that grades the function, and every test is
one point. Runs, data sets, caches and git's history stay behind. README.md, "A course", has a table of them.
"""
import argparse
import ast
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = ("*.py", "*.md", "*.txt", ".gitignore", ".ci/*", ".github/**/*", "tests/*.py", "tests/golden/*")
EXERCISES = {  # its test in test_exercises.py, without test_: the file, the function without a body
    "patchify":          ("mae.py", "patchify"),
    "random_masking":    ("mae.py", "random_masking"),
    "pixel_targets":     ("mae.py", "pixel_targets"),
    "gumbel_softmax":    ("dvae.py", "gumbel_softmax"),
    "kl_to_uniform":     ("dvae.py", "kl_to_uniform"),
    "cls_loss":          ("ibot.py", "cls_loss"),
    "patch_loss":        ("ibot.py", "patch_loss"),
    "quantizer_update":  ("beit_v2.py", "Quantizer.update"),
    "regressor_block":   ("cae.py", "RegressorBlock.forward"),
    "sincos_pos_embed":  ("vit.py", "sincos_pos_embed"),
    "attention":         ("vit.py", "Attention.forward"),
    "knn_vote":          ("data.py", "knn_vote"),
    "blockwise_mask":    ("data.py", "blockwise_mask"),
}


def find_body(source, name):
    """The lines of a function or method from its docstring to its end, as a slice; their indent"""
    node = ast.parse(source)
    for part in name.split("."):
        (node,) = (child for child in node.body if getattr(child, "name", None) == part)
    docstring = node.body[0]
    assert ast.get_docstring(node), f"{name} has no docstring, which is all that a student reads"
    return slice(docstring.end_lineno, node.end_lineno), " " * docstring.col_offset


def blank(source, exercise):
    """The text of a file in which the body of this exercise is a NotImplementedError."""
    name = EXERCISES[exercise][1]
    lines, (body, indent) = source.split("\n"), find_body(source, name)
    task = f"{name} is yours to write: pytest tests/test_exercises.py -k {exercise}"
    lines[body] = [f"{indent}raise NotImplementedError(", f'{indent}    "{task}")']
    return "\n".join(lines)


def write(out):
    """Copy the repository to the folder `out`, without the solutions."""
    found = [path for pattern in FILES for path in ROOT.glob(pattern) if path.is_file()]
    for path in found:  # listed before the first is written: `out` may lie inside the repository
        copy = out / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for exercise, (file, _) in EXERCISES.items():
        source = (out / file).read_text(encoding="utf-8")
        (out / file).write_text(blank(source, exercise), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder that is new or empty")
    out = parser.parse_args().out
    if (out.exists() or out.is_symlink()) and not (out.is_dir() and not any(out.iterdir())):
        parser.error(f"{out} exists and is not an empty folder: name another, or empty it first")
    write(out)
    print(f"{out} has {len(EXERCISES)} functions to write; "
          f"in it, python -m pytest tests/test_exercises.py prints the points")


if __name__ == "__main__":
    main()
