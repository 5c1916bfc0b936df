"""Checkpoints of k blocks, their inputs off the device, tiles and loss tiles together: exact, and
counted.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import threading
from functools import lru_cache
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.meshes import mesh_of
from helpers.models import LLAMA, STARCODER2
from helpers.options import sections
from helpers.ranks import run_on_ranks
from helpers.rows import Row, local_batch, make_rows
from helpers.training import OPTIMIZER, Record, largest_difference, train_plain, train_sharded
from titan_ulysses.distributed.collectives import CollectiveCounter
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.memory.checkpointing import checkpoint_blocks
from titan_ulysses.memory.offload import CudaStore, DiskStore, Store, check_room, open_store
from titan_ulysses.model import hf
from titan_ulysses.optim.optimizer import build_optimizer
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.train.step import train_step
from titan_ulysses.ulysses.cores import sdpa

LAYERS = 3
MODEL = STARCODER2 | {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": LAYERS}
FACTORS = {
    "mlp_tile_tokens": (-1, 5, 64),
    "loss_tile_tokens": (-1, 0, 7),
    "checkpoint_every": (1, 2, 3),
    "offload": ("none", "host", "disk"),
    "sp": (1, 2, 4),
    "dp": (1, 2),
}
Case = tuple
EVERY_CASE: list[Case] = [case for case in product(*FACTORS.values()) if case[-1] * case[-2] <= 4]


def pairs_of(case: Case) -> set[tuple]:
    return {(i, case[i], j, case[j]) for i, j in combinations(range(len(case)), 2)}


def pairwise() -> list[Case]:
    """Few cases that hold every pair of settings: each time the one with the most new pairs."""
    missing, chosen = set().union(*map(pairs_of, EVERY_CASE)), []
    while missing:
        chosen.append(max(EVERY_CASE, key=lambda case: len(pairs_of(case) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


def steps_of() -> list[list[list[Row]]]:
    rows = [(10, 14), (6, 6, 12), (24,), (1, 22, 1)]
    return [
        [make_rows(rows, masked="uneven", vocab_size=61, seed=10 * s + m) for m in range(2)]
        for s in range(2)
    ]


@lru_cache
def plain() -> Record:
    return train_plain(MODEL, steps_of(), torch.float64)


def check(case: Case) -> None:
    options = dict(zip(FACTORS, case, strict=True))
    sp, dp = options.pop("sp"), options.pop("dp")
    found = run_on_ranks(
        sp * dp, train_sharded, (1, dp, sp), MODEL, steps_of(), torch.float64, **options
    )[0]
    worst = largest_difference(found, plain())
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}


def name_of(case: Case) -> str:
    return "mlp {} loss {} every {} {} sp{} dp{}".format(*case)


@pytest.mark.parametrize("case", pairwise(), ids=name_of)
def test_equals_one_plain_process(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY_CASE, ids=name_of)
def test_equals_one_plain_process_in_full(case):
    check(case)


# --- counters -------------------------------------------------------------------------------------


def counted(every: int, layers: int, offload: str) -> tuple[dict[str, int], dict[str, int]]:
    """Calls of the second step on (sp2): of MLPs (tiles) and cores, and of collectives."""
    mesh, calls = mesh_of(1, 1, 2), {"core": 0, "mlp": 0}
    table = LLAMA | {"num_hidden_layers": layers, "tie_word_embeddings": False}
    model = hf.build_on_meta(hf.load_model_config("", table), torch.float32)

    def core(q: Tensor, k: Tensor, v: Tensor, **layer) -> Tensor:
        calls["core"] += 1
        return sdpa(q, k, v, **layer)

    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda *_: calls.update(mlp=calls["mlp"] + 1))
    own = sections(checkpoint_every=every, offload=offload, mlp_tile_tokens=4)
    parallelize(model, mesh, attention=core, param_dtype=torch.float32, **own)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    optimizer = build_optimizer(model, OPTIMIZER)
    batch = local_batch(make_rows([(24,)], masked="none", vocab_size=61, seed=0), mesh)
    for _ in range(2):
        calls.update(core=0, mlp=0)
        with CollectiveCounter() as counter:
            train_step(model, optimizer, [batch], mesh, max_norm=1.0)
    return calls, {kind: number for kind, (number, _) in counter.counts.items()}


# Where checkpoints wait changes nothing here: one of them shows it.
@pytest.mark.parametrize(
    ("every", "layers", "offload"),
    [*((every, 6, "none") for every in (0, 1, 2, 4, 6)), (3, 6, "host")],
)
def test_how_often_things_run(every, layers, offload):
    """With n segments of L blocks: MLPs 3 L - n times a step (in 3 tiles), cores 2 L, gathers 2 L,
    reductions L.
    """
    segments = -(-layers // every) if every else 0
    calls, collectives = run_on_ranks(2, counted, every, layers, offload)[0]
    mlp_runs = 3 * layers - segments if every else 2 * layers
    print(
        f"every {every}: {segments} segments of {layers} blocks, {mlp_runs} runs of MLPs, "
        f"{collectives}"
    )
    assert calls == {"mlp": 3 * mlp_runs, "core": (2 if every else 1) * layers}
    # Besides the blocks: embedding and head are gathered once, and the root with the last norm.
    assert collectives["reduce_scatter"] == layers + 3
    assert collectives["all_gather"] == 2 * layers + 4
    assert collectives["all_to_all"] == (6 if every else 4) * layers


# --- the wrapper ----------------------------------------------------------------------------------


class Block(nn.Module):
    """Of an odd signature, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(
        self, hidden_states: Tensor, scale: Tensor, *, shift: float = 0.0, dropout: bool = True
    ) -> Tensor:
        hidden_states = torch.tanh(self.linear(hidden_states)) * scale + shift
        return nn.functional.dropout(hidden_states, 0.5) if dropout else hidden_states


