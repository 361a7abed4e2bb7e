// The page reads without this. It adds: the value of a token as soon as it is touched, the keys j and k
// from query to query, a switch for one side alone, and one for the queries of one tag.
(() => {
  "use strict";
  const root = document.documentElement;
  root.classList.add("js");

  const readout = document.querySelector(".readout");
  const say = (target) => {
    const token = target.closest(".text i");
    const bar = target.closest("rect");
    if (token) {
      // The browser's own slow tooltip would say the same a second later.
      if (token.title) { token.dataset.hint = token.title; token.removeAttribute("title"); }
      const [value, next] = token.dataset.hint.split(" → ");
      const unit = token.closest(".query").dataset.unit;
      const here = token.textContent.trim() || "␣";
      readout.textContent = next === undefined
        ? value.replace(" over ", ` ${unit} over `)
        : `${value} ${unit}, after “${here}”` + (next === "end" ? "" : `, for predicting “${next}”`);
    } else if (bar) {
      const query = bar.closest(".query");
      readout.textContent = bar.querySelector("title").textContent + (query ? ` ${query.dataset.unit}` : "");
    }
    readout.hidden = !(token || bar);
  };
  document.addEventListener("pointerover", (event) => say(event.target));
  document.addEventListener("click", (event) => say(event.target));
  document.addEventListener("scroll", () => { readout.hidden = true; }, { passive: true });

  const switches = [...document.querySelectorAll(".sideswitch button")];
  for (const button of switches) {
    button.addEventListener("click", () => {
      const anchor = document.querySelectorAll(".query")[Math.max(0, current())];
      const before = anchor ? anchor.getBoundingClientRect().top : 0;
      root.dataset.side = button.dataset.side;
      for (const other of switches) other.setAttribute("aria-pressed", String(other === button));
      if (anchor && current() >= 0) window.scrollBy({ top: anchor.getBoundingClientRect().top - before, behavior: "instant" });
    });
  }

  const every = [...document.querySelectorAll(".query")];
  let queries = every;
  const here = document.querySelector(".here");
  const current = () => queries.findLastIndex((query) => query.getBoundingClientRect().top < 120);
  const show = () => {
    const at = current();
    here.textContent = at < 0 ? "" : `${at + 1} of ${queries.length}: ${queries[at].querySelector(".completion").textContent.trim()}`;
  };
  const chosen = [...document.querySelectorAll(".tagswitch button")];
  for (const button of chosen) {
    button.addEventListener("click", () => {
      const tag = JSON.parse(button.dataset.tag);
      for (const part of document.querySelectorAll("[data-tags]")) {
        part.hidden = tag !== "" && !JSON.parse(part.dataset.tags).includes(tag);
      }
      queries = every.filter((query) => !query.hidden);
      for (const other of chosen) other.setAttribute("aria-pressed", String(other === button));
      show();
    });
  }
  const step = (by) => {
    const next = queries[Math.min(queries.length - 1, Math.max(0, current() + by))];
    if (next) next.scrollIntoView();
  };
  document.addEventListener("scroll", show, { passive: true });
  for (const button of document.querySelectorAll(".steps button")) {
    button.addEventListener("click", () => step(Number(button.dataset.step)));
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j") step(1);
    if (event.key === "k") step(-1);
  });
  show();
})();
