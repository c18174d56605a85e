"""What a run tells people: logs, metrics, timings, reports. Imports no torch."""