def run_blocks(blocks: nn.ModuleList, x: Tensor, scale: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    for index, block in enumerate(blocks):
        x = block(x, scale, shift=0.1 * index) if index % 2 else block(hidden_states=x, scale=scale)
    return list(torch.autograd.grad(x.square().sum(), [scale, *blocks.parameters()]))


@pytest.mark.parametrize("offload", ["none", "host", "disk"])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_any_signature_and_random_numbers(every, offload, tmp_path):
    """A keyword tensor that needs a gradient, keywords that differ from block to block, dropout in
    each.
    """
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(5))
    x = torch.randn(3, 4, dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    expected, names = run_blocks(blocks, x, scale), blocks.state_dict().keys()
    store = open_store(offload, tmp_path, torch.device("cpu"))
    checkpoint_blocks(blocks, every=every, store=store)
    assert blocks.state_dict().keys() == names
    for _ in range(2):
        for a, b in zip(run_blocks(blocks, x, scale), expected, strict=True):
            assert torch.equal(a, b)
    if store:
        assert len(store.buffers) == -(-5 // every), (
            "the second pass uses the buffers of the first again"
        )
    assert not list(tmp_path.iterdir()), "files have no name"


def test_two_forwards_before_two_backwards():
    """Buffers are free only when a graph is gone, in whatever order that is."""
    torch.manual_seed(0)
    block = Block()
    x = [torch.randn(3, 4, dtype=torch.float64) for _ in range(3)]
    scale = torch.ones((), dtype=torch.float64)
    expected = [
        torch.autograd.grad(block(y, scale, dropout=False).sum(), block.linear.weight)[0] for y in x
    ]
    blocks, store = nn.ModuleList([block]), open_store("host", None, torch.device("cpu"))
    checkpoint_blocks(blocks, every=1, store=store)
    outputs = [blocks[0](y, scale, dropout=False).sum() for y in x]
    for output, gradient in zip(outputs, expected, strict=True):
        assert torch.equal(
            torch.autograd.grad(output, block.linear.weight, retain_graph=True)[0], gradient
        )
        assert torch.equal(torch.autograd.grad(output, block.linear.weight)[0], gradient)
    del output, outputs
    blocks[0](x[0], scale)
    assert len(store.buffers) == 3
    with torch.no_grad():
        blocks[0](x[0], scale)
    assert len(store.buffers) == 3


def test_a_block_that_returns_more_than_its_hidden_state():
    class Tuple(Block):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
            return self.linear(hidden_states), None

    blocks = nn.ModuleList([Tuple(), Tuple()])
    checkpoint_blocks(blocks, every=2, store=None)
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(
        UserError, match=r"activation_checkpoint.every = 2: Tuple returns more .* = 1"
    ):
        blocks[1](blocks[0](x))


def test_room_is_looked_at_before_the_first_step(tmp_path):
    shape = {"shape": (1, 2**20, 4096), "itemsize": 2, "segments": 2**10, "processes": 8}  # 64 TiB
    with pytest.raises(
        UserError, match=r'offload = "host": checkpoints take 65536.0 GiB .*8 ranks x 1024 segments'
    ):
        check_room("host", None, **shape)
    with pytest.raises(UserError, match=r"offload_folder = .*: checkpoints take 65536.0 GiB"):
        check_room("disk", tmp_path, **shape)
    with pytest.raises(UserError, match=r"offload_folder = .*nowhere: not a writable folder"):
        check_room("disk", tmp_path / "nowhere", **shape)
    check_room("none", None, **shape)
    check_room("disk", tmp_path, shape=(1, 1, 1), itemsize=2, segments=1, processes=1)


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path):
    store = open_store("disk", tmp_path, torch.device("cpu"))
    with pytest.raises(UserError, match=r"offload_folder = .*: no room for 1073741824.00 GiB"):
        store.make_buffer(2**60, torch.device("cpu"))
    assert not list(Path(tmp_path).iterdir())
    assert len(os.listdir("/proc/self/fd")) < 1000


