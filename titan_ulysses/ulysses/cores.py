"""Core attention: attention over whole sequences for the heads of one rank.

The exchange of Ulysses does not depend on how attention is computed, so this file holds all of the
attention math.

A core is a function `(q, k, v, *, documents, scale, ...) -> output` with q [B, S, Hq, D], k [B, S,
Hkv, D], v [B, S, Hkv, Dv] and output [B, S, Hq, Dv], where Hkv divides Hq. Dv differs from D only
in latent attention. `documents` holds the document lengths of each row, on the host. Attention is
causal inside a document and zero between documents by construction: a core calls its kernel once
per document, or passes the document borders to a kernel that handles them. No S x S mask is built.

Four more keywords are passed only if a layer needs them: `window` (the number of keys that a query
sees, including its own), `softcap` (scores become softcap * tanh(score / softcap)), `sinks` [Hq]
(one extra score per head that takes part in the softmax and has the value 0) and `chosen` [B, S, K]
(the only keys that each query sees, as indices in its row, -1 for none; see indexer.py).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from titan_ulysses.config.fields import CORES
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.sequence import Documents
from titan_ulysses.ulysses.flash_cuda import borders
from titan_ulysses.ulysses.kernels import MOST_HEAD_SIZE, flash_obstacle
from titan_ulysses.ulysses.pieces import KERNELS, attend_documents
from titan_ulysses.ulysses.scores import of_documents, with_equal_sizes

Core = Callable[..., Tensor]


def takes_any_size(core: Core) -> bool:
    """Return whether a call of core may have tensors of 2^31 elements and more.

    A user's own core says so by an attribute `any_size = True`.
    """
    return getattr(core, "any_size", False)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """Attend with `F.scaled_dot_product_attention`, one call per document.

    What it cannot do (windows, soft-caps and sinks) is computed tile by tile (tiles.py), so this
    core does everything on every device. Where only explicit scores serve, as for soft-caps, it is
    slow.
    """
    if window is None and softcap is None and sinks is None and chosen is None:
        return _each_document(partial(_sdpa, scale=scale), q, k, v, documents)
    scores = of_documents(documents, scale, window, softcap, chosen)
    return attend_documents(q, k, v, sinks, scores)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
    chosen: Tensor | None = None,
) -> Tensor:
    """Attend with the flash kernel that ships with torch: all documents of all rows in one call.

    These are the operators under `torch.nn.attention.varlen`. In CUDA they are FlashAttention 2, or
    3 or 4 where one of these is active (see kernels.py). Sinks are applied to the kernel's output,
    with its log-sum-exp. On a CPU its flash kernel computes the same, in fp64 too.
    """
    scores = of_documents(documents, scale, window, chosen=chosen)
    return attend_documents(q, k, v, sinks, scores)


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend with flash-attn 2's variable-length kernel: all documents of all rows in one call.

    Needs CUDA, bf16 or fp16, and the package flash-attn. Of the fast cores only it has soft-caps.
    """
    from flash_attn import flash_attn_varlen_func

    lengths = tuple(chain(*documents))
    places = borders(lengths, q.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(
            *(x.flatten(0, 1) for x in (q, k, v)),
            *(places, places, max(lengths), max(lengths)),
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            softcap=softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )

    return with_equal_sizes(attend, q, k, v).unflatten(0, q.shape[:2])


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    documents: Documents,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend with compiled FlexAttention; documents and window become a block mask.

    Needs CUDA, because FlexAttention has no backward on a CPU. UserError for rows of more than
    `FLEX_TOKENS`.
    """
    if obstacle := _flex_length_obstacle(q.shape[1]):
        raise UserError(f'model.attention = "flex": {obstacle}.')

    def cap(score: Tensor, *_) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    output = _compiled_flex()(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=None if softcap is None else cap,
        block_mask=_block_mask(documents, window, q.device),
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return output.transpose(1, 2)


FLEX_TOKENS = 2**18
"""The longest rows of flex.

FlexAttention's block mask has up to four int32 arrays of (S / 128)^2 entries: 64 MiB a row at this
length, 1 GiB at 1M tokens and 12.5 GiB at 3.7M.
"""


def _flex_length_obstacle(length: int | None) -> str | None:
    if length is None or length <= FLEX_TOKENS:
        return None
    size = 16 * (length // 128) ** 2 / 2**30
    return (
        f"its block mask would take {size:.3g} GiB a row of {length:,} tokens "
        f"(training.seq_len; at most {FLEX_TOKENS:,})"
    )


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def _block_mask(documents: Documents, window: int | None, device: torch.device) -> BlockMask:
    """Return the mask that says which blocks of [S, S] FlexAttention computes.

    Cached, so that all layers with the same documents and window share it.
    """
    rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents]
    document = torch.stack(rows).to(device, non_blocking=True)

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (query >= key) & (document[row, query] == document[row, key])
        return inside if window is None else inside & (query - key < window)

    rows, length = document.shape
    return create_block_mask(
        seen, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=device, _compile=True
    )


for _core in (sdpa, varlen, flash, flex):  # all are exact, so the same pieces are theirs
    _core.pieces = KERNELS  # type: ignore[attr-defined]
for _core in (varlen, flash):  # their kernels index with 64 bits
    _core.any_size = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class CoreRequirements:
    """What a model asks of its core, and where."""

    needs: frozenset[str]
    """the keywords that its layers will pass (see the module docstring)"""
    device_type: str
    dtype: torch.dtype
    seq_len: int | None = None
    """tokens of a row; None where that is not known yet"""
    head_size: int | None = None
    """the larger of D and Dv; None where it is not known"""
    packages: bool = True
    """whether the packages of cores must be installed here; not for a plan of another machine"""


def choose_core(name: str, requirements: CoreRequirements) -> tuple[Core, str]:
    """Return the core that `name` (model.attention) asks for, and a sentence that says which.

    "auto" takes the fastest core that can run here and meets the requirements; the sentence then
    says why each faster core was passed over. "package.module:function" imports the user's own
    core. UserError if the named core does not exist, cannot run here or does not accept what is
    needed.
    """
    of_this_file = {core: globals()[core] for core in CORES if core != "auto"}
    cores, obstacles = of_this_file, {}
    if ":" in name:
        module, _, function = name.partition(":")
        try:
            cores = {name: getattr(importlib.import_module(module), function)}
        except (ImportError, AttributeError) as error:
            raise UserError(
                f'model.attention = "{name}": cannot be imported ({error}). Give '
                "package.module:function, on sys.path."
            ) from error
    for candidate, core in cores.items():
        obstacle = _obstacle(core, requirements, name)
        if obstacle is None and name in ("auto", candidate):
            faster = "; ".join(f"{other} {why}" for other, why in obstacles.items() if why)
            return core, f"attention: {candidate}" + (
                f" ({faster})" if name == "auto" and faster else ""
            )
        obstacles[candidate] = obstacle
    if name not in obstacles:
        raise UserError(
            f'model.attention = "{name}": no such core; choose auto, {", ".join(cores)}, '
            "module:function."
        )
    able = [x for x, core in of_this_file.items() if _obstacle(core, requirements, x) is None]
    raise UserError(
        f'model.attention = "{name}": {obstacles[name]}. Set model.attention = "auto", or a core '
        f"that supports this model here: {', '.join(able)}."
    )


def _obstacle(core: Core, requirements: CoreRequirements, asked: str) -> str | None:
    """Return why core cannot be used, or None; asked is what model.attention says.

    A core supports the keywords that its signature accepts.
    """
    parameters = inspect.signature(core).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    lacking = requirements.needs - parameters.keys()
    if lacking and not takes_all:
        return f"cannot do {', '.join(sorted(lacking))}"
    if core in (varlen, flash, flex) and requirements.device_type != "cuda":
        return "needs a CUDA device"
    if core is flex:
        if asked == "auto" and "softcap" not in requirements.needs:
            return "is only faster for soft-caps"
        return _flex_length_obstacle(requirements.seq_len)
    if core not in (varlen, flash):
        return None
    if requirements.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 (training.param_dtype is {requirements.dtype})"
    if (requirements.head_size or 0) > MOST_HEAD_SIZE:
        return f"has heads of at most {MOST_HEAD_SIZE} (this model's have {requirements.head_size})"
    needs_package = core is flash and requirements.packages
    return flash_obstacle() or (_import_obstacle("flash_attn") if needs_package else None)


def _import_obstacle(package: str) -> str | None:
    """Return why package cannot be imported, or None.

    It is really imported, because one that was built for another torch is found, but does not load.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        return f"needs the package {package.replace('_', '-')}"
    except (ImportError, OSError, RuntimeError) as error:
        return f"needs the package {package.replace('_', '-')}, which does not load here ({error})"
    return None


def _each_document(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, documents: Documents
) -> Tensor:
    """Call attend(q, k, v), each [B, H, L, D], once per document of L tokens.

    If all rows have the same document lengths, one call takes that document of all rows.
    """

    def row(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        outputs = [
            attend(*document).transpose(1, 2)
            for document in zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if len(set(documents)) == 1:
        return row(q, k, v, documents[0])
    rows = zip(q.split(1), k.split(1), v.split(1), documents, strict=True)
    return torch.cat([row(*one) for one in rows])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if grouped and not _sdpa_takes_groups(q.device.type, q.dtype):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    attend = partial(
        F.scaled_dot_product_attention, scale=scale, is_causal=True, enable_gqa=grouped
    )
    return with_equal_sizes(attend, q, k, v)


def _sdpa_takes_groups(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether SDPA's kernels without S x S scores take grouped heads.

    On CUDA the one for fp32, memory-efficient attention, does not in every torch, and SDPA then
    computes all scores.
    """
    return device_type != "cuda" or dtype.itemsize == 2
