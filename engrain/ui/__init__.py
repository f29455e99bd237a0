"""The dashboard: a local web server that shows what a store holds, and lets a person retire and restore items."""
