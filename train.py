"""Train an image classifier: the PyTorch MNIST tutorial's loop, on any hardware.

    accelerate launch train.py                                  # the tutorial's recipe: 3 epochs, batches of 10, Adam
    accelerate launch train.py --recipe cnn                     # a convolutional network: over 99 % of the test images
    accelerate launch train.py --epochs 10 --schedule cosine    # any setting by its flag
    python train.py --help                                      # all of them

Read it from top to bottom: accelerator, data, model, run, loop, and what is left behind. Accelerate wraps the model,
the optimizer and the batches, and so the same loop runs on a CPU, on a GPU, on many of them and on many machines.
"""

import dataclasses
import functools
import sys

from mnist.config.recipes import RECIPES
from mnist.config.settings import TrainConfig
from mnist.launch.main import end_process, run_process


def train(config: TrainConfig, given: frozenset[str] = frozenset()) -> None:
    """One run, from its settings to a folder with its metrics, its model and its pictures.

    `given` are the settings that the command line names: a run that is resumed keeps its own.
    """
    # imported here, so that --help and a mistyped flag are answered before torch has loaded
    from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
    from torch import Tensor

    from mnist.data.datasets import decode_folder, load_dataset
    from mnist.data.loader import build_batches, measured_splits
    from mnist.data.transforms import images_at_once, scale_pixels
    from mnist.inference.predict import predict
    from mnist.launch.environment import describe_code, describe_environment
    from mnist.launch.hardware import choose_threads, keep_freed_memory
    from mnist.launch.processes import (
        accelerate_settings,
        check_alike,
        join_processes,
        resolve_precision,
        waiting_for_others,
    )
    from mnist.launch.signals import Interruption
    from mnist.models.by_name import build_model, check_batch
    from mnist.models.networks import count_parameters
    from mnist.models.saved import ModelConfig, save_model
    from mnist.reporting.report import LiveReport
    from mnist.reporting.snapshots import MISTAKES, Evaluation
    from mnist.reporting.terminal import Terminal
    from mnist.runs.folder import Run, find_run, find_run_here
    from mnist.tracking.trackers import Tracking, check_trackers
    from mnist.training.capture import compile_loss
    from mnist.training.checkpoint import Checkpoints, has_checkpoint
    from mnist.training.evaluate import evaluate
    from mnist.training.lean import LeanAccelerator, LeanOptimizer
    from mnist.training.losses import LOSSES
    from mnist.training.optimizers import build_optimizer, build_schedule, clip_gradients
    from mnist.training.profiling import Profile
    from mnist.training.progress import Progress

    # --- accelerator: the processes and devices that the launcher gave us, and the settings of a run that goes on
    here = find_run_here(config, given)
    decode_folder(here.dataset, here.data_dir, here.image_size)  # which may take longer than processes wait for others
    joined = join_processes(config.timeout_seconds)
    asked, config = config, find_run(config, given).share_batch(joined.num_processes).with_place(config)
    check_trackers(config.tracker_names)
    precision, code = resolve_precision(config.mixed_precision, joined.device.type), describe_code()
    check_alike(asked.shared | {"precision": precision} | code, perhaps_unknown=["git_commit"])
    accelerator = LeanAccelerator(
        cpu=joined.device.type == "cpu",
        mixed_precision=config.mixed_precision,
        # as a plugin, for the number alone would give way to a variable of the environment
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        # a batch is that of all processes: each takes its slice, and the schedule steps once per optimizer step
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=accelerate_settings(config.gradient_accumulation_steps),
    )
    processes, batch_size = joined.num_processes, config.shared_batch_size  # of all processes together
    set_seed(config.seed)
    is_main = accelerator.is_main_process
    terminal = Terminal(is_main, config.epochs)

    # --- data, in batches for training and, as they lie, for measuring; and the network for them
    limits = config.limit_train_images, config.limit_test_images, config.validation_size
    pretrained = config.pretrained and not has_checkpoint(config)
    with accelerator.local_main_process_first():  # which downloads what is missing
        data = load_dataset(config.dataset, config.data_dir, *limits, config.image_size, config.test_fraction)
        description = ModelConfig.of(config.model, data)
        classes, shape = len(data.class_names), description.image_shape
        net = model = build_model(config.model, classes, shape, pretrained, data.normalization)
    check_alike(data.counts | {"dataset_md5": data.checksum})  # another machine's copy may be another one
    check_batch(net, config.batch_size, shape)
    batches_of = functools.partial(build_batches, num_processes=processes, device=accelerator.device)
    accumulated, flips = config.gradient_accumulation_steps, data.flips
    train_batches = batches_of(
        data.train, batch_size, shuffle=True, seed=config.seed, window=accumulated, augment=config.augment, flips=flips
    )
    measured_batches = {
        part: accelerator.prepare(batches_of(split, images_at_once(description.pixels) * processes))
        for part, split in measured_splits(data, config.seed).items()
    }

    # --- loss, optimizer, schedule
    steps_per_epoch = -(-len(train_batches) // accumulated)
    total_steps = min(config.epochs * steps_per_epoch, config.max_steps or sys.maxsize)
    log_every = config.log_every or min(100, -(-steps_per_epoch // 10))
    loss_function = LOSSES[config.loss]
    keep_freed_memory()
    example = scale_pixels(data.train.images[: config.batch_size])  # the shape of all batches of a process
    choose_threads(model, example)
    optimizer = build_optimizer(config.optimizer, model.parameters(), config.learning_rate, config.weight_decay)
    scheduler = build_schedule(config.schedule, optimizer, config.warmup_steps, total_steps)
    optimizer = LeanOptimizer(optimizer, scaler=accelerator.scaler)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    train_batches = accelerator.prepare_data_loader(train_batches, device_placement=False)  # they lie there already
    compiled, not_compiled = None, ""
    if config.compile:
        terminal.print("Compiling: some seconds, the first time up to half a minute ...")
        compiled, not_compiled = compile_loss(net, loss_function, accelerator, example)

    def loss_of(X: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        if compiled:
            return compiled(X, y, weight)  # the same in one graph, and the gradients with it
        output = model(X)  # [B, classes] log-probabilities
        return loss_function(output, y, weight)

    # --- run: a folder of its own, trackers, checkpoints, a header on the terminal
    run = Run.open(config, data.checksum)
    environment = describe_environment(accelerator, code, compiled is not None) | {
        "not_compiled": not_compiled,
        **data.describe(),
        "parameters": count_parameters(net),
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total_steps,
    }
    run.describe(environment, data.skipped)
    terminal.header(config, environment, run.folder, data.notes)
    settings = dataclasses.asdict(config) | environment
    tracking = Tracking(is_main, run.folder, run.id, settings, config.tracker_names)
    evaluation = Evaluation(run.folder, data)
    report = LiveReport(run.folder, writes=is_main)
    interruption = Interruption(accelerator, at_once=run.note)
    progress = Progress(
        accelerator, terminal, tracking.log, scheduler, log_every, batch_size, len(data.train), total_steps
    )
    parts = {"scheduler": scheduler, "tracking": tracking, "evaluation": evaluation}
    checkpoints = Checkpoints(run, config, environment, accelerator, interruption, progress, net, optimizer, parts)
    if config.profile:
        Profile(run.folder, accelerator, terminal.print).watch(
            progress, compiled or model, optimizer, scheduler, checkpoints
        )
    with report, interruption, run, tracking, checkpoints, waiting_for_others(config.timeout_seconds):
        for note in [*checkpoints.resume(), *tracking.warnings]:
            terminal.row("resumed", note)
        terminal.row("trackers", tracking.start(progress.step))
        for epoch in progress.epochs():
            # --- loop
            progress.start_epoch()
            train_batches.set_epoch(epoch)
            for X, y, weight in progress.rest(train_batches):  # [B, 1, 28, 28] in [0, 1], [B], [B]: what each counts
                optimizer.zero_grad()  # does nothing inside a window of accumulated batches
                with accelerator.accumulate(model):
                    loss = loss_of(X, y, weight)  # loss_function(model(X), y, weight), or the same compiled
                    accelerator.backward(loss)
                    norm = clip_gradients(model, accelerator, config.max_grad_norm, measure=progress.logs_this_step)
                    optimizer.step()
                    scheduler.step()
                progress.update(loss, norm)  # fetches the loss from the device every --log-every steps only
                checkpoints.after_step()  # saves one every --checkpoint-every steps, or because of a signal
                if progress.finished:
                    break

            # --- in sample and out of sample, with the same weights
            values = progress.end_epoch()
            for part, batches in measured_batches.items():  # the last one is of the test images
                kept = MISTAKES if part == "test" else 0
                result = evaluate(model, batches, loss_function, accelerator, checkpoints.before_batch, kept)
                values |= progress.finite(result.values(part, data.class_names))
            values = progress.end_evaluation(values)
            tracking.log(values)
            terminal.epoch_line(values)
            run.check_place()
            if is_main:
                evaluation.update(progress.position, result, predict(net, evaluation.images))
                if progress.is_best:
                    save_model(net, run.folder / "best", description)
            checkpoints.after_epoch()
            if is_main:
                report.after_epoch()

        # --- what is left behind: the model, a report with its pictures, what W&B keeps of a run
        if is_main:
            save_model(net, run.folder / "model", description)
            report.write(status="finished")
            tracking.log_results(data)
            terminal.draw(evaluation)
    warnings = run.warnings + tracking.warnings + report.warnings
    terminal.result(run.folder, progress.results, warnings, tracking.sync_command)
    accelerator.end_training()


def main() -> int:
    """Train as the command line says; returns the exit code."""
    return run_process(train, RECIPES)


if __name__ == "__main__":
    end_process(main())
