"""`python -m gptq_api` is the `gptq-api` command."""

from gptq_api.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
