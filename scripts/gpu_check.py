"""Check every CUDA path of this project on one GPU, in less than nine minutes.

    python scripts/gpu_check.py                        on a machine with a GPU
    python scripts/gpu_check.py --only loss_tiles      some of the checks; --help lists them
    python scripts/gpu_check.py --rehearse             the same code on a CPU, with tiny shapes

Needs torch, transformers and pydantic, and for runs of `Trainer` what else pyproject.toml lists; a
check that lacks a package is skipped and names it. Each check runs in a process of its own and
cannot stop the next one. It has a line: a verdict (ok, FAILED, skipped,
TOO LONG), its seconds, and figures. All of it goes to gpu_check.json too, where a failure has its
traceback. Exits with 1 if a check has failed. scripts/gpu_check_8.py is for a node of eight.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
Figures = dict[str, Any]


class Skip(Exception):
    """A check that this machine cannot run, with the reason."""


@dataclass(frozen=True)
class Scale:
    """The sizes of the checks: those of a GPU, or tiny ones for a rehearsal on a CPU."""

    device: str
    tokens: int
    """of the sequences whose gradients and speed are looked at"""
    long: tuple[int, ...]
    """of the sequences whose memory is compared with the plan"""
    width: int
    inner: int
    vocabulary: int
    heads: tuple[int, int]
    """query heads, KV heads, of `head_size`"""
    head_size: int
    documents: int
    """how many documents of `document` tokens make more than 2^31 elements of queries"""
    document: int
    host_bytes: int

    @property
    def rehearses(self) -> bool:
        return self.device == "cpu"


REAL = Scale(
    "cuda", 2**16, (2**16, 2**17), 4096, 14_336, 128_256, (32, 8), 128, 66, 8192, 16 * 2**30
)
TINY = Scale("cpu", 256, (128,), 32, 48, 257, (4, 2), 8, 3, 16, 2**20)


def llama(scale: Scale, layers: int) -> dict[str, Any]:
    """Return the config of a llama of the scale's widths (on a GPU those of Llama-3-8B)."""
    heads, kv_heads = scale.heads
    table = {"model_type": "llama", "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
    table |= {"vocab_size": scale.vocabulary, "bos_token_id": 256, "eos_token_id": 256}
    table |= {"hidden_size": scale.width, "intermediate_size": scale.inner}
    table |= {"num_hidden_layers": layers, "max_position_embeddings": 2**20}
    table |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return table | {"head_dim": scale.head_size}


# --- 1. versions and imports ----------------------------------------------------------------------


def versions(scale: Scale) -> Figures:
    """Versions, the GPU, and which attention is the default on it."""
    import torch
    import transformers

    from titan_ulysses.launch.host import visible_gpus
    from titan_ulysses.memory.loss_head import can_add_wide

    found: Figures = {"torch": torch.__version__, "transformers": transformers.__version__}
    found["python"] = sys.version.split()[0]
    for package in ("torchao", "flash_attn", "flash_attn_interface", "pydantic", "pytest"):
        found[package] = importlib.util.find_spec(package) is not None
    found["gpus"] = visible_gpus()
    if not scale.rehearses:
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gib": round(properties.total_memory / 2**30, 1)}
        found |= {"capability": f"{properties.major}.{properties.minor}"}
        found |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    found["addmm_adds_bf16_to_fp32"] = can_add_wide()
    if not found["pydantic"]:
        return found | {"missing": "pydantic, which nearly all checks need"}
    from titan_ulysses.ulysses.cores import CoreRequirements, choose_core

    for dtype in (torch.bfloat16, torch.float32):
        core, _ = choose_core("auto", CoreRequirements(frozenset(), scale.device, dtype))
        found[f"core_{str(dtype).removeprefix('torch.')}"] = core.__name__
    return found


# --- 2. Trainer -----------------------------------------------------------------------------------


def config_of(scale: Scale, folder: str, **settings: Any) -> Any:
    """Return the config of a small run of two steps, with settings such as training__steps=3."""
    from titan_ulysses.config.schema import Config

    tiny = llama(TINY, 2) | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    values: dict[str, dict[str, Any]] = {
        "job": {"dump_folder": folder},
        "model": {"tokenizer": "bytes", "config": tiny},
        "data": {"path": "{stdlib}/argparse.py", "encoding": "bytes"},
        "training": {"seq_len": 512, "steps": 2},
        "checkpoint": {"export": False, "enable": False},
    }
    for key, value in settings.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return Config.model_validate(values)


def config_of_llama(scale: Scale, folder: str, *, layers: int, tokens: int, **settings: Any) -> Any:
    """The same of a model of the scale's widths, with its checkpoints on the host."""
    settings |= {"model__config": llama(scale, layers), "training__seq_len": tokens}
    settings["data__path"] = f"{{stdlib}}/{'argparse' if scale.rehearses else '*'}.py"
    return config_of(scale, folder, activation_checkpoint__offload="host", **settings)


def logged(folder: str) -> list[Figures]:
    """Return the lines of metrics.jsonl of the run in folder."""
    lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line]


