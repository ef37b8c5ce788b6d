// The page around the charts. All text comes in as text: nothing of a run is ever read as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const { runs } = data;
const $ = (id) => document.getElementById(id);

function make(parent, name, className, text) {
  const node = parent.appendChild(document.createElement(name));
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

const colour = (node, number) => node.style.setProperty("--colour", `var(--run-${number % 8})`);

function stored(key, value) {
  try {
    if (value !== undefined) localStorage.setItem(key, value);
    return localStorage.getItem(key);
  } catch {
    return null; // a page from a disk may have no storage
  }
}

// What is known of metrics: [group, title, about, scale].
const METRICS = {
  fm_loss: ["Loss", "Flow-matching loss", "Weighted error of the velocity"],
  sc_loss: ["Loss", "Consistency loss", "As it enters the gradient; it may be below 0"],
  fm_mse: ["Loss", "Flow-matching error", "Mean squared error of the velocity, unweighted"],
  sc_mse: ["Quotient", "Mean q²", "Mean square of the consistency quotient: rounding makes it large"],
  q_cosine: ["Quotient", "q cosine", "Cosine of the quotient with its float32 value: 1 is exact", "linear"],
  fm_weight: ["Optimiser", "Weight, flow matching", "Mean adaptive weight of its samples"],
  sc_weight: ["Quotient", "Weight, consistency", "Mean adaptive weight of its samples: it fades as q² grows"],
  grad_norm: ["Optimiser", "Gradient norm", "Before clipping"],
  lr: ["Optimiser", "Learning rate", "", "linear"],
  images_per_s: ["Speed and memory", "Throughput", "Images per second", "linear"],
  memory_mb: ["Speed and memory", "Peak memory", "MB, of 10⁶ bytes", "linear"],
};
const GROUPS = ["Loss", "Quotient", "Evaluation", "Optimiser", "Speed and memory", "More"];
const KEPT = new Set(["seconds"]);

// A run of MeanFlow has its own loss and error under the names of the consistency loss and of q².
const MEANFLOW = {
  sc_loss: ["Loss", "MeanFlow loss", "As it enters the gradient"],
  sc_mse: ["Quotient", "Mean error²", "Mean squared error of MeanFlow’s identity, unweighted"],
  sc_weight: ["Quotient", "Weight, MeanFlow", "Mean adaptive weight of its samples"],
};
const objectives = new Set(runs.map(({ objective }) => objective));
if (objectives.has("meanflow")) {
  for (const [name, [group, title, about]] of Object.entries(MEANFLOW)) {
    METRICS[name] = objectives.has("soflow") ? [group, `${METRICS[name][1]}; ${title}`, "By the objective of each run"] : [group, title, about];
  }
}

function meta(name) {
  if (Object.hasOwn(METRICS, name)) {
    const [group, title, about, scale] = METRICS[name];
    return { group, title, about, scale };
  }
  const group = /^eval[/_.]./.test(name) ? "Evaluation" : /loss|mse/.test(name) ? "Loss" : "More";
  if (group === "Evaluation") {
    const [, figure, calls] = /^eval[/_.]?(.*?)(?:_nfe(\d+))?$/s.exec(name);
    return { group, title: figureTitle(`${calls || 1}.${figure}`), about: "" };
  }
  return { group, title: name.replaceAll("_", " "), about: "" };
}

const FIGURES = { accuracy: "Classified as their label", frechet: "Fréchet distance", near_copies: "Near copies", fid: "FID", sfid: "sFID", is: "Inception Score", kid: "KID", precision: "Precision", recall: "Recall", "fd-dinov2": "FD-DINOv2" };

function figureTitle(name) {
  const [, calls, rest] = /^(?:(\d+)\.)?(.+)$/s.exec(name) || [name, undefined, name];
  const words = rest.replaceAll(/[_.]/g, " ");
  const title = Object.hasOwn(FIGURES, rest) ? FIGURES[rest] : words.charAt(0).toUpperCase() + words.slice(1);
  return calls ? `${title}, ${calls} call${calls === "1" ? "" : "s"}` : title;
}

function figureText(value) {
  if (typeof value === "string") return value;
  return Number.isInteger(value) ? value.toLocaleString("en") : short(value);
}

function theme() {
  const set = (value) => {
    if (value === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = value;
  };
  const inputs = [...document.querySelectorAll("#theme input")];
  const before = inputs.find(({ value }) => value === stored("soflow-gallery-theme"));
  if (before) {
    before.checked = true;
    set(before.value);
  }
  for (const input of inputs) {
    input.addEventListener("change", () => {
      set(input.value);
      stored("soflow-gallery-theme", input.value);
    });
  }
}

function header() {
  $("title").textContent = runs.length < 4 ? runs.map(({ name }) => name).join(" · ") : `${runs.length} runs`;
  $("made").textContent = data.made;
}

function overview() {
  runs.forEach((run, number) => {
    const card = make($("overview"), "article", "card run");
    colour(card, number);
    const head = make(card, "div", "head");
    make(head, "h3", "", run.name);
    make(head, "span", run.status === "training now" ? "pill now" : "pill", run.status);
    if (run.steps) make(make(card, "div", "meter"), "i").style.width = `${Math.min(100, (100 * run.step) / run.steps)}%`;
    make(card, "p", "note", `Step ${run.step.toLocaleString("en")}${run.steps ? ` of ${run.steps.toLocaleString("en")}` : ""}, ${spoken(run.seconds)} of training`);
    const figures = make(card, "div", "figures");
    const figure = (value, title) => {
      const box = make(figures, "div");
      make(box, "b", "", value);
      make(box, "span", "", title);
    };
    run.figures.filter(([name]) => /^\d+\./.test(name)).slice(0, 2).forEach(([name, value]) => figure(figureText(value), figureTitle(name)));
    const speed = run.curves.images_per_s;
    if (speed && speed.mean.length) {
      const sorted = speed.mean.slice().sort((a, b) => a - b);
      figure(short(Number(quantile(sorted, 0.5).toPrecision(3))), "images/s, median");
    }
    const list = make(card, "dl");
    for (const [name, value] of run.facts) {
      make(list, "dt", "", name);
      make(list, "dd", "", value);
    }
    for (const note of run.notes) make(card, "p", "note", note);
  });
}

function samples() {
  const steps = [...new Set(runs.flatMap(({ grids }) => grids.map(({ step }) => step)))].sort((a, b) => a - b);
  if (!steps.length) return;
  $("samples").hidden = false;
  const shown = runs.map((run, number) => ({ run, number })).filter(({ run }) => run.grids.length);
  $("grids").classList.toggle("single", shown.length === 1);
  const views = shown.map(({ run, number }) => {
    const box = make($("grids"), "figure");
    colour(box, number);
    const caption = make(box, "figcaption");
    make(caption, "b", "", run.name);
    const at = make(caption, "span");
    const button = make(box, "button");
    button.type = "button";
    const image = make(button, "img");
    image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < 700));
    button.addEventListener("click", () => enlarge(image, `${run.name}, ${at.textContent}`));
    return { run, image, at };
  });
  const slider = $("time");
  slider.max = steps.length - 1;
  slider.value = steps.length - 1;
  const show = () => {
    const step = steps[Number(slider.value)];
    const text = `step ${step.toLocaleString("en")}`;
    $("time-text").textContent = text;
    slider.setAttribute("aria-valuetext", text);
    for (const { run, image, at } of views) {
      const before = run.grids.filter((grid) => grid.step <= step);
      const grid = before.length ? before[before.length - 1] : run.grids[0];
      if (image.src !== grid.uri) image.src = grid.uri;
      at.textContent = `step ${grid.step.toLocaleString("en")}`;
      image.alt = `Samples of ${run.name} at step ${grid.step}`;
    }
  };
  slider.addEventListener("input", show);
  show();
  let timer = 0;
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    $("play").textContent = "Play";
    $("play").setAttribute("aria-pressed", "false");
  };
  $("play").addEventListener("click", () => {
    if (timer) return stop();
    if (Number(slider.value) === steps.length - 1) slider.value = 0;
    show();
    $("play").textContent = "Pause";
    $("play").setAttribute("aria-pressed", "true");
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === steps.length - 1) stop();
    }, 350);
  });
  slider.addEventListener("pointerdown", stop);
  $("play").hidden = steps.length < 2;
  slider.disabled = steps.length < 2;
}

