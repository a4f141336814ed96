// Vercel's AI SDK: text, a stream, a tool that is called, an object.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import * as ai from "ai";
import { z } from "zod";
import assert from "node:assert";

const { generateText, Output, streamText, tool } = ai;
const provider = createOpenAICompatible({
  name: "local", baseURL: process.env.OPENAI_BASE_URL, apiKey: "none", supportsStructuredOutputs: true,
});
const model = provider("demo");
const fields = { model, prompt: "What is 6 times 7?", maxOutputTokens: 300 };

const parts = {
  async chat() {
    assert((await generateText(fields)).text);
    assert(await streamText(fields).text);
  },
  async tools() {
    const seen = [];
    const multiply = tool({
      description: "Multiply two numbers.",
      inputSchema: z.object({ a: z.number().int(), b: z.number().int() }),
      execute: async ({ a, b }) => (seen.push([a, b]), a * b),
    });
    const answer = await generateText({ ...fields, tools: { multiply }, stopWhen: (ai.isStepCount ?? ai.stepCountIs)(3) });
    assert.equal(answer.text, "Done, as you said.");
    assert.deepEqual(seen, [[6, 7]]);
  },
  async structured() {
    const schema = z.object({ name: z.string().max(12), age: z.number().int().min(0).max(120) });
    schema.parse((await generateText({ ...fields, output: Output.object({ schema }) })).output);
  },
};
await parts[process.argv[2]]();
