// The answers side by side.

import { differences, shade, tokenTexts } from "./text.js";

const make = (tag, className = "", text = "") => {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
};
export { make };

/** One comparison as it is kept: the question, the body that was sent, and what came back. */
export function newComparison(prompt, body) {
  return { prompt, body, at: Date.now(), id: null, answers: [], vote: null };
}

/** Takes an event of the stream into a comparison. */
export function take(comparison, event) {
  if (event.type === "start") {
    comparison.id = event.id;
    comparison.answers = event.answers.map((one) => ({ ...one, text: "", tokens: [], ending: null, divergence: null }));
  }
  const answer = comparison.answers[event.index];
  if (!answer) return;
  if (event.type === "delta") {
    answer.text += event.text;
    answer.tokens.push(...event.tokens.map(({ bytes, logprob }) => ({ bytes, logprob })));
  } else if (event.type === "answer") {
    answer.ending = event;
  } else if (event.type === "divergence") {
    answer.divergence = { mean: event.mean, error: event.error, tokens: event.tokens.map((one) => one.divergence) };
  }
}

export const title = (answer) => (answer.repeat ? `${answer.variant} #${answer.repeat + 1}` : answer.variant);

/** Shows comparisons; `onVote(index)` is called for a vote. */
export class Board {
  constructor(place, onVote) {
    this.place = place;
    this.onVote = onVote;
    this.cards = [];
    this.comparison = null;
    this.mark = "divergence";
  }

  show(comparison) {
    this.comparison = comparison;
    this.cards = comparison.answers.map((answer, index) => this.card(answer, index));
    this.place.replaceChildren(...this.cards.map((card) => card.root));
    this.refresh();
  }

  card(answer, index) {
    const root = make("article", "answer");
    root.setAttribute("aria-label", `Answer of ${title(answer)}`);
    const said = make("div", "said");
    const figures = make("p", "quiet figures");
    const vote = make("button", "small vote", "Best");
    vote.type = "button";
    vote.title = `The best answer (key ${index + 1})`;
    vote.addEventListener("click", () => this.onVote(index));
    const footer = make("footer");
    footer.append(figures, vote);
    root.append(make("h3", "", title(answer)), said, footer);
    return { root, said, figures, vote };
  }

  /** Draws again what may have changed; of one answer, or of all. */
  refresh(only = null) {
    const base = this.reference();
    this.cards.forEach((card, index) => {
      if (only !== null && only !== index) return;
      const answer = this.comparison.answers[index];
      const running = !answer.ending && !this.comparison.stopped;
      card.root.classList.toggle("running", running);
      card.root.classList.toggle("chosen", this.comparison.vote === index);
      card.vote.setAttribute("aria-pressed", String(this.comparison.vote === index));
      card.vote.disabled = !answer.ending || answer.ending.finish_reason === "error";
      card.said.replaceChildren(...this.pieces(answer, base));
      card.figures.textContent = figures(answer, this.comparison);
      card.figures.classList.toggle("failed", answer.ending?.finish_reason === "error");
    });
  }

  reference() {
    const { answers } = this.comparison;
    return answers.find((one) => one.variant === "base") ?? answers[0];
  }

  pieces(answer, base) {
    const shades = answer.divergence?.tokens ?? [];
    if (this.mark === "divergence" && shades.length) {
      return tokenTexts(answer.tokens).map((text, n) => {
        const span = make("span", shade(shades[n]), text);
        span.title = `${shades[n].toFixed(3)} nats from the base`;
        return span;
      });
    }
    if (this.mark === "difference" && answer !== base && answer.ending && base.ending) {
      return differences(answer.text, base.text).map((word) => make(word.isNew ? "mark" : "span", "", word.text));
    }
    return [document.createTextNode(answer.text)];
  }
}

function figures(answer, comparison) {
  const { ending, divergence } = answer;
  if (!ending) return comparison.stopped ? "stopped" : answer.text ? "answering …" : "waiting …";
  if (ending.finish_reason === "error") return `failed: ${ending.error}`;
  const parts = [`${ending.usage.completion_tokens} tokens in ${ending.seconds.toFixed(1)} s`];
  if (ending.ttft_seconds !== null) parts.push(`first after ${ending.ttft_seconds.toFixed(2)} s`);
  if (ending.mean_logprob !== null) parts.push(`log-probability ${ending.mean_logprob.toFixed(2)}`);
  if (divergence?.error) parts.push(`no divergence: ${divergence.error}`);
  else if (divergence) parts.push(`${divergence.mean.toFixed(3)} nats from the base`);
  if (ending.finish_reason === "length") parts.push("cut at the most tokens");
  return parts.join(" · ");
}
