"""Tests that do no I/O: values in, values out."""
