"""A training run: setup and the loop, from top to bottom."""

from __future__ import annotations

import contextlib
import json
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.dcp import Checkpointer
from titan_ulysses.checkpoint.disk import disk_needs
from titan_ulysses.checkpoint.folder import exported_step
from titan_ulysses.checkpoint.initial import (
    base_weights,
    check_initial_weights,
    initialize,
    needs_initial_weights,
)
from titan_ulysses.checkpoint.state import saved_bytes
from titan_ulysses.config.load import dump_toml
from titan_ulysses.config.schema import Config
from titan_ulysses.data.loader import Loader
from titan_ulysses.data.pipeline import open_sequences, open_validation_sets
from titan_ulysses.distributed.collectives import CollectiveCounter
from titan_ulysses.distributed.device import device_type, module_of
from titan_ulysses.distributed.errors import UserError, first_failure
from titan_ulysses.distributed.hardware import peak_flops
from titan_ulysses.distributed.mesh import build_mesh, init_distributed, set_timeout
from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.launch.agreement import Ranks
from titan_ulysses.launch.failure import leave_together
from titan_ulysses.model import hf
from titan_ulysses.model.families import attention_needs, largest_head
from titan_ulysses.observability.metrics import (
    MetricsLogger,
    PeakMemory,
    attention_flops,
    describe_sets,
    flops_per_token,
)
from titan_ulysses.observability.profiling import profiled
from titan_ulysses.observability.progress import BlockWork, Progress, shows
from titan_ulysses.observability.run_page import write_run_page
from titan_ulysses.observability.units import time_text
from titan_ulysses.observability.wandb import WandbRun
from titan_ulysses.optim.adamw import describe_state, expected_bytes
from titan_ulysses.optim.build import optimizer_of
from titan_ulysses.setup.blocks import find_blocks
from titan_ulysses.setup.build import build_model
from titan_ulysses.setup.resolve import check_machine, resolve
from titan_ulysses.train.best import Best
from titan_ulysses.train.drift import expect_no_drift
from titan_ulysses.train.evaluation import Found, held_out_batches, together
from titan_ulysses.train.exhausted import named_out_of_memory
from titan_ulysses.train.folder import RunFolder
from titan_ulysses.train.imbalance import Imbalance
from titan_ulysses.train.loss import DPO, build_loss, details
from titan_ulysses.train.nonfinite import NonFinite
from titan_ulysses.train.preflight import Preflight, timeout_of_step
from titan_ulysses.train.references import FILE as REFERENCES
from titan_ulysses.train.references import References
from titan_ulysses.train.resume import data_settings, warnings_of
from titan_ulysses.train.signals import HOSTS_CHANGE, RESTART, StopSignals
from titan_ulysses.train.step import StepMetrics, learning_rate, train_step
from titan_ulysses.train.summary import print_completion, print_run_summary, print_wrapped
from titan_ulysses.ulysses.cores import varlen
from titan_ulysses.ulysses.kernels import NAMES, activate_fastest, active

if TYPE_CHECKING:
    from titan_ulysses.data.packing import SampleStream


