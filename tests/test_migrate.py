"""`titan-ulysses migrate`: recipes of other trainers, what they become, and what is lost."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from titan_ulysses.config.load import load_config
from titan_ulysses.config.schema import KEYS, Config
from titan_ulysses.distributed.errors import UserError
from titan_ulysses.tools import migrate
from titan_ulysses.tools.migration import FORMATS
from titan_ulysses.tools.migration.key_rules import Flat, Format, decisive

ROOT = Path(__file__).resolve().parent.parent

# Recipes as their projects publish them, shortened: ArcticTraining's run-h100-sp8-llama-8b.yml,
# accelerate's cp.yaml, axolotl's llama3-8b-deepspeed-alst.yaml, torchtitan's llama3_8b.toml. Those
# of LLaMA-Factory, ms-swift and TRL are ours.
ARCTIC = """
type: sft
micro_batch_size: 1
exit_iteration: 4
min_iterations: 4
activation_checkpoint_cpu_offload: true
tiled_mlp_compute: true
sequence_parallel_size: 8
deepspeed:
  zero_optimization:
    stage: 3
    offload_optimizer:
      device: cpu
  seq_parallel_communication_data_type: bf16
optimizer:
  type: cpu_adam
  learning_rate: 0.00001
model:
  type: "liger"
  name_or_path: meta-llama/Llama-3.1-8B-Instruct
  attn_implementation: flash_attention_2
  save_name: mine
data:
  sources:
    - type: huggingface_instruct
      name_or_path: HuggingFaceH4/ultrachat_200k
      split: train_sft
      role_mapping:
        user: messages.role.user
        assistant: messages.role.assistant
  cache_dir: data-cache
  dl_num_workers: 1
  max_length: 3_800_000
epochs: 2
logger:
  level: WARNING
  output_dir: "logs"
