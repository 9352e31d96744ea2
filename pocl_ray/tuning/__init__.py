"""The search: Ray Tune over the curriculum, with one scoring pass for all trials."""
