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

  const CAUSES = {
    401: "Your password is no longer accepted. Reload the page to log in.",
    404: "What it shows is no longer there. Reload the page to see why.",
    503: "Redis cannot be used now. Reload the page to see why.",
  };

  // Only the page is known to be away, not the receiver: it may work or not.
  const cause = (status) =>
    CAUSES[status] || (status ? `The ops page answers with error ${status}.` : "The ops page does not answer.");

  const tell = (text) => {
    const notice = document.getElementById("stale");
    if (!notice) return;
    const readAt = document.getElementById("read-at").textContent.replace("Read at ", "");
    if (text) notice.querySelector("span").textContent = `${text} All of this is as of ${readAt}.`;
    notice.hidden = !text;
  };

  setInterval(tick, EVERY_MS);
  document.addEventListener("visibilitychange", () => {
    if (Date.now() - last >= EVERY_MS) tick();
  });

  // An answer that is no page of ours (an error, a password asked for) replaces nothing.
  document.addEventListener("htmx:before:swap", (event) => {
    const answer = event.detail.ctx.response;
    if (answer && answer.status === 200) return tell("");
    event.preventDefault();
    tell(cause(answer && answer.status));
  });
  document.addEventListener("htmx:error", () => tell(cause(0)));
})();
