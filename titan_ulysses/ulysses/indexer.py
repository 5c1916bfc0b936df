"""Learned sparse attention: an indexer chooses the keys that each query reads (DeepSeek-V3.2,
arXiv 2512.02556, section 2.1).

For the query at token t and each earlier key s of its document an indexer computes

    I_ts = sum_h w_th relu(scale q_th . k_s)

with few numbers: H small heads of queries, and one key per token, which all of them share. The
query then attends to the K keys with the largest I (`index_topk`; sparse.py). Where no document is
longer than K all keys are chosen, so the sparse core does not run, and the indexer only to learn.

The module stays unmodified. Its own forward makes the queries, keys and weights of this rank's
tokens, whatever its RoPE and norms are: it is called with a cache of no keys, and a look at its
products. What it would then do, scores [B, S, H, S] in fp32 (137 GB at 32K tokens and 32 heads), is
done here by tiles: the keys of all ranks are gathered, 128 numbers per token, and the best K of a
tile are merged from block to block of keys. Indices count tokens of the whole sequence. Scores are
in fp32, as the module's. Of equal scores `torch.topk` takes any, here as there.

Beside the two all-to-alls of attention, a layer with an indexer gathers its keys and, to the ranks
of the heads, the indices: 4 K bytes per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.parts import visited
from titan_ulysses.distributed.sequence import Documents
from titan_ulysses.ulysses.indexer_loss import BLOCK, TILE_NUMBERS, IndexerScores
from titan_ulysses.ulysses.scores import visible_keys

INDEXED = "indexed_attention"
"""The type of layers with an indexer, as configs name it."""


def indexers_of(block: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return each attention layer inside a block that has an indexer of the known kind, with it."""
    pairs = ((module, getattr(module, "indexer", None)) for module in block.modules())
    return [(layer, found) for layer, found in pairs if _is_known(found)]


def _is_known(module: Any) -> bool:
    parts = ("index_topk", "n_heads", "wk", "wq_b", "weights_proj", "softmax_scale")
    return isinstance(module, nn.Module) and all(hasattr(module, name) for name in parts)


def has_unknown_indexers(model: nn.Module) -> bool:
    """Return whether a model has an indexer that chooses in another way, or has it elsewhere."""
    every = [x for x in model.modules() if "Indexer" in type(x).__name__]
    return {id(found) for _, found in indexers_of(model)} != {id(x) for x in every} or not every


def unfreeze_indexers(blocks: nn.ModuleList) -> None:
    """Let all parameters of indexers be trained, beside adapters of a model that is frozen."""
    for block in blocks:
        for _, module in indexers_of(block):
            module.requires_grad_(True)


Training = Literal["frozen", "warmup", "joint"]
"""Whether indexers learn by their own loss (indexer_loss.py), and from which keys."""


def use_indexers(
    model: PreTrainedModel, blocks: nn.ModuleList, training: Training
) -> list[Indexer]:
    """Make the indexers in blocks choose from all tokens of the sequence, in place; return them.

    Frozen, the optimizer has no state for their parameters: transformers runs them without
    gradients. In the warm-up all other parameters of the model are frozen. UserError if there are
    none to train.
    """
    if training == "warmup":
        model.requires_grad_(False)
    found = []
    for block, after in zip_longest(blocks, list(blocks)[1:]):
        if after is None or indexers_of(after):
            for layer in (x for x in block.modules() if hasattr(x, "indexer")):
                layer.register_forward_hook(_without_choice)
        for layer, module in indexers_of(block):
            module.requires_grad_(training != "frozen")
            module.forward = indexer = Indexer(module, training)
            # A layer does not hand its keywords on to its indexer.
            layer.register_forward_pre_hook(indexer.begin, with_kwargs=True)
            found.append(indexer)
    if training != "frozen" and not found:
        raise UserError(
            f'loss.indexer = "{training}": "{model.config.model_type}" has no indexer that chooses '
            'keys. Set it to "frozen".'
        )
    return found


def _without_choice(layer: nn.Module, args: tuple, output: tuple) -> tuple:
    """Return the output of an attention layer without the choice that it hands on to the next one:
    indices of all tokens, which every block would keep for its backward.
    """
    return *output[:2], *(None for _ in output[2:])


def scores_to_train(layer: nn.Module) -> IndexerScores | None:
    """Return what the indexer of an attention layer has made in this call, if it is trained."""
    indexer = vars(getattr(layer, "indexer", None) or layer).get("forward")
    if not isinstance(indexer, Indexer):
        return None
    scores, indexer.scores = indexer.scores, None
    return scores


