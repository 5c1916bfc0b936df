"""Each family of transformers models that is said to train, against unmodified transformers in one
process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from itertools import combinations, cycle, product
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.families import FAMILIES, HYBRIDS, model_of
from helpers.meshes import mesh_of
from helpers.models import plain_model
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.rows import Row, make_rows
from helpers.training import Record, largest_difference, train_plain, train_sharded
from titan_ulysses.model import hf
from titan_ulysses.model.families import CHECKED_FAMILIES, attention_needs
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.ulysses.cores import Core, varlen

# Where unmodified code leaves fp64, so that parity with it as it is holds to 1e-6. With those steps
# kept in fp64, on both sides, it holds to 1e-12 for every family.
NORMS = "RMSNorm normalizes in fp32"
GEMMA_NORMS = (
    "RMSNorm normalizes and scales in fp32, so the gradients of its weights are sums in fp32"
)
RECURRENCE = "the recurrence and the gated norm are in fp32"
FALLS_TO_FP32 = {
    "llama": NORMS,
    "mistral": NORMS,
    "qwen2": NORMS,
    "qwen3": NORMS,
    "gemma2": f"{GEMMA_NORMS}; eager attention, which is what it chooses, takes its softmax in "
    "fp32",
    "gemma3_text": GEMMA_NORMS,
    "phi3": NORMS,
    "olmo2": NORMS,
    "granite": NORMS,
    "smollm3": NORMS,
    "glm4": NORMS,
    "qwen3_moe": f"{NORMS}; the router takes its softmax in fp32",
    "gpt_oss": NORMS,
    "llama4_text": f"{NORMS}, RoPE turns in fp32, the router takes its sigmoid in fp32",
    "deepseek_v2": f"{NORMS}, RoPE turns in fp32, the router scores in fp32",
    "deepseek_v3": f"{NORMS}, the router scores in fp32",
    "deepseek_v32": f"{NORMS}, router and indexer score in fp32",
    "glm_moe_dsa": f"{NORMS}, router and indexer score in fp32",
    "dots1": f"{NORMS}, the router scores in fp32",
    "glm4_moe": f"{NORMS}, the router scores in fp32",
    "glm4_moe_lite": f"{NORMS}, the router scores in fp32",
    "ernie4_5_moe": f"{NORMS}, RoPE turns in fp32, the router scores in fp32",
    "exaone_moe": f"{NORMS}, the router scores in fp32",
    "hunyuan_v1_moe": f"{NORMS}; the router takes its softmax in fp32",
    "hy_v3": f"{NORMS}, the router scores in fp32, experts are added up in fp32",
    "solar_open": f"{NORMS}, the router scores in fp32",
    "sarvam_moe": f"{NORMS}, the router scores in fp32",
    "hyperclovax": NORMS,
    "gemma4_text": GEMMA_NORMS,
    "qwen3_next": f"{GEMMA_NORMS}; {RECURRENCE}, the router takes its softmax in fp32",
    "qwen3_5_text": f"{GEMMA_NORMS}; {RECURRENCE}",
    "qwen3_5_moe_text": f"{GEMMA_NORMS}; {RECURRENCE}, the router takes its softmax in fp32",
    "olmo_hybrid": f"{NORMS}; {RECURRENCE}",
    "granitemoehybrid": f"{NORMS}; {RECURRENCE}",
    "bamba": f"{NORMS}; {RECURRENCE}",
    "falcon_h1": f"{NORMS}; {RECURRENCE}",
    "nemotron_h": f"{NORMS}; {RECURRENCE}, the router scores in fp32",
    "lfm2": NORMS,
    "lfm2_moe": f"{NORMS}, the router scores in fp32",
}
FALLS_TO_FP32 = {family: where for family, where in FALLS_TO_FP32.items() if family in FAMILIES}
# Here fp32 steps round differently on the two sides, by up to 1e-6 in any gradient: gemma's as
# above, llama4's because Ulysses multiplies queries by a ratio of temperatures, those of routers
# that score experts in fp32. AdamW's first step is the gradient divided by its own size, however
# small: what follows it is compared by loss only, and in full with those steps kept in fp64.
ROUTERS_IN_FP32 = {
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "hunyuan_v1_moe",
    "hy_v3",
    "sarvam_moe",
    "solar_open",
}
STATES_IN_FP32 = set(HYBRIDS) - {"lfm2", "lfm2_moe"}
AMPLIFIED_BY_ADAMW = {"gemma2", "gemma3_text", "gemma4_text", "llama4_text"}
AMPLIFIED_BY_ADAMW |= ROUTERS_IN_FP32 | STATES_IN_FP32

ROUNDING_AMPLIFIED = {"gemma4_text": 5e-12}
"""Bounds of families whose own steps make more of fp64's rounding: 1.4e-12 after three steps,
with scores that are not divided by the size of a head."""

FP32_AMPLIFIED = {"olmo_hybrid": 3e-6}
"""The same where a family's fp32 steps stay fp32: 1.4e-6 in A_log, whose gradient is a sum over
tokens, on four ranks that share the heads unevenly. In fp64 they agree to 4e-15."""

STEPS = 2
LENGTHS = {  # two rows of 24 tokens, cut at the borders of ranks, next to them and across them
    "whole": [(24,), (24,)],
    "packed": [(10, 13, 1), (6, 6, 12)],
}
CORES: dict[str, str | Core] = {"sdpa": "sdpa", "varlen": varlen}
"""varlen, the first choice on GPUs, with a CPU's kernels in place of CUDA's."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny matrices: more threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@lru_cache
def runs(family: str, core: str) -> bool:
    return core == "sdpa" or "softcap" not in attention_needs(
        hf.load_model_config("", model_of(family))
    )


