"""LangChain: a chat, a stream, a tool that is called, a pydantic object. Run by its own Python: PART on the command
line, the server in OPENAI_BASE_URL."""

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

model = ChatOpenAI(model="demo", max_tokens=300)


class Person(BaseModel, extra="forbid"):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


match sys.argv[1]:
    case "chat":
        assert model.invoke("Hello").content
        assert "".join(str(chunk.content) for chunk in model.stream("Hello"))
    case "tools":
        able = model.bind_tools([multiply])
        asked = able.invoke("What is 6 times 7?")
        (call,) = asked.tool_calls
        result = multiply.invoke(call["args"])
        assert result == 42, call
        answer = able.invoke(
            [HumanMessage("What is 6 times 7?"), asked, ToolMessage(str(result), tool_call_id=call["id"])]
        )
        assert answer.content == "Done, as you said.", answer
    case "structured":
        assert isinstance(model.with_structured_output(Person).invoke("Somebody?"), Person)
