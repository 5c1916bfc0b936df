"""Does an indexer learn to choose? Dense training, warm-up, then the joint stage, on two ranks.

    python scripts/bench/indexer.py
    python scripts/bench/indexer.py --steps 300 60 60 --picture recall.png

The task needs attention that depends on the text: a piece of 24 to 64 random tokens repeats until
the sequence ends, and the loss is that of the tokens after its first copy. A model of two layers
(deepseek_v32) learns it with dense attention. Then each query reads an eighth of the keys, chosen
by an indexer: untrained, after the warm-up, and after the joint stage; and, as a control, after as
many steps of the model alone with the untrained indexer. Recall is the share of dense attention
that the choice covers, as unmodified transformers computes it.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import TOKEN_IDS, batch_of, child, model_table, parser_of, sharded_model

LENGTH, TOKENS, KEYS = 256, 32, 32
MODEL = model_table("deepseek_v32", vocab=TOKENS, width=64, inner=128, layers=2, heads=(4, 4))
MODEL |= {"max_position_embeddings": LENGTH, "initializer_range": 0.06} | TOKEN_IDS
MODEL |= {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16}
MODEL |= {"v_head_dim": 16, "first_k_dense_replace": 2}
MODEL |= {"index_n_heads": 8, "index_head_dim": 32, "index_topk": LENGTH}
ROWS = 8
HELD_OUT = 10**6
"""The seed of the first held-out batch."""


def rows_of(seed: int) -> tuple[Any, Any]:
    """Return ids and shifted labels [B, S]; the first copy of a piece has no labels."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.empty(ROWS, LENGTH + 1, dtype=torch.int64)
    labels = torch.full((ROWS, LENGTH), -100)
    for row in range(ROWS):
        size = int(torch.randint(24, 65, (), generator=generator))
        piece = torch.randint(TOKENS, (size,), generator=generator)
        ids[row] = piece.repeat(LENGTH // size + 2)[: LENGTH + 1]
        labels[row, size:] = ids[row, size + 1 :]
    return ids[:, :-1], labels


def stage(source: str, target: str, steps: int, indexer: str, lr: float) -> float:
    """Train the model of a folder, or one of random weights; write it to another folder, and return
    its held-out loss.
    """
    import torch

    from titan_ulysses import save_pretrained
    from titan_ulysses.config.schema import Optimizer
    from titan_ulysses.optim.optimizer import build_optimizer
    from titan_ulysses.train.step import train_step

    model, mesh = sharded_model(source or MODEL, indexer=indexer)

    def batch(seed: int) -> Any:
        ids, labels = rows_of(seed)
        own = (
            mesh.local_slice(x, chunk_tokens=None)
            for x in (ids, labels, torch.arange(LENGTH).expand(ROWS, -1))
        )
        names = ("input_ids", "labels", "position_ids")
        rows = dict(zip(names, own, strict=True))
        return replace(batch_of(ids[0], mesh, model), **rows, documents=((LENGTH,),) * ROWS)

    optimizer = build_optimizer(model, Optimizer(lr=lr, weight_decay=0.0))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)
        train_step(model, optimizer, [batch(step)], mesh, max_norm=1.0)
    losses = []
    with torch.no_grad():
        for index in range(4):
            one = batch(HELD_OUT + index)
            count = (rows_of(HELD_OUT + index)[1] != -100).sum()
            losses.append(model(**one.inputs(), num_items_in_batch=count).loss.item())
    save_pretrained(model, target)
    return sum(losses) / len(losses)


def recall_of(folder: str) -> list[list[float]]:
    """Return, for each layer and eighth of the sequence, the share of dense attention of the keys
    that the indexer would choose: by unmodified transformers, on held-out rows.
    """
    import torch
    from torch import Tensor
    from torch.overrides import TorchFunctionMode
    from transformers import AutoModelForCausalLM

    class Scores(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[Tensor] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            if func is Tensor.topk:
                self.found.append(args[0])
            return func(*args, **(kwargs or {}))

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model.config.index_topk = LENGTH
    for block in model.model.layers:
        block.self_attn.indexer.index_topk = LENGTH  # dense
    with torch.no_grad(), Scores() as scores:
        ids = rows_of(HELD_OUT)[0]
        attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    found = []
    for weights, of_indexer in zip(attentions, scores.found, strict=True):
        best = of_indexer.topk(KEYS).indices
        covered = weights.mean(dim=1).gather(-1, best).sum(dim=-1)  # [B, S]
        found.append(covered.mean(dim=0).unflatten(0, (8, -1)).mean(dim=1).tolist())
    return found


def main() -> None:
    parser = parser_of(__doc__)
    stages = "of dense training, of the warm-up and of the joint stage"
    parser.add_argument("--steps", type=int, nargs=3, default=[1200, 200, 200], help=stages)
    parser.add_argument("--picture", type=Path, help="where recall by position is drawn")
    args = parser.parse_args()
    dense, warmup, joint = args.steps
    with tempfile.TemporaryDirectory() as folder:

        def train(name: str, source: str, steps: int, indexer: str, lr: float) -> float:
            started = f"{folder}/{source}" if source else ""
            given = started, f"{folder}/{name}", steps, indexer, lr
            return child(stage, *given, ranks=2, minutes=30, what=name)[0]

        def sparse(name: str) -> str:
            """Let each query of a model read an eighth of the keys."""
            path = Path(folder, name, "config.json")
            path.write_text(json.dumps(json.loads(path.read_text()) | {"index_topk": KEYS}))
            return name

        losses = {"dense": train("dense", "", dense, "frozen", 2e-3)}
        show("dense attention", losses["dense"], losses["dense"])
        losses["warmup"] = train("warmup", "dense", warmup, "warmup", 5e-3)
        for name, indexer in (("dense", "untrained indexer"), ("warmup", "after the warm-up")):
            show(indexer, train("tried", sparse(name), 0, "frozen", 1e-3), losses["dense"])
        final = train("joint", "warmup", joint, "joint", 1e-3)
        show("after the joint stage", final, losses["dense"])
        control = train("control", "dense", joint, "frozen", 1e-3)
        show("control: the model alone, as many steps", control, losses["dense"])
        recalls = {
            "untrained": recall_of(f"{folder}/dense"),
            "after the warm-up": recall_of(f"{folder}/warmup"),
            "after the joint stage": recall_of(f"{folder}/joint"),
        }
        for name, layers in recalls.items():
            means = ", ".join(f"{sum(x) / len(x):.3f}" for x in layers)
            last = ", ".join(f"{x[-1]:.3f}" for x in layers)
            print(f"  recall {name}: {means} of layers 0 and 1; in the last eighth {last}")
        if args.picture:
            draw(recalls, args.picture)


def show(what: str, loss: float, dense: float) -> None:
    share = f"{loss / dense:.3f} of dense attention's"
    print(f"  {what}: held-out loss {loss:.4f}, {share}")


def draw(recalls: dict[str, list[list[float]]], path: Path) -> None:
    from titan_ulysses.observability.pictures import COLORS, picture

    with picture(path, size=(8, 3.2), panels=(1, 2)) as (_, panels):
        for layer, axes in enumerate(panels):
            for (name, layers), color in zip(recalls.items(), COLORS, strict=False):
                places = [(i + 0.5) * LENGTH / 8 for i in range(8)]
                axes.plot(places, layers[layer], "o-", label=name, color=color)
            axes.set(title=f"layer {layer}", xlabel="position of the query", ylim=(0, 1.02))
        panels[0].set_ylabel(f"attention to the {KEYS} chosen keys")
        panels[0].legend(frameon=False)


if __name__ == "__main__":
    main()