def steps_of(lengths: str) -> list[list[list[Row]]]:
    return [
        [make_rows(LENGTHS[lengths], masked="none", vocab_size=61, seed=seed)]
        for seed in range(STEPS)
    ]


@lru_cache
def plain(family: str, lengths: str, keep_fp64: bool) -> Record:
    return plain_of(model_of(family), lengths, keep_fp64)


def plain_of(table: dict[str, Any], lengths: str, keep_fp64: bool) -> Record:
    arguments = table, steps_of(lengths), torch.float64
    return kept_in_fp64(train_plain, *arguments) if keep_fp64 else train_plain(*arguments)


def sharded(family: str, degree: int, lengths: str, core: str, keep_fp64: bool) -> Record:
    return sharded_of(model_of(family), degree, lengths, core, keep_fp64)


def sharded_of(
    table: dict[str, Any], degree: int, lengths: str, core: str, keep_fp64: bool
) -> Record:
    call = (kept_in_fp64, train_sharded) if keep_fp64 else (train_sharded,)
    arguments = (1, 1, degree), table, steps_of(lengths), torch.float64
    # Both layers of a model are one segment, if they only hand hidden states on, and the last of
    # its five tiles is smaller.
    return run_on_ranks(
        *(degree, *call, *arguments),
        attention=CORES.get(core, core),
        checkpoint_every=1 if table["model_type"] == "glm_moe_dsa" else 2,
        mlp_tile_tokens=5,
    )[0]


def check_in_fp64(family: str, degree: int, lengths: str, core: str) -> None:
    worst = largest_difference(
        sharded(family, degree, lengths, core, True), plain(family, lengths, True)
    )
    bound = ROUNDING_AMPLIFIED.get(family, 1e-12)
    assert max(worst.values()) < bound, {k: v for k, v in worst.items() if v >= bound}


def check_as_it_is(family: str, degree: int, lengths: str, core: str) -> None:
    found, expected = sharded(family, degree, lengths, core, False), plain(family, lengths, False)
    if family in AMPLIFIED_BY_ADAMW:
        found, expected = (
            Record(r.losses, r.grad_norms[:1], r.gradients[:1]) for r in (found, expected)
        )
    worst = largest_difference(found, expected)
    bound = FP32_AMPLIFIED.get(family, 1e-6)
    assert max(worst.values()) < bound, {k: v for k, v in worst.items() if v >= bound}


