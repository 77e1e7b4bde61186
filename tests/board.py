"""The Grafana board of deploy/ as tests read it: its panels, and their expressions with a value for each variable."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

DEPLOY: Final = Path(__file__).parents[1] / "deploy"
BOARD: Final[dict[str, Any]] = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
PANELS: Final[list[dict[str, Any]]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]


def expressions(interval: str = "5m") -> dict[str, str]:
    """Return each expression, by the title of its panel and its letter there, for all jobs, companies and sinks."""
    return {
        f"{panel['title']} {one['refId']}": re.sub(
            r"\$(?!__)\w+", ".*", one["expr"].replace("$__rate_interval", interval)
        )
        for panel in PANELS
        for one in panel["targets"]
    }
