"""Follows every storage of a simulated step from its allocation to its release: what is alive, for
which purpose, and since when.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from titan_ulysses.distributed.parts import CostTrend, with_next
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.plan.attribution import Attribution, Owner
from titan_ulysses.plan.fake import FakeOperations

Place = Literal["device", "host", "disk"]


class Moment(NamedTuple):
    """A position in the step."""

    phase: str
    owner: Owner
    operation: str
    created_in: tuple[str, ...] = ()
    """see `creating_functions`"""


@dataclass(eq=False)
class Allocation:
    """One storage, and the moment at which it was allocated."""

    component: str
    """what the memory is for. It may change when more is known, for example that what an MLP made
    is a gradient.
    """
    place: Place
    made: Moment
    shape: tuple[int, ...]
    dtype: torch.dtype
    label: str = ""
    """the name of the tensor, where it is known and does not follow from the other fields"""
    layer: int | None = None
    """the layer that it is of; None for what is of no layer, or of several"""


@dataclass(frozen=True)
class Peak:
    """The moment at which the most bytes are alive, and the allocations that are alive then."""

    bytes: int
    moment: Moment
    event: int
    alive: dict[Allocation, int]
    """bytes of each allocation"""

    @property
    def components(self) -> dict[str, int]:
        """Bytes of each component, the largest first."""
        totals: Counter[str] = Counter()
        for allocation, size in self.alive.items():
            totals[allocation.component] += size
        return {component: size for component, size in totals.most_common() if size}


class History:
    """The allocations and releases of a step, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Allocation, int]] = []
        """(allocation, change of its bytes), in order"""
        self.moments: list[Moment] = []
        """the moment of each event"""
        self.layers: list[int | None] = []
        """the layer at work in forward and backward; None for none, and in the rest of the step"""

    def peak(self, *places: Place, first: int = 0) -> Peak:
        """Return the peak of the bytes in `places` together, from event number `first` on."""
        total = highest = 0
        at = first
        for index, (allocation, change) in enumerate(self.events):
            if allocation.place in places:
                total += change
                if index >= first and total > highest:
                    highest, at = total, index
        alive: Counter[Allocation] = Counter()
        for allocation, change in self.events[: at + 1]:
            if allocation.place in places:
                alive[allocation] += change
        return Peak(
            highest,
            self.moments[at],
            at,
            {allocation: size for allocation, size in alive.items() if size},
        )


