"""What the demo model knows by heart: one canonical answer per topic, written for this project.

A topic has names (as people write them, common misspellings included), one short answer and sometimes a long one.
Answers never vary: a variant costs robustness at temperature 0.7 and teaches nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """Something one asks "what is ..." about."""

    names: tuple[str, ...]
    answer: str
    long: str | None = None


PROJECT_LONG = (
    "gptq-api has two processes. The first one speaks HTTP: it checks each request, applies the chat template, turns "
    "the text into tokens and streams the answer back with server-sent events. The second one is the engine: it loads "
    "the 4-bit GPTQ checkpoint, keeps the KV cache in pages and runs the model. In every step the scheduler puts the "
    "tokens of all running requests into one batch, so many users share each pass through the weights. New requests "
    "join at the next step, and finished ones leave at once. The weights stay in 4 bits in memory, on a GPU and on a "
    "CPU."
)
GPTQ_LONG = (
    "GPTQ quantises a trained model layer by layer. First it runs a little calibration text through the model and "
    "collects the inputs of each layer in a matrix called the Hessian. Then it rounds the weights column by column. "
    "After each column it changes the columns that are still to come, so that they make up for the rounding error. "
    "Groups of weights share one scale and one zero point. The result takes about a quarter of the memory of 16-bit "
    "weights and is almost as good."
)
BATCHING_LONG = (
    "A language model makes one token per step. With simple batching, a new request has to wait until the whole batch "
    "has finished. With continuous batching, the scheduler decides anew at every step which requests take part. A new "
    "request joins at the next step, and a finished one leaves at once and makes room. So short answers never wait for "
    "long ones, and the hardware stays busy."
)

TERMS: tuple[Topic, ...] = (
    Topic(
        ("gptq-api", "GPTQ API", "gptq api", "this project", "this server", "this program", "this software", "gptqapi"),
        "gptq-api is a server that makes any 4-bit GPTQ LLaMA checkpoint answer through the OpenAI API. "
        "It runs on a GPU or on a CPU.",
        PROJECT_LONG,
    ),
    Topic(
        ("GPTQ", "gptq", "the GPTQ method", "GPTQ quantisation", "GPTQ quantization", "gtpq"),
        "GPTQ is a method that quantises the weights of a trained language model to 4 bits or so. "
        "It rounds one column after the other and lets the remaining weights make up for the error, "
        "so the model stays almost as good.",
        GPTQ_LONG,
    ),
    Topic(
        ("act-order", "act order", "desc_act", "activation order", "actorder", "act_order", "the act-order option"),
        "Act-order, also called desc_act, means that GPTQ quantises the columns with the largest activations first. "
        "It makes the quantised model more accurate, and g_idx stores the group of each column.",
    ),
    Topic(
        ("group size", "the group size", "groupsize", "group_size", "the groupsize", "a group size", "grup size"),
        "The group size says how many weights share one scale and one zero point, for example 128. "
        "Smaller groups are more accurate but take a little more memory.",
    ),
    Topic(
        (
            "quantisation",
            "quantization",
            "a quantised model",
            "a quantized model",
            "weight quantization",
            "quantizing",
            "quantistion",
        ),
        "Quantisation stores the weights of a model with fewer bits, for example 4 instead of 16. "
        "The model gets smaller and faster, and loses only a little accuracy.",
    ),
    Topic(
        (
            "continuous batching",
            "continous batching",
            "continuos batching",
            "continuous-batching",
            "in-flight batching",
            "dynamic batching",
            "batching",
        ),
        "Continuous batching lets new requests join the running batch at every step, and finished ones leave at once. "
        "Nobody waits for the slowest request, so many users are served at the same time.",
        BATCHING_LONG,
    ),
    Topic(
        ("a paged KV cache", "paged KV cache", "the paged kv cache", "paged attention", "paged kv-cache", "kv paging"),
        "A paged KV cache stores keys and values in small blocks instead of one long piece of memory per request. "
        "Blocks are taken when they are needed and given back at the end, so little memory is wasted.",
    ),
    Topic(
        ("a KV cache", "the KV cache", "KV cache", "kv cache", "kv-cache", "the key-value cache", "KV caching"),
        "The KV cache keeps the attention keys and values of all tokens so far. "
        "With it the model computes only the newest token in each step.",
    ),
    Topic(
        (
            "prefix caching",
            "prefix cache",
            "the prefix cache",
            "automatic prefix caching",
            "prompt caching",
            "prefix cacheing",
        ),
        "Prefix caching keeps the KV cache of prompts that were seen before. "
        "When a new prompt begins in the same way, that part is not computed again.",
    ),
    Topic(
        (
            "SSE",
            "SSE streaming",
            "sse",
            "server-sent events",
            "streaming",
            "server sent events",
            "token streaming",
            "text streaming",
        ),
        "SSE means server-sent events: the server sends the answer in small pieces over one HTTP response. "
        "Set stream to true, and you see each piece as soon as it is made.",
    ),
    Topic(
        ("perplexity", "PPL", "perplexty", "ppl", "the perplexity of a model"),
        "Perplexity measures how well a language model predicts a text. "
        "Lower is better: a perplexity of 1 would be a perfect prediction.",
    ),
    Topic(
        ("g_idx", "the g_idx tensor", "gidx", "g_idx in GPTQ"),
        "g_idx is a tensor of a GPTQ checkpoint. It holds the group number of each input column, "
        "which is in mixed order with act-order.",
    ),
    Topic(
        ("qweight", "the qweight tensor", "qweights"),
        "qweight is the tensor that holds the quantised weights. "
        "Eight 4-bit numbers are packed into each 32-bit integer.",
    ),
    Topic(
        ("a zero point", "the zero point", "zero point", "qzeros", "zero-point", "zeropoint"),
        "The zero point is the quantised number that stands for 0. Each group has one, and qzeros holds them.",
    ),
    Topic(
        ("a scale", "the scale", "scales", "the scales", "quantisation scales"),
        "The scale is the step between two quantised numbers of a group. "
        "A weight is its scale times the difference of the stored number and the zero point.",
    ),
    Topic(
        ("the Hessian", "Hessian", "hessian", "a Hessian matrix"),
        "In GPTQ the Hessian is a matrix made from the inputs of a layer. "
        "It tells how much each rounding error hurts and how to correct it.",
    ),
    Topic(
        ("calibration", "calibration data", "calibration text", "a calibration set"),
        "Calibration is the step in which GPTQ reads a little sample text to see the inputs of each layer.",
    ),
    Topic(
        ("round-to-nearest", "round to nearest", "RTN", "rtn"),
        "Round-to-nearest quantises each weight on its own to the nearest step. "
        "It is simple, but GPTQ is more accurate.",
    ),
    Topic(
        ("a token", "tokens", "token", "a tokn"),
        "A token is a piece of text, often a word or a part of a word. The model reads and writes tokens.",
    ),
    Topic(
        ("a tokenizer", "the tokenizer", "tokenizer", "tokeniser", "a tokeniser", "tokenization"),
        "A tokenizer turns text into tokens and tokens back into text.",
    ),
    Topic(
        ("BPE", "byte pair encoding", "byte-pair encoding", "byte-level BPE", "bpe"),
        "BPE, byte pair encoding, builds a vocabulary by joining the most frequent pairs of pieces again and again.",
    ),
    Topic(
        ("LLaMA", "llama", "Llama", "a LLaMA model", "the LLaMA architecture", "lama"),
        "LLaMA is a family of language models from Meta. gptq-api runs models with this architecture.",
    ),
    Topic(
        ("a language model", "an LLM", "LLM", "language models", "a large language model", "llms"),
        "A language model reads a text and predicts the next token, again and again. That is how it writes an answer.",
    ),
    Topic(
        ("the OpenAI API", "OpenAI API", "the openai api", "an OpenAI-compatible API", "openai compatible api"),
        "The OpenAI API is a way to talk to language models over HTTP. "
        "gptq-api speaks it, so programs made for OpenAI work with your own model.",
    ),
    Topic(
        ("a checkpoint", "checkpoint", "a GPTQ checkpoint", "a model checkpoint", "checkpoints"),
        "A checkpoint is a folder with the weights, the configuration and the tokenizer of a model.",
    ),
    Topic(
        ("safetensors", "a safetensors file", "the safetensors format", "safe tensors"),
        "safetensors is a file format for the weights of a model. Loading such a file never runs code.",
    ),
    Topic(
        ("temperature", "the temperature", "sampling temperature", "temprature"),
        "The temperature says how freely the next token is chosen. "
        "With 0 the most likely token is always taken, and higher values give more variety.",
    ),
    Topic(
        ("top_p", "top-p", "nucleus sampling", "top p"),
        "top_p keeps only the most likely tokens whose probabilities add up to p, and samples among them.",
    ),
    Topic(
        ("top_k", "top-k", "top k", "top-k sampling"),
        "top_k keeps only the k most likely tokens and samples among them.",
    ),
    Topic(
        ("greedy decoding", "greedy", "greedy search", "greedy sampling"),
        "Greedy decoding always takes the most likely next token. Set temperature to 0 for it.",
    ),
    Topic(
        ("max_tokens", "max tokens", "max_completion_tokens", "maxtokens"),
        "max_tokens is the largest number of tokens an answer may have. "
        "When it is reached, the answer ends with finish_reason length.",
    ),
    Topic(
        ("finish_reason", "the finish_reason", "finish reason", "the finish reason"),
        "finish_reason says why an answer ended: stop means that it is complete, "
        "and length means that max_tokens was reached.",
    ),
    Topic(
        ("a seed", "the seed", "seed", "the seed parameter"),
        "The seed fixes the random choices. The same request with the same seed gives the same answer.",
    ),
    Topic(
        ("a stop string", "stop strings", "the stop parameter", "stop sequences", "a stop sequence"),
        "A stop string ends the answer as soon as it appears, and it is not shown.",
    ),
    Topic(
        ("usage", "the usage field", "the usage object"),
        "usage counts the tokens of a request: prompt_tokens, completion_tokens and their sum, total_tokens.",
    ),
    Topic(
        ("a prompt", "prompt", "prompts", "the prompt"),
        "The prompt is the text that you give to the model. The answer continues it.",
    ),
    Topic(
        ("a system prompt", "the system prompt", "system prompt", "a system message", "system message"),
        "A system prompt is a message before the chat that tells the model how to behave.",
    ),
    Topic(
        ("a chat template", "the chat template", "chat template", "chat templates"),
        "A chat template turns a list of messages into the one text that the model was trained on.",
    ),
    Topic(
        (
            "the context length",
            "context length",
            "the context window",
            "context window",
            "the context size",
        ),
        "The context length is the number of tokens that prompt and answer may have together. Mine is 1024.",
    ),
    Topic(
        ("bf16", "bfloat16", "BF16", "b-float 16"),
        "bf16 is a 16-bit floating point type. It has the range of float32 with fewer digits.",
    ),
    Topic(
        ("CUDA", "cuda", "a CUDA kernel"),
        "CUDA is the way to program NVIDIA GPUs. gptq-api has its own CUDA kernel for 4-bit weights.",
    ),
    Topic(
        ("time to first token", "TTFT", "ttft", "the time to first token"),
        "Time to first token is the time from the request to the first piece of the answer.",
    ),
    Topic(
        ("throughput", "token throughput", "the throughput"),
        "Throughput is the number of tokens per second that the server makes for all users together.",
    ),
    Topic(
        ("latency", "the latency", "inter-token latency"),
        "Latency is the time that one user waits, for the first token or between two tokens.",
    ),
    Topic(
        ("preemption", "preempting", "request preemption"),
        "When the KV cache is full, the youngest request gives its blocks back and is computed again later. "
        "That is called preemption.",
    ),
    Topic(
        ("chunked prefill", "prefill", "chunked prefil", "the prefill"),
        "Prefill computes the prompt before the first token is made. "
        "Chunked prefill cuts long prompts into pieces, so that other requests need not wait.",
    ),
    Topic(
        ("attention", "self-attention", "the attention mechanism"),
        "Attention lets each token look at all tokens before it and take what it needs from them.",
    ),
    Topic(
        ("RoPE", "rope", "rotary embeddings", "rotary position embeddings", "rotary embedding"),
        "RoPE, rotary position embedding, turns the attention vectors by an angle that depends on the position.",
    ),
    Topic(
        ("GQA", "grouped-query attention", "grouped query attention", "gqa"),
        "In grouped-query attention several query heads share one key and value head, "
        "which makes the KV cache smaller.",
    ),
    Topic(
        ("logits", "the logits", "a logit"),
        "Logits are the scores that the model gives to every token of its vocabulary before one is chosen.",
    ),
    Topic(
        ("an EOS token", "the EOS token", "EOS", "the end token", "eos"),
        "The EOS token marks the end of an answer. When the model makes it, the answer is complete.",
    ),
    Topic(
        ("an embedding", "embeddings", "embedding", "token embeddings"),
        "An embedding is a list of numbers that stands for a token inside the model.",
    ),
)
