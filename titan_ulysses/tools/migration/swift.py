"""Commands (in a .sh) and YAML files of ms-swift."""

from __future__ import annotations

from typing import Any

from titan_ulysses.tools.migration import key_rules as to
from titan_ulysses.tools.migration import training_arguments as hf
from titan_ulysses.tools.migration.key_rules import Flat, Lost

_OF_TUNER = "1e-5 of all weights, 1e-4 of adapters"
_CONFIG = "that of config.json"
_MODEL = "the model's"
_SIXTEEN = "16 / batch / GPUs"
_BETAS = {"dpo": 0.1, "orpo": 0.1, "kto": 0.1, "simpo": 2.0}


def _stage(values: Flat) -> str:
    return str(values["command"]).split()[-1]


def _has_adapters(values: Flat) -> bool:
    return bool(values.get("train_type", values["tuner_type"]) != "full")


def _tuner(_: str, values: Flat) -> Flat:
    name = values.get("train_type", values["tuner_type"])
    if name not in ("full", "lora"):
        raise Lost("there is LoRA, and training of all weights")
    return {}


def _learning_rate(value: Any, values: Flat) -> Flat:
    chosen = 1e-4 if _has_adapters(values) else 1e-5
    return {"optimizer.lr": chosen if value == _OF_TUNER else value}


