"""Teachers and students: loading, cutting a student from its teacher, importing GGUF, caching hidden states."""