# --- files of a CUDA device, with a stand-in for CUDA ---------------------------------------------


class StandinEvent:
    """Of work that a device has done once `gate` is open."""

    def __init__(self, gate: threading.Event, waits: list) -> None:
        self.gate, self.waits = gate, waits

    def synchronize(self) -> None:
        assert threading.current_thread() is not threading.main_thread(), "the host waits"
        assert self.gate.wait(10), "waits for what nobody does"
        self.waits.append(self)


class StandinCuda:
    """The part of torch.cuda that a store calls. `gate` is closed while the device is busy."""

    def __init__(self) -> None:
        self.gate, self.waits, self.waited_for = threading.Event(), [], []
        self.gate.set()
        self.compute, self.devices = self.Stream(), threading.local()
        self.devices.current = 1  # as on the second rank of a node

    def Stream(self) -> SimpleNamespace:  # noqa: N802  # as in torch.cuda
        return SimpleNamespace(
            wait_stream=lambda other: None,
            wait_event=self.waited_for.append,
            record_event=lambda: StandinEvent(self.gate, self.waits),
        )

    def current_stream(self) -> SimpleNamespace:
        return self.compute

    def current_device(self) -> int:
        return getattr(self.devices, "current", 0)  # that of a new thread

    def set_device(self, device: int) -> None:
        self.devices.current = device

    def stream(self, stream: SimpleNamespace) -> contextlib.AbstractContextManager:
        assert self.current_device() == 1, "torch would open a context on the current device"
        return contextlib.nullcontext()


class NoFileHere(TorchDispatchMode):
    """Refuses operations of this thread on the memory of files."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self.store = store

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        files = {buffer.data_ptr() for buffer in self.store.buffers}
        for x in args:
            assert not (
                func is torch.ops.aten.copy_.default
                and isinstance(x, Tensor)
                and x.data_ptr() in files
            ), "the host copies to or from a file itself"
        return func(*args, **kwargs or {})


def disk_store(folder: Path) -> tuple[DiskStore, StandinCuda]:
    cuda = StandinCuda()

    def plain(size: int, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    files = open_store("disk", folder, torch.device("cpu")).make_buffer
    return DiskStore(files, cuda, make_staging=plain), cuda


def test_a_thread_copies_to_files_and_back(tmp_path):
    """Bit-equal over several steps, and the thread that runs the model touches no file."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(6))
    x = torch.randn(3, 4, dtype=torch.float64)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    expected = run_blocks(blocks, x, scale)
    store, cuda = disk_store(tmp_path)
    checkpoint_blocks(blocks, every=1, store=store)
    with NoFileHere(store):
        for _ in range(3):
            found = run_blocks(blocks, x, scale)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(store.buffers) == 6 and cuda.waits
    # A staging buffer is filled again only when the copy from it to the device is over.
    reads = [staging.read for staging in store._staging]
    assert reads[0] is not reads[1] and not {*reads} <= {*cuda.waits}
    assert all(read in cuda.waited_for for read in reads), "the device does not wait for its input"


