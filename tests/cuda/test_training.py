"""Training on the device: by train.py with a TOML, as on the CPU; and the library in a loop, at
random moments of the copies, against unmodified transformers on the CPU.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from itertools import product
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from helpers import training
from helpers.device import on_device, what_is_wrong
from helpers.families import model_of
from helpers.forked import start
from helpers.meshes import DP2, ONE, SP2
from helpers.models import STARCODER2
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.rows import make_rows
from helpers.runs import learned, write_run
from helpers.training import Record, train_plain, train_sharded
from test_lora import fill
from titan_ulysses.config.schema import LoRA
from titan_ulysses.memory.offload import open_store
from titan_ulysses.model.lora import add_adapters
from titan_ulysses.train.step import train_step

pytestmark = pytest.mark.cuda(only=True)
REPOSITORY = Path(__file__).resolve().parents[2]

# --- train.py -------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "host": {"activation_checkpoint.offload": "host"},
    "disk": {"activation_checkpoint.offload": "disk", "memory.optimizer_offload": True},
    "streamed": {"memory.stream_chunk_tokens": 8, "memory.stream_offload": "host"},
    "streamed to disk": {"memory.stream_chunk_tokens": 8, "memory.stream_offload": "disk"},
}


def losses(folder: Path, ranks: int, settings: dict[str, Any], **env: str) -> list[tuple]:
    folder.mkdir()
    config = write_run(folder)
    options = {"training.steps": 2, "parallelism.sequence_parallel_degree": ranks, **settings}
    words = [word for k, v in options.items() for word in (f"--{k}", json.dumps(v).strip('"'))]
    command = ["scripts/launch.py", "--nproc-per-node", str(ranks), "train.py", "--config", config]
    said = start(folder / "said", *command, *words, cwd=REPOSITORY, **env)
    out, err = said.communicate(timeout=200)
    assert said.returncode == 0, out + err
    kind = "cpu" if env.get("CUDA_VISIBLE_DEVICES") == "" else "cuda"
    assert f" on {kind}; " in out, out
    return learned(folder / "outputs" / "run")


def _runs() -> list[Any]:
    """Streamed on two ranks; the others with --slow: the library's cases below run to disk too."""
    quick = (2, "streamed")
    return [
        pytest.param(ranks, name, marks=[] if (ranks, name) == quick else [pytest.mark.slow])
        for ranks, name in product((1, 2), RUNS)
    ]


@pytest.mark.parametrize(("ranks", "settings"), _runs())
def test_train_py_trains_as_on_the_cpu(tmp_path: Path, ranks: int, settings: str) -> None:
    found = losses(tmp_path / "cuda", ranks, RUNS[settings], FAKECUDA_COPIES="late")
    expected = losses(tmp_path / "cpu", ranks, RUNS["plain"], CUDA_VISIBLE_DEVICES="")
    assert len(found) == 2 and sum(found, ()) == pytest.approx(sum(expected, ()), rel=2e-5)


# --- the library ----------------------------------------------------------------------------------

STEPS = 2
DOCUMENTS = [[13, 7, 12], [20, 12]]
LIBRARY: dict[str, dict[str, Any]] = {
    "plain": {},
    "host": {"offload": "host"},
    "disk": {"offload": "disk", "checkpoint_every": 2},
    "kept": {"stream_chunk_tokens": 8, "offload": "host", "keep_attention": "all"},
    "streamed": {"stream_chunk_tokens": 8},
    "streamed, host": {"stream_chunk_tokens": 8, "stream_offload": "host"},
    "streamed, disk": {"stream_chunk_tokens": 8, "stream_offload": "disk"},
    "streamed, host, kept": {
        "stream_chunk_tokens": 8,
        "stream_offload": "host",
        "keep_attention": "all",
        "checkpoint_every": 2,
    },
}


def rows() -> list[list[list[Any]]]:
    """Two micro-batches a step."""
    return [
        [make_rows(DOCUMENTS, masked="uneven", vocab_size=61, seed=10 * s + m) for m in range(2)]
        for s in range(STEPS)
    ]


