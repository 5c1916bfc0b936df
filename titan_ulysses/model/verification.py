"""Verification of unknown families: a tiny sharded model is compared with the same model whole.

It runs the family's own code before the real model is touched: once unmodified, with each document
alone and in one process, and once sharded over the run's mesh, with the documents packed. The
results differ if layers carry state along the sequence, look past a document's border, or count
positions of their own, and if a head does more to its logits than `lm_head`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from titan_ulysses.data.loader import Batch
from titan_ulysses.distributed.errors import UserError, first_failure, one_line
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX, Documents
from titan_ulysses.model import hf
from titan_ulysses.model.families import attention_needs
from titan_ulysses.model.hf import has_vision
from titan_ulysses.model.vision_verification import VisionBatch, shrink_vision
from titan_ulysses.ulysses.cores import Core, sdpa
from titan_ulysses.ulysses.linear_attention import linear_layers
from titan_ulysses.ulysses.pieces import pieces_of

_TOLERANCE = 1e-5
"""Largest relative difference that counts as rounding.

It is above the effect that fp32 steps inside a family have on fp64 results, and far below the
effect of one wrong token.
"""

_TOLERANCE_OF_STATES = 1e-3
"""The same for a model with linear attention.

transformers computes recurrences in fp32 whatever the dtype, and the gradients of decays cancel.
"""

_NEGLIGIBLE = 1e-2
"""Gradients are compared relative to at least this share of the largest gradient.

A gradient that cancels is only noise.
"""

_CHUNK_TOKENS = 10
"""Tokens in a chunk of the tiny model's sequences, whose documents have borders elsewhere."""

_SEEDS = 16
"""Random numbers with which a model that draws some is run."""

_MOST_PARAMETERS = 50_000_000
"""Of a tiny model, which is computed in fp64 on every rank; most have 200,000."""

_DTYPE = torch.float64
_HIDDEN = 64
_SIZES = {
    **dict.fromkeys(("hidden_size", "q_lora_rank", "kv_lora_rank", "mamba_d_ssm"), _HIDDEN),
    **dict.fromkeys(("index_head_dim", "index_n_heads"), 32),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("rotary_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("num_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "linear_num_key_heads"), 2),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 2),
    "topk_group": 1,
}
"""Largest widths of the tiny model, for those of these names that a config has."""

_SIZES_OF_ANY = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "first_k_dense_replace": 1,
    "index_topk": 4,
}
"""The same where the config's model is as narrow already."""

