"""What a training step is made of, and what goes on around it: losses to checkpoints."""
