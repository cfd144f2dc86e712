"""Events, counters and OpenTelemetry."""
