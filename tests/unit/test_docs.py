"""What the README, the protocol and the changelog say is so."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import typer
from exported import exposition, leading, samples
from loglines import logged

from cacheinval import Client, Settings, messages
from cacheinval.bus.consuming import DEAD_LETTER_QUEUE, DURABLE_QUEUE
from cacheinval.cli import app
from cacheinval.monitoring import PATHS
from cacheinval.outbox import SCHEMA_VERSION, schema_sql
from cacheinval.page import EVENTS, serving
from cacheinval.settings import PREFIX

CLI: Any = typer.main.get_command(app)
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROTOCOL = (ROOT / "cacheinval/PROTOCOL.md").read_text()
GUIDE = (ROOT / "cacheinval/GUIDE.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OPERATING = (ROOT / "config/OPERATING.md").read_text()
DOCUMENTS = {
    "README.md": README,
    "cacheinval/PROTOCOL.md": PROTOCOL,
    "cacheinval/GUIDE.md": GUIDE,
    "CHANGELOG.md": CHANGELOG,
    "config/OPERATING.md": OPERATING,
}
FILES = {
    name: (ROOT / name).read_text()
    for name in (
        "config/alerts.yml",
        "config/prometheus.yml",
        "config/rabbitmq.conf",
        "config/example.env",
        "docker/compose.yaml",
    )
}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one of the same rank."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, f"there is no section {title!r}"
    return match[2]


# The settings


def settings_table() -> str:
    rows = []
    for name, field in Settings.model_fields.items():
        default = "made at start" if field.default_factory else "unset" if field.default is None else None
        rows.append(f"| `{name.upper()}` | {default or f'`{field.default}`'} | {field.description} |")
    return "\n".join(rows)


def test_the_table_of_settings_is_what_settings_has() -> None:
    rows = re.findall(r"^\| `[A-Z_]+` \|.*$", section(README, "Settings"), re.MULTILINE)
    assert "\n".join(rows) == settings_table()


@pytest.mark.parametrize("name", [*DOCUMENTS, *FILES])
def test_every_variable_that_is_named_is_a_setting(name: str) -> None:
    text = (DOCUMENTS | FILES)[name]
    known = {PREFIX + field.upper() for field in Settings.model_fields} | {f"{PREFIX}SECRETS_DIR"}
    assert set(re.findall(rf"{PREFIX}[A-Z_]*[A-Z]", text)) <= known


# The code


def printed(code: str) -> list[str]:
    """What the comments after `print(…)` say will come out."""
    return re.findall(r"^ *print\(.*\)  # (\w+)", code, re.MULTILINE)


def test_there_are_examples_and_each_compiles() -> None:
    examples = blocks(README, "python") + blocks(GUIDE, "python")
    assert len(examples) >= 6
    for example in examples:
        ast.parse(example)


def test_the_first_example_has_fifteen_lines_and_writes_in_the_transaction() -> None:
    first = [line for line in blocks(README, "python")[0].splitlines() if line.strip()]
    assert len(first) <= 15
    assert "client.transaction()" in "\n".join(first)


def test_the_example_without_servers_prints_what_it_says() -> None:
    (example,) = (block for block in blocks(README, "python") if "memory://" in block)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    ran = subprocess.run(
        [sys.executable, "-c", example], env=environment, capture_output=True, text=True, timeout=30
    )
    assert ran.stderr == ""
    assert ran.stdout.split() == printed(example) == ["99", "99", "109"]


@pytest.fixture
async def client() -> Client:
    return Client(Settings(broker_url="memory://", database_url="postgresql://127.0.0.1:1/x", warm_keys=1))


async def test_every_method_that_the_readme_names_is_there(client: Client) -> None:
    from cacheinval import CoherentCache, Transaction

    text = README + GUIDE
    called = set(re.findall(r"\bclient\.(\w+)", text)) - {"py"}
    assert called >= {"cache", "cached", "transaction", "record", "invalidate", "attach"}
    assert {name for name in called if name not in dir(client) and not hasattr(Client, name)} == set()
    assert {name for name in re.findall(r"\.cache\.(\w+)", text) if not hasattr(CoherentCache, name)} == set()
    own = {name for name in re.findall(r"\btx\.(\w+)", text) if name not in ("execute",)}
    assert {name for name in own if not hasattr(Transaction, name)} == set()


# The command line


def command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that these words name, and what is left of them."""
    found = CLI
    while words and words[0] in getattr(found, "commands", {}):
        found, words = found.commands[words[0]], words[1:]
    return found, words


