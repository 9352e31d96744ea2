"""Ray as the driver sees it: connection, capacity, actor pools, errors, job submission."""
