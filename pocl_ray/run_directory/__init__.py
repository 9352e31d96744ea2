"""What a run leaves behind: storage, manifest, claim, lease."""
