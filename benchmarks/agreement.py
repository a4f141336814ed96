"""Does the greedy answer depend on company? Measures it, for the demo model or any checkpoint.

Every prompt is answered four times: alone; beside 31 others; beside them in a cache so small that sequences are
preempted and recomputed; and once more, with its prefix in the cache. Written are the shares of prompts with the same
tokens as alone, per activation type; for an fp8 KV cache also the share with the same tokens as without it. Prompts
are random: half are token ids, half are sentences of the tokenizer's own words, lengths 4 to 120 tokens.

    python benchmarks/agreement.py --prompts bfloat16:1000,float32:150 --out benchmarks/results/agreement-cpu.json
    python benchmarks/agreement.py --device cuda --prompts float16:1000,bfloat16:1000,float16/fp8:1000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

from serve import machine

from gptq_api.config import Settings
from gptq_api.engine.client import EngineClient, Prompt
from gptq_api.settings_source import load_settings
from gptq_api.text.folder import checkpoint_folder
from gptq_api.text.tokenizer import load_tokenizer
from gptq_api.types import SamplingParams

COMPANY = 32


def random_prompts(model: str, count: int, seed: int) -> list[list[int]]:
    tokenizer = load_tokenizer(checkpoint_folder(model))
    rng = random.Random(seed)
    plain = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_token_ids]
    words = [text for i in plain if (text := tokenizer.decode([i]).strip()).isalpha()]
    prompts = []
    for i in range(count):
        length = rng.randint(4, 120)
        if i % 2:
            prompts.append(rng.choices(plain, k=length))
        else:
            prompts.append(tokenizer.encode(" ".join(rng.choices(words, k=length)), add_bos=True)[:120])
    return prompts


async def answers(
    settings: Settings, prompts: list[list[int]], max_tokens: int, company: int, *, end: bool = False
) -> tuple[Any, EngineClient]:
    """Greedy continuations of all prompts, `company` at a time; with `end`, up to the model's end of text."""
    engine = EngineClient(settings)
    await engine.start()
    places = asyncio.Semaphore(company)
    stops = tuple(engine.ready.eos_token_ids) if end else ()
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, stop_token_ids=stops)

    async def one(prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        async with places:
            with engine.submit([Prompt(prompt, [params])]) as generation:
                async for (delta,) in generation:
                    tokens += delta.tokens
        return tokens

    result = await asyncio.gather(*[one(prompt) for prompt in prompts])
    if company > 1 and settings.enable_prefix_caching:
        again = await asyncio.gather(*[one(prompt) for prompt in prompts])
        await engine.stop()
        return [result, again], engine
    await engine.stop()
    return result, engine


async def measure(model: str, device: str, kind: str, prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    """`kind`: an activation type, with /fp8 for that type of KV cache."""
    dtype, _, cache = kind.partition("/")
    common = [model, "--device", device, "--dtype", dtype, "--max-queued-requests", str(len(prompts))]

    def settings(*flags: str, kv_cache_dtype: str = cache or "auto") -> Settings:
        return load_settings(Settings, [*common, "--kv-cache-dtype", kv_cache_dtype, *flags])

    started = time.perf_counter()
    alone, _ = await answers(settings("--no-enable-prefix-caching"), prompts, max_tokens, 1)
    beside, _ = await answers(settings("--no-enable-prefix-caching"), prompts, max_tokens, COMPANY)
    tight = settings("--no-enable-prefix-caching", "--block-size", "8", "--num-blocks", "80")
    squeezed, squeezed_engine = await answers(tight, prompts, max_tokens, COMPANY)
    (_, again), cached_engine = await answers(settings(), prompts, max_tokens, COMPANY)

    def share(other: list[list[int]]) -> float:
        num_same: int = sum(a == b for a, b in zip(alone, other, strict=True))
        return round(float(num_same) / len(prompts), 4)

    row: dict[str, Any] = {"dtype": dtype}
    if cache:
        plain, _ = await answers(settings("--no-enable-prefix-caching", kv_cache_dtype="auto"), prompts, max_tokens, 1)
        row |= {"kv_cache_dtype": cache, "same_as_without": share(plain)}
    return row | {
        "prompts": len(prompts),
        "tokens_each": max_tokens,
        f"same_beside_{COMPANY - 1}_others": share(beside),
        "same_with_preemption": share(squeezed),
        "preemptions": squeezed_engine.stats.num_preemptions,
        "same_with_prefix_hits": share(again),
        "prefix_hit_tokens": cached_engine.stats.num_prefix_hits,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--prompts", default="bfloat16:1000,float32:150", help="activation type[/fp8]:number of prompts, ..."
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for kind, count in (item.split(":") for item in args.prompts.split(",")):
        prompts = random_prompts(args.model, int(count), args.seed)
        rows.append(asyncio.run(measure(args.model, args.device, kind, prompts, args.max_tokens)))
        print(json.dumps(rows[-1]))
    if args.out:
        args.out.write_text(
            json.dumps({"model": args.model, "machine": machine(args.commit), "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
