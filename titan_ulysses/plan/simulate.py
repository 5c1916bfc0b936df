"""Simulates the real step: this project's model, wrappers and `train_step`, on fake tensors and a
fake process group.

Nothing is computed and nothing is sent, so a laptop can run one rank of a thousand. The optimizer
makes one step before, so that its state exists. Of the tiles of a function and the chunks of a
block, at most four are run, one of which stands for all that are left out. For the same reason,
only the first two of the micro-batches that a step accumulates are run.

Memory that exists only in CUDA kernels cannot be simulated. `cuda_memory.py` adds it, each figure
with its source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from titan_ulysses.config.schema import Config
from titan_ulysses.config.validate import MeshDegrees
from titan_ulysses.data.loader import Batch
from titan_ulysses.distributed.collectives import CollectiveCounter
from titan_ulysses.distributed.mesh import Mesh, build_mesh
from titan_ulysses.distributed.parts import override_parts
from titan_ulysses.distributed.sequence import Documents, chunk_length
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.memory.checkpointing import CheckpointedBlock
from titan_ulysses.memory.offload import CudaStore, DiskStore, Offload, Store
from titan_ulysses.memory.stream_offload import SequenceStore
from titan_ulysses.memory.streaming import StreamedBlock
from titan_ulysses.model import hf
from titan_ulysses.optim.build import build_optimizer
from titan_ulysses.plan.attribution import Attribution
from titan_ulysses.plan.cost import OFF_DEVICE, TO_DEVICE, Cost, CostCounter, Tick
from titan_ulysses.plan.cuda_memory import CudaWorkspace, cpu_workspace
from titan_ulysses.plan.memory import MemoryTracker, Place
from titan_ulysses.plan.standin import Standin
from titan_ulysses.plan.standin_linear import KERNELS
from titan_ulysses.plan.words import group_name
from titan_ulysses.setup.blocks import find_blocks
from titan_ulysses.setup.build import build_model
from titan_ulysses.setup.options import ParallelOptions
from titan_ulysses.setup.parallelize import wrap
from titan_ulysses.setup.resolve import RunSpec
from titan_ulysses.train.evaluation import pairs_of
from titan_ulysses.train.loss import Loss, build_loss
from titan_ulysses.train.step import train_step
from titan_ulysses.ulysses.states import replaced_functions


@dataclass
class Simulation:
    """What happens on rank 0 in an optimizer step that is not the first of the run."""

    memory: MemoryTracker
    start: int
    """index of the step's first event in `memory.events`; the events before it are of the setup"""
    collectives: dict[str, tuple[int, int]]
    """(calls, bytes of their inputs) of a whole step, by kind"""
    cost: Cost
    """the cost of a whole step"""
    ticks: list[Tick]
    """the amounts after each operation of the simulated part of the step"""
    batches: int
    """how many of the step's micro-batches were simulated; each further one repeats the second"""
    model: PreTrainedModel = field(repr=False)


def simulate(
    spec: RunSpec,
    *,
    cuda: CudaWorkspace | None,
    documents: Documents | None = None,
    wrap: Callable[..., object] = wrap,
) -> Simulation:
    """Simulate a step on rank 0 of a run, with one document per row unless documents is given.

    cuda: simulate a GPU of this workspace with a host, where offloaded tensors leave the device and
    checkpoints are copied back before they are needed; None: a CPU. wrap parallelizes the model,
    with the arguments of `setup.parallelize.wrap`; another way to do so can be planned by giving
    it. The process must not be in a process group, and is in none afterwards.
    """
    config = spec.config
    tracker = MemoryTracker(cuda or cpu_workspace)
    on_gpu = cuda is not None
    tracker.parameters_on_host = on_gpu and config.memory.parameter_offload
    store = _planned_store(tracker, spec.options.store, cuda=on_gpu)
    blocks: list[nn.Module] = []
    scores: dict[int | None, float] = {}
    for one in (spec, spec.frozen):
        if one is not None and isinstance(one.core, Standin):
            one.core.begin(tracker, scores)
    costs = CostCounter(tracker, scores)

    def wrap_here(model: PreTrainedModel, mesh: Mesh, options: ParallelOptions) -> None:
        """Do what `parallelize` does, without communication with other ranks or compilation."""
        if not blocks:  # of the model that is trained, which comes first
            blocks.extend(find_blocks(model)[1])
        wrap(
            model,
            mesh,
            replace(options, compile=False),
            store=store,
            device_type="cuda" if on_gpu else "cpu",
            open_sequences=partial(_planned_sequences, tracker, costs, cuda=on_gpu),
        )

    with _fake_ranks(spec.degrees) as mesh:
        model, _ = build_model(spec, mesh, wrap=wrap_here)
        stored = 0 if config.loss.precompute_reference else None  # no step has the second model
        loss = build_loss(spec, model, mesh, wrap=wrap_here, stored=stored)
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            hf.allocate(model, mesh.device)
            _label_parameters(tracker, model)
            loss.allocate(parameter_offload=False)
            loss.prepare()
            if loss.frozen is not None:
                _label_parameters(tracker, loss.frozen, of="the second model's ")
            tracker.attribution = Attribution(model, blocks)
            _label_checkpoints(tracker, model, kept_on_device=store is None)
            _hold_attention(tracker, blocks)
            optimizer = _planned_optimizer(config, tracker, model, blocks, on_gpu=on_gpu)
            copy = _checkpoint_copy(config, tracker, optimizer, on_gpu=on_gpu)
            with replaced_functions(KERNELS if on_gpu else {}):
                found = _run_step(spec, tracker, costs, model, optimizer, mesh, documents, loss)
            del copy  # alive during the step
            return found


