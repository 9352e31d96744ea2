"""The report: plots and a self-contained page that show what the curriculum did."""
