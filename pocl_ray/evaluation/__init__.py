"""Evaluation: ROUGE-L, generation, and the comparison of models over sets and seeds."""
