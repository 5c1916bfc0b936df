"""TrainingArguments of transformers, as LLaMA-Factory, ms-swift, TRL and axolotl use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

from titan_ulysses.tools.migration import key_rules as to
from titan_ulysses.tools.migration.key_rules import Flat, Lost, Rule

SOURCE = "src/transformers/training_args.py of 5.24"
DEFAULTS: Flat = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "bf16": False,
    "logging_steps": 500,
    "save_strategy": "steps",
    "save_steps": 500,
    "save_total_limit": "all",
    "eval_strategy": "no",
    "seed": 42,
    "(final-model)": "saved",
}
ADAMW = {
    "adamw_torch adamw_torch_fused adamw_hf paged_adamw paged_adamw_32bit": "adamw",
    "adamw_torch_8bit adamw_bnb_8bit adamw_8bit paged_adamw_8bit": "adamw8bit",
    "adamw_torch_4bit": "adamw4bit",
}
EXPORT = to.choice("(final-model)", "checkpoint.export", {"saved": True})
_KWARGS = "lr_scheduler_kwargs."


def schedule(name: str, values: Flat) -> Flat:
    """Return [lr_scheduler] of one of transformers' schedules, with its lr_scheduler_kwargs."""
    given = {k.removeprefix(_KWARGS): v for k, v in values.items() if k.startswith(_KWARGS)}
    found: Flat = {"lr_scheduler.decay_type": name, "lr_scheduler.min_lr_ratio": 0.0}
    if name in ("constant", "constant_with_warmup"):
        found = {"lr_scheduler.decay_type": "constant"}
    elif name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        least = given.pop("min_lr_rate", None)
        if least is None:
            least = float(given.pop("min_lr")) / float(values["learning_rate"])
        found |= {"lr_scheduler.decay_type": "cosine", "lr_scheduler.min_lr_ratio": float(least)}
    elif name == "cosine_with_restarts":
        cycles = int(given.pop("num_cycles", 1))
        found |= {"lr_scheduler.decay_type": "cosine", "lr_scheduler.cycles": cycles}
    elif name == "warmup_stable_decay" and int(values.get("max_steps") or 0) > 0:
        share = int(given.pop("num_decay_steps")) / int(values["max_steps"])
        shape = given.pop("decay_type", "cosine")
        found |= {
            "lr_scheduler.decay_type": {"1-sqrt": "sqrt"}.get(shape, shape),
            "lr_scheduler.decay_ratio": share,
            "lr_scheduler.min_lr_ratio": float(given.pop("min_lr_ratio", 0.0)),
        }
    elif name not in ("linear", "cosine", "inverse_sqrt"):
        raise Lost("linear, cosine, constant, inverse_sqrt, restarts and a least rate are known")
    if given:
        raise Lost(f"lr_scheduler_kwargs: {', '.join(given)}", found)
    return found


def warmup(value: float, values: Flat) -> Flat:
    """Return the warm-up of warmup_steps, which below 1 is a share, as transformers 5 has it."""
    if 0 < float(value) < 1:
        return {"lr_scheduler.warmup_ratio": float(value)}
    if value and values.get("warmup_ratio"):
        raise Lost("warmup_ratio is set too")
    return {"lr_scheduler.warmup_steps": int(value)}


def every(section: str, value: float) -> Flat:
    """Return the interval of checkpoints or validations: steps, or below 1 a share of the run."""
    steps = float(value)
    interval = int(steps) if steps >= 1 else str(steps)
    return {f"{section}.enable": True, f"{section}.interval": interval}


def strategy(section: str, name: str) -> Callable[[Any, Flat], Flat]:
    def become(_: Any, values: Flat) -> Flat:
        how = values.get(f"{name}_strategy")
        if how in ("no", False):  # YAML 1.1 reads no as false
            return {f"{section}.enable": False}
        if how == "epoch":
            return {f"{section}.enable": True, f"{section}.interval": "epoch"}
        if how != "steps":
            raise Lost("set checkpoint.keep_best" if how == "best" else f"{how}: no such strategy")
        return every(section, values.get(f"{name}_steps") or values.get("logging_steps", 500))

    return become


def epochs(value: float, values: Flat) -> Flat:
    return {} if int(values.get("max_steps") or 0) > 0 else {"training.epochs": float(value)}


def output(value: str, _: Flat) -> Flat:
    path = PurePosixPath(value)
    return {"job.dump_folder": str(path.parent), "job.name": path.name} if path.name else {}


def _report(value: Any, _: Flat) -> Flat:
    names = value if isinstance(value, list) else [value]
    if others := [one for one in names if one not in ("none", "wandb", "tensorboard", "all")]:
        raise Lost(f"{', '.join(map(str, others))}: there are TensorBoard and Weights & Biases")
    return {"metrics.enable_wandb": True} if "wandb" in names else {}


_FSDP = "FSDP2 of each block is always used, whose checkpoints are sharded"


def _fsdp(value: Any, _: Flat) -> Flat:
    return {"memory.parameter_offload": True} if "offload" in str(value) else {}


