"""Image towers side by side at equal parameters and equal training time: plan, runs, report."""
