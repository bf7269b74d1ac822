// Shows one pair after the other. Texts are set as text and never as HTML, since a completion is hostile input.
"use strict";

const $ = (id) => document.getElementById(id);
const base = location.pathname.replace(/\/$/, "");
const KEYS = { ArrowLeft: "left", ArrowRight: "right", t: "tie", b: "bad", s: "skip" };
let pair = null; // what is shown, or null when nothing is left
let busy = false;
let marked = false;

function say(text, isError = false) {
  $("message").textContent = text;
  $("message").className = isError ? "error" : "";
}

function show(state) {
  pair = state.done ? null : state;
  marked = false;
  $("diff").setAttribute("aria-pressed", "false");
  $("who").textContent = state.name;
  $("progress").textContent = `${state.mine} by you, ${state.labelled} of ${state.wanted} labels in all`;
  $("bar").max = Math.max(1, state.wanted);
  $("bar").value = state.labelled;
  $("guidelines").hidden = !state.guidelines;
  $("guidelines-text").textContent = state.guidelines || "";
  $("done").hidden = !state.done;
  $("done").textContent = state.done || "";
  $("sides").hidden = $("prompt").hidden = Boolean(state.done);
  for (const button of document.querySelectorAll("[data-choice], #diff")) button.disabled = Boolean(state.done);
  $("undo").disabled = !state.can_undo;
  if (state.done) return;
  $("prompt").replaceChildren(...state.prompt.flatMap(turn));
  for (const side of ["left", "right"]) {
    $(side).textContent = state[side].text;
    $(`${side}-cut`).hidden = !state[side].truncated;
  }
  scrollTo(0, 0);
}

function turn({ role, content }) {
  const [name, text] = [document.createElement("div"), document.createElement("p")];
  [name.className, text.className] = ["role", "turn"];
  [name.textContent, text.textContent] = [role, content];
  return role ? [name, text] : [text];
}

async function request(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const answer = await fetch(base + path, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error || `the server answered ${answer.status}`);
  return content;
}

async function act(path, body, said) {
  if (busy) return;
  busy = true;
  try {
    show(await request(path, body));
    say(said);
  } catch (error) {
    const lost = error instanceof TypeError ? "the server does not answer; try again" : error.message;
    say(`Not saved: ${lost}`, true);
  } finally {
    busy = false;
  }
}

const label = (choice) => pair && act("/label", { token: pair.token, choice }, `saved: ${choice}`);
const undo = () => $("undo").disabled || act("/undo", {}, "the last label is taken back");

async function differences() {
  if (!pair) return;
  const wanted = !marked;
  const shown = pair;
  const found = wanted ? await request(`/diff?token=${encodeURIComponent(shown.token)}`).catch((e) => say(e.message, true)) : {};
  if (!found || shown !== pair) return;
  for (const side of ["left", "right"]) {
    const parts = wanted ? found[side] : [[shown[side].text, false]];
    $(side).replaceChildren(...parts.map(([text, differs]) => {
      const part = document.createElement(differs ? "mark" : "span");
      part.textContent = text;
      return part;
    }));
  }
  marked = wanted;
  $("diff").setAttribute("aria-pressed", String(marked));
}

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey) return;
  if (KEYS[event.key]) label(KEYS[event.key]);
  else if (event.key === "u") undo();
  else if (event.key === "d") differences();
  else return;
  event.preventDefault();
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => { button.blur(); label(button.dataset.choice); });
}
$("undo").addEventListener("click", undo);
$("diff").addEventListener("click", differences);
act("/next", undefined, "");
