// The three-plane viewer. Volumes are uint8 [X, Y, Z], X to the patient's right, Y to anterior,
// Z to superior; a voxel v is (v - data.zero) / (255 - data.zero) * subject.top in data.units.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("volumes").textContent);

  // Screen columns run along `across`, rows along `down`, both against the axis: the patient's
  // right (or anterior) is on the left, superior (or anterior) on top.
  const PLANES = [
    { name: "Axial", axis: 2, across: 0, down: 1, letters: ["R", "L", "A", "P"] },
    { name: "Coronal", axis: 1, across: 0, down: 2, letters: ["R", "L", "S", "I"] },
    { name: "Sagittal", axis: 0, across: 1, down: 2, letters: ["A", "P", "S", "I"] },
  ];
  const SIDES = ["left", "right", "top", "bottom"];
  const RED = [178, 24, 43];
  const BLUE = [33, 102, 172];

  const percent = (steps) => (100 * steps) / (255 - data.zero); // of subject.top
  const state = { subject: null, method: "", index: [0, 0, 0], level: 50, width: 100 };
  const decoded = new Map(); // voxels by subject and volume, decoded when first shown

  const methods = Object.keys(data.titles).filter((name) => name !== "input" && name !== "target");
  const hasInput = "input" in data.titles;
  const panels = [...(hasInput ? ["input"] : []), "output", "target", "difference"];

  function voxels(name) {
    const key = `${state.subject.name}/${name}`;
    if (!decoded.has(key)) {
      decoded.set(key, Uint8Array.from(atob(state.subject.volumes[name]), (c) => c.charCodeAt(0)));
    }
    return decoded.get(key);
  }

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function number(value) {
    return value.toLocaleString("en", { maximumSignificantDigits: 3 });
  }

  // Build: per plane a slider and one canvas per panel.
  function buildPlane(plane) {
    const box = element("div", "plane");
    const bar = element("label", "bar-slice");
    plane.slider = element("input");
    plane.slider.type = "range";
    plane.slider.min = 0;
    plane.slider.id = plane.name.toLowerCase();
    plane.slider.setAttribute("aria-label", `${plane.name} slice`);
    plane.label = element("output");
    plane.label.htmlFor = plane.slider.id;
    bar.append(element("b", "", plane.name), plane.slider, plane.label);
    const row = element("div", "row");
    row.style.setProperty("--columns", panels.length);
    plane.panes = panels.map((panel) => buildPane(plane, panel, row));
    box.append(bar, row);
    plane.slider.addEventListener("input", () => move(plane.axis, Number(plane.slider.value)));
    $("planes").append(box);
  }

  function buildPane(plane, panel, row) {
    const figure = element("figure");
    const caption = element("figcaption");
    const pane = element("div", "pane");
    const frame = element("div", "frame");
    const canvas = element("canvas");
    canvas.setAttribute("role", "img");
    canvas.dataset.panel = panel;
    const hair = [element("i", "hair v"), element("i", "hair h")];
    frame.append(canvas, ...hair);
    plane.letters.forEach((letter, i) => frame.append(element("span", `letter ${SIDES[i]}`, letter)));
    pane.append(frame);
    figure.append(caption, pane);
    row.append(figure);
    let turned = 0;
    pane.addEventListener("wheel", (event) => {
      event.preventDefault();
      // a notch of a wheel is about 100, a touch pad sends many small ones
      turned += event.deltaMode === 0 ? event.deltaY : event.deltaY * 40;
      const steps = Math.trunc(turned / 40);
      turned -= steps * 40;
      if (steps) move(plane.axis, state.index[plane.axis] - Math.sign(steps) * Math.min(Math.abs(steps), 3));
    }, { passive: false });
    const point = (event) => {
      const area = frame.getBoundingClientRect();
      const [columns, rows] = size(plane);
      const column = Math.floor(((event.clientX - area.left) / area.width) * columns);
      const line = Math.floor(((event.clientY - area.top) / area.height) * rows);
      move(plane.across, columns - 1 - column);
      move(plane.down, rows - 1 - line);
    };
    pane.addEventListener("pointerdown", (event) => {
      point(event);
      plane.slider.focus({ preventScroll: true });
      event.preventDefault();
    });
    pane.addEventListener("pointermove", (event) => {
      if (event.buttons & 1 && event.pointerType === "mouse") point(event);
    });
    return { panel, caption, frame, canvas, hair };
  }

  function size(plane) {
    return [state.subject.shape[plane.across], state.subject.shape[plane.down]];
  }

  function move(axis, to) {
    const last = state.subject.shape[axis] - 1;
    const next = Math.min(Math.max(to, 0), last);
    if (next === state.index[axis]) return;
    state.index[axis] = next;
    draw();
  }

  // Draw
  function fill(image, plane, colour) {
    const [, ny, nz] = state.subject.shape;
    const stride = [ny * nz, nz, 1];
    const [columns, rows] = size(plane);
    const pixels = new Uint32Array(image.data.buffer);
    let pixel = 0;
    for (let row = rows - 1; row >= 0; row--) {
      let at = state.index[plane.axis] * stride[plane.axis] + row * stride[plane.down];
      at += (columns - 1) * stride[plane.across];
      for (let column = 0; column < columns; column++) {
        pixels[pixel++] = colour(at);
        at -= stride[plane.across];
      }
    }
  }

  const opaque = (r, g, b) => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;

  function greys() {
    const table = new Uint32Array(256);
    const low = state.level - state.width / 2;
    for (let v = 0; v < 256; v++) {
      const share = Math.min(Math.max((percent(v - data.zero) - low) / state.width, 0), 1);
      const grey = Math.round(255 * (1 - share));
      table[v] = opaque(grey, grey, grey);
    }
    return table;
  }

  function differences() {
    const table = new Uint32Array(511);
    for (let v = -255; v <= 255; v++) {
      const share = Math.min(Math.max(percent(v) / (data.differenceShare * state.width), -1), 1);
      const end = share > 0 ? RED : BLUE;
      table[v + 255] = opaque(...end.map((c) => Math.round(255 + (c - 255) * Math.abs(share))));
    }
    return table;
  }

  let waiting = false;

  function draw() {
    if (!waiting) requestAnimationFrame(paint);
    waiting = true;
  }

  function paint() {
    waiting = false;
    const grey = greys();
    const colour = differences();
    const output = voxels(state.method);
    const target = voxels("target");
    const source = { output, target, input: hasInput ? voxels("input") : null };
    for (const plane of PLANES) {
      const [columns, rows] = size(plane);
      const slice = state.index[plane.axis];
      const said = `slice ${slice + 1} of ${state.subject.shape[plane.axis]}`;
      plane.slider.max = state.subject.shape[plane.axis] - 1;
      plane.slider.value = slice;
      plane.slider.setAttribute("aria-valuetext", said);
      plane.label.textContent = `${slice + 1} / ${state.subject.shape[plane.axis]}`;
      const millimetres = [plane.across, plane.down].map(
        (axis) => state.subject.shape[axis] * state.subject.spacing[axis],
      );
      for (const { panel, caption, frame, canvas, hair } of plane.panes) {
        const title = panel === "output" ? data.titles[state.method] : panel;
        caption.textContent = panel === "difference" ? `${data.titles[state.method]} − target` : title;
        canvas.setAttribute("aria-label", `${plane.name}, ${caption.textContent}, ${said}`);
        frame.style.aspectRatio = `${millimetres[0]} / ${millimetres[1]}`;
        canvas.width = columns;
        canvas.height = rows;
        const context = canvas.getContext("2d");
        const image = context.createImageData(columns, rows);
        if (panel === "difference") fill(image, plane, (at) => colour[output[at] - target[at] + 255]);
        else fill(image, plane, (at) => grey[source[panel][at]]);
        context.putImageData(image, 0, 0);
        hair[0].style.left = `${((columns - 0.5 - state.index[plane.across]) / columns) * 100}%`;
        hair[1].style.top = `${((rows - 0.5 - state.index[plane.down]) / rows) * 100}%`;
      }
    }
    const unit = state.subject.top / 100;
    $("level-value").textContent = number(state.level * unit);
    $("width-value").textContent = number(state.width * unit);
    $("window-low").textContent = number(Math.max(state.level - state.width / 2, 0) * unit);
    $("window-high").textContent = `${number((state.level + state.width / 2) * unit)} ${data.units}`;
    const end = data.differenceShare * state.width * unit;
    $("error-low").textContent = `−${number(end)}`;
    $("error-high").textContent = `+${number(end)} ${data.units}, difference`;
  }

  function reset() {
    state.width = 100 * state.subject.window;
    state.level = state.width / 2;
    state.index = [...state.subject.slices];
    $("level").value = state.level;
    $("width").value = state.width;
    draw();
  }

  function show(position) {
    state.subject = data.subjects[position];
    reset();
  }

  data.subjects.forEach((subject, i) => $("subject").append(new Option(subject.name, i)));
  methods.forEach((name) => $("method").append(new Option(data.titles[name], name)));
  state.method = methods.includes("petite") ? "petite" : methods[methods.length - 1];
  $("method").value = state.method;
  PLANES.forEach(buildPlane);
  $("subject").addEventListener("change", () => show(Number($("subject").value)));
  $("method").addEventListener("change", () => {
    state.method = $("method").value;
    draw();
  });
  for (const name of ["level", "width"]) {
    $(name).addEventListener("input", () => {
      state[name] = Number($(name).value);
      draw();
    });
  }
  $("cross").addEventListener("change", () => $("planes").classList.toggle("no-cross", !$("cross").checked));
  $("reset").addEventListener("click", reset);
  show(0);
})();
