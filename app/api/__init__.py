"""The HTTP API for the partner's own services: orders, and the pull feed."""
