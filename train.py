"""Train an image classifier: the PyTorch MNIST tutorial's loop, on any hardware.

    accelerate launch train.py                                  # the tutorial's recipe: 3 epochs, batches of 10, Adam
    accelerate launch train.py --recipe cnn                     # a convolutional network: over 99 % test accuracy
    accelerate launch train.py --epochs 10 --schedule cosine    # every setting has a flag
    python train.py --help                                      # lists all flags

Accelerate wraps the model, the optimizer and the batches, so the same loop runs on a CPU, on one GPU, on many GPUs and
on many machines. Everything around the loop (the run's folder, trackers, checkpoints, signals) is in mnist/session.py,
and CONTRIBUTING.md says where to add a model, a dataset, an optimizer or a tracker.
"""

from mnist.config.recipes import RECIPES
from mnist.config.settings import TrainConfig
from mnist.launch.main import end_process, run_process


def train(config: TrainConfig, explicit_settings: frozenset[str] = frozenset()) -> None:
    """Train a model, and write metrics, weights and a report to the run's folder.

    `explicit_settings` names the flags given on the command line; a resumed run takes all others from its config.yaml.
    """
    # imported here so that --help and usage errors do not wait for torch to load
    from mnist.data.datasets import load_dataset
    from mnist.data.loader import build_loaders
    from mnist.models.by_name import build_model, choose_trained_layers
    from mnist.runs.folder import has_checkpoint
    from mnist.session import Session, start
    from mnist.training.capture import build_loss
    from mnist.training.evaluate import evaluate
    from mnist.training.losses import LOSSES
    from mnist.training.optimizers import build_optimizer, build_schedule

    # --- accelerator: connects all processes of the job; with --resume, config becomes the settings of that run
    config, accelerator = start(config, explicit_settings)

    # --- data, model
    pretrained = config.pretrained != "none" and not has_checkpoint(config)  # not if a checkpoint is loaded
    with accelerator.local_main_process_first():  # the first process downloads, the others wait
        data = load_dataset(config.dataset, config.data_dir, config.data_options)
        model = build_model(
            config.model,
            len(data.class_names),
            data.image_shape,
            pretrained=pretrained,
            normalization=data.normalization,
            batch_size=config.batch_sizes(accelerator.num_processes).batch_size,  # BatchNorm needs at least 2
        )
    choose_trained_layers(model, config.pretrained)  # all, or with --pretrained head the last one
    train_loader, eval_loaders = build_loaders(data, config, accelerator)

    # --- optimizer, schedule, loss; prepare() adapts them to the device and the number of processes
    optimizer = build_optimizer(config.optimizer, model.parameters(), config.learning_rate, config.weight_decay)
    scheduler = build_schedule(config.schedule, optimizer, config.warmup_steps, config.total_steps(len(train_loader)))
    model, optimizer, scheduler, train_loader = accelerator.prepare(model, optimizer, scheduler, train_loader)
    eval_loaders = {split: accelerator.prepare(loader) for split, loader in eval_loaders.items()}
    compute_loss = build_loss(config, model, accelerator, data.train)  # with --compile, also computes the gradients

    # --- run: a folder, trackers, checkpoints, signals
    with Session(accelerator, config, data, model, optimizer, scheduler) as run:
        for epoch in run.epochs():  # until --epochs or --max-steps
            train_loader.set_epoch(epoch)  # the order of the images depends on the seed and the epoch alone
            for X, y, sample_weight in run.batches(train_loader):  # MNIST: [B, 1, 28, 28] in [0, 1], [B], [B]
                optimizer.zero_grad()  # before accumulate(): inside, it would clear gradients accumulated so far
                with accelerator.accumulate(model):
                    loss = compute_loss(X, y, sample_weight)  # loss_function(model(X), y, sample_weight)
                    accelerator.backward(loss)
                    run.clip_gradients()
                    optimizer.step()
                    scheduler.step()
                run.after_step(loss)  # logs, saves checkpoints, stops on a signal or a loss that is not finite

            # --- evaluation of every split (train, val, test) with the same weights
            results = evaluate(model, eval_loaders, LOSSES[config.loss], accelerator, run.check_signals)
            run.after_epoch(results)  # metrics.jsonl, trackers, terminal, checkpoint, report
        run.finish()  # saves the model, writes the report, sends the results to W&B
    accelerator.end_training()  # leaves the process group


def main() -> int:
    """Run `train` with the command line's settings; returns the exit code."""
    return run_process(train, RECIPES)


if __name__ == "__main__":
    end_process(main())
