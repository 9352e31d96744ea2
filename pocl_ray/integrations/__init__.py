"""POCL in trainers of others: `curriculum` (the plan), `huggingface` (Trainer), `gkd` (TRL's GKDTrainer)."""