class Waits:
    """A CudaStore, and for how many copies the device has waited after each tensor."""

    def __init__(self) -> None:
        cuda = StandinCuda()
        plain = open_store("host", None, torch.device("cpu")).make_buffer
        self.store, self.waited_for = CudaStore(plain, cuda), cuda.waited_for
        self.kept: list = []

    def after(self, *tensors: tuple[int, str]) -> list[int]:
        found = []
        for size, kind in tensors:
            self.kept.append(self.store.keep(torch.zeros(size, dtype=torch.uint8), kind))
            found.append(len(self.waited_for))
        return found


def test_the_device_does_not_wait_for_a_pair():
    """Keys and values, or an output and its log-sum-exp, leave together; inputs one at a time."""
    waits = Waits()
    inputs, output, lse = (100, "inputs"), (100, "output"), (2, "lse")
    assert waits.after(inputs, inputs) == [0, 1]
    # Each has waited for what came before the pair, and not for the other one of it.
    assert waits.after(output, lse, output, lse) == [1, 2, 3, 4]
    waited_for = waits.waited_for
    assert [x is y for x, y in zip(waited_for[1:], waited_for, strict=False)] == [False] * 3
    keys, values = (100, "keys"), (100, "values")
    assert waits.after(keys, values, keys, values) == [5, 6, 7, 8]


def test_small_tensors_leave_together():
    """As many as have the bytes of the largest one, which is on its way alone as well."""
    waits = Waits()
    small = [(10, "states")] * 12
    assert waits.after((100, "inputs"), *small) == [0] + [0] + [1] * 9 + [2, 3]
    assert sum(sent.size for sent in waits.store._sent) == 100


def test_what_has_not_left_is_not_copied_back():
    waits = Waits()
    waits.after((100, "output"), (2, "lse"))
    copied = []
    waits.store._fetch = copied.append
    for kept in reversed(waits.kept):
        assert waits.store.get(kept).numel() == kept.buffer.numel()
    assert not copied and not waits.store._sent


def test_the_host_is_up_to_two_tensors_ahead_of_the_files(tmp_path):
    store, cuda = disk_store(tmp_path)
    x = [torch.full((8,), float(n)) for n in range(3)]
    cuda.gate.clear()
    kept = [store._pack(tensor) for tensor in x[:2]]  # returns at once

    def pack() -> None:
        cuda.set_device(1)
        kept.append(store._pack(x[2]))

    waiting = threading.Thread(target=pack)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and len(kept) == 2
    cuda.gate.set()
    waiting.join()
    # The last one is still on the device; the others come from their files.
    assert [store.get(one).tolist() for one in reversed(kept)] == [y.tolist() for y in x[::-1]]
    assert store._staging[0].work.result() is not None
    assert [one.tensor.tolist() for one in kept[:2]] == [y.tolist() for y in x[:2]]


def test_what_fails_in_the_thread_is_raised(tmp_path):
    store, _ = disk_store(tmp_path)
    store.outward.record_event = lambda: SimpleNamespace(synchronize=lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        for n in range(3):
            store._pack(torch.full((8,), float(n)))


# --- CUDA -----------------------------------------------------------------------------------------


def cuda_gradients(offload: str, steps: int = 3) -> tuple[list[Tensor], object]:
    """Of 6 blocks in segments of 2, on random rows: every gradient of the last of some steps, and
    the store.
    """
    torch.manual_seed(0)
    device = torch.device("cuda")
    blocks = nn.ModuleList(Block() for _ in range(6)).to(device)
    store = open_store(offload, None, device)
    checkpoint_blocks(blocks, every=2, store=store)
    scale = torch.ones((), dtype=torch.float64, device=device, requires_grad=True)
    for step in range(steps):
        generator = torch.Generator(device).manual_seed(step)
        x = torch.randn(2**16, 4, dtype=torch.float64, device=device, generator=generator)
        found = run_blocks(blocks, x, scale)
    return found, store


def page_locks(monkeypatch) -> dict[int, int]:
    """Return what is page-locked, the bytes by the address, with a stand-in for CUDA."""
    locked: dict[int, int] = {}

    def register(address: int, size: int, flags: int) -> int:
        locked[address] = size
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=locked.pop)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    return locked


