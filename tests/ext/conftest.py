"""One compiler for all tests of ext/, in whatever process: no source is compiled twice for an architecture."""

from __future__ import annotations

import pytest

from tests.conftest import WORKER
from tests.ext.sass import Compiler


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    if not WORKER:
        return Compiler(tmp_path_factory.mktemp("compiled"))
    of_all_workers = tmp_path_factory.getbasetemp().parent / "compiled"
    of_all_workers.mkdir(exist_ok=True)
    return Compiler(of_all_workers)
