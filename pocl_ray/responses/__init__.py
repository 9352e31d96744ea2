"""Responses that the teacher writes to the training prompts, in place of the rows' own (SeqKD)."""
