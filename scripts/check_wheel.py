"""Check the installed package with a user's training loop, from the first step to the saved folder.

    python check_wheel.py  in an empty folder; scripts/check_wheel.sh makes one, and an environment

Two ranks train three steps at once. Then two ranks train two steps, stop, and resume from the
checkpoint for the third. Exits with 1 unless both runs save the same bits, and plain transformers
computes from them the logits of the sharded model. Then the
`titan-ulysses` command plans a run, trains it on two ranks, evaluates it and converts its
checkpoint, and the examples for Trainer and TRL train on two ranks.

    python check_wheel.py --first-hour

What a new user does first, and nothing else: init, plan, two steps and an export, and the first
step of a loop of their own. Prints the seconds of each.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import titan_ulysses
from titan_ulysses import (
    build_mesh,
    load_checkpoint,
    parallelize,
    save_checkpoint,
    save_pretrained,
    shard,
)

STEPS, VOCABULARY = 3, 61
TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# A model with LayerNorm and without any operation in fp32, so that differences from plain
# transformers are only rounding in fp64.
MODEL = {"model_type": "starcoder2", "vocab_size": VOCABULARY, "hidden_size": 48}
MODEL |= {"intermediate_size": 64, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 6, "num_key_value_heads": 2}


def batch_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"input_ids": torch.randint(VOCABULARY, (2, 48), generator=generator)}


def train(folder: str, steps: int) -> None:
    """Train on this rank of two until `steps` steps are made, from the last checkpoint in folder or
    from the beginning.
    """
    mesh = build_mesh(sequence=2)
    model = parallelize(AutoModelForCausalLM.from_pretrained("start", dtype=torch.float64), mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = load_checkpoint(f"{folder}/checkpoints", model, optimizer)
    for batch in shard(islice(map(batch_of, range(steps)), state["step"], None), model):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state["step"] += 1
        if dist.get_rank() == 0:
            print(f"{folder}: step {state['step']}, loss {loss.item():.6f}")
        save_checkpoint(f"{folder}/checkpoints", model, optimizer, state)
    save_pretrained(model, f"{folder}/trained")
    (batch,) = shard([batch_of(0)], model)
    with torch.no_grad():
        mine = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    slices = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(slices, mine)
    if dist.get_rank() == 0:
        torch.save(torch.cat(slices, dim=1), f"{folder}/logits.pt")


def on_two_ranks(folder: str, steps: int) -> None:
    subprocess.run([sys.executable, *TWO_RANKS, __file__, folder, str(steps)], check=True)


_TABLE = ", ".join(f"{k} = {json.dumps(v)}" for k, v in (MODEL | {"vocab_size": 259}).items())
RUN = f"""
model.tokenizer = "bytes"
model.config = {{ {_TABLE} }}
data = {{ source = "text", path = "texts" }}
training = {{ seq_len = 256, steps = 2 }}
parallelism.sequence_parallel_degree = 2
checkpoint = {{ enable = true, interval = 2 }}
"""
"""A run of the `titan-ulysses` command."""


COMMAND = str(Path(sys.executable).with_name("titan-ulysses"))


def write_texts() -> None:
    Path("texts").mkdir()
    for number in range(8):
        Path(f"texts/{number}.txt").write_text(json.__doc__)


def write_model(folder: str, **changes: int) -> None:
    config = AutoConfig.for_model(**MODEL | changes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float64).save_pretrained(folder)


def check_command() -> None:
    """Plan, train, evaluate and convert by the installed command, and run the examples; an error of
    any ends this one.
    """
    Path("run.toml").write_text(RUN)
    write_texts()
    command, ranks = COMMAND, [*TWO_RANKS, "-m"]
    for arguments in (
        [command, "--version"],
        [command, "plan", "--config", "run.toml"],
        [sys.executable, *ranks, "titan_ulysses", "train", "--config", "run.toml"],
        [sys.executable, *ranks, "titan_ulysses", "evaluate", "--config", "run.toml"],
        [command, "convert", "outputs/run/checkpoints/step-2", "converted"],
        [command, "generate", "converted", "--prompt", "a", "--tokens", "2"],
        [command, "show-data", "--config", "run.toml", "--rows", "1"],
        [sys.executable, *ranks, "titan_ulysses", "needle", "converted", "--lengths", "256"],
    ):
        subprocess.run(arguments, check=True)
    AutoModelForCausalLM.from_pretrained("converted")
    for name in ("trainer", "trl_sft"):
        script = [f"examples/{name}.py", "tiny", "LICENSE", f"outputs/{name}"]
        subprocess.run([sys.executable, *TWO_RANKS, *script], check=True)
        AutoModelForCausalLM.from_pretrained(f"outputs/{name}")


def first_hour() -> None:
    """Init, plan, train two steps and export; then the first step of an own loop."""
    write_texts()
    write_model("small", vocab_size=259, max_position_embeddings=512)
    write_model("start")
    own = ["--model.tokenizer", "bytes", "--data.path", "texts", "--training.steps", "2"]
    own += ["--training.param_dtype", "float32"]
    for name, arguments in {
        "init": [COMMAND, "init", "small", "--gpus", "2xH100", *own],
        "plan": [COMMAND, "plan", "--config", "small.toml"],
        "train": [sys.executable, *TWO_RANKS, "-m", "titan_ulysses", "train"]
        + ["--config", "small.toml"],
    }.items():
        started = time.perf_counter()
        subprocess.run(arguments, check=True)
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    AutoModelForCausalLM.from_pretrained("outputs/small/export")
    started = time.perf_counter()
    on_two_ranks("an own loop", 1)
    print(f"an own loop: {time.perf_counter() - started:.0f} s")


def main() -> None:
    print(f"titan_ulysses from {Path(titan_ulysses.__file__).parent}")
    if sys.argv[1:] == ["--first-hour"]:
        return first_hour()
    write_model("start")
    on_two_ranks("at once", STEPS)
    on_two_ranks("in two parts", STEPS - 1)
    on_two_ranks("in two parts", STEPS)
    at_once, in_parts = (
        load_file(f"{folder}/trained/model.safetensors") for folder in ("at once", "in two parts")
    )
    same = [name for name, tensor in at_once.items() if torch.equal(tensor, in_parts[name])]
    print(f"{len(same)} of {len(at_once)} tensors of the two folders are the same bits")
    plain = AutoModelForCausalLM.from_pretrained("in two parts/trained", dtype=torch.float64).eval()
    with torch.no_grad():
        logits = plain(**batch_of(0)).logits
    difference = (
        (logits - torch.load("in two parts/logits.pt", weights_only=True)).abs().max().item()
    )
    print(
        f"logits differ by {difference:.1e} of {logits.abs().max().item():.2f} from plain "
        "transformers"
    )
    if len(same) < len(at_once) or not difference < 1e-12:
        sys.exit("not the same")
    check_command()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        train(sys.argv[1], int(sys.argv[2]))
    else:
        main()
