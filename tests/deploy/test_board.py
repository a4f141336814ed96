"""Grafana's board: a real Prometheus, which scrapes a real server under load, answers every query of every panel."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.server import Server, chat_body, wait_for
from tools import board

CONFIG = Path(__file__).parents[2] / "deploy" / "prometheus.yaml"
BOARD: dict[str, Any] = json.loads(board.FILE.read_text(encoding="utf-8"))
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
KEYS = """
[[key]]
name = "alice"
key = "sk-of-alice"
[[key]]
name = "prometheus"
key = "sk-of-prometheus"
role = "metrics"
"""


def test_the_board_is_up_to_date() -> None:
    assert board.FILE.read_text(encoding="utf-8") == board.page(), "run: python tools/board.py"


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_every_metric_exists(server: Server) -> None:
    """Those of named keys and of batches are there where there are any, as below."""
    server.chat(max_tokens=2)
    there = {re.split(r"[{ ]", line)[0] for line in server.http.get("/metrics").text.splitlines() if line[0] != "#"}
    asked = {name for _, query in QUERIES for name in re.findall(r"\b((?:vllm|gptq_api):\w+)", query)}
    assert len(asked) > 25
    assert {name for name in asked - there if not name.startswith(("gptq_api:key_", "gptq_api:batch"))} == set()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Prometheus:
    """The program, with our configuration for another target, faster."""

    def __init__(self, target: str, folder: Path) -> None:
        program = shutil.which("prometheus")
        assert program is not None
        (folder / "key").write_text("sk-of-prometheus")
        config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
        config["global"]["scrape_interval"] = "500ms"
        (job,) = config["scrape_configs"]
        job["authorization"]["credentials_file"] = str(folder / "key")
        job["static_configs"] = [{"targets": [target]}]
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        port = free_port()
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yaml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, trust_env=False)

    def is_up(self) -> bool:
        """Whether it has seen the target."""
        assert self.process.poll() is None, "prometheus left"
        try:
            return any(value > 0 for value in self.values("up"))
        except httpx.HTTPError:
            return False

    def values(self, query: str) -> list[float]:
        answer = self.http.get("/api/v1/query", params={"query": query})
        if answer.status_code in (404, 503):  # it begins
            return []
        assert answer.status_code == 200, f"{query}: {answer.text}"
        return [float(series["value"][1]) for series in answer.json()["data"]["result"]]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.http.close()
        self.log.close()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not here: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "keys.toml").write_text(KEYS)
    flags = ("--api-key-file", str(folder / "keys.toml"), "--batch-dir", str(folder / "batches"))
    with Server(*flags, "--speculate", "auto") as server:
        running = Prometheus(f"127.0.0.1:{server.port}", folder)
        done = threading.Event()
        thread = threading.Thread(target=load, args=(server, done))
        thread.start()
        try:
            wait_for(running.is_up, 60)
            yield running
        finally:
            done.set()
            thread.join()
            running.close()


def load(server: Server, done: threading.Event) -> None:
    """One request after the other, until the tests are through; of alice."""
    until = time.monotonic() + 300
    number = 0
    while not done.is_set() and time.monotonic() < until:
        number += 1
        body = chat_body(f"Count from 1 to {number % 9 + 2}.", max_tokens=40, stream=False)
        answer = server.post("/v1/chat/completions", body, authorization="Bearer sk-of-alice")
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=lambda text: text[:60])
def test_every_query_returns_data(prometheus: Prometheus, title: str, query: str) -> None:
    asked = query.replace("$model", ".*").replace("$instance", ".*").replace("$__rate_interval", "15s")
    assert "$" not in asked
    found = wait_for(lambda: [value for value in prometheus.values(asked) if value == value], 30)  # without NaN
    assert all(value >= 0 for value in found), title


@pytest.mark.parametrize("variable", [entry for entry in BOARD["templating"]["list"] if entry["type"] == "query"])
def test_what_can_be_chosen_is_there(prometheus: Prometheus, variable: dict[str, Any]) -> None:
    found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
    assert found is not None
    wait_for(lambda: prometheus.values(found[1]), 30)
    answer = prometheus.http.get(f"/api/v1/label/{found[2]}/values", params={"match[]": found[1]}).json()
    assert answer["data"]
