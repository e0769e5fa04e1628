"""Console output, progress bars, metric logs and plots."""