@lru_cache
def expected() -> Record:
    return kept_in_fp64(train_plain, STARCODER2, rows(), torch.float64)


def train_in_fp64(*args: Any, **options: Any) -> Record:
    return kept_in_fp64(train_sharded, *args, **options)


MOMENTS = [("late", 0), ("random", 1), ("random", 2), ("random", 3)]


def _cases() -> list[Any]:
    """With random moments, and with more ranks, what copies; all of it with --slow."""
    cases = []
    for (n, name), (m, moments), degrees in product(
        enumerate(LIBRARY), enumerate(MOMENTS), (ONE, SP2, DP2)
    ):
        quick = (m == n % 4 and degrees != DP2) or (name == "streamed, host" and degrees == SP2)
        marks = [] if quick else [pytest.mark.slow]
        id_ = f"{name}-{moments[0]}{moments[1]}-{'x'.join(map(str, degrees))}"
        cases.append(pytest.param(name, moments, degrees, marks=marks, id=id_))
    return cases


@pytest.mark.parametrize(("options", "moments", "degrees"), _cases())
def test_the_library_trains_as_transformers_does(options, moments, degrees) -> None:
    found = run_on_ranks(
        prod(degrees),
        on_device,
        *moments,
        train_in_fp64,
        degrees,
        STARCODER2,
        rows(),
        torch.float64,
        **LIBRARY[options],
    )
    assert not what_is_wrong(found, expected(), within=1e-10)


# In fp32 experts are grouped products, in fp64 batched ones. Recurrences and the scores of keys and
# experts are in fp32 in both.
IN_FP32 = ("qwen3_next", "granitemoehybrid", "nemotron_h", "deepseek_v32")
LAYERS = (*IN_FP32, "lfm2", "qwen3_moe", "gpt_oss")


def _layers() -> list[Any]:
    """A recurrence, experts by groups, a chunk that needs the state of the one before, and keys
    that are chosen.
    """
    quick = [
        ("qwen3_next", torch.float32, "plain", SP2),
        ("granitemoehybrid", torch.float64, "streamed, host", ONE),
        ("lfm2", torch.float64, "streamed, host", SP2),
        ("deepseek_v32", torch.float64, "streamed, host", SP2),
    ]
    return [
        pytest.param(
            *case, marks=[] if case in quick else [pytest.mark.slow], id="-".join(map(str, case))
        )
        for case in product(
            LAYERS, (torch.float32, torch.float64), ("plain", "streamed, host"), (ONE, SP2)
        )
    ]


@pytest.mark.parametrize(("family", "dtype", "options", "degrees"), _layers())
def test_layers_with_states_and_experts(family: str, dtype, options: str, degrees) -> None:
    inputs = model_of(family), rows(), dtype
    found = run_on_ranks(
        prod(degrees), on_device, "random", 1, train_sharded, degrees, *inputs, **LIBRARY[options]
    )
    exact = dtype == torch.float64 and family not in IN_FP32
    assert not what_is_wrong(found, train_plain(*inputs), within=1e-10 if exact else 1e-4)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_the_host_does_not_wait_for_hidden_states_that_a_decoder_hands_on(family: str) -> None:
    """Not in more places than with all of them on the device, nor more often; it waits for granite,
    whose decoder multiplies embeddings: for them and for cos and sin in forward, and for their
    gradient in backward, each in every micro-batch.
    """
    inputs = "random", 1, train_in_fp64, ONE, model_of(family), rows(), torch.float64
    on_it, off_it = (
        run_on_ranks(1, on_device, *inputs, stream_chunk_tokens=8, stream_offload=where)[0]
        for where in ("none", "host")
    )
    assert not off_it.refused and not off_it.races
    more = sum((off_it.waits - on_it.waits).values())
    assert more == (0 if family == "llama" else 3 * 2 * STEPS), off_it.waits - on_it.waits


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_graph_that_is_dropped_leaves_no_copy_behind(kind: str, tmp_path: Path) -> None:
    """Neither into memory that is used again, nor from a buffer that is."""
    import fakecuda

    fakecuda.races()
    with fakecuda.setting(copies="late"):
        store = open_store(kind, tmp_path, torch.device("cuda", 0))
        for _ in range(3):
            first, second = (store.keep(torch.ones(512, device="cuda")) for _ in range(2))
            store.keep(torch.ones(2048, device="cuda"))  # the others have left the device
            assert store.get(second).sum() == 512  # and the first one is on its way back
            del first, second
        torch.cuda.synchronize()
    assert not fakecuda.races()


