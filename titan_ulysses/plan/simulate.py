"""Simulates the real step: this project's model, wrappers and `train_step`, on fake tensors and a
fake process group.

Nothing is computed and nothing is sent, so a laptop can run one rank of a thousand. The optimizer
makes one step before, so that its state exists. Of the tiles of a function and the chunks of a
block, at most four are run, one of which stands for all that are left out. For the same reason,
only the first two or three of the micro-batches that a step accumulates are run.

Memory that exists only in CUDA kernels cannot be simulated. `cuda_memory.py` adds it, each figure
with its source.
"""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from titan_ulysses.config.schema import PREFERENCES
from titan_ulysses.config.validate import MeshDegrees
from titan_ulysses.data.loader import Batch
from titan_ulysses.distributed.collectives import CollectiveCounter
from titan_ulysses.distributed.mesh import Mesh, build_mesh
from titan_ulysses.distributed.parts import override_parts
from titan_ulysses.distributed.sequence import Documents, chunk_length
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.memory.checkpointing import CheckpointedBlock
from titan_ulysses.memory.offload import CudaStore, DiskStore, Offload, Store
from titan_ulysses.memory.sequences import SequenceStore
from titan_ulysses.model import hf
from titan_ulysses.model.prediction import layer_of
from titan_ulysses.observability.metrics import flops_per_token
from titan_ulysses.optim.optimizer import build_optimizer
from titan_ulysses.plan.attribution import Attribution
from titan_ulysses.plan.cost import OFF_DEVICE, TO_DEVICE, Amount, Cost, CostCounter, Tick
from titan_ulysses.plan.cuda_memory import CudaWorkspace, cpu_workspace
from titan_ulysses.plan.memory import History, MemoryTracker, Place
from titan_ulysses.plan.names import group_name
from titan_ulysses.plan.standin import Standin
from titan_ulysses.plan.standin_linear import KERNELS
from titan_ulysses.plan.status_line import LINE
from titan_ulysses.setup.blocks import find_blocks
from titan_ulysses.setup.build import build_model
from titan_ulysses.setup.options import ParallelOptions
from titan_ulysses.setup.parallelize import wrap
from titan_ulysses.setup.resolve import RunSpec
from titan_ulysses.streaming.block import StreamedBlock
from titan_ulysses.train.evaluation import pairs_of
from titan_ulysses.train.loss import TrainingLoss, build_loss
from titan_ulysses.train.step import train_step
from titan_ulysses.ulysses.states import replaced_functions


