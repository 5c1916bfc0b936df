"""The names in the planner's output: components, and each tensor and moment of a simulated step.

A tensor is named in terms that the reader knows: by the part of the model that it belongs to ("MLP
of layer 7"), and by its role there ("q, k, v after the exchange"). A kernel has the name of the
kernel that runs on the GPU, not of the CPU operator that replaces it in the simulation.
"""

from __future__ import annotations

from titan_ulysses.plan.attribution import OUTSIDE, Owner
from titan_ulysses.plan.memory import FSDP, WORKSPACE, Allocation, Moment

COMPONENT_NAMES = {
    "parameters": "parameters (this rank's shards)",
    "gathered parameters": "parameters gathered by FSDP",
    "gradients": "gradients of parameters",
    "optimizer state": "optimizer state",
    "checkpoints": "checkpoints (inputs of blocks)",
    "attention": "activations of attention",
    "linear attention": "activations of linear attention",
    "indexer": "activations of indexers",
    "sparse attention": "sparse attention (chosen keys and values)",
    "MLP": "activations of MLPs",
    "norm": "activations of norms",
    "loss head": "loss head (logits, gradients)",
    "checkpoint copy": "copy of a checkpoint (async_mode)",
    "optimizer": "temporaries of the optimizer",
    "other": "hidden states, embedding, inputs",
    "fragmentation": "fragmentation (3 %, assumed)",
}
"""Names for the user of the purposes that memory can have, by their key. "optimizer" is what the
optimizer's step needs besides its state; "other" is the embedding, residuals and inputs. A
component without an entry is named by its key.
"""

_PHASES = {
    "forward": "the forward pass",
    "recomputation": "the backward pass, while a block is recomputed",
    "backward": "the backward pass",
    "optimizer": "the optimizer's update",
    "update": "the step outside of forward and backward: label count, gradient norm, clipping",
}
_BOOKKEEPING = "label count, loss, gradient norm"

_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_KERNELS = {
    _FLASH: "flash attention",
    f"{_FLASH}_backward": "flash attention's backward",
    "all_to_all_single": "the exchange (all-to-all)",
    "_log_softmax": "log-softmax",
    **dict.fromkeys(("mm", "addmm", "bmm"), "a matrix product"),
    "_scaled_mm": "a float8 matrix product",
    "_to_copy": "a change of dtype",
    "clone": "a copy",
    "copy_": "a copy",
    "cat": "a concatenation",
}
"""Names of kernels whose operator a reader may not recognise. Other kernels are named by their
operator.
"""

_ARITHMETIC = {
    "add": "sum",
    "sub": "difference",
    "mul": "product",
    "div": "quotient",
    "pow": "power",
}
_SHORT_NAMES = _ARITHMETIC | {
    "_to_copy": "change of dtype",
    "cat": "concatenation",
    "clone": "copy",
}
"""Names of an operator's result."""
_ELEMENTWISE = (*_ARITHMETIC, "neg", "where", "clamp", "sum", "mean", "rsqrt", "abs")
_PRODUCTS = ["mm", "addmm", "bmm", "_scaled_mm", "_grouped_mm", "linear"]

# --- tensors and moments --------------------------------------------------------------------------


def component_name(component: str) -> str:
    return COMPONENT_NAMES.get(component, component)


def tensor_name(allocation: Allocation) -> str:
    """Name a tensor by the part of the model that it belongs to, and by its role there."""
    if allocation.label:
        return allocation.label
    component, made, owner = allocation.component, allocation.made, allocation.made.owner
    if made.phase == "optimizer":
        return "optimizer: temporary of its update"
    if component == "gathered parameters":
        return f"parameters of {group_name(owner.layer)}, gathered by FSDP"
    if FSDP in made.created_in:
        what = "gradients" if made.phase == "backward" else "parameters"
        done = "being reduced" if what == "gradients" else "gathered"
        return f"{what} of {group_name(owner.layer)}, {done} by FSDP"
    if component == "gradients":
        return f"{module_name(owner)}: gradient of its weight"
    if component == "checkpoints":
        return "checkpoint: input of a block"
    if owner.module in (OUTSIDE.module, "setup"):
        return "loss and its gradient" if made.phase == "backward" else _BOOKKEEPING
    return f"{module_name(owner)}: {_role(allocation)}"


def moment_name(moment: Moment) -> str:
    """Describe a moment by the phase of the step, the part of the model, and the kernel."""
    phase = _PHASES.get(moment.phase, moment.phase)
    if moment.phase in ("optimizer", "update"):
        return phase
    if FSDP in moment.created_in:
        gathers = moment.phase in ("forward", "recomputation")
        what = "gathers parameters" if gathers else "reduces gradients"
        return f"{phase}, where FSDP {what} of {group_name(moment.owner.layer)}"
    return f"{phase}, in {module_name(moment.owner)}, at {kernel_name(moment.operation)}"


