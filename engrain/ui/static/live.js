// Says so when the polls of the running round go unanswered, and tells screen readers of its stage when that changes.
document.addEventListener("htmx:afterRequest", (event) => {
  document.getElementById("silence").hidden = event.detail.xhr.status >= 200 && event.detail.xhr.status < 400;
});
let stage = document.getElementById("live").dataset.said;
document.addEventListener("htmx:afterSettle", () => {
  const now = document.getElementById("live").dataset.said;
  if (now !== stage) document.getElementById("said").textContent = stage = now;
});
