"""What stands in for Redis while it is away: events on the local disk, drained through the same script later."""
