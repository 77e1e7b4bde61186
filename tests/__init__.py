"""The tests are a package so that they can share `eventually` and run `python -m tests.benchmarks`."""
