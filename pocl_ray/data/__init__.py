"""Sources, prompts, tokenization and batches: from a file of rows to the tensors of a micro-batch."""
