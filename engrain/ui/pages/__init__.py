"""The pages of the dashboard, one module a noun; each has a `router`."""
