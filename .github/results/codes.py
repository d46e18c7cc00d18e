"""Draw ../pictures/vqkd-codes-cifar10.png: how many codes VQ-KD has in use, every ten steps of one epoch."""
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
import data  # noqa: E402

RUNS = {"default": "vqkd-one-epoch", "gradient": "vqkd-gradient", "no unit vectors": "vqkd-no-unit",
        "no restarts": "vqkd-no-restart", "none of the three": "vqkd-vqvae", "width 8": "vqkd-8",
        "width 128": "vqkd-128"}

lines = {}
for label, name in RUNS.items():
    log = data.read_log(HERE / name / "log.jsonl")
    lines[f"{label}: {log[-1]['usage']:.0%}"] = torch.tensor(
        [line["batch_perplexity"] for line in log if "batch_perplexity" in line])
data.save_plot(HERE.parent / "pictures" / "vqkd-codes-cifar10.png", lines, "-", xlabel="step / 10",
               ylabel="perplexity of a batch's codes, of 512", ylim=(0, 640),
               title="in the legend: codes that occur at the end")
