"""Random documents, and the batch that each rank gets of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titan_ulysses.data.loader import Batch
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import chunk_length


@dataclass(frozen=True)
class Document:
    """Tokens [L + 1] of one document, the last of them only a label; labels that are not trained on
    are -100.
    """

    tokens: Tensor
    labels: Tensor


Row = tuple[Document, ...]


def make_rows(
    lengths: list[tuple[int, ...]], *, masked: str, vocab_size: int, seed: int
) -> list[Row]:
    """Random rows of documents. masked: "none"; "uneven": every second half of a row, all of the
    last row, and some.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, row in enumerate(lengths):
        documents, start, total = [], 0, sum(row)
        for length in row:
            tokens = torch.randint(vocab_size, (length + 1,), generator=generator)
            labels = tokens[1:].clone()
            labels[-1] = -100  # what follows a document is not its next token
            if masked == "uneven":
                labels[torch.arange(start, start + length) >= total // 2] = -100
                labels[torch.rand(length, generator=generator) < 0.3] = -100
                if index == len(lengths) - 1:
                    labels[:] = -100
            documents.append(Document(tokens, labels))
            start += length
        rows.append(tuple(documents))
    return rows


def local_batch(rows: list[Row], mesh: Mesh, stream_chunk_tokens: int = -1) -> Batch:
    """This rank's rows and tokens of a global micro-batch, as the loader cuts them."""
    count = len(rows) // mesh.batch.size()
    mine = rows[mesh.batch.get_local_rank() * count :][:count]
    lengths = tuple(tuple(len(d.labels) for d in row) for row in mine)

    chunk_tokens = chunk_length(stream_chunk_tokens, sum(lengths[0]), mesh.sp.size())

    def stack(part) -> Tensor:
        whole = torch.stack([torch.cat([part(d) for d in row]) for row in mine])
        return mesh.local_slice(whole, chunk_tokens=chunk_tokens)

    return Batch(
        input_ids=stack(lambda d: d.tokens[:-1]),
        labels=stack(lambda d: d.labels),
        position_ids=stack(lambda d: torch.arange(len(d.labels))),
        documents=lengths,
        chunk_tokens=chunk_tokens,
    )
