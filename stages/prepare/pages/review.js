"use strict";
// Decisions are kept by the digest of a sample's content: earlier ones came with the page, `own` are those made in this
// browser and win. Nothing of a sample's text is ever read as markup.
const main = document.querySelector("main");
const samples = [...main.querySelectorAll(".sample")];
const get = (id) => document.getElementById(id);
const filters = ["reason", "dataset", "verdict"].map(get);
const earlier = JSON.parse(main.dataset.earlier);
const place = "stageline-review:" + main.dataset.mixture;
const VERDICTS = ["keep", "drop", "undecided"];
let own = {}, lasting = true, unsaved = false, current = 0;

function isVerdicts(value) {
  return value !== null && typeof value === "object" && Object.entries(value).every(
    ([key, verdict]) => /^[0-9a-f]{16}$/.test(key) && VERDICTS.includes(verdict));
}

function recall() {
  try {
    const kept = JSON.parse(localStorage.getItem(place) ?? "{}");
    if (isVerdicts(kept)) own = { ...own, ...kept };
  } catch (error) {
    forgetful();
  }
}

function keep() {
  try {
    localStorage.setItem(place, JSON.stringify(own));
  } catch (error) {
    forgetful();
  }
}

function forgetful() { // storage is off, full, or damaged
  lasting = false;
  get("problem").textContent = "This browser keeps no decisions: save the verdicts before you leave.";
}

const verdictOf = (key) => own[key] ?? earlier[key] ?? "undecided";

function show() {
  for (const sample of samples) {
    sample.querySelector(`input[value="${verdictOf(sample.dataset.key)}"]`).checked = true;
  }
  const given = samples.map((sample) => verdictOf(sample.dataset.key));
  const keep = given.filter((verdict) => verdict === "keep").length;
  const drop = given.filter((verdict) => verdict === "drop").length;
  get("progress").value = keep + drop;
  get("count").textContent = `${keep + drop} of ${samples.length} decided: ${keep} keep, ${drop} drop`;
}

function filter() {
  const [reason, dataset, verdict] = filters.map((select) => select.value);
  for (const sample of samples) {
    const data = sample.dataset;
    sample.hidden = (reason && data.reason !== reason) || (dataset && data.dataset !== dataset)
      || (verdict && verdictOf(data.key) !== verdict);
  }
  current = Math.max(0, samples.findIndex((sample) => !sample.hidden));
  get("none").hidden = samples.some((sample) => !sample.hidden);
}

function decide(decisions) {
  recall(); // another tab may have decided meanwhile
  own = { ...own, ...decisions };
  unsaved = true;
  keep();
  show();
}

function move(by) {
  let next = current + by;
  while (samples[next]?.hidden) next += by;
  if (!samples[next]) return;
  current = next;
  samples[next].focus({ preventScroll: true });
  samples[next].scrollIntoView({ block: "start" });
}

function save() {
  const verdicts = {};
  for (const key of [...new Set([...Object.keys(earlier), ...Object.keys(own)])].sort()) {
    if (verdictOf(key) !== "undecided") verdicts[key] = verdictOf(key);
  }
  const text = JSON.stringify({ version: 1, mixture: main.dataset.mixture, verdicts }, null, 1) + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = "verdicts.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  unsaved = false;
}

async function load(file) {
  let read = null;
  try {
    read = JSON.parse(await file.text());
  } catch (error) {
    read = null;
  }
  const whole = read?.version === 1 && isVerdicts(read.verdicts);
  get("problem").textContent = whole ? "" : `${file.name} is not a file of verdicts that this page saved.`;
  if (whole) decide(read.verdicts);
}

main.addEventListener("change", (event) => {
  const input = event.target;
  if (input.type === "radio") decide({ [input.closest(".sample").dataset.key]: input.value });
  if (filters.includes(input)) filter();
  if (input.id === "load" && input.files.length) load(input.files[0]).then(() => { input.value = ""; });
});
main.addEventListener("focusin", (event) => {
  const sample = event.target.closest(".sample");
  if (sample) current = samples.indexOf(sample);
});
main.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
get("save").addEventListener("click", save);
addEventListener("storage", (event) => { if (event.key === place) { recall(); show(); } });
addEventListener("beforeunload", (event) => { if (unsaved && !lasting) event.preventDefault(); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  const verdict = { k: "keep", d: "drop", u: "undecided" }[event.key];
  if (verdict && samples[current] && !samples[current].hidden) {
    decide({ [samples[current].dataset.key]: verdict });
    if (verdict === "undecided") return;
  }
  if (verdict || event.key === "n") move(1);
  if (event.key === "p") move(-1);
});

recall();
show();
const bar = main.querySelector(".bar");
document.documentElement.style.setProperty("--bar", `${bar.offsetHeight + 8}px`);
for (const turns of main.querySelectorAll(".turns")) { // the first mark is seen without scrolling
  const mark = turns.querySelector("mark");
  if (mark) turns.scrollTop = Math.max(0, mark.offsetTop - turns.clientHeight / 3);
}
