"""Draw ../pictures/minutes-cifar10.png: k-NN on the way, over minutes of two cores, tokenizer and teacher
counted in."""
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import data  # noqa: E402

RUNS = {"MAE": ("mae-micro-cifar10-seed-1", 1258, 0), "iBOT, 24 px": ("ibot-micro-cifar10-seed-1", 209, 0),
        "CAE": ("cae-micro-cifar10-seed-1", 380, 8), "BEiT": ("beit-micro-cifar10", 400, 8),
        "BEiT v2": ("beit_v2-micro-cifar10", 312, 33)}      # log, images/s of an idle machine, minutes before

figure = Figure(figsize=(7, 4), layout="constrained")
axes = figure.subplots()
for label, (name, speed, before) in RUNS.items():
    batch = json.loads((HERE / name / "args.json").read_text())["flags"]["batch_size"]
    points = [(before + line["step"] * batch / speed / 60, line["knn"])
              for line in data.read_log(HERE / name / "log.jsonl") if "knn" in line]
    axes.plot(*zip(*points), ".-", label=label)
axes.set(xlabel="minutes of two CPU cores, with tokenizer and teacher", ylabel="k-NN in %")
axes.grid(alpha=0.3)
axes.legend()
data.save_atomically(figure, HERE.parent / "pictures" / "minutes-cifar10.png")
