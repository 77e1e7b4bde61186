"""The sinks, one file a kind. A user's own sink needs of ours what this module names."""

from workers.sinks.contract import Context, Reject, Retry

__all__ = ["Context", "Reject", "Retry"]
