"""Answers of models to prompts: decoding, sampling, and scores of the answers."""
