"""Draw ../pictures/vqkd-codes-cifar10.png: how many codes VQ-KD has in use, step by step, one epoch each."""
import json
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
RUNS = {"the default": "vqkd-one-epoch", "gradient in place of averages": "vqkd-gradient",
        "no unit vectors": "vqkd-no-unit", "no restarts": "vqkd-no-restart",
        "none of the three": "vqkd-vqvae", "codes of width 8": "vqkd-8", "of width 128, the model's": "vqkd-128"}

figure = Figure(figsize=(7, 4), layout="constrained")
axes = figure.subplots()
for label, name in RUNS.items():
    lines = [json.loads(line) for line in (HERE / name / "log.jsonl").read_text().splitlines()]
    points = [(line["step"], line["batch_perplexity"]) for line in lines if "batch_perplexity" in line]
    axes.plot(*zip(*points), label=f"{label}; at the end {lines[-1]['usage']:.0%} occur")
axes.set(xlabel="step", ylabel="perplexity of a batch's codes, of 512", ylim=(0, 512))
axes.grid(alpha=0.3)
axes.legend(fontsize=8)
figure.savefig(HERE.parent / "pictures" / "vqkd-codes-cifar10.png", dpi=110)
