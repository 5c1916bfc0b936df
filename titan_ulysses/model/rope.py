"""RoPE whose frequencies depend on how long the sequence is: of type "dynamic" and "longrope".

transformers looks at the largest position that it is given, which is that of one rank's slice, and
of the longest of a batch's documents. Here each document is turned by the frequencies of its own
length, as transformers turns it when it sees it alone and first ("dynamic" remembers how long the
longest was). Lengths are known on the host, so that nothing is read back from the device.
"""

from __future__ import annotations

import inspect
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import local_slice

Documents = tuple[tuple[int, ...], ...]
LENGTH_DEPENDENT = {"dynamic", "longrope"}


class DocumentRoPE:
    """In place of a rotary embedding's forward: the family's own turning, with frequencies chosen
    here.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        # Without its look at the positions.
        self.turn = MethodType(inspect.unwrap(type(rotary).forward), rotary)
        self.documents: Documents = ()
        self.reaches: Documents = ()
        self.sp_rank = 0
        rotary.forward = self.forward

    def begin(self, documents: Documents, reaches: Documents, sp_rank: int) -> None:
        """Tell it of a forward: of each row's documents the lengths, and how far their positions
        reach, which is what counts as a length here; and whose slice of the rows this is.
        """
        self.documents, self.reaches, self.sp_rank = documents, reaches, sp_rank

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """position_ids [B, T] -> what transformers makes of them (cos and sin, each [B, T, d])."""
        of_layer = {} if layer_type is None else {"layer_type": layer_type}
        kind = self.rotary.rope_type if layer_type is None else self.rotary.rope_type[layer_type]
        if kind not in LENGTH_DEPENDENT:
            return self.turn(x, position_ids, **of_layer)
        bound = self._bound(kind, layer_type)
        lengths = [[self._counts_as(length, kind, bound) for length in row] for row in self.reaches]
        several = sorted({length for row in lengths for length in row})
        turned = []
        for length in several:
            self._set_frequencies(kind, length, bound, x.device, of_layer)
            turned.append(self.turn(x, position_ids, **of_layer))
        if len(several) == 1:
            return turned[0]
        mine = self._lengths_of_tokens(lengths, position_ids.shape[1]).to(x.device)
        if isinstance(turned[0], Tensor):
            return _chosen(mine, several, turned)
        return tuple(_chosen(mine, several, list(parts)) for parts in zip(*turned, strict=True))

    def _bound(self, kind: str, layer_type: str | None) -> int:
        """Up to this length the frequencies are the original ones."""
        parameters = self.rotary.config.rope_parameters
        if kind == "longrope":
            return (parameters if layer_type is None else parameters[layer_type])[
                "original_max_position_embeddings"
            ]
        return self.rotary.original_max_seq_len

    def _counts_as(self, length: int, kind: str, bound: int) -> int:
        """One length of all that have the same frequencies."""
        return max(length, bound) if kind == "dynamic" else bound + (length > bound)

    def _set_frequencies(
        self, kind: str, length: int, bound: int, device: torch.device, of_layer: dict
    ) -> None:
        prefix = "".join(f"{name}_" for name in of_layer.values())
        frequencies = getattr(self.rotary, f"{prefix}original_inv_freq").to(device)
        if length > bound:
            # A tensor, as transformers has it, whose arithmetic is fp32; filled, because copying
            # one would wait.
            whole = torch.full((), length, device=device) if kind == "dynamic" else length
            frequencies, _ = ROPE_INIT_FUNCTIONS[kind](
                self.rotary.config, device, seq_len=whole, **of_layer
            )
        setattr(self.rotary, f"{prefix}inv_freq", frequencies)

    def _lengths_of_tokens(self, lengths: list[list[int]], tokens: int) -> Tensor:
        """[B, T]: what the document of each token of this rank counts as."""
        rows = [
            torch.tensor(counts).repeat_interleave(torch.tensor(row))
            for counts, row in zip(lengths, self.documents, strict=True)
        ]
        whole = torch.stack(rows)
        return local_slice(whole, rank=self.sp_rank, degree=whole.shape[1] // tokens)


def _chosen(mine: Tensor, several: list[int], turned: list[Tensor]) -> Tensor:
    """Of what is turned by the frequencies of several lengths: each token by those of its
    document.
    """
    result = turned[0]
    for length, other in zip(several[1:], turned[1:], strict=True):
        result = torch.where((mine == length)[..., None], other, result)
    return result


def use_document_lengths(model: PreTrainedModel, blocks: nn.ModuleList) -> list[DocumentRoPE]:
    """Make the model's rotary embeddings that need it depend on documents' lengths; each forward
    must tell them.
    """
    inside = set(blocks.modules())
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if kinds & LENGTH_DEPENDENT:
            if module in inside:
                raise UserError(
                    f'model: "{model.config.model_type}" has RoPE of type '
                    f'"{(kinds & LENGTH_DEPENDENT).pop()}" inside its layers, where this version '
                    "cannot tell it how long the documents are."
                )
            found.append(DocumentRoPE(module))
    return found
