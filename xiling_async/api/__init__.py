"""The service over HTTP: transport, wire format, what a failed exchange proves, the calls, throttle and retry."""
