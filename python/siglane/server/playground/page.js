"use strict";

const $ = (id) => document.getElementById(id);
const ROOT = location.pathname.replace(/\/+$/, ""); // a proxy may show the page below a path
const messages = []; // of the API; pictures as data: URLs
let pictures = []; // of the next message: {name, type, url, width, height}
let connected = null; // a promise
let asking = null; // AbortController of the running answer
let idle = ""; // what is told while nothing happens
let sighted = 0; // counts looks, so that an old one never overwrites a newer

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text; // never as HTML: answers and names are anybody's
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function tell(text, wrong = false) {
  $("state").textContent = text;
  $("state").classList.toggle("wrong", wrong);
}

async function call(path, body, signal) {
  const headers = {};
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  if (body) headers["content-type"] = "application/json";
  const method = body ? "POST" : "GET";
  const response = await fetch(ROOT + path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new Error(told?.error?.message ?? `the server answered ${response.status}`);
}

// ---- what the server can do

async function connect() {
  try {
    const [models, document_] = await Promise.all([call("/v1/models"), call("/openapi.json")]);
    const { data } = await models.json();
    const { paths, components } = await document_.json();
    $("model").replaceChildren(...data.map((one) => element("option", one.id)));
    const chat = components.schemas.ChatCompletionRequest?.properties;
    $("composer").hidden = !chat && !paths["/v1/classify"];
    for (const one of document.querySelectorAll("[data-chat]")) one.hidden = !chat;
    $("sight").hidden = !paths["/v1/images/view"];
    $("tagging").hidden = !paths["/v1/classify"];
    $("tooling").hidden = !chat?.tools;
    idle = chat ? `${data[0].max_model_len} tokens of context` : "tags pictures; it does not chat";
    tell(idle);
  } catch (error) {
    tell(error.message, true);
  }
}

// ---- pictures

async function add(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const url = await new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => failed(reader.error);
      reader.readAsDataURL(file);
    });
    const shown = new Image();
    shown.src = url;
    await shown.decode().catch(() => {}); // one that a browser cannot show is still the server's to read
    const name = file.name || "picture";
    pictures.push({ name, type: file.type, url, width: shown.naturalWidth, height: shown.naturalHeight });
  }
  showPictures();
}

function showPictures() {
  $("pictures").replaceChildren(
    ...pictures.map((picture, number) => {
      const remove = element("button", "×", { type: "button", "aria-label": `Remove ${picture.name}` });
      remove.onclick = () => {
        pictures.splice(number, 1);
        showPictures();
        $("question").focus();
      };
      const item = element("li");
      item.append(element("img", "", { src: picture.url, alt: picture.name }), remove);
      return item;
    }),
  );
  look();
}

async function look() {
  const mine = ++sighted;
  $("program").value = ""; // it was another request's
  await connected; // whether there is anything to see is the server's to tell
  if (mine !== sighted) return;
  if ($("sight").hidden || !pictures.length) {
    $("counts").hidden = true;
    return;
  }
  try {
    await Promise.all([count(mine), view(mine)]);
  } catch (error) {
    if (mine === sighted) $("views").replaceChildren(element("p", error.message, { class: "quiet", role: "alert" }));
  }
}

async function count(mine) {
  const sizes = pictures.filter((one) => one.width);
  if (!sizes.length) return;
  const rows = await Promise.all(
    ["auto", "low", "high"].map(async (detail) => {
      const images = sizes.map(({ width, height }) => ({ width, height, detail }));
      const found = await (await call("/v1/images/tokens", { images, together: true })).json();
      const grids = found.images.flatMap((one) => one.grids);
      const row = element("tr");
      if (detail === $("detail").value) row.setAttribute("aria-current", "true");
      const patches = grids.reduce((sum, [high, wide]) => sum + high * wide, 0);
      row.append(element("th", detail, { scope: "row" }), ...[found.tokens, grids.length, patches].map((n) => element("td", n)));
      return row;
    }),
  );
  if (mine !== sighted) return;
  $("counts").tBodies[0].replaceChildren(...rows);
  $("counts").hidden = false;
}

async function view(mine) {
  const detail = $("detail").value;
  const drawn = await Promise.all(
    pictures.map(async ({ name, url }) => {
      const response = await call("/v1/images/view", { image: { url, detail } });
      const shown = element("img", "", { alt: `${name} as the model sees it: its tiles, patches and place in the prompt` });
      shown.src = URL.createObjectURL(await response.blob());
      shown.onload = () => URL.revokeObjectURL(shown.src);
      return shown;
    }),
  );
  if (mine === sighted) $("views").replaceChildren(...drawn);
}

