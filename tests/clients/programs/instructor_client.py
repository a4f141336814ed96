"""instructor: a pydantic object, by a tool that has to be called and by a JSON schema."""

import sys

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field


class Person(BaseModel, extra="forbid"):  # or a model that rambles would add properties
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


MODES = {"forced": instructor.Mode.TOOLS, "structured": instructor.Mode.JSON_SCHEMA}
client = instructor.from_openai(OpenAI(), mode=MODES[sys.argv[1]])
person = client.chat.completions.create(
    model="demo", response_model=Person, max_tokens=300, messages=[{"role": "user", "content": "Somebody?"}]
)
assert isinstance(person, Person)
