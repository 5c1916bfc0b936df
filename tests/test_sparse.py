"""Learned sparse attention: what an indexer chooses, attention to it, and whole models."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from helpers.families import FAMILIES, VERIFIED, model_of
from helpers.models import plain_model
from helpers.precision import kept_in_fp64
from helpers.ranks import run_on_ranks
from helpers.rows import Row, local_batch, make_rows
from helpers.runs import Settings, logged, train, write_run
from helpers.training import Record, Run, largest_difference, train_plain, train_sharded
from titan_ulysses.checkpoint.safetensors import save_adapters
from titan_ulysses.config.schema import LoRA
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.model import families, hf
from titan_ulysses.model.families import check_family
from titan_ulysses.model.lora import add_adapters
from titan_ulysses.model.nf4 import dequantize, quantize, quantize_base
from titan_ulysses.model.parameter_names import is_adapter
from titan_ulysses.train.loss import CrossEntropy
from titan_ulysses.ulysses import indexer, sparse
from titan_ulysses.ulysses.indexer import choose, unfreeze_indexers
from titan_ulysses.ulysses.scores import Scores, of_documents
from titan_ulysses.ulysses.sparse import CHOSEN
from titan_ulysses.ulysses.tiles import Merged

pytestmark = pytest.mark.skipif("deepseek_v32" not in FAMILIES, reason="transformers is too old")

SEEN, EVERY = 4, 1000
"""Keys that a query of the tiny models reads, and as many as no document has."""
LENGTHS = [(20, 3, 1, 24), (6, 30, 12)]
"""Documents longer than that, as long, shorter, of one token."""

# --- the choice -----------------------------------------------------------------------------------


def scored(documents: tuple[tuple[int, ...], ...], generator: torch.Generator) -> tuple:
    """Random queries, weights and keys of 32 heads, and all scores: -inf where no key is seen."""
    rows, tokens = len(documents), sum(documents[0])

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, w, k = random(rows, tokens, 32, 8), random(rows, tokens, 32), random(rows, tokens, 8)
    scores = torch.einsum("bqh,bqhk->bqk", w, torch.relu(torch.einsum("bqhd,bkd->bqhk", q, k)))
    number = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents]
    )
    seen = (number[:, :, None] == number[:, None]) & torch.ones(tokens, tokens).tril().bool()
    return q, w, k, scores.masked_fill(~seen, -torch.inf)


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_choice_is_that_of_all_scores_at_once(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tiles and blocks of keys that divide nothing, in the slices of any rank."""
    monkeypatch.setattr(indexer, "BLOCK", 5)
    monkeypatch.setattr(indexer, "TILE_NUMBERS", 32 * 5 * 7)
    q, w, k, scores = scored(tuple(LENGTHS), torch.Generator().manual_seed(0))
    finite = scores[scores > -torch.inf]
    assert len(finite.unique()) == len(finite), "equal scores, of which any may be taken"
    expected = torch.zeros_like(scores).scatter(-1, scores.topk(SEEN).indices, 1.0)
    expected[scores == -torch.inf] = 0
    blocks = [(slice(x, min(x + 11, 48)), k[:, x : x + 11]) for x in range(0, 48, 11)]
    found = torch.zeros_like(scores)
    for rank in range(ranks):
        start, count = 48 // ranks * rank, 48 // ranks
        mine = slice(start, start + count)
        chosen = choose(q[:, mine], w[:, mine], 1.0, blocks, start, tuple(LENGTHS), SEEN)
        places = torch.cat([found[:, mine], torch.zeros(2, count, 1)], dim=-1)
        found[:, mine] = places.scatter(-1, chosen.long() % 49, 1.0)[..., :48]
    assert torch.equal(found, expected)


