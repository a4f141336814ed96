"""The models that huggingface_hub keeps on this machine: which there are, and out with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_api.hub import HubError


@dataclass(frozen=True)
class CachedModel:
    name: str
    revision: str
    """branches and tags, or the commit where none points at it"""
    size_bytes: int
    """of this revision's files; revisions share those that are the same"""
    last_used: float
    """seconds since 1970"""
    weights: str
    """4-bit gptq; gptq, where no config says how many bits; unquantized; incomplete"""
    folder: str


def cache_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _repositories() -> list[Any]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return [repo for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        return []


def cached_models() -> list[CachedModel]:
    """By name, a line for each revision."""
    found = [
        CachedModel(
            name=repo.repo_id,
            revision=_told(revision),
            size_bytes=revision.size_on_disk,
            last_used=repo.last_accessed,
            weights=_weights(revision.snapshot_path),
            folder=str(revision.snapshot_path),
        )
        for repo in _repositories()
        for revision in repo.revisions
    ]
    return sorted(found, key=lambda model: (model.name.lower(), model.revision))


def remove(name: str, revision: str | None) -> tuple[int, int]:
    """(bytes that became free, revisions of it that stay). HubError where it is not there."""
    from huggingface_hub import scan_cache_dir

    repo = next((repo for repo in _repositories() if repo.repo_id == name), None)
    if repo is None:
        known = ", ".join(sorted(repo.repo_id for repo in _repositories())) or "no models"
        raise HubError(f"{name} is not in {cache_folder()}, which holds {known}")
    chosen = [r for r in repo.revisions if revision is None or revision in r.refs or r.commit_hash.startswith(revision)]
    if not chosen:
        known = ", ".join(sorted(_told(r) for r in repo.revisions))
        raise HubError(f"{name} has no revision {revision} in {cache_folder()}; it has {known}")
    plan = scan_cache_dir().delete_revisions(*(r.commit_hash for r in chosen))
    plan.execute()
    return plan.expected_freed_size, len(repo.revisions) - len(chosen)


def _told(revision: Any) -> str:
    return ", ".join(sorted(revision.refs)) or revision.commit_hash[:12]


def _weights(folder: Path) -> str:
    """What the configs say; what tensors say takes reading them, which is what `inspect` does."""
    if not any(file.suffix in (".safetensors", ".pt", ".pth", ".bin") for file in folder.iterdir()):
        return "incomplete"
    for name in ("config.json", "quantize_config.json", "quant_config.json"):
        try:
            read = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        quantized = read.get("quantization_config", {} if name == "config.json" else read)
        if isinstance(quantized, dict) and (bits := quantized.get("bits", quantized.get("w_bit"))):
            return f"{bits}-bit {quantized.get('quant_method', 'gptq')}"
    return "gptq" if any(map(_has_quantized, folder.glob("*.safetensors"))) else "unquantized"


def _has_quantized(file: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            return any(name.endswith(".qweight") for name in opened.keys())  # noqa: SIM118  (it is no dict)
    except (SafetensorError, OSError):
        return False