"""
ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_activation_checkpointing: true
  fsdp_offload_params: true
  fsdp_version: 2
mixed_precision: bf16
num_machines: 2
num_processes: 8
parallelism_config:
  parallelism_config_cp_size: 4
  parallelism_config_dp_replicate_size: 1
  parallelism_config_dp_shard_size: 2
  parallelism_config_tp_size: 2
use_cpu: false
"""
AXOLOTL = """
base_model: meta-llama/Llama-3.1-8B
datasets:
  - path: princeton-nlp/TextbookChapters
    type: completion
    field: chapter
val_set_size: 0.0
output_dir: ./outputs/out
sequence_len: 500_000
min_sample_len: 200_000
sample_packing: true
tiled_mlp: true
context_parallel_size: 8
plugins:
  - axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin
gradient_accumulation_steps: 2
micro_batch_size: 1
max_steps: 50
optimizer: adamw_torch_8bit
lr_scheduler: cosine
learning_rate: 2e-5
bf16: auto
gradient_checkpointing: true
activation_offloading: legacy
resume_from_checkpoint:
attn_implementation: flash_attention_2
warmup_ratio: 0.1
adam_beta2: 0.95
neftune_noise_alpha: 5
deepspeed: zero3.json
"""
ZERO3 = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": True}}}
TORCHTITAN = """
[job]
dump_folder = "./outputs"
[metrics]
log_freq = 10
enable_tensorboard = true
[model]
name = "llama3"
flavor = "8B"
hf_assets_path = "./assets/hf/Llama-3.1-8B"
converters = ["float8"]
[optimizer]
name = "AdamW"
lr = 3e-4
[training]
local_batch_size = 1
seq_len = 8192
dataset = "c4"
[parallelism]
data_parallel_shard_degree = -1
tensor_parallel_degree = 1
pipeline_parallel_degree = 2
context_parallel_degree = 4
[checkpoint]
enable = true
async_mode = "async_with_pinned_mem"
[activation_checkpoint]
mode = "selective"
selective_ac_option = "op"
[validation]
enable = false
steps = -1
freq = 500
"""
LLAMA_FACTORY = """
model_name_or_path: a/b
stage: sft
finetuning_type: lora
lora_target: q_proj,v_proj
quantization_bit: 4
dataset: chats,notes
dataset_dir: sets
template: chatml
cutoff_len: 32768
neat_packing: true
flash_attn: fa2
gradient_accumulation_steps: 4
per_device_train_batch_size: 2
num_train_epochs: 2
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr: 1e-5}
warmup_ratio: 0.1
learning_rate: 1e-4
weight_decay: 0.1
bf16: true
save_strategy: epoch
eval_strategy: no
report_to: wandb
output_dir: saves/mine
mask_history: true
neftune_noise_alpha: 5
"""
SETS = {
    "chats": {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "tools": "functions"},
        "tags": {"role_tag": "who", "content_tag": "text", "user_tag": "asker"},
    },
    "notes": {
        "hf_hub_url": "c/d",
        "split": "all",
        "columns": {"prompt": "question", "response": "answer", "history": "before"},
    },
}
SWIFT = """
# two nodes of eight
ranks=8
NPROC_PER_NODE=$ranks NNODES=2 CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 \\
swift sft \\
    --model a/b \\
    --tuner_type full \\
    --dataset 'c/d:en#500' chats.jsonl \\
    --max_length 65536 \\
    --truncation_strategy left \\
    --sequence_parallel_size 4 \\
    --packing true --padding_free true --attn_impl flash_attn \\
    --loss_scale last_round \\
    --torch_dtype bfloat16 \\
    --deepspeed zero3_offload \\
    --learning_rate 1e-5 \\
    --warmup_ratio 0.05 --eval_steps 0.1 --split_dataset_ratio 0.01 --save_total_limit=3 \\
    --system 'Be kind.' | tee log
"""
TRL = """
model_name_or_path: a/b
dataset_name: c/d
dataset_config: en
packing: true
packing_strategy: bfd_split
assistant_only_loss: true
max_steps: 100
lr_scheduler_type: warmup_stable_decay
lr_scheduler_kwargs: {num_decay_steps: 20, decay_type: linear}
use_peft: true
lora_target_modules: all-linear
eos_token: <end>
"""
RECIPES = {
    "arctic": ARCTIC,
    "accelerate": ACCELERATE,
    "axolotl": AXOLOTL,
    "llama-factory": LLAMA_FACTORY,
    "ms-swift": SWIFT,
    "torchtitan": TORCHTITAN,
    "trl": TRL,
}
_SHARED = {"source": "chat", "train_on": "last", "bad_lines": "skip"}
EXPECTED: dict[str, dict[str, Any]] = {
    "arctic": {
        "model.path": "meta-llama/Llama-3.1-8B-Instruct",
        "data.source": "chat",
        "data.path": "HuggingFaceH4/ultrachat_200k",
        "data.split": "train_sft",
        "training.seq_len": 3_800_000,
        "training.steps": 4,
        "parallelism.sequence_parallel_degree": 8,
        "activation_checkpoint.offload": "host",
        "memory.optimizer_offload": True,
        "optimizer.lr": 1e-5,
        "optimizer.betas": (0.9, 0.999),
        "job.dump_folder": "logs",
        "data.cache_folder": "data-cache",
        "data.packing": "none",
        "data.long_documents": "drop",
    },
    "accelerate": {
        "parallelism.sequence_parallel_degree": 4,
        "parallelism.data_parallel_shard_degree": 2,
        "plan.world_size": 8,
        "plan.gpus_per_node": 4,
        "memory.parameter_offload": True,
        "training.param_dtype": "bfloat16",
    },
    "axolotl": {
        "model.path": "meta-llama/Llama-3.1-8B",
        "data.source": "hf",
        "data.text_field": "chapter",
        "data.packing": "best_fit",
        "job.name": "out",
        "training.seq_len": 500_000,
        "training.global_batch_size": 4,
        "training.steps": 50,
        "lr_scheduler.warmup_steps": 5,
        "parallelism.sequence_parallel_degree": 8,
        "optimizer.name": "adamw8bit",
        "optimizer.betas": (0.9, 0.95),
        "optimizer.lr": 2e-5,
        "optimizer.weight_decay": 0.0,
        "activation_checkpoint.offload": "host",
        "memory.parameter_offload": True,
    },
    "llama-factory": {
        "data.mixture": (
            {
                "path": "sets/chats.jsonl",
                "source": "chat",
                "messages_field": "talk",
                "tools_field": "functions",
                "message_fields": {"role": "who", "content": "text"},
                "roles": {"asker": "user"},
                "train_on": "last",
            },
            {
                "path": "c/d",
                "split": "all",
                "source": "chat",
                "prompt_field": "question",
                "completion_field": "answer",
                "train_on": "last",
            },
        ),
        "data.packing": "best_fit",
        "training.seq_len": 32768,
        "training.global_batch_size": 128,
        "training.epochs": 2.0,
        "training.seed": 42,
        "optimizer.betas": (0.9, 0.999),
        "optimizer.weight_decay": 0.1,
        "lr_scheduler.decay_type": "cosine",
        "lr_scheduler.min_lr_ratio": 0.1,
        "lr_scheduler.warmup_ratio": 0.1,
        "lora.rank": 8,
        "lora.alpha": 16.0,
        "lora.dropout": 0.0,
        "lora.target_modules": ["q_proj", "v_proj"],
        "lora.quantize_base": "nf4",
        "checkpoint.interval": "epoch",
        "checkpoint.keep_latest_k": 0,
        "validation.enable": False,
        "metrics.enable_wandb": True,
    },
    "ms-swift": {
        "data.mixture": (
            {"path": "c/d", "subset": "en", **_SHARED},
            {"path": "chats.jsonl", **_SHARED},
        ),
        "data.packing": "best_fit",
        "training.seq_len": 65536,
        "training.global_batch_size": -1,
        "training.epochs": 3.0,
        "parallelism.sequence_parallel_degree": 4,
        "memory.parameter_offload": True,
        "memory.optimizer_offload": True,
        "optimizer.weight_decay": 0.1,
        "optimizer.betas": (0.9, 0.95),
        "lr_scheduler.decay_type": "cosine",
        "lr_scheduler.min_lr_ratio": 0.0,
        "lora.rank": 0,
        "validation.interval": 0.1,
        "checkpoint.interval": 500,
        "checkpoint.keep_latest_k": 3,
    },
    "trl": {
        "data.path": "c/d",
        "data.subset": "en",
        "data.packing": "best_fit",
        "data.long_documents": "split",
        "data.train_on": "assistant",
        "training.seq_len": 1024,
        "training.local_batch_size": 8,
        "training.steps": 100,
        "optimizer.lr": 2e-5,
        "lr_scheduler.decay_type": "linear",
        "lr_scheduler.decay_ratio": 0.2,
        "lora.rank": 16,
        "lora.alpha": 32.0,
        "lora.dropout": 0.05,
        "lora.target_modules": [],
    },
    "torchtitan": {
        "model.path": "./assets/hf/Llama-3.1-8B",
        "data.path": "allenai/c4",
        "data.streaming": True,
        "training.seq_len": 8192,
        "training.steps": 10_000,
        "lr_scheduler.warmup_steps": 200,
        "lr_scheduler.min_lr_ratio": 0.0,
        "parallelism.sequence_parallel_degree": 4,
        "quantize.float8": True,
        "checkpoint.async_mode": "async",
        "checkpoint.keep_latest_k": 10,
        "activation_checkpoint.mode": "full",
        "validation.steps": 0,
    },
}
LOST = {
    "arctic": ["optimizer.weight_decay", "scheduler.warmup_ratio", "model.save_name"],
    "accelerate": ["parallelism_config.parallelism_config_tp_size"],
    "axolotl": ["min_sample_len", "neftune_noise_alpha"],
    "llama-factory": ["dataset", "template", "cutoff_len", "neftune_noise_alpha"],
    "ms-swift": [
        "weight_decay",
        "dataset",
        "truncation_strategy",
        "split_dataset_ratio",
        "system",
    ],
    "trl": ["dataset_name", "eos_token"],
    "torchtitan": ["debug.seed", "parallelism.pipeline_parallel_degree"],
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_recipe(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file that is written loads; what is lost is in it and on the console."""
    ending = {"torchtitan": "toml", "ms-swift": "sh"}.get(name, "yaml")
    recipe = tmp_path / f"recipe.{ending}"
    recipe.write_text(RECIPES[name])
    (tmp_path / "zero3.json").write_text(json.dumps(ZERO3))
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(SETS))
    arguments = [str(recipe), "--ranks", "16", "--output", str(tmp_path / "ours.toml")]
    if name == "accelerate":
        with pytest.raises(UserError, match="it names no model: add --model.path FOLDER"):
            migrate.main(arguments)
        arguments += ["--model.path", "folder"]
    migrate.main(arguments)
    config = load_config(tmp_path / "ours.toml")
    for key, value in EXPECTED[name].items():
        section, field = key.split(".")
        found = getattr(getattr(config, section), field)
        if key == "data.mixture":
            found = tuple(entry.changed() | {"source": entry.source} for entry in found)
        assert found == value, key
    err = capsys.readouterr().err
    said = err.splitlines()
    lost = [line.split()[1] for line in said if line.startswith("LOST: ")]
    assert lost == LOST[name]
    text = (tmp_path / "ours.toml").read_text()
    assert all(f"#   {key} = " in text for key in lost)
    for key in migrate.flatten(migrate.read_recipe(recipe)):
        assert re.search(rf"(^| ){re.escape(key)}([,.]| = |$)", text + err, re.MULTILINE), key
    with pytest.raises(UserError, match="exists already"):
        migrate.main(arguments)


def migrated(recipe: Path, text: str, *, ranks: int | None = None) -> migrate.Migration:
    recipe.write_text(text)
    table = migrate.read_recipe(recipe)
    kind = migrate.format_of(recipe, table)
    return migrate.Migration(kind, migrate.flatten(table), beside={"--ranks": ranks})


def test_values_without_a_counterpart_are_named_with_the_reason(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, key, why in [
        ("base_model: m\nload_in_8bit: true", "load_in_8bit", "weights in 8 bits"),
        ("model_name_or_path: m\nstage: rm", "stage", "a bias and dropout there"),
        ("base_model: m\ngradient_accumulation_steps: 4", "gradient_accumulation_steps", "--ranks"),
        ("base_model: m\noptimizer: lion_8bit", "optimizer", "known values are adamw_torch"),
        ("base_model: m\ndeepspeed: absent.json", "deepspeed", "no such file beside the recipe"),
        ("base_model: m\ndatasets: 7", "datasets", "this key does not have such a value"),
        ("base_model: m\ndatasets: [{path: a, type: alpaca}]", "datasets", "of a: type alpaca"),
        ("base_model: m\nplugins: [a.LigerPlugin, b.KDPlugin]", "plugins", "b.KDPlugin"),
        ("base_model: m\na_new_key: {b: 1}", "a_new_key.b", "not known here"),
        (
            ARCTIC.replace("offload_optimizer", "offload_param").replace(
                "device: cpu", "device: nvme"
            ),
            "deepspeed.zero_optimization.offload_param.device",
            "parameters on a disk",
        ),
    ]:
        found = {one: reason for one, _, reason in migrated(recipe, text).lost}
        assert why in found[key], (text, found)
    # What is off asks for nothing.
    off = "base_model: m\nmax_steps: 5\nload_in_4bit: false\nqat:\nrl: []"
    assert not migrated(recipe, off).lost


def test_keys_that_depend_on_others(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, key, value in [
        ("sample_packing: true", "data.packing", "best_fit"),
        ("sample_packing: true\npretraining_dataset: a/b", "data.packing", "concat"),
        ("warmup_steps: 0.1\nmax_steps: 50", "lr_scheduler.warmup_steps", 5),
        ("warmup_steps: 7", "lr_scheduler.warmup_steps", 7),
        ("adapter: qlora\nlora_r: 8", "lora.quantize_base", "nf4"),
        ("adapter: lora\nload_in_4bit: true", "lora.quantize_base", "nf4"),
        ("adapter: lora\nlora_r: 8\npeft_use_rslora: true", "lora.use_rslora", True),
        (
            "adapter: lora\nlora_r: 8\nlora_target_parameters: [mlp.experts.down_proj]",
            "lora.target_parameters",
            ["mlp.experts.down_proj"],
        ),
        ("adam_beta1: 0.8\nadam_beta2: 0.95", "optimizer.betas", [0.8, 0.95]),
        ("gradient_accumulation_steps: 1", "training.global_batch_size", None),
    ]:
        found = migrated(recipe, f"base_model: m\n{text}").settings
        assert found.get(key) == value, text


SFT = "model: {name_or_path: m}\ndata: {sources: [THUDM/LongAlign-10k], max_length: 4096%s}\n"
CHATS = "base_model: m\ndatasets: [{path: a, type: chat_template}]\nmax_steps: 50\n"
RLHF = (
    "command: swift rlhf\nmodel: m\ntuner_type: full\ndataset: a\nmax_length: 64\n"
    "torch_dtype: bfloat16\nweight_decay: 0.0\ngradient_accumulation_steps: 1\n"
)
OLD = """
[model]
name = "llama3"
flavor = "8B"
tokenizer_path = "./original/tokenizer.model"
[training]
batch_size = 1
warmup_steps = 20
tensor_parallel_degree = 1
compile = true
[experimental]
context_parallel_degree = 4
[lr_scheduler]
lr_min = 0.1
[checkpoint]
enable_checkpoint = true
[float8]
enable_float8_linear = true
"""


@pytest.mark.parametrize(
    ("text", "settings", "lost"),
    [
        (  # ArcticTraining packs nothing, drops what is too long, and warms up for a tenth
            f"{SFT % ''}train_iters: 50",
            {
                "data.source": "chat",
                "data.packing": "none",
                "data.long_documents": "drop",
                "lr_scheduler.warmup_steps": 5,
                "lr_scheduler.min_lr_ratio": 0.0,
                "training.seed": 42,
                "checkpoint.enable": False,
            },
            {"optimizer.weight_decay": "norms and biases"},
        ),
        (
            f"{SFT % ', pack_samples: true, mask_inputs: false'}train_iters: 50",
            {"data.packing": "best_fit", "data.train_on": "all"},
            {"optimizer.weight_decay": "norms and biases"},
        ),
        (
            f"{SFT % ', filter_samples: false'}type: causal\ntrain_iters: 50",
            {"data.source": "hf", "data.packing": "concat", "data.long_documents": "split"},
            {"optimizer.weight_decay": "norms and biases"},
        ),
        (
            "model: {name_or_path: m}\ndata: {sources: [a/b], filter_samples: false}",
            {
                "data.path": "a/b",
                "data.long_documents": "split",
                "training.seq_len": 2048,
                "training.epochs": 1,
                "lr_scheduler.warmup_ratio": 0.1,
            },
            {
                "data.max_length": "set training.seq_len (the default of ArcticTraining)",
                "data.sources": "of a/b: its role_mapping: make each row a list of",
                "data.filter_samples": "stay whole there",
                "optimizer.weight_decay": "norms and biases",
            },
        ),
        (  # axolotl drops chats that are too long, and warms up for 3 %, at most for 100 steps
            CHATS,
            {
                "data.packing": "none",
                "data.long_documents": "drop",
                "training.seq_len": 512,
                "lr_scheduler.warmup_steps": 2,
                "optimizer.weight_decay": 0.0,
            },
            {},
        ),
        (f"{CHATS}warmup_steps: 3", {"lr_scheduler.warmup_steps": 3}, {}),
        (CHATS.replace("50", "9000"), {"lr_scheduler.warmup_steps": 100}, {}),
        (
            CHATS.replace("chat_template", "completion"),
            {"data.source": "hf", "data.long_documents": "split"},
            {},
        ),
        (
            f"{CHATS}pretraining_dataset: b",
            {"data.packing": "concat", "data.streaming": True},
            {
                "sample_packing": "packed, end to end (the default of axolotl)",
                "datasets": "pretraining_dataset says otherwise",
            },
        ),
        (
            CHATS.replace("[{path", "[{path: t, type: completion}, {path"),
            {"data.long_documents": "split"},
            {
                "excess_length_strategy": "chats are dropped there and texts split",
                "datasets": "set the weight of each source",
            },
        ),
        (  # as YAML 1.2 has numbers
            f"{CHATS}warmup_ratio: 1e-1\nlearning_rate: 2e-5\nadam_epsilon: '1e-7'",
            {"lr_scheduler.warmup_steps": 5, "optimizer.lr": 2e-5, "optimizer.eps": "1e-7"},
            {},
        ),
        (
            "command: trl reward\nmodel_name_or_path: m\ndataset_name: a\n"
            "center_rewards_coefficient: 0.01",
            {
                "loss.name": "reward",
                "loss.center_rewards_coefficient": 0.01,
                "loss.beta": None,
                "data.source": "preference",
                "data.long_documents": "drop",
                "optimizer.lr": 1e-4,
            },
            {"dataset_name": "the prompt"},
        ),
        (
            f"{RLHF}rlhf_type: rm",
            {"loss.name": "reward", "loss.beta": None, "data.source": "preference"},
            {"dataset": "its columns"},
        ),
        (
            f"{RLHF}rlhf_type: grpo",
            {"loss.name": None, "data.source": "chat"},
            {"rlhf_type": "TRL's trainers in sequence parallelism"},
        ),
        (  # transformers' constant schedule has no warm-up, also where one is set
            f"{CHATS}lr_scheduler: constant\nwarmup_ratio: 0.1",
            {"lr_scheduler.decay_type": "constant", "lr_scheduler.warmup_steps": 0},
            {},
        ),
        (
            f"{CHATS}lr_scheduler: constant_with_warmup\nwarmup_ratio: 0.1",
            {"lr_scheduler.decay_type": "constant", "lr_scheduler.warmup_steps": 5},
            {},
        ),
        (
            f"{CHATS}rl: dpo\nrl_beta: 0.2",
            {
                "loss.name": "dpo",
                "loss.beta": 0.2,
                "data.source": "preference",
                "data.prompt_field": "messages",
                "data.chosen_field": "chosen",
            },
            {},
        ),
        (f"{CHATS}rl: gdpo", {"loss.name": None}, {"rl": "TRL's trainers in sequence parallelism"}),
        (
            f"{CHATS}rl: kto\nrl_beta: 0.2\nkto_desirable_weight: 2.0",
            {"loss.name": "kto", "loss.beta": 0.2, "loss.desirable_weight": 2.0},
            {"datasets": "of a: its fields: name them"},
        ),
        (
            f"{CHATS}rl: simpo\nsimpo_gamma: 0.7",
            {"loss.name": "simpo", "loss.simpo_gamma": 0.7, "data.source": "preference"},
            {"rl": "cpo_alpha, 1 unless it is set"},
        ),
        (f"{CHATS}rl: orpo\norpo_alpha: 0.2", {"loss.name": "orpo", "loss.beta": 0.2}, {}),
        (
            f"{CHATS}val_set_size: 0.1\nsaves_per_epoch: 1\nevals_per_epoch: 4".replace(
                "max_steps: 50", "num_epochs: 3"
            ),
            {
                "training.epochs": 3,
                "training.steps": None,
                "checkpoint.interval": "epoch",
                "validation.interval": "0.25 epoch",
                "lr_scheduler.warmup_ratio": 0.03,
            },
            {"warmup_ratio": "of at most 100 steps", "val_set_size": "whatever the share"},
        ),
        (  # other names of fields and roles
            CHATS.replace(
                "a,",
                "a, message_property_mappings: {role: from, content: value}, "
                "roles: {assistant: [gpt]},",
            ),
            {
                "data.path": "a",
                "data.source": "chat",
                "data.message_fields": {"role": "from", "content": "value"},
                "data.roles": {"gpt": "assistant"},
            },
            {},
        ),
        (
            CHATS.replace("a,", "a, message_property_mappings: {role: role}, chat_template: x,"),
            {"data.path": "a"},
            {"datasets": "of a: chat_template"},
        ),
        (
            OLD,
            {
                "training.local_batch_size": 1,
                "lr_scheduler.warmup_steps": 20,
                "lr_scheduler.min_lr_ratio": 0.1,
                "parallelism.sequence_parallel_degree": 4,
                "checkpoint.enable": True,
                "compile.enable": True,
                "quantize.float8": True,
                "validation.interval": 10,
            },
            {
                "model.tokenizer_path": "of Meta's format",
                "training.dataset": "set data.path",
                "debug.seed": "training.seed is 0",
            },
        ),
    ],
)
def test_what_a_recipe_leaves_to_its_trainer_or_says_in_other_words(
    text: str, settings: dict[str, Any], lost: dict[str, str], tmp_path: Path
) -> None:
    """With the values of the trainers' sources, which the files in tools/migration/ name."""
    recipe = tmp_path / ("recipe.toml" if text == OLD else "recipe.yaml")
    found = migrated(recipe, text)
    assert {key: found.settings.get(key) for key in settings} == settings
    said = {key: why for key, _, why in found.lost}
    assert said.keys() == lost.keys()
    for key, why in lost.items():
        assert why in said[key], said
    found.settings.setdefault("model.path", "m")
    (tmp_path / "ours.toml").write_text(migrate.as_text("recipe", found))
    config = load_config(tmp_path / "ours.toml", [("data.path", "a")] if text == OLD else [])
    if "optimizer.eps" in settings:  # in quotes, and a number all the same
        assert config.optimizer.eps == 1e-7
        assert "eps = 1e-07" in (tmp_path / "ours.toml").read_text()


def test_a_step_has_as_many_sequences_whatever_the_key_of_the_degree_is(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for key in ("context_parallel_size", "sequence_parallel_degree"):
        text = f"base_model: m\n{key}: 4\nmicro_batch_size: 3\ngradient_accumulation_steps: 2"
        text += "\nmax_steps: 5"
        assert migrated(recipe, text, ranks=8).settings["training.global_batch_size"] == 12, key
        (lost,) = migrated(recipe, text, ranks=6).lost
        assert lost[2] == "--ranks 6 cannot be divided by 4 ranks of a sequence"


def test_the_command_of_a_script(tmp_path: Path) -> None:
    """The first that trains, as a shell would read it."""
    (tmp_path / "run.sh").write_text("""
# swift sft --model no
swift export --model no && echo done
export SIZE=16
gpus=8
NPROC_PER_NODE=$gpus \\
swift pt more.yaml --model a/b --dataset c/d#500 'e f' ${SIZE} \\
    --system 'Purpose: be kind' --lr_scheduler_kwargs '{"min_lr": 1e-6}' --lora-rank $SIZE \\
    --packing --name="x y" --seed=3 # at night
swift sft --model no
""")
    assert migrate.read_recipe(tmp_path / "run.sh") == {
        "command": "swift pt",
        "arguments": "more.yaml",
        "model": "a/b",
        "dataset": ["c/d#500", "e f", 16],
        "system": "Purpose: be kind",
        "lr_scheduler_kwargs": {"min_lr": 1e-6},
        "lora_rank": 16,
        "packing": True,
        "name": "x y",
        "seed": 3,
        "env": {"SIZE": 16, "NPROC_PER_NODE": 8},
        "other_commands": ["swift sft"],
    }


def test_options_may_stand_before_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("distributed_type: FSDP")
    for given in (["--model.path", "m"], ["--model.path=m"]):
        migrate.main([*given, "--compile.enable", "--ranks", "8", str(recipe)])
        out = capsys.readouterr().out
        assert 'path = "m"' in out
        assert "enable = true" in out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "x: [1", "a.yaml: cannot be parsed: "),
        ("a.toml", "x = ", "a.toml: cannot be parsed: "),
        ("a.yaml", "- 1", "a.yaml: has no keys: it is not a recipe"),
        (
            "a.yaml",
            "lr: 1",
            "a.yaml: which trainer is this recipe for\\? Say so with --from arctic|",
        ),
        ("a.yaml", "base_model: m\nlearning_rate: fast", "optimizer.lr = "),
        ("a.sh", "python train.py", "a.sh: cannot be parsed: no command begins with swift or trl"),
    ],
)
def test_files_that_are_no_recipes(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        migrate.main([str(tmp_path / name)])
    assert error.value.exit_code == 2
    with pytest.raises(UserError, match="absent.yaml: No such file"):
        migrate.main([str(tmp_path / "absent.yaml")])


def test_rules_lead_to_settings_that_exist() -> None:
    """Every default, and every key that a rule says it becomes."""
    for kind in FORMATS.values():
        assert all(kind.rule_of(key) for key in kind.defaults)
        for rule in kind.rules:
            named = [word.strip("`,;") for word in rule.ours.split() if word.startswith("`")]
            for key in named:
                section = key.partition(".")[0]
                ours = key.partition(" ")[0]
                if "." in key and section in Config.model_fields and not key.endswith("*"):
                    assert ours in KEYS, (kind.name, rule.theirs, key)


ANY_VALUE = [True, False, 0, 1, -1, 0.5, 1e400, "", "no", "x", "a/b#1,c", [], ["x", 2], [{}], None]
ANY_VALUE += [[{"path": "a", "type": "alpaca"}], {}, "2", [[]], "auto", "trl dpo"]


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
def test_no_key_of_a_recipe_goes_unmentioned(kind: Format) -> None:
    """Each key of the tables, and one that is not there, with values of all kinds: it is a setting,
    needs nothing, is off, or is lost, with a reason.
    """
    keys = sorted({key.replace("*", "x") for rule in kind.rules for key in rule.theirs.split()})
    draw = random.Random(0)
    recipes = [dict.fromkeys([*keys, "a.new_key"], value) for value in ANY_VALUE]
    recipes += [{key: draw.choice(ANY_VALUE) for key in keys} for _ in range(20)]
    for recipe in recipes:
        found = migrate.Migration(kind, recipe, beside={"--ranks": 8, "--dataset_info": SETS})
        said = {key: why for key, _, why in [*found.needless, *found.lost]}
        origins = {key for keys in found.origin.values() for key in keys}
        assert recipe.keys() <= {*said, *origins, *found.off}
        assert all(said.values()), said
        assert (f"our default: {NOT_SAID}" in origins) == bool(found.ours)


NOT_SAID = "the recipe does not say it"
OF_TRANSFORMERS = {
    "training.local_batch_size": 8,
    "training.epochs": 3.0,
    "training.seed": 42,
    "training.max_norm": 1.0,
    "training.param_dtype": "bfloat16",
    "optimizer.lr": 5e-5,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "lr_scheduler.decay_type": "linear",
    "lr_scheduler.min_lr_ratio": 0.0,
    "lr_scheduler.warmup_steps": 0,
    "data.packing": "none",
    "data.train_on": "assistant",
    "checkpoint.interval": 500,
    "checkpoint.keep_latest_k": 0,
    "validation.enable": False,
}
OF_LORA = {"lora.rank": 8, "lora.alpha": 16, "lora.dropout": 0.0, "lora.target_modules": []}


@pytest.mark.parametrize(
    ("name", "recipe", "defaults", "ours"),
    [
        (
            "arctic",
            "model: {name_or_path: m}",
            OF_TRANSFORMERS
            | {
                "training.local_batch_size": 1,
                "training.epochs": 1,
                "optimizer.lr": 5e-4,
                "optimizer.weight_decay": 0.1,
                "lr_scheduler.warmup_steps": None,
                "lr_scheduler.warmup_ratio": 0.1,
                "checkpoint.enable": False,
                "checkpoint.interval": None,
                "checkpoint.keep_latest_k": None,
            },
            ["training.seq_len"],
        ),
        (
            "axolotl",
            "base_model: m\nlearning_rate: 5e-5",
            OF_TRANSFORMERS
            | {
                "training.seq_len": 512,
                "training.local_batch_size": 1,
                "training.epochs": 1,
                "lr_scheduler.decay_type": "cosine",
                "lr_scheduler.warmup_steps": None,
                "lr_scheduler.warmup_ratio": 0.03,
                "checkpoint.interval": "epoch",
                "checkpoint.keep_latest_k": 4,
            },
            [],
        ),
        (
            "llama-factory",
            "model_name_or_path: m\nstage: sft",
            OF_TRANSFORMERS | OF_LORA | {"training.seq_len": 2048},
            [],
        ),
        (
            "ms-swift",
            "model: m\ndataset: a",
            OF_TRANSFORMERS
            | OF_LORA
            | {
                "lora.alpha": 32,
                "lora.dropout": 0.05,
                "training.local_batch_size": 1,
                "training.global_batch_size": 16,
                "optimizer.lr": 1e-4,
                "optimizer.betas": [0.9, 0.95],
                "optimizer.weight_decay": 0.1,
                "lr_scheduler.decay_type": "cosine",
                "data.long_documents": "drop",
            },
            ["training.seq_len"],
        ),
        (
            "trl",
            "model_name_or_path: m\ndataset_name: a",
            OF_TRANSFORMERS
            | {"training.seq_len": 1024, "optimizer.lr": 2e-5, "data.train_on": "all"},
            [],
        ),
        (
            "torchtitan",
            "model: {flavor: 8B}\ntraining: {}",
            {
                "training.seq_len": 2048,
                "training.local_batch_size": 8,
                "training.steps": 10_000,
                "training.max_norm": 1.0,
                "optimizer.lr": 8e-4,
                "optimizer.betas": [0.9, 0.95],
                "optimizer.weight_decay": 0.1,
                "lr_scheduler.decay_type": "linear",
                "lr_scheduler.min_lr_ratio": 0.0,
                "lr_scheduler.warmup_steps": 200,
                "data.packing": "concat",
                "checkpoint.enable": False,
                "validation.enable": False,
            },
            [],
        ),
        ("accelerate", "distributed_type: FSDP", {}, decisive({})),
    ],
)
def test_what_decides_a_run_is_their_default_or_named(
    name: str, recipe: str, defaults: Flat, ours: list[str], tmp_path: Path
) -> None:
    """The values are those of the files that Format.source names; ours is what is left to us."""
    found = migrated(tmp_path / "recipe.yaml", recipe, ranks=4)
    assert found.kind is FORMATS[name]
    assert {key: found.settings.get(key) for key in defaults} == defaults
    assert found.ours == ours
    assert found.settings.keys() >= {*decisive(found.settings)}
    found.settings.setdefault("model.path", "m")
    text = migrate.as_text("recipe", found)
    assert text.count(NOT_SAID) == len(ours)
    said = "\n".join(migrate.said_of(found))
    assert all(f"OUR DEFAULT: {key} = " in said for key in ours)


def test_the_page_has_the_tables() -> None:
    page = (ROOT / "docs" / "migration.md").read_text()
    for name, kind in FORMATS.items():
        assert migrate.markdown(kind) in page, f"titan-ulysses migrate --table {name}"
