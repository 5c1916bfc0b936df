"""Who is running: the phase of the step and the module, also in backward, where no module's forward
is on the stack.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from titan_ulysses.memory.loss import LossHead
from titan_ulysses.model.families import mlp_layout

COMPONENTS = (
    "parameters",
    "gathered parameters",
    "gradients",
    "optimizer state",
    "checkpoints",
    "attention",
    "MLP",
    "norm",
    "loss head",
    "optimizer",
    "other",
)
"""What memory is for. "optimizer": what its step needs besides its state; "other": the embedding,
residuals, inputs.
"""


class Owner(NamedTuple):
    """A module, and what its memory counts as."""

    component: str
    module: str
    layer: int | None = None


OUTSIDE = Owner("other", "the step")
"""Of what no module does."""


class Attribution:
    """Follows which module's forward, recomputation or backward is running, by hooks on the model's
    own modules.

    In backward it is the module in whose forward the autograd node that is running was made: nodes
    are numbered in the order of their making, on each thread, and on a CPU backward runs on the
    thread of forward.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]):
        """blocks: the decoder's layers as they were before they became checkpoints."""
        self._running: list[Owner] = []
        self._owners: dict[int, Owner] = {}
        self._numbered = torch.autograd._get_sequence_nr()
        self._latest = OUTSIDE
        self._optimizer_runs = False
        for module, owner in _owners(model, blocks).items():
            # First of all hooks: what FSDP does before a module's forward is for this module.
            module.register_forward_pre_hook(self._enter(owner), prepend=True)
            module.register_forward_hook(self._leave, always_call=True)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Know when optimizer steps."""

        def note(runs: bool):
            def hook(*_) -> None:
                self._optimizer_runs = runs

            return hook

        optimizer.register_step_pre_hook(note(True))
        optimizer.register_step_post_hook(note(False))

    def _enter(self, owner: Owner):
        def hook(*_) -> None:
            self.here()  # nodes made so far belong to the caller
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
        """The owner of what is being computed; to be called at every operation."""
        if self._optimizer_runs:
            owner = Owner("optimizer", "the optimizer")
        elif self._running:
            owner = self._running[-1]
        else:
            node = torch._C._current_autograd_node()
            # A node without a number of ours sums up gradients, or was made in a backward: of
            # whatever ran before it.
            owner = OUTSIDE if node is None else self._owners.get(node._sequence_nr(), self._latest)
        made = torch.autograd._get_sequence_nr()
        for number in range(self._numbered, made):
            self._owners[number] = owner
        self._numbered, self._latest = made, owner
        return owner


def _owners(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[nn.Module, Owner]:
    """What each module counts as: itself where its kind is known, else as the module that it is
    in.
    """
    layers = {block: layer for layer, block in enumerate(blocks)}
    mlps = {layout.mlp for layout in map(mlp_layout, blocks) if layout is not None}
    owners: dict[nn.Module, Owner] = {}

    def visit(module: nn.Module, name: str, above: Owner) -> None:
        component = above.component if above.component != "other" else _component(module, mlps)
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
    if "attention" in kind or "attn" in kind:
        return "attention"
    return "norm" if "norm" in kind else "other"