def spoken_commands(text: str) -> Iterator[list[str]]:
    """What stands after `cacheinval ` in code, word by word."""
    code = re.findall(r"`([^`\n]+)`", without_blocks(text)) + blocks(text, "sh") + blocks(text, "")
    for snippet in code:
        for match in re.finditer(r"(?:^|[\s'])cacheinval ((?:-{0,2}[a-z]+ ?)+)", snippet):
            yield match[1].split()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_that_is_named_exists(name: str) -> None:
    for words in spoken_commands(DOCUMENTS[name]):
        found, rest = command(words)
        assert found.name != "cacheinval", f"cacheinval {' '.join(words)}"
        options = {option for parameter in found.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--") and word != "--"} <= options, words


def test_the_table_of_commands_has_every_command_and_option() -> None:
    table = section(README, "Command line")
    said = set()
    for cell in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE):
        for code in re.findall(r"`([^`]+)`", cell):
            if code.startswith("cacheinval"):
                continue
            found, rest = command(code.split())
            said.add(found)
            options = {option for one in found.params for option in one.opts if option.startswith("--")}
            assert set(re.findall(r"--[a-z]+", " ".join(rest))) == options, code
    leaves = [leaf for one in CLI.commands.values() for leaf in getattr(one, "commands", {"": one}).values()]
    assert [leaf.name for leaf in leaves if leaf not in said] == []


def test_the_bounds_of_the_page_are_those_of_its_code() -> None:
    told = section(PROTOCOL, "The page")
    assert f"{serving.MOST_STREAMS} may look at a time" in told
    assert (
        f"takes nothing for {serving.SEND_WITHIN:g} s is ended, and each after {serving.STREAM_SECONDS:g} s"
        in told
    )


def test_help_ends_with_where_to_read_on() -> None:
    leaves = [leaf for one in CLI.commands.values() for leaf in getattr(one, "commands", {"": one}).values()]
    pointing = [leaf for leaf in leaves if leaf.name not in ("sandbox", "demo")]
    assert len(pointing) >= 10
    for leaf in pointing:
        found = re.fullmatch(r"Read on: “(.+)” in\n\n(.+)", leaf.epilog or "")
        assert found, leaf.name
        assert re.search(rf"^##+ {re.escape(found[1])}$", Path(found[2]).read_text(), re.MULTILINE), leaf.name
    assert [Path(path).name for path in CLI.epilog.split("\n\n")[1:]] == [
        "OPERATING.md",
        "GUIDE.md",
        "PROTOCOL.md",
    ]
    # A wheel has the one that stands elsewhere where the package looks for it first.
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"config/OPERATING.md": "cacheinval/OPERATING.md"}


def test_every_target_of_make_that_is_named_exists() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        word
        for words in re.findall(r"`?\bmake ((?:[a-z]+ ?)+)", "\n".join(code_of(README)))
        for word in words.split()
    }
    assert {"demo", "test", "lint"} <= named <= targets


def code_of(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_blocks(text)) + blocks(text, "sh")


# Names and numbers


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name: str) -> None:
    here = (ROOT / name).parent
    targets = re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[name])
    assert [t for t in targets if "://" not in t and not (here / t.partition("#")[0]).exists()] == []
    paths = re.findall(r"`((?:config|docker|cacheinval|tests)/[\w./-]+)`", DOCUMENTS[name])
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_metric_that_is_named_exists(namespace: str) -> None:
    exposed = set(samples(exposition(leading(namespace))))
    exposed |= {name.removesuffix("_bucket") for name in exposed}
    text = "\n".join([README, PROTOCOL, *FILES.values()])
    named = set(re.findall(r"\b(cacheinval_\w+)", text)) - {"cacheinval_database_url", "cacheinval_recorded"}
    assert len(named) >= 4
    assert named - exposed == set()


def test_what_to_do_is_written_down_for_each_check_of_the_doctor() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "cacheinval/doctor").glob("*.py"))
    checks = set(re.findall(r'\b(?:ok|warning|failed|_checks\.run)\(\s*"([a-z ]+)"', sources))
    assert len(checks) > 15
    told = set(re.findall(r"^\| `([a-z ]+)` \|", section(OPERATING, "When `doctor` is red"), re.MULTILINE))
    assert told == checks


def test_what_status_and_the_page_say_is_written_down_in_their_words() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "cacheinval").glob("**/*.py"))
    table = section(OPERATING, "May any cache be stale?").partition("| it says |")[2].partition("\n\n")[0]
    rows = [row.split(" | ") for row in table.splitlines()[2:]]
    judgements = re.findall(
        r"^    _\w+,$", sources.partition("_WORST_FIRST: ")[2].partition(")")[0], re.MULTILINE
    )
    assert len(rows) == len(judgements) - 1  # nothing is to be done where all are fresh
    said = [words for row in rows for words in re.findall(r"`([^`]+)`", row[0])]
    assert [words for words in said if words not in sources] == []


