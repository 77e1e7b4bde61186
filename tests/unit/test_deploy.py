"""The files of deploy/ are what their programs accept, and name settings and commands that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from app import settings
from app.cli.main import COMMANDS
from workers.pool import STOP_MARGIN

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").iterdir())
VALUES = {name.upper() for name in settings.NAMES}
NAMES = VALUES | {f"{name}_FILE" for name in VALUES}


def compose() -> dict[str, Any]:
    whole: dict[str, Any] = YAML(typ="safe").load(DEPLOY / "compose.yaml")
    return whole


def test_compose_holds_to_its_schema() -> None:
    program = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]

    done = subprocess.run([*program, DEPLOY / "compose.yaml"], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_gives_each_secret_once_as_a_file_that_is_mounted() -> None:
    services = compose()["services"]
    for role in ("web", "worker", "api", "ops"):
        environment, mounted = services[role]["environment"], services[role]["secrets"]

        assert environment.keys() <= NAMES
        files = {name.removesuffix("_FILE") for name in environment if name.endswith("_FILE")} & VALUES
        assert {name.lower() for name in files} == set(mounted)
        assert all(environment[name] == "" for name in files)
        assert all(environment[f"{name}_FILE"] == f"/run/secrets/{name.lower()}" for name in files)
    assert compose()["secrets"].keys() == {*mounted, "redis_password"}


def test_the_folder_of_the_example_sink_outlives_its_container_and_is_of_its_user() -> None:
    """A named volume takes over the owner of the image's folder."""
    folder = tomllib.loads((DEPLOY.parent / "sinks.example.toml").read_text())["sinks"]["archive"]["folder"]

    assert f"orders:{folder}" in compose()["services"]["worker"]["volumes"]
    made = re.findall(r"install -d -o receiver .*?\nCOPY", (DEPLOY.parent / "Dockerfile").read_text(), re.DOTALL)[0]
    assert folder in made.split()


def test_the_commands_of_deploy_exist() -> None:
    services = compose()["services"]
    named = [
        services["worker"]["command"][1],
        services["worker"]["healthcheck"]["test"][2],
        services["api"]["command"][1],
        services["ops"]["command"][1],
    ]
    named += [match for path in UNITS for match in re.findall(r"ExecStart=\S*/ota-receiver (\w+)", path.read_text())]

    assert sorted(named) == ["api", "api", "health", "ops", "ops", "serve", "worker", "worker"]
    assert set(named) <= COMMANDS.keys()


def test_a_stopping_pool_has_the_time_that_its_longest_fetch_may_take() -> None:
    unit = (DEPLOY / "systemd" / "ota-receiver-worker.service").read_text()
    stops = [re.findall(r"TimeoutStopSec=(\d+)", unit)[0], compose()["services"]["worker"]["stop_grace_period"][:-1]]
    longest = next(one.le for one in settings.Settings.model_fields["upstream_timeout"].metadata if hasattr(one, "le"))

    assert [stop for stop in stops if int(stop) <= longest + STOP_MARGIN] == []


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for path in UNITS:
        # It looks whether the program exists.
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/ota-receiver/bin/ota-receiver", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / path.name) for path in UNITS)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stdout + done.stderr) == (0, "")
