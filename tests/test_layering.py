"""The arrows of the architecture, checked on the source."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "gptq_api"
FLOOR = {
    "errors",
    "on_disk",
    "config",
    "field_docs",
    "settings_help",
    "settings_source",
    "settings_words",
    "types",
    "step",
    "logs",
    "rates",
    "frames",
    "child",
    "exits",
}
MAY_IMPORT = {
    "cli": {
        "api",
        "batch",
        "edge",
        "hub",
        "hub_cache",
        "text",
        "engine",
        "quantize",
        "bench",
        "verify",
        "checkpoint",
        "model",
        "runner",
    },
    "bench": {"text", "runner", "model", "checkpoint"},
    "quantize": {"model", "checkpoint"},
    "verify": {"runner", "model", "checkpoint"},
    "api": {"edge", "text", "engine", "grammar", "batch"},
    "batch": set(),
    "edge": set(),
    "text": {"demo"},
    "engine": {"scheduler", "runner", "grammar", "text"},
    "grammar": {"text"},
    "scheduler": set(),
    "runner": {"_cpu", "model", "kernels", "checkpoint", "demo"},
    "model": {"kernels", "checkpoint"},
    "kernels": {"_cuda"},
    "checkpoint": set(),
    "demo": set(),
    "hub": set(),
    "hub_cache": {"hub"},
}
IN_API_MAY_IMPORT = {
    "server": {"batches", "listener", "service", "traces"},
    "listener": {"app", "batches", "loading", "service", "errors", "traces"},
    "loading": {"answers", "errors"},
    "batches": {"batch_run", "service"},
    "batch_run": {"in_process", "service"},
    "in_process": set(),
    "multipart": set(),
    "app": {"document", "routes", "errors", "traces"},
    "body": {"service", "errors"},
    "routes": {
        *("answers", "batches", "body", "document", "in_process", "pages", "requests", "service", "metrics", "errors"),
    },
    "answers": {"service", "metrics", "traces", "errors", "messages_errors", "terms", "tool_names"},
    "document": {"messages_errors"},
    "requests": {"body", "multipart", "service", "errors", "terms", "tool_names"},
    "service": {"gate", "metrics", "speed", "traces", "errors"},
    "speed": {"collectors"},
    "gate": set(),
    "metrics": {"collectors"},
    "collectors": set(),
    "traces": {"metrics"},
    "errors": {"invalid", "messages_errors", "unknown_url"},
    "invalid": set(),
    "messages_errors": set(),
    "pages": set(),
    "terms": set(),
    "tool_names": set(),
    "unknown_url": set(),
}
"""a module of api/, or a folder in it"""
WITHOUT_TORCH = ("api", "batch", "edge", "text", "scheduler")
FILES = sorted(ROOT.rglob("*.py"))
assert FILES


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def imported(path: Path) -> frozenset[str]:
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def part_of(path: Path, folder: Path) -> str:
    """The package or module of `folder` that a file belongs to."""
    return path.relative_to(folder).parts[0].removesuffix(".py")


def package_of(path: Path) -> str:
    return part_of(path, ROOT)


def arrows_from(path: Path) -> set[str]:
    """Packages of ours that a file imports, without its own and the floor."""
    names = {name.split(".")[1] for name in imported(path) if name.startswith("gptq_api.")}
    return {name for name in names - FLOOR - {package_of(path)} if not name.startswith("__")}


def arrows_in_api_from(path: Path) -> set[str]:
    names = {name.split(".")[2] for name in imported(path) if name.startswith("gptq_api.api.")}
    return names - {part_of(path, ROOT / "api")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = package_of(path)
    if package in FLOOR:
        assert not arrows_from(path), f"{path.name} is floor"
    elif package in ("__init__", "__main__"):
        assert arrows_from(path) <= {"cli"}
    else:
        assert arrows_from(path) <= MAY_IMPORT[package], "that arrow does not exist"


@pytest.mark.parametrize("path", sorted(ROOT.joinpath("api").rglob("*.py")), ids=lambda path: path.name)
def test_imports_inside_api_follow_the_arrows(path: Path) -> None:
    part = part_of(path, ROOT / "api")
    assert arrows_in_api_from(path) <= IN_API_MAY_IMPORT.get(part, set()), "that arrow does not exist"


ANSWERS = (
    *("logprobs", "encoding", "prompt_logprobs", "choice"),
    *("work", "formats", "responses", "messages", "stream", "respond"),
)
"""api/answers from tokens to bytes: each may import those that stand before it"""


@pytest.mark.parametrize("module", ANSWERS)
def test_answers_are_made_in_one_direction(module: str) -> None:
    prefix = "gptq_api.api.answers."
    names = {name.split(".")[3] for name in imported(ROOT / f"api/answers/{module}.py") if name.startswith(prefix)}
    assert not names & set(ANSWERS[ANSWERS.index(module) :])


def test_no_arrow_is_listed_that_nobody_needs() -> None:
    packages: dict[str, set[str]] = {package: set() for package in MAY_IMPORT}
    parts: dict[str, set[str]] = {part: set() for part in IN_API_MAY_IMPORT}
    for path in FILES:
        if package_of(path) in packages:
            packages[package_of(path)] |= arrows_from(path)
        if package_of(path) == "api" and part_of(path, ROOT / "api") in parts:
            parts[part_of(path, ROOT / "api")] |= arrows_in_api_from(path)
    assert packages == MAY_IMPORT
    assert parts == IN_API_MAY_IMPORT


ROOMS = {
    "runner/cpu": {"runner/cuda"},
    "runner/cuda": {"runner/cpu"},
    "model": {"runner"},
}
"""who does not know whom, inside what the table above takes as one"""


@pytest.mark.parametrize("room", ROOMS)
def test_devices_do_not_know_each_other(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for other in ROOMS[room]:
            prefix = "gptq_api." + other.replace("/", ".")
            assert not any(name.startswith(prefix) for name in imported(path)), f"{path} imports {prefix}"


def test_only_backends_and_the_loader_ask_what_device_it_is() -> None:
    """But for three wrappers of kernels: those that pack 4 and 8 bits, on the CPU as well, for tests; and the
    sampler's, which refuses what is not on a GPU."""
    asking = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("device.type")
        for path in FILES
        if "device.type" in path.read_text(encoding="utf-8")
    }
    rooms = ("runner/cpu/backend.py", "runner/cuda/backend.py", "runner/backends.py", "runner/load.py")
    outside = {name: count for name, count in asking.items() if name not in rooms}
    assert outside == {
        "kernels/pack.py": 1,
        "kernels/planes.py": 1,
        "kernels/sampling.py": 1,
    }


