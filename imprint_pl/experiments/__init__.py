"""Many recipes on many tasks: sweeps, and what their results say."""