def test_every_line_of_the_log_that_is_a_warning_or_more_is_explained() -> None:
    lines = logged(ROOT / "cacheinval")
    assert len(lines) > 30
    assert {"suspect", "the outbox waits for the broker", "inconsistent entry"} <= lines
    table = section(OPERATING, "What the log says")
    told = re.findall(r"`([^`]+)`", "\n".join(re.findall(r"^\| (`.*?) \| ", table, re.MULTILINE)))
    assert sorted(told) == sorted(line.replace("%s", "…") for line in lines)


def test_the_paths_of_monitoring_are_all_told() -> None:
    assert [
        path
        for path in (*PATHS, "/")
        if f"`GET {path}`" not in PROTOCOL or f"{path}`" not in section(README, "HTTP")
    ] == []
    assert f"`GET {EVENTS}`" in PROTOCOL


def test_the_changelog_has_the_present_version() -> None:
    version = re.match(r"\d+\.\d+\.\d+", PYPROJECT["project"]["version"])
    assert version
    assert re.search(rf"^## \[{re.escape(version[0])}\] — ", CHANGELOG, re.MULTILINE)


def test_sections_of_the_protocol_that_the_code_cites_exist() -> None:
    sources = [
        *ROOT.glob("cacheinval/**/*.py"),
        *ROOT.glob("cacheinval/**/*.sql"),
        *ROOT.glob("tests/**/*.py"),
    ]
    text = "\n".join(source.read_text() for source in sources if source != Path(__file__))
    cited = set(re.findall(r'PROTOCOL\.md, "([^"]+)"', text)) | set(
        re.findall(r'\("([A-Z][^"]+)"\)', PROTOCOL)
    )
    assert cited >= {"The rules", "Messages", "RabbitMQ"}
    assert cited - set(re.findall(r"^#+ (.+)$", PROTOCOL, re.MULTILINE)) == set()


def test_the_protocol_has_the_names_and_limits_of_the_code() -> None:
    said = section(PROTOCOL, "Messages")
    kinds = {kind.__struct_config__.tag for kind in get_args(messages.Message)}
    assert {
        *re.findall(r"^\| `(\w+)` \| (?:none|.*`)", said.partition("| other kinds |")[2], re.MULTILINE)
    } == kinds - {"invalidate"}
    for field in messages.Invalidate.__struct_fields__:
        assert f"`{field}`" in said
    for limit in (
        f"{messages.MAX_KEYS_SENT} names",
        f"{messages.MAX_KEYS_ACCEPTED:,} names",
        "1 MiB",
        "2 MiB",
        "512 bytes",
    ):
        assert limit in said
    queues = section(PROTOCOL, "RabbitMQ")
    for name, value in [*DURABLE_QUEUE.items(), *DEAD_LETTER_QUEUE.items()]:
        assert f"`{name}` {value}" in queues


def test_the_message_in_the_protocol_is_one() -> None:
    (example,) = blocks(PROTOCOL, "json")
    message = messages.decode(example.encode())
    assert isinstance(message, messages.Invalidate)
    assert set(json.loads(example)) == {"kind", *messages.Invalidate.__struct_fields__}
    foreign = re.search(r"payload='(.*)'", PROTOCOL)
    assert foreign
    assert isinstance(messages.decode(foreign[1].encode()), messages.Invalidate)


def test_the_columns_in_the_protocol_are_those_of_the_schema() -> None:
    made = []
    for name in ("outbox", "instances"):
        table = re.search(
            rf"CREATE TABLE IF NOT EXISTS cacheinval\.{name} \((.*?)^\)",
            schema_sql(),
            re.DOTALL | re.MULTILINE,
        )
        assert table
        made += re.findall(r"^    ([a-z_]+) (\S+?)[ ,]", table[1], re.MULTILINE)
    told = section(PROTOCOL, "Postgres")
    assert re.findall(r"^\| `(\w+)` \| (\S+) \|", told, re.MULTILINE) == made
    assert f"version {SCHEMA_VERSION}" in told


def test_the_names_in_a_shared_cache_are_those_of_the_code() -> None:
    from aiocache.backends.redis import RedisCache

    from cacheinval.backends.shared import SharedEntries

    told = section(PROTOCOL, "The cache outside the process")
    entries = SharedEntries(RedisCache(), "<namespace>", instance_id="<INSTANCE_ID>")
    names = (entries._entry("<key>"), entries._tag("<tag>"), entries._name("epoch"))
    for name in (*names, *entries._names_of("<INSTANCE_ID>")):
        assert f"| `{name}` |" in told
    for name in (entries._entry("k" * 165), entries._tag("two words")):
        assert f"`{name.split(':')[2]}:`" in told
    assert entries._entry("k" * 164).endswith("k" * 164)
    assert "more than 170 characters" in told
