"""Compares finished runs: what differs in their configs, and what came of it on the same rows."""
