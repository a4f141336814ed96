"""The CPU image, run as a careful operator does: nothing can be written, no rights, any user. `make image-smoke`."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.containers import IMAGE, Container, NoEngineError, engine, image_config, unpacked
from tests.support.server import chat_body

GRACE_S = 45
HEALTHCHECK = ("python3", "-I", "/opt/gptq-api/share/gptq-api/healthcheck.py")
Engine = tuple[list[str], list[str]]

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def found() -> Engine:
    try:
        return engine()
    except NoEngineError as error:
        if "IMAGE" in os.environ:
            pytest.fail(str(error))
        pytest.skip(f"the image is not tested: {error}")


@pytest.fixture(scope="module")
def running(found: Engine) -> Iterator[Container]:
    with Container(found) as container:
        yield container


def test_it_answers_from_a_root_that_cannot_be_written(running: Container) -> None:
    body = chat_body("What is GPTQ?", temperature=0, max_tokens=30)
    answer = running.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]
    assert "<html" in running.http.get("/", headers={"accept": "text/html"}).text
    assert running.run("touch", "/opt/gptq-api/x").returncode != 0
    assert running.run("touch", "/tmp/x").returncode != 0
    assert running.run("touch", "/cache/x").returncode == 0
    assert running.run("id", "-u").stdout.strip() == "10001"


def test_the_kernels_are_compiled_and_nothing_that_compiles_is_there(running: Container) -> None:
    assert "int8 activations" in running.log()
    for name in ("gcc", "g++", "cc", "clang", "nvcc"):
        assert running.run("sh", "-c", f"command -v {name}").returncode != 0
    assert running.run("python3", "-c", "import zmq, opentelemetry.sdk").returncode == 0


def test_the_health_check_asks_the_port_in_use(running: Container, found: Engine, tmp_path: Path) -> None:
    assert running.inspect()["Config"]["Healthcheck"]["Test"] == ["CMD", *HEALTHCHECK]
    assert running.run(*HEALTHCHECK).returncode == 0
    (tmp_path / "gptq-api.toml").write_text("port = 9999\n")
    tmp_path.chmod(0o755)
    mount = ("--volume", f"{tmp_path}:/etc/gptq-api:ro")
    with Container(found, *mount, arguments=("serve", "--config", "/etc/gptq-api/gptq-api.toml"), port=9999) as other:
        assert other.run(*HEALTHCHECK).returncode == 0
        other.signal(signal.SIGTERM)
        assert other.wait() == 0


def test_a_user_whom_the_platform_chose(found: Engine) -> None:
    """As OpenShift does: a number that is in no file, of group 0."""
    with Container(found, "--user", "1234567:0") as container:
        assert container.http.post("/v1/chat/completions", json=chat_body("Hello")).status_code == 200
        assert container.run("touch", "/cache/x").returncode == 0


def test_sigterm_lets_a_stream_finish(found: Engine) -> None:
    with Container(found) as container:
        body = chat_body("Tell me a story.", stream=True, max_tokens=900, ignore_eos=True, temperature=1, seed=1)
        with container.http.stream("POST", "/v1/chat/completions", json=body) as response:
            events = (line for line in response.iter_lines() if line.startswith("data: "))
            next(events)
            ended: list[tuple[float, int]] = []
            thread = threading.Thread(target=lambda: ended.append(container.stop(GRACE_S)))
            thread.start()
            *_, last, done = events
        thread.join()
        assert done == "data: [DONE]"
        assert json.loads(last[6:])["choices"][0]["finish_reason"] == "length"
        (seconds, status) = ended[0]
        assert status == 0 and seconds < GRACE_S


def test_sigterm_right_after_the_start(found: Engine) -> None:
    with Container(found, wait=False) as container:
        seconds, status = container.stop(GRACE_S)
        assert status in (0, 143) and seconds < 15  # 143: before Python itself had begun


def test_it_does_not_listen_to_everybody_without_being_told(found: Engine) -> None:
    with Container(found, env={}, wait=False) as container:
        assert container.wait() == 2
        assert "--api-key" in container.log()


def test_what_it_says_of_itself(found: Engine) -> None:
    config = image_config(found)["Config"]
    labels = config["Labels"]
    assert {f"org.opencontainers.image.{name}" for name in ("title", "licenses", "version", "revision", "created")} <= (
        labels.keys()
    )
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert config["User"] == "gptq" and config["Volumes"].keys() == {"/cache"}
    assert config["Entrypoint"] == ["gptq-api"] and config["StopSignal"] in ("SIGTERM", "15")


def test_it_is_small(found: Engine) -> None:
    assert unpacked(found) < 1.6e9, IMAGE
