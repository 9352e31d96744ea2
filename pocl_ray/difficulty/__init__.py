"""Difficulty: per-row signals, scoring them with Ray Data, and ranking rows from easy to hard."""