def _planned_optimizer(
    config: Config,
    tracker: MemoryTracker,
    model: PreTrainedModel,
    blocks: list[nn.Module],
    *,
    on_gpu: bool,
) -> torch.optim.Optimizer:
    """Return the optimizer with its state, each where the run has it."""
    offload = on_gpu and config.memory.optimizer_offload and not config.memory.parameter_offload
    optimizer = build_optimizer(
        model,
        config.optimizer,
        offload=offload,
        skips=config.training.skip_nonfinite > 0,
        device_type="cuda" if on_gpu else "cpu",
    )
    on_host = offload or tracker.parameters_on_host
    _label_optimizer(tracker, model, blocks, optimizer, state_on_host=on_host)
    _make_state(model, optimizer)
    return optimizer


def _run_step(
    spec: RunSpec,
    tracker: MemoryTracker,
    costs: CostCounter,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    mesh: Mesh,
    documents: Documents | None,
    loss: Loss,
) -> Simulation:
    """Run the step on fake tensors, with one or two of its micro-batches."""
    accumulation = spec.degrees.accumulation_steps
    chunk = chunk_length(
        model.stream_chunk_tokens, spec.config.training.seq_len, spec.degrees.sequence
    )
    batches = [_batch(spec.config, mesh, documents, chunk) for _ in range(accumulation)]
    tracker.claim(
        [vars(batch) for batch in batches], "other", label="inputs: token ids, labels, positions"
    )
    counts, max_norm = [], spec.config.training.max_norm
    # With gradient accumulation, the difference between one and two micro-batches tells the
    # collectives of each further one.
    for run in (batches[:1], batches[:2]) if accumulation > 1 else (batches,):
        start = len(tracker.events)
        costs.take()
        counter = CollectiveCounter(weight=lambda: tracker.weight)
        tracker.observers = [costs, counter.count]
        with override_parts(tracker.shortened):
            train_step(
                model,
                optimizer,
                run,
                mesh,
                max_norm=max_norm,
                skip_nonfinite=spec.config.training.skip_nonfinite > 0,
                loss=loss,
            )
        counts.append(dict(counter.counts))
    tracker.recording = False  # the releases that follow are not part of the step
    collectives = counts[0] if accumulation == 1 else _extrapolated(*counts, batches=accumulation)
    cost = costs.cost * (accumulation / len(run))
    return Simulation(tracker, start, collectives, cost, costs.ticks, len(run), model)


def _make_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Run the optimizer alone for one step, so that its state exists, as in every step of a run
    except the first.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _extrapolated(one: dict, two: dict, *, batches: int) -> dict[str, tuple[int, int]]:
    """Return the counts of a step of `batches` micro-batches from steps of one and of two, since
    each further micro-batch repeats the second one.
    """
    return {
        kind: tuple(
            a + (batches - 1) * (b - a)
            for a, b in zip(one.get(kind, (0, 0)), two[kind], strict=True)
        )
        for kind in two
    }


