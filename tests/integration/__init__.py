"""Tests against a real Valkey of our own and real sockets on 127.0.0.1."""
