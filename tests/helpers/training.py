"""What several tests share: tiny models, packed documents, and plain transformers to compare
with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from helpers.meshes import mesh_of
from helpers.models import plain_model
from helpers.options import sections
from helpers.rows import Row, local_batch
from titan_ulysses.config.schema import Optimizer
from titan_ulysses.distributed.tensors import plain_pieces
from titan_ulysses.model import hf
from titan_ulysses.model.nf4 import full_tensor
from titan_ulysses.optim.optimizer import build_optimizer
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.train.step import train_step


@dataclass
class Record:
    """What a training run showed, step by step, and the parameters it ended with."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


# An eps small beside any gradient that matters: without it AdamW divides the rounding of the others
# by itself.
OPTIMIZER = Optimizer(lr=1e-2, weight_decay=0.1, eps=1e-6)


MAX_NORM = 0.5


Act = Callable[[PreTrainedModel], Any]


def train_sharded(
    degrees: tuple[int, int, int],
    model: dict[str, Any],
    steps: list[list[list[Row]]],
    dtype: torch.dtype,
    *,
    prepare: Act | None = None,
    fill: Act | None = None,
    parallelize: Callable[..., Any] = parallelize,
    **options,
) -> Record:
    """Train on this rank of a mesh; steps[i] holds a step's micro-batches. Gradients are noted
    after clipping.

    prepare is given the model on meta, fill once more when it is initialized. parallelize: another
    way to cut the model, that takes the same batches.
    """
    mesh, record = mesh_of(*degrees), Record()
    sharded = hf.build_on_meta(hf.load_model_config("", model), dtype)
    if prepare:
        prepare(sharded)
    parallelize(
        sharded,
        mesh,
        **sections(
            **{"loss_tile_tokens": 5, "param_dtype": dtype, "reduce_dtype": dtype} | options
        ),
    )
    hf.allocate(sharded, mesh.device)
    hf.initialize(sharded, seed=3)
    if fill:
        fill(sharded)
    optimizer = build_optimizer(sharded, OPTIMIZER)

    def note_gradients(*_) -> None:
        gradients = {name: p.grad for name, p in hf.named_parameters(sharded) if p.grad is not None}
        record.gradients.append(
            {name: gradient.full_tensor().cpu() for name, gradient in gradients.items()}
        )

    optimizer.register_step_pre_hook(note_gradients)
    for micro_batches in steps:
        batches = [
            local_batch(rows, mesh, sharded.sharding.stream_chunk_tokens).to(mesh.device)
            for rows in micro_batches
        ]
        loss, norm, *_ = train_step(sharded, optimizer, batches, mesh, max_norm=MAX_NORM)
        record.losses.append(loss.item())
        record.grad_norms.append(norm.item())
    record.parameters = {
        name: full_tensor(p.detach()).cpu() for name, p in hf.named_parameters(sharded)
    }
    return record if torch.distributed.get_rank() == 0 else Record(record.losses, record.grad_norms)


class Run:
    """A model and its optimizer on this rank of a mesh, to be trained step by step on the same
    rows.
    """

    def __init__(
        self,
        degrees: tuple[int, int, int],
        model: dict[str, Any],
        rows: list[Row],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        param_dtype: torch.dtype | None = None,
        optimizer: Optimizer = OPTIMIZER,
        optimizer_offload: bool = False,
        parameter_offload: bool = False,
        prepare: Callable[[torch.nn.Module], Any] | None = None,
        wrap: dict[str, Any] | None = None,
    ):
        """dtype: of the stored parameters; param_dtype: of the computation. prepare: is given the
        model on meta.

        wrap: more options of `parallelize`.
        """
        self.mesh, self.rows = mesh_of(*degrees), rows
        self.model = hf.build_on_meta(hf.load_model_config("", model), dtype)
        if prepare:
            prepare(self.model)
        param_dtype = param_dtype or dtype
        reduce_dtype = torch.promote_types(param_dtype, torch.float32)
        dtypes = {"param_dtype": param_dtype, "reduce_dtype": reduce_dtype}
        parallelize(
            self.model,
            self.mesh,
            **sections(parameter_offload=parameter_offload, **dtypes, **wrap or {}),
        )
        hf.allocate(self.model, self.mesh.device, parameter_offload=parameter_offload)
        hf.initialize(self.model, seed)
        self.optimizer = build_optimizer(self.model, optimizer, offload=optimizer_offload)
        self.losses: list[float] = []

    def train(self, steps: int, *, accumulate: int = 1) -> Run:
        for _ in range(steps):
            batches = [
                local_batch(self.rows, self.mesh, self.model.sharding.stream_chunk_tokens).to(
                    self.mesh.device
                )
                for _ in range(accumulate)
            ]
            loss, self.grad_norm, *_ = train_step(
                self.model, self.optimizer, batches, self.mesh, max_norm=1.0
            )
            self.losses.append(loss.item())
        return self

    def state(self) -> dict[str, Tensor]:
        """Parameters and optimizer state by name, as they live on this rank."""
        state = get_optimizer_state_dict(self.model, self.optimizer)["state"]
        flat = dict(get_model_state_dict(self.model))
        return flat | {
            f"{name}/{key}": value
            for name, values in state.items()
            for key, value in values.items()
        }

    def whole(self) -> dict[str, Tensor]:
        """Parameters and optimizer state, gathered; what is quantized as the numbers it stands
        for.
        """

        def numbers(t: Tensor) -> Tensor:
            return t.dequantize() if is_traceable_wrapper_subclass(t) else t

        def plain(t: Tensor) -> Tensor:
            if isinstance(t, DTensor):
                # Before they are gathered: gathering codes and scales is two collectives in flight
                # at once, in which gloo corrupts the heap (torch 2.13: within a hundred rounds of a
                # test a rank dies).
                local, layout = numbers(t.to_local()), {"shape": t.shape, "stride": t.stride()}
                t = DTensor.from_local(
                    local, t.device_mesh, t.placements, run_check=False, **layout
                ).full_tensor()
            return numbers(t).detach().clone()

        return {name: plain(t) for name, t in self.state().items()}

    def bits(self) -> dict[str, list[Tensor]]:
        """This rank's part of them as it is stored: codes and scales where it is quantized."""
        return {
            name: [piece.detach().clone() for piece in plain_pieces(t.detach())]
            for name, t in self.state().items()
        }

    def local(self) -> list[Tensor]:
        """The bits of this rank's shards as they are now."""
        return [p.to_local().detach().clone() for p in self.model.parameters()]


