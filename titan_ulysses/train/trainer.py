"""A training run, from top to bottom: resolve, build, start, then the loop."""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from rich.console import Console

from titan_ulysses.checkpoint import safetensors as weights
from titan_ulysses.checkpoint.initial import (
    base_weights,
    check_initial_weights,
    needs_initial_weights,
)
from titan_ulysses.checkpoint.push import push
from titan_ulysses.config.load import dump_toml
from titan_ulysses.config.schema import Config
from titan_ulysses.data.decoding import open_decoder
from titan_ulysses.data.loader import Batch, Loader
from titan_ulysses.data.pipeline import open_sequences, open_validation_sets
from titan_ulysses.distributed.collectives import CollectiveCounter
from titan_ulysses.distributed.device import device_type
from titan_ulysses.distributed.errors import UserError, first_failure
from titan_ulysses.distributed.mesh import build_mesh, init_distributed, set_timeout
from titan_ulysses.distributed.seeds import seed_of
from titan_ulysses.launch.agreement import Ranks
from titan_ulysses.launch.failure import leave_together
from titan_ulysses.model import hf
from titan_ulysses.model.families import attention_needs, largest_head
from titan_ulysses.model.prediction import layer_of
from titan_ulysses.observability.metrics import (
    PeakMemory,
    describe_evaluation,
    describe_samples,
    describe_sets,
)
from titan_ulysses.observability.profiling import profiled
from titan_ulysses.observability.progress import BlockWork, Progress, shows
from titan_ulysses.observability.run_page import last_numbers, write_run_page
from titan_ulysses.observability.run_pictures import read_runs
from titan_ulysses.optim.adamw import describe_state
from titan_ulysses.optim.optimizer import build_optimizer, set_learning_rate
from titan_ulysses.setup.blocks import find_blocks
from titan_ulysses.setup.build import build_model
from titan_ulysses.setup.resolve import RunSpec, check_machine, resolve
from titan_ulysses.train.counting import counted
from titan_ulysses.train.evaluation import Best, Evaluation, held_out_batches, together
from titan_ulysses.train.health import Health
from titan_ulysses.train.log import StepLog
from titan_ulysses.train.loss import PreferenceLoss, build_loss
from titan_ulysses.train.preflight import (
    Preflight,
    explained_out_of_memory,
    start_preflight,
    timeout_of_step,
)
from titan_ulysses.train.references import FILE as REFERENCES
from titan_ulysses.train.references import References
from titan_ulysses.train.run_folder import Checkpoints, RunFolder
from titan_ulysses.train.samples import continuations, encode_prompts
from titan_ulysses.train.signals import RESTART, StopSignals, describe_signal
from titan_ulysses.train.step import StepMetrics, TrainState, learning_rate, train_step
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
        self.config, self._eval_only, self._own_process = config, eval_only, own_process
        self._given, self._began, self._time_is_up = config, time.monotonic(), False
        self.console = Console(quiet=int(os.environ.get("RANK", 0)) != 0)  # only rank 0 prints
        self.run_folder = RunFolder(config, say=self._say)
        self.folder = self.run_folder.path
        self.ranks = Ranks(config)
        self.preflight: Preflight | None = None  # on rank 0
        try:
            with explained_out_of_memory(lambda: "the start", lambda: self.preflight):
                spec, training, held_out = self._resolve()
                self.state = self._build(spec, training, held_out)
                self._start()
        except BaseException:
            self.run_folder.release()
            raise

    # --- resolve: check the input, before a process group or a weight exists ----------------------

    def _resolve(self) -> tuple[RunSpec, SampleStream | None, dict[str, SampleStream]]:
        """Check the input; return the training sequences, and the held-out sequences by name.

        Those that are not a named set have the name "".
        """
        config = self.config
        spec = resolve(
            config,
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            device_type=device_type(),
            with_tokenizer=True,
        )
        check_machine(spec)
        self.run_folder.check()
        if not self._eval_only:
            self.run_folder.lock_if_there()
        self.checkpoints = Checkpoints(config, self.folder, self.ranks, say=self._say)
        self.checkpointer = self.checkpoints.checkpointer
        if needs_initial_weights(config, self.checkpoints.steps):
            check_initial_weights(config)
        reading = (config, spec.tokenizer, spec.vision)
        training, held_out = open_sequences(*reading, eval_only=self._eval_only)
        sets = open_validation_sets(*reading)
        self._prompts = encode_prompts(config, spec.tokenizer)
        has_weights = config.model.path or config.checkpoint.initial_load_path
        if self._eval_only and not (self.checkpoints.steps or has_weights):
            raise UserError(
                f"--evaluate: there is no model yet: {self.checkpointer.folder} has no checkpoint, "
                "and model.path is not set. Train first, or set model.path to a folder with "
                "weights, such as the export/ of a run."
            )
        if training is not None:
            self.config, self._counted = counted(
                config, training, sequences_per_step=spec.degrees.global_batch_size
            )
            spec = spec.with_config(self.config, spec.degrees)
        return spec, training, sets if held_out is None else {"": held_out}

    # --- build: mesh, loaders, model --------------------------------------------------------------

    def _build(
        self, spec: RunSpec, training: SampleStream | None, held_out: dict[str, SampleStream]
    ) -> TrainState:
        """Join the process group, and make the mesh, the loaders, the model and its loss.

        The memory of the models is allocated and not filled.
        """
        config, timeout = self.config, self.config.comm.startup_timeout_s
        if config.training.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
            torch.use_deterministic_algorithms(True)
        init_distributed(timeout=timeout)
        kernel = attention_kernel(spec, may_activate=self._own_process)  # this rank has its device
        mesh = build_mesh(
            replicate=spec.degrees.replicate,
            shard=spec.degrees.shard,
            sequence=spec.degrees.sequence,
            timeout=timeout,
        )
        model, float8_layers = build_model(spec, mesh)
        self._decoder = open_decoder(spec.vision, [training, *held_out.values()])
        self._open_loader = partial(
            Loader,
            batch_size=config.training.local_batch_size,
            batch_rank=mesh.batch.get_local_rank(),
            batch_degree=mesh.batch.size(),
            accumulation_steps=spec.degrees.accumulation_steps,
            sp_rank=mesh.sp.get_local_rank(),
            sp_degree=mesh.sp.size(),
            stream_chunk_tokens=model.sharding.stream_chunk_tokens,
            predicts=layer_of(model) is not None,
            vocab_size=getattr(model.config.get_text_config(), "vocab_size", None),
            decoder=self._decoder,
        )
        self.references, stored = None, None
        if config.loss.precompute_reference:
            self.references = References(config, training, held_out)
            if training is not None and self.checkpoints.steps:
                stored = self.references.load(self.folder)
        loss = build_loss(spec, model, mesh, stored=stored)
        offload = config.memory.parameter_offload
        hf.allocate(model, mesh.device, parameter_offload=offload)
        loss.allocate(parameter_offload=offload)
        if base := base_weights(config):
            weights.keep_generation_config(model, base.path)
        return TrainState(
            spec=spec,
            mesh=mesh,
            model=model,
            loss=loss,
            loader=None if training is None else self._open_loader(training),
            validation_loaders={name: self._open_loader(one) for name, one in held_out.items()},
            best=Best(config),
            float8_layers=float8_layers,
            attention_kernel=kernel,
        )

    # --- start: weights, optimizer, plan, folder --------------------------------------------------

    def _start(self) -> None:
        """Fill the model with its first or resumed weights, and print what the run is.

        Before the first step, the optimizer is built and the plan is checked.
        """
        config, state = self.config, self.state
        if not self._eval_only:
            self.preflight = start_preflight(state)
            state.optimizer = build_optimizer(
                state.model,
                config.optimizer,
                offload=config.memory.optimizer_offload,
                skips=config.training.skip_nonfinite > 0,
            )
        state.loss.fill(config)
        self.checkpoints.fill(state)
        plan = self._check_plan()
        if not self._eval_only:
            # Not earlier: a refused command must not replace the config of an existing run.
            self.run_folder.open()
            self.run_folder.write("config.toml", dump_toml(self._given))
            self.checkpointer.remove_unfinished()
            self.checkpointer.set_damaged_aside()
        self.health = Health(
            state, hosts=self.ranks.hosts, latest=self.checkpoints.latest, say=self._say
        )
        self.log = StepLog(state, preflight=self.preflight, say=self._say)
        counts_files = self.log.peak_memory.counts_files
        print_run_summary(state, self.console, plan=plan, counts_files=counts_files)
        for line in [] if self._eval_only else self._counted:
            print_wrapped(self.console, line)
        if self.references and not self.references.are_there:
            assert isinstance(state.loss, PreferenceLoss)
            self.references.compute(state.loss, self._open_loader, state.mesh, self.console)
            if config.checkpoint.enable and not self._eval_only:
                content = self.references.as_bytes(state.loss.fingerprint())
                self.run_folder.write(REFERENCES, content)
            # The peak is that of the steps, without the reference.
            self.log.peak_memory = PeakMemory(state.mesh.device)

    def _check_plan(self) -> list[str]:
        """Return what the plan says. UserError, on every rank, if the run must not start.

        That is if plan.enforce is set and the plan does not fit, or if the disk has no room for a
        checkpoint.
        """
        lines = self.preflight.lines() if self.preflight else []
        if self._eval_only:
            return lines
        disk = self.checkpoints.disk_needs(self.state)
        obstacle = self.preflight.obstacle() if self.preflight else None
        if obstacle := first_failure(obstacle or disk.obstacle()):
            raise UserError(obstacle)
        return lines + disk.lines()

    # --- the loop ---------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the last step, or until SIGTERM or Ctrl-C.

        Checkpoints are saved on the way. After the last step, export the model and print where all
        files are.
        """
        try:
            with explained_out_of_memory(
                lambda: f"step {self.state.step + 1}", lambda: self.preflight
            ):
                self._train()
        except UserError:
            with suppress(UserError):
                self.checkpointer.finish()
            raise
        finally:
            self.run_folder.release()
            if self._decoder:
                self._decoder.close()

    def _train(self) -> None:
        state, config = self.state, self.config
        if state.is_over and self.checkpoints.is_exported(state):
            self._say(f"Finished: {self.folder} has {self._how_far()}.")
            return
        self.log.open(self.folder, self.console)
        try:
            with (
                self._progress(steps=config.training.steps, done=state.step) as self.progress,
                StopSignals(self._acknowledge) as self.signals,
            ):
                self._loop()
        finally:
            self.log.close()
            if self.preflight:
                self.preflight.close()
        if state.is_over:
            self._finish()
            return
        if self._time_is_up:
            done = "The same command goes on from there." if config.checkpoint.enable else ""
            hours = f"training.max_hours = {config.training.max_hours:g}"
            self._say(f"{hours} are over: stopped after step {state.step}. {done}")
            return
        why, starts_again = self.signals.why_ended(
            state.step, saves=config.checkpoint.enable, another_host_joins=self._another_host_joins
        )
        self._say(why)
        if starts_again:
            leave_together(RESTART)
        if self._own_process and self.signals.interrupted and "RANK" not in os.environ:
            self.run_folder.release()
            leave_together(128 + signal.SIGINT)  # what a shell script stops at

    def _loop(self) -> None:
        state, config, log = self.state, self.config, self.log
        total, accumulation = config.training.steps, state.spec.degrees.accumulation_steps
        assert state.loader is not None
        if state.step == 0 and config.validation.enable:
            self._validate()
        log.begin_interval()
        with profiled(config.profiling, self.folder, state.step + 1) as step_is_over:
            while not state.is_over:
                self.progress.begin(
                    f"step {state.step + 1}",
                    tokens=state.spec.local_tokens * accumulation,
                    trains=True,
                    is_step=True,
                )
                if self._must_stop():
                    break
                # Dropout, if the model has any, draws from (seed, step, rank), so that a resumed
                # run draws the same numbers.
                torch.manual_seed(seed_of(config.training.seed, state.step, dist.get_rank()))
                batches = [
                    state.loader.next_batch().to(state.mesh.device) for _ in range(accumulation)
                ]
                lr = learning_rate(state.step, config)
                metrics = self._step(batches, lr)
                self.progress.finish_step()
                log.note(batches)
                del batches  # so that they do not stay on the device beside the next ones
                saves = self.checkpoints.are_due(state)
                if saves or state.step % config.metrics.log_interval == 0 or state.step == total:
                    # This waits until the device has finished the step.
                    self.health.expect_finite_steps()
                    log.log_step(metrics, lr)
                if config.validation.enable and (
                    state.step % config.validation.interval == 0 or state.step == total
                ):
                    with log.excluded_from_step_time():
                        saves = (self._validate() and state.best.keeps) or saves
                step_is_over(state.step)
                if saves:
                    with log.excluded_from_step_time():
                        self.save()
        if state.step < total and config.checkpoint.enable:
            self.save()
        self.checkpointer.finish()

    def _step(self, batches: list[Batch], lr: float) -> StepMetrics:
        """Make a step, and note its numbers. The first one also ends the start of the run."""
        state, config = self.state, self.config.training
        set_learning_rate(state.optimizer, lr)
        state.optimizer.steps_before = state.step
        # Every step calls the same collectives. It is enough to count those of the first one, which
        # is slow anyway.
        is_first = not self.log.collectives
        with CollectiveCounter() if is_first else nullcontext() as counter:
            metrics = train_step(
                state.model,
                state.optimizer,
                batches,
                state.mesh,
                max_norm=config.max_norm,
                skip_nonfinite=config.skip_nonfinite > 0,
                loss=state.loss,
            )
        state.step += 1
        self.health.note(state.step, metrics)
        if counter:
            self.log.collectives = {
                kind: {"calls": c, "bytes": b} for kind, (c, b) in sorted(counter.counts.items())
            }
            # All ranks have made a step: from now on they answer one another faster.
            timeout = timeout_of_step(self.config, self.preflight, say=self._say)
            set_timeout(timeout)
            if self.ranks.watch:
                self.ranks.watch.timeout_s = timeout
            self._say(describe_state(state.optimizer))
        return metrics

    def _validate(self) -> bool:
        """Evaluate the held-out data; return whether the model is the best so far."""
        sets, of_all = self._evaluate()
        is_best = self.state.best.note(self.state.step, sets, of_all)
        self.log.log_validation(sets, of_all, self._samples())
        return is_best

    def _samples(self) -> dict[str, str]:
        """Return how the model goes on with each of validation.prompts."""
        if not self._prompts:
            return {}
        state, config = self.state, self.config
        self.progress.begin(f"samples at step {state.step}")
        found = continuations(config, state.model, state.spec.tokenizer, self._prompts)
        return dict(zip(config.validation.prompts, found, strict=True))

    def _evaluate(self) -> tuple[dict[str, Evaluation], Evaluation]:
        """Evaluate each set of held-out data; return what each has, and all of them together."""
        state = self.state
        sequences = self.config.validation.steps * state.spec.degrees.global_batch_size
        loaders = state.validation_loaders
        batches = sum(len(held_out_batches(one, sequences)) for one in loaders.values())
        self.progress.begin(
            f"validation at step {state.step}",
            tokens=state.spec.local_tokens * batches,
            is_step=self._eval_only,
        )
        sets = {name: state.loss.evaluate(one, sequences) for name, one in loaders.items()}
        return sets, together(sets.values())

    def save(self) -> None:
        """Save a checkpoint of this step, after a look at what would be saved. Collective."""
        self.health.expect_finite_model()
        self.health.expect_ranks_agree()
        self.progress.begin(f"checkpoint of step {self.state.step}")
        self.checkpoints.save(self.state)

    def _acknowledge(self, signal: str) -> None:
        saves = self.config.checkpoint.enable
        self._say(describe_signal(signal, self.progress.part, saves=saves))

    def _must_stop(self) -> bool:
        """Return whether any rank was asked to stop, so that all ranks stop after the same step.

        A save in the background that has failed is seen here too. This is a small all-reduce on the
        host.
        """
        stop = 2 if self.signals.received else int(self.signals.hosts_change)
        hours, limit = (time.monotonic() - self._began) / 3600, self.config.training.max_hours
        is_late = int(0 < limit <= hours)
        flags = torch.tensor([stop, int(self.checkpointer.save_has_failed), is_late])
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        stop, save_has_failed, is_late = flags.tolist()
        self._time_is_up = bool(is_late and not stop)
        if save_has_failed:
            self.checkpointer.retry_failed()
        self._another_host_joins = stop == 1
        return bool(stop or is_late)

    # --- the end ----------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Export the last model, or the best one if it is kept, and say where everything is."""
        state, config = self.state, self.config
        if state.step < config.training.steps:
            self._say(f"Ended: {self._how_far()}.")
        if (step := state.step_to_export) != state.step:
            self.checkpointer.load(step, state.model, None)
            self._say(f"The best checkpoint is exported: {state.best.describe()}.")
        if config.checkpoint.export:
            self.health.expect_finite_model()
            if not config.checkpoint.enable:  # else the last checkpoint has been looked at
                self.health.expect_ranks_agree()
            self.checkpoints.export(state)
        if config.metrics.enable_report and dist.get_rank() == 0:
            try:
                write_run_page(self.folder)
            except (OSError, UserError) as error:  # what the run was for is there without it
                self._say(f"WARNING: report.html cannot be written: {error}")
        if config.checkpoint.push_to_hub and dist.get_rank() == 0:
            ((_, lines),) = read_runs([self.folder]).items()
            self._say(push(config, self.folder, results=last_numbers(lines)))
        print_completion(state, self.console, self.folder, length=self._length)

    @property
    def _length(self) -> str:
        """The setting that ends the run."""
        counts_steps = self.config.training.steps == self._given.training.steps
        return "training.steps" if counts_steps else "training.epochs"

    def _how_far(self) -> str:
        state, best = self.state, self.state.best
        if state.step >= self.config.training.steps:
            return f"all {state.step} steps. To go on, raise {self._length}"
        return (
            f"{state.step} steps: the last {best.waited} validations were not better than "
            f"{best.describe()}. To go on, raise validation.patience"
        )

    # --- validation alone -------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Evaluate the model that training would continue from, on the held-out data.

        The result goes to the console and to <run>/evaluation.json.
        """
        state, config = self.state, self.config
        evaluated = config.checkpoint.initial_load_path or config.model.path
        if self.checkpoints.steps:
            evaluated = str(self.checkpointer.folder / f"step-{state.step}")
        with self._progress(steps=1, done=0) as self.progress:
            sets, of_all = self._evaluate()
            samples = self._samples()
        held_out = {name: x.sequences.describe() for name, x in state.validation_loaders.items()}
        values: dict[str, Any] = {"weights": evaluated, "held_out": held_out.get("") or held_out}
        if "" not in sets:
            values["sets"] = {name: one.as_json() for name, one in sets.items()}
        if samples:
            values["samples"] = samples
        text = json.dumps(values | of_all.as_json(), indent=2) + "\n"
        self.run_folder.write("evaluation.json", text)
        found = [
            *describe_evaluation(of_all._asdict()),
            *describe_sets(sets),
            *describe_samples(samples),
        ]
        self._say(f"{evaluated}: " + "\n".join(found))
        self._say(f"Written to {self.folder / 'evaluation.json'}")

    # --- what a user sees -------------------------------------------------------------------------

    def _progress(self, *, steps: int, done: int) -> Progress:
        """Return the progress display of a run of `steps` steps, of which `done` are done.

        The work of blocks is counted only if there is a terminal.
        """
        work, model = None, self.state.model
        if shows(self.console):
            activation_checkpoint = self.config.activation_checkpoint
            is_full = activation_checkpoint.mode == "full"
            work = BlockWork(
                find_blocks(model)[1],
                embedding_is_trained=model.get_input_embeddings().weight.requires_grad,
                checkpoint_every=activation_checkpoint.every if is_full else 0,
            )
        return Progress(self.console, total=steps, done=done, work=work)

    def _say(self, text: str) -> None:
        print_wrapped(self.console, text)


def attention_kernel(spec: RunSpec, *, may_activate: bool) -> str | None:
    """Return which FlashAttention the core varlen calls, as a sentence; None for other cores.

    may_activate: put the fastest one there first, for the whole process.
    """
    if spec.core is not varlen:
        return None
    if may_activate:
        return activate_fastest(
            head_size=largest_head(spec.model_config),
            window="window" in attention_needs(spec.model_config),
        )
    return f"attention kernel: {NAMES[active()]}"