def test_attention_to_the_chosen_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, log-sum-exp and gradients are those of explicit scores with all others hidden, and
    merge from blocks of keys of which some queries have chosen none.
    """
    monkeypatch.setitem(sparse._TILE_PAIRS, "cpu", 40)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, q, k, v, grad = 30, random(30, 6, 8), random(30, 2, 8), random(30, 2, 5), random(30, 6, 5)
    chosen = torch.stack([torch.randperm(n, generator=generator)[:4] for _ in range(n)])
    chosen = torch.where(chosen <= torch.arange(n)[:, None], chosen, -1)
    chosen[:, 0] = torch.arange(n)  # each query sees itself
    chosen[7] = torch.tensor([7, -1, -1, -1])
    for row in chosen:  # a key once
        assert (
            row[row >= 0].unique().numel() == (row >= 0).sum()
            or row.copy_(torch.tensor([row[0], -1, -1, -1])).any()
        )
    scores = Scores((n,), (n,), 0.3, chosen=chosen.int())
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    full = torch.einsum("qhd,khd->hqk", leaves[0], leaves[1].repeat_interleave(3, 1)) * 0.3
    hidden = torch.ones(n, n + 1).scatter(1, chosen % (n + 1), 0.0)[:, :n].bool()
    full = full.masked_fill(hidden, -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", full.softmax(-1), leaves[2].repeat_interleave(3, 1))
    expected.backward(grad)

    output, lse = CHOSEN.forward(q, k, v, scores)
    sums = torch.zeros_like(k), torch.zeros_like(v)
    dq = CHOSEN.backward(grad, q, k, v, output, lse, scores, dk=sums[0], dv=sums[1])
    pairs = [(output, expected), (lse, full.logsumexp(-1))]
    pairs += [*zip((dq, *sums), (x.grad for x in leaves), strict=True)]

    merged, total = torch.empty_like(output), torch.empty_like(lse)
    parts, blocks = Merged(merged.transpose(0, 1), total), [(0, 11), (11, 25), (25, 30)]
    for block in (slice(*x) for x in blocks):
        part, sum_ = CHOSEN.forward(q, k[block], v[block], scores.among(block.start))
        parts.add(slice(0, n), part.transpose(0, 1), sum_)
    parts.end()
    pairs += [(merged, expected), (total, full.logsumexp(-1))]
    dq, sums = torch.zeros_like(q), (torch.zeros_like(k), torch.zeros_like(v))
    for block in (slice(*x) for x in blocks):
        own = {"dk": sums[0][block], "dv": sums[1][block]}
        saved = output, lse, scores.among(block.start)
        dq += CHOSEN.backward(grad, q, k[block], v[block], *saved, **own)
    pairs += zip((dq, *sums), (x.grad for x in leaves), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-13)

    low = [x.bfloat16() for x in (q, k, v, output, grad)]
    sums = torch.zeros(k.shape), torch.zeros(v.shape)
    rest = lse.float(), scores
    dq = CHOSEN.backward(low[4], *low[:4], *rest, dk=sums[0], dv=sums[1])
    wanted = expected, *(x.grad for x in leaves)
    for found, x in zip((CHOSEN.forward(*low[:3], scores)[0], dq, *sums), wanted, strict=True):
        assert (found - x).abs().max() < 0.02 * x.abs().max()


def test_indices_of_rows_become_those_of_all_rows() -> None:
    chosen = torch.tensor([[[0, -1], [1, 0]], [[0, -1], [0, 1]]], dtype=torch.int32)
    scores = of_documents(((2,), (2,)), 1.0, chosen=chosen)
    assert scores.chosen.tolist() == [[0, -1], [1, 0], [2, -1], [2, 3]]


# --- whole models ---------------------------------------------------------------------------------


def steps(count: int = 3) -> list[list[list[Row]]]:
    masked = ["none", "uneven", "none"]
    return [[make_rows(LENGTHS, masked=masked[i], vocab_size=61, seed=i)] for i in range(count)]


@lru_cache
def plain(family: str) -> Record:
    return kept_in_fp64(train_plain, model_of(family), steps(), torch.float64)


WHOLE = {"stream_chunk_tokens": -1, "checkpoint_every": 1}
STREAMED = {"stream_chunk_tokens": 14, "checkpoint_every": 1}
OFF_DEVICE = {"stream_chunk_tokens": 9, "checkpoint_every": 1, "stream_offload": "host"}
CASES: list[tuple[str, tuple[int, int, int], dict[str, Any]]] = [
    ("deepseek_v32", (1, 2, 2), {**STREAMED, "keep_attention": "all"}),
]
SWEEP = [
    (family, mesh, options)
    for family in ("deepseek_v32", "glm_moe_dsa", *VERIFIED)
    if family in CONFIG_MAPPING
    for mesh in ((1, 1, 1), (1, 1, 2), (1, 1, 3), (1, 1, 4), (1, 2, 2))
    for options in (WHOLE, STREAMED, OFF_DEVICE)
]
BOUNDS = {"hy_v4": 5e-11}
"""8e-12 to 1e-11: its hyper-connections amplify rounding."""


@pytest.mark.parametrize(
    ("family", "mesh", "options"),
    # test_families has both at once, in slices and packed, on other meshes; test_trained_indexers
    # has glm_moe_dsa, whose layers share a choice, streamed off the device on three ranks.
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SWEEP],
)
def test_models_train_as_in_one_process(
    family: str, mesh: tuple[int, int, int], options: dict[str, Any]
) -> None:
    arguments = train_sharded, mesh, model_of(family), steps(), torch.float64
    ranks = mesh[0] * mesh[1] * mesh[2]
    found = run_on_ranks(ranks, kept_in_fp64, *arguments, attention="sdpa", **options)[0]
    worst = largest_difference(found, plain(family))
    bound = BOUNDS.get(family, 1e-12)
    assert max(worst.values()) < bound, {k: v for k, v in worst.items() if v >= bound}


def calls_of(lengths: list[tuple[int, ...]]) -> tuple[int, int, list[float]]:
    """Train a step, and count the calls of the indexer's scores and of the sparse core."""
    counts = {"choose": 0, "core": 0}
    kernels, chosen = CHOSEN.forward, indexer.choose

    def choose(*args: Any) -> Tensor:
        counts["choose"] += 1
        return chosen(*args)

    def core(*args: Any) -> Any:
        counts["core"] += 1
        return kernels(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexer, "choose", choose)
        object.__setattr__(CHOSEN, "forward", core)
        try:
            batches = [[make_rows(lengths, masked="none", vocab_size=61, seed=0)]]
            table = model_of("deepseek_v32")
            record = train_sharded((1, 1, 2), table, batches, torch.float64, checkpoint_every=1)
        finally:
            object.__setattr__(CHOSEN, "forward", kernels)
    return counts["choose"], counts["core"], record.losses


