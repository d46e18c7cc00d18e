"""k-NN accuracy against minutes of all methods, from the logs in .github/results: what README shows.

    python tests/minutes.py .github/pictures/minutes-cifar10.png

The runs shared their machine with others, so minutes are images seen over the rate of a quiet one: images/s
of the laptop's recipes in bfloat16 on two cores of a Xeon (bench-laptop.txt; iBOT's: a sixth of MAE's, as
measured side by side). What a method needs before it can begin, tokenizer or teacher, counts as its start."""
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent.parent / ".github" / "results"
RATES = {"mae": 1258, "dvae": 399, "beit": 400, "cae": 380, "ibot": 209, "beit_v2-tokenizer": 373, "beit_v2": 312}
BEFORE = {"beit": ["dvae"], "cae": ["dvae"], "beit_v2": ["mae", "beit_v2-tokenizer"]}
NAMES = {"mae": "MAE", "beit": "BEiT", "cae": "CAE", "ibot": "iBOT", "beit_v2": "BEiT v2"}
IMAGES = 50_000                                                 # of CIFAR-10


def log_of(name):
    """The evaluations of a laptop's run: {epoch: entry}"""
    path = RESULTS / f"{name}-micro-cifar10" / "log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {line["epoch"]: line for line in lines if "images/s" not in line}


def minutes(name, epochs):
    return epochs * IMAGES / RATES[name] / 60


def main():
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, label in NAMES.items():
        log = log_of(name)
        start = sum(minutes(part, max(log_of(part), default=0)) for part in BEFORE.get(name, ()))
        if not log:
            continue
        points = [(start + minutes(name, epoch), line["knn"]) for epoch, line in log.items()]
        (line,) = axes.plot(*zip(*points), marker="o", ms=4, label=label)
        if start:
            axes.plot([0, start], [points[0][1]] * 2, ":", color=line.get_color())
        print(f"{label}: " + ", ".join(f"{knn:.1f} after {at:.0f}" for at, knn in points))
    axes.set(xlabel="minutes of two CPU cores (dotted: tokenizer, or teacher and tokenizer)",
             ylabel="k-NN accuracy on the way, %", title="CIFAR-10, ViT-micro/4")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(sys.argv[1], dpi=110)


if __name__ == "__main__":
    main()
