"""`python -m app.cli`: the same as `ota-receiver`."""

from app.cli import main

main()
