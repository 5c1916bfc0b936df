"""Compare LoRA on the experts of a mixture, ours and peft's: what a forward and backward adds.

    python scripts/bench/expert_adapters.py  qwen3_moe's experts, 16 to 128 of them, rank 8, fp32

One layer of experts (hidden size 512, inner size 256) sees 512 tokens, each of which goes to 8 of
them: the tokens stay the same while the experts grow. Each row is a separate process, on one
thread. Printed are the bytes of the experts and of their adapters, the anonymous memory that is
added at the peak, and CPU seconds. Gradients of the adapters are a part of both, as large as they.
"""

from __future__ import annotations

import time
from typing import Any

from common import ALLOCATOR, child, parser_of, peak_memory

HIDDEN, INNER, TOKENS, CHOSEN = 512, 256, 512, 8
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def contend(experts: int, ours: bool) -> dict[str, Any]:
    """Measure one contender in this process."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from titan_ulysses.config.schema import LoRA
    from titan_ulysses.model.expert_adapters import use_low_rank_products
    from titan_ulysses.model.lora import add_adapters

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=HIDDEN, moe_intermediate_size=INNER, num_hidden_layers=1
    )
    config.num_experts, config.num_attention_heads, config.num_key_value_heads = experts, 4, 4
    config.head_dim = 16
    model = AutoModelForCausalLM.from_config(config)
    add_adapters(model, LoRA(rank=8, target_parameters=TARGETS))
    if ours:
        use_low_rank_products(model)
    layer = model.model.layers[0].mlp.experts
    numbers = [
        [p.numel() for p in layer.parameters() if p.requires_grad is t] for t in (False, True)
    ]
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    chosen = torch.rand(TOKENS, experts).topk(CHOSEN).indices
    weights = torch.full((TOKENS, CHOSEN), 1 / CHOSEN)

    def step(rows: int) -> None:
        layer(hidden[:rows], chosen[:rows], weights[:rows]).sum().backward()
        model.zero_grad()
        hidden.grad = None

    step(8)  # warms up
    with peak_memory() as peaks:
        cpu = time.process_time()
        step(TOKENS)
        seconds = time.process_time() - cpu
    added = peaks["anonymous"] - peaks["before_anonymous"]
    frozen, trained = (4 * sum(n) for n in numbers)
    return {"cpu": seconds, "added": added, "experts": frozen, "adapters": trained}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 32, 64, 128])
    args = parser.parse_args()
    for experts in args.experts:
        for name in ("ours", "peft"):
            given, what = (experts, name == "ours"), f"{experts} experts, {name}"
            found = child(contend, *given, minutes=5, env=ALLOCATOR, what=what)
            size = {key: found[key] / 2**20 for key in ("experts", "adapters", "added")}
            print(
                f"{experts:>4} experts of {size['experts']:6.1f} MiB, adapters of "
                f"{size['adapters']:5.1f} MiB   {name}: {size['added']:6.1f} MiB added, "
                f"{found['cpu']:.2f} CPU s"
            )


if __name__ == "__main__":
    main()