def choices_left(family: str, options: dict[str, Any]) -> tuple[int, int]:
    """Return how many tensors like a choice there are after forward, and after backward."""
    rows = make_rows(LENGTHS, masked="none", vocab_size=61, seed=0)
    run = Run((1, 1, 2), model_of(family), rows, wrap=options | {"attention": "sdpa"})
    loss = CrossEntropy(run.model, run.mesh)
    batch = local_batch(rows, run.mesh, run.model.sharding.stream_chunk_tokens)
    found = loss.forward(batch, loss.count([batch]))

    def choices() -> int:
        tensors = (x for x in gc.get_objects() if type(x) is Tensor and x.dtype == torch.int32)
        return sum(x.ndim == 3 and x.shape[-1] == SEEN for x in tensors)

    after_forward = choices()
    found.loss.backward()
    return after_forward, choices()  # the loss is still here, and with it its graph


# --- training the indexer -------------------------------------------------------------------------


class TopK(TorchFunctionMode):
    """Sees the scores of which an indexer takes the best."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.topk:
            self.scores = args[0]
        return func(*args, **(kwargs or {}))


def watch(plain: PreTrainedModel) -> None:
    """Let each attention layer of an unmodified model note its weights and its indexer's inputs."""
    plain.set_attn_implementation("eager")

    def note_inputs(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        module.inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in args), kwargs

    def note_weights(layer: nn.Module, args: tuple, output: tuple) -> None:
        layer.weights = output[1]

    for block in plain.model.layers:
        block.self_attn.register_forward_hook(note_weights)
        if block.self_attn.indexer is not None:
            block.self_attn.indexer.register_forward_pre_hook(note_inputs, with_kwargs=True)


def divergence(plain: PreTrainedModel, labels: Tensor) -> Tensor:
    """The KL divergence of all indexers from the attention to what they chose, from dense scores,
    summed over the tokens with a label.
    """
    total = torch.zeros((), dtype=torch.float64)
    for block in plain.model.layers:
        module = block.self_attn.indexer
        if module is None:
            continue
        args, kwargs = module.inputs
        with TopK() as seen:
            type(module).forward.__wrapped__(module, *args, **kwargs)
        p = block.self_attn.weights[0].detach().mean(dim=0)
        log_q = seen.scores[0].masked_fill(p == 0, -torch.inf).log_softmax(dim=-1)
        terms = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_q), 0).sum(dim=-1)
        total = total + terms[labels != -100].sum()
    return total


