"""The attention function that transformers calls in every layer.

It runs the exchange to heads, core attention and the exchange back. It is registered once with
transformers, as "ulysses", and holds no state. What attention needs to know (the mesh, the core and
the documents of the batch) arrives with each call as the keyword argument `ulysses`, which
transformers passes down from the model's forward. Two models on different meshes can therefore
share a process without affecting each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import Chunk, Documents, chunks_of, local_slice
from titan_ulysses.ulysses.cores import Core, takes_any_size
from titan_ulysses.ulysses.exchange import SEQUENCE, heads_to_sequence, sequence_to_heads
from titan_ulysses.ulysses.heads import HeadPlan, plan_heads
from titan_ulysses.ulysses.indexer import gather_sequence, scores_to_train
from titan_ulysses.ulysses.indexer_loss import (
    IndexerScores,
    differentiate,
    differentiate_all,
    sum_for_owners,
    with_indexer_loss,
)
from titan_ulysses.ulysses.pieces import KERNELS
from titan_ulysses.ulysses.scores import of_documents
from titan_ulysses.ulysses.sparse import summed_weights, weights_of_all

ATTENTION_NAME = "ulysses"


class Extent:
    """What layers compute at a time, and what joins it to the rest: here the whole sequence.

    In a streamed block it is a chunk (`streaming/chunks.py`).
    """

    tokens: slice | None = None
    """The tokens of the sequence; None: all of them."""
    keys_only = False
    """Whether nothing is needed but the keys and values of attention."""

    @property
    def start(self) -> int:
        """The first of the tokens."""
        return 0 if self.tokens is None else self.tokens.start

    @property
    def hands_state_on(self) -> bool:
        """Whether what comes later needs the state of a layer after these tokens."""
        return False

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        module: nn.Module,
        ulysses: Ulysses,
        layer: dict[str, Any],
    ) -> Tensor:
        """Compute attention: q [B, T, Hq, D], k [B, T, Hkv, D], v [B, T, Hkv, Dv] of this rank's
        tokens -> [B, T, Hq, Dv]. layer: documents, scale, window, softcap, sinks and chosen.
        """
        mesh, core = ulysses.mesh, ulysses.core
        plan = plan_heads(q.shape[2], k.shape[2], mesh.size())
        if layer["chosen"] is not None:
            layer["chosen"] = gather_sequence(layer["chosen"], mesh)
        scores = scores_to_train(module)
        if mesh.size() > 1:
            # From all heads of this rank's tokens to this rank's heads of all tokens, and back.
            q, k, v = (DTensor.from_local(x, mesh, (SEQUENCE,), run_check=False) for x in (q, k, v))
            (q,), k, v = sequence_to_heads(q, k, v, plan)
        rank = mesh.get_local_rank() if mesh.size() > 1 else 0
        output = _local_heads(core, q, k, v, layer, plan, rank)
        if mesh.size() > 1:
            output = heads_to_sequence((output,), plan, mesh).to_local()
        if scores is None or ulysses.label_share is None:
            return output
        of_heads = q.detach(), k.detach(), v.detach(), layer.pop("chosen")
        gradients = partial(_indexer_gradients, ulysses, layer, plan)
        return with_indexer_loss(output, scores, gradients, *of_heads)

    def index_keys(
        self, indexer: nn.Module, keys: Tensor, documents: Documents
    ) -> Iterable[tuple[slice, Tensor]] | None:
        """Return all keys [B, n, D] that these tokens choose from, by blocks of tokens, given their
        own; None: nothing is to be chosen.
        """
        return [(slice(0, keys.shape[1]), keys)]

    def state_before(
        self, layer: nn.Module, anchors: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...] | None:
        """Return the state of a layer before these tokens, [B, ...] each; None: it is empty.

        anchors: the tensors that the layer computes with; gradients flow through one of them.
        """
        return None

    def state_after(
        self, layer: nn.Module, output: Tensor, state: tuple[Tensor, ...] | None
    ) -> Tensor:
        """Keep the state of a layer after these tokens, and return the layer's output."""
        return output


