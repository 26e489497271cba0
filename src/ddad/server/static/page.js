// What htmx does not do: photographs by drop, paste and camera; the slider; keys; sentences instead of silence.
"use strict";
const find = (selector, within = document) => within.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];

// -- photographs in ---------------------------------------------------------------------------------------------------

const form = find("#capture");
const waiting = []; // lists of files: one request at a time, in order
let busy = false;

function send(files) {
  if (!files.length) return;
  if (!busy && !waiting.length) find("#message").replaceChildren();
  waiting.push([...files]);
  next();
}

function next() {
  const count = waiting.flat().length;
  find("#busy").textContent = count ? `Inspecting ${count === 1 ? "the photograph" : `${count} photographs`} …` : "";
  if (busy || !count) return;
  busy = true;
  const carrier = new DataTransfer();
  waiting[0].forEach((file) => carrier.items.add(file));
  form.elements.file.files = carrier.files;
  htmx.trigger(form, "send");
}

form.addEventListener("change", (event) => {
  if (event.target === form.elements.file) send(event.target.files);
});
form.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.elt !== form) return;
  busy = false;
  waiting.shift();
  form.elements.file.value = "";
  next();
});

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dragging");
  if (!hasFiles(event)) return;
  event.preventDefault();
  send(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => send(event.clipboardData.files));

// -- camera -----------------------------------------------------------------------------------------------------------

const live = find("#live");
const noCamera = (why) => say(`No camera can be used: ${why}`);

find("#camera-on").addEventListener("click", async () => {
  find("#message").replaceChildren();
  if (!navigator.mediaDevices) {
    noCamera("browsers allow it only on this machine's own address or over https.");
    return;
  }
  try {
    const wanted = { facingMode: "environment", width: { ideal: 1920 }, height: { ideal: 1080 } };
    live.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted });
    find("#camera").hidden = false;
    find("#camera-on").hidden = true;
    find("#shoot").focus();
  } catch (error) {
    const why = { NotFoundError: "none is connected.", NotAllowedError: "allow it in the browser's settings for this page." };
    noCamera(why[error.name] ?? `it does not answer (${error.name}).`);
  }
});
find("#camera-off").addEventListener("click", () => {
  live.srcObject.getTracks().forEach((track) => track.stop());
  live.srcObject = null;
  find("#camera").hidden = true;
  find("#camera-on").hidden = false;
  find("#camera-on").focus();
});
find("#shoot").addEventListener("click", () => {
  if (!live.videoWidth) return; // no picture has come yet
  const canvas = Object.assign(document.createElement("canvas"), { width: live.videoWidth, height: live.videoHeight });
  canvas.getContext("2d").drawImage(live, 0, 0);
  const name = `photograph ${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}.png`;
  canvas.toBlob((blob) => send([new File([blob], name, { type: "image/png" })]), "image/png");
});

// -- sentences --------------------------------------------------------------------------------------------------------

function say(sentence, place = find("#message")) {
  place.append(Object.assign(document.createElement("p"), { textContent: sentence, className: "mistake" }));
}

function complain(event, sentence) {
  const own = event.detail.elt?.dataset.errors;
  if (own) find(own).replaceChildren();
  say(sentence, own ? find(own) : undefined);
}

document.addEventListener("htmx:responseError", (event) => {
  const { status, responseText } = event.detail.xhr;
  if (status === 401) location.assign("/login"); // the token has changed
  let sentence = `The server answered with status ${status}; try again.`;
  try {
    sentence = JSON.parse(responseText).error ?? sentence;
  } catch {
    // a proxy between may answer with something else
  }
  complain(event, sentence);
});
for (const name of ["htmx:sendError", "htmx:timeout"]) {
  document.addEventListener(name, (event) => complain(event, "The server does not answer; see that it runs, and try again."));
}
document.addEventListener("htmx:oobBeforeSwap", (event) => {
  const { target, fragment } = event.detail; // said once is enough
  if (target.id === "drift" && target.textContent === fragment.textContent) event.detail.shouldSwap = false;
});

// -- the view ---------------------------------------------------------------------------------------------------------

const view = find("#view");
let kind = "reconstruction"; // stays from one inspection to the next

function arrange() {
  const wanted = find(`#kinds [value=${kind}]`);
  if (wanted) wanted.checked = true;
  const { width, height } = find(".compare", view)?.dataset ?? {};
  if (width) view.style.setProperty("--ratio", width / height);
  const shown = find("article", view)?.dataset.id;
  for (const link of all("#gallery a")) {
    if (link.dataset.id === shown) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
  for (const time of all("time")) {
    time.textContent = new Date(time.dateTime).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
  }
}

document.addEventListener("change", (event) => {
  if (event.target.name === "kind") kind = event.target.value;
});
document.addEventListener("htmx:load", arrange);
document.addEventListener("htmx:afterSwap", (event) => {
  if (event.detail.target === view) find("#announce").textContent = find("h2", view).textContent;
});
document.addEventListener("input", (event) => {
  if (event.target.id === "slider") view.style.setProperty("--cut", `${event.target.value}%`);
});
document.addEventListener("click", (event) => {
  const opener = event.target.closest("[data-open]");
  if (opener) find(`#${opener.dataset.open}`).showModal();
});
arrange();

// -- keys -------------------------------------------------------------------------------------------------------------

document.addEventListener("keydown", (event) => {
  const { key, target } = event;
  const isField = target.matches("input");
  if (event.ctrlKey || event.altKey || event.metaKey || find("dialog[open]")) return;
  if (isField && !["radio", "checkbox", "range"].includes(target.type)) return;
  if (key === "?") {
    find("#keys").showModal();
  } else if (["1", "2", "3"].includes(key)) {
    all("#kinds input")[key - 1]?.click();
  } else if (key.startsWith("Arrow") && !isField) {
    move(key, event);
  }
});

function move(key, event) {
  const links = all("#gallery a");
  const inside = links.includes(document.activeElement);
  const columns = links.filter((link) => link.offsetTop === links[0].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ...(inside && { ArrowUp: -columns, ArrowDown: columns }) }[key];
  if (!step || !links.length) return; // outside the gallery, up and down scroll the page
  event.preventDefault();
  const at = links.findIndex((link) => (inside ? link === document.activeElement : link.ariaCurrent));
  (at < 0 ? links[0] : links[at + step])?.focus();
}
