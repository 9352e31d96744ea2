"""Asks the models of a finished run a prompt: teacher, student before and student, next to each other."""