ADAPTERS = ["q_b_proj", "kv_b_proj", "o_proj"]


def add(model: PreTrainedModel) -> None:
    add_adapters(model, LoRA(rank=3, target_modules=ADAPTERS))
    unfreeze_indexers(model.model.layers)


@torch.no_grad()
def fill(model: PreTrainedModel) -> None:
    """Give adapters numbers, in B too."""
    for name, parameter in hf.named_parameters(model):
        if is_adapter(name):
            generator = torch.Generator().manual_seed(seed_of(0, name))
            shape, dtype = parameter.shape, parameter.dtype
            hf.fill(parameter, 0.3 * torch.randn(shape, generator=generator, dtype=dtype))


def add_to_nf4(model: PreTrainedModel) -> None:
    """Projections of hidden states, and half of each expert: other rows are no multiple of 64."""
    add(model)
    assert quantize_base(model.model.layers) == 2 * 2 + 2 + 3


@torch.no_grad()
def round_base(model: PreTrainedModel) -> None:
    for name, p in model.named_parameters():
        is_matrix = p.ndim > 1 and p.shape[-1] % 64 == 0 and "model.layers" in name
        if is_matrix and not p.requires_grad and not name.endswith("gate.weight"):
            dequantize(quantize(p), p)


ADAPTED = {"prepare": add, "fill": fill}
QUANTIZED = {"prepare": add_to_nf4, "fill": fill}


def table_of(family: str, prepare: Any, count: int) -> dict[str, Any]:
    wide = {"hidden_size": 64} if prepare is add_to_nf4 else {}
    return model_of(family) | wide | {"index_topk": count}


@lru_cache
def plain_trained(family: str, training: str, count: int, prepare: Any) -> Record:
    def begin(plain: PreTrainedModel) -> None:
        if prepare is add_to_nf4:
            round_base(plain)
        fill(plain)  # adapters, if there are any
        watch(plain)
        for name, parameter in plain.named_parameters():
            if training == "warmup":
                parameter.requires_grad_(".indexer." in name)

    table = table_of(family, prepare, EVERY if training == "warmup" else count)
    how = {"prepare": prepare and add, "fill": begin, "more": divergence}
    return kept_in_fp64(train_plain, table, steps(), torch.float64, **how)


@pytest.mark.parametrize(
    ("family", "mesh", "options", "training", "count"),
    [
        ("deepseek_v32", (1, 1, 2), STREAMED | QUANTIZED, "joint", SEEN),
        ("deepseek_v32", (1, 1, 3), WHOLE, "joint", EVERY),
        ("glm_moe_dsa", (1, 1, 3), OFF_DEVICE, "joint", SEEN),
        ("deepseek_v32", (1, 2, 2), STREAMED | ADAPTED, "warmup", SEEN),
    ]
    + [
        pytest.param("deepseek_v32", (1, 1, 2), *case, SEEN, marks=pytest.mark.slow)
        for case in product(
            (WHOLE | ADAPTED, STREAMED | ADAPTED, WHOLE | QUANTIZED, STREAMED | QUANTIZED),
            ("warmup", "joint"),
        )
    ]
    + [
        pytest.param(*case, training, SEEN, marks=pytest.mark.slow)
        for case in SWEEP
        if case[0] in ("deepseek_v32", "glm_moe_dsa")
        for training in ("warmup", "joint")
    ],
)
def test_trained_indexers(
    family: str, mesh: tuple[int, int, int], options: dict[str, Any], training: str, count: int
) -> None:
    """Every gradient, of indexers and of the others, is that of dense scores in one process."""
    table = table_of(family, options.get("prepare"), count)
    arguments = train_sharded, mesh, table, steps(), torch.float64
    options = options | {"attention": "sdpa", "indexer": training}
    found = run_on_ranks(math.prod(mesh), kept_in_fp64, *arguments, **options)[0]
    expected = plain_trained(family, training, count, options.get("prepare"))
    trained = [".indexer." in name for name in expected.gradients[0]]
    assert any(trained) and all(trained) == (training == "warmup")
    if "prepare" in options:  # and with QUANTIZED, beside the same rounded weights
        assert all(".indexer." in x or is_adapter(x) for x in expected.gradients[0])
    worst = largest_difference(found, expected)
    assert max(worst.values()) < 1e-12, {k: v for k, v in worst.items() if v >= 1e-12}


