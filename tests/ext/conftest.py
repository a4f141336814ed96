"""One compiler for all tests of ext/: no source is compiled twice for an architecture."""

from __future__ import annotations

import pytest

from tests.ext.sass import Compiler


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    return Compiler(tmp_path_factory.mktemp("compiled"))
