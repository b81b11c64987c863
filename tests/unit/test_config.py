"""What lies in `config` and `docker` fits the code, as far as can be seen without starting it."""

import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from cacheinval import Settings, messages
from cacheinval.cli import app
from cacheinval.monitoring import PATHS
from cacheinval.receiver import RETRY_LIMIT
from cacheinval.settings import PREFIX

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
MANIFESTS: list[dict[str, Any]] = list(yaml.safe_load_all((ROOT / "docker/kubernetes.yaml").read_text()))
EXAMPLE = (ROOT / "config/example.env").read_text()
COMMANDS = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def settings_from(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Settings()


# config/example.env


def uncommented() -> str:
    return re.sub(rf"^#(?={PREFIX})", "", EXAMPLE, flags=re.MULTILINE)


def test_the_example_has_every_setting_once_with_its_description() -> None:
    named = re.findall(rf"^#{PREFIX}([A-Z_]+)=", EXAMPLE, re.MULTILINE)
    assert [name.lower() for name in named] == list(Settings.model_fields)
    for field in Settings.model_fields.values():
        assert f"# {field.description}\n" in EXAMPLE


def test_the_example_says_the_defaults_and_a_shell_can_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"set -a\n{uncommented()}\nexec env -0"
    said = subprocess.run(["sh", "-c", script], env={}, capture_output=True, text=True, check=True).stdout
    environment = dict(line.split("=", 1) for line in said.split("\0") if line.startswith(PREFIX))
    assert len(environment) == len(Settings.model_fields)
    read = settings_from(environment, monkeypatch)
    for name in Settings.model_fields.keys() - {"instance_id"}:
        assert getattr(read, name) == Settings.model_fields[name].default, name


def test_the_example_as_it_is_sets_nothing() -> None:
    assert [line for line in EXAMPLE.splitlines() if line and not line.startswith("#")] == []


# config/rabbitmq.conf, config/definitions.json, config/prometheus.yml


def test_the_broker_is_told_what_the_code_needs() -> None:
    text = (ROOT / "config/rabbitmq.conf").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    said = dict(re.fullmatch(r"([a-z_.]+) = (\S+)", line).groups() for line in lines)  # type: ignore[union-attr]
    assert int(said["max_message_size"]) == messages.MAX_BODY_ACCEPTED
    assert int(said["consumer_timeout"]) > 1000 * RETRY_LIMIT
    assert said["cluster_partition_handling"] == "pause_minority"


def test_the_user_of_the_broker_may_do_what_is_needed_and_no_more() -> None:
    definitions = json.loads((ROOT / "config/definitions.json").read_text())
    (user,), (rights,) = definitions["users"], definitions["permissions"]
    assert user["password_hash"] == ""
    assert user["tags"] == ""
    assert rights["vhost"] == definitions["vhosts"][0]["name"]
    longest = f"cacheinval.{'n' * 64}"
    needed = {
        "cacheinval.shop",
        "cacheinval.shop.dead",
        f"{longest}.{'i' * 64}",
        "amq.gen-53C_ptKjhUsMv1NXFG7uJw",
    }
    for action in ("configure", "write", "read"):
        allowed = re.compile(rights[action])
        assert [name for name in needed if not allowed.search(name)] == []
        assert [
            name
            for name in ("orders", "cacheinval", "x.cacheinval.shop", "amq.topic", "")
            if allowed.search(name)
        ] == []
        assert bool(allowed.search("amq.default")) == (action == "write")


def test_prometheus_asks_the_services_of_the_compose_file() -> None:
    jobs = yaml.safe_load((ROOT / "config/prometheus.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    instances = {
        f"{name}:{service['environment']['CACHEINVAL_HTTP_PORT']}"
        for name, service in COMPOSE["services"].items()
        if service["image"] == "cacheinval:local" and "profiles" not in service
    }
    assert set(targets["cacheinval"]) == instances
    assert targets["rabbitmq"] == ["rabbitmq:15692"]


# docker/compose.yaml


def test_the_compose_file_has_what_it_promises() -> None:
    roles = {name: service.get("command") for name, service in COMPOSE["services"].items()}
    apart = {name for name, service in COMPOSE["services"].items() if "profiles" in service}
    assert apart == {"replicas", "standby"}
    assert set(roles) - apart == {
        "postgres", "rabbitmq", "relay", "product", "reader-1", "reader-2", "reader-3",
    }  # fmt: skip
    assert (roles["replicas"], roles["standby"]) == (["serve"], ["relay"])
    assert COMPOSE["services"]["replicas"]["deploy"] == {"replicas": "${REPLICAS:-5}"}
    assert roles["relay"] == ["relay"]
    assert all(roles[name] == ["serve"] for name in roles if name.startswith(("product", "reader")))
    assert {command for words in roles.values() if words for command in words} <= COMMANDS
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert len(set(published)) == len(published) == 5
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_its_passwords_come_from_outside_and_are_required() -> None:
    text = (ROOT / "docker/compose.yaml").read_text()
    variables = re.findall(r"\$\{[^}]*\}|\$[A-Za-z]\w*", text)
    assert {variable.partition(":?")[0] for variable in variables} == {
        "${POSTGRES_PASSWORD",
        "${RABBITMQ_PASSWORD",
        "${REPLICAS:-5}",
    }
    assert all(":?" in variable for variable in variables if "PASSWORD" in variable)
    for password in re.findall(r"(?:_PASS\w*: |://\w+:(?=\S+@))(\S+)", re.sub(r"\$\{[^}]*\}", "${}", text)):
        assert password.startswith("${}")


def test_its_environment_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in COMPOSE["services"].values():
        ours = {name: value for name, value in service["environment"].items() if name.startswith(PREFIX)}
        if service["image"] != "cacheinval:local":
            assert ours == {}
            continue
        assert {name.removeprefix(PREFIX).lower() for name in ours} <= Settings.model_fields.keys()
        assert all(isinstance(value, str) for value in ours.values())
        given = {name: re.sub(r"\$\{[^}]*\}", "secret", value) for name, value in ours.items()}
        assert settings_from(given, monkeypatch).http_host == "0.0.0.0"


def test_everything_in_it_is_watched_and_stops_in_time() -> None:
    for name, service in COMPOSE["services"].items():
        assert "healthcheck" in service or service.get("command") == ["relay"], name  # the image's own
        if service["image"] == "cacheinval:local":
            assert int(service["stop_grace_period"].removesuffix("s")) > 10
            assert service["read_only"]
            assert service["cap_drop"] == ["ALL"]
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / "docker" / source).is_file(), source
        waits_for = service.get("depends_on", {})
        assert waits_for.keys() <= COMPOSE["services"].keys()
        for other in waits_for:
            assert "healthcheck" in COMPOSE["services"][other]


def test_it_builds_the_dockerfile_that_is_there() -> None:
    builds = {json.dumps(service["build"]) for service in COMPOSE["services"].values() if "build" in service}
    (build,) = map(json.loads, builds)
    context = (ROOT / "docker" / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()


# docker/kubernetes.yaml


def deployed() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By name: what is deployed, and its only container."""
    found = {}
    for one in MANIFESTS:
        if one["kind"] == "Deployment":
            (container,) = one["spec"]["template"]["spec"]["containers"]
            found[one["metadata"]["name"]] = (one, container)
    return found


def test_the_manifests_run_what_there_is_with_settings_that_are_accepted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (config,) = (one for one in MANIFESTS if one["kind"] == "ConfigMap")
    assert all(isinstance(value, str) for value in config["data"].values())
    secrets = config["data"]["CACHEINVAL_SECRETS_DIR"]
    header = (ROOT / "docker/kubernetes.yaml").read_text().partition("apiVersion")[0]
    for name in re.findall(r"--from-file=(\w+)", header):
        assert name.removeprefix("cacheinval_") in Settings.model_fields
        (tmp_path / name).write_text("amqp://u:p@broker/v" if "broker" in name else "postgresql://u:p@db/d")
    settings = settings_from({**config["data"], "CACHEINVAL_SECRETS_DIR": str(tmp_path)}, monkeypatch)
    assert (settings.broker_url, settings.database_url) == ("amqp://u:p@broker/v", "postgresql://u:p@db/d")
    assert settings.http_host == "0.0.0.0"
    assert {name: words["args"] for name, (_, words) in deployed().items()} == {
        "product": ["serve"],
        "relay": ["relay"],
    }
    for one, container in deployed().values():
        assert set(container["args"]) <= COMMANDS
        assert container["image"] == "cacheinval:local"
        assert container["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
        assert container["ports"] == [{"name": "http", "containerPort": settings.http_port}]
        (mount,), (volume,) = container["volumeMounts"], one["spec"]["template"]["spec"]["volumes"]
        assert (mount["name"], mount["mountPath"], mount["readOnly"]) == (volume["name"], secrets, True)
        assert volume["secret"]["secretName"] == re.search(r"secret generic (\w+)", header)[1]  # type: ignore[index]


def test_its_probes_ask_what_is_served_and_scraping_too() -> None:
    for one, container in deployed().values():
        paths = {
            kind: container[f"{kind}Probe"]["httpGet"]["path"]
            for kind in ("liveness", "readiness", "startup")
        }
        assert paths == {"liveness": "/healthz", "readiness": "/readyz", "startup": "/healthz"}
        assert set(paths.values()) <= set(PATHS)
        assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in paths} == {"http"}
        notes = one["spec"]["template"]["metadata"]["annotations"]
        assert notes["prometheus.io/path"] in PATHS
        assert notes["prometheus.io/port"] == str(container["ports"][0]["containerPort"])
        assert notes["prometheus.io/scrape"] == "true"


def test_its_pods_have_the_time_to_stop_and_no_rights() -> None:
    from cacheinval.worker import SHUTDOWN_TIMEOUT

    for one, container in deployed().values():
        pod = one["spec"]["template"]["spec"]
        pause = (
            container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        )
        assert pod["terminationGracePeriodSeconds"] > SHUTDOWN_TIMEOUT + int(pause[1])
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    assert {name: one["spec"]["replicas"] for name, (one, _) in deployed().items()} == {
        "product": 3,
        "relay": 2,
    }


def test_what_selects_in_the_manifests_finds() -> None:
    labels = {name: one["spec"]["template"]["metadata"]["labels"] for name, (one, _) in deployed().items()}
    for name, (one, _) in deployed().items():
        assert one["spec"]["selector"]["matchLabels"] == labels[name] == one["metadata"]["labels"]
    (service,) = (one for one in MANIFESTS if one["kind"] == "Service")
    (budget,) = (one for one in MANIFESTS if one["kind"] == "PodDisruptionBudget")
    assert service["spec"]["selector"] == budget["spec"]["selector"]["matchLabels"] == labels["product"]
    assert {port["targetPort"] for port in service["spec"]["ports"]} == {"http"}


# docker/Dockerfile


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return re.findall(rf"^{name} (.*)$", joined, re.MULTILINE)


def test_the_image_is_built_from_files_that_are_there_and_sent() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {
        source for line in instructions("COPY") if "--from" not in line for source in shlex.split(line)[:-1]
    }
    assert {source.rstrip("/") for source in copied} == sent
    assert [source for source in copied if not (ROOT / source).exists()] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= sent  # the build needs them
    (extras,) = re.findall(r'"\.\[([a-z,]+)\]"', DOCKERFILE)
    no_command = {"dev", "bench", "sqlalchemy", "otel"}  # nothing that the image runs uses these
    assert set(extras.split(",")) == project["optional-dependencies"].keys() - no_command


def test_the_image_runs_as_somebody_and_answers_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [int(user) for user in instructions("USER")] == [10001]
    assert all(re.fullmatch(r"python:3\.\d+-slim( AS \w+)?", image) for image in instructions("FROM"))
    said = dict(re.findall(r"(\w+)=(\S+)", " ".join(instructions("ENV"))))
    ours = {name: value for name, value in said.items() if name.startswith(PREFIX)}
    assert {name.removeprefix(PREFIX).lower() for name in ours} <= Settings.model_fields.keys()
    settings = settings_from(ours, monkeypatch)
    assert settings.http_host == "0.0.0.0"
    assert instructions("EXPOSE") == [str(settings.http_port)]
    assert json.loads(instructions("ENTRYPOINT")[0]) == ["cacheinval"]
    assert set(json.loads(instructions("CMD")[0])) <= COMMANDS


def test_the_health_check_is_python_and_asks_the_right_path(monkeypatch: pytest.MonkeyPatch) -> None:
    (check,) = instructions("HEALTHCHECK")
    python, option, code = json.loads(check.partition("CMD ")[2])
    assert (python, option) == ("python", "-c")
    assert "/healthz" in code
    compile(code, "HEALTHCHECK", "exec")