def train_plain(
    model: dict[str, Any],
    steps: list[list[list[Row]]],
    dtype: torch.dtype,
    *,
    prepare: Act | None = None,
    fill: Act | None = None,
    more: Callable[[PreTrainedModel, Tensor], Tensor] | None = None,
) -> Record:
    """The same on one process: unmodified transformers, each document a forward of its own, plain
    AdamW.

    more: after the forward of a document with these labels, what else is differentiated; it is no
    part of the loss that is noted.
    """
    record = Record()
    plain = plain_model(model, dtype, experts=hf.experts_path(dtype))
    if prepare:
        prepare(plain)
    hf.initialize(plain, seed=3)
    if fill:
        fill(plain)
    o, trained = OPTIMIZER, [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
    )
    for micro_batches in steps:
        total, total_of_others, valid = *torch.zeros(2, dtype=dtype), 0
        for rows in micro_batches:
            documents = [document for row in rows for document in row]
            outputs, others = [], torch.zeros((), dtype=dtype)
            for document in documents:
                outputs.append(plain(input_ids=document.tokens[None, :-1], use_cache=False))
                if more is not None:
                    others = others + more(plain, document.labels)
            for output, document in zip(outputs, documents, strict=True):
                total = total + F.cross_entropy(
                    output.logits[0], document.labels, ignore_index=-100, reduction="sum"
                )
            labels = sum(int((d.labels != -100).sum()) for d in documents)
            if getattr(plain.config, "output_router_logits", False):
                total = total + labels * router_loss(
                    plain, [output.router_logits for output in outputs]
                )
            valid += labels
            total_of_others = total_of_others + others
        loss = total / valid
        (loss + total_of_others / valid).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM)
        record.losses.append(loss.item())
        record.grad_norms.append(norm.item())
        gradients = {name: p.grad for name, p in hf.named_parameters(plain) if p.grad is not None}
        record.gradients.append({name: gradient.clone() for name, gradient in gradients.items()})
        optimizer.step()
        optimizer.zero_grad()
    record.parameters = {name: p.detach().clone() for name, p in hf.named_parameters(plain)}
    return record


def router_loss(plain: PreTrainedModel, logits: list[tuple[Tensor, ...]]) -> Tensor:
    """What transformers would add to the loss if it had seen all documents, whose router logits
    these are, at once.
    """
    layers = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
    function = sys.modules[type(plain).__module__].load_balancing_loss_func
    return plain.router_aux_loss_coef * function(
        layers, plain.num_experts, plain.num_experts_per_tok
    )


def largest_difference(found: Record, expected: Record) -> dict[str, float]:
    """Relative differences (to the largest magnitude of each tensor), the worst of each kind and
    where it is. NaN is an infinite one: Python's max(0.0, nan) is 0.0.
    """
    worst: dict[str, float] = {}

    def note(what: str, a, b) -> None:
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        assert a.shape == b.shape, (what, a.shape, b.shape)
        ratio = (a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny)
        difference = ratio.nan_to_num(nan=torch.inf, posinf=torch.inf).item()
        worst[what] = max(worst.get(what, 0.0), difference)

    for what, ours, theirs in (
        ("loss", found.losses, expected.losses),
        ("grad norm", found.grad_norms, expected.grad_norms),
    ):
        # Not the fp32 of Python's numbers.
        note(what, *(torch.tensor(x, dtype=torch.float64) for x in (ours, theirs)))
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        for name in theirs:
            note(f"gradient of {name}", ours[name], theirs[name])
    assert found.parameters.keys() == expected.parameters.keys()
    for name in expected.parameters:
        note(f"parameter {name}", found.parameters[name], expected.parameters[name])
    return worst
