"""Training on Ray Train: driver, worker, policies, checkpoints."""