def kernel_name(operation: str) -> str:
    name = operation.strip("_")
    return _KERNELS.get(
        operation, f"an elementwise kernel ({name})" if name in _ELEMENTWISE else name
    )


def module_name(owner: Owner) -> str:
    """Name a module, as in "attention of layer 1, q_proj"; outside of the layers by its path."""
    if owner.layer is None:
        return "loss head" if owner.component == "loss head" else owner.module
    inside = owner.module.partition(f".{owner.layer}.")[2].split(".")
    if owner.component in ("attention", "MLP"):
        part = ".".join(inside[1:])
        return f"{owner.component} of layer {owner.layer}" + (part and f", {part}")
    return f"{inside[0]} of layer {owner.layer}" if inside[0] else f"layer {owner.layer}"


def group_name(layer: int | None) -> str:
    """Name a group of parameters that FSDP gathers and reduces together: a layer, or everything
    outside of the layers.
    """
    return "embedding, final norm and head" if layer is None else f"layer {layer}"


def _role(allocation: Allocation) -> str:
    """Return the role that a tensor has in the module that made it."""
    phase, _, operation, created_in = allocation.made
    for function, roles in _ROLES.items():
        if function in created_in:
            role = roles.get(operation) or roles.get("")
            if role:
                return role[phase == "backward"] if isinstance(role, tuple) else role
    # Tiles are computed again in backward, where no hook marks the phase as recomputation.
    recomputed = "tiled.forward" in created_in
    is_gradient = phase == "backward" and not recomputed
    tile = " of a tile" if recomputed or "tiled.backward" in created_in else ""
    if operation == _FLASH:
        what = "output" if len(allocation.shape) == 4 else "log-sum-exp"
        return f"{what} of flash attention"
    if operation == f"{_FLASH}_backward":
        return "gradient of q, k or v from flash attention"
    if operation in _PRODUCTS:
        return f"gradient of its input{tile and ', of a tile'}" if is_gradient else f"output{tile}"
    is_sum = operation == "add"
    if operation == "embedding" or (is_sum and allocation.component == "other" and not is_gradient):
        return "hidden states"
    if any(word in operation for word in ("empty", "zeros", "full")):
        return "gradient" if is_gradient else "output"
    if is_gradient:
        return f"{'sum of gradients' if is_sum else 'gradient of an intermediate'}{tile}"
    made_by = f" ({_SHORT_NAMES.get(operation, operation.strip('_'))})"
    return f"intermediate{tile or made_by}"


_PACKED = "output packed for the exchange", "gradients of q, k, v packed for the exchange"
_ROLES: dict[str, dict[str, str | tuple[str, str]]] = {
    "exchange._scatter_heads": {
        "new_empty": (
            "q, k, v packed for the exchange",
            "gradient of the output, packed for the exchange",
        ),
        "all_to_all_single": (
            "q, k, v after the exchange",
            "gradient of the output, after the exchange",
        ),
    },
    "exchange._packed": {"": _PACKED},
    "exchange._gather_heads": {
        "all_to_all_single": (
            "output as it is received",
            "gradients of q, k, v as they are received",
        ),
        "new_empty": ("output after the exchange", "gradient of q, k or v after the exchange"),
        "": _PACKED,
    },
    "replay.accumulate": {"": "gradients of its weights, summed over the tiles"},
    "tiled.backward": {"new_empty": "gradient of its input"},
    "tiled.forward": {"new_empty": "output"},
    "loss_head._scores": {"": "logits of a tile"},
    "loss_head._cross_entropy": {"_to_copy": "logits of a tile", "": "log-probabilities of a tile"},
    "loss_head.add_product": {"": "gradient of its weight, of a tile"},
    "loss_head._tile_loss": {"": "gradient of a tile's logits"},
    "loss_head.forward": {
        "zeros_like": "gradient of its weight",
        "new_empty": "gradient of the hidden states",
        "where": "hidden states of a tile",
        "_to_copy": "gradient of a tile's logits",
        "div": "the loss",
    },
    "loss_head.backward": {"": "gradient of its weight"},
    "apply_rotary_pos_emb": {"": "q or k with rotary embedding"},
    WORKSPACE: {"": "workspace of flash attention's backward kernel"},
}
"""The role of a tensor, by the function that made it and by the operation ("" stands for any other
operation). The functions are named as in `memory.creating_functions`. The first of them here that
is among a tensor's creating functions and has a role for the operation decides. A pair is (role in
forward, role in backward).
"""