function enlarge(image, text) {
  const dialog = $("large"), large = dialog.querySelector("img");
  large.src = image.src;
  large.alt = image.alt;
  large.classList.toggle("pixels", image.classList.contains("pixels"));
  dialog.querySelector("p").textContent = text;
  dialog.showModal();
}

function strip(parent, title, times, rows) {
  if (!rows.length) return;
  const box = make(parent, "div", "strip");
  make(box, "p", "", title);
  const way = make(box, "div", "way");
  const longest = Math.min(12, Math.max(2, ...rows.map(([name]) => name.length)));
  way.style.gridTemplateColumns = `${longest + 1}ch repeat(${times.length}, minmax(0, 1fr))`;
  for (const [name, images] of rows) {
    make(way, "span", "name", name);
    images.forEach((uri, k) => {
      const image = make(way, "img");
      image.src = uri;
      image.alt = `${name}, s = ${times[k]}`;
      image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < 48));
    });
  }
  make(way, "span", "name", "s");
  times.forEach((s) => make(way, "span", "s", String(s)));
}

function ways() {
  runs.forEach((run, number) => {
    if (!run.ways) return;
    $("ways").hidden = false;
    const box = make($("wayruns"), "div", "wayrun");
    colour(box, number);
    const { times, by_label: labels, by_seed: seeds, label, step, solves } = run.ways;
    make(box, "h3", "", run.name + (step ? `, step ${step.toLocaleString("en")}` : ""));
    make(box, "p", "note", solves ? "f(x₁, 1, s): each call goes from the noise straight to time s." : "Euler’s steps along the velocity: each call goes on from the picture before.");
    const strips = make(box, "div", "strips");
    strip(strips, "One noise, several labels", times, labels);
    strip(strips, label ? `Several noises, label ${label}` : "Several noises", times, seeds);
  });
}

