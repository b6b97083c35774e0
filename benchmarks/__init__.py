"""Where weightlift stands beside its peers, on this machine: ``python -m benchmarks``, or ``make bench``."""
