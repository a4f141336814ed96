"""What a server says of itself."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

from gptq_api.api.service import Service
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.process import TextProcess
from gptq_api.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.hand_fed_engine import HandFedEngine


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(checkpoint_folder("demo"))


async def test_the_fingerprint_knows_checkpoint_and_types() -> None:
    def fingerprint(cache: str = "auto", **ready: str) -> str:
        engine = HandFedEngine()
        engine.ready = SimpleNamespace(**{**vars(engine.ready), **ready})  # type: ignore[assignment]
        settings = engine.settings.model_copy(update={"kv_cache_dtype": cache})
        service = Service(settings, engine, TextProcess(checkpoint_folder("demo")), tokenizer(), None, "demo")  # type: ignore[arg-type]
        service.close()
        return service.fingerprint

    assert fingerprint() == fingerprint()
    others = [fingerprint("fp8"), *(fingerprint(**{name: "x"}) for name in ("checkpoint", "dtype", "device"))]
    assert len({fingerprint(), *others}) == 5