// ---- the request

function parsed(id, what) {
  try {
    return JSON.parse($(id).value);
  } catch (error) {
    throw new Error(`${what} is no JSON: ${error.message}`);
  }
}

function constraint() {
  const rule = $("rule").value;
  switch ($("constraint").value) {
    case "object": return { response_format: { type: "json_object" } };
    case "schema":
      return { response_format: { type: "json_schema", json_schema: { name: "answer", schema: parsed("rule", "the schema") } } };
    case "regex": return { structured_outputs: { regex: rule } };
    case "choice": return { structured_outputs: { choice: rule.split("\n").filter(Boolean) } };
    case "grammar": return { structured_outputs: { grammar: rule } };
    default: return {};
  }
}

function fields() {
  const found = {};
  for (const input of document.querySelectorAll("[data-field]")) {
    if (input.value !== "") found[input.dataset.field] = Number(input.value);
  }
  const tools = !$("tooling").hidden && $("tools").value.trim() ? { tools: parsed("tools", "the list of tools") } : {};
  if (tools.tools && $("choice").value) tools.tool_choice = $("choice").value;
  return { ...found, ...constraint(), ...tools };
}

function turn(text, shown) {
  const detail = $("detail").value;
  const images = shown.map(({ url }) => ({ type: "image_url", image_url: detail === "auto" ? { url } : { url, detail } }));
  return { role: "user", content: images.length ? [...images, { type: "text", text }] : text };
}

function request(next) {
  const system = $("system").value.trim() ? [{ role: "system", content: $("system").value.trim() }] : [];
  const model = $("model").value ? { model: $("model").value } : {}; // the server may not have told yet
  return { ...model, messages: [...system, ...messages, next], ...fields() };
}

// ---- the answer

function say(role, text, shown = []) {
  const box = element("article", "", { class: `message ${role}` });
  box.append(element("b", role === "user" ? "You" : role === "error" ? "Not answered" : $("model").value));
  for (const { name, url } of shown) box.append(element("img", "", { src: url, alt: name }));
  const reasoning = element("p", "", { class: "reasoning" });
  const words = element("p", text);
  box.append(reasoning, words);
  $("log").append(box);
  $("log").scrollTop = $("log").scrollHeight;
  return { box, reasoning, words };
}

