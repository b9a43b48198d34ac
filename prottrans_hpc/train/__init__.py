"""Training: loop, loader, optimizers, schedule, precision, checkpoints, preemption."""
