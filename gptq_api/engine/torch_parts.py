"""What `import torch` brings that a forward pass never asks for, loaded when somebody asks: a third of that import is
not spent on it, nor 26 MB of the engine's memory.

Among it is what torch registers for tensors without memory (`device="meta"`, torch.compile, torch.export); the engine
has none. A name that a torch does not have, or asks for while it is imported, changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PARTS = frozenset(
    {
        "torch._meta_registrations",
        "torch.distributions",
        "torch.export",
        "torch.masked",
        "torch.nn.intrinsic",
        "torch.nn.qat",
        "torch.nn.quantizable",
        "torch.nn.quantized",
        "torch.optim",
        "torch.profiler",
        "torch.quantization",
    }
)


def load_when_asked() -> None:
    """Before torch is imported; without effect on a process that has done so."""
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, _Finder())


class _Part(ModuleType):
    """Empty until an attribute is missed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's own
            raise AttributeError(name)
        _fill(self)
        return getattr(self, name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent = sys.modules.get(fullname.rpartition(".")[0])
        if parent is not None:
            _fill(parent)
        if fullname not in PARTS:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)
        return spec


class _Later(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Part(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet."""


def _fill(module: ModuleType) -> None:
    if isinstance(module, _Part):
        later = module.__loader__
        assert isinstance(later, _Later)
        module.__class__ = ModuleType  # type: ignore[assignment]
        later.loader.exec_module(module)
