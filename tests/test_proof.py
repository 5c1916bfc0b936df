"""Families that nobody has checked: a tiny model trains sharded as it does whole, or the family is
refused by name.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRotaryEmbedding,
)

from helpers.families import GROUPS, LATENT, ROUTED, WIDTHS
from helpers.meshes import mesh_of
from helpers.ranks import run_on_ranks
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.model import hf
from titan_ulysses.model.families import CHECKED_FAMILIES, check_family
from titan_ulysses.model.verification import build_tiny, shrink
from titan_ulysses.setup.parallelize import parallelize


class _ShiftingMLP(LlamaMLP):
    """A causal convolution of two taps: it mixes neighbours whose document or rank may be
    another.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 0.1 * F.pad(x, (0, 0, 1, -1)))


class _CountingAttention(LlamaAttention):
    """Weighs tokens by their place in what it is given, which is no place in a document."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        steps = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        return super().forward(hidden_states * (1 + 0.1 * steps[:, None]), *args, **kwargs)


class _CountingRoPE(LlamaRotaryEmbedding):
    """Counts positions itself, from 0 in what it is given."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor):
        return super().forward(x, torch.arange(x.shape[1], device=x.device)[None])


class _NormsAttention(LlamaDecoderLayer):
    """Norms what comes out of attention with the norm that elsewhere feeds the MLP."""

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        return hidden_states + self.mlp(hidden_states)


class _GatesMLP(LlamaDecoderLayer):
    """Multiplies what comes out of the MLP by a parameter, whose gradient needs it."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.gate * self.mlp(self.post_attention_layernorm(hidden_states))


class _AddsInMLP(LlamaDecoderLayer):
    """Hands its MLP the residual too."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mlp = _AddingMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return self.mlp(self.post_attention_layernorm(hidden_states), hidden_states)


class _AddingMLP(LlamaMLP):
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + super().forward(x)


