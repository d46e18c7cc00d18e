"""What all tests share: the repository on the path, two threads, and the official implementations' arrays."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)


@pytest.fixture
def golden():
    """golden("mae"): arrays of tests/golden/mae.npz as tensors; golden("mae", "w/"): those under a prefix."""
    def load(name, prefix=""):
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as arrays:
            return {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays
                    if key.startswith(prefix)}
    return load


@pytest.fixture
def close():
    """close(found, wanted): the largest difference is below 1e-5 of the largest wanted value."""
    def check(found, wanted, tolerance=1e-5):
        found, wanted = torch.as_tensor(found).detach().double(), torch.as_tensor(wanted).double()
        assert found.shape == wanted.shape, f"{tuple(found.shape)} found, {tuple(wanted.shape)} wanted"
        error = ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()
        assert error < tolerance, f"relative difference {error:.1e}"
    return check


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """Below all else the points: one for each test of test_exercises.py that passes, of those that ran."""
    yield
    passed, failed = ([report for report in terminalreporter.stats.get(outcome, ())
                       if report.when == "call" and "test_exercises.py" in report.nodeid]
                      for outcome in ("passed", "failed"))
    if passed or failed:
        terminalreporter.write_line(f"{len(passed)} of {len(passed) + len(failed)} points")
