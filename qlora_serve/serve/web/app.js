// The page: asking, history, votes, keys.

import { change, showAdapters } from "./adapters.js";
import { Board, make, newComparison, take } from "./answers.js";
import { showExperiments, showStandings } from "./results.js";
import { ask, compare, key, useKey } from "./server.js";

const at = (id) => document.getElementById(id);
const KEPT = 50;
const FIELDS = ["system", "temperature", "max_tokens", "seed", "repeats"];
const kept = { read: (name, other) => JSON.parse(localStorage.getItem(name) ?? "null") ?? other };
let past = kept.read("past", []);
let running = null;
const board = new Board(at("answers"), vote);

function keep() {
  while (past.length) {
    try {
      localStorage.setItem("past", JSON.stringify(past));
      return;
    } catch {
      past.pop(); // the browser's room is full: the oldest goes
    }
  }
  localStorage.removeItem("past");
}

function say(message) {
  at("problem").textContent = message;
  at("problem").hidden = !message;
}

// ---- who answers

function showVariants(base, adapters) {
  const wanted = kept.read("variants", null);
  const labels = [...document.querySelectorAll(".variant label")].map((one) => one.textContent);
  const names = [...(base ? ["base"] : []), ...adapters];
  const rows = names.map((name) => {
    const row = make("div", "variant");
    const label = make("label");
    const box = make("input");
    box.type = "checkbox";
    box.value = name;
    box.checked = wanted ? name in wanted : names.indexOf(name) < 4;
    label.append(box, name === "base" ? `base (${base})` : name);
    row.append(label);
    if (name !== "base") {
      const scale = make("input");
      Object.assign(scale, { type: "number", step: 0.1, min: -10, max: 10, value: wanted?.[name] ?? "", placeholder: "scale", title: `Scale of ${name}; its own when empty` });
      scale.setAttribute("aria-label", `Scale of ${name}`);
      row.append(scale);
    }
    row.addEventListener("change", () => {
      row.classList.toggle("off", !box.checked);
      keepVariants();
    });
    row.classList.toggle("off", !box.checked);
    return row;
  });
  // What somebody is typing into stays where it is, unless the list has changed.
  if (rows.map((row) => row.textContent).join("\n") !== labels.join("\n")) at("variants").replaceChildren(...rows);
}

function keepVariants() {
  localStorage.setItem("variants", JSON.stringify(chosenVariants()));
}

function chosenVariants() {
  const chosen = {};
  for (const row of document.querySelectorAll(".variant")) {
    const [box, scale] = row.querySelectorAll("input");
    if (box.checked) chosen[box.value] = scale?.value ?? "";
  }
  return chosen;
}

function bodyOf(prompt) {
  const chosen = chosenVariants();
  keepVariants();
  localStorage.setItem("settings", JSON.stringify(Object.fromEntries(FIELDS.map((id) => [id, at(id).value]))));
  const number = (id) => (at(id).value === "" ? {} : { [id]: Number(at(id).value) });
  const repeats = Number(at("repeats").value) || 1;
  const variants = Object.entries(chosen).map(([name, scale]) =>
    scale === "" ? { model: name, name, repeats } : { adapter: name, adapter_scale: Number(scale), name: `${name}@${scale}`, repeats });
  const messages = [{ role: "user", content: prompt }];
  if (at("system").value.trim()) messages.unshift({ role: "system", content: at("system").value });
  return { messages, variants, divergence: at("divergence").checked, ...number("temperature"), ...number("max_tokens"), ...number("seed") };
}

// ---- asking

async function send() {
  const prompt = at("prompt").value;
  if (running || !prompt.trim()) return;
  say("");
  const body = bodyOf(prompt);
  if (!body.variants.length) return say("Choose at least one who answers.");
  const comparison = newComparison(prompt, body);
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  at("answers").setAttribute("aria-busy", "true");
  try {
    for await (const event of compare(body, running.signal)) {
      take(comparison, event);
      if (event.type === "start") show(comparison);
      else if (event.index !== undefined) board.refresh(event.index);
    }
  } catch (error) {
    comparison.stopped = true;
    if (error.name !== "AbortError") say(error.message);
  }
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
  at("answers").removeAttribute("aria-busy");
  if (!comparison.id) return;
  if (board.comparison === comparison) board.refresh();
  past.unshift(comparison);
  past = past.slice(0, KEPT);
  keep();
  showPast();
  loadAdapters();
}