class _DeafAttention(nn.Module):
    """Attends to what it is given by itself: it does not call the function that its config
    names.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.values = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, None]:
        x = hidden_states[:, None]
        return F.scaled_dot_product_attention(x, x, self.values(x), is_causal=True)[:, 0], None


def _raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("no memory left on rank 1")


BLOCKS = {"norms attention": _NormsAttention, "gates MLP": _GatesMLP, "adds in MLP": _AddsInMLP}


class BrokenConfig(LlamaConfig):
    model_type = "broken_llama"
    how: str = "nowhere"


class BrokenForCausalLM(LlamaForCausalLM):
    config_class = BrokenConfig

    def __init__(self, config: BrokenConfig) -> None:
        super().__init__(config)
        if config.how == "one rank" and not self.lm_head.weight.is_meta:
            _raise_on_rank_1()
        if config.how == "RoPE":
            self.model.rotary_emb = _CountingRoPE(config)
        if config.how in BLOCKS:
            layers = (
                BLOCKS[config.how](config, index) for index in range(config.num_hidden_layers)
            )
            self.model.layers = nn.ModuleList(layers)
            self._no_split_modules = [BLOCKS[config.how].__name__]
        for index, layer in enumerate(self.model.layers):
            if config.how == "both ways":
                layer.self_attn.is_causal = False
            if config.how == "convolution":
                layer.mlp = _ShiftingMLP(config)
            if config.how == "positions":
                layer.self_attn = _CountingAttention(config, index)
            if config.how == "own attention":
                layer.self_attn = _DeafAttention(config)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.config.how == "logits":
            output.logits = output.logits + 0.1 * output.logits**2
        return output


def _parallelize(table: dict[str, Any], degrees: tuple[int, int, int]) -> str | None:
    """What parallelize says against a model of this config, or warns of; None where it takes it as
    it is.
    """
    if table["model_type"] == "broken_llama":
        AutoConfig.register("broken_llama", BrokenConfig, exist_ok=True)
        AutoModelForCausalLM.register(BrokenConfig, BrokenForCausalLM, exist_ok=True)
    config = hf.load_model_config("", table)
    model = hf.build_on_meta(config, torch.float32)
    random = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            parallelize(model, mesh_of(*degrees), param_dtype=torch.float32)
        except UserError as error:
            return str(error)
    assert torch.equal(random, torch.get_rng_state()), (
        "the proof drew from the run's random numbers"
    )
    return next((str(w.message) for w in caught if "the MLP is" in str(w.message)), None)


NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
AHEAD = {"use_bidirectional_attention": True}


def verdict(table: dict[str, Any], degrees: tuple[int, int, int]) -> str | None:
    """The same on every rank."""
    world_size = degrees[0] * degrees[1] * degrees[2]
    verdicts = run_on_ranks(world_size, _parallelize, {**WIDTHS, **table}, degrees)
    assert len(set(verdicts)) == 1, verdicts
    return verdicts[0]


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("youtu", {}),
        ("minicpm3", {"dim_model_base": 6}),  # divides what its head is given by 4
        ("sarvam_mla", {**ROUTED, **GROUPS}),  # keeps its routers in fp32
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_latent_families_that_prove_themselves(family: str, own: dict[str, Any]) -> None:
    assert family not in CHECKED_FAMILIES
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {family}")
    assert verdict({**LATENT, **own, "model_type": family}, (1, 1, 2)) is None


@pytest.mark.parametrize(
    "degrees", [(1, 1, 1), (1, 1, 2), (2, 1, 1), (1, 1, 3)], ids=["one", "sp2", "rep2", "sp3"]
)
@pytest.mark.parametrize("family", ["cohere", "gpt_neox", "mixtral"])
def test_families_that_prove_themselves(family: str, degrees: tuple[int, int, int]) -> None:
    assert family not in CHECKED_FAMILIES
    assert verdict({"model_type": family}, degrees) is None


@pytest.mark.parametrize("family", ["hunyuan_v1_dense", "ministral"])
def test_families_without_a_head_size_of_their_own(family: str) -> None:
    assert verdict({"model_type": family, "head_dim": 8}, (1, 1, 2)) is None
    with pytest.raises(
        UserError, match=f'cannot build a "{family}" of this config .* Set the missing keys'
    ):
        hf.build_on_meta(hf.load_model_config("", {**WIDTHS, "model_type": family}), torch.float32)


@pytest.mark.parametrize("degrees", [(1, 1, 1), (1, 1, 2)], ids=["one", "sp2"])
@pytest.mark.parametrize("how", ["convolution", "positions", "RoPE", "own attention"])
def test_a_broken_family_is_refused(how: str, degrees: tuple[int, int, int]) -> None:
    message = verdict({"model_type": "broken_llama", "how": how}, degrees)
    if how == "RoPE" and degrees == (1, 1, 1):
        # RoPE sees only distances, which on one rank are right wherever it begins to count.
        assert message is None
        return
    assert message is not None and message.startswith('model: "broken_llama" is not a family')
    assert "could not prove that it does: the loss is off by" in message


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (
            "logits",
            "computes its logits from the output of lm_head in a way that this version does not "
            "support",
        ),
        ("both ways", "LlamaAttention attends to later tokens too (is_causal = False)"),
    ],
)
def test_what_a_broken_family_does_is_said(how: str, reason: str) -> None:
    message = verdict({"model_type": "broken_llama", "how": how}, (1, 1, 2))
    assert (
        message is not None
        and message.startswith('model: "broken_llama" is not a family')
        and reason in message
    )


@pytest.mark.parametrize(
    ("how", "tiling"),
    [
        ("norms attention", "tiled without its norms"),
        ("gates MLP", "tiled without its norms"),
        ("adds in MLP", "not tiled"),
    ],
)
def test_an_optimisation_that_does_not_hold_is_skipped(how: str, tiling: str) -> None:
    message = verdict({"model_type": "broken_llama", "how": how}, (1, 1, 2))
    assert message is not None and f"the MLP is {tiling}, which is exact" in message, message


def test_the_broken_family_is_right_where_nothing_breaks_it() -> None:
    assert verdict({"model_type": "broken_llama"}, (1, 1, 2)) is None


def test_a_rank_that_fails_alone_stops_all() -> None:
    message = verdict({"model_type": "broken_llama", "how": "one rank"}, (1, 1, 2))
    assert message is not None and "no memory left on rank 1" in message


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"model_type": "stablelm"}, "does not pass keyword arguments on"),
        ({"model_type": "nemotron", "head_dim": 8}, "does not pass keyword arguments on"),
        (
            {"model_type": "gpt_neo", "attention_types": [[["global"], 2]], "num_heads": 4},
            "the loss is off by",
        ),
        ({"model_type": "biogpt", **NO_DROPOUT}, "has no list of decoder layers"),
        (
            {"model_type": "bert", "is_decoder": True, **NO_DROPOUT},
            "BertEncoder, which takes no token ids",
        ),
        ({"model_type": "falcon"}, "its attention is probably code of its own (TypeError: "),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_real_families_that_cannot_prove_themselves(table: dict[str, Any], reason: str) -> None:
    message = verdict(table, (1, 1, 2))
    assert message is not None and f'"{table["model_type"]}"' in message and reason in message, (
        message
    )


def test_a_family_that_cannot_be_made_small() -> None:
    table = {"model_type": "prophetnet", "hidden_size": 128, "attention_dropout": 0.0}
    message = run_on_ranks(1, _parallelize, table, (1, 1, 1))[0]
    assert (
        message is not None
        and "its config cannot be reduced to a tiny model (NotImplementedError: " in message
    )


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (
            {"model_type": "llama", "is_causal": False},
            "attention to later tokens (is_causal = false",
        ),
        (
            {"model_type": "gemma2", **AHEAD},
            "attention to later tokens (use_bidirectional_attention = true",
        ),
        (
            {"model_type": "gemma3_text", **AHEAD},
            "attention to later tokens (use_bidirectional_attention = true",
        ),
        (
            {"model_type": "gemma4_text", "use_bidirectional_attention": "all"},
            '(use_bidirectional_attention = "all"',
        ),
        ({"model_type": "gemma3"}, "its text attends both ways inside an image"),
        ({"model_type": "llama4"}, "its head is inside its text"),
        ({"model_type": "phi4_multimodal"}, "multi-modal"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_families_that_are_refused_by_name(table: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        check_family(hf.load_model_config("", table))
    assert f'model: "{table["model_type"]}" ' in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize("family", sorted(CHECKED_FAMILIES & set(CONFIG_MAPPING)))
def test_no_family_trains_causally_what_should_look_ahead(family: str) -> None:
    config = hf.load_model_config("", {"model_type": family, "is_causal": False})
    with pytest.raises(UserError, match=r"attention to later tokens \(is_causal = false"):
        check_family(config)


def test_what_is_refused_is_what_transformers_does() -> None:
    """is_causal = false in any family; other keys only where a family has them."""

    def looks_ahead(table: dict[str, Any]) -> bool:
        config = hf.load_model_config(
            "", {**WIDTHS, "head_dim": 4, "initializer_range": 0.2, **table}
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        ids = torch.arange(8)[None]
        logits, others = (
            model(input_ids=x, use_cache=False).logits[:, :-1] for x in (ids, ids * (ids < 7))
        )
        return not torch.equal(logits, others)

    assert looks_ahead({"model_type": "llama", "is_causal": False})
    assert looks_ahead({"model_type": "gemma3_text", **AHEAD})
    check_family(hf.load_model_config("", {"model_type": "llama", **AHEAD}))
    assert not looks_ahead({"model_type": "llama", **AHEAD})


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"model_type": "gpt2"}, "attn_pdrop = 0.1: dropped attention weights"),
        ({"model_type": "gpt_bigcode"}, "attn_pdrop = 0.1: dropped attention weights"),
        (
            {"model_type": "opt", "attention_dropout": 0.2},
            "attention_dropout = 0.2: dropped attention weights",
        ),
        (
            {"model_type": "opt", "layerdrop": 0.3},
            "layerdrop = 0.3: each rank would skip different layers",
        ),
        (
            {"model_type": "bert", "is_decoder": True},
            "attention_probs_dropout_prob = 0.1: dropped attention weights",
        ),
        (
            {"model_type": "xglm", "attention_dropout": 0.0, "layerdrop": 0.1},
            "layerdrop = 0.1: each rank would skip",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_dropout_of_attention_and_of_layers_is_refused_by_name(
    table: dict[str, Any], reason: str
) -> None:
    message = verdict(table, (1, 1, 1))
    assert (
        message is not None
        and message.startswith(f"model: {reason}")
        and "in the model's config" in message
    )


def test_the_tiny_model_has_one_dtype() -> None:
    """transformers makes routers in fp32 whatever it is asked for."""
    table = {**WIDTHS, **LATENT, **ROUTED, **GROUPS, "model_type": "deepseek_v3"}
    model = build_tiny(shrink(hf.load_model_config("", table)), torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_shrink_shows_every_kind_of_layer() -> None:
    types = ["full_attention", "full_attention", "sliding_attention", "full_attention"] * 8
    config = AutoConfig.for_model(
        "cohere2", num_hidden_layers=32, layer_types=types, num_key_value_heads=8
    )
    before = config.to_dict()
    tiny = shrink(config)
    assert (
        tiny.layer_types == ["full_attention", "sliding_attention"] and tiny.num_hidden_layers == 2
    )
    assert (tiny.num_attention_heads, tiny.num_key_value_heads, tiny.sliding_window) == (4, 2, 8)
    assert sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny).parameters()) < 100_000
    assert config.to_dict() == before
