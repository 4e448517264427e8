"use strict";
const specs = JSON.parse(document.getElementById("specs").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");

// The colours are the page's own, so that they follow the theme, and paper, without another drawing.
function theme() {
  const ink = "var(--ink)", soft = "var(--soft)", line = "var(--line)";
  return {
    background: "transparent", font: "system-ui, sans-serif", view: { stroke: line },
    axis: { labelColor: soft, titleColor: ink, gridColor: line, domainColor: soft, tickColor: soft, labelFontSize: 12, titleFontSize: 12 },
    legend: { labelColor: ink, titleColor: soft, labelFontSize: 12, titleFontSize: 12, orient: window.innerWidth < 640 ? "bottom" : "right", columns: window.innerWidth < 640 ? 2 : 1 },
    text: { color: ink }, mark: { color: "var(--mark)" },
  };
}

async function draw(isDark) {
  for (const [name, spec] of Object.entries(specs)) {
    const place = document.getElementById("chart-" + name);
    if (place) await vegaEmbed(place, spec, { config: theme(), actions: false, renderer: "svg", tooltip: { theme: isDark ? "dark" : "light" } });
  }
  document.documentElement.dataset.drawn = isDark ? "dark" : "light";
}

const rows = [...document.querySelectorAll("#table tbody tr")];

function filter() {
  const words = document.getElementById("filter").value.toLowerCase().split(/[\s,]+/).filter(Boolean);
  const precisions = new Set([...document.querySelectorAll(".precision:checked")].map((box) => box.value));
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !(precisions.has(row.dataset.precision) && words.every((word) => text.includes(word)));
  }
  document.getElementById("shown").textContent = rows.filter((row) => !row.hidden).length + " of " + rows.length;
}

function sort(button) {
  const column = Number(button.dataset.column), head = button.closest("th"), up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of document.querySelectorAll("#table th")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = (row) => row.children[column].dataset.value;
  rows.sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return up ? order : -order;
  });
  document.querySelector("#table tbody").append(...rows);
}

document.getElementById("filter").addEventListener("input", filter);
for (const box of document.querySelectorAll(".precision")) box.addEventListener("change", filter);
for (const button of document.querySelectorAll("#table thead button")) button.addEventListener("click", () => sort(button));
dark.addEventListener("change", (event) => draw(event.matches));
window.addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
filter();
draw(dark.matches);