function show(comparison) {
  at("empty").hidden = true;
  at("marks").hidden = false;
  board.show(comparison);
}

// ---- history and votes

function showPast() {
  const items = past.map((comparison) => {
    const item = make("li");
    const who = [...new Set(comparison.answers.map((one) => one.variant))].join(", ");
    const button = make("button", "", `${comparison.prompt.slice(0, 120)} — ${who}`);
    button.type = "button";
    button.addEventListener("click", () => {
      if (running) return;
      at("prompt").value = comparison.prompt;
      show(comparison);
      at("ask").scrollIntoView();
    });
    item.append(button);
    return item;
  });
  at("past").replaceChildren(...(items.length ? items : [make("p", "quiet", "Nothing yet.")]));
}

/** The server keeps votes; here is only remembered what to show as chosen. */
async function vote(index) {
  const { comparison } = board;
  const answer = comparison?.answers[index];
  if (!answer?.ending || answer.ending.finish_reason === "error") return;
  const isTakenBack = comparison.vote === index;
  try {
    await ask("v1/feedback", "POST", { id: answer.id, vote: isTakenBack ? "none" : "best" });
  } catch (error) {
    return say(error.message);
  }
  say("");
  comparison.vote = isTakenBack ? null : index;
  board.refresh();
  keep();
  await showStandings(at("ranks"));
}

// ---- adapters

async function loadAll() {
  let models;
  try {
    models = (await ask("v1/models")).data;
  } catch (error) {
    at("server").textContent = error.status === 401 ? "a key is needed" : "not connected";
    at("keyform").hidden = error.status !== 401;
    say(error.status === 401 && !key ? "" : error.message);
    at("variants").replaceChildren(make("p", "quiet", "Nobody yet."));
    for (const id of ["ranks", "adapterlist"]) at(id).replaceChildren(make("p", "quiet", "Not known yet."));
    return;
  }
  at("keyform").hidden = !key;
  const base = models[0]?.parent === null ? models[0].id : null;
  const usable = models.filter((one) => one.parent !== null && !one.experiment);
  at("server").textContent = `${base ?? models[0]?.root ?? "no model"}, ${usable.length} adapter${usable.length === 1 ? "" : "s"}`;
  showVariants(base, usable.map((one) => one.id));
  await Promise.all([loadAdapters(), showStandings(at("ranks")), showExperiments(at("experiments"), at("experimentlist"))]);
}

async function loadAdapters() {
  at("adapterproblem").hidden = true;
  try {
    const { data, may_change: mayChange } = await ask("v1/adapters");
    at("load").hidden = !mayChange;
    showAdapters(at("adapterlist"), at("adapterproblem"), data, mayChange, loadAll);
  } catch (error) {
    at("adapterlist").replaceChildren(make("p", "quiet", `The list cannot be shown: ${error.message}`));
  }
}

// ---- beginning

at("form").addEventListener("submit", (event) => { event.preventDefault(); send(); });
at("stop").addEventListener("click", () => running?.abort());
at("refresh").addEventListener("click", loadAll);
at("key").value = key;
at("keyform").addEventListener("submit", (event) => { event.preventDefault(); useKey(at("key").value.trim()); loadAll(); });
at("nokey").addEventListener("click", () => { at("key").value = ""; useKey(""); loadAll(); });
at("forget").addEventListener("click", () => { past = []; keep(); showPast(); });
at("load").addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = { name: at("loadname").value, ...(at("loadpath").value ? { path: at("loadpath").value } : {}) };
  const done = await change(at("adapterproblem"), event.submitter ?? at("refresh"), loadAll, "v1/adapters", "POST", body);
  if (done) at("load").reset();
});
for (const radio of document.querySelectorAll('input[name="mark"]')) {
  radio.addEventListener("change", () => { board.mark = radio.value; at("legend").hidden = radio.value !== "divergence"; board.refresh(); });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); at("form").requestSubmit(); }
  if (event.key === "Escape") running?.abort();
  if (event.target.closest("input, textarea, summary") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); at("prompt").focus(); }
  if (/^[1-9]$/.test(event.key)) vote(Number(event.key) - 1);
});
for (const [id, value] of Object.entries(kept.read("settings", {}))) if (at(id)) at(id).value = value;
showPast();
await loadAll();
