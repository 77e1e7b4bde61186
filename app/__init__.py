"""The receiver up to the queue, and what the web and the workers share (docs/architecture.md)."""
