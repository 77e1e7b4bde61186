// The parts of a page that are refreshed ask for it again at each `ops:tick`: every 5 s while it is visible, and as
// soon as it becomes visible. What cannot be read is shown once, above the page, until it can be read again.
"use strict";

(() => {
  const EVERY_MS = 5000;
  let last = Date.now();

  const tick = () => {
    if (document.visibilityState !== "visible") return;
    last = Date.now();
    document.body.dispatchEvent(new CustomEvent("ops:tick"));
  };

  const tell = (failed) => {
    const notice = document.getElementById("stale");
    if (notice) notice.hidden = !failed;
  };

  setInterval(tick, EVERY_MS);
  document.addEventListener("visibilitychange", () => {
    if (Date.now() - last >= EVERY_MS) tick();
  });

  // An answer that is no page of ours (an error, a password asked for) replaces nothing.
  document.addEventListener("htmx:before:swap", (event) => {
    const answer = event.detail.ctx.response;
    if (answer && answer.status === 200) return tell(false);
    event.preventDefault();
    tell(true);
  });
  document.addEventListener("htmx:error", () => tell(true));
})();
