"""The dashboard and the alert rules: what they ask for exists, and PromQL, templates and fields are right."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvcanary.dashboards import ALERTS, GRAFANA
from kvcanary.observers.metric_families import FAMILIES

promql = pytest.importorskip("promql_parser", reason='pip install "kvcanary[test]"')
yaml = pytest.importorskip("yaml", reason='pip install "kvcanary[test]"')

BY_NAME = {family.name: family for family in FAMILIES}
TARGET = {"job", "instance"}  # what Prometheus itself adds
DURATION = re.compile(r"([0-9]+[smhdwy])+")
GROUP = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [rule for group in GROUP["groups"] for rule in group["rules"]]
DASHBOARD: dict[str, Any] = json.loads(GRAFANA.read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], t["expr"], t.get("legendFormat", "")) for panel in PANELS for t in panel["targets"]]
COUNTER_FUNCTIONS = {"rate", "increase"}


def parsed(query: str) -> Any:
    """The syntax tree of a query, with Grafana's variables put in."""
    for variable, value in {"$__rate_interval": "1m", "$__range": "6h", "$job": ".*", "$instance": ".*"}.items():
        query = query.replace(variable, value)
    assert "$" not in query, query
    return promql.parse(query)


def selectors(node: Any, inside: str = "") -> Iterator[tuple[Any, str]]:
    """(vector selector, name of the function around it) of a tree."""
    match type(node).__name__:
        case "VectorSelector":
            yield node, inside
        case "MatrixSelector":
            yield node.vector_selector, inside
        case "Call":
            for argument in node.args:
                yield from selectors(argument, node.func.name)
        case "BinaryExpr":
            yield from selectors(node.lhs, inside)
            yield from selectors(node.rhs, inside)
        case "AggregateExpr" | "ParenExpr":
            yield from selectors(node.expr, inside)
        case "NumberLiteral":
            pass
        case other:
            raise AssertionError(f"{other}: teach this test about it")


def labels_of(node: Any) -> set[str]:
    """The labels that a query's answer has."""
    match type(node).__name__:
        case "VectorSelector":
            return {*BY_NAME[node.name].labels, *TARGET}
        case "MatrixSelector":
            return labels_of(node.vector_selector)
        case "Call":
            return labels_of(node.args[0])
        case "BinaryExpr":
            return labels_of(node.lhs) if type(node.lhs).__name__ != "NumberLiteral" else labels_of(node.rhs)
        case "AggregateExpr":
            kept = set() if node.modifier is None else set(node.modifier.labels)
            assert node.modifier is None or str(node.modifier).startswith("by"), "without: teach this test about it"
            assert kept <= labels_of(node.expr), f"grouped by {kept - labels_of(node.expr)}, which no series has"
            return kept
        case "ParenExpr":
            return labels_of(node.expr)
        case other:
            raise AssertionError(f"{other}: teach this test about it")


def check_query(query: str) -> Any:
    tree = parsed(query)
    found = list(selectors(tree))
    assert found
    for selector, function in found:
        assert selector.name in BY_NAME, f"there is no metric {selector.name}"
        family = BY_NAME[selector.name]
        used = {matcher.name for matcher in selector.matchers.matchers}
        assert used <= {*family.labels, *TARGET}, f"{selector.name} has no label {used - set(family.labels)}"
        is_total = selector.name == "kvcanary_scrub_passes_total"  # shown as it is: how often it went round
        assert (function in COUNTER_FUNCTIONS) == (family.is_counter and not is_total), query
    labels_of(tree)
    return tree


def check_values(query: str) -> None:
    """What a query compares a label with is a value that the label can have."""
    states = {"off", "waiting", "running", "stalled", "fallen", "closed"}
    for selector, _ in selectors(parsed(query)):
        for matcher in selector.matchers.matchers:
            if matcher.name == "state" and selector.name == "kvcanary_health":
                assert matcher.value in states


class TestAlerts:
    def test_the_file_has_the_fields_that_prometheus_knows(self) -> None:
        assert set(GROUP) == {"groups"}
        assert [set(group) for group in GROUP["groups"]] == [{"name", "rules"}]
        for rule in RULES:
            assert {"alert", "expr", "labels", "annotations"} <= set(rule) <= {
                "alert", "expr", "for", "keep_firing_for", "labels", "annotations",
            }  # fmt: skip
            assert re.fullmatch(r"KvCanary[A-Za-z]+", rule["alert"])
            assert DURATION.fullmatch(rule.get("for", "0s"))
            assert rule["labels"] in ({"severity": s} for s in ("critical", "warning", "info"))
        names = [rule["alert"] for rule in RULES]
        assert len(names) == len(set(names)) >= 8

    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
    def test_a_rule_asks_for_what_there_is_and_says_what_to_do(self, rule: dict[str, Any]) -> None:
        tree = check_query(rule["expr"])
        check_values(rule["expr"])
        assert type(tree).__name__ == "BinaryExpr", "an alert compares with a limit"
        known = labels_of(tree)
        assert set(rule["annotations"]) == {"summary", "description"}
        for text in rule["annotations"].values():
            for template in re.findall(r"\{\{(.*?)\}\}", text):
                label = re.fullmatch(r" \$labels\.(\w+) ", template)
                assert label is None or label[1] in known, f"{label and label[1]} is no label of the answer"
                assert label or template == " $value | humanize ", template
            assert text.count("{{") == text.count("}}") and len(text) > 20

    def test_what_a_rule_looks_back_on_is_longer_than_two_scrapes(self) -> None:
        for rule in RULES:
            for window in re.findall(r"\[(\w+)\]", rule["expr"]):
                assert promql.parse_duration(window) >= timedelta(minutes=5)


