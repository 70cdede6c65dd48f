"""Connect a training run to its folder, trackers, terminal, checkpoints, signals and report.

config, accelerator = start(config)
with Session(accelerator, config, data, model, optimizer, scheduler) as run:
    for epoch in run.epochs(): ...      # train.py
"""

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from torch import Tensor, nn

from mnist.config.settings import TrainConfig
from mnist.data.datasets import check_dataset, decode_folder
from mnist.data.splits import ImageData
from mnist.data.transforms import scale_pixels
from mnist.inference.predict import predict
from mnist.launch.environment import describe_code, describe_environment
from mnist.launch.hardware import choose_kernels, has_bf16, keep_freed_memory
from mnist.launch.processes import (
    RANK_OF,
    accelerate_settings,
    check_alike,
    join_processes,
    resolve_precision,
    waiting_for_others,
)
from mnist.launch.signals import Interruption
from mnist.models.by_name import describe_weights, fetch_weights
from mnist.models.networks import count_parameters
from mnist.models.saved import ModelConfig, save_model
from mnist.reporting.report import LiveReport
from mnist.reporting.snapshots import Evaluation
from mnist.reporting.terminal import Terminal
from mnist.runs.folder import Run, find_run, find_run_here
from mnist.tracking.trackers import Tracking, check_trackers
from mnist.training.calibration import Calibration
from mnist.training.checkpoint import Checkpoints, RandomState, Stateful, bit_identity
from mnist.training.evaluate import Result
from mnist.training.lean import LeanAccelerator
from mnist.training.optimizers import clip_gradients
from mnist.training.profiling import Profile
from mnist.training.progress import Progress


def start(config: TrainConfig, explicit_settings: Collection[str] = frozenset()) -> tuple[TrainConfig, LeanAccelerator]:
    """Connect the processes of the job. Returns the settings to train with, and the Accelerator.

    The settings are `config`, or those of the resumed run updated by `explicit_settings`. Raises ConfigError for a
    launch or settings that would silently do something other than asked.
    """
    local = find_run_here(config, explicit_settings)
    check_dataset(local.dataset, local.data_options)
    # before the processes join, because these may take longer than the timeout
    if local.pretrained != "none" and local.resume is None:
        fetch_weights(local.model)
    if any(os.environ.get(name, "1") != "1" for name in RANK_OF):  # a single process decodes when it loads the data
        decode_folder(local.dataset, local.data_dir, local.data_options)
    state = join_processes(config.timeout_seconds)
    requested, config = config, find_run(config, explicit_settings).with_local_dataset(config)
    config.batch_sizes(state.num_processes)  # raises if the processes cannot share the global batch
    check_trackers(config.tracker_names)
    precision = resolve_precision(config.mixed_precision, state.device.type, has_bf16(state.device))
    check_alike(requested.job_settings | {"precision": precision} | describe_code(), perhaps_unknown=["git_commit"])
    accelerator = LeanAccelerator(
        cpu=state.device.type == "cpu",
        mixed_precision=precision,
        # as a plugin, because an environment variable would override a plain number
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        # the DataLoader yields global batches: each process takes a slice, and schedulers step once per optimizer step
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=accelerate_settings(config.gradient_accumulation_steps),
    )
    set_seed(config.seed)
    choose_kernels()
    keep_freed_memory()
    return config, accelerator


