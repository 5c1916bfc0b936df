"""Every key of the schema through the front door: what a run does with it that it does not do at
the key's default.

`EFFECTS` has a case or more for each key. A case is run twice, for two steps of `Trainer` (a key of
[plan] by `train.py --plan`): with the key at `value`, and with the key at its default, both with
what else the case `needs`. `effect(run, default)` must hold of the first run, and `effect(default,
default)` must not. That config.toml names the key is no effect.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
import torch
from torch import Tensor

from helpers.families import model_of
from helpers.material import BASE, MODEL, as_toml
from helpers.observed import (
    Observer,
    Seen,
    begins_with_export,
    bytes_of,
    computed,
    labels,
    losses,
    material_of,
    moved_bytes,
    near,
    norms,
    numbers,
    same_weights,
    tokens,
)
from helpers.pictures import QWEN3_VL
from helpers.runs import Settings
from helpers.vision import vision_model_of
from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import KEYS
from titan_ulysses.launch.run_store import host_name
from titan_ulysses.observability.profiling import profiled

EMBEDDING, SILU = "model.embed_tokens.weight", "aten::silu"
ATTEND = "aten::_scaled_dot_product_flash_attention_for_cpu"


Effect = Callable[[Seen, Seen], bool]
"""Of a run with the key, and the same run without."""


class Case(NamedTuple):
    value: Any
    effect: Effect
    needs: Settings = {}
    same: bool = False
    """whether losses and gradient norms must be those of the other run"""
    ranks: int = 1
    watch: str = ""
    """see `observed.see`"""
    slow: bool = False
    """seconds, many of them: left to --slow"""


# --- what a run can be asked ----------------------------------------------------------------------


def wrote(path: str) -> Effect:
    return lambda run, _: any(file == path or file.startswith(f"{path}/") for file in run.files)


def said(text: str) -> Effect:
    return lambda run, _: text in run.said


def refused(*words: str) -> Effect:
    return lambda run, _: all(word in run.refused for word in words)


def logs(name: str, value: Any) -> Effect:
    """That a metric of each logged step is this."""
    return lambda run, _: near(run.of_steps(name), value)


def fewer_tokens(run: Seen, default: Seen) -> bool:
    return 0 < tokens(run) < tokens(default)


def steps_kept(run: Seen) -> set[str]:
    return {part for file in run.files for part in file.split("/") if part.startswith("step-")}


def manifest(run: Seen) -> dict[str, Any]:
    """run.json of the last checkpoint."""
    return json.loads((run.folder / "outputs/run/checkpoints/step-2/run.json").read_text())


def traced_steps(run: Seen) -> int:
    """How many optimizer steps are in the trace that ends with step 2."""
    file = run.folder / "outputs/run/profile_traces/step-2/rank0_trace.json"
    trace = json.loads(file.read_text()) if file.exists() else {"traceEvents": []}
    return sum(event.get("name") == "Optimizer.step#AdamW.step" for event in trace["traceEvents"])


def own_core(q: Tensor, k: Tensor, v: Tensor, *, documents: Any, scale: float) -> Tensor:
    """A core of the user's own: each query takes the mean of all values of its row."""
    return (
        v.mean(dim=1, keepdim=True)
        .repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        .expand(q.shape)
    )


def nan_core(q: Tensor, k: Tensor, v: Tensor, *, documents: Any, scale: float) -> Tensor:
    return own_core(q, k, v, documents=documents, scale=scale) * float("nan")


# --- the table ------------------------------------------------------------------------------------

# How data is told to be read, and how many of its tokens are trained on: a document is a sequence,
# so none is lost.
COUNTED: Settings = {
    "data.packing": "none",
    "training.seq_len": 256,
    "validation.enable": True,
    "validation.steps": 0,
}
TOKENS = "$MATERIAL/tokens.jsonl"
RECORDS: Settings = {"data.source": "jsonl", "data.path": "$MATERIAL/records.jsonl"}
HELD_OUT_RECORDS: Settings = RECORDS | COUNTED | {"validation.path": "$MATERIAL/records.jsonl"}
CHATS: Settings = COUNTED | {"data.source": "chat", "data.path": "$MATERIAL/chats.jsonl"}
CHATS |= {"model.tokenizer": "$MATERIAL/pairs", "validation.path": "$MATERIAL/chats.jsonl"}
NAMES = {"content": "text", "role": "author"}
PICTURES: Settings = {
    "model.config": QWEN3_VL,
    "model.tokenizer": "$MATERIAL/pictures",
    "model.vision": "train",
    "data.source": "chat",
    "data.path": "$MATERIAL/pictures/chats.jsonl",
    "data.packing": "none",
    "training.seq_len": 256,
}
DATASET: Settings = {"data.source": "hf", "data.path": "$MATERIAL/dataset"}
PRETRAINED: Settings = {"model.config": None, "model.path": "$MATERIAL/earlier/run/export"}
LORA: Settings = {"lora.rank": 4, "optimizer.lr": 1e-2}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 32, "head_dim": 16}
PAIRS: Settings = {
    "data.source": "preference",
    "data.path": "$MATERIAL/pairs.jsonl",
    "data.packing": "none",
    "training.seq_len": 256,
}
DPO: Settings = PAIRS | {"loss.name": "dpo"}
JUDGED: Settings = PAIRS | {"data.source": "unpaired", "data.path": "$MATERIAL/judged.jsonl"}
KTO: Settings = JUDGED | {"loss.name": "kto"}
TEACHER: Settings = {"loss.name": "distillation", "loss.teacher": "$MATERIAL/earlier/run/export"}
TAUGHT: Settings = {
    "loss.name": "distillation",
    "data.source": "tokens",
    "data.path": "$MATERIAL/taught.jsonl",
    "data.packing": "none",
}
INDEXED: Settings = {"model.config": {**model_of("deepseek_v32"), "vocab_size": 257}}
SAVED: Settings = {"checkpoint.enable": None}
VALIDATED: Settings = {"validation.enable": True}
TRACED: Settings = {
    "profiling.enable_profiling": True,
    "profiling.profile_freq": 2,
    "profiling.profiler_warmup": 1,
}
SLOW_ADAM: Settings = {
    "optimizer.eps": 1.0,
    "optimizer.weight_decay": 0.0,
    "lr_scheduler.decay_type": "constant",
}
"""AdamW whose update is the gradient itself, so that its size is seen."""
# One layer and one tile: a simulation of a fraction of a second, of which a plan has three.
PLAN: Settings = {
    "training.seq_len": 1024,
    "model.config": MODEL | {"num_hidden_layers": 1, "max_position_embeddings": 2**27},
    "plan.gpu_memory_gib": 2.0,  # so that no plans of very long sequences are needed
}
REPLICATED: Settings = {"parallelism.data_parallel_replicate_degree": 2}
PLAN_OF_TWO: Settings = PLAN | {"parallelism.sequence_parallel_degree": 2}
SMALL_GPU: Settings = PLAN | {
    "plan.gpu_memory_gib": 0.7,
    "activation_checkpoint.offload": "host",
}


