"""TRL's SFTTrainer on long sequences: packed, sequence-parallel, with LoRA, and resumable.

torchrun --nproc-per-node 2 scripts/examples/trl_sft.py [MODEL] [TEXT] [OUTPUT]
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer
from trl import SFTConfig, SFTTrainer

from titan_ulysses import UlyssesTrainer, build_mesh

model, text, output = [*sys.argv[1:], *["tiny", "LICENSE", "outputs/trl_sft"][len(sys.argv) - 1 :]]
mesh = build_mesh(sequence=2)  # two ranks share each sequence
LongTrainer = type("LongTrainer", (UlyssesTrainer, SFTTrainer), {})  # a mixin, and the trainer

torch.manual_seed(0)  # the same weights on every rank
if model == "tiny":  # a random model of bytes, for a machine without one
    config = AutoConfig.for_model("llama", vocab_size=384, hidden_size=64, intermediate_size=128)
    config.update({"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2})
    whole, tokenizer = AutoModelForCausalLM.from_config(config), ByT5Tokenizer()
else:
    whole, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
    )
data = Dataset.from_list([{"text": part} for part in Path(text).read_text().split("\n\n")])
settings = {"max_length": 512, "packing": True, "max_steps": 4, "logging_steps": 1, "bf16": False}
more = {"use_cpu": not torch.cuda.is_available(), "report_to": [], "learning_rate": 1e-3}
lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
own = {"train_dataset": data, "processing_class": tokenizer, "peft_config": lora}
trainer = LongTrainer(whole, args=SFTConfig(output, **settings, **more), mesh=mesh, **own)
trainer.train()
trainer.save_model()  # the whole model, for AutoModelForCausalLM.from_pretrained
