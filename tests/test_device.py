"""No step waits for the GPU, and what a step asks of it is little. There is none here: the CPU pretends.

A tensor lies on the pretended GPU if it was sent or made there, as "cuda:0", or computed from one that does;
`waits` are the places where a true GPU would have made the CPU wait for it.
"""
import traceback

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from test_loops import world  # noqa: F401: tokenizers and a teacher
from test_runs import BEIT, BEIT2, CAE, DVAE, IBOT, LINEAR, MAE, TRAIN, VQKD, run, shrink
import data

GPU, CPU, ATEN, Tensor = torch.device("cuda:0"), torch.device("cpu"), torch.ops.aten, torch.Tensor
BY_VALUE = (ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.bincount,
            ATEN._unique2, ATEN.unique_dim, ATEN.repeat_interleave)     # give numbers, or shapes that depend
INDEX = (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_)
STEPS, FEW = 4, "--patch_size 2 --eval_every 0 --log_every 100 --max_steps 4"    # the last one logs and saves
COMMANDS = {
    "mae": f"{MAE} --aug crop_jitter", "mae block": f"{MAE} --sampling block --aug none", "dvae": DVAE,
    "beit": f"{BEIT} --color_jitter 0.4", "beit pixels": f"{BEIT} --target pixels --masking random",
    "cae": f"{CAE} --momentum 0.9", "vqkd": f"{VQKD} --restart 2", "beit_v2": f"{BEIT2} --color_jitter 0.4",
    "ibot": f"{IBOT} --blur --clip_grad 0.1", "ibot rand": f"{IBOT} --pred_shape rand --koleo 0.1",
    "train": f"{TRAIN} --rand_augment 9 --erase 0.5 --cutmix 1", "linear": f"{LINEAR} --layers all",
    "finetune": f"{TRAIN} --mode finetune --init out/mae-shapes/encoder.pt --accum_steps 2",
    "attentive": f"{LINEAR} --mode attentive"}


def memory(x):
    return StorageWeakRef(x.untyped_storage())                  # shared with its views alone, even afterwards


