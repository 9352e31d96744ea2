"""Distillation: losses and the step (torch only), the DeepSpeed engine and the Ray Train worker around it."""
