"use strict";
// What the web page does beyond HTML: times in the reader's language, news from the server, buttons, output, previews, uploads.
// The server renders everything, and this script asks it for the page again, so that nothing is drawn in two ways.

const POLL_MS = 3000, NEWS_MS = 1000; // without events: how often to ask; with them: the shortest pause between two pages
const LOG_CHARS = 1 << 20; // of an output kept on the page
const PREVIEW_BYTES = 4 << 20;
const CHOSEN_SHOWN = 200; // files of a job that is to be sent
const IMAGES = { png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", gif: "image/gif", webp: "image/webp", svg: "image/svg+xml" };
const byId = (id) => document.getElementById(id);

// -- Text: times, and signs for what cannot be seen, as page.py has them --

const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const visible = (text) => text.replace(INVISIBLE, (char) => {
  const code = char.charCodeAt(0);
  return code < 32 ? String.fromCharCode(0x2400 + code) : `⟨U+${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
});

const clock = new Intl.DateTimeFormat(undefined, { dateStyle: "short", timeStyle: "medium" });
function localize(root) {
  for (const each of root.querySelectorAll("time")) {
    each.title = each.textContent;
    each.textContent = clock.format(new Date(each.dateTime));
  }
  for (const each of root.querySelectorAll("button[data-post]")) each.hidden = false;
}

function say(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
}

function sayLive(text) {
  byId("live").textContent = text;
  byId("live").className = text === "live" ? "quiet" : "alert";
}

// -- News: the server's page again, and in it the parts that have changed --

const parts = new Map([...document.querySelectorAll("[data-live]")].map((part) => [part.id, part.innerHTML]));
let refreshing = false, again = false;

function replacePart(part, fresh) {
  const active = part.contains(document.activeElement) ? document.activeElement : null;
  const same = (each) => ["href", "data-post", "id"].every((name) => each.getAttribute(name) === active.getAttribute(name));
  const known = new Set([...part.querySelectorAll("[data-key]")].map((each) => each.dataset.key));
  for (const { name, value } of fresh.attributes) part.setAttribute(name, value);
  part.replaceChildren(...fresh.childNodes);
  for (const each of part.querySelectorAll("[data-key]")) each.classList.toggle("new", !known.has(each.dataset.key));
  localize(part);
  if (active) [...part.querySelectorAll("a, button")].find(same)?.focus({ preventScroll: true });
}

async function refresh() {
  if (refreshing) { again = true; return; }
  refreshing = true;
  try {
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (answer.status === 401) { location.reload(); return; }
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    for (const [id, before] of parts) {
      const part = byId(id), now = fresh.getElementById(id);
      if (!answer.ok || !now || now.innerHTML === before) continue;
      parts.set(id, now.innerHTML);
      replacePart(part, now);
    }
    if (answer.ok) showPhase(fresh);
    sayLive(answer.ok ? "live" : "");
  } catch {
    sayLive("The server does not answer.");
  } finally {
    refreshing = false;
    setTimeout(() => { if (again) { again = false; refresh(); } }, NEWS_MS);
    followOpen();
    listen();
  }
}

// What moves no job is no event: while something is open, as a webhook that is not delivered, ask for the page again.
let asking = 0;
function followOpen() {
  if (asking || !document.querySelector("[data-open]")) return;
  asking = setTimeout(() => { asking = 0; if (document.hidden) followOpen(); else refresh(); }, POLL_MS);
}

// A job has started, or ended: then its files and the end of its output are on the server. What was followed stays, since somebody
// reads or searches it; its stream goes on to the end, and through further attempts.
function showPhase(fresh) {
  const output = byId("output"), now = fresh.getElementById("output");
  if (!output || !now) return;
  if (output.dataset.attempt !== now.dataset.attempt) {
    output.dataset.attempt = now.dataset.attempt;
    for (const [box, source] of follows) if (!source) delete box.dataset.at; // a stream that is open tells of a new attempt itself
  }
  if ([output.dataset.phase, "waits"].includes(now.dataset.phase)) return;
  const phase = now.dataset.phase, isEmpty = (stream) => !byId(stream)?.querySelector("code")?.textContent, both = ["stdout", "stderr"];
  if (both.every(isEmpty) && !(byId("search") && now.querySelector("#search"))) {
    replaceById("output", fresh);
    startOutput();
  } else {
    for (const stream of both.filter(isEmpty)) replaceById(stream, fresh);
    output.dataset.phase = phase;
  }
  if (phase === "over") replaceById("files", fresh);
}

function replaceById(id, fresh) {
  if (!byId(id) || !fresh.getElementById(id)) return;
  for (const box of byId(id).querySelectorAll("[data-log]")) unfollow(box);
  byId(id).replaceWith(document.adoptNode(fresh.getElementById(id)));
}

// A browser makes six connections to a server without TLS, for all its tabs together, and a stream keeps one. So a page has streams
// only while it is shown; one that follows output, which takes two, asks for news. In between, and without events, it asks, too.
let news = null;
function listen() {
  const wanted = parts.size && !document.hidden;
  for (const [box, source] of follows) {
    if (document.hidden && source) { source.close(); follows.set(box, null); }
    if (!document.hidden && !source) connect(box);
  }
  if (news && (!wanted || follows.size)) { news.close(); news = null; }
  if (news || !wanted || follows.size) return;
  news = new EventSource("/changes");
  news.onopen = refresh;
  news.onmessage = refresh; // after an error the browser connects again by itself, unless the server has no place for one more listener
}

function startNews() {
  document.addEventListener("visibilitychange", () => { if (document.hidden) listen(); else refresh(); });
  window.addEventListener("pageshow", (event) => { if (event.persisted) refresh(); }); // Back shows the page as it was left
  setInterval(() => {
    const isTold = news?.readyState === EventSource.OPEN && !document.querySelector("[data-moving]"); // instances send no events
    if (!document.hidden && !isTold) refresh();
  }, POLL_MS);
  listen();
}

// -- Buttons --

// Who has signed in again, in another tab, has another session: then this page, with what is filled in, takes its CSRF token.
let signedOut = false;
async function csrfHeader() {
  const csrf = document.querySelector("meta[name=csrf]");
  if (signedOut) {
    const answer = await fetch(location.href), fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    csrf.content = fresh.querySelector("meta[name=csrf]").content;
    signedOut = false;
  }
  return [csrf.dataset.header, csrf.content];
}

function whyNot(status, message) {
  signedOut = status === 401 || status === 403;
  return status === 401 ? "You are signed out: sign in again in another tab, then try again here." : message;
}

async function send(method, url) {
  return fetch(url, { method, headers: Object.fromEntries([await csrfHeader()]) });
}

function confirmed(button) {
  const dialog = byId("question"), yes = byId("question-yes");
  for (const name of ["title", "text", "no"]) byId(`question-${name}`).textContent = button.dataset[name];
  yes.textContent = button.textContent;
  yes.className = button.className || "main";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true }));
}

async function press(button) {
  const { post, title, then } = button.dataset;
  if (title && !await confirmed(button)) return;
  button.disabled = true;
  say("");
  try {
    const answer = await send("POST", post), said = await answer.json();
    if (!answer.ok && answer.status !== 409) say(whyNot(answer.status, said.message));
    else if (then) { location.href = then.replace("{id}", said.id); return; }
  } catch {
    say("The server does not answer: try again.");
  }
  button.disabled = false;
  refresh();
}

// -- Output: followed while the job runs, and searched --

const follows = new Map(); // streams by their boxes; null while there is none
function follow(box) {
  box.firstElementChild.dataset.empty = "nothing yet";
  follows.set(box, null);
}

function unfollow(box) {
  follows.get(box)?.close();
  follows.delete(box);
}

function connect(box) {
  const source = new EventSource(box.dataset.log + (box.dataset.at ? `&offset=${box.dataset.at}` : "")), code = box.firstElementChild;
  follows.set(box, source);
  source.onmessage = (event) => {
    const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 40;
    const text = code.textContent + visible(event.data);
    code.textContent = text.length > LOG_CHARS ? text.slice(-LOG_CHARS) : text;
    box.dataset.at = event.lastEventId;
    if (atEnd) box.scrollTop = box.scrollHeight;
    if (byId("search-text").value) search(0, false);
  };
  source.onerror = () => { if (source.readyState === EventSource.CLOSED && follows.has(box)) follows.set(box, null); }; // `listen` tries again
  source.addEventListener("end", () => { unfollow(box); refresh(); });
}

let found = [], at = -1;
function search(step, show = true) {
  const wanted = byId("search-text").value.toLowerCase();
  for (const code of document.querySelectorAll("#output code")) {
    const text = code.textContent, lower = text.toLowerCase(), pieces = [];
    let from = 0;
    for (let hit = wanted ? lower.indexOf(wanted) : -1; hit >= 0 && pieces.length < 2000; hit = lower.indexOf(wanted, from)) {
      const mark = document.createElement("mark");
      mark.textContent = text.slice(hit, hit + wanted.length);
      pieces.push(text.slice(from, hit), mark);
      from = hit + wanted.length;
    }
    if (pieces.length || code.children.length) code.replaceChildren(...pieces, text.slice(from));
  }
  found = [...document.querySelectorAll("#output mark")];
  at = found.length ? (Math.max(at, 0) + step + found.length) % found.length : -1;
  byId("search-count").textContent = !wanted ? "" : found.length ? `${at + 1} of ${found.length}` : "not found";
  if (show && found.length) showHit(found[at], found[at].closest("pre"));
  found[at]?.classList.add("here");
  if (show && !wanted) for (const box of document.querySelectorAll("[data-log]")) box.scrollTop = box.scrollHeight; // back to the end
}

function showHit(mark, box) {
  box.scrollTop += mark.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 2;
  mark.scrollIntoView({ block: "nearest" });
}

function startOutput() {
  for (const box of document.querySelectorAll("[data-log]")) {
    box.scrollTop = box.scrollHeight;
    if (!("over" in box.dataset)) follow(box);
  }
  if (!byId("search")) return;
  byId("search").hidden = false;
  byId("search-text").addEventListener("input", () => { at = -1; search(0); });
  byId("search-text").addEventListener("keydown", (event) => { if (event.key === "Enter") search(event.shiftKey ? -1 : 1); });
  byId("search-previous").addEventListener("click", () => search(-1));
  byId("search-next").addEventListener("click", () => search(1));
}

// -- Files: text and images shown on the page; everything else is downloaded --

async function preview(link) {
  const name = link.textContent, kind = IMAGES[name.split(".").pop().toLowerCase()];
  say("");
  let shown;
  try {
    const answer = await fetch(link.href);
    if (!answer.ok) throw new Error((await answer.json()).message);
    const bytes = await answer.arrayBuffer();
    shown = kind ? picture(name, new Blob([bytes], { type: kind })) : textOf(bytes);
  } catch (error) {
    say(`${name} cannot be read now: ${error instanceof TypeError ? "the server does not answer" : error.message}.`);
    return;
  }
  byId("preview").hidden = !shown;
  if (!shown) { location.href = link.href; return; } // the browser saves it
  byId("preview-name").textContent = name;
  byId("preview-content").replaceChildren(shown);
  byId("preview").focus();
  byId("preview").scrollIntoView({ block: "nearest" });
}

function picture(name, content) {
  const shown = document.createElement("img");
  shown.alt = name;
  shown.src = URL.createObjectURL(content);
  shown.addEventListener("load", () => byId("preview").scrollIntoView({ block: "nearest" }));
  shown.addEventListener("error", () => shown.replaceWith(note("It is no picture that a browser can show.")));
  return shown;
}

function textOf(bytes) {
  if (!bytes.byteLength) return note("It is empty.");
  const shown = document.createElement("pre");
  try { shown.textContent = visible(new TextDecoder("utf-8", { fatal: true }).decode(bytes)); } catch { return null; }
  shown.tabIndex = 0;
  return shown;
}

function note(text) {
  const shown = document.createElement("p");
  shown.className = "quiet";
  shown.textContent = text;
  return shown;
}

// -- Submit: files or a folder, dropped or chosen; the folder's own name is left out --

const chosen = new Map(); // by path
async function entriesOf(entry, path) {
  if (entry.isFile) return [[path + entry.name, await new Promise((resolve, reject) => entry.file(resolve, reject))]];
  const reader = entry.createReader(), all = [];
  for (let some; (some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject))).length;) all.push(...some);
  return (await Promise.all(all.map((each) => entriesOf(each, `${path}${entry.name}/`)))).flat();
}

function choose(files) {
  const tops = new Set(files.map(([path]) => path.includes("/") ? path.slice(0, path.indexOf("/") + 1) : ""));
  const [top] = tops.size === 1 ? tops : [""];
  for (const [path, file] of files) chosen.set(path.slice(top.length), file);
  showChosen();
}

const sizeText = (bytes) => bytes < 1024 ? `${bytes} bytes` : `${(bytes / 1024).toLocaleString(undefined, { maximumFractionDigits: 1 })} KiB`;
function showChosen() {
  const files = [...chosen].sort(([one], [other]) => one < other ? -1 : 1), total = files.reduce((sum, [, file]) => sum + file.size, 0);
  const more = files.length > CHOSEN_SHOWN ? `; the first ${CHOSEN_SHOWN} of them` : "";
  byId("chosen-count").textContent = files.length > 1 ? `${files.length.toLocaleString()} files, ${sizeText(total)}${more}:` : "";
  byId("chosen").replaceChildren(...files.slice(0, CHOSEN_SHOWN).map(([path, file]) => {
    const item = document.createElement("li"), name = document.createElement("bdi"), drop = document.createElement("button");
    name.textContent = visible(path);
    drop.type = "button";
    drop.className = "link";
    drop.textContent = "remove";
    drop.setAttribute("aria-label", `remove ${path}`);
    drop.addEventListener("click", () => { chosen.delete(path); showChosen(); });
    item.append(name, ` ${sizeText(file.size)} `, drop);
    return item;
  }));
  byId("own-script").hidden = chosen.has("run.sh");
}

// Errors of the API say how curl sends a field; here a form is filled in.
const inTheForm = (text) => text
  .replace("have it done by the field crlf=fix", "choose “change them to LF” at Line ends, under More")
  .replace(/, as in -F .*/s, "");

function showError(text, field) {
  const details = field?.closest("details");
  if (details) details.open = true;
  say(text);
  field?.focus();
}

function sendJob(form) {
  const body = new FormData(), script = byId("script").value;
  if (!chosen.has("run.sh") && !script.trim()) {
    const start = chosen.size ? "No file is called run.sh: add one" : "There is no script: choose run.sh";
    showError(`${start}, or write the script below.`, byId("script"));
    return;
  }
  for (const [name, value] of new FormData(form)) if (typeof value === "string" && value) body.append(name, value);
  if (!chosen.has("run.sh") && script) body.append("file", new Blob([script]), "run.sh");
  for (const [path, file] of chosen) body.append("file", file, path);
  const call = new XMLHttpRequest();
  const over = () => showSending(form, false);
  call.open("POST", form.action);
  call.responseType = "json";
  call.upload.onprogress = ({ loaded, total }) => {
    byId("progress").value = 100 * loaded / total;
    byId("progress-text").textContent = `${Math.round(100 * loaded / total)} %`;
  };
  call.onload = () => {
    if (call.status === 201) { location.href = `/dashboard/jobs/${call.response.id}`; return; }
    over();
    const { message = `The server answered with status ${call.status}.`, field } = call.response ?? {};
    showError(inTheForm(whyNot(call.status, message)), byId(`field-${field}`));
  };
  call.onerror = () => { over(); say("The server does not answer: try again."); };
  say("");
  showSending(form, true);
  csrfHeader().then((csrf) => { call.setRequestHeader(...csrf); call.send(body); }, call.onerror);
}

function showSending(form, sending) {
  form.querySelector("button.main").disabled = sending;
  byId("progress-label").hidden = !sending;
}

function startSubmit(form) {
  const drop = byId("drop");
  form.hidden = false;
  for (const name of ["files", "folder"]) {
    byId(name).addEventListener("change", (event) => {
      choose([...event.target.files].map((file) => [file.webkitRelativePath || file.name, file]));
      event.target.value = "";
    });
  }
  // Anywhere on the page: what is dropped beside the frame would be opened in place of the form.
  const hasFiles = (event) => event.dataTransfer.types.includes("Files");
  for (const name of ["dragenter", "dragover"]) {
    document.addEventListener(name, (event) => { if (hasFiles(event)) { event.preventDefault(); drop.classList.add("over"); } });
  }
  for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => drop.classList.remove("over"));
  document.addEventListener("drop", async (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    try {
      choose((await Promise.all(entries.map((entry) => entriesOf(entry, "")))).flat());
    } catch (error) {
      say(`What was dropped cannot be read: ${error.message}`);
    }
  });
  form.addEventListener("submit", (event) => { event.preventDefault(); sendJob(form); });
  window.addEventListener("pageshow", () => showSending(form, false)); // Back shows the page as it was left
  for (const field of form.querySelectorAll("[pattern]")) {
    field.addEventListener("invalid", () => { if (field.validity.patternMismatch) field.setCustomValidity(`${field.title}.`); });
    field.addEventListener("input", () => field.setCustomValidity(""));
  }
}

// -- Filters: folded on a narrow screen, unless something is wrong with them --

function startFold(fold) {
  const narrow = window.matchMedia("(max-width: 599.98px)");
  const set = () => { fold.open = !narrow.matches || Boolean(document.querySelector("main > .alert")); };
  narrow.addEventListener("change", set);
  set();
}

// -- Start --

localize(document);
document.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-post]"), link = event.target.closest("a[data-file]");
  if (button) press(button);
  if (link && Number(link.dataset.size) <= PREVIEW_BYTES && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    preview(link);
  }
});
if (byId("submit")) startSubmit(byId("submit"));
startOutput();
if (parts.size) startNews();
for (const fold of document.querySelectorAll(".fold")) startFold(fold);
