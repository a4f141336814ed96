"""Does an answer depend on company? Measures it, for the demo model or any checkpoint.

Every prompt is answered under eight conditions: alone, without drafts; alone in an engine started anew, with drafts;
beside 31 others; beside them in chunks of at most 48 tokens a step; in a cache so small that sequences are preempted
and recomputed; with its prefix in the cache; and beside 255 others. Written are the shares of prompts with the same
tokens as alone, and with the same tokens and logprobs to the last bit, per activation type; for an fp8 KV cache also
the share with the same tokens as without it. Prompts are random: half are token ids, half are sentences of the
tokenizer's own words, lengths 4 to 120 tokens. Half of the answers are greedy, half are drawn at temperature 0.8, each
with a seed of its own.

    python benchmarks/agreement.py --prompts bfloat16:1000,float32:150 --out benchmarks/results/agreement-cpu.json
    python benchmarks/agreement.py --device cuda --options=--batch-invariant --prompts float16:1000,bfloat16:1000
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


Answer = tuple[list[int], list[tuple[float, list[tuple[int, float]]]]]
"""tokens, and of each its logprob and the likeliest ones"""


async def answers(
    settings: Settings, prompts: list[list[int]], params: list[SamplingParams], company: int, times: int = 1
) -> tuple[list[Answer], EngineClient]:
    """Continuations of all prompts, `company` at a time; the last ones of several times."""
    engine = EngineClient(settings)
    await engine.start()
    places = asyncio.Semaphore(company)

    async def one(prompt: list[int], how: SamplingParams) -> Answer:
        answer: Answer = ([], [])
        async with places:
            with engine.submit([Prompt(prompt, [how])]) as generation:
                async for (delta,) in generation:
                    answer[0].extend(delta.tokens)
                    answer[1].extend((told.logprob, told.top) for told in delta.logprobs)
        return answer

    for _ in range(times):
        result = await asyncio.gather(*[one(*each) for each in zip(prompts, params, strict=True)])
    await engine.stop()
    return result, engine


async def measure(
    model: str, device: str, kind: str, prompts: list[list[int]], max_tokens: int, options: list[str]
) -> dict[str, Any]:
    """`kind`: an activation type, with /fp8 for that type of KV cache; `options`: flags of the server."""
    dtype, _, cache = kind.partition("/")
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=0.8 * (i // 2 % 2), seed=i, top_logprobs=2)
        for i in range(len(prompts))
    ]
    common = [model, "--device", device, "--dtype", dtype, "--max-queued-requests", str(len(prompts)), *options]

    async def answered(
        company: int, *flags: str, kv_cache_dtype: str = cache or "auto", caching: bool = False, times: int = 1
    ) -> tuple[list[Answer], EngineClient]:
        if not caching:
            flags = ("--no-enable-prefix-caching", *flags)
        settings = load_settings(Settings, [*common, "--kv-cache-dtype", kv_cache_dtype, *flags])
        return await answers(settings, prompts, params, company, times)

    started = time.perf_counter()
    alone, _ = await answered(1, "--speculate", "off")
    row: dict[str, Any] = {"dtype": dtype}
    if cache:
        plain, _ = await answered(1, "--speculate", "off", kv_cache_dtype="auto")
        row |= {"kv_cache_dtype": cache, "same_as_without": share(alone, plain)["same_tokens"]}
    row |= {"prompts": len(prompts), "tokens_each": max_tokens}
    drafted, engine = await answered(1)
    row["alone, restarted, with drafts"] = share(alone, drafted) | {
        "drafted": engine.stats.num_draft_tokens,
        "accepted": engine.stats.num_accepted_tokens,
    }
    beside, _ = await answered(COMPANY)
    row[f"beside {COMPANY - 1} others"] = share(alone, beside)
    chunked, _ = await answered(COMPANY, "--max-num-batched-tokens", "48")
    row["in chunks"] = share(alone, chunked)
    squeezed, engine = await answered(COMPANY, "--block-size", "8", "--num-blocks", "80")
    row["preempted"] = share(alone, squeezed) | {"preemptions": engine.stats.num_preemptions}
    again, engine = await answered(COMPANY, caching=True, times=2)
    row["behind a cached prefix"] = share(alone, again) | {"prefix_hit_tokens": engine.stats.num_prefix_hits}
    many, _ = await answered(256, "--max-num-seqs", "256")
    row["beside 255 others"] = share(alone, many)
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def share(alone: list[Answer], other: list[Answer]) -> dict[str, float]:
    pairs = list(zip(alone, other, strict=True))
    return {
        "same_tokens": round(sum(a[0] == b[0] for a, b in pairs) / len(pairs), 4),
        "same_bits": round(sum(a == b for a, b in pairs) / len(pairs), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--prompts", default="bfloat16:1000,float32:150", help="activation type[/fp8]:number of prompts, ..."
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--options", default="", help="flags of the server, as in --options=--batch-invariant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="what was measured, where there is no git")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for kind, count in (item.split(":") for item in args.prompts.split(",")):
        prompts = random_prompts(args.model, int(count), args.seed)
        flags = args.options.split()
        rows.append(asyncio.run(measure(args.model, args.device, kind, prompts, args.max_tokens, flags)))
        print(json.dumps(rows[-1]))
    if args.out:
        args.out.write_text(
            json.dumps(
                {"model": args.model, "machine": machine(args.commit), "options": args.options, "rows": rows}, indent=1
            )
            + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
