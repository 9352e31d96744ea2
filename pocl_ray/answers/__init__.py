"""A model answers prompts, and how good the answers are."""