_VALUES = {
    "initializer_range": 0.2,  # attention that is far from uniform
    "router_aux_loss_coef": 1.0,  # a router loss that is not small beside the other loss
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Values of the tiny model, for those of these names that a config has."""

Gradients = dict[str, Tensor]

Tilings = dict[str, dict[str, Any]]
"""Ways to tile a block: a description, and the options of `parallelize.wrap` for it."""

Shard = Callable[[PreTrainedModel, Core, dict[str, Any]], None]

Prepare = Callable[[PreTrainedModel], Any]
"""What is done to the tiny model before it is trained, whole and sharded: adapters are added."""


@dataclass(frozen=True)
class Verification:
    """Whether a family trains sharded as it does whole, by a tiny model of it in fp64.

    `shard(model, core, options)` wraps a model in place as the real one will be, except for its
    core and dtype: verification is about the family. All methods are collective, and their results
    are the same on every rank.
    """

    config: PreTrainedConfig
    mesh: Mesh
    shard: Shard
    prepare: Prepare | None = None

    def tiling(self, tilings: Tilings) -> dict[str, Any]:
        """Return the options of the first tiling with which the family trains exactly.

        UserError, on every rank, if not even the last tiling is right.
        """
        best, *others = tilings
        reason = self.reason_against(tilings[best])
        if reason is None:
            return tilings[best]
        # Try the last one next: it assumes the least, so a fault in it is a fault of the family.
        if others:
            reason = self.reason_against(tilings[others[-1]])
        if reason is not None:
            raise UserError(
                f'model: "{self.config.model_type}" is not a family that is known to train exactly '
                "under sequence parallelism, and a tiny model of it could not prove that it does: "
                f"{reason.rstrip('.')}. Choose another model."
            )
        exact = (name for name in others[:-1] if self.reason_against(tilings[name]) is None)
        tiling = next(exact, others[-1])
        warnings.warn(
            f'model: the blocks of "{self.config.model_type}" are not built like those of the '
            f"families that this version knows: the MLP is {tiling}, which is exact, and takes "
            "more time or memory.",
            stacklevel=2,
        )
        return tilings[tiling]

    def reason_against_streaming(self, tiling: dict[str, Any]) -> str | None:
        """Return why the family does not train chunk by chunk as it does whole, or None.

        tiling is what `tiling` has found.
        """
        memory = tiling.get("memory", {}) | {"stream_chunk_tokens": _CHUNK_TOKENS}
        return self.reason_against(tiling | {"memory": memory})

    @torch.enable_grad()
    def reason_against(self, options: dict[str, Any]) -> str | None:
        """Return what is wrong with a tiny model with these options of `parallelize.wrap`, or None.

        It is tried without its router loss and then with it.
        """
        reason, passes = None, [False]
        try:
            tiny = shrink(self.config)
            passes += [True] * bool(getattr(tiny, "output_router_logits", False))
        except Exception as error:  # a family's own code raises whatever it likes
            reason = f"its config cannot be reduced to a tiny model ({_raised(error)})"
        if reason := first_failure(reason):
            return reason
        for has_router_loss in passes:
            tiny.output_router_logits = has_router_loss
            if reason := self._reason_against_tiny(tiny, options):
                break
        return reason

    def _reason_against_tiny(self, tiny: PreTrainedConfig, options: dict[str, Any]) -> str | None:
        mesh, reason = self.mesh, None
        try:
            whole = build_tiny(tiny, mesh.device)
            if self.prepare is not None:
                self.prepare(whole)
            batch = VisionBatch(mesh, whole) if has_vision(tiny) else _TestBatch(mesh, whole.config)
            sharded = copy.deepcopy(whole)
            expected, depends_on_draws = _train_repeatedly(whole, batch)
            if depends_on_draws:
                reason = (
                    "its layers draw random numbers in training, as routers that sample experts "
                    "do, and ranks would draw others than one process"
                )
        except Exception as error:
            reason = f"a tiny one cannot be built and run ({_raised(error)})"
        # Either all ranks go on or none does, because what follows has collectives.
        if reason := first_failure(reason):
            return reason
        core = _core_of(tiny.get_text_config())
        try:
            self.shard(sharded, core, options)
            tolerance = _TOLERANCE_OF_STATES if linear_layers(sharded) else _TOLERANCE
            found = _trained(sharded, _loss_sharded(sharded, batch.rows, mesh))
            reason = _difference(found, expected, batch.what, tolerance)
        except UserError as error:
            reason = str(error).removeprefix("model: ")
        except Exception as error:
            reason = f"its own code fails when it runs sharded ({_raised(error)})"
            if not core.was_called:  # type: ignore[attr-defined]
                reason = (
                    "it fails before a layer has called transformers' attention function, so its "
                    f"attention is probably code of its own ({_raised(error)})"
                )
        return first_failure(reason)


def _raised(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of config with small widths and few layers.

    The layers show every kind that the config has; there are at least two if the config has two.
    """
    if has_vision(config):
        return shrink_vision(config, shrink)
    tiny = copy.deepcopy(config)
    # None: transformers chooses for this machine. But version 5.17 chooses sdpa also where scores
    # are capped, which sdpa cannot do.
    tiny._attn_implementation = "eager" if "softcap" in attention_needs(config) else None
    if config.hidden_size > _HIDDEN:
        heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
        if kv_heads is not None:
            tiny.num_key_value_heads = 1 if kv_heads == 1 else 4 if kv_heads == heads else 2
        inner = (name for name in vars(tiny) if "intermediate_size" in name)
        _limit(tiny, _SIZES | dict.fromkeys(inner, _HIDDEN))
        if isinstance(getattr(tiny, "mamba_d_head", None), int):
            width = getattr(tiny, "mamba_d_ssm", None) or tiny.mamba_expand * tiny.hidden_size
            tiny.mamba_d_head = width // tiny.mamba_n_heads
    _keep_kinds_of_layers(tiny)
    _limit(tiny, _SIZES_OF_ANY)
    drops = {k: 0.0 for k, x in vars(tiny).items() if "drop" in k and isinstance(x, float)}
    for name, value in (_VALUES | drops).items():
        if getattr(tiny, name, None) is not None:
            setattr(tiny, name, value)
    return tiny


def _keep_kinds_of_layers(tiny: PreTrainedConfig) -> None:
    """Keep the first layer of each kind, or two layers if there is only one kind.

    Kinds are distinguished by those lists in the config that have one entry for each layer.
    """
    layers = tiny.num_hidden_layers
    if places := getattr(tiny, "attn_layer_indices", None):  # bamba: which layers have attention
        tiny.attn_layer_indices, tiny.num_hidden_layers = [1] if 0 not in places else [0], 2
        return
    lists = {
        k: v for k, v in vars(tiny).items() if isinstance(v, list | tuple) and len(v) == layers
    }
    # A list 0, 1, 2, ... holds indices of layers, not kinds.
    lists = {k: v for k, v in lists.items() if list(v) != list(range(layers))}
    kinds = [repr([values[layer] for values in lists.values()]) for layer in range(layers)]
    chosen = sorted({kinds.index(kind) for kind in kinds})
    if len(chosen) == 1:
        chosen = list(range(min(2, layers)))
    for name, values in lists.items():
        setattr(tiny, name, type(values)(values[layer] for layer in chosen))
    tiny.num_hidden_layers = len(chosen)


def _limit(config: PreTrainedConfig, values: dict[str, int]) -> None:
    for name, value in values.items():
        # A property derived from other values, or one that differs between layers.
        with suppress(AttributeError, RuntimeError):
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, min(getattr(config, name), value))


