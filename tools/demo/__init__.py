"""The demo model from nothing: generated text, tokenizer, training, GPTQ. Run each step as `python -m tools.demo.STEP --help`."""
