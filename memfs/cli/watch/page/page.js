// What memfs web shows. All that comes from elsewhere is put in as text, never as HTML: names are anybody's.

const STATES = ["private", "private huge", "shared", "shared huge", "absent", "mixed", "locked"];
const PAGE = 4096;
const SECONDS = 120; // of the time lines
const at = (id) => document.getElementById(id);
const view = { vm: null, start: 0, end: 0 }; // start and end in pages; both 0: all of it
const points = [];
let source = null;
let latest = null;

// -- words ------------------------------------------------------------------------------------------------------------

function bytes(n) {
  if (n === null || n === undefined) return "-";
  let power = 0;
  while (n >= 1024 && power < 6) { n /= 1024; power += 1; }
  return power ? `${n < 99.95 ? n.toFixed(1) : n.toFixed(0)}${"KMGTPE"[power - 1]}` : `${n}`;
}

function exactly(n) { // an offset, as memfs map writes it
  let power = 0;
  while (n && n % 1024 === 0 && power < 4) { n /= 1024; power += 1; }
  return `${n}${["", "K", "M", "G", "T"][power]}`;
}

function seconds(s) {
  if (s === null || s === undefined) return "-";
  return s >= 1 ? `${s.toFixed(1)} s` : s >= 0.001 ? `${(s * 1000).toFixed(1)} ms` : `${Math.round(s * 1e6)} µs`;
}

const rate = (value) => (value === null || value === undefined ? "-" : value >= 9.95 ? value.toFixed(0) : value.toFixed(1));
const vmKey = (mount, vm) => JSON.stringify([mount.mountpoint, vm.owner, vm.ino]);

// -- the stream ---------------------------------------------------------------------------------------------------------

function connect() {
  if (source) source.close();
  const query = new URLSearchParams();
  if (view.vm) {
    const [mount, owner, ino] = JSON.parse(view.vm);
    query.set("mount", mount); query.set("owner", owner); query.set("ino", ino);
    query.set("start", view.start); query.set("end", view.end);
  }
  source = new EventSource(`events?${query}`);
  source.onmessage = (event) => show(JSON.parse(event.data));
  source.onerror = () => { at("status").textContent = "not connected"; };
}

function show(event) {
  latest = event;
  if (event.history) points.splice(0, points.length, ...event.history);
  else points.push(event.point);
  while (points.length && points[0].time < event.point.time - SECONDS) points.shift();
  at("status").textContent = new Date(event.point.time * 1000).toLocaleTimeString();
  showChoice(event.mounts);
  showTables(event.mounts);
  showMap(event.map);
  showLines();
}

// -- which VM -----------------------------------------------------------------------------------------------------------

function showChoice(mounts) {
  const choice = at("vm");
  const all = mounts.flatMap((mount) => (mount.vms || []).map((vm) => [vmKey(mount, vm), mount, vm]));
  const wanted = all.map(([key]) => key).join();
  if (choice.dataset.keys !== wanted) {
    choice.dataset.keys = wanted;
    choice.replaceChildren(...all.map(([key, , vm]) => {
      const option = document.createElement("option");
      option.value = key;
      option.textContent = `${vm.name || "owner " + vm.owner}: ${vm.files.join(", ")}`;
      return option;
    }));
  }
  if (!all.some(([key]) => key === view.vm)) {
    choose(all.length ? all[0][0] : null);
  } else {
    choice.value = view.vm;
  }
}

function choose(key) {
  if (key === view.vm) return;
  view.vm = key; view.start = 0; view.end = 0;
  connect();
}

// -- the map ------------------------------------------------------------------------------------------------------------

function colour(state) {
  return getComputedStyle(document.querySelector(`#legend .k${state}`)).backgroundColor;
}

function fit(canvas, height) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width];
}

const MARGIN = 64; // for the offsets at which rows begin
const ROW = 14;

function showMap(map) {
  const rows = map && map.cells ? Math.ceil(map.cells.length / map.columns) : 1;
  const [context, width] = fit(at("map"), Math.max(rows, 4) * ROW);
  if (!map || map.error) {
    at("summary").textContent = map ? map.error : "There is no VM to be seen: no owner is connected, or none of yours.";
    at("map").dataset.cells = "";
    return;
  }
  const across = (width - MARGIN) / map.columns;
  const colours = STATES.map((_, state) => colour(state));
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (let row = 0; row < rows; row += 1) {
    context.fillStyle = getComputedStyle(document.body).color;
    context.fillText(exactly((map.start + row * map.columns * map.cell) * PAGE), 0, row * ROW + ROW / 2);
    for (let column = 0; column < map.columns; column += 1) {
      const state = map.cells[row * map.columns + column];
      if (state === undefined) break;
      context.fillStyle = colours[state];
      context.fillRect(MARGIN + column * across, row * ROW, Math.max(1, across - 1), ROW - 1);
    }
  }
  at("map").dataset.cells = map.cells; // what is drawn, for tests and for tools that read the page
  at("summary").textContent = map.summary + (map.complete ? "" : "; still looking");
  at("window").textContent = `${exactly(map.start * PAGE)} to ${exactly(map.end * PAGE)}`;
}

