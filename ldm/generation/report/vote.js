"use strict";
(() => {
  const content = JSON.parse(document.getElementById("pairs").textContent);
  const place = "ldm-vote-" + content.page;
  // The first lives as long as this tab, the second outlives it; but of a page that is opened as a file, Chromium
  // reads the second as it was some votes ago in a quarter of all reloads. Nothing is kept before the first vote,
  // so that a page that read nothing overwrites nothing.
  const shelves = ["sessionStorage", "localStorage"];
  const at = (id) => document.getElementById(id);
  let state = restored() || fresh();
  let shownAt = 0;

  // One person's own order of the pairs, and which picture of each stands on the left.
  function fresh() {
    const order = content.pairs.map((_, pair) => pair);
    for (let i = order.length - 1; i > 0; i--) {
      const j = Math.floor(Math.random() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
    const session = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0"));
    return { session: session.join(""), order, left: order.map(() => (Math.random() < 0.5 ? 0 : 1)), votes: [], voter: "" };
  }

  function restored() {
    const found = shelves.map(kept).filter((one) => one && one.order.length === content.pairs.length);
    return found.sort((one, other) => (other.saved || 0) - (one.saved || 0))[0];
  }

  function kept(shelf) {
    try {
      return JSON.parse(window[shelf].getItem(place));
    } catch {
      return null;
    }
  }

  function keep() {
    state.saved = Date.now();
    try {
      shelves.forEach((shelf) => window[shelf].setItem(place, JSON.stringify(state)));
    } catch {
      warn("This browser keeps nothing for this page: download the votes before it is closed.");
    }
  }

  function warn(words) {
    at("warning").textContent = words;
    at("warning").hidden = false;
  }

  function show() {
    const done = state.votes.length, all = state.order.length, isOver = done >= all;
    at("vote").hidden = isOver;
    at("done").hidden = !isOver;
    at("bar").max = all;
    at("bar").value = done;
    at("progress").textContent = isOver ? `${all} of ${all}` : `pair ${done + 1} of ${all}`;
    at("back").disabled = done === 0;
    at("download").disabled = done === 0;
    if (!isOver) {
      const pair = content.pairs[state.order[done]], left = state.left[done];
      put("left-picture", pair.pictures[left]);
      put("right-picture", pair.pictures[1 - left]);
      at("told").textContent = pair.told;
    }
    shownAt = performance.now();
  }

  function put(id, source) {
    const picture = at(id);
    picture.onload = () => picture.classList.toggle("small", picture.naturalWidth <= 64);
    picture.src = source;
  }

  function choose(side) {
    const number = state.votes.length;
    if (number >= state.order.length) return;
    const left = state.left[number];
    const choice = side === "tie" ? "tie" : side === "left" ? left : 1 - left;
    const seconds = Math.round((performance.now() - shownAt) / 10) / 100;
    state.votes.push({ pair: state.order[number], choice, left, seconds, at: new Date().toISOString() });
    keep();
    show();
  }

  function back() {
    if (!state.votes.length) return;
    state.votes.pop();
    keep();
    show();
  }

  function download() {
    const { session, voter, votes } = state;
    const text = JSON.stringify({ format: content.format, page: content.page, session, voter, votes }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = `votes-${content.page}-${session}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function restart() {
    if (state.votes.length && !confirm("Forget these votes and start again?")) return;
    state = { ...fresh(), voter: state.voter };
    keep();
    show();
  }

  const keys = { ArrowLeft: () => choose("left"), ArrowRight: () => choose("right"), ArrowDown: () => choose("tie"),
    1: () => choose("left"), 2: () => choose("right"), 0: () => choose("tie"), Backspace: back };

  document.addEventListener("keydown", (event) => {
    // A key that is held down is one vote; signs typed into the name are none.
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target.id === "voter") return;
    if (event.key in keys) {
      event.preventDefault();
      keys[event.key]();
    }
  });
  at("left").addEventListener("click", () => choose("left"));
  at("right").addEventListener("click", () => choose("right"));
  at("tie").addEventListener("click", () => choose("tie"));
  at("back").addEventListener("click", back);
  at("download").addEventListener("click", download);
  at("restart").addEventListener("click", restart);
  at("voter").value = state.voter;
  at("voter").addEventListener("input", () => { state.voter = at("voter").value; keep(); });
  at("question").textContent = content.question;
  show();
})();
