"""The demo model from nothing: generated text, tokenizer, training, GPTQ. See `python -m demo_model.STEP --help`."""
