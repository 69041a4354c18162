// A prompt in, the text on its way from noise out. Nothing is asked of anybody but the server that gave this page,
// and what comes is shown as text, never read as markup.
"use strict";

const at = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "seed", "num_steps", "guidance_scale", "temperature"];
let way = []; // {t, text} of every step, the text itself last
let end = null; // what the last event said
let asking = null; // AbortController of the request under way
let about = null; // the model, as /v1/models lists it

function say(text, bad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", bad);
}

function headers() {
  const key = at("key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function failure(answer) {
  if (answer.status === 401) {
    at("key_label").hidden = false;
    at("settings").open = true;
    at("key").focus();
  }
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answers ${answer.status}`;
  }
}

function offer(select, names, chosen) {
  select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
}

async function learn() {
  if (about) return;
  const answer = await fetch("v1/models", { headers: headers() });
  if (!answer.ok) throw new Error(await failure(answer));
  about = (await answer.json()).data[0];
  at("model").textContent = about.id;
  for (const name of ["max_tokens", "num_steps", "guidance_scale", "temperature"]) {
    at(name).placeholder = about.defaults[name];
  }
  at("max_tokens").max = about.max_text_tokens;
  at("max_tokens").placeholder = Math.min(about.defaults.max_tokens, about.max_window);
  at("num_steps").max = about.max_steps;
  at("temperature").disabled = !about.has_temperature;
  offer(at("solver"), about.solvers, about.defaults.solver);
  offer(at("grid"), about.grids, about.defaults.grid);
}

function show(place) {
  const { t, text } = way[place];
  at("found").textContent = text;
  at("time").setAttribute("aria-valuetext", `t = ${t.toFixed(2)}`);
  const shown = [`t = ${t.toFixed(2)}`];
  if (end) shown.push(`seed ${end.seed}`, `${end.usage.completion_tokens} tokens`, end.finish_reason === "stop" ? "ended" : "cut at its length");
  at("facts").textContent = shown.join(" · ");
}

// The data of each server-sent event; a chunk may end anywhere.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

function request() {
  const body = { prompt: at("prompt").value };
  for (const name of NUMBERS) {
    const field = at(name);
    if (field.value !== "" && !field.disabled) body[name] = Number(field.value);
  }
  if (about) Object.assign(body, { solver: at("solver").value, grid: at("grid").value });
  return body;
}

async function write() {
  asking = new AbortController();
  way = [];
  end = null;
  at("go").disabled = true;
  at("cancel").hidden = false;
  at("time").disabled = true;
  say("waiting …");
  try {
    await learn();
    const body = request();
    const answer = await fetch("v1/steps", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers() },
      body: JSON.stringify(body),
      signal: asking.signal,
    });
    if (!answer.ok) throw new Error(await failure(answer));
    at("given").textContent = body.prompt;
    at("result").hidden = false;
    at("text").scrollIntoView({ block: "nearest" });
    for await (const data of events(answer)) {
      if (data === "[DONE]") break;
      const found = JSON.parse(data);
      if (found.error) throw new Error(found.error.message);
      if (found.usage) end = found;
      way.push(found);
      at("time").max = found.usage ? way.length - 1 : found.num_steps;
      at("time").value = way.length - 1;
      show(way.length - 1);
      say(found.usage ? "" : `step ${found.step + 1} of ${found.num_steps}`);
    }
    if (!end) throw new Error("the server ended before the text did");
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else say(error.message, true);
  } finally {
    asking = null;
    at("go").disabled = false;
    at("cancel").hidden = true;
    if (way.length) {
      at("time").max = way.length - 1;
      at("time").value = way.length - 1;
      at("time").disabled = false;
    }
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!asking) write();
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
at("cancel").addEventListener("click", () => asking && asking.abort());
at("time").addEventListener("input", () => show(Number(at("time").value)));
at("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
learn().catch((error) => say(error.message, true));
