"""transformers' Trainer and TRL's SFT, DPO, GRPO and reward trainers, with sequence parallelism.

    class LongTrainer(UlyssesTrainer, SFTTrainer): ...

    mesh = build_mesh(sequence=8)
    trainer = LongTrainer(model, args=SFTConfig(...), train_dataset=data, mesh=mesh)
    trainer.train()

The trainer gets the unsharded model, and works on it as ever: it adds LoRA, makes a reference
model, prepares the data. Then its models are sharded (`parallelize`). From there on a sharded model
takes the trainer's own batches, of whole sequences, and each rank computes its slice. To the
trainer, the ranks that share a sequence are one: they read the same batch and get the same loss.
Its data loader and its metrics count data-parallel ranks only, and gradients are the mean of those
of their losses, as under DDP.

Nothing is patched but instances: the model's forward, as `parallelize` does, and two methods of
the trainer's own Accelerator.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import copy
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import PreTrainedModel, set_seed

from titan_ulysses.checkpoint.saving import load_checkpoint, save_checkpoint, save_pretrained
from titan_ulysses.distributed.errors import UserError, failing_together
from titan_ulysses.distributed.mesh import Mesh
from titan_ulysses.distributed.sequence import IGNORE_INDEX
from titan_ulysses.model.hf import classifies
from titan_ulysses.model.nf4 import full_tensor
from titan_ulysses.setup.options import ParallelOptions
from titan_ulysses.setup.parallelize import parallelize
from titan_ulysses.train.huggingface.compatibility import check, is_of_trl
from titan_ulysses.train.huggingface.whole_batches import (
    EachRowOnce,
    gather,
    rows_of,
    take_whole_batches,
)
from titan_ulysses.train.step import clip_gradients

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # a mixin, beside any trainer

_SHARDED = "sharded"
"""The folder in a checkpoint-N with what `save_checkpoint` writes."""


class UlyssesTrainer(_Trainer):
    """A mixin: name it before the trainer's class (see above).

    mesh: that of `build_mesh`, whose ranks all run this trainer. options: the keywords of
    `parallelize`, as in {"memory": {"mlp_tile_tokens": 512}}.
    With bf16 = True the model computes in bf16; its parameters keep their dtype. Activation
    checkpointing is that of `options`, whatever gradient_checkpointing says. The rest of the
    trainer's arguments mean what they mean without sequence parallelism, for mesh.batch.size()
    data-parallel ranks. UserError for arguments that would be wrong, by name.
    """

    def __init__(
        self,
        *positional: Any,
        mesh: Mesh | None = None,
        options: dict[str, Any] | ParallelOptions | None = None,
        **named: Any,
    ):
        if not isinstance(mesh, Mesh):
            raise UserError(
                f"mesh = {mesh}: pass a mesh of all ranks, as in build_mesh(sequence=2)."
            )
        self.ulysses_mesh = mesh
        self.ulysses_options = ParallelOptions().changed(**dict(options or {}))
        more = signature(super().__init__).bind_partial(*positional).arguments | named
        args = more.pop("args", None)
        check(type(self), args, more)
        args = copy(args)
        # The smoothed loss is made where the logits are. The trainer's own reads those of all.
        self._label_smoothing = args.label_smoothing_factor
        args.label_smoothing_factor = 0.0
        if args.bf16 and self.ulysses_options.param_dtype is None:
            self.ulysses_options = self.ulysses_options.changed(param_dtype=torch.bfloat16)
        for setting in ("gradient_checkpointing", "activation_checkpointing"):
            if hasattr(args, setting):
                setattr(args, setting, False)
        # The trainer would multiply the loss by all ranks; `_get_num_items_in_batch` counts them.
        args.average_tokens_across_devices = False
        if hasattr(args, "generation_batch_size"):  # the config counts all ranks
            args.generation_batch_size //= mesh.sp.size()
        self.ulysses_model: PreTrainedModel | None = None  # until it is sharded
        self._reads_each_row_once = False
        super().__init__(args=args, **more)
        if getattr(self, "aux_loss_enabled", False):
            raise UserError(
                "router_aux_loss_coef: this trainer adds the routers' loss itself, of one rank's "
                "tokens. Set router_aux_loss_coef = 0.0, or train with train.py."
            )
        if hasattr(self, "rollout_func"):  # it draws the order of completions, seeded by rank
            set_seed(args.seed + mesh.batch.get_local_rank())
        self.ulysses_model = self._sharded(self.model)
        if self.ulysses_model.sharding.vision is not None:
            # Their own forward does not; the trainer would divide the loss of a step once more.
            self.model_accepts_loss_kwargs = True
        if isinstance(getattr(self, "ref_model", None), nn.Module):
            self.ref_model.requires_grad_(False)
            self._sharded(self.ref_model)

    def _sharded(self, model: nn.Module) -> PreTrainedModel:
        """Shard a model, or what is inside of a PeftModel, and let it take whole batches."""
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        parallelize(base, self.ulysses_mesh, self.ulysses_options)
        temperature = getattr(self, "temperature", 1.0)  # of GRPO's distributions
        smoothing = self._label_smoothing
        take_whole_batches(
            base, self.ulysses_mesh, temperature=temperature, label_smoothing=smoothing
        )
        if base is not model:
            # peft calls the base model's forward past its hooks, and with them past FSDP.
            model.base_model.forward = base.__call__
            model.save_pretrained = MethodType(_save_adapters, model)
        model._is_accelerate_prepared = True  # Accelerate would wrap it in DDP
        return base

    # --- data and counts, for data-parallel ranks -------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        mesh, accelerator = self.ulysses_mesh, self.accelerator
        if accelerator.num_processes != mesh.loss.size():
            raise UserError(
                f"mesh: it has {mesh.loss.size()} ranks, and the trainer has "
                f"{accelerator.num_processes}: start the script with torchrun, build the mesh of "
                "all ranks, and where there is no GPU, set use_cpu = True."
            )
        accelerator.__class__ = _of_data_parallel(type(accelerator), mesh)
        accelerator.prepare_data_loader = self._prepared_loader
        accelerator.gather = self._gather
        accelerator.save_state = accelerator.load_state = _refuse_state

    def _prepared_loader(self, loader: Any, *_: Any, **__: Any) -> Any:
        """Return the loader that reads the batches of this rank's sequences."""
        from accelerate.data_loader import prepare_data_loader

        accelerator, batch = self.accelerator, self.ulysses_mesh.batch
        ranks = {"num_processes": batch.size(), "process_index": batch.get_local_rank()}
        if self._reads_each_row_once and not isinstance(loader.dataset, IterableDataset):
            each = EachRowOnce(loader.batch_sampler, batch.size(), batch.get_local_rank())
            # torch refuses another sampler; this loader is only read for what the next is made of.
            object.__setattr__(loader, "batch_sampler", each)
            ranks = {"num_processes": 1, "process_index": 0}
        prepared = prepare_data_loader(
            loader,
            accelerator.device,
            **ranks,
            put_on_device=True,
            rng_types=accelerator.rng_types.copy(),
            dispatch_batches=False,
            even_batches=accelerator.even_batches,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    def get_eval_dataloader(self, *dataset: Any, **named: Any) -> Any:
        return self._of_each_row_once(super().get_eval_dataloader, *dataset, **named)

    def get_test_dataloader(self, *dataset: Any, **named: Any) -> Any:
        return self._of_each_row_once(super().get_test_dataloader, *dataset, **named)

    def _of_each_row_once(self, get_loader: Callable[..., Any], *data: Any, **named: Any) -> Any:
        # Trainers that are given completions need groups of them, of the same size on each rank.
        self._reads_each_row_once = not hasattr(self, "rollout_func")
        try:
            return get_loader(*data, **named)
        finally:
            self._reads_each_row_once = False

    def _has_rows(self) -> bool | None:
        """Return whether this rank has rows of the last step of an evaluation, which some have not.

        None in all other steps: all ranks have as many.
        """
        state = self.accelerator.gradient_state
        each = getattr(state.active_dataloader, "batch_sampler", None)
        if not (isinstance(each, EachRowOnce) and state.end_of_dataloader and state.remainder > 0):
            return None
        return each.has_rows(state.remainder)

    def _gather(self, data: Any) -> Any:
        return gather(self.ulysses_mesh.batch.get_group(), data, own=self._has_rows())

    def get_total_train_batch_size(self, args: Any) -> int:
        return super().get_total_train_batch_size(args) // self.ulysses_mesh.sp.size()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Return the labels of the step on all ranks, divided by the data-parallel ranks.

        The mean over these of the sums divided by it is the loss of the step.
        """
        scores = self.ulysses_model is not None and classifies(self.ulysses_model)
        if scores or not batch_samples or "labels" not in batch_samples[0]:
            return None
        vision = self.ulysses_model.sharding.vision
        labels = [rows_of(batch, vision).labels for batch in batch_samples]
        count = torch.stack([(x != IGNORE_INDEX).sum() for x in labels]).sum().to(device)
        dist.all_reduce(count, group=self.ulysses_mesh.batch.get_group())
        return count.double() / self.ulysses_mesh.batch.size()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        if return_outputs and is_of_trl(type(self)) and not classifies(self.ulysses_model):
            raise UserError(
                "compute_loss(return_outputs=True): this trainer returns the logits of whole "
                "sequences, which are never materialized. Leave return_outputs out."
            )
        # In evaluation too, the loss of a batch is that of all ranks' labels.
        if num_items_in_batch is None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)
        found = super().compute_loss(
            model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
        )
        if model.training or num_items_in_batch is None:
            return found
        # Some trainers return that of this rank's labels, which the mean over ranks is made of. But
        # in evaluation a rank counts by its rows.
        loss, *outputs = found if return_outputs else (found,)
        group = self.ulysses_mesh.batch.get_group()
        loss = gather(group, loss.detach()).mean()
        return (loss, *outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *how: Any, **named: Any):
        if not is_of_trl(type(self)) and inputs.get("labels") is None:
            raise UserError(
                "evaluate: eval_dataset has rows without labels, for which there is no loss, and "
                "the logits of whole sequences are never materialized. Give them labels, or score "
                "the rows with titan_ulysses.score."
            )
        if self._has_rows() is False and "labels" in inputs:
            inputs = {**inputs, "labels": torch.full_like(inputs["labels"], IGNORE_INDEX)}
        return super().prediction_step(model, inputs, *how, **named)

    def predict(self, *_: Any, **__: Any) -> Any:
        raise UserError(
            "predict: it returns the logits of whole sequences, which are never materialized. Use "
            "evaluate for the loss, or titan_ulysses.score for the log-probability of each label."
        )

    # --- given completions (GRPO) -----------------------------------------------------------------

    def _calculate_rewards(self, *inputs: Any) -> Tensor:
        """Return the rewards of all data-parallel ranks: of a sequence's ranks, those of one."""
        rewards = super()._calculate_rewards(*inputs)
        mesh = self.ulysses_mesh
        of_ranks = rewards.view(mesh.batch.size(), mesh.sp.size(), -1, rewards.shape[-1])
        return of_ranks[:, 0].flatten(0, 1)

    # --- gradients --------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return clip_gradients(list(model.parameters()), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor:
        return clip_gradients(list(model.parameters()), 0.0) if grad_norm is None else grad_norm

    def _move_model_to_device(self, *_: Any) -> None:
        """Leave the whole model where it is: `parallelize` moves this rank's shards."""

    # --- saving and resuming ----------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what from_pretrained opens to output_dir, adapters merged. Collective."""
        folder = Path(output_dir or self.args.output_dir)
        part, tokenizer = folder / ".model", self.processing_class
        save_pretrained(self.ulysses_model, part, getattr(tokenizer, "tokenizer", tokenizer))
        # Beside what is there: the folder may hold checkpoints.
        if dist.get_rank() == 0:
            for file in part.iterdir():
                file.replace(folder / file.name)
            shutil.rmtree(part)
        dist.barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = {"step": self.state.global_step, "scheduler": self.lr_scheduler.state_dict()}
        folder, optimizer = Path(output_dir, _SHARDED), _unwrapped(self.optimizer)
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier run in this folder
        dist.barrier()
        save_checkpoint(folder, self.ulysses_model, optimizer, state)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """Only check the checkpoint: the model is loaded with the optimizer, once that is made."""
        if not Path(checkpoint, _SHARDED).is_dir():
            raise UserError(
                f"resume_from_checkpoint = {checkpoint}: it has no {_SHARDED}/ with the shards of "
                "model and optimizer. Resume from a checkpoint that this trainer wrote with "
                "save_only_model = False, or begin from its model by from_pretrained."
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            folder, optimizer = Path(checkpoint, _SHARDED), _unwrapped(self.optimizer)
            state = load_checkpoint(folder, self.ulysses_model, optimizer)
            self.lr_scheduler.load_state_dict(state["scheduler"])

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        self._load_from_checkpoint(best)
        load_checkpoint(Path(best, _SHARDED), self.ulysses_model)


@torch.no_grad()
def _save_adapters(model: nn.Module, save_directory: str | Path, **options: Any) -> None:
    """Write the adapters of a PeftModel, as its own save_pretrained does. Collective."""
    kept = {
        name: full_tensor(p).cpu()
        for name, p in model.named_parameters()
        if p.requires_grad or model.base_model.prefix in name
    }

    def failed(reason: str) -> UserError:
        return UserError(f"save_pretrained: {save_directory}: {reason}")

    with failing_together(Exception, error=failed):  # peft raises whatever it likes
        if dist.get_rank() == 0:
            type(model).save_pretrained(model, save_directory, **{"state_dict": kept} | options)


def _refuse_state(*_: Any, **__: Any) -> None:
    raise UserError(
        "accelerator.save_state and load_state: each rank has a piece of the model. Set "
        'save_strategy = "steps", or call titan_ulysses.save_checkpoint(folder, '
        "trainer.ulysses_model, trainer.optimizer.optimizer, state) and load_checkpoint on every "
        "rank."
    )


def _of_data_parallel(kind: type, mesh: Mesh) -> type:
    """Return a class of accelerators that count data-parallel ranks."""
    ranks = {"num_processes": mesh.batch.size(), "process_index": mesh.batch.get_local_rank()}
    return type(kind.__name__, (kind,), ranks)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return torch's optimizer, which Accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
