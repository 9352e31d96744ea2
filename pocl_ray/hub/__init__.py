"""Pushes the outcome of a run to the Hugging Face Hub, with a model card that says where it comes from."""
