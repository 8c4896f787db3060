// Elements from values. Text is only ever inserted as text, so nothing that a model or a node says is taken for markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element with its text or children; `attributes` are set as they are. */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function drawn(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Show `children` under `parent` by changing only what differs, so that a reader's place and selection stay. */
export function show(parent, children) {
  const before = [...parent.childNodes];
  children.forEach((child, i) => (before[i] ? update(before[i], child) : parent.append(child)));
  for (const extra of before.slice(children.length)) extra.remove();
}

function update(node, wanted) {
  if (node.nodeName !== wanted.nodeName) return node.replaceWith(wanted);
  if (node.nodeType === Node.TEXT_NODE) {
    if (node.data !== wanted.data) node.data = wanted.data;
    return;
  }
  for (const name of node.getAttributeNames()) if (!wanted.hasAttribute(name)) node.removeAttribute(name);
  for (const { name, value } of wanted.attributes) {
    if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  }
  show(node, [...wanted.childNodes]);
}

/** Whatever is behind the text of `node`, a text node, is added; what is there is left alone. */
export function grow(node, text) {
  if (text.length > node.length) node.appendData(text.slice(node.length));
}

/** What scrolls can be scrolled by key: it takes the focus while there is more than it shows. */
export function focusableWhereItScrolls(region) {
  const scrolls = region.scrollWidth > region.clientWidth || region.scrollHeight > region.clientHeight;
  if (scrolls) region.tabIndex = 0;
  else region.removeAttribute("tabindex");
}
