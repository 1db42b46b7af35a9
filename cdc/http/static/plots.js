// Lines over the last hour, as SVG: no library, and nothing that could be markup.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 150, LEFT = 46, RIGHT = 10, TOP = 12, BOTTOM = 20;

function make(name, attributes, text) {
  const found = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
  if (text !== undefined) found.textContent = text;
  return found;
}

// Up to four round numbers from 0 to at least `most`.
function ticks(most) {
  const rough = most / 3 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let value = 0; value < most + step * 0.999; value += step) found.push(value);
  return found.length > 1 ? found : [0, step];
}

// Runs of neighbouring points; a null, or a hole in time, ends one.
function runs(at, values, longest) {
  const found = [];
  let last = null;
  at.forEach((moment, index) => {
    if (values[index] === null || values[index] === undefined) { last = null; return; }
    if (last === null || moment - last > longest) found.push([]);
    found[found.length - 1].push([moment, values[index]]);
    last = moment;
  });
  return found;
}

// Draw series of {at, values, second, area} into `place`; `format` says a value.
export function plot(place, series, { format, now, interval, description }) {
  const width = Math.max(place.clientWidth, 200);
  const began = Math.min(now, ...series.map((one) => (one.at.length ? one.at[0] : now)));
  const minutes = [4, 12, 32, 60].find((span) => now - began < span * 60) || 60;
  const span = minutes * 60, from = now - span;
  const most = Math.max(0, ...series.flatMap((s) => s.values.filter((v) => v !== null)));
  const empty = series.every((one) => one.values.every((value) => value === null));
  const marks = empty ? [0] : ticks(most || 1);
  const top = marks[marks.length - 1] || 1;
  const x = (moment) => LEFT + ((moment - from) / span) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (value / top) * (HEIGHT - TOP - BOTTOM);
  const svg = make("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": description });
  for (const mark of marks) {
    svg.append(make("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(mark), y2: y(mark) }));
    svg.append(make("text", { x: LEFT - 6, y: y(mark) + 4, "text-anchor": "end" }, format(mark)));
  }
  for (const quarter of [0, 1, 2, 3]) {
    const ago = (minutes * (4 - quarter)) / 4;
    svg.append(make("text", { x: x(now - ago * 60), y: HEIGHT - 5, "text-anchor": "start" }, quarter ? `−${ago}` : `−${ago} min`));
  }
  svg.append(make("text", { x: width - RIGHT, y: HEIGHT - 5, "text-anchor": "end" }, "now"));
  for (const one of series) {
    const style = one.second ? " second" : "";
    for (const run of runs(one.at, one.values, interval * 3.5)) {
      const points = run.filter(([moment]) => moment >= from).map(([moment, value]) => `${x(moment).toFixed(1)},${y(value).toFixed(1)}`);
      if (points.length === 0) continue;
      if (points.length === 1) {
        const [cx, cy] = points[0].split(",");
        svg.append(make("circle", { class: "dot" + style, cx, cy, r: 2.2 }));
        continue;
      }
      if (one.area) {
        const [first, last] = [points[0].split(",")[0], points[points.length - 1].split(",")[0]];
        svg.append(make("polygon", { class: "area", points: `${first},${y(0)} ${points.join(" ")} ${last},${y(0)}` }));
      }
      svg.append(make("polyline", { class: "line" + style, points: points.join(" ") }));
    }
  }
  if (empty) {
    svg.append(make("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "nothing yet"));
  }
  follow(svg, series, { x, width, from, span, format });
  place.replaceChildren(svg);
}

// What was there, under the pointer or the finger.
function follow(svg, series, { x, width, from, span, format }) {
  const cross = make("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const label = make("text", { y: TOP - 2, visibility: "hidden" });
  svg.append(cross, label);
  const at = series.length ? series[0].at : [];
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const moment = from + (((event.clientX - box.left) / box.width) * width - LEFT) / (width - LEFT - RIGHT) * span;
    let nearest = -1;
    at.forEach((one, index) => { if (nearest < 0 || Math.abs(one - moment) < Math.abs(at[nearest] - moment)) nearest = index; });
    if (nearest < 0) return;
    const here = x(at[nearest]);
    const said = series.map((one) => one.values[nearest]).map((value) => (value === null ? "–" : format(value))).join(" · ");
    const clock = new Date(at[nearest] * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
    for (const [key, value] of [["x1", here], ["x2", here], ["visibility", "visible"]]) cross.setAttribute(key, value);
    label.textContent = `${clock}  ${said}`;
    label.setAttribute("x", here > width / 2 ? here - 6 : here + 6);
    label.setAttribute("text-anchor", here > width / 2 ? "end" : "start");
    label.setAttribute("visibility", "visible");
  });
  svg.addEventListener("pointerleave", () => { for (const one of [cross, label]) one.setAttribute("visibility", "hidden"); });
}