def _core_of(config: PreTrainedConfig) -> Core:
    """Return plain attention that takes only the features that config says its layers need.

    The run's core was chosen by these features.
    """
    needs = attention_needs(config)

    def core(
        q: Tensor, k: Tensor, v: Tensor, *, documents: Documents, scale: float, **features
    ) -> Tensor:
        core.was_called = True  # type: ignore[attr-defined]
        if hidden := sorted(features.keys() - needs):
            raise UserError(
                f"its attention layers use {', '.join(hidden)}, which its config does not give"
            )
        return sdpa(q, k, v, documents=documents, scale=scale, **features)

    core.pieces = pieces_of(sdpa)  # type: ignore[attr-defined]
    core.was_called = False  # type: ignore[attr-defined]
    return core


class _TestBatch:
    """Two rows, the first cut into documents at other places than the ranks' borders.

    Every data-parallel rank gets the same rows. With a router loss, which is over all rows at once,
    both rows are whole documents, because unmodified transformers has to see them in one forward.
    """

    def __init__(self, mesh: Mesh, config: PreTrainedConfig) -> None:
        length = mesh.sp.size() * -(-32 // mesh.sp.size())
        generator = torch.Generator().manual_seed(1)
        ids, labels = torch.randint(config.vocab_size, (2, 2, length), generator=generator)
        documents: Documents = ((length // 3, 1, length - length // 3 - 1), (length,))
        self.what = "documents packed and sharded against each document alone"
        self.has_router_loss = getattr(config, "output_router_logits", False)
        if self.has_router_loss:
            labels = F.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)
            documents = ((length,), (length,))
            self.what = "with its router loss, sharded against both rows at once"
        positions = [torch.cat([torch.arange(n) for n in row]) for row in documents]
        self.rows = Batch(ids, labels, torch.stack(positions), documents)
        """what the sharded model gets its part of"""

    def loss_whole(self, model: PreTrainedModel) -> Tensor:
        """Return the loss of unmodified transformers, with each document alone."""
        rows = self.rows.to(model.device)
        if self.has_router_loss:
            return model(input_ids=rows.input_ids, labels=rows.input_ids, use_cache=False).loss
        total = torch.zeros((), dtype=_DTYPE, device=model.device)
        for ids, labels, lengths in zip(rows.input_ids, rows.labels, rows.documents, strict=True):
            for document, targets in zip(ids.split(lengths), labels.split(lengths), strict=True):
                logits = model(input_ids=document[None], use_cache=False).logits[0]
                total = total + F.cross_entropy(logits.to(_DTYPE), targets, reduction="sum")
        return total / rows.labels.numel()


def _loss_sharded(model: PreTrainedModel, rows: Batch, mesh: Mesh) -> Tensor:
    """Return the loss of a sharded model, with all documents packed. Collective."""
    local = rows.local(
        rank=mesh.sp.get_local_rank(),
        degree=mesh.sp.size(),
        stream_chunk_tokens=model.sharding.stream_chunk_tokens,
    )
    valid = (rows.labels != IGNORE_INDEX).sum().to(mesh.device) * mesh.batch.size()
    return model(**local.to(mesh.device).inputs(), num_items_in_batch=valid).loss


def build_tiny(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """Build a model with the same random numbers on every rank.

    No parameter is left at 0 or 1, where its effect would be hidden. ValueError for one that is not
    tiny, because a width of its config has another name.
    """
    if (size := hf.build_on_meta(config, _DTYPE).num_parameters()) > _MOST_PARAMETERS:
        raise ValueError(f"it has {size:,} parameters, so its config has unknown widths")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.auto_class(config).from_config(
            config,
            dtype=_DTYPE,
            experts_implementation=hf.experts_path(_DTYPE),
            trust_remote_code=False,
        )
        with torch.no_grad():
            model.to(_DTYPE)  # also what the family keeps in fp32
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.to(device).train()  # as it will train, but for dropout: see shrink


def _train_repeatedly(
    model: PreTrainedModel, batch: _TestBatch | VisionBatch
) -> tuple[tuple[Tensor, Gradients], bool]:
    """Return loss and gradients of the whole model, and whether they depend on random numbers.

    A model that draws some is run with several seeds: a router samples only where scores are close,
    and what decides whether a layer is left out may never do so.
    """
    cuda = [model.device] if model.device.type == "cuda" else []

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]

    with torch.random.fork_rng(devices=cuda):
        before, kept = states(), copy.deepcopy(model)
        expected = _trained(model, batch.loss_whole(model))
        draws = not all(map(torch.equal, before, states()))
        for seed in range(_SEEDS if draws else 0):
            torch.manual_seed(seed)
            model = copy.deepcopy(kept)
            again = _trained(model, batch.loss_whole(model))
            if _difference(again, expected, batch.what, _TOLERANCE):
                return expected, True
    return expected, False


def _trained(model: PreTrainedModel, loss: Tensor) -> tuple[Tensor, Gradients]:
    """Return the model's loss and gradients, whole on every rank."""
    loss.backward()
    found = {}
    for name, p in hf.named_parameters(model):
        found[name] = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        if p.grad is None:
            found[name] = torch.zeros(p.shape, dtype=p.dtype, device=p.device)
    return loss.detach(), found


def _difference(
    found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients], what: str, tolerance: float
) -> str | None:
    """Describe the largest difference between the two; None if none exceeds the tolerance."""
    if lost := sorted(expected[1].keys() - found[1].keys()):
        return (
            f"the sharded model lacks {lost[0]}: its head does more than a linear layer, which is "
            "all that is computed by tiles"
        )
    loss = ((found[0] - expected[0]).abs() / expected[0].abs()).item()
    scale = _NEGLIGIBLE * max(gradient.abs().max() for gradient in expected[1].values())
    worst = {"the loss": loss}
    for name, whole in expected[1].items():
        difference = (found[1][name] - whole).abs().max() / whole.abs().max().clamp(min=scale)
        worst[f"the gradient of {name}"] = difference.item()
    where = max(worst, key=lambda name: worst[name] if worst[name] == worst[name] else torch.inf)
    if worst[where] <= tolerance:
        return None
    return (
        f"the loss is off by {loss:.1e} of itself and {where} by {worst[where]:.1e} ({what}). "
        "Something besides its attention mixes tokens, or it counts positions itself, or its "
        "attention is not the causal one that it asks transformers for"
    )
