"""The alert rules and the dashboard ask for nothing but what an instance exports, and the rules fire when they should."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exported import exposition, leading, samples

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config"
ALERTS = CONFIG / "alerts.yml"
CASES = ROOT / "tests/unit/alerts.test.yml"
RULES: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((CONFIG / "grafana-dashboard.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]

OF_THE_SCRAPE = {"job", "instance"}  # labels that Prometheus adds
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="apt-get install prometheus")


def expressions() -> Iterator[tuple[str, str]]:
    """Every expression that is asked, and by whom."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in PANELS:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
            yield variable["name"], f"sum by ({label}) ({selector})"


def selected(expression: str) -> Iterator[tuple[str, set[str]]]:
    """The metrics in it, each with the labels that it is selected by."""
    for name, labels in re.findall(r"\b(cacheinval_\w+)(?:\{([^}]*)\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*[=!]~?", labels))


def grouped(expression: str) -> set[str]:
    """The labels in it by which is grouped and joined."""
    lists = re.findall(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)", expression)
    return {label for one in lists for label in re.findall(r"\w+", one)}


def promtool(*arguments: object, text: str | None = None) -> None:
    done = subprocess.run(
        ["promtool", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_asked_for_is_exported(namespace: str) -> None:
    exported = samples(exposition(leading(namespace)))
    for who, expression in expressions():
        known = set(OF_THE_SCRAPE)
        for name, labels in selected(expression):
            assert name in exported, f"{who} asks for {name}"
            assert labels <= exported[name] | OF_THE_SCRAPE, f"{who} selects {name} by {labels}"
            known |= exported[name]
        assert grouped(expression) <= known, who


def test_what_is_said_of_an_alert_names_labels_that_it_has(namespace: str) -> None:
    exported = samples(exposition(leading(namespace)))
    for rule in RULES:
        expression = rule["expr"]
        kept = re.findall(r"\bby \(([^)]*)\)", expression)
        has = set(re.findall(r"\w+", " ".join(kept))) or OF_THE_SCRAPE.union(
            *(exported[name] for name, _ in selected(expression))
        )
        for text in rule["annotations"].values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= has, rule["alert"]


def test_every_alert_says_how_bad_it_is_what_it_means_and_what_to_do() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names)
    for rule in RULES:
        assert rule["alert"].startswith("Cacheinval")
        assert re.fullmatch(r"\d+[ms]", rule["for"])
        assert rule["labels"] == {"severity": rule["labels"]["severity"]}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert len(rule["annotations"]["summary"]) < 120
        assert rule["annotations"]["description"].count(".") >= 2
        for other in re.findall(r"\bCacheinval\w+", rule["annotations"]["description"]):
            assert other in names


def test_the_settings_that_it_scrapes_by_load_the_rules() -> None:
    settings = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    assert settings["rule_files"] == [ALERTS.name]
    assert "cacheinval" in [job["job_name"] for job in settings["scrape_configs"]]


def test_every_alert_has_a_case() -> None:
    cases = yaml.safe_load(CASES.read_text())["tests"]
    fired = set(re.findall(r'alertname="(\w+)"', json.dumps(cases).replace("\\", "")))
    assert fired == {rule["alert"] for rule in RULES}
    for case in cases:
        assert case["promql_expr_test"][0]["exp_samples"] == [], f"{case['name']}: too early, nothing fires"
    exported = {name for _, expression in expressions() for name, _ in selected(expression)}
    given = set(re.findall(r"cacheinval_\w+", CASES.read_text()))
    assert given <= exported


@needs_promtool
def test_the_rules_fire_when_they_should_and_else_do_not() -> None:
    promtool("test", "rules", CASES)


@needs_promtool
def test_prometheus_takes_the_settings() -> None:
    promtool("check", "config", CONFIG / "prometheus.yml")


@needs_promtool
def test_every_case_sees_an_alert_that_comes_too_early(tmp_path: Path) -> None:
    hasty = [rule | {"for": "0s"} for rule in RULES]
    (tmp_path / ALERTS.name).write_text(yaml.safe_dump({"groups": [{"name": "hasty", "rules": hasty}]}))
    cases = tmp_path / CASES.name
    cases.write_text(CASES.read_text().replace("../../config/", ""))
    with pytest.raises(AssertionError) as seen:
        promtool("test", "rules", cases)
    assert set(re.findall(r'got: {alertname="(\w+)"}', str(seen.value))) == {rule["alert"] for rule in RULES}


# The dashboard


def test_the_dashboard_loads_without_editing() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    sources = [panel["datasource"] for panel in PANELS if panel["type"] != "row"]
    sources += [target["datasource"] for panel in PANELS for target in panel.get("targets", ())]
    sources += [variable["datasource"] for variable in variables.values() if variable["type"] == "query"]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    assert "id" not in DASHBOARD  # Grafana would look for one that it has
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == variables.keys()


def test_its_panels_are_told_apart_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert taken.isdisjoint(cells), panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert panel["targets"], panel["title"]


@needs_promtool
def test_prometheus_can_evaluate_what_the_dashboard_asks(tmp_path: Path) -> None:
    asked = [expression.replace("$__rate_interval", "1m") for _, expression in expressions()]
    rules = [{"record": f"asked:{number}", "expr": expression} for number, expression in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "rules.yml")
