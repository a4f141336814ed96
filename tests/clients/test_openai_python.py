"""openai-python's own tests of chats, completions, models and responses, out of its source distribution, against a
server of ours instead of the mock that they are written for."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest

from tests.clients.environments import folder
from tests.support.server import Server

FILES = ("chat/test_completions.py", "test_completions.py", "test_models.py", "test_responses.py")
WHICH = "(create or TestModels or TestAsyncModels or path_params) and not delete"
"""without what needs answers that are kept: retrieve, list, update, delete, cancel, compact"""
NONSENSE = {
    "with_all_params": ("logit_bias", "previous_response_id"),
    "TestResponses": ("Missing required parameter: 'input'",),
    "TestAsyncResponses": ("Missing required parameter: 'input'",),
}
"""part of a test's name -> what a refusal of values that its generator writes names: a token "foo", an answer that is
not there, a request without any input"""


@pytest.mark.timeout(400)
def test_its_own_tests_pass_but_for_values_without_a_meaning(tmp_path: Path) -> None:
    where = folder("openai-tests")
    (source,) = (where / "sdist").glob("openai-*/")
    report = tmp_path / "report.xml"
    options = ("-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--junitxml={report}", "-k", WHICH)
    tests = [f"tests/api_resources/{name}" for name in FILES]
    with Server("--accept-any-model") as server:
        subprocess.run(
            [str(where / "bin" / "python"), "-m", "pytest", *options, *tests],
            cwd=source,
            env={**os.environ, "TEST_API_BASE_URL": server.url},
            capture_output=True,
            timeout=300,
        )
    passed, wrong = 0, []
    for case in Xml.parse(report).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        failures = [*case.iter("failure"), *case.iter("error")]
        message = " ".join(failure.get("message", "") for failure in failures)
        known = [word for part, words in NONSENSE.items() if part in name for word in words]
        if not failures:
            passed += 1
        elif "BadRequestError" not in message or not any(word in message for word in known):
            wrong.append(f"{name}: {message[:300]}")
    assert not wrong, "\n".join(wrong)
    assert passed > 80
