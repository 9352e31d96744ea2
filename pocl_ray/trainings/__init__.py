"""Many short trainings in a few processes, judged and compared in pairs."""
