"""Commands that measure; `make bench` runs all of them and writes dated files under benchmarks/results."""
