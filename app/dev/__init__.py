"""For a laptop and for tests: embedded Valkey, the sandbox Channel Manager, the demo. Never imported in production."""
