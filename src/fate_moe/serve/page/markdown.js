// Markdown to DOM nodes. Text of a model is only ever set as text: there is no HTML in between, so nothing has to be escaped.
// Understood: headings, paragraphs, lists, quotes, tables, code, rules, emphasis, links (http and https), line breaks.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const TABLE_LINE = /^ *\|?( *:?-+:? *\|)+( *:?-+:? *)?$/;
const DEEPEST = 12; // lists and quotes within one another

const element = (name, ...children) => {
  const node = document.createElement(name);
  node.append(...children);
  return node;
};

// The blocks of `text`: [{source, make}], where equal sources make equal nodes. Only the last changes while text is appended.
export function blocks(text) {
  return split(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0);
}

export function render(text) {
  const fragment = document.createDocumentFragment();
  for (const block of blocks(text)) fragment.append(block.make());
  return fragment;
}

function split(lines, depth) {
  const found = [];
  let at = 0;
  const add = (end, make) => {
    found.push({ source: lines.slice(at, end).join("\n"), make });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at++;
    } else if ((match = FENCE.exec(line))) {
      const [, fence, language] = match;
      let end = at + 1;
      while (end < lines.length && !closes(lines[end], fence)) end++;
      const code = lines.slice(at + 1, end).join("\n");
      add(Math.min(end + 1, lines.length), () => codeBlock(code, language.trim().split(/\s/)[0]));
    } else if ((match = HEADING.exec(line))) {
      const [, marks, title] = match;
      // The page's own headings are h1 and h2.
      add(at + 1, () => element(`h${Math.min(6, marks.length + 2)}`, ...inline(title)));
    } else if (RULE.test(line)) {
      add(at + 1, () => element("hr"));
    } else if (QUOTE.test(line) && depth < DEEPEST) {
      let end = at;
      while (end < lines.length && QUOTE.test(lines[end])) end++;
      const inner = lines.slice(at, end).map((one) => one.replace(QUOTE, ""));
      add(end, () => element("blockquote", ...split(inner, depth + 1).map((block) => block.make())));
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const end = listEnd(lines, at);
      const inner = lines.slice(at, end);
      add(end, () => list(inner, depth));
    } else if (line.includes("|") && at + 1 < lines.length && TABLE_LINE.test(lines[at + 1])) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|") && lines[end].trim()) end++;
      const rows = lines.slice(at, end);
      add(end, () => table(rows));
    } else {
      let end = at + 1;
      while (end < lines.length && lines[end].trim() && !interrupts(lines, end)) end++;
      const own = lines.slice(at, end).map((one) => one.replace(/^ +/, ""));
      add(end, () => element("p", ...inline(own.join("\n"))));
    }
  }
  return found;
}

const closes = (line, fence) => {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
};

const interrupts = (lines, at) => {
  const line = lines[at];
  return (
    FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) ||
    (line.includes("|") && at + 1 < lines.length && TABLE_LINE.test(lines[at + 1]))
  );
};

const indent = (line) => line.length - line.trimStart().length;
const isOrdered = (mark) => mark.length > 1;

function listEnd(lines, start) {
  const [, before, mark] = ITEM.exec(lines[start]);
  let end = start + 1;
  for (let at = start + 1; at < lines.length; at++) {
    const line = lines[at];
    if (!line.trim()) continue; // belongs to the list if the next line does
    const match = ITEM.exec(line);
    const inside = indent(line) > before.length + 1 || (match && isOrdered(match[2]) === isOrdered(mark) && !RULE.test(line));
    const lazy = at === end && !match && !interrupts(lines, at); // the paragraph goes on
    if (!inside && !lazy) break;
    end = at + 1;
  }
  return end;
}

function list(lines, depth) {
  const [, before, first] = ITEM.exec(lines[0]);
  const node = element(isOrdered(first) ? "ol" : "ul");
  if (isOrdered(first) && parseInt(first, 10) !== 1) node.start = parseInt(first, 10);
  let item = [];
  const close = () => {
    if (!item.length) return;
    const parts = split(item, depth + 1).map((block) => block.make());
    // A tight item's text needs no paragraph.
    const nodes = parts.flatMap((part, index) => (index === 0 && part.tagName === "P" ? [...part.childNodes] : [part]));
    const made = element("li", ...nodes);
    const box = /^\[([ xX])\] /.exec(item[0]);
    if (box) {
      made.firstChild.textContent = made.firstChild.textContent.replace(/^\[[ xX]\] /, box[1] === " " ? "☐ " : "☑ ");
    }
    node.append(made);
    item = [];
  };
  let strip = 0;
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= before.length + 1) {
      close();
      strip = match[0].length;
      item.push(line.slice(strip));
    } else {
      item.push(line.slice(Math.min(indent(line), strip)));
    }
  }
  close();
  return node;
}

const cells = (row) => {
  const found = [];
  let cell = "";
  const text = row.trim().replace(/^\|/, "");
  for (let at = 0; at < text.length; at++) {
    if (text[at] === "\\" && text[at + 1] === "|") {
      cell += "|";
      at++;
    } else if (text[at] === "|") {
      found.push(cell.trim());
      cell = "";
    } else {
      cell += text[at];
    }
  }
  if (cell.trim()) found.push(cell.trim());
  return found;
};

