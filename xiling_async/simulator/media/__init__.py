"""The result files of the simulated service, whole or faulty."""
