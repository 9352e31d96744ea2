"""Many short trainings in a few processes, judged and compared in pairs; and races, which drop arms of one run."""
