"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// Before and after: the range input lies over the pictures, so drag, touch and arrow keys all come through it.
for (const box of all(".compare")) {
  const slider = box.querySelector("input");
  const move = () => {
    box.style.setProperty("--x", slider.value + "%");
    slider.setAttribute("aria-valuetext", `${Math.round(slider.value)} % ${box.querySelector(".name.first").textContent}`);
  };
  slider.addEventListener("input", move);
  move();
  for (const choice of all(`select[data-for="${box.id}"]`)) {
    choice.addEventListener("change", () => {
      const side = choice.dataset.side;
      for (const picture of all("img", box)) picture.classList.toggle(side, picture.dataset.picture === choice.value);
      box.querySelector(side === "left" ? ".name.first" : ".name.second").textContent =
        choice.selectedOptions[0].textContent;
      move();
    });
  }
}

// Tables: the first click sorts upward, the next downward; cells without a figure stay at the end.
function sortBy(head, downward) {
  const table = head.closest("table");
  const column = [...head.parentNode.children].indexOf(head);
  for (const other of all("th[aria-sort]", table)) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", downward ? "descending" : "ascending");
  const key = (row) => row.children[column].dataset.value;
  const numbers = head.dataset.kind === "number";
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [key(row), row]);
  rows.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = numbers ? (+a > +b) - (+a < +b) : a.localeCompare(b, "en", { numeric: true });
    return downward ? -order : order;
  });
  body.append(...rows.map(([, row]) => row));
}
for (const head of all("th[aria-sort]")) {
  head.querySelector("button").addEventListener("click", () => {
    sortBy(head, head.getAttribute("aria-sort") === "ascending");
  });
}

// Rows of one method, or whose name holds some letters.
const method = document.getElementById("only-method");
const letters = document.getElementById("only-name");
if (method && letters) {
  const filter = () => {
    let shown = 0;
    const wanted = letters.value.trim().toLowerCase();
    for (const row of document.getElementById("photos-table").tBodies[0].rows) {
      const fits = (!method.value || row.dataset.method === method.value) && row.dataset.name.includes(wanted);
      row.hidden = !fits;
      shown += fits;
    }
    document.getElementById("shown").textContent = shown === 1 ? "1 row" : `${shown} rows`;
  };
  method.addEventListener("change", filter);
  letters.addEventListener("input", filter);
  filter();
}

const theme = document.getElementById("theme");
theme.addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