class Pretended(TorchDispatchMode):
    """Sees what PyTorch runs in the end, backward passes included. calls: those that the GPU would get."""

    def __init__(self):
        super().__init__()
        self.there, self.pinned, self.names, self.waits, self.calls = set(), set(), Names(), [], 0
        self.step, self.quiet, self.names.gpu = None, False, self

    def has(self, x, places=None):
        return isinstance(x, Tensor) and memory(x) in (self.there if places is None else places)

    def wait(self, func):
        by = [f"{at.name} {at.lineno}" for at in traceback.extract_stack()]
        if not self.quiet and "clip_grad_norm_" not in str(by):  # that one hears the true name from C++
            self.waits.append((self.step, func.__name__, by[-6:]))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there = [self.has(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.calls, kind, out = self.calls + any(there), func.overloadpacket, func(*args, **kwargs or {})
        copied = kind in (*INDEX, ATEN.copy_) and not all(there)    # from the CPU, without a word
        masked = kind in INDEX and any(getattr(x, "dtype", 0) == torch.bool for x in tree_leaves(args[1]))
        if any(there) and (kind in BY_VALUE or copied or masked):
            self.wait(func)
        self.there |= {memory(x) for x in tree_leaves(out) if isinstance(x, Tensor) and any(there)}
        return out


class Names(TorchFunctionMode):
    """Sees what is written in Python: devices by their names, and what is no tensor yet."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        gpu, kwargs, first = self.gpu, dict(kwargs or {}), args[0] if args else None
        here, pinned = gpu.has(first), gpu.has(first, gpu.pinned)
        if func == Tensor.device.__get__ and here:
            return GPU
        if func is Tensor.pin_memory:
            gpu.pinned.add(memory(out := first.clone()))
            return out
        names = [torch.device(x) for x in (*args[1:], *kwargs.values()) if isinstance(
            x, (str, torch.device)) and (func is Tensor.to or "device" in kwargs)]
        leaves = here and (func in (Tensor.cpu, Tensor.tolist) or func is Tensor.to and CPU in names)
        sent = func is Tensor.to and GPU in names and not here
        made = (GPU in names or here) and func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        if leaves or made or sent and not (kwargs.get("non_blocking") and pinned):
            gpu.wait(func)
        args = [CPU if names and isinstance(x, (str, torch.device)) else x for x in args]
        kwargs |= ({"device": CPU} if kwargs.get("device") else {}) | ({"copy": True} if sent else {})
        gpu.quiet = func.__name__ == "one_hot" and len(args) == 2       # it looks at the labels on a CPU only
        out = func(*args, **kwargs)
        gpu.quiet = False
        gpu.there |= {memory(out)} if GPU in names else set()
        return out


@pytest.fixture
def pretend(world, tmp_path, monkeypatch):                      # noqa: F811
    """pretend(name): run a script on the pretended GPU -> what was noted, with the loader."""
    monkeypatch.chdir(world)
    gpu, setup, steps = Pretended(), data.setup, data.Loader.steps

    def noted_steps(loader, start, net):
        gpu.loader = loader
        for gpu.step, parts in steps(loader, start, net):
            yield gpu.step, parts

    def prepare(patch):
        shrink(patch)
        patch.setattr(data, "setup", lambda args: (setup(args), setattr(args, "device", str(GPU)), GPU)[-1])
        patch.setattr(data, "hardware", lambda args: "a pretended GPU")
        patch.setattr(data.Loader, "steps", noted_steps)

    def started(name):
        with gpu, gpu.names:
            run(f"{COMMANDS[name]} {FEW} --output_dir {tmp_path}/run", prepare)
        return gpu
    return data.constant.cache_clear() or started               # those of another test


@pytest.mark.parametrize("name", COMMANDS)
def test_no_step_waits_for_the_gpu(name, pretend):
    """In steps away from --log_every, but for each constant once. The log's reading of the last is noted."""
    gpu = pretend(name)
    waits = [wait for wait in gpu.waits if wait[0] in range(STEPS - 1)]
    assert [wait for wait in waits if "constant" not in str(wait[2])] == []
    assert len(waits) <= data.constant.cache_info().currsize <= 6
    assert (STEPS - 1, "tolist") in [wait[:2] for wait in gpu.waits]


@pytest.mark.parametrize("work", [
    lambda x: torch.tensor((1.0,), device=x.device), lambda x: x.new_tensor([1.0]), lambda x: x[x > 0.5],
    lambda x: torch.as_tensor(3, device="cuda:0"), lambda x: (2 * x).detach().t().max().item(),
    lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x.to("cpu"), lambda x: x.nonzero(),
    lambda x: x[torch.arange(2)], lambda x: x.copy_(torch.rand(4, 4)), lambda x: bool(x.any()),
    lambda x: torch.rand(4).to(x.device), lambda x: torch.rand(4).to(x.device, non_blocking=True)])
def test_what_waits_is_noted(work):
    """That nothing else is noted, the scripts above show."""
    with Pretended() as gpu, gpu.names:
        work(torch.rand(4, 4, device=GPU) + torch.full((4, 1), 0.6, device="cuda:0"))
    assert len(gpu.waits) == 1


def test_few_calls_make_masks_and_crops(pretend):
    """BEiT's masks are one copy of what the CPU drew; iBOT's nine local crops take no more than three."""
    with Pretended() as gpu, gpu.names:
        assert gpu.has(data.blockwise_mask(64, 14, 75, 16, "end", "cuda:0")) and gpu.calls == 0
    gpu, calls = pretend("ibot"), []
    for gpu.loader.views[1].count in (3, 9):
        before = gpu.calls
        with gpu, gpu.names:
            assert gpu.has(next(gpu.loader.batches(gpu.loader.order(0)))[0][gpu.loader.views[1].count + 1])
        calls.append(gpu.calls - before)
    assert calls[1] <= calls[0] + 20 < 1200
