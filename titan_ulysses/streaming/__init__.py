"""Streaming: a block works through the sequence chunk by chunk, forward and backward.

What a block holds beside its input and its output then has the size of a chunk, whatever the length
of the sequence. Only the keys and values of one layer are of the whole sequence, for the heads of
this rank, or of the part of it that is still read (`keys.AttentionSpan`), and the states of linear
attention at the borders of chunks. The block itself is unmodified: it is called with the slices of
one chunk, and its keyword `ulysses` says which.

    forward     chunk 0: keys, attention, MLP -> output 0
                chunk 1: keys, attention to chunks 0 and 1, MLP -> output 1, and so on
    backward    keys of chunks 0, 1, ..., C - 2, from the block's input
                chunk C - 1: forward again as a graph; its gradients, those of all keys it saw too
                chunk C - 2: forward again; now the gradients of its own keys are complete, because
                no earlier query sees them; and so on to chunk 0

Where a window or the end of a document hides keys, the keys of a chunk are computed again when the
first chunk that reads them comes, and forgotten after the chunk's own turn.

The walk of a chunk:

    block.py        the block's forward slices its arguments, and calls the original block with the
                    keyword `ulysses`, whose `extent` is one of three kinds of
    chunks.py       a run of a block over one chunk: for its output (`ChunkForward`), for its keys
                    alone (`ChunkKeys`), or as a graph for backward (`ChunkBackward`). Attention and
                    layers that carry a state ask it for what comes before the chunk
    attention.py    the chunk's queries attend to the keys so far; and the backward of that
    keys.py         these keys, on the device or, block by block, off it
    embeddings.py   with `memory.stream_offload`: embedding and rotary embedding by chunks, whose
                    results are off the device (`memory/sequences.py`), as those of blocks are

The result is exact. Only the block's input is kept, which is what `memory/checkpointing.py` keeps
too: where the block is the last of a segment, recomputing the segment does not run it. The gradient
of the input is written where the gradient of the output stood. Gradients of parameters, keys and
values are summed in fp32 or wider.

With C chunks and k blocks per segment, a block's MLP and attention run forward 3 - 1/k times per
step (attention once where its outputs are kept), and its projections of queries, keys and values
(C - 1)/C times more. On P > 1 ranks a chunk takes two all-to-alls in forward, which are repeated
where a forward is. Backward takes two more, and one for the keys of each chunk that later ones
read, which are all but the last: per step and block 2C * (3 - 1/k) + 2C + C - 1. FSDP gathers the
parameters of a block twice and reduces its gradients once, whatever C is.
"""
