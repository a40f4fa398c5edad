"""The files of docs/operations name options, metrics and paths that exist."""

from __future__ import annotations

import argparse
import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from siglane.cli import serve
from siglane.cli.common import COMMON
from siglane.engine.engine import EngineStats
from siglane.server.metrics import Metrics
from siglane.settings.flags import Parser, add_options, read_file, read_options
from siglane.settings.keys import read_keys
from siglane.settings.options import options_of
from siglane.settings.server import ServerConfig

ROOT = Path(__file__).parents[2]
OPERATIONS = ROOT / "docs" / "operations"
GROUPS = (*serve.OPTIONS, *COMMON)


def parsed(words: list[str]) -> argparse.Namespace:
    """As `siglane serve` reads them; UserError for a flag that does not exist."""
    command, *rest = words
    assert command == "serve"
    parser = Parser(prog="siglane serve")
    parser.add_argument("model")
    add_options(parser, GROUPS)
    found = parser.parse_args(rest)
    found.command = command
    return found


def dockerfile() -> dict[str, list[str]]:
    """Arguments of its instructions, joined over line ends."""
    text = (OPERATIONS / "Dockerfile").read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            found.setdefault(name, []).append(rest)
    return found


def test_the_dockerfile_starts_a_server() -> None:
    found = dockerfile()
    (entry,), (command,) = map(json.loads, found["ENTRYPOINT"]), map(json.loads, found["CMD"])
    assert entry == ["/opt/siglane/bin/siglane"]
    assert read_options(ServerConfig, parsed(command)).host == "0.0.0.0"
    copied = [word for line in found["COPY"] if "--from" not in line for word in line.split()[:-1]]
    assert all((ROOT / word).exists() for word in copied)
    for line in found["HEALTHCHECK"]:  # a program that would run
        code = json.loads(line.partition("CMD ")[2])[-1]
        compile(code, "HEALTHCHECK", "exec")
        assert "/ready" in code
    extras = re.search(r"\.\[([\w,]+)\]", "\n".join(found["RUN"]))
    assert extras is not None
    optional = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", optional, re.MULTILINE) for extra in extras[1].split(","))


def test_the_services_of_compose() -> None:
    found: dict[str, Any] = yaml.safe_load((OPERATIONS / "compose.yaml").read_text())
    service = found["services"]["siglane"]
    config = read_options(ServerConfig, parsed(service["command"]))
    assert config.log_format == "json"
    assert float(service["stop_grace_period"].removesuffix("s")) > config.drain_timeout
    assert (OPERATIONS / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    for one in found["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in one["ports"])
        mounted = [volume.split(":") for volume in one["volumes"]]
        assert all((OPERATIONS / source).is_file() for source, *_ in mounted if source.startswith("."))
    (keys,) = (volume for volume in service["volumes"] if "keys" in volume)
    assert str(config.api_keys) == keys.split(":")[1]
    scraped = yaml.safe_load((OPERATIONS / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]
    assert scraped["targets"] == [f"siglane:{config.port}"]
    for name in ("grafana.yaml", "grafana_source.yaml"):
        assert yaml.safe_load((OPERATIONS / name).read_text())["apiVersion"] == 1


def test_the_unit_of_systemd() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(OPERATIONS / "siglane.service")
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert program.endswith("/siglane")
    arguments = parsed(words)
    assert arguments.config == Path("/etc/siglane/siglane.toml")
    read_file(arguments, OPERATIONS / "siglane.toml", GROUPS)
    config = read_options(ServerConfig, arguments)
    assert float(service["TimeoutStopSec"]) > config.drain_timeout
    assert str(config.data_dir).startswith(f"/var/lib/{service['StateDirectory']}/")
    variable = service["Environment"].partition("=")[0]  # the last one: configparser keeps one of a name
    assert variable in {option.variable for option in options_of(ServerConfig)}


def test_the_example_of_keys_is_one() -> None:
    assert [key.name for key in read_keys(OPERATIONS / "keys.toml")] == ["search", "nightly"]


ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


def exposed() -> set[str]:
    """Names as Prometheus gets them, of series that nobody has counted yet too."""
    metrics = Metrics()
    metrics.watch_engine(lambda: EngineStats(*range(12)))
    return {family.name + ending for family in metrics.registry.collect() for ending in ENDINGS[family.type]}


def test_the_dashboard_shows_metrics_that_exist() -> None:
    board = json.loads((OPERATIONS / "grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    expressions += [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    named = set(re.findall(r"siglane_\w+", " ".join(expressions)))
    assert named <= exposed()
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in named}
    known = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in exposed()}
    assert known - shown <= {"siglane_feature_cache_misses"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize("name", ["requests_per_minute", "patches_per_minute", "concurrency", "cache_salt"])
def test_the_page_says_what_a_key_may_have(name: str) -> None:
    assert f"| `{name}`" in (ROOT / "docs" / "operations.md").read_text()