function figureTable() {
  const names = [...new Set(runs.flatMap(({ figures }) => figures.map(([name]) => name)))];
  if (!names.length) return;
  $("figures").hidden = false;
  const table = $("figure-table");
  headRow(table, "", runs);
  const body = make(table, "tbody");
  for (const name of names) {
    const row = make(body, "tr");
    make(row, "th", "", figureTitle(name));
    for (const run of runs) {
      const found = run.figures.find(([key]) => key === name);
      make(row, "td", "", found ? figureText(found[1]) : "–");
    }
  }
}

function headRow(table, first, columns) {
  const row = make(make(table, "thead"), "tr");
  make(row, "th", "", first);
  columns.forEach((run, number) => colour(make(row, "th", "", run.name), number));
}

function curves() {
  const shared = { axis: "steps", smooth: 0.8, hidden: new Set(), several: runs.length > 1 };
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].filter((name) => !KEPT.has(name));
  const order = Object.keys(METRICS);
  names.sort((a, b) => (order.indexOf(a) + 1 || 99) - (order.indexOf(b) + 1 || 99) || (a < b ? -1 : 1));
  const charts = [];
  for (const group of GROUPS) {
    const own = names.filter((name) => meta(name).group === group);
    if (!own.length) continue;
    make($("groups"), "h4", "", group);
    const box = make($("groups"), "div", "charts");
    for (const name of own) {
      const lines = runs.map((run, number) => ({ run, number, curve: Object.hasOwn(run.curves, name) ? run.curves[name] : null }));
      charts.push(new Chart(box, name, meta(name), lines.filter(({ curve }) => curve), shared));
    }
  }
  if (!charts.length) make($("groups"), "p", "note", "There are no numbers yet.");
  const redraw = () => charts.forEach((chart) => chart.draw());
  if (runs.length > 1) {
    runs.forEach((run, number) => {
      const chip = make($("chips"), "label", "chip");
      colour(chip, number);
      const box = make(chip, "input");
      box.type = "checkbox";
      box.checked = true;
      make(chip, "span", "", run.name);
      box.addEventListener("change", () => {
        if (box.checked) shared.hidden.delete(number);
        else shared.hidden.add(number);
        redraw();
      });
    });
  }
  for (const input of document.querySelectorAll("#axis input")) {
    input.addEventListener("change", () => {
      shared.axis = input.value;
      redraw();
    });
  }
  const smooth = () => {
    shared.smooth = Number($("smooth").value);
    $("smooth-text").textContent = shared.smooth.toFixed(2);
  };
  $("smooth").addEventListener("input", () => {
    smooth();
    redraw();
  });
  smooth();
  redraw();
}

function configuration() {
  if (!data.config.length) return;
  $("configuration").hidden = false;
  const fill = (table, rows) => {
    headRow(table, "Field", runs);
    const body = make(table, "tbody");
    for (const { name, values, differs } of rows) {
      const row = make(body, "tr", differs && rows === data.config ? "differs" : "");
      make(make(row, "th"), "code", "", name);
      for (const value of values) make(make(row, "td"), "code", "", value || "–");
    }
  };
  const differing = data.config.filter(({ differs }) => differs);
  if (runs.length > 1 && differing.length) {
    make($("differences"), "p", "lead", "What differs between the runs:");
    fill(make(make($("differences"), "div", "scroll"), "table"), differing);
  } else if (runs.length > 1) {
    make($("differences"), "p", "lead", "The runs have the same configuration.");
  }
  fill($("fields"), data.config);
}

document.body.classList.toggle("one", runs.length === 1 && runs[0].grids.length > 0 && runs[0].ways !== null);
theme();
header();
overview();
samples();
ways();
figureTable();
curves();
configuration();
document.documentElement.dataset.ready = "yes";
