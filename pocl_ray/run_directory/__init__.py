"""The files that a run leaves: storage, manifest, claim, lease."""