def add_with_dropout(model: torch.nn.Module) -> None:
    add_adapters(model, LoRA(rank=3, dropout=0.4))


class Interrupted(Exception):
    """What ends a step in its middle."""


def train_interrupted(seed: int, *args: Any, **options: Any) -> Record:
    """Adapters with dropout, two micro-batches a step. The second step ends at a call of the first
    block's norm, of forward or of what backward computes again, that is drawn from seed (0: does
    not). It is begun again.
    """
    calls: Counter[int] = Counter()
    number, once = 0, True

    def note(*_: Any) -> None:
        nonlocal once
        calls[number] += 1
        if seed and number == 2 and once and calls[2] == 1 + Random(seed).randrange(calls[1]):
            once = False
            raise Interrupted

    def fill_and_watch(model: torch.nn.Module) -> None:
        fill(model)
        model.model.layers[0].input_layernorm.register_forward_pre_hook(note)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *rest: Any, **more: Any):
        nonlocal number
        number += 1
        for _ in range(2):
            torch.manual_seed(number)
            try:
                return train_step(model, optimizer, *rest, **more)
            except Interrupted:
                optimizer.zero_grad()
        raise AssertionError("interrupted twice")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train_step", step)
        record = train_sharded(*args, prepare=add_with_dropout, fill=fill_and_watch, **options)
    assert once is not bool(seed)
    return record


@lru_cache
def undisturbed(chunk: int, degrees) -> tuple[Record, set[str]]:
    """With all on the device: the numbers, and where the host waits."""
    inputs = degrees, STARCODER2, rows(), torch.float64
    found = run_on_ranks(
        prod(degrees), on_device, "now", 0, train_interrupted, 0, *inputs, stream_chunk_tokens=chunk
    )
    return found[0].record, {where for seen in found for where in seen.waits}


def _interrupted() -> list[Any]:
    quick = [("kept", 1, ONE), ("streamed, disk", 2, SP2)]
    names = ("host", "disk", "streamed, host", "streamed, disk", "kept", "streamed, host, kept")
    return [
        pytest.param(
            *case, marks=[] if case in quick else [pytest.mark.slow], id="-".join(map(str, case))
        )
        for case in product(names, (1, 2, 3), (ONE, SP2))
    ]


@pytest.mark.parametrize(("options", "seed", "degrees"), _interrupted())
def test_adapters_with_dropout_in_steps_that_fail(options: str, seed: int, degrees) -> None:
    """As with all on the device, where no step fails; and the host waits nowhere else.

    Streamed, it waits for hidden states once more: for the embeddings', and the first block's.
    """
    settings = LIBRARY[options]
    record, waits = undisturbed(settings.get("stream_chunk_tokens", -1), degrees)
    inputs = degrees, STARCODER2, rows(), torch.float64
    found = run_on_ranks(
        prod(degrees), on_device, "random", seed, train_interrupted, seed, *inputs, **settings
    )
    for seen in found:  # the thread of a store of files waits: nobody else does
        for where in [w for w in seen.waits if "offload.py" in w and " _wait (" in w]:
            del seen.waits[where]
    allowed = None if "stream_offload" in settings else waits
    assert not what_is_wrong(found, record, within=1e-10, waits=allowed)
