"""Speed, measured side by side in one run; how to run it stands in README.md here."""