class MemoryTracker(History, TorchDispatchMode):
    """A dispatch mode that records each allocation and release of fake tensors, in order.

    workspace(function, arguments, result) returns the bytes that the operation's kernel holds while
    it runs, besides its result. FSDP keeps some storages and resizes them, which the dispatcher
    does not see. So every operation checks the sizes of the storages that may have been resized.
    """

    def __init__(self, workspace: Callable[..., int]):
        History.__init__(self)
        TorchDispatchMode.__init__(self)
        self.attribution: Attribution | None = None
        self.place: Place = "device"
        """where new storages are"""
        self.observers: list[Callable[..., None]] = []
        """called with (function, arguments, keyword arguments, result) after each operation"""
        self.recording = True
        self.parameters_on_host = False
        self.weight = 1
        """how many operations the current one stands for"""
        self.layer: int | None = None
        """the layer of the current operation, or of all that it is given"""
        self._workspace = workspace
        self._run = FakeOperations()
        self._alive: dict[int, tuple[Allocation, weakref.ref]] = {}
        self._sizes: dict[int, int] = {}
        self._resizable: dict[int, weakref.ref] = {}
        self._claimed: dict[Allocation, int | None] = {}
        """the layer that `claim` gave to an allocation"""
        self._in_shape_propagation = False
        self._moment = Moment("setup", Owner("other", "setup"), "")

    # --- what is alive ----------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and the wrapper that makes Dynamo skip this mode would cost as
        # much time as an operation.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _DEVICE and type(args[0]) is FakeTensor:
            # Most calls are this one, and no memory is in it. See FakeTensor.__torch_dispatch__.
            return _META if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        if not _are_plain(types):
            # DTensor and other wrapper classes run first. The operations that they call arrive
            # here again, on plain tensors.
            return NotImplemented
        kwargs = kwargs or {}
        if func is _WAIT:
            # It returns its argument. On fake tensors it would make a new tensor.
            return args[0]
        if FakeTensor not in types and (
            func is _PROMOTE or func.namespace == "profiler" or _is_real(types, args, kwargs)
        ):
            # Real tensors, such as the state of a random number generator, stay real. The others
            # neither take nor make a tensor.
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _SCALAR:
            return 1  # the optimizer's step count, which it keeps on the host
        if func is _EMPTY_STRIDED or self._in_shape_propagation:
            # To find the shape of a result, DTensor makes whole (unsharded) tensors and runs the
            # operation on them. Neither takes memory in a real run.
            self._in_shape_propagation = func is _EMPTY_STRIDED
            return func(*args, **kwargs)
        if func.is_view:  # half of all operations: they take no memory and no time
            if self.attribution is not None:
                self.attribution.here()
            return self._run(func, args, kwargs)
        self._look_at_resizable()
        if self.attribution is not None:
            owner = self.attribution.here()
            functions = creating_functions()
            self._moment = Moment(self.attribution.phase, owner, func._opname, functions)
            self.layer = self._layer_of((args, kwargs)) if owner.layer is None else owner.layer
        result = self._run(func, args, kwargs)
        kernel = self._note_results(func, args, kwargs, result)
        for observer in self.observers:
            observer(func, args, kwargs, result)
        if kernel is not None:  # the kernel's own memory is released when it ends
            self._add(*kernel)
        return result

    def _note_results(self, func, args, kwargs, result) -> tuple[Allocation, int] | None:
        """Record the results of func, and the memory that its kernel holds besides them.

        Returns the allocation of the kernel's own memory and the change of bytes that releases it,
        or None where the kernel holds nothing.
        """
        component = _fsdp_component(func)
        if component is None and self._brings_parameter(func, args):
            component = "gathered parameters"
        results = tensors_in((result, kwargs.get("out")))
        layers = [self.layer] * len(results)
        if len(results) > 1 and isinstance(args[0], (list, tuple)) and self.layer is None:
            layers = [self._layer_of(x) for x in args[0]]  # an operation for each of a list
        for tensor, layer in zip(results, layers, strict=False):
            self._note(tensor, func, component, layer)
        if func._opname == "chunk_cat":
            self.claim(args[0], "gradients")
        workspace = self._workspace(func, args, result)
        passing = self._transient_bytes(func, args, component)
        if not workspace and not passing:
            return None
        kernel = self._allocation((), torch.uint8, component, self.layer)
        if workspace:
            kernel.made = kernel.made._replace(created_in=(WORKSPACE,))
        else:
            kernel.label = "parameters or gradients between host and GPU"
        self._add(kernel, workspace + passing)  # alive at the same time as the results
        return kernel, -workspace - passing

    def _transient_bytes(self, func, args, component: str | None) -> int:
        """Return the bytes of copies between host and device that the simulation does not show,
        because there both are the CPU.

        A parameter shard from the host arrives on the device in its own dtype, before it is cast.
        The shard of a reduced gradient is on the device until it has been copied to the host.
        """
        if not self.parameters_on_host:
            return 0
        if component == "gathered parameters" and func in _CASTS:
            return args[0].numel() * args[0].element_size()
        if func.namespace == "c10d" and "reduce_scatter" in func._opname:
            return sum(x.numel() * x.element_size() for x in tensors_in(args[:1]))
        return 0

    def _layer_of(self, value: object) -> int | None:
        """Return the layer that the tensors in value are of; None if they are not of one. Where
        no tensor is known, such as a table of constants, the layer of the operation before.
        """
        found = (self._alive.get(x.untyped_storage()._cdata) for x in tensors_in(value))
        known = {one[0].layer for one in found if one is not None}
        layers = known - {None}
        return self.layer if not known else layers.pop() if len(layers) == 1 else None

    def _note(self, tensor: Tensor, func, component: str | None, layer: int | None) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            if size != self._sizes[key]:
                self._resize(key, size)
            if component is not None:
                self._alive[key][0].component = component
                if component == "gradients":
                    self._resizable.pop(key, None)
            return
        allocation = self._allocation(tuple(tensor.shape), tensor.dtype, component, layer)
        self._alive[key] = allocation, weakref.ref(storage, lambda _: self._release(key))
        self._sizes[key] = size
        if func is torch.ops.aten.empty.memory_format and FSDP in allocation.made.created_in:
            self._resizable[key] = self._alive[key][1]
        self._add(allocation, size)

    def _allocation(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        component: str | None,
        layer: int | None,
    ) -> Allocation:
        made = self._moment
        if component is None and FSDP in made.created_in:
            component = "gradients" if made.phase == "backward" else "gathered parameters"
        component = component or made.owner.component
        return Allocation(component, self.place, made, shape, dtype, layer=layer)

    def _release(self, key: int) -> None:
        allocation, _ = self._alive.pop(key)
        self._resizable.pop(key, None)
        self._add(allocation, -self._sizes.pop(key))

    def _resize(self, key: int, size: int) -> None:
        allocation, reference = self._alive[key]
        self._add(allocation, size - self._sizes[key])
        self._sizes[key] = size
        if size:
            self._resizable[key] = reference
        else:
            # The operation that fills the storage again will be seen by the dispatcher.
            self._resizable.pop(key, None)

    def _look_at_resizable(self) -> None:
        for key, reference in list(self._resizable.items()):
            storage = reference()
            if storage is not None and (size := storage.nbytes()) != self._sizes[key]:
                self._resize(key, size)

    def forget_released(self) -> None:
        """Forget the events of what is released. What is alive has one event."""
        sizes: Counter[Allocation] = Counter()
        made: dict[Allocation, Moment] = {}
        for (allocation, change), moment in zip(self.events, self.moments, strict=True):
            sizes[allocation] += change
            made.setdefault(allocation, moment)
        alive = [(allocation, size) for allocation, size in sizes.items() if size]
        self.events[:] = alive
        self.moments[:] = [made[allocation] for allocation, _ in alive]
        self.layers[:] = [allocation.layer for allocation, _ in alive]

    def _add(self, allocation: Allocation, change: int) -> None:
        if change and self.recording:
            self.events.append((allocation, change))
            self.moments.append(self._moment)
            in_layers = self._moment.phase in ("forward", "recomputation", "backward")
            self.layers.append(self.layer if in_layers else None)

    # --- repetition -------------------------------------------------------------------------------

    def shortened(self, parts: list, cost: CostTrend) -> Iterator[tuple]:
        """Yield some of the tiles or chunks, each with the one that follows. While one runs that
        stands for those that are left out, `weight` is their number with it.

        Parts with even costs, of which the last may be short: the first, the second, which stands
        for the others, and the last. Parts whose cost grows: the first, the middle one of the
        others, which stands for them, and the last two, because the last may be short. Where it
        shrinks, the same ones backwards, so that backward finds what forward has kept.
        """
        first, last = {"even": (1, 1), "growing": (1, 2), "shrinking": (2, 1)}[cost]
        others = parts[first:-last]
        if len(others) < 2:
            yield from with_next(parts)
            return
        middle = {
            "even": 0,
            "growing": len(others) // 2,
            "shrinking": len(others) - 1 - len(others) // 2,
        }[cost]
        before = self.weight
        for at, pair in enumerate(with_next([*parts[:first], others[middle], *parts[-last:]])):
            self.weight = before * len(others) if at == first else before
            yield pair
        self.weight = before

    # --- what it is for ---------------------------------------------------------------------------

    def claim(
        self,
        tensors: Iterable[Tensor],
        component: str,
        *,
        place: Place | None = None,
        label: str = "",
        layer: int | None = None,
    ) -> None:
        """Set what the memory of existing tensors is for, where it is, its name and its layer.
        Events that were recorded before change too.
        """
        for tensor in tensors_in(tensors):
            for piece in plain_pieces(tensor):
                if (found := self._alive.get(piece.untyped_storage()._cdata)) is not None:
                    found[0].component = component
                    found[0].place = place or found[0].place
                    found[0].label = label or found[0].label
                    if layer is not None:  # of no layer where layers share it
                        first = self._claimed.setdefault(found[0], layer)
                        self._claimed[found[0]] = layer if first == layer else None
                        found[0].layer = self._claimed[found[0]]

    def place_of(self, tensor: Tensor) -> Place:
        """Return where a tensor is."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        return "device" if found is None else found[0].place

    def _brings_parameter(self, func, args) -> bool:
        """Return whether func prepares a parameter for FSDP: the cast of a shard before the
        all-gather, or the copy that replaces the all-gather on a single rank.
        """
        if func not in _COPIES or self._moment.phase == "optimizer":
            return False
        source = args[1] if func is torch.ops.aten.copy_.default else args[0]
        found = self._alive.get(source.untyped_storage()._cdata)
        return found is not None and found[0].component in ("parameters", "gathered parameters")

    @contextmanager
    def placed(self, place: Place) -> Iterator[None]:
        """Count storages that are allocated in this context as in `place`."""
        before, self.place = self.place, place
        try:
            yield
        finally:
            self.place = before


_DEVICE, _META = torch.ops.prim.device.default, torch.device("meta")
_WAIT = torch.ops._c10d_functional.wait_tensor.default
_SCALAR = torch.ops.aten._local_scalar_dense.default
_EMPTY_STRIDED = torch.ops.aten.empty_strided.default
_PROMOTE = torch.ops.aten.promote_types.default
_CASTS = {torch.ops.aten._to_copy.default}
_COPIES = _CASTS | {torch.ops.aten.copy_.default}


FSDP = "FSDP"
WORKSPACE = "workspace"
"""An entry of `Moment.created_in` for memory that a kernel allocates for its own use."""
_PACKAGE = str(Path(__file__).parents[1])
_MAKERS = 3


def creating_functions() -> tuple[str, ...]:
    """Return the names of running functions that tell what a new tensor is, innermost first.

    These are functions of this project ("exchange._scatter_heads"), "FSDP", and transformers'
    rotary embedding. An operator tells only how a tensor was made. The search ends at the function
    that runs a checkpointed segment, because the callers of a recomputation have nothing to do with
    the tensors that it makes.
    """
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < _MAKERS:
        code = frame.f_code
        # By id, because the hash of a code object is that of all that it consists of.
        known = _known_makers.get(id(code))
        if known is None:
            known = _known_makers[id(code)] = code, _maker(code)
        if name := known[1]:
            if name == "checkpointing._run":
                break
            if name not in found:
                found.append(name)
        frame = frame.f_back
    return tuple(found)


_known_makers: dict[int, tuple[CodeType, str]] = {}


def _maker(code: CodeType) -> str:
    """Return a function's name in `creating_functions`, or an empty string for other functions."""
    file = Path(code.co_filename)
    if "_fully_shard" in file.parts:
        return FSDP
    if code.co_name == "apply_rotary_pos_emb":
        return code.co_name
    is_ours = code.co_filename.startswith(_PACKAGE) and file.parent.name in ("memory", "ulysses")
    return f"{file.stem}.{code.co_name}" if is_ours and not code.co_name.startswith("<") else ""


