"""The tiled autograd function alone: against the same function of all rows at once."""

from __future__ import annotations

from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.families import FAMILIES, model_of
from titan_ulysses.memory.tiled import Tiled, tile_mlp, tile_norm
from titan_ulysses.model import hf
from titan_ulysses.model.families import mlp_layout
from titan_ulysses.setup.parallelize import automatic_mlp_tile

WIDTH = 12


class Gated(nn.Module):
    """A gated MLP with a norm before it, biases and dropout."""

    def __init__(
        self, *, dropout: float = 0.0, dtype: torch.dtype = torch.float64, width: int = WIDTH
    ):
        super().__init__()
        options = {"dtype": dtype}
        self.norm = nn.LayerNorm(width, **options)
        self.gate = nn.Linear(width, 2 * width, **options)
        self.up = nn.Linear(width, 2 * width, **options)
        self.down, self.dropout = nn.Linear(2 * width, width, **options), dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.dropout(self.down(F.silu(self.gate(x)) * self.up(x)), self.dropout)


def gradients(fn, module: nn.Module, rows: Tensor, upstream: Tensor) -> list[Tensor]:
    """Output, gradient of the rows and of each parameter that is trained."""
    module.zero_grad()
    rows = rows.detach().clone().requires_grad_()
    output = fn(rows)
    output.backward(upstream)
    return [output.detach(), rows.grad, *(p.grad for p in module.parameters() if p.requires_grad)]