class Session:
    """A training run. As a context manager, it records how the run ends: finished, failed or interrupted.

    Every process has one; only the main process writes and prints.
    """

    def __init__(
        self,
        accelerator: LeanAccelerator,
        config: TrainConfig,
        data: ImageData,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
    ) -> None:
        """`model`, `optimizer` and `scheduler` must be prepared by `accelerator`."""
        self.accelerator = accelerator
        self.config = config
        self.data = data
        self.model = model
        self.net = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.pretrained_weights = describe_weights(config.model) if config.pretrained != "none" else ""
        self.is_main = accelerator.is_main_process
        self.batch_size, self.global_batch_size = config.batch_sizes(accelerator.num_processes)
        batches = -(-len(data.train) // self.global_batch_size)  # per epoch
        self.progress = Progress(accelerator, len(data.train), self.global_batch_size, config.total_steps(batches))
        self.log_every = config.log_every or min(100, -(-self.progress.steps_per_epoch // 10))
        self.epochs_in_all = -(-self.progress.total_steps // self.progress.steps_per_epoch)
        self.terminal = Terminal(self.is_main, self.epochs_in_all)
        self.gradient_norm: Tensor | None = None  # of the last step logged or clipped

    def __enter__(self) -> "Session":
        config, progress, is_main = self.config, self.progress, self.is_main
        self.run = Run.open(config, self.data.checksum)
        with contextlib.ExitStack() as stack:
            self.report = stack.enter_context(LiveReport(self.run.folder, writes=is_main))
            self.interruption = stack.enter_context(Interruption(self.accelerator, before_exit=self.run.update_state))
            stack.enter_context(self.run)
            environment = self._describe()
            self.run.write_environment(environment, self.data.skipped)
            notes = [*self.data.notes, *self.data.advice(config)]
            self.terminal.header(config, environment, self.run.folder, notes)
            self.report.write_data(self.data)
            settings = dataclasses.asdict(config) | environment
            self.tracking = Tracking(is_main, self.run.folder, self.run.id, settings, config.tracker_names)
            self.evaluation = Evaluation(self.run.folder, self.data)
            self.checkpoints = self._checkpoints(environment)
            self.profile = self._profile() if config.profile else None
            stack.enter_context(self.tracking)
            stack.enter_context(self.checkpoints)
            stack.enter_context(waiting_for_others(config.timeout_seconds))
            if self.accelerator.num_processes > 2 and self.accelerator.captured is None:
                self._arrange_gradients()
            for note in [*self.checkpoints.resume(), *self.tracking.resume_notes]:
                self.terminal.row("resumed", note)
            if progress.step >= progress.total_steps:
                self.terminal.row("finished", "no steps are left; to train on, add --epochs N or --max-steps N")
            self.terminal.row("trackers", self.tracking.start(progress.step))
            self.stack = stack.pop_all()
        gc.enable()  # disabled in launch/main.py
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.stack.__exit__(kind, error, traceback)
        if error is None:
            warnings = self.run.warnings + self.tracking.warnings + self.report.warnings
            self.terminal.result(self.run.folder, self.progress.results, warnings, self.tracking.sync_command)

    def _describe(self) -> dict[str, Any]:
        """The content of environment.json; all processes must call it."""
        captured = self.accelerator.captured
        return {
            **describe_environment(self.accelerator, captured.compiler if captured else None),
            "not_compiled": self.accelerator.why_not_captured,
            **self.data.describe(),
            "parameters": count_parameters(self.net),
            "pretrained_weights": self.pretrained_weights,
            "batch_size": self.batch_size,
            "global_batch_size": self.global_batch_size,
            "steps_per_epoch": self.progress.steps_per_epoch,
            "total_steps": self.progress.total_steps,
            "epochs": self.epochs_in_all,
        }

    def _arrange_gradients(self) -> None:
        """Let DistributedDataParallel rebuild its gradient buckets now; two backward passes make it do so.

        The last digit of a sum over more than two processes depends on the buckets, so without this a resumed run
        would not be bit-identical. Weights, buffers and random generators stay as they are.
        """
        random, buffers = RandomState(self.accelerator.device), list(self.net.buffers())
        state, values = random.state_dict(), [buffer.clone() for buffer in buffers]
        X = scale_pixels(self.data.train.images[: self.batch_size]).to(self.accelerator.device)
        for _ in range(2):
            self.model(X).sum().backward()
            self.optimizer.zero_grad()
        random.load_state_dict(state)
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)

    def _checkpoints(self, environment: Mapping[str, Any]) -> Checkpoints:
        made_with = {
            "essence": self.config.fingerprint | {"global_batch_size": self.global_batch_size},
            "launch": bit_identity(environment),
        }
        others: dict[str, Stateful] = {
            "scheduler": self.scheduler,
            "tracking": self.tracking,
            "evaluation": self.evaluation,
        }
        if self.accelerator.scaler is not None:
            others |= {"scaler": self.accelerator.scaler, "skipped_steps": self.optimizer.skipped}
        return Checkpoints(self.run, made_with, self.progress, self.net, self.optimizer, others)

    def _profile(self) -> Profile:
        parts = {
            "zero_grad": (self.optimizer, "zero_grad"),
            "forward": (self.accelerator.captured or self.model, "forward"),  # a compiled loss includes the gradients
            "backward": (self.accelerator, "backward"),
            "optimizer": (self.optimizer, "step"),
            "schedule": (self.scheduler, "step"),
            "logging": (self, "_log_step"),
            "checkpoints": (self, "_save_step"),
        }
        return Profile(self.run.folder, self.accelerator, self.terminal.print, parts)

    # --- the loop

    def epochs(self) -> Iterator[int]:
        """The remaining epochs, counted from 1; the first of a resumed run may be partly done."""
        return self.progress.epochs()

    def batches(self, train_loader: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The remaining batches (X, y, sample_weight) of this epoch, with a progress bar."""
        self.terminal.start_epoch(self.progress.epoch, self.progress.steps_left)
        remaining = self.progress.remaining(train_loader)
        if self.profile is not None:  # the first epoch of this process
            remaining, self.profile = self.profile.watch(remaining), None
        yield from remaining
        self.terminal.end_epoch()
        self.evaluating_since = time.perf_counter()

    def clip_gradients(self) -> None:
        """Clip the gradient norm of an optimizer step to --max-grad-norm, if set. Store the norm for the log."""
        is_logged = (self.progress.step + 1) % self.log_every == 0
        self.gradient_norm = clip_gradients(self.model, self.accelerator, self.config.max_grad_norm, measure=is_logged)

    def after_step(self, loss: Tensor) -> None:
        """Count a batch. After an optimizer step, also log and save a checkpoint if due, and handle signals.

        Fetches the loss from the device only every --log-every optimizer steps. Raises Interrupted after a signal, and
        DivergedError for a loss that is not finite.
        """
        self._log_step(loss)
        if self.accelerator.sync_gradients:
            self._save_step()

    def _log_step(self, loss: Tensor) -> None:
        progress = self.progress
        progress.update(loss)
        if self.accelerator.sync_gradients:
            self.terminal.step()
            if progress.step % self.log_every == 0:
                values = progress.finite({"train/loss": progress.loss.read()})
                values["optim/learning_rate"] = self._learning_rate()
                if self.accelerator.scaler is not None:
                    values["optim/skipped_steps"] = int(self.optimizer.skipped.count)
                # with fp16, a step whose norm is infinite is skipped
                if self.gradient_norm is not None and self.gradient_norm.isfinite():
                    values["optim/gradient_norm"] = float(self.gradient_norm)
                self.tracking.log({"step": progress.step, "epoch": progress.epoch, **values})
                self.terminal.report(values["train/loss"], progress.images_done / progress.elapsed())

    def _learning_rate(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self.scheduler.get_last_lr()[0])

    def _save_step(self) -> None:
        every = self.config.checkpoint_every
        if every is not None and self.progress.step % every == 0:
            self.checkpoints.save()
        self.interruption.after_step()
        self._heartbeat()

    def _heartbeat(self) -> None:
        """Update state.json every few seconds, to show that the run is alive."""
        if self.run.heartbeat_due:
            self.run.update_state(**self.progress.position)

    def check_signals(self) -> None:
        """Called before each batch of an evaluation. Raises Interrupted after a signal."""
        self.interruption.check()
        self._heartbeat()

    def after_epoch(self, results: Mapping[str, Result]) -> None:
        """Log and print the results of each split, save the best weights, and save a checkpoint if due."""
        progress = self.progress
        values: dict[str, Any] = {"step": progress.step, "epoch": progress.epoch}
        values |= {"optim/learning_rate": self._learning_rate(), **progress.performance()}
        for split, result in results.items():
            values |= progress.finite(result.values(split, self.data.class_names))
        values["perf/evaluation_seconds"] = time.perf_counter() - self.evaluating_since
        progress.end_epoch(values)
        self.tracking.log(values)
        self.terminal.epoch_line(values)
        self.run.check_folder()
        if self.is_main:
            self.evaluation.update(progress.position, results["test"], predict(self.net, self.evaluation.images))
            if progress.is_best:
                self._save_model("best")
        if progress.finished or (self.config.checkpoint_every is None and self.checkpoints.is_due()):
            self.checkpoints.save()
        else:
            self.run.update_state(**progress.position)
        if self.is_main:
            self.report.after_epoch()

    def finish(self) -> None:
        """At the end of training, save the model, write the report and log the results to W&B."""
        if self.is_main:
            self._save_model("model")
            self.report.write(status="finished")
            self.tracking.log_results(self.data)
            self.terminal.draw(self.evaluation)

    def _save_model(self, name: str) -> None:
        results = self.progress.results
        calibration = {key: results[f"val/{key}"] for key in Calibration._fields if f"val/{key}" in results}
        config = ModelConfig.of(self.config.model, self.data)
        config = dataclasses.replace(config, **calibration, pretrained_weights=self.pretrained_weights)
        save_model(self.net, self.run.folder / name, config)
