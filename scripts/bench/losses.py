"""Memory of each loss: its logits by tiles, and all of them at once.

    python scripts/bench/losses.py                      every loss of the head alone
    python scripts/bench/losses.py --only trl           TRL's trainers (pip install trl)
    python scripts/bench/losses.py --only "cross-entropy" "own cross-entropy" --tokens 4096 8192

Each loss runs forward and backward in separate processes on one thread, in fp32: of the hidden
states [T, h] and the head's weight [V, h], or in a TRL trainer of a model with one layer. Printed
are the resident memory that is added at the peak for each T, what a further token adds (the slope
over all T), and that slope relative to the cross-entropy's. What the loss is given does not count:
hidden states, a teacher's, log-probabilities of a reference.

For TRL's trainers, printed is the trainer with UlyssesTrainer by tiles, the same with all logits at
once, and the trainer alone, in which TRL computes log-probabilities by chunks of its own.
"""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from common import ALLOCATOR, child, parser_of, peak_memory, slope

HEAD = (
    "cross-entropy",
    "z-loss",
    "own cross-entropy",
    "policy with KL",
    "entropy",
    "distillation, teacher's head",
    "distillation, top 16",
    "DPO",
    "DPO, reference in the step",
)
EVERY_DPO = ["hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"]
EVERY_DPO += ["aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "sigmoid"]
TRL = ("TRL SFT", "TRL DPO sigmoid", "TRL DPO, all 15 losses")
TEACHER, TOP, PAIRS = 128, 16, 4  # the teacher's width, its largest logits, pairs in the batch


def head_loss(name: str, tokens: int, args: Namespace) -> Callable[[], Any]:
    """Return a function that computes a loss of `tokens` tokens, whose inputs exist already."""
    import torch
    import torch.nn.functional as F

    from titan_ulysses.memory import losses
    from titan_ulysses.memory.loss_head import LossHead

    def head(width: int = args.hidden) -> LossHead:
        linear = torch.nn.Linear(width, args.vocabulary, bias=False)
        z_loss = 1e-4 if name == "z-loss" else 0.0
        return LossHead(linear, tile_tokens=args.tile, z_loss=z_loss)

    own = head()
    hidden = torch.randn(1, tokens, args.hidden, requires_grad=True)
    labels, count = torch.randint(args.vocabulary, (1, tokens)), torch.tensor(tokens)
    policy = ("old_log_probs", "advantages", "reference_log_probs")
    function: Callable[..., Any] | None = None
    inputs: dict[str, Any] = {}
    if name == "own cross-entropy":
        function = partial(F.cross_entropy, ignore_index=-100, reduction="sum")
    elif name == "policy with KL":
        function = partial(losses.clipped_policy_loss, kl=0.1)
        inputs = {key: torch.randn(1, tokens) for key in policy}
    elif name == "distillation, teacher's head":
        weight = torch.randn(args.vocabulary, TEACHER)
        function = partial(
            losses.distillation_loss, teacher_weight=weight, temperature=2.0, cross_entropy=0.3
        )
        inputs = {"teacher_hidden": torch.randn(1, tokens, TEACHER)}
    elif name == "distillation, top 16":
        function = losses.distillation_loss
        ids = torch.randint(args.vocabulary, (1, tokens, TOP))
        inputs = {"teacher_logits": torch.randn(1, tokens, TOP), "teacher_ids": ids}
    if function is not None:
        return lambda: own(hidden, labels, count, loss_function=function, loss_inputs=inputs)
    if name == "entropy":
        return lambda: own(hidden, labels, reduction="statistics").entropy.sum()
    if not name.startswith("DPO"):
        return lambda: own(hidden, labels, count)
    frozen, other = head(), torch.randn(1, tokens, args.hidden)
    stored = torch.randn(2 * PAIRS)

    def completions(head: LossHead, hidden: torch.Tensor) -> torch.Tensor:
        return -head(hidden, labels, reduction="none").view(2 * PAIRS, -1).sum(1)

    def dpo() -> torch.Tensor:
        reference = stored
        if name != "DPO":
            with torch.no_grad():
                reference = completions(frozen, other)
        policy = completions(own, hidden)
        return losses.dpo_loss(policy[::2], policy[1::2], reference[::2], reference[1::2]).sum()

    return dpo


def trl_loss(name: str, tokens: int, args: Namespace, folder: str) -> Callable[[], Any]:
    """Return a function that computes the loss of a trainer's batch of `tokens` tokens."""
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from titan_ulysses import UlyssesTrainer, build_mesh

    config = AutoConfig.for_model("llama", vocab_size=args.vocabulary, hidden_size=64)
    config.update({"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128})
    config.update({"num_key_value_heads": 2, "max_position_embeddings": tokens})
    model = AutoModelForCausalLM.from_config(config)
    own: dict[str, Any] = {}
    base, settings = (SFTTrainer, SFTConfig) if name == "TRL SFT" else (DPOTrainer, DPOConfig)
    kind: type = base
    if args.tile:  # 0: the trainer alone
        kind = type(base.__name__, (UlyssesTrainer, base), {})
        own = {"mesh": build_mesh(), "options": {"memory": {"loss_tile_tokens": args.tile}}}
    more: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False}
    more |= {"max_length": tokens + 8, "per_device_train_batch_size": 1}
    rows: list[dict[str, Any]] = [{"input_ids": [5] * tokens}] * 2
    if name != "TRL SFT":  # the chosen and the rejected completion have half of the tokens each
        text = "a" * (tokens // 2 - 4)
        rows = [{"prompt": "say", "chosen": text, "rejected": text[::-1]}] * 2
        more |= {"loss_type": EVERY_DPO if "all" in name else ["sigmoid"]}
        more |= {"label_smoothing": 0.1 if "all" in name else 0.0}  # which two losses need
        own["ref_model"] = AutoModelForCausalLM.from_config(config)
    trainer = kind(
        model,
        args=settings(folder, **more),
        train_dataset=Dataset.from_list(rows),
        processing_class=ByT5Tokenizer(),
        **own,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    return lambda: trainer.compute_loss(trainer.model, batch)


def contend(name: str, settings: dict[str, Any]) -> list[int]:
    """Measure one loss in a child process: the bytes that each number of tokens adds. settings: the
    options of this benchmark, with the tile of this measurement.
    """
    import torch

    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    torch.manual_seed(0)
    args, added = Namespace(**settings), []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in args.tokens:
            if name in TRL:
                loss = trl_loss(name, tokens, args, folder)
            else:
                loss = head_loss(name, tokens, args)
            loss().backward()  # the first call of a loss function checks it with a few tokens
            with peak_memory() as peaks:
                loss().backward()
            added.append(peaks["peak"] - peaks["before"])
            del loss
    return added


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tile", type=int, default=128, help="tokens in a tile of logits")
    parser.add_argument("--only", nargs="+", choices=[*HEAD, "trl"], default=HEAD)
    args = parser.parse_args()
    lengths = ", ".join(f"{tokens:,}" for tokens in args.tokens)
    print(
        f"T = {lengths}; h {args.hidden} (TRL's model 64), vocabulary {args.vocabulary:,}, tiles "
        f"of {args.tile} tokens, one thread"
    )
    names = [name for one in args.only for name in (TRL if one == "trl" else (one,))]
    base = 0.0
    for name in names:
        ways = {"by tiles": args.tile, "at once": -1}
        if name in TRL:
            ways["TRL alone"] = 0
        for way, tile in ways.items():
            settings = vars(args) | {"tile": tile}
            found = child(contend, name, settings, minutes=5, env=ALLOCATOR)
            if isinstance(found, str):
                print(f"{name:<30}{way:<10} {found}")
                continue
            a_token = slope(zip(args.tokens, found, strict=True))
            peaks = "".join(f"{x / 2**20:9.1f}" for x in found)
            line = f"{name:<30}{way:<10}{peaks} MiB {a_token:12,.0f} bytes a token"
            if name == "cross-entropy" and way == "by tiles":
                base = a_token
            elif base and name in HEAD and way == "by tiles":
                line += f"   {a_token / base:.3f} of the cross-entropy's"
            print(line)


if __name__ == "__main__":
    main()
