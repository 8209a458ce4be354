// The Vercel AI SDK.
import { createOpenAI } from "@ai-sdk/openai";
import * as ai from "ai";

const openai = createOpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: process.env.OPENAI_API_KEY ?? "none" });
const draw = ai.generateImage ?? ai.experimental_generateImage; // its name differs between versions
const { image } = await draw({
  model: openai.image("default"),
  prompt: "a small red circle",
  size: "256x256",
  providerOptions: { openai: { num_inference_steps: 4, slo_ms: 20000 } },
});
console.log(`${image.mediaType} ${image.uint8Array.length} bytes`);