Case = tuple[str, int, str, str]
EVERY_CASE: list[Case] = [
    case for case in product(FAMILIES, (1, 2, 3, 4), LENGTHS, CORES) if runs(case[0], case[3])
]


# Each family once, with every combination of the other settings on two and three ranks in turn, and
# some on one and four. All of them are slow.
_IN_TURN = [
    *product((2, 3), LENGTHS, CORES),
    (1, "packed", "sdpa"),
    (4, "packed", "varlen"),
    (1, "whole", "varlen"),
    (4, "whole", "sdpa"),
]
ONCE: list[Case] = [
    (family, degree, lengths, core if runs(family, core) else "sdpa")
    for family, (degree, lengths, core) in zip(FAMILIES, cycle(_IN_TURN), strict=False)
]


def name_of(case: Case) -> str:
    return "{}-sp{}-{}-{}".format(*case)


def test_the_cases_cover_every_family_and_pair() -> None:
    def pairs(cases: list[Case]) -> set:
        """Of the settings beside the family."""
        return {(i, case[i], j, case[j]) for case in cases for i, j in combinations(range(1, 4), 2)}

    assert pairs(ONCE) == pairs(EVERY_CASE)
    assert {case[0] for case in ONCE} == FAMILIES.keys()
    assert FAMILIES.keys() == FALLS_TO_FP32.keys() <= CHECKED_FAMILIES


@pytest.mark.parametrize("case", ONCE, ids=name_of)
def test_families_in_fp64(case: Case) -> None:
    check_in_fp64(*case)


@pytest.mark.parametrize(
    "family",
    [
        # All of them with those steps kept in fp64, above.
        pytest.param(family, marks=[] if i % 12 == 0 else [pytest.mark.slow])
        for i, family in enumerate(FAMILIES)
    ],
)
def test_families_as_they_are(family: str) -> None:
    check_as_it_is(family, 2, "packed", "auto")


def test_the_first_choice_on_gpus_in_fp64() -> None:
    """For sinks, windows and packed documents."""
    check_in_fp64("gpt_oss", 2, "packed", "varlen")


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_in_fp64, check_as_it_is], ids=["fp64", "as it is"])
@pytest.mark.parametrize("case", EVERY_CASE, ids=name_of)
def test_families_in_full(case: Case, check) -> None:
    check(*case)


# --- keys of a config that change what attention sees, or the logits ------------------------------

SLIDING = {"use_sliding_window": True, "sliding_window": 5}
CHUNKED = {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 7}
SCALES = {
    "logit_scale": 3.0,
    "logits_scaling": 4.0,
    "final_logit_softcapping": 2.0,
    "lm_head_multiplier": 5.0,
}
OBEYED: dict[str, dict[str, Any]] = {
    "qwen2": {**SLIDING, "max_window_layers": 1},
    "qwen3": {**SLIDING, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen3_moe": SLIDING,
    "smollm3": {**SLIDING, "no_rope_layers": None, "no_rope_layer_interval": 2},
    "gemma2": {
        "layer_types": ["full_attention", "sliding_attention"],
        "final_logit_softcapping": None,
    },
    "gemma3_text": {
        "layer_types": None,
        "sliding_window_pattern": 2,
        "final_logit_softcapping": 3.0,
    },
    "gemma4_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }
    | {"num_kv_shared_layers": 1, "rms_norm_eps": 1e-2},
    "llama4_text": {"layer_types": None, "no_rope_layers": [0, 1]},
    "exaone_moe": {"layer_types": ["full_attention", "sliding_attention"]},
}
"""What a family reads."""
IGNORED: dict[str, dict[str, Any]] = {
    "llama": {**CHUNKED, **SLIDING, "use_bidirectional_attention": True},
    "mistral": {**CHUNKED, **SCALES},
    "qwen2": {**SCALES, "max_window_layers": 0, "sliding_window": 5},
    "granite": {key: scale for key, scale in SCALES.items() if key != "logits_scaling"},
    "hyperclovax": {key: scale for key, scale in SCALES.items() if key != "logits_scaling"},
    "gemma4_text": {"use_bidirectional_attention": "vision"},
}
"""What it does not read, though others do."""
EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
}
EXPERTS |= {
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
}
LEFT_TO_SLOW = {"smollm3", "qwen3", "qwen3_moe", "gemma3_text", "hyperclovax"}
"""These obey or ignore their keys in the same way as another family here."""
KEYS = [
    pytest.param(
        family,
        keys,
        id=f"{family}-{does}",
        marks=[pytest.mark.slow] if family in LEFT_TO_SLOW else [],
    )
    for does, of_families in (("obeys", OBEYED), ("ignores", IGNORED))
    for family, keys in of_families.items()
    if family in FAMILIES
]
KEYS += (
    [pytest.param("gemma4_text", EXPERTS, id="gemma4_text-experts")]
    if "gemma4_text" in FAMILIES
    else []
)


