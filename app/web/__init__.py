"""The HTTP endpoint: the webhook, the probes, and the line that each request leaves in the log."""

from __future__ import annotations

from app.web.asgi import application
from app.web.probes import Probes
from app.web.webhook import Webhook

__all__ = ["Probes", "Webhook", "application"]