def run_trainer(config: Any, kind: type | None = None) -> None:
    """Run `Trainer`, or a kind of it, in this process, as train.py does, without its console."""
    from titan_ulysses.train.trainer import Trainer

    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        (kind or Trainer)(config).train()


def renew_threads() -> None:
    """Let torch make its pool of threads again, in a fork: two threads that ask for it at once, as
    autograd's do, find none there ("Invalid thread pool").
    """
    import torch

    torch.set_num_threads(torch.get_num_threads())


def in_fork(fn: Callable[..., Any], *arguments: Any) -> int:
    """Call fn in a process of its own, whose allocator's peak begins at 0; return its status."""
    pid = os.fork()
    if pid == 0:
        try:
            renew_threads()
            fn(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def trainer(scale: Scale, **settings: Any) -> Figures:
    """Two steps of a tiny model."""
    name = str(settings.get("optimizer__name", "adamw"))
    if name != "adamw" and importlib.util.find_spec("torchao") is None:
        raise Skip("needs torchao")
    if scale.rehearses and settings.get("compile__enable"):
        import torch

        torch.compile = partial(torch.compile, backend="eager")  # generating code takes too long
    with tempfile.TemporaryDirectory() as folder:
        run_trainer(config_of(scale, folder, **settings))
        first, last = logged(folder)[0], logged(folder)[-1]
    assert last["step"] == 2 and 0 < last["loss"] < 7, last
    return {"losses": [round(first["loss"], 4), round(last["loss"], 4)]}


# --- 3. pytest ------------------------------------------------------------------------------------


def pytest_gpu(scale: Scale) -> Figures:
    """The tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("needs pytest")
    # One file, which imports little and has no such test.
    files = ["tests/test_chaos.py"] if scale.rehearses else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    # 5: no test is left, as in a rehearsal.
    assert done.returncode in (0, 5 if scale.rehearses else 0), done.stdout[-4000:]
    counts = re.findall(r"\d+ (?:passed|failed|skipped|deselected)", done.stdout)
    skipped = re.findall(r"^\d+ skipped: (.*)$", done.stdout, re.M)
    return {"tests": ", ".join(dict.fromkeys(counts))} | ({"skipped": skipped} if skipped else {})


# --- 4. offload -----------------------------------------------------------------------------------


def sharded_llama(
    scale: Scale,
    layers: int,
    *,
    tokens: int = 0,
    documents: tuple[int, ...] = (),
    table: dict[str, Any] | None = None,
    dropout: float = 0,
    **options: Any,
) -> tuple[Any, dict[str, Any], Any]:
    """Return a llama on this device, a batch of one sequence, and the mesh.

    tokens: of the sequence; 0: those of the scale. documents: their lengths; empty: one. table:
    changes of the model's config. dropout: of the adapters that are trained then.
    """
    import torch

    from titan_ulysses import build_mesh, parallelize
    from titan_ulysses.config.schema import LoRA
    from titan_ulysses.model import hf
    from titan_ulysses.model.lora import add_adapters, initialize_adapters

    mesh = build_mesh()
    table = llama(scale, layers) | {"vocab_size": min(scale.vocabulary, 32_000)} | (table or {})
    dtype = torch.float32 if scale.rehearses else torch.bfloat16
    model = hf.build_on_meta(hf.load_model_config("", table), dtype)
    if dropout:
        add_adapters(model, LoRA(rank=4, dropout=dropout))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fragmentation
        parallelize(model, mesh, param_dtype=dtype, **options)
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=0)
    if dropout:
        initialize_adapters(model, seed=0)
    generator, tokens = torch.Generator().manual_seed(0), tokens or scale.tokens
    documents = documents or (tokens,)
    ids = torch.randint(table["vocab_size"], (1, tokens), generator=generator)
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "position_ids": positions}
    batch = {name: x.to(mesh.device) for name, x in batch.items()}
    batch["num_items_in_batch"] = torch.tensor(tokens, device=mesh.device)
    return model, batch | {"documents": (documents,)}, mesh


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> list[Any]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach().cpu(), *(p.grad.to_local().cpu() for p in trained)]


def offload_bits(scale: Scale) -> Figures:
    """Losses and gradients with checkpoints on the device, on the host and in files: equal bits."""
    import torch

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    found, seconds = {}, {}
    for offload in ("none", "host", "disk"):
        model, batch, _ = sharded_llama(scale, 4, activation_checkpoint={"offload": offload})
        loss_and_gradients(model, batch)  # warms up
        started = time.perf_counter()
        found[offload] = loss_and_gradients(model, batch)
        seconds[offload] = round(time.perf_counter() - started, 3)
        del model
    for offload in ("host", "disk"):
        pairs = enumerate(zip(found["none"], found[offload], strict=True))
        differing = [number for number, (a, b) in pairs if not torch.equal(a, b)]
        assert not differing, f"{offload}: tensors {differing} differ"
    return {"loss": round(found["none"][0].item(), 4), "seconds": seconds}


def copies_beside_kernels(scale: Scale) -> Figures:
    """How much of the time of offloaded copies passes while kernels run."""
    found: Figures = {}
    for offload in ("host", "disk"):
        shares = hidden_copies(scale, activation_checkpoint={"offload": offload})
        found |= {f"{offload} {way}": said for way, said in shares.items()}
    return found


def hidden_copies(scale: Scale, **options: Any) -> Figures:
    """Return for each direction how many copies a step has, and the share of their time that passes
    while kernels run, at least half of it.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    found: Figures = {}
    model, batch, _ = sharded_llama(scale, 4, **options)
    loss_and_gradients(model, batch)
    gpu = [] if scale.rehearses else [ProfilerActivity.CUDA]
    with profile(activities=[*gpu, ProfilerActivity.CPU]) as profiler:
        loss_and_gradients(model, batch)
        if gpu:
            torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type.name == "CUDA"]
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in events]
    kernels = [(start, end) for name, start, end in spans if not name.startswith("Mem")]
    for way in ("DtoH", "HtoD"):
        copies = [(a, b) for name, a, b in spans if way in name and b - a > 100]
        total = sum(end - start for start, end in copies)
        hidden = sum(overlap(copy, merged(kernels)) for copy in copies)
        if total:
            found[way] = f"{len(copies)}, {hidden / total:.0%} hidden"
        assert scale.rehearses or (copies and hidden > 0.5 * total), (way, total, hidden)
    return found


def merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the union of time spans, as spans that do not touch."""
    union: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def overlap(span: tuple[float, float], union: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(span[1], end) - max(span[0], start)) for start, end in union)


# --- 5. attention ---------------------------------------------------------------------------------


def core_named(scale: Scale, name: str) -> Any:
    """Return a core; Skip, with the reason, where it cannot be had here."""
    import torch

    from titan_ulysses.distributed.errors import UserError
    from titan_ulysses.ulysses.cores import CoreRequirements, choose_core

    dtype = torch.float32 if scale.rehearses else torch.bfloat16
    try:
        return choose_core(name, CoreRequirements(frozenset(), scale.device, dtype))[0]
    except UserError as error:
        raise Skip(str(error)) from error


def random_qkv(scale: Scale, tokens: int, heads: tuple[int, int]) -> list[Any]:
    import torch

    dtype = torch.float32 if scale.rehearses else torch.bfloat16
    shapes = [(1, tokens, n, scale.head_size) for n in (heads[0], heads[1], heads[1])]
    generator = torch.Generator(scale.device).manual_seed(0)
    options: dict[str, Any] = {"device": scale.device, "dtype": dtype, "generator": generator}
    return [torch.randn(shape, **options).requires_grad_() for shape in shapes]


def beyond_int32(scale: Scale) -> Figures:
    """One call on more than 2^31 elements against a call on its last document alone."""
    import torch

    name = "sdpa" if scale.rehearses else "varlen"
    core, length = core_named(scale, name), scale.document
    whole = random_qkv(scale, scale.documents * length, scale.heads)
    last = [x[:, -length:].detach().clone().requires_grad_() for x in whole]
    options = {"scale": scale.head_size**-0.5}
    found = core(*whole, documents=((length,) * scale.documents,), **options)
    expected = core(*last, documents=((length,),), **options)
    difference = (found[:, -length:] - expected).abs().max().item()
    upstream = torch.zeros_like(found)
    upstream[:, -length:] = 1.0
    ours = torch.autograd.grad(found, whole, upstream)
    theirs = torch.autograd.grad(expected, last, torch.ones_like(expected))
    pairs = zip(ours, theirs, strict=True)
    gradients = max((a[:, -length:] - b).abs().max().item() for a, b in pairs)
    elsewhere = max(a[:, :-length].abs().max().item() for a in ours)
    assert difference < 1e-2 and gradients < 5e-2 and elsewhere == 0, (difference, gradients)
    elements = whole[0].numel()
    return {"core": name, "elements": elements, "difference": difference, "gradients": gradients}


def packed_windows(scale: Scale) -> Figures:
    """Gradients of packed documents through windows, in chunks and whole.

    The documents begin fewer keys before a chunk than the chunk has queries, where a kernel's rule
    for the keys right of a query counts.
    """
    found: Figures = {}
    unit = scale.tokens // 64
    table = {"model_type": "mistral", "sliding_window": 12 * unit}
    for lengths in ((11, 53), (30, 34), (5, 24, 35)):
        documents, results = tuple(unit * length for length in lengths), []
        for chunk in (-1, scale.tokens // 4):
            own: Figures = {"documents": documents, "memory": {"stream_chunk_tokens": chunk}}
            model, batch, _ = sharded_llama(scale, 2, table=table, **own)
            results.append(loss_and_gradients(model, batch))
            del model, batch
        pairs = [(a.double(), b.double()) for a, b in zip(*results, strict=True)]
        found[str(list(documents))] = max(((a - b).norm() / a.norm()).item() for a, b in pairs)
        assert all((a - b).norm() < 0.02 * a.norm() for a, b in pairs), found
    return found


def attention_rates(scale: Scale) -> Figures:
    """TFLOP/s, forward and backward, and the kernel's name, of each attention there is."""
    import torch

    found: Figures = {}
    heads = (8, 2) if not scale.rehearses else scale.heads
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    kernels = ("varlen, FA2", "varlen, FA3", "varlen, FA4")
    for label in ("sdpa", "flex", "flash", *kernels):
        name, _, kernel = label.partition(", ")
        switch = "" if kernel == "FA2" else kernel  # what is there without a switch
        try:
            core = core_named(scale, name)
            if switch:
                if activate is None or scale.rehearses:
                    raise Skip("cannot be activated here")
                activate(switch)
            found[label] = rate_of(scale, core, heads)
        except Exception as error:  # each by itself
            found[label] = f"no: {str(error).splitlines()[0][:120] if str(error) else error!r}"
    assert any(isinstance(value, dict) for value in found.values()), found
    return found


