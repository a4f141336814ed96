"""One compiler for all tests of ext/, in whatever process: no source is compiled twice for an architecture."""

from __future__ import annotations

import os

import pytest

from tests.ext.sass import Compiler


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return Compiler(tmp_path_factory.mktemp("compiled"))
    of_all_workers = tmp_path_factory.getbasetemp().parent / "compiled"
    of_all_workers.mkdir(exist_ok=True)
    return Compiler(of_all_workers)
