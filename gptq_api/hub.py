"""Names on the Hugging Face hub, such as `TheBloke/vicuna-7B-1.1-GPTQ`, become local folders before anything is loaded.

What is downloaded: the configs, the tokenizer, the chat template and one set of weights, into the library's cache. A
connection that breaks is taken up again at the byte where it broke; a download that is stopped keeps the files that are
complete. Once all are there no network is needed. Imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from gptq_api.config import EngineSettings, ModelSettings
from gptq_api.errors import UserError
from gptq_api.logs import say, style

M = TypeVar("M", bound=ModelSettings)

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
_INDEX = ".index.json"
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|adapter_model|trainer_state).*")
_ALLOWED = re.compile(
    r"(config|generation_config|quantize_config|quant_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|vocab|chat_template)\.json|tokenizer\.model|merges\.txt|[\w.-]+\.jinja"
)


class HubError(UserError):
    """A model cannot be had: one sentence that says what was tried."""


def with_local_model(settings: M) -> M:
    """The settings with names on the hub replaced by folders; downloads them. Raises HubError."""
    folder = local_model(settings.model_path, settings.revision, settings.gptq_ckpt)
    update: dict[str, str] = {}
    if settings.draft_model is not None and is_hub_name(settings.draft_model):
        update["draft_model"] = local_model(settings.draft_model)
    if folder == settings.model_path:
        return settings.model_copy(update=update) if update else settings
    update["model_path"] = folder
    if isinstance(settings, EngineSettings) and settings.served_model_name is None:
        update["served_model_name"] = settings.model_path
    return settings.model_copy(update=update)


def local_model(model_path: str, revision: str | None = None, ckpt: Path | None = None) -> str:
    """`model_path` itself where it is `demo`, exists, or can be no name on the hub; else the folder of its download."""
    if is_hub_name(model_path):
        return str(_download(model_path, revision, ckpt))
    if revision is not None:
        raise HubError(f"--revision {revision} is for models on the hub (OWNER/NAME), and {model_path} is none")
    return model_path


def is_hub_name(model_path: str) -> bool:
    """OWNER/NAME, and nothing by that name is here."""
    plausible = _NAME.fullmatch(model_path) is not None and not model_path.endswith((*_WEIGHTS, ".gguf"))
    return plausible and not Path(model_path).exists()


def _download(name: str, revision: str | None, ckpt: Path | None) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    endpoint = constants.ENDPOINT
    at = f" at revision {revision}" if revision else ""
    try:
        info = HfApi().model_info(name, revision=revision)
    except GatedRepoError:
        raise HubError(f"{name} is gated: accept its terms at {endpoint}/{name} and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise HubError(f"{name} has no revision {revision}{_branches(name)}") from None
    except RepositoryNotFoundError:
        raise HubError(
            f"{name} is neither a folder here nor a model at {endpoint} (a private one needs HF_TOKEN)"
        ) from None
    except HfHubHTTPError as error:
        return _cached(name, revision, ckpt, f"{endpoint} answers {error.response.status_code}")
    except Exception as error:
        # Whatever the library's HTTP client raises where there is no network, or is told not to use it.
        return _cached(name, revision, ckpt, f"{endpoint} cannot be reached ({_first_line(error)})")
    files = choose_files(name, [sibling.rfilename for sibling in info.siblings or []], ckpt)
    if style().as_json:
        disable_progress_bars()
    say(f"{name} is no folder here: taking it from {endpoint}{at}")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[glob.escape(file) for file in files]))
    except Exception as error:
        raise HubError(
            f"the download of {name} stopped ({_first_line(error)}); the same command goes on with what is missing"
        ) from None


def _cached(name: str, revision: str | None, ckpt: Path | None, why: str) -> Path:
    """The model as it was downloaded before."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        known = [file.path for file in get_cached_repo_tree(name, revision=revision)]
        patterns = [glob.escape(file) for file in choose_files(name, known, ckpt)]
    except CachedRepoTreeNotFoundError:
        patterns = None  # downloaded by an older version of the library, which kept no list
    try:
        folder = snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=patterns)
    except IncompleteSnapshotError:
        raise HubError(f"{why}, and {name} was not downloaded completely before") from None
    except LocalEntryNotFoundError:
        raise HubError(f"{name} is no folder here, {why}, and it was not downloaded before") from None
    say(f"{why}: using {name} as it was downloaded before")
    return Path(folder)


def choose_files(name: str, files: Sequence[str], ckpt: Path | None = None) -> list[str]:
    """Of all files of a model those to download. HubError where there are no weights, or several sets of them and
    `ckpt` does not name one."""
    top = [file for file in files if "/" not in file]
    sets = _weight_sets(top)
    if ckpt is not None:
        sets = [found for found in sets if str(ckpt) in found]
        if not sets:
            raise HubError(f"--gptq-ckpt {ckpt}: {name} has no such weights file")
    if not sets:
        other = " but GGUF files (llama.cpp)" if any(file.endswith(".gguf") for file in top) else ""
        raise HubError(f"{name} holds no weights (.safetensors, .pt, .pth, .bin){other}")
    safe = [found for found in sets if any(file.endswith(".safetensors") for file in found)] or sets
    ours = [found for found in safe if not found[0].startswith("consolidated")] or safe
    if len(ours) > 1:
        listed = ", ".join(found[0] for found in ours)
        raise HubError(f"{name} holds several sets of weights ({listed}); name one with --gptq-ckpt")
    return [file for file in top if _ALLOWED.fullmatch(file)] + ours[0]


def _weight_sets(files: Sequence[str]) -> list[list[str]]:
    """Single files, and shards with their index."""
    sets: dict[str, list[str]] = {}
    for file in sorted(files):
        base = file.removesuffix(_INDEX)
        suffix = next((suffix for suffix in _WEIGHTS if base.endswith(suffix)), None)
        if suffix is None or _NOT_WEIGHTS.fullmatch(file):
            continue
        stem = base.removesuffix(suffix)
        shard = _SHARD.fullmatch(stem)
        sharded = shard is not None or base != file
        key = f"{shard['stem'] if shard else stem}{suffix}{' in shards' if sharded else ''}"
        sets.setdefault(key, []).append(file)
    # An index alone is no weights.
    return [found for found in sets.values() if any(not file.endswith(_INDEX) for file in found)]


def _branches(name: str) -> str:
    """For a sentence: the revisions there are."""
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):
        branches = [branch.name for branch in HfApi().list_repo_refs(name).branches]
        return f"; it has {', '.join(branches)}"
    return ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
