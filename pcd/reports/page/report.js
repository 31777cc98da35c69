"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const root = document.documentElement;

  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = document.getElementById("theme");
  const name = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
  name();

  const press = (group, value) => all("button", group).forEach((button) => button.setAttribute("aria-pressed", String(button.value === value)));

  all("[data-shows]").forEach((select) => {
    const show = () => all(`[data-part="${select.dataset.shows}"]`).forEach((part) => { part.hidden = part.dataset.value !== select.value; });
    select.addEventListener("change", show);
    show();
  });

  const gallery = document.getElementById("gallery");
  if (!gallery) return;
  const state = { layer: "prediction", run: gallery.dataset.run, rule: "all" };
  const paint = () => {
    all(".sample", gallery).forEach((sample) => {
      sample.hidden = state.rule !== "all" && sample.dataset.rule !== state.rule;
      all("img.over", sample).forEach((image) => {
        const own = image.dataset.layer === state.layer && (image.dataset.run === state.run || image.dataset.run === "");
        image.hidden = !own;
      });
      all("[data-scores]", sample).forEach((line) => { line.hidden = line.dataset.scores !== state.run; });
    });
    all(".scale[data-layer]").forEach((scale) => { scale.hidden = !scale.dataset.layer.split(" ").includes(state.layer); });
  };
  all("[data-choose]").forEach((group) => {
    group.addEventListener("click", (event) => {
      if (event.target.tagName !== "BUTTON") return;
      state[group.dataset.choose] = event.target.value;
      press(group, event.target.value);
      paint();
    });
  });
  const chooser = document.getElementById("gallery-run");
  if (chooser) chooser.addEventListener("change", () => { state.run = chooser.value; paint(); });
  const split = (sample, share) => {
    all("img.over", sample).forEach((image) => { image.style.clipPath = `inset(0 0 0 ${share}%)`; });
    sample.querySelector(".handle").style.left = `${share}%`;
  };
  const decode = (map) => {
    const bytes = Uint8Array.from(atob(map.data), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return (x, y) => {
      const column = Math.min(map.width - 1, Math.floor(x * map.width)), row = Math.min(map.height - 1, Math.floor(y * map.height));
      return view.getUint16(2 * (row * map.width + column), true) / map.units;
    };
  };
  all(".sample", gallery).forEach((sample) => {
    const reading = sample.querySelector("[data-reading]"), pictures = sample.querySelector(".pictures");
    const maps = Object.fromEntries(Object.entries(JSON.parse(sample.querySelector("script").textContent)).map(([run, map]) => [run, decode(map)]));
    pictures.addEventListener("pointermove", (event) => {
      const box = pictures.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
      if (x < 0 || y < 0 || x >= 1 || y >= 1) return;
      const truth = maps[""](x, y), found = maps[state.run](x, y);
      const error = truth ? `truth ${truth.toFixed(2)} m, error ${found < truth ? "−" : "+"}${Math.abs(found - truth).toFixed(2)} m` : "no ground truth";
      reading.textContent = `here: predicted ${found.toFixed(2)} m, ${error}`;
    });
  });
  all(".sample", gallery).forEach((sample) => {
    const slider = sample.querySelector("input[type=range]");
    if (!slider) return;
    slider.addEventListener("input", () => split(sample, slider.value));
    const drag = (event) => {
      const box = sample.querySelector(".pictures").getBoundingClientRect();
      slider.value = String(Math.max(0, Math.min(100, 100 * (event.clientX - box.left) / box.width)));
      split(sample, slider.value);
    };
    sample.querySelector(".pictures").addEventListener("pointerdown", (event) => { drag(event); event.currentTarget.setPointerCapture(event.pointerId); });
    sample.querySelector(".pictures").addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });
    split(sample, slider.value);
  });
  paint();
})();
