"""Tiny vision-language models, batches with images for them, and plain transformers to compare
with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from helpers.meshes import mesh_of
from helpers.options import sections
from helpers.training import MAX_NORM, OPTIMIZER, Record
from titan_ulysses import parallelize, shard
from titan_ulysses.model import hf
from titan_ulysses.optim.optimizer import build_optimizer
from titan_ulysses.train.step import clip_gradients

TEXT: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE, VIDEO, BEGIN, END = 50, 51, 52, 53
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
TOKENS |= {"vision_start_token_id": BEGIN, "vision_end_token_id": END}
_M_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_QWEN = {"depth": 2, "num_heads": 2, "patch_size": 2, "temporal_patch_size": 2}
_QWEN |= {"spatial_merge_size": 2, "in_channels": 3, "initializer_range": 0.2}
VISION: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": _M_ROPE},
        "vision_config": {
            **_QWEN,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 24,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    },
}


_BOTH = {"out_hidden_size": 24, "hidden_size": 16, "intermediate_size": 24}
_GLM = {**_QWEN, **_BOTH, "image_size": 8}
_VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_VIT |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 2, "num_channels": 3}
_VIT |= {"initializer_range": 0.2}
_QWEN_TEXT = {**TEXT, "rope_parameters": _M_ROPE}
_THREE = {**_QWEN_TEXT, "num_attention_heads": 3, "num_key_value_heads": 1}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MOE |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
_LLAMA = {**TEXT, "model_type": "llama"}
_SIGLIP = {**_VIT, "model_type": "siglip_vision_model", "vision_use_head": False}
_CLIP = {**_VIT, "model_type": "clip_vision_model"}
_PINPOINTS = [[8, 16], [16, 8], [16, 16]]
_HYBRID = {"linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_conv_kernel_dim": 4}
_HYBRID |= {"linear_key_head_dim": 8, "linear_value_head_dim": 6, "rms_norm_eps": 1e-3}
_HYBRID |= {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
_HYBRID |= {"rope_parameters": {**_M_ROPE, "partial_rotary_factor": 0.5}}
VISION |= {
    "qwen2_vl": {
        "text_config": _THREE,
        "vision_config": {**_QWEN, "embed_dim": 16, "hidden_size": 24, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        "text_config": _THREE,
        "vision_config": {**_QWEN, **_BOTH, "window_size": 8, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl_moe": {
        "text_config": {**_QWEN_TEXT, **_MOE},
        "vision_config": VISION["qwen3_vl"]["vision_config"],
    },
    "qwen3_5": {
        "text_config": {**TEXT, **_HYBRID},
        "vision_config": {**_QWEN, **_BOTH, "num_position_embeddings": 16},
    },
    "qwen3_5_moe": {
        "text_config": {**TEXT, **_HYBRID, **_MOE, "shared_expert_intermediate_size": 16},
        "vision_config": {**_QWEN, **_BOTH, "num_position_embeddings": 16},
    },
    "glm4v": {"text_config": _THREE, "vision_config": _GLM},
    "glm4v_moe": {
        "text_config": {
            **_THREE,
            "rope_parameters": {**_M_ROPE, "partial_rotary_factor": 1.0},
            **{"num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_routed_experts": 4},
            **{"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
        },
        "vision_config": _GLM,
    },
    "glm46v": {
        "text_config": {**_THREE, "model_type": "glm4v_text"},
        "vision_config": {**_GLM, "model_type": "glm4v_vision"},
    },
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**_VIT, "image_size": [8, 8], "patch_size": [2, 2]},
        "image_seq_length": 4,
    },
    "llava": {
        "text_config": _LLAMA,
        "vision_config": _CLIP,
        "image_token_index": IMAGE,
        "image_seq_length": 16,
    },
    "llava_next": {
        "text_config": _LLAMA,
        "vision_config": _CLIP,
        "image_token_index": IMAGE,
        "image_grid_pinpoints": _PINPOINTS,
    },
    "llava_onevision": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": _SIGLIP,
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": _PINPOINTS,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**_VIT, "model_type": "pixtral", "image_size": 16},
        "image_token_index": IMAGE,
    },
    "smolvlm": {
        "text_config": _LLAMA,
        "vision_config": _VIT,
        "scale_factor": 2,
    },
    "idefics3": {
        "text_config": _LLAMA,
        "vision_config": _VIT,
        "scale_factor": 2,
    },
    "lfm2_vl": {
        "text_config": {
            **TEXT,
            **{"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
        },
        "vision_config": {**_VIT, "model_type": "siglip2_vision_model", "num_patches": 16},
        "projector_hidden_size": 16,
    },
    "kimi_k25": {
        "text_config": {
            **TEXT,
            **{"model_type": "deepseek_v3", "q_lora_rank": 12, "kv_lora_rank": 10},
            **{"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8},
            **{"num_key_value_heads": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
            **{"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
            **{"n_group": 2, "topk_group": 1, "head_dim": 4},
        },
        "vision_config": {**_VIT, "pos_emb_height": 4, "pos_emb_width": 4, "pos_emb_time": 4},
        "projection_hidden_size": 16,
    },
}


def vision_model_of(family: str) -> dict[str, Any]:
    own = VISION[family]
    tokens = {name: token for name, token in TOKENS.items() if "image_token_index" not in own}
    return {"model_type": family, "tie_word_embeddings": False, **tokens, **own}


@dataclass(frozen=True)
class Item:
    """An image or video of a document: what the processor makes of it, and the tokens for it."""

    kind: str
    pixels: dict[str, Tensor]
    tokens: list[int]


@dataclass(frozen=True)
class Page:
    """A document with images."""

    ids: Tensor
    """[n + 1], the last of them only a label"""
    labels: Tensor
    """[n], shifted"""
    items: list[Item]

    @property
    def kinds(self) -> Tensor:
        """What the processor says of each token: 1 in an image, 2 in a video."""
        video = 2 if all(item.kind == "video" for item in self.items) else 1
        return video * (self.ids == IMAGE) + 2 * (self.ids == VIDEO)

    @property
    def pixels(self) -> dict[str, Tensor]:
        """Those of all items, as the model's forward takes them."""
        return joined([item.pixels for item in self.items])