def test_peft_opens_adapters_with_the_trained_indexers(tmp_path: Path) -> None:
    from peft import PeftModel

    table = model_of("deepseek_v32")
    bases = [plain_model(table, torch.float32, experts=None) for _ in range(2)]
    for base in bases:
        hf.initialize(base, seed=3)
    model, base = bases
    add(model)
    fill(model)
    ids = torch.arange(48)[None] % 61
    before = model(input_ids=ids).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".indexer." in name:
                parameter.copy_(parameter.flip(0) + 0.1)
    save_adapters(model, tmp_path / "adapter", base="")
    found = PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids=ids).logits
    assert torch.equal(found, model(input_ids=ids).logits)
    assert not torch.allclose(found, before, rtol=1e-3)


def two_stages(folder: Path) -> None:
    """By TOML: a warm-up; from its export the joint stage, at once, in two runs, and by adapters of
    a base in NF4.
    """
    table = {
        **table_of("deepseek_v32", add_to_nf4, SEEN),
        "vocab_size": 257,
        "max_position_embeddings": 128,
    }
    common: Settings = {
        "model.config": table,
        "parallelism.sequence_parallel_degree": 2,
        "training.global_batch_size": 2,
        "memory.stream_chunk_tokens": 8,
        "optimizer.lr": 1e-2,
        "loss.indexer": "warmup",
        "training.steps": 6,
        "lr_scheduler.warmup_steps": 1,
        "job.name": "warmup",
        "checkpoint.export": True,
    }
    train(folder / "run.toml", common)
    export = str(folder / "outputs" / "warmup" / "export")
    joint = common | {"model.config": None, "model.path": export, "model.tokenizer": "bytes"}
    joint |= {
        "loss.indexer": "joint",
        "checkpoint.interval": 2,
        "lr_scheduler.decay_type": "constant",
    }
    train(folder / "run.toml", joint | {"job.name": "whole", "training.steps": 4})
    for steps in (2, 4):
        train(folder / "run.toml", joint | {"job.name": "resumed", "training.steps": steps})
    adapters = {"lora.rank": 3, "lora.quantize_base": "nf4", "lora.target_modules": ADAPTERS}
    train(folder / "run.toml", joint | adapters | {"job.name": "nf4", "training.steps": 4})


@pytest.mark.slow  # test_every_key runs both settings, and the gradients are compared above
def test_a_warm_up_and_a_joint_stage_by_toml(tmp_path: Path) -> None:
    write_run(tmp_path)
    run_on_ranks(2, two_stages, tmp_path)
    warmup, whole, resumed = (
        logged(tmp_path / "outputs" / name) for name in ("warmup", "whole", "resumed")
    )
    losses = [line["indexer_loss"] for line in warmup]
    assert 0 < losses[-1] < 0.8 * losses[0]
    assert [line["indexer_loss_by_layer"].keys() for line in warmup] == [{"0", "1"}] * 6
    for name in ("loss", "grad_norm", "indexer_loss"):
        assert [line[name] for line in resumed] == [line[name] for line in whole], name
    adapted = logged(tmp_path / "outputs" / "nf4")
    assert adapted[0]["indexer_loss"] == pytest.approx(whole[0]["indexer_loss"], rel=0.1)
    assert adapted[-1]["indexer_loss"] < adapted[0]["indexer_loss"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "outputs" / "whole" / "export")
    assert model.config.model_type == "deepseek_v32"


# --- mistakes that these tests must find ----------------------------------------------------------


def slice_for_sequence(patch: pytest.MonkeyPatch) -> None:
    """Indices count the tokens of a rank's slice."""
    own = indexer.choose
    patch.setattr(
        indexer,
        "choose",
        lambda q, w, s, blocks, start, documents, count: torch.where(
            (found := own(q, w, s, blocks, start, documents, count)) < 0, -1, found - start
        ),
    )


