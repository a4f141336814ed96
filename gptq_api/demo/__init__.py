"""The small model that ships with the package: a GPTQ checkpoint folder like any other."""

from pathlib import Path

DEMO_PATH: Path = Path(__file__).parent / "model"
"""`--model-path demo`. See MODEL_CARD.md beside it for what the model is and is not."""