def rate_of(scale: Scale, core: Any, heads: tuple[int, int]) -> Figures:
    from torch.profiler import ProfilerActivity, profile

    inputs = random_qkv(scale, scale.tokens, heads)
    attend = partial(core, documents=((scale.tokens,),), scale=scale.head_size**-0.5)
    # Two products of [S, S / 2] by the head size; backward has five.
    flops = 2 * scale.tokens**2 * heads[0] * scale.head_size
    output = attend(*inputs)
    forward = seconds_of(scale, lambda: attend(*inputs))
    backward = seconds_of(scale, lambda: output.backward(output.detach(), retain_graph=True))
    activity = ProfilerActivity.CPU if scale.rehearses else ProfilerActivity.CUDA
    with profile(activities=[activity]) as profiler:
        attend(*inputs)
        wait(scale)
    slowest = max(profiler.key_averages(), key=lambda event: event.self_device_time_total)
    rates = {"forward": flops / forward / 1e12, "backward": 2.5 * flops / backward / 1e12}
    return {way: round(rate, 1) for way, rate in rates.items()} | {"kernel": slowest.key[:80]}


def wait(scale: Scale) -> None:
    import torch

    if not scale.rehearses:
        torch.cuda.synchronize()


def seconds_of(scale: Scale, fn: Callable[[], Any], times: int = 3) -> float:
    """Return the median seconds of a call, after one that warms up."""
    found = []
    for _ in range(times + 1):
        wait(scale)
        started = time.perf_counter()
        fn()
        wait(scale)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


