"use strict";
const root = document.documentElement;
const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
const frames = [...document.querySelectorAll("#frames > .frame")];
if (frames.length) {
  const time = document.getElementById("time");
  const show = () => frames.forEach((frame, number) => { frame.hidden = number !== Number(time.value); });
  document.getElementById("way").hidden = false;
  document.getElementById("frames").classList.add("one");
  time.addEventListener("input", show);
  show();
}