def another_document(patch: pytest.MonkeyPatch) -> None:
    """A row is one document to the indexer."""
    own = indexer.choose
    patch.setattr(
        indexer,
        "choose",
        lambda q, w, s, blocks, start, documents, count: own(
            q, w, s, blocks, start, tuple((sum(row),) for row in documents), count
        ),
    )


def later_keys(patch: pytest.MonkeyPatch) -> None:
    """Keys after the query count."""
    own = indexer._merge
    patch.setattr(
        indexer,
        "_merge",
        lambda best, found, scores, tile, part: own(
            best, found, scores, slice(part.stop, part.stop + len(scores)), part
        ),
    )


def a_rank_is_missed(patch: pytest.MonkeyPatch) -> None:
    """The keys of a rank's tokens get no gradient of the queries of another rank's."""
    backward = CHOSEN.backward

    def without(*args: Any, **sums: Tensor) -> Tensor:
        *others, scores = args
        count, half = sum(LENGTHS[0]), sum(LENGTHS[0]) // 2
        late = (torch.arange(len(scores.chosen)) % count >= half)[:, None]
        far = late & (scores.chosen % count < half)
        return backward(*others, replace(scores, chosen=scores.chosen.where(~far, -1)), **sums)

    object.__setattr__(CHOSEN, "backward", without)  # put back by `losses_with`


MISTAKES = [slice_for_sequence, another_document, later_keys, a_rank_is_missed]


def losses_with(mistake: Callable[[pytest.MonkeyPatch], None] | None) -> Record:
    kernels = CHOSEN.backward
    with pytest.MonkeyPatch.context() as patch:
        if mistake is not None:
            mistake(patch)
        try:
            options = {"checkpoint_every": 1, "stream_chunk_tokens": -1, "attention": "sdpa"}
            return kept_in_fp64(
                train_sharded,
                (1, 1, 2),
                model_of("deepseek_v32"),
                steps(1),
                torch.float64,
                **options,
            )
        finally:
            object.__setattr__(CHOSEN, "backward", kernels)


def several(*_: Any) -> Any:
    records = [losses_with(mistake) for mistake in (None, *MISTAKES)]
    left = [
        choices_left("deepseek_v32", WHOLE | {"indexer": "joint"}),
        choices_left("glm_moe_dsa", STREAMED | {"indexer": "joint"}),
    ]
    return records, left, calls_of([(SEEN, 3, 1), (2, 2, SEEN)]), calls_of([(SEEN + 1, 3), (4, 4)])


def test_mistakes_short_documents_and_what_is_kept() -> None:
    (right, *wrong), left, dense, sparse_ = run_on_ranks(2, several)[0]
    expected = plain("deepseek_v32")
    expected = Record(expected.losses[:1], expected.grad_norms[:1], expected.gradients[:1])
    right.parameters = {}
    assert max(largest_difference(right, expected).values()) < 1e-12
    for mistake, record in zip(MISTAKES, wrong, strict=True):
        record.parameters = {}
        assert max(largest_difference(record, expected).values()) > 1e-6, mistake.__doc__
    # Two layers of glm_moe_dsa share a choice, which is the only one that waits for backward.
    assert left == [(0, 0), (1, 0)]
    assert dense[:2] == (0, 0)
    assert min(sparse_[:2]) > 0


def test_other_indexers_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherIndexer(torch.nn.Module):
        """Without what DeepSeek-V3.2's has."""

    blocks = "minimax_m3_vl_text"  # it says how its indexer chooses, too
    if blocks in CONFIG_MAPPING:
        config = CONFIG_MAPPING[blocks](num_hidden_layers=1, layer_types=["minimax_m3_sparse"])
        with pytest.raises(UserError, match="chooses blocks of keys, others for each KV head"):
            check_family(config)
    config = hf.load_model_config("", model_of("deepseek_v32"))
    check_family(config)
    model = hf.build_on_meta(config, torch.float32)
    model.model.layers[1].self_attn.indexer = OtherIndexer()
    monkeypatch.setattr(families, "build_on_meta", lambda *_: model)
    with pytest.raises(UserError, match="layers of type indexed_attention, as in Deepseek"):
        check_family(config)
