"""RoPE whose frequencies depend on the length of the sequence: types "dynamic" and "longrope".

transformers takes the largest position that it is given as the length. Here that would be the
largest position of one rank's slice, or that of the longest document of a batch. Instead, each
document is rotated by the frequencies of its own length, as transformers does when that document is
alone and the first that it sees ("dynamic" remembers the longest length so far). The lengths are
known on the host, so nothing is read back from the device.
"""

from __future__ import annotations

import inspect
from itertools import accumulate
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from titan_ulysses.distributed.device import copied_to
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import Documents, current_chunk, local_slice

LENGTH_DEPENDENT = {"dynamic", "longrope"}


class DocumentRoPE:
    """A replacement for a rotary embedding's forward.

    It runs the family's own rotation, with frequencies that are chosen here for each document.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        # Unwrapped, it does not choose frequencies by the largest position.
        self.rotate = MethodType(inspect.unwrap(type(rotary).forward), rotary)
        self.documents: Documents = ()
        self.position_limits: Documents = ()
        self.sp_rank = 0
        self.chunk_tokens: int | None = None
        rotary.forward = self.forward

    def begin(
        self,
        documents: Documents,
        position_limits: Documents,
        sp_rank: int,
        chunk_tokens: int | None = None,
    ) -> None:
        """Set what the next forward needs.

        `documents` holds the lengths of each row's documents. `position_limits` holds how far their
        positions reach, which counts as the length here. `sp_rank` and `chunk_tokens` say which
        tokens of the rows this rank has (see `sequence.local_slice`).
        """
        self.documents, self.position_limits = documents, position_limits
        self.sp_rank, self.chunk_tokens = sp_rank, chunk_tokens

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Map position_ids [B, T] to the family's output, usually cos and sin, each [B, T, d].

        Where a chunk is computed alone, they are those of this rank's tokens of the chunk.
        """
        of_layer = {} if layer_type is None else {"layer_type": layer_type}
        kind = self.rotary.rope_type if layer_type is None else self.rotary.rope_type[layer_type]
        if kind not in LENGTH_DEPENDENT:
            return self.rotate(x, position_ids, **of_layer)
        # Up to this length the frequencies are the original ones.
        if kind == "longrope":
            parameters = self.rotary.config.rope_parameters
            parameters = parameters if layer_type is None else parameters[layer_type]
            bound = parameters["original_max_position_embeddings"]
        else:
            bound = self.rotary.original_max_seq_len

        def counts_as(length: int) -> int:  # one for all lengths with the same frequencies
            return max(length, bound) if kind == "dynamic" else bound + (length > bound)

        here = self._documents_here()
        rows = [[(tokens, counts_as(length)) for tokens, length in row] for row in here]
        # Rotate all tokens once for each distinct length, then choose token by token.
        unique_lengths = sorted({length for row in rows for _, length in row})
        rotated = []
        for length in unique_lengths:
            self._set_frequencies(kind, length, bound, x.device, of_layer)
            rotated.append(self.rotate(x, position_ids, **of_layer))
        result = rotated[0]
        if len(unique_lengths) == 1:
            return result
        lengths = self._lengths_of_tokens(rows, position_ids.shape[1])
        token_lengths = copied_to(lengths, x.device)
        for length, other in zip(unique_lengths[1:], rotated[1:], strict=True):
            chosen = (token_lengths == length)[..., None]
            if isinstance(result, Tensor):
                result = torch.where(chosen, other, result)
            else:
                pairs = zip(other, result, strict=True)
                result = tuple(torch.where(chosen, new, old) for new, old in pairs)
        return result

    def _set_frequencies(
        self, kind: str, length: int, bound: int, device: torch.device, of_layer: dict
    ) -> None:
        prefix = "".join(f"{name}_" for name in of_layer.values())
        frequencies = getattr(self.rotary, f"{prefix}original_inv_freq").to(device)
        if length > bound:
            # transformers has a tensor here, whose arithmetic is fp32. It is filled on the device,
            # because a copy from the host would wait.
            whole = torch.full((), length, device=device) if kind == "dynamic" else length
            frequencies, _ = ROPE_INIT_FUNCTIONS[kind](
                self.rotary.config, device, seq_len=whole, **of_layer
            )
        setattr(self.rotary, f"{prefix}inv_freq", frequencies)

    def _documents_here(self) -> list[list[tuple[int, int]]]:
        """Return the documents of each row that reach into the running chunk, or all of them if the
        whole sequence is computed: how many tokens each has there, and what counts as its length.
        """
        chunk = current_chunk()
        here = slice(0, sum(self.documents[0])) if chunk is None else chunk.whole
        rows = []
        for documents, limits in zip(self.documents, self.position_limits, strict=True):
            of_row = zip(accumulate(documents), documents, limits, strict=True)
            cut = ((min(end, here.stop) - max(end - n, here.start), m) for end, n, m in of_row)
            rows.append([(tokens, limit) for tokens, limit in cut if tokens > 0])
        return rows

    def _lengths_of_tokens(self, rows: list[list[tuple[int, int]]], tokens: int) -> Tensor:
        """Return [B, tokens]: for each token of this rank, the length that its document counts as.

        rows has (tokens, length) of each document, of all ranks.
        """
        pairs = [torch.tensor(row).unbind(1) for row in rows]
        whole = torch.stack([lengths.repeat_interleave(counts) for counts, lengths in pairs])
        return local_slice(
            whole,
            rank=self.sp_rank,
            degree=whole.shape[1] // tokens,
            chunk_tokens=self.chunk_tokens,
        )


def use_document_lengths(model: PreTrainedModel, blocks: nn.ModuleList) -> list[DocumentRoPE]:
    """Make the model's length-dependent rotary embeddings use the lengths of documents.

    Each forward must first pass the lengths to `begin` of every returned object. UserError if such
    an embedding is inside a block.
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
                    f'"{(kinds & LENGTH_DEPENDENT).pop()}" inside its layers, and this version '
                    "cannot pass the lengths of documents to them."
                )
            found.append(DocumentRoPE(module))
    return found
