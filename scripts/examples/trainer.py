"""transformers' Trainer on long sequences: sequence-parallel, evaluated, and resumable.

torchrun --nproc-per-node 2 scripts/examples/trainer.py [MODEL] [TEXT] [OUTPUT]
"""

import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from titan_ulysses import UlyssesTrainer, build_mesh

model, text, output = [*sys.argv[1:], *["tiny", "LICENSE", "outputs/trainer"][len(sys.argv) - 1 :]]
mesh = build_mesh(sequence=2)  # two ranks share each sequence
LongTrainer = type("LongTrainer", (UlyssesTrainer, Trainer), {})  # a mixin, and the trainer

torch.manual_seed(0)  # the same weights on every rank
if model == "tiny":  # a random model of bytes, for a machine without one
    config = AutoConfig.for_model("llama", vocab_size=384, hidden_size=64, intermediate_size=128)
    config.update({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2})
    whole, tokenizer = AutoModelForCausalLM.from_config(config), ByT5Tokenizer()
else:
    whole = AutoModelForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
ids = tokenizer(Path(text).read_text())["input_ids"]
rows = [{"input_ids": ids[i : i + 512]} for i in range(0, len(ids) - 511, 512)]
rows = [row | {"labels": row["input_ids"]} for row in rows]
settings = {"max_steps": 4, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-3}
more = {"use_cpu": not torch.cuda.is_available(), "report_to": [], "bf16": False}
args = TrainingArguments(output, **settings, **more)
data = {"train_dataset": rows[:-2], "eval_dataset": rows[-2:]}
trainer = LongTrainer(whole, args=args, mesh=mesh, data_collator=default_data_collator, **data)
trainer.train(resume_from_checkpoint=any(Path(output).glob("checkpoint-*")))
print(trainer.evaluate()["eval_loss"])
trainer.save_model()  # the whole model, for AutoModelForCausalLM.from_pretrained
