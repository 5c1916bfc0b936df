"""Turn a transformers causal LM into one that trains sharded: the ordered application of all wrappers, a line each."""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from titan_ulysses.errors import UserError
from titan_ulysses.memory.checkpointing import checkpoint_block
from titan_ulysses.memory.loss import LossHead
from titan_ulysses.mesh import Mesh
from titan_ulysses.model.families import attention_needs, check_family, head_of
from titan_ulysses.ulysses.attention import ATTENTION_NAME, Ulysses
from titan_ulysses.ulysses.cores import Core, Documents, choose_core


def parallelize(
    model: PreTrainedModel,
    mesh: Mesh,
    *,
    attention: str | Core = "auto",
    loss_tile_tokens: int = 0,
    checkpoint: bool = True,
    param_dtype: torch.dtype = torch.bfloat16,
    reduce_dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Wrap model, on meta or not, in place: Ulysses attention, loss head, activation checkpointing, FSDP2.

    Its forward then takes this rank's slice of a batch (see `_forward`). Parameters are stored in the dtype they have,
    computed with in param_dtype and their gradients summed in reduce_dtype. attention is a core, or the name of one
    (see `choose_core`). UserError for a model or a core that would train wrongly.
    """
    check_family(model.config)
    if isinstance(attention, str):
        needs, device_type = attention_needs(model.config), mesh.device.type
        attention, _ = choose_core(attention, needs, device_type=device_type, dtype=param_dtype)
    decoder, blocks = find_blocks(model)
    use_ulysses(model, decoder, mesh, attention)
    head = head_of(model.config)
    model.set_output_embeddings(
        LossHead(
            model.get_output_embeddings(), tile_tokens=loss_tile_tokens, scale=head.scale, softcap=head.softcap
        )
    )
    if checkpoint:
        for index, block in enumerate(blocks):
            blocks[index] = checkpoint_block(block)
    shard(model, blocks, mesh, MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype))
    return model


def find_blocks(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The decoder and its list of layers, found by the classes that transformers itself says not to split."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) and type(child[0]).__name__ in model._no_split_modules:
                return module, child
    raise UserError(f"model: {type(model).__name__} has no list of decoder layers that could be sharded.")


def use_ulysses(model: PreTrainedModel, decoder: nn.Module, mesh: Mesh, core: Core) -> None:
    """Let the model's attention layers call Ulysses, and its forward tell them the mesh, the core and the documents."""
    model.config._attn_implementation = ATTENTION_NAME
    sp = mesh.sp

    def forward(model: PreTrainedModel, *, documents: Documents, **inputs) -> CausalLMOutputWithPast:
        return _forward(model, decoder, ulysses=Ulysses(sp, core, documents, inputs["position_ids"]), **inputs)

    model.forward = MethodType(forward, model)


def _forward(
    model: PreTrainedModel,
    decoder: nn.Module,
    *,
    ulysses: Ulysses,
    input_ids: Tensor,
    position_ids: Tensor,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | None = None,
) -> CausalLMOutputWithPast:
    """The forward of a causal LM, with the loss computed inside the head from hidden states.

    input_ids, position_ids and labels (shifted already) are this rank's [B, T]; num_items_in_batch counts the valid
    labels of the whole step. `.loss` is this rank's part: parts and their gradients are summed over mesh and
    accumulation. Without labels: `.logits` of this rank's tokens.
    """
    hidden = decoder(
        input_ids=input_ids, position_ids=position_ids, use_cache=False, ulysses=ulysses
    ).last_hidden_state
    head = model.get_output_embeddings()
    if labels is None:
        return CausalLMOutputWithPast(logits=head(hidden))
    return CausalLMOutputWithPast(loss=head(hidden, labels, num_items_in_batch))


def shard(model: PreTrainedModel, blocks: nn.ModuleList, mesh: Mesh, mp_policy: MixedPrecisionPolicy) -> None:
    """FSDP2 over dp_shard x sp, replicated over dp_replicate; gradients are summed over the mesh, never averaged."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for block in blocks:
        fully_shard(block, mesh=mesh.fsdp, mp_policy=mp_policy)
    if embedding.weight is not head.weight:
        fully_shard(embedding, mesh=mesh.fsdp, mp_policy=mp_policy)
        # Its backward follows its forward at once: resharding between the two would gather twice.
        fully_shard(head, mesh=mesh.fsdp, mp_policy=mp_policy, reshard_after_forward=False)
    # Tied embedding and head stay in the root's group: FSDP refuses a parameter that two groups hold.
    fully_shard(model, mesh=mesh.fsdp, mp_policy=mp_policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Factor 1 and a plain SUM: the loss is divided by the step's tokens already, and gloo has no PREMUL_SUM.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
