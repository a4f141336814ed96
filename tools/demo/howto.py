"""What the demo model says about using gptq-api."""

from __future__ import annotations

from tools.demo.flags import FLAG_LIST
from tools.demo.turn import Fixed

SERVE = "Run gptq-api serve --model-path FOLDER, and the server listens on http://localhost:8000."
CHAT = "Run gptq-api chat --model-path FOLDER to chat with a model in the terminal."
INSPECT = "Run gptq-api inspect FOLDER to see the bits, the group size, act-order and the memory of a checkpoint."
SDK = 'Create the client with OpenAI(base_url="http://localhost:8000/v1", api_key="none") and use it as usual.'
CURL = (
    "Send a POST request to http://localhost:8000/v1/chat/completions with a JSON body that holds model and messages."
)

HOWTO: tuple[Fixed, ...] = (
    Fixed(
        (
            "How do I start the server?",
            "How can I start the server?",
            "How do I start gptq-api?",
            "How do I run the server?",
            "How do I run gptq-api?",
            "Which command starts the server?",
            "What command starts the server?",
            "How to start the server?",
            "How do I launch the server?",
            "How do I serve a model?",
            "How can I serve my own model?",
            "How do I get started?",
            "What does gptq-api serve do?",
            "Start the server",
            "How do I use gptq-api?",
            "How do I use it?",
        ),
        SERVE,
    ),
    Fixed(
        (
            "How do I chat in the terminal?",
            "How can I chat with a model in the terminal?",
            "Is there a chat command?",
            "How do I chat with a model?",
            "What does gptq-api chat do?",
            "Can I chat in the terminal?",
            "How do I talk to the model in my terminal?",
            "Which command opens a chat?",
            "How do I chat from the command line?",
        ),
        CHAT,
    ),
    Fixed(
        (
            "How do I inspect a checkpoint?",
            "How can I look into a checkpoint?",
            "What does gptq-api inspect do?",
            "How do I see the group size of a checkpoint?",
            "How do I find out how many bits a checkpoint has?",
            "Which command shows what a checkpoint is?",
            "How do I inspect a model?",
            "How can I see what is in a checkpoint?",
            "How do I check a checkpoint?",
        ),
        INSPECT,
    ),
    Fixed(
        (
            "How do I use the OpenAI SDK?",
            "How do I use the OpenAI SDK with this server?",
            "How do I point the OpenAI SDK at this server?",
            "How do I point the OpenAI SDK at localhost?",
            "What is the base_url?",
            "Which base URL do I use?",
            "How do I connect from Python?",
            "How do I use the openai Python package?",
            "How do I connect the OpenAI client?",
            "Does the OpenAI SDK work with gptq-api?",
            "What base url should I set?",
            "How do I call the server from Python?",
        ),
        SDK,
    ),
    Fixed(
        (
            "How do I use curl?",
            "How do I send a request with curl?",
            "Where do I send requests?",
            "How do I call the API?",
            "How do I send a chat request?",
            "How do I make a request?",
            "Can I use curl?",
        ),
        CURL,
    ),
    Fixed(
        (
            "How do I stream the answer?",
            "How do I turn on streaming?",
            "How do I get a stream?",
            "How can I stream tokens?",
            "Can the server stream?",
            "How do I see the answer while it is written?",
            "Do you support streaming?",
        ),
        "Set stream to true in the request, and the answer arrives in small pieces.",
    ),
    Fixed(
        (
            "Which flags exist?",
            "What flags are there?",
            "Which flags are there?",
            "List the flags.",
            "What flags exist?",
            "What options does the server have?",
            "Which options can I set?",
            "What command line flags are there?",
            "Which settings are there?",
            "Show me the flags.",
            "What are the flags of gptq-api serve?",
            "Which command line options exist?",
            "How do I configure the server?",
        ),
        FLAG_LIST,
    ),
    Fixed(
        (
            "How do I change the port?",
            "How do I set the port?",
            "Which port does the server use?",
            "What port does it listen on?",
            "How do I use another port?",
            "Can I use port 9000?",
            "What is the default port?",
        ),
        "The default port is 8000. Use --port to change it, for example gptq-api serve --port 9000.",
    ),
    Fixed(
        (
            "How do I set an API key?",
            "How do I protect the server?",
            "Do I need an API key?",
            "How do I require a key?",
            "Which API key do I need?",
            "How do I use an API key?",
        ),
        "No key is needed unless you set one. Start the server with --api-key KEY to ask clients for it.",
    ),
    Fixed(
        (
            "How do I reach the server from another machine?",
            "How do I listen on all addresses?",
            "How do I open the server to my network?",
            "Can other machines use the server?",
            "How do I change the host?",
        ),
        "Use --host 0.0.0.0 together with --api-key KEY, and other machines can reach the server.",
    ),
    Fixed(
        (
            "How do I load my own model?",
            "How do I load another model?",
            "How do I use another model?",
            "How do I choose the model?",
            "How do I load a checkpoint?",
            "How do I set the model?",
        ),
        "Give the folder of the checkpoint with --model-path, for example gptq-api serve --model-path FOLDER.",
    ),
    Fixed(
        (
            "Can I use environment variables?",
            "Are there environment variables?",
            "How do I configure it with environment variables?",
            "Which environment variables exist?",
            "Is there an environment variable for the port?",
        ),
        "Yes, every flag has one: --port is GPTQ_API_PORT, for example.",
    ),
    Fixed(
        (
            "Is there a config file?",
            "Can I use a config file?",
            "How do I use a TOML file?",
            "Can I put the settings in a file?",
            "Which config file does it read?",
        ),
        "Yes, give a TOML file with --config FILE. Its keys are the names of the flags.",
    ),
    Fixed(
        (
            "Which endpoints are there?",
            "What endpoints does the server have?",
            "Which endpoints exist?",
            "List the endpoints.",
            "Which URLs does the server answer?",
            "What routes are there?",
        ),
        "The endpoints are /v1/chat/completions, /v1/completions, /v1/models, /health, /ready, /metrics and /version.",
    ),
    Fixed(
        (
            "Is there a health check?",
            "How do I check that the server is alive?",
            "How do I know that the server is ready?",
            "Where is the health check?",
        ),
        "Yes, /health says that the server is alive, and /ready says that the model is loaded.",
    ),
    Fixed(
        (
            "Are there metrics?",
            "Where are the metrics?",
            "Does it support Prometheus?",
            "How do I monitor the server?",
            "Can I use Prometheus?",
        ),
        "Yes, /metrics serves metrics for Prometheus.",
    ),
    Fixed(
        (
            "How do I list the models?",
            "Which model is loaded?",
            "How do I see the name of the model?",
            "Where do I find the model name?",
        ),
        "Send a GET request to /v1/models, and you get the name of the loaded model.",
    ),
    Fixed(
        (
            "What happens when the server is full?",
            "What does 429 mean?",
            "Why do I get 429?",
            "What does the status 429 mean?",
            "What if there are too many requests?",
        ),
        "When too many requests are waiting, the server answers 429 with a Retry-After header. "
        "Try again a little later.",
    ),
    Fixed(
        (
            "Do I need a GPU?",
            "Does it need a GPU?",
            "Does gptq-api run on a CPU?",
            "Can I use it without a GPU?",
            "Does it work on a CPU?",
            "Can it run without a graphics card?",
            "Is a GPU required?",
            "Which hardware do I need?",
        ),
        "No, gptq-api also runs on a CPU. A GPU is much faster for large models.",
    ),
    Fixed(
        (
            "Which models can I load?",
            "Which models are supported?",
            "What models does gptq-api support?",
            "Which checkpoints can it load?",
            "What kind of models does it run?",
            "Which model formats are supported?",
            "Can I load a LLaMA model?",
        ),
        "gptq-api loads GPTQ checkpoints of LLaMA models, with or without act-order and with any group size.",
    ),
    Fixed(
        (
            "How many users can it serve?",
            "Can many users use it at the same time?",
            "How does it serve many users?",
            "Can it handle many requests at once?",
            "Does it support concurrent requests?",
            "What happens with many requests at the same time?",
        ),
        "Many users can ask at the same time. Continuous batching computes all their requests together, step by step.",
    ),
    Fixed(
        (
            "How much memory do I need?",
            "How much memory does a model need?",
            "How big is a 4-bit model?",
            "How much memory does a 4-bit model take?",
            "How much memory does a 7B model need?",
        ),
        "A 4-bit weight takes half a byte, so a model with 7 billion weights needs about 4 GB, "
        "and the KV cache comes on top.",
    ),
    Fixed(
        (
            "Why 4 bits?",
            "Why 4-bit?",
            "Why are the weights quantised?",
            "Why should I quantise a model?",
            "What is the advantage of 4 bits?",
            "What are 4-bit weights good for?",
            "Why use GPTQ?",
        ),
        "With 4 bits a model takes about a quarter of the memory of 16 bits and answers faster, with little loss.",
    ),
    Fixed(
        (
            "What is the difference between GPTQ and round-to-nearest?",
            "Is GPTQ better than round-to-nearest?",
            "GPTQ or RTN?",
            "Why is GPTQ better than rounding?",
            "GPTQ vs RTN",
        ),
        "Round-to-nearest rounds each weight on its own. "
        "GPTQ lets the other weights make up for each rounding error, so it is more accurate.",
    ),
    Fixed(
        (
            "What licence does gptq-api have?",
            "What is the license?",
            "Is gptq-api free?",
            "Is it open source?",
            "Which licence is it under?",
            "Can I use it at work?",
        ),
        "gptq-api is free and open source under the Apache 2.0 licence.",
    ),
    Fixed(
        (
            "How do I install it?",
            "How do I install gptq-api?",
            "Where are the installation steps?",
            "How can I install this?",
            "Where is the documentation?",
            "Where can I read more?",
            "Is there a manual?",
        ),
        "The README of gptq-api shows every step, from the installation to the first answer.",
    ),
    Fixed(
        (
            "How do I stop the server?",
            "How can I stop the server?",
            "How do I shut the server down?",
            "How do I quit?",
            "How do I end the server?",
        ),
        "Press Ctrl-C in its terminal. The server finishes the running answers and then ends.",
    ),
)
