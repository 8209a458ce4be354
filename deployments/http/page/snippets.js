// A request of the page as a command line and as a program, for whoever wants to go on from there.

const IN_OPENAI = ["prompt", "size", "n"]; // what OpenAI's client has arguments for; the rest goes by extra_body

const root = () => new URL(".", location.href).href.replace(/\/$/, "");

const shell = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;

/** The fields without those that only a stream has. */
function plain(body) {
  const { stream, partial_images, progress, ...fields } = body;
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => value !== undefined));
}

const key = (hasKey) => (hasKey ? ` -H "Authorization: Bearer $TETRISERVE_API_KEY"` : "");

export function asCurl(body, inputs, hasKey) {
  const fields = plain(body);
  const out = body.n === 1 ? `jq -r '.data[0].b64_json' | base64 -d > picture.png` : `jq -r '.data[].b64_json'`;
  if (inputs) {
    const form = Object.entries(fields).map(([name, value]) => ` -F ${shell(`${name}=${value}`)}`);
    const files = Array.from({ length: inputs }, (_, i) => ` -F image=@input${i || ""}.png`);
    return `curl -s ${root()}/v1/images/edits${key(hasKey)}${files.join("")}${form.join("")} | ${out}`;
  }
  const json = ` -H 'Content-Type: application/json' -d ${shell(JSON.stringify(fields))}`;
  return `curl -s ${root()}/v1/images/generations${key(hasKey)}${json} | ${out}`;
}

export function asPython(body, inputs, hasKey) {
  const fields = plain(body);
  const named = IN_OPENAI.filter((name) => name in fields).map((name) => `    ${name}=${literal(fields[name])},`);
  const rest = Object.entries(fields).filter(([name]) => !IN_OPENAI.includes(name));
  if (rest.length) {
    named.push(`    extra_body={${rest.map(([name, value]) => `"${name}": ${literal(value)}`).join(", ")}},`);
  }
  const files = Array.from({ length: inputs }, (_, i) => `open("input${i || ""}.png", "rb")`);
  if (inputs) named.unshift(`    image=${inputs === 1 ? files[0] : `[${files.join(", ")}]`},`);
  return [
    "import base64",
    ...(hasKey ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${root()}/v1", api_key=${hasKey ? `os.environ["TETRISERVE_API_KEY"]` : `"none"`})`,
    `answer = client.images.${inputs ? "edit" : "generate"}(`,
    ...named,
    ")",
    "for i, picture in enumerate(answer.data):",
    `    open(f"picture{i}.png", "wb").write(base64.b64decode(picture.b64_json))`,
    "",
  ].join("\n");
}

/** JSON of numbers and strings is Python too. */
const literal = (value) => JSON.stringify(value);

/** Puts text where the user can paste it from. Only pages of this machine or over https have a clipboard. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