function cellAt(event) {
  const map = latest && latest.map;
  if (!map || !map.cells) return null;
  const box = at("map").getBoundingClientRect();
  const column = Math.floor((event.clientX - box.left - MARGIN) / ((box.width - MARGIN) / map.columns));
  const row = Math.floor((event.clientY - box.top) / ROW);
  const number = row * map.columns + column;
  return column < 0 || column >= map.columns || number >= map.cells.length ? null : number;
}

function zoom(factor, middle) {
  const map = latest && latest.map;
  if (!map || !map.cells) return;
  const size = map.end - map.start;
  const pages = Math.max(1, Math.min(map.size, Math.round(size * factor)));
  const centre = middle === undefined ? map.start + size / 2 : middle;
  moveTo(Math.round(centre - pages / 2), pages, map.size);
}

function moveTo(start, pages, size) {
  view.start = Math.max(0, Math.min(start, size - pages));
  view.end = view.start + pages;
  if (pages >= size) { view.start = 0; view.end = 0; }
  connect();
}

function pan(share) {
  const map = latest && latest.map;
  if (map && map.cells) moveTo(map.start + Math.trunc((map.end - map.start) * share), map.end - map.start, map.size);
}

function listen() {
  const actions = { in: () => zoom(1 / 4), out: () => zoom(4), left: () => pan(-1 / 2), right: () => pan(1 / 2), all: () => zoom(Infinity) };
  for (const [id, action] of Object.entries(actions)) at(id).onclick = action;
  const keys = { "+": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", Home: "all" };
  at("map").onkeydown = (event) => { if (keys[event.key]) { actions[keys[event.key]](); event.preventDefault(); } };
  at("map").onclick = (event) => {
    const number = cellAt(event);
    if (number !== null) zoom(event.shiftKey ? 4 : 1 / 4, latest.map.start + (number + 0.5) * latest.map.cell);
  };
  at("map").onmousemove = (event) => {
    const number = cellAt(event);
    const first = number === null ? 0 : latest.map.start + number * latest.map.cell;
    at("cell").textContent = number === null ? "\u00a0"
      : `${exactly(first * PAGE)}: ${STATES[latest.map.cells[number]]}; page ${first}` + (latest.map.cell > 1 ? ` and ${latest.map.cell - 1} more` : "");
  };
  at("vm").onchange = () => choose(at("vm").value);
  at("theme").onclick = () => {
    const root = document.documentElement;
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    if (latest) { showMap(latest.map); showLines(); }
  };
  window.onresize = () => { if (latest) { showMap(latest.map); showLines(); } };
}

function makeLegend() {
  at("legend").replaceChildren(...STATES.map((words, state) => key(words, state)));
}

function key(words, state) {
  const span = document.createElement("span");
  const box = document.createElement("i");
  span.className = "key";
  box.className = `k${state}`;
  span.append(box, words);
  return span;
}

// -- the time lines -----------------------------------------------------------------------------------------------------

function mountNow() {
  if (view.vm) return JSON.parse(view.vm)[0];
  return latest.mounts.length ? latest.mounts[0].mountpoint : "";
}

function line(canvas, series, scale) {
  const [context, width] = fit(canvas, 120);
  const now = points.length ? points[points.length - 1].time : 0;
  const x = (time) => width - ((now - time) / SECONDS) * width;
  context.strokeStyle = colour(4);
  context.strokeRect(0.5, 0.5, width - 1, 119);
  for (const [state, values] of series) {
    context.beginPath();
    context.strokeStyle = context.fillStyle = colour(state);
    context.lineWidth = 2;
    let isOpen = false;
    for (const [time, value] of values) {
      if (value === null) { isOpen = false; continue; }
      const y = 117 - scale(value) * 110;
      if (isOpen) context.lineTo(x(time), y); else context.moveTo(x(time), y);
      context.fillRect(x(time) - 1, y - 1, 2, 2);
      isOpen = true;
    }
    context.stroke();
  }
}

function showHistogram(mountpoint) {
  const counts = new Map();
  for (const point of points) {
    for (const [bound, count] of point.mounts[mountpoint]?.latency?.buckets ?? []) counts.set(bound, (counts.get(bound) ?? 0) + count);
  }
  const [context, width] = fit(at("histogram"), 96);
  const bounds = [...counts.keys()].sort((a, b) => a - b);
  const most = Math.max(1, ...counts.values());
  const across = Math.min(90, width / Math.max(1, bounds.length));
  context.font = "11px system-ui, sans-serif";
  context.textAlign = "center";
  bounds.forEach((bound, number) => {
    const height = Math.max(1, (counts.get(bound) / most) * 60);
    context.fillStyle = colour(5);
    context.fillRect(number * across + 2, 76 - height, across - 4, height);
    context.fillStyle = getComputedStyle(document.body).color;
    context.fillText(counts.get(bound), (number + 0.5) * across, 72 - height);
    context.fillText(bound >= 3600 ? "longer" : seconds(bound), (number + 0.5) * across, 92);
  });
}

function showLines() {
  const mountpoint = mountNow();
  const of = (name, part) => points.map((point) => {
    const mount = point.mounts[mountpoint];
    return [point.time, mount && mount[name] ? mount[name][part] : null];
  });
  const rates = [[0, of("conversions", "private")], [2, of("conversions", "shared")]];
  const most = Math.max(1, ...rates.flatMap(([, values]) => values.map(([, value]) => value || 0)));
  line(at("rates"), rates, (value) => value / most);
  const pages = (part) => of("pages", part).at(-1)?.[1];
  at("rates-now").replaceChildren(
    key(`to private ${rate(rates[0][1].at(-1)?.[1])}/s, ${rate(pages("private"))} pages/s`, 0),
    key(`to shared ${rate(rates[1][1].at(-1)?.[1])}/s, ${rate(pages("shared"))} pages/s`, 2),
    key(`the line at the top is ${rate(most)}/s`, 7));
  const latencies = [[5, of("latency", "p50")], [1, of("latency", "p99")], [6, of("latency", "longest")]];
  line(at("latencies"), latencies, (value) => Math.max(0, Math.min(1, (Math.log10(value) + 5) / 6))); // 10 µs to 10 s
  showHistogram(mountpoint);
  const last = (values) => values.findLast(([, value]) => value !== null)?.[1];
  at("latencies-now").replaceChildren(...latencies.map(([state, values], number) =>
    key(`${["p50", "p99", "max"][number]} ${seconds(last(values))}`, state)), key("10 µs to 10 s, logarithmic", 7));
}

// -- tables -------------------------------------------------------------------------------------------------------------

function fill(table, columns, rows) {
  const row = (cells, tag) => cells.map((text) => {
    const cell = document.createElement(tag);
    cell.textContent = text;
    return cell;
  });
  table.tHead.rows[0].replaceChildren(...row(columns.map(([name]) => name), "th"));
  table.tBodies[0].replaceChildren(...rows.map((each) => {
    const line = document.createElement("tr");
    line.append(...row(columns.map(([, value]) => value(each)), "td"));
    return line;
  }));
}

function showTables(mounts) {
  fill(at("mounts"), [
    ["mount", (m) => (m.error ? `${m.mountpoint}: ${m.error}` : m.mountpoint)],
    ["size", (m) => bytes(m.size)],
    ["used", (m) => bytes(m.used)],
    ["private", (m) => bytes(m.guest_used)],
    ["files", (m) => m.inodes_used ?? "-"],
    ["owners", (m) => m.owners ?? "-"],
    ["fenced", (m) => m.owners_fenced ?? "-"],
    ["pending", (m) => m.pending ?? "-"],
    ["oldest", (m) => (m.age ? seconds(m.age) : "-")],
  ], mounts);
  fill(at("vms"), [
    ["VM", (vm) => vm.name || `owner ${vm.owner}`],
    ["files", (vm) => vm.files.join(", ")],
    ["private", (vm) => bytes(vm.private * PAGE)],
    ["shared", (vm) => bytes(vm.shared * PAGE)],
    ["locked", (vm) => bytes(vm.locked * PAGE)],
    ["pending", (vm) => vm.pending],
    ["oldest", (vm) => (vm.age ? seconds(vm.age) : "-")],
  ], mounts.flatMap((mount) => mount.vms || []));
}

makeLegend();
listen();
connect();