def test_page_locked_buffers_share_no_page(monkeypatch):
    locked = page_locks(monkeypatch)
    make_buffer = open_store("host", None, torch.device("cpu")).make_buffer
    sizes = [1, 300, 5000, mmap.PAGESIZE]
    buffers = [make_buffer(size, torch.device("cuda")) for size in sizes]
    assert [buffer.numel() for buffer in buffers] == sizes
    assert all(buffer.storage_offset() == 0 for buffer in buffers)  # streaming uses the storage
    assert {x.data_ptr() for x in buffers} == {*locked}
    assert all(x % mmap.PAGESIZE == 0 for place in locked.items() for x in place)
    ends = sorted((address, address + size) for address, size in locked.items())
    assert all(stop <= start for (_, stop), (start, _) in zip(ends, ends[1:], strict=False))
    assert [buffer.fill_(7).sum() for buffer in buffers] == [7 * size for size in sizes]


def test_a_buffer_of_no_bytes_is_not_locked_and_a_refused_lock_names_its_setting(monkeypatch):
    """A rank may have no queries of a head, of whose output it keeps nothing."""
    cudart = SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaHostUnregister=None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    gpu, setting = torch.device("cuda"), "memory.stream_offload"
    make_buffer = open_store("host", None, torch.device("cpu"), setting=setting).make_buffer
    assert make_buffer(0, gpu).numel() == 0
    with pytest.raises(UserError, match='^memory.stream_offload = "host": .* page-locked'):
        make_buffer(4096, gpu)


def test_page_locked_memory_is_given_back_before_it_is_freed(monkeypatch):
    """With a stand-in for CUDA: the lock goes with the buffer, also where only a view of it was
    left.
    """
    locked = page_locks(monkeypatch)
    buffer = open_store("host", None, torch.device("cpu")).make_buffer(4096, torch.device("cuda"))
    assert list(locked.items()) == [(buffer.data_ptr(), 4096)]
    view = buffer[8:].view(torch.float32)
    del buffer
    gc.collect()
    assert locked
    del view
    gc.collect()
    assert not locked


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_cuda_offload_changes_no_bit(offload):
    expected, _ = cuda_gradients("none")
    found, store = cuda_gradients(offload)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(store.buffers) == 3, "allocated once, used again in every step"
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_cuda_buffers_are_page_locked():
    _, store = cuda_gradients("host", steps=1)
    assert all(buffer.is_pinned() for buffer in store.buffers)


@pytest.mark.gpu
@pytest.mark.card("the profiler's records of a device")
def test_cuda_copies_run_beside_the_computation():
    """Both directions on the store's own stream. Of three segments, all inputs go to the host, and
    two come back: that of the last one is still on the device.
    """
    from torch.profiler import ProfilerActivity, profile

    cuda_gradients("host", steps=1)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        cuda_gradients("host", steps=1)
        torch.cuda.synchronize()
    copies = [
        e
        for e in profiler.events()
        if "Memcpy" in e.name and ("DtoH" in e.name or "HtoD" in e.name)
    ]
    large = [e for e in copies if e.device_time > 5]
    kernels = {
        e.device_resource_id
        for e in profiler.events()
        if e.device_type.name == "CUDA" and "gemm" in e.name
    }
    assert len(large) == 5 and not {e.device_resource_id for e in large} & kernels


@pytest.mark.gpu
def test_cuda_memory_does_not_grow_with_the_blocks():
    """With offload, peak memory of 12 blocks is that of 6."""
    peaks = []
    for layers in (6, 12):
        blocks = nn.ModuleList(Block() for _ in range(layers)).to("cuda")
        checkpoint_blocks(blocks, every=1, store=open_store("host", None, torch.device("cuda")))
        x = torch.randn(2**18, 4, dtype=torch.float64, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        run_blocks(
            blocks, x, torch.ones((), dtype=torch.float64, device="cuda", requires_grad=True)
        )
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] - peaks[0] < x.numel() * 8
