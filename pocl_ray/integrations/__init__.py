"""POCL in other libraries' trainers: `curriculum` (the plan), `huggingface` (Trainer), `gkd` (TRL's GKDTrainer)."""