@dataclass(frozen=True)
class Ulysses:
    """What every attention layer needs to know about the current forward pass."""

    mesh: DeviceMesh
    """The 1-D sequence-parallel mesh of P ranks."""
    core: Core
    documents: Documents
    position_ids: Tensor
    """[B, T]: position ids of this rank's tokens. A document need not start at position 0."""
    chunk_tokens: int | None = None
    """Tokens of a chunk of the whole sequence, of which this rank has a slice; None: all of it."""
    label_share: Tensor | None = None
    """[B, T]: what each of this rank's tokens counts in a mean over the labels of the step, 0
    without a label; given if indexers are trained.
    """
    # By a lambda, because torch.compile can trace neither an object nor a class as a default.
    extent: Extent = field(default_factory=lambda: Extent())
    """What is computed at a time."""

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The chunks in which a block can work through the sequence, in order."""
        degree = self.mesh.size()
        return chunks_of(self.position_ids.shape[1] * degree, degree, self.chunk_tokens)

    @cached_property
    def places(self) -> Tensor:
        """[B, T]: index in its document, from 0, of each token that this rank computes."""
        rank, degree = self.mesh.get_local_rank(), self.mesh.size()
        device = self.position_ids.device
        tokens = self.extent.tokens or slice(0, self.position_ids.shape[1] * degree)
        every = torch.arange(tokens.start, tokens.stop, device=device)
        here = local_slice(every, rank=rank, degree=degree, dim=0)
        rows = []
        for row in self.documents:
            starts = torch.tensor([0, *accumulate(row)][:-1]).to(device, non_blocking=True)
            rows.append(here - starts[torch.bucketize(here, starts, right=True) - 1])
        return torch.stack(rows)


def ulysses_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    ulysses: Ulysses | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Compute a layer's attention through transformers' attention interface: -> [B, T, Hq, Dv].

    query is [B, Hq, T, D], key [B, Hkv, T, D] and value [B, Hkv, T, Dv]; Dv differs from D only in
    latent attention. Attention is causal inside each document of `ulysses.documents`. An
    attention_mask is refused, because the documents already define everything that is masked. The
    layer's window, soft-cap, sinks and chosen keys arrive under transformers' own keyword names
    (`indices` of an indexer.py's Indexer). UserError for
    a call that no core can serve.
    """
    if kwargs.get("indices") is not None:
        attention_mask = None  # the stand-in that `Sharding` gives to a decoder with indexers
    ulysses = checked(ulysses, module, attention_mask, **kwargs)
    layer: dict[str, Any] = {
        "documents": _chunked(ulysses.documents, module),
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": kwargs.get("sliding_window"),
        "softcap": kwargs.get("softcap"),
        "sinks": kwargs.get("s_aux"),
        "chosen": kwargs.get("indices"),
    }
    if layer["chosen"] is not None and not layer["chosen"].shape[-1]:
        layer["chosen"] = None  # all keys
    if layer["window"] is not None and layer["window"] >= max(map(max, ulysses.documents)):
        layer["window"] = None  # it masks nothing, and cores are faster without a window
    if getattr(module, "attn_temperature_tuning", False) and not module.use_rope:
        query = _correct_temperature(query, module, ulysses.places)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return ulysses.extent.attend(q, k, v, module, ulysses, layer), None


