"""An event on its way in: parse, authenticate, record."""
