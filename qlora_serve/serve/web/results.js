// What the server has counted: standings of comparisons, results of experiments.

import { make } from "./answers.js";
import { ask } from "./server.js";

const percent = (value) => `${Math.round(100 * value)} %`;
const rateText = (rate) => (rate ? `${percent(rate.value)} (${percent(rate.low)} to ${percent(rate.high)})` : "–");
const number = (value) => Number(value.toPrecision(3)).toString();
const meanText = (mean) => (mean ? number(mean.value) + (mean.low === null ? "" : ` (${number(mean.low)} to ${number(mean.high)})`) : "–");

/** A table; a column is a heading, what a row says there, and whether that is a number. */
function table(columns, rows) {
  const made = make("table");
  const head = made.createTHead().insertRow();
  for (const [name, , isNumber] of columns) head.append(make("th", isNumber ? "number" : "", name));
  const body = made.createTBody();
  for (const one of rows) {
    const row = body.insertRow();
    for (const [name, text, isNumber] of columns) {
      const cell = make("td", isNumber ? "number" : "", text(one));
      cell.dataset.name = name;
      row.append(cell);
    }
  }
  const scroll = make("div", "scroll");
  scroll.append(made);
  return scroll;
}

/** How often each variant was voted the best, as the server counts it. */
export async function showStandings(place) {
  let found;
  try {
    found = await ask("v1/feedback/standings");
  } catch (error) {
    place.replaceChildren(make("p", "quiet", `They cannot be shown: ${error.message}`));
    return;
  }
  if (!found.data.length) {
    place.replaceChildren(make("p", "quiet", "No votes yet. Choose the best answer of a comparison."));
    return;
  }
  const parts = [table([
    ["Variant", (one) => one.variant],
    ["Best", (one) => one.best, true],
    ["Of", (one) => one.of, true],
    ["Share (95 % interval)", (one) => rateText(one.rate), true],
  ], found.data)];
  if (!found.is_kept) parts.push(make("p", "quiet", "Kept until the server ends; started with --feedback FILE, it keeps them."));
  place.replaceChildren(...parts);
}

/** What came of the experiments; the section is hidden when there are none. */
export async function showExperiments(section, place) {
  const parts = [];
  try {
    for (const { id, state } of (await ask("v1/experiments")).data) {
      const { variants } = await ask(`v1/experiments/${encodeURIComponent(id)}`);
      parts.push(make("h3", "", state === "ended" ? `${id} (ended)` : id), table([
        ["Variant", (one) => one.name],
        ["Gets", (one) => (one.share === null ? "–" : percent(one.share)), true],
        ["Answers", (one) => one.answers, true],
        ["Votes", (one) => one.up + one.down, true],
        ["Up (95 % interval)", (one) => rateText(one.up_rate), true],
        ["Score (95 % interval)", (one) => meanText(one.mean_score), true],
      ], variants));
    }
  } catch (error) {
    parts.push(make("p", "quiet", `They cannot be shown: ${error.message}`));
  }
  section.hidden = !parts.length;
  place.replaceChildren(...parts);
}
