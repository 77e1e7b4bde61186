"""Tests that know the product only as a stranger does: its commands, its HTTP, its README."""
