// Pieces of text: what each token says, how strongly it is shaded, what two answers do not share.

const LEVELS = [0.05, 0.25, 1, 3];

/** The class of a shade for so many nats of divergence. */
export function shade(divergence) {
  const level = LEVELS.filter((least) => divergence >= least).length;
  return level ? `d${level}` : "";
}

/** The text of each token; a character that several tokens make belongs to the last of them. */
export function tokenTexts(tokens) {
  const decoder = new TextDecoder();
  return tokens.map((token) => decoder.decode(new Uint8Array(token.bytes), { stream: true }));
}

/** Words with the white space behind them. */
function words(text) {
  return text.match(/\s+|[^\s]+\s*/gu) ?? [];
}

/**
 * The words of `text`, each with whether it is missing in `other`, by a longest common
 * subsequence. Very long answers are compared by their first words only.
 */
export function differences(text, other, most = 1500) {
  const mine = words(text).slice(0, most);
  const theirs = words(other).slice(0, most);
  const same = (i, j) => mine[i].trim() === theirs[j].trim();
  const width = theirs.length + 1;
  const common = new Uint16Array((mine.length + 1) * width);
  for (let i = mine.length - 1; i >= 0; i--) {
    for (let j = theirs.length - 1; j >= 0; j--) {
      common[i * width + j] = same(i, j)
        ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const found = [];
  let j = 0;
  for (let i = 0; i < mine.length; i++) {
    while (j < theirs.length && !same(i, j) && common[i * width + j + 1] >= common[(i + 1) * width + j]) j++;
    const shared = j < theirs.length && same(i, j);
    if (shared) j++;
    found.push({ text: mine[i], isNew: !shared });
  }
  const rest = words(text).slice(most).join("");
  return rest ? [...found, { text: rest, isNew: false }] : found;
}
