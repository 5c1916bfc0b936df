"""Which phase of the step and which module an operation belongs to, also in backward, where no
module's forward is on the call stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from titan_ulysses.memory.loss_head import LossHead
from titan_ulysses.model.families import mlp_layout
from titan_ulysses.ulysses.linear_attention import is_linear_attention

SPARSE = ("indexer", "sparse attention")
"""The components of learned sparse attention: an indexer with its scores, and the core that reads
what it chose.
"""


class Owner(NamedTuple):
    """A module, and the component that its memory counts as."""

    component: str
    module: str
    layer: int | None = None


OUTSIDE = Owner("other", "the step")
"""The owner of operations that belong to no module."""
_OPTIMIZER = Owner("optimizer", "the optimizer")


class Attribution:
    """Follows which module's forward, recomputation or backward is running, by hooks on the model's
    modules.

    In backward, the running module is the one whose forward created the autograd node that is
    running. Autograd numbers nodes in the order of their creation, separately on each thread. On a
    CPU, backward runs on the same thread as forward, so the numbers identify the nodes.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]):
        """blocks: the decoder's layers, before activation checkpointing wraps them."""
        self._running: list[Owner] = []
        self._owners: dict[int, Owner] = {}
        self._numbered = torch.autograd._get_sequence_nr()
        self._latest = OUTSIDE
        self._optimizer_runs = False
        self._within: str | None = None
        for module, owner in _owners(model, blocks).items():
            # Before all other hooks, so that FSDP's work before the forward counts for this module.
            module.register_forward_pre_hook(self._enter(owner), prepend=True)
            module.register_forward_hook(self._leave, always_call=True)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow when the optimizer's step is running."""

        def note(runs: bool):
            def hook(*_) -> None:
                self._optimizer_runs = runs

            return hook

        optimizer.register_step_pre_hook(note(True))
        optimizer.register_step_post_hook(note(False))

    @contextmanager
    def counted_as(self, component: str) -> Iterator[None]:
        """Let what runs in this context be of another component of its module."""
        self.here()
        self._within = component
        try:
            yield
            self.here()
        finally:
            self._within = None

    def _enter(self, owner: Owner):
        def hook(*_) -> None:
            self.here()  # autograd nodes created so far belong to the caller
            self._running.append(owner)

        return hook

    def _leave(self, *_) -> None:
        self.here()
        self._running.pop()

    @property
    def phase(self) -> str:
        if self._optimizer_runs:
            return "optimizer"
        if torch._C._current_graph_task_id() != -1:
            return "recomputation" if self._running else "backward"
        return "forward" if self._running else "update"

    def here(self) -> Owner:
        """Return the owner of the current operation. Must be called at every operation."""
        if self._optimizer_runs:
            owner = _OPTIMIZER
        elif self._running:
            owner = self._running[-1]
        else:
            node = torch._C._current_autograd_node()
            # A node that `_owners` does not know accumulates a gradient or was created during
            # backward. It counts as part of the operation before it.
            owner = OUTSIDE if node is None else self._owners.get(node._sequence_nr(), self._latest)
        if self._within is not None:
            owner = owner._replace(component=self._within)
        made = torch.autograd._get_sequence_nr()
        for number in range(self._numbered, made):
            self._owners[number] = owner
        self._numbered, self._latest = made, owner
        return owner


def _owners(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[nn.Module, Owner]:
    """Return the owner of each module.

    A module counts as the component of the module that contains it. Where that is "other", the
    module's own kind decides.
    """
    layers = {block: layer for layer, block in enumerate(blocks)}
    mlps = {layout.mlp for layout in map(mlp_layout, blocks) if layout is not None}
    owners: dict[nn.Module, Owner] = {}

    def visit(module: nn.Module, name: str, above: Owner) -> None:
        component = above.component if above.component != "other" else _component(module, mlps)
        if "indexer" in type(module).__name__.lower():
            component = "indexer"
        owners[module] = owner = Owner(component, name or "model", layers.get(module, above.layer))
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name, owner)

    visit(model, "", Owner("other", "model"))
    return owners


def _component(module: nn.Module, mlps: set[nn.Module]) -> str:
    kind = type(module).__name__.lower()
    if isinstance(module, LossHead):
        return "loss head"
    if module in mlps:
        return "MLP"
    if is_linear_attention(module):
        return "linear attention"
    if "attention" in kind or "attn" in kind:
        return "attention"
    return "norm" if "norm" in kind else "other"
