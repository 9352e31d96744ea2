"""The curriculum: buckets, pacing and the schedule of stages. Pure numpy; imports neither torch nor ray."""
