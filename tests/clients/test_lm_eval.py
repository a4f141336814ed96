"""lm-eval's `local-completions` over two tasks that are written here, without a data set from anywhere."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environments import folder
from tests.support.server import Server, refuses

QUESTIONS = (
    ("Q: Is the sky blue? A:", 0),
    ("Q: Is a cat a plant? A:", 1),
    ("Q: Is 2 and 2 4? A:", 0),
)
CHOICES = [" yes", " no"]
COMMON: dict[str, Any] = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
}
TASKS: dict[str, dict[str, Any]] = {
    "ours_loglikelihood": {
        "output_type": "multiple_choice",
        "doc_to_choice": CHOICES,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "ours_generated": {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "temperature": 0},
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(scope="module")
def demo() -> Iterator[Server]:
    with Server("--served-model-name", "demo") as running:
        yield running


@pytest.mark.timeout(300)
@pytest.mark.parametrize("task", TASKS)
def test_a_task_gives_its_metric(task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    where = folder("lm-eval")
    demo: Server = request.getfixturevalue("demo")
    asked = {"prompt": [5, 6], "echo": True, "logprobs": 1, "max_tokens": 1}
    if task == "ours_loglikelihood" and refuses(demo.post("/v1/completions", asked)):
        pytest.skip("this server does not take echo with logprobs")
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": text, "answer": answer}) for text, answer in QUESTIONS))
    written = {"task": task, **COMMON, "dataset_kwargs": {"data_files": {"test": str(data)}}, **TASKS[task]}
    (tmp_path / "task.yaml").write_text(json.dumps(written))  # JSON is YAML
    arguments = f"model=demo,base_url={demo.url}/completions,tokenizer_backend=remote,max_length=1024,max_retries=1"
    command = [str(where / "bin" / "lm_eval"), "run", "--model", "local-completions", "--model_args", arguments]
    command += [
        "--tasks",
        task,
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
        "--batch_size",
        "2",
    ]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (result,) = (tmp_path / "out").rglob("results*.json")
    found = json.loads(result.read_text())["results"][task]
    metric = TASKS[task]["metric_list"][0]["metric"]
    assert 0 <= found[f"{metric},none"] <= 1