class TestDashboard:
    @pytest.mark.parametrize("query", sorted({query for _, query, _ in QUERIES}))
    def test_a_query_asks_for_what_there_is(self, query: str) -> None:
        check_query(query)

    def test_every_metric_has_a_panel_and_follows_the_choice_of_targets(self) -> None:
        found = [selector for _, query, _ in QUERIES for selector, _ in selectors(parsed(query))]
        assert {selector.name for selector in found} == set(BY_NAME)
        assert all({m.name for m in selector.matchers.matchers} >= TARGET for selector in found)

    def test_legends_name_labels_that_the_answer_has(self) -> None:
        for title, query, legend in QUERIES:
            assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= labels_of(parsed(query)), title

    def test_the_panels_have_their_place(self) -> None:
        ids = [panel["id"] for panel in DASHBOARD["panels"]]
        assert len(ids) == len(set(ids))
        cells = [
            (x, y)
            for panel in DASHBOARD["panels"]
            for at in [panel["gridPos"]]
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        ]
        assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
        rows = [panel["gridPos"]["y"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
        assert all(a < b for a, b in pairwise(rows))

    def test_the_variables_are_those_that_are_used(self) -> None:
        variables = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
        assert set(variables) == {"datasource", *TARGET}
        assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}
        for name in TARGET:
            metric, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", variables[name]["query"]).groups()  # type: ignore[union-attr]
            assert metric in BY_NAME and label == name


# What happens to the series, and which alerts fire 40 minutes in. Series: start+step per minute x number.
CASES: dict[str, tuple[dict[str, str], set[str]]] = {
    "healthy": (
        {
            'kvcanary_violations_total{pool="full",reason="DATA"}': "0x60",
            'kvcanary_health{state="running"}': "1x60",
            'kvcanary_health{state="stalled"}': "0x60",
            'kvcanary_health{state="fallen"}': "0x60",
            "kvcanary_steps_total": "0+600x60",
            "kvcanary_forwards_total": "0+600x60",
            "kvcanary_guard_lag_steps": "150x60",
            "kvcanary_snapshot_interval_steps": "100x60",
            "kvcanary_dropped_records_total": "0x60",
            "kvcanary_observer_errors_total": "0x60",
            "kvcanary_black_box_errors_total": "0x60",
            "kvcanary_paused": "0x60",
            "kvcanary_enabled": "1x60",
        },
        set(),
    ),
    "one finding": (
        {'kvcanary_violations_total{pool="full",reason="DATA"}': "0x35 1x25"},
        {"KvCanaryViolation"},
    ),
    "a finding of long ago": ({'kvcanary_violations_total{pool="full",reason="DATA"}': "1x60"}, set()),
    "stalled": ({'kvcanary_health{state="stalled"}': "0x39 1x20"}, {"KvCanaryStalled"}),
    "overwritten": ({'kvcanary_health{state="fallen"}': "1x60"}, {"KvCanaryMemoryOverwritten"}),
    "unguarded": (
        {
            "kvcanary_steps_total": "0+600x60",
            "kvcanary_forwards_total": "5x60",
            "kvcanary_snapshot_interval_steps": "100x60",
            "kvcanary_enabled": "1x60",
        },
        {"KvCanaryNoForwards"},
    ),
    "no snapshots are taken": (
        {
            "kvcanary_steps_total": "0+600x60",
            "kvcanary_forwards_total": "0x60",
            "kvcanary_guard_lag_steps": "0+600x60",
            "kvcanary_snapshot_interval_steps": "0x60",
            "kvcanary_enabled": "1x60",
        },
        set(),
    ),
    "behind": (
        {"kvcanary_guard_lag_steps": "0+100x60", "kvcanary_snapshot_interval_steps": "100x60"},
        {"KvCanaryGuardLag"},
    ),
    "dropped": ({"kvcanary_dropped_records_total": "0x35 7x25"}, {"KvCanaryRecordsDropped"}),
    "observers": ({"kvcanary_observer_errors_total": "0+1x60"}, {"KvCanaryObserverErrors"}),
    "disk full": ({"kvcanary_black_box_errors_total": "0x38 1x25"}, {"KvCanaryBlackBoxErrors"}),
    "paused for a moment": ({"kvcanary_paused": "0x30 1x30"}, set()),
}
LATE = {
    "paused": ({"kvcanary_paused": "1x80"}, {"KvCanaryPaused"}),
    "off": ({"kvcanary_enabled": "0x80"}, {"KvCanaryOff"}),
}


def test_promtool_agrees_and_the_rules_fire_when_they_should(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool: apt-get install prometheus, or put it on the PATH")
    rules = tmp_path / "alerts.yaml"
    rules.write_text(ALERTS.read_text(encoding="utf-8"), encoding="utf-8")
    checked = subprocess.run(
        [promtool, "check", "rules", str(rules)], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    # Names alone: promtool compares whole alerts, so each is asked for by the ALERTS series that it writes.
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": when,
                    "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(fired)],
                }
            ],
        }
        for cases, when in ((CASES, "40m"), (LATE, "70m"))
        for series, fired in cases.values()
    ]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": tests}))
    tested = subprocess.run(
        [promtool, "test", "rules", str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_rule_fires_in_some_case() -> None:
    assert {name for _, fired in (*CASES.values(), *LATE.values()) for name in fired} == {r["alert"] for r in RULES}
