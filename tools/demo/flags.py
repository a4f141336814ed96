"""What the demo model says about the flags of `gptq-api serve`."""

from __future__ import annotations

# flag, what it does. Checked against gptq_api/config.py by a test: the flag exists, and "default X" is its default.
FLAGS: dict[str, str] = {
    "--model-path": "--model-path names the checkpoint folder to load. Without it the demo model is loaded.",
    "--served-model-name": "--served-model-name sets the name of the model in the API. "
    "The default is the name of the folder.",
    "--gptq-wbits": "--gptq-wbits says how many bits you expect the weights to have, for example 4. "
    "It is checked against the checkpoint.",
    "--gptq-groupsize": "--gptq-groupsize says which group size you expect, for example 128. "
    "It is checked against the checkpoint.",
    "--gptq-ckpt": "--gptq-ckpt names the weights file when the folder holds more than one.",
    "--gptq-act-order": "--gptq-act-order says that you expect a checkpoint with act-order. "
    "It is checked against the checkpoint.",
    "--chat-template": "--chat-template names a Jinja file to use instead of the chat template of the checkpoint.",
    "--max-model-len": "--max-model-len sets the largest number of tokens that prompt and answer may have together.",
    "--device": "--device says where the model runs: auto, cpu or cuda.",
    "--dtype": "--dtype sets the number type of the activations: auto, float32, bfloat16 or float16.",
    "--block-size": "--block-size sets the number of tokens in one block of the KV cache. The default is 16.",
    "--num-blocks": "--num-blocks sets the number of blocks of the KV cache.",
    "--kv-cache-mib": "--kv-cache-mib sets the memory for the KV cache on a CPU in MiB. The default is 512.",
    "--gpu-memory-utilization": "--gpu-memory-utilization sets the share of the GPU memory that gptq-api may use. "
    "The default is 0.9.",
    "--max-num-seqs": "--max-num-seqs sets how many requests may run in one step. The default is 256.",
    "--max-num-batched-tokens": "--max-num-batched-tokens sets how many tokens are computed in one step. "
    "Longer prompts are cut into pieces.",
    "--max-queued-requests": "--max-queued-requests sets how many requests are admitted at a time. "
    "More than that get the status 429.",
    "--enable-prefix-caching": "--enable-prefix-caching turns prefix caching on, which is the default. "
    "--no-enable-prefix-caching turns it off.",
    "--num-threads": "--num-threads sets the number of CPU threads of the engine.",
    "--host": "--host sets the address to listen on. The default is 127.0.0.1.",
    "--port": "--port sets the port to listen on. The default is 8000.",
    "--api-key": "--api-key sets the key that clients must send. Without it no key is needed.",
    "--allow-unauthenticated": "--allow-unauthenticated lets the server listen for other machines without a key.",
    "--log-level": "--log-level sets how much is logged: debug, info, warning or error.",
    "--log-json": "--log-json writes one JSON object per log line.",
    "--config": "--config names a TOML file with any of the settings.",
}

FLAG_LIST = (
    "The most useful flags are --model-path, --gptq-wbits, --gptq-groupsize, --gptq-ckpt, --gptq-act-order, --host, "
    "--port, --api-key, --max-model-len and --device. Run gptq-api serve --help to see all of them."
)
