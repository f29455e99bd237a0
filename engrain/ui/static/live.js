// Says so when the polls of the running round go unanswered.
document.addEventListener("htmx:afterRequest", (event) => {
  document.getElementById("silence").hidden = event.detail.xhr.status >= 200 && event.detail.xhr.status < 400;
});
