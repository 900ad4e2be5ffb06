"""Benchmarks: `make bench`. Apart from the tests, which never depend on time."""
