"""The one training loop, training, evaluation, checkpoints and distributed runs."""