def fsdp_config() -> list[Rule]:
    """The rules of accelerate's settings of FSDP, whose names may begin with fsdp_."""
    offload, checkpoint = (
        f"fsdp_config.{name} fsdp_config.fsdp_{name}"
        for name in ("offload_params", "activation_checkpointing")
    )
    mode = "activation_checkpoint.mode"
    return [
        to.switch(offload, "memory.parameter_offload"),
        to.switch(checkpoint, mode, "full"),
        to.needless("fsdp_config*", _FSDP),
    ]


_RULES = [
    to.computed("num_train_epochs", "`training.epochs`, without max_steps", epochs),
    to.computed(
        "max_steps",
        "`training.steps`; -1: see num_train_epochs",
        lambda n, _: {"training.steps": int(n)} if int(n) > 0 else {},
        "num_train_epochs counts",
    ),
    to.same("learning_rate", "optimizer.lr"),
    to.computed("lr_scheduler_type", "`lr_scheduler.*`, with lr_scheduler_kwargs", schedule),
    to.needless(f"{_KWARGS}*", "see lr_scheduler_type"),
    to.of_warmup(
        "warmup_steps", "lr_scheduler_type", "`lr_scheduler.warmup_steps`; below 1 a share", warmup
    ),
    to.of_warmup(
        "warmup_ratio",
        "lr_scheduler_type",
        "lr_scheduler.warmup_ratio",
        lambda share, _: {"lr_scheduler.warmup_ratio": share},
    ),
    to.choice("optim", "optimizer.name", ADAMW),
    to.betas("adam_beta1", "adam_beta2", defaults=(0.9, 0.999)),
    to.same("adam_epsilon", "optimizer.eps"),
    to.same("max_grad_norm", "training.max_norm"),
    to.same("label_smoothing_factor", "loss.label_smoothing"),
    to.same("seed", "training.seed"),
    to.lost("data_seed", "training.seed is of the weights and the order of the data"),
    to.same("full_determinism", "training.deterministic"),
    to.choice("bf16", "training.param_dtype", {True: "bfloat16", False: "float32"}),
    to.lost("fp16", to.FP16),
    to.needless("tf32", "for fp32 products on a GPU"),
    to.choice(
        "gradient_checkpointing", "activation_checkpoint.mode", {True: "full", False: "none"}
    ),
    to.needless("gradient_checkpointing_kwargs*", "checkpoints are not reentrant"),
    to.switch("torch_compile", "compile.enable"),
    to.needless("torch_compile_*", "MLPs and norms are compiled"),
    to.needless("use_liger_kernel enable_liger_kernel", "the loss and the MLPs are tiled"),
    to.lost("neftune_noise_alpha", "no noise is added to embeddings"),
    to.computed("output_dir", "`job.dump_folder`, `job.name`", output),
    to.same("logging_steps", "metrics.log_interval"),
    to.computed("save_strategy save_steps", "checkpoint.interval", strategy("checkpoint", "save")),
    to.computed(
        "save_total_limit",
        "checkpoint.keep_latest_k",
        lambda n, _: {"checkpoint.keep_latest_k": 0 if n == "all" else int(n)},
    ),
    EXPORT,
    to.computed("eval_strategy eval_steps", "validation.interval", strategy("validation", "eval")),
    to.computed("report_to", "metrics.enable_wandb", _report, "TensorBoard is always written"),
    to.lost("push_to_hub", "name a repository in checkpoint.push_to_hub"),
    to.needless("hub_*", "see checkpoint.push_to_hub"),
    to.needless("resume_from_checkpoint overwrite_output_dir", "the same command resumes"),
    to.needless("save_only_model save_safetensors", "checkpoints resume; export/ has the model"),
    to.needless("do_train do_eval", "see validation.enable"),
    to.needless("per_device_eval_batch_size eval_accumulation_steps", "it is that of training"),
    to.needless("dataloader_*", "chosen by the cores of the machine"),
    to.needless("logging_* log_level* run_name disable_tqdm", "rank 0 prints"),
    to.needless("remove_unused_columns", "only the columns that are named are read"),
    to.needless("local_rank ddp_*", "torchrun says it; see [comm]"),
    to.computed("fsdp", "`memory.parameter_offload`, of offload", _fsdp, _FSDP),
    *fsdp_config(),
    to.lost("deepspeed", "no such file beside the recipe"),
    *to.deepspeed("deepspeed"),
]


def rules(*, sequence: list[str], has_adapters: Callable[[Flat], bool]) -> list[Rule]:
    """The rules of TrainingArguments.

    sequence: the keys that may have the degree of sequence parallelism
    has_adapters: whether a recipe trains adapters alone
    """
    batch = "per_device_train_batch_size"
    return [
        to.same(batch, "training.local_batch_size"),
        to.accumulation(batch=batch, sequence=sequence),
        to.weight_decay("weight_decay", has_adapters),
        *_RULES,
    ]