def largest(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("tile_tokens", [1, 3, 5, 20, 21, 10**6])
@pytest.mark.parametrize("shape", [(20,), (1, 20), (4, 5), (2, 2, 5)], ids=str)
def test_equals_the_function_of_all_rows(shape, tile_tokens):
    torch.manual_seed(0)
    module, rows = Gated(), torch.randn(*shape, WIDTH, dtype=torch.float64)
    upstream = torch.randn_like(rows)
    found = gradients(Tiled(module, tile_tokens), module, rows, upstream)
    assert largest(found, gradients(module, module, rows, upstream)) < 1e-12


def test_upstream_scales_everything_and_frozen_parameters_get_nothing():
    module, rows = Gated(), torch.randn(7, WIDTH, dtype=torch.float64)
    module.up.weight.requires_grad_(False)
    tiled = Tiled(module, 3)
    once, thrice = (
        gradients(tiled, module, rows, torch.full_like(rows, scale)) for scale in (1.0, 3.0)
    )
    assert module.up.weight.grad is None
    assert largest(thrice[1:], [3 * g for g in once[1:]]) < 1e-12


def test_rows_that_need_no_gradient_and_no_rows_at_all():
    module = Gated()
    tiled = Tiled(module, 3)
    tiled(torch.randn(7, WIDTH, dtype=torch.float64)).sum().backward()  # frozen embeddings
    assert module.down.weight.grad.abs().max() > 0
    module.zero_grad()
    tiled(torch.empty(0, WIDTH, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_random_numbers_are_replayed(checkpointed):
    """With dropout the tiles' own gradient is compared with finite differences under the same
    random numbers.
    """
    module, rows = Gated(dropout=0.5), torch.randn(10, WIDTH, dtype=torch.float64)
    tiled, direction = Tiled(module, 3), torch.randn_like(rows)

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(5)
        # What draws after the tiles must find the random numbers where it found them the first
        # time.
        return (F.dropout(tiled(x), 0.5) * direction).sum()

    rows.requires_grad_()
    loss = (
        torch.utils.checkpoint.checkpoint(f, rows, use_reentrant=False) if checkpointed else f(rows)
    )
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state), "backward must not move the random numbers"
    with torch.no_grad():
        step = 1e-6 * torch.randn_like(rows)
        slope = f(rows + step) - f(rows - step)
    assert torch.allclose((2 * step * rows.grad).sum(), slope, rtol=1e-6)


def test_autocast_is_replayed():
    module, rows = Gated(dtype=torch.float32), torch.randn(10, WIDTH)
    dtypes = []
    module.down.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    tiled = Tiled(module, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = tiled(rows.requires_grad_())
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert dtypes == 6 * [torch.bfloat16]
    assert rows.grad.dtype == torch.float32 and module.up.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("tiles", [1, 4, 16, 64, 256])
def test_bf16_weight_gradients_lose_nothing(tiles):
    """Error against fp64 of all weight gradients: at most 1.1 times that without tiles; median of
    five seeds.
    """
    ratios = []
    for seed in range(5):
        torch.manual_seed(seed)
        rows, upstream = torch.randn(2, 1024, 32).bfloat16()
        exact = Gated(width=32)
        low = Gated(width=32).bfloat16()
        exact.load_state_dict(low.state_dict())
        expected = gradients(exact, exact, rows.double(), upstream.double())[2:]
        whole = gradients(low, low, rows, upstream)[2:]
        tiled = gradients(Tiled(low, 1024 // tiles), low, rows, upstream)[2:]
        errors = [
            sum((a.double() - b).norm() ** 2 for a, b in zip(g, expected, strict=True))
            for g in (tiled, whole)
        ]
        ratios.append((errors[0] / errors[1]).sqrt().item())
    assert median(ratios) <= 1.1, ratios


# What of a block is the MLP and the norms around it; "-" where there is none of its own.
LAYOUTS = {family: ("mlp", "post_attention_layernorm", "-") for family in FAMILIES} | {
    "gemma2": ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("mlp", "-", "post_feedforward_layernorm"),
    "glm4": ("mlp", "post_attention_layernorm", "post_mlp_layernorm"),
    "llama4_text": ("feed_forward", "post_attention_layernorm", "-"),
    "hyperclovax": ("mlp", "post_attention_layernorm", "post_norm2"),
    "gemma4_text": ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "granitemoehybrid": ("block_sparse_moe", "-", "-"),
    "bamba": ("feed_forward", "pre_ff_layernorm", "-"),
    "falcon_h1": ("feed_forward", "pre_ff_layernorm", "-"),
    "nemotron_h": ("mixer", "norm", "-"),
    "lfm2": ("feed_forward", "ffn_norm", "-"),
    "lfm2_moe": ("feed_forward", "ffn_norm", "-"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_tiled(family):
    """By name, and by what runs: MLP and norms see tiles, never all rows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf.load_model_config("", model_of(family)))
    block = next(block for block in model.model.layers if mlp_layout(block) is not None)
    names = {module: name for name, module in block.named_children()} | {None: "-"}
    layout = mlp_layout(block)
    assert (
        tuple(names[part] for part in (layout.mlp, layout.before, layout.after)) == LAYOUTS[family]
    )
    ids = torch.arange(10)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    tile_mlp(layout.mlp, layout.before, layout.after, tile_tokens=4)
    for norm in (child for child in block.children() if "Norm" in type(child).__name__):
        if norm not in (layout.before, layout.after):
            tile_norm(norm, tile_tokens=4)
    seen = []
    inner = next(
        m for m in layout.mlp.modules() if isinstance(m, nn.Linear) or "Router" in type(m).__name__
    )
    inner.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].flatten(0, -2).shape[0])
    )
    found = model(input_ids=ids, use_cache=False).logits
    assert seen == [4, 4, 2]
    assert torch.allclose(found, expected, atol=1e-5)


# --- default sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "on_cuda", "on_cpu"),
    [
        # 512 MiB of six tensors [tokens, 14,336] in bf16.
        ({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336}, 3072, 4096),
        ({"model_type": "llama", "hidden_size": 256, "intermediate_size": 704}, 63_488, 1024),
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2}, 174_592, 1024),
        # Eight experts a token.
        (
            {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144}
            | {"moe_intermediate_size": 768, "num_experts_per_tok": 8},
            7168,
            2048,
        ),
        ({"model_type": "llama", "hidden_size": 2**18, "intermediate_size": 2**20}, 256, 2**18),
    ],
)
def test_automatic_tiles_hold_enough_work(model: dict, on_cuda: int, on_cpu: int) -> None:
    """On CUDA so many bytes inside an MLP, in whole blocks of rows; on a CPU the model's width."""
    kind = model.pop("model_type")
    config = AutoConfig.for_model(kind, **model)
    assert automatic_mlp_tile(config, torch.bfloat16, "cuda") == on_cuda
    assert automatic_mlp_tile(config, torch.bfloat16, "cpu") == on_cpu
