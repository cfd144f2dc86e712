"""What is remembered of a job, how events change it, and the settings; no I/O."""
