"""The HTTP endpoint: the webhook, the probes, and the server that ends without dropping a request."""