# --- 6. memory ------------------------------------------------------------------------------------


def planned_memory(scale: Scale) -> Figures:
    """Two layers of Llama-3-8B's widths, checkpoints on the host: allocated against planned."""
    found: Figures = {}
    for tokens in scale.long:
        with tempfile.TemporaryDirectory() as folder:
            config = config_of_llama(scale, folder, layers=2, tokens=tokens)
            status = in_fork(run_trainer, config)
            assert status == 0, f"{tokens} tokens: the run ended with {status}"
            last = logged(folder)[-1]
        measured, planned = last["peak_memory_gib"], last["planned_memory_gib"]
        found[str(tokens)] = {"gib": round(measured, 2), "step": round(last["step_seconds"], 2)}
        if planned is not None:
            found[str(tokens)] |= {"planned": round(planned, 2), "off": measured / planned - 1}
        assert scale.rehearses or planned is not None, "no plan was made"
        assert planned is None or abs(measured / planned - 1) < 0.1, found
    return found


def loss_tiles(scale: Scale) -> Figures:
    """Seconds and memory of the loss head, by the tokens of a tile."""
    import torch

    from titan_ulysses.memory.loss_head import LossHead, automatic_tile

    tokens = scale.tokens // 4
    dtype = torch.float32 if scale.rehearses else torch.bfloat16
    options: dict[str, Any] = {"device": scale.device, "dtype": dtype}
    linear = torch.nn.Linear(scale.width, scale.vocabulary, bias=False, **options)
    hidden = torch.randn(1, tokens, scale.width, **options).requires_grad_()
    labels = torch.randint(scale.vocabulary, (1, tokens), device=scale.device)
    found: Figures = {"automatic": automatic_tile(scale.vocabulary, scale.device)}
    losses = []
    for tile in (130, 1024, 2048):
        head = LossHead(linear, tile_tokens=tile, device_type=scale.device)

        def step(head: Any = head) -> None:
            loss = head(hidden, labels, torch.tensor(tokens, device=scale.device))
            loss.backward()
            losses.append(loss.item())

        if not scale.rehearses:
            torch.cuda.reset_peak_memory_stats()
        seconds = seconds_of(scale, step)
        flops = 6 * tokens * scale.width * scale.vocabulary
        rate = round(flops / seconds / 1e12, 1)
        found[str(tile)] = {"seconds": round(seconds, 4), "tflops": rate}
        if not scale.rehearses:
            found[str(tile)]["gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    assert max(losses) - min(losses) < 1e-4 * max(losses), losses
    return found


def page_locking(scale: Scale) -> Figures:
    """GiB/s of locking host memory, of copies both ways, and of all that again."""
    import torch

    from titan_ulysses.memory.offload import available_host_memory, open_store

    if scale.host_bytes > 0.8 * available_host_memory():
        raise Skip(f"needs {scale.host_bytes / 2**30:.0f} GiB of free host memory")
    store, gib = open_store("host", None, torch.device(scale.device)), scale.host_bytes / 2**30
    part = scale.host_bytes // 8
    there = torch.zeros(part, dtype=torch.uint8, device=scale.device)
    found: Figures = {}
    assert store is not None
    for turn in ("first", "again"):
        started = time.perf_counter()
        buffers = [store.make_buffer(part, torch.device(scale.device)) for _ in range(8)]
        locking = time.perf_counter() - started

        def out(buffers: list[Any] = buffers) -> None:
            for buffer in buffers:
                buffer.copy_(there, non_blocking=True)

        def back(buffers: list[Any] = buffers) -> None:
            for buffer in buffers:
                there.copy_(buffer, non_blocking=True)

        rates = {"lock": gib / locking}
        rates |= {way.__name__: gib / seconds_of(scale, way, times=1) for way in (out, back)}
        found[turn] = {name: round(rate, 1) for name, rate in rates.items()}
        del buffers
    return found


# --- 7. resume ------------------------------------------------------------------------------------


def resumed_bits(scale: Scale) -> Figures:
    """Two steps, against one step, a kill, and a second one: the same bits?"""
    found: Figures = {}
    # On the CPU of a rehearsal, both are the same.
    for deterministic in (True,) if scale.rehearses else (True, False):
        lines = {}
        for name in ("whole", "killed"):
            with tempfile.TemporaryDirectory() as folder:
                own = {"training__deterministic": deterministic, "checkpoint__interval": 1}
                config = config_of(scale, folder, checkpoint__enable=True, **own)
                for _ in range(1 if name == "whole" else 2):
                    status = in_fork(run_and_die, config, name == "killed")
                    assert status in (0, signal.SIGKILL), f"{name}: the run ended with {status}"
                lines[name] = logged(folder)[-1]
        equal = all(lines["whole"][key] == lines["killed"][key] for key in ("loss", "grad_norm"))
        assert lines["killed"]["step"] == 2
        found["deterministic" if deterministic else "not"] = "same" if equal else "other bits"
        assert equal or not deterministic, lines
    return found


def run_and_die(config: Any, dies: bool) -> None:
    """Run `Trainer`, and die by SIGKILL once the checkpoint of the first step is there."""
    from titan_ulysses.train.trainer import Trainer

    class Mortal(Trainer):
        def save(self) -> None:
            super().save()
            if dies and self.state.step == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    run_trainer(config, Mortal)


NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"

# --- all of them ----------------------------------------------------------------------------------

Check = Callable[[Scale], Figures]
EIGHT_BITS: dict[str, Any] = {"optimizer__name": "adamw8bit"}
EACH_STEP: dict[str, Any] = {"checkpoint__enable": True, "checkpoint__interval": 1}
CHECKS: dict[str, tuple[Check, float]] = {
    "versions": (versions, 60),
    "trainer_bf16": (trainer, 60),
    "trainer_fp32": (partial(trainer, training__param_dtype="float32"), 60),
    "trainer_compile": (partial(trainer, compile__enable=True), 90),
    "trainer_8bit": (partial(trainer, **EIGHT_BITS, optimizer__stochastic_rounding=True), 90),
    "trainer_async": (partial(trainer, checkpoint__async_mode="async", **EACH_STEP), 60),
    "trainer_skip": (partial(trainer, training__skip_nonfinite=1), 60),
    "trainer_skip_8bit": (partial(trainer, training__skip_nonfinite=1, **EIGHT_BITS), 90),
    "pytest_gpu": (pytest_gpu, 120),
    "offload_bits": (offload_bits, 90),
    "copies_beside_kernels": (copies_beside_kernels, 60),
    "beyond_int32": (beyond_int32, 60),
    "packed_windows": (packed_windows, 60),
    "planned_memory": (planned_memory, 120),
    "attention_rates": (attention_rates, 120),
    "loss_tiles": (loss_tiles, 60),
    "page_locking": (page_locking, 60),
    "resumed_bits": (resumed_bits, 120),
}
"""The checks in their order, each with the seconds that it may take."""


def answer(check: Check, scale: Scale, connection: Connection) -> None:
    """Run a check in this process, a child, and send its verdict."""
    os.setsid()  # so that what it starts ends with it
    os.environ.pop(NVML, None)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    result: Figures = {"verdict": "ok"}
    try:
        renew_threads()
        if scale.rehearses:
            import torch

            torch.set_num_threads(1)
        result["figures"] = check(scale)
    except Skip as reason:
        result |= {"verdict": "skipped", "why": str(reason)}
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("titan_ulysses"):
            result |= {"verdict": "FAILED", "why": repr(error), "traceback": traceback.format_exc()}
        else:
            result |= {"verdict": "skipped", "why": f"needs {error.name}, which is not installed"}
    except BaseException as error:
        lines = str(error).strip().splitlines() or [""]
        why = f"{type(error).__name__}: {lines[0][:300]}"
        result |= {"verdict": "FAILED", "why": why, "traceback": traceback.format_exc()}
    connection.send(result)
    connection.close()
    sys.stdout.flush()
    os._exit(0)


def run_check(check: Check, scale: Scale, seconds: float) -> Figures:
    """Run a check in a process of its own, for so many seconds at most; return its verdict.

    The process is a fork: torch and transformers are imported, and CUDA is not yet in use.
    """
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=answer, args=(check, scale, theirs))
    started = time.perf_counter()
    process.start()
    assert process.pid is not None
    theirs.close()
    result: Figures = {"verdict": "TOO LONG", "why": f"not finished after {seconds:.0f} s"}
    with suppress(EOFError):
        if ours.poll(seconds):
            result = {"verdict": "FAILED", "why": "the process died"}
            result = ours.recv()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if result.get("why") == "the process died":
        result["why"] += f" with exit code {process.exitcode}"
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def run_checks(
    checks: dict[str, tuple[Check, float]], scale: Scale, *, seconds: float
) -> dict[str, Figures]:
    """Run all checks one after the other, and print a line for each."""
    ends, results = time.perf_counter() + seconds, {}
    for name, (check, limit) in checks.items():
        left = ends - time.perf_counter()
        if left > 5:
            results[name] = run_check(check, scale, min(limit, left))
        else:
            results[name] = {"verdict": "skipped", "why": "no time is left", "seconds": 0.0}
        result = results[name]
        said = result.get("why") or json.dumps(result["figures"])
        print(f"{result['verdict']:<9}{name:<23}{result['seconds']:6.1f} s  {said}", flush=True)
    return results


