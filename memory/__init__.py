"""Experience: episodes, items, knowledge versions and their lineage in one database."""