def _accumulation(value: Any, values: Flat) -> Flat:
    """Without a number there are as many micro-batches as make 16 sequences on all GPUs."""
    ranks = values["--ranks"] or values.get("env.NPROC_PER_NODE", 0) * values.get("env.NNODES", 1)
    batch = int(values["per_device_train_batch_size"])
    if value == _SIXTEEN and ranks:
        value = max(1, -(-16 // (batch * ranks)))
    rule = to.accumulation(batch="per_device_train_batch_size", sequence=["sequence_parallel_size"])
    if value == _SIXTEEN:
        raise Lost("training.global_batch_size depends on the number of GPUs: give --ranks")
    return rule.become(value, values | {"--ranks": ranks})


def _dataset(name: str, values: Flat) -> tuple[Flat, str]:
    path, _, count = str(name).partition("#")
    is_file = path.endswith((".json", ".jsonl", ".parquet"))
    path, _, subset = (
        (path, "", "") if is_file or path.startswith(("/", ".")) else path.partition(":")
    )
    found = {"path": path} | ({"subset": subset} if subset else {})
    if _stage(values) == "rlhf" and values["rlhf_type"] in (*_BETAS, "rm"):
        kind = "unpaired" if values["rlhf_type"] == "kto" else "preference"
        return found | {"source": kind}, f"{path}: its columns: name them (data.chosen_field)"
    lost = [f"#{count}: a part of its rows"] if count else []
    if _stage(values) == "pt":
        found["source"] = "jsonl" if is_file else "hf"
        lost.append("its column: name it in data.text_field")
    else:
        found["source"] = "chat"
    return found, f"{path}: {', '.join(lost)}" if lost else ""


def _datasets(value: Any, values: Flat) -> Flat:
    names = value if isinstance(value, list) else [value]
    found = [_dataset(name, values) for name in names]
    return to.sources(found, values.get("interleave_prob"))


def _length(value: Any, _: Flat) -> Flat:
    if value == _MODEL:
        raise Lost("set training.seq_len")
    return {"training.seq_len": value}


def _packing(value: bool, values: Flat) -> Flat:
    streams = bool(values.get("streaming"))
    if value and not streams and values.get("packing_strategy", "binpack") != "binpack":
        raise Lost("packing_strategy: documents are reordered", {"data.packing": "best_fit"})
    return to.packing(value, streams=streams)


def _long(value: str, values: Flat) -> Flat:
    known = {"split": "split"} if values.get("streaming") else {"delete": "drop", "split": "split"}
    if value not in known:
        what = "left out" if value == "delete" else "cut, and the rest is lost"
        raise Lost(f"what is too long is {what} there", {"data.long_documents": "split"})
    return {"data.long_documents": known[value]}


def _trained(value: str, values: Flat) -> Flat:
    if value == "of the command":
        value = "all" if _stage(values) == "pt" else "default"
    names = {"default": "assistant", "last_round": "last", "all": "all"}
    if _stage(values) == "rlhf":
        return {"data.train_on": "assistant"}
    if value not in names:
        raise Lost("there are no other weights of tokens", {"data.train_on": "assistant"})
    return {"data.train_on": names[value]}


def _precision(value: str, _: Flat) -> Flat:
    if value == _CONFIG:
        raise Lost(f"{_CONFIG} is not known here", {"training.param_dtype": "bfloat16"})
    if value == "float16":
        raise Lost(to.FP16)
    return {"training.param_dtype": value}


def _evaluates(_: Any, values: Flat) -> Flat:
    """As checkpoints are saved, if there is validation data."""
    if not (values.get("val_dataset") or values["split_dataset_ratio"]):
        return {"validation.enable": False}
    how = values["eval_strategy"]
    steps = values.get("eval_steps") or values["save_steps"]
    more = {"eval_strategy": values["save_strategy"] if how == "as save_strategy" else how}
    return hf.strategy("validation", "eval")(how, values | more | {"eval_steps": steps})


def _held_out(share: float, values: Flat) -> Flat:
    if share:
        raise Lost(to.SHARE_HELD_OUT, _evaluates(None, values))
    return _evaluates(None, values)


def _loss(value: str, values: Flat) -> Flat:
    if _stage(values) != "rlhf":
        return {}
    if value == "rm":
        return {"loss.name": "reward"}
    if value not in _BETAS:
        raise Lost(to.OTHER_LOSSES)
    found = {"loss.name": value, "loss.beta": float(values.get("beta", _BETAS[value]))}
    if value == "simpo":
        found["loss.simpo_gamma"] = float(values.get("simpo_gamma", 1))
        if values.get("cpo_alpha") != 0:
            raise Lost(to.CPO_ALPHA, found)
    return found


def _deepspeed(value: str, _: Flat) -> Flat:
    name, offload = (*str(value).split("_", 1), "")[:2]
    if name not in ("zero0", "zero1", "zero2", "zero3") or offload not in ("", "offload"):
        raise Lost("no such file beside the recipe")
    found = {"memory.optimizer_offload": True} if offload else {}
    return found | ({"memory.parameter_offload": True} if offload and name == "zero3" else {})


SWIFT = to.Format(
    "ms-swift",
    "swift/arguments/ and swift/trainers/arguments.py of 4.6.0.dev0 (3602360, August 2026); what "
    f"stands there in neither, in {hf.SOURCE}",
    lambda table: (
        str(table.get("command", "")).startswith("swift")
        or (
            isinstance(table.get("model"), str)
            and bool({"tuner_type", "train_type", "dataset"} & {*table})
        )
    ),
    [
        to.only("command", ("swift sft", "swift pt", "swift rlhf"), "only training"),
        to.needless("env.NPROC_PER_NODE env.NNODES", "torchrun starts the ranks"),
        to.same("env.MAX_PIXELS", "data.max_pixels"),
        to.needless(
            "env.CUDA_VISIBLE_DEVICES env.NODE_RANK env.MASTER_* env.OMP_NUM_THREADS env.NCCL_*",
            "set it for torchrun",
        ),
        to.needless("env.PYTORCH_* env.CELOSS_PARALLEL_SIZE", "allocator and tiles are chosen"),
        to.needless("env.USE_HF", "names are of the Hugging Face hub"),
        to.lost("env.*", "no such variable is read"),
        to.same("model", "model.path"),
        to.needless("model_type task_type", "config.json says it"),
        to.lost("model_revision", "download that revision"),
        to.computed("tuner_type train_type", "`full`, or `lora`: `lora.rank`", _tuner),
        *to.adapters("lora_rank", "target_modules", _has_adapters),
        to.in_list("target_parameters", "lora.target_parameters"),
        to.only("quant_method", ("bnb",), "of quantized weights there is nf4"),
        to.choice("quant_bits", "lora.quantize_base", {4: "nf4"}, {8: "no weights in 8 bits"}),
        to.only("bnb_4bit_quant_type", ("nf4",), "only nf4"),
        to.computed("learning_rate", "optimizer.lr", _learning_rate),
        to.computed(
            "gradient_accumulation_steps",
            "`training.global_batch_size`, with `--ranks` or NPROC_PER_NODE",
            _accumulation,
            "one micro-batch a step",
        ),
        to.computed("dataset", "`data.source`, `data.path`, `data.subset`", _datasets),
        to.needless("interleave_prob", "weights of data.mixture"),
        to.lost("val_dataset", "name the file in validation.path"),
        to.computed("split_dataset_ratio", "validation.enable", _held_out, to.SHARE_HELD_OUT),
        to.computed("eval_strategy eval_steps", "validation.interval", _evaluates),
        to.same("streaming", "data.streaming"),
        to.needless("load_from_cache_file dataset_num_proc shuffle_buffer_size", "chosen"),
        to.needless("lazy_tokenize packing_num_proc packing_strategy", "see data.packing"),
        to.only("dataset_shuffle train_dataloader_shuffle", (True,), "data is shuffled"),
        to.choice("strict", "data.bad_lines", {True: "stop", False: "skip"}),
        to.needless("use_hf", "names are of the Hugging Face hub"),
        to.lost("model_author model_name", "write them into the data"),
        to.lost("system template agent_template", "the tokenizer's own chat template is used"),
        to.only("use_chat_template", (True,), 'set data.source = "hf" and data.text_field'),
        to.computed("max_length", "training.seq_len", _length),
        to.computed("truncation_strategy", "data.long_documents", _long),
        to.computed("packing", "data.packing", _packing),
        to.needless("padding_free", "documents of a sequence never see each other"),
        to.computed("loss_scale", "data.train_on", _trained),
        to.same("max_pixels", "data.max_pixels"),
        to.computed("torch_dtype", "training.param_dtype", _precision),
        to.needless("bf16", "see torch_dtype"),
        to.attention("attn_impl"),
        to.lost("rope_scaling max_model_len", "set model.rope_scaling with a factor"),
        to.same("sequence_parallel_size", to.SEQUENCE),
        to.computed("deepspeed", "`memory.optimizer_offload`, of offload", _deepspeed, "FSDP2"),
        to.lost("router_aux_loss_coef", "config.json says it (output_router_logits)"),
        to.needless("use_logits_to_keep use_flash_ckpt", "the loss is tiled"),
        to.computed("rlhf_type", "loss.name", _loss, "of swift rlhf"),
        to.needless("beta simpo_gamma cpo_alpha", "see rlhf_type"),
        to.same("center_rewards_coefficient", "loss.center_rewards_coefficient", "of rm"),
        to.same("label_smoothing", "loss.label_smoothing"),
        to.same("desirable_weight", "loss.desirable_weight"),
        to.same("undesirable_weight", "loss.undesirable_weight"),
        to.same("ref_model", "loss.reference"),
        *hf.rules(sequence=["sequence_parallel_size"], has_adapters=_has_adapters),
    ],
    hf.DEFAULTS
    | {
        "command": "swift sft",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": _SIXTEEN,
        "learning_rate": _OF_TUNER,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "bf16": True,
        "torch_dtype": _CONFIG,
        "logging_steps": 5,
        "eval_strategy": "as save_strategy",
        "split_dataset_ratio": 0.0,
        "tuner_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "target_modules": ["all-linear"],
        "max_length": _MODEL,
        "truncation_strategy": "delete",
        "packing": False,
        "loss_scale": "of the command",
        "strict": False,
        "rlhf_type": "dpo",
    },
    includes={"deepspeed": "deepspeed"},
    differs=[
        to.ONE_STEP_LATER,
        to.BF16_WEIGHTS,
        "data sets and models are of ModelScope there, unless use_hf; here of the Hugging Face hub",
        "chats are written by ms-swift's own templates there; here by that of the tokenizer",
    ],
)