def test_one_module_imports_the_compiled_kernels() -> None:
    importers = [str(path.relative_to(ROOT)) for path in FILES if "gptq_api._cuda" in imported(path)]
    assert importers == ["kernels/extension.py"]
    importers = [str(path.relative_to(ROOT)) for path in FILES if "gptq_api._cpu" in imported(path)]
    assert importers == ["runner/cpu/native.py"]


def test_the_server_asks_nothing_of_the_probes() -> None:
    for path in FILES:
        assert path.name == "probes.py" or not any("kernels.probes" in name for name in imported(path)), path


def test_one_module_imports_transformers_and_only_when_it_runs() -> None:
    importers = [path for path in FILES if "transformers" in {name.split(".")[0] for name in imported(path)}]
    assert [str(path.relative_to(ROOT)) for path in importers] == ["verify/reference.py"]
    top = ast.parse(importers[0].read_text(encoding="utf-8")).body
    assert not any(isinstance(node, ast.ImportFrom) and node.module == "transformers" for node in top)


def test_sequences_stay_in_the_scheduler() -> None:
    """Everybody else has values: a Step, what was sampled, ids."""
    for path in FILES:
        if package_of(path) != "scheduler":
            assert not any(name.startswith("gptq_api.scheduler.sequence") for name in imported(path)), path


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in places.items() if len(found) > 1}


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_no_torch_and_no_pickle_by_name(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"torch", "pickle", "marshal", "shelve"}, path


def test_the_server_s_processes_load_nothing_that_runs_what_a_checkpoint_brought() -> None:
    """Nor does a server load what draws in a terminal."""
    code = (
        "import sys, gptq_api.cli.main, gptq_api.cli.serve, gptq_api.api.listener\n"
        "assert 'rich' not in sys.modules\n"
        "import gptq_api.cli.chat\n"
        "libraries = ['torch', 'transformers', 'tokenizers', 'sentencepiece', 'jinja2']\n"
        "print([m for m in libraries if m in sys.modules])\n"
        "import gptq_api.engine.process, gptq_api.engine.core, gptq_api.grammar.vocabulary, gptq_api.text.process\n"
        "sys.exit(any(m in sys.modules for m in libraries[2:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_the_checkpoint_reader_unpickles_and_only_safely() -> None:
    for path in FILES:
        source = path.read_text(encoding="utf-8")
        assert not {"pickle", "marshal", "shelve"} & imported(path), path  # pickletools names opcodes and runs none
        for line in source.splitlines():
            if "torch.load(" in line and not line.lstrip().startswith("#"):
                assert path.parent.name == "checkpoint", path
                assert "weights_only=True" in source, path