def preload() -> None:
    """Import what the checks use, once for all of them.

    CUDA must not start here: a fork of a process that uses it cannot use it. So libraries that ask
    for GPUs while they are imported are answered by NVML. What is missing is reported by the checks
    that need it.
    """
    os.environ[NVML] = "1"
    for module in (
        "titan_ulysses.setup.parallelize",
        "titan_ulysses.train.trainer",
        "transformers.models.llama.modeling_llama",
        "tensorboard.summary.writer.record_writer",
    ):
        with suppress(ImportError):
            importlib.import_module(module)


def check_all(
    argv: list[str],
    checks: dict[str, tuple[Check, float]],
    script: Path,
    about: str,
    minutes: float,
) -> int:
    """Run the checks that the arguments ask for; return the exit code of the script."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--only", nargs="+", choices=checks, help="these checks only")
    parser.add_argument("--minutes", type=float, default=minutes, help="for all of them")
    parser.add_argument("--output", default=f"{script.stem}.json", help="file for all results")
    args = parser.parse_args(argv)
    if args.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    preload()
    scale = TINY if args.rehearse else REAL
    # A CPU may be busy with something else.
    slower = 10 if args.rehearse else 1
    chosen = {name: checks[name] for name in args.only or checks}
    limited = {name: (check, slower * limit) for name, (check, limit) in chosen.items()}
    results = run_checks(limited, scale, seconds=slower * 60 * args.minutes)
    Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    failed = [name for name, r in results.items() if r["verdict"] in ("FAILED", "TOO LONG")]
    passed = f"{len(results) - len(failed)} of {len(results)}"
    print(f"{passed} without a failure; all of it: {args.output}")
    return 1 if failed else 0


def main(argv: list[str]) -> int:
    return check_all(argv, CHECKS, Path(__file__), str(__doc__), minutes=9)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
