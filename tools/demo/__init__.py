"""The demo model from nothing: generated text, tokenizer, training, GPTQ. See `python -m tools.demo.STEP --help`."""
