"""Building blocks with no knowledge of the service: clock, tasks, JSON, redaction, file lock."""
