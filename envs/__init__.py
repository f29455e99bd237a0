"""Worlds: tasks and the envs that play them, in text."""