class Trainer:
    """One run, as `config` describes it, on the ranks that torchrun has started or on a single one.

    With eval_only there is no training data, no optimizer and no plan, and the existing files of
    the run stay as they are. Only `evaluate` can be called then. With own_process, which train.py
    sets, settings of the whole process may be changed for the run: which FlashAttention is behind
    torch's flash operators (see ulysses/kernels.py).
    """

    def __init__(self, config: Config, *, eval_only: bool = False, own_process: bool = False):
        self.config, self._own_process = config, own_process
        self.console = Console(quiet=int(os.environ.get("RANK", 0)) != 0)  # only rank 0 prints
        self._run_folder = RunFolder(config, say=self._say)
        self.folder = self._run_folder.path

        self.ranks = Ranks(config)
        self.preflight: Preflight | None = None
        try:
            with named_out_of_memory(lambda: "the start", lambda: self.preflight):
                training, held_out = self._resolve(eval_only=eval_only)
                self._build(training, held_out)
                self._start(eval_only=eval_only)
        except BaseException:
            self._run_folder.release()
            raise

    # --- resolve: check the input, before a process group or a weight exists ----------------------

    def _resolve(self, *, eval_only: bool) -> tuple[SampleStream | None, dict[str, SampleStream]]:
        """Check the input; return the training sequences, and the held-out sequences by name.

        Those that are not a named set have the name "".
        """
        config = self.config
        self.spec = resolve(
            config,
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            device_type=device_type(),
            with_tokenizer=True,
        )
        self.degrees = self.spec.degrees
        check_machine(self.spec)
        self._run_folder.check()
        if not eval_only:
            self._run_folder.lock_if_there()
        folder, shared = self.folder / config.checkpoint.folder, config.checkpoint.shared
        if config.checkpoint.enable and shared:
            self.ranks.expect_one_folder(self.folder, f"job.dump_folder = {config.job.dump_folder}")
        self.checkpointer = Checkpointer(
            folder,
            keep=config.checkpoint.keep_latest_k,
            hosts=() if shared else self.ranks.hosts,
            in_background=config.checkpoint.async_mode == "async",
            say=self._say,
        )
        self.saved_steps = self._agree_on_checkpoints()
        if needs_initial_weights(config, self.saved_steps):
            check_initial_weights(config)
        training, held_out = open_sequences(config, self.spec.tokenizer, eval_only=eval_only)
        sets = open_validation_sets(config, self.spec.tokenizer)
        if eval_only:
            self._check_weights()
        return training, sets if held_out is None else {"": held_out}

    def _choose_kernel(self) -> str | None:
        """Return which FlashAttention the core varlen calls, as a sentence; None for other cores.

        The fastest one is put there first, if the process is the run's own.
        """
        spec = self.spec
        if spec.core is not varlen:
            return None
        if self._own_process:
            return activate_fastest(
                head_size=largest_head(spec.model_config),
                window="window" in attention_needs(spec.model_config),
            )
        return f"attention kernel: {NAMES[active()]}"

    # --- build: mesh, loaders, model --------------------------------------------------------------

    def _build(self, training: SampleStream | None, held_out: dict[str, SampleStream]) -> None:
        """Join the process group, and make the mesh, the loaders and the model.

        The memory of the model is allocated and not filled.
        """
        config, degrees = self.config, self.degrees
        if config.training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
            torch.use_deterministic_algorithms(True)
        timeout = config.comm.startup_timeout_s
        init_distributed(timeout=timeout)
        self.attention_kernel = self._choose_kernel()  # this rank has its device now
        self.mesh = build_mesh(
            replicate=degrees.replicate,
            shard=degrees.shard,
            sequence=degrees.sequence,
            timeout=timeout,
        )
        self.model, self.float8_layers = build_model(self.spec, self.mesh)
        self.loader = None if training is None else self._loader(training)
        self.validation_loaders = {name: self._loader(one) for name, one in held_out.items()}
        self.references, stored = None, None
        if config.loss.precompute_reference:
            self.references = References(config, training, held_out)
            if training is not None and self.saved_steps:
                stored = self.references.load(self.folder)
        self.loss = build_loss(self.spec, self.model, self.mesh, stored=stored)
        offload = config.memory.parameter_offload
        hf.allocate(self.model, self.mesh.device, parameter_offload=offload)
        self.loss.allocate(parameter_offload=offload)
        if base := base_weights(config):
            weights.keep_generation_config(self.model, base.path)

    # --- start: weights, optimizer, plan, folder --------------------------------------------------

    def _start(self, *, eval_only: bool) -> None:
        """Fill the model with its first or resumed weights, and print what the run is.

        Before the first step, the optimizer is built and the plan is checked.
        """
        self.optimizer = None
        self.best, self._is_best = Best(self.config), False
        self.numbers = NonFinite(self, latest=self._latest, say=self._say)
        if not eval_only:
            self.preflight = self._start_preflight()
            self.optimizer = optimizer_of(
                self.model,
                self.config.optimizer,
                offload=self.config.memory.optimizer_offload,
                skips=self.config.training.skip_nonfinite > 0,
            )
        self.loss.fill(self.config)
        self.step = self._resume_or_initialize()
        self.collectives: dict[str, dict[str, int]] = {}
        self.imbalance = Imbalance()
        self._check_plan()
        if not eval_only:
            # Not earlier: a refused command must not replace the config of an existing run.
            self._open_folder()
        self.peak_memory = PeakMemory(self.mesh.device)
        print_run_summary(self)
        if self.references and not self.references.are_there:
            assert isinstance(self.loss, DPO)
            self.references.compute(self.loss, self._loader, self.mesh, self.console)
            if self.config.checkpoint.enable and not eval_only:
                content = self.references.as_bytes(self.loss.fingerprint())
                self._run_folder.write(REFERENCES, content)
            self.peak_memory = PeakMemory(self.mesh.device)  # of the steps, without the reference

    def _loader(self, sequences: SampleStream) -> Loader:
        mesh = self.mesh
        return Loader(
            sequences,
            batch_size=self.config.training.local_batch_size,
            batch_rank=mesh.batch.get_local_rank(),
            batch_degree=mesh.batch.size(),
            accumulation_steps=self.degrees.accumulation_steps,
            sp_rank=mesh.sp.get_local_rank(),
            sp_degree=mesh.sp.size(),
            stream_chunk_tokens=self.model.stream_chunk_tokens,
            vocab_size=getattr(self.model.config.get_text_config(), "vocab_size", None),
        )

    def _open_folder(self) -> None:
        """Make the run's folder and write the resolved config to it; UserError if that fails."""
        self._run_folder.open()
        self._run_folder.write("config.toml", dump_toml(self.config))
        self.checkpointer.remove_unfinished()
        self.checkpointer.set_damaged_aside()

    def _check_weights(self) -> None:
        """Raise UserError if the only model to evaluate would be a random one."""
        if not self.saved_steps and not (
            self.config.model.path or self.config.checkpoint.initial_load_path
        ):
            raise UserError(
                f"--evaluate: there is no model yet: {self.checkpointer.folder} has no checkpoint, "
                "and model.path is not set. Train first, or set model.path to a folder with "
                "weights, such as the export/ of a run."
            )

    def _agree_on_checkpoints(self) -> list[int]:
        """Return the steps of the checkpoints to resume from: those that all hosts have.

        If they share a folder, rank 0 alone looks: the view of another host may be old.
        """
        if not self.config.checkpoint.enable:
            return []
        ranks, shared = self.ranks, self.config.checkpoint.shared
        looks = ranks.rank == 0 or not shared or ranks.watch is None  # which decides alone

        def common(steps: list[list[int] | None]) -> list[int]:
            return sorted(set.intersection(*(set(seen) for seen in steps if seen is not None)))

        return self.ranks.decide(
            "checkpoints", self.checkpointer.steps() if looks else None, common
        )

    def _latest(self) -> int | None:
        """Return the step of the last checkpoint, after one that is still being written."""
        with suppress(UserError):
            self.checkpointer.finish()
        return self.checkpointer.latest() if self.config.checkpoint.enable else None

    def _resume_or_initialize(self) -> int:
        """Fill the model; return the number of steps that are already done."""
        needed = needs_initial_weights(self.config, self.saved_steps)
        if needed and (note := initialize(self.model, self.config)):
            self._say(note)
        if not self.saved_steps:
            return 0
        step, state = self.checkpointer.load_newest(
            self.saved_steps, self.model, self.optimizer, needs=("loader", "rng")
        )
        if self.loader:
            self.loader.load_state_dict(state["loader"])
            self.numbers.skipped = state.get("skipped", 0)
            content, beside = self.loader.sequences.content(), self.loss.fingerprint()
            warnings = warnings_of(self.config, step, state, content=content, beside=beside)
            for warning in filter(None, [*warnings, self.best.load(state.get("best"))]):
                self._say(warning)
        return step

    def _start_preflight(self) -> Preflight | None:
        """Start to plan this run, on rank 0, while the weights are filled."""
        if dist.get_rank():
            return None
        device, parameters = self.mesh.device, list(self.model.parameters())
        gpu = None if device.type == "cpu" else module_of(device).get_device_properties(device)
        return Preflight(
            self.config,
            world_size=dist.get_world_size(),
            # 16 bytes: parameter, gradient and two moments in fp32.
            model_bytes=sum(
                p.numel() * (16 if p.requires_grad else p.itemsize) for p in parameters
            ),
            gpu_memory=gpu and gpu.total_memory,
            gpu=gpu.name if gpu else "",
            attention_kernel=active() if self.spec.core is varlen else "auto",
        )

    def _check_plan(self) -> None:
        """Raise UserError, on every rank, if the run must not start.

        That is if plan.enforce is set and the plan does not fit, or if the disk has no room for a
        checkpoint.
        """
        self.plan_lines = self.preflight.lines() if self.preflight else []
        if self.optimizer is None:
            return
        disk = disk_needs(
            self.config,
            self.folder,
            model=int(self._part_saved_here() * saved_bytes(self.model)),
            optimizer=int(self._part_saved_here() * expected_bytes(self.optimizer)),
            export=weights.exported_bytes(self.model),
            there=len(self.checkpointer.steps()),
            done=self.step,
        )
        self.plan_lines += disk.lines()
        obstacle = self.preflight.obstacle() if self.preflight else None
        if obstacle := first_failure(obstacle or disk.obstacle()):
            raise UserError(obstacle)

    def _part_saved_here(self) -> float:
        """Return how much of a checkpoint goes to the folder of this host, as a fraction."""
        if self.config.checkpoint.shared:
            return 1.0
        ranks = self.ranks.hosts.count(self.ranks.own_host)
        return min(1.0, ranks / (self.degrees.shard * self.degrees.sequence))

    # --- validation alone -------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Evaluate the model that training would continue from, on the held-out data.

        The result goes to the console and to <run>/evaluation.json.
        """
        is_checkpoint = bool(self.saved_steps)
        initial = self.config.checkpoint.initial_load_path or self.config.model.path
        weights_of = self.checkpointer.folder / f"step-{self.step}" if is_checkpoint else initial
        with self._progress(steps=1, done=0) as self.progress:
            sets, found = self._validate(None)
        held_out = {name: one.sequences.describe() for name, one in self.validation_loaders.items()}
        values: dict[str, Any] = {"weights": str(weights_of)}
        values["held_out"] = held_out.get("") or held_out
        if "" not in sets:
            values["sets"] = {name: one.as_json() for name, one in sets.items()}
        self._run_folder.write(
            "evaluation.json", json.dumps(values | found.as_json(), indent=2) + "\n"
        )
        self._say(f"{weights_of}: " + "\n".join([*found.describe(), *describe_sets(sets)]))
        self._say(f"Written to {self.folder / 'evaluation.json'}")

    # --- the loop ---------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the last step, or until SIGTERM or Ctrl-C.

        Checkpoints are saved on the way. After the last step, export the model and print where all
        files are.
        """
        try:
            with named_out_of_memory(lambda: f"step {self.step + 1}", lambda: self.preflight):
                self._train()
        except UserError:
            with suppress(UserError):
                self.checkpointer.finish()
            raise
        finally:
            self._run_folder.release()

    def _train(self) -> None:
        config, total = self.config, self.config.training.steps
        if (self.step >= total or self.best.ends_run) and self._is_exported():
            self._say(f"Finished: {self.folder} has {self._how_far()}.")
            return
        logger = None
        if dist.get_rank() == 0:
            logger = MetricsLogger(
                self.folder,
                steps_done=self.step,
                total_steps=total,
                console=self.console,
                wandb=self._start_wandb(),
            )
        self._first_step = self.step
        try:
            with (
                self._progress(steps=total, done=self.step) as self.progress,
                StopSignals(self._acknowledge) as self.signals,
            ):
                self._train_steps(logger)
        finally:
            if logger:
                logger.close()
            if self.preflight:
                self.preflight.close()
        if self.step < total and not self.best.ends_run:
            self._end_early()
            return
        self._take_best()
        if config.checkpoint.export:
            self.numbers.expect_finite_model()
            if not config.checkpoint.enable:  # else the last checkpoint has been looked at
                expect_no_drift(self, self.ranks.hosts, self._latest)
            if config.lora.rank:
                base = base_weights(config)
                weights.save_adapters(
                    self.model, self.folder / "adapter", base=base.path if base else ""
                )
            step = self._exported_step
            weights.export(self.model, self.spec.tokenizer, self.folder / "export", step=step)
        self._write_page()
        print_completion(self)

    def _write_page(self) -> None:
        """Write report.html on rank 0. What the run was for is there without it."""
        if self.config.metrics.enable_report and dist.get_rank() == 0:
            try:
                write_run_page(self.folder)
            except (OSError, UserError) as error:
                self._say(f"WARNING: report.html cannot be written: {error}")

    def _train_steps(self, logger: MetricsLogger | None) -> None:
        config, total = self.config, self.config.training.steps
        if self.step == 0 and config.validation.enable:
            self._validate(logger)
        self._start_interval()
        tokens = self.spec.local_tokens * self.degrees.accumulation_steps
        with profiled(config.profiling, self.folder, self.step + 1) as step_is_over:
            while self.step < total and not self.best.ends_run:
                self._is_best = False
                self.progress.begin(
                    f"step {self.step + 1}", tokens=tokens, trains=True, is_step=True
                )
                if self._must_stop():
                    break
                self._train_one_step(logger)
                step_is_over(self.step)
                if self._saves_now() or (self._is_best and self.best.keeps):
                    with self._excluded_from_step_time():
                        self.save()
        if self.step < total and config.checkpoint.enable:
            self.save()
        self.checkpointer.finish()

    @property
    def _exported_step(self) -> int:
        """The step whose model is exported: the best one if it is kept, else the last one."""
        best = self.best.step if self.best.keeps else None
        return self.step if best is None else best

    def _take_best(self) -> None:
        """Fill the model with the best checkpoint, if it is kept. Say why the run ends early."""
        if self.step < self.config.training.steps:
            self._say(f"Ended: {self._how_far()}.")
        if (step := self._exported_step) != self.step:
            self.checkpointer.load(step, self.model, None)
            self._say(f"The best checkpoint is exported: {self.best.describe()}.")

    def _how_far(self) -> str:
        if self.step >= self.config.training.steps:
            return f"all {self.step} steps. To go on, raise training.steps"
        return (
            f"{self.step} steps, of which the last {self.best.waited} validations were not better "
            f"than {self.best.describe()}. To go on, raise validation.patience"
        )

    def _start_wandb(self) -> WandbRun | None:
        if not self.config.metrics.enable_wandb:
            return None
        return WandbRun(
            self.folder, name=self.config.job.name, config=self.config.model_dump(), say=self._say
        )

    def _saves_now(self) -> bool:
        checkpoint = self.config.checkpoint
        return checkpoint.enable and (
            self.step % checkpoint.interval == 0 or self.step == self.config.training.steps
        )

    def _train_one_step(self, logger: MetricsLogger | None) -> None:
        config = self.config
        # Dropout, if the model has any, draws from (seed, step, rank), so that a resumed run draws
        # the same numbers.
        torch.manual_seed(seed_of(config.training.seed, self.step, dist.get_rank()))
        assert self.loader is not None
        batches = [
            self.loader.next_batch().to(self.mesh.device)
            for _ in range(self.degrees.accumulation_steps)
        ]
        if told := self.imbalance.note(self.step + 1, self.loader):
            self._say(told)
        lr = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.steps_before = self.step
        # Every step calls the same collectives. It is enough to count those of the first one, which
        # is slow anyway.
        with contextlib.nullcontext() if self.collectives else CollectiveCounter() as counter:
            shown = train_step(
                self.model,
                self.optimizer,
                batches,
                self.mesh,
                max_norm=config.training.max_norm,
                skip_nonfinite=config.training.skip_nonfinite > 0,
                loss=self.loss,
            )
        self.numbers.note(self.step + 1, shown)
        if counter:
            self._end_startup()
            self._say(describe_state(self.optimizer))
            self.collectives = {
                kind: {"calls": c, "bytes": b} for kind, (c, b) in sorted(counter.counts.items())
            }
        self.step += 1
        self.progress.finish_step()
        self._attention_flops += sum(
            attention_flops(self.model.config, batch.documents) for batch in batches
        )
        if (
            self.step % config.metrics.log_interval == 0
            or self.step == config.training.steps
            or self._saves_now()
        ):
            self._log(logger, shown, lr)
        validation = config.validation
        if validation.enable and (
            self.step % validation.interval == 0 or self.step == config.training.steps
        ):
            with self._excluded_from_step_time():
                self._validate(logger)

    def _end_startup(self) -> None:
        """Expect quicker answers of the other ranks, now that all have made a step."""
        timeout = self._timeout()
        set_timeout(timeout)
        if self.ranks.watch:
            self.ranks.watch.timeout_s = timeout

    def _timeout(self) -> float:
        """Return comm.timeout_s, or what follows from the plan, which rank 0 has. Collective."""
        chosen = self.config.comm.timeout_s
        if chosen > 0:
            return chosen
        planned = self.preflight.planned_seconds if self.preflight else 0.0
        seconds = torch.tensor(planned, dtype=torch.float64)
        dist.broadcast(seconds, src=0)
        timeout = timeout_of_step(seconds.item())
        if timeout > timeout_of_step(0):
            self._say(
                f"comm.timeout_s: {timeout:,.0f} s, four times the planned step of "
                f"{time_text(seconds.item())}"
            )
        return timeout

    def _log(self, logger: MetricsLogger | None, shown: StepMetrics, lr: float) -> None:
        """Log a step. The wait for the device is here, so that other steps do not wait for it."""
        steps = self.step - self._logged_step
        device = self.mesh.device
        config = self.config.training
        # This waits until the device has finished the step, before the clock is read.
        self.numbers.expect_finite_steps()
        loss, grad_norm = shown.loss.item(), shown.grad_norm.item()
        # The ranks that share a sequence count the same documents, so each adds its part.
        attention = torch.tensor(self._attention_flops / self.degrees.sequence, dtype=torch.float64)
        dist.all_reduce(attention)
        balance = self.imbalance.take()
        assert self.loader is not None
        of_loss = details(shown, self.loader, self.mesh)
        peak = torch.tensor(self.peak_memory.gib())
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        seconds = time.perf_counter() - self._clock
        tokens = steps * self.degrees.global_batch_size * config.seq_len
        device_name = "" if device.type == "cpu" else module_of(device).get_device_name(device)
        peak_rate = peak_flops(device_name) if config.param_dtype == "bfloat16" else None
        flops = tokens * flops_per_token(self.model) + attention.item()
        if logger:
            values = {
                "loss": loss,
                "grad_norm": grad_norm,
                **of_loss,
                "skipped_steps": self.numbers.skipped,
                "lr": lr,
                "tokens": self.step * self.degrees.global_batch_size * config.seq_len,
                "epoch": self.loader.epochs(),
                "balance": balance,
                "tokens_per_second": tokens / seconds,
                "step_seconds": seconds / steps,
                "peak_memory_gib": peak.item(),
                "planned_memory_gib": self.preflight.planned_gib,
                "collectives": self.collectives,
                "mfu": flops / seconds / (peak_rate * dist.get_world_size()) if peak_rate else None,
            }
            logger.log(self.step, values)
            for line in self._plan_news(values["peak_memory_gib"]):
                self._say(line)
        self._start_interval()

    def _plan_news(self, peak_gib: float) -> list[str]:
        """Return the plan if it was not ready at the start, and later the measured peak next to it.

        The peak is compared once a step has run with the optimizer's state in memory.
        """
        lines, steps = self.preflight.news(), self.step - self._first_step
        if steps > 1 or self.step == self.config.training.steps:
            lines += self.preflight.measured(peak_gib, counts_files=self.peak_memory.counts_files)
        return lines

    def _start_interval(self) -> None:
        """Begin the interval that the next log line is about."""
        self._clock, self._logged_step, self._attention_flops = time.perf_counter(), self.step, 0

    @contextlib.contextmanager
    def _excluded_from_step_time(self):
        """Exclude the time spent in this context from the time of training steps."""
        started = time.perf_counter()
        yield
        self._clock += time.perf_counter() - started

    def _validate(self, logger: MetricsLogger | None) -> tuple[dict[str, Found], Found]:
        """Evaluate each set of held-out data; return what each has, and all of them together."""
        sequences = self.config.validation.steps * self.degrees.global_batch_size
        loaders = self.validation_loaders
        batches = sum(len(held_out_batches(one, sequences)) for one in loaders.values())
        self.progress.begin(
            f"validation at step {self.step}",
            tokens=self.spec.local_tokens * batches,
            is_step=self.optimizer is None,
        )
        sets: dict[str, Found] = {
            name: self.loss.evaluate(one, sequences) for name, one in loaders.items()
        }
        found = together(sets.values())
        self._is_best = self.best.note(self.step, sets, found)
        if logger:
            values = {f"validation_{name}": value for name, value in found._asdict().items()}
            if "" not in sets:
                values["validation_sets"] = {name: one._asdict() for name, one in sets.items()}
            logger.log(self.step, values)
        return sets, found

    def save(self) -> None:
        """Save a checkpoint of this step, after a look at what would be saved. Collective."""
        self.numbers.expect_finite_model()
        expect_no_drift(self, self.ranks.hosts, self._latest)
        self.progress.begin(f"checkpoint of step {self.step}")
        state = {
            "step": self.step,
            "loader": self.loader.state_dict(),
            "rng": {"seed": self.config.training.seed},
            "data": data_settings(self.config),
            "content": self.loader.sequences.content(),
            "beside": self.loss.fingerprint(),
            "skipped": self.numbers.skipped,
        }
        if best := self.best.state():
            state["best"] = best
        self.checkpointer.save(self.step, self.model, self.optimizer, state)

    def _progress(self, *, steps: int, done: int) -> Progress:
        """Return the progress display of a run of `steps` steps, of which `done` are done.

        The work of blocks is counted only if there is a terminal.
        """
        work, checkpoint = None, self.config.activation_checkpoint
        if shows(self.console):
            work = BlockWork(
                find_blocks(self.model)[1],
                embedding_is_trained=self.model.get_input_embeddings().weight.requires_grad,
                checkpoint_every=checkpoint.every if checkpoint.mode == "full" else 0,
            )
        return Progress(self.console, total=steps, done=done, work=work)

    def _acknowledge(self, name: str) -> None:
        """Print at once what a signal leads to."""
        if name == HOSTS_CHANGE.name:
            name = "Notice that another host joins"
        then = (
            "then saving a checkpoint" if self.config.checkpoint.enable else "and nothing is saved"
        )
        again = " Ctrl-C again ends at once, without one." if name == "SIGINT" else ""
        self._say(f"{name} received: stopping after {self.progress.part}, {then}.{again}")

    def _must_stop(self) -> bool:
        """Return whether any rank was told to stop, so that all ranks stop after the same step.

        A save in the background that has failed is seen here too. This is a small all-reduce on the
        host.
        """
        stop = 2 if self.signals.received else int(self.signals.hosts_change)
        flags = torch.tensor([stop, int(self.checkpointer.save_has_failed)])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        stop, save_has_failed = flags.tolist()
        if save_has_failed:
            self.checkpointer.retry_failed()
        self._another_host_joins = stop == 1
        return bool(stop)

    def _end_early(self) -> None:
        """Say why the run stops before its last step, and how it goes on.

        The ranks of an elastic run ask to be started again if another host joins, and if a signal
        stops the ranks of another host only.
        """
        after = f"after step {self.step}"
        if self.config.checkpoint.enable:
            saved, goes_on = f"saved {after}", "The same command goes on from there."
        else:
            saved, goes_on = f"stopped {after}", "Nothing is saved."
        elastic = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
        if self._another_host_joins:
            self._say(f"Another host joins: {saved}, and all hosts start from there.")
        elif elastic and not self.signals.received:
            self._say(f"Another host was stopped by a signal: {saved}, and the others go on.")
        else:
            self._say(f"Stopped by a signal {after}. {goes_on}")
            return
        leave_together(RESTART)

    def _is_exported(self) -> bool:
        """Return whether rank 0, which exports, sees the export of this step. Collective."""
        if not self.config.checkpoint.export:
            return True
        there = exported_step(self.folder / "export") == self._exported_step
        return first_failure("absent" if dist.get_rank() == 0 and not there else None) is None

    def _say(self, text: str) -> None:
        print_wrapped(self.console, text)
