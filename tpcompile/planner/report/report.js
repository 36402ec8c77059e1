// Search, and opening and closing; the page is complete without.
"use strict";
(() => {
  const find = document.getElementById("find");
  const found = document.getElementById("found");
  const tree = document.querySelector(".tree");
  const modules = [...tree.querySelectorAll("details.module")];
  const weights = [...tree.querySelectorAll("details.weight")];
  let before = null; // what was open before a search

  function search() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) {
      for (const each of [...modules, ...weights]) each.hidden = false;
      if (before) modules.forEach((module, i) => { module.open = before[i]; });
      before = null;
      found.textContent = "";
      return;
    }
    before = before || modules.map((module) => module.open);
    let count = 0;
    for (const weight of weights) {
      weight.hidden = !words.every((word) => weight.dataset.find.includes(word));
      count += weight.hidden ? 0 : 1;
    }
    for (const module of modules) {
      module.hidden = !module.querySelector("details.weight:not([hidden])");
      module.open = !module.hidden;
    }
    found.textContent = count === 1 ? "1 weight" : `${count} weights`;
  }

  find.addEventListener("input", search);
  document.getElementById("open").addEventListener("click", () => {
    for (const each of modules) each.open = true;
  });
  document.getElementById("close").addEventListener("click", () => {
    for (const each of [...modules, ...weights]) each.open = false;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== find) {
      event.preventDefault();
      find.focus();
    } else if (event.key === "Escape" && document.activeElement === find) {
      find.value = "";
      search();
    }
  });
  window.addEventListener("beforeprint", () => {
    for (const each of modules) each.open = true;
  });
})();
