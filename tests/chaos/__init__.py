"""Tests that kill and freeze processes at any moment and then count what is lost."""
