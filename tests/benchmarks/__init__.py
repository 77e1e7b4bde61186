"""Benchmarks that compare within one run; see README.md."""
