// openai-node: a chat, a stream, a tool that is called by its runner, a zod object, the Responses API.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import assert from "node:assert";

const client = new OpenAI();
const messages = [{ role: "user", content: "What is 6 times 7?" }];
const fields = { model: "demo", max_tokens: 300, messages };

const parts = {
  async chat() {
    assert((await client.chat.completions.create(fields)).choices[0].message.content);
    let text = "";
    for await (const chunk of await client.chat.completions.create({ ...fields, stream: true })) {
      text += chunk.choices[0]?.delta?.content ?? "";
    }
    assert(text);
    assert((await client.models.list()).data.length);
  },
  async responses() {
    const answer = await client.responses.create({ model: "demo", input: "Hello", max_output_tokens: 100 });
    assert(answer.output_text);
    const kinds = [];
    for await (const event of client.responses.stream({ model: "demo", input: "Hello", max_output_tokens: 100 })) {
      kinds.push(event.type);
    }
    assert.equal(kinds[0], "response.created");
    assert(kinds.includes("response.output_text.delta"));
  },
  async tools() {
    const seen = [];
    const multiply = ({ a, b }) => (seen.push([a, b]), String(a * b));
    const parameters = { type: "object", properties: { a: { type: "integer" }, b: { type: "integer" } } };
    const tool = { type: "function", function: { name: "multiply", parse: JSON.parse, function: multiply, parameters } };
    const runner = client.chat.completions.runTools({ ...fields, tools: [tool] });
    assert.equal(await runner.finalContent(), "Done, as you said.");
    assert.deepEqual(seen, [[6, 7]]);
  },
  async structured() {
    const person = z.object({ name: z.string().max(12), age: z.number().int().min(0).max(120) });
    const answer = await client.chat.completions.parse({
      ...fields, response_format: zodResponseFormat(person, "person"),
    });
    person.parse(answer.choices[0].message.parsed);
  },
};
await parts[process.argv[2]]();