JOB = {
    "job.name": [Case("other", wrote("outputs/other/metrics.jsonl"))],
    "job.dump_folder": [Case("elsewhere", wrote("elsewhere/run/metrics.jsonl"))],
}
# Its special tokens are no bytes.
VISION_MODEL = vision_model_of("qwen3_vl")
VISION_MODEL["text_config"] = VISION_MODEL["text_config"] | {"vocab_size": 264}
VISION_MODEL |= {name: 257 + i for i, name in enumerate(n for n in VISION_MODEL if "token_id" in n)}
MODELS = {
    "model.path": [
        Case(
            "$MATERIAL/earlier/run/export",
            lambda run, _: begins_with_export(run),
            {"model.config": None},
        )
    ],
    "model.config": [
        Case(MODEL, said("LlamaForCausalLM, "), {"model.config": None}),
        Case(MODEL | {"model_type": "qwen3", "head_dim": 16}, said("Qwen3ForCausalLM, ")),
    ],
    "model.tokenizer": [
        Case("bytes", lambda run, _: f"{bytes_of(run, 'texts'):,} tokens" in run.said, PRETRAINED),
    ],
    "model.attention": [
        Case("sdpa", said("\nattention: sdpa\n"), same=True),
        Case("test_every_key:own_core", said("\nattention: test_every_key:own_core\n")),
        Case(
            "test_every_key:own_core", lambda run, default: not near(losses(run), losses(default))
        ),
        *(
            Case(core, refused(f'model.attention = "{core}"', "CUDA"))
            for core in ("varlen", "flash", "flex")
        ),
    ],
    "model.rope_scaling": [
        Case(
            {"rope_type": "linear", "factor": 2.0},
            lambda run, default: not near(losses(run)[0], losses(default)[0]),
        ),
        Case(
            {"rope_type": "yarn", "factor": 4.0},
            lambda run, _: len(losses(run)) == 2,
            {"model.config": MODEL | {"max_position_embeddings": 8}},
        ),
    ],
    "model.resize_embeddings": [
        Case(
            64,
            lambda run, _: not run.refused and run.weights[EMBEDDING].shape[0] == 320,
            {"model.config": MODEL | {"vocab_size": 200}},
        )
    ],
    "model.vision": [
        Case("frozen", said(" are trained"), {"model.config": VISION_MODEL}),
        Case(
            "train",
            lambda run, _: "ConditionalGeneration" in run.said and "are trained" not in run.said,
            {"model.config": VISION_MODEL},
        ),
    ],
    "model.freeze": [Case(["model.embed_tokens.*"], lambda run, _: run.kept() == {EMBEDDING})],
    "lora.rank": [
        Case(
            4, lambda run, _: 0 < len(run.kept()) == sum("lora" not in name for name in run.initial)
        ),
        Case(
            4, wrote("outputs/run/adapter/adapter_model.safetensors"), {"checkpoint.export": None}
        ),
    ],
    "lora.alpha": [
        Case(32.0, lambda run, default: near(norms(run)[0], 2 * norms(default)[0]), LORA)
    ],
    "lora.dropout": [
        # B is 0 at first: what is dropped shows in its gradient, and not yet in the loss.
        Case(
            0.5,
            lambda run, default: (
                near(losses(run)[0], losses(default)[0]) and not near(norms(run), norms(default))
            ),
            LORA,
        )
    ],
    "lora.quantize_base": [
        # 4 bits are near the weights, and are not the weights.
        Case(
            "nf4",
            lambda run, default: (
                losses(run) == pytest.approx(losses(default), rel=0.05)
                and not near(losses(run), losses(default))
            ),
            LORA,
        ),
        Case("nf4", said("lora.quantize_base: 14 weights of "), LORA),
        # This folder is not quantized: test_released.py trains those that are.
        Case("released", refused('lora.quantize_base = "released"', "not quantized"), LORA),
    ],
    "lora.target_modules": [
        Case(
            ["q_proj"],
            lambda run, _: {n.split(".")[-4] for n in run.initial if "lora" in n} == {"q_proj"},
            LORA,
        )
    ],
    "lora.target_parameters": [
        Case(
            ["experts.down_proj"],
            lambda run, _: {n.split(".")[-4] for n in run.initial if "lora" in n} == {"experts"},
            LORA | {"model.config": MODEL | EXPERTS},
        )
    ],
    "lora.use_rslora": [
        Case(True, lambda run, default: near(norms(run)[0], 2 * norms(default)[0]), LORA)
    ],
    "lora.use_dora": [
        Case(
            True, lambda run, _: any("lora_magnitude_vector" in name for name in run.initial), LORA
        )
    ],
}
DATA = {
    "data.source": [
        Case("jsonl", said("data: 12 document(s)"), {"data.path": "$MATERIAL/mixed"}),
        Case("hf", said("data: 9 document(s)"), {"data.path": "$MATERIAL/dataset"}),
        Case("chat", said("data: 6 document(s)"), CHATS),
        Case("preference", said("data: 8 document(s)"), DPO),
        Case("unpaired", said("data: 8 document(s)"), KTO),
        Case(
            "tokens",
            lambda run, _: tokens(run) == 12 * len("the text\n") and labels(run) == 12 * 4,
            COUNTED | {"data.path": TOKENS, "validation.path": TOKENS},
        ),
    ],
    "data.teacher_top_k": [
        Case(2, said("of the divergence from a teacher's log-probabilities in the data"), TAUGHT),
        Case(1, refused("taught.jsonl:1: teacher_ids[5] has 2 entries"), TAUGHT),
    ],
    "data.path": [Case("$MATERIAL/texts", said("data: 20 document(s)"))],
    "data.extensions": [Case([".md"], said("data: 2 document(s)"))],
    "data.encoding": [
        Case(
            "latin-1",
            lambda run, _: f"{bytes_of(run, 'latin') + 80:,} tokens" in run.said,
            {"data.path": "$MATERIAL/latin"},
        ),
        Case(
            "bytes",
            lambda run, _: f"{bytes_of(run, 'latin'):,} tokens" in run.said,
            {"data.path": "$MATERIAL/latin"},
        ),
    ],
    "data.text_field": [
        Case("body", lambda run, _: labels(run) == 12 * len("another text"), HELD_OUT_RECORDS)
    ],
    "data.prompt_field": [
        Case(
            "q",
            lambda run, _: labels(run) == 12 * len("1234\n"),
            HELD_OUT_RECORDS | {"data.completion_field": "a"},
        )
    ],
    "data.completion_field": [
        Case(
            "a",
            lambda run, _: labels(run) == 12 * len("1234\n"),
            HELD_OUT_RECORDS | {"data.prompt_field": "q"},
        )
    ],
    "data.chosen_field": [
        Case(
            "best", lambda run, default: run.of_steps("rewards") != default.of_steps("rewards"), DPO
        )
    ],
    "data.rejected_field": [
        Case(
            "best", lambda run, default: run.of_steps("rewards") != default.of_steps("rewards"), DPO
        )
    ],
    "data.label_field": [
        Case("good", lambda run, default: norms(run)[0] > 0 and losses(run) != losses(default), KTO)
    ],
    "data.messages_field": [
        Case("conversation", lambda run, default: labels(run) > 1.5 * labels(default), CHATS)
    ],
    "data.message_fields": [
        Case(
            NAMES,
            said("data: 6 document(s)"),
            CHATS | {"data.messages_field": "turns", "data.roles": {"agent": "assistant"}},
        )
    ],
    "data.roles": [
        Case(
            {"agent": "assistant"},
            said("data: 6 document(s)"),
            CHATS | {"data.messages_field": "turns", "data.message_fields": NAMES},
        )
    ],
    "data.tools_field": [
        Case("functions", lambda run, default: tokens(run) > tokens(default), CHATS)
    ],
    "data.train_on": [
        Case(
            "last",
            lambda run, default: 0 < labels(run) < labels(default),
            CHATS | {"data.messages_field": "conversation"},
        ),
        Case(
            "all",
            lambda run, default: tokens(run) == tokens(default) and labels(run) > labels(default),
            CHATS,
        ),
        Case(
            "all",
            lambda run, _: labels(run) == 12 * len("what is it? 1234"),
            HELD_OUT_RECORDS | {"data.prompt_field": "q", "data.completion_field": "a"},
        ),
    ],
    "data.subset": [
        Case("other", said("data: 5 document(s)"), DATASET | {"data.path": "$MATERIAL/subsets"})
    ],
    "data.split": [Case("rest", said("data: 4 document(s)"), DATASET)],
    "data.streaming": [Case(True, said("data: streamed"), DATASET)],
    "data.bad_lines": [
        Case("skip", said("1 bad line(s) skipped"), RECORDS | {"data.path": "$MATERIAL/bad.jsonl"})
    ],
    "data.mixture": [
        Case(
            [
                {"path": "$MATERIAL/texts", "weight": 3.0},
                {"path": "$MATERIAL/records.jsonl", "source": "jsonl", "weight": 1.0},
            ],
            lambda run, _: (
                "data: a mixture of 2\n0.75 of " in run.said and len(run.of_steps("epoch")[0]) == 2
            ),
            {"data.path": None},
        )
    ],
    "data.packing": [
        Case("none", said("a sequence each")),
        Case("best_fit", said("best fit")),
    ],
    "data.long_documents": [Case("drop", said("longer than 32 tokens left out"))],
    "data.max_pixels": [Case(100, fewer_tokens, PICTURES)],
    "data.video_fps": [Case(1.0, fewer_tokens, PICTURES)],
    "data.max_frames": [Case(3, fewer_tokens, PICTURES)],
    "data.cache_folder": [
        Case("kept", lambda run, _: any(f.startswith("kept/") for f in run.files), watch="cache")
    ],
}
TRAINING = {
    "training.seq_len": [Case(64, logs("tokens", [64, 128]))],
    "training.local_batch_size": [Case(2, logs("tokens", [64, 128]))],
    "training.global_batch_size": [Case(2, said("2 sequence(s) a step (2 accumulated)"))],
    "training.steps": [
        Case(3, lambda run, _: len(losses(run)) == 3 and "\nDone: 3 steps." in run.said)
    ],
    "training.epochs": [
        Case(
            0.25,
            said("training.epochs = 0.25: 5 step(s)"),
            COUNTED | {"training.steps": 9, "data.path": "$MATERIAL/texts"},
        )
    ],
    "training.max_hours": [
        Case(1e-9, said("training.max_hours = 1e-09 are over: stopped after step 0."))
    ],
    "training.seed": [
        Case(1, lambda run, default: not run.initial[EMBEDDING].equal(default.initial[EMBEDDING])),
        Case(
            1,
            lambda run, default: losses(run)[0] != losses(default)[0] and begins_with_export(run),
            PRETRAINED,
        ),
    ],
    "training.max_norm": [
        Case(1e-3, lambda run, default: 1e-4 < run.moved() / default.moved() < 1e-2, SLOW_ADAM),
        Case(0.0, lambda run, default: run.moved() > 1.5 * default.moved(), SLOW_ADAM),
        Case(float("inf"), lambda run, default: run.moved() > 1.5 * default.moved(), SLOW_ADAM),
    ],
    "training.param_dtype": [
        Case(
            "float32",
            lambda run, default: (
                moved_bytes(run, "all_gather") == 2 * moved_bytes(default, "all_gather")
            ),
            ranks=2,
        ),
        Case(
            "float64",
            lambda run, _: not run.refused and run.weights[EMBEDDING].dtype == torch.float64,
            {"training.reduce_dtype": "float64"},
        ),
    ],
    "training.reduce_dtype": [
        Case(
            dtype,
            lambda run, default, times=times: near(
                moved_bytes(run, "reduce_scatter"), times * moved_bytes(default, "reduce_scatter")
            ),
            ranks=2,
        )
        for dtype, times in {"bfloat16": 0.5, "float64": 2.0}.items()
    ],
    "training.z_loss": [
        Case(
            0.01,
            lambda run, default: (
                losses(run)[0] > 1.01 * losses(default)[0]
                and run.of_validations("loss")[0] == default.of_validations("loss")[0]
            ),
            VALIDATED,
        )
    ],
    "training.skip_nonfinite": [
        Case(2, logs("skipped_steps", [1, 2]), {"model.attention": "test_every_key:nan_core"})
    ],
    "training.deterministic": [Case(True, lambda run, _: run.facts["deterministic"])],
    "parallelism.data_parallel_replicate_degree": [
        Case(
            2,
            lambda run, default: (
                "mesh: dp_replicate 2 x dp_shard 1 x sp 1 " in run.said
                and moved_bytes(run, "all_reduce")
                > 4 * numbers(run)
                > moved_bytes(default, "all_reduce")
            ),
            ranks=2,
            same=True,
        )
    ],
    "parallelism.data_parallel_shard_degree": [
        Case(2, refused("dp_shard(2) x sp(1) = 2 is not WORLD_SIZE(1): start 2 ranks")),
        Case(
            1,
            said("dp_replicate 2 x dp_shard 1"),
            {"parallelism.data_parallel_replicate_degree": -1},
            ranks=2,
        ),
    ],
    "parallelism.sequence_parallel_degree": [
        Case(
            2,
            lambda run, _: (
                "32 tokens a sequence, 16 a rank" in run.said and moved_bytes(run, "all_to_all") > 0
            ),
            ranks=2,
        )
    ],
    "comm.timeout_s": [
        Case(77.0, lambda run, _: run.facts["timeouts"] == {77.0}, REPLICATED, ranks=2),
    ],
    "comm.startup_timeout_s": [
        Case(77.0, lambda run, _: run.facts["startup_timeouts"] == {77.0}, REPLICATED, ranks=2)
    ],
}
LOSS = {
    "loss.name": [
        Case("dpo", said("loss: DPO of pairs of completions, beta 0.1"), PAIRS),
        *(
            Case(name, said(f"loss: {word} of pairs of completions, beta 0.1{more}"), PAIRS)
            for name, word, more in (
                ("ipo", "IPO", ", reference: "),
                ("simpo", "SimPO", ", gamma 0.5, without a reference"),
                ("orpo", "ORPO", ", without a reference"),
            )
        ),
        Case(
            "reward",
            lambda run, _: (
                "loss: Bradley-Terry of pairs of completions" in run.said
                and "opens with AutoModelForSequenceClassification." in run.said
            ),
            PAIRS | {"checkpoint.export": None},
        ),
        Case("kto", said("loss: KTO of completions, each good or bad, beta 0.1"), JUDGED),
        Case("distillation", said("loss: 1 of the divergence from "), TEACHER),
    ],
    "loss.indexer": [
        Case(
            "warmup",
            lambda run, _: run.kept() == {x for x in run.initial if ".indexer." not in x},
            INDEXED,
        ),
        Case(
            "joint",  # with adapters; without them in test_sparse.py
            lambda run, _: (
                run.kept()
                == {x for x in run.initial if not {"indexer", "lora_A", "lora_B"} & {*x.split(".")}}
            ),
            INDEXED | LORA | {"lora.target_modules": ["o_proj"], "checkpoint.export": None},
        ),
    ],
    "loss.prediction_weight": [
        Case(
            0.5,
            lambda run, default: near(
                losses(run)[0],
                losses(default)[0] + 0.5 * (run.of_steps("prediction_loss")[0] or 1),
            ),
            {"model.config": {**model_of("deepseek_v3"), "vocab_size": 257}},
        )
    ],
    "loss.label_smoothing": [
        Case(0.5, lambda run, default: not near(losses(run), losses(default))),
        Case(0.5, lambda run, default: norms(run)[0] < 0.1 * norms(default)[0], DPO),
    ],
    "loss.simpo_gamma": [
        Case(
            2.0,
            lambda run, default: losses(run)[0] > losses(default)[0],
            PAIRS | {"loss.name": "simpo"},
        )
    ],
    "loss.center_rewards_coefficient": [
        Case(
            0.5,
            lambda run, default: losses(run)[0] > losses(default)[0],
            PAIRS | {"loss.name": "reward"},
        )
    ],
    "loss.desirable_weight": [
        Case(2.0, lambda run, default: near(losses(run)[0], 2 * losses(default)[0]), KTO)
    ],
    "loss.undesirable_weight": [
        Case(
            2.0,
            lambda run, default: near(losses(run)[0], 2 * losses(default)[0]),
            KTO | {"data.label_field": "good"},
        )
    ],
    "loss.beta": [
        Case(
            0.2,
            lambda run, default: (
                near(losses(run)[0], losses(default)[0])
                and near(norms(run)[0], 2 * norms(default)[0])
            ),
            DPO,
        )
    ],
    "loss.reference": [
        Case(
            "$MATERIAL/earlier/run/export",
            lambda run, _: abs(run.of_steps("rewards")[0]["margins"]) > 1e-3,
            DPO,
        )
    ],
    "loss.precompute_reference": [
        Case(True, said("reference's log-probabilities of 8 pair(s)"), DPO, same=True),
    ],
    "loss.teacher": [
        Case(
            "$MATERIAL/earlier/run/export",
            said("loss: 1 of the divergence from "),
            {"loss.name": "distillation"},
        )
    ],
    "loss.temperature": [
        Case(2.0, lambda run, default: not near(losses(run), losses(default)), TEACHER)
    ],
    "loss.teacher_share": [
        Case(0.5, lambda run, default: not near(losses(run), losses(default)), TEACHER)
    ],
}
MEMORY = {
    "activation_checkpoint.mode": [
        Case(
            "none",
            lambda run, default: computed(run, SILU) < computed(default, SILU),
            same=True,
            watch="operators",
        )
    ],
    "activation_checkpoint.every": [
        Case(
            2,
            lambda run, default: computed(run, SILU) > computed(default, SILU),
            same=True,
            watch="operators",
        )
    ],
    "activation_checkpoint.offload": [
        Case("host", lambda run, _: run.facts["buffers"] == 2 * [4 * 32 * 64], same=True),
        Case("disk", lambda run, _: len(run.facts["mapped"]) == 2, same=True),
    ],
    "activation_checkpoint.keep_attention": [
        Case(
            "all",
            lambda run, default: 2 * computed(run, ATTEND) == computed(default, ATTEND) > 0,
            {"memory.stream_chunk_tokens": 8},
            same=True,
            watch="operators",
        ),
        Case(
            "auto",
            lambda run, default: len(run.facts["buffers"]) > len(default.facts["buffers"]),
            {"memory.stream_chunk_tokens": 8, "activation_checkpoint.offload": "host"},
            same=True,
        ),
        Case("auto", said('activation_checkpoint.keep_attention = "auto" has no effect')),
    ],
    "activation_checkpoint.offload_folder": [
        Case(
            "$MATERIAL",
            lambda run, _: set(run.facts["mapped"]) == {str(material_of(run))},
            {"activation_checkpoint.offload": "disk"},
            same=True,
        ),
        Case(
            "nowhere",
            refused("activation_checkpoint.offload_folder = nowhere"),
            {"activation_checkpoint.offload": "disk"},
        ),
    ],
    "memory.loss_tile_tokens": [
        Case(
            5,
            lambda run, _: computed(run, "aten::_log_softmax", rows=5) > 0,
            same=True,
            watch="operators",
        )
    ],
    "memory.mlp_tile_tokens": [
        Case(7, lambda run, _: computed(run, SILU, rows=7) > 0, same=True, watch="operators"),
        Case(
            7,
            lambda run, _: computed(run, SILU, rows=7) > 0,
            {"activation_checkpoint.mode": "none"},
            watch="operators",
        ),
    ],
    "memory.stream_chunk_tokens": [
        Case(10, said("\nstreamed: 4 chunks of 10 tokens, 10 a rank"), same=True),
        Case(
            9,
            said("\nstreamed: 4 chunks of 10 tokens (memory.stream_chunk_tokens = 9), 5 a rank"),
            {"parallelism.sequence_parallel_degree": 2},
            ranks=2,
            same=True,
        ),
        Case(99, said("memory.stream_chunk_tokens = 99 is not less than training.seq_len = 32")),
        Case(
            8,
            refused("memory.stream_chunk_tokens = 8", 'activation_checkpoint.mode = "none"'),
            {"activation_checkpoint.mode": "none"},
        ),
        Case(
            8,
            refused("memory.stream_chunk_tokens = 8: the core own_core has no `pieces`"),
            {"model.attention": "test_every_key:own_core"},
        ),
    ],
    "memory.stream_offload": [
        Case(
            "host", said("; hidden states in host memory"), {"memory.stream_chunk_tokens": 8}, True
        ),
        Case(
            "disk",
            lambda run, _: set(run.facts["mapped"]) == {str(material_of(run))},
            {
                "memory.stream_chunk_tokens": 8,
                "activation_checkpoint.offload_folder": "$MATERIAL",
            },
            same=True,
        ),
        Case(
            "disk",
            refused('memory.stream_offload = "disk" needs layers'),
            {"memory.stream_chunk_tokens": "off"},
        ),
        Case("disk", said('memory.stream_offload = "disk" has no effect')),
    ],
    "memory.parameter_offload": [
        Case(True, said("memory.parameter_offload has no effect: the device is the CPU"), same=True)
    ],
    "memory.optimizer_offload": [
        Case(True, said("memory.optimizer_offload has no effect: the device is the CPU"), same=True)
    ],
    "compile.enable": [
        # Also in test_compile.py and test_together.py.
        Case(True, lambda run, _: run.facts["graphs"] >= 2, same=True, slow=True)
    ],
    "quantize.float8": [
        Case(
            True,
            refused("quantize.float8 = true needs a GPU"),
            {"training.param_dtype": "bfloat16"},
        )
    ],
}
OPTIMIZER = {
    "optimizer.name": [
        Case("adamw8bit", said("adamw8bit: 2.")),
        Case("adamw4bit", said("adamw4bit: 1.")),
        Case("muon", said("muon: ")),
    ],
    "optimizer.lr": [
        Case(1e-2, logs("lr", [1e-2, 1e-3])),
        Case(0.0, lambda run, _: run.moved() == 0),
    ],
    "optimizer.lr_factors": [
        Case(
            {"model.norm.weight": 1e-9, "*.mlp.*": 3.0},
            lambda run, default: (
                run.moved() > default.moved() and "model.norm.weight" in run.kept()
            ),
        )
    ],
    "optimizer.betas": [
        # The first update does not depend on them.
        Case(
            [0.5, 0.5],
            lambda run, default: (
                near(losses(run), losses(default)) and not same_weights(run, default)
            ),
        )
    ],
    "optimizer.eps": [Case(1.0, lambda run, default: run.moved() < 0.3 * default.moved())],
    # Bytes that no text has: their rows have no gradient.
    "optimizer.weight_decay": [
        Case(0.0, lambda run, _: run.weights[EMBEDDING][1].equal(run.initial[EMBEDDING][1]))
    ],
    "optimizer.stochastic_rounding": [
        Case(
            True,
            lambda run, _: run.weights[EMBEDDING].dtype == torch.bfloat16,
            {"training.param_dtype": None},
        )
    ],
    "lr_scheduler.warmup_steps": [
        Case(2, logs("lr", [1.5e-4, 3e-4])),
        Case(10, said("is more than the 2 step(s) of the run: shortened to 2")),
    ],
    "lr_scheduler.warmup_ratio": [Case(1.0, logs("lr", [1.5e-4, 3e-4]))],
    "lr_scheduler.decay_ratio": [
        Case(0.5, logs("lr", [3e-4, 3e-4, 3e-4, 0.3e-4]), {"training.steps": 4})
    ],
    "lr_scheduler.cycles": [
        Case(2, logs("lr", [3e-4, 1.65e-4, 3e-4, 1.65e-4, 0.3e-4]), {"training.steps": 5})
    ],
    "lr_scheduler.decay_type": [
        Case("constant", logs("lr", [3e-4, 3e-4])),
        Case("linear", logs("lr", [3e-4, 2.1e-4, 1.2e-4, 0.3e-4]), {"training.steps": 4}),
        Case("sqrt", logs("lr", [3e-4, 3e-4 - 2.7e-4 * 0.5**0.5, 0.3e-4]), {"training.steps": 3}),
        Case("inverse_sqrt", logs("lr", [3e-4, 3e-4 * (10_000 / 10_001) ** 0.5])),
    ],
    "lr_scheduler.min_lr_ratio": [Case(0.5, logs("lr", [3e-4, 1.5e-4]))],
}
CHECKPOINT = {
    "checkpoint.enable": [
        Case(
            False,
            lambda run, _: bool(run.lines) and not any("/step-" in file for file in run.files),
        )
    ],
    "checkpoint.interval": [Case(1, wrote("outputs/run/checkpoints/step-1"), SAVED)],
    "checkpoint.async_mode": [
        # What it does is in test_background_save.py.
        Case("async", said("checkpoints are written in the background"), SAVED, same=True)
    ],
    "checkpoint.keep_latest_k": [
        Case(1, lambda run, _: steps_kept(run) == {"step-2"}, SAVED | {"checkpoint.interval": 1}),
        Case(
            0,
            lambda run, _: len(steps_kept(run)) == 3,
            SAVED | {"checkpoint.interval": 1, "training.steps": 3},
        ),
    ],
    "checkpoint.keep_best": [
        Case(
            True,
            lambda run, _: manifest(run)["best"]["keep"],
            SAVED | VALIDATED | {"validation.interval": 1},
        )
    ],
    "checkpoint.shared": [
        Case(False, lambda run, _: set(manifest(run).get("hosts", ())) == {host_name()}, SAVED)
    ],
    "checkpoint.push_to_hub": [
        # What it does is in test_push.py.
        Case(
            "me/mine",
            said('push_to_hub = "me/mine": there is no token'),
            {"checkpoint.export": True},
        )
    ],
    "checkpoint.folder": [Case("kept", wrote("outputs/run/kept/step-2/run.json"), SAVED)],
    "checkpoint.initial_load_path": [
        Case("$MATERIAL/earlier/run/export", lambda run, _: begins_with_export(run)),
        Case("$MATERIAL/earlier/run/checkpoints/step-2", lambda run, _: begins_with_export(run)),
    ],
    "checkpoint.export": [
        Case(False, lambda run, _: bool(run.lines) and not any("/export/" in f for f in run.files))
    ],
    "validation.enable": [
        Case(True, lambda run, _: [line["step"] for line in run.lines] == [0, 1, 2, 2])
    ],
    "validation.interval": [
        Case(1, lambda run, _: len(run.of_validations("loss")) == 3, VALIDATED)
    ],
    "validation.prompts": [
        Case(
            ["a tale"],
            said('sample: "a tale" -> "'),
            VALIDATED | {"validation.prompt_tokens": 2},
        ),
        Case([""], refused("validation.prompts[0] has 0 tokens"), VALIDATED),
        Case(
            ["a tale"],
            refused("validation.prompts", "a reward model writes no text"),
            VALIDATED | PAIRS | {"loss.name": "reward"},
        ),
    ],
    "validation.prompt_tokens": [
        Case(
            3,
            lambda run, default: (
                len(run.of_validations("samples")[0]["a tale"])
                < len(default.of_validations("samples")[0]["a tale"])
            ),
            VALIDATED | {"validation.prompts": ["a tale"], "training.seq_len": 64},
        )
    ],
    "validation.steps": [
        Case(1, lambda run, default: labels(run) < labels(default), VALIDATED),
        Case(
            0,
            lambda run, default: labels(run) > labels(default),
            VALIDATED | {"validation.path": "$MATERIAL/texts"},
        ),
    ],
    "validation.path": [
        Case(
            "$MATERIAL/mixed", lambda run, _: labels(run) == 12 * len("the text"), RECORDS | COUNTED
        ),
    ],
    "validation.split": [
        Case("rest", refused('validation.split = "rest" with data.source = "text"'), VALIDATED),
        Case(
            "rest",
            refused("validation.split: data.path = ", 'which have no split "rest"'),
            CHATS | {"validation.path": None},
        ),
        Case("rest", lambda run, _: labels(run) == 4 * len("row 0 of nine"), DATASET | COUNTED),
    ],
    # What these do is in test_validation_sets.py.
    "validation.sets": [
        Case(
            [{"name": "mixed", "path": "$MATERIAL/mixed"}],
            lambda run, _: (run.of_validations("sets")[0] or {}).keys() == {"mixed"},
            VALIDATED,
        )
    ],
    "validation.metric": [
        Case("other/loss", refused('validation.metric = "other/loss": no validation set has it'))
    ],
    "validation.patience": [
        Case(
            1,
            lambda run, _: len(losses(run)) == 2,
            VALIDATED | {"validation.interval": 1, "optimizer.lr": 0.0, "training.steps": 3},
        )
    ],
    "metrics.log_interval": [Case(2, lambda run, _: [line["step"] for line in run.lines] == [2])],
    "metrics.enable_report": [
        Case(False, lambda run, _: bool(run.lines) and "outputs/run/report.html" not in run.files)
    ],
    "metrics.enable_wandb": [
        Case(
            True,
            lambda run, _: (
                [call[0] for call in run.facts["wandb"]] == ["init", "log", "log", "finish"]
            ),
            watch="wandb",
        )
    ],
    "profiling.enable_profiling": [
        Case(True, refused("profiling.profile_freq = 10 is more than training.steps = 2")),
        Case(True, wrote("outputs/run/profile_traces/step-2/rank0_trace.json"), TRACED, same=True),
    ],
    "profiling.save_traces_folder": [
        Case("traces", wrote("outputs/run/traces/step-2/rank0_trace.json"), TRACED)
    ],
    "profiling.profile_freq": [Case(2, wrote("outputs/run/profile_traces/step-2"), TRACED)],
    "profiling.profiler_active": [
        Case(2, lambda run, _: traced_steps(run) == 2, TRACED | {"profiling.profiler_warmup": 0})
    ],
    "profiling.profiler_warmup": [
        Case(0, lambda run, _: traced_steps(run) == 1, TRACED | {"profiling.profile_freq": 1}),
    ],
    "profiling.enable_memory_snapshot": [
        Case(True, refused("profiling.enable_memory_snapshot = true", "this run is on cpu"))
    ],
    "profiling.save_memory_snapshot_folder": [],  # see test_memory_snapshots
}
PLANNED = {
    "plan.gpu": [Case("A100-80GB", said("planned for 2 x A100-80GB"), PLAN_OF_TWO)],
    "plan.gpu_memory_gib": [
        Case(
            0.5,
            lambda run, _: run.facts["gpu_memory_gib"] == 0.5 and not run.facts["fits"],
            PLAN_OF_TWO,
            slow=True,  # also in test_plan.py, which has plans of small GPUs
        )
    ],
    "plan.host_memory_gib": [
        Case(1e-5, lambda run, _: run.facts["binds"] == "host memory", SMALL_GPU, slow=True)
    ],
    "plan.disk_gib": [
        Case(
            1e-5,
            lambda run, _: run.facts["binds"] == "disk",
            SMALL_GPU | {"activation_checkpoint.offload": "disk"},
            slow=True,  # see test_what_leaves_the_gpu_is_on_the_host
        )
    ],
    "plan.gpus_per_node": [
        # From then on the exchange goes over the network.
        Case(
            1,
            lambda run, default: run.facts["step_seconds"] > default.facts["step_seconds"],
            PLAN_OF_TWO,
            slow=True,
        )
    ],
    "plan.attention_kernel": [
        Case(
            f"fa{n}",
            said(f'attention kernel: FlashAttention {n} (plan.attention_kernel = "fa{n}")'),
            PLAN_OF_TWO | {"training.param_dtype": "bfloat16"},
            slow=True,  # 3 is also in a command of docs/streaming.md, which test_docs.py runs
        )
        for n in (2, 3, 4)
    ],
    "plan.world_size": [
        Case(4, said("mesh: dp_replicate 1 x dp_shard 2 x sp 2"), PLAN_OF_TWO, slow=True)
    ],
    "plan.search": [
        Case(
            "longest",
            lambda run, _: len(run.facts["search"]) > 1 and run.facts["longest_seq_len_verified"],
            SMALL_GPU,
            slow=True,  # also a command of docs/planner.md, which test_docs.py runs
        ),
        Case(
            "fastest",
            lambda run, _: bool(run.facts["fastest"]),
            PLAN_OF_TWO,
            slow=True,  # also in test_fastest.py
        ),
    ],
    "plan.tokens": [
        Case(
            10**6,
            lambda run, _: run.facts["run"]["tokens"] == 10**6,
            PLAN_OF_TWO,
            slow=True,  # also in test_plan.py
        )
    ],
    "plan.gpu_hour_price": [
        Case(
            3.0,
            lambda run, _: (
                run.facts["run"]["cost"] is not None
                and run.facts["run"]["cost"] == 3.0 * run.facts["run"]["gpu_hours"]
            ),
            PLAN_OF_TWO,
            slow=True,  # also in test_fastest.py
        )
    ],
    "plan.max_step_seconds": [
        Case(
            1e-3,
            lambda run, default: run.facts["longest_seq_len"] < default.facts["longest_seq_len"],
            PLAN_OF_TWO,
            slow=True,
        )
    ],
    "plan.ladder": [Case(True, lambda run, _: len(run.facts["ladder"]) == 9, SMALL_GPU, slow=True)],
    "plan.enforce": [
        Case(
            True,
            refused("plan.enforce = true: the run needs"),
            {"plan.host_memory_gib": 1e-6},
            slow=True,  # also in test_plan.py, as the plan of a start
        )
    ],
}
EFFECTS: dict[str, list[Case]] = (
    JOB | MODELS | DATA | TRAINING | LOSS | MEMORY | OPTIMIZER | CHECKPOINT | PLANNED
)


