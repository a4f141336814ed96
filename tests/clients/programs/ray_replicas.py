"""Ray Serve: our example with two replicas; what it answers, whole, in a stream and as an error."""

import json
import os
import sys

import httpx
from ray import serve

sys.path.insert(0, os.environ["EXAMPLES"])
import ray_serve

port = int(sys.argv[1])
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(ray_serve.app)
url = f"http://127.0.0.1:{port}/v1"
body = {"messages": [{"role": "user", "content": "What is GPTQ?"}], "max_tokens": 8, "temperature": 0}
with httpx.Client(timeout=60) as client:
    assert client.get(f"{url}/models").json()["data"][0]["id"] == "demo"
    texts = {
        client.post(f"{url}/chat/completions", json=body).json()["choices"][0]["message"]["content"] for _ in range(8)
    }
    assert len(texts) == 1
    events = client.post(f"{url}/chat/completions", json={**body, "stream": True}).text.strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    deltas = [json.loads(event[6:])["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(deltas) == texts.pop()
    refused = client.post(f"{url}/chat/completions", json={"messages": 1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"
serve.shutdown()
print("done")