@contextmanager
def _fake_ranks(degrees: MeshDegrees) -> Iterator[Mesh]:
    """Yield the mesh of a fake process group: only this rank exists, and collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "the planner needs a process of its own"
    world_size = degrees.data_parallel * degrees.sequence
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield build_mesh(
            replicate=degrees.replicate, shard=degrees.shard, sequence=degrees.sequence
        )
    finally:
        dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """Empty DTensor's caches. They hold meshes, and a mesh of the next simulation may be equal to
    one whose process groups are gone.
    """
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.propagate_op_sharding.cache_clear()  # type: ignore[attr-defined]
    clear = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)
    if clear is not None:  # not in every version that is supported
        clear()


def _planned_store(tracker: MemoryTracker, offload: Offload, *, cuda: bool) -> Store | None:
    """Return the run's store of checkpoints, with buffers that the tracker counts as in host memory
    or on disk; None where checkpoints stay on the device.
    """
    if offload == "none":
        return None
    make_buffer = _planned_buffers(tracker, offload, "checkpoints")
    if not cuda:
        return Store(make_buffer)
    return _planned_copies(tracker, offload, make_buffer, "checkpoints")


def _planned_sequences(
    tracker: MemoryTracker,
    costs: CostCounter,
    offload: Offload,
    folder: str | None,
    device: torch.device,
    *,
    cuda: bool,
) -> SequenceStore:
    """Do what `open_sequence_store` does, with counted buffers and copies."""
    make_buffer = _planned_buffers(tracker, offload, "other", "hidden states of a sequence")
    if not cuda:
        return SequenceStore(make_buffer, device)
    copies = _planned_copies(tracker, offload, make_buffer, "other")
    return _PlannedSequences(make_buffer, device, copies, tracker, costs)


class _PlannedSequences(SequenceStore):
    """Counts the copies of a GPU's run, whose tensors are all on the CPU here.

    A part that comes ahead need not be the next one that is simulated, so what is asked for is
    counted, and not what is copied.
    """

    def __init__(self, make_buffer, device, copies, tracker: MemoryTracker, costs: CostCounter):
        super().__init__(make_buffer, device, copies)
        self.tracker, self.costs = tracker, costs

    def read(self, part: Tensor, ahead: Tensor | None = None) -> Tensor:
        if self.tracker.place_of(part) == "device":
            return part
        self.costs.add(TO_DEVICE, part.numel() * part.element_size())
        return super().read(part, ahead)

    def write(self, part: Tensor, values: Tensor) -> None:
        if self.tracker.place_of(part) == "device":
            part.copy_(values)
            return
        self.costs.add(OFF_DEVICE, part.numel() * part.element_size())
        super().write(part, values)


def _planned_copies(
    tracker: MemoryTracker,
    offload: Offload,
    make_buffer: Callable[[int, torch.device], Tensor],
    component: str,
) -> CudaStore:
    """Return the store of a GPU's run, without streams or threads."""
    if offload == "host":
        return CudaStore(make_buffer, torch.cpu)

    def staging(size: int, device: torch.device) -> Tensor:
        with tracker.placed("host"):
            buffer = torch.empty(size, dtype=torch.uint8)
        tracker.claim(buffer, component)
        return buffer

    return DiskStore(make_buffer, torch.cpu, make_staging=staging, background=_AtOnce())


class _AtOnce(Executor):
    """Runs what is submitted in the thread that submits it: fake tensors belong to a thread."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        done: Future = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def _planned_buffers(
    tracker: MemoryTracker, offload: Offload, component: str, label: str = ""
) -> Callable[[int, torch.device], Tensor]:
    def make_buffer(size: int, device: torch.device) -> Tensor:
        # In the middle one of a block's chunks, the buffers of those that it stands for are made.
        with tracker.placed("host" if offload == "host" else "disk"):
            buffers = torch.empty(size * tracker.weight, dtype=torch.uint8)
        tracker.claim([buffers], component, label=label)
        return buffers[:size]

    return make_buffer


def _label_parameters(tracker: MemoryTracker, model: nn.Module, *, of: str = "") -> None:
    """Tell the tracker which tensors are the model's own."""
    for name, parameter in model.named_parameters():
        place: Place | None = "host" if tracker.parameters_on_host else None
        tracker.claim([parameter], "parameters", place=place, label=f"{of}parameter {name}")
    tracker.claim(list(model.buffers()), "other", label=f"{of}buffers of the model")


def _label_checkpoints(tracker: MemoryTracker, model: nn.Module, *, kept_on_device: bool) -> None:
    """Tell the tracker which tensors are inputs of checkpointed segments, when a segment begins."""

    def note(layer: int):
        def hook(module: nn.Module, args: tuple) -> None:
            if args and (kept_on_device or tracker.attribution.phase == "recomputation"):
                tracker.claim(args[0], "checkpoints", label=f"checkpoint: input of layer {layer}")

        return hook

    blocks = (module for module in model.modules() if isinstance(module, CheckpointedBlock))
    for layer, block in enumerate(blocks):
        if block.checkpoint_position == 0:
            block.register_forward_pre_hook(note(layer))


