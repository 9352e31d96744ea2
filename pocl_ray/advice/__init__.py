"""Advice before a run: a config for one's rows and models, the state of the machine, steps and cost."""
