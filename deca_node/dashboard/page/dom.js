// Making and updating elements. Text only ever goes in as text: what nodes tell is hostile.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-")) element.setAttribute(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const $ = (id) => document.getElementById(id);

export const make = (name, attributes = {}, ...children) =>
  fill(document.createElement(name), attributes, children);

export const draw = (name, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, name), attributes, children);

// Set what differs, so that nothing is laid out anew for nothing and selections stay.
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function attr(element, name, value) {
  if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

// One child an item, in order; children are kept from one call to the next by their key. Items of
// one key have a child each.
export function sync(parent, items, key, create, update) {
  const old = new Map();
  for (const child of parent.children) {
    if (!old.has(child.dataset.key)) old.set(child.dataset.key, []);
    old.get(child.dataset.key).push(child);
  }
  let place = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let child = old.get(name)?.shift();
    if (!child) {
      child = create(item);
      child.dataset.key = name;
    }
    update(child, item);
    if (child === place) place = place.nextElementSibling;
    else parent.insertBefore(child, place);
  }
  for (const child of [...old.values()].flat()) child.remove();
}

// The one tooltip of the page.
export function showTip(x, y, ...content) {
  const tip = $("tip");
  tip.replaceChildren(...content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const right = document.documentElement.clientWidth - 8;
  const left = x + 16 + width > right ? x - 16 - width : x + 16;
  tip.style.left = `${Math.max(8, Math.min(left, right - width))}px`;
  const top = y + 16 + height > window.innerHeight - 8 ? y - 16 - height : y + 16;
  tip.style.top = `${Math.max(8, top)}px`;
}

export function hideTip() {
  $("tip").hidden = true;
}