def joined(pixels: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of several items, filled up with zeros to the largest, as processors do."""
    found = {}
    for name in dict.fromkeys(name for one in pixels for name in one):
        parts = [one[name] for one in pixels if name in one]
        shape = [max(x.shape[d] for x in parts) for d in range(1, parts[0].ndim)]
        whole = parts[0].new_zeros(sum(map(len, parts)), *shape)
        start = 0
        for x in parts:
            whole[(slice(start, start + len(x)), *(slice(n) for n in x.shape[1:]))] = x
            start += len(x)
        found[name] = whole
    return found


_PATCHES = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"}
_PATCHES |= {"glm4v", "glm4v_moe", "glm46v", "kimi_k25"}


class Items:
    """Makes random images and videos of a family, of two sizes where it has any size."""

    def __init__(self, family: str, seed: int) -> None:
        self.family, self.generator = family, torch.Generator().manual_seed(seed)
        self.plain = plain_vision_model(vision_model_of(family), torch.float64)

    def image(self, *, large: bool) -> Item:
        family = self.family
        if family in _PATCHES:
            return self._patches("image", (1, 4, 4) if large else (1, 2, 4))
        tiles = 2 if large else 1
        if family == "internvl":
            return self._item("image", pixel_values=self._random(tiles, 3, 8, 8))
        if family == "llava":
            return self._item("image", pixel_values=self._random(1, 3, 8, 8))
        if family in ("llava_next", "llava_onevision"):
            size = torch.tensor([[16, 13] if large else [8, 11]])
            values = self._random(1, 5 if large else 3, 3, 8, 8)
            return self._item("image", pixel_values=values, image_sizes=size)
        if family == "mistral3":
            height, width = (8, 12) if large else (8, 8)
            values = self._random(1, 3, height, width)
            sizes = torch.tensor([[height, width]])
            return self._item("image", width // 4, pixel_values=values, image_sizes=sizes)
        if family in ("smolvlm", "idefics3"):
            mask = torch.ones(1, tiles, 8, 8, dtype=torch.int64)
            values = self._random(1, tiles, 3, 8, 8)
            return self._item("image", 4, pixel_values=values, pixel_attention_mask=mask)
        assert family == "lfm2_vl", family
        height, width = (4, 4) if large else (4, 2)
        values, count = self._random(1, 16, 12), height * width
        values[:, count:] = 0
        mask = (torch.arange(16) < count).long()[None]
        shapes = torch.tensor([[height, width]])
        names = {"pixel_attention_mask": mask, "spatial_shapes": shapes}
        return self._item("image", pixel_values=values, **names)

    def video(self, frames: int) -> Item:
        if self.family == "llava_onevision":
            return self._item("video", pixel_values_videos=self._random(1, 2, 3, 8, 8))
        return self._patches("video", (frames, 2, 4))

    @property
    def has_videos(self) -> bool:
        return hasattr(self.plain.base_model, "get_video_features")

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _patches(self, kind: str, grid: tuple[int, int, int]) -> Item:
        count = math.prod(grid)
        shape = (count, 3, 2, 2) if self.family == "kimi_k25" else (count, 3 * 2 * 2**2)
        names = {"image": ("pixel_values", "image_grid_thw")}
        names["video"] = ("pixel_values_videos", "video_grid_thw")
        pixels, grid_name = names[kind]
        inputs = {pixels: self._random(*shape), grid_name: torch.tensor([grid])}
        # Of a video, each frame has its time before it, but not in all families.
        is_one = self.family in ("kimi_k25", "qwen2_vl", "qwen2_5_vl")
        each = 0 if is_one else grid[1] * grid[2] // 4
        return self._item(kind, each, **inputs)

    def _item(self, kind: str, each: int = 0, **pixels: Tensor) -> Item:
        """An item with as many placeholders as it has feature rows, in runs of `each` (0: one)."""
        encoder = self.plain.base_model
        with torch.no_grad():
            output = getattr(encoder, f"get_{kind}_features")(**pixels, return_dict=True)
        features = output.pooler_output
        features = output.last_hidden_state if features is None else features
        features = [features] if isinstance(features, Tensor) else features
        count = sum(x.shape[:-1].numel() for x in features)
        is_glm = self.family.startswith("glm4")
        token = VIDEO if kind == "video" and not is_glm else IMAGE
        runs = [[token] * (each or count) for _ in range(count // (each or count))]
        tokens = [BEGIN]
        for number, run in enumerate(runs):
            tokens += [*([9 + number] if number else []), *run, END]
        return Item(kind, pixels, tokens)


def page(pieces: list[int | Item], generator: torch.Generator, *, masked: bool = False) -> Page:
    """A document of pieces: a number of random words, or an item."""
    tokens: list[int] = []
    for piece in pieces:
        if isinstance(piece, Item):
            tokens += piece.tokens
        else:
            tokens += torch.randint(3, 49, (piece,), generator=generator).tolist()
    ids = torch.tensor(tokens)
    labels = F.pad(ids[1:], (0, 1), value=-100)
    labels = labels.masked_fill(labels >= IMAGE, -100)
    if masked:
        labels[: len(labels) // 3] = -100
    return Page(ids, labels, [x for x in pieces if isinstance(x, Item)])


def batch_of(rows: list[list[Page]]) -> dict[str, Tensor]:
    """A batch for `shard`: packed rows, filled up with a document of words without labels."""
    longest = max(sum(len(p.ids) for p in row) for row in rows)
    columns: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "seq_idx": []}
    for row in rows:
        missing = longest - sum(len(p.ids) for p in row)
        ids = torch.cat([*(p.ids for p in row), torch.full((missing,), 5)])
        labels = torch.cat([*(p.labels for p in row), torch.full((missing,), -100)])
        columns["input_ids"].append(ids)
        # `shard` shifts labels: those of a token are the label of the one before it.
        columns["labels"].append(labels.roll(1))
        lengths = torch.tensor([*(len(p.ids) for p in row), missing])
        columns["seq_idx"].append(torch.arange(len(lengths)).repeat_interleave(lengths))
    batch = {name: torch.stack(x) for name, x in columns.items()}
    return batch | joined([p.pixels for row in rows for p in row if p.items])


Step = list[list[list[Page]]]
"""The micro-batches of a step, each rows of documents."""


def plain_vision_model(table: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    config, experts = hf.load_model_config("", table), hf.experts_path(dtype)
    model = AutoModelForImageTextToText.from_config(
        config, dtype=dtype, experts_implementation=experts
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def train_plain(table: dict[str, Any], steps: list[Step], dtype: torch.dtype, **keys) -> Record:
    """Unmodified transformers on one process, each document a forward of its own, plain AdamW."""
    record, model = Record(), plain_vision_model(table, dtype)
    hf.initialize(model, seed=3)
    if prepare := keys.get("prepare"):
        prepare(model)
    o, trained = OPTIMIZER, [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
    )
    for micro_batches in steps:
        pages = [p for rows in micro_batches for row in rows for p in row]
        total = torch.zeros((), dtype=dtype)
        for p in pages:
            pixels = {k: x.to(dtype) if x.is_floating_point() else x for k, x in p.pixels.items()}
            if "image_grid_thw" in pixels or "video_grid_thw" in pixels:
                pixels["mm_token_type_ids"] = p.kinds[None]
            if "mm_token_type_ids" in pixels and table["model_type"] == "kimi_k25":
                del pixels["mm_token_type_ids"]
            logits = model(input_ids=p.ids[None], use_cache=False, **pixels).logits[0]
            total = total + F.cross_entropy(logits, p.labels, ignore_index=-100, reduction="sum")
        loss = total / sum(int((p.labels != -100).sum()) for p in pages)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        record.losses.append(loss.item())
        record.grad_norms.append(norm.item())
        record.gradients.append(
            {name: p.grad.clone() for name, p in hf.named_parameters(model) if p.grad is not None}
        )
        optimizer.step()
        optimizer.zero_grad()
    record.parameters = {name: p.detach().clone() for name, p in hf.named_parameters(model)}
    return record


def train_sharded(
    degrees: tuple[int, int, int],
    table: dict[str, Any],
    steps: list[Step],
    dtype: torch.dtype,
    *,
    prepare=None,
    **options,
) -> Record:
    """The same on this rank of a mesh, in a loop of one's own."""
    mesh, record = mesh_of(*degrees), Record()
    model = hf.build_on_meta(hf.load_model_config("", table), dtype)
    if prepare:
        prepare(model)
    dtypes = {"param_dtype": dtype, "reduce_dtype": dtype}
    parallelize(model, mesh, **sections(**{"loss_tile_tokens": 5} | dtypes | options))
    hf.allocate(model, mesh.device)
    hf.initialize(model, seed=3)
    model.train()
    optimizer = build_optimizer(model, OPTIMIZER)
    ranks, rank = mesh.batch.size(), mesh.batch.get_local_rank()

    def own(rows: list[list[Page]]) -> dict[str, Tensor]:
        count = len(rows) // ranks
        return batch_of(rows[rank * count :][:count])

    loader = [own(rows) for micro_batches in steps for rows in micro_batches]
    accumulate, total = len(steps[0]), 0.0
    for number, batch in enumerate(shard(loader, model, accumulate=accumulate), start=1):
        batch["pixels"] = tuple(
            {k: x.to(dtype) if x.is_floating_point() else x for k, x in p.items()}
            for p in batch["pixels"]
        )
        loss = model(**batch).loss
        loss.backward()
        total += loss.item()
        if number % accumulate:
            continue
        norm = clip_gradients(list(model.parameters()), MAX_NORM)
        record.losses.append(total)
        total = 0.0
        record.grad_norms.append(norm.item())
        record.gradients.append(
            {
                name: p.grad.full_tensor().cpu()
                for name, p in hf.named_parameters(model)
                if p.grad is not None
            }
        )
        optimizer.step()
        optimizer.zero_grad()
    record.parameters = {
        name: p.detach().full_tensor().cpu() for name, p in hf.named_parameters(model)
    }
    return record if torch.distributed.get_rank() == 0 else Record(record.losses, record.grad_norms)
