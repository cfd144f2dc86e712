"""Uploads and result files, and their faults."""
