"""`python -m app.cli`: the same as `ota-receiver`."""

from app.cli.main import main

main()
