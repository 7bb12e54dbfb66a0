// The list of adapters: their state, loading and unloading.

import { make } from "./answers.js";
import { ask } from "./server.js";

const size = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

/** Draws the list, for admins with buttons; `onChange` is called after one has been used. */
export function showAdapters(place, problem, adapters, mayChange, onChange) {
  if (!adapters.length) {
    place.replaceChildren(make("p", "quiet", "No adapters are loaded: the base answers alone."));
    return;
  }
  const table = make("table");
  const head = table.createTHead().insertRow();
  for (const name of ["Name", "State", "Where", "Rank", "Size", "Requests", ...(mayChange ? [""] : [])]) head.append(make("th", "", name));
  const rows = table.createTBody();
  for (const adapter of adapters) {
    const row = rows.insertRow();
    const cell = (name, text, className = "") => {
      const made = make("td", className, text);
      if (name) made.dataset.name = name;
      row.append(made);
      return made;
    };
    cell("", adapter.id).style.fontWeight = "600";
    cell("State", adapter.state + (adapter.reason ? `: ${adapter.reason}` : ""), adapter.state === "failed" ? "failed" : "");
    cell("Where", adapter.tier ? adapter.tier + (adapter.pinned ? ", pinned" : "") : "–");
    cell("Rank", adapter.rank ?? "–");
    cell("Size", adapter.size_bytes ? size(adapter.size_bytes) : "–");
    cell("Requests", adapter.requests_in_flight);
    if (!mayChange) continue;
    const button = make("button", "small", "Unload");
    button.setAttribute("aria-label", `Unload ${adapter.id}`);
    button.addEventListener("click", () => change(problem, button, onChange, `v1/adapters/${encodeURIComponent(adapter.id)}`, "DELETE"));
    cell("", "").append(button);
  }
  const scroll = make("div", "scroll");
  scroll.append(table);
  place.replaceChildren(scroll);
}

/** Loads or unloads; says what stands against it. Returns whether it was done. */
export async function change(problem, button, onChange, path, method, body = undefined) {
  button.disabled = true;
  problem.hidden = true;
  try {
    await ask(path, method, body);
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
    return false;
  } finally {
    button.disabled = false;
  }
  await onChange();
  return true;
}