@dataclass
class Simulation:
    """What happens on rank 0 in an optimizer step that is not the first of the run."""

    memory: History
    start: int
    """index of the step's first event in `memory.events`; before it are those of what is alive when
    the step begins
    """
    collectives_of: dict[int | None, dict[str, tuple[int, int]]]
    """(calls, bytes of their inputs) of a whole step, by layer (None: of no layer) and kind"""
    cost: Cost
    """the cost of a whole step"""
    ticks: list[Tick]
    """the cost of each operation of the simulated part of the step"""
    batches: int
    """how many of the step's micro-batches were simulated; each further one repeats the second"""
    flops_per_token: int
    """of the model, as the trainer counts them, see `metrics.flops_per_token`"""
    model: PreTrainedModel = field(repr=False)
    """the model that was simulated, which may have fewer layers than the run's, see `layers.py`"""

    @property
    def collectives(self) -> dict[str, tuple[int, int]]:
        """(calls, bytes of their inputs) of a whole step, by kind"""
        totals: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        for counts in self.collectives_of.values():
            for kind, both in counts.items():
                for total, n in zip(totals, both, strict=True):
                    total[kind] += n
        return {kind: (calls, totals[1][kind]) for kind, calls in totals[0].items()}

    @property
    def layers(self) -> int:
        """How many layers were simulated."""
        return getattr(self.model.config, "num_hidden_layers", 0)


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
    it. The process must not be in a process group, and is in none afterwards, but for the one of
    `shared_ranks`.
    """
    rank = _Rank(spec, cuda, wrap)
    tracker = rank.tracker
    with no_garbage_collection(), _fake_ranks(spec.degrees) as mesh:
        model, _ = build_model(spec, mesh, wrap=rank.wrap)
        # No step has the second model where what it says of the data is computed before.
        stored = 0 if spec.config.loss.precompute_reference else None
        loss = build_loss(spec, model, mesh, wrap=rank.wrap, stored=stored)
        with FakeTensorMode(allow_non_fake_inputs=True), tracker:
            hf.allocate(model, mesh.device)
            rank.label_parameters(model)
            loss.allocate(parameter_offload=False)
            loss.prepare()
            if loss.frozen is not None:
                rank.label_parameters(loss.frozen, of="the second model's ")
            tracker.attribution = Attribution(model, rank.blocks)
            rank.label_checkpoints(model)
            rank.collect_between_layers()
            rank.hold_attention()
            optimizer = rank.build_optimizer(model)
            copy = rank.checkpoint_copy(optimizer)
            with replaced_functions(KERNELS if rank.on_gpu else {}):
                found = rank.run_step(model, optimizer, mesh, documents, loss)
            del copy  # alive during the step
            LINE.clear()
            return found


class _Rank:
    """Rank 0 of a run: what is replaced for its simulation, and what its tensors are for."""

    def __init__(self, spec: RunSpec, cuda: CudaWorkspace | None, wrap: Callable[..., object]):
        self.spec, self.config, self.on_gpu, self._wrap = spec, spec.config, cuda is not None, wrap
        self.blocks: list[nn.Module] = []
        self.tracker = MemoryTracker(cuda or cpu_workspace)
        self.tracker.parameters_on_host = self.on_gpu and self.config.memory.parameter_offload
        self.parameters: Place = "host" if self.tracker.parameters_on_host else "device"
        scores: dict[int | None, Amount] = {}
        for one in (spec, spec.frozen):
            if one is not None and isinstance(one.core, Standin):
                one.core.begin(self.tracker, scores)
        self.costs = CostCounter(self.tracker, scores)
        offload = spec.options.store
        self.store = None if offload == "none" else self.open_store(offload, "checkpoints")

    def wrap(self, model: PreTrainedModel, mesh: Mesh, options: ParallelOptions) -> None:
        """Do what `parallelize` does, without communication with other ranks or compilation."""
        if not self.blocks:  # of the model that is trained, which comes first
            self.blocks += find_blocks(model)[1]
            self.blocks += [layer.mtp_block] if (layer := layer_of(model)) else []
        self._wrap(
            model,
            mesh,
            options.changed(compile={"enable": False}),
            store=self.store,
            device_type="cuda" if self.on_gpu else "cpu",
            open_sequences=self.open_sequences,
        )

    # --- what leaves the device -------------------------------------------------------------------

    def open_store(self, offload: Offload, component: str, label: str = "") -> Store:
        """Return the run's store without streams or threads, with buffers that the tracker counts
        as in host memory or on disk.
        """
        tracker = self.tracker

        def make_buffer(size: int, device: torch.device) -> Tensor:
            # In the middle one of a block's chunks, the buffers of all that it stands for are made.
            with tracker.placed("host" if offload == "host" else "disk"):
                buffers = torch.empty(size * tracker.weight, dtype=torch.uint8)
            tracker.claim([buffers], component, label=label)
            return buffers[:size]

        def make_staging(size: int, device: torch.device) -> Tensor:
            with tracker.placed("host"):
                buffer = torch.empty(size, dtype=torch.uint8)
            tracker.claim(buffer, component)
            return buffer

        if not self.on_gpu:
            return Store(make_buffer)
        if offload == "host":
            return CudaStore(make_buffer, torch.cpu)
        background = _AtOnce()
        return DiskStore(make_buffer, torch.cpu, make_staging=make_staging, background=background)

    def open_sequences(
        self, offload: Offload, folder: str | None, device: torch.device
    ) -> SequenceStore:
        """Do what `open_sequence_store` does, with counted buffers and copies."""
        store = self.open_store(offload, "other", "hidden states of a sequence")
        if not isinstance(store, CudaStore):
            return SequenceStore(store, device)
        return _CountedSequences(store, device, self.tracker, self.costs)

    # --- what tensors are for ---------------------------------------------------------------------

    @property
    def layers(self) -> dict[Tensor, int]:
        """The layer of each parameter and buffer of a layer."""
        return {
            tensor: layer
            for layer, block in enumerate(self.blocks)
            for tensor in chain(block.parameters(), block.buffers())
        }

    def label_parameters(self, model: nn.Module, *, of: str = "") -> None:
        claim, layers = self.tracker.claim, self.layers
        for name, parameter in model.named_parameters():
            label, layer = f"{of}parameter {name}", layers.get(parameter)
            claim([parameter], "parameters", place=self.parameters, label=label, layer=layer)
        for buffer in model.buffers():
            label = f"{of}buffers of the model"
            claim([buffer], "other", label=label, layer=layers.get(buffer))

    def label_checkpoints(self, model: nn.Module) -> None:
        """Tell the tracker which tensors are inputs of checkpointed segments, when a segment
        begins.
        """
        tracker = self.tracker

        def note(layer: int, module: nn.Module, args: tuple) -> None:
            is_kept = self.store is None or tracker.attribution.phase == "recomputation"
            if args and is_kept:
                tracker.claim(args[0], "checkpoints", label=f"checkpoint: input of layer {layer}")

        blocks = (module for module in model.modules() if isinstance(module, CheckpointedBlock))
        for layer, block in enumerate(blocks):
            if block.checkpoint_position == 0:
                block.register_forward_pre_hook(partial(note, layer))

    def collect_between_layers(self) -> None:
        """Collect garbage when another layer begins.

        A run collects it several times a layer, at moments that depend on what the process did
        before. A tensor in a cycle of references would be released there, and no step would be like
        another.
        """
        latest: list[int] = []

        def collect(layer: int, *_) -> None:
            if latest != [layer]:
                latest[:] = [layer]
                gc.collect()

        for layer, block in enumerate(self.blocks):
            block.register_forward_pre_hook(partial(collect, layer))

    def hold_attention(self) -> None:
        """Let attention that is kept on the device take the memory of all chunks.

        The middle one of the chunks that are simulated stands for others.
        """
        tracker = self.tracker

        def hold(tensors: Sequence[Tensor]) -> Tensor | None:
            others = tracker.weight - 1
            if not others:
                return None
            size = sum(x.numel() * x.element_size() for x in tensors)
            held = torch.empty(size * others, dtype=torch.uint8)
            tracker.claim([held], "attention", label="outputs of attention of further chunks")
            return held

        for block in self.blocks:
            if isinstance(block.forward, StreamedBlock):
                block.forward.hold = hold

    def build_optimizer(self, model: PreTrainedModel) -> torch.optim.Optimizer:
        """Return the optimizer with its state, each where the run has it."""
        memory, on_host = self.config.memory, self.tracker.parameters_on_host
        offload = self.on_gpu and memory.optimizer_offload and not memory.parameter_offload
        optimizer = build_optimizer(
            model,
            self.config.optimizer.model_copy(update={"lr_factors": {}}),  # names of all layers
            offload=offload,
            skips=self.config.training.skip_nonfinite > 0,
            device_type="cuda" if self.on_gpu else "cpu",
        )
        self.label_optimizer(model, optimizer, state="host" if offload or on_host else "device")
        # One step of the optimizer alone, so that its state exists, as in every step but the first.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def label_optimizer(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, state: Place
    ) -> None:
        """Tell the tracker which tensors are gradients (before the optimizer's step) and which are
        the optimizer's state (after it). state: where it is.
        """
        claim = self.tracker.claim
        self.tracker.attribution.watch(optimizer)
        names = {parameter: name for name, parameter in model.named_parameters()}
        layers = self.layers
        moments = {"exp_avg": "first moment", "exp_avg_sq": "second moment"}
        moments |= {"momentum_buffer": "momentum"}

        def note_gradients(*_) -> None:
            for parameter in names:
                if parameter.grad is not None:
                    # Gradients that FSDP reduced together share one storage, and so a label.
                    group = group_name(layers.get(parameter))
                    label = f"gradients of {group}, reduced (this rank's shards)"
                    claim([parameter.grad], "gradients", place=self.parameters, label=label)

        def note_state(*_) -> None:
            for parameter, values in optimizer.state.items():
                for key, value in values.items():
                    label = f"optimizer state: {moments.get(key, key)} of {names[parameter]}"
                    layer = layers.get(parameter)
                    claim([value], "optimizer state", place=state, label=label, layer=layer)

        optimizer.register_step_pre_hook(note_gradients)
        optimizer.register_step_post_hook(note_state)

    def checkpoint_copy(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Return the copy of a checkpoint in host memory, from which a thread writes it.

        See checkpoint/writing.py. Its pieces are as large as those of parameters and state.
        """
        checkpoint = self.config.checkpoint
        if not checkpoint.enable or checkpoint.async_mode == "disabled":
            return []
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        state = [x for values in optimizer.state.values() for x in values.values()]
        pieces = [piece for x in (*trained, *state) for piece in plain_pieces(x)]
        with self.tracker.placed("host" if self.on_gpu else "device"):
            copies = [torch.empty(piece.shape, dtype=piece.dtype) for piece in pieces]
        label = "copy of a checkpoint that is being written"
        self.tracker.claim(copies, "checkpoint copy", label=label)
        return copies

    # --- the step ---------------------------------------------------------------------------------

    def show_progress(self, *_) -> None:
        """Show which layer is simulated. An observer of operations."""
        if LINE.is_due():
            attribution, tokens = self.tracker.attribution, self.config.training.seq_len
            layer = attribution.here().layer
            where = "" if layer is None else f", layer {layer + 1} of {len(self.blocks)}"
            LINE.show(f"simulating {tokens:,} tokens: {attribution.phase}{where}")

    def run_step(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        mesh: Mesh,
        documents: Documents | None,
        loss: TrainingLoss,
    ) -> Simulation:
        """Run the step on fake tensors, with few of its micro-batches."""
        tracker, costs, training = self.tracker, self.costs, self.config.training
        accumulation = self.spec.degrees.accumulation_steps
        chunk = chunk_length(
            model.sharding.stream_chunk_tokens, training.seq_len, self.spec.degrees.sequence
        )
        tracker.layer = None  # and not that of the last operation of the optimizer
        batches = [_batch(self.spec, documents, chunk) for _ in range(accumulation)]
        label = "inputs: token ids, labels, positions"
        tracker.claim([vars(batch) for batch in batches], "other", label=label)
        counts = []
        # With gradient accumulation, the difference between one and two micro-batches tells the
        # collectives of each further one. KTO runs each of several twice, and not a single one.
        few = 2 if self.config.loss.name == "kto" else 1
        runs = (batches[:few], batches[: few + 1]) if accumulation > few else (batches,)
        for run in runs:
            tracker.forget_released()
            start = len(tracker.events)
            costs.reset()
            counters = defaultdict[int | None, CollectiveCounter](
                partial(CollectiveCounter, weight=lambda: tracker.weight)
            )

            def count(func, args: tuple, *_, counters=counters) -> None:
                counters[tracker.layer].count(func, args)

            tracker.observers = [costs, count, self.show_progress]
            with override_parts(tracker.shortened):
                train_step(
                    model,
                    optimizer,
                    run,
                    mesh,
                    max_norm=training.max_norm,
                    skip_nonfinite=training.skip_nonfinite > 0,
                    loss=loss,
                )
            counts.append({layer: dict(one.counts) for layer, one in counters.items()})
        tracker.recording = False  # the releases that follow are not part of the step
        collectives = counts[0]
        if accumulation > few:
            collectives = {
                layer: _extrapolated(counts[0].get(layer, {}), of_layer, more=accumulation - few)
                for layer, of_layer in counts[1].items()
            }
        times = Fraction(accumulation, len(run))
        cost = Cost(Counter({key: times * n for key, n in costs.cost.amounts.items()}))
        flops = flops_per_token(model)
        return Simulation(tracker, start, collectives, cost, costs.ticks, len(run), flops, model)


class _CountedSequences(SequenceStore):
    """Counts the copies of a GPU's run, whose tensors are all on the CPU here.

    A part that comes ahead need not be the next one that is simulated, so what is asked for is
    counted, and not what is copied.
    """

    def __init__(self, copies, device, tracker: MemoryTracker, costs: CostCounter):
        super().__init__(copies, device)
        self.tracker, self.costs = tracker, costs

    def fetch(self, part: Tensor, ahead: Tensor | None = None) -> Tensor:
        if self.tracker.place_of(part) == "device":
            return part
        self.costs.add(TO_DEVICE, part.numel() * part.element_size())
        return super().fetch(part, ahead)

    def put(self, part: Tensor, values: Tensor) -> None:
        if self.tracker.place_of(part) == "device":
            part.copy_(values)
            return
        self.costs.add(OFF_DEVICE, part.numel() * part.element_size())
        super().put(part, values)


class _AtOnce(Executor):
    """Runs what is submitted in the thread that submits it: fake tensors belong to a thread."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        done: Future = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def _extrapolated(few: dict, longer: dict, *, more: int) -> dict[str, tuple[int, int]]:
    """Return the counts of a step of `more` micro-batches than a step with few, from that one and
    one that is longer by one, since each further micro-batch repeats the last one.
    """
    return {
        kind: tuple(
            a + more * (b - a) for a, b in zip(few.get(kind, (0, 0)), longer[kind], strict=True)
        )
        for kind in longer
    }


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage only where `gc.collect` is called, and none that is there already: it would
    take longer than the simulation to look at all modules' objects.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextmanager
def shared_ranks() -> Iterator[None]:
    """Let simulations in this context share a process group while they have the same mesh: DTensor
    knows its operations from the one before. Not for use inside another one.
    """
    global _shared
    with ExitStack() as group:
        _shared = group, {}
        try:
            yield
        finally:
            _shared = None


_shared: tuple[ExitStack, dict[tuple[int, ...], Mesh]] | None = None
"""what ends the process group of `shared_ranks`, and its mesh by the degrees"""


@contextmanager
def _fake_ranks(degrees: MeshDegrees) -> Iterator[Mesh]:
    """Yield the mesh of a fake process group: only this rank exists, and collectives do nothing."""
    key = degrees.replicate, degrees.shard, degrees.sequence
    with ExitStack() as own:
        group, meshes = _shared or (own, {})
        if key not in meshes:
            group.close()
            meshes.clear()
            meshes[key] = group.enter_context(_process_group(*key))
        yield meshes[key]


@contextmanager
def _process_group(replicate: int, shard: int, sequence: int) -> Iterator[Mesh]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "the planner needs a process of its own"
    world_size = replicate * shard * sequence
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield build_mesh(replicate=replicate, shard=shard, sequence=sequence)
    finally:
        dist.destroy_process_group()
        # DTensor's caches hold meshes, and a mesh of the next simulation may be equal to one whose
        # process groups are gone.
        propagator = DTensor._op_dispatcher.sharding_propagator
        propagator.propagate_op_sharding.cache_clear()  # type: ignore[attr-defined]
        clear = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)
        if clear is not None:  # not in every version that is supported
            clear()


def _batch(spec: RunSpec, documents: Documents | None, chunk_tokens: int | None) -> Batch:
    config = spec.config
    rows, seq_len = config.training.local_batch_size, config.training.seq_len
    size = rows, seq_len // spec.degrees.sequence
    loss, inputs = config.loss.name, {}
    if documents is None and loss in PREFERENCES:  # a pair in each row
        documents = ((seq_len - seq_len // 2, seq_len // 2),) * rows
    reference = desirable = None
    pairs = sum(map(pairs_of, documents or ()))
    if config.loss.precompute_reference:
        reference = torch.zeros(2 * pairs, dtype=torch.float64)
    if loss == "kto":
        desirable = torch.ones(pairs, dtype=torch.bool)
    if loss == "orpo":
        inputs = {"completion": torch.ones(size, dtype=torch.bool)}
    entries = config.data.mixture
    if top_k := entries[0].teacher_top_k if entries else config.data.teacher_top_k:
        inputs = {
            "teacher_ids": torch.zeros(*size, top_k, dtype=torch.int64),
            "teacher_logits": torch.zeros(*size, top_k, dtype=torch.float32),
        }
    of_next = torch.zeros(size, dtype=torch.int64) if config.loss.prediction_weight else None
    return Batch(
        next_ids=of_next,
        next_labels=of_next,
        input_ids=torch.zeros(size, dtype=torch.int64),
        labels=torch.zeros(size, dtype=torch.int64),
        position_ids=torch.zeros(size, dtype=torch.int64),
        documents=documents or ((seq_len,),) * rows,
        chunk_tokens=chunk_tokens,
        reference=reference,
        desirable=desirable,
        loss_inputs=inputs,
    )
