// Keeps the page as the server draws it: parts of HTML arrive once a second, and only what differs in them is changed, so
// that focus, selection and what a screen reader has said stay as they are.
"use strict";

const LOST_AFTER = 4000; // ms without anything
const BEGIN_AGAIN_AFTER = 12000; // a connection may be dead without an error
const POLL_AFTER = 2000;
const POLLS = 2; // before it asks for a stream again: as long as a refusal says (Retry-After)
const PARTS = ["about", "verdict", "fleet", "lag", "writes"];
let heard = Date.now();
let begun = Date.now();
let refused = false;
let stream;

function connect() {
  begun = Date.now();
  stream = new EventSource("page/events");
  stream.onmessage = (event) => {
    refused = false;
    show(JSON.parse(event.data));
  };
  stream.onerror = () => {
    // What ends is begun again by the browser; what is refused is not.
    if (stream.readyState === EventSource.CLOSED) poll();
  };
}

// Loads the page again and again, until it is time to ask for a stream.
async function poll() {
  for (let left = POLLS; left > 0; left--) {
    await new Promise((done) => setTimeout(done, POLL_AFTER));
    if (!(await load())) break;
  }
  connect();
}

async function load() {
  try {
    const answer = await fetch(".", { signal: AbortSignal.timeout(LOST_AFTER) });
    if (!answer.ok) return false;
    const drawn = new DOMParser().parseFromString(await answer.text(), "text/html");
    const parts = Object.fromEntries(PARTS.map((id) => [id, drawn.getElementById(id).innerHTML]));
    refused = true;
    show({ title: drawn.title, level: drawn.documentElement.dataset.level, parts });
    return true;
  } catch {
    return false;
  }
}

function show(view) {
  heard = Date.now();
  document.title = view.title;
  const root = document.documentElement;
  if (root.dataset.level !== view.level) {
    root.dataset.level = view.level;
    document.querySelector("link[rel=icon]").href = `page/${view.level}.svg`;
  }
  for (const [id, markup] of Object.entries(view.parts)) {
    const drawn = new DOMParser().parseFromString(markup, "text/html").body;
    agree(document.getElementById(id), drawn);
  }
  told();
}

// Makes the children of `here` those of `there`.
function agree(here, there) {
  const kept = new Map();
  for (const child of here.children) if (child.dataset.key) kept.set(child.dataset.key, child);
  let next = here.firstChild;
  for (const wanted of [...there.childNodes]) {
    const key = wanted.dataset && wanted.dataset.key;
    let found = key ? kept.get(key) : next;
    if (found && !key && found.dataset && found.dataset.key) found = null;
    if (found && found.nodeType === wanted.nodeType && found.nodeName === wanted.nodeName) {
      if (found !== next) here.insertBefore(found, next);
      else next = next.nextSibling;
      become(found, wanted);
    } else {
      here.insertBefore(document.importNode(wanted, true), next);
    }
  }
  while (next) {
    const gone = next;
    next = next.nextSibling;
    gone.remove();
  }
}

function become(here, wanted) {
  if (here.nodeType !== Node.ELEMENT_NODE) {
    if (here.data !== wanted.data) here.data = wanted.data;
    return;
  }
  for (const { name, value } of wanted.attributes) {
    if (here.getAttribute(name) !== value) here.setAttribute(name, value);
  }
  for (const { name } of [...here.attributes]) if (!wanted.hasAttribute(name)) here.removeAttribute(name);
  agree(here, wanted);
}

// A page that shows what was, and not what is, says so.
function told() {
  const lost = Date.now() - heard > LOST_AFTER;
  document.documentElement.classList.toggle("lost", lost);
  const since = new Date(heard).toISOString().slice(11, 19);
  let words = "";
  if (refused) words = `Too many look at this page already, or something on the way refuses its stream: it is loaded again every ${POLL_AFTER / 1000} s instead.`;
  if (lost) words = `This page has heard nothing from its server since ${since} UTC: what is below is as of then.`;
  const live = document.getElementById("live");
  if (live.textContent !== words) live.textContent = words;
}

function look() {
  told();
  if (stream.readyState !== EventSource.CLOSED && Date.now() - Math.max(heard, begun) > BEGIN_AGAIN_AFTER) {
    stream.close();
    connect();
  }
}

setInterval(look, 1000);
connect();
