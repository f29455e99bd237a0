"""The application: the round, its gate, its settings and its command line."""