# --- the tests ------------------------------------------------------------------------------------

CASES = [
    pytest.param(
        key,
        case,
        id=f"{key}-{case.value}"[:70],
        marks=[pytest.mark.slow] if case.slow else [],
    )
    for key, cases in EFFECTS.items()
    for case in cases
]


@pytest.mark.parametrize(("key", "case"), CASES)
def test_effect(key: str, case: Case, observe: Observer) -> None:
    if key.startswith("lora"):
        pytest.importorskip("peft")
    if case.needs is PICTURES:
        for package in ("PIL", "torchvision", "av"):
            pytest.importorskip(package)
    without = {name: value for name, value in (BASE | case.needs).items() if name != key}
    options = {
        "ranks": case.ranks,
        "watch": case.watch,
        "plans": key.startswith("plan.") and key != "plan.enforce",
    }
    run, default = observe(without | {key: case.value}, **options), observe(without, **options)
    told = f"{run.refused or run.said}\n--- and at the default:\n{default.refused or default.said}"
    assert case.effect(run, default), f"no effect\n{told}"
    assert not case.effect(default, default), f"the same at the default\n{told}"
    if case.same:
        assert near(losses(run), losses(default)) and near(norms(run), norms(default)), told


def test_the_table_has_every_key() -> None:
    """And of a key with a few values, every one."""
    assert EFFECTS.keys() == KEYS.keys()
    for key, field in KEYS.items():
        if get_origin(field.annotation) is Literal:
            values = {case.value for case in EFFECTS[key]}
            assert values == {*get_args(field.annotation)} - {field.default}, key


def test_memory_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA a run refuses them. What `Trainer` calls, told where its files go, next to
    torch's own part.
    """
    dumped: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **_: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dumped.append)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    settings = {"profiling.enable_memory_snapshot": True, "profiling.profile_freq": 2}
    for more in ({}, {"profiling.save_memory_snapshot_folder": "elsewhere"}):
        (tmp_path / "run.toml").write_text(as_toml(BASE | settings | more))
        config = load_config(tmp_path / "run.toml")
        with profiled(config.profiling, tmp_path, 1) as step_is_over:
            step_is_over(1)
            step_is_over(2)
    expected = ["memory_snapshot/step-2/rank0", "elsewhere/step-2/rank0"]
    assert dumped == [f"{tmp_path}/{folder}_memory_snapshot.pickle" for folder in expected]
