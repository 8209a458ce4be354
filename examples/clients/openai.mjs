// OpenAI's Node library: a picture, an edit of it, a stream, a chat.
import OpenAI, { toFile } from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: process.env.OPENAI_API_KEY ?? "none" });
const wish = { model: "default", prompt: "a small red circle", size: "256x256", num_inference_steps: 4 };

const answer = await client.images.generate({ ...wish, slo_ms: 20000 });
const picture = await toFile(Buffer.from(answer.data[0].b64_json, "base64"), "picture.png", { type: "image/png" });
const edited = await client.images.edit({ ...wish, image: picture, strength: 0.5 });
if (!edited.data[0].b64_json) throw new Error("no edit");
const types = [];
for await (const event of await client.images.generate({ ...wish, stream: true, partial_images: 2 })) {
  types.push(event.type);
}
const chat = await client.chat.completions.create({
  model: "default",
  messages: [{ role: "user", content: wish.prompt }],
  size: "256x256",
  num_inference_steps: 4,
});
const url = chat.choices[0].message.content[0].image_url.url;
if (types.at(-1) !== "image_generation.completed" || !url.startsWith("data:image/png")) throw new Error(types.join());
console.log(`${answer.data[0].b64_json.length} characters, ${types.length} events, usage ${JSON.stringify(answer.usage)}`);
