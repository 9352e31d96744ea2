"""Teachers and students: loading, cutting a student from its teacher, adapters, import of GGUF files."""
