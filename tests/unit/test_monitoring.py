"""The Grafana board and the rules of Prometheus read metrics that exist; the board can be imported, the rules fire."""

from __future__ import annotations

import re
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # it comes with uvicorn, without types

from app.alerts import RULES
from tests.board import BOARD, DEPLOY, PANELS, expressions
from tests.programs import program
from tests.unit.test_docs import OPERATIONS, SCRAPED

OF_PROMETHEUS = {"job", "instance", "pod"}
"""Labels that a scrape adds to each metric."""

UNITS = {"s", "short", "none", "cpm"}


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in read("alerts.yml")["groups"] for rule in group["rules"]]


def metrics(expression: str) -> dict[str, set[str]]:
    """Return the labels of each metric of an expression, `le` if it reads the buckets of a histogram."""
    found: dict[str, set[str]] = {}
    for name in re.findall(r"\bota_\w+", expression):
        family = re.sub(r"_(bucket|count|sum)$", "", name)
        found[name] = {*SCRAPED[family], *OF_PROMETHEUS, *(["le"] if name.endswith("_bucket") else [])}
    return found


def unknown_labels(expression: str) -> set[str]:
    """Return the labels that an expression names and that its metrics do not have."""
    known = metrics(expression)
    wrong = {
        label
        for name, matchers in re.findall(r"(ota_\w+)\{([^}]*)\}", expression)
        for label in re.findall(r"(\w+)\s*[=!]", re.sub(r'"[^"]*"', "", matchers))
        if label not in known[name]
    }
    grouped = {
        label for labels in re.findall(r"\b(?:by|without|on) \(([^)]*)\)", expression) for label in labels.split(", ")
    }
    return wrong | (grouped - set().union(*known.values()))


def promtool(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        [program("promtool", "prometheus"), *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


class TestBoard:
    """Grafana imports it and asks for the data source; https://grafana.com/docs names the fields."""

    def test_it_asks_for_a_data_source_and_names_no_other(self) -> None:
        (asked,) = BOARD["__inputs"]
        sources = [one["datasource"] for one in (*PANELS, *BOARD["templating"]["list"])]

        assert (asked["name"], asked["type"], asked["pluginId"]) == ("DS_PROMETHEUS", "datasource", "prometheus")
        assert {(one["type"], one["uid"]) for one in sources} == {("prometheus", "${DS_PROMETHEUS}")}
        assert BOARD.keys() >= {"uid", "title", "schemaVersion", "refresh", "time", "templating", "__requires"}
        assert "id" not in BOARD

    def test_each_panel_has_its_own_id_and_title_a_unit_and_a_description(self) -> None:
        ids, titles = [one["id"] for one in BOARD["panels"]], [one["title"] for one in BOARD["panels"]]

        assert len(set(ids)) == len(ids)
        assert len(set(titles)) == len(titles)
        assert [one["title"] for one in PANELS if one["fieldConfig"]["defaults"]["unit"] not in UNITS] == []
        assert [one["title"] for one in PANELS if not one["description"].endswith(".")] == []
        assert {one["type"] for one in PANELS} == {"timeseries", "stat", "table", "state-timeline"}
        for panel in PANELS:
            assert [one["refId"] for one in panel["targets"]] == list("ABCDEFG")[: len(panel["targets"])]

    def test_no_panel_lies_on_another_and_each_row_holds_its_own(self) -> None:
        fields = [
            {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            for at in (one["gridPos"] for one in BOARD["panels"])
        ]
        tops = [one["gridPos"]["y"] for one in BOARD["panels"]]

        assert [(a, b) for a, b in combinations(range(len(fields)), 2) if fields[a] & fields[b]] == []
        assert max(x for field in fields for x, _ in field) == 23
        assert tops == sorted(tops)
        assert [one["title"] for one in BOARD["panels"] if one["type"] == "row"] == [
            "Intake",
            "Fetch",
            "Sinks",
            "Upstream",
            "Redis",
        ]

    def test_it_shows_every_metric_and_no_other(self) -> None:
        shown = {re.sub(r"_(bucket|count|sum)$", "", name) for text in expressions().values() for name in metrics(text)}

        assert shown == SCRAPED.keys()

    @pytest.mark.parametrize("panel", PANELS, ids=lambda panel: str(panel["title"]))
    def test_labels_variables_and_runbooks_of_a_panel_exist(self, panel: dict[str, Any]) -> None:
        variables = {one["name"] for one in BOARD["templating"]["list"]}
        for one in panel["targets"]:
            grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", one["expr"]))))

            assert unknown_labels(one["expr"]) == set()
            assert set(re.findall(r"\{\{(\w+)\}\}", one["legendFormat"])) <= grouped
            assert set(re.findall(r"\$(\w+)", one["expr"])) <= {*variables, "__rate_interval"}
            # Several web processes show the same values of Redis: they must not be added.
            assert not re.search(
                r"\b(?:sum|avg|count)\b(?: by \([^)]*\))? ?\((?:rate|increase|ota_(?!spool))", one["expr"]
            )
        runbooks = re.findall(r"[Rr]unbooks?: ([a-z, -]+)", panel["description"])
        anchors = set(re.findall(r'<a id="([^"]+)">', OPERATIONS))
        assert {name for names in runbooks for name in names.split(", ")} <= anchors

    def test_variables_are_read_from_metrics_that_have_their_label(self) -> None:
        for one in BOARD["templating"]["list"]:
            expression, label = re.findall(r"label_values\((.*), (\w+)\)", one["query"]["query"])[0]

            assert unknown_labels(expression) == set()
            assert {label} <= set().union(*metrics(expression).values())

    def test_promtool_reads_every_expression(self, tmp_path: Path) -> None:
        as_rules = [{"record": f"panel:{number}", "expr": one} for number, one in enumerate(expressions().values())]
        (tmp_path / "board.yml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": as_rules}]}))

        assert promtool("check", "rules", tmp_path / "board.yml") == (
            0,
            f"Checking {tmp_path}/board.yml\n  SUCCESS: {len(as_rules)} rules found\n\n",
        )