def _fsdp_component(func) -> str | None:
    """Return the component of an FSDP operation's results, or None for other operations."""
    name = func._opname
    if func.namespace == "fsdp":
        return "gradients" if name == "chunk_cat" else "gathered parameters"
    if func.namespace == "c10d":
        if "allgather" in name:
            return "gathered parameters"
        return "gradients" if "reduce_scatter" in name else None
    return None


@cache
def _are_plain(types: frozenset[type] | tuple[type, ...]) -> bool:
    """Return whether no tensor is of a wrapper class, whose tensors consist of others."""
    plain = (FakeTensor, nn.Parameter)
    return all(
        issubclass(t, plain)
        or getattr(t, "__torch_dispatch__", None) is torch._C._disabled_torch_dispatch_impl
        for t in types
    )


def _is_real(types, args, kwargs) -> bool:
    """Return whether the arguments include tensors, and all of these have values: none is fake or
    on the meta device.
    """
    if any(issubclass(t, FakeTensor) for t in types):
        return False
    tensors = tensors_in((args, kwargs))
    return bool(tensors) and not any(x.is_meta for x in tensors)


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts: `tree_leaves` for an operator's
    arguments and results, at a tenth of its time.
    """
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: object, found: list[Tensor]) -> None:
    kind = type(value)
    if kind is FakeTensor:
        found.append(value)  # type: ignore[arg-type]
    elif kind in _NO_TENSORS:
        return
    elif isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for x in value:
            _collect(x, found)
    elif isinstance(value, dict):
        for x in value.values():
            _collect(x, found)


_NO_TENSORS = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size))
