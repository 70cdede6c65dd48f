"""Train an image classifier: the PyTorch MNIST tutorial's loop, on any hardware.

    accelerate launch train.py                                  # the tutorial's recipe: 3 epochs, batches of 10, Adam
    accelerate launch train.py --recipe cnn                     # a convolutional network: over 99 % of the test images
    accelerate launch train.py --epochs 10 --schedule cosine    # any setting by its flag
    python train.py --help                                      # all of them

Accelerate wraps the model, the optimizer and the batches, so the same loop runs on a CPU, on one GPU, on many GPUs and
on many machines. What surrounds the loop (the run's folder, trackers, checkpoints, signals) is in mnist/session.py.
"""

from mnist.config.recipes import RECIPES
from mnist.config.settings import TrainConfig
from mnist.launch.main import end_process, run_process


def train(config: TrainConfig, explicit_settings: frozenset[str] = frozenset()) -> None:
    """Train once, from the settings to a folder with metrics, model and report.

    `explicit_settings` are those named on the command line: of a run that is resumed, only they may change.
    """
    # imported here, so that --help and a mistyped flag are answered before torch has loaded
    from mnist.data.datasets import load_dataset
    from mnist.data.loader import build_loaders
    from mnist.models.by_name import build_model
    from mnist.runs.folder import has_checkpoint
    from mnist.session import Session, start
    from mnist.training.capture import build_loss
    from mnist.training.evaluate import evaluate
    from mnist.training.losses import LOSSES
    from mnist.training.optimizers import build_optimizer, build_schedule

    # --- accelerator: the processes and devices that the launcher gave us
    config, accelerator = start(config, explicit_settings)

    # --- data, model
    pretrained = config.pretrained and not has_checkpoint(config)  # whose weights replace all others
    with accelerator.local_main_process_first():  # it downloads what is missing
        data = load_dataset(config.dataset, config.data_dir, config.data_options)
        model = build_model(
            config.model,
            len(data.class_names),
            data.image_shape,
            pretrained,
            data.normalization,
            config.batch_sizes(accelerator.num_processes).batch_size,
        )
    train_loader, eval_loaders = build_loaders(data, config, accelerator)

    # --- loss, optimizer, schedule
    optimizer = build_optimizer(config.optimizer, model.parameters(), config.learning_rate, config.weight_decay)
    total_steps = config.total_steps(len(train_loader))
    scheduler = build_schedule(config.schedule, optimizer, config.warmup_steps, total_steps)
    model, optimizer, scheduler, train_loader = accelerator.prepare(model, optimizer, scheduler, train_loader)
    eval_loaders = {split: accelerator.prepare(loader) for split, loader in eval_loaders.items()}
    compute_loss = build_loss(config, model, accelerator, data.train)  # --compile makes one graph of it

    # --- run: a folder, trackers, checkpoints, signals
    with Session(accelerator, config, data, model, optimizer, scheduler) as run:
        for epoch in run.epochs():
            train_loader.set_epoch(epoch)  # the order of the images depends on the seed and the epoch alone
            for X, y, sample_weight in run.batches(train_loader):  # [B, 1, 28, 28] in [0, 1], [B], [B]
                optimizer.zero_grad()  # has no effect inside a window of accumulated batches
                with accelerator.accumulate(model):
                    loss = compute_loss(X, y, sample_weight)  # loss_function(model(X), y, sample_weight)
                    accelerator.backward(loss)
                    run.clip_gradients()
                    optimizer.step()
                    scheduler.step()
                run.after_step(loss)

            # --- every split with the same weights: in sample (train) and out of sample (val, test)
            results = evaluate(model, eval_loaders, LOSSES[config.loss], accelerator, run.before_batch)
            run.after_epoch(results)
        run.finish()
    accelerator.end_training()


def main() -> int:
    """Train as the command line says; returns the exit code."""
    return run_process(train, RECIPES)


if __name__ == "__main__":
    end_process(main())
