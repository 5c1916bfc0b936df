"""What the device is, and what it refuses. Those marked gpu are true of a card as well."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

only_here = pytest.mark.cuda(only=True)


def cuda(*values: float) -> Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.float32)


# --- as a card ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call",
    [
        lambda x, cpu: x + cpu,
        lambda x, cpu: x @ cpu,
        lambda x, cpu: torch.cat([x, cpu]),
        lambda x, cpu: x.add_(cpu),
        lambda x, cpu: torch.nn.functional.embedding(cpu.argsort(), x[:, None]),
        lambda x, cpu: x.index_select(0, cpu.argsort()),
        lambda x, cpu: torch.cat([x, cpu[:1], cpu[0][None]]),
        lambda x, cpu: x.index_select(0, cpu.argsort()[0]),
    ],
)
def test_a_cpu_tensor_beside_it_is_refused(call) -> None:
    with pytest.raises(RuntimeError, match="same device|different from other tensors"):
        call(cuda(1, 2, 3), torch.ones(3))


@pytest.mark.gpu
def test_numbers_and_indices_may_be_of_the_cpu() -> None:
    x, two = cuda(1, 2, 3), torch.tensor(2.0)
    assert (x * two).tolist() == [2, 4, 6] and (two - x).tolist() == [1, 0, -1]
    assert torch.where(x > 1, x, two).tolist() == [2, 2, 3]
    assert x.masked_fill(x > 2, two).tolist() == [1, 2, 2]
    assert x[torch.tensor([2, 0])].tolist() == [3, 1]
    assert [t.tolist() for t in torch._foreach_mul([x], two)] == [[2, 4, 6]]
    x[0] = two
    assert x.tolist() == [2, 2, 3]
    assert (x // two).tolist() == [1, 1, 1] and x.floor_divide_(two).tolist() == [1, 1, 1]
    assert x.eq_(two).tolist() == [0, 0, 0]


@pytest.mark.gpu
def test_what_cuda_alone_has() -> None:
    experts = torch.tensor([0, 2, 2, 3], device="cuda", dtype=torch.int32)
    assert torch.histc(experts, bins=4, min=0, max=3).tolist() == [1, 0, 2, 1]
    x = torch.arange(6.0, device="cuda").view(1, 2, 3).requires_grad_()
    by_channel = torch.ones(2, 1, 3, device="cuda", requires_grad=True)
    y = torch.nn.functional.conv1d(x, by_channel, padding=2, groups=2)
    assert y.tolist() == [[[0, 1, 3, 3, 2], [3, 7, 12, 9, 5]]]
    y.sum().backward()
    assert x.grad.tolist() == [[[3, 3, 3]] * 2]
    assert by_channel.grad.tolist() == [[[3, 3, 3]], [[12, 12, 12]]]


@pytest.mark.gpu
@pytest.mark.parametrize("change", [lambda x: x.add_(1), lambda x: x.copy_(torch.ones(3))])
def test_what_backward_needs_may_not_change(change) -> None:
    weight = cuda(1, 2, 3).requires_grad_()
    x = cuda(1, 1, 1)
    product = weight * x
    change(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.gpu
def test_pageable_memory_is_copied_at_once() -> None:
    host = torch.ones(1000)
    x = host.to("cuda", non_blocking=True)
    host.zero_()
    assert x.sum().item() == 1000
    back = torch.zeros(1000).copy_(x, non_blocking=True)
    assert back.sum() == 1000


@pytest.mark.gpu
def test_random_numbers_are_the_devices_own() -> None:
    state, of_cpu = torch.cuda.get_rng_state(), torch.get_rng_state()
    first = torch.rand(8, device="cuda")
    second = torch.rand(8, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(8, device="cuda"), first) and not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), of_cpu)
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.rand(8, device="cuda", generator=torch.Generator())


class Where(torch.autograd.Function):
    """Notes the thread and the device of its backward."""

    seen: list[tuple[bool, int]] = []

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        here = threading.current_thread() is threading.main_thread()
        Where.seen.append((here, torch.cuda.current_device()))
        return gradient


@pytest.mark.gpu
def test_backward_runs_in_the_devices_thread() -> None:
    Where.seen.clear()
    last = torch.cuda.device_count() - 1
    x = torch.ones(2, device=f"cuda:{last}", requires_grad=True)
    Where.apply(x).sum().backward()
    on_cpu = torch.ones(2, requires_grad=True)
    Where.apply(on_cpu).sum().backward()
    assert Where.seen == [(False, last), (True, 0)]


# --- at the worst moment --------------------------------------------------------------------------


@only_here
def test_a_new_thread_has_device_0() -> None:
    seen: list[int] = []
    torch.cuda.set_device(1)
    try:
        thread = threading.Thread(target=lambda: seen.append(torch.cuda.current_device()))
        thread.start()
        thread.join()
        assert torch.cuda.current_device() == 1 and seen == [0]
    finally:
        torch.cuda.set_device(0)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.cuda.set_device(8)


def page_locked(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).pin_memory()


@only_here
def test_a_copy_to_the_host_comes_when_it_is_waited_for() -> None:
    host, side = page_locked(0, 0), torch.cuda.Stream()
    x = cuda(7, 8)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        host.copy_(x, non_blocking=True)
        copied = side.record_event()
    assert host.tolist() == [0, 0]
    copied.synchronize()
    assert host.tolist() == [7, 8]


@only_here
def test_what_is_not_waited_for_is_nan_and_a_race() -> None:
    import fakecuda

    fakecuda.races()
    side, x = torch.cuda.Stream(), torch.empty(2, device="cuda")
    with torch.cuda.stream(side):
        x.copy_(page_locked(7, 8), non_blocking=True)
        copied = side.record_event()
    assert torch.isnan(x + 0).all()
    assert any("add reads what copy to the device writes" in race for race in fakecuda.races())
    torch.cuda.current_stream().wait_event(copied)
    assert (x + 0).tolist() == [7, 8] and not fakecuda.races()


@only_here
@pytest.mark.parametrize("kernel", [lambda x: x * 2, lambda x: x.mul_(2)], ids=["new", "in place"])
def test_kernels_are_late_too(kernel) -> None:
    side, x = torch.cuda.Stream(), cuda(1, 2)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made = kernel(x)
    assert torch.isnan(made + 0).all()
    torch.cuda.current_stream().wait_stream(side)
    assert (made + 0).tolist() == [2, 4]


@only_here
def test_a_copy_that_starts_too_early_is_a_race() -> None:
    """The clocks alone find it: the copy has been in order, by luck."""
    import fakecuda

    fakecuda.races()
    side, x = torch.cuda.Stream(), cuda(1, 2)
    host = page_locked(0, 0)
    y = x * 2
    with torch.cuda.stream(side), fakecuda.setting(races="raise"):
        with pytest.raises(
            RuntimeError, match="race: copy to the host reads what aten::mul writes"
        ):
            host.copy_(y, non_blocking=True)
        side.wait_stream(torch.cuda.default_stream())
        host.copy_(y, non_blocking=True)
    side.synchronize()
    assert host.tolist() == [2, 4]
    fakecuda.races()


@only_here
@pytest.mark.parametrize("told", [False, True])
def test_memory_that_is_freed_while_in_use(told: bool) -> None:
    """The next owner may write to it at once, unless record_stream has told of its use."""
    import fakecuda

    side, host, x = torch.cuda.Stream(), page_locked(0, 0), cuda(7, 8)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        host.copy_(x, non_blocking=True)
    if told:
        x.record_stream(side)
    del x
    torch.cuda.synchronize()
    assert (host.tolist() == [7, 8]) is told and bool(torch.isnan(host).all()) is not told
    fakecuda.races()


@only_here
def test_moments_are_drawn_from_the_seed() -> None:
    import fakecuda

    def arrivals(seed: int) -> list[bool]:
        side, seen = torch.cuda.Stream(), []
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)
        with fakecuda.setting(copies="random", seed=seed):
            for _ in range(16):
                host = page_locked(0.0)
                x = cuda(1)
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    host.copy_(x, non_blocking=True)
                x + 1  # a moment to work
                seen.append(host.item() == 1)
                side.synchronize()
                assert host.item() == 1
        return seen

    assert arrivals(1) == arrivals(1) != arrivals(2)
    assert {*arrivals(1)} == {True, False}


@only_here
def test_pages_are_locked_whole() -> None:
    cudart = torch.cuda.cudart()
    memory = torch.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), dtype=torch.uint8)
    start = memory.data_ptr()
    assert cudart.cudaHostRegister(start, 100, 0) == 0
    assert cudart.cudaHostRegister(start + 200, 100, 0) == 712, "of the same page"
    assert memory.is_pinned() and not torch.ones(3).is_pinned()
    assert cudart.cudaHostUnregister(start) == 0 and cudart.cudaHostUnregister(start) == 713


# --- memory that ends -----------------------------------------------------------------------------


@only_here
def test_memory_ends_as_torch_says_it() -> None:
    import fakecuda

    torch.cuda.empty_cache()
    with fakecuda.setting(memory=8 * 2**20 + torch.cuda.memory_reserved()):
        ooms = torch.cuda.memory_stats()["num_ooms"]
        freed = torch.empty(3 * 2**20, dtype=torch.uint8, device="cuda")
        del freed
        kept = torch.empty(
            6 * 2**20, dtype=torch.uint8, device="cuda"
        )  # what is cached is given back
        with pytest.raises(
            torch.OutOfMemoryError,
            match=r"CUDA out of memory\. Tried to allocate 4\.00 MiB\. GPU 0 has a total capacity "
            r"of .* MiB of which 2\.00 MiB is free\..* is allocated by PyTorch",
        ):
            torch.empty(4 * 2**20, dtype=torch.uint8, device="cuda")
        stats = torch.cuda.memory_stats()
        assert stats["num_ooms"] == ooms + 1 and stats["num_alloc_retries"] >= 2
        del kept
        torch.empty(7 * 2**20, dtype=torch.uint8, device="cuda")


@only_here
def test_memory_is_counted_by_the_device() -> None:
    before, other = torch.cuda.memory_allocated(0), torch.cuda.memory_allocated(1)
    torch.cuda.reset_peak_memory_stats(0)
    x = torch.empty(1000, dtype=torch.uint8, device="cuda:0")
    del x
    y = torch.empty(100, dtype=torch.uint8, device="cuda:1")
    assert torch.cuda.memory_allocated(0) == before
    assert torch.cuda.max_memory_allocated(0) == before + 1024, "blocks of 512 bytes"
    assert torch.cuda.memory_allocated(1) == other + 512
    free, total = torch.cuda.mem_get_info(0)
    assert total == 80 * 2**30 and free == total - torch.cuda.memory_reserved(0)
    del y


# --- waits of the host ----------------------------------------------------------------------------


@only_here
def test_waits_of_the_host_are_counted() -> None:
    import fakecuda

    x = cuda(1, 2)
    with fakecuda.host_waits() as found:
        y = (x + 1).cumsum(0)
        y.to("cuda", torch.float64)
        assert not found
        y.sum().item()
        y.cpu()
        torch.nonzero(y)
        torch.cuda.synchronize()
    why = {where.split("(")[1].rstrip(")") for where in found}
    assert why == {"item", "copy to the host", "aten::nonzero", "synchronize"}
    assert found.total() == 4


# --- where it is, and where it may not be ---------------------------------------------------------


@only_here
def test_a_torch_or_a_machine_with_a_gpu_is_refused(tmp_path: Path) -> None:
    from fakecuda import build

    torch_folder = tmp_path / "torch"
    torch_folder.mkdir()
    version = "__version__ = '{}'\ncuda: Optional[str] = {}\nhip: Optional[str] = {}\n"
    (torch_folder / "version.py").write_text(version.format("2.99.0+cpu", "None", "None"))
    nothing = tmp_path / "dev"
    nothing.mkdir()
    assert build.why_refused(torch_folder, devices=nothing) == ""
    for_cpu = build.library_of(torch_folder)
    (nothing / "nvidia0").touch()
    assert "has a GPU" in build.why_refused(torch_folder, devices=nothing)
    (nothing / "nvidia0").unlink()
    for text in (
        version.format("2.99.1", "'12.8'", "None"),
        version.format("2.99.1", "None", "'6'"),
    ):
        (torch_folder / "version.py").write_text(text)
        assert "is built for" in build.why_refused(torch_folder, devices=nothing)
    assert build.library_of(torch_folder) != for_cpu, "one for each torch"
    assert "no-such-compiler is missing" in build.why_not(torch_folder, compiler="no-such-compiler")


@only_here
def test_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a node of eight, a rank sees as many as there are ranks. They can be hidden."""
    import fakecuda

    def seen() -> tuple[bool, int]:
        fakecuda.read_settings()
        return torch.cuda.is_available(), torch.cuda.device_count()

    assert seen() == (True, 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert seen() == (True, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert seen() == (False, 0)
    monkeypatch.undo()
    assert seen() == (True, 8)