async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for (const reader = response.body.getReader(); ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

function join(calls, deltas) {
  for (const { index, function: part } of deltas ?? []) {
    const one = (calls[index] ??= { name: "", arguments: "" });
    one.name += part?.name ?? "";
    one.arguments += part?.arguments ?? "";
  }
}

async function ask() {
  const text = $("question").value.trim();
  if (!text || asking) return;
  const next = turn(text, pictures);
  let body;
  try {
    body = { ...request(next), stream: true, stream_options: { include_usage: true }, include_timings: true };
  } catch (error) {
    tell(error.message, true);
    return;
  }
  say("user", text, pictures);
  const answer = say("assistant", "");
  asking = new AbortController();
  busy(true);
  const calls = [];
  try {
    for await (const event of events(await call("/v1/chat/completions", body, asking.signal))) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      answer.words.textContent += delta.content ?? "";
      answer.reasoning.textContent += delta.reasoning_content ?? "";
      join(calls, delta.tool_calls);
      if (event.usage) answer.box.append(element("span", facts(event), { class: "facts" }));
      $("log").scrollTop = $("log").scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") say("error", error.message);
  }
  for (const one of calls) answer.words.textContent += `${one.name}(${one.arguments})\n`;
  if (answer.words.textContent) {
    messages.push(next, { role: "assistant", content: answer.words.textContent });
    pictures = [];
    $("question").value = "";
    $("pictures").replaceChildren();
  } else {
    answer.box.remove();
  }
  asking = null;
  busy(false);
  $("question").focus();
}

function facts({ usage, siglane }) {
  const { image_tokens, text_tokens, cached_tokens } = usage.prompt_tokens_details;
  const stages = Object.entries(siglane?.timings ?? {}).map(([name, seconds]) => `${name} ${Math.round(1000 * seconds)} ms`);
  const tokens = `${image_tokens} image + ${text_tokens} text tokens (${cached_tokens} cached), ${usage.completion_tokens} answered`;
  return [tokens, ...stages].join(" · ");
}

function busy(is) {
  $("ask").disabled = is;
  $("stop").hidden = !is;
  tell(is ? "answering" : idle);
}

// ---- tags

async function tag() {
  const labels = $("labels").value.split("\n").map((one) => one.trim()).filter(Boolean);
  try {
    const images = pictures.map(({ url }) => url);
    const body = { images, labels, threshold: Number($("threshold").value) };
    const { data } = await (await call("/v1/classify", body)).json();
    const rows = data.flatMap(({ index, tags }) =>
      tags.map(({ label, confidence }) => element("li", `${pictures[index].name}: ${label} ${confidence.toFixed(3)}`)),
    );
    $("tags").replaceChildren(...(rows.length ? rows : [element("li", "none")]));
  } catch (error) {
    $("tags").replaceChildren(element("li", error.message));
  }
}

// ---- as a program

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function asCurl(body) {
  let json = quoted(JSON.stringify(body));
  for (const { name, type, url } of pictures) { // a picture's file in place of its letters
    json = json.replace(url, () => `data:${type};base64,'"$(base64 < ${quoted(name)} | tr -d '\\n')"'`);
  }
  const key = $("key").value ? ' \\\n  -H "authorization: Bearer $SIGLANE_API_KEY"' : "";
  return `curl -s ${quoted(`${location.origin}${ROOT}/v1/chat/completions`)}${key} \\\n  -H 'content-type: application/json' \\\n  -d ${json}\n`;
}

function python(value, indent = "") {
  const deeper = `${indent}    `;
  const lines = (open, items, close) => (items.length ? `${open}\n${items.map((one) => `${deeper}${one},\n`).join("")}${indent}${close}` : open + close);
  if (Array.isArray(value)) return lines("[", value.map((one) => python(one, deeper)), "]");
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value === "object") {
    return lines("{", Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one, deeper)}`), "}");
  }
  const number = pictures.findIndex(({ url }) => url === value);
  return number < 0 ? JSON.stringify(value) : `picture(${JSON.stringify(pictures[number].name)}, ${JSON.stringify(pictures[number].type)})`;
}

function asPython(body) {
  const ours = ["response_format", "temperature", "top_p", "max_tokens", "seed", "model", "messages", "tools", "tool_choice"];
  const split = (known) => Object.fromEntries(Object.entries(body).filter(([name]) => ours.includes(name) === known));
  const given = Object.entries(split(true)).map(([name, value]) => `    ${name}=${python(value, "    ")},\n`);
  const extra = Object.keys(split(false)).length ? `    extra_body=${python(split(false), "    ")},\n` : "";
  const key = $("key").value ? 'os.environ["SIGLANE_API_KEY"]' : '"none"';
  const reader = pictures.length
    ? `\n\ndef picture(path, kind):\n    with open(path, "rb") as file:\n        return f"data:{kind};base64,{base64.b64encode(file.read()).decode()}"\n\n`
    : "";
  return `import base64\nimport os\n\nfrom openai import OpenAI\n${reader}\nclient = OpenAI(base_url=${JSON.stringify(`${location.origin}${ROOT}/v1`)}, api_key=${key})\nanswer = client.chat.completions.create(\n${given.join("")}${extra})\nprint(${body.tools ? "answer.choices[0].message" : "answer.choices[0].message.content"})\n`;
}

async function copy(write) {
  try {
    await connected; // whose first answer names the model
    $("program").value = write(request(turn($("question").value.trim() || "What is in the picture?", pictures)));
    $("program").select();
    await navigator.clipboard.writeText($("program").value); // where the page is not safe enough for it, what is selected can be copied
    tell("copied");
  } catch (error) {
    tell($("program").value ? "press Ctrl+C to copy" : error.message, !$("program").value);
  }
}

// ---- hands

$("composer").onsubmit = (event) => {
  event.preventDefault();
  ask();
};
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
};
$("stop").onclick = () => asking?.abort();
$("clear").onclick = () => {
  asking?.abort();
  messages.length = 0;
  pictures = [];
  $("log").replaceChildren();
  $("views").replaceChildren();
  showPictures();
  $("question").focus();
};
$("add").onclick = () => $("files").click();
$("files").onchange = () => add([...$("files").files]).finally(() => ($("files").value = ""));
document.onpaste = (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) add(files);
};
document.ondragover = (event) => {
  event.preventDefault();
  $("composer").classList.add("dropping");
};
document.ondragleave = () => $("composer").classList.remove("dropping");
document.ondrop = (event) => {
  event.preventDefault();
  $("composer").classList.remove("dropping");
  add([...event.dataTransfer.files]);
};
$("detail").onchange = look;
$("key").onchange = () => (connected = connect());
$("tag").onclick = tag;
$("curl").onclick = () => copy(asCurl);
$("python").onclick = () => copy(asPython);
connected = connect();