function table(rows) {
  const sides = cells(rows[1]).map((mark) => (mark.endsWith(":") ? (mark.startsWith(":") ? "center" : "right") : ""));
  const row = (name, texts) =>
    element(
      "tr",
      ...sides.map((side, column) => {
        const cell = element(name, ...inline(texts[column] ?? ""));
        if (name === "th") cell.scope = "col";
        if (side) cell.classList.add(side);
        return cell;
      }),
    );
  const head = element("thead", row("th", cells(rows[0])));
  const body = element("tbody", ...rows.slice(2).map((one) => row("td", cells(one))));
  const frame = element("div", element("table", head, body));
  frame.className = "table-frame";
  frame.tabIndex = 0;
  frame.setAttribute("role", "region");
  frame.setAttribute("aria-label", "Table");
  return frame;
}

function codeBlock(code, language) {
  const name = element("span", language || "text");
  const copy = element("button", "Copy");
  copy.type = "button";
  copy.className = "copy-code";
  const text = element("code", code);
  const pre = element("pre", text);
  pre.tabIndex = 0;
  const figure = element("div", element("div", name, copy), pre);
  figure.className = "code";
  figure.firstChild.className = "code-head";
  return figure;
}

// An address that may be followed, or null.
export function safeAddress(text) {
  try {
    const address = new URL(text);
    return address.protocol === "http:" || address.protocol === "https:" ? address.href : null;
  } catch {
    return null;
  }
}

function link(text, children) {
  const address = safeAddress(text);
  if (!address) return element("span", ...children);
  const node = element("a", ...children);
  node.href = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}

const PAIRS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const WORD = /[\p{L}\p{N}]/u;
const LONGEST_SPAN = 4000; // within which an emphasis has to close: keeps long texts linear

// Nodes of a text without blocks.
function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  const add = (node) => {
    flush();
    nodes.push(node);
  };
  let at = 0;
  while (at < text.length) {
    const char = text[at];
    if (char === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    if (char === "\n") {
      if (plain.endsWith("  ")) {
        plain = plain.trimEnd();
        add(element("br"));
      } else {
        plain += "\n";
      }
      at++;
      continue;
    }
    if (char === "`") {
      const ticks = /^`+/.exec(text.slice(at, at + 32))[0];
      const end = text.indexOf(ticks, at + ticks.length);
      if (end > 0) {
        add(element("code", text.slice(at + ticks.length, end).replace(/^ (.+) $/s, "$1")));
        at = end + ticks.length;
        continue;
      }
      plain += ticks;
      at += ticks.length;
      continue;
    }
    if (char === "<" || (char === "h" && !WORD.test(text[at - 1] ?? " "))) {
      const match = /^(?:<(https?:\/\/[^\s<>]{1,2000})>|(https?:\/\/[^\s<>"'`]{1,2000}))/.exec(text.slice(at, at + 2010));
      if (match) {
        const address = match[1] ?? match[2].replace(/[.,;:!?)\]*_~]+$/, "");
        add(link(address, [address]));
        at += match[1] ? match[0].length : address.length;
        continue;
      }
    }
    if ((char === "[" || (char === "!" && text[at + 1] === "[")) && depth < DEEPEST) {
      const match = /^!?\[((?:[^[\]\\]|\\.|\[[^[\]]{0,500}\]){0,1000})\]\(\s*([^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+"[^"\n]{0,500}")?\s*\)/.exec(
        text.slice(at, at + LONGEST_SPAN),
      );
      if (match) {
        // A picture would be fetched from elsewhere: it stays a link.
        add(link(match[2], inline(match[1] || match[2], depth + 1)));
        at += match[0].length;
        continue;
      }
    }
    const pair = depth < DEEPEST && PAIRS.find(([mark]) => text.startsWith(mark, at));
    if (pair) {
      const [mark, name] = pair;
      const end = spanEnd(text, at, mark);
      if (end > 0) {
        add(element(name, ...inline(text.slice(at + mark.length, end), depth + 1)));
        at = end + mark.length;
        continue;
      }
      plain += mark;
      at += mark.length;
      continue;
    }
    plain += char;
    at++;
  }
  flush();
  return nodes;
}

// Where the emphasis that `mark` opens at `start` ends, or -1.
function spanEnd(text, start, mark) {
  const inner = start + mark.length;
  if (/\s/.test(text[inner] ?? " ")) return -1;
  if (mark[0] === "_" && WORD.test(text[start - 1] ?? " ")) return -1; // snake_case
  const last = Math.min(text.length, start + LONGEST_SPAN);
  for (let at = inner; at < last; at++) {
    if (text[at] === "\\") {
      at++;
    } else if (text[at] === "`") {
      const end = text.indexOf("`", at + 1);
      if (end > 0) at = end;
    } else if (text.startsWith(mark, at) && at > inner && !/\s/.test(text[at - 1])) {
      if (mark.length === 1 && text[at + 1] === mark) {
        at++; // the strong one within
        continue;
      }
      if (mark[0] === "_" && WORD.test(text[at + mark.length] ?? " ")) continue;
      return at;
    }
  }
  return -1;
}