@pytest.mark.parametrize(("family", "keys"), KEYS)
def test_keys_mean_what_they_mean_to_the_family(family: str, keys: dict[str, Any]) -> None:
    table = {**model_of(family), **keys}
    worst = largest_difference(
        sharded_of(table, 2, "packed", "auto", True),
        expected := plain_of(table, "packed", True),
    )
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}
    same = expected.losses == plain(family, "packed", True).losses
    assert same == (keys is IGNORED.get(family)), "the keys do not what this test says"


# --- bf16 -----------------------------------------------------------------------------------------


Outcome = tuple[torch.Tensor, torch.Tensor]
"""The loss of each label, and all gradients of their mean as one vector."""


def _inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and labels [2, 128]: two rows of one document each, so that plain transformers needs but
    one forward.
    """
    return torch.randint(61, (2, 2, 128), generator=torch.Generator().manual_seed(seed)).unbind()


def _random_model(family: str, seed: int, dtype: torch.dtype, experts: str) -> PreTrainedModel:
    """The same numbers in every dtype: those that bf16 has."""
    table = {**model_of(family), "hidden_size": 96, "initializer_range": 0.05}
    if "qk_rope_head_dim" not in table:
        table["head_dim"] = 16
    model = plain_model(table, torch.bfloat16, experts=experts)
    hf.initialize(model, seed=seed)
    return model.to(dtype)


def _flat(gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat(
        [(g.full_tensor() if isinstance(g, DTensor) else g).double().flatten() for g in gradients]
    )


def plain_outcome(family: str, seed: int, dtype: torch.dtype) -> Outcome:
    model, (ids, labels) = _random_model(family, seed, dtype, hf.experts_path(dtype)), _inputs(seed)
    logits = model(input_ids=ids, use_cache=False).logits.to(
        torch.promote_types(dtype, torch.float32)
    )
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    losses.mean().backward()
    return losses.detach().double(), _flat(p.grad for p in model.parameters())


def sharded_outcome(family: str, seed: int) -> Outcome:
    """As the trainer does: fp32 parameters, computed with in bf16, gradients summed over the ranks
    in fp32.
    """
    mesh, (ids, labels) = mesh_of(1, 1, 2), _inputs(seed)
    model = _random_model(family, seed, torch.float32, hf.experts_path(torch.bfloat16))
    parallelize(model, mesh, param_dtype=torch.bfloat16)
    batch = {
        "input_ids": mesh.local_slice(ids, chunk_tokens=None),
        "labels": mesh.local_slice(labels, chunk_tokens=None),
        "position_ids": mesh.local_slice(torch.arange(128).expand(2, -1), chunk_tokens=None),
        "documents": ((128,), (128,)),
        "num_items_in_batch": torch.tensor(labels.numel()),
    }
    model(**batch).loss.backward()
    gradients = _flat(p.grad for p in model.parameters())
    with torch.no_grad():
        return model(**batch, reduction="none").loss.double(), gradients


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        *(
            pytest.param(family, marks=pytest.mark.slow)
            for family in ("gemma2", "gpt_oss", "deepseek_v3")
        ),
    ],
)
def test_bf16_loses_no_more_than_transformers_does(family: str) -> None:
    """Norms of the errors against fp64 of all labels' losses (in their mean errors cancel by luck)
    and of gradients.
    """
    ratios = bf16_ratios(family)
    assert all(ratio <= 1.1 for ratio in ratios), ratios


def bf16_ratios(family: str) -> list[float]:
    """Of the losses and of the gradients: median of five sharded errors, as a share of plain
    transformers' own.
    """
    errors: dict[str, list[tuple[float, ...]]] = {"plain": [], "sharded": []}
    for seed in range(5):
        exact = plain_outcome(family, seed, torch.float64)
        ranks = run_on_ranks(2, sharded_outcome, family, seed)
        outcomes = {
            "plain": plain_outcome(family, seed, torch.bfloat16),
            "sharded": (torch.cat([losses for losses, _ in ranks], dim=1), ranks[0][1]),
        }
        for who, outcome in outcomes.items():
            errors[who].append(
                tuple((a - b).norm().item() for a, b in zip(outcome, exact, strict=True))
            )
    plain, sharded = (
        list(map(median, zip(*errors[who], strict=True))) for who in ("plain", "sharded")
    )
    assert all(error > 0 for error in plain)
    return [ours / theirs for ours, theirs in zip(sharded, plain, strict=True)]


def train_loaded(folders: dict[str, Path]) -> dict[str, tuple[list[float], set[torch.dtype], str]]:
    """A loop of one's own: losses of three steps, dtypes that are trained, and what was warned
    of.
    """
    mesh, (ids, labels), outcomes = mesh_of(1, 1, 2), _inputs(0), {}
    here = slice(64 * mesh.sp.get_local_rank(), 64 * (mesh.sp.get_local_rank() + 1))
    for family, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        with pytest.warns(UserWarning) if _is_mixed(model) else nullcontext([]) as warned:
            parallelize(model, mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(3):
            loss = model(
                input_ids=ids[:, here],
                labels=labels[:, here],
                position_ids=torch.arange(128).expand(2, -1)[:, here],
                documents=((128,), (128,)),
                num_items_in_batch=torch.tensor(labels.numel()),
            ).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
        outcomes[family] = losses, dtypes, " ".join(str(w.message) for w in warned)
    return outcomes


def _is_mixed(model: PreTrainedModel) -> bool:
    return len({p.dtype for p in model.parameters() if p.requires_grad}) > 1


def test_a_model_is_built_in_one_dtype() -> None:
    for family in FAMILIES:
        model = hf.build_on_meta(hf.load_model_config("", model_of(family)), torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, family


@pytest.mark.parametrize(
    "families",
    [
        pytest.param({"deepseek_v3", "glm4_moe", "hunyuan_v1_moe"}, id="three"),
        pytest.param(ROUTERS_IN_FP32, id="all", marks=pytest.mark.slow),
    ],
)
def test_experts_that_are_loaded_in_bf16_train(families: set[str], tmp_path: Path) -> None:
    """transformers keeps their routers in fp32; FSDP shards one dtype."""
    ids, labels = _inputs(0)
    families = sorted(families & FAMILIES.keys())
    expected, mixed = {}, set()
    for family in families:
        _random_model(family, 0, torch.float32, "grouped_mm").save_pretrained(tmp_path / family)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.bfloat16)
        mixed |= {family} if _is_mixed(plain) else set()
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
        expected[family] = []
        for _ in range(3):
            logits = plain(input_ids=ids, use_cache=False).logits.float()
            loss = F.cross_entropy(logits.transpose(1, 2), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected[family].append(loss.item())
    assert len(mixed) >= 0.7 * len(families)
    outcomes = run_on_ranks(2, train_loaded, {family: tmp_path / family for family in families})[0]
    for family, (losses, dtypes, warned) in outcomes.items():
        assert losses == pytest.approx(expected[family], rel=5e-3), family
        assert dtypes == {torch.bfloat16}
        assert ("mlp.gate." in warned and "is now stored in torch.bfloat16" in warned) == (
            family in mixed
        ), family
