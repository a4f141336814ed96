"""pydantic-ai: a chat, a tool that its agent calls, an output type."""

import sys

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel


class Person(BaseModel, extra="forbid"):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


model = OpenAIChatModel("demo")
settings = {"max_tokens": 300}
match sys.argv[1]:
    case "chat":
        assert Agent(model, model_settings=settings).run_sync("Hello").output
    case "tools":
        agent = Agent(model, model_settings=settings)
        called = []

        @agent.tool_plain
        def multiply(a: int, b: int) -> int:
            """Multiply two numbers."""
            called.append((a, b))
            return a * b

        assert agent.run_sync("What is 6 times 7?").output == "Done, as you said."
        assert called == [(6, 7)]
    case "structured":
        agent = Agent(model, model_settings=settings, output_type=NativeOutput(Person))
        assert isinstance(agent.run_sync("Somebody?").output, Person)
    case "forced":
        agent = Agent(model, model_settings=settings, output_type=Person)
        assert isinstance(agent.run_sync("Somebody?").output, Person)