class Indexer:
    """The forward of an indexer, for this rank's tokens and the keys of all ranks."""

    ulysses: Any = None

    def __init__(self, module: nn.Module, training: Training):
        self.module, self.training = module, training
        self.scores: IndexerScores | None = None
        """What the last call has made, if the indexer is trained."""
        self.total: Tensor | None = None
        """Its loss, see `IndexerScores.total`."""

    def begin(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Learn what the layer that is called now was told."""
        self.ulysses = kwargs["ulysses"]

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the keys that each query reads: int32 [B, T, K], indices of tokens of the whole
        sequence, -1 where there are fewer than K. K = 0: every query reads all keys before it.
        """
        ulysses, self.ulysses = self.ulysses, None
        extent, mesh, count = ulysses.extent, ulysses.mesh, self.module.index_topk
        trains = self.training != "frozen" and torch.is_grad_enabled()
        is_dense = self.training == "warmup" or max(map(max, ulysses.documents)) <= count
        learns = self.training != "frozen" and (trains or extent.keys_only)
        if is_dense and not learns:
            return hidden.new_empty(*hidden.shape[:2], 0, dtype=torch.int32)
        cache, seen = _NoKeys(), _Products()
        forward = type(self.module).forward
        if trains:
            forward = forward.__wrapped__  # type: ignore[attr-defined]  # without no_grad
            args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
            hidden = hidden.detach()
        with seen:
            forward(self.module, hidden, *args, **kwargs | {"cache": cache})
        keys = gather_sequence(cache.own.detach(), mesh)
        blocks = extent.index_keys(self.module, keys, ulysses.documents)
        if blocks is None:  # only keys are needed, of which this layer has none
            return hidden.new_empty(*hidden.shape[:2], 0, dtype=torch.int32)
        tokens = hidden.shape[1]
        start = extent.start + mesh.get_local_rank() * tokens
        queries, weights = seen.factors()
        chosen = hidden.new_empty(*hidden.shape[:2], 0, dtype=torch.int32)
        if not is_dense:
            chosen = choose(queries, weights, seen.scale, blocks, start, ulysses.documents, count)
        if trains:
            if self.total is None:
                self.total = hidden.new_zeros(1, dtype=torch.float64)
            made = queries, weights, cache.own
            self.scores = IndexerScores(*made, seen.scale, None if is_dense else chosen, self.total)
        return chosen


def gather_sequence(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return all ranks' tokens [B, S, ...], given this rank's [B, T, ...]; without gradients."""
    if mesh.size() == 1:
        return x
    of_ranks = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(mesh.size())
    ]
    dist.all_gather(of_ranks, x.contiguous(), group=mesh.get_group())
    return torch.cat(of_ranks, dim=1)


class _NoKeys:
    """A cache that keeps an indexer's own keys, and lets it score none."""

    own: Tensor

    def update_indexer(self, keys: Tensor, layer: int) -> Tensor:
        self.own = keys
        return keys[:, :0]


class _Products(TorchFunctionMode):
    """Sees what an indexer multiplies: queries with keys and a scale, then weights with scores."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self._factors = 1.0, list[Tensor]()
        self._scores: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.matmul:
            self._factors.append(args[0])
            self._scores = result
        elif args and args[0] is self._scores and len(args) == 2 and isinstance(args[1], float):
            self.scale, self._scores = args[1], None
        return result

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the queries [B, T, H, D] and the weights [B, T, H]."""
        if len(self._factors) != 2:
            raise UserError(
                "model: its indexer does not score keys as DeepSeek-V3.2's does, which is the only "
                "kind that this version knows."
            )
        queries, weights = self._factors
        return queries, weights[..., 0, :]


@torch.no_grad()
def choose(
    queries: Tensor,
    weights: Tensor,
    scale: float,
    blocks: Iterable[tuple[slice, Tensor]],
    start: int,
    documents: Documents,
    count: int,
) -> Tensor:
    """Return the keys with the largest scores, int32 [B, T, count], -1 where there are fewer.

    queries [B, T, H, D] and weights [B, T, H] are of tokens `start` to start + T of the sequence.
    blocks yield the keys [B, n, D] of consecutive tokens, and which tokens they are.
    """
    rows, tokens, heads = queries.shape[:3]
    best = queries.new_full((rows, tokens, count), -torch.inf)
    found = torch.full_like(best, -1, dtype=torch.int32)
    size = max(1, TILE_NUMBERS // (heads * BLOCK))
    tiles = list[tuple[int, slice, int]]()  # row, queries, the first key of their document
    for row, lengths in enumerate(documents):
        seen, n, m = visible_keys(lengths, start, start + tokens, None)
        stop, stop_key = start, seen.start
        for here, so_far in zip(n, m, strict=True):
            first, first_key = stop, stop_key
            stop, stop_key = first + here, first_key + so_far
            scored = max(first, min(stop, first_key + count))
            _take_all(found[row, first - start : scored - start], first, first_key)
            for x in range(scored, stop, size):
                tiles.append((row, slice(x, min(x + size, stop)), first_key))
    for held, keys in blocks:
        for row, tile, first_key in visited(tiles, "growing"):
            own = slice(tile.start - start, tile.stop - start)
            first, last = max(first_key, held.start), min(tile.stop, held.stop)
            for x in visited([*range(first, last, BLOCK)]):
                part = slice(x, min(x + BLOCK, last))
                of_part = keys[row, part.start - held.start : part.stop - held.start]
                scores = torch.matmul(queries[row, own], of_part.t().float()).mul_(scale).relu_()
                scores = torch.matmul(weights[row, own, None], scores)[:, 0]
                _merge(best[row, own], found[row, own], scores, tile, part)
    return found


def _take_all(found: Tensor, query: int, key: int) -> None:
    """Choose all keys from `key` on for found [n, K], those of consecutive queries."""
    queries = torch.arange(query, query + len(found), dtype=torch.int32, device=found.device)
    keys = torch.arange(key, key + found.shape[1], dtype=torch.int32, device=found.device)
    found.copy_(torch.where(keys <= queries[:, None], keys, -1))


def _merge(best: Tensor, found: Tensor, scores: Tensor, queries: slice, keys: slice) -> None:
    """Merge scores [n, m] into the best ones so far [n, K], in place; later keys do not count."""
    places = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=scores.device)
    if keys.stop > queries.start + 1:
        own = torch.arange(queries.start, queries.stop, device=scores.device)
        scores = scores.masked_fill(places > own[:, None], -torch.inf)
    values, indices = torch.cat([best, scores], dim=1).topk(best.shape[1], dim=1)
    every = torch.cat([found, places.expand(len(scores), -1)], dim=1)
    best.copy_(values)
    found.copy_(every.gather(1, indices))
