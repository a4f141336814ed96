"""GET /: the page as bytes and headers, for which nobody needs a browser. What it does is in tests/web."""

from __future__ import annotations

import base64
import hashlib
import math
import re

from safetensors import safe_open

from gptq_api.cli.inspect import inspect
from gptq_api.config import InspectSettings
from gptq_api.demo import DEMO_PATH
from gptq_api.model.config import read_config
from gptq_api.model.modules import all_modules
from tests.support.openapi import check_documented
from tests.support.server import Server, check_error

HTML = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
"""as browsers send it"""
MOST_BYTES = 100_000


def test_one_file_that_needs_no_other(server: Server) -> None:
    answer = server.http.get("/", headers=HTML)
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert len(answer.content) < MOST_BYTES
    page = answer.text
    assert page.count("<script>") == page.count("<style>") == 1 and "<script " not in page
    icon = re.findall(r'<link rel="icon" href="(data:image/svg\+xml,[^"]*)">', page)
    assert len(icon) == 1 and page.count("<link") == 1
    rest = re.sub(r'<link rel="icon"[^>]*>', "", page)
    assert not re.search(r"""["'(=]\s*(?:https?:)?//[a-z0-9]""", rest), "no address of another host"
    assert not re.search(r"@import|\burl\(|<img|<iframe|<object|<embed|<base|<meta http-equiv", rest)
    # what is asked for is relative, so that a proxy may put the page below any path
    addresses = re.findall(r"""(?:ask|fetch)\(\s*["']([^"']*)""", rest) + re.findall(
        r'(?:href|src|action)="([^"]*)"', rest
    )
    assert len(addresses) >= 6 and all(re.fullmatch(r"[a-z_0-9/]+|#\w+", address) for address in addresses), addresses


def test_text_never_becomes_html(server: Server) -> None:
    page = server.http.get("/", headers=HTML).text
    ways = "innerHTML|outerHTML|insertAdjacent|document.write|DOMParser|createContextualFragment|srcdoc|setHTML|eval\\("
    assert not re.search(ways + r"|new Function|javascript:|import\(|createElement\([\"']script", page)
    assert not re.search(r"set(?:Timeout|Interval)\(\s*[\"']", page)
    assert not re.search(r"\s(?:on\w+|style)=[\"']", page), "the policy lets none of these run"


def test_the_policy_names_what_is_in_the_page_and_nothing_else(server: Server) -> None:
    answer = server.http.get("/", headers=HTML)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_programs_get_two_lines_and_head_gets_none(server: Server) -> None:
    for accept in ("*/*", "application/json", "text/plain", ""):
        answer = server.http.get("/", headers={"accept": accept})
        assert answer.status_code == 200 and answer.headers["content-type"] == "text/plain; charset=utf-8"
        assert "/v1" in answer.text and "/docs" in answer.text and len(answer.text.splitlines()) == 2
        assert answer.headers["vary"] == "accept"
    head = server.http.head("/", headers=HTML)
    assert head.status_code == 200 and not head.content
    assert head.headers["content-length"] == str(len(server.http.get("/", headers=HTML).content))
    check_error(server.http.post("/", json={}), 405)
    document = server.http.get("/openapi.json").json()
    for headers in (HTML, {"accept": "*/*"}):
        check_documented(document, "/", server.http.get("/", headers=headers))
        check_documented(document, "/", server.http.head("/", headers=headers))
    message = check_error(server.http.get("/nothing-like-it"), 404)["message"]
    assert "Did you mean" not in message


def test_it_needs_no_key_and_tells_nothing_that_needs_one(strict_server: Server) -> None:
    nobody = {"authorization": ""}
    answer = strict_server.http.get("/", headers={**HTML, **nobody})
    assert answer.status_code == 200
    assert "strict" not in re.sub(r'"use strict"', "", answer.text), "not even the model's name"
    check_error(strict_server.http.get("/server_info", headers=nobody), 401)
    told = strict_server.http.get("/server_info").json()
    assert told["model"] == "strict" and told["max_num_seqs"] == 2 and "4-bit" in told["description"]


def test_server_info_says_what_inspect_says(server: Server) -> None:
    told = server.http.get("/server_info").json()
    facts = inspect(InspectSettings(model_path="demo"))
    checkpoint, architecture, quantization = told["checkpoint"], facts["architecture"], facts["quantization"]
    for name in ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim"):
        assert checkpoint[name] == architecture[name], name
    assert checkpoint["architecture"] == architecture["name"] and checkpoint["layout"] == facts["layout"]
    assert checkpoint["bits"] == {str(bits): count for bits, count in quantization["bits"].items()}
    assert checkpoint["group_sizes"] == {str(size): count for size, count in quantization["group_size"].items()}
    assert checkpoint["act_order"] is True and quantization["act_order_modules"] == quantization["modules"]
    assert f"weights {checkpoint['weight_bytes'] / 2**20:.0f} MiB" in told["description"]
    assert checkpoint["kv_bytes_per_token"] == facts["kv_bytes_per_token"]
    assert sum(checkpoint["kernels"].values()) >= 4 * architecture["layers"] and told["device"] == facts["device"]
    with safe_open(DEMO_PATH / "model.safetensors", "pt") as file:
        rest = [file.get_slice(name).get_shape() for name in file.keys() if name.endswith(".weight")]  # noqa: SIM118
    linears = sum(module.in_features * module.out_features for _, module in all_modules(read_config(DEMO_PATH)))
    assert checkpoint["parameters"] == linears + sum(math.prod(shape) for shape in rest)


def test_a_page_that_is_somebody_elses_name_for_us_is_refused(server: Server) -> None:
    check_error(server.http.get("/", headers={**HTML, "host": "evil.example"}), 403)


def test_it_can_be_left_out() -> None:
    with Server("--no-web-page") as server:
        message = check_error(server.http.get("/", headers=HTML), 404)["message"]
        assert message.startswith("Unknown request URL: GET /.")
        assert "/" not in server.http.get("/openapi.json").json()["paths"]
        assert server.http.get("/docs").status_code == 200