class TestRules:
    @pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule["alert"]))
    def test_a_rule_reads_metrics_that_exist_and_leads_to_its_runbook(self, rule: dict[str, Any]) -> None:
        """An expression over an unknown metric never fires."""
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page == "docs/operations.md"
        assert anchor in set(re.findall(r'<a id="([^"]+)">', OPERATIONS))

        known = metrics(rule["expr"])
        assert known
        assert unknown_labels(rule["expr"]) == set()
        named = set(re.findall(r"\$labels\.(\w+)", f"{rule['annotations']}"))
        assert named <= set().union(*known.values())
        if alert := re.search(r'ota_alert\{name="(\w+)"', rule["expr"]):
            assert alert[1] in RULES

    def test_every_alert_of_the_log_has_a_rule_and_every_section_too(self) -> None:
        """The rule reads ota_alert, or the metric behind the alert."""
        by_metric = {"fetch_late": "ota_oldest_pending_fetch_seconds", "breaker_open": "ota_breaker_open"}
        expected = "\n".join(rule["expr"] for rule in rules())
        reached = {rule["annotations"]["runbook_url"].partition("#")[2] for rule in rules()}

        assert [one for one in RULES if by_metric.get(one, f'ota_alert{{name="{one}"}}') not in expected] == []
        assert set(re.findall(r'<a id="([^"]+)">', OPERATIONS)) == reached

    def test_every_rule_is_tested_when_it_fires_and_when_it_does_not(self) -> None:
        """The instance that a rule is about stays in its alert; else two web processes make one alert, not two."""
        checks: dict[str, list[Any]] = {}
        for one in read("alerts.test.yml")["tests"]:
            checks.setdefault(one["name"], []).extend(one.get("promql_expr_test", []))

        for rule in rules():
            name = rule["alert"]
            fires = [f'alertname="{name}"' in str(check.get("exp_samples", "")) for check in checks[name]]
            assert set(fires) == {True, False}, name
            assert ("without (instance" in rule["expr"]) == (
                name
                not in {
                    "OtaReceiverDown",
                    "OtaRedisUnavailable",
                    "OtaSpoolFilling",
                    "OtaSpoolFails",
                }
            ), name

    def test_promtool_accepts_the_rules_and_their_tests(self) -> None:
        checked, tested = (
            promtool("check", "rules", DEPLOY / "alerts.yml"),
            promtool("test", "rules", DEPLOY / "alerts.test.yml"),
        )

        assert (checked[0], tested[0]) == (0, 0), checked[1] + tested[1]
        assert f"{len(rules())} rules found" in checked[1]