def _hold_attention(tracker: MemoryTracker, blocks: list[nn.Module]) -> None:
    """Let attention that is kept on the device take the memory of all chunks.

    The middle one of the chunks that are simulated stands for others.
    """

    def hold(tensors: Sequence[Tensor]) -> Tensor | None:
        others = tracker.weight - 1
        if not others:
            return None
        size = sum(x.numel() * x.element_size() for x in tensors)
        held = torch.empty(size * others, dtype=torch.uint8)
        tracker.claim([held], "attention", label="outputs of attention of further chunks")
        return held

    for block in blocks:
        if isinstance(block.forward, StreamedBlock):
            block.forward.hold = hold


def _label_optimizer(
    tracker: MemoryTracker,
    model: nn.Module,
    blocks: list[nn.Module],
    optimizer: torch.optim.Optimizer,
    *,
    state_on_host: bool,
) -> None:
    """Tell the tracker which tensors are gradients (before the optimizer's step) and which are the
    optimizer's state (after it).
    """
    tracker.attribution.watch(optimizer)

    names = {parameter: name for name, parameter in model.named_parameters()}
    layers = {
        parameter: layer for layer, block in enumerate(blocks) for parameter in block.parameters()
    }
    moments = {"exp_avg": "first moment", "exp_avg_sq": "second moment"}
    moments |= {"momentum_buffer": "momentum"}

    def note_gradients(*_) -> None:
        place: Place | None = "host" if tracker.parameters_on_host else None
        for parameter in names:
            if parameter.grad is not None:
                # Gradients that FSDP reduced together share one storage, so they share a label.
                label = (
                    f"gradients of {group_name(layers.get(parameter))}, reduced (this rank's "
                    "shards)"
                )
                tracker.claim([parameter.grad], "gradients", place=place, label=label)

    def note_state(*_) -> None:
        place: Place | None = "host" if state_on_host else None
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                label = f"optimizer state: {moments.get(key, key)} of {names[parameter]}"
                tracker.claim([value], "optimizer state", place=place, label=label)

    optimizer.register_step_pre_hook(note_gradients)
    optimizer.register_step_post_hook(note_state)


def _checkpoint_copy(
    config: Config, tracker: MemoryTracker, optimizer: torch.optim.Optimizer, *, on_gpu: bool
) -> list[Tensor]:
    """Return the copy of a checkpoint in host memory from which it is written in the background.

    See checkpoint/background.py. Its pieces are as large as those of parameters and state.
    """
    if not config.checkpoint.enable or config.checkpoint.async_mode == "disabled":
        return []
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    state = [x for values in optimizer.state.values() for x in values.values()]
    with tracker.placed("host" if on_gpu else "device"):
        copies = [
            torch.empty(piece.shape, dtype=piece.dtype)
            for x in (*trained, *state)
            for piece in plain_pieces(x)
        ]
    tracker.claim(copies, "checkpoint copy", label="copy of a checkpoint that is being written")
    return copies


def _teacher(config: Config, rows: int, tokens: int) -> dict[str, Tensor]:
    """Return a teacher's log-probabilities of a rank's tokens, where they come with the data."""
    entries = config.data.mixture
    top_k = entries[0].teacher_top_k if entries else config.data.teacher_top_k
    size = (rows, tokens, top_k)
    if not top_k:
        return {}
    ids = torch.zeros(size, dtype=torch.int64)
    return {"teacher_ids": ids, "teacher_logits": torch.zeros(size, dtype=torch.float32)}


def _batch(
    config: Config, mesh: Mesh, documents: Documents | None, chunk_tokens: int | None
) -> Batch:
    rows, seq_len = config.training.local_batch_size, config.training.seq_len
    tokens = seq_len // mesh.sp.size()
    if documents is None and config.loss.name == "dpo":  # a pair in each row
        documents = ((seq_len - seq_len // 2, seq_len // 2),) * rows
    reference = None
    if config.loss.precompute_reference:
        completions = sum(2 * pairs_of(row) for row in documents or ())
        reference = torch.zeros(completions, dtype=torch.float64)
    return Batch(
        input_ids=torch.zeros(rows, tokens, dtype=torch.int64),
        labels=torch.zeros(rows, tokens, dtype=torch.int64),
        position_ids=torch.zeros(rows, tokens, dtype=torch.int64),
        documents=documents or ((seq_len,),) * rows,
        chunk_tokens=chunk_tokens,
        reference=reference,
        loss_inputs=_teacher(config, rows, tokens),
    )
