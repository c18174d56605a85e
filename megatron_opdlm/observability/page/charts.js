
// What a curve says where the pointer is, or the arrow keys: a line, a dot on each curve, and the numbers in the caption.
(() => {
  const number = (value) => (value === null ? "not finite" : Number(value.toPrecision(4)).toLocaleString("en"));
  const draw = (parent, name, attributes) => {
    const element = document.createElementNS(parent.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return parent.appendChild(element);
  };

  function follow(svg) {
    const { frame: [left, top, right, bottom], x: [x0, x1], y: [y0, y1], xLabel, curves } = JSON.parse(svg.dataset.chart);
    const readout = svg.closest("figure").querySelector(".readout"), before = readout.textContent;
    const isStacked = svg.querySelector(".area") !== null, layer = draw(svg, "g", {});
    const places = curves.flatMap((curve, which) => curve.x.map((x, index) => ({ x, which, index })));
    const across = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
    const up = (y) => bottom - ((y - y0) / (y1 - y0)) * (bottom - top);
    let shown = null;

    function show(place) {
      layer.replaceChildren();
      shown = place;
      readout.textContent = before;
      if (!place) return;
      const isScatter = !isStacked && curves.length > 1, chosen = isScatter ? [curves[place.which]] : curves;
      draw(layer, "path", { class: "hair", d: `M${across(place.x)} ${top}V${bottom}` });
      const values = chosen.map((curve) => curve.y[place.index]);
      if (!isStacked && values[0] !== null)
        draw(layer, "circle", { class: `spot c${isScatter ? place.which % 9 : 0}`, cx: across(place.x), cy: up(values[0]), r: 4.5 });
      const words = chosen.map((curve, i) => (curve.name ? `${curve.name} ` : "") + number(values[i]));
      readout.textContent = `${xLabel} ${number(place.x)}: ${words.join(", ")}`;
    }

    function nearest(event) {
      const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
      const px = (event.clientX - box.left) * scale, py = (event.clientY - box.top) * scale;
      const isOneLine = curves.length === 1 || isStacked;
      const far = (place) => {
        const dx = across(place.x) - px, value = curves[place.which].y[place.index];
        return isOneLine ? Math.abs(dx) : Math.hypot(dx, up(value) - py);
      };
      return places.reduce((best, place) => (far(place) < far(best) ? place : best));
    }

    svg.addEventListener("pointermove", (event) => show(nearest(event)));
    svg.addEventListener("pointerdown", (event) => show(nearest(event)));
    svg.addEventListener("pointerleave", () => show(null));
    svg.addEventListener("blur", () => show(null));
    svg.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!way) return;
      event.preventDefault();
      const at = shown ? places.indexOf(shown) + way : way > 0 ? 0 : places.length - 1;
      show(places[Math.max(0, Math.min(places.length - 1, at))]);
    });
  }

  document.querySelectorAll("svg.chart").forEach(follow);
})();
