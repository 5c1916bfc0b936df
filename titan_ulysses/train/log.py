"""What a log line says of a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from titan_ulysses.data.loader import Loader
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.train.step import StepMetrics


def details(shown: StepMetrics, loader: Loader, mesh: Mesh) -> dict[str, Any]:
    """Return the metrics of the last step that not every run has, by name. Collective.

    `router_loss` (None without routers), `rewards` of DPO, and of a mixture `loss_by_source`: the
    mean over the labels (or pairs) of each source that the step has, where the loss knows it.
    """
    router_loss = shown.router_loss
    found: dict[str, Any] = {"router_loss": None if router_loss is None else router_loss.item()}
    if shown.metrics:
        found["rewards"] = {name: value.item() for name, value in shown.metrics.items()}
    names = loader.sequences.source_names
    if names and shown.row_losses:
        found["loss_by_source"] = _by_source(shown.row_losses, loader, names, mesh)
    return found


def _by_source(
    rows: list[Tensor], loader: Loader, names: list[str], mesh: Mesh
) -> dict[str, float]:
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    for batch, of_batch in enumerate(rows):
        sources = loader.sources(len(rows) - batch)
        places = torch.tensor([names.index(name) for name in sources])
        sums.index_add_(1, places, of_batch.cpu())
    sums = sums.to(mesh.device)
    dist.all_reduce(sums, group=mesh.loss.get_group())
    of_sources = zip(names, *sums.tolist(), strict=True)
    return {name: total / count for name, total, count in of_sources if count}