def checked(
    ulysses: Ulysses | None,
    module: nn.Module,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_,
) -> Ulysses:
    """Return ulysses. UserError if a layer is not given it, or asks for what cannot be done."""
    name = type(module).__name__
    if ulysses is None:
        raise UserError(
            f"model: {name} does not receive the documents and ranks: this version of transformers "
            "does not pass keyword arguments on to it. Install a newer one, or another model."
        )
    if attention_mask is not None:
        raise UserError(
            f"model: {name} gets its own attention mask, but here the documents determine all "
            "that is masked."
        )
    if dropout:
        raise UserError(
            f"model: {name} drops attention weights (at a rate of {dropout}), which would depend "
            "on the mesh. Set its dropout to 0.0 in the model's config."
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UserError(
            f"model: {name} attends to later tokens too (is_causal = False), but every core is "
            "causal."
        )
    return ulysses


def _local_heads(
    core: Core,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer: dict[str, Any],
    plan: HeadPlan,
    rank: int,
) -> Tensor:
    """Run core attention over this rank's heads, with at least one call per run of the plan.

    A run is a range of heads with one ratio of query heads to KV heads (see `HeadPlan.runs`).
    """
    mine, sinks = plan.parts[rank][0].heads, layer["sinks"]
    if sinks is not None:
        sinks = sinks[mine.start : mine.stop]
    if not mine:
        # An idle rank returns [B, S, 0, Dv]. The result stays connected to all inputs in the
        # autograd graph, because the exchange in backward is a collective that every rank must
        # join.
        return v if sinks is None else v + sinks[:, None]
    # With only the keywords that this layer uses, so that the core need not accept others.
    used = {keyword: value for keyword, value in layer.items() if value is not None}

    def call(q: Tensor, k: Tensor, v: Tensor, heads: slice) -> Tensor:
        return core(q, k, v, **used if sinks is None else used | {"sinks": sinks[heads]})

    calls = plan.runs(rank)
    if not takes_any_size(core):
        calls = list(_bounded(calls, max(x[:, :, 0].numel() for x in (q, v))))
    if len(calls) == 1:
        return call(q, k, v, slice(None))
    queries, keys = zip(*calls, strict=True)
    inputs = _parts(q, queries), _parts(k, keys), _parts(v, keys), queries
    return torch.cat([call(*of_call) for of_call in zip(*inputs, strict=True)], dim=2)


def _summed_weights(
    q: Tensor, k: Tensor, chosen: Tensor, layer: dict[str, Any], plan: HeadPlan, mesh: DeviceMesh
) -> Tensor:
    """Return the attention [B, T, K] of this rank's tokens to the keys that they chose, summed over
    the heads of all ranks.
    """
    rows, tokens = q.shape[:2]
    scores = of_documents(layer["documents"], layer["scale"], chosen=chosen)
    sums = torch.zeros_like(chosen, dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys in plan.runs(mesh.get_local_rank()):
        of_run = q[:, :, queries].flatten(0, 1), k[:, :, keys].flatten(0, 1)
        sums += summed_weights(*of_run, scores).unflatten(0, (rows, tokens))
    return sum_for_owners(sums, mesh)


def _indexer_gradients(
    ulysses: Ulysses,
    layer: dict[str, Any],
    plan: HeadPlan,
    scores: IndexerScores,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of what an indexer has made for the whole sequence.

    q, k and v are of this rank's heads and all tokens, and so is what all queries have chosen.
    """
    mesh, share = ulysses.mesh, ulysses.label_share
    assert share is not None
    keys = gather_sequence(scores.keys.detach(), mesh)
    sums, every = torch.zeros_like(keys, dtype=scores.queries.dtype), slice(0, keys.shape[1])
    if chosen is not None:
        target = _summed_weights(q, k, chosen, layer, plan, mesh)
        dq, dw = differentiate(scores, target, share, lambda _: [(every, keys, sums)])
        return dq, dw, sum_for_owners(sums, mesh)
    rank, degree = mesh.get_local_rank(), mesh.size()
    tokens, runs = q.shape[1] // degree, plan.runs(rank)
    options = of_documents(layer["documents"], layer["scale"])
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    lse = q.new_empty(q.shape[2], len(flat[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    for of_q, of_k in runs:
        run = flat[0][:, of_q], flat[1][:, of_k], flat[2][:, of_k]
        lse[of_q] = KERNELS.forward(*run, options)[1]

    def attention(row: int, own: slice, part: slice) -> Tensor:
        found = lse.new_zeros(degree, own.stop - own.start, part.stop - part.start)
        for owner in range(degree):
            mine = slice(owner * tokens + own.start, owner * tokens + own.stop)
            of_row = slice(row * q.shape[1] + mine.start, row * q.shape[1] + mine.stop)
            for of_q, of_k in runs:
                pair = q[row, mine, of_q], k[row, part, of_k]
                found[owner] += weights_of_all(*pair, lse[of_q, of_row], layer["scale"])
        return found

    blocks = [(every, keys, sums, attention)]
    dq, dw = differentiate_all(
        *(scores, ulysses.places, rank * tokens, plan.query_heads, share, lambda _: blocks, mesh)
    )
    return dq, dw, sum_for_owners(sums, mesh)


_MOST_ELEMENTS = 2**31 - 1
"""The most elements of a tensor of a call. Beyond, 32-bit indices of a kernel overflow."""


def _bounded(runs: list[tuple[slice, slice]], head_elements: int) -> Iterator[tuple[slice, slice]]:
    """Cut runs so that every tensor of a call has at most `_MOST_ELEMENTS`.

    head_elements is the number of elements of one head over all rows and tokens. The query heads of
    a KV head are divided too, if they are too many. A call has at least one query head, however
    large that is.
    """
    most = max(1, _MOST_ELEMENTS // head_elements)  # query heads per call
    for queries, keys in runs:
        group = (queries.stop - queries.start) // (keys.stop - keys.start)
        at_once = max(1, most // group)  # KV heads per call
        for key in range(keys.start, keys.stop, at_once):
            stop = min(keys.stop, key + at_once)
            first = queries.start + group * (key - keys.start)
            end = first + group * (stop - key)
            for start in range(first, end, most):
                yield slice(start, min(end, start + most)), slice(key, stop)


def _parts(x: Tensor, heads: Sequence[slice]) -> list[Tensor]:
    """Return x[:, :, part] for each part of the heads, all of which get a gradient.

    In backward each part's gradient is written to its place in one tensor as soon as it is there.
    Slices would make a tensor of x's size for each part, and a concatenation one more when all
    gradients of parts are there. A compiler assembles them by itself.
    """
    if torch.compiler.is_compiling():
        return [x[:, :, part] for part in heads]
    whole = _Whole(len(heads))
    return [_HeadSlice.apply(x, part, whole) for part in heads]


class _Whole:
    """The gradient of a tensor, of which the gradients of parts arrive one by one."""

    def __init__(self, parts: int):
        self._parts = parts
        self._begin()

    def _begin(self) -> None:
        self._waiting, self._gradient, self._written = self._parts, None, []

    def add(self, part: slice, gradient: Tensor, heads: int) -> Tensor | None:
        """Add the gradient of a part. Return that of the whole, of so many heads, after the last.

        Equal parts, which are the keys of calls with different queries, are added up.
        """
        if self._gradient is None:
            rows, tokens, _, size = gradient.shape
            self._gradient = gradient.new_empty(rows, tokens, heads, size)
        place = self._gradient[:, :, part]
        place.add_(gradient) if part in self._written else place.copy_(gradient)
        self._written.append(part)
        self._waiting -= 1
        if self._waiting:
            return None
        gradient = self._gradient
        self._begin()  # for another backward through the same graph
        return gradient


class _HeadSlice(torch.autograd.Function):
    """A part of a tensor's heads (see `_parts`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: slice, whole: _Whole) -> Tensor:
        ctx.part, ctx.whole, ctx.heads = part, whole, x.shape[2]
        return x[:, :, part]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        return ctx.whole.add(ctx.part, gradient, ctx.heads), None, None


def _correct_temperature(query: Tensor, module: nn.Module, places: Tensor) -> Tensor:
    """Correct llama4's temperature tuning (arXiv 2501.19399) to the tokens' places in documents.

    llama4 has already scaled query as if this rank's first token were at position 0. This function
    divides that factor out and applies the one of the true place, `places` [B, T].
    """

    def temperature(positions: Tensor) -> Tensor:
        steps = torch.floor((positions.float() + 1) / module.floor_scale)
        return (torch.log1p(steps) * module.attn_scale + 1).to(
            torch.promote_types(query.dtype, torch.float32)
        )

    given = temperature(torch.arange(query.shape[2], device=query.device))
    return (query * (temperature(places) / given)[:, None, :, None]).to(query.dtype)


def _chunked(documents: Documents, module: nn.Module) -> Documents:
    """Return documents, cut into chunks if this is a chunked-attention layer (llama4).

    Tokens attend only inside their chunk, so attention can treat each chunk as a document.
    """
    config = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    # Only a key that the config class declares counts: a config of another family keeps the key
    # if its config.json has it, but the family does not read it.
    if not types or not hasattr(type(config), "attention_chunk_size"):
        return documents
    if types[module.layer_idx] != "chunked_attention":
        return documents
    size = config.attention_chunk_size
    return tuple(
        tuple(min(size, length - start) for length in row for start in range(0, length, size))
        for row in documents
    )


AttentionInterface.register(ATTENTION_NAME, ulysses_attention)
