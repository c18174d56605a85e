
// Steps through the denoising of a sequence. A token stands from the step on that its `order` names; the rest is masks.
(() => {
  const data = document.getElementById("trajectories-data");
  if (!data) return;
  const { texts, sequences, divergence } = JSON.parse(data.textContent);
  const at = (id) => document.getElementById(id);
  const [viewer, tokens, detail, strip, time, play] = ["viewer", "tokens", "detail", "strip", "time", "play"].map(at);
  let sequence, buttons, moment = 0, chosen = null, isPinned = false, timer = null;

  // --- words
  const percent = (logProb) => {
    if (logProb === null || logProb === undefined) return "–";
    const value = 100 * Math.exp(logProb);
    return value >= 99.95 ? "100 %" : value >= 0.1 ? `${value.toFixed(1)} %` : value >= 0.001 ? `${value.toFixed(3)} %` : "< 0.001 %";
  };
  const nats = (value) => (value === null ? "–" : `${value.toPrecision(3).replace(/\.?0+$/, "")} nats`);
  const visible = (id) => {
    const text = texts[id];
    return /^\s*$/.test(text) ? text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\s/g, "␣") : text.replace(/\n/g, "↵");
  };
  const element = (name, content = "", kind = "") => {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    made.textContent = content;
    return made;
  };

  // --- colours
  const strongest = () => Math.max(0.1, ...sequence.divergence.filter((value) => value !== null));
  const AMOUNTS = {
    step: (i) => (sequence.stepMap[i] - 1) / Math.max(1, Math.max(...sequence.stepMap) - 1),
    confidence: (i) => (sequence.logProbs[i] === null ? 0 : 1 - Math.exp(sequence.logProbs[i])),
    divergence: (i) => Math.sqrt(Math.max(0, sequence.divergence[i] ?? 0) / strongest()),
  };
  const LEGENDS = {
    step: () => ["first step of its block", `step ${Math.max(...sequence.stepMap)}`],
    confidence: () => ["sure", "unsure when it committed the token"],
    divergence: () => ["as the teacher", `${nats(strongest())} away (${divergence})`],
  };
  function paint() {
    const hue = document.querySelector("input[name=hue]:checked").value;
    viewer.dataset.hue = hue;
    [at("legend-low").textContent, at("legend-high").textContent] = LEGENDS[hue]();
    buttons.forEach((button, i) => {
      const least = hue === "step" ? 8 : 0;
      const amount = i < sequence.counted ? least + (58 - least) * AMOUNTS[hue](i) : 0;
      button.style.setProperty("--amount", `${amount.toFixed(1)}%`);
    });
  }

  // --- the state after `moment` steps
  const blockOf = (i) => Math.floor((sequence.prompt.length + i) / sequence.blockSize);
  function stateOf(i, next) {
    const order = sequence.order[i];
    if (order <= moment) return order === moment ? "just" : "done";
    return blockOf(i) === next ? "masked" : "later";
  }
  function show(wanted) {
    moment = Math.max(0, Math.min(sequence.steps, wanted));
    const begins = sequence.order.findIndex((order) => order === moment + 1);
    const next = begins < 0 ? -1 : blockOf(begins);
    buttons.forEach((button, i) => {
      const state = stateOf(i, next), stands = state === "done" || state === "just";
      button.dataset.state = state;
      button.textContent = stands ? visible(sequence.ids[i]) : "";
      button.setAttribute("aria-label", `token ${i + 1}, ${stands ? visible(sequence.ids[i]) : "masked"}`);
    });
    [...strip.children].forEach((bar, i) => bar.toggleAttribute("data-done", i < moment));
    time.value = moment;
    const of = `step ${moment} of ${sequence.steps}`;
    const where = next < 0 ? "all written" : `block ${next - blockOf(0) + 1} of ${blockOf(sequence.ids.length - 1) - blockOf(0) + 1}`;
    time.setAttribute("aria-valuetext", `${of}, ${where}`);
    at("moment").textContent = `${of} · ${where}`;
    const mark = buttons[begins < 0 ? buttons.length - 1 : begins];
    const above = mark.offsetTop - tokens.clientHeight / 2;
    tokens.scrollTop = Math.max(0, above);
    if (chosen !== null) tell(chosen);
    if (moment === sequence.steps) halt();
  }

  // --- a token
  function tell(i) {
    chosen = i;
    buttons.forEach((button, place) => {
      button.toggleAttribute("data-chosen", place === i);
      button.tabIndex = place === i ? 0 : -1;
    });
    const heading = element("h3"), stands = sequence.order[i] <= moment;
    heading.append(element("code", visible(sequence.ids[i])));
    const block = blockOf(i) - blockOf(0) + 1;
    const when = `Token ${i + 1}, id ${sequence.ids[i]}. ${stands ? "Committed" : "Masked; it will be committed"} in step `
      + `${sequence.order[i]}, the ${ordinal(sequence.stepMap[i])} of block ${block}.`;
    const facts = element("dl");
    const rows = [["student's probability", percent(sequence.logProbs[i])],
      ["teacher's probability", percent(sequence.teacher[i])], [divergence, nats(sequence.divergence[i])]];
    for (const [name, value] of rows) facts.append(element("dt", name), element("dd", value));
    detail.replaceChildren(heading, element("p", when), facts, ...alternatives(i));
  }
  const ordinal = (n) => n + (["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] ?? "th");
  function alternatives(i) {
    const pairs = sequence.alternatives[i];
    if (!pairs.length) return [element("p", i < sequence.counted ? "" : "Behind the end of the response: nobody looks at it.")];
    const list = element("ol");
    for (const [id, logProb] of pairs) {
      const row = element("li", "", id === sequence.ids[i] ? "taken" : ""), meter = element("span", "", "meter"), fill = element("i");
      fill.style.width = `${100 * Math.exp(logProb)}%`;
      meter.append(fill);
      row.append(element("code", visible(id)), meter, element("span", percent(logProb)));
      list.append(row);
    }
    return [element("h3", "The teacher would write"), list];
  }

  // --- a sequence
  function open(number) {
    halt();
    sequence = sequences[number];
    sequence.steps = Math.max(...sequence.order);
    chosen = null;
    isPinned = false;
    at("prompt").textContent = sequence.prompt.map((id) => texts[id]).join("");
    buttons = sequence.ids.map((id, i) => {
      const button = element("button", visible(id), i < sequence.counted ? "token" : "token after");
      button.type = "button";
      button.tabIndex = i ? -1 : 0;
      return button;
    });
    const pieces = buttons.flatMap((button, i) => {
      const isLineEnd = texts[sequence.ids[i]].includes("\n");
      const isBlockEnd = i + 1 < buttons.length && blockOf(i + 1) !== blockOf(i);
      return [button, ...(isBlockEnd ? [element("span", "", "edge")] : []), ...(isLineEnd ? [element("br")] : [])];
    });
    tokens.replaceChildren(...pieces);
    // a masked token is as wide as what will stand there, so that nothing moves
    const widths = buttons.map((button) => button.getBoundingClientRect().width);
    buttons.forEach((button, i) => button.style.setProperty("min-width", `${widths[i]}px`));
    const committed = Array.from({ length: sequence.steps }, (_, step) => sequence.order.filter((order) => order === step + 1).length);
    strip.replaceChildren(...committed.map((count, step) => {
      const bar = element("i");
      bar.style.setProperty("--size", `${(100 * count) / Math.max(...committed)}%`);
      const place = (order) => blockOf(sequence.order.indexOf(order));
      if (step && place(step) !== place(step + 1)) bar.className = "begins";
      return bar;
    }));
    time.max = sequence.steps;
    detail.replaceChildren(element("p", "Point at a token, tap it or go to it by the keys: how sure the student was, and what the teacher would have written."));
    paint();
    show(0);
  }

  // --- what people do
  function halt() {
    clearInterval(timer);
    timer = null;
    play.removeAttribute("data-plays");
    play.setAttribute("aria-label", "Play");
  }
  function toggle() {
    if (timer) return halt();
    if (moment === sequence.steps) show(0);
    play.setAttribute("data-plays", "");
    play.setAttribute("aria-label", "Pause");
    timer = setInterval(() => show(moment + 1), Math.max(60, Math.min(450, 12000 / sequence.steps)));
  }
  const go = (wanted) => { halt(); show(wanted); };
  const GOALS = { first: () => 0, back: () => moment - 1, forth: () => moment + 1, last: () => sequence.steps };
  for (const [id, goal] of Object.entries(GOALS)) at(id).addEventListener("click", () => go(goal()));
  play.addEventListener("click", toggle);
  time.addEventListener("input", () => go(Number(time.value)));
  strip.addEventListener("click", (event) => {
    const bar = event.target.closest("i");
    if (bar) go([...strip.children].indexOf(bar) + 1);
  });
  at("sequence").addEventListener("change", (event) => open(event.target.selectedIndex));
  document.querySelectorAll("input[name=hue]").forEach((input) => input.addEventListener("change", paint));

  const placeOf = (event) => buttons.indexOf(event.target.closest(".token"));
  tokens.addEventListener("pointerover", (event) => { if (!isPinned && placeOf(event) >= 0) tell(placeOf(event)); });
  tokens.addEventListener("focusin", (event) => { if (placeOf(event) >= 0) tell(placeOf(event)); });
  tokens.addEventListener("click", (event) => {
    const place = placeOf(event);
    isPinned = place >= 0 && !(isPinned && place === chosen);
    if (place >= 0) tell(place);
  });
  tokens.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    event.stopPropagation();
    buttons[Math.max(0, Math.min(buttons.length - 1, placeOf(event) + way))].focus();
  });
  const KEYS = { ArrowLeft: GOALS.back, ArrowRight: GOALS.forth, Home: GOALS.first, End: GOALS.last };
  viewer.addEventListener("keydown", (event) => {
    const isControl = event.target.closest("select, input, button");
    if (event.key === " " && !isControl) { event.preventDefault(); toggle(); }
    if (!KEYS[event.key] || event.target.closest("select, input")) return;
    event.preventDefault();
    go(KEYS[event.key]());
  });

  at("sequence").append(...sequences.map((some) => {
    const question = some.prompt.map((id) => texts[id]).join("").replace(/<\|[^|]*\|>/g, " ").replace(/\s+/g, " ").trim();
    const words = question.replace(/^(system|user) /, "").replace(/ assistant$/, "");
    return element("option", `step ${some.step} · ${words.length > 60 ? "…" + words.slice(-60) : words}`);
  }));
  open(0);
})();
